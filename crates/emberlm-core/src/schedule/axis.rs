//! The queries or the keys of a part: their order, cut into blocks, with summaries of every power of two of blocks.

use std::sync::Arc;

use super::plan::Order;
use super::relation::Tables;
use crate::pattern::Lengths;

/// A summary of a range of an axis: all its positions and residues lie between these, ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) positions: [u32; 2],
    /// Modulo [`Axis::modulus`].
    pub(super) residues: [u32; 2],
}

/// Values for single blocks, for pairs of them, and so on up to one for all: level `l` holds one for `2^l` blocks.
pub(super) struct Levels<T>(Vec<Vec<T>>);

impl<T: Copy> Levels<T> {
    fn new(blocks: Vec<T>, join: impl Fn(T, T) -> T) -> Self {
        let mut levels = vec![blocks];
        while let Some(level) = levels.last().filter(|level| level.len() > 1) {
            let joined = level.chunks(2).map(|pair| match *pair {
                [left, right] => join(left, right),
                _ => pair[0],
            });
            levels.push(joined.collect());
        }
        Self(levels)
    }

    pub(super) fn at(&self, level: usize, index: usize) -> T {
        self.0[level][index]
    }
}

/// Whether a relation holds on a rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    Nowhere,
    /// Perhaps somewhere, perhaps everywhere, perhaps nowhere.
    Somewhere,
    Everywhere,
}

/// A set of positions on an axis.
pub(super) struct SetOnAxis {
    /// One bit for each index, each block from a new word.
    words: Vec<u64>,
    words_per_block: usize,
    levels: Levels<Holds>,
}

impl SetOnAxis {
    pub(super) fn block(&self, block: usize) -> &[u64] {
        &self.words[block * self.words_per_block..][..self.words_per_block]
    }

    pub(super) fn holds(&self, level: usize, index: usize) -> Holds {
        self.levels.at(level, index)
    }
}

/// Document numbers on an axis.
pub(super) struct DocumentsOnAxis {
    /// By index.
    pub(super) numbers: Vec<u32>,
    /// Smallest and largest number.
    pub(super) levels: Levels<[u32; 2]>,
}

/// An ordered axis cut into blocks.
pub(super) struct Axis {
    order: Option<Arc<[u32]>>,
    first_position: usize,
    length: usize,
    block: usize,
    /// Residues are taken by this; 1 where the order does not group by them.
    pub(super) modulus: u32,
    /// Nothing for the natural order, whose extents are plain arithmetic.
    extents: Option<Levels<Extent>>,
    sets: Vec<Option<SetOnAxis>>,
    documents: Vec<Option<DocumentsOnAxis>>,
}

impl Axis {
    /// Queries and keys of a part.
    pub(super) fn pair<'a>(
        order: &'a Order,
        tables: &'a Tables,
        lengths: &Lengths,
        blocks: [usize; 2],
    ) -> [Self; 2] {
        let first = lengths.first_position;
        let [query_length, key_length] = [lengths.query_length, lengths.key_length];
        let mut modulus = 1;
        let positions = |sets: &'a [usize]| {
            let sets = sets.iter().map(|&set| &tables.sets[set]);
            sets.flatten().copied()
        };
        let [queries, keys] = match *order {
            Order::Natural => [None, None],
            Order::Residues(by) => {
                modulus = by;
                // Keys of a residue that no query has are left out: a decode step gathers one residue.
                let residues = query_length.min(by as usize);
                let keys = (first..first + residues).map(|position| position % by as usize);
                let mut keys: Vec<usize> = keys.collect();
                keys.sort_unstable();
                let keys = keys
                    .into_iter()
                    .flat_map(|residue| (residue..key_length).step_by(by as usize));
                let queries = (0..by as usize).flat_map(|residue| {
                    let skipped = (residue + by as usize - first % by as usize) % by as usize;
                    (skipped..query_length).step_by(by as usize)
                });
                [
                    Some(queries.map(|index| index as u32).collect::<Arc<[u32]>>()),
                    Some(keys.map(|index| index as u32).collect()),
                ]
            }
            Order::Keys(ref sets) => [None, Some(positions(sets).collect())],
            Order::Queries(ref sets) => {
                let indices = positions(sets).map(|position| position - first as u32);
                [Some(indices.collect()), None]
            }
        };
        [
            Self::new(queries, first, query_length, blocks[0], modulus),
            Self::new(keys, 0, key_length, blocks[1], modulus),
        ]
    }

    fn new(
        order: Option<Arc<[u32]>>,
        first_position: usize,
        natural_length: usize,
        block: usize,
        modulus: u32,
    ) -> Self {
        let length = order.as_ref().map_or(natural_length, |order| order.len());
        let mut axis = Self {
            order,
            first_position,
            length,
            block,
            modulus,
            extents: None,
            sets: Vec::new(),
            documents: Vec::new(),
        };
        if axis.order.is_some() {
            let extents = (0..axis.n_blocks()).map(|block| axis.ordered_extent(block));
            let join = |left: Extent, right: Extent| Extent {
                positions: hull(left.positions, right.positions),
                residues: hull(left.residues, right.residues),
            };
            axis.extents = Some(Levels::new(extents.collect(), join));
        }
        axis
    }

    fn ordered_extent(&self, block: usize) -> Extent {
        let range = self.range(block);
        let residue = |index| self.position(index) % self.modulus;
        let [first, last] = [range.start, range.end - 1];
        let positions = range.map(|index| self.position(index));
        let bounds = |bounds: [u32; 2], position: u32| hull(bounds, [position, position]);
        Extent {
            positions: positions.fold([u32::MAX, 0], bounds),
            // Sorted by residue.
            residues: [residue(first), residue(last)],
        }
    }

    /// The extent of `2^level` blocks, as many of them as there are.
    pub(super) fn extent(&self, level: usize, index: usize) -> Extent {
        match &self.extents {
            Some(extents) => extents.at(level, index),
            None => {
                let size = self.block << level;
                let start = index * size;
                let last = (start + size).min(self.length) - 1;
                Extent {
                    positions: [self.position(start), self.position(last)],
                    residues: [0, 0],
                }
            }
        }
    }

    /// The level at which one range holds all blocks.
    pub(super) fn top_level(&self) -> usize {
        self.n_blocks().next_power_of_two().ilog2() as usize
    }

    /// Prepares what a table's set and documents are on this axis.
    pub(super) fn add_set(&mut self, set: usize, tables: &Tables) {
        if self.sets.len() <= set {
            self.sets.resize_with(set + 1, || None);
        }
        if self.sets[set].is_some() {
            return;
        }
        let words_per_block = self.block.div_ceil(64);
        let mut words = vec![0_u64; self.n_blocks() * words_per_block];
        let mut add = |index: usize| {
            let bit = index % self.block;
            words[index / self.block * words_per_block + bit / 64] |= 1 << (bit % 64);
        };
        let positions = &tables.sets[set];
        match &self.order {
            None => {
                let indices = positions.iter().map(|&position| position as usize);
                let indices =
                    indices.filter_map(|position| position.checked_sub(self.first_position));
                indices.filter(|index| *index < self.length).for_each(add);
            }
            Some(_) if self.modulus == 1 => {
                // Long stretches rise: the set is walked along.
                let mut rest = &positions[..];
                let mut before = 0;
                for index in 0..self.length {
                    let position = self.position(index);
                    if position < before {
                        rest = positions;
                    }
                    before = position;
                    while rest.first().is_some_and(|first| *first < position) {
                        rest = &rest[1..];
                    }
                    if rest.first() == Some(&position) {
                        add(index);
                    }
                }
            }
            Some(_) => {
                let is_in = |index: &usize| positions.binary_search(&self.position(*index)).is_ok();
                (0..self.length).filter(is_in).for_each(add);
            }
        }
        let blocks = words.chunks(words_per_block).enumerate();
        let blocks = blocks.map(|(block, words)| {
            match words.iter().map(|word| word.count_ones() as usize).sum() {
                0 => Holds::Nowhere,
                n if n == self.range(block).len() => Holds::Everywhere,
                _ => Holds::Somewhere,
            }
        });
        let levels = Levels::new(blocks.collect(), |left, right| match left == right {
            true => left,
            false => Holds::Somewhere,
        });
        self.sets[set] = Some(SetOnAxis {
            words,
            words_per_block,
            levels,
        });
    }

    /// Prepares document numbers, which are given by natural index.
    pub(super) fn add_documents(&mut self, documents: usize, numbers: &[u32]) {
        if self.documents.len() <= documents {
            self.documents.resize_with(documents + 1, || None);
        }
        if self.documents[documents].is_some() {
            return;
        }
        let numbers: Vec<u32> = match &self.order {
            None => numbers.to_vec(),
            Some(order) => order.iter().map(|&index| numbers[index as usize]).collect(),
        };
        let blocks = numbers.chunks(self.block).map(|block| {
            let of_one = |number: &u32| [*number, *number];
            block.iter().map(of_one).fold([u32::MAX, 0], hull)
        });
        let levels = Levels::new(blocks.collect(), hull);
        self.documents[documents] = Some(DocumentsOnAxis { numbers, levels });
    }

    /// # Panics
    ///
    /// If the set was not added.
    pub(super) fn set(&self, set: usize) -> &SetOnAxis {
        self.sets[set].as_ref().expect("every set in use was added")
    }

    /// # Panics
    ///
    /// If the documents were not added.
    pub(super) fn documents(&self, documents: usize) -> &DocumentsOnAxis {
        self.documents[documents]
            .as_ref()
            .expect("all documents in use were added")
    }

    pub(super) fn order(&self) -> Option<&Arc<[u32]>> {
        self.order.as_ref()
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.length.div_ceil(self.block)
    }

    /// Whether a block is as long as all others.
    pub(super) fn is_whole(&self, block: usize) -> bool {
        self.range(block).len() == self.block
    }

    /// The indices of a block.
    pub(super) fn range(&self, block: usize) -> std::ops::Range<usize> {
        let start = block * self.block;
        start..(start + self.block).min(self.length)
    }

    /// The absolute position of the query or key at an index of the order.
    pub(super) fn position(&self, index: usize) -> u32 {
        let index = match &self.order {
            None => index,
            Some(order) => order[index] as usize,
        };
        (index + self.first_position) as u32
    }
}

fn hull([a, b]: [u32; 2], [c, d]: [u32; 2]) -> [u32; 2] {
    [a.min(c), b.max(d)]
}
