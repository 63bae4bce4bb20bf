//! Several disks on a machine that has one: loop devices with a file system each, on which the program under test may
//! write only so much a second (the block layer's throttle). What several of them take, against one, says whether
//! topics on several volumes wait for each other; the CPU is not what bounds them here. Needs root.

use crate::closed::{self, Closed, Outcome, Speaks};
use crate::loops::{FileSystem, Loop, Mounted};
use crate::profile::Profile;
use crate::server::Server;
use std::error::Error;
use std::path::{Path, PathBuf};

type AnyError = Box<dyn Error>;

/// What one throttled disk takes, in bytes a second.
pub(crate) const DISK_RATE: u64 = 100_000_000;
/// How long one disk is kept busy, in seconds.
const SECONDS: u64 = 6;
const STREAMS: usize = 8;

/// Whether this process may do all that.
pub(crate) fn is_possible() -> bool {
    rustix::process::geteuid().is_root() && Throttle::parent().is_some()
}

/// Saturates so many throttled disks; returns what came of it.
pub(crate) fn run(
    program: &Path,
    scratch: &Path,
    count: usize,
    runtime: &tokio::runtime::Runtime,
) -> Result<Outcome, AnyError> {
    let folder = tempfile::tempdir_in(scratch)?;
    let mut disks = Vec::new();
    let mut rules = Vec::new();
    for index in 0..count {
        let image = folder.path().join(format!("disk{index}"));
        std::fs::File::create(&image)?.set_len(4 << 30)?;
        let device = Loop::attach(&image, true)?;
        FileSystem::Ext4.make(&device.device)?;
        let number = rustix::fs::stat(device.device.as_str())?.st_rdev;
        rules.push(format!("{}:{} {DISK_RATE}", rustix::fs::major(number), rustix::fs::minor(number)));
        disks.push(Mounted::new(device, FileSystem::Ext4, &folder.path().join(format!("mount{index}")))?);
    }
    let roots: Vec<String> = disks.iter().map(|disk| disk.at.display().to_string()).collect();
    let (dirs, writers) = (format!("data_dirs={}", roots.join(":")), format!("writers={count}"));
    let server = Server::start(program, &folder.path().join("data"), &["--set", &dirs, "--set", &writers])?;
    let throttle = Throttle::new(server.pid(), &rules)?;
    let load = Closed { profile: Profile::Image, streams: STREAMS, bytes: count as u64 * DISK_RATE * SECONDS };
    let outcome = runtime.block_on(closed::run(&server, Speaks::Flightbox, load, scratch));
    drop((server, throttle, disks));
    outcome
}

/// A control group that holds one process to rates.
struct Throttle(PathBuf);

impl Throttle {
    /// Where groups are made: version 1's block controller or version 2's root.
    fn parent() -> Option<(PathBuf, bool)> {
        let old = PathBuf::from("/sys/fs/cgroup/blkio");
        if old.join("blkio.throttle.write_bps_device").is_file() {
            return Some((old, true));
        }
        let new = PathBuf::from("/sys/fs/cgroup");
        let controllers = std::fs::read_to_string(new.join("cgroup.subtree_control")).ok()?;
        controllers.split_whitespace().any(|name| name == "io").then_some((new, false))
    }

    /// `rules`: a device's numbers and bytes a second, each.
    fn new(pid: u32, rules: &[String]) -> Result<Self, AnyError> {
        let (parent, is_old) = Self::parent().ok_or("no control group for block devices")?;
        let group = parent.join(format!("flightbox-bench-{pid}"));
        std::fs::create_dir(&group)?;
        let group = Self(group);
        for rule in rules {
            if is_old {
                std::fs::write(group.0.join("blkio.throttle.write_bps_device"), rule)?;
            } else if let Some((device, rate)) = rule.split_once(' ') {
                std::fs::write(group.0.join("io.max"), format!("{device} wbps={rate}"))?;
            }
        }
        std::fs::write(group.0.join("cgroup.procs"), pid.to_string())?;
        Ok(group)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).ok(); // Its process has ended; an empty group that stays does no harm.
    }
}
