//! The program: its allocator and its entry. Everything else is in the library beside it.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: storage::uring::allocator::Allocator = storage::uring::allocator::Allocator;

fn main() -> ExitCode {
    storage::uring::allocator::keep_memory();
    flightbox::run()
}
