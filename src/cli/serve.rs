//! `flightbox serve`: logs, then the daemon.

use crate::config::Config;
use crate::daemon;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

pub(super) fn run(config: Config, null_sink: bool) -> Result<ExitCode, Box<dyn std::error::Error>> {
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
    daemon::run(config, null_sink)?;
    Ok(ExitCode::SUCCESS)
}
