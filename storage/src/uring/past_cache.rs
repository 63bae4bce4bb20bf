//! Copies of what is not read again soon, past the caches. Here because this is the room of `unsafe`.
//!
//! An ordinary copy fetches the memory that it is about to overwrite, and leaves both sides in the caches. Streaming
//! stores do neither: less traffic to memory, and what is used again at once (the socket's buffers, the ring's) stays
//! cached (PERF.md).

use std::mem::MaybeUninit;

/// A line of the caches: what streaming stores write as a whole.
const LINE_BYTES: usize = 64;
type Line = [MaybeUninit<u8>; LINE_BYTES];

/// Appends `bytes`, as `extend_from_slice` does.
pub fn extend(into: &mut Vec<u8>, bytes: &[u8]) {
    into.reserve(bytes.len());
    if let Some(room) = into.spare_capacity_mut().get_mut(..bytes.len()) {
        fill(room, bytes);
        // SAFETY: as many bytes behind the length were just written, inside of the capacity.
        unsafe { into.set_len(into.len() + bytes.len()) };
    }
}

/// Copies `bytes` over the start of `into`, which is at least as long, as `copy_from_slice` does.
pub fn copy(bytes: &[u8], into: &mut [u8]) {
    let room: *mut [u8] = &raw mut into[..bytes.len()];
    // SAFETY: the same bytes, still exclusively borrowed; `fill` leaves none of them uninitialised.
    fill(unsafe { &mut *(room as *mut [MaybeUninit<u8>]) }, bytes);
}

/// Writes all of `room`, which is as long as `bytes`.
fn fill(room: &mut [MaybeUninit<u8>], bytes: &[u8]) {
    let to_line = room.as_ptr().align_offset(LINE_BYTES).min(bytes.len());
    let (room_head, room) = room.split_at_mut(to_line);
    let (head, bytes) = bytes.split_at(to_line);
    let (room_lines, room_tail) = room.as_chunks_mut();
    let (lines, tail) = bytes.as_chunks();
    room_head.write_copy_of_slice(head);
    fill_lines(room_lines, lines);
    room_tail.write_copy_of_slice(tail);
}

/// Writes all of `room`, which has as many lines and begins at one, if it has any.
#[cfg(target_arch = "x86_64")]
fn fill_lines(room: &mut [Line], lines: &[[u8; LINE_BYTES]]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const WORDS: usize = LINE_BYTES / size_of::<__m128i>();

    if lines.is_empty() {
        return;
    }
    assert!(room.as_ptr().cast::<__m128i>().is_aligned() && room.len() == lines.len(), "split by `fill`");
    for (room, line) in room.iter_mut().zip(lines) {
        let (to, from) = (room.as_mut_ptr().cast::<__m128i>(), line.as_ptr().cast::<__m128i>());
        for word in 0..WORDS {
            // SAFETY: a line has WORDS words; the load asks for no alignment.
            let value = unsafe { _mm_loadu_si128(from.wrapping_add(word)) };
            // SAFETY: likewise, exclusively borrowed; lines are 64 bytes and the first is aligned, so all are.
            unsafe { _mm_stream_si128(to.wrapping_add(word), value) };
        }
    }
    // Streaming stores are in no order with what follows, not even with handing the memory to another thread.
    // SAFETY: the instruction takes nothing and exists on every x86-64.
    unsafe { _mm_sfence() };
}

/// Writes all of `room`, which has as many lines and begins at one, if it has any.
#[cfg(not(target_arch = "x86_64"))]
fn fill_lines(room: &mut [Line], lines: &[[u8; LINE_BYTES]]) {
    room.as_flattened_mut().write_copy_of_slice(lines.as_flattened());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_appends_what_an_ordinary_copy_appends_from_and_to_any_address() {
        let bytes: Vec<u8> = (0..1000_u32).map(|at| (at * 7 % 251) as u8).collect();
        for before in [0, 1, 15, 16, 63, 64, 100] {
            for (from, to) in [(0, 0), (0, 1), (3, 66), (1, 65), (0, 64), (5, 133), (0, 1000), (13, 999)] {
                let start = vec![7; before];
                let mut copy = start.clone();
                copy.reserve_exact(to - from);
                extend(&mut copy, &bytes[from..to]);
                assert_eq!(copy, [start.as_slice(), &bytes[from..to]].concat(), "{from}..{to} behind {before}");
                copy.fill(9);
                super::copy(&bytes[from..to], &mut copy[before / 2..]);
                let (head, tail) = (vec![9; before / 2], vec![9; before - before / 2]);
                assert_eq!(copy, [head.as_slice(), &bytes[from..to], &tail].concat(), "{from}..{to} over {before}");
            }
        }
    }
}
