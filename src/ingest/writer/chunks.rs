//! A chunk's way from closed to committed.
//!
//! Guarantees: a chunk is offered to the committer only when all of it is on stable media (INV-1), in the order of its
//! topic's [`Turn`]s (INV-2), and never behind something of its topic that failed for good.

use crate::ingest::committer::{ChunkCommit, End};
use crate::ingest::topic::{Open, Topic, Turn, rows_of};
use crate::ingest::writer::Writer;
use crate::limits;
use crate::stats::Station;
use futures::FutureExt;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::Instant;
use storage::StorageError;
use storage::disk::Disk;
use storage::write::ChunkRows;
use tokio::sync::oneshot;

impl<D: Disk> Writer<D> {
    /// Closes the open chunk and starts it on its way.
    pub(super) fn flush(self: &Rc<Self>, topic: &Rc<Topic<D>>, end: Option<End>) {
        let open = topic.open.replace(Open { sorted: true, ..Open::default() });
        self.looks.note_size(topic);
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
}
