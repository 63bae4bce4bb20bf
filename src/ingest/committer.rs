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

use crate::health::Health;
use crate::ingest::lane::{Receiver, Sender, lane};
use crate::limits;
use crate::stats::{Station, Stats};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{SegmentRecord, TopicTotals};
use storage::catalog::{Catalog, Group, Look, Txn};
use storage::chunk::ChunkRecord;
use storage::chunk::record::SkipRecord;
use storage::depth::Depth;
use storage::ids::TopicNo;
use storage::tail::TailRun;
use tokio::sync::{oneshot, watch};

type Outcome = Result<(), StorageError>;

/// What is durable of an upload.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Watermark {
    pub(crate) rows: u64,
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
}

/// A chunk on stable media, to be recorded.
pub(crate) struct ChunkCommit {
    pub(crate) topic: TopicNo,
    pub(crate) record: ChunkRecord,
    pub(crate) skip: SkipRecord,
    pub(crate) segment: SegmentRecord,
    /// The topic ends with this chunk.
    pub(crate) end: Option<End>,
    pub(crate) reply: oneshot::Sender<Outcome>,
}

/// How an upload ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// A clean end: the topic is locked (INV-12).
    Lock,
    /// Anything else: it stays unlocked with its durable prefix.
    Leave,
    /// As [`Self::Leave`], and its tail becomes a chunk: nobody writes it any more for now.
    Close,
}

/// The topics that are being written, as the committer knows them.
#[derive(Debug, Default)]
pub(crate) struct Live {
    topics: HashMap<TopicNo, LiveTopic>,
    /// What the group did that is not durable yet, in order.
    undo: Vec<Undo>,
}

#[derive(Debug)]
enum Undo {
    Opened(TopicNo),
    Closed(TopicNo, LiveTopic),
}

#[derive(Debug)]
struct LiveTopic {
    totals: TopicTotals,
    /// Data bytes in chunks, the tail left out.
    chunk_data_bytes: u64,
    watermark: Arc<watch::Sender<Watermark>>,
}

impl Live {
    /// Opens a topic for writing behind what is durable of it, of which `tail_data_bytes` lie in the tail.
    /// `false`: it is being written already.
    pub(crate) fn open(
        &mut self,
        topic: TopicNo,
        watermark: Arc<watch::Sender<Watermark>>,
        totals: TopicTotals,
        tail_data_bytes: u64,
    ) -> bool {
        let free = !self.topics.contains_key(&topic);
        if free {
            let chunk_data_bytes = totals.data_bytes.saturating_sub(tail_data_bytes);
            self.topics.insert(topic, LiveTopic { totals, chunk_data_bytes, watermark });
            self.undo.push(Undo::Opened(topic));
        }
        free
    }

    /// Whether a topic is being written.
    pub(crate) fn is_open(&self, topic: TopicNo) -> bool {
        self.topics.contains_key(&topic)
    }

    /// Closes a topic: entries still under way for it are refused. Says whether it was being written.
    pub(crate) fn close(&mut self, topic: TopicNo) -> bool {
        match self.topics.remove(&topic) {
            Some(state) => {
                self.undo.push(Undo::Closed(topic, state));
                true
            }
            None => false,
        }
    }

    /// What is to be told of a topic once the group is durable.
    fn told(&self, topic: TopicNo) -> Told {
        self.topics.get(&topic).map(|state| (Arc::clone(&state.watermark), state.totals))
    }

    /// The group is durable.
    fn keep(&mut self) {
        self.undo.clear();
    }

    /// The group failed: who was told so does not write; what was closed is open again if it is still
    /// there; and every total is what the catalog has.
    fn undo(&mut self, look: &impl Look) -> Outcome {
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::Opened(topic) => drop(self.topics.remove(&topic)),
                Undo::Closed(topic, state) => drop(self.topics.insert(topic, state)),
            }
        }
        let mut gone = Vec::new();
        for (topic, state) in &mut self.topics {
            if look.topic(*topic)?.is_none() {
                gone.push(*topic);
                continue;
            }
            state.totals = look.totals(*topic)?;
            let tail = look.tail(*topic, state.totals.chunk_batches)?;
            let tail_bytes = tail.iter().map(|run| run.data_bytes).sum();
            state.chunk_data_bytes = state.totals.data_bytes.saturating_sub(tail_bytes);
        }
        self.topics.retain(|topic, _| !gone.contains(topic));
        Ok(())
    }
}

/// Runs when the group is durable, or is not.
type Acknowledge = Box<dyn FnOnce(&Outcome) + Send>;
type Change = Box<dyn FnOnce(Made<'_>) -> Option<Acknowledge> + Send>;

/// What a change is run with.
enum Made<'a> {
    In(&'a mut Group, &'a mut Live),
    /// Nothing can be changed now.
    Not(StorageError),
}

type Told = Option<(Arc<watch::Sender<Watermark>>, TopicTotals)>;

enum Item {
    Chunk(Box<ChunkCommit>),
    /// Runs of different topics: hundreds of slow ones share a wake-up and an answer.
    Tails {
        runs: Vec<(TopicNo, TailRun)>,
        reply: oneshot::Sender<Vec<Outcome>>,
    },
    End {
        topic: TopicNo,
        end: End,
        reply: oneshot::Sender<Outcome>,
    },
    Change(Change),
}

impl Item {
    /// Whether it may wait for others: it has a commit interval to become durable.
    fn has_time(&self) -> bool {
        match self {
            Self::Chunk(commit) => commit.end.is_none(),
            Self::Tails { .. } => true,
            Self::End { .. } | Self::Change(_) => false,
        }
    }
}

/// Entry with the time it was queued.
pub(crate) struct Entry {
    item: Item,
    queued: Instant,
    /// Applied before, in a group whose commit failed: it may be durable already.
    again: bool,
}

/// An entry in a group that is not durable yet.
enum Applied {
    Change(Instant, Option<Acknowledge>),
    Data(Entry, Outcome, Told),
    Tails(Entry, Vec<(Outcome, Told)>),
}

/// The way to the committer.
#[derive(Clone)]
pub(crate) struct CommitHandle {
    lane: Sender<Entry>,
    depth: Depth,
}

impl CommitHandle {
    async fn send(&self, item: Item) -> Outcome {
        let has_time = item.has_time();
        if !has_time || matches!(item, Item::Tails { .. }) {
            self.depth.small_write();
        }
        let entry = Entry { item, queued: Instant::now(), again: false };
        let sent = if has_time { self.lane.send_soon(entry).await } else { self.lane.send(entry).await };
        sent.map_err(|_| stopped())
    }

    /// Knows when somebody waits for a small commit; for those who make large writes on the same device.
    pub(crate) fn depth(&self) -> &Depth {
        &self.depth
    }

    /// Queues a chunk; the reply comes when it is durable. Returns when it has its place in the order.
    pub(crate) async fn chunk(&self, commit: ChunkCommit) -> Outcome {
        self.send(Item::Chunk(Box::new(commit))).await
    }

    /// Queues tail runs, like [`Self::chunk`]; the reply has an outcome for each of them.
    pub(crate) async fn tails(
        &self,
        runs: Vec<(TopicNo, TailRun)>,
        reply: oneshot::Sender<Vec<Result<(), StorageError>>>,
    ) -> Result<(), StorageError> {
        self.send(Item::Tails { runs, reply }).await
    }

    /// Queues the end of an upload, like [`Self::chunk`].
    pub(crate) async fn end(&self, topic: TopicNo, end: End, reply: oneshot::Sender<Outcome>) -> Outcome {
        self.send(Item::End { topic, end, reply }).await
    }

    /// Runs a life-cycle change: checked and written in one group, answered when durable.
    pub(crate) async fn change<R, E>(
        &self,
        change: impl FnOnce(&mut Txn<'_>, &mut Live) -> Result<R, E> + Send + 'static,
    ) -> Result<R, E>
    where
        R: Send + 'static,
        E: From<StorageError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let boxed: Change = Box::new(move |made| {
            let (group, live) = match made {
                Made::In(group, live) => (group, live),
                Made::Not(cause) => {
                    reply.send(Err(E::from(cause))).ok(); // The asker may have gone.
                    return None;
                }
            };
            let result = group.change(|txn| change(txn, live));
            Some(Box::new(move |outcome: &Outcome| {
                let result = match outcome {
                    Ok(()) => result,
                    Err(error) => Err(E::from(error.clone())),
                };
                reply.send(result).ok(); // The asker may have gone; the change stands.
            }))
        });
        self.send(Item::Change(boxed)).await.map_err(E::from)?;
        answer.await.map_err(|_| E::from(stopped()))?
    }
}

fn stopped() -> StorageError {
    StorageError::Catalog { op: "commit", text: "the committer has stopped".to_owned() }
}

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

/// Puts one entry into the group.
fn apply(group: &mut Group, live: &mut Live, entry: Entry, stats: &Arc<Stats>) -> Applied {
    let Entry { item, queued, again } = entry;
    let (result, topic, end) = match &item {
        Item::Change(_) => {
            let Item::Change(change) = item else { unreachable!("just matched") };
            return Applied::Change(queued, change(Made::In(group, live)));
        }
        Item::Chunk(commit) => {
            Stats::add(&stats.chunks, 1);
            (apply_chunk(group, live, commit, again), commit.topic, commit.end)
        }
        Item::Tails { runs, .. } => {
            Stats::add(&stats.tail_runs, runs.len() as u64);
            let apply = |(topic, run): &(TopicNo, TailRun)| {
                let result = apply_tail(group, live, *topic, run, again);
                let told = if result.is_ok() { live.told(*topic) } else { None };
                (result, told)
            };
            let applied = runs.iter().map(apply).collect();
            return Applied::Tails(Entry { item, queued, again }, applied);
        }
        Item::End { topic, end, .. } => {
            let result = match live.topics.get(topic) {
                Some(state) => apply_end(group, *topic, &state.totals, *end),
                None => Err(StorageError::Gone),
            };
            (result, *topic, Some(*end))
        }
    };
    let told = if result.is_ok() { live.told(topic) } else { None };
    if end.is_some() && result.is_ok() {
        live.close(topic);
    }
    Applied::Data(Entry { item, queued, again }, result, told)
}

/// The group is durable: tells everyone.
fn acknowledge(applied: Applied, stats: &Stats) {
    match applied {
        Applied::Change(queued, acknowledge) => {
            stats.record(Station::Commit, queued.elapsed());
            if let Some(acknowledge) = acknowledge {
                acknowledge(&Ok(()));
            }
        }
        Applied::Data(entry, result, told) => {
            stats.record(Station::Commit, entry.queued.elapsed());
            tell(told);
            answer(entry.item, result);
        }
        Applied::Tails(entry, applied) => {
            stats.record(Station::Commit, entry.queued.elapsed());
            let told = |(result, told)| {
                tell(told);
                result
            };
            let results = applied.into_iter().map(told).collect();
            if let Item::Tails { reply, .. } = entry.item {
                reply.send(results).ok(); // As in `answer`.
            }
        }
    }
}

fn tell(told: Told) {
    if let Some((watermark, totals)) = told {
        watermark.send_replace(Watermark { rows: totals.rows, batches: totals.batches, bytes: totals.data_bytes });
    }
}

fn answer(item: Item, result: Outcome) {
    let reply = match item {
        Item::Chunk(commit) => commit.reply,
        Item::End { reply, .. } => reply,
        Item::Tails { runs, reply } => {
            reply.send(vec![result; runs.len()]).ok(); // As below.
            return;
        }
        Item::Change(_) => return,
    };
    reply.send(result).ok(); // A writer that stopped needs no answer; the commit stands.
}

fn apply_chunk(group: &mut Group, live: &mut Live, commit: &ChunkCommit, again: bool) -> Outcome {
    let ChunkCommit { topic, record, skip, segment, end, .. } = commit;
    let (topic, segment, end) = (*topic, *segment, *end);
    let state = live.topics.get_mut(&topic).ok_or(StorageError::Gone)?;
    // The commit that failed was durable all the same, and so was the lock in it.
    if again && record.end_batch <= state.totals.chunk_batches {
        return Ok(());
    }
    if record.first_batch != state.totals.chunk_batches {
        return Err(out_of_order(topic, record.first_batch, state.totals.chunk_batches));
    }
    let has_tail = state.totals.chunk_batches < state.totals.batches;
    let mut totals = state.totals;
    totals.chunks += 1;
    totals.chunk_batches = record.end_batch;
    totals.chunk_rows = record.end_row;
    totals.rows = totals.rows.max(record.end_row);
    totals.batches = totals.batches.max(record.end_batch);
    totals.stored_bytes += record.length;
    totals.widen(record.time);
    let chunk_data_bytes = state.chunk_data_bytes + record.data_bytes;
    totals.data_bytes = chunk_data_bytes;
    group.change(|txn| {
        txn.put_chunk(topic, record, skip, has_tail)?;
        // A chunk that was written again may lie behind one that is committed after it: the end of a
        // segment never moves back, or a footer would be written over an acknowledged chunk.
        let key = keys::segment(topic, segment.no);
        let before: Option<SegmentRecord> = txn.record(Family::Segments, &key)?;
        let end_offset = before.map_or(segment.end_offset, |before| before.end_offset.max(segment.end_offset));
        txn.put(Family::Segments, key, &SegmentRecord { end_offset, ..segment })?;
        write_end(txn, topic, &totals, end)
    })?;
    state.totals = totals;
    state.chunk_data_bytes = chunk_data_bytes;
    Ok(())
}

/// A hole in a topic's batches (INV-2): the entry before this one failed.
fn out_of_order(topic: TopicNo, found: u64, expected: u64) -> StorageError {
    let text = format!("topic {topic}: batch {found} came where {expected} is next");
    StorageError::Catalog { op: "commit", text }
}

fn apply_tail(group: &mut Group, live: &mut Live, topic: TopicNo, run: &TailRun, again: bool) -> Outcome {
    let state = live.topics.get_mut(&topic).ok_or(StorageError::Gone)?;
    if again && run.end_batch() <= state.totals.batches {
        return Ok(());
    }
    if run.first_batch != state.totals.batches {
        return Err(out_of_order(topic, run.first_batch, state.totals.batches));
    }
    let mut totals = state.totals;
    totals.rows = run.end_row();
    totals.batches = run.end_batch();
    totals.data_bytes += run.data_bytes;
    totals.widen(run.time);
    group.change(|txn| {
        txn.put(Family::Tail, keys::tail(topic, run.first_batch), run)?;
        write_end(txn, topic, &totals, None)
    })?;
    state.totals = totals;
    Ok(())
}

fn apply_end(group: &mut Group, topic: TopicNo, totals: &TopicTotals, end: End) -> Outcome {
    group.change(|txn| write_end(txn, topic, totals, Some(end)))
}

fn write_end(txn: &mut Txn<'_>, topic: TopicNo, totals: &TopicTotals, end: Option<End>) -> Outcome {
    txn.put(Family::Topics, keys::topic_totals(topic), totals)?;
    if end == Some(End::Lock) {
        let mut record = txn.topic(topic)?.ok_or(StorageError::Gone)?;
        record.completed_at_ns = Some(crate::when::now_ns());
        txn.put(Family::Topics, keys::topic(topic), &record)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::every_type;
    use std::sync::atomic::{AtomicU32, Ordering};
    use storage::catalog::records::TopicRecord;
    use storage::catalog::{Fate, Simulated};
    use storage::chunk::{BatchMark, Format};
    use storage::ids::{SequenceId, SessionId, TopicId};

    fn run_of(first_batch: u64) -> TailRun {
        let rows = every_type(2);
        let marks = vec![BatchMark { rows: 2, hash: 7 }];
        TailRun::pack(&rows, first_batch, 2 * first_batch, marks, 100, None).expect("packed")
    }

    #[test]
    fn of_the_runs_that_share_an_entry_each_has_its_own_outcome() {
        let folder = tempfile::tempdir().expect("a folder");
        let catalog = Catalog::open(folder.path(), false).expect("a catalog");
        let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
        let (committer, thread) = start(catalog.clone(), Duration::ZERO, stats, health).expect("a thread");
        let (first, second) = (TopicNo(1), TopicNo(2));
        let (watermarks, mut marks): (Vec<_>, Vec<_>) = (0..2).map(|_| watch::channel(Watermark::default())).unzip();
        let watermarks: Vec<_> = watermarks.into_iter().map(Arc::new).collect();
        futures::executor::block_on(async {
            let opening = watermarks.clone();
            let opened = committer.change(move |_, live| {
                for (topic, watermark) in [first, second].into_iter().zip(opening) {
                    live.open(topic, watermark, TopicTotals::default(), 0);
                }
                Ok::<_, StorageError>(())
            });
            opened.await.expect("opened");
            // One of a topic that nobody writes, one that leaves a hole (INV-2).
            let runs = vec![(first, run_of(0)), (TopicNo(3), run_of(0)), (second, run_of(1)), (second, run_of(0))];
            let (reply, answer) = oneshot::channel();
            committer.tails(runs, reply).await.expect("queued");
            let outcomes = answer.await.expect("answered");
            let [Ok(()), Err(StorageError::Gone), Err(StorageError::Catalog { .. }), Ok(())] = &outcomes[..] else {
                panic!("{outcomes:?}");
            };
        });
        let told: Vec<_> = marks.iter_mut().map(|mark| mark.borrow().batches).collect();
        assert_eq!(told, [1, 1]);
        let tail = |topic| catalog.tail(topic, 0).expect("a tail").len();
        assert_eq!((tail(first), tail(second), tail(TopicNo(3))), (1, 1, 0));
        drop(committer);
        thread.join().expect("ended");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_crowd_of_changes_the_next_waits_for_others_and_one_alone_waits_for_nobody() {
        let folder = tempfile::tempdir().expect("a folder");
        let catalog = Catalog::open_small(folder.path(), Simulated::default()).expect("a catalog");
        let (committer, lane) = pair();
        let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
        let committing = run(catalog, lane, limits::COMMIT_SPACING_MAX, stats, health);
        let (crowd, spacing) = (limits::COMMIT_CROWD, limits::COMMIT_CROWD_SPACING);
        let changing = async {
            for (changes, waits) in [
                (crowd - 1, Duration::ZERO),
                (1, Duration::ZERO),
                (crowd, Duration::ZERO),
                (1, spacing),
                (1, Duration::ZERO),
            ] {
                let asked = tokio::time::Instant::now();
                let change = |_| committer.change(|_, _| Ok::<_, StorageError>(()));
                futures::future::try_join_all((0..changes).map(change)).await.expect("changed");
                let waited = asked.elapsed();
                assert!((waits..waits + spacing).contains(&waited), "{changes}: {waited:?} instead of {waits:?}");
            }
        };
        tokio::select! {
            () = changing => {}
            () = committing => unreachable!("handles are there"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_a_lost_deletion_refused_is_tried_again_and_closes_the_topic() {
        let no = TopicNo(1);
        let topic = TopicRecord {
            no,
            id: TopicId::random(),
            sequence: SequenceId::random(),
            session: SessionId::random(),
            locator: "drive/imu".to_owned(),
            ontology_tag: "imu".to_owned(),
            format: Format::Default,
            user_metadata: "{}".to_owned(),
            created_at_ns: 0,
            completed_at_ns: None,
        };
        // The first commit makes the topic, the second is lost.
        let commits = AtomicU32::new(0);
        let fate = move || if commits.fetch_add(1, Ordering::Relaxed) == 1 { Fate::Lost } else { Fate::Done };
        let folder = tempfile::tempdir().expect("a folder");
        let simulated = Simulated { fate: Some(Box::new(fate)), ..Simulated::default() };
        let catalog = Catalog::open_small(folder.path(), simulated).expect("a catalog");
        let (committer, lane) = pair();
        let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
        let committing = run(catalog, lane, Duration::ZERO, stats, health);
        let (watermark, _mark) = watch::channel(Watermark::default());
        let uploading = async {
            let open = committer.change(move |txn, live| {
                live.open(no, Arc::new(watermark), TopicTotals::default(), 0);
                txn.put_topic(&topic)
            });
            open.await.expect("opened");
            // In one group: both are queued before the committer runs again.
            let delete = committer.change(move |txn, live| {
                live.close(no);
                txn.delete(Family::Topics, keys::topic(no));
                Ok::<_, StorageError>(())
            });
            let end = async {
                let (reply, answer) = oneshot::channel();
                committer.end(no, End::Leave, reply).await.expect("queued");
                answer.await.expect("answered")
            };
            let (deleted, ended) = tokio::join!(delete, end);
            assert!(deleted.is_err(), "its outcome is unknown");
            assert!(ended.is_ok(), "{ended:?}");
            committer.change(move |_, live| Ok::<_, StorageError>(live.is_open(no))).await.expect("asked")
        };
        tokio::select! {
            is_open = uploading => assert!(!is_open),
            () = committing => unreachable!("handles are there"),
        }
    }
}
