//! The seam between what is written and how. Everything that touches a file of a recording goes
//! through [`Disk`]; its implementations are `uring` (the real one), `posix` (where io_uring is
//! not to be had) and, in tests, disks that misbehave by stated rules.
//!
//! A `Disk` belongs to one thread and is not `Send`: its operations are futures of that thread's
//! runtime. Buffers are given away with an operation and come back with its result, also on failure.

use crate::files::{self, Entry};
use bytes::Bytes;
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which implementation is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring through tokio-uring.
    Uring,
    /// Plain system calls.
    Posix,
}

impl Engine {
    /// The name shown by `info` and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Posix => "posix",
        }
    }
}

/// What a disk can do on this machine, found out at start (see `uring::probe`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    /// The engine in use.
    pub engine: Engine,
    /// Whether files are opened with `O_DIRECT`.
    pub direct: bool,
    /// Whether ring buffers may be registered with the kernel.
    pub registered: bool,
    /// Why one of them is not what one would wish, with the remedy.
    pub notes: Vec<String>,
}

/// One thread's way to the files.
pub trait Disk: Clone + 'static {
    /// An open file; clones share the descriptor.
    type File: Clone + 'static;
    /// A block-aligned buffer of [`crate::limits::RING_BUFFER_BYTES`] from this disk's pool.
    type Buf: DerefMut<Target = [u8]> + 'static;

    /// Waits for a free buffer. The pool is bounded: this is where encoding waits for the device.
    fn buffer(&self) -> impl Future<Output = Self::Buf>;
    /// Whether the buffers are registered with the kernel.
    fn registered(&self) -> bool;
    /// Creates a file that must not exist yet, for direct writes where the state allows.
    fn create(&self, path: &Path) -> impl Future<Output = io::Result<Self::File>>;
    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> impl Future<Output = io::Result<Self::File>>;
    /// Writes the first `len` bytes at `at`; both are multiples of the block size. Durable by a [`Self::sync`] behind it.
    fn write(
        &self,
        file: &Self::File,
        buf: Self::Buf,
        len: usize,
        at: u64,
    ) -> impl Future<Output = (io::Result<()>, Self::Buf)> + 'static;
    /// Reads `len` bytes at `at`, a multiple of the block size, into memory of their own; fewer only at the end of the file.
    fn read(&self, file: &Self::File, at: u64, len: usize) -> impl Future<Output = io::Result<Bytes>>;
    /// Makes the data written so far durable (fdatasync).
    fn sync(&self, file: &Self::File) -> impl Future<Output = io::Result<()>> + 'static;
    /// Reserves blocks and sets the size (fallocate mode 0, never `KEEP_SIZE`).
    fn allocate(&self, file: &Self::File, from: u64, length: u64) -> impl Future<Output = io::Result<()>>;
    /// Cuts the file; makes the new size durable, and what was written before (ftruncate, fsync).
    fn truncate(&self, file: &Self::File, length: u64) -> impl Future<Output = io::Result<()>>;
    /// Makes a folder; one that is there already is fine.
    fn make_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Gives a file a second name; one that is there already is fine.
    fn link(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;
    /// Makes a symbolic link at a path; one that is there already is fine.
    fn symlink(&self, target: &Path, at: &Path) -> impl Future<Output = io::Result<()>> {
        std::future::ready(files::symlink(target, at))
    }
    /// Whether a folder is at a path, or behind a link there. Asks for a name only.
    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }
    /// Where a symbolic link points; `None` for what is none, or is not there. Asks for a name only.
    fn read_link(&self, path: &Path) -> impl Future<Output = io::Result<Option<PathBuf>>> {
        std::future::ready(files::read_link(path))
    }
    /// A large file, or those in a folder and below it, open, so that they can be removed without their space
    /// ([`crate::reclaim`]); none where that makes no difference.
    fn keep_open(&self, _path: &Path) -> Vec<std::fs::File> {
        Vec::new()
    }
    /// Removes a folder and all below it, of a link the link; one that is not there is fine.
    fn remove_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// What is in a folder, by name; nothing when it is not there. This and what follows are for the
    /// passes at start and the steward, and may block: never for a writer.
    fn list(&self, path: &Path) -> impl Future<Output = io::Result<Vec<Entry>>> {
        std::future::ready(files::list(path))
    }
    /// Length of a file, in bytes.
    fn length(&self, path: &Path) -> impl Future<Output = io::Result<u64>> {
        std::future::ready(std::fs::metadata(path).map(|metadata| metadata.len()))
    }
    /// Where the data behind `from` ends (see [`files::data_end`]).
    fn data_end(&self, path: &Path, from: u64) -> impl Future<Output = io::Result<u64>> {
        std::future::ready(files::data_end(path, from))
    }
    /// Removes a file; one that is not there is fine.
    fn remove_file(&self, path: &Path) -> impl Future<Output = io::Result<()>> {
        std::future::ready(files::remove_file(path))
    }
    /// The bytes of a small file; `None` when it is not there.
    fn read_small(&self, path: &Path) -> impl Future<Output = io::Result<Option<Vec<u8>>>> {
        std::future::ready(files::read_small(path))
    }
    /// Writes a small file whole, durably, in place of what was there.
    fn replace(&self, path: &Path, bytes: &[u8]) -> impl Future<Output = io::Result<()>> {
        std::future::ready(files::replace(path, bytes))
    }
    /// Copies a file, durably.
    fn copy(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>> {
        std::future::ready(files::copy(from, to))
    }
    /// Gives a file or folder another name, durably.
    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>> {
        std::future::ready(files::rename(from, to))
    }
    /// Lets the kernel have what was submitted and lets other tasks of the thread run: a writer
    /// calls it at least once per slice of work.
    fn breathe(&self) -> impl Future<Output = ()>;
}

/// Folders whose names are durable, because this program synced them since it started.
///
/// That a folder is there proves nothing: whoever made it may still be waiting for the sync of its name, or have met
/// an error there; then a power cut takes it with all that others put into it meanwhile (INV-1).
#[derive(Debug, Default)]
pub struct Folders {
    durable: Mutex<HashSet<PathBuf>>,
}

impl Folders {
    /// Folders remembered; past that all are forgotten, and synced once more.
    const MAX: usize = 4096;

    /// Makes `path` and every folder above it below `root`, parents first. All of their names are durable on return.
    ///
    /// # Errors
    /// The first that the system reports.
    pub async fn make<D: Disk>(&self, disk: &D, root: &Path, path: &Path) -> io::Result<()> {
        let mut doubtful = Vec::new();
        let mut at = Some(path);
        while let Some(dir) = at.filter(|dir| *dir != root) {
            // Those above it were durable before it was.
            if self.lock().contains(dir) && disk.is_dir(dir) {
                break;
            }
            doubtful.push(dir);
            at = dir.parent();
        }
        for dir in doubtful.into_iter().rev() {
            disk.make_dir(dir).await?;
            if let Some(parent) = dir.parent() {
                disk.sync_dir(parent).await?;
            }
            let mut durable = self.lock();
            if durable.len() >= Self::MAX {
                durable.clear();
            }
            durable.insert(dir.to_owned());
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes `path` and every missing folder above it below `root`, parents first, and syncs the names of those it made: for
/// what can be made again, everything else takes [`Folders`].
///
/// # Errors
/// The first that the system reports.
pub async fn make_dirs<D: Disk>(disk: &D, root: &Path, path: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = Some(path);
    while let Some(dir) = at.filter(|dir| *dir != root && !disk.is_dir(dir)) {
        missing.push(dir.to_owned());
        at = dir.parent();
    }
    for dir in missing.iter().rev() {
        disk.make_dir(dir).await?;
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).await?;
        }
    }
    Ok(())
}

/// Bytes that went to files of recordings, by what they were for.
#[derive(Debug, Default)]
pub struct IoCounters {
    /// Row groups that were committed.
    pub chunk: AtomicU64,
    /// Zeros up to the next block.
    pub padding: AtomicU64,
    /// Chunk trailers.
    pub trailer: AtomicU64,
    /// Parquet heads and footers with their padding.
    pub footer: AtomicU64,
    /// Row groups written again, or never committed.
    pub rewrite: AtomicU64,
    /// Bytes read back.
    pub read: AtomicU64,
}

impl IoCounters {
    /// Shared by all rings.
    pub fn shared() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Adds to one counter.
    pub fn add(counter: &AtomicU64, bytes: u64) {
        counter.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{Faults, SimDisk};

    fn run<F: Future>(body: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(body)
    }

    /// Puts `file` into `dir` as a segment is made: the folder by `made`, then the file and its folder synced.
    async fn put(disk: &SimDisk, made: impl Future<Output = io::Result<()>>, dir: &Path, file: &str) -> io::Result<()> {
        made.await?;
        let file = disk.create(&dir.join(file)).await?;
        disk.sync(&file).await?;
        disk.sync_dir(dir).await
    }

    #[test]
    fn inv_1_a_folder_whose_sync_failed_is_synced_before_anything_in_it_counts() {
        let (root, dir) = (Path::new("/"), Path::new("/a/b"));
        let mut lost = 0;
        for seed in 0..300 {
            let (of_folders, of_no_memory) = run(async {
                let found_by = async |remembers: bool| {
                    let faults = Faults { syncs: 300, ..Faults::default() };
                    let disk = SimDisk::new(seed, u64::MAX, faults);
                    let folders = Folders::default();
                    let mut durable = Vec::new();
                    for name in ["0", "1", "2", "3", "4", "5"] {
                        let made = async {
                            if remembers {
                                folders.make(&disk, root, dir).await
                            } else {
                                make_dirs(&disk, root, dir).await
                            }
                        };
                        if put(&disk, made, dir, name).await.is_ok() {
                            durable.push(dir.join(name));
                        }
                    }
                    let found = disk.after_crash(u64::MAX, Faults::default()).contents();
                    durable.iter().filter(|path| !found.contains_key(*path)).count()
                };
                (found_by(true).await, found_by(false).await)
            });
            assert_eq!(of_folders, 0, "seed {seed}");
            lost += of_no_memory;
        }
        // The reason for it: a folder that is there is no proof.
        assert!(lost > 0, "{lost} files lost without memory");
    }

    #[test]
    fn a_folder_that_is_known_costs_nothing_the_second_time() {
        let disk = SimDisk::new(1, u64::MAX, Faults::default());
        let folders = Folders::default();
        run(async {
            let dir = Path::new("/a/b");
            folders.make(&disk, Path::new("/"), dir).await.expect("made");
            let before = disk.operations();
            folders.make(&disk, Path::new("/"), dir).await.expect("made");
            assert_eq!(disk.operations(), before);
            disk.remove_dir(Path::new("/a")).await.expect("removed");
            folders.make(&disk, Path::new("/"), dir).await.expect("made again");
            assert!(disk.is_dir(dir));
        });
    }
}
