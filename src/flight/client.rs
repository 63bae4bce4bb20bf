//! A client of one's own server, for the command line.

use arrow_flight::Action;
use arrow_flight::flight_service_client::FlightServiceClient;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;

/// Asks a running server for its state.
///
/// # Errors
/// A text that names the address and the remedy.
pub(crate) async fn appliance_info(address: SocketAddr) -> Result<Value, String> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| format!("{address}: {error}"))?
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(30));
    let channel = endpoint
        .connect()
        .await
        .map_err(|_| format!("no flightbox answers at {address}; start one with `flightbox serve` or give --listen"))?;
    let action = Action { r#type: "info".to_owned(), body: r#"{"flightbox":true}"#.into() };
    let answer = FlightServiceClient::new(channel).do_action(action).await.map_err(|status| status.to_string())?;
    let result = answer.into_inner().message().await.map_err(|status| status.to_string())?;
    let body = result.ok_or_else(|| "the server gave no answer".to_owned())?.body;
    let json: Value = serde_json::from_slice(&body).map_err(|error| format!("the answer is not JSON: {error}"))?;
    match json.pointer("/response/flightbox") {
        Some(info) => Ok(info.clone()),
        None => Err(format!("the server at {address} speaks this protocol but is no flightbox")),
    }
}
