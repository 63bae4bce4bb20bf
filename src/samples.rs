//! Batches for tests.

use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, FixedSizeListArray, Int8Array, LargeListArray, ListArray, MapBuilder, RecordBatch,
    StringArray, StringBuilder, StructArray,
};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Int64Type, IntervalUnit, Schema, TimeUnit};
use std::sync::Arc;

/// Columns of every type without dictionaries, views and unions, some of their values null.
pub(crate) fn every_type(rows: usize) -> RecordBatch {
    let some = |row: usize| (!row.is_multiple_of(3)).then_some(row);
    let small: ArrayRef = Arc::new((0..rows).map(|row| some(row).map(|row| (row % 100) as i8)).collect::<Int8Array>());
    let mut columns: Vec<ArrayRef> = Vec::new();
    let zone = Some("Europe/Berlin".into());
    for data_type in [
        DataType::Int8,
        DataType::Int16,
        DataType::Int32,
        DataType::Int64,
        DataType::UInt8,
        DataType::UInt16,
        DataType::UInt32,
        DataType::UInt64,
        DataType::Float16,
        DataType::Float32,
        DataType::Float64,
        DataType::Decimal32(5, 2),
        DataType::Decimal64(12, 3),
        DataType::Decimal128(30, -4),
        DataType::Decimal256(50, 0),
        DataType::Boolean,
        DataType::Utf8,
        DataType::LargeUtf8,
    ] {
        columns.push(cast(&small, &data_type).expect("numbers of another type"));
    }
    let wide = cast(&small, &DataType::Int64).expect("numbers");
    let narrow = cast(&small, &DataType::Int32).expect("numbers");
    for data_type in [
        DataType::Timestamp(TimeUnit::Second, None),
        DataType::Timestamp(TimeUnit::Nanosecond, zone),
        DataType::Duration(TimeUnit::Millisecond),
        DataType::Time64(TimeUnit::Microsecond),
        DataType::Date64,
    ] {
        columns.push(cast(&wide, &data_type).expect("times"));
    }
    for data_type in [DataType::Time32(TimeUnit::Second), DataType::Date32, DataType::Interval(IntervalUnit::YearMonth)]
    {
        columns.push(cast(&narrow, &data_type).expect("times"));
    }
    let text: ArrayRef = Arc::new(StringArray::from_iter((0..rows).map(|row| some(row).map(|row| "x".repeat(row)))));
    columns.push(cast(&text, &DataType::Binary).expect("bytes"));
    columns.push(cast(&text, &DataType::LargeBinary).expect("bytes"));
    let fixed = (0..rows).map(|row| some(row).map(|row| [row as u8; 5]));
    columns.push(Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(fixed, 5).expect("fixed")));
    let lists = || (0..rows).map(|row| some(row).map(|row| (0..row % 4).map(|at| some(at).map(|at| at as i64))));
    columns.push(Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(lists())));
    columns.push(Arc::new(LargeListArray::from_iter_primitive::<Int64Type, _, _>(lists())));
    let pairs = (0..rows).map(|row| some(row).map(|row| vec![Some(row as i64), None]));
    columns.push(Arc::new(FixedSizeListArray::from_iter_primitive::<Int64Type, _, _>(pairs, 2)));
    let mut map = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    for row in 0..rows {
        map.keys().append_value("key");
        map.values().append_option(some(row).map(|_| "value"));
        map.append(row % 2 == 0).expect("a row");
    }
    columns.push(Arc::new(map.finish()));
    let field = |(at, array): (usize, &ArrayRef)| Field::new(format!("c{at}"), array.data_type().clone(), true);
    let fields: Vec<Field> = columns.iter().enumerate().map(field).collect();
    let nulls = NullBuffer::from((0..rows).map(|row| row % 5 > 0).collect::<Vec<_>>());
    columns.push(Arc::new(StructArray::new(fields.clone().into(), columns.clone(), Some(nulls))));
    let fields: Vec<Field> = columns.iter().enumerate().map(field).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).expect("columns of one length")
}
