//! Every bound of the storage crate, with what it protects and what it was sized against.

use std::time::Duration;

/// Alignment of every chunk, buffer and direct write, in bytes.
/// The largest logical block size in use today; the device's own `dio_offset_align` (statx) may be
/// smaller, never larger, or the direct engine is not used.
pub const BLOCK_BYTES: u64 = 4096;

/// Size of one ring buffer, in bytes. A direct write carries at most this much.
/// Smaller: more system calls a chunk. Larger: the slice that a writer encodes without parking grows.
pub const RING_BUFFER_BYTES: usize = 1 << 20;

/// Ring buffers of one writer thread.
pub const RING_BUFFERS_PER_WRITER: usize = RING_WRITES_AT_DEVICE + RING_BUFFERS_READY;

/// Writes of one thread that are at the device at once. Bounds the bytes under way to it while only chunks go there: some
/// wait for the file system after the device is done with them.
pub const RING_WRITES_AT_DEVICE: usize = 32;

/// Buffers filled meanwhile, which go as soon as one comes back: a device that answers all that it has at once would
/// otherwise have nothing to do until the next one is filled.
const RING_BUFFERS_READY: usize = 16;

/// Buffers of one thread that may be out at once while somebody waits for a small durable write, which stands behind
/// them at the device: the 8 MiB of one writer are 3 to 6 ms of the measured disk.
pub const RING_BUFFERS_LOW: usize = 8;

/// How long after a small write the next one is expected: more than the tenth of a second between two rows of a slow
/// sensor.
pub const DEPTH_LOW_AFTER: Duration = Duration::from_millis(250);

/// Ring buffers of the steward thread.
pub const RING_BUFFERS_PER_SERVICE: usize = 8;

/// Bytes that one request reads. Larger ones would keep others' writes waiting behind them for longer.
pub const READ_PIECE_BYTES: usize = 1 << 20;

/// Pieces of one range that are read at once.
pub const READS_AHEAD: usize = 4;

/// Pieces that one thread reads of a device at once, of all ranges: what a write waits for that comes behind them.
pub const READS_AT_DEVICE: usize = 8;

/// Submission queue entries of one ring: more than all its buffers plus syncs and file operations.
pub const RING_ENTRIES: u32 = 256;

/// Most bytes of a chunk trailer that recovery will read. Bounds an allocation made from a length on disk.
pub const TRAILER_BYTES_MAX: u64 = 64 << 20;

/// Most bytes of a segment's head, which carries the topic's schema and user metadata (4 MiB at most).
/// Bounds an allocation made from a length on disk.
pub const HEAD_BYTES_MAX: u64 = 32 << 20;

/// Most bytes of a small file of ours: the manifest of a finalized sequence is the largest, with the user
/// metadata and schemas of all its topics.
pub const SMALL_FILE_BYTES_MAX: u64 = 1 << 30;

/// Largest uncompressed page aimed at, in bytes. A single larger value makes its own page.
pub const PAGE_BYTES: usize = 1 << 20;

/// Longest text kept as a minimum or maximum in the skip index, in bytes; longer ones are cut and marked inexact.
pub const TEXT_BOUND_BYTES: usize = 64;

/// Nesting depth of a schema. Bounds recursion over types that came from outside.
pub const SCHEMA_DEPTH_MAX: usize = 64;

/// Bytes that one row may take by its types alone (fixed-size lists and binaries).
/// Bounds what trying out a schema allocates: types multiply without a byte being sent.
pub const FIXED_ROW_BYTES_MAX: u64 = 16 << 20;

/// Leaf columns of a schema. Bounds encoder memory and the size of a chunk record.
pub const SCHEMA_LEAVES_MAX: usize = 4096;

/// Distinct values of a text leaf that a chunk's index keeps. Sized for names of frames, states and
/// encodings; a leaf with more has only its bounds.
pub const VALUE_SET_MAX: usize = 16;

/// Longest text in such a set, in bytes.
pub const VALUE_SET_TEXT_BYTES: usize = 64;

/// Chunks whose statistics lie together in one value of the skip index.
/// Smaller: more keys to step over in a scan. Larger: more bytes to read for one topic.
pub const SKIP_BLOCK_CHUNKS: usize = 256;

/// Chunks read and decoded at once, over all readers. Each holds its bytes twice for a moment.
pub const CHUNKS_LOADING_MAX: usize = 8;

/// Reports of damaged chunks that wait to be looked at; more are found again by the next read.
pub const DAMAGE_REPORTS_MAX: usize = 256;

/// Streams that may hold decoded chunks at once while they put a batch together.
pub const STREAMS_HOLDING_MAX: usize = 4;

/// Chunks that one outgoing batch may draw rows from.
pub const SOURCES_PER_BATCH_MAX: usize = 4;

/// Bytes of a deleted file given back to the disk at once. A device that discards takes some three milliseconds for them,
/// which is what others wait.
pub const RECLAIM_STEP_BYTES: u64 = 16 << 20;

/// Deleted files of a volume that wait to be given back, each a descriptor, and as many again on their way there: 128 GiB of
/// whole segments. What is left of them when the program ends, the kernel gives back in one go: half a minute.
pub const RECLAIM_FILES_MAX: usize = 512;

/// The part of a volume's size below which free space is short: then nothing pauses while space is given back.
pub const RECLAIM_SHORT_PART: u64 = 50;

/// Most bytes the catalog's memtables hold together (RocksDB's write buffer manager).
pub const CATALOG_WRITE_BUFFER_BYTES: usize = 48 << 20;

/// The catalog's block cache, in bytes.
pub const CATALOG_BLOCK_CACHE_BYTES: usize = 32 << 20;

/// Write-ahead log kept before families are flushed to let go of it, in bytes.
pub const CATALOG_WAL_BYTES_MAX: u64 = 256 << 20;

const _: () = assert!((RING_BUFFER_BYTES as u64).is_multiple_of(BLOCK_BYTES));
const _: () = assert!(RING_ENTRIES as usize >= 4 * RING_BUFFERS_PER_WRITER);
