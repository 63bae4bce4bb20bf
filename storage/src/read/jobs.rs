//! Reads of files, done on a ring of their own for whoever asks on a channel.
//!
//! Guarantees: a read answers with all of its bytes or with an error that names file and place.

use crate::disk::{Disk, IoCounters};
use crate::error::{Result, StorageError};
use crate::limits::RING_BUFFER_BYTES;
use crate::segment;
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

/// Reads `length` bytes at a block-aligned offset.
pub(crate) async fn read_range<D: Disk>(disk: &D, path: &Path, at: u64, length: u64) -> Result<Bytes> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    let mut out = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    while (out.len() as u64) < length {
        let left = segment::block_ceil(length - out.len() as u64);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(RING_BUFFER_BYTES);
        let buf = disk.buffer().await;
        let (result, buf) = disk.read(&file, buf, want, at + out.len() as u64).await;
        let got = result.map_err(|error| StorageError::io("read", path, error))?;
        let wanted = usize::try_from(length).unwrap_or(usize::MAX) - out.len();
        out.extend_from_slice(buf.get(..got.min(wanted)).unwrap_or(&[]));
        if got < want {
            break;
        }
    }
    if (out.len() as u64) < length {
        let short =
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("{} of {length} bytes at {at}", out.len()));
        return Err(StorageError::io("read", path, short));
    }
    Ok(Bytes::from(out))
}
