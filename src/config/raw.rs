//! Settings as written: a text per key, and where it came from.

use super::ConfigError;
use std::collections::BTreeMap;
use std::path::Path;

/// Every key with its default, in the order of the shipped file.
pub(crate) const KEYS: [(&str, &str); 31] = [
    ("data_dir", "flightbox-data"),
    ("data_dirs", ""),
    ("listen", "127.0.0.1:6726"),
    ("unix_socket", ""),
    ("engine", "auto"),
    ("writers", "auto"),
    ("front_threads", "auto"),
    ("memory_budget", "auto"),
    ("touch_memory", "auto"),
    ("read_cache", "128MiB"),
    ("message_bytes_max", "50MiB"),
    ("batch_memory_max", "256MiB"),
    ("connections_max", "auto"),
    ("streams_max", "1024"),
    ("stream_window", "auto"),
    ("upload_stall", "30s"),
    ("chunk_bytes", "16MiB"),
    ("commit_interval", "50ms"),
    ("tail_max_age", "60s"),
    ("segment_bytes", "256MiB"),
    ("prealloc_bytes", "auto"),
    ("reserve_bytes", "auto"),
    ("idle_topic", "1h"),
    ("compression", "none"),
    ("ontology", "open"),
    ("on_restart", "keep"),
    ("on_damage", "skip"),
    ("scrub_rate", "16MiB"),
    ("legacy_session_reply", "false"),
    ("log_format", "human"),
    ("log_level", "info"),
];

/// One setting as written.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) key: &'static str,
    pub(crate) text: String,
    pub(crate) origin: String,
}

/// All settings as written.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    settings: BTreeMap<&'static str, Setting>,
}

impl Raw {
    /// Nothing written: the defaults.
    pub(crate) fn defaults() -> Self {
        let settings = KEYS
            .iter()
            .map(|(key, text)| (*key, Setting { key, text: (*text).to_owned(), origin: "default".to_owned() }))
            .collect();
        Self { settings }
    }

    /// The setting of a key of [`KEYS`].
    pub(crate) fn get(&self, key: &str) -> &Setting {
        match self.settings.get(key) {
            Some(setting) => setting,
            None => unreachable!("{key} is not in KEYS"),
        }
    }

    /// Sets one key.
    pub(crate) fn set(&mut self, key: &str, text: String, origin: &str) -> Result<(), ConfigError> {
        match KEYS.iter().find(|(known, _)| *known == key) {
            Some((key, _)) => {
                self.settings.insert(key, Setting { key, text, origin: origin.to_owned() });
                Ok(())
            }
            None => Err(ConfigError {
                key: key.to_owned(),
                value: text,
                origin: origin.to_owned(),
                why: format!("there is no such key; did you mean `{}`?", nearest(key)),
            }),
        }
    }

    /// Adds a TOML file's text.
    pub(crate) fn add_toml(&mut self, text: &str, origin: &str) -> Result<(), ConfigError> {
        let broken = |value: String, why: String| ConfigError {
            key: "(file)".to_owned(),
            value,
            origin: origin.to_owned(),
            why,
        };
        let table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| broken(String::new(), error.to_string()))?;
        for (key, value) in table {
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                toml::Value::Array(list) if list.iter().all(toml::Value::is_str) => {
                    list.iter().filter_map(toml::Value::as_str).collect::<Vec<_>>().join(":")
                }
                other => {
                    let why = format!(
                        "`{key}` must be a text, a list of texts, a whole number or a flag; there are no sections"
                    );
                    return Err(broken(other.to_string(), why));
                }
            };
            self.set(&key, text, origin)?;
        }
        Ok(())
    }

    /// Adds a file.
    pub(crate) fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            key: "--config".to_owned(),
            value: path.display().to_string(),
            origin: "command line".to_owned(),
            why: format!("cannot be read: {error}"),
        })?;
        self.add_toml(&text, &path.display().to_string())
    }

    /// Adds the environment: `FLIGHTBOX_<KEY>`.
    pub(crate) fn add_env(&mut self, variables: impl Iterator<Item = (String, String)>) -> Result<(), ConfigError> {
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix("FLIGHTBOX_") {
                self.set(&key.to_lowercase(), value, &format!("environment {name}"))?;
            }
        }
        Ok(())
    }
}

/// The known key with the most letters in common at the start, then the shortest.
fn nearest(key: &str) -> &'static str {
    let common = |known: &str| known.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
    KEYS.iter()
        .map(|(known, _)| *known)
        .max_by_key(|known| (common(known), usize::MAX - known.len()))
        .unwrap_or("data_dir")
}
