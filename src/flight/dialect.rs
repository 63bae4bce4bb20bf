//! Which client speaks: a per-connection guess from what it sent before (protocol.md 8.3).
//!
//! One connection is one client (pyarrow never shares them). Behind a proxy that multiplexes, the
//! guess is lost and the supersets have to do.

use serde_json::{Map, Value};
use std::sync::{Arc, Mutex, PoisonError};

/// A generation of clients, as far as answers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Nothing telling was sent yet.
    Unknown,
    /// The sequence protocol.
    V0,
    /// Session protocol 0.3 to 0.5.
    S3To5,
    /// Session protocol 0.6.
    S6,
    /// Session protocol 0.7.
    S7,
}

/// What a call tells about its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hint {
    /// The action `info`.
    Info,
    /// The action `version`.
    Version,
    /// Something only v0 sends.
    V0,
    /// Something only the session protocol sends.
    Session,
    /// `session_delete` by `session_uuid`: only 0.3 and 0.4.
    SessionDeleteByUuid,
    /// Anything else.
    Nothing,
}

#[derive(Debug)]
struct History {
    dialect: Dialect,
    first: bool,
    old_session_reply: bool,
    /// The sequence deleted last: 0.3 deletes twice.
    deleted: Option<String>,
}

/// One connection's history; cloned into each of its requests.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    history: Arc<Mutex<History>>,
}

impl Default for Connection {
    fn default() -> Self {
        let history = History { dialect: Dialect::Unknown, first: true, old_session_reply: false, deleted: None };
        Self { history: Arc::new(Mutex::new(history)) }
    }
}

impl Connection {
    /// Notes a call and returns the dialect with it taken into account.
    pub(crate) fn note(&self, hint: Hint) -> Dialect {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let first = std::mem::replace(&mut history.first, false);
        history.dialect = next(history.dialect, first, hint);
        history.old_session_reply |= hint == Hint::SessionDeleteByUuid;
        history.dialect
    }

    /// The dialect of a query: by what the connection showed, or by the query's own keys
    /// (protocol.md 8.2, conflicts 2 and 3).
    pub(crate) fn note_query(&self, body: &Map<String, Value>) -> Dialect {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.dialect == Dialect::Unknown {
            history.dialect = of_query(body);
        }
        history.dialect
    }

    /// Whether `session_create` must answer as 0.3 and 0.4 expect it.
    pub(crate) fn old_session_reply(&self, setting: bool) -> bool {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        match history.dialect {
            Dialect::S6 | Dialect::S7 => false,
            Dialect::Unknown | Dialect::V0 | Dialect::S3To5 => setting || history.old_session_reply,
        }
    }

    /// Notes the deletion of a sequence.
    pub(crate) fn note_deleted(&self, sequence: &str) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).deleted = Some(sequence.to_owned());
    }

    /// Whether this connection deleted that sequence just before.
    pub(crate) fn just_deleted(&self, sequence: &str) -> bool {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).deleted.take().as_deref() == Some(sequence)
    }
}

/// The rule of protocol.md 8.3, pure. `version` marks 0.6 only as the very first call: users of
/// older clients call it later by themselves.
fn next(dialect: Dialect, first: bool, hint: Hint) -> Dialect {
    match (dialect, hint) {
        (Dialect::S6 | Dialect::S7, _) => dialect,
        (_, Hint::Info) => Dialect::S7,
        (_, Hint::Version) if first => Dialect::S6,
        (_, Hint::V0) => Dialect::V0,
        (Dialect::Unknown, Hint::Session | Hint::SessionDeleteByUuid) => Dialect::S3To5,
        (Dialect::V0 | Dialect::S3To5 | Dialect::Unknown, _) => dialect,
    }
}

/// What the keys of a query tell of its client; pure. `name` may be v0's or 0.6's, but those of 0.6
/// have shown themselves by their first call.
fn of_query(body: &Map<String, Value>) -> Dialect {
    let has = |part: &str, key: &str| body.get(part).is_some_and(|part| part.get(key).is_some());
    let either = |key: &str| has("sequence", key) || has("topic", key);
    // Extensions of ours come with the newest meanings.
    if ["explain", "intervals", "limit", "join_dt_ns"].iter().any(|key| body.contains_key(*key)) {
        Dialect::S7
    } else if either("locator") || either("created_at_ns") || has("ontology", "include_timestamp_range") {
        Dialect::S3To5
    } else if either("name") || either("created_timestamp") {
        Dialect::V0
    } else {
        Dialect::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(hints: &[Hint], expected: Dialect) {
        let connection = Connection::default();
        let mut last = Dialect::Unknown;
        for hint in hints {
            last = connection.note(*hint);
        }
        assert_eq!(last, expected);
    }

    #[test]
    fn the_opening_call_tells_the_new_generations() {
        check(&[Hint::Info, Hint::Session], Dialect::S7);
        check(&[Hint::Version, Hint::Session], Dialect::S6);
    }

    #[test]
    fn a_later_version_call_is_no_mark() {
        check(&[Hint::Nothing, Hint::Session, Hint::Version], Dialect::S3To5);
    }

    #[test]
    fn path_descriptors_and_name_keys_are_v0() {
        check(&[Hint::Nothing, Hint::V0, Hint::Nothing], Dialect::V0);
    }

    #[test]
    fn the_old_session_reply_is_remembered_but_never_given_to_new_clients() {
        let old = Connection::default();
        old.note(Hint::SessionDeleteByUuid);
        assert!(old.old_session_reply(false));
        let new = Connection::default();
        new.note(Hint::Info);
        assert!(!new.old_session_reply(true));
    }
}
