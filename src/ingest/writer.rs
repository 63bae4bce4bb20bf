//! The writer: a pinned thread with its own ring that gathers, encodes and writes the topics it owns. Here is its loop and
//! what it is told; which open chunks close is in `looks`, the ways of batches from there in `chunks` and `tails`, and how
//! an upload ends in `ends`.
//!
//! Guarantees: batches of a topic keep their order through gather, file and commit (INV-2); the thread never
//! waits for RocksDB, for a lock held across I/O or for a thread pool (INV-10): the only waits are
//! for its own ring, for space in the committer's lane, and for answers.
//! Does not know: requests, clients, gRPC. It is handed batches and tells watermarks.

mod chunks;
mod ends;
mod looks;
mod tails;

use crate::health::Health;
use crate::ingest::admit::Budget;
use crate::ingest::committer::{CommitHandle, End};
use crate::ingest::gather::{ChunkRule, FlushTime, TailRate};
use crate::ingest::lane::{Receiver, Sender};
use crate::ingest::steward::StewardHandle;
use crate::ingest::topic::{Batch, Start, Topic};
use crate::ingest::writer::looks::Looks;
use crate::limits;
use crate::stats::{Station, Stats};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use storage::StorageError;
use storage::chunk::TopicEncoder;
use storage::disk::{Disk, IoCounters};
use storage::ids::TopicNo;
use storage::schema::TopicSchema;
use storage::segment::TopicFacts;
use storage::volumes::Volumes;
use storage::write::{SegmentWriter, Shared};
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
        self.looks.enter(Rc::clone(&topic));
        self.topics.borrow_mut().insert(topic.record.no, topic);
    }

    /// Lets go of deleted topics that have nothing under way.
    fn retire(&self) {
        let quiet = self.forgotten.borrow_mut().extract_if(.., |topic| topic.is_quiet()).collect::<Vec<_>>();
        for topic in quiet {
            self.topics.borrow_mut().remove(&topic.record.no);
            self.looks.leave(&topic);
            if let Some((_, reply)) = topic.ending.take() {
                reply.send(Err(StorageError::Gone)).ok(); // Its stream may have gone.
            }
            if let Some(reply) = topic.forgotten.take() {
                reply.send(()).ok(); // The deletion goes on at the next start if nobody waits.
            }
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
