//! What becomes of the files: sealing, links for people, removal, and the pass at start.
//!
//! Guarantees: INV-5, every file is owned by a catalog record or removed here, and a second pass
//! finds nothing to do; INV-1, no committed chunk is touched: an open segment is cut behind its
//! last committed chunk, never before. Runs on the steward thread.

use crate::catalog::Look;
use crate::catalog::records::{SegmentRecord, SequenceRecord, TopicRecord};
use crate::chunk::stats::FieldStats;
use crate::chunk::{ChunkRecord, Compression, TopicEncoder};
use crate::disk::{Disk, Durability, IoCounters, make_dirs};
use crate::error::{Result, StorageError};
use crate::ids::SegmentId;
use crate::limits::RING_BUFFER_BYTES;
use crate::schema::TopicSchema;
use crate::segment::{self, FIRST_CHUNK_OFFSET, FooterFacts};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

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
    let Some(message) = look.topic_schema(topic.no)? else {
        return Ok(Vec::new());
    };
    let schema = TopicSchema::derive(crate::schema::from_ipc(&message)?)?;
    let mut segments = look.segments(topic.no)?;
    if segments.is_empty() && below.is_none() {
        segments.push(SegmentRecord {
            no: 0,
            id: SegmentId::random(),
            epoch: 0,
            end_offset: FIRST_CHUNK_OFFSET,
            sealed_length: None,
        });
        create_empty(disk, data_dir, topic, counters).await?;
    }
    segments.retain(|segment| segment.sealed_length.is_none() && below.is_none_or(|below| segment.no < below));
    if segments.is_empty() {
        return Ok(segments);
    }
    let chunks = look.chunks(topic.no)?;
    let sequence = look.sequence(topic.sequence)?.map_or_else(String::new, |record| record.name);
    let encoder = TopicEncoder::new(&schema.stored, topic.format, Compression::None)?;
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
        };
        let footer = segment::footer(&schema.stored, encoder.descriptor(), &of_segment, &facts)?;
        let path = segment::topic_dir(data_dir, topic.sequence, topic.id).join(segment::file_name(record.no));
        write_footer(disk, &path, record.end_offset, &footer, counters).await?;
        record.sealed_length = Some(record.end_offset + footer.len() as u64);
    }
    Ok(segments)
}

async fn create_empty<D: Disk>(disk: &D, data_dir: &Path, topic: &TopicRecord, counters: &IoCounters) -> Result<()> {
    let dir = segment::topic_dir(data_dir, topic.sequence, topic.id);
    let path = dir.join(segment::file_name(0));
    match create_segment(disk, data_dir, &dir, &path, counters).await {
        // Left by a crash between this and the commit of its record.
        Err(StorageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Makes a segment file with its first block; file, folder and new parents are durable on return.
///
/// # Errors
/// When one of them cannot be made, or the file exists.
pub async fn create_segment<D: Disk>(
    disk: &D,
    data_dir: &Path,
    dir: &Path,
    path: &Path,
    counters: &IoCounters,
) -> Result<D::File> {
    make_dirs(disk, data_dir, dir).await.map_err(|error| StorageError::io("make folder", dir, error))?;
    let file = disk.create(path).await.map_err(|error| StorageError::io("create", path, error))?;
    write_padded(disk, &file, path, 0, &segment::head_block()).await?;
    disk.sync(&file).await.map_err(|error| StorageError::io("sync", path, error))?;
    disk.sync_dir(dir).await.map_err(|error| StorageError::io("sync folder", dir, error))?;
    IoCounters::add(&counters.footer, FIRST_CHUNK_OFFSET);
    Ok(file)
}

async fn write_footer<D: Disk>(disk: &D, path: &Path, at: u64, footer: &[u8], counters: &IoCounters) -> Result<()> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    let written = write_padded(disk, &file, path, at, footer).await?;
    IoCounters::add(&counters.footer, written);
    disk.sync(&file).await.map_err(|error| StorageError::io("sync", path, error))?;
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
        let (result, _buf) = disk.write(file, buf, padded, place, Durability::Later).await;
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
        for segment in look.segments(topic.no)? {
            let name = segment::file_name(segment.no);
            let to = target.join(&name);
            disk.link(&source.join(&name), &to).await.map_err(|error| StorageError::io("link", &to, error))?;
        }
        disk.sync_dir(&target).await.map_err(|error| StorageError::io("sync folder", &target, error))?;
    }
    Ok(())
}

/// Folder of a topic or sequence in `browse/`. Locators are checked on creation: no `..`, no empty part.
pub fn browse_dir(data_dir: &Path, locator: &str) -> PathBuf {
    data_dir.join("browse").join(locator)
}

/// Removes folders of a deletion, with the folders' parents made durable. A name that ends in `/*`
/// means the files in that folder, and the folder only if nothing else is in it: another topic's
/// folder may lie below.
///
/// # Errors
/// When one cannot be removed; the deletion's record then stays, and the next start tries again.
pub async fn remove_folders<D: Disk>(disk: &D, data_dir: &Path, folders: &[String]) -> Result<()> {
    for folder in folders {
        let path = match folder.strip_suffix("/*") {
            Some(folder) => {
                let path = data_dir.join(folder);
                remove_files_in(&path)?;
                path
            }
            None => {
                let path = data_dir.join(folder);
                disk.remove_dir(&path).await.map_err(|error| StorageError::io("remove", &path, error))?;
                path
            }
        };
        if let Some(parent) = path.parent().filter(|parent| parent.is_dir()) {
            disk.sync_dir(parent).await.map_err(|error| StorageError::io("sync folder", parent, error))?;
        }
    }
    Ok(())
}

fn remove_files_in(dir: &Path) -> Result<()> {
    for path in list(dir)? {
        if !path.is_dir() {
            std::fs::remove_file(&path).map_err(|error| StorageError::io("remove", &path, error))?;
        }
    }
    match std::fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty) => {
            Err(StorageError::io("remove", dir, error))
        }
        _ => Ok(()),
    }
}

/// Files and folders under `sequences/` that no record owns, to be removed. Pure over its inputs.
///
/// # Errors
/// When a folder cannot be listed or the catalog cannot be read.
pub fn orphans(look: &impl Look, data_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut owned_dirs = HashSet::new();
    let mut owned_files = HashSet::new();
    for sequence in look.sequences()? {
        owned_dirs.insert(segment::sequence_dir(data_dir, sequence.id));
        for topic in look.topics_of(sequence.id)? {
            let dir = segment::topic_dir(data_dir, topic.sequence, topic.id);
            for segment in look.segments(topic.no)? {
                owned_files.insert(dir.join(segment::file_name(segment.no)));
            }
            owned_dirs.insert(dir);
        }
    }
    let mut found = Vec::new();
    for sequence in list(&data_dir.join("sequences"))? {
        if !owned_dirs.contains(&sequence) {
            found.push(sequence);
            continue;
        }
        for topic in list(&sequence)? {
            if !owned_dirs.contains(&topic) {
                found.push(topic);
                continue;
            }
            found.extend(list(&topic)?.into_iter().filter(|file| !owned_files.contains(file)));
        }
    }
    Ok(found)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StorageError::io("list", dir, error)),
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(|error| StorageError::io("list", dir, error))).collect()
}
