//! Station 2: an IPC message to a checked batch, trusting nothing it says about itself.
//!
//! Guarantees: every length and offset is checked against the body before arrow-ipc sees it, and the
//! memory a message asks for (uncompressed sizes, copies for alignment, dictionaries' values) is
//! claimed before it is allocated. No copy of the body where alignment allows.

use crate::flight::status::invalid;
use crate::ingest::admit::{Budget, Permit};
use arrow::array::{Array, ArrayRef, AsArray, BufferSpec, RecordBatch, layout};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::ipc;
use bytes::Bytes;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tonic::Status;

/// Decodes the messages of one stream, which share a schema and dictionaries.
pub(crate) struct Decoder {
    schema: SchemaRef,
    dictionaries: HashMap<i64, ArrayRef>,
    /// What the dictionaries hold; several for one that grows by deltas.
    dictionary_permits: HashMap<i64, Vec<Permit>>,
    batch_memory_max: u64,
    budget: Budget,
}

/// A decoded message.
pub(crate) enum Decoded {
    /// Rows, with the permit for what decoding added.
    Batch(RecordBatch, Option<Permit>, Permit),
    /// A dictionary was taken in.
    Dictionary,
}

impl Decoder {
    /// A decoder for a stream of this schema.
    pub(crate) fn new(schema: SchemaRef, batch_memory_max: u64, budget: Budget) -> Self {
        Self { schema, dictionaries: HashMap::new(), dictionary_permits: HashMap::new(), batch_memory_max, budget }
    }

    /// Checks and decodes one message that is not a schema.
    pub(crate) async fn decode(&mut self, header: &Bytes, body: Buffer, permit: Permit) -> Result<Decoded, Status> {
        let message = parse(header)?;
        match message.header_type() {
            ipc::MessageHeader::RecordBatch => {
                let batch = message
                    .header_as_record_batch()
                    .ok_or_else(|| invalid("the message header is not a record batch"))?;
                let mut weight = check_layout(&batch, &body, self.batch_memory_max)?;
                if !aligned(&body) {
                    weight += typed_bytes(&self.schema, &batch);
                }
                let version = message.version();
                let decode_permit = self.claim(weight).await;
                let message = parse(header)?;
                let batch = message
                    .header_as_record_batch()
                    .ok_or_else(|| invalid("the message header is not a record batch"))?;
                let rows = guarded(|| {
                    ipc::reader::read_record_batch(
                        &body,
                        batch,
                        Arc::clone(&self.schema),
                        &self.dictionaries,
                        None,
                        &version,
                    )
                })?;
                let expanded = self.expanded_bytes(&rows)?;
                let decode_permit = match (decode_permit, expanded) {
                    (permit, 0) => permit,
                    (permit, expanded) => {
                        drop(permit);
                        self.claim(weight + expanded).await
                    }
                };
                Ok(Decoded::Batch(rows, decode_permit, permit))
            }
            ipc::MessageHeader::DictionaryBatch => {
                let dictionary = message
                    .header_as_dictionary_batch()
                    .ok_or_else(|| invalid("the message header is not a dictionary"))?;
                let batch = dictionary.data().ok_or_else(|| invalid("the dictionary message has no data"))?;
                let weight = check_layout(&batch, &body, self.batch_memory_max)? + body.len() as u64;
                let (id, version, delta) = (dictionary.id(), message.version(), dictionary.isDelta());
                let held = self.budget.dictionaries.try_claim(weight).ok_or_else(|| {
                    Status::resource_exhausted(format!(
                        "a dictionary of {weight} bytes does not fit the eighth of memory_budget that dictionaries share; \
                         send plain values, smaller dictionaries, or fewer streams with dictionaries"
                    ))
                })?;
                let message = parse(header)?;
                let dictionary = message
                    .header_as_dictionary_batch()
                    .ok_or_else(|| invalid("the message header is not a dictionary"))?;
                let (schema, dictionaries) = (&self.schema, &mut self.dictionaries);
                guarded(|| ipc::reader::read_dictionary(&body, dictionary, schema, dictionaries, &version))?;
                let permits = self.dictionary_permits.entry(id).or_default();
                if !delta {
                    permits.clear();
                }
                permits.push(held);
                drop(permit);
                Ok(Decoded::Dictionary)
            }
            ipc::MessageHeader::Schema => Err(invalid(
                "a second schema message: the schema of a stream is fixed by its first message; open another topic",
            )),
            other => Err(invalid(format!("unexpected IPC message {other:?}; send record batches"))),
        }
    }

    async fn claim(&self, bytes: u64) -> Option<Permit> {
        if bytes == 0 { None } else { Some(self.budget.decode.claim(bytes).await) }
    }

    /// What the dictionaries' values will weigh once they are taken out of their dictionaries.
    fn expanded_bytes(&self, rows: &RecordBatch) -> Result<u64, Status> {
        let mut total = 0;
        for (column, field) in rows.columns().iter().zip(self.schema.fields()) {
            total += expanded_array(column);
            if total > self.batch_memory_max {
                return Err(Status::resource_exhausted(format!(
                    "the values of dictionary field `{}` weigh more than {} bytes (setting batch_memory_max); send fewer rows at once",
                    field.name(),
                    self.batch_memory_max
                )));
            }
        }
        Ok(total)
    }
}

fn expanded_array(array: &ArrayRef) -> u64 {
    if let Some(dictionary) = array.as_any_dictionary_opt() {
        let values = dictionary.values();
        let longest =
            (0..values.len()).map(|index| values.slice(index, 1).to_data().get_slice_memory_size().unwrap_or(0)).max();
        return (array.len() as u64).saturating_mul(longest.unwrap_or(0) as u64);
    }
    match array.data_type() {
        DataType::Struct(_) => array.as_struct().columns().iter().map(expanded_array).sum(),
        DataType::List(_) => expanded_array(array.as_list::<i32>().values()),
        DataType::LargeList(_) => expanded_array(array.as_list::<i64>().values()),
        DataType::FixedSizeList(_, _) => expanded_array(array.as_fixed_size_list().values()),
        DataType::ListView(_) => expanded_array(array.as_list_view::<i32>().values()),
        DataType::LargeListView(_) => expanded_array(array.as_list_view::<i64>().values()),
        DataType::Map(_, _) => array.as_map().entries().columns().iter().map(expanded_array).sum(),
        // Many views may show the same bytes; on disk each has its own.
        DataType::Utf8View => shared_bytes(array.as_string_view().lengths(), array),
        DataType::BinaryView => shared_bytes(array.as_binary_view().lengths(), array),
        _ => 0,
    }
}

fn shared_bytes(lengths: impl Iterator<Item = u32>, array: &ArrayRef) -> u64 {
    lengths.map(u64::from).sum::<u64>().saturating_sub(array.get_buffer_memory_size() as u64)
}

/// Reads the schema of a stream's first message.
pub(crate) fn schema(header: &Bytes) -> Result<SchemaRef, Status> {
    let message = parse(header)?;
    let schema = message
        .header_as_schema()
        .ok_or_else(|| invalid("the first message must carry the schema; start the stream with it"))?;
    guarded(|| ipc::convert::try_fb_to_schema(schema)).map(Arc::new)
}

fn parse(header: &[u8]) -> Result<ipc::Message<'_>, Status> {
    ipc::root_as_message(header).map_err(|error| invalid(format!("the IPC message header does not parse: {error}")))
}

/// arrow-ipc checks most of what it reads and panics on some of the rest: neither may end the server.
fn guarded<T>(decode: impl FnOnce() -> Result<T, arrow::error::ArrowError>) -> Result<T, Status> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(invalid(format!("the IPC message does not decode: {error}"))),
        Err(_) => Err(invalid("the IPC message does not decode: its buffers contradict each other")),
    }
}

fn aligned(body: &Buffer) -> bool {
    (body.as_ptr() as usize).is_multiple_of(16)
}

/// Checks nodes and buffers against the body; returns what decompression will allocate, in bytes.
fn check_layout(batch: &ipc::RecordBatch<'_>, body: &[u8], batch_memory_max: u64) -> Result<u64, Status> {
    if batch.length() < 0 {
        return Err(invalid(format!("the record batch claims {} rows", batch.length())));
    }
    for node in batch.nodes().into_iter().flatten() {
        if node.length() < 0 || node.null_count() < 0 || node.null_count() > node.length() {
            return Err(invalid(format!("a column claims {} values and {} nulls", node.length(), node.null_count())));
        }
    }
    if batch.variadicBufferCounts().into_iter().flatten().any(|count| !(0..=i64::from(i32::MAX)).contains(&count)) {
        return Err(invalid("a view column claims an impossible number of buffers"));
    }
    let compressed = batch.compression().is_some();
    let mut total = 0_u64;
    for buffer in batch.buffers().into_iter().flatten() {
        let range = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        let bytes = range.and_then(|(offset, length)| body.get(offset..offset.checked_add(length)?));
        let Some(bytes) = bytes else {
            return Err(invalid(format!(
                "a buffer claims bytes {} to {}+{} of a body of {}",
                buffer.offset(),
                buffer.offset(),
                buffer.length(),
                body.len()
            )));
        };
        if compressed && let Some(claimed) = bytes.first_chunk::<8>() {
            let claimed = match i64::from_le_bytes(*claimed) {
                -1 => bytes.len() as u64 - 8,
                claimed => u64::try_from(claimed)
                    .map_err(|_| invalid(format!("a buffer claims {claimed} uncompressed bytes")))?,
            };
            total = total.saturating_add(claimed);
        }
    }
    if total > batch_memory_max {
        return Err(Status::resource_exhausted(format!(
            "the batch claims {total} uncompressed bytes, over the limit of {batch_memory_max} (setting batch_memory_max); send smaller batches"
        )));
    }
    // A value takes at least a bit, except where its type has no bytes at all.
    let values_max = (8 * total.max(body.len() as u64)).max(VALUES_WITHOUT_BYTES_MAX);
    for node in batch.nodes().into_iter().flatten() {
        if node.length().unsigned_abs() > values_max {
            return Err(invalid(format!("a column claims {} values in a body of {} bytes", node.length(), body.len())));
        }
    }
    Ok(total)
}

/// Values that a column may claim without bytes behind them (nulls, empty structs).
const VALUES_WITHOUT_BYTES_MAX: u64 = 1 << 20;

/// Bytes of the buffers whose elements need an alignment: arrow-ipc copies them out of a body that
/// lies badly. Bytes of texts and blobs need none.
fn typed_bytes(schema: &Schema, batch: &ipc::RecordBatch<'_>) -> u64 {
    let mut lengths = batch.buffers().into_iter().flatten().map(|buffer| u64::try_from(buffer.length()).unwrap_or(0));
    let mut variadic = batch.variadicBufferCounts().into_iter().flatten();
    schema.fields().iter().map(|field| typed_in_field(field.data_type(), &mut lengths, &mut variadic)).sum()
}

fn typed_in_field(
    data_type: &DataType,
    lengths: &mut impl Iterator<Item = u64>,
    variadic: &mut impl Iterator<Item = i64>,
) -> u64 {
    if data_type == &DataType::Null {
        return 0;
    }
    lengths.next(); // Validity: bits.
    let layout = layout(data_type);
    let mut typed = 0;
    for spec in &layout.buffers {
        let length = lengths.next().unwrap_or(0);
        if let BufferSpec::FixedWidth { alignment, .. } = spec
            && *alignment > 1
        {
            typed += length;
        }
    }
    if layout.variadic {
        for _ in 0..variadic.next().unwrap_or(0) {
            lengths.next();
        }
    }
    let mut children = |child: &DataType| typed_in_field(child, lengths, variadic);
    typed
        + match data_type {
            DataType::Struct(fields) => fields.iter().map(|field| children(field.data_type())).sum(),
            DataType::List(child)
            | DataType::LargeList(child)
            | DataType::ListView(child)
            | DataType::LargeListView(child)
            | DataType::FixedSizeList(child, _)
            | DataType::Map(child, _) => children(child.data_type()),
            _ => 0,
        }
}
