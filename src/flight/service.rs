//! The RPCs, a line or two each, and what they share.

use crate::config::Config;
use crate::flight::dialect::Connection;
use crate::flight::request::Held;
use crate::flight::splice::Bodies;
use crate::flight::upload::Monitor;
use crate::flight::{actions, get, list, put};
use crate::health::{Health, Room};
use crate::ingest::admit::Budget;
use crate::lifecycle::Lifecycle;
use crate::lifecycle::damage::Checker;
use crate::limits;
use crate::stats::{Station, Stats};
use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    IpcMessage, PollInfo, PutResult, SchemaAsIpc, SchemaResult, Ticket,
};
use futures::stream::{self, BoxStream, StreamExt};
use serde_json::{Value, json};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use storage::StorageError;
use storage::catalog::Look;
use storage::disk::{DiskState, IoCounters};
use storage::volumes::Volumes;
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status, Streaming};

/// What every RPC may need.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) budget: Budget,
    pub(crate) stats: Arc<Stats>,
    pub(crate) health: Arc<Health>,
    pub(crate) counters: Arc<IoCounters>,
    pub(crate) disk: DiskState,
    /// Where recordings lie.
    pub(crate) volumes: Arc<Volumes>,
    /// For measuring the front alone: batches are decoded and dropped.
    pub(crate) null_sink: bool,
    /// Places for questions that run at once.
    pub(crate) queries: Arc<Semaphore>,
    /// Runs everything but uploads: a saturated ingest does not delay it.
    pub(crate) control: tokio::runtime::Handle,
    /// Becomes true when the server shuts down.
    pub(crate) stopping: watch::Receiver<bool>,
}

impl Shared {
    /// What it takes to look for damage.
    pub(crate) fn checker(&self) -> Checker {
        Checker {
            catalog: self.lifecycle.catalog.clone(),
            committer: self.lifecycle.committer.clone(),
            loader: self.lifecycle.loader.clone(),
            data_dir: self.config.data_dir.clone(),
        }
    }

    /// The state of the appliance, for `flightbox info`.
    pub(crate) fn appliance_info(&self) -> Result<Value, StorageError> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stations: Vec<Value> = Station::ALL
            .iter()
            .map(|station| {
                let summary = self.stats.summary(*station);
                json!({
                    "station": station.name(),
                    "count": summary.count,
                    "p50_us": summary.p50_us,
                    "p99_us": summary.p99_us,
                    "p999_us": summary.p999_us,
                    "max_us": summary.max_us,
                })
            })
            .collect();
        let volumes: Vec<Value> = self
            .volumes
            .all()
            .iter()
            .zip(&self.health.rooms)
            .map(|(volume, room)| {
                json!({
                    "root": volume.root,
                    "role": volume.role.name(),
                    "space": room.own().name(),
                    "free_bytes": room.free(),
                })
            })
            .collect();
        let catalog = self.lifecycle.catalog.written();
        let memory = limits::memory_sum(&self.config);
        let sum: u64 = memory.iter().map(|(_, bytes)| bytes).sum();
        let parts: serde_json::Map<String, Value> =
            memory.into_iter().map(|(name, bytes)| (name.to_owned(), json!(bytes))).collect();
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "data_dir": self.config.data_dir,
            "engine": self.disk.engine.name(),
            "direct_io": self.disk.direct,
            "registered_buffers": self.disk.registered,
            "notes": self.disk.notes,
            "writers": self.config.writers,
            "health": {
                "catalog": self.health.catalog_failure().unwrap_or_else(|| "ok".to_owned()),
                "commit_failures": load(&self.stats.commit_failures),
                "space": self.health.space.borrow().name(),
                "free_bytes": self.health.rooms.first().and_then(Room::free),
                "reserve_bytes": self.config.reserve_bytes,
            },
            "volumes": volumes,
            "recovery": crate::recovery::last_receipt(&self.lifecycle.catalog)?,
            "ring_bytes": {
                "chunk": load(&self.counters.chunk),
                "padding": load(&self.counters.padding),
                "trailer": load(&self.counters.trailer),
                "footer": load(&self.counters.footer),
                "rewrite": load(&self.counters.rewrite),
                "read": load(&self.counters.read),
            },
            "catalog_bytes": {
                "log": catalog.log,
                "flush": catalog.flush,
                "compaction": catalog.compaction,
            },
            "stored": self.stored_totals()?,
            "since_start": {
                "rows": load(&self.stats.rows),
                "batches": load(&self.stats.batches),
                "bytes": load(&self.stats.bytes),
                "chunks": load(&self.stats.chunks),
                "tail_runs": load(&self.stats.tail_runs),
                "commit_groups": load(&self.stats.groups),
                "uploads_open": load(&self.stats.uploads),
            },
            "memory": { "held": self.budget.held(), "bound": sum, "parts": parts },
            "stations": stations,
        }))
    }

    fn stored_totals(&self) -> Result<Value, StorageError> {
        let catalog = &self.lifecycle.catalog;
        let (mut topics, mut rows, mut chunks, mut bytes) = (0_u64, 0, 0, 0);
        let sequences = catalog.sequences()?;
        for sequence in &sequences {
            for topic in catalog.topics_of(sequence.id)? {
                let totals = catalog.totals(topic.no)?;
                topics += 1;
                rows += totals.rows;
                chunks += totals.chunks;
                bytes += totals.stored_bytes;
            }
        }
        Ok(
            json!({ "sequences": sequences.len(), "topics": topics, "rows": rows, "chunks": chunks, "chunk_bytes": bytes }),
        )
    }

    /// The same for what only asks: it ends when nobody waits for it any more.
    async fn on_control_while_wanted<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn_on(work, &self.control);
        // Cancel-safety: dropping the set ends the task.
        match tasks.join_next().await {
            Some(Ok(result)) => result,
            Some(Err(error)) => Err(Status::internal(format!("the call's task was lost: {error}"))),
            None => Err(Status::internal("the call's task was lost")),
        }
    }

    /// Runs work on the control runtime.
    async fn on_control<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        match self.control.spawn(work).await {
            Ok(result) => result,
            Err(error) => Err(Status::internal(format!("the call's task was lost: {error}"))),
        }
    }
}

/// The service behind the generated server.
#[derive(Clone)]
pub(crate) struct Flight {
    pub(crate) shared: Arc<Shared>,
}

/// The connection's history, from the listener's IO type.
fn connection<T>(request: &Request<T>) -> Connection {
    request.extensions().get::<Connection>().cloned().unwrap_or_default()
}

/// The memory of the request, to be kept while anything of it is: as much as it needs now that it was seen.
fn held<T: prost::Message>(request: &Request<T>) -> Option<Held> {
    let held = request.extensions().get::<Held>().cloned();
    if let Some(held) = &held {
        held.shrink_to(request.get_ref().encoded_len());
    }
    held
}

fn one<T: Send + 'static>(items: Vec<T>) -> BoxStream<'static, Result<T, Status>> {
    stream::iter(items.into_iter().map(Ok)).boxed()
}

#[tonic::async_trait]
impl FlightService for Flight {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoExchangeStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;

    async fn handshake(
        &self,
        _request: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(Status::unimplemented("Handshake is not needed: no client of this protocol sends it"))
    }

    async fn list_flights(&self, request: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        let (shared, held) = (Arc::clone(&self.shared), held(&request));
        connection(&request).note(crate::flight::dialect::Hint::Nothing);
        let criteria = request.into_inner().expression;
        let work = async move {
            let _held = held;
            list::list_flights(&shared, &criteria)
        };
        let infos = self.shared.on_control(work).await?;
        Ok(Response::new(one(infos)))
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let (shared, connection, held) = (Arc::clone(&self.shared), connection(&request), held(&request));
        let descriptor = request.into_inner();
        let work = async move {
            let _held = held;
            list::flight_info(&shared, &connection, descriptor).await
        };
        Ok(Response::new(self.shared.on_control(work).await?))
    }

    async fn poll_flight_info(&self, _request: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        Err(Status::unimplemented("PollFlightInfo is not offered; use GetFlightInfo"))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let (shared, connection, held) = (Arc::clone(&self.shared), connection(&request), held(&request));
        let descriptor = request.into_inner();
        let work = async move {
            let _held = held;
            list::get_schema(&shared, &connection, &descriptor)
        };
        let schema = self.shared.on_control(work).await?;
        let options = arrow::ipc::writer::IpcWriteOptions::default();
        let message: IpcMessage = SchemaAsIpc::new(&schema, &options)
            .try_into()
            .map_err(|error: arrow::error::ArrowError| Status::internal(error.to_string()))?;
        Ok(Response::new(SchemaResult { schema: message.0 }))
    }

    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let (shared, held) = (Arc::clone(&self.shared), held(&request));
        let ticket = request.into_inner().ticket;
        let work = async move {
            let _held = held;
            get::do_get(shared, &ticket).await.map(StreamExt::boxed)
        };
        let (messages, bodies) = (self.shared.on_control(work).await?, Bodies::default());
        let mut response = Response::new(bodies.take_out(messages).boxed());
        response.extensions_mut().insert(bodies);
        Ok(response)
    }

    async fn do_put(&self, request: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        let connection = connection(&request);
        let monitor = request.extensions().get::<Arc<Monitor>>().cloned();
        let results = put::do_put(Arc::clone(&self.shared), connection, request.into_inner(), monitor).await?;
        Ok(Response::new(results.boxed()))
    }

    async fn do_exchange(
        &self,
        _request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        Err(Status::unimplemented("DoExchange is not offered; use DoPut and DoGet"))
    }

    async fn do_action(&self, request: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        let (shared, connection, held) = (Arc::clone(&self.shared), connection(&request), held(&request));
        let action = request.into_inner();
        let only_asks = actions::only_asks(&action.r#type);
        let work = async move {
            let _held = held;
            actions::run(&shared, &connection, &action.r#type, &action.body).await
        };
        let answer = if only_asks {
            self.shared.on_control_while_wanted(work).await?
        } else {
            self.shared.on_control(work).await?
        };
        let results = answer.bodies().map(|body| Ok(arrow_flight::Result { body: body.into() }));
        Ok(Response::new(stream::iter(results).boxed()))
    }

    async fn list_actions(&self, _request: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        let actions = actions::ACTIONS
            .iter()
            .map(|(name, text)| ActionType { r#type: (*name).to_owned(), description: (*text).to_owned() })
            .collect();
        Ok(Response::new(one(actions)))
    }
}
