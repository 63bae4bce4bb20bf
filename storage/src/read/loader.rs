//! Chunks read, checked and decoded, through a bounded cache of decoded ones.
//!
//! Guarantees: no rows of bytes whose checksum is not what was written; what is read and decoded at once is bounded.

use super::jobs::ReadJob;
use super::view::{Place, TopicView};
use crate::chunk::Rows;
use crate::chunk::decode::{ChunkBytes, RowGroup, decode, decode_leaves, verify_columns};
use crate::chunk::record::{BatchMark, ChunkRecord};
use crate::error::{Result, StorageError};
use crate::ids::TopicNo;
use crate::limits;
use crate::schema::TopicSchema;
use crate::segment::{self, Trailer};
use crate::turn::Turn;
use arrow::array::RecordBatch;
use bytes::Bytes;
use parquet::schema::types::SchemaDescPtr;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

/// Reads chunks through a bounded cache of decoded ones.
#[derive(Debug, Clone)]
pub struct Loader {
    jobs: mpsc::Sender<ReadJob>,
    cache: Arc<Mutex<Cache>>,
    /// Chunks being read and decoded at once.
    loading: Arc<Semaphore>,
    /// Streams that hold decoded chunks at once, beyond the cache.
    pub(super) holding: Arc<Semaphore>,
    /// Chunks that were found damaged, for whoever looks at them again.
    damaged: broadcast::Sender<(TopicNo, u64)>,
}

#[derive(Debug)]
struct Cache {
    bytes_max: usize,
    bytes: usize,
    /// Least recently used first.
    entries: VecDeque<(TopicNo, u64, Rows, usize)>,
}

impl Loader {
    /// A loader that keeps at most `cache_bytes` of decoded chunks (one chunk may exceed it).
    pub fn new(jobs: mpsc::Sender<ReadJob>, cache_bytes: usize) -> Self {
        let cache = Cache { bytes_max: cache_bytes, bytes: 0, entries: VecDeque::new() };
        Self {
            jobs,
            cache: Arc::new(Mutex::new(cache)),
            loading: Arc::new(Semaphore::new(limits::CHUNKS_LOADING_MAX)),
            holding: Arc::new(Semaphore::new(limits::STREAMS_HOLDING_MAX)),
            damaged: broadcast::Sender::new(limits::DAMAGE_REPORTS_MAX),
        }
    }

    /// Hears of the chunks, by topic and first row, that reads find damaged from now on.
    pub fn reports(&self) -> broadcast::Receiver<(TopicNo, u64)> {
        self.damaged.subscribe()
    }

    /// Tells whoever listens when a chunk's bytes are not those that were written.
    fn report<T>(&self, (topic, first_row): (TopicNo, u64), result: Result<T>) -> Result<T> {
        if result.as_ref().is_err_and(StorageError::is_damage) {
            self.damaged.send((topic, first_row)).ok(); // Nobody listens: a command on a stopped recorder.
        }
        result
    }

    /// Drops what is cached of a topic: it was deleted.
    pub fn forget(&self, topic: TopicNo) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.entries.retain(|(no, ..)| *no != topic);
        cache.bytes = cache.entries.iter().map(|(.., bytes)| bytes).sum();
    }

    /// All rows of a source.
    ///
    /// # Errors
    /// When the file cannot be read or its bytes are damaged.
    pub async fn load(&self, view: &TopicView, place: Place) -> Result<Rows> {
        match place {
            Place::Tail(index) => match view.tail().get(index) {
                Some(run) => Ok(Rows::from(run.unpack(&view.schema.stored)?)),
                None => Err(StorageError::Gone),
            },
            Place::Chunk(index) => match view.chunks().get(index) {
                Some(chunk) => self.report((view.record.no, chunk.first_row), self.load_chunk(view, chunk).await),
                None => Err(StorageError::Gone),
            },
        }
    }

    async fn load_chunk(&self, view: &TopicView, chunk: &ChunkRecord) -> Result<Rows> {
        let key = (view.record.no, chunk.first_row);
        if let Some(rows) = self.cached(key) {
            return Ok(rows);
        }
        let place = self.place().await?;
        if let Some(rows) = self.cached(key) {
            return Ok(rows);
        }
        let path = view.dir().join(segment::file_name(chunk.segment));
        let bytes = ChunkBytes::whole(chunk.offset, self.raw(&path, chunk.offset, chunk.length).await?);
        let (record, for_check) = (chunk.clone(), bytes.clone());
        // Checksums are CPU work: off the threads that serve sockets.
        place.aside("check", move || verify_columns(&path, &record, &for_check, None)).await?;
        let (of, schema, descriptor) = (chunk.clone(), Arc::clone(&view.schema), Arc::clone(&view.descriptor));
        let rows = place.aside("decode", move || decode(row_group(&schema, &descriptor, &of), bytes)).await?;
        self.keep(key, rows.clone());
        Ok(rows)
    }

    /// The rows of a chunk whose bytes were checked, in a [place](Self::place).
    ///
    /// # Errors
    /// When they are not the pages that its columns promise.
    pub async fn decode(
        &self,
        place: &Turn,
        view: &TopicView,
        chunk: &ChunkRecord,
        bytes: ChunkBytes,
    ) -> Result<RecordBatch> {
        let (chunk, schema, descriptor) = (chunk.clone(), Arc::clone(&view.schema), Arc::clone(&view.descriptor));
        place.aside("decode", move || decode(row_group(&schema, &descriptor, &chunk), bytes)?.all()).await
    }

    /// Waits until one more chunk may be read and decoded; given back by drop.
    ///
    /// # Errors
    /// When the loader has been shut.
    pub async fn place(&self) -> Result<Turn> {
        Turn::take(&self.loading).await.map_err(|_| StorageError::Gone)
    }

    /// Bytes of a file from a block boundary on, past the cache.
    ///
    /// # Errors
    /// When they cannot be read or the file is shorter.
    pub async fn raw(&self, path: &Path, at: u64, length: u64) -> Result<Bytes> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(ReadJob { path: path.to_owned(), at, length, reply }).await.map_err(|_| StorageError::Gone)?;
        answer.await.map_err(|_| StorageError::Gone)?
    }

    /// The batches of a chunk as they came, from the trailer in its file.
    ///
    /// # Errors
    /// When the file cannot be read, or what is there is not that chunk's trailer.
    pub async fn marks(&self, view: &TopicView, chunk: &ChunkRecord) -> Result<Vec<BatchMark>> {
        let path = view.dir().join(segment::file_name(chunk.segment));
        let at = segment::block_floor(chunk.offset + chunk.length);
        let bytes = self.raw(&path, at, chunk.offset + chunk.padded_length - at).await?;
        let trailer = Trailer::decode(&bytes)
            .filter(|trailer| trailer.topic == view.record.no && trailer.record.first_batch == chunk.first_batch);
        let broken = || StorageError::Decode {
            what: "chunk trailer",
            text: format!("{} at byte {at}: not the trailer of batch {}", path.display(), chunk.first_batch),
        };
        Ok(trailer.ok_or_else(broken)?.marks)
    }

    /// Some leaf columns of a source, in the schema that is left without the others (from the tail, and what
    /// is cached, come whole columns), and the bytes that were read for it. Nothing but the pages of these
    /// columns is read.
    ///
    /// # Errors
    /// When the file cannot be read or its bytes are damaged.
    pub async fn load_leaves(&self, view: &TopicView, place: Place, leaves: &[usize]) -> Result<(RecordBatch, u64)> {
        let Place::Chunk(index) = place else {
            return Ok((self.whole_columns(self.load(view, place).await?, view, leaves).await?, 0));
        };
        let chunk = view.chunks().get(index).ok_or(StorageError::Gone)?;
        self.report((view.record.no, chunk.first_row), self.load_some(view, chunk, leaves).await)
    }

    async fn load_some(&self, view: &TopicView, chunk: &ChunkRecord, leaves: &[usize]) -> Result<(RecordBatch, u64)> {
        if let Some(rows) = self.cached((view.record.no, chunk.first_row)) {
            return Ok((self.whole_columns(rows, view, leaves).await?, 0));
        }
        let place = self.place().await?;
        let path = view.dir().join(segment::file_name(chunk.segment));
        let mut parts = Vec::new();
        let mut read = 0;
        for (at, length) in windows(chunk, leaves) {
            parts.push((at, self.raw(&path, at, length).await?));
            read += length;
        }
        let (chunk, schema, descriptor) = (chunk.clone(), Arc::clone(&view.schema), Arc::clone(&view.descriptor));
        let leaves = leaves.to_vec();
        let decode = move || {
            let bytes = ChunkBytes::parts(parts);
            verify_columns(&path, &chunk, &bytes, Some(&leaves))?;
            let batches = decode_leaves(row_group(&schema, &descriptor, &chunk), bytes, &leaves)?;
            let schema = batches.first().map(RecordBatch::schema).ok_or(StorageError::Gone)?;
            Ok::<_, StorageError>(arrow::compute::concat_batches(&schema, &batches)?)
        };
        Ok((place.aside("decode", decode).await?, read))
    }

    /// The top-level columns that some leaves belong to.
    async fn whole_columns(&self, rows: Rows, view: &TopicView, leaves: &[usize]) -> Result<RecordBatch> {
        let known = leaves.iter().filter(|leaf| **leaf < view.descriptor.num_columns());
        let mut columns: Vec<usize> = known.map(|leaf| view.descriptor.get_column_root_idx(*leaf)).collect();
        columns.sort_unstable();
        columns.dedup();
        if rows.are_at_hand(&columns) {
            return rows.columns(&columns);
        }
        self.place().await?.aside("decode", move || rows.columns(&columns)).await
    }

    fn cached(&self, (no, row): (TopicNo, u64)) -> Option<Rows> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cache.entries.iter().position(|(of, first, ..)| (*of, *first) == (no, row))?;
        let entry = cache.entries.remove(at)?;
        let rows = entry.2.clone();
        cache.entries.push_back(entry);
        Some(rows)
    }

    fn keep(&self, (no, row): (TopicNo, u64), rows: Rows) {
        let bytes = rows.memory_bytes();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.bytes += bytes;
        cache.entries.push_back((no, row, rows, bytes));
        while cache.bytes > cache.bytes_max && cache.entries.len() > 1 {
            if let Some((.., bytes)) = cache.entries.pop_front() {
                cache.bytes -= bytes;
            }
        }
    }
}

fn row_group<'a>(schema: &'a TopicSchema, descriptor: &'a SchemaDescPtr, chunk: &'a ChunkRecord) -> RowGroup<'a> {
    RowGroup { schema: &schema.stored, descriptor, columns: &chunk.columns, rows: chunk.rows(), base: chunk.offset }
}

/// The block-aligned windows of a file that hold some columns of a chunk: neighbours are read together.
fn windows(chunk: &ChunkRecord, leaves: &[usize]) -> Vec<(u64, u64)> {
    let mut windows: Vec<(u64, u64)> = Vec::new();
    for (index, (offset, column)) in chunk.column_places().enumerate() {
        if !leaves.contains(&index) {
            continue;
        }
        let from = segment::block_floor(offset);
        let to = offset + column.encoded_bytes;
        match windows.last_mut() {
            Some((start, length)) if from <= segment::block_ceil(*start + *length) => *length = to - *start,
            _ => windows.push((from, to - from)),
        }
    }
    windows
}
