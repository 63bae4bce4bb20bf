//! Writers of files that people use instead of a server: MCAP by its Rust library, and by Python what
//! `bench/python` has. All of them sync once, at the end.

use crate::profile::Profile;
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// As flightbox's chunks.
const CHUNK_BYTES: u64 = 16 << 20;

/// Bytes a second of the MCAP library: the IPC bodies as messages, uncompressed chunks.
pub(crate) fn mcap(scratch: &Path, profile: Profile, bytes: u64) -> Result<f64, Box<dyn Error>> {
    let path = scratch.join("rival.mcap");
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let (_, messages) = runtime.block_on(profile.flight_data("", ""))?;
    let payload = &messages.first().ok_or("no message")?.data_body;
    let count = (bytes / payload.len() as u64).max(1);
    let started = Instant::now();
    let file = std::fs::File::create(&path)?;
    let mut writer = mcap::WriteOptions::new()
        .compression(None)
        .chunk_size(Some(CHUNK_BYTES))
        .create(BufWriter::with_capacity(1 << 20, file.try_clone()?))?;
    let channel = writer.add_channel(0, "/bench", "arrow", &BTreeMap::new())?;
    for number in 0..count {
        let header = mcap::records::MessageHeader {
            channel_id: channel,
            sequence: u32::try_from(number)?,
            log_time: number,
            publish_time: number,
        };
        writer.write_to_known_channel(&header, payload)?;
    }
    writer.finish()?;
    writer.into_inner().flush()?;
    file.sync_all()?;
    let rate = (count * payload.len() as u64) as f64 / started.elapsed().as_secs_f64();
    std::fs::remove_file(&path)?;
    Ok(rate)
}

/// The Python that has pyarrow and mcap: that of the newest client generation, set up by `./x`.
pub(crate) fn python() -> Option<PathBuf> {
    let venvs = std::env::var_os("TEST_VENVS")?;
    Some(PathBuf::from(venvs).join("venv-0.7.0/bin/python")).filter(|python| python.is_file())
}

/// Bytes a second that a script of `bench/python` reports.
pub(crate) fn script(python: &Path, script: &str, arguments: &[&str]) -> Result<f64, Box<dyn Error>> {
    let output = Command::new(python).arg(Path::new("bench/python").join(script)).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    match numbers.as_slice() {
        [seconds, bytes] if output.status.success() => Ok(bytes / seconds),
        _ => Err(format!("{script} failed: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}
