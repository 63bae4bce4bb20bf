//! Every byte of a topic against what was written: heads, chunks, padding, trailers, footers, lengths, the
//! index against the rows, the tail.
//!
//! Guarantees: reads only; what seems damaged is read a second time before it is said to be, so that one
//! read error of a bus or a cable hides nothing; a finding names file, offset and what is wrong, and touches
//! one chunk, never more (INV-9). Whoever asked decides what becomes of it.

use crate::catalog::Look;
use crate::catalog::records::{SegmentRecord, TopicRecord};
use crate::catalog::skip::indexed;
use crate::catalog::{Catalog, Pin};
use crate::chunk::decode::{ChunkBytes, verify_columns};
use crate::chunk::record::{ChunkRecord, SkipRecord};
use crate::chunk::stats::collect;
use crate::error::{Result, StorageError};
use crate::limits::BLOCK_BYTES;
use crate::ontology::Ontology;
use crate::read::{Loader, TopicView};
use crate::segment::{self, Head, Trailer, footer_is_whole};
use crate::turn::Turn;
use bytes::Bytes;
use parquet::file::metadata::ParquetMetaDataReader;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What kind of place a finding is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The file is missing or has another length.
    File,
    /// The head of a segment.
    Head,
    /// A row group.
    Chunk,
    /// The zeros behind a row group.
    Padding,
    /// A chunk's trailer.
    Trailer,
    /// The Parquet footer.
    Footer,
    /// The skip index.
    Index,
    /// The tail.
    Tail,
    /// The catalog itself.
    Catalog,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The topic; empty for the catalog as a whole.
    pub topic: String,
    /// The file, if it is one.
    pub file: Option<PathBuf>,
    /// Where in it, in bytes.
    pub at: u64,
    /// What kind of place.
    pub part: Part,
    /// What is wrong there.
    pub what: String,
    /// The first row of the chunk whose rows cannot be had; `None` where all rows are whole.
    pub lost_chunk: Option<u64>,
}

/// What was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// Topics.
    pub topics: u64,
    /// Chunks.
    pub chunks: u64,
    /// Rows, the tail included.
    pub rows: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Chunks, by their first row, that are whole, of those that had been marked damaged.
    pub whole_again: Vec<u64>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Looked {
    /// Adds another look.
    pub fn add(&mut self, mut other: Self) {
        self.topics += other.topics;
        self.chunks += other.chunks;
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.whole_again.append(&mut other.whole_again);
        self.findings.append(&mut other.findings);
    }
}

/// One topic, as the catalog has it, ready to be compared with its files.
#[derive(Debug)]
pub struct Subject {
    view: Arc<TopicView>,
    segments: Vec<SegmentRecord>,
    ontology: Option<Ontology>,
    index: Vec<Option<SkipRecord>>,
}

impl Subject {
    /// Reads what the catalog has; `None` for a topic that never had a DoPut.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn load(pin: &Pin, data_dir: &Path, topic: TopicRecord) -> Result<Option<Self>> {
        let look = pin.view();
        let no = topic.no;
        let segments = look.segments(no)?;
        let ontology = look.ontology_of(no)?;
        let Some(view) = TopicView::load(&look, data_dir, topic)? else { return Ok(None) };
        let rows: Vec<u64> = view.chunks().iter().map(|chunk| chunk.first_row).collect();
        let index = match &ontology {
            Some(ontology) => indexed(&look, no, ontology, &rows)?,
            None => Vec::new(),
        };
        Ok(Some(Self { view: Arc::new(view), segments, ontology, index }))
    }

    /// How many chunks there are to look at.
    pub fn chunks(&self) -> usize {
        self.view.chunks().len()
    }

    /// Position of the chunk that starts at a row.
    pub fn position(&self, first_row: u64) -> Option<usize> {
        self.view.chunks().iter().position(|chunk| chunk.first_row == first_row)
    }

    fn path(&self, segment: u32) -> PathBuf {
        self.view.dir().join(segment::file_name(segment))
    }

    fn finding(&self, segment: u32, at: u64, part: Part, what: String) -> Finding {
        let topic = self.view.record.locator.clone();
        Finding { topic, file: Some(self.path(segment)), at, part, what, lost_chunk: None }
    }

    /// Looks at everything but the chunks: files, heads, footers, the tail.
    pub async fn frame(&self, loader: &Loader) -> Looked {
        let mut looked = Looked { topics: 1, ..Looked::default() };
        for segment in &self.segments {
            self.segment(loader, segment, &mut looked).await;
        }
        for run in self.view.tail() {
            looked.rows += run.end_row() - run.first_row;
            if let Err(error) = run.unpack(&self.view.schema.stored) {
                let topic = self.view.record.locator.clone();
                let what = format!("batches from {} on: {error}", run.first_batch);
                looked.findings.push(Finding { topic, file: None, at: 0, part: Part::Tail, what, lost_chunk: None });
            }
        }
        looked
    }

    async fn segment(&self, loader: &Loader, segment: &SegmentRecord, looked: &mut Looked) {
        let path = self.path(segment.no);
        let length = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) => {
                looked.findings.push(self.finding(segment.no, 0, Part::File, error.to_string()));
                return;
            }
        };
        if let Some(sealed) = segment.sealed_length.filter(|sealed| *sealed != length) {
            let what = format!("has {length} bytes, was sealed with {sealed}");
            looked.findings.push(self.finding(segment.no, length.min(sealed), Part::File, what));
        }
        let first =
            self.view.chunks().iter().filter(|chunk| chunk.segment == segment.no).map(|chunk| chunk.offset).min();
        let head_end = first.unwrap_or(segment.end_offset);
        let mut head = self.head(loader, &path, head_end).await;
        if head.is_err() {
            head = self.head(loader, &path, head_end).await;
        }
        if let Err(error) = head {
            looked.findings.push(self.finding(segment.no, 0, Part::Head, error.to_string()));
        }
        looked.bytes += head_end;
        if let Some(sealed) = segment.sealed_length {
            let chunks = self.view.chunks().iter().filter(|chunk| chunk.segment == segment.no).count();
            let mut footer = footer(loader, &path, (segment.end_offset, sealed), chunks).await;
            if footer.is_err() {
                footer = self::footer(loader, &path, (segment.end_offset, sealed), chunks).await;
            }
            if let Err(error) = footer {
                looked.findings.push(self.finding(segment.no, segment.end_offset, Part::Footer, error.to_string()));
            }
            looked.bytes += sealed - segment.end_offset;
        }
    }

    async fn head(&self, loader: &Loader, path: &Path, end: u64) -> Result<()> {
        check_head(&loader.raw(path, 0, end).await?, &self.view.record)
    }

    /// Looks at one chunk: every column, the padding, the trailer, and its statistics in the index.
    pub async fn chunk(&self, loader: &Loader, index: usize) -> Looked {
        let mut looked = Looked { chunks: 1, ..Looked::default() };
        let Some(chunk) = self.view.chunks().get(index) else { return looked };
        // Bounds the chunks that are held at once, with those of readers.
        let Ok(place) = loader.place().await else { return looked };
        looked.rows = chunk.rows();
        looked.bytes = chunk.padded_length;
        let path = self.path(chunk.segment);
        // Twice: what is damaged stays so, what a cable did to one read does not.
        let mut problem = self.look_at(loader, &place, &path, (chunk, index)).await;
        if problem.is_err() {
            problem = self.look_at(loader, &place, &path, (chunk, index)).await;
        }
        match problem {
            Ok(()) if self.view.is_damaged(chunk.first_row) => looked.whole_again.push(chunk.first_row),
            Ok(()) => {}
            Err((part, what)) => {
                let mut finding = self.finding(chunk.segment, chunk.offset, part, what);
                finding.lost_chunk = (part == Part::Chunk).then_some(chunk.first_row);
                looked.findings.push(finding);
            }
        }
        looked
    }

    async fn look_at(
        &self,
        loader: &Loader,
        place: &Turn,
        path: &Path,
        (chunk, index): (&ChunkRecord, usize),
    ) -> std::result::Result<(), (Part, String)> {
        // What this machine cannot do now (too many files, no memory) says nothing about the bytes.
        let broken = |error: StorageError| {
            let part = if error.is_damage() || is_gone_for_good(&error) { Part::Chunk } else { Part::File };
            (part, error.to_string())
        };
        let bytes = loader.raw(path, chunk.offset, chunk.padded_length).await.map_err(broken)?;
        let length = usize::try_from(chunk.length).unwrap_or(usize::MAX);
        let (data, rest) = (bytes.slice(..length.min(bytes.len())), bytes.slice(length.min(bytes.len())..));
        let data = ChunkBytes::whole(chunk.offset, data);
        verify_columns(path, chunk, &data, None).map_err(broken)?;
        check_rest(&rest, chunk)?;
        let (Some(ontology), Some(before)) = (&self.ontology, self.index.get(index)) else { return Ok(()) };
        let batch = loader.decode(place, &self.view, chunk, data).await.map_err(broken)?;
        let fresh = SkipRecord { fields: collect(&ontology.stored, &ontology.record.derived, &[batch]) };
        // Without an entry it was recorded without an index, or before there was one: queries read it.
        match before {
            Some(before) if *before != fresh => {
                Err((Part::Index, "the index is not what its rows say; run `flightbox reindex`".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// Whether an error is a sector that cannot be read, or a file that ends too early.
fn is_gone_for_good(error: &StorageError) -> bool {
    let StorageError::Io { source, .. } = error else { return false };
    let unreadable = rustix::io::Errno::IO.raw_os_error();
    source.kind() == std::io::ErrorKind::UnexpectedEof || source.raw_os_error() == Some(unreadable)
}

async fn footer(loader: &Loader, path: &Path, (from, to): (u64, u64), chunks: usize) -> Result<()> {
    check_footer(&loader.raw(path, from, to - from).await?, chunks)
}

fn check_head(bytes: &Bytes, topic: &TopicRecord) -> Result<()> {
    let broken = |text: &str| StorageError::Decode { what: "segment head", text: text.to_owned() };
    match Head::decode(bytes) {
        Some(head) if head.facts.topic.id == topic.id => Ok(()),
        Some(head) => Err(broken(&format!("it is that of {}", head.facts.topic.locator))),
        // Format 2 had Parquet's magic and zeros.
        None => {
            let (magic, zeros) = bytes.split_at(bytes.len().min(4));
            let old = magic == b"PAR1" && bytes.len() as u64 == BLOCK_BYTES && zeros.iter().all(|byte| *byte == 0);
            if old { Ok(()) } else { Err(broken("its checksum does not fit")) }
        }
    }
}

fn check_footer(bytes: &Bytes, chunks: usize) -> Result<()> {
    let broken = |text: String| StorageError::Decode { what: "Parquet footer", text };
    if footer_is_whole(bytes) == Some(false) {
        return Err(broken("its checksum does not fit".to_owned()));
    }
    let metadata = ParquetMetaDataReader::new().parse_and_finish(bytes)?;
    if metadata.num_row_groups() != chunks {
        return Err(broken(format!("it has {} row groups, {chunks} chunks were committed", metadata.num_row_groups())));
    }
    Ok(())
}

/// What follows a row group: zeros, then its trailer. A trailer that says less of itself than its chunk's
/// record is one of another chunk.
fn check_rest(rest: &Bytes, chunk: &ChunkRecord) -> std::result::Result<(), (Part, String)> {
    let trailer = match Trailer::decode(rest) {
        Some(trailer) if trailer.record == *chunk => trailer,
        Some(_) => return Err((Part::Trailer, "it is that of another chunk".to_owned())),
        None => return Err((Part::Trailer, "its checksum does not fit".to_owned())),
    };
    let rows: u64 = trailer.marks.iter().map(|mark| u64::from(mark.rows)).sum();
    if rows != chunk.rows() {
        return Err((Part::Trailer, format!("its batches have {rows} rows, the chunk has {}", chunk.rows())));
    }
    let length = Trailer::length(rest).unwrap_or(0) + segment::TRAILER_TAIL_BYTES;
    let zeros = rest.get(..rest.len().saturating_sub(length)).unwrap_or(&[]);
    match zeros.iter().position(|byte| *byte != 0) {
        Some(at) => Err((Part::Padding, format!("byte {} is not zero", chunk.offset + chunk.length + at as u64))),
        None => Ok(()),
    }
}

/// Reads every value of the catalog, so that RocksDB checks every block.
///
/// # Errors
/// When the catalog is closed; what is damaged is a finding.
pub fn verify_catalog(catalog: &Catalog) -> Result<Vec<Finding>> {
    let pin = catalog.pin()?;
    let mut findings = Vec::new();
    for family in crate::catalog::keys::Family::ALL {
        if let Err(error) = pin.scan(family, b"", b"", &mut |_, _| Ok(true)) {
            let what = format!("{}: {error}", family.name());
            findings.push(Finding {
                topic: String::new(),
                file: None,
                at: 0,
                part: Part::Catalog,
                what,
                lost_chunk: None,
            });
        }
    }
    Ok(findings)
}
