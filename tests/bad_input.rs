//! Bad input: each gets the right code and a clear text, and loses nothing else.

use crate::harness::{
    Client, Server, action, blob_batch, blob_schema, check_refused, create_sequence, create_topic, encode, get,
    last_watermark, put, put_descriptor, raw_action, run, times,
};
use arrow::array::{Array, ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Fields, IntervalUnit, Schema, UnionFields, UnionMode};
use arrow_flight::{FlightData, FlightDescriptor};
use futures::{StreamExt, stream};
use serde_json::json;
use std::sync::Arc;
use tonic::{Code, Status};

/// A server with one open v0 sequence `s`.
async fn open() -> (Server, Client, String) {
    let server = Server::start(&["message_bytes_max=4MiB", "batch_memory_max=8MiB", "chunk_bytes=256KiB"]);
    let mut client = server.client().await;
    let key = create_sequence(&mut client, "s").await;
    (server, client, key)
}

/// The messages of a small good upload.
async fn messages(descriptor: FlightDescriptor) -> Vec<FlightData> {
    encode(descriptor, blob_schema(), stream::iter([blob_batch(0, 10, 10), blob_batch(10, 10, 10)])).collect().await
}

async fn put_messages(client: &mut Client, messages: Vec<FlightData>) -> Result<(), Status> {
    last_watermark(client.do_put(stream::iter(messages)).await?.into_inner()).await.map(|_| ())
}

/// The topic is still open and takes a good upload: nothing was lost with the bad one.
async fn check_still_good(client: &mut Client, name: &str, key: &str) {
    put(client, name, key, vec![blob_batch(0, 10, 10)]).await.expect("a good upload after a bad one");
    assert_eq!(times(&get(client, name.to_owned()).await.expect("get")), (0..10).collect::<Vec<_>>());
}

#[test]
fn actions_refuse_what_is_unknown_broken_missing_or_of_the_wrong_type() {
    run(async {
        let (_server, mut client, _) = open().await;
        let client = &mut client;
        check_refused(
            action(client, "explode", json!({})).await,
            Code::InvalidArgument,
            &["explode", "sequence_create"],
        );
        check_refused(
            raw_action(client, "sequence_create", b"{\"name\":".to_vec()).await,
            Code::InvalidArgument,
            &["not JSON"],
        );
        check_refused(
            raw_action(client, "sequence_create", b"[1]".to_vec()).await,
            Code::InvalidArgument,
            &["a list", "object"],
        );
        check_refused(action(client, "sequence_create", json!({})).await, Code::InvalidArgument, &["`locator`"]);
        check_refused(
            action(client, "sequence_create", json!({ "name": 7 })).await,
            Code::InvalidArgument,
            &["`name`", "a number"],
        );
        let metadata = action(client, "sequence_create", json!({ "name": "m", "user_metadata": [1] })).await;
        check_refused(metadata, Code::InvalidArgument, &["user_metadata", "a list"]);
        let query = json!({ "sequence": { "nmae": { "$eq": "x" } } });
        check_refused(action(client, "query", query).await, Code::InvalidArgument, &["sequence.nmae"]);
    });
}

#[test]
fn unsafe_empty_and_overlong_names_are_refused() {
    run(async {
        let (_server, mut client, key) = open().await;
        for name in ["", "..", ".", "a\u{0}b", "a\u{7}b", "a//b", "x/y", &"n".repeat(256)] {
            let created = action(&mut client, "sequence_create", json!({ "name": name, "user_metadata": {} })).await;
            check_refused(created, Code::InvalidArgument, &["name"]);
        }
        let topic = |name: &str| json!({ "sequence_key": key, "name": name, "serialization_format": "default", "ontology_tag": "t", "user_metadata": {} });
        for name in ["s/../x", "s//x", "s/", "s/a\u{1}"] {
            check_refused(action(&mut client, "topic_create", topic(name)).await, Code::InvalidArgument, &["name"]);
        }
        let outside = action(&mut client, "topic_create", topic("s2/x")).await;
        check_refused(outside, Code::PermissionDenied, &["s2/x", "`s`"]);
        let tag =
            json!({ "sequence_key": key, "name": "s/t", "serialization_format": "default", "ontology_tag": "a.b" });
        check_refused(action(&mut client, "topic_create", tag).await, Code::InvalidArgument, &["ontology_tag", "a.b"]);
        let format = json!({ "sequence_key": key, "name": "s/t", "serialization_format": "JPEG", "ontology_tag": "t" });
        check_refused(action(&mut client, "topic_create", format).await, Code::InvalidArgument, &["JPEG", "ragged"]);
    });
}

#[test]
fn inv_8_malformed_unknown_and_foreign_keys_open_nothing() {
    run(async {
        let (_server, mut client, key) = open().await;
        let other = create_sequence(&mut client, "other").await;
        let foreign = create_topic(&mut client, &other, "other/t", "default").await;
        let own = create_topic(&mut client, &key, "s/t", "default").await;
        let unknown = uuid::Uuid::new_v4().to_string();
        let cases = [
            ("not-a-uuid", Code::InvalidArgument, "not-a-uuid"),
            (unknown.as_str(), Code::PermissionDenied, "s/t"),
            (foreign.as_str(), Code::PermissionDenied, "s/t"),
        ];
        for (bad, code, names) in cases {
            check_refused(put(&mut client, "s/t", bad, vec![blob_batch(0, 1, 1)]).await, code, &[names]);
        }
        for (bad, code) in
            [("nope", Code::InvalidArgument), (&other, Code::PermissionDenied), (&unknown, Code::PermissionDenied)]
        {
            for call in ["sequence_finalize", "sequence_abort"] {
                check_refused(action(&mut client, call, json!({ "name": "s", "key": bad })).await, code, &[bad]);
            }
        }
        let missing = put(&mut client, "s/absent", &own, vec![blob_batch(0, 1, 1)]).await;
        check_refused(missing, Code::NotFound, &["s/absent"]);
        check_still_good(&mut client, "s/t", &own).await;
    });
}

#[test]
fn a_doput_without_a_proper_beginning_is_refused() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let good = messages(put_descriptor("s/t", &topic)).await;

        let path = messages(FlightDescriptor::new_path(vec!["s/t".to_owned()])).await;
        check_refused(put_messages(&mut client, path).await, Code::InvalidArgument, &["CMD", "PATH"]);

        let mut without = good.clone();
        without[0].flight_descriptor = None;
        check_refused(put_messages(&mut client, without).await, Code::InvalidArgument, &["descriptor"]);

        check_refused(put_messages(&mut client, vec![]).await, Code::InvalidArgument, &["schema"]);

        let mut schemaless = vec![good[1].clone()];
        schemaless[0].flight_descriptor = good[0].flight_descriptor.clone();
        check_refused(put_messages(&mut client, schemaless).await, Code::InvalidArgument, &["schema"]);

        let twice = vec![good[0].clone(), good[0].clone()];
        check_refused(put_messages(&mut client, twice).await, Code::InvalidArgument, &["second schema"]);

        let broken = messages(FlightDescriptor::new_cmd("{")).await;
        check_refused(put_messages(&mut client, broken).await, Code::InvalidArgument, &["not JSON"]);
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

#[test]
fn schemas_that_cannot_be_stored_are_refused_naming_the_field() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let time = || Field::new("timestamp_ns", DataType::Int64, false);
        let union =
            DataType::Union(UnionFields::from_fields(vec![Field::new("a", DataType::Int8, true)]), UnionMode::Dense);
        let runs = DataType::RunEndEncoded(
            Arc::new(Field::new("run_ends", DataType::Int32, false)),
            Arc::new(Field::new("values", DataType::Int8, true)),
        );
        let month = DataType::Interval(IntervalUnit::MonthDayNano);
        let cases = [
            (vec![Field::new("x", DataType::Int8, true)], "timestamp_ns"),
            (vec![Field::new("timestamp_ns", DataType::Float64, true)], "timestamp_ns"),
            (vec![time(), Field::new("choice", union, true)], "choice"),
            (vec![time(), Field::new("runs", runs, true)], "runs"),
            (
                vec![
                    time(),
                    Field::new("outer", DataType::Struct(Fields::from(vec![Field::new("span", month, true)])), true),
                ],
                "outer.span",
            ),
        ];
        for (fields, names) in cases {
            let schema = Arc::new(Schema::new(fields));
            let sent: Vec<FlightData> = encode(put_descriptor("s/t", &topic), schema, stream::empty()).collect().await;
            check_refused(put_messages(&mut client, sent).await, Code::InvalidArgument, &[names]);
        }
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

#[test]
fn null_times_are_refused() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let schema = Arc::new(Schema::new(vec![Field::new("timestamp_ns", DataType::Int64, true)]));
        let column: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
        let batch = RecordBatch::try_new(schema, vec![column]).expect("batch");
        check_refused(
            put(&mut client, "s/t", &topic, vec![batch]).await,
            Code::InvalidArgument,
            &["timestamp_ns", "1 nulls"],
        );
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

/// Overwrites every occurrence of a little-endian i64 in an IPC header.
fn lie(header: &[u8], truth: i64, lie: i64) -> Vec<u8> {
    let mut out = header.to_vec();
    let truth = truth.to_le_bytes();
    let mut found = false;
    for at in 0..out.len().saturating_sub(7) {
        if out[at..at + 8] == truth {
            out[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            found = true;
        }
    }
    assert!(found, "the header has the number to lie about");
    out
}

#[test]
fn truncated_and_lying_messages_are_refused_and_never_crash() {
    run(async {
        let (server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let good = messages(put_descriptor("s/t", &topic)).await;
        let with = |header: Vec<u8>, body: bytes::Bytes| {
            let bad = FlightData { data_header: header.into(), data_body: body, ..FlightData::default() };
            vec![good[0].clone(), bad]
        };
        let header = good[1].data_header.to_vec();
        let body = good[1].data_body.clone();
        let cases = [
            with(header[..header.len() / 2].to_vec(), body.clone()),
            with(vec![0xff; 64], body.clone()),
            with(header.clone(), body.slice(..body.len() / 2)),
            with(header.clone(), bytes::Bytes::new()),
            with(lie(&header, 80, i64::MAX), body.clone()),
            with(lie(&header, 80, -80), body.clone()),
            with(lie(&header, 10, -1), body.clone()),
            with(lie(&header, 10, i64::MAX / 2), body.clone()),
        ];
        for (index, case) in cases.into_iter().enumerate() {
            let result = put_messages(&mut client, case).await;
            let status = result.expect_err(&format!("case {index} must be refused"));
            assert_eq!(status.code(), Code::InvalidArgument, "case {index}: {}", status.message());
        }
        // Every single byte of the header damaged in turn: refused or taken, never a crash.
        for at in 0..header.len() {
            let mut damaged = header.clone();
            damaged[at] ^= 0x55;
            put_messages(&mut client, with(damaged, body.clone())).await.ok();
        }
        let other = create_topic(&mut client, &key, "s/fresh", "default").await;
        check_still_good(&mut client, "s/fresh", &other).await;
        drop(server);
    });
}

#[test]
fn a_message_over_the_limit_is_refused_naming_the_limit() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "image").await;
        let result = put(&mut client, "s/t", &topic, vec![blob_batch(0, 1, 5 << 20)]).await;
        check_refused(result, Code::ResourceExhausted, &["4194304", "message_bytes_max"]);
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

#[test]
fn an_action_over_the_limit_of_requests_is_refused_naming_it() {
    run(async {
        let (_server, mut client, _key) = open().await;
        let result = raw_action(&mut client, "sequence_create", vec![b' '; 6 << 20]).await;
        check_refused(result, Code::ResourceExhausted, &["6291", "5242880", "DoPut"]);
        action(&mut client, "version", json!({})).await.expect("an answer");
    });
}

#[test]
fn a_message_that_claims_2_to_the_40_uncompressed_bytes_is_refused() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let options = arrow::ipc::writer::IpcWriteOptions::default()
            .try_with_compression(Some(arrow::ipc::CompressionType::LZ4_FRAME))
            .expect("options");
        let mut sent: Vec<FlightData> = arrow_flight::encode::FlightDataEncoderBuilder::new()
            .with_options(options)
            .with_schema(blob_schema())
            .with_flight_descriptor(Some(put_descriptor("s/t", &topic)))
            .build(stream::iter([Ok(blob_batch(0, 1000, 100))]))
            .map(|message| message.expect("encodes"))
            .collect()
            .await;
        let mut body = sent[1].data_body.to_vec();
        let honest = i64::from_le_bytes(body[..8].try_into().expect("8 bytes"));
        assert_eq!(honest, 8000, "the first buffer is the times");
        body[..8].copy_from_slice(&(1_i64 << 40).to_le_bytes());
        sent[1].data_body = body.into();
        check_refused(put_messages(&mut client, sent).await, Code::ResourceExhausted, &["1099511", "batch_memory_max"]);
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

#[test]
fn inv_12_a_cancelled_stream_and_a_cut_connection_leave_the_topic_unlocked_with_its_prefix() {
    run(async {
        let (server, mut client, key) = open().await;
        for (index, how) in
            [Cut::BetweenMessages, Cut::InsideMessage, Cut::InsideHeader, Cut::Connection, Cut::EndInsideMessage]
                .into_iter()
                .enumerate()
        {
            let name = format!("s/cut{index}");
            let topic = create_topic(&mut client, &key, &name, "default").await;
            let sent = messages(put_descriptor(&name, &topic)).await;
            cut_upload(server.address, &sent, how).await;
            let rows = wait_for_rows(&mut client, &name).await;
            assert_eq!(rows, (0..10).collect::<Vec<_>>(), "{how:?}");
            let state = action(&mut client, "topic_system_info", json!({ "name": name })).await.expect("system info");
            assert_eq!(state["is_locked"], false, "{how:?}");
        }
        let finalize = action(&mut client, "sequence_finalize", json!({ "name": "s", "key": key })).await;
        check_refused(finalize, Code::FailedPrecondition, &["s/cut0", "10 rows"]);
    });
}

/// Ten thousand fields, and a thousand levels: neither costs the server more than the message.
#[test]
fn absurd_schemas_are_refused_naming_the_limit() {
    run(async {
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let time = Field::new("timestamp_ns", DataType::Int64, false);
        let wide = (0..10_000).map(|number| Field::new(format!("f{number}"), DataType::Int8, true));
        let wide = Schema::new(std::iter::once(time.clone()).chain(wide).collect::<Vec<_>>());
        let nest = |levels: usize| {
            (0..levels)
                .fold(DataType::Int8, |inner, _| DataType::Struct(Fields::from(vec![Field::new("x", inner, true)])))
        };
        let deep = |levels| Schema::new(vec![time.clone(), Field::new("deep", nest(levels), true)]);
        for (schema, names) in [(wide, "4096 leaf columns"), (deep(100), "depth limit"), (deep(1000), "depth limit")] {
            let sent: Vec<FlightData> =
                encode(put_descriptor("s/t", &topic), Arc::new(schema), stream::empty()).collect().await;
            check_refused(put_messages(&mut client, sent).await, Code::InvalidArgument, &[names]);
        }
        check_still_good(&mut client, "s/t", &topic).await;
    });
}

/// A stream that sends a part of a message and then nothing holds memory: it loses it, and its stream.
#[test]
fn a_message_that_makes_no_progress_loses_its_stream_and_leaves_its_prefix() {
    run(async {
        let server = Server::start(&["upload_stall=1s"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "s").await;
        let topic = create_topic(&mut client, &key, "s/slow", "default").await;
        let sent = messages(put_descriptor("s/slow", &topic)).await;
        let RawUpload { mut stream, mut body, connection } = RawUpload::begin(server.address, &sent).await;
        let next = frame(&sent[2]);
        stream.send_data(next[..next.len() / 2].to_vec().into(), false).expect("half a message");
        let told = tokio::time::timeout(std::time::Duration::from_secs(20), body.trailers()).await.expect("an end");
        let told = told.expect("trailers").expect("trailers");
        let text = told["grpc-message"].to_str().expect("text");
        assert!(text.contains("upload_stall"), "{text}");
        assert_eq!(wait_for_rows(&mut client, "s/slow").await, (0..10).collect::<Vec<_>>());
        let held = crate::harness::info(&mut client).await["memory"]["held"].as_u64().expect("bytes");
        assert_eq!(held, 0, "the message's memory is still held");
        connection.abort();
    });
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    BetweenMessages,
    InsideMessage,
    InsideHeader,
    Connection,
    EndInsideMessage,
}

/// A DoPut by hand.
struct RawUpload {
    stream: h2::SendStream<bytes::Bytes>,
    body: h2::RecvStream,
    connection: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

impl RawUpload {
    /// Sends the schema and one batch, and waits until that is durable.
    async fn begin(address: std::net::SocketAddr, sent: &[FlightData]) -> Self {
        let socket = tokio::net::TcpStream::connect(address).await.expect("connect");
        let (mut sender, connection) = h2::client::handshake(socket).await.expect("handshake");
        let connection = tokio::spawn(connection);
        let request = http::Request::post(format!("http://{address}/arrow.flight.protocol.FlightService/DoPut"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        let (response, mut stream) = sender.send_request(request, false).expect("sent");
        stream.send_data(frame(&sent[0]).into(), false).expect("schema");
        stream.send_data(frame(&sent[1]).into(), false).expect("a batch");
        // The answer's headers come once the topic is open; then its watermark says the batch is durable.
        let mut body = response.await.expect("headers").into_body();
        body.data().await.expect("a watermark").expect("data");
        Self { stream, body, connection }
    }
}

/// A raw HTTP/2 client: sends the schema and one batch, then half of what follows, then cuts.
async fn cut_upload(address: std::net::SocketAddr, sent: &[FlightData], how: Cut) {
    let RawUpload { mut stream, body: _body, connection } = RawUpload::begin(address, sent).await;
    let next = frame(&sent[2]);
    match how {
        Cut::BetweenMessages => stream.send_reset(h2::Reason::CANCEL),
        Cut::InsideMessage => {
            stream.send_data(next[..next.len() / 2].to_vec().into(), false).expect("half a message");
            tokio::time::sleep(std::time::Duration::from_millis(30)).await;
            stream.send_reset(h2::Reason::CANCEL);
        }
        Cut::InsideHeader => {
            stream.send_data(next[..3].to_vec().into(), false).expect("half a header");
            tokio::time::sleep(std::time::Duration::from_millis(30)).await;
            stream.send_reset(h2::Reason::CANCEL);
        }
        Cut::Connection => {}
        Cut::EndInsideMessage => {
            stream.send_data(next[..next.len() / 2].to_vec().into(), true).expect("half a message, END_STREAM")
        }
    }
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    connection.abort();
}

/// One message with gRPC's 5-byte header.
fn frame(message: &FlightData) -> Vec<u8> {
    use prost::Message;
    let body = message.encode_to_vec();
    let mut out = vec![0];
    out.extend_from_slice(&u32::try_from(body.len()).expect("small").to_be_bytes());
    out.extend_from_slice(&body);
    out
}

async fn wait_for_rows(client: &mut Client, name: &str) -> Vec<i64> {
    for _ in 0..100 {
        // Busy no more: its DoPut has ended on the server as well.
        let state = get(client, name.to_owned()).await;
        if let Ok(rows) = state
            && !rows.is_empty()
        {
            return times(&rows);
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    Vec::new()
}

#[test]
fn a_session_topic_that_is_still_written_cannot_be_read_by_its_ticket() {
    run(async {
        let (_server, mut client, _) = open().await;
        action(&mut client, "sequence_create", json!({ "locator": "live", "user_metadata": {} }))
            .await
            .expect("create");
        let session = action(&mut client, "session_create", json!({ "locator": "live" })).await.expect("session");
        let body = json!({ "session_uuid": session["uuid"], "locator": "live/t", "serialization_format": "default",
            "ontology_tag": "t", "user_metadata": {} });
        action(&mut client, "topic_create", body).await.expect("topic");
        let descriptor = FlightDescriptor::new_cmd(json!({ "resource_locator": "live/t" }).to_string());
        let found = client.get_flight_info(descriptor).await.expect("info").into_inner();
        let ticket = found.endpoint[0].ticket.clone().expect("a ticket").ticket;
        check_refused(get(&mut client, ticket).await, Code::FailedPrecondition, &["live/t"]);
        let empty = FlightDescriptor::new_cmd(
            json!({ "resource_locator": "live/t", "timestamp_ns_start": 5, "timestamp_ns_end": 5 }).to_string(),
        );
        check_refused(client.get_flight_info(empty).await, Code::InvalidArgument, &["timestamp_ns_start"]);
    });
}

#[test]
fn dictionary_batches_are_taken_and_their_values_kept() {
    run(async {
        use arrow::array::{AsArray, DictionaryArray};
        use arrow::datatypes::Int8Type;
        let (_server, mut client, key) = open().await;
        let topic = create_topic(&mut client, &key, "s/t", "default").await;
        let states: DictionaryArray<Int8Type> = vec!["a", "b", "a"].into_iter().collect();
        let schema = Arc::new(Schema::new(vec![
            Field::new("timestamp_ns", DataType::Int64, false),
            Field::new("state", states.data_type().clone(), false),
        ]));
        let batch = RecordBatch::try_new(
            Arc::clone(&schema),
            vec![Arc::new(Int64Array::from(vec![1, 2, 3])), Arc::new(states)],
        )
        .expect("batch");
        let sent = arrow_flight::encode::FlightDataEncoderBuilder::new()
            .with_schema(schema)
            .with_dictionary_handling(arrow_flight::encode::DictionaryHandling::Resend)
            .with_flight_descriptor(Some(put_descriptor("s/t", &topic)))
            .build(stream::iter([Ok(batch)]))
            .map(|message| message.expect("encodes"))
            .collect()
            .await;
        put_messages(&mut client, sent).await.expect("dictionaries");
        let rows = get(&mut client, "s/t").await.expect("get");
        let back = rows[0].column(1).as_any_dictionary();
        assert_eq!(back.keys().len(), 3);
        assert!(matches!(rows[0].schema().field(1).data_type(), DataType::Dictionary(_, _)));
    });
}
