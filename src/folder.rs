//! The data folder: its lock, its format, its catalog, which is made again from the files when it must be.
//!
//! Guarantees: one process at a time; a newer format is refused, an older one migrated in one synced step; a
//! catalog that cannot be opened never stops the start (INV-9): it is set aside, not removed, and a crash at
//! any point of making it again begins that work anew. `rebuild-catalog`, which says why, is written first
//! and removed last.

use crate::rings::{DiskBody, on_disk};
use crate::when::now_ns;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use storage::catalog::records::TopicRecord;
use storage::catalog::{Catalog, salvage};
use storage::depth::Buffers;
use storage::disk::{Disk, DiskState};
use storage::limits::RING_BUFFERS_PER_SERVICE;
use storage::rebuild::{self, Rebuilt};
use storage::volumes::{Role, Volumes};
use storage::{StorageError, files};

type AnyError = Box<dyn std::error::Error>;

/// On-disk format written by this version; a newer one is refused.
pub(crate) const FORMAT_VERSION: u32 = 3;
/// The kernel keeps a dead process's ring files, and so its lock, for a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

const CATALOG: &str = "catalog";
const FRESH_CATALOG: &str = "catalog.new";
const REBUILD_MARKER: &str = "rebuild-catalog";
const SYNCED_MARK: &str = "catalog.synced";
/// Volumes that were not there when the catalog was made from the files.
const WITHOUT: &str = "catalog.without";
const ASIDE_PREFIX: &str = "catalog.damaged-";
/// The file that says whose a volume is.
pub(crate) const VOLUME_MARK: &str = "flightbox-volume";
/// Kept free for a full disk, see `housekeeping`.
pub(crate) const RESERVE: &str = "reserve";

/// Makes the folder, takes its lock, checks its format and returns it.
pub(crate) fn prepare(dir: &Path) -> Result<(File, u32), AnyError> {
    if dir.join(VOLUME_MARK).is_file() && !is_data_folder(dir) {
        let text = format!(
            "{} is a volume of a recorder, not a data folder; name it in data_dirs of that recorder",
            dir.display()
        );
        return Err(StorageError::Directory(text).into());
    }
    for folder in [dir.to_owned(), dir.join("sequences"), dir.join("browse")] {
        std::fs::create_dir_all(&folder).map_err(|error| StorageError::io("make folder", &folder, error))?;
    }
    let path = dir.join("LOCK");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| StorageError::io("open", &path, error))?;
    self::lock(&lock, dir)?;
    let format = check_format(dir)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| StorageError::io("sync folder", dir, error))?;
    Ok((lock, format))
}

/// Makes a folder this process's own, as long as `file` is open.
///
/// # Errors
/// When another process has it and keeps it.
pub(crate) fn lock(file: &File, dir: &Path) -> Result<(), StorageError> {
    let since = Instant::now();
    while let Err(error) = rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK {
            return Err(StorageError::io("lock", dir, error.into()));
        }
        if since.elapsed() > LOCK_PATIENCE {
            let text =
                format!("{} is in use by another flightbox ({error}); stop it or choose another folder", dir.display());
            return Err(StorageError::Directory(text));
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    Ok(())
}

/// Whether a recorder has its catalog here.
pub(crate) fn is_data_folder(dir: &Path) -> bool {
    dir.join("format-version").is_file() || dir.join(CATALOG).is_dir()
}

fn check_format(dir: &Path) -> Result<u32, AnyError> {
    let path = dir.join("format-version");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write_format(dir)?;
            return Ok(FORMAT_VERSION);
        }
        Err(error) => return Err(StorageError::io("read", &path, error).into()),
    };
    // Written three times, so that one damaged byte is outvoted.
    let text = String::from_utf8_lossy(&bytes);
    let said: Vec<u32> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let votes = |version: u32| said.iter().filter(|said| **said == version).count();
    let version = said.iter().copied().max_by_key(|version| votes(*version));
    match version {
        Some(version) if said.len() == 1 || votes(version) > 1 => {
            if version > FORMAT_VERSION {
                return Err(StorageError::Directory(format!(
                    "{} has format {version}, this flightbox writes {FORMAT_VERSION}; use a newer flightbox",
                    dir.display()
                ))
                .into());
            }
            Ok(version)
        }
        _ => {
            tracing::error!(path = %path.display(), found = %text, "the format version is damaged; taken as {FORMAT_VERSION}");
            write_format(dir)?;
            Ok(FORMAT_VERSION)
        }
    }
}

pub(crate) fn write_format(dir: &Path) -> Result<(), AnyError> {
    let (path, fresh) = (dir.join("format-version"), dir.join("format-version.new"));
    let made = std::fs::write(&fresh, format!("{FORMAT_VERSION}\n{FORMAT_VERSION}\n{FORMAT_VERSION}\n"))
        .and_then(|()| File::open(&fresh)?.sync_all())
        .and_then(|()| std::fs::rename(&fresh, &path))
        .and_then(|()| File::open(dir)?.sync_all());
    Ok(made.map_err(|error| StorageError::io("write", &path, error))?)
}

/// A catalog, and what had to be done to have it.
pub(crate) struct Opened {
    pub(crate) catalog: Catalog,
    /// Why it was made again, or what it lost.
    pub(crate) was: Option<String>,
    pub(crate) rebuilt: Option<Rebuilt>,
}

/// Opens the catalog; one that is damaged or missing is made again from the files.
pub(crate) fn open_catalog(volumes: &Arc<Volumes>, disk: &DiskState) -> Result<Opened, AnyError> {
    let data_dir = volumes.data_dir();
    let path = data_dir.join(CATALOG);
    if let Some(marker) = Marker::read(data_dir)? {
        if !marker.is_done(data_dir) {
            return rebuild_catalog(volumes, disk, marker.cause, &mut |_| {});
        }
        // The crash came between the last two steps.
        marker.remove(data_dir)?;
    }
    // Without this file RocksDB would begin an empty catalog.
    if std::fs::metadata(path.join("CURRENT")).is_err() && has_recordings(volumes)? {
        return rebuild_catalog(volumes, disk, "it is missing".to_owned(), &mut |_| {});
    }
    if let Some(root) = Without::read(data_dir)?.has_come_back(volumes) {
        let cause = format!("it was made while {} was not there", root.display());
        return rebuild_catalog(volumes, disk, cause, &mut |_| {});
    }
    let mut opened = Catalog::open(&path, disk.direct);
    if opened.as_ref().is_err_and(StorageError::is_full_disk) {
        // Opening writes: the reserve is for this.
        files::remove_file(&data_dir.join(RESERVE)).map_err(|error| StorageError::io("remove", data_dir, error))?;
        opened = Catalog::open(&path, disk.direct);
    }
    let cause = match opened {
        Ok(catalog) => match log_ended_early(data_dir, &catalog)? {
            None => return Ok(Opened { catalog, was: None, rebuilt: None }),
            // What is gone with it may be names, locks and deletions: the files know better.
            Some(early) => early,
        },
        Err(error) if is_of_the_machine(&error) => return Err(error.into()),
        Err(error) => error.to_string(),
    };
    rebuild_catalog(volumes, disk, cause, &mut |_| {})
}

/// Failures to open that say nothing about the catalog's bytes: the start fails, and nothing is touched.
fn is_of_the_machine(error: &StorageError) -> bool {
    let text = error.to_string();
    let signs = [
        "No space left",
        "Too many open files",
        "Permission denied",
        "Read-only file system",
        "Cannot allocate memory",
        "lock ",
        "Resource temporarily unavailable",
    ];
    !error.is_corruption() && signs.iter().any(|sign| text.contains(sign))
}

/// Says that the catalog must be made again: written first, removed last.
struct Marker {
    /// Name of the folder that the old catalog is set aside as.
    aside: String,
    cause: String,
}

impl Marker {
    fn path(data_dir: &Path) -> PathBuf {
        data_dir.join(REBUILD_MARKER)
    }

    fn read(data_dir: &Path) -> Result<Option<Self>, StorageError> {
        let path = Self::path(data_dir);
        let bytes = files::read_small(&path).map_err(|error| StorageError::io("read", &path, error))?;
        Ok(bytes.map(|bytes| {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let (aside, cause) = text.split_once('\n').unwrap_or(("", &text));
            // One that rotted: the old catalog gets a name of its own, and is asked again.
            let known = aside.starts_with(ASIDE_PREFIX) && !aside.contains('/');
            let aside = if known { aside.to_owned() } else { fresh_aside() };
            Self { aside, cause: cause.to_owned() }
        }))
    }

    fn write(&self, data_dir: &Path) -> Result<(), StorageError> {
        let path = Self::path(data_dir);
        let text = format!("{}\n{}", self.aside, self.cause);
        files::replace(&path, text.as_bytes()).map_err(|error| StorageError::io("write", &path, error))
    }

    fn remove(&self, data_dir: &Path) -> Result<(), StorageError> {
        let path = Self::path(data_dir);
        files::remove_file(&path).map_err(|error| StorageError::io("remove", &path, error))
    }

    /// Whether all but the marker's own removal was done.
    fn is_done(&self, data_dir: &Path) -> bool {
        data_dir.join(&self.aside).is_dir() && data_dir.join(CATALOG).is_dir() && !data_dir.join(FRESH_CATALOG).is_dir()
    }
}

fn fresh_aside() -> String {
    format!("{ASIDE_PREFIX}{}", now_ns())
}

/// Asks the next start to make the catalog again.
pub(crate) fn ask_for_rebuild(data_dir: &Path, cause: &str) -> Result<(), StorageError> {
    Marker { aside: fresh_aside(), cause: cause.to_owned() }.write(data_dir)
}

/// Sets the catalog aside and makes another from the files, with what can still be read of the old one.
pub(crate) fn rebuild_catalog(
    volumes: &Arc<Volumes>,
    disk: &DiskState,
    cause: String,
    progress: &mut dyn FnMut(&Rebuilt),
) -> Result<Opened, AnyError> {
    tracing::error!(%cause, "the catalog cannot be used: it is made again from the files");
    let data_dir = volumes.data_dir();
    let marker = match Marker::read(data_dir)? {
        Some(marker) => marker,
        None => Marker { aside: fresh_aside(), cause: cause.clone() },
    };
    marker.write(data_dir)?;
    let (path, fresh, aside) = (data_dir.join(CATALOG), data_dir.join(FRESH_CATALOG), data_dir.join(&marker.aside));
    if path.is_dir() && !aside.is_dir() {
        files::rename(&path, &aside).map_err(|error| StorageError::io("set aside", &path, error))?;
    }
    match std::fs::remove_dir_all(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StorageError::io("remove", &fresh, error).into());
        }
        _ => {}
    }
    let catalog = Catalog::open(&fresh, disk.direct)?;
    let mut rebuilt = from_files(volumes, disk, &catalog, progress)?;
    if aside.is_dir() {
        let take = |topic: &TopicRecord| volumes.check_there(topic).is_ok();
        salvaged(&aside, data_dir, &catalog, &salvage::Take { all: true, topic: &take }, &mut rebuilt)?;
    } else {
        rebuilt.missing.push("the tails of open topics: rows that were in no chunk yet".to_owned());
    }
    // Catalogs before that one knew the topics of volumes that were not there then.
    let without = Without::read(data_dir)?;
    for earlier in without.asides.iter().map(|name| data_dir.join(name)).filter(|earlier| earlier.is_dir()) {
        let was_away = |topic: &TopicRecord| {
            let home = volumes.there(topic);
            home.is_some_and(|root| without.roots.iter().any(|known| known == root))
        };
        salvaged(&earlier, data_dir, &catalog, &salvage::Take { all: false, topic: &was_away }, &mut rebuilt)?;
    }
    let asides = without.asides.into_iter().chain([marker.aside.clone()]).collect();
    Without::now(volumes, asides).write(data_dir)?;
    mark_synced(data_dir, &catalog)?;
    drop(catalog);
    files::rename(&fresh, &path).map_err(|error| StorageError::io("rename", &fresh, error))?;
    let catalog = Catalog::open(&path, disk.direct)?;
    marker.remove(data_dir)?;
    Ok(Opened { catalog, was: Some(cause), rebuilt: Some(rebuilt) })
}

/// Reads the files on a thread with a ring of its own.
fn from_files(
    volumes: &Arc<Volumes>,
    disk: &DiskState,
    into: &Catalog,
    progress: &mut dyn FnMut(&Rebuilt),
) -> Result<Rebuilt, AnyError> {
    let (told, hear) = mpsc::channel();
    let body = RebuildBody { volumes: Arc::clone(volumes), into: into.clone(), told };
    let thread = on_disk("fb-rebuild", disk, Buffers::of(RING_BUFFERS_PER_SERVICE), body)?;
    let mut result = Err(StorageError::Directory("the thread that reads the files has died".to_owned()));
    for news in hear {
        match news {
            News::So(done) => progress(&done),
            News::End(end) => result = end,
        }
    }
    if thread.join().is_err() {
        tracing::error!("the thread that reads the files panicked");
    }
    Ok(result?)
}

enum News {
    So(Rebuilt),
    End(Result<Rebuilt, StorageError>),
}

struct RebuildBody {
    volumes: Arc<Volumes>,
    into: Catalog,
    told: mpsc::Sender<News>,
}

impl DiskBody for RebuildBody {
    async fn run<D: Disk>(self, disk: D) {
        let Self { volumes, into, told } = self;
        let mut progress = |done: &Rebuilt| {
            told.send(News::So(done.clone())).ok(); // Whoever watches may have gone.
        };
        let result = rebuild::rebuild(&disk, &volumes, &into, now_ns(), &mut progress).await;
        told.send(News::End(result)).ok(); // As above.
    }
}

/// Fills up from an older catalog. A full disk fails: room is a matter of time, tails are not.
fn salvaged(
    aside: &Path,
    data_dir: &Path,
    into: &Catalog,
    take: &salvage::Take<'_>,
    rebuilt: &mut Rebuilt,
) -> Result<(), AnyError> {
    match salvage::salvage(aside, &data_dir.join("catalog.salvage"), into, now_ns(), take) {
        Ok(found) => rebuilt.missing.extend(found),
        // The next start tries again.
        Err(error) if error.is_full_disk() => return Err(error.into()),
        Err(error) => rebuilt.missing.push(format!("tails and what else only the old catalog had: {error}")),
    }
    Ok(())
}

/// Volumes that were not there when the catalog was made from the files, and the catalogs that knew their topics.
#[derive(Debug, Default)]
struct Without {
    roots: Vec<PathBuf>,
    /// Names of folders beside the catalog.
    asides: Vec<String>,
}

impl Without {
    fn now(volumes: &Volumes, asides: Vec<String>) -> Self {
        let away = volumes.all().iter().filter(|volume| volume.role == Role::Away);
        Self { roots: away.map(|volume| volume.root.clone()).collect(), asides }
    }

    fn read(data_dir: &Path) -> Result<Self, StorageError> {
        let path = data_dir.join(WITHOUT);
        let bytes = files::read_small(&path).map_err(|error| StorageError::io("read", &path, error))?;
        let mut without = Self::default();
        for line in String::from_utf8_lossy(bytes.as_deref().unwrap_or(&[])).lines() {
            if line.starts_with(ASIDE_PREFIX) && !line.contains('/') {
                without.asides.push(line.to_owned());
            } else {
                without.roots.push(PathBuf::from(line));
            }
        }
        Ok(without)
    }

    fn write(&self, data_dir: &Path) -> Result<(), StorageError> {
        let path = data_dir.join(WITHOUT);
        let roots = self.roots.iter().map(|root| format!("{}\n", root.display()));
        let text: String = roots.chain(self.asides.iter().map(|aside| format!("{aside}\n"))).collect();
        let written =
            if self.roots.is_empty() { files::remove_file(&path) } else { files::replace(&path, text.as_bytes()) };
        written.map_err(|error| StorageError::io("write", &path, error))
    }

    /// One that is there now.
    fn has_come_back(&self, volumes: &Volumes) -> Option<&PathBuf> {
        let is_away = |root: &Path| volumes.all().iter().any(|volume| volume.role == Role::Away && volume.root == root);
        self.roots.iter().find(|root| !is_away(root))
    }
}

fn has_recordings(volumes: &Volumes) -> Result<bool, StorageError> {
    let roots = volumes.others().map(|volume| volume.root.as_path()).chain([volumes.data_dir()]);
    for dir in roots.map(|root| root.join("sequences")) {
        if !files::list(&dir).map_err(|error| StorageError::io("list", &dir, error))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Notes how far the catalog's log reached, so that one that ends before is noticed.
pub(crate) fn mark_synced(data_dir: &Path, catalog: &Catalog) -> Result<(), StorageError> {
    let path = data_dir.join(SYNCED_MARK);
    let text = format!("{}\n", catalog.sequence_number()?);
    files::replace(&path, text.as_bytes()).map_err(|error| StorageError::io("write", &path, error))
}

/// RocksDB takes a log up to its first damaged record, as if the power had been cut there.
fn log_ended_early(data_dir: &Path, catalog: &Catalog) -> Result<Option<String>, StorageError> {
    let path = data_dir.join(SYNCED_MARK);
    let mark = files::read_small(&path).map_err(|error| StorageError::io("read", &path, error))?;
    let reached: Option<u64> = mark.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok());
    let found = catalog.sequence_number()?;
    Ok(reached.filter(|reached| found < *reached).map(|reached| {
        format!(
            "its log ended early, {} changes are missing: rows that were only in the tail are gone",
            reached - found
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_9_one_flipped_byte_in_the_format_version_stops_no_start() {
        let folder = tempfile::tempdir().expect("a folder");
        write_format(folder.path()).expect("written");
        let path = folder.path().join("format-version");
        let whole = std::fs::read(&path).expect("readable");
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << bit;
                std::fs::write(&path, &damaged).expect("written");
                assert_eq!(check_format(folder.path()).expect("checked"), FORMAT_VERSION, "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_newer_format_is_refused_and_an_older_one_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        for (text, expected) in [("2\n", Some(2)), ("9\n9\n9\n", None), ("1\n1\n1\n", Some(1))] {
            std::fs::write(folder.path().join("format-version"), text).expect("written");
            assert_eq!(check_format(folder.path()).ok(), expected, "{text:?}");
        }
    }
}
