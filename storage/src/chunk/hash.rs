//! The identity of a batch: a 128-bit hash of its values.
//!
//! Two batches with the same schema and the same values hash alike, however they were sliced,
//! compressed or aligned on the wire. Bytes behind nulls count as they are: a client that sends a
//! batch again sends them again. XXH3-128; not cryptographic.

use arrow::array::{Array, ArrayData, RecordBatch, layout};
use arrow::datatypes::DataType;
use xxhash_rust::xxh3::Xxh3;

/// Hashes the values of a batch.
pub fn batch_hash(batch: &RecordBatch) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(&(batch.num_rows() as u64).to_le_bytes());
    for column in batch.columns() {
        hash_data(&mut hasher, &column.to_data());
    }
    hasher.digest128()
}

fn hash_data(hasher: &mut Xxh3, data: &ArrayData) {
    hasher.update(&(data.len() as u64).to_le_bytes());
    if let Some(nulls) = data.nulls().filter(|nulls| nulls.null_count() > 0) {
        hash_bits(hasher, data.len(), |index| nulls.is_null(index));
    }
    match data.data_type() {
        DataType::Utf8 | DataType::Binary => hash_offsets::<i32>(hasher, data, true),
        DataType::LargeUtf8 | DataType::LargeBinary => hash_offsets::<i64>(hasher, data, true),
        DataType::List(_) | DataType::Map(_, _) => hash_offsets::<i32>(hasher, data, false),
        DataType::LargeList(_) => hash_offsets::<i64>(hasher, data, false),
        DataType::Boolean => {
            if let Some(values) = data.buffers().first() {
                let bits = arrow::buffer::BooleanBuffer::new(values.clone(), data.offset(), data.len());
                hash_bits(hasher, data.len(), |index| bits.value(index));
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
fn hash_plain(hasher: &mut Xxh3, data: &ArrayData) {
    let specs = layout(data.data_type()).buffers;
    for (index, buffer) in data.buffers().iter().enumerate() {
        let width = match specs.get(index) {
            Some(arrow::array::BufferSpec::FixedWidth { byte_width, .. }) => *byte_width,
            _ => 0,
        };
        let from = (data.offset() * width).min(buffer.len());
        let to = if width == 0 { buffer.len() } else { ((data.offset() + data.len()) * width).min(buffer.len()) };
        hasher.update(buffer.get(from..to).unwrap_or(&[]));
    }
    for child in data.child_data() {
        hash_data(hasher, child);
    }
}

fn hash_offsets<O: arrow::array::OffsetSizeTrait>(hasher: &mut Xxh3, data: &ArrayData, bytes: bool) {
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
    for offset in offsets {
        hasher.update(&(offset.as_usize() - first.as_usize()).to_le_bytes());
    }
    let range = first.as_usize()..last.as_usize();
    if bytes {
        hasher.update(data.buffers().get(1).and_then(|values| values.get(range)).unwrap_or(&[]));
    } else if let Some(child) = data.child_data().first() {
        hash_data(hasher, &child.slice(range.start, range.len()));
    }
}

fn hash_bits(hasher: &mut Xxh3, length: usize, bit: impl Fn(usize) -> bool) {
    let mut word = 0_u64;
    for index in 0..length {
        word = (word << 1) | u64::from(bit(index));
        if index % 64 == 63 {
            hasher.update(&word.to_le_bytes());
            word = 0;
        }
    }
    hasher.update(&word.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, ListArray, StringArray};
    use arrow::datatypes::{Field, Int32Type, Schema};
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
