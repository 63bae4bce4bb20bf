//! A catalog made again from the files alone: manifests of finalized recordings, heads and trailers of
//! everything else.
//!
//! Guarantees: every finalized sequence comes back with its metadata and its index; of open topics every
//! chunk that is whole comes back, up to the first that is missing (INV-2); tails depend on the catalog alone
//! and are gone, unless an old catalog that can still be read gives them (`salvage`). A file that says
//! nothing of itself, or has whole chunks behind one that is missing, is never removed: it is kept in
//! `lost+found/`.

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
use crate::segment::{self, Head, TopicFacts};
use crate::volumes::{self, Role, Volumes};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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

/// Numbers that are left out for topics on volumes that are not there.
const AWAY_TOPICS_MAX: u64 = 1 << 32;

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
    volumes: &Volumes,
    into: &Catalog,
    now_ns: i64,
    progress: &mut dyn FnMut(&Rebuilt),
) -> Result<Rebuilt> {
    let mut done = Rebuilt::default();
    let mut next_topic = 1;
    for away in volumes.all().iter().filter(|volume| volume.role == Role::Away) {
        done.missing.push(format!(
            "{}: what lies on this volume, which is not there: run `flightbox recover` when it is",
            away.root.display()
        ));
    }
    // A sick disk does not keep the others' recordings from coming back.
    done.missing.extend(volumes::relink(disk, volumes).await.1.iter().map(ToString::to_string));
    for entry in list(disk, &volumes.data_dir().join("sequences")).await? {
        let topics = sequence(disk, volumes, into, &entry, now_ns, &mut done).await?;
        next_topic = next_topic.max(topics);
        progress(&done);
    }
    if volumes.all().iter().any(|volume| volume.role == Role::Away) {
        // The topics that are not there have numbers that nobody else may get.
        next_topic += AWAY_TOPICS_MAX;
    }
    let mut group = into.group()?;
    group.change(|txn| txn.put(Family::Meta, keys::NEXT_TOPIC.to_vec(), &next_topic))?;
    group.commit()?;
    Ok(done)
}

/// One folder below `sequences/`; returns the number that the next topic may have.
async fn sequence<D: Disk>(
    disk: &D,
    volumes: &Volumes,
    into: &Catalog,
    folder: &Entry,
    now_ns: i64,
    done: &mut Rebuilt,
) -> Result<u64> {
    let name = folder.path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let Some(id) = name.parse().ok().map(SequenceId).filter(|_| folder.is_dir) else {
        set_aside(disk, volumes, &folder.path, done).await?;
        return Ok(1);
    };
    let manifest = manifest::read(disk, volumes, id).await;
    let mut locked: BTreeMap<TopicId, LockedTopic> = manifest
        .iter()
        .flat_map(|manifest| manifest.topics.iter().cloned())
        .map(|topic| (topic.record.id, topic))
        .collect();
    let mut topics = Vec::new();
    for entry in list(disk, &folder.path).await? {
        if entry.path == manifest::path(volumes.data_dir(), id) {
            continue;
        }
        if !entry.is_dir && !entry.is_link {
            set_aside(disk, volumes, &entry.path, done).await?;
            continue;
        }
        let name = entry.path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        let known = name.parse().ok().map(TopicId).and_then(|id| locked.remove(&id));
        // A link whose volume is not there stays, and so does what is locked behind it: its rows are missing until the
        // catalog is made once more, with the volume.
        if !entry.is_dir && known.is_none() {
            done.missing.push(format!("{}: its volume is not there", entry.path.display()));
            continue;
        }
        match topic(disk, volumes, &entry.path, known, done).await? {
            Some(topic) => topics.push(topic),
            None => set_aside(disk, volumes, &entry.path, done).await?,
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

/// What the files of a topic's folder say.
#[derive(Default)]
struct FilesOfTopic {
    /// Files with a whole head, by number, and where their first chunk begins.
    heads: BTreeMap<u32, (PathBuf, Head, u64)>,
    /// Files without one.
    silent: Vec<PathBuf>,
}

async fn files_of_topic<D: Disk>(disk: &D, dir: &Path, done: &mut Rebuilt) -> FilesOfTopic {
    let mut files = FilesOfTopic::default();
    let entries = match list(disk, dir).await {
        Ok(entries) => entries,
        Err(error) => {
            done.missing.push(error.to_string());
            return files;
        }
    };
    for entry in entries {
        match (segment_no(&entry.path), found::head(disk, &entry.path).await) {
            (Some(no), Ok(Some((head, end)))) => drop(files.heads.insert(no, (entry.path, head, end))),
            (_, Err(error)) => done.missing.push(format!("{}: {error}", entry.path.display())),
            // A file of another name than ours counts for nothing, whatever is in it.
            (_, Ok(_)) => files.silent.push(entry.path),
        }
    }
    files
}

/// One topic's folder; `None` when nothing in it says whose it is.
async fn topic<D: Disk>(
    disk: &D,
    volumes: &Volumes,
    dir: &Path,
    locked: Option<LockedTopic>,
    done: &mut Rebuilt,
) -> Result<Option<Topic>> {
    let FilesOfTopic { heads, silent } = files_of_topic(disk, dir, done).await;
    let facts = locked.as_ref().and_then(|locked| locked.facts.clone());
    let facts = facts.or_else(|| heads.values().next().map(|(_, head, _)| head.facts.clone()));
    let Some(facts) = facts else { return Ok(None) };
    // A head that rotted hides nothing: trailers say whose they are as well.
    let places = heads.values().map(|(path, _, end)| (path, *end)).chain(silent.iter().map(|path| (path, 0)));
    let mut candidates = Vec::new();
    for (path, from) in places {
        match found::of_file(disk, path, facts.topic.no, from).await {
            Ok(found) => candidates.extend(found),
            Err(error) => done.missing.push(format!("{}: {error}", path.display())),
        }
    }
    // A footer that says so was written after the lock was durable, whichever segment's it is: a crash may have met
    // the sealing of the others, and what lies behind a gap is moved away next.
    let mut completed = None;
    let ours = silent.iter().filter(|path| segment_no(path).is_some());
    for path in heads.values().map(|(path, _, _)| path).chain(ours) {
        completed = completed.or(found::completed_at(disk, path).await);
    }
    let mut topic = match locked {
        Some(locked) => locked_topic(facts, locked, candidates),
        None => open_topic(disk, volumes, facts, candidates, done).await?,
    };
    if topic.locked.is_none() {
        topic.record.completed_at_ns = topic.record.completed_at_ns.or(completed);
        // A topic that never had a row has one segment, without a chunk.
        if let Some((no, (path, head, end_offset))) = heads.iter().next_back().filter(|_| topic.segments.is_empty())
            && found::completed_at(disk, path).await.is_some()
        {
            let (id, epoch, end_offset) = (head.segment_id, head.epoch, *end_offset);
            topic.segments.push(SegmentRecord { no: *no, id, epoch, end_offset, sealed_length: None });
        }
    }
    for path in silent {
        let used = topic.segments.iter().any(|segment| path.ends_with(segment::file_name(segment.no)));
        if !used && disk.length(&path).await.is_ok() {
            set_aside(disk, volumes, &path, done).await?;
        }
    }
    Ok(Some(topic))
}

/// What was locked is known to the row: chunks that are missing leave a hole that is told.
fn locked_topic(facts: TopicFacts, locked: LockedTopic, mut chunks: Vec<Found>) -> Topic {
    chunks.retain(|found| locked.segments.iter().any(|known| known.id == found.trailer.record.segment_id));
    chunks.sort_by_key(|found| (found.trailer.record.first_row, found.trailer.record.segment));
    chunks.dedup_by_key(|found| found.trailer.record.first_row);
    let (record, segments) = (locked.record.clone(), locked.segments.clone());
    Topic { record, facts: Some(facts), locked: Some(locked), segments, chunks }
}

/// What may still grow keeps a prefix. Whole chunks behind a gap are kept for people, in `lost+found/`.
async fn open_topic<D: Disk>(
    disk: &D,
    volumes: &Volumes,
    facts: TopicFacts,
    candidates: Vec<Found>,
    done: &mut Rebuilt,
) -> Result<Topic> {
    let mut chunks: Vec<Found> = Vec::new();
    for found in found::chain(candidates.clone(), (0, 0), &Vec::new()) {
        if !found::is_whole(disk, &found.path, &found.trailer.record).await.unwrap_or(false) {
            break;
        }
        chunks.push(found);
    }
    if let Err(error) = found::settle(disk, &chunks).await {
        done.missing.push(format!("{}: {error}: a power cut may take what was written last", facts.topic.locator));
    }
    let mut segments: BTreeMap<u32, SegmentRecord> = BTreeMap::new();
    for record in chunks.iter().map(|found| &found.trailer.record) {
        let ending = SegmentRecord::ending_with(record);
        let segment = segments.entry(record.segment).or_insert(ending);
        segment.end_offset = segment.end_offset.max(ending.end_offset);
    }
    let end = chunks.last().map_or(0, |found| found.trailer.record.end_batch);
    let behind: BTreeSet<&PathBuf> =
        candidates.iter().filter(|found| end <= found.trailer.record.first_batch).map(|found| &found.path).collect();
    if !behind.is_empty() {
        let topic = &facts.topic.locator;
        done.missing.push(format!(
            "{topic}: from batch {end} on: the chunk there is damaged or was never whole; files with what lies behind it are in lost+found"
        ));
    }
    for path in behind {
        let in_use = chunks.iter().any(|found| found.path == *path);
        if in_use { keep_copy(disk, volumes, path, done).await? } else { set_aside(disk, volumes, path, done).await? }
    }
    Ok(Topic {
        record: facts.topic.clone(),
        facts: Some(facts),
        locked: None,
        segments: segments.into_values().collect(),
        chunks,
    })
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
    // The index has all of a topic's chunks or none: one without statistics (format 2) would shift the others.
    let indexed = topic.chunks.iter().all(|found| !found.trailer.fields.is_empty());
    for found in &topic.chunks {
        let record = &found.trailer.record;
        let fields = if indexed { found.trailer.fields.clone() } else { Vec::new() };
        txn.put_chunk(no, record, &SkipRecord { fields }, true)?;
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

/// Where a path lies in truth, and where it is kept when it is of no use there; the folders above that are made.
async fn lost_and_found<D: Disk>(disk: &D, volumes: &Volumes, path: &Path) -> Result<(PathBuf, PathBuf)> {
    let real = volumes::real(disk, volumes, path).await?;
    let (root, to) = volumes::lost_and_found(volumes, &real);
    if let Some(parent) = to.parent() {
        volumes
            .folders
            .make(disk, &root, parent)
            .await
            .map_err(|error| StorageError::io("make folder", parent, error))?;
    }
    Ok((real, to))
}

async fn keep_copy<D: Disk>(disk: &D, volumes: &Volumes, path: &Path, done: &mut Rebuilt) -> Result<()> {
    let (real, to) = lost_and_found(disk, volumes, path).await?;
    disk.copy(&real, &to).await.map_err(|error| StorageError::io("copy", path, error))?;
    done.moved.push(to);
    Ok(())
}

async fn set_aside<D: Disk>(disk: &D, volumes: &Volumes, path: &Path, done: &mut Rebuilt) -> Result<()> {
    let moved = async {
        let (real, to) = lost_and_found(disk, volumes, path).await?;
        disk.rename(&real, &to).await.map_err(|error| StorageError::io("move", path, error))?;
        if volumes::link(disk, path).await?.is_some() {
            disk.remove_file(path).await.map_err(|error| StorageError::io("remove", path, error))?;
        }
        Ok::<_, StorageError>(to)
    };
    match moved.await {
        Ok(to) => done.moved.push(to),
        // It stays where it is; that of another volume does not keep the rest from coming back.
        Err(error) if volumes::real(disk, volumes, path).await? != path => done.missing.push(error.to_string()),
        Err(error) => return Err(error),
    }
    Ok(())
}

async fn list<D: Disk>(disk: &D, dir: &Path) -> Result<Vec<Entry>> {
    disk.list(dir).await.map_err(|error| StorageError::io("list", dir, error))
}
