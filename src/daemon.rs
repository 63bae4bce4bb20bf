//! Starts and stops everything, in this order; the only file that knows all rooms.
//!
//! Start: folder and lock, disk, catalog, committer, steward and reader, recovery, writers, sockets,
//! READY. Stop: sockets take no more, uploads end with their durable prefix, writers finish and
//! stop, what was asked of the steward is done, the catalog closes.

use crate::config::{Config, EngineChoice};
use crate::flight::server::Listeners;
use crate::flight::service::Shared;
use crate::folder::{FORMAT_VERSION, Opened};
use crate::health::Health;
use crate::ingest::admit::{Budget, Permit};
use crate::ingest::committer::{self, CommitHandle};
use crate::ingest::lane::{Receiver, lane};
use crate::ingest::steward::{self, StewardHandle};
use crate::ingest::writer::{self, Message, PreallocBudget, WriterHandles};
use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::ontology::{Registry, RegistryError};
use crate::rings::{DiskBody, on_disk};
use crate::stats::{Station, Stats};
use crate::{folder, host, housekeeping, limits, recovery, systemd, volumes};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use storage::catalog::Catalog;
use storage::depth::Buffers;
use storage::disk::{Disk, DiskState, IoCounters};
use storage::limits::{RING_BUFFERS_PER_SERVICE, RING_BUFFERS_PER_WRITER};
use storage::read::{self, Loader};
use storage::reclaim::Reclaim;
use storage::recover::Receipt;
use storage::volumes::Volumes;
use storage::{StorageError, uring};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};

type AnyError = Box<dyn std::error::Error>;

/// What is left out so that the rest can be measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bench {
    /// Batches are decoded and dropped.
    pub(crate) null_sink: bool,
    /// Chunks get no statistics.
    pub(crate) no_index: bool,
}

/// Why the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was told to.
    Stopped,
    /// Its catalog is damaged: started again, it makes another from the files.
    ToStartAgain,
}

/// Runs the daemon until SIGTERM or SIGINT.
pub(crate) fn run(config: Config, bench: Bench) -> Result<Ended, AnyError> {
    let data_dir = config.data_dir.clone();
    let mut made_anew = false;
    match run_once(config, bench, &mut made_anew) {
        // Opened, and damaged inside: whatever part of the start met it. One that was just made anew is not
        // made a second time.
        Err(error) if !made_anew && is_corruption(error.as_ref()) => {
            tracing::error!(%error, "the catalog is damaged: starting again, to make another from the files");
            folder::ask_for_rebuild(&data_dir, &error.to_string())?;
            Ok(Ended::ToStartAgain)
        }
        ended => ended,
    }
}

/// Whether RocksDB found its own bytes damaged, somewhere down an error's causes.
fn is_corruption(error: &(dyn std::error::Error + 'static)) -> bool {
    let known = match error.downcast_ref::<LifecycleError>() {
        Some(LifecycleError::Storage(error) | LifecycleError::Registry(RegistryError::Storage(error))) => Some(error),
        _ => match error.downcast_ref::<RegistryError>() {
            Some(RegistryError::Storage(error)) => Some(error),
            _ => error.downcast_ref::<StorageError>(),
        },
    };
    known.is_some_and(StorageError::is_corruption)
}

fn run_once(config: Config, bench: Bench, made_anew: &mut bool) -> Result<Ended, AnyError> {
    let started = Instant::now();
    host::raise_descriptor_limit();
    let (_lock, format) = folder::prepare(&config.data_dir)?;
    let (volumes, disk, _volume_locks) = open_volumes(&config)?;
    for note in &disk.notes {
        tracing::warn!("{note}");
    }
    systemd::status("recovering");
    let Opened { catalog, was, rebuilt } = folder::open_catalog(&volumes, &disk)?;
    if let Some(was) = &was {
        tracing::error!(%was, "the catalog was damaged");
    }
    let stats = Arc::new(Stats::default());
    let health = Arc::new(Health::of(volumes.all().len()));
    let counters = IoCounters::shared();
    let spacing = committer::spacing(config.commit_interval);
    let (committer, committer_thread) =
        committer::start(catalog.clone(), spacing, Arc::clone(&stats), Arc::clone(&health))?;
    let (steward, steward_thread) = start_steward(&volumes, &disk, &catalog, &committer, &counters, &health)?;
    let (loader, reader_thread) = start_reader(&config, &disk, &counters)?;

    let front = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.front_threads)
        .thread_name("fb-front")
        .enable_all()
        .build()?;
    let control =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("fb-control").enable_all().build()?;
    housekeeping::look_at_space(&config, &volumes, &health);
    front.block_on(recovery::migrate_before(format, &catalog, &committer))?;
    *made_anew = rebuilt.is_some();
    let told = Receipt { catalog_was: was, rebuilt, ..Receipt::default() };
    let recovered = front.block_on(recovery::recover_all(&config, &catalog, &committer, &steward, told))?;
    let registry = front.block_on(Registry::load(&catalog, &committer, config.ontology))?;
    front.block_on(recovery::migrate_after(format, &config, &catalog, &committer, &registry))?;

    let budget = Budget::new(config.memory_budget_bytes);
    let context = writer::Context {
        volumes: Arc::clone(&volumes),
        rule: config.chunk_rule(),
        segment_bytes: config.segment_bytes,
        index: !bench.no_index,
        prealloc: Arc::new(PreallocBudget::new(config.prealloc_bytes)),
        budget: budget.clone(),
        budget_bytes: config.memory_budget_bytes / config.writers as u64,
        writers: config.writers,
        committer: committer.clone(),
        steward: steward.clone(),
        counters: Arc::clone(&counters),
        stats: Arc::clone(&stats),
        health: Arc::clone(&health),
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
        health,
        counters,
        disk,
        volumes,
        null_sink: bench.null_sink,
        queries: Arc::new(Semaphore::new(limits::QUERIES_AT_ONCE)),
        control: control.handle().clone(),
        stopping: stopping.clone(),
    });
    touch_memory(&shared)?;
    let keeper = control.spawn(housekeeping::run(Arc::clone(&shared)));
    let served = front.block_on(serve(Arc::clone(&shared), stop, stopping, &recovered, started));
    if matches!(served, Ok(Ended::ToStartAgain)) {
        // Threads may wait for a catalog that never answers again; what is durable survives them.
        return served;
    }
    shared.health.give_up();
    front.block_on(writers.stop());
    if front.block_on(keeper).is_err() {
        tracing::error!("housekeeping panicked");
    }
    if let Err(error) = folder::mark_synced(&shared.config.data_dir, &shared.lifecycle.catalog) {
        tracing::warn!(%error, "how far the catalog reaches was not noted");
    }
    front.shutdown_timeout(Duration::from_secs(1));
    control.shutdown_timeout(Duration::from_secs(1));
    log_summary(&stats);
    // The threads end when the last handle to them is gone.
    drop((shared, writers));
    for thread in writer_threads.into_iter().chain([steward_thread, reader_thread, committer_thread]) {
        join(thread);
    }
    tracing::info!("stopped");
    served
}

/// The volumes with their locks, and a disk that fits all of them.
fn open_volumes(config: &Config) -> Result<(Arc<Volumes>, DiskState, Vec<File>), AnyError> {
    let volumes::Opened { volumes, locks, notes } = volumes::open(config)?;
    let mut disk = uring::probe(&config.data_dir, config.engine == EngineChoice::Auto);
    for volume in volumes.others() {
        let other = uring::probe(&volume.root, config.engine == EngineChoice::Auto);
        disk.direct &= other.direct;
        disk.notes.extend(other.notes.into_iter().filter(|note| note.contains("direct") || note.contains("DIRECT")));
    }
    disk.notes.extend(notes);
    Ok((Arc::new(volumes), disk, locks))
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
    let (_lock, format) = folder::prepare(&config.data_dir)?;
    if format < FORMAT_VERSION {
        return Err("the folder has an older format; start `flightbox serve` on it once, which migrates it".into());
    }
    let (volumes, disk, _volume_locks) = open_volumes(config)?;
    let catalog = folder::open_catalog(&volumes, &disk)?.catalog;
    let (committer, committer_thread) =
        committer::start(catalog.clone(), Duration::ZERO, Arc::new(Stats::default()), Arc::new(Health::default()))?;
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
    volumes: &Arc<Volumes>,
    disk: &DiskState,
    catalog: &Catalog,
    committer: &CommitHandle,
    counters: &Arc<IoCounters>,
    health: &Arc<Health>,
) -> io::Result<(StewardHandle, JoinHandle<()>)> {
    let (handle, jobs) = StewardHandle::new();
    let context = steward::Context {
        catalog: catalog.clone(),
        committer: committer.clone(),
        volumes: Arc::clone(volumes),
        counters: Arc::clone(counters),
        health: Arc::clone(health),
        turns: steward::Turns::default(),
        reclaim: Reclaim::gently(),
        last_ontology: steward::LastOntology::default(),
    };
    let thread = on_disk("fb-steward", disk, Buffers::of(RING_BUFFERS_PER_SERVICE), StewardBody { jobs, context })?;
    Ok((handle, thread))
}

fn start_reader(config: &Config, disk: &DiskState, counters: &Arc<IoCounters>) -> io::Result<(Loader, JoinHandle<()>)> {
    let (sender, jobs) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
    let body = ReaderBody { jobs, counters: Arc::clone(counters) };
    let thread = on_disk("fb-reader", disk, Buffers::of(0), body)?;
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
        let buffers = Buffers { count: RING_BUFFERS_PER_WRITER, depth: context.committer.depth().clone() };
        let body = WriterBody { lane, context: context.clone(), core };
        threads.push(on_disk(&format!("fb-writer-{index}"), disk, buffers, body)?);
        lanes.push(sender);
    }
    Ok((WriterHandles::new(lanes), threads))
}

async fn serve(
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    stopping: watch::Receiver<bool>,
    recovered: &Receipt,
    started: Instant,
) -> Result<Ended, AnyError> {
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
        interrupted_topics = recovered.topics.iter().filter(|topic| !topic.locked).count(),
        orphans_removed = recovered.orphans_removed.len(),
        deletions_finished = recovered.deletions_finished,
        start_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "ready"
    );
    systemd::ready(&format!("listening on {address}"));
    let mut corrupt = shared.health.corrupt.subscribe();
    let data_dir = shared.config.data_dir.clone();
    let mut server = tokio::spawn(listeners.serve(shared, stopping));
    let mut ended = Ended::Stopped;
    tokio::select! {
        ended = &mut server => {
            // The server ends by itself only when it failed.
            ended?;
        }
        found = corrupt.wait_for(Option::is_some) => {
            let cause = found.map(|cause| cause.clone().unwrap_or_default()).unwrap_or_default();
            tracing::error!(%cause, "the catalog is damaged: starting again, to make another from the files");
            folder::ask_for_rebuild(&data_dir, &cause)?;
            ended = Ended::ToStartAgain;
        }
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("interrupted: stopping"),
    }
    if ended == Ended::Stopped {
        systemd::stopping();
    }
    stop.send_replace(true);
    if !server.is_finished() && tokio::time::timeout(limits::SHUTDOWN_DRAIN, &mut server).await.is_err() {
        tracing::info!("open calls were cut after {:?}", limits::SHUTDOWN_DRAIN);
        server.abort();
    }
    Ok(ended)
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

/// Takes memory for uploads once and gives it back to the allocator, which keeps it: to meet a page for the first
/// time costs more than to copy it three times, and stalls of that length in the middle of a recording (PERF.md).
/// Runs beside everything else, within what uploads may hold.
fn touch_memory(shared: &Arc<Shared>) -> io::Result<()> {
    let (budget, bytes) = (shared.budget.clone(), shared.config.touch_memory_bytes);
    let touch = move || {
        let block = limits::TOUCH_BLOCK_BYTES as u64;
        let (mut blocks, mut claimed) = (Vec::new(), 0);
        for _ in 0..bytes / block {
            let permit = budget.receive.try_claim(block).or_else(|| budget.decode.try_claim(block));
            claimed += permit.as_ref().map_or(0, Permit::bytes);
            // Uploads that came meanwhile touch what they need by themselves. Nobody else has what is beyond the two
            // pools: dictionaries and windows are uploads' too.
            if claimed < budget.held() || budget.is_waited_for() {
                break;
            }
            // A page of zeros would not be taken before somebody writes to it.
            blocks.push((vec![1_u8; limits::TOUCH_BLOCK_BYTES], permit));
        }
    };
    std::thread::Builder::new().name("fb-touch".to_owned()).spawn(touch)?;
    Ok(())
}
