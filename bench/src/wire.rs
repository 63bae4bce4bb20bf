//! The lightest client there is: gRPC over bare HTTP/2, bodies sent as they lie in memory. What the load costs
//! must not hide what the server costs: both share two cores.

use crate::profile::Prepared;
use arrow_flight::{FlightData, PutResult};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Request, Response};
use prost::Message;
use serde_json::Value;
use std::error::Error;
use std::future::poll_fn;
use tokio::net::TcpStream;

type AnyError = Box<dyn Error + Send + Sync>;

const WINDOW_BYTES: u32 = (1 << 31) - 1;
const FRAME_BYTES: u32 = 1 << 20;
/// Compressed-flag byte and length.
const GRPC_HEADER_BYTES: usize = 5;
/// DATA frames of one message: smaller ones cost more calls, larger ones wait longer for window.
const PIECE_BYTES: usize = 1 << 20;

/// One HTTP/2 connection; cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection {
    requests: SendRequest<Bytes>,
    authority: String,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(address: &str) -> Result<Self, AnyError> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_send_buffer_size(4 << 20)
            .handshake(socket)
            .await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                eprintln!("connection: {error}");
            }
        });
        Ok(Self { requests: requests.ready().await?, authority: address.to_owned() })
    }

    async fn call(&self, method: &str) -> Result<(h2::client::ResponseFuture, SendStream<Bytes>), AnyError> {
        let uri = format!("http://{}/arrow.flight.protocol.FlightService/{method}", self.authority);
        let request = Request::post(uri).header("content-type", "application/grpc").header("te", "trailers").body(())?;
        let mut requests = self.requests.clone().ready().await?;
        Ok(requests.send_request(request, false)?)
    }

    /// Opens an upload: sends its first message.
    pub(crate) async fn put(&self, first: &FlightData) -> Result<(Upload, Answers), AnyError> {
        let (response, stream) = self.call("DoPut").await?;
        let mut upload = Upload { stream };
        upload.send_bytes(framed(first)).await?;
        Ok((upload, Answers { response: Some(response), body: None, buffered: BytesMut::new() }))
    }

    /// Runs an action; the payload of its answer.
    pub(crate) async fn action(&self, name: &str, body: &Value) -> Result<Value, AnyError> {
        let (response, mut request) = self.call("DoAction").await?;
        let action = arrow_flight::Action { r#type: name.to_owned(), body: body.to_string().into() };
        request.send_data(framed(&action), true)?;
        let mut body = opened(response.await?)?;
        let mut buffered = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            buffered.put(data);
        }
        ended(&mut body).await?;
        let result = arrow_flight::Result::decode(take_message(&mut buffered).ok_or("no answer")?)?;
        let envelope: Value = serde_json::from_slice(&result.body)?;
        Ok(envelope["response"].clone())
    }

    /// Reads a ticket to its end; returns the bytes of all messages.
    pub(crate) async fn get(&self, ticket: &[u8]) -> Result<u64, AnyError> {
        let (response, mut request) = self.call("DoGet").await?;
        request.send_data(framed(&arrow_flight::Ticket { ticket: ticket.to_vec().into() }), true)?;
        let mut body = opened(response.await?)?;
        let mut bytes = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            bytes += data.len() as u64;
            body.flow_control().release_capacity(data.len())?;
        }
        ended(&mut body).await?;
        Ok(bytes)
    }
}

/// A message with its gRPC header.
fn framed(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(GRPC_HEADER_BYTES + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    match message.encode(&mut bytes) {
        Ok(()) => bytes.freeze(),
        Err(_) => unreachable!("a BytesMut grows"),
    }
}

/// The sending side of a DoPut.
pub(crate) struct Upload {
    stream: SendStream<Bytes>,
}

impl Upload {
    /// Sends a prepared message whose rows begin at a time.
    pub(crate) async fn send(&mut self, message: &Prepared, first_time: i64) -> Result<(), AnyError> {
        let (head, rest) = message.at(first_time);
        self.send_bytes(head).await?;
        self.send_bytes(rest).await
    }

    async fn send_bytes(&mut self, mut bytes: Bytes) -> Result<(), AnyError> {
        while bytes.has_remaining() {
            let piece = bytes.len().min(PIECE_BYTES);
            self.stream.reserve_capacity(piece);
            while self.stream.capacity() == 0 {
                poll_fn(|cx| self.stream.poll_capacity(cx)).await.ok_or("the server closed the upload")??;
            }
            let granted = self.stream.capacity();
            self.stream.send_data(bytes.split_to(granted.min(bytes.len())), false)?;
        }
        Ok(())
    }

    /// Ends the stream cleanly.
    pub(crate) fn finish(&mut self) -> Result<(), AnyError> {
        Ok(self.stream.send_data(Bytes::new(), true)?)
    }
}

/// The answers of a DoPut.
pub(crate) struct Answers {
    response: Option<h2::client::ResponseFuture>,
    body: Option<RecvStream>,
    buffered: BytesMut,
}

impl Answers {
    /// The next watermark, in batches; `None`: everything is durable and the call ended well.
    pub(crate) async fn next(&mut self) -> Result<Option<u64>, AnyError> {
        if let Some(response) = self.response.take() {
            self.body = Some(opened(response.await?)?);
        }
        let body = self.body.as_mut().ok_or("no answer")?;
        loop {
            if let Some(payload) = take_message(&mut self.buffered) {
                let result = PutResult::decode(payload)?;
                let told: Value = serde_json::from_slice(&result.app_metadata)?;
                return Ok(Some(told["batches"].as_u64().unwrap_or(0)));
            }
            match body.data().await {
                Some(data) => {
                    let data = data?;
                    body.flow_control().release_capacity(data.len())?;
                    self.buffered.put(data);
                }
                None => {
                    ended(body).await?;
                    return Ok(None);
                }
            }
        }
    }
}

/// A whole message, without its gRPC header.
fn take_message(buffered: &mut BytesMut) -> Option<Bytes> {
    let length: [u8; 4] = buffered.get(1..GRPC_HEADER_BYTES)?.try_into().ok()?;
    let length = u32::from_be_bytes(length) as usize;
    if buffered.len() < GRPC_HEADER_BYTES + length {
        return None;
    }
    buffered.advance(GRPC_HEADER_BYTES);
    Some(buffered.split_to(length).freeze())
}

fn opened(response: Response<RecvStream>) -> Result<RecvStream, AnyError> {
    match response.headers().get("grpc-status") {
        Some(status) if status != "0" => Err(refusal(response.headers())),
        _ => Ok(response.into_body()),
    }
}

async fn ended(body: &mut RecvStream) -> Result<(), AnyError> {
    match body.trailers().await? {
        Some(trailers) if trailers.get("grpc-status").is_none_or(|status| status != "0") => Err(refusal(&trailers)),
        _ => Ok(()),
    }
}

fn refusal(headers: &http::HeaderMap) -> AnyError {
    let text = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap_or("")).to_owned();
    format!("status {}: {}", text("grpc-status"), text("grpc-message")).into()
}
