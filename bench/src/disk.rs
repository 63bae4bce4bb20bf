//! The raw disk: aligned direct writes through the ring that flightbox uses, into preallocated files.

use std::error::Error;
use std::path::Path;
use std::time::Instant;
use storage::disk::{Disk, DiskState, Durability};
use storage::limits::{RING_BUFFER_BYTES, RING_BUFFERS_PER_WRITER};
use storage::uring::{self, UringDisk};

/// Rates of one pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskRates {
    /// All writes, one sync at the end.
    pub(crate) plain_mib_s: f64,
    /// A sync after each 16 MiB, as a recorder that acknowledges needs it.
    pub(crate) synced_mib_s: f64,
}

const SYNC_EVERY: u64 = 16 << 20;
const SEGMENT: u64 = 256 << 20;

/// Writes `bytes` twice, in segments like flightbox's, without and with a sync per 16 MiB.
pub(crate) fn measure(scratch: &Path, bytes: u64) -> Result<DiskRates, Box<dyn Error>> {
    let state = uring::probe(scratch, true);
    let folder = tempfile::tempdir_in(scratch)?;
    let plain_mib_s = timed(&state, folder.path(), bytes, None)?;
    let synced_mib_s = timed(&state, folder.path(), bytes, Some(SYNC_EVERY))?;
    Ok(DiskRates { plain_mib_s, synced_mib_s })
}

fn timed(state: &DiskState, folder: &Path, bytes: u64, sync_every: Option<u64>) -> Result<f64, Box<dyn Error>> {
    let path = folder.join("raw");
    let state = state.clone();
    let started = Instant::now();
    std::thread::spawn(move || {
        uring::run(&state, RING_BUFFERS_PER_WRITER, |disk| write(disk, path, bytes, sync_every))
    })
    .join()
    .map_err(|_| "the disk thread panicked")???;
    Ok((bytes >> 20) as f64 / started.elapsed().as_secs_f64())
}

async fn write(disk: UringDisk, path: std::path::PathBuf, bytes: u64, sync_every: Option<u64>) -> std::io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let segment = left.min(SEGMENT);
        let file = disk.create(&path).await?;
        disk.allocate(&file, 0, segment).await?;
        let mut writes = Vec::new();
        let mut at = 0;
        while at < segment {
            let buf = disk.buffer().await;
            writes.push(tokio_spawn(disk.write(&file, buf, RING_BUFFER_BYTES, at, Durability::Later)));
            at += RING_BUFFER_BYTES as u64;
            if sync_every.is_some_and(|every| at % every == 0) {
                finish(&mut writes).await?;
                disk.sync(&file).await?;
            }
        }
        finish(&mut writes).await?;
        disk.sync(&file).await?;
        std::fs::remove_file(&path)?;
        left -= segment;
    }
    Ok(())
}

type Write = tokio::task::JoinHandle<std::io::Result<()>>;

fn tokio_spawn<B: 'static>(write: impl Future<Output = (std::io::Result<()>, B)> + 'static) -> Write {
    tokio::task::spawn_local(async move { write.await.0 })
}

async fn finish(writes: &mut Vec<Write>) -> std::io::Result<()> {
    for write in writes.drain(..) {
        write.await.map_err(std::io::Error::other)??;
    }
    Ok(())
}
