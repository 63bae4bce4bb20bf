//! What must be reached: each goal with its limit, computed from one run.

use crate::samples::Samples;

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
    /// `None`: not measured in this run.
    pub(crate) value: Option<f64>,
}

impl Goal {
    /// Whether it is reached.
    pub(crate) fn reached(&self) -> Option<bool> {
        self.value.map(|value| match self.must {
            Must::Reach => value >= self.bound,
            Must::Stay => value <= self.bound,
        })
    }
}

const RATE: &str = "bytes_per_s";

/// All goals; ratios are taken pass by pass, then their median.
pub(crate) fn goals(samples: &Samples) -> Vec<Goal> {
    let get =
        |pass, measurement: &str, contestant: &str, metric: &str| samples.get(pass, measurement, contestant, metric);
    let limit = |pass, measurement: &str| -> Option<f64> {
        let (sink, disk) = (get(pass, measurement, "null_sink", RATE)?, get(pass, measurement, "disk_sync", RATE)?);
        Some(sink.min(disk))
    };
    let of_limit = |measurement: &'static str| {
        samples.median(|pass| Some(get(pass, measurement, "flightbox", RATE)? / limit(pass, measurement)?))
    };
    let against = |other: &'static str| {
        samples.median(|pass| Some(get(pass, "image", "flightbox", RATE)? / get(pass, "image", other, RATE)?))
    };
    let of_read_limit = |measurement: &'static str| {
        samples.median(|pass| {
            let limit = get(pass, measurement, "null_source", RATE)?.min(get(pass, measurement, "disk_read", RATE)?);
            Some(get(pass, measurement, "flightbox", RATE)? / limit)
        })
    };
    let cpu_beyond = samples.median(|pass| {
        Some(get(pass, "image", "flightbox", "cpu_s_per_gb")? - get(pass, "image", "null_sink", "cpu_s_per_gb")?)
    });
    let of = |measurement: &'static str, contestant: &'static str, metric: &'static str| {
        samples.median_of(measurement, contestant, metric)
    };
    let worst = |values: &[Option<f64>]| {
        values.iter().copied().collect::<Option<Vec<f64>>>().map(|all| all.into_iter().fold(f64::MIN, f64::max))
    };
    let quotient = |measurement: &'static str, above: &'static str, below: &'static str, metric: &'static str| {
        samples.median(|pass| Some(get(pass, measurement, above, metric)? / get(pass, measurement, below, metric)?))
    };
    let rss = samples
        .measurements()
        .iter()
        .filter_map(|measurement| samples.median_of(measurement, "flightbox", "rss_beyond_mib"))
        .fold(None, |most: Option<f64>, value| Some(most.map_or(value, |most| most.max(value))));
    let beyond = |what: &'static str, metric: &'static str| of(what, "flightbox", metric);
    use Must::{Reach, Stay};
    let goal = |what, must, bound, unit, value| Goal { what, must, bound, unit, value };
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
        goal("… `can`", Stay, 4.0, "", worst(&[beyond("can", "written_per_byte"), beyond("can", "device_per_byte")])),
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
        goal("peak RSS beyond what `info` states, worst profile", Stay, 64.0, "MiB", rss),
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
        assert_eq!(all[0].value, Some(0.8));
        assert_eq!(all[0].reached(), Some(true));
    }
}
