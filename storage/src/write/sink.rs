//! A chunk's rows to bytes in aligned buffers, each sent on its way when it is full.
//!
//! Guarantees: the thread parks at least once per ring buffer handed over and once per slice of encoding
//! (INV-10); bytes are copied once, into the buffer that the device reads.

use super::Shared;
use crate::checksum::Running;
use crate::chunk::record::{ColumnRecord, column_crc_seed};
use crate::chunk::{Piece, TopicEncoder};
use crate::disk::Disk;
use crate::error::Result;
use crate::ids::SegmentId;
use crate::limits::RING_BUFFER_BYTES;
use crate::write::ChunkRows;
use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Instant;
use tokio::task::JoinHandle;

/// Bytes that are copied before the clock is looked at.
const COPY_BYTES: usize = 128 << 10;

/// Encodes the rows into the sink, parking often enough for others; returns the columns.
pub(super) async fn encode<D: Disk>(
    shared: &Shared,
    encoder: &TopicEncoder,
    chunk: &ChunkRows,
    (segment, start): (SegmentId, u64),
    sink: &mut Sink<D>,
) -> Result<Vec<ColumnRecord>> {
    let mut encoding = encoder.begin(&chunk.batches)?;
    let mut columns: Vec<ColumnRecord> = Vec::new();
    let mut crc = Running::from(column_crc_seed(segment, 0, 0, start));
    let mut slice = Instant::now();
    let mut pieces = Vec::new();
    while encoding.step(&mut pieces)? {
        for piece in pieces.drain(..) {
            match piece {
                // A page may be one value of 45 MiB: its parts are submitted as they are copied.
                Piece::Page(bytes) => {
                    for part in bytes.chunks(COPY_BYTES) {
                        sink.put(part, &mut crc).await;
                        if slice.elapsed() >= shared.encode_slice || sink.since_breath >= RING_BUFFER_BYTES {
                            sink.breathe().await;
                            slice = Instant::now();
                        }
                    }
                }
                Piece::ColumnEnd(mut column) => {
                    column.crc = crc.value();
                    columns.push(column);
                    crc = Running::from(column_crc_seed(segment, 0, columns.len(), sink.position()));
                }
            }
        }
        if slice.elapsed() >= shared.encode_slice {
            sink.breathe().await;
            slice = Instant::now();
        }
    }
    Ok(columns)
}

/// Fills ring buffers and sends each on its way when it is full.
pub(super) struct Sink<D: Disk> {
    disk: D,
    file: D::File,
    poisoned: Rc<Cell<bool>>,
    /// Offset of the current buffer in the file.
    at: u64,
    buf: Option<D::Buf>,
    filled: usize,
    /// Bytes handed over since the thread parked last.
    since_breath: usize,
    writes: Vec<JoinHandle<io::Result<()>>>,
}

impl<D: Disk> Sink<D> {
    /// A sink that writes to a file from an offset on; a write that fails poisons its segment.
    pub(super) fn new(disk: D, file: D::File, poisoned: Rc<Cell<bool>>, at: u64) -> Self {
        Self { disk, file, poisoned, at, buf: None, filled: 0, since_breath: 0, writes: Vec::new() }
    }

    /// The writes that were submitted.
    pub(super) fn into_writes(self) -> Vec<JoinHandle<io::Result<()>>> {
        self.writes
    }

    pub(super) fn position(&self) -> u64 {
        self.at + self.filled as u64
    }

    /// Copies bytes into ring buffers, and into the column's checksum.
    pub(super) async fn put(&mut self, mut bytes: &[u8], crc: &mut Running) {
        while !bytes.is_empty() {
            let mut buf = match self.buf.take() {
                Some(buf) => buf,
                // Waits for the device: the buffers of this chunk come back as its writes complete.
                None => self.disk.buffer().await,
            };
            let take = bytes.len().min(RING_BUFFER_BYTES - self.filled);
            let (now, later) = bytes.split_at(take);
            if let Some(into) = buf.get_mut(self.filled..self.filled + take) {
                crc.add_and_copy(now, into);
            }
            self.filled += take;
            self.since_breath += take;
            self.buf = Some(buf);
            bytes = later;
            if self.filled == RING_BUFFER_BYTES {
                self.flush();
            }
        }
    }

    /// Parks: the kernel gets what was submitted, other topics of the thread their turn (INV-10).
    async fn breathe(&mut self) {
        self.since_breath = 0;
        self.disk.breathe().await;
    }

    /// Submits what is in the buffer, which ends on a block boundary.
    pub(super) fn flush(&mut self) {
        let Some(buf) = self.buf.take() else { return };
        let (at, length) = (self.at, self.filled);
        self.at += length as u64;
        self.filled = 0;
        let write = self.disk.write(&self.file, buf, length, at);
        let poisoned = Rc::clone(&self.poisoned);
        self.writes.push(tokio::task::spawn_local(async move {
            let (result, _buf) = write.await;
            if result.is_err() {
                poisoned.set(true);
            }
            result
        }));
    }
}
