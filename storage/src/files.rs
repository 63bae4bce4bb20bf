//! Names and whole small files by plain system calls: what the passes at start and the steward need
//! beside the [`crate::disk::Disk`]'s direct reads and writes. Never called on a writer thread.
//!
//! Guarantees: what [`replace`] and [`rename`] did is durable when they return, and after a crash in
//! the middle there is the old or the new, never a mixture.

use crate::limits::SMALL_FILE_BYTES_MAX;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The whole path.
    pub path: PathBuf,
    /// Whether it is a folder, or a link to one that is there.
    pub is_dir: bool,
    /// Whether it is a symbolic link.
    pub is_link: bool,
}

/// What is in a folder, by name; nothing when it is not there.
///
/// # Errors
/// What the system reports.
pub fn list(dir: &Path) -> io::Result<Vec<Entry>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = entries
        .map(|entry| {
            let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
            let is_dir = if kind.is_symlink() { path.is_dir() } else { kind.is_dir() };
            Ok(Entry { path, is_dir, is_link: kind.is_symlink() })
        })
        .collect::<io::Result<Vec<_>>>()?;
    found.sort();
    Ok(found)
}

/// Where the data behind `from` ends: preallocated blocks that nobody wrote do not count where the
/// file system can tell. `from` itself when nothing is behind it.
///
/// # Errors
/// What the system reports.
pub fn data_end(path: &Path, from: u64) -> io::Result<u64> {
    use rustix::fs::SeekFrom;
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut end = from.min(length);
    while end < length {
        match rustix::fs::seek(&file, SeekFrom::Data(end)) {
            Ok(data) => end = rustix::fs::seek(&file, SeekFrom::Hole(data))?,
            Err(rustix::io::Errno::NXIO) => break,
            // No such question on this file system: all of it may be data.
            Err(_) => return Ok(length),
        }
    }
    Ok(end.max(from))
}

/// The bytes of a small file (at most [`SMALL_FILE_BYTES_MAX`]); `None` when it is not there.
///
/// # Errors
/// What the system reports, and a file that is larger.
pub fn read_small(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(SMALL_FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SMALL_FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {SMALL_FILE_BYTES_MAX} bytes")));
    }
    Ok(Some(bytes))
}

/// Removes a file; one that is not there is fine.
///
/// # Errors
/// What the system reports.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes a symbolic link; one that is there already is fine.
///
/// # Errors
/// What the system reports.
pub fn symlink(target: &Path, at: &Path) -> io::Result<()> {
    match std::os::unix::fs::symlink(target, at) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Where a symbolic link points; `None` for what is none, or is not there.
///
/// # Errors
/// What the system reports.
pub fn read_link(path: &Path) -> io::Result<Option<PathBuf>> {
    match std::fs::read_link(path) {
        Ok(target) => Ok(Some(target)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a small file whole, durably, in place of what was there.
///
/// # Errors
/// The first that the system reports; the old file is there then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rename(Path::new(&fresh), path)
}

/// Copies a file, durably.
///
/// # Errors
/// The first that the system reports.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::copy(from, to)?;
    File::open(to)?.sync_all()?;
    match to.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Gives a file or folder another name, durably.
///
/// # Errors
/// The first that the system reports.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    for parent in [to.parent(), from.parent().filter(|parent| Some(*parent) != to.parent())].into_iter().flatten() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Bytes that a process without privileges may still write to the file system of `path`, and its size.
///
/// # Errors
/// What the system reports.
pub fn free_space(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstatvfs(File::open(path)?.as_fd())?;
    Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_has_the_new_bytes_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("f");
        replace(&path, b"one").expect("written");
        replace(&path, b"two").expect("written");
        assert_eq!(std::fs::read(&path).expect("readable"), b"two");
        assert_eq!(list(folder.path()).expect("listed"), [Entry { path, is_dir: false, is_link: false }]);
    }

    #[test]
    fn preallocated_blocks_are_no_data_where_the_file_system_can_tell() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("f");
        let file = File::create(&path).expect("created");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).expect("allocated");
        rustix::io::pwrite(&file, &[1; 8192], 0).expect("written");
        let end = data_end(&path, 8192).expect("asked");
        // Some file systems call preallocated blocks data; then all of the file is looked at.
        assert!(end == 8192 || end == 1 << 20, "{end}");
        assert_eq!(data_end(&path, 1 << 20).expect("asked"), 1 << 20);
    }

    #[test]
    fn a_folder_that_is_not_there_has_nothing_in_it() {
        assert_eq!(list(Path::new("/nowhere/at/all")).expect("listed"), []);
    }
}
