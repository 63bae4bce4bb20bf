//! The load: the real server as a child process, several DoPut streams of equal blobs, closed loop.

use crate::Arguments;
use crate::profile::Profile;
use arrow::array::RecordBatch;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightData, FlightDescriptor};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tonic::transport::Channel;

/// Who takes the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The recorder: every byte durable before the RPCs end.
    Flightbox,
    /// The same front, which decodes and drops.
    NullSink,
    /// The recorder without statistics and skip index.
    NoIndex,
}

impl Target {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Flightbox => &[],
            Self::NullSink => &["--null-sink"],
            Self::NoIndex => &["--no-index"],
        }
    }
}

/// One pass.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Payload rate.
    pub(crate) mib_s: f64,
    /// What the server says of itself afterwards.
    pub(crate) info: Value,
}

/// A running server; ended when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs one pass against a fresh server on a fresh folder.
pub(crate) fn measure(
    arguments: &Arguments,
    scratch: &Path,
    profile: Profile,
    target: Target,
) -> Result<Outcome, Box<dyn Error>> {
    let folder = tempfile::tempdir_in(scratch)?;
    let server = Server::start(&arguments.server, folder.path(), target.flags())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    crate::rest();
    runtime.block_on(load(arguments, &server.address, profile))
}

impl Server {
    /// Starts one on a folder.
    pub(crate) fn start(program: &Path, data: &Path, flags: &[&str]) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(program);
        command.args(["serve", "--listen", "127.0.0.1:0", "--set", "log_format=json", "--data"]).arg(data).args(flags);
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
        Ok(Self { child, address })
    }

    /// Resident memory now, and at most so far, in bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Box<dyn Error>> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib << 10)
        };
        Ok((bytes("VmRSS:"), bytes("VmHWM:")))
    }
}

pub(crate) type Client = FlightServiceClient<Channel>;

/// A client on a connection of its own.
pub(crate) async fn connect(address: &str) -> Result<Client, Box<dyn Error>> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?;
    let client = FlightServiceClient::new(endpoint.connect().await?);
    Ok(client.max_encoding_message_size(usize::MAX).max_decoding_message_size(usize::MAX))
}

async fn load(arguments: &Arguments, address: &str, profile: Profile) -> Result<Outcome, Box<dyn Error>> {
    let mut client = connect(address).await?;
    let batch = profile.batch()?;
    let message_bytes = profile.data_bytes(&batch);
    let sequence = action(&mut client, "sequence_create", json!({ "name": "bench", "user_metadata": {} })).await?;
    let per_stream = ((arguments.mib << 20) / arguments.streams as u64 / message_bytes).max(1);
    let mut uploads = Vec::new();
    for index in 0..arguments.streams {
        let name = format!("bench/cam{index}");
        let (format, tag) = profile.format_and_tag();
        let body = json!({ "sequence_key": sequence["key"], "name": name, "serialization_format": format,
            "ontology_tag": tag, "user_metadata": {} });
        let topic = action(&mut client, "topic_create", body).await?;
        let messages = messages(&name, topic["key"].as_str().ok_or("no key")?, &batch).await?;
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
    let bytes = per_stream * arguments.streams as u64 * message_bytes;
    let info = action(&mut client, "info", json!({ "flightbox": true })).await?["flightbox"].clone();
    Ok(Outcome { mib_s: (bytes >> 20) as f64 / seconds, info })
}

/// Runs an action; returns its payload.
pub(crate) async fn action(client: &mut Client, name: &str, body: Value) -> Result<Value, Box<dyn Error>> {
    let action = Action { r#type: name.to_owned(), body: body.to_string().into() };
    let result = client.do_action(action).await?.into_inner().message().await?.ok_or("no answer")?;
    let envelope: Value = serde_json::from_slice(&result.body)?;
    Ok(envelope["response"].clone())
}

/// The first message and one batch, encoded once: making the data is not what is measured.
async fn messages(name: &str, key: &str, batch: &RecordBatch) -> Result<(FlightData, FlightData), Box<dyn Error>> {
    let descriptor = FlightDescriptor::new_cmd(json!({ "topic": { "name": name, "key": key } }).to_string());
    let encoded: Vec<_> = FlightDataEncoderBuilder::new()
        .with_schema(batch.schema())
        .with_flight_descriptor(Some(descriptor))
        .with_max_flight_data_size(usize::MAX)
        .build(stream::iter([Ok(batch.clone())]))
        .collect()
        .await;
    let mut encoded = encoded.into_iter();
    let head = encoded.next().ok_or("no schema message")??;
    let batch = encoded.next().ok_or("no batch message")??;
    Ok((head, batch))
}
