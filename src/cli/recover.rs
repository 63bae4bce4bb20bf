//! `flightbox recover`: the catalog of a stopped recorder made again from its files; and how a recovery's
//! receipt reads.

use crate::cli::bytes;
use crate::config::{Config, EngineChoice};
use crate::folder::{self, FORMAT_VERSION};
use crate::{recovery, volumes};
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use storage::catalog::Catalog;
use storage::rebuild::Rebuilt;
use storage::recover::Receipt;
use storage::uring;

type AnyError = Box<dyn std::error::Error>;

pub(super) fn run(config: &Config, json: bool) -> Result<ExitCode, AnyError> {
    if !config.data_dir.join("sequences").is_dir() {
        return Err(format!("{} holds no recordings; give --data", config.data_dir.display()).into());
    }
    let (_lock, format) = folder::prepare(&config.data_dir)?;
    let volumes = volumes::open(config)?;
    let disk = uring::probe(&config.data_dir, config.engine == EngineChoice::Auto);
    if format < FORMAT_VERSION && Catalog::open(&config.data_dir.join("catalog"), disk.direct).is_ok() {
        let why = "the folder has an older format, whose files do not tell enough to do without their catalog, and that one \
                   opens: start `flightbox serve` on it once, which migrates it";
        return Err(why.into());
    }
    let mut progress = |done: &Rebuilt| {
        if std::io::stderr().is_terminal() {
            let text = format!("{} sequences, {} topics, {} chunks", done.sequences, done.topics, done.chunks);
            write!(std::io::stderr(), "\r{text}\x1b[K").ok(); // Nothing depends on it.
        }
    };
    let opened =
        folder::rebuild_catalog(&Arc::new(volumes.volumes), &disk, "`flightbox recover`".to_owned(), &mut progress)?;
    if std::io::stderr().is_terminal() {
        writeln!(std::io::stderr())?;
    }
    let receipt = Receipt {
        at_ns: crate::when::now_ns(),
        catalog_was: opened.was,
        rebuilt: opened.rebuilt,
        ..recovery::last_receipt(&opened.catalog)?.unwrap_or_default()
    };
    let receipt = serde_json::to_value(receipt)?;
    let text = if json { serde_json::to_string_pretty(&receipt)? } else { render(&receipt) };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

/// A receipt for people.
pub(super) fn render(receipt: &Value) -> String {
    if receipt.is_null() {
        return "no recovery found anything to do".to_owned();
    }
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
    let when = crate::when::show(receipt["at_ns"].as_i64().unwrap_or(0));
    let mut lines = vec![format!("recovery of {when} UTC, {} ms", number(receipt, "took_ms"))];
    if let Some(was) = receipt["catalog_was"].as_str() {
        lines.push(format!("catalog: {was}"));
    }
    let rebuilt = &receipt["rebuilt"];
    if !rebuilt.is_null() {
        lines.push(format!(
            "made again from the files: {} sequences, {} topics, {} chunks, {} rows",
            number(rebuilt, "sequences"),
            number(rebuilt, "topics"),
            number(rebuilt, "chunks"),
            number(rebuilt, "rows")
        ));
        for missing in rebuilt["missing"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            lines.push(format!("  missing: {missing}"));
        }
        for moved in rebuilt["moved"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            lines.push(format!("  says nothing of itself: {moved}"));
        }
    }
    for topic in receipt["topics"].as_array().into_iter().flatten() {
        lines.push(format!(
            "{:<30} {:>10} rows {:>8} batches{}{}{}{}",
            topic["locator"].as_str().unwrap_or(""),
            number(topic, "rows"),
            number(topic, "batches"),
            if topic["locked"] == Value::Bool(true) { "" } else { ", interrupted" },
            match number(topic, "discarded_bytes") {
                0 => String::new(),
                count => format!(", {} never acknowledged and discarded", bytes(count)),
            },
            match number(topic, "adopted_rows") {
                0 => String::new(),
                rows => format!(", {rows} rows taken over from the files"),
            },
            match number(topic, "damaged_chunks") {
                0 => String::new(),
                chunks => format!(", {chunks} chunks damaged"),
            },
        ));
    }
    lines.push(format!(
        "{} deletions finished, {} orphans removed",
        number(receipt, "deletions_finished"),
        receipt["orphans_removed"].as_array().map_or(0, Vec::len)
    ));
    lines.join("\n")
}
