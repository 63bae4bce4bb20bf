//! A connection's socket, with its history and its manners.
//!
//! Guarantees: what goes out keeps its order; a small write waits for one turn of the run queue, never for a clock,
//! so that answers of many streams leave in one system call. (Tokio runs a connection's task right behind the stream
//! that woke it: hundreds of slow topics, made durable by one commit, cost a system call each.)

use crate::flight::dialect::Connection;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Writes below this many bytes wait for their turn. Answers have some fifty; rows of a DoGet are far above.
const SMALL_WRITE_BYTES: usize = 1024;

/// Whether a peer says anything.
#[derive(Debug, Clone, Default)]
pub(super) struct Heard {
    reads: Arc<AtomicU64>,
}

impl Heard {
    /// Grows with whatever comes.
    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

/// A connection.
pub(super) struct Wire<S> {
    socket: S,
    connection: Connection,
    heard: Heard,
    /// Others have had their turn before the write that is due.
    yielded: bool,
}

impl<S> Wire<S> {
    pub(super) fn new(socket: S) -> Self {
        Self { socket, connection: Connection::default(), heard: Heard::default(), yielded: false }
    }

    /// What all requests of the connection share, whatever the socket is.
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// What comes from the peer, to be looked at later.
    pub(super) fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// Whether a write of so many bytes is put off; the task is woken again behind all that are ready now.
    fn puts_off(&mut self, bytes: usize, cx: &Context<'_>) -> bool {
        let puts_off = bytes < SMALL_WRITE_BYTES && !self.yielded;
        self.yielded = puts_off;
        if puts_off {
            cx.waker().wake_by_ref();
        }
        puts_off
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.heard.reads.fetch_add(1, Ordering::Relaxed);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.puts_off(buf.len(), cx) {
            return Poll::Pending;
        }
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.puts_off(bufs.iter().map(|buf| buf.len()).sum(), cx) {
            return Poll::Pending;
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_small_write_waits_for_one_turn_and_a_large_one_for_none() {
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let mut wire = Wire::new(Vec::new());
        let mut write =
            |bytes: &[u8]| Pin::new(&mut wire).poll_write(&mut cx, bytes).map(|result| result.expect("taken"));
        assert_eq!(write(&[1; 50]), Poll::Pending);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "or nobody would ask again");
        // Meanwhile more has gathered.
        assert_eq!(write(&[1; 150]), Poll::Ready(150));
        assert_eq!(write(&[2; 50]), Poll::Pending);
        assert_eq!(write(&[2; SMALL_WRITE_BYTES]), Poll::Ready(SMALL_WRITE_BYTES));
        assert_eq!(write(&[3; SMALL_WRITE_BYTES]), Poll::Ready(SMALL_WRITE_BYTES));
        assert_eq!(write(&[4; 50]), Poll::Pending);
        assert_eq!(woken.0.load(Ordering::Relaxed), 3);
        assert_eq!(wire.socket.len(), 150 + 2 * SMALL_WRITE_BYTES);
    }
}
