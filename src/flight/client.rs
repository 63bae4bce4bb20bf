//! A client of one's own server, for the command line. Errors are texts for people.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, Criteria, FlightDescriptor, Ticket};
use futures::TryStreamExt;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tonic::Status;
use tonic::transport::Channel;

/// A connection.
pub(crate) struct Client {
    address: SocketAddr,
    flight: FlightServiceClient<Channel>,
}

/// The rows of a topic, as they come.
pub(crate) struct Rows {
    stream: FlightRecordBatchStream,
    first: Option<RecordBatch>,
    /// The writer's schema, known once the first batch, or the end, was reached.
    pub(crate) schema: Option<SchemaRef>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// A text that names the address and the remedy.
    pub(crate) async fn connect(address: SocketAddr) -> Result<Self, String> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| format!("{address}: {error}"))?
            .connect_timeout(Duration::from_secs(5))
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20);
        let channel = endpoint.connect().await.map_err(|_| {
            format!("no flightbox answers at {address}; start one with `flightbox serve` or give --listen")
        })?;
        let flight = FlightServiceClient::new(channel).max_decoding_message_size(usize::MAX);
        Ok(Self { address, flight })
    }

    /// Runs an action; returns the payload of its one answer.
    ///
    /// # Errors
    /// The server's text.
    pub(crate) async fn action(&mut self, name: &str, body: &Value) -> Result<Value, String> {
        let action = Action { r#type: name.to_owned(), body: body.to_string().into() };
        let mut answers = self.flight.do_action(action).await.map_err(text)?.into_inner();
        let answer = answers.message().await.map_err(text)?.ok_or_else(|| "the server gave no answer".to_owned())?;
        let json: Value =
            serde_json::from_slice(&answer.body).map_err(|error| format!("the answer is not JSON: {error}"))?;
        Ok(json.get("response").cloned().unwrap_or(Value::Null))
    }

    /// The state of the appliance.
    ///
    /// # Errors
    /// As [`Self::action`], and when the server is no flightbox.
    pub(crate) async fn appliance_info(&mut self) -> Result<Value, String> {
        let answer = self.action("info", &json!({ "flightbox": true })).await?;
        match answer.get("flightbox") {
            Some(info) => Ok(info.clone()),
            None => Err(format!("the server at {} speaks this protocol but is no flightbox", self.address)),
        }
    }

    /// The names of all sequences.
    ///
    /// # Errors
    /// The server's text; so for all that follow.
    pub(crate) async fn sequences(&mut self) -> Result<Vec<String>, String> {
        let infos = self.flight.list_flights(Criteria::default()).await.map_err(text)?.into_inner();
        let infos: Vec<arrow_flight::FlightInfo> = infos.try_collect().await.map_err(text)?;
        Ok(infos.into_iter().filter_map(|info| info.flight_descriptor).flat_map(|info| info.path).collect())
    }

    /// What GetFlightInfo says: of the sequence, and of each topic.
    pub(crate) async fn describe(&mut self, locator: &str) -> Result<(Value, Vec<Value>), String> {
        let descriptor = FlightDescriptor::new_cmd(json!({ "resource_locator": locator }).to_string());
        let info = self.flight.get_flight_info(descriptor).await.map_err(text)?.into_inner();
        let json = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or(Value::Null);
        Ok((json(&info.app_metadata), info.endpoint.iter().map(|endpoint| json(&endpoint.app_metadata)).collect()))
    }

    /// The rows of a topic between two times, both inclusive.
    pub(crate) async fn rows(&mut self, topic: &str, first: i64, last: i64) -> Result<Rows, String> {
        let mut request = json!({ "resource_locator": topic, "timestamp_ns_start": first });
        if let (Some(end), Some(object)) = (last.checked_add(1), request.as_object_mut()) {
            object.insert("timestamp_ns_end".to_owned(), json!(end));
        }
        let descriptor = FlightDescriptor::new_cmd(request.to_string());
        let info = self.flight.get_flight_info(descriptor).await.map_err(text)?.into_inner();
        let ticket = info.endpoint.into_iter().find_map(|endpoint| endpoint.ticket);
        let ticket: Ticket = ticket.ok_or_else(|| format!("{topic}: the server gave no ticket"))?;
        let data = self.flight.do_get(ticket).await.map_err(text)?.into_inner();
        let mut stream = FlightRecordBatchStream::new_from_flight_data(data.map_err(Into::into));
        let first = stream.try_next().await.map_err(|error| error.to_string())?;
        let schema = stream.schema().cloned();
        Ok(Rows { stream, first, schema })
    }
}

impl Rows {
    /// The next batch.
    pub(crate) async fn next(&mut self) -> Result<Option<RecordBatch>, String> {
        match self.first.take() {
            Some(batch) => Ok(Some(batch)),
            None => self.stream.try_next().await.map_err(|error| error.to_string()),
        }
    }
}

fn text(status: Status) -> String {
    status.message().to_owned()
}
