//! The catalog: every name, state and record, in RocksDB. The only room that names rocksdb.
//!
//! Guarantees: changes go through a [`Group`], which is one write batch, synced once, and there is
//! one committer to make groups; readers see whole groups only. Within a group later changes see
//! earlier ones ([`Txn`] reads through what is pending), so "check, then write" is atomic without
//! a lock. Settings that decide the numbers are in [`Catalog::open`].

mod group;
pub mod keys;
mod look;
pub mod records;
pub mod salvage;
pub mod skip;

pub use group::{Group, Txn};
pub use look::{Look, Visit};

use crate::error::{Result, StorageError};
use crate::limits;
use keys::Family;
use rocksdb::statistics::{StatsLevel, Ticker};
use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode,
    DBWithThreadMode, IteratorMode, LogLevel, MultiThreaded, Options, WriteBatch, WriteBufferManager,
};
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
    /// What every opening starts from; holds RocksDB's counters, which go on when it is opened again.
    base: Options,
}

/// Bytes that RocksDB gave to the disk since the program started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogBytes {
    /// Its write-ahead log.
    pub log: u64,
    /// Memtables written as tables.
    pub flush: u64,
    /// Tables merged into others.
    pub compaction: u64,
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
        let mut base = Options::default();
        base.enable_statistics();
        base.set_statistics_level(StatsLevel::ExceptHistogramOrTimers);
        let db = RwLock::new(Some(Arc::new(Self::open_db(&base, path, direct, memtable_bytes)?)));
        Ok(Self { shared: Arc::new(Shared { db, path: path.to_owned(), direct, memtable_bytes, simulated, base }) })
    }

    fn open_db(base: &Options, path: &Path, direct: bool, memtable_bytes: usize) -> Result<Db> {
        let mut options = base.clone();
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
        let db = Self::open_db(&self.shared.base, &self.shared.path, self.shared.direct, self.shared.memtable_bytes)?;
        *self.shared.db.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(db));
        Ok(())
    }

    /// Bytes that RocksDB gave to the disk since the program started, by its own counters.
    pub fn written(&self) -> CatalogBytes {
        let count = |ticker| self.shared.base.get_ticker_count(ticker);
        CatalogBytes {
            log: count(Ticker::WalFileBytes),
            flush: count(Ticker::FlushWriteBytes),
            compaction: count(Ticker::CompactWriteBytes),
        }
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
