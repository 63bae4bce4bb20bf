//! What comes from outside, or from a disk that rotted, put through everything that reads it: the fuzz
//! targets, and a bounded run of them in every test run.
//!
//! Guarantees that are checked: no input makes any of it panic, hang, or ask for memory beyond its bound. The
//! bound on memory is checked by the fuzz binaries, whose allocator counts (`fuzz/`).

use crate::flight::assemble::Assembler;
use crate::flight::columns;
use crate::flight::decode::{Decoded, Decoder, schema};
use crate::flight::dialect::Connection;
use crate::flight::get::Ticket;
use crate::flight::hollow::Hollow;
use crate::flight::{actions, list, put};
use crate::ingest::admit::Budget;
use crate::lifecycle::Locator;
use crate::query::parse;
use crate::query::pattern::Meaning;
use arrow::array::{
    ArrayRef, DictionaryArray, Int64Array, ListArray, RecordBatch, StringArray, StructArray, new_null_array,
};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, Float64Type, Int8Type, Schema};
use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_flight::FlightDescriptor;
use bytes::Bytes;
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;
use storage::catalog::records::{
    BlockMark, DamageRecord, DeletionRecord, KeyRecord, NotificationRecord, PartialRecord, SegmentRecord,
    SequenceRecord, SessionRecord, TopicOntology, TopicRecord, TopicTotals, unpack,
};
use storage::catalog::skip::SkipBlock;
use storage::chunk::ChunkRecord;
use storage::chunk::hash::batch_hash;
use storage::chunk::record::SkipRecord;
use storage::manifest::Manifest;
use storage::ontology::OntologyRecord;
use storage::schema::TopicSchema;
use storage::segment::{Head, Trailer, footer_is_whole};
use storage::tail::TailRun;

/// Memory of one input's batches, as `batch_memory_max` would bound it, in bytes.
const BATCH_MEMORY_MAX: u64 = 16 << 20;

/// A target and what it reads.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its corpus and of its binary.
    pub name: &'static str,
    /// Reads one input.
    pub read: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target { name: "put", read: put },
    Target { name: "action", read: action },
    Target { name: "query", read: query },
    Target { name: "ticket", read: ticket },
    Target { name: "catalog", read: catalog },
    Target { name: "segment", read: segment },
];

/// The same bytes as one protobuf message that comes in pieces.
fn assemble(data: &[u8]) {
    const PIECES: usize = 7;
    let mut assembler = Assembler::new(data.len(), false, None);
    for piece in data.chunks(data.len() / PIECES + 1) {
        if assembler.add(piece).is_err() {
            return;
        }
    }
    assembler.finish().ok(); // Refused or not: it is read.
}

/// A message without what nobody will read, as [`Assembler`] makes it of large ones: header and body.
fn hollow(schema: &Schema, header: &Bytes, body: &Bytes) -> Option<Result<(Bytes, Buffer), tonic::Status>> {
    const PIECES: usize = 3;
    let mut hollow = Hollow::of(schema, header, body.len(), 0)?;
    let mut smaller = Vec::with_capacity(hollow.bytes());
    for piece in body.chunks(body.len() / PIECES + 1) {
        if let Err(error) = hollow.pass(piece, |kept| smaller.extend_from_slice(kept)) {
            return Some(Err(error));
        }
    }
    smaller.resize(hollow.bytes(), 0);
    Some(Ok((hollow.header, Buffer::from_vec(smaller))))
}

/// Messages of a DoPut: a descriptor's command, then header and body of each message, each behind its length
/// as four bytes (little-endian; what is longer than the rest is the rest).
fn put(data: &[u8]) {
    assemble(data);
    let mut rest = data;
    let mut part = || -> Bytes {
        let Some((length, after)) = rest.split_first_chunk::<4>() else {
            return Bytes::copy_from_slice(std::mem::take(&mut rest));
        };
        let length = (u32::from_le_bytes(*length) as usize).min(after.len());
        let (part, after) = after.split_at(length);
        rest = after;
        Bytes::copy_from_slice(part)
    };
    let descriptor = FlightDescriptor::new_cmd(part()).into();
    put::target(&descriptor, &Connection::default()).ok(); // Refused or not: it is read.
    let Ok(wire) = schema(&part()) else { return };
    let Ok(checked) = TopicSchema::check(wire) else { return };
    let budget = Budget::new(4 * BATCH_MEMORY_MAX);
    let mut decoder = Decoder::new(Arc::clone(&checked.wire), BATCH_MEMORY_MAX, budget.clone()).sharing_all();
    let mut by_arrow =
        Decoder::new(Arc::clone(&checked.wire), BATCH_MEMORY_MAX, Budget::new(4 * BATCH_MEMORY_MAX)).by_arrow();
    // Sixteen messages show what a stream's state can do.
    for _ in 0..16 {
        let (header, body) = (part(), part());
        if header.is_empty() {
            break;
        }
        let Some(permit) = budget.receive.try_claim(body.len() as u64) else { return };
        let smaller = hollow(&checked.wire, &header, &body);
        let sent = body.len();
        let body = Buffer::from(body);
        if columns::knows(&checked.wire) {
            let Some(permit) = budget.receive.try_claim(sent as u64) else { return };
            let expected = futures::executor::block_on(by_arrow.decode(&header, body.clone(), sent, permit));
            // Without its permits: the next message of the stream may want them.
            let rows = |decoded| match decoded {
                Ok(Decoded::Batch(rows, ..)) => Some(rows),
                Ok(Decoded::Dictionary) | Err(_) => None,
            };
            let expected = rows(expected);
            let Some(permit) = budget.receive.try_claim(sent as u64) else { return };
            let found = rows(futures::executor::block_on(decoder.decode(&header, body.clone(), sent, permit)));
            assert_eq!(expected, found, "what arrow-ipc makes of it");
            assert_eq!(expected.as_ref().map(batch_hash), found.as_ref().map(batch_hash), "and its hash");
        }
        let decoded = futures::executor::block_on(decoder.decode(&header, body, sent, permit));
        if let (Some(smaller), Ok(Decoded::Batch(whole, ..))) = (smaller, &decoded) {
            let Ok((header, body)) = smaller else { panic!("refused, though its rows are whole") };
            let Some(permit) = budget.receive.try_claim(body.len() as u64) else { return };
            let smaller = futures::executor::block_on(decoder.decode(&header, body, sent, permit));
            let Ok(Decoded::Batch(smaller, ..)) = smaller else { panic!("not decoded, though its rows are whole") };
            assert_eq!(whole, &smaller, "the same rows");
            assert_eq!(batch_hash(whole), batch_hash(&smaller), "the same batch");
        }
        match decoded {
            Ok(Decoded::Batch(rows, decode_permit, permit)) => {
                put::check_batch(&checked, &rows, permit, decode_permit, Instant::now()).ok(); // As above.
            }
            Ok(Decoded::Dictionary) => {}
            Err(_) => return,
        }
    }
}

/// The name of an action up to the first line break, then its body.
fn action(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let name = String::from_utf8_lossy(data.get(..end).unwrap_or(&[]));
    actions::read_all(&name, data.get(end + 1..).unwrap_or(&[])).ok(); // Refused or not: it is read.
}

fn query(data: &[u8]) {
    let Ok(Value::Object(body)) = serde_json::from_slice(data) else { return };
    for meaning in [Meaning::Substring, Meaning::Glob] {
        parse::query(&body, meaning).ok(); // Refused or not: it is read.
    }
    parse::ontology(&Value::Object(body)).ok(); // As above.
}

fn ticket(data: &[u8]) {
    Ticket::decode(data).ok(); // Refused or not: it is read.
    let text = String::from_utf8_lossy(data);
    Locator::topic("ticket", &text).ok(); // As above.
    let connection = Connection::default();
    list::request(&connection, &FlightDescriptor::new_cmd(data.to_vec())).ok(); // As above.
    list::request(&connection, &FlightDescriptor::new_path(vec![text.into_owned()])).ok(); // As above.
}

/// A value of the catalog, as any of its records.
fn catalog(data: &[u8]) {
    fn read<T: serde::de::DeserializeOwned>(data: &[u8]) {
        unpack::<T>("value", data).ok(); // Refused or not: it is read.
    }
    read::<SequenceRecord>(data);
    read::<SessionRecord>(data);
    read::<TopicRecord>(data);
    read::<TopicTotals>(data);
    read::<TopicOntology>(data);
    read::<PartialRecord>(data);
    read::<SegmentRecord>(data);
    read::<ChunkRecord>(data);
    read::<SkipRecord>(data);
    read::<Vec<BlockMark>>(data);
    read::<NotificationRecord>(data);
    read::<DamageRecord>(data);
    read::<DeletionRecord>(data);
    read::<KeyRecord>(data);
    read::<OntologyRecord>(data);
    if let Ok(block) = SkipBlock::unpack(data) {
        (0..block.chunks()).for_each(|index| drop(block.get(index)));
    }
    if let Ok(run) = unpack::<TailRun>("tail", data) {
        let schema = TopicSchema::derive(Arc::new(sample(0).schema().as_ref().clone()));
        if let Ok(schema) = schema {
            run.unpack(&schema.stored).ok(); // As above.
        }
    }
}

/// What a segment file or a manifest may have at its start or its end.
fn segment(data: &[u8]) {
    Head::decode(data);
    Manifest::decode(data);
    Trailer::decode(data);
    footer_is_whole(data);
    // With checksums that fit, so that what is behind them is reached: trailers and heads of any body.
    let crc = crc_of(data).to_le_bytes();
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes();
    for magic in [b"FBXTRLR1", b"FBXTRLR2"] {
        Trailer::decode(&[data, &length, &crc, magic].concat());
    }
    Head::decode(&[b"PAR1", &length[..], &crc, b"FBXHEAD1", data, &[0; 4096]].concat());
    Manifest::decode(&[b"FBXMNFT1", &crc[..], data].concat());
}

fn crc_of(data: &[u8]) -> u32 {
    storage::segment::checksum(data)
}

/// The same columns with nothing but nulls.
fn nulls(rows: usize) -> RecordBatch {
    let sample = sample(rows);
    let schema = sample.schema();
    let columns = sample.columns().iter().zip(schema.fields()).map(|(column, field)| {
        let column = if field.is_nullable() { new_null_array(field.data_type(), rows) } else { Arc::clone(column) };
        (field.name().clone(), column, field.is_nullable())
    });
    match RecordBatch::try_from_iter_with_nullable(columns) {
        Ok(batch) => batch,
        Err(error) => unreachable!("columns of one length: {error}"),
    }
}

/// A batch with the types that have shapes of their own.
fn sample(rows: usize) -> RecordBatch {
    let times: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
    let texts: ArrayRef = Arc::new(StringArray::from_iter((0..rows).map(|row| (row % 3 > 0).then(|| "x".repeat(row)))));
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(
        (0..rows).map(|row| Some((0..row % 4).map(|value| Some(value as f64)))),
    ));
    let words: ArrayRef = Arc::new(DictionaryArray::<Int8Type>::from_iter((0..rows).map(|row| ["a", "b"][row % 2])));
    let inner: ArrayRef = Arc::new(Int64Array::from_iter((0..rows).map(|row| (row % 2 > 0).then_some(1))));
    let inside = StructArray::from(vec![(Arc::new(Field::new("x", DataType::Int64, true)), inner)]);
    let inside: ArrayRef = Arc::new(inside);
    let columns = vec![times, texts, lists, words, inside];
    let names = ["timestamp_ns", "text", "list", "word", "inside"];
    let fields: Vec<Field> = names
        .into_iter()
        .zip(&columns)
        .map(|(name, column)| Field::new(name, column.data_type().clone(), name != "timestamp_ns"))
        .collect();
    match RecordBatch::try_new(Arc::new(Schema::new(fields)), columns) {
        Ok(batch) => batch,
        Err(error) => unreachable!("the columns are made for these fields: {error}"),
    }
}

/// Inputs to begin with: what clients of all generations sent (`tests/captures`), and what this program
/// writes itself.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let captures = [
        include_str!("../../tests/captures/sdk-v0.jsonl"),
        include_str!("../../tests/captures/sdk-0.3.2.jsonl"),
        include_str!("../../tests/captures/sdk-0.5.0.jsonl"),
        include_str!("../../tests/captures/sdk-0.7.0.jsonl"),
    ];
    let calls: Vec<Value> =
        captures.iter().flat_map(|text| text.lines()).filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = |call: &Value, pointer: &str| call.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    match target {
        "put" => {
            let commands = calls.iter().filter_map(|call| text(call, "/descriptor/cmd"));
            commands.take(4).flat_map(|command| put_seeds(&command)).collect()
        }
        "action" => calls
            .iter()
            .filter_map(|call| Some(format!("{}\n{}", text(call, "/action")?, text(call, "/body")?).into_bytes()))
            .collect(),
        "query" => calls
            .iter()
            .filter(|call| text(call, "/action").is_some_and(|action| action == "query"))
            .filter_map(|call| text(call, "/body").map(String::into_bytes))
            .chain([
                br#"{"ontology": {"$or": [{"IMU.acceleration.x": {"$between": [1, 2.5]}}, {"$not": {"GPS.position": {"$within": [45.4, 9.1, 45.5, 9.3]}}}]}, "limit": 3}"#.to_vec(),
                br#"{"sequence": {"name": {"$match": "drive*"}, "user_metadata": {"run": {"$in": [1, 2, "x"]}}}, "intervals": true, "join_dt_ns": 5}"#.to_vec(),
            ])
            .collect(),
        "ticket" => calls
            .iter()
            .flat_map(|call| [text(call, "/ticket"), text(call, "/descriptor/cmd")])
            .flatten()
            .map(String::into_bytes)
            .chain([br#"{"topic": "5fad6339-6e75-4890-aaf8-91660732b997", "start": -5, "end": null}"#.to_vec()])
            .collect(),
        "catalog" | "segment" => own_seeds(),
        _ => Vec::new(),
    }
}

/// A stream of a schema, its dictionaries and batches, plain and compressed; and one of columns of nothing but nulls.
fn put_seeds(command: &str) -> Vec<Vec<u8>> {
    let (some, nulls) = (sample(20), nulls(300));
    let (lz4, zstd) = (arrow::ipc::CompressionType::LZ4_FRAME, arrow::ipc::CompressionType::ZSTD);
    [(&some, None), (&some, Some(lz4)), (&some, Some(zstd)), (&nulls, None)]
        .into_iter()
        .filter_map(|(batch, compression)| {
            let options = IpcWriteOptions::default().try_with_compression(compression).ok()?;
            let mut dictionaries = DictionaryTracker::new(false);
            let generator = IpcDataGenerator::default();
            let head = generator.schema_to_bytes_with_dictionary_tracker(&batch.schema(), &mut dictionaries, &options);
            let (words, rows) =
                generator.encode(batch, &mut dictionaries, &options, &mut IpcWriteContext::default()).ok()?;
            let mut out = Vec::new();
            let mut part = |bytes: &[u8]| {
                out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
                out.extend_from_slice(bytes);
            };
            part(command.as_bytes());
            part(&head.ipc_message);
            for message in words.iter().chain([&rows]) {
                part(&message.ipc_message);
                part(&message.arrow_data);
            }
            Some(out)
        })
        .collect()
}

/// Values of the catalog and parts of files.
fn own_seeds() -> Vec<Vec<u8>> {
    use storage::catalog::records::pack;
    use storage::chunk::BatchMark;
    use storage::chunk::stats::{Bounds, FieldStats};
    use storage::ids::{SegmentId, SequenceId, SessionId, TopicId, TopicNo};
    let id = uuid::Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
    let topic = TopicRecord {
        no: TopicNo(7),
        id: TopicId(id),
        sequence: SequenceId(id),
        session: SessionId(id),
        locator: "drive/imu".to_owned(),
        ontology_tag: "IMU".to_owned(),
        format: storage::chunk::Format::Default,
        user_metadata: "{\"a\": 1}".to_owned(),
        created_at_ns: 1,
        completed_at_ns: Some(2),
    };
    let fields: Vec<FieldStats> = [
        Bounds::None,
        Bounds::Int(-5, 5),
        Bounds::Float(-0.5, 1e300),
        Bounds::Unsigned(1, u64::MAX),
        Bounds::text("a", "b"),
        Bounds::Values(vec!["x".into(), "y".into()]),
    ]
    .into_iter()
    .map(|bounds| FieldStats { values: 9, nulls: 1, nans: 0, bounds })
    .collect();
    let record = ChunkRecord {
        segment: 1,
        segment_id: SegmentId(id),
        epoch: 0,
        offset: 4096,
        length: 5000,
        padded_length: 8192,
        first_batch: 3,
        end_batch: 5,
        first_row: 30,
        end_row: 50,
        data_bytes: 4000,
        time: Some((1, 2)),
        time_sorted: true,
        columns: Vec::new(),
        crc: 1,
    };
    let marks = vec![BatchMark { rows: 10, hash: 5 }; 2];
    let stored = TopicSchema::derive(sample(5).schema()).and_then(|schema| schema.to_stored(&sample(5)));
    let tail = stored.and_then(|rows| TailRun::pack(&rows, 3, 30, marks.clone(), 100, Some((1, 2))));
    let trailer = Trailer {
        topic: topic.no,
        topic_id: topic.id,
        record: record.clone(),
        marks,
        fields: fields.clone(),
        upload: 9,
    };
    let totals = TopicTotals { chunks: 1, rows: 50, ..TopicTotals::default() };
    [
        pack(&topic),
        pack(&totals),
        pack(&record),
        pack(&SkipRecord { fields: fields.clone() }),
        SkipBlock::pack(&fields.iter().collect::<Vec<_>>()),
        SkipBlock::pack(&fields.iter().skip(1).take(1).collect::<Vec<_>>()),
        tail.and_then(|tail| pack(&tail)),
        pack(&trailer),
        trailer.encode(5000).map(|(_, bytes)| bytes),
    ]
    .into_iter()
    .filter_map(Result::ok)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::sim::Random;

    /// Changed copies of each seed and of each kept input.
    const COPIES: u64 = 400;

    /// Every kept input of a target: found by fuzzing, or a regression.
    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let entries = storage::files::list(&dir).expect("listed");
        entries.into_iter().map(|entry| std::fs::read(entry.path).expect("readable")).collect()
    }

    /// Flips, cuts, repeats and joins: a copy that is wrong in few places.
    fn changed(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len().max(1) as u64) as usize;
            match random.below(6) {
                0 => bytes.truncate(at),
                1 => bytes
                    .extend_from_slice(other.get(random.below(other.len().max(1) as u64) as usize..).unwrap_or(&[])),
                2 => drop(bytes.splice(at..at, random.bits().to_le_bytes())),
                3 if at + 4 <= bytes.len() => bytes[at..at + 4].fill(if random.below(2) == 0 { 0xff } else { 0 }),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << random.below(8);
                    }
                }
            }
        }
        bytes
    }

    #[track_caller]
    fn check(name: &str) {
        let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
        let mut inputs = seeds(name);
        assert!(!inputs.is_empty(), "{name} has no seeds");
        inputs.extend(corpus(name));
        let mut random = Random::new(1);
        for index in 0..inputs.len() {
            (target.read)(&inputs[index]);
            for _ in 0..COPIES {
                let other = random.below(inputs.len() as u64) as usize;
                (target.read)(&changed(&inputs[index], &inputs[other], &mut random));
            }
        }
    }

    #[test]
    fn inv_9_no_put_stream_makes_it_panic() {
        check("put");
    }

    #[test]
    fn inv_9_no_action_body_makes_it_panic() {
        check("action");
    }

    #[test]
    fn inv_9_no_query_makes_it_panic() {
        check("query");
    }

    #[test]
    fn inv_9_no_ticket_or_descriptor_makes_it_panic() {
        check("ticket");
    }

    #[test]
    fn inv_9_no_value_of_a_catalog_makes_it_panic() {
        check("catalog");
    }

    #[test]
    fn inv_9_no_head_trailer_or_manifest_makes_it_panic() {
        check("segment");
    }

    #[test]
    fn what_clients_sent_is_understood() {
        for seed in seeds("action") {
            let end = seed.iter().position(|byte| *byte == b'\n').expect("a name");
            assert!(serde_json::from_slice::<Value>(&seed[end + 1..]).is_ok());
        }
        assert!(put_seeds("{}").len() == 4, "plain, LZ4, ZSTD, and nulls");
    }
}
