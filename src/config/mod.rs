//! Configuration in two types: what was written ([`raw::Raw`]) and what is true ([`Config`]).
//!
//! Precedence: flag over environment (`FLIGHTBOX_<KEY>`) over file over default. Every message
//! names the key, the value, where it came from and the remedy; an unknown key is an error.

pub(crate) mod raw;

use crate::ingest::gather::ChunkRule;
use crate::limits;
use raw::{Raw, Setting};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use storage::chunk::Compression;

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{key} = {value:?} (from {origin}): {why}")]
pub(crate) struct ConfigError {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) origin: String,
    pub(crate) why: String,
}

/// Which disk engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineChoice {
    /// io_uring, or plain system calls where it is not to be had.
    Auto,
    /// Plain system calls.
    Posix,
}

/// Which schemas a topic may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OntologyMode {
    /// Any; a new one is registered at first use.
    Open,
    /// Only registered ones.
    Strict,
}

/// What is true: checked, in units, with no way to hold a bad pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) data_dir: PathBuf,
    /// Folders that topics are spread over; empty: the data folder itself.
    pub(crate) data_dirs: Vec<PathBuf>,
    pub(crate) listen: SocketAddr,
    pub(crate) unix_socket: Option<PathBuf>,
    pub(crate) engine: EngineChoice,
    pub(crate) writers: usize,
    /// Threads that serve sockets.
    pub(crate) front_threads: usize,
    pub(crate) memory_budget_bytes: u64,
    /// Memory that is touched at start, before uploads need it.
    pub(crate) touch_memory_bytes: u64,
    pub(crate) read_cache_bytes: u64,
    pub(crate) message_bytes_max: u64,
    pub(crate) batch_memory_max: u64,
    pub(crate) connections_max: u32,
    /// Uploads at once, over all connections, and as many DoGet streams.
    pub(crate) streams_max: u32,
    pub(crate) stream_window_bytes: u32,
    pub(crate) upload_stall: Duration,
    pub(crate) chunk_bytes: u64,
    pub(crate) commit_interval: Duration,
    pub(crate) tail_max_age: Duration,
    pub(crate) segment_bytes: u64,
    pub(crate) prealloc_bytes: u64,
    /// Kept free so that what was taken can always be brought to its end on a full disk.
    pub(crate) reserve_bytes: u64,
    /// How long a topic stays without a stream before its tail is closed into a chunk.
    pub(crate) idle_topic: Duration,
    pub(crate) compression: Compression,
    pub(crate) ontology: OntologyMode,
    /// Whether interrupted recordings are finalized at start, as they are.
    pub(crate) seal_on_restart: bool,
    /// Whether reads leave out damaged chunks, and say so; otherwise they fail.
    pub(crate) skip_damage: bool,
    /// Bytes a second that the scrub reads while nothing else happens; 0: none.
    pub(crate) scrub_rate: u64,
    pub(crate) legacy_session_reply: bool,
    pub(crate) log_json: bool,
    pub(crate) log_level: String,
}

impl Config {
    /// Checks what was written against what can be.
    pub(crate) fn check(raw: &Raw, host: &HostFacts) -> Result<Self, ConfigError> {
        let memory_budget = raw.get("memory_budget");
        let memory_budget_bytes = match memory_budget.text.as_str() {
            // More only lets uploads run ahead of the disk: memory that is touched for the first time costs as
            // much as copying it three times (PERF.md).
            "auto" => (host.memory_bytes / 8).min(host.cores as u64 * limits::BUDGET_BYTES_PER_CORE),
            _ => size(memory_budget)?,
        };
        let at_least = |key: &str, value: u64, least: u64, what: &str| {
            if least <= value { Ok(value) } else { Err(refuse(raw.get(key), &format!("must be at least {what}"))) }
        };
        at_least("memory_budget", memory_budget_bytes, 32 << 20, "32MiB")?;
        let count = |key: &str| {
            u32::try_from(at_least(key, number(raw.get(key))?, 1, "1")?)
                .map_err(|_| refuse(raw.get(key), "is too large"))
        };
        let streams_max = count("streams_max")?;
        let connections_max = match raw.get("connections_max").text.as_str() {
            "auto" => limits::connections_max(memory_budget_bytes),
            _ => count("connections_max")?,
        };
        let stream_window_bytes = match raw.get("stream_window").text.as_str() {
            "auto" => limits::stream_window_bytes(memory_budget_bytes, streams_max),
            // RFC 9113, 6.9.1: no window is larger than 2^31 - 1.
            _ => i32::try_from(at_least("stream_window", size(raw.get("stream_window"))?, 64 << 10, "64KiB")?)
                .map_err(|_| refuse(raw.get("stream_window"), "must be less than 2GiB"))?
                .unsigned_abs(),
        };
        // What HTTP/2 has read of other messages.
        let windows_bytes = u64::from(limits::requests_max(streams_max)) * u64::from(stream_window_bytes);
        let touch_memory_bytes = match raw.get("touch_memory").text.as_str() {
            // On a small machine the windows of all streams would be more than everything else.
            "auto" => memory_budget_bytes.saturating_add(windows_bytes.min(memory_budget_bytes / 4)),
            _ => size(raw.get("touch_memory"))?.min(memory_budget_bytes.saturating_add(windows_bytes)),
        };
        let data_dirs = folders(raw.get("data_dirs"))?;
        let writers = match raw.get("writers").text.as_str() {
            "auto" => (host.cores / 2).max(1),
            _ => usize::try_from(at_least("writers", number(raw.get("writers"))?, 1, "1")?).unwrap_or(usize::MAX),
        };
        // As many for each: the topics of one writer lie on one volume.
        let writers = writers.checked_next_multiple_of(data_dirs.len().max(1)).unwrap_or(writers);
        let front_threads = match raw.get("front_threads").text.as_str() {
            // Two threads on one core only wake each other.
            "auto" => host.cores.saturating_sub(writers).max(1),
            _ => usize::try_from(at_least("front_threads", number(raw.get("front_threads"))?, 1, "1")?)
                .unwrap_or(usize::MAX),
        };
        let chunk_bytes = at_least("chunk_bytes", size(raw.get("chunk_bytes"))?, 64 << 10, "64KiB")?;
        let segment_bytes = size(raw.get("segment_bytes"))?;
        if segment_bytes < chunk_bytes {
            return Err(refuse(
                raw.get("segment_bytes"),
                "must hold at least one chunk: raise it to chunk_bytes or more",
            ));
        }
        let prealloc_bytes = match raw.get("prealloc_bytes").text.as_str() {
            "auto" => (host.free_bytes / 100).min(4 << 30),
            _ => size(raw.get("prealloc_bytes"))?,
        };
        let reserve_bytes = match raw.get("reserve_bytes").text.as_str() {
            "auto" => (host.disk_bytes / 50).min(1 << 30),
            _ => size(raw.get("reserve_bytes"))?,
        };
        let unix = raw.get("unix_socket");
        Ok(Self {
            data_dir: PathBuf::from(&raw.get("data_dir").text),
            data_dirs,
            listen: raw
                .get("listen")
                .text
                .parse()
                .map_err(|_| refuse(raw.get("listen"), "is not ADDRESS:PORT; use 127.0.0.1:6726"))?,
            unix_socket: (!unix.text.is_empty()).then(|| PathBuf::from(&unix.text)),
            engine: match raw.get("engine").text.as_str() {
                "auto" | "uring" => EngineChoice::Auto,
                "posix" => EngineChoice::Posix,
                _ => return Err(refuse(raw.get("engine"), "is none of auto, uring, posix")),
            },
            writers,
            front_threads,
            memory_budget_bytes,
            touch_memory_bytes,
            read_cache_bytes: size(raw.get("read_cache"))?,
            message_bytes_max: at_least("message_bytes_max", size(raw.get("message_bytes_max"))?, 1 << 20, "1MiB")?,
            batch_memory_max: at_least("batch_memory_max", size(raw.get("batch_memory_max"))?, 1 << 20, "1MiB")?,
            connections_max,
            streams_max,
            stream_window_bytes,
            upload_stall: duration(raw.get("upload_stall"))?,
            chunk_bytes,
            commit_interval: duration(raw.get("commit_interval"))?,
            tail_max_age: duration(raw.get("tail_max_age"))?,
            segment_bytes,
            prealloc_bytes,
            reserve_bytes,
            idle_topic: duration(raw.get("idle_topic"))?,
            compression: Compression::from_name(&raw.get("compression").text)
                .ok_or_else(|| refuse(raw.get("compression"), "is none of none, lz4, zstd"))?,
            ontology: match raw.get("ontology").text.as_str() {
                "open" => OntologyMode::Open,
                "strict" => OntologyMode::Strict,
                _ => return Err(refuse(raw.get("ontology"), "is none of open, strict")),
            },
            seal_on_restart: match raw.get("on_restart").text.as_str() {
                "keep" => false,
                "seal" => true,
                _ => return Err(refuse(raw.get("on_restart"), "is none of keep, seal")),
            },
            skip_damage: match raw.get("on_damage").text.as_str() {
                "skip" => true,
                "fail" => false,
                _ => return Err(refuse(raw.get("on_damage"), "is none of skip, fail")),
            },
            scrub_rate: size(raw.get("scrub_rate"))?,
            legacy_session_reply: boolean(raw.get("legacy_session_reply"))?,
            log_json: match raw.get("log_format").text.as_str() {
                "human" => false,
                "json" => true,
                _ => return Err(refuse(raw.get("log_format"), "is none of human, json")),
            },
            log_level: raw.get("log_level").text.clone(),
        })
    }

    /// The settings of the chunk rule.
    pub(crate) fn chunk_rule(&self) -> ChunkRule {
        ChunkRule {
            chunk_bytes: self.chunk_bytes,
            commit_interval: self.commit_interval,
            tail_max_age: self.tail_max_age,
        }
    }
}

/// What defaults are derived from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostFacts {
    pub(crate) memory_bytes: u64,
    pub(crate) cores: usize,
    pub(crate) free_bytes: u64,
    /// Size of the file system.
    pub(crate) disk_bytes: u64,
}

fn refuse(setting: &Setting, why: &str) -> ConfigError {
    ConfigError {
        key: setting.key.to_owned(),
        value: setting.text.clone(),
        origin: setting.origin.clone(),
        why: why.to_owned(),
    }
}

/// Folders on other volumes, which links will name.
fn folders(setting: &Setting) -> Result<Vec<PathBuf>, ConfigError> {
    let folders: Vec<PathBuf> = setting.text.split(':').filter(|part| !part.is_empty()).map(PathBuf::from).collect();
    for (at, folder) in folders.iter().enumerate() {
        if !folder.is_absolute() {
            return Err(refuse(setting, &format!("{} must be an absolute path", folder.display())));
        }
        let overlaps = |other: &PathBuf| other.starts_with(folder) || folder.starts_with(other);
        if let Some(other) = folders.iter().take(at).find(|other| overlaps(other)) {
            let why = format!("{} and {} must be apart from each other", other.display(), folder.display());
            return Err(refuse(setting, &why));
        }
    }
    Ok(folders)
}

fn number(setting: &Setting) -> Result<u64, ConfigError> {
    setting.text.parse().map_err(|_| refuse(setting, "is not a whole number"))
}

fn boolean(setting: &Setting) -> Result<bool, ConfigError> {
    setting.text.parse().map_err(|_| refuse(setting, "is neither true nor false"))
}

fn size(setting: &Setting) -> Result<u64, ConfigError> {
    parse_with_unit(&setting.text, &[("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1), ("", 1)])
        .ok_or_else(|| refuse(setting, "is not a size; write it like 64MiB (units B, KiB, MiB, GiB)"))
}

fn duration(setting: &Setting) -> Result<Duration, ConfigError> {
    parse_duration(&setting.text)
        .ok_or_else(|| refuse(setting, "is not a duration; write it like 50ms (units ms, s, min, h)"))
}

/// A duration like `50ms` (units ms, s, min, h).
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    parse_with_unit(text, &[("ms", 1), ("min", 60_000), ("s", 1000), ("h", 3_600_000)]).map(Duration::from_millis)
}

fn parse_with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    units.iter().find_map(|(unit, factor)| {
        let number = text.strip_suffix(unit)?.trim_end();
        number.parse::<u64>().ok()?.checked_mul(*factor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostFacts =
        HostFacts { memory_bytes: 16 << 30, cores: 8, free_bytes: 100 << 30, disk_bytes: 200 << 30 };

    fn check_text(text: &str) -> Result<Config, ConfigError> {
        let mut raw = Raw::defaults();
        raw.add_toml(text, "test.toml")?;
        Config::check(&raw, &HOST)
    }

    #[test]
    fn defaults_are_derived_from_the_host() {
        let config = check_text("").expect("defaults");
        assert_eq!(config.memory_budget_bytes, 2 << 30);
        assert_eq!(config.writers, 4);
        assert_eq!(config.front_threads, 4);
        assert_eq!(config.touch_memory_bytes, (2 << 30) + (512 << 20));
        assert_eq!(config.stream_window_bytes, 1 << 20);
    }

    #[test]
    fn windows_of_all_streams_are_no_more_than_the_budget_unless_it_is_less_than_their_least() {
        let check = |text: &str, window_bytes: u32| {
            assert_eq!(check_text(text).expect("right").stream_window_bytes, window_bytes, "{text}");
        };
        check("memory_budget = \"512MiB\"", 512 << 10);
        check("memory_budget = \"512MiB\"\nstreams_max = 64", 1 << 20);
        check("memory_budget = \"128MiB\"", 256 << 10);
        check("memory_budget = \"32MiB\"", 256 << 10);
        check("memory_budget = \"8GiB\"\nstreams_max = 100000", 256 << 10);
        check("memory_budget = \"32MiB\"\nstreams_max = 1", 1 << 20);
    }

    #[track_caller]
    fn check_refused(text: &str, parts: &[&str]) {
        let error = check_text(text).expect_err("must be refused").to_string();
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_known_one() {
        check_refused("chunk_byte = \"1MiB\"", &["chunk_byte", "test.toml", "chunk_bytes"]);
    }

    #[test]
    fn a_bad_size_is_refused_with_a_good_example() {
        check_refused("stream_window = \"2GiB\"", &["stream_window", "2GiB"]);
        check_refused("chunk_bytes = \"64x\"", &["chunk_bytes", "64x", "64MiB"]);
    }

    #[test]
    fn a_segment_smaller_than_a_chunk_is_refused() {
        check_refused("segment_bytes = \"1MiB\"", &["segment_bytes", "chunk_bytes"]);
    }

    #[test]
    fn the_shipped_file_equals_the_defaults() {
        let mut raw = Raw::defaults();
        raw.add_toml(include_str!("../../systemd/flightbox.toml"), "flightbox.toml").expect("parses");
        let mut shipped = Config::check(&raw, &HOST).expect("checks");
        // The unit runs on the machine's own state directory; everything else is the default.
        shipped.data_dir = PathBuf::from("flightbox-data");
        assert_eq!(shipped, check_text("").expect("defaults"));
    }

    #[test]
    fn the_shipped_file_has_every_key() {
        let table: toml::Table = include_str!("../../systemd/flightbox.toml").parse().expect("parses");
        let keys: Vec<&str> = raw::KEYS.iter().map(|(key, _)| *key).collect();
        let mut shipped: Vec<&str> = table.keys().map(String::as_str).collect();
        let mut expected = keys.clone();
        shipped.sort_unstable();
        expected.sort_unstable();
        assert_eq!(shipped, expected);
    }
}
