//! `flightbox query`: a readable question, its answer as a table or JSON, or the matching rows as files.

use crate::cli::expr::{self, WITHIN_OF_TAG};
use crate::cli::{bytes, fetch};
use crate::config::Config;
use crate::flight::client::Client;
use crate::when;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Shown below `flightbox query --help`.
pub(super) const HELP: &str = "\
Fields are Tag.path (flightbox ontology show TAG lists them); list elements by [?] any, [!] all, [0].
A condition of one tag must hold in one row; conditions of several tags in one sequence, and the windows
say where they hold at once.

Operators: = != < <= > >=   between A and B   outside A and B   in (A, B)   match 'glob*'   exists   missing
           within SOUTH,WEST,NORTH,EAST (a position, in degrees)   and  or  not  ( )
Also asked: sequence, sequence.created, sequence.user_metadata.KEY, topic, topic.tag, topic.user_metadata.KEY

Examples:
  flightbox query 'IMU.acceleration.x > 9 and GPS within 45.4,9.1,45.5,9.3'
  flightbox query \"sequence match 'drive*' and IMU.acceleration.norm > 20\" --fetch out --format csv
  flightbox query \"sequence.user_metadata.driver = 'ada' and sequence.created > '2026-11-01'\"";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Parquet,
    Csv,
}

#[derive(Debug, Args)]
pub(super) struct Question {
    /// What to look for.
    question: String,
    /// Print JSON, with every interval.
    #[arg(long)]
    json: bool,
    /// Most sequences in the answer.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// How far apart rows of different tags may be and still count as at once, e.g. 100ms.
    #[arg(long, value_name = "TIME", default_value = "0ms")]
    join: String,
    /// Write the rows of just the matching windows below this folder, one file a topic.
    #[arg(long, value_name = "DIR")]
    fetch: Option<PathBuf>,
    /// Form of the files of --fetch.
    #[arg(long, value_enum, default_value = "parquet", requires = "fetch")]
    format: Format,
}

pub(super) fn run(config: &Config, question: &Question) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut query = expr::to_query(&question.question)?;
    let join = crate::config::parse_duration(&question.join)
        .ok_or_else(|| format!("--join {:?} is not a duration; write it like 100ms", question.join))?;
    query.insert("intervals".to_owned(), json!(true));
    query.insert("explain".to_owned(), json!(true));
    query.insert("join_dt_ns".to_owned(), json!(u64::try_from(join.as_nanos()).unwrap_or(u64::MAX)));
    if let Some(limit) = question.limit {
        query.insert("limit".to_owned(), json!(limit));
    }
    super::runtime()?.block_on(async {
        let mut client = Client::connect(config.listen).await?;
        name_positions(&mut client, &mut query).await?;
        let answer = client.action("query", &Value::Object(query)).await?;
        let mut out = std::io::stdout().lock();
        if question.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
        } else {
            write!(out, "{}", table(&answer))?;
        }
        if let Some(dir) = &question.fetch {
            fetch::fetch(&mut client, &answer, dir, question.format).await?;
        }
        let found = answer["items"].as_array().is_some_and(|items| !items.is_empty());
        Ok(if found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// `GPS within …` names no field: the registry knows which one is the position.
async fn name_positions(client: &mut Client, query: &mut Map<String, Value>) -> Result<(), String> {
    match query.get_mut("ontology") {
        Some(content) => Box::pin(name_positions_in(client, content)).await,
        None => Ok(()),
    }
}

async fn name_positions_in(client: &mut Client, value: &mut Value) -> Result<(), String> {
    match value {
        Value::Array(items) => {
            for item in items {
                Box::pin(name_positions_in(client, item)).await?;
            }
        }
        Value::Object(fields) => {
            let unnamed =
                fields.keys().find_map(|key| key.strip_suffix(WITHIN_OF_TAG)?.strip_suffix('.').map(str::to_owned));
            if let Some(tag) = unnamed {
                let ontology = client.action("ontology_get", &json!({ "tag": tag })).await?;
                let position =
                    ontology["index"].as_array().into_iter().flatten().find_map(|index| index["box"].as_str());
                let position = position.ok_or_else(|| {
                    format!("ontology `{tag}` has no position; `within` is asked of one with latitude and longitude")
                })?;
                if let Some(corners) = fields.remove(&format!("{tag}.{WITHIN_OF_TAG}")) {
                    fields.insert(format!("{tag}.{position}"), corners);
                }
            }
            for (_, inner) in fields.iter_mut().filter(|(key, _)| key.starts_with('$')) {
                Box::pin(name_positions_in(client, inner)).await?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Intervals and windows shown of each, in the table.
const SHOWN_MAX: usize = 8;

fn table(answer: &Value) -> String {
    let mut lines = Vec::new();
    let items = answer["items"].as_array().map_or(&[][..], Vec::as_slice);
    for item in items {
        lines.push(item["sequence"].as_str().unwrap_or("").to_owned());
        let topics = item["topics"].as_array().map_or(&[][..], Vec::as_slice);
        for topic in topics {
            let locator = topic["locator"].as_str().unwrap_or("");
            let name = locator.split_once('/').map_or("", |(_, name)| name);
            let intervals = topic["intervals"].as_array().map_or(0, Vec::len);
            let count = if intervals == 0 { String::new() } else { format!("{intervals} interval(s)") };
            lines.push(format!("  /{name:<24} {:<18} {count}", topic["ontology_tag"].as_str().unwrap_or("")));
            if topics.len() == 1 {
                lines.extend(intervals_of(&topic["intervals"]));
            }
        }
        if topics.len() > 1 && item["windows"].as_array().is_some_and(|windows| !windows.is_empty()) {
            lines.push("  at once:".to_owned());
            lines.extend(intervals_of(&item["windows"]));
        } else if topics.len() > 1
            && topics.iter().any(|topic| topic["intervals"].as_array().is_some_and(|i| !i.is_empty()))
        {
            lines.push("  never at once; --join TIME lets them be that far apart".to_owned());
        }
    }
    if items.is_empty() {
        lines.push("nothing found".to_owned());
    }
    if answer["truncated"] == true {
        lines.push("(cut: more than --limit, or more intervals than one answer holds)".to_owned());
    }
    lines.push(cost(&answer["explain"]));
    lines.join("\n") + "\n"
}

fn intervals_of(intervals: &Value) -> Vec<String> {
    let all = intervals.as_array().map_or(&[][..], Vec::as_slice);
    let mut lines: Vec<String> = all
        .iter()
        .take(SHOWN_MAX)
        .map(|interval| {
            let time = |key: &str| interval[key].as_i64().unwrap_or(0);
            let (start, end) = (time("start_ns"), time("end_ns"));
            format!("    {} UTC  + {}", when::show(start), when::length(end.abs_diff(start)))
        })
        .collect();
    if all.len() > SHOWN_MAX {
        lines.push(format!("    … and {} more (--json shows all)", all.len() - SHOWN_MAX));
    }
    lines
}

fn cost(explain: &Value) -> String {
    let count = |key: &str| explain[key].as_u64().unwrap_or(0);
    let (read, stored) = (count("bytes_read"), count("bytes_stored"));
    format!(
        "{} chunks: {} ruled out, {} proven by the index, {} read; {} of the {} recorded ({:.3} %) in {}",
        count("chunks_considered"),
        count("chunks_ruled_out"),
        count("chunks_proven"),
        count("chunks_read"),
        bytes(read),
        bytes(stored),
        read as f64 * 100.0 / (stored.max(1)) as f64,
        when::length(count("micros") * 1000)
    )
}
