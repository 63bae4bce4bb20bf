//! The segment file: a plain Parquet file, written chunk by chunk, readable without its footer.
//!
//! ```text
//! 0          "PAR1", zeros to the first block
//! 4096       row group | zeros | trailer     ends on a block boundary
//! …          row group | zeros | trailer
//! end        footer (FileMetaData, its length, "PAR1"): present once sealed
//! ```
//!
//! A trailer says what stands before it, so that a catalog can be rebuilt from files alone: its
//! last 16 bytes (length, checksum, magic) end on a block boundary and are found by stepping back
//! through blocks. Everything here is a pure function from values to bytes and back.

use crate::chunk::record::{BatchMark, ChunkRecord};
use crate::chunk::stats::{self, FieldStats};
use crate::chunk::{Format, decode};
use crate::error::{Result, StorageError};
use crate::ids::{SequenceId, TopicId, TopicNo};
use crate::limits::{BLOCK_BYTES, TRAILER_BYTES_MAX};
use arrow::datatypes::SchemaRef;
use parquet::arrow::encode_arrow_schema;
use parquet::basic::ColumnOrder;
use parquet::file::metadata::{FileMetaData, KeyValue, ParquetMetaData, ParquetMetaDataWriter};
use parquet::schema::types::SchemaDescPtr;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Offset of the first row group.
pub const FIRST_CHUNK_OFFSET: u64 = BLOCK_BYTES;

const PARQUET_MAGIC: &[u8; 4] = b"PAR1";
const TRAILER_MAGIC: &[u8; 8] = b"FBXTRLR1";
/// Body length, checksum, magic.
const TRAILER_TAIL_BYTES: usize = 4 + 4 + 8;

/// The first block of a segment file.
pub fn head_block() -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    for (to, from) in block.iter_mut().zip(PARQUET_MAGIC) {
        *to = *from;
    }
    block
}

/// Rounds down to a block boundary.
pub const fn block_floor(bytes: u64) -> u64 {
    bytes - bytes % BLOCK_BYTES
}

/// Rounds up to the next block boundary.
pub const fn block_ceil(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES)
}

/// Folder of a topic's segments.
pub fn topic_dir(data_dir: &Path, sequence: SequenceId, topic: TopicId) -> PathBuf {
    sequence_dir(data_dir, sequence).join(topic.to_string())
}

/// Folder of a sequence's topics.
pub fn sequence_dir(data_dir: &Path, sequence: SequenceId) -> PathBuf {
    data_dir.join("sequences").join(sequence.to_string())
}

/// File name of a segment within its topic's folder.
pub fn file_name(segment: u32) -> String {
    format!("{segment:06}.parquet")
}

/// What a chunk says of itself in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trailer {
    /// The topic's number (generation).
    pub topic: TopicNo,
    /// The topic's public id.
    pub topic_id: TopicId,
    /// Where, what rows, which columns.
    pub record: ChunkRecord,
    /// The batches, for a client that resumes.
    pub marks: Vec<BatchMark>,
}

impl Trailer {
    /// The zeros and the trailer that follow a row group of `length` bytes, up to a block boundary.
    /// `record.padded_length` is filled in.
    ///
    /// # Errors
    /// When the trailer does not fit its named bound.
    pub fn encode(mut self, length: u64) -> Result<(Trailer, Vec<u8>)> {
        // The padded length is part of the body, and varints make the body's size depend on it:
        // compute with the largest value, then fill in; the slack is zeros.
        self.record.padded_length = u64::MAX;
        let body_max = to_bytes(&self)?.len() as u64;
        let padded = block_ceil(length + body_max + TRAILER_TAIL_BYTES as u64);
        self.record.padded_length = padded;
        let body = to_bytes(&self)?;
        let body_length = u32::try_from(body.len()).ok().filter(|length| u64::from(*length) <= TRAILER_BYTES_MAX);
        let Some(body_length) = body_length else {
            return Err(StorageError::Format {
                op: "trailer",
                text: format!("{} bytes exceed the limit of {TRAILER_BYTES_MAX}", body.len()),
            });
        };
        let zeros = padded - length - body.len() as u64 - TRAILER_TAIL_BYTES as u64;
        let mut out = vec![0; usize::try_from(zeros).unwrap_or(0)];
        let crc = crc32c::crc32c(&body);
        out.extend_from_slice(&body);
        out.extend_from_slice(&body_length.to_le_bytes());
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(TRAILER_MAGIC);
        Ok((self, out))
    }

    /// Reads the trailer that ends at the end of `bytes`, if one does.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (rest, magic) = bytes.split_last_chunk::<8>()?;
        if magic != TRAILER_MAGIC {
            return None;
        }
        let (rest, crc) = rest.split_last_chunk::<4>()?;
        let (rest, length) = rest.split_last_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let body = rest.get(rest.len().checked_sub(length)?..)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        postcard::from_bytes(body).ok()
    }
}

fn to_bytes(trailer: &Trailer) -> Result<Vec<u8>> {
    postcard::to_stdvec(trailer).map_err(|error| StorageError::Format { op: "trailer", text: error.to_string() })
}

/// What a file's footer tells of its topic, for people and for a catalog that was lost.
#[derive(Debug, Clone)]
pub struct FooterFacts {
    /// Sequence name.
    pub sequence: String,
    /// `sequence/topic` as on the wire.
    pub locator: String,
    /// Sequence, session and topic ids, as text.
    pub ids: [String; 3],
    /// Ontology tag.
    pub ontology_tag: String,
    /// Serialization format.
    pub format: Format,
    /// User metadata of the topic, JSON text.
    pub user_metadata: String,
    /// Number of this segment within the topic.
    pub segment: u32,
}

/// The Parquet footer over these chunks, with length and magic.
///
/// # Errors
/// When a record does not fit the schema.
pub fn footer(
    schema: &SchemaRef,
    descriptor: &SchemaDescPtr,
    chunks: &[(ChunkRecord, Vec<FieldStats>)],
    facts: &FooterFacts,
) -> Result<Vec<u8>> {
    let groups = chunks
        .iter()
        .enumerate()
        .map(|(index, (record, fields))| {
            let statistics = stats::for_footer(schema, fields);
            let group =
                decode::row_group(descriptor, &record.columns, record.rows(), record.offset, Some(&statistics))?;
            Ok(group.into_builder().set_ordinal(i32::try_from(index).unwrap_or(i32::MAX)).build()?)
        })
        .collect::<Result<Vec<_>>>()?;
    let rows: i64 = groups.iter().map(|group| group.num_rows()).sum();
    let pairs = [
        ("ARROW:schema", encode_arrow_schema(schema)),
        ("flightbox:sequence", facts.sequence.clone()),
        ("flightbox:topic", facts.locator.clone()),
        ("flightbox:sequence_id", facts.ids[0].clone()),
        ("flightbox:session_id", facts.ids[1].clone()),
        ("flightbox:topic_id", facts.ids[2].clone()),
        ("flightbox:ontology_tag", facts.ontology_tag.clone()),
        ("flightbox:serialization_format", facts.format.name().to_owned()),
        ("flightbox:user_metadata", facts.user_metadata.clone()),
        ("flightbox:segment", facts.segment.to_string()),
    ];
    let pairs = pairs.into_iter().map(|(key, value)| KeyValue::new(key.to_owned(), value)).collect();
    let orders =
        descriptor.columns().iter().map(|column| ColumnOrder::TYPE_DEFINED_ORDER(column.sort_order())).collect();
    let created_by = Some(format!("flightbox {}", env!("CARGO_PKG_VERSION")));
    let file = FileMetaData::new(1, rows, created_by, Some(pairs), Arc::clone(descriptor), Some(orders));
    let metadata = ParquetMetaData::new(file, groups);
    let mut bytes = Vec::new();
    ParquetMetaDataWriter::new(&mut bytes, &metadata).finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SegmentId;

    fn trailer() -> Trailer {
        Trailer {
            topic: TopicNo(7),
            topic_id: TopicId::random(),
            record: ChunkRecord {
                segment: 1,
                segment_id: SegmentId::random(),
                epoch: 0,
                offset: 8192,
                length: 100,
                padded_length: 0,
                first_batch: 3,
                end_batch: 5,
                first_row: 30,
                end_row: 50,
                data_bytes: 99,
                time: Some((1, 2)),
                time_sorted: true,
                columns: Vec::new(),
                crc: 1,
            },
            marks: vec![BatchMark { rows: 10, hash: u128::MAX }, BatchMark { rows: 10, hash: 0 }],
        }
    }

    #[test]
    fn a_trailer_ends_on_a_block_boundary_and_comes_back() {
        for length in [1, 100, 4000, 4096, 1_000_000] {
            let (written, bytes) = trailer().encode(length).expect("encode");
            assert_eq!((length + bytes.len() as u64) % BLOCK_BYTES, 0);
            assert_eq!(written.record.padded_length, length + bytes.len() as u64);
            assert_eq!(Trailer::decode(&bytes), Some(written));
        }
    }

    #[test]
    fn a_trailer_with_any_flipped_bit_is_no_trailer() {
        let (_, bytes) = trailer().encode(4000).expect("encode");
        let body_start = bytes.iter().position(|byte| *byte != 0).expect("a body");
        for at in body_start..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Trailer::decode(&damaged), None, "byte {at}");
        }
    }

    #[test]
    fn zeros_are_no_trailer() {
        assert_eq!(Trailer::decode(&[0; 4096]), None);
    }
}
