//! `flightbox reindex`: the skip index computed anew from the segments, compared, and replaced where it
//! differs. The recorder must be stopped: the folder has one owner.

use crate::config::Config;
use crate::daemon::{self, Offline};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use storage::catalog::Look;
use storage::catalog::records::TopicRecord;
use storage::catalog::skip::indexed;
use storage::chunk::record::SkipRecord;
use storage::chunk::stats::collect;
use storage::read::{Place, TopicView};

type AnyError = Box<dyn std::error::Error>;

pub(super) fn run(config: &Config, check: bool) -> Result<ExitCode, AnyError> {
    if !config.data_dir.join("catalog").is_dir() {
        return Err(format!("{} holds no recordings; give --data", config.data_dir.display()).into());
    }
    daemon::offline(config, |offline| async move {
        let mut out = std::io::stdout().lock();
        let (mut topics, mut chunks, mut different) = (0_u64, 0, 0);
        for sequence in offline.catalog.sequences()? {
            for topic in offline.catalog.topics_of(sequence.id)? {
                let locator = topic.locator.clone();
                let found = reindex(config, &offline, topic, check).await?;
                topics += 1;
                chunks += found.chunks;
                different += found.different;
                if found.different > 0 {
                    let done = if check { "differ" } else { "differed and were replaced" };
                    writeln!(out, "{locator}: {} of {} chunks {done}", found.different, found.chunks)?;
                }
            }
        }
        let verdict = match (different, check) {
            (0, _) => "the index is what the segments say",
            (_, true) => "run `flightbox reindex` to replace it",
            (_, false) => "replaced",
        };
        writeln!(out, "{topics} topics, {chunks} chunks, {different} different: {verdict}")?;
        Ok(if check && different > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

struct Found {
    chunks: u64,
    different: u64,
}

async fn reindex(config: &Config, offline: &Offline, topic: TopicRecord, check: bool) -> Result<Found, AnyError> {
    let nothing = Found { chunks: 0, different: 0 };
    let Some(ontology) = offline.catalog.ontology_of(topic.no)? else { return Ok(nothing) };
    let (view, before) = {
        let pin = offline.catalog.pin()?;
        let catalog = pin.view();
        let Some(view) = TopicView::load(&catalog, &config.data_dir, topic.clone())? else { return Ok(nothing) };
        let rows: Vec<u64> = view.chunks().iter().map(|chunk| chunk.first_row).collect();
        let before = indexed(&catalog, topic.no, &ontology, &rows)?;
        (Arc::new(view), before)
    };
    let mut fresh: Vec<SkipRecord> = Vec::with_capacity(before.len());
    for index in 0..view.chunks().len() {
        if std::io::stderr().is_terminal() {
            write!(std::io::stderr(), "\r{}: chunk {} of {}\x1b[K", topic.locator, index + 1, view.chunks().len())?;
        }
        let batch = offline.loader.load(&view, Place::Chunk(index)).await?.all()?;
        fresh.push(SkipRecord { fields: collect(&ontology.stored, &ontology.record.derived, &[batch]) });
    }
    if std::io::stderr().is_terminal() {
        write!(std::io::stderr(), "\r\x1b[K")?;
    }
    let different = fresh.iter().zip(&before).filter(|(fresh, before)| Some(*fresh) != before.as_ref()).count();
    let found = Found { chunks: fresh.len() as u64, different: different as u64 };
    if different > 0 && !check {
        offline.committer.change(move |txn, _| txn.replace_index(&topic, &ontology, &fresh)).await?;
    }
    Ok(found)
}
