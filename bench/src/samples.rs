//! Everything measured, one number a line, and the statistics over passes.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// One number.
#[derive(Debug, Clone)]
struct Sample {
    pass: usize,
    measurement: String,
    contestant: String,
    metric: String,
    value: f64,
}

/// All numbers of a run.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    rows: Vec<Sample>,
}

impl Samples {
    /// Adds a number, and says so.
    pub(crate) fn add(&mut self, pass: usize, measurement: &str, contestant: &str, metric: &str, value: f64) {
        eprintln!("pass {pass}: {measurement:<12} {contestant:<14} {metric:<22} {value:>14.4}");
        let [measurement, contestant, metric] = [measurement, contestant, metric].map(str::to_owned);
        self.rows.push(Sample { pass, measurement, contestant, metric, value });
    }

    /// A number of one pass.
    pub(crate) fn get(&self, pass: usize, measurement: &str, contestant: &str, metric: &str) -> Option<f64> {
        let is_it = |row: &&Sample| {
            row.pass == pass && row.measurement == measurement && row.contestant == contestant && row.metric == metric
        };
        self.rows.iter().find(is_it).map(|row| row.value)
    }

    /// Whatever can be computed for a pass, of all passes for which it can.
    pub(crate) fn passes(&self, of: impl Fn(usize) -> Option<f64>) -> Vec<f64> {
        let passes: BTreeSet<usize> = self.rows.iter().map(|row| row.pass).collect();
        passes.into_iter().filter_map(of).collect()
    }

    /// One metric in each pass that has it.
    pub(crate) fn passes_of(&self, measurement: &str, contestant: &str, metric: &str) -> Vec<f64> {
        self.passes(|pass| self.get(pass, measurement, contestant, metric))
    }

    /// The median of one metric.
    pub(crate) fn median_of(&self, measurement: &str, contestant: &str, metric: &str) -> Option<f64> {
        median(&self.passes_of(measurement, contestant, metric))
    }

    /// Contestants of a measurement that have a metric, in the order they came.
    pub(crate) fn contestants(&self, measurement: &str, metric: &str) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| row.measurement == measurement && row.metric == metric);
        distinct(rows.map(|row| &row.contestant))
    }

    /// All contestants of a measurement, in the order they came.
    pub(crate) fn all_contestants(&self, measurement: &str) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| row.measurement == measurement);
        distinct(rows.map(|row| &row.contestant))
    }

    /// The least and the most of one metric over all passes.
    pub(crate) fn range_of(&self, measurement: &str, contestant: &str, metric: &str) -> (f64, f64) {
        let is_it =
            |row: &&Sample| row.measurement == measurement && row.contestant == contestant && row.metric == metric;
        self.rows
            .iter()
            .filter(is_it)
            .fold((f64::MAX, f64::MIN), |(least, most), row| (least.min(row.value), most.max(row.value)))
    }

    /// Measurements in the order they came.
    pub(crate) fn measurements(&self) -> Vec<String> {
        distinct(self.rows.iter().map(|row| &row.measurement))
    }

    /// Metrics of a measurement's contestant in the order they came.
    pub(crate) fn metrics(&self, measurement: &str, contestant: &str) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| row.measurement == measurement && row.contestant == contestant);
        distinct(rows.map(|row| &row.metric))
    }

    /// All of it as CSV.
    pub(crate) fn csv(&self) -> String {
        let mut csv = String::from("pass,measurement,contestant,metric,value\n");
        for row in &self.rows {
            let Sample { pass, measurement, contestant, metric, value } = row;
            writeln!(csv, "{pass},{measurement},{contestant},{metric},{value}").ok(); // A String takes all.
        }
        csv
    }
}

/// The median; `None` of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[odd / 2]),
        even => Some((values[even / 2 - 1] + values[even / 2]) / 2.0),
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut distinct: Vec<String> = Vec::new();
    for name in names {
        if !distinct.contains(name) {
            distinct.push(name.clone());
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_what_each_pass_gives() {
        let mut samples = Samples::default();
        for (pass, (put, sink)) in [(1.0, 2.0), (9.0, 10.0), (3.0, 4.0)].into_iter().enumerate() {
            samples.add(pass, "image", "flightbox", "rate", put);
            samples.add(pass, "image", "null_sink", "rate", sink);
        }
        let ratios = samples.passes(|pass| {
            Some(samples.get(pass, "image", "flightbox", "rate")? / samples.get(pass, "image", "null_sink", "rate")?)
        });
        assert_eq!((ratios.as_slice(), median(&ratios)), (&[0.5, 0.9, 0.75][..], Some(0.75)));
        assert_eq!(median(&ratios[..2]), Some(0.7));
        assert_eq!(samples.median_of("image", "flightbox", "rate"), Some(3.0));
        assert_eq!(samples.median_of("image", "naive", "rate"), None);
    }
}
