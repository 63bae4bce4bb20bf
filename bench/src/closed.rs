//! The closed loop: as much as the server takes, over one connection, a stream a topic.

use crate::disk::DiskCounter;
use crate::profile::{Prepared, Profile};
use crate::server::{self, Server, connect, create_sequence, create_topic};
use crate::wire::Connection;
use arrow_flight::FlightData;
use serde_json::Value;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often the bytes sent are looked at, for the plot over time.
const LOOK: Duration = Duration::from_millis(100);

/// What to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Closed {
    pub(crate) profile: Profile,
    pub(crate) streams: usize,
    /// Over all streams, FlightData headers and bodies.
    pub(crate) bytes: u64,
}

/// What it took.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// From the first byte to the end of the last call: everything durable, where the server promises it.
    pub(crate) seconds: f64,
    pub(crate) wire_bytes: u64,
    pub(crate) data_bytes: u64,
    /// The server's, of user and kernel.
    pub(crate) cpu_s: f64,
    /// Most resident memory of the server.
    pub(crate) peak_bytes: u64,
    /// By its own counters; 0 for others than flightbox.
    pub(crate) written_bytes: u64,
    /// By the block device's counters, after a sync.
    pub(crate) device_bytes: u64,
    /// What flightbox says of itself afterwards.
    pub(crate) info: Value,
    /// Key of the recording, to finalize it.
    pub(crate) key: String,
    /// Seconds since the start, and bytes sent by then.
    pub(crate) over_time: Vec<(f64, u64)>,
}

/// Uploads that go on until they are told to stop, in a recording of their own.
pub(crate) struct Saturation {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Result<u64, String>>>,
    /// The connection that all of it is on.
    pub(crate) connection: Connection,
}

impl Saturation {
    /// Starts so many streams.
    pub(crate) async fn start(
        server: &Server,
        name: &str,
        profile: Profile,
        streams: usize,
    ) -> Result<Self, Box<dyn Error>> {
        let mut client = connect(&server.address).await?;
        let key = create_sequence(&mut client, name).await?;
        let connection = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for index in 0..streams {
            let topic = format!("{name}/s{index}");
            let topic_key = create_topic(&mut client, &key, &topic, profile.format_and_tag()).await?;
            let (first, messages) = profile.messages(&topic, &topic_key).await?;
            let (connection, stop) = (connection.clone(), Arc::clone(&stop));
            tasks.push(tokio::spawn(async move {
                let until = |_: u64| !stop.load(Ordering::Relaxed);
                let sent = put_while(&connection, &first, &messages, until, &AtomicU64::new(0)).await;
                sent.map_err(|error| error.to_string())
            }));
        }
        Ok(Self { stop, tasks, connection })
    }

    /// Ends all streams; returns the bytes sent, headers and bodies.
    pub(crate) async fn stop(self) -> Result<u64, Box<dyn Error>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut bytes = 0;
        for task in self.tasks {
            bytes += task.await??;
        }
        Ok(bytes)
    }
}

/// One upload: sends messages in turn while `goes_on` says so of their number, and waits for its end.
async fn put_while(
    connection: &Connection,
    first: &FlightData,
    messages: &[Prepared],
    goes_on: impl Fn(u64) -> bool,
    total: &AtomicU64,
) -> Result<u64, Box<dyn Error + Send + Sync>> {
    let (mut upload, mut answers) = connection.put(first).await?;
    let reading = tokio::spawn(async move {
        while answers.next().await?.is_some() {}
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    });
    let (mut time, mut sent) = (1, 0);
    for (number, message) in messages.iter().cycle().enumerate() {
        if !goes_on(number as u64) {
            break;
        }
        upload.send(message, time).await?;
        time += message.span_ns();
        sent += message.wire_bytes;
        total.fetch_add(message.wire_bytes, Ordering::Relaxed);
    }
    upload.finish()?;
    reading.await??;
    Ok(sent)
}

/// Whether a server knows more than DoPut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// All of the protocol.
    Flightbox,
    /// Uploads only: any key will do.
    PutOnly,
}

/// A load whose recording and topics are made, and whose messages are encoded: all that is left is to send them.
pub(crate) struct Ready {
    client: server::Client,
    key: String,
    connection: Connection,
    uploads: Vec<(FlightData, Vec<Prepared>, u64)>,
    wire_bytes: u64,
    data_bytes: u64,
    speaks: Speaks,
}

/// Sends until all is through.
pub(crate) async fn run(
    server: &Server,
    speaks: Speaks,
    load: Closed,
    scratch: &Path,
) -> Result<Outcome, Box<dyn Error>> {
    prepare(server, speaks, load).await?.run(server, scratch).await
}

/// Everything before the first byte: not measured.
pub(crate) async fn prepare(server: &Server, speaks: Speaks, load: Closed) -> Result<Ready, Box<dyn Error>> {
    let mut client = connect(&server.address).await?;
    let key = match speaks {
        Speaks::Flightbox => create_sequence(&mut client, "bench").await?,
        Speaks::PutOnly => String::new(),
    };
    let connection = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
    let mut uploads = Vec::new();
    let (mut wire_bytes, mut data_bytes) = (0, 0);
    for index in 0..load.streams {
        let name = format!("bench/{}{index}", load.profile.name());
        let topic = match speaks {
            Speaks::Flightbox => create_topic(&mut client, &key, &name, load.profile.format_and_tag()).await?,
            Speaks::PutOnly => String::new(),
        };
        let (first, messages) = load.profile.messages(&name, &topic).await?;
        let cycle: u64 = messages.iter().map(|message| message.wire_bytes).sum();
        let count = (load.bytes / load.streams as u64 * messages.len() as u64 / cycle).max(1);
        let all = (0..count as usize).map(|at| &messages[at % messages.len()]);
        (wire_bytes, data_bytes) = all.fold((wire_bytes, data_bytes), |(wire, data), message| {
            (wire + message.wire_bytes, data + message.data_bytes)
        });
        uploads.push((first, messages, count));
    }
    Ok(Ready { client, key, connection, uploads, wire_bytes, data_bytes, speaks })
}

impl Ready {
    /// Sends until all is through, and measures it.
    pub(crate) async fn run(self, server: &Server, scratch: &Path) -> Result<Outcome, Box<dyn Error>> {
        let Self { mut client, key, connection, uploads, wire_bytes, data_bytes, speaks } = self;
        let sent = Arc::new(AtomicU64::new(0));
        let device = DiskCounter::of(scratch)?;
        let (cpu_before, written_before) = (server.cpu_s()?, written(speaks, &mut client).await?.0);
        let started = Instant::now();
        let tasks: Vec<_> = uploads
            .into_iter()
            .map(|(first, messages, count)| {
                let (connection, sent) = (connection.clone(), Arc::clone(&sent));
                tokio::spawn(async move {
                    let sent = put_while(&connection, &first, &messages, |number| number < count, &sent).await;
                    sent.map_err(|error| error.to_string())
                })
            })
            .collect();
        let watching = tokio::spawn(async move {
            let mut over_time = Vec::new();
            loop {
                tokio::time::sleep(LOOK).await;
                over_time.push((started.elapsed().as_secs_f64(), sent.load(Ordering::Relaxed)));
                if Arc::strong_count(&sent) == 1 {
                    return over_time;
                }
            }
        });
        for task in tasks {
            task.await??;
        }
        let seconds = started.elapsed().as_secs_f64();
        let cpu_s = server.cpu_s()? - cpu_before;
        let (written_after, info) = written(speaks, &mut client).await?;
        Ok(Outcome {
            seconds,
            wire_bytes,
            data_bytes,
            cpu_s,
            peak_bytes: server.memory()?.1,
            written_bytes: written_after - written_before,
            device_bytes: device.written_since()?,
            info,
            key,
            over_time: watching.await?,
        })
    }
}

async fn written(speaks: Speaks, client: &mut server::Client) -> Result<(u64, Value), Box<dyn Error>> {
    match speaks {
        Speaks::Flightbox => {
            let info = server::info(client).await?;
            Ok((server::written_bytes(&info), info))
        }
        Speaks::PutOnly => Ok((0, Value::Null)),
    }
}
