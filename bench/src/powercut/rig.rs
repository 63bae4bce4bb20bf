//! Brings the journalled disk up under a loop device and a real file system, and takes it down again.
//!
//! The FUSE server is a process of its own: one that both serves a disk and waits for it cannot be killed.
//! What is left of a starter that was killed, the server takes down.

use super::disk::Disk;
use super::journal::{Event, Survivor, WriteCache, apply};
use crate::loops::{FileSystem, Loop, Mounted, PATIENCE, run};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The journalled disk, served by a process of its own.
pub(super) struct Recorder {
    pub(super) dir: PathBuf,
    pub(super) journal: File,
    server: Child,
}

impl Recorder {
    /// `dir` should be in memory; it must not exist yet.
    pub(super) fn start(dir: &Path, size: u64, delay_max: Duration) -> io::Result<Self> {
        fs::create_dir_all(dir.join("fuse"))?;
        File::create(dir.join("image"))?.set_len(size)?;
        File::create(dir.join("journal"))?;
        let mut server = Command::new(std::env::current_exe()?);
        server.arg(super::DISK_COMMAND).arg(dir).arg(delay_max.as_micros().to_string()).stdin(Stdio::piped());
        let server = server.spawn()?;
        let recorder = Self { dir: dir.into(), journal: File::open(dir.join("journal"))?, server };
        let since = Instant::now();
        while fs::metadata(recorder.disk()).is_err() {
            if since.elapsed() > PATIENCE {
                return Err(io::Error::other("the FUSE mount did not come up"));
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        Ok(recorder)
    }

    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("fuse/disk.img")
    }

    /// The journal's length: what was acknowledged before this call lies below it.
    pub(super) fn position(&self) -> io::Result<u64> {
        Ok(self.journal.metadata()?.len())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.server.stdin.take()); // Tells the server to clean up and end.
        self.server.wait().ok();
        clean(&self.dir, "^$"); // In case the server was killed.
    }
}

/// The server's main: serves until its starter is gone, however that one ended.
pub(super) fn serve(dir: &Path, delay_max: Duration) -> io::Result<()> {
    let open = |name: &str| File::options().read(true).write(true).open(dir.join(name));
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("powercut".into())];
    let disk = Disk::new(open("image")?, open("journal")?, delay_max)?;
    let session = fuser::Session::new(disk, dir.join("fuse"), &config)?.spawn()?;
    io::copy(&mut io::stdin(), &mut io::sink())?; // Ends when the starter does.
    clean(dir, "/fuse$"); // What a killed starter left: needs the server, which still runs.
    drop(session); // Unmounts; if it stays busy, our end aborts the connection: all I/O fails with EIO.
    clean(dir, "^$");
    Ok(())
}

/// Takes down every mount and loop device below `dir`, then `dir` itself, but for mounts that match `spare`.
/// Tries again for a while: commands that a killed starter had running may still attach and mount.
fn clean(dir: &Path, spare: &str) {
    let dir = dir.display();
    let mounts = format!("findmnt -rno TARGET | grep '^{dir}/' | grep -v '{spare}' | tac");
    let loops = format!("losetup -nlO NAME,BACK-FILE | grep ' {dir}/' | cut -d' ' -f1");
    let script = format!(
        "for lazy in '' '' '' '' '' '' '' --lazy --lazy; do
            {loops} | xargs -r losetup --detach
            {mounts} | xargs -r -n1 umount $lazy
            sleep 0.1
            [ -z \"$({mounts})$({loops})\" ] && break
        done
        findmnt -rno TARGET | grep -q '^{dir}/' || rm -rf --one-file-system {dir}"
    );
    if let Err(error) = run(&script) {
        eprintln!("{error}");
    }
}

/// Makes images for cut points that only go forward, so that each event is applied once.
pub(super) struct Replayer<'a> {
    journal: &'a File,
    path: PathBuf,
    durable: File,
    cache: WriteCache,
}

impl<'a> Replayer<'a> {
    /// `durable` and the images that `cut` makes share a folder: best one that can reflink.
    pub(super) fn new(journal: &'a File, durable: &Path, size: u64) -> io::Result<Self> {
        let path = durable.to_path_buf();
        let durable = File::create_new(durable)?;
        durable.set_len(size)?;
        Ok(Self { journal, path, durable, cache: WriteCache::default() })
    }

    /// Goes on by some events.
    pub(super) fn advance(&mut self, events: &[Event]) -> io::Result<()> {
        for event in events.iter().flat_map(|event| self.cache.push(*event)) {
            apply(self.journal, Survivor { event, length: event.length }, &self.durable)?;
        }
        Ok(())
    }

    /// Writes the image after a cut here to the file `to`; returns what survived of the volatile writes.
    pub(super) fn cut(&self, seed: u64, to: &Path) -> io::Result<Vec<Survivor>> {
        run(&format!("cp --reflink=auto --sparse=auto {} {}", self.path.display(), to.display()))?;
        let (image, survivors) = (File::options().write(true).open(to)?, self.cache.survivors(seed));
        survivors.iter().try_for_each(|survivor| apply(self.journal, *survivor, &image))?;
        Ok(survivors)
    }
}

/// A folder on a reflinking XFS in memory: there a copy of an image takes milliseconds.
pub(super) fn scratch(dir: &Path) -> io::Result<Mounted> {
    let (file, at) = (dir.join("scratch.img"), dir.join("scratch"));
    File::create(&file)?.set_len(16 << 30)?;
    run(&format!("mkfs.xfs -q {}", file.display()))?;
    Mounted::new(Loop::attach(&file, true)?, FileSystem::Xfs, &at)
}
