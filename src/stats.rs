//! How long each station takes. The only user of hdrhistogram.
//!
//! Recording is a lock on one of a few shards that the calling thread rarely shares; reading merges
//! the shards. Values in microseconds.

use hdrhistogram::Histogram;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A station of the line (design.md section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Station {
    /// Waiting for a permit.
    Admit,
    /// Checking and decoding a message.
    Decode,
    /// From the front to the writer.
    Lane,
    /// Encoding a chunk, its waits for buffers left out.
    Encode,
    /// From the last byte encoded to all of the chunk on stable media.
    Write,
    /// From the committer's lane to the synced group.
    Commit,
    /// From a batch's arrival to its acknowledgement: the durable latency.
    Ack,
}

impl Station {
    /// All of them, in the order of the line.
    pub(crate) const ALL: [Self; 7] =
        [Self::Admit, Self::Decode, Self::Lane, Self::Encode, Self::Write, Self::Commit, Self::Ack];

    /// The name shown.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Admit => "admit",
            Self::Decode => "decode",
            Self::Lane => "lane",
            Self::Encode => "encode",
            Self::Write => "write",
            Self::Commit => "commit",
            Self::Ack => "ack",
        }
    }
}

const SHARDS: usize = 8;
/// Longest time told apart, in microseconds: an hour.
const MICROS_MAX: u64 = 3_600_000_000;

/// Histograms and counters of the whole program.
#[derive(Debug)]
pub(crate) struct Stats {
    shards: Vec<Mutex<[Histogram<u64>; 7]>>,
    /// Rows acknowledged.
    pub(crate) rows: AtomicU64,
    /// Batches acknowledged.
    pub(crate) batches: AtomicU64,
    /// Data bytes acknowledged.
    pub(crate) bytes: AtomicU64,
    /// Chunks committed.
    pub(crate) chunks: AtomicU64,
    /// Tail runs committed.
    pub(crate) tail_runs: AtomicU64,
    /// Synced groups.
    pub(crate) groups: AtomicU64,
    /// Groups whose commit failed.
    pub(crate) commit_failures: AtomicU64,
    /// Uploads open now.
    pub(crate) uploads: AtomicU64,
}

/// A station's times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) p999_us: u64,
    pub(crate) max_us: u64,
}

impl Default for Stats {
    fn default() -> Self {
        let empty = || Mutex::new(Station::ALL.map(|_| histogram()));
        Self {
            shards: std::iter::repeat_with(empty).take(SHARDS).collect(),
            rows: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            chunks: AtomicU64::new(0),
            tail_runs: AtomicU64::new(0),
            groups: AtomicU64::new(0),
            commit_failures: AtomicU64::new(0),
            uploads: AtomicU64::new(0),
        }
    }
}

fn histogram() -> Histogram<u64> {
    match Histogram::new_with_max(MICROS_MAX, 2) {
        Ok(histogram) => histogram,
        Err(_) => unreachable!("the bounds are constants that hdrhistogram accepts"),
    }
}

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.with(|mine| match mine.get() {
        Some(index) => index,
        None => {
            let index = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            mine.set(Some(index));
            index
        }
    })
}

impl Stats {
    /// Notes one passage through a station.
    pub(crate) fn record(&self, station: Station, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min(MICROS_MAX);
        if let Some(shard) = self.shards.get(shard()) {
            let mut histograms = shard.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(histogram) = histograms.get_mut(station as usize) {
                histogram.saturating_record(micros);
            }
        }
    }

    /// Adds to a counter.
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// The times of a station so far.
    pub(crate) fn summary(&self, station: Station) -> Summary {
        let mut all = histogram();
        for shard in &self.shards {
            let histograms = shard.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(histogram) = histograms.get(station as usize) {
                all.add(histogram).ok(); // Same bounds in all shards: cannot fail.
            }
        }
        Summary {
            count: all.len(),
            p50_us: all.value_at_quantile(0.5),
            p99_us: all.value_at_quantile(0.99),
            p999_us: all.value_at_quantile(0.999),
            max_us: all.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_all_threads_are_merged() {
        let stats = Stats::default();
        std::thread::scope(|scope| {
            for micros in [100, 200, 300] {
                let stats = &stats;
                scope.spawn(move || stats.record(Station::Ack, Duration::from_micros(micros)));
            }
        });
        let summary = stats.summary(Station::Ack);
        assert_eq!(summary.count, 3);
        assert_eq!(stats.summary(Station::Admit).count, 0);
        assert!((195..=205).contains(&summary.p50_us), "{summary:?}");
    }
}
