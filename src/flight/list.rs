//! Listings: sequences, FlightInfo of a sequence or topic, schemas. Everything comes from the catalog;
//! a file is opened only to count rows at the edge of a time window.

use crate::flight::dialect::{Connection, Hint};
use crate::flight::get::{Ticket, topic_metadata};
use crate::flight::service::Shared;
use crate::flight::status::{invalid, of_storage};
use crate::lifecycle::{Locator, find_sequence, find_topic};
use arrow::datatypes::Schema;
use arrow_flight::flight_descriptor::DescriptorType;
use arrow_flight::{FlightDescriptor, FlightEndpoint, FlightInfo, Location, Ticket as FlightTicket};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::Look;
use storage::catalog::records::{SequenceRecord, TopicRecord, TopicTotals};
use storage::read::{TopicView, Window, count};
use tonic::Status;

fn stored(error: StorageError) -> Status {
    of_storage(&error)
}

/// All sequences, one FlightInfo each, with a PATH descriptor of the name.
pub(crate) fn list_flights(shared: &Shared, criteria: &[u8]) -> Result<Vec<FlightInfo>, Status> {
    if !matches!(criteria, b"" | b"/") {
        return Err(invalid("ListFlights takes empty criteria, which means all sequences"));
    }
    let sequences = shared.lifecycle.catalog.sequences().map_err(stored)?;
    Ok(sequences
        .into_iter()
        .map(|sequence| {
            let endpoint = FlightEndpoint::new().with_ticket(FlightTicket::new(sequence.name.clone()));
            FlightInfo::new().with_descriptor(FlightDescriptor::new_path(vec![sequence.name])).with_endpoint(endpoint)
        })
        .collect())
}

/// What a GetFlightInfo or GetSchema asks for.
pub(super) struct Request {
    locator: Locator,
    window: Window,
    v0: bool,
}

pub(super) fn request(connection: &Connection, descriptor: &FlightDescriptor) -> Result<Request, Status> {
    match descriptor.r#type() {
        DescriptorType::Path => {
            connection.note(Hint::V0);
            let [path] = descriptor.path.as_slice() else {
                return Err(invalid("a PATH descriptor has exactly one element, `sequence` or `sequence/topic`"));
            };
            Ok(Request { locator: Locator::parse("path", path)?, window: Window::default(), v0: true })
        }
        DescriptorType::Cmd => {
            connection.note(Hint::Session);
            let command: Value = serde_json::from_slice(&descriptor.cmd)
                .map_err(|error| invalid(format!("the descriptor is not JSON: {error}")))?;
            let text = command
                .get("resource_locator")
                .and_then(Value::as_str)
                .ok_or_else(|| invalid("the descriptor has no text `resource_locator`"))?;
            let window =
                Window { start: time(&command, "timestamp_ns_start")?, end: time(&command, "timestamp_ns_end")? };
            if let (Some(start), Some(end)) = (window.start, window.end)
                && start >= end
            {
                return Err(invalid(format!(
                    "the time range [{start}, {end}) is empty; timestamp_ns_start must be less than timestamp_ns_end"
                )));
            }
            Ok(Request { locator: Locator::parse("resource_locator", text)?, window, v0: false })
        }
        DescriptorType::Unknown => Err(invalid("the descriptor has no type; use CMD or PATH")),
    }
}

fn time(command: &Value, key: &str) -> Result<Option<i64>, Status> {
    match command.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64() {
            Some(time) => Ok(Some(time)),
            None => Err(invalid(format!("`{key}` is {value}, not a whole number of nanoseconds"))),
        },
    }
}

/// Answers GetFlightInfo for a sequence or a topic.
pub(crate) async fn flight_info(
    shared: &Shared,
    connection: &Connection,
    descriptor: FlightDescriptor,
) -> Result<FlightInfo, Status> {
    let request = request(connection, &descriptor)?;
    let catalog = &shared.lifecycle.catalog;
    let sequence = find_sequence(catalog, &request.locator.sequence)?;
    let (topics, schema) = match &request.locator.topic {
        None => (catalog.topics_of(sequence.id).map_err(stored)?, sequence_schema(&sequence)),
        Some(path) => {
            let topic = find_topic(catalog, &format!("{}/{path}", request.locator.sequence))?;
            let schema = topic_schema(shared, &topic, request.v0)?;
            (vec![topic], schema)
        }
    };
    let mut info = FlightInfo::new()
        .try_with_schema(&schema)
        .map_err(|error| Status::internal(error.to_string()))?
        .with_descriptor(descriptor);
    let mut rows = 0;
    for topic in &topics {
        let totals = catalog.totals(topic.no).map_err(stored)?;
        rows += totals.rows;
        info = info.with_endpoint(endpoint(shared, &request, topic, &totals).await?);
    }
    if request.locator.topic.is_none() {
        info = info.with_app_metadata(sequence_metadata(shared, &sequence, &topics)?.to_string());
    }
    Ok(info.with_total_records(i64::try_from(rows).unwrap_or(i64::MAX)))
}

async fn endpoint(
    shared: &Shared,
    request: &Request,
    topic: &TopicRecord,
    totals: &TopicTotals,
) -> Result<FlightEndpoint, Status> {
    let window = if request.window.is_all() { None } else { Some(window_info(shared, topic, request.window).await?) };
    let mut metadata = endpoint_metadata(topic, totals, window);
    let of_topic = shared.lifecycle.catalog.topic_ontology(topic.no).map_err(stored)?;
    if let (Some(of_topic), Some(object)) = (of_topic, metadata.as_object_mut()) {
        let ontology = json!({ "version": of_topic.version, "note": of_topic.note });
        object.insert("flightbox_ontology".to_owned(), ontology);
    }
    let partial = shared.lifecycle.catalog.topic_partial(topic.no).map_err(stored)?;
    let partial = partial.filter(|_| topic.completed_at_ns.is_some());
    if let (Some(partial), Some(object)) = (partial, metadata.as_object_mut()) {
        let partial =
            json!({ "rows": partial.rows, "batches": partial.batches, "accepted_at_ns": partial.accepted_at_ns });
        object.insert("flightbox_partial".to_owned(), partial);
    }
    let endpoint = FlightEndpoint::new().with_app_metadata(metadata.to_string());
    if request.v0 {
        return Ok(endpoint.with_ticket(FlightTicket::new(topic.locator.clone())));
    }
    let ticket = Ticket { topic: topic.id, window: request.window };
    // 0.3 takes the topic's name from the one location; later clients ignore the scheme.
    let location = Location { uri: format!("mosaico:{}", topic.locator) };
    let mut endpoint = endpoint.with_ticket(FlightTicket::new(ticket.encode()));
    endpoint.location.push(location);
    Ok(endpoint)
}

async fn window_info(shared: &Shared, topic: &TopicRecord, window: Window) -> Result<Value, Status> {
    let view = {
        let pin = shared.lifecycle.catalog.pin().map_err(|error| of_storage(&error))?;
        let catalog = pin.view();
        TopicView::load(&catalog, &shared.config.data_dir, topic.clone()).map_err(stored)?
    };
    let (rows, interval) = match view {
        Some(view) => count(&Arc::new(view), &shared.lifecycle.loader, window).await.map_err(stored)?,
        None => (0, None),
    };
    Ok(json!({ "interval": interval.map(interval_json), "row_count": rows }))
}

fn interval_json((start, end): (i64, i64)) -> Value {
    json!({ "start_ns": start, "end_ns": end })
}

/// The superset that all session clients accept (protocol.md 1.3).
fn endpoint_metadata(topic: &TopicRecord, totals: &TopicTotals, window: Option<Value>) -> Value {
    let interval = totals.time.map(interval_json);
    let mut info = json!({ "chunks_number": totals.chunks, "total_bytes": total_bytes(totals) });
    if let (Some(interval), Some(object)) = (&interval, info.as_object_mut()) {
        object.insert("timestamp".to_owned(), interval.clone());
    }
    json!({
        "resource_locator": topic.locator,
        "created_at_ns": topic.created_at_ns,
        "locked": topic.completed_at_ns.is_some(),
        "completed_at_ns": topic.completed_at_ns,
        "ontology_tag": topic.ontology_tag,
        "serialization_format": topic.format.name(),
        "user_metadata": user_metadata(&topic.user_metadata),
        "info": info,
        "data_info": {
            "total_bytes": total_bytes(totals),
            "total_chunks_count": totals.chunks,
            "total_row_count": totals.rows,
            "interval": interval,
        },
        "time_window_info": window,
    })
}

/// Bytes on disk; while all of it lies in the tail, its weight.
pub(crate) fn total_bytes(totals: &TopicTotals) -> u64 {
    if totals.chunks == 0 { totals.data_bytes } else { totals.stored_bytes }
}

fn sequence_metadata(shared: &Shared, sequence: &SequenceRecord, topics: &[TopicRecord]) -> Result<Value, Status> {
    let sessions: Vec<Value> = shared
        .lifecycle
        .catalog
        .sessions_of(sequence.id)
        .map_err(stored)?
        .into_iter()
        .map(|session| {
            let of_session: Vec<&str> =
                topics.iter().filter(|topic| topic.session == session.id).map(|topic| topic.locator.as_str()).collect();
            json!({
                "uuid": session.id.to_string(),
                "locator": session.locator,
                "created_at_ns": session.created_at_ns,
                "locked": session.completed_at_ns.is_some(),
                "completed_at_ns": session.completed_at_ns,
                "topics": of_session,
            })
        })
        .collect();
    Ok(json!({
        "resource_locator": sequence.name,
        "created_at_ns": sequence.created_at_ns,
        "user_metadata": user_metadata(&sequence.user_metadata),
        "sessions": sessions,
    }))
}

/// Always an object: null breaks clients.
fn user_metadata(text: &str) -> Value {
    serde_json::from_str(text).ok().filter(Value::is_object).unwrap_or_else(|| json!({}))
}

fn sequence_schema(sequence: &SequenceRecord) -> Schema {
    let metadata = HashMap::from([
        ("mosaico:context".to_owned(), "sequence".to_owned()),
        ("mosaico:user_metadata".to_owned(), user_metadata(&sequence.user_metadata).to_string()),
    ]);
    Schema::empty().with_metadata(metadata)
}

fn topic_schema(shared: &Shared, topic: &TopicRecord, v0: bool) -> Result<Schema, Status> {
    let totals = shared.lifecycle.catalog.totals(topic.no).map_err(stored)?;
    let extent = (!v0).then_some((totals.rows, totals.time));
    let schema = match shared.lifecycle.catalog.topic_schema(topic.no).map_err(stored)? {
        Some(message) => storage::schema::from_ipc(&message).map_err(stored)?.as_ref().clone(),
        None => Schema::empty(),
    };
    let mut metadata = schema.metadata().clone();
    metadata.extend(topic_metadata(topic, extent));
    Ok(schema.with_metadata(metadata))
}

/// Answers GetSchema, for a topic only.
pub(crate) fn get_schema(
    shared: &Shared,
    connection: &Connection,
    descriptor: &FlightDescriptor,
) -> Result<Schema, Status> {
    let request = request(connection, descriptor)?;
    match &request.locator.topic {
        None => Err(invalid("a sequence has no schema; ask for one of its topics")),
        Some(path) => {
            let topic = find_topic(&shared.lifecycle.catalog, &format!("{}/{path}", request.locator.sequence))?;
            topic_schema(shared, &topic, request.v0)
        }
    }
}
