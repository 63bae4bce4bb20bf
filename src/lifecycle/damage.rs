//! Damage: topics compared with what was written, and what becomes of chunks that differ.
//!
//! Guarantees: a damaged chunk is marked alone, and from then on left out of reads that say so (INV-9); one
//! that is found whole again is served again. Nothing of a file is changed.

use super::{LifecycleError, find_topic};
use crate::ingest::committer::CommitHandle;
use crate::when::now_ns;
use std::path::PathBuf;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{DamageRecord, TopicRecord};
use storage::catalog::{Catalog, Look};
use storage::chunk::ChunkRecord;
use storage::ids::TopicNo;
use storage::read::Loader;
use storage::verify::{Finding, Looked, Subject};

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

    pub(crate) fn subject(&self, topic: TopicRecord) -> Result<Option<Subject>, StorageError> {
        Subject::load(&self.catalog.pin()?, &self.data_dir, topic)
    }

    /// Marks what is damaged and takes the mark from what is whole again.
    pub(crate) async fn mark(&self, no: TopicNo, looked: &Looked) -> Result<(), StorageError> {
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
                    let chunk: Option<ChunkRecord> = txn.record(Family::Chunks, &keys::chunk(no, first_row))?;
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
