//! A chunk's rows in memory, large values still in the pages that were read.
//!
//! Guarantees: whatever comes out is in the stored schema to the letter; a large value of a page that is not compressed is
//! copied when it comes out, and not at all where it is a batch of its own. Of the bytes that are kept for such values, no
//! more than an eighth are others.

use crate::chunk::decode::RowGroup;
use crate::error::{Result, StorageError};
use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryViewArray, ByteView, LargeBinaryArray, LargeStringArray, RecordBatch,
    RecordBatchOptions, StringArray,
};
use arrow::buffer::{Buffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use std::sync::Arc;

/// Mean size from which on a column's values stay where they are, in bytes. Smaller ones are copied: a view is 16 bytes.
const LARGE_VALUE_BYTES: u64 = 4 << 10;

/// Rows of one chunk.
#[derive(Debug, Clone)]
pub struct Rows {
    /// With views in place of large values.
    batch: RecordBatch,
    stored: SchemaRef,
}

impl Rows {
    /// Rows that were decoded in the schema of [`in_memory`].
    pub(super) fn new(batch: RecordBatch, stored: SchemaRef) -> Self {
        Self { batch, stored }
    }

    /// Bytes of memory that they hold, other than those of the bytes they were decoded from that nobody asks for.
    pub fn memory_bytes(&self) -> usize {
        self.batch.get_array_memory_size()
    }

    /// A column whose values are not large: of numbers and such.
    pub fn column(&self, index: usize) -> &ArrayRef {
        self.batch.column(index)
    }

    /// All of them.
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn all(&self) -> Result<RecordBatch> {
        self.slice(0, self.batch.num_rows())
    }

    /// `count` rows from `first` on, which there must be.
    ///
    /// # Errors
    /// When values are larger together than their type of array can be.
    pub fn slice(&self, first: usize, count: usize) -> Result<RecordBatch> {
        to_stored(&self.batch.slice(first, count), &self.stored)
    }

    /// Whether these columns come out without a copy.
    pub(crate) fn are_at_hand(&self, indices: &[usize]) -> bool {
        let columns = self.batch.columns();
        indices
            .iter()
            .all(|index| columns.get(*index).is_none_or(|of| of.data_type() == self.stored.field(*index).data_type()))
    }

    /// Some of the columns, in order, in the stored schema without the others.
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn columns(&self, indices: &[usize]) -> Result<RecordBatch> {
        to_stored(&self.batch.project(indices)?, &Arc::new(self.stored.project(indices)?))
    }

    /// Rows of several chunks of one topic, by (chunk, row).
    ///
    /// # Errors
    /// As [`Self::slice`].
    pub fn interleave(chunks: &[Self], rows: &[(usize, usize)]) -> Result<RecordBatch> {
        let Some(first) = chunks.first() else { return Ok(RecordBatch::new_empty(Arc::new(Schema::empty()))) };
        let mut columns = Vec::with_capacity(first.stored.fields().len());
        for (index, field) in first.stored.fields().iter().enumerate() {
            let all = || chunks.iter().map(|chunk| chunk.batch.column(index));
            // One chunk may have views where another, of smaller values, has none: views of these are made, not copies of those.
            let kind = all().map(|column| column.data_type()).find(|kind| is_view(kind));
            let parts = all().map(|column| match kind {
                Some(kind) if kind != column.data_type() => arrow::compute::cast(column, kind),
                _ => Ok(Arc::clone(column)),
            });
            let parts = parts.collect::<std::result::Result<Vec<ArrayRef>, _>>()?;
            let parts: Vec<&dyn Array> = parts.iter().map(AsRef::as_ref).collect();
            columns.push(to_type(&arrow::compute::interleave(&parts, rows)?, field)?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        Ok(RecordBatch::try_new_with_options(Arc::clone(&first.stored), columns, &options)?)
    }
}

impl From<RecordBatch> for Rows {
    /// Rows in the stored schema.
    fn from(batch: RecordBatch) -> Self {
        Self { stored: batch.schema(), batch }
    }
}

/// The schema that a row group is decoded in: columns of large values as views of its pages, if these are most of it.
/// (Views keep all of the bytes that were read.)
pub(super) fn in_memory(group: RowGroup<'_>) -> SchemaRef {
    let mut fields: Vec<Arc<Field>> = group.schema.fields().to_vec();
    let (mut viewed, mut all) = (0, 0);
    for (leaf, column) in group.columns.iter().enumerate() {
        all += column.encoded_bytes;
        let root =
            if leaf < group.descriptor.num_columns() { group.descriptor.get_column_root_idx(leaf) } else { continue };
        let Some(field) = fields.get_mut(root) else { continue };
        let view = match field.data_type() {
            DataType::Binary | DataType::LargeBinary => DataType::BinaryView,
            DataType::Utf8 | DataType::LargeUtf8 => DataType::Utf8View,
            _ => continue,
        };
        if column.plain_bytes / column.values.max(1) >= LARGE_VALUE_BYTES {
            *field = Arc::new(field.as_ref().clone().with_data_type(view));
            viewed += column.encoded_bytes;
        }
    }
    if viewed == 0 || viewed < all - all / 8 {
        return Arc::clone(group.schema);
    }
    Arc::new(Schema::new_with_metadata(fields, group.schema.metadata().clone()))
}

fn to_stored(batch: &RecordBatch, stored: &SchemaRef) -> Result<RecordBatch> {
    let fields = stored.fields().iter();
    let columns = batch.columns().iter().zip(fields).map(|(column, field)| to_type(column, field));
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::clone(stored), columns.collect::<Result<_>>()?, &options)?)
}

fn is_view(kind: &DataType) -> bool {
    matches!(kind, DataType::BinaryView | DataType::Utf8View)
}

/// A column in its stored type, which may be one of views itself.
fn to_type(column: &ArrayRef, field: &Field) -> Result<ArrayRef> {
    let stored = field.data_type();
    let views = match column.data_type() {
        kind if kind == stored => return Ok(Arc::clone(column)),
        DataType::BinaryView => column.as_binary_view().clone(),
        DataType::Utf8View => column.as_string_view().clone().to_binary_view(),
        _ => return Ok(Arc::clone(column)),
    };
    let bytes: u64 = views.views().iter().map(|view| u64::from(ByteView::from(*view).length)).sum();
    if matches!(stored, DataType::Binary | DataType::Utf8) && i32::try_from(bytes).is_err() {
        // Says nothing against the bytes: fewer rows at once fit.
        return Err(StorageError::Unstorable {
            field: field.name().clone(),
            data_type: stored.to_string(),
            why: format!("{bytes} bytes of its values are more than one array holds"),
        });
    }
    match only_value(&views) {
        Some(value) => one_row(value, stored),
        None => Ok(arrow::compute::cast(column, stored)?),
    }
}

/// The value of an array of one row, where it lies.
fn only_value(views: &BinaryViewArray) -> Option<Buffer> {
    let [view] = **views.views() else { return None };
    let view = ByteView::from(view);
    // Shorter ones lie in the view itself.
    let lies_elsewhere = views.is_valid(0) && view.length > arrow::array::MAX_INLINE_VIEW_LEN;
    let buffer = views.data_buffers().get(view.buffer_index as usize).filter(|_| lies_elsewhere)?;
    Some(buffer.slice_with_length(view.offset as usize, view.length as usize))
}

fn one_row(value: Buffer, stored: &DataType) -> Result<ArrayRef> {
    let length = value.len();
    Ok(match stored {
        DataType::Binary => Arc::new(BinaryArray::try_new(OffsetBuffer::from_lengths([length]), value, None)?),
        DataType::LargeBinary => {
            Arc::new(LargeBinaryArray::try_new(OffsetBuffer::from_lengths([length]), value, None)?)
        }
        DataType::LargeUtf8 => Arc::new(LargeStringArray::try_new(OffsetBuffer::from_lengths([length]), value, None)?),
        DataType::Utf8 => Arc::new(StringArray::try_new(OffsetBuffer::from_lengths([length]), value, None)?),
        other => {
            return Err(StorageError::Format { op: "decode", text: format!("no views are made of the type {other}") });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::decode::{ChunkBytes, decode};
    use crate::chunk::encode_all;
    use arrow::array::Int64Array;
    use bytes::Bytes;

    const LARGE: usize = LARGE_VALUE_BYTES as usize;

    /// A topic with a column of each type whose values can be large, of these sizes; `None` for no value.
    fn batch(sizes: &[Option<usize>]) -> RecordBatch {
        let text = |row: usize, size: usize| "äbc".chars().cycle().skip(row).take(size).collect::<String>();
        let texts: Vec<Option<String>> = (0..).zip(sizes).map(|(row, size)| size.map(|size| text(row, size))).collect();
        let strings = StringArray::from(texts.clone());
        let times: ArrayRef = Arc::new(Int64Array::from_iter_values(0..sizes.len() as i64));
        let bytes = texts.iter().map(|text| text.as_ref().map(|text| text.as_bytes()));
        let columns: [(&str, ArrayRef); 5] = [
            ("timestamp_ns", times),
            ("binary", Arc::new(BinaryArray::from_iter(bytes.clone()))),
            ("large_binary", Arc::new(LargeBinaryArray::from_iter(bytes))),
            ("large_text", Arc::new(LargeStringArray::from(texts))),
            ("text", Arc::new(strings)),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, name != "timestamp_ns")))
            .expect("a batch")
    }

    /// The rows of a chunk of them, and the bytes that it was read as.
    fn decoded(batches: &[RecordBatch]) -> (Rows, Bytes) {
        let schema = batches[0].schema();
        let (encoder, bytes, columns) = encode_all(&schema, batches).expect("encodes");
        let rows = batches.iter().map(|batch| batch.num_rows() as u64).sum();
        let group = RowGroup { schema: &schema, descriptor: encoder.descriptor(), columns: &columns, rows, base: 0 };
        let bytes = Bytes::from(bytes);
        (decode(group, ChunkBytes::whole(0, bytes.clone())).expect("decodes"), bytes)
    }

    fn has_views(rows: &Rows) -> bool {
        rows.batch.columns().iter().any(|column| is_view(column.data_type()))
    }

    #[test]
    fn large_values_come_out_as_they_went_in_whichever_rows_and_columns_are_asked_for() {
        // With none, an empty and a short one among them; over several pages.
        let sizes = [Some(9 * LARGE), None, Some(0), Some(5), Some(400 * LARGE), Some(12), Some(13), Some(LARGE)];
        let all = batch(&sizes);
        let (rows, _) = decoded(&[all.slice(0, 3), all.slice(3, 5)]);
        assert!(has_views(&rows));
        assert_eq!(rows.all().expect("all"), all);
        for first in 0..sizes.len() {
            for count in 0..=sizes.len() - first {
                assert_eq!(rows.slice(first, count).expect("some"), all.slice(first, count), "{count} from {first}");
            }
        }
        for columns in [&[0][..], &[1, 3], &[4], &[0, 2]] {
            assert_eq!(rows.columns(columns).expect("some"), all.project(columns).expect("some"), "{columns:?}");
        }
    }

    #[test]
    fn rows_of_a_chunk_with_views_and_of_one_without_come_together() {
        let (large, small) = (batch(&[Some(2 * LARGE), Some(3 * LARGE), None]), batch(&[Some(3), None, Some(20)]));
        let chunks = [decoded(std::slice::from_ref(&large)).0, decoded(std::slice::from_ref(&small)).0];
        assert_eq!(chunks.each_ref().map(has_views), [true, false]);
        let picked = [(1, 0), (0, 1), (0, 0), (1, 2), (1, 1), (0, 2), (0, 0)];
        for (chunks, sources, picked) in [
            (&chunks[..], &[&large, &small][..], &picked[..]),
            (&chunks[..1], &[&large], &[(0, 2), (0, 0)]),
            (&chunks[1..], &[&small], &[(0, 2), (0, 0)]),
        ] {
            let expected = arrow::compute::interleave_record_batch(sources, picked).expect("some");
            assert_eq!(Rows::interleave(chunks, picked).expect("some"), expected);
        }
    }

    #[test]
    fn one_row_of_a_large_value_is_not_copied() {
        let all = batch(&[Some(2 * LARGE), Some(3 * LARGE)]);
        let (rows, bytes) = decoded(&[all]);
        let one = rows.slice(1, 1).expect("one");
        let values = [
            one.column(1).as_binary::<i32>().value_data(),
            one.column(2).as_binary::<i64>().value_data(),
            one.column(3).as_string::<i64>().value_data(),
            one.column(4).as_string::<i32>().value_data(),
        ];
        for value in values {
            assert!(bytes.as_ptr_range().contains(&value.as_ptr()), "elsewhere");
        }
    }

    #[test]
    fn columns_whose_stored_type_is_one_of_views_come_out_as_such() {
        let all = batch(&[Some(2 * LARGE), Some(20), None, Some(3)]);
        let kinds = [None, Some(DataType::BinaryView), None, Some(DataType::Utf8View), Some(DataType::Utf8View)];
        let schema = all.schema();
        let columns = schema.fields().iter().zip(all.columns()).zip(kinds).map(|((field, column), kind)| {
            let kind = kind.unwrap_or_else(|| column.data_type().clone());
            (field.name().clone(), arrow::compute::cast(column, &kind).expect("views"), field.is_nullable())
        });
        let all = RecordBatch::try_from_iter_with_nullable(columns).expect("a batch");
        for rows in [decoded(std::slice::from_ref(&all)).0, Rows::from(all.clone())] {
            assert_eq!(rows.all().expect("all"), all);
            for row in 0..all.num_rows() {
                assert_eq!(rows.slice(row, 1).expect("one"), all.slice(row, 1), "row {row}");
            }
            assert_eq!(rows.columns(&[1, 3]).expect("some"), all.project(&[1, 3]).expect("some"));
            let expected = arrow::compute::interleave_record_batch(&[&all], &[(0, 1), (0, 0)]).expect("some");
            assert_eq!(Rows::interleave(&[rows], &[(0, 1), (0, 0)]).expect("some"), expected);
        }
    }

    #[test]
    fn more_than_an_array_of_the_stored_type_holds_is_an_error() {
        let value = vec![b'x'; 1 << 20];
        let mut views = arrow::array::BinaryViewBuilder::new();
        let block = views.append_block(value.into());
        for _ in 0..2048 {
            views.try_append_view(block, 0, 1 << 20).expect("a view");
        }
        let column: ArrayRef = Arc::new(views.finish());
        let field = Field::new("blob", DataType::Binary, false);
        let refused = to_type(&column, &field).expect_err("2 GiB");
        assert!(!refused.is_damage() && refused.to_string().contains("2147483648 bytes"), "{refused}");
        assert!(to_type(&column.slice(0, 2), &field).is_ok());
    }

    #[test]
    fn inv_7_values_stay_where_they_are_only_where_they_are_most_of_what_was_read() {
        let with_others = |others: usize, blob: usize| {
            let numbers = Int64Array::from_iter_values((0..others as i64).map(|at| at * 7_777_777));
            let lists = arrow::array::ListArray::new(
                Arc::new(Field::new_list_field(DataType::Int64, false)),
                OffsetBuffer::from_lengths([others / 2, others - others / 2]),
                Arc::new(numbers),
                None,
            );
            let blobs = BinaryArray::from_iter_values([vec![1; blob], vec![2; blob]]);
            let columns: [(&str, ArrayRef); 2] = [("lists", Arc::new(lists)), ("blobs", Arc::new(blobs))];
            decoded(&[RecordBatch::try_from_iter(columns).expect("a batch")])
        };
        for (others, blob, stays) in [
            (0, LARGE, true),
            (0, LARGE - 100, false),
            (LARGE / 8, 8 * LARGE, true),
            (LARGE / 4, 8 * LARGE, true),
            (LARGE / 3, 8 * LARGE, false),
            (LARGE, 8 * LARGE, false),
        ] {
            let (rows, bytes) = with_others(others, blob);
            assert_eq!(has_views(&rows), stays, "{others} numbers beside two values of {blob} bytes");
            // What the cache counts is what is there, but for an eighth.
            assert!(!stays || rows.memory_bytes() >= bytes.len() - bytes.len() / 8, "{} bytes", rows.memory_bytes());
        }
    }
}
