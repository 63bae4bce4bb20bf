//! Looks for damage in the background: chunk by chunk while nothing else happens, and where a read met some.
//!
//! Guarantees: reads no faster than `scrub_rate`, and stands still while anything is recorded. What becomes of
//! damage is `lifecycle::damage`'s.

use crate::flight::service::Shared;
use crate::lifecycle::damage::Checker;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use storage::StorageError;
use storage::catalog::Look;
use storage::ids::TopicNo;
use tokio::time::Instant;

/// From the start to the first background pass: a recorder that was just switched on has other things to do.
const FIRST_WAIT: Duration = Duration::from_secs(600);
/// From the end of one background pass to the next.
const PASS_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long the background pass waits before it looks again whether nothing happens.
const BUSY_WAIT: Duration = Duration::from_secs(10);

/// Looks at chunks that reads found damaged, and, while nothing is recorded, at everything.
pub(crate) async fn run(shared: Arc<Shared>) {
    let checker = shared.checker();
    let mut reports = checker.loader.reports();
    let rate = shared.config.scrub_rate;
    let background = async {
        if rate == 0 {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(FIRST_WAIT).await;
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
async fn look_again(checker: &Checker, no: TopicNo, first_row: u64) -> Result<(), StorageError> {
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
