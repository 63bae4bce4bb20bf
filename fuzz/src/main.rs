//! One binary for all targets: `FUZZ_TARGET` names the one that this process fuzzes. With
//! `FUZZ_SEEDS=DIR` it writes the target's seeds there first.
//!
//! Guarantees: a panic, a stack overflow, a hang and an allocation beyond its bound each end the process and
//! leave the input behind. Panics that the program itself catches are no findings.
#![no_main]

mod cap;

use flightbox::hostile::{TARGETS, Target, seeds};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap(std::alloc::System);

/// Most bytes that one input may hold at once, over all its messages: four times what a batch may take.
const LIVE_BYTES_MAX: isize = 96 << 20;
/// Most bytes of one allocation.
const ONE_BYTES_MAX: usize = 48 << 20;

static TARGET: OnceLock<Target> = OnceLock::new();

fn begin() {
    alternate_stack();
    // libFuzzer's own hook ends the process at any panic, also one that the program catches.
    std::panic::set_hook(Box::new(|_| {}));
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let Some(target) = TARGETS.into_iter().find(|target| target.name == name) else {
        eprintln!("FUZZ_TARGET = {name:?} is none of {}", known.join(", "));
        std::process::exit(2);
    };
    if let Ok(dir) = std::env::var("FUZZ_SEEDS") {
        for (number, seed) in seeds(&name).into_iter().enumerate() {
            std::fs::write(format!("{dir}/seed-{number:03}"), seed).expect("seeds can be written");
        }
    }
    TARGET.set(target).ok();
}

/// libFuzzer's handler of SIGSEGV runs on the alternate stack only if the disposition it replaces had
/// SA_ONSTACK: without it an overflow ends without a word.
fn alternate_stack() {
    const BYTES: usize = 256 << 10;
    let memory = Box::leak(vec![0_u8; BYTES].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: BYTES };
    // SAFETY: the memory is leaked, so the stack lives as long as the process.
    assert_eq!(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }, 0);
    // SAFETY: all zeros are a valid sigaction: the default disposition, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the default disposition with a flag.
    assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) }, 0);
}

libfuzzer_sys::fuzz_target!(init: begin(), |data: &[u8]| {
    let Some(target) = TARGET.get() else { return };
    let read = AssertUnwindSafe(|| cap::bounded(LIVE_BYTES_MAX, ONE_BYTES_MAX, || (target.read)(data)));
    if let Err(panic) = catch_unwind(read) {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
        eprintln!("{}: {text}", target.name);
        std::process::abort();
    }
});
