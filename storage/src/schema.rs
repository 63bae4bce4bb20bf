//! What a topic's rows look like on the wire and on disk, and the way between the two.
//!
//! The writer's schema is kept to the letter and is what goes out again. On disk two things
//! differ: dictionaries are stored as their values (two dictionaries in one row group overflow a
//! small key type on read), and a struct without fields gets a hidden one (Parquet has no empty
//! group). Everything else Parquet gives back as it came, and [`TopicSchema::check`] proves it for
//! each new schema by sending an empty and a small batch through encode and decode.

use crate::chunk::{Compression, Layout, TopicEncoder};
use crate::error::{Result, StorageError};
use crate::limits;
use arrow::array::{Array, ArrayData, ArrayRef, BooleanArray, RecordBatch, layout, make_array};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, IntervalUnit, Schema, SchemaRef};
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, Weak};

/// The column every topic must have: receive or sensor time in nanoseconds since 1970, int64.
pub const TIME_COLUMN: &str = "timestamp_ns";

/// Name of the child that an empty struct gets on disk.
const EMPTY_STRUCT_CHILD: &str = "__flightbox_empty";

/// A checked schema: what comes in, what lies on disk, where the time is.
#[derive(Debug, Clone)]
pub struct TopicSchema {
    /// The writer's own schema, which is also the outgoing one.
    pub wire: SchemaRef,
    /// The schema of the Parquet files.
    pub stored: SchemaRef,
    /// Index of [`TIME_COLUMN`] among the top-level columns.
    pub time_column: usize,
    /// Number of leaf columns of the stored schema.
    pub leaves: usize,
    /// Whether the writer's schema has dictionaries.
    dictionaries: bool,
    /// Whether the columns lie on disk in the types in which they come.
    alike: bool,
    /// How its rows lie in an uncompressed row group, once somebody asked.
    layout: OnceLock<Arc<Layout>>,
}

/// A schema that came back equal, now or when it was accepted, as a hash with a key that nobody knows (it may be as large
/// as a message), and what topics have of it now.
type Known = (u64, Weak<TopicSchema>);

/// The schemas checked last, the latest last: a vehicle has hundreds of topics of a few.
static KNOWN: LazyLock<(RandomState, Mutex<VecDeque<Known>>)> = LazyLock::new(Default::default);
/// Schemas kept there.
const KNOWN_MAX: usize = 64;

impl TopicSchema {
    /// Accepts a schema that can be stored and given back unchanged; names the field otherwise. Topics of equal schemas
    /// without dictionaries share one, so that what is looked up in it for every message stays in the processor's caches.
    ///
    /// # Errors
    /// [`StorageError::Unstorable`] with the first field that does not come back as it went in.
    pub fn check(wire: SchemaRef) -> Result<Arc<Self>> {
        Self::known(wire, crate::chunk::prove_round_trip)
    }

    /// The same without the proof, for a schema that was accepted once.
    ///
    /// # Errors
    /// As [`Self::check`], for what can be told from the types alone.
    pub fn accepted(wire: SchemaRef) -> Result<Arc<Self>> {
        Self::known(wire, |_| Ok(()))
    }

    /// What topics have of an equal schema now; otherwise a new one, proven unless it was lately.
    fn known(wire: SchemaRef, prove: impl FnOnce(&Self) -> Result<()>) -> Result<Arc<Self>> {
        let (key, known) = &*KNOWN;
        let hash = key.hash_one(&wire);
        let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known().iter().find(|(of, _)| *of == hash).map(|(_, schema)| schema.upgrade());
        // Equal fields may differ in the ids of their dictionaries, which messages refer to, and in their order.
        if let Some(Some(shared)) = &found
            && !shared.dictionaries
            && shared.wire == wire
        {
            return Ok(Arc::clone(shared));
        }
        let schema = Arc::new(Self::derive(wire)?);
        if found.is_none() {
            prove(&schema)?;
        }
        let mut known = known();
        known.retain(|(of, _)| *of != hash);
        if known.len() >= KNOWN_MAX {
            known.pop_front();
        }
        known.push_back((hash, Arc::downgrade(&schema)));
        Ok(schema)
    }

    /// The same without the proof, for a schema that passed it once and comes from the catalog.
    ///
    /// # Errors
    /// As [`Self::check`], for what can be told from the types alone.
    pub fn derive(wire: SchemaRef) -> Result<Self> {
        let time_column = match wire.column_with_name(TIME_COLUMN) {
            Some((index, field)) if field.data_type() == &DataType::Int64 => index,
            Some((_, field)) => {
                return Err(StorageError::Unstorable {
                    field: TIME_COLUMN.to_owned(),
                    data_type: field.data_type().to_string(),
                    why: "the time column must be int64 nanoseconds".to_owned(),
                });
            }
            None => {
                return Err(StorageError::Unstorable {
                    field: TIME_COLUMN.to_owned(),
                    data_type: "(absent)".to_owned(),
                    why: "every topic needs a top-level int64 column `timestamp_ns`".to_owned(),
                });
            }
        };
        let mut names = std::collections::HashSet::new();
        let mut row_bytes = 0_u64;
        for field in wire.fields() {
            storable(field, field.name(), 0)?;
            let refuse = |why: String| StorageError::Unstorable {
                field: field.name().clone(),
                data_type: field.data_type().to_string(),
                why,
            };
            if !names.insert(field.name()) {
                return Err(refuse("another column has the same name".to_owned()));
            }
            row_bytes = row_bytes.saturating_add(fixed_row_bytes(field.data_type()));
            if row_bytes > limits::FIXED_ROW_BYTES_MAX {
                let most = limits::FIXED_ROW_BYTES_MAX;
                return Err(refuse(format!("with it one row takes more than {most} bytes by its types alone")));
            }
        }
        let fields: Fields = wire.fields().iter().map(stored_field).collect();
        let leaves = fields.iter().map(|field| leaf_count(field.data_type())).sum();
        if leaves > limits::SCHEMA_LEAVES_MAX {
            return Err(StorageError::Unstorable {
                field: "(schema)".to_owned(),
                data_type: format!("{leaves} leaf columns"),
                why: format!("at most {} leaf columns are taken", limits::SCHEMA_LEAVES_MAX),
            });
        }
        let dictionaries = wire.fields().iter().any(|field| has_dictionary(field.data_type()));
        let alike = &fields == wire.fields();
        let stored = Arc::new(Schema::new(fields));
        Ok(Self { stored, wire, time_column, leaves, dictionaries, alike, layout: OnceLock::new() })
    }

    /// An encoder for its rows; topics share what does not depend on them.
    ///
    /// # Errors
    /// When Parquet has no column type for a field.
    pub fn encoder(&self, compression: Compression) -> Result<TopicEncoder> {
        if compression != Compression::None {
            return TopicEncoder::new(&self.stored, compression);
        }
        let layout = match self.layout.get() {
            Some(layout) => layout,
            None => {
                let made = Arc::new(Layout::new(&self.stored, compression)?);
                self.layout.get_or_init(|| made)
            }
        };
        TopicEncoder::of(Arc::clone(layout), compression)
    }

    /// A batch as it came, in the types of the files; it may still have the metadata of the writer's schema.
    ///
    /// # Errors
    /// When a dictionary's values cannot be taken out.
    pub fn to_stored(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        if self.alike { Ok(batch.clone()) } else { retype_batch(batch, &self.stored) }
    }

    /// A batch from a file, in the writer's types.
    ///
    /// # Errors
    /// When a dictionary's distinct values exceed its key type; the caller sends fewer rows at once.
    pub fn to_wire(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        if self.dictionaries {
            // A slice of a list still has its whole child: only what these rows show may go into
            // their dictionaries.
            let rows = arrow::array::UInt64Array::from_iter_values(0..batch.num_rows() as u64);
            return retype_batch(&arrow::compute::take_record_batch(batch, &rows)?, &self.wire);
        }
        retype_batch(batch, &self.wire)
    }
}

fn retype_batch(batch: &RecordBatch, target: &SchemaRef) -> Result<RecordBatch> {
    let columns = batch
        .columns()
        .iter()
        .zip(target.fields())
        .map(|(column, field)| {
            if column.data_type() == field.data_type() {
                Ok(Arc::clone(column))
            } else {
                retype(column, field.data_type())
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::clone(target), columns, &options)?)
}

/// Rebuilds `array` as `target`, which differs from its type only by dictionaries, hidden struct
/// children and the names and metadata of nested fields.
fn retype(array: &ArrayRef, target: &DataType) -> Result<ArrayRef> {
    if array.data_type() == target {
        return Ok(Arc::clone(array));
    }
    match (array.data_type(), target) {
        (DataType::Dictionary(_, _), _) => {
            let DataType::Dictionary(_, values) = array.data_type() else { unreachable!("matched above") };
            retype(&arrow::compute::cast(array, values)?, target)
        }
        (_, DataType::Dictionary(_, values)) => Ok(arrow::compute::cast(&retype(array, values)?, target)?),
        (DataType::Struct(from), DataType::Struct(to)) if to.is_empty() || from.is_empty() => {
            let children =
                if to.is_empty() { Vec::new() } else { vec![BooleanArray::new_null(array.len()).into_data()] };
            let data = array.to_data();
            let rebuilt = ArrayData::builder(target.clone())
                .len(data.len())
                .nulls(data.nulls().cloned())
                .child_data(children)
                .build()?;
            Ok(make_array(rebuilt))
        }
        _ => {
            let data = array.to_data();
            let children = data
                .child_data()
                .iter()
                .zip(child_types(target))
                .map(|(child, child_type)| Ok(retype(&make_array(child.clone()), child_type)?.to_data()))
                .collect::<Result<Vec<_>>>()?;
            Ok(make_array(data.into_builder().data_type(target.clone()).child_data(children).build()?))
        }
    }
}

fn child_types(data_type: &DataType) -> Vec<&DataType> {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| field.data_type()).collect(),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _)
        | DataType::Map(field, _) => vec![field.data_type()],
        _ => Vec::new(),
    }
}

fn storable(field: &Field, path: &str, depth: usize) -> Result<()> {
    let refuse = |why: &str| {
        Err(StorageError::Unstorable {
            field: path.to_owned(),
            data_type: field.data_type().to_string(),
            why: why.to_owned(),
        })
    };
    if depth > limits::SCHEMA_DEPTH_MAX {
        return refuse("the schema is nested too deeply");
    }
    match field.data_type() {
        DataType::Union(_, _) => refuse("Parquet has no union"),
        DataType::RunEndEncoded(_, _) => refuse("Parquet has no run-end encoding"),
        DataType::Interval(IntervalUnit::MonthDayNano) => refuse("Parquet's interval has no nanoseconds"),
        DataType::Dictionary(_, values) => {
            storable(&Field::new("values", values.as_ref().clone(), true), &format!("{path}.values"), depth + 1)
        }
        DataType::Struct(fields) => {
            fields.iter().try_for_each(|child| storable(child, &format!("{path}.{}", child.name()), depth + 1))
        }
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => storable(child, &format!("{path}.{}", child.name()), depth + 1),
        _ => Ok(()),
    }
}

/// Bytes that one row takes at least, whatever its values: fixed sizes multiply through nested lists.
fn fixed_row_bytes(data_type: &DataType) -> u64 {
    match data_type {
        DataType::FixedSizeBinary(bytes) => u64::from(bytes.unsigned_abs()),
        DataType::FixedSizeList(child, length) => {
            fixed_row_bytes(child.data_type()).saturating_mul(u64::from(length.unsigned_abs()))
        }
        DataType::Struct(fields) => {
            fields.iter().fold(1, |sum: u64, field| sum.saturating_add(fixed_row_bytes(field.data_type())))
        }
        other => {
            let nested = child_types(other).into_iter().map(fixed_row_bytes).max().unwrap_or(0);
            nested.max(other.primitive_width().unwrap_or(1) as u64)
        }
    }
}

fn has_dictionary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Dictionary(_, _)) || child_types(data_type).into_iter().any(has_dictionary)
}

fn stored_field(field: &FieldRef) -> FieldRef {
    let stored = stored_type(field.data_type());
    if &stored == field.data_type() {
        Arc::clone(field)
    } else {
        Arc::new(field.as_ref().clone().with_data_type(stored))
    }
}

fn stored_type(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Dictionary(_, values) => stored_type(values),
        DataType::Struct(fields) if fields.is_empty() => {
            DataType::Struct(Fields::from(vec![Field::new(EMPTY_STRUCT_CHILD, DataType::Boolean, true)]))
        }
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(stored_field).collect()),
        DataType::List(child) => DataType::List(stored_field(child)),
        DataType::LargeList(child) => DataType::LargeList(stored_field(child)),
        DataType::ListView(child) => DataType::ListView(stored_field(child)),
        DataType::LargeListView(child) => DataType::LargeListView(stored_field(child)),
        DataType::FixedSizeList(child, length) => DataType::FixedSizeList(stored_field(child), *length),
        DataType::Map(child, sorted) => DataType::Map(stored_field(child), *sorted),
        plain => plain.clone(),
    }
}

fn leaf_count(data_type: &DataType) -> usize {
    let children = child_types(data_type);
    if children.is_empty() { 1 } else { children.into_iter().map(leaf_count).sum() }
}

/// The leaf at a dotted path through structs only, with the nulls of its parents. Names may contain
/// dots themselves: the first field that fits is taken.
pub fn flat_leaf(batch: &RecordBatch, path: &str) -> Option<ArrayRef> {
    leaf_at(batch, &flat_path(batch.schema_ref(), path)?)
}

/// Where [`flat_leaf`] finds its leaf: the index of a column, then of a field in each struct on the way.
pub(crate) fn flat_path(schema: &Schema, path: &str) -> Option<Vec<usize>> {
    let (mut fields, mut rest) = (schema.fields(), Some(path));
    let mut indices = Vec::new();
    while let Some(path) = rest {
        let step = |(index, field)| Some((index, step_into(field, path)?));
        let (index, next) = fields.iter().map(AsRef::as_ref).enumerate().find_map(step)?;
        indices.push(index);
        if next.is_some() {
            let DataType::Struct(children) = fields.get(index)?.data_type() else { return None };
            fields = children;
        }
        rest = next;
    }
    Some(indices)
}

/// The leaf at such a place, with the nulls of its parents.
pub(crate) fn leaf_at(batch: &RecordBatch, indices: &[usize]) -> Option<ArrayRef> {
    let (column, fields) = indices.split_first()?;
    let column = Arc::clone(batch.columns().get(*column)?);
    fields.iter().try_fold(column, |array, field| {
        let parent = arrow::array::AsArray::as_struct_opt(&array)?;
        (*field < parent.num_columns()).then(|| crate::chunk::stats::child_under_nulls(parent, *field))
    })
}

/// What is left of a path behind a field: nothing at its end, `None` if the path leads elsewhere.
fn step_into<'p>(field: &Field, path: &'p str) -> Option<Option<&'p str>> {
    match path.strip_prefix(field.name().as_str())? {
        "" => Some(None),
        rest => {
            let rest = rest.strip_prefix('.')?;
            let DataType::Struct(children) = field.data_type() else { return None };
            children.iter().any(|child| step_into(child, rest).is_some()).then_some(Some(rest))
        }
    }
}

/// The type of the field at a dotted path through structs only.
pub fn field_at<'s>(schema: &'s Schema, path: &str) -> Option<&'s DataType> {
    in_fields(schema.fields(), path)
}

/// The same inside of a type.
pub fn field_in<'s>(data_type: &'s DataType, path: &str) -> Option<&'s DataType> {
    match data_type {
        DataType::Struct(fields) => in_fields(fields, path),
        _ => None,
    }
}

fn in_fields<'s>(fields: &'s Fields, path: &str) -> Option<&'s DataType> {
    let (field, rest) = fields.iter().find_map(|field| step_into(field, path).map(|rest| (field, rest)))?;
    match rest {
        None => Some(field.data_type()),
        Some(rest) => field_in(field.data_type(), rest),
    }
}

/// The Parquet leaf columns below a field at a dotted path, or below a field inside of its list elements.
pub fn parquet_leaves(schema: &Schema, path: &str, inner: Option<&str>) -> Vec<usize> {
    let mut leaf = 0;
    leaves_below(schema.fields(), path, inner, &mut leaf).unwrap_or_default()
}

fn leaves_below(fields: &Fields, path: &str, inner: Option<&str>, leaf: &mut usize) -> Option<Vec<usize>> {
    for field in fields {
        match (step_into(field, path), field.data_type()) {
            (None, other) => *leaf += leaf_count(other),
            (Some(Some(rest)), DataType::Struct(children)) => return leaves_below(children, rest, inner, leaf),
            (Some(_), found) => {
                return match (inner, found) {
                    (
                        Some(inner),
                        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _),
                    ) => match item.data_type() {
                        DataType::Struct(children) => leaves_below(children, inner, None, leaf),
                        _ => None,
                    },
                    (_, found) => Some((*leaf..*leaf + leaf_count(found)).collect()),
                };
            }
        }
    }
    None
}

/// A schema as the catalog keeps it: an IPC schema message.
pub fn to_ipc(schema: &Schema) -> Vec<u8> {
    use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
    let mut dictionaries = DictionaryTracker::new(false);
    let options = IpcWriteOptions::default();
    IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(schema, &mut dictionaries, &options).ipc_message
}

/// Decodes an IPC schema message.
///
/// # Errors
/// When the bytes are not one.
pub fn from_ipc(message: &[u8]) -> Result<SchemaRef> {
    let broken = |text: String| StorageError::Decode { what: "schema", text };
    let message = arrow::ipc::root_as_message(message).map_err(|error| broken(error.to_string()))?;
    let schema = message.header_as_schema().ok_or_else(|| broken("not a schema message".to_owned()))?;
    Ok(Arc::new(arrow::ipc::convert::try_fb_to_schema(schema)?))
}

/// Number of array nodes in a batch of this schema: each costs heap beyond its data.
pub fn node_count(schema: &Schema) -> usize {
    fn nodes(data_type: &DataType) -> usize {
        1 + child_types(data_type).into_iter().map(nodes).sum::<usize>()
    }
    schema.fields().iter().map(|field| nodes(field.data_type())).sum()
}

/// A batch of `rows` rows of zeros, empty texts and empty lists: enough to try a schema out.
pub(crate) fn sample_batch(schema: &SchemaRef, rows: usize) -> Result<RecordBatch> {
    let columns = schema
        .fields()
        .iter()
        .map(|field| Ok(make_array(sample_data(field.data_type(), rows)?)))
        .collect::<Result<Vec<_>>>()?;
    let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)?)
}

fn sample_data(data_type: &DataType, rows: usize) -> Result<ArrayData> {
    use arrow::array::BufferSpec;
    let mut data = ArrayData::builder(data_type.clone()).len(rows);
    for spec in layout(data_type).buffers {
        let bytes = match spec {
            // One entry more than rows: the buffer may hold offsets.
            BufferSpec::FixedWidth { byte_width, .. } => (rows + 1) * byte_width,
            BufferSpec::BitMap => rows.div_ceil(8),
            BufferSpec::VariableWidth | BufferSpec::AlwaysNull => 0,
        };
        data = data.add_buffer(Buffer::from(vec![0_u8; bytes]));
    }
    match data_type {
        DataType::Struct(fields) => {
            for field in fields {
                data = data.add_child_data(sample_data(field.data_type(), rows)?);
            }
        }
        DataType::FixedSizeList(field, length) => {
            let length = usize::try_from(*length).unwrap_or(0);
            data = data.add_child_data(sample_data(field.data_type(), rows * length)?);
        }
        DataType::Dictionary(_, values) => data = data.add_child_data(sample_data(values, 1)?),
        other => {
            for child in child_types(other) {
                data = data.add_child_data(sample_data(child, 0)?);
            }
        }
    }
    Ok(data.align_buffers(true).build()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{DictionaryArray, Int64Array};
    use arrow::datatypes::{Int8Type, UnionFields, UnionMode};

    #[test]
    fn topics_of_equal_schemas_share_one_as_long_as_one_of_them_is_there() {
        let schema = |metadata: &str| {
            let fields =
                vec![Field::new(TIME_COLUMN, DataType::Int64, false), Field::new("shared", DataType::Int8, true)];
            let metadata = std::collections::HashMap::from([("of".to_owned(), metadata.to_owned())]);
            Arc::new(Schema::new_with_metadata(fields, metadata))
        };
        let first = TopicSchema::check(schema("one")).expect("storable");
        assert!(Arc::ptr_eq(&first, &TopicSchema::check(schema("one")).expect("storable")));
        assert!(Arc::ptr_eq(&first, &TopicSchema::accepted(schema("one")).expect("storable")));
        // What goes out again is to the letter what came in.
        let other = TopicSchema::check(schema("another")).expect("storable");
        assert!(!Arc::ptr_eq(&first, &other));
        assert_eq!(other.wire, schema("another"));
        let was = Arc::downgrade(&first);
        drop(first);
        assert!(was.upgrade().is_none(), "nobody keeps it");
        assert_eq!(TopicSchema::check(schema("one")).expect("storable").wire, schema("one"));
    }

    #[test]
    fn schemas_with_dictionaries_are_not_shared_because_their_ids_are_their_own() {
        let strings = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
        let items = DataType::List(Arc::new(Field::new("item", strings.clone(), true)));
        for field in [Field::new("own", strings, true), Field::new("own", items, true)] {
            let first = TopicSchema::check(with_time(vec![field.clone()])).expect("storable");
            let second = TopicSchema::check(with_time(vec![field])).expect("storable");
            assert!(!Arc::ptr_eq(&first, &second), "{}", first.wire);
        }
    }

    fn with_time(fields: Vec<Field>) -> SchemaRef {
        let mut all = vec![Field::new(TIME_COLUMN, DataType::Int64, false)];
        all.extend(fields);
        Arc::new(Schema::new(all))
    }

    #[track_caller]
    fn check_refused(field: Field, names: &str) {
        let error = TopicSchema::check(with_time(vec![field])).expect_err("must be refused");
        assert!(error.to_string().contains(names), "{error}");
    }

    #[test]
    fn a_schema_without_time_is_refused_naming_the_column() {
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Int64, false)]));
        let error = TopicSchema::check(schema).expect_err("must be refused");
        assert!(error.to_string().contains("`timestamp_ns`"), "{error}");
    }

    #[test]
    fn union_is_refused_naming_the_field() {
        let union =
            DataType::Union(UnionFields::from_fields(vec![Field::new("a", DataType::Int8, true)]), UnionMode::Sparse);
        check_refused(Field::new("choice", union, true), "`choice`");
    }

    #[test]
    fn run_ends_are_refused_naming_the_field() {
        let runs = DataType::RunEndEncoded(
            Arc::new(Field::new("run_ends", DataType::Int32, false)),
            Arc::new(Field::new("values", DataType::Int32, true)),
        );
        check_refused(Field::new("runs", runs, true), "`runs`");
    }

    #[test]
    fn a_nested_month_day_nano_interval_is_refused_by_its_dotted_path() {
        let inner = Field::new("span", DataType::Interval(IntervalUnit::MonthDayNano), true);
        check_refused(Field::new("outer", DataType::Struct(Fields::from(vec![inner])), true), "`outer.span`");
    }

    #[test]
    fn fixed_sizes_that_multiply_to_gibibytes_a_row_are_refused_without_being_tried() {
        let inner = DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Int64, true)), 1 << 30);
        let outer = DataType::FixedSizeList(Arc::new(Field::new("item", inner, true)), 1 << 28);
        check_refused(Field::new("huge", outer, true), "`huge`");
        check_refused(Field::new("wide", DataType::FixedSizeBinary(i32::MAX), true), "`wide`");
    }

    #[test]
    fn two_columns_of_one_name_are_refused() {
        check_refused(Field::new(TIME_COLUMN, DataType::Float64, true), TIME_COLUMN);
    }

    #[test]
    fn dictionaries_become_values_and_come_back_as_dictionaries() {
        let dictionary = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
        let wire = with_time(vec![Field::new("state", dictionary, true)]);
        let schema = TopicSchema::check(Arc::clone(&wire)).expect("storable");
        let states: DictionaryArray<Int8Type> = vec![Some("on"), None, Some("off")].into_iter().collect();
        let batch =
            RecordBatch::try_new(Arc::clone(&wire), vec![Arc::new(Int64Array::from(vec![1, 2, 3])), Arc::new(states)])
                .expect("batch");
        let stored = schema.to_stored(&batch).expect("to stored");
        assert_eq!(stored.column(1).data_type(), &DataType::Utf8);
        assert_eq!(schema.to_wire(&stored).expect("to wire"), batch);
    }

    #[test]
    fn an_empty_struct_survives_with_its_nulls() {
        let wire = with_time(vec![Field::new("nothing", DataType::Struct(Fields::empty()), true)]);
        let schema = TopicSchema::check(Arc::clone(&wire)).expect("storable");
        let nothing = ArrayData::builder(DataType::Struct(Fields::empty()))
            .len(2)
            .nulls(Some(vec![true, false].into()))
            .build()
            .expect("data");
        let batch = RecordBatch::try_new(wire, vec![Arc::new(Int64Array::from(vec![1, 2])), make_array(nothing)])
            .expect("batch");
        let stored = schema.to_stored(&batch).expect("to stored");
        let back = schema.to_wire(&stored).expect("to wire");
        assert_eq!(back.column(1).null_count(), 1);
        assert_eq!(back, batch);
    }
}
