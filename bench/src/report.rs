//! The folder that a run leaves: numbers, summary with verdicts, plots, and the machine's facts.

use crate::goals::{self, Must};
use crate::plot::{self, Line};
use crate::samples::{Samples, median};
use crate::suite::Kept;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The dated folder of a run, made.
pub(crate) fn folder(out: &Path, name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let folder = out.join(format!("{}-{name}", shell("date", &["+%Y-%m-%d-%H%M"])));
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Writes everything of a run of the suite.
pub(crate) fn write_suite(
    folder: &Path,
    scratch: &Path,
    samples: &Samples,
    kept: &Kept,
    passes: usize,
) -> Result<(), Box<dyn Error>> {
    std::fs::write(folder.join("samples.csv"), samples.csv())?;
    std::fs::write(folder.join("info.json"), serde_json::to_string_pretty(&kept.infos)?)?;
    std::fs::write(folder.join("over_time.csv"), over_time_csv(kept))?;
    std::fs::write(folder.join("latencies.csv"), latencies_csv(kept))?;
    plots(folder, samples, kept)?;
    let summary = summary(samples, kept, passes)?;
    std::fs::write(folder.join("summary.md"), &summary)?;
    std::fs::write(folder.join("machine.txt"), machine(scratch))?;
    eprintln!("\n{summary}\nin {}", folder.display());
    Ok(())
}

fn over_time_csv(kept: &Kept) -> String {
    let mut csv = String::from("load,seconds,bytes_sent\n");
    for (name, points) in &kept.over_time {
        for (seconds, bytes) in points {
            writeln!(csv, "{name},{seconds:.3},{bytes}").ok(); // A String takes all.
        }
    }
    csv
}

fn latencies_csv(kept: &Kept) -> String {
    let mut csv = String::from("load,percentile,ms\n");
    for (name, points) in &kept.latencies {
        for (percentile, ms) in points {
            writeln!(csv, "{name},{percentile},{ms:.3}").ok(); // A String takes all.
        }
    }
    csv
}

fn plots(folder: &Path, samples: &Samples, kept: &Kept) -> Result<(), Box<dyn Error>> {
    const GIB: f64 = (1_u64 << 30) as f64;
    let over_time: Vec<Line> = kept
        .over_time
        .iter()
        .filter(|(name, _)| name.ends_with(" flightbox"))
        .map(|(name, points)| Line {
            name: name.trim_end_matches(" flightbox").to_owned(),
            points: points.iter().map(|(seconds, bytes)| (*seconds, *bytes as f64 / GIB)).collect(),
        })
        .collect();
    plot::lines(&folder.join("over_time.svg"), "GiB sent over seconds, flightbox, closed loop", &over_time)?;
    let latencies: Vec<Line> = kept
        .latencies
        .iter()
        .map(|(name, points)| Line {
            name: name.clone(),
            // Nines, so that the tail has room.
            points: points
                .iter()
                .filter(|(percentile, _)| *percentile < 100.0)
                .map(|(percentile, ms)| (-(1.0 - percentile / 100.0).log10(), *ms))
                .collect(),
        })
        .collect();
    plot::lines(&folder.join("latencies.svg"), "durable latency in ms over nines (1 is p90, 2 is p99)", &latencies)?;
    let rates: Vec<(String, f64)> = samples
        .contestants("image", "bytes_per_s")
        .into_iter()
        .filter_map(|who| samples.median_of("image", &who, "bytes_per_s").map(|rate| (who, rate / 1e9)))
        .collect();
    plot::bars(&folder.join("image.svg"), "image: GB a second", &rates)?;
    let cpu: Vec<(String, f64)> = samples
        .measurements()
        .into_iter()
        .filter_map(|name| samples.median_of(&name, "flightbox", "cpu_s_per_gb").map(|cpu| (name, cpu)))
        .collect();
    plot::bars(&folder.join("cpu.svg"), "server CPU seconds a GB", &cpu)?;
    let growth = |measurement: &str, metric: &str| -> Vec<(String, f64)> {
        let whose = samples.contestants(measurement, metric);
        whose.into_iter().filter_map(|who| Some((who.clone(), samples.median_of(measurement, &who, metric)?))).collect()
    };
    plot::bars(&folder.join("topics.svg"), "CPU seconds a GB, by topics", &growth("topics", "cpu_s_per_gb"))?;
    plot::bars(
        &folder.join("commits.svg"),
        "committer CPU a chunk in us, by chunks in the catalog",
        &growth("commits", "committer_cpu_us"),
    )?;
    let stations: Vec<(String, f64)> = kept
        .infos
        .get("image")
        .and_then(|info| info["stations"].as_array())
        .into_iter()
        .flatten()
        .map(|station| {
            (station["station"].as_str().unwrap_or("").to_owned(), station["p50_us"].as_f64().unwrap_or(0.0) / 1e3)
        })
        .collect();
    plot::bars(&folder.join("stations.svg"), "image, saturated: median ms at each station", &stations)?;
    Ok(())
}

fn summary(samples: &Samples, kept: &Kept, passes: usize) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "# Speed beside its limits (medians of {passes})\n")?;
    writeln!(text, "| goal | must | measured | | passes |\n| --- | --- | --- | --- | --- |")?;
    for goal in goals::goals(samples) {
        let sign = if goal.must == Must::Reach { "≥" } else { "≤" };
        let verdict = goal.reached().map_or("", |reached| if reached { "reached" } else { "**missed**" });
        let value = goal.value().map_or("not measured".to_owned(), |value| format!("{} {}", rounded(value), goal.unit));
        let must = format!("{sign} {} {}", goal.bound, goal.unit);
        let passes: Vec<String> =
            if goal.passes.len() > 1 { goal.passes.iter().copied().map(rounded).collect() } else { Vec::new() };
        writeln!(text, "| {} | {} | {} | {verdict} | {} |", goal.what, must.trim(), value.trim(), passes.join(" "))?;
    }
    closed_loops(&mut text, samples)?;
    rivals(&mut text, samples)?;
    for measurement in samples.measurements() {
        writeln!(
            text,
            "\n## {measurement}\n\n| what | metric | median | least | most |\n| --- | --- | --- | --- | --- |"
        )?;
        for who in samples.all_contestants(&measurement) {
            for metric in samples.metrics(&measurement, &who) {
                let median = samples.median_of(&measurement, &who, &metric).unwrap_or(0.0);
                let (least, most) = samples.range_of(&measurement, &who, &metric);
                let [median, least, most] = [median, least, most].map(|value| shown(&metric, value));
                writeln!(text, "| {who} | {metric} | {median} | {least} | {most} |")?;
            }
        }
    }
    for (name, info) in &kept.infos {
        writeln!(
            text,
            "\n## Stations of {name} (last pass)\n\n| station | count | p50 ms | p99 ms | p99.9 ms | max ms |\n| --- | --- | --- | --- | --- | --- |"
        )?;
        for station in info["stations"].as_array().into_iter().flatten() {
            let ms = |key: &str| station[key].as_f64().unwrap_or(0.0) / 1000.0;
            let name = station["station"].as_str().unwrap_or("");
            let [p50, p99, p999, max] = ["p50_us", "p99_us", "p999_us", "max_us"].map(ms);
            writeln!(text, "| {name} | {} | {p50:.2} | {p99:.2} | {p999:.2} | {max:.2} |", station["count"])?;
        }
    }
    Ok(text)
}

/// As much as it takes, beside its limits.
fn closed_loops(text: &mut String, samples: &Samples) -> std::fmt::Result {
    let limits = |load: String| median(&goals::of_limit(samples, &load)).map(|of_limit| (load, of_limit));
    let loads: Vec<(String, f64)> = samples.measurements().into_iter().filter_map(limits).collect();
    if loads.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## Closed loops, MB/s and server CPU s/GB\n")?;
    writeln!(
        text,
        "| load | flightbox | null sink | disk, a sync per 16 MiB | of the lower | CPU: flightbox | null sink |"
    )?;
    writeln!(text, "| --- | --- | --- | --- | --- | --- | --- |")?;
    for (load, of_limit) in loads {
        let rate = |who: &str| samples.median_of(&load, who, "bytes_per_s").map_or(String::new(), megabytes);
        let cpu = |who: &str| samples.median_of(&load, who, "cpu_s_per_gb").map_or(String::new(), rounded);
        let [ours, sink, disk] = ["flightbox", "null_sink", "disk_sync"].map(rate);
        let [our_cpu, sink_cpu] = ["flightbox", "null_sink"].map(cpu);
        let of_limit = rounded(of_limit);
        writeln!(text, "| `{load}` | {ours} | {sink} | {disk} | {of_limit} | {our_cpu} | {sink_cpu} |")?;
    }
    Ok(())
}

/// Whoever takes or writes the same frames.
fn rivals(text: &mut String, samples: &Samples) -> std::fmt::Result {
    let all = samples.contestants("image", "bytes_per_s");
    if all.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## `image` beside others\n\n| who | MB/s | server CPU s/GB |\n| --- | --- | --- |")?;
    for who in all {
        let rate = samples.median_of("image", &who, "bytes_per_s").map_or(String::new(), megabytes);
        let cpu = samples.median_of("image", &who, "cpu_s_per_gb").map_or("–".to_owned(), rounded);
        writeln!(text, "| {who} | {rate} | {cpu} |")?;
    }
    Ok(())
}

fn megabytes(bytes: f64) -> String {
    format!("{:.0}", bytes / 1e6)
}

fn shown(metric: &str, value: f64) -> String {
    if metric.ends_with("bytes_per_s") { format!("{} MB/s", megabytes(value)) } else { rounded(value) }
}

/// Three digits that mean something.
fn rounded(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// Writes a dated folder with the machine's facts, and prints the summary.
pub(crate) fn write_folder(
    out: &Path,
    name: &str,
    scratch: &Path,
    summary: &str,
    files: &[(&str, String)],
) -> Result<(), Box<dyn Error>> {
    let folder = folder(out, name)?;
    for (name, text) in files {
        std::fs::write(folder.join(name), text)?;
    }
    std::fs::write(folder.join("machine.txt"), machine(scratch))?;
    std::fs::write(folder.join("summary.md"), summary)?;
    eprintln!("\n{summary}\nin {}", folder.display());
    Ok(())
}

/// What a program prints.
pub(crate) fn shell(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn machine(scratch: &Path) -> String {
    let scratch = scratch.display().to_string();
    let device = "d=$(findmnt -no SOURCE -T \"$0\"); lsblk -do NAME,SIZE,ROTA,PHY-SEC,LOG-SEC,SCHED,MODEL \"$d\"; cat /sys/block/$(basename \"$d\")/queue/{write_cache,fua,nr_requests} 2>/dev/null";
    [
        ("kernel", shell("uname", &["-srvm"])),
        ("cpu", shell("sh", &["-c", "grep -m1 'model name' /proc/cpuinfo; nproc"])),
        ("memory", shell("sh", &["-c", "head -1 /proc/meminfo; cat /sys/kernel/mm/transparent_hugepage/enabled"])),
        ("mount", shell("findmnt", &["-T", &scratch])),
        ("disk", shell("bash", &["-c", device, &scratch])),
        ("fio", shell("fio", &["--version"])),
        ("command", std::env::args().collect::<Vec<_>>().join(" ")),
        ("commit", shell("git", &["describe", "--always", "--dirty"])),
    ]
    .iter()
    .map(|(name, text)| format!("{name}: {text}\n"))
    .collect()
}
