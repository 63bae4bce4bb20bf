//! Parquet's definition and repetition levels: runs in, its hybrid of run lengths and bit packing out
//! (parquet-format, Encodings.md, "RLE = 3").
//!
//! Guarantees: what is held is what will be written, however short the runs are.

/// Levels of a page, encoded as they come.
#[derive(Debug, Default)]
pub(super) struct Levels {
    /// The run that may still grow.
    level: u8,
    count: usize,
    /// Levels of short runs, to be bit-packed.
    packed: Vec<u8>,
    encoded: Vec<u8>,
}

/// Values that are bit-packed together.
const GROUP: usize = 8;
/// Values of a bit-packed stretch, at most: its length takes one byte.
const PACKED_MAX: usize = 63 * GROUP;

impl Levels {
    /// Adds a level so many times. `max`: the largest level there can be.
    pub(super) fn push(&mut self, max: u8, level: u8, count: usize) {
        if level != self.level && count > 0 {
            self.settle(bits(max));
            self.level = level;
        }
        self.count += count;
    }

    /// Bytes so far, but for the last few levels.
    pub(super) fn len(&self) -> usize {
        self.encoded.len()
    }

    /// Appends the length in bytes and the encoded levels, and forgets them. `max` as above.
    pub(super) fn finish(&mut self, max: u8, out: &mut Vec<u8>) {
        self.settle(bits(max));
        self.flush_packed(self.packed.len(), bits(max));
        out.extend_from_slice(&(self.encoded.len() as u32).to_le_bytes());
        out.append(&mut self.encoded);
    }

    /// Encodes the run that was growing.
    fn settle(&mut self, bits: u32) {
        let mut count = std::mem::take(&mut self.count);
        // A group that was begun is filled first; what is left of a long run is a run of its own.
        let take = count.min(self.packed.len().next_multiple_of(GROUP) - self.packed.len());
        self.packed.extend(std::iter::repeat_n(self.level, take));
        count -= take;
        if count >= GROUP {
            self.flush_packed(self.packed.len(), bits);
            varint(count as u64 * 2, &mut self.encoded);
            self.encoded.push(self.level);
        } else {
            self.packed.extend(std::iter::repeat_n(self.level, count));
        }
        if self.packed.len() >= PACKED_MAX {
            self.flush_packed(PACKED_MAX, bits);
        }
    }

    /// Whole groups, least significant bit first; the last one is filled up with zeros, which nobody reads.
    fn flush_packed(&mut self, count: usize, bits: u32) {
        if count == 0 {
            return;
        }
        varint((count.div_ceil(GROUP) as u64) << 1 | 1, &mut self.encoded);
        for group in self.packed.get(..count).unwrap_or(&[]).chunks(GROUP) {
            let word = group
                .iter()
                .enumerate()
                .fold(0_u64, |word, (at, level)| word | u64::from(*level) << (at as u32 * bits));
            self.encoded.extend(word.to_le_bytes().iter().take(bits as usize));
        }
        self.packed.drain(..count);
    }
}

/// Bits that a level takes.
fn bits(max: u8) -> u32 {
    u8::BITS - max.leading_zeros()
}

/// LEB128.
pub(super) fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(levels: &[(u8, usize)], max: u8, expected: &[u8]) {
        let mut encoder = Levels::default();
        levels.iter().for_each(|(level, count)| encoder.push(max, *level, *count));
        let mut out = Vec::new();
        encoder.finish(max, &mut out);
        assert_eq!(out[..4], u32::to_le_bytes(expected.len() as u32));
        assert_eq!(&out[4..], expected);
    }

    #[test]
    fn a_long_run_is_its_length_and_its_level() {
        check(&[(1, 100)], 1, &[200, 1, 1]);
        check(&[(2, 60), (2, 40)], 3, &[200, 1, 2]);
    }

    #[test]
    fn short_runs_are_packed_in_groups_of_eight() {
        // 0,1,1,0 and four zeros to fill up: bits 1 and 2.
        check(&[(0, 1), (1, 2), (0, 1)], 1, &[3, 0b110]);
    }

    #[test]
    fn a_group_that_was_begun_is_filled_from_the_run_behind_it() {
        // One 0 and seven 1, then 93 times 1.
        check(&[(0, 1), (1, 100)], 1, &[3, 0xFE, 186, 1, 1]);
    }

    #[test]
    fn two_bits_a_level_take_two_bytes_a_group() {
        check(&[(3, 1), (0, 3), (1, 4)], 3, &[3, 0b11, 0b0101_0101]);
    }

    #[test]
    fn a_long_stretch_of_short_runs_is_packed_in_pieces_of_63_groups() {
        let alternating: Vec<(u8, usize)> = (0..512_u16).map(|at| ((at % 2) as u8, 1)).collect();
        let mut expected = vec![63 << 1 | 1];
        expected.extend([0b1010_1010; 63]);
        expected.extend([3, 0b1010_1010]);
        check(&alternating, 1, &expected);
    }

    #[test]
    fn inv_7_ten_million_short_runs_take_a_bit_each() {
        let mut encoder = Levels::default();
        for at in 0..10_000_000_u32 {
            encoder.push(1, (at % 2) as u8, 1);
        }
        assert!(encoder.encoded.capacity() + encoder.packed.capacity() < 4 << 20);
    }
}
