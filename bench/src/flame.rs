//! What perf recorded as a flame graph.

use std::error::Error;
use std::fs::File;
use std::io::{BufReader, BufWriter, Cursor};
use std::path::Path;
use std::process::Command;

/// Writes a flame graph beside perf's data, and removes the data, which is large.
pub(crate) fn write(data: &Path) -> Result<(), Box<dyn Error>> {
    let script = Command::new("perf").arg("script").arg("--no-inline").arg("-i").arg(data).output()?;
    let mut folded = Vec::new();
    use inferno::collapse::Collapse;
    let mut folder = inferno::collapse::perf::Folder::default();
    folder.collapse(BufReader::new(Cursor::new(script.stdout)), &mut folded)?;
    let mut options = inferno::flamegraph::Options::default();
    options.min_width = 0.3;
    let out = BufWriter::new(File::create(data.with_extension("svg"))?);
    inferno::flamegraph::from_reader(&mut options, folded.as_slice(), out)?;
    std::fs::write(data.with_extension("folded"), folded)?;
    std::fs::remove_file(data)?;
    Ok(())
}
