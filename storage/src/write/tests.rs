//! How a chunk is handed over: what a disk is asked for, and in what order.

use super::*;
use crate::catalog::records::{SequenceRecord, SessionRecord, TopicRecord};
use crate::chunk::{Compression, Format};
use crate::ids::{SequenceId, SessionId};
use crate::limits::RING_BUFFER_BYTES;
use crate::ontology::{OntologyRecord, Origin};
use arrow::array::{ArrayRef, BinaryArray, Int64Array};
use arrow::datatypes::{DataType, Field, Schema};
use std::cell::RefCell;
use std::path::Path;

/// What was asked of a [`Counting`] disk, in order.
#[derive(Debug, PartialEq)]
enum Asked {
    Create,
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
        self.0.borrow_mut().push(Asked::Create);
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
    ) -> impl Future<Output = (io::Result<()>, Vec<u8>)> + 'static {
        self.0.borrow_mut().push(Asked::Write(len));
        async { (Ok(()), buf) }
    }
    async fn read(&self, (): &(), _at: u64, _len: usize) -> io::Result<bytes::Bytes> {
        Ok(bytes::Bytes::new())
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

/// A topic of one blob column on a counting disk.
struct Upload {
    disk: Counting,
    shared: Shared,
    schema: Arc<TopicSchema>,
    encoder: TopicEncoder,
    topic: TopicNo,
    place: SegmentWriter<Counting>,
    written: u64,
}

impl Upload {
    fn new(disk: Counting, segment_bytes: u64, prealloc_bytes: u64) -> Self {
        let wire = Arc::new(Schema::new(vec![
            Field::new("timestamp_ns", DataType::Int64, false),
            Field::new("data", DataType::Binary, false),
        ]));
        let schema = TopicSchema::check(wire).expect("a schema");
        let shared = Shared {
            volumes: Arc::new(Volumes::only(PathBuf::from("/nowhere"))),
            segment_bytes,
            index: true,
            prealloc: Arc::new(PreallocBudget::new(prealloc_bytes)),
            counters: IoCounters::shared(),
            // Never by time: only counts are under test.
            encode_slice: Duration::from_secs(3600),
        };
        let facts = Arc::new(blob_topic(&schema.wire));
        let topic = facts.topic.no;
        let encoder = schema.encoder(Compression::None).expect("an encoder");
        let place = SegmentWriter::new(&shared, facts, 0);
        Self { disk, shared, schema, encoder, topic, place, written: 0 }
    }

    /// Writes a chunk of one blob; returns the number of its segment.
    async fn write(&mut self, bytes: usize) -> u32 {
        let columns: Vec<ArrayRef> =
            vec![Arc::new(Int64Array::from(vec![1])), Arc::new(BinaryArray::from_vec(vec![&vec![7_u8; bytes]]))];
        let chunk = ChunkRows {
            batches: vec![RecordBatch::try_new(Arc::clone(&self.schema.stored), columns).expect("a batch")],
            marks: vec![BatchMark { rows: 1, hash: 0 }],
            first_batch: self.written,
            first_row: self.written,
            data_bytes: bytes as u64,
            time: Some((1, 1)),
            time_sorted: true,
        };
        self.written += 1;
        let Self { disk, shared, schema, encoder, topic, place, .. } = self;
        let pending = place.write(disk, shared, schema, encoder, *topic, &chunk).await.expect("written");
        pending.durable(disk).await.expect("durable").segment.no
    }
}

fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, work);
}

#[test]
fn a_segment_is_made_while_the_one_before_has_room_and_the_chunk_that_needs_it_finds_it() {
    run(async {
        let mut upload = Upload::new(Counting::default(), 4 << 20, 64 << 20);
        let asked = Rc::clone(&upload.disk.0);
        let made = || asked.borrow().iter().filter(|asked| **asked == Asked::Create).count();
        upload.write(1 << 20).await;
        assert!(upload.place.make_ahead(&upload.disk, &upload.shared).is_none(), "it is not half full");
        upload.write(2 << 20).await;
        let making = upload.place.make_ahead(&upload.disk, &upload.shared).expect("it is half full");
        assert!(upload.place.make_ahead(&upload.disk, &upload.shared).is_none(), "one is enough");
        making.await;
        assert_eq!((made(), upload.place.made_below()), (2, 1), "nothing is in the second one yet");
        assert_eq!(upload.write(2 << 20).await, 1);
        assert_eq!((made(), upload.place.made_below()), (2, 2));
    });
}

#[test]
fn what_was_reserved_is_free_again_once_its_segments_are_left_also_if_it_was_short_meanwhile() {
    run(async {
        let mut upload = Upload::new(Counting::default(), 64 << 20, 8 << 20);
        let prealloc = Arc::clone(&upload.shared.prealloc);
        upload.write(1 << 20).await;
        // Other topics have it all: the chunk is written beyond what was reserved.
        prealloc.take(8 << 20);
        upload.write(2 << 20).await;
        prealloc.give_back(8 << 20);
        upload.write(1 << 20).await;
        assert!(prealloc.left() < 8 << 20, "nothing was reserved");
        drop(upload);
        assert_eq!(prealloc.left(), 8 << 20);
    });
}

/// Nothing a writer hands over waits behind more than one ring buffer's worth of encoding: its
/// thread parks, which submits, at least once per mebibyte, even inside a single huge value.
#[test]
fn inv_10_a_writer_parks_at_least_once_per_mebibyte_even_within_one_value_of_40_mib() {
    let mut upload = Upload::new(Counting::default(), 256 << 20, 0);
    let asked = Rc::clone(&upload.disk.0);
    run(async move {
        upload.write(40 << 20).await;
    });
    let (mut since, mut most) = (0, 0);
    for asked in asked.borrow().iter() {
        match asked {
            Asked::Write(bytes) => since += bytes,
            Asked::Breathe => since = 0,
            Asked::Create => {}
        }
        most = most.max(since);
    }
    assert!(most <= 2 * RING_BUFFER_BYTES, "{most} bytes were handed over without parking");
    let parked = asked.borrow().iter().filter(|asked| **asked == Asked::Breathe).count();
    assert!(parked >= 40, "parked {parked} times in 40 MiB");
}
