//! Arrow Flight: the only room that names tonic or arrow-flight (INV-11).
//!
//! [`server`] listens, [`http2`] has the connections, [`window`] says what senders may send, [`upload`] frames and
//! admits, [`assemble`] puts messages together, [`hollow`] says what of them can be left out, [`service`] has
//! the RPCs a line each; [`put`], [`get`], [`list`] and [`actions`] do them; [`dialect`] knows which client
//! speaks; [`status`] turns errors into codes. Never sees a ring.

pub(crate) mod actions;
pub(crate) mod assemble;
pub(crate) mod client;
pub(crate) mod columns;
pub(crate) mod decode;
pub(crate) mod dialect;
pub(crate) mod get;
pub(crate) mod hollow;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod http2;
#[cfg(test)]
mod instructions;
pub(crate) mod list;
pub(crate) mod put;
mod questions;
pub(crate) mod server;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod upload;
mod window;
mod wire;
