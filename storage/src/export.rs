//! Rows to a Parquet file for people: the plain writer, no chunks, no trailers.

use crate::error::{Result, StorageError};
use crate::schema::TopicSchema;
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::Path;

/// A file being written.
pub struct ParquetFile {
    writer: ArrowWriter<File>,
    schema: TopicSchema,
}

impl std::fmt::Debug for ParquetFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ParquetFile")
    }
}

impl ParquetFile {
    /// Creates a file, replacing one that is there, for rows of a topic's schema.
    ///
    /// # Errors
    /// When it cannot be made, or Parquet has no type for a column.
    pub fn create(path: &Path, schema: &SchemaRef) -> Result<Self> {
        let schema = TopicSchema::derive(SchemaRef::clone(schema))?;
        let file = File::create(path).map_err(|error| StorageError::io("create", path, error))?;
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?)).build();
        let writer = ArrowWriter::try_new(file, SchemaRef::clone(&schema.stored), Some(properties))?;
        Ok(Self { writer, schema })
    }

    /// Adds rows.
    ///
    /// # Errors
    /// When they cannot be encoded or written.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        Ok(self.writer.write(&self.schema.to_stored(batch)?)?)
    }

    /// Writes the footer.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<()> {
        self.writer.close()?;
        Ok(())
    }
}
