//! How fast memory is copied here: what every byte pays at least, each time it is copied.

use std::hint::black_box;
use std::time::Instant;

const COPY_BYTES: usize = 64 << 20;
const COPIES: usize = 32;

/// Bytes a second, one thread, between blocks that no cache holds.
pub(crate) fn copy_rate() -> f64 {
    let from = vec![1_u8; COPY_BYTES];
    let mut to = vec![2_u8; COPY_BYTES];
    let started = Instant::now();
    for _ in 0..COPIES {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    }
    (COPY_BYTES * COPIES) as f64 / started.elapsed().as_secs_f64()
}
