//! From a topic's chunks and tail back to rows in time order.
//!
//! Guarantees: rows come out by `timestamp_ns`, ties in arrival order, restricted to a half-open
//! window; only chunks whose time range meets the window are read, and each column is checked
//! against its checksum first. Memory: a stream that nobody reads keeps a position, not data; the
//! decoded chunks live in one bounded cache ([`Loader`]) and are read again when they were evicted.
//! File reads run on a ring of their own ([`serve`]): a reader never delays a writer.

use crate::catalog::Look;
use crate::catalog::records::{DamageRecord, TopicRecord};
use crate::chunk::decode::{ChunkBytes, RowGroup, decode, decode_leaves, verify_columns};
use crate::chunk::record::{BatchMark, ChunkRecord};
use crate::disk::{Disk, IoCounters};
use crate::error::{Result, StorageError};
use crate::ids::TopicNo;
use crate::limits::{self, RING_BUFFER_BYTES};
use crate::schema::TopicSchema;
use crate::segment::{self, Trailer};
use crate::tail::TailRun;
use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use bytes::Bytes;
use parquet::arrow::ArrowSchemaConverter;
use parquet::schema::types::SchemaDescPtr;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Semaphore, SemaphorePermit, broadcast, mpsc, oneshot};

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

/// One read of a file, answered on a channel.
#[derive(Debug)]
pub struct ReadJob {
    path: PathBuf,
    at: u64,
    length: u64,
    reply: oneshot::Sender<Result<Bytes>>,
}

/// Answers read jobs on this thread's ring until all senders are gone.
pub async fn serve<D: Disk>(disk: D, mut jobs: mpsc::Receiver<ReadJob>, counters: Arc<IoCounters>) {
    while let Some(job) = jobs.recv().await {
        let disk = disk.clone();
        let counters = Arc::clone(&counters);
        // Bounded by the jobs channel's depth and by the buffer pool.
        tokio::task::spawn_local(async move {
            let result = read_range(&disk, &job.path, job.at, job.length).await;
            if let Ok(bytes) = &result {
                IoCounters::add(&counters.read, bytes.len() as u64);
            }
            job.reply.send(result).ok(); // The asker may have gone; then nobody wants the bytes.
        });
    }
}

/// Reads `length` bytes at a block-aligned offset.
pub(crate) async fn read_range<D: Disk>(disk: &D, path: &Path, at: u64, length: u64) -> Result<Bytes> {
    let file = disk.open(path).await.map_err(|error| StorageError::io("open", path, error))?;
    let mut out = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    while (out.len() as u64) < length {
        let left = segment::block_ceil(length - out.len() as u64);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(RING_BUFFER_BYTES);
        let buf = disk.buffer().await;
        let (result, buf) = disk.read(&file, buf, want, at + out.len() as u64).await;
        let got = result.map_err(|error| StorageError::io("read", path, error))?;
        let wanted = usize::try_from(length).unwrap_or(usize::MAX) - out.len();
        out.extend_from_slice(buf.get(..got.min(wanted)).unwrap_or(&[]));
        if got < want {
            break;
        }
    }
    if (out.len() as u64) < length {
        let short =
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("{} of {length} bytes at {at}", out.len()));
        return Err(StorageError::io("read", path, short));
    }
    Ok(Bytes::from(out))
}

/// What is durable of a topic at one moment, and how to read it.
#[derive(Debug, Clone)]
pub struct TopicView {
    /// The topic.
    pub record: TopicRecord,
    /// Its schema.
    pub schema: Arc<TopicSchema>,
    descriptor: SchemaDescPtr,
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

    fn sources(&self) -> impl Iterator<Item = Source> {
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
struct Source {
    place: Place,
    time: (i64, i64),
    sorted: bool,
    rows: u64,
    data_bytes: u64,
}

/// Groups sources so that the groups follow one another in time; within a group rows must be
/// merged. Input in arrival order; groups keep it.
fn groups(sources: impl Iterator<Item = Source>, window: Window) -> VecDeque<Vec<Source>> {
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

/// Reads chunks through a bounded cache of decoded ones.
#[derive(Debug, Clone)]
pub struct Loader {
    jobs: mpsc::Sender<ReadJob>,
    cache: Arc<Mutex<Cache>>,
    /// Chunks being read and decoded at once.
    loading: Arc<Semaphore>,
    /// Streams that hold decoded chunks at once, beyond the cache.
    holding: Arc<Semaphore>,
    /// Chunks that were found damaged, for whoever looks at them again.
    damaged: broadcast::Sender<(TopicNo, u64)>,
}

#[derive(Debug)]
struct Cache {
    bytes_max: usize,
    bytes: usize,
    /// Least recently used first.
    entries: VecDeque<(TopicNo, u64, RecordBatch, usize)>,
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

    /// All rows of a source, in the stored schema.
    ///
    /// # Errors
    /// When the file cannot be read or its bytes are damaged.
    pub async fn load(&self, view: &TopicView, place: Place) -> Result<RecordBatch> {
        match place {
            Place::Tail(index) => match view.tail.get(index) {
                Some(run) => run.unpack(&view.schema.stored),
                None => Err(StorageError::Gone),
            },
            Place::Chunk(index) => match view.chunks.get(index) {
                Some(chunk) => self.report((view.record.no, chunk.first_row), self.load_chunk(view, chunk).await),
                None => Err(StorageError::Gone),
            },
        }
    }

    async fn load_chunk(&self, view: &TopicView, chunk: &ChunkRecord) -> Result<RecordBatch> {
        let key = (view.record.no, chunk.first_row);
        if let Some(batch) = self.cached(key) {
            return Ok(batch);
        }
        // Cancel-safety: the place is given back by drop.
        let _place = self.loading.acquire().await.map_err(|_| StorageError::Gone)?;
        if let Some(batch) = self.cached(key) {
            return Ok(batch);
        }
        let path = view.dir.join(segment::file_name(chunk.segment));
        let (reply, answer) = oneshot::channel();
        let job = ReadJob { path: path.clone(), at: chunk.offset, length: chunk.length, reply };
        self.jobs.send(job).await.map_err(|_| StorageError::Gone)?;
        let bytes = answer.await.map_err(|_| StorageError::Gone)??;
        let bytes = ChunkBytes::whole(chunk.offset, bytes);
        let (record, for_check) = (chunk.clone(), bytes.clone());
        // Checksums are CPU work: off the threads that serve sockets.
        let checked = tokio::task::spawn_blocking(move || verify_columns(&path, &record, &for_check, None));
        checked.await.map_err(|error| StorageError::Format { op: "check", text: error.to_string() })??;
        let batch = self.decode(view, chunk, bytes).await?;
        self.keep(key, batch.clone());
        Ok(batch)
    }

    /// The rows of a chunk whose bytes were checked.
    ///
    /// # Errors
    /// When they are not the pages that its columns promise.
    pub async fn decode(&self, view: &TopicView, chunk: &ChunkRecord, bytes: ChunkBytes) -> Result<RecordBatch> {
        let (chunk, schema, descriptor) = (chunk.clone(), Arc::clone(&view.schema), Arc::clone(&view.descriptor));
        let decoded = tokio::task::spawn_blocking(move || {
            let batches = decode(row_group(&schema, &descriptor, &chunk), bytes)?;
            match batches.as_slice() {
                [one] => Ok::<_, StorageError>(one.clone()),
                many => Ok(arrow::compute::concat_batches(&schema.stored, many)?),
            }
        });
        decoded.await.map_err(|error| StorageError::Format { op: "decode", text: error.to_string() })?
    }

    /// Waits until one more chunk may be held; given back by drop.
    ///
    /// # Errors
    /// When the loader has been shut.
    pub async fn place(&self) -> Result<SemaphorePermit<'_>> {
        self.loading.acquire().await.map_err(|_| StorageError::Gone)
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
        let path = view.dir.join(segment::file_name(chunk.segment));
        let at = segment::block_floor(chunk.offset + chunk.length);
        let (reply, answer) = oneshot::channel();
        let length = chunk.offset + chunk.padded_length - at;
        self.jobs.send(ReadJob { path: path.clone(), at, length, reply }).await.map_err(|_| StorageError::Gone)?;
        let bytes = answer.await.map_err(|_| StorageError::Gone)??;
        let trailer = Trailer::decode(&bytes)
            .filter(|trailer| trailer.topic == view.record.no && trailer.record.first_batch == chunk.first_batch);
        let broken = || StorageError::Decode {
            what: "chunk trailer",
            text: format!("{} at byte {at}: not the trailer of batch {}", path.display(), chunk.first_batch),
        };
        Ok(trailer.ok_or_else(broken)?.marks)
    }

    /// Some leaf columns of a source, in the schema that is left without the others (the tail and what
    /// is cached come whole), and the bytes that were read for it. Nothing but the pages of these
    /// columns is read.
    ///
    /// # Errors
    /// When the file cannot be read or its bytes are damaged.
    pub async fn load_leaves(&self, view: &TopicView, place: Place, leaves: &[usize]) -> Result<(RecordBatch, u64)> {
        let Place::Chunk(index) = place else {
            return Ok((self.load(view, place).await?, 0));
        };
        let chunk = view.chunks.get(index).ok_or(StorageError::Gone)?;
        self.report((view.record.no, chunk.first_row), self.load_some(view, chunk, leaves).await)
    }

    async fn load_some(&self, view: &TopicView, chunk: &ChunkRecord, leaves: &[usize]) -> Result<(RecordBatch, u64)> {
        if let Some(batch) = self.cached((view.record.no, chunk.first_row)) {
            return Ok((batch, 0));
        }
        // Cancel-safety: the place is given back by drop.
        let _place = self.loading.acquire().await.map_err(|_| StorageError::Gone)?;
        let path = view.dir.join(segment::file_name(chunk.segment));
        let mut parts = Vec::new();
        let mut read = 0;
        for (at, length) in windows(chunk, leaves) {
            let (reply, answer) = oneshot::channel();
            let job = ReadJob { path: path.clone(), at, length, reply };
            self.jobs.send(job).await.map_err(|_| StorageError::Gone)?;
            parts.push((at, answer.await.map_err(|_| StorageError::Gone)??));
            read += length;
        }
        let (chunk, schema, descriptor) = (chunk.clone(), Arc::clone(&view.schema), Arc::clone(&view.descriptor));
        let leaves = leaves.to_vec();
        let decoded = tokio::task::spawn_blocking(move || {
            let bytes = ChunkBytes::parts(parts);
            verify_columns(&path, &chunk, &bytes, Some(&leaves))?;
            let batches = decode_leaves(row_group(&schema, &descriptor, &chunk), bytes, &leaves)?;
            let schema = batches.first().map(RecordBatch::schema).ok_or(StorageError::Gone)?;
            Ok::<_, StorageError>(arrow::compute::concat_batches(&schema, &batches)?)
        });
        let batch = decoded.await.map_err(|error| StorageError::Format { op: "decode", text: error.to_string() })??;
        Ok((batch, read))
    }

    fn cached(&self, (no, row): (TopicNo, u64)) -> Option<RecordBatch> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cache.entries.iter().position(|(of, first, ..)| (*of, *first) == (no, row))?;
        let entry = cache.entries.remove(at)?;
        let batch = entry.2.clone();
        cache.entries.push_back(entry);
        Some(batch)
    }

    fn keep(&self, (no, row): (TopicNo, u64), batch: RecordBatch) {
        let bytes = batch.get_array_memory_size();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.bytes += bytes;
        cache.entries.push_back((no, row, batch, bytes));
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

/// A position in a topic's rows, in time order.
#[derive(Debug)]
pub struct RowStream {
    view: Arc<TopicView>,
    loader: Loader,
    window: Window,
    groups: VecDeque<Vec<Source>>,
    /// Order of the rows of the first group, once it was looked at: (source, row).
    order: Option<VecDeque<(u32, u32)>>,
    target_bytes: u64,
}

impl RowStream {
    /// Rows of a window, in batches of about `target_bytes` (one row may exceed it).
    pub fn new(view: Arc<TopicView>, loader: Loader, window: Window, target_bytes: u64) -> Self {
        let groups = groups(view.sources(), window);
        Self { view, loader, window, groups, order: None, target_bytes }
    }

    /// The next rows, in the stored schema, never an empty batch. `None` at the end.
    ///
    /// # Errors
    /// When a file cannot be read or its bytes are damaged.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            let Some(group) = self.groups.front().cloned() else {
                return Ok(None);
            };
            let mut order = match self.order.take() {
                Some(order) => order,
                None => self.order_of(&group).await?,
            };
            if order.is_empty() {
                self.groups.pop_front();
                continue;
            }
            let (rows, data_bytes) =
                group.iter().fold((0, 0), |sum, source| (sum.0 + source.rows, sum.1 + source.data_bytes));
            let row_bytes = (data_bytes / rows.max(1)).max(1);
            let take = usize::try_from((self.target_bytes / row_bytes).max(1)).unwrap_or(usize::MAX).min(order.len());
            let take = few_sources(order.iter().take(take));
            let picked: Vec<(u32, u32)> = order.drain(..take).collect();
            // Cancel-safety: a stream that is dropped here is not asked again.
            let batch = self.pick(&group, &picked).await?;
            self.order = Some(order);
            return Ok(Some(batch));
        }
    }

    async fn order_of(&self, group: &[Source]) -> Result<VecDeque<(u32, u32)>> {
        let _turn = self.loader.holding.acquire().await.map_err(|_| StorageError::Gone)?;
        let mut keyed: Vec<(i64, u32, u32)> = Vec::new();
        let mut sorted = group.len() == 1;
        for (index, source) in (0_u32..).zip(group) {
            let batch = self.loader.load(&self.view, source.place).await?;
            let times = batch.column(self.view.schema.time_column).as_primitive::<Int64Type>();
            sorted &= source.sorted;
            keyed.extend(
                (0_u32..)
                    .zip(times.values())
                    .filter(|(_, time)| self.window.holds(**time))
                    .map(|(row, time)| (*time, index, row)),
            );
        }
        if !sorted {
            keyed.sort_unstable();
        }
        Ok(keyed.into_iter().map(|(_, source, row)| (source, row)).collect())
    }

    async fn pick(&self, group: &[Source], picked: &[(u32, u32)]) -> Result<RecordBatch> {
        let _turn = self.loader.holding.acquire().await.map_err(|_| StorageError::Gone)?;
        let mut used: Vec<u32> = picked.iter().map(|(source, _)| *source).collect();
        used.sort_unstable();
        used.dedup();
        let mut batches = Vec::with_capacity(used.len());
        for index in &used {
            match group.get(*index as usize) {
                Some(source) => batches.push(self.loader.load(&self.view, source.place).await?),
                None => return Err(StorageError::Gone),
            }
        }
        if let ([batch], Some(first)) = (batches.as_slice(), contiguous(picked)) {
            return Ok(batch.slice(first, picked.len()));
        }
        let indices: Vec<(usize, usize)> =
            picked.iter().map(|(source, row)| (used.binary_search(source).unwrap_or(0), *row as usize)).collect();
        let sources: Vec<&RecordBatch> = batches.iter().collect();
        Ok(arrow::compute::interleave_record_batch(&sources, &indices)?)
    }
}

/// How many rows to take so that they come from at most [`limits::SOURCES_PER_BATCH_MAX`] sources:
/// times that jump over a whole topic must not bring all of it into memory at once.
fn few_sources<'a>(rows: impl Iterator<Item = &'a (u32, u32)>) -> usize {
    let mut seen: Vec<u32> = Vec::with_capacity(limits::SOURCES_PER_BATCH_MAX);
    rows.take_while(|(source, _)| {
        if seen.contains(source) {
            return true;
        }
        seen.push(*source);
        seen.len() <= limits::SOURCES_PER_BATCH_MAX
    })
    .count()
}

/// The first row, if the picked rows of one source follow one another.
fn contiguous(picked: &[(u32, u32)]) -> Option<usize> {
    let (_, first) = picked.first()?;
    let follow = (*first..).zip(picked).all(|(expected, (_, row))| expected == *row);
    follow.then_some(*first as usize)
}

/// Counts rows of a window without reading what lies wholly inside or outside of it.
///
/// # Errors
/// When a chunk at the window's edge cannot be read.
pub async fn count(view: &Arc<TopicView>, loader: &Loader, window: Window) -> Result<(u64, Option<(i64, i64)>)> {
    let mut rows = 0;
    let mut interval: Option<(i64, i64)> = None;
    let mut widen = |first: i64, last: i64| {
        interval = Some(interval.map_or((first, last), |(a, b)| (a.min(first), b.max(last))));
    };
    for source in view.sources().filter(|source| window.meets(source.time)) {
        if window.covers(source.time) {
            rows += source.rows;
            widen(source.time.0, source.time.1);
            continue;
        }
        let batch = loader.load(view, source.place).await?;
        let times = batch.column(view.schema.time_column).as_primitive::<Int64Type>();
        for time in times.values().iter().filter(|time| window.holds(**time)) {
            rows += 1;
            widen(*time, *time);
        }
    }
    Ok((rows, interval))
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
    fn inv_7_rows_that_jump_over_many_chunks_are_taken_a_few_chunks_at_a_time() {
        let jumping: Vec<(u32, u32)> = (0..100).map(|row| (row, 0)).collect();
        assert_eq!(few_sources(jumping.iter()), limits::SOURCES_PER_BATCH_MAX);
        let staying: Vec<(u32, u32)> = (0..100).map(|row| (row % 2, row)).collect();
        assert_eq!(few_sources(staying.iter()), 100);
    }

    #[test]
    fn a_window_leaves_out_what_only_touches_its_open_end() {
        let window = Window { start: Some(10), end: Some(20) };
        check(&[(0, 9), (0, 10), (12, 13), (20, 30)], window, &[&[1], &[2]]);
    }
}
