//! Whether the appliance is well: what threads tell, and what `info`, new uploads and the daemon ask.
//!
//! Guarantees: a catalog that refuses commits and a disk that is full are visible here for as long as they
//! last, with the cause. Decides nothing but [`space`], which is pure.

use crate::limits;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use storage::StorageError;
use tokio::sync::watch;

/// How much room there is for new recordings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// Enough.
    Enough,
    /// Less than the low-water mark: a warning.
    Low,
    /// New uploads are refused, and those that run end with what is durable.
    Full,
}

impl Space {
    /// The name in `info`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Enough => "enough",
            Self::Low => "low",
            Self::Full => "full",
        }
    }
}

/// What follows from the bytes that are free beside the reserve. Pure: the state before is needed so that
/// space which comes back in drops does not open and close the door with each of them.
pub(crate) fn space(before: Space, free: u64, reserve: u64) -> Space {
    let (stop, low) = (reserve / 2, reserve * 2);
    match before {
        Space::Full if free < stop + reserve => Space::Full,
        _ if free < stop => Space::Full,
        _ if free < low => Space::Low,
        _ => Space::Enough,
    }
}

impl Space {
    /// The less pleasant of two.
    fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Full, _) | (_, Self::Full) => Self::Full,
            (Self::Low, _) | (_, Self::Low) => Self::Low,
            (Self::Enough, Self::Enough) => Self::Enough,
        }
    }
}

/// One volume's room.
#[derive(Debug)]
pub(crate) struct Room {
    /// As uploads to it are told: a full data folder takes no commits, wherever the rows go.
    pub(crate) space: watch::Sender<Space>,
    /// What was seen last: what follows from its own room, and the bytes free.
    seen: Mutex<(Space, Option<u64>)>,
    /// A write was refused for lack of room since it was looked at.
    refused: AtomicBool,
}

impl Room {
    fn seen(&self) -> (Space, Option<u64>) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What followed from its own room when it was looked at last.
    pub(crate) fn own(&self) -> Space {
        self.seen().0
    }

    /// Bytes free when it was looked at last.
    pub(crate) fn free(&self) -> Option<u64> {
        self.seen().1
    }

    /// Whether a write was refused since this was asked last.
    pub(crate) fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::Relaxed)
    }
}

/// What is known now.
#[derive(Debug)]
pub(crate) struct Health {
    catalog: Mutex<Option<String>>,
    /// The worst of all volumes.
    pub(crate) space: watch::Sender<Space>,
    /// The volumes' rooms, the data folder's first.
    pub(crate) rooms: Vec<Room>,
    /// Set when the catalog must be made again: the daemon stops for it.
    pub(crate) corrupt: watch::Sender<Option<String>>,
    /// A write met a full disk; wakes the watcher.
    pub(crate) full: tokio::sync::Notify,
    /// The program is ending: nobody waits for a catalog that takes no commits.
    giving_up: AtomicBool,
}

impl Default for Health {
    fn default() -> Self {
        Self::of(1)
    }
}

impl Health {
    /// Of so many volumes, the data folder among them.
    pub(crate) fn of(volumes: usize) -> Self {
        let room = || Room {
            space: watch::Sender::new(Space::Enough),
            seen: Mutex::new((Space::Enough, None)),
            refused: AtomicBool::new(false),
        };
        Self {
            catalog: Mutex::new(None),
            space: watch::Sender::new(Space::Enough),
            rooms: std::iter::repeat_with(room).take(volumes).collect(),
            corrupt: watch::Sender::new(None),
            full: tokio::sync::Notify::new(),
            giving_up: AtomicBool::new(false),
        }
    }

    fn catalog(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A commit failed, or the catalog does not open.
    pub(crate) fn catalog_failed(&self, cause: &StorageError) {
        *self.catalog() = Some(cause.to_string());
        if cause.is_full_disk() {
            self.refused(0);
        }
    }

    /// A volume has no room for a write.
    fn refused(&self, volume: usize) {
        if let Some(room) = self.rooms.get(volume) {
            room.refused.store(true, Ordering::Relaxed);
        }
        self.full.notify_one();
    }

    /// A volume has no room for a write: waits until its reserve may be used for what was taken already; says whether it
    /// may.
    pub(crate) async fn reserve_released(&self, volume: usize) -> bool {
        self.refused(volume);
        let Some(room) = self.rooms.get(volume) else { return false };
        let mut space = room.space.subscribe();
        let released = space.wait_for(|space| *space == Space::Full);
        tokio::time::timeout(limits::RESERVE_WAIT, released).await.is_ok()
    }

    /// Commits go well again.
    pub(crate) fn catalog_works(&self) {
        *self.catalog() = None;
    }

    /// Opening it again does not help: it must be made again from the files.
    pub(crate) fn catalog_is_corrupt(&self, cause: &StorageError) {
        self.corrupt.send_replace(Some(cause.to_string()));
    }

    /// From now on a commit that fails is not tried again.
    pub(crate) fn give_up(&self) {
        self.giving_up.store(true, Ordering::Relaxed);
    }

    /// See [`Self::give_up`].
    pub(crate) fn gives_up(&self) -> bool {
        self.giving_up.load(Ordering::Relaxed)
    }

    /// Why commits fail, if they do.
    pub(crate) fn catalog_failure(&self) -> Option<String> {
        self.catalog().clone()
    }

    /// What the watcher saw of one volume.
    pub(crate) fn saw(&self, volume: usize, own: Space, free: u64) {
        if let Some(room) = self.rooms.get(volume) {
            *room.seen.lock().unwrap_or_else(PoisonError::into_inner) = (own, Some(free));
        }
    }

    /// Tells everyone what was seen.
    pub(crate) fn tell_space(&self) {
        let data_folder = self.rooms.first().map_or(Space::Enough, Room::own);
        let change = |sender: &watch::Sender<Space>, now: Space| {
            sender.send_if_modified(|told| std::mem::replace(told, now) != now);
        };
        let mut worst = Space::Enough;
        for room in &self.rooms {
            let now = room.own().worse(data_folder);
            worst = worst.worse(now);
            change(&room.space, now);
        }
        change(&self.space, worst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[track_caller]
    fn check(before: Space, free_mib: u64, expected: Space) {
        assert_eq!(space(before, free_mib * MIB, 100 * MIB), expected, "{free_mib} MiB free");
    }

    #[test]
    fn a_disk_is_low_below_twice_the_reserve_and_full_below_half_of_it() {
        check(Space::Enough, 200, Space::Enough);
        check(Space::Enough, 199, Space::Low);
        check(Space::Low, 50, Space::Low);
        check(Space::Low, 49, Space::Full);
        check(Space::Enough, 10, Space::Full);
    }

    #[test]
    fn a_full_volume_is_told_to_its_own_uploads_and_a_full_data_folder_to_all() {
        let health = Health::of(3);
        let told = || health.rooms.iter().map(|room| *room.space.borrow()).collect::<Vec<_>>();
        health.saw(1, Space::Full, 0);
        health.tell_space();
        assert_eq!((told(), *health.space.borrow()), (vec![Space::Enough, Space::Full, Space::Enough], Space::Full));
        health.saw(1, Space::Enough, 9);
        health.saw(0, Space::Full, 0);
        health.tell_space();
        assert_eq!((told(), *health.space.borrow()), (vec![Space::Full; 3], Space::Full));
    }

    #[test]
    fn a_full_disk_stays_full_until_the_reserve_fits_again() {
        check(Space::Full, 149, Space::Full);
        check(Space::Full, 150, Space::Low);
        check(Space::Full, 1000, Space::Enough);
    }
}
