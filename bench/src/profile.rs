//! What is sent: messages of each profile, encoded once and sent again and again with new times.

use arrow::array::{
    Array, ArrayRef, BinaryArray, FixedSizeBinaryArray, Float32Array, Float64Array, Int32Array, Int64Array, ListArray,
    RecordBatch, StringArray, StructArray, UInt32Array, UInt64Array, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::{FlightData, FlightDescriptor};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{TryStreamExt, stream};
use prost::Message;
use serde_json::json;
use std::error::Error;
use std::sync::Arc;

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Blobs of 8 MiB, like frames of 4K video.
    Image,
    /// Compressed 4K60 video: 50 to 400 KB a message.
    H264,
    /// Point clouds: four `list<float32>` of 130,000 points.
    Lidar,
    /// The public IMU ontology, so many rows a batch.
    Imu(usize),
    /// One CAN frame a batch.
    Can,
    /// One position a batch.
    Gps,
}

const BLOB_BYTES: usize = 8 << 20;
/// Messages of compressed video that differ in size.
const H264_SIZES: usize = 32;
const LIDAR_POINTS: usize = 130_000;
/// Between the rows of one batch.
const ROW_NS: i64 = 1000;
/// FlightData's field for the body, as a key with wire type 2 (Flight.proto: `data_body = 1000`).
const BODY_KEY: u64 = 1000 << 3 | 2;

/// An encoded batch whose times can be changed without touching the rest.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    /// gRPC header, IPC header and body up to the times.
    before: Bytes,
    rows: usize,
    /// The body behind the times.
    rest: Bytes,
    /// FlightData header and body.
    pub(crate) wire_bytes: u64,
    /// As it will be encoded.
    pub(crate) data_bytes: u64,
}

impl Prepared {
    fn new(batch: &RecordBatch, message: &FlightData) -> Result<Self, Box<dyn Error>> {
        if batch.schema().field(0).name() != "timestamp_ns" {
            return Err("a profile's first column is the time".into());
        }
        let ipc = arrow::ipc::root_as_message(&message.data_header).map_err(|error| error.to_string())?;
        let buffers = ipc.header_as_record_batch().and_then(|batch| batch.buffers()).ok_or("no record batch")?;
        // The first column is the time: its validity, then its values.
        let times = usize::try_from(buffers.get(1).offset())?;
        let rows = batch.num_rows();
        let body = &message.data_body;
        let mut head = BytesMut::new();
        let bodyless = FlightData { data_body: Bytes::new(), ..message.clone() };
        bodyless.encode(&mut head)?;
        prost::encoding::encode_varint(BODY_KEY, &mut head);
        prost::encoding::encode_varint(body.len() as u64, &mut head);
        let mut before = BytesMut::new();
        before.put_u8(0);
        before.put_u32(u32::try_from(head.len() + body.len())?);
        before.put(head);
        before.put(body.slice(..times));
        Ok(Self {
            before: before.freeze(),
            rows,
            rest: body.slice(times + 8 * rows..),
            wire_bytes: (message.data_header.len() + body.len()) as u64,
            data_bytes: storage::chunk::data_bytes(batch),
        })
    }

    /// The message with rows from a time on, in two parts.
    pub(crate) fn at(&self, first_time: i64) -> (Bytes, Bytes) {
        let mut head = BytesMut::with_capacity(self.before.len() + 8 * self.rows);
        head.put_slice(&self.before);
        for row in 0..self.rows as i64 {
            head.put_i64_le(first_time + row * ROW_NS);
        }
        (head.freeze(), self.rest.clone())
    }

    /// Time from the first row of a message to that of the next.
    pub(crate) fn span_ns(&self) -> i64 {
        self.rows as i64 * ROW_NS
    }
}

impl Profile {
    /// The name in results.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Image => "image".to_owned(),
            Self::H264 => "h264".to_owned(),
            Self::Lidar => "lidar".to_owned(),
            Self::Imu(rows) => format!("imu-{rows}"),
            Self::Can => "can".to_owned(),
            Self::Gps => "gps".to_owned(),
        }
    }

    /// How its topics are created.
    pub(crate) fn format_and_tag(self) -> (&'static str, &'static str) {
        match self {
            Self::Image => ("image", "frames"),
            Self::H264 => ("image", "video"),
            Self::Lidar => ("ragged", "points"),
            Self::Imu(_) => ("default", "IMU"),
            Self::Can => ("default", "can_frame"),
            Self::Gps => ("default", "position"),
        }
    }

    /// Batches, to be sent in turn.
    pub(crate) fn batches(self) -> Result<Vec<RecordBatch>, Box<dyn Error>> {
        match self {
            Self::Image => Ok(vec![blob(BLOB_BYTES, 0)?]),
            // 50 to 400 KB, in an order that looks random: one large frame among smaller ones.
            Self::H264 => (0..H264_SIZES).map(|at| blob(50_000 + at * 37 % H264_SIZES * 11_290, at)).collect(),
            Self::Lidar => Ok(vec![lidar()?]),
            Self::Imu(rows) => Ok(vec![imu(rows)?]),
            Self::Can => Ok(vec![can()?]),
            Self::Gps => Ok(vec![gps()?]),
        }
    }

    /// The first message of a topic's upload, and its batches as messages.
    pub(crate) async fn flight_data(
        self,
        topic: &str,
        key: &str,
    ) -> Result<(FlightData, Vec<FlightData>), Box<dyn Error>> {
        let batches = self.batches()?;
        let schema = batches.first().ok_or("a profile has batches")?.schema();
        let descriptor = FlightDescriptor::new_cmd(json!({ "topic": { "name": topic, "key": key } }).to_string());
        let encoded = FlightDataEncoderBuilder::new()
            .with_schema(schema)
            .with_flight_descriptor(Some(descriptor))
            .with_max_flight_data_size(usize::MAX)
            .build(stream::iter(batches.into_iter().map(Ok)));
        let mut messages: Vec<FlightData> = encoded.try_collect().await?;
        let first = messages.remove(0);
        Ok((first, messages))
    }

    /// The first message of a topic's upload, and the batches, ready to be sent.
    pub(crate) async fn messages(self, topic: &str, key: &str) -> Result<(FlightData, Vec<Prepared>), Box<dyn Error>> {
        let (first, messages) = self.flight_data(topic, key).await?;
        let prepared = self
            .batches()?
            .iter()
            .zip(&messages)
            .map(|(batch, message)| Prepared::new(batch, message))
            .collect::<Result<_, _>>()?;
        Ok((first, prepared))
    }
}

fn record(columns: Vec<(&str, ArrayRef)>) -> Result<RecordBatch, Box<dyn Error>> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), false)).collect();
    let columns = columns.into_iter().map(|(_, column)| column).collect();
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

/// Times that [`Prepared::at`] replaces.
fn times(rows: usize) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values((0..rows as i64).map(|row| row * ROW_NS)))
}

/// Bytes that no storage below takes for compressible.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1), |state| {
        // Marsaglia, "Xorshift RNGs", 2003.
        let mut state = *state;
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state)
    })
}

fn blob(bytes: usize, seed: usize) -> Result<RecordBatch, Box<dyn Error>> {
    let blob: Vec<u8> = noise(seed as u64 + 1).flat_map(u64::to_le_bytes).take(bytes).collect();
    record(vec![("timestamp_ns", times(1)), ("data", Arc::new(BinaryArray::from_iter_values([blob])))])
}

fn lidar() -> Result<RecordBatch, Box<dyn Error>> {
    let item = Arc::new(Field::new("item", DataType::Float32, false));
    let list = |seed: u64| -> ArrayRef {
        let values: Float32Array =
            noise(seed).take(LIDAR_POINTS).map(|bits| (bits >> 40) as f32 / 1e5).collect::<Vec<_>>().into();
        Arc::new(ListArray::new(Arc::clone(&item), OffsetBuffer::from_lengths([LIDAR_POINTS]), Arc::new(values), None))
    };
    record(vec![("timestamp_ns", times(1)), ("x", list(1)), ("y", list(2)), ("z", list(3)), ("intensity", list(4))])
}

fn can() -> Result<RecordBatch, Box<dyn Error>> {
    let payload = FixedSizeBinaryArray::try_from_iter([[1_u8, 2, 3, 4, 5, 6, 7, 8]].into_iter())?;
    record(vec![
        ("timestamp_ns", times(1)),
        ("id", Arc::new(UInt32Array::from(vec![0x1A3]))),
        ("data", Arc::new(payload)),
    ])
}

fn gps() -> Result<RecordBatch, Box<dyn Error>> {
    let value = |value: f64| -> ArrayRef { Arc::new(Float64Array::from(vec![value])) };
    record(vec![
        ("timestamp_ns", times(1)),
        ("latitude", value(48.137)),
        ("longitude", value(11.575)),
        ("altitude", value(519.0)),
    ])
}

/// Rows as the Python client sends them: headers on top, nulls inside of the vectors.
fn imu(rows: usize) -> Result<RecordBatch, Box<dyn Error>> {
    let all = storage::ontology::builtin()?;
    let ontology = all.into_iter().find(|ontology| ontology.record.tag == "IMU").ok_or("no IMU ontology")?;
    let columns = ontology.wire.fields().iter().map(|field| column(field, field.name(), rows)).collect();
    Ok(RecordBatch::try_new(ontology.wire, columns)?)
}

fn column(field: &Field, path: &str, rows: usize) -> ArrayRef {
    let value = |at: usize| ((at as u64 * 6_364_136_223_846_793_005 + path.len() as u64 * 97) >> 33) as f64 / 2e9;
    let is_top = !path.contains('.');
    match field.data_type() {
        DataType::Int64 if path == "timestamp_ns" => times(rows),
        DataType::Int64 => Arc::new((0..rows).map(|row| row as i64 * 5_000_000).collect::<Int64Array>()),
        DataType::Int32 => Arc::new((0..rows).map(|row| (row / 200) as i32).collect::<Int32Array>()),
        DataType::UInt32 => Arc::new((0..rows).map(|row| (row % 200 * 5_000_000) as u32).collect::<UInt32Array>()),
        DataType::UInt64 => Arc::new((0..rows).map(|row| row as u64).collect::<UInt64Array>()),
        DataType::Utf8 => Arc::new(StringArray::from(vec!["imu_link"; rows])),
        DataType::Float64 => Arc::new((0..rows).map(value).collect::<Float64Array>()),
        // The vectors' own headers are not set.
        DataType::Struct(_) if field.name() == "header" && !is_top => new_null_array(field.data_type(), rows),
        DataType::Struct(fields) => Arc::new(structs(fields, path, rows)),
        other => new_null_array(other, rows),
    }
}

fn structs(fields: &Fields, path: &str, rows: usize) -> StructArray {
    let columns: Vec<ArrayRef> =
        fields.iter().map(|field| column(field, &format!("{path}.{}", field.name()), rows)).collect();
    StructArray::new(fields.clone(), columns, None)
}
