//! What an entry does to a group, and what is told once the group is durable.
//!
//! Guarantees: a topic's chunks and tail runs are recorded in the order of its batches and without a hole (INV-2);
//! what a group held whose commit failed, but which was durable all the same, is not recorded twice.

use super::entry::{Acknowledge, ChunkCommit, End, Entry, Item, Made, Outcome};
use super::live::{Live, Told, Watermark};
use crate::stats::{Station, Stats};
use std::sync::Arc;
use std::time::Instant;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{SegmentRecord, TopicTotals};
use storage::catalog::{Group, Look, Txn};
use storage::ids::TopicNo;
use storage::tail::TailRun;

/// An entry in a group that is not durable yet.
pub(super) enum Applied {
    Change(Instant, Option<Acknowledge>),
    Data(Entry, Outcome, Told),
    Tails(Entry, Vec<(Outcome, Told)>),
}

/// Puts one entry into the group.
pub(super) fn apply(group: &mut Group, live: &mut Live, entry: Entry, stats: &Arc<Stats>) -> Applied {
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
            let result = live.written(*topic).and_then(|state| apply_end(group, *topic, &state.totals, *end));
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
pub(super) fn acknowledge(applied: Applied, stats: &Stats) {
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

/// Answers whoever sent `item`, unless it was a change, which answers for itself.
pub(super) fn answer(item: Item, result: Outcome) {
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
    let state = live.written(topic)?;
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
    let state = live.written(topic)?;
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
