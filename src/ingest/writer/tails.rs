//! Small batches' way into the tail, where they are durable before their chunk is.
//!
//! Guarantees: a run goes in the order of its topic's [`Turn`]s, and never behind something of it that failed (INV-2).

use crate::ingest::topic::{Topic, Turn};
use crate::ingest::writer::Writer;
use std::rc::Rc;
use std::time::Instant;
use storage::StorageError;
use storage::disk::Disk;
use storage::tail::TailRun;
use tokio::sync::oneshot;

/// A run on its way into the tail.
pub(super) struct Packed<D: Disk> {
    topic: Rc<Topic<D>>,
    pub(super) run: TailRun,
    /// When its batches arrived.
    arrivals: Vec<Instant>,
    turn: Turn,
}

impl<D: Disk> Writer<D> {
    /// Packs the fresh batches for the tail, if there are any.
    pub(super) fn pack_tail(&self, topic: &Rc<Topic<D>>) -> Option<Packed<D>> {
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
    pub(super) fn send_tails(self: &Rc<Self>, packed: Vec<Packed<D>>) {
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
}
