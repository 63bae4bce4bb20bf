//! From batches to the bytes of one Parquet row group, and back.
//!
//! [`encode`] makes the bytes (`plain` those that need no work, with `levels`), [`stats`] the typed statistics, [`hash`] the identity of a batch,
//! [`record`] what the catalog keeps of a chunk, [`decode`] the way back (`rows` what comes of it). All of it is CPU work
//! on values: no file, no offset in a file, no thread.

pub mod decode;
pub mod encode;
pub mod hash;
mod levels;
mod plain;
pub mod record;
mod rows;
pub mod stats;

pub(crate) use encode::Layout;
pub use encode::{ChunkEncoder, Compression, Format, Piece, TopicEncoder};
pub use record::{BatchMark, ChunkRecord, ColumnRecord};
pub use rows::Rows;

use crate::error::{Result, StorageError};
use crate::schema::{TopicSchema, sample_batch};
use arrow::array::{Array, AsArray, GenericByteArray, RecordBatch};
use arrow::datatypes::{ArrowNativeType, ByteArrayType, DataType, SchemaRef};
use bytes::Bytes;

/// Weight of a batch as it will be encoded, in bytes: sliced values, offsets and validity.
pub fn data_bytes(batch: &RecordBatch) -> u64 {
    batch.columns().iter().map(|column| weight_of(column)).sum::<usize>() as u64
}

/// The same of one column. As [`arrow::array::ArrayData::get_slice_memory_size`] has it, which takes an array apart at
/// every look; the types that batches are made of are asked themselves.
fn weight_of(column: &dyn Array) -> usize {
    let rows = column.len();
    let own = match column.data_type() {
        DataType::Struct(_) => column.as_struct().columns().iter().map(|child| weight_of(child)).sum(),
        DataType::List(_) => (rows + 1) * 4 + weight_of(column.as_list::<i32>().values()),
        DataType::LargeList(_) => (rows + 1) * 8 + weight_of(column.as_list::<i64>().values()),
        DataType::FixedSizeList(_, _) => weight_of(column.as_fixed_size_list().values()),
        DataType::Utf8 => bytes_of(column.as_string::<i32>()),
        DataType::Binary => bytes_of(column.as_binary::<i32>()),
        DataType::LargeUtf8 => bytes_of(column.as_string::<i64>()),
        DataType::LargeBinary => bytes_of(column.as_binary::<i64>()),
        DataType::Boolean => rows.div_ceil(8),
        DataType::FixedSizeBinary(width) => rows * usize::try_from(*width).unwrap_or(0),
        data_type => match data_type.primitive_width() {
            Some(width) => rows * width,
            None => {
                let data = column.to_data();
                return data.get_slice_memory_size().unwrap_or_else(|_| data.get_array_memory_size());
            }
        },
    };
    own + if column.nulls().is_some_and(|nulls| nulls.null_count() > 0) { rows.div_ceil(8) } else { 0 }
}

/// Offsets and bytes.
fn bytes_of<T: ByteArrayType>(column: &GenericByteArray<T>) -> usize {
    let offsets = column.offsets();
    size_of_val::<[T::Offset]>(offsets) + offsets.last().as_usize() - offsets.first().as_usize()
}

/// Sends an empty and a small batch of the schema through encode and decode (design.md section 5).
///
/// # Errors
/// [`StorageError::Unstorable`] naming the first field that does not come back equal.
pub(crate) fn prove_round_trip(schema: &TopicSchema) -> Result<()> {
    for rows in [0, 2] {
        let sent = sample_batch(&schema.wire, rows)
            .map_err(|error| unstorable(schema, 0, &format!("no sample of it can be made: {error}")))?;
        let stored = schema.to_stored(&sent)?;
        let back = round_trip(&schema.stored, &stored).map_err(|error| name_culprit(schema, rows, &error))?;
        let back = schema.to_wire(&back)?;
        for (index, (sent, back)) in sent.columns().iter().zip(back.columns()).enumerate() {
            if sent.data_type() != back.data_type() || sent != back {
                return Err(unstorable(schema, index, "Parquet gives it back changed"));
            }
        }
    }
    Ok(())
}

/// Parquet's errors name no field: try the columns one by one.
fn name_culprit(schema: &TopicSchema, rows: usize, error: &StorageError) -> StorageError {
    for (index, field) in schema.stored.fields().iter().enumerate() {
        let alone: SchemaRef = std::sync::Arc::new(arrow::datatypes::Schema::new(vec![std::sync::Arc::clone(field)]));
        let tried = sample_batch(&alone, rows).and_then(|batch| round_trip(&alone, &batch));
        if let Err(error) = tried {
            return unstorable(schema, index, &error.to_string());
        }
    }
    unstorable(schema, 0, &error.to_string())
}

fn unstorable(schema: &TopicSchema, column: usize, why: &str) -> StorageError {
    let field = schema.wire.field(column);
    StorageError::Unstorable {
        field: field.name().clone(),
        data_type: field.data_type().to_string(),
        why: why.to_owned(),
    }
}

fn round_trip(stored: &SchemaRef, batch: &RecordBatch) -> Result<RecordBatch> {
    // Parquet asserts what it does not know how to store, such as binaries of a fixed size of 0.
    let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| encode_and_decode(stored, batch)));
    tried.unwrap_or_else(|_| {
        Err(StorageError::Format { op: "parquet", text: "its writer does not take this type".to_owned() })
    })
}

fn encode_and_decode(stored: &SchemaRef, batch: &RecordBatch) -> Result<RecordBatch> {
    let (encoder, bytes, columns) = encode_all(stored, std::slice::from_ref(batch))?;
    decode_all(stored, &encoder, bytes, &columns, batch.num_rows())
}

/// One row group of these batches, with the records of its columns.
fn encode_all(stored: &SchemaRef, batches: &[RecordBatch]) -> Result<(TopicEncoder, Vec<u8>, Vec<ColumnRecord>)> {
    let encoder = TopicEncoder::new(stored, Compression::None)?;
    let mut chunk = encoder.begin(batches)?;
    let mut bytes = Vec::new();
    let mut columns = Vec::new();
    let mut pieces = Vec::new();
    while chunk.step(&mut pieces)? {
        for piece in pieces.drain(..) {
            match piece {
                Piece::Page(page) => bytes.extend_from_slice(&page),
                Piece::ColumnEnd(column) => columns.push(column),
            }
        }
    }
    Ok((encoder, bytes, columns))
}

fn decode_all(
    stored: &SchemaRef,
    encoder: &TopicEncoder,
    bytes: Vec<u8>,
    columns: &[ColumnRecord],
    rows: usize,
) -> Result<RecordBatch> {
    let chunk = decode::ChunkBytes::whole(0, Bytes::from(bytes));
    let descriptor = encoder.descriptor();
    let group = decode::RowGroup { schema: stored, descriptor, columns, rows: rows as u64, base: 0 };
    decode::decode(group, chunk)?.all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_weigh_what_arrow_says_of_their_data() {
        let kinds = hash::tests::kinds();
        for rows in [kinds.clone(), kinds.slice(0, 1), kinds.slice(1, 2), kinds.slice(3, 0)] {
            for (field, column) in rows.schema().fields().iter().zip(rows.columns()) {
                let expected = column.to_data().get_slice_memory_size().expect("a size");
                assert_eq!(weight_of(column), expected, "{field}");
            }
        }
    }
}
