//! One comparison: as it was asked, and what it means for a column of a certain type.
//!
//! Guarantees: nothing is rounded that need not be. Integers, timestamps and decimals are compared as
//! integers, also with a fractional literal; a float column is compared with the literal in its own
//! width (so `$eq 0.1` finds what was recorded as 0.1 in float32). A null never satisfies a
//! comparison; NaN satisfies only `$neq`.

use crate::query::pattern::Pattern;
use crate::query::ranges::Ranges;
use arrow::datatypes::DataType;
use std::ops::Bound;
use storage::chunk::stats::GeoBox;

/// A value in a query.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Literal {
    Int(i128),
    Float(f64),
    Text(String),
    Bool(bool),
}

impl Literal {
    /// The kind, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::Bool(_) => "a flag",
        }
    }
}

/// An operator with its values, as asked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Test {
    Eq(Literal),
    Neq(Literal),
    Lt(Literal),
    Leq(Literal),
    Gt(Literal),
    Geq(Literal),
    Between(Literal, Literal),
    Outside(Literal, Literal),
    In(Vec<Literal>),
    Match(Pattern),
    /// The whole list is this.
    ListEq(Vec<Literal>),
    /// The whole list is there and is not this.
    ListNeq(Vec<Literal>),
    Exists,
    NotExists,
    Within(GeoBox),
}

/// A comparison for one type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Typed {
    /// Integers; timestamps and durations in nanoseconds; decimals unscaled.
    Int(Ranges<i128>),
    Float(Ranges<f64>),
    Text(Ranges<String>),
    Pattern(Pattern),
    /// What it says of true and of false.
    Bool {
        on_true: bool,
        on_false: bool,
    },
    /// Whether there is a value.
    Present(bool),
    List {
        items: Vec<Typed>,
        equal: bool,
    },
    Within(GeoBox),
}

impl Test {
    /// What the comparison means for values of a type.
    pub(crate) fn for_type(&self, data_type: &DataType) -> Result<Typed, String> {
        match (self, data_type) {
            (Self::Exists, _) => return Ok(Typed::Present(true)),
            (Self::NotExists, _) => return Ok(Typed::Present(false)),
            (Self::Within(_), _) => return Err("`$within` is asked of a position, e.g. `GPS.position`".to_owned()),
            (Self::ListEq(items), list) => return list_test(items, list, true),
            (Self::ListNeq(items), list) => return list_test(items, list, false),
            _ => {}
        }
        match data_type {
            DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32
            | DataType::UInt64
            | DataType::Timestamp(_, _)
            | DataType::Duration(_) => self.ranges(&|literal| Point::of_int(literal, 0)).map(Typed::Int),
            DataType::Decimal128(_, scale) => {
                self.ranges(&|literal| Point::of_int(literal, i32::from(*scale))).map(Typed::Int)
            }
            DataType::Float16 => self.float(&|value| f64::from(half::f16::from_f64(value))),
            DataType::Float32 => self.float(&|value| f64::from(value as f32)),
            DataType::Float64 => self.float(&|value| value),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => match self {
                Self::Match(pattern) => Ok(Typed::Pattern(pattern.clone())),
                _ => self.ranges(&Point::of_text).map(Typed::Text),
            },
            DataType::Boolean => self.bool(),
            DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(_, _) => {
                Err("is a list; say which elements: `[?]` any, `[!]` all, `[0]` by position".to_owned())
            }
            DataType::Struct(_) => Err("is a struct; name one of its fields".to_owned()),
            other => Err(format!(
                "has type {}, which knows only `$ex` and `$nex`",
                storage::ontology::form::type_name(other)
            )),
        }
    }

    fn float(&self, width: &dyn Fn(f64) -> f64) -> Result<Typed, String> {
        let exact = width(0.1) == 0.1;
        let point = |literal: &Literal| match literal {
            Literal::Int(value) if exact => Ok(Point::of_wide_int(*value)),
            Literal::Int(value) => Ok(narrowed(width(*value as f64))),
            Literal::Float(value) => Ok(narrowed(width(*value))),
            other => Err(other_kind("a number", other)),
        };
        let mut ranges = self.ranges(&point)?;
        ranges.nan = matches!(self, Self::Neq(_));
        Ok(Typed::Float(ranges))
    }

    fn bool(&self) -> Result<Typed, String> {
        let flag = |literal: &Literal| match literal {
            Literal::Bool(flag) => Ok(*flag),
            other => Err(other_kind("true or false", other)),
        };
        let (on_true, on_false) = match self {
            Self::Eq(literal) => flag(literal).map(|flag| (flag, !flag))?,
            Self::Neq(literal) => flag(literal).map(|flag| (!flag, flag))?,
            Self::In(literals) => {
                let flags = literals.iter().map(flag).collect::<Result<Vec<_>, _>>()?;
                (flags.contains(&true), flags.contains(&false))
            }
            _ => return Err("is a flag; use `$eq`, `$neq` or `$in`".to_owned()),
        };
        Ok(Typed::Bool { on_true, on_false })
    }

    /// The values accepted, where a literal is a point on or between the values of the type.
    fn ranges<T: PartialOrd + Clone>(
        &self,
        point: &dyn Fn(&Literal) -> Result<Point<T>, String>,
    ) -> Result<Ranges<T>, String> {
        let eq = |literal: &Literal| {
            let point = point(literal)?;
            Ok::<_, String>(match point.side {
                Side::On => Ranges::closed(point.at.clone(), point.at),
                Side::Above | Side::Below => Ranges::nothing(),
            })
        };
        let low = |point: Point<T>, with: bool| match (point.side, with) {
            (Side::On, true) | (Side::Below, _) => Bound::Included(point.at),
            (Side::On, false) | (Side::Above, _) => Bound::Excluded(point.at),
        };
        let high = |point: Point<T>, with: bool| match (point.side, with) {
            (Side::On, true) | (Side::Above, _) => Bound::Included(point.at),
            (Side::On, false) | (Side::Below, _) => Bound::Excluded(point.at),
        };
        let from = |bound| Ranges::new(vec![(bound, Bound::Unbounded)]);
        let to = |bound| Ranges::new(vec![(Bound::Unbounded, bound)]);
        Ok(match self {
            Self::Eq(literal) => eq(literal)?,
            Self::Neq(literal) => {
                let point = point(literal)?;
                match point.side {
                    Side::On => to(Bound::Excluded(point.at.clone())).or(from(Bound::Excluded(point.at))),
                    Side::Above | Side::Below => Ranges::new(vec![(Bound::Unbounded, Bound::Unbounded)]),
                }
            }
            Self::Lt(literal) => to(high(point(literal)?, false)),
            Self::Leq(literal) => to(high(point(literal)?, true)),
            Self::Gt(literal) => from(low(point(literal)?, false)),
            Self::Geq(literal) => from(low(point(literal)?, true)),
            Self::Between(a, b) => Ranges::new(vec![(low(point(a)?, true), high(point(b)?, true))]),
            Self::Outside(a, b) => to(high(point(a)?, false)).or(from(low(point(b)?, false))),
            Self::In(literals) => {
                literals.iter().try_fold(Ranges::nothing(), |all, literal| Ok::<_, String>(all.or(eq(literal)?)))?
            }
            Self::Match(_) => return Err("is no text; `$match` is for texts".to_owned()),
            Self::ListEq(_) | Self::ListNeq(_) | Self::Exists | Self::NotExists | Self::Within(_) => {
                return Err("this operator does not compare".to_owned());
            }
        })
    }
}

/// A finite literal that is infinite in its column's width lies beyond every finite value of it.
fn narrowed(at: f64) -> Point<f64> {
    match at {
        f64::INFINITY => Point { at: f64::MAX, side: Side::Above },
        f64::NEG_INFINITY => Point { at: f64::MIN, side: Side::Below },
        at => Point { at, side: Side::On },
    }
}

fn other_kind(wanted: &str, found: &Literal) -> String {
    format!("is compared with {}, not with {}", wanted, found.kind())
}

fn list_test(items: &[Literal], data_type: &DataType, equal: bool) -> Result<Typed, String> {
    let (DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _)) = data_type else {
        return Err("is no list, and a list of values was given".to_owned());
    };
    let items = items
        .iter()
        .map(|literal| Test::Eq(literal.clone()).for_type(item.data_type()))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Typed::List { items, equal })
}

/// Where a literal lies among the values of a type.
struct Point<T> {
    at: T,
    /// The literal is `at`, or between it and the next value.
    side: Side,
}

enum Side {
    On,
    /// A little above `at`: between it and the next larger value.
    Above,
    /// A little below `at`.
    Below,
}

impl Point<String> {
    fn of_text(literal: &Literal) -> Result<Self, String> {
        match literal {
            Literal::Text(text) => Ok(Self { at: text.clone(), side: Side::On }),
            other => Err(other_kind("a text", other)),
        }
    }
}

impl Point<f64> {
    /// An integer among the 64-bit floats: beyond 2^53 it may lie between two of them.
    fn of_wide_int(value: i128) -> Self {
        let at = value as f64;
        let back = at as i128;
        let side = match back.cmp(&value) {
            std::cmp::Ordering::Equal => Side::On,
            std::cmp::Ordering::Less => Side::Above,
            std::cmp::Ordering::Greater => Side::Below,
        };
        Self { at, side }
    }
}

impl Point<i128> {
    /// A number among integers that stand for `10^-scale` each.
    fn of_int(literal: &Literal, scale: i32) -> Result<Self, String> {
        let text = match literal {
            Literal::Int(value) if scale == 0 => return Ok(Self { at: *value, side: Side::On }),
            Literal::Int(value) => value.to_string(),
            // Display of f64 is its shortest exact form, without exponent.
            Literal::Float(value) => value.to_string(),
            other => return Err(other_kind("a number", other)),
        };
        Ok(Self::of_digits(&text, scale))
    }

    /// Digits with the decimal point moved right by `scale`: the integer below, and whether it is exact.
    fn of_digits(text: &str, scale: i32) -> Self {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all: String = format!("{whole}{fraction}");
        let point = i64::try_from(whole.len()).unwrap_or(i64::MAX).saturating_add(i64::from(scale));
        let cut = usize::try_from(point).unwrap_or(0);
        let mut integer: String = all.chars().take(cut).collect();
        integer.extend(std::iter::repeat_n('0', cut.saturating_sub(all.len()).min(64)));
        let rest_is_zero = all.chars().skip(cut).all(|digit| digit == '0');
        let magnitude = if integer.is_empty() { Some(0) } else { integer.parse::<i128>().ok() };
        match (magnitude, negative) {
            (Some(magnitude), _) if rest_is_zero => {
                Self { at: if negative { -magnitude } else { magnitude }, side: Side::On }
            }
            (Some(magnitude), false) => Self { at: magnitude, side: Side::Above },
            (Some(magnitude), true) => Self { at: -magnitude, side: Side::Below },
            // Beyond every value of the type.
            (None, false) => Self { at: i128::MAX, side: Side::Above },
            (None, true) => Self { at: i128::MIN, side: Side::Below },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_int(test: Test, data_type: &DataType, yes: &[i128], no: &[i128]) {
        let Ok(Typed::Int(ranges)) = test.for_type(data_type) else { panic!("{test:?} is no integer test") };
        for value in yes {
            assert!(ranges.holds(value), "{value}");
        }
        for value in no {
            assert!(!ranges.holds(value), "{value}");
        }
    }

    #[test]
    fn integers_are_compared_exactly_also_with_fractions() {
        let big = i128::from(i64::MAX);
        check_int(Test::Eq(Literal::Int(big)), &DataType::Int64, &[big], &[big - 1]);
        check_int(Test::Lt(Literal::Float(2.5)), &DataType::Int8, &[2], &[3]);
        check_int(Test::Geq(Literal::Float(2.5)), &DataType::Int8, &[3], &[2]);
        check_int(Test::Gt(Literal::Float(-2.5)), &DataType::Int8, &[-2], &[-3]);
        check_int(Test::Leq(Literal::Float(-2.5)), &DataType::Int8, &[-3], &[-2]);
        check_int(Test::Eq(Literal::Float(2.0)), &DataType::Int8, &[2], &[]);
        check_int(Test::Eq(Literal::Float(2.5)), &DataType::Int8, &[], &[2, 3]);
        check_int(Test::Neq(Literal::Float(2.5)), &DataType::Int8, &[2, 3], &[]);
        check_int(Test::Lt(Literal::Float(1e300)), &DataType::Int64, &[big], &[]);
        let between = Test::Between(Literal::Float(0.5), Literal::Int(2));
        check_int(between, &DataType::UInt8, &[1, 2], &[0, 3]);
        check_int(Test::Outside(Literal::Int(1), Literal::Int(2)), &DataType::UInt8, &[0, 3], &[1, 2]);
    }

    #[test]
    fn decimals_are_compared_unscaled() {
        let cents = DataType::Decimal128(10, 2);
        check_int(Test::Eq(Literal::Float(1.25)), &cents, &[125], &[124, 126]);
        check_int(Test::Lt(Literal::Float(1.255)), &cents, &[125], &[126]);
        check_int(Test::Gt(Literal::Int(1)), &cents, &[101], &[100]);
        let hundreds = DataType::Decimal128(10, -2);
        check_int(Test::Leq(Literal::Int(250)), &hundreds, &[2], &[3]);
    }

    #[track_caller]
    fn check_float(test: Test, data_type: &DataType, yes: &[f64], no: &[f64]) {
        let Ok(Typed::Float(ranges)) = test.for_type(data_type) else { panic!("{test:?} is no float test") };
        for value in yes {
            assert!(ranges.holds(value), "{value}");
        }
        for value in no {
            assert!(!ranges.holds(value), "{value}");
        }
    }

    #[test]
    fn integers_beyond_2_to_the_53_are_exact_among_floats() {
        let odd = (1_i128 << 53) + 1;
        let below = (1_i64 << 53) as f64;
        check_float(Test::Eq(Literal::Int(odd)), &DataType::Float64, &[], &[below, below + 2.0]);
        check_float(Test::Lt(Literal::Int(odd)), &DataType::Float64, &[below], &[below + 2.0]);
        check_float(Test::Geq(Literal::Int(odd)), &DataType::Float64, &[below + 2.0], &[below]);
    }

    #[test]
    fn a_literal_takes_the_width_of_a_float32_column() {
        check_float(Test::Eq(Literal::Float(0.1)), &DataType::Float32, &[f64::from(0.1_f32)], &[0.1]);
        let largest = f64::from(f32::MAX);
        check_float(Test::Leq(Literal::Float(1e39)), &DataType::Float32, &[largest], &[f64::INFINITY]);
        check_float(Test::Gt(Literal::Float(1e39)), &DataType::Float32, &[f64::INFINITY], &[largest]);
    }

    #[test]
    fn wrong_kinds_are_refused() {
        for (test, data_type) in [
            (Test::Eq(Literal::Text("x".into())), DataType::Int8),
            (Test::Eq(Literal::Int(1)), DataType::Utf8),
            (Test::Lt(Literal::Bool(true)), DataType::Boolean),
            (Test::Eq(Literal::Int(1)), DataType::Binary),
            (Test::ListEq(vec![Literal::Int(1)]), DataType::Int8),
        ] {
            assert!(test.for_type(&data_type).is_err(), "{test:?} {data_type}");
        }
    }
}
