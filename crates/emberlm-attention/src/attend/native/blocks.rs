//! The blocks that a row of a schedule visits, one by one.

use emberlm_core::{MaskTable, Span};

/// One key block of a query block, or the other way round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) index: usize,
    /// For each query of the pair of blocks a bit for each of its keys; nothing where all are visible.
    pub(super) mask: Option<&'a [u64]>,
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
