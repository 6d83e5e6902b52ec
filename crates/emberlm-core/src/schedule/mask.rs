//! The deduplicated masks of all partial blocks of a schedule.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::BlockSizes;

/// Bit masks of blocks, each different from all others.
///
/// A mask holds a row for each query of a block and a bit for each key: key `c` of a row is bit `c % 64` of word
/// `c / 64`. A set bit is a visible pair. Rows and bits beyond the ends of the sequence are zero.
///
/// ```
/// use emberlm_core::{BatchData, BlockSizes, Lengths, Pattern, Schedule};
///
/// let blocks = BlockSizes { query: 4, key: 4 };
/// let schedule = Schedule::compile(&Pattern::causal(), &Lengths::square(8), &blocks, &BatchData::new())?;
/// let masks = schedule.masks();
/// assert_eq!(masks.len(), 1); // both blocks on the diagonal have the same
/// assert_eq!(masks.words(0), [0b0001, 0b0011, 0b0111, 0b1111]);
/// # Ok::<(), emberlm_core::PatternError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskTable {
    n_rows: usize,
    words_per_row: usize,
    words: Vec<u64>,
    n_visible: Vec<u32>,
}

impl MaskTable {
    /// Number of masks.
    pub fn len(&self) -> usize {
        self.n_visible.len()
    }

    /// Whether there is no mask: every block that is visited is full.
    pub fn is_empty(&self) -> bool {
        self.n_visible.is_empty()
    }

    /// Words of each row of a mask.
    pub fn words_per_row(&self) -> usize {
        self.words_per_row
    }

    /// All words of a mask, row by row. Shape: `[query block, words_per_row]`.
    ///
    /// # Panics
    ///
    /// If there is no such mask.
    pub fn words(&self, mask: u32) -> &[u64] {
        let n_words = self.n_rows * self.words_per_row;
        &self.words[mask as usize * n_words..][..n_words]
    }

    /// The words of one row of a mask.
    ///
    /// # Panics
    ///
    /// If there is no such mask or row.
    pub fn row(&self, mask: u32, row: usize) -> &[u64] {
        &self.words(mask)[row * self.words_per_row..][..self.words_per_row]
    }

    /// Whether a pair of a block is visible.
    ///
    /// # Panics
    ///
    /// If there is no such mask, row or column.
    pub fn is_visible(&self, mask: u32, row: usize, column: usize) -> bool {
        self.row(mask, row)[column / 64] >> (column % 64) & 1 == 1
    }

    /// Visible pairs of a mask.
    ///
    /// # Panics
    ///
    /// If there is no such mask.
    pub fn n_visible(&self, mask: u32) -> u32 {
        self.n_visible[mask as usize]
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.words[..]) + size_of_val(&self.n_visible[..])
    }
}

/// Collects masks, each once.
pub(super) struct Masks {
    table: MaskTable,
    by_hash: HashMap<u64, u32>,
}

impl Masks {
    pub(super) fn new(blocks: &BlockSizes) -> Self {
        Self {
            table: MaskTable {
                n_rows: blocks.query,
                words_per_row: blocks.key.div_ceil(64),
                words: Vec::new(),
                n_visible: Vec::new(),
            },
            by_hash: HashMap::new(),
        }
    }

    /// The number of a mask, which is new or was seen before.
    pub(super) fn number(&mut self, words: &[u64]) -> u32 {
        let mut hash = hash(words);
        loop {
            match self.by_hash.entry(hash) {
                Entry::Occupied(entry) if self.table.words(*entry.get()) == words => {
                    return *entry.get();
                }
                // Another mask with this hash.
                Entry::Occupied(_) => hash = hash.wrapping_add(1),
                Entry::Vacant(entry) => {
                    let mask = self.table.n_visible.len() as u32;
                    entry.insert(mask);
                    self.table.words.extend_from_slice(words);
                    let n_visible = words.iter().map(|word| word.count_ones()).sum();
                    self.table.n_visible.push(n_visible);
                    return mask;
                }
            }
        }
    }

    pub(super) fn table(&self) -> &MaskTable {
        &self.table
    }

    pub(super) fn finish(mut self) -> MaskTable {
        self.table.words.shrink_to_fit();
        self.table.n_visible.shrink_to_fit();
        self.table
    }
}

/// Multiply and rotate, a word at a time: masks are long, and the standard hash would take most of a compilation.
fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0, |hash: u64, word| {
        (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}
