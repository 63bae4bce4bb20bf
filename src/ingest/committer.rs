//! Station 7: one thread that makes changes durable, grouped over all topics and writers.
//!
//! Guarantees: it is the only writer of the catalog. What arrives while a group is being synced
//! forms the next group, and what writers send soon after one began waits for others ([`spacing`]); life-cycle changes
//! and ends do not. Nothing of a group is acknowledged before the group is durable (INV-1).
//! An entry for a topic that is not open for writing is dropped and its writer told.
//!
//! A failed commit has an unknown outcome: nothing of it is acknowledged, RocksDB is opened again (with
//! growing pauses, [`limits::REOPEN_PAUSE_MAX`] at most), and what it then finds is true: chunks, tail
//! runs and ends that are there are acknowledged, the others are applied again; whoever asked for a
//! life-cycle change is told that its outcome is unknown.

mod apply;
mod entry;
mod live;
#[cfg(test)]
mod tests;

use crate::health::Health;
use crate::ingest::lane::{Receiver, lane};
use crate::limits;
use crate::stats::Stats;
use apply::{Applied, acknowledge, answer, apply};
pub(crate) use entry::{ChunkCommit, CommitHandle, End};
use entry::{Entry, Item, Made};
pub(crate) use live::{Live, Watermark};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use storage::StorageError;
use storage::catalog::Catalog;
use storage::depth::Depth;

/// How long after the beginning of a group the next one begins at the earliest, unless somebody waits for a change or
/// an end: a sync costs as much as dozens of entries. A small part of what batches may wait anyway.
pub(crate) fn spacing(commit_interval: Duration) -> Duration {
    limits::COMMIT_SPACING_MAX.min(commit_interval / 6)
}

/// The same for changes and ends, when so many were in the last group: where hundreds of uploads begin or end at once,
/// others come in the meantime. Whoever asks alone, one after another, waits for nobody.
fn urgent_spacing(urgent_in_last: usize) -> Duration {
    if limits::COMMIT_CROWD <= urgent_in_last { limits::COMMIT_CROWD_SPACING } else { Duration::ZERO }
}

/// Starts the committer thread. It ends when all handles are gone.
pub(crate) fn start(
    catalog: Catalog,
    spacing: Duration,
    stats: Arc<Stats>,
    health: Arc<Health>,
) -> std::io::Result<(CommitHandle, std::thread::JoinHandle<()>)> {
    let (handle, receiver) = pair();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let thread = std::thread::Builder::new()
        .name("fb-committer".to_owned())
        .spawn(move || runtime.block_on(run(catalog, receiver, spacing, stats, health)))?;
    Ok((handle, thread))
}

/// A handle, and the end that [`run`] takes.
pub(crate) fn pair() -> (CommitHandle, Receiver<Entry>) {
    let (sender, receiver) = lane(limits::COMMIT_LANE_DEPTH);
    (CommitHandle { lane: sender, depth: Depth::default() }, receiver)
}

/// Commits what comes until all handles are gone.
pub(crate) async fn run(
    catalog: Catalog,
    lane: Receiver<Entry>,
    spacing: Duration,
    stats: Arc<Stats>,
    health: Arc<Health>,
) {
    let live = Live::default();
    let mut committer = Committer {
        catalog,
        lane,
        stats,
        health,
        live,
        was_full: false,
        urgent: 0,
        failures: 0,
        corruptions: 0,
        dead: None,
    };
    let mut held = VecDeque::new();
    let mut earliest = tokio::time::Instant::now();
    let mut urgent_earliest = earliest;
    while !held.is_empty() || committer.something_came().await {
        // Cancel-safety: neither takes anything.
        tokio::select! {
            biased;
            () = committer.lane.urged() => tokio::time::sleep_until(earliest.min(urgent_earliest)).await,
            () = tokio::time::sleep_until(earliest) => {}
        }
        let began = tokio::time::Instant::now();
        earliest = began + spacing;
        held = committer.commit_group(held).await;
        urgent_earliest = began + urgent_spacing(committer.urgent);
        if committer.was_full {
            earliest = began;
        }
    }
}

struct Committer {
    catalog: Catalog,
    lane: Receiver<Entry>,
    stats: Arc<Stats>,
    health: Arc<Health>,
    live: Live,
    /// The last group took no more: whoever has no time may be behind it.
    was_full: bool,
    /// Entries of the last group that had no time.
    urgent: usize,
    /// Commits that failed since one went well.
    failures: u32,
    /// Commits that failed by corruption, ever: one that goes well between them heals nothing.
    corruptions: u32,
    /// Set when a failed commit was not followed up because the program ends: what is known in memory is ahead
    /// of the catalog, so nothing may be committed any more (INV-2).
    dead: Option<StorageError>,
}

impl Committer {
    /// Waits for the first entry of a group; `false`: none will come. From then on the lane is looked at without being
    /// woken, until it is empty again.
    async fn something_came(&self) -> bool {
        self.lane.looks_by_itself(false);
        let came = self.lane.ready().await;
        self.lane.looks_by_itself(true);
        came
    }

    /// Applies what is held and what has come, as one group; returns what must be applied again.
    async fn commit_group(&mut self, mut held: VecDeque<Entry>) -> VecDeque<Entry> {
        if let Some(cause) = self.dead.clone() {
            self.refuse_waiting(&cause, &mut VecDeque::new());
            return VecDeque::new();
        }
        let mut applied = Vec::new();
        (self.was_full, self.urgent) = (false, 0);
        self.lane.takes_notice();
        let outcome = match self.catalog.group() {
            Ok(mut group) => {
                while group.size_bytes() < limits::COMMIT_GROUP_BYTES_MAX
                    && let Some(entry) = held.pop_front().or_else(|| self.lane.try_recv())
                {
                    self.urgent += usize::from(!entry.item.has_time());
                    applied.push(apply(&mut group, &mut self.live, entry, &self.stats));
                }
                self.was_full = limits::COMMIT_GROUP_BYTES_MAX <= group.size_bytes();
                group.commit()
            }
            Err(error) => Err(error),
        };
        Stats::add(&self.stats.groups, 1);
        match outcome {
            Ok(()) => {
                self.live.keep();
                if self.failures > 0 {
                    self.failures = 0;
                    self.health.catalog_works();
                    tracing::info!("the catalog takes commits again");
                }
                for entry in applied {
                    acknowledge(entry, &self.stats);
                }
                held
            }
            Err(cause) => {
                // First what was applied, then what was held behind it: the order of each topic stays.
                let mut again = self.after_failure(applied, &cause);
                again.append(&mut held);
                self.reopen(&cause, &mut again).await;
                again
            }
        }
    }

    /// Tells those that asked for changes; keeps the rest for another try.
    fn after_failure(&mut self, applied: Vec<Applied>, cause: &StorageError) -> VecDeque<Entry> {
        self.failures += 1;
        if cause.is_corruption() {
            self.corruptions += 1;
            if self.corruptions >= limits::CORRUPT_COMMITS_MAX {
                self.health.catalog_is_corrupt(cause);
            }
        }
        Stats::add(&self.stats.commit_failures, 1);
        self.health.catalog_failed(cause);
        tracing::error!(error = %cause, failures = self.failures, "a commit failed: its outcome is unknown until the catalog is open again");
        let mut again = VecDeque::new();
        for entry in applied {
            match entry {
                Applied::Change(_, Some(acknowledge)) => acknowledge(&Err(cause.clone())),
                Applied::Change(_, None) => {}
                // Also what was refused: nobody was told, and the deletion that refused it may not have happened.
                Applied::Data(entry, ..) | Applied::Tails(entry, _) => {
                    again.push_back(Entry { again: true, ..entry });
                }
            }
        }
        again
    }

    /// Opens the catalog again, however long it takes; meanwhile changes are refused, and what writers
    /// send is kept (they send no more than they may have under way).
    async fn reopen(&mut self, cause: &StorageError, again: &mut VecDeque<Entry>) {
        let mut pause = limits::REOPEN_PAUSE_MIN;
        if self.failures > 1 {
            pause = limits::REOPEN_PAUSE_MAX.min(pause * 2_u32.saturating_pow(self.failures.min(16)));
            self.pause(pause).await;
        }
        loop {
            // Nobody waits for the catalog any more: whoever waits for an answer is told.
            if self.health.gives_up() {
                self.dead = Some(cause.clone());
                again.drain(..).for_each(|entry| answer(entry.item, Err(cause.clone())));
                self.refuse_waiting(cause, &mut VecDeque::new());
                return;
            }
            let opened = self.catalog.reopen(limits::REOPEN_READERS_WAIT).and_then(|()| self.live.undo(&self.catalog));
            let error = match opened {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::error!(%error, "the catalog does not open; trying again");
            self.health.catalog_failed(&error);
            if error.is_corruption() {
                self.health.catalog_is_corrupt(&error);
            }
            self.pause(pause).await;
            pause = limits::REOPEN_PAUSE_MAX.min(pause * 2);
            self.refuse_waiting(&error, again);
        }
    }

    /// Waits, but not longer than anybody waits for the catalog.
    async fn pause(&self, pause: Duration) {
        let since = tokio::time::Instant::now();
        while since.elapsed() < pause && !self.health.gives_up() {
            tokio::time::sleep(limits::REOPEN_PAUSE_MIN).await;
        }
    }

    /// Refuses changes that came meanwhile; keeps what writers sent.
    fn refuse_waiting(&self, cause: &StorageError, again: &mut VecDeque<Entry>) {
        while let Some(entry) = self.lane.try_recv() {
            match entry.item {
                Item::Change(change) => drop(change(Made::Not(cause.clone()))),
                item if self.health.gives_up() => answer(item, Err(cause.clone())),
                item => again.push_back(Entry { item, ..entry }),
            }
        }
    }
}
