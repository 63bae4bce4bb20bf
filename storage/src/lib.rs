//! Bytes that survive: segments, chunks, the catalog and what becomes of them after a crash.
//!
//! Knows Arrow schemas and `RecordBatch`es. Knows no socket, no gRPC, no client (INV-11).
//! The way down, in the order a chunk takes it: [`schema`] (what can be stored) →
//! [`chunk`] (encode, statistics, checksums) → [`segment`] (offsets, trailers, footers) →
//! [`disk`] (aligned writes) → [`catalog`] (the synced commit). The way back up is [`read`].

pub mod catalog;
pub mod checksum;
pub mod chunk;
pub mod depth;
pub mod disk;
pub mod error;
pub mod export;
pub mod files;
pub mod found;
pub mod ids;
pub mod limits;
pub mod manifest;
pub mod ontology;
pub mod posix;
pub mod read;
pub mod rebuild;
pub mod reclaim;
pub mod recover;
pub mod schema;
pub mod segment;
pub mod sim;
pub mod tail;
pub mod turn;
pub mod uring;
pub mod verify;
pub mod volumes;
pub mod write;

pub use error::StorageError;
pub use uring::past_cache;
