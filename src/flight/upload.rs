//! Station 1: the body of a DoPut, framed and admitted before it is read; and its true end.
//!
//! Guarantees: a message's bytes are taken from the socket only after a permit for all of it is
//! held, so back-pressure is HTTP/2's own (INV-7); a message over the limit is refused by its header;
//! how the upload ended is what HTTP/2 said (INV-12): tonic reports a cancelled stream as a clean
//! `None` and drops half a message silently, so this layer notes END_STREAM and message boundaries
//! itself. A message that stalls half-way loses its permit and its stream. A message is put together here
//! ([`crate::flight::assemble`]); tonic gets an empty one in its place, and keeps the order.

use crate::flight::assemble::{Assembler, Incoming};
use crate::flight::window::RequestBody;
use crate::ingest::admit::{Permit, Pool};
use crate::limits;
use crate::stats::{Station, Stats};
use arrow::datatypes::SchemaRef;
use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tonic::Status;

/// The path of uploads.
pub(super) const DO_PUT_PATH: &str = "/arrow.flight.protocol.FlightService/DoPut";
/// Compressed-flag byte and length.
pub(super) const HEADER_BYTES: usize = 5;

/// How an upload's request stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UploadEnd {
    /// END_STREAM on a message boundary.
    Clean,
    /// Cancel, reset, lost connection, or an end inside a message.
    Broken,
}

/// What the layer tells the handler of the same request.
#[derive(Debug, Default)]
pub(crate) struct Monitor {
    state: Mutex<MonitorState>,
    stream: OnceLock<StreamFacts>,
}

/// What is known of a stream's messages once its schema is.
#[derive(Debug)]
pub(crate) struct StreamFacts {
    pub(crate) schema: SchemaRef,
    /// Heap that each message costs beyond its bytes.
    pub(crate) overhead: u64,
}

/// A message that was admitted, with what it holds; `None`: tonic has it, because it is compressed.
pub(crate) type Admitted = (Permit, Option<Incoming>);

#[derive(Debug, Default)]
struct MonitorState {
    messages: VecDeque<Admitted>,
    end: Option<UploadEnd>,
}

impl Monitor {
    /// The next message, in order.
    pub(crate) fn take(&self) -> Option<Admitted> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).messages.pop_front()
    }

    /// How the stream ended; asked once the messages are over.
    pub(crate) fn end(&self) -> UploadEnd {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).end.unwrap_or(UploadEnd::Broken)
    }

    /// Tells what all further messages have in common.
    pub(crate) fn set_stream(&self, facts: StreamFacts) {
        self.stream.get_or_init(|| facts);
    }

    fn put(&self, permit: Permit, message: Option<Incoming>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).messages.push_back((permit, message));
    }

    fn note_end(&self, end: UploadEnd) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).end.get_or_insert(end);
    }
}

/// What uploads may use.
#[derive(Debug, Clone)]
pub(crate) struct UploadLimits {
    pub(crate) pool: Pool,
    pub(crate) message_bytes_max: u64,
    pub(crate) stall: Duration,
    pub(crate) stats: Arc<Stats>,
}

enum State {
    /// Between messages, with so many header bytes read.
    Header { have: usize },
    /// The header is read; the permit is waited for.
    Claim { claim: Pin<Box<dyn Future<Output = Permit> + Send>>, since: Instant, length: u64 },
    /// So much of a compressed message is still to come; tonic takes it.
    Compressed { left: u64 },
    /// The message is being put together.
    Message { permit: Option<Permit>, assembler: Assembler },
    /// Nothing more is wanted: what was waited for or read is let go.
    Ended,
}

/// A piece of a message from this size on is worth telling its sender before it is copied that he may go on.
const GO_ON_BYTES: usize = 16 << 10;

/// An empty, uncompressed message.
const EMPTY_MESSAGE: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// The body of one upload.
pub(super) struct UploadBody {
    inner: RequestBody,
    limits: UploadLimits,
    monitor: Arc<Monitor>,
    header: [u8; HEADER_BYTES],
    state: State,
    /// Received but not yet handed on.
    pending: Bytes,
    end_stream: bool,
    stall: Pin<Box<tokio::time::Sleep>>,
}

impl UploadBody {
    /// Of a body that nothing was read of.
    pub(super) fn new(inner: RequestBody, limits: UploadLimits, monitor: Arc<Monitor>) -> Self {
        let stall = Box::pin(tokio::time::sleep(limits.stall));
        Self {
            inner,
            limits,
            monitor,
            header: [0; HEADER_BYTES],
            state: State::Header { have: 0 },
            pending: Bytes::new(),
            end_stream: false,
            stall,
        }
    }

    fn note_end(&self) {
        let on_boundary = matches!(self.state, State::Header { have: 0 }) && self.pending.is_empty();
        self.monitor.note_end(if self.end_stream && on_boundary { UploadEnd::Clean } else { UploadEnd::Broken });
    }

    /// Takes header bytes from `pending`; a complete header starts the claim, and where nobody waits, the message.
    /// Returns what tonic is to have of it.
    fn read_header(&mut self, have: usize) -> Result<Option<Bytes>, Status> {
        let take = (HEADER_BYTES - have).min(self.pending.len());
        let bytes = self.pending.split_to(take);
        if let Some(into) = self.header.get_mut(have..have + take) {
            into.copy_from_slice(&bytes);
        }
        if have + take < HEADER_BYTES {
            self.state = State::Header { have: have + take };
            return Ok(None);
        }
        let [compressed, length @ ..] = self.header;
        let length = u64::from(u32::from_be_bytes(length));
        let limit = self.limits.message_bytes_max;
        if length > limit {
            return Err(Status::resource_exhausted(format!(
                "a message of {length} bytes exceeds the limit of {limit} (setting message_bytes_max); send smaller batches"
            )));
        }
        let weight = if compressed == 0 { length } else { limit.min(length.saturating_mul(limits::DEFLATE_RATIO_MAX)) };
        let weight = weight + self.monitor.stream.get().map_or(0, |facts| facts.overhead);
        if let Some(permit) = self.limits.pool.try_claim(weight) {
            return Ok(self.begin(permit, Duration::ZERO, length));
        }
        let pool = self.limits.pool.clone();
        let claim = Box::pin(async move { pool.claim(weight).await });
        self.state = State::Claim { claim, since: Instant::now(), length };
        Ok(None)
    }

    /// Begins an admitted message of so many bytes; returns what tonic is to have of it.
    fn begin(&mut self, permit: Permit, waited: Duration, length: u64) -> Option<Bytes> {
        self.limits.stats.record(Station::Admit, waited);
        self.restart_stall_clock();
        if self.header.first() == Some(&0) {
            let is_cold = limits::CACHED_BYTES < self.limits.pool.held();
            let schema = self.monitor.stream.get().map(|facts| Arc::clone(&facts.schema));
            let assembler = Assembler::new(usize::try_from(length).unwrap_or(usize::MAX), is_cold, schema);
            self.state = State::Message { permit: Some(permit), assembler };
            return None;
        }
        self.monitor.put(permit, None);
        self.state = if length == 0 { State::Header { have: 0 } } else { State::Compressed { left: length } };
        Some(Bytes::copy_from_slice(&self.header))
    }

    /// Hands on what is there; `Ok(None)`: more bytes are needed.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        loop {
            match &mut self.state {
                State::Header { have } => {
                    if self.pending.is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                    let have = *have;
                    if let Some(bytes) = self.read_header(have)? {
                        return Poll::Ready(Ok(Some(bytes)));
                    }
                }
                State::Claim { claim, since, length } => {
                    // What was read of it must not lie here until there is a permit that nobody needs.
                    if self.inner.poll_unwanted(cx).is_ready() {
                        return Poll::Ready(Err(Status::cancelled(
                            "the upload was given up while it waited for memory",
                        )));
                    }
                    let permit = ready!(claim.as_mut().poll(cx));
                    let (waited, length) = (since.elapsed(), *length);
                    if let Some(bytes) = self.begin(permit, waited, length) {
                        return Poll::Ready(Ok(Some(bytes)));
                    }
                }
                State::Compressed { left } => {
                    if self.pending.is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(self.pending.len());
                    *left -= take as u64;
                    if *left == 0 {
                        self.state = State::Header { have: 0 };
                    }
                    self.restart_stall_clock();
                    return Poll::Ready(Ok(Some(self.pending.split_to(take))));
                }
                State::Message { permit, assembler } => {
                    let take = assembler.left().min(self.pending.len());
                    // Not where more came than was admitted: it may have to wait.
                    if GO_ON_BYTES <= take && take == self.pending.len() {
                        self.inner.go_on((assembler.left() - take) as u64, cx);
                    }
                    assembler.add(&self.pending.split_to(take))?;
                    if assembler.left() > 0 {
                        if take > 0 {
                            self.restart_stall_clock();
                        }
                        return Poll::Ready(Ok(None));
                    }
                    let whole = std::mem::replace(assembler, Assembler::new(0, false, None)).finish()?;
                    if let Some(mut permit) = permit.take() {
                        let left_out = whole.sent.saturating_sub(whole.body.len());
                        permit.shrink_to(permit.bytes().saturating_sub(left_out as u64));
                        self.monitor.put(permit, Some(whole));
                    }
                    self.state = State::Header { have: 0 };
                    return Poll::Ready(Ok(Some(Bytes::from_static(&EMPTY_MESSAGE))));
                }
                State::Ended => return Poll::Ready(Ok(None)),
            }
        }
    }

    /// Says how much the sender may send: what this message was admitted for.
    fn meter(&mut self) {
        let left = match &self.state {
            State::Header { .. } | State::Claim { .. } | State::Ended => 0,
            State::Compressed { left } => *left,
            State::Message { assembler, .. } => assembler.left() as u64,
        };
        self.inner.want(left);
    }

    fn restart_stall_clock(&mut self) {
        let at = tokio::time::Instant::now() + self.limits.stall;
        self.stall.as_mut().reset(at);
    }

    /// Whether the sender let too much time pass. While it may not send, time does not count.
    fn stalled(&mut self, waited_for_turn: bool, cx: &mut Context<'_>) -> bool {
        if waited_for_turn || self.inner.waits_for_turn() {
            self.restart_stall_clock();
        }
        matches!(self.state, State::Message { .. } | State::Compressed { .. })
            && self.stall.as_mut().poll(cx).is_ready()
    }
}

impl Body for UploadBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            match ready!(this.advance(cx)) {
                Ok(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Ok(None) => {}
                Err(status) => {
                    this.inner.want(0);
                    this.monitor.note_end(UploadEnd::Broken);
                    // Whoever polls this may keep it for as long as it takes to end the topic.
                    (this.state, this.pending) = (State::Ended, Bytes::new());
                    return Poll::Ready(Some(Err(status)));
                }
            }
            if matches!(this.state, State::Ended) {
                return Poll::Ready(None);
            }
            this.meter();
            let waited_for_turn = this.inner.waits_for_turn();
            match Pin::new(&mut this.inner).poll_frame(cx) {
                Poll::Pending if this.stalled(waited_for_turn, cx) => {
                    this.monitor.note_end(UploadEnd::Broken);
                    let text = format!("a message made no progress for {:?} (setting upload_stall)", this.limits.stall);
                    return Poll::Ready(Some(Err(Status::deadline_exceeded(text))));
                }
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => {
                    this.end_stream |= this.inner.is_end_stream();
                    match frame.into_data() {
                        Ok(mut data) => this.pending = data.copy_to_bytes(data.remaining()),
                        Err(_trailers) => this.end_stream = true,
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    this.monitor.note_end(UploadEnd::Broken);
                    return Poll::Ready(Some(Err(Status::from_error(Box::new(error)))));
                }
                Poll::Ready(None) => {
                    this.end_stream |= this.inner.is_end_stream();
                    this.note_end();
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        false
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::window::tests::{SIZE, all_turns, room, streams, wanted_streams};
    use arrow_flight::FlightData;
    use prost::Message;

    const STALL: Duration = Duration::from_secs(1);

    fn limits(pool: &Pool) -> UploadLimits {
        UploadLimits { pool: pool.clone(), message_bytes_max: 32 << 20, stall: STALL, stats: Arc::default() }
    }

    /// A message of two windows, with its header.
    fn message() -> Bytes {
        let message = FlightData { data_body: vec![7; 2 * SIZE].into(), ..Default::default() }.encode_to_vec();
        let length = u32::try_from(message.len()).expect("short").to_be_bytes();
        Bytes::from([&[0], &length[..], &message].concat())
    }

    #[tokio::test]
    async fn an_upload_that_is_given_up_while_it_waits_for_memory_lets_go_of_what_was_read() {
        let (mut senders, mut bodies, mut wanted) = wanted_streams(1, 0).await;
        let (mut sender, body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
        let pool = Pool::new(64 << 20);
        let all = pool.claim(64 << 20).await;
        let monitor = Arc::new(Monitor::default());
        let mut body = UploadBody::new(body, limits(&pool), Arc::clone(&monitor));
        room(&mut sender, SIZE).await;
        sender.send_data(message().split_to(SIZE), false).expect("sent");
        let waiting = tokio::spawn(async move {
            let end = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
            (end, body)
        });
        while !pool.is_waited_for() {
            tokio::task::yield_now().await;
        }
        drop(wanted.pop());
        let (end, mut body) = waiting.await.expect("no panic");
        assert_eq!(end.expect("an end").expect_err("given up").code(), tonic::Code::Cancelled);
        assert_eq!(monitor.end(), UploadEnd::Broken);
        // Also while the body is kept, and whoever asks once more.
        drop(all);
        assert_eq!(pool.held(), 0);
        assert!(std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_sender_that_waits_for_its_turn_does_not_stall_and_one_that_stops_does() {
        let (mut senders, mut bodies) = streams(1, 100).await;
        let (mut sender, body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
        let turns = all_turns(&body).await;
        let mut body = UploadBody::new(body, limits(&Pool::new(64 << 20)), Arc::default());
        let mut bytes = message();
        room(&mut sender, SIZE).await;
        sender.send_data(bytes.split_to(SIZE), false).expect("sent");
        let mut next = async || std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        assert!(tokio::time::timeout(STALL * 10, next()).await.is_err(), "it waits");
        drop(turns);
        let begun = tokio::time::Instant::now();
        let refused = next().await.expect("an end").expect_err("the sender stopped");
        assert_eq!(refused.code(), tonic::Code::DeadlineExceeded);
        assert!((STALL..STALL * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }
}
