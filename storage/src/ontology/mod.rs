//! What a tag means: registered schemas, how two of them differ, and what the skip index adds.
//!
//! Pure: no catalog, no file. A registered version never changes; what the index derives from its
//! columns is declared in the record, so that statistics written years ago are read as they were
//! meant. The public ontologies (`builtin.json`, from the Apache-2.0 Python SDK) come with the program.

pub mod form;

use crate::chunk::stats::leaves;
use crate::error::{Result, StorageError};
use crate::schema::{TIME_COLUMN, TopicSchema, field_at};
use arrow::datatypes::{DataType, Field, Fields, SchemaRef};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;

/// Where a version came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// Comes with the program.
    Builtin,
    /// By the action or command `ontology_register`.
    Registered,
    /// Taken from the first topic that used it (mode `open`).
    FirstUse,
}

impl Origin {
    /// The name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Builtin => "builtin",
            Self::Registered => "registered",
            Self::FirstUse => "first use",
        }
    }
}

/// What the skip index keeps beside the bounds of the leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Derived {
    /// Bounds of the Euclidean norm of a vector: three leaves `x`, `y`, `z`. Queried as `path.norm`.
    Norm {
        /// The index column, which is also the path in queries.
        column: String,
        /// The three leaves.
        of: [String; 3],
    },
    /// A geographic box, right across the antimeridian. Queried by `$within` on the path.
    Box {
        /// The path that `$within` is asked of.
        path: String,
        /// Leaf with degrees north.
        latitude: String,
        /// Leaf with degrees east.
        longitude: String,
    },
    /// The distinct values of a text leaf, while they are few.
    Values {
        /// The leaf.
        path: String,
    },
}

impl Derived {
    /// Name of the index column; the marks cannot be part of a queried path.
    pub fn column(&self) -> String {
        match self {
            Self::Norm { column, .. } => column.clone(),
            Self::Box { path, .. } => box_column(path),
            Self::Values { path } => values_column(path),
        }
    }
}

/// Index column of the box asked of `path`.
pub fn box_column(path: &str) -> String {
    format!("{path}@box")
}

/// Index column of the distinct values of `path`.
pub fn values_column(path: &str) -> String {
    format!("{path}@values")
}

/// One version of an ontology, as the catalog keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OntologyRecord {
    /// The tag.
    pub tag: String,
    /// 1, 2, 3, … in the order they were registered.
    pub version: u32,
    /// Where it came from.
    pub origin: Origin,
    /// Nanoseconds since 1970.
    pub created_at_ns: i64,
    /// The schema as an IPC message.
    #[serde(with = "serde_bytes")]
    pub schema: Vec<u8>,
    /// What the index adds.
    pub derived: Vec<Derived>,
}

/// A version with its schema decoded.
#[derive(Debug, Clone)]
pub struct Ontology {
    /// The record.
    pub record: OntologyRecord,
    /// The schema as writers send it.
    pub wire: SchemaRef,
    /// The schema of the files.
    pub stored: SchemaRef,
    /// The columns of the skip index, in the order of a chunk's statistics.
    pub columns: Vec<String>,
    /// Equal for schemas that are [`Relation::Same`], and in practice only for these.
    pub fingerprint: u128,
}

impl Ontology {
    /// Makes a version from a schema.
    ///
    /// # Errors
    /// [`StorageError::Unstorable`] when topics of this schema could not be stored.
    pub fn new(tag: &str, version: u32, origin: Origin, created_at_ns: i64, wire: SchemaRef) -> Result<Self> {
        let schema = TopicSchema::derive(Arc::clone(&wire))?;
        let derived = derive(&schema.stored, tag);
        let record = OntologyRecord {
            tag: tag.to_owned(),
            version,
            origin,
            created_at_ns,
            schema: crate::schema::to_ipc(&wire),
            derived,
        };
        let columns = columns(&schema.stored, &record.derived);
        let fingerprint = fingerprint(&wire);
        Ok(Self { record, wire, stored: schema.stored, columns, fingerprint })
    }

    /// Takes a version from the catalog.
    ///
    /// # Errors
    /// When its schema does not decode.
    pub fn load(record: OntologyRecord) -> Result<Self> {
        let wire = crate::schema::from_ipc(&record.schema)?;
        let schema = TopicSchema::derive(Arc::clone(&wire))?;
        let columns = columns(&schema.stored, &record.derived);
        let fingerprint = fingerprint(&wire);
        Ok(Self { record, wire, stored: schema.stored, columns, fingerprint })
    }

    /// Position of an index column.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column == name)
    }
}

/// Over names, types and nullability of all fields in order; metadata left out.
fn fingerprint(schema: &SchemaRef) -> u128 {
    let bare = |field: &Field| form::field_text(field);
    let text: String = schema.fields().iter().map(|field| bare(field)).collect();
    twox_hash::XxHash3_128::oneshot(text.as_bytes())
}

fn columns(stored: &SchemaRef, derived: &[Derived]) -> Vec<String> {
    let mut columns = leaves(stored);
    columns.extend(derived.iter().map(Derived::column));
    columns
}

/// What is worth keeping of a schema, by shape: the rule is applied once, when a version is
/// registered, and its result is part of the record.
fn derive(stored: &SchemaRef, tag: &str) -> Vec<Derived> {
    let known: std::collections::HashSet<String> = leaves(stored).into_iter().collect();
    let free = |column: &str| !known.contains(column) && field_at(stored, column).is_none();
    let has = |path: &str| field_at(stored, path).is_some_and(DataType::is_numeric);
    let mut derived = Vec::new();
    let mut vectors = vec![String::new()];
    let mut texts = Vec::new();
    walk(stored.fields(), "", &mut vectors, &mut texts);
    for at in vectors {
        let dotted = if at.is_empty() { String::new() } else { format!("{at}.") };
        let of = ["x", "y", "z"].map(|axis| format!("{dotted}{axis}"));
        let column = format!("{dotted}norm");
        // A quaternion has a norm of one; positions in degrees have none worth asking for.
        let is_vector = of.iter().all(|leaf| has(leaf)) && !has(&format!("{dotted}w")) && free(&column);
        let is_position = is_gps(tag) && at == "position";
        if is_vector && is_position {
            derived.push(Derived::Box { path: at, latitude: of[0].clone(), longitude: of[1].clone() });
        } else if is_vector {
            derived.push(Derived::Norm { column, of });
        } else if has(&format!("{dotted}latitude")) && has(&format!("{dotted}longitude")) {
            let (latitude, longitude) = (format!("{dotted}latitude"), format!("{dotted}longitude"));
            derived.push(Derived::Box { path: at, latitude, longitude });
        }
    }
    derived.extend(texts.into_iter().map(|path| Derived::Values { path }));
    // The marks of derived columns may be part of somebody's names.
    derived.retain(|derived| free(&derived.column()));
    derived
}

/// The tags whose `position` is latitude and longitude in degrees (x and y), of all client generations.
fn is_gps(tag: &str) -> bool {
    matches!(tag, "GPS" | "gps")
}

fn walk(fields: &Fields, at: &str, structs: &mut Vec<String>, texts: &mut Vec<String>) {
    for field in fields {
        let path = if at.is_empty() { field.name().clone() } else { format!("{at}.{}", field.name()) };
        match field.data_type() {
            DataType::Struct(children) => {
                structs.push(path.clone());
                walk(children, &path, structs, texts);
            }
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => texts.push(path),
            _ => {}
        }
    }
}

/// How an offered schema relates to a registered one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relation {
    /// The same fields with the same types, to the letter (metadata apart).
    Same,
    /// Fields were added, left out, moved or made nullable; none changed its type.
    Compatible {
        /// The first field that differs.
        difference: Difference,
    },
    /// A field has another type.
    Changed {
        /// That field.
        difference: Difference,
    },
}

/// The first field in which two schemas differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Dotted path.
    pub field: String,
    /// What is registered.
    pub expected: String,
    /// What was offered.
    pub found: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "field `{}`: expected {}, found {}", self.field, self.expected, self.found)
    }
}

/// Compares an offered schema with a registered one.
pub fn relate(registered: &SchemaRef, offered: &SchemaRef) -> Relation {
    let mut first = FirstDifference::default();
    compare_fields(registered.fields(), offered.fields(), "", &mut first);
    match (first.changed, first.compatible) {
        (Some(difference), _) => Relation::Changed { difference },
        (None, Some(difference)) => Relation::Compatible { difference },
        (None, None) => Relation::Same,
    }
}

#[derive(Default)]
struct FirstDifference {
    changed: Option<Difference>,
    compatible: Option<Difference>,
}

fn compare_fields(registered: &Fields, offered: &Fields, at: &str, first: &mut FirstDifference) {
    let path = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    let difference = |name: &str, expected: &str, found: &str| Difference {
        field: path(name),
        expected: expected.to_owned(),
        found: found.to_owned(),
    };
    let by_name = |fields: &Fields| -> HashMap<String, usize> {
        fields.iter().enumerate().rev().map(|(at, field)| (field.name().clone(), at)).collect()
    };
    let (of_registered, of_offered) = (by_name(registered), by_name(offered));
    for field in registered {
        match of_offered.get(field.name()).and_then(|at| offered.get(*at)) {
            Some(candidate) => compare_field(field, candidate, &path(field.name()), first),
            None => {
                let missing = difference(field.name(), &describe(field), "no such field");
                first.compatible.get_or_insert(missing);
            }
        }
    }
    for field in offered.iter().filter(|field| !of_registered.contains_key(field.name())) {
        first.compatible.get_or_insert(difference(field.name(), "no such field", &describe(field)));
    }
    let order = |fields: &Fields| fields.iter().map(|field| field.name().clone()).collect::<Vec<_>>();
    if first.compatible.is_none() && order(registered) != order(offered) {
        let moved = registered.iter().zip(offered).find(|(a, b)| a.name() != b.name());
        if let Some((expected, found)) = moved {
            first.compatible = Some(difference(expected.name(), expected.name(), found.name()));
        }
    }
}

fn compare_field(registered: &Field, offered: &Field, path: &str, first: &mut FirstDifference) {
    use DataType::{FixedSizeList, LargeList, LargeListView, List, ListView, Map, Struct};
    let child = |name: &str| format!("{path}.{name}");
    match (registered.data_type(), offered.data_type()) {
        (Struct(a), Struct(b)) => compare_fields(a, b, path, first),
        (List(a), List(b))
        | (LargeList(a), LargeList(b))
        | (ListView(a), ListView(b))
        | (LargeListView(a), LargeListView(b))
        | (Map(a, _), Map(b, _))
            if a.name() == b.name() =>
        {
            compare_field(a, b, &child(a.name()), first);
        }
        (FixedSizeList(a, n), FixedSizeList(b, m)) if n == m && a.name() == b.name() => {
            compare_field(a, b, &child(a.name()), first);
        }
        (a, b) if a == b => {}
        _ => {
            let difference =
                Difference { field: path.to_owned(), expected: describe(registered), found: describe(offered) };
            first.changed.get_or_insert(difference);
        }
    }
    if registered.is_nullable() != offered.is_nullable() {
        let word = |field: &Field| if field.is_nullable() { "nullable" } else { "not null" };
        first.compatible.get_or_insert(Difference {
            field: path.to_owned(),
            expected: word(registered).to_owned(),
            found: word(offered).to_owned(),
        });
    }
}

fn describe(field: &Field) -> String {
    form::type_name(field.data_type())
}

/// The ontologies that come with the program.
///
/// # Errors
/// When the shipped file is broken, which its test rules out.
pub fn builtin() -> Result<Vec<Ontology>> {
    let text = include_str!("builtin.json");
    let parsed: serde_json::Value = serde_json::from_str(text)
        .map_err(|error| StorageError::Decode { what: "builtin.json", text: error.to_string() })?;
    let ontologies = parsed["ontologies"].as_object().cloned().unwrap_or_default();
    ontologies
        .iter()
        .map(|(tag, ontology)| {
            let schema = form::schema_from_json(&ontology["schema"])
                .map_err(|text| StorageError::Decode { what: "builtin.json", text: format!("{tag}: {text}") })?;
            Ontology::new(tag, 1, Origin::Builtin, 0, schema)
        })
        .collect()
}

/// A path that exists in every topic.
pub fn is_time(path: &str) -> bool {
    path == TIME_COLUMN
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::Schema;

    fn builtin_of(tag: &str) -> Ontology {
        builtin().expect("parses").into_iter().find(|ontology| ontology.record.tag == tag).expect("is built in")
    }

    #[test]
    fn sixty_ontologies_come_with_the_program_and_all_can_be_stored() {
        let all = builtin().expect("parses");
        assert_eq!(all.len(), 60);
        for ontology in &all {
            crate::chunk::prove_round_trip(&TopicSchema::derive(Arc::clone(&ontology.wire)).expect("derives"))
                .unwrap_or_else(|error| panic!("{}: {error}", ontology.record.tag));
        }
    }

    #[track_caller]
    fn check_derived(tag: &str, column: &str) {
        let ontology = builtin_of(tag);
        assert!(ontology.column(column).is_some(), "{tag} has {:?}", ontology.record.derived);
    }

    #[test]
    fn ontologies_get_what_their_meaning_asks_for() {
        check_derived("IMU", "acceleration.norm");
        check_derived("IMU", "angular_velocity.norm");
        check_derived("IMU", "header.frame_id@values");
        check_derived("Vector3d", "norm");
        check_derived("GPS", "position@box");
        check_derived("GPS", "velocity.norm");
        check_derived("Image", "encoding@values");
        check_derived("Lidar", "x[?]");
        assert_eq!(builtin_of("GPS").column("position.norm"), None);
        assert_eq!(builtin_of("IMU").column("orientation.norm"), None);
    }

    #[test]
    fn a_version_survives_the_catalog() {
        for ontology in builtin().expect("parses") {
            let bytes = crate::catalog::records::pack(&ontology.record).expect("packs");
            let record: OntologyRecord = crate::catalog::records::unpack("ontology", &bytes).expect("unpacks");
            let back = Ontology::load(record).expect("loads");
            assert_eq!(back.columns, ontology.columns);
            assert_eq!(relate(&ontology.wire, &back.wire), Relation::Same);
            assert_eq!(back.fingerprint, ontology.fingerprint);
        }
    }

    fn schema(fields: Vec<Field>) -> SchemaRef {
        Arc::new(Schema::new(fields))
    }

    fn point(x: DataType) -> Field {
        Field::new("p", DataType::Struct(Fields::from(vec![Field::new("x", x, true)])), true)
    }

    #[test]
    fn the_first_field_that_changed_its_type_is_named_with_both_types() {
        let relation = relate(&schema(vec![point(DataType::Float64)]), &schema(vec![point(DataType::Float32)]));
        let Relation::Changed { difference } = relation else { panic!("{relation:?}") };
        assert_eq!(difference.to_string(), "field `p.x`: expected double, found float");
    }

    #[track_caller]
    fn check_compatible(offered: Vec<Field>, field: &str) {
        let registered = vec![point(DataType::Float64), Field::new("n", DataType::Int8, true)];
        let relation = relate(&schema(registered), &schema(offered));
        let Relation::Compatible { difference } = relation else { panic!("{relation:?}") };
        assert_eq!(difference.field, field);
    }

    #[test]
    fn added_missing_moved_and_nullable_fields_are_compatible() {
        let (p, n) = (point(DataType::Float64), Field::new("n", DataType::Int8, true));
        check_compatible(vec![p.clone(), n.clone(), Field::new("more", DataType::Int8, true)], "more");
        check_compatible(vec![p.clone()], "n");
        check_compatible(vec![n, p.clone()], "p");
        check_compatible(vec![p, Field::new("n", DataType::Int8, false)], "n");
    }
}
