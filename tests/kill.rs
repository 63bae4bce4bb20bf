//! SIGKILL in the middle of an upload: what was acknowledged is there, and nothing that was not sent.

use crate::harness::{
    Server, action, blob, blob_batch, check_refused, create_sequence, create_topic, encode, get, put, put_descriptor,
    run, times,
};
use arrow::array::AsArray;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::Code;

const ROUNDS: u64 = 20;
const STREAMS: usize = 4;

/// Rows per batch and bytes per row of each stream: chunks, and rows that stay in the tail.
const SHAPES: [(usize, usize, &str); STREAMS] =
    [(4, 100_000, "image"), (10, 20_000, "image"), (100, 1000, "default"), (1, 50, "default")];

#[test]
fn inv_1_and_2_after_kill_9_the_rows_are_a_prefix_not_shorter_than_the_last_watermark() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        for round in 0..ROUNDS {
            let mut server = Server::start_on(folder.path(), &["chunk_bytes=1MiB", "commit_interval=10ms"]);
            let sequence = format!("round{round}");
            let marks = upload_until_killed(&mut server, &sequence, Duration::from_millis(30 + round * 37 % 400)).await;
            let mut server = Server::start_on(folder.path(), &[]);
            for (index, mark) in marks.iter().enumerate() {
                check_prefix(&server, &format!("{sequence}/s{index}"), SHAPES[index], *mark).await;
            }
            server.stop();
        }
    });
}

/// Four endless uploads, killed after a while; returns the last watermark that each client saw.
async fn upload_until_killed(server: &mut Server, sequence: &str, after: Duration) -> Vec<u64> {
    let mut client = server.client().await;
    let key = create_sequence(&mut client, sequence).await;
    let marks: Vec<Arc<AtomicU64>> = (0..STREAMS).map(|_| Arc::default()).collect();
    let mut uploads = Vec::new();
    for (index, (rows, bytes, format)) in SHAPES.into_iter().enumerate() {
        let name = format!("{sequence}/s{index}");
        let topic = create_topic(&mut client, &key, &name, format).await;
        let batches = stream::iter(0_i64..).map(move |number| blob_batch(number * rows as i64, rows, bytes));
        let messages = encode(put_descriptor(&name, &topic), blob_batch(0, 0, 0).schema(), batches);
        let (mut client, mark) = (client.clone(), Arc::clone(&marks[index]));
        uploads.push(tokio::spawn(async move {
            let Ok(results) = client.do_put(messages).await else { return };
            let mut results = results.into_inner();
            while let Ok(Some(result)) = results.message().await {
                let json: Value = serde_json::from_slice(&result.app_metadata).expect("JSON");
                mark.store(json["rows"].as_u64().expect("rows"), Ordering::Relaxed);
            }
        }));
    }
    tokio::time::sleep(after).await;
    server.kill();
    for upload in uploads {
        upload.await.expect("an upload's task");
    }
    marks.iter().map(|mark| mark.load(Ordering::Relaxed)).collect()
}

async fn check_prefix(server: &Server, topic: &str, (rows, bytes, _): (usize, usize, &str), mark: u64) {
    let mut client = server.client().await;
    let found = match get(&mut client, topic.to_owned()).await {
        Ok(found) => found,
        // Killed before the topic got a schema: then nothing was acknowledged either.
        Err(status) => {
            assert_eq!(mark, 0, "{topic}: {}", status.message());
            return;
        }
    };
    let times = times(&found);
    assert!(mark <= times.len() as u64, "{topic}: {mark} rows were acknowledged, {} are there", times.len());
    assert_eq!(times.len() % rows, 0, "{topic}: a batch was torn");
    assert_eq!(times, (0..times.len() as i64).collect::<Vec<_>>(), "{topic}");
    for batch in &found {
        let blobs = batch.column(1).as_binary::<i32>();
        for (time, found) in crate::harness::times(std::slice::from_ref(batch)).into_iter().zip(blobs.iter()) {
            assert_eq!(found.expect("a blob"), blob(time, bytes), "{topic}: row {time}");
        }
    }
}

#[test]
fn an_interrupted_topic_is_kept_readable_and_abortable_and_not_written_over() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut server = Server::start_on(folder.path(), &[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "cut").await;
        let topic = create_topic(&mut client, &key, "cut/imu", "default").await;
        let endless = stream::iter([blob_batch(0, 7, 10)]).chain(stream::pending());
        let messages = encode(put_descriptor("cut/imu", &topic), blob_batch(0, 0, 0).schema(), endless);
        let mut results = client.do_put(messages).await.expect("put").into_inner();
        results.message().await.expect("a watermark").expect("one");
        server.kill();

        let server = Server::start_on(folder.path(), &[]);
        let mut client = server.client().await;
        assert_eq!(times(&get(&mut client, "cut/imu").await.expect("get")), (0..7).collect::<Vec<_>>());
        let again = put(&mut client, "cut/imu", &topic, vec![blob_batch(0, 1, 1)]).await;
        check_refused(again, Code::FailedPrecondition, &["cut/imu", "7 durable rows"]);
        action(&mut client, "sequence_abort", json!({ "name": "cut", "key": key })).await.expect("abort");
        assert!(crate::harness::files_below(&server.data().join("sequences")).is_empty());
    });
}

#[test]
fn inv_5_a_second_recovery_finds_nothing_to_do() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut server = Server::start_on(folder.path(), &["chunk_bytes=1MiB"]);
        upload_until_killed(&mut server, "seq", Duration::from_millis(300)).await;
        std::fs::create_dir_all(folder.path().join("sequences/nobody")).expect("an orphan");
        let mut first = Server::start_on(folder.path(), &[]);
        first.kill();
        let listing = |dir: &std::path::Path| {
            let mut files: Vec<_> = crate::harness::files_below(&dir.join("sequences"))
                .into_iter()
                .map(|file| (file.clone(), std::fs::read(file).expect("a file")))
                .collect();
            files.sort();
            files
        };
        let after_first = listing(folder.path());
        assert!(!folder.path().join("sequences/nobody").is_dir());
        let mut second = Server::start_on(folder.path(), &[]);
        second.kill();
        assert!(after_first == listing(folder.path()), "the second recovery changed a file");
    });
}

#[test]
fn sigterm_in_the_middle_of_an_upload_ends_it_cleanly_with_its_prefix() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut server = Server::start_on(folder.path(), &[]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "term").await;
        let topic = create_topic(&mut client, &key, "term/imu", "default").await;
        let endless = stream::iter([blob_batch(0, 7, 10)]).chain(stream::pending());
        let messages = encode(put_descriptor("term/imu", &topic), blob_batch(0, 0, 0).schema(), endless);
        let mut results = client.do_put(messages).await.expect("put").into_inner();
        results.message().await.expect("a watermark").expect("one");
        let stopping = std::thread::spawn(move || server.stop());
        check_refused(results.message().await, Code::Unavailable, &["shutting down"]);
        drop((results, client));
        stopping.join().expect("the server ends well");
        let server = Server::start_on(folder.path(), &[]);
        let mut client = server.client().await;
        assert_eq!(times(&get(&mut client, "term/imu").await.expect("get")), (0..7).collect::<Vec<_>>());
    });
}

#[test]
fn a_second_server_on_the_same_folder_is_refused() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let _server = Server::start_on(folder.path(), &[]);
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_flightbox"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(folder.path())
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success());
    assert!(text.contains("in use by another flightbox"), "{text}");
}
