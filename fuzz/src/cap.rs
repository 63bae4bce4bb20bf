//! An allocator that bounds what one input may ask for, at once and in sum. (libFuzzer's own bound needs a
//! sanitizer.) It counts what Rust allocates: libFuzzer's and RocksDB's own memory never comes here.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};

static LIVE: AtomicIsize = AtomicIsize::new(0);
static ONE_MAX: AtomicUsize = AtomicUsize::new(usize::MAX);
static LIVE_MAX: AtomicIsize = AtomicIsize::new(isize::MAX);

/// Counts and hands on to the allocator inside.
pub struct Cap<A>(pub A);

/// Runs `body`, which may hold `live` bytes more than are held now, and ask for `one` at once.
pub fn bounded<R>(live: isize, one: usize, body: impl FnOnce() -> R) -> R {
    LIVE_MAX.store(LIVE.load(Ordering::Relaxed) + live, Ordering::Relaxed);
    ONE_MAX.store(one, Ordering::Relaxed);
    let result = body();
    lift();
    result
}

fn lift() {
    ONE_MAX.store(usize::MAX, Ordering::Relaxed);
    LIVE_MAX.store(isize::MAX, Ordering::Relaxed);
}

fn check(size: usize, grown: isize) {
    let live = LIVE.fetch_add(grown, Ordering::Relaxed) + grown;
    if size > ONE_MAX.load(Ordering::Relaxed) || live > LIVE_MAX.load(Ordering::Relaxed) {
        lift(); // The report allocates.
        let trace = std::backtrace::Backtrace::force_capture();
        eprintln!("an allocation of {size} bytes ({live} held) is above the bound\n{trace}");
        std::process::abort(); // libFuzzer keeps the input.
    }
}

// SAFETY: every call goes to the inner allocator unchanged; `check` only counts, or ends the process.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Cap<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size(), layout.size().cast_signed());
        // SAFETY: the caller's promise, handed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size(), layout.size().cast_signed());
        // SAFETY: as above.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size().cast_signed(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check(size, size.cast_signed() - layout.size().cast_signed());
        // SAFETY: as above.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}
