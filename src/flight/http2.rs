//! HTTP/2 connections: their streams become calls of the service, and its answers go back.
//!
//! Guarantees: a peer that is gone is noticed within twice [`KEEPALIVE`] and [`KEEPALIVE_WAIT`]; a call whose stream is
//! reset is dropped, so a client's deadline is its own; on shutdown the streams that are open end, and no more begin.
//! Written on h2 itself: hyper gives a sender its window back as soon as bytes are read; here
//! [`crate::flight::window`] says when.

use crate::flight::dialect::Connection;
use crate::flight::window::{RequestBody, Turns};
use crate::flight::wire::{Heard, Wire};
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
/// Streams that a peer may make end by its own faults.
const FAULTS_MAX: usize = 1024;

/// What is said to a peer at the beginning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) stream_window_bytes: u32,
    pub(super) connection_window_bytes: u32,
    pub(super) frame_bytes: u32,
    pub(super) streams_max: u32,
}

/// Serves connections until `stopping` becomes true and the streams that are open have ended.
pub(super) async fn serve<S, C>(
    incoming: impl Stream<Item = io::Result<Wire<S>>>,
    service: C,
    settings: Settings,
    stopping: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    C::Future: Send,
{
    let mut connections = JoinSet::new();
    {
        let mut stopped = pin!(stopped(stopping.clone()));
        let mut incoming = pin!(incoming);
        loop {
            tokio::select! {
                () = &mut stopped => break,
                Some(_) = connections.join_next() => {}
                socket = incoming.next() => match socket {
                    Some(Ok(socket)) => {
                        connections.spawn(connection(socket, service.clone(), settings, stopping.clone()));
                    }
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

/// Serves one connection to its end.
async fn connection<S, C>(socket: Wire<S>, service: C, settings: Settings, stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    C::Future: Send,
{
    let (history, heard) = (socket.connection().clone(), socket.heard());
    let turns = Turns::new();
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window_bytes)
        .initial_connection_window_size(settings.connection_window_bytes)
        .max_frame_size(settings.frame_bytes)
        .max_concurrent_streams(settings.streams_max)
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
                Some(Ok((request, respond))) => {
                    tokio::spawn(answer(request, respond, service.clone(), history.clone(), settings, turns.clone()));
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "a connection broke");
                    return;
                }
                None => return,
            },
        }
    }
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
    mut service: C,
    history: Connection,
    settings: Settings,
    turns: Turns,
) where
    C: Service<Request<RequestBody>, Response = Response<Body>, Error = Infallible>,
{
    // Lives as long as anybody waits for the answer.
    let (_wanted, unwanted) = oneshot::channel();
    let mut request = request.map(|stream| RequestBody::new(stream, settings.stream_window_bytes, turns, unwanted));
    request.extensions_mut().insert(history);
    let answered = {
        let mut call = pin!(service.call(request));
        poll_fn(|cx| match call.as_mut().poll(cx) {
            Poll::Ready(Ok(response)) => Poll::Ready(Some(response)),
            Poll::Ready(Err(never)) => match never {},
            Poll::Pending => respond.poll_reset(cx).map(|_| None),
        })
        .await
    };
    let Some(response) = answered else { return };
    let (head, body) = response.into_parts();
    let is_over = body.is_end_stream();
    let sent = match respond.send_response(Response::from_parts(head, ()), is_over) {
        Ok(_) if is_over => Ok(()),
        Ok(stream) => send(body, stream).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "an answer was not taken");
    }
}

/// Sends a body, as the peer makes room for it.
async fn send(mut body: Body, mut stream: SendStream<Bytes>) -> Result<(), h2::Error> {
    while let Some(frame) = poll_fn(|cx| next_frame(&mut body, &mut stream, cx)).await? {
        let frame = match frame.into_data() {
            Ok(data) => {
                if !data.is_empty() {
                    // h2 asks for the rest by itself.
                    stream.reserve_capacity(1);
                    poll_fn(|cx| has_room(&mut stream, cx)).await?;
                }
                stream.send_data(data, false)?;
                continue;
            }
            Err(frame) => frame,
        };
        if let Ok(trailers) = frame.into_trailers() {
            stream.reserve_capacity(0);
            return stream.send_trailers(trailers);
        }
    }
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

    const SETTINGS: Settings = Settings {
        stream_window_bytes: 64 << 10,
        connection_window_bytes: 1 << 20,
        frame_bytes: 16 << 10,
        streams_max: 8,
    };

    /// RFC 9113, 3.4: the preface, and SETTINGS without any.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

    /// Serves one connection with `answer`; returns its other end, what stops the server, and the server.
    fn server<A, F>(answer: A) -> (DuplexStream, watch::Sender<bool>, JoinHandle<()>)
    where
        A: Fn() -> F + Clone + Send + 'static,
        F: Future<Output = Body> + Send + 'static,
    {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (stop, stopping) = watch::channel(false);
        let service = service_fn(move |_request: Request<RequestBody>| {
            let answer = answer();
            async move { Ok::<_, Infallible>(Response::new(answer.await)) }
        });
        let service = tower::util::BoxCloneService::new(service);
        let incoming = futures::stream::iter([Ok(Wire::new(far))]).chain(futures::stream::pending());
        (near, stop, tokio::spawn(serve(incoming, service, SETTINGS, stopping)))
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
}
