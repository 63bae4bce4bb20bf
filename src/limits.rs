//! Every bound of the daemon, a paragraph each, and the sum of INV-7.

use crate::config::Config;
use std::time::Duration;

/// Messages up to this size are small: they share a tenth of the budget that big ones cannot take.
/// Sized so that a 10 Hz topic with a few hundred columns still counts as small.
pub(crate) const SMALL_MESSAGE_BYTES: u64 = 256 << 10;

/// Memory budget for each core, if nothing is set: half a second of what a core takes in.
pub(crate) const BUDGET_BYTES_PER_CORE: u64 = 512 << 20;

/// Memory is touched at start in blocks of this size: with what mimalloc adds, sixteen of them fill one of its regions
/// of 32 MiB. Of 8 MiB only three go into one, and the last quarter of each is met for the first time under load.
pub(crate) const TOUCH_BLOCK_BYTES: usize = (2 << 20) - (4 << 10);

/// Heap that one array node of a batch costs beyond its data, in bytes.
/// Measured: an IMU row of 220 data bytes and 50 nodes is 8.6 KB on the heap.
pub(crate) const NODE_OVERHEAD_BYTES: u64 = 256;

/// Nodes of the arrays that a stream keeps for columns without values: an IMU has some 40.
pub(crate) const NULL_NODES_MAX: usize = 128;

/// Items in the lane of one writer. A full lane makes the front wait, which is back-pressure as well;
/// the memory behind the items is bounded by permits, this bounds only the queue itself.
pub(crate) const WRITER_LANE_DEPTH: usize = 4096;

/// Batches below this weight wait for the writer's next look instead of waking it: hundreds of slow topics
/// would wake it thousands of times a second. While memory fills up, those below [`SMALL_MESSAGE_BYTES`] wait.
pub(crate) const SMALL_BATCH_BYTES: u64 = 64 << 10;

/// Most bytes of a DoPut descriptor's command: a locator, a key and a number as JSON. It is kept without a permit
/// until the schema comes.
pub(crate) const DESCRIPTOR_BYTES_MAX: usize = 64 << 10;

/// Items in the committer's lane, over all writers and life-cycle changes.
pub(crate) const COMMIT_LANE_DEPTH: usize = 4096;

/// Tail runs go to the committer together, until they have so many bytes, data or encoded: an entry of a group is not
/// cut.
pub(crate) const TAILS_AT_ONCE_BYTES: u64 = 1 << 20;

/// So much after the beginning of a group the committer waits for others to join the next, at most; see `spacing`.
pub(crate) const COMMIT_SPACING_MAX: Duration = Duration::from_millis(8);

/// Changes and ends in one group that are a crowd: the next waits for others as well, see `urgent_spacing`.
pub(crate) const COMMIT_CROWD: usize = 4;
/// So much after the beginning of a group the committer waits for a crowd: a sync or a few.
pub(crate) const COMMIT_CROWD_SPACING: Duration = Duration::from_millis(2);

/// Most bytes in one grouped commit. Larger groups would delay every acknowledgement in them.
pub(crate) const COMMIT_GROUP_BYTES_MAX: usize = 16 << 20;

/// Pauses between attempts to open the catalog again after a failed commit: they double from the first to
/// the second. Shorter: a full disk is hammered. Longer: a recorder stands still after it has space again.
pub(crate) const REOPEN_PAUSE_MIN: Duration = Duration::from_millis(50);
/// See [`REOPEN_PAUSE_MIN`].
pub(crate) const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long an attempt to open the catalog again waits for readers to let go of it.
pub(crate) const REOPEN_READERS_WAIT: Duration = Duration::from_secs(10);

/// How often a deletion of unknown outcome asks whether it is durable, [`REOPEN_PAUSE_MIN`] apart: a minute.
pub(crate) const UNKNOWN_OUTCOME_TRIES: u32 = 1200;

/// Commits that fail by corruption, over the whole life of the program, before the catalog
/// is given up: it is made again from the files.
pub(crate) const CORRUPT_COMMITS_MAX: u32 = 3;

/// Messages a writer takes from its lane before it decides and lets others run.
pub(crate) const GATHER_SLICE: usize = 64;

/// Chunks of one writer between close and commit. More keep the device busy through commits; each
/// holds its batches until it is durable.
pub(crate) const FLUSHES_IN_FLIGHT_MAX: usize = 16;

/// Time a writer may encode before it parks and lets the kernel have what was submitted.
pub(crate) const ENCODE_SLICE: Duration = Duration::from_millis(2);

/// Permits of a topic below this are not fitted to what its joined rows weigh: finding out costs more.
pub(crate) const SHRINK_FROM_BYTES: u64 = 32 << 10;

/// Batches of one row gathered before they are joined into one array: each row alone costs
/// [`NODE_OVERHEAD_BYTES`] a node.
pub(crate) const COALESCE_PIECES: usize = 32;

/// Pieces up to this size are joined; larger ones lose nothing by staying apart.
pub(crate) const COALESCE_PIECE_BYTES: usize = 64 << 10;

/// Bytes of one registered schema, as an Arrow message. The largest public one has 6 kB.
pub(crate) const ONTOLOGY_BYTES_MAX: usize = 1 << 20;

/// Bytes of all registered schemas together. They are held in memory, decoded, at about ten times this:
/// bounds what clients with random tags or schemas can make of it. The public ones have 150 kB.
pub(crate) const REGISTRY_BYTES_MAX: usize = 8 << 20;

/// Values in one list of a query (`$in`, whole lists).
pub(crate) const QUERY_LIST_MAX: usize = 1024;

/// Depth of `$or`, `$and`, `$not` in a query. Bounds recursion over text from outside.
pub(crate) const QUERY_DEPTH_MAX: usize = 16;

/// Topics in one answer. An answer is one message; with user metadata left out a topic is about 200 B.
pub(crate) const QUERY_TOPICS_MAX: usize = 100_000;

/// Intervals in one answer, over all topics; more are cut and the answer says so.
pub(crate) const QUERY_INTERVALS_MAX: usize = 100_000;

/// Rows of chunks that interleave in time and must be put in order at once, 16 bytes each.
pub(crate) const QUERY_MERGE_ROWS_MAX: usize = 2 << 20;

/// Topics that one query reads at once.
pub(crate) const QUERY_READS: usize = 2;

/// Queries, temporal filters and checks of the whole catalog that run at once; the others wait.
pub(crate) const QUERIES_AT_ONCE: usize = 2;

/// Comparisons in one query.
pub(crate) const QUERY_PREDICATES_MAX: usize = 256;

/// Windows that one temporal filter finds; each is an answer of its own.
pub(crate) const FILTER_WINDOWS_MAX: usize = 250_000;

/// Topics in one `topic_filter_intersect`.
pub(crate) const FILTER_TOPICS_MAX: usize = 64;

/// Notifications kept on one sequence or topic: clients leave one an error. The oldest makes room, because
/// a client whose notification is refused does not finalize.
pub(crate) const NOTIFICATIONS_MAX: usize = 1000;
/// Bytes of one notification; longer ones are cut.
pub(crate) const NOTIFICATION_BYTES_MAX: usize = 8 << 10;

/// Layers (v0).
pub(crate) const LAYERS_MAX: usize = 1000;

/// API keys.
pub(crate) const API_KEYS_MAX: usize = 1000;

/// Longest description of a layer or key, in bytes.
pub(crate) const DESCRIPTION_BYTES_MAX: usize = 4 << 10;

/// Topics whose segments are sealed side by side: twice the ring buffers that the steward has for their footers.
pub(crate) const SEALS_AT_ONCE: usize = 2 * storage::limits::RING_BUFFERS_PER_SERVICE;

/// Chunks whose topics are sealed at once: their records and statistics are in memory for that. A topic with more is
/// sealed alone.
pub(crate) const SEAL_CHUNKS_AT_ONCE: u32 = 256;

/// Jobs waiting for the reader or the steward thread.
pub(crate) const SERVICE_LANE_DEPTH: usize = 1024;

/// Longest part of a name (a sequence, or one element of a topic's path), in bytes: they become
/// file names under `browse/`, and file systems stop there.
pub(crate) const NAME_PART_BYTES_MAX: usize = 255;

/// Longest locator, in bytes. Bounds a catalog key and the length of a path.
pub(crate) const LOCATOR_BYTES_MAX: usize = 2048;

/// Most bytes of user metadata, as JSON text. Bridges put whole schema definitions there (tens of kB).
pub(crate) const USER_METADATA_BYTES_MAX: usize = 4 << 20;

/// Rows in one outgoing batch's encoded size, in bytes; one row may exceed it.
/// A half-read stream holds about this much: clients keep hundreds open.
pub(crate) const OUTGOING_BATCH_BYTES: u64 = 2 << 20;

/// Window of a connection: as large as HTTP/2 allows, so that streams are held by their own windows
/// and an unread one never stops the others.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// A message for which more than this is admitted, itself included, is out of the processor's caches before a writer
/// reads it: half of a middling last-level cache.
pub(crate) const CACHED_BYTES: u64 = 16 << 20;

/// Most that deflate can blow up: the claim for a compressed message, whose real size is unknown.
pub(crate) const DEFLATE_RATIO_MAX: u64 = 1032;

/// Bytes of one request that is no upload: an action with as much user metadata as may be, and what is around it.
pub(crate) const REQUEST_BYTES_MAX: u64 = USER_METADATA_BYTES_MAX as u64 + (1 << 20);
/// What a byte of a request's text becomes at most: `{"":0},` is a value of 32 bytes and a map of some 250, and lists
/// grow by doubling.
const REQUEST_EXPANSION: u64 = 64;
/// What a request costs beside its text.
const REQUEST_OVERHEAD_BYTES: u64 = 4 << 10;
/// Memory of requests that come in or are worked on, together: a thousand usual ones.
pub(crate) const REQUESTS_BYTES: u64 = 64 << 20;
/// Requests beyond this have a pool of their own, which is as large as the largest: they never stop usual ones. Any that is
/// compressed may be one, until it is seen.
pub(crate) const USUAL_REQUEST_BYTES: u64 = 4 << 20;
/// What a request must bring at least, once it was admitted.
pub(crate) const REQUEST_BYTES_A_SECOND: u64 = 64 << 10;

/// Requests that find a place beside as many uploads as may be: a program that makes all its topics at once.
/// See [`requests_max`].
const REQUESTS_BESIDE_UPLOADS: u32 = 128;

/// Memory of a connection beside its windows: a frame that is half here, headers, and streams that ended early.
pub(crate) const CONNECTION_BYTES: u64 = FRAME_BYTES as u64 + (512 << 10);
/// Streams of a connection that are remembered after they ended before their senders did, half a kilobyte each. A thousand
/// uploads may be refused at once.
pub(crate) const ENDED_EARLY_MAX: usize = 1024;
/// For how long: what their senders had written lies before them in the socket, and is no fault.
pub(crate) const ENDED_EARLY_FOR: Duration = Duration::from_secs(10);
/// Faults of a peer that end its connection. What comes for streams that are forgotten counts, over the connection's
/// whole life.
pub(crate) const FAULTS_MAX: usize = 1 << 16;

/// HTTP/2 frames; 16 KiB, the default, halves ingest.
pub(crate) const FRAME_BYTES: u32 = 1 << 20;

/// Window of a stream at most; see [`stream_window_bytes`]. With 256 KiB, one stream of large frames costs a sixth more
/// CPU: sender and server wait for each other more often.
pub(crate) const STREAM_WINDOW_BYTES_MAX: u64 = 1 << 20;
/// Window of a stream at least, however small the budget: what it has under way in 0.2 ms at 10 Gbit/s.
const STREAM_WINDOW_BYTES_MIN: u64 = 256 << 10;

/// Attempts at writing one chunk, each into a new segment, before its stream ends with the cause.
pub(crate) const CHUNK_ATTEMPTS_MAX: usize = 3;

/// How long a chunk that met a full disk waits for the reserve before it is tried again.
pub(crate) const RESERVE_WAIT: Duration = Duration::from_secs(2);

/// How long shutdown waits for open uploads before it ends them with their durable prefix.
pub(crate) const SHUTDOWN_DRAIN: Duration = Duration::from_secs(5);

/// What all streams of a connection can have together without being more than the budget, from 256 KiB to 1 MiB (2 MiB,
/// as in design.md section 8, gain nothing more). Over long, fast ways: several streams, or the setting.
pub(crate) fn stream_window_bytes(budget_bytes: u64, streams_max: u32) -> u32 {
    let share = budget_bytes / u64::from(streams_max.max(1));
    u32::try_from(share.clamp(STREAM_WINDOW_BYTES_MIN, STREAM_WINDOW_BYTES_MAX)).unwrap_or(u32::MAX)
}

/// As many connections as a quarter of the budget is enough for, from 64 to 1024.
pub(crate) fn connections_max(budget_bytes: u64) -> u32 {
    u32::try_from((budget_bytes / 4 / CONNECTION_BYTES).clamp(64, 1024)).unwrap_or(u32::MAX)
}

/// Requests that may still come, uploads among them, if there may be so many uploads.
pub(crate) fn requests_max(streams_max: u32) -> u32 {
    streams_max.saturating_add(REQUESTS_BESIDE_UPLOADS)
}

/// What a request of so many bytes may become in memory.
pub(crate) fn request_weight(bytes: u64, is_compressed: bool) -> u64 {
    let bytes = if is_compressed { bytes.saturating_mul(DEFLATE_RATIO_MAX).min(REQUEST_BYTES_MAX) } else { bytes };
    REQUEST_OVERHEAD_BYTES + bytes * REQUEST_EXPANSION
}

/// INV-7: what the process may hold whatever clients do, part by part, in bytes.
pub(crate) fn memory_sum(config: &Config) -> Vec<(&'static str, u64)> {
    let writers = config.writers as u64;
    let buffers =
        writers * storage::limits::RING_BUFFERS_PER_WRITER as u64 + storage::limits::RING_BUFFERS_PER_SERVICE as u64;
    let receive = config.memory_budget_bytes - config.memory_budget_bytes / 4;
    let decode = config.memory_budget_bytes / 8;
    vec![
        ("messages_and_batches", config.memory_budget_bytes),
        // One request larger than its pool, admitted when the pool is empty.
        ("oversized_message", config.message_bytes_max.saturating_sub(receive * 9 / 10)),
        ("oversized_batch", config.batch_memory_max.saturating_sub(decode * 9 / 10)),
        ("http2_windows", u64::from(config.stream_window_bytes) * u64::from(requests_max(config.streams_max))),
        ("connections", CONNECTION_BYTES * u64::from(config.connections_max)),
        ("requests", REQUESTS_BYTES),
        ("large_requests", request_weight(REQUEST_BYTES_MAX, false)),
        ("columns_without_values", u64::from(config.streams_max) * NULL_NODES_MAX as u64 * NODE_OVERHEAD_BYTES),
        // A field of many leaves is encoded beside itself; a page may be one whole value.
        ("encode", writers * (config.chunk_bytes + config.message_bytes_max)),
        ("ring_buffers", buffers * storage::limits::RING_BUFFER_BYTES as u64),
        ("read_cache", config.read_cache_bytes),
        // Raw and decoded at once for each chunk being loaded, and what streams hold while they merge.
        (
            "reads",
            (storage::limits::CHUNKS_LOADING_MAX * 2
                + storage::limits::STREAMS_HOLDING_MAX * storage::limits::SOURCES_PER_BATCH_MAX) as u64
                * config.chunk_bytes,
        ),
        ("outgoing", u64::from(config.streams_max) * OUTGOING_BATCH_BYTES / 8),
        (
            "catalog",
            storage::limits::CATALOG_WRITE_BUFFER_BYTES as u64 * 2 + storage::limits::CATALOG_BLOCK_CACHE_BYTES as u64,
        ),
        // Times of rows that are put in order, twice while they are sorted, and the columns they come from.
        (
            "queries",
            (QUERIES_AT_ONCE * QUERY_READS) as u64 * (QUERY_MERGE_ROWS_MAX as u64 * 32 + config.chunk_bytes * 2),
        ),
        ("registry", REGISTRY_BYTES_MAX as u64 * 10),
        ("program", 64 << 20),
    ]
}
