//! The identity of a batch: a 128-bit hash of its values.
//!
//! Two batches with the same schema and the same values hash alike, however they were sliced,
//! compressed or aligned on the wire. Bytes behind nulls count as they are: a client that sends a
//! batch again sends them again. Where all of a column is null they count as zeros. XXH3-128; not cryptographic.

use arrow::array::{
    Array, ArrayData, AsArray, BufferSpec, GenericByteArray, OffsetSizeTrait, RecordBatch, downcast_primitive_array,
    layout, make_array,
};
use arrow::buffer::{BooleanBuffer, OffsetBuffer};
use arrow::datatypes::{ByteArrayType, DataType};
use std::ops::Range;
use twox_hash::XxHash3_128;
use twox_hash::xxhash3_128::Hasher;

/// Offsets that are hashed at once.
const OFFSETS: usize = 512;

/// Hashes the values of a batch.
pub fn batch_hash(batch: &RecordBatch) -> u128 {
    let mut hasher = Stream::default();
    hasher.write(&(batch.num_rows() as u64).to_le_bytes());
    batch.columns().iter().for_each(|column| hash_array(&mut hasher, column, false));
    hasher.finish()
}

/// Bytes of a batch that is hashed at once: a hasher that goes on takes memory of its own.
const SMALL_BYTES: usize = 1024;

/// What is hashed: gathered while it is little, streamed from then on.
struct Stream {
    small: [u8; SMALL_BYTES],
    gathered: usize,
    large: Option<Hasher>,
}

impl Default for Stream {
    fn default() -> Self {
        Self { small: [0; SMALL_BYTES], gathered: 0, large: None }
    }
}

impl Stream {
    fn write(&mut self, bytes: &[u8]) {
        let end = self.gathered + bytes.len();
        match (&mut self.large, self.small.get_mut(self.gathered..end)) {
            (None, Some(room)) => {
                room.copy_from_slice(bytes);
                self.gathered = end;
            }
            (large, _) => {
                let hasher = large.get_or_insert_with(Hasher::new);
                hasher.write(self.small.get(..self.gathered).unwrap_or(&[]));
                self.gathered = 0;
                hasher.write(bytes);
            }
        }
    }

    fn finish(&self) -> u128 {
        match &self.large {
            None => XxHash3_128::oneshot(self.small.get(..self.gathered).unwrap_or(&[])),
            Some(hasher) => hasher.finish_128(),
        }
    }
}

/// `hidden`: below a value that is null in all rows. What lies under such nulls counts as zeros: a body may have been
/// taken without it.
fn hash_array(hasher: &mut Stream, array: &dyn Array, hidden: bool) {
    let rows = array.len();
    hasher.write(&(rows as u64).to_le_bytes());
    let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
    if let Some(nulls) = nulls {
        hash_bits(hasher, nulls.inner(), true);
    }
    let hidden = hidden || nulls.is_some_and(|nulls| nulls.null_count() == rows);
    match array.data_type() {
        DataType::Utf8 => hash_bytes(hasher, array.as_string::<i32>(), hidden),
        DataType::Binary => hash_bytes(hasher, array.as_binary::<i32>(), hidden),
        DataType::LargeUtf8 => hash_bytes(hasher, array.as_string::<i64>(), hidden),
        DataType::LargeBinary => hash_bytes(hasher, array.as_binary::<i64>(), hidden),
        DataType::List(_) => {
            hash_list(hasher, array.as_list::<i32>().offsets(), array.as_list::<i32>().values(), hidden)
        }
        DataType::LargeList(_) => {
            hash_list(hasher, array.as_list::<i64>().offsets(), array.as_list::<i64>().values(), hidden);
        }
        DataType::Map(_, _) => hash_list(hasher, array.as_map().offsets(), array.as_map().entries(), hidden),
        DataType::Boolean if hidden => hash_zeros(hasher, (rows / 64 + 1) * 8),
        DataType::Boolean => hash_bits(hasher, array.as_boolean().values(), false),
        DataType::Struct(_) => {
            array.as_struct().columns().iter().for_each(|child| hash_array(hasher, child, hidden));
        }
        DataType::FixedSizeList(_, _) => hash_array(hasher, array.as_fixed_size_list().values(), hidden),
        DataType::FixedSizeBinary(_) => {
            hash_values(hasher, array.as_fixed_size_binary().values(), hidden);
        }
        _ => downcast_primitive_array!(
            array => hash_values(hasher, array.values().inner(), hidden),
            _ => hash_plain(hasher, &array.to_data())
        ),
    }
}

fn hash_values(hasher: &mut Stream, values: &[u8], hidden: bool) {
    if hidden {
        hash_zeros(hasher, values.len());
    } else {
        hasher.write(values);
    }
}

fn hash_zeros(hasher: &mut Stream, mut bytes: usize) {
    while bytes > 0 {
        let piece = bytes.min(SMALL_BYTES);
        hasher.write([0; SMALL_BYTES].get(..piece).unwrap_or(&[]));
        bytes -= piece;
    }
}

/// The buffers as they are, of types that are never taken without a part of them: dictionaries, views and the like.
fn hash_plain(hasher: &mut Stream, data: &ArrayData) {
    let specs = layout(data.data_type()).buffers;
    for (index, buffer) in data.buffers().iter().enumerate() {
        let width = match specs.get(index) {
            Some(BufferSpec::FixedWidth { byte_width, .. }) => *byte_width,
            _ => 0,
        };
        let from = (data.offset() * width).min(buffer.len());
        let to = if width == 0 { buffer.len() } else { ((data.offset() + data.len()) * width).min(buffer.len()) };
        hasher.write(buffer.get(from..to).unwrap_or(&[]));
    }
    for child in data.child_data() {
        hash_array(hasher, &make_array(child.clone()), false);
    }
}

fn hash_bytes<T: ByteArrayType>(hasher: &mut Stream, array: &GenericByteArray<T>, hidden: bool) {
    let range = hash_offsets(hasher, array.offsets(), hidden);
    hasher.write(range.and_then(|range| array.values().get(range)).unwrap_or(&[]));
}

fn hash_list<O: OffsetSizeTrait>(hasher: &mut Stream, offsets: &OffsetBuffer<O>, values: &dyn Array, hidden: bool) {
    match hash_offsets(hasher, offsets, hidden) {
        Some(range) if range == (0..values.len()) => hash_array(hasher, values, hidden),
        Some(range) => hash_array(hasher, &values.slice(range.start, range.len()), hidden),
        None => {}
    }
}

/// Hashes where values begin and end, counted from the first; returns where they lie, if there are any.
fn hash_offsets<O: OffsetSizeTrait>(
    hasher: &mut Stream,
    offsets: &OffsetBuffer<O>,
    hidden: bool,
) -> Option<Range<usize>> {
    let (first, last) = (offsets.first().as_usize(), offsets.last().as_usize());
    if offsets.len() == 1 {
        return None;
    }
    if hidden {
        hash_zeros(hasher, size_of::<u64>() * offsets.len());
        return Some(first..first);
    }
    let mut bytes_of = [0; OFFSETS * size_of::<u64>()];
    for offsets in offsets.chunks(OFFSETS) {
        let (places, _) = bytes_of.as_chunks_mut::<{ size_of::<u64>() }>();
        for (place, offset) in places.iter_mut().zip(offsets) {
            *place = ((offset.as_usize() - first) as u64).to_le_bytes();
        }
        hasher.write(bytes_of.get(..size_of_val(offsets) / size_of::<O>() * size_of::<u64>()).unwrap_or(&[]));
    }
    Some(first..last)
}

/// Bits in words of 64, first bit highest; the last word has the rest, lowest.
fn hash_bits(hasher: &mut Stream, bits: &BooleanBuffer, inverted: bool) {
    let flip = if inverted { u64::MAX } else { 0 };
    let chunks = bits.bit_chunks();
    for chunk in chunks.iter() {
        hasher.write(&(chunk ^ flip).reverse_bits().to_le_bytes());
    }
    let left = chunks.remainder_len() as u32;
    let rest = match left {
        0 => 0,
        left => (chunks.remainder_bits() ^ flip).reverse_bits() >> (u64::BITS - left),
    };
    hasher.write(&rest.to_le_bytes());
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use arrow::array::ArrayRef;
    use arrow::array::{
        BooleanArray, Decimal128Array, DictionaryArray, FixedSizeBinaryArray, FixedSizeListArray, Float64Array,
        Int64Array, ListArray, StringArray, StringViewArray, StructArray, new_null_array,
    };
    use arrow::buffer::NullBuffer;
    use arrow::datatypes::{Field, Int8Type, Int32Type, Schema};
    use std::sync::Arc;

    fn batch(times: Vec<i64>, texts: Vec<Option<&str>>, lists: Vec<Option<Vec<Option<i32>>>>) -> RecordBatch {
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>(lists);
        let schema = Schema::new(vec![
            Field::new("timestamp_ns", DataType::Int64, false),
            Field::new("text", DataType::Utf8, true),
            Field::new("list", lists.data_type().clone(), true),
        ]);
        RecordBatch::try_new(
            Arc::new(schema),
            vec![Arc::new(Int64Array::from(times)), Arc::new(StringArray::from(texts)), Arc::new(lists)],
        )
        .expect("batch")
    }

    #[test]
    fn the_hash_is_xxh3_with_128_bits() {
        // From the reference implementation: the empty input.
        assert_eq!(Hasher::new().finish_128(), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
    }

    /// Three rows of one column of every kind of layout.
    pub(crate) fn kinds() -> RecordBatch {
        let number: ArrayRef = Arc::new(Float64Array::from(vec![Some(0.5), None, Some(-1.0)]));
        let text: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("ccc")]));
        let field = |name, array: &ArrayRef| Arc::new(Field::new(name, array.data_type().clone(), true));
        let pair =
            StructArray::from(vec![(field("number", &number), Arc::clone(&number)), (field("text", &text), text)]);
        let lists = vec![Some(vec![Some(1), None]), None, Some(vec![])];
        let fixed = vec![Some(vec![Some(1), Some(2)]), None, Some(vec![Some(3), Some(4)])];
        let nothing = new_null_array(pair.data_type(), 3);
        let columns: Vec<ArrayRef> = vec![
            number,
            Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
            Arc::new(Decimal128Array::from(vec![Some(1), None, Some(-7)])),
            Arc::new(FixedSizeBinaryArray::try_from_iter([b"abc", b"def", b"ghi"].into_iter()).expect("binary")),
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists)),
            Arc::new(FixedSizeListArray::from_iter_primitive::<Int32Type, _, _>(fixed, 2)),
            Arc::new(vec!["x", "y", "x"].into_iter().collect::<DictionaryArray<Int8Type>>()),
            Arc::new(StringViewArray::from(vec!["short", "a text of more than twelve bytes", ""])),
            Arc::new(pair),
            nothing,
            new_null_array(&DataType::Null, 3),
        ];
        let columns = columns.into_iter().enumerate().map(|(at, column)| (format!("c{at}"), column, true));
        RecordBatch::try_from_iter_with_nullable(columns).expect("a batch")
    }

    #[test]
    fn the_hash_of_every_kind_of_column_is_what_catalogs_hold() {
        assert_eq!(batch_hash(&kinds()), 73_374_732_816_759_115_182_031_491_592_581_352_370);
        assert_eq!(batch_hash(&kinds().slice(1, 2)), 72_796_785_446_553_586_671_948_722_200_560_526_305);
    }

    #[test]
    fn what_lies_under_nulls_counts_as_zeros_where_all_of_a_column_is_null() {
        let times: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let of = |number: i64, text: &str, last_is_null: bool| {
            let nulls = NullBuffer::from(vec![false, !last_is_null]);
            let field = |name, data_type| Field::new(name, data_type, true);
            let fields = vec![field("number", DataType::Int64), field("text", DataType::Utf8)];
            let columns: Vec<ArrayRef> =
                vec![Arc::new(Int64Array::from(vec![number; 2])), Arc::new(StringArray::from(vec![text; 2]))];
            let nested: ArrayRef = Arc::new(StructArray::new(fields.into(), columns, Some(nulls)));
            let columns = vec![("timestamp_ns", Arc::clone(&times), false), ("nested", nested, true)];
            batch_hash(&RecordBatch::try_from_iter_with_nullable(columns).expect("a batch"))
        };
        assert_eq!(of(0, "", true), of(7, "seven", true));
        assert_ne!(of(0, "", false), of(7, "", false));
        assert_ne!(of(0, "", false), of(0, "", true));
    }

    #[test]
    fn little_and_much_hash_alike() {
        let bytes: Vec<u8> = (0..3000_u32).map(|at| (at * 7 % 251) as u8).collect();
        for length in [0, 8, 1023, 1024, 1025, 3000] {
            for piece in [8, 100, 1024, 3000] {
                let mut stream = Stream::default();
                bytes[..length].chunks(piece).for_each(|piece| stream.write(piece));
                assert_eq!(stream.finish(), XxHash3_128::oneshot(&bytes[..length]), "{length} in {piece}");
            }
        }
    }

    #[test]
    fn bits_are_hashed_in_words_first_bit_highest() {
        for length in [0, 1, 63, 64, 65, 200] {
            let bits: BooleanBuffer = (0..length).map(|at| at % 3 == 0 || at % 7 == 1).collect();
            let (mut one_by_one, mut word) = (Hasher::new(), 0_u64);
            for (at, bit) in bits.iter().enumerate() {
                word = (word << 1) | u64::from(!bit);
                if at % 64 == 63 {
                    one_by_one.write(&word.to_le_bytes());
                    word = 0;
                }
            }
            one_by_one.write(&word.to_le_bytes());
            let mut hasher = Stream::default();
            hash_bits(&mut hasher, &bits, true);
            assert_eq!(hasher.finish(), one_by_one.finish_128(), "{length} bits");
        }
    }

    #[test]
    fn a_slice_hashes_like_the_same_rows_sent_alone() {
        let whole = batch(
            vec![1, 2, 3],
            vec![Some("a"), None, Some("ccc")],
            vec![Some(vec![Some(1)]), Some(vec![]), Some(vec![Some(2), None])],
        );
        let alone = batch(vec![2, 3], vec![None, Some("ccc")], vec![Some(vec![]), Some(vec![Some(2), None])]);
        assert_eq!(batch_hash(&whole.slice(1, 2)), batch_hash(&alone));
    }

    #[test]
    fn moving_a_boundary_between_texts_changes_the_hash() {
        let one = batch(vec![1, 2], vec![Some("ab"), Some("c")], vec![None, None]);
        let two = batch(vec![1, 2], vec![Some("a"), Some("bc")], vec![None, None]);
        assert_ne!(batch_hash(&one), batch_hash(&two));
    }
}
