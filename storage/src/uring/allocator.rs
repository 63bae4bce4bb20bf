//! The one option of the allocator that its safe interface does not offer. Here because this is the room of `unsafe`.

use libmimalloc_sys::{mi_option_set, mi_option_t};
use std::ffi::c_long;

/// `mi_option_purge_delay` (mimalloc 3, include/mimalloc.h), in milliseconds; arenas wait ten times as long.
const PURGE_DELAY: mi_option_t = 15;
/// See [`keep_memory`].
const PURGE_DELAY_MS: c_long = 60_000;

/// Memory goes back to the system when it was not used for ten minutes. By default it does after ten seconds, in the
/// middle of a recording, and touching it again costs stalls (PERF.md).
pub fn keep_memory() {
    // SAFETY: the call stores a number in a table of mimalloc's own, and the option is one of that table.
    unsafe { mi_option_set(PURGE_DELAY, PURGE_DELAY_MS) }
}
