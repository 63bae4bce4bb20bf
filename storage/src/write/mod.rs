//! Stations 5 and 6: a chunk's rows to bytes in aligned buffers to their place in a segment.
//!
//! Order, and what is lost if it changes: a segment's head block, its name and its folders are
//! durable before any of its chunks can be committed; a chunk's place is known only when the chunk
//! before it is encoded, so encoding holds the segment, writing does not; a chunk counts as written
//! when its bytes and its trailer are on stable media, and its record says where (INV-1).
//!
//! A write that failed poisons its segment: nothing goes there any more and what was not committed
//! from it is encoded again, in order, into the next one. The rows are kept for that until commit,
//! so ring buffers are only ever passing through.

use crate::catalog::records::SegmentRecord;
use crate::checksum::Running;
use crate::chunk::record::{ColumnRecord, SkipRecord, chunk_crc};
use crate::chunk::{BatchMark, ChunkRecord, TopicEncoder, stats};
use crate::disk::{Disk, IoCounters};
use crate::error::{Result, StorageError};
use crate::ids::{TopicId, TopicNo};
use crate::schema::TopicSchema;
use crate::segment::{self, TopicFacts, Trailer};
use crate::volumes::Volumes;
use arrow::array::RecordBatch;
use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

mod file;
mod prealloc;
mod sink;

use file::{Plan, SegmentFile};
pub use prealloc::PreallocBudget;
use sink::{Sink, encode};

/// What all segment writers of a thread share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Where recordings lie.
    pub volumes: Arc<Volumes>,
    /// Size at which a segment is full.
    pub segment_bytes: u64,
    /// Whether chunks get statistics; only measurements go without.
    pub index: bool,
    /// Most that may be preallocated and unused, over all segments of the program.
    pub prealloc: Arc<PreallocBudget>,
    /// Bytes by kind.
    pub counters: Arc<IoCounters>,
    /// How long encoding goes on before the thread parks.
    pub encode_slice: Duration,
}

/// A closed chunk: rows of the stored schema with the numbers they carry.
#[derive(Debug)]
pub struct ChunkRows {
    /// The rows in arrival order.
    pub batches: Vec<RecordBatch>,
    /// The batches as they came.
    pub marks: Vec<BatchMark>,
    /// First batch number.
    pub first_batch: u64,
    /// First row number.
    pub first_row: u64,
    /// Weight before encoding.
    pub data_bytes: u64,
    /// Smallest and largest time.
    pub time: Option<(i64, i64)>,
    /// Whether times never decrease.
    pub time_sorted: bool,
}

impl ChunkRows {
    fn rows(&self) -> u64 {
        self.marks.iter().map(|mark| u64::from(mark.rows)).sum()
    }
}

/// A topic's current segment, and the next one once this one is half full.
#[derive(Debug)]
pub struct SegmentWriter<D: Disk> {
    dir: PathBuf,
    /// Root of the volume that its folder goes to, unless it is there already.
    home: PathBuf,
    facts: Arc<TopicFacts>,
    /// When the upload began, see [`Trailer::upload`].
    upload: i64,
    current: Option<SegmentFile<D::File>>,
    /// The next one, made or being made.
    ahead: Option<oneshot::Receiver<Result<SegmentFile<D::File>>>>,
    next_no: u32,
    /// Above every file that this upload may have made.
    made_below: u32,
}

/// A chunk whose bytes are all submitted.
#[derive(Debug)]
pub struct Pending<F> {
    writes: Vec<JoinHandle<io::Result<()>>>,
    file: F,
    path: PathBuf,
    poisoned: Rc<Cell<bool>>,
    written: Written,
    counters: Arc<IoCounters>,
    kinds: [u64; 3],
}

/// A chunk on stable media.
#[derive(Debug)]
pub struct Written {
    /// Where and what.
    pub record: ChunkRecord,
    /// Its statistics.
    pub skip: SkipRecord,
    /// Its segment, ending with this chunk.
    pub segment: SegmentRecord,
    poisoned: Rc<Cell<bool>>,
    path: PathBuf,
}

impl Written {
    /// The chunk, unless another write to its segment failed meanwhile.
    ///
    /// # Errors
    /// When the segment is poisoned: the chunk is written again elsewhere.
    pub fn unless_poisoned(self) -> Result<Self> {
        if self.poisoned.get() {
            let cause = io::Error::other("an earlier write to this segment failed");
            return Err(StorageError::io("write", self.path, cause));
        }
        Ok(self)
    }
}

impl<D: Disk> SegmentWriter<D> {
    /// A topic that has no segment yet.
    pub fn new(shared: &Shared, facts: Arc<TopicFacts>, upload: i64) -> Self {
        Self {
            dir: segment::topic_dir(shared.volumes.data_dir(), facts.topic.sequence, facts.topic.id),
            home: shared.volumes.home(facts.topic.no).to_owned(),
            facts,
            upload,
            current: None,
            ahead: None,
            next_no: 0,
            made_below: 0,
        }
    }

    /// The same, for a topic whose earlier segments have smaller numbers.
    pub fn starting_at(mut self, segment: u32) -> Self {
        self.next_no = segment;
        self.made_below = segment;
        self
    }

    /// A number above all files that this upload has committed chunks to. Not above those that could not be
    /// made: the next upload's may have their numbers.
    pub fn made_below(&self) -> u32 {
        self.made_below
    }

    /// Encodes a chunk behind the last one and submits its writes.
    ///
    /// # Errors
    /// When the segment cannot be made, or the rows cannot be encoded.
    pub async fn write(
        &mut self,
        disk: &D,
        shared: &Shared,
        schema: &TopicSchema,
        encoder: &TopicEncoder,
        topic: TopicNo,
        chunk: &ChunkRows,
    ) -> Result<Pending<D::File>> {
        self.current.take_if(|current| current.is_closed_to(chunk.data_bytes, shared.segment_bytes));
        let current = match self.current.take() {
            Some(current) => current,
            None => self.next(disk, shared).await?,
        };
        let current = self.current.insert(current);
        current.reserve(disk, chunk.data_bytes, shared.segment_bytes).await;
        let start = current.write_at;
        let mut sink = Sink::new(disk.clone(), current.file.clone(), Rc::clone(&current.poisoned), start);
        let encoded = encode(shared, encoder, chunk, (current.id, start), &mut sink).await;
        let result = match encoded {
            Ok(columns) => {
                let fields =
                    if shared.index { statistics(disk, shared, schema, encoder, chunk).await } else { Vec::new() };
                finish(&mut sink, current, (self.facts.topic.id, topic, self.upload), chunk, columns, fields).await
            }
            Err(error) => Err(error),
        };
        let (trailer, kinds) = match result {
            Ok(done) => done,
            Err(error) => {
                // Bytes of half a chunk may be on their way to this place: leave it alone for good.
                current.poisoned.set(true);
                return Err(error);
            }
        };
        current.advance(chunk.data_bytes, trailer.record.padded_length);
        let skip = SkipRecord { fields: trailer.fields };
        let segment = SegmentRecord {
            no: current.no,
            id: current.id,
            epoch: 0,
            end_offset: current.write_at,
            sealed_length: None,
        };
        let written = Written {
            record: trailer.record,
            skip,
            segment,
            poisoned: Rc::clone(&current.poisoned),
            path: current.path.clone(),
        };
        Ok(Pending {
            writes: sink.into_writes(),
            file: current.file.clone(),
            path: current.path.clone(),
            poisoned: Rc::clone(&current.poisoned),
            written,
            counters: Arc::clone(&shared.counters),
            kinds,
        })
    }

    /// The work that makes the next segment while there is still room in this one: a chunk that needs it would
    /// wait for two syncs. If no chunk comes, the file is removed with what else was not committed.
    pub fn make_ahead(&mut self, disk: &D, shared: &Shared) -> Option<impl Future<Output = ()> + use<D>> {
        let half_full = self.current.as_ref().is_some_and(|current| shared.segment_bytes / 2 < current.write_at);
        if !half_full || self.ahead.is_some() {
            return None;
        }
        let (made, ahead) = oneshot::channel();
        self.ahead = Some(ahead);
        let (plan, disk, segment_bytes) = (self.plan(shared), disk.clone(), shared.segment_bytes);
        Some(async move {
            let mut segment = plan.make(&disk).await;
            if let Ok(segment) = &mut segment {
                segment.reserve_ahead(&disk, segment_bytes).await;
            }
            made.send(segment).ok(); // The upload has ended meanwhile.
        })
    }

    /// The segment behind the current one.
    async fn next(&mut self, disk: &D, shared: &Shared) -> Result<SegmentFile<D::File>> {
        if let Some(ahead) = self.ahead.take()
            && let Ok(Ok(segment)) = ahead.await
        {
            self.made_below = segment.no + 1;
            return Ok(segment);
        }
        loop {
            let plan = self.plan(shared);
            let no = plan.no;
            match plan.make(disk).await {
                Ok(segment) => {
                    self.made_below = no + 1;
                    return Ok(segment);
                }
                // Left by an earlier upload that ended with nothing durable; the next start removes it.
                Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn plan(&mut self, shared: &Shared) -> Plan {
        let no = self.next_no;
        // Taken even if making it fails: a half-made file must not be met again.
        self.next_no += 1;
        Plan {
            volumes: Arc::clone(&shared.volumes),
            home: self.home.clone(),
            dir: self.dir.clone(),
            no,
            facts: Arc::clone(&self.facts),
            counters: Arc::clone(&shared.counters),
            prealloc: Arc::clone(&shared.prealloc),
        }
    }
}

/// The typed statistics of a chunk, gathered batch by batch.
async fn statistics<D: Disk>(
    disk: &D,
    shared: &Shared,
    schema: &TopicSchema,
    encoder: &TopicEncoder,
    chunk: &ChunkRows,
) -> Vec<stats::FieldStats> {
    let mut collector = stats::Collector::new(&schema.stored, encoder.derived());
    let mut slice = Instant::now();
    for batch in &chunk.batches {
        collector.add(batch);
        if slice.elapsed() >= shared.encode_slice {
            disk.breathe().await;
            slice = Instant::now();
        }
    }
    collector.finish()
}

/// Writes padding and trailer; returns the trailer with the bytes of chunk, padding and trailer.
async fn finish<D: Disk>(
    sink: &mut Sink<D>,
    current: &SegmentFile<D::File>,
    (topic_id, topic, upload): (TopicId, TopicNo, i64),
    chunk: &ChunkRows,
    columns: Vec<ColumnRecord>,
    fields: Vec<stats::FieldStats>,
) -> Result<(Trailer, [u64; 3])> {
    let length = sink.position() - current.write_at;
    let record = ChunkRecord {
        segment: current.no,
        segment_id: current.id,
        epoch: 0,
        offset: current.write_at,
        length,
        padded_length: 0,
        first_batch: chunk.first_batch,
        end_batch: chunk.first_batch + chunk.marks.len() as u64,
        first_row: chunk.first_row,
        end_row: chunk.first_row + chunk.rows(),
        data_bytes: chunk.data_bytes,
        time: chunk.time,
        time_sorted: chunk.time_sorted,
        crc: chunk_crc(&columns),
        columns,
    };
    let trailer = Trailer { topic, topic_id, record, marks: chunk.marks.clone(), fields, upload };
    let (trailer, bytes) = trailer.encode(length)?;
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count() as u64;
    // The trailer has a checksum of its own.
    sink.put(&bytes, &mut Running::from(0)).await;
    sink.flush();
    Ok((trailer, [length, zeros, bytes.len() as u64 - zeros]))
}

impl<F: Clone + 'static> Pending<F> {
    /// Number of the segment the chunk lies in.
    pub fn segment(&self) -> u32 {
        self.written.segment.no
    }

    /// Waits until all of the chunk is on stable media.
    ///
    /// # Errors
    /// The first write or sync that failed; the segment is poisoned then.
    pub async fn durable<D: Disk<File = F>>(self, disk: &D) -> Result<Written> {
        let mut first_error = None;
        for write in self.writes {
            let result = write.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            if let Err(error) = result {
                first_error.get_or_insert(error);
            }
        }
        if first_error.is_none()
            && let Err(error) = disk.sync(&self.file).await
        {
            first_error = Some(error);
        }
        let [chunk, padding, trailer] = self.kinds;
        match first_error {
            None => {
                IoCounters::add(&self.counters.chunk, chunk);
                IoCounters::add(&self.counters.padding, padding);
                IoCounters::add(&self.counters.trailer, trailer);
                Ok(self.written)
            }
            Some(error) => {
                self.poisoned.set(true);
                IoCounters::add(&self.counters.rewrite, chunk + padding + trailer);
                Err(StorageError::io("write", self.path, error))
            }
        }
    }
}

#[cfg(test)]
mod tests;
