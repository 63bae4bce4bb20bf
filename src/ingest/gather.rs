//! When a chunk closes: one pure question with a named answer (design.md section 4), and how much the tail takes.
//!
//! No clock inside: ages come in, so a table tests it.

use std::time::Duration;
use storage::chunk::Format;
use storage::limits::{RING_BUFFER_BYTES, RING_WRITES_AT_DEVICE};

/// What a writer has at the device at most, in bytes.
const RING_BYTES: u64 = (RING_WRITES_AT_DEVICE * RING_BUFFER_BYTES) as u64;

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

impl ChunkRule {
    /// Whether an open chunk that is half full may go right away: its writer has not more under way than its ring buffers
    /// hold, so nobody is kept waiting, and who sent it need not wait for its time.
    fn goes_early(&self, chunk: &OpenChunk) -> bool {
        Self::EARLY_BYTES_MIN.max(self.chunk_bytes / 2) <= chunk.data_bytes
            && chunk.oldest_unsafe.is_some()
            && chunk.flushing_bytes + chunk.data_bytes <= RING_BYTES
    }

    /// A smaller chunk costs more than its rows gain.
    const EARLY_BYTES_MIN: u64 = 8 << 20;

    /// How much earlier than its time a chunk closes at most, however slow the disk is: chunks must not shrink because
    /// it lags behind.
    fn lead_max(&self) -> Duration {
        self.commit_interval / 4
    }
}

/// How long flushes take, smoothed over the last handful as TCP smooths its round trips (RFC 6298).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FlushTime {
    mean: Duration,
    /// Mean distance from it.
    deviation: Duration,
}

impl FlushTime {
    /// The part of what is known that a new flush replaces.
    const MEAN_WEIGHT: u32 = 8;
    const DEVIATION_WEIGHT: u32 = 4;
    /// Mean deviations beyond the mean: nine of ten flushes, were they spread as by chance.
    const DEVIATIONS: u32 = 2;

    /// Notes one.
    pub(crate) fn note(&mut self, took: Duration) {
        let Self { mean, deviation } = *self;
        let weight = Self::DEVIATION_WEIGHT;
        self.deviation = deviation - deviation / weight + took.abs_diff(mean) / weight;
        self.mean = mean - mean / Self::MEAN_WEIGHT + took / Self::MEAN_WEIGHT;
    }

    /// What most of them take at most: the mean would let half of all chunks be late.
    pub(crate) fn most(self) -> Duration {
        self.mean + self.deviation * Self::DEVIATIONS
    }
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
    /// How long it will take at most from closing to durable, as far as the writer knows.
    pub(crate) flush_takes: Duration,
    /// Whether this is the largest open chunk while memory is short.
    pub(crate) gives_way: bool,
    /// Weight of its batches that are neither in a chunk nor in the tail, in data bytes.
    pub(crate) unsafe_bytes: u64,
    /// Whether the tail has room for what is unsafe.
    pub(crate) tail_takes_it: bool,
    /// Weight of the chunks that its writer has under way, of whatever topic.
    pub(crate) flushing_bytes: u64,
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
    /// The tail takes no more now.
    Crowd,
    /// Its writer has little under way.
    Ease,
}

/// The least weight worth a row group after [`ChunkRule::commit_interval`], in data bytes.
/// Blobs lose nothing by small row groups, columns do.
pub(crate) const fn floor_bytes(format: Format) -> u64 {
    match format {
        Format::Default | Format::Ragged => 1 << 20,
        Format::Image => 128 << 10,
    }
}

/// The least weight of a row group while the tail takes no more, in data bytes; below it a row group costs more
/// than its rows.
pub(crate) const CROWD_FLOOR_BYTES: u64 = 128 << 10;
/// The least of it that is not in the tail yet: to close for less spares the tail next to nothing.
const CROWD_UNSAFE_BYTES_MIN: u64 = CROWD_FLOOR_BYTES / 8;

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
    if rule.goes_early(chunk) {
        return Verdict::Close(Why::Ease);
    }
    let worth_it = floor_bytes(format) <= chunk.data_bytes;
    let crowds =
        !chunk.tail_takes_it && CROWD_FLOOR_BYTES <= chunk.data_bytes && CROWD_UNSAFE_BYTES_MIN <= chunk.unsafe_bytes;
    // So early that it is durable when its time is up. The tail takes no such time, and more commits cost.
    let lead = chunk.flush_takes.min(rule.lead_max());
    match chunk.oldest_unsafe {
        Some(age) if worth_it && rule.commit_interval <= age + lead => Verdict::Close(Why::Time),
        Some(age) if crowds && rule.commit_interval <= age + lead => Verdict::Close(Why::Crowd),
        Some(age) if rule.commit_interval <= age => Verdict::Tail,
        _ => Verdict::Wait,
    }
}

/// What a writer's topics may put into the tail: RocksDB flushes and merges what goes there, and stalls its writers
/// when that is too much.
///
/// What went elsewhere because the tail took no more counts as well: while topics bring more than the tail takes, all
/// of them that are worth a row group go elsewhere. To let in as many as fit would cost the work of both ways.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TailRate {
    /// Bytes that may go now; below zero: what was brought beyond them.
    bytes: i64,
    /// See [`TailRate::BURST`].
    burst: i64,
    /// See [`TailRate::PER_SECOND`].
    per_second: i64,
}

impl TailRate {
    /// Bytes a second of one writer: what hundreds of slow topics bring, with room. A byte costs several times here
    /// what it costs in a row group (log, memtable, flush, merge, and the row group all the same; PERF.md).
    const PER_SECOND: i64 = 8 << 20;
    /// Bytes a second of all writers: under what RocksDB's flushes and merges are held to.
    const PER_SECOND_OF_ALL: i64 = 25 << 20;
    /// Bytes at once: what hundreds of slow topics bring together.
    const BURST: i64 = 4 << 20;

    /// One writer's part, of which nothing was used yet.
    pub(crate) fn shared_by(writers: usize) -> Self {
        let writers = i64::try_from(writers.max(1)).unwrap_or(i64::MAX);
        let (burst, per_second) = (Self::BURST / writers, Self::PER_SECOND.min(Self::PER_SECOND_OF_ALL / writers));
        Self { bytes: burst, burst, per_second }
    }

    /// Notes that time has passed.
    pub(crate) fn refill(&mut self, passed: Duration) {
        let passed = i64::try_from(passed.as_micros()).unwrap_or(i64::MAX);
        let more = passed.saturating_mul(self.per_second) / 1_000_000;
        self.bytes = self.burst.min(self.bytes.saturating_add(more));
    }

    /// Whether so many bytes may go.
    pub(crate) fn has(&self, bytes: u64) -> bool {
        i64::try_from(bytes).is_ok_and(|bytes| bytes <= self.bytes)
    }

    /// Notes that they were brought: taken, or sent elsewhere. What is too small for a row group is taken all the
    /// same. A second's worth beyond the rate is remembered, no more: after that the tail takes runs again.
    pub(crate) fn take(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.bytes = self.bytes.saturating_sub(bytes).max(-self.per_second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So much that the disk is busy.
    const BUSY: u64 = 64 << 20;

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
        let (oldest, oldest_unsafe) = (ms(oldest), oldest_unsafe.map(ms));
        let flush_takes = Duration::ZERO;
        let chunk = OpenChunk {
            data_bytes,
            oldest,
            oldest_unsafe,
            flush_takes,
            gives_way,
            unsafe_bytes: data_bytes,
            tail_takes_it: true,
            flushing_bytes: BUSY,
        };
        assert_eq!(verdict(&RULE, format, &chunk), expected);
    }

    #[test]
    fn what_a_crowded_tail_does_not_take_closes_if_it_is_worth_a_row_group() {
        let crowded = |data_bytes, unsafe_bytes| OpenChunk {
            data_bytes,
            oldest: ms(50),
            oldest_unsafe: Some(ms(50)),
            flush_takes: ms(5),
            gives_way: false,
            unsafe_bytes,
            tail_takes_it: false,
            flushing_bytes: BUSY,
        };
        let of = |data_bytes, unsafe_bytes| verdict(&RULE, Format::Default, &crowded(data_bytes, unsafe_bytes));
        assert_eq!(of(128 << 10, 128 << 10), Verdict::Close(Why::Crowd));
        assert_eq!(of((128 << 10) - 1, (128 << 10) - 1), Verdict::Tail);
        // Middling topics leave the tail; slow ones, of which nearly all lies there, stay until it is worth a row group.
        assert_eq!(of(128 << 10, 16 << 10), Verdict::Close(Why::Crowd));
        assert_eq!(of(900 << 10, (16 << 10) - 1), Verdict::Tail);
        let after = |ms| OpenChunk { oldest_unsafe: Some(ms), ..crowded(128 << 10, 128 << 10) };
        assert_eq!(verdict(&RULE, Format::Default, &after(ms(45))), Verdict::Close(Why::Crowd));
        assert_eq!(verdict(&RULE, Format::Default, &after(ms(44))), Verdict::Wait);
    }

    /// Looks every tenth of a millisecond for `ms`, each finds a run of 100 KiB; returns the bytes taken.
    fn bring(rate: &mut TailRate, ms: u32, counts_elsewhere: bool) -> i64 {
        let mut taken = 0;
        for _ in 0..ms * 10 {
            rate.refill(Duration::from_micros(100));
            let goes = rate.has(100 << 10);
            if goes {
                taken += 100 << 10;
            }
            if goes || counts_elsewhere {
                rate.take(100 << 10);
            }
        }
        taken
    }

    #[test]
    fn the_tail_takes_a_burst_and_then_its_rate_however_often_it_is_asked() {
        let taken = bring(&mut TailRate::shared_by(1), 1000, false);
        assert!((TailRate::PER_SECOND..=TailRate::PER_SECOND + TailRate::BURST).contains(&taken), "{taken}");
    }

    #[test]
    fn while_more_is_brought_than_the_tail_takes_only_the_first_burst_goes_there() {
        let mut rate = TailRate::shared_by(1);
        let taken = bring(&mut rate, 10_000, true);
        assert!(taken <= TailRate::BURST + (200 << 10), "{taken}");
        // It takes runs again a little over a second after that, not a moment after.
        rate.refill(ms(900));
        assert!(!rate.has(1));
        rate.refill(ms(150));
        assert!(rate.has(100 << 10));
    }

    #[test]
    fn one_topic_of_five_megabytes_a_second_keeps_its_floor_with_up_to_five_writers() {
        for writers in 1..=5 {
            let mut rate = TailRate::shared_by(writers);
            for _ in 0..1000 {
                rate.refill(ms(50));
                assert!(rate.has(250_000), "{writers} writers");
                rate.take(250_000);
            }
        }
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
    fn a_chunk_that_is_half_full_goes_right_away_if_the_ring_buffers_have_room_for_it() {
        let of = |data_bytes, flushing_bytes, oldest_unsafe| {
            let chunk = OpenChunk {
                data_bytes,
                oldest: ms(1),
                oldest_unsafe,
                flush_takes: ms(5),
                gives_way: false,
                unsafe_bytes: data_bytes,
                tail_takes_it: true,
                flushing_bytes,
            };
            verdict(&RULE, Format::Default, &chunk)
        };
        assert_eq!(of(8 << 20, 0, Some(ms(1))), Verdict::Close(Why::Ease));
        assert_eq!(of(8 << 20, 24 << 20, Some(ms(1))), Verdict::Close(Why::Ease));
        assert_eq!(of(8 << 20, (24 << 20) + 1, Some(ms(1))), Verdict::Wait);
        assert_eq!(of((8 << 20) - 1, 0, Some(ms(1))), Verdict::Wait);
        // All of it is in the tail: it is in no hurry.
        assert_eq!(of(8 << 20, 0, None), Verdict::Wait);
        // Who set large chunks gets no small ones.
        let large = ChunkRule { chunk_bytes: 64 << 20, ..RULE };
        let chunk = OpenChunk {
            data_bytes: 31 << 20,
            oldest: ms(1),
            oldest_unsafe: Some(ms(1)),
            flush_takes: ms(5),
            gives_way: false,
            unsafe_bytes: 31 << 20,
            tail_takes_it: true,
            flushing_bytes: 0,
        };
        assert_eq!(verdict(&large, Format::Default, &chunk), Verdict::Wait);
        let half = OpenChunk { data_bytes: 32 << 20, ..chunk };
        assert_eq!(verdict(&large, Format::Default, &half), Verdict::Close(Why::Ease));
    }

    #[test]
    fn a_chunk_closes_as_much_earlier_as_a_flush_takes_up_to_a_quarter_of_the_interval_and_the_tail_does_not() {
        let after = |data_bytes, unsafe_ms, flush_ms| {
            verdict(
                &RULE,
                Format::Default,
                &OpenChunk {
                    data_bytes,
                    oldest: ms(unsafe_ms),
                    oldest_unsafe: Some(ms(unsafe_ms)),
                    flush_takes: ms(flush_ms),
                    gives_way: false,
                    unsafe_bytes: data_bytes,
                    tail_takes_it: true,
                    flushing_bytes: BUSY,
                },
            )
        };
        assert_eq!(after(1 << 20, 42, 8), Verdict::Close(Why::Time));
        assert_eq!(after(1 << 20, 41, 8), Verdict::Wait);
        assert_eq!(after(1 << 20, 38, 1000), Verdict::Close(Why::Time));
        assert_eq!(after(1 << 20, 37, 1000), Verdict::Wait);
        assert_eq!(after((1 << 20) - 1, 49, 1000), Verdict::Wait);
        assert_eq!(after((1 << 20) - 1, 50, 1000), Verdict::Tail);
    }

    #[test]
    fn the_flush_time_follows_the_last_ones_and_forgets_a_single_slow_one() {
        let mut time = FlushTime::default();
        for _ in 0..40 {
            time.note(ms(16));
        }
        assert!((ms(15)..=ms(17)).contains(&time.most()), "{:?}", time.most());
        time.note(ms(160));
        assert!(time.most() < ms(16 + 18 + 2 * 37), "{:?}", time.most());
        for _ in 0..40 {
            time.note(ms(16));
        }
        assert!(time.most() < ms(18), "{:?}", time.most());
    }

    #[test]
    fn flushes_that_vary_are_expected_to_take_as_long_as_most_of_them() {
        let mut time = FlushTime::default();
        for _ in 0..40 {
            time.note(ms(4));
            time.note(ms(12));
        }
        assert!((ms(12)..ms(18)).contains(&time.most()), "{:?}", time.most());
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
