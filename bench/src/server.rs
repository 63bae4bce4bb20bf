//! Programs under test as child processes, and what they cost: CPU, memory, bytes that reach the disk.

use arrow_flight::Action;
use arrow_flight::flight_service_client::FlightServiceClient;
use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// How long a server may take to touch its memory.
const TOUCH_PATIENCE: Duration = Duration::from_secs(20);

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

impl Server {
    /// Starts flightbox on a folder.
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
        let server = Self { child, address };
        // What a start costs is not what a load costs.
        let since = Instant::now();
        while server.has_thread("fb-touch")? && since.elapsed() < TOUCH_PATIENCE {
            std::thread::park_timeout(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn has_thread(&self, name: &str) -> Result<bool, Box<dyn Error>> {
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // A thread may end between the two.
            if std::fs::read_to_string(thread?.path().join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Starts this program as one of its own servers, which print their address first.
    pub(crate) fn start_own(arguments: &[&str], data: &Path) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.args(arguments).arg(data).stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut address)?;
        Ok(Self { child, address: address.trim().to_owned() })
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

    /// CPU seconds used so far, of user and kernel, all threads.
    pub(crate) fn cpu_s(&self) -> Result<f64, Box<dyn Error>> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the name, which may hold anything: state is field 3, utime 14, stime 15.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks = |at: usize| fields.get(at - 3).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        Ok((ticks(14) + ticks(15)) / rustix::param::clock_ticks_per_second() as f64)
    }

    /// CPU seconds used so far by its threads of a name.
    pub(crate) fn thread_cpu_s(&self, name: &str) -> Result<f64, Box<dyn Error>> {
        let mut total = 0.0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let path = thread?.path();
            if std::fs::read_to_string(path.join("comm"))?.trim() == name {
                // Nanoseconds on a CPU come first (Documentation/scheduler/sched-stats.rst).
                let stat = std::fs::read_to_string(path.join("schedstat"))?;
                total += stat.split_whitespace().next().unwrap_or("0").parse::<f64>()? / 1e9;
            }
        }
        Ok(total)
    }

    /// Process id, for profilers.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// What flightbox says of itself.
pub(crate) async fn info(client: &mut Client) -> Result<Value, Box<dyn Error>> {
    Ok(action(client, "info", json!({ "flightbox": true })).await?["flightbox"].clone())
}

/// Bytes that flightbox says it gave to the disk: by its rings, and by RocksDB's log, flushes and merges.
pub(crate) fn written_bytes(info: &Value) -> u64 {
    let sum = |object: &Value, keys: &[&str]| -> u64 { keys.iter().filter_map(|key| object[key].as_u64()).sum() };
    sum(&info["ring_bytes"], &["chunk", "padding", "trailer", "footer", "rewrite"])
        + sum(&info["catalog_bytes"], &["log", "flush", "compaction"])
}

pub(crate) type Client = FlightServiceClient<Channel>;

/// A client on a connection of its own.
pub(crate) async fn connect(address: &str) -> Result<Client, Box<dyn Error>> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?;
    let client = FlightServiceClient::new(endpoint.connect().await?);
    Ok(client.max_encoding_message_size(usize::MAX).max_decoding_message_size(usize::MAX))
}

/// Runs an action; returns its payload.
pub(crate) async fn action(client: &mut Client, name: &str, body: Value) -> Result<Value, Box<dyn Error>> {
    let action = Action { r#type: name.to_owned(), body: body.to_string().into() };
    let result = client.do_action(action).await?.into_inner().message().await?.ok_or("no answer")?;
    let envelope: Value = serde_json::from_slice(&result.body)?;
    Ok(envelope["response"].clone())
}

/// A new recording; returns its key.
pub(crate) async fn create_sequence(client: &mut Client, name: &str) -> Result<String, Box<dyn Error>> {
    let made = action(client, "sequence_create", json!({ "name": name, "user_metadata": {} })).await?;
    Ok(made["key"].as_str().ok_or("no key")?.to_owned())
}

/// A new topic in it; returns its key.
pub(crate) async fn create_topic(
    client: &mut Client,
    sequence: &str,
    name: &str,
    (format, tag): (&str, &str),
) -> Result<String, Box<dyn Error>> {
    let body = json!({ "sequence_key": sequence, "name": name, "serialization_format": format,
        "ontology_tag": tag, "user_metadata": {} });
    let made = action(client, "topic_create", body).await?;
    Ok(made["key"].as_str().ok_or("no key")?.to_owned())
}
