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
use crate::chunk::record::{ColumnRecord, SkipRecord, chunk_crc, column_crc_seed};
use crate::chunk::{BatchMark, ChunkRecord, Piece, TopicEncoder, stats};
use crate::disk::{Disk, Durability, IoCounters};
use crate::error::{Result, StorageError};
use crate::ids::{SegmentId, TopicId, TopicNo};
use crate::limits::RING_BUFFER_BYTES;
use crate::recover::create_segment;
use crate::schema::TopicSchema;
use crate::segment::{self, Head, TopicFacts, Trailer};
use arrow::array::RecordBatch;
use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Bytes that are copied before the clock is looked at.
const COPY_BYTES: usize = 128 << 10;

/// What all segment writers of a thread share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Root of the recordings.
    pub data_dir: PathBuf,
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

/// Unused preallocation of all open segments together.
#[derive(Debug)]
pub struct PreallocBudget {
    bytes_max: u64,
    unused: AtomicU64,
}

impl PreallocBudget {
    /// A budget of `bytes_max`.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, unused: AtomicU64::new(0) }
    }

    fn left(&self) -> u64 {
        self.bytes_max.saturating_sub(self.unused.load(Ordering::Relaxed))
    }

    fn take(&self, bytes: u64) {
        self.unused.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: u64) {
        self.unused.fetch_sub(bytes, Ordering::Relaxed);
    }
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

/// How many bytes to preallocate next; pure. `None`: nothing, the write extends the file.
fn prealloc_step(allocated: u64, write_at: u64, chunk: u64, segment_bytes: u64, left: u64) -> Option<u64> {
    let needed = (write_at + chunk).saturating_sub(allocated).next_multiple_of(1 << 20);
    if needed == 0 || left < needed {
        return None;
    }
    // Doubling with what was written: a slow topic reserves little, a fast one rarely asks.
    let doubled = needed.max(write_at);
    let room = segment_bytes.saturating_sub(allocated).max(needed);
    Some(segment::block_ceil(doubled.min(room).min(left).max(needed)))
}

/// A topic's current segment.
#[derive(Debug)]
pub struct SegmentWriter<D: Disk> {
    dir: PathBuf,
    facts: Arc<TopicFacts>,
    /// When the upload began, see [`Trailer::upload`].
    upload: i64,
    current: Option<Current<D::File>>,
    next_no: u32,
    /// Above every file that this upload may have made.
    made_below: u32,
    prealloc: Arc<PreallocBudget>,
}

#[derive(Debug)]
struct Current<F> {
    file: F,
    path: PathBuf,
    no: u32,
    id: SegmentId,
    /// Where its head ends.
    first_chunk: u64,
    write_at: u64,
    allocated: u64,
    poisoned: Rc<Cell<bool>>,
}

impl<D: Disk> Drop for SegmentWriter<D> {
    fn drop(&mut self) {
        self.retire();
    }
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
            dir: segment::topic_dir(&shared.data_dir, facts.topic.sequence, facts.topic.id),
            facts,
            upload,
            current: None,
            next_no: 0,
            made_below: 0,
            prealloc: Arc::clone(&shared.prealloc),
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

    fn retire(&mut self) {
        if let Some(current) = self.current.take() {
            self.prealloc.give_back(current.allocated.saturating_sub(current.write_at));
        }
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
        if self.current.as_ref().is_some_and(|current| {
            current.poisoned.get()
                || (current.write_at > current.first_chunk
                    && shared.segment_bytes < current.write_at + chunk.data_bytes)
        }) {
            self.retire();
        }
        if self.current.is_none() {
            self.current = Some(self.create(disk, shared).await?);
        }
        let Some(current) = self.current.as_mut() else {
            return Err(StorageError::Gone);
        };
        preallocate(disk, shared, current, chunk.data_bytes).await;
        let start = current.write_at;
        let mut sink = Sink {
            disk: disk.clone(),
            file: current.file.clone(),
            poisoned: Rc::clone(&current.poisoned),
            at: start,
            buf: None,
            filled: 0,
            since_breath: 0,
            writes: Vec::new(),
        };
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
        let padded = trailer.record.padded_length;
        current.write_at = start + padded;
        shared.prealloc.give_back(padded.min(current.allocated.saturating_sub(start)));
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
            writes: sink.writes,
            file: current.file.clone(),
            path: current.path.clone(),
            poisoned: Rc::clone(&current.poisoned),
            written,
            counters: Arc::clone(&shared.counters),
            kinds,
        })
    }

    async fn create(&mut self, disk: &D, shared: &Shared) -> Result<Current<D::File>> {
        loop {
            let no = self.next_no;
            let path = self.dir.join(segment::file_name(no));
            // Taken even if making it fails: a half-made file must not be met again.
            self.next_no += 1;
            let head = Head { segment: no, segment_id: SegmentId::random(), epoch: 0, facts: (*self.facts).clone() };
            let made = create_segment(disk, &shared.data_dir, &self.dir, &path, &head, &shared.counters).await;
            let (file, first_chunk) = match made {
                Ok(made) => {
                    self.made_below = no + 1;
                    made
                }
                // Left by an earlier upload that ended with nothing durable; the next start removes it.
                Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            return Ok(Current {
                file,
                path,
                no,
                id: head.segment_id,
                first_chunk,
                write_at: first_chunk,
                allocated: first_chunk,
                poisoned: Rc::default(),
            });
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

async fn preallocate<D: Disk>(disk: &D, shared: &Shared, current: &mut Current<D::File>, data_bytes: u64) {
    let step =
        prealloc_step(current.allocated, current.write_at, data_bytes, shared.segment_bytes, shared.prealloc.left());
    let Some(step) = step else { return };
    // A refusal (a file system without it, a full disk) is no failure: the write itself will tell.
    if disk.allocate(&current.file, current.allocated, step).await.is_ok() {
        current.allocated += step;
        shared.prealloc.take(step);
    }
}

/// Encodes the rows into the sink, parking often enough for others; returns the columns.
async fn encode<D: Disk>(
    shared: &Shared,
    encoder: &TopicEncoder,
    chunk: &ChunkRows,
    (segment, start): (SegmentId, u64),
    sink: &mut Sink<D>,
) -> Result<Vec<ColumnRecord>> {
    let mut encoding = encoder.begin(&chunk.batches)?;
    let mut columns: Vec<ColumnRecord> = Vec::new();
    let mut crc = Running::from(column_crc_seed(segment, 0, 0, start));
    let mut slice = Instant::now();
    while let Some(pieces) = encoding.step()? {
        for piece in pieces {
            match piece {
                // A page may be one value of 45 MiB: its parts are submitted as they are copied.
                Piece::Page(bytes) => {
                    for part in bytes.chunks(COPY_BYTES) {
                        sink.put(part, &mut crc).await;
                        if slice.elapsed() >= shared.encode_slice || sink.since_breath >= RING_BUFFER_BYTES {
                            sink.breathe().await;
                            slice = Instant::now();
                        }
                    }
                }
                Piece::ColumnEnd(mut column) => {
                    column.crc = crc.value();
                    columns.push(column);
                    crc = Running::from(column_crc_seed(segment, 0, columns.len(), sink.position()));
                }
            }
        }
        if slice.elapsed() >= shared.encode_slice {
            sink.breathe().await;
            slice = Instant::now();
        }
    }
    Ok(columns)
}

/// Writes padding and trailer; returns the trailer with the bytes of chunk, padding and trailer.
async fn finish<D: Disk>(
    sink: &mut Sink<D>,
    current: &Current<D::File>,
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

/// Fills ring buffers and sends each on its way when it is full.
struct Sink<D: Disk> {
    disk: D,
    file: D::File,
    poisoned: Rc<Cell<bool>>,
    /// Offset of the current buffer in the file.
    at: u64,
    buf: Option<D::Buf>,
    filled: usize,
    /// Bytes handed over since the thread parked last.
    since_breath: usize,
    writes: Vec<JoinHandle<io::Result<()>>>,
}

impl<D: Disk> Sink<D> {
    fn position(&self) -> u64 {
        self.at + self.filled as u64
    }

    /// Copies bytes into ring buffers, and into the column's checksum.
    async fn put(&mut self, mut bytes: &[u8], crc: &mut Running) {
        while !bytes.is_empty() {
            let mut buf = match self.buf.take() {
                Some(buf) => buf,
                // Waits for the device: the buffers of this chunk come back as its writes complete.
                None => self.disk.buffer().await,
            };
            let take = bytes.len().min(RING_BUFFER_BYTES - self.filled);
            let (now, later) = bytes.split_at(take);
            if let Some(into) = buf.get_mut(self.filled..self.filled + take) {
                crc.add_and_copy(now, into);
            }
            self.filled += take;
            self.since_breath += take;
            self.buf = Some(buf);
            bytes = later;
            if self.filled == RING_BUFFER_BYTES {
                self.flush();
            }
        }
    }

    /// Parks: the kernel gets what was submitted, other topics of the thread their turn (INV-10).
    async fn breathe(&mut self) {
        self.since_breath = 0;
        self.disk.breathe().await;
    }

    /// Submits what is in the buffer, which ends on a block boundary.
    fn flush(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let (at, length) = (self.at, self.filled);
        self.at += length as u64;
        self.filled = 0;
        let write = self.disk.write(&self.file, buf, length, at, Durability::Later);
        let poisoned = Rc::clone(&self.poisoned);
        self.writes.push(tokio::task::spawn_local(async move {
            let (result, _buf) = write.await;
            if result.is_err() {
                poisoned.set(true);
            }
            result
        }));
    }
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
mod tests {
    use super::*;
    use crate::catalog::records::{SequenceRecord, SessionRecord, TopicRecord};
    use crate::chunk::{Compression, Format};
    use crate::ids::{SequenceId, SessionId};
    use crate::ontology::{OntologyRecord, Origin};
    use arrow::array::{ArrayRef, BinaryArray, Int64Array};
    use arrow::datatypes::{DataType, Field, Schema};
    use std::cell::RefCell;
    use std::path::Path;

    /// What was asked of a [`Counting`] disk, in order.
    #[derive(Debug, PartialEq)]
    enum Asked {
        Write(usize),
        Breathe,
    }

    /// A disk that only notes when it was written to and when its thread parked.
    #[derive(Clone, Default)]
    struct Counting(Rc<RefCell<Vec<Asked>>>);

    #[expect(clippy::manual_async_fn, reason = "an async fn would hold on to its arguments")]
    impl Disk for Counting {
        type File = ();
        type Buf = Vec<u8>;
        async fn buffer(&self) -> Vec<u8> {
            vec![0; RING_BUFFER_BYTES]
        }
        fn registered(&self) -> bool {
            false
        }
        async fn create(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }
        async fn open(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }
        fn write(
            &self,
            (): &(),
            buf: Vec<u8>,
            len: usize,
            _at: u64,
            _durability: Durability,
        ) -> impl Future<Output = (io::Result<()>, Vec<u8>)> + 'static {
            self.0.borrow_mut().push(Asked::Write(len));
            async { (Ok(()), buf) }
        }
        fn read(
            &self,
            (): &(),
            buf: Vec<u8>,
            _len: usize,
            _at: u64,
        ) -> impl Future<Output = (io::Result<usize>, Vec<u8>)> + 'static {
            async { (Ok(0), buf) }
        }
        fn sync(&self, (): &()) -> impl Future<Output = io::Result<()>> + 'static {
            async { Ok(()) }
        }
        async fn allocate(&self, (): &(), _from: u64, _length: u64) -> io::Result<()> {
            Ok(())
        }
        async fn truncate(&self, (): &(), _length: u64) -> io::Result<()> {
            Ok(())
        }
        async fn make_dir(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }
        async fn sync_dir(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }
        async fn link(&self, _from: &Path, _to: &Path) -> io::Result<()> {
            Ok(())
        }
        async fn remove_dir(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }
        async fn breathe(&self) {
            self.0.borrow_mut().push(Asked::Breathe);
            tokio::task::yield_now().await;
        }
    }

    fn blob_topic(schema: &Schema) -> TopicFacts {
        let topic = TopicRecord {
            no: TopicNo(1),
            id: TopicId::random(),
            sequence: SequenceId::random(),
            session: SessionId::random(),
            locator: "s/cam".to_owned(),
            ontology_tag: "test".to_owned(),
            format: Format::Image,
            user_metadata: "{}".to_owned(),
            created_at_ns: 0,
            completed_at_ns: None,
        };
        let message = crate::schema::to_ipc(schema);
        TopicFacts {
            sequence: SequenceRecord {
                id: topic.sequence,
                name: "s".to_owned(),
                user_metadata: "{}".to_owned(),
                created_at_ns: 0,
                v0_session: None,
            },
            session: SessionRecord {
                id: topic.session,
                locator: "s:x".to_owned(),
                sequence: topic.sequence,
                created_at_ns: 0,
                completed_at_ns: None,
            },
            ontology: OntologyRecord {
                tag: "test".to_owned(),
                version: 1,
                origin: Origin::FirstUse,
                created_at_ns: 0,
                schema: message.clone(),
                derived: Vec::new(),
            },
            schema: message,
            note: None,
            topic,
        }
    }

    /// Nothing a writer hands over waits behind more than one ring buffer's worth of encoding: its
    /// thread parks, which submits, at least once per mebibyte, even inside a single huge value.
    #[test]
    fn inv_10_a_writer_parks_at_least_once_per_mebibyte_even_within_one_value_of_40_mib() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let disk = Counting::default();
        let asked = Rc::clone(&disk.0);
        let work = async move {
            let wire = Arc::new(Schema::new(vec![
                Field::new("timestamp_ns", DataType::Int64, false),
                Field::new("data", DataType::Binary, false),
            ]));
            let schema = TopicSchema::check(Arc::clone(&wire)).expect("a schema");
            let blob = vec![7_u8; 40 << 20];
            let columns: Vec<ArrayRef> =
                vec![Arc::new(Int64Array::from(vec![1])), Arc::new(BinaryArray::from_vec(vec![&blob]))];
            let chunk = ChunkRows {
                batches: vec![RecordBatch::try_new(wire, columns).expect("a batch")],
                marks: vec![BatchMark { rows: 1, hash: 0 }],
                first_batch: 0,
                first_row: 0,
                data_bytes: 40 << 20,
                time: Some((1, 1)),
                time_sorted: true,
            };
            let shared = Shared {
                data_dir: PathBuf::from("/nowhere"),
                segment_bytes: 256 << 20,
                index: true,
                prealloc: Arc::new(PreallocBudget::new(0)),
                counters: IoCounters::shared(),
                // Never by time: only the count is under test.
                encode_slice: Duration::from_secs(3600),
            };
            let facts = Arc::new(blob_topic(&schema.wire));
            let topic = facts.topic.clone();
            let encoder = TopicEncoder::new(&schema.stored, Compression::None).expect("an encoder");
            let mut place = SegmentWriter::new(&shared, facts, 0);
            let pending = place.write(&disk, &shared, &schema, &encoder, topic.no, &chunk).await.expect("written");
            pending.durable(&disk).await.expect("durable");
        };
        tokio::task::LocalSet::new().block_on(&runtime, work);
        let (mut since, mut most) = (0, 0);
        for asked in asked.borrow().iter() {
            match asked {
                Asked::Write(bytes) => since += bytes,
                Asked::Breathe => since = 0,
            }
            most = most.max(since);
        }
        assert!(most <= 2 * RING_BUFFER_BYTES, "{most} bytes were handed over without parking");
        let parked = asked.borrow().iter().filter(|asked| **asked == Asked::Breathe).count();
        assert!(parked >= 40, "parked {parked} times in 40 MiB");
    }

    const MIB: u64 = 1 << 20;

    #[track_caller]
    fn check(allocated: u64, write_at: u64, chunk: u64, left: u64, expected: Option<u64>) {
        assert_eq!(prealloc_step(allocated, write_at, chunk, 256 * MIB, left), expected);
    }

    #[test]
    fn a_small_chunk_reserves_one_mebibyte() {
        check(4096, 4096, 1000, 4096 * MIB, Some(MIB));
    }

    #[test]
    fn what_is_reserved_doubles_with_what_was_written() {
        check(64 * MIB, 64 * MIB, 16 * MIB, 4096 * MIB, Some(64 * MIB));
    }

    #[test]
    fn a_segment_is_not_reserved_beyond_its_size() {
        check(250 * MIB, 250 * MIB, 2 * MIB, 4096 * MIB, Some(6 * MIB));
    }

    #[test]
    fn what_fits_is_not_reserved_again() {
        check(64 * MIB, 10 * MIB, 16 * MIB, 4096 * MIB, None);
    }

    #[test]
    fn an_exhausted_budget_reserves_nothing() {
        check(4096, 4096, 16 * MIB, MIB, None);
    }
}
