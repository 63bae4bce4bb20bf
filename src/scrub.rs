//! Looks for damage: topic by topic when asked, chunk by chunk in the background while nothing else happens.
//!
//! Guarantees: a damaged chunk is marked alone, and from then on left out of reads that say so (INV-9); one
//! that is found whole again is served again; the background pass reads no faster than `scrub_rate` and
//! stands still while anything is recorded.

use crate::flight::service::Shared;
use crate::ingest::committer::CommitHandle;
use crate::lifecycle::{LifecycleError, find_topic};
use crate::when::now_ns;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{DamageRecord, TopicRecord};
use storage::catalog::{Catalog, Look};
use storage::read::Loader;
use storage::verify::{Finding, Looked, Subject};
use tokio::time::Instant;

/// From the end of one background pass to the next.
const PASS_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long the background pass waits before it looks again whether nothing happens.
const BUSY_WAIT: Duration = Duration::from_secs(10);

/// What it takes to look at topics and to mark what is damaged.
#[derive(Clone)]
pub(crate) struct Checker {
    pub(crate) catalog: Catalog,
    pub(crate) committer: CommitHandle,
    pub(crate) loader: Loader,
    pub(crate) data_dir: PathBuf,
}

impl Checker {
    /// The topics of a sequence, or of all, by name.
    pub(crate) fn topics(&self, sequence: Option<&str>) -> Result<Vec<TopicRecord>, StorageError> {
        let sequences = match sequence {
            Some(name) => self.catalog.sequence_by_name(name)?.into_iter().collect(),
            None => self.catalog.sequences()?,
        };
        let mut topics = Vec::new();
        for sequence in sequences {
            topics.extend(self.catalog.topics_of(sequence.id)?);
        }
        Ok(topics)
    }

    /// Looks at a whole topic and marks what is damaged. `see` is told after every chunk.
    pub(crate) async fn topic(&self, locator: &str, mut see: impl FnMut(&Looked)) -> Result<Looked, LifecycleError> {
        let topic = find_topic(&self.catalog, locator)?;
        let no = topic.no;
        let Some(subject) = self.subject(topic)? else { return Ok(Looked { topics: 1, ..Looked::default() }) };
        let mut looked = subject.frame(&self.loader).await;
        for index in 0..subject.chunks() {
            let one = subject.chunk(&self.loader, index).await;
            self.mark(no, &one).await?;
            looked.add(one);
            see(&looked);
        }
        // Recorded, deleted or written on meanwhile: what was compared is no longer so.
        if self.catalog.topic(no)?.is_none() {
            looked.findings.clear();
        }
        Ok(looked)
    }

    fn subject(&self, topic: TopicRecord) -> Result<Option<Subject>, StorageError> {
        Subject::load(&self.catalog.pin()?, &self.data_dir, topic)
    }

    /// Marks what is damaged and takes the mark from what is whole again.
    async fn mark(&self, no: storage::ids::TopicNo, looked: &Looked) -> Result<(), StorageError> {
        let lost: Vec<Finding> =
            looked.findings.iter().filter(|finding| finding.lost_chunk.is_some()).cloned().collect();
        let whole = looked.whole_again.clone();
        if lost.is_empty() && whole.is_empty() {
            return Ok(());
        }
        for finding in &lost {
            tracing::error!(
                topic = %finding.topic,
                file = finding.file.as_ref().map(|file| file.display().to_string()),
                at = finding.at,
                what = %finding.what,
                "a chunk is damaged: it is left out of reads"
            );
        }
        self.loader.forget(no);
        self.committer
            .change(move |txn, _| {
                for first_row in whole {
                    txn.delete(Family::Meta, keys::damaged(no, first_row));
                }
                for finding in lost {
                    let Some(first_row) = finding.lost_chunk else { continue };
                    let chunk: Option<storage::chunk::ChunkRecord> =
                        txn.record(Family::Chunks, &keys::chunk(no, first_row))?;
                    let Some(chunk) = chunk else { continue };
                    let damage = DamageRecord {
                        first_row,
                        end_row: chunk.end_row,
                        time: chunk.time,
                        what: finding.what,
                        found_at_ns: now_ns(),
                    };
                    txn.put(Family::Meta, keys::damaged(no, first_row), &damage)?;
                }
                Ok(())
            })
            .await
    }
}

/// Looks at chunks that reads found damaged, and, while nothing is recorded, at everything.
pub(crate) async fn run(shared: Arc<Shared>) {
    let checker = shared.checker();
    let mut reports = checker.loader.reports();
    let rate = shared.config.scrub_rate;
    let background = async {
        if rate == 0 {
            std::future::pending::<()>().await;
        }
        loop {
            pass(&shared, &checker, rate).await;
            tokio::time::sleep(PASS_INTERVAL).await;
        }
    };
    let reported = async {
        while let Ok((topic, first_row)) = reports.recv().await {
            if let Err(error) = look_again(&checker, topic, first_row).await {
                tracing::warn!(%topic, first_row, %error, "damage that a read met could not be looked at");
            }
        }
    };
    // Cancel-safety: neither ends before the server does.
    tokio::select! {
        () = background => {}
        () = reported => {}
    }
}

/// A chunk that a read found damaged.
async fn look_again(checker: &Checker, no: storage::ids::TopicNo, first_row: u64) -> Result<(), StorageError> {
    let Some(topic) = checker.catalog.topic(no)? else { return Ok(()) };
    let Some(subject) = checker.subject(topic)? else { return Ok(()) };
    let Some(index) = subject.position(first_row) else { return Ok(()) };
    let looked = subject.chunk(&checker.loader, index).await;
    checker.mark(no, &looked).await
}

/// One pass over all locked topics.
async fn pass(shared: &Shared, checker: &Checker, rate: u64) {
    let Ok(topics) = checker.topics(None) else { return };
    let (mut chunks, mut findings) = (0_u64, 0_u64);
    for topic in topics.into_iter().filter(|topic| topic.completed_at_ns.is_some()) {
        let no = topic.no;
        let Ok(Some(subject)) = checker.subject(topic) else { continue };
        let frame = subject.frame(&checker.loader).await;
        for finding in &frame.findings {
            tracing::error!(topic = %finding.topic, part = ?finding.part, at = finding.at, what = %finding.what, "damage found");
        }
        findings += frame.findings.len() as u64;
        for index in 0..subject.chunks() {
            while shared.stats.uploads.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(BUSY_WAIT).await;
            }
            let started = Instant::now();
            let looked = subject.chunk(&checker.loader, index).await;
            // Deleted meanwhile: not damage.
            if !matches!(checker.catalog.topic(no), Ok(Some(_))) {
                break;
            }
            chunks += 1;
            findings += looked.findings.len() as u64;
            if let Err(error) = checker.mark(no, &looked).await {
                tracing::warn!(%error, "damage could not be marked");
            }
            let due = Duration::from_secs_f64(looked.bytes as f64 / rate as f64);
            tokio::time::sleep_until(started + due).await;
        }
    }
    if chunks == 0 {
        return;
    }
    tracing::info!(chunks, findings, "scrub: everything that is finalized was read and checked");
}
