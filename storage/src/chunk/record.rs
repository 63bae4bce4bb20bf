//! What the catalog, and the trailer in the file, keep of a chunk.
//!
//! Offsets inside a chunk are relative, so a chunk that must be written again elsewhere only gets a
//! new base. Values are packed by `postcard` (varints): a column costs about ten bytes.

use crate::checksum;
use crate::chunk::stats::FieldStats;
use crate::ids::SegmentId;
use serde::{Deserialize, Serialize};

/// One column chunk of a row group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnRecord {
    /// Encoded length in the file, page headers included.
    pub encoded_bytes: u64,
    /// The same before compression.
    pub plain_bytes: u64,
    /// Values including nulls (Parquet's `num_values`).
    pub values: u64,
    /// Encodings used, as a bit set over Parquet's encoding numbers.
    pub encodings: u32,
    /// Parquet's compression codec number.
    pub codec: u8,
    /// CRC32C of the encoded bytes, seeded with segment, epoch, column and offset ([`column_crc_seed`]).
    pub crc: u32,
}

/// One batch inside a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchMark {
    /// Rows of the batch; zero is allowed.
    pub rows: u32,
    /// Identity of the batch's values, see [`crate::chunk::hash`].
    pub hash: u128,
}

/// One chunk: consecutive batches of one topic, one Parquet row group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Number of the segment file within the topic.
    pub segment: u32,
    /// Identity of that file.
    pub segment_id: SegmentId,
    /// How many times that file was used before (recycling); bound into the checksums.
    pub epoch: u32,
    /// Start of the row group in the file; a multiple of the block size.
    pub offset: u64,
    /// Bytes of the row group.
    pub length: u64,
    /// Bytes up to the end of the trailer; a multiple of the block size.
    pub padded_length: u64,
    /// First batch number, inclusive.
    pub first_batch: u64,
    /// Last batch number, exclusive.
    pub end_batch: u64,
    /// First row number, inclusive.
    pub first_row: u64,
    /// Last row number, exclusive.
    pub end_row: u64,
    /// Weight of the rows before encoding, in bytes.
    pub data_bytes: u64,
    /// Smallest and largest time; `None` without rows.
    pub time: Option<(i64, i64)>,
    /// Whether the times of the rows never decrease.
    pub time_sorted: bool,
    /// Per leaf column, in schema order.
    pub columns: Vec<ColumnRecord>,
    /// CRC32C over the columns' checksums.
    pub crc: u32,
}

impl ChunkRecord {
    /// Rows in the chunk.
    pub fn rows(&self) -> u64 {
        self.end_row - self.first_row
    }

    /// Offset in the file of each column, with its record.
    pub fn column_places(&self) -> impl Iterator<Item = (u64, &ColumnRecord)> {
        let mut at = self.offset;
        self.columns.iter().map(move |column| {
            let place = at;
            at += column.encoded_bytes;
            (place, column)
        })
    }
}

/// A chunk's typed statistics, one entry per statistics leaf of the schema in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SkipRecord {
    /// See [`crate::chunk::stats::leaves`] for the paths these belong to.
    pub fields: Vec<FieldStats>,
}

/// The CRC state a column starts from: bytes written for another file, use or place never verify.
pub fn column_crc_seed(segment: SegmentId, epoch: u32, column: usize, offset: u64) -> u32 {
    let mut seed = checksum::crc32c(segment.bytes());
    seed = checksum::append(seed, &epoch.to_le_bytes());
    seed = checksum::append(seed, &(column as u64).to_le_bytes());
    checksum::append(seed, &offset.to_le_bytes())
}

/// The chunk's checksum: over its columns' checksums in order.
pub fn chunk_crc(columns: &[ColumnRecord]) -> u32 {
    columns.iter().fold(0, |crc, column| checksum::append(crc, &column.crc.to_le_bytes()))
}
