//! The tail: acknowledged batches that are not yet in a chunk, as values of the catalog.
//!
//! A value holds a run of consecutive batches as one Arrow IPC record batch of the stored schema
//! (which has no dictionaries, so the value needs nothing beside the topic's schema) with the marks
//! that cut it into batches again. Slow topics send rows one by one; a run costs a fraction of
//! their single messages.

use crate::chunk::record::BatchMark;
use crate::error::{Result, StorageError};
use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::datatypes::SchemaRef;
use arrow::ipc::MetadataVersion;
use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Where buffers begin in a value: a run has few rows, and the 64 bytes that Arrow recommends would be mostly padding.
const BUFFER_ALIGNMENT: usize = 8;

/// One run of batches in the tail.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TailRun {
    /// First batch number, inclusive.
    pub first_batch: u64,
    /// First row number, inclusive.
    pub first_row: u64,
    /// The batches in the run.
    pub marks: Vec<BatchMark>,
    /// Weight of the rows before encoding, in bytes.
    pub data_bytes: u64,
    /// Smallest and largest time; `None` without rows.
    pub time: Option<(i64, i64)>,
    /// IPC record batch header (flatbuffer).
    #[serde(with = "serde_bytes")]
    header: Vec<u8>,
    /// IPC record batch body.
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
}

impl TailRun {
    /// Packs the rows of a run; `batch` has the stored schema and as many rows as the marks say.
    ///
    /// # Errors
    /// When Arrow cannot encode the batch.
    pub fn pack(
        batch: &RecordBatch,
        first_batch: u64,
        first_row: u64,
        marks: Vec<BatchMark>,
        data_bytes: u64,
        time: Option<(i64, i64)>,
    ) -> Result<Self> {
        let mut dictionaries = DictionaryTracker::new(false);
        let (_, encoded) = IpcDataGenerator::default().encode(
            batch,
            &mut dictionaries,
            &IpcWriteOptions::try_new(BUFFER_ALIGNMENT, false, MetadataVersion::V5)?,
            &mut IpcWriteContext::default(),
        )?;
        Ok(Self {
            first_batch,
            first_row,
            marks,
            data_bytes,
            time,
            header: encoded.ipc_message,
            body: encoded.arrow_data,
        })
    }

    /// What its rows take in a value, in bytes.
    pub fn encoded_bytes(&self) -> u64 {
        (self.header.len() + self.body.len()) as u64
    }

    /// Last batch number, exclusive.
    pub fn end_batch(&self) -> u64 {
        self.first_batch + self.marks.len() as u64
    }

    /// Last row number, exclusive.
    pub fn end_row(&self) -> u64 {
        self.first_row + self.marks.iter().map(|mark| u64::from(mark.rows)).sum::<u64>()
    }

    /// The rows again.
    ///
    /// # Errors
    /// When the value is damaged or belongs to another schema.
    pub fn unpack(&self, schema: &SchemaRef) -> Result<RecordBatch> {
        let broken = |text: String| StorageError::Decode { what: "tail run", text };
        let message = arrow::ipc::root_as_message(&self.header).map_err(|error| broken(error.to_string()))?;
        let header =
            message.header_as_record_batch().ok_or_else(|| broken("its header is not a record batch".to_owned()))?;
        let body = Buffer::from(self.body.as_slice());
        let version = message.version();
        // arrow-ipc asserts what a damaged value breaks: offsets, counts, lengths.
        let read = std::panic::AssertUnwindSafe(|| {
            let schema = SchemaRef::clone(schema);
            arrow::ipc::reader::read_record_batch(&body, header, schema, &HashMap::new(), None, &version)
        });
        let batch =
            std::panic::catch_unwind(read).map_err(|_| broken("its buffers do not fit its rows".to_owned()))??;
        let rows: u64 = self.marks.iter().map(|mark| u64::from(mark.rows)).sum();
        if batch.num_rows() as u64 != rows {
            return Err(broken(format!("{} rows, where its batches have {rows}", batch.num_rows())));
        }
        Ok(batch)
    }
}
