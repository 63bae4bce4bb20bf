//! The steward: the thread that seals, links and removes files, in the order it was asked to, and brings
//! what a crash left to rest.
//!
//! Guarantees: a seal asked for before a link is done before it, so what `browse/` shows is whole.
//! Its work delays no acknowledgement: nobody waits for it but who asked for its result.

use crate::health::Health;
use crate::ingest::committer::{CommitHandle, Live};
use crate::limits;
use futures::future::join_all;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{DeletionRecord, SegmentRecord, SequenceRecord, SessionRecord, TopicRecord};
use storage::catalog::skip::{Fold, plan_fold};
use storage::catalog::{Catalog, Look, Txn};
use storage::disk::{Disk, IoCounters};
use storage::ids::{SequenceId, TopicNo};
use storage::ontology::Ontology;
use storage::reclaim::Reclaim;
use storage::recover::{self, TopicReceipt};
use storage::volumes::{Orphan, OrphanKind, Volumes};
use storage::{StorageError, found, manifest, segment};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};

type Outcome = Result<(), StorageError>;

pub(crate) enum Job {
    /// Bring what a crash left of a topic to rest.
    Recover { topic: Box<TopicRecord>, reply: oneshot::Sender<Result<TopicReceipt, StorageError>> },
    /// Remove what no record owns.
    Orphans { unsettled: Vec<SequenceRecord>, reply: oneshot::Sender<Result<Vec<PathBuf>, StorageError>> },
    /// Seal a topic's segments below a number, or all.
    Seal(Seal),
    /// Pack the index of a topic that is not being written.
    Fold { topic: TopicNo, reply: oneshot::Sender<Outcome> },
    /// Make manifest and readable names of a locked sequence.
    Settle { sequence: Box<SequenceRecord>, reply: oneshot::Sender<Outcome> },
    /// Remove the folders of a deletion, then its record.
    Remove { ticket: [u8; 16], folders: Vec<String>, reply: oneshot::Sender<Outcome> },
}

/// What [`Job::Seal`] asks for. Nobody waits for it; a later job may rely on it.
pub(crate) struct Seal {
    topic: Box<TopicRecord>,
    below: Option<u32>,
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
        self.jobs.send(Job::Seal(Seal { topic: Box::new(topic), below })).await.ok();
    }

    /// Brings what a crash left of a topic to rest, and waits.
    pub(crate) async fn recover(&self, topic: TopicRecord) -> Result<TopicReceipt, StorageError> {
        self.ask(|reply| Job::Recover { topic: Box::new(topic), reply }).await
    }

    /// Removes what no record owns, and waits.
    pub(crate) async fn orphans(&self, unsettled: Vec<SequenceRecord>) -> Result<Vec<PathBuf>, StorageError> {
        self.ask(|reply| Job::Orphans { unsettled, reply }).await
    }

    /// Packs the index of a topic that is not being written, and waits.
    pub(crate) async fn fold(&self, topic: TopicNo) -> Outcome {
        self.ask(|reply| Job::Fold { topic, reply }).await
    }

    /// Makes manifest and links of a locked sequence, and waits.
    pub(crate) async fn settle(&self, sequence: SequenceRecord) -> Outcome {
        self.ask(|reply| Job::Settle { sequence: Box::new(sequence), reply }).await
    }

    /// Removes folders and waits.
    pub(crate) async fn remove(&self, ticket: [u8; 16], folders: Vec<String>) -> Outcome {
        self.ask(|reply| Job::Remove { ticket, folders, reply }).await
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StorageError>>) -> Job,
    ) -> Result<T, StorageError> {
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
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) counters: Arc<IoCounters>,
    pub(crate) health: Arc<Health>,
    pub(crate) turns: Turns,
    pub(crate) reclaim: Reclaim,
    pub(crate) last_ontology: LastOntology,
}

/// What seals that are made side by side take in turns.
#[derive(Debug)]
pub(crate) struct Turns {
    /// Held by the one that writes a manifest.
    manifests: Mutex<()>,
    /// A permit for each chunk whose records and statistics are in memory for a footer; a topic with more takes all.
    chunks: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self { manifests: Mutex::default(), chunks: Semaphore::new(limits::SEAL_CHUNKS_AT_ONCE as usize) }
    }
}

impl Context {
    fn data_dir(&self) -> &Path {
        self.volumes.data_dir()
    }

    /// Whether work that met a full disk may be tried again: the reserve is free for it.
    async fn has_room_now(&self, result: &Outcome, topic: Option<&TopicRecord>) -> bool {
        if !result.as_ref().is_err_and(StorageError::is_full_disk) {
            return false;
        }
        let path = result.as_ref().err().and_then(StorageError::path);
        let volume = match topic {
            Some(topic) => self.volumes.index_of(topic),
            None => path.map_or(0, |path| self.volumes.of_path(path)),
        };
        self.health.reserve_released(volume).await
    }
}

/// Does jobs one after another until all handles are gone; seals that wait behind each other side by side.
pub(crate) async fn serve<D: Disk>(disk: D, mut jobs: mpsc::Receiver<Job>, context: Context) {
    let mut next = None;
    while let Some(job) = take_or_recv(&mut next, &mut jobs).await {
        match job {
            Job::Recover { topic, reply } => {
                let result = recover_topic(&disk, &context, *topic).await;
                reply.send(result).ok(); // Who asked may have gone; what was done stands.
            }
            Job::Orphans { unsettled, reply } => {
                let result = remove_orphans(&disk, &context, &unsettled).await;
                reply.send(result).ok(); // As above.
            }
            Job::Seal(first) => {
                let (seals, behind) = seals_at_once(first, &mut jobs);
                next = behind;
                join_all(seals.iter().map(|one| seal_or_warn(&disk, &context, one))).await;
            }
            Job::Fold { topic, reply } => {
                let result = fold(&context, topic).await;
                reply.send(result).ok(); // As above.
            }
            Job::Settle { sequence, reply } => {
                let mut result = settle(&disk, &context, &sequence).await;
                if context.has_room_now(&result, None).await {
                    result = settle(&disk, &context, &sequence).await;
                }
                reply.send(result).ok(); // As above.
            }
            Job::Remove { ticket, folders, reply } => {
                let result = remove(&disk, &context, ticket, &folders).await;
                reply.send(result).ok(); // As above.
            }
        }
    }
}

async fn take_or_recv(next: &mut Option<Job>, jobs: &mut mpsc::Receiver<Job>) -> Option<Job> {
    match next.take() {
        Some(job) => Some(job),
        None => jobs.recv().await,
    }
}

/// The seals that wait behind the first, of as many topics, and the job behind them: a thousand uploads may end at once,
/// and what is sealed side by side shares commits and wake-ups.
fn seals_at_once(first: Seal, jobs: &mut mpsc::Receiver<Job>) -> (Vec<Seal>, Option<Job>) {
    let mut seals = vec![first];
    while seals.len() < limits::SEALS_AT_ONCE
        && let Ok(job) = jobs.try_recv()
    {
        match job {
            // Two of one topic are done in their order.
            Job::Seal(seal) if seals.iter().all(|other| other.topic.no != seal.topic.no) => seals.push(seal),
            job => return (seals, Some(job)),
        }
    }
    (seals, None)
}

async fn seal_or_warn<D: Disk>(disk: &D, context: &Context, Seal { topic, below }: &Seal) {
    let mut result = seal(disk, context, topic, *below).await;
    if context.has_room_now(&result, Some(topic)).await {
        result = seal(disk, context, topic, *below).await;
    }
    if let Err(error) = result {
        tracing::warn!(topic = %topic.locator, %error, "segment not sealed; the next start tries again");
    }
}

async fn seal<D: Disk>(disk: &D, context: &Context, topic: &TopicRecord, below: Option<u32>) -> Outcome {
    let no = topic.no;
    let chunks = context.catalog.totals(no)?.chunks.clamp(1, limits::SEAL_CHUNKS_AT_ONCE.into());
    // It is never closed.
    let turn = context.turns.chunks.acquire_many(u32::try_from(chunks).unwrap_or(1)).await;
    let sealed =
        recover::seal_topic(disk, &context.catalog, context.data_dir(), topic, below, &context.counters).await?;
    drop(turn);
    if sealed.is_empty() && below.is_none() {
        // Locked without a new segment: no footer can say so any more. A manifest has one writer at a time.
        let _alone = context.turns.manifests.lock().await;
        note_lock(disk, context, topic).await?;
    }
    // The seal is recorded whatever becomes of the rest: its footer is in the file.
    let fold = fold_of(context, no, below.is_none_or(|below| below == u32::MAX), &sealed);
    let (fold, packed) = fold.map_or_else(|error| (None, Err(error)), |fold| (fold, Ok(())));
    let files = recover::files_of(disk, context.data_dir(), topic).await;
    // One change, one sync: a thousand topics may end at once, and each of several would break up the groups in
    // which their last chunks are committed.
    let change = move |txn: &mut Txn<'_>, live: &mut Live| {
        // A topic deleted meanwhile gets no record back.
        if txn.topic(no)?.is_none() {
            return Ok(None);
        }
        for record in &sealed {
            txn.put(Family::Segments, keys::segment(no, record.no), record)?;
        }
        if let Some(fold) = fold {
            txn.put_fold(fold)?;
        }
        let mut owned = records_if_quiet(txn, live, no)?;
        if let Some(records) = &mut owned {
            records.extend_from_slice(&sealed); // The change does not see what it writes.
        }
        Ok::<_, StorageError>(owned)
    };
    if let Some(records) = context.committer.change(change).await? {
        recover::remove_uncommitted(disk, files?, &records).await?;
    }
    packed
}

/// The manifest says that a topic is locked, where no footer of it does.
async fn note_lock<D: Disk>(disk: &D, context: &Context, topic: &TopicRecord) -> Outcome {
    match context.catalog.sequence(topic.sequence)? {
        Some(sequence) => manifest::write(disk, &context.catalog, context.data_dir(), &sequence).await,
        None => Ok(()),
    }
}

/// When nobody writes a topic any more, a file without a record was never committed.
async fn remove_uncommitted<D: Disk>(disk: &D, context: &Context, topic: &TopicRecord) -> Result<u64, StorageError> {
    let no = topic.no;
    let files = recover::files_of(disk, context.data_dir(), topic).await?;
    match context.committer.change(move |txn, live| records_if_quiet(txn, live, no)).await? {
        Some(records) => recover::remove_uncommitted(disk, files, &records).await,
        None => Ok(0),
    }
}

/// The segments of a topic that nobody writes.
fn records_if_quiet(txn: &Txn<'_>, live: &Live, no: TopicNo) -> Result<Option<Vec<SegmentRecord>>, StorageError> {
    let quiet = !live.is_open(no) && txn.topic(no)?.is_some();
    if quiet { Ok(Some(txn.segments(no)?)) } else { Ok(None) }
}

/// After a crash, before anything writes: chunks that are whole in the files and not in the catalog are
/// taken over, what else is behind the last one goes, segments are sealed. A second time finds nothing to do.
async fn recover_topic<D: Disk>(disk: &D, context: &Context, topic: TopicRecord) -> Result<TopicReceipt, StorageError> {
    let (catalog, no) = (&context.catalog, topic.no);
    let locked = topic.completed_at_ns.is_some();
    let mut receipt = TopicReceipt { locator: topic.locator.clone(), locked, ..TopicReceipt::default() };
    if !locked {
        let behind = found::behind(disk, catalog, context.data_dir(), &topic).await?;
        receipt.adopted_chunks = behind.len() as u64;
        receipt.adopted_rows = behind.iter().map(|found| found.trailer.record.rows()).sum();
        if !behind.is_empty() {
            let chunks = behind.into_iter().map(|found| found.trailer).collect::<Vec<_>>();
            context.committer.change(move |txn, _| txn.adopt_chunks(no, &chunks)).await?;
        }
    }
    let segments = catalog.segments(no)?;
    let totals = catalog.totals(no)?;
    if locked && segments.is_empty() && totals.rows > 0 {
        // The catalog was made again without them: what is in the folder is not for this pass to judge.
        receipt.unsealed = Some("its files are not in the catalog; run `flightbox recover`".to_owned());
        return Ok(receipt);
    }
    let dir = segment::topic_dir(context.data_dir(), topic.sequence, topic.id);
    for record in segments.iter().filter(|record| record.sealed_length.is_none()) {
        let path = dir.join(segment::file_name(record.no));
        let end = disk.data_end(&path, record.end_offset).await;
        receipt.discarded_bytes += end.map_or(0, |end| end - record.end_offset);
    }
    receipt.discarded_bytes += remove_uncommitted(disk, context, &topic).await?;
    if segments.iter().any(|segment| segment.sealed_length.is_none()) || (locked && segments.is_empty()) {
        let below = if locked { None } else { Some(u32::MAX) };
        match seal(disk, context, &topic, below).await {
            Ok(()) => receipt.sealed = true,
            // Readable all the same: the catalog has its chunks. One that cannot be sealed is reported and
            // left for the next start (INV-9).
            Err(error) => receipt.unsealed = Some(error.to_string()),
        }
    }
    let totals = catalog.totals(no)?;
    (receipt.rows, receipt.batches) = (totals.rows, totals.batches);
    receipt.damaged_chunks = catalog.damaged(no)?.len() as u64;
    Ok(receipt)
}

async fn remove_orphans<D: Disk>(
    disk: &D,
    context: &Context,
    unsettled: &[SequenceRecord],
) -> Result<Vec<PathBuf>, StorageError> {
    let lost = |text: String| StorageError::Catalog { op: "recover", text: format!("Corruption: {text}") };
    for sequence in unsettled {
        if let Some(text) = found::lost_lock(disk, &context.catalog, context.data_dir(), sequence).await? {
            return Err(lost(text));
        }
    }
    // A deletion that could not be finished has its folders still.
    let deleting: BTreeSet<PathBuf> = context
        .catalog
        .deletions()?
        .into_iter()
        .flat_map(|deletion| deletion.folders)
        .flat_map(|folder| context.volumes.all().iter().map(move |volume| volume.root.join(&folder)))
        .collect();
    let mut removed = Vec::new();
    for Orphan { path, kind } in recover::orphans(disk, &context.catalog, &context.volumes, unsettled).await? {
        // Deletions have records of their own: what says whose it is was lost by the catalog, not by its owner.
        if deleting.contains(&path) {
            continue;
        }
        if kind != OrphanKind::Leftover && found::says_whose(disk, &path).await {
            if kind == OrphanKind::Copy {
                tracing::warn!(path = %path.display(), "a copy of a topic that lies elsewhere: left alone");
                continue;
            }
            return Err(lost(format!("{} is a recording that it does not know", path.display())));
        }
        match recover::remove_orphan(disk, &path).await {
            Ok(()) => {
                tracing::info!(path = %path.display(), "removed: no record owns it");
                removed.push(path);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no record owns it, and it cannot be removed");
            }
        }
    }
    Ok(removed)
}

/// What a finalized session adds: manifest and links. A sequence that is locked, sealed and linked needs no
/// look at the next start.
async fn settle<D: Disk>(disk: &D, context: &Context, sequence: &SequenceRecord) -> Outcome {
    let (catalog, data_dir, id) = (&context.catalog, context.data_dir(), sequence.id);
    if catalog.sequence(id)?.is_none() {
        return Ok(()); // Deleted meanwhile.
    }
    let sessions = catalog.sessions_of(id)?;
    manifest::write(disk, catalog, data_dir, sequence).await?;
    recover::link_browse(disk, catalog, data_dir, sequence).await?;
    copy_manifest(disk, context, sequence).await;
    for topic in catalog.topics_of(id)? {
        let unsealed = catalog.segments(topic.no)?.iter().any(|segment| segment.sealed_length.is_none());
        if unsealed || topic.completed_at_ns.is_none() {
            return Ok(());
        }
    }
    context
        .committer
        .change(move |txn, _| {
            // With a session that came meanwhile there is more to look at than was looked at.
            if is_locked(&sessions) && txn.sessions_of(id)? == sessions {
                txn.delete(Family::Meta, keys::unsettled(id));
            }
            Ok(())
        })
        .await
}

/// Whether a sequence counts as locked: it has sessions and all are finalized.
pub(crate) fn is_locked(sessions: &[SessionRecord]) -> bool {
    !sessions.is_empty() && sessions.iter().all(|session| session.completed_at_ns.is_some())
}

/// Packs what lies apart of the index of a topic that is at rest.
async fn fold(context: &Context, topic: TopicNo) -> Outcome {
    match fold_of(context, topic, true, &[])? {
        Some(fold) => context.committer.change(move |txn, _| txn.put_fold(fold)).await,
        None => Ok(()),
    }
}

/// What there is to pack of a topic's index: whole blocks while it is written, the rest at its end.
fn fold_of(
    context: &Context,
    topic: TopicNo,
    everything: bool,
    sealed_now: &[SegmentRecord],
) -> Result<Option<Fold>, StorageError> {
    match context.last_ontology.of(&context.catalog, topic)? {
        Some(ontology) => plan_fold(&context.catalog, topic, &ontology, everything, sealed_now),
        None => Ok(None),
    }
}

/// The version of an ontology that was needed last: a thousand topics of a kind end together, and to read a schema takes
/// longer than to pack what is known of them. Versions never change.
#[derive(Debug, Default)]
pub(crate) struct LastOntology(RefCell<Option<Arc<Ontology>>>);

impl LastOntology {
    fn of(&self, look: &impl Look, topic: TopicNo) -> Result<Option<Arc<Ontology>>, StorageError> {
        let (Some(record), Some(of_topic)) = (look.topic(topic)?, look.topic_ontology(topic)?) else { return Ok(None) };
        let is_it = |ontology: &Arc<Ontology>| {
            ontology.record.tag == record.ontology_tag && ontology.record.version == of_topic.version
        };
        if let Some(last) = self.0.borrow().clone().filter(is_it) {
            return Ok(Some(last));
        }
        let found = look.ontology_of(topic)?.map(Arc::new);
        self.0.replace(found.clone());
        Ok(found)
    }
}

async fn remove<D: Disk>(disk: &D, context: &Context, ticket: [u8; 16], folders: &[String]) -> Outcome {
    let waiting = recover::remove_folders(disk, &context.volumes, folders, &context.reclaim).await?;
    // What is left of a finalized sequence must not bring the rest back when the catalog is made again.
    for sequence in folders.iter().filter_map(|folder| sequence_of(folder)).collect::<BTreeSet<_>>() {
        if let Some(record) = context.catalog.sequence(sequence)? {
            manifest::write(disk, &context.catalog, context.data_dir(), &record).await?;
            copy_manifest(disk, context, &record).await;
        }
    }
    // What waits must not take along, at the next start, what was recorded under the same name meanwhile.
    let (remaining, cause) = waiting.map_or((None, Ok(())), |waiting| (Some(waiting.folders), Err(waiting.cause)));
    context
        .committer
        .change(move |txn, _| match remaining {
            Some(folders) => txn.put(Family::Meta, keys::deletion(&ticket), &DeletionRecord { ticket, folders }),
            None => {
                txn.delete(Family::Meta, keys::deletion(&ticket));
                Ok(())
            }
        })
        .await?;
    cause
}

/// The volumes' own manifests: what a disk that is sick does not take is no reason to fail.
async fn copy_manifest<D: Disk>(disk: &D, context: &Context, sequence: &SequenceRecord) {
    if let Err(error) = manifest::write_copies(disk, &context.catalog, &context.volumes, sequence).await {
        tracing::warn!(sequence = sequence.name, %error, "a volume has no manifest of it");
    }
}

/// The sequence in whose folder a removed folder lay.
fn sequence_of(folder: &str) -> Option<SequenceId> {
    folder.strip_prefix("sequences/")?.split('/').next()?.parse().ok().map(SequenceId)
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::chunk::Format;
    use storage::ids::{SessionId, TopicId};

    fn seal_of(no: u64) -> Seal {
        let topic = TopicRecord {
            no: TopicNo(no),
            id: TopicId::random(),
            sequence: SequenceId::random(),
            session: SessionId::random(),
            locator: format!("drive/{no}"),
            ontology_tag: "imu".to_owned(),
            format: Format::Default,
            user_metadata: "{}".to_owned(),
            created_at_ns: 0,
            completed_at_ns: None,
        };
        Seal { topic: Box::new(topic), below: None }
    }

    /// The topics that are sealed side by side with the first, and whether a job waits behind them.
    fn at_once(first: u64, behind: Vec<Job>) -> (Vec<u64>, bool) {
        let (sender, mut jobs) = mpsc::channel(limits::SERVICE_LANE_DEPTH);
        for job in behind {
            assert!(sender.try_send(job).is_ok(), "there is room");
        }
        let (seals, next) = seals_at_once(seal_of(first), &mut jobs);
        (seals.iter().map(|seal| seal.topic.no.0).collect(), next.is_some())
    }

    #[test]
    fn seals_of_different_topics_are_done_at_once_and_nothing_overtakes_them() {
        let seals = |of: &[u64]| of.iter().map(|no| Job::Seal(seal_of(*no))).collect::<Vec<_>>();
        assert_eq!(at_once(1, Vec::new()), (vec![1], false));
        assert_eq!(at_once(1, seals(&[2, 3])), (vec![1, 2, 3], false));
        // The second of a topic waits for the first.
        assert_eq!(at_once(1, seals(&[2, 1, 3])), (vec![1, 2], true));
        let fold = Job::Fold { topic: TopicNo(9), reply: oneshot::channel().0 };
        let jobs = seals(&[2]).into_iter().chain([fold]).chain(seals(&[3])).collect();
        assert_eq!(at_once(1, jobs), (vec![1, 2], true));
        let many: Vec<u64> = (2..100).collect();
        assert_eq!(at_once(1, seals(&many)).0.len(), limits::SEALS_AT_ONCE);
    }
}
