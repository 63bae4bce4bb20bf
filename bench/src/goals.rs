//! What must be reached: each goal with its limit, computed from one run.

use crate::samples::{Samples, median};

/// Which side of its bound a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Must {
    /// At least the bound.
    Reach,
    /// At most the bound.
    Stay,
}

/// One goal, with what was measured.
#[derive(Debug, Clone)]
pub(crate) struct Goal {
    pub(crate) what: &'static str,
    pub(crate) must: Must,
    pub(crate) bound: f64,
    pub(crate) unit: &'static str,
    /// What each pass that measured it gave.
    pub(crate) passes: Vec<f64>,
}

impl Goal {
    /// The median; `None`: not measured in this run.
    pub(crate) fn value(&self) -> Option<f64> {
        median(&self.passes)
    }

    /// Whether it is reached.
    pub(crate) fn reached(&self) -> Option<bool> {
        self.value().map(|value| match self.must {
            Must::Reach => value >= self.bound,
            Must::Stay => value <= self.bound,
        })
    }
}

const RATE: &str = "bytes_per_s";

/// What flightbox does of the lower of its limits, in each pass.
pub(crate) fn of_limit(samples: &Samples, measurement: &str) -> Vec<f64> {
    samples.passes(|pass| {
        let rate = |contestant: &str| samples.get(pass, measurement, contestant, RATE);
        Some(rate("flightbox")? / rate("null_sink")?.min(rate("disk_sync")?))
    })
}

/// All goals; ratios are taken pass by pass, then their median.
pub(crate) fn goals(samples: &Samples) -> Vec<Goal> {
    let get =
        |pass, measurement: &str, contestant: &str, metric: &str| samples.get(pass, measurement, contestant, metric);
    let of_limit = |measurement: &'static str| of_limit(samples, measurement);
    let against = |other: &'static str| {
        samples.passes(|pass| Some(get(pass, "image", "flightbox", RATE)? / get(pass, "image", other, RATE)?))
    };
    let of_read_limit = |measurement: &'static str| {
        samples.passes(|pass| {
            let limit = get(pass, measurement, "null_source", RATE)?.min(get(pass, measurement, "disk_read", RATE)?);
            Some(get(pass, measurement, "flightbox", RATE)? / limit)
        })
    };
    let cpu_beyond = samples.passes(|pass| {
        Some(get(pass, "image", "flightbox", "cpu_s_per_gb")? - get(pass, "image", "null_sink", "cpu_s_per_gb")?)
    });
    let of = |measurement: &'static str, contestant: &'static str, metric: &'static str| {
        samples.passes_of(measurement, contestant, metric)
    };
    // The worse of what the server's own counters and the device's say.
    let written_at_most = |measurement: &'static str| {
        samples.passes(|pass| {
            let of = |metric: &str| get(pass, measurement, "flightbox", metric);
            Some(of("written_per_byte")?.max(of("device_per_byte")?))
        })
    };
    let quotient = |measurement: &'static str, above: &'static str, below: &'static str, metric: &'static str| {
        samples.passes(|pass| Some(get(pass, measurement, above, metric)? / get(pass, measurement, below, metric)?))
    };
    // Not pass by pass: some profiles are measured once.
    let rss: Option<f64> = samples
        .measurements()
        .iter()
        .filter_map(|measurement| samples.median_of(measurement, "flightbox", "rss_beyond_mib"))
        .reduce(f64::max);
    let beyond = |what: &'static str, metric: &'static str| of(what, "flightbox", metric);
    use Must::{Reach, Stay};
    let goal = |what, must, bound, unit, passes| Goal { what, must, bound, unit, passes };
    vec![
        goal("`image`, 4 streams, against the limit", Reach, 0.75, "", of_limit("image")),
        goal("`image`, 1 stream, against the limit", Reach, 0.75, "", of_limit("image-1")),
        goal("`lidar` against the limit", Reach, 0.65, "", of_limit("lidar")),
        goal("`imu`, 20,000 rows, against the limit", Reach, 0.55, "", of_limit("imu-20000")),
        goal("`image` against the naive server without any sync", Reach, 1.5, "", against("naive")),
        goal("… with fsync per chunk", Reach, 3.0, "", against("naive_fsync")),
        goal("server CPU beyond the null sink's, `image`", Stay, 0.35, "s/GB", cpu_beyond),
        goal("bytes written per byte, own counters, `image`", Stay, 1.05, "", beyond("image", "written_per_byte")),
        goal("… `h264`", Stay, 1.05, "", beyond("h264", "written_per_byte")),
        goal("bytes written per byte, /proc/diskstats, `image`", Stay, 1.05, "", beyond("image", "device_per_byte")),
        goal("… `h264`", Stay, 1.12, "", beyond("h264", "device_per_byte")),
        goal("… `can`", Stay, 4.0, "", written_at_most("can")),
        goal(
            "durable latency beyond commit_interval, `image`, p50",
            Stay,
            5.0,
            "ms",
            beyond("latency-image", "beyond_p50_ms"),
        ),
        goal("… p99", Stay, 25.0, "ms", beyond("latency-image", "beyond_p99_ms")),
        goal("… p99.9", Stay, 60.0, "ms", beyond("latency-image", "beyond_p999_ms")),
        goal(
            "durable latency beyond commit_interval, `imu`, p50",
            Stay,
            5.0,
            "ms",
            beyond("latency-imu", "beyond_p50_ms"),
        ),
        goal("… p99", Stay, 25.0, "ms", beyond("latency-imu", "beyond_p99_ms")),
        goal("… p99.9", Stay, 60.0, "ms", beyond("latency-imu", "beyond_p999_ms")),
        goal("`drive`: messages late or dropped", Stay, 0.0, "", beyond("drive", "late_or_dropped")),
        goal("`drive`: CPU", Stay, 0.6, "cores", beyond("drive", "cores")),
        goal(
            "10 Hz topic beside a saturating camera, p99 against idle",
            Stay,
            3.0,
            "",
            quotient("isolation", "saturated", "idle", "p99_ms"),
        ),
        goal(
            "`sequence_create` p99 while saturated, second connection",
            Stay,
            25.0,
            "ms",
            of("isolation", "other_connection", "create_p99_ms"),
        ),
        goal("… on the saturated connection", Stay, 25.0, "ms", of("isolation", "same_connection", "create_p99_ms")),
        goal("CPU per GB, 1,000 topics against 10", Stay, 1.3, "", quotient("topics", "1000", "10", "cpu_s_per_gb")),
        goal(
            "commit cost per chunk, 1,000,000 chunks against 1,000",
            Stay,
            1.2,
            "",
            quotient("commits", "1000000", "1000", "committer_cpu_us"),
        ),
        goal("peak RSS beyond what `info` states, worst profile", Stay, 64.0, "MiB", rss.into_iter().collect()),
        goal("DoGet against its limit, `image`", Reach, 0.6, "", of_read_limit("get-image")),
        goal("… `imu`", Reach, 0.4, "", of_read_limit("get-imu")),
        goal(
            "`sequence_finalize` of 10 GB in 20 topics",
            Stay,
            300.0,
            "ms",
            of("finalize", "flightbox", "finalize_ms"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_that_was_not_measured_is_neither_reached_nor_missed() {
        assert!(goals(&Samples::default()).iter().all(|goal| goal.reached().is_none()));
    }

    #[test]
    fn the_limit_is_the_lower_of_null_sink_and_disk() {
        let mut samples = Samples::default();
        for (contestant, rate) in [("flightbox", 8.0), ("null_sink", 20.0), ("disk_sync", 10.0)] {
            samples.add(0, "image", contestant, RATE, rate);
        }
        let all = goals(&samples);
        assert_eq!(all[0].value(), Some(0.8));
        assert_eq!(all[0].reached(), Some(true));
    }
}
