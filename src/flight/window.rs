//! How much of a stream's window a sender gets, and when: HTTP/2's back-pressure, given out by message and in turns.
//!
//! Guarantees: on a connection of few uploads, senders have their whole windows. On others, a sender may always begin a
//! message ([`Turns::unasked_bytes`]), and send whole small ones; of a larger one it may send what was admitted, when it
//! is its stream's turn. All turns of a connection together are about as much as stays in a processor's caches
//! ([`TURN_BYTES`]); they are had in the order they were asked for, and one that takes too long ([`TURN_PASSES`]) goes to
//! the next. So no stream stands still.
//!
//! Without it a thousand topics that send as fast as they can have all their windows lie in the server, and most
//! bytes have left the caches by the time they are looked at.

use crate::flight::places::RequestPlace;
use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, Sleep, sleep};

/// What a stream may send at least before it is admitted: small messages whole, and of larger ones the head, which says
/// how large they are. An IMU row as Python sends it has 4.6 kB. A thousand streams have 8 MiB of it.
const UNASKED_BYTES: usize = 8 << 10;

/// What streams may send before they are admitted, together, if that is more for each: a few with small messages send
/// many before they need to hear from here.
const UNASKED_TOGETHER_BYTES: usize = TURN_BYTES / 4;

/// What the streams of one connection that have a turn may send, together. Twice what a core has to itself:
/// half of it is on its way. Two uploads with windows of 1 MiB need no turns; four that take turns cost less than four
/// that do not.
const TURN_BYTES: usize = 2 << 20;

/// A turn is over after so long, whatever its sender still has of it: a thousand times what it takes over a fast line.
const TURN_PASSES: Duration = Duration::from_millis(250);

/// The turns of a connection's streams.
#[derive(Debug, Clone)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// Streams whose bodies come by message.
    uploads: Arc<AtomicUsize>,
}

impl Turns {
    /// Of a connection without streams.
    pub(super) fn new() -> Self {
        Self { free: Arc::new(Semaphore::new(TURN_BYTES)), uploads: Arc::default() }
    }

    /// Whether the windows of all uploads are more than turns allow. One alone would stand still between its messages,
    /// and gain nothing.
    fn are_needed(&self, window_bytes: usize) -> bool {
        let uploads = self.uploads.load(Ordering::Relaxed);
        uploads > 1 && TURN_BYTES < uploads.saturating_mul(window_bytes)
    }

    /// What a stream may send before it is admitted.
    fn unasked_bytes(&self) -> usize {
        UNASKED_BYTES.max(UNASKED_TOGETHER_BYTES / self.uploads.load(Ordering::Relaxed).max(1))
    }

    /// Waits for a turn of so many bytes.
    fn claim(&self, bytes: usize) -> Claim {
        let bytes = u32::try_from(bytes.min(TURN_BYTES)).unwrap_or(u32::MAX);
        Box::pin(Arc::clone(&self.free).acquire_many_owned(bytes))
    }
}

type Claim = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// What a sender may send, and what was taken of it, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    size: usize,
    /// May still come, or is here and not yet taken.
    open: usize,
    /// Taken, and not yet given back to the sender.
    held: usize,
    /// Of these, what no message was admitted for: it may have to wait here, in place of more of the same window.
    unadmitted: usize,
}

impl Window {
    fn new(size: usize) -> Self {
        Self { size, open: size, held: 0, unadmitted: 0 }
    }

    fn take(&mut self, bytes: usize) {
        self.open = self.open.saturating_sub(bytes);
        self.held += bytes;
    }

    /// What to give back if so much is wanted and a message may begin with `unasked` bytes. What can come already needs
    /// no more than the beginning of the next message behind it. A little at a time is not worth it, unless it is much
    /// to the sender.
    fn due(&self, wanted: u64, unasked: usize) -> usize {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let most = if wanted <= self.open { unasked } else { wanted.saturating_add(unasked) };
        let most = most.min(self.size);
        let due = most.saturating_sub(self.open).min(self.held.saturating_sub(self.unadmitted));
        if due >= UNASKED_BYTES || due > self.open / 2 { due } else { 0 }
    }

    /// How much of what is due needs a turn.
    fn in_turn(&self, due: usize, unasked: usize) -> usize {
        (self.open + due).saturating_sub(self.open.max(unasked))
    }

    fn give(&mut self, bytes: usize) {
        self.open += bytes;
        self.held -= bytes;
    }

    /// The most that a turn is still good for.
    fn turn_left(&self, unasked: usize) -> usize {
        self.open.saturating_sub(unasked)
    }
}

/// A turn that is had.
#[derive(Debug)]
struct Turn {
    permit: OwnedSemaphorePermit,
    passes: Pin<Box<Sleep>>,
}

impl Turn {
    /// Begins with what was claimed.
    fn new(permit: OwnedSemaphorePermit) -> Self {
        Self { permit, passes: Box::pin(sleep(TURN_PASSES)) }
    }

    /// Goes on with more.
    fn extend(&mut self, permit: OwnedSemaphorePermit) {
        self.permit.merge(permit);
        self.passes.as_mut().reset(Instant::now() + TURN_PASSES);
    }

    /// Gives back what goes beyond `left`; whether it is over.
    fn shrink_to(&mut self, left: usize) -> bool {
        let excess = self.permit.num_permits().saturating_sub(left);
        drop(self.permit.split(excess));
        self.permit.num_permits() == 0
    }
}

/// A request's body, as it comes from the connection.
pub(super) struct RequestBody {
    stream: RecvStream,
    window: Window,
    /// `None`: nobody says, and the sender has all of its window.
    wanted: Option<u64>,
    /// The sender gets nothing back.
    is_held_back: bool,
    turns: Turns,
    claim: Option<Claim>,
    turn: Option<Turn>,
    /// Closed when nobody waits for the answer any more.
    unwanted: oneshot::Receiver<Infallible>,
    /// The data are over; trailers may follow.
    is_over: bool,
    /// Kept while more can come.
    place: Option<RequestPlace>,
}

impl RequestBody {
    /// Of a stream whose sender begins with a window of so many bytes. `unwanted` closes when nobody waits for the answer.
    pub(super) fn new(
        stream: RecvStream,
        window_bytes: u32,
        turns: Turns,
        unwanted: oneshot::Receiver<Infallible>,
    ) -> Self {
        Self {
            stream,
            window: Window::new(usize::try_from(window_bytes).unwrap_or(usize::MAX)),
            wanted: None,
            is_held_back: false,
            turns,
            claim: None,
            turn: None,
            unwanted,
            is_over: false,
            place: None,
        }
    }

    /// The same, in this place.
    pub(super) fn at(mut self, place: RequestPlace) -> Self {
        self.place = Some(place);
        self
    }

    /// Ready when nobody waits for the answer any more, as after a reset: who does not read on would not see it.
    pub(super) fn poll_unwanted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.unwanted).poll(cx).map(drop)
    }

    /// Says that so many more bytes of an admitted message can be taken, none between messages. Until it is said for
    /// the first time, any number can. Turns are for messages: between them, or when no more is taken, others have them.
    pub(super) fn want(&mut self, bytes: u64) {
        if self.wanted.replace(bytes).is_none() {
            self.turns.uploads.fetch_add(1, Ordering::Relaxed);
        }
        self.leave_turns_if_done();
    }

    /// As [`Self::want`], of a message that was admitted with what came last: its sender goes on at once.
    pub(super) fn go_on(&mut self, bytes: u64, cx: &mut Context<'_>) {
        self.window.unadmitted = 0;
        self.want(bytes);
        self.give(cx).ok(); // What broke is seen at the next read.
    }

    /// Says whether what is read stays counted in the sender's window, so that no more than that is ever here.
    pub(super) fn hold_back(&mut self, is_held_back: bool) {
        self.is_held_back = is_held_back;
    }

    /// Whether the sender may not go on because it is the turn of others.
    pub(super) fn waits_for_turn(&self) -> bool {
        self.claim.is_some()
    }

    fn leave_turns_if_done(&mut self) {
        if self.wanted == Some(0) {
            (self.claim, self.turn) = (None, None);
        }
    }

    /// Nothing more comes.
    fn retire(&mut self) {
        (self.claim, self.turn, self.place) = (None, None, None);
        if self.wanted.take().is_some() {
            self.turns.uploads.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Gives the sender what is wanted of it, as soon as it is this stream's turn.
    fn give(&mut self, cx: &mut Context<'_>) -> Result<(), h2::Error> {
        if self.is_held_back {
            return Ok(());
        }
        let wanted = self.wanted.filter(|_| self.turns.are_needed(self.window.size));
        let unasked = self.turns.unasked_bytes();
        let mut due = self.window.due(wanted.unwrap_or(u64::MAX), unasked);
        let in_turn = if wanted.is_some() { self.window.in_turn(due, unasked) } else { 0 };
        if in_turn > 0 {
            let claim = self.claim.get_or_insert_with(|| self.turns.claim(in_turn));
            match claim.as_mut().poll(cx) {
                Poll::Ready(Ok(permit)) => {
                    self.claim = None;
                    // More may have become due since the turn was asked for.
                    due -= in_turn.saturating_sub(permit.num_permits());
                    match &mut self.turn {
                        Some(turn) => turn.extend(permit),
                        none => *none = Some(Turn::new(permit)),
                    }
                }
                Poll::Ready(Err(_)) => self.claim = None, // The turns are never closed.
                Poll::Pending => due = 0,
            }
        } else {
            self.claim = None; // Nobody would ask for it.
        }
        if wanted.is_none() {
            self.turn = None;
        }
        self.window.give(due);
        self.leave_turn_beyond_window(); // More may have become unasked since the turn was asked for.
        // Also nothing: h2 keeps what is less than half of what the sender still has, and looks at it again here.
        self.stream.flow_control().release_capacity(due)
    }

    /// Notes what came.
    fn take(&mut self, bytes: usize) {
        self.window.take(bytes);
        let admitted = self.wanted.map_or(bytes, |wanted| usize::try_from(wanted).unwrap_or(usize::MAX));
        self.window.unadmitted = bytes.saturating_sub(admitted);
        self.wanted = self.wanted.map(|wanted| wanted.saturating_sub(bytes as u64));
        self.leave_turns_if_done(); // It may be long before anybody asks for the next message.
        self.leave_turn_beyond_window();
    }

    /// Leaves to others what this stream's window cannot use of its turn any more.
    fn leave_turn_beyond_window(&mut self) {
        let left = self.window.turn_left(self.turns.unasked_bytes());
        if self.turn.as_mut().is_some_and(|turn| turn.shrink_to(left)) {
            self.turn = None;
        }
    }

    /// Ends a turn that took too long.
    fn pass(&mut self, cx: &mut Context<'_>) {
        if self.turn.as_mut().is_some_and(|turn| turn.passes.as_mut().poll(cx).is_ready()) {
            self.turn = None;
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.retire();
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = &mut *self;
        if !this.is_over {
            this.window.unadmitted = 0; // Who asks for more has no more of it.
            this.give(cx)?;
            match this.stream.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    this.take(data.len());
                    this.give(cx)?; // The sender goes on while these bytes are looked at.
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Poll::Ready(Some(Err(error))) => {
                    this.retire();
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    this.retire();
                    this.is_over = true;
                }
                Poll::Pending => {
                    this.pass(cx);
                    return Poll::Pending;
                }
            }
        }
        let trailers = ready!(this.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use storage::sim::Random;

    pub(crate) const SIZE: usize = 256 << 10;

    #[test]
    fn a_sender_gets_what_is_wanted_and_the_beginning_of_the_next_message() {
        const U: usize = UNASKED_BYTES;
        let check = |open: usize, wanted: u64, expected: (usize, usize), why: &str| {
            let window = Window { size: SIZE, open, held: SIZE - open, unadmitted: 0 };
            let due = window.due(wanted, U);
            assert_eq!((due, window.in_turn(due, U)), expected, "{open} open, {wanted} wanted: {why}");
        };
        check(SIZE, 0, (0, 0), "all of it is open");
        check(SIZE, u64::MAX, (0, 0), "all of it is open");
        check(U, 0, (0, 0), "between messages");
        check(0, 0, (U, 0), "the beginning needs no turn");
        check(U / 4, 0, (U - U / 4, 0), "nor does the rest of it");
        check(U * 3 / 4, 0, (0, 0), "too little for a frame");
        check(U, 100_000, (100_000, 100_000), "the message");
        check(U / 2, 100_000, (100_000 + U / 2, 100_000), "the message and the next one's beginning");
        check(U, 4000, (0, 0), "what is open is enough");
        check(U / 4, 900, (U - U / 4, 0), "small messages need no turn");
        check(100_000, 120_000, (20_000 + U, 20_000 + U), "what the message needs beyond what is open");
        check(100_000, 100_010, (U + 10, U + 10), "a little, and the beginning of the next");
        check(SIZE - 1000, u64::MAX, (0, 0), "little at a time");
        check(U, 8 << 20, (SIZE - U, SIZE - U), "never more than the window");
        check(0, u64::MAX, (SIZE, SIZE - U), "as much as there is");
    }

    #[test]
    fn turns_are_for_uploads_whose_windows_are_more_together_than_turns_allow_and_never_for_one_alone() {
        let check = |uploads: usize, window_bytes: usize, expected: bool| {
            let turns = Turns::new();
            turns.uploads.store(uploads, Ordering::Relaxed);
            assert_eq!(turns.are_needed(window_bytes), expected, "{uploads} uploads of {window_bytes} bytes");
        };
        check(0, SIZE, false);
        check(TURN_BYTES / SIZE, SIZE, false);
        check(TURN_BYTES / SIZE + 1, SIZE, true);
        check(1, TURN_BYTES * 2, false);
        check(2, TURN_BYTES * 2, true);
    }

    #[test]
    fn the_fewer_the_uploads_the_more_each_may_send_unasked() {
        let unasked = |uploads: usize| {
            let turns = Turns::new();
            turns.uploads.store(uploads, Ordering::Relaxed);
            turns.unasked_bytes()
        };
        assert_eq!([4, 16, 64, 65, 1000].map(unasked), [128 << 10, 32 << 10, 8 << 10, UNASKED_BYTES, UNASKED_BYTES]);
        assert_eq!(unasked(0), UNASKED_TOGETHER_BYTES, "none has said yet that its body comes by message");
    }

    #[test]
    fn no_stream_stands_still_whatever_its_messages_and_pieces() {
        let mut random = Random::new(11);
        for round in 0..200 {
            let mut window = Window::new(SIZE);
            let largest = [50, 20_000, 300_000, 3_000_000][usize::try_from(round % 4).expect("small")];
            for _ in 0..30 {
                let mut left = 1 + random.below(largest);
                // Others come and go.
                let unasked = |random: &mut Random| UNASKED_BYTES << random.below(7);
                while left > 0 {
                    window.give(window.due(left, unasked(&mut random)));
                    assert_eq!(window.open + window.held, SIZE);
                    assert!(window.open > 0, "{left} bytes left, and the sender may send none");
                    let piece = left.min(1 + random.below(window.open as u64));
                    window.take(usize::try_from(piece).expect("a piece"));
                    left -= piece;
                }
                window.give(window.due(0, unasked(&mut random)));
                assert!(window.open > UNASKED_BYTES / 2, "a small message can begin");
            }
        }
    }

    /// Streams of one connection that has so many `others`: their senders, and what comes of them.
    pub(crate) async fn streams(count: usize, others: usize) -> (Vec<h2::SendStream<Bytes>>, Vec<RequestBody>) {
        let (senders, bodies, wanted) = wanted_streams(count, others).await;
        wanted.into_iter().for_each(std::mem::forget);
        (senders, bodies)
    }

    /// As [`streams`], with what says that somebody waits for their answers.
    pub(crate) async fn wanted_streams(
        count: usize,
        others: usize,
    ) -> (Vec<h2::SendStream<Bytes>>, Vec<RequestBody>, Vec<oneshot::Sender<Infallible>>) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let accept = async {
            let mut builder = h2::server::Builder::new();
            builder.initial_window_size(SIZE as u32).initial_connection_window_size((1 << 31) - 1);
            let mut connection = builder.handshake::<_, Bytes>(far).await.expect("a server");
            let turns = Turns::new();
            turns.uploads.store(others, Ordering::Relaxed);
            let (mut bodies, mut answers, mut all_wanted) = (Vec::new(), Vec::new(), Vec::new());
            while bodies.len() < count {
                let (request, answer) = connection.accept().await.expect("a stream").expect("a request");
                let (wanted, unwanted) = oneshot::channel();
                bodies.push(RequestBody::new(request.into_body(), SIZE as u32, turns.clone(), unwanted));
                answers.push(answer);
                all_wanted.push(wanted);
            }
            tokio::spawn(async move {
                let _answers = answers;
                while connection.accept().await.is_some() {}
            });
            (bodies, all_wanted)
        };
        let send = async {
            let (mut requests, connection) = h2::client::handshake(near).await.expect("a client");
            tokio::spawn(connection);
            let (mut senders, mut answers) = (Vec::new(), Vec::new());
            for _ in 0..count {
                requests = requests.ready().await.expect("room for a stream");
                let request = http::Request::post("http://box/").body(()).expect("a request");
                let (answer, sender) = requests.send_request(request, false).expect("sent");
                senders.push(sender);
                answers.push(answer);
            }
            tokio::spawn(futures::future::join_all(answers));
            senders
        };
        let (senders, (bodies, wanted)) = futures::join!(send, accept);
        (senders, bodies, wanted)
    }

    pub(crate) async fn room(sender: &mut h2::SendStream<Bytes>, bytes: usize) {
        sender.reserve_capacity(bytes);
        while sender.capacity() < bytes {
            std::future::poll_fn(|cx| sender.poll_capacity(cx)).await.expect("open").expect("room");
        }
    }

    /// Has all turns of a body's connection.
    pub(crate) async fn all_turns(body: &RequestBody) -> OwnedSemaphorePermit {
        body.turns.claim(TURN_BYTES).await.expect("all turns")
    }

    async fn frame(body: &mut RequestBody) -> usize {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        frame.expect("more").expect("a frame").into_data().expect("data").len()
    }

    /// Takes so many bytes, then waits for more.
    async fn take(mut body: RequestBody, message: usize) {
        let mut left = message;
        while left > 0 {
            body.want(left as u64);
            left = left.saturating_sub(frame(&mut body).await);
        }
    }

    /// Streams that would have the turns three times over.
    const STOPPED: usize = 3 * TURN_BYTES / SIZE;

    /// Sends the first half of messages of two windows, and takes it.
    async fn stop_half_way(senders: &mut [h2::SendStream<Bytes>], bodies: Vec<RequestBody>) {
        for sender in senders {
            room(sender, SIZE).await;
            sender.send_data(vec![7; SIZE].into(), false).expect("sent");
        }
        for body in bodies {
            tokio::spawn(take(body, 2 * SIZE));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn turns_have_a_bound_together_and_one_that_its_sender_lets_pass_goes_to_the_next() {
        // All stop in the middle of their messages.
        let (mut senders, bodies) = streams(STOPPED, 0).await;
        stop_half_way(&mut senders, bodies).await;
        sleep(Duration::from_millis(1)).await;
        let begun = Instant::now();
        senders.iter_mut().for_each(|sender| sender.reserve_capacity(SIZE));
        let under_way: usize = senders.iter().map(h2::SendStream::capacity).sum();
        let most = TURN_BYTES + UNASKED_TOGETHER_BYTES.max(STOPPED * UNASKED_BYTES);
        assert!((TURN_BYTES / 2..=most).contains(&under_way), "{under_way} bytes may be sent of {most}");
        let waits = senders.iter_mut().map(async |sender| {
            room(sender, SIZE / 2).await;
            begun.elapsed()
        });
        let waits = futures::future::join_all(waits).await;
        let at_once = waits.iter().filter(|wait| wait.is_zero()).count();
        assert!(at_once < STOPPED, "turns are not for all");
        let longest = waits.iter().max().expect("one");
        assert!((TURN_PASSES..TURN_PASSES * 10).contains(longest), "{longest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_a_turn_still_takes_small_messages() {
        let (mut senders, mut bodies) = streams(STOPPED + 1, 0).await;
        let (mut slow, mut small) = (senders.pop().expect("one"), bodies.pop().expect("one"));
        stop_half_way(&mut senders, bodies).await;
        let begun = Instant::now();
        // Also an IMU row as Python sends it.
        for bytes in (0..1000).map(|number| if number % 2 == 0 { 900 } else { 4600 }) {
            room(&mut slow, bytes).await;
            slow.send_data(vec![7; bytes].into(), false).expect("sent");
            small.want(bytes as u64);
            assert_eq!(frame(&mut small).await, bytes);
            small.want(0);
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_turn_each_of_a_few_may_send_more_than_each_of_many() {
        for (others, share) in [(15, UNASKED_TOGETHER_BYTES / 16), (999, UNASKED_BYTES)] {
            let (mut senders, mut bodies) = streams(1, others).await;
            let (mut sender, mut body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
            let _all = all_turns(&body).await;
            room(&mut sender, SIZE).await;
            sender.send_data(vec![7; SIZE].into(), false).expect("sent");
            let mut left = SIZE;
            while left > 0 {
                body.want(0);
                left -= frame(&mut body).await;
            }
            body.want(SIZE as u64);
            assert!(futures::poll!(std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).is_pending());
            sender.reserve_capacity(SIZE);
            sleep(Duration::from_millis(1)).await;
            let room = sender.capacity();
            assert!(share / 2 < room && room <= share, "{room} bytes of {share}, beside {others} others");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_to_be_admitted_keeps_its_place_in_the_window() {
        let (mut senders, mut bodies) = streams(1, 0).await;
        let (mut sender, mut body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
        room(&mut sender, SIZE).await;
        sender.send_data(vec![7; SIZE].into(), false).expect("sent");
        sleep(Duration::from_millis(1)).await;
        body.want(0);
        let came = frame(&mut body).await;
        sender.reserve_capacity(SIZE);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(sender.capacity(), 0, "{came} bytes are here and not admitted");
        std::future::poll_fn(|cx| {
            body.go_on(SIZE as u64, cx);
            Poll::Ready(())
        })
        .await;
        sleep(Duration::from_millis(1)).await;
        assert!(sender.capacity() > 0, "now they are");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_upload_has_its_whole_window_also_between_messages() {
        for (others, whole) in [(0, true), (100, false)] {
            let (mut senders, mut bodies) = streams(1, others).await;
            let (mut sender, mut body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
            room(&mut sender, SIZE).await;
            sender.send_data(vec![7; SIZE].into(), false).expect("sent");
            let mut left = SIZE;
            while left > 0 {
                body.want(left as u64);
                left -= frame(&mut body).await;
            }
            body.want(0);
            assert!(futures::poll!(std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).is_pending());
            let room = tokio::time::timeout(TURN_PASSES, room(&mut sender, SIZE / 2)).await;
            assert_eq!(room.is_ok(), whole, "beside {others} others");
            let turns = body.turns.clone();
            drop(body);
            assert_eq!(turns.uploads.load(Ordering::Relaxed), others);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_is_given_up_leaves_its_turn_to_others() {
        let (mut senders, mut bodies) = streams(1, 100).await;
        let (mut sender, mut body) = (senders.pop().expect("one"), bodies.pop().expect("one"));
        room(&mut sender, SIZE).await;
        sender.send_data(vec![7; SIZE].into(), false).expect("sent");
        let turns = body.turns.clone();
        let mut left = 2 * SIZE;
        while left > SIZE {
            body.want(left as u64);
            left -= frame(&mut body).await;
        }
        assert!(turns.free.available_permits() < TURN_BYTES, "a message is half here");
        body.want(0);
        assert_eq!(turns.free.available_permits(), TURN_BYTES);
        // One that waits for its turn while there is none.
        let all = turns.claim(TURN_BYTES).await.expect("all turns");
        body.want(SIZE as u64);
        assert!(futures::poll!(std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).is_pending());
        sender.send_reset(h2::Reason::CANCEL);
        let end = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.expect("an end");
        assert!(end.is_err());
        drop(all);
        assert_eq!(turns.free.available_permits(), TURN_BYTES);
    }

    #[tokio::test]
    async fn a_hundred_streams_that_send_at_once_all_arrive() {
        const BYTES: usize = 1_000_000;
        let (senders, bodies) = streams(100, 0).await;
        for mut sender in senders {
            tokio::spawn(async move {
                let mut left = BYTES;
                while left > 0 {
                    room(&mut sender, 1).await;
                    sender.reserve_capacity(left);
                    let piece = sender.capacity().min(left);
                    sender.send_data(vec![7; piece].into(), left == piece).expect("sent");
                    left -= piece;
                }
            });
        }
        futures::future::join_all(bodies.into_iter().map(|body| take(body, BYTES))).await;
    }
}
