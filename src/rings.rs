//! Threads with a disk of their own, of the engine that was found at start.

use std::io;
use std::thread::JoinHandle;
use storage::depth::Buffers;
use storage::disk::{Disk, DiskState, Engine};
use storage::{posix, uring};

/// Runs a body on a thread with a disk of the engine that was found.
pub(crate) fn on_disk<B>(name: &str, disk: &DiskState, buffers: Buffers, body: B) -> io::Result<JoinHandle<()>>
where
    B: DiskBody + Send + 'static,
{
    let (disk, thread_name) = (disk.clone(), name.to_owned());
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let result = match disk.engine {
            Engine::Uring => uring::run(&disk, buffers, |disk| body.run(disk)),
            Engine::Posix => posix::run(&disk, buffers.count, |disk| body.run(disk)),
        };
        if let Err(error) = result {
            tracing::error!(thread = thread_name, %error, "the ring could not be made");
        }
    })
}

/// Work that runs on any disk. (A closure cannot be generic over the disk's type.)
pub(crate) trait DiskBody {
    fn run<D: Disk>(self, disk: D) -> impl Future<Output = ()>;
}
