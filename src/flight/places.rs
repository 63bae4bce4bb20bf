//! Which connections and calls begin: as many as memory is stated for.
//!
//! Guarantees (INV-7): streams whose requests may still come have no more windows together than `limits::memory_sum`
//! counts, however many connections they come by. Uploads never take the last places, so who fills the box with them can
//! still end his recording; DoGet streams that clients leave half-read take none of them, and have a bound of their own.
//! What finds no place is told so. Not counted is what HTTP/2 has read of streams that it has not handed over yet: it
//! reads on while the socket has more, up to the 128 reads that tokio lets a task have in one go.

use crate::flight::upload::DO_PUT_PATH;
use crate::limits;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// The calls whose answers are as long as recordings.
const DO_GET_PATH: &str = "/arrow.flight.protocol.FlightService/DoGet";

/// All places; clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Places {
    connections: Limit,
    requests: Limit,
    uploads: Limit,
    reads: Limit,
}

/// A connection's place.
#[derive(Debug)]
pub(super) struct ConnectionPlace {
    _place: OwnedSemaphorePermit,
}

/// The place of a request that may still come; an upload has two.
#[derive(Debug)]
pub(super) struct RequestPlace {
    _request: OwnedSemaphorePermit,
    _upload: Option<OwnedSemaphorePermit>,
}

/// The place of an answer that may be left half-read.
#[derive(Debug)]
pub(super) struct AnswerPlace {
    _read: Option<OwnedSemaphorePermit>,
}

impl Places {
    /// So many connections, uploads and DoGet streams, and some requests beside the uploads.
    pub(super) fn new(connections_max: u32, streams_max: u32) -> Self {
        Self {
            connections: Limit::new("connections", connections_max, "connections_max"),
            requests: Limit::new("uploads and requests", limits::requests_max(streams_max), "streams_max"),
            uploads: Limit::new("uploads", streams_max, "streams_max"),
            reads: Limit::new("DoGet streams", streams_max, "streams_max"),
        }
    }

    /// The most calls at once, of whatever kind: nobody is to wait in his HTTP/2 library for what has a place here.
    pub(super) fn calls_max(&self) -> u32 {
        self.requests.most.saturating_add(self.reads.most)
    }

    /// A place for a connection.
    pub(super) fn connect(&self) -> Result<ConnectionPlace, Status> {
        Ok(ConnectionPlace { _place: self.connections.take()? })
    }

    /// Places for a call of this path.
    pub(super) fn begin(&self, path: &str) -> Result<(RequestPlace, AnswerPlace), Status> {
        let take_if = |is_so: bool, limit: &Limit| is_so.then(|| limit.take()).transpose();
        let upload = take_if(path == DO_PUT_PATH, &self.uploads)?;
        let read = take_if(path == DO_GET_PATH, &self.reads)?;
        let request = self.requests.take()?;
        Ok((RequestPlace { _request: request, _upload: upload }, AnswerPlace { _read: read }))
    }
}

/// Places of one kind.
#[derive(Debug, Clone)]
struct Limit {
    what: &'static str,
    most: u32,
    setting: &'static str,
    free: Arc<Semaphore>,
}

impl Limit {
    fn new(what: &'static str, most: u32, setting: &'static str) -> Self {
        let places = usize::try_from(most).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { what, most, setting, free: Arc::new(Semaphore::new(places)) }
    }

    fn take(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.free).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{} {} are open, as many as may be (setting {}); try again when some have ended",
                self.most, self.what, self.setting
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DO_ACTION_PATH: &str = "/arrow.flight.protocol.FlightService/DoAction";

    #[track_caller]
    fn check_refused<T: std::fmt::Debug>(result: Result<T, Status>, names: &[&str]) {
        let status = result.expect_err("no place");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        for name in names {
            assert!(status.message().contains(name), "{:?} does not name {name:?}", status.message());
        }
    }

    #[test]
    fn uploads_leave_places_to_other_requests_and_what_ends_makes_room() {
        let places = Places::new(1, 64);
        let begin = |path: &str| places.begin(path);
        let mut uploads: Vec<_> = (0..64).map(|_| begin(DO_PUT_PATH).expect("a place")).collect();
        check_refused(begin(DO_PUT_PATH), &["64 uploads", "streams_max"]);
        let mut requests: Vec<_> =
            (64..places.requests.most).map(|_| begin(DO_ACTION_PATH).expect("a place")).collect();
        assert!(!requests.is_empty());
        check_refused(begin(DO_ACTION_PATH), &["uploads and requests", "streams_max"]);
        check_refused(begin(DO_GET_PATH), &["uploads and requests"]);
        requests.pop();
        check_refused(begin(DO_PUT_PATH), &["64 uploads"]);
        uploads.pop();
        uploads.push(begin(DO_PUT_PATH).expect("the place of the one that ended"));
        begin(DO_GET_PATH).expect("the place of the request that came");
    }

    #[test]
    fn half_read_streams_take_no_places_of_uploads_and_have_a_bound_of_their_own() {
        let places = Places::new(1, 2);
        let half_read = |_| {
            let (request, answer) = places.begin(DO_GET_PATH).expect("a place");
            drop(request); // It has come.
            answer
        };
        let mut answers: Vec<_> = (0..2).map(half_read).collect();
        check_refused(places.begin(DO_GET_PATH), &["2 DoGet streams", "streams_max"]);
        let _uploads = [DO_PUT_PATH; 2].map(|path| places.begin(path).expect("a place"));
        places.begin(DO_ACTION_PATH).expect("a place");
        answers.pop();
        places.begin(DO_GET_PATH).expect("the place of the one that ended");
    }

    #[test]
    fn connections_have_a_bound() {
        let places = Places::new(2, 1);
        let mut open = [(); 2].map(|()| places.connect().expect("a place")).into_iter();
        check_refused(places.connect(), &["2 connections", "connections_max"]);
        drop(open.next());
        places.connect().expect("the place of the one that ended");
    }
}
