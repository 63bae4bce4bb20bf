//! flightbox: an Arrow Flight ingest appliance for a single Linux node. ARCHITECTURE.md is the map.

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
mod scrub;
#[cfg(test)]
mod simulation;
mod stats;
mod systemd;
mod when;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("flightbox: {error}");
            ExitCode::FAILURE
        }
    }
}
