//! The record of what a block device was asked to do, and what a power cut may leave of it.
//!
//! Rules: a flush makes durable what was acknowledged before it arrived. Of the other writes any subset is
//! there after the cut, each whole or torn to a prefix of whole sectors. What survives is a pure function of
//! the record, the place of the cut and a seed.

use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use storage::sim::Random;

/// Bytes of an event's header: kind, offset, length.
pub(super) const HEADER_BYTES: usize = 24;
/// What the medium writes as a whole.
const SECTOR_BYTES: u64 = 512;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `length` bytes arrived for `offset`; they follow the header in the journal.
    Write = 1,
    /// `length` bytes at `offset` become zeros (discard or write-zeroes).
    Zero = 2,
    /// The write or zero whose header lies at journal offset `offset` is about to be acknowledged.
    Done = 3,
    /// A flush arrived: it covers what was `Done` before it and nothing else.
    Flush = 4,
}

/// One thing that the device was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Where its header lies in the journal file: the order of events is the order of these.
    pub(super) at: u64,
}

pub(super) fn encode(kind: Kind, offset: u64, length: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (place, word) in header.chunks_exact_mut(8).zip([kind as u64, offset, length]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    header
}

/// Reads the events of a journal up to byte `end`, its length at some moment.
pub(super) fn read_events(journal: &File, end: u64) -> io::Result<Vec<Event>> {
    let (mut events, mut at) = (Vec::new(), 0);
    while at < end {
        let mut header = [0; HEADER_BYTES];
        journal.read_exact_at(&mut header, at)?;
        let mut words = header.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut word = || words.next().unwrap_or(0);
        let (kind, offset, length) = (word(), word(), word());
        let kind = match kind {
            1 => Kind::Write,
            2 => Kind::Zero,
            3 => Kind::Done,
            4 => Kind::Flush,
            other => return Err(io::Error::other(format!("the journal has an event of kind {other} at {at}"))),
        };
        events.push(Event { kind, offset, length, at });
        at += HEADER_BYTES as u64 + if kind == Kind::Write { length } else { 0 };
    }
    Ok(events)
}

/// A write that is on the medium after the cut; `length` is short of the event's when it was torn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Survivor {
    pub(super) event: Event,
    pub(super) length: u64,
}

/// Takes the events in order and keeps those that no flush has covered yet.
#[derive(Default, Clone)]
pub(super) struct WriteCache {
    volatile: Vec<(Event, bool)>,
}

impl WriteCache {
    /// Returns what this event makes durable, in order of arrival.
    pub(super) fn push(&mut self, event: Event) -> Vec<Event> {
        match event.kind {
            Kind::Write | Kind::Zero => self.volatile.push((event, false)),
            Kind::Done => {
                if let Some(write) = self.volatile.iter_mut().rev().find(|(write, _)| write.at == event.offset) {
                    write.1 = true;
                }
            }
            Kind::Flush => return self.volatile.extract_if(.., |(_, done)| *done).map(|(write, _)| write).collect(),
        }
        Vec::new()
    }

    /// What of the volatile writes a power cut now leaves.
    pub(super) fn survivors(&self, seed: u64) -> Vec<Survivor> {
        let mut random = Random::new(seed);
        // Now and then nothing or all, mostly some.
        let keep_of_8 = [0, 1, 4, 7, 8][(seed % 5) as usize];
        let mut kept = Vec::new();
        for (event, _) in &self.volatile {
            let (keep, tear, cut) = (random.below(8) < keep_of_8, random.below(4) == 0, random.bits());
            if keep {
                let sectors = event.length / SECTOR_BYTES;
                let length = if tear { cut % (sectors + 1) * SECTOR_BYTES } else { event.length };
                kept.push(Survivor { event: *event, length });
            }
        }
        kept
    }
}

/// Writes a survivor into an image, a sparse file.
pub(super) fn apply(journal: &File, survivor: Survivor, image: &File) -> io::Result<()> {
    let Survivor { event, length } = survivor;
    if event.kind == Kind::Zero {
        return punch_hole(image, event.offset, length);
    }
    let mut data = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    journal.read_exact_at(&mut data, event.at + HEADER_BYTES as u64)?;
    image.write_all_at(&data, event.offset)
}

/// Makes a range of a file zeros that take no space.
pub(super) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    Ok(rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: Kind, offset: u64, length: u64, at: u64) -> Event {
        Event { kind, offset, length, at }
    }

    /// Two writes of which the first is done and flushed.
    fn cache() -> (WriteCache, Vec<Event>) {
        let mut cache = WriteCache::default();
        let mut durable = Vec::new();
        for event in [
            event(Kind::Write, 0, 4096, 0),
            event(Kind::Write, 4096, 4096, 1),
            event(Kind::Done, 0, 0, 2),
            event(Kind::Flush, 0, 0, 3),
            event(Kind::Done, 1, 0, 4),
        ] {
            durable.extend(cache.push(event));
        }
        (cache, durable)
    }

    #[test]
    fn a_flush_covers_what_was_done_before_it_and_nothing_else() {
        let (_, durable) = cache();
        assert_eq!(durable.iter().map(|event| event.at).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn what_was_not_flushed_may_be_there_torn_to_any_sector_or_not_at_all() {
        let (cache, _) = cache();
        let mut lengths = std::collections::BTreeSet::new();
        let mut lost = 0;
        for seed in 0..1000 {
            let left = cache.survivors(seed);
            assert_eq!(left, cache.survivors(seed), "a cut is a function of its seed");
            match left.as_slice() {
                [] => lost += 1,
                [one] => drop(lengths.insert(one.length)),
                more => panic!("{more:?}"),
            }
        }
        assert!(lost > 100, "{lost}");
        assert_eq!(lengths, (0..=8).map(|sectors| sectors * 512).collect());
    }
}
