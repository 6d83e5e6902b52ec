//! A pattern compiled for given lengths: which blocks of keys each block of queries visits.

mod axis;
mod layout;
mod listed_blocks;
mod lower;
mod mask;
mod plan;
mod rectangle;
mod relation;
mod rows;
mod statistics;
mod words;

use std::collections::HashMap;
use std::sync::Arc;

pub use layout::Layout;
pub use mask::MaskTable;
pub use rows::{BlockRows, Span};
pub use statistics::Statistics;

use crate::pattern::{BatchData, Lengths, Pattern, PatternError};
use axis::Axis;
use lower::Lowering;
use mask::Masks;
use rectangle::Plane;
use relation::Relation;

/// The sizes of the blocks that a schedule is made of.
///
/// A pattern that has blocks of its own ([`Blockwise`](crate::Blockwise), [`RandomBlocks`](crate::RandomBlocks)) is
/// visited without waste where these sizes divide them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    /// Queries of a block, from 1 to 4096. Default: 64. A decode step takes 1.
    pub query: usize,
    /// Keys of a block, from 1 to 4096. Default: 64. Multiples of 64 leave no bit of a mask unused.
    pub key: usize,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { query: 64, key: 64 }
    }
}

impl BlockSizes {
    /// A mask of two blocks of this size takes 2 MiB; larger blocks are of no use to any kernel.
    const LIMIT: usize = 4096;

    fn validate(&self) -> Result<(), PatternError> {
        for (field, got) in [
            ("block_sizes.query", self.query),
            ("block_sizes.key", self.key),
        ] {
            if got == 0 {
                return Err(PatternError::Zero { field });
            }
            if got > Self::LIMIT {
                let limit = Self::LIMIT;
                return Err(PatternError::TooLarge { field, got, limit });
            }
        }
        Ok(())
    }
}

/// A pattern compiled for given lengths to block-sparse rows.
///
/// The pairs of a pattern are split into disjoint [`Part`]s, whose results are merged by their log-sum-exp: a pair is
/// in one part at most. A part may put queries and keys into another order, or gather some of them, so that its pairs
/// fill blocks: a stride visits one useful key a row and block in natural order, and whole blocks once positions are
/// sorted by their residue. Patterns without strides, dilations and scattered global tokens are one part in natural
/// order.
///
/// Within a part each block of queries has a list of [`Span`]s: runs of blocks of keys that are visible whole, and
/// single blocks with a mask. Memory and time to compile grow with the lengths and the number of spans and distinct
/// masks, not with the number of pairs. Most patterns have a few spans a row. One that is dense but for scattered holes
/// (`!strided`) has a masked block for every hole, and a schedule that grows with the square of the length. A query that
/// sees nothing has no spans.
///
/// ```
/// use emberlm_core::{BatchData, BlockSizes, Lengths, Pattern, Schedule, Span, Window};
///
/// let pattern = Pattern::causal() & Pattern::window(Window::one_sided(128));
/// let lengths = Lengths::square(65_536).with_n_heads(8);
/// let schedule = Schedule::compile(&pattern, &lengths, &BlockSizes::default(), &BatchData::new())?;
/// let [part] = schedule.parts() else {
///     panic!("a window is one part")
/// };
/// assert_eq!(part.n_layouts(), 1); // all heads see the same
/// let spans = part.layout(0, 7).rows().spans(10);
/// assert_eq!(spans, [
///     Span::Partial { block: 8, mask: 1 },
///     Span::Full { start: 9, n_blocks: 1 },
///     Span::Partial { block: 10, mask: 0 },
/// ]);
/// assert!(schedule.statistics().density < 0.002);
/// # Ok::<(), emberlm_core::PatternError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    lengths: Lengths,
    blocks: BlockSizes,
    parts: Vec<Part>,
    masks: MaskTable,
    statistics: Statistics,
    by_batch: bool,
}

/// Pairs of a schedule that share an order of queries and keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    query_order: Option<Arc<[u32]>>,
    key_order: Option<Arc<[u32]>>,
    query_length: usize,
    key_length: usize,
    layouts: Vec<Layout>,
    /// Number of a layout. Shape: `[batch_size or 1, n_heads or 1]`.
    table: Vec<u32>,
    table_size: [usize; 2],
}

impl Part {
    /// Which query each row is, as an index into the `query_length` queries; natural order if there is none.
    ///
    /// It may name only some of the queries, each once. The others see nothing in this part.
    pub fn query_order(&self) -> Option<&[u32]> {
        self.query_order.as_deref()
    }

    /// Which key each column is, as an index into the `key_length` keys; natural order if there is none.
    ///
    /// It may name only some of the keys, each once. Nobody sees the others in this part.
    pub fn key_order(&self) -> Option<&[u32]> {
        self.key_order.as_deref()
    }

    /// Number of queries in the order.
    pub fn query_length(&self) -> usize {
        self.query_length
    }

    /// Number of keys in the order.
    pub fn key_length(&self) -> usize {
        self.key_length
    }

    /// The blocks of a batch row and a head.
    ///
    /// # Panics
    ///
    /// If there is no such batch row or head. Where all share a layout, any number will do.
    pub fn layout(&self, batch: usize, head: usize) -> &Layout {
        &self.layouts[self.layout_number(batch, head)]
    }

    /// The number of [`layout`](Self::layout): equal numbers are equal layouts.
    ///
    /// # Panics
    ///
    /// As [`layout`](Self::layout).
    pub fn layout_number(&self, batch: usize, head: usize) -> usize {
        let [n_batch, n_heads] = self.table_size;
        let batch = if n_batch == 1 { 0 } else { batch };
        let head = if n_heads == 1 { 0 } else { head };
        assert!(
            batch < n_batch && head < n_heads,
            "batch row {batch} and head {head} must be below {n_batch} and {n_heads}"
        );
        self.table[batch * n_heads + head] as usize
    }

    /// Number of different layouts.
    pub fn n_layouts(&self) -> usize {
        self.layouts.len()
    }

    /// The different layouts.
    pub fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.layouts.iter()
    }

    fn bytes(&self) -> usize {
        let orders = [&self.query_order, &self.key_order].into_iter().flatten();
        let orders: usize = orders.map(|order| size_of_val(&order[..])).sum();
        let layouts: usize = self.layouts.iter().map(Layout::bytes).sum();
        orders + layouts + size_of_val(&self.table[..])
    }
}

impl Schedule {
    /// Compiles a pattern for given lengths.
    ///
    /// # Errors
    ///
    /// What [`Pattern::check`] finds, and block sizes that are zero or too large.
    pub fn compile(
        pattern: &Pattern,
        lengths: &Lengths,
        blocks: &BlockSizes,
        data: &BatchData,
    ) -> Result<Self, PatternError> {
        blocks.validate()?;
        pattern.check(lengths, data)?;

        // Heads and batch rows whose relations are equal share everything.
        let by_batch = pattern.depends_on_batch() || data.hidden_keys(0).is_some();
        let n_batch = if by_batch { lengths.batch_size } else { 1 };
        let n_heads = if pattern.depends_on_head() {
            lengths.n_heads
        } else {
            1
        };
        let mut lowering = Lowering::new(lengths, data);
        let mut relations = Distinct::default();
        let mut table = Vec::with_capacity(n_batch * n_heads);
        for batch in 0..n_batch {
            for head in 0..n_heads {
                table.push(relations.number(lowering.visible(pattern, batch, head)));
            }
        }
        let table_size = [n_batch, n_heads];

        let mut masks = Masks::new(blocks);
        let mut parts = Vec::new();
        for (order, relations) in plan::plan(&relations.values, &lowering.tables, lengths, blocks) {
            let sizes = [blocks.query, blocks.key];
            let [queries, keys] = Axis::pair(&order, &lowering.tables, lengths, sizes);
            let mut plane = Plane {
                tables: &lowering.tables,
                queries,
                keys,
            };
            let mut distinct = Distinct::default();
            let numbers: Vec<u32> = relations.into_iter().map(|r| distinct.number(r)).collect();
            let layouts = distinct.values.iter().map(|relation| {
                plane.prepare(relation);
                layout::lay_out(&plane, relation, blocks, &mut masks)
            });
            let layouts = layouts.collect();
            let of_entry = |number: &u32| numbers[*number as usize];
            parts.push(Part {
                layouts,
                query_order: plane.queries.order().cloned(),
                key_order: plane.keys.order().cloned(),
                query_length: plane.queries.length(),
                key_length: plane.keys.length(),
                table: table.iter().map(of_entry).collect(),
                table_size,
            });
        }
        // A schedule of nothing keeps its natural part, which says so for every query.
        let is_natural = |part: &Part| part.query_order.is_none() && part.key_order.is_none();
        let is_used = |part: &Part| part.layouts.iter().any(|layout| !layout.is_empty());
        match parts.iter().any(is_used) {
            true => parts.retain(is_used),
            false => parts.retain(is_natural),
        }
        let masks = masks.finish();
        let statistics = statistics(lengths, &parts, &masks);
        Ok(Self {
            lengths: *lengths,
            blocks: *blocks,
            parts,
            masks,
            statistics,
            by_batch,
        })
    }

    /// The lengths that it was compiled for.
    pub fn lengths(&self) -> &Lengths {
        &self.lengths
    }

    /// Whether batch rows may see different keys. Else a schedule for one row serves any number.
    pub fn is_by_batch(&self) -> bool {
        self.by_batch
    }

    /// The sizes of its blocks.
    pub fn block_sizes(&self) -> &BlockSizes {
        &self.blocks
    }

    /// Its disjoint parts, at least one; together they hold exactly the pairs of the pattern.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The masks of all partial blocks of all parts.
    pub fn masks(&self) -> &MaskTable {
        &self.masks
    }

    /// What it costs.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }
}

/// Values without repetition.
#[derive(Default)]
struct Distinct {
    values: Vec<Relation>,
    numbers: HashMap<Relation, u32>,
}

impl Distinct {
    fn number(&mut self, relation: Relation) -> u32 {
        let next = self.values.len() as u32;
        *self.numbers.entry(relation).or_insert_with_key(|relation| {
            self.values.push(relation.clone());
            next
        })
    }
}

fn statistics(lengths: &Lengths, parts: &[Part], masks: &MaskTable) -> Statistics {
    let Lengths {
        batch_size,
        n_heads,
        ..
    } = *lengths;
    let [mut n_visible, mut n_visited] = [0; 2];
    for part in parts {
        // How many heads and batch rows an entry of the table stands for.
        let [n_batch, n_head_entries] = part.table_size;
        let shared = (batch_size / n_batch * (n_heads / n_head_entries)) as u64;
        for &layout in &part.table {
            let layout = &part.layouts[layout as usize];
            n_visible += shared * layout.n_visible();
            n_visited += shared * layout.n_visited();
        }
    }
    // The product was checked to fit, but for a zero that comes before factors that do not.
    let n_pairs = [
        lengths.query_length,
        lengths.key_length,
        batch_size,
        n_heads,
    ]
    .into_iter()
    .fold(1, |product: u64, size| product.saturating_mul(size as u64));
    Statistics {
        n_visible,
        n_visited,
        density: if n_pairs == 0 {
            0.0
        } else {
            n_visible as f64 / n_pairs as f64
        },
        bytes: parts.iter().map(Part::bytes).sum::<usize>() + masks.bytes(),
    }
}
