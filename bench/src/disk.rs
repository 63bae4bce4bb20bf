//! The raw disk: aligned direct writes through the ring that flightbox uses, into preallocated files.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;
use storage::disk::{Disk, DiskState, Durability};
use storage::limits::{RING_BUFFER_BYTES, RING_BUFFERS_PER_WRITER};
use storage::uring::{self, UringDisk};

/// Rates of one pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskRates {
    /// One sync per segment.
    pub(crate) plain_mib_s: f64,
    /// A sync after each 16 MiB, as a recorder that acknowledges needs it.
    pub(crate) synced_mib_s: f64,
    /// Each 1 MiB write durable by itself (`RWF_DSYNC`).
    pub(crate) dsync_mib_s: f64,
}

const SYNC_EVERY: u64 = 16 << 20;
const SEGMENT: u64 = 256 << 20;

/// Writes `bytes` three times, in segments like flightbox's: one sync a segment, a sync per 16 MiB, and
/// every write durable by itself.
pub(crate) fn measure(scratch: &Path, bytes: u64, files: usize) -> Result<DiskRates, Box<dyn Error>> {
    let state = uring::probe(scratch, true);
    Ok(DiskRates {
        plain_mib_s: timed(&state, scratch, (bytes, files), Mode::SyncAtEnd)?,
        synced_mib_s: timed(&state, scratch, (bytes, files), Mode::SyncEach16MiB)?,
        dsync_mib_s: timed(&state, scratch, (bytes, files), Mode::DsyncEachWrite)?,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    SyncAtEnd,
    SyncEach16MiB,
    DsyncEachWrite,
}

fn timed(state: &DiskState, scratch: &Path, (bytes, files): (u64, usize), mode: Mode) -> Result<f64, Box<dyn Error>> {
    // Removed after the clock has stopped: on a mount with `discard` that takes as long as writing.
    let folder = tempfile::tempdir_in(scratch)?;
    let path = folder.path().to_owned();
    let state = state.clone();
    crate::rest();
    let started = Instant::now();
    std::thread::spawn(move || {
        uring::run(&state, RING_BUFFERS_PER_WRITER, |disk| write_all(disk, path, (bytes, files), mode))
    })
    .join()
    .map_err(|_| "the disk thread panicked")???;
    Ok((bytes >> 20) as f64 / started.elapsed().as_secs_f64())
}

/// As many files at once as the load has streams: one file alone is slower than the device.
async fn write_all(disk: UringDisk, folder: PathBuf, (bytes, files): (u64, usize), mode: Mode) -> std::io::Result<()> {
    let mut tasks: Vec<Write> = (0..files)
        .map(|file| {
            let folder = folder.join(file.to_string());
            let disk = disk.clone();
            tokio::task::spawn_local(async move {
                std::fs::create_dir(&folder)?;
                write(disk, folder, bytes / files as u64, mode).await
            })
        })
        .collect();
    finish(&mut tasks).await
}

async fn write(disk: UringDisk, folder: PathBuf, bytes: u64, mode: Mode) -> std::io::Result<()> {
    let durability = if mode == Mode::DsyncEachWrite { Durability::Now } else { Durability::Later };
    for segment in 0..bytes / SEGMENT {
        let file = disk.create(&folder.join(segment.to_string())).await?;
        disk.allocate(&file, 0, SEGMENT).await?;
        let mut writes = Vec::new();
        for at in (0..SEGMENT).step_by(RING_BUFFER_BYTES) {
            let mut buf = disk.buffer().await;
            // As the load's blobs: storage below may treat zeros in its own way.
            if buf.first() == Some(&0) {
                buf.iter_mut().enumerate().for_each(|(index, byte)| *byte = (index * 31 % 251 + 1) as u8);
            }
            writes.push(spawn(disk.write(&file, buf, RING_BUFFER_BYTES, at, durability)));
            if mode == Mode::SyncEach16MiB && (at + RING_BUFFER_BYTES as u64).is_multiple_of(SYNC_EVERY) {
                finish(&mut writes).await?;
                disk.sync(&file).await?;
            }
        }
        finish(&mut writes).await?;
        disk.sync(&file).await?;
    }
    Ok(())
}

type Write = tokio::task::JoinHandle<std::io::Result<()>>;

fn spawn<B: 'static>(write: impl Future<Output = (std::io::Result<()>, B)> + 'static) -> Write {
    tokio::task::spawn_local(async move { write.await.0 })
}

async fn finish(writes: &mut Vec<Write>) -> std::io::Result<()> {
    for write in writes.drain(..) {
        write.await.map_err(std::io::Error::other)??;
    }
    Ok(())
}
