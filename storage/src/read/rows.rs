//! A topic's rows in time order, batch by batch.
//!
//! Guarantees: a stream that is not read keeps positions, not data; a batch holds rows of a few sources at most.

use super::loader::Loader;
use super::view::{Source, TopicView, Window, groups};
use crate::chunk::Rows;
use crate::error::{Result, StorageError};
use crate::limits;
use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use std::collections::VecDeque;
use std::sync::Arc;

/// A position in a topic's rows, in time order.
#[derive(Debug)]
pub struct RowStream {
    view: Arc<TopicView>,
    loader: Loader,
    window: Window,
    groups: VecDeque<Vec<Source>>,
    /// Order of the rows of the first group, once it was looked at: (source, row).
    order: Option<VecDeque<(u32, u32)>>,
    target_bytes: u64,
}

impl RowStream {
    /// Rows of a window, in batches of about `target_bytes` (one row may exceed it).
    pub fn new(view: Arc<TopicView>, loader: Loader, window: Window, target_bytes: u64) -> Self {
        let groups = groups(view.sources(), window);
        Self { view, loader, window, groups, order: None, target_bytes }
    }

    /// The next rows, in the stored schema, never an empty batch. `None` at the end.
    ///
    /// # Errors
    /// When a file cannot be read or its bytes are damaged.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            let Some(group) = self.groups.front().cloned() else {
                return Ok(None);
            };
            let mut order = match self.order.take() {
                Some(order) => order,
                None => self.order_of(&group).await?,
            };
            if order.is_empty() {
                self.groups.pop_front();
                continue;
            }
            let (rows, data_bytes) =
                group.iter().fold((0, 0), |sum, source| (sum.0 + source.rows, sum.1 + source.data_bytes));
            let row_bytes = (data_bytes / rows.max(1)).max(1);
            let take = usize::try_from((self.target_bytes / row_bytes).max(1)).unwrap_or(usize::MAX).min(order.len());
            let take = few_sources(order.iter().take(take));
            let picked: Vec<(u32, u32)> = order.drain(..take).collect();
            // Cancel-safety: a stream that is dropped here is not asked again.
            let batch = self.pick(&group, &picked).await?;
            self.order = Some(order);
            return Ok(Some(batch));
        }
    }

    async fn order_of(&self, group: &[Source]) -> Result<VecDeque<(u32, u32)>> {
        let _turn = self.loader.holding.acquire().await.map_err(|_| StorageError::Gone)?;
        let mut keyed: Vec<(i64, u32, u32)> = Vec::new();
        let mut sorted = group.len() == 1;
        for (index, source) in (0_u32..).zip(group) {
            let rows = self.loader.load(&self.view, source.place).await?;
            let times = rows.column(self.view.schema.time_column).as_primitive::<Int64Type>();
            sorted &= source.sorted;
            keyed.extend(
                (0_u32..)
                    .zip(times.values())
                    .filter(|(_, time)| self.window.holds(**time))
                    .map(|(row, time)| (*time, index, row)),
            );
        }
        if !sorted {
            keyed.sort_unstable();
        }
        Ok(keyed.into_iter().map(|(_, source, row)| (source, row)).collect())
    }

    async fn pick(&self, group: &[Source], picked: &[(u32, u32)]) -> Result<RecordBatch> {
        let _turn = self.loader.holding.acquire().await.map_err(|_| StorageError::Gone)?;
        let mut used: Vec<u32> = picked.iter().map(|(source, _)| *source).collect();
        used.sort_unstable();
        used.dedup();
        let mut chunks = Vec::with_capacity(used.len());
        for index in &used {
            match group.get(*index as usize) {
                Some(source) => chunks.push(self.loader.load(&self.view, source.place).await?),
                None => return Err(StorageError::Gone),
            }
        }
        if let ([chunk], Some(first)) = (chunks.as_slice(), contiguous(picked)) {
            return chunk.slice(first, picked.len());
        }
        let indices: Vec<(usize, usize)> =
            picked.iter().map(|(source, row)| (used.binary_search(source).unwrap_or(0), *row as usize)).collect();
        Rows::interleave(&chunks, &indices)
    }
}

/// How many rows to take so that they come from at most [`limits::SOURCES_PER_BATCH_MAX`] sources:
/// times that jump over a whole topic must not bring all of it into memory at once.
fn few_sources<'a>(rows: impl Iterator<Item = &'a (u32, u32)>) -> usize {
    let mut seen: Vec<u32> = Vec::with_capacity(limits::SOURCES_PER_BATCH_MAX);
    rows.take_while(|(source, _)| {
        if seen.contains(source) {
            return true;
        }
        seen.push(*source);
        seen.len() <= limits::SOURCES_PER_BATCH_MAX
    })
    .count()
}

/// The first row, if the picked rows of one source follow one another.
fn contiguous(picked: &[(u32, u32)]) -> Option<usize> {
    let (_, first) = picked.first()?;
    let follow = (*first..).zip(picked).all(|(expected, (_, row))| expected == *row);
    follow.then_some(*first as usize)
}

/// Counts rows of a window without reading what lies wholly inside or outside of it.
///
/// # Errors
/// When a chunk at the window's edge cannot be read.
pub async fn count(view: &Arc<TopicView>, loader: &Loader, window: Window) -> Result<(u64, Option<(i64, i64)>)> {
    let mut rows = 0;
    let mut interval: Option<(i64, i64)> = None;
    let mut widen = |first: i64, last: i64| {
        interval = Some(interval.map_or((first, last), |(a, b)| (a.min(first), b.max(last))));
    };
    for source in view.sources().filter(|source| window.meets(source.time)) {
        if window.covers(source.time) {
            rows += source.rows;
            widen(source.time.0, source.time.1);
            continue;
        }
        let all = loader.load(view, source.place).await?;
        let times = all.column(view.schema.time_column).as_primitive::<Int64Type>();
        for time in times.values().iter().filter(|time| window.holds(**time)) {
            rows += 1;
            widen(*time, *time);
        }
    }
    Ok((rows, interval))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_7_rows_that_jump_over_many_chunks_are_taken_a_few_chunks_at_a_time() {
        let jumping: Vec<(u32, u32)> = (0..100).map(|row| (row, 0)).collect();
        assert_eq!(few_sources(jumping.iter()), limits::SOURCES_PER_BATCH_MAX);
        let staying: Vec<(u32, u32)> = (0..100).map(|row| (row % 2, row)).collect();
        assert_eq!(few_sources(staying.iter()), 100);
    }
}
