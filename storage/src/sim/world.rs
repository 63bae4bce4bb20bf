//! What is on the simulated disk: as a reader sees it, and as it is certain to be after a crash.

use super::{Faults, Random};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

pub(super) const SECTOR_BYTES: usize = 512;
/// Buffers that writes and reads share.
pub(super) const BUFFERS: usize = 16;

/// A file.
#[derive(Debug, Clone, Default)]
pub(super) struct SimFile {
    /// As a reader sees it now.
    pub(super) seen: Vec<u8>,
    /// As it is certain to be after a crash.
    pub(super) durable: Vec<u8>,
    /// Complete and not synced, in the order they completed, numbered.
    pub(super) unsynced: Vec<(u64, usize, Vec<u8>)>,
    pub(super) completed: u64,
}

impl SimFile {
    fn after_crash(&self, random: &mut Random) -> Self {
        let mut found = self.durable.clone();
        // The length may be any between what was certain and what was seen.
        if found.len() < self.seen.len() && random.below(2) == 0 {
            found.resize(self.seen.len(), 0);
        }
        for (_, at, bytes) in &self.unsynced {
            // Often all of a write or nothing, sometimes any of its sectors.
            let mode = random.below(3);
            for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                let keep = match mode {
                    0 => true,
                    1 => false,
                    _ => random.below(2) == 0,
                };
                if keep {
                    put(&mut found, at + index * SECTOR_BYTES, sector);
                }
            }
        }
        Self { durable: found.clone(), seen: found, ..Self::default() }
    }
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) files: Vec<SimFile>,
    /// Names of files.
    pub(super) names: BTreeMap<PathBuf, usize>,
    pub(super) folders: BTreeSet<PathBuf>,
    /// Symbolic links.
    pub(super) links: BTreeMap<PathBuf, PathBuf>,
    /// Roots of the file systems beside the first.
    pub(super) mounts: BTreeSet<PathBuf>,
    /// Names, of all kinds, that a crash may take.
    pub(super) unsynced_names: BTreeSet<PathBuf>,
    pub(super) operations: u64,
    pub(super) crash_at: u64,
    pub(super) crashed: bool,
    pub(super) faults: Faults,
    /// Buffers that may still be made, and those that came back.
    pub(super) buffers: usize,
    pub(super) pool: Vec<Vec<u8>>,
}

impl World {
    /// A path without links; of the last name only if `follow`.
    pub(super) fn resolve(&self, path: &Path, follow: bool) -> PathBuf {
        let above = path.ancestors().skip(usize::from(!follow));
        for at in above {
            if let (Some(target), Ok(rest)) = (self.links.get(at), path.strip_prefix(at)) {
                return if rest.as_os_str().is_empty() { target.clone() } else { target.join(rest) };
            }
        }
        path.to_owned()
    }

    /// The file that a path names.
    pub(super) fn file(&self, path: &Path) -> Option<usize> {
        self.names.get(&self.resolve(path, true)).copied()
    }

    pub(super) fn is_taken(&self, name: &Path) -> bool {
        self.names.contains_key(name) || self.folders.contains(name) || self.links.contains_key(name)
    }

    /// Refuses what only works within one file system.
    pub(super) fn within_one(&self, from: &Path, to: &Path) -> io::Result<()> {
        let of = |path: &Path| self.mounts.iter().rfind(|root| path.starts_with(root));
        if of(from) == of(to) { Ok(()) } else { Err(io::ErrorKind::CrossesDevices.into()) }
    }

    /// What a crash leaves: of names and writes that no sync covered, some.
    pub(super) fn after_crash(&self, random: &mut Random, crash_at: u64, faults: Faults) -> Self {
        let lost: Vec<&PathBuf> = self.unsynced_names.iter().filter(|_| random.below(2) == 0).collect();
        let is_kept = |path: &Path| !lost.iter().any(|lost| path.starts_with(lost));
        Self {
            folders: self.folders.iter().filter(|path| is_kept(path)).cloned().collect(),
            links: self.links.iter().filter(|(p, _)| is_kept(p)).map(|(p, t)| (p.clone(), t.clone())).collect(),
            mounts: self.mounts.clone(),
            names: self.names.iter().filter(|(path, _)| is_kept(path)).map(|(p, f)| (p.clone(), *f)).collect(),
            files: self.files.iter().map(|file| file.after_crash(random)).collect(),
            crash_at,
            faults,
            buffers: BUFFERS - self.pool.len(),
            pool: self.pool.clone(),
            ..Self::default()
        }
    }
}

/// Puts bytes at their place, behind zeros if it lies behind the end.
pub(super) fn put(into: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if into.len() < at + bytes.len() {
        into.resize(at + bytes.len(), 0);
    }
    into[at..at + bytes.len()].copy_from_slice(bytes);
}
