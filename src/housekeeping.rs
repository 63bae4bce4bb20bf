//! What happens by itself while the recorder runs: room on the disk, the mark of how far the catalog
//! reaches, tails of topics that nobody writes any more, the scrub.
//!
//! Guarantees: a full disk is noticed within [`LOOK_INTERVAL`], or at once when a write meets it, and the
//! reserve is free from then on, so that what was taken can be sealed, finalized and aborted; space that
//! comes back opens the door again without a restart. Delays nothing: all of it is background work.

use crate::config::Config;
use crate::flight::service::Shared;
use crate::folder::{self, RESERVE};
use crate::health::{Health, Room, Space, space};
use crate::systemd;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::catalog::Look;
use storage::catalog::records::TopicRecord;
use storage::files;
use storage::ids::TopicNo;
use storage::volumes::{Role, Volume, Volumes};

/// How often the disk is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is noted how far the catalog reaches.
const MARK_INTERVAL: Duration = Duration::from_secs(5);
/// How often topics without a stream are looked for, at most.
const IDLE_INTERVAL: Duration = Duration::from_secs(60);

/// Runs until the server stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.clone();
    let scrub = tokio::spawn(crate::scrub::run(Arc::clone(&shared)));
    let mut marked = (Instant::now(), 0);
    let idle_interval = IDLE_INTERVAL.min(shared.config.idle_topic / 4).max(LOOK_INTERVAL);
    let mut idle_look = Instant::now();
    let mut idle = HashMap::new();
    loop {
        // Cancel-safety: all of these only wait.
        tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => break,
            () = shared.health.full.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        let for_look = Arc::clone(&shared);
        let look = move || look_at_space(&for_look.config, &for_look.volumes, &for_look.health);
        if tokio::task::spawn_blocking(look).await.is_err() {
            tracing::error!("looking at the disk panicked");
        }
        if marked.0.elapsed() >= MARK_INTERVAL {
            marked = (Instant::now(), mark(&shared, marked.1).await);
        }
        if idle_look.elapsed() >= idle_interval {
            idle_look = Instant::now();
            close_idle_tails(&shared, &mut idle).await;
        }
    }
    scrub.abort();
}

// --- room on the disk ---

/// Looks at the free space of all volumes, acts on what follows, and tells everyone.
pub(crate) fn look_at_space(config: &Config, volumes: &Volumes, health: &Health) {
    let mut found = Vec::new();
    for (index, volume) in volumes.all().iter().enumerate().filter(|(_, volume)| volume.role != Role::Away) {
        match files::free_space(&volume.root) {
            Ok((free, _)) => found.push((index, volume, free)),
            Err(error) => tracing::warn!(volume = %volume.root.display(), %error, "free space is unknown"),
        }
    }
    for (index, volume, free) in found {
        let refused = health.rooms.get(index).is_some_and(Room::take_refused);
        look_at_volume(config.reserve_bytes, volume, health, (index, free, refused));
    }
    health.tell_space();
}

fn look_at_volume(reserve_bytes: u64, volume: &Volume, health: &Health, (index, free, refused): (usize, u64, bool)) {
    let reserve_path = volume.root.join(RESERVE);
    let before = health.rooms.get(index).map_or(Space::Enough, Room::own);
    let held = std::fs::metadata(&reserve_path).map_or(0, |metadata| metadata.len());
    // Without the reserve the room it will take is not free.
    let beside = if held == 0 && before != Space::Full { free.saturating_sub(reserve_bytes) } else { free };
    let now = if refused { Space::Full } else { space(before, beside, reserve_bytes) };
    let kept = match now {
        Space::Full => files::remove_file(&reserve_path),
        Space::Enough | Space::Low if held != reserve_bytes => reserve(&reserve_path, reserve_bytes),
        Space::Enough | Space::Low => Ok(()),
    };
    if let Err(error) = kept {
        tracing::warn!(path = %reserve_path.display(), %error, "the reserve could not be changed");
    }
    volume.set_short(now != Space::Enough);
    if now != before {
        tell(&volume.root, now, free, reserve_bytes);
    }
    health.saw(index, now, free);
}

/// Takes blocks that nobody else then has.
fn reserve(path: &Path, bytes: u64) -> io::Result<()> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    // Growing by length alone would be a hollow reserve if the power failed before the next line.
    if bytes < file.metadata()?.len() {
        file.set_len(bytes)?;
    }
    if bytes > 0 {
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            // A file system without it has no reserve.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => {
                files::remove_file(path)?;
                return Err(error.into());
            }
        }
    }
    file.sync_all()
}

fn tell(volume: &Path, now: Space, free: u64, reserve: u64) {
    let volume = volume.display();
    let (free_mib, reserve_mib) = (free >> 20, reserve >> 20);
    match now {
        Space::Enough => {
            tracing::info!(%volume, free_mib, "there is room again");
            systemd::status("recording");
        }
        Space::Low => {
            tracing::warn!(%volume, free_mib, reserve_mib, "the disk is nearly full: delete or move recordings");
            systemd::status(&format!("the disk of {volume} is nearly full: {free_mib} MiB free"));
        }
        Space::Full => {
            tracing::error!(
                %volume,
                free_mib,
                "the disk is full: uploads end with what is durable, new ones are refused until there is room"
            );
            systemd::status(&format!("the disk of {volume} is full: uploads to it are refused"));
        }
    }
}

// --- how far the catalog reaches ---

/// Notes it if it moved; returns what was noted.
async fn mark(shared: &Arc<Shared>, before: u64) -> u64 {
    let shared = Arc::clone(shared);
    let marked = tokio::task::spawn_blocking(move || {
        let catalog = &shared.lifecycle.catalog;
        // While commits fail the number may be one that is not durable.
        if shared.health.catalog_failure().is_some() {
            return Ok(before);
        }
        let now = catalog.sequence_number()?;
        if now != before {
            folder::mark_synced(&shared.config.data_dir, catalog)?;
        }
        Ok::<_, storage::StorageError>(now)
    });
    match marked.await {
        Ok(Ok(now)) => now,
        Ok(Err(error)) => {
            tracing::debug!(%error, "how far the catalog reaches was not noted");
            before
        }
        Err(_) => before,
    }
}

// --- topics that nobody writes any more ---

/// Closes the tails of topics that had no stream for long enough. `idle`: since when each was seen so.
async fn close_idle_tails(shared: &Arc<Shared>, idle: &mut HashMap<TopicNo, Instant>) {
    let lifecycle = shared.lifecycle.clone();
    let found = tokio::task::spawn_blocking(move || topics_with_tails(&lifecycle.catalog)).await;
    let topics = match found {
        Ok(Ok(topics)) => topics,
        Ok(Err(error)) => {
            tracing::debug!(%error, "topics without a stream were not looked for");
            return;
        }
        Err(_) => return,
    };
    idle.retain(|no, _| topics.iter().any(|topic| topic.no == *no));
    for topic in topics {
        let status = shared.lifecycle.topic_status(topic.locator.clone()).await;
        if status.is_ok_and(|(_, _, uploading)| uploading) {
            idle.remove(&topic.no);
            continue;
        }
        let since = *idle.entry(topic.no).or_insert_with(Instant::now);
        if since.elapsed() >= shared.config.idle_topic {
            idle.remove(&topic.no);
            let locator = topic.locator.clone();
            match shared.lifecycle.close_tail(topic).await {
                Ok(()) => tracing::info!(topic = locator, "no stream for long: its tail lies in its files now"),
                // A client may have come back in this moment.
                Err(error) => tracing::info!(topic = locator, %error, "its tail stays where it is"),
            }
        }
    }
}

fn topics_with_tails(look: &impl Look) -> Result<Vec<TopicRecord>, storage::StorageError> {
    let mut found = Vec::new();
    for sequence in look.unsettled()? {
        for topic in look.topics_of(sequence.id)? {
            let totals = look.totals(topic.no)?;
            if topic.completed_at_ns.is_none() && totals.chunk_batches < totals.batches {
                found.push(topic);
            }
        }
    }
    Ok(found)
}
