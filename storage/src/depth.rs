//! How many writes may wait at the device: many while only chunks go there, few while somebody waits for a small
//! durable write, which stands behind all of them.
//!
//! A device does best with a deep queue, and a sync waits for all that is before it. The first small write after a
//! quiet while still meets the deep one: what is there comes back by itself. Plain
//! system calls have no queue: the posix engine gets its buffers at once.

use crate::limits::{DEPTH_LOW_AFTER, RING_BUFFERS_LOW};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Shared by those that wait for small writes and those that make large ones; clones are the same.
#[derive(Debug, Clone)]
pub struct Depth {
    shared: Arc<Shared>,
}

/// The ring buffers of one thread.
#[derive(Debug, Clone)]
pub struct Buffers {
    /// How many there are.
    pub count: usize,
    /// How many of them may be out at once.
    pub depth: Depth,
}

impl Buffers {
    /// As many as that, all at once.
    pub fn of(count: usize) -> Self {
        Self { count, depth: Depth::default() }
    }
}

#[derive(Debug)]
struct Shared {
    begun: Instant,
    /// Milliseconds from `begun` to the last small write, plus one; zero before the first.
    small: AtomicU64,
}

impl Default for Depth {
    fn default() -> Self {
        Self { shared: Arc::new(Shared { begun: Instant::now(), small: AtomicU64::new(0) }) }
    }
}

impl Depth {
    /// Notes that somebody waits for a small write.
    pub fn small_write(&self) {
        // Only says when: nothing else is read by it.
        self.shared.small.store(self.now_ms() + 1, Ordering::Relaxed);
    }

    /// How many of so many buffers may be out now, or how many of so many writes at the device.
    pub fn allowed(&self, buffers: usize) -> usize {
        allowed(buffers, self.shared.small.load(Ordering::Relaxed), self.now_ms())
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.shared.begun.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }
}

/// `small`: the time of the last small write plus one, zero for none; in milliseconds like `now`.
fn allowed(buffers: usize, small: u64, now: u64) -> usize {
    let recent = small > 0 && now < small.saturating_add(DEPTH_LOW_AFTER.as_millis() as u64);
    if recent { buffers.min(RING_BUFFERS_LOW) } else { buffers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_short_for_a_while_after_a_small_write() {
        let after = DEPTH_LOW_AFTER.as_millis() as u64;
        for (buffers, small, now, expected) in [
            (16, 0, 0, 16),
            (16, 1, 0, RING_BUFFERS_LOW),
            (16, 1001, 1000 + after, RING_BUFFERS_LOW),
            (16, 1001, 1001 + after, 16),
            (16, u64::MAX, 5, RING_BUFFERS_LOW),
            (4, 1, 0, 4),
        ] {
            assert_eq!(allowed(buffers, small, now), expected, "{buffers} buffers, {small}, {now}");
        }
    }

    #[test]
    fn clones_know_of_each_other() {
        let depth = Depth::default();
        let other = depth.clone();
        assert_eq!(depth.allowed(100), 100);
        other.small_write();
        assert_eq!(depth.allowed(100), RING_BUFFERS_LOW);
    }
}
