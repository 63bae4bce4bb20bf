//! The bodies of requests, admitted before they are taken in: of an upload message by message ([`UploadBody`]), of any
//! other call its one message.
//!
//! Guarantees (INV-7): a request that is too large is refused by its header; another waits until there is memory for what
//! becomes of it, and has it until it is answered, also where its client has gone meanwhile (a question is given up then); one
//! that does not come in time ends. What comes behind its message is not kept; its end is waited for, as an answer that
//! overtakes it is a fault to HTTP/2.

use crate::flight::upload::{DO_PUT_PATH, HEADER_BYTES, Monitor, UploadBody, UploadLimits};
use crate::flight::window::RequestBody;
use crate::ingest::admit::{Permit, Pool};
use crate::limits::{REQUEST_BYTES_A_SECOND, REQUEST_BYTES_MAX, USUAL_REQUEST_BYTES, request_weight};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body::{Body, Frame};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;
use tower::Service;

/// What requests other than uploads may use.
#[derive(Debug, Clone)]
pub(super) struct RequestLimits {
    /// Memory of requests that come in or are worked on.
    pub(super) usual: Pool,
    /// The same of large ones.
    pub(super) large: Pool,
    /// How long a request may take to begin, or wait for memory; and how long beyond what its length takes to come.
    pub(super) stall: Duration,
}

/// Calls the service for uploads, or the one for other calls, with bodies of their kind.
#[derive(Debug, Clone)]
pub(super) struct RequestService<S> {
    pub(super) uploads: S,
    pub(super) upload_limits: UploadLimits,
    pub(super) others: S,
    pub(super) limits: RequestLimits,
}

impl<S> Service<http::Request<RequestBody>> for RequestService<S>
where
    S: Service<http::Request<tonic::body::Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        ready!(self.uploads.poll_ready(cx))?;
        self.others.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<RequestBody>) -> S::Future {
        if request.uri().path() == DO_PUT_PATH {
            let (monitor, limits) = (Arc::new(Monitor::default()), self.upload_limits.clone());
            let for_body = Arc::clone(&monitor);
            let mut request = request.map(|body| tonic::body::Body::new(UploadBody::new(body, limits, for_body)));
            request.extensions_mut().insert(monitor);
            return self.uploads.call(request);
        }
        let (held, limits) = (Held::default(), self.limits.clone());
        let for_body = held.clone();
        let mut request = request.map(|body| tonic::body::Body::new(MessageBody::new(body, limits, for_body)));
        request.extensions_mut().insert(held);
        self.others.call(request)
    }
}

/// The memory of a request, once it is admitted. Whoever works on the request keeps one.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    permit: Arc<Mutex<Option<Permit>>>,
}

impl Held {
    fn set(&self, permit: Permit) {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner).replace(permit);
    }

    /// Gives back what is not needed for a request of so many bytes: compressed ones were admitted unseen.
    pub(super) fn shrink_to(&self, request_bytes: usize) {
        if let Some(permit) = self.permit.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            permit.shrink_to(request_weight(request_bytes as u64, false));
        }
    }
}

enum State {
    /// Before the message.
    Header,
    /// The permit of a message of so many bytes is waited for.
    Claim(BoxFuture<'static, Permit>, u64),
    /// So many bytes are still to be handed on.
    Message(u64),
}

/// The one message of a call that is no upload.
struct MessageBody {
    /// `None`: nothing more is waited for.
    inner: Option<RequestBody>,
    limits: RequestLimits,
    held: Held,
    state: State,
    /// Received and not yet handed on.
    pending: Bytes,
    deadline: Pin<Box<Sleep>>,
}

impl MessageBody {
    /// Of a body that nothing was read of; `held` gets its permit.
    fn new(mut inner: RequestBody, limits: RequestLimits, held: Held) -> Self {
        inner.hold_back(true);
        let deadline = Box::pin(sleep(limits.stall));
        Self { inner: Some(inner), limits, held, state: State::Header, pending: Bytes::new(), deadline }
    }

    /// Hands on what may be; `None`: more bytes are needed, or wanted no more.
    fn advance(&mut self, inner: &mut RequestBody, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        loop {
            match &mut self.state {
                State::Header => {
                    let Some([compressed, length @ ..]) = self.pending.first_chunk::<HEADER_BYTES>() else {
                        return Poll::Ready(Ok(None));
                    };
                    let length = u64::from(u32::from_be_bytes(*length));
                    if REQUEST_BYTES_MAX < length {
                        return Poll::Ready(Err(Status::resource_exhausted(format!(
                            "a request of {length} bytes exceeds the limit of {REQUEST_BYTES_MAX}: only DoPut takes more"
                        ))));
                    }
                    let weight = request_weight(length, *compressed != 0);
                    let pool = if weight <= USUAL_REQUEST_BYTES { &self.limits.usual } else { &self.limits.large };
                    let pool = pool.clone();
                    self.state = State::Claim(async move { pool.claim(weight).await }.boxed(), length);
                    self.set_deadline(Duration::ZERO);
                }
                State::Claim(claim, length) => {
                    if inner.poll_unwanted(cx).is_ready() {
                        return Poll::Ready(Err(Status::cancelled("the call was given up while it waited for memory")));
                    }
                    let Poll::Ready(permit) = claim.poll_unpin(cx) else {
                        ready!(self.deadline.poll_unpin(cx));
                        return Poll::Ready(Err(Status::resource_exhausted(format!(
                            "there was no memory for a request of {length} bytes for {:?}: others have it; try again",
                            self.limits.stall
                        ))));
                    };
                    let length = *length;
                    self.held.set(permit);
                    self.state = State::Message(HEADER_BYTES as u64 + length);
                    inner.hold_back(false);
                    self.set_deadline(Duration::from_secs(length / REQUEST_BYTES_A_SECOND));
                }
                State::Message(left) => {
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(self.pending.len());
                    if take == 0 {
                        return Poll::Ready(Ok(None));
                    }
                    *left -= take as u64;
                    if *left == 0 {
                        self.set_deadline(Duration::ZERO); // Only its end is still to come.
                    }
                    return Poll::Ready(Ok(Some(self.pending.split_to(take))));
                }
            }
        }
    }

    /// From now on so much beyond a stall.
    fn set_deadline(&mut self, beyond: Duration) {
        self.deadline.as_mut().reset(Instant::now() + self.limits.stall + beyond);
    }

    fn poll_message(&mut self, inner: &mut RequestBody, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        loop {
            if let Some(bytes) = ready!(self.advance(inner, cx))? {
                return Poll::Ready(Some(Ok(bytes)));
            }
            let is_whole = matches!(self.state, State::Message(0));
            if is_whole && !self.pending.is_empty() {
                return Poll::Ready(None); // There is one message in a request, and no more is read.
            }
            match Pin::new(&mut *inner).poll_frame(cx) {
                Poll::Pending => {
                    ready!(self.deadline.poll_unpin(cx));
                    if is_whole {
                        return Poll::Ready(None);
                    }
                    let text = format!("a request did not come within {:?} (setting upload_stall)", self.limits.stall);
                    return Poll::Ready(Some(Err(Status::deadline_exceeded(text))));
                }
                Poll::Ready(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { return Poll::Ready(None) };
                    // Only a header that came in pieces has anything before it.
                    self.pending =
                        if self.pending.is_empty() { data } else { [&self.pending[..], &data[..]].concat().into() };
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(Status::from_error(Box::new(error))))),
                Poll::Ready(None) => return Poll::Ready(None),
            }
        }
    }
}

impl Body for MessageBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(mut inner) = this.inner.take() else { return Poll::Ready(None) };
        let polled = this.poll_message(&mut inner, cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            // Whoever polls this may keep it.
            (this.state, this.pending) = (State::Message(0), Bytes::new());
        } else {
            this.inner = Some(inner);
        }
        polled.map_ok(Frame::data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::places::Places;
    use crate::flight::window::tests::{SIZE, room, wanted_streams};
    use futures::poll;
    use std::future::poll_fn;
    use tokio::task::yield_now;

    const STALL: Duration = Duration::from_secs(1);
    /// Two windows.
    const LENGTH: usize = 2 * SIZE;
    const DO_ACTION_PATH: &str = "/arrow.flight.protocol.FlightService/DoAction";

    struct Call {
        sender: h2::SendStream<Bytes>,
        body: MessageBody,
        held: Held,
        wanted: tokio::sync::oneshot::Sender<std::convert::Infallible>,
    }

    /// A call in the only place.
    async fn call(pool: &Pool, places: &Places) -> Call {
        let (mut senders, mut bodies, mut wanted) = wanted_streams(1, 0).await;
        let (place, _) = places.begin(DO_ACTION_PATH).expect("a place");
        let limits = RequestLimits { usual: pool.clone(), large: pool.clone(), stall: STALL };
        let held = Held::default();
        let body = MessageBody::new(bodies.pop().expect("one").at(place), limits, held.clone());
        Call { sender: senders.pop().expect("one"), body, held, wanted: wanted.pop().expect("one") }
    }

    fn places() -> Places {
        Places::new(1, 1)
    }

    /// Whether all places are free.
    fn all_free(places: &Places) -> bool {
        let most = crate::limits::requests_max(1);
        (0..most).map(|_| places.begin(DO_ACTION_PATH)).collect::<Result<Vec<_>, _>>().is_ok()
    }

    fn message(length: usize) -> Bytes {
        let header = u32::try_from(length).expect("short").to_be_bytes();
        [&[0], &header[..], &vec![7; length]].concat().into()
    }

    async fn next(body: &mut MessageBody) -> Option<Result<Bytes, Status>> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        Some(frame.map(|frame| frame.into_data().expect("data")))
    }

    async fn send(sender: &mut h2::SendStream<Bytes>, mut bytes: Bytes) {
        while !bytes.is_empty() {
            room(sender, 1).await;
            sender.reserve_capacity(bytes.len());
            let piece = bytes.split_to(sender.capacity().min(bytes.len()));
            sender.send_data(piece, false).expect("sent");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_comes_whole_and_then_nothing_of_its_stream_is_kept_though_the_sender_goes_on() {
        let (pool, places) = (Pool::new(1 << 30), places());
        let Call { mut sender, mut body, held, wanted: _wanted } = call(&pool, &places).await;
        let bytes = message(LENGTH);
        let expected = bytes.clone();
        let sending = tokio::spawn(async move {
            // The header in pieces.
            for piece in [bytes.slice(..2), bytes.slice(2..HEADER_BYTES), bytes.slice(HEADER_BYTES..)] {
                send(&mut sender, piece).await;
                yield_now().await;
            }
            send(&mut sender, message(100)).await;
            sender
        });
        let mut back = Vec::new();
        while let Some(bytes) = next(&mut body).await {
            back.extend_from_slice(&bytes.expect("bytes"));
        }
        assert!(back == expected);
        assert!(all_free(&places));
        drop(body);
        assert_eq!(pool.held(), request_weight(LENGTH as u64, false), "until it is answered");
        held.shrink_to(100);
        assert_eq!(pool.held(), request_weight(100, false));
        drop(held);
        assert_eq!(pool.held(), 0);
        sending.await.expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_waits_for_memory_has_no_more_than_its_window_here_and_goes_on_when_there_is_some() {
        let (pool, places) = (Pool::new(1 << 30), places());
        let all = pool.claim(1 << 30).await;
        let Call { mut sender, mut body, held: _held, wanted: _wanted } = call(&pool, &places).await;
        let mut bytes = message(LENGTH);
        room(&mut sender, SIZE).await;
        sender.send_data(bytes.split_to(SIZE), false).expect("sent");
        while !pool.is_waited_for() {
            assert!(poll!(std::pin::pin!(next(&mut body))).is_pending());
            yield_now().await;
        }
        for _ in 0..100 {
            assert!(poll!(std::pin::pin!(next(&mut body))).is_pending());
            yield_now().await;
        }
        assert_eq!(sender.capacity(), 0);
        drop(all);
        let sending = tokio::spawn(async move {
            send(&mut sender, bytes).await;
            sender.send_data(Bytes::new(), true).expect("sent");
        });
        let mut length = 0;
        while let Some(bytes) = next(&mut body).await {
            length += bytes.expect("bytes").len();
        }
        assert_eq!(length, HEADER_BYTES + LENGTH);
        sending.await.expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_given_up_while_it_waits_for_memory_leaves_its_place() {
        let (pool, places) = (Pool::new(1 << 30), places());
        let all = pool.claim(1 << 30).await;
        let Call { mut sender, mut body, held: _held, wanted } = call(&pool, &places).await;
        sender.send_data(message(LENGTH).split_to(100), false).expect("sent");
        while !pool.is_waited_for() {
            assert!(poll!(std::pin::pin!(next(&mut body))).is_pending());
            yield_now().await;
        }
        drop(wanted);
        assert_eq!(next(&mut body).await.expect("an end").expect_err("given up").code(), tonic::Code::Cancelled);
        assert!(all_free(&places));
        drop(all);
        assert_eq!(pool.held(), 0, "also while the body is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_waits_too_long_for_memory_is_told_so() {
        let (pool, places) = (Pool::new(1 << 30), places());
        let _all = pool.claim(1 << 30).await;
        let Call { mut sender, mut body, held: _held, wanted: _wanted } = call(&pool, &places).await;
        sender.send_data(message(LENGTH).split_to(100), false).expect("sent");
        let refused = next(&mut body).await.expect("an end").expect_err("no memory");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains(&LENGTH.to_string()), "{refused}");
        assert!(all_free(&places));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_is_too_large_is_refused_by_its_header() {
        let (pool, places) = (Pool::new(1 << 30), places());
        let Call { mut sender, mut body, held: _held, wanted: _wanted } = call(&pool, &places).await;
        let length = u32::try_from(REQUEST_BYTES_MAX + 1).expect("short").to_be_bytes();
        sender.send_data([&[0], &length[..]].concat().into(), false).expect("sent");
        let refused = next(&mut body).await.expect("an end").expect_err("too large");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        for name in [(REQUEST_BYTES_MAX + 1).to_string(), REQUEST_BYTES_MAX.to_string()] {
            assert!(refused.message().contains(&name), "{refused}");
        }
        assert!(all_free(&places));
        assert_eq!(pool.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_come_in_time_is_told_so_however_it_trickles() {
        for sent in [0, 3, 50] {
            let (pool, places) = (Pool::new(1 << 30), places());
            let Call { mut sender, mut body, held: _held, wanted: _wanted } = call(&pool, &places).await;
            let mut bytes = message(100);
            sender.send_data(bytes.split_to(sent), false).expect("sent");
            let trickle = tokio::spawn(async move {
                while sent > HEADER_BYTES && !bytes.is_empty() {
                    sleep(STALL / 10).await;
                    sender.send_data(bytes.split_to(1), false).ok(); // Who is refused may be gone.
                }
                sender
            });
            let begun = Instant::now();
            let refused = loop {
                if let Err(refused) = next(&mut body).await.expect("more, or a refusal") {
                    break refused;
                }
            };
            assert_eq!(refused.code(), tonic::Code::DeadlineExceeded);
            assert!(refused.message().contains("upload_stall"), "{refused}");
            assert!((STALL..STALL * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
            assert!(all_free(&places));
            trickle.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_behind_a_message_is_waited_for_but_not_for_ever() {
        for ends in [true, false] {
            let (pool, places) = (Pool::new(1 << 30), places());
            let Call { mut sender, mut body, held: _held, wanted: _wanted } = call(&pool, &places).await;
            sender.send_data(message(100), false).expect("sent");
            let mut length = 0;
            while length < HEADER_BYTES + 100 {
                length += next(&mut body).await.expect("more").expect("bytes").len();
            }
            let end = STALL / 2;
            let ending = tokio::spawn(async move {
                sleep(end).await;
                if ends {
                    sender.send_data(Bytes::new(), true).expect("sent");
                }
                sender
            });
            let begun = Instant::now();
            assert!(next(&mut body).await.is_none());
            let expected = if ends { end..STALL } else { STALL..STALL * 2 };
            assert!(expected.contains(&begun.elapsed()), "{:?}", begun.elapsed());
            assert!(all_free(&places));
            ending.await.expect("no panic");
        }
    }
}
