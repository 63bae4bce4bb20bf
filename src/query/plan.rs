//! What the skip index says of each chunk: *none* of its rows match, *all* do, or *some* may. Pure.
//!
//! An expression is bound to one version of its ontology: paths become index columns and Parquet
//! leaves, comparisons get the types of the columns. Guarantees (INV-6): *none* and *all* are proofs;
//! what cannot be proven is *some*. A field that a version does not have is null in each of its rows.

use crate::query::test::{Test, Typed};
use crate::query::{Choice, Expr, Path, Predicate, QueryError};
use arrow::datatypes::DataType;
use storage::chunk::stats::{Bounds, FieldStats};
use storage::ontology::{Derived, Ontology, box_column, values_column};
use storage::schema::{field_at, parquet_leaves};

/// What is known of the rows of a chunk. In this order *and* is the smaller, *or* the larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// No row matches.
    None,
    /// Not known without reading.
    Some,
    /// Every row matches.
    All,
}

impl Verdict {
    /// The same for rows that do not match.
    pub(crate) fn reversed(self) -> Self {
        match self {
            Self::None => Self::All,
            Self::Some => Self::Some,
            Self::All => Self::None,
        }
    }

    fn proven(proof: bool, disproof: bool) -> Self {
        if disproof {
            Self::None
        } else if proof {
            Self::All
        } else {
            Self::Some
        }
    }
}

/// An expression over the columns of one ontology version.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Bound {
    /// The same answer for every row.
    Always(bool),
    Leaf(Leaf),
    And(Vec<Bound>),
    Or(Vec<Bound>),
    Not(Box<Bound>),
}

/// A comparison with where to find its values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Leaf {
    pub(crate) target: Target,
    pub(crate) typed: Typed,
    /// The index column that describes the values; `None`: the index says nothing.
    pub(crate) column: Option<String>,
    /// The index column with all distinct texts, where there is one.
    pub(crate) values: Option<String>,
}

/// What a comparison looks at in a row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Target {
    /// A field, reached through structs only.
    Field(String),
    /// Elements of a list, or a field inside of them.
    Elements { list: String, choice: Choice, inner: Option<String> },
    /// The norm of three fields.
    Norm([String; 3]),
    /// A point on the globe.
    Position { latitude: String, longitude: String },
}

/// Shows the statistics of an index column, chunk by chunk.
pub(crate) type Visitor<'a, E> = &'a mut dyn FnMut(&str, &mut dyn FnMut(&FieldStats)) -> Result<(), E>;

/// Binds an expression to a version.
pub(crate) fn bind(expr: &Expr, ontology: &Ontology) -> Result<Bound, QueryError> {
    Ok(match expr {
        Expr::Test(predicate) => bind_predicate(predicate, ontology)?,
        Expr::And(all) => Bound::And(all.iter().map(|expr| bind(expr, ontology)).collect::<Result<_, _>>()?),
        Expr::Or(all) => Bound::Or(all.iter().map(|expr| bind(expr, ontology)).collect::<Result<_, _>>()?),
        Expr::Not(expr) => Bound::Not(Box::new(bind(expr, ontology)?)),
    })
}

fn bind_predicate(predicate: &Predicate, ontology: &Ontology) -> Result<Bound, QueryError> {
    let Some((target, data_type)) = resolve(&predicate.path, ontology) else {
        return Ok(Bound::Always(predicate.test == Test::NotExists));
    };
    let invalid = |why: String| QueryError::Invalid { key: predicate.key.clone(), why };
    if predicate.path.elements.is_some() && matches!(predicate.test, Test::ListEq(_) | Test::ListNeq(_)) {
        return Err(invalid("compares an element with a list; leave the choice of elements out".to_owned()));
    }
    if let Test::Within(wanted) = &predicate.test {
        let position = ontology.record.derived.iter().find_map(|derived| match derived {
            Derived::Box { path, latitude, longitude } if *path == predicate.path.head => {
                Some(Target::Position { latitude: latitude.clone(), longitude: longitude.clone() })
            }
            _ => None,
        });
        let target = position.ok_or_else(|| invalid("has no latitude and longitude to be within a box".to_owned()))?;
        let column = Some(box_column(&predicate.path.head));
        return Ok(Bound::Leaf(Leaf { target, typed: Typed::Within(*wanted), column, values: None }));
    }
    let typed = predicate.test.for_type(&data_type).map_err(invalid)?;
    let (column, values) = match &target {
        Target::Field(path) => {
            let values = values_column(path);
            (Some(path.clone()), ontology.column(&values).map(|_| values))
        }
        Target::Elements { list, inner, .. } => {
            (Some(inner.as_ref().map_or_else(|| format!("{list}[?]"), |inner| format!("{list}[?].{inner}"))), None)
        }
        Target::Norm(_) => (Some(predicate.path.head.clone()), None),
        Target::Position { .. } => (None, None),
    };
    // The presence of a list is not the presence of its elements: such columns are not in the index.
    let column = column.filter(|column| ontology.column(column).is_some());
    Ok(Bound::Leaf(Leaf { target, typed, column, values }))
}

/// What a path means in a version, and the type that is compared. `None`: the version has no such field.
pub(crate) fn resolve(path: &Path, ontology: &Ontology) -> Option<(Target, DataType)> {
    let field = field_at(&ontology.stored, &path.head);
    match (&path.elements, field) {
        (None, Some(data_type)) => Some((Target::Field(path.head.clone()), data_type.clone())),
        (None, None) => ontology.record.derived.iter().find_map(|derived| match derived {
            Derived::Norm { column, of } if *column == path.head => Some((Target::Norm(of.clone()), DataType::Float64)),
            // A box over top-level coordinates is asked of the empty path, which no key can name.
            _ => None,
        }),
        (Some((choice, inner)), Some(list)) => {
            let (DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _)) = list else {
                return None;
            };
            let data_type = match inner {
                None => item.data_type(),
                Some(inner) => storage::schema::field_in(item.data_type(), inner)?,
            };
            let target = Target::Elements { list: path.head.clone(), choice: *choice, inner: inner.clone() };
            Some((target, data_type.clone()))
        }
        (Some(_), None) => None,
    }
}

impl Bound {
    /// Every comparison in it.
    pub(crate) fn leaves(&self) -> Vec<&Leaf> {
        match self {
            Self::Always(_) => Vec::new(),
            Self::Leaf(leaf) => vec![leaf],
            Self::And(all) | Self::Or(all) => all.iter().flat_map(Self::leaves).collect(),
            Self::Not(inner) => inner.leaves(),
        }
    }

    /// Verdicts over all chunks of a topic at once; `of` gives those of a comparison. What an *and* has
    /// ruled out everywhere is not asked further.
    fn verdicts<E>(
        &self,
        chunks: usize,
        of: &mut dyn FnMut(&Leaf) -> Result<Vec<Verdict>, E>,
    ) -> Result<Vec<Verdict>, E> {
        match self {
            Self::Always(true) => Ok(vec![Verdict::All; chunks]),
            Self::Always(false) => Ok(vec![Verdict::None; chunks]),
            Self::Leaf(leaf) => of(leaf),
            Self::And(all) => {
                let mut so_far = vec![Verdict::All; chunks];
                for bound in all {
                    if !so_far.is_empty() && so_far.iter().all(|verdict| *verdict == Verdict::None) {
                        break;
                    }
                    for (mine, theirs) in so_far.iter_mut().zip(bound.verdicts(chunks, of)?) {
                        *mine = (*mine).min(theirs);
                    }
                }
                Ok(so_far)
            }
            Self::Or(all) => {
                let mut so_far = vec![Verdict::None; chunks];
                for bound in all {
                    for (mine, theirs) in so_far.iter_mut().zip(bound.verdicts(chunks, of)?) {
                        *mine = (*mine).max(theirs);
                    }
                }
                Ok(so_far)
            }
            Self::Not(inner) => Ok(inner.verdicts(chunks, of)?.into_iter().map(Verdict::reversed).collect()),
        }
    }

    /// What the index says of each of a topic's chunks. `visit` shows the statistics of an index column,
    /// chunk by chunk.
    pub(crate) fn chunk_verdicts<E>(&self, chunks: usize, visit: Visitor<'_, E>) -> Result<Vec<Verdict>, E> {
        let mut empty = vec![false; chunks];
        let mut of = |leaf: &Leaf| -> Result<Vec<Verdict>, E> {
            let Some(column) = &leaf.column else { return Ok(vec![Verdict::Some; chunks]) };
            let counts_rows = !matches!(leaf.target, Target::Elements { .. });
            let mut verdicts = Vec::with_capacity(chunks);
            visit(column, &mut |stats| {
                if let Some(empty) = empty.get_mut(verdicts.len()) {
                    *empty |= counts_rows && stats.values == 0;
                }
                verdicts.push(leaf.verdict(stats));
            })?;
            // What has no statistics is not ruled out.
            verdicts.resize(chunks, Verdict::Some);
            if let Some(values) = &leaf.values
                && verdicts.contains(&Verdict::Some)
            {
                let mut open = verdicts.iter_mut();
                visit(values, &mut |stats| {
                    if let Some(verdict) = open.next()
                        && *verdict == Verdict::Some
                    {
                        *verdict = leaf.verdict_of_values(stats);
                    }
                })?;
            }
            Ok(verdicts)
        };
        let mut verdicts = self.verdicts(chunks, &mut of)?;
        // A chunk without rows has no row that does not match either.
        for (verdict, empty) in verdicts.iter_mut().zip(empty) {
            if empty {
                *verdict = Verdict::None;
            }
        }
        Ok(verdicts)
    }

    /// The Parquet leaf columns that must be read to decide row by row, in order.
    pub(crate) fn columns_to_read(&self, ontology: &Ontology) -> Vec<usize> {
        let mut columns: Vec<usize> =
            self.leaves().into_iter().flat_map(|leaf| leaf.target.columns(&ontology.stored)).collect();
        columns.sort_unstable();
        columns.dedup();
        columns
    }
}

impl Target {
    fn columns(&self, stored: &arrow::datatypes::SchemaRef) -> Vec<usize> {
        match self {
            // Whether a struct or list is there can be told from any of its leaves: the first.
            Self::Field(path) => match field_at(stored, path) {
                Some(DataType::Struct(_)) => parquet_leaves(stored, path, None).into_iter().take(1).collect(),
                _ => parquet_leaves(stored, path, None),
            },
            Self::Elements { list, inner, .. } => parquet_leaves(stored, list, inner.as_deref()),
            Self::Norm(of) => of.iter().flat_map(|path| parquet_leaves(stored, path, None)).collect(),
            Self::Position { latitude, longitude } => {
                [latitude, longitude].into_iter().flat_map(|path| parquet_leaves(stored, path, None)).collect()
            }
        }
    }
}

impl Leaf {
    /// What the statistics of a chunk say.
    pub(crate) fn verdict(&self, stats: &FieldStats) -> Verdict {
        let verdict = of_stats(&self.typed, stats);
        match (&self.target, &self.typed) {
            // Whether an absent element is asked for, elements cannot tell.
            (Target::Elements { .. }, Typed::Present(false)) => Verdict::Some,
            // Without elements there may be no rows either, which nothing is true of.
            (Target::Elements { .. }, _) if stats.values == 0 => Verdict::Some,
            // A row without such elements does not match, so *all* is never proven.
            (Target::Elements { .. }, _) => verdict.min(Verdict::Some),
            _ => verdict,
        }
    }

    /// What all distinct texts of a chunk say.
    pub(crate) fn verdict_of_values(&self, stats: &FieldStats) -> Verdict {
        let Bounds::Values(values) = &stats.bounds else {
            return Verdict::Some;
        };
        let fits = |text: &String| match &self.typed {
            Typed::Text(ranges) => Some(ranges.holds(text)),
            Typed::Pattern(pattern) => Some(pattern.holds(text)),
            _ => None,
        };
        let answers: Option<Vec<bool>> = values.iter().map(fits).collect();
        match answers {
            Some(answers) => Verdict::proven(stats.nulls == 0 && !answers.contains(&false), !answers.contains(&true)),
            None => Verdict::Some,
        }
    }
}

fn of_stats(typed: &Typed, stats: &FieldStats) -> Verdict {
    let present = stats.values.saturating_sub(stats.nulls);
    let no_nulls = stats.nulls == 0;
    match typed {
        Typed::Present(wanted) => {
            let (proof, disproof) = (no_nulls, present == 0);
            if *wanted { Verdict::proven(proof, disproof) } else { Verdict::proven(disproof, proof) }
        }
        _ if present == 0 => Verdict::None,
        Typed::Int(ranges) => {
            let (low, high) = match &stats.bounds {
                Bounds::Int(low, high) => (i128::from(*low), i128::from(*high)),
                Bounds::Unsigned(low, high) => (i128::from(*low), i128::from(*high)),
                Bounds::Decimal(low, high, _) => (*low, *high),
                _ => return Verdict::Some,
            };
            Verdict::proven(no_nulls && ranges.covers(&low, &high), !ranges.meets(&low, &high))
        }
        Typed::Float(ranges) => {
            let numbers = present.saturating_sub(stats.nans);
            let (meets, covers) = match &stats.bounds {
                Bounds::Float(low, high) => (ranges.meets(low, high), ranges.covers(low, high)),
                _ if numbers == 0 => (false, true),
                _ => return Verdict::Some,
            };
            let nan_fits = stats.nans == 0 || ranges.nan;
            let nan_possible = stats.nans > 0 && ranges.nan;
            Verdict::proven(no_nulls && covers && nan_fits, !meets && !nan_possible)
        }
        Typed::Text(ranges) => match &stats.bounds {
            Bounds::Text { min, max, .. } => {
                Verdict::proven(no_nulls && ranges.covers(min, max), !ranges.meets(min, max))
            }
            _ => Verdict::Some,
        },
        Typed::Pattern(pattern) => match &stats.bounds {
            Bounds::Text { min, max, .. } => {
                let prefix = pattern.prefix();
                let starts = |bound: &str| bound.starts_with(&prefix);
                // Texts with a prefix lie together: all are smaller than `min`, or all larger than `max`?
                let below = prefix.as_str() < min.as_str() && !starts(min);
                let above = prefix.as_str() > max.as_str();
                Verdict::proven(false, below || above)
            }
            _ => Verdict::Some,
        },
        Typed::Bool { on_true, on_false } => match &stats.bounds {
            Bounds::Bool(low, high) => {
                let answers = match (low, high) {
                    (true, true) => vec![*on_true],
                    (false, false) => vec![*on_false],
                    _ => vec![*on_true, *on_false],
                };
                Verdict::proven(no_nulls && !answers.contains(&false), !answers.contains(&true))
            }
            _ => Verdict::Some,
        },
        Typed::List { .. } => Verdict::Some,
        Typed::Within(wanted) => match &stats.bounds {
            Bounds::Box(found) => Verdict::proven(no_nulls && wanted.covers(found), !wanted.meets(found)),
            _ => Verdict::Some,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query::pattern::{Meaning, Pattern};
    use crate::query::test::Literal;
    use storage::chunk::stats::GeoBox;

    #[track_caller]
    fn check(test: Test, data_type: &DataType, bounds: Bounds, (nulls, nans): (u64, u64), expected: Verdict) {
        let typed = match &test {
            Test::Within(wanted) => Typed::Within(*wanted),
            test => test.for_type(data_type).expect("fits"),
        };
        let leaf = Leaf { target: Target::Field("x".into()), typed, column: None, values: None };
        assert_eq!(leaf.verdict(&FieldStats { values: 10, nulls, nans, bounds }), expected);
    }

    #[test]
    fn bounds_prove_rule_out_or_leave_open() {
        let int = |low, high| Bounds::Int(low, high);
        let five = || Literal::Int(5);
        check(Test::Eq(five()), &DataType::Int64, int(1, 9), (0, 0), Verdict::Some);
        check(Test::Eq(five()), &DataType::Int64, int(6, 9), (0, 0), Verdict::None);
        check(Test::Eq(five()), &DataType::Int64, int(5, 5), (0, 0), Verdict::All);
        check(Test::Eq(five()), &DataType::Int64, int(5, 5), (1, 0), Verdict::Some);
        check(Test::Neq(five()), &DataType::Int64, int(1, 9), (0, 0), Verdict::Some);
        check(Test::Neq(five()), &DataType::Int64, int(6, 9), (0, 0), Verdict::All);
        check(Test::Gt(five()), &DataType::Int64, Bounds::None, (10, 0), Verdict::None);
        check(Test::NotExists, &DataType::Int64, Bounds::None, (10, 0), Verdict::All);
        check(Test::Exists, &DataType::Int64, int(1, 1), (0, 0), Verdict::All);
    }

    #[test]
    fn nan_counts_only_for_not_equal() {
        let float = || Bounds::Float(6.0, 9.0);
        check(Test::Gt(Literal::Int(5)), &DataType::Float64, float(), (0, 1), Verdict::Some);
        check(Test::Neq(Literal::Int(5)), &DataType::Float64, float(), (0, 1), Verdict::All);
        check(Test::Eq(Literal::Int(5)), &DataType::Float64, float(), (0, 1), Verdict::None);
        check(Test::Neq(Literal::Int(7)), &DataType::Float64, Bounds::None, (0, 10), Verdict::All);
        check(Test::Lt(Literal::Int(7)), &DataType::Float64, Bounds::None, (0, 10), Verdict::None);
    }

    #[test]
    fn patterns_are_ruled_out_by_their_prefix() {
        let text =
            |min: &str, max: &str| Bounds::Text { min: min.into(), max: max.into(), min_exact: true, max_exact: true };
        let base = || Test::Match(Pattern::parse("base*", Meaning::Glob).expect("a pattern"));
        check(base(), &DataType::Utf8, text("a", "b"), (0, 0), Verdict::None);
        check(base(), &DataType::Utf8, text("c", "d"), (0, 0), Verdict::None);
        check(base(), &DataType::Utf8, text("a", "bb"), (0, 0), Verdict::Some);
        check(base(), &DataType::Utf8, text("base_link", "x"), (0, 0), Verdict::Some);
        check(base(), &DataType::Utf8, text("base", "base"), (0, 0), Verdict::Some);
    }

    #[test]
    fn a_box_is_inside_outside_or_across() {
        let found = || Bounds::Box(GeoBox { south: 45.0, west: 9.0, north: 46.0, east: 10.0 });
        let within = |south, west, north, east| Test::Within(GeoBox { south, west, north, east });
        check(within(44.0, 8.0, 47.0, 11.0), &DataType::Null, found(), (0, 0), Verdict::All);
        check(within(44.0, 8.0, 47.0, 11.0), &DataType::Null, found(), (1, 0), Verdict::Some);
        check(within(45.5, 8.0, 47.0, 11.0), &DataType::Null, found(), (0, 0), Verdict::Some);
        check(within(50.0, 8.0, 51.0, 11.0), &DataType::Null, found(), (0, 0), Verdict::None);
    }

    #[test]
    fn a_set_of_all_texts_decides_what_bounds_cannot() {
        let typed = Test::Eq(Literal::Text("b".into())).for_type(&DataType::Utf8).expect("fits");
        let leaf = Leaf { target: Target::Field("x".into()), typed, column: None, values: None };
        let text = Bounds::Text { min: "a".into(), max: "c".into(), min_exact: true, max_exact: true };
        let stats = FieldStats { values: 10, nulls: 0, nans: 0, bounds: text };
        let set = FieldStats { bounds: Bounds::Values(vec!["a".into(), "c".into()]), ..stats.clone() };
        assert_eq!(leaf.verdict(&stats), Verdict::Some);
        assert_eq!(leaf.verdict_of_values(&set), Verdict::None);
    }
}
