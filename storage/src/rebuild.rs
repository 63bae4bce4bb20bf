//! A catalog made again from the files alone: manifests of finalized recordings, heads and trailers of
//! everything else.
//!
//! Guarantees: every finalized sequence comes back with its metadata and its index; of open topics every
//! chunk that is whole comes back, up to the first that is missing (INV-2); tails depend on the catalog alone
//! and are gone, unless an old catalog that can still be read gives them (`salvage`). A file that says
//! nothing of itself is never removed: it moves to `lost+found/`.

use crate::catalog::keys::{self, Family};
use crate::catalog::records::{
    DamageRecord, SegmentRecord, SequenceRecord, SessionRecord, TopicOntology, TopicRecord, TopicTotals,
};
use crate::catalog::{Catalog, Txn};
use crate::chunk::record::SkipRecord;
use crate::disk::Disk;
use crate::error::{Result, StorageError};
use crate::files::Entry;
use crate::found::{self, Found, segment_no};
use crate::ids::{SequenceId, TopicId, TopicNo};
use crate::manifest::{self, LockedTopic, Manifest};
use crate::read::read_range;
use crate::segment::{self, TopicFacts, footer_is_whole};
use parquet::file::metadata::ParquetMetaDataReader;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What came back and what did not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuilt {
    /// Sequences that came back.
    pub sequences: u64,
    /// Topics that came back.
    pub topics: u64,
    /// Chunks that came back.
    pub chunks: u64,
    /// Rows in them.
    pub rows: u64,
    /// What is known to be missing, a line each.
    pub missing: Vec<String>,
    /// Files that say nothing of themselves, moved here.
    pub moved: Vec<PathBuf>,
}

/// Everything of one topic that its files tell.
struct Topic {
    record: TopicRecord,
    facts: Option<TopicFacts>,
    locked: Option<LockedTopic>,
    segments: Vec<SegmentRecord>,
    chunks: Vec<Found>,
}

/// Reads all files below `sequences/` and fills an empty catalog, one group a sequence.
///
/// # Errors
/// When a folder cannot be listed or the new catalog cannot be written; a file that cannot be read is
/// reported and passed over.
pub async fn rebuild<D: Disk>(
    disk: &D,
    data_dir: &Path,
    into: &Catalog,
    now_ns: i64,
    progress: &mut dyn FnMut(&Rebuilt),
) -> Result<Rebuilt> {
    let mut done = Rebuilt::default();
    let mut next_topic = 1;
    for entry in list(disk, &data_dir.join("sequences")).await? {
        let topics = sequence(disk, data_dir, into, &entry, now_ns, &mut done).await?;
        next_topic = next_topic.max(topics);
        progress(&done);
    }
    let mut group = into.group()?;
    group.change(|txn| txn.put(Family::Meta, keys::NEXT_TOPIC.to_vec(), &next_topic))?;
    group.commit()?;
    Ok(done)
}

/// One folder below `sequences/`; returns the number that the next topic may have.
async fn sequence<D: Disk>(
    disk: &D,
    data_dir: &Path,
    into: &Catalog,
    folder: &Entry,
    now_ns: i64,
    done: &mut Rebuilt,
) -> Result<u64> {
    let name = folder.path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let Some(id) = name.parse().ok().map(SequenceId).filter(|_| folder.is_dir) else {
        set_aside(disk, data_dir, &folder.path, done).await?;
        return Ok(1);
    };
    let manifest = disk.read_small(&manifest::path(data_dir, id)).await.ok().flatten();
    let manifest = manifest.and_then(|bytes| Manifest::decode(&bytes)).filter(|manifest| manifest.sequence.id == id);
    let mut locked: BTreeMap<TopicId, LockedTopic> = manifest
        .iter()
        .flat_map(|manifest| manifest.topics.iter().cloned())
        .map(|topic| (topic.record.id, topic))
        .collect();
    let mut topics = Vec::new();
    for entry in list(disk, &folder.path).await? {
        if entry.path == manifest::path(data_dir, id) {
            continue;
        }
        let name = entry.path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        let known = name.parse().ok().map(TopicId).and_then(|id| locked.remove(&id));
        match topic(disk, &entry.path, known, done).await? {
            Some(topic) => topics.push(topic),
            None => set_aside(disk, data_dir, &entry.path, done).await?,
        }
    }
    // Without a folder: a topic that never had a DoPut, or one whose deletion removed its files.
    for (_, topic) in locked {
        if topic.facts.is_none() {
            topics.push(Topic {
                record: topic.record.clone(),
                facts: None,
                locked: Some(topic),
                segments: Vec::new(),
                chunks: Vec::new(),
            });
        }
    }
    let from_heads = topics.iter().find_map(|topic| topic.facts.as_ref()).map(|facts| facts.sequence.clone());
    let Some(record) = manifest.as_ref().map(|manifest| manifest.sequence.clone()).or(from_heads) else {
        return Ok(1);
    };
    let mut group = into.group()?;
    group.change(|txn| put_sequence(txn, &record, manifest.as_ref(), &topics))?;
    for topic in &topics {
        group.change(|txn| put_topic(txn, topic, now_ns, done))?;
    }
    group.commit()?;
    done.sequences += 1;
    done.topics += topics.len() as u64;
    Ok(topics.iter().map(|topic| topic.record.no.0 + 1).max().unwrap_or(1))
}

/// One topic's folder; `None` when nothing in it says whose it is.
async fn topic<D: Disk>(
    disk: &D,
    dir: &Path,
    locked: Option<LockedTopic>,
    done: &mut Rebuilt,
) -> Result<Option<Topic>> {
    let mut facts = locked.as_ref().and_then(|locked| locked.facts.clone());
    let mut heads = BTreeMap::new();
    let mut silent = Vec::new();
    for entry in list(disk, dir).await? {
        let no = segment_no(&entry.path);
        match (no, found::head(disk, &entry.path).await) {
            (Some(no), Ok(Some((head, end)))) => {
                facts.get_or_insert_with(|| head.facts.clone());
                heads.insert(no, (entry.path, head, end));
            }
            (_, Err(error)) => done.missing.push(format!("{}: {error}", entry.path.display())),
            // A file of another name than ours counts for nothing, whatever is in it.
            (no, Ok(_)) => silent.push((no, entry.path)),
        }
    }
    let Some(facts) = facts else { return Ok(None) };
    let mut segments = Vec::new();
    let mut candidates = Vec::new();
    for (no, (path, head, end)) in &heads {
        match found::of_file(disk, path, facts.topic.no, *end).await {
            Ok(found) => candidates.extend(found),
            Err(error) => done.missing.push(format!("{}: {error}", path.display())),
        }
        segments.push(SegmentRecord {
            no: *no,
            id: head.segment_id,
            epoch: head.epoch,
            end_offset: *end,
            sealed_length: None,
        });
    }
    // A head that rotted: where a manifest tells the segment, its chunks are found all the same.
    for (no, path) in silent {
        let known = locked.iter().flat_map(|locked| &locked.segments).find(|segment| Some(segment.no) == no);
        match known {
            Some(segment) => {
                candidates.extend(found::of_file(disk, &path, facts.topic.no, 0).await.unwrap_or_default());
                segments.push(*segment);
            }
            None => done.missing.push(format!("{}: it does not say whose it is", path.display())),
        }
    }
    segments.sort_by_key(|segment| segment.no);
    let mut record = locked.as_ref().map_or_else(|| facts.topic.clone(), |locked| locked.record.clone());
    let chunks = match &locked {
        Some(locked) => {
            // What was locked is known to the row: chunks that are missing leave a hole that is told.
            segments.clone_from(&locked.segments);
            candidates.retain(|found| locked.segments.iter().any(|known| known.id == found.trailer.record.segment_id));
            candidates.sort_by_key(|found| (found.trailer.record.first_row, found.trailer.record.segment));
            candidates.dedup_by_key(|found| found.trailer.record.first_row);
            candidates
        }
        None => {
            let mut whole = Vec::new();
            for found in found::chain(candidates, 0, &Vec::new()) {
                if !found::is_whole(disk, &found.path, &found.trailer.record).await.unwrap_or(false) {
                    let (topic, batch) = (&record.locator, found.trailer.record.first_batch);
                    done.missing.push(format!("{topic}: from batch {batch} on: the chunk there is damaged"));
                    break;
                }
                whole.push(found);
            }
            whole
        }
    };
    if locked.is_none() {
        for segment in &mut segments {
            let ends = chunks.iter().map(|found| &found.trailer.record).filter(|record| record.segment == segment.no);
            let end = ends.map(|record| record.offset + record.padded_length).max();
            segment.end_offset = end.unwrap_or(segment.end_offset);
        }
        // Files behind the last chunk that counts were never committed, or nothing of them is left.
        let last = chunks.last().map_or(0, |found| found.trailer.record.segment);
        let empty = |segment: &SegmentRecord| !chunks.iter().any(|found| found.trailer.record.segment == segment.no);
        record.completed_at_ns = match heads.get(&last) {
            Some((path, ..)) => completed_at(disk, path, &segments, last).await,
            None => None,
        };
        segments.retain(|segment| !empty(segment) || (record.completed_at_ns.is_some() && segment.no == last));
    }
    Ok(Some(Topic { record, facts: Some(facts), locked, segments, chunks }))
}

/// When the topic was locked, as the footer of its last segment has it.
async fn completed_at<D: Disk>(disk: &D, path: &Path, segments: &[SegmentRecord], last: u32) -> Option<i64> {
    let at = segments.iter().find(|segment| segment.no == last)?.end_offset;
    let length = disk.length(path).await.ok()?;
    let footer = read_range(disk, path, at, length.checked_sub(at)?).await.ok()?;
    if footer_is_whole(&footer) != Some(true) {
        return None;
    }
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&footer).ok()?;
    let pairs = metadata.file_metadata().key_value_metadata()?;
    pairs.iter().find(|pair| pair.key == segment::COMPLETED_KEY)?.value.as_ref()?.parse().ok()
}

fn put_sequence(
    txn: &mut Txn<'_>,
    record: &SequenceRecord,
    manifest: Option<&Manifest>,
    topics: &[Topic],
) -> Result<()> {
    txn.put_sequence(record)?;
    let mut sessions: BTreeMap<_, SessionRecord> = BTreeMap::new();
    for session in topics.iter().filter_map(|topic| topic.facts.as_ref()).map(|facts| &facts.session) {
        sessions.insert(session.id, session.clone());
    }
    // The manifest's word is the later one.
    for session in manifest.iter().flat_map(|manifest| &manifest.sessions) {
        sessions.insert(session.id, session.clone());
    }
    for session in sessions.values() {
        txn.put_session(session)?;
    }
    for (no, notification) in (0_u64..).zip(manifest.iter().flat_map(|manifest| &manifest.notifications)) {
        txn.put(Family::Notifications, keys::notification(record.id, TopicNo(0), no), notification)?;
    }
    Ok(())
}

fn put_topic(txn: &mut Txn<'_>, topic: &Topic, now_ns: i64, done: &mut Rebuilt) -> Result<()> {
    let no = topic.record.no;
    txn.put_topic(&topic.record)?;
    if let Some(facts) = &topic.facts {
        txn.put_bytes(Family::Topics, keys::topic_schema(no), facts.schema.clone());
        let of_topic = TopicOntology { version: facts.ontology.version, note: facts.note.clone() };
        txn.put(Family::Topics, keys::topic_ontology(no), &of_topic)?;
        let ontology = &facts.ontology;
        txn.put(Family::Ontologies, keys::ontology(&ontology.tag, ontology.version), ontology)?;
    }
    for segment in &topic.segments {
        txn.put(Family::Segments, keys::segment(no, segment.no), segment)?;
    }
    let mut totals = TopicTotals::default();
    for found in &topic.chunks {
        let record = &found.trailer.record;
        txn.put_chunk(no, record, &SkipRecord { fields: found.trailer.fields.clone() })?;
        totals.chunks += 1;
        totals.chunk_batches = record.end_batch;
        totals.chunk_rows = record.end_row;
        totals.data_bytes += record.data_bytes;
        totals.stored_bytes += record.length;
        totals.widen(record.time);
        done.chunks += 1;
        done.rows += record.rows();
    }
    (totals.rows, totals.batches) = (totals.chunk_rows, totals.chunk_batches);
    if let Some(locked) = &topic.locked {
        for (first_row, end_row) in holes(&topic.chunks, locked.totals.rows) {
            let what = "its chunk's trailer is damaged or its file is gone".to_owned();
            done.missing.push(format!("{}: rows {first_row} to {end_row}: {what}", topic.record.locator));
            let damage = DamageRecord { first_row, end_row, time: None, what, found_at_ns: now_ns };
            txn.put(Family::Meta, keys::damaged(no, first_row), &damage)?;
        }
        totals = TopicTotals { chunks: totals.chunks, ..locked.totals };
        if let Some(partial) = &locked.partial {
            txn.put(Family::Topics, keys::topic_partial(no), partial)?;
        }
        for (number, notification) in (0_u64..).zip(&locked.notifications) {
            txn.put(Family::Notifications, keys::notification(topic.record.sequence, no, number), notification)?;
        }
    }
    txn.put(Family::Topics, keys::topic_totals(no), &totals)
}

/// The rows below `rows` that no chunk has. Pure.
fn holes(chunks: &[Found], rows: u64) -> Vec<(u64, u64)> {
    let ends = chunks.iter().map(|found| (found.trailer.record.first_row, found.trailer.record.end_row));
    let mut holes = Vec::new();
    let mut next = 0;
    for (first, end) in ends.chain([(rows, rows)]) {
        if next < first {
            holes.push((next, first));
        }
        next = end.max(next);
    }
    holes
}

async fn set_aside<D: Disk>(disk: &D, data_dir: &Path, path: &Path, done: &mut Rebuilt) -> Result<()> {
    let inside = path.strip_prefix(data_dir).unwrap_or(path);
    let to = data_dir.join("lost+found").join(inside);
    if let Some(parent) = to.parent() {
        crate::disk::make_dirs(disk, data_dir, parent)
            .await
            .map_err(|error| StorageError::io("make folder", parent, error))?;
    }
    disk.rename(path, &to).await.map_err(|error| StorageError::io("move", path, error))?;
    done.moved.push(to);
    Ok(())
}

async fn list<D: Disk>(disk: &D, dir: &Path) -> Result<Vec<Entry>> {
    disk.list(dir).await.map_err(|error| StorageError::io("list", dir, error))
}
