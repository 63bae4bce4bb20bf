//! The servers that flightbox is measured against, as one small program.
//!
//! *Naive*: what a good engineer writes in a day. Each stream goes into a Parquet file by tokio::fs and the
//! Parquet writer with its defaults, in row groups of 16 MiB; no sync at all, or one fdatasync a row group.
//! It checks nothing, indexes nothing, and answers when the file is closed. *Null source*: the same front
//! answers DoGet with one message again and again: the limit of reading. Both have flightbox's HTTP/2 settings.

use crate::profile::Profile;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, SchemaResult, Ticket,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt, TryStreamExt};
use parquet::arrow::AsyncArrowWriter;
use parquet::arrow::async_writer::AsyncFileWriter;
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// First argument of this program when it is a rival.
pub(crate) const COMMAND: &str = "rival";
/// Row groups of the naive server close at this weight.
const GROUP_BYTES: usize = 16 << 20;
const FRAME_BYTES: u32 = 1 << 20;
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Runs one: `naive`, `naive-sync` or `source`, on a folder; never returns while it serves.
pub(crate) fn serve(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let [kind, folder] = arguments else {
        return Err("a rival needs its kind and its folder".into());
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let rival = match kind.as_str() {
            "naive" => Rival::Naive { folder: folder.into(), sync: false, files: AtomicUsize::new(0) },
            "naive-sync" => Rival::Naive { folder: folder.into(), sync: true, files: AtomicUsize::new(0) },
            "source-image" => Rival::source(Profile::Image).await?,
            "source-imu" => Rival::source(Profile::Imu(20_000)).await?,
            other => return Err(format!("there is no rival {other:?}").into()),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut out = std::io::stdout();
        writeln!(out, "{}", listener.local_addr()?)?;
        out.flush()?;
        let incoming = TcpListenerStream::new(listener).map(|socket| {
            socket.inspect(|socket| {
                socket.set_nodelay(true).ok(); // Only latency is lost where it cannot be set.
            })
        });
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .add_service(FlightServiceServer::new(rival).max_decoding_message_size(usize::MAX))
            .serve_with_incoming(incoming)
            .await?;
        Ok(())
    })
}

enum Rival {
    Naive { folder: PathBuf, sync: bool, files: AtomicUsize },
    Source { first: Box<FlightData>, message: FlightData },
}

impl Rival {
    async fn source(profile: Profile) -> Result<Self, Box<dyn Error>> {
        let (first, message) = profile.flight_data("", "").await?;
        Ok(Self::Source { first: Box::new(first), message: message.into_iter().next().ok_or("no message")? })
    }

    async fn write(&self, stream: Streaming<FlightData>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Self::Naive { folder, sync, files } = self else {
            return Err("this rival takes nothing".into());
        };
        let path = folder.join(format!("{}.parquet", files.fetch_add(1, Ordering::Relaxed)));
        let mut batches = FlightRecordBatchStream::new_from_flight_data(stream.map_err(Into::into));
        let mut writer: Option<AsyncArrowWriter<Output>> = None;
        while let Some(batch) = batches.try_next().await? {
            let writer = match &mut writer {
                Some(writer) => writer,
                None => {
                    let output = Output { file: tokio::fs::File::create(&path).await?, sync: *sync };
                    writer.insert(AsyncArrowWriter::try_new(output, batch.schema(), None)?)
                }
            };
            writer.write(&batch).await?;
            if writer.in_progress_size() >= GROUP_BYTES {
                writer.flush().await?;
            }
        }
        if let Some(mut writer) = writer {
            writer.finish().await?;
        }
        Ok(())
    }
}

/// A file that takes a row group at once, and may sync after it.
struct Output {
    file: tokio::fs::File,
    sync: bool,
}

impl AsyncFileWriter for Output {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, parquet::errors::Result<()>> {
        async move {
            self.file.write_all(&bytes).await?;
            self.file.flush().await?;
            if self.sync {
                self.file.sync_data().await?;
            }
            Ok(())
        }
        .boxed()
    }

    fn complete(&mut self) -> BoxFuture<'_, parquet::errors::Result<()>> {
        async move { Ok(self.file.flush().await?) }.boxed()
    }
}

fn nothing<T>() -> Result<T, Status> {
    Err(Status::unimplemented("only DoPut and DoGet are measured"))
}

#[tonic::async_trait]
impl FlightService for Rival {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoExchangeStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;

    async fn do_put(&self, request: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        self.write(request.into_inner()).await.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(stream::empty().boxed()))
    }

    /// The ticket is the number of messages.
    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let Self::Source { first, message } = self else {
            return nothing();
        };
        let count = String::from_utf8_lossy(&request.into_inner().ticket).parse().unwrap_or(0);
        let all = std::iter::once((**first).clone()).chain(std::iter::repeat_n(message.clone(), count));
        Ok(Response::new(stream::iter(all.map(Ok)).boxed()))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        nothing()
    }
    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        nothing()
    }
    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        nothing()
    }
    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        nothing()
    }
    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        nothing()
    }
    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoExchangeStream>, Status> {
        nothing()
    }
    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        nothing()
    }
    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        nothing()
    }
}
