//! Station 2, the short way: the columns of a message, put together straight from its body.
//!
//! Guarantees: what comes out is what arrow-ipc makes of the same message, and what it refuses is refused (tests and
//! fuzzing compare the two); nothing is copied; no length is trusted. Columns without a value are shared between the
//! messages of a stream ([`super::absent`]). arrow-ipc describes every column by a general
//! form first and checks that; for the batches of one row that slow topics send, that was half of their decoding.
//! Does not know: compressed, misaligned or dictionary messages, views and unions, which are left to arrow-ipc.
//!
//! Format: Arrow's IPC, depth first a node for each column and the buffers of its type; of each, as much as its length
//! says is used.

use crate::flight::absent::{Absent, are_zeros};
use arrow::array::{
    Array, ArrayData, ArrayRef, ArrowPrimitiveType, BooleanArray, FixedSizeBinaryArray, PrimitiveArray, RecordBatch,
    RecordBatchOptions, StructArray, downcast_primitive, make_array,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc;
use std::sync::Arc;

/// Whether all columns are of types that are read here.
pub(crate) fn knows(schema: &Schema) -> bool {
    schema.fields().iter().all(|field| knows_type(field.data_type()))
}

fn knows_type(data_type: &DataType) -> bool {
    match data_type {
        DataType::Boolean | DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => true,
        DataType::FixedSizeBinary(width) => *width > 0,
        DataType::Struct(fields) => !fields.is_empty() && fields.iter().all(|field| knows_type(field.data_type())),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => knows_type(child.data_type()),
        other => other.is_primitive(),
    }
}

/// Reads a message that is not compressed, of a schema that [`knows`] accepts. All of its buffers lie inside of the body,
/// as aligned as the types want; no node has a negative length or more nulls than values.
///
/// # Errors
/// When the message does not fit the schema, or its buffers do not fit its nodes.
pub(super) fn read(
    schema: &SchemaRef,
    batch: &ipc::RecordBatch<'_>,
    body: &Buffer,
    absent: Option<&mut Absent>,
) -> Result<RecordBatch, ArrowError> {
    let (nodes, buffers) = (batch.nodes().into_iter().flatten(), batch.buffers().into_iter().flatten());
    let mut parts = Parts { nodes, buffers, at: 0, body, absent };
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        columns.push(parts.column(field.data_type(), true)?);
    }
    // Only views have such counts.
    if batch.variadicBufferCounts().is_some_and(|counts| !counts.is_empty()) {
        return Err(broken("more variadic buffer counts than the schema uses"));
    }
    let rows = usize::try_from(batch.length()).map_err(|_| broken("a negative number of rows"))?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
}

fn broken(text: impl Into<String>) -> ArrowError {
    ArrowError::InvalidArgumentError(text.into())
}

/// What is still to be read of a message.
struct Parts<'a, N, B> {
    nodes: N,
    buffers: B,
    /// Nodes that were read.
    at: usize,
    body: &'a Buffer,
    /// Where columns without a value may be shared.
    absent: Option<&'a mut Absent>,
}

/// Length of a column and how many of its values are null.
#[derive(Clone, Copy)]
struct Node {
    length: usize,
    nulls: usize,
}

impl Node {
    /// Whether it has rows and none of them has a value.
    fn is_absent(self) -> bool {
        0 < self.length && self.length == self.nulls
    }
}

impl<'m, N, B> Parts<'_, N, B>
where
    N: Iterator<Item = &'m ipc::FieldNode> + Clone,
    B: Iterator<Item = &'m ipc::Buffer> + Clone,
{
    fn node(&mut self) -> Result<Node, ArrowError> {
        let node = self.nodes.next().ok_or_else(|| broken("fewer columns than the schema has"))?;
        self.at += 1;
        match (usize::try_from(node.length()), usize::try_from(node.null_count())) {
            (Ok(length), Ok(nulls)) => Ok(Node { length, nulls }),
            _ => Err(broken("a column with a negative length")),
        }
    }

    /// Where the next buffer lies: offset and length.
    fn place(&mut self) -> Result<(usize, usize), ArrowError> {
        let buffer = self.buffers.next().ok_or_else(|| broken("fewer buffers than the schema has"))?;
        let place = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        let is_inside =
            |(offset, length): &(usize, usize)| offset.checked_add(*length).is_some_and(|end| end <= self.body.len());
        place.filter(is_inside).ok_or_else(|| broken("a buffer outside of the body"))
    }

    fn buffer(&mut self) -> Result<Buffer, ArrowError> {
        let (offset, length) = self.place()?;
        Ok(self.body.slice_with_length(offset, length))
    }

    /// As many bytes of the next buffer as so many values take.
    fn values(&mut self, count: usize, width: usize) -> Result<Buffer, ArrowError> {
        let (offset, length) = self.place()?;
        match count.checked_mul(width) {
            Some(bytes) if bytes <= length => Ok(self.body.slice_with_length(offset, bytes)),
            _ => Err(broken(format!("{count} values of {width} bytes in a buffer of {length}"))),
        }
    }

    /// As many bits of the next buffer as there are values.
    fn bits(&mut self, count: usize) -> Result<BooleanBuffer, ArrowError> {
        let (offset, length) = self.place()?;
        if length < count.div_ceil(8) {
            return Err(broken(format!("{count} bits in a buffer of {length} bytes")));
        }
        Ok(BooleanBuffer::new(self.body.slice_with_length(offset, length), 0, count))
    }

    fn validity(&mut self, node: Node) -> Result<Option<NullBuffer>, ArrowError> {
        if node.nulls == 0 {
            self.place()?;
            return Ok(None);
        }
        let nulls = NullBuffer::new(self.bits(node.length)?);
        if nulls.null_count() != node.nulls {
            return Err(broken(format!("a column claims {} nulls and has {}", node.nulls, nulls.null_count())));
        }
        Ok(Some(nulls))
    }

    /// `shares`: it may be shared if it has no value. What lies inside of one that could not be is not asked again.
    fn column(&mut self, data_type: &DataType, shares: bool) -> Result<ArrayRef, ArrowError> {
        let node = self.node()?;
        let nulls = self.validity(node)?;
        let asked = shares && node.is_absent();
        if asked && let Some(array) = self.absent(data_type, node) {
            return Ok(array);
        }
        let shares = shares && !asked;
        macro_rules! primitive {
            ($values:ty) => {
                self.primitive::<$values>(data_type, node, nulls)
            };
        }
        downcast_primitive! {
            data_type => (primitive),
            DataType::Boolean => {
                let bits = self.bits(node.length)?;
                Ok(Arc::new(BooleanArray::new(bits, nulls)))
            }
            DataType::FixedSizeBinary(width) => {
                let values = self.values(node.length, usize::try_from(*width).unwrap_or(usize::MAX))?;
                Ok(Arc::new(FixedSizeBinaryArray::try_new(*width, values, nulls)?))
            }
            DataType::Struct(fields) => {
                let mut children = Vec::with_capacity(fields.len());
                for field in fields {
                    children.push(self.column(field.data_type(), shares)?);
                }
                Ok(Arc::new(StructArray::try_new(fields.clone(), children, nulls)?))
            }
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => {
                let buffers = vec![self.buffer()?, self.buffer()?];
                general(ArrayData::builder(data_type.clone()).buffers(buffers), node, nulls)
            }
            DataType::List(child) | DataType::LargeList(child) | DataType::Map(child, _) => {
                let offsets = self.buffer()?;
                let child = self.column(child.data_type(), shares)?.to_data();
                general(ArrayData::builder(data_type.clone()).add_buffer(offsets).add_child_data(child), node, nulls)
            }
            DataType::FixedSizeList(child, _) => {
                let child = self.column(child.data_type(), shares)?.to_data();
                general(ArrayData::builder(data_type.clone()).add_child_data(child), node, nulls)
            }
            other => Err(broken(format!("columns of type {other} are not read here"))),
        }
    }

    /// The array that stands for a column without a value; `None`: it is to be read as any other.
    fn absent(&mut self, data_type: &DataType, node: Node) -> Option<ArrayRef> {
        let before = (self.nodes.clone(), self.buffers.clone(), self.at);
        let passed = self.absent.is_some() && self.pass(data_type, node);
        let absent = self.absent.as_deref_mut().filter(|_| passed);
        let array = absent.and_then(|absent| absent.column(before.2, data_type, node.length));
        if array.is_none() {
            (self.nodes, self.buffers, self.at) = before;
        }
        array
    }

    /// Passes the values of a column that lies under nulls, and its children; `false`: something is there that must
    /// be read to be refused or not.
    fn pass(&mut self, data_type: &DataType, node: Node) -> bool {
        let rows = node.length;
        let width = |width: i32| usize::try_from(width).ok();
        match data_type {
            DataType::Boolean => self.has(Some(rows.div_ceil(8))),
            DataType::FixedSizeBinary(bytes) => self.has(width(*bytes).and_then(|bytes| rows.checked_mul(bytes))),
            DataType::Utf8 | DataType::Binary => self.has_zeros(rows, 4) && self.place().is_ok(),
            DataType::LargeUtf8 | DataType::LargeBinary => self.has_zeros(rows, 8) && self.place().is_ok(),
            DataType::Struct(fields) => fields.iter().all(|field| self.pass_child(field, rows)),
            DataType::List(child) | DataType::Map(child, _) => self.has_zeros(rows, 4) && self.pass_child(child, 0),
            DataType::LargeList(child) => self.has_zeros(rows, 8) && self.pass_child(child, 0),
            DataType::FixedSizeList(child, size) => width(*size)
                .and_then(|size| rows.checked_mul(size))
                .is_some_and(|length| self.pass_child(child, length)),
            other => self.has(other.primitive_width().and_then(|bytes| rows.checked_mul(bytes))),
        }
    }

    /// The same of a column inside of another, if it has so many values, all null: a batch's hash tells nulls under nulls
    /// from values under nulls.
    fn pass_child(&mut self, field: &Field, length: usize) -> bool {
        let Ok(node) = self.node() else { return false };
        node.length == length
            && node.nulls == length
            && self.validity(node).is_ok()
            && self.pass(field.data_type(), node)
    }

    /// Whether the next buffer has so many bytes.
    fn has(&mut self, bytes: Option<usize>) -> bool {
        self.place().is_ok_and(|(_, length)| bytes.is_some_and(|bytes| bytes <= length))
    }

    /// Whether the next buffer has the offsets of so many values, and all of them are zero; of no values it need not
    /// have any.
    fn has_zeros(&mut self, values: usize, width: usize) -> bool {
        let Ok((offset, length)) = self.place() else { return false };
        let bytes = match values {
            0 if length == 0 => Some(0),
            _ => values.checked_add(1).and_then(|offsets| offsets.checked_mul(width)),
        };
        let bytes = bytes.filter(|bytes| *bytes <= length && length.is_multiple_of(width));
        bytes.is_some_and(|bytes| self.body.get(offset..offset + bytes).is_some_and(are_zeros))
    }

    fn primitive<T: ArrowPrimitiveType>(
        &mut self,
        data_type: &DataType,
        node: Node,
        nulls: Option<NullBuffer>,
    ) -> Result<ArrayRef, ArrowError> {
        let values = self.values(node.length, size_of::<T::Native>())?;
        let array = PrimitiveArray::<T>::try_new(ScalarBuffer::from(values), nulls)?;
        // A time zone or a scale is not in `T`.
        Ok(Arc::new(if &T::DATA_TYPE == data_type { array } else { array.with_data_type(data_type.clone()) }))
    }
}

/// Through the general form, which checks offsets and text.
fn general(
    builder: arrow::array::ArrayDataBuilder,
    node: Node,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef, ArrowError> {
    Ok(make_array(builder.len(node.length).nulls(nulls).build()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::decode::{Decoded, Decoder};
    use crate::ingest::admit::Budget;
    use crate::samples::every_type;
    use arrow::array::{StringArray, new_null_array};
    use arrow::buffer::OffsetBuffer;
    use arrow::ipc::MetadataVersion;
    use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
    use bytes::Bytes;
    use storage::chunk::hash::batch_hash;

    fn message(rows: &RecordBatch) -> (Vec<u8>, Vec<u8>) {
        let options = IpcWriteOptions::try_new(64, false, MetadataVersion::V5).expect("options");
        let (mut tracker, mut context) = (DictionaryTracker::new(false), IpcWriteContext::default());
        let encoded = IpcDataGenerator::default().encode(rows, &mut tracker, &options, &mut context);
        let (_, encoded) = encoded.expect("encodes");
        (encoded.ipc_message, encoded.arrow_data)
    }

    /// What a message holds, the short way or arrow-ipc's; `None`: it was refused.
    fn decode(schema: &SchemaRef, header: &[u8], body: &Buffer, by_arrow: bool) -> Option<RecordBatch> {
        let budget = Budget::new(64 << 20);
        let permit = budget.receive.try_claim(body.len() as u64).expect("free");
        let decoder = Decoder::new(Arc::clone(schema), 64 << 20, budget);
        let mut decoder = if by_arrow { decoder.by_arrow() } else { decoder.sharing_all() };
        let header = Bytes::copy_from_slice(header);
        match futures::executor::block_on(decoder.decode(&header, body.clone(), body.len(), permit)) {
            Ok(Decoded::Batch(rows, ..)) => Some(rows),
            Ok(Decoded::Dictionary) | Err(_) => None,
        }
    }

    #[test]
    fn columns_of_every_type_are_what_arrow_makes_of_them() {
        for rows in [0, 1, 2, 77] {
            let batch = every_type(rows);
            let schema = batch.schema();
            assert!(knows(&schema));
            let (header, body) = message(&batch);
            let body = Buffer::from_vec(body);
            assert_eq!(decode(&schema, &header, &body, false).expect("decodes"), batch);
            assert_eq!(decode(&schema, &header, &body, true).expect("decodes"), batch);
        }
    }

    /// Nulls of every type that may be null.
    fn no_values(rows: usize) -> RecordBatch {
        let batch = every_type(rows);
        let schema = batch.schema();
        let columns = schema.fields().iter().zip(batch.columns()).map(|(field, column)| {
            if field.is_nullable() { new_null_array(field.data_type(), rows) } else { Arc::clone(column) }
        });
        RecordBatch::try_new(Arc::clone(&schema), columns.collect()).expect("a batch")
    }

    #[test]
    fn columns_without_a_value_are_made_once_for_a_stream() {
        let rows = no_values(77);
        let nullable = rows.schema().fields().iter().filter(|field| field.is_nullable()).count();
        assert!(nullable > 10, "{nullable} columns");
        let (header, body) = message(&rows);
        let (header, body) = (Bytes::from(header), Buffer::from_vec(body));
        let budget = Budget::new(64 << 20);
        let mut decoder = Decoder::new(rows.schema(), 64 << 20, budget.clone()).sharing_all();
        let mut read = || {
            let permit = budget.receive.try_claim(body.len() as u64).expect("free");
            match futures::executor::block_on(decoder.decode(&header, body.clone(), body.len(), permit)) {
                Ok(Decoded::Batch(rows, ..)) => rows,
                _ => panic!("not decoded"),
            }
        };
        let (one, other) = (read(), read());
        assert_eq!((&one, &other), (&rows, &rows));
        assert_eq!(batch_hash(&one), batch_hash(&rows));
        let shared = one.columns().iter().zip(other.columns()).filter(|(one, other)| Arc::ptr_eq(one, other)).count();
        assert_eq!(shared, nullable);
    }

    #[test]
    fn text_that_lies_under_nulls_is_still_looked_at() {
        let nulls = Some(NullBuffer::new_null(2));
        let text = StringArray::new(OffsetBuffer::from_lengths([1, 1]), Buffer::from(b"ab"), nulls);
        let rows =
            RecordBatch::try_from_iter_with_nullable([("text", Arc::new(text) as ArrayRef, true)]).expect("rows");
        let (header, mut body) = message(&rows);
        let read = |body: &[u8]| decode(&rows.schema(), &header, &Buffer::from(body), false);
        assert_eq!(read(&body).expect("decodes"), rows);
        let at = body.iter().position(|byte| *byte == b'a').expect("its text");
        body[at] = 0xFF;
        assert!(read(&body).is_none(), "no UTF-8");
    }

    #[test]
    fn inv_9_a_header_that_lies_is_refused_where_arrow_refuses_it() {
        headers_that_lie(&every_type(19));
    }

    #[test]
    fn inv_9_a_header_that_lies_about_columns_without_values_is_refused_where_arrow_refuses_it() {
        headers_that_lie(&no_values(19));
    }

    #[track_caller]
    fn headers_that_lie(batch: &RecordBatch) {
        let schema = batch.schema();
        let (header, body) = message(batch);
        let body = Buffer::from_vec(body);
        // Marsaglia, "Xorshift RNGs", 2003.
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..4000 {
            let mut lying = header.clone();
            // A small number, as lengths and counts are, or any bit.
            let at = random(lying.len());
            lying[at] = if random(2) == 0 { random(32) as u8 } else { lying[at] ^ (1 << random(8)) };
            let (ours, arrows) = (decode(&schema, &lying, &body, false), decode(&schema, &lying, &body, true));
            assert_eq!(ours, arrows, "byte {at} is {}", lying[at]);
            assert_eq!(ours.as_ref().map(batch_hash), arrows.as_ref().map(batch_hash), "byte {at} is {}", lying[at]);
            if ours.is_some() { taken += 1 } else { refused += 1 }
        }
        assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
    }
}
