//! The product of some rows with a matrix that comes from memory.
//!
//! ```text
//! for each block of b:                                       some rows and columns of it, in the second cache
//!     for each group of rows of a:                           copied, one after the other, into the first cache
//!         for each panel of the block, two vectors wide:     copied too, where three tiles use it, during the one before
//!             for each tile of up to 14 rows of the group:   the sums are registers
//! ```
//!
//! While a block is used the processor is asked for the next one, a few lines with every two rows, so that the time to
//! read `b` hides behind the time to multiply. The rows of `a` may stand anywhere, since they are copied:
//! experts of few rows need no other copy of them (Tan et al. 2024, <https://arxiv.org/abs/2403.08245>).

use std::{mem::MaybeUninit, ops::Range};

use pulp::Simd;
use rayon::prelude::*;

use crate::{
    Real, kernel, lanes,
    matrix::{Store, Threads},
    tile::Rows,
};

/// Bytes of a row of a block at most.
const BLOCK_BYTES: usize = 4096;
/// Rows of a block.
const DEPTH: usize = 64;
/// Rows of `a` that are copied at once at most, of f64 half as many: 21 KB.
const GROUP: usize = 84;
/// Rows of a tile at most, with vectors of AVX-512, of which there are 32; else 6.
const TILE_ROWS: usize = 14;
/// Bytes of two vectors at most, and elements.
const PANEL_BYTES: usize = 2 * LINE;
const PANEL: usize = PANEL_BYTES / size_of::<f32>();
/// Bytes that come from memory together.
const LINE: usize = 64;

/// Rows that lie one after the other, or that are at given places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a, R> {
    /// The first element of row 0.
    pub pointer: *const R,
    /// From one row to the next, in elements.
    pub row_stride: usize,
    /// Of each row, which it is; row by row if there are none.
    pub at: Option<&'a [usize]>,
}

impl<R> Places<'_, R> {
    #[inline(always)]
    fn offset(&self, i: usize) -> usize {
        self.at.map_or(i, |at| at[i]) * self.row_stride
    }
}

/// `c = a b` or `c += a b`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowsProduct<'a, R> {
    /// Rows of `a`, columns of `b`, rows of `b`.
    pub sizes: [usize; 3],
    pub a: Places<'a, R>,
    pub b: Rows<*const R>,
    pub c: Rows<*mut R>,
    pub store: Store,
}

// Safety: what it points to is of the thread that computes it, as `compute` is promised.
unsafe impl<R: Sync> Sync for RowsProduct<'_, R> {}

impl<R: Real> RowsProduct<'_, R> {
    /// Computes it: with several threads, each has some of the columns.
    ///
    /// # Safety
    ///
    /// `a` and `b` can be read, and `c` written, at all their elements, which nobody else writes or reads meanwhile; `c`
    /// overlaps neither `a` nor `b`.
    pub(crate) unsafe fn compute(self, threads: Threads) {
        let [_, n, _] = self.sizes;
        let width = match threads {
            Threads::One => n,
            Threads::Pool => n.div_ceil(rayon::current_num_threads()),
        };
        let width = width.next_multiple_of(PANEL_BYTES / size_of::<R>()).max(1);
        (0..n.div_ceil(width))
            .into_par_iter()
            .with_max_len(1)
            .for_each(|part| {
                let first = part * width;
                multiply(&self.columns(first, width.min(n - first)));
            });
    }

    fn columns(&self, first: usize, n: usize) -> Self {
        let [m, _, k] = self.sizes;
        let (mut b, mut c) = (self.b, self.c);
        b.pointer = b.pointer.wrapping_add(first);
        c.pointer = c.pointer.wrapping_add(first);
        Self {
            sizes: [m, n, k],
            b,
            c,
            ..*self
        }
    }

    /// The blocks of `b`, in the order of their use. A product without an inner size has blocks without rows, since its
    /// zeros are to be written.
    fn blocks(&self) -> impl Iterator<Item = Block<R>> {
        let [_, n, k] = self.sizes;
        let width = BLOCK_BYTES / size_of::<R>();
        let b = self.b;
        (0..n).step_by(width).flat_map(move |column| {
            (0..k.max(1)).step_by(DEPTH).map(move |row| Block {
                pointer: (b.pointer).wrapping_add(row * b.row_stride + column),
                row,
                column,
                depth: DEPTH.min(k - row),
                width: width.min(n - column),
            })
        })
    }
}

/// Some rows and columns of `b`.
#[derive(Debug, Clone, Copy)]
struct Block<R> {
    pointer: *const R,
    row: usize,
    column: usize,
    depth: usize,
    width: usize,
}

/// Asks for the lines of a block, row by row.
#[derive(Debug, Clone, Copy)]
struct Ahead<R> {
    at: *const R,
    /// To the next line, in bytes: 0 after the last one.
    step: usize,
    /// Left of the row.
    n_lines: usize,
    next_row: *const R,
    row_stride: usize,
    lines_of_row: usize,
    n_rows: usize,
}

impl<R: Real> Ahead<R> {
    fn new(block: Option<&Block<R>>, row_stride: usize) -> Self {
        let mut ahead = Self {
            at: std::ptr::null(),
            step: 0,
            n_lines: 0,
            next_row: std::ptr::null(),
            row_stride,
            lines_of_row: 0,
            n_rows: 0,
        };
        if let Some(block) = block {
            ahead.next_row = block.pointer;
            ahead.lines_of_row = (block.width * size_of::<R>()).div_ceil(LINE);
            ahead.n_rows = block.depth;
        }
        ahead.begin_row();
        ahead
    }

    fn begin_row(&mut self) {
        if self.n_rows == 0 {
            (self.step, self.n_lines) = (0, usize::MAX);
            return;
        }
        (self.at, self.step, self.n_lines) = (self.next_row, LINE, self.lines_of_row);
        self.next_row = self.next_row.wrapping_add(self.row_stride);
        self.n_rows -= 1;
    }

    /// Asks for all of them.
    fn all(mut self) {
        while self.step > 0 {
            for _ in 0..self.n_lines {
                prefetch::<false, _>(self.at);
                self.at = self.at.wrapping_byte_add(self.step);
            }
            self.begin_row();
        }
    }

    /// Lines that there are.
    fn n_lines(&self) -> usize {
        self.n_rows * self.lines_of_row + if self.step > 0 { self.n_lines } else { 0 }
    }
}

/// Asks for the line of an element, whether or not there is one; to be written, where the compiler has an instruction for
/// that.
#[inline(always)]
fn prefetch<const TO_WRITE: bool, T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // Safety: it reads nothing that the program sees, and every address may be asked for.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T1, _mm_prefetch};
        match TO_WRITE {
            true => _mm_prefetch::<_MM_HINT_ET0>(at.cast()),
            false => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Rows of a tile at most.
#[inline(always)]
fn tile_rows<R: Real, S: Simd>() -> usize {
    if is_wide::<R, S>() { TILE_ROWS } else { 6 }
}

/// Whether the vectors are those of AVX-512.
#[inline(always)]
fn is_wide<R: Real, S: Simd>() -> bool {
    size_of::<R>() * lanes::<R, S>() == 64
}

/// Elements that begin where a line does.
#[repr(align(64))]
struct Aligned<T>(MaybeUninit<T>);

kernel! {
    /// Computes it on this thread, under the promise of [`RowsProduct::compute`].
    fn multiply<'a, R: Real>(simd: S, product: &'a RowsProduct<'a, R>) -> () {
        // Safety: the caller's promise.
        unsafe { by_blocks(simd, product) };
    }
}

/// # Safety
///
/// As [`RowsProduct::compute`].
#[inline(always)]
unsafe fn by_blocks<R: Real, S: Simd>(simd: S, product: &RowsProduct<'_, R>) {
    let [m, _, _] = product.sizes;
    let row_stride = product.b.row_stride;
    let mut blocks = product.blocks().peekable();
    Ahead::new(blocks.peek(), row_stride).all();
    let n_groups = m.div_ceil(GROUP * size_of::<f32>() / size_of::<R>());
    while let Some(block) = blocks.next() {
        let mut ahead = Ahead::new(blocks.peek(), row_stride);
        let n_panels = block.width.div_ceil(2 * lanes::<R, S>());
        let n_pairs = n_panels * m.div_ceil(tile_rows::<R, S>()) * (block.depth / 2);
        let pace = ahead.n_lines().div_ceil(n_pairs.max(1));
        for group in 0..n_groups {
            let rows = group * m / n_groups..(group + 1) * m / n_groups;
            // Safety: the caller's promise.
            unsafe { of_block(simd, product, block, rows, &mut ahead, pace) };
        }
    }
}

/// Some rows of `a` times a block.
#[inline(always)]
unsafe fn of_block<R: Real, S: Simd>(
    simd: S,
    product: &RowsProduct<'_, R>,
    block: Block<R>,
    group: Range<usize>,
    ahead: &mut Ahead<R>,
    pace: usize,
) {
    let (lanes, depth) = (lanes::<R, S>(), block.depth);
    let (row_stride, c_stride) = (product.b.row_stride, product.c.row_stride);
    let mut rows = Aligned(MaybeUninit::<[[R; DEPTH]; GROUP]>::uninit());
    let mut panels = Aligned(MaybeUninit::<[[[R; PANEL]; DEPTH]; 2]>::uninit());
    let rows: *mut R = rows.0.as_mut_ptr().cast();
    let panels: *mut R = panels.0.as_mut_ptr().cast();
    // Where the panel of column `j` is copied to: the one of the columns before is still in use.
    let panel = |j: usize| panels.wrapping_add(j / (2 * lanes) % 2 * DEPTH * PANEL);
    let n_rows = group.len();
    let n_tiles = n_rows.div_ceil(tile_rows::<R, S>());
    // Safety: rows and columns are inside of the matrices, and the copies large enough.
    unsafe {
        for i in 0..n_rows {
            let from = product.a.offset(group.start + i) + block.row;
            std::ptr::copy_nonoverlapping(
                product.a.pointer.wrapping_add(from),
                rows.add(i * DEPTH),
                depth,
            );
        }
        // A copy is worth its while if three tiles use it.
        let is_copied = |j: usize| n_tiles > 2 && j + 2 * lanes <= block.width;
        let copy = |j: usize| PanelCopy {
            from: Rows::new(block.pointer.wrapping_add(j), row_stride),
            to: panel(j),
            n_rows: if is_copied(j) { depth } else { 0 },
        };
        let mut meanwhile = copy(0);
        for j in (0..block.width).step_by(2 * lanes) {
            let width = (2 * lanes).min(block.width - j);
            let mut columns = Rows::new(block.pointer.wrapping_add(j), row_stride);
            if is_copied(j) {
                // What the panel before left.
                while meanwhile.n_rows > 0 {
                    meanwhile.row(simd);
                }
                columns = Rows::new(panel(j).cast_const(), 2 * lanes);
            } else if width < 2 * lanes {
                // It is filled up with zeros, as tiles read two whole vectors.
                for p in 0..depth {
                    let from = columns.pointer.wrapping_add(p * row_stride);
                    for v in 0..2 {
                        let n = width.saturating_sub(v * lanes).min(lanes);
                        let vector = R::load_some(simd, from.wrapping_add(v * lanes), n);
                        R::store(simd, panel(j).add((2 * p + v) * lanes), vector);
                    }
                }
                columns = Rows::new(panel(j).cast_const(), 2 * lanes);
            }
            meanwhile = copy(j + 2 * lanes);
            for tile in 0..n_tiles {
                let [first, end] = [tile * n_rows / n_tiles, (tile + 1) * n_rows / n_tiles];
                let a = rows.add(first * DEPTH).cast_const();
                let offset = (group.start + first) * c_stride + block.column + j;
                let c = Tile {
                    to: Rows::new(product.c.pointer.wrapping_add(offset), c_stride),
                    adds: product.store == Store::Add || block.row > 0,
                    width,
                };
                macro_rules! of_heights {
                    ($($height:literal)*) => {
                        match end - first {
                            $($height if $height <= 6 || is_wide::<R, S>() => {
                                let ahead = (&mut *ahead, pace);
                                let copy = &mut meanwhile;
                                of_tile::<R, S, $height>(simd, depth, a, columns, c, ahead, copy);
                            })*
                            _ => unreachable!("a tile has at most {} rows", tile_rows::<R, S>()),
                        }
                    };
                }
                of_heights!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
        }
    }
}

/// A panel that is being copied: rows of two vectors.
struct PanelCopy<R> {
    from: Rows<*const R>,
    to: *mut R,
    /// Left to copy.
    n_rows: usize,
}

impl<R: Real> PanelCopy<R> {
    /// Copies the next row.
    #[inline(always)]
    unsafe fn row<S: Simd>(&mut self, simd: S) {
        let lanes = lanes::<R, S>();
        // Safety: as for `of_block`.
        unsafe {
            let from = self.from.pointer;
            R::store(simd, self.to, R::load(simd, from));
            R::store(simd, self.to.add(lanes), R::load(simd, from.add(lanes)));
            self.to = self.to.wrapping_add(2 * lanes);
        }
        self.from.pointer = (self.from.pointer).wrapping_add(self.from.row_stride);
        self.n_rows -= 1;
    }
}

/// Where the sums of a tile go.
#[derive(Debug, Clone, Copy)]
struct Tile<R> {
    to: Rows<*mut R>,
    /// Whether they are added to what is there.
    adds: bool,
    /// Columns.
    width: usize,
}

/// `M` rows by two vectors of columns; with every two rows of the block asks for `pace` lines and copies a row.
#[inline(always)]
unsafe fn of_tile<R: Real, S: Simd, const M: usize>(
    simd: S,
    depth: usize,
    a: *const R,
    b: Rows<*const R>,
    c: Tile<R>,
    (ahead, pace): (&mut Ahead<R>, usize),
    meanwhile: &mut PanelCopy<R>,
) {
    let mut sums = [[R::splat(simd, R::default()); 2]; M];
    let (mut p, mut b_row) = (0, b.pointer);
    // The sums are written when these lines are there.
    for i in 0..M {
        let to = c.to.pointer.wrapping_add(i * c.to.row_stride);
        prefetch::<true, _>(to);
        prefetch::<true, _>(to.wrapping_byte_add(LINE));
    }
    // Safety: as for `of_block`.
    unsafe {
        while p + 2 <= depth {
            let n = ((depth - p) / 2).min(ahead.n_lines.div_ceil(pace.max(1)));
            let (mut at, step) = (ahead.at, ahead.step);
            for _ in 0..n {
                for _ in 0..pace {
                    prefetch::<false, _>(at);
                    at = at.wrapping_byte_add(step);
                }
                if meanwhile.n_rows > 0 {
                    meanwhile.row(simd);
                }
                add_row::<R, S, M>(simd, &mut sums, a.add(p), b_row);
                add_row::<R, S, M>(simd, &mut sums, a.add(p + 1), b_row.add(b.row_stride));
                b_row = b_row.wrapping_add(2 * b.row_stride);
                p += 2;
            }
            ahead.at = at;
            ahead.n_lines = ahead.n_lines.saturating_sub(n * pace);
            if ahead.n_lines == 0 {
                ahead.begin_row();
            }
        }
        if p < depth {
            add_row::<R, S, M>(simd, &mut sums, a.add(p), b_row);
        }
        write(simd, sums, c);
    }
}

/// Adds a column of a tile times a row of a panel.
#[inline(always)]
unsafe fn add_row<R: Real, S: Simd, const M: usize>(
    simd: S,
    sums: &mut [[R::Vector<S>; 2]; M],
    a: *const R,
    b: *const R,
) {
    // Safety: as for `of_block`.
    unsafe {
        let right = [R::load(simd, b), R::load(simd, b.add(lanes::<R, S>()))];
        for (i, sums) in sums.iter_mut().enumerate() {
            let left = R::splat(simd, *a.add(i * DEPTH));
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = R::vmul_add(simd, left, right, *sum);
            }
        }
    }
}

/// Writes sums to rows, or adds them.
#[inline(always)]
unsafe fn write<R: Real, S: Simd, const M: usize>(
    simd: S,
    sums: [[R::Vector<S>; 2]; M],
    c: Tile<R>,
) {
    let (lanes, width, adds) = (lanes::<R, S>(), c.width, c.adds);
    let row = |i: usize| c.to.pointer.wrapping_add(i * c.to.row_stride);
    // Safety: as for `of_block`.
    unsafe {
        match (width == 2 * lanes, adds) {
            (true, false) => {
                for (i, sums) in sums.into_iter().enumerate() {
                    for (v, sum) in sums.into_iter().enumerate() {
                        R::store(simd, row(i).add(v * lanes), sum);
                    }
                }
            }
            (true, true) => {
                for (i, sums) in sums.into_iter().enumerate() {
                    for (v, sum) in sums.into_iter().enumerate() {
                        let to = row(i).add(v * lanes);
                        R::store(simd, to, R::vadd(simd, R::load(simd, to), sum));
                    }
                }
            }
            (false, _) => {
                for (i, sums) in sums.into_iter().enumerate() {
                    for (v, mut sum) in sums.into_iter().enumerate() {
                        let n = width.saturating_sub(v * lanes).min(lanes);
                        let to = row(i).wrapping_add(v * lanes);
                        if adds {
                            sum = R::vadd(simd, R::load_some(simd, to, n), sum);
                        }
                        R::store_some(simd, to, sum, n);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    /// The tests of `matrix` run with the widest vectors that the machine has.
    #[test]
    fn the_widest_vectors_and_none_give_the_same() {
        for [m, n, k] in [
            [1, 1, 1],
            [5, 3, 70],
            [6, 66, 64],
            [7, 70, 0],
            [60, 45, 130],
        ] {
            // Small integers: every sum is exact.
            let number = |i: usize| ((i * 7 + 3) % 11) as f32 - 5.0;
            let a: Vec<f32> = (0..m * k).map(number).collect();
            let b: Vec<f32> = (0..k * n).map(number).collect();
            let of = |scalar: bool| {
                let mut c: Vec<f32> = (0..m * n).map(number).collect();
                let product = RowsProduct {
                    sizes: [m, n, k],
                    a: Places {
                        pointer: a.as_ptr(),
                        row_stride: k,
                        at: None,
                    },
                    b: Rows::new(b.as_ptr(), n),
                    c: Rows::new(c.as_mut_ptr(), n),
                    store: Store::Add,
                };
                // Safety: the matrices have these sizes.
                unsafe {
                    match scalar {
                        true => by_blocks(Scalar, &product),
                        false => product.compute(Threads::One),
                    }
                }
                c
            };
            assert_eq!(of(true), of(false), "{m} x {n} x {k}");
        }
    }
}
