//! Names, creation times and user metadata against their tests. Pure.

use crate::query::test::{Literal, Test};
use serde_json::Value;

/// Deepest user metadata that `**` follows.
const METADATA_DEPTH_MAX: usize = 32;
/// Steps of a path. Bounds recursion over text from outside.
const STEPS_MAX: usize = 32;
/// `**` in one path: each multiplies the places that are looked at by the depth.
const ANY_DEPTHS_MAX: usize = 2;

/// A checked key of `user_metadata`: `a.b`, `*` for one level, `**` for any depth, `list[*]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MetadataPath {
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    AnyKey,
    AnyDepth,
    Elements,
}

impl MetadataPath {
    /// Checks a key.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty; name a key of the metadata".to_owned());
        }
        if text.contains("***") {
            return Err("has `***`; `*` is one level, `**` any depth".to_owned());
        }
        let mut steps: Vec<Step> = Vec::new();
        for part in text.split('.') {
            if steps.len() >= STEPS_MAX {
                return Err(format!("has more than {STEPS_MAX} parts"));
            }
            let (name, elements) = match part.strip_suffix("[*]") {
                Some(name) => (name, true),
                None => (part, false),
            };
            if name.is_empty() || name.contains('[') || name.contains(']') {
                return Err(format!("has the part `{part}`; write keys, `*`, `**` or `key[*]`, separated by dots"));
            }
            steps.push(match name {
                "*" => Step::AnyKey,
                "**" => Step::AnyDepth,
                key => Step::Key(key.to_owned()),
            });
            if elements {
                steps.push(Step::Elements);
            }
        }
        if steps.iter().filter(|step| **step == Step::AnyDepth).count() > ANY_DEPTHS_MAX {
            return Err(format!("has more than {ANY_DEPTHS_MAX} `**`"));
        }
        Ok(Self { steps })
    }

    /// Whether something the path leads to satisfies a test; a list does if one of its elements does.
    pub(crate) fn satisfies(&self, metadata: &Value, test: &Test) -> bool {
        let any = |fits: &dyn Fn(&Value) -> bool| leads_to(metadata, &self.steps, 0, fits);
        match test {
            Test::Exists => any(&|_| true),
            Test::NotExists => !any(&|_| true),
            Test::ListEq(items) => any(&|value| list_is(value, items)),
            Test::ListNeq(items) => any(&|value| value.is_array() && !list_is(value, items)),
            test => any(&|value| match value {
                Value::Array(items) => items.iter().any(|item| scalar_satisfies(item, test)),
                value => scalar_satisfies(value, test),
            }),
        }
    }
}

/// Whether something the path leads to fits.
fn leads_to(value: &Value, steps: &[Step], depth: usize, fits: &dyn Fn(&Value) -> bool) -> bool {
    let Some((step, rest)) = steps.split_first() else {
        return fits(value);
    };
    let on = |value: &Value| leads_to(value, rest, depth, fits);
    match (step, value) {
        (Step::Key(key), Value::Object(object)) => object.get(key).is_some_and(on),
        // A list on the way stands for its elements.
        (Step::Key(_), Value::Array(items)) => {
            items.iter().any(|item| item.is_object() && leads_to(item, steps, depth, fits))
        }
        (Step::AnyKey, Value::Object(object)) => object.values().any(on),
        (Step::Elements, Value::Array(items)) => items.iter().any(on),
        (Step::AnyDepth, value) => {
            let deeper = |value: &Value| depth < METADATA_DEPTH_MAX && leads_to(value, steps, depth + 1, fits);
            on(value)
                || match value {
                    Value::Object(object) => object.values().any(deeper),
                    Value::Array(items) => items.iter().any(deeper),
                    _ => false,
                }
        }
        _ => false,
    }
}

fn list_is(value: &Value, items: &[Literal]) -> bool {
    let Value::Array(values) = value else { return false };
    values.len() == items.len()
        && values.iter().zip(items).all(|(value, item)| scalar_satisfies(value, &Test::Eq(item.clone())))
}

/// Whether a JSON scalar satisfies a test; values of another kind than the literal do not.
fn scalar_satisfies(value: &Value, test: &Test) -> bool {
    use arrow::datatypes::DataType;
    match value {
        Value::String(text) => text_satisfies(text, test),
        Value::Bool(flag) => match test {
            Test::Eq(Literal::Bool(wanted)) => wanted == flag,
            Test::Neq(Literal::Bool(wanted)) => wanted != flag,
            Test::In(wanted) => wanted.contains(&Literal::Bool(*flag)),
            _ => false,
        },
        Value::Number(number) => {
            use crate::query::test::Typed;
            if let Some(whole) = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from)) {
                matches!(test.for_type(&DataType::Int64), Ok(Typed::Int(ranges)) if ranges.holds(&whole))
            } else {
                let value = number.as_f64().unwrap_or(f64::NAN);
                matches!(test.for_type(&DataType::Float64), Ok(Typed::Float(ranges)) if ranges.holds(&value))
            }
        }
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Whether a text satisfies a test; literals of another kind never match.
pub(crate) fn text_satisfies(text: &str, test: &Test) -> bool {
    use crate::query::test::Typed;
    match test.for_type(&arrow::datatypes::DataType::Utf8) {
        Ok(Typed::Text(ranges)) => ranges.holds(&text.to_owned()),
        Ok(Typed::Pattern(pattern)) => pattern.holds(text),
        Ok(Typed::Present(present)) => present,
        _ => false,
    }
}

/// Whether a topic's name satisfies a test: users write it with and without the leading slash, and with
/// its sequence.
pub(crate) fn topic_name_satisfies(locator: &str, test: &Test) -> bool {
    let path = locator.split_once('/').map_or("", |(_, path)| path);
    match test {
        Test::Neq(literal) => !topic_name_satisfies(locator, &Test::Eq(literal.clone())),
        test => [path, &format!("/{path}"), locator].iter().any(|name| text_satisfies(name, test)),
    }
}

/// Whether a whole number satisfies a test.
pub(crate) fn int_satisfies(value: i64, test: &Test) -> bool {
    use crate::query::test::Typed;
    match test.for_type(&arrow::datatypes::DataType::Int64) {
        Ok(Typed::Int(ranges)) => ranges.holds(&i128::from(value)),
        Ok(Typed::Present(present)) => present,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query::pattern::{Meaning, Pattern};
    use serde_json::json;

    #[track_caller]
    fn check(path: &str, test: Test, expected: bool) {
        let metadata = json!({
            "driver": "ada", "run": 7, "ratio": 0.5, "wet": true, "none": null,
            "car": { "model": "x", "wheels": [{ "size": 17 }, { "size": 18 }] },
            "tags": ["night", "rain"],
        });
        let path = MetadataPath::parse(path).expect("a path");
        assert_eq!(path.satisfies(&metadata, &test), expected);
    }

    fn text(value: &str) -> Literal {
        Literal::Text(value.to_owned())
    }

    #[test]
    fn dots_walk_and_stars_search() {
        check("driver", Test::Eq(text("ada")), true);
        check("car.model", Test::Eq(text("x")), true);
        check("*.model", Test::Eq(text("x")), true);
        check("**.size", Test::Eq(Literal::Int(18)), true);
        check("car.wheels[*].size", Test::Gt(Literal::Int(18)), false);
        check("car.wheels.size", Test::Geq(Literal::Int(18)), true);
        check("tags", Test::Eq(text("rain")), true);
        check("tags[*]", Test::Match(Pattern::parse("n*", Meaning::Glob).expect("a pattern")), true);
        check("tags", Test::ListEq(vec![text("night"), text("rain")]), true);
        check("tags", Test::ListEq(vec![text("night")]), false);
        check("car", Test::Eq(text("x")), false);
    }

    #[test]
    fn presence_is_asked_of_the_path_and_other_kinds_never_match() {
        check("none", Test::Exists, true);
        check("absent", Test::NotExists, true);
        check("car", Test::Exists, true);
        check("run", Test::Eq(text("7")), false);
        check("run", Test::Between(Literal::Float(6.5), Literal::Int(7)), true);
        check("ratio", Test::Lt(Literal::Int(1)), true);
        check("wet", Test::Eq(Literal::Bool(true)), true);
        check("driver", Test::Neq(text("bob")), true);
        check("absent", Test::Neq(text("bob")), false);
    }

    #[test]
    fn topic_names_are_found_with_and_without_their_slash() {
        assert!(topic_name_satisfies("drive/imu", &Test::Eq(text("imu"))));
        assert!(topic_name_satisfies("drive/imu", &Test::Eq(text("/imu"))));
        assert!(!topic_name_satisfies("drive/imu", &Test::Neq(text("/imu"))));
        let glob = |pattern| Test::Match(Pattern::parse(pattern, Meaning::Glob).expect("a pattern"));
        assert!(topic_name_satisfies("drive/camera/front", &glob("/camera*")));
        assert!(topic_name_satisfies("drive/camera/front", &glob("camera*")));
    }

    #[test]
    fn broken_paths_are_refused() {
        let long = ["a"; STEPS_MAX + 1].join(".");
        for path in ["", "a..b", "a.***", "a[0]", "[*]", "**.a.**.b.**", long.as_str()] {
            assert!(MetadataPath::parse(path).is_err(), "{path:?}");
        }
    }
}
