//! The load: the real server as a child process, several DoPut streams of equal blobs, closed loop.

use crate::Arguments;
use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightData, FlightDescriptor};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tonic::transport::Channel;

/// Who takes the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The recorder: every byte durable before the RPCs end.
    Flightbox,
    /// The same front, which decodes and drops.
    NullSink,
}

/// One pass.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Payload rate.
    pub(crate) mib_s: f64,
    /// What the server says of itself afterwards.
    pub(crate) info: Value,
}

struct Server(Child, String);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Runs one pass against a fresh server on a fresh folder.
pub(crate) fn measure(
    arguments: &Arguments,
    scratch: &Path,
    blob_bytes: usize,
    target: Target,
) -> Result<Outcome, Box<dyn Error>> {
    let folder = tempfile::tempdir_in(scratch)?;
    let server = start(&arguments.server, folder.path(), target)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    crate::rest();
    runtime.block_on(load(arguments, &server.1, blob_bytes))
}

fn start(program: &Path, data: &Path, target: Target) -> Result<Server, Box<dyn Error>> {
    let mut command = Command::new(program);
    command.args(["serve", "--listen", "127.0.0.1:0", "--set", "log_format=json", "--data"]).arg(data);
    if target == Target::NullSink {
        command.arg("--null-sink");
    }
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let log = BufReader::new(child.stderr.take().ok_or("no log")?);
    let mut lines = log.lines();
    let address = loop {
        let line = lines.next().ok_or("the server ended before it was ready")??;
        let entry: Value = serde_json::from_str(&line).unwrap_or(Value::Null);
        if entry["fields"]["message"] == "ready" {
            break entry["fields"]["address"].as_str().unwrap_or("").to_owned();
        }
    };
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("server: {line}")));
    Ok(Server(child, address))
}

type Client = FlightServiceClient<Channel>;

async fn load(arguments: &Arguments, address: &str, blob_bytes: usize) -> Result<Outcome, Box<dyn Error>> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?;
    let mut client = FlightServiceClient::new(endpoint.connect().await?).max_encoding_message_size(usize::MAX);
    let sequence = action(&mut client, "sequence_create", json!({ "name": "bench", "user_metadata": {} })).await?;
    let per_stream = (arguments.mib << 20) / arguments.streams as u64 / blob_bytes as u64;
    let mut uploads = Vec::new();
    for index in 0..arguments.streams {
        let name = format!("bench/cam{index}");
        let body = json!({ "sequence_key": sequence["key"], "name": name, "serialization_format": "image",
            "ontology_tag": "image", "user_metadata": {} });
        let topic = action(&mut client, "topic_create", body).await?;
        let messages = messages(&name, topic["key"].as_str().ok_or("no key")?, blob_bytes).await?;
        uploads.push((messages, client.clone()));
    }
    let started = Instant::now();
    let tasks: Vec<_> = uploads
        .into_iter()
        .map(|((head, batch), mut client)| {
            tokio::spawn(async move {
                let stream = stream::iter(std::iter::once(head).chain(std::iter::repeat_n(batch, per_stream as usize)));
                let mut results = client.do_put(stream).await?.into_inner();
                while results.message().await?.is_some() {}
                Ok::<(), tonic::Status>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let seconds = started.elapsed().as_secs_f64();
    let bytes = per_stream * arguments.streams as u64 * blob_bytes as u64;
    let info = action(&mut client, "info", json!({ "flightbox": true })).await?["flightbox"].clone();
    Ok(Outcome { mib_s: (bytes >> 20) as f64 / seconds, info })
}

async fn action(client: &mut Client, name: &str, body: Value) -> Result<Value, Box<dyn Error>> {
    let action = Action { r#type: name.to_owned(), body: body.to_string().into() };
    let result = client.do_action(action).await?.into_inner().message().await?.ok_or("no answer")?;
    let envelope: Value = serde_json::from_slice(&result.body)?;
    Ok(envelope["response"].clone())
}

/// The first message and one batch, encoded once: making the data is not what is measured.
async fn messages(name: &str, key: &str, blob_bytes: usize) -> Result<(FlightData, FlightData), Box<dyn Error>> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("data", DataType::Binary, false),
    ]));
    let blob: Vec<u8> = (0..blob_bytes).map(|index| (index * 31 % 251) as u8).collect();
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(vec![1])), Arc::new(BinaryArray::from_iter_values([blob]))];
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns)?;
    let descriptor = FlightDescriptor::new_cmd(json!({ "topic": { "name": name, "key": key } }).to_string());
    let encoded: Vec<_> = FlightDataEncoderBuilder::new()
        .with_schema(schema)
        .with_flight_descriptor(Some(descriptor))
        .with_max_flight_data_size(usize::MAX)
        .build(stream::iter([Ok(batch)]))
        .collect()
        .await;
    let mut encoded = encoded.into_iter();
    let head = encoded.next().ok_or("no schema message")??;
    let batch = encoded.next().ok_or("no batch message")??;
    Ok((head, batch))
}
