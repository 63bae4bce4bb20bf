//! What of a topic can be read, and in which order: its chunks and tail under one view of the catalog.
//!
//! Guarantees: reads nothing but the catalog; what has rows comes in groups that follow one another in time.

use crate::catalog::Look;
use crate::catalog::records::{DamageRecord, TopicRecord};
use crate::chunk::record::ChunkRecord;
use crate::error::Result;
use crate::schema::TopicSchema;
use crate::segment;
use crate::tail::TailRun;
use parquet::arrow::ArrowSchemaConverter;
use parquet::schema::types::SchemaDescPtr;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A half-open time range in nanoseconds; an absent side is open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// First time, inclusive.
    pub start: Option<i64>,
    /// Last time, exclusive.
    pub end: Option<i64>,
}

impl Window {
    /// Whether a row of this time is inside.
    pub fn holds(&self, time: i64) -> bool {
        self.start.is_none_or(|start| start <= time) && self.end.is_none_or(|end| time < end)
    }

    /// Whether some time between two inclusive ends is inside.
    pub fn meets(&self, (first, last): (i64, i64)) -> bool {
        self.start.is_none_or(|start| start <= last) && self.end.is_none_or(|end| first < end)
    }

    /// Whether every time between two inclusive ends is inside.
    pub fn covers(&self, (first, last): (i64, i64)) -> bool {
        self.holds(first) && self.holds(last)
    }

    /// Whether nothing is asked for in particular.
    pub fn is_all(&self) -> bool {
        self.start.is_none() && self.end.is_none()
    }
}

/// What is durable of a topic at one moment, and how to read it.
#[derive(Debug, Clone)]
pub struct TopicView {
    /// The topic.
    pub record: TopicRecord,
    /// Its schema.
    pub schema: Arc<TopicSchema>,
    pub(super) descriptor: SchemaDescPtr,
    dir: PathBuf,
    chunks: Vec<ChunkRecord>,
    tail: Vec<TailRun>,
    /// What is known to be damaged: its rows are left out.
    damaged: Vec<DamageRecord>,
}

impl TopicView {
    /// Reads chunks and tail of a topic under one view of the catalog.
    ///
    /// # Errors
    /// When the catalog cannot be read, or the topic never got a schema.
    pub fn load(look: &impl Look, data_dir: &Path, record: TopicRecord) -> Result<Option<Self>> {
        let Some(message) = look.topic_schema(record.no)? else {
            return Ok(None);
        };
        let schema = Arc::new(TopicSchema::derive(crate::schema::from_ipc(&message)?)?);
        let descriptor = Arc::new(ArrowSchemaConverter::new().convert(&schema.stored)?);
        let chunks = look.chunks(record.no)?;
        let tail = look.tail(record.no, chunks.last().map_or(0, |chunk| chunk.end_batch))?;
        let dir = segment::topic_dir(data_dir, record.sequence, record.id);
        let damaged = look.damaged(record.no)?;
        Ok(Some(Self { record, schema, descriptor, dir, chunks, tail, damaged }))
    }

    /// Folder of its segments.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known to be damaged of it, in row order.
    pub fn damaged(&self) -> &[DamageRecord] {
        &self.damaged
    }

    /// Whether the chunk that starts at a row is known to be damaged.
    pub fn is_damaged(&self, first_row: u64) -> bool {
        self.damaged.iter().any(|damage| damage.first_row == first_row)
    }

    /// Its chunks, in row order.
    pub fn chunks(&self) -> &[ChunkRecord] {
        &self.chunks
    }

    /// Its tail: what is durable behind the last chunk.
    pub fn tail(&self) -> &[TailRun] {
        &self.tail
    }

    /// Everything that has rows, in arrival order.
    pub fn places(&self) -> Vec<Place> {
        self.sources().map(|source| source.place).collect()
    }

    /// Smallest and largest time of a source.
    pub fn time_of(&self, place: Place) -> Option<(i64, i64)> {
        match place {
            Place::Chunk(index) => self.chunks.get(index)?.time,
            Place::Tail(index) => self.tail.get(index)?.time,
        }
    }

    /// What has rows, in groups that follow one another in time; the rows of one group interleave.
    pub fn time_groups(&self) -> Vec<Vec<Place>> {
        let groups = groups(self.sources(), Window::default());
        groups.into_iter().map(|group| group.into_iter().map(|source| source.place).collect()).collect()
    }

    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        let whole = self.chunks.iter().enumerate().filter(|(_, chunk)| !self.is_damaged(chunk.first_row));
        let chunks = whole.filter_map(|(index, chunk)| {
            chunk.time.map(|time| Source {
                place: Place::Chunk(index),
                time,
                sorted: chunk.time_sorted,
                rows: chunk.rows(),
                data_bytes: chunk.data_bytes,
            })
        });
        let tail = self.tail.iter().enumerate().filter_map(|(index, run)| {
            let rows = run.end_row() - run.first_row;
            run.time.map(|time| Source {
                place: Place::Tail(index),
                time,
                sorted: false,
                rows,
                data_bytes: run.data_bytes,
            })
        });
        chunks.chain(tail)
    }
}

/// Where rows of a topic lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// A chunk, by its position.
    Chunk(usize),
    /// A run of the tail, by its position.
    Tail(usize),
}

/// Rows that lie together, with what is known of them before reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) place: Place,
    pub(super) time: (i64, i64),
    pub(super) sorted: bool,
    pub(super) rows: u64,
    pub(super) data_bytes: u64,
}

/// Groups sources so that the groups follow one another in time; within a group rows must be
/// merged. Input in arrival order; groups keep it.
pub(super) fn groups(sources: impl Iterator<Item = Source>, window: Window) -> VecDeque<Vec<Source>> {
    let mut sources: Vec<(usize, Source)> =
        sources.enumerate().filter(|(_, source)| window.meets(source.time)).collect();
    sources.sort_by_key(|(arrival, source)| (source.time.0, *arrival));
    let mut groups: VecDeque<Vec<(usize, Source)>> = VecDeque::new();
    let mut end: Option<(i64, usize)> = None;
    for (arrival, source) in sources {
        // Rows of equal time keep arrival order: a source that touches the end of the group may
        // follow it only if it also arrived after all of it.
        let follows =
            end.is_none_or(|(time, latest)| source.time.0 > time || (source.time.0 == time && arrival > latest));
        match groups.back_mut() {
            Some(group) if !follows => group.push((arrival, source)),
            _ => {
                groups.push_back(vec![(arrival, source)]);
                end = None;
            }
        }
        let (time, latest) = end.unwrap_or((i64::MIN, 0));
        end = Some((time.max(source.time.1), latest.max(arrival)));
    }
    groups
        .into_iter()
        .map(|mut group| {
            group.sort_by_key(|(arrival, _)| *arrival);
            group.into_iter().map(|(_, source)| source).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(index: usize, time: (i64, i64)) -> Source {
        Source { place: Place::Chunk(index), time, sorted: true, rows: 1, data_bytes: 1 }
    }

    #[track_caller]
    fn check(times: &[(i64, i64)], window: Window, expected: &[&[usize]]) {
        let sources = times.iter().enumerate().map(|(index, time)| source(index, *time));
        let found: Vec<Vec<usize>> = groups(sources, window)
            .into_iter()
            .map(|group| {
                group
                    .iter()
                    .map(|source| match source.place {
                        Place::Chunk(index) | Place::Tail(index) => index,
                    })
                    .collect()
            })
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn chunks_that_follow_in_time_are_read_one_by_one() {
        check(&[(0, 9), (10, 19), (20, 29)], Window::default(), &[&[0], &[1], &[2]]);
    }

    #[test]
    fn overlapping_chunks_are_merged_in_arrival_order() {
        check(&[(5, 9), (0, 6), (10, 12)], Window::default(), &[&[0, 1], &[2]]);
    }

    #[test]
    fn a_tie_at_the_edge_needs_no_merge_when_arrival_agrees() {
        check(&[(0, 5), (5, 9)], Window::default(), &[&[0], &[1]]);
    }

    #[test]
    fn a_tie_at_the_edge_is_merged_when_arrival_disagrees() {
        check(&[(5, 9), (0, 5)], Window::default(), &[&[0, 1]]);
    }

    #[test]
    fn a_window_leaves_out_what_only_touches_its_open_end() {
        let window = Window { start: Some(10), end: Some(20) };
        check(&[(0, 9), (0, 10), (12, 13), (20, 30)], window, &[&[1], &[2]]);
    }
}
