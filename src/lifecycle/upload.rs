//! Uploads of a topic: begun, resumed, ended, or accepted as they are.
//!
//! Guarantees: a topic is written by one upload at a time, by the holder of its key (INV-8), never when it
//! is locked (INV-3); a resumed upload appends behind what is durable exactly once (INV-2): batches sent
//! again are compared and dropped, a gap is refused.

use super::notes::Subject;
use super::{Lifecycle, LifecycleError, find_topic};
use crate::ingest::committer::{End, Live, Watermark};
use crate::ingest::topic::Start;
use crate::ingest::writer::Message;
use crate::limits;
use crate::ontology::Registry;
use crate::when::now_ns;
use arrow::datatypes::SchemaRef;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{PartialRecord, SessionRecord, TopicOntology, TopicRecord, TopicTotals};
use storage::catalog::{Look, Txn};
use storage::chunk::{BatchMark, Compression};
use storage::ids::{TopicId, TopicNo};
use storage::ontology::{Origin, Relation, relate};
use storage::read::{Loader, TopicView};
use storage::schema::TopicSchema;
use storage::segment::TopicFacts;
use tokio::sync::{oneshot, watch};

type Result<T> = std::result::Result<T, LifecycleError>;

/// Where an upload begins, what is durable of it, and what its files say of themselves.
type Begun = (Start, Option<Arc<TopicView>>, TopicFacts);

/// A topic opened for its one DoPut.
pub(crate) struct Upload {
    pub(crate) topic: TopicRecord,
    pub(crate) schema: Arc<TopicSchema>,
    pub(crate) watermark: watch::Receiver<Watermark>,
    /// The first cause of its failure. A channel of its own: a stream that only waits for this is not woken by every
    /// watermark.
    pub(crate) failed: watch::Receiver<Option<StorageError>>,
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

impl Lifecycle {
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
        // Checked when the topic was made.
        let asked = compression_asked(&found.user_metadata).ok().flatten();
        let compression = Compression::of_topic(found.format, self.compression, asked);
        let encoder = schema.encoder(compression)?;
        let registry = Arc::clone(&self.registry);
        let offered = Registry::offer(&found.ontology_tag, &schema.wire, Origin::FirstUse)?;
        let (watermark, receiver) = watch::channel(Watermark::default());
        let watermark = Arc::new(watermark);
        let for_committer = Arc::clone(&watermark);
        let (fails, failed) = watch::channel(None);
        let wire = Arc::clone(&schema.wire);
        let (topic, ontology, totals) = self
            .committer
            .change(move |txn, live| {
                let (topic, totals) = check_upload(txn, live, &locator, key, resume_from)?;
                let begun = if totals.batches > 0 { txn.topic_schema(topic.no)? } else { None };
                let tail = txn.tail(topic.no, totals.chunk_batches)?.iter().map(|run| run.data_bytes).sum();
                // What comes behind a new version in the registry must not fail: the version would be known in
                // memory and not in the catalog.
                let ontology = match begun {
                    Some(message) => {
                        check_same_upload(&locator, &message, &wire)?;
                        let version = txn.topic_ontology(topic.no)?.map(|of_topic| of_topic.version);
                        registry.get(&topic.ontology_tag, version).ok_or(StorageError::Gone)?
                    }
                    None => {
                        let (ontology, note) = registry.admit(txn, offered)?;
                        let message = storage::schema::to_ipc(&wire);
                        txn.put_bytes(Family::Topics, keys::topic_schema(topic.no), message);
                        let of_topic = TopicOntology { version: ontology.record.version, note };
                        txn.put(Family::Topics, keys::topic_ontology(topic.no), &of_topic)?;
                        ontology
                    }
                };
                // Left by a crash while the topic was being accepted as it was.
                txn.delete(Family::Topics, keys::topic_partial(topic.no));
                if !live.open(topic.no, for_committer, totals, tail) {
                    return Err(LifecycleError::Busy { topic: locator });
                }
                Ok::<_, LifecycleError>((topic, ontology, totals))
            })
            .await?;
        // From here on nobody else writes the topic: what is durable of it stands still.
        watermark.send_replace(Watermark { rows: totals.rows, batches: totals.batches, bytes: totals.data_bytes });
        let begun = self.begun(&topic, &schema);
        let (start, view, facts) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.abandon(topic.no).await?;
                return Err(error);
            }
        };
        let open = Message::Open {
            facts: Arc::new(facts),
            schema: Arc::clone(&schema),
            encoder: Box::new(encoder.with_index(ontology.record.derived.clone())),
            fails,
            start: Box::new(start),
        };
        self.writers.of(topic.no).send(open).await.map_err(|_| StorageError::Gone)?;
        let first_batch = resume_from.unwrap_or(0);
        Ok(Upload { topic, schema, watermark: receiver, failed, first_batch, durable: totals, view })
    }

    /// Closes a topic that was opened and cannot be written.
    async fn abandon(&self, no: TopicNo) -> Result<()> {
        for _ in 0..limits::UNKNOWN_OUTCOME_TRIES {
            match self.committer.change(move |_, live| Ok::<_, LifecycleError>(live.close(no))).await {
                Ok(true) => return Ok(()),
                // Deleted meanwhile: the deletion waits for this upload's `Open`, which will not come.
                Ok(false) => {
                    let told = self.writers.of(no).send(Message::Abandon { topic: no }).await;
                    return Ok(told.map_err(|_| StorageError::Gone)?);
                }
                // The catalog takes no changes now: it must not stay open for nobody.
                Err(_) => tokio::time::sleep(limits::REOPEN_PAUSE_MIN).await,
            }
        }
        Err(LifecycleError::Storage(StorageError::Gone))
    }

    /// What an upload goes on from: the tail, which joins its first chunk, and where the files end.
    fn begun(&self, topic: &TopicRecord, schema: &TopicSchema) -> Result<Begun> {
        let pin = self.catalog.pin()?;
        let catalog = pin.view();
        let facts = TopicFacts::load(&catalog, topic)?.ok_or(StorageError::Gone)?;
        let totals = catalog.totals(topic.no)?;
        let segments = catalog.segments(topic.no)?;
        let mut start = Start {
            next: (totals.chunk_batches, totals.chunk_rows),
            segment: segments.iter().map(|segment| segment.no + 1).max().unwrap_or(0),
            ..Start::default()
        };
        if totals.batches == 0 {
            return Ok((start, None, facts));
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
        Ok((start, Some(Arc::new(view)), facts))
    }

    /// Ends an upload and waits until everything of it is durable.
    pub(crate) async fn end_upload(&self, topic: TopicNo, end: End) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let message = Message::End { topic, end, reply };
        self.writers.of(topic).send(message).await.map_err(|_| StorageError::Gone)?;
        Ok(answer.await.map_err(|_| StorageError::Gone)??)
    }

    /// Locks the interrupted topics of a session as they are: with what is durable of them. Each says from
    /// then on that it is partial, and has a notification.
    pub(super) async fn accept_partial(&self, session: SessionRecord) -> Result<()> {
        let topics = self.catalog.topics_of(session.sequence)?;
        for topic in topics.into_iter().filter(|topic| topic.session == session.id && topic.completed_at_ns.is_none()) {
            let totals = self.catalog.totals(topic.no)?;
            match self.catalog.topic_schema(topic.no)? {
                Some(message) => {
                    let schema = Arc::new(TopicSchema::derive(storage::schema::from_ipc(&message)?)?);
                    let upload =
                        self.open_upload(topic.locator.clone(), topic.id, schema, Some(totals.batches)).await?;
                    // Before the lock: no crash may leave a locked topic that does not say so.
                    let marked = self.mark_partial(topic.no, totals).await;
                    let end = if marked.is_ok() { End::Lock } else { End::Leave };
                    self.end_upload(upload.topic.no, end).await?;
                    marked?;
                }
                None => self.lock_empty(topic.no).await?,
            }
            let (rows, batches) = (totals.rows, totals.batches);
            let text =
                format!("finalized as it was: its upload was interrupted after {rows} rows in {batches} batches");
            self.notify(Subject::Topic(topic.locator), "error".to_owned(), text).await?;
        }
        Ok(())
    }

    async fn mark_partial(&self, no: TopicNo, totals: TopicTotals) -> Result<()> {
        self.committer.change(move |txn, _| put_partial(txn, no, totals)).await
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
                put_partial(txn, no, TopicTotals::default())?;
                Ok(txn.put(Family::Topics, keys::topic(no), &topic)?)
            })
            .await
    }

    /// Closes the tail of a topic that nobody writes into a chunk. It stays unlocked, to be resumed.
    pub(crate) async fn close_tail(&self, topic: TopicRecord) -> Result<()> {
        let totals = self.catalog.totals(topic.no)?;
        let Some(message) = self.catalog.topic_schema(topic.no)? else { return Ok(()) };
        let schema = Arc::new(TopicSchema::derive(storage::schema::from_ipc(&message)?)?);
        let upload = self.open_upload(topic.locator, topic.id, schema, Some(totals.batches)).await?;
        self.end_upload(upload.topic.no, End::Close).await
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
}

fn put_partial(txn: &mut Txn<'_>, no: TopicNo, totals: TopicTotals) -> Result<()> {
    let record = PartialRecord { rows: totals.rows, batches: totals.batches, accepted_at_ns: now_ns() };
    Ok(txn.put(Family::Topics, keys::topic_partial(no), &record)?)
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

/// Key of a topic's user metadata that says how its pages are compressed.
const COMPRESSION_KEY: &str = "flightbox:compression";

/// The compression that a topic's user metadata asks for, if it does.
pub(crate) fn compression_asked(user_metadata: &str) -> std::result::Result<Option<Compression>, String> {
    let metadata: serde_json::Value = serde_json::from_str(user_metadata).unwrap_or_default();
    match metadata.get(COMPRESSION_KEY) {
        None => Ok(None),
        Some(asked) => match asked.as_str().and_then(Compression::from_name) {
            Some(compression) => Ok(Some(compression)),
            None => Err(format!("`{COMPRESSION_KEY}` in user_metadata is {asked}, none of none, lz4, zstd")),
        },
    }
}
