//! Station 7: one thread that makes changes durable, grouped over all topics and writers.
//!
//! Guarantees: it is the only writer of the catalog. What arrives while a group is being synced
//! forms the next group. Nothing of a group is acknowledged before the group is durable (INV-1).
//! An entry for a topic that is not open for writing is dropped and its writer told. After a
//! failed commit, whose outcome is unknown, nothing is acknowledged any more: every later entry
//! gets the first cause.

use crate::ingest::lane::{Receiver, Sender, lane};
use crate::limits;
use crate::stats::{Station, Stats};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{SegmentRecord, TopicTotals};
use storage::catalog::{Catalog, Group, Look, Txn};
use storage::chunk::ChunkRecord;
use storage::chunk::record::SkipRecord;
use storage::ids::TopicNo;
use storage::tail::TailRun;
use tokio::sync::{oneshot, watch};

type Outcome = Result<(), StorageError>;

/// What is durable of an upload; also the place where its failure is told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watermark {
    pub(crate) rows: u64,
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
    pub(crate) failed: Option<StorageError>,
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
}

/// The topics that are being written, as the committer knows them.
#[derive(Debug, Default)]
pub(crate) struct Live {
    topics: HashMap<TopicNo, LiveTopic>,
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
        }
        free
    }

    /// Whether a topic is being written.
    pub(crate) fn is_open(&self, topic: TopicNo) -> bool {
        self.topics.contains_key(&topic)
    }

    /// Closes a topic: entries still under way for it are refused. Says whether it was being written.
    pub(crate) fn close(&mut self, topic: TopicNo) -> bool {
        self.topics.remove(&topic).is_some()
    }
}

/// Runs when the group is durable, or is not.
type Acknowledge = Box<dyn FnOnce(&Outcome) + Send>;
type Change = Box<dyn FnOnce(&mut Group, &mut Live) -> Acknowledge + Send>;

enum Item {
    Chunk(Box<ChunkCommit>),
    Tail { topic: TopicNo, run: Box<TailRun>, reply: oneshot::Sender<Outcome> },
    End { topic: TopicNo, end: End, reply: oneshot::Sender<Outcome> },
    Change(Change),
}

/// Entry with the time it was queued.
pub(crate) struct Entry {
    item: Item,
    queued: Instant,
}

/// The way to the committer.
#[derive(Clone)]
pub(crate) struct CommitHandle {
    lane: Sender<Entry>,
}

impl CommitHandle {
    async fn send(&self, item: Item) -> Outcome {
        self.lane.send(Entry { item, queued: Instant::now() }).await.map_err(|_| stopped())
    }

    /// Queues a chunk; the reply comes when it is durable. Returns when it has its place in the order.
    pub(crate) async fn chunk(&self, commit: ChunkCommit) -> Outcome {
        self.send(Item::Chunk(Box::new(commit))).await
    }

    /// Queues a tail run, like [`Self::chunk`].
    pub(crate) async fn tail(&self, topic: TopicNo, run: TailRun, reply: oneshot::Sender<Outcome>) -> Outcome {
        self.send(Item::Tail { topic, run: Box::new(run), reply }).await
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
        let boxed: Change = Box::new(move |group, live| {
            let result = group.change(|txn| change(txn, live));
            Box::new(move |outcome| {
                let result = match outcome {
                    Ok(()) => result,
                    Err(error) => Err(E::from(error.clone())),
                };
                reply.send(result).ok(); // The asker may have gone; the change stands.
            })
        });
        self.send(Item::Change(boxed)).await.map_err(E::from)?;
        answer.await.map_err(|_| E::from(stopped()))?
    }
}

fn stopped() -> StorageError {
    StorageError::Catalog { op: "commit", text: "the committer has stopped".to_owned() }
}

/// Starts the committer thread. It ends when all handles are gone.
pub(crate) fn start(
    catalog: Catalog,
    stats: Arc<Stats>,
) -> std::io::Result<(CommitHandle, std::thread::JoinHandle<()>)> {
    let (handle, receiver) = pair();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let thread = std::thread::Builder::new()
        .name("fb-committer".to_owned())
        .spawn(move || runtime.block_on(run(catalog, receiver, stats)))?;
    Ok((handle, thread))
}

/// A handle, and the end that [`run`] takes.
pub(crate) fn pair() -> (CommitHandle, Receiver<Entry>) {
    let (sender, receiver) = lane(limits::COMMIT_LANE_DEPTH);
    (CommitHandle { lane: sender }, receiver)
}

/// Commits what comes until all handles are gone.
pub(crate) async fn run(catalog: Catalog, lane: Receiver<Entry>, stats: Arc<Stats>) {
    let mut live = Live::default();
    let mut failed: Option<StorageError> = None;
    while lane.ready().await {
        let mut group = catalog.group();
        let mut after: Vec<(Instant, Acknowledge)> = Vec::new();
        while group.size_bytes() < limits::COMMIT_GROUP_BYTES_MAX
            && let Some(entry) = lane.try_recv()
        {
            after.push((entry.queued, apply(&mut group, &mut live, entry.item, &stats)));
        }
        let outcome = match &failed {
            Some(cause) => Err(cause.clone()),
            None => group.commit(),
        };
        if let Err(error) = &outcome
            && failed.is_none()
        {
            tracing::error!(%error, "the catalog refuses commits: nothing more is acknowledged until a restart");
            failed = Some(error.clone());
        }
        Stats::add(&stats.groups, 1);
        for (queued, acknowledge) in after {
            stats.record(Station::Commit, queued.elapsed());
            acknowledge(&outcome);
        }
    }
}

/// Puts one entry into the group; what is returned runs when the group is durable, or is not.
fn apply(group: &mut Group, live: &mut Live, item: Item, stats: &Arc<Stats>) -> Acknowledge {
    match item {
        Item::Change(change) => change(group, live),
        Item::Chunk(commit) => {
            let ChunkCommit { topic, record, skip, segment, end, reply } = *commit;
            let result = apply_chunk(group, live, topic, &record, &skip, segment, end);
            Stats::add(&stats.chunks, 1);
            acknowledge(live, topic, result, end, reply)
        }
        Item::Tail { topic, run, reply } => {
            let result = apply_tail(group, live, topic, &run);
            Stats::add(&stats.tail_runs, 1);
            acknowledge(live, topic, result, None, reply)
        }
        Item::End { topic, end, reply } => {
            let result = match live.topics.get(&topic) {
                Some(state) => apply_end(group, topic, &state.totals, end),
                None => Err(StorageError::Gone),
            };
            acknowledge(live, topic, result, Some(end), reply)
        }
    }
}

fn acknowledge(
    live: &mut Live,
    topic: TopicNo,
    result: Outcome,
    end: Option<End>,
    reply: oneshot::Sender<Outcome>,
) -> Acknowledge {
    let watermark = match (&result, live.topics.get(&topic)) {
        (Ok(()), Some(state)) => Some((Arc::clone(&state.watermark), state.totals)),
        _ => None,
    };
    if end.is_some() && result.is_ok() {
        live.close(topic);
    }
    Box::new(move |outcome| {
        let result = result.and_then(|()| outcome.clone());
        if let (Ok(()), Some((watermark, totals))) = (&result, watermark) {
            watermark.send_modify(|mark| {
                mark.rows = totals.rows;
                mark.batches = totals.batches;
                mark.bytes = totals.data_bytes;
            });
        }
        reply.send(result).ok(); // A writer that stopped needs no answer; the commit stands.
    })
}

fn apply_chunk(
    group: &mut Group,
    live: &mut Live,
    topic: TopicNo,
    record: &ChunkRecord,
    skip: &SkipRecord,
    segment: SegmentRecord,
    end: Option<End>,
) -> Outcome {
    let state = live.topics.get_mut(&topic).ok_or(StorageError::Gone)?;
    if record.first_batch != state.totals.chunk_batches {
        return Err(out_of_order(topic, record.first_batch, state.totals.chunk_batches));
    }
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
        txn.put_chunk(topic, record, skip)?;
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

fn apply_tail(group: &mut Group, live: &mut Live, topic: TopicNo, run: &TailRun) -> Outcome {
    let state = live.topics.get_mut(&topic).ok_or(StorageError::Gone)?;
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
