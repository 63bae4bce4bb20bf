//! Station 2: an IPC message to a checked batch, trusting nothing it says about itself.
//!
//! Guarantees: every length and offset is checked against the body before arrow-ipc sees it, and the
//! memory a message asks for (uncompressed sizes, copies for alignment, dictionaries' values) is
//! claimed before it is allocated. No copy of the body where alignment allows. Plain columns are put together by
//! [`columns`], all others by arrow-ipc.

use crate::flight::absent::Absent;
use crate::flight::columns;
use crate::flight::status::invalid;
use crate::ingest::admit::{Budget, Permit};
use crate::limits;
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
    /// The widest that one of its types wants.
    alignment: usize,
    /// Whether [`columns`] reads all of its types: no dictionaries and no views.
    is_plain: bool,
    absent: Absent,
    /// Bodies of so many bytes share their columns without values. Smaller ones are joined with others and weighed for
    /// that: what shares zeros weighs more than it is.
    shares_from: usize,
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
        let alignment = schema.fields().iter().map(|field| alignment_of(field.data_type())).max().unwrap_or(1);
        Self {
            is_plain: columns::knows(&schema),
            schema,
            alignment,
            absent: Absent::default(),
            shares_from: limits::COALESCE_PIECE_BYTES,
            dictionaries: HashMap::new(),
            dictionary_permits: HashMap::new(),
            batch_memory_max,
            budget,
        }
    }

    /// The same by arrow-ipc alone: what the short way is compared with.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn by_arrow(self) -> Self {
        Self { is_plain: false, ..self }
    }

    /// Shares columns without values in small bodies as well: what tests and fuzzing send.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn sharing_all(self) -> Self {
        Self { shares_from: 0, ..self }
    }

    /// Checks and decodes one message that is not a schema. The body had `sent` bytes, of
    /// which a part may have been left out ([`super::hollow`]).
    pub(crate) async fn decode(
        &mut self,
        header: &Bytes,
        body: Buffer,
        sent: usize,
        permit: Permit,
    ) -> Result<Decoded, Status> {
        let message = parse(header)?;
        match message.header_type() {
            ipc::MessageHeader::RecordBatch => {
                let batch = message
                    .header_as_record_batch()
                    .ok_or_else(|| invalid("the message header is not a record batch"))?;
                let mut weight = check_layout(&batch, &body, sent, self.batch_memory_max)?;
                // Most clients send all buffers so that each would fit any of the types: no need to find out what they are.
                let is_compressed = batch.compression().is_some();
                let is_aligned = is_compressed || all_aligned(self.alignment, &batch, &body);
                if self.is_plain && is_aligned && !is_compressed {
                    let absent = (self.shares_from <= body.len()).then_some(&mut self.absent);
                    let rows = guarded(|| columns::read(&self.schema, &batch, &body, absent))?;
                    return Ok(Decoded::Batch(rows, None, permit));
                }
                if !is_aligned {
                    weight += badly_aligned_bytes(&self.schema, &batch, &body);
                }
                let version = message.version();
                let decode_permit = self.claim(weight).await;
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
                let weight = check_layout(&batch, &body, sent, self.batch_memory_max)? + body.len() as u64;
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

/// Checks nodes and buffers against the body; returns what decompression will allocate, in bytes.
fn check_layout(batch: &ipc::RecordBatch<'_>, body: &[u8], sent: usize, batch_memory_max: u64) -> Result<u64, Status> {
    if batch.length() < 0 {
        return Err(invalid(format!("the record batch claims {} rows", batch.length())));
    }
    for node in batch.nodes().into_iter().flatten() {
        if node.length() < 0 || node.null_count() < 0 || node.null_count() > node.length() {
            return Err(invalid(format!("a column claims {} values and {} nulls", node.length(), node.null_count())));
        }
    }
    // Together no more than there are: they are walked.
    let mut buffers_left = batch.buffers().map_or(0, |buffers| buffers.len() as u64);
    for count in batch.variadicBufferCounts().into_iter().flatten() {
        let left = u64::try_from(count).ok().and_then(|count| buffers_left.checked_sub(count));
        buffers_left = left.ok_or_else(|| {
            invalid(format!("the view columns claim {count} buffers where {buffers_left} of the batch are left"))
        })?;
    }
    let compressed = batch.compression().is_some();
    let (mut total, mut stored) = (0_u64, 0_u64);
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
        stored += bytes.len() as u64;
        if compressed && let Some(claimed) = bytes.first_chunk::<8>() {
            let claimed = match i64::from_le_bytes(*claimed) {
                -1 => bytes.len() as u64 - 8,
                claimed => u64::try_from(claimed)
                    .map_err(|_| invalid(format!("a buffer claims {claimed} uncompressed bytes")))?,
            };
            total = total.saturating_add(claimed);
        }
    }
    // What several columns show at once would weigh once here, and once for each of them in every copy and on disk.
    if stored > sent as u64 {
        return Err(invalid(format!(
            "the buffers of the batch overlap: they claim {stored} bytes of a body of {sent}"
        )));
    }
    if total > batch_memory_max {
        return Err(Status::resource_exhausted(format!(
            "the batch claims {total} uncompressed bytes, over the limit of {batch_memory_max} (setting batch_memory_max); send smaller batches"
        )));
    }
    // A value takes at least a bit, except where its type has no bytes at all.
    let values_max = (8 * total.max(sent as u64)).max(VALUES_WITHOUT_BYTES_MAX);
    for node in batch.nodes().into_iter().flatten() {
        if node.length().unsigned_abs() > values_max {
            return Err(invalid(format!("a column claims {} values in a body of {} bytes", node.length(), body.len())));
        }
    }
    Ok(total)
}

/// Values that a column may claim without bytes behind them (nulls, empty structs).
const VALUES_WITHOUT_BYTES_MAX: u64 = 1 << 20;

/// What the values of a type, or of a type in it, want to be aligned to, in bytes.
fn alignment_of(data_type: &DataType) -> usize {
    let own = layout(data_type).buffers.into_iter().map(|spec| match spec {
        BufferSpec::FixedWidth { alignment, .. } => alignment,
        _ => 1,
    });
    let children = match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| alignment_of(field.data_type())).max(),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => Some(alignment_of(child.data_type())),
        _ => None,
    };
    own.chain(children).max().unwrap_or(1)
}

/// Whether all buffers begin at a multiple of `alignment`.
fn all_aligned(alignment: usize, batch: &ipc::RecordBatch<'_>, body: &[u8]) -> bool {
    let start = body.as_ptr() as usize;
    let mut offsets = batch.buffers().into_iter().flatten().map(|buffer| usize::try_from(buffer.offset()).unwrap_or(0));
    offsets.all(|offset| start.wrapping_add(offset).is_multiple_of(alignment))
}

/// Bytes of the buffers that lie badly for their type: arrow-ipc copies them. At most the body's own, whose buffers
/// do not overlap.
fn badly_aligned_bytes(schema: &Schema, batch: &ipc::RecordBatch<'_>, body: &[u8]) -> u64 {
    let start = body.as_ptr() as usize;
    let mut places = batch.buffers().into_iter().flatten().map(|buffer| {
        let (offset, length) = (usize::try_from(buffer.offset()), u64::try_from(buffer.length()));
        (start.wrapping_add(offset.unwrap_or(0)), length.unwrap_or(0))
    });
    let mut variadic = batch.variadicBufferCounts().into_iter().flatten();
    schema.fields().iter().map(|field| badly_aligned_in(field.data_type(), &mut places, &mut variadic)).sum()
}

fn badly_aligned_in(
    data_type: &DataType,
    places: &mut impl Iterator<Item = (usize, u64)>,
    variadic: &mut impl Iterator<Item = i64>,
) -> u64 {
    if data_type == &DataType::Null {
        return 0;
    }
    places.next(); // Validity: bits.
    let layout = layout(data_type);
    let mut bad = 0;
    for spec in &layout.buffers {
        let (address, length) = places.next().unwrap_or((0, 0));
        if let BufferSpec::FixedWidth { alignment, .. } = spec
            && !address.is_multiple_of(*alignment)
        {
            bad += length;
        }
    }
    if layout.variadic {
        for _ in 0..variadic.next().unwrap_or(0) {
            places.next();
        }
    }
    let mut children = |child: &DataType| badly_aligned_in(child, places, variadic);
    bad + match data_type {
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

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Decimal128Array, Int64Array, StringViewBuilder};
    use arrow::datatypes::Field;
    use arrow::ipc::MetadataVersion;
    use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};

    /// Header and body of a batch, its buffers padded to 8 bytes as some writers do.
    fn message(rows: &RecordBatch) -> (Vec<u8>, Vec<u8>) {
        let options = IpcWriteOptions::try_new(8, false, MetadataVersion::V5).expect("options");
        let mut tracker = DictionaryTracker::new(false);
        let mut context = IpcWriteContext::default();
        let (_, encoded) =
            IpcDataGenerator::default().encode(rows, &mut tracker, &options, &mut context).expect("encodes");
        (encoded.ipc_message, encoded.arrow_data)
    }

    fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
        let fields: Vec<Field> =
            columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), false)).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, array)| array).collect())
            .expect("a batch")
    }

    async fn decode(schema: SchemaRef, header: Vec<u8>, body: Vec<u8>) -> Result<Decoded, Status> {
        let budget = Budget::new(64 << 20);
        let sent = body.len();
        let permit = budget.receive.claim(sent as u64).await;
        Decoder::new(schema, 64 << 20, budget).decode(&Bytes::from(header), Buffer::from_vec(body), sent, permit).await
    }

    #[tokio::test]
    async fn inv_7_a_copy_for_alignment_is_claimed() {
        let decimals = Decimal128Array::from(vec![7; 1001]);
        let rows = batch(vec![("a", Arc::new(Int64Array::from(vec![1; 1001]))), ("b", Arc::new(decimals))]);
        let (header, body) = message(&rows);
        // 1,001 integers of 8 bytes leave the decimals of 16 on an odd multiple of 8.
        let decoded = decode(rows.schema(), header, body).await.expect("decodes");
        let Decoded::Batch(back, Some(permit), _) = decoded else { panic!("no permit for the copy") };
        assert_eq!(back, rows);
        assert_eq!(permit.bytes(), 16 * 1001);
    }

    #[tokio::test]
    async fn inv_7_what_lies_well_costs_nothing() {
        let rows = batch(vec![("a", Arc::new(Int64Array::from(vec![1; 1001])))]);
        let (header, body) = message(&rows);
        assert!(matches!(decode(rows.schema(), header, body).await, Ok(Decoded::Batch(_, None, _))));
    }

    #[tokio::test]
    async fn inv_7_buffers_that_overlap_are_refused() {
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1; 16]));
        let rows = batch(vec![("a", Arc::clone(&numbers)), ("b", numbers)]);
        let (mut header, body) = message(&rows);
        assert_eq!(body.len(), 256);
        // Both columns claim the whole body instead of 128 bytes each.
        for offset in [0_i64, 128] {
            let honest = [offset.to_le_bytes(), 128_i64.to_le_bytes()].concat();
            let at = header.windows(16).position(|window| window == honest).expect("the buffer");
            header[at..at + 16].copy_from_slice(&[0_i64.to_le_bytes(), 256_i64.to_le_bytes()].concat());
        }
        let refused = decode(rows.schema(), header, body).await.err().expect("refused");
        assert!(refused.message().contains("overlap: they claim 512 bytes of a body of 256"), "{refused}");
    }

    #[tokio::test]
    async fn inv_9_more_view_buffers_than_there_are_are_refused_before_they_are_walked() {
        let mut builder = StringViewBuilder::new().with_fixed_block_size(32);
        (0..14).for_each(|_| builder.append_value("sixteen letters!"));
        let rows = batch(vec![("a", Arc::new(builder.finish()))]);
        let (mut header, body) = message(&rows);
        let honest = 7_i64.to_le_bytes();
        let at = header.windows(8).position(|window| window == honest).expect("the count");
        header[at..at + 8].copy_from_slice(&i64::from(i32::MAX).to_le_bytes());
        let refused = decode(rows.schema(), header, body).await.err().expect("refused");
        assert!(refused.message().contains("view columns claim 2147483647 buffers"), "{refused}");
    }
}
