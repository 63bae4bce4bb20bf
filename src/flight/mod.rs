//! Arrow Flight: the only room that names tonic or arrow-flight (INV-11).
//!
//! [`server`] listens, [`http2`] has the connections, [`places`] says how many, [`window`] what senders may send;
//! [`request`] and [`upload`] frame and admit, [`assemble`] puts messages together, [`hollow`] says what of them can be
//! left out, [`decode`] makes batches of them, by [`columns`] and [`absent`] where it can, [`service`] has the RPCs a line each; [`put`], [`get`], [`list`] and [`actions`] do them; [`dialect`] knows which client
//! speaks; [`status`] turns errors into codes. Never sees a ring.

mod absent;
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
mod places;
pub(crate) mod put;
mod questions;
mod request;
pub(crate) mod server;
pub(crate) mod service;
mod splice;
pub(crate) mod status;
pub(crate) mod upload;
mod window;
mod wire;
