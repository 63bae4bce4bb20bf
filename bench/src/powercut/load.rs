//! The load of a power-cut run and the ledger of what its clients were told, each with the length of the
//! disk's journal at that moment; and the comparison after a cut.

use crate::server::{Client, Server, action, connect};
use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::{FlightDescriptor, Ticket};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Rows a batch, bytes a row, format and pause between batches of the endless uploads.
const SHAPES: [(usize, usize, &str, Duration); 4] = [
    (4, 60_000, "image", Duration::from_millis(12)),
    (10, 8_000, "image", Duration::from_millis(9)),
    (100, 1000, "default", Duration::from_millis(15)),
    (1, 50, "default", Duration::from_millis(4)),
];
/// The finite uploads beside them.
const FINITE_ROWS: usize = 30;
const FINITE_BYTES: usize = 700;

/// What a client was told.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// So many rows of an endless upload are durable.
    Rows { topic: String, bytes: usize, rows: usize },
    /// A sequence with one whole topic is finalized.
    Finalized(String),
    /// A sequence is aborted, and gone.
    Aborted(String),
}

/// What was told, and how long the journal was then, in bytes.
pub(super) type Ledger = Arc<Mutex<Vec<(u64, Told)>>>;

#[derive(Clone)]
struct Teller {
    ledger: Ledger,
    journal: Arc<File>,
}

impl Teller {
    fn tell(&self, told: Told) {
        let at = self.journal.metadata().map_or(u64::MAX, |metadata| metadata.len());
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).push((at, told));
    }
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("data", DataType::Binary, false),
    ]))
}

fn blob(time: i64, bytes: usize) -> Vec<u8> {
    time.to_le_bytes().iter().copied().cycle().take(bytes).collect()
}

fn batch(first: usize, rows: usize, bytes: usize) -> Result<RecordBatch, arrow::error::ArrowError> {
    let times: Vec<i64> = (first as i64..).take(rows).collect();
    let blobs = BinaryArray::from_iter_values(times.iter().map(|time| blob(*time, bytes)));
    let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(times)), Arc::new(blobs)];
    RecordBatch::try_new(schema(), columns)
}

/// Records for a while on a fresh server, then leaves it running.
pub(super) async fn record(server: &Server, journal: File, time: Duration) -> Result<Ledger, Box<dyn Error>> {
    let teller = Teller { ledger: Ledger::default(), journal: Arc::new(journal) };
    let mut client = connect(&server.address).await?;
    let key = action(&mut client, "sequence_create", json!({ "name": "endless", "user_metadata": {} })).await?;
    let mut tasks = Vec::new();
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let name = format!("endless/t{index}");
        let topic = create_topic(&mut client, &key["key"], &name, shape.2).await?;
        tasks.push(tokio::spawn(endless(client.clone(), name, topic, shape, teller.clone())));
    }
    let mixed = tokio::spawn(mixed(connect(&server.address).await?, teller.clone()));
    tokio::time::sleep(time).await;
    mixed.abort();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(teller.ledger)
}

async fn create_topic(client: &mut Client, key: &Value, name: &str, format: &str) -> Result<String, Box<dyn Error>> {
    let body = json!({ "sequence_key": key, "name": name, "serialization_format": format,
        "ontology_tag": "powercut", "user_metadata": {} });
    let topic = action(client, "topic_create", body).await?;
    Ok(topic["key"].as_str().ok_or("no key")?.to_owned())
}

fn descriptor(name: &str, key: &str) -> FlightDescriptor {
    FlightDescriptor::new_cmd(json!({ "topic": { "name": name, "key": key } }).to_string())
}

async fn endless(
    mut client: Client,
    topic: String,
    key: String,
    (rows, bytes, _, pause): (usize, usize, &'static str, Duration),
    teller: Teller,
) -> Result<(), tonic::Status> {
    let batches = stream::iter(0..).then(move |number| async move {
        tokio::time::sleep(pause).await;
        batch(number * rows, rows, bytes).map_err(arrow_flight::error::FlightError::Arrow)
    });
    let messages = FlightDataEncoderBuilder::new()
        .with_schema(schema())
        .with_flight_descriptor(Some(descriptor(&topic, &key)))
        .with_max_flight_data_size(usize::MAX)
        .build(batches)
        .filter_map(|message| std::future::ready(message.ok()));
    let mut results = client.do_put(messages).await?.into_inner();
    while let Some(result) = results.message().await? {
        let told: Value = serde_json::from_slice(&result.app_metadata).unwrap_or(Value::Null);
        let rows = told["rows"].as_u64().and_then(|rows| usize::try_from(rows).ok()).unwrap_or(0);
        teller.tell(Told::Rows { topic: topic.clone(), bytes, rows });
    }
    Ok(())
}

/// Creates, uploads, and finalizes or aborts, one sequence after another.
async fn mixed(mut client: Client, teller: Teller) -> Result<(), String> {
    let text = |error: Box<dyn Error>| error.to_string();
    for number in 0.. {
        let name = format!("finite{number}");
        let create = json!({ "name": name, "user_metadata": {} });
        let key = action(&mut client, "sequence_create", create).await.map_err(text)?;
        let topic = format!("{name}/t");
        let topic_key = create_topic(&mut client, &key["key"], &topic, "default").await.map_err(text)?;
        let rows = batch(0, FINITE_ROWS, FINITE_BYTES).map_err(|error| error.to_string())?;
        let messages = FlightDataEncoderBuilder::new()
            .with_schema(schema())
            .with_flight_descriptor(Some(descriptor(&topic, &topic_key)))
            .build(stream::iter([Ok(rows)]))
            .filter_map(|message| std::future::ready(message.ok()));
        let put = client.do_put(messages).await.map_err(|error| error.to_string())?;
        let ended: Vec<_> = put.into_inner().try_collect().await.map_err(|error| error.to_string())?;
        drop(ended);
        let body = json!({ "name": name, "key": key["key"] });
        if number % 3 == 2 {
            action(&mut client, "sequence_abort", body).await.map_err(text)?;
            teller.tell(Told::Aborted(name));
        } else {
            action(&mut client, "sequence_finalize", body).await.map_err(text)?;
            teller.tell(Told::Finalized(name));
        }
    }
    Ok(())
}

/// What a comparison found.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) rows: u64,
    pub(super) lost: Vec<String>,
}

/// Starts the recorder on what a cut left, and compares all that was told before it.
pub(super) async fn compare(
    program: &Path,
    data: &Path,
    ledger: &[(u64, Told)],
    cut: u64,
) -> Result<Compared, Box<dyn Error>> {
    let server = Server::start(program, data, &["--set", "scrub_rate=0"])?;
    let mut client = connect(&server.address).await?;
    let mut compared = Compared::default();
    let before: Vec<&Told> = ledger.iter().filter(|(at, _)| *at <= cut).map(|(_, told)| told).collect();
    for index in 0..SHAPES.len() {
        let topic = format!("endless/t{index}");
        let last = before.iter().rev().find_map(|told| match told {
            Told::Rows { topic: of, bytes, rows } if *of == topic => Some((*bytes, *rows)),
            _ => None,
        });
        let Some((bytes, rows)) = last else { continue };
        match read(&mut client, &topic, bytes).await {
            Ok(found) if found < rows => {
                compared.lost.push(format!("{topic}: {rows} rows were acknowledged, {found} are there"));
            }
            Ok(found) => compared.rows += found as u64,
            Err(error) => compared.lost.push(format!("{topic}: {rows} rows were acknowledged: {error}")),
        }
    }
    for told in &before {
        match told {
            Told::Finalized(name) => match read(&mut client, &format!("{name}/t"), FINITE_BYTES).await {
                Ok(FINITE_ROWS) => compared.rows += FINITE_ROWS as u64,
                Ok(found) => compared.lost.push(format!("{name}: finalized, {found} of {FINITE_ROWS} rows are there")),
                Err(error) => compared.lost.push(format!("{name}: finalized: {error}")),
            },
            Told::Aborted(name) => {
                if read(&mut client, &format!("{name}/t"), FINITE_BYTES).await.is_ok() {
                    compared.lost.push(format!("{name}: aborted, and it is there"));
                }
            }
            Told::Rows { .. } => {}
        }
    }
    Ok(compared)
}

/// Reads a topic and checks every row; returns how many there are.
async fn read(client: &mut Client, topic: &str, bytes: usize) -> Result<usize, Box<dyn Error>> {
    let data = client.do_get(Ticket { ticket: topic.to_owned().into() }).await?.into_inner();
    let mut batches = FlightRecordBatchStream::new_from_flight_data(data.map_err(Into::into));
    let mut next = 0;
    while let Some(batch) = batches.try_next().await? {
        let times = batch.column(0).as_primitive::<Int64Type>();
        let blobs = batch.column(1).as_binary::<i32>();
        for row in 0..batch.num_rows() {
            if times.value(row) != next || blobs.is_null(row) || blobs.value(row) != blob(next, bytes) {
                return Err(format!("row {next} is not the one that was sent").into());
            }
            next += 1;
        }
    }
    Ok(usize::try_from(next)?)
}
