//! `flightbox ls` and `flightbox show`: what a running recorder has.

use crate::cli::bytes;
use crate::config::Config;
use crate::flight::client::Client;
use crate::when;
use serde_json::{Value, json};
use std::io::Write;
use std::process::ExitCode;

type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

pub(super) fn ls(config: &Config, pattern: Option<&str>, as_json: bool) -> Outcome {
    super::runtime()?.block_on(async {
        let mut client = Client::connect(config.listen).await?;
        let names = match pattern {
            None => client.sequences().await?,
            Some(pattern) => {
                let query = json!({ "sequence": { "name": { "$match": pattern } }, "explain": true });
                let answer = client.action("query", &query).await?;
                let items = answer["items"].as_array().cloned().unwrap_or_default();
                items.iter().filter_map(|item| item["sequence"].as_str().map(str::to_owned)).collect()
            }
        };
        let mut out = std::io::stdout().lock();
        let mut all = Vec::new();
        for name in names {
            // One that is deleted meanwhile is left out.
            let Ok((sequence, topics)) = client.describe(&name).await else { continue };
            if as_json {
                all.push(json!({ "sequence": sequence, "topics": topics }));
                continue;
            }
            let sum = |key: &str| topics.iter().filter_map(|topic| topic["data_info"][key].as_u64()).sum::<u64>();
            let created = when::show(sequence["created_at_ns"].as_i64().unwrap_or(0));
            writeln!(
                out,
                "{:<40} {}  {:>9}  {:>4} topics  {:>12} rows  {:>10}",
                name,
                created.get(..19).unwrap_or(&created),
                state(&sequence),
                topics.len(),
                sum("total_row_count"),
                bytes(sum("total_bytes"))
            )?;
        }
        if as_json {
            writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// `locked` when it has sessions and all are finalized.
fn state(sequence: &Value) -> &'static str {
    let sessions = sequence["sessions"].as_array().map_or(&[][..], Vec::as_slice);
    if !sessions.is_empty() && sessions.iter().all(|session| session["locked"] == true) { "locked" } else { "open" }
}

pub(super) fn show(config: &Config, locator: &str, as_json: bool) -> Outcome {
    super::runtime()?.block_on(async {
        let mut client = Client::connect(config.listen).await?;
        let is_topic = locator.trim_start_matches('/').contains('/');
        let (sequence, topics) = client.describe(locator).await?;
        let list = if is_topic { "topic_notification_list" } else { "sequence_notification_list" };
        let notes = client.action(list, &json!({ "locator": locator })).await?;
        let ontology = match topics.as_slice() {
            [topic] if is_topic => {
                let version = topic["flightbox_ontology"]["version"].clone();
                let body = json!({ "tag": topic["ontology_tag"], "version": version });
                // A topic that nothing was put into has no version yet.
                client.action("ontology_get", &body).await.unwrap_or(Value::Null)
            }
            _ => Value::Null,
        };
        let mut out = std::io::stdout().lock();
        if as_json {
            let all = json!({ "sequence": sequence, "topics": topics, "notifications": notes["notifications"],
                "ontology": ontology });
            writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
            return Ok(ExitCode::SUCCESS);
        }
        match topics.as_slice() {
            [topic] if is_topic => write!(out, "{}", topic_text(topic, &ontology))?,
            _ => write!(out, "{}", sequence_text(&sequence, &topics))?,
        }
        for note in notes["notifications"].as_array().into_iter().flatten() {
            let text = |key: &str| note[key].as_str().unwrap_or("");
            writeln!(out, "{}: {}  {}", text("notification_type"), text("created_datetime"), text("msg"))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn sequence_text(sequence: &Value, topics: &[Value]) -> String {
    let mut lines = vec![format!(
        "{}   {}   created {} UTC",
        sequence["resource_locator"].as_str().unwrap_or(""),
        state(sequence),
        when::show(sequence["created_at_ns"].as_i64().unwrap_or(0))
    )];
    lines.extend(metadata(sequence));
    lines.push(format!(
        "{:<28} {:<18} {:>10} {:>10} {:>7}  {:<23} {}",
        "topic", "ontology", "rows", "bytes", "chunks", "first", "length"
    ));
    for topic in topics {
        let locator = topic["resource_locator"].as_str().unwrap_or("");
        let data = &topic["data_info"];
        let (first, length) = times(data);
        let open = match (topic["locked"] == true, topic["flightbox_partial"].is_object()) {
            (_, true) => "   (partial)",
            (true, false) => "",
            (false, false) => "   (open)",
        };
        lines.push(format!(
            "{:<28} {:<18} {:>10} {:>10} {:>7}  {first:<23} {length}{open}",
            locator.split_once('/').map_or(String::new(), |(_, name)| format!("/{name}")),
            topic["ontology_tag"].as_str().unwrap_or(""),
            data["total_row_count"],
            bytes(data["total_bytes"].as_u64().unwrap_or(0)),
            data["total_chunks_count"]
        ));
    }
    lines.join("\n") + "\n"
}

fn times(data: &Value) -> (String, String) {
    match (data["interval"]["start_ns"].as_i64(), data["interval"]["end_ns"].as_i64()) {
        (Some(start), Some(end)) => (when::show(start), when::length(end.abs_diff(start))),
        _ => ("-".to_owned(), "-".to_owned()),
    }
}

fn metadata(of: &Value) -> Vec<String> {
    let fields = of["user_metadata"].as_object();
    fields
        .into_iter()
        .flatten()
        .map(|(key, value)| {
            let text = value.to_string();
            // Bridges keep whole schema definitions here.
            let cut = text.floor_char_boundary(text.len().min(100));
            let more = if cut < text.len() { "…" } else { "" };
            format!("  {key} = {}{more}", text.get(..cut).unwrap_or(""))
        })
        .collect()
}

fn topic_text(topic: &Value, ontology: &Value) -> String {
    let data = &topic["data_info"];
    let (first, length) = times(data);
    let mut lines = vec![
        format!(
            "{}   {}   {}",
            topic["resource_locator"].as_str().unwrap_or(""),
            if topic["locked"] == true { "locked" } else { "open" },
            topic["serialization_format"].as_str().unwrap_or("")
        ),
        format!(
            "{} rows, {}, {} chunks, from {first} UTC for {length}",
            data["total_row_count"],
            bytes(data["total_bytes"].as_u64().unwrap_or(0)),
            data["total_chunks_count"]
        ),
    ];
    lines.extend(metadata(topic));
    let version = &topic["flightbox_ontology"];
    lines.push(format!("ontology {} version {}", topic["ontology_tag"].as_str().unwrap_or(""), version["version"]));
    if topic["flightbox_partial"].is_object() {
        lines.push("partial: its upload was interrupted, and it was finalized as it was".to_owned());
    }
    if let Some(note) = version["note"].as_str() {
        lines.push(format!("note: {note}"));
    }
    lines.extend(super::ontology::columns(ontology));
    lines.join("\n") + "\n"
}
