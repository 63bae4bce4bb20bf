//! File systems on loop devices: made, mounted, unmounted, whatever ends first. Needs root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a mount or a detach may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Which file system lies on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// Its name for `mount`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Makes one on a device; nothing of it is written later by itself.
    pub(crate) fn make(self, device: &str) -> io::Result<String> {
        run(&match self {
            Self::Ext4 => format!("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0,nodiscard {device}"),
            Self::Xfs => format!("mkfs.xfs -q -f -K {device}"),
        })
    }
}

/// Runs a shell command; returns what it printed.
pub(crate) fn run(command: &str) -> io::Result<String> {
    let output = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(io::Error::other(format!("{command}: {} {}", text(&output.stdout), text(&output.stderr))))
}

/// A loop device; once it is mounted, the kernel frees it by itself at the unmount (autoclear).
pub(crate) struct Loop {
    pub(crate) device: String,
    image: PathBuf,
}

impl Loop {
    /// `direct` for the journalled disk: no page cache between the file system and the journal. Not for a
    /// reflinked image: XFS asks for direct I/O of 4 KiB there, so the sectors would grow to that.
    pub(crate) fn attach(image: &Path, direct: bool) -> io::Result<Self> {
        let mode = if direct { "on" } else { "off" };
        let device = run(&format!("losetup --find --show --direct-io={mode} {}", image.display()))?;
        let device = Self { device, image: image.into() };
        if device.sysfs("loop/dio") == u8::from(direct).to_string() {
            return Ok(device);
        }
        Err(io::Error::other("the loop driver refused the direct I/O mode"))
    }

    fn sysfs(&self, leaf: &str) -> String {
        let name = self.device.trim_start_matches("/dev/");
        fs::read_to_string(format!("/sys/block/{name}/{leaf}")).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The device may be free already and in use by another process: ours only with our image.
        let ours = || Path::new(&self.sysfs("loop/backing_file")) == self.image;
        if ours() {
            run(&format!("losetup --detach {}", self.device)).ok(); // Tried again below by the wait.
        }
        let since = Instant::now();
        while ours() && since.elapsed() < PATIENCE {
            std::thread::park_timeout(Duration::from_millis(1)); // A detach is lazy.
        }
    }
}

/// A mounted file system; unmounts first and then frees its loop device.
pub(crate) struct Mounted {
    pub(crate) at: PathBuf,
    _device: Loop,
}

impl Mounted {
    pub(crate) fn new(device: Loop, file_system: FileSystem, at: &Path) -> io::Result<Self> {
        // nouuid: an image after a cut has the UUID of the live file system.
        let options = if file_system == FileSystem::Xfs { "-o nouuid" } else { "" };
        fs::create_dir_all(at)?;
        run(&format!("mount -t {} {options} {} {}", file_system.name(), device.device, at.display()))?;
        // Takes effect at the unmount, whoever does it.
        run(&format!("losetup --detach {}", device.device))?;
        Ok(Self { at: at.into(), _device: device })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A killed recorder's ring holds its files for a moment.
        let since = Instant::now();
        while let Err(error) = run(&format!("umount {}", self.at.display())) {
            if since.elapsed() > PATIENCE {
                eprintln!("{error}");
                run(&format!("umount --lazy {}", self.at.display())).ok(); // Autoclear frees the device later.
                return;
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}
