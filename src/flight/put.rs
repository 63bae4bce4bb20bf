//! One DoPut stream, straight: descriptor and schema, batches, the end.
//!
//! Guarantees: the RPC ends OK only when everything is durable and the topic is locked; a stream
//! that ends in any other way leaves the topic unlocked with its durable prefix (INV-12). Watermarks
//! go out while the stream runs and coalesce by themselves: a client that never reads them is never
//! blocked. The work is a task of its own: a client that goes away cannot stop it half-way.

use crate::flight::assemble::{Descriptor, Incoming};
use crate::flight::decode::{self, Decoded, Decoder};
use crate::flight::dialect::{Connection, Hint};
use crate::flight::service::Shared;
use crate::flight::status::{disk_is_full, invalid, of_storage};
use crate::flight::upload::{Monitor, StreamFacts, UploadEnd};
use crate::health::Space;
use crate::ingest::admit::{Permit, Room};
use crate::ingest::committer::{End, Watermark};
use crate::ingest::topic::Batch;
use crate::ingest::writer::Message;
use crate::lifecycle::upload::Upload;
use crate::lifecycle::{Locator, find_topic, parse_uuid};
use crate::limits;
use crate::stats::{Station, Stats};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use arrow_flight::{FlightData, PutResult};
use bytes::Bytes;
use futures::{FutureExt, Stream};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use storage::StorageError;
use storage::chunk::BatchMark;
use storage::chunk::data_bytes;
use storage::chunk::hash::batch_hash;
use storage::ids::TopicId;
use storage::schema::{TopicSchema, node_count};
use tokio::sync::{oneshot, watch};
use tonic::{Status, Streaming};

/// Starts the upload; returns when its topic is open.
pub(crate) async fn do_put(
    shared: Arc<Shared>,
    connection: Connection,
    stream: Streaming<FlightData>,
    monitor: Option<Arc<Monitor>>,
) -> Result<impl Stream<Item = Result<PutResult, Status>> + Send + 'static, Status> {
    let monitor = monitor.ok_or_else(|| Status::internal("the upload layer is missing in front of DoPut"))?;
    let (opened, is_open) = oneshot::channel();
    let (done, is_done) = oneshot::channel();
    tokio::spawn(async move {
        let result = Ingest { shared, connection, monitor }.run(stream, opened).await;
        done.send(result).ok(); // The client has gone; the topic has its end all the same.
    });
    match is_open.await {
        Ok(watermark) => Ok(results(watermark, is_done)),
        // The task ended before the topic was open: its result says why.
        Err(_) => match is_done.await {
            Ok(Err(status)) => Err(status),
            Ok(Ok(())) | Err(_) => Err(Status::internal("the upload ended before it began")),
        },
    }
}

/// The answer: watermarks as they move, then the end.
fn results(
    watermark: watch::Receiver<Watermark>,
    done: oneshot::Receiver<Result<(), Status>>,
) -> impl Stream<Item = Result<PutResult, Status>> + Send + 'static {
    struct Answer {
        watermark: watch::Receiver<Watermark>,
        done: oneshot::Receiver<Result<(), Status>>,
        sent_batches: u64,
        over: bool,
    }
    let answer = Answer { watermark, done, sent_batches: 0, over: false };
    futures::stream::unfold(answer, |mut answer| async move {
        loop {
            let mark = *answer.watermark.borrow_and_update();
            if mark.batches > answer.sent_batches {
                answer.sent_batches = mark.batches;
                return Some((Ok(put_result(&mark)), answer));
            }
            if answer.over {
                return None;
            }
            // Cancel-safety: a watermark missed here is seen at the top of the loop.
            tokio::select! {
                biased;
                result = &mut answer.done => {
                    answer.over = true;
                    if let Err(status) = result.unwrap_or_else(|_| Err(Status::internal("the upload's task was lost"))) {
                        answer.sent_batches = u64::MAX;
                        return Some((Err(status), answer));
                    }
                }
                changed = answer.watermark.changed() => if changed.is_err() {
                    // The topic is closed; only its end is still to come.
                    answer.over = true;
                    let result = (&mut answer.done).await;
                    if let Err(status) = result.unwrap_or_else(|_| Err(Status::internal("the upload's task was lost"))) {
                        answer.sent_batches = u64::MAX;
                        return Some((Err(status), answer));
                    }
                }
            }
        }
    })
}

fn put_result(mark: &Watermark) -> PutResult {
    let json = format!(r#"{{"rows":{},"batches":{},"bytes":{}}}"#, mark.rows, mark.batches, mark.bytes);
    PutResult { app_metadata: json.into() }
}

struct Ingest {
    shared: Arc<Shared>,
    connection: Connection,
    monitor: Arc<Monitor>,
}

impl Ingest {
    async fn run(
        self,
        mut stream: Streaming<FlightData>,
        opened: oneshot::Sender<watch::Receiver<Watermark>>,
    ) -> Result<(), Status> {
        let upload = self.open(&mut stream).await?;
        let topic = upload.topic.no;
        opened.send(upload.watermark.clone()).ok(); // The client has gone; the stream will say so.
        Stats::add(&self.shared.stats.uploads, 1);
        // Whatever happens to the stream, its topic gets an end.
        let received = AssertUnwindSafe(self.receive(&mut stream, &upload)).catch_unwind().await;
        let received = received.unwrap_or_else(|_| Err(Status::internal("the upload made its task panic")));
        let end = match received {
            Ok(UploadEnd::Clean) => End::Lock,
            Ok(UploadEnd::Broken) | Err(_) => End::Leave,
        };
        let ended = self.shared.lifecycle.end_upload(topic, end).await;
        self.shared.stats.uploads.fetch_sub(1, Ordering::Relaxed);
        match received? {
            UploadEnd::Clean => Ok(ended?),
            UploadEnd::Broken => Err(Status::cancelled("the upload was cut; its durable rows are kept")),
        }
    }

    /// What the layer put together, or tonic's own message where it was compressed.
    fn admitted(&self, message: FlightData) -> Result<(Permit, Incoming), Status> {
        let (permit, whole) = self.monitor.take().ok_or_else(|| Status::internal("a message without its permit"))?;
        Ok((permit, whole.unwrap_or_else(|| message.into())))
    }

    /// Reads descriptor and schema and opens the topic.
    async fn open(&self, stream: &mut Streaming<FlightData>) -> Result<Upload, Status> {
        let data_folder = self.shared.health.rooms.first().map(|room| *room.space.borrow());
        if data_folder == Some(Space::Full) {
            return Err(disk_is_full("the upload was not begun"));
        }
        let mut descriptor: Option<Descriptor> = None;
        let (_permit, header) = loop {
            let message = stream.message().await?;
            let Some(message) = message else {
                return Err(invalid(
                    "the stream ended without a schema; the first message carries descriptor and schema",
                ));
            };
            let (permit, message) = self.admitted(message)?;
            if descriptor.is_none()
                && let Some(found) = message.descriptor
            {
                // A copy: what is kept while the next message is waited for has no permit.
                descriptor = Some(Descriptor { cmd: small_command(&found.cmd)?, ..found });
            }
            if !message.header.is_empty() {
                break (permit, message.header);
            }
        };
        let descriptor = descriptor.ok_or_else(|| {
            invalid("DoPut without a descriptor; send a CMD descriptor with resource_locator and topic_uuid")
        })?;
        let (locator, key, resume_from) = target(&descriptor, &self.connection)?;
        if self.shared.volumes.all().len() > 1
            && let Ok(topic) = find_topic(&self.shared.lifecycle.catalog, &locator)
        {
            self.shared.volumes.check_there(&topic).map_err(|error| of_storage(&error))?;
        }
        let wire = decode::schema(&header)?;
        let schema = TopicSchema::check(wire).map_err(|error| of_storage(&error))?;
        let overhead = limits::NODE_OVERHEAD_BYTES * node_count(&schema.wire) as u64;
        self.monitor.set_stream(StreamFacts { schema: Arc::clone(&schema.wire), overhead });
        Ok(self.shared.lifecycle.open_upload(locator, key, schema, resume_from).await?)
    }

    fn ends(&self, upload: &Upload) -> Ends {
        let volume = self.shared.volumes.index_of(&upload.topic);
        let space = self.shared.health.rooms.get(volume).map_or(&self.shared.health.space, |room| &room.space);
        let mut ends =
            Ends { failed: upload.failed.clone(), stopping: self.shared.stopping.clone(), space: space.subscribe() };
        // What has happened before this is seen at the first look.
        ends.failed.mark_changed();
        ends.stopping.mark_changed();
        ends.space.mark_changed();
        ends
    }

    /// Takes batches until the stream ends or something fails.
    async fn receive(&self, stream: &mut Streaming<FlightData>, upload: &Upload) -> Result<UploadEnd, Status> {
        let lane = self.shared.lifecycle.writers.of(upload.topic.no);
        let mut decoder = Decoder::new(
            Arc::clone(&upload.schema.wire),
            self.shared.config.batch_memory_max,
            self.shared.budget.clone(),
        );
        let mut next_batch = upload.first_batch;
        let mut overlap = upload.overlap();
        let mut ends = self.ends(upload);
        // Kept over all messages: to begin waiting costs more than a small batch.
        let mut end = self.ends(upload);
        let end = end.wait();
        tokio::pin!(end);
        loop {
            // Cancel-safety: `message` keeps what it has read inside the stream.
            let message = tokio::select! {
                biased;
                message = stream.message() => message,
                status = &mut end => return Err(status),
            };
            // A stream that always has a message never waits.
            if let Some(status) = ends.now() {
                return Err(status);
            }
            let Some(message) = (match message {
                Ok(message) => message,
                // The layer's own refusals (size, stall) come as they are; a reset is a broken end.
                Err(status) if status.code() == tonic::Code::Cancelled => return Ok(UploadEnd::Broken),
                Err(status) => return Err(status),
            }) else {
                return Ok(self.monitor.end());
            };
            let arrived = Instant::now();
            let (permit, message) = self.admitted(message)?;
            if message.header.is_empty() {
                continue;
            }
            match decoder.decode(&message.header, message.body, message.sent, permit).await? {
                Decoded::Dictionary => {}
                Decoded::Batch(rows, decode_permit, permit) => {
                    if self.shared.null_sink {
                        continue;
                    }
                    let batch = check_batch(&upload.schema, &rows, permit, decode_permit, arrived)?;
                    self.shared.stats.record(Station::Decode, arrived.elapsed());
                    let number = next_batch;
                    next_batch += 1;
                    if number < upload.durable.batches {
                        // Sent again: it is durable already, if it is the same.
                        overlap.check(&self.shared.lifecycle.loader, number, batch.mark).await?;
                        continue;
                    }
                    // While memory fills up the writer has more than it can take: only large frames are worth a wake-up.
                    let small_bytes = match self.shared.budget.room() {
                        Room::Plenty => limits::SMALL_BATCH_BYTES,
                        Room::Filling | Room::Short => limits::SMALL_MESSAGE_BYTES,
                    };
                    let has_time = batch.data_bytes < small_bytes;
                    let message = Message::Batch { topic: upload.topic.no, batch: Box::new(batch) };
                    let sent = if has_time { lane.send_soon(message).await } else { lane.send(message).await };
                    sent.map_err(|_| Status::unavailable("the server is shutting down"))?;
                }
            }
        }
    }
}

/// A copy of a descriptor's command, which names a topic and is no longer than that takes.
fn small_command(command: &[u8]) -> Result<Bytes, Status> {
    if command.len() > limits::DESCRIPTOR_BYTES_MAX {
        return Err(invalid(format!(
            "the DoPut descriptor has {} bytes, over the limit of {}; it names resource_locator and topic_uuid, nothing else",
            command.len(),
            limits::DESCRIPTOR_BYTES_MAX
        )));
    }
    Ok(Bytes::copy_from_slice(command))
}

/// The topic, its key, and the number of the first batch if the upload goes on with an earlier one.
pub(super) fn target(
    descriptor: &Descriptor,
    connection: &Connection,
) -> Result<(String, TopicId, Option<u64>), Status> {
    use arrow_flight::flight_descriptor::DescriptorType;
    if descriptor.r#type() != DescriptorType::Cmd {
        return Err(invalid("DoPut takes a CMD descriptor {\"resource_locator\", \"topic_uuid\"}, not a PATH"));
    }
    let command: serde_json::Value = serde_json::from_slice(&descriptor.cmd)
        .map_err(|error| invalid(format!("the DoPut descriptor is not JSON: {error}")))?;
    let text = |value: Option<&serde_json::Value>, key: &str| match value {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(invalid(format!("`{key}` in the DoPut descriptor is {other}, not a text"))),
        None => Err(invalid(format!("the DoPut descriptor has no `{key}`"))),
    };
    let (locator, key) = match command.get("topic") {
        Some(topic) => {
            connection.note(Hint::V0);
            (text(topic.get("name"), "topic.name")?, text(topic.get("key"), "topic.key")?)
        }
        None => {
            connection.note(Hint::Session);
            (text(command.get("resource_locator"), "resource_locator")?, text(command.get("topic_uuid"), "topic_uuid")?)
        }
    };
    let resume_from = match command.get("resume_from") {
        None | Some(serde_json::Value::Null) => None,
        Some(value) => Some(value.as_u64().ok_or_else(|| {
            invalid(format!("`resume_from` in the DoPut descriptor is {value}, not the number of a batch"))
        })?),
    };
    let locator = Locator::topic("resource_locator", &locator)?;
    Ok((locator, TopicId(parse_uuid("topic_uuid", &key)?), resume_from))
}

/// What ends an upload from our side.
struct Ends {
    failed: watch::Receiver<Option<StorageError>>,
    stopping: watch::Receiver<bool>,
    space: watch::Receiver<Space>,
}

impl Ends {
    /// Why it must end, if it must; costs nothing while nothing changes.
    fn now(&mut self) -> Option<Status> {
        match self.failed.has_changed() {
            Err(_) => return Some(self.failed.borrow().as_ref().map_or_else(gone, of_storage)),
            Ok(true) => {
                if let Some(error) = &*self.failed.borrow_and_update() {
                    return Some(of_storage(error));
                }
            }
            Ok(false) => {}
        }
        if self.stopping.has_changed().unwrap_or(true) && *self.stopping.borrow_and_update() {
            return Some(shutting_down());
        }
        if self.space.has_changed().unwrap_or(false) && *self.space.borrow_and_update() == Space::Full {
            return Some(no_space());
        }
        None
    }

    /// Resolves when it must end.
    async fn wait(&mut self) -> Status {
        tokio::select! {
            biased;
            failed = self.failed.wait_for(Option::is_some) => match failed {
                Ok(failed) => failed.as_ref().map_or_else(gone, of_storage),
                Err(_) => gone(),
            },
            _ = self.stopping.wait_for(|stop| *stop) => shutting_down(),
            _ = self.space.wait_for(|space| *space == Space::Full) => no_space(),
        }
    }
}

/// The topic was closed under the stream: aborted, deleted or finalized.
fn gone() -> Status {
    of_storage(&StorageError::Gone)
}

fn shutting_down() -> Status {
    Status::unavailable("the server is shutting down; what was acknowledged is kept")
}

fn no_space() -> Status {
    disk_is_full("what was acknowledged of this upload is durable; resume it when there is room")
}

/// Finds out what the writer and the index need to know of a batch.
pub(super) fn check_batch(
    schema: &TopicSchema,
    rows: &RecordBatch,
    permit: Permit,
    decode_permit: Option<Permit>,
    arrived: Instant,
) -> Result<Batch, Status> {
    let times = rows.column(schema.time_column).as_primitive::<Int64Type>();
    if times.null_count() > 0 {
        return Err(invalid(format!("column `timestamp_ns` has {} nulls; every row needs a time", times.null_count())));
    }
    let rows_count =
        u32::try_from(rows.num_rows()).map_err(|_| invalid("a batch of more than 2^32 rows; send smaller batches"))?;
    let (time, sorted) = time_range(times.values());
    let stored = schema.to_stored(rows).map_err(|error| of_storage(&error))?;
    let mark = BatchMark { rows: rows_count, hash: batch_hash(rows) };
    let data_bytes = data_bytes(&stored);
    Ok(Batch { rows: stored, mark, data_bytes, time, sorted, permit, decode_permit, arrived, sent: Instant::now() })
}

fn time_range(times: &[i64]) -> (Option<(i64, i64)>, bool) {
    let Some(first) = times.first() else {
        return (None, true);
    };
    let range = times.iter().fold((*first, *first), |(low, high), time| (low.min(*time), high.max(*time)));
    (Some(range), times.is_sorted())
}
