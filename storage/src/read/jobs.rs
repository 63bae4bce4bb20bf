//! Reads of files, done on a ring of their own for whoever asks on a channel.
//!
//! Guarantees: a read answers with all of its bytes or with an error that names file and place.

use crate::disk::{Disk, IoCounters};
use crate::error::{Result, StorageError};
use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// One read of a file, answered on a channel.
#[derive(Debug)]
pub struct ReadJob {
    pub(super) path: PathBuf,
    pub(super) at: u64,
    pub(super) length: u64,
    pub(super) reply: oneshot::Sender<Result<Bytes>>,
}

/// Answers read jobs on this thread's ring until all senders are gone.
pub async fn serve<D: Disk>(disk: D, mut jobs: mpsc::Receiver<ReadJob>, counters: Arc<IoCounters>) {
    while let Some(job) = jobs.recv().await {
        let disk = disk.clone();
        let counters = Arc::clone(&counters);
        // Bounded by those who wait for an answer: `CHUNKS_LOADING_MAX`, and calls that look at files.
        tokio::task::spawn_local(async move {
            let ReadJob { path, at, length, mut reply } = job;
            // Not given up halfway: nobody would close what the kernel opens then.
            let opened = disk.open(&path).await.map_err(|error| StorageError::io("open", &path, error));
            let result = match opened {
                Ok(file) => tokio::select! {
                    biased;
                    // Who asked has gone: nobody wants the bytes, and others wait for the turn.
                    () = reply.closed() => return,
                    read = read_opened(&disk, &file, &path, at, length) => read,
                },
                Err(error) => Err(error),
            };
            if let Ok(bytes) = &result {
                IoCounters::add(&counters.read, bytes.len() as u64);
            }
            reply.send(result).ok(); // Gone just now.
        });
    }
}

/// Reads `length` bytes at a block-aligned offset.
pub(crate) async fn read_range<D: Disk>(disk: &D, path: &Path, at: u64, length: u64) -> Result<Bytes> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    read_opened(disk, &file, path, at, length).await
}

async fn read_opened<D: Disk>(disk: &D, file: &D::File, path: &Path, at: u64, length: u64) -> Result<Bytes> {
    let bytes = disk.read(file, at, usize::try_from(length).unwrap_or(usize::MAX)).await;
    let bytes = bytes.map_err(|error| StorageError::io("read", path, error))?;
    if (bytes.len() as u64) < length {
        let short = format!("{} of {length} bytes at {at}", bytes.len());
        let short = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, short);
        return Err(StorageError::io("read", path, short));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::depth::Buffers;
    use crate::disk::{DiskState, Engine};
    use crate::limits::{BLOCK_BYTES, READ_PIECE_BYTES, READS_AHEAD};
    use crate::{posix, uring};
    use std::time::Duration;

    /// More than are read at once.
    const PIECES: usize = READS_AHEAD + 2;

    /// A file of several pieces and a rest, and what is in it.
    fn file(folder: &Path) -> (PathBuf, Vec<u8>) {
        let bytes: Vec<u8> = (0..PIECES * READ_PIECE_BYTES + 5000).map(|at| (at / 7) as u8).collect();
        let path = folder.join("file");
        std::fs::write(&path, &bytes).expect("written");
        (path, bytes)
    }

    /// Runs a check on plain system calls, and on a ring where there is one, with and without direct I/O.
    macro_rules! on_each_disk {
        ($check:ident) => {
            let folder = tempfile::tempdir().expect("a folder");
            let file = file(folder.path());
            let found = uring::probe(folder.path(), true);
            for direct in [false, found.direct] {
                let state = DiskState { direct, ..found.clone() };
                posix::run(&state, 1, |disk| $check(disk, file.clone())).expect("a disk");
                if found.engine == Engine::Uring {
                    uring::run(&state, Buffers::of(0), |disk| $check(disk, file.clone())).expect("a ring");
                }
            }
        };
    }

    async fn reads_many_ranges_at_once<D: Disk>(disk: D, (path, bytes): (PathBuf, Vec<u8>)) {
        let length = bytes.len() as u64;
        let ranges = [(0, length), (4096, length - 4096), (0, 10), (BLOCK_BYTES, 1), (READ_PIECE_BYTES as u64, 4096)];
        // More than may be read at once by far.
        let reads = ranges.iter().cycle().take(40).map(|(at, length)| read_range(&disk, &path, *at, *length));
        let all = tokio::time::timeout(Duration::from_secs(60), futures::future::join_all(reads)).await;
        for (read, (at, length)) in all.expect("all are read").into_iter().zip(ranges.iter().cycle()) {
            let (at, length) = (usize::try_from(*at).expect("short"), usize::try_from(*length).expect("short"));
            assert!(read.expect("read") == bytes[at..at + length], "{length} bytes at {at}");
        }
    }

    #[test]
    fn ranges_of_any_length_are_read_at_once_to_the_letter() {
        on_each_disk!(reads_many_ranges_at_once);
    }

    async fn refuses_what_is_beyond_the_end<D: Disk>(disk: D, (path, bytes): (PathBuf, Vec<u8>)) {
        let end = bytes.len() as u64;
        let asked = [(0, end + 1), (0, end + 3 * READ_PIECE_BYTES as u64), (end / 4096 * 4096, 4096)];
        for (at, length) in asked.into_iter().chain([((end / 4096 + 1) * 4096, 1)]) {
            let text = read_range(&disk, &path, at, length).await.expect_err("too short").to_string();
            let there = end.saturating_sub(at);
            assert!(text.contains(&format!("{there} of {length} bytes at {at}")), "{text}");
        }
        let text = read_range(&disk, &path, 0, u64::MAX).await.expect_err("too long").to_string();
        assert!(text.contains("no memory"), "{text}");
    }

    #[test]
    fn a_range_beyond_the_end_is_refused_saying_how_much_there_is() {
        on_each_disk!(refuses_what_is_beyond_the_end);
    }

    /// Descriptors of this process that lead to a file.
    fn open_files(path: &Path) -> usize {
        let all = std::fs::read_dir("/proc/self/fd").expect("of this process");
        all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).filter(|to| to == path).count()
    }

    async fn gives_up_what_nobody_waits_for<D: Disk>(disk: D, (path, bytes): (PathBuf, Vec<u8>)) {
        let path = std::fs::canonicalize(path).expect("there");
        let (ask, jobs) = mpsc::channel(4);
        let counters = IoCounters::shared();
        let service = tokio::task::spawn_local(serve(disk.clone(), jobs, Arc::clone(&counters)));
        let job = || {
            let (reply, answer) = oneshot::channel();
            (ReadJob { path: path.clone(), at: 0, length: bytes.len() as u64, reply }, answer)
        };
        for round in 0..30 {
            let (job, answer) = job();
            ask.send(job).await.expect("it serves");
            for _ in 0..round % 6 {
                disk.breathe().await;
            }
            drop(answer);
        }
        let (job, answer) = job();
        ask.send(job).await.expect("it serves");
        let read = tokio::time::timeout(Duration::from_secs(60), answer).await.expect("its turn").expect("an answer");
        assert!(read.expect("read") == bytes);
        assert!(counters.read.load(std::sync::atomic::Ordering::Relaxed) < 31 * bytes.len() as u64, "all were read");
        drop(ask);
        service.await.expect("no panic");
        for _ in 0..1000 {
            disk.breathe().await;
        }
        assert_eq!(open_files(&path), 0, "left open");
    }

    #[test]
    fn reads_that_nobody_waits_for_end_and_leave_no_file_open() {
        on_each_disk!(gives_up_what_nobody_waits_for);
    }

    async fn goes_on_after_reads_that_were_given_up<D: Disk>(disk: D, (path, bytes): (PathBuf, Vec<u8>)) {
        for _ in 0..20 {
            let mut read = Box::pin(read_range(&disk, &path, 0, bytes.len() as u64));
            for _ in 0..3 {
                if futures::future::poll_immediate(&mut read).await.is_some() {
                    break; // Plain system calls are never halfway.
                }
                disk.breathe().await;
            }
        }
        let read = tokio::time::timeout(Duration::from_secs(60), read_range(&disk, &path, 0, bytes.len() as u64)).await;
        assert!(read.expect("its turn").expect("read") == bytes);
    }

    #[test]
    fn a_read_that_is_given_up_halfway_leaves_its_turn_to_others() {
        on_each_disk!(goes_on_after_reads_that_were_given_up);
    }
}
