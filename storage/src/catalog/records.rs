//! Values of the catalog. Packed with `postcard`; fields are only ever added behind the last one
//! together with a new format version.

use crate::chunk::{ChunkRecord, Format};
use crate::error::{Result, StorageError};
use crate::ids::{SegmentId, SequenceId, SessionId, TopicId, TopicNo};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceRecord {
    /// Its id; in v0 also the key to write it.
    pub id: SequenceId,
    /// Its unique name.
    pub name: String,
    /// JSON object text.
    pub user_metadata: String,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
    /// The hidden session of a v0 sequence; `None` for the session protocol.
    pub v0_session: Option<SessionId>,
}

/// One upload into a sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Its id: the key to create topics in it and to finalize it.
    pub id: SessionId,
    /// `sequence:ULID`.
    pub locator: String,
    /// The sequence.
    pub sequence: SequenceId,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
    /// When it was finalized; `None` while open.
    pub completed_at_ns: Option<i64>,
}

/// One stream of rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRecord {
    /// Its number (generation).
    pub no: TopicNo,
    /// Its id: the key for its one DoPut.
    pub id: TopicId,
    /// The sequence.
    pub sequence: SequenceId,
    /// The session it was created in.
    pub session: SessionId,
    /// `sequence/topic…`.
    pub locator: String,
    /// What its rows mean.
    pub ontology_tag: String,
    /// How they are stored.
    pub format: Format,
    /// JSON object text.
    pub user_metadata: String,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
    /// When it was locked; `None` while it can be written.
    pub completed_at_ns: Option<i64>,
}

/// What is durable of a topic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicTotals {
    /// Chunks committed.
    pub chunks: u64,
    /// Rows in chunks and tail.
    pub rows: u64,
    /// Batches in chunks and tail.
    pub batches: u64,
    /// Their weight before encoding, in bytes.
    pub data_bytes: u64,
    /// Row group bytes on disk, without padding and trailers.
    pub stored_bytes: u64,
    /// Smallest and largest time.
    pub time: Option<(i64, i64)>,
    /// Batches in chunks.
    pub chunk_batches: u64,
    /// Rows in chunks.
    pub chunk_rows: u64,
}

impl TopicTotals {
    /// Widens the interval.
    pub fn widen(&mut self, time: Option<(i64, i64)>) {
        self.time = match (self.time, time) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (one, other) => one.or(other),
        };
    }
}

/// One segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// Number within the topic.
    pub no: u32,
    /// Identity, bound into the checksums.
    pub id: SegmentId,
    /// How many times the file was used before.
    pub epoch: u32,
    /// End of the last committed chunk.
    pub end_offset: u64,
    /// Length with footer, once sealed.
    pub sealed_length: Option<u64>,
}

impl SegmentRecord {
    /// An open segment that ends with this chunk.
    pub fn ending_with(chunk: &ChunkRecord) -> Self {
        Self {
            no: chunk.segment,
            id: chunk.segment_id,
            epoch: chunk.epoch,
            end_offset: chunk.offset + chunk.padded_length,
            sealed_length: None,
        }
    }
}

/// Which version of its ontology a topic was opened with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicOntology {
    /// The version of its tag.
    pub version: u32,
    /// What is unusual about it, for whoever looks at the topic.
    pub note: Option<String>,
}

/// A topic that was locked as it was, without a clean end of its upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialRecord {
    /// Rows that were durable.
    pub rows: u64,
    /// Batches that were durable.
    pub batches: u64,
    /// When it was accepted, in nanoseconds since 1970.
    pub accepted_at_ns: i64,
}

/// A chunk whose bytes are not those that were written: it is left out, and said to be missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageRecord {
    /// First row, inclusive.
    pub first_row: u64,
    /// Last row, exclusive.
    pub end_row: u64,
    /// Smallest and largest time, if known.
    pub time: Option<(i64, i64)>,
    /// What is wrong, with file and offset.
    pub what: String,
    /// When it was found, in nanoseconds since 1970.
    pub found_at_ns: i64,
}

/// A block of the skip index: consecutive chunks of a topic, by their position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockMark {
    /// Position of its first chunk.
    pub first_chunk: u32,
    /// Chunks in it.
    pub chunks: u32,
}

/// A message that a client left on a sequence or topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotificationRecord {
    /// The kind; clients know only `error`.
    pub kind: String,
    /// The text.
    pub text: String,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
}

/// An API key; the token itself is not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// SHA-256 of the token.
    pub hash: [u8; 32],
    /// `read`, `write`, `delete` or `manage`.
    pub permissions: String,
    /// For people.
    pub description: String,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
    /// When it ends; `None`: never.
    pub expires_at_ns: Option<i64>,
}

/// Files that a deletion still has to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletionRecord {
    /// The ticket in the key.
    pub ticket: [u8; 16],
    /// Folders, relative to the data directory.
    pub folders: Vec<String>,
}

/// Packs a value.
///
/// # Errors
/// When a value cannot be serialised, which would be a bug in its type.
pub fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|error| StorageError::Decode { what: "catalog value", text: error.to_string() })
}

/// Unpacks a value.
///
/// # Errors
/// [`StorageError::Decode`] when the bytes are not such a value.
pub fn unpack<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|error| StorageError::Decode { what, text: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::ColumnRecord;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn totals_survive_packing(rows: u64, batches: u64, first: i64, last: i64) {
            let totals = TopicTotals { rows, batches, time: Some((first, last)), ..TopicTotals::default() };
            let back: TopicTotals = unpack("totals", &pack(&totals).expect("pack")).expect("unpack");
            prop_assert_eq!(back, totals);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _topic: Result<TopicRecord> = unpack("topic", &bytes);
            let _chunk: Result<ChunkRecord> = unpack("chunk", &bytes);
        }
    }

    #[test]
    fn a_column_costs_at_most_24_bytes() {
        let column = ColumnRecord {
            encoded_bytes: 16 << 20,
            plain_bytes: 16 << 20,
            values: 1 << 20,
            encodings: 1 << 9,
            codec: 7,
            crc: u32::MAX,
        };
        assert!(pack(&column).expect("pack").len() <= 24);
    }
}
