//! Measures flightbox beside its limits, in one run: numbers of shared machines mean nothing alone.
//!
//! `image`: DoPut of 8 MiB blobs, and `imu`: of IMU rows, 20,000 a batch, also without the index; closed loop, against a null sink (the same front, which decodes and
//! drops) and the raw disk (aligned direct writes through the same ring). `query`: questions over catalogs of
//! up to 1,000,000 chunks. `startup`: starts after a crash over such catalogs. `powercut`: cuts the power on a real file system, many times. Leaves a dated folder under
//! `bench/runs/` with machine facts, raw CSV and a summary; PERF.md quotes only these.

mod disk;
mod load;
mod powercut;
mod profile;
mod report;
mod scale;
mod startup;

use clap::Parser;
use profile::Profile;
use std::path::PathBuf;
use std::process::ExitCode;

/// What to measure.
#[derive(Debug, Parser)]
#[command(about = "Measure flightbox beside its limits, in one run")]
struct Arguments {
    /// The flightbox program.
    #[arg(long)]
    server: PathBuf,
    /// Profile to run: image, imu, query, startup or powercut.
    #[arg(default_value = "image")]
    profile: String,
    /// Bytes sent in each pass, in MiB.
    #[arg(long, default_value_t = 4096)]
    mib: u64,
    /// Concurrent streams.
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// Passes over all contestants; the medians count.
    #[arg(long, default_value_t = 3)]
    passes: usize,
    /// Power cuts to replay.
    #[arg(long, default_value_t = 200)]
    cuts: u64,
    /// File system that the power is cut on.
    #[arg(long, default_value = "ext4")]
    fs: powercut::FileSystem,
    /// Seed of the cuts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep no results.
    #[arg(long)]
    no_results: bool,
    /// Folder for data while measuring; default: beside the build.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Folder for the results.
    #[arg(long, default_value = "bench/runs")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((command, rest)) if command == powercut::DISK_COMMAND => powercut::serve_disk(rest),
        _ => run(&Arguments::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flightbox-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A pause before each contestant: a shared disk gives credit for idle time, and each must meet the
/// same credit.
fn rest() {
    const REST: std::time::Duration = std::time::Duration::from_secs(15);
    std::thread::park_timeout(REST);
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let scratch = match &arguments.scratch {
        Some(dir) => dir.clone(),
        None => arguments.server.parent().ok_or("--server has no folder")?.to_owned(),
    };
    let profile = match arguments.profile.as_str() {
        "image" => Profile::Image,
        "imu" => Profile::Imu,
        "query" => {
            let sizes = [10_000, 100_000, 1_000_000];
            return scale::run(&arguments.server, &scratch, &arguments.out, &sizes);
        }
        "startup" => {
            return startup::run(&arguments.server, &scratch, &arguments.out, &[1000, 100_000, 1_000_000]);
        }
        "powercut" => {
            return powercut::run(&powercut::Plan {
                program: arguments.server.clone(),
                file_system: arguments.fs,
                cuts: arguments.cuts,
                seed: arguments.seed,
                out: (!arguments.no_results).then(|| arguments.out.clone()),
            });
        }
        other => {
            return Err(format!("there is no profile {other:?}; known: image, imu, query, startup, powercut").into());
        }
    };
    let mut report = report::Report::new(&arguments.profile, arguments.mib, arguments.streams);
    for pass in 0..arguments.passes {
        // Interleaved, so that a slow minute of a shared machine meets all of them.
        let disk = disk::measure(&scratch, arguments.mib << 20, arguments.streams)?;
        report.add(pass, "disk", disk.plain_mib_s);
        report.add(pass, "disk_sync_16mib", disk.synced_mib_s);
        report.add(pass, "disk_dsync_1mib", disk.dsync_mib_s);
        let sink = load::measure(arguments, &scratch, profile, load::Target::NullSink)?;
        report.add(pass, "null_sink", sink.mib_s);
        if profile == Profile::Imu {
            let without = load::measure(arguments, &scratch, profile, load::Target::NoIndex)?;
            report.add(pass, "no_index", without.mib_s);
        }
        let put = load::measure(arguments, &scratch, profile, load::Target::Flightbox)?;
        report.add(pass, "flightbox", put.mib_s);
        report.stations = put.info;
    }
    report.write(&arguments.out, &scratch)?;
    Ok(())
}
