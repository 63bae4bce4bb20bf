//! What of a body nobody will read, left out while the message is put together: the buffers of columns that hold
//! nothing but nulls. Clients send wide types of which a part is set (a vector of Mosaico's has a header and a
//! covariance of its own); two fifths of an IMU's bytes are such buffers, and memory is what chunks are gathered in.
//!
//! Guarantees: only what lies under nulls is left out, and it reads as zeros; a validity bitmap with a value where the
//! header has none refuses the message; what stays keeps its alignment to [`ALIGNMENT`]; the work grows with the
//! header. A layout that is not understood in full is taken as it is, for the decoder to judge.

use crate::flight::status::invalid;
use crate::limits;
use arrow::datatypes::{DataType, Schema};
use arrow::ipc::{self, FieldNode};
use bytes::Bytes;
use std::ops::Range;
use tonic::Status;

/// Smaller bodies are not looked at: that would cost what is saved. Nor do larger ones become smaller than this: the
/// writer would take them for pieces to be joined, and joined they are as large as they were.
pub(crate) const HOLLOW_BYTES_MIN: usize = limits::COALESCE_PIECE_BYTES;
/// At least this part of a body is saved, or all of it is kept.
pub(crate) const SAVED_PART_MIN: usize = 8;
/// What Arrow recommends for buffers, in bytes.
const ALIGNMENT: usize = 64;

/// How a body becomes a smaller one.
#[derive(Debug)]
pub(crate) struct Hollow {
    /// The message header, as it would be for the smaller body.
    pub(crate) header: Bytes,
    /// Parts that are left out, ascending.
    holes: Vec<Range<usize>>,
    /// Bitmaps that have to be blank, ascending.
    blanks: Vec<Blank>,
    /// What is copied of the body.
    kept: usize,
    /// Zeros that the buffers left out show, behind what is kept.
    zeros: usize,
    /// Bytes of the body that were passed so far.
    at: usize,
}

/// A validity bitmap without a valid value: where in the body it begins, and of how many rows it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Blank {
    start: usize,
    rows: usize,
}

/// What becomes of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    /// Shows zeros instead.
    Zeros,
    /// Shows nothing: no offset leads to it.
    Nothing,
    /// As [`Fate::Zeros`], if it has so many unset bits and no others.
    Blank(usize),
}

impl Hollow {
    /// What can be left out of a body of so many bytes, which is not to become smaller than `least`; `None`: too little,
    /// or the layout is not understood.
    pub(crate) fn of(schema: &Schema, header: &[u8], body_bytes: usize, least: usize) -> Option<Self> {
        let batch = ipc::root_as_message(header).ok()?.header_as_record_batch()?;
        let buffers = batch.buffers()?;
        if batch.compression().is_some() {
            return None;
        }
        let mut fates = Vec::with_capacity(buffers.len());
        let mut nodes = batch.nodes()?.iter();
        for field in schema.fields() {
            fates_of(field.data_type(), false, &mut nodes, &mut fates)?;
        }
        if fates.len() != buffers.len() || nodes.next().is_some() || fates.iter().all(|fate| *fate == Fate::Kept) {
            return None;
        }
        let places = buffers.iter().map(|buffer| {
            let start = usize::try_from(buffer.offset()).ok()?;
            Some(start..start.checked_add(usize::try_from(buffer.length()).ok()?)?)
        });
        let places: Vec<Range<usize>> = places.collect::<Option<_>>()?;
        let holes = holes(&places, &fates, body_bytes)?;
        let kept = body_bytes - holes.iter().map(Range::len).sum::<usize>();
        let zeros_start = kept.next_multiple_of(ALIGNMENT);
        let shows_zeros = places.iter().zip(&fates).filter(|(_, fate)| matches!(fate, Fate::Zeros | Fate::Blank(_)));
        let zeros = zeros_start - kept + shows_zeros.map(|(place, _)| place.len()).max().unwrap_or(0);
        let zeros = zeros.max(least.saturating_sub(kept));
        if body_bytes - body_bytes / SAVED_PART_MIN < kept + zeros {
            return None;
        }
        let blanks = places.iter().zip(&fates).filter_map(|(place, fate)| match fate {
            Fate::Blank(rows) => Some(Blank { start: place.start, rows: *rows }),
            _ => None,
        });
        let blanks = blanks.collect();
        let table = buffers.bytes();
        let table_start = (table.as_ptr() as usize).checked_sub(header.as_ptr() as usize)?;
        let mut smaller = header.to_vec();
        let (entries, _) = smaller.get_mut(table_start..table_start + table.len())?.as_chunks_mut::<BUFFER_BYTES>();
        let (mut holes_behind, mut left_out) = (holes.iter().peekable(), 0);
        for ((entry, place), fate) in entries.iter_mut().zip(&places).zip(&fates) {
            let (start, length) = match fate {
                Fate::Kept if place.is_empty() => (0, 0),
                Fate::Kept => {
                    while let Some(hole) = holes_behind.next_if(|hole| hole.end <= place.start) {
                        left_out += hole.len();
                    }
                    (place.start - left_out, place.len())
                }
                Fate::Zeros | Fate::Blank(_) => (zeros_start, place.len()),
                Fate::Nothing => (zeros_start, 0),
            };
            let (start_bytes, length_bytes) = entry.split_at_mut(BUFFER_BYTES / 2);
            start_bytes.copy_from_slice(&(start as u64).to_le_bytes());
            length_bytes.copy_from_slice(&(length as u64).to_le_bytes());
        }
        differ_by_places(header, &smaller).then(|| Self { header: smaller.into(), holes, blanks, kept, zeros, at: 0 })
    }

    /// What the smaller body takes, its zeros included, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.kept + self.zeros
    }

    /// Takes the next bytes of the body and hands on what is kept of them.
    pub(crate) fn pass(&mut self, mut bytes: &[u8], mut keep: impl FnMut(&[u8])) -> Result<(), Status> {
        self.check_blanks(bytes)?;
        while !bytes.is_empty() {
            let first = self.holes.partition_point(|hole| hole.end <= self.at);
            let (is_hole, end) = match self.holes.get(first) {
                Some(hole) if hole.start <= self.at => (true, hole.end),
                Some(hole) => (false, hole.start),
                None => (false, usize::MAX),
            };
            let (piece, rest) = bytes.split_at(bytes.len().min(end - self.at));
            if !is_hole {
                keep(piece);
            }
            self.at += piece.len();
            bytes = rest;
        }
        Ok(())
    }

    /// Refuses a valid value among the next bytes where the header says that there is none.
    fn check_blanks(&self, bytes: &[u8]) -> Result<(), Status> {
        let end = self.at + bytes.len();
        let first = self.blanks.partition_point(|blank| blank.start + blank.rows.div_ceil(8) <= self.at);
        for blank in self.blanks.iter().skip(first).take_while(|blank| blank.start < end) {
            let whole_end = blank.start + blank.rows / 8;
            let whole = blank.start.max(self.at)..whole_end.min(end);
            let whole = bytes.get(whole.start - self.at..whole.end.saturating_sub(self.at)).unwrap_or(&[]);
            let last_bits = (1_u8 << (blank.rows % 8)) - 1;
            let last = whole_end.checked_sub(self.at).and_then(|at| bytes.get(at)).map_or(0, |byte| byte & last_bits);
            if last != 0 || whole.iter().any(|byte| *byte != 0) {
                return Err(invalid(format!(
                    "a column claims {} nulls, but its validity bitmap has values; send the null count of the bitmap",
                    blank.rows
                )));
            }
        }
        Ok(())
    }
}

/// Whether two headers of record batches differ in nothing but where their buffers lie: parts of a hostile one may lie
/// in one another.
fn differ_by_places(header: &[u8], other: &[u8]) -> bool {
    let (Ok(one), Ok(other)) = (ipc::root_as_message(header), ipc::root_as_message(other)) else {
        return false;
    };
    let (Some(batch), Some(other_batch)) = (one.header_as_record_batch(), other.header_as_record_batch()) else {
        return false;
    };
    let nodes = |batch: &ipc::RecordBatch<'_>| batch.nodes().map(|nodes| nodes.iter().copied().collect::<Vec<_>>());
    one.version() == other.version()
        && batch.length() == other_batch.length()
        && nodes(&batch) == nodes(&other_batch)
        && batch.buffers().map(|buffers| buffers.len()) == other_batch.buffers().map(|buffers| buffers.len())
        && other_batch.compression().is_none()
}

/// Offset and length, as the IPC format has them (Message.fbs, `struct Buffer`).
const BUFFER_BYTES: usize = 16;

/// Lists the fates of a column's buffers, in the order of the IPC format; `None` for types that are taken as they are.
fn fates_of<'a>(
    data_type: &DataType,
    under_null: bool,
    nodes: &mut impl Iterator<Item = &'a FieldNode>,
    fates: &mut Vec<Fate>,
) -> Option<()> {
    let node = nodes.next()?;
    let rows = usize::try_from(node.length()).ok()?;
    let is_null = rows > 0 && node.null_count() == node.length();
    let hidden = under_null || is_null;
    let or_kept = |fate: Fate| if hidden { fate } else { Fate::Kept };
    match data_type {
        DataType::Null => return Some(()),
        // Zeros would be keys of values that there need not be.
        DataType::Dictionary(_, _) => {
            fates.extend([Fate::Kept, Fate::Kept]);
            return Some(());
        }
        _ => fates.push(if is_null { Fate::Blank(rows) } else { Fate::Kept }),
    }
    match data_type {
        data_type
            if data_type.is_primitive() || matches!(data_type, DataType::Boolean | DataType::FixedSizeBinary(_)) =>
        {
            fates.push(or_kept(Fate::Zeros));
            Some(())
        }
        DataType::Utf8 | DataType::Binary | DataType::LargeUtf8 | DataType::LargeBinary => {
            fates.extend([or_kept(Fate::Zeros), or_kept(Fate::Nothing)]);
            Some(())
        }
        DataType::List(child) | DataType::LargeList(child) | DataType::Map(child, _) => {
            fates.push(or_kept(Fate::Zeros));
            fates_of(child.data_type(), hidden, nodes, fates)
        }
        DataType::FixedSizeList(child, _) => fates_of(child.data_type(), hidden, nodes, fates),
        DataType::Struct(fields) => {
            fields.iter().try_for_each(|field| fates_of(field.data_type(), hidden, nodes, fates))
        }
        _ => None,
    }
}

/// The parts of a body that no kept buffer lies in, cut to whole multiples of the alignment; `None` if buffers lie
/// outside of the body or in one another, or a bitmap is too short for its rows.
fn holes(places: &[Range<usize>], fates: &[Fate], body_bytes: usize) -> Option<Vec<Range<usize>>> {
    let mut holes = Vec::new();
    // The hole that may be open begins here, behind the last buffer that is kept.
    let (mut kept_end, mut end, mut is_open) = (0_usize, 0_usize, false);
    let mut close = |kept_end: usize, next: usize| {
        let hole = kept_end.next_multiple_of(ALIGNMENT)..next - next % ALIGNMENT;
        if !hole.is_empty() {
            holes.push(hole);
        }
    };
    for (place, fate) in places.iter().zip(fates).filter(|(place, _)| !place.is_empty()) {
        if place.start < end || body_bytes < place.end {
            return None;
        }
        end = place.end;
        if *fate == Fate::Kept {
            if is_open {
                close(kept_end, place.start);
            }
            (kept_end, is_open) = (place.end, false);
        } else {
            is_open = true;
        }
    }
    if is_open {
        close(kept_end, body_bytes);
    }
    let too_short =
        |(place, fate): (&Range<usize>, &Fate)| matches!(fate, Fate::Blank(rows) if 8 * place.len() < *rows);
    (!places.iter().zip(fates).any(too_short)).then_some(holes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::assemble::{Assembler, Incoming};
    use crate::flight::decode::{Decoded, Decoder};
    use crate::ingest::admit::Budget;
    use arrow::array::{
        Array, ArrayRef, BooleanArray, Int64Array, ListArray, RecordBatch, StringArray, StringViewArray, StructArray,
        make_array, new_null_array,
    };
    use arrow::buffer::{NullBuffer, OffsetBuffer};
    use arrow::datatypes::{Field, Float64Type};
    use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
    use arrow::ipc::{CompressionType, MetadataVersion};
    use arrow_flight::FlightData;
    use prost::Message;
    use std::sync::Arc;
    use storage::chunk::hash::batch_hash;
    use storage::sim::Random;

    const ROWS: usize = 5000;

    fn times() -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(0..ROWS as i64))
    }

    fn batch(columns: Vec<ArrayRef>) -> RecordBatch {
        let named = [times()].into_iter().chain(columns).enumerate();
        RecordBatch::try_from_iter_with_nullable(named.map(|(at, column)| (format!("c{at}"), column, at > 0)))
            .expect("a batch")
    }

    /// Header and body, buffers padded as asked.
    fn encode(rows: &RecordBatch, alignment: usize, compression: Option<CompressionType>) -> (Vec<u8>, Vec<u8>) {
        let options = IpcWriteOptions::try_new(alignment, false, MetadataVersion::V5).expect("options");
        let options = options.try_with_compression(compression).expect("options");
        let mut tracker = DictionaryTracker::new(false);
        let encoded = IpcDataGenerator::default().encode(rows, &mut tracker, &options, &mut IpcWriteContext::default());
        let (_, encoded) = encoded.expect("encodes");
        (encoded.ipc_message, encoded.arrow_data)
    }

    fn assemble(rows: &RecordBatch, header: &[u8], body: &[u8], piece: usize) -> Result<Incoming, Status> {
        let message =
            FlightData { data_header: header.to_vec().into(), data_body: body.to_vec().into(), ..Default::default() };
        let bytes = message.encode_to_vec();
        let mut assembler = Assembler::new(bytes.len(), false, Some(rows.schema()));
        bytes.chunks(piece).try_for_each(|piece| assembler.add(piece))?;
        assembler.finish()
    }

    fn decode(schema: &RecordBatch, message: Incoming) -> Result<RecordBatch, Status> {
        let budget = Budget::new(256 << 20);
        let permit = budget.receive.try_claim(1).expect("room");
        let mut decoder = Decoder::new(schema.schema(), 64 << 20, budget);
        let decoded = decoder.decode(&message.header, message.body, message.sent, permit);
        match futures::executor::block_on(decoded)? {
            Decoded::Batch(rows, decode_permit, _) => {
                assert!(decode_permit.is_none(), "nothing is copied for its alignment");
                Ok(rows)
            }
            Decoded::Dictionary => panic!("there is no dictionary"),
        }
    }

    /// The same rows, whatever pieces they come in; returns the bytes saved.
    #[track_caller]
    fn check(rows: &RecordBatch, alignment: usize) -> usize {
        let (header, body) = encode(rows, alignment, None);
        let mut saved = None;
        for piece in [777, 16 << 10, usize::MAX] {
            let message = assemble(rows, &header, &body, piece).expect("assembled");
            assert_eq!(message.sent, body.len());
            let less = body.len() - message.body.len();
            assert_eq!(*saved.get_or_insert(less), less);
            let back = decode(rows, message).expect("decodes");
            assert_eq!(&back, rows, "in pieces of {piece}");
            assert_eq!(batch_hash(&back), batch_hash(rows), "in pieces of {piece}");
        }
        saved.unwrap_or(0)
    }

    /// So many columns of numbers that are not there.
    fn no_numbers(columns: usize) -> Vec<ArrayRef> {
        vec![new_null_array(&DataType::Int64, ROWS); columns]
    }

    /// A struct that is null in all rows, over children that are not.
    fn nulls_over_values() -> ArrayRef {
        let text: ArrayRef = Arc::new(StringArray::from(vec!["seven"; ROWS]));
        let lists = Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(
            (0..ROWS).map(|row| Some(vec![Some(row as f64), None])),
        ));
        let inner =
            StructArray::from(vec![(Arc::new(Field::new("lists", lists.data_type().clone(), true)), lists as _)]);
        let columns: Vec<ArrayRef> =
            vec![times(), text, Arc::new(BooleanArray::from(vec![true; ROWS])), Arc::new(inner)];
        let field = |(at, column): (usize, &ArrayRef)| Field::new(format!("f{at}"), column.data_type().clone(), true);
        let fields: Vec<Field> = columns.iter().enumerate().map(field).collect();
        Arc::new(StructArray::new(fields.into(), columns, Some(NullBuffer::new_null(ROWS))))
    }

    #[test]
    fn an_imu_with_vectors_without_headers_takes_three_fifths() {
        let imu = storage::ontology::builtin().expect("ontologies").into_iter().find(|one| one.record.tag == "IMU");
        let schema = imu.expect("IMU").wire;
        let vector = schema.field_with_name("acceleration").expect("a vector");
        let DataType::Struct(fields) = vector.data_type() else { panic!("a vector is a struct") };
        let columns = fields.iter().map(|field| match field.data_type() {
            DataType::Float64 => Arc::new(arrow::array::Float64Array::from(vec![0.5; ROWS])) as ArrayRef,
            other => new_null_array(other, ROWS),
        });
        let vector: ArrayRef = Arc::new(StructArray::new(fields.clone(), columns.collect(), None));
        let rows = batch(vec![Arc::clone(&vector), vector]);
        let saved = check(&rows, 64);
        let (_, body) = encode(&rows, 64, None);
        assert!(saved > body.len() * 2 / 5, "{saved} of {}", body.len());
        assert!(check(&rows, 8) > body.len() * 2 / 5, "buffers of clients that pad to 8 bytes");
    }

    #[test]
    fn what_lies_under_nulls_is_left_out_and_changes_neither_rows_nor_hash() {
        assert!(check(&batch(vec![nulls_over_values()]), 64) > 0);
        assert!(check(&batch(vec![nulls_over_values(), times(), nulls_over_values(), times()]), 8) > 0);
        let list = Field::new("item", nulls_over_values().data_type().clone(), true);
        let offsets = OffsetBuffer::from_lengths(vec![1; ROWS]);
        let nulls = Some(NullBuffer::new_null(ROWS));
        let lists = ListArray::new(Arc::new(list), offsets, nulls_over_values(), nulls);
        assert!(check(&batch(vec![Arc::new(lists)]), 64) > 0);
    }

    #[test]
    fn each_type_gives_up_what_it_can_show_zeros_for() {
        use Fate::{Blank, Kept, Nothing, Zeros};
        let field = |data_type| Arc::new(Field::new("f", data_type, true));
        let list = DataType::List(field(DataType::Int64));
        let pair = DataType::Struct(vec![field(DataType::Int8), field(list.clone())].into());
        let dictionary = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
        let check = |data_type: &DataType, nodes: &[(i64, i64)], expected: Option<&[Fate]>| {
            let nodes: Vec<FieldNode> = nodes.iter().map(|(rows, nulls)| FieldNode::new(*rows, *nulls)).collect();
            let mut fates = Vec::new();
            let understood = fates_of(data_type, false, &mut nodes.iter(), &mut fates).is_some();
            assert_eq!(understood.then_some(&fates[..]), expected, "{data_type} {nodes:?}");
        };
        check(&DataType::Null, &[(9, 9)], Some(&[]));
        check(&DataType::Int64, &[(9, 9)], Some(&[Blank(9), Zeros]));
        check(&DataType::Int64, &[(9, 8)], Some(&[Kept, Kept]));
        check(&DataType::Int64, &[(0, 0)], Some(&[Kept, Kept]));
        check(&DataType::Boolean, &[(9, 9)], Some(&[Blank(9), Zeros]));
        check(&DataType::FixedSizeBinary(3), &[(9, 9)], Some(&[Blank(9), Zeros]));
        check(&DataType::Utf8, &[(9, 9)], Some(&[Blank(9), Zeros, Nothing]));
        check(&DataType::Utf8, &[(9, 0)], Some(&[Kept, Kept, Kept]));
        check(&list, &[(9, 9), (5, 0)], Some(&[Blank(9), Zeros, Kept, Zeros]));
        check(&list, &[(9, 1), (5, 5)], Some(&[Kept, Kept, Blank(5), Zeros]));
        check(&pair, &[(9, 9), (9, 0), (9, 9), (0, 0)], Some(&[Blank(9), Kept, Zeros, Blank(9), Zeros, Kept, Zeros]));
        check(&pair, &[(9, 9), (9, 3), (9, 0), (5, 5)], Some(&[Blank(9), Kept, Zeros, Kept, Zeros, Blank(5), Zeros]));
        check(&dictionary, &[(9, 9)], Some(&[Kept, Kept]));
        check(&DataType::Utf8View, &[(9, 9)], None);
        check(&list, &[(9, 9)], None);
    }

    #[test]
    fn rows_of_300_random_types_and_nulls_come_back() {
        let mut random = Random::new(7);
        let mut smaller = 0;
        for _ in 0..300 {
            let columns = (0..1 + random.below(5)).map(|_| column(&mut random, 3, ROWS));
            let rows = batch(columns.collect());
            smaller += usize::from(check(&rows, if random.below(2) == 0 { 8 } else { 64 }) > 0);
        }
        assert!((50..300).contains(&smaller), "{smaller} were made smaller");
    }

    /// A column of some type, with no nulls, some, or nothing else.
    fn column(random: &mut Random, depth: u64, rows: usize) -> ArrayRef {
        let array: ArrayRef = match random.below(if depth == 0 { 4 } else { 8 }) {
            0 => Arc::new(Int64Array::from_iter_values((0..rows as i64).map(|row| row * 3))),
            1 => Arc::new(BooleanArray::from_iter((0..rows).map(|row| Some(row % 3 == 0)))),
            2 => Arc::new(StringArray::from_iter_values((0..rows).map(|row| "ab".repeat(row % 3)))),
            3 => new_null_array(&DataType::Null, rows),
            4 | 5 => {
                let children: Vec<ArrayRef> =
                    (0..1 + random.below(4)).map(|_| column(random, depth - 1, rows)).collect();
                let field =
                    |(at, child): (usize, &ArrayRef)| Field::new(format!("f{at}"), child.data_type().clone(), true);
                let fields: Vec<Field> = children.iter().enumerate().map(field).collect();
                Arc::new(StructArray::new(fields.into(), children, None))
            }
            6 => {
                let items = column(random, depth - 1, rows / 2);
                let field = Arc::new(Field::new("item", items.data_type().clone(), true));
                let lengths = (0..rows).map(|row| usize::from(row % 2 == 1));
                Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths), items, None))
            }
            _ => {
                let items = column(random, depth - 1, rows * 2);
                let field = Arc::new(Field::new("item", items.data_type().clone(), true));
                Arc::new(arrow::array::FixedSizeListArray::new(field, 2, items, None))
            }
        };
        let nulls = match random.below(4) {
            _ if array.data_type() == &DataType::Null => return array,
            0 => NullBuffer::from_iter((0..rows).map(|row| row % 5 != 0)),
            1 | 2 => NullBuffer::new_null(rows),
            _ => return array,
        };
        make_array(array.to_data().into_builder().nulls(Some(nulls)).build().expect("an array with nulls"))
    }

    #[test]
    fn a_bitmap_with_a_value_where_the_header_has_none_refuses_the_message() {
        let rows = batch(no_numbers(3));
        let (header, body) = encode(&rows, 8, None);
        let blank = Hollow::of(&rows.schema(), &header, body.len(), 0).expect("smaller").blanks[0];
        assert_eq!(blank.rows, ROWS);
        for row in [0, 7, 8, 2500, ROWS - 1] {
            let mut body = body.clone();
            body[blank.start + row / 8] |= 1 << (row % 8);
            for piece in [1, 777, usize::MAX] {
                let refused = assemble(&rows, &header, &body, piece).expect_err("refused");
                assert!(refused.message().contains("claims 5000 nulls, but its validity"), "row {row}: {refused}");
            }
        }
        // Behind the last row bits mean nothing.
        let mut body = body;
        body[blank.start + ROWS / 8] |= 1 << (ROWS % 8);
        assert!(assemble(&rows, &header, &body, 777).is_ok());
    }

    #[test]
    fn what_is_not_understood_or_not_worth_it_is_taken_as_it_is() {
        let rows = batch(no_numbers(3));
        let (header, body) = encode(&rows, 64, None);
        let of = |rows: &RecordBatch, header: &[u8], length| Hollow::of(&rows.schema(), header, length, 0).is_some();
        assert!(of(&rows, &header, body.len()));
        assert!(!of(&rows, &header, body.len() - 64), "a buffer outside of the body");
        assert!(!of(&batch(no_numbers(2)), &header, body.len()), "more columns than the schema has");
        assert!(!of(&batch(no_numbers(4)), &header, body.len()), "fewer columns");
        assert!(!of(&rows, &header[..header.len() / 2], body.len()), "half a header");
        let (header, body) = encode(&rows, 64, Some(CompressionType::LZ4_FRAME));
        assert!(!of(&rows, &header, body.len()), "compressed");
        let views: ArrayRef = Arc::new(StringViewArray::from(vec!["a text of more than twelve bytes"; ROWS]));
        let rows = batch(no_numbers(3).into_iter().chain([views]).collect());
        let (header, body) = encode(&rows, 64, None);
        assert!(!of(&rows, &header, body.len()), "views");
        let rows = batch(no_numbers(2).into_iter().chain(vec![times(); 8]).collect());
        let (header, body) = encode(&rows, 64, None);
        assert!(!of(&rows, &header, body.len()), "less than an eighth");
    }

    #[test]
    fn buffers_in_one_another_are_left_to_the_decoder_which_refuses_them() {
        let rows = batch(no_numbers(3).into_iter().chain([times()]).collect());
        let (mut header, body) = encode(&rows, 64, None);
        let length = (ROWS * 8) as i64;
        let entry = |offset: i64, length: i64| [offset.to_le_bytes(), length.to_le_bytes()].concat();
        let honest = entry(body.len() as i64 - length, length);
        let at = header.windows(BUFFER_BYTES).position(|window| window == honest).expect("the last buffer");
        header[at..at + BUFFER_BYTES].copy_from_slice(&entry(0, body.len() as i64));
        let message = assemble(&rows, &header, &body, usize::MAX).expect("assembled");
        assert_eq!(message.body.len(), body.len());
        assert!(decode(&rows, message).is_err());
    }

    #[test]
    fn inv_7_fields_that_would_take_what_is_saved_leave_the_body_whole() {
        let rows = batch(no_numbers(3));
        let (header, body) = encode(&rows, 64, None);
        let message = |metadata: usize| FlightData {
            data_header: header.clone().into(),
            app_metadata: vec![7; metadata].into(),
            data_body: body.clone().into(),
            ..Default::default()
        };
        let taken = |metadata| {
            let bytes = message(metadata).encode_to_vec();
            let mut assembler = Assembler::new(bytes.len(), false, Some(rows.schema()));
            assembler.add(&bytes).expect("FlightData");
            assembler.finish().expect("FlightData").body.len()
        };
        assert!(taken(0) < body.len());
        assert_eq!(taken(body.len() / SAVED_PART_MIN / 2), body.len());
    }

    #[test]
    fn a_header_that_says_something_else_is_not_the_same_but_for_its_places() {
        let (header, _) = encode(&batch(no_numbers(3)), 64, None);
        let (elsewhere, _) = encode(&batch(no_numbers(3)), 8, None);
        assert!(differ_by_places(&header, &header));
        assert!(differ_by_places(&header, &elsewhere), "padded otherwise");
        for other in [vec![times(); 3], no_numbers(4)] {
            assert!(!differ_by_places(&header, &encode(&batch(other), 64, None).0));
        }
        assert!(!differ_by_places(&header, &header[..header.len() / 2]));
    }

    #[test]
    fn a_second_header_behind_a_body_that_was_made_smaller_is_refused() {
        let rows = batch(no_numbers(3));
        let (header, body) = encode(&rows, 64, None);
        let message = FlightData { data_header: header.into(), data_body: body.into(), ..Default::default() };
        let late = FlightData { data_header: vec![1; 8].into(), ..Default::default() };
        let bytes = [message.encode_to_vec(), late.encode_to_vec()].concat();
        let mut assembler = Assembler::new(bytes.len(), false, Some(rows.schema()));
        assembler.add(&bytes).expect("FlightData");
        assert!(assembler.finish().expect_err("refused").message().contains("another header behind its body"));
    }
}
