//! Questions over a large catalog: generated straight into it, without any bulk data.
//!
//! Half of the topics have the tag `Motion`, half `Place`; each chunk has its own range of `f0`, so that
//! one chunk in all answers a narrow question, and the index alone can say so.

use crate::report::{shell, write_folder};
use crate::server::{Client, Server, action, connect};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use storage::catalog::Catalog;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{
    SegmentRecord, SequenceRecord, SessionRecord, TopicOntology, TopicRecord, TopicTotals,
};
use storage::chunk::record::SkipRecord;
use storage::chunk::stats::{Bounds, FieldStats};
use storage::chunk::{ChunkRecord, ColumnRecord, Format};
use storage::ids::{SegmentId, SequenceId, SessionId, TopicId};
use storage::ontology::{Ontology, Origin};

const CHUNKS_PER_TOPIC: u64 = 1000;
const TOPICS_PER_SEQUENCE: u64 = 10;
const ROWS_PER_CHUNK: u64 = 1000;
const FIELDS: usize = 10;
const TAGS: [&str; 2] = ["Motion", "Place"];
/// Questions of each kind; the medians count.
const QUESTIONS: u64 = 21;

/// What one catalog size gave, in milliseconds and bytes.
#[derive(Debug, Default)]
struct Row {
    chunks: u64,
    one: f64,
    two: f64,
    nothing_ruled_out: f64,
    cold: f64,
    resident: u64,
    peak: u64,
    catalog_bytes: u64,
    explain: Value,
}

/// Measures several sizes, and writes the folder of the run.
pub(crate) fn run(program: &Path, scratch: &Path, out: &Path, sizes: &[u64]) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut rows = Vec::new();
    for chunks in sizes {
        let folder = tempfile::tempdir_in(scratch)?;
        let started = Instant::now();
        generate(folder.path(), *chunks)?;
        eprintln!("{chunks} chunks generated in {:.1} s", started.elapsed().as_secs_f64());
        let row = runtime.block_on(measure(program, folder.path(), *chunks))?;
        eprintln!("{row:?}");
        rows.push(row);
    }
    let mut csv =
        String::from("chunks,one_predicate_ms,two_tags_ms,nothing_ruled_out_ms,cold_ms,rss,peak_rss,catalog\n");
    let mut text = format!(
        "# query over a large catalog ({FIELDS} indexed fields, {CHUNKS_PER_TOPIC} chunks a topic, medians of {QUESTIONS})\n\n\
         | chunks | one predicate, one chunk matches | two tags | one predicate, every chunk matches | cold, one predicate | resident (peak) | catalog |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for row in &rows {
        let (rss, peak, catalog) = (row.resident >> 20, row.peak >> 20, row.catalog_bytes >> 20);
        writeln!(
            csv,
            "{},{:.2},{:.2},{:.2},{:.2},{},{},{}",
            row.chunks, row.one, row.two, row.nothing_ruled_out, row.cold, row.resident, row.peak, row.catalog_bytes
        )?;
        writeln!(
            text,
            "| {} | {:.1} ms | {:.1} ms | {:.1} ms | {:.1} ms | {rss} ({peak}) MiB | {catalog} MiB |",
            row.chunks, row.one, row.two, row.nothing_ruled_out, row.cold
        )?;
    }
    writeln!(
        text,
        "\nTimes are the client's, over one connection. Cold: server restarted, page cache dropped, first question."
    )?;
    if let Some(last) = rows.last() {
        writeln!(text, "What the narrow question at the largest size cost: `{}`", last.explain)?;
    }
    let explain = rows.last().map_or(Value::Null, |row| row.explain.clone());
    write_folder(out, "query", scratch, &text, &[("times.csv", csv), ("explain.json", explain.to_string())])
}

fn schema() -> SchemaRef {
    let mut fields = vec![Field::new("timestamp_ns", DataType::Int64, false)];
    fields.extend((0..FIELDS).map(|at| Field::new(format!("f{at}"), DataType::Float64, true)));
    Arc::new(Schema::new(fields))
}

/// The range of `f0` in a chunk: no two chunks share a value.
fn range(topic: u64, chunk: u64) -> (f64, f64) {
    let low = ((topic * CHUNKS_PER_TOPIC + chunk) * 10) as f64;
    (low, low + 9.0)
}

/// A catalog of finalized recordings with so many chunks, and no file.
pub(crate) fn generate(data: &Path, chunks: u64) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(data.join("catalog"))?;
    let catalog = Catalog::open(&data.join("catalog"), true)?;
    let schema = schema();
    let ontologies = TAGS.map(|tag| Ontology::new(tag, 1, Origin::Registered, 0, Arc::clone(&schema)));
    let [motion, place] = ontologies;
    let ontologies = [motion?, place?];
    let mut group = catalog.group()?;
    group.change(|txn| {
        for ontology in &ontologies {
            txn.put(Family::Ontologies, keys::ontology(&ontology.record.tag, 1), &ontology.record)?;
        }
        Ok::<_, storage::StorageError>(())
    })?;
    group.commit()?;
    let mut owner = None;
    for topic in 0..chunks / CHUNKS_PER_TOPIC {
        let mut group = catalog.group()?;
        if topic % TOPICS_PER_SEQUENCE == 0 {
            owner = Some(group.change(|txn| sequence(txn, topic / TOPICS_PER_SEQUENCE))?);
        }
        let (sequence, session, name) = owner.clone().ok_or("no sequence")?;
        let ontology = &ontologies[(topic % 2) as usize];
        group.change(|txn| {
            // Finalized and at rest: a start has nothing to look at.
            txn.delete(Family::Meta, keys::unsettled(sequence));
            one_topic(txn, topic, (sequence, session, &name), ontology, &schema)
        })?;
        group.commit()?;
    }
    Ok(())
}

type Txn<'a> = storage::catalog::Txn<'a>;
type Stored<T> = Result<T, storage::StorageError>;

fn sequence(txn: &mut Txn<'_>, index: u64) -> Stored<(SequenceId, SessionId, String)> {
    let (id, session, name) = (SequenceId::random(), SessionId::random(), format!("drive-{index:05}"));
    txn.put_sequence(&SequenceRecord {
        id,
        name: name.clone(),
        user_metadata: "{}".to_owned(),
        created_at_ns: 0,
        v0_session: None,
    })?;
    txn.put_session(&SessionRecord {
        id: session,
        locator: format!("{name}:1"),
        sequence: id,
        created_at_ns: 0,
        completed_at_ns: Some(1),
    })?;
    Ok((id, session, name))
}

fn one_topic(
    txn: &mut Txn<'_>,
    index: u64,
    (sequence, session, name): (SequenceId, SessionId, &str),
    ontology: &Ontology,
    schema: &SchemaRef,
) -> Stored<()> {
    let record = TopicRecord {
        no: txn.take_topic_no()?,
        id: TopicId::random(),
        sequence,
        session,
        locator: format!("{name}/topic{index}"),
        ontology_tag: ontology.record.tag.clone(),
        format: Format::Default,
        user_metadata: "{}".to_owned(),
        created_at_ns: 0,
        completed_at_ns: Some(1),
    };
    txn.put_topic(&record)?;
    txn.put_bytes(Family::Topics, keys::topic_schema(record.no), storage::schema::to_ipc(schema));
    txn.put(Family::Topics, keys::topic_ontology(record.no), &TopicOntology { version: 1, note: None })?;
    let segment_id = SegmentId::random();
    let mut skips = Vec::with_capacity(CHUNKS_PER_TOPIC as usize);
    for chunk in 0..CHUNKS_PER_TOPIC {
        let column = ColumnRecord {
            encoded_bytes: 8000,
            plain_bytes: 8000,
            values: ROWS_PER_CHUNK,
            encodings: 1,
            codec: 0,
            crc: chunk as u32,
        };
        let first = (chunk * ROWS_PER_CHUNK) as i64;
        let time = (first, first + ROWS_PER_CHUNK as i64 - 1);
        let chunk_record = ChunkRecord {
            segment: 0,
            segment_id,
            epoch: 0,
            offset: 4096 + chunk * 98_304,
            length: 88_000,
            padded_length: 98_304,
            first_batch: chunk,
            end_batch: chunk + 1,
            first_row: chunk * ROWS_PER_CHUNK,
            end_row: (chunk + 1) * ROWS_PER_CHUNK,
            data_bytes: 88_000,
            time: Some(time),
            time_sorted: true,
            crc: 0,
            columns: vec![column; FIELDS + 1],
        };
        txn.put(Family::Chunks, keys::chunk(record.no, chunk_record.first_row), &chunk_record)?;
        skips.push(statistics(index, chunk, time));
    }
    txn.put(
        Family::Segments,
        keys::segment(record.no, 0),
        &SegmentRecord { no: 0, id: segment_id, epoch: 0, end_offset: 4096, sealed_length: Some(4096) },
    )?;
    let totals = TopicTotals {
        chunks: CHUNKS_PER_TOPIC,
        rows: CHUNKS_PER_TOPIC * ROWS_PER_CHUNK,
        batches: CHUNKS_PER_TOPIC,
        data_bytes: CHUNKS_PER_TOPIC * 88_000,
        stored_bytes: CHUNKS_PER_TOPIC * 88_000,
        time: Some((0, (CHUNKS_PER_TOPIC * ROWS_PER_CHUNK) as i64 - 1)),
        chunk_batches: CHUNKS_PER_TOPIC,
        chunk_rows: CHUNKS_PER_TOPIC * ROWS_PER_CHUNK,
    };
    txn.put(Family::Topics, keys::topic_totals(record.no), &totals)?;
    txn.replace_index(&record, ontology, &skips)
}

/// `f0` tells the chunk; the other fields look like sensors: overlapping ranges, some nulls.
fn statistics(topic: u64, chunk: u64, time: (i64, i64)) -> SkipRecord {
    let stats = |nulls, bounds| FieldStats { values: ROWS_PER_CHUNK, nulls, nans: 0, bounds };
    let (low, high) = range(topic, chunk);
    let mut fields = vec![stats(0, Bounds::Int(time.0, time.1)), stats(0, Bounds::Float(low, high))];
    fields.extend((1..FIELDS as u64).map(|field| {
        let mixed = (topic * 31 + chunk * 17 + field * 7) % 1000;
        stats(mixed % 3, Bounds::Float(-(mixed as f64) / 7.0, mixed as f64 / 3.0))
    }));
    SkipRecord { fields }
}

async fn measure(program: &Path, data: &Path, chunks: u64) -> Result<Row, Box<dyn Error>> {
    let topics = chunks / CHUNKS_PER_TOPIC;
    let narrow = |tag: usize, topic: u64, chunk: u64| {
        let (low, high) = range(topic, chunk);
        (format!("{}.f0", TAGS[tag]), json!({ "$between": [low, high] }))
    };
    let one = |n: u64| {
        let topic = (n * 7919) % topics / 2 * 2;
        let (key, test) = narrow(0, topic, n * 37 % CHUNKS_PER_TOPIC);
        json!({ "ontology": { key: test }, "explain": true })
    };
    let two = |n: u64| {
        let topic = (n * 7919) % topics / 2 * 2;
        let (a, left) = narrow(0, topic, n * 37 % CHUNKS_PER_TOPIC);
        let (b, right) = narrow(1, topic + 1, n * 53 % CHUNKS_PER_TOPIC);
        json!({ "ontology": { a: left, b: right }, "explain": true })
    };
    let all = |_| json!({ "ontology": { "Motion.f0": { "$geq": 0 } }, "explain": true });

    let mut row = Row { chunks, ..Row::default() };
    {
        let server = Server::start(program, data, &[])?;
        let mut client = connect(&server.address).await?;
        row.one = median(&mut client, &one, 1).await?;
        row.two = median(&mut client, &two, 1).await?;
        row.nothing_ruled_out = median(&mut client, &all, topics / TOPICS_PER_SEQUENCE).await?;
        row.explain = action(&mut client, "query", one(3)).await?["explain"].clone();
        (row.resident, row.peak) = server.memory()?;
    }
    shell("sh", &["-c", "sync; echo 3 > /proc/sys/vm/drop_caches"]);
    let server = Server::start(program, data, &[])?;
    let mut client = connect(&server.address).await?;
    let started = Instant::now();
    action(&mut client, "query", one(5)).await?;
    row.cold = started.elapsed().as_secs_f64() * 1000.0;
    row.catalog_bytes = shell("du", &["-sb", &data.join("catalog").display().to_string()])
        .split_whitespace()
        .next()
        .and_then(|bytes| bytes.parse().ok())
        .unwrap_or(0);
    Ok(row)
}

/// Milliseconds of the median question; each must find what it must, and read nothing.
async fn median(client: &mut Client, question: &dyn Fn(u64) -> Value, found: u64) -> Result<f64, Box<dyn Error>> {
    let mut times = Vec::new();
    for n in 0..QUESTIONS {
        let started = Instant::now();
        let answer = action(client, "query", question(n)).await?;
        times.push(started.elapsed().as_secs_f64() * 1000.0);
        let items = answer["items"].as_array().map_or(0, Vec::len) as u64;
        if items != found || answer["explain"]["bytes_read"] != 0 {
            return Err(format!("{items} sequences, {found} expected: {}", answer["explain"]).into());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
