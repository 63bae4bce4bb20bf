//! The ingest line, recovery and resume on a disk that lies: crash, recover, check, go on.
//!
//! Writer, steward, reader and committer run unchanged, on one thread and simulated time, over
//! `storage::sim` and a real RocksDB: its synced commits survive, some fail with an unknown outcome, and
//! now and then all of it is lost and made again from the files. Each seed is one recorder that
//! crashes several times; after each crash every promise is checked against a ledger of what its
//! clients sent and were told. A failure prints the seed; `./x sim --seed S` repeats it.

mod clients;
mod promises;
mod world;

use clients::*;
use promises::*;
use world::*;

use crate::ingest::committer::End;
use crate::ingest::writer::Message;
use crate::lifecycle::{DeleteRule, NewTopic, UploadKey};
use crate::recovery::recover_all;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use storage::catalog::Look;
use storage::chunk::Format;
use storage::read::TopicView;
use storage::recover::Receipt;
use storage::schema::TopicSchema;
use storage::sim::{Faults, Random, SimDisk};

/// Seeds of a run, crashes of each, and tests they are spread over.
const SEEDS: u64 = 2000;
const LIVES: u64 = 5;
const PARTS: u64 = 4;

/// One recorder, crashed again and again; returns how many crashes there were. `planted`: what goes wrong
/// beyond the rules, which the checks must notice.
fn run_seed(seed: u64, planted: Planted) -> u64 {
    let base = if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm") } else { Path::new("/tmp") };
    let store = tempfile::tempdir_in(base).expect("a folder");
    std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
    let ledger = Ledger::default();
    let mut random = Random::new(seed);
    let disk = SimDisk::new(random.bits(), u64::MAX, Faults::default());
    // Every second recorder has its topics on two volumes.
    let other = store.path().join("other");
    let roots: &[&str] = if seed % 2 == 1 { &["data", "other"] } else { &["data"] };
    if roots.len() > 1 {
        std::fs::create_dir(&other).expect("a folder");
        disk.mount(&other);
    }
    let mut disk = on_one_thread(async {
        for dirs in roots.iter().map(|root| store.path().join(root).join("sequences")) {
            storage::disk::make_dirs(&disk, Path::new("/"), &dirs).await.expect("folders");
        }
        disk
    });
    let calm = Manner { replays_tail: planted.replays_tail, ..CALM };
    for _ in 0..LIVES {
        let faults = match random.below(4) {
            0 => Faults { writes: 20, syncs: 20, reads: 5, ..planted.disk },
            1 => Faults { space: 15, stuck: 5, ..planted.disk },
            _ => planted.disk,
        };
        let failing_commits = if random.below(4) == 0 { 100 } else { 0 };
        let manner = Manner { lag: 1 + random.below(200), seed: random.bits(), ..calm };
        let in_recovery = random.below(5) == 0;
        let catalog_lost = random.below(20) == 0;
        let (seed, recovery_crash, crash) = (random.bits(), 1 + random.below(30), 1 + random.below(600));
        on_one_thread(async {
            if catalog_lost {
                lose_catalog(&disk, store.path(), &ledger).await;
            }
            let life = begin(&disk, store.path(), if in_recovery { calm } else { manner });
            if in_recovery {
                // The crash may meet the recovery itself.
                disk.arm(recovery_crash, planted.disk);
                let (config, catalog, committer) = (&life.config, &life.lifecycle.catalog, &life.lifecycle.committer);
                tokio::select! {
                    biased;
                    () = disk.crashed() => return,
                    _ = recover_all(config, catalog, committer, &life.steward, Receipt::default()) => {}
                }
            }
            disk.arm(u64::MAX / 2, planted.disk);
            recover_and_check(&life, &disk, &ledger).await;
            disk.arm(crash, faults);
            life.failing_commits.store(failing_commits, Ordering::Relaxed);
            tokio::select! {
                biased;
                () = disk.crashed() => {}
                () = clients(life, Rc::clone(&ledger), seed) => {}
            }
        });
        disk = disk.after_crash(u64::MAX, Faults::default());
    }
    on_one_thread(async {
        let life = begin(&disk, store.path(), calm);
        recover_and_check(&life, &disk, &ledger).await;
    });
    LIVES
}

/// One of four parts of the run, so that they share the cores.
fn run_part(part: u64) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seeds: Vec<u64> = match number("SIM_SEED") {
        Some(seed) if part == 0 => vec![seed],
        Some(_) => Vec::new(),
        None => (0..number("SIM_SEEDS").unwrap_or(SEEDS)).filter(|seed| seed % PARTS == part).collect(),
    };
    let mut crashes = 0;
    for seed in &seeds {
        match std::panic::catch_unwind(|| run_seed(*seed, Planted::default())) {
            Ok(more) => crashes += more,
            Err(panic) => {
                eprintln!("seed {seed} failed; repeat it by: ./x sim --seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    let (first, last) = (seeds.first().unwrap_or(&0), seeds.last().unwrap_or(&0));
    println!("{crashes} simulated crashes over {} seeds from {first} to {last}, no promise broken", seeds.len());
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_1() {
    run_part(0);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_2() {
    run_part(1);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_3() {
    run_part(2);
}

#[test]
fn inv_1_2_3_4_5_and_12_hold_through_simulated_crashes_part_4() {
    run_part(3);
}

/// The seal of the upload before comes while the next one writes: it must leave that one's segment alone.
#[test]
fn inv_1_a_topic_resumed_while_its_files_are_being_sealed_keeps_what_it_was_told() {
    for seed in 0..30 {
        let store = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
        let disk = SimDisk::new(seed, u64::MAX, Faults::default());
        on_one_thread(async {
            let life = begin(&disk, store.path(), Manner { lag: 4 + seed * 6, ..CALM });
            let mut topics = two_topics(&life).await;
            // The first topic's seal keeps the steward busy while the second one is resumed.
            put_one_by_one(&life, &mut topics[0], 6).await;
            put_one_by_one(&life, &mut topics[1], 6).await;
            put_one_by_one(&life, &mut topics[1], 60).await;
            check_topic(&life, &topics[1]).await;
        });
    }
}

/// A sequence `s` with topics `s/a` and `s/b`, for uploads of blobs.
async fn two_topics(life: &Life) -> Vec<TopicLedger> {
    let sequence = life.lifecycle.create_sequence("s".to_owned(), "{}".to_owned(), true).await.expect("created");
    let mut topics = Vec::new();
    for name in ["s/a", "s/b"] {
        let new = NewTopic {
            locator: name.to_owned(),
            ontology_tag: "sim".to_owned(),
            format: Format::Image,
            user_metadata: "{}".to_owned(),
        };
        let record = life.lifecycle.create_topic(UploadKey::Sequence(sequence.id), new).await.expect("created");
        topics.push(TopicLedger {
            id: record.id,
            locator: record.locator,
            rows_per_batch: 2,
            blob_bytes: 14_000,
            sent: 0,
            acked: 0,
            locked: false,
            ending: false,
            lost: false,
        });
    }
    topics
}

/// Every second commit fails while a topic is opened, again and again, and another deleted: afterwards the one
/// can be written, and nothing is left of the other.
#[test]
fn inv_4_and_8_commits_of_unknown_outcome_leave_no_topic_busy_and_no_deletion_half_done() {
    for seed in 0..30 {
        let store = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
        let disk = SimDisk::new(seed, u64::MAX, Faults::default());
        on_one_thread(async {
            let life = begin(&disk, store.path(), Manner { seed, ..CALM });
            let mut topics = two_topics(&life).await;
            put_one_by_one(&life, &mut topics[1], 4).await;
            life.failing_commits.store(500, Ordering::Relaxed);
            let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
            for _ in 0..6 {
                let (locator, id) = (topics[0].locator.clone(), topics[0].id);
                if let Ok(opened) = life.lifecycle.open_upload(locator, id, Arc::clone(&schema), Some(0)).await {
                    // Its end may fail as well, which closes it all the same.
                    life.lifecycle.end_upload(opened.topic.no, End::Leave).await.ok();
                }
            }
            let locator = topics[1].locator.clone();
            while life.lifecycle.delete_topic(locator.clone(), DeleteRule::Anything).await.is_err() {
                if life.lifecycle.catalog.topic_by_locator(&locator).is_ok_and(|topic| topic.is_none()) {
                    break;
                }
            }
            life.failing_commits.store(0, Ordering::Relaxed);
            put_one_by_one(&life, &mut topics[0], 4).await;
            check_topic(&life, &topics[0]).await;
            let left = disk
                .contents()
                .into_keys()
                .filter(|path| path.components().any(|part| part.as_os_str() == topics[1].id.to_string().as_str()));
            assert_eq!(left.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new(), "INV-4: seed {seed}");
        });
    }
}

/// Nothing can be committed any more, and the recorder is told to stop.
#[test]
fn a_recorder_that_ends_does_not_wait_for_a_catalog_that_takes_no_commits() {
    let store = tempfile::tempdir().expect("a folder");
    std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
    let disk = SimDisk::new(1, u64::MAX, Faults::default());
    on_one_thread(async {
        let life = begin(&disk, store.path(), CALM);
        let mut topics = two_topics(&life).await;
        put_one_by_one(&life, &mut topics[0], 4).await;
        let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
        let topic = &topics[0];
        let opened = life.lifecycle.open_upload(topic.locator.clone(), topic.id, schema, Some(4)).await;
        let opened = opened.expect("opened");
        life.failing_commits.store(1000, Ordering::Relaxed);
        for batch in 4..40 {
            let message = Box::new(message(&life, topic, batch).await);
            let lane = life.lifecycle.writers.of(opened.topic.no);
            lane.send(Message::Batch { topic: opened.topic.no, batch: message }).await.expect("sent");
        }
        let ending = life.lifecycle.end_upload(opened.topic.no, End::Leave);
        let stopping = async {
            tokio::time::sleep(Duration::from_secs(30)).await;
            life.health.give_up();
            life.lifecycle.writers.stop().await;
        };
        let ended = tokio::time::timeout(Duration::from_secs(600), async { tokio::join!(ending, stopping) }).await;
        let (told, ()) = ended.expect("it ends");
        // Half of the commits that fail are durable all the same: then it may be told so.
        let (_, durable, _) = life.lifecycle.topic_status(topics[0].locator.clone()).await.unwrap_or_else(|_| {
            let catalog = &life.lifecycle.catalog;
            let record = catalog.topic_by_locator(&topics[0].locator).expect("readable").expect("there");
            let totals = catalog.totals(record.no).expect("readable");
            (record, totals, false)
        });
        assert!(told.is_err() || durable.batches == 40, "told to be durable: {durable:?}");
    });
}

/// A disk that puts writes beside their place and rots at rest: what is read is right or said to be damaged,
/// chunk by chunk, and the recorder starts.
#[test]
fn inv_9_on_a_disk_that_rots_every_chunk_is_right_or_said_to_be_damaged() {
    let (mut right, mut damaged) = (0, 0);
    for seed in 0..60 {
        let store = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(store.path().join("data/sequences")).expect("a folder");
        let mut random = Random::new(seed);
        let disk = SimDisk::new(random.bits(), u64::MAX, Faults::default());
        let ledger = Ledger::default();
        on_one_thread(async {
            let dirs = store.path().join("data/sequences");
            storage::disk::make_dirs(&disk, Path::new("/"), &dirs).await.expect("folders");
            let life = begin(&disk, store.path(), CALM);
            let misdirected = if seed % 2 == 0 { 15 } else { 0 };
            disk.arm(u64::MAX / 2, Faults { misdirected, ..Faults::default() });
            clients(life, Rc::clone(&ledger), random.bits()).await;
        });
        let disk = disk.after_crash(u64::MAX, Faults::default());
        for (path, bytes) in disk.contents() {
            if random.below(2) == 0 && !bytes.is_empty() {
                disk.rot(&path, random.below(bytes.len() as u64) as usize, random.below(8) as u8);
            }
        }
        on_one_thread(async {
            let life = begin(&disk, store.path(), CALM);
            let (catalog, committer) = (&life.lifecycle.catalog, &life.lifecycle.committer);
            let done = recover_all(&life.config, catalog, committer, &life.steward, Receipt::default()).await;
            done.expect("INV-9: the recorder starts");
            let topics: Vec<TopicLedger> =
                ledger.borrow().iter().flat_map(|sequence| sequence.topics.clone()).collect();
            for topic in &topics {
                let Some(record) = catalog.topic_by_locator(&topic.locator).expect("readable") else { continue };
                let view = TopicView::load(&catalog.pin().expect("open").view(), &life.lifecycle.data_dir, record);
                let Some(view) = view.expect("readable") else { continue };
                for place in view.places() {
                    match life.lifecycle.loader.load(&view, place).await {
                        Ok(rows) => {
                            check_rows(topic, &rows.all().expect("rows"));
                            right += 1;
                        }
                        Err(error) => {
                            assert!(error.is_damage(), "{}: {error}", topic.locator);
                            damaged += 1;
                        }
                    }
                }
            }
        });
    }
    assert!(right > 100, "{right} right");
    assert!(damaged > 5, "{damaged} damaged");
}

/// The checks can fail: a planted bug is noticed within 1,000 crashes, by a promise.
#[track_caller]
fn check_noticed(planted: Planted) {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let noticed = (0..1000 / LIVES).find_map(|seed| std::panic::catch_unwind(|| run_seed(seed, planted)).err());
    std::panic::set_hook(quiet);
    let panic = noticed.unwrap_or_else(|| panic!("{planted:?} was not noticed within 1,000 crashes"));
    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(text.contains("INV-"), "noticed, but not by a promise: {text}");
}

#[test]
fn inv_1_an_acknowledgement_before_the_data_is_durable_is_noticed() {
    check_noticed(Planted { disk: Faults { file_syncs_lie: true, ..Faults::default() }, ..Planted::default() });
}

#[test]
fn inv_1_a_chunk_in_a_file_whose_folder_was_not_synced_is_noticed() {
    check_noticed(Planted { disk: Faults { folder_syncs_lie: true, ..Faults::default() }, ..Planted::default() });
}

#[test]
fn inv_2_a_tail_entry_below_the_last_chunk_that_is_replayed_is_noticed() {
    check_noticed(Planted { replays_tail: true, ..Planted::default() });
}
