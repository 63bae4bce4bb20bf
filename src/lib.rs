//! flightbox: an Arrow Flight ingest appliance for a single Linux node. ARCHITECTURE.md is the map.
//!
//! A library only so that the program and the fuzz targets can have the same code; nobody else uses it.

mod cli;
mod config;
mod daemon;
mod flight;
mod folder;
mod health;
mod host;
mod housekeeping;
mod ingest;
mod lifecycle;
mod limits;
mod ontology;
mod query;
mod recovery;
mod rings;
#[cfg(test)]
mod samples;
mod scrub;
#[cfg(test)]
mod simulation;
mod stats;
mod systemd;
mod volumes;
mod when;

#[cfg(any(test, feature = "hostile"))]
pub use flight::hostile;

use std::process::ExitCode;

/// The program: parses the command line, runs the command, says what went wrong.
pub fn run() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("flightbox: {error}");
            ExitCode::FAILURE
        }
    }
}
