//! The one integration binary: the real program, driven over its sockets, and the real clients.
#![expect(clippy::expect_used, reason = "a test that cannot go on says why and ends")]

mod abort_race;
mod bad_input;
mod budget;
mod cli;
mod clients;
mod damage;
mod harness;
mod kill;
mod program;
mod query;
mod resume;
mod space;
mod tidy;
mod v0;
mod volumes;
