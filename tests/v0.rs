//! The sequence protocol (v0), step by step, and what the files look like afterwards.

use crate::harness::{
    Server, action, blob_batch, check_refused, create_sequence, create_topic, encode, files_below, get, info, put,
    put_descriptor, run, times,
};
use arrow_flight::FlightDescriptor;
use arrow_flight::utils::batches_to_flight_data;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tonic::Code;

#[test]
fn a_sequence_is_created_filled_finalized_listed_and_read_back() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        let topic = create_topic(&mut client, &key, "drive/cam/front", "image").await;
        let batches = (0..10).map(|index| blob_batch(index * 100, 100, 1000)).collect();
        let watermark = put(&mut client, "drive/cam/front", &topic, batches).await.expect("put").expect("a watermark");
        assert_eq!(watermark["rows"], 1000);
        assert_eq!(watermark["batches"], 10);
        action(&mut client, "sequence_finalize", json!({ "name": "drive", "key": key })).await.expect("finalize");

        let descriptor = FlightDescriptor::new_path(vec!["drive".to_owned()]);
        let found = client.get_flight_info(descriptor).await.expect("info").into_inner();
        assert_eq!(found.endpoint.len(), 1);
        let ticket = found.endpoint[0].ticket.clone().expect("a ticket").ticket;
        assert_eq!(ticket.as_ref(), b"drive/cam/front");
        let rows = get(&mut client, ticket).await.expect("get");
        assert_eq!(times(&rows), (0..1000).collect::<Vec<_>>());
        let state = action(&mut client, "sequence_system_info", json!({ "name": "drive" })).await.expect("system info");
        assert_eq!(state["is_locked"], true);
        assert!(state["total_size_bytes"].as_u64().expect("a number") > 1_000_000);
    });
}

#[test]
fn a_topic_may_ask_for_its_own_compression() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        let mut sizes = Vec::new();
        for asked in ["none", "zstd"] {
            let name = format!("drive/{asked}");
            let body = json!({ "sequence_key": key, "name": name, "serialization_format": "image",
                "ontology_tag": "test", "user_metadata": { "flightbox:compression": asked } });
            let topic = action(&mut client, "topic_create", body).await.expect("topic")["key"].clone();
            let batch = blob_batch(0, 20, 100_000);
            put(&mut client, &name, topic.as_str().expect("a key"), vec![batch.clone()]).await.expect("put");
            let back = get(&mut client, name.clone()).await.expect("get");
            let columns = |at: usize| back.iter().map(|rows| rows.column(at).as_ref()).collect::<Vec<_>>();
            for at in 0..batch.num_columns() {
                assert_eq!(&arrow::compute::concat(&columns(at)).expect("concat"), batch.column(at));
            }
            let state = action(&mut client, "topic_system_info", json!({ "name": name })).await.expect("system info");
            sizes.push(state["total_size_bytes"].as_u64().expect("a number"));
        }
        assert!(sizes[1] * 10 < sizes[0], "{sizes:?}");
        let body = json!({ "sequence_key": key, "name": "drive/x", "serialization_format": "default",
            "ontology_tag": "test", "user_metadata": { "flightbox:compression": "brotli" } });
        let refused = action(&mut client, "topic_create", body).await;
        check_refused(refused, Code::InvalidArgument, &["flightbox:compression", "brotli", "zstd"]);
    });
}

#[test]
fn inv_4_abort_leaves_no_name_and_no_file() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        let topic = create_topic(&mut client, &key, "drive/cam", "image").await;
        put(&mut client, "drive/cam", &topic, vec![blob_batch(0, 100, 10_000)]).await.expect("put");
        assert!(!files_below(&server.data().join("sequences")).is_empty());
        action(&mut client, "sequence_abort", json!({ "name": "drive", "key": key })).await.expect("abort");
        assert_eq!(files_below(&server.data().join("sequences")), Vec::<std::path::PathBuf>::new());
        check_refused(get(&mut client, "drive/cam").await, Code::NotFound, &["drive/cam"]);
        let descriptor = FlightDescriptor::new_path(vec!["drive".to_owned()]);
        check_refused(client.get_flight_info(descriptor).await, Code::NotFound, &["drive"]);
        create_sequence(&mut client, "drive").await;
    });
}

#[test]
fn inv_3_nothing_writes_into_a_locked_topic_or_a_finalized_sequence() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "drive").await;
        let topic = create_topic(&mut client, &key, "drive/cam", "image").await;
        put(&mut client, "drive/cam", &topic, vec![blob_batch(0, 10, 10)]).await.expect("put");
        let again = put(&mut client, "drive/cam", &topic, vec![blob_batch(100, 10, 10)]).await;
        check_refused(again, Code::FailedPrecondition, &["drive/cam", "finalized"]);
        action(&mut client, "sequence_finalize", json!({ "name": "drive", "key": key })).await.expect("finalize");
        let body = json!({ "sequence_key": key, "name": "drive/late", "serialization_format": "default",
            "ontology_tag": "test", "user_metadata": {} });
        check_refused(action(&mut client, "topic_create", body).await, Code::FailedPrecondition, &["finalized"]);
        let abort = action(&mut client, "sequence_abort", json!({ "name": "drive", "key": key })).await;
        check_refused(abort, Code::FailedPrecondition, &["drive"]);
        assert_eq!(times(&get(&mut client, "drive/cam").await.expect("get")), (0..10).collect::<Vec<_>>());
    });
}

#[test]
fn inv_8_of_many_racing_creators_exactly_one_wins() {
    run(async {
        let server = Server::start(&[]);
        let mut racers = Vec::new();
        for _ in 0..16 {
            let mut client = server.client().await;
            racers.push(tokio::spawn(async move {
                action(&mut client, "sequence_create", json!({ "name": "contested", "user_metadata": {} })).await
            }));
        }
        let mut won = 0;
        for racer in racers {
            match racer.await.expect("a racer") {
                Ok(_) => won += 1,
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists),
            }
        }
        assert_eq!(won, 1);
    });
}

#[test]
fn empty_sequences_empty_topics_and_zero_row_batches_are_fine() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let empty = create_sequence(&mut client, "empty").await;
        action(&mut client, "sequence_finalize", json!({ "name": "empty", "key": empty }))
            .await
            .expect("finalize empty");
        let key = create_sequence(&mut client, "quiet").await;
        let silent = create_topic(&mut client, &key, "quiet/silent", "default").await;
        put(&mut client, "quiet/silent", &silent, vec![]).await.expect("a stream without batches");
        let hollow = create_topic(&mut client, &key, "quiet/hollow", "default").await;
        let batches = vec![blob_batch(0, 0, 0), blob_batch(0, 3, 5), blob_batch(0, 0, 0)];
        put(&mut client, "quiet/hollow", &hollow, batches).await.expect("zero-row batches");
        action(&mut client, "sequence_finalize", json!({ "name": "quiet", "key": key })).await.expect("finalize");
        assert!(get(&mut client, "quiet/silent").await.expect("get").is_empty());
        assert_eq!(times(&get(&mut client, "quiet/hollow").await.expect("get")), [0, 1, 2]);
        assert!(server.data().join("browse/quiet/silent/000000.parquet").is_file());
    });
}

#[test]
fn a_batch_without_rows_that_comes_alone_is_acknowledged_and_the_upload_goes_on() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "sparse").await;
        let topic = create_topic(&mut client, &key, "sparse/events", "default").await;
        let (more, messages) = tokio::sync::mpsc::channel(4);
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        // arrow-flight's own stream passes over batches without rows.
        let batches = [(0, 0), (0, 3), (3, 0), (3, 2)].map(|(first, rows)| blob_batch(first, rows, 10));
        let sent = batches_to_flight_data(&batches[0].schema(), &batches).expect("messages");
        let mut sent = sent.into_iter();
        let first = sent.next().expect("a schema").with_descriptor(put_descriptor("sparse/events", &topic));
        more.send(first).await.expect("sent");
        let mut results = client.clone().do_put(messages).await.expect("put").into_inner();
        // Each is durable before the next one is sent: in the tail each is a run of its own.
        for (number, message) in sent.enumerate() {
            more.send(message).await.expect("sent");
            let mark = results.message().await.expect("a watermark").expect("one");
            let mark: Value = serde_json::from_slice(&mark.app_metadata).expect("JSON");
            assert_eq!(mark["batches"], number + 1);
        }
        drop(more);
        while results.message().await.expect("a clean end").is_some() {}
        assert_eq!(times(&get(&mut client, "sparse/events").await.expect("get")), [0, 1, 2, 3, 4]);
    });
}

#[test]
fn durable_rows_of_a_topic_that_is_still_written_can_be_read() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "live").await;
        let topic = create_topic(&mut client, &key, "live/imu", "default").await;
        let (more, rows) = tokio::sync::mpsc::channel(4);
        let rows = tokio_stream::wrappers::ReceiverStream::new(rows);
        let messages = encode(put_descriptor("live/imu", &topic), blob_batch(0, 0, 0).schema(), rows);
        let mut results = client.clone().do_put(messages).await.expect("put").into_inner();
        more.send(blob_batch(0, 5, 10)).await.expect("sent");
        let mark = results.message().await.expect("a watermark while the stream runs").expect("one");
        let mark: Value = serde_json::from_slice(&mark.app_metadata).expect("JSON");
        assert_eq!(mark["rows"], 5);
        assert_eq!(times(&get(&mut client, "live/imu").await.expect("get")), [0, 1, 2, 3, 4]);
        let finalize = action(&mut client, "sequence_finalize", json!({ "name": "live", "key": key })).await;
        check_refused(finalize, Code::FailedPrecondition, &["live/imu"]);
        let second = put(&mut client, "live/imu", &topic, vec![blob_batch(9, 1, 1)]).await;
        check_refused(second, Code::FailedPrecondition, &["live/imu", "another DoPut"]);
        drop(more);
        while results.message().await.expect("a clean end").is_some() {}
        action(&mut client, "sequence_finalize", json!({ "name": "live", "key": key })).await.expect("finalize");
    });
}

#[test]
fn rows_come_back_by_time_with_ties_in_arrival_order() {
    run(async {
        let server = Server::start(&["chunk_bytes=64KiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "mixed").await;
        let topic = create_topic(&mut client, &key, "mixed/cam", "image").await;
        // Blocks of 100 rows in a shuffled order, each a chunk of its own or part of one.
        let order: Vec<i64> = (0..40).map(|index| index * 17 % 40).collect();
        let batches = order.iter().map(|block| blob_batch(block * 100, 100, 700)).collect();
        put(&mut client, "mixed/cam", &topic, batches).await.expect("put");
        let rows = get(&mut client, "mixed/cam").await.expect("get");
        assert_eq!(times(&rows), (0..4000).collect::<Vec<_>>());
        for batch in &rows {
            use arrow::array::AsArray;
            let blobs = batch.column(1).as_binary::<i32>();
            for (time, blob) in times(std::slice::from_ref(batch)).into_iter().zip(blobs.iter()) {
                assert_eq!(blob.expect("a blob"), crate::harness::blob(time, 700));
            }
        }
    });
}

#[test]
fn what_the_ring_wrote_as_chunks_is_what_the_catalog_has() {
    run(async {
        let mut server = Server::start(&[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "sum").await;
        for index in 0..4 {
            let name = format!("sum/cam{index}");
            let topic = create_topic(&mut client, &key, &name, "image").await;
            let batches =
                stream::iter(0..40).map(|index| blob_batch(index * 10, 10, 100_000)).collect::<Vec<_>>().await;
            put(&mut client, &name, &topic, batches).await.expect("put");
        }
        let info = info(&mut client).await;
        assert_eq!(info["engine"], "uring");
        assert_eq!(info["ring_bytes"]["chunk"], info["stored"]["chunk_bytes"]);
        assert_eq!(info["ring_bytes"]["rewrite"], 0);
        server.stop();
    });
}

#[test]
fn without_io_uring_the_same_rows_come_back() {
    run(async {
        let mut server = Server::start(&["engine=posix", "chunk_bytes=256KiB", "segment_bytes=1MiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "plain").await;
        let topic = create_topic(&mut client, &key, "plain/cam", "image").await;
        let batches = (0..40).map(|index| blob_batch(index * 10, 10, 10_000)).collect();
        put(&mut client, "plain/cam", &topic, batches).await.expect("put");
        assert_eq!(times(&get(&mut client, "plain/cam").await.expect("get")), (0..400).collect::<Vec<_>>());
        let info = info(&mut client).await;
        assert_eq!(info["engine"], "posix");
        assert!(info["notes"][0].as_str().expect("a note").contains("engine"));
        server.stop();
    });
}

#[test]
fn inv_1_rotated_segments_are_sealed_whole_while_the_upload_goes_on() {
    run(async {
        let server = Server::start(&["chunk_bytes=64KiB", "segment_bytes=256KiB"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "turn").await;
        let topic = create_topic(&mut client, &key, "turn/cam", "image").await;
        let batches = (0..400).map(|index| blob_batch(index * 10, 10, 7000)).collect();
        put(&mut client, "turn/cam", &topic, batches).await.expect("put");
        action(&mut client, "sequence_finalize", json!({ "name": "turn", "key": key })).await.expect("finalize");
        let rows = get(&mut client, "turn/cam").await.expect("get");
        assert_eq!(times(&rows), (0..4000).collect::<Vec<_>>());
        let files = files_below(&server.data().join("browse/turn/cam"));
        assert!(files.len() > 5, "{} segments", files.len());
        for file in files {
            let bytes = std::fs::read(&file).expect("a segment");
            assert!(bytes.starts_with(b"PAR1") && bytes.ends_with(b"PAR1"), "{} has no footer", file.display());
        }
    });
}
