//! The question language of the command line, to the query JSON of the server. Pure.
//!
//! ```text
//! IMU.acceleration.x < -4.9 and GPS within 45.4,9.1,45.5,9.3
//! sequence match 'drive*' and (IMU.acceleration.norm > 12 or not IMU.header.frame_id = 'base')
//! ```
//!
//! `and`, `or`, `not`, parentheses; `= != < <= > >=`, `between A and B`, `outside A and B`,
//! `in (A, B)`, `match 'glob*'`, `exists`, `missing`, `within SOUTH,WEST,NORTH,EAST`. Fields are
//! `Tag.path`, with `[?]` (any), `[!]` (all) or `[0]` for list elements; `sequence`, `topic` and their
//! `.tag`, `.created`, `.user_metadata.KEY` ask of the recording itself.

use serde_json::{Map, Value, json};

/// What is wrong with a question, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}\n  {text}\n  {:>1$}", "^", at + 1)]
pub(super) struct ExprError {
    why: String,
    text: String,
    at: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(Value),
    Sign(&'static str),
}

struct Parser<'t> {
    text: &'t str,
    tokens: Vec<(Token, usize)>,
    at: usize,
}

/// A condition on one field.
#[derive(Debug, Clone, PartialEq)]
struct Condition {
    path: String,
    operator: Value,
    at: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Condition(Condition),
    And(Vec<Node>),
    Or(Vec<Node>),
    Not(Box<Node>),
}

/// Tags that are asked `within` without a field: the server knows which field is their position.
pub(super) const WITHIN_OF_TAG: &str = "$within-of-tag";

/// Turns a question into the body of the action `query`.
pub(super) fn to_query(text: &str) -> Result<Map<String, Value>, ExprError> {
    let tokens = tokens(text)?;
    let mut parser = Parser { text, tokens, at: 0 };
    let node = parser.any()?;
    if parser.at < parser.tokens.len() {
        return Err(parser.wrong("expected `and`, `or` or the end here"));
    }
    let parts = match node {
        Node::And(parts) => parts,
        other => vec![other],
    };
    let mut query = Map::new();
    let mut content = Vec::new();
    for part in parts {
        match part {
            Node::Condition(condition) if is_name(&condition.path) => add_filter(text, &mut query, condition)?,
            other => content.push(to_json(text, other)?),
        }
    }
    if !content.is_empty() {
        query.insert("ontology".to_owned(), json!({ "$and": content }));
    }
    Ok(query)
}

fn is_name(path: &str) -> bool {
    let first = path.split('.').next().unwrap_or("");
    first == "sequence" || first == "topic"
}

/// `sequence` and `topic` conditions go beside the content.
fn add_filter(text: &str, query: &mut Map<String, Value>, condition: Condition) -> Result<(), ExprError> {
    let Condition { path, operator, at } = condition;
    let (part, field) = path.split_once('.').unwrap_or((path.as_str(), "name"));
    let wrong = |why: String| ExprError { why, text: text.to_owned(), at };
    let filter = query.entry(part.to_owned()).or_insert_with(|| json!({}));
    let Some(filter) = filter.as_object_mut() else { return Ok(()) };
    let (into, key) = match field.split_once('.') {
        Some(("user_metadata", key)) => {
            let metadata = filter.entry("user_metadata").or_insert_with(|| json!({}));
            match metadata.as_object_mut() {
                Some(metadata) => (metadata, key.to_owned()),
                None => return Ok(()),
            }
        }
        _ => {
            let key = match field {
                "created" => "created_at_ns",
                "tag" => "ontology_tag",
                "format" => "serialization_format",
                other => other,
            };
            (filter, key.to_owned())
        }
    };
    if into.contains_key(&key) {
        return Err(wrong(format!("`{path}` is asked twice; use `between`, `in` or one `match`")));
    }
    into.insert(key, operator);
    Ok(())
}

fn to_json(text: &str, node: Node) -> Result<Value, ExprError> {
    let all = |nodes: Vec<Node>| nodes.into_iter().map(|node| to_json(text, node)).collect::<Result<Vec<_>, _>>();
    Ok(match node {
        Node::Condition(condition) if is_name(&condition.path) => {
            let why = format!("`{}` can only be asked at the top, joined by `and`", condition.path);
            return Err(ExprError { why, text: text.to_owned(), at: condition.at });
        }
        Node::Condition(condition) => json!({ condition.path: condition.operator }),
        Node::And(nodes) => json!({ "$and": all(nodes)? }),
        Node::Or(nodes) => json!({ "$or": all(nodes)? }),
        Node::Not(node) => json!({ "$not": to_json(text, *node)? }),
    })
}

fn tokens(text: &str) -> Result<Vec<(Token, usize)>, ExprError> {
    let wrong = |why: &str, at: usize| ExprError { why: why.to_owned(), text: text.to_owned(), at };
    let is_word = |letter: char| letter.is_alphanumeric() || "_./-*".contains(letter);
    let letters: Vec<(usize, char)> = text.char_indices().collect();
    let mut tokens = Vec::new();
    let mut next = 0;
    while let Some((_, letter)) = letters.get(next).copied() {
        let start = next;
        let taken = |from: usize, to: usize| letters[from..to].iter().map(|(_, letter)| *letter).collect::<String>();
        match letter {
            letter if letter.is_whitespace() => next += 1,
            '\'' | '"' => {
                next += 1;
                while letters.get(next).is_some_and(|(_, other)| *other != letter) {
                    next += 1;
                }
                if next == letters.len() {
                    return Err(wrong("this text has no closing quote", start));
                }
                tokens.push((Token::Text(taken(start + 1, next)), start));
                next += 1;
            }
            '(' | ')' | ',' => {
                tokens.push((
                    Token::Sign(if letter == '(' {
                        "("
                    } else if letter == ')' {
                        ")"
                    } else {
                        ","
                    }),
                    start,
                ));
                next += 1;
            }
            '<' | '>' | '=' | '!' => {
                let equal = letters.get(next + 1).is_some_and(|(_, next)| *next == '=');
                let sign = match (letter, equal) {
                    ('<', true) => "$leq",
                    ('<', false) => "$lt",
                    ('>', true) => "$geq",
                    ('>', false) => "$gt",
                    ('=', _) => "$eq",
                    ('!', true) => "$neq",
                    _ => return Err(wrong("expected `!=`", start)),
                };
                tokens.push((Token::Sign(sign), start));
                next += 1 + usize::from(equal);
            }
            letter if letter.is_ascii_digit() || "+-.".contains(letter) => {
                let in_number = |at: usize| {
                    let before = letters.get(at - 1).map(|(_, before)| *before);
                    letters.get(at).is_some_and(|(_, letter)| {
                        letter.is_ascii_digit()
                            || ".eE_".contains(*letter)
                            || ("+-".contains(*letter) && before.is_some_and(|before| "eE".contains(before)))
                    })
                };
                next += 1;
                while in_number(next) {
                    next += 1;
                }
                let digits = taken(start, next).replace('_', "");
                let digits = digits.strip_prefix('+').unwrap_or(&digits);
                let number = match (digits.parse::<i64>(), digits.parse::<f64>()) {
                    (Ok(whole), _) => json!(whole),
                    (_, Ok(number)) if number.is_finite() => json!(number),
                    _ => return Err(wrong("this is no number", start)),
                };
                tokens.push((Token::Number(number), start));
            }
            letter if is_word(letter) => {
                // A list choice belongs to the path: `covariance[?].x`.
                while let Some((_, letter)) = letters.get(next) {
                    if *letter == '[' {
                        let close = letters.iter().skip(next).position(|(_, letter)| *letter == ']');
                        let Some(close) = close else { return Err(wrong("this `[` has no `]`", next)) };
                        next += close + 1;
                    } else if is_word(*letter) {
                        next += 1;
                    } else {
                        break;
                    }
                }
                tokens.push((Token::Word(taken(start, next)), start));
            }
            other => return Err(wrong(&format!("`{other}` has no meaning here"), start)),
        }
    }
    Ok(tokens)
}

impl Parser<'_> {
    fn wrong(&self, why: impl Into<String>) -> ExprError {
        let at = self.tokens.get(self.at).map_or(self.text.chars().count(), |(_, at)| *at);
        ExprError { why: why.into(), text: self.text.to_owned(), at }
    }

    fn word(&mut self, word: &str) -> bool {
        let found =
            matches!(self.tokens.get(self.at), Some((Token::Word(found), _)) if found.eq_ignore_ascii_case(word));
        self.at += usize::from(found);
        found
    }

    fn sign(&mut self, sign: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some((Token::Sign(found), _)) if *found == sign);
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> Result<Node, ExprError> {
        let mut nodes = vec![self.all()?];
        while self.word("or") {
            nodes.push(self.all()?);
        }
        Ok(one_or(nodes, Node::Or))
    }

    fn all(&mut self) -> Result<Node, ExprError> {
        let mut nodes = vec![self.one()?];
        while self.word("and") {
            nodes.push(self.one()?);
        }
        Ok(one_or(nodes, Node::And))
    }

    fn one(&mut self) -> Result<Node, ExprError> {
        if self.word("not") {
            return Ok(Node::Not(Box::new(self.one()?)));
        }
        if self.sign("(") {
            let inner = self.any()?;
            return if self.sign(")") { Ok(inner) } else { Err(self.wrong("expected `)`")) };
        }
        self.condition().map(Node::Condition)
    }

    fn condition(&mut self) -> Result<Condition, ExprError> {
        let Some((Token::Word(path), at)) = self.tokens.get(self.at).cloned() else {
            return Err(self.wrong("expected a field, like IMU.acceleration.x, or `sequence`"));
        };
        self.at += 1;
        let is_time = path.ends_with(".created");
        if let Some((Token::Sign(sign), _)) = self.tokens.get(self.at).cloned()
            && sign.starts_with('$')
        {
            self.at += 1;
            let value = self.value(is_time)?;
            return Ok(Condition { path, operator: json!({ sign: value }), at });
        }
        let operator = if self.word("between") {
            json!({ "$between": self.pair(is_time)? })
        } else if self.word("outside") {
            json!({ "$outside": self.pair(is_time)? })
        } else if self.word("in") {
            if !self.sign("(") {
                return Err(self.wrong("expected `(`: in (1, 2, 3)"));
            }
            let mut values = vec![self.value(is_time)?];
            while self.sign(",") {
                values.push(self.value(is_time)?);
            }
            if !self.sign(")") {
                return Err(self.wrong("expected `,` or `)`"));
            }
            json!({ "$in": values })
        } else if self.word("match") || self.word("like") {
            json!({ "$match": self.value(false)? })
        } else if self.word("exists") {
            json!({ "$ex": null })
        } else if self.word("missing") {
            json!({ "$nex": null })
        } else if self.word("within") {
            let mut corners = vec![self.value(false)?];
            while self.sign(",") {
                corners.push(self.value(false)?);
            }
            if corners.len() != 4 || corners.iter().any(|corner| !corner.is_number()) {
                return Err(self.wrong("expected four numbers before here: within SOUTH,WEST,NORTH,EAST"));
            }
            let path = if path.contains('.') { path } else { format!("{path}.{WITHIN_OF_TAG}") };
            return Ok(Condition { path, operator: json!({ "$within": corners }), at });
        } else {
            return Err(
                self.wrong("expected an operator: = != < <= > >= between outside in match exists missing within")
            );
        };
        Ok(Condition { path, operator, at })
    }

    fn pair(&mut self, is_time: bool) -> Result<[Value; 2], ExprError> {
        let low = self.value(is_time)?;
        if !self.word("and") {
            return Err(self.wrong("expected `and`: between 1 and 2"));
        }
        Ok([low, self.value(is_time)?])
    }

    fn value(&mut self, is_time: bool) -> Result<Value, ExprError> {
        let value = match self.tokens.get(self.at) {
            Some((Token::Number(number), _)) => number.clone(),
            Some((Token::Text(text), _)) if is_time => {
                let ns = crate::when::parse(text);
                json!(ns.ok_or_else(|| self.wrong("expected a time, like '2026-11-22' or '2026-11-22 10:07:10'"))?)
            }
            Some((Token::Text(text), _)) => json!(text),
            Some((Token::Word(word), _)) if word == "true" || word == "false" => json!(word == "true"),
            Some((Token::Word(word), _)) => return Err(self.wrong(format!("a text needs quotes: '{word}'"))),
            _ => return Err(self.wrong("expected a value: a number, 'text', true or false")),
        };
        self.at += 1;
        Ok(value)
    }
}

fn one_or(mut nodes: Vec<Node>, many: fn(Vec<Node>) -> Node) -> Node {
    match nodes.len() {
        1 => nodes.remove(0),
        _ => many(nodes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Value) {
        assert_eq!(Value::Object(to_query(text).expect("parses")), expected);
    }

    #[test]
    fn fields_are_compared_and_joined() {
        check(
            "IMU.acceleration.x > 9 and GPS within 45.4,9.1,45.5,9.3",
            json!({ "ontology": { "$and": [
                { "IMU.acceleration.x": { "$gt": 9 } },
                { "GPS.$within-of-tag": { "$within": [45.4, 9.1, 45.5, 9.3] } },
            ] } }),
        );
        check(
            "not (A.x <= -1.5e3 or A.y in (1, 2)) and A.z between 1 and 2 and A.t match 'a*'",
            json!({ "ontology": { "$and": [
                { "$not": { "$or": [{ "A.x": { "$leq": -1500.0 } }, { "A.y": { "$in": [1, 2] } }] } },
                { "A.z": { "$between": [1, 2] } },
                { "A.t": { "$match": "a*" } },
            ] } }),
        );
        check("A.c[?].x != true", json!({ "ontology": { "$and": [{ "A.c[?].x": { "$neq": true } }] } }));
        check(
            "A.x exists or A.y missing",
            json!({ "ontology": { "$and": [
            { "$or": [{ "A.x": { "$ex": null } }, { "A.y": { "$nex": null } }] }
        ] } }),
        );
    }

    #[test]
    fn names_metadata_and_times_ask_of_the_recording() {
        check(
            "sequence match 'drive*' and sequence.user_metadata.car.model = \"x\" and topic.tag = 'IMU' \
             and sequence.created > '1970-01-02'",
            json!({
                "sequence": { "name": { "$match": "drive*" }, "user_metadata": { "car.model": { "$eq": "x" } },
                    "created_at_ns": { "$gt": 86_400_000_000_000_i64 } },
                "topic": { "ontology_tag": { "$eq": "IMU" } },
            }),
        );
    }

    #[track_caller]
    fn check_wrong(text: &str, why: &str, at: usize) {
        let error = to_query(text).expect_err("must be refused");
        assert!(error.why.contains(why), "{error}");
        assert_eq!(error.at, at, "{error}");
    }

    #[test]
    fn what_is_wrong_is_pointed_at() {
        check_wrong("IMU.x >", "a value", 7);
        check_wrong("IMU.x 9", "an operator", 6);
        check_wrong("IMU.x = base", "quotes", 8);
        check_wrong("IMU.x = 'base", "closing quote", 8);
        check_wrong("(IMU.x = 1", "`)`", 10);
        check_wrong("IMU.x = 1 IMU.y = 2", "`and`", 10);
        check_wrong("GPS within 1,2,3", "four numbers", 16);
        check_wrong("sequence = 'a' or IMU.x = 1", "at the top", 0);
        check_wrong("sequence = 'a' and sequence = 'b'", "twice", 19);
        check_wrong("", "a field", 0);
    }
}
