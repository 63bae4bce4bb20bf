//! The open loop: messages that arrive by a clock, whatever the server does. A message's latency runs from the
//! moment it was due to the watermark that covers it, so a stall is charged to everything behind it.

use crate::profile::{Prepared, Profile};
use crate::server::{Server, connect, create_sequence, create_topic};
use crate::wire::{Connection, Upload};
use hdrhistogram::Histogram;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::error::Error;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

type AnyError = Box<dyn Error + Send + Sync>;

/// Topics of one kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub(crate) profile: Profile,
    pub(crate) topics: usize,
    /// Messages a second of each topic.
    pub(crate) rate: f64,
}

/// Longest latency told apart, in microseconds: ten minutes.
const MICROS_MAX: u64 = 600_000_000;
/// A message that is durable later than this after it was due is late: twice the slowest percentile that the
/// goals allow, with the commit interval.
pub(crate) const LATE: Duration = Duration::from_millis(250);

/// Messages due before this has passed are not in the percentiles: memory is touched for the first time, files are
/// made. They count as late or dropped all the same.
pub(crate) const WARM_UP: Duration = Duration::from_secs(1);

/// What the messages of one group met.
#[derive(Debug)]
pub(crate) struct Latency {
    pub(crate) group: Group,
    /// Microseconds from due to durable.
    pub(crate) micros: Histogram<u64>,
    pub(crate) sent: u64,
    pub(crate) late: u64,
    /// Never acknowledged.
    pub(crate) dropped: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) data_bytes: u64,
}

impl Latency {
    /// A percentile in milliseconds.
    pub(crate) fn ms(&self, quantile: f64) -> f64 {
        self.micros.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// What was sent of one topic and is not acknowledged: when each was due.
type Waiting = Arc<Mutex<VecDeque<Instant>>>;

struct Stream {
    group: usize,
    upload: Upload,
    messages: Arc<[Prepared]>,
    sent: u64,
    time: i64,
    period: Duration,
    waiting: Waiting,
}

/// What one group's answers said.
struct Answered {
    micros: Histogram<u64>,
    late: u64,
}

type Seen = Arc<Vec<Mutex<Answered>>>;
/// When the clock started.
type Start = Arc<OnceLock<Instant>>;

/// Topics that are open for writing, ready for their clock to start.
pub(crate) struct Open {
    groups: Vec<Group>,
    connections: Vec<Vec<Stream>>,
    readers: Vec<tokio::task::JoinHandle<Result<(), AnyError>>>,
    seen: Seen,
    start: Start,
}

/// Opens the topics of all groups in one recording, each group on a connection of its own or all on one.
pub(crate) async fn open(server: &Server, name: &str, groups: &[Group], one: bool) -> Result<Open, Box<dyn Error>> {
    let mut client = connect(&server.address).await?;
    let key = create_sequence(&mut client, name).await?;
    let histogram = || Histogram::new_with_max(MICROS_MAX, 3).map(|micros| Mutex::new(Answered { micros, late: 0 }));
    let start = Start::default();
    let seen: Seen = Arc::new(groups.iter().map(|_| histogram()).collect::<Result<_, _>>()?);
    let mut connections = Vec::new();
    let mut readers = Vec::new();
    let mut connection = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
    for (index, group) in groups.iter().enumerate() {
        if index > 0 && !one {
            connection = Connection::open(&server.address).await.map_err(|error| error.to_string())?;
        }
        let mut streams = Vec::new();
        let mut shared: Option<Arc<[Prepared]>> = None;
        for topic in 0..group.topics {
            let topic = format!("{name}/{}{index}_{topic}", group.profile.name());
            let topic_key = create_topic(&mut client, &key, &topic, group.profile.format_and_tag()).await?;
            let (first, messages) = group.profile.messages(&topic, &topic_key).await?;
            let messages = Arc::clone(shared.get_or_insert_with(|| messages.into()));
            let (upload, mut answers) = connection.put(&first).await.map_err(|error| error.to_string())?;
            let waiting = Waiting::default();
            let (queue, seen, start) = (Arc::clone(&waiting), Arc::clone(&seen), Arc::clone(&start));
            readers.push(tokio::spawn(async move {
                let mut known = 0;
                while let Some(batches) = answers.next().await? {
                    let now = Instant::now();
                    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    let due: Vec<Instant> = queue.drain(..(batches - known) as usize).collect();
                    drop(queue);
                    known = batches;
                    let mut seen = seen[index].lock().unwrap_or_else(PoisonError::into_inner);
                    for due in due {
                        let latency = now.saturating_duration_since(due);
                        seen.late += u64::from(latency > LATE);
                        if start.get().is_some_and(|start| *start + WARM_UP <= due) {
                            let micros = u64::try_from(latency.as_micros()).unwrap_or(MICROS_MAX);
                            seen.micros.saturating_record(micros);
                        }
                    }
                }
                Ok(())
            }));
            streams.push(Stream {
                group: index,
                upload,
                messages,
                sent: 0,
                time: 1,
                period: Duration::from_secs_f64(1.0 / group.rate),
                waiting,
            });
        }
        // A thing that sends is one clock: a camera does not wait for a bus.
        connections.push(streams);
    }
    Ok(Open { groups: groups.to_vec(), connections, readers, seen, start })
}

impl Open {
    /// Runs the clock for a while, ends all uploads and waits until everything is durable.
    pub(crate) async fn run(self, time: Duration) -> Result<Vec<Latency>, Box<dyn Error>> {
        let Self { groups, connections, readers, seen, start } = self;
        let start = *start.get_or_init(Instant::now);
        let mut clocks = Vec::new();
        for streams in connections {
            clocks.push(tokio::spawn(clock(streams, start, time)));
        }
        let mut latencies = Vec::new();
        for (group, seen) in groups.iter().zip(seen.iter()) {
            let micros = seen.lock().unwrap_or_else(PoisonError::into_inner).micros.clone();
            latencies.push(Latency {
                group: *group,
                micros,
                sent: 0,
                late: 0,
                dropped: 0,
                wire_bytes: 0,
                data_bytes: 0,
            });
        }
        let mut waiting = Vec::new();
        for clock in clocks {
            for stream in clock.await?.map_err(|error| error.to_string())? {
                let latency = &mut latencies[stream.group];
                latency.sent += stream.sent;
                for number in 0..stream.sent as usize {
                    let message = &stream.messages[number % stream.messages.len()];
                    latency.wire_bytes += message.wire_bytes;
                    latency.data_bytes += message.data_bytes;
                }
                waiting.push((stream.group, stream.waiting));
            }
        }
        for reader in readers {
            reader.await?.map_err(|error| error.to_string())?;
        }
        for (group, waiting) in waiting {
            latencies[group].dropped += waiting.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        }
        for (latency, seen) in latencies.iter_mut().zip(seen.iter()) {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            latency.micros = seen.micros.clone();
            latency.late = seen.late;
        }
        Ok(latencies)
    }
}

/// Sends what is due, stream by stream in the order of their times.
async fn clock(mut streams: Vec<Stream>, start: Instant, time: Duration) -> Result<Vec<Stream>, AnyError> {
    // Spread over their periods: a bus does not send everything at once.
    let count = streams.len() as u32;
    let mut due: BinaryHeap<Reverse<(Duration, usize)>> =
        streams.iter().enumerate().map(|(at, stream)| Reverse((stream.period * at as u32 / count, at))).collect();
    while let Some(Reverse((at, index))) = due.pop() {
        if at >= time {
            continue;
        }
        tokio::time::sleep_until((start + at).into()).await;
        let stream = &mut streams[index];
        stream.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(start + at);
        let messages = Arc::clone(&stream.messages);
        let message = &messages[stream.sent as usize % messages.len()];
        stream.upload.send(message, stream.time).await?;
        stream.time += message.span_ns();
        stream.sent += 1;
        due.push(Reverse((at + stream.period, index)));
    }
    for stream in &mut streams {
        stream.upload.finish()?;
    }
    Ok(streams)
}
