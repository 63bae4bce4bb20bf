//! What clients leave beside the data: notifications on sequences and topics, and v0's layers.
//!
//! Guarantees: a notification disappears with the thing it is on (INV-4); both are bounded.

use crate::lifecycle::{Lifecycle, LifecycleError, find_sequence, find_topic, is_locked, shorten};
use crate::limits;
use crate::when::now_ns;
use storage::catalog::Look;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::{NotificationRecord, SequenceRecord};
use storage::ids::{SequenceId, TopicNo};

type Result<T> = std::result::Result<T, LifecycleError>;

/// What a notification is on.
#[derive(Debug, Clone)]
pub(crate) enum Subject {
    /// A sequence by name.
    Sequence(String),
    /// A topic by locator.
    Topic(String),
}

impl Subject {
    fn find(&self, look: &impl Look) -> Result<(SequenceId, TopicNo)> {
        match self {
            Self::Sequence(name) => Ok((find_sequence(look, name)?.id, TopicNo(0))),
            Self::Topic(locator) => {
                let topic = find_topic(look, locator)?;
                Ok((topic.sequence, topic.no))
            }
        }
    }

    /// Its name on the wire.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Sequence(name) | Self::Topic(name) => name,
        }
    }
}

/// Descriptions are for people, not for storage.
pub(crate) fn check_description(text: &str) -> Result<()> {
    if text.len() <= limits::DESCRIPTION_BYTES_MAX {
        return Ok(());
    }
    let why = format!("has {} bytes, over the limit of {}", text.len(), limits::DESCRIPTION_BYTES_MAX);
    Err(LifecycleError::Invalid { key: "description", value: shorten(text), why })
}

/// The layer that exists from the start.
const DEFAULT_LAYER: &str = "default";

impl Lifecycle {
    /// Leaves a notification; a long text is cut, and the oldest one makes room where there are too many.
    pub(crate) async fn notify(&self, subject: Subject, kind: String, mut text: String) -> Result<()> {
        if text.len() > limits::NOTIFICATION_BYTES_MAX {
            text.truncate(text.floor_char_boundary(limits::NOTIFICATION_BYTES_MAX));
            text.push_str(" … (cut)");
        }
        let sequence = self
            .committer
            .change(move |txn, _| {
                let (sequence, topic) = subject.find(txn)?;
                let mut kept = Vec::new();
                let all = keys::notifications_of(sequence, topic);
                txn.scan(Family::Notifications, &all, &all, &mut |key, _| {
                    kept.push(key.to_vec());
                    Ok(true)
                })?;
                let over = (kept.len() + 1).saturating_sub(limits::NOTIFICATIONS_MAX);
                for oldest in kept.into_iter().take(over) {
                    txn.delete(Family::Notifications, oldest);
                }
                let created_at_ns = now_ns();
                // In the order they came, also within one tick of the clock.
                let mut no = u64::try_from(created_at_ns).unwrap_or(0);
                while txn.get(Family::Notifications, &keys::notification(sequence, topic, no))?.is_some() {
                    no += 1;
                }
                let record = NotificationRecord { kind, text, created_at_ns };
                txn.put(Family::Notifications, keys::notification(sequence, topic, no), &record)?;
                Ok::<_, LifecycleError>(txn.sequence(sequence)?)
            })
            .await?;
        self.note_in_manifest(sequence).await
    }

    /// The notifications of one thing, oldest first.
    pub(crate) fn notifications(&self, subject: &Subject) -> Result<Vec<NotificationRecord>> {
        let (sequence, topic) = subject.find(&self.catalog)?;
        Ok(self.catalog.notifications(sequence, topic)?)
    }

    /// Removes the notifications of one thing; there may be none.
    pub(crate) async fn purge_notifications(&self, subject: Subject) -> Result<()> {
        let sequence = self
            .committer
            .change(move |txn, _| {
                let (sequence, topic) = subject.find(txn)?;
                txn.delete_prefix(Family::Notifications, keys::notifications_of(sequence, topic));
                Ok::<_, LifecycleError>(txn.sequence(sequence)?)
            })
            .await?;
        self.note_in_manifest(sequence).await
    }

    /// A finalized recording's notifications are in its manifest as well.
    async fn note_in_manifest(&self, sequence: Option<SequenceRecord>) -> Result<()> {
        match sequence {
            Some(sequence) if is_locked(&self.catalog.sessions_of(sequence.id)?) => self.settle(sequence).await,
            _ => Ok(()),
        }
    }

    /// v0: all layers, name and description.
    pub(crate) fn layers(&self) -> Result<Vec<(String, String)>> {
        let mut layers = vec![(DEFAULT_LAYER.to_owned(), "Default layer".to_owned())];
        for layer in self.catalog.records::<(String, String)>(Family::Meta, &keys::layer(""))? {
            match layers.iter_mut().find(|known| known.0 == layer.0) {
                Some(known) => known.1 = layer.1,
                None => layers.push(layer),
            }
        }
        Ok(layers)
    }

    /// v0: makes a layer, or with `from` renames and describes one anew.
    pub(crate) async fn put_layer(&self, from: Option<String>, name: String, description: String) -> Result<()> {
        if name.is_empty() || name.len() > limits::NAME_PART_BYTES_MAX {
            let why = format!("must have 1 to {} bytes", limits::NAME_PART_BYTES_MAX);
            return Err(LifecycleError::Invalid { key: "name", value: shorten(&name), why });
        }
        check_description(&description)?;
        self.committer
            .change(move |txn, _| {
                let exists = |name: &str| -> Result<bool> {
                    Ok(name == DEFAULT_LAYER || txn.get(Family::Meta, &keys::layer(name))?.is_some())
                };
                if from.as_ref() != Some(&name) && exists(&name)? {
                    return Err(LifecycleError::AlreadyExists { what: "layer", name });
                }
                if let Some(from) = from {
                    if !exists(&from)? {
                        return Err(LifecycleError::NotFound { what: "layer", name: from });
                    }
                    if from == DEFAULT_LAYER && name != DEFAULT_LAYER {
                        let why = "exists from the start and keeps its name".to_owned();
                        return Err(LifecycleError::Invalid { key: "prev_name", value: from, why });
                    }
                    txn.delete(Family::Meta, keys::layer(&from));
                } else if txn.records::<(String, String)>(Family::Meta, &keys::layer(""))?.len() >= limits::LAYERS_MAX {
                    let remedy = "delete one first";
                    return Err(LifecycleError::Full { what: "layers", most: limits::LAYERS_MAX, remedy });
                }
                Ok(txn.put(Family::Meta, keys::layer(&name), &(name.clone(), description))?)
            })
            .await
    }

    /// v0: removes a layer.
    pub(crate) async fn delete_layer(&self, name: String) -> Result<()> {
        self.committer
            .change(move |txn, _| {
                if name == DEFAULT_LAYER {
                    let why = "exists from the start and cannot be deleted".to_owned();
                    return Err(LifecycleError::Invalid { key: "name", value: name, why });
                }
                if txn.get(Family::Meta, &keys::layer(&name))?.is_none() {
                    return Err(LifecycleError::NotFound { what: "layer", name });
                }
                txn.delete(Family::Meta, keys::layer(&name));
                Ok(())
            })
            .await
    }
}
