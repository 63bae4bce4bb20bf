//! The topics that are being written, as the committer knows them.
//!
//! Guarantees: what a group did here can be undone as long as the group is not durable, and after that every total is
//! what the catalog has.

use std::collections::HashMap;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::Look;
use storage::catalog::records::TopicTotals;
use storage::ids::TopicNo;
use tokio::sync::watch;

/// What is durable of an upload.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Watermark {
    pub(crate) rows: u64,
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
}

/// Whom to tell what, once it is durable; nobody if the topic is not written any more.
pub(super) type Told = Option<(Arc<watch::Sender<Watermark>>, TopicTotals)>;

/// The topics that are being written.
#[derive(Debug, Default)]
pub(crate) struct Live {
    topics: HashMap<TopicNo, LiveTopic>,
    /// What the group did that is not durable yet, in order.
    undo: Vec<Undo>,
}

#[derive(Debug)]
enum Undo {
    Opened(TopicNo),
    Closed(TopicNo, LiveTopic),
}

#[derive(Debug)]
pub(super) struct LiveTopic {
    pub(super) totals: TopicTotals,
    /// Data bytes in chunks, the tail left out.
    pub(super) chunk_data_bytes: u64,
    watermark: Arc<watch::Sender<Watermark>>,
}

impl Live {
    /// Opens a topic for writing behind what is durable of it, of which `tail_data_bytes` lie in the tail.
    /// `false`: it is being written already.
    pub(crate) fn open(
        &mut self,
        topic: TopicNo,
        watermark: Arc<watch::Sender<Watermark>>,
        totals: TopicTotals,
        tail_data_bytes: u64,
    ) -> bool {
        let free = !self.topics.contains_key(&topic);
        if free {
            let chunk_data_bytes = totals.data_bytes.saturating_sub(tail_data_bytes);
            self.topics.insert(topic, LiveTopic { totals, chunk_data_bytes, watermark });
            self.undo.push(Undo::Opened(topic));
        }
        free
    }

    /// Whether a topic is being written.
    pub(crate) fn is_open(&self, topic: TopicNo) -> bool {
        self.topics.contains_key(&topic)
    }

    /// Closes a topic: entries still under way for it are refused. Says whether it was being written.
    pub(crate) fn close(&mut self, topic: TopicNo) -> bool {
        match self.topics.remove(&topic) {
            Some(state) => {
                self.undo.push(Undo::Closed(topic, state));
                true
            }
            None => false,
        }
    }

    /// A topic that is being written; [`StorageError::Gone`] if it is not.
    pub(super) fn written(&mut self, topic: TopicNo) -> Result<&mut LiveTopic, StorageError> {
        self.topics.get_mut(&topic).ok_or(StorageError::Gone)
    }

    /// What is to be told of a topic once the group is durable.
    pub(super) fn told(&self, topic: TopicNo) -> Told {
        self.topics.get(&topic).map(|state| (Arc::clone(&state.watermark), state.totals))
    }

    /// The group is durable.
    pub(super) fn keep(&mut self) {
        self.undo.clear();
    }

    /// The group failed: who was told so does not write; what was closed is open again if it is still
    /// there; and every total is what the catalog has.
    pub(super) fn undo(&mut self, look: &impl Look) -> Result<(), StorageError> {
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::Opened(topic) => drop(self.topics.remove(&topic)),
                Undo::Closed(topic, state) => drop(self.topics.insert(topic, state)),
            }
        }
        let mut gone = Vec::new();
        for (topic, state) in &mut self.topics {
            if look.topic(*topic)?.is_none() {
                gone.push(*topic);
                continue;
            }
            state.totals = look.totals(*topic)?;
            let tail = look.tail(*topic, state.totals.chunk_batches)?;
            let tail_bytes = tail.iter().map(|run| run.data_bytes).sum();
            state.chunk_data_bytes = state.totals.data_bytes.saturating_sub(tail_bytes);
        }
        self.topics.retain(|topic, _| !gone.contains(topic));
        Ok(())
    }
}
