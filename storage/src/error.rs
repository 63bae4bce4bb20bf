//! What can go wrong below the wire. Variants carry facts; the text is for an operator.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Any failure of the storage crate.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// A file operation failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// The catalog refused an operation; nothing is acknowledged after it.
    #[error("catalog {op}: {text}")]
    Catalog {
        /// What was tried.
        op: &'static str,
        /// What RocksDB said.
        text: String,
    },
    /// A stored value does not decode.
    #[error("{what} does not decode: {text}")]
    Decode {
        /// Which kind of value.
        what: &'static str,
        /// Why.
        text: String,
    },
    /// Bytes on disk are not the bytes that were written.
    #[error("checksum of {what} at byte {at} of {}: stored {stored:#010x}, computed {computed:#010x}", path.display())]
    Checksum {
        /// Which part of the file.
        what: String,
        /// The file.
        path: PathBuf,
        /// Where it starts.
        at: u64,
        /// The checksum in the catalog.
        stored: u32,
        /// The checksum of what was read.
        computed: u32,
    },
    /// A column type that Parquet cannot give back as it came.
    #[error("field `{field}` has type {data_type}, which cannot be stored: {why}; send it as another type")]
    Unstorable {
        /// Dotted path of the field.
        field: String,
        /// Its Arrow type.
        data_type: String,
        /// The reason.
        why: String,
    },
    /// The encoder or decoder of Parquet or Arrow refused.
    #[error("{op}: {text}")]
    Format {
        /// What was tried.
        op: &'static str,
        /// What the library said.
        text: String,
    },
    /// The topic was aborted, deleted or ended while this was under way.
    #[error("the topic is no longer open for writing: it was finalized, aborted or deleted meanwhile")]
    Gone,
    /// A topic's files lie on a volume that is not there.
    #[error("{what} lies on {}, which is not there: mount it and start again", root.display())]
    Away {
        /// The topic, or what of it.
        what: String,
        /// The volume.
        root: PathBuf,
    },
    /// The data directory belongs to something else.
    #[error("{0}")]
    Directory(String),
}

impl StorageError {
    /// Wraps an I/O error with the operation and the file.
    pub fn io(op: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { op, path: path.into(), source: Arc::new(source) }
    }

    /// The file that it is about, if it is about one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Io { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Whether the catalog says that its own bytes are damaged.
    pub fn is_corruption(&self) -> bool {
        matches!(self, Self::Catalog { text, .. } if text.starts_with("Corruption"))
    }

    /// Whether bytes on disk are not those that were written.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Checksum { .. } | Self::Decode { .. } | Self::Format { .. })
    }

    /// Whether the cause is a full disk.
    pub fn is_full_disk(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            Self::Catalog { text, .. } => text.contains("No space left"),
            _ => false,
        }
    }
}

impl From<arrow::error::ArrowError> for StorageError {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::Format { op: "arrow", text: error.to_string() }
    }
}

impl From<parquet::errors::ParquetError> for StorageError {
    fn from(error: parquet::errors::ParquetError) -> Self {
        Self::Format { op: "parquet", text: error.to_string() }
    }
}

/// The result of everything in this crate.
pub type Result<T, E = StorageError> = std::result::Result<T, E>;
