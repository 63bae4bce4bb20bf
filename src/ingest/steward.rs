//! The steward: the thread that seals, links and removes files, in the order it was asked to.
//!
//! Guarantees: a seal asked for before a link is done before it, so what `browse/` shows is whole.
//! Its work delays no acknowledgement: nobody waits for it but who asked for its result.

use crate::ingest::committer::CommitHandle;
use crate::limits;
use std::path::PathBuf;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{SequenceRecord, TopicRecord};
use storage::catalog::skip::plan_fold;
use storage::catalog::{Catalog, Look};
use storage::disk::{Disk, IoCounters};
use storage::ids::TopicNo;
use storage::recover;
use tokio::sync::{mpsc, oneshot};

type Outcome = Result<(), StorageError>;

pub(crate) enum Job {
    /// Seal a topic's segments below a number, or all.
    Seal { topic: Box<TopicRecord>, below: Option<u32>, reply: Option<oneshot::Sender<Outcome>> },
    /// Pack the index of a topic that is not being written.
    Fold { topic: TopicNo, reply: oneshot::Sender<Outcome> },
    /// Make the readable names of a locked sequence.
    Link { sequence: Box<SequenceRecord>, reply: oneshot::Sender<Outcome> },
    /// Remove the folders of a deletion, then its record.
    Remove { ticket: [u8; 16], folders: Vec<String>, reply: oneshot::Sender<Outcome> },
}

/// The way to the steward.
#[derive(Clone)]
pub(crate) struct StewardHandle {
    jobs: mpsc::Sender<Job>,
}

impl StewardHandle {
    /// A handle and the end that [`serve`] takes.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Job>) {
        let (jobs, receiver) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
        (Self { jobs }, receiver)
    }

    /// Asks for a seal without waiting for it.
    pub(crate) async fn seal(&self, topic: TopicRecord, below: Option<u32>) {
        // A steward that stopped leaves the segment open; recovery seals it.
        self.jobs.send(Job::Seal { topic: Box::new(topic), below, reply: None }).await.ok();
    }

    /// Seals what a crash left open of a topic, and waits.
    pub(crate) async fn seal_recovered(&self, topic: TopicRecord, locked: bool) -> Outcome {
        let below = if locked { None } else { Some(u32::MAX) };
        self.ask(|reply| Job::Seal { topic: Box::new(topic), below, reply: Some(reply) }).await
    }

    /// Packs the index of a topic that is not being written, and waits.
    pub(crate) async fn fold(&self, topic: TopicNo) -> Outcome {
        self.ask(|reply| Job::Fold { topic, reply }).await
    }

    /// Links a sequence and waits.
    pub(crate) async fn link(&self, sequence: SequenceRecord) -> Outcome {
        self.ask(|reply| Job::Link { sequence: Box::new(sequence), reply }).await
    }

    /// Removes folders and waits.
    pub(crate) async fn remove(&self, ticket: [u8; 16], folders: Vec<String>) -> Outcome {
        self.ask(|reply| Job::Remove { ticket, folders, reply }).await
    }

    async fn ask(&self, job: impl FnOnce(oneshot::Sender<Outcome>) -> Job) -> Outcome {
        let stopped =
            || StorageError::Directory("the server is stopping; the work is finished at the next start".to_owned());
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

/// What the steward works with.
pub(crate) struct Context {
    pub(crate) catalog: Catalog,
    pub(crate) committer: CommitHandle,
    pub(crate) data_dir: PathBuf,
    pub(crate) counters: Arc<IoCounters>,
}

/// Does jobs one after another until all handles are gone.
pub(crate) async fn serve<D: Disk>(disk: D, mut jobs: mpsc::Receiver<Job>, context: Context) {
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Seal { topic, below, reply } => {
                let result = seal(&disk, &context, &topic, below).await;
                match reply {
                    Some(reply) => {
                        reply.send(result).ok(); // Who asked may have gone; the seal stands.
                    }
                    None => {
                        if let Err(error) = result {
                            tracing::warn!(topic = %topic.locator, %error, "segment not sealed; the next start tries again");
                        }
                    }
                }
            }
            Job::Fold { topic, reply } => {
                let result = fold(&context, topic, true).await;
                reply.send(result).ok(); // As above.
            }
            Job::Link { sequence, reply } => {
                let result = recover::link_browse(&disk, &context.catalog, &context.data_dir, &sequence).await;
                reply.send(result).ok(); // As above.
            }
            Job::Remove { ticket, folders, reply } => {
                let result = remove(&disk, &context, ticket, &folders).await;
                reply.send(result).ok(); // As above.
            }
        }
    }
}

async fn seal<D: Disk>(disk: &D, context: &Context, topic: &TopicRecord, below: Option<u32>) -> Outcome {
    let sealed =
        recover::seal_topic(disk, &context.catalog, &context.data_dir, topic, below, &context.counters).await?;
    let no = topic.no;
    context
        .committer
        .change(move |txn, _| {
            // A topic deleted meanwhile gets no record back.
            if txn.topic(no)?.is_some() {
                for record in &sealed {
                    txn.put(Family::Segments, keys::segment(no, record.no), record)?;
                }
            }
            Ok::<_, StorageError>(())
        })
        .await?;
    fold(context, no, below.is_none_or(|below| below == u32::MAX)).await
}

/// Packs what lies apart of a topic's index: whole blocks while it is written, the rest at its end.
async fn fold(context: &Context, topic: TopicNo, everything: bool) -> Outcome {
    let Some(ontology) = context.catalog.ontology_of(topic)? else {
        return Ok(());
    };
    match plan_fold(&context.catalog, topic, &ontology, everything)? {
        Some(fold) => context.committer.change(move |txn, _| txn.put_fold(fold)).await,
        None => Ok(()),
    }
}

async fn remove<D: Disk>(disk: &D, context: &Context, ticket: [u8; 16], folders: &[String]) -> Outcome {
    recover::remove_folders(disk, &context.data_dir, folders).await?;
    context
        .committer
        .change(move |txn, _| {
            txn.delete(Family::Meta, keys::deletion(&ticket));
            Ok(())
        })
        .await
}
