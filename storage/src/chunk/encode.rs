//! Batches to Parquet pages, in slices small enough for a writer thread that must not stall.
//!
//! Guarantees: columns come out one after another, pages in file order, so the caller can copy each
//! page straight to its place and checksum it on the way; a step encodes about
//! [`limits::PAGE_BYTES`] of one field (or one value, if that is larger).
//! Plain columns come as pieces of the batches' own memory (`plain.rs`); those that are compressed, or of a type
//! that Parquet stores in another shape, go through Parquet's writer.
//! Does not know: where the bytes go. Statistics and dictionaries are off in the Parquet writer: the
//! skip index computes its own, once.

pub use crate::chunk::plain::Part;
use crate::chunk::plain::{self, Column, Leaf, Page};
use crate::chunk::record::ColumnRecord;
use crate::error::{Result, StorageError};
use crate::limits;
use crate::ontology::Derived;
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, SchemaRef};
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
use parquet::schema::types::{ColumnPath, SchemaDescPtr, SchemaDescriptor};
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

/// How pages are compressed.
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

    /// What a topic gets: what it asks for itself, or else what is configured; but not `image`, whose blobs do
    /// not shrink.
    pub fn of_topic(format: Format, configured: Self, asked: Option<Self>) -> Self {
        match (asked, format) {
            (Some(asked), _) => asked,
            (None, Format::Image) => Self::None,
            (None, Format::Default | Format::Ragged) => configured,
        }
    }

    /// The compression of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd].into_iter().find(|compression| compression.name() == name)
    }
}

/// What encoding a chunk yields, in file order.
#[derive(Debug)]
pub enum Piece<'a> {
    /// The next bytes of the current column.
    Page(Part<'a>),
    /// The current column is complete; its checksum is the caller's to fill in.
    ColumnEnd(ColumnRecord),
}

type PageQueue = Arc<Mutex<VecDeque<Bytes>>>;

/// Makes encoders for the chunks of one topic.
#[derive(Debug)]
pub struct TopicEncoder {
    layout: Arc<Layout>,
    /// Parquet's writers, if a field goes through them.
    writers: Option<Writers>,
    derived: Vec<Derived>,
}

/// How rows of a schema lie in a row group: the same for all topics that have it.
#[derive(Debug)]
pub(crate) struct Layout {
    schema: SchemaRef,
    /// Of each field.
    plans: Vec<Plan>,
    descriptor: SchemaDescPtr,
}

#[derive(Debug)]
struct Writers {
    factory: ArrowRowGroupWriterFactory,
    queues: Arc<QueueFactory>,
}

/// How a field is encoded.
#[derive(Debug)]
enum Plan {
    /// Straight out of memory.
    Plain(Vec<Leaf>),
    /// By Parquet's writer: so many leaves.
    Writer(usize),
}

fn plans(schema: &SchemaRef, descriptor: &SchemaDescriptor, plain: bool) -> Vec<Plan> {
    let mut columns = descriptor.columns();
    let plan = |field: &Arc<Field>| {
        let count = field_leaves(field.data_type()).min(columns.len());
        let (own, rest) = columns.split_at(count);
        columns = rest;
        let leaves = if plain { plain::leaves(field, own) } else { None };
        leaves.map_or(Plan::Writer(count), Plan::Plain)
    };
    schema.fields().iter().map(plan).collect()
}

impl Layout {
    /// How rows of the stored schema lie.
    ///
    /// # Errors
    /// When Parquet has no column type for a field.
    pub(crate) fn new(schema: &SchemaRef, compression: Compression) -> Result<Self> {
        let descriptor = ArrowSchemaConverter::new().convert(schema)?;
        let plans = plans(schema, &descriptor, compression == Compression::None);
        Ok(Self { schema: Arc::clone(schema), plans, descriptor: Arc::new(descriptor) })
    }

    fn is_plain(&self) -> bool {
        self.plans.iter().all(|plan| matches!(plan, Plan::Plain(_)))
    }
}

impl Writers {
    fn new(layout: &Layout, compression: Compression) -> Result<Self> {
        let properties = Arc::new(properties(&layout.schema, compression));
        let writer = SerializedFileWriter::new(std::io::sink(), layout.descriptor.root_schema_ptr(), properties)?;
        let queues = Arc::new(QueueFactory::default());
        let factory = ArrowRowGroupWriterFactory::new(&writer, Arc::clone(&layout.schema))
            .with_page_store_factory(Arc::clone(&queues) as Arc<dyn PageStoreFactory>);
        Ok(Self { factory, queues })
    }
}

impl TopicEncoder {
    /// An encoder for rows of the stored schema. [`TopicSchema::encoder`] shares what topics have in common.
    ///
    /// [`TopicSchema::encoder`]: crate::schema::TopicSchema::encoder
    ///
    /// # Errors
    /// When Parquet has no column type for a field.
    pub fn new(schema: &SchemaRef, compression: Compression) -> Result<Self> {
        Self::of(Arc::new(Layout::new(schema, compression)?), compression)
    }

    /// An encoder for rows that lie in this way, made for the same compression.
    ///
    /// # Errors
    /// When Parquet cannot make its writers.
    pub(crate) fn of(layout: Arc<Layout>, compression: Compression) -> Result<Self> {
        let writers = if layout.is_plain() { None } else { Some(Writers::new(&layout, compression)?) };
        Ok(Self { layout, writers, derived: Vec::new() })
    }

    /// The same, with what its ontology adds to the statistics.
    pub fn with_index(self, derived: Vec<Derived>) -> Self {
        Self { derived, ..self }
    }

    /// What the ontology adds to the statistics.
    pub fn derived(&self) -> &[Derived] {
        &self.derived
    }

    /// Whether no column goes through Parquet's writer.
    #[cfg(test)]
    pub(super) fn is_plain(&self) -> bool {
        self.layout.is_plain()
    }

    /// The Parquet schema of the files.
    pub fn descriptor(&self) -> &SchemaDescPtr {
        &self.layout.descriptor
    }

    /// Starts a chunk of these batches, which must all have the stored schema.
    ///
    /// # Errors
    /// When Parquet cannot make its column writers.
    pub fn begin<'a>(&self, batches: &'a [RecordBatch]) -> Result<ChunkEncoder<'a>> {
        let mut waiting = VecDeque::new();
        if let Some(Writers { factory, queues }) = &self.writers {
            let writers = factory.create_column_writers(0)?;
            let queues = queues.take();
            if writers.len() != queues.len() {
                return Err(StorageError::Format { op: "encode", text: "a column has no page queue".to_owned() });
            }
            waiting.extend(writers.into_iter().zip(queues));
        }
        Ok(ChunkEncoder {
            batches,
            layout: Arc::clone(&self.layout),
            waiting,
            current: Vec::new(),
            field: 0,
            leaf: 0,
            place: Place::default(),
            page: Page::default(),
            column: ColumnRecord::default(),
        })
    }
}

/// How far a column has come.
#[derive(Debug, Default, Clone, Copy)]
struct Place {
    batch: usize,
    row: usize,
}

/// One chunk on its way to pages. Call [`Self::step`] until it says that there is no more.
#[derive(Debug)]
pub struct ChunkEncoder<'a> {
    batches: &'a [RecordBatch],
    layout: Arc<Layout>,
    /// Leaf writers of the fields to come; empty if none is needed.
    waiting: VecDeque<(ArrowColumnWriter, PageQueue)>,
    /// Leaf writers of the field under way.
    current: Vec<(ArrowColumnWriter, PageQueue)>,
    field: usize,
    /// Of a plain field.
    leaf: usize,
    place: Place,
    /// What a plain page has so far.
    page: Page<'a>,
    /// What a plain column has so far.
    column: ColumnRecord,
}

impl<'a> ChunkEncoder<'a> {
    /// Encodes about one page more and adds it to `pieces`; `false`: the chunk was complete.
    ///
    /// # Errors
    /// When a value does not fit its declared type (a null in a non-nullable field).
    pub fn step(&mut self, pieces: &mut Vec<Piece<'a>>) -> Result<bool> {
        let layout = Arc::clone(&self.layout);
        match layout.plans.get(self.field) {
            None => return Ok(false),
            Some(Plan::Plain(leaves)) => self.step_plain(leaves, pieces)?,
            Some(Plan::Writer(leaves)) => self.step_writer(*leaves, pieces)?,
        }
        Ok(true)
    }

    /// Fills a page from as many batches as it takes.
    fn step_plain(&mut self, leaves: &[Leaf], pieces: &mut Vec<Piece<'a>>) -> Result<()> {
        let Some(leaf) = leaves.get(self.leaf) else {
            self.skip_writers(leaves.len());
            self.next_field();
            return Ok(());
        };
        while let Some(batch) = self.batches.get(self.place.batch)
            && self.page.weight() < limits::PAGE_BYTES
        {
            let array = batch.column(self.field);
            let column = Column::new(leaf, array)?;
            while self.place.row < batch.num_rows() && self.page.weight() < limits::PAGE_BYTES {
                let rows = slice_rows(batch.num_rows(), self.place.row, column.bytes());
                column.add(self.place.row..self.place.row + rows, &mut self.page)?;
                self.place.row += rows;
            }
            if self.place.row >= batch.num_rows() {
                self.place = Place { batch: self.place.batch + 1, row: 0 };
            }
        }
        let over = self.place.batch >= self.batches.len();
        // A column without rows has no page.
        if !self.page.is_empty() {
            let (bytes, values) = self.page.finish(leaf, pieces)?;
            self.column.encoded_bytes += bytes;
            self.column.plain_bytes += bytes;
            self.column.values += values;
        }
        if over {
            let encodings = encoding_bit(Encoding::PLAIN) | encoding_bit(Encoding::RLE);
            pieces.push(Piece::ColumnEnd(ColumnRecord { encodings, ..std::mem::take(&mut self.column) }));
            self.leaf += 1;
            self.place = Place::default();
        }
        Ok(())
    }

    /// Writers are made for all columns or for none: those of plain fields are not used.
    fn skip_writers(&mut self, leaves: usize) {
        self.waiting.drain(..leaves.min(self.waiting.len()));
    }

    fn next_field(&mut self) {
        self.field += 1;
        self.leaf = 0;
        self.place = Place::default();
    }

    fn step_writer(&mut self, leaves: usize, pieces: &mut Vec<Piece<'a>>) -> Result<()> {
        let Some(field) = self.layout.schema.fields().get(self.field).cloned() else {
            return Ok(());
        };
        if self.current.is_empty() {
            self.current = self.waiting.drain(..leaves.min(self.waiting.len())).collect();
        }
        if let Some(batch) = self.batches.get(self.place.batch) {
            let column = batch.column(self.field);
            let rows = slice_rows(batch.num_rows(), self.place.row, column.get_buffer_memory_size());
            let slice = column.slice(self.place.row, rows);
            for ((writer, _), leaf) in self.current.iter_mut().zip(compute_leaves(&field, &slice)?) {
                writer.write(&leaf)?;
            }
            self.place.row += rows;
            if self.place.row >= batch.num_rows() {
                self.place = Place { batch: self.place.batch + 1, row: 0 };
            }
            if let Some((_, queue)) = self.current.first() {
                drain(queue, pieces);
            }
        }
        if self.place.batch >= self.batches.len() {
            for (writer, queue) in self.current.drain(..) {
                let chunk = writer.close()?;
                drain(&queue, pieces);
                pieces.push(Piece::ColumnEnd(column_record(&chunk)));
            }
            self.next_field();
        }
        Ok(())
    }
}

/// Rows from a row on of this batch's column that make about one page.
fn slice_rows(rows: usize, row: usize, column_bytes: usize) -> usize {
    let row_bytes = (column_bytes / rows.max(1)).max(1);
    (rows - row).min((limits::PAGE_BYTES / row_bytes).max(1))
}

fn drain(queue: &PageQueue, pieces: &mut Vec<Piece<'_>>) {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    pieces.extend(queue.drain(..).map(|bytes| Piece::Page(Part::Page(bytes))));
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

fn properties(schema: &SchemaRef, compression: Compression) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_data_page_size_limit(limits::PAGE_BYTES)
        .set_data_page_row_count_limit(usize::MAX)
        .set_write_batch_size(8192);
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
