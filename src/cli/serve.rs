//! `flightbox serve`: logs, then the daemon.

use crate::config::Config;
use crate::daemon::{self, Bench, Ended};
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
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
    match daemon::run(config, bench)? {
        Ended::Stopped => Ok(ExitCode::SUCCESS),
        // A new program in the same process: nothing of the old catalog is open any more, and who watches
        // over the process sees it go on.
        Ended::ToStartAgain => {
            let mut again = std::process::Command::new(std::env::current_exe()?);
            Err(again.args(std::env::args_os().skip(1)).exec().into())
        }
    }
}
