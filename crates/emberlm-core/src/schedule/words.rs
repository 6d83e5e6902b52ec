//! Bit masks of single blocks, built by words.

use std::ops::Range;

use super::axis::{Axis, Holds};
use super::rectangle::Plane;
use super::relation::{Atom, Relation};
use crate::pattern::Lengths;

/// The rows of a mask: one for each query of a block, one bit for each key of a block.
pub(super) struct Words {
    pub(super) words: Vec<u64>,
    words_per_row: usize,
}

impl Words {
    fn new(n_rows: usize, words_per_row: usize, value: u64) -> Self {
        Self {
            words: vec![value; n_rows * words_per_row],
            words_per_row,
        }
    }

    fn row(&mut self, row: usize) -> &mut [u64] {
        &mut self.words[row * self.words_per_row..][..self.words_per_row]
    }

    fn combine(&mut self, other: &Self, combine: impl Fn(u64, u64) -> u64) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word = combine(*word, *other);
        }
    }
}

impl Plane<'_> {
    /// The mask of a relation on one block of queries and one of keys. Bits beyond the ends of the axes are zero.
    pub(super) fn mask(
        &self,
        relation: &Relation,
        query_block: usize,
        key_block: usize,
        [rows, columns]: [usize; 2],
    ) -> Words {
        let block = Block {
            plane: self,
            query_block,
            keys: KeyBlock::new(&self.keys, key_block),
            key_block,
            n_rows: rows,
            words_per_row: columns.div_ceil(64),
        };
        let mut mask = block.evaluate(relation);
        let n_queries = self.queries.range(query_block).len();
        let n_keys = self.keys.range(key_block).len();
        mask.words[n_queries * mask.words_per_row..].fill(0);
        for row in 0..n_queries {
            let row = mask.row(row);
            for (word, from) in row.iter_mut().zip((0..).step_by(64)) {
                *word &= low_bits(n_keys.saturating_sub(from).min(64));
            }
        }
        mask
    }
}

/// One block of queries and one of keys.
struct Block<'a> {
    plane: &'a Plane<'a>,
    query_block: usize,
    key_block: usize,
    keys: KeyBlock,
    n_rows: usize,
    words_per_row: usize,
}

impl Block<'_> {
    fn filled(&self, value: u64) -> Words {
        Words::new(self.n_rows, self.words_per_row, value)
    }

    fn evaluate(&self, relation: &Relation) -> Words {
        let holds = self
            .plane
            .holds(relation, self.query_block, 0, self.key_block);
        match holds {
            Holds::Nowhere => return self.filled(0),
            Holds::Everywhere => return self.filled(!0),
            Holds::Somewhere => {}
        }
        match relation {
            Relation::Always => self.filled(!0),
            Relation::Never => self.filled(0),
            Relation::Atom(atom) => self.atom(*atom),
            Relation::Not(inner) => {
                let mut words = self.evaluate(inner);
                words.words.iter_mut().for_each(|word| *word = !*word);
                words
            }
            Relation::All(parts) => self.combined(parts, |a, b| a & b),
            Relation::Any(parts) => self.combined(parts, |a, b| a | b),
        }
    }

    fn combined(&self, parts: &[Relation], combine: impl Fn(u64, u64) -> u64) -> Words {
        let mut words = self.evaluate(&parts[0]);
        for part in &parts[1..] {
            words.combine(&self.evaluate(part), &combine);
        }
        words
    }

    fn atom(&self, atom: Atom) -> Words {
        let mut words = self.filled(0);
        let queries = self.plane.queries.range(self.query_block);
        let rows = queries.enumerate().map(|(row, index)| {
            let position = i64::from(self.plane.queries.position(index));
            (row, index, position)
        });
        match atom {
            Atom::Band { low, high } => {
                for (row, _, query) in rows {
                    self.keys
                        .set_interval(words.row(row), query - high, query - low);
                }
            }
            Atom::Blocks { block, low, high } => {
                for (row, _, query) in rows {
                    // No block beyond these holds a key; unclamped, the product could overflow.
                    let near = |key_block: i64| key_block.clamp(-1, Lengths::LIMIT as i64);
                    let [first, last] = [query / block - high, query / block - low].map(near);
                    self.keys
                        .set_interval(words.row(row), first * block, last * block + block - 1);
                }
            }
            Atom::Congruent { modulus } => {
                let modulus = i64::from(modulus);
                let residues = self.keys.residues(modulus);
                for (row, _, query) in rows {
                    self.keys
                        .set_residue(words.row(row), query % modulus, modulus, &residues);
                }
            }
            Atom::Listed { rows: table } => {
                let table = &self.plane.tables.listed[table];
                let block = table.block();
                let [first, last] = self.keys.extent.map(|key| key / block);
                for (row, _, query) in rows {
                    let drawn = table.of_query(query);
                    let from = drawn.partition_point(|&block| i64::from(block) < first);
                    let near = drawn[from..].iter().map(|&block| i64::from(block));
                    for key_block in near.take_while(|key_block| *key_block <= last) {
                        let first = key_block * block;
                        self.keys
                            .set_interval(words.row(row), first, first + block - 1);
                    }
                }
            }
            Atom::Keys { set, .. } => {
                let bits = self.plane.keys.set(set).block(self.key_block);
                for (row, _, _) in rows {
                    words.row(row).copy_from_slice(bits);
                }
            }
            Atom::Queries { set, .. } => {
                let bits = self.plane.queries.set(set).block(self.query_block);
                for (row, _, _) in rows {
                    if bits[row / 64] >> (row % 64) & 1 == 1 {
                        words.row(row).fill(!0);
                    }
                }
            }
            Atom::SameDocument { documents } => {
                let queries = &self.plane.queries.documents(documents).numbers;
                let keys = &self.plane.keys.documents(documents).numbers;
                let keys = &keys[self.plane.keys.range(self.key_block)];
                let mut last: Option<(u32, usize)> = None;
                for (row, index, _) in rows {
                    let number = queries[index];
                    match last {
                        // Neighbours are mostly of one document.
                        Some((same, from)) if same == number => {
                            let from = from * self.words_per_row;
                            let range = from..from + self.words_per_row;
                            words.words.copy_within(range, row * self.words_per_row);
                        }
                        _ => {
                            let words = words.row(row);
                            for (bit, key) in keys.iter().enumerate() {
                                words[bit / 64] |= u64::from(*key == number) << (bit % 64);
                            }
                            last = Some((number, row));
                        }
                    }
                }
            }
        }
        words
    }
}

/// The positions of a block of keys.
struct KeyBlock {
    /// Smallest and largest position.
    extent: [i64; 2],
    order: KeyOrder,
}

enum KeyOrder {
    /// Neighbours, as many as this.
    Natural(usize),
    Ordered {
        positions: Vec<i64>,
        /// Ranges of indices in which the positions rise.
        runs: Vec<Range<usize>>,
    },
}

impl KeyBlock {
    fn new(axis: &Axis, block: usize) -> Self {
        let extent = axis.extent(0, block).positions.map(i64::from);
        let range = axis.range(block);
        if axis.order().is_none() {
            let order = KeyOrder::Natural(range.len());
            return Self { extent, order };
        }
        let positions: Vec<i64> = range.map(|index| i64::from(axis.position(index))).collect();
        let mut runs = Vec::new();
        let mut start = 0;
        for run in positions.chunk_by(|a, b| a < b) {
            runs.push(start..start + run.len());
            start += run.len();
        }
        let order = KeyOrder::Ordered { positions, runs };
        Self { extent, order }
    }

    /// Sets the bits of all keys from one position to another, ends included.
    fn set_interval(&self, words: &mut [u64], first: i64, last: i64) {
        match &self.order {
            KeyOrder::Natural(n_keys) => {
                let bit = |position: i64| (position - self.extent[0]).clamp(0, *n_keys as i64);
                set_bits(words, bit(first) as usize..bit(last + 1) as usize);
            }
            KeyOrder::Ordered { positions, runs } => {
                for run in runs {
                    let of_run = &positions[run.clone()];
                    let from = of_run.partition_point(|&position| position < first);
                    let to = of_run.partition_point(|&position| position <= last);
                    set_bits(words, run.start + from..run.start + to);
                }
            }
        }
    }

    /// The residues of the keys, which [`set_residue`](Self::set_residue) asks for; nothing for natural neighbours.
    fn residues(&self, modulus: i64) -> Vec<i64> {
        match &self.order {
            KeyOrder::Natural(_) => Vec::new(),
            KeyOrder::Ordered { positions, .. } => positions.iter().map(|p| p % modulus).collect(),
        }
    }

    /// Sets the bits of all keys of a residue.
    fn set_residue(&self, words: &mut [u64], residue: i64, modulus: i64, residues: &[i64]) {
        match &self.order {
            KeyOrder::Natural(n_keys) => {
                let first = (residue - self.extent[0]).rem_euclid(modulus) as usize;
                for bit in (first..*n_keys).step_by(modulus as usize) {
                    words[bit / 64] |= 1 << (bit % 64);
                }
            }
            KeyOrder::Ordered { .. } => {
                for (bit, own) in residues.iter().enumerate() {
                    words[bit / 64] |= u64::from(*own == residue) << (bit % 64);
                }
            }
        }
    }
}

/// Sets a range of bits, which may be empty.
fn set_bits(words: &mut [u64], range: Range<usize>) {
    if range.start >= range.end {
        return;
    }
    let [first, last] = [range.start / 64, (range.end - 1) / 64];
    let from = !low_bits(range.start % 64);
    let to = low_bits((range.end - 1) % 64 + 1);
    if first == last {
        words[first] |= from & to;
        return;
    }
    words[first] |= from;
    words[first + 1..last].fill(!0);
    words[last] |= to;
}

/// A word whose `n` lowest bits are set, `n` at most 64.
fn low_bits(n: usize) -> u64 {
    match n {
        64 => !0,
        n => (1 << n) - 1,
    }
}
