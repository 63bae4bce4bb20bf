//! The command line: one file a command.

mod doctor;
mod expr;
mod fetch;
mod info;
mod list;
mod ontology;
mod query;
mod recover;
mod reindex;
mod serve;
mod verify;

use crate::config::raw::Raw;
use crate::config::{Config, ConfigError};
use crate::daemon::Bench;
use crate::host;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(
    name = "flightbox",
    version,
    about = "An Arrow Flight ingest appliance for a single Linux node",
    after_help = "Settings: a flag goes above the environment (FLIGHTBOX_<KEY>), that above the file of --config, that above the defaults.\nEvery key is in systemd/flightbox.toml."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the recorder until it is told to stop.
    Serve {
        #[command(flatten)]
        settings: Settings,
        /// For `./x bench` only: decode and drop everything; nothing is stored or acknowledged.
        #[arg(long, hide = true)]
        null_sink: bool,
        /// For `./x bench` only: no statistics, no skip index; queries read everything.
        #[arg(long, hide = true)]
        no_index: bool,
    },
    /// Show the state of a running recorder.
    Info {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Only what the last recovery found and did.
        #[arg(long)]
        recovery: bool,
    },
    /// Read everything and compare every byte with what was written, of a running or a stopped recorder.
    /// Exit code 1 if something is wrong; damaged chunks are marked and left out of reads.
    Verify {
        #[command(flatten)]
        settings: Settings,
        /// Only this sequence.
        #[arg(long, value_name = "NAME")]
        sequence: Option<String>,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// For the worst day: set the catalog of a stopped recorder aside and make another from the files.
    Recover {
        #[command(flatten)]
        settings: Settings,
        /// Print the receipt as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check this machine and this folder: one line each, with cause and remedy.
    Doctor(Settings),
    /// List the sequences of a running recorder.
    Ls {
        #[command(flatten)]
        settings: Settings,
        /// Only names that fit a glob, e.g. 'drive*'.
        pattern: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a sequence or topic of a running recorder: state, metadata, rows, times, schema.
    Show {
        #[command(flatten)]
        settings: Settings,
        /// SEQUENCE or SEQUENCE/TOPIC.
        locator: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Find recordings by what is in them, e.g. 'IMU.acceleration.x > 9 and GPS within 45.4,9.1,45.5,9.3'.
    #[command(after_help = query::HELP)]
    Query {
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        question: query::Question,
    },
    /// Look at, check and register ontologies: which schemas a tag has.
    #[command(subcommand)]
    Ontology(ontology::Ontology),
    /// Compute the skip index anew from the segments of a stopped recorder.
    Reindex {
        #[command(flatten)]
        settings: Settings,
        /// Only compare; change nothing. Exit code 1 if something differs.
        #[arg(long)]
        check: bool,
    },
}

/// Settings that have a flag; every other key is set in the file or the environment.
#[derive(Debug, Args)]
struct Settings {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the recordings.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Address and port of Arrow Flight.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Path of a Unix-domain socket as well.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Any setting by its key, e.g. --set memory_budget=256MiB. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Settings {
    fn load(&self) -> Result<Config, ConfigError> {
        let mut raw = Raw::defaults();
        if let Some(path) = &self.config {
            raw.add_file(path)?;
        }
        // Variables that are not UTF-8 cannot be settings of ours.
        raw.add_env(
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        )?;
        for setting in &self.set {
            let (key, value) = setting.split_once('=').ok_or_else(|| ConfigError {
                key: "--set".to_owned(),
                value: setting.clone(),
                origin: "command line".to_owned(),
                why: "is not KEY=VALUE".to_owned(),
            })?;
            raw.set(key, value.to_owned(), "command line")?;
        }
        let flags = [
            ("data_dir", self.data.as_ref().map(|path| path.display().to_string())),
            ("listen", self.listen.clone()),
            ("unix_socket", self.unix.as_ref().map(|path| path.display().to_string())),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                raw.set(key, value, "command line")?;
            }
        }
        let others = raw.get("data_dirs").text.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let folders: Vec<PathBuf> = others.chain([PathBuf::from(&raw.get("data_dir").text)]).collect();
        Config::check(&raw, &host::facts(&folders))
    }
}

/// A count of bytes as people read it.
fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| *unit <= count) {
        Some((unit, name)) => format!("{:.1} {name}", count as f64 / unit as f64),
        None => format!("{count} B"),
    }
}

/// A runtime for one command.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Parses the command line and runs the command.
pub(crate) fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let command = Cli::parse().command;
    if !matches!(command, Command::Doctor(_)) {
        host::check_processor()?;
    }
    match command {
        Command::Serve { settings, null_sink, no_index } => serve::run(settings.load()?, Bench { null_sink, no_index }),
        Command::Info { settings, json, recovery } => info::run(&settings.load()?, json, recovery),
        Command::Verify { settings, sequence, json } => verify::run(&settings.load()?, sequence.as_deref(), json),
        Command::Recover { settings, json } => recover::run(&settings.load()?, json),
        Command::Doctor(settings) => doctor::run(&settings.load()?),
        Command::Ls { settings, pattern, json } => list::ls(&settings.load()?, pattern.as_deref(), json),
        Command::Show { settings, locator, json } => list::show(&settings.load()?, &locator, json),
        Command::Query { settings, question } => query::run(&settings.load()?, &question),
        Command::Ontology(command) => ontology::run(&command),
        Command::Reindex { settings, check } => reindex::run(&settings.load()?, check),
    }
}
