//! Ranges of files into memory of their own. Here because this is the room of `unsafe`.
//!
//! Guarantees: what is shown is what the kernel read; no more than [`READS_AT_DEVICE`] pieces are under way to a device,
//! for a write that comes behind them, those of reads that were given up among them.

use super::{AlignedBuf, UringFile, fd_of, is_transient, ring_len, submit};
use crate::limits::{BLOCK_BYTES, READ_PIECE_BYTES, READS_AHEAD, READS_AT_DEVICE};
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use io_uring::opcode;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Whose turn it is to read, by the device: a disk that hangs stops nobody who reads from another.
#[derive(Default)]
pub(super) struct Turns(RefCell<HashMap<u64, Rc<OfDevice>>>);

struct OfDevice {
    pieces: Arc<Semaphore>,
    /// Ranges of more than [`READS_AHEAD`] pieces, one after the other: who has one works on it while the next is read.
    /// Together they would all wait for the device, and then it for them (PERF.md).
    long: Semaphore,
}

impl Turns {
    fn of(&self, file: &UringFile) -> io::Result<Rc<OfDevice>> {
        let device = rustix::fs::fstat(&*file.fd)?.st_dev;
        let new = || Rc::new(OfDevice { pieces: Arc::new(Semaphore::new(READS_AT_DEVICE)), long: Semaphore::new(1) });
        Ok(Rc::clone(self.0.borrow_mut().entry(device).or_insert_with(new)))
    }
}

/// Reads `len` bytes at `at`, fewer only at the end of the file. Cancel-safety: a range's turn ends with the future, a
/// piece's when the kernel is done with it.
pub(super) async fn range(turns: &Turns, file: &UringFile, at: u64, len: usize) -> io::Result<Bytes> {
    let turns = &*turns.of(file)?;
    let is_long = len > READS_AHEAD * READ_PIECE_BYTES;
    let _turn = if is_long { Some(turns.long.acquire().await.map_err(io::Error::other)?) } else { None };
    let memory = Rc::new(AlignedBuf::to_fill(len)?);
    let all = memory.capacity();
    // Where what there is ends: nothing counts that lies behind a piece that is not full.
    let end = Cell::new(all);
    let pieces = (0..all).step_by(READ_PIECE_BYTES).take_while(|from| *from < end.get());
    let read = async |wanted: Range<usize>| {
        let full = wanted.end;
        let ended = piece(&turns.pieces, file, &memory, wanted, at).await?;
        if ended < full {
            end.set(end.get().min(ended));
        }
        Ok::<_, io::Error>(())
    };
    let wanted = stream::iter(pieces).map(|from| Ok(from..(from + READ_PIECE_BYTES).min(all)));
    wanted.try_for_each_concurrent(READS_AHEAD, read).await?;
    let mut memory = Rc::into_inner(memory).ok_or_else(|| io::Error::other("a read that is over goes on"))?;
    // SAFETY: the kernel wrote every piece in front of `end` whole, and the one that `end` lies in up to there.
    unsafe { memory.set_filled(end.get()) };
    memory.truncate(len);
    Ok(Bytes::from_owner(memory))
}

/// Reads a piece of what is `at` into its place of the memory for it, in its turn; returns where in there ends what the
/// file has of it.
async fn piece(
    turns: &Arc<Semaphore>,
    file: &UringFile,
    memory: &Rc<AlignedBuf>,
    piece: Range<usize>,
    at: u64,
) -> io::Result<usize> {
    assert!(piece.end <= memory.capacity(), "a read stays inside its memory");
    let mut turn = Arc::clone(turns).acquire_owned().await.map_err(io::Error::other)?;
    let mut done = piece.start;
    while done < piece.end {
        // SAFETY: `done` is inside of the memory, asserted above.
        let into = unsafe { memory.start().add(done) };
        let entry = opcode::Read::new(fd_of(file), into, ring_len(piece.end - done)).offset((at + done as u64) as _);
        // Memory and descriptor ride along: neither may go meanwhile. And the turn, which is not over before that.
        let (result, (back, ..)) = submit((turn, Rc::clone(memory), file.clone()), entry.build()).await;
        turn = back;
        match result {
            Ok(0) => break,
            Ok(count) => {
                done += count as usize;
                // A direct read that ends off a block boundary has met the end of the file.
                if !u64::from(count).is_multiple_of(BLOCK_BYTES) {
                    break;
                }
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
