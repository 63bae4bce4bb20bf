//! `flightbox doctor`: what start-up checks, without starting.

use crate::config::Config;
use crate::host;
use std::io::Write;
use std::process::ExitCode;

pub(super) fn run(config: &Config) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let checks = host::check(config);
    let mut out = std::io::stdout();
    for check in &checks {
        writeln!(out, "{}", check.line())?;
    }
    let failed = checks.iter().any(|check| check.verdict == host::Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
