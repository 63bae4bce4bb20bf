//! Typed statistics of a chunk, one pass per leaf, computed once for the skip index and the footer.
//!
//! Guarantees (INV-6): every non-null value of a leaf lies within its bounds. Numbers keep their
//! type: integers stay integers (a float loses hundreds of nanoseconds of a time today), NaN is
//! counted apart and never a bound, text bounds may be cut and then say so.
//! Lists are described over their elements; lists of lists, maps and blobs by presence only.

mod derived;

pub use derived::{GeoBox, norm, wrap_longitude};

use crate::limits::TEXT_BOUND_BYTES;
use crate::ontology::Derived;
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, PrimitiveArray, RecordBatch, StringArrayType,
    StructArray, make_array,
};
use arrow::buffer::{BooleanBuffer, NullBuffer};
use arrow::compute::{filter, max, min};
use arrow::datatypes::{
    DataType, Decimal128Type, DurationMicrosecondType, DurationMillisecondType, DurationNanosecondType,
    DurationSecondType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, SchemaRef,
    TimeUnit, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use half::f16;
use serde::{Deserialize, Serialize};

/// Smallest and largest value of a leaf, in its own type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Bounds {
    /// No value, or a type described by presence only.
    None,
    /// Signed integers; timestamps and durations in nanoseconds, saturated.
    Int(i64, i64),
    /// Unsigned integers.
    Unsigned(u64, u64),
    /// Floats of any width, NaN left out.
    Float(f64, f64),
    /// Booleans.
    Bool(bool, bool),
    /// Decimals, unscaled, with their scale.
    Decimal(i128, i128, i8),
    /// Text; the flags say whether the bound is a whole value.
    Text {
        /// At most the smallest value.
        min: String,
        /// At least the largest value.
        max: String,
        /// Whether `min` is itself a value.
        min_exact: bool,
        /// Whether `max` is itself a value.
        max_exact: bool,
    },
    /// Points on the globe.
    Box(GeoBox),
    /// All distinct values of a text leaf, sorted.
    Values(Vec<String>),
}

impl Bounds {
    /// The bounds of a text leaf from its smallest and largest value: long ones are cut to a prefix
    /// below and rounded up above.
    pub fn text(low: &str, high: &str) -> Self {
        let cut_low = prefix(low);
        let (cut_high, max_exact) = upper_bound(high);
        match cut_high {
            Some(max) => Self::Text { min: cut_low.to_owned(), max, min_exact: cut_low.len() == low.len(), max_exact },
            None => Self::None,
        }
    }
}

/// What one leaf of one chunk holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FieldStats {
    /// Values, nulls and NaN included (elements, for a list).
    pub values: u64,
    /// Nulls among them.
    pub nulls: u64,
    /// NaNs among them.
    pub nans: u64,
    /// The bounds of the rest.
    pub bounds: Bounds,
}

/// The statistics of no value.
const NOTHING: FieldStats = FieldStats { values: 0, nulls: 0, nans: 0, bounds: Bounds::None };

/// The dotted paths that statistics are kept for, in the order of [`collect`]'s result.
/// A path through a list has `[?]` behind the list's name.
pub fn leaves(schema: &SchemaRef) -> Vec<String> {
    let mut paths = Vec::new();
    for field in schema.fields() {
        leaf_paths(field.name().clone(), field.data_type(), false, &mut paths);
    }
    paths
}

fn leaf_paths(path: String, data_type: &DataType, in_list: bool, paths: &mut Vec<String>) {
    match data_type {
        DataType::Struct(fields) => {
            for field in fields {
                leaf_paths(format!("{path}.{}", field.name()), field.data_type(), in_list, paths);
            }
        }
        DataType::List(child) | DataType::LargeList(child) | DataType::FixedSizeList(child, _) if !in_list => {
            leaf_paths(format!("{path}[?]"), child.data_type(), true, paths);
        }
        _ => paths.push(path),
    }
}

/// Gathers the statistics of a chunk, batch by batch.
#[derive(Debug)]
pub struct Collector<'a> {
    leaves: usize,
    all: Vec<FieldStats>,
    derived: Vec<derived::Gatherer<'a>>,
}

impl<'a> Collector<'a> {
    /// Statistics of the leaves of a stored schema, then of what is derived from them.
    pub fn new(schema: &SchemaRef, derived: &'a [Derived]) -> Self {
        Self {
            leaves: schema.fields().iter().map(|field| leaf_count(field.data_type(), false)).sum(),
            all: Vec::new(),
            derived: derived.iter().map(|derived| derived::Gatherer::new(derived, schema)).collect(),
        }
    }

    /// Takes in a batch of the stored schema.
    pub fn add(&mut self, batch: &RecordBatch) {
        let mut of_batch = Vec::with_capacity(self.leaves);
        for column in batch.columns() {
            collect_array(column, false, &mut of_batch);
        }
        if self.all.is_empty() {
            self.all = of_batch;
        } else {
            for (into, from) in self.all.iter_mut().zip(of_batch) {
                merge(into, from);
            }
        }
        for gatherer in &mut self.derived {
            gatherer.add(batch);
        }
    }

    /// The statistics, in the order of [`leaves`] and the derived columns behind them.
    pub fn finish(mut self) -> Vec<FieldStats> {
        if self.all.is_empty() {
            self.all = vec![NOTHING; self.leaves];
        }
        self.all.extend(self.derived.into_iter().map(derived::Gatherer::finish));
        self.all
    }
}

/// [`Collector`] over all batches at once.
pub fn collect(schema: &SchemaRef, derived: &[Derived], batches: &[RecordBatch]) -> Vec<FieldStats> {
    let mut collector = Collector::new(schema, derived);
    for batch in batches {
        collector.add(batch);
    }
    collector.finish()
}

fn merge(into: &mut FieldStats, from: FieldStats) {
    // No bounds: there is no value, or they are not known. Unknown bounds stay unknown.
    let is_empty = |stats: &FieldStats| stats.values == stats.nulls + stats.nans;
    let unknown = [&*into, &from].iter().any(|stats| stats.bounds == Bounds::None && !is_empty(stats));
    into.values += from.values;
    into.nulls += from.nulls;
    into.nans += from.nans;
    let mine = std::mem::replace(&mut into.bounds, Bounds::None);
    if unknown {
        return;
    }
    into.bounds = match (mine, from.bounds) {
        (Bounds::None, other) | (other, Bounds::None) => other,
        (Bounds::Int(a, b), Bounds::Int(c, d)) => Bounds::Int(a.min(c), b.max(d)),
        (Bounds::Unsigned(a, b), Bounds::Unsigned(c, d)) => Bounds::Unsigned(a.min(c), b.max(d)),
        (Bounds::Float(a, b), Bounds::Float(c, d)) => Bounds::Float(a.min(c), b.max(d)),
        (Bounds::Bool(a, b), Bounds::Bool(c, d)) => Bounds::Bool(a & c, b | d),
        (Bounds::Decimal(a, b, scale), Bounds::Decimal(c, d, _)) => Bounds::Decimal(a.min(c), b.max(d), scale),
        (
            Bounds::Text { min: a, max: b, min_exact: a_exact, max_exact: b_exact },
            Bounds::Text { min: c, max: d, min_exact: c_exact, max_exact: d_exact },
        ) => {
            let (min, min_exact) = if (&c, c_exact) < (&a, a_exact) { (c, c_exact) } else { (a, a_exact) };
            let (max, max_exact) = if d > b { (d, d_exact) } else { (b, b_exact) };
            Bounds::Text { min, max, min_exact, max_exact }
        }
        // One leaf has one type; two kinds cannot meet. Claiming nothing is the safe answer.
        _ => Bounds::None,
    };
}

fn collect_array(array: &ArrayRef, in_list: bool, out: &mut Vec<FieldStats>) {
    match array.data_type() {
        DataType::Struct(_) => {
            let array = array.as_struct();
            for index in 0..array.num_columns() {
                collect_array(&child_under_nulls(array, index), in_list, out);
            }
        }
        // Most often none of an optional list is there.
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(_, _)
            if !in_list && !array.is_empty() && array.null_count() == array.len() =>
        {
            out.extend(std::iter::repeat_n(NOTHING, leaf_count(array.data_type(), false)));
        }
        // Elements behind a null list are no values: whether they are there depends on the sender.
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(_, _)
            if !in_list && array.null_count() > 0 =>
        {
            let there = BooleanArray::new(
                array.nulls().map_or_else(|| BooleanBuffer::new_set(array.len()), |nulls| nulls.inner().clone()),
                None,
            );
            match filter(array, &there) {
                // What is left has no nulls.
                Ok(lists) => collect_array(&lists, in_list, out),
                // Claiming nothing is the safe answer.
                Err(_) => out.extend(std::iter::repeat_n(unknown(array.len()), leaf_count(array.data_type(), false))),
            }
        }
        DataType::List(_) if !in_list => {
            let list = array.as_list::<i32>();
            let (first, last) = (list.value_offsets().first(), list.value_offsets().last());
            collect_elements(list.values(), first.map(|x| *x as usize), last.map(|x| *x as usize), out);
        }
        DataType::LargeList(_) if !in_list => {
            let list = array.as_list::<i64>();
            let (first, last) = (list.value_offsets().first(), list.value_offsets().last());
            collect_elements(list.values(), first.map(|x| *x as usize), last.map(|x| *x as usize), out);
        }
        DataType::FixedSizeList(_, _) if !in_list => {
            let list = array.as_fixed_size_list();
            collect_array(list.values(), true, out);
        }
        _ => out.push(leaf_stats(array)),
    }
}

/// Statistics that neither prove nor rule out anything.
fn unknown(values: usize) -> FieldStats {
    FieldStats { values: values as u64 + 1, nulls: 1, nans: 0, bounds: Bounds::None }
}

/// How many [`leaf_paths`] there are.
fn leaf_count(data_type: &DataType, in_list: bool) -> usize {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| leaf_count(field.data_type(), in_list)).sum(),
        DataType::List(child) | DataType::LargeList(child) | DataType::FixedSizeList(child, _) if !in_list => {
            leaf_count(child.data_type(), true)
        }
        _ => 1,
    }
}

fn collect_elements(values: &ArrayRef, first: Option<usize>, last: Option<usize>, out: &mut Vec<FieldStats>) {
    let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
    collect_array(&values.slice(first, last.saturating_sub(first)), true, out);
}

/// The field at a dotted path inside of an array of structs, with the nulls of the structs on the way.
pub fn struct_child(array: &ArrayRef, path: &str) -> Option<ArrayRef> {
    let parent = array.as_struct_opt()?;
    let fields = parent.fields().clone();
    let index = fields.iter().position(|field| {
        path.strip_prefix(field.name().as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })?;
    let child = child_under_nulls(parent, index);
    match path.get(fields.get(index)?.name().len() + 1..) {
        None | Some("") => Some(child),
        Some(rest) => struct_child(&child, rest),
    }
}

/// A field of an array of structs, null wherever its struct is.
pub fn child_under_nulls(parent: &StructArray, index: usize) -> ArrayRef {
    let child = parent.column(index);
    match parent.nulls().filter(|nulls| nulls.null_count() > 0) {
        // A union of nulls cannot fit a null-typed child, which has none to hide anyway. Most often the child of a null is
        // null by itself.
        Some(nulls)
            if child.data_type() != &DataType::Null && !child.nulls().is_some_and(|own| have_all(own, nulls)) =>
        {
            let both = NullBuffer::union(Some(nulls), child.nulls());
            child.to_data().into_builder().nulls(both).build().map_or_else(|_| child.clone(), make_array)
        }
        _ => child.clone(),
    }
}

/// Whether whatever is null in `others` is so in `nulls`.
fn have_all(nulls: &NullBuffer, others: &NullBuffer) -> bool {
    if nulls.null_count() == nulls.len() {
        return true;
    }
    // A bit is set where there is a value; beyond the end none is.
    let mut words = nulls.inner().bit_chunks().iter_padded().zip(others.inner().bit_chunks().iter_padded());
    words.all(|(values, other_values)| values & !other_values == 0)
}

fn leaf_stats(array: &ArrayRef) -> FieldStats {
    let (values, nulls) = (array.len() as u64, array.logical_null_count() as u64);
    if values == nulls {
        return FieldStats { values, nulls, ..NOTHING };
    }
    let mut nans = 0;
    let bounds = match array.data_type() {
        DataType::Int8 => ints::<Int8Type>(array, 1),
        DataType::Int16 => ints::<Int16Type>(array, 1),
        DataType::Int32 => ints::<Int32Type>(array, 1),
        DataType::Int64 => ints::<Int64Type>(array, 1),
        DataType::Timestamp(TimeUnit::Second, _) => ints::<TimestampSecondType>(array, 1_000_000_000),
        DataType::Timestamp(TimeUnit::Millisecond, _) => ints::<TimestampMillisecondType>(array, 1_000_000),
        DataType::Timestamp(TimeUnit::Microsecond, _) => ints::<TimestampMicrosecondType>(array, 1_000),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => ints::<TimestampNanosecondType>(array, 1),
        DataType::Duration(TimeUnit::Second) => ints::<DurationSecondType>(array, 1_000_000_000),
        DataType::Duration(TimeUnit::Millisecond) => ints::<DurationMillisecondType>(array, 1_000_000),
        DataType::Duration(TimeUnit::Microsecond) => ints::<DurationMicrosecondType>(array, 1_000),
        DataType::Duration(TimeUnit::Nanosecond) => ints::<DurationNanosecondType>(array, 1),
        DataType::UInt8 => unsigned::<UInt8Type>(array),
        DataType::UInt16 => unsigned::<UInt16Type>(array),
        DataType::UInt32 => unsigned::<UInt32Type>(array),
        DataType::UInt64 => unsigned::<UInt64Type>(array),
        DataType::Float16 => floats(array.as_primitive::<Float16Type>(), (f16::INFINITY, f16::NEG_INFINITY), &mut nans),
        DataType::Float32 => floats(array.as_primitive::<Float32Type>(), (f32::INFINITY, f32::NEG_INFINITY), &mut nans),
        DataType::Float64 => floats(array.as_primitive::<Float64Type>(), (f64::INFINITY, f64::NEG_INFINITY), &mut nans),
        DataType::Boolean => {
            let values = array.as_boolean();
            match (values.has_true(), values.has_false()) {
                (false, false) => Bounds::None,
                (has_true, has_false) => Bounds::Bool(!has_false, has_true),
            }
        }
        DataType::Decimal128(_, scale) => {
            let values = array.as_primitive::<Decimal128Type>();
            match (min(values), max(values)) {
                (Some(low), Some(high)) => Bounds::Decimal(low, high, *scale),
                _ => Bounds::None,
            }
        }
        DataType::Utf8 => text(array.as_string::<i32>()),
        DataType::LargeUtf8 => text(array.as_string::<i64>()),
        DataType::Utf8View => text(array.as_string_view()),
        _ => Bounds::None,
    };
    FieldStats { values, nulls, nans, bounds }
}

fn ints<T: ArrowPrimitiveType>(array: &ArrayRef, unit: i64) -> Bounds
where
    T::Native: Into<i64>,
{
    let values = array.as_primitive::<T>();
    match (min(values), max(values)) {
        (Some(low), Some(high)) => Bounds::Int(low.into().saturating_mul(unit), high.into().saturating_mul(unit)),
        _ => Bounds::None,
    }
}

fn unsigned<T: ArrowPrimitiveType>(array: &ArrayRef) -> Bounds
where
    T::Native: Into<u64>,
{
    let values = array.as_primitive::<T>();
    match (min(values), max(values)) {
        (Some(low), Some(high)) => Bounds::Unsigned(low.into(), high.into()),
        _ => Bounds::None,
    }
}

/// Values that are compared at once: the compiler makes vector instructions of it.
const LANES: usize = 16;

/// Smallest, largest and not-a-number, lane by lane.
struct Extremes<N> {
    low: [N; LANES],
    high: [N; LANES],
    nans: [u32; LANES],
}

impl<N: PartialOrd + Copy> Extremes<N> {
    fn take(&mut self, values: &[N]) {
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            self.take_up_to(chunk);
        }
        self.take_up_to(rest);
    }

    #[inline(always)]
    fn take_up_to(&mut self, values: &[N]) {
        let lanes = self.low.iter_mut().zip(&mut self.high).zip(&mut self.nans);
        for (value, ((low, high), nans)) in values.iter().zip(lanes) {
            // A comparison with NaN is false: it is no bound.
            *low = if *value < *low { *value } else { *low };
            *high = if *value > *high { *value } else { *high };
            *nans += u32::from(value.partial_cmp(value).is_none());
        }
    }
}

fn floats<T: ArrowPrimitiveType>(
    array: &PrimitiveArray<T>,
    (infinity, minus_infinity): (T::Native, T::Native),
    nans: &mut u64,
) -> Bounds
where
    T::Native: Into<f64> + PartialOrd,
{
    let mut all = Extremes { low: [infinity; LANES], high: [minus_infinity; LANES], nans: [0; LANES] };
    match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => all.take(array.values()),
        Some(nulls) => {
            for (from, to) in nulls.inner().set_slices() {
                all.take(array.values().get(from..to).unwrap_or(&[]));
            }
        }
    }
    *nans = all.nans.iter().map(|nans| u64::from(*nans)).sum();
    let low = all.low.into_iter().map(Into::into).fold(f64::INFINITY, f64::min);
    let high = all.high.into_iter().map(Into::into).fold(f64::NEG_INFINITY, f64::max);
    if low <= high { Bounds::Float(low, high) } else { Bounds::None }
}

fn text<'a>(array: impl StringArrayType<'a>) -> Bounds {
    let mut bounds: Option<(&str, &str)> = None;
    let mut last = None;
    for value in array.iter().flatten() {
        // Names of frames and states repeat.
        if last.replace(value) == Some(value) {
            continue;
        }
        bounds = Some(match bounds {
            None => (value, value),
            Some((low, high)) => (low.min(value), high.max(value)),
        });
    }
    bounds.map_or(Bounds::None, |(low, high)| Bounds::text(low, high))
}

fn prefix(text: &str) -> &str {
    text.get(..text.floor_char_boundary(TEXT_BOUND_BYTES.min(text.len()))).unwrap_or("")
}

/// The text itself, or the shortest text above everything that starts with its prefix.
/// `None` when there is none (a prefix of the last code point only).
fn upper_bound(text: &str) -> (Option<String>, bool) {
    let cut = prefix(text);
    if cut.len() == text.len() {
        return (Some(text.to_owned()), true);
    }
    let mut chars: Vec<char> = cut.chars().collect();
    while let Some(last) = chars.pop() {
        let next = (u32::from(last) + 1..=u32::from(char::MAX)).find_map(char::from_u32);
        if let Some(next) = next {
            chars.push(next);
            return (Some(chars.into_iter().collect()), false);
        }
    }
    (None, false)
}

/// Statistics in Parquet's own form, per leaf column of a flat field order, for the footer.
/// Only bounds that Parquet readers may trust without care are given: exact numbers of the
/// column's own physical type.
pub fn for_footer(schema: &SchemaRef, stats: &[FieldStats]) -> Vec<Option<parquet::file::statistics::Statistics>> {
    use parquet::file::statistics::Statistics;
    let mut out = Vec::new();
    let mut stats = stats.iter();
    for field in schema.fields() {
        footer_leaf(field.data_type(), true, &mut stats, &mut out, &|data_type, stats: &FieldStats| {
            let nulls = Some(stats.nulls);
            match (data_type, &stats.bounds) {
                (DataType::Int64 | DataType::Timestamp(TimeUnit::Nanosecond, _), Bounds::Int(low, high)) => {
                    Some(Statistics::int64(Some(*low), Some(*high), None, nulls, false))
                }
                (DataType::Int8 | DataType::Int16 | DataType::Int32, Bounds::Int(low, high)) => {
                    Some(Statistics::int32(i32::try_from(*low).ok(), i32::try_from(*high).ok(), None, nulls, false))
                }
                // Zero has two signs that compare equal; Parquet asks for the wider one.
                (DataType::Float64, Bounds::Float(low, high)) if stats.nans == 0 => Some(Statistics::double(
                    Some(if *low == 0.0 { -0.0 } else { *low }),
                    Some(if *high == 0.0 { 0.0 } else { *high }),
                    None,
                    nulls,
                    false,
                )),
                _ => None,
            }
        });
    }
    out
}

type FooterMaker<'a> = &'a dyn Fn(&DataType, &FieldStats) -> Option<parquet::file::statistics::Statistics>;

/// Walks Parquet's leaf columns beside the statistics leaves; only paths without lists get any.
fn footer_leaf<'s>(
    data_type: &DataType,
    flat: bool,
    stats: &mut impl Iterator<Item = &'s FieldStats>,
    out: &mut Vec<Option<parquet::file::statistics::Statistics>>,
    make: FooterMaker<'_>,
) {
    match data_type {
        DataType::Struct(fields) => {
            for field in fields {
                footer_leaf(field.data_type(), flat, stats, out, make);
            }
        }
        DataType::List(child) | DataType::LargeList(child) | DataType::FixedSizeList(child, _) if flat => {
            footer_leaf(child.data_type(), false, stats, out, make);
        }
        DataType::List(_)
        | DataType::LargeList(_)
        | DataType::ListView(_)
        | DataType::LargeListView(_)
        | DataType::FixedSizeList(_, _)
        | DataType::Map(_, _) => {
            // One statistics leaf (presence), as many Parquet columns as lie below.
            stats.next();
            out.extend(std::iter::repeat_n(None, parquet_leaves(data_type)));
        }
        leaf => out.push(stats.next().and_then(|stats| if flat { make(leaf, stats) } else { None })),
    }
}

fn parquet_leaves(data_type: &DataType) -> usize {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| parquet_leaves(field.data_type())).sum(),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => parquet_leaves(child.data_type()),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float64Array, Int64Array, ListArray, StringArray, new_null_array};
    use arrow::datatypes::{Field, Fields, Schema};
    use std::sync::Arc;

    #[test]
    fn a_child_is_null_wherever_its_struct_is_whatever_it_is_itself() {
        let mut random = crate::sim::Random::new(3);
        let mut kept = 0;
        for round in 0..2000 {
            let (rows, skip) = (1 + random.below(200) as usize, random.below(70) as usize);
            // Few, many, or all are null.
            let mut nulls = |of: u64| (0..rows + skip).map(|_| random.below(of) > 0).collect::<Vec<_>>();
            let (outer, inner) = (nulls([1, 2, 20][round % 3]), nulls([1, 2, 40, 1000][round % 4]));
            let own = if round % 2 == 0 { inner } else { outer.iter().zip(&inner).map(|(a, b)| a & b).collect() };
            let expected: Vec<bool> = outer.iter().zip(&own).map(|(a, b)| a & b).skip(skip).collect();
            let child: ArrayRef = Arc::new(Int64Array::new(vec![7; rows + skip].into(), Some(own.into())));
            let fields = Fields::from(vec![Field::new("x", DataType::Int64, true)]);
            let parent = StructArray::new(fields, vec![child], Some(outer.into())).slice(skip, rows);
            let found = child_under_nulls(&parent, 0);
            assert_eq!((0..rows).map(|row| found.is_valid(row)).collect::<Vec<_>>(), expected, "round {round}");
            kept += usize::from(found.to_data().ptr_eq(&parent.column(0).to_data()));
        }
        assert!((1000..2000).contains(&kept), "{kept} needed nothing made");
    }

    #[test]
    fn lists_that_are_all_null_have_the_statistics_of_no_rows() {
        let field = |data_type: DataType| Arc::new(Field::new("item", data_type, true));
        let list = |data_type: DataType| DataType::List(field(data_type));
        let of = Fields::from(vec![
            Field::new("a", DataType::Int64, true),
            Field::new("b", list(DataType::Utf8), true),
            Field::new("c", DataType::Struct(vec![Field::new("d", DataType::Boolean, true)].into()), true),
        ]);
        for data_type in [
            list(DataType::Float64),
            list(list(DataType::Int8)),
            list(DataType::Struct(of.clone())),
            DataType::LargeList(field(DataType::Struct(of.clone()))),
            DataType::FixedSizeList(field(DataType::Int32), 3),
            DataType::Struct(of),
        ] {
            let schema: SchemaRef = Arc::new(Schema::new(vec![Field::new("x", list(data_type.clone()), true)]));
            let direct: SchemaRef = Arc::new(Schema::new(vec![Field::new("x", data_type, true)]));
            for schema in [schema, direct] {
                let rows = |rows: usize| {
                    let column = new_null_array(schema.field(0).data_type(), rows);
                    RecordBatch::try_new(Arc::clone(&schema), vec![column]).expect("a batch")
                };
                let stats = |count: usize| collect(&schema, &[], &[rows(count)]);
                assert_eq!(stats(3).len(), leaves(&schema).len(), "{schema}");
                if matches!(schema.field(0).data_type(), DataType::Struct(_)) {
                    continue; // A null struct's children are values that are null.
                }
                assert_eq!(stats(3), stats(0), "{schema}");
            }
        }
    }

    #[track_caller]
    fn check(array: ArrayRef, expected: Bounds, nulls: u64, nans: u64) {
        let schema = Arc::new(Schema::new(vec![Field::new("x", array.data_type().clone(), true)]));
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![array]).expect("batch");
        let stats = collect(&schema, &[], &[batch]);
        assert_eq!(stats[0].bounds, expected);
        assert_eq!(stats[0].nulls, nulls);
        assert_eq!(stats[0].nans, nans);
    }

    #[test]
    fn integers_beyond_2_to_the_53_keep_every_digit() {
        check(Arc::new(Int64Array::from(vec![i64::MAX - 1, i64::MAX])), Bounds::Int(i64::MAX - 1, i64::MAX), 0, 0);
    }

    #[test]
    fn nan_is_counted_and_is_no_bound() {
        let values = Float64Array::from(vec![Some(f64::NAN), Some(1.0), None, Some(-2.0)]);
        check(Arc::new(values), Bounds::Float(-2.0, 1.0), 1, 1);
    }

    #[test]
    fn only_nulls_or_nans_have_no_bounds() {
        check(Arc::new(Float64Array::from(vec![Some(f64::NAN), None])), Bounds::None, 1, 1);
    }

    #[test]
    fn an_empty_text_is_a_value() {
        let expected = Bounds::Text { min: String::new(), max: "b".into(), min_exact: true, max_exact: true };
        check(Arc::new(StringArray::from(vec![Some(""), Some("b"), None])), expected, 1, 0);
    }

    #[test]
    fn a_long_text_is_cut_below_and_rounded_up_above() {
        let long = "é".repeat(100);
        let cut = "é".repeat(32);
        let above = "é".repeat(31) + "ê";
        let expected = Bounds::Text { min: cut, max: above, min_exact: false, max_exact: false };
        check(Arc::new(StringArray::from(vec![long.as_str()])), expected, 0, 0);
    }

    #[test]
    fn inv_6_a_text_without_an_upper_bound_leaves_its_chunk_without_bounds() {
        let schema = Arc::new(Schema::new(vec![Field::new("t", DataType::Utf8, true)]));
        let last = "\u{10FFFF}".repeat(17);
        let batches = [last.as_str(), "a"].map(|text| {
            RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(StringArray::from(vec![text]))]).expect("a batch")
        });
        assert_eq!(collect(&schema, &[], &batches)[0].bounds, Bounds::None);
    }

    #[test]
    fn a_value_behind_a_null_struct_is_null() {
        let inner: ArrayRef = Arc::new(Int64Array::from(vec![1, 100]));
        let fields = Fields::from(vec![Field::new("v", DataType::Int64, true)]);
        let outer = StructArray::new(fields, vec![inner], Some(vec![true, false].into()));
        check(Arc::new(outer), Bounds::Int(1, 1), 1, 0);
    }

    #[test]
    fn lists_are_described_over_their_elements() {
        let lists = ListArray::from_iter_primitive::<Int64Type, _, _>(vec![
            Some(vec![Some(3), None]),
            None,
            Some(vec![Some(7)]),
        ]);
        check(Arc::new(lists), Bounds::Int(3, 7), 1, 0);
    }

    #[test]
    fn paths_walk_structs_with_dots_and_lists_with_a_mark() {
        let point = DataType::Struct(Fields::from(vec![Field::new("x", DataType::Float64, true)]));
        let list = DataType::List(Arc::new(Field::new("item", point.clone(), true)));
        let schema = Arc::new(Schema::new(vec![Field::new("p", point, true), Field::new("all", list, true)]));
        assert_eq!(leaves(&schema), ["p.x", "all[?].x"]);
    }
}
