//! Several volumes (`data_dirs`): topics spread over them, one that is not there, one of another recorder.

use crate::harness::{
    Client, Server, action, blob, blob_batch, check_refused, create_sequence, create_topic, files_below, flightbox,
    flightbox_may_fail, get, info, put, put_and_vanish, put_descriptor, run, times,
};
use arrow::array::AsArray;
use serde_json::json;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tonic::Code;

const ROWS: usize = 30;
const BLOB_BYTES: usize = 40_000;

/// A data folder and two volumes, one of them on another file system where there is one.
struct Disks {
    data: TempDir,
    first: TempDir,
    second: TempDir,
}

impl Disks {
    fn new() -> Self {
        let here = || tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let second = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| here());
        Self { data: here(), first: here(), second }
    }

    fn setting(&self) -> String {
        format!("data_dirs={}:{}", self.first.path().display(), self.second.path().display())
    }

    fn start(&self) -> Server {
        Server::start_on(self.data.path(), &[&self.setting(), "chunk_bytes=256KiB", "scrub_rate=0"])
    }

    /// The second disk is gone, with or without the folder that it was mounted on.
    fn take_out_second(&self, leaves_mount_point: bool) {
        std::fs::rename(self.second.path(), self.second.path().with_extension("away")).expect("renamed");
        if leaves_mount_point {
            std::fs::create_dir(self.second.path()).expect("a folder");
        }
    }

    /// It is back. What was written into the folder that it was mounted on would make this fail.
    fn bring_back_second(&self) {
        std::fs::remove_dir(self.second.path()).ok(); // There may be none.
        std::fs::rename(self.second.path().with_extension("away"), self.second.path()).expect("renamed");
    }

    fn lose_data_folder(&self) {
        std::fs::remove_dir_all(self.data.path()).expect("removed");
        std::fs::create_dir(self.data.path()).expect("a folder");
    }

    fn verify(&self) -> (String, bool) {
        let (data, setting) = (self.data.path().to_str().expect("UTF-8"), self.setting());
        flightbox_may_fail(&["verify", "--listen", "127.0.0.1:1", "--data", data, "--set", &setting])
    }
}

/// Records a finalized sequence of four topics.
async fn record(client: &mut Client, name: &str) {
    let key = create_sequence(client, name).await;
    for topic in 0..4 {
        let locator = format!("{name}/t{topic}");
        let uuid = create_topic(client, &key, &locator, "image").await;
        let batches = (0..3).map(|batch| blob_batch((batch * ROWS / 3) as i64, ROWS / 3, BLOB_BYTES)).collect();
        put(client, &locator, &uuid, batches).await.expect("put");
    }
    action(client, "sequence_finalize", json!({ "name": name, "key": key })).await.expect("finalize");
}

async fn check_whole(client: &mut Client, locator: &str) {
    let found = get(client, locator.to_owned()).await.expect("get");
    assert_eq!(times(&found), (0..ROWS as i64).collect::<Vec<_>>(), "{locator}");
    for batch in &found {
        for (time, bytes) in times(std::slice::from_ref(batch)).into_iter().zip(batch.column(1).as_binary::<i32>()) {
            assert_eq!(bytes.expect("a blob"), blob(time, BLOB_BYTES), "{locator}: row {time}");
        }
    }
}

async fn check_all_whole(client: &mut Client, name: &str) {
    for topic in 0..4 {
        check_whole(client, &format!("{name}/t{topic}")).await;
    }
}

fn segments_on(volume: &TempDir) -> usize {
    let files = files_below(&volume.path().join("sequences"));
    files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "parquet")).count()
}

/// Every file for people can be opened.
fn check_browse(data: &Path, name: &str) {
    let browse = files_below(&data.join("browse").join(name));
    let is_parquet = |path: &PathBuf| std::fs::read(path).expect("readable").ends_with(b"PAR1");
    assert!(browse.len() == 4 && browse.iter().all(is_parquet), "{browse:?}");
}

/// Topics of a sequence that lie on a volume.
fn topics_on(data: &Path, name: &str, volume: &Path) -> Vec<String> {
    let is_there = |topic: &usize| {
        let file = data.join(format!("browse/{name}/t{topic}/000000.parquet"));
        std::fs::canonicalize(file).is_ok_and(|target| target.starts_with(volume))
    };
    (0..4).filter(is_there).map(|topic| format!("{name}/t{topic}")).collect()
}

#[test]
fn inv_4_topics_lie_on_all_volumes_are_read_browsed_and_verified_there_and_leave_nothing_when_deleted() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        check_all_whole(&mut client, "drive").await;
        for volume in [&disks.first, &disks.second] {
            assert_eq!(topics_on(disks.data.path(), "drive", volume.path()).len(), 2, "two topics on each");
            assert_eq!(segments_on(volume), 2);
        }
        check_browse(disks.data.path(), "drive");
        let told = info(&mut client).await["volumes"].clone();
        let roles: Vec<&str> = told.as_array().expect("a list").iter().filter_map(|one| one["role"].as_str()).collect();
        assert_eq!(roles, ["keeps what it has", "takes topics", "takes topics"], "{told}");

        server.kill();
        let server = disks.start();
        let mut client = server.client().await;
        check_all_whole(&mut client, "drive").await;
        drop((client, server));
        let (told, clean) = disks.verify();
        assert!(clean, "{told}");

        let server = disks.start();
        let mut client = server.client().await;
        action(&mut client, "sequence_delete", json!({ "locator": "drive" })).await.expect("deleted");
        for folder in [&disks.data, &disks.first, &disks.second] {
            assert_eq!(files_below(&folder.path().join("sequences")), Vec::<PathBuf>::new());
        }
        let left = std::fs::read_dir(disks.first.path().join("sequences")).expect("readable").count();
        assert_eq!(left, 0, "no folder either");
    });
}

#[test]
fn inv_9_a_volume_that_is_not_there_keeps_the_others_recording_and_is_served_again_when_it_is_back() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        record(&mut client, "old").await;
        let (on_first, on_second) = (
            topics_on(disks.data.path(), "drive", disks.first.path()),
            topics_on(disks.data.path(), "drive", disks.second.path()),
        );
        drop(client);
        server.stop();
        disks.take_out_second(true);

        let mut server = disks.start();
        let mut client = server.client().await;
        let told = info(&mut client).await;
        assert_eq!(told["volumes"][2]["role"], "not there", "{told}");
        assert!(told["notes"].to_string().contains("mount it"), "{}", told["notes"]);
        for topic in &on_first {
            check_whole(&mut client, topic).await;
        }
        let second = disks.second.path().to_str().expect("UTF-8");
        check_refused(get(&mut client, on_second[0].clone()).await, Code::Unavailable, &[&on_second[0], second]);
        record(&mut client, "meanwhile").await;
        check_all_whole(&mut client, "meanwhile").await;
        assert_eq!(topics_on(disks.data.path(), "meanwhile", disks.first.path()).len(), 4);
        let deleted = action(&mut client, "sequence_delete", json!({ "locator": "old" })).await;
        check_refused(deleted, Code::Unavailable, &[second, "is not there"]);
        // What is there went at once: deleting makes room.
        assert_eq!(segments_on(&disks.first), on_first.len() + 4);
        assert_eq!(std::fs::read_dir(disks.second.path()).expect("readable").count(), 0, "nothing was written there");
        drop(client);
        server.stop();

        disks.bring_back_second();
        let mut server = disks.start();
        let mut client = server.client().await;
        check_all_whole(&mut client, "drive").await;
        check_all_whole(&mut client, "meanwhile").await;
        // What was deleted meanwhile is gone there as well.
        assert_eq!(segments_on(&disks.second), on_second.len());
        drop(client);
        server.stop();
        let (told, clean) = disks.verify();
        assert!(clean, "{told}");
    });
}

#[test]
fn inv_9_recordings_come_back_from_their_volumes_when_the_data_folder_is_lost() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        drop(client);
        server.stop();
        disks.lose_data_folder();
        let mut server = disks.start();
        let mut client = server.client().await;
        check_all_whole(&mut client, "drive").await;
        // As it was: locked, too.
        let aborted = action(&mut client, "sequence_delete", json!({ "name": "drive" })).await;
        check_refused(aborted, Code::FailedPrecondition, &["drive", "finalized"]);
        check_browse(disks.data.path(), "drive");
        drop(client);
        server.stop();
    });
}

#[test]
fn inv_1_and_3_a_catalog_made_again_while_a_volume_is_away_forgets_nothing_that_lies_there() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        // Finalized topics in a sequence that is still open, and one without its end.
        let key = create_sequence(&mut client, "open").await;
        for topic in 0..4 {
            let locator = format!("open/t{topic}");
            let uuid = create_topic(&mut client, &key, &locator, "image").await;
            let batches = (0..3).map(|batch| blob_batch((batch * ROWS / 3) as i64, ROWS / 3, BLOB_BYTES)).collect();
            put(&mut client, &locator, &uuid, batches).await.expect("put");
        }
        // And some that are cut, with a chunk and a tail each.
        let mut cut = Vec::new();
        for topic in 0..4 {
            let locator = format!("open/cut{topic}");
            let uuid = create_topic(&mut client, &key, &locator, "image").await;
            let mut batches = vec![blob_batch(0, 10, BLOB_BYTES)];
            batches.extend((10..ROWS as i64).map(|time| blob_batch(time, 1, 10)));
            put_and_vanish(&server, put_descriptor(&locator, &uuid), batches).await;
            cut.push(locator);
        }
        let durable = durable_rows(&mut client, &cut).await;
        drop(client);
        server.kill();
        disks.take_out_second(false);
        for start in 0..2 {
            if start == 0 {
                lose_end_of_log(disks.data.path());
            }
            let mut server = disks.start();
            let mut client = server.client().await;
            let whole = topics_on(disks.data.path(), "drive", disks.first.path());
            assert_eq!(whole.len(), 2);
            for topic in &whole {
                check_whole(&mut client, topic).await;
            }
            record(&mut client, &format!("later{start}")).await;
            drop(client);
            server.stop();
        }
        disks.bring_back_second();
        let mut server = disks.start();
        let mut client = server.client().await;
        for name in ["drive", "open", "later0", "later1"] {
            check_all_whole(&mut client, name).await;
        }
        assert_eq!(durable_rows(&mut client, &cut).await, durable, "what was acknowledged, tails included");
        drop(client);
        server.stop();
        // Made again for it once: the next start leaves it as it is.
        let mut server = disks.start();
        let mut client = server.client().await;
        check_all_whole(&mut client, "open").await;
        drop(client);
        server.stop();
        let entries = std::fs::read_dir(disks.data.path()).expect("readable").map(|entry| entry.expect("an entry"));
        let aside = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("catalog.damaged-"));
        assert_eq!(aside.count(), 2, "once when its log was short, once when the volume came back");
        let (told, clean) = disks.verify();
        assert!(clean, "{told}");
    });
}

/// Durable rows of topics.
async fn durable_rows(client: &mut Client, topics: &[String]) -> Vec<u64> {
    let mut rows = Vec::new();
    for topic in topics {
        let status = action(client, "topic_status", json!({ "name": topic })).await.expect("status");
        rows.push(status["rows"].as_u64().expect("rows"));
    }
    rows
}

/// As if the end of the catalog's log had been lost: it is made again, and gives what it has.
fn lose_end_of_log(data: &Path) {
    std::fs::write(data.join("catalog.synced"), "999999999\n").expect("written");
}

#[test]
fn inv_1_an_unmounted_disk_is_not_taken_for_a_new_one_when_the_data_folder_is_lost_as_well() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        drop(client);
        server.stop();
        disks.take_out_second(true);
        disks.lose_data_folder();
        for start in 0..2 {
            let mut server = disks.start();
            let mut client = server.client().await;
            record(&mut client, &format!("later{start}")).await;
            assert_eq!(
                std::fs::read_dir(disks.second.path()).expect("readable").count(),
                0,
                "nothing is written there"
            );
            drop(client);
            server.stop();
        }
        disks.bring_back_second();
        let server = disks.start();
        let mut client = server.client().await;
        for name in ["drive", "later0", "later1"] {
            check_all_whole(&mut client, name).await;
        }
    });
}

#[test]
fn inv_4_what_was_deleted_while_its_volume_was_away_does_not_come_back_with_it() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        for topic in topics_on(disks.data.path(), "drive", disks.second.path()) {
            action(&mut client, "topic_delete", json!({ "locator": topic })).await.expect("deleted");
        }
        drop(client);
        server.stop();
        // Nothing of it is on the second any more, not even what it says of the recording.
        assert_eq!(files_below(&disks.second.path().join("sequences")), Vec::<PathBuf>::new());
        disks.take_out_second(false);
        let mut server = disks.start();
        let mut client = server.client().await;
        action(&mut client, "sequence_delete", json!({ "locator": "drive" })).await.expect("deleted");
        drop(client);
        server.stop();
        disks.bring_back_second();
        let mut server = disks.start();
        let mut client = server.client().await;
        check_refused(get(&mut client, "drive/t0").await, Code::NotFound, &["drive"]);
        let told = info(&mut client).await["health"]["catalog"].clone();
        assert_eq!(told, "ok");
        drop(client);
        server.stop();
        let aside = disks.data.path().read_dir().expect("readable").filter_map(Result::ok);
        assert!(!aside.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("catalog.damaged")));
    });
}

#[test]
fn a_volume_that_is_mounted_elsewhere_is_found_there() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let mut client = server.client().await;
        record(&mut client, "drive").await;
        drop(client);
        server.stop();
        let moved = disks.first.path().with_extension("moved");
        std::fs::rename(disks.first.path(), &moved).expect("renamed");
        let setting = format!("data_dirs={}:{}", moved.display(), disks.second.path().display());
        let mut server = Server::start_on(disks.data.path(), &[&setting]);
        let mut client = server.client().await;
        check_all_whole(&mut client, "drive").await;
        let told = info(&mut client).await["volumes"].clone();
        assert_eq!(told.as_array().expect("a list").len(), 3, "it is known by its new place alone: {told}");
        check_browse(disks.data.path(), "drive");
        drop(client);
        server.stop();
        std::fs::rename(&moved, disks.first.path()).expect("renamed");
    });
}

#[test]
fn another_recorders_volume_is_refused_and_so_are_paths_that_cannot_be_volumes() {
    run(async {
        let disks = Disks::new();
        let mut server = disks.start();
        let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let other = other.path().to_str().expect("UTF-8");
        let refused = |data_dirs: &str, names: &[&str]| {
            let setting = format!("data_dirs={data_dirs}");
            let listen = ["--listen", "127.0.0.1:0"];
            let arguments = [&["serve", "--data", other, "--set", &setting][..], &listen[..]].concat();
            let (told, ok) = flightbox_may_fail(&arguments);
            assert!(!ok && names.iter().all(|name| told.contains(name)), "{data_dirs}: {told}");
        };
        let first = disks.first.path().to_str().expect("UTF-8");
        // In use: a data folder without recordings would take it over otherwise.
        refused(first, &[first, "in use by another flightbox"]);
        server.stop();
        // One that has a name of its own.
        let own = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let fresh = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let setting = format!("data_dirs={}", own.path().display());
        Server::start_on(fresh.path(), &[&setting]).stop();
        let (data, both) = (fresh.path().to_str().expect("UTF-8"), format!("{setting}:{first}"));
        let (told, ok) = flightbox_may_fail(&["serve", "--data", data, "--listen", "127.0.0.1:0", "--set", &both]);
        assert!(!ok && told.contains(first) && told.contains("another recorder's"), "{told}");
        refused(data, &[data, "data folder of its own"]);
        let (told, ok) = flightbox_may_fail(&["serve", "--listen", "127.0.0.1:0", "--data", first]);
        assert!(!ok && told.contains("is a volume of a recorder"), "{told}");
        refused("relative/path", &["relative/path", "absolute"]);
        refused(&format!("{first}:{first}/below"), &["apart from each other"]);
        let doctor = flightbox(&["doctor", "--data", data, "--set", &setting]);
        assert!(doctor.contains(own.path().to_str().expect("UTF-8")), "{doctor}");
    });
}
