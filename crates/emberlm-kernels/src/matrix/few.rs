//! The product of a few rows, as in decoding, where the time is that of reading the right matrix once: `gemm` reads it
//! with one thread.

use rayon::prelude::*;

use super::{Matrix, Store};
use crate::{Real, Shared, kernel, lanes, vectors};

/// Elements of the right matrix that are worth a thread of their own.
const A_THREAD: usize = 1 << 15;

/// Whether the right matrix is one of rows, or of columns, of adjacent elements.
pub(super) fn takes<R>(b: &Matrix<'_, R>) -> bool {
    b.column_stride == 1 || b.row_stride == 1
}

/// Each thread computes some columns of the result, whose sums are the same however many threads there are.
pub(super) fn product<R: Real>(a: &Matrix<'_, R>, b: &Matrix<'_, R>, c: &mut [R], store: Store) {
    let ([m, k], [_, n]) = (a.dims(), b.dims());
    let n_threads = rayon::current_num_threads().min(n * k / A_THREAD).max(1);
    // Whole vectors of any machine.
    let width = n.div_ceil(n_threads).next_multiple_of(16);
    let left = in_order(a);
    let c = Shared::new(c);
    let columns = |part: usize| {
        let first = part * width;
        let n_columns = width.min(n - first);
        for i in 0..m {
            let left = &left[i * k..(i + 1) * k];
            // Safety: each part has columns of its own.
            let to = unsafe { c.part(i * n + first, n_columns) };
            if store == Store::Replace {
                to.fill(R::default());
            }
            match b.column_stride {
                1 => add_scaled_rows(left, b, first, to),
                _ => add_dots(left, b, first, to),
            }
        }
    };
    let n_parts = n.div_ceil(width);
    match n_parts {
        1 => columns(0),
        _ => (0..n_parts)
            .into_par_iter()
            .with_max_len(1)
            .for_each(columns),
    }
}

fn in_order<R: Real>(a: &Matrix<'_, R>) -> Vec<R> {
    let [m, k] = a.dims();
    let mut elements = Vec::with_capacity(m * k);
    for i in 0..m as isize {
        for j in 0..k as isize {
            // Safety: inside the matrix, all of whose elements can be read.
            elements.push(unsafe { *a.first.offset(i * a.row_stride + j * a.column_stride) });
        }
    }
    elements
}

/// Rows of the right matrix that are added at once.
const AT_ONCE: usize = 4;

kernel! {
    /// `to += sum_p a_p b_p`, for rows of adjacent elements, from column `first` on.
    fn add_scaled_rows<'a, R: Real>(
        simd: S,
        a: &'a [R],
        b: &'a Matrix<'a, R>,
        first: usize,
        to: &'a mut [R],
    ) -> () {
        let width = to.len();
        let to = to.as_mut_ptr();
        for (group, a) in a.chunks(AT_ONCE).enumerate() {
            // Safety: the rows are inside the matrix, and so are the columns of `to`.
            unsafe {
                let mut factors = [R::splat(simd, R::default()); AT_ONCE];
                let mut rows = [b.first; AT_ONCE];
                for (p, x) in a.iter().enumerate() {
                    let row = (group * AT_ONCE + p) as isize * b.row_stride;
                    factors[p] = R::splat(simd, *x);
                    rows[p] = b.first.offset(row).add(first);
                }
                for (j, n) in vectors::<R, S>(width) {
                    let mut sum = R::load_some(simd, to.add(j), n);
                    for p in 0..a.len() {
                        let x = R::load_some(simd, rows[p].add(j), n);
                        sum = R::vmul_add(simd, factors[p], x, sum);
                    }
                    R::store_some(simd, to.add(j), sum, n);
                }
            }
        }
    }
}

kernel! {
    /// `to_j += a b_j`, for columns of adjacent elements, from column `first` on.
    fn add_dots<'a, R: Real>(
        simd: S,
        a: &'a [R],
        b: &'a Matrix<'a, R>,
        first: usize,
        to: &'a mut [R],
    ) -> () {
        let whole = a.len() / lanes::<R, S>() * lanes::<R, S>();
        for (j, to) in to.iter_mut().enumerate() {
            // Safety: the column is inside the matrix, and as long as `a`.
            unsafe {
                let column = b.first.offset((first + j) as isize * b.column_stride);
                let mut sums = R::splat(simd, R::default());
                for (p, _) in vectors::<R, S>(whole) {
                    let x = R::load(simd, column.add(p));
                    sums = R::vmul_add(simd, R::load(simd, a.as_ptr().add(p)), x, sums);
                }
                let mut sum = R::reduce_sum(simd, sums);
                for (p, a) in a.iter().enumerate().skip(whole) {
                    sum += *a * *column.add(p);
                }
                *to += sum;
            }
        }
    }
}
