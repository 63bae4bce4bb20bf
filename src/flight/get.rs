//! One DoGet stream: the rows of a ticket in time order, in the writer's own schema.

use crate::flight::service::Shared;
use crate::flight::status::{invalid, of_storage};
use crate::lifecycle::{LifecycleError, Locator, find_sequence, find_topic, parse_uuid};
use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use arrow_flight::FlightData;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use futures::{Stream, StreamExt, TryStreamExt};
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::Look;
use storage::catalog::records::TopicRecord;
use storage::ids::TopicId;
use storage::read::{RowStream, TopicView, Window, count};
use storage::schema::TopicSchema;
use tonic::Status;

/// What a ticket asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// The topic by id: a name may have been used again since.
    pub(crate) topic: TopicId,
    pub(crate) window: Window,
}

impl Ticket {
    /// The opaque form that session clients carry.
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::json!({ "topic": self.topic.to_string(), "start": self.window.start, "end": self.window.end })
            .to_string()
            .into()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Status> {
        let json: serde_json::Value = serde_json::from_slice(bytes)
            .map_err(|_| invalid("the ticket is none of this server's; ask GetFlightInfo for one"))?;
        let topic = json.get("topic").and_then(|topic| topic.as_str()).unwrap_or("");
        let time = |key: &str| json.get(key).and_then(serde_json::Value::as_i64);
        Ok(Self {
            topic: TopicId(parse_uuid("ticket", topic)?),
            window: Window { start: time("start"), end: time("end") },
        })
    }
}

/// Opens the rows of a ticket.
pub(crate) async fn do_get(
    shared: Arc<Shared>,
    ticket: &[u8],
) -> Result<impl Stream<Item = Result<FlightData, Status>> + Send + 'static + use<>, Status> {
    let v0 = ticket.first() != Some(&b'{');
    let (topic, window) = if !v0 {
        let ticket = Ticket::decode(ticket)?;
        let unknown = || LifecycleError::NotFound { what: "topic", name: ticket.topic.to_string() };
        let topic =
            shared.lifecycle.catalog.topic_by_id(ticket.topic).map_err(|e| of_storage(&e))?.ok_or_else(unknown)?;
        if topic.completed_at_ns.is_none() {
            return Err(Status::failed_precondition(format!(
                "topic `{}` is still being written; read it when it is locked",
                topic.locator
            )));
        }
        (topic, ticket.window)
    } else {
        // v0 tickets are names, and v0 reads what is durable of a topic that is still written.
        let text = std::str::from_utf8(ticket).map_err(|_| invalid("the ticket is not UTF-8"))?;
        let locator = Locator::topic("ticket", text)?;
        (find_topic(&shared.lifecycle.catalog, &locator)?, Window::default())
    };
    shared.volumes.check_there(&topic).map_err(|error| of_storage(&error))?;
    let view = {
        let pin = shared.lifecycle.catalog.pin().map_err(|error| of_storage(&error))?;
        let catalog = pin.view();
        TopicView::load(&catalog, &shared.config.data_dir, topic.clone()).map_err(|error| of_storage(&error))?
    };
    let Some(view) = view else {
        return Err(Status::failed_precondition(format!(
            "topic `{}` has no schema yet: nothing was ever put",
            topic.locator
        )));
    };
    let view = Arc::new(view);
    let extent = if v0 {
        None
    } else if window.is_all() {
        let totals = shared.lifecycle.catalog.totals(topic.no).map_err(|error| of_storage(&error))?;
        Some((totals.rows, totals.time))
    } else {
        Some(count(&view, &shared.lifecycle.loader, window).await.map_err(|error| of_storage(&error))?)
    };
    let lost = data_loss(&view, window);
    if let Some(lost) = lost.as_ref().filter(|_| !shared.config.skip_damage) {
        return Err(Status::data_loss(format!("topic `{}` is damaged: {lost}", topic.locator)));
    }
    let schema = outgoing_schema(&shared, &view.record, &view.schema.wire, extent, lost)?;
    let rows =
        RowStream::new(Arc::clone(&view), shared.lifecycle.loader.clone(), window, crate::limits::OUTGOING_BATCH_BYTES);
    let batches = batches(rows, Arc::clone(&view.schema), Arc::clone(&schema));
    let encoded = FlightDataEncoderBuilder::new()
        .with_schema(schema)
        .with_dictionary_handling(arrow_flight::encode::DictionaryHandling::Resend)
        .with_max_flight_data_size(usize::MAX)
        .build(batches);
    Ok(encoded.map_err(Status::from))
}

/// Batches in the writer's types, cut further where a dictionary's key type is too small for their values.
fn batches(
    rows: RowStream,
    topic: Arc<TopicSchema>,
    schema: SchemaRef,
) -> impl Stream<Item = Result<RecordBatch, FlightError>> + Send + 'static {
    futures::stream::try_unfold(rows, |mut rows| async move {
        match rows.next().await {
            Ok(Some(batch)) => Ok(Some((batch, rows))),
            Ok(None) => Ok(None),
            Err(error) => Err(FlightError::Tonic(Box::new(of_storage(&error)))),
        }
    })
    .map(move |batch| {
        let batch = batch?;
        let mut out = Vec::new();
        cut_to_wire(&topic, &schema, &batch, &mut out)
            .map_err(|error| FlightError::Tonic(Box::new(of_storage(&error))))?;
        Ok::<_, FlightError>(futures::stream::iter(out.into_iter().map(Ok)))
    })
    .try_flatten()
}

fn cut_to_wire(
    topic: &TopicSchema,
    schema: &SchemaRef,
    batch: &RecordBatch,
    out: &mut Vec<RecordBatch>,
) -> Result<(), StorageError> {
    match topic.to_wire(batch) {
        Ok(wire) => {
            let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(wire.num_rows()));
            out.push(RecordBatch::try_new_with_options(Arc::clone(schema), wire.columns().to_vec(), &options)?);
            Ok(())
        }
        // More distinct values than the dictionary's keys can number: half the rows have fewer.
        Err(_) if batch.num_rows() > 1 => {
            let half = batch.num_rows() / 2;
            cut_to_wire(topic, schema, &batch.slice(0, half), out)?;
            cut_to_wire(topic, schema, &batch.slice(half, batch.num_rows() - half), out)
        }
        Err(error) => Err(error),
    }
}

/// Key of the schema's metadata that says which rows are left out because they are damaged.
const DATA_LOSS_KEY: &str = "flightbox:data_loss";

/// The rows of a window that are known to be damaged, as JSON; `None` if there are none.
fn data_loss(view: &TopicView, window: Window) -> Option<String> {
    let inside = view.damaged().iter().filter(|damage| damage.time.is_none_or(|time| window.meets(time)));
    let lost: Vec<serde_json::Value> = inside
        .map(|damage| {
            serde_json::json!({
                "first_row": damage.first_row,
                "end_row": damage.end_row,
                "first_time_ns": damage.time.map(|time| time.0),
                "last_time_ns": damage.time.map(|time| time.1),
                "cause": damage.what,
            })
        })
        .collect();
    (!lost.is_empty()).then(|| serde_json::Value::from(lost).to_string())
}

/// The writer's schema with the metadata clients of v0 to 0.6 read from it.
fn outgoing_schema(
    shared: &Shared,
    topic: &TopicRecord,
    wire: &SchemaRef,
    extent: Option<Extent>,
    lost: Option<String>,
) -> Result<SchemaRef, Status> {
    let sequence = topic.locator.split('/').next().unwrap_or("");
    find_sequence(&shared.lifecycle.catalog, sequence)?;
    let mut metadata = wire.metadata().clone();
    metadata.extend(topic_metadata(topic, extent));
    metadata.extend(lost.map(|lost| (DATA_LOSS_KEY.to_owned(), lost)));
    Ok(Arc::new(Schema::new_with_metadata(wire.fields().clone(), metadata)))
}

/// Rows of a stream, with their first and last time.
pub(crate) type Extent = (u64, Option<(i64, i64)>);

/// `mosaico:` metadata of a topic's schema. Clients of 0.6 take the extent from its properties; v0, for
/// which `extent` is `None`, refuses an extra key.
pub(crate) fn topic_metadata(topic: &TopicRecord, extent: Option<Extent>) -> [(String, String); 3] {
    let mut properties =
        serde_json::json!({ "ontology_tag": topic.ontology_tag, "serialization_format": topic.format.name() });
    if let (Some((rows, interval)), Some(object)) = (extent, properties.as_object_mut()) {
        object.insert("message_count".to_owned(), rows.into());
        object.insert("timestamp_ns_min".to_owned(), interval.map(|interval| interval.0).into());
        object.insert("timestamp_ns_max".to_owned(), interval.map(|interval| interval.1).into());
    }
    [
        ("mosaico:context".to_owned(), "topic".to_owned()),
        ("mosaico:properties".to_owned(), properties.to_string()),
        ("mosaico:user_metadata".to_owned(), topic.user_metadata.clone()),
    ]
}
