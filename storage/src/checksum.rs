//! CRC32C (Castagnoli, as in iSCSI: RFC 3720, B.4), by the widest instructions that the processor has. The only
//! room that names crc-fast.

use crate::past_cache;
use crc_fast::{CrcAlgorithm, Digest};

/// Bytes that are checksummed before they are copied: they are still in the first-level cache then, which makes
/// the pair cost little more than the copy.
const PIECE_BYTES: usize = 16 << 10;

/// A checksum that goes on.
pub struct Running(Digest);

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Running({:08x})", self.value())
    }
}

impl Running {
    /// Goes on from a checksum; 0 is that of nothing.
    pub fn from(crc: u32) -> Self {
        Self(Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc)))
    }

    /// Takes bytes in.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Takes bytes in while copying them past the caches; both have one length.
    pub fn add_and_copy(&mut self, from: &[u8], into: &mut [u8]) {
        debug_assert_eq!(from.len(), into.len(), "one length");
        for (from, into) in from.chunks(PIECE_BYTES).zip(into.chunks_mut(PIECE_BYTES)) {
            self.add(from);
            past_cache::copy(from, into);
        }
    }

    /// The checksum so far.
    pub fn value(&self) -> u32 {
        // 32 bits in an answer for all widths.
        self.0.finalize() as u32
    }
}

/// The checksum of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    append(0, bytes)
}

/// The checksum of what had `crc`, with these bytes behind it.
pub fn append(crc: u32, bytes: &[u8]) -> u32 {
    let mut running = Running::from(crc);
    running.add(bytes);
    running.value()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, from the polynomial.
    fn slowly(bytes: &[u8]) -> u32 {
        const POLYNOMIAL: u32 = 0x82F6_3B78;
        let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
        !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
    }

    #[test]
    fn it_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(b""), 0);
        for length in [1, 15, 16, 100, 255, 256, 1000, 5000] {
            let bytes: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
            assert_eq!(crc32c(&bytes), slowly(&bytes), "{length} bytes");
        }
    }

    #[test]
    fn it_goes_on_from_wherever_it_stopped() {
        let bytes: Vec<u8> = (0..20_000_u32).map(|at| (at * 7 % 253) as u8).collect();
        for cut in [0, 1, 17, 4096, 9999] {
            let (one, two) = bytes.split_at(cut);
            assert_eq!(append(crc32c(one), two), crc32c(&bytes));
            let mut running = Running::from(crc32c(one));
            let mut copy = vec![0; two.len()];
            running.add_and_copy(two, &mut copy);
            assert_eq!((running.value(), copy.as_slice()), (crc32c(&bytes), two));
        }
    }
}
