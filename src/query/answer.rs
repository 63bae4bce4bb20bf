//! Answers to questions, and how those of several parts come together.
//!
//! Guarantees: a topic is in an answer once, with the times of all parts that found it.

use crate::query::times::{Interval, union};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use storage::catalog::records::{SequenceRecord, TopicRecord};
use storage::ids::SequenceId;

/// What an answer cost.
#[derive(Debug, Default)]
pub(crate) struct Cost {
    /// Topics whose index was looked at.
    pub(crate) topics: AtomicU64,
    /// Chunks of them.
    pub(crate) chunks: AtomicU64,
    /// Chunks without a matching row, by the index alone.
    pub(crate) ruled_out: AtomicU64,
    /// Chunks of which every row matches, by the index alone.
    pub(crate) proven: AtomicU64,
    /// Chunks of which columns were read.
    pub(crate) read: AtomicU64,
    /// Bytes read from segments.
    pub(crate) bytes_read: AtomicU64,
    /// Bytes that the recordings asked have in segments, all topics; counted where it is to be explained.
    pub(crate) bytes_stored: AtomicU64,
}

impl Cost {
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// A topic in an answer.
#[derive(Debug, Clone)]
pub(crate) struct Hit {
    pub(crate) topic: TopicRecord,
    /// Runs of matching rows, where they were asked for.
    pub(crate) intervals: Vec<Interval>,
    /// First and last time of matching rows, where it was asked for.
    pub(crate) range: Option<Interval>,
}

/// What is to be found out about the times of matching rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Times {
    Nothing,
    Range,
    Intervals,
}

/// A sequence in an answer.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) sequence: SequenceRecord,
    pub(crate) topics: Vec<Hit>,
    /// Where the matching rows of all tags coincide, where intervals were asked for.
    pub(crate) windows: Vec<Interval>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) items: Vec<Item>,
    /// Something was cut: sequences by `limit`, or intervals by their bound.
    pub(crate) truncated: bool,
    pub(crate) cost: Arc<Cost>,
}

/// Hits by sequence; of each part of the question one list of intervals by sequence.
#[derive(Default)]
pub(super) struct Found {
    pub(super) hits: BTreeMap<SequenceId, Vec<Hit>>,
    pub(super) parts: Vec<HashMap<SequenceId, Vec<Interval>>>,
}

/// A topic in an answer. Its metadata, which bridges fill with whole schemas, is not part of any.
pub(super) fn found(topic: TopicRecord) -> Hit {
    Hit { topic: TopicRecord { user_metadata: String::new(), ..topic }, intervals: Vec::new(), range: None }
}

/// Adds a topic, which may be there already by another part of the question.
pub(super) fn add_hit(hits: &mut Vec<Hit>, hit: Hit) {
    match hits.iter_mut().find(|known| known.topic.no == hit.topic.no) {
        Some(known) => {
            let both = std::mem::take(&mut known.intervals).into_iter().chain(hit.intervals);
            known.intervals = union(both.collect());
        }
        None => hits.push(hit),
    }
}

/// Sequences in both, with the topics of both.
pub(super) fn combine(so_far: Option<Found>, mut found: Found) -> Found {
    let Some(mut all) = so_far else { return found };
    all.hits.retain(|sequence, _| found.hits.contains_key(sequence));
    for (sequence, hits) in &mut all.hits {
        for hit in found.hits.remove(sequence).unwrap_or_default() {
            add_hit(hits, hit);
        }
    }
    all.parts.extend(found.parts);
    all
}

pub(super) fn intervals_by_sequence(hits: &BTreeMap<SequenceId, Vec<Hit>>) -> HashMap<SequenceId, Vec<Interval>> {
    hits.iter()
        .map(|(sequence, hits)| (*sequence, union(hits.iter().flat_map(|hit| hit.intervals.clone()).collect())))
        .collect()
}
