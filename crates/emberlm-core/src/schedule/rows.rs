//! Block-sparse rows.

/// Blocks that a row of blocks visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Span {
    /// A run of blocks whose every pair is visible. They are as long as all others: a shorter block at an end of the
    /// sequence is never in a run.
    Full {
        /// The first block.
        start: u32,
        /// Number of blocks, at least 1.
        n_blocks: u32,
    },
    /// One block of which some pairs are visible, or one at an end of the sequence.
    Partial {
        /// The block.
        block: u32,
        /// Its mask in the schedule's [`MaskTable`](super::MaskTable), always `[query, key]`.
        mask: u32,
    },
}

impl Span {
    /// The blocks of the span.
    pub fn blocks(&self) -> std::ops::Range<usize> {
        let (start, n_blocks) = match *self {
            Self::Full { start, n_blocks } => (start as usize, n_blocks as usize),
            Self::Partial { block, .. } => (block as usize, 1),
        };
        start..start + n_blocks
    }
}

/// For each row of blocks the spans that it visits, rising; a row may have none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockRows {
    offsets: Vec<usize>,
    spans: Vec<Span>,
}

impl BlockRows {
    pub(super) fn new() -> Self {
        Self {
            offsets: vec![0],
            spans: Vec::new(),
        }
    }

    /// Adds a span to the row that is being written. Runs that touch become one.
    pub(super) fn push(&mut self, span: Span) {
        let is_first = self.offsets.last() == Some(&self.spans.len());
        if let (Span::Full { start, n_blocks }, false) = (span, is_first)
            && let Some(Span::Full {
                start: before,
                n_blocks: n_before,
            }) = self.spans.last_mut()
            && *before + *n_before == start
        {
            *n_before += n_blocks;
            return;
        }
        self.spans.push(span);
    }

    pub(super) fn end_row(&mut self) {
        self.offsets.push(self.spans.len());
    }

    /// Number of rows of blocks.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The spans of a row of blocks, rising and disjoint.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn spans(&self, row: usize) -> &[Span] {
        &self.spans[self.offsets[row]..self.offsets[row + 1]]
    }

    /// Number of spans of all rows.
    pub fn n_spans(&self) -> usize {
        self.spans.len()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.offsets[..]) + size_of_val(&self.spans[..])
    }

    /// For each of `n_columns` columns of blocks the rows that visit it, in as many steps as there are spans in both.
    ///
    /// A column's run begins where a row visits it whole and the row before does not: only these differences are
    /// looked at, never the blocks inside of runs.
    pub(super) fn transposed(&self, n_columns: usize) -> Self {
        let mut started = vec![0_u32; n_columns];
        let mut found: Vec<(u32, Span)> = Vec::with_capacity(self.spans.len());
        let mut before: Vec<[u32; 2]> = Vec::new();
        for row in 0..=self.len() {
            // One empty row at the end closes all runs.
            let spans = if row < self.len() {
                self.spans(row)
            } else {
                &[]
            };
            let runs = spans.iter().filter_map(|span| match *span {
                Span::Full { start, n_blocks } => Some([start, start + n_blocks]),
                Span::Partial { .. } => None,
            });
            let runs: Vec<[u32; 2]> = runs.collect();
            for_each_difference(&before, &runs, |column| {
                let start = started[column as usize];
                let n_blocks = row as u32 - start;
                found.push((column, Span::Full { start, n_blocks }));
            });
            for_each_difference(&runs, &before, |column| {
                started[column as usize] = row as u32;
            });
            for span in spans {
                if let Span::Partial { block, mask } = *span {
                    let block_row = row as u32;
                    found.push((
                        block,
                        Span::Partial {
                            block: block_row,
                            mask,
                        },
                    ));
                }
            }
            before = runs;
        }
        // Counting sort by column, which keeps the rows of a column rising.
        let mut offsets = vec![0_usize; n_columns + 1];
        for (column, _) in &found {
            offsets[*column as usize + 1] += 1;
        }
        for column in 0..n_columns {
            offsets[column + 1] += offsets[column];
        }
        let mut next = offsets.clone();
        let mut spans = vec![
            Span::Full {
                start: 0,
                n_blocks: 0
            };
            found.len()
        ];
        for (column, span) in found {
            let place = &mut next[column as usize];
            spans[*place] = span;
            *place += 1;
        }
        Self { offsets, spans }
    }
}

/// Calls a function on every number in the first ranges but not in the second; both rise and do not touch.
fn for_each_difference(ranges: &[[u32; 2]], without: &[[u32; 2]], mut visit: impl FnMut(u32)) {
    let mut next = 0;
    for &[start, end] in ranges {
        let mut at = start;
        while at < end {
            while without.get(next).is_some_and(|range| range[1] <= at) {
                next += 1;
            }
            let [hole, after] = without.get(next).copied().unwrap_or([end, end]);
            (at..hole.min(end)).for_each(&mut visit);
            at = at.max(after.min(end)).max(hole.min(end));
        }
    }
}
