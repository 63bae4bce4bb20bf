//! Columns without a value: arrays that stand for all of them in the messages of a stream.
//!
//! Clients send wide types of which a part is set: two thirds of an IMU's columns are null in every row. To put one
//! together costs as much as any other; and chunks hold it until it is cold, for the encoder and for whoever drops it.
//!
//! Guarantees (INV-7): the values are zeros that all streams share; the arrays of a stream have at most
//! [`limits::NULL_NODES_MAX`] nodes.
//! Does not know: messages. Whether a column is one of these is for [`super::columns`] to find out.

use crate::limits;
use arrow::array::{ArrayData, ArrayRef, make_array};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer};
use arrow::datatypes::DataType;
use std::collections::HashMap;
use std::sync::LazyLock;

/// What values, offsets and bitmaps show that are not there: enough for 32,000 rows of eight bytes. Aligned for all types.
static ZEROS: LazyLock<Buffer> = LazyLock::new(|| Buffer::from_vec(vec![0_u128; (256 << 10) / size_of::<u128>()]));

/// Whether bytes are all zero, if they are no more than could be shown here.
pub(super) fn are_zeros(bytes: &[u8]) -> bool {
    ZEROS.get(..bytes.len()).is_some_and(|zeros| zeros == bytes)
}

/// The arrays of a stream's columns that had no value, by the number of the column's node.
#[derive(Debug, Default)]
pub(super) struct Absent {
    arrays: HashMap<usize, ArrayRef>,
    /// Nodes of all of them.
    nodes: usize,
}

impl Absent {
    /// So many nulls of a type, for the column of this node; `None`: there are too many of them.
    pub(super) fn column(&mut self, node: usize, data_type: &DataType, length: usize) -> Option<ArrayRef> {
        if let Some(array) = self.arrays.get(&node).filter(|array| array.len() == length) {
            return Some(ArrayRef::clone(array));
        }
        let more = if self.arrays.contains_key(&node) { 0 } else { nodes_of(data_type) };
        if limits::NULL_NODES_MAX < self.nodes + more {
            return None;
        }
        let array = make_array(nulls(data_type, length)?);
        self.nodes += more;
        self.arrays.insert(node, ArrayRef::clone(&array));
        Some(array)
    }
}

fn nodes_of(data_type: &DataType) -> usize {
    1 + match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| nodes_of(field.data_type())).sum(),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => nodes_of(child.data_type()),
        _ => 0,
    }
}

/// So many nulls, over zeros.
fn nulls(data_type: &DataType, length: usize) -> Option<ArrayData> {
    let zeros = |bytes: Option<usize>| {
        bytes.filter(|bytes| *bytes <= ZEROS.len()).map(|bytes| ZEROS.slice_with_length(0, bytes))
    };
    let offsets = |width| zeros(length.checked_add(1)?.checked_mul(width));
    let validity = BooleanBuffer::new(zeros(Some(length.div_ceil(8)))?, 0, length);
    let builder = ArrayData::builder(data_type.clone()).len(length).nulls(Some(NullBuffer::new(validity)));
    let builder = match data_type {
        DataType::Boolean => builder.add_buffer(zeros(Some(length.div_ceil(8)))?),
        DataType::Utf8 | DataType::Binary => builder.add_buffer(offsets(4)?).add_buffer(zeros(Some(0))?),
        DataType::LargeUtf8 | DataType::LargeBinary => builder.add_buffer(offsets(8)?).add_buffer(zeros(Some(0))?),
        DataType::FixedSizeBinary(width) => {
            builder.add_buffer(zeros(length.checked_mul(usize::try_from(*width).ok()?))?)
        }
        DataType::Struct(fields) => {
            let children: Option<Vec<ArrayData>> =
                fields.iter().map(|field| nulls(field.data_type(), length)).collect();
            builder.child_data(children?)
        }
        DataType::List(child) | DataType::Map(child, _) => {
            builder.add_buffer(offsets(4)?).add_child_data(ArrayData::new_empty(child.data_type()))
        }
        DataType::LargeList(child) => {
            builder.add_buffer(offsets(8)?).add_child_data(ArrayData::new_empty(child.data_type()))
        }
        DataType::FixedSizeList(child, size) => {
            builder.add_child_data(nulls(child.data_type(), length.checked_mul(usize::try_from(*size).ok()?)?)?)
        }
        other => builder.add_buffer(zeros(length.checked_mul(other.primitive_width()?))?),
    };
    builder.build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::every_type;
    use arrow::array::{Array, new_null_array};
    use std::sync::Arc;

    #[test]
    fn nulls_of_every_type_are_those_that_arrow_makes() {
        for field in every_type(1).schema().fields() {
            for length in [1, 7, 1000] {
                let ours = make_array(nulls(field.data_type(), length).expect("nulls"));
                assert_eq!(&ours, &new_null_array(field.data_type(), length), "{}", field.data_type());
                assert_eq!(ours.null_count(), length);
            }
        }
    }

    #[test]
    fn inv_7_a_stream_keeps_an_array_for_each_column_and_no_more_than_its_bound() {
        let mut absent = Absent::default();
        let one = absent.column(3, &DataType::Int64, 10).expect("an array");
        assert!(Arc::ptr_eq(&one, &absent.column(3, &DataType::Int64, 10).expect("the same")));
        assert_eq!(absent.column(3, &DataType::Int64, 11).expect("another").len(), 11);
        for node in 0..2 * limits::NULL_NODES_MAX {
            absent.column(node, &DataType::Int64, 10);
        }
        assert_eq!((absent.arrays.len(), absent.nodes), (limits::NULL_NODES_MAX, limits::NULL_NODES_MAX));
        assert!(absent.column(5000, &DataType::Int64, 10).is_none());
    }

    #[test]
    fn more_rows_than_there_are_zeros_for_are_left_to_others() {
        assert!(nulls(&DataType::Int64, 32 << 10).is_some());
        assert!(nulls(&DataType::Int64, (32 << 10) + 1).is_none());
        assert!(nulls(&DataType::Utf8, usize::MAX).is_none());
    }
}
