//! The engine against brute force: random schemas, rows over several chunks, and random questions.
//!
//! Guarantees (INV-6), in each of [`CASES`] cases: every row's answer read from an encoded chunk, its
//! needed columns only, equals that of a plain evaluation over the values as they were made; a chunk
//! that the packed index rules out, read anyway, has no matching row, and one it proves has no other.
//! The plain evaluation shares no code with the engine below the JSON of the question.

use crate::query::parse;
use crate::query::plan::{Verdict, bind};
use crate::query::refine::matching;
use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Decimal128Array, FixedSizeListArray, Float32Array, Float64Array, Int8Array,
    Int64Array, ListArray, RecordBatch, StringArray, StructArray, UInt64Array,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::sync::Arc;
use storage::catalog::skip::SkipBlock;
use storage::chunk::decode::{ChunkBytes, RowGroup, decode_leaves};
use storage::chunk::stats::{FieldStats, collect};
use storage::chunk::{Compression, Piece, TopicEncoder};
use storage::ontology::{Ontology, Origin};

/// Cases of a run.
const CASES: u32 = 10_000;

/// The kinds of columns, each nullable.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    I8,
    I64,
    U64,
    F32,
    F64,
    Flag,
    Text,
    /// Two digits behind the point.
    Cents,
    Blob,
    Ints,
    Pair,
    Points,
    Vector,
    Place,
    Deep,
}

const KINDS: [Kind; 15] = [
    Kind::I8,
    Kind::I64,
    Kind::U64,
    Kind::F32,
    Kind::F64,
    Kind::Flag,
    Kind::Text,
    Kind::Cents,
    Kind::Blob,
    Kind::Ints,
    Kind::Pair,
    Kind::Points,
    Kind::Vector,
    Kind::Place,
    Kind::Deep,
];

/// A value as it was made.
#[derive(Debug, Clone, PartialEq)]
enum Made {
    Null,
    Int(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    Blob(Vec<u8>),
    List(Vec<Made>),
    Struct(Vec<Made>),
}

/// A question of the test.
#[derive(Debug, Clone)]
enum Ask {
    Leaf { column: usize, place: usize, op: &'static str, literals: Vec<Value> },
    All(Vec<Ask>),
    Any(Vec<Ask>),
    Not(Box<Ask>),
}

fn ints() -> impl Strategy<Value = i128> {
    prop::sample::select(vec![
        i128::from(i64::MIN),
        -3,
        -1,
        0,
        1,
        2,
        7,
        (1 << 53) - 1,
        1 << 53,
        (1 << 53) + 1,
        i128::from(i64::MAX) - 1,
        i128::from(i64::MAX),
    ])
}

fn floats() -> impl Strategy<Value = f64> {
    prop::sample::select(vec![
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        -0.0,
        0.0,
        0.1,
        1.0,
        1.5,
        -2.0,
        9_007_199_254_740_992.0,
        9_007_199_254_740_994.0,
    ])
}

fn texts() -> impl Strategy<Value = String> {
    let long = "x".repeat(90);
    prop::sample::select(vec![
        String::new(),
        "a".to_owned(),
        "ab".to_owned(),
        "b".to_owned(),
        "é1".to_owned(),
        "\u{10FFFF}".to_owned(),
        format!("{long}1"),
        format!("{long}2"),
    ])
}

fn made(kind: Kind) -> BoxedStrategy<Made> {
    let float = || prop_oneof![1 => Just(Made::Null), 9 => floats().prop_map(Made::Float)];
    let small = || prop_oneof![1 => Just(Made::Null), 6 => (-2_i128..4).prop_map(Made::Int)];
    let text = || prop_oneof![1 => Just(Made::Null), 6 => texts().prop_map(Made::Text)];
    let value = match kind {
        Kind::I8 => (-4_i128..5).prop_map(Made::Int).boxed(),
        Kind::I64 => ints().prop_map(Made::Int).boxed(),
        Kind::U64 => {
            prop_oneof![0_i128..4, Just(i128::from(u64::MAX)), Just((1_i128 << 53) + 1)].prop_map(Made::Int).boxed()
        }
        Kind::F32 => floats().prop_map(|value| Made::Float(f64::from(value as f32))).boxed(),
        Kind::F64 => floats().prop_map(Made::Float).boxed(),
        Kind::Flag => any::<bool>().prop_map(Made::Flag).boxed(),
        Kind::Text => texts().prop_map(Made::Text).boxed(),
        Kind::Cents => (-300_i128..300).prop_map(Made::Int).boxed(),
        Kind::Blob => Just(Made::Blob(vec![1, 2, 3])).boxed(),
        Kind::Ints => prop::collection::vec(small(), 0..4).prop_map(Made::List).boxed(),
        Kind::Pair => prop::collection::vec(float(), 2).prop_map(Made::List).boxed(),
        Kind::Points => prop::collection::vec(
            prop_oneof![1 => Just(Made::Null), 6 => (small(), text()).prop_map(|(a, s)| Made::Struct(vec![a, s]))],
            0..3,
        )
        .prop_map(Made::List)
        .boxed(),
        Kind::Vector => (float(), float(), float()).prop_map(|(x, y, z)| Made::Struct(vec![x, y, z])).boxed(),
        Kind::Place => {
            let degrees = |choices: Vec<f64>| prop_oneof![1 => Just(Made::Null), 9 => prop::sample::select(choices).prop_map(Made::Float)];
            (
                degrees(vec![-90.0, 0.0, 45.0, 45.5, f64::NAN]),
                degrees(vec![-180.0, -179.0, 0.0, 9.0, 179.0, 180.0, 189.0]),
            )
                .prop_map(|(latitude, longitude)| Made::Struct(vec![latitude, longitude]))
                .boxed()
        }
        Kind::Deep => {
            let inner = prop_oneof![1 => Just(Made::Null), 5 => small().prop_map(|v| Made::Struct(vec![v]))];
            inner.prop_map(|inner| Made::Struct(vec![inner])).boxed()
        }
    };
    prop_oneof![1 => Just(Made::Null), 5 => value].boxed()
}

fn data_type(kind: Kind) -> DataType {
    let fields = |fields: &[(&str, DataType)]| {
        DataType::Struct(fields.iter().map(|(name, of)| Field::new(*name, of.clone(), true)).collect())
    };
    match kind {
        Kind::I8 => DataType::Int8,
        Kind::I64 => DataType::Int64,
        Kind::U64 => DataType::UInt64,
        Kind::F32 => DataType::Float32,
        Kind::F64 => DataType::Float64,
        Kind::Flag => DataType::Boolean,
        Kind::Text => DataType::Utf8,
        Kind::Cents => DataType::Decimal128(10, 2),
        Kind::Blob => DataType::Binary,
        Kind::Ints => DataType::List(Arc::new(Field::new("item", DataType::Int64, true))),
        Kind::Pair => DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Float64, true)), 2),
        Kind::Points => {
            DataType::List(Arc::new(Field::new("item", fields(&[("a", DataType::Int64), ("s", DataType::Utf8)]), true)))
        }
        Kind::Vector => fields(&[("x", DataType::Float64), ("y", DataType::Float64), ("z", DataType::Float64)]),
        Kind::Place => fields(&[("latitude", DataType::Float64), ("longitude", DataType::Float64)]),
        Kind::Deep => fields(&[("inner", fields(&[("v", DataType::Int64)]))]),
    }
}

/// What can be asked of a column: a path, and what is compared with it.
fn places(kind: Kind) -> Vec<(&'static str, Kind)> {
    match kind {
        Kind::Ints => vec![("", Kind::Ints), ("[?]", Kind::I64), ("[!]", Kind::I64), ("[1]", Kind::I64)],
        Kind::Pair => vec![("", Kind::Pair), ("[?]", Kind::F64), ("[!]", Kind::F64), ("[0]", Kind::F64)],
        Kind::Points => vec![("[?].a", Kind::I64), ("[!].a", Kind::I64), ("[0].s", Kind::Text), ("[?].s", Kind::Text)],
        Kind::Vector => vec![(".x", Kind::F64), (".norm", Kind::F64), ("", Kind::Blob)],
        Kind::Place => vec![(".latitude", Kind::F64), ("", Kind::Place)],
        Kind::Deep => vec![(".inner.v", Kind::I64), (".inner", Kind::Blob), ("", Kind::Blob), (".absent", Kind::Blob)],
        other => vec![("", other)],
    }
}

fn number(kind: Kind) -> BoxedStrategy<Value> {
    match kind {
        Kind::Cents => (-3500_i64..3500).prop_map(|thousandths| json!(thousandths as f64 / 1000.0)).boxed(),
        Kind::Text => texts().prop_map(|text| json!(text)).boxed(),
        Kind::Flag => any::<bool>().prop_map(|flag| json!(flag)).boxed(),
        _ => prop_oneof![
            ints().prop_map(|value| json!(i64::try_from(value).unwrap_or(0))),
            (-4_i64..5).prop_map(|value| json!(value)),
            Just(json!(u64::MAX)),
            floats()
                .prop_filter("JSON has finite numbers only", |value| value.is_finite())
                .prop_map(|value| json!(value)),
        ]
        .boxed(),
    }
}

fn leaf(column: usize, kind: Kind) -> BoxedStrategy<Ask> {
    let places = places(kind);
    (0..places.len())
        .prop_flat_map(move |place| {
            let of = places[place].1;
            let ops: Vec<&'static str> = match of {
                Kind::Blob => vec!["$ex", "$nex"],
                Kind::Ints | Kind::Pair => vec!["list$eq", "list$neq", "$ex", "$nex"],
                Kind::Place => vec!["$within"],
                Kind::Flag => vec!["$eq", "$neq", "$in", "$ex", "$nex"],
                Kind::Text => vec![
                    "$eq", "$neq", "$lt", "$leq", "$gt", "$geq", "$between", "$outside", "$in", "$match", "$ex", "$nex",
                ],
                _ => {
                    vec!["$eq", "$neq", "$lt", "$leq", "$gt", "$geq", "$between", "$outside", "$in", "$ex", "$nex"]
                }
            };
            (prop::sample::select(ops), prop::collection::vec(number(of), 4), 0_usize..5).prop_map(
                move |(op, mut literals, pick)| {
                    match op {
                        "$match" => {
                            let pattern = ["a*", "*1", "?", "[a-b]*", "x*2"][pick];
                            literals = vec![json!(pattern)];
                        }
                        "$within" => {
                            let corners = [
                                [-90.0, -180.0, 90.0, 180.0],
                                [44.0, 8.0, 46.0, 10.0],
                                [-1.0, 170.0, 50.0, -170.0],
                                [45.5, 0.0, 45.5, 180.0],
                                [-90.0, -180.0, 0.0, -179.0],
                            ];
                            literals = corners[pick].iter().map(|corner| json!(corner)).collect();
                        }
                        "list$eq" | "list$neq" => {
                            literals = [vec![], vec![0], vec![1, 2], vec![0, 0], vec![1, 1]][pick]
                                .iter()
                                .map(|value: &i32| json!(value))
                                .collect();
                        }
                        "$between" | "$outside" => {
                            literals.truncate(2);
                            literals.sort_by(compare_literals);
                        }
                        "$in" => literals.truncate(1 + pick % 3),
                        _ => literals.truncate(1),
                    }
                    Ask::Leaf { column, place, op, literals }
                },
            )
        })
        .boxed()
}

fn compare_literals(a: &Value, b: &Value) -> Ordering {
    match (a, b) {
        (Value::String(a), Value::String(b)) => a.cmp(b),
        (Value::Number(a), Value::Number(b)) => exact(a).compare(&exact(b)).unwrap_or(Ordering::Equal),
        _ => Ordering::Equal,
    }
}

fn ask(kinds: &[Kind]) -> BoxedStrategy<Ask> {
    let kinds = kinds.to_vec();
    let leaf = (0..kinds.len()).prop_flat_map(move |column| leaf(column, kinds[column]));
    leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..3).prop_map(Ask::All),
            prop::collection::vec(inner.clone(), 1..3).prop_map(Ask::Any),
            inner.prop_map(|ask| Ask::Not(Box::new(ask))),
        ]
    })
    .boxed()
}

#[derive(Debug, Clone)]
struct Case {
    kinds: Vec<Kind>,
    /// Chunks of rows of values.
    chunks: Vec<Vec<Vec<Made>>>,
    ask: Ask,
}

fn case() -> impl Strategy<Value = Case> {
    prop::collection::vec(prop::sample::select(KINDS.to_vec()), 1..4).prop_flat_map(|kinds| {
        let row: Vec<BoxedStrategy<Made>> = kinds.iter().map(|kind| made(*kind)).collect();
        // Half of the chunks vary little, so that bounds prove and rule out something.
        let flat = (row.clone(), 1_usize..4).prop_map(|(row, times)| vec![row; times]);
        let mixed = prop::collection::vec(row, 0..6);
        let chunks = prop::collection::vec(prop_oneof![flat, mixed], 1..6);
        (chunks, ask(&kinds)).prop_map(move |(chunks, ask)| Case { kinds: kinds.clone(), chunks, ask })
    })
}

// --- the rows as Arrow ---

fn array(kind_type: &DataType, values: &[Made]) -> ArrayRef {
    let int = |value: &Made| if let Made::Int(value) = value { Some(*value) } else { None };
    let float = |value: &Made| if let Made::Float(value) = value { Some(*value) } else { None };
    let text = |value: &Made| if let Made::Text(value) = value { Some(value.clone()) } else { None };
    let nulls = || NullBuffer::from_iter(values.iter().map(|value| *value != Made::Null));
    match kind_type {
        DataType::Int8 => {
            Arc::new(values.iter().map(|v| int(v).and_then(|v| i8::try_from(v).ok())).collect::<Int8Array>())
        }
        DataType::Int64 => {
            Arc::new(values.iter().map(|v| int(v).and_then(|v| i64::try_from(v).ok())).collect::<Int64Array>())
        }
        DataType::UInt64 => {
            Arc::new(values.iter().map(|v| int(v).and_then(|v| u64::try_from(v).ok())).collect::<UInt64Array>())
        }
        DataType::Decimal128(precision, scale) => {
            let array: Decimal128Array = values.iter().map(int).collect();
            Arc::new(array.with_precision_and_scale(*precision, *scale).expect("fits"))
        }
        DataType::Float32 => Arc::new(values.iter().map(|v| float(v).map(|v| v as f32)).collect::<Float32Array>()),
        DataType::Float64 => Arc::new(values.iter().map(float).collect::<Float64Array>()),
        DataType::Boolean => Arc::new(
            values.iter().map(|v| if let Made::Flag(flag) = v { Some(*flag) } else { None }).collect::<BooleanArray>(),
        ),
        DataType::Utf8 => Arc::new(values.iter().map(text).collect::<StringArray>()),
        DataType::Binary => Arc::new(
            values
                .iter()
                .map(|v| if let Made::Blob(bytes) = v { Some(bytes.clone()) } else { None })
                .collect::<BinaryArray>(),
        ),
        DataType::List(item) => {
            let lists: Vec<Vec<Made>> = values.iter().map(elements).collect();
            let offsets = OffsetBuffer::from_lengths(lists.iter().map(Vec::len));
            let all: Vec<Made> = lists.concat();
            Arc::new(ListArray::new(Arc::clone(item), offsets, array(item.data_type(), &all), Some(nulls())))
        }
        DataType::FixedSizeList(item, size) => {
            let filler = vec![Made::Null; usize::try_from(*size).expect("small")];
            let all: Vec<Made> = values
                .iter()
                .flat_map(|value| if *value == Made::Null { filler.clone() } else { elements(value) })
                .collect();
            Arc::new(FixedSizeListArray::new(Arc::clone(item), *size, array(item.data_type(), &all), Some(nulls())))
        }
        DataType::Struct(fields) => Arc::new(structs(fields, values, nulls())),
        other => panic!("no such kind: {other}"),
    }
}

fn elements(value: &Made) -> Vec<Made> {
    if let Made::List(items) = value { items.clone() } else { Vec::new() }
}

fn structs(fields: &Fields, values: &[Made], nulls: NullBuffer) -> StructArray {
    let columns = fields
        .iter()
        .enumerate()
        .map(|(index, field)| {
            let children: Vec<Made> = values
                .iter()
                .map(|value| if let Made::Struct(children) = value { children[index].clone() } else { Made::Null })
                .collect();
            array(field.data_type(), &children)
        })
        .collect();
    StructArray::new(fields.clone(), columns, Some(nulls))
}

// --- the plain evaluation ---

/// A number that is compared without rounding.
#[derive(Debug, Clone, Copy)]
enum Exact {
    Int(i128),
    Float(f64),
}

fn exact(number: &serde_json::Number) -> Exact {
    match (number.as_i64(), number.as_u64()) {
        (Some(value), _) => Exact::Int(i128::from(value)),
        (None, Some(value)) => Exact::Int(i128::from(value)),
        (None, None) => Exact::Float(number.as_f64().expect("a number")),
    }
}

impl Exact {
    fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Int(a), Self::Int(b)) => Some(a.cmp(b)),
            (Self::Float(a), Self::Float(b)) => a.partial_cmp(b),
            (Self::Int(a), Self::Float(b)) => int_with_float(*a, *b),
            (Self::Float(a), Self::Int(b)) => int_with_float(*b, *a).map(Ordering::reverse),
        }
    }
}

fn int_with_float(a: i128, b: f64) -> Option<Ordering> {
    if b.is_nan() {
        return None;
    }
    if b.abs() > 1e30 {
        return Some(if b > 0.0 { Ordering::Less } else { Ordering::Greater });
    }
    let whole = b.floor();
    Some(a.cmp(&(whole as i128)).then(if b > whole { Ordering::Less } else { Ordering::Equal }))
}

/// How a value compares with a literal; `None` if it does not.
fn compare(value: &Made, literal: &Value, kind: Kind) -> Option<Ordering> {
    match (value, literal) {
        (Made::Int(cents), Value::Number(number)) if kind == Kind::Cents => {
            let thousandths = (number.as_f64().expect("a number") * 1000.0).round();
            Some((cents * 10).cmp(&(thousandths as i128)))
        }
        (Made::Int(value), Value::Number(number)) => Exact::Int(*value).compare(&exact(number)),
        (Made::Float(value), Value::Number(number)) if kind == Kind::F32 => {
            value.partial_cmp(&f64::from(number.as_f64().expect("a number") as f32))
        }
        (Made::Float(value), Value::Number(number)) => Exact::Float(*value).compare(&exact(number)),
        (Made::Text(value), Value::String(text)) => Some(value.as_str().cmp(text)),
        (Made::Flag(value), Value::Bool(flag)) => Some(value.cmp(flag)),
        _ => None,
    }
}

fn is_nan(value: &Made) -> bool {
    matches!(value, Made::Float(value) if value.is_nan())
}

/// The patterns of this test, by hand.
fn fits(pattern: &str, text: &str) -> bool {
    match pattern {
        "a*" => text.starts_with('a'),
        "*1" => text.ends_with('1'),
        "?" => text.chars().count() == 1,
        "[a-b]*" => text.starts_with(['a', 'b']),
        "x*2" => text.starts_with('x') && text.ends_with('2') && text.len() > 1,
        other => panic!("no such pattern: {other}"),
    }
}

fn satisfies(value: &Made, op: &str, literals: &[Value], kind: Kind) -> bool {
    let against = |index: usize| compare(value, &literals[index], kind);
    match op {
        "$ex" => *value != Made::Null,
        "$nex" => *value == Made::Null,
        _ if *value == Made::Null => false,
        "$neq" => is_nan(value) || against(0) != Some(Ordering::Equal),
        "$eq" => against(0) == Some(Ordering::Equal),
        "$lt" => against(0) == Some(Ordering::Less),
        "$leq" => against(0).is_some_and(Ordering::is_le),
        "$gt" => against(0) == Some(Ordering::Greater),
        "$geq" => against(0).is_some_and(Ordering::is_ge),
        "$between" => against(0).is_some_and(Ordering::is_ge) && against(1).is_some_and(Ordering::is_le),
        "$outside" => against(0) == Some(Ordering::Less) || against(1) == Some(Ordering::Greater),
        "$in" => (0..literals.len()).any(|index| against(index) == Some(Ordering::Equal)),
        "$match" => {
            let (Made::Text(text), Value::String(pattern)) = (value, &literals[0]) else { return false };
            fits(pattern, text)
        }
        "list$eq" | "list$neq" => {
            let Made::List(items) = value else { return false };
            let item = if kind == Kind::Pair { Kind::F64 } else { Kind::I64 };
            let same = items.len() == literals.len()
                && items
                    .iter()
                    .zip(literals)
                    .all(|(value, literal)| compare(value, literal, item) == Some(Ordering::Equal));
            same == (op == "list$eq")
        }
        "$within" => {
            let Made::Struct(point) = value else { return false };
            let ([Made::Float(latitude), Made::Float(longitude)], [south, west, north, east]) =
                (point.as_slice(), literals)
            else {
                return false;
            };
            let corner = |value: &Value| value.as_f64().expect("a number");
            let longitude = if *longitude > 180.0 { longitude - 360.0 } else { *longitude };
            let inside = if corner(west) <= corner(east) {
                corner(west) <= longitude && longitude <= corner(east)
            } else {
                longitude >= corner(west) || longitude <= corner(east)
            };
            corner(south) <= *latitude && *latitude <= corner(north) && inside
        }
        other => panic!("no such operator: {other}"),
    }
}

fn child(value: &Made, index: usize) -> Made {
    if let Made::Struct(children) = value { children[index].clone() } else { Made::Null }
}

fn plainly(ask: &Ask, kinds: &[Kind], row: &[Made]) -> bool {
    let (column, place, op, literals) = match ask {
        Ask::All(all) => return all.iter().all(|ask| plainly(ask, kinds, row)),
        Ask::Any(any) => return any.iter().any(|ask| plainly(ask, kinds, row)),
        Ask::Not(ask) => return !plainly(ask, kinds, row),
        Ask::Leaf { column, place, op, literals } => (*column, *place, *op, literals),
    };
    let value = &row[column];
    let (path, kind) = places(kinds[column])[place];
    let items = elements(value);
    let check = |value: &Made| satisfies(value, op, literals, kind);
    match path {
        "" => check(value),
        "[?]" => items.iter().any(check),
        "[!]" => !items.is_empty() && items.iter().all(check),
        "[0]" => items.first().is_some_and(check),
        "[1]" => items.get(1).is_some_and(check),
        "[?].a" => items.iter().any(|item| check(&child(item, 0))),
        "[!].a" => !items.is_empty() && items.iter().all(|item| check(&child(item, 0))),
        "[0].s" => items.first().is_some_and(|item| check(&child(item, 1))),
        "[?].s" => items.iter().any(|item| check(&child(item, 1))),
        ".x" | ".latitude" => check(&child(value, 0)),
        ".norm" => match (child(value, 0), child(value, 1), child(value, 2)) {
            (Made::Float(x), Made::Float(y), Made::Float(z)) => check(&Made::Float((x * x + y * y + z * z).sqrt())),
            _ => check(&Made::Null),
        },
        ".inner" => check(&child(value, 0)),
        ".inner.v" => check(&child(&child(value, 0), 0)),
        ".absent" => check(&Made::Null),
        other => panic!("no such place: {other}"),
    }
}

// --- the question as JSON ---

fn to_json(ask: &Ask, kinds: &[Kind]) -> Value {
    match ask {
        Ask::All(all) => json!({ "$and": all.iter().map(|ask| to_json(ask, kinds)).collect::<Vec<_>>() }),
        Ask::Any(any) => json!({ "$or": any.iter().map(|ask| to_json(ask, kinds)).collect::<Vec<_>>() }),
        Ask::Not(ask) => json!({ "$not": to_json(ask, kinds) }),
        Ask::Leaf { column, place, op, literals } => {
            let key = format!("t.c{column}{}", places(kinds[*column])[*place].0);
            let (op, value) = match *op {
                "$ex" | "$nex" => (*op, Value::Null),
                "list$eq" => ("$eq", json!(literals)),
                "list$neq" => ("$neq", json!(literals)),
                "$between" | "$outside" | "$in" | "$within" => (*op, json!(literals)),
                op => (op, literals[0].clone()),
            };
            json!({ key: { op: value } })
        }
    }
}

// --- one case ---

fn batch(schema: &SchemaRef, kinds: &[Kind], rows: &[Vec<Made>]) -> RecordBatch {
    let times: ArrayRef = Arc::new((0_i64..).take(rows.len()).collect::<Int64Array>());
    let columns = kinds.iter().enumerate().map(|(index, kind)| {
        let values: Vec<Made> = rows.iter().map(|row| row[index].clone()).collect();
        array(&data_type(*kind), &values)
    });
    RecordBatch::try_new(Arc::clone(schema), std::iter::once(times).chain(columns).collect()).expect("a batch")
}

/// The rows of an encoded chunk that match, read by the columns that are needed.
fn engine_rows(
    ontology: &Ontology,
    bound: &crate::query::plan::Bound,
    encoder: &TopicEncoder,
    batch: &RecordBatch,
) -> Vec<bool> {
    let batches = [batch.clone()];
    let mut chunk = encoder.begin(&batches).expect("begins");
    let (mut bytes, mut columns) = (Vec::new(), Vec::new());
    let mut pieces = Vec::new();
    while chunk.step(&mut pieces).expect("encodes") {
        for piece in pieces.drain(..) {
            match piece {
                Piece::Page(page) => bytes.extend_from_slice(&page),
                Piece::ColumnEnd(column) => columns.push(column),
            }
        }
    }
    let mut leaves = bound.columns_to_read(ontology);
    leaves.insert(0, 0);
    leaves.dedup();
    let group = RowGroup {
        schema: &ontology.stored,
        descriptor: encoder.descriptor(),
        columns: &columns,
        rows: batch.num_rows() as u64,
        base: 0,
    };
    let read = decode_leaves(group, ChunkBytes::whole(0, bytes.into()), &leaves).expect("decodes");
    read.iter().flat_map(|batch| matching(bound, batch).expect("evaluates").iter().collect::<Vec<_>>()).collect()
}

fn check_case(case: &Case, seen: &mut [u64; 3]) {
    let mut fields = vec![Field::new("timestamp_ns", DataType::Int64, false)];
    fields.extend(case.kinds.iter().enumerate().map(|(at, kind)| Field::new(format!("c{at}"), data_type(*kind), true)));
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let ontology = Ontology::new("t", 1, Origin::FirstUse, 0, Arc::clone(&schema)).expect("an ontology");
    let content = parse::ontology(&to_json(&case.ask, &case.kinds)).expect("parses");
    let [(_, expr)] = content.tags.as_slice() else { panic!("one tag: {content:?}") };
    let bound = bind(expr, &ontology).expect("binds");
    let encoder = TopicEncoder::new(&ontology.stored, Compression::None).expect("an encoder");
    let batches: Vec<RecordBatch> = case.chunks.iter().map(|rows| batch(&schema, &case.kinds, rows)).collect();
    let stats: Vec<Vec<FieldStats>> = batches
        .iter()
        .map(|batch| collect(&ontology.stored, &ontology.record.derived, std::slice::from_ref(batch)))
        .collect();
    let verdicts = bound
        .chunk_verdicts::<std::convert::Infallible>(batches.len(), &mut |column, see| {
            let at = ontology.column(column).expect("a column of the index");
            let packed = SkipBlock::pack(&stats.iter().map(|chunk| &chunk[at]).collect::<Vec<_>>()).expect("packs");
            let block = SkipBlock::unpack(&packed).expect("unpacks");
            (0..block.chunks()).for_each(|index| see(&block.get(index)));
            Ok(())
        })
        .unwrap_or_else(|never| match never {});
    for ((rows, batch), verdict) in case.chunks.iter().zip(&batches).zip(verdicts) {
        let plain: Vec<bool> = rows.iter().map(|row| plainly(&case.ask, &case.kinds, row)).collect();
        if !rows.is_empty() {
            assert_eq!(engine_rows(&ontology, &bound, &encoder, batch), plain, "rows {rows:?}");
        }
        match verdict {
            Verdict::None => assert!(!plain.contains(&true), "ruled out: {rows:?}"),
            Verdict::All => assert!(!plain.contains(&false), "proven: {rows:?}"),
            Verdict::Some => {}
        }
        seen[verdict as usize] += 1;
    }
}

#[test]
fn inv_6_ten_thousand_random_questions_are_answered_as_brute_force_answers_them() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let seen = std::cell::RefCell::new([0; 3]);
    let result = runner.run(&case(), |case| {
        check_case(&case, &mut seen.borrow_mut());
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    // The test means something only if the index decides often and leaves open often.
    let [none, some, all] = *seen.borrow();
    println!("{CASES} questions over {} chunks: {none} ruled out, {some} left open, {all} proven", none + some + all);
    assert!(none > 5000 && some > 5000 && all > 1000, "{none} ruled out, {some} left open, {all} proven");
}
