//! What a damaged catalog still gives to one that was made again from the files: tails, locks, what has no
//! file, notifications, layers, keys.
//!
//! Guarantees: nothing that the files gave is replaced; what either source says is locked stays locked
//! (INV-3), what was being deleted is not there again (INV-4), a tail is taken only where it goes on exactly
//! behind the last chunk (INV-2). The damaged catalog itself is not changed: a copy is read.

use super::keys::{self, Family};
use super::records::{DamageRecord, DeletionRecord, SequenceRecord, SessionRecord, TopicRecord};
use super::{Catalog, Db, Group, Look, Pin, Txn, family_options};
use crate::error::{Result, StorageError};
use crate::files;
use crate::ids::{SequenceId, TopicId, TopicNo};
use rocksdb::{Cache, ColumnFamilyDescriptor, IteratorMode, Options};
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// Bytes after which a group is committed and another begun. Bounds what is held at once.
const GROUP_BYTES: usize = 8 << 20;

/// Families whose values are taken as they are where the new catalog has none.
const AS_THEY_ARE: [Family; 2] = [Family::Ontologies, Family::Keys];

/// What is taken of a damaged catalog.
pub struct Take<'a> {
    /// Everything that topics do not have alone: sequences, deletions, keys and the rest.
    pub all: bool,
    /// Which topics, of sequences that are known. One whose volume is not there is left to the catalog that is made
    /// when it is.
    pub topic: &'a dyn Fn(&TopicRecord) -> bool,
}

impl std::fmt::Debug for Take<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Take").field("all", &self.all).finish_non_exhaustive()
    }
}

/// Fills up `into` from the catalog in `damaged`, through a copy in `scratch`; returns what could not be
/// had, a line each.
///
/// # Errors
/// When the copy cannot be made or opened at all, or the new catalog cannot be written.
pub fn salvage(damaged: &Path, scratch: &Path, into: &Catalog, now_ns: i64, take: &Take<'_>) -> Result<Vec<String>> {
    copy(damaged, scratch).map_err(|error| StorageError::io("copy", damaged, error))?;
    let result = open(scratch).and_then(|old| fill(&old, into, now_ns, take));
    // Of no use any more; the damaged one itself stays for whoever wants to look.
    std::fs::remove_dir_all(scratch).map_err(|error| StorageError::io("remove", scratch, error))?;
    result
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir_all(to)?;
    for entry in files::list(from)?.into_iter().filter(|entry| !entry.is_dir) {
        let Some(name) = entry.path.file_name() else { continue };
        // Tables never change: a second name is a copy that takes no room.
        let is_table = entry.path.extension().is_some_and(|extension| extension == "sst");
        if !is_table || std::fs::hard_link(&entry.path, to.join(name)).is_err() {
            std::fs::copy(&entry.path, to.join(name))?;
        }
    }
    Ok(())
}

/// As it is if it opens, repaired if not: RocksDB then makes its list of tables anew from the tables.
fn open(path: &Path) -> Result<Pin> {
    let failed = |error: rocksdb::Error| StorageError::Catalog { op: "salvage", text: error.to_string() };
    let open = || {
        let cache = Cache::new_lru_cache(8 << 20);
        let mut options = Options::default();
        options.create_missing_column_families(true);
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(family, &cache, 1 << 20)));
        Db::open_cf_descriptors(&options, path, families)
    };
    let db = match open() {
        Ok(db) => db,
        Err(_) => {
            Db::repair(&Options::default(), path).map_err(failed)?;
            open().map_err(failed)?
        }
    };
    Ok(Pin { db: Arc::new(db), replays_tail: false })
}

/// Reading what may be damaged: what cannot be read is counted and passed over.
struct Old<'a> {
    pin: &'a Pin,
    unreadable: u64,
}

impl Old<'_> {
    /// Every pair of a family under a prefix. RocksDB's iterators end at a damaged block: behind it the scan
    /// begins anew at the next table's first key, as far as a seek gets there.
    fn pairs(&mut self, family: Family, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let handle = self.pin.family(family)?;
        let mut pairs: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for direction in [rocksdb::Direction::Forward, rocksdb::Direction::Reverse] {
            let end = keys::after_prefix(prefix);
            let from = match (direction, &end) {
                (rocksdb::Direction::Forward, _) => IteratorMode::From(prefix, direction),
                (rocksdb::Direction::Reverse, Some(end)) => IteratorMode::From(end, direction),
                (rocksdb::Direction::Reverse, None) => IteratorMode::End,
            };
            let mut whole = true;
            for pair in self.pin.db.iterator_cf(&handle, from) {
                let Ok((key, value)) = pair else {
                    whole = false;
                    break;
                };
                if key.starts_with(prefix) {
                    pairs.push((key.into_vec(), value.into_vec()));
                } else if end.as_deref() != Some(&*key) {
                    break;
                }
            }
            if whole {
                break;
            }
            self.unreadable += 1;
        }
        pairs.sort();
        pairs.dedup_by(|a, b| a.0 == b.0);
        Ok(pairs)
    }

    fn records<T: DeserializeOwned>(&mut self, family: Family, prefix: &[u8]) -> Result<Vec<T>> {
        let pairs = self.pairs(family, prefix)?;
        let found: Vec<T> = pairs.iter().filter_map(|(_, value)| postcard::from_bytes(value).ok()).collect();
        self.unreadable += (pairs.len() - found.len()) as u64;
        Ok(found)
    }
}

fn fill(pin: &Pin, into: &Catalog, now_ns: i64, take: &Take<'_>) -> Result<Vec<String>> {
    let mut old = Old { pin, unreadable: 0 };
    let mut missing = Vec::new();
    let deletions: Vec<DeletionRecord> = old.records(Family::Meta, b"d")?;
    let sequences: Vec<SequenceRecord> = old.records(Family::Sequences, b"i")?;
    let sessions: Vec<SessionRecord> = old.records(Family::Sessions, b"i")?;
    let topics: Vec<TopicRecord> = old.records(Family::Topics, b"i")?;
    let mut group = into.group()?;
    for deletion in deletions.iter().filter(|_| take.all) {
        group.change(|txn| forget(txn, deletion))?;
    }
    let gone: HashSet<&str> = deletions.iter().flat_map(|deletion| &deletion.folders).map(String::as_str).collect();
    for sequence in
        sequences.iter().filter(|sequence| take.all && !gone.contains(format!("sequences/{}", sequence.id).as_str()))
    {
        group.change(|txn| put_sequence(txn, sequence))?;
    }
    for session in sessions.iter().filter(|_| take.all) {
        group.change(|txn| put_session(txn, session))?;
    }
    for topic in topics.iter().filter(|topic| (take.topic)(topic)) {
        if group.size_bytes() > GROUP_BYTES {
            std::mem::replace(&mut group, into.group()?).commit()?;
            group = into.group()?;
        }
        if !gone.contains(format!("sequences/{}/{}", topic.sequence, topic.id).as_str()) {
            put_topic(&mut group, &mut old, topic, now_ns, &mut missing)?;
        }
    }
    if !take.all {
        group.commit()?;
        return Ok(missing);
    }
    for family in AS_THEY_ARE {
        for (key, value) in old.pairs(family, b"")? {
            group.change(|txn| put_absent(txn, family, key, value))?;
        }
    }
    // Layers.
    for (key, value) in old.pairs(Family::Meta, b"l")? {
        group.change(|txn| put_absent(txn, Family::Meta, key, value))?;
    }
    // A number is never given out twice, not even one whose topic is gone.
    let next: Option<u64> = pin.record(Family::Meta, keys::NEXT_TOPIC).ok().flatten();
    let known = topics.iter().map(|topic| topic.no.0 + 1).max().unwrap_or(1).max(next.unwrap_or(1));
    group.change(|txn| {
        let now: u64 = txn.record(Family::Meta, keys::NEXT_TOPIC)?.unwrap_or(1);
        txn.put(Family::Meta, keys::NEXT_TOPIC.to_vec(), &now.max(known))
    })?;
    group.commit()?;
    if old.unreadable > 0 {
        missing.push(format!("{} places of the old catalog could not be read", old.unreadable));
    }
    Ok(missing)
}

/// A deletion that was under way goes on: its record stays, what the files brought back goes.
fn forget(txn: &mut Txn<'_>, deletion: &DeletionRecord) -> Result<()> {
    txn.put(Family::Meta, keys::deletion(&deletion.ticket), deletion)?;
    for folder in deletion.folders.iter().filter_map(|folder| folder.strip_prefix("sequences/")) {
        let mut parts = folder.split('/').map(|part| part.parse().ok());
        match (parts.next().flatten(), parts.next()) {
            (Some(sequence), None) => {
                let id = SequenceId(sequence);
                let Some(record) = txn.sequence(id)? else { continue };
                for topic in txn.topics_of(id)? {
                    txn.delete_topic(&topic)?;
                }
                for session in txn.sessions_of(id)? {
                    txn.delete_session(&session);
                }
                txn.delete_sequence(&record)?;
            }
            (Some(_), Some(Some(topic))) => {
                if let Some(topic) = txn.topic_by_id(TopicId(topic))? {
                    txn.delete_topic(&topic)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn put_sequence(txn: &mut Txn<'_>, record: &SequenceRecord) -> Result<()> {
    if txn.sequence(record.id)?.is_none() && txn.sequence_by_name(&record.name)?.is_none() {
        txn.put_sequence(record)?;
    }
    Ok(())
}

fn put_session(txn: &mut Txn<'_>, record: &SessionRecord) -> Result<()> {
    let known = txn.session(record.id)?;
    let locks = known.as_ref().is_some_and(|known| known.completed_at_ns.is_none() && record.completed_at_ns.is_some());
    if (known.is_none() || locks) && txn.sequence(record.sequence)?.is_some() {
        txn.put_session(record)?;
    }
    Ok(())
}

fn put_absent(txn: &mut Txn<'_>, family: Family, key: Vec<u8>, value: Vec<u8>) -> Result<()> {
    if txn.get(family, &key)?.is_none() {
        txn.put_bytes(family, key, value);
    }
    Ok(())
}

/// A topic that the files did not give, its lock, and its tail.
fn put_topic(
    group: &mut Group,
    old: &mut Old<'_>,
    topic: &TopicRecord,
    now_ns: i64,
    missing: &mut Vec<String>,
) -> Result<()> {
    let no = topic.no;
    if group.sequence(topic.sequence)?.is_none() {
        return Ok(());
    }
    let known = group.topic(no)?;
    // Its chunks are in the files alone; of a topic without any this is all.
    let singles: Vec<(Vec<u8>, Option<Vec<u8>>)> =
        [keys::topic_schema(no), keys::topic_ontology(no), keys::topic_partial(no)]
            .into_iter()
            .map(|key| (key.clone(), old.pin.get(Family::Topics, &key).ok().flatten()))
            .collect();
    let notifications = old.pairs(Family::Notifications, &keys::notifications_of(topic.sequence, no))?;
    group.change(|txn| {
        if known.as_ref().is_none_or(|known| known.completed_at_ns.is_none() && topic.completed_at_ns.is_some()) {
            txn.put_topic(topic)?;
        }
        for (key, value) in singles {
            if let Some(value) = value {
                put_absent(txn, Family::Topics, key, value)?;
            }
        }
        for (key, value) in notifications {
            put_absent(txn, Family::Notifications, key, value)?;
        }
        Ok::<_, StorageError>(())
    })?;
    put_tail(group, old, no)?;
    let had = old.pin.totals(no).unwrap_or_default();
    let has = group.totals(no)?;
    if has.rows < had.rows {
        missing.push(format!("{}: rows {} to {} of {}", topic.locator, has.rows, had.rows, had.rows));
        if topic.completed_at_ns.is_some() {
            // It was locked with them: they are missing, it does not get shorter.
            let what = "its chunk is not in the files".to_owned();
            let damage = DamageRecord { first_row: has.rows, end_row: had.rows, time: None, what, found_at_ns: now_ns };
            group.change(|txn| {
                txn.put(Family::Meta, keys::damaged(no, damage.first_row), &damage)?;
                let totals = super::records::TopicTotals { rows: had.rows, batches: had.batches, ..has };
                txn.put(Family::Topics, keys::topic_totals(no), &totals)
            })?;
        }
    }
    Ok(())
}

/// The runs of the tail that go on where the chunks end.
fn put_tail(group: &mut Group, old: &Old<'_>, no: TopicNo) -> Result<()> {
    let mut totals = group.totals(no)?;
    if totals.chunk_batches < totals.batches {
        return Ok(());
    }
    let runs = old.pin.tail(no, totals.chunk_batches).unwrap_or_default();
    group.change(|txn| {
        for run in &runs {
            txn.put(Family::Tail, keys::tail(no, run.first_batch), run)?;
            totals.rows = run.end_row();
            totals.batches = run.end_batch();
            totals.data_bytes += run.data_bytes;
            totals.widen(run.time);
        }
        if runs.is_empty() { Ok(()) } else { txn.put(Family::Topics, keys::topic_totals(no), &totals) }
    })
}
