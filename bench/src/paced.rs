//! The open loop without a server: what the disk alone does with the same bytes at the same pace. A stall that it has
//! by itself, no recorder on it can hide.

use crate::disk::{Still, StillWatch};
use crate::open::WARM_UP;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes that become durable at once, as much as flightbox's chunks have by default.
const UNIT_BYTES: usize = 16 << 20;
/// What direct writes start at, in memory and file.
const ALIGNMENT: usize = 4096;

type AnyError = Box<dyn Error + Send + Sync>;

/// What became of the units.
pub(crate) struct Paced {
    /// Times from due to durable, shortest first, without those of the warm-up.
    pub(crate) times: Vec<Duration>,
    /// How the device stood still meanwhile.
    pub(crate) still: Still,
    /// From the first unit's due time to the last one's durability.
    pub(crate) took: Duration,
}

impl Paced {
    /// A percentile in milliseconds.
    pub(crate) fn ms(&self, quantile: f64) -> Option<f64> {
        let rank = (self.times.len() as f64 * quantile).ceil() as usize;
        self.times.get(rank.saturating_sub(1)).map(|time| time.as_secs_f64() * 1e3)
    }
}

/// Writes units that come by a clock to so many preallocated files in turn, after a pause; a unit is durable before the
/// next one of its file is begun.
pub(crate) fn paced(
    scratch: &Path,
    bytes_per_s: f64,
    files: usize,
    time: Duration,
    pause: impl FnOnce(),
) -> Result<Paced, Box<dyn Error>> {
    let folder = tempfile::tempdir_in(scratch)?;
    let period = Duration::from_secs_f64(UNIT_BYTES as f64 / bytes_per_s);
    let units = (time.as_secs_f64() / period.as_secs_f64()) as usize;
    let files: Vec<File> = (0..files)
        .map(|number| preallocated(&folder.path().join(number.to_string()), units.div_ceil(files)))
        .collect::<Result<_, _>>()?;
    // What was deleted before is discarded by now.
    rustix::fs::sync();
    pause();
    let watch = StillWatch::of(scratch)?;
    let start = Instant::now();
    let mut times = std::thread::scope(|scope| {
        let writers: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(first, file)| {
                let due = (first..units).step_by(files.len()).map(move |unit| start + period * unit as u32);
                scope.spawn(move || write(file, due))
            })
            .collect();
        let written = writers.into_iter().map(|writer| writer.join().map_err(|_| "a writer panicked")?);
        Ok::<_, AnyError>(written.collect::<Result<Vec<_>, _>>()?.concat())
    })
    .map_err(|error| error.to_string())?;
    let (took, still) = (start.elapsed(), watch.end()?);
    times.retain(|(due, _)| start + WARM_UP <= *due);
    let mut times: Vec<Duration> = times.into_iter().map(|(_, time)| time).collect();
    times.sort();
    Ok(Paced { times, still, took })
}

fn preallocated(path: &Path, units: usize) -> Result<File, Box<dyn Error>> {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new().create_new(true).write(true).custom_flags(direct).open(path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, (units * UNIT_BYTES) as u64)?;
    file.sync_all()?;
    Ok(file)
}

/// Writes a unit whenever one is due, and says of each how long that took.
fn write(file: &File, due: impl Iterator<Item = Instant>) -> Result<Vec<(Instant, Duration)>, AnyError> {
    let mut memory = vec![0_u8; UNIT_BYTES + ALIGNMENT];
    let mut random = storage::sim::Random::new(1);
    memory.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.bits().to_le_bytes()));
    let unit = &memory[memory.as_ptr().align_offset(ALIGNMENT)..][..UNIT_BYTES];
    let mut times = Vec::new();
    for (number, due) in due.enumerate() {
        // It may wake early.
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            std::thread::park_timeout(left);
        }
        file.write_all_at(unit, (number * UNIT_BYTES) as u64)?;
        file.sync_data()?;
        times.push((due, due.elapsed()));
    }
    Ok(times)
}
