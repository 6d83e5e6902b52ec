//! What is known of a query after some of its keys, and what becomes of it.

use emberlm_kernels::{Real, Shared, Stored, kernel, lanes};
use pulp::Simd;

use super::problem::Sizes;

/// Of some queries, the largest score, the total of the weights and the weighted sum of the values.
pub(super) struct Sums<R> {
    pub(super) width: usize,
    pub(super) maxima: Vec<R>,
    pub(super) totals: Vec<R>,
    pub(super) values: Vec<R>,
}

/// The same of one query.
pub(super) struct RowSums<'a, R> {
    pub(super) maximum: R,
    pub(super) total: R,
    pub(super) values: &'a [R],
}

pub(super) struct RowSumsMut<'a, R> {
    pub(super) maximum: &'a mut R,
    pub(super) total: &'a mut R,
    pub(super) values: &'a mut [R],
}

pub(super) struct SharedSums<'a, R> {
    pub(super) width: usize,
    pub(super) maxima: Shared<'a, R>,
    pub(super) totals: Shared<'a, R>,
    pub(super) values: Shared<'a, R>,
}

impl<R: Real> Sums<R> {
    pub(super) fn new(n_rows: usize, width: usize) -> Self {
        Self {
            width,
            maxima: vec![R::NEG_INFINITY; n_rows],
            totals: vec![R::default(); n_rows],
            values: vec![R::default(); n_rows * width],
        }
    }

    pub(super) fn row(&self, i: usize) -> RowSums<'_, R> {
        RowSums {
            maximum: self.maxima[i],
            total: self.totals[i],
            values: &self.values[i * self.width..(i + 1) * self.width],
        }
    }

    pub(super) fn row_mut(&mut self, i: usize) -> RowSumsMut<'_, R> {
        RowSumsMut {
            maximum: &mut self.maxima[i],
            total: &mut self.totals[i],
            values: &mut self.values[i * self.width..(i + 1) * self.width],
        }
    }
}

impl<'a, R: Real> SharedSums<'a, R> {
    /// # Safety
    ///
    /// Nobody else has this row.
    pub(super) unsafe fn row(&self, i: usize) -> RowSumsMut<'a, R> {
        // Safety: the caller's.
        unsafe {
            RowSumsMut {
                maximum: &mut self.maxima.part(i, 1)[0],
                total: &mut self.totals.part(i, 1)[0],
                values: self.values.part(i * self.width, self.width),
            }
        }
    }
}

impl<R: Real> RowSumsMut<'_, R> {
    /// Before all keys there is the head's sink, if it has one.
    pub(super) fn begin(self, sink: Option<R>) {
        *self.maximum = sink.unwrap_or(R::NEG_INFINITY);
        *self.total = sink.map_or(R::default(), |_| R::from_f64(1.0));
        self.values.fill(R::default());
    }

    pub(super) fn copy_from(self, from: RowSums<'_, R>) {
        *self.maximum = from.maximum;
        *self.total = from.total;
        self.values.copy_from_slice(from.values);
    }

    /// Turns the `n` scores of a row into weights, and brings its sums to the new maximum.
    ///
    /// # Safety
    ///
    /// `n` scores are at `scores`, this caller's alone; `n` and the width of the values are multiples of the lanes.
    #[inline(always)]
    pub(super) unsafe fn take<S: Simd>(self, simd: S, scores: *mut R, n: usize) {
        let lanes = lanes::<R, S>();
        // Safety: the caller's.
        unsafe {
            let mut largest = R::splat(simd, R::NEG_INFINITY);
            for j in (0..n).step_by(lanes) {
                largest = R::vmax(simd, largest, R::load(simd, scores.add(j)));
            }
            let largest = R::reduce_max(simd, largest);
            let old = *self.maximum;
            let new = if largest > old { largest } else { old };
            let mut shift = new;
            if new == R::NEG_INFINITY {
                let scores = std::slice::from_raw_parts_mut(scores, n);
                if scores.iter().all(|score| *score == R::NEG_INFINITY) {
                    // Nothing is visible so far.
                    scores.fill(R::default());
                    return;
                }
                // A maximum may overlook NaN, the weights must not.
                shift = R::default();
            }
            let shift = R::splat(simd, shift);
            let mut total = R::splat(simd, R::default());
            for j in (0..n).step_by(lanes) {
                let x = R::vsub(simd, R::load(simd, scores.add(j)), shift);
                let weight = R::vexp(simd, x);
                R::store(simd, scores.add(j), weight);
                total = R::vadd(simd, total, weight);
            }
            let total = R::reduce_sum(simd, total);
            if new > old && *self.total != R::default() {
                let factor = (old - new).exp();
                *self.total = *self.total * factor;
                let vector = R::splat(simd, factor);
                let values = self.values.as_mut_ptr();
                for j in (0..self.values.len()).step_by(lanes) {
                    let x = R::load(simd, values.add(j));
                    R::store(simd, values.add(j), R::vmul(simd, x, vector));
                }
            }
            *self.maximum = new;
            *self.total += total;
        }
    }

    pub(super) fn as_ref(&self) -> RowSums<'_, R> {
        RowSums {
            maximum: *self.maximum,
            total: *self.total,
            values: self.values,
        }
    }
}

kernel! {
    fn divide<'a, E: Stored>(
        _simd: S,
        values: &'a [E::Real],
        by: E::Real,
        to: &'a mut [E],
    ) -> () {
        for (to, value) in to.iter_mut().zip(values) {
            *to = E::from_real(*value / by);
        }
    }
}

/// Where the results go.
pub(super) struct Results<'a, E: Stored> {
    pub(super) d_output: usize,
    pub(super) output: Shared<'a, E>,
    pub(super) log_sum_exp: Shared<'a, E::Real>,
}

impl<E: Stored> Results<'_, E> {
    /// Writes the output and the log-sum-exp of a row of `[batch_size, n_heads, query_length]`.
    pub(super) fn finish(&self, sizes: &Sizes, row: usize, sums: RowSums<'_, E::Real>) {
        // A query without keys: zeros, and the negative infinity that is there.
        let empty = sums.total == E::Real::default();
        let log_sum_exp = match empty {
            true => E::Real::NEG_INFINITY,
            false => sums.maximum + sums.total.ln(),
        };
        let (head_row, query) = (row / sizes.query_length, row % sizes.query_length);
        let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
        let at = (batch * sizes.query_length + query) * sizes.n_heads + head;
        // Safety: each row is finished once.
        unsafe {
            let output = self.output.part(at * self.d_output, self.d_output);
            let (output, more) = output.split_at_mut(sizes.d_value);
            if empty {
                output.fill(E::from_real(E::Real::default()));
            } else {
                divide(sums.values, sums.total, output);
            }
            if let [column] = more {
                *column = E::from_real(log_sum_exp);
            }
            self.log_sum_exp.part(row, 1)[0] = log_sum_exp;
        }
    }
}
