//! Reads of files, done on a ring of their own for whoever asks on a channel.
//!
//! Guarantees: a read answers with all of its bytes or with an error that names file and place.

use crate::disk::{Disk, IoCounters};
use crate::error::{Result, StorageError};
use crate::limits::RING_BUFFER_BYTES;
use crate::segment;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Pieces of one range that are read at once: the disk does the next while one is copied.
const READS_AHEAD: usize = 4;

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
        // Bounded by the jobs channel's depth and by the buffer pool.
        tokio::task::spawn_local(async move {
            let result = read_range(&disk, &job.path, job.at, job.length).await;
            if let Ok(bytes) = &result {
                IoCounters::add(&counters.read, bytes.len() as u64);
            }
            job.reply.send(result).ok(); // The asker may have gone; then nobody wants the bytes.
        });
    }
}

/// Reads `length` bytes at a block-aligned offset, several pieces of them at once.
pub(crate) async fn read_range<D: Disk>(disk: &D, path: &Path, at: u64, length: u64) -> Result<Bytes> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    let mut out = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    let mut reads = FuturesOrdered::new();
    let (mut asked, mut failed, mut is_over) = (0, None, false);
    loop {
        let more = asked < length && reads.len() < READS_AHEAD && !is_over;
        // Cancel-safety: a buffer that is not given has not left the pool, a read that is not done stays in `reads`.
        let read = tokio::select! {
            biased;
            buf = disk.buffer(), if more => {
                let want = usize::try_from(segment::block_ceil(length - asked)).unwrap_or(usize::MAX);
                let want = want.min(RING_BUFFER_BYTES);
                let read = disk.read(&file, buf, want, at + asked);
                reads.push_back(async move {
                    let (result, buf) = read.await;
                    (want, result, buf)
                });
                asked += want as u64;
                continue;
            }
            // What holds buffers never waits for more of them alone: two such would wait for each other.
            read = reads.next(), if !reads.is_empty() => read,
            else => break,
        };
        let Some((want, result, buf)) = read else { break };
        match result {
            _ if is_over => {} // Only waited for.
            Ok(got) => {
                let left = usize::try_from(length).unwrap_or(usize::MAX) - out.len();
                out.extend_from_slice(buf.get(..got.min(left)).unwrap_or(&[]));
                is_over = got < want; // The end of the file.
            }
            Err(error) => (failed, is_over) = (Some(StorageError::io("read", path, error)), true),
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    if (out.len() as u64) < length {
        let short =
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("{} of {length} bytes at {at}", out.len()));
        return Err(StorageError::io("read", path, short));
    }
    Ok(Bytes::from(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{DiskState, Engine};
    use crate::posix;
    use std::time::Duration;

    /// More than are read at once.
    const PIECES: usize = 6;

    /// A file of several pieces and a rest, and what is in it.
    fn file(folder: &Path) -> (PathBuf, Vec<u8>) {
        let bytes: Vec<u8> = (0..PIECES * RING_BUFFER_BYTES + 5000).map(|at| (at / 7) as u8).collect();
        let path = folder.join("file");
        std::fs::write(&path, &bytes).expect("written");
        (path, bytes)
    }

    fn on_disk<F: Future>(buffers: usize, body: impl FnOnce(posix::PosixDisk) -> F) -> F::Output {
        let state = DiskState { engine: Engine::Posix, direct: false, registered: false, notes: Vec::new() };
        posix::run(&state, buffers, body).expect("a disk")
    }

    #[test]
    fn ranges_that_are_read_at_once_with_few_buffers_do_not_wait_for_each_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, bytes) = file(folder.path());
        for buffers in 1..=READS_AHEAD + 1 {
            let (path, length) = (path.clone(), bytes.len() as u64);
            let all = on_disk(buffers, |disk| async move {
                let reads = async {
                    futures::join!(
                        read_range(&disk, &path, 0, length),
                        read_range(&disk, &path, 4096, length - 4096),
                        read_range(&disk, &path, 0, 10)
                    )
                };
                tokio::time::timeout(Duration::from_secs(10), reads).await.expect("all are read")
            });
            let [whole, most, little] = [all.0, all.1, all.2].map(|read| read.expect("read"));
            assert!(whole == bytes && most == bytes[4096..] && little == bytes[..10], "{buffers} buffers");
        }
    }

    #[test]
    fn a_range_beyond_the_end_is_refused_saying_how_much_there_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, bytes) = file(folder.path());
        let length = bytes.len() as u64 + 2 * RING_BUFFER_BYTES as u64;
        let read = on_disk(3, |disk| async move { read_range(&disk, &path, 0, length).await });
        let text = read.expect_err("too short").to_string();
        assert!(text.contains(&format!("{} of {length} bytes", bytes.len())), "{text}");
    }
}
