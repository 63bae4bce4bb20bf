//! The bytes of a row group back to batches.
//!
//! Guarantees: nothing is decoded that was not checked against its checksum first
//! ([`verify_columns`]); a decoded batch has the stored schema to the letter.

use crate::chunk::encode::{codec, encodings};
use crate::chunk::record::{ChunkRecord, ColumnRecord, column_crc_seed};
use crate::error::{Result, StorageError};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use bytes::{Buf, Bytes};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::arrow::encode_arrow_schema;
use parquet::file::metadata::{ColumnChunkMetaData, FileMetaData, KeyValue, ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};
use parquet::schema::types::SchemaDescPtr;
use std::path::Path;
use std::sync::Arc;

/// A window of a file: `bytes` stand at `base`.
#[derive(Debug, Clone)]
pub struct ChunkBytes {
    /// Offset of the first byte in the file.
    pub base: u64,
    /// The bytes.
    pub bytes: Bytes,
}

impl ChunkBytes {
    fn slice(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let outside = || parquet::errors::ParquetError::EOF(format!("byte {start} lies outside the chunk"));
        let from = usize::try_from(start.checked_sub(self.base).ok_or_else(outside)?).map_err(|_| outside())?;
        let to = from.checked_add(length).filter(|to| *to <= self.bytes.len()).ok_or_else(outside)?;
        Ok(self.bytes.slice(from..to))
    }
}

impl Length for ChunkBytes {
    fn len(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }
}

impl ChunkReader for ChunkBytes {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let left = self.len().saturating_sub(start);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        Ok(self.slice(start, left)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        self.slice(start, length)
    }
}

/// Checks every column chunk in `bytes` against the record.
///
/// # Errors
/// [`StorageError::Checksum`] for the first column that differs.
pub fn verify_columns(path: &Path, record: &ChunkRecord, bytes: &ChunkBytes) -> Result<()> {
    for (index, (offset, column)) in record.column_places().enumerate() {
        let length = usize::try_from(column.encoded_bytes).unwrap_or(usize::MAX);
        let column_bytes = bytes.slice(offset, length)?;
        let seed = column_crc_seed(record.segment_id, record.epoch, index, offset);
        let computed = crc32c::crc32c_append(seed, &column_bytes);
        if computed != column.crc {
            return Err(StorageError::Checksum {
                what: format!("column {index}"),
                path: path.to_owned(),
                at: offset,
                stored: column.crc,
                computed,
            });
        }
    }
    Ok(())
}

/// Decodes a whole row group that starts at `bytes.base`.
///
/// # Errors
/// When the bytes are not the pages the columns promise.
pub fn decode(
    schema: &SchemaRef,
    descriptor: &SchemaDescPtr,
    columns: &[ColumnRecord],
    rows: u64,
    bytes: ChunkBytes,
) -> Result<Vec<RecordBatch>> {
    let group = row_group(descriptor, columns, rows, bytes.base, None)?;
    let file = FileMetaData::new(
        1,
        group.num_rows(),
        None,
        Some(vec![KeyValue::new("ARROW:schema".to_owned(), encode_arrow_schema(schema))]),
        Arc::clone(descriptor),
        None,
    );
    let metadata = Arc::new(ParquetMetaData::new(file, vec![group]));
    let metadata = ArrowReaderMetadata::try_new(metadata, ArrowReaderOptions::new())?;
    let batch_rows = usize::try_from(rows).unwrap_or(usize::MAX).max(1);
    let reader =
        ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, metadata).with_batch_size(batch_rows).build()?;
    let mut batches = Vec::new();
    for batch in reader {
        let batch = batch?;
        let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        batches.push(RecordBatch::try_new_with_options(Arc::clone(schema), batch.columns().to_vec(), &options)?);
    }
    Ok(batches)
}

/// Parquet's metadata of a row group that starts at `base`, with statistics where they are given.
///
/// # Errors
/// When the record does not fit the schema.
pub fn row_group(
    descriptor: &SchemaDescPtr,
    columns: &[ColumnRecord],
    rows: u64,
    base: u64,
    statistics: Option<&[Option<parquet::file::statistics::Statistics>]>,
) -> Result<RowGroupMetaData> {
    if columns.len() != descriptor.num_columns() {
        return Err(StorageError::Decode {
            what: "chunk record",
            text: format!("{} columns recorded, {} in the schema", columns.len(), descriptor.num_columns()),
        });
    }
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let mut at = base;
    let mut chunks = Vec::with_capacity(columns.len());
    let mut total = 0;
    for (index, column) in columns.iter().enumerate() {
        let mut chunk = ColumnChunkMetaData::builder(descriptor.column(index))
            .set_encodings(encodings(column.encodings))
            .set_compression(codec(column.codec))
            .set_num_values(signed(column.values))
            .set_total_compressed_size(signed(column.encoded_bytes))
            .set_total_uncompressed_size(signed(column.plain_bytes))
            .set_data_page_offset(signed(at));
        if let Some(Some(statistics)) = statistics.and_then(|all| all.get(index)) {
            chunk = chunk.set_statistics(statistics.clone());
        }
        chunks.push(chunk.build()?);
        at += column.encoded_bytes;
        total += column.plain_bytes;
    }
    Ok(RowGroupMetaData::builder(Arc::clone(descriptor))
        .set_num_rows(signed(rows))
        .set_total_byte_size(signed(total))
        .set_file_offset(signed(base))
        .set_column_metadata(chunks)
        .build()?)
}
