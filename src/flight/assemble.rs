//! One FlightData message, put together from HTTP/2 frames with a single copy: its body lands aligned, so that
//! Arrow can use it where it lies, and without what nobody will read ([`Hollow`]).
//!
//! Guarantees: nothing is allocated beyond the message's own length, which is admitted before; the work grows with
//! that length, whatever the message is made of; a message that is not FlightData is an error; fields in any order
//! are understood (a body that comes twice counts the last time, as protobuf has it), except for another header behind
//! a body of which a part was left out.
//!
//! Format: protobuf's encoding, Flight.proto: descriptor 1, header 2, app_metadata 3, body 1000.

use crate::flight::hollow::{HOLLOW_BYTES_MIN, Hollow, SAVED_PART_MIN};
use crate::flight::status::invalid;
use arrow::buffer::Buffer;
use arrow::datatypes::SchemaRef;
use arrow_flight::flight_descriptor::DescriptorType;
use arrow_flight::{FlightData, FlightDescriptor};
use bytes::Bytes;
use prost::Message;
use storage::past_cache;
use tonic::Status;

/// A FlightDescriptor without its path, which DoPut does not take: millions of empty parts would weigh twelve
/// times their bytes.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Descriptor {
    #[prost(enumeration = "DescriptorType", tag = "1")]
    pub(crate) r#type: i32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) cmd: Bytes,
}

impl From<FlightDescriptor> for Descriptor {
    fn from(descriptor: FlightDescriptor) -> Self {
        Self { r#type: descriptor.r#type, cmd: descriptor.cmd }
    }
}

/// What is used of a FlightData.
#[derive(Clone, PartialEq, Message)]
struct Fields {
    #[prost(message, tag = "1")]
    descriptor: Option<Descriptor>,
    #[prost(bytes = "bytes", tag = "2")]
    header: Bytes,
    #[prost(bytes = "bytes", tag = "1000")]
    body: Bytes,
}

/// What a message holds.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) descriptor: Option<Descriptor>,
    pub(crate) header: Bytes,
    pub(crate) body: Buffer,
    /// Bytes of the body that was sent: more than there are, if some were left out.
    pub(crate) sent: usize,
}

impl From<FlightData> for Incoming {
    fn from(message: FlightData) -> Self {
        Self {
            descriptor: message.flight_descriptor.map(Descriptor::from),
            header: message.data_header,
            sent: message.data_body.len(),
            body: Buffer::from(message.data_body),
        }
    }
}

const BODY_FIELD: u64 = 1000;
/// Smaller bodies are cached: decoding and hashing read them at once, in full.
const PAST_CACHE_BYTES_MIN: usize = 64 << 10;
/// Fields up to this many bytes grow by doubling; beyond it, room for the rest of the message is taken at once,
/// which is what was admitted.
const FIELDS_DOUBLE_MAX: usize = 64 << 10;

/// A message on its way.
#[derive(Debug)]
pub(crate) struct Assembler {
    /// Bytes still to come.
    left: usize,
    /// Whether the writer will find a body out of the caches anyway.
    is_cold: bool,
    /// Of the stream's batches, once it is known.
    schema: Option<SchemaRef>,
    /// Everything but the body.
    fields: Vec<u8>,
    /// How far `fields` holds whole fields.
    whole: usize,
    body: Option<Body>,
    /// Another body came behind the first; it lies among the fields.
    another: bool,
}

#[derive(Debug)]
struct Body {
    /// Allocated at once; allocators align to 16 bytes, which is all that Arrow's types ask for.
    bytes: Vec<u8>,
    /// Bytes of it still to come.
    left: usize,
    hollow: Option<Box<(Hollow, Sent)>>,
}

/// The body that a smaller one stands for.
#[derive(Debug)]
struct Sent {
    header: Bytes,
    length: usize,
}

/// What lies at the start of some bytes.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// A field that takes so many bytes.
    Field(usize),
    /// The body: so many bytes of key and length, so many of its own.
    Body(usize, usize),
    /// More bytes are needed to say.
    More,
}

impl Assembler {
    /// For a message of so many bytes, of a stream of this schema, if that is known. `is_cold`: it will wait so long
    /// that the writer does not find it in the caches.
    pub(crate) fn new(length: usize, is_cold: bool, schema: Option<SchemaRef>) -> Self {
        Self { left: length, is_cold, schema, fields: Vec::new(), whole: 0, body: None, another: false }
    }

    /// Bytes still to come.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Takes the next bytes of the message, at most what is [`Self::left`].
    pub(crate) fn add(&mut self, bytes: &[u8]) -> Result<(), Status> {
        self.left -= bytes.len();
        let bytes = self.fill_body(bytes)?;
        let bytes = self.take_whole(bytes)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let free = self.fields.capacity() - self.fields.len();
        if free < bytes.len() && FIELDS_DOUBLE_MAX < self.fields.len() {
            self.fields.reserve_exact(bytes.len() + self.left);
        }
        self.fields.extend_from_slice(bytes);
        while let Some(rest) = self.fields.get(self.whole..).filter(|rest| !rest.is_empty()) {
            match next_field(rest)? {
                Next::More => break,
                Next::Field(length) if length <= rest.len() => self.whole += length,
                Next::Field(length) => {
                    // All of it at once: to grow by doubling would take up to twice what was admitted.
                    let missing = length - rest.len();
                    self.fields.reserve_exact(missing.min(self.left));
                    break;
                }
                // Nobody sends it, and moving what is behind each of thousands would cost their square.
                Next::Body(key, length) if self.body.is_some() => {
                    self.another = true;
                    match key.saturating_add(length) {
                        length if length <= rest.len() => self.whole += length,
                        _ => break,
                    }
                }
                Next::Body(key, length) => {
                    let have = rest.len() - key;
                    if length > have.saturating_add(self.left) {
                        return Err(body_too_long(length));
                    }
                    let begun = self.fields.split_off(self.whole).split_off(key);
                    self.body = Some(self.begin_body(length));
                    let behind = self.fill_body(&begun)?;
                    self.fields.extend_from_slice(behind);
                }
            }
        }
        Ok(())
    }

    /// Takes the fields in front that are there as a whole, and what there is of the body; returns the rest. Small
    /// messages come in one piece: nothing of them is moved twice.
    fn take_whole<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Status> {
        if !self.fields.is_empty() || self.body.is_some() {
            return Ok(bytes);
        }
        let mut whole = 0;
        while let Some(rest) = bytes.get(whole..).filter(|rest| !rest.is_empty()) {
            match next_field(rest)? {
                Next::Field(length) if length <= rest.len() => whole += length,
                Next::Body(key, length) => {
                    if length > (rest.len() - key).saturating_add(self.left) {
                        return Err(body_too_long(length));
                    }
                    let (fields, rest) = bytes.split_at(whole);
                    self.fields.extend_from_slice(fields);
                    self.whole = whole;
                    self.body = Some(self.begin_body(length));
                    return self.fill_body(rest.get(key..).unwrap_or(&[]));
                }
                Next::Field(_) | Next::More => break,
            }
        }
        Ok(bytes)
    }

    /// A body of so many bytes, behind the whole fields that came so far.
    fn begin_body(&self, length: usize) -> Body {
        // Two copies of the header are made, in what is saved at least.
        let is_worth_it = HOLLOW_BYTES_MIN <= length && 2 * self.fields.len() <= length / SAVED_PART_MIN;
        let hollow = self.schema.as_ref().filter(|_| is_worth_it).and_then(|schema| {
            // What is no message is told when all of it is there.
            let header = Fields::decode(self.fields.as_slice()).ok()?.header;
            Some(Box::new((Hollow::of(schema, &header, length, HOLLOW_BYTES_MIN)?, Sent { header, length })))
        });
        let bytes = hollow.as_ref().map_or(length, |hollow| hollow.0.bytes());
        Body { bytes: Vec::with_capacity(bytes), left: length, hollow }
    }

    /// Copies what belongs to the body; returns the rest.
    fn fill_body<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Status> {
        let Some(Body { bytes: into, left, hollow }) = &mut self.body else {
            return Ok(bytes);
        };
        let (inside, behind) = bytes.split_at(bytes.len().min(*left));
        *left -= inside.len();
        let mut copy = |bytes: &[u8]| {
            if self.is_cold && PAST_CACHE_BYTES_MIN <= into.capacity() {
                past_cache::extend(into, bytes);
            } else {
                into.extend_from_slice(bytes);
            }
        };
        match hollow {
            Some(hollow) => hollow.0.pass(inside, copy)?,
            None => copy(inside),
        }
        Ok(behind)
    }

    /// The message, once nothing is left to come.
    pub(crate) fn finish(self) -> Result<Incoming, Status> {
        let fields = Fields::decode(Bytes::from(self.fields))
            .map_err(|error| invalid(format!("the message is not FlightData: {error}")))?;
        let (header, body, sent) = match self.body {
            Some(Body { mut bytes, hollow: Some(hollow), .. }) if !self.another => {
                let (hollow, sent) = *hollow;
                if sent.header != fields.header {
                    return Err(invalid("a message with another header behind its body; send one, before the body"));
                }
                bytes.resize(hollow.bytes(), 0);
                (hollow.header, Buffer::from_vec(bytes), sent.length)
            }
            Some(Body { bytes, hollow: None, .. }) if !self.another => {
                let sent = bytes.len();
                (fields.header, Buffer::from_vec(bytes), sent)
            }
            _ => {
                let sent = fields.body.len();
                (fields.header, Buffer::from(fields.body), sent)
            }
        };
        Ok(Incoming { descriptor: fields.descriptor, header, body, sent })
    }
}

fn body_too_long(length: usize) -> Status {
    invalid(format!("a body of {length} bytes in a message that ends before it"))
}

/// Finds out how far the first field goes.
fn next_field(bytes: &[u8]) -> Result<Next, Status> {
    let Some((key, key_bytes)) = varint(bytes)? else {
        return Ok(Next::More);
    };
    let behind = bytes.get(key_bytes..).unwrap_or(&[]);
    match key & 7 {
        0 => Ok(varint(behind)?.map_or(Next::More, |(_, length)| Next::Field(key_bytes + length))),
        1 => Ok(Next::Field(key_bytes + 8)),
        5 => Ok(Next::Field(key_bytes + 4)),
        2 => {
            let Some((length, length_bytes)) = varint(behind)? else {
                return Ok(Next::More);
            };
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let head = key_bytes + length_bytes;
            Ok(if key >> 3 == BODY_FIELD { Next::Body(head, length) } else { Next::Field(head.saturating_add(length)) })
        }
        other => Err(invalid(format!("the message is not FlightData: a field of wire type {other}"))),
    }
}

/// A number and the bytes it takes; `None` if it goes on behind these bytes.
fn varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, Status> {
    const VARINT_BYTES_MAX: usize = 10;
    let mut value = 0_u64;
    for (at, byte) in bytes.iter().take(VARINT_BYTES_MAX).enumerate() {
        value |= u64::from(byte & 0x7F).checked_shl(7 * at as u32).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    if bytes.len() >= VARINT_BYTES_MAX {
        return Err(invalid("the message is not FlightData: a number of more than ten bytes"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &'static [u8]) -> FlightData {
        FlightData {
            flight_descriptor: Some(FlightDescriptor::new_cmd("what")),
            data_header: Bytes::from_static(b"header"),
            app_metadata: Bytes::from_static(b"meta"),
            data_body: Bytes::from_static(body),
        }
    }

    fn assemble(bytes: &[u8], piece: usize) -> Result<Incoming, Status> {
        assemble_as(bytes, piece, false)
    }

    fn assemble_as(bytes: &[u8], piece: usize, is_cold: bool) -> Result<Incoming, Status> {
        let mut assembler = Assembler::new(bytes.len(), is_cold, None);
        for piece in bytes.chunks(piece) {
            assembler.add(piece)?;
        }
        assert_eq!(assembler.left(), 0);
        assembler.finish()
    }

    #[track_caller]
    fn check(bytes: &[u8]) {
        let expected = FlightData::decode(bytes).expect("protobuf");
        for piece in 1..=bytes.len() {
            let got = assemble(bytes, piece).expect("assembled");
            assert_eq!(got.descriptor, expected.flight_descriptor.clone().map(Descriptor::from));
            assert_eq!(got.header, expected.data_header);
            assert_eq!(got.body.as_slice(), &expected.data_body[..], "in pieces of {piece}");
        }
    }

    #[test]
    fn a_message_in_pieces_of_any_size_is_what_protobuf_says() {
        check(&message(b"some body bytes").encode_to_vec());
        check(&message(b"").encode_to_vec());
    }

    #[test]
    fn a_large_message_that_will_wait_is_the_same_one_to_the_byte() {
        let body: Vec<u8> = (0..PAST_CACHE_BYTES_MIN + 77).map(|at| (at * 7 % 251) as u8).collect();
        let large = FlightData { data_body: body.clone().into(), ..message(b"") };
        for piece in [777, 16 << 10, 65_537, usize::MAX] {
            let got = assemble_as(&large.encode_to_vec(), piece, true).expect("assembled");
            assert_eq!(got.body.as_slice(), body, "in pieces of {piece}");
        }
    }

    #[test]
    fn fields_behind_the_body_and_unknown_ones_are_understood() {
        let mut bytes = message(b"first").encode_to_vec();
        // Field 9 as varint, 10 as fixed64, 11 as fixed32.
        bytes.extend([0x48, 0x96, 0x01, 0x51, 1, 2, 3, 4, 5, 6, 7, 8, 0x5D, 1, 2, 3, 4]);
        let late = FlightData { data_header: Bytes::from_static(b"late"), ..FlightData::default() };
        bytes.extend(late.encode_to_vec());
        check(&bytes);
    }

    #[test]
    fn a_body_that_comes_twice_counts_the_last_time() {
        let mut bytes = message(b"first").encode_to_vec();
        bytes.extend(
            FlightData { data_body: Bytes::from_static(b"second one"), ..FlightData::default() }.encode_to_vec(),
        );
        check(&bytes);
    }

    #[test]
    fn a_hundred_thousand_bodies_are_read_once_each() {
        let empty = [0xC2, 0x3E, 0];
        let mut bytes = empty.repeat(100_000);
        bytes.extend(message(b"the last one").encode_to_vec());
        let mut assembler = Assembler::new(bytes.len(), false, None);
        assembler.add(&bytes).expect("FlightData");
        // Moved for each of them, they would be 15 GB by now.
        assert_eq!(assembler.finish().expect("FlightData").body.as_slice(), b"the last one");
    }

    #[test]
    fn inv_7_a_path_of_a_million_empty_parts_is_passed_over() {
        let path = [0x1A, 0].repeat(1_000_000);
        let mut bytes = vec![0x0A];
        varint_of(path.len(), &mut bytes);
        bytes.extend(path);
        let incoming = assemble(&bytes, 4096).expect("assembled");
        assert_eq!(incoming.descriptor, Some(Descriptor::default()));
    }

    fn varint_of(mut value: usize, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push((value & 0x7F) as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    #[test]
    fn the_body_lies_aligned_whatever_comes_before_it() {
        for length in 0..40 {
            let header = Bytes::from(vec![1; length]);
            let bytes = FlightData { data_header: header, ..message(&[7; 100]) }.encode_to_vec();
            let body = assemble(&bytes, 33).expect("assembled").body;
            assert!((body.as_ptr() as usize).is_multiple_of(16));
        }
    }

    #[test]
    fn what_is_not_a_message_is_an_error() {
        // A body longer than its message, a group, a number without end.
        for bytes in [&[0xC2, 0x3E, 0x50, 1][..], &[0x0B, 1], &[0xFF; 12]] {
            assert!(assemble(bytes, 3).is_err(), "{bytes:?}");
        }
    }
}
