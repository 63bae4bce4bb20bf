//! Times of matching rows to intervals, clusters, and where those of several topics coincide. Pure.

use crate::limits;

/// First and last time, both inclusive, in nanoseconds.
pub(crate) type Interval = (i64, i64);

/// Takes rows in time order and makes something of the times that match.
pub(crate) trait Builder {
    /// A row.
    fn row(&mut self, time: i64, matches: bool);
    /// Rows that all match, of which only the first and last time are known. `false`: this builder needs
    /// every time.
    fn block(&mut self, first: i64, last: i64) -> bool;
}

/// Runs of rows that match with none between them that does not.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    done: Vec<Interval>,
    open: Option<Interval>,
    /// First and last of all, also of those that are not kept.
    range: Range,
}

impl Builder for Runs {
    fn row(&mut self, time: i64, matches: bool) {
        self.range.row(time, matches);
        match (matches, self.open) {
            (true, Some((first, _))) => self.open = Some((first, time)),
            (true, None) => self.open = Some((time, time)),
            (false, Some(_)) if self.done.len() > limits::QUERY_INTERVALS_MAX => self.open = None,
            (false, _) => self.done.extend(self.open.take()),
        }
    }

    fn block(&mut self, first: i64, last: i64) -> bool {
        self.row(first, true);
        self.row(last, true);
        true
    }
}

impl Runs {
    /// First and last time of all.
    pub(crate) fn range(&self) -> Option<Interval> {
        self.range.0
    }

    /// All runs, in time order; at most two more than one answer holds.
    pub(crate) fn finish(mut self) -> Vec<Interval> {
        self.done.extend(self.open);
        self.done
    }
}

/// Matching rows with gaps of at most `dt` between them; 0 makes one cluster of all.
#[derive(Debug)]
pub(crate) struct Clusters {
    dt: u64,
    done: Vec<Interval>,
}

impl Clusters {
    /// Clusters with these gaps.
    pub(crate) fn new(dt: u64) -> Self {
        Self { dt, done: Vec::new() }
    }

    /// Whether there were more than are kept.
    pub(crate) fn is_full(&self) -> bool {
        self.done.len() > limits::FILTER_WINDOWS_MAX
    }

    /// All clusters, in time order.
    pub(crate) fn finish(self) -> Vec<Interval> {
        self.done
    }
}

/// First and last time of the rows that match.
#[derive(Debug, Default)]
pub(crate) struct Range(pub(crate) Option<Interval>);

impl Builder for Range {
    fn row(&mut self, time: i64, matches: bool) {
        if matches {
            self.0 = Some(self.0.map_or((time, time), |(first, _)| (first, time)));
        }
    }

    fn block(&mut self, first: i64, last: i64) -> bool {
        self.row(first, true);
        self.row(last, true);
        true
    }
}

impl Builder for Clusters {
    fn row(&mut self, time: i64, matches: bool) {
        if !matches {
            return;
        }
        let full = self.is_full();
        match self.done.last_mut() {
            Some((_, last)) if self.dt == 0 || time.abs_diff(*last) <= self.dt => *last = time,
            _ if full => {}
            _ => self.done.push((time, time)),
        }
    }

    fn block(&mut self, first: i64, last: i64) -> bool {
        if self.dt == 0 {
            self.row(first, true);
            self.row(last, true);
        }
        self.dt == 0
    }
}

/// Where clusters of all topics coincide, at most `dt` apart (protocol.md section 2.9): the overlap, or
/// the middle of the gap widened to `dt`.
pub(crate) fn intersect(topics: &[Vec<Interval>], dt: u64) -> Vec<Interval> {
    let mut next = vec![0; topics.len()];
    let mut windows = Vec::new();
    loop {
        let current: Option<Vec<Interval>> =
            topics.iter().zip(&next).map(|(clusters, at)| clusters.get(*at).copied()).collect();
        let Some(current) = current.filter(|current| !current.is_empty()) else {
            return windows;
        };
        let start = current.iter().map(|cluster| cluster.0).max().unwrap_or(0);
        let (first_to_end, end) =
            current.iter().map(|cluster| cluster.1).enumerate().min_by_key(|(_, end)| *end).unwrap_or((0, 0));
        if start <= end {
            windows.push((start, end));
        } else if start.abs_diff(end) <= dt {
            let before = i64::try_from(dt / 2).unwrap_or(i64::MAX);
            let after = i64::try_from(dt.div_ceil(2)).unwrap_or(i64::MAX);
            windows.push((start.saturating_sub(before), end.saturating_add(after)));
        }
        next[first_to_end] += 1;
    }
}

/// The intervals of several topics of one kind, as one: overlapping ones are joined.
pub(crate) fn union(mut all: Vec<Interval>) -> Vec<Interval> {
    all.sort_unstable();
    let mut joined: Vec<Interval> = Vec::new();
    for (first, last) in all {
        match joined.last_mut() {
            Some((_, end)) if first <= *end => *end = (*end).max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_does_not_match_ends_a_run() {
        let mut runs = Runs::default();
        for (time, matches) in [(1, true), (2, true), (3, false), (4, true)] {
            runs.row(time, matches);
        }
        assert!(runs.block(5, 9));
        runs.row(10, false);
        assert_eq!(runs.finish(), [(1, 2), (4, 9)]);
    }

    #[test]
    fn a_gap_greater_than_dt_starts_a_cluster_and_an_equal_one_does_not() {
        let mut clusters = Clusters::new(10);
        for time in [0, 10, 21, 21] {
            clusters.row(time, true);
        }
        clusters.row(25, false);
        assert!(!clusters.block(30, 40));
        assert_eq!(clusters.finish(), [(0, 10), (21, 21)]);
        let mut one = Clusters::new(0);
        one.row(0, true);
        assert!(one.block(100, 900));
        assert_eq!(one.finish(), [(0, 900)]);
    }

    #[test]
    fn clusters_coincide_by_overlap_or_in_the_middle_of_a_small_gap() {
        assert_eq!(intersect(&[vec![(100, 140)], vec![(155, 200)]], 20), [(145, 150)]);
        assert_eq!(intersect(&[vec![(100, 140)], vec![(155, 200)]], 10), []);
        assert_eq!(intersect(&[vec![(0, 10), (20, 30)], vec![(5, 25)]], 0), [(5, 10), (20, 25)]);
        assert_eq!(intersect(&[vec![(0, 10)], vec![]], 0), []);
    }

    #[test]
    fn overlapping_intervals_are_joined() {
        assert_eq!(union(vec![(5, 9), (0, 6), (20, 30)]), [(0, 9), (20, 30)]);
    }
}
