//! The pass at start (design.md section 6): what a crash left open comes to rest, and is told.
//!
//! Guarantees: a second pass finds nothing to do (INV-5); one file that cannot be handled is reported and
//! left for the next start, it never keeps the appliance from starting (INV-9); only sequences that are not
//! settled are looked at, so the time does not grow with what is stored.

use crate::config::Config;
use crate::folder::{FORMAT_VERSION, write_format};
use crate::ingest::committer::CommitHandle;
use crate::ingest::steward::{StewardHandle, is_locked};
use crate::lifecycle::LifecycleError;
use crate::ontology::Registry;
use crate::when::now_ns;
use std::sync::Arc;
use std::time::Instant;
use storage::StorageError;
use storage::catalog::keys::{self, Family};
use storage::catalog::records::TopicOntology;
use storage::catalog::skip::unfolded_topics;
use storage::catalog::{Catalog, Look};
use storage::ontology::Origin;
use storage::recover::{Receipt, TopicReceipt};

/// Brings everything to rest. `told`: what happened to the catalog before.
///
/// # Errors
/// When the catalog cannot be read or takes no commit.
pub(crate) async fn recover_all(
    config: &Config,
    catalog: &Catalog,
    committer: &CommitHandle,
    steward: &StewardHandle,
    told: Receipt,
) -> Result<Receipt, StorageError> {
    let started = Instant::now();
    let mut receipt = Receipt { at_ns: now_ns(), ..told };
    for deletion in catalog.deletions()? {
        match steward.remove(deletion.ticket, deletion.folders).await {
            Ok(()) => receipt.deletions_finished += 1,
            Err(error) => tracing::warn!(%error, "a deletion could not be finished"),
        }
    }
    let unsettled = catalog.unsettled()?;
    match steward.orphans(unsettled.clone()).await {
        Ok(removed) => receipt.orphans_removed = removed,
        // The daemon makes it again, with what was found.
        Err(error) if error.is_corruption() && receipt.rebuilt.is_none() => return Err(error),
        Err(error) => tracing::warn!(%error, "files that no record owns could not be looked for"),
    }
    for sequence in unsettled {
        for topic in catalog.topics_of(sequence.id)? {
            let locator = topic.locator.clone();
            match steward.recover(topic).await {
                Ok(topic) if is_worth_telling(&topic) => {
                    log_topic(&topic);
                    receipt.topics.push(topic);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(topic = locator, %error, "left as it is; the next start tries again");
                    receipt.topics.push(TopicReceipt {
                        locator,
                        unsealed: Some(error.to_string()),
                        ..TopicReceipt::default()
                    });
                }
            }
        }
        let name = sequence.name.clone();
        if is_locked(&catalog.sessions_of(sequence.id)?)
            && let Err(error) = steward.settle(sequence).await
        {
            tracing::warn!(sequence = name, %error, "manifest or links not made");
        }
    }
    for topic in unfolded_topics(catalog)? {
        if let Err(error) = steward.fold(topic).await {
            tracing::warn!(%topic, %error, "index not packed; queries read it as it is");
        }
    }
    receipt.took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    if !receipt.is_empty() {
        keep(committer, &receipt).await?;
    }
    let stale = config.data_dir.join("format-version.new");
    storage::files::remove_file(&stale).map_err(|error| StorageError::io("remove", stale, error))?;
    Ok(receipt)
}

/// A topic that was at rest is not told of.
fn is_worth_telling(topic: &TopicReceipt) -> bool {
    let changed = topic.adopted_chunks > 0 || topic.discarded_bytes > 0 || topic.sealed || topic.unsealed.is_some();
    changed || topic.damaged_chunks > 0 || (!topic.locked && topic.batches > 0)
}

fn log_topic(topic: &TopicReceipt) {
    tracing::info!(
        topic = %topic.locator,
        locked = topic.locked,
        rows = topic.rows,
        batches = topic.batches,
        adopted_rows = topic.adopted_rows,
        discarded_bytes = topic.discarded_bytes,
        damaged_chunks = topic.damaged_chunks,
        unsealed = topic.unsealed.as_deref(),
        "{}",
        if topic.locked { "brought to rest" } else { "interrupted topic: its durable prefix is kept" }
    );
}

async fn keep(committer: &CommitHandle, receipt: &Receipt) -> Result<(), StorageError> {
    let bytes = serde_json::to_vec(receipt)
        .map_err(|error| StorageError::Format { op: "recovery receipt", text: error.to_string() })?;
    committer
        .change(move |txn, _| {
            txn.put_bytes(Family::Meta, keys::RECEIPT.to_vec(), bytes);
            Ok(())
        })
        .await
}

/// The receipt of the last recovery that found something; `None` if none did.
///
/// # Errors
/// When the catalog cannot be read.
pub(crate) fn last_receipt(look: &impl Look) -> Result<Option<Receipt>, StorageError> {
    let bytes = look.get(Family::Meta, keys::RECEIPT)?;
    // Written by another version: of no use to this one.
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// Before recovery: format 2 did not note which sequences are settled, so the first start looks at all.
///
/// # Errors
/// When the catalog cannot be read or takes no commit.
pub(crate) async fn migrate_before(
    format: u32,
    catalog: &Catalog,
    committer: &CommitHandle,
) -> Result<(), StorageError> {
    if format >= 3 {
        return Ok(());
    }
    let catalog = catalog.clone();
    committer
        .change(move |txn, _| {
            for sequence in catalog.sequences()? {
                txn.unsettle(sequence.id)?;
            }
            Ok(())
        })
        .await
}

/// After recovery: what older formats lack, then the new format's number.
///
/// # Errors
/// When the catalog cannot be read or takes no commit, or the number cannot be written.
pub(crate) async fn migrate_after(
    format: u32,
    config: &Config,
    catalog: &Catalog,
    committer: &CommitHandle,
    registry: &Arc<Registry>,
) -> Result<(), Box<dyn std::error::Error>> {
    if format == FORMAT_VERSION {
        return Ok(());
    }
    if format < 2 {
        migrate_from_1(catalog, committer, registry).await?;
    }
    write_format(&config.data_dir)?;
    tracing::info!(
        from = format,
        to = FORMAT_VERSION,
        "data folder migrated{}",
        if format < 2 { "; `flightbox reindex` speeds up its queries" } else { "" }
    );
    Ok(())
}

/// Format 1 knew no ontologies: its topics get their version and their place under their tag, in one
/// synced step. Their chunks have no entry in the index, so queries read them until `flightbox reindex`.
async fn migrate_from_1(
    catalog: &Catalog,
    committer: &CommitHandle,
    registry: &Arc<Registry>,
) -> Result<(), LifecycleError> {
    let registry = Arc::clone(registry);
    let catalog = catalog.clone();
    committer
        .change(move |txn, _| {
            for sequence in catalog.sequences()? {
                for topic in catalog.topics_of(sequence.id)? {
                    txn.put_topic(&topic)?;
                    let Some(message) = catalog.topic_schema(topic.no)? else { continue };
                    let wire = storage::schema::from_ipc(&message)?;
                    let offered = Registry::offer(&topic.ontology_tag, &wire, Origin::FirstUse)?;
                    let (ontology, note) = registry.adopt(txn, offered)?;
                    let of_topic = TopicOntology { version: ontology.record.version, note };
                    txn.put(Family::Topics, keys::topic_ontology(topic.no), &of_topic)?;
                    txn.delete_prefix(Family::Skip, keys::of_topic(topic.no));
                }
            }
            Ok::<_, LifecycleError>(())
        })
        .await
}
