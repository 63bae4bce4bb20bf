//! How much of a segment is reserved ahead of what is written: pure, with the budget of all segments together.

use crate::segment;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most that is reserved at once for a segment that no chunk has asked for yet, as a part of what is left.
const AHEAD_PART: u64 = 8;

/// The same for one that chunks go to, unless the chunk that asks takes more.
const STEP_PART: u64 = 16;
/// The least that is reserved at a time, if that part is as much: each time is a system call in a worker.
const STEP_BYTES_MIN: u64 = 1 << 20;
/// The part by which a chunk may be longer than the last one of its weight was.
const EXPECTED_MARGIN: u128 = 16;

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

/// How many bytes to preallocate next for a chunk of this length; pure. `None`: nothing, the write extends the file.
pub(super) fn prealloc_step(allocated: u64, write_at: u64, chunk: u64, segment_bytes: u64, left: u64) -> Option<u64> {
    let needed = (write_at + chunk).saturating_sub(allocated);
    if needed == 0 || left < needed {
        return None;
    }
    // Doubling with what was written: a slow topic reserves little, a fast one rarely asks. And a part of what is left:
    // a thousand topics must not keep from each other what their next chunk takes.
    let ahead = write_at.max(STEP_BYTES_MIN).min(left / STEP_PART);
    let room = segment_bytes.saturating_sub(allocated);
    Some(segment::block_ceil(needed.max(ahead.min(room))))
}

/// How many bytes a chunk will take of its file, as far as the last one of its segment (weight before encoding, bytes in
/// the file) tells; pure.
pub(super) fn expected_bytes(data_bytes: u64, last: Option<(u64, u64)>) -> u64 {
    let Some((data, stored)) = last.filter(|(data, _)| *data > 0) else { return data_bytes };
    let expected = u128::from(data_bytes) * u128::from(stored) / u128::from(data);
    // One that finds no room makes its file longer after all, which costs more than what is reserved in vain.
    u64::try_from(expected.saturating_add(expected / EXPECTED_MARGIN))
        .unwrap_or(u64::MAX)
        .min(data_bytes.saturating_mul(2))
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
    fn a_budget_that_many_share_gives_a_chunk_its_room_or_a_sixteenth() {
        check(8 * MIB, 8 * MIB, 3 * MIB, 32 * MIB, Some(3 * MIB));
        check(8 * MIB, 8 * MIB, MIB, 32 * MIB, Some(2 * MIB));
        check(8 * MIB, 8 * MIB, 100_000, MIB, Some(segment::block_ceil(100_000)));
    }

    #[test]
    fn a_chunk_is_expected_to_take_what_the_last_one_took_and_a_little_more() {
        assert_eq!(expected_bytes(1600, None), 1600);
        assert_eq!(expected_bytes(1600, Some((800, 400))), 850);
        assert_eq!(expected_bytes(1600, Some((0, 4096))), 1600);
        // A small one is mostly its trailer; the next is not.
        assert_eq!(expected_bytes(1600, Some((1, 4096))), 3200);
        assert_eq!(expected_bytes(u64::MAX, Some((1, u64::MAX))), u64::MAX);
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
