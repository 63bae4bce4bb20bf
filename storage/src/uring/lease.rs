//! Whether anybody else has a file open: a question that only a lease answers, and no safe crate asks. Here because this
//! is the room of `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes the lease that is to be had only by who has a file open alone (`F_SETLEASE`, `F_WRLCK`; fcntl(2)); it goes with
/// the descriptor.
///
/// # Errors
/// `EAGAIN` when anybody else has it open or mapped; `EINVAL` where the file system has no leases.
pub(crate) fn exclusive(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file` is borrowed, and this command takes a number, no memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
