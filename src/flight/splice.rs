//! The bodies of DoGet's messages, past protobuf.
//!
//! Guarantees: the peer gets the messages to the letter that protobuf would make of them; a body's bytes are not copied
//! between its encoded batch and HTTP/2, but for small ones; no more than one message is in memory for it. Tonic has
//! messages without bodies, and keeps their order; each gets its own back here, as its last field. (Uploads do the same
//! the other way round: [`crate::flight::upload`].) Answers that are compressed cannot pass: none is.

use crate::flight::upload::HEADER_BYTES;
use arrow_flight::FlightData;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{self, Stream};
use http_body::Frame;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tonic::Status;
use tonic::body::Body;

/// The field of a message's body (`Flight.proto`, `FlightData.data_body`). No field has a higher number, so none
/// comes behind it.
const DATA_BODY: u32 = 1000;

/// Bodies below this many bytes are copied behind their head: a frame of their own would cost more.
const SMALL_BODY_BYTES: usize = 4 << 10;

/// Bodies of one answer's messages, in order; an empty one of a message that has none.
#[derive(Debug, Clone, Default)]
pub(super) struct Bodies {
    queue: Arc<Mutex<VecDeque<Bytes>>>,
}

impl Bodies {
    /// The messages without their bodies. The next is not made before this one's body has left: tonic would gather a
    /// hundred of such small ones. It hands on what it has where none is ready, and asks again when that has been sent.
    pub(super) fn take_out<S>(&self, mut messages: S) -> impl Stream<Item = Result<FlightData, Status>> + use<S>
    where
        S: Stream<Item = Result<FlightData, Status>> + Unpin,
    {
        let bodies = self.clone();
        stream::poll_fn(move |cx| {
            if !bodies.queue().is_empty() {
                // Or nobody would ever ask again.
                let is_spliced = Arc::strong_count(&bodies.queue) > 1;
                let lost = || Poll::Ready(Some(Err(Status::internal("an answer lost its bodies"))));
                return if is_spliced { Poll::Pending } else { lost() };
            }
            Pin::new(&mut messages).poll_next(cx).map_ok(|message| bodies.keep(message))
        })
    }

    fn keep(&self, mut message: FlightData) -> FlightData {
        self.queue().push_back(std::mem::take(&mut message.data_body));
        message
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Bytes>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives an answer's messages their bodies back, if they were taken out.
pub(super) fn splice(extensions: &mut http::Extensions, body: Body) -> Body {
    match extensions.remove::<Bodies>() {
        Some(bodies) => Body::new(Spliced { inner: body, bodies, messages: Bytes::new(), body: None }),
        None => body,
    }
}

struct Spliced {
    inner: Body,
    bodies: Bodies,
    /// Whole messages of tonic's that are still to be sent.
    messages: Bytes,
    /// What follows the head that was sent last.
    body: Option<Bytes>,
}

impl Spliced {
    /// Takes the next message; returns it up to its body.
    fn head(&mut self) -> Option<Bytes> {
        let [compressed, length @ ..] = *self.messages.first_chunk::<HEADER_BYTES>()?;
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
        if compressed != 0 || self.messages.len() < HEADER_BYTES + length {
            return None;
        }
        let message = self.messages.split_to(HEADER_BYTES + length);
        let body = self.bodies.queue().pop_front()?;
        if body.is_empty() {
            return Some(message);
        }
        let field = key_len(DATA_BODY) + encoded_len_varint(body.len() as u64);
        let behind = if body.len() < SMALL_BODY_BYTES { body.len() } else { 0 };
        let mut head = BytesMut::with_capacity(message.len() + field + behind);
        head.put_u8(compressed);
        head.put_u32(u32::try_from(length + field + body.len()).ok()?);
        head.extend_from_slice(message.get(HEADER_BYTES..)?);
        encode_key(DATA_BODY, WireType::LengthDelimited, &mut head);
        encode_varint(body.len() as u64, &mut head);
        if behind == 0 {
            self.body = Some(body);
        } else {
            head.extend_from_slice(&body);
        }
        Some(head.freeze())
    }
}

impl http_body::Body for Spliced {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(body) = this.body.take() {
                return Poll::Ready(Some(Ok(Frame::data(body))));
            }
            if !this.messages.is_empty() {
                let head = this.head().ok_or_else(|| Status::internal("an answer's message and its body do not fit"));
                return Poll::Ready(Some(head.map(Frame::data)));
            }
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(messages) => this.messages = messages,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none() && self.messages.is_empty() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use futures::executor::block_on;
    use http::HeaderMap;
    use prost::Message;
    use std::future::poll_fn;
    use std::time::Duration;
    use tonic::codec::{EncodeBody, EncodeBuf, Encoder, SingleMessageCompressionOverride};

    /// What tonic makes: whole messages, some to a frame, and trailers.
    struct Frames(VecDeque<Frame<Bytes>>);

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    fn prefixed(message: &FlightData) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        [&[0][..], &u32::try_from(bytes.len()).expect("short").to_be_bytes(), &bytes].concat()
    }

    fn spliced(frames: Vec<Frame<Bytes>>, bodies: Bodies) -> Body {
        let mut extensions = http::Extensions::new();
        extensions.insert(bodies);
        splice(&mut extensions, Body::new(Frames(frames.into())))
    }

    fn next(body: &mut Body) -> Option<Result<Frame<Bytes>, Status>> {
        block_on(poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut *body), cx)))
    }

    #[test]
    fn the_peer_gets_the_messages_that_protobuf_makes_and_the_bodies_uncopied() {
        let sizes = [0, 1, 127, 128, SMALL_BODY_BYTES, 300_000, 0, 20_000_000];
        let all: Vec<FlightData> = (0..)
            .zip(sizes)
            .map(|(number, size)| {
                FlightData::new().with_data_header(vec![number; 50]).with_data_body(vec![number; size])
            })
            .collect();
        let bodies = Bodies::default();
        let emptied: Vec<Vec<u8>> = all.iter().map(|message| prefixed(&bodies.keep(message.clone()))).collect();
        let mut frames: Vec<Frame<Bytes>> = emptied.chunks(3).map(|some| Frame::data(some.concat().into())).collect();
        frames.push(Frame::trailers(HeaderMap::new()));
        let mut body = spliced(frames, bodies);
        let (mut sent, mut uncopied) = (Vec::new(), 0);
        let trailers = loop {
            match next(&mut body).expect("more").expect("a frame").into_data() {
                Ok(data) => {
                    uncopied += all.iter().filter(|message| message.data_body.as_ptr() == data.as_ptr()).count();
                    sent.extend_from_slice(&data);
                }
                Err(trailers) => break trailers,
            }
        };
        assert!(trailers.is_trailers() && next(&mut body).is_none());
        assert!(sent == all.iter().flat_map(prefixed).collect::<Vec<_>>(), "not what protobuf makes");
        assert_eq!(uncopied, sizes.iter().filter(|size| **size >= SMALL_BODY_BYTES).count());
    }

    #[test]
    fn a_message_that_is_cut_or_has_no_body_kept_for_it_is_an_error() {
        let message = FlightData::new().with_data_header(vec![1; 50]);
        let whole = prefixed(&message);
        let kept = Bodies::default();
        kept.keep(message);
        for (frame, bodies) in [(&whole[..whole.len() - 1], kept), (&whole[..], Bodies::default())] {
            let mut body = spliced(vec![Frame::data(Bytes::copy_from_slice(frame))], bodies);
            assert_eq!(next(&mut body).expect("an end").expect_err("refused").code(), tonic::Code::Internal);
        }
    }

    #[test]
    fn the_next_message_is_not_made_before_this_one_s_body_has_left() {
        let message = || FlightData::new().with_data_header(vec![1; 50]).with_data_body(vec![2; 100]);
        let bodies = Bodies::default();
        let mut emptied = Box::pin(bodies.take_out(stream::iter([Ok(message()), Ok(message())])));
        let mut next = || block_on(poll_fn(|cx| Poll::Ready(emptied.as_mut().poll_next(cx))));
        let Poll::Ready(Some(Ok(first))) = next() else { panic!("a message") };
        assert!(first.data_body.is_empty() && first.data_header.len() == 50);
        assert!(next().is_pending());
        assert_eq!(bodies.queue().pop_front().expect("its body"), message().data_body);
        assert!(next().is_ready());
        drop(bodies);
        let Poll::Ready(Some(Err(lost))) = next() else { panic!("nobody gives the bodies back") };
        assert_eq!(lost.code(), tonic::Code::Internal);
    }

    /// As tonic's generated service has it.
    struct Prost;

    impl Encoder for Prost {
        type Item = FlightData;
        type Error = Status;

        fn encode(&mut self, item: FlightData, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
            item.encode(into).map_err(|error| Status::internal(error.to_string()))
        }
    }

    #[tokio::test]
    async fn tonic_hands_on_each_message_before_the_next_is_made_however_they_come_and_end() {
        let message = |number: u8, body: usize, header: usize| {
            FlightData::new().with_data_header(vec![number; header]).with_data_body(vec![number; body])
        };
        // Small and large ones, one with more beside its body than tonic gathers; some come late; an error ends them.
        let all = [message(1, 0, 50), message(2, 100, 50), message(3, 5_000_000, 50), message(4, 9000, 90_000)];
        let expected: Vec<u8> = all.iter().flat_map(prefixed).collect();
        let slowly = async |(number, message): (usize, FlightData)| {
            for _ in 0..number % 3 {
                tokio::task::yield_now().await;
            }
            message
        };
        let messages = stream::iter(all.into_iter().enumerate()).then(slowly).map(Ok);
        let messages = messages.chain(stream::iter([Err(Status::data_loss("the last chunk"))])).boxed();
        let bodies = Bodies::default();
        let encoded = EncodeBody::new_server(
            Prost,
            bodies.take_out(messages).boxed(),
            None,
            SingleMessageCompressionOverride::default(),
            None,
        );
        let mut extensions = http::Extensions::new();
        extensions.insert(bodies);
        let mut body = splice(&mut extensions, Body::new(encoded));
        let mut sent = Vec::new();
        let trailers = loop {
            let frame = poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut body), cx));
            let frame = tokio::time::timeout(Duration::from_secs(10), frame).await.expect("it goes on");
            match frame.expect("more").expect("a frame").into_data() {
                Ok(data) => sent.extend_from_slice(&data),
                Err(frame) => break frame.into_trailers().expect("trailers"),
            }
        };
        assert!(sent == expected, "not what protobuf makes");
        assert_eq!(Status::from_header_map(&trailers).expect("a status").code(), tonic::Code::DataLoss);
    }

    #[test]
    fn an_answer_that_kept_its_bodies_goes_as_it_is() {
        let text = Bytes::from_static(b"any bytes");
        let mut body = splice(&mut http::Extensions::new(), Body::new(Frames([Frame::data(text.clone())].into())));
        assert_eq!(next(&mut body).expect("one").expect("a frame").into_data().expect("data"), text);
    }
}
