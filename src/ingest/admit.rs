//! Permits for memory: the back-pressure of the whole program (station 1).
//!
//! Guarantees (INV-7): the bytes of all permits never exceed the budget, except by one request that
//! is larger than its whole pool, which is admitted only when that pool is empty. A claim is all or
//! nothing: nobody holds half a message and waits for the other half. Small messages have a tenth
//! for themselves, so a slow topic never waits behind 45 MiB. Each stream has one claim at a time,
//! so the queue of big claims is served round robin by topic.
//!
//! There are two pools to wait for. *receive* covers messages as they come from the socket. *decode* covers
//! what decoding adds (uncompressed bodies, copies for alignment, dictionaries' values). A claim on
//! *decode* may be made while holding *receive*, never the other way round, and what holds *decode*
//! waits only for the disk: so the two cannot wait for each other.

use crate::limits::SMALL_MESSAGE_BYTES;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The budget of the program.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    /// Messages from the socket.
    pub(crate) receive: Pool,
    /// What decoding adds to them.
    pub(crate) decode: Pool,
    /// Dictionaries, which live as long as their streams: refused when it is full, never waited for.
    pub(crate) dictionaries: Pool,
}

impl Budget {
    /// Splits `bytes`: three quarters to receive, an eighth each to decode and to dictionaries.
    pub(crate) fn new(bytes: u64) -> Self {
        let eighth = bytes / 8;
        Self { receive: Pool::new(bytes - 2 * eighth), decode: Pool::new(eighth), dictionaries: Pool::new(eighth) }
    }

    /// Bytes held now.
    pub(crate) fn held(&self) -> u64 {
        self.receive.held() + self.decode.held() + self.dictionaries.held()
    }

    /// Whether somebody waits for bytes that others hold.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.receive.is_waited_for() || self.decode.is_waited_for()
    }

    /// How full it is; the fuller of the two pools that are waited for counts.
    pub(crate) fn room(&self) -> Room {
        self.receive.room().min(self.decode.room())
    }
}

/// How much room there is for what comes, the least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Room {
    /// Somebody waits, or three quarters are held: open chunks should close early.
    Short,
    /// More than half is held: more comes than goes out.
    Filling,
    /// Less is.
    Plenty,
}

/// One pool of bytes.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    general_bytes: u64,
    small_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    general_free: u64,
    /// What an oversized request took beyond an empty pool.
    overdraft: u64,
    small_free: u64,
    big: VecDeque<Waiter>,
    small: VecDeque<Waiter>,
}

impl State {
    fn is_waited_for(&self) -> bool {
        !self.big.is_empty() || !self.small.is_empty()
    }
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    grant: oneshot::Sender<Permit>,
}

/// Bytes that may be held. Given back on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    pool: Pool,
    general: u64,
    small: u64,
}

impl Pool {
    /// A pool of `bytes`, a tenth of them for small messages.
    pub(crate) fn new(bytes: u64) -> Self {
        Self::of(bytes - bytes / 10, bytes / 10)
    }

    /// A pool of `bytes` without a part for small requests.
    pub(crate) fn undivided(bytes: u64) -> Self {
        Self::of(bytes, 0)
    }

    fn of(general_bytes: u64, small_bytes: u64) -> Self {
        let state = State {
            general_free: general_bytes,
            overdraft: 0,
            small_free: small_bytes,
            big: VecDeque::new(),
            small: VecDeque::new(),
        };
        Self { shared: Arc::new(Shared { general_bytes, small_bytes, state: Mutex::new(state) }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `bytes`.
    pub(crate) async fn claim(&self, bytes: u64) -> Permit {
        let waiting = {
            let mut state = self.lock();
            if let Some((general, small)) = self.take(&mut state, bytes) {
                return self.permit(general, small);
            }
            let (grant, granted) = oneshot::channel();
            let waiter = Waiter { bytes, grant };
            if bytes <= SMALL_MESSAGE_BYTES {
                state.small.push_back(waiter)
            } else {
                state.big.push_back(waiter)
            }
            granted
        };
        // Cancel-safety: a grant that finds the claimant gone comes back as a dropped permit.
        match waiting.await {
            Ok(permit) => permit,
            // The pool lives as long as `self`, so its waiters are always answered.
            Err(_) => unreachable!("a waiter is dropped only with its pool"),
        }
    }

    /// Takes `bytes` if they are free now and nobody waits for them.
    pub(crate) fn try_claim(&self, bytes: u64) -> Option<Permit> {
        let taken = self.take(&mut self.lock(), bytes);
        taken.map(|(general, small)| self.permit(general, small))
    }

    fn permit(&self, general: u64, small: u64) -> Permit {
        Permit { pool: self.clone(), general, small }
    }

    /// What a new claim takes from the general and the small part, if it need not queue.
    fn take(&self, state: &mut State, bytes: u64) -> Option<(u64, u64)> {
        if bytes <= SMALL_MESSAGE_BYTES {
            if state.small.is_empty() { self.take_small(state, bytes) } else { None }
        } else if state.big.is_empty() {
            self.take_big(state, bytes)
        } else {
            None
        }
    }

    /// Serves the first big claim in line.
    fn take_big(&self, state: &mut State, bytes: u64) -> Option<(u64, u64)> {
        if bytes <= state.general_free {
            state.general_free -= bytes;
            return Some((bytes, 0));
        }
        let empty = state.general_free == self.shared.general_bytes && state.overdraft == 0;
        if empty && bytes > self.shared.general_bytes {
            state.overdraft = bytes - self.shared.general_bytes;
            state.general_free = 0;
            return Some((bytes, 0));
        }
        None
    }

    /// Serves the first small claim in line: from the general part while no big one waits for it.
    fn take_small(&self, state: &mut State, bytes: u64) -> Option<(u64, u64)> {
        if state.big.is_empty() && bytes <= state.general_free {
            state.general_free -= bytes;
            return Some((bytes, 0));
        }
        if bytes <= state.small_free {
            state.small_free -= bytes;
            return Some((0, bytes));
        }
        None
    }

    fn give_back(&self, general: u64, small: u64) {
        let mut grants = Vec::new();
        {
            let mut state = self.lock();
            let overdrawn = general.min(state.overdraft);
            state.overdraft -= overdrawn;
            state.general_free += general - overdrawn;
            state.small_free += small;
            self.serve(&mut state, &mut grants);
        }
        // Outside the lock: a grant whose claimant has gone drops its permit here.
        for (grant, permit) in grants {
            grant.send(permit).ok();
        }
    }

    fn serve(&self, state: &mut State, grants: &mut Vec<(oneshot::Sender<Permit>, Permit)>) {
        while let Some(waiter) = state.big.pop_front() {
            if waiter.grant.is_closed() {
                continue;
            }
            match self.take_big(state, waiter.bytes) {
                Some((general, small)) => grants.push((waiter.grant, self.permit(general, small))),
                None => {
                    state.big.push_front(waiter);
                    break;
                }
            }
        }
        while let Some(waiter) = state.small.pop_front() {
            if waiter.grant.is_closed() {
                continue;
            }
            match self.take_small(state, waiter.bytes) {
                Some((general, small)) => grants.push((waiter.grant, self.permit(general, small))),
                None => {
                    state.small.push_front(waiter);
                    break;
                }
            }
        }
    }

    /// Bytes held now.
    pub(crate) fn held(&self) -> u64 {
        let state = self.lock();
        self.shared.general_bytes - state.general_free + state.overdraft + self.shared.small_bytes - state.small_free
    }

    pub(crate) fn is_waited_for(&self) -> bool {
        self.lock().is_waited_for()
    }

    fn room(&self) -> Room {
        let state = self.lock();
        if state.is_waited_for() || state.general_free < self.shared.general_bytes / 4 {
            Room::Short
        } else if state.general_free < self.shared.general_bytes / 2 {
            Room::Filling
        } else {
            Room::Plenty
        }
    }
}

impl Permit {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.general + self.small
    }

    /// Takes over the bytes of another permit of the same pool.
    pub(crate) fn absorb(&mut self, mut other: Self) {
        self.general += std::mem::take(&mut other.general);
        self.small += std::mem::take(&mut other.small);
    }

    /// Gives back what is above `bytes`.
    pub(crate) fn shrink_to(&mut self, bytes: u64) {
        let surplus = self.bytes().saturating_sub(bytes);
        let general = surplus.min(self.general);
        let small = surplus - general;
        self.general -= general;
        self.small -= small;
        self.pool.give_back(general, small);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.give_back(self.general, self.small);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MIB: u64 = 1 << 20;

    async fn stays_pending<F: Future>(claim: F) -> bool {
        tokio::time::timeout(Duration::from_millis(20), claim).await.is_err()
    }

    #[tokio::test]
    async fn inv_7_a_claim_waits_until_it_fits_whole() {
        let pool = Pool::new(100 * MIB);
        let first = pool.claim(60 * MIB).await;
        assert!(stays_pending(pool.claim(60 * MIB)).await);
        drop(first);
        let second = pool.claim(60 * MIB).await;
        assert_eq!(second.bytes(), 60 * MIB);
    }

    #[tokio::test]
    async fn a_small_message_passes_a_full_pool_through_its_reserve() {
        let pool = Pool::new(100 * MIB);
        let _all = pool.claim(90 * MIB).await;
        let small = pool.claim(1000).await;
        assert_eq!(small.bytes(), 1000);
    }

    #[tokio::test]
    async fn inv_7_more_than_the_pool_is_admitted_only_into_an_empty_pool() {
        let pool = Pool::new(10 * MIB);
        let some = pool.claim(MIB).await;
        assert!(stays_pending(pool.claim(45 * MIB)).await);
        drop(some);
        let oversized = pool.claim(45 * MIB).await;
        assert!(stays_pending(pool.claim(MIB)).await);
        drop(oversized);
        assert_eq!(pool.held(), 0);
    }

    #[tokio::test]
    async fn a_claimant_that_gives_up_leaves_nothing_held() {
        let pool = Pool::new(10 * MIB);
        let held = pool.claim(9 * MIB).await;
        assert!(stays_pending(pool.claim(5 * MIB)).await);
        drop(held);
        assert_eq!(pool.held(), 0);
        assert_eq!(pool.room(), Room::Plenty);
    }

    #[tokio::test]
    async fn room_is_short_from_three_quarters_on_or_while_somebody_waits() {
        let pool = Pool::undivided(80 * MIB);
        let mut held = pool.claim(40 * MIB).await;
        assert_eq!(pool.room(), Room::Plenty);
        held.absorb(pool.claim(1).await);
        assert_eq!(pool.room(), Room::Filling);
        held.absorb(pool.claim(20 * MIB - 1).await);
        assert_eq!(pool.room(), Room::Filling);
        held.absorb(pool.claim(1).await);
        assert_eq!(pool.room(), Room::Short);
        held.shrink_to(MIB);
        assert_eq!(pool.room(), Room::Plenty);
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.claim(80 * MIB).await }
        });
        while !pool.is_waited_for() {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.room(), Room::Short);
        waiting.abort();
    }

    #[tokio::test]
    async fn many_that_wait_are_served_in_turn() {
        let pool = Pool::new(10 * MIB);
        let held = pool.claim(9 * MIB).await;
        let mut waiting = Vec::new();
        for _ in 0..10 {
            let pool = pool.clone();
            waiting.push(tokio::spawn(async move { pool.claim(4 * MIB).await.bytes() }));
            tokio::task::yield_now().await;
        }
        drop(held);
        for claim in waiting {
            assert_eq!(claim.await.expect("granted"), 4 * MIB);
        }
    }

    #[tokio::test]
    async fn shrinking_lets_the_next_in_line_go() {
        let pool = Pool::new(10 * MIB);
        let mut held = pool.claim(9 * MIB).await;
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.claim(8 * MIB).await.bytes() }
        });
        tokio::task::yield_now().await;
        held.shrink_to(MIB);
        assert_eq!(waiting.await.expect("granted"), 8 * MIB);
    }
}
