//! What the committer is sent, and the handle that sends it.
//!
//! Guarantees: entries of one sender keep their order. Who sends gets a place in it before going on, and is answered
//! when the group is durable.

use super::live::Live;
use crate::ingest::lane::Sender;
use std::time::Instant;
use storage::StorageError;
use storage::catalog::records::SegmentRecord;
use storage::catalog::{Group, Txn};
use storage::chunk::ChunkRecord;
use storage::chunk::record::SkipRecord;
use storage::depth::Depth;
use storage::ids::TopicNo;
use storage::tail::TailRun;
use tokio::sync::oneshot;

pub(super) type Outcome = Result<(), StorageError>;

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

/// Runs when the group is durable, or is not.
pub(super) type Acknowledge = Box<dyn FnOnce(&Outcome) + Send>;
pub(super) type Change = Box<dyn FnOnce(Made<'_>) -> Option<Acknowledge> + Send>;

/// What a change is run with.
pub(super) enum Made<'a> {
    In(&'a mut Group, &'a mut Live),
    /// Nothing can be changed now.
    Not(StorageError),
}

pub(super) enum Item {
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
    pub(super) fn has_time(&self) -> bool {
        match self {
            Self::Chunk(commit) => commit.end.is_none(),
            Self::Tails { .. } => true,
            Self::End { .. } | Self::Change(_) => false,
        }
    }
}

/// Entry with the time it was queued.
pub(crate) struct Entry {
    pub(super) item: Item,
    pub(super) queued: Instant,
    /// Applied before, in a group whose commit failed: it may be durable already.
    pub(super) again: bool,
}

/// The way to the committer.
#[derive(Clone)]
pub(crate) struct CommitHandle {
    pub(super) lane: Sender<Entry>,
    pub(super) depth: Depth,
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
    pub(crate) async fn tails(&self, runs: Vec<(TopicNo, TailRun)>, reply: oneshot::Sender<Vec<Outcome>>) -> Outcome {
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
