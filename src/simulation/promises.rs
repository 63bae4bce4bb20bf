//! Every promise against the ledger of what clients sent and were told, after a recovery and after the loss of
//! the whole catalog.

use super::world::*;
use crate::recovery::recover_all;
use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use std::path::Path;
use std::sync::Arc;
use storage::catalog::records::TopicRecord;
use storage::catalog::skip::indexed;
use storage::catalog::{Catalog, Look, Simulated};
use storage::ids::TopicId;
use storage::read::{RowStream, TopicView, Window};
use storage::rebuild::rebuild;
use storage::recover::Receipt;
use storage::sim::SimDisk;

pub(super) async fn check(life: &Life, ledger: &Ledger) {
    let sequences = ledger.borrow().clone();
    for sequence in sequences {
        let known = life.lifecycle.catalog.sequence_by_name(&sequence.name).expect("readable");
        match (sequence.gone, known.is_some()) {
            (Gone::Told, known) => {
                assert!(!known, "INV-4: {} was aborted and is there", sequence.name);
                continue;
            }
            (Gone::Asked, false) => continue,
            (Gone::No, false) if sequence.lost => continue,
            (Gone::No, known) => assert!(known, "INV-1: {} was created and is gone", sequence.name),
            (Gone::Asked, true) => {}
        }
        for topic in sequence.topics.iter().filter(|topic| !topic.lost) {
            check_topic(life, topic).await;
        }
    }
}

pub(super) async fn check_topic(life: &Life, topic: &TopicLedger) {
    let catalog = &life.lifecycle.catalog;
    let record = catalog.topic_by_locator(&topic.locator).expect("readable");
    let record = record.unwrap_or_else(|| panic!("INV-1: {} was created and is gone", topic.locator));
    let totals = catalog.totals(record.no).expect("readable");
    let name = &topic.locator;
    assert!(topic.acked <= totals.batches, "INV-1: {name}: {} batches told, {} durable", topic.acked, totals.batches);
    assert!(totals.batches <= topic.sent, "INV-2: {name}: {} batches sent, {} durable", topic.sent, totals.batches);
    assert_eq!(totals.rows, totals.batches * topic.rows_per_batch, "INV-2: {name}");
    let locked = record.completed_at_ns.is_some();
    assert!(locked || !topic.locked, "INV-1: {name} was told to be locked and is not");
    assert!(!locked || topic.ending, "INV-12: {name} is locked without a clean end");
    if locked {
        assert_eq!(totals.batches, topic.sent, "INV-12: {name} is locked without all of its batches");
    }
    let pin = catalog.pin().expect("open");
    let view = TopicView::load(&pin.view(), &life.lifecycle.data_dir, record).expect("readable");
    drop(pin);
    let Some(view) = view else {
        assert_eq!(totals.batches, 0, "INV-1: {name} has no schema");
        return;
    };
    let mut stream = RowStream::new(Arc::new(view), life.lifecycle.loader.clone(), Window::default(), 1 << 20);
    let mut next = 0;
    while let Some(batch) = stream.next().await.unwrap_or_else(|error| panic!("INV-1: {name}: {error}")) {
        let times = batch.column(0).as_primitive::<Int64Type>();
        let values = batch.column(1).as_primitive::<Int64Type>();
        let blobs = batch.column(2).as_binary::<i32>();
        for row in 0..batch.num_rows() {
            assert_eq!(times.value(row), next, "INV-2: {name}");
            assert_eq!(values.value(row), value(next), "INV-1: {name}, row {next}");
            assert!(blobs.value(row).iter().all(|byte| *byte == next as u8), "INV-1: {name}, row {next}");
            next += 1;
        }
    }
    assert_eq!(next as u64, totals.rows, "INV-2: {name}");
}

/// Recovers, checks, and recovers again, which must change nothing (INV-5).
pub(super) async fn recover_and_check(life: &Life, disk: &SimDisk, ledger: &Ledger) {
    let recover = async || {
        let (catalog, committer) = (&life.lifecycle.catalog, &life.lifecycle.committer);
        let done = recover_all(&life.config, catalog, committer, &life.steward, Receipt::default()).await;
        done.expect("INV-9: recovery ends");
    };
    recover().await;
    check(life, ledger).await;
    let before = disk.contents();
    recover().await;
    assert!(before == disk.contents(), "INV-5: a second recovery changed a file");
    check(life, ledger).await;
}

/// The catalog is gone: another is made from the files. Returns what clients were told and is lost with it.
pub(super) async fn lose_catalog(disk: &SimDisk, store: &Path, ledger: &Ledger) {
    let old = open_catalog(store, CALM, &Arc::default());
    let fresh = store.join("fresh");
    let new = Catalog::open_small(&fresh, Simulated::default()).expect("a new catalog");
    // A file that the crash met before its head was durable says nothing of itself and is set aside: what had
    // committed chunks is checked below.
    rebuild(disk, &volumes(store), &new, 0, &mut |_| {}).await.expect("INV-9: it is made again");
    let mut ledger = ledger.borrow_mut();
    for sequence in ledger.iter_mut() {
        let known = new.sequence(sequence.id).expect("readable").is_some();
        assert!(known || !sequence.finalized, "INV-9: {} was finalized and did not come back", sequence.name);
        if known && sequence.gone != Gone::No {
            // Its deletion was known to the catalog alone, if its files are still there.
            sequence.gone = if sequence.gone == Gone::Told { Gone::Told } else { Gone::Asked };
        }
        for topic in &mut sequence.topics {
            let before = old.topic_by_id(topic.id).expect("readable");
            let after = new.topic_by_id(topic.id).expect("readable");
            let chunks = |look: &Catalog, record: &Option<TopicRecord>| match record {
                Some(record) => look.totals(record.no).expect("readable").chunk_batches,
                None => 0,
            };
            let (had, has) = (chunks(&old, &before), chunks(&new, &after));
            assert!(had <= has, "INV-9: {}: {had} batches were in chunks, {has} came back", topic.locator);
            if sequence.finalized {
                assert_eq!(before, after, "INV-9: {} came back changed", topic.locator);
                check_index(&old, &new, topic.id);
            }
            // Without a chunk there is no file that could tell of it.
            topic.lost |= after.is_none() && !sequence.finalized;
            let locked = after.is_some_and(|after| after.completed_at_ns.is_some());
            if !locked {
                // Only tails may be missing, and what only the catalog knew.
                topic.acked = topic.acked.min(has);
                topic.locked = false;
            }
        }
        sequence.lost |= !known;
    }
    drop((old, new));
    std::fs::remove_dir_all(store.join("catalog")).expect("removed");
    std::fs::rename(&fresh, store.join("catalog")).expect("renamed");
}

/// The skip index of a finalized topic is the same as before.
pub(super) fn check_index(old: &Catalog, new: &Catalog, topic: TopicId) {
    let of = |catalog: &Catalog| {
        let pin = catalog.pin().expect("open");
        let look = pin.view();
        let Some(record) = look.topic_by_id(topic).expect("readable") else { return Vec::new() };
        let Some(ontology) = look.ontology_of(record.no).expect("readable") else { return Vec::new() };
        let rows: Vec<u64> = look.chunks(record.no).expect("readable").iter().map(|chunk| chunk.first_row).collect();
        indexed(&look, record.no, &ontology, &rows).expect("readable")
    };
    assert_eq!(of(old), of(new), "INV-6: the index came back changed");
}

pub(super) fn check_rows(topic: &TopicLedger, rows: &RecordBatch) {
    let times = rows.column(0).as_primitive::<Int64Type>();
    let values = rows.column(1).as_primitive::<Int64Type>();
    let blobs = rows.column(2).as_binary::<i32>();
    for row in 0..rows.num_rows() {
        let time = times.value(row);
        assert_eq!(values.value(row), value(time), "INV-9: {}, row {time}", topic.locator);
        let whole =
            blobs.value(row).len() == topic.blob_bytes && blobs.value(row).iter().all(|byte| *byte == time as u8);
        assert!(whole, "INV-9: {}, row {time}", topic.locator);
    }
}
