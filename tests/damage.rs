//! Damaged bytes of every kind, and a catalog that is gone: found, named, confined; the service starts.

use crate::harness::{
    Client, Server, action, blob, blob_batch, create_sequence, create_topic, encode, files_below, flightbox,
    flightbox_may_fail, get, put, put_descriptor, run, times,
};
use arrow::array::{AsArray, RecordBatch};
use arrow_flight::{FlightDescriptor, Ticket};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tonic::Code;

/// Chunks close by weight alone: however slow the machine is, each holds the same batches.
const SETTINGS: [&str; 3] = ["chunk_bytes=1MiB", "commit_interval=1s", "scrub_rate=0"];
/// Batches of ten rows of 60 kB: a chunk holds two of them.
const BATCHES: usize = 8;
const ROWS: usize = 10;
const BLOB_BYTES: usize = 60_000;

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

fn camera_batches() -> Vec<RecordBatch> {
    (0..BATCHES).map(|batch| blob_batch((batch * ROWS) as i64, ROWS, BLOB_BYTES)).collect()
}

/// A finalized sequence with a camera and a slow topic, and one that is still open: two chunks and a tail.
/// The server is killed with the open one's stream running.
async fn record(data: &Path) -> Server {
    let server = Server::start_on(data, &SETTINGS);
    let mut client = server.client().await;
    let key = create_sequence(&mut client, "whole").await;
    let camera = create_topic(&mut client, &key, "whole/camera", "image").await;
    put(&mut client, "whole/camera", &camera, camera_batches()).await.expect("put");
    let slow = create_topic(&mut client, &key, "whole/slow", "default").await;
    put(&mut client, "whole/slow", &slow, vec![blob_batch(0, 5, 100)]).await.expect("put");
    let note = json!({ "name": "whole/slow", "notify_type": "error", "msg": "a note" });
    action(&mut client, "topic_notify_create", note).await.expect("a note");
    action(&mut client, "sequence_finalize", json!({ "name": "whole", "key": key })).await.expect("finalize");
    let key = create_sequence(&mut client, "open").await;
    let topic = create_topic(&mut client, &key, "open/camera", "image").await;
    let mut batches: Vec<RecordBatch> = camera_batches().into_iter().take(4).collect();
    batches.push(blob_batch(40, 1, 10));
    let endless = stream::iter(batches).chain(stream::pending());
    let messages = encode(put_descriptor("open/camera", &topic), blob_batch(0, 0, 0).schema(), endless);
    let mut results = client.do_put(messages).await.expect("put").into_inner();
    loop {
        let mark = results.message().await.expect("a watermark").expect("one");
        let mark: Value = serde_json::from_slice(&mark.app_metadata).expect("JSON");
        if mark["rows"] == 41 {
            break;
        }
    }
    server
}

/// The rows that a topic gives, checked one by one against what was sent.
async fn rows(client: &mut Client, topic: &str, bytes: impl Fn(i64) -> usize) -> Vec<i64> {
    let found = get(client, topic.to_owned()).await.expect("get");
    for batch in &found {
        for (time, found) in times(std::slice::from_ref(batch)).into_iter().zip(batch.column(1).as_binary::<i32>()) {
            assert_eq!(found.expect("a blob"), blob(time, bytes(time)), "{topic}: row {time}");
        }
    }
    times(&found)
}

fn camera_bytes(time: i64) -> usize {
    if time == 40 { 10 } else { BLOB_BYTES }
}

/// What is finalized is whole; what is open has at least its chunks, and nothing but a prefix.
async fn check_all(server: &Server) -> usize {
    let mut client = server.client().await;
    assert_eq!(rows(&mut client, "whole/camera", |_| BLOB_BYTES).await, (0..80).collect::<Vec<_>>());
    assert_eq!(rows(&mut client, "whole/slow", |_| 100).await, (0..5).collect::<Vec<_>>());
    let open = rows(&mut client, "open/camera", camera_bytes).await;
    assert_eq!(open, (0..open.len() as i64).collect::<Vec<_>>());
    assert!(open.len() >= 40, "rows that lay in chunks are gone: {}", open.len());
    open.len()
}

/// The segment of a topic of the finalized sequence, by its readable name.
fn segment(data: &Path, topic: &str) -> PathBuf {
    let mut files = files_below(&data.join("browse").join(topic));
    files.sort();
    files.first().cloned().expect("a segment")
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("readable");
    let byte = bytes.get_mut(at).unwrap_or_else(|| panic!("{} has no byte {at}", path.display()));
    *byte ^= 0x10;
    // In place: the file keeps its links.
    let mut permissions = std::fs::metadata(path).expect("there").permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "a test's own file")]
    permissions.set_readonly(false);
    std::fs::set_permissions(path, permissions).expect("writable");
    std::fs::write(path, bytes).expect("written");
}

fn verify(data: &Path) -> (Value, bool) {
    let data = data.to_str().expect("UTF-8");
    let (text, clean) = flightbox_may_fail(&["verify", "--json", "--listen", "127.0.0.1:1", "--data", data]);
    let start = text.find('{').unwrap_or_else(|| panic!("no report: {text}"));
    let mut reports = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
    (reports.next().expect("a report").expect("JSON"), clean)
}

/// Where things lie in a segment: the first row group, its padding, its trailer, the footer.
fn places(path: &Path) -> Vec<(&'static str, usize)> {
    let bytes = std::fs::read(path).expect("readable");
    let trailer_end = bytes.windows(8).position(|window| window == b"FBXTRLR2").expect("a trailer") + 8;
    let length = u32::from_le_bytes(bytes[trailer_end - 16..trailer_end - 12].try_into().expect("four")) as usize;
    let trailer = trailer_end - 16 - length;
    let padding = (0..trailer).rev().find(|at| bytes[*at] == 0).expect("padding");
    vec![
        ("head", 30),
        ("chunk", 4096 + 5000),
        ("padding", padding),
        ("trailer", trailer + length / 2),
        ("footer", bytes.len() - 300),
    ]
}

#[test]
fn inv_9_one_flipped_byte_in_each_part_of_a_segment_is_found_and_named_and_takes_one_chunk_at_most() {
    run(async {
        let folder = folder();
        record(folder.path()).await.kill();
        Server::start_on(folder.path(), &SETTINGS).stop();
        let (report, clean) = verify(folder.path());
        assert!(clean, "{report:#}");
        assert_eq!(report["findings"], json!([]));
        let path = segment(folder.path(), "whole/camera");
        for (part, at) in places(&path) {
            flip(&path, at);
            let (report, clean) = verify(folder.path());
            assert!(!clean, "{part}: not found");
            let findings = report["findings"].as_array().expect("findings");
            assert_eq!(findings.len(), 1, "{part}: {report:#}");
            assert_eq!(findings[0]["part"], part, "{report:#}");
            assert_eq!(findings[0]["topic"], "whole/camera");
            let server = Server::start_on(folder.path(), &SETTINGS);
            let mut client = server.client().await;
            let found = rows(&mut client, "whole/camera", |_| BLOB_BYTES).await;
            let expected: Vec<i64> = if part == "chunk" { (20..80).collect() } else { (0..80).collect() };
            assert_eq!(found, expected, "{part}");
            assert_eq!(rows(&mut client, "whole/slow", |_| 100).await.len(), 5);
            let status = action(&mut client, "topic_status", json!({ "name": "whole/camera" })).await.expect("status");
            assert_eq!(status["damaged_rows"], if part == "chunk" { 20 } else { 0 }, "{part}");
            drop(server);
            flip(&path, at);
            // Whole again, and served again.
            assert!(verify(folder.path()).1, "{part}: still damaged");
        }
        let server = Server::start_on(folder.path(), &SETTINGS);
        assert_eq!(check_all(&server).await, 41);
    });
}

#[test]
fn a_running_recorder_verifies_itself_and_tells_what_its_last_recovery_did() {
    run(async {
        let folder = folder();
        record(folder.path()).await.kill();
        let server = Server::start_on(folder.path(), &SETTINGS);
        let (address, data) = (server.address.to_string(), folder.path().to_str().expect("UTF-8").to_owned());
        let arguments = ["verify", "--json", "--listen", &address, "--data", &data];
        let clean: Value = serde_json::from_str(&flightbox(&arguments)).expect("JSON");
        assert_eq!((clean["topics"].as_u64(), clean["findings"].clone()), (Some(3), json!([])), "{clean:#}");
        assert_eq!(clean["rows"], 80 + 5 + 41, "{clean:#}");
        flip(&segment(folder.path(), "whole/camera"), 4096 + 5000);
        let (text, succeeded) = flightbox_may_fail(&arguments);
        assert!(!succeeded, "{text}");
        let found: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(found["findings"][0]["part"], "chunk", "{found:#}");
        let mut client = server.client().await;
        assert_eq!(times(&get(&mut client, "whole/camera").await.expect("get")), (20..80).collect::<Vec<_>>());
        let one = flightbox_may_fail(&["verify", "--sequence", "open", "--listen", &address, "--data", &data]);
        assert!(one.1, "{}", one.0);
        let told = flightbox(&["info", "--recovery", "--listen", &address]);
        assert!(told.contains("open/camera") && told.contains("41 rows") && told.contains("interrupted"), "{told}");
    });
}

#[test]
fn a_read_that_meets_damage_fails_and_the_next_one_says_what_is_missing() {
    run(async {
        let folder = folder();
        record(folder.path()).await.kill();
        let path = segment(folder.path(), "whole/camera");
        flip(&path, 4096 + 5000);
        let mut server = Server::start_on(folder.path(), &SETTINGS);
        let mut client = server.client().await;
        let met = get(&mut client, "whole/camera").await.expect_err("damaged");
        assert_eq!(met.code(), Code::DataLoss, "{}", met.message());
        assert!(met.message().contains("000000.parquet"), "{}", met.message());
        let since = Instant::now();
        let found = loop {
            match get(&mut client, "whole/camera").await {
                Ok(found) => break found,
                Err(_) => assert!(since.elapsed() < Duration::from_secs(20), "never left out"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(times(&found), (20..80).collect::<Vec<_>>());
        let schema = client.do_get(Ticket { ticket: "whole/camera".into() }).await.expect("get").into_inner();
        let mut stream = arrow_flight::decode::FlightRecordBatchStream::new_from_flight_data(
            futures::TryStreamExt::map_err(schema, Into::into),
        );
        stream.next().await.expect("a batch").expect("a batch");
        let told = stream.schema().expect("a schema").metadata()["flightbox:data_loss"].clone();
        let told: Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!((told[0]["first_row"].as_u64(), told[0]["end_row"].as_u64()), (Some(0), Some(20)), "{told}");
        server.stop();

        let server = Server::start_on(folder.path(), &["on_damage=fail"]);
        let mut client = server.client().await;
        let refused = get(&mut client, "whole/camera").await.expect_err("refused");
        assert_eq!(refused.code(), Code::DataLoss, "{}", refused.message());
    });
}

#[test]
fn inv_9_a_deleted_catalog_comes_back_from_the_files_with_metadata_and_index() {
    run(async {
        let folder = folder();
        let mut server = record(folder.path()).await;
        server.kill();
        let mut server = Server::start_on(folder.path(), &SETTINGS);
        let mut client = server.client().await;
        let before = describe(&mut client).await;
        drop(client);
        server.stop();
        std::fs::remove_dir_all(folder.path().join("catalog")).expect("removed");
        let data = folder.path().to_str().expect("UTF-8");
        let receipt = flightbox(&["recover", "--json", "--data", data]);
        let start = receipt.find("{\n").expect("a receipt");
        let mut receipts = serde_json::Deserializer::from_str(&receipt[start..]).into_iter::<Value>();
        let receipt = receipts.next().expect("one").expect("JSON");
        assert_eq!(receipt["rebuilt"]["sequences"], 2, "{receipt:#}");
        assert_eq!(receipt["rebuilt"]["topics"], 3);
        let missing = receipt["rebuilt"]["missing"].to_string();
        assert!(missing.contains("tails of open topics"), "{missing}");
        let indexed = flightbox(&["reindex", "--check", "--data", data]);
        assert!(indexed.contains("0 different"), "{indexed}");
        let mut server = Server::start_on(folder.path(), &SETTINGS);
        assert_eq!(check_all(&server).await, 40, "only the tail's row is gone");
        let mut client = server.client().await;
        assert_eq!(describe(&mut client).await, before);
        // The open one can be resumed, and finalized.
        let status = action(&mut client, "topic_status", json!({ "name": "open/camera" })).await.expect("status");
        assert_eq!((status["batches"].as_u64(), status["locked"].as_bool()), (Some(4), Some(false)), "{status}");
        drop(client);
        server.stop();
        assert!(verify(folder.path()).1);
    });
}

/// What clients see of the finalized sequence.
async fn describe(client: &mut Client) -> Vec<Value> {
    let mut seen = Vec::new();
    for locator in ["whole", "whole/camera", "whole/slow"] {
        let descriptor = FlightDescriptor::new_cmd(json!({ "resource_locator": locator }).to_string());
        let info = client.get_flight_info(descriptor).await.expect("info").into_inner();
        seen.push(serde_json::from_slice(&info.app_metadata).unwrap_or(Value::Null));
        for endpoint in info.endpoint {
            seen.push(serde_json::from_slice(&endpoint.app_metadata).unwrap_or(Value::Null));
        }
    }
    for locator in ["whole/camera", "whole/slow"] {
        let mut status = action(client, "topic_status", json!({ "name": locator })).await.expect("status");
        status["uploading"] = Value::Null;
        seen.push(status);
        seen.push(action(client, "topic_notify_list", json!({ "name": locator })).await.expect("notes"));
    }
    seen
}

#[test]
fn inv_9_one_flipped_byte_anywhere_in_the_catalog_never_stops_the_start_and_loses_no_chunk() {
    run(async {
        let folder = folder();
        record(folder.path()).await.kill();
        // A second start flushes the log into tables; the kill leaves a log as well.
        let mut server = Server::start_on(folder.path(), &SETTINGS);
        server.kill();
        let whole = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        copy(folder.path(), whole.path());
        let mut kinds = std::collections::BTreeMap::new();
        for file in files_below(&whole.path().join("catalog")) {
            let name = file.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
            let length = std::fs::metadata(&file).expect("there").len() as usize;
            let kind = name.rsplit('.').next().unwrap_or("").trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
            // Tables of several families are told apart; of other kinds the newest file counts.
            if length > 0 && !name.starts_with("LOG") && name != "LOCK" {
                let kind = if kind == "sst" { name.clone() } else { kind.to_owned() };
                kinds.insert(kind, (name, length));
            }
        }
        assert!(kinds.len() >= 6, "{kinds:?}");
        for (name, length) in kinds.into_values() {
            for at in [length / 3, length / 2, length - 1] {
                let damaged = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
                copy(whole.path(), damaged.path());
                flip(&damaged.path().join("catalog").join(&name), at);
                let server = Server::start_on(damaged.path(), &SETTINGS);
                check_all(&server).await;
            }
        }
    });
}

/// Nothing of the recordings is in tables yet: what the log loses, only the files know.
#[test]
fn inv_3_and_9_a_log_that_rotted_before_it_was_flushed_takes_no_recording_and_no_lock_with_it() {
    run(async {
        let folder = folder();
        record(folder.path()).await.kill();
        let logs = files_below(&folder.path().join("catalog"));
        let log = logs.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "log"));
        let log = log.max_by_key(|file| std::fs::metadata(file).expect("there").len()).expect("a log");
        let name = log.strip_prefix(folder.path()).expect("below").to_owned();
        let length = std::fs::read(&log).expect("readable").iter().rposition(|byte| *byte != 0).expect("bytes");
        for part in 0..12 {
            let damaged = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
            copy(folder.path(), damaged.path());
            flip(&damaged.path().join(&name), length * part / 12 + 20);
            let server = Server::start_on(damaged.path(), &SETTINGS);
            check_all(&server).await;
            let mut client = server.client().await;
            let state = action(&mut client, "sequence_system_info", json!({ "name": "whole" })).await.expect("info");
            assert_eq!(state["is_locked"], true, "part {part}: {state}");
        }
    });
}

fn copy(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(file.strip_prefix(from).expect("below"));
        std::fs::create_dir_all(target.parent().expect("a parent")).expect("made");
        std::fs::copy(&file, &target).expect("copied");
    }
}

/// Tables that no start reads: only a merge in the background meets the damage, while recording goes on. The
/// recorder then starts itself again, with another catalog made from the files.
#[test]
fn inv_9_a_table_that_rotted_is_met_by_a_merge_during_ingest_and_costs_nothing_that_is_finalized() {
    run(async {
        let folder = folder();
        // Each start turns the log into one more table of each family: the fourth is merged with those before.
        for round in 0..4 {
            let mut server = Server::start_on(folder.path(), &SETTINGS);
            let mut client = server.client().await;
            finalized(&mut client, &format!("round{round}")).await;
            drop(client);
            server.kill();
        }
        let mut damaged = 0;
        for table in files_below(&folder.path().join("catalog")) {
            let bytes = std::fs::read(&table).expect("readable");
            // Sessions have random keys, so their tables overlap and are merged, not moved. A start reads none of
            // finalized recordings. The family's name is among a table's properties.
            let of_sessions = bytes.windows(8).any(|window| window == b"sessions");
            if of_sessions && table.extension().is_some_and(|extension| extension == "sst") {
                flip(&table, 40);
                damaged += 1;
            }
        }
        assert!(damaged >= 3, "{damaged} tables");
        let server = Server::start_on(folder.path(), &SETTINGS);
        let since = Instant::now();
        let mut rounds = 0;
        let set_aside = || {
            let names = std::fs::read_dir(folder.path()).expect("listed").map(|entry| entry.expect("one").file_name());
            names.into_iter().any(|name| name.to_string_lossy().starts_with("catalog.damaged-"))
        };
        while !set_aside() {
            assert!(since.elapsed() < Duration::from_secs(60), "the damage was never met in {rounds} rounds");
            rounds += 1;
            let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.address)).expect("one");
            if let Ok(channel) = endpoint.connect().await {
                let create = json!({ "name": format!("during{rounds}"), "user_metadata": {} });
                action(&mut Client::new(channel), "sequence_create", create).await.ok(); // It may be starting again.
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(server);
        let server = Server::start_on(folder.path(), &SETTINGS);
        let mut client = server.client().await;
        for round in 0..4 {
            let found = rows(&mut client, &format!("round{round}/camera"), |_| BLOB_BYTES).await;
            assert_eq!(found, (0..80).collect::<Vec<_>>(), "round {round}");
        }
    });
}

/// A finalized sequence with one topic.
async fn finalized(client: &mut Client, name: &str) {
    let key = create_sequence(client, name).await;
    let topic = create_topic(client, &key, &format!("{name}/camera"), "image").await;
    put(client, &format!("{name}/camera"), &topic, camera_batches()).await.expect("put");
    action(client, "sequence_finalize", json!({ "name": name, "key": key })).await.expect("finalize");
}
