//! Parquet pages straight out of Arrow buffers: plain encoding, nothing compressed, values not copied.
//!
//! Guarantees: what comes out is what Parquet's own writer would mean (its reader gives back the same rows; tests
//! hold that for random nestings); values that lie together in memory come as parts of that memory; levels are
//! found as runs, so a list of 130,000 points costs two of them; what a step makes anew is about a page. A page ends on a row boundary.
//! Does not know: columns with another encoding or a codec; those go through Parquet's writer.
//!
//! Formats: parquet-format, Encodings.md ("PLAIN = 0") and parquet.thrift (`PageHeader`, compact protocol).

use super::encode::Piece;
use super::levels::{Levels, varint};
use crate::error::{Result, StorageError};
use arrow::array::{
    Array, ArrowPrimitiveType, AsArray, BooleanBufferBuilder, OffsetSizeTrait, downcast_primitive, layout,
};
use arrow::buffer::{BooleanBuffer, NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Int8Type, Int16Type, UInt8Type, UInt16Type};
use bytes::Bytes;
use parquet::basic::Type as Physical;
use parquet::schema::types::ColumnDescriptor;
use std::ops::{Deref, Range};

/// Values from this size on are parts of their own; smaller ones are copied together.
const OWN_PART_BYTES: usize = 4096;
/// A page's header is smaller: seven numbers of five bytes at most, each behind a byte, and three bytes.
const HEADER_BYTES: usize = 48;

/// The way from a field down to one of its leaves.
#[derive(Debug, Clone)]
pub(super) struct Leaf {
    steps: Vec<Step>,
    nullable: bool,
    max_def: u8,
    max_rep: u8,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Struct {
        nullable: bool,
        child: usize,
    },
    /// Lists of any kind, and maps.
    List {
        nullable: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bits,
    /// Values of so many bytes.
    Fixed(usize),
    /// Integers of one or two bytes, which Parquet stores in four.
    Narrow(Narrow),
    /// Offsets of 32 or 64 bits into bytes.
    Bytes,
    LargeBytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Narrow {
    Int8,
    Int16,
    UInt8,
    UInt16,
}

impl Narrow {
    fn data_type(self) -> DataType {
        match self {
            Self::Int8 => DataType::Int8,
            Self::Int16 => DataType::Int16,
            Self::UInt8 => DataType::UInt8,
            Self::UInt16 => DataType::UInt16,
        }
    }
}

/// The leaves of a field, if all of them can be written this way; `descriptors`: Parquet's own of these leaves.
pub(super) fn leaves(field: &Field, descriptors: &[impl AsRef<ColumnDescriptor>]) -> Option<Vec<Leaf>> {
    let mut leaves = Vec::new();
    collect(field, &mut Vec::new(), &mut leaves)?;
    let fits = |(leaf, column): (&Leaf, &ColumnDescriptor)| {
        let physical = match leaf.kind {
            Kind::Bits => column.physical_type() == Physical::BOOLEAN,
            Kind::Fixed(4) => matches!(column.physical_type(), Physical::INT32 | Physical::FLOAT),
            Kind::Fixed(8) => matches!(column.physical_type(), Physical::INT64 | Physical::DOUBLE),
            Kind::Fixed(_) => false,
            Kind::Narrow(_) => column.physical_type() == Physical::INT32,
            Kind::Bytes | Kind::LargeBytes => column.physical_type() == Physical::BYTE_ARRAY,
        };
        let fixed = column.physical_type() == Physical::FIXED_LEN_BYTE_ARRAY
            && usize::try_from(column.type_length()).is_ok_and(|length| leaf.kind == Kind::Fixed(length));
        (physical || fixed)
            && i16::from(leaf.max_def) == column.max_def_level()
            && i16::from(leaf.max_rep) == column.max_rep_level()
    };
    let matching =
        leaves.len() == descriptors.len() && leaves.iter().zip(descriptors.iter().map(AsRef::as_ref)).all(fits);
    matching.then_some(leaves)
}

/// Adds the leaves below a field; `None`: one of them is of a type that is not handled.
fn collect(field: &Field, steps: &mut Vec<Step>, leaves: &mut Vec<Leaf>) -> Option<()> {
    let nullable = field.is_nullable();
    let kind = match field.data_type() {
        DataType::Struct(fields) if !fields.is_empty() => {
            for (child, field) in fields.iter().enumerate() {
                steps.push(Step::Struct { nullable, child });
                collect(field, steps, leaves)?;
                steps.pop();
            }
            return Some(());
        }
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => {
            steps.push(Step::List { nullable });
            collect(child, steps, leaves)?;
            steps.pop();
            return Some(());
        }
        DataType::Boolean => Kind::Bits,
        DataType::Utf8 | DataType::Binary => Kind::Bytes,
        DataType::LargeUtf8 | DataType::LargeBinary => Kind::LargeBytes,
        DataType::FixedSizeBinary(width) => Kind::Fixed(usize::try_from(*width).ok().filter(|width| *width > 0)?),
        DataType::Int8 => Kind::Narrow(Narrow::Int8),
        DataType::Int16 => Kind::Narrow(Narrow::Int16),
        DataType::UInt8 => Kind::Narrow(Narrow::UInt8),
        DataType::UInt16 => Kind::Narrow(Narrow::UInt16),
        // Stored as they lie in memory. (Decimals are turned round, by Parquet's writer.)
        DataType::Int32
        | DataType::UInt32
        | DataType::Int64
        | DataType::UInt64
        | DataType::Float16
        | DataType::Float32
        | DataType::Float64
        | DataType::Timestamp(_, _)
        | DataType::Date32
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Duration(_) => match layout(field.data_type()).buffers.first() {
            Some(arrow::array::BufferSpec::FixedWidth { byte_width, .. }) => Kind::Fixed(*byte_width),
            _ => return None,
        },
        _ => return None,
    };
    let nullables = steps.iter().filter(|step| match step {
        Step::Struct { nullable, .. } | Step::List { nullable } => *nullable,
    });
    let lists = steps.iter().filter(|step| matches!(step, Step::List { .. })).count();
    let max_def = nullables.count() + lists + usize::from(nullable);
    leaves.push(Leaf {
        steps: steps.clone(),
        nullable,
        max_def: u8::try_from(max_def).ok()?,
        max_rep: u8::try_from(lists).ok()?,
        kind,
    });
    Some(())
}

/// A column of one batch on its way down to a leaf. Borrowed all along: what is only looked at is not counted.
pub(super) struct Column<'l, 'a> {
    leaf: &'l Leaf,
    nodes: Vec<Node<'a>>,
    nulls: Option<&'a NullBuffer>,
    values: Values<'a>,
}

enum Node<'a> {
    Struct { nullable: bool, nulls: Option<&'a NullBuffer> },
    List { nullable: bool, nulls: Option<&'a NullBuffer>, offsets: Offsets<'a> },
}

#[derive(Clone, Copy)]
enum Offsets<'a> {
    Small(&'a OffsetBuffer<i32>),
    Large(&'a OffsetBuffer<i64>),
    /// Lists of one size.
    Fixed(usize),
}

impl Offsets<'_> {
    /// How many values lie between them; those of one size have none.
    fn values(&self) -> usize {
        match self {
            Self::Small(offsets) => offsets.len() - 1,
            Self::Large(offsets) => offsets.len() - 1,
            Self::Fixed(_) => 0,
        }
    }

    fn range(&self, index: usize) -> Range<usize> {
        match self {
            Self::Small(offsets) => range(offsets, index),
            Self::Large(offsets) => range(offsets, index),
            Self::Fixed(size) => index * size..(index + 1) * size,
        }
    }
}

fn range<O: OffsetSizeTrait>(offsets: &OffsetBuffer<O>, index: usize) -> Range<usize> {
    offsets[index].as_usize()..offsets[index + 1].as_usize()
}

enum Values<'a> {
    Bits(&'a BooleanBuffer),
    Fixed { bytes: &'a [u8], width: usize },
    Narrow { array: &'a dyn Array, narrow: Narrow },
    Bytes { offsets: Offsets<'a>, bytes: &'a [u8] },
}

/// Nulls that are there; a buffer without any is none.
fn nulls(array: &dyn Array) -> Option<&NullBuffer> {
    array.nulls().filter(|nulls| nulls.null_count() > 0)
}

impl<'l, 'a> Column<'l, 'a> {
    /// Resolves a leaf in a column of the type it was made for.
    pub(super) fn new(leaf: &'l Leaf, column: &'a dyn Array) -> Result<Self> {
        let mut nodes = Vec::with_capacity(leaf.steps.len());
        let mut array = column;
        for step in &leaf.steps {
            array = match step {
                Step::Struct { nullable, child } => {
                    nodes.push(Node::Struct { nullable: *nullable, nulls: nulls(array) });
                    let child = array.as_struct_opt().and_then(|parent| parent.columns().get(*child));
                    child.ok_or_else(|| unexpected(array))?.as_ref()
                }
                Step::List { nullable } => {
                    let (offsets, values): (_, &dyn Array) = match array.data_type() {
                        DataType::List(_) => {
                            let list = array.as_list::<i32>();
                            (Offsets::Small(list.offsets()), list.values())
                        }
                        DataType::LargeList(_) => {
                            let list = array.as_list::<i64>();
                            (Offsets::Large(list.offsets()), list.values())
                        }
                        DataType::FixedSizeList(_, size) => {
                            let size = usize::try_from(*size).map_err(|_| unexpected(array))?;
                            (Offsets::Fixed(size), array.as_fixed_size_list().values())
                        }
                        DataType::Map(_, _) => {
                            let map = array.as_map();
                            (Offsets::Small(map.offsets()), map.entries())
                        }
                        _ => return Err(unexpected(array)),
                    };
                    nodes.push(Node::List { nullable: *nullable, nulls: nulls(array), offsets });
                    values
                }
            };
        }
        let values = values(leaf.kind, array)?;
        Ok(Self { leaf, nodes, nulls: nulls(array), values })
    }

    /// Bytes of its values in a page, those behind nulls and outside of its rows included.
    pub(super) fn bytes(&self) -> usize {
        match &self.values {
            Values::Bits(bits) => bits.len().div_ceil(8),
            Values::Fixed { bytes, .. } => bytes.len(),
            // Each has its length before it.
            Values::Bytes { bytes, offsets } => bytes.len() + offsets.values() * size_of::<u32>(),
            Values::Narrow { array, .. } => array.len() * size_of::<i32>(),
        }
    }

    /// Adds rows to a page.
    pub(super) fn add(&self, rows: Range<usize>, page: &mut Page<'a>) -> Result<()> {
        let place = Place { def: 0, first_rep: 0, depth: 0 };
        self.walk(&self.nodes, rows, place, page)
    }

    fn walk(&self, nodes: &[Node<'a>], slots: Range<usize>, place: Place, page: &mut Page<'a>) -> Result<()> {
        let Some((node, below)) = nodes.split_first() else {
            let deeper = place.deeper(usize::from(self.leaf.nullable));
            return in_runs(self.nulls, self.leaf.nullable, slots, place, |slots, valid, place| {
                let at = if valid { deeper.def } else { place.def };
                page.levels(self.leaf, at, place, slots.len());
                if valid {
                    page.values(&self.values, slots);
                }
                Ok(())
            });
        };
        match node {
            Node::Struct { nullable, nulls } => in_runs(*nulls, *nullable, slots, place, |slots, valid, place| {
                if valid {
                    self.walk(below, slots, place.deeper(usize::from(*nullable)), page)
                } else {
                    page.levels(self.leaf, place.def, place, slots.len());
                    Ok(())
                }
            }),
            Node::List { nullable, nulls, offsets } => {
                in_runs(*nulls, *nullable, slots, place, |slots, valid, place| {
                    if !valid {
                        page.levels(self.leaf, place.def, place, slots.len());
                        return Ok(());
                    }
                    let there = place.deeper(usize::from(*nullable));
                    for slot in slots.clone() {
                        let first_rep = if slot == slots.start { place.first_rep } else { place.depth };
                        let there = Place { first_rep, ..there };
                        let items = offsets.range(slot);
                        if items.is_empty() {
                            page.levels(self.leaf, there.def, there, 1);
                        } else {
                            let inside = Place { depth: place.depth + 1, ..there.deeper(1) };
                            self.walk(below, items, inside, page)?;
                        }
                    }
                    Ok(())
                })
            }
        }
    }
}

/// Where in the nesting a range of slots lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    def: u8,
    /// Repetition level of the first slot; of the others it is `depth`.
    first_rep: u8,
    depth: u8,
}

impl Place {
    fn deeper(self, levels: usize) -> Self {
        // At most 255, which was checked with the schema.
        Self { def: self.def.saturating_add(levels as u8), ..self }
    }
}

/// Calls for each run of valid or null slots, in order.
fn in_runs(
    nulls: Option<&NullBuffer>,
    nullable: bool,
    slots: Range<usize>,
    place: Place,
    mut run: impl FnMut(Range<usize>, bool, Place) -> Result<()>,
) -> Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    let Some(nulls) = nulls else {
        return run(slots, true, place);
    };
    let mut place = place;
    let mut at = slots.start;
    let valid = nulls.inner().slice(slots.start, slots.len());
    let valid = valid.set_slices().map(|(from, to)| slots.start + from..slots.start + to);
    for valid in valid.chain(std::iter::once(slots.end..slots.end)) {
        if at < valid.start {
            if !nullable {
                return Err(StorageError::Format { op: "encode", text: "a null in a field that has none".to_owned() });
            }
            run(at..valid.start, false, place)?;
            place.first_rep = place.depth;
        }
        at = valid.end;
        if !valid.is_empty() {
            run(valid, true, place)?;
            place.first_rep = place.depth;
        }
    }
    Ok(())
}

fn unexpected(array: &dyn Array) -> StorageError {
    let text = format!("a column of {} where the schema has another type", array.data_type());
    StorageError::Format { op: "encode", text }
}

fn values(kind: Kind, array: &dyn Array) -> Result<Values<'_>> {
    match (kind, array.data_type()) {
        (Kind::Bits, DataType::Boolean) => Ok(Values::Bits(array.as_boolean().values())),
        (Kind::Fixed(width), _) => {
            let bytes = fixed(array).filter(|bytes| bytes.len() == array.len() * width);
            Ok(Values::Fixed { bytes: bytes.ok_or_else(|| unexpected(array))?, width })
        }
        (Kind::Narrow(narrow), found) if *found == narrow.data_type() => Ok(Values::Narrow { array, narrow }),
        (Kind::Bytes, DataType::Utf8) => {
            let array = array.as_string::<i32>();
            Ok(Values::Bytes { offsets: Offsets::Small(array.offsets()), bytes: array.values() })
        }
        (Kind::Bytes, DataType::Binary) => {
            let array = array.as_binary::<i32>();
            Ok(Values::Bytes { offsets: Offsets::Small(array.offsets()), bytes: array.values() })
        }
        (Kind::LargeBytes, DataType::LargeUtf8) => {
            let array = array.as_string::<i64>();
            Ok(Values::Bytes { offsets: Offsets::Large(array.offsets()), bytes: array.values() })
        }
        (Kind::LargeBytes, DataType::LargeBinary) => {
            let array = array.as_binary::<i64>();
            Ok(Values::Bytes { offsets: Offsets::Large(array.offsets()), bytes: array.values() })
        }
        _ => Err(unexpected(array)),
    }
}

/// The values of an array whose values have one size, as they lie in memory.
fn fixed(array: &dyn Array) -> Option<&[u8]> {
    macro_rules! primitive {
        ($values:ty) => {
            Some(array.as_primitive::<$values>().values().inner().as_slice())
        };
    }
    downcast_primitive! {
        array.data_type() => (primitive),
        DataType::FixedSizeBinary(_) => Some(array.as_fixed_size_binary().values().as_slice()),
        _ => None,
    }
}

/// Appends values as four bytes each.
fn widen<T: ArrowPrimitiveType<Native: Into<i32>>>(array: &dyn Array, slots: Range<usize>, out: &mut Vec<u8>) {
    let values = array.as_primitive::<T>().values();
    out.extend(values.get(slots).unwrap_or(&[]).iter().flat_map(|value| {
        let wide: i32 = (*value).into();
        wide.to_le_bytes()
    }));
}

/// Bytes of a page.
#[derive(Debug)]
pub enum Part<'a> {
    /// Made for it.
    Made(Vec<u8>),
    /// A page by Parquet's writer.
    Page(Bytes),
    /// As they lie in a batch.
    There(&'a [u8]),
}

impl Deref for Part<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Made(bytes) => bytes,
            Self::Page(bytes) => bytes,
            Self::There(bytes) => bytes,
        }
    }
}

/// A page while it is filled.
#[derive(Debug, Default)]
pub(super) struct Page<'a> {
    defs: Levels,
    reps: Levels,
    slots: usize,
    bits: Option<BooleanBufferBuilder>,
    parts: Vec<Part<'a>>,
    /// Small values, behind the last part.
    open: Vec<u8>,
    value_bytes: usize,
    /// Memory for levels, empty between pages.
    scratch: Vec<u8>,
}

impl<'a> Page<'a> {
    /// About what it will take in the file, in bytes.
    pub(super) fn weight(&self) -> usize {
        self.value_bytes + self.defs.len() + self.reps.len()
    }

    /// Whether nothing was added.
    pub(super) fn is_empty(&self) -> bool {
        self.slots == 0
    }

    fn levels(&mut self, leaf: &Leaf, def: u8, place: Place, count: usize) {
        if leaf.max_def > 0 {
            self.defs.push(leaf.max_def, def, count);
        }
        if leaf.max_rep > 0 {
            self.reps.push(leaf.max_rep, place.first_rep, count.min(1));
            self.reps.push(leaf.max_rep, place.depth, count.saturating_sub(1));
        }
        self.slots += count;
    }

    fn values(&mut self, values: &Values<'a>, slots: Range<usize>) {
        match values {
            Values::Bits(bits) => {
                let builder = self.bits.get_or_insert_with(|| BooleanBufferBuilder::new(1024));
                builder.append_packed_range(bits.offset() + slots.start..bits.offset() + slots.end, bits.values());
                self.value_bytes = builder.len() / 8;
            }
            Values::Fixed { bytes, width } => self.part(bytes, slots.start * width..slots.end * width),
            Values::Narrow { array, narrow } => {
                self.value_bytes += 4 * slots.len();
                match narrow {
                    Narrow::Int8 => widen::<Int8Type>(*array, slots, &mut self.open),
                    Narrow::Int16 => widen::<Int16Type>(*array, slots, &mut self.open),
                    Narrow::UInt8 => widen::<UInt8Type>(*array, slots, &mut self.open),
                    Narrow::UInt16 => widen::<UInt16Type>(*array, slots, &mut self.open),
                }
            }
            Values::Bytes { offsets, bytes } => {
                for slot in slots {
                    let range = offsets.range(slot);
                    self.open.extend_from_slice(&(range.len() as u32).to_le_bytes());
                    self.value_bytes += 4;
                    self.part(bytes, range);
                }
            }
        }
    }

    fn part(&mut self, bytes: &'a [u8], range: Range<usize>) {
        self.value_bytes += range.len();
        if range.len() < OWN_PART_BYTES {
            self.open.extend_from_slice(&bytes[range]);
            return;
        }
        self.close_open();
        self.parts.push(Part::There(&bytes[range]));
    }

    fn close_open(&mut self) {
        if !self.open.is_empty() {
            self.parts.push(Part::Made(std::mem::take(&mut self.open)));
        }
    }

    /// The page in parts, header first; also its bytes and its values, nulls included. It is empty afterwards.
    pub(super) fn finish(&mut self, leaf: &Leaf, out: &mut Vec<Piece<'a>>) -> Result<(u64, u64)> {
        let mut levels = std::mem::take(&mut self.scratch);
        if leaf.max_rep > 0 {
            self.reps.finish(leaf.max_rep, &mut levels);
        }
        if leaf.max_def > 0 {
            self.defs.finish(leaf.max_def, &mut levels);
        }
        if let Some(mut bits) = self.bits.take() {
            self.open.extend_from_slice(bits.finish().values());
        }
        self.close_open();
        let body = levels.len() + self.parts.iter().map(|part| part.len()).sum::<usize>();
        let mut head = Vec::with_capacity(HEADER_BYTES + levels.len());
        header(body, self.slots, &mut head)?;
        let bytes = (head.len() + body) as u64;
        head.append(&mut levels);
        self.scratch = levels;
        out.push(Piece::Page(Part::Made(head)));
        out.extend(self.parts.drain(..).map(Piece::Page));
        self.value_bytes = 0;
        Ok((bytes, std::mem::take(&mut self.slots) as u64))
    }
}

/// `PageHeader` of a version 1 data page, in Thrift's compact protocol: field headers are (delta << 4 | type).
fn header(body: usize, slots: usize, out: &mut Vec<u8>) -> Result<()> {
    const I32: u8 = 0x15;
    const STRUCT_TWO_ON: u8 = 0x2C;
    const STOP: u8 = 0;
    const DATA_PAGE: i32 = 0;
    const PLAIN: i32 = 0;
    const RLE: i32 = 3;
    let too_large = |_| StorageError::Format { op: "encode", text: "a page of more than 2 GiB".to_owned() };
    let (body, slots) = (i32::try_from(body).map_err(too_large)?, i32::try_from(slots).map_err(too_large)?);
    let number = |out: &mut Vec<u8>, value: i32| {
        out.push(I32);
        // Zigzag.
        varint(u64::from(((value << 1) ^ (value >> 31)) as u32), out);
    };
    for value in [DATA_PAGE, body, body] {
        number(out, value);
    }
    out.push(STRUCT_TWO_ON);
    for value in [slots, PLAIN, RLE, RLE] {
        number(out, value);
    }
    out.extend([STOP, STOP]);
    Ok(())
}

#[cfg(test)]
mod tests;
