//! SIGKILL in the middle of an upload: what was acknowledged is there, and nothing that was not sent.

use crate::harness::{
    Server, action, blob, blob_batch, check_refused, create_sequence, create_topic, encode, get, put, put_descriptor,
    run, times,
};
use arrow::array::AsArray;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tonic::Code;

const ROUNDS: u64 = 100;
const STREAMS: usize = 4;

/// Rows per batch and bytes per row of each stream: chunks, and rows that stay in the tail.
const SHAPES: [(usize, usize, &str); STREAMS] =
    [(4, 100_000, "image"), (10, 20_000, "image"), (100, 1000, "default"), (1, 50, "default")];

#[test]
fn inv_1_and_2_and_5_hold_through_100_sigkills_under_mixed_load() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        // From the middle on every second topic goes to another volume.
        let volume = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let both = format!("data_dirs={}:{}", folder.path().display(), volume.path().display());
        let mut all = Vec::new();
        for round in 0..ROUNDS {
            let volumes = if round < ROUNDS / 2 { "data_dirs=" } else { &both };
            let mut server = Server::start_on(folder.path(), &["chunk_bytes=1MiB", "commit_interval=10ms", volumes]);
            let sequence = format!("round{round}");
            let ledger = Ledger::default();
            let after = Duration::from_millis(20 + round * 37 % 250);
            let marks = upload_until_killed(&mut server, &sequence, after, &ledger).await;
            let mut server = Server::start_on(folder.path(), &[]);
            for (index, mark) in marks.iter().enumerate() {
                check_prefix(&server, &format!("{sequence}/s{index}"), SHAPES[index], *mark).await;
            }
            check_ledger(&server, &ledger).await;
            all.extend(ledger.lock().expect("not poisoned").drain(..));
            if round % 10 == 0 {
                server.kill();
                let everything = || [listing(folder.path()), listing(volume.path())];
                let before = everything();
                let mut again = Server::start_on(folder.path(), &[]);
                assert!(before == everything(), "round {round}: a second recovery changed a file");
                again.stop();
            } else {
                server.stop();
            }
        }
        // Everything that was told in any round is so at the end.
        let server = Server::start_on(folder.path(), &[]);
        let (finalized, aborted) = all.iter().fold((0, 0), |sum, told| match told {
            Told::Finalized(_) => (sum.0 + 1, sum.1),
            Told::Aborted(_) => (sum.0, sum.1 + 1),
        });
        check_ledger(&server, &Arc::new(Mutex::new(all))).await;
        assert!(!listing(volume.path()).is_empty(), "topics lie on the other volume");
        println!("{ROUNDS} SIGKILLs; {finalized} finalized and {aborted} aborted sequences as they were told");
        assert!(finalized > 0);
        assert!(aborted > 0);
    });
}

/// What clients were told of whole sequences.
#[derive(Debug, Clone)]
enum Told {
    Finalized(String),
    Aborted(String),
}

type Ledger = Arc<Mutex<Vec<Told>>>;

const FINITE_ROWS: usize = 30;

/// Creates, uploads, finalizes or aborts, and asks, until the server is gone.
async fn mixed_load(mut client: crate::harness::Client, prefix: String, ledger: Ledger) {
    // Each round begins elsewhere: on a slow machine a round has time for one sequence only.
    for number in prefix.bytes().map(usize::from).sum::<usize>().. {
        let name = format!("{prefix}-{number}");
        let create = json!({ "name": name, "user_metadata": {} });
        let Ok(key) = action(&mut client, "sequence_create", create).await else { return };
        let topic = json!({
            "sequence_key": key["key"], "name": format!("{name}/t"), "serialization_format": "default",
            "ontology_tag": "test", "user_metadata": {},
        });
        let Ok(topic) = action(&mut client, "topic_create", topic).await else { return };
        let topic = topic["key"].as_str().expect("a key").to_owned();
        let batches = vec![blob_batch(0, 10, 500), blob_batch(10, 20, 500)];
        if put(&mut client, &format!("{name}/t"), &topic, batches).await.is_err() {
            return;
        }
        let body = json!({ "name": name, "key": key["key"] });
        let told = if number % 3 == 2 {
            action(&mut client, "sequence_abort", body).await.map(|_| Told::Aborted(name.clone()))
        } else {
            action(&mut client, "sequence_finalize", body).await.map(|_| Told::Finalized(name.clone()))
        };
        let Ok(told) = told else { return };
        ledger.lock().expect("not poisoned").push(told);
        let question = json!({ "ontology": { "test.timestamp_ns": { "$gt": 3 } } });
        if action(&mut client, "query", question).await.is_err_and(|status| status.code() == Code::Unavailable) {
            return;
        }
    }
}

async fn check_ledger(server: &Server, ledger: &Ledger) {
    let mut client = server.client().await;
    let told = ledger.lock().expect("not poisoned").clone();
    for told in told {
        match told {
            Told::Finalized(name) => {
                let found = get(&mut client, format!("{name}/t")).await.expect("INV-1: finalized, and gone");
                assert_eq!(times(&found), (0..FINITE_ROWS as i64).collect::<Vec<_>>(), "{name}");
            }
            Told::Aborted(name) => {
                check_refused(get(&mut client, format!("{name}/t")).await, Code::NotFound, &[&name]);
            }
        }
    }
}

/// Four endless uploads, killed after a while; returns the last watermark that each client saw.
async fn upload_until_killed(server: &mut Server, sequence: &str, after: Duration, ledger: &Ledger) -> Vec<u64> {
    let load = tokio::spawn(mixed_load(server.client().await, format!("{sequence}-mixed"), Arc::clone(ledger)));
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
    load.await.expect("the mixed load's task");
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

/// Every file of the recordings with its bytes.
fn listing(data: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = crate::harness::files_below(&data.join("sequences"))
        .into_iter()
        .map(|file| (file.clone(), std::fs::read(file).expect("a file")))
        .collect();
    files.sort();
    files
}

#[test]
fn inv_5_a_second_recovery_finds_nothing_to_do() {
    run(async {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut server = Server::start_on(folder.path(), &["chunk_bytes=1MiB"]);
        upload_until_killed(&mut server, "seq", Duration::from_millis(300), &Ledger::default()).await;
        std::fs::create_dir_all(folder.path().join("sequences/nobody")).expect("an orphan");
        let mut first = Server::start_on(folder.path(), &[]);
        first.kill();
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
