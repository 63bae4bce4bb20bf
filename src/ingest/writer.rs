//! The writer: a pinned thread with its own ring that gathers, encodes and writes the topics it owns.
//!
//! Guarantees: batches of a topic keep their order through gather, file and commit (INV-2); a chunk
//! is offered to the committer only when all of it is on stable media (INV-1); the thread never
//! waits for RocksDB, for a lock held across I/O or for a thread pool (INV-10): the only waits are
//! for its own ring, for space in the committer's lane, and for answers.
//! Does not know: requests, clients, gRPC. It is handed batches and tells watermarks.

use crate::ingest::admit::{Budget, Permit};
use crate::ingest::committer::{ChunkCommit, CommitHandle, End, Watermark};
use crate::ingest::gather::{ChunkRule, OpenChunk, Verdict, Why, floor_bytes, verdict};
use crate::ingest::lane::{Receiver, Sender};
use crate::ingest::steward::StewardHandle;
use crate::limits;
use crate::stats::{Station, Stats};
use arrow::array::RecordBatch;
use futures::FutureExt;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::StorageError;
use storage::catalog::records::TopicRecord;
use storage::chunk::{BatchMark, TopicEncoder};
use storage::disk::{Disk, IoCounters};
use storage::ids::TopicNo;
use storage::schema::TopicSchema;
use storage::tail::TailRun;
use storage::write::{ChunkRows, SegmentWriter, Shared};
use tokio::sync::{Mutex, oneshot, watch};

/// One batch, checked and decoded, with what was found out about it on the way.
pub(crate) struct Batch {
    /// In the stored schema.
    pub(crate) rows: RecordBatch,
    pub(crate) mark: BatchMark,
    pub(crate) data_bytes: u64,
    /// Smallest and largest time; `None` without rows.
    pub(crate) time: Option<(i64, i64)>,
    /// Whether the times never decrease.
    pub(crate) sorted: bool,
    pub(crate) permit: Permit,
    /// What decoding added.
    pub(crate) decode_permit: Option<Permit>,
    pub(crate) arrived: Instant,
    pub(crate) sent: Instant,
}

/// Tells a stream how its upload ended.
type Answer = oneshot::Sender<Result<(), StorageError>>;

/// What a writer is told.
pub(crate) enum Message {
    /// A topic begins.
    Open {
        topic: Box<TopicRecord>,
        schema: Arc<TopicSchema>,
        encoder: Box<TopicEncoder>,
        watermark: Arc<watch::Sender<Watermark>>,
    },
    /// Its next batch.
    Batch { topic: TopicNo, batch: Box<Batch> },
    /// It ends; the answer comes when everything is durable.
    End { topic: TopicNo, end: End, reply: oneshot::Sender<Result<(), StorageError>> },
    /// It was deleted; the answer says that nothing of it is in the ring any more. `written`: it was
    /// open for writing, so that an unknown topic's `Open` is still on its way.
    Forget { topic: TopicNo, written: bool, reply: oneshot::Sender<()> },
    /// Finish what is under way and stop.
    Stop { reply: oneshot::Sender<()> },
}

/// What every writer needs.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) data_dir: PathBuf,
    pub(crate) rule: ChunkRule,
    pub(crate) segment_bytes: u64,
    pub(crate) prealloc: Arc<PreallocBudget>,
    pub(crate) budget: Budget,
    pub(crate) budget_bytes: u64,
    pub(crate) committer: CommitHandle,
    pub(crate) steward: StewardHandle,
    pub(crate) counters: Arc<IoCounters>,
    pub(crate) stats: Arc<Stats>,
}

pub(crate) use storage::write::PreallocBudget;

/// Batches of one topic since its last chunk.
#[derive(Default)]
struct Open {
    /// Joined rows whose batches are in the tail, or on their way there.
    safe: Vec<RecordBatch>,
    /// Rows that are nowhere else.
    fresh: Vec<RecordBatch>,
    marks: Vec<BatchMark>,
    safe_marks: usize,
    safe_bytes: u64,
    permits: Option<Permit>,
    decode_permits: Option<Permit>,
    data_bytes: u64,
    time: Option<(i64, i64)>,
    fresh_time: Option<(i64, i64)>,
    sorted: bool,
    oldest: Option<Instant>,
    oldest_fresh: Option<Instant>,
    /// When the batches that nobody acknowledged yet arrived.
    arrivals: Vec<Instant>,
}

struct Topic<D: Disk> {
    record: TopicRecord,
    schema: Arc<TopicSchema>,
    encoder: TopicEncoder,
    watermark: Arc<watch::Sender<Watermark>>,
    open: RefCell<Open>,
    /// First batch and row of the open chunk.
    next: Cell<(u64, u64)>,
    /// Where the next chunk goes; held while a chunk is encoded.
    place: Mutex<SegmentWriter<D>>,
    /// Segments below this number were handed to the steward.
    sealed_below: Cell<u32>,
    /// Chunks that lie in each segment and are not committed yet.
    pending: RefCell<BTreeMap<u32, usize>>,
    /// Resolves when the entry before has its place in the committer's order.
    turn: RefCell<Option<oneshot::Receiver<()>>>,
    in_flight: Cell<usize>,
    tail_in_flight: Cell<bool>,
    failed: RefCell<Option<StorageError>>,
    ending: RefCell<Option<(End, Answer)>>,
    forgotten: RefCell<Option<oneshot::Sender<()>>>,
}

struct Writer<D: Disk> {
    context: Context,
    disk: D,
    shared: Shared,
    topics: RefCell<HashMap<TopicNo, Rc<Topic<D>>>>,
    /// Topics that were deleted before their `Open` arrived; bounded by the uploads being opened.
    overtaken: RefCell<HashMap<TopicNo, oneshot::Sender<()>>>,
    flushes: Cell<usize>,
    /// Data bytes of the chunks between close and commit.
    flushing_bytes: Cell<u64>,
    /// Woken by every flush that ends.
    progress: tokio::sync::Notify,
}

/// Runs a writer until it is told to stop.
pub(crate) async fn run<D: Disk>(disk: D, lane: Receiver<Message>, context: Context) {
    let shared = Shared {
        data_dir: context.data_dir.clone(),
        segment_bytes: context.segment_bytes,
        prealloc: Arc::clone(&context.prealloc),
        counters: Arc::clone(&context.counters),
        encode_slice: limits::ENCODE_SLICE,
    };
    let writer = Rc::new(Writer {
        context,
        disk,
        shared,
        topics: RefCell::default(),
        overtaken: RefCell::default(),
        flushes: Cell::new(0),
        flushing_bytes: Cell::new(0),
        progress: tokio::sync::Notify::new(),
    });
    let mut stopping: Option<oneshot::Sender<()>> = None;
    loop {
        let mut taken = 0;
        let mut more = false;
        while !more && let Some(message) = lane.try_recv() {
            taken += 1;
            more = taken == limits::GATHER_SLICE;
            match message {
                Message::Stop { reply } => stopping = Some(reply),
                // A full chunk is decided over at once: it must not grow by the rest of the slice.
                other => more |= writer.take(other),
            }
        }
        let wait = writer.decide();
        writer.retire();
        if let Some(reply) = stopping.take_if(|_| writer.topics.borrow().is_empty()) {
            reply.send(()).ok(); // Whoever waited for the stop has given up; stop all the same.
            return;
        }
        if more {
            // More may be there: let the kernel have the submissions and the flushes a turn.
            writer.disk.breathe().await;
            continue;
        }
        // Cancel-safety: all three only wait; nothing is taken by them.
        tokio::select! {
            more = lane.ready() => if !more && stopping.is_none() { return },
            () = writer.progress.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// How often open chunks are looked at while there are any: memory may become short meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// The wait of a writer that has nothing open.
const IDLE_WAIT: Duration = Duration::from_secs(3600);

impl<D: Disk> Writer<D> {
    /// Acts on a message; says whether a chunk is full and may go.
    fn take(self: &Rc<Self>, message: Message) -> bool {
        match message {
            Message::Open { topic, schema, encoder, watermark } => self.open(*topic, schema, *encoder, watermark),
            Message::Batch { topic, batch } => {
                let topic = self.topics.borrow().get(&topic).cloned();
                if let Some(topic) = topic {
                    self.context.stats.record(Station::Lane, batch.sent.elapsed());
                    if topic.failed.borrow().is_none() {
                        topic.gather(*batch);
                        return self.context.rule.chunk_bytes <= topic.open.borrow().data_bytes
                            && self.flushes.get() < limits::FLUSHES_IN_FLIGHT_MAX;
                    }
                }
            }
            Message::End { topic, end, reply } => {
                let topic = self.topics.borrow().get(&topic).cloned();
                match topic {
                    Some(topic) => self.end(&topic, end, reply),
                    None => {
                        reply.send(Err(StorageError::Gone)).ok(); // The stream that asked has gone.
                    }
                }
            }
            Message::Forget { topic: no, written, reply } => {
                let topic = self.topics.borrow().get(&no).cloned();
                match topic {
                    Some(topic) => {
                        topic.fail(StorageError::Gone);
                        topic.forgotten.replace(Some(reply));
                    }
                    // Its `Open` was sent after the change that opened it, and is overtaken.
                    None if written => {
                        self.overtaken.borrow_mut().insert(no, reply);
                    }
                    None => {
                        reply.send(()).ok(); // Nothing of it was here; who asked may have gone.
                    }
                }
            }
            Message::Stop { .. } => unreachable!("handled by the loop"),
        }
        false
    }

    fn open(
        &self,
        record: TopicRecord,
        schema: Arc<TopicSchema>,
        encoder: TopicEncoder,
        watermark: Arc<watch::Sender<Watermark>>,
    ) {
        if let Some(reply) = self.overtaken.borrow_mut().remove(&record.no) {
            watermark.send_modify(|mark| mark.failed = Some(StorageError::Gone));
            reply.send(()).ok(); // The deletion goes on at the next start if nobody waits.
            return;
        }
        let place = SegmentWriter::new(&self.shared, &record);
        let topic = Topic {
            schema,
            encoder,
            watermark,
            open: RefCell::new(Open { sorted: true, ..Open::default() }),
            next: Cell::new((0, 0)),
            place: Mutex::new(place),
            sealed_below: Cell::new(0),
            pending: RefCell::default(),
            turn: RefCell::new(None),
            in_flight: Cell::new(0),
            tail_in_flight: Cell::new(false),
            failed: RefCell::new(None),
            ending: RefCell::new(None),
            forgotten: RefCell::new(None),
            record,
        };
        self.topics.borrow_mut().insert(topic.record.no, Rc::new(topic));
    }

    /// Looks at every open chunk; returns how long nothing will be due.
    fn decide(self: &Rc<Self>) -> Duration {
        let topics: Vec<Rc<Topic<D>>> = self.topics.borrow().values().cloned().collect();
        let giving_way = self.giving_way(&topics);
        let mut wait = IDLE_WAIT;
        for topic in topics {
            if topic.open.borrow().marks.is_empty() || topic.failed.borrow().is_some() {
                continue;
            }
            wait = wait.min(LOOK_INTERVAL);
            let seen = topic.look(giving_way.contains(&topic.record.no));
            match verdict(&self.context.rule, topic.record.format, &seen) {
                Verdict::Close(why) => {
                    // A full house: the chunk waits for a flush to end, which wakes this loop.
                    if self.flushes.get() < limits::FLUSHES_IN_FLIGHT_MAX || why == Why::Age {
                        self.flush(&topic, None);
                    }
                }
                // Behind a chunk that is being written the tail would have to wait for it anyway.
                Verdict::Tail if topic.in_flight.get() == 0 && !topic.tail_in_flight.get() => self.tail(&topic),
                Verdict::Tail => {}
                Verdict::Wait(time) => wait = wait.min(time),
            }
        }
        wait
    }

    /// The largest open chunks, to be closed because memory is short: as many as make, with what is
    /// being written already, a quarter of the budget. More would only make smaller row groups.
    fn giving_way(&self, topics: &[Rc<Topic<D>>]) -> Vec<TopicNo> {
        if !self.context.budget.is_short() {
            return Vec::new();
        }
        let mut open: Vec<(u64, TopicNo)> =
            topics.iter().map(|topic| (topic.open.borrow().data_bytes, topic.record.no)).collect();
        open.sort_unstable_by(|a, b| b.cmp(a));
        let places = limits::FLUSHES_IN_FLIGHT_MAX.saturating_sub(self.flushes.get());
        let mut freeing = self.flushing_bytes.get();
        let enough = self.context.budget_bytes / 4;
        let mut chosen = Vec::new();
        for (bytes, topic) in open.into_iter().take(places).take_while(|(bytes, _)| *bytes > 0) {
            if freeing >= enough {
                break;
            }
            freeing += bytes;
            chosen.push(topic);
        }
        chosen
    }

    /// Lets go of topics that ended and have nothing under way.
    fn retire(&self) {
        let quiet = |topic: &Topic<D>| topic.in_flight.get() == 0 && !topic.tail_in_flight.get();
        let forgotten: Vec<Rc<Topic<D>>> = self
            .topics
            .borrow()
            .values()
            .filter(|topic| quiet(topic) && topic.forgotten.borrow().is_some())
            .cloned()
            .collect();
        for topic in forgotten {
            self.topics.borrow_mut().remove(&topic.record.no);
            if let Some((_, reply)) = topic.ending.take() {
                reply.send(Err(StorageError::Gone)).ok(); // Its stream may have gone.
            }
            if let Some(reply) = topic.forgotten.take() {
                reply.send(()).ok(); // The deletion goes on at the next start if nobody waits.
            }
        }
    }

    fn end(self: &Rc<Self>, topic: &Rc<Topic<D>>, end: End, reply: oneshot::Sender<Result<(), StorageError>>) {
        topic.ending.replace(Some((end, reply)));
        let failed = topic.failed.borrow().is_some();
        let (empty, enough) = {
            let open = topic.open.borrow();
            (open.marks.is_empty(), floor_bytes(topic.record.format) <= open.data_bytes)
        };
        // A topic that stays unlocked keeps its small rest in the tail: its chunk may still grow.
        let end = if failed { End::Leave } else { end };
        if !failed && !empty && (end == End::Lock || enough) {
            self.flush(topic, Some(end));
            return;
        }
        if !failed && !topic.open.borrow().fresh.is_empty() {
            self.tail(topic);
        }
        let writer = Rc::clone(self);
        let topic = Rc::clone(topic);
        let turn = Turn::take(&topic);
        topic.in_flight.set(topic.in_flight.get() + 1);
        tokio::task::spawn_local(async move {
            let result = writer.commit_end(&topic, end, turn).await;
            topic.in_flight.set(topic.in_flight.get() - 1);
            writer.finish(&topic, result).await;
        });
    }

    async fn commit_end(&self, topic: &Topic<D>, end: End, turn: Turn) -> Result<(), StorageError> {
        let (reply, answer) = oneshot::channel();
        turn.wait().await;
        // What went before may have failed meanwhile: a truncated topic is never locked (INV-12).
        let end = if topic.failed.borrow().is_some() { End::Leave } else { end };
        let queued = self.context.committer.end(topic.record.no, end, reply).await;
        turn.done();
        queued?;
        answer.await.map_err(|_| StorageError::Gone)?
    }

    /// The upload is over, as the committer has it: its segments are sealed in the background, its
    /// stream is answered with the first cause of a failure, if there was one.
    async fn finish(&self, topic: &Rc<Topic<D>>, committed: Result<(), StorageError>) {
        let deleted = matches!(committed, Err(StorageError::Gone));
        let cause = topic.failed.borrow().clone();
        let ending = topic.ending.take();
        if !deleted {
            let mut topics = self.topics.borrow_mut();
            // The client may have opened the topic again already: that entry is another upload's.
            if topics.get(&topic.record.no).is_some_and(|known| Rc::ptr_eq(known, topic)) {
                topics.remove(&topic.record.no);
            }
        }
        if !deleted {
            // A locked topic has a file even without rows; one that may be written again gets none.
            let locked =
                committed.is_ok() && cause.is_none() && ending.as_ref().is_some_and(|(end, _)| *end == End::Lock);
            self.context.steward.seal(topic.record.clone(), if locked { None } else { Some(u32::MAX) }).await;
        }
        // A deleted topic stays known until the deletion's `Forget` has come: it must not look like
        // one whose `Open` is still to come.
        if let Some((_, reply)) = ending {
            reply.send(cause.map_or(committed, Err)).ok(); // A stream that was cut does not wait.
        }
        self.progress.notify_one();
    }

    /// Puts the fresh batches into the tail.
    fn tail(self: &Rc<Self>, topic: &Rc<Topic<D>>) {
        let packed = topic.pack_tail();
        let (run, arrivals) = match packed {
            Ok(Some(packed)) => packed,
            Ok(None) => return,
            Err(error) => {
                topic.fail(error);
                return;
            }
        };
        topic.tail_in_flight.set(true);
        let turn = Turn::take(topic);
        let (writer, topic) = (Rc::clone(self), Rc::clone(topic));
        tokio::task::spawn_local(async move {
            let result = writer.commit_tail(&topic, run, turn).await;
            topic.tail_in_flight.set(false);
            match result {
                Ok(()) => writer.acknowledged(&arrivals),
                Err(error) => topic.fail(error),
            }
            writer.progress.notify_one();
        });
    }

    async fn commit_tail(&self, topic: &Topic<D>, run: TailRun, turn: Turn) -> Result<(), StorageError> {
        let (rows, batches, bytes) = (run.end_row() - run.first_row, run.marks.len() as u64, run.data_bytes);
        let (reply, answer) = oneshot::channel();
        turn.wait().await;
        if let Some(cause) = topic.failed.borrow().clone() {
            return Err(cause);
        }
        let queued = self.context.committer.tail(topic.record.no, run, reply).await;
        turn.done();
        queued?;
        answer.await.map_err(|_| StorageError::Gone)??;
        self.count(rows, batches, bytes);
        Ok(())
    }

    /// Closes the open chunk and starts it on its way.
    fn flush(self: &Rc<Self>, topic: &Rc<Topic<D>>, end: Option<End>) {
        let open = topic.open.replace(Open { sorted: true, ..Open::default() });
        let (first_batch, first_row) = topic.next.get();
        let rows: u64 = open.marks.iter().map(|mark| u64::from(mark.rows)).sum();
        let end_batch = first_batch + open.marks.len() as u64;
        topic.next.set((end_batch, first_row + rows));
        topic.in_flight.set(topic.in_flight.get() + 1);
        self.flushes.set(self.flushes.get() + 1);
        let flushing = open.data_bytes;
        self.flushing_bytes.set(self.flushing_bytes.get() + flushing);
        let turn = Turn::take(topic);
        let (writer, topic) = (Rc::clone(self), Rc::clone(topic));
        tokio::task::spawn_local(async move {
            let Open {
                mut safe,
                fresh,
                marks,
                safe_marks,
                safe_bytes,
                permits,
                decode_permits,
                data_bytes,
                time,
                sorted,
                arrivals,
                ..
            } = open;
            let newly = (rows_of(&marks, safe_marks), (marks.len() - safe_marks) as u64, data_bytes - safe_bytes);
            safe.extend(fresh);
            let chunk =
                ChunkRows { batches: safe, marks, first_batch, first_row, data_bytes, time, time_sorted: sorted };
            // Rows that make the encoder panic end their own stream, nothing else.
            let written = AssertUnwindSafe(writer.write_and_commit(&topic, &chunk, end, turn)).catch_unwind().await;
            let result = written.unwrap_or_else(|_| {
                Err(StorageError::Format { op: "encode", text: "the rows made the encoder panic".to_owned() })
            });
            // The rows are durable, or their stream ends: their memory goes back now.
            drop((chunk, permits, decode_permits));
            topic.in_flight.set(topic.in_flight.get() - 1);
            writer.flushes.set(writer.flushes.get() - 1);
            writer.flushing_bytes.set(writer.flushing_bytes.get() - flushing);
            match &result {
                Ok(()) => {
                    writer.count(newly.0, newly.1, newly.2);
                    writer.acknowledged(&arrivals);
                }
                Err(error) => topic.fail(error.clone()),
            }
            match end {
                Some(_) if result.is_ok() => writer.finish(&topic, result).await,
                // The chunk with the end in it failed: the topic ends without being locked.
                Some(_) => {
                    let turn = Turn::take(&topic);
                    let committed = writer.commit_end(&topic, End::Leave, turn).await;
                    writer.finish(&topic, committed).await;
                }
                None => {}
            }
            writer.progress.notify_one();
        });
    }

    async fn write_and_commit(
        &self,
        topic: &Topic<D>,
        chunk: &ChunkRows,
        end: Option<End>,
        turn: Turn,
    ) -> Result<(), StorageError> {
        let result = self.write_in_turn(topic, chunk, end, &turn).await;
        // Also on failure: the entries behind this one must get their turn and see the failure.
        turn.done();
        let (answer, segment) = result?;
        let committed = answer.await.map_err(|_| StorageError::Gone).and_then(|committed| committed);
        topic.leave_segment(segment);
        committed?;
        self.seal_below(topic, segment).await;
        Ok(())
    }

    /// Writes the chunk, in a new segment if its first one fails, and queues its commit in order.
    async fn write_in_turn(
        &self,
        topic: &Topic<D>,
        chunk: &ChunkRows,
        end: Option<End>,
        turn: &Turn,
    ) -> Result<(oneshot::Receiver<Result<(), StorageError>>, u32), StorageError> {
        let mut attempt = 1;
        loop {
            let encoding = Instant::now();
            let mut placed = None;
            let pending = {
                let mut place = topic.place.lock().await;
                place.write(&self.disk, &self.shared, &topic.schema, &topic.encoder, topic.record.no, chunk).await
            };
            let written = match pending {
                Ok(pending) => {
                    topic.enter_segment(pending.segment());
                    placed = Some(pending.segment());
                    self.context.stats.record(Station::Encode, encoding.elapsed());
                    let writing = Instant::now();
                    let written = pending.durable(&self.disk).await;
                    self.context.stats.record(Station::Write, writing.elapsed());
                    written
                }
                Err(error) => Err(error),
            };
            turn.wait().await;
            // What went before failed for good: a later chunk must not stand behind a hole (INV-2).
            if let Some(cause) = topic.failed.borrow().clone() {
                return Err(cause);
            }
            let written = written.and_then(storage::write::Written::unless_poisoned);
            match written {
                Ok(written) => {
                    let (reply, answer) = oneshot::channel();
                    let segment = written.segment;
                    let commit = ChunkCommit {
                        topic: topic.record.no,
                        record: written.record,
                        skip: written.skip,
                        segment,
                        end,
                        reply,
                    };
                    self.context.committer.chunk(commit).await?;
                    return Ok((answer, segment.no));
                }
                Err(error) if attempt < limits::CHUNK_ATTEMPTS_MAX && !error.is_full_disk() => {
                    tracing::warn!(topic = %topic.record.locator, %error, attempt, "chunk not written; trying in a new segment");
                    if let Some(segment) = placed {
                        topic.leave_segment(segment);
                    }
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A chunk in this segment is durable. Lower segments are complete, except those where a chunk
    /// still lies that is committed later (another one before it was written again, further on).
    async fn seal_below(&self, topic: &Topic<D>, segment: u32) {
        let oldest = topic.pending.borrow().keys().next().copied();
        let below = oldest.map_or(segment, |oldest| oldest.min(segment));
        if topic.sealed_below.get() < below {
            topic.sealed_below.set(below);
            self.context.steward.seal(topic.record.clone(), Some(below)).await;
        }
    }

    fn count(&self, rows: u64, batches: u64, bytes: u64) {
        Stats::add(&self.context.stats.rows, rows);
        Stats::add(&self.context.stats.batches, batches);
        Stats::add(&self.context.stats.bytes, bytes);
    }

    fn acknowledged(&self, arrivals: &[Instant]) {
        for arrived in arrivals {
            self.context.stats.record(Station::Ack, arrived.elapsed());
        }
    }
}

fn rows_of(marks: &[BatchMark], skip: usize) -> u64 {
    marks.iter().skip(skip).map(|mark| u64::from(mark.rows)).sum()
}

/// A place in a topic's order: entries reach the committer in the order their turns were taken.
struct Turn {
    before: RefCell<Option<oneshot::Receiver<()>>>,
    after: RefCell<Option<oneshot::Sender<()>>>,
}

impl Turn {
    fn take<D: Disk>(topic: &Topic<D>) -> Self {
        let (after, next) = oneshot::channel();
        Self { before: RefCell::new(topic.turn.replace(Some(next))), after: RefCell::new(Some(after)) }
    }

    async fn wait(&self) {
        let before = self.before.take();
        if let Some(before) = before {
            before.await.ok(); // An entry that was dropped has had its turn.
        }
    }

    fn done(&self) {
        self.after.take();
    }
}

impl<D: Disk> Topic<D> {
    fn enter_segment(&self, segment: u32) {
        *self.pending.borrow_mut().entry(segment).or_default() += 1;
    }

    fn leave_segment(&self, segment: u32) {
        let mut pending = self.pending.borrow_mut();
        if let Some(count) = pending.get_mut(&segment) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&segment);
            }
        }
    }

    fn gather(&self, batch: Batch) {
        let mut open = self.open.borrow_mut();
        let open = &mut *open;
        if let (Some((first, last)), Some((_, before))) = (batch.time, open.time) {
            open.sorted &= before <= first;
            open.time = open.time.map(|(a, b)| (a.min(first), b.max(last)));
        } else {
            open.time = open.time.or(batch.time);
        }
        open.sorted &= batch.sorted;
        open.fresh_time = match (open.fresh_time, batch.time) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (one, other) => one.or(other),
        };
        open.oldest.get_or_insert(batch.arrived);
        open.oldest_fresh.get_or_insert(batch.arrived);
        open.arrivals.push(batch.arrived);
        open.marks.push(batch.mark);
        open.data_bytes += batch.data_bytes;
        join(&mut open.permits, Some(batch.permit));
        join(&mut open.decode_permits, batch.decode_permit);
        if batch.rows.num_rows() > 0 {
            open.fresh.push(batch.rows);
        }
        if open.fresh.len() >= limits::COALESCE_PIECES {
            coalesce(&self.schema, &mut open.fresh);
            open.shrink_permits();
        }
    }

    fn look(&self, gives_way: bool) -> OpenChunk {
        let open = self.open.borrow();
        OpenChunk {
            data_bytes: open.data_bytes,
            oldest: open.oldest.map_or(Duration::ZERO, |at| at.elapsed()),
            oldest_unsafe: open.oldest_fresh.map(|at| at.elapsed()),
            gives_way,
        }
    }

    /// Takes the fresh batches as one run for the tail.
    fn pack_tail(&self) -> Result<Option<(TailRun, Vec<Instant>)>, StorageError> {
        let mut open = self.open.borrow_mut();
        let open = &mut *open;
        let marks: Vec<BatchMark> = open.marks.iter().skip(open.safe_marks).copied().collect();
        if marks.is_empty() {
            return Ok(None);
        }
        let (chunk_batch, chunk_row) = self.next.get();
        let first_batch = chunk_batch + open.safe_marks as u64;
        let first_row = chunk_row + rows_of(&open.marks, 0) - rows_of(&marks, 0);
        let fresh = std::mem::take(&mut open.fresh);
        let rows = arrow::compute::concat_batches(&self.schema.stored, &fresh)?;
        drop(fresh);
        let run = TailRun::pack(
            &rows,
            first_batch,
            first_row,
            marks,
            open.data_bytes - open.safe_bytes,
            open.fresh_time.take(),
        )?;
        if rows.num_rows() > 0 {
            open.safe.push(rows);
        }
        open.safe_marks = open.marks.len();
        open.safe_bytes = open.data_bytes;
        open.oldest_fresh = None;
        if open.safe.len() >= limits::COALESCE_PIECES {
            coalesce(&self.schema, &mut open.safe);
        }
        open.shrink_permits();
        Ok(Some((run, std::mem::take(&mut open.arrivals))))
    }

    /// Ends the upload with a cause; the first one is kept and told.
    fn fail(&self, error: StorageError) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none() {
            self.watermark.send_modify(|mark| mark.failed = Some(error.clone()));
            *failed = Some(error);
        }
        drop(failed);
        self.open.replace(Open { sorted: true, ..Open::default() });
    }
}

fn join(into: &mut Option<Permit>, permit: Option<Permit>) {
    match (into.as_mut(), permit) {
        (Some(all), Some(one)) => all.absorb(one),
        (None, one) => *into = one,
        (Some(_), None) => {}
    }
}

impl Open {
    /// Permits follow the memory: joined rows weigh a fraction of the single ones.
    fn shrink_permits(&mut self) {
        let held: usize = self.safe.iter().chain(&self.fresh).map(RecordBatch::get_array_memory_size).sum();
        let mut held = held as u64 + size_of::<BatchMark>() as u64 * self.marks.len() as u64;
        for permits in [&mut self.permits, &mut self.decode_permits].into_iter().flatten() {
            permits.shrink_to(held);
            held = held.saturating_sub(permits.bytes());
        }
    }
}

/// Joins runs of small pieces, keeping their order; large ones stay as they are.
fn coalesce(schema: &TopicSchema, pieces: &mut Vec<RecordBatch>) {
    let is_small = |piece: &RecordBatch| piece.get_array_memory_size() <= limits::COALESCE_PIECE_BYTES;
    let mut joined: Vec<RecordBatch> = Vec::new();
    for group in pieces.chunk_by(|a, b| is_small(a) && is_small(b)) {
        match arrow::compute::concat_batches(&schema.stored, group) {
            Ok(one) if group.len() > 1 => joined.push(one),
            _ => joined.extend_from_slice(group),
        }
    }
    *pieces = joined;
}

/// The way to a writer, by topic.
#[derive(Clone)]
pub(crate) struct WriterHandles {
    lanes: Arc<[Sender<Message>]>,
}

impl WriterHandles {
    pub(crate) fn new(lanes: Vec<Sender<Message>>) -> Self {
        Self { lanes: lanes.into() }
    }

    /// The writer that owns a topic; it never changes.
    pub(crate) fn of(&self, topic: TopicNo) -> &Sender<Message> {
        let index = usize::try_from(topic.0 % self.lanes.len() as u64).unwrap_or(0);
        &self.lanes[index]
    }

    /// Asks every writer to finish what it has and stop.
    pub(crate) async fn stop(&self) {
        for lane in self.lanes.iter() {
            let (reply, stopped) = oneshot::channel();
            if lane.send(Message::Stop { reply }).await.is_ok() {
                stopped.await.ok(); // A writer that is gone has stopped.
            }
        }
    }
}
