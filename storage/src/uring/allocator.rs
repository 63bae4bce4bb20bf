//! The allocator: mimalloc, asked the short way where Rust does not need more than C. Here because this is the room of
//! `unsafe`.
//!
//! The `mimalloc` crate asks for every block by its alignment. For the sizes that are no power of two, which is most of
//! them, mimalloc then takes a larger block and looks for the place in it, each time that it has no free block at hand.

use libmimalloc_sys::{mi_free, mi_malloc, mi_option_set, mi_option_t, mi_realloc, mi_zalloc};
use mimalloc::MiMalloc;
use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_long;

/// `mi_option_purge_delay` (mimalloc 3, include/mimalloc.h).
const PURGE_DELAY: mi_option_t = 15;
/// Memory that is free is not given back.
const NEVER: c_long = -1;
/// What every block of at least that size is aligned to, in bytes: C's malloc promises `max_align_t`
/// (`MI_MAX_ALIGN_SIZE`, mimalloc 3, include/mimalloc/types.h).
const GIVEN_ALIGNMENT: usize = 16;

/// Memory that was taken stays with the program. By default it goes back to the system ten seconds after it was
/// used, in the middle of a recording, and taking it again costs stalls (PERF.md).
pub fn keep_memory() {
    // SAFETY: the call stores a number in a table of mimalloc's own, and the option is one of that table.
    unsafe { mi_option_set(PURGE_DELAY, NEVER) }
}

/// Whether a block of that size is aligned well enough without asking. Smaller ones than their alignment are not.
fn is_given(align: usize, size: usize) -> bool {
    align <= GIVEN_ALIGNMENT && align <= size
}

/// The program's allocator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allocator;

// SAFETY: all blocks are mimalloc's, whichever way they were asked for, so each of its functions takes those of the
// others; each has the size asked for, and the alignment by `is_given` or because it was asked for; mimalloc does not
// unwind and is safe to call from several threads.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_given(layout.align(), layout.size()) {
            // SAFETY: any size may be asked for.
            unsafe { mi_malloc(layout.size()).cast() }
        } else {
            // SAFETY: the caller's layout, as it came.
            unsafe { MiMalloc.alloc(layout) }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_given(layout.align(), layout.size()) {
            // SAFETY: any size may be asked for.
            unsafe { mi_zalloc(layout.size()).cast() }
        } else {
            // SAFETY: the caller's layout, as it came.
            unsafe { MiMalloc.alloc_zeroed(layout) }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _layout: Layout) {
        // SAFETY: the caller has the block from here and uses it no more.
        unsafe { mi_free(block.cast()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if is_given(layout.align(), new_size) {
            // SAFETY: the caller has the block from here and uses it no more, unless the answer is null.
            unsafe { mi_realloc(block.cast(), new_size).cast() }
        } else {
            // SAFETY: as above; size and layout as they came.
            unsafe { MiMalloc.realloc(block, layout, new_size) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_every_size_and_alignment_are_aligned_keep_their_bytes_and_can_grow() {
        for align in (0..=7).map(|power| 1_usize << power) {
            for size in (1..300).chain([1000, 1025, 4097, 70_001, 1 << 20]) {
                let layout = Layout::from_size_align(size, align).expect("a layout");
                // SAFETY: the size is not zero.
                let block = unsafe { Allocator.alloc_zeroed(layout) };
                assert!(!block.is_null() && block.addr().is_multiple_of(align), "{size} aligned to {align}");
                // SAFETY: the block has so many bytes, zeroed, and nobody else has it.
                let bytes = unsafe { std::slice::from_raw_parts_mut(block, size) };
                assert!(bytes.iter().all(|byte| *byte == 0));
                bytes.fill(7);
                // SAFETY: the block is from above; the new size is not zero and does not overflow.
                let larger = unsafe { Allocator.realloc(block, layout, size + 13) };
                assert!(!larger.is_null() && larger.addr().is_multiple_of(align), "{size} aligned to {align}");
                // SAFETY: the first bytes came along, nobody else has them.
                assert!(unsafe { std::slice::from_raw_parts(larger, size) }.iter().all(|byte| *byte == 7));
                let layout = Layout::from_size_align(size + 13, align).expect("a layout");
                // SAFETY: the block is from above, by this layout.
                unsafe { Allocator.dealloc(larger, layout) };
            }
        }
    }
}
