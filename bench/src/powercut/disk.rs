//! A FUSE file system of one file, `disk.img`, that journals what is written to it.
//!
//! Requests are taken by one thread, so the journal's order is the order of arrival. Acknowledgements can be
//! held back for random times: then a flush may overtake writes that are under way, which it does not cover.

use super::journal::{HEADER_BYTES, Kind, encode, punch_hole};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    WriteFlags,
};
use rustix::fs::FallocateFlags;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};
use storage::sim::Random;

const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Requests that the kernel has under way at most; more acknowledgements cannot wait.
const REQUESTS_MAX: u16 = 128;
const DISK: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

/// Appends to the journal; the lock is what orders the events.
struct Journal(Mutex<(File, u64)>);

impl Journal {
    fn append(&self, kind: Kind, offset: u64, length: u64, data: &[u8]) -> io::Result<u64> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, end) = &mut *guard;
        let (at, header) = (*end, encode(kind, offset, length));
        let written = file.write_vectored(&[IoSlice::new(&header), IoSlice::new(data)])?;
        if written < HEADER_BYTES + data.len() {
            return Err(io::Error::other("a short append to the journal"));
        }
        *end += written as u64;
        Ok(at)
    }
}

enum Ack {
    Write(ReplyWrite, u32),
    Zero(ReplyEmpty),
}

impl Ack {
    fn send(self, result: io::Result<()>) {
        match (self, result) {
            (Self::Write(reply, length), Ok(())) => reply.written(length),
            (Self::Write(reply, _), Err(error)) => reply.error(error.into()),
            (Self::Zero(reply), Ok(())) => reply.ok(),
            (Self::Zero(reply), Err(error)) => reply.error(error.into()),
        }
    }
}

/// The file system.
pub(super) struct Disk {
    image: File,
    size: u64,
    journal: Arc<Journal>,
    /// Set when acknowledgements are held back.
    delayed: Option<SyncSender<(u64, Ack)>>,
}

impl Disk {
    /// Serves `image`, journals into `journal`; `delay_max`: how long an acknowledgement may be held back.
    pub(super) fn new(image: File, journal: File, delay_max: Duration) -> io::Result<Self> {
        let size = image.metadata()?.len();
        let journal = Arc::new(Journal(Mutex::new((journal, 0))));
        let mut disk = Self { image, size, journal, delayed: None };
        if !delay_max.is_zero() {
            let (sender, receiver) = sync_channel(usize::from(REQUESTS_MAX) * 2);
            let journal = Arc::clone(&disk.journal);
            std::thread::spawn(move || acknowledge_late(&receiver, &journal, delay_max));
            disk.delayed = Some(sender);
        }
        Ok(disk)
    }

    fn record(&self, kind: Kind, offset: u64, length: u64, data: &[u8], ack: Ack) {
        let at = match self.journal.append(kind, offset, length, data) {
            Ok(at) => at,
            Err(error) => return ack.send(Err(error)),
        };
        match &self.delayed {
            Some(sender) => drop(sender.send((at, ack))), // Its thread lives as long as the disk.
            None => ack.send(self.journal.append(Kind::Done, at, 0, &[]).map(|_| ())),
        }
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let kind = if ino == DISK { FileType::RegularFile } else { FileType::Directory };
        let size = if ino == DISK { self.size } else { 0 };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn acknowledge_late(waiting: &Receiver<(u64, Ack)>, journal: &Journal, delay_max: Duration) {
    let nanos_max = u64::try_from(delay_max.as_nanos()).unwrap_or(u64::MAX);
    let mut random = Random::new(nanos_max);
    for (at, ack) in waiting {
        std::thread::park_timeout(Duration::from_nanos(random.below(nanos_max)));
        ack.send(journal.append(Kind::Done, at, 0, &[]).map(|_| ()));
    }
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // ASYNC_DIO: without it the loop driver has one write under way, never more.
        let wanted = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_BIG_WRITES | InitFlags::FUSE_MAX_PAGES;
        config.add_capabilities(wanted).map_err(|flags| io::Error::other(format!("the kernel lacks {flags:?}")))?;
        config.set_max_write(WRITE_BYTES_MAX).map_err(|_| io::Error::other("max_write was refused"))?;
        config.set_max_background(REQUESTS_MAX).map_err(|_| io::Error::other("max_background was refused"))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk.img" {
            reply.entry(&TTL, &self.attributes(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // The block size becomes the loop device's granularity of discards.
        reply.statfs(self.size / 4096, 0, 0, 1, 0, 4096, 255, 4096);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = u64::from(size).min(self.size.saturating_sub(offset));
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        match self.image.read_exact_at(&mut data, offset) {
            Ok(()) => reply.data(&data),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if let Err(error) = self.image.write_all_at(data, offset) {
            return reply.error(error.into());
        }
        let ack = Ack::Write(reply, u32::try_from(data.len()).unwrap_or(u32::MAX));
        self.record(Kind::Write, offset, data.len() as u64, data, ack);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.journal.append(Kind::Flush, 0, 0, &[]) {
            Ok(_) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // How the loop driver passes on discards and write-zeroes.
        let zeroing = FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !FallocateFlags::from_bits_retain(mode.cast_unsigned()).intersects(zeroing) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match punch_hole(&self.image, offset, length) {
            Ok(()) => self.record(Kind::Zero, offset, length, &[], Ack::Zero(reply)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok(); // close(2), not a flush of the device
    }
}
