//! The file systems that topics are spread over. The data folder has all names: the folder of a topic whose files
//! lie on another volume is a symbolic link there, so that whoever reads, checks, seals or counts files need not
//! know of volumes. On its volume it lies at the same path below the volume's root.
//!
//! Guarantees: a topic's link is durable before a file behind it takes a chunk (INV-1), and goes after the files
//! behind it (INV-4); nothing is made, forgotten or called damaged on a volume that is not there.
//! Knows no settings: which volumes there are, and whether each is there, is found out at start (`src/volumes.rs`).

use crate::catalog::records::TopicRecord;
use crate::disk::{Disk, Folders};
use crate::error::{Result, StorageError};
use crate::files::Entry;
use crate::ids::{SequenceId, TopicId, TopicNo};
use crate::reclaim::Reclaim;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a volume is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// New topics are put there.
    Takes,
    /// It keeps what it has: settings no longer name it, or never did.
    Keeps,
    /// It is not there: not mounted, or taken out.
    Away,
}

impl Role {
    /// The name in `info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Takes => "takes topics",
            Self::Keeps => "keeps what it has",
            Self::Away => "not there",
        }
    }
}

/// One file system, or one folder of it.
#[derive(Debug)]
pub struct Volume {
    /// Its folder.
    pub root: PathBuf,
    /// What it is for.
    pub role: Role,
    /// Set while it has too little room for new topics.
    short: AtomicBool,
}

impl Volume {
    /// One with enough room.
    pub fn new(root: PathBuf, role: Role) -> Self {
        Self { root, role, short: AtomicBool::new(false) }
    }

    /// Notes whether it has room for new topics.
    pub fn set_short(&self, short: bool) {
        self.short.store(short, Ordering::Relaxed);
    }
}

/// All of them; the first is the data folder.
#[derive(Debug)]
pub struct Volumes {
    list: Vec<Volume>,
    /// Folders on all of them whose names are durable.
    pub folders: Folders,
}

impl Volumes {
    /// The data folder alone.
    pub fn only(data_dir: PathBuf) -> Self {
        Self { list: vec![Volume::new(data_dir, Role::Takes)], folders: Folders::default() }
    }

    /// The data folder and others.
    pub fn new(data_dir: Volume, others: Vec<Volume>) -> Self {
        let mut list = vec![data_dir];
        list.extend(others);
        Self { list, folders: Folders::default() }
    }

    /// The folder that has all names.
    pub fn data_dir(&self) -> &Path {
        self.list.first().map_or(Path::new(""), |volume| &volume.root)
    }

    /// All, the data folder first.
    pub fn all(&self) -> &[Volume] {
        &self.list
    }

    /// Those beside the data folder that are there.
    pub fn others(&self) -> impl Iterator<Item = &Volume> {
        self.list.iter().skip(1).filter(|volume| volume.role != Role::Away)
    }

    /// Where the files of a new topic go.
    pub fn home(&self, topic: TopicNo) -> &Path {
        let taking: Vec<&Volume> = self.list.iter().filter(|volume| volume.role == Role::Takes).collect();
        let room: Vec<bool> = taking.iter().map(|volume| !volume.short.load(Ordering::Relaxed)).collect();
        choose(topic, &room).and_then(|index| taking.get(index)).map_or_else(|| self.data_dir(), |volume| &volume.root)
    }

    /// The number of the volume that has, or will have, a topic's files.
    pub fn index_of(&self, topic: &TopicRecord) -> usize {
        if self.list.len() == 1 {
            return 0;
        }
        self.index_at(&crate::segment::topic_dir(self.data_dir(), topic.sequence, topic.id), topic.no)
    }

    fn index_at(&self, dir: &Path, no: TopicNo) -> usize {
        match std::fs::read_link(dir) {
            Ok(target) => self.of_path(&target),
            Err(_) if dir.is_dir() => 0,
            Err(_) => self.of_path(self.home(no)),
        }
    }

    /// The number of the volume that a path without links lies on, as far as the path says.
    pub fn of_path(&self, path: &Path) -> usize {
        self.list.iter().rposition(|volume| path.starts_with(&volume.root)).unwrap_or(0)
    }

    /// The volume that is not there and that a path without links lies on.
    fn away(&self, real: &Path) -> Option<&Path> {
        self.of(real).filter(|volume| volume.role == Role::Away).map(|volume| volume.root.as_path())
    }

    /// The root of the volume beside the data folder, and there, that a topic's files lie on.
    pub fn there(&self, topic: &TopicRecord) -> Option<&Path> {
        let dir = crate::segment::topic_dir(self.data_dir(), topic.sequence, topic.id);
        let target = std::fs::read_link(dir).ok()?;
        self.of(&target).filter(|volume| volume.role != Role::Away).map(|volume| volume.root.as_path())
    }

    /// Refuses what needs the files of a topic whose volume is not there.
    ///
    /// # Errors
    /// Names the topic and the volume.
    pub fn check_there(&self, topic: &TopicRecord) -> Result<()> {
        if self.list.len() == 1 {
            return Ok(());
        }
        let target = std::fs::read_link(crate::segment::topic_dir(self.data_dir(), topic.sequence, topic.id)).ok();
        match target.as_deref().and_then(|target| self.away(target)) {
            None => Ok(()),
            Some(root) => {
                let what = format!("topic `{}`", topic.locator);
                Err(StorageError::Away { what, root: root.to_owned() })
            }
        }
    }

    /// The volume on which a path without links lies.
    fn of(&self, real: &Path) -> Option<&Volume> {
        self.list.iter().rfind(|volume| real.starts_with(&volume.root))
    }
}

/// The volume of a new topic among those that take topics: in turn, those with room before the others. Pure.
fn choose(topic: TopicNo, room: &[bool]) -> Option<usize> {
    let count = room.len();
    let first = usize::try_from(topic.0.checked_rem(count as u64)?).ok()?;
    (0..count).map(|step| (first + step) % count).find(|index| room[*index]).or(Some(first))
}

/// Makes a topic's folder on its volume, and its name in the data folder, durably.
///
/// # Errors
/// When one of them cannot be made, or the topic's files lie on a volume that is not there.
pub async fn make_topic_dir<D: Disk>(
    disk: &D,
    folders: &Folders,
    data_dir: &Path,
    home: &Path,
    dir: &Path,
) -> io::Result<()> {
    let (Ok(inside), Some(parent)) = (dir.strip_prefix(data_dir), dir.parent()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a folder of a topic"));
    };
    let target = disk.read_link(dir).await?;
    if target.is_none() && disk.is_dir(dir) {
        return folders.make(disk, data_dir, dir).await;
    }
    let real = home.join(inside);
    if let Some(target) = target
        && target != real
    {
        // Where it was begun, whatever the settings say now. As below: who made the link may not have synced it.
        if disk.is_dir(&target) {
            return disk.sync_dir(parent).await;
        }
        let text = format!("its files lie in {}, which is not there: is its volume mounted?", target.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    folders.make(disk, home, &real).await?;
    if home == data_dir {
        return Ok(());
    }
    folders.make(disk, data_dir, parent).await?;
    disk.symlink(&real, dir).await?;
    // Also for a link that is there: who made it may have met an error here.
    disk.sync_dir(parent).await
}

/// Removes a folder below `sequences/` on every volume beside the data folder, where only links to it are left.
///
/// # Errors
/// When one cannot be removed, or a part of it lies on a volume that is not there: the deletion waits for that.
pub async fn remove_behind<D: Disk>(disk: &D, volumes: &Volumes, folder: &str, reclaim: &Reclaim) -> Result<()> {
    for volume in volumes.others() {
        let real = volume.root.join(folder);
        let kept = disk.keep_open(&real);
        disk.remove_dir(&real).await.map_err(|error| StorageError::io("remove", &real, error))?;
        reclaim.take(kept);
        let Some(parent) = real.parent() else { continue };
        match disk.sync_dir(parent).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("sync folder", parent, error));
            }
            _ => {}
        }
    }
    match away_in(disk, volumes, &volumes.data_dir().join(folder)).await? {
        None => Ok(()),
        Some(root) => Err(StorageError::Away { what: format!("a part of what was deleted ({folder})"), root }),
    }
}

/// The volume that is not there and that a folder of the data folder, or a link in it, leads to.
///
/// # Errors
/// When it cannot be looked at.
pub async fn away_in<D: Disk>(disk: &D, volumes: &Volumes, path: &Path) -> Result<Option<PathBuf>> {
    if volumes.all().len() == 1 {
        return Ok(None);
    }
    let mut targets: Vec<PathBuf> = link(disk, path).await?.into_iter().collect();
    if targets.is_empty() {
        for entry in list(disk, path).await?.into_iter().filter(|entry| entry.is_link && !entry.is_dir) {
            targets.extend(link(disk, &entry.path).await?);
        }
    }
    Ok(targets.iter().find_map(|target| volumes.away(target)).map(Path::to_owned))
}

/// A folder that no record owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// Where.
    pub path: PathBuf,
    /// What is known of it.
    pub kind: OrphanKind,
}

/// What is known of a folder that no record owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrphanKind {
    /// Nothing: if it says whose it is, the catalog has forgotten it.
    Unknown,
    /// The topic of this name lies elsewhere: what this one holds was forgotten by nobody.
    Copy,
    /// No topic is in it.
    Leftover,
}

/// Folders on the volumes that no record owns or no link names: of sequences that are not known, and topics of those
/// that are not at rest. `is_known` says the first, `unsettled` names the others.
///
/// # Errors
/// When a folder cannot be listed or the catalog cannot be read.
pub async fn strays<D: Disk>(
    disk: &D,
    volumes: &Volumes,
    mut is_known: impl FnMut(SequenceId) -> Result<bool>,
    unsettled: &[SequenceId],
) -> Result<Vec<Orphan>> {
    let mut found = Vec::new();
    for volume in volumes.others() {
        for entry in list(disk, &volume.root.join("sequences")).await? {
            // Of another name than ours: not this recorder's to remove.
            let Some(id) = parsed_name(&entry.path, SequenceId) else { continue };
            if !is_known(id)? {
                let topics = list(disk, &entry.path).await?;
                let kind =
                    if topics.iter().any(|topic| topic.is_dir) { OrphanKind::Unknown } else { OrphanKind::Leftover };
                found.push(Orphan { path: entry.path, kind });
            }
        }
        for sequence in unsettled {
            for entry in list(disk, &crate::segment::sequence_dir(&volume.root, *sequence)).await? {
                let (Some(_), Ok(inside)) = (parsed_name(&entry.path, TopicId), entry.path.strip_prefix(&volume.root))
                else {
                    continue;
                };
                let name = volumes.data_dir().join(inside);
                let named = link(disk, &name).await?;
                if named.as_ref() == Some(&entry.path) || named.as_ref().is_some_and(|at| volumes.away(at).is_some()) {
                    continue;
                }
                let siblings = list(disk, &crate::segment::sequence_dir(volumes.data_dir(), *sequence)).await?;
                let is_copy = siblings.iter().any(|sibling| sibling.path == name && sibling.is_dir);
                let kind = if is_copy { OrphanKind::Copy } else { OrphanKind::Unknown };
                found.push(Orphan { path: entry.path, kind });
            }
        }
    }
    Ok(found)
}

/// Gives every topic's folder on the volumes its name in the data folder again, where that has none or one that leads
/// nowhere; returns how many, and of which volumes not.
pub async fn relink<D: Disk>(disk: &D, volumes: &Volumes) -> (u64, Vec<StorageError>) {
    let mut made = 0;
    let mut failed = Vec::new();
    for volume in volumes.others() {
        match relink_one(disk, volumes, volume).await {
            Ok(links) => made += links,
            Err(error) => failed.push(error),
        }
    }
    (made, failed)
}

async fn relink_one<D: Disk>(disk: &D, volumes: &Volumes, volume: &Volume) -> Result<u64> {
    let mut made = 0;
    for sequence in list(disk, &volume.root.join("sequences")).await? {
        let Some(name) = parsed_name::<SequenceId>(&sequence.path, SequenceId) else { continue };
        let dir = crate::segment::sequence_dir(volumes.data_dir(), name);
        let known = list(disk, &dir).await?;
        for topic in list(disk, &sequence.path).await? {
            let Some(id) = parsed_name(&topic.path, TopicId).filter(|_| topic.is_dir) else { continue };
            let at = dir.join(id.to_string());
            let named = known.iter().find(|entry| entry.path == at);
            if named.is_some_and(|entry| entry.is_dir) {
                continue;
            }
            let linked = async {
                if named.is_some_and(|entry| entry.is_link) {
                    disk.remove_file(&at).await?;
                }
                volumes.folders.make(disk, volumes.data_dir(), &dir).await?;
                disk.symlink(&topic.path, &at).await?;
                disk.sync_dir(&dir).await
            };
            linked.await.map_err(|error| StorageError::io("link", &at, error))?;
            made += 1;
        }
    }
    Ok(made)
}

/// A path of the data folder without links: a topic's folder, or what is in it.
pub(crate) async fn real<D: Disk>(disk: &D, volumes: &Volumes, path: &Path) -> Result<PathBuf> {
    if let Some(target) = behind(disk, volumes, path).await? {
        return Ok(target);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(path.to_owned()) };
    Ok(behind(disk, volumes, parent).await?.map_or_else(|| path.to_owned(), |target| target.join(name)))
}

/// The folder on a volume that a link of ours names: at the same path below the volume's root. `None` for others.
pub(crate) async fn behind<D: Disk>(disk: &D, volumes: &Volumes, path: &Path) -> Result<Option<PathBuf>> {
    let Ok(inside) = path.strip_prefix(volumes.data_dir()) else { return Ok(None) };
    let target = link(disk, path).await?;
    Ok(target.filter(|target| volumes.all().iter().skip(1).any(|volume| *target == volume.root.join(inside))))
}

/// Where on its own volume a file or folder is kept that is of no use where it lies.
pub(crate) fn lost_and_found(volumes: &Volumes, real: &Path) -> (PathBuf, PathBuf) {
    let root = volumes.of(real).map_or_else(|| volumes.data_dir(), |volume| &volume.root);
    (root.to_owned(), root.join("lost+found").join(real.strip_prefix(root).unwrap_or(real)))
}

/// Where a link points; `None` for what is none, or is not there.
pub(crate) async fn link<D: Disk>(disk: &D, path: &Path) -> Result<Option<PathBuf>> {
    disk.read_link(path).await.map_err(|error| StorageError::io("read link", path, error))
}

fn parsed_name<T>(path: &Path, id: impl Fn(uuid::Uuid) -> T) -> Option<T> {
    path.file_name()?.to_str()?.parse().ok().map(id)
}

async fn list<D: Disk>(disk: &D, dir: &Path) -> Result<Vec<Entry>> {
    disk.list(dir).await.map_err(|error| StorageError::io("list", dir, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(topic: u64, room: &[bool], expected: Option<usize>) {
        assert_eq!(choose(TopicNo(topic), room), expected);
    }

    #[test]
    fn topics_go_to_the_volumes_in_turn_and_past_those_that_are_short_of_room() {
        check(7, &[], None);
        check(7, &[true], Some(0));
        check(6, &[true, true, true], Some(0));
        check(7, &[true, true, true], Some(1));
        check(7, &[true, false, true], Some(2));
        check(8, &[true, true, false], Some(0));
        check(7, &[false, false], Some(1));
    }

    #[test]
    fn a_topic_lies_where_its_link_points_whatever_the_settings_say_now() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = |name: &str| folder.path().join(name);
        let others = vec![Volume::new(root("a"), Role::Keeps), Volume::new(root("b"), Role::Takes)];
        let volumes = Volumes::new(Volume::new(root("data"), Role::Keeps), others);
        let (sequence, topic) = (SequenceId::random(), TopicId::random());
        let dir = crate::segment::topic_dir(&root("data"), sequence, topic);
        assert_eq!(volumes.home(TopicNo(1)), root("b"));
        assert_eq!(volumes.index_at(&dir, TopicNo(1)), 2);
        std::fs::create_dir_all(dir.parent().expect("one")).expect("a folder");
        std::os::unix::fs::symlink(crate::segment::topic_dir(&root("a"), sequence, topic), &dir).expect("a link");
        assert_eq!(volumes.index_at(&dir, TopicNo(1)), 1);
        std::fs::remove_file(&dir).expect("removed");
        std::fs::create_dir(&dir).expect("a folder");
        assert_eq!(volumes.index_at(&dir, TopicNo(1)), 0);
    }
}
