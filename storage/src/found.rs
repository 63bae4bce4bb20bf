//! Chunks found in segment files by what the files say of themselves: heads and trailers, no catalog.
//!
//! Guarantees: a chunk counts only if its trailer is whole, lies where it says, and (where that may be in
//! doubt, see [`is_whole`]) every column has its checksum; what follows what is one pure question
//! ([`chain`]), so a topic keeps a prefix of its batches (INV-2) and no acknowledged one is replaced.

use crate::catalog::Look;
use crate::catalog::records::{SegmentRecord, SequenceRecord, TopicRecord};
use crate::chunk::decode::{ChunkBytes, verify_columns};
use crate::chunk::record::{BatchMark, ChunkRecord};
use crate::disk::Disk;
use crate::error::{Result, StorageError};
use crate::ids::TopicNo;
use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES};
use crate::manifest::{self, Manifest};
use crate::read::read_range;
use crate::segment::{self, Head, TRAILER_TAIL_BYTES, Trailer, block_ceil, block_floor, footer_is_whole};
use bytes::Bytes;
use parquet::file::metadata::ParquetMetaDataReader;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is read where a trailer is likely, and where one is looked for, in bytes.
const NEAR_BYTES: u64 = 64 << 10;
const FAR_BYTES: u64 = RING_BUFFER_BYTES as u64;

/// A chunk in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// What the chunk says of itself.
    pub trailer: Trailer,
}

/// The number in a segment's file name.
pub fn segment_no(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    let no = name.strip_suffix(".parquet")?.parse().ok()?;
    (segment::file_name(no) == name).then_some(no)
}

/// The head of a segment file and where its first chunk begins; `None` if the file has none, or not whole.
///
/// # Errors
/// When the file cannot be read.
pub async fn head<D: Disk>(disk: &D, path: &Path) -> Result<Option<(Head, u64)>> {
    let length = disk.length(path).await.map_err(|error| StorageError::io("look at", path, error))?;
    if length < BLOCK_BYTES {
        return Ok(None);
    }
    let start = read_range(disk, path, 0, BLOCK_BYTES).await?;
    let Some(end) = Head::length(&start).filter(|end| *end <= length) else { return Ok(None) };
    let bytes = read_range(disk, path, 0, end).await?;
    Ok(Head::decode(&bytes).map(|head| (head, end)))
}

/// When the topic was locked, as the footer of its last segment has it; `None` where there is none, or not
/// whole, or it was still open.
pub async fn completed_at<D: Disk>(disk: &D, path: &Path) -> Option<i64> {
    const END_BYTES: u64 = 8;
    let length = disk.length(path).await.ok()?;
    let end = block_floor(length.checked_sub(END_BYTES)?);
    let bytes = read_range(disk, path, end, length - end).await.ok()?;
    let (rest, _magic) = bytes.split_last_chunk::<4>()?;
    let (_, footer_bytes) = rest.split_last_chunk::<4>()?;
    let start = length.checked_sub(END_BYTES + u64::from(u32::from_le_bytes(*footer_bytes)))?;
    // Footers begin on a block boundary, behind the last trailer.
    let footer = read_range(disk, path, start, length - start).await.ok().filter(|_| start == block_floor(start))?;
    if footer_is_whole(&footer) != Some(true) {
        return None;
    }
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&footer).ok()?;
    let pairs = metadata.file_metadata().key_value_metadata()?;
    pairs.iter().find(|pair| pair.key == segment::COMPLETED_KEY)?.value.as_ref()?.parse().ok()
}

/// What the files of a sequence know better than the catalog: locks that it does not have. Then its log ended
/// early, and it must be made again (INV-3).
///
/// # Errors
/// When the catalog cannot be read.
pub async fn lost_lock<D: Disk>(
    disk: &D,
    look: &impl Look,
    data_dir: &Path,
    sequence: &SequenceRecord,
) -> Result<Option<String>> {
    let bytes = disk.read_small(&manifest::path(data_dir, sequence.id)).await.ok().flatten();
    if let Some(manifest) = bytes.and_then(|bytes| Manifest::decode(&bytes)) {
        for session in manifest.sessions.iter().filter(|session| session.completed_at_ns.is_some()) {
            if look.session(session.id)?.is_some_and(|known| known.completed_at_ns.is_none()) {
                return Ok(Some(format!("session {} is finalized by its manifest", session.locator)));
            }
        }
        for topic in &manifest.topics {
            if look.topic(topic.record.no)?.is_some_and(|known| known.completed_at_ns.is_none()) {
                return Ok(Some(format!("topic {} is locked by its manifest", topic.record.locator)));
            }
        }
    }
    for topic in look.topics_of(sequence.id)?.into_iter().filter(|topic| topic.completed_at_ns.is_none()) {
        let dir = segment::topic_dir(data_dir, sequence.id, topic.id);
        for entry in disk.list(&dir).await.unwrap_or_default() {
            if segment_no(&entry.path).is_some() && completed_at(disk, &entry.path).await.is_some() {
                return Ok(Some(format!("topic {} is locked by its footer", topic.locator)));
            }
        }
    }
    Ok(None)
}

/// Whether a folder holds a manifest or a segment with a whole head and a chunk behind it: recordings, not
/// what a crash left of making a file.
pub async fn says_whose<D: Disk>(disk: &D, dir: &Path) -> bool {
    for entry in disk.list(dir).await.unwrap_or_default() {
        let here = if entry.is_dir {
            Box::pin(says_whose(disk, &entry.path)).await
        } else if entry.path.ends_with("manifest") {
            let bytes = disk.read_small(&entry.path).await.ok().flatten();
            bytes.is_some_and(|bytes| Manifest::decode(&bytes).is_some())
        } else {
            match head(disk, &entry.path).await {
                Ok(Some((head, end))) => {
                    let chunks = of_file(disk, &entry.path, head.facts.topic.no, end).await;
                    chunks.is_ok_and(|chunks| !chunks.is_empty())
                }
                _ => false,
            }
        };
        if here {
            return true;
        }
    }
    false
}

/// Every whole trailer of a file that ends between two block boundaries, in the order of the chunks.
/// A damaged one hides its chunk only: what lies before it is found all the same.
///
/// # Errors
/// When the file cannot be read.
pub async fn trailers<D: Disk>(disk: &D, path: &Path, from: u64, to: u64) -> Result<Vec<Trailer>> {
    let mut found = Vec::new();
    let mut end = block_floor(to);
    let mut window = Window { at: end, bytes: Bytes::new() };
    let mut step = NEAR_BYTES;
    while from < end {
        let block = window.get(disk, path, (end - BLOCK_BYTES, end), step.min(end - from)).await?;
        step = FAR_BYTES;
        let length = Trailer::length(&block).map(|body| block_ceil((body + TRAILER_TAIL_BYTES) as u64));
        let trailer = match length.filter(|length| from + length <= end) {
            Some(length) => {
                let bytes = window.get(disk, path, (end - length, end), length).await?;
                Trailer::decode(&bytes).filter(|trailer| {
                    let record = &trailer.record;
                    from <= record.offset && record.offset.checked_add(record.padded_length) == Some(end)
                })
            }
            None => None,
        };
        match trailer {
            Some(trailer) => {
                end = trailer.record.offset;
                step = NEAR_BYTES;
                found.push(trailer);
            }
            None => end -= BLOCK_BYTES,
        }
    }
    found.reverse();
    Ok(found)
}

/// The part of a file that was read last.
struct Window {
    at: u64,
    bytes: Bytes,
}

impl Window {
    /// The bytes of a range, read anew together with those before it, `ahead` in all.
    async fn get<D: Disk>(&mut self, disk: &D, path: &Path, (from, to): (u64, u64), ahead: u64) -> Result<Bytes> {
        if from < self.at || self.at + (self.bytes.len() as u64) < to {
            self.at = to - block_floor(ahead).max(to - from);
            self.bytes = read_range(disk, path, self.at, to - self.at).await?;
        }
        let place = |at: u64| usize::try_from(at - self.at).unwrap_or(usize::MAX);
        Ok(self.bytes.slice(place(from)..place(to)))
    }
}

/// Whether every column of a chunk has its checksum. Reads all of it: only for chunks whose trailer may
/// have become durable before their data.
///
/// # Errors
/// When the file cannot be read.
pub async fn is_whole<D: Disk>(disk: &D, path: &Path, record: &ChunkRecord) -> Result<bool> {
    let bytes = match read_range(disk, path, record.offset, record.length).await {
        Err(StorageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
        bytes => bytes?,
    };
    Ok(verify_columns(path, record, &ChunkBytes::whole(record.offset, bytes), None).is_ok())
}

/// What is durable of a topic behind its last chunk: its batches, run by run.
pub type TailMarks = Vec<Vec<BatchMark>>;

/// Which of some chunks go on from a batch, one behind the other. Pure.
///
/// Of several that begin with one batch the one of the latest upload counts, and of these the one in the
/// highest segment: it was written again. Nothing of an earlier upload goes on behind it. A chunk that differs from the tail, or ends in the middle of one of its runs, belongs to
/// another upload than what was acknowledged: it and what follows it are left.
pub fn chain(found: Vec<Found>, (next, next_row): (u64, u64), tail: &TailMarks) -> Vec<Found> {
    let acknowledged: Vec<BatchMark> = tail.iter().flatten().copied().collect();
    let ends: Vec<u64> = tail
        .iter()
        .scan(next, |end, run| {
            *end += run.len() as u64;
            Some(*end)
        })
        .collect();
    let tail_end = next + acknowledged.len() as u64;
    let fits = |trailer: &Trailer| {
        let record = &trailer.record;
        let skip = usize::try_from(record.first_batch - next).unwrap_or(usize::MAX);
        let same = acknowledged.iter().skip(skip).zip(&trailer.marks).all(|(durable, found)| durable == found);
        same && (tail_end <= record.end_batch || ends.contains(&record.end_batch))
    };
    let mut kept: Vec<Found> = Vec::new();
    let (mut at, mut row, mut upload) = (next, next_row, i64::MIN);
    loop {
        let begins = |found: &&Found| {
            let record = &found.trailer.record;
            let goes_on = record.first_batch == at && record.first_row == row && upload <= found.trailer.upload;
            goes_on && at < record.end_batch
        };
        let latest = |found: &&Found| (found.trailer.upload, found.trailer.record.segment);
        let Some(best) = found.iter().filter(begins).max_by_key(latest) else { break };
        if !fits(&best.trailer) {
            break;
        }
        (at, row) = (best.trailer.record.end_batch, best.trailer.record.end_row);
        upload = best.trailer.upload;
        kept.push(best.clone());
    }
    kept
}

/// Chunks of an interrupted topic that are whole in its files and not in the catalog: written when the
/// recorder died before their commit, or committed and lost with the end of the catalog's log. They are durable on return.
///
/// # Errors
/// When a file or the catalog cannot be read.
pub async fn behind<D: Disk>(disk: &D, look: &impl Look, data_dir: &Path, topic: &TopicRecord) -> Result<Vec<Found>> {
    let totals = look.totals(topic.no)?;
    let records = look.segments(topic.no)?;
    let newest = look.chunks(topic.no)?.last().map_or(0, |chunk| chunk.segment);
    let dir = segment::topic_dir(data_dir, topic.sequence, topic.id);
    let mut found = Vec::new();
    for entry in disk.list(&dir).await.map_err(|error| StorageError::io("list", &dir, error))? {
        let Some(no) = segment_no(&entry.path).filter(|no| newest <= *no) else { continue };
        let from = match records.iter().find(|record| record.no == no) {
            Some(SegmentRecord { sealed_length: Some(_), .. }) => continue,
            Some(record) => record.end_offset,
            None => match head(disk, &entry.path).await? {
                Some((head, end)) if head.facts.topic.no == topic.no => end,
                _ => continue,
            },
        };
        found.extend(of_file(disk, &entry.path, topic.no, from).await?);
    }
    let tail = look.tail(topic.no, totals.chunk_batches)?.into_iter().map(|run| run.marks).collect();
    let mut whole = Vec::new();
    // Without statistics (format 2, or a measurement) it would shift the index of those behind it.
    found.retain(|found| !found.trailer.fields.is_empty());
    for found in chain(found, (totals.chunk_batches, totals.chunk_rows), &tail) {
        if !is_whole(disk, &found.path, &found.trailer.record).await? {
            break;
        }
        whole.push(found);
    }
    settle(disk, &whole).await?;
    Ok(whole)
}

/// Makes durable what was found. A recorder that was killed, and not its machine, may have left it in the device's
/// cache: it can be read, and a power cut would take it, and with it rows whose tail is given up for it.
///
/// # Errors
/// When a file cannot be synced.
pub(crate) async fn settle<D: Disk>(disk: &D, found: &[Found]) -> Result<()> {
    let files: BTreeSet<&PathBuf> = found.iter().map(|found| &found.path).collect();
    for path in files {
        let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
        disk.sync(&file).await.map_err(|error| StorageError::io("sync", path, error))?;
    }
    Ok(())
}

/// The chunks of a topic in one file, from an offset on.
///
/// # Errors
/// When the file cannot be read.
pub async fn of_file<D: Disk>(disk: &D, path: &Path, topic: TopicNo, from: u64) -> Result<Vec<Found>> {
    let end = disk.data_end(path, from).await.map_err(|error| StorageError::io("look at", path, error))?;
    // Trailers end on block boundaries: what is behind the last one in the file is part of a footer.
    let trailers = trailers(disk, path, from, end).await?;
    let of_topic = trailers.into_iter().filter(|trailer| trailer.topic == topic);
    Ok(of_topic.map(|trailer| Found { path: path.to_owned(), trailer }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{SegmentId, TopicId};
    use crate::sim::{Faults, SimDisk};

    fn mark(hash: u64) -> BatchMark {
        BatchMark { rows: 1, hash: u128::from(hash) }
    }

    /// A chunk of a segment with these batches; each batch's hash is its number plus `other`. An upload has
    /// ten segments.
    fn found((segment, first, end): (u32, u64, u64), other: u64) -> Found {
        let record = ChunkRecord {
            segment,
            segment_id: SegmentId(uuid::Uuid::nil()),
            epoch: 0,
            offset: 4096,
            length: 1,
            padded_length: 4096,
            first_batch: first,
            end_batch: end,
            first_row: first,
            end_row: end,
            data_bytes: 1,
            time: None,
            time_sorted: true,
            columns: Vec::new(),
            crc: 0,
        };
        let marks = (first..end).map(|batch| mark(batch + other)).collect();
        let topic_id = TopicId(uuid::Uuid::nil());
        let trailer =
            Trailer { topic: TopicNo(1), topic_id, record, marks, fields: Vec::new(), upload: i64::from(segment / 10) };
        Found { path: PathBuf::new(), trailer }
    }

    /// Chunks as (segment, first batch, end), the tail as lengths of runs.
    #[track_caller]
    fn check(chunks: &[(u32, u64, u64)], next: u64, tail: &[u64], expected: &[(u32, u64, u64)]) {
        let mut at = next;
        let runs = tail
            .iter()
            .map(|length| {
                let run = (at..at + length).map(mark).collect();
                at += length;
                run
            })
            .collect();
        let kept = chain(chunks.iter().map(|chunk| found(*chunk, 0)).collect(), (next, next), &runs);
        let kept: Vec<(u32, u64, u64)> = kept
            .iter()
            .map(|found| &found.trailer.record)
            .map(|record| (record.segment, record.first_batch, record.end_batch))
            .collect();
        assert_eq!(kept, expected);
    }

    #[test]
    fn inv_2_chunks_go_on_one_behind_the_other_and_end_at_a_hole() {
        check(&[(0, 0, 4), (0, 4, 6), (1, 7, 9)], 0, &[], &[(0, 0, 4), (0, 4, 6)]);
        check(&[(0, 4, 6)], 3, &[], &[]);
        check(&[], 0, &[3], &[]);
    }

    #[test]
    fn a_chunk_that_was_written_again_counts_where_it_was_written_last() {
        check(&[(0, 0, 4), (1, 0, 4), (1, 4, 5)], 0, &[], &[(1, 0, 4), (1, 4, 5)]);
    }

    #[test]
    fn inv_2_a_chunk_of_an_earlier_upload_does_not_go_on_behind_one_of_a_later() {
        check(&[(1, 9, 12), (13, 5, 9)], 5, &[], &[(13, 5, 9)]);
        check(&[(5, 9, 12), (13, 5, 9), (14, 5, 9), (12, 9, 10)], 5, &[], &[(14, 5, 9), (12, 9, 10)]);
    }

    #[test]
    fn a_chunk_that_was_written_again_may_lie_behind_the_one_that_follows_it() {
        check(&[(3, 0, 4), (2, 4, 6)], 0, &[], &[(3, 0, 4), (2, 4, 6)]);
    }

    #[test]
    fn inv_1_what_is_taken_over_outlives_a_power_cut_though_the_recorder_was_killed_before_its_sync() {
        let disk = SimDisk::new(1, u64::MAX, Faults::default());
        let (dir, path) = (Path::new("/d"), Path::new("/d/000000.parquet"));
        let work = async {
            disk.make_dir(dir).await.expect("made");
            disk.sync_dir(Path::new("/")).await.expect("synced");
            let file = disk.create(path).await.expect("created");
            disk.sync_dir(dir).await.expect("synced");
            let mut buf = disk.buffer().await;
            buf.fill(7);
            disk.write(&file, buf, RING_BUFFER_BYTES, 0).await.0.expect("written");
            let chunk = Found { path: path.to_owned(), ..found((0, 0, 4), 0) };
            settle(&disk, &[chunk.clone(), chunk]).await.expect("settled");
        };
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(work);
        for _ in 0..20 {
            let left = disk.after_crash(u64::MAX, Faults::default()).contents();
            assert_eq!(left[path], vec![7; RING_BUFFER_BYTES]);
        }
    }

    #[test]
    fn a_chunk_replaces_whole_runs_of_the_tail_only() {
        check(&[(0, 5, 9)], 5, &[2, 2], &[(0, 5, 9)]);
        check(&[(0, 5, 7)], 5, &[2, 2], &[(0, 5, 7)]);
        check(&[(0, 5, 20)], 5, &[2, 2], &[(0, 5, 20)]);
        check(&[(0, 5, 8)], 5, &[2, 2], &[]);
    }

    #[test]
    fn inv_1_chunks_of_another_upload_do_not_replace_what_was_acknowledged() {
        let tail = vec![vec![mark(5), mark(6)]];
        assert_eq!(chain(vec![found((0, 5, 9), 0)], (5, 5), &tail).len(), 1);
        assert_eq!(chain(vec![found((0, 5, 9), 100)], (5, 5), &tail).len(), 0);
    }

    #[test]
    fn a_segment_is_known_by_its_name() {
        assert_eq!(segment_no(Path::new("/a/000012.parquet")), Some(12));
        assert_eq!(segment_no(Path::new("/a/12.parquet")), None);
        assert_eq!(segment_no(Path::new("/a/manifest")), None);
    }
}
