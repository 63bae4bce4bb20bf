//! A segment file that takes chunks: made with its head, reserved in steps, given back when it is left.

use super::prealloc::{PreallocBudget, ahead_step, expected_bytes, prealloc_step};
use crate::disk::{Disk, IoCounters};
use crate::error::Result;
use crate::ids::SegmentId;
use crate::recover::create_segment;
use crate::segment::{self, Head, TopicFacts};
use crate::volumes::Volumes;
use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// A segment that may take another chunk.
#[derive(Debug)]
pub(super) struct SegmentFile<F> {
    pub(super) file: F,
    pub(super) path: PathBuf,
    pub(super) no: u32,
    pub(super) id: SegmentId,
    /// Where its head ends.
    pub(super) first_chunk: u64,
    /// Where the next chunk goes.
    pub(super) write_at: u64,
    /// Where what is reserved ends.
    allocated: u64,
    /// Its last chunk: weight before encoding, and bytes in the file.
    last: Option<(u64, u64)>,
    /// Set once a write failed: nothing goes here any more.
    pub(super) poisoned: Rc<Cell<bool>>,
    prealloc: Arc<PreallocBudget>,
}

impl<F> Drop for SegmentFile<F> {
    fn drop(&mut self) {
        self.prealloc.give_back(self.allocated.saturating_sub(self.write_at));
    }
}

/// What a segment file is made of.
pub(super) struct Plan {
    pub(super) volumes: Arc<Volumes>,
    /// Root of the volume that the topic's folder goes to.
    pub(super) home: PathBuf,
    /// Folder of the topic.
    pub(super) dir: PathBuf,
    pub(super) no: u32,
    pub(super) facts: Arc<TopicFacts>,
    pub(super) counters: Arc<IoCounters>,
    pub(super) prealloc: Arc<PreallocBudget>,
}

impl Plan {
    /// Makes the file; on return its name and its folders are durable. Its head is with its first chunk.
    ///
    /// # Errors
    /// When it cannot be made, or is there already.
    pub(super) async fn make<D: Disk>(self, disk: &D) -> Result<SegmentFile<D::File>> {
        let Self { volumes, home, dir, no, facts, counters, prealloc } = self;
        let path = dir.join(segment::file_name(no));
        let head = Head { segment: no, segment_id: SegmentId::random(), epoch: 0, facts: (*facts).clone() };
        let place = (volumes.data_dir(), home.as_path(), dir.as_path());
        let (file, first_chunk) = create_segment(disk, &volumes.folders, place, &path, &head, &counters).await?;
        Ok(SegmentFile {
            file,
            path,
            no,
            id: head.segment_id,
            first_chunk,
            write_at: first_chunk,
            allocated: first_chunk,
            last: None,
            poisoned: Rc::default(),
            prealloc,
        })
    }
}

impl<F: Clone> SegmentFile<F> {
    /// Whether a chunk of this weight goes elsewhere.
    pub(super) fn is_closed_to(&self, data_bytes: u64, segment_bytes: u64) -> bool {
        let full = self.first_chunk < self.write_at && segment_bytes < self.write_at + data_bytes;
        self.poisoned.get() || full
    }

    /// Reserves room for a chunk, if it is worth it.
    pub(super) async fn reserve<D: Disk<File = F>>(&mut self, disk: &D, data_bytes: u64, segment_bytes: u64) {
        let left = self.prealloc.left();
        let chunk = expected_bytes(data_bytes, self.last);
        if let Some(step) = prealloc_step(self.allocated, self.write_at, chunk, segment_bytes, left) {
            self.allocate(disk, step).await;
        }
    }

    /// Reserves room before a chunk comes.
    pub(super) async fn reserve_ahead<D: Disk<File = F>>(&mut self, disk: &D, segment_bytes: u64) {
        let step = ahead_step(segment_bytes, self.prealloc.left());
        if step > 0 {
            self.allocate(disk, step).await;
        }
    }

    async fn allocate<D: Disk<File = F>>(&mut self, disk: &D, step: u64) {
        // A refusal (a file system without it, a full disk) is no failure: the write itself will tell.
        if disk.allocate(&self.file, self.allocated, step).await.is_ok() {
            // What lies behind the last chunk only: one that found no room was written beyond what was reserved.
            let unused = |allocated: u64| allocated.saturating_sub(self.write_at);
            self.prealloc.take(unused(self.allocated + step) - unused(self.allocated));
            self.allocated += step;
        }
    }

    /// Notes a chunk of this weight and padded length.
    pub(super) fn advance(&mut self, data_bytes: u64, padded: u64) {
        self.last = Some((data_bytes, padded));
        self.prealloc.give_back(padded.min(self.allocated.saturating_sub(self.write_at)));
        self.write_at += padded;
    }
}
