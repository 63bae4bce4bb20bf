//! A disk that fills up, and topics that nobody writes any more.

use crate::harness::{
    Server, action, blob_batch, check_refused, create_sequence, create_topic, encode, get, info, last_watermark, put,
    put_and_vanish, put_descriptor, run, times,
};
use futures::stream;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tonic::Code;

/// A small file system of its own; unmounted when dropped.
struct SmallDisk {
    at: PathBuf,
    _folder: TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount: only root can.
    fn new(mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting a small file system takes root");
            return None;
        }
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let (image, at) = (folder.path().join("image"), folder.path().join("disk"));
        std::fs::File::create(&image).expect("an image").set_len(mib << 20).expect("its size");
        std::fs::create_dir(&at).expect("a folder");
        sh(&format!("mkfs.ext4 -q -F -m 0 {}", image.display()));
        sh(&format!("mount -o loop {} {}", image.display(), at.display()));
        Some(Self { at, _folder: folder })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.at).status().ok();
    }
}

fn sh(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}

#[test]
fn inv_1_a_full_disk_ends_uploads_cleanly_and_recording_goes_on_when_there_is_room_again() {
    let Some(disk) = SmallDisk::new(384) else { return };
    let data = disk.at.join("data");
    run(async {
        let mut server = Server::start_on(&data, &["chunk_bytes=1MiB", "reserve_bytes=32MiB", "commit_interval=10ms"]);
        let mut client = server.client().await;
        // To be deleted later: that makes room.
        let ballast = create_sequence(&mut client, "ballast").await;
        let topic = create_topic(&mut client, &ballast, "ballast/t", "image").await;
        let batches = (0..150).map(|batch| blob_batch(batch * 10, 10, 100_000)).collect();
        put(&mut client, "ballast/t", &topic, batches).await.expect("put");

        let key = create_sequence(&mut client, "full").await;
        let marks: Vec<Arc<AtomicU64>> = (0..4).map(|_| Arc::default()).collect();
        let mut uploads = Vec::new();
        for (index, mark) in marks.iter().enumerate() {
            let name = format!("full/s{index}");
            let topic = create_topic(&mut client, &key, &name, "image").await;
            let endless = stream::iter((0_i64..).map(|batch| blob_batch(batch * 10, 10, 50_000)));
            let messages = encode(put_descriptor(&name, &topic), blob_batch(0, 0, 0).schema(), endless);
            let (mut client, mark) = (client.clone(), Arc::clone(mark));
            uploads.push(tokio::spawn(async move {
                let mut results = client.do_put(messages).await.expect("begun").into_inner();
                loop {
                    match results.message().await {
                        Ok(Some(result)) => {
                            let json: Value = serde_json::from_slice(&result.app_metadata).expect("JSON");
                            mark.store(json["rows"].as_u64().expect("rows"), Ordering::Relaxed);
                        }
                        Ok(None) => panic!("an endless upload ended well"),
                        Err(status) => return status,
                    }
                }
            }));
        }
        for upload in uploads {
            let status = upload.await.expect("a task");
            check_refused::<()>(Err(status), Code::ResourceExhausted, &["full"]);
        }
        assert_eq!(info(&mut client).await["health"]["space"], "full");
        // New ones are refused, and what was taken can be finalized, read and deleted.
        let refused = create_sequence(&mut client, "late").await;
        let topic = create_topic(&mut client, &refused, "late/t", "image").await;
        let late = put(&mut client, "late/t", &topic, vec![blob_batch(0, 1, 10)]).await;
        check_refused(late, Code::ResourceExhausted, &["full"]);
        action(&mut client, "sequence_abort", json!({ "name": "late", "key": refused })).await.expect("abort");
        let finalize = json!({ "name": "full", "key": key, "accept_partial": true });
        action(&mut client, "sequence_finalize", finalize).await.expect("finalize");
        for (index, mark) in marks.iter().enumerate() {
            let found = times(&get(&mut client, format!("full/s{index}")).await.expect("get"));
            let acknowledged = mark.load(Ordering::Relaxed);
            assert!(acknowledged <= found.len() as u64, "{acknowledged} acknowledged, {} are there", found.len());
            assert_eq!(found, (0..found.len() as i64).collect::<Vec<_>>());
        }
        action(&mut client, "sequence_abort", json!({ "name": "ballast", "key": ballast })).await.expect("abort");
        let since = Instant::now();
        while info(&mut client).await["health"]["space"] == "full" {
            assert!(since.elapsed() < Duration::from_secs(20), "there is room, and nobody notices");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let key = create_sequence(&mut client, "after").await;
        let topic = create_topic(&mut client, &key, "after/t", "image").await;
        put(&mut client, "after/t", &topic, vec![blob_batch(0, 10, 1000)]).await.expect("there is room");
        reserve_is_there(&data);
        drop(client);
        server.stop();
    });
}

#[test]
fn a_full_volume_ends_its_own_uploads_and_new_topics_go_to_the_others() {
    let Some(disk) = SmallDisk::new(320) else { return };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (data, roomy) = (folder.path().join("data"), folder.path().join("roomy"));
    let volumes = format!("data_dirs={}:{}", roomy.display(), disk.at.join("v").display());
    run(async {
        let mut server = Server::start_on(&data, &["chunk_bytes=1MiB", "reserve_bytes=64MiB", &volumes]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "both").await;
        let mut ends = Vec::new();
        for index in 0..2 {
            let name = format!("both/s{index}");
            let topic = create_topic(&mut client, &key, &name, "image").await;
            // More than the small one holds.
            let batches = (0..400).map(|batch| blob_batch(batch * 10, 10, 100_000)).collect();
            ends.push(put(&mut client, &name, &topic, batches).await.map(|_| ()));
        }
        let (well, refused): (Vec<_>, Vec<_>) = ends.into_iter().partition(Result::is_ok);
        assert_eq!((well.len(), refused.len()), (1, 1));
        check_refused(refused.into_iter().next().expect("one"), Code::ResourceExhausted, &["full"]);
        let told = info(&mut client).await["volumes"].clone();
        assert_eq!((&told[0]["space"], &told[1]["space"]), (&json!("enough"), &json!("enough")), "{told}");
        // Full; or low again, once what the upload had reserved and not used is given back and looked at.
        assert!(matches!(told[2]["space"].as_str(), Some("full" | "low")), "{told}");
        for index in 2..6 {
            let name = format!("both/s{index}");
            let topic = create_topic(&mut client, &key, &name, "image").await;
            put(&mut client, &name, &topic, vec![blob_batch(0, 10, 100_000)]).await.expect("there is room elsewhere");
        }
        let finalize = json!({ "name": "both", "key": key, "accept_partial": true });
        action(&mut client, "sequence_finalize", finalize).await.expect("finalize");
        drop(client);
        server.stop();
    });
}

fn reserve_is_there(data: &Path) {
    let since = Instant::now();
    while std::fs::metadata(data.join("reserve")).map_or(0, |metadata| metadata.len()) != 32 << 20 {
        assert!(since.elapsed() < Duration::from_secs(10), "the reserve was not made again");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

#[test]
fn a_topic_without_a_stream_gets_its_tail_into_a_sealed_file_and_stays_resumable() {
    run(async {
        let server = Server::start(&["idle_topic=1s"]);
        let mut client = server.client().await;
        let key = create_sequence(&mut client, "idle").await;
        let topic = create_topic(&mut client, &key, "idle/imu", "default").await;
        put_and_vanish(&server, put_descriptor("idle/imu", &topic), vec![blob_batch(0, 7, 10)]).await;
        let since = Instant::now();
        let segments = || crate::harness::files_below(&server.data().join("sequences"));
        while segments().is_empty() {
            assert!(since.elapsed() < Duration::from_secs(20), "its tail stays in the catalog");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let since = Instant::now();
        loop {
            let status = action(&mut client, "topic_status", json!({ "name": "idle/imu" })).await.expect("status");
            assert_eq!((status["rows"].as_u64(), status["locked"].as_bool()), (Some(7), Some(false)), "{status}");
            let bytes = std::fs::read(&segments()[0]).expect("readable");
            if bytes.ends_with(b"PAR1") && status["uploading"] == false {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "not sealed");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let descriptor = json!({ "topic": { "name": "idle/imu", "key": topic }, "resume_from": 1 }).to_string();
        let descriptor = arrow_flight::FlightDescriptor::new_cmd(descriptor);
        let messages = encode(descriptor, blob_batch(0, 0, 0).schema(), stream::iter([blob_batch(7, 3, 10)]));
        last_watermark(client.do_put(messages).await.expect("resumed").into_inner()).await.expect("ends well");
        assert_eq!(times(&get(&mut client, "idle/imu").await.expect("get")), (0..10).collect::<Vec<_>>());
    });
}
