//! What an ontology adds to the statistics of its leaves: norms of vectors, boxes on the globe,
//! sets of few texts.
//!
//! Guarantees (INV-6), as for leaves: every row that has a norm or a point has it within the bounds;
//! a set of values is complete or absent. The row by row check of a query computes norms and
//! longitudes by the same functions ([`norm`], [`wrap_longitude`]), so index and rows cannot disagree.

use super::{Bounds, FieldStats};
use crate::limits::{VALUE_SET_MAX, VALUE_SET_TEXT_BYTES};
use crate::ontology::Derived;
use crate::schema::{flat_path, leaf_at};
use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Schema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Euclidean norm of a vector.
pub fn norm(x: f64, y: f64, z: f64) -> f64 {
    (x * x + y * y + z * z).sqrt()
}

/// A longitude as degrees east from -180 to 180; other turns of the globe are brought there.
pub fn wrap_longitude(degrees: f64) -> f64 {
    if (-180.0..=180.0).contains(&degrees) { degrees } else { (degrees + 180.0).rem_euclid(360.0) - 180.0 }
}

/// A box on the globe in degrees. `west` greater than `east`: it crosses the antimeridian.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GeoBox {
    /// Smallest latitude.
    pub south: f64,
    /// Where it begins, going east.
    pub west: f64,
    /// Largest latitude.
    pub north: f64,
    /// Where it ends, going east.
    pub east: f64,
}

impl GeoBox {
    /// Whether a point lies inside; the edges belong to it.
    pub fn holds(&self, latitude: f64, longitude: f64) -> bool {
        let longitude = wrap_longitude(longitude);
        let within = if self.west <= self.east {
            self.west <= longitude && longitude <= self.east
        } else {
            self.west <= longitude || longitude <= self.east
        };
        self.south <= latitude && latitude <= self.north && within
    }

    /// Whether the two have a point in common.
    pub fn meets(&self, other: &Self) -> bool {
        let spans = |a: &Self| {
            if a.west <= a.east { vec![(a.west, a.east)] } else { vec![(a.west, 180.0), (-180.0, a.east)] }
        };
        // -180 and 180 are one meridian.
        let touch = |(a, b): (f64, f64), (c, d): (f64, f64)| {
            (a <= d && c <= b) || (a == -180.0 && d == 180.0) || (c == -180.0 && b == 180.0)
        };
        let longitudes = spans(self).into_iter().any(|mine| spans(other).into_iter().any(|theirs| touch(mine, theirs)));
        self.south <= other.north && other.south <= self.north && longitudes
    }

    /// Whether all of `other` lies inside.
    pub fn covers(&self, other: &Self) -> bool {
        let longitudes = match (self.west <= self.east, other.west <= other.east) {
            (true, true) => self.west <= other.west && other.east <= self.east,
            (false, false) => self.west <= other.west && other.east <= self.east,
            (false, true) => self.west <= other.west || other.east <= self.east,
            (true, false) => self.west == -180.0 && self.east == 180.0,
        };
        self.south <= other.south && other.north <= self.north && longitudes
    }
}

/// Gathers one derived column.
#[derive(Debug)]
pub(super) struct Gatherer<'a> {
    derived: &'a Derived,
    values: u64,
    nulls: u64,
    nans: u64,
    state: State,
}

/// Where a leaf lies, if it is there.
type Place = Option<Vec<usize>>;

#[derive(Debug)]
enum State {
    Norm {
        of: [Place; 3],
        bounds: Option<(f64, f64)>,
    },
    Box {
        latitude: Place,
        longitude: Place,
        extent: Option<Extent>,
    },
    /// `None`: there were too many.
    Values {
        path: Place,
        set: Option<BTreeSet<String>>,
    },
}

/// A box that is still growing: longitudes are followed both ways round the globe.
#[derive(Debug, Clone, Copy)]
struct Extent {
    south: f64,
    north: f64,
    /// Over all longitudes.
    all: (f64, f64),
    /// Smallest of those from 0 on, largest of those below 0.
    across: (f64, f64),
}

impl<'a> Gatherer<'a> {
    pub(super) fn new(derived: &'a Derived, schema: &Schema) -> Self {
        let place = |path: &String| flat_path(schema, path);
        let state = match derived {
            Derived::Norm { of, .. } => State::Norm { of: of.each_ref().map(place), bounds: None },
            Derived::Box { latitude, longitude, .. } => {
                State::Box { latitude: place(latitude), longitude: place(longitude), extent: None }
            }
            Derived::Values { path } => State::Values { path: place(path), set: Some(BTreeSet::new()) },
        };
        Self { derived, values: 0, nulls: 0, nans: 0, state }
    }

    pub(super) fn add(&mut self, batch: &RecordBatch) {
        self.values += batch.num_rows() as u64;
        match &mut self.state {
            State::Norm { of, bounds } => {
                let [Some(x), Some(y), Some(z)] = of.each_ref().map(|path| numbers(batch, path)) else {
                    self.nulls += batch.num_rows() as u64;
                    return;
                };
                let (nulls, nans) = add_norms(&x, &y, &z, bounds);
                self.nulls += nulls;
                self.nans += nans;
            }
            State::Box { latitude, longitude, extent } => {
                let (Some(latitude), Some(longitude)) = (numbers(batch, latitude), numbers(batch, longitude)) else {
                    self.nulls += batch.num_rows() as u64;
                    return;
                };
                for (latitude, longitude) in latitude.iter().zip(longitude.iter()) {
                    match point(latitude, longitude) {
                        Some((latitude, longitude)) => widen(extent, latitude, longitude),
                        None => self.nulls += 1,
                    }
                }
            }
            State::Values { path, set } => match path.as_ref().and_then(|path| leaf_at(batch, path)) {
                Some(texts) => {
                    self.nulls += texts.null_count() as u64;
                    add_values(&texts, set);
                }
                None => self.nulls += batch.num_rows() as u64,
            },
        }
    }

    pub(super) fn finish(self) -> FieldStats {
        let bounds = match self.state {
            State::Norm { bounds, .. } => bounds.map_or(Bounds::None, |(low, high)| Bounds::Float(low, high)),
            State::Box { extent, .. } => extent.map_or(Bounds::None, |extent| Bounds::Box(extent.narrowest())),
            State::Values { set, .. } => set.map_or(Bounds::None, |set| Bounds::Values(set.into_iter().collect())),
        };
        debug_assert!(self.nulls + self.nans <= self.values, "{:?}", self.derived);
        FieldStats { values: self.values, nulls: self.nulls, nans: self.nans, bounds }
    }
}

/// The point of a row; `None` if a coordinate is missing or no number.
pub(crate) fn point(latitude: Option<f64>, longitude: Option<f64>) -> Option<(f64, f64)> {
    let (latitude, longitude) = (latitude?, wrap_longitude(longitude?));
    (!latitude.is_nan() && !longitude.is_nan()).then_some((latitude, longitude))
}

/// A numeric leaf as floats, its parents' nulls taken in.
fn numbers(batch: &RecordBatch, place: &Place) -> Option<Float64Array> {
    let leaf = leaf_at(batch, place.as_ref()?)?;
    match leaf.data_type() {
        DataType::Float64 => Some(leaf.as_primitive::<Float64Type>().clone()),
        other if other.is_numeric() => {
            let cast = arrow::compute::cast(&leaf, &DataType::Float64).ok()?;
            Some(cast.as_primitive::<Float64Type>().clone())
        }
        _ => None,
    }
}

/// Widens the bounds by the norms of rows that have one; returns how many have none and how many are NaN.
fn add_norms(x: &Float64Array, y: &Float64Array, z: &Float64Array, bounds: &mut Option<(f64, f64)>) -> (u64, u64) {
    let (mut low, mut high, mut nulls, mut nans) = (f64::INFINITY, f64::NEG_INFINITY, 0, 0_u64);
    let mut take = |x: f64, y: f64, z: f64| {
        let norm = norm(x, y, z);
        low = low.min(norm);
        high = high.max(norm);
        nans += u64::from(norm.is_nan());
    };
    if x.null_count() + y.null_count() + z.null_count() == 0 {
        for ((x, y), z) in x.values().iter().zip(y.values()).zip(z.values()) {
            take(*x, *y, *z);
        }
    } else {
        for ((x, y), z) in x.iter().zip(y.iter()).zip(z.iter()) {
            match (x, y, z) {
                (Some(x), Some(y), Some(z)) => take(x, y, z),
                _ => nulls += 1,
            }
        }
    }
    if low <= high {
        *bounds = Some(bounds.map_or((low, high), |(a, b)| (a.min(low), b.max(high))));
    }
    (nulls, nans)
}

fn widen(extent: &mut Option<Extent>, latitude: f64, longitude: f64) {
    let mut now = extent.unwrap_or(Extent {
        south: latitude,
        north: latitude,
        all: (longitude, longitude),
        across: (180.0, -180.0),
    });
    now.south = now.south.min(latitude);
    now.north = now.north.max(latitude);
    now.all = (now.all.0.min(longitude), now.all.1.max(longitude));
    if longitude < 0.0 {
        now.across.1 = now.across.1.max(longitude);
    } else {
        now.across.0 = now.across.0.min(longitude);
    }
    *extent = Some(now);
}

impl Extent {
    /// The narrower of the two ways round the globe.
    fn narrowest(self) -> GeoBox {
        let (west, east) = self.all;
        let (from, to) = self.across;
        let across = to + 360.0 - from;
        let (west, east) = if west < 0.0 && 0.0 <= east && across < east - west { (from, to) } else { (west, east) };
        GeoBox { south: self.south, west, north: self.north, east }
    }
}

fn add_values(texts: &ArrayRef, set: &mut Option<BTreeSet<String>>) {
    match texts.data_type() {
        DataType::Utf8 => add_texts(texts.as_string::<i32>().iter(), set),
        DataType::LargeUtf8 => add_texts(texts.as_string::<i64>().iter(), set),
        DataType::Utf8View => add_texts(texts.as_string_view().iter(), set),
        _ => *set = None,
    }
}

fn add_texts<'t>(texts: impl Iterator<Item = Option<&'t str>>, set: &mut Option<BTreeSet<String>>) {
    let Some(known) = set else { return };
    let mut last = None;
    for text in texts.flatten() {
        // Names repeat from row to row: most rows cost one comparison.
        if last == Some(text) {
            continue;
        }
        last = Some(text);
        if known.contains(text) {
            continue;
        }
        if known.len() == VALUE_SET_MAX || text.len() > VALUE_SET_TEXT_BYTES {
            *set = None;
            return;
        }
        known.insert(text.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::stats::collect;
    use arrow::array::StringArray;
    use arrow::datatypes::{Field, Schema};
    use std::sync::Arc;

    fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true)))
            .expect("a batch")
    }

    fn last(derived: Derived, batches: &[RecordBatch]) -> FieldStats {
        let schema = batches[0].schema();
        collect(&schema, &[derived], batches).pop().expect("one")
    }

    #[track_caller]
    fn check_box(points: &[(Option<f64>, Option<f64>)], expected: Option<(f64, f64)>) {
        let latitude: Float64Array = points.iter().map(|point| point.0).collect();
        let longitude: Float64Array = points.iter().map(|point| point.1).collect();
        let batch = batch(vec![("lat", Arc::new(latitude)), ("lon", Arc::new(longitude))]);
        let derived = Derived::Box { path: String::new(), latitude: "lat".into(), longitude: "lon".into() };
        let found = match last(derived, &[batch]).bounds {
            Bounds::Box(found) => Some((found.west, found.east)),
            _ => None,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_box_takes_the_narrow_way_round_the_globe() {
        check_box(&[(Some(1.0), Some(9.0)), (Some(2.0), Some(9.5))], Some((9.0, 9.5)));
        check_box(&[(Some(1.0), Some(-3.0)), (Some(2.0), Some(2.0))], Some((-3.0, 2.0)));
        check_box(&[(Some(1.0), Some(179.0)), (Some(2.0), Some(-179.5))], Some((179.0, -179.5)));
        check_box(&[(Some(1.0), Some(181.0)), (Some(2.0), Some(179.0))], Some((179.0, -179.0)));
    }

    #[test]
    fn rows_without_a_whole_point_are_no_part_of_the_box() {
        check_box(&[(None, Some(9.0)), (Some(2.0), None), (Some(f64::NAN), Some(1.0))], None);
    }

    #[test]
    fn norms_leave_out_rows_without_a_vector() {
        let axis = |values: [Option<f64>; 3]| Arc::new(Float64Array::from(values.to_vec())) as ArrayRef;
        let batch = batch(vec![
            ("x", axis([Some(3.0), None, Some(f64::NAN)])),
            ("y", axis([Some(4.0), Some(1.0), Some(1.0)])),
            ("z", axis([Some(0.0), Some(1.0), Some(1.0)])),
        ]);
        let derived = Derived::Norm { column: "norm".into(), of: ["x", "y", "z"].map(str::to_owned) };
        let stats = last(derived, &[batch]);
        assert_eq!(stats, FieldStats { values: 3, nulls: 1, nans: 1, bounds: Bounds::Float(5.0, 5.0) });
    }

    #[test]
    fn a_set_of_values_is_complete_or_absent() {
        let derived = || Derived::Values { path: "t".into() };
        let few = batch(vec![("t", Arc::new(StringArray::from(vec![Some("b"), None, Some("a"), Some("b")])))]);
        assert_eq!(last(derived(), &[few]).bounds, Bounds::Values(vec!["a".into(), "b".into()]));
        let many: Vec<String> = (0..=VALUE_SET_MAX).map(|n| n.to_string()).collect();
        let many = batch(vec![("t", Arc::new(StringArray::from(many)))]);
        assert_eq!(last(derived(), &[many]).bounds, Bounds::None);
        let nothing = RecordBatch::new_empty(Arc::new(Schema::new(vec![Field::new("t", DataType::Utf8, true)])));
        assert_eq!(last(derived(), &[nothing]).bounds, Bounds::Values(Vec::new()));
    }

    #[test]
    fn boxes_meet_and_cover_across_the_antimeridian() {
        let of = |west, east| GeoBox { south: 0.0, west, north: 10.0, east };
        assert!(of(170.0, -170.0).holds(5.0, 175.0) && of(170.0, -170.0).holds(5.0, -175.0));
        assert!(!of(170.0, -170.0).holds(5.0, 0.0));
        assert!(of(170.0, -170.0).meets(&of(-172.0, -160.0)) && !of(170.0, -170.0).meets(&of(0.0, 10.0)));
        assert!(of(160.0, -160.0).covers(&of(170.0, -170.0)) && !of(170.0, -170.0).covers(&of(160.0, 175.0)));
        assert!(of(170.0, 180.0).meets(&of(-180.0, -170.0)));
        assert!(of(160.0, -160.0).covers(&of(-170.0, -165.0)));
    }
}
