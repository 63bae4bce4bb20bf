//! The actions that ask: `query`, the temporal filters, and the ontology registry. JSON shapes as
//! protocol.md sections 2.9 and 3 have them; extensions of ours appear only where they were asked for.

use crate::flight::dialect::{Connection, Dialect};
use crate::flight::service::Shared;
use crate::flight::status::{invalid, of_registry, of_storage};
use crate::lifecycle::{Locator, find_topic};
use crate::ontology::Registry;
use crate::query::answer::{Answer, Cost, Hit};
use crate::query::engine::Engine;
use crate::query::pattern::Meaning;
use crate::query::times::{Clusters, Interval, intersect};
use crate::query::{QueryError, parse};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use storage::ontology::{Derived, Ontology, Origin, form};
use storage::read::Window;
use storage::turn::Turn;
use tonic::{Code, Status};

type Fields = Map<String, Value>;

impl From<QueryError> for Status {
    fn from(error: QueryError) -> Self {
        match &error {
            QueryError::Invalid { .. } => Self::new(Code::InvalidArgument, error.to_string()),
            QueryError::TooMuch { .. } => Self::new(Code::ResourceExhausted, error.to_string()),
            QueryError::Storage(error) => of_storage(error),
        }
    }
}

fn engine(shared: &Shared, turn: Turn) -> Engine {
    Engine {
        catalog: shared.lifecycle.catalog.clone(),
        registry: Arc::clone(&shared.lifecycle.registry),
        loader: shared.lifecycle.loader.clone(),
        data_dir: shared.config.data_dir.clone(),
        turn,
    }
}

/// The action `query`.
pub(crate) async fn query(shared: &Shared, connection: &Connection, body: &Fields) -> Result<Value, Status> {
    let started = Instant::now();
    let dialect = connection.note_query(body);
    let meaning = match dialect {
        Dialect::V0 | Dialect::S3To5 => Meaning::Substring,
        Dialect::Unknown | Dialect::S6 | Dialect::S7 => Meaning::Glob,
    };
    let query = parse::query(body, meaning)?;
    let (explain, intervals, time_range) = (query.explain, query.intervals, query.time_range);
    let answer = engine(shared, turn(shared).await?).run(query).await?;
    // v0 takes names only; whoever asks for more than it knows gets objects.
    let names_only = dialect == Dialect::V0 && !intervals && !time_range;
    let topic = |hit: &Hit| {
        if names_only { json!(hit.topic.locator) } else { topic_json(hit, intervals, time_range) }
    };
    let items: Vec<Value> = answer
        .items
        .iter()
        .map(|item| {
            let topics: Vec<Value> = item.topics.iter().map(topic).collect();
            let mut object = json!({ "sequence": item.sequence.name, "topics": topics });
            if let (true, Some(object)) = (intervals, object.as_object_mut()) {
                object.insert("windows".to_owned(), intervals_json(&item.windows));
            }
            object
        })
        .collect();
    let mut response = json!({ "items": items });
    if let Some(object) = response.as_object_mut() {
        if answer.truncated {
            object.insert("truncated".to_owned(), json!(true));
        }
        if explain {
            object.insert("explain".to_owned(), explain_json(&answer, started));
        }
    }
    Ok(response)
}

fn topic_json(hit: &Hit, intervals: bool, time_range: bool) -> Value {
    let mut object = json!({ "locator": hit.topic.locator, "ontology_tag": hit.topic.ontology_tag });
    if let Some(object) = object.as_object_mut() {
        if let (true, Some((first, last))) = (time_range, hit.range) {
            object.insert("timestamp_range".to_owned(), json!([first, last]));
        }
        if intervals {
            object.insert("intervals".to_owned(), intervals_json(&hit.intervals));
        }
    }
    object
}

fn intervals_json(intervals: &[Interval]) -> Value {
    intervals.iter().map(|(start, end)| json!({ "start_ns": start, "end_ns": end })).collect()
}

fn explain_json(answer: &Answer, started: Instant) -> Value {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let Cost { topics, chunks, ruled_out, proven, read, bytes_read, bytes_stored } = answer.cost.as_ref();
    json!({
        "topics_considered": load(topics),
        "chunks_considered": load(chunks),
        "chunks_ruled_out": load(ruled_out),
        "chunks_proven": load(proven),
        "chunks_read": load(read),
        "bytes_read": load(bytes_read),
        "bytes_stored": load(bytes_stored),
        "micros": u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
    })
}

/// One topic of a temporal filter.
struct Filtered {
    clusters: Vec<Interval>,
    sequence: String,
}

async fn clusters_of(shared: &Shared, turn: &Turn, action: &str, fields: &Fields) -> Result<Filtered, Status> {
    let text = |key: &str| {
        let text = fields.get(key).and_then(Value::as_str);
        text.ok_or_else(|| invalid(format!("action `{action}` needs the text `{key}`")))
    };
    let locator = Locator::topic("locator", text("locator")?)?;
    let topic = find_topic(&shared.lifecycle.catalog, &locator)?;
    let dt = nanoseconds(action, fields, "clustering_dt_ns")?;
    let ontology = fields.get("ontology").unwrap_or(&Value::Null);
    let content = parse::ontology(ontology)?;
    let engine = engine(shared, turn.clone());
    engine.check(&content)?;
    let expr = match (content.tags.as_slice(), content.groups.as_slice()) {
        ([(tag, expr)], []) if *tag == topic.ontology_tag => expr.clone(),
        ([], []) => return Err(invalid(format!("action `{action}`: `ontology` asks nothing of topic `{locator}`"))),
        _ => {
            return Err(invalid(format!(
                "action `{action}`: topic `{locator}` has the ontology `{}`, and `ontology` asks of another",
                topic.ontology_tag
            )));
        }
    };
    let window = window(action, fields.get("timestamp_range"))?;
    let mut clusters = Clusters::new(dt);
    engine.times_of(&topic, &expr, window, &mut clusters).await?;
    if clusters.is_full() {
        return Err(Status::resource_exhausted(format!(
            "action `{action}`: topic `{locator}` has more than {} windows; give a larger clustering_dt_ns or a \
             narrower timestamp_range",
            crate::limits::FILTER_WINDOWS_MAX
        )));
    }
    let sequence = locator.split('/').next().unwrap_or("").to_owned();
    Ok(Filtered { clusters: clusters.finish(), sequence })
}

fn nanoseconds(action: &str, fields: &Fields, key: &str) -> Result<u64, Status> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value
            .as_u64()
            .ok_or_else(|| invalid(format!("action `{action}`: `{key}` is {value}, not nanoseconds from 0 on"))),
    }
}

fn window(action: &str, range: Option<&Value>) -> Result<Window, Status> {
    let Some(range) = range.filter(|range| !range.is_null()) else {
        return Ok(Window::default());
    };
    let time = |key: &str| {
        let time = range.get(key).filter(|time| !time.is_null());
        let wrong = || invalid(format!("action `{action}`: `timestamp_range.{key}` is no whole number of nanoseconds"));
        time.map(|time| time.as_i64().ok_or_else(wrong)).transpose()
    };
    let window = Window { start: time("start_ns")?, end: time("end_ns")? };
    match (window.start, window.end) {
        (Some(start), Some(end)) if start >= end => {
            Err(invalid(format!("action `{action}`: the time range [{start}, {end}) is empty")))
        }
        _ => Ok(window),
    }
}

/// The action `topic_filter_clusterize`.
pub(crate) async fn clusterize(shared: &Shared, fields: &Fields) -> Result<Vec<Interval>, Status> {
    let turn = turn(shared).await?;
    Ok(clusters_of(shared, &turn, "topic_filter_clusterize", fields).await?.clusters)
}

/// Questions wait for one another: what they may hold together is part of INV-7's sum.
pub(super) async fn turn(shared: &Shared) -> Result<Turn, Status> {
    Turn::take(&shared.queries).await.map_err(|_| Status::unavailable("the server is shutting down"))
}

/// The action `topic_filter_intersect`.
pub(crate) async fn intersection(shared: &Shared, fields: &Fields) -> Result<Vec<Interval>, Status> {
    let turn = turn(shared).await?;
    let action = "topic_filter_intersect";
    let topics = fields.get("topics").and_then(Value::as_array).filter(|topics| topics.len() >= 2);
    let topics = topics.ok_or_else(|| invalid(format!("action `{action}` needs `topics`, at least two")))?;
    if topics.len() > crate::limits::FILTER_TOPICS_MAX {
        let most = crate::limits::FILTER_TOPICS_MAX;
        return Err(invalid(format!("action `{action}`: {} topics, over the limit of {most}", topics.len())));
    }
    let dt = nanoseconds(action, fields, "intersect_dt_ns")?;
    let mut all = Vec::with_capacity(topics.len());
    for topic in topics {
        let fields = topic.as_object().ok_or_else(|| invalid(format!("action `{action}`: a topic is no object")))?;
        all.push(clusters_of(shared, &turn, action, fields).await?);
    }
    if let Some(other) = all.iter().find(|other| other.sequence != all[0].sequence) {
        let (a, b) = (&all[0].sequence, &other.sequence);
        return Err(invalid(format!("action `{action}`: topics of different sequences, `{a}` and `{b}`")));
    }
    let clusters: Vec<Vec<Interval>> = all.into_iter().map(|topic| topic.clusters).collect();
    Ok(intersect(&clusters, dt))
}

/// The action `ontology_list`.
pub(crate) fn ontology_list(shared: &Shared) -> Value {
    let ontologies: Vec<Value> = shared.lifecycle.registry.all().iter().map(|ontology| summary(ontology)).collect();
    json!({ "ontologies": ontologies })
}

fn summary(ontology: &Ontology) -> Value {
    json!({
        "tag": ontology.record.tag,
        "version": ontology.record.version,
        "origin": ontology.record.origin.name(),
        "created_at_ns": ontology.record.created_at_ns,
        "fields": ontology.wire.fields().len(),
    })
}

/// A version in full.
fn full(ontology: &Ontology) -> Value {
    let mut value = summary(ontology);
    if let Some(object) = value.as_object_mut() {
        object.insert("schema".to_owned(), form::schema_to_json(&ontology.wire));
        let derived: Vec<Value> = ontology.record.derived.iter().map(derived_json).collect();
        object.insert("index".to_owned(), json!(derived));
        let columns: Vec<&String> = ontology.columns.iter().filter(|column| !column.contains('@')).collect();
        object.insert("columns".to_owned(), json!(columns));
    }
    value
}

fn derived_json(derived: &Derived) -> Value {
    match derived {
        Derived::Norm { column, of } => json!({ "norm": column, "of": of }),
        Derived::Box { path, latitude, longitude } => {
            json!({ "box": path, "latitude": latitude, "longitude": longitude })
        }
        Derived::Values { path } => json!({ "values": path }),
    }
}

fn tag(fields: &Fields) -> Result<&str, Status> {
    let tag = fields.get("tag").and_then(Value::as_str).ok_or_else(|| invalid("this action needs the text `tag`"))?;
    crate::lifecycle::check_tag("tag", tag)?;
    Ok(tag)
}

/// The action `ontology_get`: a version, or the newest.
pub(crate) fn ontology_get(shared: &Shared, fields: &Fields) -> Result<Value, Status> {
    let tag = tag(fields)?;
    let version = match fields.get("version") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let version = value.as_u64().and_then(|version| u32::try_from(version).ok());
            Some(version.ok_or_else(|| invalid(format!("`version` is {value}, not a whole number")))?)
        }
    };
    let registry = &shared.lifecycle.registry;
    let found = registry.get(tag, version).ok_or_else(|| {
        let near = registry.nearest(tag).map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        let which = version.map_or_else(String::new, |version| format!(" version {version}"));
        Status::not_found(format!("ontology `{tag}`{which} is not registered{near}"))
    })?;
    Ok(full(&found))
}

/// The action `ontology_register`: `schema` in the JSON form, or `ipc` as base64 of an Arrow schema message.
pub(crate) async fn ontology_register(shared: &Shared, fields: &Fields) -> Result<Value, Status> {
    use base64::Engine as _;
    let tag = tag(fields)?.to_owned();
    let wire = match (fields.get("schema"), fields.get("ipc")) {
        (Some(schema), None) => form::schema_from_json(schema).map_err(|why| invalid(format!("`schema`: {why}")))?,
        (None, Some(Value::String(ipc))) => {
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(ipc)
                .map_err(|error| invalid(format!("`ipc` is not base64: {error}")))?;
            // A message may come with its stream framing: continuation and length.
            let framed = bytes.starts_with(&[0xff; 4]);
            let message = bytes.get(if framed { 8 } else { 0 }..).unwrap_or(&[]);
            storage::schema::from_ipc(message).map_err(|error| invalid(format!("`ipc`: {error}")))?
        }
        _ => return Err(invalid("give either `schema` (the JSON form) or `ipc` (base64 of an Arrow schema message)")),
    };
    storage::schema::TopicSchema::check(Arc::clone(&wire)).map_err(|error| of_storage(&error))?;
    let registry = Arc::clone(&shared.lifecycle.registry);
    let offered = Registry::offer(&tag, &wire, Origin::Registered).map_err(|error| of_registry(&error))?;
    let registering = shared.lifecycle.committer.change(move |txn, _| registry.register(txn, offered));
    let registered = registering.await.map_err(|error| of_registry(&error))?;
    Ok(full(&registered))
}
