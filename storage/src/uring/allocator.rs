//! The one option of the allocator that its safe interface does not offer. Here because this is the room of `unsafe`.

use libmimalloc_sys::{mi_option_set, mi_option_t};
use std::ffi::c_long;

/// `mi_option_purge_delay` (mimalloc 3, include/mimalloc.h).
const PURGE_DELAY: mi_option_t = 15;
/// Memory that is free is not given back.
const NEVER: c_long = -1;

/// Memory that was taken stays with the program. By default it goes back to the system ten seconds after it was
/// used, in the middle of a recording, and taking it again costs stalls (PERF.md).
pub fn keep_memory() {
    // SAFETY: the call stores a number in a table of mimalloc's own, and the option is one of that table.
    unsafe { mi_option_set(PURGE_DELAY, NEVER) }
}
