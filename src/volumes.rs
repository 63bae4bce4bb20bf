//! Which volumes there are at start, and whether each is there (`data_dirs`).
//!
//! Guarantees: rows go only to a volume that says it is this recorder's, so never into the empty folder of a disk that
//! is not mounted, and never to another recorder's; a volume that is not there is told and left alone, and recording
//! goes on with the others; two recorders never share one. The data folder's file `volumes` remembers them, each
//! volume's file [`MARK`] says whose it is; both say everything three times, so that a damaged byte is outvoted (INV-9).

use crate::config::Config;
use crate::folder;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use storage::disk::DiskState;
use storage::volumes::{Role, Volume, Volumes, relink};
use storage::{StorageError, files, posix};
use uuid::Uuid;

type AnyError = Box<dyn std::error::Error>;

/// The file that says whose a volume is.
const MARK: &str = "flightbox-volume";
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
    /// The file is there and empty: somebody gives it away.
    Empty,
    /// Whose it is; `None` where that cannot be read.
    Of(Option<Uuid>),
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

/// Pure. `known`: it was this recorder's before; `wanted`: the settings name it.
fn rule(mark: &Mark, recorder: Uuid, known: bool, wanted: bool) -> Ruling {
    match mark {
        Mark::Of(Some(id)) if *id == recorder => Ruling::There,
        Mark::Of(None) if known => Ruling::There,
        Mark::Of(_) if wanted => Ruling::Refuse,
        Mark::Empty if wanted => Ruling::Take,
        Mark::Missing if wanted && !known => Ruling::Take,
        Mark::Missing | Mark::Empty | Mark::Of(_) => Ruling::Away,
    }
}

/// Finds out, under the data folder's lock.
///
/// # Errors
/// When a volume is another recorder's or in use, none takes topics, or one cannot be written to.
pub(crate) fn open(config: &Config) -> Result<Opened, AnyError> {
    let data_dir = &config.data_dir;
    let register = data_dir.join(REGISTER);
    let before = Said::read(&register)?.map(|(said, _)| said).unwrap_or_default();
    if config.data_dirs.is_empty() && before.roots.is_empty() {
        return Ok(Opened { volumes: Volumes::only(data_dir.clone()), locks: Vec::new(), notes: Vec::new() });
    }
    let is_data_dir = |root: &Path| same(root, data_dir);
    let takes_itself = config.data_dirs.is_empty() || config.data_dirs.iter().any(|root| is_data_dir(root));
    let wanted: Vec<&PathBuf> = config.data_dirs.iter().filter(|root| !is_data_dir(root)).collect();
    let mut marks = Vec::new();
    for root in wanted.iter().copied().chain(before.roots.iter().filter(|root| !wanted.contains(root))) {
        let mark = Said::read(&root.join(MARK));
        let (mark, at) = match mark? {
            None => (Mark::Missing, None),
            Some((_, true)) => (Mark::Empty, None),
            Some((said, false)) => (Mark::Of(said.recorder), said.roots.into_iter().next()),
        };
        marks.push((root.clone(), mark, at));
    }
    // A data folder that was lost and made anew takes the name that its volumes know.
    let told = marks.iter().find_map(|(_, mark, _)| if let Mark::Of(id) = mark { *id } else { None });
    let recorder = before.recorder.or(told).unwrap_or_else(Uuid::new_v4);
    let mut now = Said { recorder: Some(recorder), roots: before.roots.clone() };
    if before.recorder.is_none() {
        now.write(&register)?;
    }
    let (mut others, mut locks, mut notes, mut moved) = (Vec::new(), Vec::new(), Vec::new(), false);
    for (root, mark, at) in marks {
        let (known, is_wanted) = (before.roots.contains(&root), wanted.contains(&&root));
        let ruling = rule(&mark, recorder, known, is_wanted);
        let role = match ruling {
            Ruling::There | Ruling::Take => {
                moved |= at.as_ref().is_some_and(|at| *at != root);
                now.roots.retain(|known| Some(known) != at.as_ref() || known == &root);
                locks.push(take(&root, recorder)?);
                now.roots.insert(root.clone());
                if is_wanted { Role::Takes } else { Role::Keeps }
            }
            Ruling::Away => {
                notes.push(format!(
                    "{} is not there: its topics cannot be read, new ones go elsewhere; mount it, or, if the disk was \
                     replaced by an empty one, put an empty file `{MARK}` on it",
                    root.display()
                ));
                Role::Away
            }
            Ruling::Refuse => {
                let text = format!(
                    "{} is another recorder's: take it out of data_dirs, or serve it with that recorder's data_dir",
                    root.display()
                );
                return Err(StorageError::Directory(text).into());
            }
        };
        others.push(Volume::new(root, role));
    }
    // One that moved is known by its new place alone.
    others.retain(|volume| volume.role != Role::Away || now.roots.contains(&volume.root));
    notes.retain(|note| others.iter().any(|volume| note.starts_with(&format!("{} ", volume.root.display()))));
    if now != before {
        now.write(&register)?;
    }
    let data = Volume::new(data_dir.clone(), if takes_itself { Role::Takes } else { Role::Keeps });
    let volumes = Volumes::new(data, others);
    if !volumes.all().iter().any(|volume| volume.role == Role::Takes) {
        return Err(StorageError::Directory(format!("no volume takes new topics: {}", notes.join("; "))).into());
    }
    if moved {
        let state = DiskState { engine: storage::disk::Engine::Posix, direct: false, registered: false, notes: vec![] };
        let links = posix::run(&state, 0, |disk| async move {
            let made = relink(&disk, &volumes).await;
            (made, volumes)
        })?;
        let (made, volumes) = links;
        tracing::info!(links = made?, "a volume has another path than before: its topics are found there now");
        return Ok(Opened { volumes, locks, notes });
    }
    Ok(Opened { volumes, locks, notes })
}

/// Makes a volume ready and locks it.
fn take(root: &Path, recorder: Uuid) -> Result<File, AnyError> {
    let sequences = root.join("sequences");
    std::fs::create_dir_all(&sequences).map_err(|error| StorageError::io("make folder", &sequences, error))?;
    let path = root.join(MARK);
    let said = Said { recorder: Some(recorder), roots: BTreeSet::from([root.to_owned()]) };
    // Locked before it is written: a running recorder's is left as it is. The folder, because the file is replaced.
    let folder = File::open(root).map_err(|error| StorageError::io("open", root, error))?;
    folder::lock(&folder, root)?;
    if Said::read(&path)?.is_none_or(|(now, _)| now != said) {
        said.write(&path)?;
    }
    folder.sync_all().map_err(|error| StorageError::io("sync folder", root, error))?;
    Ok(folder)
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
