//! Runs a question: candidates by name, chunks by the index, rows by reading what is still open.
//!
//! Guarantees: a topic is in the answer exactly if one of its durable rows, tail included, satisfies what
//! is asked of its tag (INV-6); bulk data is read only of chunks that the index leaves open, and of
//! them only the columns asked for. Answers are sorted by name.

use crate::limits;
use crate::ontology::{Registry, nearest};
use crate::query::names::{int_satisfies, text_satisfies, topic_name_satisfies};
use crate::query::plan::{Bound, Verdict, bind, resolve};
use crate::query::refine::matching;
use crate::query::times::{Builder, Interval, Range, Runs, intersect, union};
use crate::query::{Content, Expr, Filter, Query, QueryError};
use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use futures::{StreamExt, TryStreamExt};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use storage::StorageError;
use storage::catalog::records::{SequenceRecord, TopicRecord};
use storage::catalog::skip::{SkipCursor, unfolded_topics};
use storage::catalog::{Catalog, Look, View};
use storage::chunk::record::SkipRecord;
use storage::ids::{SequenceId, TopicNo};
use storage::ontology::Ontology;
use storage::read::{Loader, Place, TopicView, Window};
use storage::schema::{TIME_COLUMN, parquet_leaves};

type Result<T> = std::result::Result<T, QueryError>;

/// What questions are asked of. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) catalog: Catalog,
    pub(crate) registry: Arc<Registry>,
    pub(crate) loader: Loader,
    pub(crate) data_dir: PathBuf,
}

/// What an answer cost.
#[derive(Debug, Default)]
pub(crate) struct Cost {
    /// Topics whose index was looked at.
    pub(crate) topics: AtomicU64,
    /// Chunks of them.
    pub(crate) chunks: AtomicU64,
    /// Chunks without a matching row, by the index alone.
    pub(crate) ruled_out: AtomicU64,
    /// Chunks of which every row matches, by the index alone.
    pub(crate) proven: AtomicU64,
    /// Chunks of which columns were read.
    pub(crate) read: AtomicU64,
    /// Bytes read from segments.
    pub(crate) bytes_read: AtomicU64,
    /// Bytes that the recordings asked have in segments, all topics; counted where it is to be explained.
    pub(crate) bytes_stored: AtomicU64,
}

impl Cost {
    fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// A topic in an answer.
#[derive(Debug, Clone)]
pub(crate) struct Hit {
    pub(crate) topic: TopicRecord,
    /// Runs of matching rows, where they were asked for.
    pub(crate) intervals: Vec<Interval>,
    /// First and last time of matching rows, where it was asked for.
    pub(crate) range: Option<Interval>,
}

/// What is to be found out about the times of matching rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Times {
    Nothing,
    Range,
    Intervals,
}

/// A sequence in an answer.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) sequence: SequenceRecord,
    pub(crate) topics: Vec<Hit>,
    /// Where the matching rows of all tags coincide, where intervals were asked for.
    pub(crate) windows: Vec<Interval>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) items: Vec<Item>,
    /// Something was cut: sequences by `limit`, or intervals by their bound.
    pub(crate) truncated: bool,
    pub(crate) cost: Arc<Cost>,
}

/// Topics that the index did not rule out, with what it says of each chunk.
struct Survivor {
    topic: TopicNo,
    verdicts: Vec<Verdict>,
    bound: Arc<(Bound, Arc<Ontology>)>,
}

/// Hits by sequence; of each part of the question one list of intervals by sequence.
#[derive(Default)]
struct Found {
    hits: BTreeMap<SequenceId, Vec<Hit>>,
    parts: Vec<HashMap<SequenceId, Vec<Interval>>>,
}

impl Engine {
    /// Answers a question.
    pub(crate) async fn run(&self, query: Query) -> Result<Answer> {
        let cost = Arc::new(Cost::default());
        self.check(&query.content)?;
        if query.explain {
            let (engine, filter, cost) = (self.clone(), query.sequence.clone(), Arc::clone(&cost));
            aside(move || {
                for sequence in engine.sequences(filter.as_ref())? {
                    for topic in engine.catalog.topics_of(sequence.id)? {
                        Cost::add(&cost.bytes_stored, engine.catalog.totals(topic.no)?.stored_bytes);
                    }
                }
                Ok(())
            })
            .await?;
        }
        let nothing_asked = query.sequence.is_none() && query.topic.is_none() && query.content.is_empty();
        let mut items = if nothing_asked {
            Vec::new()
        } else if query.content.is_empty() {
            self.by_name_aside(&query).await?
        } else {
            self.by_content(&query, &cost).await?
        };
        items.sort_by(|a, b| a.sequence.name.cmp(&b.sequence.name));
        let mut truncated = false;
        if let Some(limit) = query.limit
            && items.len() > limit
        {
            items.truncate(limit);
            truncated = true;
        }
        let topics: usize = items.iter().map(|item| item.topics.len().max(1)).sum();
        if topics > limits::QUERY_TOPICS_MAX {
            return Err(too_many_topics());
        }
        let mut left = limits::QUERY_INTERVALS_MAX;
        for item in &mut items {
            item.topics.sort_by(|a, b| a.topic.locator.cmp(&b.topic.locator));
            let all = item.topics.iter_mut().map(|hit| &mut hit.intervals).chain([&mut item.windows]);
            for intervals in all {
                truncated |= left < intervals.len();
                intervals.truncate(left);
                left -= intervals.len();
            }
        }
        Ok(Answer { items, truncated, cost })
    }

    /// Refuses tags and fields that no registered ontology has, and comparisons that fit none of its versions.
    pub(crate) fn check(&self, content: &Content) -> Result<()> {
        for (tag, expr) in &content.tags {
            let versions = self.registry.versions(tag);
            if versions.is_empty() {
                if is_older_tag(tag) {
                    continue;
                }
                let near =
                    self.registry.nearest(tag).map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
                let why = format!("is no ontology that was ever registered or recorded here{near}");
                return Err(QueryError::Invalid { key: tag.clone(), why });
            }
            check_fields(expr, &versions)?;
            let mut failed = None;
            let fits = versions.iter().filter(|version| match bind(expr, version) {
                Ok(_) => true,
                Err(error) => {
                    failed = Some(error);
                    false
                }
            });
            if fits.count() == 0
                && let Some(error) = failed
            {
                return Err(error);
            }
        }
        content.groups.iter().flatten().try_for_each(|content| self.check(content))
    }

    /// Sequences and topics by what they are, not by what is in them.
    fn by_name(&self, query: &Query) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        let mut listed = 0;
        for sequence in self.sequences(query.sequence.as_ref())? {
            let topics: Vec<Hit> = self
                .catalog
                .topics_of(sequence.id)?
                .into_iter()
                .filter(|topic| query.topic.as_ref().is_none_or(|filter| topic_satisfies(topic, filter)))
                .map(found)
                .collect();
            listed += topics.len().max(1);
            if listed > limits::QUERY_TOPICS_MAX {
                return Err(too_many_topics());
            }
            if query.topic.is_none() || !topics.is_empty() {
                items.push(Item { sequence, topics, windows: Vec::new() });
            }
        }
        Ok(items)
    }

    /// The same off the threads that serve calls: it reads whole records of everything there is.
    async fn by_name_aside(&self, query: &Query) -> Result<Vec<Item>> {
        let (engine, query) = (self.clone(), query.clone());
        aside(move || engine.by_name(&query)).await
    }

    fn sequences(&self, filter: Option<&Filter>) -> Result<Vec<SequenceRecord>> {
        let mut sequences = self.catalog.sequences()?;
        if let Some(filter) = filter {
            sequences.retain(|sequence| {
                filter.name.iter().all(|test| text_satisfies(&sequence.name, test))
                    && filter.created_ns.iter().all(|test| int_satisfies(sequence.created_at_ns, test))
                    && metadata_satisfies(&sequence.user_metadata, filter)
            });
        }
        Ok(sequences)
    }

    async fn by_content(&self, query: &Query, cost: &Arc<Cost>) -> Result<Vec<Item>> {
        let allowed = if query.sequence.is_none() && query.topic.is_none() {
            None
        } else {
            let items = self.by_name_aside(query).await?;
            Some(items.into_iter().flat_map(|item| item.topics).map(|hit| hit.topic.no).collect::<HashSet<_>>())
        };
        let times = match (query.intervals, query.time_range) {
            (true, _) => Times::Intervals,
            (false, true) => Times::Range,
            (false, false) => Times::Nothing,
        };
        let found = self.evaluate(&query.content, allowed.as_ref(), times, cost).await?;
        let mut items = Vec::new();
        for (id, topics) in found.hits {
            let Some(sequence) = self.catalog.sequence(id)? else { continue };
            let windows = if query.intervals {
                let parts: Vec<Vec<Interval>> =
                    found.parts.iter().map(|part| part.get(&id).cloned().unwrap_or_default()).collect();
                intersect(&parts, query.join_dt_ns)
            } else {
                Vec::new()
            };
            items.push(Item { sequence, topics, windows });
        }
        Ok(items)
    }

    /// Sequences for which everything asked holds, with the topics that make it so.
    async fn evaluate(
        &self,
        content: &Content,
        allowed: Option<&HashSet<TopicNo>>,
        times: Times,
        cost: &Arc<Cost>,
    ) -> Result<Found> {
        let mut all: Option<Found> = None;
        for (tag, expr) in &content.tags {
            let narrowed = self.narrow(all.as_ref(), allowed)?;
            let hits = self.of_tag(tag, expr, narrowed.as_ref().or(allowed), times, cost).await?;
            let mut found = Found::default();
            for hit in hits {
                found.hits.entry(hit.topic.sequence).or_default().push(hit);
            }
            found.parts.push(intervals_by_sequence(&found.hits));
            all = Some(combine(all, found));
        }
        for group in &content.groups {
            let narrowed = self.narrow(all.as_ref(), allowed)?;
            let mut either = Found::default();
            for alternative in group {
                let found = Box::pin(self.evaluate(alternative, narrowed.as_ref().or(allowed), times, cost)).await?;
                for (sequence, hits) in found.hits {
                    let known = either.hits.entry(sequence).or_default();
                    for hit in hits {
                        add_hit(known, hit);
                    }
                }
            }
            either.parts.push(intervals_by_sequence(&either.hits));
            all = Some(combine(all, either));
        }
        Ok(all.unwrap_or_default())
    }

    /// The topics of the sequences that are left, so that a second tag costs little.
    fn narrow(&self, so_far: Option<&Found>, allowed: Option<&HashSet<TopicNo>>) -> Result<Option<HashSet<TopicNo>>> {
        const SEQUENCES_MAX: usize = 1000;
        let Some(so_far) = so_far.filter(|found| found.hits.len() <= SEQUENCES_MAX) else {
            return Ok(None);
        };
        let mut topics = HashSet::new();
        for sequence in so_far.hits.keys() {
            topics.extend(self.catalog.topics_of(*sequence)?.into_iter().map(|topic| topic.no));
        }
        if let Some(allowed) = allowed {
            topics.retain(|topic| allowed.contains(topic));
        }
        Ok(Some(topics))
    }

    /// The topics of a tag with a matching row.
    async fn of_tag(
        &self,
        tag: &str,
        expr: &Expr,
        allowed: Option<&HashSet<TopicNo>>,
        times: Times,
        cost: &Arc<Cost>,
    ) -> Result<Vec<Hit>> {
        let survivors = {
            let (engine, tag, expr) = (self.clone(), tag.to_owned(), expr.clone());
            let (allowed, cost) = (allowed.cloned(), Arc::clone(cost));
            // The index is read through RocksDB, which blocks.
            aside(move || engine.scan(&tag, &expr, allowed.as_ref(), &cost)).await?
        };
        let hits: Vec<Option<Hit>> = futures::stream::iter(survivors)
            .map(|survivor| self.refine(survivor, times, cost))
            .buffered(limits::QUERY_READS)
            .try_collect()
            .await?;
        Ok(hits.into_iter().flatten().collect())
    }

    /// Looks through the index of all topics of a tag.
    fn scan(&self, tag: &str, expr: &Expr, allowed: Option<&HashSet<TopicNo>>, cost: &Cost) -> Result<Vec<Survivor>> {
        // The view first: a version registered behind it can only belong to topics it does not show.
        let pin = self.catalog.pin()?;
        let view = pin.view();
        let versions = self.registry.versions(tag);
        let mut bounds: HashMap<u32, Arc<(Bound, Arc<Ontology>)>> = HashMap::new();
        for version in &versions {
            // A version whose types do not fit has no matching row.
            if let Ok(bound) = bind(expr, version) {
                bounds.insert(version.record.version, Arc::new((bound, Arc::clone(version))));
            }
        }
        let apart: HashSet<TopicNo> = unfolded_topics(&self.catalog)?.into_iter().collect();
        let mut index = Index { view: &view, tag, cursors: HashMap::new() };
        let mut survivors = Vec::new();
        for topic in view.topics_of_tag(tag)? {
            if allowed.is_some_and(|allowed| !allowed.contains(&topic)) {
                continue;
            }
            let version = match versions.as_slice() {
                [only] => Some(only.record.version),
                _ => view.topic_ontology(topic)?.map(|of_topic| of_topic.version),
            };
            let Some(bound) = version.and_then(|version| bounds.get(&version)) else { continue };
            let totals = view.totals(topic)?;
            if totals.rows == 0 {
                continue;
            }
            let chunks = usize::try_from(totals.chunks).unwrap_or(usize::MAX);
            let lately = if apart.contains(&topic) { view.skips_apart(topic)? } else { Vec::new() };
            let verdicts = index.verdicts(topic, chunks, bound, &lately)?;
            let count = |wanted: Verdict| verdicts.iter().filter(|verdict| **verdict == wanted).count() as u64;
            let (ruled_out, proven) = (count(Verdict::None), count(Verdict::All));
            Cost::add(&cost.topics, 1);
            Cost::add(&cost.chunks, chunks as u64);
            Cost::add(&cost.ruled_out, ruled_out);
            Cost::add(&cost.proven, proven);
            let has_tail = totals.chunk_rows < totals.rows;
            if has_tail || ruled_out < verdicts.len() as u64 {
                survivors.push(Survivor { topic, verdicts, bound: Arc::clone(bound) });
            }
        }
        Ok(survivors)
    }

    /// Reads what the index left open of a topic. `None`: no row matches, or it was deleted meanwhile.
    async fn refine(&self, survivor: Survivor, times: Times, cost: &Cost) -> Result<Option<Hit>> {
        let topic = survivor.topic;
        match self.refine_known(survivor, times, cost).await {
            Err(error) if self.catalog.topic(topic)?.is_some() => Err(error),
            Err(_) => Ok(None),
            found => found,
        }
    }

    async fn refine_known(&self, survivor: Survivor, times: Times, cost: &Cost) -> Result<Option<Hit>> {
        if times == Times::Nothing && survivor.verdicts.contains(&Verdict::All) {
            return Ok(self.catalog.topic(survivor.topic)?.map(found));
        }
        let engine = self.clone();
        let Some(rows) = aside(move || engine.rows(survivor)).await? else { return Ok(None) };
        let hit = found(rows.view.record.clone());
        match times {
            Times::Nothing => Ok(rows.any(&self.loader, cost).await?.then_some(hit)),
            Times::Range => {
                let mut range = Range::default();
                rows.walk(&self.loader, Window::default(), &mut range, cost).await?;
                Ok(range.0.map(|range| Hit { range: Some(range), ..hit }))
            }
            Times::Intervals => {
                let mut runs = Runs::default();
                rows.walk(&self.loader, Window::default(), &mut runs, cost).await?;
                let range = runs.range();
                let intervals = runs.finish();
                Ok((!intervals.is_empty()).then_some(Hit { intervals, range, ..hit }))
            }
        }
    }

    /// The rows of a topic as they are now; `None` if it was deleted meanwhile.
    fn rows(&self, survivor: Survivor) -> Result<Option<Rows>> {
        let Some(topic) = self.catalog.topic(survivor.topic)? else { return Ok(None) };
        let view = {
            let pin = self.catalog.pin()?;
            let view = pin.view();
            TopicView::load(&view, &self.data_dir, topic)?
        };
        let Survivor { verdicts, bound, .. } = survivor;
        Ok(view.map(|view| Rows::new(Arc::new(view), verdicts, bound)))
    }

    /// Feeds the times of one topic's rows, and whether they match, to a builder.
    pub(crate) async fn times_of(
        &self,
        topic: &TopicRecord,
        expr: &Expr,
        window: Window,
        builder: &mut (impl Builder + Send),
    ) -> Result<()> {
        let (engine, of_topic, expr, cost) = (self.clone(), topic.clone(), expr.clone(), Arc::new(Cost::default()));
        let for_scan = Arc::clone(&cost);
        let survivors =
            aside(move || engine.scan(&of_topic.ontology_tag, &expr, Some(&HashSet::from([of_topic.no])), &for_scan))
                .await?;
        for survivor in survivors {
            if let Some(rows) = self.rows(survivor)? {
                rows.walk(&self.loader, window, builder, &cost).await?;
            }
        }
        Ok(())
    }
}

/// Runs what blocks, or takes long, off the threads that serve calls.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StorageError::Format { op: "query", text: error.to_string() }.into()),
    }
}

fn too_many_topics() -> QueryError {
    let remedy = "ask more narrowly";
    QueryError::TooMuch { what: "topics in the answer", most: limits::QUERY_TOPICS_MAX, remedy }
}

/// A topic in an answer. Its metadata, which bridges fill with whole schemas, is not part of any.
fn found(topic: TopicRecord) -> Hit {
    Hit { topic: TopicRecord { user_metadata: String::new(), ..topic }, intervals: Vec::new(), range: None }
}

/// Tags of generations before 0.6 (protocol.md section 4): known, though nothing of them may be here.
fn is_older_tag(tag: &str) -> bool {
    !tag.is_empty() && tag.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
}

/// A field must exist in some version of its ontology.
fn check_fields(expr: &Expr, versions: &[Arc<Ontology>]) -> Result<()> {
    match expr {
        Expr::Test(predicate) => {
            if versions.iter().any(|version| resolve(&predicate.path, version).is_some()) {
                return Ok(());
            }
            let known = versions.iter().flat_map(|version| &version.columns).filter(|column| !column.contains('@'));
            let near = nearest(&predicate.path.head, known.map(String::as_str));
            let near = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let tag = versions.first().map_or("", |version| &version.record.tag);
            Err(QueryError::Invalid {
                key: predicate.key.clone(),
                why: format!("is no field of ontology `{tag}`{near} (`flightbox ontology show {tag}` lists them)"),
            })
        }
        Expr::And(all) | Expr::Or(all) => all.iter().try_for_each(|expr| check_fields(expr, versions)),
        Expr::Not(inner) => check_fields(inner, versions),
    }
}

fn metadata_satisfies(text: &str, filter: &Filter) -> bool {
    if filter.metadata.is_empty() {
        return true;
    }
    let metadata = serde_json::from_str(text).unwrap_or(serde_json::Value::Null);
    filter.metadata.iter().all(|(path, test)| path.satisfies(&metadata, test))
}

fn topic_satisfies(topic: &TopicRecord, filter: &Filter) -> bool {
    filter.name.iter().all(|test| topic_name_satisfies(&topic.locator, test))
        && filter.created_ns.iter().all(|test| int_satisfies(topic.created_at_ns, test))
        && filter.ontology_tag.iter().all(|test| text_satisfies(&topic.ontology_tag, test))
        && filter.format.iter().all(|test| text_satisfies(topic.format.name(), test))
        && metadata_satisfies(&topic.user_metadata, filter)
}

fn intervals_by_sequence(hits: &BTreeMap<SequenceId, Vec<Hit>>) -> HashMap<SequenceId, Vec<Interval>> {
    hits.iter()
        .map(|(sequence, hits)| (*sequence, union(hits.iter().flat_map(|hit| hit.intervals.clone()).collect())))
        .collect()
}

/// Adds a topic, which may be there already by another part of the question.
fn add_hit(hits: &mut Vec<Hit>, hit: Hit) {
    match hits.iter_mut().find(|known| known.topic.no == hit.topic.no) {
        Some(known) => {
            let both = std::mem::take(&mut known.intervals).into_iter().chain(hit.intervals);
            known.intervals = union(both.collect());
        }
        None => hits.push(hit),
    }
}

/// Sequences in both, with the topics of both.
fn combine(so_far: Option<Found>, mut found: Found) -> Found {
    let Some(mut all) = so_far else { return found };
    all.hits.retain(|sequence, _| found.hits.contains_key(sequence));
    for (sequence, hits) in &mut all.hits {
        for hit in found.hits.remove(sequence).unwrap_or_default() {
            add_hit(hits, hit);
        }
    }
    all.parts.extend(found.parts);
    all
}

/// The index of one tag, read topic by topic.
struct Index<'v> {
    view: &'v View<'v>,
    tag: &'v str,
    cursors: HashMap<String, SkipCursor<'v>>,
}

impl<'v> Index<'v> {
    fn cursor(&mut self, column: &str) -> Result<&mut SkipCursor<'v>> {
        if !self.cursors.contains_key(column) {
            let cursor = self.view.skip_cursor(self.tag, column)?;
            self.cursors.insert(column.to_owned(), cursor);
        }
        match self.cursors.get_mut(column) {
            Some(cursor) => Ok(cursor),
            None => Err(StorageError::Gone.into()),
        }
    }

    /// What the index says of each chunk of a topic. `lately`: statistics that lie apart.
    fn verdicts(
        &mut self,
        topic: TopicNo,
        chunks: usize,
        bound: &(Bound, Arc<Ontology>),
        lately: &[SkipRecord],
    ) -> Result<Vec<Verdict>> {
        let (expr, ontology) = bound;
        expr.chunk_verdicts(chunks, &mut |column, see| {
            self.cursor(column)?.blocks(topic, &mut |block| {
                (0..block.chunks()).for_each(|index| see(&block.get(index)));
                Ok(())
            })?;
            if let Some(at) = ontology.column(column) {
                lately.iter().filter_map(|record| record.fields.get(at)).for_each(see);
            }
            Ok(())
        })
    }
}

/// The rows of one topic and what is asked of them.
pub(crate) struct Rows {
    view: Arc<TopicView>,
    verdicts: Vec<Verdict>,
    bound: Arc<(Bound, Arc<Ontology>)>,
    /// Parquet leaves that decide, and the one with the time.
    columns: Vec<usize>,
    time: Vec<usize>,
}

impl Rows {
    fn new(view: Arc<TopicView>, verdicts: Vec<Verdict>, bound: Arc<(Bound, Arc<Ontology>)>) -> Self {
        let time = parquet_leaves(&view.schema.stored, TIME_COLUMN, None);
        let columns = bound.0.columns_to_read(&bound.1);
        Self { view, verdicts, bound, columns, time }
    }

    fn verdict(&self, place: Place) -> Verdict {
        match place {
            // A chunk that was made of the tail meanwhile has no verdict yet.
            Place::Chunk(index) => self.verdicts.get(index).copied().unwrap_or(Verdict::Some),
            Place::Tail(_) => Verdict::Some,
        }
    }

    /// Whether a row matches.
    async fn any(&self, loader: &Loader, cost: &Cost) -> Result<bool> {
        for place in self.view.places().into_iter().filter(|place| self.verdict(*place) != Verdict::None) {
            if self.load(loader, place, cost).await?.1.contains(&true) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Times of a place's rows in arrival order, and which match.
    async fn load(&self, loader: &Loader, place: Place, cost: &Cost) -> Result<(Vec<i64>, Vec<bool>)> {
        let verdict = self.verdict(place);
        let mut leaves = self.time.clone();
        if verdict == Verdict::Some {
            leaves.extend(&self.columns);
        }
        leaves.sort_unstable();
        leaves.dedup();
        let (batch, bytes) = loader.load_leaves(&self.view, place, &leaves).await?;
        if matches!(place, Place::Chunk(_)) {
            Cost::add(&cost.read, 1);
            Cost::add(&cost.bytes_read, bytes);
        }
        let bound = Arc::clone(&self.bound);
        aside(move || {
            let times = batch.column_by_name(TIME_COLUMN).and_then(|column| column.as_primitive_opt::<Int64Type>());
            let times = times.ok_or(StorageError::Gone)?.values().to_vec();
            let matches = match verdict {
                Verdict::All => vec![true; times.len()],
                Verdict::None => vec![false; times.len()],
                Verdict::Some => matching(&bound.0, &batch)?.iter().collect(),
            };
            Ok((times, matches))
        })
        .await
    }

    /// Feeds the rows of a window to a builder in time order.
    pub(crate) async fn walk(
        &self,
        loader: &Loader,
        window: Window,
        builder: &mut (impl Builder + Send),
        cost: &Cost,
    ) -> Result<()> {
        for group in self.view.time_groups() {
            let times: Vec<Interval> = group.iter().filter_map(|place| self.view.time_of(*place)).collect();
            let (Some(first), Some(last)) =
                (times.iter().map(|time| time.0).min(), times.iter().map(|time| time.1).max())
            else {
                continue;
            };
            if !window.meets((first, last)) {
                continue;
            }
            let all = |wanted: Verdict| group.iter().all(|place| self.verdict(*place) == wanted);
            if all(Verdict::None) {
                // Rows outside of the window do not count, not even as gaps.
                if window.covers((first, last)) {
                    builder.row(first, false);
                    continue;
                }
            } else if all(Verdict::All) && window.covers((first, last)) && builder.block(first, last) {
                continue;
            }
            let mut rows: Vec<(i64, bool)> = Vec::new();
            for place in group {
                let (times, matches) = self.load(loader, place, cost).await?;
                rows.extend(times.into_iter().zip(matches).filter(|(time, _)| window.holds(*time)));
                if rows.len() > limits::QUERY_MERGE_ROWS_MAX {
                    let remedy = "its rows arrived in no order of time; ask without times, or in a narrower window";
                    return Err(QueryError::TooMuch {
                        what: "rows to be put in order of time",
                        most: limits::QUERY_MERGE_ROWS_MAX,
                        remedy,
                    });
                }
            }
            if !rows.is_sorted_by_key(|row| row.0) {
                rows.sort_by_key(|row| row.0);
            }
            for (time, matches) in rows {
                builder.row(time, matches);
            }
        }
        Ok(())
    }
}
