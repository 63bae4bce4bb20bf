//! The row by row answer: which rows of a batch match a bound expression.
//!
//! The batch has the stored schema, or what is left of it when only the needed columns were read.
//! Guarantees: agrees with the statistics by construction where both compute the same thing (norms,
//! longitudes, widths of floats come from the same functions).

use crate::query::Choice;
use crate::query::plan::{Bound, Leaf, Target};
use crate::query::test::Typed;
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, Float64Array, PrimitiveArray, RecordBatch,
};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::{
    DataType, Decimal128Type, DurationMicrosecondType, DurationMillisecondType, DurationNanosecondType,
    DurationSecondType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, TimeUnit,
    TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use storage::StorageError;
use storage::chunk::stats::{norm, struct_child, wrap_longitude};
use storage::schema::flat_leaf;

/// The rows of a batch that match.
pub(crate) fn matching(bound: &Bound, batch: &RecordBatch) -> Result<BooleanBuffer, StorageError> {
    let rows = batch.num_rows();
    Ok(match bound {
        Bound::Always(true) => BooleanBuffer::new_set(rows),
        Bound::Always(false) => BooleanBuffer::new_unset(rows),
        Bound::Leaf(leaf) => leaf_rows(leaf, batch)?,
        Bound::And(all) => {
            let mut rows = BooleanBuffer::new_set(rows);
            for bound in all {
                rows = &rows & &matching(bound, batch)?;
            }
            rows
        }
        Bound::Or(all) => {
            let mut rows = BooleanBuffer::new_unset(rows);
            for bound in all {
                rows = &rows | &matching(bound, batch)?;
            }
            rows
        }
        Bound::Not(inner) => !&matching(inner, batch)?,
    })
}

fn missing(path: &str) -> StorageError {
    StorageError::Decode { what: "chunk", text: format!("column `{path}` is not in what was read") }
}

fn leaf_rows(leaf: &Leaf, batch: &RecordBatch) -> Result<BooleanBuffer, StorageError> {
    let rows = batch.num_rows();
    match &leaf.target {
        Target::Field(path) => {
            let array = flat_leaf(batch, path).ok_or_else(|| missing(path))?;
            match &leaf.typed {
                Typed::List { items, equal } => list_rows(&array, items, *equal),
                typed => values(typed, &array),
            }
        }
        Target::Elements { list, choice, inner } => {
            let array = flat_leaf(batch, list).ok_or_else(|| missing(list))?;
            let lists = Lists::of(&array).ok_or_else(|| missing(list))?;
            let elements = lists.descend(inner.as_deref()).ok_or_else(|| missing(list))?;
            let fits = values(&leaf.typed, &elements)?;
            Ok(BooleanBuffer::collect_bool(rows, |row| {
                let mut range = lists.range(row);
                match choice {
                    Choice::Any => range.any(|at| fits.value(at)),
                    Choice::All => !range.is_empty() && range.all(|at| fits.value(at)),
                    Choice::At(position) => range.nth(*position).is_some_and(|at| fits.value(at)),
                }
            }))
        }
        Target::Norm(of) => {
            let axes = of
                .iter()
                .map(|path| floats(&flat_leaf(batch, path).ok_or_else(|| missing(path))?))
                .collect::<Result<Vec<_>, _>>()?;
            let [x, y, z] = axes.as_slice() else { return Err(missing("norm")) };
            let norms: Float64Array = (0..rows)
                .map(|row| {
                    let there = x.is_valid(row) && y.is_valid(row) && z.is_valid(row);
                    there.then(|| norm(x.value(row), y.value(row), z.value(row)))
                })
                .collect();
            values(&leaf.typed, &(std::sync::Arc::new(norms) as ArrayRef))
        }
        Target::Position { latitude, longitude } => {
            let Typed::Within(wanted) = &leaf.typed else { return Err(missing("position")) };
            let latitude = floats(&flat_leaf(batch, latitude).ok_or_else(|| missing(latitude))?)?;
            let longitude = floats(&flat_leaf(batch, longitude).ok_or_else(|| missing(longitude))?)?;
            Ok(BooleanBuffer::collect_bool(rows, |row| {
                latitude.is_valid(row)
                    && longitude.is_valid(row)
                    && wanted.holds(latitude.value(row), wrap_longitude(longitude.value(row)))
            }))
        }
    }
}

fn floats(array: &ArrayRef) -> Result<Float64Array, StorageError> {
    if !array.data_type().is_numeric() {
        return Err(unexpected(array.data_type()));
    }
    Ok(arrow::compute::cast(array, &DataType::Float64)?.as_primitive::<Float64Type>().clone())
}

/// The lists of a column, whatever their layout.
struct Lists {
    values: ArrayRef,
    /// Start and end in `values` for each row; empty for a null.
    ranges: Vec<(usize, usize)>,
    nulls: Option<arrow::buffer::NullBuffer>,
}

impl Lists {
    fn of(array: &ArrayRef) -> Option<Self> {
        let (values, mut ranges): (ArrayRef, Vec<(usize, usize)>) = match array.data_type() {
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                let offsets = list.value_offsets();
                (list.values().clone(), offsets.windows(2).map(|pair| (pair[0] as usize, pair[1] as usize)).collect())
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                let offsets = list.value_offsets();
                (list.values().clone(), offsets.windows(2).map(|pair| (pair[0] as usize, pair[1] as usize)).collect())
            }
            DataType::FixedSizeList(_, size) => {
                let list = array.as_fixed_size_list();
                let size = usize::try_from(*size).ok()?;
                (list.values().clone(), (0..list.len()).map(|row| (row * size, (row + 1) * size)).collect())
            }
            _ => return None,
        };
        for (row, range) in ranges.iter_mut().enumerate() {
            if array.is_null(row) {
                *range = (0, 0);
            }
        }
        Some(Self { values, ranges, nulls: array.nulls().cloned() })
    }

    fn range(&self, row: usize) -> std::ops::Range<usize> {
        let (start, end) = self.ranges.get(row).copied().unwrap_or((0, 0));
        start..end
    }

    /// The elements, or a field inside of them, with the nulls of the structs on the way.
    fn descend(&self, inner: Option<&str>) -> Option<ArrayRef> {
        match inner {
            None => Some(self.values.clone()),
            Some(inner) => struct_child(&self.values, inner),
        }
    }
}

fn list_rows(array: &ArrayRef, items: &[Typed], equal: bool) -> Result<BooleanBuffer, StorageError> {
    let lists = Lists::of(array).ok_or_else(|| missing("list"))?;
    let fits = items.iter().map(|item| values(item, &lists.values)).collect::<Result<Vec<_>, _>>()?;
    Ok(BooleanBuffer::collect_bool(array.len(), |row| {
        let range = lists.range(row);
        let same = range.len() == items.len() && range.zip(&fits).all(|(at, fits)| fits.value(at));
        lists.nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row)) && same == equal
    }))
}

/// Which values satisfy a comparison; a null satisfies none but the question for nulls.
fn values(typed: &Typed, array: &ArrayRef) -> Result<BooleanBuffer, StorageError> {
    let length = array.len();
    let nulls = array.logical_nulls();
    let valid = |at: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(at));
    Ok(match typed {
        Typed::Present(wanted) => BooleanBuffer::collect_bool(length, |at| valid(at) == *wanted),
        Typed::Int(ranges) => {
            let holds = |value: i128| ranges.holds(&value);
            match array.data_type() {
                DataType::Int8 => ints::<Int8Type>(array, 1, &holds),
                DataType::Int16 => ints::<Int16Type>(array, 1, &holds),
                DataType::Int32 => ints::<Int32Type>(array, 1, &holds),
                DataType::Int64 => ints::<Int64Type>(array, 1, &holds),
                DataType::UInt8 => ints::<UInt8Type>(array, 1, &holds),
                DataType::UInt16 => ints::<UInt16Type>(array, 1, &holds),
                DataType::UInt32 => ints::<UInt32Type>(array, 1, &holds),
                DataType::UInt64 => ints::<UInt64Type>(array, 1, &holds),
                DataType::Timestamp(unit, _) => match unit {
                    TimeUnit::Second => ints::<TimestampSecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Millisecond => ints::<TimestampMillisecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Microsecond => ints::<TimestampMicrosecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Nanosecond => ints::<TimestampNanosecondType>(array, nanoseconds(*unit), &holds),
                },
                DataType::Duration(unit) => match unit {
                    TimeUnit::Second => ints::<DurationSecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Millisecond => ints::<DurationMillisecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Microsecond => ints::<DurationMicrosecondType>(array, nanoseconds(*unit), &holds),
                    TimeUnit::Nanosecond => ints::<DurationNanosecondType>(array, nanoseconds(*unit), &holds),
                },
                DataType::Decimal128(_, _) => ints::<Decimal128Type>(array, 1, &holds),
                other => return Err(unexpected(other)),
            }
        }
        Typed::Float(ranges) => {
            let holds = |value: f64| if value.is_nan() { ranges.nan } else { ranges.holds(&value) };
            match array.data_type() {
                DataType::Float16 => primitives(array.as_primitive::<Float16Type>(), |value| holds(value.into())),
                DataType::Float32 => primitives(array.as_primitive::<Float32Type>(), |value| holds(value.into())),
                DataType::Float64 => primitives(array.as_primitive::<Float64Type>(), holds),
                other => return Err(unexpected(other)),
            }
        }
        Typed::Text(ranges) => texts(array, &|text| ranges.holds(&text.to_owned()))?,
        Typed::Pattern(pattern) => texts(array, &|text| pattern.holds(text))?,
        Typed::Bool { on_true, on_false } => {
            let flags: &BooleanArray = array.as_boolean_opt().ok_or_else(|| unexpected(array.data_type()))?;
            BooleanBuffer::collect_bool(length, |at| valid(at) && if flags.value(at) { *on_true } else { *on_false })
        }
        Typed::List { .. } | Typed::Within(_) => return Err(unexpected(array.data_type())),
    })
}

fn unexpected(data_type: &DataType) -> StorageError {
    StorageError::Decode { what: "chunk", text: format!("a column came with the unexpected type {data_type}") }
}

fn nanoseconds(unit: TimeUnit) -> i64 {
    match unit {
        TimeUnit::Second => 1_000_000_000,
        TimeUnit::Millisecond => 1_000_000,
        TimeUnit::Microsecond => 1_000,
        TimeUnit::Nanosecond => 1,
    }
}

fn primitives<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>, holds: impl Fn(T::Native) -> bool) -> BooleanBuffer {
    let all = array.values();
    let fits = BooleanBuffer::collect_bool(all.len(), |at| holds(all[at]));
    match array.nulls() {
        Some(nulls) => &fits & nulls.inner(),
        None => fits,
    }
}

/// Integers in `unit`s, saturated like the statistics where a time does not fit 64 bits.
fn ints<T: ArrowPrimitiveType>(array: &ArrayRef, unit: i64, holds: &dyn Fn(i128) -> bool) -> BooleanBuffer
where
    T::Native: Into<i128>,
{
    primitives(array.as_primitive::<T>(), |value| {
        let value: i128 = value.into();
        let scaled = value.saturating_mul(i128::from(unit));
        let in_range = scaled.clamp(i128::from(i64::MIN), i128::from(i64::MAX));
        holds(if unit == 1 { value } else { in_range })
    })
}

fn texts(array: &ArrayRef, holds: &dyn Fn(&str) -> bool) -> Result<BooleanBuffer, StorageError> {
    let fits = |text: Option<&str>| text.is_some_and(holds);
    Ok(match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().iter().map(fits).collect(),
        DataType::LargeUtf8 => array.as_string::<i64>().iter().map(fits).collect(),
        DataType::Utf8View => array.as_string_view().iter().map(fits).collect(),
        other => return Err(unexpected(other)),
    })
}
