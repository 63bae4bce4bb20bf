//! `flightbox serve`: logs, then the daemon.

use crate::config::Config;
use crate::daemon::{self, Bench};
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

pub(super) fn run(config: Config, bench: Bench) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let filter = EnvFilter::try_new(&config.log_level)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if config.log_json {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
    daemon::run(config, bench)?;
    Ok(ExitCode::SUCCESS)
}
