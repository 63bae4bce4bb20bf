//! Measures flightbox beside its limits and rivals, in one run: numbers of shared machines mean nothing alone.
//!
//! `all`: everything of the speed budget, with a verdict on each goal ([`goals`]); or one of its measurements by
//! name ([`suite`]). `query`: questions over catalogs of up to 1,000,000 chunks. `startup`: starts after a crash
//! over such catalogs. `powercut`: cuts the power on a real file system, many times. Each leaves a dated
//! folder under `bench/runs/` with machine facts, raw CSV, plots and a summary; PERF.md quotes only these.

mod closed;
mod disk;
mod files;
mod flame;
mod goals;
mod loops;
mod memory;
mod open;
mod paced;
mod plot;
mod powercut;
mod profile;
mod report;
mod rival;
mod samples;
mod scale;
mod server;
mod startup;
mod suite;
mod volumes;
mod wire;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// The same allocator as flightbox: rivals and null source must not lose by theirs.
#[global_allocator]
static ALLOCATOR: storage::uring::allocator::Allocator = storage::uring::allocator::Allocator;

/// What to measure.
#[derive(Debug, Parser)]
#[command(about = "Measure flightbox beside its limits, in one run")]
struct Arguments {
    /// The flightbox program.
    #[arg(long)]
    server: PathBuf,
    /// What to measure: all, query, startup, powercut, or parts of `all` by name: machine, image, image-1, lidar,
    /// imu-20000, h264, latency, can, drive, isolation, delete, topics, commits, get, finalize, small, compression.
    #[arg(default_value = "all")]
    names: Vec<String>,
    /// Bytes sent in each closed loop, in MiB.
    #[arg(long, default_value_t = 4096)]
    mib: u64,
    /// Passes over all contestants; the medians count.
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// Sample the server's stacks with perf, and keep flame graphs. Costs a few per cent.
    #[arg(long)]
    perf: bool,
    /// Closed loops of flightbox alone, without limits and rivals: to alternate two builds while developing.
    #[arg(long)]
    alone: bool,
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
        Some((command, rest)) if command == rival::COMMAND => rival::serve(rest),
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

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let scratch = match &arguments.scratch {
        Some(dir) => dir.clone(),
        None => arguments.server.parent().ok_or("--server has no folder")?.to_owned(),
    };
    match arguments.names.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["query"] => {
            let sizes = [10_000, 100_000, 1_000_000];
            scale::run(&arguments.server, &scratch, &arguments.out, &sizes)
        }
        ["startup"] => startup::run(&arguments.server, &scratch, &arguments.out, &[1000, 100_000, 1_000_000]),
        ["powercut"] => powercut::run(&powercut::Plan {
            program: arguments.server.clone(),
            file_system: arguments.fs,
            cuts: arguments.cuts,
            seed: arguments.seed,
            out: (!arguments.no_results).then(|| arguments.out.clone()),
        }),
        ["all"] => run_suite(arguments, &scratch, &suite::ALL),
        names => run_suite(arguments, &scratch, names),
    }
}

/// Pass by pass, so that each contestant meets every hour of a shared machine.
fn run_suite(
    arguments: &Arguments,
    scratch: &std::path::Path,
    names: &[&str],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut suite = suite::Suite::new(&arguments.server, scratch, arguments.mib << 20)?;
    let title = if names == suite::ALL { "all".to_owned() } else { names.join("+") };
    let folder =
        if arguments.no_results { tempfile::tempdir()?.keep() } else { report::folder(&arguments.out, &title)? };
    suite.alone = arguments.alone;
    if arguments.perf {
        suite.profiles = Some(folder.clone());
    }
    for pass in 0..arguments.passes {
        for name in names {
            suite.pass(pass, name)?;
        }
        // What is there so far stays there, whatever comes.
        report::write_suite(&folder, scratch, &suite.samples, &suite.kept, pass + 1)?;
    }
    Ok(())
}
