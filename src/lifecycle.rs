//! Sequences, sessions and topics: which state follows which, and the calls that make it so.
//!
//! Guarantees: names are claimed and states changed inside one committer group, so of two racing
//! creators exactly one wins (INV-8), and *finalize* checks and locks in one step; a locked topic is
//! never opened again (INV-3); a deletion takes the names and rows away in one group, then waits for
//! the rings, then removes the files (INV-4).
//! Knows no gRPC: errors carry facts, `flight::status` gives them codes.

use crate::ingest::committer::{CommitHandle, End, Live, Watermark};
use crate::ingest::steward::StewardHandle;
use crate::ingest::topic::Start;
use crate::ingest::writer::{Message, WriterHandles};
use crate::limits;
use crate::notes::Subject;
use crate::ontology::{Registry, RegistryError};
use crate::when::now_ns;
use arrow::datatypes::SchemaRef;
use std::path::PathBuf;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{
    DeletionRecord, PartialRecord, SequenceRecord, SessionRecord, TopicOntology, TopicRecord, TopicTotals,
};
use storage::catalog::{Catalog, Look, Txn};
use storage::chunk::{BatchMark, Compression, Format, TopicEncoder};
use storage::ids::{SequenceId, SessionId, TopicId, TopicNo};
use storage::ontology::{Difference, Origin, Relation, relate};
use storage::read::{Loader, TopicView};
use storage::schema::TopicSchema;
use tokio::sync::{oneshot, watch};
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

/// A locator taken apart: sequence, and topic path if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) sequence: String,
    pub(crate) topic: Option<String>,
}

impl Locator {
    /// Checks a name from outside. One leading slash is tolerated (clients send it in places), the
    /// sequence is the text before the first slash. Parts become file names under `browse/`.
    pub(crate) fn parse(key: &'static str, text: &str) -> Result<Self> {
        let invalid = |why: &str| LifecycleError::Invalid { key, value: shorten(text), why: why.to_owned() };
        let trimmed = text.trim();
        let name = trimmed.strip_prefix('/').unwrap_or(trimmed);
        if name.is_empty() {
            return Err(invalid("is empty; give `sequence` or `sequence/topic`"));
        }
        if name.len() > limits::LOCATOR_BYTES_MAX {
            return Err(invalid(&format!("is longer than {} bytes", limits::LOCATOR_BYTES_MAX)));
        }
        for part in name.split('/') {
            if part.is_empty() {
                return Err(invalid("has an empty part; remove the doubled or trailing `/`"));
            }
            if part == "." || part == ".." {
                return Err(invalid("has a part `.` or `..`, which is no name"));
            }
            if part.len() > limits::NAME_PART_BYTES_MAX {
                return Err(invalid(&format!("has a part longer than {} bytes", limits::NAME_PART_BYTES_MAX)));
            }
            if part.ends_with(".parquet") {
                return Err(invalid("has a part that ends in `.parquet`: such names belong to files in `browse/`"));
            }
            if part.chars().any(|c| c.is_control() || c == ':' || c == '\\') {
                return Err(invalid("has a control character, `:` or `\\`; use letters, digits, `_`, `-`, `.`"));
            }
        }
        let (sequence, topic) = match name.split_once('/') {
            Some((sequence, topic)) => (sequence, Some(topic.to_owned())),
            None => (name, None),
        };
        Ok(Self { sequence: sequence.to_owned(), topic })
    }

    /// A locator that must name a sequence.
    pub(crate) fn sequence(key: &'static str, text: &str) -> Result<String> {
        let locator = Self::parse(key, text)?;
        match locator.topic {
            None => Ok(locator.sequence),
            Some(_) => {
                Err(LifecycleError::Invalid { key, value: shorten(text), why: "a sequence name has no `/`".to_owned() })
            }
        }
    }

    /// A locator that must name a topic, in its full form `sequence/topic`.
    pub(crate) fn topic(key: &'static str, text: &str) -> Result<String> {
        let locator = Self::parse(key, text)?;
        match locator.topic {
            Some(topic) => Ok(format!("{}/{topic}", locator.sequence)),
            None => Err(LifecycleError::Invalid {
                key,
                value: shorten(text),
                why: "is no topic; give `sequence/topic`".to_owned(),
            }),
        }
    }
}

pub(crate) fn shorten(text: &str) -> String {
    let cut = text.floor_char_boundary(text.len().min(120));
    if cut == text.len() { text.to_owned() } else { format!("{}…", text.get(..cut).unwrap_or("")) }
}

/// Checks an ontology tag from outside: queries split their keys at the first dot.
pub(crate) fn check_tag(key: &'static str, tag: &str) -> Result<()> {
    let most = limits::NAME_PART_BYTES_MAX;
    if tag.is_empty() || tag.contains('.') || tag.chars().any(char::is_control) || tag.len() > most {
        let why = format!("must be a text of 1 to {most} bytes without dots: queries split at the first dot");
        return Err(LifecycleError::Invalid { key, value: shorten(tag), why });
    }
    Ok(())
}

/// Reads a UUID from outside.
pub(crate) fn parse_uuid(key: &'static str, text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| LifecycleError::Invalid {
        key,
        value: shorten(text),
        why: "is not a UUID; use the one that the create action returned".to_owned(),
    })
}

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

/// A topic opened for its one DoPut.
pub(crate) struct Upload {
    pub(crate) topic: TopicRecord,
    pub(crate) schema: Arc<TopicSchema>,
    pub(crate) watermark: watch::Receiver<Watermark>,
    /// Number of the first batch that comes.
    pub(crate) first_batch: u64,
    /// What was durable when it was opened.
    pub(crate) durable: TopicTotals,
    /// What was durable, to compare batches that are sent again with.
    view: Option<Arc<TopicView>>,
}

/// Compares batches that are sent again with those that are durable, chunk by chunk.
pub(crate) struct Overlap {
    view: Option<Arc<TopicView>>,
    topic: String,
    totals: TopicTotals,
    /// Marks of the chunk, or tail, compared last, and the number of its first batch.
    marks: (u64, Vec<BatchMark>),
}

impl Upload {
    /// For the batches below what is durable.
    pub(crate) fn overlap(&self) -> Overlap {
        Overlap {
            view: self.view.clone(),
            topic: self.topic.locator.clone(),
            totals: self.durable,
            marks: (0, Vec::new()),
        }
    }
}

impl Overlap {
    /// Checks that a batch is the durable one of its number.
    pub(crate) async fn check(&mut self, loader: &Loader, batch: u64, sent: BatchMark) -> Result<()> {
        let durable = match self.mark(batch) {
            Some(mark) => mark,
            None => {
                self.load(loader, batch).await?;
                self.mark(batch).ok_or(StorageError::Gone)?
            }
        };
        if durable == sent {
            return Ok(());
        }
        Err(LifecycleError::OtherBatch {
            topic: self.topic.clone(),
            batch,
            durable: durable.rows,
            found: sent.rows,
            batches: self.totals.batches,
            rows: self.totals.rows,
        })
    }

    fn mark(&self, batch: u64) -> Option<BatchMark> {
        let at = usize::try_from(batch.checked_sub(self.marks.0)?).ok()?;
        self.marks.1.get(at).copied()
    }

    async fn load(&mut self, loader: &Loader, batch: u64) -> Result<()> {
        let view = self.view.clone().ok_or(StorageError::Gone)?;
        let chunk = view.chunks().iter().find(|chunk| (chunk.first_batch..chunk.end_batch).contains(&batch));
        self.marks = match chunk {
            Some(chunk) => (chunk.first_batch, loader.marks(&view, chunk).await?),
            None => {
                let first = self.totals.chunk_batches;
                (first, view.tail().iter().flat_map(|run| run.marks.iter().copied()).collect())
            }
        };
        Ok(())
    }
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

    /// Opens a topic for its DoPut and tells its writer. `resume_from`: the number of the first batch that
    /// comes, for a topic that has durable batches.
    pub(crate) async fn open_upload(
        &self,
        locator: String,
        key: TopicId,
        schema: Arc<TopicSchema>,
        resume_from: Option<u64>,
    ) -> Result<Upload> {
        let found = find_topic(&self.catalog, &locator)?;
        // Before the topic is opened: once it is open, nothing of this may fail any more.
        let encoder = TopicEncoder::new(&schema.stored, found.format, self.compression)?;
        let registry = Arc::clone(&self.registry);
        let offered = Registry::offer(&found.ontology_tag, &schema.wire, Origin::FirstUse)?;
        let (watermark, receiver) = watch::channel(Watermark::default());
        let watermark = Arc::new(watermark);
        let for_committer = Arc::clone(&watermark);
        let wire = Arc::clone(&schema.wire);
        let (topic, ontology, totals) = self
            .committer
            .change(move |txn, live| {
                let (topic, totals) = check_upload(txn, live, &locator, key, resume_from)?;
                let begun = if totals.batches > 0 { txn.topic_schema(topic.no)? } else { None };
                let (ontology, note) = registry.admit(txn, offered)?;
                match begun {
                    Some(message) => check_same_upload(&locator, &message, &wire)?,
                    None => {
                        let message = storage::schema::to_ipc(&wire);
                        txn.put_bytes(Family::Topics, keys::topic_schema(topic.no), message);
                        let of_topic = TopicOntology { version: ontology.record.version, note };
                        txn.put(Family::Topics, keys::topic_ontology(topic.no), &of_topic)?;
                    }
                }
                let tail = txn.tail(topic.no, totals.chunk_batches)?.iter().map(|run| run.data_bytes).sum();
                if !live.open(topic.no, for_committer, totals, tail) {
                    return Err(LifecycleError::Busy { topic: locator });
                }
                Ok::<_, LifecycleError>((topic, ontology, totals))
            })
            .await?;
        // From here on nobody else writes the topic: what is durable of it stands still.
        watermark.send_modify(|mark| {
            (mark.rows, mark.batches, mark.bytes) = (totals.rows, totals.batches, totals.data_bytes);
        });
        let begun = self.begun(&topic, &schema);
        let (start, view) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                let no = topic.no;
                self.committer.change(move |_, live| Ok::<_, LifecycleError>(live.close(no))).await?;
                return Err(error);
            }
        };
        let open = Message::Open {
            topic: Box::new(topic.clone()),
            schema: Arc::clone(&schema),
            encoder: Box::new(encoder.with_index(ontology.record.derived.clone())),
            watermark,
            start: Box::new(start),
        };
        self.writers.of(topic.no).send(open).await.map_err(|_| StorageError::Gone)?;
        let first_batch = resume_from.unwrap_or(0);
        Ok(Upload { topic, schema, watermark: receiver, first_batch, durable: totals, view })
    }

    /// What an upload goes on from: the tail, which joins its first chunk, and where the files end.
    fn begun(&self, topic: &TopicRecord, schema: &TopicSchema) -> Result<(Start, Option<Arc<TopicView>>)> {
        let catalog = self.catalog.view();
        let totals = catalog.totals(topic.no)?;
        let segments = catalog.segments(topic.no)?;
        let mut start = Start {
            next: (totals.chunk_batches, totals.chunk_rows),
            segment: segments.iter().map(|segment| segment.no + 1).max().unwrap_or(0),
            ..Start::default()
        };
        if totals.batches == 0 {
            return Ok((start, None));
        }
        let view = TopicView::load(&catalog, &self.data_dir, topic.clone())?.ok_or(StorageError::Gone)?;
        for run in view.tail() {
            let rows = run.unpack(&schema.stored)?;
            if rows.num_rows() > 0 {
                start.tail.push(rows);
            }
            start.marks.extend(&run.marks);
            start.tail_bytes += run.data_bytes;
            start.tail_time = match (start.tail_time, run.time) {
                (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
                (one, other) => one.or(other),
            };
        }
        Ok((start, Some(Arc::new(view))))
    }

    /// Ends an upload and waits until everything of it is durable.
    pub(crate) async fn end_upload(&self, topic: TopicNo, end: End) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let message = Message::End { topic, end, reply };
        self.writers.of(topic).send(message).await.map_err(|_| StorageError::Gone)?;
        Ok(answer.await.map_err(|_| StorageError::Gone)??)
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
        self.link(sequence).await
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
        self.link(sequence).await
    }

    /// Locks the interrupted topics of a session as they are: with what is durable of them. Each says from
    /// then on that it is partial, and has a notification.
    async fn accept_partial(&self, session: SessionRecord) -> Result<()> {
        let topics = self.catalog.topics_of(session.sequence)?;
        for topic in topics.into_iter().filter(|topic| topic.session == session.id && topic.completed_at_ns.is_none()) {
            let totals = self.catalog.totals(topic.no)?;
            match self.catalog.topic_schema(topic.no)? {
                Some(message) => {
                    let schema = Arc::new(TopicSchema::derive(storage::schema::from_ipc(&message)?)?);
                    let upload =
                        self.open_upload(topic.locator.clone(), topic.id, schema, Some(totals.batches)).await?;
                    self.end_upload(upload.topic.no, End::Lock).await?;
                }
                None => self.lock_empty(topic.no).await?,
            }
            let (rows, batches) = (totals.rows, totals.batches);
            let no = topic.no;
            self.committer
                .change(move |txn, _| {
                    let record = PartialRecord { rows, batches, accepted_at_ns: now_ns() };
                    Ok::<_, LifecycleError>(txn.put(Family::Topics, keys::topic_partial(no), &record)?)
                })
                .await?;
            let text =
                format!("finalized as it was: its upload was interrupted after {rows} rows in {batches} batches");
            self.notify(Subject::Topic(topic.locator), "error".to_owned(), text).await?;
        }
        Ok(())
    }

    /// Locks a topic that never had a DoPut.
    async fn lock_empty(&self, no: TopicNo) -> Result<()> {
        self.committer
            .change(move |txn, live| {
                let mut topic = txn.topic(no)?.ok_or(StorageError::Gone)?;
                if live.is_open(no) {
                    return Err(LifecycleError::Busy { topic: topic.locator });
                }
                topic.completed_at_ns = Some(now_ns());
                Ok(txn.put(Family::Topics, keys::topic(no), &topic)?)
            })
            .await
    }

    /// For unattended recorders: finalizes every session that was interrupted, with what is durable of it.
    /// Returns how many.
    pub(crate) async fn finalize_interrupted(&self) -> Result<u64> {
        let mut done = 0;
        for sequence in self.catalog.sequences()? {
            let topics = self.catalog.topics_of(sequence.id)?;
            for session in self.catalog.sessions_of(sequence.id)? {
                if session.completed_at_ns.is_none() && topics.iter().any(|topic| topic.session == session.id) {
                    // One that cannot be finalized must not keep the appliance from starting (INV-9).
                    match self.finalize_session(session.id, true).await {
                        Ok(()) => done += 1,
                        Err(error) => tracing::warn!(session = %session.locator, %error, "not finalized"),
                    }
                }
            }
        }
        Ok(done)
    }

    /// What is durable of a topic, and whether it is being written.
    pub(crate) async fn topic_status(&self, locator: String) -> Result<(TopicRecord, TopicTotals, bool)> {
        self.committer
            .change(move |txn, live| {
                let topic = find_topic(txn, &locator)?;
                let totals = txn.totals(topic.no)?;
                let uploading = live.is_open(topic.no);
                Ok((topic, totals, uploading))
            })
            .await
    }

    /// The lock stands whether or not the links can be made: the next start makes them again.
    async fn link(&self, sequence: SequenceRecord) -> Result<()> {
        let name = sequence.name.clone();
        if let Err(error) = self.steward.link(sequence).await {
            tracing::warn!(sequence = %name, %error, "browse links not made; the next start tries again");
        }
        Ok(())
    }

    /// v0: removes an unlocked sequence and everything in it.
    pub(crate) async fn abort_sequence(&self, name: String, key: SequenceId) -> Result<()> {
        let removed = self
            .committer
            .change(move |txn, live| {
                let sequence = find_sequence(txn, &name)?;
                check_sequence_key(&sequence, key)?;
                check_deletable(txn, &sequence, DeleteRule::Unlocked)?;
                remove_sequence(txn, live, &sequence)
            })
            .await?;
        self.sweep(removed).await
    }

    /// Removes a sequence and everything in it.
    pub(crate) async fn delete_sequence(&self, name: String, rule: DeleteRule) -> Result<()> {
        let removed = self
            .committer
            .change(move |txn, live| {
                let sequence = find_sequence(txn, &name)?;
                check_deletable(txn, &sequence, rule)?;
                remove_sequence(txn, live, &sequence)
            })
            .await?;
        self.sweep(removed).await
    }

    /// Removes a session with its topics; the sequence stays.
    pub(crate) async fn delete_session(
        &self,
        find: impl FnOnce(&Txn<'_>) -> Result<SessionRecord> + Send + 'static,
    ) -> Result<()> {
        let removed = self
            .committer
            .change(move |txn, live| {
                let session = find(txn)?;
                let topics: Vec<TopicRecord> =
                    txn.topics_of(session.sequence)?.into_iter().filter(|topic| topic.session == session.id).collect();
                let removed = remove_topics(txn, live, &topics, topic_folders(&topics))?;
                txn.delete_session(&session);
                Ok::<_, LifecycleError>(removed)
            })
            .await?;
        self.sweep(removed).await
    }

    /// Removes a topic.
    pub(crate) async fn delete_topic(&self, locator: String, rule: DeleteRule) -> Result<()> {
        let removed = self
            .committer
            .change(move |txn, live| {
                let topic = find_topic(txn, &locator)?;
                if rule == DeleteRule::Unlocked && topic.completed_at_ns.is_some() {
                    let remedy = "topic_delete of this protocol generation takes unlocked topics only";
                    return Err(LifecycleError::Locked { what: "topic", name: locator, remedy });
                }
                let topics = [topic];
                let folders = topic_folders(&topics);
                remove_topics(txn, live, &topics, folders)
            })
            .await?;
        self.sweep(removed).await
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

/// Whether a sequence counts as locked: it has sessions and all are finalized.
pub(crate) fn is_locked(sessions: &[SessionRecord]) -> bool {
    !sessions.is_empty() && sessions.iter().all(|session| session.completed_at_ns.is_some())
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

fn check_upload(
    look: &impl Look,
    live: &Live,
    locator: &str,
    key: TopicId,
    resume_from: Option<u64>,
) -> Result<(TopicRecord, TopicTotals)> {
    let topic = find_topic(look, locator)?;
    if topic.id != key {
        return Err(LifecycleError::WrongKey { what: "topic", name: locator.to_owned(), key: key.0 });
    }
    if topic.completed_at_ns.is_some() {
        let remedy = "create another topic for more rows";
        return Err(LifecycleError::Locked { what: "topic", name: locator.to_owned(), remedy });
    }
    if live.is_open(topic.no) {
        return Err(LifecycleError::Busy { topic: locator.to_owned() });
    }
    let totals = look.totals(topic.no)?;
    let (rows, batches) = (totals.rows, totals.batches);
    match resume_from {
        None if batches > 0 => Err(LifecycleError::HasRows { topic: locator.to_owned(), rows, batches }),
        Some(resume_from) if resume_from > batches => {
            Err(LifecycleError::Gap { topic: locator.to_owned(), resume_from, rows, batches })
        }
        _ => Ok((topic, totals)),
    }
}

fn check_same_upload(locator: &str, begun: &[u8], wire: &SchemaRef) -> Result<()> {
    match relate(&storage::schema::from_ipc(begun)?, wire) {
        Relation::Same => Ok(()),
        Relation::Compatible { difference } | Relation::Changed { difference } => {
            Err(LifecycleError::OtherUpload { topic: locator.to_owned(), difference })
        }
    }
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
    txn.put(Family::Sessions, keys::session(session.id), &session)?;
    Ok(())
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
    txn.delete_sequence(sequence);
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

    #[track_caller]
    fn check(text: &str, expected: Option<(&str, Option<&str>)>) {
        let parsed = Locator::parse("locator", text).ok();
        let expected = expected
            .map(|(sequence, topic)| Locator { sequence: sequence.to_owned(), topic: topic.map(str::to_owned) });
        assert_eq!(parsed, expected, "{text:?}");
    }

    #[test]
    fn locators_split_at_the_first_slash() {
        check("seq", Some(("seq", None)));
        check("/seq", Some(("seq", None)));
        check("seq/a/b", Some(("seq", Some("a/b"))));
    }

    #[test]
    fn unsafe_names_are_refused() {
        for text in
            ["a/000000.parquet", "", "/", "//x", "a//b", "a/", "..", "a/../b", "a/.", "a\0b", "a/\n", "a:b", "a\\b"]
        {
            check(text, None);
        }
        check(&"x".repeat(256), None);
        check(&"x".repeat(255), Some((&"x".repeat(255), None)));
    }

    #[test]
    fn a_sequence_without_sessions_is_not_locked() {
        assert!(!is_locked(&[]));
    }
}
