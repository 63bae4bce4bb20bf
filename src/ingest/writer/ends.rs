//! How an upload ends: its last batches, its lock, its seal, the answer to its stream.
//!
//! Guarantees: a topic is locked only if all that came before its end is durable (INV-12); the stream is answered with
//! the first cause of a failure.

use crate::ingest::committer::End;
use crate::ingest::gather::{CROWD_FLOOR_BYTES, floor_bytes};
use crate::ingest::topic::{Topic, Turn};
use crate::ingest::writer::Writer;
use std::rc::Rc;
use std::time::Instant;
use storage::StorageError;
use storage::disk::Disk;
use tokio::sync::oneshot;

impl<D: Disk> Writer<D> {
    pub(super) fn end(
        self: &Rc<Self>,
        topic: &Rc<Topic<D>>,
        end: End,
        reply: oneshot::Sender<Result<(), StorageError>>,
    ) {
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

    pub(super) async fn commit_end(&self, topic: &Topic<D>, end: End, turn: Turn) -> Result<(), StorageError> {
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
    pub(super) async fn finish(&self, topic: &Rc<Topic<D>>, committed: Result<(), StorageError>) {
        let deleted = matches!(committed, Err(StorageError::Gone));
        let cause = topic.failed.borrow().clone();
        let ending = topic.ending.take();
        if !deleted {
            let mut topics = self.topics.borrow_mut();
            // The client may have opened the topic again already: that entry is another upload's.
            if topics.get(&topic.record.no).is_some_and(|known| Rc::ptr_eq(known, topic)) {
                topics.remove(&topic.record.no);
            }
            self.looks.leave(topic);
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
}
