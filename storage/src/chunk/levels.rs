//! Parquet's definition and repetition levels: as runs while they are gathered, as its hybrid of run lengths and
//! bit packing in a page (parquet-format, Encodings.md, "RLE = 3").

/// Levels as runs: equal neighbours are one.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: Vec<(u8, usize)>,
}

/// Values that are bit-packed together.
const GROUP: usize = 8;

impl Runs {
    /// Adds a level so many times.
    pub(super) fn push(&mut self, level: u8, count: usize) {
        match self.runs.last_mut() {
            _ if count == 0 => {}
            Some((last, many)) if *last == level => *many += count,
            _ => self.runs.push((level, count)),
        }
    }

    /// Runs so far: what they cost in memory.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// Appends the length in bytes and the encoded levels, and forgets them. `max`: the largest level there can be.
    pub(super) fn finish(&mut self, max: u8, out: &mut Vec<u8>) {
        let bits = u8::BITS - max.leading_zeros();
        let length_at = out.len();
        out.extend_from_slice(&[0; 4]);
        let mut packed: Vec<u8> = Vec::new();
        for (level, mut count) in self.runs.drain(..) {
            // A group that was begun is filled first; what is left of a long run is a run of its own.
            let take = count.min(packed.len().next_multiple_of(GROUP) - packed.len());
            packed.extend(std::iter::repeat_n(level, take));
            count -= take;
            if count >= GROUP {
                flush_packed(&mut packed, bits, out);
                varint(count as u64 * 2, out);
                out.push(level);
            } else {
                packed.extend(std::iter::repeat_n(level, count));
            }
        }
        flush_packed(&mut packed, bits, out);
        let length = (out.len() - length_at - 4) as u32;
        if let Some(at) = out.get_mut(length_at..length_at + 4) {
            at.copy_from_slice(&length.to_le_bytes());
        }
    }
}

/// Whole groups, least significant bit first; the last one is filled up with zeros, which nobody reads.
fn flush_packed(packed: &mut Vec<u8>, bits: u32, out: &mut Vec<u8>) {
    if packed.is_empty() {
        return;
    }
    varint((packed.len().div_ceil(GROUP) as u64) << 1 | 1, out);
    for group in packed.chunks(GROUP) {
        let word =
            group.iter().enumerate().fold(0_u64, |word, (at, level)| word | u64::from(*level) << (at as u32 * bits));
        out.extend(word.to_le_bytes().iter().take(bits as usize));
    }
    packed.clear();
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
        let mut runs = Runs::default();
        levels.iter().for_each(|(level, count)| runs.push(*level, *count));
        let mut out = Vec::new();
        runs.finish(max, &mut out);
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
}
