//! Keys of the catalog: pure functions, so ordered that each question is one range scan.
//!
//! Integers are big-endian (byte order is number order). A topic's rows, chunks and tail lie under
//! its number: everything of a topic is one range, and an abort is one delete per family.

use crate::ids::{SequenceId, SessionId, TopicId, TopicNo};

/// The column families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// Counters and half-done deletions.
    Meta,
    /// Sequences by id and by name.
    Sequences,
    /// Sessions by id, by locator, and by sequence.
    Sessions,
    /// Topics by number, id, locator and sequence; their schemas and totals.
    Topics,
    /// Segment files by topic.
    Segments,
    /// Chunk records by topic and first row.
    Chunks,
    /// Skip index entries by topic and first row.
    Skip,
    /// Tail runs by topic and first batch.
    Tail,
    /// Registered ontologies.
    Ontologies,
    /// Notifications.
    Notifications,
    /// API keys, hashed.
    Keys,
}

impl Family {
    /// All families, in the order they are opened.
    pub const ALL: [Self; 11] = [
        Self::Meta,
        Self::Sequences,
        Self::Sessions,
        Self::Topics,
        Self::Segments,
        Self::Chunks,
        Self::Skip,
        Self::Tail,
        Self::Ontologies,
        Self::Notifications,
        Self::Keys,
    ];

    /// The family's name in RocksDB.
    pub fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Sequences => "sequences",
            Self::Sessions => "sessions",
            Self::Topics => "topics",
            Self::Segments => "segments",
            Self::Chunks => "chunks",
            Self::Skip => "skip",
            Self::Tail => "tail",
            Self::Ontologies => "ontologies",
            Self::Notifications => "notifications",
            Self::Keys => "keys",
        }
    }
}

fn tagged(tag: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + rest.len());
    key.push(tag);
    key.extend_from_slice(rest);
    key
}

/// `meta`: the next topic number.
pub const NEXT_TOPIC: &[u8] = b"next-topic";

/// `meta`: a deletion whose files are not gone yet.
pub fn deletion(ticket: &[u8; 16]) -> Vec<u8> {
    tagged(b'd', ticket)
}

/// `meta`: the receipt of the last recovery.
pub const RECEIPT: &[u8] = b"receipt";

/// `meta`: all sequences that are not settled: something of them may be open, unsealed or not linked.
pub const UNSETTLED: &[u8] = b"u";

/// `meta`: one of them.
pub fn unsettled(id: SequenceId) -> Vec<u8> {
    tagged(b'u', id.bytes())
}

/// `meta`: the damaged chunks of a topic.
pub fn damaged_of(no: TopicNo) -> Vec<u8> {
    tagged(b'q', &no.0.to_be_bytes())
}

/// `meta`: the damaged chunk that starts at a row.
pub fn damaged(no: TopicNo, first_row: u64) -> Vec<u8> {
    let mut key = damaged_of(no);
    key.extend_from_slice(&first_row.to_be_bytes());
    key
}

/// `sequences`: the record.
pub fn sequence(id: SequenceId) -> Vec<u8> {
    tagged(b'i', id.bytes())
}

/// `sequences`: the id of a name.
pub fn sequence_name(name: &str) -> Vec<u8> {
    tagged(b'n', name.as_bytes())
}

/// `sessions`: the record.
pub fn session(id: SessionId) -> Vec<u8> {
    tagged(b'i', id.bytes())
}

/// `sessions`: the id of a locator (`sequence:ULID`).
pub fn session_locator(locator: &str) -> Vec<u8> {
    tagged(b'l', locator.as_bytes())
}

/// `sessions`: a sequence's sessions.
pub fn sequence_sessions(id: SequenceId) -> Vec<u8> {
    tagged(b's', id.bytes())
}

/// `sessions`: one session of a sequence.
pub fn sequence_session(sequence: SequenceId, session: SessionId) -> Vec<u8> {
    let mut key = sequence_sessions(sequence);
    key.extend_from_slice(session.bytes());
    key
}

/// `topics`: the record.
pub fn topic(no: TopicNo) -> Vec<u8> {
    tagged(b'i', &no.0.to_be_bytes())
}

/// `topics`: the running totals.
pub fn topic_totals(no: TopicNo) -> Vec<u8> {
    tagged(b't', &no.0.to_be_bytes())
}

/// `topics`: the writer's schema, as an IPC message.
pub fn topic_schema(no: TopicNo) -> Vec<u8> {
    tagged(b'c', &no.0.to_be_bytes())
}

/// `topics`: which version of its ontology a topic has.
pub fn topic_ontology(no: TopicNo) -> Vec<u8> {
    tagged(b'v', &no.0.to_be_bytes())
}

/// `topics`: that a topic was locked without a clean end.
pub fn topic_partial(no: TopicNo) -> Vec<u8> {
    tagged(b'p', &no.0.to_be_bytes())
}

/// `topics`: the blocks of a topic in the skip index.
pub fn topic_blocks(no: TopicNo) -> Vec<u8> {
    tagged(b'b', &no.0.to_be_bytes())
}

/// `topics`: all topics of an ontology tag (tags have no control characters).
pub fn tag_topics(tag: &str) -> Vec<u8> {
    let mut key = tagged(b'g', tag.as_bytes());
    key.push(0);
    key
}

/// `topics`: one topic of an ontology tag.
pub fn tag_topic(tag: &str, no: TopicNo) -> Vec<u8> {
    let mut key = tag_topics(tag);
    key.extend_from_slice(&no.0.to_be_bytes());
    key
}

/// `topics`: the number of a locator (`sequence/topic`).
pub fn topic_locator(locator: &str) -> Vec<u8> {
    tagged(b'n', locator.as_bytes())
}

/// `topics`: the number of a public id.
pub fn topic_id(id: TopicId) -> Vec<u8> {
    tagged(b'k', id.bytes())
}

/// `topics`: a sequence's topics.
pub fn sequence_topics(id: SequenceId) -> Vec<u8> {
    tagged(b's', id.bytes())
}

/// `topics`: one topic of a sequence.
pub fn sequence_topic(sequence: SequenceId, no: TopicNo) -> Vec<u8> {
    let mut key = sequence_topics(sequence);
    key.extend_from_slice(&no.0.to_be_bytes());
    key
}

/// `skip`: the statistics of the chunks of a topic that are not packed into blocks yet.
pub fn skip_open_of(no: TopicNo) -> Vec<u8> {
    tagged(b'o', &no.0.to_be_bytes())
}

/// `skip`: the statistics of the chunk that starts at a row, not packed yet.
pub fn skip_open(no: TopicNo, first_row: u64) -> Vec<u8> {
    let mut key = skip_open_of(no);
    key.extend_from_slice(&first_row.to_be_bytes());
    key
}

/// Identity of an index column: a tag and a path, over all topics.
pub fn index_column(tag: &str, path: &str) -> [u8; 16] {
    twox_hash::XxHash3_128::oneshot(format!("{tag}.{path}").as_bytes()).to_be_bytes()
}

/// `skip`: one column of one topic, from the block that starts at a chunk on.
pub fn skip_block(column: &[u8; 16], no: TopicNo, first_chunk: u32) -> Vec<u8> {
    let mut key = tagged(b'b', column);
    key.extend_from_slice(&no.0.to_be_bytes());
    key.extend_from_slice(&first_chunk.to_be_bytes());
    key
}

/// `ontologies`: all versions of a tag.
pub fn ontology_versions(tag: &str) -> Vec<u8> {
    let mut key = tag.as_bytes().to_vec();
    key.push(0);
    key
}

/// `ontologies`: one version.
pub fn ontology(tag: &str, version: u32) -> Vec<u8> {
    let mut key = ontology_versions(tag);
    key.extend_from_slice(&version.to_be_bytes());
    key
}

/// `notifications`: all of a sequence and its topics.
pub fn sequence_notifications(sequence: SequenceId) -> Vec<u8> {
    sequence.bytes().to_vec()
}

/// `notifications`: all of one thing: a topic, or number 0 for the sequence itself.
pub fn notifications_of(sequence: SequenceId, topic: TopicNo) -> Vec<u8> {
    let mut key = sequence_notifications(sequence);
    key.extend_from_slice(&topic.0.to_be_bytes());
    key
}

/// `notifications`: one, in the order they came.
pub fn notification(sequence: SequenceId, topic: TopicNo, no: u64) -> Vec<u8> {
    let mut key = notifications_of(sequence, topic);
    key.extend_from_slice(&no.to_be_bytes());
    key
}

/// `meta`: a layer (v0) by name.
pub fn layer(name: &str) -> Vec<u8> {
    tagged(b'l', name.as_bytes())
}

/// `segments`, `chunks`, `tail`: everything of a topic.
pub fn of_topic(no: TopicNo) -> Vec<u8> {
    no.0.to_be_bytes().to_vec()
}

/// `segments`: one file.
pub fn segment(no: TopicNo, segment: u32) -> Vec<u8> {
    let mut key = of_topic(no);
    key.extend_from_slice(&segment.to_be_bytes());
    key
}

/// `chunks`: the chunk that starts at a row.
pub fn chunk(no: TopicNo, first_row: u64) -> Vec<u8> {
    let mut key = of_topic(no);
    key.extend_from_slice(&first_row.to_be_bytes());
    key
}

/// `tail`: the run that starts at a batch.
pub fn tail(no: TopicNo, first_batch: u64) -> Vec<u8> {
    let mut key = of_topic(no);
    key.extend_from_slice(&first_batch.to_be_bytes());
    key
}

/// The smallest key above every key with this prefix; `None` if there is none.
pub fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut key = prefix.to_vec();
    while let Some(last) = key.pop() {
        if let Some(next) = last.checked_add(1) {
            key.push(next);
            return Some(key);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_sort_as_numbers() {
        let keys: Vec<_> = [0, 1, 255, 256, u64::MAX].into_iter().map(|row| chunk(TopicNo(3), row)).collect();
        assert!(keys.is_sorted());
    }

    #[test]
    fn a_topics_range_ends_before_the_next_topic() {
        let end = after_prefix(&of_topic(TopicNo(255))).expect("an end");
        assert!(chunk(TopicNo(255), u64::MAX) < end);
        assert!(end <= of_topic(TopicNo(256)));
    }

    #[test]
    fn a_prefix_of_only_ff_has_no_end() {
        assert_eq!(after_prefix(&[0xff, 0xff]), None);
    }
}
