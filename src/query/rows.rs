//! The rows of one topic that a question leaves open: which match, and when they were.
//!
//! Guarantees: read are only chunks that the index leaves open, and of them only the columns that decide and the time.
//! Rows go to whoever wants their times in order of time, though they arrived in another.

use crate::limits;
use crate::query::answer::Cost;
use crate::query::engine::OP;
use crate::query::plan::{Bound, Verdict};
use crate::query::refine;
use crate::query::times::{Builder, Interval};
use crate::query::{QueryError, Result};
use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use std::sync::Arc;
use storage::StorageError;
use storage::ontology::Ontology;
use storage::read::{Loader, Place, TopicView, Window};
use storage::schema::{TIME_COLUMN, parquet_leaves};
use storage::turn::Turn;

/// The rows of one topic and what is asked of them.
pub(super) struct Rows {
    pub(super) view: Arc<TopicView>,
    verdicts: Vec<Verdict>,
    bound: Arc<(Bound, Arc<Ontology>)>,
    /// Parquet leaves that decide, and the one with the time.
    columns: Vec<usize>,
    time: Vec<usize>,
    turn: Turn,
}

impl Rows {
    pub(super) fn new(
        view: Arc<TopicView>,
        verdicts: Vec<Verdict>,
        bound: Arc<(Bound, Arc<Ontology>)>,
        turn: Turn,
    ) -> Self {
        let time = parquet_leaves(&view.schema.stored, TIME_COLUMN, None);
        let columns = bound.0.columns_to_read(&bound.1);
        Self { view, verdicts, bound, columns, time, turn }
    }

    fn verdict(&self, place: Place) -> Verdict {
        match place {
            // A chunk that was made of the tail meanwhile has no verdict yet.
            Place::Chunk(index) => self.verdicts.get(index).copied().unwrap_or(Verdict::Some),
            Place::Tail(_) => Verdict::Some,
        }
    }

    /// Whether a row matches.
    pub(super) async fn any(&self, loader: &Loader, cost: &Cost) -> Result<bool> {
        for place in self.view.places().into_iter().filter(|place| self.verdict(*place) != Verdict::None) {
            if self.load(loader, place, cost).await?.1.contains(&true) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Times of a place's rows in arrival order, and which match.
    async fn load(&self, loader: &Loader, place: Place, cost: &Cost) -> Result<(Vec<i64>, Vec<bool>)> {
        let verdict = self.verdict(place);
        let mut leaves = self.time.clone();
        if verdict == Verdict::Some {
            leaves.extend(&self.columns);
        }
        leaves.sort_unstable();
        leaves.dedup();
        let (batch, bytes) = loader.load_leaves(&self.view, place, &leaves).await?;
        if matches!(place, Place::Chunk(_)) {
            Cost::add(&cost.read, 1);
            Cost::add(&cost.bytes_read, bytes);
        }
        let bound = Arc::clone(&self.bound);
        let matching = move || {
            let times = batch.column_by_name(TIME_COLUMN).and_then(|column| column.as_primitive_opt::<Int64Type>());
            let times = times.ok_or(StorageError::Gone)?.values().to_vec();
            let matches = match verdict {
                Verdict::All => vec![true; times.len()],
                Verdict::None => vec![false; times.len()],
                Verdict::Some => refine::matching(&bound.0, &batch)?.iter().collect(),
            };
            Ok((times, matches))
        };
        self.turn.aside(OP, matching).await
    }

    /// Feeds the rows of a window to a builder in time order.
    pub(super) async fn walk(
        &self,
        loader: &Loader,
        window: Window,
        builder: &mut (impl Builder + Send),
        cost: &Cost,
    ) -> Result<()> {
        for group in self.view.time_groups() {
            let times: Vec<Interval> = group.iter().filter_map(|place| self.view.time_of(*place)).collect();
            let (Some(first), Some(last)) =
                (times.iter().map(|time| time.0).min(), times.iter().map(|time| time.1).max())
            else {
                continue;
            };
            if !window.meets((first, last)) {
                continue;
            }
            let all = |wanted: Verdict| group.iter().all(|place| self.verdict(*place) == wanted);
            if all(Verdict::None) {
                // Rows outside of the window do not count, not even as gaps.
                if window.covers((first, last)) {
                    builder.row(first, false);
                    continue;
                }
            } else if all(Verdict::All) && window.covers((first, last)) && builder.block(first, last) {
                continue;
            }
            let mut rows: Vec<(i64, bool)> = Vec::new();
            for place in group {
                let (times, matches) = self.load(loader, place, cost).await?;
                rows.extend(times.into_iter().zip(matches).filter(|(time, _)| window.holds(*time)));
                if rows.len() > limits::QUERY_MERGE_ROWS_MAX {
                    let remedy = "its rows arrived in no order of time; ask without times, or in a narrower window";
                    return Err(QueryError::TooMuch {
                        what: "rows to be put in order of time",
                        most: limits::QUERY_MERGE_ROWS_MAX,
                        remedy,
                    });
                }
            }
            if !rows.is_sorted_by_key(|row| row.0) {
                rows.sort_by_key(|row| row.0);
            }
            for (time, matches) in rows {
                builder.row(time, matches);
            }
        }
        Ok(())
    }
}
