//! Which volumes there are at start, and whether each is there (`data_dirs`).
//!
//! Guarantees: rows go only to a volume that says it is this recorder's, so never into the empty folder of a disk that
//! is not mounted, and never to another recorder's; a volume that is not there is told and left alone, and recording
//! goes on with the others; two recorders never share one. The data folder's file `volumes` remembers them, each
//! volume's file `flightbox-volume` says whose it is; both say everything three times, so that a damaged byte is outvoted (INV-9).

use crate::config::Config;
use crate::folder;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use storage::disk::{DiskState, Engine};
use storage::volumes::{Role, Volume, Volumes, relink};
use storage::{StorageError, files, posix};
use uuid::Uuid;

type AnyError = Box<dyn std::error::Error>;

/// The data folder's list of volumes.
const REGISTER: &str = "volumes";

/// The volumes, held for this process as long as the locks are.
pub(crate) struct Opened {
    pub(crate) volumes: Volumes,
    pub(crate) locks: Vec<File>,
    /// What is not as one would wish, with the remedy.
    pub(crate) notes: Vec<String>,
}

/// What `volumes` or [`MARK`] says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Said {
    recorder: Option<Uuid>,
    /// The volumes; in a mark the one that it lies on.
    roots: BTreeSet<PathBuf>,
}

impl Said {
    /// What was said at least twice; pure.
    fn parse(text: &str) -> Self {
        let lines: Vec<&str> = text.lines().collect();
        let mut said = Self::default();
        for line in &lines {
            let times = lines.iter().filter(|other| *other == line).count();
            match line.split_once(' ') {
                Some(("recorder", id)) if times > 1 => said.recorder = id.parse().ok().or(said.recorder),
                Some(("root", root)) if times > 1 => drop(said.roots.insert(PathBuf::from(root))),
                _ => {}
            }
        }
        said
    }

    fn text(&self) -> String {
        let recorder = self.recorder.map(|id| format!("recorder {id}\n")).unwrap_or_default();
        let roots: String = self.roots.iter().map(|root| format!("root {}\n", root.display())).collect();
        format!("{recorder}{roots}").repeat(3)
    }

    /// `None`: there is no such file.
    fn read(path: &Path) -> Result<Option<(Self, bool)>, StorageError> {
        let bytes = files::read_small(path).map_err(|error| StorageError::io("read", path, error))?;
        Ok(bytes.map(|bytes| (Self::parse(&String::from_utf8_lossy(&bytes)), bytes.is_empty())))
    }

    fn write(&self, path: &Path) -> Result<(), StorageError> {
        files::replace(path, self.text().as_bytes()).map_err(|error| StorageError::io("write", path, error))
    }
}

/// What a volume says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mark {
    /// Nothing.
    Missing,
    /// Nothing, and it holds a recorder's catalog.
    DataFolder,
    /// The file is there and empty: somebody gives it away.
    Empty,
    /// Whose it is; `None` where that cannot be read.
    Of(Option<Uuid>),
    /// It cannot be looked at.
    Broken(String),
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ruling {
    There,
    /// It becomes this recorder's.
    Take,
    Away,
    Refuse,
}

/// Pure. `known`: it was this recorder's before, or all that were are forgotten; `wanted`: the settings name it.
fn rule(mark: &Mark, recorder: Uuid, known: bool, wanted: bool) -> Ruling {
    match mark {
        Mark::Of(Some(id)) if *id == recorder => Ruling::There,
        Mark::Of(None) if known => Ruling::There,
        Mark::Of(_) | Mark::DataFolder if wanted => Ruling::Refuse,
        Mark::Empty if wanted || known => Ruling::Take,
        Mark::Missing if wanted && !known => Ruling::Take,
        Mark::Missing | Mark::Empty | Mark::Of(_) | Mark::DataFolder | Mark::Broken(_) => Ruling::Away,
    }
}

/// A folder that is a volume, or was, or is to be one.
struct Found {
    root: PathBuf,
    wanted: bool,
    mark: Mark,
    /// Where its mark says it is.
    at: Option<PathBuf>,
}

impl Found {
    fn look(root: &Path, wanted: bool) -> Self {
        let (mark, at) = match Said::read(&root.join(folder::VOLUME_MARK)) {
            Err(error) => (Mark::Broken(error.to_string()), None),
            Ok(None) if folder::is_data_folder(root) => (Mark::DataFolder, None),
            Ok(None) => (Mark::Missing, None),
            Ok(Some((_, true))) => (Mark::Empty, None),
            Ok(Some((said, false))) => (Mark::Of(said.recorder), said.roots.into_iter().next()),
        };
        Self { root: root.to_owned(), wanted, mark, at }
    }

    fn note(&self) -> String {
        let root = self.root.display();
        match &self.mark {
            Mark::Broken(why) => {
                format!("{root} cannot be used ({why}): its topics cannot be read, new ones go elsewhere")
            }
            _ => format!(
                "{root} is not there: its topics cannot be read, new ones go elsewhere; mount it, or, if the disk was \
                 replaced by an empty one, put an empty file `{}` on it",
                folder::VOLUME_MARK
            ),
        }
    }
}

/// Finds out, under the data folder's lock. Nothing is changed before all that could refuse has been asked; a crash
/// between two changes is met by the next start as if the earlier ones had just been made.
///
/// # Errors
/// When a volume is another recorder's or in use, or what is known of them cannot be written.
pub(crate) fn open(config: &Config) -> Result<Opened, AnyError> {
    let data_dir = &config.data_dir;
    let register = data_dir.join(REGISTER);
    let read = Said::read(&register)?;
    let is_unreadable = read.as_ref().is_some_and(|(said, _)| said.recorder.is_none());
    let before = read.map(|(said, _)| said).unwrap_or_default();
    if config.data_dirs.is_empty() && before.roots.is_empty() && !is_unreadable {
        return Ok(Opened { volumes: Volumes::only(data_dir.clone()), locks: Vec::new(), notes: Vec::new() });
    }
    let found = look_at_all(config, &before)?;
    // A data folder that was lost and made anew takes the name that its volumes know.
    let told = found.iter().find_map(|found| if let Mark::Of(id) = found.mark { id } else { None });
    let recorder = before.recorder.or(told).unwrap_or_else(Uuid::new_v4);
    // What its volumes were is then forgotten: one that says nothing may be one that is not mounted.
    let forgotten = before.recorder.is_none() && (told.is_some() || is_unreadable);
    let mut rulings = Vec::new();
    for found in found {
        let ruling = rule(&found.mark, recorder, before.roots.contains(&found.root) || forgotten, found.wanted);
        if ruling == Ruling::Refuse {
            return Err(StorageError::Directory(refusal(&found)).into());
        }
        rulings.push((found, ruling));
    }
    let mut locks = Vec::new();
    let mut notes = Vec::new();
    for (found, ruling) in rulings.iter_mut().filter(|(_, ruling)| *ruling != Ruling::Away) {
        match lock(&found.root) {
            Ok(lock) => locks.push(lock),
            Err(error @ StorageError::Directory(_)) => return Err(error.into()),
            // A sick disk does not keep the others from recording.
            Err(error) => {
                found.mark = Mark::Broken(error.to_string());
                *ruling = Ruling::Away;
            }
        }
    }
    let mut roots = before.roots.clone();
    let present = |ruling: &Ruling| matches!(ruling, Ruling::There | Ruling::Take);
    for (found, _) in rulings.iter().filter(|(_, ruling)| present(ruling)) {
        roots.retain(|root| Some(root) != found.at.as_ref());
    }
    roots.extend(rulings.iter().filter(|(_, ruling)| present(ruling)).map(|(found, _)| found.root.clone()));
    if forgotten {
        // Known again: or the next start would take a folder whose disk is not mounted for a new volume.
        roots.extend(rulings.iter().filter(|(found, _)| found.wanted).map(|(found, _)| found.root.clone()));
    }
    let mut others = Vec::new();
    for (found, ruling) in &rulings {
        let role = match ruling {
            Ruling::There | Ruling::Take if found.wanted => Role::Takes,
            Ruling::There | Ruling::Take => Role::Keeps,
            // One that moved is known by its new place alone.
            Ruling::Away | Ruling::Refuse if !found.wanted && !roots.contains(&found.root) => continue,
            Ruling::Away | Ruling::Refuse => {
                notes.push(found.note());
                Role::Away
            }
        };
        others.push(Volume::new(found.root.clone(), role));
    }
    let takes_itself = config.data_dirs.is_empty() || config.data_dirs.iter().any(|root| same(root, data_dir));
    let nobody_takes = !takes_itself && !others.iter().any(|volume| volume.role == Role::Takes);
    if nobody_takes {
        notes.push("none of data_dirs is there: new topics go to data_dir until one is".to_owned());
    }
    let role = if takes_itself || nobody_takes { Role::Takes } else { Role::Keeps };
    let mut volumes = Volumes::new(Volume::new(data_dir.clone(), role), others);
    if before.recorder.is_none() {
        Said { recorder: Some(recorder), roots: before.roots.clone() }.write(&register)?;
    }
    let mark = |wanted: Ruling| {
        let marked =
            rulings.iter().filter(move |(found, ruling)| *ruling == wanted && found.at.as_ref() != Some(&found.root));
        marked.map(|(found, _)| &found.root).try_for_each(|root| {
            let said = Said { recorder: Some(recorder), roots: BTreeSet::from([root.clone()]) };
            said.write(&root.join(folder::VOLUME_MARK))
        })
    };
    mark(Ruling::Take)?;
    if rulings.iter().any(|(found, ruling)| *ruling == Ruling::There && found.at.as_ref() != Some(&found.root)) {
        volumes = find_again(volumes)?;
    }
    let now = Said { recorder: Some(recorder), roots };
    if now != before {
        now.write(&register)?;
    }
    if let Err(error) = mark(Ruling::There) {
        tracing::warn!(%error, "where a volume lies now is not noted on it; the next start looks again");
    }
    Ok(Opened { volumes, locks, notes })
}

/// Those that the settings name, and those that are known; each folder once, by the name that the settings have for it.
fn look_at_all(config: &Config, before: &Said) -> Result<Vec<Found>, StorageError> {
    let mut all: Vec<Found> = Vec::new();
    let wanted = config.data_dirs.iter().filter(|root| !same(root, &config.data_dir)).map(|root| (root, true));
    for (root, wanted) in wanted.chain(before.roots.iter().map(|root| (root, false))) {
        match all.iter().find(|found| same(&found.root, root)) {
            None => all.push(Found::look(root, wanted)),
            Some(other) if wanted => {
                let (other, root) = (other.root.display(), root.display());
                return Err(StorageError::Directory(format!("{other} and {root} in data_dirs are one folder")));
            }
            Some(_) => {}
        }
    }
    Ok(all)
}

fn refusal(found: &Found) -> String {
    let root = found.root.display();
    match found.mark {
        Mark::DataFolder => {
            format!("{root} in data_dirs is a data folder of its own: serve it as data_dir, or name another folder")
        }
        _ => {
            format!("{root} is another recorder's: take it out of data_dirs, or serve it with that recorder's data_dir")
        }
    }
}

/// Makes a volume's folders and locks it: the folder, because its files may be replaced.
fn lock(root: &Path) -> Result<File, StorageError> {
    let sequences = root.join("sequences");
    std::fs::create_dir_all(&sequences).map_err(|error| StorageError::io("make folder", &sequences, error))?;
    let folder = File::open(root).map_err(|error| StorageError::io("open", root, error))?;
    folder::lock(&folder, root)?;
    folder.sync_all().map_err(|error| StorageError::io("sync folder", root, error))?;
    Ok(folder)
}

/// The names of topics whose volume has another path than before.
fn find_again(volumes: Volumes) -> Result<Volumes, AnyError> {
    let state = DiskState { engine: Engine::Posix, direct: false, registered: false, notes: Vec::new() };
    let ((made, failed), volumes) =
        posix::run(&state, 0, |disk| async move { (relink(&disk, &volumes).await, volumes) })?;
    for error in failed {
        tracing::warn!(%error, "topics of a volume that has another path than before are not found");
    }
    tracing::info!(links = made, "a volume has another path than before: its topics are found there now");
    Ok(volumes)
}

/// Whether two paths are one folder.
fn same(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| -> io::Result<PathBuf> { std::fs::canonicalize(path) };
    a == b || matches!((real(a), real(b)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_taken_left_or_refused_by_what_it_says_and_what_is_known_of_it() {
        let (ours, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let check = |mark: Mark, known, wanted, expected| {
            assert_eq!(rule(&mark, ours, known, wanted), expected, "{mark:?}, known: {known}, wanted: {wanted}");
        };
        check(Mark::Missing, false, true, Ruling::Take);
        // An empty folder where a disk used to be mounted.
        check(Mark::Missing, true, true, Ruling::Away);
        check(Mark::Missing, true, false, Ruling::Away);
        check(Mark::Empty, true, true, Ruling::Take);
        check(Mark::Empty, false, true, Ruling::Take);
        check(Mark::Of(Some(ours)), true, true, Ruling::There);
        check(Mark::Of(Some(ours)), false, true, Ruling::There);
        check(Mark::Of(Some(ours)), true, false, Ruling::There);
        check(Mark::Of(Some(other)), false, true, Ruling::Refuse);
        check(Mark::Of(Some(other)), true, true, Ruling::Refuse);
        check(Mark::Of(Some(other)), true, false, Ruling::Away);
        check(Mark::Empty, true, false, Ruling::Take);
        check(Mark::DataFolder, false, true, Ruling::Refuse);
        check(Mark::DataFolder, true, false, Ruling::Away);
        check(Mark::Broken("EIO".to_owned()), true, true, Ruling::Away);
        check(Mark::Of(None), true, true, Ruling::There);
        check(Mark::Of(None), false, true, Ruling::Refuse);
    }

    #[test]
    fn inv_9_one_damaged_byte_changes_nothing_of_what_is_said() {
        let said = Said {
            recorder: Some(Uuid::from_u128(7)),
            roots: BTreeSet::from([PathBuf::from("/mnt/a"), PathBuf::from("/mnt/b c")]),
        };
        let text = said.text().into_bytes();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(Said::parse(&String::from_utf8_lossy(&damaged)), said, "byte {at}, bit {bit}");
            }
        }
    }
}
