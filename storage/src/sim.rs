//! A disk that lies by stated rules, deterministic from a seed.
//!
//! What it may do, and when:
//! - Any operation completes late, after others that were submitted behind it; now and then one is stuck
//!   for hundreds of turns.
//! - A write, sync, read or name may fail (`Faults`): a failed write may have left a part of its sectors, a
//!   full disk (`space`) refuses new blocks and names. A read that fails succeeds when it is repeated.
//! - At the crash everything stops. Then of every write that no later sync of its file made durable, any
//!   512-byte sectors are there and the others are not; so for the file's length. A sync makes durable
//!   what was complete when it was asked for. Names (files and folders, at every level) that no later
//!   sync of their folder made durable are there or not, each by itself; what lies in a lost folder is lost.
//! - Symbolic links are names like others. Hard links and renames from one file system to another are refused.
//! - Removals, hard links, renames and whole small files are durable at once and never half done (removals and
//!   links are done again after a crash by what asked for them, the others are synced on the real disk).
//!
//! - Only where a test plants it: syncs that say yes and do nothing; writes that land a block beside their
//!   place; bits that rot at rest.
//!
//! It does not, unless planted: change what was durable, tear within a sector, or lose what a completed sync
//! covered.

use crate::disk::{Disk, Durability};
use crate::files::Entry;
use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::Notify;

const SECTOR_BYTES: usize = 512;
const PAUSE: u64 = 4;
const STUCK_TURNS: u64 = 300;

/// How often what goes wrong, of 1,000 operations.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Writes that fail.
    pub writes: u32,
    /// Syncs that fail.
    pub syncs: u32,
    /// Reads that fail once.
    pub reads: u32,
    /// Writes, files and folders that are refused because the disk is full.
    pub space: u32,
    /// Operations that are stuck for hundreds of turns.
    pub stuck: u32,
    /// Planted: writes that land one block beside their place and say yes.
    pub misdirected: u32,
    /// Every sync of a file says yes and does nothing: the planted bug *acknowledged before it is durable*.
    pub file_syncs_lie: bool,
    /// The same for folders: the planted bug *a file whose name is not durable*.
    pub folder_syncs_lie: bool,
}

/// Deterministic random numbers (SplitMix64, Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound.max(1)
    }
}

#[derive(Debug, Clone, Default)]
struct SimFile {
    /// As a reader sees it now.
    seen: Vec<u8>,
    /// As it is certain to be after a crash.
    durable: Vec<u8>,
    /// Complete and not synced, in the order they completed, numbered.
    unsynced: Vec<(u64, usize, Vec<u8>)>,
    completed: u64,
}

#[derive(Debug, Default)]
struct World {
    files: Vec<SimFile>,
    /// Names of files.
    names: BTreeMap<PathBuf, usize>,
    folders: BTreeSet<PathBuf>,
    /// Symbolic links.
    links: BTreeMap<PathBuf, PathBuf>,
    /// Roots of the file systems beside the first.
    mounts: BTreeSet<PathBuf>,
    /// Names, of all kinds, that a crash may take.
    unsynced_names: BTreeSet<PathBuf>,
    operations: u64,
    crash_at: u64,
    crashed: bool,
    faults: Faults,
    /// Buffers that may still be made, and those that came back.
    buffers: usize,
    pool: Vec<Vec<u8>>,
}

impl World {
    /// A path without links; of the last name only if `follow`.
    fn resolve(&self, path: &Path, follow: bool) -> PathBuf {
        let above = path.ancestors().skip(usize::from(!follow));
        for at in above {
            if let (Some(target), Ok(rest)) = (self.links.get(at), path.strip_prefix(at)) {
                return if rest.as_os_str().is_empty() { target.clone() } else { target.join(rest) };
            }
        }
        path.to_owned()
    }

    /// The file that a path names.
    fn file(&self, path: &Path) -> Option<usize> {
        self.names.get(&self.resolve(path, true)).copied()
    }

    fn is_taken(&self, name: &Path) -> bool {
        self.names.contains_key(name) || self.folders.contains(name) || self.links.contains_key(name)
    }

    /// Refuses what only works within one file system.
    fn within_one(&self, from: &Path, to: &Path) -> io::Result<()> {
        let of = |path: &Path| self.mounts.iter().rfind(|root| path.starts_with(root));
        if of(from) == of(to) { Ok(()) } else { Err(io::ErrorKind::CrossesDevices.into()) }
    }
}

/// The disk; clones are the same one.
#[derive(Debug, Clone)]
pub struct SimDisk {
    world: Rc<RefCell<World>>,
    random: Rc<RefCell<Random>>,
    buffer_back: Rc<Notify>,
    crash: Rc<Notify>,
    /// Turns that others may have before an operation, at most.
    pause: u64,
}

/// An open file.
#[derive(Debug, Clone)]
pub struct SimHandle(usize);

/// A buffer of the pool.
#[derive(Debug)]
pub struct SimBuf {
    bytes: Vec<u8>,
    world: Rc<RefCell<World>>,
    back: Rc<Notify>,
}

impl std::ops::Deref for SimBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl std::ops::DerefMut for SimBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for SimBuf {
    fn drop(&mut self) {
        let mut world = self.world.borrow_mut();
        world.pool.push(std::mem::take(&mut self.bytes));
        self.back.notify_one();
    }
}

impl SimDisk {
    /// An empty disk that crashes at its `crash_at`th operation.
    pub fn new(seed: u64, crash_at: u64, faults: Faults) -> Self {
        let world = World { crash_at, faults, buffers: 16, ..World::default() };
        Self {
            world: Rc::new(RefCell::new(world)),
            random: Rc::new(RefCell::new(Random::new(seed))),
            buffer_back: Rc::default(),
            crash: Rc::default(),
            pause: PAUSE,
        }
    }

    /// Makes a folder the root of another file system.
    pub fn mount(&self, root: &Path) {
        self.world.borrow_mut().mounts.insert(root.to_owned());
    }

    /// Resolves when it has crashed.
    pub async fn crashed(&self) {
        while !self.world.borrow().crashed {
            self.crash.notified().await;
        }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.world.borrow().operations
    }

    /// The disk as it is found after the crash; it crashes again at its `crash_at`th operation.
    pub fn after_crash(&self, crash_at: u64, faults: Faults) -> Self {
        let mut random = self.random.borrow_mut();
        let old = self.world.borrow();
        let mut world = World { crash_at, faults, buffers: 16 - old.pool.len(), ..World::default() };
        world.pool.clone_from(&old.pool);
        let lost: Vec<&PathBuf> = old.unsynced_names.iter().filter(|_| random.below(2) == 0).collect();
        let is_lost = |path: &Path| lost.iter().any(|lost| path.starts_with(lost));
        world.folders = old.folders.iter().filter(|path| !is_lost(path)).cloned().collect();
        world.links = old.links.iter().filter(|(p, _)| !is_lost(p)).map(|(p, t)| (p.clone(), t.clone())).collect();
        world.mounts = old.mounts.clone();
        world.names = old.names.iter().filter(|(path, _)| !is_lost(path)).map(|(p, f)| (p.clone(), *f)).collect();
        world.files = old.files.iter().map(|file| file.after_crash(&mut random)).collect();
        Self {
            world: Rc::new(RefCell::new(world)),
            random: Rc::new(RefCell::new(Random::new(random.bits()))),
            buffer_back: Rc::default(),
            crash: Rc::default(),
            pause: PAUSE,
        }
    }

    /// The same disk for a thread that is slow: others have up to `pause` turns before each operation.
    pub fn slowed(&self, pause: u64) -> Self {
        Self { pause, ..self.clone() }
    }

    /// Crashes after so many operations more.
    pub fn arm(&self, operations: u64, faults: Faults) {
        let mut world = self.world.borrow_mut();
        world.crash_at = world.operations + operations;
        world.faults = faults;
    }

    /// Names and contents, to compare two moments with.
    pub fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let world = self.world.borrow();
        let files = world.names.iter().map(|(path, file)| (path.clone(), world.files[*file].seen.clone()));
        let target = |target: &PathBuf| target.as_os_str().as_encoded_bytes().to_vec();
        files.chain(world.links.iter().map(|(path, to)| (path.clone(), target(to)))).collect()
    }

    /// Counts an operation and lets others run before it; never returns once the disk has crashed.
    async fn step(&self) {
        let mut pause = self.random.borrow_mut().below(self.pause);
        if self.fails(|faults| faults.stuck) {
            pause += STUCK_TURNS;
        }
        for _ in 0..pause {
            turn().await;
        }
        let crashed = {
            let mut world = self.world.borrow_mut();
            world.operations += 1;
            world.crashed |= world.operations >= world.crash_at;
            world.crashed
        };
        if crashed {
            self.crash.notify_waiters();
            self.crash.notify_one();
            std::future::pending::<()>().await;
        }
    }

    /// Whether this operation is one of those that go wrong.
    fn fails(&self, of_1000: impl Fn(&Faults) -> u32) -> bool {
        let of_1000 = of_1000(&self.world.borrow().faults);
        of_1000 > 0 && self.random.borrow_mut().below(1000) < u64::from(of_1000)
    }

    /// Refuses when the disk is full, or says it is.
    fn room(&self) -> io::Result<()> {
        if self.fails(|faults| faults.space) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Flips a bit of a file at rest: seen by every later read, before and after a crash.
    pub fn rot(&self, path: &Path, at: usize, bit: u8) {
        let mut world = self.world.borrow_mut();
        let Some(file) = world.names.get(path).copied() else { return };
        let file = &mut world.files[file];
        for bytes in [&mut file.seen, &mut file.durable] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << (bit % 8);
            }
        }
    }
}

impl SimFile {
    fn after_crash(&self, random: &mut Random) -> Self {
        let mut found = self.durable.clone();
        // The length may be any between what was certain and what was seen.
        if found.len() < self.seen.len() && random.below(2) == 0 {
            found.resize(self.seen.len(), 0);
        }
        for (_, at, bytes) in &self.unsynced {
            // Often all of a write or nothing, sometimes any of its sectors.
            let mode = random.below(3);
            for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                let keep = match mode {
                    0 => true,
                    1 => false,
                    _ => random.below(2) == 0,
                };
                if keep {
                    put(&mut found, at + index * SECTOR_BYTES, sector);
                }
            }
        }
        Self { durable: found.clone(), seen: found, ..Self::default() }
    }
}

/// Lets the other tasks of the thread have a turn. (Tokio's own yield asks the system for events each time,
/// which is most of a simulation's time.)
async fn turn() {
    let mut waited = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

fn put(into: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if into.len() < at + bytes.len() {
        into.resize(at + bytes.len(), 0);
    }
    into[at..at + bytes.len()].copy_from_slice(bytes);
}

fn position(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}

impl Disk for SimDisk {
    type File = SimHandle;
    type Buf = SimBuf;

    async fn buffer(&self) -> SimBuf {
        loop {
            // With what was in them, like those of the real disk.
            let free = {
                let mut world = self.world.borrow_mut();
                match world.pool.pop() {
                    None if world.buffers > 0 => {
                        world.buffers -= 1;
                        Some(vec![0; RING_BUFFER_BYTES])
                    }
                    free => free,
                }
            };
            if let Some(bytes) = free {
                let (world, back) = (Rc::clone(&self.world), Rc::clone(&self.buffer_back));
                return SimBuf { bytes, world, back };
            }
            self.buffer_back.notified().await;
        }
    }

    fn registered(&self) -> bool {
        false
    }

    async fn create(&self, path: &Path) -> io::Result<SimHandle> {
        self.step().await;
        self.room()?;
        let mut world = self.world.borrow_mut();
        let path = world.resolve(path, true);
        if world.is_taken(&path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if path.parent().is_some_and(|parent| !world.folders.contains(parent)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = world.files.len();
        world.files.push(SimFile::default());
        world.names.insert(path.clone(), file);
        world.unsynced_names.insert(path);
        Ok(SimHandle(file))
    }

    async fn open(&self, path: &Path) -> io::Result<SimHandle> {
        self.step().await;
        let found = self.world.borrow().file(path);
        found.map(SimHandle).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn write(
        &self,
        file: &SimHandle,
        buf: SimBuf,
        len: usize,
        at: u64,
        durability: Durability,
    ) -> impl Future<Output = (io::Result<()>, SimBuf)> + 'static {
        let (disk, file) = (self.clone(), file.0);
        async move {
            disk.step().await;
            if let Err(full) = disk.room() {
                return (Err(full), buf);
            }
            let fails = disk.fails(|faults| faults.writes);
            let at = if disk.fails(|faults| faults.misdirected) { at + BLOCK_BYTES } else { at };
            {
                let mut world = disk.world.borrow_mut();
                let file = &mut world.files[file];
                let bytes = buf.get(..len).unwrap_or(&[]);
                // A write that fails may have left a part.
                let kept = if fails { len / 2 / SECTOR_BYTES * SECTOR_BYTES } else { len };
                let bytes = bytes.get(..kept).unwrap_or(&[]).to_vec();
                put(&mut file.seen, position(at), &bytes);
                file.unsynced.push((file.completed, position(at), bytes));
                file.completed += 1;
                if durability == Durability::Now && !fails {
                    file.durable = file.seen.clone();
                    file.unsynced.clear();
                }
            }
            (if fails { Err(io::Error::other("simulated write error")) } else { Ok(()) }, buf)
        }
    }

    fn read(
        &self,
        file: &SimHandle,
        mut buf: SimBuf,
        len: usize,
        at: u64,
    ) -> impl Future<Output = (io::Result<usize>, SimBuf)> + 'static {
        let (disk, file) = (self.clone(), file.0);
        async move {
            disk.step().await;
            if disk.fails(|faults| faults.reads) {
                return (Err(io::Error::other("simulated read error")), buf);
            }
            let count = {
                let world = disk.world.borrow();
                let seen = &world.files[file].seen;
                let from = position(at).min(seen.len());
                let count = len.min(seen.len() - from);
                buf.bytes[..count].copy_from_slice(&seen[from..from + count]);
                count
            };
            (Ok(count), buf)
        }
    }

    fn sync(&self, file: &SimHandle) -> impl Future<Output = io::Result<()>> + 'static {
        let (disk, file) = (self.clone(), file.0);
        // What is complete now is covered; what completes meanwhile is not.
        let (covered, length) = {
            let world = self.world.borrow();
            (world.files[file].completed, world.files[file].seen.len())
        };
        async move {
            disk.step().await;
            if disk.fails(|faults| faults.syncs) {
                return Err(io::Error::other("simulated sync error"));
            }
            let mut world = disk.world.borrow_mut();
            if world.faults.file_syncs_lie {
                return Ok(());
            }
            let file = &mut world.files[file];
            let (synced, later) = std::mem::take(&mut file.unsynced).into_iter().partition(|write| write.0 < covered);
            file.unsynced = later;
            let synced: Vec<(u64, usize, Vec<u8>)> = synced;
            for (_, at, bytes) in synced {
                put(&mut file.durable, at, &bytes);
            }
            if file.durable.len() < length {
                file.durable.resize(length, 0);
            }
            Ok(())
        }
    }

    async fn allocate(&self, file: &SimHandle, from: u64, length: u64) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let seen = &mut world.files[file.0].seen;
        let end = position(from + length);
        if seen.len() < end {
            seen.resize(end, 0);
        }
        Ok(())
    }

    async fn truncate(&self, file: &SimHandle, length: u64) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let file = &mut world.files[file.0];
        file.seen.resize(position(length), 0);
        file.durable = file.seen.clone();
        file.unsynced.clear();
        Ok(())
    }

    async fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.step().await;
        self.room()?;
        let mut world = self.world.borrow_mut();
        let path = world.resolve(path, false);
        if world.is_taken(&path) {
            return Ok(());
        }
        // The roots are made without what lies above them.
        world.folders.insert(path.clone());
        world.unsynced_names.insert(path);
        Ok(())
    }

    fn is_dir(&self, path: &Path) -> bool {
        let world = self.world.borrow();
        world.folders.contains(&world.resolve(path, true))
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step().await;
        if self.fails(|faults| faults.syncs) {
            return Err(io::Error::other("simulated sync error"));
        }
        let mut world = self.world.borrow_mut();
        let path = world.resolve(path, true);
        let path = path.as_path();
        if !world.faults.folder_syncs_lie {
            world.unsynced_names.retain(|name| name.parent() != Some(path));
        }
        Ok(())
    }

    async fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let (from, to) = (world.resolve(from, true), world.resolve(to, false));
        world.within_one(&from, &to)?;
        let file = world.names.get(&from).copied().ok_or(io::ErrorKind::NotFound)?;
        world.names.entry(to).or_insert(file);
        Ok(())
    }

    async fn symlink(&self, target: &Path, at: &Path) -> io::Result<()> {
        self.step().await;
        self.room()?;
        let mut world = self.world.borrow_mut();
        let at = world.resolve(at, false);
        if world.is_taken(&at) {
            return Ok(());
        }
        if at.parent().is_some_and(|parent| !world.folders.contains(parent)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        world.links.insert(at.clone(), target.to_owned());
        world.unsynced_names.insert(at);
        Ok(())
    }

    async fn read_link(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let world = self.world.borrow();
        Ok(world.links.get(&world.resolve(path, false)).cloned())
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let path = world.resolve(path, false);
        let path = path.as_path();
        if world.names.contains_key(path) {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        world.names.retain(|name, _| !name.starts_with(path));
        world.links.retain(|name, _| !name.starts_with(path));
        world.folders.retain(|name| !name.starts_with(path));
        world.unsynced_names.retain(|name| !name.starts_with(path));
        Ok(())
    }

    async fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.step().await;
        let world = self.world.borrow();
        let real = world.resolve(path, true);
        let inside = |name: &&PathBuf| name.parent() == Some(&real);
        let folders = world.folders.iter().filter(inside).map(|name| (name, true, false));
        let files = world.names.keys().filter(inside).map(|name| (name, false, false));
        let leads = |name: &PathBuf| world.folders.contains(&world.resolve(name, true));
        let links = world.links.keys().filter(inside).map(|name| (name, leads(name), true));
        // By the path that was asked for, as a file system tells them.
        let named = |name: &Path| name.file_name().map_or_else(|| path.to_owned(), |name| path.join(name));
        let entry = |(name, is_dir, is_link): (&PathBuf, bool, bool)| Entry { path: named(name), is_dir, is_link };
        let mut all: Vec<Entry> = folders.chain(files).chain(links).map(entry).collect();
        all.sort();
        Ok(all)
    }

    async fn length(&self, path: &Path) -> io::Result<u64> {
        self.step().await;
        let world = self.world.borrow();
        let file = world.file(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(world.files[file].seen.len() as u64)
    }

    async fn data_end(&self, path: &Path, from: u64) -> io::Result<u64> {
        Ok(self.length(path).await?.max(from))
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let path = world.resolve(path, false);
        world.names.remove(&path);
        world.links.remove(&path);
        world.unsynced_names.remove(&path);
        Ok(())
    }

    async fn read_small(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        self.step().await;
        let world = self.world.borrow();
        Ok(world.file(path).map(|file| world.files[file].seen.clone()))
    }

    async fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.step().await;
        self.room()?;
        let mut world = self.world.borrow_mut();
        let file = SimFile { seen: bytes.to_vec(), durable: bytes.to_vec(), ..SimFile::default() };
        let at = world.files.len();
        world.files.push(file);
        let path = world.resolve(path, true);
        world.unsynced_names.remove(&path);
        world.names.insert(path, at);
        Ok(())
    }

    async fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step().await;
        self.room()?;
        let mut world = self.world.borrow_mut();
        let (from, to) = (world.file(from).ok_or(io::ErrorKind::NotFound)?, world.resolve(to, true));
        let seen = world.files[from].seen.clone();
        let at = world.files.len();
        world.files.push(SimFile { durable: seen.clone(), seen, ..SimFile::default() });
        world.names.insert(to, at);
        Ok(())
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step().await;
        let mut world = self.world.borrow_mut();
        let (from, to) = (world.resolve(from, false), world.resolve(to, false));
        world.within_one(&from, &to)?;
        let moved = |name: &Path| {
            let rest = name.strip_prefix(&from).ok()?;
            Some(if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) })
        };
        world.links = std::mem::take(&mut world.links)
            .into_iter()
            .map(|(name, target)| (moved(&name).unwrap_or(name), target))
            .collect();
        world.names = std::mem::take(&mut world.names)
            .into_iter()
            .map(|(name, file)| (moved(&name).unwrap_or(name), file))
            .collect();
        world.folders =
            std::mem::take(&mut world.folders).into_iter().map(|name| moved(&name).unwrap_or(name)).collect();
        Ok(())
    }

    async fn breathe(&self) {
        turn().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<F: Future>(body: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(body)
    }

    async fn write(disk: &SimDisk, file: &SimHandle, byte: u8, at: u64) {
        let mut buf = disk.buffer().await;
        buf.fill(byte);
        disk.write(file, buf, 4096, at, Durability::Later).await.0.expect("written");
    }

    #[test]
    fn what_was_synced_survives_and_what_was_not_may_be_torn_or_lost() {
        let mut torn = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(seed, u64::MAX, Faults::default());
            let found = run(async {
                let dir = Path::new("/d");
                disk.make_dir(dir).await.expect("made");
                let file = disk.create(Path::new("/d/f")).await.expect("created");
                write(&disk, &file, 1, 0).await;
                disk.sync(&file).await.expect("synced");
                disk.sync_dir(dir).await.expect("synced");
                disk.sync_dir(Path::new("/")).await.expect("synced");
                write(&disk, &file, 2, 4096).await;
                disk.after_crash(u64::MAX, Faults::default()).contents()
            });
            let file = &found[Path::new("/d/f")];
            assert!(file[..4096].iter().all(|byte| *byte == 1));
            let kept = file.get(4096..).unwrap_or(&[]).iter().filter(|byte| **byte == 2).count();
            torn += usize::from(0 < kept && kept < 4096);
        }
        assert!(torn > 10, "{torn} of 100 writes were torn");
    }

    #[test]
    fn a_name_is_lost_with_its_folder_unless_every_level_was_synced() {
        let mut lost = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(seed, u64::MAX, Faults::default());
            let found = run(async {
                disk.make_dir(Path::new("/d")).await.expect("made");
                disk.create(Path::new("/d/f")).await.expect("created");
                disk.sync_dir(Path::new("/d")).await.expect("synced");
                disk.after_crash(u64::MAX, Faults::default()).contents()
            });
            lost += usize::from(found.is_empty());
        }
        assert!((30..70).contains(&lost), "{lost} of 100 were lost");
    }
}
