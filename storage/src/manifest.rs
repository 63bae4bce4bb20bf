//! What the catalog knows of a finalized recording, beside its files: from it and the chunks' trailers
//! a lost catalog is made again.
//!
//! Written when a session is finalized, before that call is answered, and again when something of the
//! recording is deleted; replaced whole, so after a crash there is the old or the new. Holds locked topics
//! only: what is still open is told by the heads of its segments.

use crate::catalog::Look;
use crate::catalog::records::{
    NotificationRecord, PartialRecord, SegmentRecord, SequenceRecord, SessionRecord, TopicRecord, TopicTotals,
};
use crate::checksum;
use crate::disk::Disk;
use crate::error::{Result, StorageError};
use crate::ids::{SequenceId, TopicNo};
use crate::segment::{self, TopicFacts};
use crate::volumes::Volumes;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"FBXMNFT1";

/// A finalized recording.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The recording.
    pub sequence: SequenceRecord,
    /// Its uploads, also those that are still open.
    pub sessions: Vec<SessionRecord>,
    /// What clients left on it.
    pub notifications: Vec<NotificationRecord>,
    /// Its locked topics.
    pub topics: Vec<LockedTopic>,
}

/// A locked topic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LockedTopic {
    /// The topic, with the time of the lock.
    pub record: TopicRecord,
    /// What its segments' heads say as well; `None` where it never had a DoPut, and so has no file.
    pub facts: Option<TopicFacts>,
    /// What is in it.
    pub totals: TopicTotals,
    /// Set when it was locked without a clean end.
    pub partial: Option<PartialRecord>,
    /// What clients left on it.
    pub notifications: Vec<NotificationRecord>,
    /// Its files.
    pub segments: Vec<SegmentRecord>,
}

impl Manifest {
    /// Adds what another one knows and this does not: topics, sessions and their ends. Nothing here is replaced.
    fn merge(&mut self, other: Self) {
        for topic in other.topics {
            if self.topics.iter().all(|known| known.record.id != topic.record.id) {
                self.topics.push(topic);
            }
        }
        for session in other.sessions {
            match self.sessions.iter_mut().find(|known| known.id == session.id) {
                None => self.sessions.push(session),
                Some(known) => known.completed_at_ns = known.completed_at_ns.or(session.completed_at_ns),
            }
        }
    }

    /// Gathers what the catalog knows of a sequence.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn gather(look: &impl Look, sequence: &SequenceRecord) -> Result<Self> {
        let mut topics = Vec::new();
        for topic in look.topics_of(sequence.id)? {
            if topic.completed_at_ns.is_none() {
                continue;
            }
            topics.push(LockedTopic {
                facts: TopicFacts::load(look, &topic)?,
                totals: look.totals(topic.no)?,
                partial: look.topic_partial(topic.no)?,
                notifications: look.notifications(sequence.id, topic.no)?,
                segments: look.segments(topic.no)?,
                record: topic,
            });
        }
        Ok(Self {
            sequence: sequence.clone(),
            sessions: look.sessions_of(sequence.id)?,
            notifications: look.notifications(sequence.id, TopicNo(0))?,
            topics,
        })
    }

    /// As bytes with a checksum.
    ///
    /// # Errors
    /// When it cannot be packed, which would be a bug.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let body = postcard::to_stdvec(self)
            .map_err(|error| StorageError::Format { op: "manifest", text: error.to_string() })?;
        let mut out = Vec::with_capacity(12 + body.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&checksum::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads one, if the bytes are whole.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (crc, body) = rest.split_first_chunk::<4>()?;
        (checksum::crc32c(body) == u32::from_le_bytes(*crc)).then(|| postcard::from_bytes(body).ok()).flatten()
    }
}

/// Where a sequence's manifest lies.
pub fn path(data_dir: &Path, sequence: SequenceId) -> PathBuf {
    segment::sequence_dir(data_dir, sequence).join("manifest")
}

/// Writes the manifest of a sequence, unless it is there as it should be.
///
/// # Errors
/// When it cannot be written or the catalog cannot be read.
pub async fn write<D: Disk>(disk: &D, look: &impl Look, data_dir: &Path, sequence: &SequenceRecord) -> Result<()> {
    let bytes = Manifest::gather(look, sequence)?.encode()?;
    write_to(disk, data_dir, sequence.id, &bytes).await
}

/// Writes it on each volume that has topics of the sequence as well, and removes it from others: so that the topics come
/// back as they were when the data folder is lost.
///
/// # Errors
/// The first of those volumes where it cannot be written; the others have it.
pub async fn write_copies<D: Disk>(
    disk: &D,
    look: &impl Look,
    volumes: &Volumes,
    sequence: &SequenceRecord,
) -> Result<()> {
    let bytes = Manifest::gather(look, sequence)?.encode()?;
    let mut failed = Ok(());
    for volume in volumes.others() {
        failed = failed.and(write_copy(disk, &volume.root, sequence.id, &bytes).await);
    }
    failed
}

async fn write_copy<D: Disk>(disk: &D, root: &Path, sequence: SequenceId, bytes: &[u8]) -> Result<()> {
    let dir = segment::sequence_dir(root, sequence);
    let topics = disk.list(&dir).await.map_err(|error| StorageError::io("list", &dir, error))?;
    if topics.iter().any(|entry| entry.is_dir) {
        return write_to(disk, root, sequence, bytes).await;
    }
    let path = path(root, sequence);
    disk.remove_file(&path).await.map_err(|error| StorageError::io("remove", path, error))
}

/// The manifest of a sequence: the data folder's, with what only those of the volumes know of topics that lie there.
pub async fn read<D: Disk>(disk: &D, volumes: &Volumes, sequence: SequenceId) -> Option<Manifest> {
    let mut found = read_from(disk, volumes.data_dir(), sequence).await;
    for volume in volumes.others() {
        let Some(mut copy) = read_from(disk, &volume.root, sequence).await else { continue };
        let Some(found) = &mut found else {
            found = Some(copy);
            continue;
        };
        let dir = segment::sequence_dir(&volume.root, sequence);
        let here: Vec<PathBuf> =
            disk.list(&dir).await.unwrap_or_default().into_iter().map(|entry| entry.path).collect();
        copy.topics.retain(|topic| here.contains(&dir.join(topic.record.id.to_string())));
        found.merge(copy);
    }
    found
}

async fn read_from<D: Disk>(disk: &D, root: &Path, sequence: SequenceId) -> Option<Manifest> {
    let bytes = disk.read_small(&path(root, sequence)).await.ok().flatten()?;
    Manifest::decode(&bytes).filter(|manifest| manifest.sequence.id == sequence)
}

async fn write_to<D: Disk>(disk: &D, root: &Path, sequence: SequenceId, bytes: &[u8]) -> Result<()> {
    let path = path(root, sequence);
    let before = disk.read_small(&path).await.map_err(|error| StorageError::io("read", &path, error))?;
    if before.as_deref() == Some(bytes) {
        return Ok(());
    }
    let dir = segment::sequence_dir(root, sequence);
    crate::disk::make_dirs(disk, root, &dir).await.map_err(|error| StorageError::io("make folder", &dir, error))?;
    disk.replace(&path, bytes).await.map_err(|error| StorageError::io("write", &path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_9_a_manifest_with_any_flipped_bit_is_no_manifest() {
        let manifest = Manifest {
            sequence: SequenceRecord {
                id: SequenceId::random(),
                name: "s".to_owned(),
                user_metadata: "{}".to_owned(),
                created_at_ns: 1,
                v0_session: None,
            },
            sessions: Vec::new(),
            notifications: Vec::new(),
            topics: Vec::new(),
        };
        let bytes = manifest.encode().expect("encodes");
        assert_eq!(Manifest::decode(&bytes), Some(manifest));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Manifest::decode(&damaged), None, "byte {at}");
        }
    }
}
