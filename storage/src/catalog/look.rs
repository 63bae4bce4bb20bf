//! Reading the catalog, as it is or as it is about to be: each question is one key or one scan.

use super::keys::{self, Family};
use super::records::{
    BlockMark, DamageRecord, DeletionRecord, NotificationRecord, PartialRecord, SegmentRecord, SequenceRecord,
    SessionRecord, TopicOntology, TopicRecord, TopicTotals, unpack,
};
use crate::chunk::ChunkRecord;
use crate::chunk::record::SkipRecord;
use crate::error::Result;
use crate::ids::{SequenceId, SessionId, TopicId, TopicNo};
use crate::ontology::{Ontology, OntologyRecord};
use crate::tail::TailRun;
use serde::de::DeserializeOwned;

/// Sees key and value of each pair of a scan; `false` ends it.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<bool>;

/// Reading, of the catalog as it is or as it is about to be.
pub trait Look {
    /// The value of a key.
    ///
    /// # Errors
    /// When RocksDB cannot read.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Pairs from `from` on, in order, while the key starts with `prefix`.
    ///
    /// # Errors
    /// When RocksDB cannot read.
    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()>;

    /// See [`Simulated::replays_tail`].
    fn replays_tail(&self) -> bool {
        false
    }

    /// A record, unpacked.
    ///
    /// # Errors
    /// When it cannot be read or does not decode.
    fn record<T: DeserializeOwned>(&self, family: Family, key: &[u8]) -> Result<Option<T>> {
        self.get(family, key)?.map(|bytes| unpack(family.name(), &bytes)).transpose()
    }

    /// All records under a prefix, in key order.
    ///
    /// # Errors
    /// When one cannot be read or does not decode.
    fn records<T: DeserializeOwned>(&self, family: Family, prefix: &[u8]) -> Result<Vec<T>> {
        let mut out = Vec::new();
        self.scan(family, prefix, prefix, &mut |_, value| {
            out.push(unpack(family.name(), value)?);
            Ok(true)
        })?;
        Ok(out)
    }

    /// The sequence of a name.
    ///
    /// # Errors
    /// When the catalog cannot be read; so for all that follow.
    fn sequence_by_name(&self, name: &str) -> Result<Option<SequenceRecord>> {
        match self.record::<SequenceId>(Family::Sequences, &keys::sequence_name(name))? {
            Some(id) => self.sequence(id),
            None => Ok(None),
        }
    }

    /// The sequence of an id.
    fn sequence(&self, id: SequenceId) -> Result<Option<SequenceRecord>> {
        self.record(Family::Sequences, &keys::sequence(id))
    }

    /// All sequences, by name.
    fn sequences(&self) -> Result<Vec<SequenceRecord>> {
        let ids: Vec<SequenceId> = self.records(Family::Sequences, b"n")?;
        ids.into_iter().filter_map(|id| self.sequence(id).transpose()).collect()
    }

    /// The session of an id.
    fn session(&self, id: SessionId) -> Result<Option<SessionRecord>> {
        self.record(Family::Sessions, &keys::session(id))
    }

    /// The session of a locator `sequence:ULID`.
    fn session_by_locator(&self, locator: &str) -> Result<Option<SessionRecord>> {
        match self.record::<SessionId>(Family::Sessions, &keys::session_locator(locator))? {
            Some(id) => self.session(id),
            None => Ok(None),
        }
    }

    /// A sequence's sessions, oldest first.
    fn sessions_of(&self, sequence: SequenceId) -> Result<Vec<SessionRecord>> {
        let ids: Vec<SessionId> = self.records(Family::Sessions, &keys::sequence_sessions(sequence))?;
        let mut sessions: Vec<SessionRecord> =
            ids.into_iter().filter_map(|id| self.session(id).transpose()).collect::<Result<_>>()?;
        sessions.sort_by(|a, b| (a.created_at_ns, &a.locator).cmp(&(b.created_at_ns, &b.locator)));
        Ok(sessions)
    }

    /// The topic of a number.
    fn topic(&self, no: TopicNo) -> Result<Option<TopicRecord>> {
        self.record(Family::Topics, &keys::topic(no))
    }

    /// The topic of a locator `sequence/topic`.
    fn topic_by_locator(&self, locator: &str) -> Result<Option<TopicRecord>> {
        match self.record::<TopicNo>(Family::Topics, &keys::topic_locator(locator))? {
            Some(no) => self.topic(no),
            None => Ok(None),
        }
    }

    /// The topic of a public id.
    fn topic_by_id(&self, id: TopicId) -> Result<Option<TopicRecord>> {
        match self.record::<TopicNo>(Family::Topics, &keys::topic_id(id))? {
            Some(no) => self.topic(no),
            None => Ok(None),
        }
    }

    /// A sequence's topics, in the order they were created.
    fn topics_of(&self, sequence: SequenceId) -> Result<Vec<TopicRecord>> {
        let numbers: Vec<TopicNo> = self.records(Family::Topics, &keys::sequence_topics(sequence))?;
        numbers.into_iter().filter_map(|no| self.topic(no).transpose()).collect()
    }

    /// What is durable of a topic.
    fn totals(&self, no: TopicNo) -> Result<TopicTotals> {
        Ok(self.record(Family::Topics, &keys::topic_totals(no))?.unwrap_or_default())
    }

    /// The writer's schema as an IPC message; `None` before the first DoPut.
    fn topic_schema(&self, no: TopicNo) -> Result<Option<Vec<u8>>> {
        self.get(Family::Topics, &keys::topic_schema(no))
    }

    /// A topic's chunks in row order.
    fn chunks(&self, no: TopicNo) -> Result<Vec<ChunkRecord>> {
        self.records(Family::Chunks, &keys::of_topic(no))
    }

    /// The statistics of a chunk that is not packed into a block yet.
    fn skip(&self, no: TopicNo, first_row: u64) -> Result<Option<SkipRecord>> {
        self.record(Family::Skip, &keys::skip_open(no, first_row))
    }

    /// The statistics of a topic's chunks that are not packed into blocks yet, in row order.
    fn skips_apart(&self, no: TopicNo) -> Result<Vec<SkipRecord>> {
        self.records(Family::Skip, &keys::skip_open_of(no))
    }

    /// A topic's segments.
    fn segments(&self, no: TopicNo) -> Result<Vec<SegmentRecord>> {
        self.records(Family::Segments, &keys::of_topic(no))
    }

    /// The tail: runs from the committed end on, contiguous. Anything below is garbage of a crash
    /// or of a chunk committed meanwhile; anything behind a hole was never acknowledged.
    fn tail(&self, no: TopicNo, end_batch: u64) -> Result<Vec<TailRun>> {
        let mut runs: Vec<TailRun> = Vec::new();
        let mut next = if self.replays_tail() { 0 } else { end_batch };
        self.scan(Family::Tail, &keys::of_topic(no), &keys::tail(no, next), &mut |_, value| {
            let run: TailRun = unpack("tail", value)?;
            if run.first_batch != next {
                return Ok(false);
            }
            next = run.end_batch();
            runs.push(run);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// Which version of its ontology a topic has; `None` before the first DoPut.
    fn topic_ontology(&self, no: TopicNo) -> Result<Option<TopicOntology>> {
        self.record(Family::Topics, &keys::topic_ontology(no))
    }

    /// Whether a topic was locked without a clean end.
    fn topic_partial(&self, no: TopicNo) -> Result<Option<PartialRecord>> {
        self.record(Family::Topics, &keys::topic_partial(no))
    }

    /// The topics of an ontology tag, in order.
    fn topics_of_tag(&self, tag: &str) -> Result<Vec<TopicNo>> {
        self.records(Family::Topics, &keys::tag_topics(tag))
    }

    /// The blocks of the skip index that a topic has.
    fn skip_blocks(&self, no: TopicNo) -> Result<Vec<BlockMark>> {
        Ok(self.record(Family::Topics, &keys::topic_blocks(no))?.unwrap_or_default())
    }

    /// One version of an ontology.
    fn ontology(&self, tag: &str, version: u32) -> Result<Option<OntologyRecord>> {
        self.record(Family::Ontologies, &keys::ontology(tag, version))
    }

    /// Every version of every ontology, by tag.
    fn ontologies(&self) -> Result<Vec<OntologyRecord>> {
        self.records(Family::Ontologies, b"")
    }

    /// The version of its ontology that a topic was opened with, decoded.
    fn ontology_of(&self, no: TopicNo) -> Result<Option<Ontology>> {
        let (Some(topic), Some(of_topic)) = (self.topic(no)?, self.topic_ontology(no)?) else {
            return Ok(None);
        };
        self.ontology(&topic.ontology_tag, of_topic.version)?.map(Ontology::load).transpose()
    }

    /// The notifications of a sequence (topic number 0) or of one of its topics, oldest first.
    fn notifications(&self, sequence: SequenceId, topic: TopicNo) -> Result<Vec<NotificationRecord>> {
        self.records(Family::Notifications, &keys::notifications_of(sequence, topic))
    }

    /// Sequences of which something may be open, unsealed or not linked.
    fn unsettled(&self) -> Result<Vec<SequenceRecord>> {
        let ids: Vec<SequenceId> = self.records(Family::Meta, keys::UNSETTLED)?;
        ids.into_iter().filter_map(|id| self.sequence(id).transpose()).collect()
    }

    /// The damaged chunks of a topic, in row order.
    fn damaged(&self, no: TopicNo) -> Result<Vec<DamageRecord>> {
        self.records(Family::Meta, &keys::damaged_of(no))
    }

    /// Deletions whose files may still be there.
    fn deletions(&self) -> Result<Vec<DeletionRecord>> {
        self.records(Family::Meta, b"d")
    }
}
