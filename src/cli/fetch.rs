//! `flightbox query --fetch`: the rows of the matching windows, one Parquet or CSV file a topic.

use crate::cli::query::Format;
use crate::flight::client::Client;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::Value;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::Path;
use storage::export::ParquetFile;

type AnyError = Box<dyn std::error::Error>;

/// Writes what an answer found below a folder.
pub(super) async fn fetch(client: &mut Client, answer: &Value, dir: &Path, format: Format) -> Result<(), AnyError> {
    let items = answer["items"].as_array().map_or(&[][..], Vec::as_slice);
    for item in items {
        let topics = item["topics"].as_array().map_or(&[][..], Vec::as_slice);
        for topic in topics {
            let locator = topic["locator"].as_str().unwrap_or("");
            // Several topics: where they match at once, if they do.
            let windows = item["windows"].as_array().filter(|windows| !windows.is_empty());
            let windows = windows.or_else(|| topic["intervals"].as_array()).map_or(&[][..], Vec::as_slice);
            let windows: Vec<(i64, i64)> = windows
                .iter()
                .filter_map(|window| Some((window["start_ns"].as_i64()?, window["end_ns"].as_i64()?)))
                .collect();
            let suffix = if format == Format::Parquet { "parquet" } else { "csv" };
            let path = dir.join(format!("{locator}.{suffix}"));
            let rows = fetch_topic(client, locator, &windows, &path, format).await?;
            writeln!(std::io::stderr(), "{rows} rows  {}", path.display())?;
        }
    }
    Ok(())
}

async fn fetch_topic(
    client: &mut Client,
    locator: &str,
    windows: &[(i64, i64)],
    path: &Path,
    format: Format,
) -> Result<u64, AnyError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut sink: Option<Sink> = None;
    let mut written = 0;
    for (index, (first, last)) in windows.iter().enumerate() {
        if std::io::stderr().is_terminal() && windows.len() > 1 {
            write!(std::io::stderr(), "\r{locator}: window {} of {}\x1b[K", index + 1, windows.len())?;
        }
        let mut rows = client.rows(locator, *first, *last).await?;
        if let (None, Some(schema)) = (&sink, &rows.schema) {
            sink = Some(Sink::create(path, schema, format)?);
        }
        while let Some(batch) = rows.next().await? {
            written += batch.num_rows() as u64;
            if let Some(sink) = &mut sink {
                sink.write(&batch)?;
            }
        }
    }
    if std::io::stderr().is_terminal() && windows.len() > 1 {
        write!(std::io::stderr(), "\r\x1b[K")?;
    }
    if let Some(sink) = sink {
        sink.finish()?;
    }
    Ok(written)
}

enum Sink {
    Parquet(Box<ParquetFile>),
    Csv(BufWriter<File>),
}

impl Sink {
    fn create(path: &Path, schema: &SchemaRef, format: Format) -> Result<Self, AnyError> {
        Ok(match format {
            Format::Parquet => Self::Parquet(Box::new(ParquetFile::create(path, schema)?)),
            Format::Csv => {
                let mut out = BufWriter::new(File::create(path)?);
                let mut names = Vec::new();
                for field in schema.fields() {
                    column_names(field.name(), field.data_type(), &mut names);
                }
                let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
                writeln!(out, "{}", names.join(","))?;
                Self::Csv(out)
            }
        })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<(), AnyError> {
        match self {
            Self::Parquet(file) => Ok(file.write(batch)?),
            Self::Csv(out) => write_csv(out, batch),
        }
    }

    fn finish(self) -> Result<(), AnyError> {
        match self {
            Self::Parquet(file) => Ok(file.finish()?),
            Self::Csv(mut out) => Ok(out.flush()?),
        }
    }
}

/// Structs become a column a field, named with dots; lists stay one column.
fn column_names(path: &str, data_type: &DataType, names: &mut Vec<String>) {
    match data_type {
        DataType::Struct(fields) => {
            for field in fields {
                column_names(&format!("{path}.{}", field.name()), field.data_type(), names);
            }
        }
        _ => names.push(path.to_owned()),
    }
}

fn columns(array: &ArrayRef, out: &mut Vec<ArrayRef>) {
    match array.as_struct_opt() {
        Some(parent) => (0..parent.num_columns())
            .for_each(|index| columns(&storage::chunk::stats::child_under_nulls(parent, index), out)),
        None => out.push(array.clone()),
    }
}

fn write_csv(out: &mut impl Write, batch: &RecordBatch) -> Result<(), AnyError> {
    let mut flat = Vec::new();
    for column in batch.columns() {
        columns(column, &mut flat);
    }
    let options = FormatOptions::default().with_null("");
    let formatters =
        flat.iter().map(|column| ArrayFormatter::try_new(column.as_ref(), &options)).collect::<Result<Vec<_>, _>>()?;
    for row in 0..batch.num_rows() {
        for (index, (formatter, column)) in formatters.iter().zip(&flat).enumerate() {
            if index > 0 {
                write!(out, ",")?;
            }
            if column.is_valid(row) {
                write!(out, "{}", quoted(&formatter.value(row).to_string()))?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// As RFC 4180 asks for; an empty text is quoted, so that it is not a null.
fn quoted(text: &str) -> String {
    if text.is_empty() || text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, ListArray, StringArray, StructArray};
    use arrow::datatypes::{Field, Fields, Int32Type};
    use std::sync::Arc;

    #[test]
    fn csv_flattens_structs_and_tells_nulls_from_empty_texts() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec![Some("a,\"b\""), Some(""), None]));
        let fields = Fields::from(vec![Field::new("t", DataType::Utf8, true)]);
        let parent: ArrayRef = Arc::new(StructArray::new(fields, vec![texts], None));
        let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(vec![
            Some(vec![Some(1), Some(2)]),
            None,
            Some(vec![]),
        ]));
        let batch = RecordBatch::try_from_iter_with_nullable(vec![
            ("n", Arc::new(Int64Array::from(vec![1, 2, 3])) as ArrayRef, true),
            ("s", parent, true),
            ("l", lists, true),
        ])
        .expect("a batch");
        let mut out = Vec::new();
        write_csv(&mut out, &batch).expect("written");
        let text = String::from_utf8(out).expect("UTF-8");
        assert_eq!(text, "1,\"a,\"\"b\"\"\",\"[1, 2]\"\n2,\"\",\n3,,[]\n");
    }
}
