//! The disk's own limits, by fio and by one small durable write; and what the block device counted.

use crate::report::shell;
use serde_json::Value;
use std::error::Error;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Small durable writes that are timed.
const SMALL_WRITES: usize = 200;
const BLOCK_BYTES: usize = 4096;
/// A sector in `/proc/diskstats`, whatever the device's own is (Documentation/admin-guide/iostats.rst).
const SECTOR_BYTES: u64 = 512;

/// What fio does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fio {
    /// Sequential direct writes, one sync at the end.
    Write,
    /// The same with a sync per 16 MiB.
    WriteSync,
    /// Sequential direct reads.
    Read,
}

/// Bytes a second of fio over `bytes`, 1 MiB at a time, 16 under way, in one file.
pub(crate) fn fio(scratch: &Path, bytes: u64, how: Fio) -> Result<f64, Box<dyn Error>> {
    let file = scratch.join("fio.data");
    let mut command = Command::new("fio");
    command
        .args(["--name=limit", "--bs=1m", "--direct=1", "--ioengine=io_uring", "--iodepth=16", "--refill_buffers=0"])
        .args(["--output-format=json", "--fallocate=posix", "--randrepeat=1"])
        .arg(format!("--size={bytes}"))
        .arg(format!("--filename={}", file.display()));
    match how {
        Fio::Write => command.args(["--rw=write", "--end_fsync=1"]),
        Fio::WriteSync => command.args(["--rw=write", "--fdatasync=16", "--end_fsync=1"]),
        Fio::Read => command.args(["--rw=read"]),
    };
    if how != Fio::Read {
        std::fs::remove_file(&file).ok(); // It may not be there.
    }
    let output = command.output().map_err(|error| format!("fio: {error}; install it (apt-get install fio)"))?;
    let json: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)))?;
    let side = if how == Fio::Read { "read" } else { "write" };
    let job = &json["jobs"][0];
    let total = job[side]["io_bytes"].as_f64().unwrap_or(0.0);
    // Of the whole job, its last sync included.
    let seconds = job["job_runtime"].as_f64().unwrap_or(0.0) / 1000.0;
    if total < bytes as f64 || seconds <= 0.0 {
        return Err(format!("fio did not do its work: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(total / seconds)
}

/// Removes what fio wrote.
pub(crate) fn fio_clear(scratch: &Path) {
    std::fs::remove_file(scratch.join("fio.data")).ok(); // Left for the next run otherwise.
}

/// Seconds of one durable write of 4 KiB into blocks that are there: median and 99th percentile.
pub(crate) fn small_durable_write(scratch: &Path) -> Result<(f64, f64), Box<dyn Error>> {
    let path = scratch.join("small.data");
    let flags = rustix::fs::OFlags::DSYNC.bits() as i32;
    let mut file = std::fs::OpenOptions::new().create(true).write(true).custom_flags(flags).open(&path)?;
    let block = vec![7_u8; BLOCK_BYTES];
    let mut times = Vec::with_capacity(SMALL_WRITES);
    for at in 0..2 * SMALL_WRITES {
        if at == SMALL_WRITES {
            use std::io::Seek;
            file.rewind()?;
        }
        let started = Instant::now();
        file.write_all(&block)?;
        if at >= SMALL_WRITES {
            times.push(started.elapsed().as_secs_f64());
        }
    }
    std::fs::remove_file(&path)?;
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], times[times.len() * 99 / 100]))
}

/// Bytes written to the block device below a folder.
#[derive(Debug)]
pub(crate) struct DiskCounter {
    device: String,
    before: u64,
}

impl DiskCounter {
    /// Counts from now on; what is dirty by now is written first.
    pub(crate) fn of(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let source = shell("findmnt", &["-no", "SOURCE", "-T", &folder.display().to_string()]);
        let device = PathBuf::from(source).file_name().ok_or("no block device")?.to_string_lossy().into_owned();
        rustix::fs::sync();
        let before = written(&device)?;
        Ok(Self { device, before })
    }

    /// Bytes written since, with what is dirty now.
    pub(crate) fn written_since(&self) -> Result<u64, Box<dyn Error>> {
        rustix::fs::sync();
        Ok(written(&self.device)? - self.before)
    }
}

fn written(device: &str) -> Result<u64, Box<dyn Error>> {
    let stats = std::fs::read_to_string("/proc/diskstats")?;
    let fields = stats.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = fields.into_iter().find(|fields| fields.get(2) == Some(&device)).ok_or("the device has no counters")?;
    Ok(line.get(9).ok_or("no counter")?.parse::<u64>()? * SECTOR_BYTES)
}
