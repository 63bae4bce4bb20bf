//! A simulated recorder, started on one thread, and what its clients sent and were told.

use crate::config::raw::Raw;
use crate::config::{Config, HostFacts, OntologyMode};
use crate::health::Health;
use crate::ingest::admit::Budget;
use crate::ingest::committer::{self};
use crate::ingest::gather::ChunkRule;
use crate::ingest::lane::lane;
use crate::ingest::steward::{self, StewardHandle};
use crate::ingest::writer::{self, PreallocBudget, WriterHandles};
use crate::lifecycle::Lifecycle;
use crate::limits;
use crate::ontology::Registry;
use crate::stats::Stats;
use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use storage::catalog::{Catalog, Fate, Simulated};
use storage::chunk::Compression;
use storage::disk::IoCounters;
use storage::ids::{SequenceId, TopicId};
use storage::read::{self, Loader};
use storage::reclaim::Reclaim;
use storage::sim::{Faults, Random, SimDisk};
use storage::volumes::{Role, Volume, Volumes};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// What clients sent and were told of a topic.
#[derive(Debug, Clone)]
pub(super) struct TopicLedger {
    pub(super) id: TopicId,
    pub(super) locator: String,
    pub(super) rows_per_batch: u64,
    pub(super) blob_bytes: usize,
    /// Batches sent, and told to be durable.
    pub(super) sent: u64,
    pub(super) acked: u64,
    /// Told to be locked.
    pub(super) locked: bool,
    /// A clean end was asked for.
    pub(super) ending: bool,
    /// Only the catalog knew of it, and that was lost.
    pub(super) lost: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    No,
    Asked,
    Told,
}

#[derive(Debug, Clone)]
pub(super) struct SequenceLedger {
    pub(super) id: SequenceId,
    pub(super) name: String,
    pub(super) topics: Vec<TopicLedger>,
    pub(super) gone: Gone,
    pub(super) finalized: bool,
    /// Only the catalog knew of it, and that was lost.
    pub(super) lost: bool,
}

pub(super) type Ledger = Rc<RefCell<Vec<SequenceLedger>>>;

/// A recorder between two crashes.
#[derive(Clone)]
pub(super) struct Life {
    pub(super) lifecycle: Lifecycle,
    pub(super) steward: StewardHandle,
    pub(super) budget: Budget,
    pub(super) config: Rc<Config>,
    pub(super) failing_commits: Arc<AtomicU64>,
    pub(super) health: Arc<Health>,
}

pub(super) fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("value", DataType::Int64, true),
        Field::new("blob", DataType::Binary, false),
    ]))
}

pub(super) fn value(row: i64) -> i64 {
    row.wrapping_mul(0x9e37_79b9) ^ 0x55
}

pub(super) fn rows(topic: &TopicLedger, batch: u64) -> RecordBatch {
    let first = (batch * topic.rows_per_batch) as i64;
    let times: Vec<i64> = (first..first + topic.rows_per_batch as i64).collect();
    let blobs: Vec<Vec<u8>> = times.iter().map(|time| vec![*time as u8; topic.blob_bytes]).collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(times.clone())),
        Arc::new(times.iter().map(|row| Some(value(*row))).collect::<Int64Array>()),
        Arc::new(BinaryArray::from_iter_values(blobs)),
    ];
    RecordBatch::try_new(schema(), columns).expect("a batch")
}

/// How the parts around the disk behave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// How far the steward may lag behind the uploads whose files it seals.
    pub(super) lag: u64,
    /// Decides over commits that fail.
    pub(super) seed: u64,
    /// See [`Simulated::replays_tail`].
    pub(super) replays_tail: bool,
}

pub(super) const CALM: Manner = Manner { lag: 200, seed: 0, replays_tail: false };

/// What is wrong beyond the rules, for the checks to notice.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Planted {
    pub(super) disk: Faults,
    pub(super) replays_tail: bool,
}

/// `failing`: commits that fail, of 1,000; half of them are durable all the same.
pub(super) fn open_catalog(store: &Path, manner: Manner, failing: &Arc<AtomicU64>) -> Catalog {
    let failing = Arc::clone(failing);
    let random = Mutex::new(Random::new(manner.seed));
    let fate = move || {
        let mut random = random.lock().expect("not poisoned");
        match random.below(1000) {
            of_1000 if of_1000 >= failing.load(Ordering::Relaxed) => Fate::Done,
            of_1000 if of_1000 % 2 == 0 => Fate::Lost,
            _ => Fate::DoneAllTheSame,
        }
    };
    let simulated = Simulated { fate: Some(Box::new(fate)), replays_tail: manner.replays_tail };
    Catalog::open_small(&store.join("catalog"), simulated).expect("the catalog opens")
}

/// The data folder, and another volume beside it where the disk of this recorder has one.
pub(super) fn volumes(store: &Path) -> Volumes {
    let data = store.join("data");
    let other = store.join("other");
    // The real folder says so; its files are simulated.
    if !other.is_dir() {
        return Volumes::only(data);
    }
    Volumes::new(Volume::new(data, Role::Takes), vec![Volume::new(other, Role::Takes)])
}

/// Starts everything on this thread.
pub(super) fn begin(disk: &SimDisk, store: &Path, manner: Manner) -> Life {
    let mut raw = Raw::defaults();
    raw.set("data_dir", store.join("data").display().to_string(), "test").expect("a key");
    let host = HostFacts { memory_bytes: 1 << 30, cores: 1, free_bytes: 1 << 30, disk_bytes: 1 << 30 };
    let config = Config::check(&raw, &host).expect("defaults");
    let failing_commits = Arc::default();
    let catalog = open_catalog(store, manner, &failing_commits);
    let (stats, counters) = (Arc::new(Stats::default()), IoCounters::shared());
    let (committer, commits) = committer::pair();
    let health = Arc::new(Health::default());
    let spacing = committer::spacing(config.commit_interval);
    tokio::task::spawn_local(committer::run(
        catalog.clone(),
        commits,
        spacing,
        Arc::clone(&stats),
        Arc::clone(&health),
    ));
    let volumes = Arc::new(volumes(store));
    let (steward, jobs) = StewardHandle::new();
    let context = steward::Context {
        catalog: catalog.clone(),
        committer: committer.clone(),
        volumes: Arc::clone(&volumes),
        counters: Arc::clone(&counters),
        health: Arc::clone(&health),
        turns: steward::Turns::default(),
        reclaim: Reclaim::default(),
        last_ontology: steward::LastOntology::default(),
    };
    tokio::task::spawn_local(steward::serve(disk.slowed(manner.lag), jobs, context));
    let (reads, jobs) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
    tokio::task::spawn_local(read::serve(disk.clone(), jobs, Arc::clone(&counters)));
    // Every third recorder is short of memory: chunks give way while others begin and end.
    let budget_bytes = if manner.seed % 3 == 1 { 64 << 10 } else { 8 << 20 };
    let budget = Budget::new(budget_bytes);
    let context = writer::Context {
        volumes: Arc::clone(&volumes),
        rule: ChunkRule {
            chunk_bytes: 24 << 10,
            commit_interval: Duration::ZERO,
            tail_max_age: Duration::from_secs(60),
        },
        segment_bytes: 128 << 10,
        index: true,
        prealloc: Arc::new(PreallocBudget::new(1 << 20)),
        budget: budget.clone(),
        budget_bytes,
        writers: 1,
        committer: committer.clone(),
        steward: steward.clone(),
        counters,
        stats,
        health: Arc::clone(&health),
    };
    let (to_writer, from_front) = lane(limits::WRITER_LANE_DEPTH);
    tokio::task::spawn_local(writer::run(disk.clone(), from_front, context));
    let lifecycle = Lifecycle {
        catalog,
        committer,
        writers: WriterHandles::new(vec![to_writer]),
        steward: steward.clone(),
        loader: Loader::new(reads, 1 << 20),
        compression: Compression::None,
        registry: Registry::empty(OntologyMode::Open),
        data_dir: config.data_dir.clone(),
    };
    Life { lifecycle, steward, budget, config: Rc::new(config), failing_commits, health }
}

/// Runs a body on a thread of its own kind: one, with simulated time.
pub(super) fn on_one_thread<F: Future>(body: F) -> F::Output {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    LocalSet::new().block_on(&runtime, body)
}
