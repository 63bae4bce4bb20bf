//! The committer with a catalog of its own: outcomes, waits, and what follows a lost commit.

use super::*;
use crate::samples::every_type;
use std::sync::atomic::{AtomicU32, Ordering};
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{TopicRecord, TopicTotals};
use storage::catalog::{Fate, Look, Simulated};
use storage::chunk::{BatchMark, Format};
use storage::ids::{SequenceId, SessionId, TopicId, TopicNo};
use storage::tail::TailRun;
use tokio::sync::{oneshot, watch};

fn run_of(first_batch: u64) -> TailRun {
    let rows = every_type(2);
    let marks = vec![BatchMark { rows: 2, hash: 7 }];
    TailRun::pack(&rows, first_batch, 2 * first_batch, marks, 100, None).expect("packed")
}

#[test]
fn of_the_runs_that_share_an_entry_each_has_its_own_outcome() {
    let folder = tempfile::tempdir().expect("a folder");
    let catalog = Catalog::open(folder.path(), false).expect("a catalog");
    let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
    let (committer, thread) = start(catalog.clone(), Duration::ZERO, stats, health).expect("a thread");
    let (first, second) = (TopicNo(1), TopicNo(2));
    let (watermarks, mut marks): (Vec<_>, Vec<_>) = (0..2).map(|_| watch::channel(Watermark::default())).unzip();
    let watermarks: Vec<_> = watermarks.into_iter().map(Arc::new).collect();
    futures::executor::block_on(async {
        let opening = watermarks.clone();
        let opened = committer.change(move |_, live| {
            for (topic, watermark) in [first, second].into_iter().zip(opening) {
                live.open(topic, watermark, TopicTotals::default(), 0);
            }
            Ok::<_, StorageError>(())
        });
        opened.await.expect("opened");
        // One of a topic that nobody writes, one that leaves a hole (INV-2).
        let runs = vec![(first, run_of(0)), (TopicNo(3), run_of(0)), (second, run_of(1)), (second, run_of(0))];
        let (reply, answer) = oneshot::channel();
        committer.tails(runs, reply).await.expect("queued");
        let outcomes = answer.await.expect("answered");
        let [Ok(()), Err(StorageError::Gone), Err(StorageError::Catalog { .. }), Ok(())] = &outcomes[..] else {
            panic!("{outcomes:?}");
        };
    });
    let told: Vec<_> = marks.iter_mut().map(|mark| mark.borrow().batches).collect();
    assert_eq!(told, [1, 1]);
    let tail = |topic| catalog.tail(topic, 0).expect("a tail").len();
    assert_eq!((tail(first), tail(second), tail(TopicNo(3))), (1, 1, 0));
    drop(committer);
    thread.join().expect("ended");
}

#[tokio::test(start_paused = true)]
async fn after_a_crowd_of_changes_the_next_waits_for_others_and_one_alone_waits_for_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let catalog = Catalog::open_small(folder.path(), Simulated::default()).expect("a catalog");
    let (committer, lane) = pair();
    let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
    let committing = run(catalog, lane, limits::COMMIT_SPACING_MAX, stats, health);
    let (crowd, spacing) = (limits::COMMIT_CROWD, limits::COMMIT_CROWD_SPACING);
    let changing = async {
        for (changes, waits) in [
            (crowd - 1, Duration::ZERO),
            (1, Duration::ZERO),
            (crowd, Duration::ZERO),
            (1, spacing),
            (1, Duration::ZERO),
        ] {
            let asked = tokio::time::Instant::now();
            let change = |_| committer.change(|_, _| Ok::<_, StorageError>(()));
            futures::future::try_join_all((0..changes).map(change)).await.expect("changed");
            let waited = asked.elapsed();
            assert!((waits..waits + spacing).contains(&waited), "{changes}: {waited:?} instead of {waits:?}");
        }
    };
    tokio::select! {
        () = changing => {}
        () = committing => unreachable!("handles are there"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_end_that_a_lost_deletion_refused_is_tried_again_and_closes_the_topic() {
    let no = TopicNo(1);
    let topic = TopicRecord {
        no,
        id: TopicId::random(),
        sequence: SequenceId::random(),
        session: SessionId::random(),
        locator: "drive/imu".to_owned(),
        ontology_tag: "imu".to_owned(),
        format: Format::Default,
        user_metadata: "{}".to_owned(),
        created_at_ns: 0,
        completed_at_ns: None,
    };
    // The first commit makes the topic, the second is lost.
    let commits = AtomicU32::new(0);
    let fate = move || if commits.fetch_add(1, Ordering::Relaxed) == 1 { Fate::Lost } else { Fate::Done };
    let folder = tempfile::tempdir().expect("a folder");
    let simulated = Simulated { fate: Some(Box::new(fate)), ..Simulated::default() };
    let catalog = Catalog::open_small(folder.path(), simulated).expect("a catalog");
    let (committer, lane) = pair();
    let (stats, health) = (Arc::new(Stats::default()), Arc::new(Health::default()));
    let committing = run(catalog, lane, Duration::ZERO, stats, health);
    let (watermark, _mark) = watch::channel(Watermark::default());
    let uploading = async {
        let open = committer.change(move |txn, live| {
            live.open(no, Arc::new(watermark), TopicTotals::default(), 0);
            txn.put_topic(&topic)
        });
        open.await.expect("opened");
        // In one group: both are queued before the committer runs again.
        let delete = committer.change(move |txn, live| {
            live.close(no);
            txn.delete(Family::Topics, keys::topic(no));
            Ok::<_, StorageError>(())
        });
        let end = async {
            let (reply, answer) = oneshot::channel();
            committer.end(no, End::Leave, reply).await.expect("queued");
            answer.await.expect("answered")
        };
        let (deleted, ended) = tokio::join!(delete, end);
        assert!(deleted.is_err(), "its outcome is unknown");
        assert!(ended.is_ok(), "{ended:?}");
        committer.change(move |_, live| Ok::<_, StorageError>(live.is_open(no))).await.expect("asked")
    };
    tokio::select! {
        is_open = uploading => assert!(!is_open),
        () = committing => unreachable!("handles are there"),
    }
}
