//! Arrow schemas as JSON, in the form of the public ontology list: `{"name", "type", "nullable"?,
//! "fields"?, "item"?, "size"?}`; a field without `nullable` is nullable. Type names are Arrow's C++ names.

use arrow::datatypes::{DataType, Field, IntervalUnit, Schema, SchemaRef, TimeUnit};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Nesting that is followed; bounds recursion over text from outside.
const DEPTH_MAX: usize = crate::limits::SCHEMA_DEPTH_MAX;

/// Names and types that stand alone.
const PLAIN: [(&str, DataType); 29] = [
    ("null", DataType::Null),
    ("bool", DataType::Boolean),
    ("int8", DataType::Int8),
    ("int16", DataType::Int16),
    ("int32", DataType::Int32),
    ("int64", DataType::Int64),
    ("uint8", DataType::UInt8),
    ("uint16", DataType::UInt16),
    ("uint32", DataType::UInt32),
    ("uint64", DataType::UInt64),
    ("halffloat", DataType::Float16),
    ("float", DataType::Float32),
    ("double", DataType::Float64),
    ("string", DataType::Utf8),
    ("large_string", DataType::LargeUtf8),
    ("string_view", DataType::Utf8View),
    ("binary", DataType::Binary),
    ("large_binary", DataType::LargeBinary),
    ("binary_view", DataType::BinaryView),
    ("date32", DataType::Date32),
    ("date64", DataType::Date64),
    ("timestamp[s]", DataType::Timestamp(TimeUnit::Second, None)),
    ("timestamp[ms]", DataType::Timestamp(TimeUnit::Millisecond, None)),
    ("timestamp[us]", DataType::Timestamp(TimeUnit::Microsecond, None)),
    ("timestamp[ns]", DataType::Timestamp(TimeUnit::Nanosecond, None)),
    ("duration[ns]", DataType::Duration(TimeUnit::Nanosecond)),
    ("duration[us]", DataType::Duration(TimeUnit::Microsecond)),
    ("duration[ms]", DataType::Duration(TimeUnit::Millisecond)),
    ("interval[month]", DataType::Interval(IntervalUnit::YearMonth)),
];

/// Reads a schema: a list of fields.
///
/// # Errors
/// A text that names the field, the value and what would be right.
pub fn schema_from_json(fields: &Value) -> Result<SchemaRef, String> {
    let list = fields.as_array().ok_or_else(|| format!("the schema is {fields}, not a list of fields"))?;
    let fields = list.iter().map(|field| field_from_json(field, "", 0)).collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(Schema::new(fields)))
}

fn field_from_json(value: &Value, at: &str, depth: usize) -> Result<Field, String> {
    let object = value.as_object().ok_or_else(|| format!("{at}: a field is {value}, not an object"))?;
    let name = text(object, "name", at)?;
    let path = if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    if depth > DEPTH_MAX {
        return Err(format!("{path}: nested deeper than {DEPTH_MAX}"));
    }
    if let Some(unknown) = object
        .keys()
        .find(|key| !matches!(key.as_str(), "name" | "type" | "nullable" | "fields" | "item" | "size" | "description"))
    {
        return Err(format!("{path}: there is no key `{unknown}`; known are name, type, nullable, fields, item, size"));
    }
    let nullable = match object.get("nullable") {
        None => true,
        Some(Value::Bool(nullable)) => *nullable,
        Some(other) => return Err(format!("{path}: `nullable` is {other}, not a flag")),
    };
    Ok(Field::new(name, type_from_json(object, &path, depth)?, nullable))
}

fn type_from_json(object: &Map<String, Value>, path: &str, depth: usize) -> Result<DataType, String> {
    let item = || {
        let item = object.get("item").ok_or_else(|| format!("{path}: a list needs `item`"))?;
        Ok::<_, String>(Arc::new(field_from_json(item, path, depth + 1)?))
    };
    let fields = || {
        let fields = object.get("fields").and_then(Value::as_array);
        let fields = fields.ok_or_else(|| format!("{path}: a struct or map needs the list `fields`"))?;
        fields.iter().map(|field| field_from_json(field, path, depth + 1)).collect::<Result<Vec<_>, String>>()
    };
    let size = || {
        let size = object.get("size").and_then(Value::as_i64).and_then(|size| i32::try_from(size).ok());
        size.filter(|size| *size >= 0).ok_or_else(|| format!("{path}: `size` must be a whole number from 0 on"))
    };
    let name = text(object, "type", path)?;
    Ok(match name {
        "struct" => DataType::Struct(fields()?.into()),
        "list" => DataType::List(item()?),
        "large_list" => DataType::LargeList(item()?),
        "fixed_size_list" => DataType::FixedSizeList(item()?, size()?),
        "fixed_size_binary" => DataType::FixedSizeBinary(size()?),
        "map" => {
            let entries = DataType::Struct(fields()?.into());
            DataType::Map(Arc::new(Field::new("entries", entries, false)), false)
        }
        plain => match PLAIN.iter().find(|(known, _)| *known == plain) {
            Some((_, data_type)) => data_type.clone(),
            None => {
                let known: Vec<&str> = PLAIN.iter().map(|(name, _)| *name).collect();
                return Err(format!(
                    "{path}: there is no type {plain:?}; use struct, list, large_list, fixed_size_list, \
                     fixed_size_binary, map, {}",
                    known.join(", ")
                ));
            }
        },
    })
}

fn text<'a>(object: &'a Map<String, Value>, key: &str, path: &str) -> Result<&'a str, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("{path}: `{key}` is {other}, not a text")),
        None => Err(format!("{path}: a field needs `{key}`")),
    }
}

/// Writes a schema; types outside the form are written by Arrow's own text.
pub fn schema_to_json(schema: &Schema) -> Value {
    Value::Array(schema.fields().iter().map(|field| field_to_json(field)).collect())
}

fn field_to_json(field: &Field) -> Value {
    let mut object = Map::new();
    object.insert("name".to_owned(), json!(field.name()));
    object.insert("type".to_owned(), json!(kind_name(field.data_type())));
    if !field.is_nullable() {
        object.insert("nullable".to_owned(), json!(false));
    }
    match field.data_type() {
        DataType::Struct(fields) => {
            object.insert("fields".to_owned(), fields.iter().map(|field| field_to_json(field)).collect());
        }
        DataType::List(item) | DataType::LargeList(item) => {
            object.insert("item".to_owned(), field_to_json(item));
        }
        DataType::FixedSizeList(item, size) => {
            object.insert("item".to_owned(), field_to_json(item));
            object.insert("size".to_owned(), json!(size));
        }
        DataType::FixedSizeBinary(size) => {
            object.insert("size".to_owned(), json!(size));
        }
        DataType::Map(entries, _) => {
            if let DataType::Struct(fields) = entries.data_type() {
                object.insert("fields".to_owned(), fields.iter().map(|field| field_to_json(field)).collect());
            }
        }
        _ => {}
    }
    Value::Object(object)
}

fn kind_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Struct(_) => "struct".to_owned(),
        DataType::List(_) => "list".to_owned(),
        DataType::LargeList(_) => "large_list".to_owned(),
        DataType::FixedSizeList(_, _) => "fixed_size_list".to_owned(),
        DataType::FixedSizeBinary(_) => "fixed_size_binary".to_owned(),
        DataType::Map(_, _) => "map".to_owned(),
        other => PLAIN
            .iter()
            .find(|(_, data_type)| data_type == other)
            .map_or_else(|| other.to_string(), |(name, _)| (*name).to_owned()),
    }
}

/// A type in one word or a short line, for messages.
pub fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Struct(fields) => {
            let inner: Vec<String> =
                fields.iter().map(|field| format!("{}: {}", field.name(), type_name(field.data_type()))).collect();
            format!("struct<{}>", inner.join(", "))
        }
        DataType::List(item) => format!("list<{}>", type_name(item.data_type())),
        DataType::LargeList(item) => format!("large_list<{}>", type_name(item.data_type())),
        DataType::FixedSizeList(item, size) => format!("fixed_size_list<{}>[{size}]", type_name(item.data_type())),
        other => kind_name(other),
    }
}

/// A field with all below it, in one text that tells any two apart: names are quoted.
pub(crate) fn field_text(field: &Field) -> String {
    let inner = match field.data_type() {
        DataType::Struct(fields) => fields.iter().map(|field| field_text(field)).collect(),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _)
        | DataType::Map(item, _) => field_text(item),
        _ => String::new(),
    };
    let kind = match field.data_type() {
        DataType::FixedSizeList(_, size) => format!("fixed_size_list {size}"),
        DataType::Map(_, sorted) => format!("map {sorted}"),
        DataType::ListView(_) => "list_view".to_owned(),
        DataType::LargeListView(_) => "large_list_view".to_owned(),
        other => kind_name(other),
    };
    format!("{:?}:{kind}:{}<{inner}>", field.name(), field.is_nullable())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_refused(json: Value, part: &str) {
        let error = schema_from_json(&json).expect_err("must be refused");
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_path() {
        check_refused(json!({}), "not a list");
        check_refused(json!([{ "name": "a" }]), "a: a field needs `type`");
        check_refused(json!([{ "name": "a", "type": "int7" }]), "int7");
        check_refused(json!([{ "name": "a", "type": "list" }]), "`item`");
        let nested = json!([{ "name": "a", "type": "struct", "fields": [{ "name": "b", "type": "in64" }] }]);
        check_refused(nested, "a.b");
        check_refused(json!([{ "name": "a", "type": "int8", "nulable": true }]), "nulable");
    }

    #[test]
    fn the_shipped_ontologies_come_back_from_json_as_they_went_in() {
        for ontology in super::super::builtin().expect("parses") {
            let json = schema_to_json(&ontology.wire);
            assert_eq!(schema_from_json(&json).expect("parses"), ontology.wire, "{}", ontology.record.tag);
        }
    }
}
