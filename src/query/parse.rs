//! The query JSON of all client generations to a checked [`Query`] (protocol.md section 3).
//!
//! Guarantees: what is not understood is refused by name, never ignored, so a misspelt filter cannot
//! return more than was asked. Extensions of ours: `$within`, `$or`, `$and`, `$not` inside `ontology`;
//! `limit`, `explain`, `intervals`, `join_dt_ns` beside it.

use crate::limits;
use crate::query::names::MetadataPath;
use crate::query::pattern::{Meaning, Pattern};
use crate::query::test::{Literal, Test};
use crate::query::{Choice, Content, Expr, Filter, Path, Predicate, Query, QueryError};
use serde_json::{Map, Value};
use storage::chunk::stats::GeoBox;

const OPERATORS: [&str; 13] =
    ["$eq", "$neq", "$lt", "$leq", "$gt", "$geq", "$between", "$outside", "$in", "$match", "$ex", "$nex", "$within"];

type Result<T> = std::result::Result<T, QueryError>;

fn invalid(key: &str, why: impl Into<String>) -> QueryError {
    QueryError::Invalid { key: key.to_owned(), why: why.into() }
}

/// Checks a whole query. `meaning`: what `$match` is for this client where the keys do not tell.
pub(crate) fn query(body: &Map<String, Value>, meaning: Meaning) -> Result<Query> {
    let mut query = Query::default();
    let comparisons = count(body.get("ontology").unwrap_or(&Value::Null));
    if comparisons > limits::QUERY_PREDICATES_MAX {
        let most = limits::QUERY_PREDICATES_MAX;
        return Err(invalid("ontology", format!("has {comparisons} comparisons, over the limit of {most}")));
    }
    // Keys of older generations bring their meaning of `$match` with them, for the whole query.
    let meaning = if is_old(body) { Meaning::Substring } else { meaning };
    for (key, value) in body {
        match key.as_str() {
            "sequence" => query.sequence = filter(key, value, meaning, false)?,
            "topic" => query.topic = filter(key, value, meaning, true)?,
            "ontology" => {
                let mut fields = object(key, value)?.clone();
                if let Some(flag) = fields.remove("include_timestamp_range") {
                    query.time_range = boolean("ontology.include_timestamp_range", &flag)?;
                }
                query.content = content(&fields, meaning, 0)?;
            }
            "limit" => query.limit = Some(whole(key, value)?),
            "explain" => query.explain = boolean(key, value)?,
            "intervals" => query.intervals = boolean(key, value)?,
            "join_dt_ns" => query.join_dt_ns = whole(key, value)? as u64,
            other => {
                let known = "sequence, topic, ontology, limit, explain, intervals, join_dt_ns";
                return Err(invalid(other, format!("is no part of a query; known are {known}")));
            }
        }
    }
    Ok(query)
}

/// Comparisons in a content part, not deeper than the parser goes either.
fn count(value: &Value) -> usize {
    fn inside(value: &Value, depth: usize) -> usize {
        if depth > 2 * limits::QUERY_DEPTH_MAX {
            return 0;
        }
        match value {
            Value::Object(fields) => {
                let of = |(key, value): (&String, &Value)| match key.as_str() {
                    "$or" | "$and" | "$not" => inside(value, depth + 1),
                    _ => 1,
                };
                fields.iter().map(of).sum()
            }
            Value::Array(items) => items.iter().map(|item| inside(item, depth + 1)).sum(),
            _ => 0,
        }
    }
    inside(value, 0)
}

/// Whether the keys are those of generations before 0.6.
fn is_old(body: &Map<String, Value>) -> bool {
    let has = |part: &str, key: &str| body.get(part).and_then(|part| part.get(key)).is_some();
    ["sequence", "topic"].iter().any(|part| has(part, "locator") || has(part, "created_timestamp"))
        || has("ontology", "include_timestamp_range")
}

/// Checks the ontology part alone, as the temporal filters carry it.
pub(crate) fn ontology(value: &Value) -> Result<Content> {
    if count(value) > limits::QUERY_PREDICATES_MAX {
        return Err(invalid("ontology", format!("has more than {} comparisons", limits::QUERY_PREDICATES_MAX)));
    }
    content(object("ontology", value)?, Meaning::Glob, 0)
}

fn object<'v>(key: &str, value: &'v Value) -> Result<&'v Map<String, Value>> {
    value.as_object().ok_or_else(|| invalid(key, format!("is {value}, not an object")))
}

fn boolean(key: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| invalid(key, format!("is {value}, not true or false")))
}

fn whole(key: &str, value: &Value) -> Result<usize> {
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
    number.ok_or_else(|| invalid(key, format!("is {value}, not a whole number from 0 on")))
}

/// An empty part asks nothing.
fn filter(part: &str, value: &Value, meaning: Meaning, topic: bool) -> Result<Option<Filter>> {
    let mut filter = Filter::default();
    let fields = object(part, value)?;
    for (key, value) in fields {
        let at = format!("{part}.{key}");
        match key.as_str() {
            "name" | "locator" => filter.name.push(text_test(&at, value, meaning)?),
            "created_at_ns" | "created_at" => filter.created_ns.push(time_test(&at, value, 1)?),
            "created_timestamp" => filter.created_ns.push(time_test(&at, value, 1_000_000)?),
            "user_metadata" => {
                for (key, value) in object(&at, value)? {
                    let at = format!("{at}.{key}");
                    let path = MetadataPath::parse(key).map_err(|why| invalid(&at, why))?;
                    filter.metadata.push((path, operator(&at, value, meaning)?));
                }
            }
            "ontology_tag" if topic => filter.ontology_tag.push(text_test(&at, value, meaning)?),
            "serialization_format" if topic => filter.format.push(text_test(&at, value, meaning)?),
            _ => {
                let more = if topic { ", ontology_tag, serialization_format" } else { "" };
                return Err(invalid(
                    &at,
                    format!("is no field of a {part}; known are name (or locator), created_at_ns, user_metadata{more}"),
                ));
            }
        }
    }
    Ok((!fields.is_empty()).then_some(filter))
}

fn text_test(key: &str, value: &Value, meaning: Meaning) -> Result<Test> {
    let test = operator(key, value, meaning)?;
    test.for_type(&arrow::datatypes::DataType::Utf8).map_err(|why| invalid(key, why))?;
    Ok(test)
}

/// A test of a time, brought to nanoseconds.
fn time_test(key: &str, value: &Value, unit: i128) -> Result<Test> {
    let scale = |literal: Literal| match literal {
        Literal::Int(value) => Literal::Int(value.saturating_mul(unit)),
        Literal::Float(value) => Literal::Float(value * unit as f64),
        other => other,
    };
    let test = match operator(key, value, Meaning::Glob)? {
        Test::Eq(a) => Test::Eq(scale(a)),
        Test::Neq(a) => Test::Neq(scale(a)),
        Test::Lt(a) => Test::Lt(scale(a)),
        Test::Leq(a) => Test::Leq(scale(a)),
        Test::Gt(a) => Test::Gt(scale(a)),
        Test::Geq(a) => Test::Geq(scale(a)),
        Test::Between(a, b) => Test::Between(scale(a), scale(b)),
        Test::Outside(a, b) => Test::Outside(scale(a), scale(b)),
        Test::In(all) => Test::In(all.into_iter().map(scale).collect()),
        other => other,
    };
    test.for_type(&arrow::datatypes::DataType::Int64).map_err(|why| invalid(key, why))?;
    Ok(test)
}

/// What the ontology part asks. Fields and single-tag groups join the row expression of their tag.
fn content(fields: &Map<String, Value>, meaning: Meaning, depth: usize) -> Result<Content> {
    if depth > limits::QUERY_DEPTH_MAX {
        return Err(invalid("ontology", format!("nests groups deeper than {}", limits::QUERY_DEPTH_MAX)));
    }
    let mut content = Content::default();
    let mut add = |tag: String, expr: Expr| match content.tags.iter_mut().find(|(known, _)| *known == tag) {
        Some((_, Expr::And(all))) => all.push(expr),
        _ => content.tags.push((tag, Expr::And(vec![expr]))),
    };
    let mut groups = Vec::new();
    for (key, value) in fields {
        match key.as_str() {
            "$or" | "$and" => {
                let members = value.as_array().filter(|members| !members.is_empty());
                let members = members.ok_or_else(|| invalid(key, "needs a list of at least one group"))?;
                let members = members
                    .iter()
                    .map(|member| self::content(object(key, member)?, meaning, depth + 1))
                    .collect::<Result<Vec<_>>>()?;
                if members.iter().any(Content::is_empty) {
                    return Err(invalid(key, "has an empty group, which would ask nothing"));
                }
                match single_tag(&members) {
                    Some(tag) => {
                        let members =
                            members.into_iter().flat_map(|member| member.tags).map(|(_, expr)| expr).collect();
                        add(tag, if key == "$or" { Expr::Or(members) } else { Expr::And(members) });
                    }
                    None if key == "$or" => groups.push(members),
                    None => {
                        for member in members {
                            member.tags.into_iter().for_each(|(tag, expr)| add(tag, expr));
                            groups.extend(member.groups);
                        }
                    }
                }
            }
            "$not" => {
                let member = self::content(object(key, value)?, meaning, depth + 1)?;
                let members = [member];
                let tag = single_tag(&members)
                    .ok_or_else(|| invalid(key, "asks of several ontologies; give each its own `$not`"))?;
                let [member] = members;
                let all = member.tags.into_iter().map(|(_, expr)| expr).collect();
                add(tag, Expr::Not(Box::new(Expr::And(all))));
            }
            key => {
                let (tag, path) = key
                    .split_once('.')
                    .filter(|(tag, path)| !tag.is_empty() && !path.is_empty())
                    .ok_or_else(|| invalid(key, "is no field; write `Tag.field`, e.g. `IMU.acceleration.x`"))?;
                let predicate = Predicate {
                    key: key.to_owned(),
                    path: self::path(key, path)?,
                    test: operator(key, value, meaning)?,
                };
                add(tag.to_owned(), Expr::Test(predicate));
            }
        }
    }
    content.groups = groups;
    Ok(content)
}

/// The one tag that all members ask of, if there is only one and no mixed group in them.
fn single_tag(members: &[Content]) -> Option<String> {
    let mut tags = members.iter().map(|member| match (member.tags.as_slice(), member.groups.as_slice()) {
        ([(tag, _)], []) => Some(tag),
        _ => None,
    });
    let first = tags.next()??;
    tags.all(|tag| tag == Some(first)).then(|| first.clone())
}

/// A path with at most one choice of elements.
fn path(key: &str, text: &str) -> Result<Path> {
    let Some((head, rest)) = text.split_once('[') else {
        return Ok(Path { head: text.to_owned(), elements: None });
    };
    let wrong = || invalid(key, "has a broken list choice; write `[?]` any, `[!]` all or `[0]` by position, once");
    let (choice, rest) = rest.split_once(']').ok_or_else(wrong)?;
    let choice = match choice {
        "?" => Choice::Any,
        "!" => Choice::All,
        position => Choice::At(position.parse().map_err(|_| wrong())?),
    };
    let inner = match rest {
        "" => None,
        rest => Some(rest.strip_prefix('.').filter(|rest| !rest.is_empty() && !rest.contains('[')).ok_or_else(wrong)?),
    };
    if head.is_empty() {
        return Err(wrong());
    }
    Ok(Path { head: head.to_owned(), elements: Some((choice, inner.map(str::to_owned))) })
}

/// An operator with its value: an object with exactly one key, or the bare text `$ex` or `$nex`.
fn operator(key: &str, value: &Value, meaning: Meaning) -> Result<Test> {
    match value {
        Value::String(bare) if bare == "$ex" => return Ok(Test::Exists),
        Value::String(bare) if bare == "$nex" => return Ok(Test::NotExists),
        _ => {}
    }
    let fields = value.as_object().ok_or_else(|| {
        invalid(
            key,
            format!("is {value}, not an operator; write {{\"$eq\": {value}}} or another of {}", all_operators()),
        )
    })?;
    let mut entries = fields.iter();
    let (Some((operator, value)), None) = (entries.next(), entries.next()) else {
        return Err(invalid(key, format!("has {} operators; give exactly one", fields.len())));
    };
    let one = || literal(key, value);
    let pair = || -> Result<(Literal, Literal)> {
        let list = list(key, operator, value)?;
        let [low, high]: [Literal; 2] =
            list.try_into().map_err(|_| invalid(key, format!("`{operator}` needs two values, [min, max]")))?;
        if !in_order(&low, &high) {
            return Err(invalid(
                key,
                format!("`{operator}` has an empty range: {value}; the first must not exceed the second"),
            ));
        }
        Ok((low, high))
    };
    Ok(match operator.as_str() {
        "$eq" if value.is_array() => Test::ListEq(list(key, operator, value)?),
        "$neq" if value.is_array() => Test::ListNeq(list(key, operator, value)?),
        "$eq" => Test::Eq(one()?),
        "$neq" => Test::Neq(one()?),
        "$lt" => Test::Lt(one()?),
        "$leq" => Test::Leq(one()?),
        "$gt" => Test::Gt(one()?),
        "$geq" => Test::Geq(one()?),
        "$between" => pair().map(|(low, high)| Test::Between(low, high))?,
        "$outside" => pair().map(|(low, high)| Test::Outside(low, high))?,
        "$in" => {
            let all = list(key, operator, value)?;
            if all.is_empty() {
                return Err(invalid(key, "`$in` has an empty list, which nothing can satisfy"));
            }
            Test::In(all)
        }
        "$match" => match value {
            Value::String(text) => Test::Match(Pattern::parse(text, meaning).map_err(|why| invalid(key, why))?),
            other => return Err(invalid(key, format!("`$match` has {other}, not a text"))),
        },
        "$ex" | "$nex" => match (value, operator.as_str()) {
            (Value::Null | Value::Bool(true), "$ex") | (Value::Bool(false), "$nex") => Test::Exists,
            (Value::Null | Value::Bool(true), "$nex") | (Value::Bool(false), "$ex") => Test::NotExists,
            (other, _) => return Err(invalid(key, format!("`{operator}` takes no value, and has {other}"))),
        },
        "$within" => Test::Within(geo_box(key, value)?),
        other => {
            return Err(invalid(key, format!("has the unknown operator `{other}`; known are {}", all_operators())));
        }
    })
}

fn all_operators() -> String {
    OPERATORS.join(" ")
}

fn literal(key: &str, value: &Value) -> Result<Literal> {
    Ok(match value {
        Value::Bool(flag) => Literal::Bool(*flag),
        Value::String(text) => Literal::Text(text.clone()),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => Literal::Int(i128::from(value)),
            (_, Some(value), _) => Literal::Int(i128::from(value)),
            (_, _, Some(value)) => Literal::Float(value),
            _ => return Err(invalid(key, format!("has the number {number}, which no column can hold"))),
        },
        other => return Err(invalid(key, format!("has {other}, not a number, text or flag"))),
    })
}

/// Values of one kind, not too many.
fn list(key: &str, operator: &str, value: &Value) -> Result<Vec<Literal>> {
    let values = value.as_array().ok_or_else(|| invalid(key, format!("`{operator}` has {value}, not a list")))?;
    if values.len() > limits::QUERY_LIST_MAX {
        let most = limits::QUERY_LIST_MAX;
        return Err(invalid(key, format!("`{operator}` has {} values, over the limit of {most}", values.len())));
    }
    let all = values.iter().map(|value| literal(key, value)).collect::<Result<Vec<_>>>()?;
    if let Some(pair) = all.windows(2).find(|pair| pair[0].kind() != pair[1].kind()) {
        return Err(invalid(key, format!("`{operator}` mixes {} with {}", pair[0].kind(), pair[1].kind())));
    }
    Ok(all)
}

fn in_order(low: &Literal, high: &Literal) -> bool {
    match (low, high) {
        (Literal::Int(low), Literal::Int(high)) => low <= high,
        (Literal::Text(low), Literal::Text(high)) => low <= high,
        (Literal::Bool(_), _) | (_, Literal::Bool(_)) => true,
        (low, high) => match (as_float(low), as_float(high)) {
            (Some(low), Some(high)) => low <= high,
            _ => true,
        },
    }
}

fn as_float(literal: &Literal) -> Option<f64> {
    match literal {
        Literal::Int(value) => Some(*value as f64),
        Literal::Float(value) => Some(*value),
        Literal::Text(_) | Literal::Bool(_) => None,
    }
}

/// `[south, west, north, east]` or an object with these keys, in degrees. West greater than east
/// crosses the antimeridian.
fn geo_box(key: &str, value: &Value) -> Result<GeoBox> {
    let wrong = || {
        invalid(
            key,
            format!(
                "`$within` has {value}; write [south, west, north, east] in degrees, latitudes from -90 to 90, \
                 longitudes from -180 to 180, south not above north"
            ),
        )
    };
    let corners: [f64; 4] = match value {
        Value::Array(corners) => {
            let corners: Option<Vec<f64>> = corners.iter().map(Value::as_f64).collect();
            corners.and_then(|corners| corners.try_into().ok()).ok_or_else(wrong)?
        }
        Value::Object(fields) if fields.len() == 4 => {
            let corner = |name: &str| fields.get(name).and_then(Value::as_f64).ok_or_else(wrong);
            [corner("south")?, corner("west")?, corner("north")?, corner("east")?]
        }
        _ => return Err(wrong()),
    };
    let [south, west, north, east] = corners;
    let latitudes = -90.0 <= south && south <= north && north <= 90.0;
    let longitudes = [west, east].iter().all(|longitude| (-180.0..=180.0).contains(longitude));
    if latitudes && longitudes { Ok(GeoBox { south, west, north, east }) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<Query> {
        query(body.as_object().expect("an object"), Meaning::Glob)
    }

    #[track_caller]
    fn check_refused(body: Value, names: &[&str]) {
        let error = parse(body).expect_err("must be refused").to_string();
        for name in names {
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        check_refused(json!({ "sequences": {} }), &["sequences", "known are"]);
        check_refused(json!({ "sequence": { "nam": { "$eq": "x" } } }), &["sequence.nam"]);
        check_refused(json!({ "sequence": { "ontology_tag": { "$eq": "x" } } }), &["sequence.ontology_tag"]);
        check_refused(json!({ "ontology": { "IMU.x": { "$equals": 1 } } }), &["IMU.x", "$equals", "$eq"]);
        check_refused(json!({ "ontology": { "IMU.x": { "$gt": 1, "$lt": 2 } } }), &["IMU.x", "exactly one"]);
        check_refused(json!({ "ontology": { "IMU.x": 7 } }), &["IMU.x", "{\"$eq\": 7}"]);
        check_refused(json!({ "ontology": { "IMU": { "$gt": 1 } } }), &["IMU", "Tag.field"]);
        check_refused(json!({ "ontology": { "IMU.x[": { "$gt": 1 } } }), &["IMU.x["]);
        check_refused(json!({ "ontology": { "IMU.x[?].y[?]": { "$gt": 1 } } }), &["once"]);
        check_refused(json!({ "ontology": { "IMU.x": { "$between": [2, 1] } } }), &["IMU.x", "empty range"]);
        check_refused(json!({ "ontology": { "IMU.x": { "$in": [] } } }), &["IMU.x", "empty list"]);
        check_refused(json!({ "ontology": { "IMU.x": { "$in": [1, "a"] } } }), &["IMU.x", "mixes"]);
        check_refused(
            json!({ "ontology": { "GPS.position": { "$within": [1, 2, 0, 4] } } }),
            &["GPS.position", "south"],
        );
        check_refused(json!({ "topic": { "name": { "$match": "[" } } }), &["topic.name"]);
        check_refused(json!({ "topic": { "name": { "$gt": 3 } } }), &["topic.name", "a text"]);
        check_refused(json!({ "sequence": { "created_at_ns": { "$gt": "now" } } }), &["sequence.created_at_ns"]);
        check_refused(json!({ "sequence": { "user_metadata": { "a.***": "$ex" } } }), &["user_metadata.a.***"]);
        check_refused(json!({ "ontology": { "$not": { "A.x": "$ex", "B.x": "$ex" } } }), &["$not", "several"]);
        check_refused(json!({ "ontology": { "$or": [] } }), &["$or"]);
        check_refused(json!({ "ontology": { "$or": [{}] } }), &["$or", "empty"]);
        check_refused(json!({ "limit": -1 }), &["limit"]);
    }

    #[test]
    fn fields_and_groups_of_one_tag_become_one_row_expression() {
        let query = parse(json!({ "ontology": {
            "IMU.a": { "$gt": 1 },
            "IMU.b": "$nex",
            "$or": [{ "IMU.c": { "$lt": 0 } }, { "IMU.d": { "$lt": 0 } }],
            "$not": { "IMU.e": { "$eq": 0 } },
        } }))
        .expect("parses");
        let [(tag, Expr::And(all))] = query.content.tags.as_slice() else { panic!("{query:?}") };
        assert_eq!(tag, "IMU");
        assert!(matches!(all.as_slice(), [Expr::Test(_), Expr::Test(_), Expr::Or(_), Expr::Not(_)]), "{all:?}");
    }

    #[test]
    fn alternatives_over_several_tags_stay_a_group() {
        let query = parse(json!({ "ontology": { "$or": [{ "A.x": "$ex" }, { "B.x": "$ex" }] } })).expect("parses");
        assert!(query.content.tags.is_empty());
        assert_eq!(query.content.groups.len(), 1);
    }

    #[test]
    fn old_keys_bring_their_units_and_their_meaning_of_match() {
        let query = parse(json!({ "sequence": { "created_timestamp": { "$geq": 1000 } } })).expect("parses");
        assert_eq!(query.sequence.expect("a filter").created_ns, [Test::Geq(Literal::Int(1_000_000_000))]);
        let query = parse(json!({ "sequence": { "locator": { "$match": "rive" } } })).expect("parses");
        let Some(Test::Match(pattern)) = query.sequence.expect("a filter").name.pop() else { panic!("no pattern") };
        assert!(pattern.holds("my drive 1"));
    }

    #[test]
    fn every_captured_query_of_every_generation_is_understood() {
        for generation in ["v0", "0.3.2", "0.5.0", "0.7.0"] {
            let path = format!("{}/tests/captures/sdk-{generation}.jsonl", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(&path).expect("the captures");
            let mut queries = 0;
            for line in text.lines() {
                let call: Value = serde_json::from_str(line).expect("JSON");
                if call["action"] != "query" {
                    continue;
                }
                let body: Value = serde_json::from_str(call["body"].as_str().expect("a text")).expect("JSON");
                queries += 1;
                query(body.as_object().expect("an object"), Meaning::Glob)
                    .unwrap_or_else(|error| panic!("{generation}: {error}: {body}"));
            }
            assert!(queries > 3, "{generation}: {queries} queries");
        }
    }
}
