//! Whose turn it is: a bound on what runs at once and cannot be stopped.
//!
//! Guarantees (INV-7): what runs aside has its turn until it has ended. A client that asks and goes away, again and
//! again, gets no more of it to run than one that waits for its answers.

use crate::error::StorageError;
use std::sync::Arc;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// A turn; over when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Turn {
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Turn {
    /// Waits for a turn. Cancel-safety: who goes away while waiting has taken nothing.
    ///
    /// # Errors
    /// When there will be none any more.
    pub async fn take(turns: &Arc<Semaphore>) -> Result<Self, AcquireError> {
        Ok(Self { _permit: Arc::new(Arc::clone(turns).acquire_owned().await?) })
    }

    /// Runs what blocks, or takes long, off the threads that serve calls.
    ///
    /// # Errors
    /// Those of the work; one that names `op` if it panics.
    pub async fn aside<T, E, W>(&self, op: &'static str, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StorageError> + Send + 'static,
        W: FnOnce() -> Result<T, E> + Send + 'static,
    {
        let turn = self.clone();
        let in_turn = move || {
            let _turn = turn;
            work()
        };
        match tokio::task::spawn_blocking(in_turn).await {
            Ok(result) => result,
            Err(error) => Err(StorageError::Format { op, text: error.to_string() }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn what_was_given_up_has_its_turn_until_what_runs_aside_has_ended() {
        let turns = Arc::new(Semaphore::new(1));
        let (begun, is_begun) = oneshot::channel();
        let (end, ends) = mpsc::channel();
        let question = {
            let turns = Arc::clone(&turns);
            tokio::spawn(async move {
                let turn = Turn::take(&turns).await.expect("the only one");
                let work = move || {
                    begun.send(()).expect("the test waits for it");
                    ends.recv().expect("the test ends it");
                    Ok::<_, StorageError>(())
                };
                turn.aside("wait", work).await
            })
        };
        is_begun.await.expect("it begins");
        question.abort();
        assert!(question.await.expect_err("given up").is_cancelled());
        assert_eq!(turns.available_permits(), 0, "it still runs");
        end.send(()).expect("it waits");
        Turn::take(&turns).await.expect("the next one");
    }

    #[tokio::test]
    async fn what_panics_aside_is_an_error_and_leaves_its_turn() {
        let turns = Arc::new(Semaphore::new(1));
        let turn = Turn::take(&turns).await.expect("the only one");
        let panicked: Result<(), StorageError> = turn.aside("divide", || panic!("a defect")).await;
        assert!(panicked.expect_err("a defect").to_string().contains("divide"));
        drop(turn);
        assert_eq!(turns.available_permits(), 1);
    }
}
