//! Changing the catalog: changes that become durable together, and what each of them sees meanwhile.
//!
//! Guarantees: a group is one write batch, synced once; a change joins it whole or not at all, and sees
//! what the changes before it in the group did.

use super::keys::{self, Family};
use super::look::{Look, Visit};
use super::records::{SegmentRecord, SequenceRecord, SessionRecord, TopicRecord, pack};
use super::{Catalog, Fate, Pin, failed};
use crate::chunk::ChunkRecord;
use crate::chunk::record::SkipRecord;
use crate::error::{Result, StorageError};
use crate::ids::{SequenceId, TopicNo};
use crate::segment::Trailer;
use rocksdb::{WriteBatch, WriteOptions};
use serde::Serialize;
use std::collections::BTreeMap;

/// Changes that become durable together.
pub struct Group {
    pub(super) catalog: Catalog,
    pub(super) pin: Pin,
    pub(super) batch: WriteBatch,
    pub(super) overlay: BTreeMap<(Family, Vec<u8>), Option<Vec<u8>>>,
    /// Prefixes deleted as ranges in this group.
    pub(super) gone: Vec<(Family, Vec<u8>)>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("bytes", &self.batch.size_in_bytes()).finish_non_exhaustive()
    }
}

enum Op {
    Put(Family, Vec<u8>, Vec<u8>),
    Delete(Family, Vec<u8>),
    DeletePrefix(Family, Vec<u8>),
    /// Keys from the first up to, not including, the second.
    DeleteRange(Family, Vec<u8>, Vec<u8>),
}

impl Group {
    /// Runs one change: all of its writes join the group, or none when it returns an error.
    ///
    /// # Errors
    /// Whatever the change returns.
    pub fn change<R, E: From<StorageError>>(
        &mut self,
        change: impl FnOnce(&mut Txn<'_>) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut txn = Txn { group: self, ops: Vec::new() };
        let result = change(&mut txn)?;
        let ops = std::mem::take(&mut txn.ops);
        for op in ops {
            self.absorb(op)?;
        }
        Ok(result)
    }

    /// Bytes gathered so far.
    pub fn size_bytes(&self) -> usize {
        self.batch.size_in_bytes()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Makes the group durable: one write, one sync.
    ///
    /// # Errors
    /// [`StorageError::Catalog`]; whether the group is durable is then unknown, and nothing of it
    /// may be acknowledged.
    pub fn commit(self) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        let fate = self.catalog.shared.simulated.fate.as_ref().map_or(Fate::Done, |fate| fate());
        let refused = || StorageError::Catalog { op: "commit", text: "simulated commit error".to_owned() };
        if fate == Fate::Lost {
            return Err(refused());
        }
        self.pin.db.write_opt(self.batch, &options).map_err(failed("commit"))?;
        if fate == Fate::Done { Ok(()) } else { Err(refused()) }
    }

    fn absorb(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Put(family, key, value) => {
                self.batch.put_cf(&self.pin.family(family)?, &key, &value);
                self.overlay.insert((family, key), Some(value));
            }
            Op::Delete(family, key) => {
                self.batch.delete_cf(&self.pin.family(family)?, &key);
                self.overlay.insert((family, key), None);
            }
            Op::DeletePrefix(family, prefix) => {
                if let Some(end) = keys::after_prefix(&prefix) {
                    self.batch.delete_range_cf(&self.pin.family(family)?, prefix.as_slice(), end.as_slice());
                }
                self.overlay.retain(|(of, key), _| *of != family || !key.starts_with(&prefix));
                self.gone.push((family, prefix));
            }
            Op::DeleteRange(family, from, to) => {
                self.batch.delete_range_cf(&self.pin.family(family)?, from.as_slice(), to.as_slice());
            }
        }
        Ok(())
    }

    fn is_gone(&self, family: Family, key: &[u8]) -> bool {
        self.gone.iter().any(|(of, prefix)| *of == family && key.starts_with(prefix))
    }
}

impl Look for Group {
    fn replays_tail(&self) -> bool {
        self.pin.replays_tail
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        match self.overlay.get(&(family, key.to_vec())) {
            Some(pending) => Ok(pending.clone()),
            None if self.is_gone(family, key) => Ok(None),
            None => self.pin.get(family, key),
        }
    }

    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()> {
        let mut pairs = BTreeMap::new();
        self.pin.scan(family, prefix, from, &mut |key, value| {
            if !self.is_gone(family, key) {
                pairs.insert(key.to_vec(), value.to_vec());
            }
            Ok(true)
        })?;
        let start = (family, from.to_vec());
        for ((of, key), value) in self.overlay.range(start..) {
            if *of != family || !key.starts_with(prefix) {
                break;
            }
            match value {
                Some(value) => pairs.insert(key.clone(), value.clone()),
                None => pairs.remove(key),
            };
        }
        for (key, value) in &pairs {
            if !visit(key, value)? {
                break;
            }
        }
        Ok(())
    }
}

/// One change of a group. Check first, then write: reads do not see the change's own writes.
pub struct Txn<'a> {
    group: &'a Group,
    ops: Vec<Op>,
}

impl std::fmt::Debug for Txn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Txn").field("ops", &self.ops.len()).finish_non_exhaustive()
    }
}

impl Look for Txn<'_> {
    fn replays_tail(&self) -> bool {
        self.group.replays_tail()
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.group.get(family, key)
    }

    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()> {
        self.group.scan(family, prefix, from, visit)
    }
}

impl Txn<'_> {
    /// Writes a record.
    ///
    /// # Errors
    /// When it cannot be packed; so for all that follow.
    pub fn put<T: Serialize>(&mut self, family: Family, key: Vec<u8>, value: &T) -> Result<()> {
        self.ops.push(Op::Put(family, key, pack(value)?));
        Ok(())
    }

    /// Writes raw bytes.
    pub fn put_bytes(&mut self, family: Family, key: Vec<u8>, value: Vec<u8>) {
        self.ops.push(Op::Put(family, key, value));
    }

    /// Removes a key.
    pub fn delete(&mut self, family: Family, key: Vec<u8>) {
        self.ops.push(Op::Delete(family, key));
    }

    /// The next topic number, taken.
    pub fn take_topic_no(&mut self) -> Result<TopicNo> {
        let no: u64 = self.record(Family::Meta, keys::NEXT_TOPIC)?.unwrap_or(1);
        self.put(Family::Meta, keys::NEXT_TOPIC.to_vec(), &(no + 1))?;
        Ok(TopicNo(no))
    }

    /// Writes a sequence and its name.
    pub fn put_sequence(&mut self, record: &SequenceRecord) -> Result<()> {
        self.put(Family::Sequences, keys::sequence(record.id), record)?;
        self.put(Family::Sequences, keys::sequence_name(&record.name), &record.id)?;
        self.unsettle(record.id)
    }

    /// Notes that the next start must look at a sequence.
    pub fn unsettle(&mut self, sequence: SequenceId) -> Result<()> {
        self.put(Family::Meta, keys::unsettled(sequence), &sequence)
    }

    /// Writes a session and the ways to it.
    pub fn put_session(&mut self, record: &SessionRecord) -> Result<()> {
        self.put(Family::Sessions, keys::session(record.id), record)?;
        self.put(Family::Sessions, keys::session_locator(&record.locator), &record.id)?;
        self.put(Family::Sessions, keys::sequence_session(record.sequence, record.id), &record.id)?;
        self.unsettle(record.sequence)
    }

    /// Writes a topic and the ways to it.
    pub fn put_topic(&mut self, record: &TopicRecord) -> Result<()> {
        self.put(Family::Topics, keys::topic(record.no), record)?;
        self.put(Family::Topics, keys::topic_locator(&record.locator), &record.no)?;
        self.put(Family::Topics, keys::topic_id(record.id), &record.no)?;
        self.put(Family::Topics, keys::tag_topic(&record.ontology_tag, record.no), &record.no)?;
        self.put(Family::Topics, keys::sequence_topic(record.sequence, record.no), &record.no)
    }

    /// Writes a chunk with its statistics and drops the tail it replaces, if the topic has one: every reader of the
    /// tail's memtable looks through the ranges deleted in it.
    pub fn put_chunk(&mut self, no: TopicNo, record: &ChunkRecord, skip: &SkipRecord, has_tail: bool) -> Result<()> {
        self.put(Family::Chunks, keys::chunk(no, record.first_row), record)?;
        self.put(Family::Skip, keys::skip_open(no, record.first_row), skip)?;
        let from = keys::tail(no, record.first_batch);
        let to = keys::tail(no, record.end_batch);
        if has_tail && from < to && !self.replays_tail() {
            self.delete_range(Family::Tail, from, to);
        }
        Ok(())
    }

    /// Takes over chunks of a topic that were found in its files behind the last one of the catalog.
    pub fn adopt_chunks(&mut self, no: TopicNo, chunks: &[Trailer]) -> Result<()> {
        let mut totals = self.totals(no)?;
        let tail = self.tail(no, totals.chunk_batches)?;
        let mut segments: BTreeMap<u32, SegmentRecord> =
            self.segments(no)?.into_iter().map(|segment| (segment.no, segment)).collect();
        totals.data_bytes -= tail.iter().map(|run| run.data_bytes).sum::<u64>().min(totals.data_bytes);
        for trailer in chunks {
            let record = &trailer.record;
            self.put_chunk(no, record, &SkipRecord { fields: trailer.fields.clone() }, true)?;
            totals.chunks += 1;
            totals.chunk_batches = record.end_batch;
            totals.chunk_rows = record.end_row;
            totals.rows = totals.rows.max(record.end_row);
            totals.batches = totals.batches.max(record.end_batch);
            totals.data_bytes += record.data_bytes;
            totals.stored_bytes += record.length;
            totals.widen(record.time);
            let ending = SegmentRecord::ending_with(record);
            let segment = segments.entry(record.segment).or_insert(ending);
            segment.end_offset = segment.end_offset.max(ending.end_offset);
        }
        let left = tail.iter().filter(|run| totals.chunk_batches <= run.first_batch);
        totals.data_bytes += left.map(|run| run.data_bytes).sum::<u64>();
        for segment in segments.values() {
            self.put(Family::Segments, keys::segment(no, segment.no), segment)?;
        }
        self.put(Family::Topics, keys::topic_totals(no), &totals)
    }

    /// Removes the keys from the first up to, not including, the second.
    pub(super) fn delete_range(&mut self, family: Family, from: Vec<u8>, to: Vec<u8>) {
        self.ops.push(Op::DeleteRange(family, from, to));
    }

    /// Removes a topic with everything of it.
    pub fn delete_topic(&mut self, record: &TopicRecord) -> Result<()> {
        self.delete_blocks(record)?;
        for key in [
            keys::topic(record.no),
            keys::topic_totals(record.no),
            keys::topic_schema(record.no),
            keys::topic_ontology(record.no),
            keys::topic_blocks(record.no),
            keys::topic_partial(record.no),
            keys::topic_id(record.id),
            keys::tag_topic(&record.ontology_tag, record.no),
            keys::sequence_topic(record.sequence, record.no),
        ] {
            self.delete(Family::Topics, key);
        }
        // The name may be another topic's by now.
        let named: Option<TopicNo> = self.record(Family::Topics, &keys::topic_locator(&record.locator))?;
        if named == Some(record.no) {
            self.delete(Family::Topics, keys::topic_locator(&record.locator));
        }
        for family in [Family::Segments, Family::Chunks, Family::Tail] {
            self.ops.push(Op::DeletePrefix(family, keys::of_topic(record.no)));
        }
        self.ops.push(Op::DeletePrefix(Family::Skip, keys::skip_open_of(record.no)));
        self.ops.push(Op::DeletePrefix(Family::Meta, keys::damaged_of(record.no)));
        let notifications = keys::notifications_of(record.sequence, record.no);
        self.ops.push(Op::DeletePrefix(Family::Notifications, notifications));
        Ok(())
    }

    /// Removes everything under a prefix.
    pub fn delete_prefix(&mut self, family: Family, prefix: Vec<u8>) {
        self.ops.push(Op::DeletePrefix(family, prefix));
    }

    /// Removes a session; its topics are removed one by one.
    pub fn delete_session(&mut self, record: &SessionRecord) {
        self.delete(Family::Sessions, keys::session(record.id));
        self.delete(Family::Sessions, keys::session_locator(&record.locator));
        self.delete(Family::Sessions, keys::sequence_session(record.sequence, record.id));
    }

    /// Removes a sequence; its sessions and topics are removed one by one.
    pub fn delete_sequence(&mut self, record: &SequenceRecord) -> Result<()> {
        self.delete(Family::Meta, keys::unsettled(record.id));
        self.delete(Family::Sequences, keys::sequence(record.id));
        // As for topics.
        let named: Option<SequenceId> = self.record(Family::Sequences, &keys::sequence_name(&record.name))?;
        if named == Some(record.id) {
            self.delete(Family::Sequences, keys::sequence_name(&record.name));
        }
        self.ops.push(Op::DeletePrefix(Family::Notifications, keys::sequence_notifications(record.id)));
        Ok(())
    }
}
