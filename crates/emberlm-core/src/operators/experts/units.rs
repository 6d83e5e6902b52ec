//! What a thread computes at once: some rows of an expert, and of these one part of the inner width after the other.

use std::ops::Range;

use emberlm_kernels::{
    Real, Shared,
    matrix::{Matrix, Store},
};

/// Rows of a unit at most: a product brings the weight into its own order once a unit.
const ROWS: usize = 1024;
/// Inner width of a part at most.
const INNER: usize = 1024;
/// Elements of the outputs of a wave, and units, for each thread at least, but in the last one.
const WAVE: usize = 1 << 20;
const UNITS: usize = 4;

/// Some rows of one expert.
pub(super) struct Unit {
    pub expert: usize,
    pub rows: Range<usize>,
}

/// A part of the inner width.
pub(super) struct Part {
    pub inner: Range<usize>,
}

/// The units of all experts, expert by expert; one without rows for an expert without rows.
pub(super) fn units(group_sizes: &[usize]) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut first = 0;
    for (expert, &n) in group_sizes.iter().enumerate() {
        let n_units = n.div_ceil(ROWS).max(1);
        units.extend(pieces(n, n_units).map(|rows| Unit {
            expert,
            rows: first + rows.start..first + rows.end,
        }));
        first += n;
    }
    units
}

/// The parts of an inner width, at least one.
pub(super) fn parts(d_ff: usize) -> impl Iterator<Item = Part> {
    pieces(d_ff, d_ff.div_ceil(INNER).max(1)).map(|inner| Part { inner })
}

/// Width of a part at most.
pub(super) fn widest_part(d_ff: usize) -> usize {
    d_ff.min(INNER)
}

/// Ranges of similar length, at most `most`, that cover `n`.
pub(super) fn cut(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    pieces(n, n.div_ceil(most))
}

fn pieces(n: usize, n_pieces: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n_pieces).map(move |piece| piece * n / n_pieces..(piece + 1) * n / n_pieces)
}

/// Units that are computed before their outputs, of `width` elements each row, are added up: some for each thread, so that
/// no thread waits long for the others.
pub(super) fn waves<'a, 'b>(units: &'b [&'a Unit], width: usize) -> Vec<&'b [&'a Unit]> {
    let n_threads = rayon::current_num_threads();
    let mut waves = Vec::new();
    let (mut first, mut n_rows) = (0, 0);
    for (i, unit) in units.iter().enumerate() {
        n_rows += unit.rows.len();
        let is_full = n_rows * width >= WAVE * n_threads && i + 1 - first >= UNITS * n_threads;
        if is_full || i + 1 == units.len() {
            waves.push(&units[first..=i]);
            (first, n_rows) = (i + 1, 0);
        }
    }
    waves
}

/// The rows of units that follow each other.
pub(super) fn rows_of(units: &[&Unit]) -> Range<usize> {
    match (units.first(), units.last()) {
        (Some(first), Some(last)) => first.rows.start..last.rows.end,
        _ => 0..0,
    }
}

impl Unit {
    /// Where its elements are among those of all rows, of `width` each.
    pub(super) fn elements(&self, width: usize) -> Range<usize> {
        self.rows.start * width..self.rows.end * width
    }

    /// Its elements among those of all rows.
    ///
    /// # Safety
    ///
    /// Nobody else has those of this unit.
    pub(super) unsafe fn part_of<'a, R>(&self, to: &Shared<'a, R>, width: usize) -> &'a mut [R] {
        let elements = self.elements(width);
        // Safety: the caller's promise.
        unsafe { to.part(elements.start, elements.len()) }
    }

    /// Where a part's inner elements are among those of the unit: `[n_rows, n_inner]`, part after part.
    pub(super) fn inner(&self, part: &Part) -> Range<usize> {
        let n = self.rows.len();
        part.inner.start * n..part.inner.end * n
    }
}

impl Part {
    /// Of a weight into the inner width, of `n` rows from `first` on.
    pub(super) fn columns<'a, R: Real>(
        &self,
        weight: &'a Matrix<'_, R>,
        first: usize,
        n: usize,
    ) -> Matrix<'a, R> {
        weight.block(first..first + n, self.inner.clone())
    }

    /// Of a weight out of the inner width, which begins at row `first`.
    pub(super) fn rows<'a, R: Real>(
        &self,
        weight: &'a Matrix<'_, R>,
        first: usize,
    ) -> Matrix<'a, R> {
        weight.rows(first + self.inner.start, self.inner.len())
    }

    /// What a sum over the parts does with what is there.
    pub(super) fn store(&self) -> Store {
        match self.inner.start {
            0 => Store::Replace,
            _ => Store::Add,
        }
    }
}
