//! The disk's own limits, by fio and by one small durable write; and what the block device counted.

use crate::report::shell;
use serde_json::Value;
use std::error::Error;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Small durable writes that are timed.
const SMALL_WRITES: usize = 200;
const BLOCK_BYTES: usize = 4096;
/// A sector in `/proc/diskstats`, whatever the device's own is (Documentation/admin-guide/iostats.rst).
const SECTOR_BYTES: u64 = 512;
/// How often the device is asked whether it works.
const LOOK: Duration = Duration::from_millis(2);
/// A device that completes nothing for this long while requests wait stands still: what the 99th percentile of a
/// durable acknowledgement may take beyond its interval.
const STILL: Duration = Duration::from_millis(25);

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
        let device = device_of(folder)?;
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

/// Name of the block device below a folder.
fn device_of(folder: &Path) -> Result<String, Box<dyn Error>> {
    let source = shell("findmnt", &["-no", "SOURCE", "-T", &folder.display().to_string()]);
    Ok(PathBuf::from(source).file_name().ok_or("no block device")?.to_string_lossy().into_owned())
}

/// For how long the device stood still.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Still {
    /// The longest time.
    pub(crate) longest: Duration,
    /// All times of [`STILL`] and more together.
    pub(crate) together: Duration,
}

/// What was seen of the device so far. Times are lower bounds: from one look to another that both found it still.
#[derive(Debug, Default)]
struct Looks {
    completed: u64,
    /// The first look that found it as it is, with requests waiting.
    since: Option<Duration>,
    /// The last look that found it still.
    seen: Duration,
    still: Still,
}

impl Looks {
    fn see(&mut self, now: Duration, completed: u64, waiting: u64) {
        if completed == self.completed && waiting > 0 {
            self.since.get_or_insert(now);
            self.seen = now;
            return;
        }
        self.close();
        *self = Self { completed, since: (waiting > 0).then_some(now), seen: now, still: self.still };
    }

    /// Counts the time that it has stood still for by now.
    fn close(&mut self) {
        let still = self.since.map_or(Duration::ZERO, |since| self.seen.saturating_sub(since));
        if STILL <= still {
            self.still.longest = self.still.longest.max(still);
            self.still.together += still;
        }
    }
}

/// Watches the device below a folder beside a measurement, until it is ended or dropped.
#[derive(Debug)]
pub(crate) struct StillWatch {
    /// Nothing is sent: that it is gone ends the watcher.
    stop: mpsc::Sender<()>,
    watcher: JoinHandle<Still>,
}

impl StillWatch {
    /// Watches from now on.
    pub(crate) fn of(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let stats = PathBuf::from("/sys/class/block").join(device_of(folder)?).join("stat");
        std::fs::read_to_string(&stats)?;
        let (stop, stopped) = mpsc::channel();
        let watcher = std::thread::spawn(move || {
            let (started, mut looks) = (Instant::now(), Looks::default());
            while stopped.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
                if let Some((completed, waiting)) = std::fs::read_to_string(&stats).ok().as_deref().and_then(requests) {
                    looks.see(started.elapsed(), completed, waiting);
                }
            }
            looks.close();
            looks.still
        });
        Ok(Self { stop, watcher })
    }

    /// What was seen.
    pub(crate) fn end(self) -> Result<Still, Box<dyn Error>> {
        drop(self.stop);
        self.watcher.join().map_err(|_| "the watcher of the device panicked".into())
    }
}

/// Requests completed (reads, writes, discards, flushes) and under way (Documentation/block/stat.rst).
fn requests(stat: &str) -> Option<(u64, u64)> {
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let completed = [0, 4, 11, 15].iter().map(|at| fields.get(*at).copied().unwrap_or(0)).sum();
    Some((completed, *fields.get(8)?))
}

fn written(device: &str) -> Result<u64, Box<dyn Error>> {
    let stats = std::fs::read_to_string("/proc/diskstats")?;
    let fields = stats.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = fields.into_iter().find(|fields| fields.get(2) == Some(&device)).ok_or("the device has no counters")?;
    Ok(line.get(9).ok_or("no counter")?.parse::<u64>()? * SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_stands_still_while_requests_wait_and_none_completes() {
        let mut looks = Looks::default();
        let looked = [
            (0, 5, 1),
            (20, 5, 1),  // Not yet long enough to be told from one large request,
            (22, 6, 1),  // which completed.
            (100, 6, 0), // Nothing to do is no stall.
            (200, 6, 3),
            (230, 6, 3),
            (270, 9, 0), // Nobody looked for 40 ms: not known to be still then.
            (300, 9, 2),
            (350, 9, 2),
            (352, 10, 2),
            (392, 10, 2), // Still so at the end.
        ];
        for (ms, completed, waiting) in looked {
            looks.see(Duration::from_millis(ms), completed, waiting);
        }
        looks.close();
        assert_eq!(looks.still.longest, Duration::from_millis(50));
        assert_eq!(looks.still.together, Duration::from_millis(30 + 50 + 40));
    }

    #[test]
    fn discards_and_flushes_are_requests_and_older_kernels_do_not_count_them() {
        assert_eq!(requests("1 0 0 0 20 0 0 0 7 0 0 300 0 0 0 4000 0"), Some((4321, 7)));
        assert_eq!(requests("1 0 0 0 20 0 0 0 7 0 0"), Some((21, 7)));
        assert_eq!(requests("1 0 0"), None);
    }
}
