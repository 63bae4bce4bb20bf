//! INV-7: memory stays within the sum that `info` states, whatever is sent; and one stalled stream
//! never stops another; and what finds no place is told so.

use crate::harness::{
    Client, Server, action, blob_batch, blob_schema, check_refused, create_sequence, create_topic, encode, info,
    last_watermark, put, put_descriptor, run,
};
use futures::{StreamExt, stream};
use serde_json::json;
use std::time::Duration;
use tonic::{Code, Status};

const SLACK_BYTES: u64 = 64 << 20;

async fn check_peak(server: &Server, client: &mut Client) {
    let bound = info(client).await["memory"]["bound"].as_u64().expect("a bound");
    let peak = server.peak_rss();
    assert!(peak <= bound + SLACK_BYTES, "peak RSS {} MiB, bound {} MiB", peak >> 20, bound >> 20);
    eprintln!("peak RSS {} MiB of a bound of {} MiB", peak >> 20, bound >> 20);
}

async fn upload(mut client: Client, key: String, name: String, batches: i64, rows: usize, bytes: usize) {
    let format = if rows > 1 { "image" } else { "default" };
    let topic = create_topic(&mut client, &key, &name, format).await;
    // One batch, sent again and again: making 8 GiB of data is not what is tested.
    let batch = blob_batch(0, rows, bytes);
    let schema = batch.schema();
    let batches_stream = stream::iter(0..batches).map(move |_| batch.clone());
    let results = client.do_put(encode(put_descriptor(&name, &topic), schema, batches_stream)).await.expect("put");
    let mark = last_watermark(results.into_inner()).await.expect("a clean end").expect("a watermark");
    assert_eq!(mark["batches"], batches);
    assert_eq!(mark["rows"], batches * rows as i64);
}

#[test]
fn inv_7_eight_gibibytes_in_45_mib_messages_pass_a_256_mib_budget() {
    run(async {
        let server =
            Server::start(&["memory_budget=256MiB", "touch_memory=128MiB", "streams_max=64", "read_cache=16MiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "big").await;
        let uploads: Vec<_> = (0..8)
            .map(|index| tokio::spawn(upload(client.clone(), key.clone(), format!("big/cam{index}"), 23, 45, 1 << 20)))
            .collect();
        for upload in uploads {
            upload.await.expect("an upload");
        }
        check_peak(&server, &mut client).await;
    });
}

#[test]
fn inv_7_eight_gibibytes_in_one_row_batches_of_300_streams_pass_a_64_mib_budget() {
    run(async {
        let server = Server::start(&["memory_budget=64MiB", "streams_max=400", "read_cache=16MiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "can").await;
        let uploads: Vec<_> = (0..300)
            .map(|index| tokio::spawn(upload(client.clone(), key.clone(), format!("can/t{index}"), 1400, 1, 20_000)))
            .collect();
        for upload in uploads {
            upload.await.expect("an upload");
        }
        action(&mut client, "sequence_finalize", json!({ "name": "can", "key": key })).await.expect("finalize");
        check_peak(&server, &mut client).await;
    });
}

#[test]
fn with_63_of_64_streams_held_by_an_exhausted_budget_an_action_and_a_slow_stream_still_move() {
    run(async {
        // Nothing that is received is let go before a minute has passed: 63 streams fill the budget.
        let server =
            Server::start(&["memory_budget=32MiB", "chunk_bytes=256MiB", "segment_bytes=1GiB", "upload_stall=60s"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "held").await;
        for index in 0..63 {
            let name = format!("held/s{index}");
            let topic = create_topic(&mut client, &key, &name, "image").await;
            let endless = stream::iter(0_i64..).map(|number| blob_batch(number, 1, 4 << 20));
            let messages = encode(put_descriptor(&name, &topic), blob_batch(0, 0, 0).schema(), endless);
            let mut client = client.clone();
            tokio::spawn(async move { client.do_put(messages).await });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let slow = async {
            let topic = create_topic(&mut client.clone(), &key, "held/slow", "default").await;
            put(&mut client.clone(), "held/slow", &topic, (0..20).map(|row| blob_batch(row, 1, 100)).collect()).await
        };
        let mark = tokio::time::timeout(Duration::from_secs(20), slow).await.expect("moves").expect("a clean end");
        assert_eq!(mark.expect("a watermark")["rows"], 20);
        let state = action(&mut client, "version", json!({}));
        tokio::time::timeout(Duration::from_secs(5), state).await.expect("moves").expect("an answer");
    });
}

/// An upload that stays open: its batch is durable.
struct Open {
    results: tonic::Streaming<arrow_flight::PutResult>,
    end: tokio::sync::oneshot::Sender<()>,
}

impl Open {
    async fn begin(client: &mut Client, name: &str, key: &str) -> Result<Self, Status> {
        let (end, ends) = tokio::sync::oneshot::channel();
        // Nothing more comes until the end.
        let rest = stream::once(ends).filter_map(async |_| None);
        let batches = stream::iter([blob_batch(0, 1, 100)]).chain(rest);
        let mut results = client.do_put(encode(put_descriptor(name, key), blob_schema(), batches)).await?.into_inner();
        let mark = results.message().await?.ok_or_else(|| Status::internal("no watermark"))?;
        assert!(!mark.app_metadata.is_empty());
        Ok(Self { results, end })
    }

    async fn end(self) {
        self.end.send(()).expect("it is open");
        last_watermark(self.results).await.expect("a clean end");
    }
}

#[test]
fn inv_7_uploads_have_a_bound_over_all_connections_and_in_a_full_house_a_recording_still_ends() {
    run(async {
        let server = Server::start(&["streams_max=4"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "s").await;
        let mut topics = Vec::new();
        for index in 0..5 {
            let name = format!("s/t{index}");
            topics.push((create_topic(&mut client, &key, &name, "default").await, name));
        }
        let mut open = Vec::new();
        for (topic, name) in &topics[..4] {
            open.push(Open::begin(&mut server.client().await, name, topic).await.expect("a place"));
        }
        let (topic, name) = &topics[4];
        let refused = Open::begin(&mut server.client().await, name, topic).await.map(|_| ());
        check_refused(refused, Code::ResourceExhausted, &["4 uploads", "streams_max"]);
        open.pop().expect("an upload").end().await;
        open.push(Open::begin(&mut client, name, topic).await.expect("the place of the one that ended"));
        for upload in open {
            upload.end().await;
        }
        action(&mut client, "sequence_finalize", json!({ "name": "s", "key": key })).await.expect("finalize");
    });
}

#[test]
fn inv_7_half_read_streams_have_a_bound_and_stop_neither_uploads_nor_actions() {
    run(async {
        let server = Server::start(&["streams_max=4"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "s").await;
        let topic = create_topic(&mut client, &key, "s/t", "image").await;
        let batches = (0..32).map(|time| blob_batch(time, 1, 1 << 20)).collect();
        put(&mut client, "s/t", &topic, batches).await.expect("put");
        let get = || arrow_flight::Ticket { ticket: "s/t".into() };
        let mut half_read = Vec::new();
        for _ in 0..4 {
            let mut rows = client.do_get(get()).await.expect("a place").into_inner();
            rows.message().await.expect("a schema");
            half_read.push(rows);
        }
        check_refused(client.do_get(get()).await.map(|_| ()), Code::ResourceExhausted, &["4 DoGet", "streams_max"]);
        let live = create_sequence(&mut client, "live").await;
        let topic = create_topic(&mut client, &live, "live/t", "default").await;
        put(&mut client, "live/t", &topic, vec![blob_batch(0, 1, 100)]).await.expect("put");
        action(&mut client, "sequence_finalize", json!({ "name": "live", "key": live })).await.expect("finalize");
        let mut last = half_read.pop().expect("a stream");
        while last.message().await.expect("rows").is_some() {}
        let mut rows = client.do_get(get()).await.expect("the place of the one that ended").into_inner();
        assert!(rows.message().await.expect("a schema").is_some());
    });
}

#[test]
fn a_connection_beyond_connections_max_is_told_so_and_those_that_are_open_go_on() {
    run(async {
        let server = Server::start(&["connections_max=2"]);
        let (mut first, second) = (server.client().await, server.client().await);
        let mut third = server.client().await;
        let refused = action(&mut third, "version", json!({})).await;
        check_refused(refused, Code::ResourceExhausted, &["2 connections", "connections_max"]);
        action(&mut first, "version", json!({})).await.expect("an answer");
        drop(second);
        // As soon as its end is seen.
        while action(&mut server.client().await, "version", json!({})).await.is_err() {}
    });
}
