//! The real disk: one tokio-uring ring per thread, registered aligned buffers, own submissions.
//!
//! This room alone has `unsafe` (also the allocator's and that of copies past the caches, for that) and names
//! tokio-uring; both are here because the kernel borrows memory beyond any lifetime the compiler sees. The rule that
//! makes it sound: whatever an entry points to (buffer, path, descriptor) is the operation's stable data, owned by the
//! driver until the completion arrives, also when the future is dropped. The driver itself does not wait before it frees
//! them, so [`run`] does before it lets the driver go.
//!
//! Runs without `DEFER_TASKRUN`: tokio-uring 0.5 hangs with it (design.md section 10).
#![expect(unsafe_code, reason = "the kernel borrows buffers; every block says why it may")]

mod aligned;
pub mod allocator;
pub(crate) mod lease;
pub mod past_cache;
mod read;

pub use aligned::AlignedBuf;

use crate::depth::{Buffers, Depth};
use crate::disk::{Disk, DiskState, Engine};
use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES, RING_ENTRIES, RING_WRITES_AT_DEVICE};
use crate::reclaim;
use bytes::Bytes;
use futures::FutureExt;
use io_uring::{cqueue, opcode, squeue, types};
use std::cell::{Cell, RefCell};
use std::ffi::CString;
use std::future::Future;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufRegistry};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

/// Runs `body` on this thread with a ring and these buffers, until its future ends.
///
/// # Errors
/// When the kernel gives no ring.
pub fn run<F, Fut>(state: &DiskState, buffers: Buffers, body: F) -> io::Result<Fut::Output>
where
    F: FnOnce(UringDisk) -> Fut,
    Fut: Future,
{
    let mut ring = tokio_uring::uring_builder();
    ring.setup_single_issuer().setup_coop_taskrun().setup_clamp();
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&ring);
    let runtime = tokio_uring::Runtime::new(&builder)?;
    let ended = runtime.block_on(async {
        let disk = UringDisk::new(state, buffers);
        let ended = AssertUnwindSafe(body(disk)).catch_unwind().await;
        // tokio-uring 0.5 frees what operations point to, and then waits for them: the kernel must be done before that.
        while UNDER_WAY.get() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ended
    });
    Ok(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

thread_local! {
    /// Operations of this thread that the kernel is not done with.
    static UNDER_WAY: Cell<usize> = const { Cell::new(0) };
}

/// Counts an operation until the kernel is done with it: part of its stable data.
struct UnderWay(());

impl UnderWay {
    fn begin() -> Self {
        UNDER_WAY.set(UNDER_WAY.get() + 1);
        Self(())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.set(UNDER_WAY.get() - 1);
    }
}

/// Finds out what this machine and this folder allow: io_uring, direct I/O, registered buffers.
/// Never fails: what is missing is said in the notes, and the engine falls back.
pub fn probe(dir: &Path, allow_uring: bool) -> DiskState {
    let mut notes = Vec::new();
    let direct = match probe_direct(dir) {
        Ok(()) => true,
        Err(why) => {
            notes.push(why);
            false
        }
    };
    if !allow_uring {
        notes.push("io_uring is switched off by the setting `engine = \"posix\"`".to_owned());
        return DiskState { engine: Engine::Posix, direct, registered: false, notes };
    }
    let state = DiskState { engine: Engine::Uring, direct, registered: true, notes: Vec::new() };
    match std::thread::scope(|scope| {
        // On a thread of its own: a ring belongs to the thread that makes it.
        scope.spawn(|| run(&state, Buffers::of(1), |disk| async move { disk.registered() })).join()
    }) {
        Ok(Ok(registered)) => {
            if !registered {
                notes.push(
                    "ring buffers could not be registered (RLIMIT_MEMLOCK): writes cost more CPU; \
                     set LimitMEMLOCK=infinity in the unit or raise `ulimit -l`"
                        .to_owned(),
                );
            }
            DiskState { engine: Engine::Uring, direct, registered, notes }
        }
        Ok(Err(error)) => {
            notes.push(uring_refused(&error));
            DiskState { engine: Engine::Posix, direct, registered: false, notes }
        }
        Err(_) => {
            notes.push("io_uring: the probe panicked; using plain system calls".to_owned());
            DiskState { engine: Engine::Posix, direct, registered: false, notes }
        }
    }
}

fn uring_refused(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "allow it with `sysctl kernel.io_uring_disabled=0`, or in the container's seccomp profile"
        }
        io::ErrorKind::OutOfMemory => "raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in the unit)",
        _ => "a kernel from 5.11 on with io_uring is needed",
    };
    format!("io_uring is not available ({error}): using plain system calls; {remedy}")
}

fn probe_direct(dir: &Path) -> Result<(), String> {
    use rustix::fs::{Mode, OFlags};
    let path = dir.join(".direct-probe");
    let opened = rustix::fs::open(
        &path,
        OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    );
    rustix::fs::unlink(&path).ok(); // Nothing depends on the probe's file; the next start removes it.
    let file = opened.map_err(|error| {
        format!(
            "the file system of {} refuses O_DIRECT ({error}): writes go through the page cache; use ext4 or XFS",
            dir.display()
        )
    })?;
    let block = AlignedBuf::new();
    let bytes = block.get(..BLOCK_BYTES as usize).unwrap_or(&[]);
    rustix::io::pwrite(&file, bytes, 0).map(|_| ()).map_err(|error| {
        format!(
            "direct writes of {BLOCK_BYTES} bytes fail in {} ({error}): writes go through the page cache",
            dir.display()
        )
    })
}

/// One thread's ring and its buffers.
#[derive(Clone)]
pub struct UringDisk {
    pool: Rc<Pool>,
    direct: bool,
}

impl std::fmt::Debug for UringDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringDisk").field("direct", &self.direct).finish_non_exhaustive()
    }
}

struct Pool {
    registry: Option<FixedBufRegistry<AlignedBuf>>,
    free: RefCell<Vec<Slot>>,
    returned: Notify,
    count: usize,
    depth: Depth,
    /// Writes at the device; see [`RING_WRITES_AT_DEVICE`].
    at_device: Cell<usize>,
    /// Writes that wait for their turn there. A hint: one too many costs a no-op.
    ready: Cell<usize>,
    /// A write is back from the device.
    back: Notify,
    reads: read::Turns,
}

impl Pool {
    fn new(registry: Option<FixedBufRegistry<AlignedBuf>>, free: Vec<Slot>, depth: Depth) -> Self {
        let count = free.len();
        Self {
            registry,
            free: RefCell::new(free),
            returned: Notify::new(),
            count,
            depth,
            at_device: Cell::new(0),
            ready: Cell::new(0),
            back: Notify::new(),
            reads: read::Turns::default(),
        }
    }

    /// Waits until one more write may be at the device.
    async fn place(&self) -> Place<'_> {
        self.ready.set(self.ready.get() + 1);
        let place = loop {
            if let Some(place) = self.try_place() {
                break place;
            }
            self.back.notified().await;
        };
        self.ready.set(self.ready.get() - 1);
        place
    }

    /// A place at the device, if one more write may be there. Wakes the next who waits, if yet another may.
    fn try_place(&self) -> Option<Place<'_>> {
        let allowed = self.depth.allowed(RING_WRITES_AT_DEVICE);
        let there = self.at_device.get();
        if there >= allowed {
            return None;
        }
        self.at_device.set(there + 1);
        if there + 1 < allowed {
            self.back.notify_one();
        }
        Some(Place { pool: self })
    }

    /// A free buffer, if one more may be out. Wakes the next who waits, if yet another may.
    fn take(&self) -> Option<Slot> {
        let allowed = self.depth.allowed(self.count);
        let out = self.count - self.free.borrow().len();
        let slot = if out < allowed { self.free.borrow_mut().pop() } else { None };
        if slot.is_some() && out + 1 < allowed {
            self.returned.notify_one();
        }
        slot
    }
}

/// A write's place at the device, until it is dropped.
struct Place<'a> {
    pool: &'a Pool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pool.at_device.set(self.pool.at_device.get() - 1);
        self.pool.back.notify_one();
    }
}

enum Slot {
    Fixed(FixedBuf),
    Plain(AlignedBuf),
}

/// A buffer of the pool; goes back when dropped.
pub struct PoolBuf {
    slot: Option<Slot>,
    pool: Rc<Pool>,
}

impl std::fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PoolBuf")
    }
}

impl PoolBuf {
    /// Address and, for a registered buffer, index.
    fn place(&mut self) -> (*mut u8, Option<u16>) {
        match &mut self.slot {
            Some(Slot::Fixed(buf)) => {
                let index = buf.buf_index();
                (buf.as_mut_ptr(), Some(index))
            }
            Some(Slot::Plain(buf)) => (buf.start(), None),
            None => unreachable!("the slot leaves only in drop"),
        }
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.pool.free.borrow_mut().push(slot);
            self.pool.returned.notify_one();
        }
    }
}

impl Deref for PoolBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.slot {
            Some(Slot::Fixed(buf)) => buf,
            Some(Slot::Plain(buf)) => buf,
            None => &[],
        }
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.slot {
            Some(Slot::Fixed(buf)) => buf,
            Some(Slot::Plain(buf)) => buf,
            None => &mut [],
        }
    }
}

/// An open file with the path for error texts.
#[derive(Clone, Debug)]
pub struct UringFile {
    fd: Rc<OwnedFd>,
}

/// Gives the stable data back beside the result.
struct GiveBack<D>(std::marker::PhantomData<D>);

impl<D> OneshotOutputTransform for GiveBack<D> {
    type Output = (io::Result<u32>, D);
    type StoredData = D;
    fn transform_oneshot_output(self, data: D, cqe: cqueue::Entry) -> Self::Output {
        let result = u32::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()));
        (result, data)
    }
}

/// Submits one entry; `data` owns everything the entry points to.
async fn submit<D: Unpin + 'static>(data: D, entry: squeue::Entry) -> (io::Result<u32>, D) {
    let stable = (data, UnderWay::begin());
    let (result, (data, _done)) =
        UnsubmittedOneshot::new(stable, GiveBack(std::marker::PhantomData), entry).submit().await;
    (result, data)
}

fn fd_of(file: &UringFile) -> types::Fd {
    types::Fd(file.fd.as_raw_fd())
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a path with a NUL byte"))
}

fn ring_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl UringDisk {
    fn new(state: &DiskState, buffers: Buffers) -> Self {
        let Buffers { count, depth } = buffers;
        let registry = state
            .registered
            .then(|| FixedBufRegistry::new(std::iter::repeat_with(AlignedBuf::new).take(count)))
            .filter(|registry| registry.register().is_ok());
        let free = match &registry {
            Some(registry) => (0..count).filter_map(|index| registry.check_out(index).map(Slot::Fixed)).collect(),
            None => std::iter::repeat_with(|| Slot::Plain(AlignedBuf::new())).take(count).collect(),
        };
        Self { pool: Rc::new(Pool::new(registry, free, depth)), direct: state.direct }
    }

    async fn open_with(&self, path: &Path, flags: i32) -> io::Result<UringFile> {
        use rustix::fs::OFlags;
        let direct = if self.direct { OFlags::DIRECT.bits() as i32 } else { 0 };
        let path = c_path(path)?;
        let at = types::Fd(rustix::fs::CWD.as_raw_fd());
        let entry = opcode::OpenAt::new(at, path.as_ptr())
            .flags(flags | direct | OFlags::CLOEXEC.bits() as i32)
            .mode(0o640)
            .build();
        let (opened, _path) = submit(path, entry).await;
        let fd = i32::try_from(opened?).map_err(|_| io::Error::other("a descriptor out of range"))?;
        // SAFETY: the kernel just returned this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(UringFile { fd: Rc::new(fd) })
    }
}

fn write_entry(file: &UringFile, buf: &mut PoolBuf, from: usize, len: usize, at: u64) -> squeue::Entry {
    assert!(from + len <= RING_BUFFER_BYTES, "a write stays inside its buffer");
    let (start, index) = buf.place();
    // SAFETY: `from` is inside the buffer's allocation, asserted above.
    let start = unsafe { start.add(from) };
    match index {
        Some(index) => opcode::WriteFixed::new(fd_of(file), start, ring_len(len), index).offset(at as _).build(),
        None => opcode::Write::new(fd_of(file), start, ring_len(len)).offset(at as _).build(),
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

impl Disk for UringDisk {
    type File = UringFile;
    type Buf = PoolBuf;

    async fn buffer(&self) -> PoolBuf {
        loop {
            // Cancel-safety: nothing has left the pool before the return.
            if let Some(slot) = self.pool.take() {
                return PoolBuf { slot: Some(slot), pool: Rc::clone(&self.pool) };
            }
            self.pool.returned.notified().await;
        }
    }

    fn registered(&self) -> bool {
        self.pool.registry.is_some()
    }

    async fn create(&self, path: &Path) -> io::Result<UringFile> {
        use rustix::fs::OFlags;
        self.open_with(path, (OFlags::CREATE | OFlags::EXCL | OFlags::RDWR).bits() as i32).await
    }

    async fn open(&self, path: &Path) -> io::Result<UringFile> {
        self.open_with(path, rustix::fs::OFlags::RDWR.bits() as i32).await
    }

    fn write(
        &self,
        file: &UringFile,
        mut buf: PoolBuf,
        len: usize,
        at: u64,
    ) -> impl Future<Output = (io::Result<()>, PoolBuf)> + 'static {
        let (file, pool) = (file.clone(), Rc::clone(&self.pool));
        async move {
            let place = pool.place().await;
            let mut done = 0;
            while done < len {
                let entry = write_entry(&file, &mut buf, done, len - done, at + done as u64);
                // The descriptor rides along: it must not be closed, and its number reused, meanwhile.
                let (result, (back, _file)) = submit((buf, file.clone()), entry).await;
                buf = back;
                match result {
                    Ok(0) => return (Err(io::Error::new(io::ErrorKind::WriteZero, "the device took nothing")), buf),
                    Ok(written) => done += written as usize,
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return (Err(error), buf),
                }
            }
            drop(place);
            if pool.ready.get() > 0 {
                // What is filled goes before this buffer is filled again.
                tokio_uring::no_op().await.ok();
            }
            (Ok(()), buf)
        }
    }

    async fn read(&self, file: &UringFile, at: u64, len: usize) -> io::Result<Bytes> {
        read::range(&self.pool.reads, file, at, len).await
    }

    fn sync(&self, file: &UringFile) -> impl Future<Output = io::Result<()>> + 'static {
        let file = file.clone();
        async move {
            let entry = opcode::Fsync::new(fd_of(&file)).flags(types::FsyncFlags::DATASYNC).build();
            submit(file, entry).await.0.map(|_| ())
        }
    }

    async fn allocate(&self, file: &UringFile, from: u64, length: u64) -> io::Result<()> {
        let entry = opcode::Fallocate::new(fd_of(file), length as _).offset(from as _).mode(0).build();
        submit(file.clone(), entry).await.0.map(|_| ())
    }

    async fn truncate(&self, file: &UringFile, length: u64) -> io::Result<()> {
        // No ring operation in io-uring 0.6; only the steward thread seals, never a writer.
        rustix::fs::ftruncate(&*file.fd, length)?;
        let entry = opcode::Fsync::new(fd_of(file)).build();
        submit(file.clone(), entry).await.0.map(|_| ())
    }

    async fn make_dir(&self, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        let at = types::Fd(rustix::fs::CWD.as_raw_fd());
        let entry = opcode::MkDirAt::new(at, path.as_ptr()).mode(0o750).build();
        let (made, _path) = submit(path, entry).await;
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(|_| ()),
        }
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        use rustix::fs::OFlags;
        let c_path = c_path(path)?;
        let at = types::Fd(rustix::fs::CWD.as_raw_fd());
        let flags = (OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC).bits() as i32;
        let entry = opcode::OpenAt::new(at, c_path.as_ptr()).flags(flags).build();
        let (opened, _path) = submit(c_path, entry).await;
        let fd = i32::try_from(opened?).map_err(|_| io::Error::other("a descriptor out of range"))?;
        // SAFETY: the kernel just returned this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let dir = UringFile { fd: Rc::new(fd) };
        let entry = opcode::Fsync::new(fd_of(&dir)).build();
        submit(dir, entry).await.0.map(|_| ())
    }

    async fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let paths = (c_path(from)?, c_path(to)?);
        let at = types::Fd(rustix::fs::CWD.as_raw_fd());
        let entry = opcode::LinkAt::new(at, paths.0.as_ptr(), at, paths.1.as_ptr()).build();
        let (linked, _paths) = submit(paths, entry).await;
        match linked {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn keep_open(&self, path: &Path) -> Vec<std::fs::File> {
        reclaim::keep_open(path)
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        // Deleting is the steward's work, where a blocking call delays nobody's acknowledgement.
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    async fn breathe(&self) {
        // Only a thread that really parks submits its queue; waiting for a no-op makes it park.
        tokio_uring::no_op().await.ok(); // A failed no-op has parked as well.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{DEPTH_LOW_AFTER, RING_BUFFERS_LOW};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(10);
    const A_MOMENT: Duration = Duration::from_millis(20);

    fn disk(count: usize, depth: &Depth) -> UringDisk {
        let free = std::iter::repeat_with(|| Slot::Plain(AlignedBuf::new())).take(count).collect();
        let depth = depth.clone();
        UringDisk { pool: Rc::new(Pool::new(None, free, depth)), direct: false }
    }

    /// Memory that the kernel may write to, and whether it is gone.
    struct Memory(Box<[u8; 8]>, Arc<AtomicBool>);

    impl Drop for Memory {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_the_kernel_may_write_to_is_kept_until_it_is_done_though_all_who_asked_have_gone() {
        let state = probe(&std::env::temp_dir(), true);
        if state.engine != Engine::Uring {
            return; // No ring, no kernel that writes.
        }
        let (from, to) = io::pipe().expect("a pipe");
        let gone = Arc::new(AtomicBool::new(false));
        let ring = std::thread::spawn({
            let gone = Arc::clone(&gone);
            move || {
                run(&state, Buffers::of(0), |_| async move {
                    let mut memory = Memory(Box::new([0; 8]), gone);
                    let entry = opcode::Read::new(types::Fd(from.as_raw_fd()), memory.0.as_mut_ptr(), 8).build();
                    let mut read = Box::pin(submit((memory, from), entry));
                    assert!(futures::future::poll_immediate(&mut read).await.is_none());
                    tokio_uring::no_op().await.expect("the kernel has it");
                })
            }
        });
        let late = std::time::Instant::now() + A_MOMENT * 10;
        while std::time::Instant::now() < late {
            assert!(!gone.load(Ordering::SeqCst), "freed, and the kernel may still write to it");
            std::thread::yield_now();
        }
        io::Write::write_all(&mut &to, b"8 bytes.").expect("written");
        ring.join().expect("no panic").expect("a ring");
        assert!(gone.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn a_filled_buffer_waits_while_the_device_has_enough_and_goes_when_one_comes_back() {
        let pool = disk(1, &Depth::default()).pool;
        let mut places = Vec::new();
        for _ in 0..RING_WRITES_AT_DEVICE {
            places.push(timeout(SOON, pool.place()).await.expect("a place"));
        }
        assert_eq!(pool.ready.get(), 0);
        let mut next = std::pin::pin!(pool.place());
        assert!(timeout(A_MOMENT, &mut next).await.is_err(), "the device has enough");
        assert_eq!(pool.ready.get(), 1);
        places.pop();
        places.push(timeout(SOON, next).await.expect("its turn"));
        assert_eq!(pool.ready.get(), 0);
        places.clear();
        assert_eq!(pool.at_device.get(), 0);
    }

    #[tokio::test]
    async fn what_is_filled_stands_back_after_a_small_write_and_all_of_it_goes_later() {
        let depth = Depth::default();
        let pool = disk(1, &depth).pool;
        depth.small_write();
        let mut there = Vec::new();
        for _ in 0..RING_BUFFERS_LOW {
            there.push(timeout(SOON, pool.place()).await.expect("a place"));
        }
        // Again: the machine may have stood still meanwhile.
        depth.small_write();
        assert!(timeout(A_MOMENT, pool.place()).await.is_err(), "more than {RING_BUFFERS_LOW} are there");
        // One that is back wakes all who may go.
        let later = async {
            tokio::time::sleep(DEPTH_LOW_AFTER + Duration::from_millis(10)).await;
            there.pop();
        };
        let rest = timeout(SOON, async { tokio::join!(later, pool.place(), pool.place(), pool.place()) });
        let ((), first, second, third) = rest.await.expect("all three go");
        assert_eq!(pool.at_device.get(), RING_BUFFERS_LOW - 1 + 3);
        drop((first, second, third, there));
        assert_eq!(pool.at_device.get(), 0);
    }

    #[tokio::test]
    async fn few_buffers_are_out_after_a_small_write_and_all_who_wait_get_one_later() {
        let depth = Depth::default();
        let disk = disk(RING_BUFFERS_LOW + 3, &depth);
        depth.small_write();
        let mut out = Vec::new();
        for _ in 0..RING_BUFFERS_LOW {
            out.push(timeout(SOON, disk.buffer()).await.expect("it may be out"));
        }
        // Again: the machine may have stood still meanwhile.
        depth.small_write();
        let one_more = timeout(A_MOMENT, disk.buffer()).await;
        assert!(one_more.is_err(), "more than {RING_BUFFERS_LOW} are out");
        // Somebody waits for each that is free, and one buffer that comes back wakes them all.
        let later = async {
            tokio::time::sleep(DEPTH_LOW_AFTER + Duration::from_millis(10)).await;
            out.pop();
        };
        let ((), first, second, third, fourth) =
            timeout(SOON, async { tokio::join!(later, disk.buffer(), disk.buffer(), disk.buffer(), disk.buffer()) })
                .await
                .expect("all four get one");
        assert!(disk.pool.free.borrow().is_empty());
        drop((first, second, third, fourth, out));
        assert_eq!(disk.pool.free.borrow().len(), RING_BUFFERS_LOW + 3);
    }
}
