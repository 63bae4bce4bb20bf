//! What a writer knows of one topic: the open chunk, the order of its commits, how it will end.
//!
//! Guarantees: batches keep their order between gather, tail and chunk, and commits are queued in the
//! order their [`Turn`]s were taken (INV-2); permits follow the memory they stand for (INV-7).
//! Does not know: when a chunk closes, the committer, other topics.

use crate::ingest::admit::Permit;
use crate::ingest::committer::End;
use crate::ingest::gather::{OpenChunk, TailRate};
use crate::ingest::join::join;
use crate::limits;
use arrow::array::RecordBatch;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::StorageError;
use storage::catalog::records::TopicRecord;
use storage::chunk::{BatchMark, TopicEncoder};
use storage::disk::Disk;
use storage::schema::TopicSchema;
use storage::tail::TailRun;
use storage::write::SegmentWriter;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::JoinHandle;

/// One batch, checked and decoded, with what was found out about it on the way.
pub(crate) struct Batch {
    /// With the columns of the stored schema; the metadata may be the writer's.
    pub(crate) rows: RecordBatch,
    pub(crate) mark: BatchMark,
    pub(crate) data_bytes: u64,
    /// Smallest and largest time; `None` without rows.
    pub(crate) time: Option<(i64, i64)>,
    /// Whether the times never decrease.
    pub(crate) sorted: bool,
    pub(crate) permit: Permit,
    /// What decoding added.
    pub(crate) decode_permit: Option<Permit>,
    pub(crate) arrived: Instant,
    pub(crate) sent: Instant,
}

/// Tells a stream how its upload ended.
pub(super) type Answer = oneshot::Sender<Result<(), StorageError>>;

/// Batches of one topic since its last chunk.
#[derive(Default)]
pub(super) struct Open {
    /// Joined rows whose batches are in the tail, or on their way there.
    pub(super) safe: Pieces,
    /// Rows that are nowhere else.
    pub(super) fresh: Pieces,
    /// What was admitted for them, in bytes.
    pub(super) fresh_claimed: u64,
    pub(super) marks: Vec<BatchMark>,
    pub(super) safe_marks: usize,
    pub(super) safe_bytes: u64,
    pub(super) permits: Option<Permit>,
    pub(super) decode_permits: Option<Permit>,
    pub(super) data_bytes: u64,
    pub(super) time: Option<(i64, i64)>,
    pub(super) fresh_time: Option<(i64, i64)>,
    pub(super) sorted: bool,
    pub(super) oldest: Option<Instant>,
    pub(super) oldest_fresh: Option<Instant>,
    /// When the batches that nobody acknowledged yet arrived.
    pub(super) arrivals: Vec<Instant>,
}

pub(super) struct Topic<D: Disk> {
    pub(super) record: TopicRecord,
    pub(super) schema: Arc<TopicSchema>,
    pub(super) encoder: TopicEncoder,
    /// Told the first cause of a failure.
    pub(super) fails: watch::Sender<Option<StorageError>>,
    pub(super) open: RefCell<Open>,
    /// First batch and row of the open chunk.
    pub(super) next: Cell<(u64, u64)>,
    /// Where the next chunk goes; held while a chunk is encoded.
    pub(super) place: Mutex<SegmentWriter<D>>,
    /// Segments below this number were handed to the steward.
    pub(super) sealed_below: Cell<u32>,
    /// Chunks that lie in each segment and are not committed yet.
    pub(super) pending: RefCell<BTreeMap<u32, usize>>,
    /// Resolves when the entry before has its place in the committer's order.
    pub(super) turn: RefCell<Option<oneshot::Receiver<()>>>,
    pub(super) in_flight: Cell<usize>,
    pub(super) tail_in_flight: Cell<bool>,
    /// Its end has come: what is open of it closes with that, or stays in the tail.
    pub(super) ended: Cell<bool>,
    /// Its chunk is to close and waits for a place.
    pub(super) is_held_up: Cell<bool>,
    /// It is among those that every look looks at.
    pub(super) is_watched: Cell<bool>,
    /// Its place among the sizes of all.
    pub(super) slot: Cell<usize>,
    /// Makes its next segment ahead of need.
    pub(super) making: RefCell<Option<JoinHandle<()>>>,
    pub(super) failed: RefCell<Option<StorageError>>,
    pub(super) ending: RefCell<Option<(End, Answer)>>,
    pub(super) forgotten: RefCell<Option<oneshot::Sender<()>>>,
}

pub(super) fn rows_of(marks: &[BatchMark], skip: usize) -> u64 {
    marks.iter().skip(skip).map(|mark| u64::from(mark.rows)).sum()
}

/// A place in a topic's order: entries reach the committer in the order their turns were taken.
pub(super) struct Turn {
    before: RefCell<Option<oneshot::Receiver<()>>>,
    after: RefCell<Option<oneshot::Sender<()>>>,
}

impl Turn {
    pub(super) fn take<D: Disk>(topic: &Topic<D>) -> Self {
        let (after, next) = oneshot::channel();
        Self { before: RefCell::new(topic.turn.replace(Some(next))), after: RefCell::new(Some(after)) }
    }

    pub(super) async fn wait(&self) {
        let before = self.before.take();
        if let Some(before) = before {
            before.await.ok(); // An entry that was dropped has had its turn.
        }
    }

    pub(super) fn done(&self) {
        self.after.take();
    }
}

/// Where an upload begins.
#[derive(Default)]
pub(crate) struct Start {
    /// First batch and row that no chunk has.
    pub(crate) next: (u64, u64),
    /// Number of its first segment.
    pub(crate) segment: u32,
    /// What is durable behind the last chunk: at most a chunk's floor, so it holds no permit.
    pub(crate) tail: Vec<RecordBatch>,
    pub(crate) marks: Vec<BatchMark>,
    pub(crate) tail_bytes: u64,
    pub(crate) tail_time: Option<(i64, i64)>,
}

impl<D: Disk> Topic<D> {
    /// A topic at the first batch of an upload.
    pub(super) fn new(
        record: TopicRecord,
        schema: Arc<TopicSchema>,
        encoder: TopicEncoder,
        fails: watch::Sender<Option<StorageError>>,
        place: SegmentWriter<D>,
        start: Start,
    ) -> Self {
        let open = Open {
            safe_marks: start.marks.len(),
            // Runs came one after another, and whether their times did is not kept.
            sorted: start.tail.is_empty(),
            oldest: (!start.marks.is_empty()).then(Instant::now),
            safe: start.tail.into(),
            marks: start.marks,
            safe_bytes: start.tail_bytes,
            data_bytes: start.tail_bytes,
            time: start.tail_time,
            ..Open::default()
        };
        Self {
            schema,
            encoder,
            fails,
            open: RefCell::new(open),
            next: Cell::new(start.next),
            place: Mutex::new(place),
            sealed_below: Cell::new(0),
            pending: RefCell::default(),
            turn: RefCell::new(None),
            in_flight: Cell::new(0),
            tail_in_flight: Cell::new(false),
            ended: Cell::new(false),
            is_held_up: Cell::new(false),
            is_watched: Cell::new(false),
            slot: Cell::new(0),
            making: RefCell::new(None),
            failed: RefCell::new(None),
            ending: RefCell::new(None),
            forgotten: RefCell::new(None),
            record,
        }
    }

    /// Whether it has batches that are to be decided over.
    pub(super) fn is_open(&self) -> bool {
        !self.open.borrow().marks.is_empty() && self.failed.borrow().is_none() && !self.ended.get()
    }

    /// Whether nothing of it is under way.
    pub(super) fn is_quiet(&self) -> bool {
        let making = self.making.borrow().as_ref().is_some_and(|making| !making.is_finished());
        self.in_flight.get() == 0 && !self.tail_in_flight.get() && !making
    }

    /// Waits for the segment that is made ahead. Nothing may be on its way to the topic's folder once the end of
    /// its upload is committed: the folder may be tidied or removed then.
    pub(super) async fn made(&self) {
        let making = self.making.take();
        if let Some(making) = making {
            // Not quiet meanwhile: a deletion must wait for it as well.
            self.in_flight.set(self.in_flight.get() + 1);
            making.await.ok(); // One that panicked makes nothing any more.
            self.in_flight.set(self.in_flight.get() - 1);
        }
    }

    pub(super) fn enter_segment(&self, segment: u32) {
        *self.pending.borrow_mut().entry(segment).or_default() += 1;
    }

    pub(super) fn leave_segment(&self, segment: u32) {
        let mut pending = self.pending.borrow_mut();
        if let Some(count) = pending.get_mut(&segment) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&segment);
            }
        }
    }

    pub(super) fn gather(&self, batch: Batch) {
        let mut open = self.open.borrow_mut();
        let open = &mut *open;
        if let (Some((first, last)), Some((_, before))) = (batch.time, open.time) {
            open.sorted &= before <= first;
            open.time = open.time.map(|(a, b)| (a.min(first), b.max(last)));
        } else {
            open.time = open.time.or(batch.time);
        }
        open.sorted &= batch.sorted;
        open.fresh_time = match (open.fresh_time, batch.time) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (one, other) => one.or(other),
        };
        open.oldest.get_or_insert(batch.arrived);
        open.oldest_fresh.get_or_insert(batch.arrived);
        open.arrivals.push(batch.arrived);
        open.marks.push(batch.mark);
        open.data_bytes += batch.data_bytes;
        open.fresh_claimed += batch.permit.bytes() + batch.decode_permit.as_ref().map_or(0, Permit::bytes);
        absorb(&mut open.permits, Some(batch.permit));
        absorb(&mut open.decode_permits, batch.decode_permit);
        if batch.rows.num_rows() > 0 && open.fresh.push(&self.schema, batch.rows) {
            open.shrink_permits();
        }
    }

    /// The open chunk as it will be at a time.
    pub(super) fn look(
        &self,
        at: Instant,
        (flush_takes, flushing_bytes): (Duration, u64),
        gives_way: bool,
        tail: &TailRate,
    ) -> OpenChunk {
        let open = self.open.borrow();
        let age = |since: Instant| at.saturating_duration_since(since);
        OpenChunk {
            data_bytes: open.data_bytes,
            oldest: open.oldest.map_or(Duration::ZERO, age),
            oldest_unsafe: open.oldest_fresh.map(age),
            flush_takes,
            gives_way,
            unsafe_bytes: open.data_bytes - open.safe_bytes,
            tail_takes_it: tail.has(open.data_bytes - open.safe_bytes),
            flushing_bytes,
        }
    }

    /// Data bytes that are neither in a chunk nor in the tail.
    pub(super) fn unsafe_bytes(&self) -> u64 {
        let open = self.open.borrow();
        open.data_bytes - open.safe_bytes
    }

    /// Takes the fresh batches as one run for the tail, with the times when they arrived.
    pub(super) fn pack_tail(&self) -> Result<Option<(TailRun, Vec<Instant>)>, StorageError> {
        let mut open = self.open.borrow_mut();
        let open = &mut *open;
        let marks: Vec<BatchMark> = open.marks.iter().skip(open.safe_marks).copied().collect();
        if marks.is_empty() {
            return Ok(None);
        }
        let (chunk_batch, chunk_row) = self.next.get();
        let first_batch = chunk_batch + open.safe_marks as u64;
        let first_row = chunk_row + rows_of(&open.marks, 0) - rows_of(&marks, 0);
        let fresh = std::mem::take(&mut open.fresh).into_batches();
        let rows = join(&self.schema.stored, &fresh)?;
        let data_bytes = open.data_bytes - open.safe_bytes;
        let pieces = joined_or_pieces(rows.clone(), fresh, std::mem::take(&mut open.fresh_claimed));
        let run = TailRun::pack(&rows, first_batch, first_row, marks, data_bytes, open.fresh_time.take())?;
        for rows in pieces.into_iter().filter(|rows| rows.num_rows() > 0) {
            open.safe.push(&self.schema, rows);
        }
        open.safe_marks = open.marks.len();
        open.safe_bytes = open.data_bytes;
        open.oldest_fresh = None;
        open.shrink_permits();
        Ok(Some((run, std::mem::take(&mut open.arrivals))))
    }

    /// Ends the upload with a cause; the first one is kept and told.
    pub(super) fn fail(&self, error: StorageError) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none() {
            self.fails.send_replace(Some(error.clone()));
            *failed = Some(error);
        }
        drop(failed);
        self.open.replace(Open { sorted: true, ..Open::default() });
    }
}

/// The joined rows if they take no more than what was admitted for their pieces, or the pieces. Single rows weigh a
/// fraction once they are joined; rows that came without what lies under nulls weigh more.
fn joined_or_pieces(joined: RecordBatch, pieces: Vec<RecordBatch>, claimed: u64) -> Vec<RecordBatch> {
    if joined.get_array_memory_size() as u64 <= claimed { vec![joined] } else { pieces }
}

fn absorb(into: &mut Option<Permit>, permit: Option<Permit>) {
    match (into.as_mut(), permit) {
        (Some(all), Some(one)) => all.absorb(one),
        (None, one) => *into = one,
        (Some(_), None) => {}
    }
}

impl Open {
    /// Permits follow the memory: joined rows weigh a fraction of the single ones.
    pub(super) fn shrink_permits(&mut self) {
        let claimed = [&self.permits, &self.decode_permits].into_iter().flatten().map(Permit::bytes).sum::<u64>();
        if claimed < limits::SHRINK_FROM_BYTES {
            return;
        }
        let held = self.safe.weigh() + self.fresh.weigh();
        let mut held = held as u64 + size_of::<BatchMark>() as u64 * self.marks.len() as u64;
        for permits in [&mut self.permits, &mut self.decode_permits].into_iter().flatten() {
            permits.shrink_to(held);
            held = held.saturating_sub(permits.bytes());
        }
    }
}

/// Rows in the pieces that they came in, small ones joined: each array costs as much as hundreds of bytes.
#[derive(Default)]
pub(super) struct Pieces {
    batches: Vec<RecordBatch>,
    /// So many in front are not looked at again: no small one is among them that another may come to.
    settled: usize,
    /// Memory of the settled ones, in bytes.
    settled_bytes: usize,
    /// So many in front were weighed, and what they weigh.
    weighed: (usize, usize),
}

impl Pieces {
    /// Adds rows; says whether pieces were joined.
    pub(super) fn push(&mut self, schema: &TopicSchema, rows: RecordBatch) -> bool {
        self.batches.push(rows);
        if self.batches.len() - self.settled < limits::COALESCE_PIECES {
            return false;
        }
        let unsettled = self.batches.split_off(self.settled);
        self.weighed = (self.settled, self.settled_bytes);
        let before = unsettled.len();
        let is_small = |piece: &RecordBatch| piece.get_array_memory_size() <= limits::COALESCE_PIECE_BYTES;
        for group in unsettled.chunk_by(|a, b| is_small(a) && is_small(b)) {
            match group {
                [_, _, ..] => match join(&schema.stored, group) {
                    Ok(one) => self.batches.push(one),
                    Err(_) => self.batches.extend_from_slice(group),
                },
                one => self.batches.extend_from_slice(one),
            }
        }
        let joined = self.batches.len() - self.settled < before;
        // What comes next may be joined with the last piece, with no other.
        self.settled = self.batches.len() - usize::from(self.batches.last().is_some_and(is_small));
        self.settled_bytes = self.weigh_first(self.settled);
        joined
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Memory of all of them, in bytes. A piece is asked once or twice, not each time: it walks over all its columns.
    pub(super) fn weigh(&mut self) -> usize {
        self.weigh_first(self.batches.len())
    }

    /// The same of so many in front, at least as many as were weighed.
    fn weigh_first(&mut self, count: usize) -> usize {
        let (weighed, bytes) = self.weighed;
        let new = self.batches.get(weighed..count).unwrap_or(&[]).iter().map(RecordBatch::get_array_memory_size);
        self.weighed = (count, bytes + new.sum::<usize>());
        self.weighed.1
    }

    pub(super) fn into_batches(self) -> Vec<RecordBatch> {
        self.batches
    }
}

impl From<Vec<RecordBatch>> for Pieces {
    fn from(batches: Vec<RecordBatch>) -> Self {
        Self { batches, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};

    fn schema() -> Arc<TopicSchema> {
        TopicSchema::check(Arc::new(Schema::new(vec![Field::new("timestamp_ns", DataType::Int64, false)])))
            .expect("a schema")
    }

    fn numbers(schema: &TopicSchema, numbers: std::ops::Range<i64>) -> RecordBatch {
        let column = Arc::new(Int64Array::from_iter_values(numbers));
        RecordBatch::try_new(Arc::clone(&schema.stored), vec![column]).expect("a batch")
    }

    #[test]
    fn inv_7_rows_are_joined_unless_that_takes_more_than_was_admitted() {
        const ROWS: usize = 1000;
        let schema = schema();
        // As they are decoded: parts of one message, each of which tells the memory of all of it.
        let message = arrow::buffer::Buffer::from(vec![0_u8; 600]);
        let single = Int64Array::new(arrow::buffer::ScalarBuffer::new(message, 64, 1), None);
        let single = RecordBatch::try_new(Arc::clone(&schema.stored), vec![Arc::new(single)]).expect("a row");
        let singles = vec![single; ROWS];
        let joined = arrow::compute::concat_batches(&schema.stored, &singles).expect("rows");
        assert_eq!(joined_or_pieces(joined, singles, 600 * ROWS as u64).len(), 1);
        // Two columns that show the same zeros.
        let zeros = Arc::new(Int64Array::from(vec![0; ROWS]));
        let shared = RecordBatch::try_from_iter([("a", Arc::clone(&zeros) as _), ("b", zeros as _)]).expect("rows");
        let pieces = vec![shared; 2];
        let joined = arrow::compute::concat_batches(&pieces[0].schema(), &pieces).expect("rows");
        let sent = 2 * (8 * ROWS as u64 + 2 * limits::NODE_OVERHEAD_BYTES);
        assert_eq!(joined_or_pieces(joined, pieces, sent).len(), 2);
    }

    #[test]
    fn single_rows_are_joined_and_keep_their_order() {
        let schema = schema();
        let mut pieces = Pieces::default();
        for row in 0..10_000 {
            pieces.push(&schema, numbers(&schema, row..row + 1));
            if row % 7 == 0 {
                pieces.weigh();
            }
        }
        let one_by_one: usize = pieces.batches.iter().map(RecordBatch::get_array_memory_size).sum();
        assert_eq!(pieces.weigh(), one_by_one);
        let batches = pieces.into_batches();
        assert!(batches.len() <= limits::COALESCE_PIECES + 2, "{} pieces", batches.len());
        let rows = batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec());
        assert!(rows.eq(0..10_000));
    }

    #[test]
    fn large_pieces_stay_as_they_are_and_are_looked_at_once() {
        const ROWS: i64 = 2 * limits::COALESCE_PIECE_BYTES as i64 / 8;
        let schema = schema();
        let piece = numbers(&schema, 0..ROWS);
        let mut pieces = Pieces::default();
        for _ in 0..1000 {
            assert!(!pieces.push(&schema, piece.clone()));
            // A writer that lags behind gathers thousands: to look at all of them again would cost their square.
            assert!(pieces.batches.len() - pieces.settled < limits::COALESCE_PIECES);
        }
        assert_eq!(pieces.batches.len(), 1000);
        let as_it_came = |batch: &RecordBatch| batch.column(0).to_data().ptr_eq(&piece.column(0).to_data());
        assert!(pieces.batches.iter().all(as_it_came));
    }
}
