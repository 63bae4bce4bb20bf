//! Batches to Parquet pages, in slices small enough for a writer thread that must not stall.
//!
//! Guarantees: columns come out one after another, pages in file order, so the caller can copy each
//! page straight to its place and checksum it on the way; a step encodes about
//! [`limits::PAGE_BYTES`] of one field (or one value, if that is larger).
//! Does not know: where the bytes go. Statistics and dictionaries are off in the Parquet writer: the
//! skip index computes its own, once.

use crate::chunk::record::ColumnRecord;
use crate::error::{Result, StorageError};
use crate::limits;
use crate::ontology::Derived;
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{
    ArrowColumnChunk, ArrowColumnWriter, ArrowRowGroupWriterFactory, PageKey, PageStore, PageStoreArgs,
    PageStoreFactory, compute_leaves,
};
use parquet::basic::Encoding;
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{ColumnPath, SchemaDescPtr};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// The serialization format a topic was created with; it only steers storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Format {
    /// Ordinary rows.
    Default,
    /// Rows of very different lengths.
    Ragged,
    /// Rows dominated by one compressed blob.
    Image,
}

impl Format {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Ragged => "ragged",
            Self::Image => "image",
        }
    }

    /// The format of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Default, Self::Ragged, Self::Image].into_iter().find(|format| format.name() == name)
    }
}

/// How `default` and `ragged` pages are compressed. `image` never is: its blobs do not shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// Plain pages: the least CPU.
    None,
    /// LZ4 (raw blocks) over byte-stream-split floats.
    Lz4,
    /// Zstandard level 1 over byte-stream-split floats.
    Zstd,
}

impl Compression {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// The compression of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd].into_iter().find(|compression| compression.name() == name)
    }
}

/// What encoding a chunk yields, in file order.
#[derive(Debug)]
pub enum Piece {
    /// The next bytes of the current column.
    Page(Bytes),
    /// The current column is complete; its checksum is the caller's to fill in.
    ColumnEnd(ColumnRecord),
}

type PageQueue = Arc<Mutex<VecDeque<Bytes>>>;

/// Makes encoders for the chunks of one topic.
#[derive(Debug)]
pub struct TopicEncoder {
    factory: ArrowRowGroupWriterFactory,
    queues: Arc<QueueFactory>,
    schema: SchemaRef,
    descriptor: SchemaDescPtr,
    derived: Vec<Derived>,
}

impl TopicEncoder {
    /// An encoder for rows of the stored schema.
    ///
    /// # Errors
    /// When Parquet has no column type for a field.
    pub fn new(schema: &SchemaRef, format: Format, compression: Compression) -> Result<Self> {
        let properties = Arc::new(properties(schema, format, compression));
        let descriptor = ArrowSchemaConverter::new().convert(schema)?;
        let writer = SerializedFileWriter::new(std::io::sink(), descriptor.root_schema_ptr(), properties)?;
        let queues = Arc::new(QueueFactory::default());
        let factory = ArrowRowGroupWriterFactory::new(&writer, Arc::clone(schema))
            .with_page_store_factory(Arc::clone(&queues) as Arc<dyn PageStoreFactory>);
        Ok(Self { factory, queues, schema: Arc::clone(schema), descriptor: Arc::new(descriptor), derived: Vec::new() })
    }

    /// The same, with what its ontology adds to the statistics.
    pub fn with_index(self, derived: Vec<Derived>) -> Self {
        Self { derived, ..self }
    }

    /// What the ontology adds to the statistics.
    pub fn derived(&self) -> &[Derived] {
        &self.derived
    }

    /// The Parquet schema of the files.
    pub fn descriptor(&self) -> &SchemaDescPtr {
        &self.descriptor
    }

    /// Starts a chunk of these batches, which must all have the stored schema.
    ///
    /// # Errors
    /// When Parquet cannot make its column writers.
    pub fn begin<'a>(&self, batches: &'a [RecordBatch]) -> Result<ChunkEncoder<'a>> {
        let writers = self.factory.create_column_writers(0)?;
        let queues = self.queues.take();
        if writers.len() != queues.len() {
            return Err(StorageError::Format { op: "encode", text: "a column has no page queue".to_owned() });
        }
        Ok(ChunkEncoder {
            batches,
            schema: Arc::clone(&self.schema),
            waiting: writers.into_iter().zip(queues).collect::<VecDeque<_>>(),
            current: Vec::new(),
            field: 0,
            batch: 0,
            row: 0,
        })
    }
}

/// One chunk on its way to pages. Call [`Self::step`] until it returns `None`.
#[derive(Debug)]
pub struct ChunkEncoder<'a> {
    batches: &'a [RecordBatch],
    schema: SchemaRef,
    /// Leaf writers of the fields to come.
    waiting: VecDeque<(ArrowColumnWriter, PageQueue)>,
    /// Leaf writers of the field under way.
    current: Vec<(ArrowColumnWriter, PageQueue)>,
    field: usize,
    batch: usize,
    row: usize,
}

impl ChunkEncoder<'_> {
    /// Encodes about one page more. `None`: the chunk is complete.
    ///
    /// # Errors
    /// When a value does not fit its declared type (a null in a non-nullable field).
    pub fn step(&mut self) -> Result<Option<Vec<Piece>>> {
        let Some(field) = self.schema.fields().get(self.field).cloned() else {
            return Ok(None);
        };
        if self.current.is_empty() {
            self.batch = 0;
            self.row = 0;
            let leaves = self.waiting.len().min(field_leaves(field.data_type()));
            self.current = self.waiting.drain(..leaves).collect();
        }
        let mut pieces = Vec::new();
        if let Some(batch) = self.batches.get(self.batch) {
            let column = batch.column(self.field);
            let rows = self.slice_rows(batch.num_rows(), column.get_buffer_memory_size());
            let slice = column.slice(self.row, rows);
            for ((writer, _), leaf) in self.current.iter_mut().zip(compute_leaves(&field, &slice)?) {
                writer.write(&leaf)?;
            }
            self.row += rows;
            if self.row >= batch.num_rows() {
                self.batch += 1;
                self.row = 0;
            }
            if let Some((_, queue)) = self.current.first() {
                drain(queue, &mut pieces);
            }
        }
        if self.batch >= self.batches.len() {
            for (writer, queue) in self.current.drain(..) {
                let chunk = writer.close()?;
                drain(&queue, &mut pieces);
                pieces.push(Piece::ColumnEnd(column_record(&chunk)));
            }
            self.field += 1;
        }
        Ok(Some(pieces))
    }

    /// Rows of this batch's column that make about one page.
    fn slice_rows(&self, rows: usize, column_bytes: usize) -> usize {
        let left = rows - self.row;
        let row_bytes = (column_bytes / rows.max(1)).max(1);
        left.min((limits::PAGE_BYTES / row_bytes).max(1))
    }
}

fn drain(queue: &PageQueue, pieces: &mut Vec<Piece>) {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    pieces.extend(queue.drain(..).map(Piece::Page));
}

fn column_record(chunk: &ArrowColumnChunk) -> ColumnRecord {
    let metadata = &chunk.close().metadata;
    let encodings = metadata.encodings().fold(0, |mask, encoding| mask | encoding_bit(encoding));
    ColumnRecord {
        encoded_bytes: chunk.close().bytes_written,
        plain_bytes: u64::try_from(metadata.uncompressed_size()).unwrap_or(0),
        values: u64::try_from(metadata.num_values()).unwrap_or(0),
        encodings,
        codec: codec_number(metadata.compression()),
        crc: 0,
    }
}

const ENCODINGS: [Encoding; 5] = [
    Encoding::PLAIN,
    Encoding::RLE,
    Encoding::DELTA_BINARY_PACKED,
    Encoding::BYTE_STREAM_SPLIT,
    Encoding::RLE_DICTIONARY,
];

fn encoding_bit(encoding: Encoding) -> u32 {
    1_u32 << (encoding as u32)
}

/// The encodings of a [`ColumnRecord`] bit set.
pub(crate) fn encodings(mask: u32) -> Vec<Encoding> {
    ENCODINGS.into_iter().filter(|encoding| mask & encoding_bit(*encoding) != 0).collect()
}

fn codec_number(compression: parquet::basic::Compression) -> u8 {
    match compression {
        parquet::basic::Compression::LZ4_RAW => 7,
        parquet::basic::Compression::ZSTD(_) => 6,
        _ => 0,
    }
}

/// The codec of a [`ColumnRecord`] number (Parquet's own numbers).
pub(crate) fn codec(number: u8) -> parquet::basic::Compression {
    match number {
        7 => parquet::basic::Compression::LZ4_RAW,
        6 => parquet::basic::Compression::ZSTD(parquet::basic::ZstdLevel::default()),
        _ => parquet::basic::Compression::UNCOMPRESSED,
    }
}

fn properties(schema: &SchemaRef, format: Format, compression: Compression) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_data_page_size_limit(limits::PAGE_BYTES)
        .set_data_page_row_count_limit(usize::MAX)
        .set_write_batch_size(8192);
    if format == Format::Image {
        return properties.build();
    }
    let codec = match compression {
        Compression::None => return properties.build(),
        Compression::Lz4 => parquet::basic::Compression::LZ4_RAW,
        Compression::Zstd => parquet::basic::Compression::ZSTD(parquet::basic::ZstdLevel::default()),
    };
    properties = properties.set_compression(codec);
    for field in schema.fields() {
        match field.data_type() {
            DataType::Float32 | DataType::Float64 => {
                properties = properties
                    .set_column_encoding(ColumnPath::from(field.name().as_str()), Encoding::BYTE_STREAM_SPLIT);
            }
            DataType::Int64 => {
                properties = properties
                    .set_column_encoding(ColumnPath::from(field.name().as_str()), Encoding::DELTA_BINARY_PACKED);
            }
            _ => {}
        }
    }
    properties.build()
}

fn field_leaves(data_type: &DataType) -> usize {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| field_leaves(field.data_type())).sum(),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => field_leaves(child.data_type()),
        _ => 1,
    }
}

/// Hands each column writer a queue and remembers the queues in column order.
#[derive(Debug, Default)]
struct QueueFactory {
    made: Mutex<Vec<PageQueue>>,
}

impl QueueFactory {
    fn take(&self) -> Vec<PageQueue> {
        std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PageStoreFactory for QueueFactory {
    fn create(&self, _args: &PageStoreArgs<'_>) -> parquet::errors::Result<Box<dyn PageStore>> {
        let queue = PageQueue::default();
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&queue));
        Ok(Box::new(QueueStore { queue, put: 0 }))
    }
}

/// A page store that gives its pages away at once instead of keeping a second row group on the heap.
struct QueueStore {
    queue: PageQueue,
    put: u64,
}

impl PageStore for QueueStore {
    fn put(&mut self, value: Bytes) -> parquet::errors::Result<PageKey> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(value);
        self.put += 1;
        Ok(PageKey::new(self.put))
    }

    fn take(&mut self, _key: PageKey) -> parquet::errors::Result<Bytes> {
        Err(ParquetError::General("pages were already written; this store gives none back".to_owned()))
    }
}
