//! What becomes of the files: sealing, links for people, removal, and the pass at start.
//!
//! Guarantees: INV-5, every file is owned by a catalog record or removed here, and a second pass
//! finds nothing to do; INV-1, no committed chunk is touched: an open segment is cut behind its
//! last committed chunk, never before. Runs on the steward thread.

use crate::catalog::Look;
use crate::catalog::records::{SegmentRecord, SequenceRecord, TopicRecord};
use crate::chunk::stats::FieldStats;
use crate::chunk::{ChunkRecord, Compression};
use crate::disk::{Disk, Folders, IoCounters, make_dirs};
use crate::error::{Result, StorageError};
use crate::files::Entry;
use crate::ids::{SegmentId, SequenceId};
use crate::limits::RING_BUFFER_BYTES;
use crate::manifest;
use crate::rebuild::Rebuilt;
use crate::reclaim::Reclaim;
use crate::schema::TopicSchema;
use crate::segment::{self, FooterFacts, Head, TopicFacts};
use crate::volumes::{self, Orphan, OrphanKind, Volumes};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// What the start found of one topic and did about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicReceipt {
    /// The topic.
    pub locator: String,
    /// Whether it is locked; an interrupted one keeps its durable prefix and may go on.
    pub locked: bool,
    /// Durable rows.
    pub rows: u64,
    /// Durable batches.
    pub batches: u64,
    /// Chunks that were whole in the files and not in the catalog.
    pub adopted_chunks: u64,
    /// Rows in them.
    pub adopted_rows: u64,
    /// Bytes in files behind the last chunk: written and never acknowledged.
    pub discarded_bytes: u64,
    /// Chunks that are left out because their bytes are damaged.
    pub damaged_chunks: u64,
    /// Whether segments were sealed.
    pub sealed: bool,
    /// Why they could not be.
    pub unsealed: Option<String>,
}

/// What a start found and did, as it is logged and kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// When, in nanoseconds since 1970.
    pub at_ns: i64,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// Why the catalog was made again from the files, if it was.
    pub catalog_was: Option<String>,
    /// What came back then.
    pub rebuilt: Option<Rebuilt>,
    /// The interrupted topics, and others that were not at rest.
    pub topics: Vec<TopicReceipt>,
    /// Deletions that were finished.
    pub deletions_finished: u64,
    /// What no record owned.
    pub orphans_removed: Vec<PathBuf>,
}

impl Receipt {
    /// Whether there was nothing to do and nothing to tell.
    pub fn is_empty(&self) -> bool {
        let Self { catalog_was, rebuilt, topics, deletions_finished, orphans_removed, .. } = self;
        catalog_was.is_none()
            && rebuilt.is_none()
            && topics.is_empty()
            && *deletions_finished == 0
            && orphans_removed.is_empty()
    }
}

/// Seals a topic's open segments below a number, or all; a topic that has none at all then gets an
/// empty one, so that it has a file.
/// Returns the records to commit. Sealing again what a crash left sealed on disk is harmless.
///
/// # Errors
/// When a file cannot be written or the catalog cannot be read.
pub async fn seal_topic<D: Disk>(
    disk: &D,
    look: &impl Look,
    data_dir: &Path,
    topic: &TopicRecord,
    below: Option<u32>,
    counters: &IoCounters,
) -> Result<Vec<SegmentRecord>> {
    // As it is now: it may have been locked, or deleted, since it was asked for.
    let Some(topic) = &look.topic(topic.no)? else {
        return Ok(Vec::new());
    };
    let Some(facts) = TopicFacts::load(look, topic)? else {
        return Ok(Vec::new());
    };
    let schema = TopicSchema::accepted(crate::schema::from_ipc(&facts.schema)?)?;
    let mut segments = look.segments(topic.no)?;
    if segments.is_empty() && below.is_none() {
        segments.push(create_empty(disk, data_dir, facts, counters).await?);
    }
    segments.retain(|segment| segment.sealed_length.is_none() && below.is_none_or(|below| segment.no < below));
    if segments.is_empty() {
        return Ok(segments);
    }
    let chunks = look.chunks(topic.no)?;
    let sequence = look.sequence(topic.sequence)?.map_or_else(String::new, |record| record.name);
    let encoder = schema.encoder(Compression::None)?;
    for record in &mut segments {
        let of_segment: Vec<(ChunkRecord, Vec<FieldStats>)> = chunks
            .iter()
            .filter(|chunk| chunk.segment == record.no)
            .map(|chunk| {
                Ok((chunk.clone(), look.skip(topic.no, chunk.first_row)?.map(|skip| skip.fields).unwrap_or_default()))
            })
            .collect::<Result<_>>()?;
        let facts = FooterFacts {
            sequence: sequence.clone(),
            locator: topic.locator.clone(),
            ids: [topic.sequence.to_string(), topic.session.to_string(), topic.id.to_string()],
            ontology_tag: topic.ontology_tag.clone(),
            format: topic.format,
            user_metadata: topic.user_metadata.clone(),
            segment: record.no,
            completed_at_ns: topic.completed_at_ns,
        };
        let footer = segment::footer(&schema.stored, encoder.descriptor(), &of_segment, &facts)?;
        let path = segment::topic_dir(data_dir, topic.sequence, topic.id).join(segment::file_name(record.no));
        write_footer(disk, &path, record.end_offset, &footer, counters).await?;
        record.sealed_length = Some(record.end_offset + footer.len() as u64);
    }
    Ok(segments)
}

/// The only segment of a topic without rows.
async fn create_empty<D: Disk>(
    disk: &D,
    data_dir: &Path,
    facts: TopicFacts,
    counters: &IoCounters,
) -> Result<SegmentRecord> {
    let dir = segment::topic_dir(data_dir, facts.topic.sequence, facts.topic.id);
    let path = dir.join(segment::file_name(0));
    let head = Head { segment: 0, segment_id: SegmentId::random(), epoch: 0, facts };
    let folders = Folders::default();
    // One that is there was left by a crash between this and the commit of its record.
    disk.remove_file(&path).await.map_err(|error| StorageError::io("remove", &path, error))?;
    let (_, end_offset) = create_segment(disk, &folders, (data_dir, data_dir, &dir), &path, &head, counters).await?;
    Ok(SegmentRecord { no: 0, id: head.segment_id, epoch: 0, end_offset, sealed_length: None })
}

/// Makes a segment file with its head; its name, folder and new parents are durable on return, its head with the next
/// sync of the file, which is its first chunk's or its footer's. Returns the file and where its first chunk goes. `home`
/// is the volume's root that a new folder goes to.
///
/// # Errors
/// When one of them cannot be made, or the file exists.
pub async fn create_segment<D: Disk>(
    disk: &D,
    folders: &Folders,
    (data_dir, home, dir): (&Path, &Path, &Path),
    path: &Path,
    head: &Head,
    counters: &IoCounters,
) -> Result<(D::File, u64)> {
    let head = head.encode()?;
    let made = volumes::make_topic_dir(disk, folders, data_dir, home, dir).await;
    made.map_err(|error| StorageError::io("make folder", dir, error))?;
    let file = disk.create(path).await.map_err(|error| StorageError::io("create", path, error))?;
    let first_chunk = write_padded(disk, &file, path, 0, &head).await?;
    disk.sync_dir(dir).await.map_err(|error| StorageError::io("sync folder", dir, error))?;
    IoCounters::add(&counters.footer, first_chunk);
    Ok((file, first_chunk))
}

async fn write_footer<D: Disk>(disk: &D, path: &Path, at: u64, footer: &[u8], counters: &IoCounters) -> Result<()> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    let written = write_padded(disk, &file, path, at, footer).await?;
    IoCounters::add(&counters.footer, written);
    // Makes the footer durable with the size: nothing calls the segment sealed before both are.
    disk.truncate(&file, at + footer.len() as u64).await.map_err(|error| StorageError::io("truncate", path, error))
}

/// Writes bytes at a block-aligned offset, zeros up to the next block; returns the bytes written.
async fn write_padded<D: Disk>(disk: &D, file: &D::File, path: &Path, at: u64, bytes: &[u8]) -> Result<u64> {
    let mut place = at;
    for piece in bytes.chunks(RING_BUFFER_BYTES) {
        let mut buf = disk.buffer().await;
        let padded = usize::try_from(segment::block_ceil(piece.len() as u64)).unwrap_or(RING_BUFFER_BYTES);
        if let Some(into) = buf.get_mut(..padded) {
            let (data, zeros) = into.split_at_mut(piece.len());
            data.copy_from_slice(piece);
            zeros.fill(0);
        }
        let (result, _buf) = disk.write(file, buf, padded, place).await;
        result.map_err(|error| StorageError::io("write", path, error))?;
        place += padded as u64;
    }
    Ok(place - at)
}

/// Gives the files of a locked sequence their readable names: `browse/<sequence>/<topic>/…`.
///
/// # Errors
/// When a link cannot be made.
pub async fn link_browse<D: Disk>(
    disk: &D,
    look: &impl Look,
    data_dir: &Path,
    sequence: &SequenceRecord,
) -> Result<()> {
    for topic in look.topics_of(sequence.id)? {
        if topic.completed_at_ns.is_none() {
            continue;
        }
        let target = browse_dir(data_dir, &topic.locator);
        make_dirs(disk, data_dir, &target).await.map_err(|error| StorageError::io("make folder", &target, error))?;
        let source = segment::topic_dir(data_dir, topic.sequence, topic.id);
        // A file on another volume can have no second name here.
        let elsewhere = volumes::link(disk, &source).await?.is_some();
        let up: PathBuf = std::iter::repeat_n("..", topic.locator.split('/').count() + 1).collect();
        for segment in look.segments(topic.no)? {
            let name = segment::file_name(segment.no);
            let to = target.join(&name);
            let linked = if elsewhere {
                let by_name = source.strip_prefix(data_dir).unwrap_or(&source).join(&name);
                disk.symlink(&up.join(by_name), &to).await
            } else {
                disk.link(&source.join(&name), &to).await
            };
            linked.map_err(|error| StorageError::io("link", &to, error))?;
        }
        disk.sync_dir(&target).await.map_err(|error| StorageError::io("sync folder", &target, error))?;
    }
    Ok(())
}

/// Folder of a topic or sequence in `browse/`. Locators are checked on creation: no `..`, no empty part.
pub fn browse_dir(data_dir: &Path, locator: &str) -> PathBuf {
    data_dir.join("browse").join(locator)
}

/// Folders of a deletion that could not be removed yet, and why.
#[derive(Debug)]
pub struct Waiting {
    /// Names as they were given.
    pub folders: Vec<String>,
    /// The first cause.
    pub cause: StorageError,
}

/// Removes folders of a deletion, with the folders' parents made durable. A name that ends in `/*`
/// means the files in that folder, and the folder only if nothing else is in it: another topic's
/// folder may lie below. Returns those that wait for a volume; the others go all the same, because deleting makes room.
/// Large files leave their space to `reclaim`.
///
/// # Errors
/// When one cannot be removed; the deletion's record then stays, and the next start tries again.
pub async fn remove_folders<D: Disk>(
    disk: &D,
    volumes: &Volumes,
    folders: &[String],
    reclaim: &Reclaim,
) -> Result<Option<Waiting>> {
    let mut waiting: Option<Waiting> = None;
    for folder in folders {
        if folder.starts_with("sequences/")
            && let Err(cause) = volumes::remove_behind(disk, volumes, folder, reclaim).await
        {
            let waiting = waiting.get_or_insert(Waiting { folders: Vec::new(), cause });
            waiting.folders.push(folder.clone());
        } else {
            remove_folder(disk, volumes.data_dir(), folder, reclaim).await?;
        }
    }
    Ok(waiting)
}

async fn remove_folder<D: Disk>(disk: &D, data_dir: &Path, folder: &str, reclaim: &Reclaim) -> Result<()> {
    let (path, only_files) = match folder.strip_suffix("/*") {
        Some(folder) => (data_dir.join(folder), true),
        None => (data_dir.join(folder), false),
    };
    let mut remains = false;
    if only_files {
        for entry in list(disk, &path).await? {
            remains |= entry.is_dir;
            if !entry.is_dir {
                let kept = disk.keep_open(&entry.path);
                remove_file(disk, &entry.path).await?;
                reclaim.take(kept);
            }
        }
    }
    if !remains {
        let kept = disk.keep_open(&path);
        disk.remove_dir(&path).await.map_err(|error| StorageError::io("remove", &path, error))?;
        reclaim.take(kept);
    }
    let Some(parent) = path.parent() else { return Ok(()) };
    match disk.sync_dir(parent).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StorageError::io("sync folder", parent, error))
        }
        _ => Ok(()),
    }
}

/// The files in a topic's folder.
///
/// # Errors
/// When it cannot be listed.
pub async fn files_of<D: Disk>(disk: &D, data_dir: &Path, topic: &TopicRecord) -> Result<Vec<PathBuf>> {
    let dir = segment::topic_dir(data_dir, topic.sequence, topic.id);
    Ok(list(disk, &dir).await?.into_iter().map(|entry| entry.path).collect())
}

/// Removes those of a topic's files that have no record: written for an upload that failed, or not committed
/// when the recorder died. Returns the bytes they held.
///
/// `files` are those that were there *before* it was known that nobody writes the topic: an upload that
/// begins meanwhile passes over every name that is taken, so its file is none of them.
///
/// # Errors
/// When one cannot be removed.
pub async fn remove_uncommitted<D: Disk>(disk: &D, files: Vec<PathBuf>, records: &[SegmentRecord]) -> Result<u64> {
    let owned = |path: &Path| records.iter().any(|record| path.ends_with(segment::file_name(record.no)));
    let mut bytes = 0;
    for path in files.into_iter().filter(|path| !owned(path)) {
        bytes += disk.length(&path).await.unwrap_or(0);
        remove_file(disk, &path).await?;
    }
    Ok(bytes)
}

/// Folders under `sequences/` that no record owns, to be removed: sequences, and the topics of a sequence. On the
/// other volumes also those that no link names.
///
/// # Errors
/// When a folder cannot be listed or the catalog cannot be read.
pub async fn orphans<D: Disk>(
    disk: &D,
    look: &impl Look,
    volumes: &Volumes,
    unsettled: &[SequenceRecord],
) -> Result<Vec<Orphan>> {
    let data_dir = volumes.data_dir();
    let ids: Vec<SequenceId> = unsettled.iter().map(|sequence| sequence.id).collect();
    let is_known = |id: SequenceId| Ok(look.sequence(id)?.is_some());
    let mut found = volumes::strays(disk, volumes, is_known, &ids).await?;
    let orphan = |path: PathBuf| Orphan { path, kind: OrphanKind::Unknown };
    for entry in list(disk, &data_dir.join("sequences")).await? {
        let id = entry.path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let known = match id {
            Some(id) => look.sequence(SequenceId(id))?.is_some(),
            None => false,
        };
        // What leads to a volume that is not there is known again when it is.
        if !known && volumes::away_in(disk, volumes, &entry.path).await?.is_none() {
            found.push(orphan(entry.path));
        }
    }
    for sequence in unsettled {
        let dir = segment::sequence_dir(data_dir, sequence.id);
        let mut owned: HashSet<PathBuf> = look
            .topics_of(sequence.id)?
            .iter()
            .map(|topic| segment::topic_dir(data_dir, topic.sequence, topic.id))
            .collect();
        owned.insert(manifest::path(data_dir, sequence.id));
        for entry in list(disk, &dir).await?.into_iter().filter(|entry| !owned.contains(&entry.path)) {
            if entry.is_link && volumes::away_in(disk, volumes, &entry.path).await?.is_some() {
                continue;
            }
            // What it points to goes first: afterwards nothing would name it.
            found.extend(volumes::behind(disk, volumes, &entry.path).await?.map(orphan));
            found.push(orphan(entry.path));
        }
    }
    Ok(found)
}

/// Removes a file or folder that nobody owns.
///
/// # Errors
/// When it cannot be removed.
pub async fn remove_orphan<D: Disk>(disk: &D, path: &Path) -> Result<()> {
    // A file is told from a folder by what the system says to the first of the two.
    match disk.remove_dir(path).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => remove_file(disk, path).await,
        other => other.map_err(|error| StorageError::io("remove", path, error)),
    }
}

async fn remove_file<D: Disk>(disk: &D, path: &Path) -> Result<()> {
    disk.remove_file(path).await.map_err(|error| StorageError::io("remove", path, error))
}

async fn list<D: Disk>(disk: &D, dir: &Path) -> Result<Vec<Entry>> {
    disk.list(dir).await.map_err(|error| StorageError::io("list", dir, error))
}
