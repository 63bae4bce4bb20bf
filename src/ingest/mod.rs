//! The ingest line from the permit to the durable acknowledgement (design.md section 4).
//!
//! [`admit`] → [`lane`] → [`gather`] (decides) and [`writer`] (does) → [`committer`] → watermark.
//! Knows no gRPC.

pub(crate) mod admit;
pub(crate) mod committer;
pub(crate) mod gather;
mod join;
pub(crate) mod lane;
pub(crate) mod steward;
pub(crate) mod topic;
pub(crate) mod writer;
