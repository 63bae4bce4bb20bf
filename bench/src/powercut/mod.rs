//! Power cuts, replayed on a real file system: every write and flush that reaches the block device is
//! journalled while the recorder works; then the power is cut at many places of the journal, what a cut may
//! leave is mounted, the real recorder starts on it, and everything that clients were told before is compared.
//!
//! Guarantees: a run is a function of its journal and its seed; a row that was acknowledged before the cut
//! and is not there counts as lost, and so does a start that needs a hand. Needs root: it mounts.

mod disk;
mod journal;
mod load;
mod rig;

pub(crate) use crate::loops::FileSystem;

use crate::loops::{Loop, Mounted};
use crate::server::Server;
use journal::{Event, Kind, read_events};
use rig::{Recorder, Replayer};
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use storage::sim::Random;

/// The hidden command that serves the journalled disk.
pub(crate) const DISK_COMMAND: &str = "powercut-disk";

/// Size of the disk, in bytes: the journal and what is cut from it lie in memory beside it.
const DISK_BYTES: u64 = 1 << 30;
/// How long the recorder records.
const RECORDING: Duration = Duration::from_secs(6);
/// How long an acknowledgement of the disk may be held back, so that flushes overtake writes.
const DELAY_MAX: Duration = Duration::from_micros(300);

/// What to do.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) program: PathBuf,
    pub(crate) file_system: FileSystem,
    pub(crate) cuts: u64,
    pub(crate) seed: u64,
    pub(crate) out: Option<PathBuf>,
}

/// Serves the journalled disk: what the hidden command does.
pub(crate) fn serve_disk(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, micros] = arguments else { return Err(format!("{DISK_COMMAND} DIR DELAY_MICROS").into()) };
    Ok(rig::serve(Path::new(dir), Duration::from_micros(micros.parse()?))?)
}

/// Records, cuts, compares; an error when anything acknowledged was lost.
pub(crate) fn run(plan: &Plan) -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(format!("/dev/shm/flightbox-powercut-{}", std::process::id()));
    let recorder = Recorder::start(&dir, DISK_BYTES, DELAY_MAX)?;
    let device = Loop::attach(&recorder.disk(), true)?;
    plan.file_system.make(&device.device)?;
    let mounted = Mounted::new(device, plan.file_system, &dir.join("live"))?;
    let start = recorder.position()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let settings = ["chunk_bytes=1MiB", "commit_interval=5ms", "segment_bytes=8MiB", "scrub_rate=0"];
    let flags: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let server = Server::start(&plan.program, &mounted.at.join("data"), &flags)?;
    let ledger = runtime.block_on(load::record(&server, recorder.journal.try_clone()?, RECORDING))?;
    let end = recorder.position()?;
    drop(server);
    let events = read_events(&recorder.journal, end)?;
    let ledger = std::mem::take(&mut *ledger.lock().map_err(|_| "a client panicked")?);
    let points = cut_points(&events, start, plan.cuts, plan.seed);
    eprintln!("{} events, {} things told; cutting {} times", events.len(), ledger.len(), points.len());
    let scratch = rig::scratch(&dir)?;
    let mut replayer = Replayer::new(&recorder.journal, &scratch.at.join("durable"), DISK_BYTES)?;
    let image = scratch.at.join("cut.img");
    let mut done = Outcome::default();
    let (mut at, since) = (0, Instant::now());
    for (number, point) in (0_u64..).zip(points) {
        replayer.advance(events.get(at..point).unwrap_or(&[]))?;
        at = point;
        let survivors = replayer.cut(plan.seed.wrapping_add(number), &image)?;
        done.survivors += survivors.len() as u64;
        done.torn += survivors.iter().filter(|one| one.length < one.event.length).count() as u64;
        let cut = events.get(point).map_or(end, |event| event.at);
        let compared = match Mounted::new(Loop::attach(&image, false)?, plan.file_system, &dir.join("after")) {
            Ok(after) => runtime.block_on(load::compare(&plan.program, &after.at.join("data"), &ledger, cut)),
            Err(error) => Err(error.into()),
        };
        done.cuts += 1;
        match compared {
            Ok(compared) => {
                done.rows += compared.rows;
                done.lost.extend(compared.lost.into_iter().map(|lost| format!("cut {number} (event {point}): {lost}")));
            }
            Err(error) => done.repairs.push(format!("cut {number} (event {point}): {error}")),
        }
        if number % 20 == 19 {
            let (lost, repairs) = (done.lost.len(), done.repairs.len());
            eprintln!("{} cuts in {:.0} s: {lost} lost, {repairs} repairs", number + 1, since.elapsed().as_secs_f64());
        }
    }
    done.seconds = since.elapsed().as_secs_f64();
    drop(replayer); // Its file lies on the scratch disk, which is unmounted below.
    let summary = done.summary(plan, &events, ledger.len())?;
    eprintln!("{summary}");
    if let Some(out) = &plan.out {
        let name = format!("powercut-{}", plan.file_system.name());
        crate::report::write_folder(out, &name, Path::new("/dev/shm"), &summary, &[])?;
    }
    drop((scratch, mounted));
    if done.lost.is_empty() && done.repairs.is_empty() { Ok(()) } else { Err("a promise was broken".into()) }
}

/// Where to cut: half of them just before a flush, where most is under way, the others anywhere.
fn cut_points(events: &[Event], start: u64, cuts: u64, seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let place = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let first = events.iter().position(|event| start <= event.at).unwrap_or(0);
    let flushes: Vec<usize> =
        (first..events.len()).filter(|at| events.get(*at).is_some_and(|event| event.kind == Kind::Flush)).collect();
    let mut points: Vec<usize> = (0..cuts)
        .map(|number| match number % 2 {
            0 if !flushes.is_empty() => flushes[place(random.below(flushes.len() as u64))],
            _ => first + place(random.below((events.len() - first) as u64)),
        })
        .collect();
    points.sort_unstable();
    points
}

#[derive(Debug, Default)]
struct Outcome {
    cuts: u64,
    rows: u64,
    survivors: u64,
    torn: u64,
    seconds: f64,
    lost: Vec<String>,
    /// Images that did not mount, recorders that did not start or answer.
    repairs: Vec<String>,
}

impl Outcome {
    fn summary(&self, plan: &Plan, events: &[Event], told: usize) -> Result<String, std::fmt::Error> {
        let count = |kind: Kind| events.iter().filter(|event| event.kind == kind).count();
        let mut text = String::new();
        writeln!(text, "# Power cuts on {} (seed {})\n", plan.file_system.name(), plan.seed)?;
        writeln!(
            text,
            "{} cuts in {:.0} s: {} acknowledged things lost, {} manual repairs; {} rows compared.\n",
            self.cuts,
            self.seconds,
            self.lost.len(),
            self.repairs.len(),
            self.rows
        )?;
        writeln!(
            text,
            "Journal: {} writes, {} zeroings, {} flushes; {told} things told to clients while recording; {} \
             writes that no flush had covered survived a cut, {} of them torn.",
            count(Kind::Write),
            count(Kind::Zero),
            count(Kind::Flush),
            self.survivors,
            self.torn
        )?;
        for line in self.lost.iter().chain(&self.repairs) {
            writeln!(text, "- {line}")?;
        }
        Ok(text)
    }
}
