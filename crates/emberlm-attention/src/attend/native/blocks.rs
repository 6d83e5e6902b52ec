//! The blocks that a row of a schedule visits, one by one.

use emberlm_core::{MaskTable, Span};

use super::BLOCK;

/// One key block of a query block, or the other way round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) index: usize,
    /// For each query of the pair of blocks a bit for each of its keys; nothing where all are visible.
    pub(super) mask: Option<&'a [u64]>,
}

/// Some rows of a pair of blocks, and keys outside of which they see none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Strip {
    pub(super) first_row: usize,
    pub(super) n_rows: usize,
    pub(super) first_key: usize,
    pub(super) n_keys: usize,
}

/// Rows that are looked at together, and the granularity of their keys: whole vectors of any machine.
const STRIP: usize = 16;

/// The strips of a pair of blocks, without those that see nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Strips {
    all: [Strip; BLOCK / STRIP],
    n: usize,
}

impl Strips {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Strip> {
        self.all[..self.n].iter()
    }

    /// Whether all rows may see all keys.
    pub(super) fn are_whole(&self, n_rows: usize) -> bool {
        self.n == 1 && self.all[0] == Strip::whole(n_rows)
    }
}

impl Block<'_> {
    /// The first `n_rows` rows, in strips: a block that a window or the causal diagonal cuts is computed in part.
    #[inline(always)]
    pub(super) fn strips(&self, n_rows: usize) -> Strips {
        let mut strips = Strips::default();
        let Some(mask) = self.mask else {
            strips.all[0] = Strip::whole(n_rows);
            strips.n = 1;
            return strips;
        };
        for (i, rows) in mask[..n_rows].chunks(STRIP).enumerate() {
            let visible = rows.iter().fold(0, |all, row| all | row);
            if visible == 0 {
                continue;
            }
            let first_key = visible.trailing_zeros() as usize / STRIP * STRIP;
            let end = BLOCK - visible.leading_zeros() as usize;
            let strip = Strip {
                first_row: i * STRIP,
                n_rows: rows.len(),
                first_key,
                n_keys: end.next_multiple_of(STRIP) - first_key,
            };
            match strips.all[..strips.n].last_mut() {
                Some(last) if last.goes_on_in(&strip) => last.n_rows += strip.n_rows,
                _ => {
                    strips.all[strips.n] = strip;
                    strips.n += 1;
                }
            }
        }
        strips
    }
}

impl Strip {
    /// All keys.
    fn whole(n_rows: usize) -> Self {
        Self {
            n_rows,
            n_keys: BLOCK,
            ..Self::default()
        }
    }

    /// Whether both together are one strip.
    fn goes_on_in(&self, next: &Self) -> bool {
        let keys = |strip: &Self| (strip.first_key, strip.n_keys);
        self.first_row + self.n_rows == next.first_row && keys(self) == keys(next)
    }
}

/// The blocks of some spans, in order.
pub(super) fn blocks<'a>(
    masks: &'a MaskTable,
    spans: &'a [Span],
) -> impl Iterator<Item = Block<'a>> + 'a {
    spans.iter().flat_map(|span| {
        let (start, n_blocks, mask) = match *span {
            Span::Full { start, n_blocks } => (start, n_blocks, None),
            Span::Partial { block, mask } => (block, 1, Some(masks.words(mask))),
        };
        (start..start + n_blocks).map(move |index| Block {
            index: index as usize,
            mask,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strips(n_rows: usize, visible: impl Fn(usize) -> u64) -> Vec<[usize; 4]> {
        let mask: Vec<u64> = (0..BLOCK).map(visible).collect();
        let block = Block {
            index: 0,
            mask: Some(&mask),
        };
        let strips = block.strips(n_rows);
        let numbers =
            |strip: &Strip| [strip.first_row, strip.n_rows, strip.first_key, strip.n_keys];
        strips.iter().map(numbers).collect()
    }

    #[test]
    fn strips_are_the_parts_of_a_block_in_which_a_row_sees_a_key() {
        let causal = |row: usize| u64::MAX >> (63 - row);
        let expected = [
            [0, 16, 0, 16],
            [16, 16, 0, 32],
            [32, 16, 0, 48],
            [48, 2, 0, 64],
        ];
        assert_eq!(strips(50, causal), expected);
        // From key 33 on in rows that see any; nothing in others.
        let corner = |row: usize| if row < 16 { 0 } else { 1 << 33 };
        assert_eq!(strips(64, corner), [[16, 48, 32, 16]]);
        assert_eq!(strips(64, |_| 0), [[0; 4]; 0]);
        let block = Block {
            index: 0,
            mask: None,
        };
        assert!(block.strips(7).are_whole(7));
    }
}
