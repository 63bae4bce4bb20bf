//! Runs a question: candidates by name, chunks by the index, rows by reading what is still open.
//!
//! Guarantees: a topic is in the answer exactly if one of its durable rows, tail included, satisfies what
//! is asked of its tag (INV-6); bulk data is read only of chunks that the index leaves open, and of
//! them only the columns asked for. Answers are sorted by name.

use crate::limits;
use crate::ontology::{Registry, nearest};
use crate::query::answer::{Answer, Cost, Found, Hit, Item, Times, add_hit, combine, found, intervals_by_sequence};
use crate::query::names::{int_satisfies, text_satisfies, topic_name_satisfies};
use crate::query::plan::{Bound, Verdict, bind, resolve};
use crate::query::rows::Rows;
use crate::query::times::{Builder, Interval, Range, Runs, intersect};
use crate::query::{Content, Expr, Filter, Query, QueryError, Result};
use futures::{StreamExt, TryStreamExt};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use storage::StorageError;
use storage::catalog::records::{SequenceRecord, TopicRecord};
use storage::catalog::skip::{SkipCursor, unfolded_topics};
use storage::catalog::{Catalog, Look, View};
use storage::chunk::record::SkipRecord;
use storage::ids::TopicNo;
use storage::ontology::Ontology;
use storage::read::{Loader, TopicView, Window};
use storage::turn::Turn;

/// What a question is asked of, and its turn. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) catalog: Catalog,
    pub(crate) registry: Arc<Registry>,
    pub(crate) loader: Loader,
    pub(crate) data_dir: PathBuf,
    pub(crate) turn: Turn,
}

/// What failed, in errors.
pub(super) const OP: &str = "query";

/// Topics that the index did not rule out, with what it says of each chunk.
struct Survivor {
    topic: TopicNo,
    verdicts: Vec<Verdict>,
    bound: Arc<(Bound, Arc<Ontology>)>,
}

impl Engine {
    /// Answers a question.
    pub(crate) async fn run(&self, query: Query) -> Result<Answer> {
        let cost = Arc::new(Cost::default());
        self.check(&query.content)?;
        if query.explain {
            let (engine, filter, cost) = (self.clone(), query.sequence.clone(), Arc::clone(&cost));
            self.turn
                .aside(OP, move || {
                    for sequence in engine.sequences(filter.as_ref())? {
                        for topic in engine.catalog.topics_of(sequence.id)? {
                            Cost::add(&cost.bytes_stored, engine.catalog.totals(topic.no)?.stored_bytes);
                        }
                    }
                    Ok::<_, QueryError>(())
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
        self.turn.aside(OP, move || engine.by_name(&query)).await
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
            self.turn.aside(OP, move || engine.scan(&tag, &expr, allowed.as_ref(), &cost)).await?
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
        let Some(rows) = self.turn.aside(OP, move || engine.rows(survivor)).await? else { return Ok(None) };
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
        Ok(view.map(|view| Rows::new(Arc::new(view), verdicts, bound, self.turn.clone())))
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
        let survivors = self
            .turn
            .aside(OP, move || {
                engine.scan(&of_topic.ontology_tag, &expr, Some(&HashSet::from([of_topic.no])), &for_scan)
            })
            .await?;
        for survivor in survivors {
            if let Some(rows) = self.rows(survivor)? {
                rows.walk(&self.loader, window, builder, &cost).await?;
            }
        }
        Ok(())
    }
}

fn too_many_topics() -> QueryError {
    let remedy = "ask more narrowly";
    QueryError::TooMuch { what: "topics in the answer", most: limits::QUERY_TOPICS_MAX, remedy }
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
