//! The hop between kinds of threads: a bounded lock-free queue with wake-ups. The only user of
//! crossbeam.
//!
//! Guarantees: order of each sender is kept; a full lane makes the sender wait, never grow; a
//! receiver that sleeps is woken by the next item. Closing either end is seen by the other.

use crossbeam::queue::ArrayQueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    senders: AtomicUsize,
}

/// Makes a lane that holds at most `depth` items.
pub(crate) fn lane<T>(depth: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(depth),
        arrived: Notify::new(),
        space: Notify::new(),
        closed: AtomicBool::new(false),
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
    pub(crate) async fn send(&self, mut item: T) -> Result<(), Closed> {
        loop {
            if self.shared.closed.load(Ordering::Acquire) {
                return Err(Closed);
            }
            item = match self.shared.queue.push(item) {
                Ok(()) => {
                    self.shared.arrived.notify_one();
                    return Ok(());
                }
                Err(item) => item,
            };
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

    #[tokio::test]
    async fn sending_to_a_dropped_receiver_fails() {
        let (sender, receiver) = lane(1);
        drop(receiver);
        assert!(sender.send(1).await.is_err());
    }
}
