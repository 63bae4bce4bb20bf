//! The catalog: every name, state and record, in RocksDB. The only room that names rocksdb.
//!
//! Guarantees: changes go through a [`Group`], which is one write batch, synced once, and there is
//! one committer to make groups; readers see whole groups only. Within a group later changes see
//! earlier ones ([`Txn`] reads through what is pending), so "check, then write" is atomic without
//! a lock. Settings that decide the numbers are in [`Catalog::open`].

pub mod keys;
pub mod records;
pub mod salvage;
pub mod skip;

use crate::chunk::ChunkRecord;
use crate::chunk::record::SkipRecord;
use crate::error::{Result, StorageError};
use crate::ids::{SequenceId, SessionId, TopicId, TopicNo};
use crate::limits;
use crate::ontology::{Ontology, OntologyRecord};
use crate::segment::Trailer;
use crate::tail::TailRun;
use keys::Family;
use records::{
    BlockMark, DamageRecord, DeletionRecord, NotificationRecord, PartialRecord, SegmentRecord, SequenceRecord,
    SessionRecord, TopicOntology, TopicRecord, TopicTotals, pack, unpack,
};
use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode,
    DBWithThreadMode, IteratorMode, LogLevel, MultiThreaded, Options, WriteBatch, WriteBufferManager, WriteOptions,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

type Db = DBWithThreadMode<MultiThreaded>;

/// Reads of the catalog; cheap to clone.
#[derive(Clone)]
pub struct Catalog {
    shared: Arc<Shared>,
}

struct Shared {
    /// `None` while it is being opened again after a failed commit.
    db: RwLock<Option<Arc<Db>>>,
    path: PathBuf,
    direct: bool,
    memtable_bytes: usize,
    simulated: Simulated,
}

/// What simulations do to a catalog; nothing of it in the program.
#[derive(Default)]
pub struct Simulated {
    /// What becomes of commits.
    pub fate: Option<Box<FateOf>>,
    /// A planted bug: tail entries below the last chunk stay, and are read again.
    pub replays_tail: bool,
}

impl std::fmt::Debug for Simulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Simulated").field("replays_tail", &self.replays_tail).finish_non_exhaustive()
    }
}

/// What becomes of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is durable and says so.
    Done,
    /// It fails, and nothing of it is there.
    Lost,
    /// It fails, and is durable all the same.
    DoneAllTheSame,
}

/// Decides over each commit of a simulation.
pub type FateOf = dyn Fn() -> Fate + Send + Sync;

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").finish_non_exhaustive()
    }
}

fn failed(op: &'static str) -> impl FnOnce(rocksdb::Error) -> StorageError {
    move |error| StorageError::Catalog { op, text: error.to_string() }
}

impl Catalog {
    /// Opens or creates the catalog in `path`. `direct`: whether its file system takes `O_DIRECT`.
    ///
    /// # Errors
    /// [`StorageError::Catalog`] with RocksDB's text.
    pub fn open(path: &Path, direct: bool) -> Result<Self> {
        Self::open_sized(path, direct, MEMTABLE_BYTES, Simulated::default())
    }

    /// The same with small buffers and files: it opens in milliseconds, for simulations that open
    /// thousands.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_small(path: &Path, simulated: Simulated) -> Result<Self> {
        Self::open_sized(path, false, 64 << 10, simulated)
    }

    fn open_sized(path: &Path, direct: bool, memtable_bytes: usize, simulated: Simulated) -> Result<Self> {
        let db = RwLock::new(Some(Arc::new(Self::open_db(path, direct, memtable_bytes)?)));
        Ok(Self { shared: Arc::new(Shared { db, path: path.to_owned(), direct, memtable_bytes, simulated }) })
    }

    fn open_db(path: &Path, direct: bool, memtable_bytes: usize) -> Result<Db> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // One log for all families: bounded, synced per group, its blocks used again (legal only
        // with point-in-time recovery), so that a synced commit does not grow a file.
        options.set_max_total_wal_size(limits::CATALOG_WAL_BYTES_MAX);
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_recycle_log_file_num(4);
        options.set_keep_log_file_num(4);
        // What is preallocated of log and manifest follows the memtables.
        options.set_manifest_preallocation_size(memtable_bytes / 2);
        options.set_max_background_jobs(2);
        if memtable_bytes != MEMTABLE_BYTES {
            // What a simulation pays for every time it opens: threads, and a log for people.
            options.set_max_file_opening_threads(1);
            options.set_log_level(LogLevel::Error);
            options.set_stats_dump_period_sec(0);
            options.set_stats_persist_period_sec(0);
            options.set_skip_stats_update_on_db_open(true);
        }
        options.set_max_open_files(256);
        // Flush and compaction past the page cache and rate-limited: otherwise ext4's journal drags
        // their dirty pages into every durable write of a segment.
        options.set_use_direct_io_for_flush_and_compaction(direct);
        options.set_ratelimiter(64 << 20, 100_000, 10);
        let buffers = WriteBufferManager::new_write_buffer_manager(limits::CATALOG_WRITE_BUFFER_BYTES, false);
        options.set_write_buffer_manager(&buffers);
        let cache = Cache::new_lru_cache(limits::CATALOG_BLOCK_CACHE_BYTES);
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(family, &cache, memtable_bytes)));
        Db::open_cf_descriptors(&options, path, families).map_err(failed("open"))
    }

    /// Keeps the catalog open for a while: it is opened again only when nobody holds it.
    ///
    /// # Errors
    /// While it is being opened again after a failed commit.
    pub fn pin(&self) -> Result<Pin> {
        let db = self.shared.db.read().unwrap_or_else(PoisonError::into_inner).clone();
        let text = || "being opened again after a failed commit; ask again".to_owned();
        let replays_tail = self.shared.simulated.replays_tail;
        db.map(|db| Pin { db, replays_tail }).ok_or_else(|| StorageError::Catalog { op: "read", text: text() })
    }

    /// Closes RocksDB and opens it again: after a failed commit only what it then finds is true, and
    /// that is durable (what its log had is flushed to tables on opening). Waits for readers up to `patience`.
    ///
    /// # Errors
    /// When readers hold on to it, or it cannot be opened; it then stays closed, and this may be tried again.
    pub fn reopen(&self, patience: Duration) -> Result<()> {
        let old = self.shared.db.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut old) = old {
            let since = Instant::now();
            loop {
                match Arc::try_unwrap(old) {
                    Ok(db) => {
                        drop(db);
                        break;
                    }
                    Err(held) if since.elapsed() < patience => {
                        old = held;
                        std::thread::park_timeout(Duration::from_millis(1));
                    }
                    Err(held) => {
                        *self.shared.db.write().unwrap_or_else(PoisonError::into_inner) = Some(held);
                        let text = format!("readers held it for {patience:?}");
                        return Err(StorageError::Catalog { op: "reopen", text });
                    }
                }
            }
        }
        let db = Self::open_db(&self.shared.path, self.shared.direct, self.shared.memtable_bytes)?;
        *self.shared.db.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(db));
        Ok(())
    }

    /// How many changes RocksDB has counted: it only grows, unless a log ended early.
    ///
    /// # Errors
    /// While it is being opened again.
    pub fn sequence_number(&self) -> Result<u64> {
        Ok(self.pin()?.db.latest_sequence_number())
    }

    /// Starts a group of changes. Only the committer does.
    ///
    /// # Errors
    /// While the catalog is closed.
    pub fn group(&self) -> Result<Group> {
        let (catalog, batch) = (self.clone(), WriteBatch::default());
        Ok(Group { pin: self.pin()?, catalog, batch, overlay: BTreeMap::new(), gone: Vec::new() })
    }
}

/// RocksDB, held open.
pub struct Pin {
    db: Arc<Db>,
    replays_tail: bool,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pin")
    }
}

impl Pin {
    fn family(&self, family: Family) -> Result<Arc<BoundColumnFamily<'_>>> {
        self.db
            .cf_handle(family.name())
            .ok_or(StorageError::Catalog { op: "open", text: format!("column family {} is missing", family.name()) })
    }

    /// The catalog as it is now, whatever is committed meanwhile.
    pub fn view(&self) -> View<'_> {
        View { pin: self, snapshot: self.db.snapshot() }
    }
}

/// Size of one memtable: small, so that little is lost from memory at once and flushes are short.
const MEMTABLE_BYTES: usize = 8 << 20;

fn family_options(family: Family, cache: &Cache, memtable_bytes: usize) -> Options {
    let mut options = Options::default();
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_bloom_filter(10.0, false);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(memtable_bytes);
    // A table file is preallocated with this size: eight memtables, RocksDB's own default here.
    let tables = if memtable_bytes == MEMTABLE_BYTES { 8 } else { 1 };
    options.set_target_file_size_base(memtable_bytes as u64 * tables);
    match family {
        // The tail lives for seconds: small memtables, nothing compressed.
        Family::Tail => {
            options.set_compression_type(DBCompressionType::None);
        }
        _ => {
            options.set_compression_type(DBCompressionType::Lz4);
        }
    }
    options
}

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

impl Look for Catalog {
    fn replays_tail(&self) -> bool {
        self.shared.simulated.replays_tail
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.pin()?.get(family, key)
    }

    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()> {
        self.pin()?.scan(family, prefix, from, visit)
    }
}

impl Look for Pin {
    fn replays_tail(&self) -> bool {
        self.replays_tail
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get_cf(&self.family(family)?, key).map_err(failed("read"))
    }

    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()> {
        let handle = self.family(family)?;
        for pair in self.db.iterator_cf(&handle, IteratorMode::From(from, rocksdb::Direction::Forward)) {
            let (key, value) = pair.map_err(failed("scan"))?;
            if !key.starts_with(prefix) || !visit(&key, &value)? {
                break;
            }
        }
        Ok(())
    }
}

/// A consistent view: chunks and tail of a topic must be read under one.
pub struct View<'a> {
    pin: &'a Pin,
    snapshot: rocksdb::SnapshotWithThreadMode<'a, Db>,
}

impl std::fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("View")
    }
}

impl Look for View<'_> {
    fn replays_tail(&self) -> bool {
        self.pin.replays_tail
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.snapshot.get_cf(&self.pin.family(family)?, key).map_err(failed("read"))
    }

    fn scan(&self, family: Family, prefix: &[u8], from: &[u8], visit: Visit<'_>) -> Result<()> {
        let handle = self.pin.family(family)?;
        for pair in self.snapshot.iterator_cf(&handle, IteratorMode::From(from, rocksdb::Direction::Forward)) {
            let (key, value) = pair.map_err(failed("scan"))?;
            if !key.starts_with(prefix) || !visit(&key, &value)? {
                break;
            }
        }
        Ok(())
    }
}

/// Changes that become durable together.
pub struct Group {
    catalog: Catalog,
    pin: Pin,
    batch: WriteBatch,
    overlay: BTreeMap<(Family, Vec<u8>), Option<Vec<u8>>>,
    /// Prefixes deleted as ranges in this group.
    gone: Vec<(Family, Vec<u8>)>,
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

    /// Writes a chunk with its statistics and drops the tail it replaces.
    pub fn put_chunk(&mut self, no: TopicNo, record: &ChunkRecord, skip: &SkipRecord) -> Result<()> {
        self.put(Family::Chunks, keys::chunk(no, record.first_row), record)?;
        self.put(Family::Skip, keys::skip_open(no, record.first_row), skip)?;
        let from = keys::tail(no, record.first_batch);
        let to = keys::tail(no, record.end_batch);
        if from < to && !self.replays_tail() {
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
            self.put_chunk(no, record, &SkipRecord { fields: trailer.fields.clone() })?;
            totals.chunks += 1;
            totals.chunk_batches = record.end_batch;
            totals.chunk_rows = record.end_row;
            totals.rows = totals.rows.max(record.end_row);
            totals.batches = totals.batches.max(record.end_batch);
            totals.data_bytes += record.data_bytes;
            totals.stored_bytes += record.length;
            totals.widen(record.time);
            let end_offset = record.offset + record.padded_length;
            let segment = segments.entry(record.segment).or_insert(SegmentRecord {
                no: record.segment,
                id: record.segment_id,
                epoch: record.epoch,
                end_offset,
                sealed_length: None,
            });
            segment.end_offset = segment.end_offset.max(end_offset);
        }
        let left = tail.iter().filter(|run| totals.chunk_batches <= run.first_batch);
        totals.data_bytes += left.map(|run| run.data_bytes).sum::<u64>();
        for segment in segments.values() {
            self.put(Family::Segments, keys::segment(no, segment.no), segment)?;
        }
        self.put(Family::Topics, keys::topic_totals(no), &totals)
    }

    /// Removes the keys from the first up to, not including, the second.
    fn delete_range(&mut self, family: Family, from: Vec<u8>, to: Vec<u8>) {
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
            keys::topic_locator(&record.locator),
            keys::topic_id(record.id),
            keys::tag_topic(&record.ontology_tag, record.no),
            keys::sequence_topic(record.sequence, record.no),
        ] {
            self.delete(Family::Topics, key);
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
    pub fn delete_sequence(&mut self, record: &SequenceRecord) {
        self.delete(Family::Meta, keys::unsettled(record.id));
        self.delete(Family::Sequences, keys::sequence(record.id));
        self.delete(Family::Sequences, keys::sequence_name(&record.name));
        self.ops.push(Op::DeletePrefix(Family::Notifications, keys::sequence_notifications(record.id)));
    }
}
