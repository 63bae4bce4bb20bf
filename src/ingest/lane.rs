//! The hop between kinds of threads: a bounded lock-free queue with wake-ups. The only user of
//! crossbeam.
//!
//! Guarantees: order of each sender is kept; a full lane makes the sender wait, never grow; a
//! receiver that sleeps is woken by the next item, except by one that has time ([`Sender::send_soon`]) while the
//! receiver looks by itself anyway. Closing either end is seen by the other.

use crossbeam::queue::ArrayQueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use tokio::sync::Notify;

/// The other end is gone.
#[derive(Debug, thiserror::Error)]
#[error("the lane is closed")]
pub(crate) struct Closed;

struct Shared<T> {
    queue: ArrayQueue<T>,
    arrived: Notify,
    space: Notify,
    closed: AtomicBool,
    /// An item that has no time was sent, or found no room, since the receiver took notice.
    urgent: AtomicBool,
    /// The receiver looks again soon, woken or not.
    looks: AtomicBool,
    senders: AtomicUsize,
}

/// Makes a lane that holds at most `depth` items.
pub(crate) fn lane<T>(depth: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(depth),
        arrived: Notify::new(),
        space: Notify::new(),
        closed: AtomicBool::new(false),
        urgent: AtomicBool::new(false),
        looks: AtomicBool::new(false),
        senders: AtomicUsize::new(1),
    });
    (Sender { shared: Arc::clone(&shared) }, Receiver { shared })
}

/// The end that puts in; clones are more producers.
pub(crate) struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Puts an item in, waiting for space.
    pub(crate) async fn send(&self, item: T) -> Result<(), Closed> {
        self.put(item).await?;
        self.shared.urgent.store(true, Ordering::Release);
        self.shared.arrived.notify_one();
        Ok(())
    }

    /// Puts an item in that has time until the receiver looks by itself, if it does: a wake-up costs more than
    /// a small item.
    pub(crate) async fn send_soon(&self, item: T) -> Result<(), Closed> {
        self.put(item).await?;
        // Pairs with the fence in `looks_by_itself`: either it sees the item or this sees that it sleeps.
        fence(Ordering::SeqCst);
        let queue = &self.shared.queue;
        if !self.shared.looks.load(Ordering::Relaxed) || queue.len() >= queue.capacity() / 2 {
            self.shared.arrived.notify_one();
        }
        Ok(())
    }

    async fn put(&self, mut item: T) -> Result<(), Closed> {
        loop {
            if self.shared.closed.load(Ordering::Acquire) {
                return Err(Closed);
            }
            item = match self.shared.queue.push(item) {
                Ok(()) => return Ok(()),
                Err(item) => item,
            };
            // It is full: whoever empties it must be awake.
            self.shared.urgent.store(true, Ordering::Release);
            self.shared.arrived.notify_one();
            let space = self.shared.space.notified();
            tokio::pin!(space);
            space.as_mut().enable();
            // Cancel-safety: the item is still ours, a drop here loses only what was never queued.
            if self.shared.queue.is_full() {
                space.await;
            }
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.shared.senders.fetch_add(1, Ordering::Relaxed);
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.shared.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.arrived.notify_one();
        }
    }
}

/// The end that takes out.
pub(crate) struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Receiver<T> {
    /// Takes an item if one is there.
    pub(crate) fn try_recv(&self) -> Option<T> {
        let item = self.shared.queue.pop()?;
        self.shared.space.notify_one();
        Some(item)
    }

    /// Says whether this end will look again soon without being woken; to be followed by [`Self::ready`].
    pub(crate) fn looks_by_itself(&self, looks: bool) {
        self.shared.looks.store(looks, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Forgets what [`Self::urged`] would tell: all that is there is going to be taken.
    pub(crate) fn takes_notice(&self) {
        self.shared.urgent.store(false, Ordering::Release);
    }

    /// Waits until an item came that has no time, or found the lane full, since the last [`Self::takes_notice`]; takes
    /// nothing.
    pub(crate) async fn urged(&self) {
        loop {
            let arrived = self.shared.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if self.shared.urgent.load(Ordering::Acquire) {
                return;
            }
            // Cancel-safety: nothing was taken, and the flag stays set.
            arrived.await;
        }
    }

    /// Waits until an item is there or all senders are gone; takes nothing.
    /// Returns `false` when nothing will ever come.
    pub(crate) async fn ready(&self) -> bool {
        loop {
            let arrived = self.shared.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if !self.shared.queue.is_empty() {
                return true;
            }
            if self.shared.senders.load(Ordering::Acquire) == 0 {
                return !self.shared.queue.is_empty();
            }
            // Cancel-safety: nothing was taken.
            arrived.await;
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        while self.shared.queue.pop().is_some() {}
        self.shared.space.notify_waiters();
        self.shared.space.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn order_is_kept_through_a_full_lane() {
        let (sender, receiver) = lane(2);
        let producer = tokio::spawn(async move {
            for number in 0..1000 {
                sender.send(number).await.expect("open");
            }
        });
        let mut next = 0;
        while receiver.ready().await {
            while let Some(number) = receiver.try_recv() {
                assert_eq!(number, next);
                next += 1;
            }
        }
        producer.await.expect("producer");
        assert_eq!(next, 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn an_item_that_has_time_wakes_only_a_receiver_that_does_not_look_by_itself() {
        use std::time::Duration;
        let (sender, receiver) = lane(8);
        for (looks, woken) in [(true, false), (false, true)] {
            receiver.looks_by_itself(looks);
            let waiting = tokio::time::timeout(Duration::from_secs(1), receiver.ready());
            let sending = async {
                tokio::task::yield_now().await;
                sender.send_soon(1).await.expect("open");
            };
            let (ready, ()) = tokio::join!(waiting, sending);
            assert_eq!(ready.is_ok(), woken, "looks: {looks}");
            assert_eq!(receiver.try_recv(), Some(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_item_that_has_no_time_urges_also_a_receiver_that_took_notice_of_it_otherwise() {
        use std::time::Duration;
        let (sender, receiver) = lane(2);
        let urged = || tokio::time::timeout(Duration::from_secs(1), receiver.urged());
        sender.send_soon(1).await.expect("open");
        assert!(receiver.ready().await);
        assert!(urged().await.is_err(), "it has time");
        sender.send(2).await.expect("open");
        assert!(receiver.ready().await);
        assert!(urged().await.is_ok());
        receiver.takes_notice();
        assert!(urged().await.is_err(), "said once");
        let (blocked, urged) =
            tokio::join!(tokio::time::timeout(Duration::from_millis(1), sender.send_soon(3)), urged());
        assert!(blocked.is_err() && urged.is_ok(), "the lane is full");
    }

    #[tokio::test]
    async fn sending_to_a_dropped_receiver_fails() {
        let (sender, receiver) = lane(1);
        drop(receiver);
        assert!(sender.send(1).await.is_err());
    }
}
