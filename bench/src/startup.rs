//! How long a start takes after a crash, over catalogs of growing size: interrupted uploads with a chunk and a
//! full tail each, so that there is a log to replay and segments to seal; page cache dropped.

use crate::report::{shell, write_folder};
use crate::server::{Client, Server, action, connect};
use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use arrow_flight::FlightDescriptor;
use arrow_flight::encode::FlightDataEncoderBuilder;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Crashes of each size, and uploads that each interrupts.
const CRASHES: usize = 3;
const TOPICS: usize = 50;
/// A chunk's worth, then a tail just below what closes a chunk.
const CHUNK_BATCH_BYTES: usize = 1_200_000;
const TAIL_BATCHES: usize = 55;
const TAIL_BATCH_BYTES: usize = 16_000;

/// Measures several sizes, and writes the folder of the run.
pub(crate) fn run(program: &Path, scratch: &Path, out: &Path, sizes: &[u64]) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut csv = String::from("chunks,crash,log_bytes,interrupted_topics,start_ms\n");
    let mut text = format!(
        "# start after a crash ({TOPICS} uploads interrupted each time, page cache dropped, slowest of {CRASHES})\n\n\
         | sealed chunks | interrupted topics | log | catalog | start to READY |\n| --- | --- | --- | --- | --- |\n"
    );
    for chunks in sizes {
        let folder = tempfile::tempdir_in(scratch)?;
        crate::scale::generate(folder.path(), *chunks)?;
        let (mut slowest, mut log_most) = (0.0_f64, 0);
        for crash in 0..CRASHES {
            let server = Server::start(program, folder.path(), &[])?;
            runtime.block_on(interrupt(&server, crash))?;
            drop(server); // SIGKILL
            let log = log_bytes(folder.path());
            shell("sh", &["-c", "sync; echo 3 > /proc/sys/vm/drop_caches"]);
            let started = Instant::now();
            let server = Server::start(program, folder.path(), &[])?;
            let ms = started.elapsed().as_secs_f64() * 1000.0;
            drop(server);
            writeln!(csv, "{chunks},{crash},{log},{},{ms:.0}", (crash + 1) * TOPICS)?;
            eprintln!("{chunks} chunks, crash {crash}: {ms:.0} ms, {} MiB of log", log >> 20);
            slowest = slowest.max(ms);
            log_most = log_most.max(log);
        }
        let catalog = shell("du", &["-sb", &folder.path().join("catalog").display().to_string()]);
        let catalog: u64 = catalog.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        let (log, catalog) = (log_most >> 20, catalog >> 20);
        writeln!(text, "| {chunks} | {} | {log} MiB | {catalog} MiB | {slowest:.0} ms |", CRASHES * TOPICS)?;
    }
    eprintln!("{text}");
    write_folder(out, "startup", scratch, &text, &[("starts.csv", csv)])
}

/// Bytes in RocksDB's log.
fn log_bytes(data: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(data.join("catalog")) else { return 0 };
    let logs = entries.filter_map(Result::ok).filter(|entry| entry.path().extension().is_some_and(|ext| ext == "log"));
    logs.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Uploads that are all durable, and will never end.
async fn interrupt(server: &Server, crash: usize) -> Result<(), Box<dyn Error>> {
    let mut client = connect(&server.address).await?;
    let name = format!("crash{crash}");
    let key = action(&mut client, "sequence_create", json!({ "name": name, "user_metadata": {} })).await?;
    let mut uploads = Vec::new();
    for index in 0..TOPICS {
        let topic = format!("{name}/t{index}");
        let body = json!({ "sequence_key": key["key"], "name": topic, "serialization_format": "default",
            "ontology_tag": "startup", "user_metadata": {} });
        let topic_key = action(&mut client, "topic_create", body).await?["key"].clone();
        uploads.push(tokio::spawn(upload(client.clone(), topic, topic_key)));
    }
    for upload in uploads {
        upload.await??;
    }
    Ok(())
}

async fn upload(mut client: Client, topic: String, key: Value) -> Result<(), tonic::Status> {
    let descriptor = FlightDescriptor::new_cmd(json!({ "topic": { "name": topic, "key": key } }).to_string());
    let sizes = std::iter::once(CHUNK_BATCH_BYTES).chain(std::iter::repeat_n(TAIL_BATCH_BYTES, TAIL_BATCHES));
    let batches = stream::iter(sizes.enumerate())
        .then(|(number, bytes)| async move {
            // Slower than the commit interval, so that the tail takes many runs.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            batch(number as i64, bytes).map_err(arrow_flight::error::FlightError::Arrow)
        })
        .chain(stream::pending());
    let messages = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(descriptor))
        .with_max_flight_data_size(usize::MAX)
        .build(batches)
        .filter_map(|message| std::future::ready(message.ok()));
    let mut results = client.do_put(messages).await?.into_inner();
    while let Some(result) = results.message().await? {
        let told: Value = serde_json::from_slice(&result.app_metadata).unwrap_or(Value::Null);
        if told["batches"] == TAIL_BATCHES + 1 {
            break;
        }
    }
    // The stream must not end before the server does.
    tokio::spawn(async move { while results.message().await.is_ok_and(|result| result.is_some()) {} });
    Ok(())
}

fn batch(time: i64, bytes: usize) -> Result<RecordBatch, arrow::error::ArrowError> {
    let fields = vec![Field::new("timestamp_ns", DataType::Int64, false), Field::new("data", DataType::Binary, false)];
    let blob = vec![time as u8; bytes];
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(vec![time])), Arc::new(BinaryArray::from_vec(vec![blob.as_slice()]))];
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
}
