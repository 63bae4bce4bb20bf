//! A dated folder per run: what the machine is, every number, and a summary that says what they mean.

use serde_json::Value;
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What was measured.
#[derive(Debug)]
pub(crate) struct Report {
    profile: String,
    mib: u64,
    streams: usize,
    rows: Vec<(usize, String, f64)>,
    /// The server's own account of the last pass.
    pub(crate) stations: Value,
}

impl Report {
    /// An empty report.
    pub(crate) fn new(profile: &str, mib: u64, streams: usize) -> Self {
        Self { profile: profile.to_owned(), mib, streams, rows: Vec::new(), stations: Value::Null }
    }

    /// Adds one rate in MiB/s.
    pub(crate) fn add(&mut self, pass: usize, what: &str, mib_s: f64) {
        eprintln!("pass {pass}: {what:<16} {mib_s:>8.0} MiB/s");
        self.rows.push((pass, what.to_owned(), mib_s));
    }

    fn median(&self, what: &str) -> f64 {
        let mut rates: Vec<f64> =
            self.rows.iter().filter(|(_, name, _)| name == what).map(|(.., rate)| *rate).collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    }

    /// Writes the folder and prints the summary.
    pub(crate) fn write(&self, out: &Path, scratch: &Path) -> Result<(), Box<dyn Error>> {
        let mut csv = String::from("pass,what,mib_per_s\n");
        for (pass, what, rate) in &self.rows {
            writeln!(csv, "{pass},{what},{rate:.1}")?;
        }
        let info = serde_json::to_string_pretty(&self.stations)?;
        write_folder(out, &self.profile, scratch, &self.summary()?, &[("rates.csv", csv), ("info.json", info)])
    }

    fn summary(&self) -> Result<String, std::fmt::Error> {
        let (disk, synced) = (self.median("disk"), self.median("disk_sync_16mib"));
        let dsync = self.median("disk_dsync_1mib");
        let (sink, put) = (self.median("null_sink"), self.median("flightbox"));
        let without = self.median("no_index");
        let limit = disk.min(sink);
        let mut text = String::new();
        writeln!(text, "# {} ({} MiB a pass, {} streams, medians)\n", self.profile, self.mib, self.streams)?;
        writeln!(text, "| what | MiB/s | of the lower limit |\n| --- | --- | --- |")?;
        for (name, rate) in [
            ("disk: raw direct writes", disk),
            ("disk: a sync per 16 MiB", synced),
            ("disk: every 1 MiB write by RWF_DSYNC", dsync),
            ("null sink: same front, decodes and drops", sink),
            ("**flightbox**: durable", put),
            ("flightbox without statistics and index", without),
        ]
        .into_iter()
        .filter(|(_, rate)| *rate > 0.0)
        {
            writeln!(text, "| {name} | {rate:.0} | {:.2} |", rate / limit)?;
        }
        if without > 0.0 {
            writeln!(
                text,
                "\nStatistics and index cost {:.1} % of the rate without them.",
                100.0 - put / without * 100.0
            )?;
        }
        writeln!(text, "\n| station | count | p50 ms | p99 ms | max ms |\n| --- | --- | --- | --- | --- |")?;
        for station in self.stations["stations"].as_array().into_iter().flatten() {
            let ms = |key: &str| station[key].as_f64().unwrap_or(0.0) / 1000.0;
            let name = station["station"].as_str().unwrap_or("");
            writeln!(
                text,
                "| {name} | {} | {:.2} | {:.2} | {:.2} |",
                station["count"],
                ms("p50_us"),
                ms("p99_us"),
                ms("max_us")
            )?;
        }
        Ok(text)
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
    let date = shell("date", &["+%Y-%m-%d-%H%M"]);
    let folder = out.join(format!("{date}-{name}"));
    std::fs::create_dir_all(&folder)?;
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
    [
        ("kernel", shell("uname", &["-srvm"])),
        ("cpu", shell("sh", &["-c", "grep -m1 'model name' /proc/cpuinfo; nproc"])),
        ("memory", shell("sh", &["-c", "head -1 /proc/meminfo"])),
        ("mount", shell("findmnt", &["-T", &scratch])),
        ("command", std::env::args().collect::<Vec<_>>().join(" ")),
        ("commit", shell("git", &["describe", "--always", "--dirty"])),
    ]
    .iter()
    .map(|(name, text)| format!("{name}: {text}\n"))
    .collect()
}
