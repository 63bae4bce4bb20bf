//! The skip index at rest: one value for each index column, topic and run of chunks.
//!
//! A question about one field reads that field's blocks and nothing else, in one range scan over all
//! topics. Statistics of chunks that were committed lately lie apart (`skip` prefix `o`, one value a
//! chunk with all columns) until the topic's segments are sealed; [`plan_fold`] packs them.
//! A block is columnar and read in place: 1,000,000 chunks are looked through in milliseconds.

use super::keys::{self, Family};
use super::records::{BlockMark, SegmentRecord};
use super::{Catalog, Look, Txn, View, failed};
use crate::chunk::record::SkipRecord;
use crate::chunk::stats::{Bounds, FieldStats};
use crate::error::{Result, StorageError};
use crate::ids::TopicNo;
use crate::limits::SKIP_BLOCK_CHUNKS;
use crate::ontology::Ontology;
use serde::{Deserialize, Serialize};

/// Statistics of one index column over consecutive chunks of a topic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SkipBlock<'a> {
    chunks: u32,
    #[serde(borrow)]
    values: Counts<'a>,
    #[serde(borrow)]
    nulls: Counts<'a>,
    #[serde(borrow)]
    nans: Counts<'a>,
    #[serde(borrow)]
    bounds: PackedBounds<'a>,
}

/// A count for each chunk; often all the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Counts<'a> {
    Same(u64),
    /// Little-endian u64.
    Each(#[serde(borrow, with = "serde_bytes")] std::borrow::Cow<'a, [u8]>),
}

/// Smallest and largest, little-endian, all first ones before all second ones. A chunk without bounds
/// has them the wrong way round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum PackedBounds<'a> {
    None,
    Int(#[serde(borrow, with = "serde_bytes")] std::borrow::Cow<'a, [u8]>),
    Unsigned(#[serde(borrow, with = "serde_bytes")] std::borrow::Cow<'a, [u8]>),
    Float(#[serde(borrow, with = "serde_bytes")] std::borrow::Cow<'a, [u8]>),
    /// Everything that has no fixed width, or should kinds ever meet in one column.
    Other(Vec<Bounds>),
}

fn eight(bytes: &[u8], index: usize) -> [u8; 8] {
    bytes.get(index * 8..index * 8 + 8).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default()
}

impl Counts<'_> {
    fn pack(counts: impl Iterator<Item = u64> + Clone) -> Self {
        let mut each = counts.clone();
        let first = each.next().unwrap_or(0);
        if each.all(|count| count == first) {
            return Self::Same(first);
        }
        Self::Each(counts.flat_map(u64::to_le_bytes).collect())
    }

    fn get(&self, index: usize) -> u64 {
        match self {
            Self::Same(count) => *count,
            Self::Each(bytes) => u64::from_le_bytes(eight(bytes, index)),
        }
    }

    fn fits(&self, chunks: usize) -> bool {
        match self {
            Self::Same(_) => true,
            Self::Each(bytes) => bytes.len() == chunks * 8,
        }
    }
}

impl PackedBounds<'_> {
    fn pack(all: &[&FieldStats]) -> Self {
        fn pairs<T: Copy>(all: &[&FieldStats], empty: (T, T), of: impl Fn(&Bounds) -> Option<(T, T)>) -> Vec<(T, T)> {
            all.iter().map(|stats| of(&stats.bounds).unwrap_or(empty)).collect()
        }
        fn bytes<T: Copy>(pairs: &[(T, T)], to: impl Fn(T) -> [u8; 8]) -> std::borrow::Cow<'static, [u8]> {
            let low = pairs.iter().flat_map(|pair| to(pair.0));
            low.chain(pairs.iter().flat_map(|pair| to(pair.1))).collect()
        }
        let only = |fits: fn(&Bounds) -> bool| all.iter().all(|s| s.bounds == Bounds::None || fits(&s.bounds));
        if only(|_| false) {
            Self::None
        } else if only(|bounds| matches!(bounds, Bounds::Int(..))) {
            let pairs = pairs(all, (i64::MAX, i64::MIN), |bounds| match bounds {
                Bounds::Int(low, high) => Some((*low, *high)),
                _ => None,
            });
            Self::Int(bytes(&pairs, i64::to_le_bytes))
        } else if only(|bounds| matches!(bounds, Bounds::Unsigned(..))) {
            let pairs = pairs(all, (u64::MAX, u64::MIN), |bounds| match bounds {
                Bounds::Unsigned(low, high) => Some((*low, *high)),
                _ => None,
            });
            Self::Unsigned(bytes(&pairs, u64::to_le_bytes))
        } else if only(|bounds| matches!(bounds, Bounds::Float(..))) {
            let pairs = pairs(all, (f64::INFINITY, f64::NEG_INFINITY), |bounds| match bounds {
                Bounds::Float(low, high) => Some((*low, *high)),
                _ => None,
            });
            Self::Float(bytes(&pairs, f64::to_le_bytes))
        } else {
            Self::Other(all.iter().map(|stats| stats.bounds.clone()).collect())
        }
    }

    fn get(&self, index: usize, chunks: usize) -> Bounds {
        let ends = |bytes: &[u8]| (eight(bytes, index), eight(bytes, chunks + index));
        match self {
            Self::None => Bounds::None,
            Self::Int(bytes) => {
                let (low, high) = ends(bytes);
                let (low, high) = (i64::from_le_bytes(low), i64::from_le_bytes(high));
                if low <= high { Bounds::Int(low, high) } else { Bounds::None }
            }
            Self::Unsigned(bytes) => {
                let (low, high) = ends(bytes);
                let (low, high) = (u64::from_le_bytes(low), u64::from_le_bytes(high));
                if low <= high { Bounds::Unsigned(low, high) } else { Bounds::None }
            }
            Self::Float(bytes) => {
                let (low, high) = ends(bytes);
                let (low, high) = (f64::from_le_bytes(low), f64::from_le_bytes(high));
                if low <= high { Bounds::Float(low, high) } else { Bounds::None }
            }
            Self::Other(all) => all.get(index).cloned().unwrap_or(Bounds::None),
        }
    }

    fn fits(&self, chunks: usize) -> bool {
        match self {
            Self::None => true,
            Self::Int(bytes) | Self::Unsigned(bytes) | Self::Float(bytes) => bytes.len() == chunks * 16,
            Self::Other(all) => all.len() == chunks,
        }
    }
}

impl<'a> SkipBlock<'a> {
    /// Packs the statistics of one column over consecutive chunks.
    ///
    /// # Errors
    /// When they cannot be serialised, which would be a bug.
    pub fn pack(all: &[&FieldStats]) -> Result<Vec<u8>> {
        super::records::pack(&SkipBlock {
            chunks: u32::try_from(all.len()).unwrap_or(u32::MAX),
            values: Counts::pack(all.iter().map(|stats| stats.values)),
            nulls: Counts::pack(all.iter().map(|stats| stats.nulls)),
            nans: Counts::pack(all.iter().map(|stats| stats.nans)),
            bounds: PackedBounds::pack(all),
        })
    }

    /// Reads a block in place.
    ///
    /// # Errors
    /// [`StorageError::Decode`] when the bytes are no block.
    pub fn unpack(bytes: &'a [u8]) -> Result<Self> {
        let broken = |text: String| StorageError::Decode { what: "skip block", text };
        let block: Self = postcard::from_bytes(bytes).map_err(|error| broken(error.to_string()))?;
        let chunks = block.chunks();
        // Equal counts and no bounds take no room: a few damaged bytes could claim any number.
        if chunks > SKIP_BLOCK_CHUNKS {
            return Err(broken(format!("{chunks} chunks, where a block has at most {SKIP_BLOCK_CHUNKS}")));
        }
        let counts_fit = [&block.values, &block.nulls, &block.nans].into_iter().all(|counts| counts.fits(chunks));
        if !counts_fit || !block.bounds.fits(chunks) {
            return Err(broken(format!("its parts do not fit {chunks} chunks")));
        }
        Ok(block)
    }

    /// Chunks in the block.
    pub fn chunks(&self) -> usize {
        self.chunks as usize
    }

    /// The statistics of one of its chunks.
    pub fn get(&self, index: usize) -> FieldStats {
        FieldStats {
            values: self.values.get(index),
            nulls: self.nulls.get(index),
            nans: self.nans.get(index),
            bounds: self.bounds.get(index, self.chunks()),
        }
    }
}

/// The statistics of every chunk of a topic as the index has them now; `None` where it has none. Of
/// columns with one name each gets what the first has.
///
/// # Errors
/// When the catalog cannot be read.
pub fn indexed(
    view: &View<'_>,
    topic: TopicNo,
    ontology: &Ontology,
    chunks: &[u64],
) -> Result<Vec<Option<SkipRecord>>> {
    let packed: usize = view.skip_blocks(topic)?.iter().map(|mark| mark.chunks as usize).sum();
    let mut records: Vec<Option<SkipRecord>> = vec![None; chunks.len()];
    for (at, column) in ontology.columns.iter().enumerate() {
        let mut index = 0;
        view.skip_cursor(&ontology.record.tag, column)?.blocks(topic, &mut |block| {
            for stats in (0..block.chunks()).map(|within| block.get(within)) {
                if let Some(record) = records.get_mut(index) {
                    let fields = &mut record.get_or_insert_with(|| SkipRecord { fields: Vec::new() }).fields;
                    if fields.len() == at {
                        fields.push(stats);
                    }
                }
                index += 1;
            }
            Ok(())
        })?;
    }
    for (record, first_row) in records.iter_mut().zip(chunks).skip(packed) {
        *record = view.skip(topic, *first_row)?;
    }
    Ok(records)
}

/// Statistics that are ready to be packed, and what they were read against.
#[derive(Debug)]
pub struct Fold {
    topic: TopicNo,
    /// The blocks the topic had.
    before: Vec<BlockMark>,
    marks: Vec<BlockMark>,
    blocks: Vec<(Vec<u8>, Vec<u8>)>,
    /// First rows of the chunks that are packed.
    rows: Vec<u64>,
}

/// Packs what lies apart of a topic into blocks: whole ones only, or everything at its end. Only
/// chunks of sealed segments, because sealing wants their statistics for the footer; `sealed_now` are those whose
/// records join the catalog together with the blocks.
///
/// # Errors
/// When the catalog cannot be read.
pub fn plan_fold(
    look: &impl Look,
    topic: TopicNo,
    ontology: &Ontology,
    everything: bool,
    sealed_now: &[SegmentRecord],
) -> Result<Option<Fold>> {
    let before = look.skip_blocks(topic)?;
    let packed: usize = before.iter().map(|mark| mark.chunks as usize).sum();
    let segments = look.segments(topic)?;
    let sealed = segments.iter().filter(|segment| segment.sealed_length.is_some());
    let sealed: Vec<u32> = sealed.chain(sealed_now).map(|segment| segment.no).collect();
    let chunks = look.chunks(topic)?;
    let ready: Vec<u64> = chunks
        .iter()
        .skip(packed)
        .take_while(|chunk| sealed.contains(&chunk.segment))
        .map(|chunk| chunk.first_row)
        .collect();
    let take = if everything { ready.len() } else { ready.len() / SKIP_BLOCK_CHUNKS * SKIP_BLOCK_CHUNKS };
    let ready = ready.get(..take).unwrap_or(&[]);
    if ready.is_empty() {
        return Ok(None);
    }
    let mut marks = before.clone();
    let mut blocks = Vec::new();
    for (index, rows) in ready.chunks(SKIP_BLOCK_CHUNKS).enumerate() {
        let first_chunk = u32::try_from(packed + index * SKIP_BLOCK_CHUNKS).unwrap_or(u32::MAX);
        marks.push(BlockMark { first_chunk, chunks: u32::try_from(rows.len()).unwrap_or(u32::MAX) });
        let records = rows
            .iter()
            .map(|row| look.skip(topic, *row)?.ok_or(StorageError::Gone))
            .collect::<Result<Vec<SkipRecord>>>()?;
        // Written without statistics: there is nothing to pack.
        if records.iter().any(|record| record.fields.is_empty()) {
            return Ok(None);
        }
        blocks.extend(pack_columns(topic, ontology, first_chunk, &records)?);
    }
    Ok(Some(Fold { topic, before, marks, blocks, rows: ready.to_vec() }))
}

/// The blocks of some consecutive chunks, one a column.
fn pack_columns(
    topic: TopicNo,
    ontology: &Ontology,
    first_chunk: u32,
    records: &[SkipRecord],
) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let names = unique(&ontology.columns);
    let column = |(at, column): (usize, &String)| {
        let stats: Option<Vec<&FieldStats>> = records.iter().map(|record| record.fields.get(at)).collect();
        let stats = stats.ok_or_else(|| StorageError::Decode {
            what: "skip index",
            text: format!("column `{column}` is missing in the statistics of topic {topic}"),
        })?;
        let id = keys::index_column(&ontology.record.tag, column);
        Ok((keys::skip_block(&id, topic, first_chunk), SkipBlock::pack(&stats)?))
    };
    names.into_iter().map(column).collect()
}

/// Columns by name, the first of each: a field may be named `a.b` beside a struct `a` with `b`, and what
/// a path finds is the first.
fn unique(columns: &[String]) -> Vec<(usize, &String)> {
    let mut seen = std::collections::HashSet::new();
    columns.iter().enumerate().filter(|(_, column)| seen.insert(*column)).collect()
}

impl Txn<'_> {
    /// Replaces the statistics that lie apart by their blocks, unless the topic changed meanwhile.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn put_fold(&mut self, fold: Fold) -> Result<()> {
        if self.topic(fold.topic)?.is_none() || self.skip_blocks(fold.topic)? != fold.before {
            return Ok(());
        }
        for (key, value) in fold.blocks {
            self.put_bytes(Family::Skip, key, value);
        }
        self.put(Family::Topics, keys::topic_blocks(fold.topic), &fold.marks)?;
        // One by one: a deleted range costs every later reader of the memtable, of whatever topic.
        for row in fold.rows {
            self.delete(Family::Skip, keys::skip_open(fold.topic, row));
        }
        Ok(())
    }

    /// Replaces all of a topic's index by these statistics, one for each chunk.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn replace_index(
        &mut self,
        record: &super::records::TopicRecord,
        ontology: &Ontology,
        records: &[SkipRecord],
    ) -> Result<()> {
        self.delete_blocks(record)?;
        self.delete_prefix(Family::Skip, keys::skip_open_of(record.no));
        let mut marks = Vec::new();
        for (index, records) in records.chunks(SKIP_BLOCK_CHUNKS).enumerate() {
            let first_chunk = u32::try_from(index * SKIP_BLOCK_CHUNKS).unwrap_or(u32::MAX);
            marks.push(BlockMark { first_chunk, chunks: u32::try_from(records.len()).unwrap_or(u32::MAX) });
            for (key, value) in pack_columns(record.no, ontology, first_chunk, records)? {
                self.put_bytes(Family::Skip, key, value);
            }
        }
        self.put(Family::Topics, keys::topic_blocks(record.no), &marks)
    }

    /// Removes a topic's blocks.
    pub(super) fn delete_blocks(&mut self, record: &super::records::TopicRecord) -> Result<()> {
        let marks = self.skip_blocks(record.no)?;
        if marks.is_empty() {
            return Ok(());
        }
        let Some(of_topic) = self.topic_ontology(record.no)? else { return Ok(()) };
        let Some(ontology) = self.ontology(&record.ontology_tag, of_topic.version)? else { return Ok(()) };
        for column in &Ontology::load(ontology)?.columns {
            let id = keys::index_column(&record.ontology_tag, column);
            for mark in &marks {
                self.delete(Family::Skip, keys::skip_block(&id, record.no, mark.first_chunk));
            }
        }
        Ok(())
    }
}

/// Walks the blocks of one index column, topic by topic in ascending order.
pub struct SkipCursor<'a> {
    column: [u8; 16],
    raw: rocksdb::DBRawIteratorWithThreadMode<'a, super::Db>,
    /// The topic asked for last; the iterator stands behind its blocks.
    last: Option<TopicNo>,
}

impl std::fmt::Debug for SkipCursor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SkipCursor").field("column", &self.column).finish_non_exhaustive()
    }
}

/// Keys that are stepped over one by one before the cursor seeks: a step costs a tenth of a seek.
const STEPS_BEFORE_SEEK: usize = 8;

impl View<'_> {
    /// A cursor over an index column.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn skip_cursor(&self, tag: &str, path: &str) -> Result<SkipCursor<'_>> {
        let handle = self.pin.family(Family::Skip)?;
        let mut options = rocksdb::ReadOptions::default();
        options.set_readahead_size(256 << 10);
        options.set_verify_checksums(true);
        let raw = self.snapshot.raw_iterator_cf_opt(&handle, options);
        Ok(SkipCursor { column: keys::index_column(tag, path), raw, last: None })
    }
}

impl SkipCursor<'_> {
    /// Shows every block of a topic in chunk order. Cheapest when topics are asked for in ascending order.
    ///
    /// # Errors
    /// When the catalog cannot be read, a block does not decode, or `visit` fails.
    pub fn blocks(&mut self, topic: TopicNo, visit: &mut dyn FnMut(&SkipBlock<'_>) -> Result<()>) -> Result<()> {
        let from = keys::skip_block(&self.column, topic, 0);
        // Two comparisons of one column ask for a topic twice.
        if self.last.is_none_or(|last| topic <= last) {
            self.raw.seek(&from);
        }
        self.last = Some(topic);
        let mut steps = 0;
        while self.raw.key().is_some_and(|key| key < from.as_slice()) {
            if steps == STEPS_BEFORE_SEEK {
                self.raw.seek(&from);
            } else {
                self.raw.next();
            }
            steps += 1;
        }
        let prefix = from.get(..from.len() - size_of::<u32>()).unwrap_or(&from);
        while let (Some(key), Some(value)) = (self.raw.key(), self.raw.value()) {
            if !key.starts_with(prefix) {
                break;
            }
            visit(&SkipBlock::unpack(value)?)?;
            self.raw.next();
        }
        self.raw.status().map_err(failed("scan"))
    }
}

/// Topics with statistics that lie apart, for the pass at start.
///
/// # Errors
/// When the catalog cannot be read.
pub fn unfolded_topics(catalog: &Catalog) -> Result<Vec<TopicNo>> {
    let mut topics: Vec<TopicNo> = Vec::new();
    let mut from = b"o".to_vec();
    loop {
        let mut found = None;
        catalog.scan(Family::Skip, b"o", &from, &mut |key, _| {
            found =
                key.get(1..9).and_then(|bytes| bytes.try_into().ok()).map(|bytes| TopicNo(u64::from_be_bytes(bytes)));
            Ok(false)
        })?;
        let Some(topic) = found else { return Ok(topics) };
        topics.push(topic);
        match keys::after_prefix(&keys::skip_open_of(topic)) {
            Some(next) => from = next,
            None => return Ok(topics),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stats(bounds: Bounds) -> FieldStats {
        FieldStats { values: 7, nulls: 1, nans: 0, bounds }
    }

    #[track_caller]
    fn check(all: Vec<FieldStats>) {
        let bytes = SkipBlock::pack(&all.iter().collect::<Vec<_>>()).expect("packs");
        let block = SkipBlock::unpack(&bytes).expect("unpacks");
        let back: Vec<FieldStats> = (0..block.chunks()).map(|index| block.get(index)).collect();
        assert_eq!(back, all);
    }

    #[test]
    fn inv_9_a_block_of_more_chunks_than_there_are_is_refused() {
        let nothing = stats(Bounds::None);
        let bytes = SkipBlock::pack(&vec![&nothing; SKIP_BLOCK_CHUNKS + 1]).expect("packs");
        assert!(SkipBlock::unpack(&bytes).is_err());
    }

    #[test]
    fn chunks_without_bounds_stay_without_among_others() {
        check(vec![stats(Bounds::Int(i64::MIN, i64::MAX)), stats(Bounds::None), stats(Bounds::Int(3, 3))]);
        check(vec![stats(Bounds::None), stats(Bounds::Float(f64::NEG_INFINITY, f64::INFINITY))]);
        check(vec![stats(Bounds::None), stats(Bounds::None)]);
        check(vec![stats(Bounds::Values(vec!["a".into()])), stats(Bounds::None)]);
        check(Vec::new());
    }

    proptest! {
        #[test]
        fn inv_6_statistics_survive_packing(all in prop::collection::vec((any::<(u64, u64, u64)>(), any::<(u64, u64)>()), 0..=SKIP_BLOCK_CHUNKS)) {
            check(all.into_iter().map(|((values, nulls, nans), (a, b))| {
                FieldStats { values, nulls, nans, bounds: Bounds::Unsigned(a.min(b), a.max(b)) }
            }).collect());
        }

        #[test]
        fn arbitrary_bytes_are_refused_and_never_panic(bytes: Vec<u8>) {
            if let Ok(block) = SkipBlock::unpack(&bytes) {
                for index in 0..block.chunks().min(1000) {
                    block.get(index);
                }
            }
        }
    }

    #[test]
    fn inv_6_a_cursor_shows_the_blocks_of_a_topic_as_often_as_it_is_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let catalog = Catalog::open(folder.path(), false).expect("a catalog");
        let mut group = catalog.group().expect("a group");
        let put = |txn: &mut Txn<'_>| -> Result<()> {
            for (topic, low) in [(1, 10), (1_000, 20), (1_001, 30)] {
                let block = SkipBlock::pack(&[&stats(Bounds::Int(low, low))])?;
                let column = keys::index_column("t", "x");
                txn.put_bytes(Family::Skip, keys::skip_block(&column, TopicNo(topic), 0), block);
            }
            Ok(())
        };
        group.change(put).expect("changed");
        group.commit().expect("committed");
        let pin = catalog.pin().expect("open");
        let view = pin.view();
        let mut cursor = view.skip_cursor("t", "x").expect("a cursor");
        for (topic, expected) in [(1, vec![10]), (1, vec![10]), (7, vec![]), (1_001, vec![30]), (1_000, vec![20])] {
            let mut seen = Vec::new();
            let mut visit = |block: &SkipBlock<'_>| {
                if let Bounds::Int(low, _) = block.get(0).bounds {
                    seen.push(low);
                }
                Ok(())
            };
            cursor.blocks(TopicNo(topic), &mut visit).expect("blocks");
            assert_eq!(seen, expected, "topic {topic}");
        }
    }

    #[test]
    fn a_chunk_costs_sixteen_bytes_where_counts_are_equal() {
        let all: Vec<FieldStats> = (0..256).map(|n| stats(Bounds::Int(n, n + 1))).collect();
        let bytes = SkipBlock::pack(&all.iter().collect::<Vec<_>>()).expect("packs");
        assert!(bytes.len() <= 256 * 16 + 16, "{} bytes", bytes.len());
    }
}
