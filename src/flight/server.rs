//! Listens on TCP and on a Unix-domain socket with the HTTP/2 settings of design.md section 8.

use crate::flight::http2::{self, Settings};
use crate::flight::places::Places;
use crate::flight::request::{RequestLimits, RequestService};
use crate::flight::service::{Flight, Shared};
use crate::flight::upload::UploadLimits;
use crate::flight::wire::Wire;
use crate::ingest::admit::Pool;
use crate::limits;
use arrow_flight::flight_service_server::FlightServiceServer;
use futures::StreamExt;
use std::io;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::codec::CompressionEncoding;

/// Sockets that are bound but not yet served.
pub(crate) struct Listeners {
    tcp: TcpListener,
    unix: Option<UnixListener>,
}

impl Listeners {
    /// Binds what the configuration names.
    pub(crate) async fn bind(config: &crate::config::Config) -> io::Result<Self> {
        let tcp = TcpListener::bind(config.listen).await.map_err(|error| {
            io::Error::new(error.kind(), format!("listen = {}: {error}; is another server there?", config.listen))
        })?;
        let unix = match &config.unix_socket {
            Some(path) => {
                // A socket left by a server that died; a living one holds the data directory's lock.
                std::fs::remove_file(path).ok();
                let named = |error: io::Error| {
                    io::Error::new(error.kind(), format!("unix_socket = {}: {error}", path.display()))
                };
                Some(UnixListener::bind(path).map_err(named)?)
            }
            None => None,
        };
        Ok(Self { tcp, unix })
    }

    /// The TCP address in use, with the port the system chose for port 0.
    pub(crate) fn address(&self) -> io::Result<std::net::SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until `stopping` becomes true and open calls have ended.
    pub(crate) async fn serve(self, shared: Arc<Shared>, stopping: watch::Receiver<bool>) {
        let tcp = TcpListenerStream::new(self.tcp).map(|socket| {
            socket.map(|socket| {
                socket.set_nodelay(true).ok(); // Only latency is lost where it cannot be set.
                Wire::new(socket)
            })
        });
        let settings = Settings {
            stream_window_bytes: shared.config.stream_window_bytes,
            connection_window_bytes: limits::CONNECTION_WINDOW_BYTES,
            frame_bytes: limits::FRAME_BYTES,
        };
        let places = Places::new(shared.config.connections_max, shared.config.streams_max);
        let service = service(shared);
        let tcp = http2::serve(tcp, service.clone(), settings, places.clone(), stopping.clone());
        match self.unix {
            Some(unix) => {
                let unix = UnixListenerStream::new(unix).map(|socket| socket.map(Wire::new));
                futures::join!(tcp, http2::serve(unix, service, settings, places, stopping));
            }
            None => tcp.await,
        }
    }
}

/// The RPCs, with requests admitted before they are read.
fn service(shared: Arc<Shared>) -> RequestService<FlightServiceServer<Flight>> {
    let config = &shared.config;
    let upload_limits = UploadLimits {
        pool: shared.budget.receive.clone(),
        message_bytes_max: config.message_bytes_max,
        stall: config.upload_stall,
        stats: Arc::clone(&shared.stats),
    };
    let limits = RequestLimits {
        usual: Pool::new(limits::REQUESTS_BYTES),
        large: Pool::undivided(limits::request_weight(limits::REQUEST_BYTES_MAX, false)),
        stall: config.upload_stall,
    };
    let message_bytes_max = config.message_bytes_max;
    let rpcs = |request_bytes_max: u64| {
        FlightServiceServer::new(Flight { shared: Arc::clone(&shared) })
            .max_decoding_message_size(usize::try_from(request_bytes_max).unwrap_or(usize::MAX))
            .max_encoding_message_size(usize::MAX)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Deflate)
    };
    let (uploads, others) = (rpcs(message_bytes_max), rpcs(limits::REQUEST_BYTES_MAX));
    RequestService { uploads, upload_limits, others, limits }
}
