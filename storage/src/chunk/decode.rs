//! The bytes of a row group back to batches.
//!
//! Guarantees: nothing is decoded that was not checked against its checksum first
//! ([`verify_columns`]); what is decoded comes out in the stored schema to the letter.

use crate::checksum;
use crate::chunk::encode::{codec, encodings};
use crate::chunk::record::{ChunkRecord, ColumnRecord, column_crc_seed};
use crate::chunk::rows::{self, Rows};
use crate::error::{Result, StorageError};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use bytes::{Buf, Bytes};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::{ProjectionMask, encode_arrow_schema};
use parquet::file::metadata::{ColumnChunkMetaData, FileMetaData, KeyValue, ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};
use parquet::schema::types::SchemaDescPtr;
use std::path::Path;
use std::sync::Arc;

/// Windows of a file: what was read of it, by offset.
#[derive(Debug, Clone)]
pub struct ChunkBytes {
    parts: Vec<(u64, Bytes)>,
}

impl ChunkBytes {
    /// One window: `bytes` stand at `base`.
    pub fn whole(base: u64, bytes: Bytes) -> Self {
        Self { parts: vec![(base, bytes)] }
    }

    /// Several windows, in order.
    pub fn parts(parts: Vec<(u64, Bytes)>) -> Self {
        Self { parts }
    }

    fn slice(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let inside = self.parts.iter().find_map(|(base, bytes)| {
            let from = usize::try_from(start.checked_sub(*base)?).ok()?;
            let to = from.checked_add(length).filter(|to| *to <= bytes.len())?;
            Some(bytes.slice(from..to))
        });
        inside.ok_or_else(|| {
            parquet::errors::ParquetError::EOF(format!("{length} bytes at {start} lie outside of what was read"))
        })
    }

    /// What there is from an offset to the end of its window.
    fn rest(&self, start: u64) -> parquet::errors::Result<Bytes> {
        let window = self.parts.iter().find(|(base, bytes)| *base <= start && start <= base + bytes.len() as u64);
        let length = window.map_or(0, |(base, bytes)| base + bytes.len() as u64 - start);
        self.slice(start, usize::try_from(length).unwrap_or(usize::MAX))
    }
}

impl Length for ChunkBytes {
    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |(base, bytes)| base + bytes.len() as u64)
    }
}

impl ChunkReader for ChunkBytes {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(self.rest(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        self.slice(start, length)
    }
}

/// Checks column chunks in `bytes` against the record: those that are asked for, or all.
///
/// # Errors
/// [`StorageError::Checksum`] for the first column that differs.
pub fn verify_columns(path: &Path, record: &ChunkRecord, bytes: &ChunkBytes, leaves: Option<&[usize]>) -> Result<()> {
    for (index, (offset, column)) in record.column_places().enumerate() {
        if leaves.is_some_and(|leaves| !leaves.contains(&index)) {
            continue;
        }
        let length = usize::try_from(column.encoded_bytes).unwrap_or(usize::MAX);
        let column_bytes = bytes.slice(offset, length)?;
        let seed = column_crc_seed(record.segment_id, record.epoch, index, offset);
        let computed = checksum::append(seed, &column_bytes);
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

/// A row group to decode: where it starts in its file and what it is made of.
#[derive(Debug, Clone, Copy)]
pub struct RowGroup<'a> {
    /// The stored schema.
    pub schema: &'a SchemaRef,
    /// The same as Parquet has it.
    pub descriptor: &'a SchemaDescPtr,
    /// Its column chunks.
    pub columns: &'a [ColumnRecord],
    /// Its rows.
    pub rows: u64,
    /// Offset of its first byte.
    pub base: u64,
}

/// Decodes a whole row group.
///
/// # Errors
/// When the bytes are not the pages the columns promise.
pub fn decode(group: RowGroup<'_>, bytes: ChunkBytes) -> Result<Rows> {
    let schema = rows::in_memory(group);
    let batches = reader(RowGroup { schema: &schema, ..group }, bytes, None)?.collect::<Result<Vec<_>, _>>()?;
    let batch = match batches.as_slice() {
        [one] => one.clone(),
        // None for no rows.
        many => arrow::compute::concat_batches(&schema, many)?,
    };
    Ok(Rows::new(batch, Arc::clone(group.schema)))
}

/// Decodes some leaf columns of a row group, in the schema that is left when the others are taken away.
///
/// # Errors
/// As [`decode`].
pub fn decode_leaves(group: RowGroup<'_>, bytes: ChunkBytes, leaves: &[usize]) -> Result<Vec<RecordBatch>> {
    let batches = reader(group, bytes, Some(leaves))?.collect::<Result<Vec<_>, _>>()?;
    Ok(batches)
}

fn reader(group: RowGroup<'_>, bytes: ChunkBytes, leaves: Option<&[usize]>) -> Result<ParquetRecordBatchReader> {
    let row_group = row_group(group.descriptor, group.columns, group.rows, group.base, None)?;
    let file = FileMetaData::new(
        1,
        row_group.num_rows(),
        None,
        Some(vec![KeyValue::new("ARROW:schema".to_owned(), encode_arrow_schema(group.schema))]),
        Arc::clone(group.descriptor),
        None,
    );
    let metadata = Arc::new(ParquetMetaData::new(file, vec![row_group]));
    let metadata = ArrowReaderMetadata::try_new(metadata, ArrowReaderOptions::new())?;
    let batch_rows = usize::try_from(group.rows).unwrap_or(usize::MAX).max(1);
    let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, metadata).with_batch_size(batch_rows);
    if let Some(leaves) = leaves {
        builder = builder.with_projection(ProjectionMask::leaves(group.descriptor, leaves.iter().copied()));
    }
    Ok(builder.build()?)
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
