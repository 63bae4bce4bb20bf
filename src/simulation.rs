//! The ingest line, recovery and resume on a disk that lies: crash, recover, check, go on.
//!
//! Writer, steward, reader and committer run unchanged, on one thread and simulated time, over
//! `storage::sim` and a real RocksDB: its synced commits survive, some fail with an unknown outcome, and
//! now and then all of it is lost and made again from the files. Each seed is one recorder that
//! crashes several times; after each crash every promise is checked against a ledger of what its
//! clients sent and were told. A failure prints the seed; `./x sim --seed S` repeats it.

use crate::config::raw::Raw;
use crate::config::{Config, HostFacts, OntologyMode};
use crate::health::Health;
use crate::ingest::admit::Budget;
use crate::ingest::committer::{self, End};
use crate::ingest::gather::ChunkRule;
use crate::ingest::lane::lane;
use crate::ingest::steward::{self, StewardHandle};
use crate::ingest::topic::Batch;
use crate::ingest::writer::{self, Message, PreallocBudget, WriterHandles};
use crate::lifecycle::{Lifecycle, NewTopic, UploadKey};
use crate::limits;
use crate::ontology::Registry;
use crate::recovery::recover_all;
use crate::stats::Stats;
use arrow::array::{ArrayRef, AsArray, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use storage::catalog::records::TopicRecord;
use storage::catalog::skip::indexed;
use storage::catalog::{Catalog, Fate, Look, Simulated};
use storage::chunk::hash::batch_hash;
use storage::chunk::{BatchMark, Compression, Format, data_bytes};
use storage::disk::IoCounters;
use storage::ids::{SequenceId, TopicId};
use storage::read::{self, Loader, RowStream, TopicView, Window};
use storage::rebuild::rebuild;
use storage::recover::Receipt;
use storage::schema::TopicSchema;
use storage::sim::{Faults, Random, SimDisk};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// Seeds of a run, crashes of each, and tests they are spread over.
const SEEDS: u64 = 2000;
const LIVES: u64 = 5;
const PARTS: u64 = 4;

/// What clients sent and were told of a topic.
#[derive(Debug, Clone)]
struct TopicLedger {
    id: TopicId,
    locator: String,
    rows_per_batch: u64,
    blob_bytes: usize,
    /// Batches sent, and told to be durable.
    sent: u64,
    acked: u64,
    /// Told to be locked.
    locked: bool,
    /// A clean end was asked for.
    ending: bool,
    /// Only the catalog knew of it, and that was lost.
    lost: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gone {
    No,
    Asked,
    Told,
}

#[derive(Debug, Clone)]
struct SequenceLedger {
    id: SequenceId,
    name: String,
    topics: Vec<TopicLedger>,
    gone: Gone,
    finalized: bool,
    /// Only the catalog knew of it, and that was lost.
    lost: bool,
}

type Ledger = Rc<RefCell<Vec<SequenceLedger>>>;

/// A recorder between two crashes.
#[derive(Clone)]
struct Life {
    lifecycle: Lifecycle,
    steward: StewardHandle,
    budget: Budget,
    config: Rc<Config>,
    failing_commits: Arc<AtomicU64>,
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("value", DataType::Int64, true),
        Field::new("blob", DataType::Binary, false),
    ]))
}

fn value(row: i64) -> i64 {
    row.wrapping_mul(0x9e37_79b9) ^ 0x55
}

fn rows(topic: &TopicLedger, batch: u64) -> RecordBatch {
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
struct Manner {
    /// How far the steward may lag behind the uploads whose files it seals.
    lag: u64,
    /// Decides over commits that fail.
    seed: u64,
    /// See [`Simulated::replays_tail`].
    replays_tail: bool,
}

const CALM: Manner = Manner { lag: 200, seed: 0, replays_tail: false };

/// What is wrong beyond the rules, for the checks to notice.
#[derive(Debug, Clone, Copy, Default)]
struct Planted {
    disk: Faults,
    replays_tail: bool,
}

/// `failing`: commits that fail, of 1,000; half of them are durable all the same.
fn open_catalog(store: &Path, manner: Manner, failing: &Arc<AtomicU64>) -> Catalog {
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

/// Starts everything on this thread.
fn begin(disk: &SimDisk, store: &Path, manner: Manner) -> Life {
    let mut raw = Raw::defaults();
    raw.set("data_dir", store.join("data").display().to_string(), "test").expect("a key");
    let host = HostFacts { memory_bytes: 1 << 30, cores: 1, free_bytes: 1 << 30, disk_bytes: 1 << 30 };
    let config = Config::check(&raw, &host).expect("defaults");
    let failing_commits = Arc::default();
    let catalog = open_catalog(store, manner, &failing_commits);
    let (stats, counters) = (Arc::new(Stats::default()), IoCounters::shared());
    let (committer, commits) = committer::pair();
    let health = Arc::new(Health::default());
    tokio::task::spawn_local(committer::run(catalog.clone(), commits, Arc::clone(&stats), Arc::clone(&health)));
    let (steward, jobs) = StewardHandle::new();
    let context = steward::Context {
        catalog: catalog.clone(),
        committer: committer.clone(),
        data_dir: config.data_dir.clone(),
        counters: Arc::clone(&counters),
        health: Arc::clone(&health),
    };
    tokio::task::spawn_local(steward::serve(disk.slowed(manner.lag), jobs, context));
    let (reads, jobs) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
    tokio::task::spawn_local(read::serve(disk.clone(), jobs, Arc::clone(&counters)));
    let budget = Budget::new(8 << 20);
    let context = writer::Context {
        data_dir: config.data_dir.clone(),
        rule: ChunkRule {
            chunk_bytes: 24 << 10,
            commit_interval: Duration::ZERO,
            tail_max_age: Duration::from_secs(60),
        },
        segment_bytes: 128 << 10,
        index: true,
        prealloc: Arc::new(PreallocBudget::new(1 << 20)),
        budget: budget.clone(),
        budget_bytes: 8 << 20,
        committer: committer.clone(),
        steward: steward.clone(),
        counters,
        stats,
        health,
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
    Life { lifecycle, steward, budget, config: Rc::new(config), failing_commits }
}

/// Runs a body on a thread of its own kind: one, with simulated time.
fn on_one_thread<F: Future>(body: F) -> F::Output {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    LocalSet::new().block_on(&runtime, body)
}

// --- clients ---

/// Clients go on with what was interrupted and record something new, until the crash.
async fn clients(life: Life, ledger: Ledger, seed: u64) {
    let mut random = Random::new(seed);
    let mut uploads = Vec::new();
    let open: Vec<(usize, usize)> = {
        let ledger = ledger.borrow();
        let all = ledger.iter().enumerate().filter(|(_, sequence)| sequence.gone == Gone::No && !sequence.finalized);
        all.filter(|(_, sequence)| !sequence.lost)
            .flat_map(|(at, sequence)| (0..sequence.topics.len()).map(move |topic| (at, topic)))
            .filter(|(at, topic)| !ledger[*at].topics[*topic].locked && !ledger[*at].topics[*topic].lost)
            .collect()
    };
    for (sequence, topic) in open {
        if random.below(2) == 0 {
            let upload = upload(life.clone(), Rc::clone(&ledger), sequence, topic, random.bits());
            uploads.push(tokio::task::spawn_local(upload));
        }
    }
    let name = format!("s{}", ledger.borrow().len());
    if let Ok(record) = life.lifecycle.create_sequence(name.clone(), "{}".to_owned(), true).await {
        let at = ledger.borrow().len();
        ledger.borrow_mut().push(SequenceLedger {
            id: record.id,
            name: name.clone(),
            topics: Vec::new(),
            gone: Gone::No,
            finalized: false,
            lost: false,
        });
        for index in 0..1 + random.below(3) {
            let format = if random.below(2) == 0 { Format::Image } else { Format::Default };
            let new = NewTopic {
                locator: format!("{name}/t{index}"),
                ontology_tag: "sim".to_owned(),
                format,
                user_metadata: "{}".to_owned(),
            };
            let Ok(topic) = life.lifecycle.create_topic(UploadKey::Sequence(record.id), new).await else { return };
            let big = random.below(2) == 0;
            let (rows_per_batch, blob_bytes) = if big { (2, 9000) } else { (1 + random.below(20), 30) };
            let entry = TopicLedger {
                id: topic.id,
                locator: topic.locator,
                rows_per_batch,
                blob_bytes,
                sent: 0,
                acked: 0,
                locked: false,
                ending: false,
                lost: false,
            };
            ledger.borrow_mut()[at].topics.push(entry);
            let upload = upload(life.clone(), Rc::clone(&ledger), at, index as usize, random.bits());
            uploads.push(tokio::task::spawn_local(upload));
        }
        if random.below(5) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(30))).await;
            ledger.borrow_mut()[at].gone = Gone::Asked;
            if life.lifecycle.abort_sequence(name.clone(), record.id).await.is_ok() {
                ledger.borrow_mut()[at].gone = Gone::Told;
            }
        }
    }
    for upload in uploads {
        upload.await.expect("an upload's task");
    }
    let whole: Vec<(usize, String, SequenceId)> = ledger
        .borrow()
        .iter()
        .enumerate()
        .filter(|(_, s)| {
            s.gone == Gone::No && !s.finalized && !s.lost && s.topics.iter().all(|topic| topic.locked || topic.lost)
        })
        .map(|(at, sequence)| (at, sequence.name.clone(), sequence.id))
        .collect();
    for (at, name, id) in whole {
        if life.lifecycle.finalize_sequence(name, id, false).await.is_ok() {
            ledger.borrow_mut()[at].finalized = true;
        }
    }
}

/// One upload; one that ends without a lock is often resumed at once, while its files are being sealed.
async fn upload(life: Life, ledger: Ledger, sequence: usize, topic: usize, seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..4 {
        let left = upload_once(&life, &ledger, sequence, topic, random.bits()).await;
        if !left || random.below(4) == 0 {
            return;
        }
    }
}

/// Returns whether the topic was left unlocked.
async fn upload_once(life: &Life, ledger: &Ledger, sequence: usize, topic: usize, seed: u64) -> bool {
    let mut random = Random::new(seed);
    let entry = ledger.borrow()[sequence].topics[topic].clone();
    let Ok((_, durable, _)) = life.lifecycle.topic_status(entry.locator.clone()).await else { return false };
    let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
    let opened = life.lifecycle.open_upload(entry.locator.clone(), entry.id, schema, Some(durable.batches)).await;
    let Ok(opened) = opened else { return false };
    {
        // What was sent before and is not durable, this upload makes anew.
        let mut ledger = ledger.borrow_mut();
        let topic = &mut ledger[sequence].topics[topic];
        topic.sent = durable.batches;
        topic.ending = false;
    }
    let mut watermark = opened.watermark.clone();
    let told = Rc::clone(ledger);
    let watcher = tokio::task::spawn_local(async move {
        while watermark.changed().await.is_ok() {
            let batches = watermark.borrow_and_update().batches;
            let mut ledger = told.borrow_mut();
            let topic = &mut ledger[sequence].topics[topic];
            topic.acked = topic.acked.max(batches);
        }
    });
    let lane = life.lifecycle.writers.of(opened.topic.no).clone();
    for batch in durable.batches..durable.batches + 1 + random.below(25) {
        let message = message(life, &entry, batch).await;
        {
            let mut ledger = ledger.borrow_mut();
            let topic = &mut ledger[sequence].topics[topic];
            topic.sent = topic.sent.max(batch + 1);
        }
        if lane.send(Message::Batch { topic: opened.topic.no, batch: Box::new(message) }).await.is_err() {
            return false;
        }
        if random.below(3) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        }
    }
    let end = if random.below(3) == 0 { End::Leave } else { End::Lock };
    ledger.borrow_mut()[sequence].topics[topic].ending |= end == End::Lock;
    let ended = life.lifecycle.end_upload(opened.topic.no, end).await;
    if ended.is_ok() && end == End::Lock {
        let mut ledger = ledger.borrow_mut();
        let topic = &mut ledger[sequence].topics[topic];
        topic.locked = true;
        topic.acked = topic.sent;
    }
    watcher.abort();
    ended.is_ok() && end == End::Leave
}

/// A batch as the front hands it to a writer.
async fn message(life: &Life, topic: &TopicLedger, batch: u64) -> Batch {
    let rows = rows(topic, batch);
    let bytes = data_bytes(&rows);
    let time = (batch * topic.rows_per_batch) as i64;
    Batch {
        mark: BatchMark { rows: rows.num_rows() as u32, hash: batch_hash(&rows) },
        data_bytes: bytes,
        time: Some((time, time + topic.rows_per_batch as i64 - 1)),
        sorted: true,
        permit: life.budget.receive.claim(bytes).await,
        decode_permit: None,
        arrived: Instant::now(),
        sent: Instant::now(),
        rows,
    }
}

// --- promises ---

async fn check(life: &Life, ledger: &Ledger) {
    let sequences = ledger.borrow().clone();
    for sequence in sequences {
        let known = life.lifecycle.catalog.sequence_by_name(&sequence.name).expect("readable");
        match (sequence.gone, known.is_some()) {
            (Gone::Told, known) => {
                assert!(!known, "INV-4: {} was aborted and is there", sequence.name);
                continue;
            }
            (Gone::Asked, false) => continue,
            (Gone::No, false) if sequence.lost => continue,
            (Gone::No, known) => assert!(known, "INV-1: {} was created and is gone", sequence.name),
            (Gone::Asked, true) => {}
        }
        for topic in sequence.topics.iter().filter(|topic| !topic.lost) {
            check_topic(life, topic).await;
        }
    }
}

async fn check_topic(life: &Life, topic: &TopicLedger) {
    let catalog = &life.lifecycle.catalog;
    let record = catalog.topic_by_locator(&topic.locator).expect("readable");
    let record = record.unwrap_or_else(|| panic!("INV-1: {} was created and is gone", topic.locator));
    let totals = catalog.totals(record.no).expect("readable");
    let name = &topic.locator;
    assert!(topic.acked <= totals.batches, "INV-1: {name}: {} batches told, {} durable", topic.acked, totals.batches);
    assert!(totals.batches <= topic.sent, "INV-2: {name}: {} batches sent, {} durable", topic.sent, totals.batches);
    assert_eq!(totals.rows, totals.batches * topic.rows_per_batch, "INV-2: {name}");
    let locked = record.completed_at_ns.is_some();
    assert!(locked || !topic.locked, "INV-1: {name} was told to be locked and is not");
    assert!(!locked || topic.ending, "INV-12: {name} is locked without a clean end");
    if locked {
        assert_eq!(totals.batches, topic.sent, "INV-12: {name} is locked without all of its batches");
    }
    let pin = catalog.pin().expect("open");
    let view = TopicView::load(&pin.view(), &life.lifecycle.data_dir, record).expect("readable");
    drop(pin);
    let Some(view) = view else {
        assert_eq!(totals.batches, 0, "INV-1: {name} has no schema");
        return;
    };
    let mut stream = RowStream::new(Arc::new(view), life.lifecycle.loader.clone(), Window::default(), 1 << 20);
    let mut next = 0;
    while let Some(batch) = stream.next().await.unwrap_or_else(|error| panic!("INV-1: {name}: {error}")) {
        let times = batch.column(0).as_primitive::<Int64Type>();
        let values = batch.column(1).as_primitive::<Int64Type>();
        let blobs = batch.column(2).as_binary::<i32>();
        for row in 0..batch.num_rows() {
            assert_eq!(times.value(row), next, "INV-2: {name}");
            assert_eq!(values.value(row), value(next), "INV-1: {name}, row {next}");
            assert!(blobs.value(row).iter().all(|byte| *byte == next as u8), "INV-1: {name}, row {next}");
            next += 1;
        }
    }
    assert_eq!(next as u64, totals.rows, "INV-2: {name}");
}

/// Recovers, checks, and recovers again, which must change nothing (INV-5).
async fn recover_and_check(life: &Life, disk: &SimDisk, ledger: &Ledger) {
    let recover = async || {
        let (catalog, committer) = (&life.lifecycle.catalog, &life.lifecycle.committer);
        let done = recover_all(&life.config, catalog, committer, &life.steward, Receipt::default()).await;
        done.expect("INV-9: recovery ends");
    };
    recover().await;
    check(life, ledger).await;
    let before = disk.contents();
    recover().await;
    assert!(before == disk.contents(), "INV-5: a second recovery changed a file");
    check(life, ledger).await;
}

/// The catalog is gone: another is made from the files. Returns what clients were told and is lost with it.
async fn lose_catalog(disk: &SimDisk, store: &Path, ledger: &Ledger) {
    let old = open_catalog(store, CALM, &Arc::default());
    let fresh = store.join("fresh");
    let new = Catalog::open_small(&fresh, Simulated::default()).expect("a new catalog");
    // A file that the crash met before its head was durable says nothing of itself and is set aside: what had
    // committed chunks is checked below.
    rebuild(disk, &store.join("data"), &new, 0, &mut |_| {}).await.expect("INV-9: it is made again");
    let mut ledger = ledger.borrow_mut();
    for sequence in ledger.iter_mut() {
        let known = new.sequence(sequence.id).expect("readable").is_some();
        assert!(known || !sequence.finalized, "INV-9: {} was finalized and did not come back", sequence.name);
        if known && sequence.gone != Gone::No {
            // Its deletion was known to the catalog alone, if its files are still there.
            sequence.gone = if sequence.gone == Gone::Told { Gone::Told } else { Gone::Asked };
        }
        for topic in &mut sequence.topics {
            let before = old.topic_by_id(topic.id).expect("readable");
            let after = new.topic_by_id(topic.id).expect("readable");
            let chunks = |look: &Catalog, record: &Option<TopicRecord>| match record {
                Some(record) => look.totals(record.no).expect("readable").chunk_batches,
                None => 0,
            };
            let (had, has) = (chunks(&old, &before), chunks(&new, &after));
            assert!(had <= has, "INV-9: {}: {had} batches were in chunks, {has} came back", topic.locator);
            if sequence.finalized {
                assert_eq!(before, after, "INV-9: {} came back changed", topic.locator);
                check_index(&old, &new, topic.id);
            }
            // Without a chunk there is no file that could tell of it.
            topic.lost |= after.is_none() && !sequence.finalized;
            let locked = after.is_some_and(|after| after.completed_at_ns.is_some());
            if !locked {
                // Only tails may be missing, and what only the catalog knew.
                topic.acked = topic.acked.min(has);
                topic.locked = false;
            }
        }
        sequence.lost |= !known;
    }
    drop((old, new));
    std::fs::remove_dir_all(store.join("catalog")).expect("removed");
    std::fs::rename(&fresh, store.join("catalog")).expect("renamed");
}

/// The skip index of a finalized topic is the same as before.
fn check_index(old: &Catalog, new: &Catalog, topic: TopicId) {
    let of = |catalog: &Catalog| {
        let pin = catalog.pin().expect("open");
        let look = pin.view();
        let Some(record) = look.topic_by_id(topic).expect("readable") else { return Vec::new() };
        let Some(ontology) = look.ontology_of(record.no).expect("readable") else { return Vec::new() };
        let rows: Vec<u64> = look.chunks(record.no).expect("readable").iter().map(|chunk| chunk.first_row).collect();
        indexed(&look, record.no, &ontology, &rows).expect("readable")
    };
    assert_eq!(of(old), of(new), "INV-6: the index came back changed");
}

/// One recorder, crashed again and again; returns how many crashes there were. `planted`: what goes wrong
/// beyond the rules, which the checks must notice.
fn run_seed(seed: u64, planted: Planted) -> u64 {
    let base = if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm") } else { Path::new("/tmp") };
    let store = tempfile::tempdir_in(base).expect("a folder");
    std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
    let ledger = Ledger::default();
    let mut random = Random::new(seed);
    let disk = SimDisk::new(random.bits(), u64::MAX, Faults::default());
    let mut disk = on_one_thread(async {
        let dirs = store.path().join("data/sequences");
        storage::disk::make_dirs(&disk, Path::new("/"), &dirs).await.expect("folders");
        disk
    });
    let calm = Manner { replays_tail: planted.replays_tail, ..CALM };
    for _ in 0..LIVES {
        let faults = match random.below(4) {
            0 => Faults { writes: 20, syncs: 20, reads: 5, ..planted.disk },
            1 => Faults { space: 15, stuck: 5, ..planted.disk },
            _ => planted.disk,
        };
        let failing_commits = if random.below(4) == 0 { 100 } else { 0 };
        let manner = Manner { lag: 1 + random.below(200), seed: random.bits(), ..calm };
        let in_recovery = random.below(5) == 0;
        let catalog_lost = random.below(20) == 0;
        let (seed, recovery_crash, crash) = (random.bits(), 1 + random.below(30), 1 + random.below(600));
        on_one_thread(async {
            if catalog_lost {
                lose_catalog(&disk, store.path(), &ledger).await;
            }
            let life = begin(&disk, store.path(), if in_recovery { calm } else { manner });
            if in_recovery {
                // The crash may meet the recovery itself.
                disk.arm(recovery_crash, planted.disk);
                let (config, catalog, committer) = (&life.config, &life.lifecycle.catalog, &life.lifecycle.committer);
                tokio::select! {
                    biased;
                    () = disk.crashed() => return,
                    _ = recover_all(config, catalog, committer, &life.steward, Receipt::default()) => {}
                }
            }
            disk.arm(u64::MAX / 2, planted.disk);
            recover_and_check(&life, &disk, &ledger).await;
            disk.arm(crash, faults);
            life.failing_commits.store(failing_commits, Ordering::Relaxed);
            tokio::select! {
                biased;
                () = disk.crashed() => {}
                () = clients(life, Rc::clone(&ledger), seed) => {}
            }
        });
        disk = disk.after_crash(u64::MAX, Faults::default());
    }
    on_one_thread(async {
        let life = begin(&disk, store.path(), calm);
        recover_and_check(&life, &disk, &ledger).await;
    });
    LIVES
}

/// One of four parts of the run, so that they share the cores.
fn run_part(part: u64) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seeds: Vec<u64> = match number("SIM_SEED") {
        Some(seed) if part == 0 => vec![seed],
        Some(_) => Vec::new(),
        None => (0..number("SIM_SEEDS").unwrap_or(SEEDS)).filter(|seed| seed % PARTS == part).collect(),
    };
    let mut crashes = 0;
    for seed in &seeds {
        match std::panic::catch_unwind(|| run_seed(*seed, Planted::default())) {
            Ok(more) => crashes += more,
            Err(panic) => {
                eprintln!("seed {seed} failed; repeat it by: ./x sim --seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{crashes} simulated crashes over {} seeds, no promise broken", seeds.len());
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_1() {
    run_part(0);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_2() {
    run_part(1);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_3() {
    run_part(2);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_4() {
    run_part(3);
}

/// The seal of the upload before comes while the next one writes: it must leave that one's segment alone.
#[test]
fn inv_1_a_topic_resumed_while_its_files_are_being_sealed_keeps_what_it_was_told() {
    for seed in 0..30 {
        let store = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
        let disk = SimDisk::new(seed, u64::MAX, Faults::default());
        on_one_thread(async {
            let life = begin(&disk, store.path(), Manner { lag: 4 + seed * 6, ..CALM });
            let sequence =
                life.lifecycle.create_sequence("s".to_owned(), "{}".to_owned(), true).await.expect("created");
            let mut topics = Vec::new();
            for name in ["s/a", "s/b"] {
                let new = NewTopic {
                    locator: name.to_owned(),
                    ontology_tag: "sim".to_owned(),
                    format: Format::Image,
                    user_metadata: "{}".to_owned(),
                };
                let record = life.lifecycle.create_topic(UploadKey::Sequence(sequence.id), new).await.expect("created");
                let (id, locator) = (record.id, record.locator);
                topics.push(TopicLedger {
                    id,
                    locator,
                    rows_per_batch: 2,
                    blob_bytes: 14_000,
                    sent: 0,
                    acked: 0,
                    locked: false,
                    ending: false,
                    lost: false,
                });
            }
            // The first topic's seal keeps the steward busy while the second one is resumed.
            put_one_by_one(&life, &mut topics[0], 6).await;
            put_one_by_one(&life, &mut topics[1], 6).await;
            put_one_by_one(&life, &mut topics[1], 60).await;
            check_topic(&life, &topics[1]).await;
        });
    }
}

/// An upload that is left unlocked, each batch sent when the one before is durable.
async fn put_one_by_one(life: &Life, topic: &mut TopicLedger, count: u64) {
    let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
    let opened = life.lifecycle.open_upload(topic.locator.clone(), topic.id, schema, Some(topic.sent)).await;
    let opened = opened.expect("opened");
    let mut watermark = opened.watermark.clone();
    let lane = life.lifecycle.writers.of(opened.topic.no).clone();
    for batch in topic.sent..topic.sent + count {
        let message = message(life, topic, batch).await;
        lane.send(Message::Batch { topic: opened.topic.no, batch: Box::new(message) }).await.expect("sent");
        watermark.wait_for(|mark| mark.batches > batch || mark.failed.is_some()).await.expect("told");
        topic.acked = watermark.borrow().batches;
    }
    topic.sent += count;
    life.lifecycle.end_upload(opened.topic.no, End::Leave).await.expect("left");
}

/// A disk that puts writes beside their place and rots at rest: what is read is right or said to be damaged,
/// chunk by chunk, and the recorder starts.
#[test]
fn inv_9_on_a_disk_that_rots_every_chunk_is_right_or_said_to_be_damaged() {
    let (mut right, mut damaged) = (0, 0);
    for seed in 0..60 {
        let store = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
        let mut random = Random::new(seed);
        let disk = SimDisk::new(random.bits(), u64::MAX, Faults::default());
        let ledger = Ledger::default();
        on_one_thread(async {
            let dirs = store.path().join("data/sequences");
            storage::disk::make_dirs(&disk, Path::new("/"), &dirs).await.expect("folders");
            let life = begin(&disk, store.path(), CALM);
            let misdirected = if seed % 2 == 0 { 15 } else { 0 };
            disk.arm(u64::MAX / 2, Faults { misdirected, ..Faults::default() });
            clients(life, Rc::clone(&ledger), random.bits()).await;
        });
        let disk = disk.after_crash(u64::MAX, Faults::default());
        for (path, bytes) in disk.contents() {
            if random.below(2) == 0 && !bytes.is_empty() {
                disk.rot(&path, random.below(bytes.len() as u64) as usize, random.below(8) as u8);
            }
        }
        on_one_thread(async {
            let life = begin(&disk, store.path(), CALM);
            let (catalog, committer) = (&life.lifecycle.catalog, &life.lifecycle.committer);
            let done = recover_all(&life.config, catalog, committer, &life.steward, Receipt::default()).await;
            done.expect("INV-9: the recorder starts");
            let topics: Vec<TopicLedger> =
                ledger.borrow().iter().flat_map(|sequence| sequence.topics.clone()).collect();
            for topic in &topics {
                let Some(record) = catalog.topic_by_locator(&topic.locator).expect("readable") else { continue };
                let view = TopicView::load(&catalog.pin().expect("open").view(), &life.lifecycle.data_dir, record);
                let Some(view) = view.expect("readable") else { continue };
                for place in view.places() {
                    match life.lifecycle.loader.load(&view, place).await {
                        Ok(rows) => {
                            check_rows(topic, &rows);
                            right += 1;
                        }
                        Err(error) => {
                            assert!(error.is_damage(), "{}: {error}", topic.locator);
                            damaged += 1;
                        }
                    }
                }
            }
        });
    }
    assert!(right > 100, "{right} right");
    assert!(damaged > 5, "{damaged} damaged");
}

fn check_rows(topic: &TopicLedger, rows: &RecordBatch) {
    let times = rows.column(0).as_primitive::<Int64Type>();
    let values = rows.column(1).as_primitive::<Int64Type>();
    let blobs = rows.column(2).as_binary::<i32>();
    for row in 0..rows.num_rows() {
        let time = times.value(row);
        assert_eq!(values.value(row), value(time), "INV-9: {}, row {time}", topic.locator);
        let whole =
            blobs.value(row).len() == topic.blob_bytes && blobs.value(row).iter().all(|byte| *byte == time as u8);
        assert!(whole, "INV-9: {}, row {time}", topic.locator);
    }
}

/// The checks can fail: a planted bug is noticed within 1,000 crashes, by a promise.
#[track_caller]
fn check_noticed(planted: Planted) {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let noticed = (0..1000 / LIVES).find_map(|seed| std::panic::catch_unwind(|| run_seed(seed, planted)).err());
    std::panic::set_hook(quiet);
    let panic = noticed.unwrap_or_else(|| panic!("{planted:?} was not noticed within 1,000 crashes"));
    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(text.contains("INV-"), "noticed, but not by a promise: {text}");
}

#[test]
fn inv_1_an_acknowledgement_before_the_data_is_durable_is_noticed() {
    check_noticed(Planted { disk: Faults { file_syncs_lie: true, ..Faults::default() }, ..Planted::default() });
}

#[test]
fn inv_1_a_chunk_in_a_file_whose_folder_was_not_synced_is_noticed() {
    check_noticed(Planted { disk: Faults { folder_syncs_lie: true, ..Faults::default() }, ..Planted::default() });
}

#[test]
fn inv_2_a_tail_entry_below_the_last_chunk_that_is_replayed_is_noticed() {
    check_noticed(Planted { replays_tail: true, ..Planted::default() });
}
