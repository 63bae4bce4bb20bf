//! Starts and stops everything, in this order; the only file that knows all rooms.
//!
//! Start: folder and lock, disk, catalog, committer, steward and reader, recovery, writers, sockets,
//! READY. Stop: sockets take no more, uploads end with their durable prefix, writers finish and
//! stop, what was asked of the steward is done, the catalog closes.

use crate::config::{Config, EngineChoice};
use crate::flight::server::Listeners;
use crate::flight::service::Shared;
use crate::ingest::admit::Budget;
use crate::ingest::committer::{self, CommitHandle};
use crate::ingest::lane::{Receiver, lane};
use crate::ingest::steward::{self, StewardHandle};
use crate::ingest::writer::{self, Message, PreallocBudget, WriterHandles};
use crate::lifecycle::{Lifecycle, LifecycleError, is_locked};
use crate::ontology::Registry;
use crate::stats::{Station, Stats};
use crate::{host, limits, systemd};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{TopicOntology, TopicRecord};
use storage::catalog::skip::unfolded_topics;
use storage::catalog::{Catalog, Look};
use storage::disk::{Disk, DiskState, Engine, IoCounters};
use storage::limits::{RING_BUFFERS_PER_SERVICE, RING_BUFFERS_PER_WRITER};
use storage::ontology::Origin;
use storage::read::{self, Loader};
use storage::{StorageError, posix, recover, uring};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};

type AnyError = Box<dyn std::error::Error>;

/// On-disk format written by this version; a newer one is refused.
const FORMAT_VERSION: u32 = 2;
/// The kernel keeps a dead process's ring files, and so its lock, for a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What is left out so that the rest can be measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bench {
    /// Batches are decoded and dropped.
    pub(crate) null_sink: bool,
    /// Chunks get no statistics.
    pub(crate) no_index: bool,
}

/// Runs the daemon until SIGTERM or SIGINT.
pub(crate) fn run(config: Config, bench: Bench) -> Result<(), AnyError> {
    let started = Instant::now();
    host::raise_descriptor_limit();
    let (_lock, format) = prepare_data_dir(&config.data_dir)?;
    let disk = uring::probe(&config.data_dir, config.engine == EngineChoice::Auto);
    for note in &disk.notes {
        tracing::warn!("{note}");
    }
    let catalog = Catalog::open(&config.data_dir.join("catalog"), disk.direct)?;
    let stats = Arc::new(Stats::default());
    let counters = IoCounters::shared();
    let (committer, committer_thread) = committer::start(catalog.clone(), Arc::clone(&stats))?;
    let (steward, steward_thread) = start_steward(&config, &disk, &catalog, &committer, &counters)?;
    let (loader, reader_thread) = start_reader(&config, &disk, &counters)?;

    let front = tokio::runtime::Builder::new_multi_thread().thread_name("fb-front").enable_all().build()?;
    let control =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("fb-control").enable_all().build()?;
    systemd::status("recovering");
    let recovered = front.block_on(recover_all(&config, &catalog, &steward))?;
    let registry = front.block_on(Registry::load(&catalog, &committer, config.ontology))?;
    if format < FORMAT_VERSION {
        front.block_on(migrate_from_1(&catalog, &committer, &registry))?;
        write_format(&config.data_dir)?;
        tracing::info!(
            from = format,
            to = FORMAT_VERSION,
            "data folder migrated; `flightbox reindex` speeds up its queries"
        );
    }

    let budget = Budget::new(config.memory_budget_bytes);
    let context = writer::Context {
        data_dir: config.data_dir.clone(),
        rule: config.chunk_rule(),
        segment_bytes: config.segment_bytes,
        index: !bench.no_index,
        prealloc: Arc::new(PreallocBudget::new(config.prealloc_bytes)),
        budget: budget.clone(),
        budget_bytes: config.memory_budget_bytes / config.writers as u64,
        committer: committer.clone(),
        steward: steward.clone(),
        counters: Arc::clone(&counters),
        stats: Arc::clone(&stats),
    };
    let (writers, writer_threads) = start_writers(&config, &disk, &context)?;
    drop(context);
    let lifecycle = Lifecycle {
        catalog,
        committer,
        writers: writers.clone(),
        steward,
        loader,
        compression: config.compression,
        registry,
        data_dir: config.data_dir.clone(),
    };
    if config.seal_on_restart {
        let finalized = front.block_on(lifecycle.finalize_interrupted())?;
        tracing::info!(sessions = finalized, "interrupted recordings finalized as they are (on_restart = seal)");
    }
    let (stop, stopping) = watch::channel(false);
    let shared = Arc::new(Shared {
        config,
        lifecycle,
        budget,
        stats: Arc::clone(&stats),
        counters,
        disk,
        null_sink: bench.null_sink,
        queries: Arc::new(Semaphore::new(limits::QUERIES_AT_ONCE)),
        control: control.handle().clone(),
        stopping: stopping.clone(),
    });
    front.block_on(serve(Arc::clone(&shared), stop, stopping, &recovered, started))?;

    front.block_on(writers.stop());
    front.shutdown_timeout(Duration::from_secs(1));
    control.shutdown_timeout(Duration::from_secs(1));
    log_summary(&stats);
    // The threads end when the last handle to them is gone.
    drop((shared, writers));
    for thread in writer_threads.into_iter().chain([steward_thread, reader_thread, committer_thread]) {
        join(thread);
    }
    tracing::info!("stopped");
    Ok(())
}

/// A stopped recorder's folder, opened for a command.
pub(crate) struct Offline {
    pub(crate) catalog: Catalog,
    pub(crate) committer: CommitHandle,
    pub(crate) loader: Loader,
}

/// Runs a command on the folder of a stopped recorder: the same lock, catalog and reader as the daemon.
pub(crate) fn offline<F, R>(config: &Config, command: impl FnOnce(Offline) -> F) -> Result<R, AnyError>
where
    F: Future<Output = Result<R, AnyError>>,
{
    let (_lock, format) = prepare_data_dir(&config.data_dir)?;
    if format < FORMAT_VERSION {
        return Err("the folder has an older format; start `flightbox serve` on it once, which migrates it".into());
    }
    let disk = uring::probe(&config.data_dir, config.engine == EngineChoice::Auto);
    let catalog = Catalog::open(&config.data_dir.join("catalog"), disk.direct)?;
    let (committer, committer_thread) = committer::start(catalog.clone(), Arc::new(Stats::default()))?;
    let (loader, reader_thread) = start_reader(config, &disk, &IoCounters::shared())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(command(Offline { catalog, committer, loader }));
    runtime.shutdown_timeout(Duration::from_secs(1));
    join(reader_thread);
    join(committer_thread);
    result
}

fn join(thread: JoinHandle<()>) {
    let name = thread.thread().name().unwrap_or("thread").to_owned();
    if thread.join().is_err() {
        tracing::error!(thread = name, "thread panicked");
    }
}

/// Makes the folder, takes its lock, checks its format and returns it.
fn prepare_data_dir(dir: &Path) -> Result<(File, u32), AnyError> {
    for folder in [dir.to_owned(), dir.join("sequences"), dir.join("browse")] {
        std::fs::create_dir_all(&folder).map_err(|error| StorageError::io("make folder", &folder, error))?;
    }
    let path = dir.join("LOCK");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| StorageError::io("open", &path, error))?;
    let since = Instant::now();
    while let Err(error) = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        if since.elapsed() > LOCK_PATIENCE {
            let text =
                format!("{} is in use by another flightbox ({error}); stop it or choose another --data", dir.display());
            return Err(StorageError::Directory(text).into());
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let format = check_format(dir)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| StorageError::io("sync folder", dir, error))?;
    Ok((lock, format))
}

fn check_format(dir: &Path) -> Result<u32, AnyError> {
    let path = dir.join("format-version");
    match std::fs::read_to_string(&path) {
        Ok(text) => match text.trim().parse::<u32>() {
            Ok(version) if version <= FORMAT_VERSION => Ok(version),
            Ok(version) => Err(StorageError::Directory(format!(
                "{} has format {version}, this flightbox writes {FORMAT_VERSION}; use a newer flightbox",
                dir.display()
            ))
            .into()),
            Err(_) => {
                Err(StorageError::Directory(format!("{} does not hold a number: {text:?}", path.display())).into())
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write_format(dir)?;
            Ok(FORMAT_VERSION)
        }
        Err(error) => Err(StorageError::io("read", &path, error).into()),
    }
}

fn write_format(dir: &Path) -> Result<(), AnyError> {
    let (path, fresh) = (dir.join("format-version"), dir.join("format-version.new"));
    let made = std::fs::write(&fresh, format!("{FORMAT_VERSION}\n"))
        .and_then(|()| File::open(&fresh)?.sync_all())
        .and_then(|()| std::fs::rename(&fresh, &path))
        .and_then(|()| File::open(dir)?.sync_all());
    Ok(made.map_err(|error| StorageError::io("write", &path, error))?)
}

/// Format 1 knew no ontologies: its topics get their version and their place under their tag, in one
/// synced step. Their chunks have no entry in the index, so queries read them until `flightbox reindex`.
async fn migrate_from_1(
    catalog: &Catalog,
    committer: &CommitHandle,
    registry: &Arc<Registry>,
) -> Result<(), LifecycleError> {
    let registry = Arc::clone(registry);
    let catalog = catalog.clone();
    committer
        .change(move |txn, _| {
            for sequence in catalog.sequences()? {
                for topic in catalog.topics_of(sequence.id)? {
                    txn.put_topic(&topic)?;
                    let Some(message) = catalog.topic_schema(topic.no)? else { continue };
                    let wire = storage::schema::from_ipc(&message)?;
                    let offered = Registry::offer(&topic.ontology_tag, &wire, Origin::FirstUse)?;
                    let (ontology, note) = registry.adopt(txn, offered)?;
                    let of_topic = TopicOntology { version: ontology.record.version, note };
                    txn.put(Family::Topics, keys::topic_ontology(topic.no), &of_topic)?;
                    txn.delete_prefix(Family::Skip, keys::of_topic(topic.no));
                }
            }
            Ok::<_, LifecycleError>(())
        })
        .await
}

/// Runs a body on a thread with a disk of the engine that was found.
fn on_disk<B>(name: &str, disk: &DiskState, buffers: usize, body: B) -> io::Result<JoinHandle<()>>
where
    B: DiskBody + Send + 'static,
{
    let (disk, thread_name) = (disk.clone(), name.to_owned());
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let result = match disk.engine {
            Engine::Uring => uring::run(&disk, buffers, |disk| body.run(disk)),
            Engine::Posix => posix::run(&disk, buffers, |disk| body.run(disk)),
        };
        if let Err(error) = result {
            tracing::error!(thread = thread_name, %error, "the ring could not be made");
        }
    })
}

/// Work that runs on any disk. (A closure cannot be generic over the disk's type.)
trait DiskBody {
    fn run<D: Disk>(self, disk: D) -> impl Future<Output = ()>;
}

struct StewardBody {
    jobs: mpsc::Receiver<steward::Job>,
    context: steward::Context,
}

impl DiskBody for StewardBody {
    async fn run<D: Disk>(self, disk: D) {
        steward::serve(disk, self.jobs, self.context).await;
    }
}

struct ReaderBody {
    jobs: mpsc::Receiver<read::ReadJob>,
    counters: Arc<IoCounters>,
}

impl DiskBody for ReaderBody {
    async fn run<D: Disk>(self, disk: D) {
        read::serve(disk, self.jobs, self.counters).await;
    }
}

struct WriterBody {
    lane: Receiver<Message>,
    context: writer::Context,
    core: Option<core_affinity::CoreId>,
}

impl DiskBody for WriterBody {
    async fn run<D: Disk>(self, disk: D) {
        if let Some(core) = self.core {
            core_affinity::set_for_current(core);
        }
        writer::run(disk, self.lane, self.context).await;
    }
}

fn start_steward(
    config: &Config,
    disk: &DiskState,
    catalog: &Catalog,
    committer: &CommitHandle,
    counters: &Arc<IoCounters>,
) -> io::Result<(StewardHandle, JoinHandle<()>)> {
    let (handle, jobs) = StewardHandle::new();
    let context = steward::Context {
        catalog: catalog.clone(),
        committer: committer.clone(),
        data_dir: config.data_dir.clone(),
        counters: Arc::clone(counters),
    };
    let thread = on_disk("fb-steward", disk, RING_BUFFERS_PER_SERVICE, StewardBody { jobs, context })?;
    Ok((handle, thread))
}

fn start_reader(config: &Config, disk: &DiskState, counters: &Arc<IoCounters>) -> io::Result<(Loader, JoinHandle<()>)> {
    let (sender, jobs) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
    let body = ReaderBody { jobs, counters: Arc::clone(counters) };
    let thread = on_disk("fb-reader", disk, RING_BUFFERS_PER_SERVICE, body)?;
    let cache_bytes = usize::try_from(config.read_cache_bytes).unwrap_or(usize::MAX);
    Ok((Loader::new(sender, cache_bytes), thread))
}

/// Writers are pinned from the last core down: the first ones are left to the network.
fn start_writers(
    config: &Config,
    disk: &DiskState,
    context: &writer::Context,
) -> io::Result<(WriterHandles, Vec<JoinHandle<()>>)> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let mut lanes = Vec::new();
    let mut threads = Vec::new();
    for index in 0..config.writers {
        let (sender, lane) = lane(limits::WRITER_LANE_DEPTH);
        let core = if config.writers < cores.len() { cores.iter().rev().nth(index).copied() } else { None };
        let body = WriterBody { lane, context: context.clone(), core };
        threads.push(on_disk(&format!("fb-writer-{index}"), disk, RING_BUFFERS_PER_WRITER, body)?);
        lanes.push(sender);
    }
    Ok((WriterHandles::new(lanes), threads))
}

/// What recovery found and did.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    sealed_topics: u64,
    interrupted_topics: u64,
    interrupted_rows: u64,
    deletions_finished: u64,
    orphans_removed: u64,
}

/// The start-up pass (design.md section 6): finishes deletions, seals, removes what nobody owns,
/// makes links again. A second pass finds nothing to do.
pub(crate) async fn recover_all(
    config: &Config,
    catalog: &Catalog,
    steward: &StewardHandle,
) -> Result<Recovered, AnyError> {
    let mut done = Recovered::default();
    // One file that cannot be handled is reported and left for the next start: it must not keep the
    // appliance from starting (INV-9).
    for deletion in catalog.deletions()? {
        match steward.remove(deletion.ticket, deletion.folders).await {
            Ok(()) => done.deletions_finished += 1,
            Err(error) => tracing::warn!(%error, "a deletion could not be finished"),
        }
    }
    for orphan in recover::orphans(catalog, &config.data_dir)? {
        let removed = if orphan.is_dir() { std::fs::remove_dir_all(&orphan) } else { std::fs::remove_file(&orphan) };
        match removed {
            Ok(()) => {
                tracing::info!(path = %orphan.display(), "removed: no record owns it");
                done.orphans_removed += 1;
            }
            Err(error) => {
                tracing::warn!(path = %orphan.display(), %error, "no record owns it, and it cannot be removed")
            }
        }
    }
    for sequence in catalog.sequences()? {
        for topic in catalog.topics_of(sequence.id)? {
            recover_topic(catalog, steward, topic, &mut done).await?;
        }
        let name = sequence.name.clone();
        if is_locked(&catalog.sessions_of(sequence.id)?)
            && let Err(error) = steward.link(sequence).await
        {
            tracing::warn!(sequence = name, %error, "browse links not made");
        }
    }
    for topic in unfolded_topics(catalog)? {
        if let Err(error) = steward.fold(topic).await {
            tracing::warn!(%topic, %error, "index not packed; queries read it as it is");
        }
    }
    Ok(done)
}

async fn recover_topic(
    catalog: &Catalog,
    steward: &StewardHandle,
    topic: TopicRecord,
    done: &mut Recovered,
) -> Result<(), AnyError> {
    let totals = catalog.totals(topic.no)?;
    let locked = topic.completed_at_ns.is_some();
    let segments = catalog.segments(topic.no)?;
    if !locked && totals.batches > 0 {
        tracing::info!(
            topic = %topic.locator,
            rows = totals.rows,
            batches = totals.batches,
            "interrupted topic: its durable prefix is kept"
        );
        done.interrupted_topics += 1;
        done.interrupted_rows += totals.rows;
    }
    if segments.iter().any(|segment| segment.sealed_length.is_none()) || (locked && segments.is_empty()) {
        let locator = topic.locator.clone();
        match steward.seal_recovered(topic, locked).await {
            Ok(()) => done.sealed_topics += 1,
            // Readable all the same: the catalog has its chunks.
            Err(error) => tracing::warn!(topic = locator, %error, "segment not sealed"),
        }
    }
    Ok(())
}

async fn serve(
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    stopping: watch::Receiver<bool>,
    recovered: &Recovered,
    started: Instant,
) -> Result<(), AnyError> {
    // Before READY: who is told so may ask to stop at once, and a signal without its handler kills.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listeners = Listeners::bind(&shared.config).await?;
    let address = listeners.address()?;
    tracing::info!(
        %address,
        engine = shared.disk.engine.name(),
        direct = shared.disk.direct,
        registered = shared.disk.registered,
        writers = shared.config.writers,
        budget_mib = shared.config.memory_budget_bytes >> 20,
        ?recovered,
        start_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "ready"
    );
    systemd::ready(&format!("listening on {address}"));
    let mut server = tokio::spawn(listeners.serve(shared, stopping));
    tokio::select! {
        ended = &mut server => {
            // The server ends by itself only when it failed.
            ended??;
        }
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("interrupted: stopping"),
    }
    systemd::stopping();
    stop.send_replace(true);
    if !server.is_finished() && tokio::time::timeout(limits::SHUTDOWN_DRAIN, &mut server).await.is_err() {
        tracing::info!("open calls were cut after {:?}", limits::SHUTDOWN_DRAIN);
        server.abort();
    }
    Ok(())
}

/// One line at the end: how much, and the stations' times.
fn log_summary(stats: &Stats) {
    let times: Vec<String> = Station::ALL
        .iter()
        .map(|station| {
            let summary = stats.summary(*station);
            format!("{} {}/{} us", station.name(), summary.p50_us, summary.p99_us)
        })
        .collect();
    tracing::info!(
        rows = stats.rows.load(Ordering::Relaxed),
        batches = stats.batches.load(Ordering::Relaxed),
        bytes = stats.bytes.load(Ordering::Relaxed),
        chunks = stats.chunks.load(Ordering::Relaxed),
        "recorded; p50/p99 of the stations: {}",
        times.join(", ")
    );
}
