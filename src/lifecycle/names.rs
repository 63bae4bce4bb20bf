//! Names from outside: locators, ontology tags, keys. Pure.
//!
//! Guarantees: what passes can become a file name under `browse/` and a key of the catalog. Knows no
//! catalog and no gRPC.

use crate::lifecycle::LifecycleError;
use crate::limits;
use uuid::Uuid;

type Result<T> = std::result::Result<T, LifecycleError>;

/// A locator taken apart: sequence, and topic path if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) sequence: String,
    pub(crate) topic: Option<String>,
}

impl Locator {
    /// Checks a name from outside. One leading slash is tolerated (clients send it in places), the
    /// sequence is the text before the first slash. Parts become file names under `browse/`.
    pub(crate) fn parse(key: &'static str, text: &str) -> Result<Self> {
        let invalid = |why: &str| LifecycleError::Invalid { key, value: shorten(text), why: why.to_owned() };
        let trimmed = text.trim();
        let name = trimmed.strip_prefix('/').unwrap_or(trimmed);
        if name.is_empty() {
            return Err(invalid("is empty; give `sequence` or `sequence/topic`"));
        }
        if name.len() > limits::LOCATOR_BYTES_MAX {
            return Err(invalid(&format!("is longer than {} bytes", limits::LOCATOR_BYTES_MAX)));
        }
        for part in name.split('/') {
            if part.is_empty() {
                return Err(invalid("has an empty part; remove the doubled or trailing `/`"));
            }
            if part == "." || part == ".." {
                return Err(invalid("has a part `.` or `..`, which is no name"));
            }
            if part.len() > limits::NAME_PART_BYTES_MAX {
                return Err(invalid(&format!("has a part longer than {} bytes", limits::NAME_PART_BYTES_MAX)));
            }
            if part.ends_with(".parquet") {
                return Err(invalid("has a part that ends in `.parquet`: such names belong to files in `browse/`"));
            }
            if part.chars().any(|c| c.is_control() || c == ':' || c == '\\') {
                return Err(invalid("has a control character, `:` or `\\`; use letters, digits, `_`, `-`, `.`"));
            }
        }
        let (sequence, topic) = match name.split_once('/') {
            Some((sequence, topic)) => (sequence, Some(topic.to_owned())),
            None => (name, None),
        };
        Ok(Self { sequence: sequence.to_owned(), topic })
    }

    /// A locator that must name a sequence.
    pub(crate) fn sequence(key: &'static str, text: &str) -> Result<String> {
        let locator = Self::parse(key, text)?;
        match locator.topic {
            None => Ok(locator.sequence),
            Some(_) => {
                Err(LifecycleError::Invalid { key, value: shorten(text), why: "a sequence name has no `/`".to_owned() })
            }
        }
    }

    /// A locator that must name a topic, in its full form `sequence/topic`.
    pub(crate) fn topic(key: &'static str, text: &str) -> Result<String> {
        let locator = Self::parse(key, text)?;
        match locator.topic {
            Some(topic) => Ok(format!("{}/{topic}", locator.sequence)),
            None => Err(LifecycleError::Invalid {
                key,
                value: shorten(text),
                why: "is no topic; give `sequence/topic`".to_owned(),
            }),
        }
    }
}

pub(crate) fn shorten(text: &str) -> String {
    let cut = text.floor_char_boundary(text.len().min(120));
    if cut == text.len() { text.to_owned() } else { format!("{}…", text.get(..cut).unwrap_or("")) }
}

/// Checks an ontology tag from outside: queries split their keys at the first dot.
pub(crate) fn check_tag(key: &'static str, tag: &str) -> Result<()> {
    let most = limits::NAME_PART_BYTES_MAX;
    if tag.is_empty() || tag.contains('.') || tag.chars().any(char::is_control) || tag.len() > most {
        let why = format!("must be a text of 1 to {most} bytes without dots: queries split at the first dot");
        return Err(LifecycleError::Invalid { key, value: shorten(tag), why });
    }
    Ok(())
}

/// Reads a UUID from outside.
pub(crate) fn parse_uuid(key: &'static str, text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| LifecycleError::Invalid {
        key,
        value: shorten(text),
        why: "is not a UUID; use the one that the create action returned".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<(&str, Option<&str>)>) {
        let parsed = Locator::parse("locator", text).ok();
        let expected = expected
            .map(|(sequence, topic)| Locator { sequence: sequence.to_owned(), topic: topic.map(str::to_owned) });
        assert_eq!(parsed, expected, "{text:?}");
    }

    #[test]
    fn locators_split_at_the_first_slash() {
        check("seq", Some(("seq", None)));
        check("/seq", Some(("seq", None)));
        check("seq/a/b", Some(("seq", Some("a/b"))));
    }

    #[test]
    fn unsafe_names_are_refused() {
        for text in
            ["a/000000.parquet", "", "/", "//x", "a//b", "a/", "..", "a/../b", "a/.", "a\0b", "a/\n", "a:b", "a\\b"]
        {
            check(text, None);
        }
        check(&"x".repeat(256), None);
        check(&"x".repeat(255), Some((&"x".repeat(255), None)));
    }
}
