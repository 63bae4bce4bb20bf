//! A heap buffer whose address is a multiple of the block size, as direct I/O asks for.

use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// [`RING_BUFFER_BYTES`] zeroed bytes at a block-aligned address.
///
/// Aligned no further: what asks for more than 64 KiB mimalloc takes outside of its arenas and so off huge pages, and a
/// write of scattered pages is cut into requests of half a megabyte, with twice the time to any sync behind them (PERF.md).
#[derive(Debug)]
pub struct AlignedBuf {
    start: NonNull<u8>,
}

const LAYOUT: Layout = match Layout::from_size_align(RING_BUFFER_BYTES, BLOCK_BYTES as usize) {
    Ok(layout) => layout,
    Err(_) => panic!("the ring buffer layout is a constant of limits.rs"),
};

impl AlignedBuf {
    /// Allocates one.
    #[expect(clippy::new_without_default, reason = "a megabyte is not a default")]
    pub fn new() -> Self {
        // SAFETY: the layout has a non-zero size (a constant of limits.rs).
        let start = unsafe { alloc_zeroed(LAYOUT) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(LAYOUT) };
        Self { start }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with the same layout and is freed once, here.
        unsafe { dealloc(self.start.as_ptr(), LAYOUT) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation is RING_BUFFER_BYTES long, initialised, and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), RING_BUFFER_BYTES) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), RING_BUFFER_BYTES) }
    }
}

// SAFETY: the address is that of a heap allocation owned by the value: it does not move with it.
// All bytes are initialised (zeroed at allocation).
unsafe impl tokio_uring::buf::IoBuf for AlignedBuf {
    fn stable_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }
    fn bytes_init(&self) -> usize {
        RING_BUFFER_BYTES
    }
    fn bytes_total(&self) -> usize {
        RING_BUFFER_BYTES
    }
}

// SAFETY: as for `IoBuf`; the pointer may be written through because the value owns the memory.
unsafe impl tokio_uring::buf::IoBufMut for AlignedBuf {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
    unsafe fn set_init(&mut self, _bytes: usize) {
        // All bytes are initialised from the start.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_on_a_block_and_is_zero() {
        let buf = AlignedBuf::new();
        assert_eq!(buf.start() as usize % BLOCK_BYTES as usize, 0);
        assert!(buf.iter().all(|byte| *byte == 0));
    }
}
