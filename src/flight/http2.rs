//! HTTP/2 connections: their streams become calls of the service, and its answers go back.
//!
//! Guarantees: a peer that is gone is noticed within twice [`KEEPALIVE`] and [`KEEPALIVE_WAIT`]; a call whose stream is
//! reset is dropped, so a client's deadline is its own; a connection or call for which there is no place
//! ([`crate::flight::places`]) is told so; on shutdown the streams that are open end, and no more begin.
//! Written on h2 itself: hyper gives a sender its window back as soon as bytes are read; here
//! [`crate::flight::window`] says when.

use crate::flight::dialect::Connection;
use crate::flight::places::{AnswerPlace, ConnectionPlace, Places, RequestPlace};
use crate::flight::splice::splice;
use crate::flight::window::{RequestBody, Turns};
use crate::flight::wire::{Heard, Wire};
use crate::limits::{ENDED_EARLY_FOR, ENDED_EARLY_MAX, FAULTS_MAX};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use h2::server::SendResponse;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::{Body as _, Frame};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tonic::Status;
use tonic::body::Body;
use tower::Service;

/// A peer that says nothing for so long is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long it may take to say so, or to begin a connection.
const KEEPALIVE_WAIT: Duration = Duration::from_secs(20);
/// How long no connection is taken after one could not be, as when the process is out of file descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Request headers of a stream, in bytes.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// What a stream holds of its answer beyond what the peer has room for, in bytes.
const SEND_BUFFER_BYTES: usize = 400 << 10;
/// How often a call asks for a place before it is refused.
const BEGIN_TRIES: usize = 4;
/// Connections without a place that are told so at once; more are closed without a word.
const REFUSALS_AT_ONCE: usize = 32;
/// Calls that such a connection may make at once. More than one: hyper's clients put a call that fills the last stream
/// where the end of the connection overtakes its answer.
const REFUSED_CALLS_AT_ONCE: u32 = 4;
/// How long telling it may take: a client calls as soon as it is connected.
const REFUSAL_WAIT: Duration = Duration::from_secs(5);

/// What is said to a peer at the beginning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) stream_window_bytes: u32,
    pub(super) connection_window_bytes: u32,
    pub(super) frame_bytes: u32,
}

/// Serves connections until `stopping` becomes true and the streams that are open have ended.
pub(super) async fn serve<S, C>(
    incoming: impl Stream<Item = io::Result<Wire<S>>>,
    service: C,
    settings: Settings,
    places: Places,
    stopping: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    C::Future: Send,
{
    let mut connections = JoinSet::new();
    let (mut refusals, mut is_full) = (JoinSet::new(), false);
    {
        let mut stopped = pin!(stopped(stopping.clone()));
        let mut incoming = pin!(incoming);
        loop {
            tokio::select! {
                () = &mut stopped => break,
                Some(_) = connections.join_next() => {}
                Some(_) = refusals.join_next() => {}
                socket = incoming.next() => match socket {
                    Some(Ok(socket)) => match places.connect() {
                        Ok(place) => {
                            is_full = false;
                            let served = Served { service: service.clone(), settings, places: places.clone() };
                            connections.spawn(connection(socket, served, place, stopping.clone()));
                        }
                        Err(refusal) => {
                            if !std::mem::replace(&mut is_full, true) {
                                tracing::warn!(reason = refusal.message(), "a connection was refused");
                            }
                            if refusals.len() < REFUSALS_AT_ONCE {
                                refusals.spawn(tokio::time::timeout(REFUSAL_WAIT, refuse(socket, refusal)));
                            }
                        }
                    },
                    Some(Err(error)) => {
                        tracing::warn!(%error, "a connection could not be taken");
                        tokio::time::sleep(ACCEPT_REST).await;
                    }
                    None => break,
                },
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

/// What a connection's calls need.
#[derive(Clone)]
struct Served<C> {
    service: C,
    settings: Settings,
    places: Places,
}

/// Tells a peer by the answer to its first call that there is no place for its connection.
async fn refuse<S>(socket: Wire<S>, refusal: Status) -> Result<(), h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = h2::server::Builder::new();
    builder.max_concurrent_streams(REFUSED_CALLS_AT_ONCE).max_header_list_size(HEADERS_BYTES_MAX);
    let mut connection = builder.handshake::<_, Bytes>(socket).await?;
    while let Some(call) = connection.accept().await {
        let (_request, mut respond) = call?;
        respond.send_response(refusal.clone().into_http(), true).ok(); // Who has gone need not know; others may.
        connection.graceful_shutdown();
    }
    Ok(())
}

/// Serves one connection to its end.
async fn connection<S, C>(socket: Wire<S>, served: Served<C>, _place: ConnectionPlace, stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    C::Future: Send,
{
    let (history, heard) = (socket.connection().clone(), socket.heard());
    let turns = Turns::new();
    let settings = served.settings;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window_bytes)
        .initial_connection_window_size(settings.connection_window_bytes)
        .max_frame_size(settings.frame_bytes)
        .max_concurrent_streams(served.places.calls_max())
        .max_concurrent_reset_streams(ENDED_EARLY_MAX)
        .reset_stream_duration(ENDED_EARLY_FOR)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_local_error_reset_streams(Some(FAULTS_MAX));
    let begun = tokio::time::timeout(KEEPALIVE_WAIT, builder.handshake::<_, Bytes>(socket)).await;
    let Ok(Ok(mut connection)) = begun else {
        tracing::debug!("a connection does not speak HTTP/2");
        return;
    };
    let mut lost = pin!(is_lost(connection.ping_pong(), heard));
    let mut stopped = pin!(stopped(stopping));
    let mut is_stopping = false;
    loop {
        tokio::select! {
            biased;
            () = &mut stopped, if !is_stopping => {
                connection.graceful_shutdown();
                is_stopping = true;
            }
            () = &mut lost => {
                tracing::debug!("a peer is gone");
                return;
            }
            accepted = connection.accept() => match accepted {
                // Here and not in the call's own task: what comes meanwhile is kept.
                Some(Ok((request, mut respond))) => match begin(&served.places, request.uri().path()).await {
                    Ok(place) => {
                        tokio::spawn(answer(request, respond, place, served.clone(), history.clone(), turns.clone()));
                    }
                    Err(refusal) => {
                        tracing::debug!(reason = refusal.message(), "a call was refused");
                        respond.send_response(refusal.into_http(), true).ok(); // Who has gone need not know.
                    }
                },
                Some(Err(error)) => {
                    tracing::debug!(%error, "a connection broke");
                    return;
                }
                None => return,
            },
        }
    }
}

/// Places for a call. Requests that have come whole have theirs only until their tasks have run: in a burst those before
/// this one are let run first.
async fn begin(places: &Places, path: &str) -> Result<(RequestPlace, AnswerPlace), Status> {
    for _ in 1..BEGIN_TRIES {
        if let Ok(place) = places.begin(path) {
            return Ok(place);
        }
        tokio::task::yield_now().await;
    }
    places.begin(path)
}

/// Ends when the server is to stop; a sender that is gone has said so as well.
async fn stopped(mut stopping: watch::Receiver<bool>) {
    stopping.wait_for(|stop| *stop).await.ok();
}

/// Ends when the peer has said nothing for [`KEEPALIVE`], and then neither answered a ping in [`KEEPALIVE_WAIT`] nor said
/// anything else: over a slow line the answer waits behind all that is being sent.
async fn is_lost(pings: Option<PingPong>, heard: Heard) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    let mut is_asked = false;
    loop {
        let before = heard.reads();
        tokio::time::sleep(KEEPALIVE).await;
        if heard.reads() != before {
            continue;
        }
        // The connection itself says what broke.
        if !is_asked && pings.send_ping(Ping::opaque()).is_err() {
            return std::future::pending().await;
        }
        is_asked = true;
        match tokio::time::timeout(KEEPALIVE_WAIT, poll_fn(|cx| pings.poll_pong(cx))).await {
            Ok(Ok(_)) => is_asked = false,
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) if heard.reads() == before => return,
            Err(_) => {}
        }
    }
}

/// Calls the service for one stream and sends what it answers.
async fn answer<C>(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    (place, answer_place): (RequestPlace, AnswerPlace),
    mut served: Served<C>,
    history: Connection,
    turns: Turns,
) where
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible>,
{
    // Lives as long as anybody waits for the answer.
    let (_wanted, unwanted) = oneshot::channel();
    let window_bytes = served.settings.stream_window_bytes;
    let mut request = request.map(|stream| RequestBody::new(stream, window_bytes, turns, unwanted).at(place));
    request.extensions_mut().insert(history);
    let answered = {
        let mut call = pin!(served.service.call(request));
        poll_fn(|cx| match call.as_mut().poll(cx) {
            Poll::Ready(Ok(response)) => Poll::Ready(Some(response)),
            Poll::Ready(Err(never)) => match never {},
            Poll::Pending => respond.poll_reset(cx).map(|_| None),
        })
        .await
    };
    let Some(response) = answered else { return };
    let (mut head, body) = response.into_parts();
    let body = splice(&mut head.extensions, body);
    let is_over = body.is_end_stream();
    let sent = match respond.send_response(Response::from_parts(head, ()), is_over) {
        Ok(_) if is_over => Ok(()),
        Ok(stream) => send(body, stream, answer_place).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "an answer was not taken");
    }
}

/// Sends a body, as the peer makes room for it. Its place is free before the peer sees the end.
async fn send(mut body: Body, mut stream: SendStream<Bytes>, place: AnswerPlace) -> Result<(), h2::Error> {
    while let Some(frame) = poll_fn(|cx| next_frame(&mut body, &mut stream, cx)).await? {
        let frame = match frame.into_data() {
            Ok(mut data) => {
                // Never more than the peer has room for: h2 would keep the rest, also behind the end of this task.
                while !data.is_empty() {
                    stream.reserve_capacity(data.len());
                    poll_fn(|cx| has_room(&mut stream, cx)).await?;
                    stream.send_data(data.split_to(stream.capacity().min(data.len())), false)?;
                }
                continue;
            }
            Err(frame) => frame,
        };
        if let Ok(trailers) = frame.into_trailers() {
            stream.reserve_capacity(0);
            drop(place);
            return stream.send_trailers(trailers);
        }
    }
    drop(place);
    stream.send_data(Bytes::new(), true)
}

/// The next frame of an answer, unless the peer does not want it any more.
fn next_frame(
    body: &mut Body,
    stream: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<Frame<Bytes>>, h2::Error>> {
    if let Poll::Ready(reason) = stream.poll_reset(cx)? {
        return Poll::Ready(Err(reason.into()));
    }
    match Pin::new(body).poll_frame(cx) {
        Poll::Ready(Some(Ok(frame))) => Poll::Ready(Ok(Some(frame))),
        Poll::Ready(Some(Err(status))) => {
            tracing::debug!(%status, "an answer broke off");
            stream.send_reset(Reason::INTERNAL_ERROR);
            Poll::Ready(Err(Reason::INTERNAL_ERROR.into()))
        }
        Poll::Ready(None) => Poll::Ready(Ok(None)),
        Poll::Pending => Poll::Pending,
    }
}

/// Whether the peer has room for at least a byte.
fn has_room(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
    loop {
        if let Poll::Ready(reason) = stream.poll_reset(cx)? {
            return Poll::Ready(Err(reason.into()));
        }
        if stream.capacity() > 0 {
            return Poll::Ready(Ok(()));
        }
        match stream.poll_capacity(cx) {
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(None) => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
            Poll::Pending => return Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use h2::client::SendRequest;
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::sync::Notify;
    use tokio::task::JoinHandle;
    use tokio::time::Instant;
    use tower::service_fn;

    const SETTINGS: Settings =
        Settings { stream_window_bytes: 64 << 10, connection_window_bytes: 1 << 20, frame_bytes: 16 << 10 };
    const STREAMS_MAX: u32 = 8;

    /// RFC 9113, 3.4: the preface, and SETTINGS without any.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

    /// Serves one connection with `answer`; returns its other end, what stops the server, and the server.
    fn server<A, F>(answer: A) -> (DuplexStream, watch::Sender<bool>, JoinHandle<()>)
    where
        A: Fn() -> F + Clone + Send + 'static,
        F: Future<Output = Body> + Send + 'static,
    {
        let (near, far) = tokio::io::duplex(64 << 10);
        let service = service_fn(move |_request: Request<RequestBody>| {
            let answer = answer();
            async move { Ok::<_, Infallible>(Response::new(answer.await)) }
        });
        let (stop, server) = serve_with(tower::util::BoxCloneService::new(service), vec![far]);
        (near, stop, server)
    }

    type TestService = tower::util::BoxCloneService<Request<RequestBody>, Response<Body>, Infallible>;

    /// Serves connections, with places for two of them.
    fn serve_with(service: TestService, sockets: Vec<DuplexStream>) -> (watch::Sender<bool>, JoinHandle<()>) {
        let (stop, stopping) = watch::channel(false);
        let sockets = sockets.into_iter().map(|socket| Ok(Wire::new(socket)));
        let incoming = futures::stream::iter(sockets).chain(futures::stream::pending());
        let places = Places::new(2, STREAMS_MAX);
        (stop, tokio::spawn(serve(incoming, service, SETTINGS, places, stopping)))
    }

    async fn client(socket: DuplexStream) -> SendRequest<Bytes> {
        let (requests, connection) = h2::client::handshake(socket).await.expect("a client");
        tokio::spawn(connection);
        requests
    }

    fn request() -> Request<()> {
        Request::post("http://box/").body(()).expect("a request")
    }

    #[tokio::test]
    async fn an_answer_larger_than_the_peer_s_window_arrives_whole() {
        let text: String = (0..100_000).map(|number| format!("{number:08}")).collect();
        let expected = text.clone();
        let (socket, _stop, _server) = server(move || std::future::ready(Body::new(text.clone())));
        let mut requests = client(socket).await.ready().await.expect("ready");
        let (response, _) = requests.send_request(request(), true).expect("sent");
        let mut body = response.await.expect("answered").into_body();
        let mut back = Vec::new();
        while let Some(data) = body.data().await {
            let data = data.expect("data");
            body.flow_control().release_capacity(data.len()).expect("room");
            back.extend_from_slice(&data);
        }
        assert_eq!(String::from_utf8(back).expect("text"), expected);
    }

    #[tokio::test]
    async fn an_answer_of_one_piece_has_its_place_until_it_is_read() {
        const BYTES: usize = 1 << 20;
        let (socket, _stop, _server) = server(|| std::future::ready(Body::new("x".repeat(BYTES))));
        // Streams that are not read do not stop the others.
        let mut builder = h2::client::Builder::new();
        let handshake = builder.initial_connection_window_size(16 << 20).handshake::<_, Bytes>(socket);
        let (mut requests, connection) = handshake.await.expect("a client");
        tokio::spawn(connection);
        let get = || Request::post("http://box/arrow.flight.protocol.FlightService/DoGet").body(()).expect("a request");
        let mut answers = Vec::new();
        for _ in 0..STREAMS_MAX {
            requests = requests.ready().await.expect("ready");
            answers.push(requests.send_request(get(), true).expect("sent").0.await.expect("answered"));
        }
        requests = requests.ready().await.expect("ready");
        let refused = requests.send_request(get(), true).expect("sent").0.await.expect("answered");
        check_refused(&refused, &["8 DoGet streams", "streams_max"]);
        let mut body = answers.pop().expect("one").into_body();
        let mut left = BYTES;
        while let Some(data) = body.data().await {
            let data = data.expect("data");
            body.flow_control().release_capacity(data.len()).expect("room");
            left -= data.len();
        }
        assert_eq!(left, 0);
        requests = requests.ready().await.expect("ready");
        let answer = requests.send_request(get(), true).expect("sent").0.await.expect("answered");
        assert!(refusal(&answer).is_none(), "the place of the one that was read");
    }

    #[tokio::test]
    async fn a_call_whose_stream_is_reset_is_dropped() {
        struct Dropped(Arc<Notify>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let (begun, dropped) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (tell_begun, tell_dropped) = (Arc::clone(&begun), Arc::clone(&dropped));
        let (socket, _stop, _server) = server(move || {
            tell_begun.notify_one();
            let held = Dropped(Arc::clone(&tell_dropped));
            async move {
                let _held = held;
                std::future::pending().await
            }
        });
        let mut requests = client(socket).await.ready().await.expect("ready");
        let (_response, mut stream) = requests.send_request(request(), false).expect("sent");
        begun.notified().await;
        stream.send_reset(Reason::CANCEL);
        dropped.notified().await;
    }

    #[tokio::test]
    async fn shutdown_lets_open_streams_end_and_begins_no_more() {
        let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (tell_begun, wait) = (Arc::clone(&begun), Arc::clone(&go_on));
        let (socket, stop, server) = server(move || {
            tell_begun.notify_one();
            let wait = Arc::clone(&wait);
            async move {
                wait.notified().await;
                Body::new(String::from("done"))
            }
        });
        let mut requests = client(socket).await.ready().await.expect("ready");
        let (response, _) = requests.send_request(request(), true).expect("sent");
        begun.notified().await;
        stop.send_replace(true);
        while requests.clone().ready().await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(!server.is_finished(), "a stream is open");
        go_on.notify_one();
        let mut body = response.await.expect("answered").into_body();
        assert_eq!(body.data().await.expect("a body").expect("data"), "done");
        server.await.expect("the server ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_answer_is_noticed() {
        let (mut socket, _stop, _server) = server(std::future::pending);
        let begun = Instant::now();
        socket.write_all(PREFACE).await.expect("sent");
        let mut said = Vec::new();
        socket.read_to_end(&mut said).await.expect("the end");
        assert!((KEEPALIVE..=2 * KEEPALIVE + KEEPALIVE_WAIT).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_and_has_no_room_to_answer_stays() {
        let (mut socket, _stop, server) = server(std::future::pending);
        socket.write_all(PREFACE).await.expect("sent");
        // Frames of an unknown type (RFC 9113, 4.1) are ignored.
        for round in 0..60 {
            let pause = if round % 2 == 0 { KEEPALIVE / 2 } else { KEEPALIVE + KEEPALIVE_WAIT / 2 };
            tokio::time::sleep(pause).await;
            socket.write_all(b"\0\0\0\x77\0\0\0\0\0").await.expect("sent");
        }
        assert!(!server.is_finished());
        let begun = Instant::now();
        socket.read_to_end(&mut Vec::new()).await.expect("the end");
        assert!(begun.elapsed() <= 2 * KEEPALIVE + KEEPALIVE_WAIT, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_is_let_go() {
        let (mut socket, _stop, _server) = server(std::future::pending);
        let begun = Instant::now();
        socket.read_to_end(&mut Vec::new()).await.expect("the end");
        assert_eq!(begun.elapsed(), KEEPALIVE_WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_answers_stays() {
        let (socket, _stop, _server) = server(|| std::future::ready(Body::empty()));
        let requests = client(socket).await;
        tokio::time::sleep(KEEPALIVE * 10).await;
        let mut requests = requests.ready().await.expect("ready");
        assert!(requests.send_request(request(), true).expect("sent").0.await.expect("answered").status().is_success());
    }

    /// What an answer without a body says.
    fn refusal(response: &Response<RecvStream>) -> Option<Status> {
        Status::from_header_map(response.headers())
    }

    #[track_caller]
    fn check_refused(response: &Response<RecvStream>, names: &[&str]) {
        let status = refusal(response).expect("a refusal");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        for name in names {
            assert!(status.message().contains(name), "{:?} does not name {name:?}", status.message());
        }
    }

    #[tokio::test]
    async fn a_connection_without_a_place_is_told_so_and_one_that_ends_makes_room() {
        let (sockets, far): (Vec<_>, Vec<_>) = (0..3).map(|_| tokio::io::duplex(64 << 10)).unzip();
        let service = service_fn(|_: Request<RequestBody>| std::future::ready(Ok(Response::new(Body::empty()))));
        let (connect, connected) = tokio::sync::mpsc::unbounded_channel();
        let incoming =
            futures::stream::unfold(connected, async |mut connected| Some((connected.recv().await?, connected)));
        let (_stop, stopping) = watch::channel(false);
        tokio::spawn(serve(incoming, service, SETTINGS, Places::new(2, STREAMS_MAX), stopping));
        let mut clients = Vec::new();
        for (near, far) in sockets.into_iter().zip(far) {
            connect.send(Ok(Wire::new(far))).expect("served");
            clients.push(client(near).await.ready().await.expect("ready"));
        }
        let mut third = clients.pop().expect("three");
        let (response, _) = third.send_request(request(), true).expect("sent");
        check_refused(&response.await.expect("an answer"), &["2 connections", "connections_max"]);
        assert!(third.ready().await.is_err(), "it is closed");
        for client in &mut clients {
            assert!(
                client.send_request(request(), true).expect("sent").0.await.expect("answered").status().is_success()
            );
        }
        drop(clients.pop());
        // As soon as its end is seen.
        loop {
            let (near, far) = tokio::io::duplex(64 << 10);
            connect.send(Ok(Wire::new(far))).expect("served");
            let mut fourth = client(near).await.ready().await.expect("ready");
            let response = fourth.send_request(request(), true).expect("sent").0.await.expect("an answer");
            if refusal(&response).is_none() {
                break;
            }
        }
    }

    /// RFC 9113, 4.1: a frame of a stream.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// RFC 9113, 6.2, and RFC 7541, 6.2.2: the headers of a DoPut, not indexed.
    fn do_put(stream: u32) -> Vec<u8> {
        const PATH: &[u8] = b"/arrow.flight.protocol.FlightService/DoPut";
        let path_length = u8::try_from(PATH.len()).expect("short");
        // :method POST and :scheme http are in the static table; :path and :authority are literals named by it.
        let headers = [&[0x83, 0x86, 0x04, path_length], PATH, &[0x01, 3], b"box"].concat();
        frame(1, 4, stream, &headers)
    }

    #[tokio::test]
    async fn what_was_on_its_way_to_a_thousand_refused_uploads_is_no_fault() {
        let (mut socket, far) = tokio::io::duplex(64 << 20);
        // Uploads have their places as long as their bodies are kept.
        let service = service_fn(async |request: Request<RequestBody>| {
            let _request = request;
            std::future::pending().await
        });
        let (_stop, _server) = serve_with(tower::util::BoxCloneService::new(service), vec![far]);
        socket.write_all(PREFACE).await.expect("sent");
        let next = async |socket: &mut DuplexStream| {
            let mut head = [0; 9];
            socket.read_exact(&mut head).await.expect("the connection stays");
            let [a, b, c, kind, ..] = head;
            let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("short")];
            socket.read_exact(&mut payload).await.expect("the connection stays");
            kind
        };
        let ids: Vec<u32> = (0..1000).map(|number| 2 * number + 1).collect();
        let mut open = STREAMS_MAX;
        // As many as may be open at once.
        for ids in ids.chunks(100) {
            for id in ids {
                socket.write_all(&do_put(*id)).await.expect("sent");
            }
            // A refusal is headers and a reset (kind 3).
            let mut left = ids.len() - std::mem::take(&mut open) as usize;
            while left > 0 {
                left -= usize::from(next(&mut socket).await == 3);
            }
        }
        for id in ids {
            socket.write_all(&frame(0, 0, id, &[7; 100])).await.expect("sent");
        }
        // RFC 9113, 6.7: a ping is answered behind all of it.
        socket.write_all(&frame(6, 0, 0, &[0; 8])).await.expect("sent");
        loop {
            match next(&mut socket).await {
                6 => break,
                // Settings and windows.
                4 | 8 => {}
                kind => panic!("a frame of kind {kind} for what was on its way"),
            }
        }
    }
}
