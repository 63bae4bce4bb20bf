//! Clients of a simulated recorder: they create, upload, resume, finalize and abort, and note what they were
//! told.

use super::world::*;
use crate::ingest::committer::End;
use crate::ingest::topic::Batch;
use crate::ingest::writer::Message;
use crate::lifecycle::{NewTopic, UploadKey};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::chunk::hash::batch_hash;
use storage::chunk::{BatchMark, Format, data_bytes};
use storage::ids::SequenceId;
use storage::schema::TopicSchema;
use storage::sim::Random;

/// Clients go on with what was interrupted and record something new, until the crash.
pub(super) async fn clients(life: Life, ledger: Ledger, seed: u64) {
    let mut random = Random::new(seed);
    let mut uploads = Vec::new();
    let open: Vec<(usize, usize)> = {
        let ledger = ledger.borrow();
        let all = ledger.iter().enumerate().filter(|(_, sequence)| sequence.gone == Gone::No && !sequence.finalized);
        all.filter(|(_, sequence)| !sequence.lost)
            .flat_map(|(at, sequence)| (0..sequence.topics.len()).map(move |topic| (at, topic)))
            .filter(|(at, topic)| !ledger[*at].topics[*topic].locked && !ledger[*at].topics[*topic].lost)
            .collect()
    };
    for (sequence, topic) in open {
        if random.below(2) == 0 {
            let upload = upload(life.clone(), Rc::clone(&ledger), sequence, topic, random.bits());
            uploads.push(tokio::task::spawn_local(upload));
        }
    }
    let name = format!("s{}", ledger.borrow().len());
    if let Ok(record) = life.lifecycle.create_sequence(name.clone(), "{}".to_owned(), true).await {
        let at = ledger.borrow().len();
        ledger.borrow_mut().push(SequenceLedger {
            id: record.id,
            name: name.clone(),
            topics: Vec::new(),
            gone: Gone::No,
            finalized: false,
            lost: false,
        });
        for index in 0..1 + random.below(3) {
            let format = if random.below(2) == 0 { Format::Image } else { Format::Default };
            let new = NewTopic {
                locator: format!("{name}/t{index}"),
                ontology_tag: "sim".to_owned(),
                format,
                user_metadata: "{}".to_owned(),
            };
            let Ok(topic) = life.lifecycle.create_topic(UploadKey::Sequence(record.id), new).await else { return };
            let big = random.below(2) == 0;
            let (rows_per_batch, blob_bytes) = if big { (2, 9000) } else { (1 + random.below(20), 30) };
            let entry = TopicLedger {
                id: topic.id,
                locator: topic.locator,
                rows_per_batch,
                blob_bytes,
                sent: 0,
                acked: 0,
                locked: false,
                ending: false,
                lost: false,
            };
            ledger.borrow_mut()[at].topics.push(entry);
            let upload = upload(life.clone(), Rc::clone(&ledger), at, index as usize, random.bits());
            uploads.push(tokio::task::spawn_local(upload));
        }
        if random.below(5) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(30))).await;
            ledger.borrow_mut()[at].gone = Gone::Asked;
            if life.lifecycle.abort_sequence(name.clone(), record.id).await.is_ok() {
                ledger.borrow_mut()[at].gone = Gone::Told;
            }
        }
    }
    for upload in uploads {
        upload.await.expect("an upload's task");
    }
    let whole: Vec<(usize, String, SequenceId)> = ledger
        .borrow()
        .iter()
        .enumerate()
        .filter(|(_, s)| {
            s.gone == Gone::No && !s.finalized && !s.lost && s.topics.iter().all(|topic| topic.locked || topic.lost)
        })
        .map(|(at, sequence)| (at, sequence.name.clone(), sequence.id))
        .collect();
    for (at, name, id) in whole {
        if life.lifecycle.finalize_sequence(name, id, false).await.is_ok() {
            ledger.borrow_mut()[at].finalized = true;
        }
    }
}

/// One upload; one that ends without a lock is often resumed at once, while its files are being sealed.
pub(super) async fn upload(life: Life, ledger: Ledger, sequence: usize, topic: usize, seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..4 {
        let left = upload_once(&life, &ledger, sequence, topic, random.bits()).await;
        if !left || random.below(4) == 0 {
            return;
        }
    }
}

/// Returns whether the topic was left unlocked.
pub(super) async fn upload_once(life: &Life, ledger: &Ledger, sequence: usize, topic: usize, seed: u64) -> bool {
    let mut random = Random::new(seed);
    let entry = ledger.borrow()[sequence].topics[topic].clone();
    let Ok((_, durable, _)) = life.lifecycle.topic_status(entry.locator.clone()).await else { return false };
    let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
    let opened = life.lifecycle.open_upload(entry.locator.clone(), entry.id, schema, Some(durable.batches)).await;
    let Ok(opened) = opened else { return false };
    {
        // What was sent before and is not durable, this upload makes anew.
        let mut ledger = ledger.borrow_mut();
        let topic = &mut ledger[sequence].topics[topic];
        topic.sent = durable.batches;
        topic.ending = false;
    }
    let mut watermark = opened.watermark.clone();
    let told = Rc::clone(ledger);
    let watcher = tokio::task::spawn_local(async move {
        while watermark.changed().await.is_ok() {
            let batches = watermark.borrow_and_update().batches;
            let mut ledger = told.borrow_mut();
            let topic = &mut ledger[sequence].topics[topic];
            topic.acked = topic.acked.max(batches);
        }
    });
    let lane = life.lifecycle.writers.of(opened.topic.no).clone();
    for batch in durable.batches..durable.batches + 1 + random.below(25) {
        let message = message(life, &entry, batch).await;
        {
            let mut ledger = ledger.borrow_mut();
            let topic = &mut ledger[sequence].topics[topic];
            topic.sent = topic.sent.max(batch + 1);
        }
        if lane.send(Message::Batch { topic: opened.topic.no, batch: Box::new(message) }).await.is_err() {
            return false;
        }
        if random.below(3) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        }
    }
    let end = if random.below(3) == 0 { End::Leave } else { End::Lock };
    ledger.borrow_mut()[sequence].topics[topic].ending |= end == End::Lock;
    let ended = life.lifecycle.end_upload(opened.topic.no, end).await;
    if ended.is_ok() && end == End::Lock {
        let mut ledger = ledger.borrow_mut();
        let topic = &mut ledger[sequence].topics[topic];
        topic.locked = true;
        topic.acked = topic.sent;
    }
    watcher.abort();
    ended.is_ok() && end == End::Leave
}

/// A batch as the front hands it to a writer.
pub(super) async fn message(life: &Life, topic: &TopicLedger, batch: u64) -> Batch {
    let rows = rows(topic, batch);
    let bytes = data_bytes(&rows);
    let time = (batch * topic.rows_per_batch) as i64;
    Batch {
        mark: BatchMark { rows: rows.num_rows() as u32, hash: batch_hash(&rows) },
        data_bytes: bytes,
        time: Some((time, time + topic.rows_per_batch as i64 - 1)),
        sorted: true,
        permit: life.budget.receive.claim(bytes).await,
        decode_permit: None,
        arrived: Instant::now(),
        sent: Instant::now(),
        rows,
    }
}

/// An upload that is left unlocked, each batch sent when the one before is durable.
pub(super) async fn put_one_by_one(life: &Life, topic: &mut TopicLedger, count: u64) {
    let schema = Arc::new(TopicSchema::derive(schema()).expect("a schema"));
    let opened = life.lifecycle.open_upload(topic.locator.clone(), topic.id, schema, Some(topic.sent)).await;
    let opened = opened.expect("opened");
    let mut watermark = opened.watermark.clone();
    let lane = life.lifecycle.writers.of(opened.topic.no).clone();
    for batch in topic.sent..topic.sent + count {
        let message = message(life, topic, batch).await;
        lane.send(Message::Batch { topic: opened.topic.no, batch: Box::new(message) }).await.expect("sent");
        let mut failed = opened.failed.clone();
        tokio::select! {
            durable = watermark.wait_for(|mark| mark.batches > batch) => drop(durable.expect("told")),
            failed = failed.wait_for(Option::is_some) => drop(failed.expect("told")),
        }
        topic.acked = watermark.borrow().batches;
    }
    topic.sent += count;
    life.lifecycle.end_upload(opened.topic.no, End::Leave).await.expect("left");
}
