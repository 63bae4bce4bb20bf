//! `flightbox verify`: every byte against what was written, of a running recorder by its own hands, of a
//! stopped one here.

use crate::cli::bytes;
use crate::config::Config;
use crate::daemon;
use crate::flight::client::Client;
use crate::lifecycle::damage::Checker;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use storage::verify::{Finding, Looked, verify_catalog};

type AnyError = Box<dyn std::error::Error>;

pub(super) fn run(config: &Config, sequence: Option<&str>, as_json: bool) -> Result<ExitCode, AnyError> {
    // One runtime for all of it: a connection lives as long as the one it was made on.
    let runtime = super::runtime()?;
    let online = runtime.block_on(async {
        match Client::connect(config.listen).await {
            // One that runs on another folder is not asked.
            Ok(mut client) => Ok(client.appliance_info().await.ok().filter(|info| is_of(info, config)).map(|_| client)),
            Err(_) => Ok::<_, AnyError>(None),
        }
    })?;
    let looked = match online {
        Some(client) => runtime.block_on(ask(client, sequence))?,
        None => offline(config, sequence)?,
    };
    let report = if as_json { serde_json::to_string_pretty(&looked)? } else { render(&looked) };
    writeln!(std::io::stdout(), "{report}")?;
    Ok(if looked.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_of(info: &Value, config: &Config) -> bool {
    let theirs = info["data_dir"].as_str().map(std::path::Path::new).and_then(|path| path.canonicalize().ok());
    theirs.is_some() && theirs == config.data_dir.canonicalize().ok()
}

async fn ask(client: Client, sequence: Option<&str>) -> Result<Looked, AnyError> {
    let mut client = client;
    let what = sequence.map_or_else(|| json!({}), |name| json!({ "sequence": name }));
    let there = client.action("verify", &what).await?;
    let findings: Vec<Finding> = serde_json::from_value(there["findings"].clone())?;
    let mut looked = Looked { findings, ..Looked::default() };
    let topics: Vec<String> = serde_json::from_value(there["topics"].clone())?;
    for (index, topic) in topics.iter().enumerate() {
        show(&format!("topic {} of {}: {topic}, {} read", index + 1, topics.len(), bytes(looked.bytes)));
        match client.action("verify", &json!({ "locator": topic })).await {
            Ok(one) => looked.add(serde_json::from_value(one)?),
            // Deleted since it was listed.
            Err(error) if error.contains("does not exist") => {}
            Err(error) => return Err(error.into()),
        }
    }
    show("");
    Ok(looked)
}

fn offline(config: &Config, sequence: Option<&str>) -> Result<Looked, AnyError> {
    if !config.data_dir.join("catalog").is_dir() {
        return Err(format!("{} holds no recordings; give --data", config.data_dir.display()).into());
    }
    let (data_dir, sequence) = (config.data_dir.clone(), sequence.map(str::to_owned));
    daemon::offline(config, |offline| async move {
        let mut looked = Looked { findings: verify_catalog(&offline.catalog)?, ..Looked::default() };
        let checker =
            Checker { catalog: offline.catalog, committer: offline.committer, loader: offline.loader, data_dir };
        let topics = checker.topics(sequence.as_deref())?;
        if let (Some(name), true) = (&sequence, topics.is_empty()) {
            return Err(format!("there is no sequence `{name}` with topics").into());
        }
        for (index, topic) in topics.iter().enumerate() {
            let before = looked.bytes;
            let see = |one: &Looked| {
                let read = bytes(before + one.bytes);
                show(&format!("topic {} of {}: {}, {read} read", index + 1, topics.len(), topic.locator));
            };
            looked.add(checker.topic(&topic.locator, see).await?);
        }
        show("");
        Ok(looked)
    })
}

/// One line that is written over by the next.
fn show(line: &str) {
    if std::io::stderr().is_terminal() {
        write!(std::io::stderr(), "\r{line}\x1b[K").ok(); // Nothing depends on it.
    }
}

fn render(looked: &Looked) -> String {
    let mut lines: Vec<String> = looked
        .findings
        .iter()
        .map(|finding| {
            let file = finding.file.as_ref().map(|file| format!("{} at byte {}: ", file.display(), finding.at));
            let part = serde_json::to_value(finding.part).ok().and_then(|part| part.as_str().map(str::to_owned));
            let lost = if finding.lost_chunk.is_some() { " (its rows are left out of reads)" } else { "" };
            let (part, file) = (part.unwrap_or_default(), file.unwrap_or_default());
            format!("DAMAGED {part} {}: {file}{}{lost}", finding.topic, finding.what)
        })
        .collect();
    let verdict = match looked.findings.len() {
        0 => "everything is as it was written".to_owned(),
        count => format!("{count} findings"),
    };
    lines.push(format!(
        "{} topics, {} chunks, {} rows, {} read: {verdict}",
        looked.topics,
        looked.chunks,
        looked.rows,
        bytes(looked.bytes)
    ));
    lines.join("\n")
}
