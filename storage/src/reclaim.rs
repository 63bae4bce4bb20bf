//! The space of deleted files, given back to the disk a little at a time.
//!
//! Guarantees: whoever deletes does not wait for it (as far as [`RECLAIM_FILES_MAX`] goes), and the disk is left to others
//! for as long as each piece took, unless its space is short. A file system that discards what it frees (mount option
//! `discard`) keeps the device busy meanwhile: deleted in one go, ten gigabytes make every write behind them wait for a
//! tenth of a second (PERF.md). A file that still has a name, or that anybody else has open, is left as it is. What is
//! not given back when the program ends, the kernel gives back then.

use crate::files::{self, Entry};
use crate::limits::{RECLAIM_FILES_MAX, RECLAIM_SHORT_PART, RECLAIM_STEP_BYTES};
use crate::uring::lease;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// By file system, by its device number: one that is slow or sick does not keep the space of others.
type Lanes = HashMap<u64, SyncSender<File>>;

/// The way to the threads that give space back, one a file system. [`Default`]: there are none, and all goes at once.
#[derive(Debug, Clone, Default)]
pub struct Reclaim {
    lanes: Option<Arc<Mutex<Lanes>>>,
}

impl Reclaim {
    /// Gives back by and by. A thread ends when all handles are gone and what they gave it is done.
    pub fn gently() -> Self {
        Self { lanes: Some(Arc::default()) }
    }

    /// Takes files whose names are gone. Those that find no room go at once.
    pub fn take(&self, files: Vec<File>) {
        for file in files {
            self.lane_of(&file).and_then(|lane| lane.try_send(file).ok()); // Dropped: the kernel gives it back here and now.
        }
    }

    fn lane_of(&self, file: &File) -> Option<SyncSender<File>> {
        let device = file.metadata().ok()?.dev();
        let mut lanes = self.lanes.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get(&device) {
            return Some(lane.clone());
        }
        let (lane, files) = sync_channel(RECLAIM_FILES_MAX);
        std::thread::Builder::new().name("fb-reclaim".to_owned()).spawn(move || give_back_all(&files)).ok()?;
        lanes.insert(device, lane.clone());
        Some(lane)
    }
}

/// Opens a large file, or those in a folder and below it, [`RECLAIM_FILES_MAX`] at most: as long as they are open,
/// their names can go without their space. What cannot be opened is left out, what a link leads to, and what has another
/// name.
pub fn keep_open(path: &Path) -> Vec<File> {
    let mut kept = Vec::new();
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => keep_entries(files::list(path).unwrap_or_default(), &mut kept),
        Ok(metadata) if metadata.is_file() => kept.extend(open_large(path)),
        _ => {}
    }
    kept
}

fn keep_entries(entries: Vec<Entry>, kept: &mut Vec<File>) {
    for Entry { path, is_dir, .. } in entries.into_iter().filter(|entry| !entry.is_link) {
        if RECLAIM_FILES_MAX <= kept.len() {
            return;
        }
        if is_dir {
            keep_entries(files::list(&path).unwrap_or_default(), kept);
        } else {
            kept.extend(open_large(&path));
        }
    }
}

fn open_large(path: &Path) -> Option<File> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let metadata = file.metadata().ok()?;
    let large = metadata.is_file() && metadata.nlink() == 1 && RECLAIM_STEP_BYTES < metadata.len();
    large.then_some(file)
}

fn give_back_all(files: &Receiver<File>) {
    while let Ok(file) = files.recv() {
        give_back(&file, std::thread::park_timeout).ok(); // What was not cut goes in one piece with the descriptor.
    }
}

/// Cuts a file without a name piece by piece; the last one goes with the descriptor.
fn give_back(file: &File, pause: impl Fn(Duration)) -> io::Result<()> {
    // Its folder could not be removed, or somebody has another name for it, or reads it still: its bytes are theirs. (With
    // no name and a lease, nobody can come by it any more.)
    let stat = rustix::fs::fstat(file)?;
    if stat.st_nlink > 0 || lease::exclusive(file).is_err() {
        return Ok(());
    }
    let mut left = u64::try_from(stat.st_size).unwrap_or(0);
    while RECLAIM_STEP_BYTES < left {
        left -= RECLAIM_STEP_BYTES;
        let began = Instant::now();
        rustix::fs::ftruncate(file, left)?;
        let space = rustix::fs::fstatvfs(file)?;
        if space.f_blocks / RECLAIM_SHORT_PART <= space.f_bavail {
            pause(began.elapsed());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const LENGTH: u64 = 3 * RECLAIM_STEP_BYTES + 1;

    fn folder_with(name: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("topic")).expect("made");
        let file = File::create(folder.path().join("topic").join(name)).expect("made");
        file.set_len(LENGTH).expect("sparse");
        File::create(folder.path().join("small")).expect("made").set_len(RECLAIM_STEP_BYTES).expect("sparse");
        std::os::unix::fs::symlink(folder.path(), folder.path().join("topic/around")).expect("linked");
        folder
    }

    #[test]
    fn a_deleted_file_goes_back_in_pieces_with_a_pause_behind_each() {
        let folder = folder_with("segment");
        let kept = keep_open(folder.path());
        assert_eq!(kept.len(), 1, "only what is large, once");
        std::fs::remove_dir_all(folder.path()).expect("removed");
        let pauses = Cell::new(0);
        give_back(&kept[0], |_| pauses.set(pauses.get() + 1)).expect("given back");
        assert_eq!((pauses.get(), kept[0].metadata().expect("its length").len()), (3, 1));
    }

    #[test]
    fn inv_3_a_file_that_has_another_name_keeps_its_bytes() {
        let folder = folder_with("segment");
        let other = tempfile::tempdir_in(folder.path().parent().expect("a parent")).expect("a folder");
        let kept = keep_open(folder.path());
        let name = other.path().join("kept by somebody");
        std::fs::hard_link(folder.path().join("topic/segment"), &name).expect("linked");
        assert!(keep_open(folder.path()).is_empty(), "it has two names");
        std::fs::remove_dir_all(folder.path()).expect("removed");
        give_back(&kept[0], |_| unreachable!("nothing is cut")).expect("left");
        assert_eq!(std::fs::metadata(&name).expect("it is there").len(), LENGTH);
    }

    #[test]
    fn inv_3_a_file_that_somebody_still_reads_keeps_its_bytes() {
        let folder = folder_with("segment");
        let reader = File::open(folder.path().join("topic/segment")).expect("opened");
        let kept = keep_open(folder.path());
        std::fs::remove_dir_all(folder.path()).expect("removed");
        give_back(&kept[0], |_| unreachable!("nothing is cut")).expect("left");
        assert_eq!(reader.metadata().expect("its length").len(), LENGTH);
    }

    #[test]
    fn what_finds_no_room_or_no_thread_is_let_go_at_once() {
        let folder = folder_with("segment");
        Reclaim::default().take(keep_open(folder.path()));
        let (lane, files) = sync_channel(1);
        let full = Reclaim::gently();
        let device = std::fs::metadata(folder.path()).expect("its device").dev();
        full.lanes.as_ref().expect("gently").lock().expect("alone").insert(device, lane);
        full.take((0..3).flat_map(|_| keep_open(folder.path())).collect());
        drop(full);
        assert_eq!(files.iter().count(), 1);
    }
}
