//! `flightbox ontology`: the registry of a running recorder, and checks of schema files without one.

use crate::cli::Settings;
use crate::flight::client::Client;
use clap::Subcommand;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use storage::ontology::form;
use storage::schema::TopicSchema;

#[derive(Debug, Subcommand)]
pub(super) enum Ontology {
    /// All registered tags with their versions.
    List {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// One ontology: its fields, and what the index adds.
    Show {
        #[command(flatten)]
        settings: Settings,
        /// The tag, e.g. IMU.
        tag: String,
        /// A version; the newest if not given.
        #[arg(long)]
        version: Option<u32>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Register the schema of a file (see `check`) under a tag.
    Add {
        #[command(flatten)]
        settings: Settings,
        /// The tag.
        tag: String,
        /// The file.
        file: PathBuf,
    },
    /// Check a schema file without a recorder: a JSON list of fields like
    /// [{"name": "timestamp_ns", "type": "int64", "nullable": false}, {"name": "x", "type": "double"}].
    Check {
        /// The file.
        file: PathBuf,
    },
}

pub(super) fn run(command: &Ontology) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    match command {
        Ontology::List { settings, json } => {
            let config = settings.load()?;
            let answer = super::runtime()?
                .block_on(async { Client::connect(config.listen).await?.action("ontology_list", &json!({})).await })?;
            if *json {
                writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
            } else {
                for ontology in answer["ontologies"].as_array().into_iter().flatten() {
                    let text = |key: &str| ontology[key].as_str().unwrap_or("");
                    let (version, fields) = (&ontology["version"], &ontology["fields"]);
                    writeln!(out, "{:<28} version {version:<3} {fields:>3} fields  {}", text("tag"), text("origin"))?;
                }
            }
        }
        Ontology::Show { settings, tag, version, json } => {
            let config = settings.load()?;
            let body = json!({ "tag": tag, "version": version });
            let answer = super::runtime()?
                .block_on(async { Client::connect(config.listen).await?.action("ontology_get", &body).await })?;
            if *json {
                writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
            } else {
                let origin = answer["origin"].as_str().unwrap_or("");
                writeln!(out, "{tag} version {} ({origin})", answer["version"])?;
                for line in columns(&answer) {
                    writeln!(out, "{line}")?;
                }
            }
        }
        Ontology::Add { settings, tag, file } => {
            let config = settings.load()?;
            let body = json!({ "tag": tag, "schema": read(file)? });
            let answer = super::runtime()?
                .block_on(async { Client::connect(config.listen).await?.action("ontology_register", &body).await })?;
            writeln!(out, "{tag} version {} is registered", answer["version"])?;
        }
        Ontology::Check { file } => {
            let schema = form::schema_from_json(&read(file)?).map_err(|why| format!("{}: {why}", file.display()))?;
            let checked =
                TopicSchema::check(Arc::clone(&schema)).map_err(|why| format!("{}: {why}", file.display()))?;
            writeln!(
                out,
                "{}: {} fields, {} leaf columns, can be stored",
                file.display(),
                schema.fields().len(),
                checked.leaves
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A file of fields, or of an object with `schema`.
fn read(file: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|error| format!("{} is not JSON: {error}", file.display()))?;
    Ok(json.get("schema").cloned().unwrap_or(json))
}

/// The fields that can be asked, one a line, and what the index adds.
pub(super) fn columns(ontology: &Value) -> Vec<String> {
    let mut lines: Vec<String> = ontology["columns"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|column| column.as_str().map(|column| format!("  {column}")))
        .collect();
    for index in ontology["index"].as_array().into_iter().flatten() {
        if let Some(position) = index["box"].as_str() {
            lines.push(format!("  {position} within SOUTH,WEST,NORTH,EAST"));
        }
    }
    lines
}
