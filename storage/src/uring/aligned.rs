//! Heap buffers whose address is a multiple of the block size, as direct I/O asks for.

use crate::limits::{BLOCK_BYTES, RING_BUFFER_BYTES};
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Bytes at a block-aligned address; all that are to be seen are initialised.
///
/// Aligned no further: what asks for more than 64 KiB mimalloc takes outside of its arenas and so off huge pages, and a
/// write of scattered pages is cut into requests of half a megabyte, with twice the time to any sync behind them (PERF.md).
#[derive(Debug)]
pub struct AlignedBuf {
    start: NonNull<u8>,
    layout: Layout,
    /// Bytes that are to be seen: initialised, and no more than the layout has.
    filled: usize,
}

const RING_LAYOUT: Layout = match Layout::from_size_align(RING_BUFFER_BYTES, BLOCK_BYTES as usize) {
    Ok(layout) => layout,
    Err(_) => panic!("the ring buffer layout is a constant of limits.rs"),
};

impl AlignedBuf {
    /// A ring buffer: [`RING_BUFFER_BYTES`] zeros.
    #[expect(clippy::new_without_default, reason = "a megabyte is not a default")]
    pub fn new() -> Self {
        // SAFETY: the layout has a non-zero size (a constant of limits.rs).
        let start = unsafe { alloc_zeroed(RING_LAYOUT) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(RING_LAYOUT) };
        Self { start, layout: RING_LAYOUT, filled: RING_BUFFER_BYTES }
    }

    /// Memory for `bytes` of a file and the rest of their last block, none of it filled yet.
    ///
    /// # Errors
    /// When there is no such memory: the length may come from a disk.
    pub(super) fn to_fill(bytes: usize) -> io::Result<Self> {
        let (layout, no_memory) = Self::blocks(bytes)?;
        // SAFETY: the layout has a non-zero size, one block at least.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or(no_memory)?;
        Ok(Self { start, layout, filled: 0 })
    }

    /// The same with zeros in it, for who has no way to fill it but by what is there.
    ///
    /// # Errors
    /// As [`Self::to_fill`].
    pub(crate) fn zeros(bytes: usize) -> io::Result<Self> {
        let (layout, no_memory) = Self::blocks(bytes)?;
        // SAFETY: the layout has a non-zero size, one block at least.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(no_memory)?;
        Ok(Self { start, layout, filled: layout.size() })
    }

    /// Whole blocks for so many bytes, and the error if there are none.
    fn blocks(bytes: usize) -> io::Result<(Layout, io::Error)> {
        let no_memory = || io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for {bytes} bytes"));
        let blocks = bytes.max(1).checked_next_multiple_of(BLOCK_BYTES as usize).ok_or_else(no_memory)?;
        let layout = Layout::from_size_align(blocks, BLOCK_BYTES as usize).map_err(|_| no_memory())?;
        Ok((layout, no_memory()))
    }

    /// Shows the first `bytes`, and no others.
    ///
    /// # Safety
    /// They must be initialised.
    pub(super) unsafe fn set_filled(&mut self, bytes: usize) {
        assert!(bytes <= self.layout.size(), "no more is filled than there is");
        self.filled = bytes;
    }

    /// Hides what comes behind the first `bytes`.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        self.filled = self.filled.min(bytes);
    }

    /// Bytes there is memory for: whole blocks.
    pub(super) fn capacity(&self) -> usize {
        self.layout.size()
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

// SAFETY: the value owns its allocation alone, and hands it out as slices by the rules of `&self` and `&mut self`.
unsafe impl Send for AlignedBuf {}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: `start` came from the allocator with the same layout and is freed once, here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the first `filled` bytes are inside of the allocation, initialised, and live as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.filled) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.filled) }
    }
}

// SAFETY: the address is that of a heap allocation owned by the value: it does not move with it.
// The first `filled` bytes are initialised.
unsafe impl tokio_uring::buf::IoBuf for AlignedBuf {
    fn stable_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }
    fn bytes_init(&self) -> usize {
        self.filled
    }
    fn bytes_total(&self) -> usize {
        self.layout.size()
    }
}

// SAFETY: as for `IoBuf`; the pointer may be written through because the value owns the memory.
unsafe impl tokio_uring::buf::IoBufMut for AlignedBuf {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
    unsafe fn set_init(&mut self, bytes: usize) {
        self.filled = self.filled.max(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_on_a_block_and_is_zero() {
        let buf = AlignedBuf::new();
        assert_eq!(buf.start() as usize % BLOCK_BYTES as usize, 0);
        assert!(buf.len() == RING_BUFFER_BYTES && buf.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn memory_to_read_into_is_whole_blocks_of_which_nothing_is_seen_before_it_is_filled() {
        for (bytes, blocks) in [(0, 1), (1, 1), (4096, 1), (4097, 2), (3 << 20, 768)] {
            let mut buf = AlignedBuf::to_fill(bytes).expect("memory");
            assert_eq!((buf.len(), buf.capacity()), (0, blocks * BLOCK_BYTES as usize), "{bytes}");
            assert!((buf.start() as usize).is_multiple_of(BLOCK_BYTES as usize));
            buf.truncate(1);
            assert!(buf.is_empty());
        }
        let mut zeros = AlignedBuf::zeros(5000).expect("memory");
        assert_eq!(zeros.as_ref(), [0; 8192]);
        zeros.truncate(5000);
        assert_eq!(zeros.len(), 5000);
    }

    #[test]
    fn a_length_that_no_memory_holds_is_an_error() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            let refused = AlignedBuf::to_fill(bytes).expect_err("too much");
            assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory, "{bytes}");
        }
    }
}
