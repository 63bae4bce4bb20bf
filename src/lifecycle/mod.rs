//! Sequences, sessions and topics: which state follows which, and the calls that make it so.
//!
//! Guarantees: names are claimed and states changed inside one committer group, so of two racing
//! creators exactly one wins (INV-8), and *finalize* checks and locks in one step; a locked topic is
//! never opened again (INV-3); a deletion takes the names and rows away in one group, then waits for
//! the rings, then removes the files (INV-4).
//! Knows no gRPC: errors carry facts, `flight::status` gives them codes.

pub(crate) mod api_keys;
pub(crate) mod damage;
pub(crate) mod names;
pub(crate) mod notes;
pub(crate) mod upload;

pub(crate) use names::{Locator, check_tag, parse_uuid, shorten};

use crate::ingest::committer::{CommitHandle, Live};
use crate::ingest::steward::StewardHandle;
pub(crate) use crate::ingest::steward::is_locked;
use crate::ingest::writer::{Message, WriterHandles};
use crate::limits;
use crate::ontology::{Registry, RegistryError};
use crate::when::now_ns;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{DeletionRecord, SequenceRecord, SessionRecord, TopicRecord};
use storage::catalog::{Catalog, Look, Txn};
use storage::chunk::{Compression, Format};
use storage::ids::{SequenceId, SessionId, TopicId, TopicNo};
use storage::ontology::Difference;
use storage::read::Loader;
use tokio::sync::oneshot;
use uuid::Uuid;

/// Why a call on a sequence, session or topic was refused.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum LifecycleError {
    #[error("{what} `{name}` already exists; choose another name or delete it first")]
    AlreadyExists { what: &'static str, name: String },
    #[error("{what} `{name}` does not exist")]
    NotFound { what: &'static str, name: String },
    #[error("the key {key} does not belong to {what} `{name}`; use the one that its create action returned")]
    WrongKey { what: &'static str, name: String, key: Uuid },
    #[error("topic `{topic}` does not lie in sequence `{sequence}`; name it `{sequence}/…`")]
    OutsideSequence { topic: String, sequence: String },
    #[error("{what} `{name}` is finalized and never changes; {remedy}")]
    Locked { what: &'static str, name: String, remedy: &'static str },
    #[error("topic `{topic}` is not locked ({rows} rows are durable): end its DoPut cleanly, or abort")]
    TopicUnlocked { topic: String, rows: u64 },
    #[error("topic `{topic}` is being written by another DoPut; one stream writes a topic")]
    Busy { topic: String },
    #[error(
        "topic `{topic}` already has {rows} durable rows in {batches} batches from an earlier DoPut: \
         go on with \"resume_from\": {batches} in the descriptor, finalize with \"accept_partial\": true, or abort"
    )]
    HasRows { topic: String, rows: u64, batches: u64 },
    #[error(
        "topic `{topic}` has {batches} durable batches ({rows} rows), and the stream begins with batch {resume_from}: \
         the batches between would be missing; resume from {batches} or before"
    )]
    Gap { topic: String, resume_from: u64, rows: u64, batches: u64 },
    #[error(
        "batch {batch} of topic `{topic}` is durable with {durable} rows, and the one sent again differs from it \
         ({found} rows); batches are sent again as they were, or from batch {batches} (row {rows}) on"
    )]
    OtherBatch { topic: String, batch: u64, durable: u32, found: u32, batches: u64, rows: u64 },
    #[error("topic `{topic}` was begun with another schema: {difference}; resume with the schema of its first DoPut")]
    OtherUpload { topic: String, difference: Difference },
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{what} are at their limit of {most}; {remedy}")]
    Full { what: &'static str, most: usize, remedy: &'static str },
    #[error("{key} = {value:?}: {why}")]
    Invalid { key: &'static str, value: String, why: String },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

type Result<T> = std::result::Result<T, LifecycleError>;

/// What a topic is created with.
#[derive(Debug, Clone)]
pub(crate) struct NewTopic {
    pub(crate) locator: String,
    pub(crate) ontology_tag: String,
    pub(crate) format: Format,
    pub(crate) user_metadata: String,
}

/// The key that allows creating a topic.
#[derive(Debug, Clone, Copy)]
pub(crate) enum UploadKey {
    /// v0: the sequence's id.
    Sequence(SequenceId),
    /// The session's id.
    Session(SessionId),
}

/// Whether finalized things may be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeleteRule {
    /// v0: only what is not locked.
    Unlocked,
    /// The session protocol: anything, any time.
    Anything,
}

/// The calls. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Lifecycle {
    pub(crate) catalog: Catalog,
    pub(crate) committer: CommitHandle,
    pub(crate) writers: WriterHandles,
    pub(crate) steward: StewardHandle,
    pub(crate) loader: Loader,
    pub(crate) compression: Compression,
    pub(crate) registry: Arc<Registry>,
    pub(crate) data_dir: PathBuf,
}

/// What a deletion took away.
struct Removed {
    ticket: [u8; 16],
    folders: Vec<String>,
    /// The topics, and whether each was being written.
    topics: Vec<(TopicNo, bool)>,
}

impl Lifecycle {
    /// Creates a sequence; for v0 with its hidden session.
    pub(crate) async fn create_sequence(
        &self,
        name: String,
        user_metadata: String,
        v0: bool,
    ) -> Result<SequenceRecord> {
        self.committer
            .change(move |txn, _| {
                if txn.sequence_by_name(&name)?.is_some() {
                    return Err(LifecycleError::AlreadyExists { what: "sequence", name });
                }
                let id = SequenceId::random();
                let session = v0.then(|| new_session(id, &name));
                let record = SequenceRecord {
                    id,
                    name,
                    user_metadata,
                    created_at_ns: now_ns(),
                    v0_session: session.as_ref().map(|session| session.id),
                };
                txn.put_sequence(&record)?;
                if let Some(session) = &session {
                    txn.put_session(session)?;
                }
                Ok(record)
            })
            .await
    }

    /// Opens a session of a sequence.
    pub(crate) async fn create_session(&self, sequence: String) -> Result<SessionRecord> {
        self.committer
            .change(move |txn, _| {
                let sequence = find_sequence(txn, &sequence)?;
                let session = new_session(sequence.id, &sequence.name);
                txn.put_session(&session)?;
                Ok(session)
            })
            .await
    }

    /// Creates a topic under a key.
    pub(crate) async fn create_topic(&self, key: UploadKey, new: NewTopic) -> Result<TopicRecord> {
        self.committer
            .change(move |txn, _| {
                let session = match key {
                    UploadKey::Session(id) => txn
                        .session(id)?
                        .ok_or_else(|| LifecycleError::NotFound { what: "session", name: id.to_string() })?,
                    UploadKey::Sequence(id) => {
                        let unknown = || LifecycleError::NotFound { what: "sequence", name: id.to_string() };
                        let sequence = txn.sequence(id)?.ok_or_else(unknown)?;
                        let session = sequence.v0_session.map(|session| txn.session(session)).transpose()?.flatten();
                        session.ok_or_else(unknown)?
                    }
                };
                let sequence = txn
                    .sequence(session.sequence)?
                    .ok_or_else(|| LifecycleError::NotFound { what: "sequence", name: session.sequence.to_string() })?;
                if new.locator.split_once('/').is_none_or(|(name, _)| name != sequence.name) {
                    return Err(LifecycleError::OutsideSequence { topic: new.locator, sequence: sequence.name });
                }
                if session.completed_at_ns.is_some() {
                    let remedy = "topics are created before it is finalized; open a new session";
                    return Err(LifecycleError::Locked { what: "session", name: session.locator, remedy });
                }
                if txn.topic_by_locator(&new.locator)?.is_some() {
                    return Err(LifecycleError::AlreadyExists { what: "topic", name: new.locator });
                }
                let record = TopicRecord {
                    no: txn.take_topic_no()?,
                    id: TopicId::random(),
                    sequence: sequence.id,
                    session: session.id,
                    locator: new.locator,
                    ontology_tag: new.ontology_tag,
                    format: new.format,
                    user_metadata: new.user_metadata,
                    created_at_ns: now_ns(),
                    completed_at_ns: None,
                };
                txn.put_topic(&record)?;
                Ok(record)
            })
            .await
    }

    /// v0: locks a sequence whose topics are all locked.
    pub(crate) async fn finalize_sequence(&self, name: String, key: SequenceId, partial: bool) -> Result<()> {
        if partial {
            let sequence = find_sequence(&self.catalog, &name)?;
            check_sequence_key(&sequence, key)?;
            self.accept_partial(v0_session(&self.catalog, &sequence)?).await?;
        }
        let sequence = self
            .committer
            .change(move |txn, _| {
                let sequence = find_sequence(txn, &name)?;
                check_sequence_key(&sequence, key)?;
                let session = v0_session(txn, &sequence)?;
                lock_session(txn, session, "sequence", &sequence.name)?;
                Ok::<_, LifecycleError>(sequence)
            })
            .await?;
        self.settle(sequence).await
    }

    /// Locks a session whose topics are all locked.
    pub(crate) async fn finalize_session(&self, id: SessionId, partial: bool) -> Result<()> {
        if partial && let Some(session) = self.catalog.session(id)? {
            self.accept_partial(session).await?;
        }
        let sequence = self
            .committer
            .change(move |txn, _| {
                let unknown = || LifecycleError::NotFound { what: "session", name: id.to_string() };
                let session = txn.session(id)?.ok_or_else(unknown)?;
                let sequence = txn.sequence(session.sequence)?.ok_or_else(unknown)?;
                let name = session.locator.clone();
                lock_session(txn, session, "session", &name)?;
                Ok::<_, LifecycleError>(sequence)
            })
            .await?;
        self.settle(sequence).await
    }

    /// The lock stands whether or not manifest and links can be made: the next start makes them again.
    async fn settle(&self, sequence: SequenceRecord) -> Result<()> {
        let name = sequence.name.clone();
        if let Err(error) = self.steward.settle(sequence).await {
            tracing::warn!(sequence = %name, %error, "manifest or links not made; the next start tries again");
        }
        Ok(())
    }

    /// v0: removes an unlocked sequence and everything in it.
    pub(crate) async fn abort_sequence(&self, name: String, key: SequenceId) -> Result<()> {
        self.remove(move |txn, live| {
            let sequence = find_sequence(txn, &name)?;
            check_sequence_key(&sequence, key)?;
            check_deletable(txn, &sequence, DeleteRule::Unlocked)?;
            remove_sequence(txn, live, &sequence)
        })
        .await
    }

    /// Removes a sequence and everything in it.
    pub(crate) async fn delete_sequence(&self, name: String, rule: DeleteRule) -> Result<()> {
        self.remove(move |txn, live| {
            let sequence = find_sequence(txn, &name)?;
            check_deletable(txn, &sequence, rule)?;
            remove_sequence(txn, live, &sequence)
        })
        .await
    }

    /// Removes a session with its topics; the sequence stays.
    pub(crate) async fn delete_session(
        &self,
        find: impl FnOnce(&Txn<'_>) -> Result<SessionRecord> + Send + 'static,
    ) -> Result<()> {
        self.remove(move |txn, live| {
            let session = find(txn)?;
            let topics: Vec<TopicRecord> =
                txn.topics_of(session.sequence)?.into_iter().filter(|topic| topic.session == session.id).collect();
            let removed = remove_topics(txn, live, &topics, topic_folders(&topics))?;
            txn.delete_session(&session);
            Ok::<_, LifecycleError>(removed)
        })
        .await
    }

    /// Removes a topic.
    pub(crate) async fn delete_topic(&self, locator: String, rule: DeleteRule) -> Result<()> {
        self.remove(move |txn, live| {
            let topic = find_topic(txn, &locator)?;
            if rule == DeleteRule::Unlocked && topic.completed_at_ns.is_some() {
                let remedy = "topic_delete of this protocol generation takes unlocked topics only";
                return Err(LifecycleError::Locked { what: "topic", name: locator, remedy });
            }
            let topics = [topic];
            let folders = topic_folders(&topics);
            remove_topics(txn, live, &topics, folders)
        })
        .await
    }

    /// Takes keys away in one group, then what they named. A commit of unknown outcome is asked about until the
    /// catalog answers: a deletion that is durable is carried out.
    async fn remove(
        &self,
        change: impl FnOnce(&mut Txn<'_>, &mut Live) -> Result<Removed> + Send + 'static,
    ) -> Result<()> {
        let made: Arc<Mutex<Option<Removed>>> = Arc::default();
        let told = Arc::clone(&made);
        let changed = self
            .committer
            .change(move |txn, live| {
                let removed = change(txn, live)?;
                *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(removed);
                Ok::<_, LifecycleError>(())
            })
            .await;
        let removed = made.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (changed, removed) {
            (Ok(()), Some(removed)) => self.sweep(removed).await,
            (Ok(()), None) => Ok(()),
            (Err(error), Some(removed)) if self.is_durable(removed.ticket).await => {
                tracing::warn!(%error, "a deletion whose commit failed is durable: it is carried out");
                self.sweep(removed).await
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Whether a deletion's record is in the catalog, once that answers again.
    async fn is_durable(&self, ticket: [u8; 16]) -> bool {
        for _ in 0..limits::UNKNOWN_OUTCOME_TRIES {
            let known = self
                .committer
                .change(move |txn, _| Ok::<_, StorageError>(txn.get(Family::Meta, &keys::deletion(&ticket))?.is_some()))
                .await;
            if let Ok(known) = known {
                return known;
            }
            tokio::time::sleep(limits::REOPEN_PAUSE_MIN).await;
        }
        // The next start finds its record, if it is there.
        false
    }

    /// After the keys are gone: the rings, the caches, then the files.
    async fn sweep(&self, removed: Removed) -> Result<()> {
        for (topic, written) in removed.topics {
            let (reply, quiet) = oneshot::channel();
            let forget = Message::Forget { topic, written, reply };
            if self.writers.of(topic).send(forget).await.is_ok() {
                quiet.await.ok(); // A writer that stopped has nothing in its ring.
            }
            self.loader.forget(topic);
        }
        Ok(self.steward.remove(removed.ticket, removed.folders).await?)
    }
}

fn new_session(sequence: SequenceId, name: &str) -> SessionRecord {
    SessionRecord {
        id: SessionId::random(),
        locator: format!("{name}:{}", ulid::Ulid::generate()),
        sequence,
        created_at_ns: now_ns(),
        completed_at_ns: None,
    }
}

/// The sequence of a name, or NOT_FOUND.
pub(crate) fn find_sequence(look: &impl Look, name: &str) -> Result<SequenceRecord> {
    look.sequence_by_name(name)?.ok_or_else(|| LifecycleError::NotFound { what: "sequence", name: name.to_owned() })
}

/// The topic of a locator, or NOT_FOUND.
pub(crate) fn find_topic(look: &impl Look, locator: &str) -> Result<TopicRecord> {
    look.topic_by_locator(locator)?.ok_or_else(|| LifecycleError::NotFound { what: "topic", name: locator.to_owned() })
}

fn check_sequence_key(sequence: &SequenceRecord, key: SequenceId) -> Result<()> {
    if sequence.id == key {
        return Ok(());
    }
    Err(LifecycleError::WrongKey { what: "sequence", name: sequence.name.clone(), key: key.0 })
}

fn v0_session(look: &impl Look, sequence: &SequenceRecord) -> Result<SessionRecord> {
    let session = sequence.v0_session.map(|id| look.session(id)).transpose()?.flatten();
    session.ok_or_else(|| LifecycleError::Invalid {
        key: "name",
        value: sequence.name.clone(),
        why: "was created by the session protocol; use session_finalize".to_owned(),
    })
}

fn lock_session(txn: &mut Txn<'_>, mut session: SessionRecord, what: &'static str, name: &str) -> Result<()> {
    if session.completed_at_ns.is_some() {
        let remedy = "it was finalized before";
        return Err(LifecycleError::Locked { what, name: name.to_owned(), remedy });
    }
    for topic in txn.topics_of(session.sequence)? {
        if topic.session == session.id && topic.completed_at_ns.is_none() {
            let rows = txn.totals(topic.no)?.rows;
            return Err(LifecycleError::TopicUnlocked { topic: topic.locator, rows });
        }
    }
    session.completed_at_ns = Some(now_ns());
    Ok(txn.put_session(&session)?)
}

fn check_deletable(look: &impl Look, sequence: &SequenceRecord, rule: DeleteRule) -> Result<()> {
    if rule == DeleteRule::Unlocked && is_locked(&look.sessions_of(sequence.id)?) {
        let remedy = "this call takes unlocked sequences only";
        return Err(LifecycleError::Locked { what: "sequence", name: sequence.name.clone(), remedy });
    }
    Ok(())
}

fn remove_sequence(txn: &mut Txn<'_>, live: &mut Live, sequence: &SequenceRecord) -> Result<Removed> {
    let topics = txn.topics_of(sequence.id)?;
    let folders = vec![format!("browse/{}", sequence.name), format!("sequences/{}", sequence.id)];
    let removed = remove_topics(txn, live, &topics, folders)?;
    for session in txn.sessions_of(sequence.id)? {
        txn.delete_session(&session);
    }
    txn.delete_sequence(sequence)?;
    Ok(removed)
}

fn topic_folders(topics: &[TopicRecord]) -> Vec<String> {
    topics
        .iter()
        .flat_map(|topic| [format!("browse/{}/*", topic.locator), format!("sequences/{}/{}", topic.sequence, topic.id)])
        .collect()
}

fn remove_topics(txn: &mut Txn<'_>, live: &mut Live, topics: &[TopicRecord], folders: Vec<String>) -> Result<Removed> {
    let mut closed = Vec::with_capacity(topics.len());
    for topic in topics {
        closed.push((topic.no, live.close(topic.no)));
        txn.delete_topic(topic)?;
    }
    let record = DeletionRecord { ticket: *Uuid::new_v4().as_bytes(), folders };
    txn.put(Family::Meta, keys::deletion(&record.ticket), &record)?;
    Ok(Removed { ticket: record.ticket, folders: record.folders, topics: closed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_without_sessions_is_not_locked() {
        assert!(!is_locked(&[]));
    }
}
