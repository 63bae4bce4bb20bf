//! When a chunk closes: one pure question with a named answer (design.md section 4).
//!
//! No clock inside: ages come in, so a table tests it.

use std::time::Duration;
use storage::chunk::Format;

/// The rule's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRule {
    /// A chunk of this weight closes, in data bytes.
    pub(crate) chunk_bytes: u64,
    /// How long a batch may wait to be durable.
    pub(crate) commit_interval: Duration,
    /// How long a batch may lie in the tail.
    pub(crate) tail_max_age: Duration,
}

/// What is known of a topic's open chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenChunk {
    /// Weight so far, in data bytes.
    pub(crate) data_bytes: u64,
    /// Age of its oldest batch.
    pub(crate) oldest: Duration,
    /// Age of its oldest batch that is neither in a chunk nor in the tail; `None` if all are safe.
    pub(crate) oldest_unsafe: Option<Duration>,
    /// Whether this is the largest open chunk while memory is short.
    pub(crate) gives_way: bool,
}

/// What to do with it now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Write it.
    Close(Why),
    /// Make its unsafe batches durable in the tail.
    Tail,
    /// Nothing yet.
    Wait,
}

/// Why a chunk closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// It is full.
    Bytes,
    /// Its time is up and it is worth a row group.
    Time,
    /// Memory is short.
    Pressure,
    /// It lay in the tail too long.
    Age,
}

/// The least weight worth a row group after [`ChunkRule::commit_interval`], in data bytes.
/// Blobs lose nothing by small row groups, columns do.
pub(crate) const fn floor_bytes(format: Format) -> u64 {
    match format {
        Format::Default | Format::Ragged => 1 << 20,
        Format::Image => 128 << 10,
    }
}

/// Decides over an open chunk that holds at least one batch.
pub(crate) fn verdict(rule: &ChunkRule, format: Format, chunk: &OpenChunk) -> Verdict {
    if rule.chunk_bytes <= chunk.data_bytes {
        return Verdict::Close(Why::Bytes);
    }
    if chunk.gives_way {
        return Verdict::Close(Why::Pressure);
    }
    if rule.tail_max_age <= chunk.oldest {
        return Verdict::Close(Why::Age);
    }
    match chunk.oldest_unsafe {
        Some(age) if rule.commit_interval <= age => {
            if floor_bytes(format) <= chunk.data_bytes {
                Verdict::Close(Why::Time)
            } else {
                Verdict::Tail
            }
        }
        _ => Verdict::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: ChunkRule = ChunkRule {
        chunk_bytes: 16 << 20,
        commit_interval: Duration::from_millis(50),
        tail_max_age: Duration::from_secs(60),
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[track_caller]
    fn check(
        format: Format,
        data_bytes: u64,
        oldest: u64,
        oldest_unsafe: Option<u64>,
        gives_way: bool,
        expected: Verdict,
    ) {
        let chunk = OpenChunk { data_bytes, oldest: ms(oldest), oldest_unsafe: oldest_unsafe.map(ms), gives_way };
        assert_eq!(verdict(&RULE, format, &chunk), expected);
    }

    #[test]
    fn a_full_chunk_closes_at_once() {
        check(Format::Default, 16 << 20, 0, Some(0), false, Verdict::Close(Why::Bytes));
    }

    #[test]
    fn a_chunk_above_the_floor_closes_after_the_commit_interval() {
        check(Format::Default, 1 << 20, 50, Some(50), false, Verdict::Close(Why::Time));
        check(Format::Default, 1 << 20, 49, Some(49), false, Verdict::Wait);
    }

    #[test]
    fn a_chunk_below_the_floor_goes_to_the_tail() {
        check(Format::Default, (1 << 20) - 1, 50, Some(50), false, Verdict::Tail);
    }

    #[test]
    fn images_have_a_lower_floor() {
        check(Format::Image, 128 << 10, 50, Some(50), false, Verdict::Close(Why::Time));
        check(Format::Image, (128 << 10) - 1, 50, Some(50), false, Verdict::Tail);
    }

    #[test]
    fn what_is_safe_waits_for_its_age() {
        check(Format::Default, 100, 10_000, None, false, Verdict::Wait);
        check(Format::Default, 100, 60_000, None, false, Verdict::Close(Why::Age));
    }

    #[test]
    fn the_largest_chunk_gives_way_when_memory_is_short() {
        check(Format::Default, 1, 0, Some(0), true, Verdict::Close(Why::Pressure));
    }
}
