//! The writer: a pinned thread with its own ring that gathers, encodes and writes the topics it owns.
//!
//! Guarantees: batches of a topic keep their order through gather, file and commit (INV-2); a chunk
//! is offered to the committer only when all of it is on stable media (INV-1); the thread never
//! waits for RocksDB, for a lock held across I/O or for a thread pool (INV-10): the only waits are
//! for its own ring, for space in the committer's lane, and for answers.
//! Does not know: requests, clients, gRPC. It is handed batches and tells watermarks.

mod looks;

use crate::health::Health;
use crate::ingest::admit::Budget;
use crate::ingest::committer::{ChunkCommit, CommitHandle, End};
use crate::ingest::gather::{CROWD_FLOOR_BYTES, ChunkRule, FlushTime, TailRate, floor_bytes};
use crate::ingest::lane::{Receiver, Sender};
use crate::ingest::steward::StewardHandle;
use crate::ingest::topic::{Batch, Open, Start, Topic, Turn, rows_of};
use crate::ingest::writer::looks::Looks;
use crate::limits;
use crate::stats::{Station, Stats};
use futures::FutureExt;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use storage::StorageError;
use storage::chunk::TopicEncoder;
use storage::disk::{Disk, IoCounters};
use storage::ids::TopicNo;
use storage::schema::TopicSchema;
use storage::segment::TopicFacts;
use storage::tail::TailRun;
use storage::volumes::Volumes;
use storage::write::{ChunkRows, SegmentWriter, Shared};
use tokio::sync::{oneshot, watch};

/// What a writer is told.
pub(crate) enum Message {
    /// A topic begins.
    Open {
        facts: Arc<TopicFacts>,
        schema: Arc<TopicSchema>,
        encoder: Box<TopicEncoder>,
        /// Told when the upload fails.
        fails: watch::Sender<Option<StorageError>>,
        start: Box<Start>,
    },
    /// Its next batch.
    Batch { topic: TopicNo, batch: Box<Batch> },
    /// It ends; the answer comes when everything is durable.
    End { topic: TopicNo, end: End, reply: oneshot::Sender<Result<(), StorageError>> },
    /// It was deleted; the answer says that nothing of it is in the ring any more. `written`: it was
    /// open for writing, so that an unknown topic's `Open` is still on its way.
    Forget { topic: TopicNo, written: bool, reply: oneshot::Sender<()> },
    /// The topic was deleted before it could be opened: no `Open` will come.
    Abandon { topic: TopicNo },
    /// Finish what is under way and stop.
    Stop { reply: oneshot::Sender<()> },
}

/// What every writer needs.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) rule: ChunkRule,
    pub(crate) segment_bytes: u64,
    pub(crate) index: bool,
    pub(crate) prealloc: Arc<PreallocBudget>,
    pub(crate) budget: Budget,
    pub(crate) budget_bytes: u64,
    /// Writers in all.
    pub(crate) writers: usize,
    pub(crate) committer: CommitHandle,
    pub(crate) steward: StewardHandle,
    pub(crate) counters: Arc<IoCounters>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) health: Arc<Health>,
}

pub(crate) use storage::write::PreallocBudget;

/// A run on its way into the tail.
struct Packed<D: Disk> {
    topic: Rc<Topic<D>>,
    run: TailRun,
    /// When its batches arrived.
    arrivals: Vec<Instant>,
    turn: Turn,
}

struct Writer<D: Disk> {
    context: Context,
    disk: D,
    shared: Shared,
    topics: RefCell<HashMap<TopicNo, Rc<Topic<D>>>>,
    /// Topics that were deleted before their `Open` arrived; bounded by the uploads being opened.
    overtaken: RefCell<HashMap<TopicNo, oneshot::Sender<()>>>,
    /// Topics that were deleted while being opened, whose `Forget` is still to come.
    abandoned: RefCell<HashSet<TopicNo>>,
    flushes: Cell<usize>,
    /// Data bytes of the chunks between close and commit.
    flushing_bytes: Cell<u64>,
    flush_time: Cell<FlushTime>,
    looks: Looks<D>,
    /// Deleted topics that are not let go yet: something of them may be under way.
    forgotten: RefCell<Vec<Rc<Topic<D>>>>,
    /// Woken by every flush that ends.
    progress: tokio::sync::Notify,
}

/// Runs a writer until it is told to stop.
pub(crate) async fn run<D: Disk>(disk: D, lane: Receiver<Message>, context: Context) {
    let shared = Shared {
        volumes: Arc::clone(&context.volumes),
        segment_bytes: context.segment_bytes,
        index: context.index,
        prealloc: Arc::clone(&context.prealloc),
        counters: Arc::clone(&context.counters),
        encode_slice: limits::ENCODE_SLICE,
    };
    let tail_rate = TailRate::shared_by(context.writers);
    let writer = Rc::new(Writer {
        context,
        disk,
        shared,
        topics: RefCell::default(),
        overtaken: RefCell::default(),
        abandoned: RefCell::default(),
        flushes: Cell::new(0),
        flushing_bytes: Cell::new(0),
        flush_time: Cell::default(),
        looks: Looks::new(tail_rate),
        forgotten: RefCell::default(),
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
        lane.looks_by_itself(wait <= writer.look_interval());
        // Cancel-safety: all three only wait; nothing is taken by them.
        tokio::select! {
            more = lane.ready() => if !more && stopping.is_none() { return },
            () = writer.progress.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

impl<D: Disk> Writer<D> {
    /// Acts on a message; says whether a chunk is full and may go.
    fn take(self: &Rc<Self>, message: Message) -> bool {
        match message {
            Message::Open { facts, schema, encoder, fails, start } => {
                self.open(facts, schema, *encoder, fails, *start);
            }
            Message::Batch { topic, batch } => {
                let topic = self.topics.borrow().get(&topic).cloned();
                if let Some(topic) = topic {
                    self.context.stats.record(Station::Lane, batch.sent.elapsed());
                    if topic.failed.borrow().is_none() {
                        topic.gather(*batch);
                        let full = self.context.rule.chunk_bytes <= topic.open.borrow().data_bytes && self.has_place();
                        self.looks.got_batches(topic);
                        return full;
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
                        self.forgotten.borrow_mut().push(topic);
                    }
                    // Its `Open` was sent after the change that opened it, and is overtaken.
                    None if written && !self.abandoned.borrow_mut().remove(&no) => {
                        self.overtaken.borrow_mut().insert(no, reply);
                    }
                    None => {
                        reply.send(()).ok(); // Nothing of it was here; who asked may have gone.
                    }
                }
            }
            Message::Abandon { topic } => {
                if let Some(reply) = self.overtaken.borrow_mut().remove(&topic) {
                    reply.send(()).ok(); // The deletion goes on at the next start if nobody waits.
                } else {
                    self.abandoned.borrow_mut().insert(topic);
                }
            }
            Message::Stop { .. } => unreachable!("handled by the loop"),
        }
        false
    }

    fn open(
        &self,
        facts: Arc<TopicFacts>,
        schema: Arc<TopicSchema>,
        encoder: TopicEncoder,
        fails: watch::Sender<Option<StorageError>>,
        start: Start,
    ) {
        let record = facts.topic.clone();
        if let Some(reply) = self.overtaken.borrow_mut().remove(&record.no) {
            fails.send_replace(Some(StorageError::Gone));
            reply.send(()).ok(); // The deletion goes on at the next start if nobody waits.
            return;
        }
        let place = SegmentWriter::new(&self.shared, facts, crate::when::now_ns()).starting_at(start.segment);
        let topic = Topic::new(record, schema, encoder, fails, place, start);
        let topic = Rc::new(topic);
        self.looks.got_batches(Rc::clone(&topic));
        self.topics.borrow_mut().insert(topic.record.no, topic);
    }

    /// Lets go of deleted topics that have nothing under way.
    fn retire(&self) {
        let quiet = self.forgotten.borrow_mut().extract_if(.., |topic| topic.is_quiet()).collect::<Vec<_>>();
        for topic in quiet {
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
        topic.ended.set(true);
        let failed = topic.failed.borrow().is_some();
        let (empty, enough) = {
            let open = topic.open.borrow();
            (open.marks.is_empty(), floor_bytes(topic.record.format) <= open.data_bytes)
        };
        // Small batches are safe before the chunk that ends their topic is, as far as the tail takes them: hundreds of
        // topics may end at once. One that stays unlocked gets no chunk for them.
        let (mut tail, bytes) = (self.looks.tail_rate(Instant::now()), topic.unsafe_bytes());
        let goes = matches!(end, End::Leave) || bytes < CROWD_FLOOR_BYTES && tail.has(bytes);
        if !failed && !enough && !topic.open.borrow().fresh.is_empty() && goes {
            tail.take(bytes);
            self.looks.keep_tail_rate(tail);
            self.send_tails(self.pack_tail(topic).into_iter().collect());
        }
        let failed = topic.failed.borrow().is_some();
        // A topic that stays unlocked keeps its small rest in the tail: its chunk may still grow.
        let end = if failed { End::Leave } else { end };
        if !failed && !empty && (matches!(end, End::Lock | End::Close) || enough) {
            self.flush(topic, Some(end));
            return;
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
        topic.made().await;
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
            // The topic may be resumed before the steward comes to it: the next upload's segment is open.
            let below = if locked { None } else { Some(topic.place.lock().await.made_below()) };
            self.context.steward.seal(topic.record.clone(), below).await;
        }
        // A deleted topic stays known until the deletion's `Forget` has come: it must not look like
        // one whose `Open` is still to come.
        if let Some((_, reply)) = ending {
            reply.send(cause.map_or(committed, Err)).ok(); // A stream that was cut does not wait.
        }
        self.progress.notify_one();
    }

    /// Packs the fresh batches for the tail, if there are any.
    fn pack_tail(&self, topic: &Rc<Topic<D>>) -> Option<Packed<D>> {
        match topic.pack_tail() {
            Ok(packed) => packed.map(|(run, arrivals)| {
                topic.tail_in_flight.set(true);
                Packed { topic: Rc::clone(topic), run, arrivals, turn: Turn::take(topic) }
            }),
            Err(error) => {
                topic.fail(error);
                None
            }
        }
    }

    /// Sends runs of different topics on their way into the tail. Of one topic, or of topics that have nothing under
    /// way: none waits for what another has before it.
    fn send_tails(self: &Rc<Self>, packed: Vec<Packed<D>>) {
        if packed.is_empty() {
            return;
        }
        let writer = Rc::clone(self);
        tokio::task::spawn_local(async move {
            writer.commit_tails(packed).await;
            writer.progress.notify_one();
        });
    }

    async fn commit_tails(&self, packed: Vec<Packed<D>>) {
        let (mut runs, mut turns, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for Packed { topic, run, arrivals, turn } in packed {
            turn.wait().await;
            // What went before failed for good: nothing may stand behind a hole (INV-2).
            if topic.failed.borrow().is_some() {
                topic.tail_in_flight.set(false);
                continue;
            }
            let counts = (run.end_row() - run.first_row, run.marks.len() as u64, run.data_bytes);
            runs.push((topic.record.no, run));
            turns.push(turn);
            waiting.push((topic, arrivals, counts));
        }
        if runs.is_empty() {
            return;
        }
        let (reply, answer) = oneshot::channel();
        let queued = self.context.committer.tails(runs, reply).await;
        turns.iter().for_each(Turn::done);
        let results = match queued {
            Ok(()) => answer.await.map_err(|_| StorageError::Gone),
            Err(error) => Err(error),
        };
        let results = results.unwrap_or_else(|error| vec![Err(error); waiting.len()]);
        for ((topic, arrivals, (rows, batches, bytes)), result) in waiting.into_iter().zip(results) {
            topic.tail_in_flight.set(false);
            match result {
                Ok(()) => {
                    self.count(rows, batches, bytes);
                    self.acknowledged(&arrivals);
                }
                Err(error) => topic.fail(error),
            }
        }
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
        let closed = Instant::now();
        let turn = Turn::take(topic);
        let (writer, topic) = (Rc::clone(self), Rc::clone(topic));
        tokio::task::spawn_local(async move {
            let Open {
                safe,
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
            let mut batches = safe.into_batches();
            batches.extend(fresh.into_batches());
            let chunk = ChunkRows { batches, marks, first_batch, first_row, data_bytes, time, time_sorted: sorted };
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
                    let mut time = writer.flush_time.get();
                    time.note(closed.elapsed());
                    writer.flush_time.set(time);
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
        self: &Rc<Self>,
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
        self: &Rc<Self>,
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
                let pending =
                    place.write(&self.disk, &self.shared, &topic.schema, &topic.encoder, topic.record.no, chunk).await;
                let ending = topic.ending.borrow().is_some();
                if !ending && let Some(making) = place.make_ahead(&self.disk, &self.shared) {
                    self.make_ahead(topic, making);
                }
                pending
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
            if end.is_some() {
                topic.made().await;
            }
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
                Err(error) if attempt < limits::CHUNK_ATTEMPTS_MAX => {
                    if error.is_full_disk() {
                        let volume = self.context.volumes.index_of(&topic.record);
                        // After that the next attempt tells.
                        self.context.health.reserve_released(volume).await;
                    }
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

    /// Makes the next segment beside everything else.
    fn make_ahead(self: &Rc<Self>, topic: &Topic<D>, making: impl Future<Output = ()> + 'static) {
        let writer = Rc::clone(self);
        let making = tokio::task::spawn_local(async move {
            making.await;
            writer.progress.notify_one();
        });
        topic.making.replace(Some(making));
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
