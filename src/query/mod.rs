//! Questions: which sequences and topics hold rows like these, and when.
//!
//! [`parse`] (JSON to a checked [`Query`]) → [`plan`] (what the skip index proves or rules out of each
//! chunk; pure) → [`rows`] (reads what is still open) with [`refine`] (which rows match) → [`engine`] (runs all of it)
//! → [`answer`].
//! [`test`], [`ranges`] and [`pattern`] say what a comparison means; [`names`] compares names and
//! metadata; [`times`] makes intervals and clusters of matching rows.
//!
//! Row semantics: a topic matches if one of its rows satisfies everything asked of its tag. A row
//! matches `$not e` exactly if it does not match `e`, so a null matches `$not` of any comparison.
//! Knows no gRPC.

pub(crate) mod answer;
pub(crate) mod engine;
pub(crate) mod names;
pub(crate) mod parse;
pub(crate) mod pattern;
pub(crate) mod plan;
mod ranges;
pub(crate) mod refine;
mod rows;
pub(crate) mod test;
pub(crate) mod times;

#[cfg(test)]
mod oracle;

use storage::StorageError;
use test::Test;

type Result<T> = std::result::Result<T, QueryError>;

/// Why a question has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum QueryError {
    /// Something in the question is wrong: where, and what would be right.
    #[error("query: `{key}` {why}")]
    Invalid { key: String, why: String },
    /// The answer would be larger than a bound.
    #[error("query: {what} exceed the limit of {most}; {remedy}")]
    TooMuch { what: &'static str, most: usize, remedy: &'static str },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A comparison of one field.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Predicate {
    /// The key as it was written, for messages.
    pub(crate) key: String,
    /// The path behind the tag.
    pub(crate) path: Path,
    pub(crate) test: Test,
}

/// A path through the fields of an ontology, with at most one choice of list elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path {
    /// Dotted, up to the list if there is one.
    pub(crate) head: String,
    /// Which elements, and the path inside of them.
    pub(crate) elements: Option<(Choice, Option<String>)>,
}

/// Which elements of a list must satisfy a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// `[?]`; false of an empty list.
    Any,
    /// `[!]`; false of an empty list.
    All,
    /// `[n]`; false where there is none.
    At(usize),
}

/// What is asked of the rows of one tag.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expr {
    Test(Predicate),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Not(Box<Expr>),
}

/// What is asked of content: everything here must hold of a sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Content {
    /// By tag: a row expression.
    pub(crate) tags: Vec<(String, Expr)>,
    /// Groups of alternatives over several tags: one of each group must hold.
    pub(crate) groups: Vec<Vec<Content>>,
}

impl Content {
    /// Whether nothing is asked.
    pub(crate) fn is_empty(&self) -> bool {
        self.tags.is_empty() && self.groups.is_empty()
    }
}

/// What is asked of a sequence or topic itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Filter {
    pub(crate) name: Vec<Test>,
    pub(crate) created_ns: Vec<Test>,
    pub(crate) metadata: Vec<(names::MetadataPath, Test)>,
    /// Topics only.
    pub(crate) ontology_tag: Vec<Test>,
    /// Topics only.
    pub(crate) format: Vec<Test>,
}

/// A checked question.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Query {
    pub(crate) sequence: Option<Filter>,
    pub(crate) topic: Option<Filter>,
    pub(crate) content: Content,
    /// First and last time of the matching rows of each topic.
    pub(crate) time_range: bool,
    /// All intervals of matching rows of each topic, and where those of different tags coincide.
    pub(crate) intervals: bool,
    /// How far apart intervals of different tags may be and still coincide, in nanoseconds.
    pub(crate) join_dt_ns: u64,
    /// Most sequences in the answer.
    pub(crate) limit: Option<usize>,
    /// Say what the answer cost.
    pub(crate) explain: bool,
}
