//! Starts the real program on a folder of its own and speaks Flight to it.

use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightData, FlightDescriptor, PutResult, Ticket};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// The client all tests use.
pub(crate) type Client = FlightServiceClient<Channel>;

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    data: PathBuf,
    _folder: Option<TempDir>,
}

impl Server {
    /// Starts one on a fresh folder.
    pub(crate) fn start(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir_in(scratch()).expect("a folder for the data");
        let mut server = Self::start_on(folder.path(), settings);
        server._folder = Some(folder);
        server
    }

    /// Starts one on a folder that stays.
    pub(crate) fn start_on(data: &Path, settings: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flightbox"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--set", "log_format=json", "--data"]).arg(data);
        // Dozens run beside each other.
        command.args(["--set", "touch_memory=0"]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        let mut child = command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().expect("the program starts");
        let log = BufReader::new(child.stderr.take().expect("its log is piped"));
        let (address, log) = wait_until_ready(log);
        // Keep the pipe empty, and show what is worth seeing when a test fails.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                eprintln!("server: {line}");
            }
        });
        Self { child, address, data: data.to_owned(), _folder: None }
    }

    /// The data folder.
    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    /// A client on a connection of its own.
    pub(crate) async fn client(&self) -> Client {
        connect(self.address).await
    }

    /// Kills it without warning.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Asks it to stop and checks that it ends well.
    pub(crate) fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        let status = self.child.wait().expect("wait");
        assert!(status.success(), "the server ended with {status}");
    }

    /// Peak resident memory so far, in bytes.
    pub(crate) fn peak_rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }
}

/// A client on a connection of its own.
pub(crate) async fn connect(address: SocketAddr) -> Client {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let endpoint = endpoint.initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 24);
    let channel = endpoint.connect().await.expect("the server accepts");
    FlightServiceClient::new(channel).max_decoding_message_size(1 << 30).max_encoding_message_size(1 << 30)
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs a command of the program that must succeed; returns what it printed.
#[track_caller]
pub(crate) fn flightbox(arguments: &[&str]) -> String {
    let (output, succeeded) = flightbox_may_fail(arguments);
    assert!(succeeded, "flightbox {arguments:?}:\n{output}");
    output
}

/// Runs a command of the program; returns what it printed and whether it succeeded.
pub(crate) fn flightbox_may_fail(arguments: &[&str]) -> (String, bool) {
    let output = Command::new(env!("CARGO_BIN_EXE_flightbox")).args(arguments).output().expect("the program runs");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (text, output.status.success())
}

/// Tests write where the build is: a real disk, unlike /tmp on some machines.
fn scratch() -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&dir).expect("the scratch folder");
    dir
}

fn wait_until_ready(
    mut log: BufReader<std::process::ChildStderr>,
) -> (SocketAddr, BufReader<std::process::ChildStderr>) {
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        let count = log.read_line(&mut line).expect("the log is readable");
        assert!(count > 0, "the server ended before it was ready:\n{seen}");
        let entry: Value = serde_json::from_str(&line).unwrap_or(Value::Null);
        if entry.pointer("/fields/message") == Some(&json!("ready")) {
            let address = entry.pointer("/fields/address").and_then(Value::as_str).expect("an address");
            return (address.parse().expect("an address"), log);
        }
        seen.push_str(&line);
    }
}

/// Runs an action; returns its payload.
pub(crate) async fn action(client: &mut Client, name: &str, body: Value) -> Result<Value, Status> {
    raw_action(client, name, body.to_string().into_bytes()).await
}

/// Runs an action with any body.
pub(crate) async fn raw_action(client: &mut Client, name: &str, body: Vec<u8>) -> Result<Value, Status> {
    let mut results = client.do_action(Action { r#type: name.to_owned(), body: body.into() }).await?.into_inner();
    let result = results.message().await?.expect("one result");
    let envelope: Value = serde_json::from_slice(&result.body).expect("JSON");
    Ok(envelope.get("response").cloned().unwrap_or(Value::Null))
}

/// What the running server says of itself.
pub(crate) async fn info(client: &mut Client) -> Value {
    action(client, "info", json!({ "flightbox": true })).await.expect("info")["flightbox"].clone()
}

/// A v0 sequence and its key.
pub(crate) async fn create_sequence(client: &mut Client, name: &str) -> String {
    let answer =
        action(client, "sequence_create", json!({ "name": name, "user_metadata": {} })).await.expect("sequence_create");
    answer["key"].as_str().expect("a key").to_owned()
}

/// A v0 topic and its key.
pub(crate) async fn create_topic(client: &mut Client, sequence_key: &str, name: &str, format: &str) -> String {
    let body = json!({
        "sequence_key": sequence_key,
        "name": name,
        "serialization_format": format,
        "ontology_tag": "test",
        "user_metadata": {},
    });
    action(client, "topic_create", body).await.expect("topic_create")["key"].as_str().expect("a key").to_owned()
}

/// The v0 DoPut descriptor.
pub(crate) fn put_descriptor(name: &str, key: &str) -> FlightDescriptor {
    FlightDescriptor::new_cmd(json!({ "topic": { "name": name, "key": key } }).to_string())
}

/// Time and a blob.
pub(crate) fn blob_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("timestamp_ns", DataType::Int64, false),
        Field::new("data", DataType::Binary, false),
    ]))
}

/// A batch of `rows` rows from `first` on; each blob tells its row.
pub(crate) fn blob_batch(first: i64, rows: usize, blob_bytes: usize) -> RecordBatch {
    let times: Vec<i64> = (first..).take(rows).collect();
    let blobs: Vec<Vec<u8>> = times.iter().map(|time| blob(*time, blob_bytes)).collect();
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(times)), Arc::new(BinaryArray::from_iter_values(blobs))];
    RecordBatch::try_new(blob_schema(), columns).expect("a batch")
}

/// The blob of a row: its time, repeated.
pub(crate) fn blob(time: i64, bytes: usize) -> Vec<u8> {
    time.to_le_bytes().iter().copied().cycle().take(bytes).collect()
}

/// Batches as the messages of a DoPut.
pub(crate) fn encode<S>(
    descriptor: FlightDescriptor,
    schema: SchemaRef,
    batches: S,
) -> impl Stream<Item = FlightData> + Send + 'static
where
    S: Stream<Item = RecordBatch> + Send + 'static,
{
    FlightDataEncoderBuilder::new()
        .with_schema(schema)
        .with_flight_descriptor(Some(descriptor))
        .with_max_flight_data_size(usize::MAX)
        .build(batches.map(Ok))
        .map(|message| message.expect("encodes"))
}

/// Puts batches and waits for the end; returns the last watermark.
pub(crate) async fn put(
    client: &mut Client,
    name: &str,
    key: &str,
    batches: Vec<RecordBatch>,
) -> Result<Option<Value>, Status> {
    let schema = batches.first().map_or_else(blob_schema, RecordBatch::schema);
    let messages = encode(put_descriptor(name, key), schema, stream::iter(batches));
    let results = client.do_put(messages).await?.into_inner();
    last_watermark(results).await
}

/// Puts batches; when all are durable, the connection is gone in the middle of the stream.
pub(crate) async fn put_and_vanish(server: &Server, descriptor: FlightDescriptor, batches: Vec<RecordBatch>) {
    // On a runtime of its own: when that is gone, so is the connection.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (durable, is_durable) = tokio::sync::oneshot::channel();
    let (address, count) = (server.address, batches.len());
    let endless = stream::iter(batches).chain(stream::pending());
    let messages = encode(descriptor, blob_schema(), endless);
    runtime.spawn(async move {
        let mut client = connect(address).await;
        let mut results = client.do_put(messages).await.expect("put").into_inner();
        while let Some(mark) = results.message().await.expect("a watermark") {
            let mark: Value = serde_json::from_slice(&mark.app_metadata).expect("JSON");
            if mark["batches"] == count {
                break;
            }
        }
        durable.send(()).expect("the test waits");
        std::future::pending::<()>().await;
    });
    is_durable.await.expect("durable");
    runtime.shutdown_background();
}

/// Reads watermarks to the end.
pub(crate) async fn last_watermark(mut results: Streaming<PutResult>) -> Result<Option<Value>, Status> {
    let mut last = None;
    while let Some(result) = results.message().await? {
        last = Some(serde_json::from_slice(&result.app_metadata).expect("JSON"));
    }
    Ok(last)
}

/// All rows of a ticket.
pub(crate) async fn get(client: &mut Client, ticket: impl Into<bytes::Bytes>) -> Result<Vec<RecordBatch>, Status> {
    let data = client.do_get(Ticket { ticket: ticket.into() }).await?.into_inner();
    let batches = arrow_flight::decode::FlightRecordBatchStream::new_from_flight_data(data.map_err(Into::into));
    batches.try_collect().await.map_err(|error| match error {
        arrow_flight::error::FlightError::Tonic(status) => *status,
        other => Status::internal(other.to_string()),
    })
}

/// The times of all rows, in order.
pub(crate) fn times(batches: &[RecordBatch]) -> Vec<i64> {
    use arrow::array::AsArray;
    let of_batch =
        |batch: &RecordBatch| batch.column(0).as_primitive::<arrow::datatypes::Int64Type>().values().to_vec();
    batches.iter().flat_map(of_batch).collect()
}

/// Checks that a call was refused with this code and a text that names all of this.
#[track_caller]
pub(crate) fn check_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, names: &[&str]) {
    let status = result.expect_err("must be refused");
    assert_eq!(status.code(), code, "{}", status.message());
    for name in names {
        assert!(status.message().contains(name), "{:?} does not name {name:?}", status.message());
    }
}

/// Every file below a folder.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.expect("an entry").path())
        .flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] })
        .collect()
}

/// Runs an async test body.
pub(crate) fn run<F: Future>(body: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(body)
}
