//! Checks of this machine: what is there, what it means, what to do about it. One line each.

use crate::config::{Config, EngineChoice, HostFacts};
use std::path::{Path, PathBuf};
use storage::disk::Engine;
use storage::uring;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    /// Works, but slower or with less safety than it could.
    Warn,
    /// Does not work.
    Fail,
}

/// One line of `doctor`.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) verdict: Verdict,
    pub(crate) what: &'static str,
    pub(crate) found: String,
    pub(crate) remedy: Option<String>,
}

impl Check {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Good, what, found: found.into(), remedy: None }
    }

    fn warn(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, what, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, what, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// The line as printed.
    pub(crate) fn line(&self) -> String {
        let mark = match self.verdict {
            Verdict::Good => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        match &self.remedy {
            None => format!("{mark} {:<12} {}", self.what, self.found),
            Some(remedy) => format!("{mark} {:<12} {}; {remedy}", self.what, self.found),
        }
    }
}

/// What defaults are derived from. `folders`: where rows go.
pub(crate) fn facts(folders: &[PathBuf]) -> HostFacts {
    let least = |bytes: fn(&Path) -> Option<u64>| folders.iter().filter_map(|folder| bytes(folder)).min().unwrap_or(0);
    let pages = rustix::system::sysinfo();
    HostFacts {
        memory_bytes: (pages.totalram as u64 * u64::from(pages.mem_unit)).min(cgroup_limit().unwrap_or(u64::MAX)),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        free_bytes: least(free_bytes),
        disk_bytes: least(disk_bytes),
    }
}

/// The least `memory.max` of the program's control group and those above it (systemd's `MemoryMax=`, a container's
/// limit), in bytes.
fn cgroup_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    // Version 2 has one line, `0::/path`.
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = |group: &Path| std::fs::read_to_string(group.join("memory.max")).ok()?.trim().parse::<u64>().ok();
    Path::new("/sys/fs/cgroup")
        .join(group)
        .ancestors()
        .take_while(|at| at.starts_with("/sys/fs/cgroup"))
        .filter_map(limit)
        .min()
}

/// Size of a folder's file system.
fn disk_bytes(path: &Path) -> Option<u64> {
    rustix::fs::statvfs(existing(path)).ok().map(|stat| stat.f_blocks * stat.f_frsize)
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(existing(path)).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// The nearest folder above that is there.
fn existing(path: &Path) -> PathBuf {
    let mut at = path;
    loop {
        if at.is_dir() {
            return at.to_owned();
        }
        match at.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => at = parent,
            _ => return PathBuf::from("."),
        }
    }
}

/// All checks, in the order of `doctor`'s lines.
pub(crate) fn check(config: &Config) -> Vec<Check> {
    let dir = existing(&config.data_dir);
    let mut checks =
        vec![kernel(), processor(&instructions()), cores(config), memory(config), memlock(config), descriptors()];
    checks.extend(disk(config, &dir));
    checks.extend(storage(&dir));
    for volume in &config.data_dirs {
        checks.push(Check::good("volume", volume.display().to_string()));
        checks.extend(storage(&existing(volume)));
    }
    checks
}

/// What RocksDB's C++ was compiled for beyond the first x86-64 (`.cargo/config.toml`), and whether this CPU has it.
fn instructions() -> Vec<(&'static str, bool)> {
    #[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
    let all = [
        ("-msse4.2", "SSE4.2", is_x86_feature_detected!("sse4.2")),
        ("-mpclmul", "PCLMULQDQ", is_x86_feature_detected!("pclmulqdq")),
    ];
    #[cfg(not(all(target_arch = "x86_64", target_env = "gnu")))]
    let all: [(&str, &'static str, bool); 0] = [];
    let flags = option_env!("CXXFLAGS_x86_64_unknown_linux_gnu").unwrap_or_default();
    all.into_iter().filter(|(flag, ..)| flags.contains(flag)).map(|(_, name, found)| (name, found)).collect()
}

/// Refuses a CPU that would end the program in the middle of a recording.
pub(crate) fn check_processor() -> Result<(), String> {
    let check = processor(&instructions());
    match check.remedy {
        Some(remedy) => Err(format!("this processor {}; {remedy}", check.found)),
        None => Ok(()),
    }
}

fn processor(instructions: &[(&'static str, bool)]) -> Check {
    let names = |there: bool| {
        let names: Vec<_> = instructions.iter().filter(|(_, found)| *found == there).map(|(name, _)| *name).collect();
        names.join(" and ")
    };
    match names(false) {
        none if none.is_empty() && instructions.is_empty() => Check::good("processor", "nothing special is needed"),
        none if none.is_empty() => Check::good("processor", format!("has what the catalog needs: {}", names(true))),
        missing => Check::fail(
            "processor",
            format!("has no {missing}, which the catalog's checksums need"),
            "give a virtual machine a CPU model that has it, or build flightbox without the CXXFLAGS line of \
             .cargo/config.toml",
        ),
    }
}

/// What lies under a folder.
fn storage(dir: &Path) -> [Check; 3] {
    [file_system(dir), free_space(dir), write_cache(dir)]
}

fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 1) {
        Check::good("kernel", release)
    } else if version >= (5, 19) {
        Check::warn("kernel", release, "6.1 or newer tells the alignment of direct I/O and costs less per write")
    } else {
        Check::fail(
            "kernel",
            release,
            "io_uring as used here needs 5.19 or newer; set engine = \"posix\" to go without",
        )
    }
}

fn cores(config: &Config) -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{cores}, {} of them for writers", config.writers);
    if config.writers < cores || cores == 1 {
        Check::good("cores", found)
    } else {
        Check::warn("cores", found, "leave at least one core to the network: lower `writers`")
    }
}

fn memory(config: &Config) -> Check {
    let sum: u64 = crate::limits::memory_sum(config).iter().map(|(_, bytes)| bytes).sum();
    let total = facts(&[]).memory_bytes;
    let found = format!("{} MiB, of which flightbox may use {} MiB", total >> 20, sum >> 20);
    if sum < total {
        Check::good("memory", found)
    } else {
        Check::warn("memory", found, "lower memory_budget, read_cache or streams_max")
    }
}

fn memlock(config: &Config) -> Check {
    let needed = (config.writers * storage::limits::RING_BUFFERS_PER_WRITER + storage::limits::RING_BUFFERS_PER_SERVICE)
        as u64
        * storage::limits::RING_BUFFER_BYTES as u64;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        Some(limit) if limit < needed && !rustix::process::geteuid().is_root() => Check::warn(
            "memlock",
            format!("limit {} KiB, ring buffers need {} KiB", limit >> 10, needed >> 10),
            "set LimitMEMLOCK=infinity in the unit or raise `ulimit -l`; until then buffers are not registered",
        ),
        _ => Check::good("memlock", format!("enough for {} KiB of ring buffers", needed >> 10)),
    }
}

fn descriptors() -> Check {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    if most >= 65_536 {
        Check::good("descriptors", format!("up to {most}"))
    } else {
        Check::warn(
            "descriptors",
            format!("at most {most}"),
            "set LimitNOFILE=65536 in the unit: each topic being written needs one",
        )
    }
}

/// Raises the descriptor limit to what is allowed.
pub(crate) fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).ok(); // `doctor` says what a low limit costs.
}

fn disk(config: &Config, dir: &Path) -> Vec<Check> {
    let state = uring::probe(dir, config.engine == EngineChoice::Auto);
    let alignment = match alignment(dir) {
        Some((memory, offset)) => format!("yes, aligned to {offset} bytes (memory {memory})"),
        None => "yes".to_owned(),
    };
    let note = |topic: &str| state.notes.iter().find(|note| note.contains(topic)).cloned();
    let engine = match (state.engine, note("io_uring")) {
        (Engine::Uring, _) => Check::good("engine", "io_uring"),
        (Engine::Posix, why) => Check::warn("engine", "plain system calls", why.unwrap_or_default()),
    };
    let direct = match note("direct").or_else(|| note("O_DIRECT")) {
        Some(why) if !state.direct => Check::warn("O_DIRECT", "no", why),
        _ => Check::good("O_DIRECT", alignment),
    };
    let registered = if state.registered {
        Check::good("buffers", "registered with the kernel")
    } else {
        Check::warn("buffers", "not registered", note("registered").unwrap_or_else(|| "see engine".to_owned()))
    };
    vec![engine, direct, registered]
}

/// Memory and offset alignment of direct I/O, as the file system states them (statx, Linux 6.1).
fn alignment(dir: &Path) -> Option<(u32, u32)> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let path = dir.join(".direct-probe");
    std::fs::File::create(&path).ok()?;
    let found = statx(CWD, &path, AtFlags::empty(), StatxFlags::DIOALIGN).ok();
    std::fs::remove_file(&path).ok(); // Left behind it does no harm; the next probe removes it.
    let found = found?;
    (found.stx_dio_offset_align > 0).then_some((found.stx_dio_mem_align, found.stx_dio_offset_align))
}

fn file_system(dir: &Path) -> Check {
    let Ok(stat) = rustix::fs::statfs(dir) else {
        return Check::fail(
            "file system",
            format!("{} cannot be looked at", dir.display()),
            "check the path and its rights",
        );
    };
    match stat.f_type as u64 {
        0xEF53 => Check::good("file system", "ext4"),
        0x5846_5342 => Check::good("file system", "XFS"),
        0x0102_1994 => Check::warn("file system", "tmpfs", "recordings do not survive a restart of the machine"),
        0x794C_7630 => Check::warn("file system", "overlay", "mount a volume of the host for the data"),
        0x9123_683E => Check::warn(
            "file system",
            "btrfs",
            "copy on write costs throughput: ext4 or XFS are what flightbox is measured on",
        ),
        other => {
            Check::warn("file system", format!("type {other:#x}"), "ext4 or XFS are what flightbox is measured on")
        }
    }
}

fn free_space(dir: &Path) -> Check {
    match free_bytes(dir) {
        Some(free) if free >= 10 << 30 => Check::good("free space", format!("{} GiB", free >> 30)),
        Some(free) => Check::warn(
            "free space",
            format!("{} MiB", free >> 20),
            "make room: a 4K camera fills 10 GiB within half a minute",
        ),
        None => Check::fail("free space", "unknown", "check the path and its rights"),
    }
}

fn write_cache(dir: &Path) -> Check {
    let Some(queue) = queue_dir(dir) else {
        return Check::warn(
            "write cache",
            "unknown (no block device behind the folder)",
            "durability is then the file system's word",
        );
    };
    let read =
        |name: &str| std::fs::read_to_string(queue.join(name)).map(|text| text.trim().to_owned()).unwrap_or_default();
    match (read("write_cache").as_str(), read("fua").as_str()) {
        ("write through", _) => Check::good("write cache", "write through: a completed write is on the media"),
        (_, "1") => Check::good("write cache", "write back with FUA"),
        (cache, _) => Check::good("write cache", format!("{cache} without FUA: each commit costs a cache flush")),
    }
}

fn queue_dir(dir: &Path) -> Option<PathBuf> {
    let device = rustix::fs::stat(dir).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let block = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition's queue is its disk's.
    [block.join("queue"), block.join("../queue")].into_iter().find(|queue| queue.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_what_the_catalog_is_compiled_for_is_named_with_the_remedy() {
        let full = processor(&[("SSE4.2", true), ("PCLMULQDQ", true)]);
        assert_eq!((full.verdict, full.remedy.is_none()), (Verdict::Good, true), "{}", full.found);
        let old = processor(&[("SSE4.2", true), ("PCLMULQDQ", false)]);
        assert_eq!(old.verdict, Verdict::Fail);
        assert!(old.found.contains("no PCLMULQDQ") && !old.found.contains("SSE4.2"), "{}", old.found);
        assert!(old.remedy.is_some_and(|remedy| remedy.contains("CXXFLAGS")));
        let none = processor(&[]);
        assert_eq!((none.verdict, none.found.as_str()), (Verdict::Good, "nothing special is needed"));
    }
}
