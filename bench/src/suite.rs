//! The measurements by name, and one pass of each: every contestant beside its limits, interleaved, so that a
//! slow minute of a shared machine meets all of them.

use crate::closed::{self, Closed, Outcome, Saturation, Speaks};
use crate::disk::{self, DiskCounter, Fio, Still, StillWatch};
use crate::files;
use crate::open::{self, Group, Latency};
use crate::profile::Profile;
use crate::samples::Samples;
use crate::server::{self, Server, action, connect};
use crate::wire::Connection;
use crate::{memory, paced, rival, scale, volumes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type AnyError = Box<dyn Error>;

/// A pause before each contestant: a shared disk gives credit for idle time, and each must meet the same credit.
const REST: Duration = Duration::from_secs(2);
/// How often the free space is looked at while a deletion gives it back.
const SPACE_LOOK: Duration = Duration::from_millis(50);
/// How long open loops run.
const OPEN: Duration = Duration::from_secs(10);
/// Pause between calls that are timed while ingest saturates.
const CREATE_EVERY: Duration = Duration::from_millis(50);
/// flightbox's default, to tell what is beyond it.
const COMMIT_INTERVAL_MS: f64 = 50.0;
const GB: f64 = 1e9;

/// Everything that `all` measures, in order.
pub(crate) const ALL: [&str; 18] = [
    "machine",
    "image",
    "image-1",
    "lidar",
    "imu-20000",
    "h264",
    "latency",
    "can",
    "drive",
    "isolation",
    "delete",
    "topics",
    "commits",
    "get",
    "finalize",
    "volumes",
    "small",
    "compression",
];

/// What is kept beside the numbers.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Bytes sent over time, by measurement and contestant, of the last pass.
    pub(crate) over_time: BTreeMap<String, Vec<(f64, u64)>>,
    /// Percentile curves, by name: (percentile, milliseconds).
    pub(crate) latencies: BTreeMap<String, Vec<(f64, f64)>>,
    /// flightbox's account of itself.
    pub(crate) infos: BTreeMap<String, Value>,
}

/// One run of the harness.
pub(crate) struct Suite {
    pub(crate) program: PathBuf,
    pub(crate) scratch: PathBuf,
    /// Bytes of one closed loop.
    pub(crate) bytes: u64,
    pub(crate) samples: Samples,
    pub(crate) kept: Kept,
    /// Folder for profiles of this run, if perf is to record them.
    pub(crate) profiles: Option<PathBuf>,
    /// Whether limits and rivals of the closed loops are left out.
    pub(crate) alone: bool,
    runtime: tokio::runtime::Runtime,
}

impl Suite {
    /// An empty run.
    pub(crate) fn new(program: &Path, scratch: &Path, bytes: u64) -> Result<Self, AnyError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        Ok(Self {
            program: program.to_owned(),
            scratch: scratch.to_owned(),
            bytes,
            samples: Samples::default(),
            kept: Kept::default(),
            profiles: None,
            alone: false,
            runtime,
        })
    }

    /// One pass of one measurement.
    pub(crate) fn pass(&mut self, pass: usize, name: &str) -> Result<(), AnyError> {
        match name {
            "machine" => self.machine(pass),
            "image" => {
                self.closed(pass, name, Profile::Image, 4, self.bytes)?;
                self.rivals(pass)
            }
            "image-1" => self.closed(pass, name, Profile::Image, 1, self.bytes),
            "lidar" => {
                self.closed(pass, name, Profile::Lidar, 4, self.bytes)?;
                self.python_files(pass, name, "lidar")
            }
            "imu-20000" => {
                self.closed(pass, name, Profile::Imu(20_000), 4, self.bytes)?;
                let load = Closed { profile: Profile::Imu(20_000), streams: 4, bytes: self.bytes };
                self.flightbox(pass, name, "no_index", &["--no-index"], load)?;
                self.python_files(pass, name, "imu")
            }
            "h264" => {
                let load = Closed { profile: Profile::H264, streams: 4, bytes: self.bytes };
                self.flightbox(pass, name, "flightbox", &[], load)
            }
            // No goal hangs on these: once is enough.
            "small" | "compression" | "volumes" if pass > 0 => Ok(()),
            "small" => {
                self.closed(pass, "imu-100", Profile::Imu(100), 4, self.bytes / 8)?;
                self.closed(pass, "imu-1", Profile::Imu(1), 4, self.bytes / 64)
            }
            "latency" => {
                self.latency(pass, "latency-image", "image", Profile::Image)?;
                self.latency(pass, "latency-imu", "imu-20000", Profile::Imu(20_000))
            }
            "can" => self.can(pass),
            "drive" => self.drive(pass),
            "isolation" => self.isolation(pass),
            "delete" => self.delete(pass),
            "topics" => self.topics(pass),
            "commits" => self.commits(pass),
            "get" => {
                self.get(pass, "get-image", Profile::Image, "source-image")?;
                self.get(pass, "get-imu", Profile::Imu(20_000), "source-imu")
            }
            "finalize" => self.finalize(pass),
            "volumes" => self.volumes(pass),
            "compression" => self.compression(pass),
            other => Err(format!("there is no measurement {other:?}; known: all, {}", ALL.join(", ")).into()),
        }
    }

    fn machine(&mut self, pass: usize) -> Result<(), AnyError> {
        self.samples.add(pass, "machine", "memcpy", "bytes_per_s", memory::copy_rate());
        let (p50, p99) = disk::small_durable_write(&self.scratch)?;
        self.samples.add(pass, "machine", "write_4kib", "p50_ms", p50 * 1e3);
        self.samples.add(pass, "machine", "write_4kib", "p99_ms", p99 * 1e3);
        Ok(())
    }

    /// One closed loop between its two limits.
    fn closed(
        &mut self,
        pass: usize,
        name: &str,
        profile: Profile,
        streams: usize,
        bytes: u64,
    ) -> Result<(), AnyError> {
        let load = Closed { profile, streams, bytes };
        if self.alone {
            return self.flightbox(pass, name, "flightbox", &[], load);
        }
        for (contestant, how) in [("disk", Fio::Write), ("disk_sync", Fio::WriteSync)] {
            rest();
            let rate = disk::fio(&self.scratch, bytes, how)?;
            disk::fio_clear(&self.scratch);
            self.samples.add(pass, name, contestant, "bytes_per_s", rate);
        }
        self.flightbox(pass, name, "null_sink", &["--null-sink"], load)?;
        self.flightbox(pass, name, "flightbox", &[], load)
    }

    fn flightbox(
        &mut self,
        pass: usize,
        name: &str,
        as_what: &str,
        flags: &[&str],
        load: Closed,
    ) -> Result<(), AnyError> {
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let server = Server::start(&self.program, folder.path(), flags)?;
        rest();
        let ready = self.runtime.block_on(closed::prepare(&server, Speaks::Flightbox, load))?;
        let recorder = self.perf(&server, name, as_what)?;
        let outcome = self.runtime.block_on(ready.run(&server, &self.scratch))?;
        drop(recorder);
        self.note(pass, name, as_what, outcome);
        Ok(())
    }

    fn note(&mut self, pass: usize, name: &str, contestant: &str, outcome: Outcome) {
        let bytes = outcome.wire_bytes as f64;
        let mut add = |metric: &str, value: f64| self.samples.add(pass, name, contestant, metric, value);
        add("bytes_per_s", bytes / outcome.seconds);
        add("data_bytes_per_s", outcome.data_bytes as f64 / outcome.seconds);
        add("cpu_s_per_gb", outcome.cpu_s / (bytes / GB));
        add("peak_rss_mib", outcome.peak_bytes as f64 / f64::from(1 << 20));
        // What the work was cut into; a rival does not say.
        for what in ["chunks", "tail_runs", "commit_groups"] {
            if let Some(count) = outcome.info["since_start"][what].as_f64() {
                add(what, count);
            }
        }
        if contestant == "flightbox" {
            add("written_per_byte", outcome.written_bytes as f64 / bytes);
            add("device_per_byte", outcome.device_bytes as f64 / bytes);
            add("rss_beyond_mib", beyond_bound(outcome.peak_bytes, &outcome.info));
            self.kept.infos.insert(name.to_owned(), outcome.info);
        }
        self.kept.over_time.insert(format!("{name} {contestant}"), outcome.over_time);
    }

    /// Samples the server's stacks while it lives, if asked for.
    fn perf(&self, server: &Server, name: &str, contestant: &str) -> Result<Option<Recorder>, AnyError> {
        match &self.profiles {
            Some(folder) => Ok(Some(Recorder::start(server, &folder.join(format!("{name}-{contestant}")))?)),
            None => Ok(None),
        }
    }

    /// Others that take or write the same blobs.
    fn rivals(&mut self, pass: usize) -> Result<(), AnyError> {
        if self.alone {
            return Ok(());
        }
        let load = Closed { profile: Profile::Image, streams: 4, bytes: self.bytes };
        for (contestant, kind) in [("naive", "naive"), ("naive_fsync", "naive-sync")] {
            let folder = tempfile::tempdir_in(&self.scratch)?;
            let server = Server::start_own(&[rival::COMMAND, kind], folder.path())?;
            rest();
            let outcome = self.runtime.block_on(closed::run(&server, Speaks::PutOnly, load, &self.scratch))?;
            self.note(pass, "image", contestant, outcome);
        }
        if pass > 0 {
            return Ok(());
        }
        // Writers of files, and the Python client: no goal hangs on them, and they are slow.
        rest();
        let rate = files::mcap(&self.scratch, Profile::Image, self.bytes)?;
        self.samples.add(pass, "image", "mcap_rust", "bytes_per_s", rate);
        self.python_files(pass, "image", "image")?;
        let Some(python) = files::python() else { return Ok(()) };
        for (contestant, flags) in [("pyarrow_null_sink", &["--null-sink"][..]), ("pyarrow_flightbox", &[])] {
            let folder = tempfile::tempdir_in(&self.scratch)?;
            let server = Server::start(&self.program, folder.path(), flags)?;
            rest();
            let before = server.cpu_s()?;
            let bytes = self.bytes.to_string();
            let rate = files::script(&python, "put.py", &[&server.address, "4", &bytes])?;
            self.samples.add(pass, "image", contestant, "bytes_per_s", rate);
            let cpu = (server.cpu_s()? - before) / (self.bytes as f64 / GB);
            self.samples.add(pass, "image", contestant, "cpu_s_per_gb", cpu);
        }
        Ok(())
    }

    fn python_files(&mut self, pass: usize, name: &str, profile: &str) -> Result<(), AnyError> {
        let Some(python) = files::python().filter(|_| pass == 0 && !self.alone) else { return Ok(()) };
        for (contestant, kind) in [("parquet_pyarrow", "parquet"), ("mcap_python", "mcap")] {
            let path = self.scratch.join("rival.data");
            rest();
            // A quarter of the bytes: they are slow, and nothing of theirs grows.
            let bytes = (self.bytes / 4).to_string();
            let rate = files::script(&python, "files.py", &[kind, profile, &bytes, &path.display().to_string()])?;
            std::fs::remove_file(&path)?;
            self.samples.add(pass, name, contestant, "bytes_per_s", rate);
        }
        Ok(())
    }

    /// Durable latency at half of the rate that saturates, which a pass of the closed loop found.
    fn latency(&mut self, pass: usize, name: &str, closed: &str, profile: Profile) -> Result<(), AnyError> {
        const TOPICS: usize = 4;
        let saturation = match self.samples.get(pass, closed, "flightbox", "bytes_per_s") {
            Some(rate) => rate,
            None => {
                self.closed(pass, closed, profile, TOPICS, self.bytes)?;
                self.samples.get(pass, closed, "flightbox", "bytes_per_s").ok_or("no rate")?
            }
        };
        let (_, messages) = self.runtime.block_on(profile.messages("", ""))?;
        let bytes = messages.first().ok_or("no message")?.wire_bytes as f64;
        let rate = saturation / 2.0 / bytes / TOPICS as f64;
        let latency = self.open_loop(pass, name, &[Group { profile, topics: TOPICS, rate }], OPEN)?;
        let latency = latency.first().ok_or("no latency")?;
        for (metric, quantile) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
            let ms = latency.ms(quantile);
            self.samples.add(pass, name, "flightbox", &format!("{metric}_ms"), ms);
            self.samples.add(pass, name, "flightbox", &format!("beyond_{metric}_ms"), ms - COMMIT_INTERVAL_MS);
        }
        if self.alone {
            return Ok(());
        }
        let written = self.samples.get(pass, name, "flightbox", "written_per_byte").ok_or("no bytes written")?;
        self.paced_disk(pass, name, saturation / 2.0 * written, TOPICS)
    }

    /// The same bytes at the same pace, written by nobody but the harness.
    fn paced_disk(&mut self, pass: usize, name: &str, bytes_per_s: f64, files: usize) -> Result<(), AnyError> {
        let paced = paced::paced(&self.scratch, bytes_per_s, files, OPEN, rest)?;
        for (metric, quantile) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0)] {
            let ms = paced.ms(quantile).ok_or("the disk was given nothing to write")?;
            self.samples.add(pass, name, "disk", metric, ms);
        }
        self.note_still(pass, name, "disk", paced.still, paced.took);
        Ok(())
    }

    fn note_still(&mut self, pass: usize, name: &str, contestant: &str, still: Still, time: Duration) {
        let mut add = |metric: &str, value: f64| self.samples.add(pass, name, contestant, metric, value);
        add("device_still_longest_ms", still.longest.as_secs_f64() * 1e3);
        add("device_still_percent", still.together.as_secs_f64() / time.as_secs_f64() * 100.0);
    }

    /// An open loop on a fresh server; notes CPU, memory and bytes written.
    fn open_loop(
        &mut self,
        pass: usize,
        name: &str,
        groups: &[Group],
        time: Duration,
    ) -> Result<Vec<Latency>, AnyError> {
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let server = Server::start(&self.program, folder.path(), &[])?;
        rest();
        let recorder = self.perf(&server, name, "flightbox")?;
        let (latencies, seconds, cpu_s, info, device, still) = self.runtime.block_on(async {
            let mut client = connect(&server.address).await?;
            let opened = open::open(&server, "open", groups, true).await?;
            let device = DiskCounter::of(&self.scratch)?;
            let before = server::written_bytes(&server::info(&mut client).await?);
            let watch = StillWatch::of(&self.scratch)?;
            let (cpu, started) = (server.cpu_s()?, Instant::now());
            let latencies = opened.run(time).await?;
            let (seconds, cpu) = (started.elapsed().as_secs_f64(), server.cpu_s()? - cpu);
            let still = watch.end()?;
            let info = server::info(&mut client).await?;
            let written = server::written_bytes(&info) - before;
            let bytes: u64 = latencies.iter().map(|latency| latency.wire_bytes).sum();
            let device = device.written_since()?;
            let per_byte = |written: u64| written as f64 / bytes as f64;
            Ok::<_, AnyError>((latencies, seconds, cpu, info, (per_byte(written), per_byte(device)), still))
        })?;
        drop(recorder);
        let mut add = |metric: &str, value: f64| self.samples.add(pass, name, "flightbox", metric, value);
        add("cores", cpu_s / seconds);
        add("messages_per_s", latencies.iter().map(|latency| latency.sent).sum::<u64>() as f64 / seconds);
        add("written_per_byte", device.0);
        add("device_per_byte", device.1);
        let peak = server.memory()?.1;
        add("peak_rss_mib", peak as f64 / f64::from(1 << 20));
        add("rss_beyond_mib", beyond_bound(peak, &info));
        add("late_or_dropped", latencies.iter().map(|latency| latency.late + latency.dropped).sum::<u64>() as f64);
        for latency in &latencies {
            self.keep_latency(&format!("{name} {}", latency.group.profile.name()), latency);
        }
        self.note_still(pass, name, "flightbox", still, Duration::from_secs_f64(seconds));
        self.kept.infos.insert(name.to_owned(), info);
        Ok(latencies)
    }

    fn keep_latency(&mut self, name: &str, latency: &Latency) {
        let quantiles = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 1.0];
        let curve = quantiles.iter().map(|quantile| (quantile * 100.0, latency.ms(*quantile))).collect();
        self.kept.latencies.insert(name.to_owned(), curve);
    }

    /// 300 slow topics of one frame a message.
    fn can(&mut self, pass: usize) -> Result<(), AnyError> {
        let latencies = self.open_loop(pass, "can", &can_groups(), OPEN)?;
        self.samples.add(pass, "can", "flightbox", "p99_ms", worst_ms(&latencies, 0.99));
        Ok(())
    }

    /// A vehicle, over one connection, as the newest clients do.
    fn drive(&mut self, pass: usize) -> Result<(), AnyError> {
        let latencies = self.open_loop(pass, "drive", &drive_groups(), OPEN)?;
        self.samples.add(pass, "drive", "flightbox", "p99_ms", worst_ms(&latencies, 0.99));
        Ok(())
    }

    /// A slow topic alone, then beside cameras that saturate; and calls meanwhile.
    fn isolation(&mut self, pass: usize) -> Result<(), AnyError> {
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let server = Server::start(&self.program, folder.path(), &[])?;
        let slow = [Group { profile: Profile::Imu(1), topics: 1, rate: 10.0 }];
        rest();
        let (idle, saturated, other, same) = self.runtime.block_on(async {
            let idle = open::open(&server, "idle", &slow, true).await?.run(OPEN).await?;
            let opened = open::open(&server, "slow", &slow, true).await?;
            let cameras = Saturation::start(&server, "cameras", Profile::Image, 4).await?;
            let own = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
            let (slow, other, same) = tokio::join!(
                opened.run(OPEN),
                create_times(&own, "other", OPEN),
                create_times(&cameras.connection, "same", OPEN),
            );
            cameras.stop().await?;
            Ok::<_, AnyError>((idle, slow?, other?, same?))
        })?;
        for (contestant, latencies) in [("idle", idle), ("saturated", saturated)] {
            let latency = latencies.first().ok_or("no latency")?;
            self.samples.add(pass, "isolation", contestant, "p50_ms", latency.ms(0.5));
            self.samples.add(pass, "isolation", contestant, "p99_ms", latency.ms(0.99));
            self.keep_latency(&format!("isolation {contestant}"), latency);
        }
        for (contestant, times) in [("other_connection", other), ("same_connection", same)] {
            self.samples.add(pass, "isolation", contestant, "create_p50_ms", percentile(&times, 0.5));
            self.samples.add(pass, "isolation", contestant, "create_p99_ms", percentile(&times, 0.99));
        }
        Ok(())
    }

    /// A vehicle alone, then while an older recording is deleted to make room.
    fn delete(&mut self, pass: usize) -> Result<(), AnyError> {
        const INTO_THE_DRIVE: Duration = Duration::from_secs(3);
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let server = Server::start(&self.program, folder.path(), &[])?;
        let old = Closed { profile: Profile::Image, streams: 4, bytes: self.bytes * 2 };
        let free = || Ok::<_, AnyError>(rustix::fs::statvfs(&self.scratch)?.f_bfree);
        let (idle, deleting, answer_ms, space_s) = self.runtime.block_on(async {
            let mut client = connect(&server.address).await?;
            let full = free()?;
            let key = closed::run(&server, Speaks::Flightbox, old, &self.scratch).await?.key;
            let held = full.saturating_sub(free()?);
            rest();
            let idle = open::open(&server, "idle", &drive_groups(), true).await?.run(OPEN).await?;
            let opened = open::open(&server, "open", &drive_groups(), true).await?;
            let delete = async {
                tokio::time::sleep(INTO_THE_DRIVE).await;
                let (before, started) = (free()?, Instant::now());
                action(&mut client, "sequence_abort", json!({ "name": "bench", "key": key })).await?;
                let answer_ms = started.elapsed().as_secs_f64() * 1e3;
                // The drive takes some of it meanwhile.
                while free()?.saturating_sub(before) < held / 10 * 8 && started.elapsed() < OPEN {
                    tokio::time::sleep(SPACE_LOOK).await;
                }
                Ok::<_, AnyError>((answer_ms, started.elapsed().as_secs_f64()))
            };
            let (deleting, deleted) = tokio::join!(opened.run(OPEN), delete);
            let (answer_ms, space_s) = deleted?;
            Ok::<_, AnyError>((idle, deleting?, answer_ms, space_s))
        })?;
        for (contestant, latencies) in [("idle", idle), ("deleting", deleting)] {
            for (metric, quantile) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999), ("max_ms", 1.0)] {
                self.samples.add(pass, "delete", contestant, metric, worst_ms(&latencies, quantile));
            }
            let late = latencies.iter().map(|latency| latency.late + latency.dropped).sum::<u64>();
            self.samples.add(pass, "delete", contestant, "late_or_dropped", late as f64);
        }
        self.samples.add(pass, "delete", "deleting", "answer_ms", answer_ms);
        self.samples.add(pass, "delete", "deleting", "space_is_back_s", space_s);
        Ok(())
    }

    /// The same bytes in the same batches over few and over many topics.
    fn topics(&mut self, pass: usize) -> Result<(), AnyError> {
        for topics in [10, 1000] {
            let load = Closed { profile: Profile::Imu(1000), streams: topics, bytes: self.bytes * 2 };
            self.flightbox(pass, "topics", &topics.to_string(), &[], load)?;
        }
        Ok(())
    }

    /// Small chunks into a small and a large catalog.
    fn commits(&mut self, pass: usize) -> Result<(), AnyError> {
        for chunks in [1000, 1_000_000] {
            let folder = tempfile::tempdir_in(&self.scratch)?;
            scale::generate(folder.path(), chunks)?;
            let server = Server::start(&self.program, folder.path(), &["--set", "chunk_bytes=256KiB"])?;
            rest();
            let load = Closed { profile: Profile::H264, streams: 4, bytes: self.bytes / 4 };
            let before = server.thread_cpu_s("fb-committer")?;
            let outcome = self.runtime.block_on(closed::run(&server, Speaks::Flightbox, load, &self.scratch))?;
            let spent = server.thread_cpu_s("fb-committer")? - before;
            let committed = outcome.info["since_start"]["chunks"].as_f64().unwrap_or(0.0);
            let name = chunks.to_string();
            self.samples.add(pass, "commits", &name, "committer_cpu_us", spent / committed * 1e6);
            let station = |which: &str| {
                let stations = outcome.info["stations"].as_array();
                let found = stations.and_then(|all| all.iter().find(|station| station["station"] == "commit"));
                found.and_then(|station| station[which].as_f64()).unwrap_or(0.0)
            };
            self.samples.add(pass, "commits", &name, "commit_p50_us", station("p50_us"));
            self.samples.add(pass, "commits", &name, "commit_p99_us", station("p99_us"));
            self.samples.add(pass, "commits", &name, "chunks_per_s", committed / outcome.seconds);
        }
        Ok(())
    }

    /// Reads a finalized recording, stream beside stream.
    fn get(&mut self, pass: usize, name: &str, profile: Profile, source: &str) -> Result<(), AnyError> {
        const TOPICS: usize = 4;
        rest();
        disk::fio(&self.scratch, self.bytes, Fio::Write)?;
        rest();
        let rate = disk::fio(&self.scratch, self.bytes, Fio::Read)?;
        disk::fio_clear(&self.scratch);
        self.samples.add(pass, name, "disk_read", "bytes_per_s", rate);
        let (_, messages) = self.runtime.block_on(profile.messages("", ""))?;
        let per_stream = self.bytes / TOPICS as u64 / messages.first().ok_or("no message")?.wire_bytes;
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let rival = Server::start_own(&[rival::COMMAND, source], folder.path())?;
        rest();
        let tickets = vec![per_stream.to_string(); TOPICS];
        self.read(pass, name, "null_source", &rival, &tickets)?;
        drop(rival);
        let server = Server::start(&self.program, folder.path(), &[])?;
        let load = Closed { profile, streams: TOPICS, bytes: self.bytes };
        self.runtime.block_on(async {
            closed::run(&server, Speaks::Flightbox, load, &self.scratch).await?;
            Ok::<_, AnyError>(())
        })?;
        drop(server);
        // Started again: nothing of it is cached.
        let server = Server::start(&self.program, folder.path(), &[])?;
        rest();
        let recorder = self.perf(&server, name, "flightbox")?;
        let tickets: Vec<String> = (0..TOPICS).map(|index| format!("bench/{}{index}", profile.name())).collect();
        self.read(pass, name, "flightbox", &server, &tickets)?;
        drop(recorder);
        let info = self.runtime.block_on(async { server::info(&mut connect(&server.address).await?).await })?;
        self.samples.add(pass, name, "flightbox", "rss_beyond_mib", beyond_bound(server.memory()?.1, &info));
        Ok(())
    }

    fn read(
        &mut self,
        pass: usize,
        name: &str,
        who: &str,
        server: &Server,
        tickets: &[String],
    ) -> Result<(), AnyError> {
        let (bytes, seconds, cpu_s) = self.runtime.block_on(async {
            let connection = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
            let (cpu, started) = (server.cpu_s()?, Instant::now());
            let reads = tickets.iter().map(|ticket| {
                let (connection, ticket) = (connection.clone(), ticket.clone());
                tokio::spawn(async move { connection.get(ticket.as_bytes()).await.map_err(|error| error.to_string()) })
            });
            let mut bytes = 0;
            for read in reads.collect::<Vec<_>>() {
                bytes += read.await??;
            }
            Ok::<_, AnyError>((bytes as f64, started.elapsed().as_secs_f64(), server.cpu_s()? - cpu))
        })?;
        self.samples.add(pass, name, who, "bytes_per_s", bytes / seconds);
        self.samples.add(pass, name, who, "cpu_s_per_gb", cpu_s / (bytes / GB));
        Ok(())
    }

    /// Finalizes ten gigabytes in twenty topics.
    fn finalize(&mut self, pass: usize) -> Result<(), AnyError> {
        let folder = tempfile::tempdir_in(&self.scratch)?;
        let server = Server::start(&self.program, folder.path(), &[])?;
        rest();
        let ms = self.runtime.block_on(async {
            let mut client = connect(&server.address).await?;
            let load = Closed { profile: Profile::Image, streams: 20, bytes: 10_000_000_000 };
            let outcome = closed::run(&server, Speaks::Flightbox, load, &self.scratch).await?;
            let started = Instant::now();
            action(&mut client, "sequence_finalize", json!({ "name": "bench", "key": outcome.key })).await?;
            Ok::<_, AnyError>(started.elapsed().as_secs_f64() * 1e3)
        })?;
        self.samples.add(pass, "finalize", "flightbox", "finalize_ms", ms);
        Ok(())
    }

    /// Cameras onto one to eight disks that are slower than everything else.
    fn volumes(&mut self, pass: usize) -> Result<(), AnyError> {
        if !volumes::is_possible() {
            eprintln!("volumes: not measured: it takes root and the block layer's control group");
            return Ok(());
        }
        for count in [1, 2, 4, 8] {
            rest();
            let outcome = volumes::run(&self.program, &self.scratch, count, &self.runtime)?;
            let rate = outcome.wire_bytes as f64 / outcome.seconds;
            let (name, disks) = (count.to_string(), (count as u64 * volumes::DISK_RATE) as f64);
            self.samples.add(pass, "volumes", &name, "bytes_per_s", rate);
            self.samples.add(pass, "volumes", &name, "of_the_disks", rate / disks);
        }
        Ok(())
    }

    /// What each compression costs and gives.
    fn compression(&mut self, pass: usize) -> Result<(), AnyError> {
        for (name, profile) in [("compression-imu", Profile::Imu(20_000)), ("compression-lidar", Profile::Lidar)] {
            for codec in ["none", "lz4", "zstd"] {
                let folder = tempfile::tempdir_in(&self.scratch)?;
                let set = format!("compression={codec}");
                let server = Server::start(&self.program, folder.path(), &["--set", &set])?;
                let load = Closed { profile, streams: 4, bytes: self.bytes / 4 };
                rest();
                let outcome = self.runtime.block_on(closed::run(&server, Speaks::Flightbox, load, &self.scratch))?;
                let data = outcome.data_bytes as f64;
                self.samples.add(pass, name, codec, "data_bytes_per_s", data / outcome.seconds);
                self.samples.add(pass, name, codec, "cpu_s_per_data_gb", outcome.cpu_s / (data / GB));
                self.samples.add(pass, name, codec, "stored_per_data_byte", outcome.written_bytes as f64 / data);
            }
        }
        Ok(())
    }
}

fn can_groups() -> [Group; 3] {
    [10.0, 50.0, 100.0].map(|rate| Group { profile: Profile::Can, topics: 100, rate })
}

/// A vehicle: cameras, lidars, what tells where it is, and its buses.
fn drive_groups() -> Vec<Group> {
    let mut groups = vec![
        Group { profile: Profile::H264, topics: 6, rate: 60.0 },
        Group { profile: Profile::Lidar, topics: 2, rate: 10.0 },
        Group { profile: Profile::Imu(1), topics: 4, rate: 200.0 },
        Group { profile: Profile::Gps, topics: 1, rate: 10.0 },
    ];
    groups.extend(can_groups());
    groups
}

/// A quantile of the group that it is worst for, in milliseconds.
fn worst_ms(latencies: &[Latency], quantile: f64) -> f64 {
    latencies.iter().map(|latency| latency.ms(quantile)).fold(0.0, f64::max)
}

fn rest() {
    std::thread::park_timeout(REST);
}

fn beyond_bound(peak_bytes: u64, info: &Value) -> f64 {
    let bound = info["memory"]["bound"].as_f64().unwrap_or(0.0);
    ((peak_bytes as f64 - bound) / f64::from(1 << 20)).max(0.0)
}

fn percentile(sorted: &[f64], quantile: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * quantile).round() as usize).copied().unwrap_or(0.0)
}

/// Milliseconds of `sequence_create`, again and again, sorted.
async fn create_times(connection: &Connection, name: &str, time: Duration) -> Result<Vec<f64>, AnyError> {
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        tokio::time::sleep(CREATE_EVERY).await;
        let body = json!({ "name": format!("{name}{}", times.len()), "user_metadata": {} });
        let started = Instant::now();
        connection.action("sequence_create", &body).await.map_err(|error| error.to_string())?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Until perf samples.
const ATTACHING: Duration = Duration::from_millis(300);

/// perf at work; ended, and its stacks written as a flame graph, when dropped.
struct Recorder {
    child: std::process::Child,
    data: PathBuf,
}

impl Recorder {
    fn start(server: &Server, path: &Path) -> Result<Self, AnyError> {
        let data = path.with_extension("perf");
        let child = std::process::Command::new("perf")
            .args(["record", "-q", "-F", "299", "--call-graph", "dwarf,8192", "-p", &server.pid().to_string(), "-o"])
            .arg(&data)
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(|error| format!("perf: {error}; install it (apt-get install linux-perf)"))?;
        std::thread::park_timeout(ATTACHING);
        Ok(Self { child, data })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            rustix::process::kill_process(pid, rustix::process::Signal::INT).ok(); // It may have ended.
        }
        self.child.wait().ok();
        if let Err(error) = crate::flame::write(&self.data) {
            eprintln!("no flame graph of {}: {error}", self.data.display());
        }
    }
}
