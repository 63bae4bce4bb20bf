//! Sets of values a comparison accepts, as ranges: the same set answers for a row and for a chunk.
//!
//! Guarantees (INV-6): [`Ranges::meets`] is true for every interval with an accepted value in it, and
//! [`Ranges::covers`] only for intervals all of whose values are accepted.

use std::ops::Bound;

/// What a comparison accepts of an ordered type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ranges<T> {
    ranges: Vec<(Bound<T>, Bound<T>)>,
    /// Whether NaN is accepted (floats only).
    pub(crate) nan: bool,
}

impl<T: PartialOrd + Clone> Ranges<T> {
    /// These ranges, in any order.
    pub(crate) fn new(ranges: Vec<(Bound<T>, Bound<T>)>) -> Self {
        Self { ranges, nan: false }
    }

    /// One closed range.
    pub(crate) fn closed(low: T, high: T) -> Self {
        Self::new(vec![(Bound::Included(low), Bound::Included(high))])
    }

    /// Nothing.
    pub(crate) fn nothing() -> Self {
        Self::new(Vec::new())
    }

    /// Both.
    pub(crate) fn or(mut self, other: Self) -> Self {
        self.ranges.extend(other.ranges);
        self
    }

    /// Whether a value is accepted.
    pub(crate) fn holds(&self, value: &T) -> bool {
        self.ranges.iter().any(|(low, high)| above(low, value) && below(high, value))
    }

    /// Whether a value between two inclusive ends may be accepted.
    pub(crate) fn meets(&self, min: &T, max: &T) -> bool {
        self.ranges.iter().any(|(low, high)| above(low, max) && below(high, min))
    }

    /// Whether all values between two inclusive ends are accepted.
    pub(crate) fn covers(&self, min: &T, max: &T) -> bool {
        self.ranges.iter().any(|(low, high)| above(low, min) && below(high, max))
    }
}

fn above<T: PartialOrd>(low: &Bound<T>, value: &T) -> bool {
    match low {
        Bound::Included(low) => low <= value,
        Bound::Excluded(low) => low < value,
        Bound::Unbounded => true,
    }
}

fn below<T: PartialOrd>(high: &Bound<T>, value: &T) -> bool {
    match high {
        Bound::Included(high) => value <= high,
        Bound::Excluded(high) => value < high,
        Bound::Unbounded => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bound() -> impl Strategy<Value = Bound<i8>> {
        prop_oneof![
            any::<i8>().prop_map(Bound::Included),
            any::<i8>().prop_map(Bound::Excluded),
            Just(Bound::Unbounded)
        ]
    }

    proptest! {
        #[test]
        fn inv_6_an_interval_with_an_accepted_value_is_met_and_a_covered_one_has_no_other(
            ranges in prop::collection::vec((bound(), bound()), 0..4), a: i8, b: i8,
        ) {
            let (min, max) = (a.min(b), a.max(b));
            let ranges = Ranges::new(ranges);
            let held: Vec<bool> = (min..=max).map(|value| ranges.holds(&value)).collect();
            prop_assert!(ranges.meets(&min, &max) || !held.contains(&true));
            prop_assert!(!ranges.covers(&min, &max) || !held.contains(&false));
        }
    }
}
