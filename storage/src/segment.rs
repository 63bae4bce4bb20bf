//! The segment file: a plain Parquet file, written chunk by chunk, readable without its footer.
//!
//! ```text
//! 0          "PAR1", head, zeros                ends on a block boundary
//! …          row group | zeros | trailer        ends on a block boundary
//! …          row group | zeros | trailer
//! end        footer (FileMetaData, its length, "PAR1"): present once sealed
//! ```
//!
//! The head says whose rows these are, a trailer what stands before it, so that a catalog can be
//! rebuilt from files alone: a trailer's last 16 bytes (length, checksum, magic) end on a block boundary
//! and are found by stepping back through blocks. Everything here is a pure function from values to
//! bytes and back.

use crate::catalog::Look;
use crate::catalog::records::{SequenceRecord, SessionRecord, TopicRecord};
use crate::checksum;
use crate::chunk::record::{BatchMark, ChunkRecord};
use crate::chunk::stats::{self, FieldStats};
use crate::chunk::{Format, decode};
use crate::error::{Result, StorageError};
use crate::ids::{SegmentId, SequenceId, TopicId, TopicNo};
use crate::limits::{BLOCK_BYTES, HEAD_BYTES_MAX, TRAILER_BYTES_MAX};
use crate::ontology::OntologyRecord;
use arrow::datatypes::SchemaRef;
use parquet::arrow::encode_arrow_schema;
use parquet::basic::ColumnOrder;
use parquet::file::metadata::{FileMetaData, KeyValue, ParquetMetaData, ParquetMetaDataWriter};
use parquet::schema::types::SchemaDescPtr;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PARQUET_MAGIC: &[u8; 4] = b"PAR1";
const HEAD_MAGIC: &[u8; 8] = b"FBXHEAD1";
/// Parquet's magic, body length, checksum, magic.
const HEAD_START_BYTES: usize = 4 + 4 + 4 + 8;
/// Trailers with statistics, and those of format 2, which have none.
const TRAILER_MAGIC: &[u8; 8] = b"FBXTRLR2";
const TRAILER_MAGIC_1: &[u8; 8] = b"FBXTRLR1";
/// Body length, checksum, magic.
pub const TRAILER_TAIL_BYTES: usize = 4 + 4 + 8;

/// Whose rows a segment's are: all that the catalog knows of the topic when its upload begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopicFacts {
    /// The recording.
    pub sequence: SequenceRecord,
    /// The upload.
    pub session: SessionRecord,
    /// The topic, with its user metadata.
    pub topic: TopicRecord,
    /// The writer's schema, as an IPC message.
    #[serde(with = "serde_bytes")]
    pub schema: Vec<u8>,
    /// The version of its ontology.
    pub ontology: OntologyRecord,
    /// What is unusual about that.
    pub note: Option<String>,
}

impl TopicFacts {
    /// Gathers them; `None` while a part is missing: before the first DoPut, or once deleted.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn load(look: &impl Look, topic: &TopicRecord) -> Result<Option<Self>> {
        let (Some(sequence), Some(session), Some(schema), Some(of_topic)) = (
            look.sequence(topic.sequence)?,
            look.session(topic.session)?,
            look.topic_schema(topic.no)?,
            look.topic_ontology(topic.no)?,
        ) else {
            return Ok(None);
        };
        let ontology = look.ontology(&topic.ontology_tag, of_topic.version)?;
        let note = of_topic.note;
        Ok(ontology.map(|ontology| Self { sequence, session, topic: topic.clone(), schema, ontology, note }))
    }
}

/// What a segment file says of itself at its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Number within the topic.
    pub segment: u32,
    /// Identity of the file.
    pub segment_id: SegmentId,
    /// How many times the file was used before.
    pub epoch: u32,
    /// Whose rows follow.
    pub facts: TopicFacts,
}

impl Head {
    /// The first blocks of a segment file.
    ///
    /// # Errors
    /// When it does not fit its named bound.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let format = |text: String| StorageError::Format { op: "segment head", text };
        let body = postcard::to_stdvec(self).map_err(|error| format(error.to_string()))?;
        let too_long = || format(format!("{} bytes exceed the limit of {HEAD_BYTES_MAX}", body.len()));
        let length = u32::try_from(body.len()).ok().filter(|length| u64::from(*length) <= HEAD_BYTES_MAX);
        let length = length.ok_or_else(too_long)?;
        let mut out = Vec::with_capacity(HEAD_START_BYTES + body.len());
        out.extend_from_slice(PARQUET_MAGIC);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&checksum::crc32c(&body).to_le_bytes());
        out.extend_from_slice(HEAD_MAGIC);
        out.extend_from_slice(&body);
        let padded = usize::try_from(block_ceil(out.len() as u64)).unwrap_or(usize::MAX);
        out.resize(padded, 0);
        Ok(out)
    }

    /// How long the head is that these first bytes of a file begin, in bytes up to the block boundary.
    pub fn length(start: &[u8]) -> Option<u64> {
        let (_, rest) = start.split_first_chunk::<4>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (_crc, rest) = rest.split_first_chunk::<4>()?;
        let length = u64::from(u32::from_le_bytes(*length));
        (rest.starts_with(HEAD_MAGIC) && length <= HEAD_BYTES_MAX).then(|| block_ceil(HEAD_START_BYTES as u64 + length))
    }

    /// Reads the head at the start of `bytes`, if a whole one is there.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Self::length(bytes)?;
        let (start, rest) = bytes.split_at_checked(HEAD_START_BYTES)?;
        let length = usize::try_from(u32::from_le_bytes(start.get(4..8)?.try_into().ok()?)).ok()?;
        let crc = u32::from_le_bytes(start.get(8..12)?.try_into().ok()?);
        let body = rest.get(..length)?;
        let zeros = rest.get(length..)?;
        let padding = usize::try_from(block_ceil((HEAD_START_BYTES + length) as u64)).ok()? - HEAD_START_BYTES - length;
        let whole = start.starts_with(PARQUET_MAGIC) && checksum::crc32c(body) == crc;
        (whole && zeros.iter().take(padding).all(|byte| *byte == 0)).then(|| postcard::from_bytes(body).ok()).flatten()
    }
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
    /// Its statistics, for an index that was lost.
    pub fields: Vec<FieldStats>,
    /// When the upload began that wrote it, in nanoseconds since 1970: of two uploads of a topic the later one
    /// has what counts.
    pub upload: i64,
}

/// A trailer of format 2.
#[derive(Deserialize)]
struct Trailer1 {
    topic: TopicNo,
    topic_id: TopicId,
    record: ChunkRecord,
    marks: Vec<BatchMark>,
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
        let crc = checksum::crc32c(&body);
        out.extend_from_slice(&body);
        out.extend_from_slice(&body_length.to_le_bytes());
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(TRAILER_MAGIC);
        Ok((self, out))
    }

    /// Reads the trailer that ends at the end of `bytes`, if one does.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let body = Self::length(bytes)?;
        let (rest, magic) = bytes.split_last_chunk::<8>()?;
        let (rest, crc) = rest.split_last_chunk::<4>()?;
        let (rest, _length) = rest.split_last_chunk::<4>()?;
        let body = rest.get(rest.len().checked_sub(body)?..)?;
        if checksum::crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        if magic == TRAILER_MAGIC {
            return postcard::from_bytes(body).ok();
        }
        let Trailer1 { topic, topic_id, record, marks } = postcard::from_bytes(body).ok()?;
        Some(Self { topic, topic_id, record, marks, fields: Vec::new(), upload: 0 })
    }

    /// How long the body of the trailer is that ends at the end of `bytes`, in bytes, if one does.
    pub fn length(bytes: &[u8]) -> Option<usize> {
        let (rest, magic) = bytes.split_last_chunk::<8>()?;
        let (rest, _crc) = rest.split_last_chunk::<4>()?;
        let (_rest, length) = rest.split_last_chunk::<4>()?;
        let length = u64::from(u32::from_le_bytes(*length));
        let known = magic == TRAILER_MAGIC || magic == TRAILER_MAGIC_1;
        (known && length <= TRAILER_BYTES_MAX).then(|| usize::try_from(length).ok()).flatten()
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
    /// When the topic was locked, in nanoseconds since 1970; `None` where it may still grow.
    pub completed_at_ns: Option<i64>,
}

/// Key of [`FooterFacts::completed_at_ns`] in the footer.
pub const COMPLETED_KEY: &str = "flightbox:completed_at_ns";

/// Key of the footer's own checksum: CRC32C over the footer with zeros in its place, eight hexadecimal digits.
const FOOTER_CRC_KEY: &str = "flightbox:footer_crc32c";
const FOOTER_CRC_BLANK: &str = "00000000";

/// The checksum of heads, trailers, footers and manifests: CRC32C.
pub fn checksum(bytes: &[u8]) -> u32 {
    checksum::crc32c(bytes)
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
    let completed = facts.completed_at_ns.map(|at| (COMPLETED_KEY, at.to_string()));
    let pairs = pairs.into_iter().chain(completed).chain([(FOOTER_CRC_KEY, FOOTER_CRC_BLANK.to_owned())]);
    let pairs = pairs.map(|(key, value)| KeyValue::new(key.to_owned(), value)).collect();
    let orders =
        descriptor.columns().iter().map(|column| ColumnOrder::TYPE_DEFINED_ORDER(column.sort_order())).collect();
    let created_by = Some(format!("flightbox {}", env!("CARGO_PKG_VERSION")));
    let file = FileMetaData::new(1, rows, created_by, Some(pairs), Arc::clone(descriptor), Some(orders));
    let metadata = ParquetMetaData::new(file, groups);
    let mut bytes = Vec::new();
    ParquetMetaDataWriter::new(&mut bytes, &metadata).finish()?;
    let crc = checksum::crc32c(&bytes);
    if let Some(place) = footer_crc_place(&bytes).and_then(|place| bytes.get_mut(place)) {
        place.copy_from_slice(format!("{crc:08x}").as_bytes());
    }
    Ok(bytes)
}

/// Whether a footer is as it was written; `None` for one of format 2, which does not say.
pub fn footer_is_whole(bytes: &[u8]) -> Option<bool> {
    let place = footer_crc_place(bytes)?;
    let stored =
        std::str::from_utf8(bytes.get(place.clone())?).ok().and_then(|text| u32::from_str_radix(text, 16).ok());
    let mut blank = bytes.to_vec();
    blank.get_mut(place)?.copy_from_slice(FOOTER_CRC_BLANK.as_bytes());
    Some(stored == Some(checksum::crc32c(&blank)))
}

/// Where the digits of the checksum stand: behind the last mention of its key, after the field header and
/// the length of Thrift's compact protocol.
fn footer_crc_place(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let key = FOOTER_CRC_KEY.as_bytes();
    let at = bytes.windows(key.len()).rposition(|window| window == key)? + key.len() + 2;
    let end = at + FOOTER_CRC_BLANK.len();
    (end <= bytes.len()).then_some(at..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SessionId;
    use crate::ontology::Origin;

    fn head() -> Head {
        let (sequence, session) = (SequenceId::random(), SessionId::random());
        Head {
            segment: 3,
            segment_id: SegmentId::random(),
            epoch: 0,
            facts: TopicFacts {
                sequence: SequenceRecord {
                    id: sequence,
                    name: "s".to_owned(),
                    user_metadata: "{}".to_owned(),
                    created_at_ns: 1,
                    v0_session: None,
                },
                session: SessionRecord {
                    id: session,
                    locator: "s:x".to_owned(),
                    sequence,
                    created_at_ns: 1,
                    completed_at_ns: None,
                },
                topic: TopicRecord {
                    no: TopicNo(7),
                    id: TopicId::random(),
                    sequence,
                    session,
                    locator: "s/t".to_owned(),
                    ontology_tag: "x".to_owned(),
                    format: Format::Default,
                    user_metadata: format!("{{\"note\": {:?}}}", "n".repeat(9000)),
                    created_at_ns: 1,
                    completed_at_ns: None,
                },
                schema: vec![1, 2, 3],
                ontology: OntologyRecord {
                    tag: "x".to_owned(),
                    version: 1,
                    origin: Origin::FirstUse,
                    created_at_ns: 1,
                    schema: vec![1, 2, 3],
                    derived: Vec::new(),
                },
                note: None,
            },
        }
    }

    #[test]
    fn a_head_fills_whole_blocks_and_comes_back() {
        let bytes = head().encode().expect("encodes");
        assert_eq!(Head::length(&bytes), Some(3 * BLOCK_BYTES));
        assert_eq!(bytes.len() as u64, 3 * BLOCK_BYTES);
        assert!(Head::decode(&bytes).is_some_and(|back| back.facts.topic.user_metadata.len() > 9000));
    }

    #[test]
    fn inv_9_a_head_with_any_flipped_bit_is_no_head() {
        let bytes = head().encode().expect("encodes");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Head::decode(&damaged), None, "byte {at}");
        }
    }

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
            fields: Vec::new(),
            upload: 5,
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
    fn inv_9_a_footer_with_any_flipped_bit_is_noticed_and_parquet_reads_a_whole_one() {
        use parquet::arrow::ArrowSchemaConverter;
        use parquet::file::metadata::ParquetMetaDataReader;
        let schema = Arc::new(arrow::datatypes::Schema::new(vec![arrow::datatypes::Field::new(
            "timestamp_ns",
            arrow::datatypes::DataType::Int64,
            false,
        )]));
        let descriptor = Arc::new(ArrowSchemaConverter::new().convert(&schema).expect("converts"));
        let facts = FooterFacts {
            sequence: "s".to_owned(),
            locator: "s/t".to_owned(),
            ids: [String::new(), String::new(), String::new()],
            ontology_tag: "x".to_owned(),
            format: Format::Default,
            user_metadata: "{}".to_owned(),
            segment: 0,
            completed_at_ns: Some(5),
        };
        let bytes = footer(&schema, &descriptor, &[], &facts).expect("a footer");
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&bytes::Bytes::from(bytes.clone()));
        let pairs = metadata.expect("Parquet reads it").file_metadata().key_value_metadata().cloned().expect("pairs");
        assert!(pairs.iter().any(|pair| pair.key == COMPLETED_KEY && pair.value.as_deref() == Some("5")));
        assert_eq!(footer_is_whole(&bytes), Some(true));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_ne!(footer_is_whole(&damaged), Some(true), "byte {at}");
        }
    }

    #[test]
    fn zeros_are_no_trailer() {
        assert_eq!(Trailer::decode(&[0; 4096]), None);
    }
}
