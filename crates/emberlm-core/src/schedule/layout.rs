//! The blocks of one relation in one order.

use super::BlockSizes;
use super::axis::Holds;
use super::mask::Masks;
use super::rectangle::Plane;
use super::relation::Relation;
use super::rows::{BlockRows, Span};

/// The blocks that the queries of a part visit, by rows and by columns. Heads and batch rows that see the same keys
/// share one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    rows: BlockRows,
    columns: BlockRows,
    n_visible: u64,
    n_visited: u64,
}

impl Layout {
    /// For each block of queries the blocks of keys that it visits.
    pub fn rows(&self) -> &BlockRows {
        &self.rows
    }

    /// The same pairs by columns: for each block of keys the blocks of queries that visit it. For a backward pass that
    /// sums the gradients of keys and values.
    pub fn columns(&self) -> &BlockRows {
        &self.columns
    }

    /// Whether no query sees any key.
    pub fn is_empty(&self) -> bool {
        self.rows.n_spans() == 0
    }

    /// Visible pairs.
    pub fn n_visible(&self) -> u64 {
        self.n_visible
    }

    /// Pairs in all visited blocks, without what lies beyond the ends of the sequence.
    pub fn n_visited(&self) -> u64 {
        self.n_visited
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.bytes() + self.columns.bytes()
    }
}

/// Lays the blocks of a relation out.
pub(super) fn lay_out(
    plane: &Plane<'_>,
    relation: &Relation,
    blocks: &BlockSizes,
    masks: &mut Masks,
) -> Layout {
    let mut builder = Builder {
        plane,
        relation,
        blocks,
        masks,
        full_at_end: [None; 4],
        rows: BlockRows::new(),
        n_visible: 0,
        n_visited: 0,
    };
    let has_keys = plane.keys.length() > 0;
    for query_block in 0..plane.queries.n_blocks() {
        if has_keys {
            builder.descend(query_block, plane.keys.top_level(), 0);
        }
        builder.rows.end_row();
    }
    Layout {
        columns: builder.rows.transposed(plane.keys.n_blocks()),
        rows: builder.rows,
        n_visible: builder.n_visible,
        n_visited: builder.n_visited,
    }
}

struct Builder<'a> {
    plane: &'a Plane<'a>,
    relation: &'a Relation,
    blocks: &'a BlockSizes,
    masks: &'a mut Masks,
    /// Masks of blocks at the ends of the axes of which every pair is visible: by whether the queries and the keys
    /// are short.
    full_at_end: [Option<u32>; 4],
    rows: BlockRows,
    n_visible: u64,
    n_visited: u64,
}

impl Builder<'_> {
    /// Adds `2^level` blocks of keys: at once where the relation is decided, else in halves.
    fn descend(&mut self, query_block: usize, level: usize, index: usize) {
        match self.plane.holds(self.relation, query_block, level, index) {
            Holds::Nowhere => {}
            Holds::Everywhere => {
                let end = ((index + 1) << level).min(self.plane.keys.n_blocks());
                self.push_full(query_block, index << level, end);
            }
            Holds::Somewhere if level == 0 => self.push_mask(query_block, index),
            Holds::Somewhere => {
                let half = 1 << (level - 1);
                self.descend(query_block, level - 1, 2 * index);
                if (2 * index + 1) * half < self.plane.keys.n_blocks() {
                    self.descend(query_block, level - 1, 2 * index + 1);
                }
            }
        }
    }

    /// Adds blocks of keys that are visible whole.
    fn push_full(&mut self, query_block: usize, start: usize, end: usize) {
        let queries_are_whole = self.plane.queries.is_whole(query_block);
        let n_whole = match self.plane.keys.is_whole(end - 1) {
            _ if !queries_are_whole => 0,
            true => end - start,
            false => end - 1 - start,
        };
        if n_whole > 0 {
            let n_pairs = (self.blocks.query * self.blocks.key) as u64 * n_whole as u64;
            self.n_visible += n_pairs;
            self.n_visited += n_pairs;
            self.rows.push(Span::Full {
                start: start as u32,
                n_blocks: n_whole as u32,
            });
        }
        for key_block in start + n_whole..end {
            let keys_are_whole = self.plane.keys.is_whole(key_block);
            let kind = usize::from(queries_are_whole) + 2 * usize::from(keys_are_whole);
            let mask = match self.full_at_end[kind] {
                Some(mask) => mask,
                None => {
                    let words = self.words(&Relation::Always, query_block, key_block);
                    *self.full_at_end[kind].insert(self.masks.number(&words))
                }
            };
            self.push_partial(query_block, key_block, mask);
        }
    }

    /// Adds a block of keys that may be visible in part.
    fn push_mask(&mut self, query_block: usize, key_block: usize) {
        let words = self.words(self.relation, query_block, key_block);
        let n_visible: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        if n_visible == self.blocks.query * self.blocks.key {
            self.push_full(query_block, key_block, key_block + 1);
        } else if n_visible > 0 {
            let mask = self.masks.number(&words);
            self.push_partial(query_block, key_block, mask);
        }
    }

    fn push_partial(&mut self, query_block: usize, key_block: usize, mask: u32) {
        let n_queries = self.plane.queries.range(query_block).len();
        let n_keys = self.plane.keys.range(key_block).len();
        self.n_visible += u64::from(self.masks.table().n_visible(mask));
        self.n_visited += (n_queries * n_keys) as u64;
        self.rows.push(Span::Partial {
            block: key_block as u32,
            mask,
        });
    }

    fn words(&self, relation: &Relation, query_block: usize, key_block: usize) -> Vec<u64> {
        let BlockSizes { query, key } = *self.blocks;
        let mask = self
            .plane
            .mask(relation, query_block, key_block, [query, key]);
        mask.words
    }
}
