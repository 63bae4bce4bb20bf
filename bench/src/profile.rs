//! What is sent: one batch of each profile, made once and sent again and again.

use arrow::array::{
    Array, ArrayRef, BinaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray, StructArray,
    UInt32Array, UInt64Array, new_null_array,
};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use std::error::Error;
use std::sync::Arc;

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Blobs of 8 MiB, like frames of 4K video.
    Image,
    /// The public IMU ontology, 20,000 rows a batch.
    Imu,
}

const BLOB_BYTES: usize = 8 << 20;
const IMU_ROWS: usize = 20_000;

impl Profile {
    /// How its topics are created.
    pub(crate) fn format_and_tag(self) -> (&'static str, &'static str) {
        match self {
            Self::Image => ("image", "frames"),
            Self::Imu => ("default", "IMU"),
        }
    }

    /// One batch.
    pub(crate) fn batch(self) -> Result<RecordBatch, Box<dyn Error>> {
        match self {
            Self::Image => image(),
            Self::Imu => imu(),
        }
    }

    /// What a batch weighs as it will be encoded, in bytes.
    pub(crate) fn data_bytes(self, batch: &RecordBatch) -> u64 {
        match self {
            Self::Image => BLOB_BYTES as u64,
            Self::Imu => storage::chunk::data_bytes(batch),
        }
    }
}

fn image() -> Result<RecordBatch, Box<dyn Error>> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("data", DataType::Binary, false),
    ]));
    let blob: Vec<u8> = (0..BLOB_BYTES).map(|index| (index * 31 % 251) as u8).collect();
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(vec![1])), Arc::new(BinaryArray::from_iter_values([blob]))];
    Ok(RecordBatch::try_new(schema, columns)?)
}

/// Rows as the Python client sends them: headers on top, nulls inside of the vectors.
fn imu() -> Result<RecordBatch, Box<dyn Error>> {
    let all = storage::ontology::builtin()?;
    let ontology = all.into_iter().find(|ontology| ontology.record.tag == "IMU").ok_or("no IMU ontology")?;
    let columns = ontology.wire.fields().iter().map(|field| column(field, field.name())).collect();
    Ok(RecordBatch::try_new(ontology.wire, columns)?)
}

fn column(field: &Field, path: &str) -> ArrayRef {
    let noise = |at: usize| ((at as u64 * 6_364_136_223_846_793_005 + path.len() as u64 * 97) >> 33) as f64 / 2e9;
    let rows = 0..IMU_ROWS;
    let is_top = !path.contains('.');
    match field.data_type() {
        DataType::Int64 => Arc::new(rows.map(|row| row as i64 * 5_000_000).collect::<Int64Array>()),
        DataType::Int32 => Arc::new(rows.map(|row| (row / 200) as i32).collect::<Int32Array>()),
        DataType::UInt32 => Arc::new(rows.map(|row| (row % 200 * 5_000_000) as u32).collect::<UInt32Array>()),
        DataType::UInt64 => Arc::new(rows.map(|row| row as u64).collect::<UInt64Array>()),
        DataType::Utf8 => Arc::new(StringArray::from(vec!["imu_link"; IMU_ROWS])),
        DataType::Float64 => Arc::new(rows.map(noise).collect::<Float64Array>()),
        // The vectors' own headers are not set.
        DataType::Struct(_) if field.name() == "header" && !is_top => new_null_array(field.data_type(), IMU_ROWS),
        DataType::Struct(fields) => Arc::new(structs(fields, path)),
        other => new_null_array(other, IMU_ROWS),
    }
}

fn structs(fields: &Fields, path: &str) -> StructArray {
    let columns: Vec<ArrayRef> =
        fields.iter().map(|field| column(field, &format!("{path}.{}", field.name()))).collect();
    debug_assert!(columns.iter().all(|column| column.len() == IMU_ROWS));
    StructArray::new(fields.clone(), columns, None)
}
