//! The fallback disk: plain system calls on the calling thread, behind the same seam.
//!
//! Used where io_uring is not to be had (`kernel.io_uring_disabled`, container profiles). Each
//! call blocks its thread; correctness is the same, speed is not the aim.

use crate::disk::{Disk, DiskState};
use crate::limits::BLOCK_BYTES;
use crate::reclaim;
use crate::uring::AlignedBuf;
use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use tokio::sync::Notify;

/// Runs `body` on this thread until its future ends.
///
/// # Errors
/// When the runtime cannot be made.
pub fn run<F, Fut>(state: &DiskState, buffers: usize, body: F) -> io::Result<Fut::Output>
where
    F: FnOnce(PosixDisk) -> Fut,
    Fut: Future,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let free = std::iter::repeat_with(AlignedBuf::new).take(buffers).collect();
    let pool = Pool { free: RefCell::new(free), returned: Notify::new() };
    let disk = PosixDisk { pool: Rc::new(pool), direct: state.direct };
    Ok(tokio::task::LocalSet::new().block_on(&runtime, body(disk)))
}

struct Pool {
    free: RefCell<Vec<AlignedBuf>>,
    returned: Notify,
}

/// System calls on the calling thread.
#[derive(Clone)]
pub struct PosixDisk {
    pool: Rc<Pool>,
    direct: bool,
}

impl std::fmt::Debug for PosixDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PosixDisk").field("direct", &self.direct).finish_non_exhaustive()
    }
}

/// A buffer of the pool; goes back when dropped.
pub struct PosixBuf {
    buf: Option<AlignedBuf>,
    pool: Rc<Pool>,
}

impl std::fmt::Debug for PosixBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PosixBuf")
    }
}

impl Drop for PosixBuf {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.pool.free.borrow_mut().push(buf);
            self.pool.returned.notify_one();
        }
    }
}

impl Deref for PosixBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_deref().unwrap_or(&[])
    }
}

impl DerefMut for PosixBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_deref_mut().unwrap_or(&mut [])
    }
}

impl PosixDisk {
    fn open_with(&self, path: &Path, flags: OFlags) -> io::Result<Rc<OwnedFd>> {
        let direct = if self.direct { OFlags::DIRECT } else { OFlags::empty() };
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
        Ok(Rc::new(rustix::fs::open(path, flags | direct | OFlags::CLOEXEC, mode)?))
    }
}

impl Disk for PosixDisk {
    type File = Rc<OwnedFd>;
    type Buf = PosixBuf;

    async fn buffer(&self) -> PosixBuf {
        loop {
            let buf = self.pool.free.borrow_mut().pop();
            if let Some(buf) = buf {
                return PosixBuf { buf: Some(buf), pool: Rc::clone(&self.pool) };
            }
            self.pool.returned.notified().await;
        }
    }

    fn registered(&self) -> bool {
        false
    }

    async fn create(&self, path: &Path) -> io::Result<Self::File> {
        self.open_with(path, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR)
    }

    async fn open(&self, path: &Path) -> io::Result<Self::File> {
        self.open_with(path, OFlags::RDWR)
    }

    fn write(
        &self,
        file: &Self::File,
        buf: PosixBuf,
        len: usize,
        at: u64,
    ) -> impl Future<Output = (io::Result<()>, PosixBuf)> + 'static {
        let file = Rc::clone(file);
        async move {
            let mut done = 0;
            while done < len {
                let bytes = buf.get(done..len).unwrap_or(&[]);
                match rustix::io::pwrite(&*file, bytes, at + done as u64) {
                    Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buf),
                    Ok(written) => done += written,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return (Err(error.into()), buf),
                }
            }
            (Ok(()), buf)
        }
    }

    async fn read(&self, file: &Self::File, at: u64, len: usize) -> io::Result<Bytes> {
        let mut memory = AlignedBuf::zeros(len)?;
        let mut done = 0;
        while done < memory.len() {
            let into = memory.get_mut(done..).unwrap_or(&mut []);
            match rustix::io::pread(&**file, into, at + done as u64) {
                Ok(0) => break,
                Ok(count) => {
                    done += count;
                    if !(count as u64).is_multiple_of(BLOCK_BYTES) {
                        break;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        memory.truncate(done.min(len));
        Ok(Bytes::from_owner(memory))
    }

    fn sync(&self, file: &Self::File) -> impl Future<Output = io::Result<()>> + 'static {
        let file = Rc::clone(file);
        async move { Ok(rustix::fs::fdatasync(&*file)?) }
    }

    async fn allocate(&self, file: &Self::File, from: u64, length: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&**file, rustix::fs::FallocateFlags::empty(), from, length) {
            // A file system without it only loses speed.
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    async fn truncate(&self, file: &Self::File, length: u64) -> io::Result<()> {
        rustix::fs::ftruncate(&**file, length)?;
        Ok(rustix::fs::fsync(&**file)?)
    }

    async fn make_dir(&self, path: &Path) -> io::Result<()> {
        match std::fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::File::open(path)?.sync_all()
    }

    async fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        match std::fs::hard_link(from, to) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn keep_open(&self, path: &Path) -> Vec<std::fs::File> {
        reclaim::keep_open(path)
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    async fn breathe(&self) {
        tokio::task::yield_now().await;
    }
}
