//! `flightbox info`: the state of a running recorder, for people or as JSON.

use crate::cli::bytes;
use crate::config::Config;
use crate::flight::client::Client;
use serde_json::Value;
use std::io::Write;
use std::process::ExitCode;

pub(super) fn run(config: &Config, json: bool, recovery: bool) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let info = super::runtime()?.block_on(async { Client::connect(config.listen).await?.appliance_info().await })?;
    let text = match (recovery, json) {
        (true, true) => serde_json::to_string_pretty(&info["recovery"])?,
        (true, false) => super::recover::render(&info["recovery"]),
        (false, true) => serde_json::to_string_pretty(&info)?,
        (false, false) => render(&info),
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// The same facts as the JSON, aligned.
fn render(info: &Value) -> String {
    let flag = |path: &str| if info.pointer(path) == Some(&Value::Bool(true)) { "yes" } else { "no" };
    let text = |path: &str| info.pointer(path).and_then(Value::as_str).unwrap_or("?").to_owned();
    let number = |path: &str| info.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let mut lines = vec![
        format!("flightbox {}   data {}", text("/version"), text("/data_dir")),
        format!(
            "engine {}   O_DIRECT {}   registered buffers {}   writers {}",
            text("/engine"),
            flag("/direct_io"),
            flag("/registered_buffers"),
            number("/writers")
        ),
    ];
    for note in info["notes"].as_array().into_iter().flatten() {
        lines.push(format!("note: {}", note.as_str().unwrap_or("")));
    }
    lines.push(format!(
        "health: catalog {}, disk space {} ({} free)",
        text("/health/catalog"),
        text("/health/space"),
        bytes(number("/health/free_bytes"))
    ));
    for volume in info["volumes"].as_array().into_iter().flatten().skip(1) {
        lines.push(format!(
            "volume {}: {}, space {} ({} free)",
            volume["root"].as_str().unwrap_or("?"),
            volume["role"].as_str().unwrap_or("?"),
            volume["space"].as_str().unwrap_or("?"),
            bytes(volume["free_bytes"].as_u64().unwrap_or(0))
        ));
    }
    lines.push(format!(
        "stored: {} sequences, {} topics, {} rows, {} chunks, {}",
        number("/stored/sequences"),
        number("/stored/topics"),
        number("/stored/rows"),
        number("/stored/chunks"),
        bytes(number("/stored/chunk_bytes"))
    ));
    lines.push(format!(
        "since start: {} rows, {} batches, {} of data, {} chunks, {} tail runs, {} commit groups, {} uploads open",
        number("/since_start/rows"),
        number("/since_start/batches"),
        bytes(number("/since_start/bytes")),
        number("/since_start/chunks"),
        number("/since_start/tail_runs"),
        number("/since_start/commit_groups"),
        number("/since_start/uploads_open")
    ));
    let kinds = ["chunk", "padding", "trailer", "footer", "rewrite", "read"]
        .map(|kind| format!("{kind} {}", bytes(number(&format!("/ring_bytes/{kind}")))));
    lines.push(format!("ring: {}", kinds.join(", ")));
    lines.push(format!("memory: {} held of at most {}", bytes(number("/memory/held")), bytes(number("/memory/bound"))));
    lines.push(format!(
        "{:<8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "station", "count", "p50 ms", "p99 ms", "p99.9 ms", "max ms"
    ));
    for station in info["stations"].as_array().into_iter().flatten() {
        let ms = |key: &str| station[key].as_f64().unwrap_or(0.0) / 1000.0;
        lines.push(format!(
            "{:<8} {:>10} {:>10.3} {:>10.3} {:>10.3} {:>10.3}",
            station["station"].as_str().unwrap_or(""),
            station["count"],
            ms("p50_us"),
            ms("p99_us"),
            ms("p999_us"),
            ms("max_us")
        ));
    }
    lines.join("\n")
}
