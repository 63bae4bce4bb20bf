//! How much of a segment is reserved ahead of what is written: pure, with the budget of all segments together.

use crate::segment;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most that is reserved at once for a segment that no chunk has asked for yet, as a part of what is left.
const AHEAD_PART: u64 = 8;

/// Unused preallocation of all open segments together.
#[derive(Debug)]
pub struct PreallocBudget {
    bytes_max: u64,
    unused: AtomicU64,
}

impl PreallocBudget {
    /// A budget of `bytes_max`.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, unused: AtomicU64::new(0) }
    }

    pub(super) fn left(&self) -> u64 {
        self.bytes_max.saturating_sub(self.unused.load(Ordering::Relaxed))
    }

    pub(super) fn take(&self, bytes: u64) {
        self.unused.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.unused.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// How many bytes to preallocate next; pure. `None`: nothing, the write extends the file.
pub(super) fn prealloc_step(allocated: u64, write_at: u64, chunk: u64, segment_bytes: u64, left: u64) -> Option<u64> {
    let needed = (write_at + chunk).saturating_sub(allocated).next_multiple_of(1 << 20);
    if needed == 0 || left < needed {
        return None;
    }
    // Doubling with what was written: a slow topic reserves little, a fast one rarely asks.
    let doubled = needed.max(write_at);
    let room = segment_bytes.saturating_sub(allocated).max(needed);
    Some(segment::block_ceil(doubled.min(room).min(left).max(needed)))
}

/// How many bytes to preallocate of a segment that is made before it is needed; pure. Its topic fills whole
/// segments, so there is no need to begin small; other topics' segments want their part.
pub(super) fn ahead_step(segment_bytes: u64, left: u64) -> u64 {
    segment::block_floor(segment_bytes.min(left / AHEAD_PART))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[track_caller]
    fn check(allocated: u64, write_at: u64, chunk: u64, left: u64, expected: Option<u64>) {
        assert_eq!(prealloc_step(allocated, write_at, chunk, 256 * MIB, left), expected);
    }

    #[test]
    fn a_small_chunk_reserves_one_mebibyte() {
        check(4096, 4096, 1000, 4096 * MIB, Some(MIB));
    }

    #[test]
    fn what_is_reserved_doubles_with_what_was_written() {
        check(64 * MIB, 64 * MIB, 16 * MIB, 4096 * MIB, Some(64 * MIB));
    }

    #[test]
    fn a_segment_is_not_reserved_beyond_its_size() {
        check(250 * MIB, 250 * MIB, 2 * MIB, 4096 * MIB, Some(6 * MIB));
    }

    #[test]
    fn what_fits_is_not_reserved_again() {
        check(64 * MIB, 10 * MIB, 16 * MIB, 4096 * MIB, None);
    }

    #[test]
    fn an_exhausted_budget_reserves_nothing() {
        check(4096, 4096, 16 * MIB, MIB, None);
    }

    #[test]
    fn a_segment_made_ahead_is_reserved_whole_if_seven_others_could_be_too() {
        assert_eq!(ahead_step(256 * MIB, 4096 * MIB), 256 * MIB);
        assert_eq!(ahead_step(256 * MIB, 256 * MIB), 32 * MIB);
        assert_eq!(ahead_step(256 * MIB, 8191), 0);
    }
}
