//! What `plain.rs` makes is read back by Parquet's own reader: random nestings, and the corners by name.

use super::*;
use crate::chunk::{decode_all, encode_all};
use arrow::array::{
    ArrayRef, BooleanArray, FixedSizeBinaryBuilder, FixedSizeListArray, Float32Array, Int32Array, Int64Array,
    LargeBinaryArray, LargeListArray, ListArray, MapArray, RecordBatch, StringArray, StructArray,
};
use arrow::datatypes::{Fields, Schema, SchemaRef};
use std::sync::Arc;

/// Random nestings that are compared.
const NESTINGS: u64 = 400;

/// Marsaglia's xorshift: a seed gives the same nesting everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}

fn field(dice: &mut Dice, name: &str, depth: usize) -> Field {
    Field::new(name, data_type(dice, depth), dice.below(2) == 0)
}

fn data_type(dice: &mut Dice, depth: usize) -> DataType {
    let leaves = 10;
    match dice.below(if depth > 0 { leaves + 5 } else { leaves }) {
        0 => DataType::Boolean,
        1 => DataType::Int32,
        2 => DataType::Int64,
        3 => DataType::Float32,
        4 => DataType::Utf8,
        5 => DataType::LargeBinary,
        6 => DataType::FixedSizeBinary(3),
        7 => DataType::Float64,
        8 => DataType::Int8,
        9 => DataType::UInt16,
        10 => {
            let fields: Vec<Field> =
                (0..1 + dice.below(3)).map(|at| field(dice, &format!("c{at}"), depth - 1)).collect();
            DataType::Struct(Fields::from(fields))
        }
        11 => DataType::List(Arc::new(field(dice, "item", depth - 1))),
        12 => DataType::LargeList(Arc::new(field(dice, "item", depth - 1))),
        13 => {
            let size = dice.below(4) as i32;
            DataType::FixedSizeList(Arc::new(field(dice, "item", depth - 1)), size)
        }
        _ => {
            let key = Field::new("keys", DataType::Utf8, false);
            let entries = Fields::from(vec![key, field(dice, "values", depth - 1)]);
            DataType::Map(Arc::new(Field::new("entries", DataType::Struct(entries), false)), false)
        }
    }
}

/// All valid, all null, in long runs or by chance.
fn random_nulls(dice: &mut Dice, length: usize, nullable: bool) -> Option<NullBuffer> {
    let kind = dice.below(4);
    let valid: Vec<bool> = match kind {
        0 => return None,
        1 => vec![false; length],
        2 => (0..length).map(|at| at / 20 % 2 == 0).collect(),
        _ => (0..length).map(|_| dice.below(3) > 0).collect(),
    };
    nullable.then(|| NullBuffer::from(valid))
}

fn array(dice: &mut Dice, field: &Field, length: usize) -> ArrayRef {
    // Longer than needed: what comes in is often a slice.
    let (before, after) = (dice.below(3), dice.below(3));
    let all = before + length + after;
    let nulls = random_nulls(dice, all, field.is_nullable());
    let valid = |at: usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(at));
    let numbers: Vec<Option<usize>> = (0..all).map(|at| valid(at).then(|| dice.below(1000))).collect();
    let text = |number: usize| if number > 990 { "long ".repeat(2000) } else { format!("t{number}") };
    let made: ArrayRef = match field.data_type() {
        DataType::Boolean => Arc::new(numbers.iter().map(|n| n.map(|n| n % 2 == 0)).collect::<BooleanArray>()),
        DataType::Int32 => Arc::new(numbers.iter().map(|n| n.map(|n| n as i32 - 500)).collect::<Int32Array>()),
        DataType::Int64 => Arc::new(numbers.iter().map(|n| n.map(|n| n as i64 - 500)).collect::<Int64Array>()),
        DataType::Float32 => Arc::new(numbers.iter().map(|n| n.map(|n| n as f32 / 7.0)).collect::<Float32Array>()),
        DataType::Float64 => {
            Arc::new(numbers.iter().map(|n| n.map(|n| n as f64 / 7.0)).collect::<arrow::array::Float64Array>())
        }
        DataType::Int8 => Arc::new(numbers.iter().map(|n| n.map(|n| n as i8)).collect::<arrow::array::Int8Array>()),
        DataType::UInt16 => {
            Arc::new(numbers.iter().map(|n| n.map(|n| 65_535 - n as u16)).collect::<arrow::array::UInt16Array>())
        }
        DataType::Utf8 => Arc::new(numbers.iter().map(|n| n.map(text)).collect::<StringArray>()),
        DataType::LargeBinary => {
            Arc::new(numbers.iter().map(|n| n.map(|n| text(n).into_bytes())).collect::<LargeBinaryArray>())
        }
        DataType::FixedSizeBinary(width) => {
            let mut builder = FixedSizeBinaryBuilder::new(*width);
            for number in &numbers {
                match number {
                    Some(number) => builder.append_value([*number as u8, 7, (*number >> 8) as u8]).expect("width"),
                    None => builder.append_null(),
                }
            }
            Arc::new(builder.finish())
        }
        DataType::Struct(fields) => {
            let columns = fields.iter().map(|field| array(dice, field, all)).collect();
            Arc::new(StructArray::new(fields.clone(), columns, nulls))
        }
        DataType::List(item) => {
            let lengths: Vec<usize> = (0..all).map(|_| dice.below(4)).collect();
            let items = array(dice, item, lengths.iter().sum());
            Arc::new(ListArray::new(Arc::clone(item), OffsetBuffer::from_lengths(lengths), items, nulls))
        }
        DataType::LargeList(item) => {
            let lengths: Vec<usize> = (0..all).map(|_| dice.below(4)).collect();
            let items = array(dice, item, lengths.iter().sum());
            Arc::new(LargeListArray::new(Arc::clone(item), OffsetBuffer::from_lengths(lengths), items, nulls))
        }
        DataType::FixedSizeList(item, size) => {
            let items = array(dice, item, all * *size as usize);
            let list = FixedSizeListArray::try_new_with_length(Arc::clone(item), *size, items, nulls, all);
            Arc::new(list.expect("list"))
        }
        DataType::Map(entry, _) => {
            let DataType::Struct(fields) = entry.data_type() else { unreachable!("a map's entries") };
            let lengths: Vec<usize> = (0..all).map(|_| dice.below(3)).collect();
            let columns = fields.iter().map(|field| array(dice, field, lengths.iter().sum())).collect();
            let entries = StructArray::new(fields.clone(), columns, None);
            Arc::new(MapArray::new(Arc::clone(entry), OffsetBuffer::from_lengths(lengths), entries, nulls, false))
        }
        other => unreachable!("{other}"),
    };
    made.slice(before, length)
}

fn batches(dice: &mut Dice, schema: &SchemaRef) -> Vec<RecordBatch> {
    let batch = |dice: &mut Dice| {
        let rows = dice.below(60);
        let columns = schema.fields().iter().map(|field| array(dice, field, rows)).collect();
        RecordBatch::try_new(Arc::clone(schema), columns).expect("batch")
    };
    (0..1 + dice.below(4)).map(|_| batch(dice)).collect()
}

#[test]
fn parquets_own_reader_gives_back_the_rows_of_400_random_nestings() {
    for seed in 1..=NESTINGS {
        let mut dice = Dice(seed * 0x9E37_79B9);
        let fields: Vec<Field> = (0..1 + dice.below(3)).map(|at| field(&mut dice, &format!("f{at}"), 3)).collect();
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let batches = batches(&mut dice, &schema);
        let expected = arrow::compute::concat_batches(&schema, &batches).expect("concat");
        let (encoder, bytes, columns) = encode_all(&schema, &batches).expect("encode");
        assert!(encoder.is_plain(), "seed {seed}: {schema}");
        let back = decode_all(&schema, &encoder, bytes, &columns, expected.num_rows()).expect("decode");
        assert_eq!(back, expected, "seed {seed}");
    }
}

#[test]
fn values_of_a_column_without_nulls_are_not_copied() {
    let column: ArrayRef = Arc::new(Int64Array::from_iter_values(0..10_000));
    let schema = Schema::new(vec![Field::new("t", DataType::Int64, false)]);
    let descriptor = parquet::arrow::ArrowSchemaConverter::new().convert(&schema).expect("convert");
    let leaves = leaves(schema.field(0), descriptor.columns()).expect("plain");
    let mut page = Page::default();
    Column::new(&leaves[0], &column).expect("column").add(0..10_000, &mut page).expect("add");
    let mut pieces = Vec::new();
    page.finish(&leaves[0], &mut pieces).expect("finish");
    let Piece::Page(values) = &pieces[1] else { panic!("a page in two parts") };
    assert_eq!(values.as_ptr(), column.to_data().buffers()[0].as_ptr());
    assert_eq!(values.len(), 80_000);
}

#[test]
fn a_null_in_a_required_field_is_an_error() {
    let schema = Schema::new(vec![Field::new("t", DataType::Int64, false)]);
    let descriptor = parquet::arrow::ArrowSchemaConverter::new().convert(&schema).expect("convert");
    let leaves = leaves(schema.field(0), descriptor.columns()).expect("plain");
    let column: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
    let added = Column::new(&leaves[0], &column).expect("column").add(0..2, &mut Page::default());
    assert!(added.expect_err("refused").to_string().contains("a null"), "it says what is wrong");
}
