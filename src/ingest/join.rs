//! Batches of few rows made into one.
//!
//! Guarantees: the rows of all of them in order, as arrow's `concat_batches` has them (a test compares). Columns of
//! fixed width without nulls are copied straight: for the two or three rows that a slow topic has between two commits,
//! arrow's kernels cost more to start than to run.

use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, FixedSizeBinaryArray, PrimitiveArray, RecordBatch,
    RecordBatchOptions, StructArray, downcast_primitive,
};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::error::ArrowError;
use std::sync::Arc;

/// The rows of all batches, which have the columns of the schema; of none, no rows.
///
/// # Errors
/// When they do not, or offsets overflow their type.
pub(super) fn join(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<RecordBatch, ArrowError> {
    if batches.is_empty() {
        return Ok(RecordBatch::new_empty(Arc::clone(schema)));
    }
    let mut pieces = Vec::with_capacity(batches.len());
    let mut columns = Vec::with_capacity(schema.fields().len());
    for index in 0..schema.fields().len() {
        pieces.clear();
        pieces.extend(batches.iter().filter_map(|batch| batch.columns().get(index)).map(AsRef::as_ref));
        columns.push(join_column(&pieces)?);
    }
    let rows = batches.iter().map(RecordBatch::num_rows).sum();
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
}

fn join_column(pieces: &[&dyn Array]) -> Result<ArrayRef, ArrowError> {
    let Some(first) = pieces.first().filter(|_| pieces.iter().all(|piece| piece.null_count() == 0)) else {
        return arrow::compute::concat(pieces);
    };
    let data_type = first.data_type();
    if pieces.iter().any(|piece| piece.data_type() != data_type) {
        return arrow::compute::concat(pieces); // Which says what is wrong.
    }
    macro_rules! primitive {
        ($values:ty) => {
            Ok(join_primitives::<$values>(data_type, pieces))
        };
    }
    downcast_primitive! {
        data_type => (primitive),
        DataType::FixedSizeBinary(width) if *width > 0 => {
            let rows: usize = pieces.iter().map(|piece| piece.len()).sum();
            let mut values = Vec::with_capacity(rows * usize::try_from(*width).unwrap_or(0));
            pieces.iter().for_each(|piece| values.extend_from_slice(piece.as_fixed_size_binary().values()));
            Ok(Arc::new(FixedSizeBinaryArray::try_new(*width, Buffer::from_vec(values), None)?))
        }
        DataType::Struct(fields) if !fields.is_empty() => {
            let mut children = Vec::with_capacity(fields.len());
            let mut parts = Vec::with_capacity(pieces.len());
            for index in 0..fields.len() {
                parts.clear();
                parts.extend(pieces.iter().map(|piece| piece.as_struct().column(index).as_ref()));
                children.push(join_column(&parts)?);
            }
            Ok(Arc::new(StructArray::try_new(fields.clone(), children, None)?))
        }
        _ => arrow::compute::concat(pieces),
    }
}

fn join_primitives<T: ArrowPrimitiveType>(data_type: &DataType, pieces: &[&dyn Array]) -> ArrayRef {
    let mut values = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
    pieces.iter().for_each(|piece| values.extend_from_slice(piece.as_primitive::<T>().values()));
    let array = PrimitiveArray::<T>::new(values.into(), None);
    // A time zone or a scale is not in `T`.
    Arc::new(if &T::DATA_TYPE == data_type { array } else { array.with_data_type(data_type.clone()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::every_type;
    use arrow::compute::concat_batches;

    #[test]
    fn joined_rows_are_those_of_the_pieces_in_order_whatever_their_types_and_nulls() {
        let rows = every_type(50);
        let pieces = |ranges: &[(usize, usize)]| -> Vec<RecordBatch> {
            ranges.iter().map(|(from, count)| rows.slice(*from, *count)).collect()
        };
        // With nulls, and slices of one row: some of them without a null.
        for pieces in [
            pieces(&[(0, 50)]),
            pieces(&[(3, 7), (20, 1), (0, 2)]),
            pieces(&[(1, 1), (2, 1), (11, 1), (16, 1)]),
            pieces(&[(4, 0), (7, 1)]),
            pieces(&[(4, 0)]),
            pieces(&[]),
        ] {
            let joined = join(&rows.schema(), &pieces).expect("joined");
            assert_eq!(joined, concat_batches(&rows.schema(), &pieces).expect("rows"));
        }
    }

    #[test]
    fn what_does_not_fit_the_schema_is_an_error() {
        let rows = every_type(2);
        let other = rows.project(&[1]).expect("a column");
        assert!(join(&other.schema(), &[other.clone(), rows.project(&[0]).expect("a column")]).is_err());
        assert!(join(&rows.schema(), &[other]).is_err());
    }
}
