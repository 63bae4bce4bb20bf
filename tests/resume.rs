//! After a lost connection or a killed server: uploads go on where they were durable, or are accepted as
//! they are.

use crate::harness::{
    Client, Server, action, blob, blob_batch, check_refused, create_sequence, create_topic, encode, files_below, get,
    last_watermark, put_and_vanish, run, times,
};
use arrow::array::{AsArray, RecordBatch};
use arrow_flight::FlightDescriptor;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::time::Duration;
use tonic::{Code, Status};

/// Rows per batch and bytes per row: chunks at once, chunks now and then, and rows that stay in the tail.
const SHAPES: [(usize, usize, &str); 3] = [(4, 60_000, "image"), (100, 1000, "default"), (1, 50, "default")];
const BATCHES: u64 = 400;

fn descriptor(name: &str, key: &str, resume_from: Option<u64>) -> FlightDescriptor {
    let mut command = json!({ "resource_locator": name, "topic_uuid": key });
    if let Some(batch) = resume_from {
        command["resume_from"] = json!(batch);
    }
    FlightDescriptor::new_cmd(command.to_string())
}

async fn put_from(
    client: &mut Client,
    name: &str,
    key: &str,
    resume_from: Option<u64>,
    batches: Vec<RecordBatch>,
) -> Result<Option<Value>, Status> {
    let messages = encode(descriptor(name, key, resume_from), blob_batch(0, 0, 0).schema(), stream::iter(batches));
    last_watermark(client.do_put(messages).await?.into_inner()).await
}

async fn status(client: &mut Client, name: &str) -> Value {
    action(client, "topic_status", json!({ "locator": name })).await.expect("topic_status")
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

/// The batches of a shape from a number on, a little pause between them so that a kill meets the middle.
fn slowly(from: u64, (rows, bytes, _): (usize, usize, &'static str)) -> impl futures::Stream<Item = RecordBatch> {
    stream::iter(from..BATCHES).then(move |number| async move {
        tokio::time::sleep(Duration::from_micros(700)).await;
        blob_batch((number * rows as u64) as i64, rows, bytes)
    })
}

#[test]
fn inv_2_an_upload_that_is_killed_again_and_again_ends_with_every_row_once_and_in_order() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let settings = ["chunk_bytes=256KiB", "segment_bytes=1MiB", "commit_interval=10ms"];
        let mut server = Server::start_on(folder.path(), &settings);
        let mut client = server.client().await;
        let sequence = create_sequence(&mut client, "long").await;
        let mut keys = Vec::new();
        for (index, shape) in SHAPES.iter().enumerate() {
            keys.push(create_topic(&mut client, &sequence, &format!("long/s{index}"), shape.2).await);
        }
        let mut resumed = 0;
        for round in 0..60_u64 {
            let mut client = server.client().await;
            let mut uploads = Vec::new();
            for (index, shape) in SHAPES.into_iter().enumerate() {
                let name = format!("long/s{index}");
                let durable = status(&mut client, &name).await;
                if durable["locked"] == true {
                    continue;
                }
                let batches = number(&durable["batches"]);
                resumed += u64::from(batches > 0);
                // Some batches are sent again: they are the same, and are dropped.
                let from = batches.saturating_sub(round % 5);
                let messages = encode(
                    descriptor(&name, &keys[index], Some(from)),
                    blob_batch(0, 0, 0).schema(),
                    Box::pin(slowly(from, shape)),
                );
                let mut client = client.clone();
                uploads.push(tokio::spawn(async move {
                    let Ok(results) = client.do_put(messages).await else { return };
                    let mut results = results.into_inner();
                    while let Ok(Some(_)) = results.message().await {}
                }));
            }
            if uploads.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(40 + round * 31 % 120)).await;
            if round % 3 == 2 {
                // Only the connections are lost: the server goes on.
                uploads.iter().for_each(tokio::task::JoinHandle::abort);
                drop(client);
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            server.kill();
            server = Server::start_on(folder.path(), &settings);
        }
        let mut client = server.client().await;
        assert!(resumed > 3, "only {resumed} uploads were resumed");
        for (index, (rows, bytes, _)) in SHAPES.into_iter().enumerate() {
            let name = format!("long/s{index}");
            let durable = status(&mut client, &name).await;
            assert_eq!(durable["locked"], true, "{name}: {durable}");
            let found = get(&mut client, name.clone()).await.expect("rows");
            assert_eq!(times(&found), (0..(BATCHES * rows as u64) as i64).collect::<Vec<_>>(), "{name}");
            for batch in &found {
                let blobs = batch.column(1).as_binary::<i32>();
                for (time, found) in times(std::slice::from_ref(batch)).into_iter().zip(blobs.iter()) {
                    assert_eq!(found.expect("a blob"), blob(time, bytes), "{name}");
                }
            }
        }
        action(&mut client, "sequence_finalize", json!({ "name": "long", "key": sequence })).await.expect("finalize");
        server.stop();
    });
}

/// A topic with three durable batches of ten rows, its upload cut.
async fn interrupted(server: &Server, client: &mut Client) -> (String, String) {
    let sequence = create_sequence(client, "cut").await;
    let key = create_topic(client, &sequence, "cut/cam", "default").await;
    let batches = (0..3).map(|block| blob_batch(block * 10, 10, 100)).collect();
    put_and_vanish(server, descriptor("cut/cam", &key, None), batches).await;
    while status(client, "cut/cam").await["uploading"] == true {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (sequence, key)
}

#[test]
fn gaps_other_batches_and_other_schemas_are_refused_with_both_numbers() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let (_, key) = interrupted(&server, &mut client).await;
        let durable = status(&mut client, "cut/cam").await;
        assert_eq!(
            (&durable["rows"], &durable["batches"], &durable["last_time_ns"]),
            (&json!(30), &json!(3), &json!(29))
        );
        let next = || vec![blob_batch(30, 10, 100)];
        let plain = put_from(&mut client, "cut/cam", &key, None, next()).await;
        check_refused(plain, Code::FailedPrecondition, &["cut/cam", "30", "resume_from"]);
        let gap = put_from(&mut client, "cut/cam", &key, Some(5), next()).await;
        check_refused(gap, Code::FailedPrecondition, &["3 durable batches", "batch 5"]);
        let cut = put_from(&mut client, "cut/cam", &key, Some(1), vec![blob_batch(10, 7, 100)]).await;
        check_refused(cut, Code::FailedPrecondition, &["batch 1", "10 rows", "7 rows", "batch 3"]);
        let other = put_from(&mut client, "cut/cam", &key, Some(2), vec![blob_batch(21, 10, 100)]).await;
        check_refused(other, Code::FailedPrecondition, &["batch 2"]);
        let wrong = put_from(&mut client, "cut/cam", "00000000-0000-4000-8000-000000000000", Some(3), next()).await;
        check_refused(wrong, Code::PermissionDenied, &["cut/cam"]);
        let schema = std::sync::Arc::new(arrow::datatypes::Schema::new(vec![arrow::datatypes::Field::new(
            "timestamp_ns",
            arrow::datatypes::DataType::Int64,
            false,
        )]));
        let messages = encode(descriptor("cut/cam", &key, Some(3)), schema, stream::iter(Vec::new()));
        let other = match client.do_put(messages).await {
            Ok(results) => last_watermark(results.into_inner()).await,
            Err(status) => Err(status),
        };
        check_refused(other, Code::FailedPrecondition, &["`data`", "first DoPut"]);
        // The refused schema did not get into the registry either.
        let known = action(&mut client, "ontology_get", json!({ "tag": "test" })).await.expect("known");
        assert_eq!(known["version"], 1);
        // Nothing of all this changed what is durable, and the upload can still go on.
        let again = vec![blob_batch(20, 10, 100), blob_batch(30, 10, 100)];
        let mark = put_from(&mut client, "cut/cam", &key, Some(2), again).await.expect("resumed").expect("a mark");
        assert_eq!((&mark["rows"], &mark["batches"]), (&json!(40), &json!(4)));
        assert_eq!(times(&get(&mut client, "cut/cam").await.expect("rows")), (0..40).collect::<Vec<_>>());
    });
}

#[test]
fn an_interrupted_topic_is_finalized_only_when_it_is_accepted_and_says_that_it_is_partial() {
    run(async {
        let server = Server::start(&[]);
        let mut client = server.client().await;
        let (sequence, key) = interrupted(&server, &mut client).await;
        create_topic(&mut client, &sequence, "cut/never", "default").await;
        let finalize = json!({ "name": "cut", "key": sequence });
        let refused = action(&mut client, "sequence_finalize", finalize.clone()).await;
        check_refused(refused, Code::FailedPrecondition, &["cut/cam", "30 rows"]);
        let mut accept = finalize;
        accept["accept_partial"] = json!(true);
        action(&mut client, "sequence_finalize", accept).await.expect("accepted");
        let durable = status(&mut client, "cut/cam").await;
        assert_eq!(
            (&durable["locked"], &durable["partial"], &durable["rows"]),
            (&json!(true), &json!(true), &json!(30))
        );
        assert_eq!(times(&get(&mut client, "cut/cam").await.expect("rows")), (0..30).collect::<Vec<_>>());
        // Its tail became a chunk: the file for people has the rows.
        let files = files_below(&server.data().join("browse/cut/cam"));
        let sizes: u64 = files.iter().map(|file| file.metadata().expect("a file").len()).sum();
        assert!(sizes > 30 * 100, "{files:?} have {sizes} bytes");
        let notes =
            action(&mut client, "topic_notification_list", json!({ "locator": "cut/cam" })).await.expect("notes");
        assert!(notes["notifications"][0]["msg"].as_str().expect("a text").contains("30 rows"), "{notes}");
        let info =
            client.get_flight_info(FlightDescriptor::new_cmd(json!({ "resource_locator": "cut/cam" }).to_string()));
        let metadata = info.await.expect("info").into_inner().endpoint[0].app_metadata.clone();
        let metadata: Value = serde_json::from_slice(&metadata).expect("JSON");
        assert_eq!(metadata["flightbox_partial"]["rows"], 30);
        let late = put_from(&mut client, "cut/cam", &key, Some(3), vec![blob_batch(30, 1, 1)]).await;
        check_refused(late, Code::FailedPrecondition, &["cut/cam", "finalized"]);
    });
}

#[test]
fn an_unattended_recorder_finalizes_what_was_interrupted_when_it_starts_again() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut server = Server::start_on(folder.path(), &[]);
        let mut client = server.client().await;
        interrupted(&server, &mut client).await;
        server.kill();
        let mut server = Server::start_on(folder.path(), &["on_restart=seal"]);
        let mut client = server.client().await;
        let system = action(&mut client, "sequence_system_info", json!({ "name": "cut" })).await.expect("info");
        assert_eq!(system["is_locked"], true);
        assert_eq!(status(&mut client, "cut/cam").await["partial"], true);
        assert_eq!(times(&get(&mut client, "cut/cam").await.expect("rows")), (0..30).collect::<Vec<_>>());
        server.stop();
    });
}
