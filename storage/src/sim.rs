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

mod operations;
mod random;
mod world;

pub use operations::{SimBuf, SimHandle};
pub use random::Random;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::Notify;
use world::{BUFFERS, World};

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

impl SimDisk {
    /// An empty disk that crashes at its `crash_at`th operation.
    pub fn new(seed: u64, crash_at: u64, faults: Faults) -> Self {
        let world = World { crash_at, faults, buffers: BUFFERS, ..World::default() };
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
        let world = self.world.borrow().after_crash(&mut random, crash_at, faults);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use std::future::Future;

    fn run<F: Future>(body: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(body)
    }

    async fn write(disk: &SimDisk, file: &SimHandle, byte: u8, at: u64) {
        let mut buf = disk.buffer().await;
        buf.fill(byte);
        disk.write(file, buf, 4096, at).await.0.expect("written");
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
