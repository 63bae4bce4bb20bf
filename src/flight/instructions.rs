//! What the hot functions cost in instructions: a number that does not depend on how busy a machine is.
//!
//! Each runs once under callgrind, in this same test binary, and is held against what it took when it was last
//! looked at. Counts are of the profile that tests are built with: they are not PERF.md's, but what makes one grow
//! makes the other grow.

use crate::flight::assemble::Assembler;
use crate::flight::decode::{Decoded, Decoder, schema};
use crate::flight::put::check_batch;
use crate::ingest::admit::Budget;
use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, Float32Array, Float64Array, Int64Array, ListArray, RecordBatch, UInt32Array,
};
use arrow::buffer::{Buffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field};
use arrow_flight::FlightData;
use arrow_flight::encode::FlightDataEncoderBuilder;
use bytes::Bytes;
use futures::{StreamExt, executor, stream};
use prost::Message;
use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use storage::checksum::Running;
use storage::chunk::hash::batch_hash;
use storage::chunk::{Compression, TopicEncoder, stats};
use storage::schema::TopicSchema;

/// Instructions for each thousand bytes of values that a function may take, for `row` for each message: a fifth above
/// what it took; twice where the processor decides which instructions there are (copies, CRC, XXH3).
const LIMITS: [(&str, u64); 7] = [
    ("frame", 3100),
    ("decode", 50),
    ("hash", 4300),
    ("statistics", 5500),
    ("encode", 36),
    ("checksum", 1900),
    ("row", 17_000),
];

/// Messages of one row, as slow topics send them, that are counted together.
const MESSAGES: u64 = 200;

const ROWS: usize = 20_000;
const POINTS: usize = 100_000;
/// As HTTP/2 frames come.
const FRAME_BYTES: usize = 64 << 10;

/// A row of points and nothing else, and many rows of numbers: the two shapes of bulk.
fn batches() -> [RecordBatch; 2] {
    let item = Arc::new(Field::new("item", DataType::Float32, false));
    let points = Float32Array::from_iter_values((0..POINTS).map(|at| at as f32 / 7.0));
    let points: ArrayRef = Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([POINTS]), Arc::new(points), None));
    let time: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let times: ArrayRef = Arc::new(Int64Array::from_iter_values(0..ROWS as i64));
    let numbers: ArrayRef = Arc::new(Float64Array::from_iter_values((0..ROWS).map(|row| row as f64 / 3.0)));
    let of = |columns: [(&str, ArrayRef); 2]| RecordBatch::try_from_iter(columns).expect("a batch");
    [of([("timestamp_ns", time), ("points", points)]), of([("timestamp_ns", times), ("x", numbers)])]
}

/// A row of a bus.
fn row() -> RecordBatch {
    let payload = FixedSizeBinaryArray::try_from_iter([[1_u8, 2, 3, 4, 5, 6, 7, 8]].into_iter()).expect("a payload");
    let columns: [(&str, ArrayRef); 3] = [
        ("timestamp_ns", Arc::new(Int64Array::from(vec![1]))),
        ("id", Arc::new(UInt32Array::from(vec![0x1A3]))),
        ("data", Arc::new(payload)),
    ];
    RecordBatch::try_from_iter(columns).expect("a row")
}

fn bytes(batches: &[RecordBatch]) -> u64 {
    batches.iter().map(storage::chunk::data_bytes).sum()
}

/// Schema and batch as messages.
fn messages(batch: &RecordBatch) -> [FlightData; 2] {
    let encoded = FlightDataEncoderBuilder::new()
        .with_max_flight_data_size(usize::MAX)
        .build(stream::iter([Ok(batch.clone())]))
        .map(|message| message.expect("a message"));
    executor::block_on(encoded.collect::<Vec<_>>()).try_into().expect("schema and batch")
}

/// What callgrind counts: everything below these functions, and nothing beside them.
mod hot {
    use super::*;

    #[inline(never)]
    pub(super) fn frame(message: &[u8]) {
        let mut assembler = Assembler::new(message.len(), true, None);
        message.chunks(FRAME_BYTES).for_each(|frame| assembler.add(frame).expect("FlightData"));
        black_box(assembler.finish().expect("FlightData"));
    }

    #[inline(never)]
    pub(super) fn decode(decoder: &mut Decoder, header: &Bytes, body: Buffer, budget: &Budget) {
        let permit = budget.receive.try_claim(1).expect("room");
        let sent = body.len();
        let decoded = executor::block_on(decoder.decode(header, body, sent, permit)).ok();
        assert!(matches!(black_box(decoded), Some(Decoded::Batch(..))), "a batch");
    }

    /// From the message's bytes to its checked batch.
    #[inline(never)]
    pub(super) fn row(decoder: &mut Decoder, schema: &TopicSchema, message: &[u8], budget: &Budget) {
        let permit = budget.receive.try_claim(message.len() as u64).expect("room");
        let mut assembler = Assembler::new(message.len(), false, Some(Arc::clone(&schema.wire)));
        assembler.add(message).expect("FlightData");
        let incoming = assembler.finish().expect("FlightData");
        let decoded = executor::block_on(decoder.decode(&incoming.header, incoming.body, incoming.sent, permit));
        let Ok(Decoded::Batch(rows, decode_permit, permit)) = decoded else { panic!("not a batch") };
        let batch = check_batch(schema, &rows, permit, decode_permit, Instant::now()).expect("a batch");
        black_box(batch);
    }

    #[inline(never)]
    pub(super) fn hash(batches: &[RecordBatch]) {
        batches.iter().for_each(|batch| {
            black_box(batch_hash(batch));
        });
    }

    #[inline(never)]
    pub(super) fn statistics(batches: &[RecordBatch]) {
        batches.iter().for_each(|batch| {
            black_box(stats::collect(&batch.schema(), &[], std::slice::from_ref(batch)));
        });
    }

    #[inline(never)]
    pub(super) fn encode(batch: &[RecordBatch], encoder: &TopicEncoder) {
        let mut chunk = encoder.begin(batch).expect("an encoder");
        let mut pieces = Vec::new();
        while chunk.step(&mut pieces).expect("pages") {
            black_box(&mut pieces).clear();
        }
    }

    #[inline(never)]
    pub(super) fn checksum(from: &[u8], into: &mut [u8]) {
        let mut crc = Running::from(0);
        crc.add_and_copy(from, into);
        black_box(crc.value());
    }
}

/// Runs one hot function.
fn run(name: &str) {
    let batches = batches();
    match name {
        "frame" => batches.iter().for_each(|batch| hot::frame(&messages(batch)[1].encode_to_vec())),
        "decode" => {
            let budget = Budget::new(64 << 20);
            for batch in &batches {
                let [first, message] = messages(batch);
                let wire = schema(&first.data_header).expect("a schema");
                let mut decoder = Decoder::new(wire, 64 << 20, budget.clone());
                let body = Buffer::from(message.data_body.to_vec());
                hot::decode(&mut decoder, &message.data_header, body, &budget);
            }
        }
        "row" => {
            let budget = Budget::new(64 << 20);
            let [first, message] = messages(&row());
            let schema = TopicSchema::derive(schema(&first.data_header).expect("a schema")).expect("storable");
            let mut decoder = Decoder::new(Arc::clone(&schema.wire), 64 << 20, budget.clone());
            let message = message.encode_to_vec();
            (0..MESSAGES).for_each(|_| hot::row(&mut decoder, &schema, &message, &budget));
        }
        "hash" => hot::hash(&batches),
        "statistics" => hot::statistics(&batches),
        "encode" => {
            for batch in &batches {
                let encoder = TopicEncoder::new(&batch.schema(), Compression::None).expect("an encoder");
                hot::encode(std::slice::from_ref(batch), &encoder);
            }
        }
        "checksum" => {
            let from = vec![7; usize::try_from(bytes(&batches)).expect("small")];
            hot::checksum(&from, &mut vec![0; from.len()]);
        }
        other => panic!("there is no hot function {other}"),
    }
}

/// Runs in the process that callgrind watches.
#[test]
#[ignore = "run by the test below, under callgrind"]
fn one_hot_function() {
    run(&std::env::var("HOT_FUNCTION").expect("which one"));
}

#[test]
fn hot_functions_take_no_more_instructions_than_they_did() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("skipped: valgrind is not installed (./x setup installs it)");
        return;
    }
    let mut slower = Vec::new();
    for (name, limit) in LIMITS {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
            .arg(format!("--toggle-collect=*instructions::hot::{name}*"))
            .arg(std::env::current_exe().expect("this binary"))
            .args(["--exact", "flight::instructions::one_hot_function", "--ignored", "--test-threads=1"])
            .env("HOT_FUNCTION", name)
            .output()
            .expect("valgrind runs");
        let text = String::from_utf8_lossy(&output.stderr);
        let counted = text.lines().find_map(|line| line.split("Collected :").nth(1)).map(str::trim);
        let counted: u64 = counted.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{name}: {text}"));
        let (each, what) = match name {
            "row" => (counted / MESSAGES, "message"),
            _ => (counted * 1000 / bytes(&batches()), "thousand bytes"),
        };
        eprintln!("{name}: {counted} instructions, {each} for each {what} (limit {limit})");
        assert!(counted > 1000, "{name} was not counted");
        if each > limit {
            slower.push(format!("{name} takes {each} instructions for each {what}, not {limit}"));
        }
    }
    assert!(slower.is_empty(), "{}", slower.join("; "));
}
