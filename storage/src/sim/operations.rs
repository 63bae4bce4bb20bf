//! What the simulated disk does when it is asked.

use super::world::{SECTOR_BYTES, SimFile, World, put};
use super::{SimDisk, turn};
use crate::disk::Disk;
use crate::files::Entry;
use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES};
use bytes::Bytes;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::sync::Notify;

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
            }
            (if fails { Err(io::Error::other("simulated write error")) } else { Ok(()) }, buf)
        }
    }

    async fn read(&self, file: &SimHandle, at: u64, len: usize) -> io::Result<Bytes> {
        self.step().await;
        if self.fails(|faults| faults.reads) {
            return Err(io::Error::other("simulated read error"));
        }
        let world = self.world.borrow();
        let seen = &world.files[file.0].seen;
        let from = position(at).min(seen.len());
        Ok(Bytes::copy_from_slice(&seen[from..from + len.min(seen.len() - from)]))
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
        {
            // The worst order: the new size is durable at once, what was written before it only by the sync.
            let mut world = self.world.borrow_mut();
            let file = &mut world.files[file.0];
            file.seen.resize(position(length), 0);
            file.durable.resize(position(length), 0);
        }
        self.sync(file).await?;
        self.world.borrow_mut().files[file.0].durable.truncate(position(length));
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

fn position(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}
