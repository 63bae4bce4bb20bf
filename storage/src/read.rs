//! From a topic's chunks and tail back to rows in time order.
//!
//! Guarantees: rows come out by `timestamp_ns`, ties in arrival order, restricted to a half-open
//! window; only chunks whose time range meets the window are read, and each column is checked
//! against its checksum first. Memory: a stream that nobody reads keeps a position, not data; the
//! decoded chunks live in one bounded cache ([`Loader`]) and are read again when they were evicted.
//! File reads run on a ring of their own ([`serve`]): a reader never delays a writer.

mod jobs;
mod loader;
mod rows;
mod view;

pub(crate) use jobs::read_range;
pub use jobs::{ReadJob, serve};
pub use loader::Loader;
pub use rows::{RowStream, count};
pub use view::{Place, TopicView, Window};
