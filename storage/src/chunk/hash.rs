//! The identity of a batch: a 128-bit hash of its values.
//!
//! Two batches with the same schema and the same values hash alike, however they were sliced,
//! compressed or aligned on the wire. Bytes behind nulls count as they are: a client that sends a
//! batch again sends them again. XXH3-128; not cryptographic.

use super::weight_of;
use arrow::array::{Array, ArrayData, RecordBatch, layout};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::DataType;
use std::sync::Arc;
use twox_hash::XxHash3_128;
use twox_hash::xxhash3_128::Hasher;

/// Offsets that are hashed at once.
const OFFSETS: usize = 512;

/// Hashes the values of a batch.
pub fn batch_hash(batch: &RecordBatch) -> u128 {
    hash_and_weight(batch, batch).0
}

/// The hash of a batch and the weight of the same rows as they are stored, [`super::data_bytes`]: most columns are the
/// same in both, and taken apart once.
pub fn hash_and_weight(batch: &RecordBatch, stored: &RecordBatch) -> (u128, u64) {
    let mut hasher = Stream::default();
    let mut weight = 0;
    hasher.write(&(batch.num_rows() as u64).to_le_bytes());
    for (column, stored) in batch.columns().iter().zip(stored.columns()) {
        let data = column.to_data();
        hash_data(&mut hasher, &data);
        weight += if Arc::ptr_eq(column, stored) { weight_of(&data) } else { weight_of(&stored.to_data()) };
    }
    (hasher.finish(), weight)
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

fn hash_data(hasher: &mut Stream, data: &ArrayData) {
    hasher.write(&(data.len() as u64).to_le_bytes());
    if let Some(nulls) = data.nulls().filter(|nulls| nulls.null_count() > 0) {
        hash_bits(hasher, nulls.inner(), true);
    }
    match data.data_type() {
        DataType::Utf8 | DataType::Binary => hash_offsets::<i32>(hasher, data, true),
        DataType::LargeUtf8 | DataType::LargeBinary => hash_offsets::<i64>(hasher, data, true),
        DataType::List(_) | DataType::Map(_, _) => hash_offsets::<i32>(hasher, data, false),
        DataType::LargeList(_) => hash_offsets::<i64>(hasher, data, false),
        DataType::Boolean => {
            if let Some(values) = data.buffers().first() {
                hash_bits(hasher, &BooleanBuffer::new(values.clone(), data.offset(), data.len()), false);
            }
        }
        DataType::Struct(_) => {
            for child in data.child_data() {
                hash_data(hasher, &child.slice(data.offset().min(child.len()), data.len().min(child.len())));
            }
        }
        DataType::FixedSizeList(_, size) => {
            let size = usize::try_from(*size).unwrap_or(0);
            for child in data.child_data() {
                hash_data(hasher, &child.slice(data.offset() * size, data.len() * size));
            }
        }
        _ => hash_plain(hasher, data),
    }
}

/// Fixed-width values slice cleanly; anything else (views) is hashed by the whole of its buffers.
fn hash_plain(hasher: &mut Stream, data: &ArrayData) {
    let specs = layout(data.data_type()).buffers;
    for (index, buffer) in data.buffers().iter().enumerate() {
        let width = match specs.get(index) {
            Some(arrow::array::BufferSpec::FixedWidth { byte_width, .. }) => *byte_width,
            _ => 0,
        };
        let from = (data.offset() * width).min(buffer.len());
        let to = if width == 0 { buffer.len() } else { ((data.offset() + data.len()) * width).min(buffer.len()) };
        hasher.write(buffer.get(from..to).unwrap_or(&[]));
    }
    for child in data.child_data() {
        hash_data(hasher, child);
    }
}

fn hash_offsets<O: arrow::array::OffsetSizeTrait>(hasher: &mut Stream, data: &ArrayData, bytes: bool) {
    let Some(offsets) = data.buffers().first().filter(|_| !data.is_empty()) else {
        return;
    };
    let offsets = offsets.typed_data::<O>();
    let Some(offsets) = offsets.get(data.offset()..=data.offset() + data.len()) else {
        return;
    };
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return;
    };
    let mut bytes_of = [0; OFFSETS * size_of::<u64>()];
    for offsets in offsets.chunks(OFFSETS) {
        let (places, _) = bytes_of.as_chunks_mut::<{ size_of::<u64>() }>();
        for (place, offset) in places.iter_mut().zip(offsets) {
            *place = ((offset.as_usize() - first.as_usize()) as u64).to_le_bytes();
        }
        hasher.write(bytes_of.get(..size_of_val(offsets) / size_of::<O>() * size_of::<u64>()).unwrap_or(&[]));
    }
    let range = first.as_usize()..last.as_usize();
    if bytes {
        hasher.write(data.buffers().get(1).and_then(|values| values.get(range)).unwrap_or(&[]));
    } else if let Some(child) = data.child_data().first() {
        hash_data(hasher, &child.slice(range.start, range.len()));
    }
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
mod tests {
    use super::*;
    use arrow::array::{Int64Array, ListArray, StringArray};
    use arrow::datatypes::{Field, Int32Type, Schema};

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
