//! What a task of the backward pass holds: its copies of queries, keys and values, and the sums of its gradients.

use emberlm_core::Part;
use emberlm_kernels::{Real, Stored, View, each_vector, kernel};

use super::{
    BLOCK,
    backward::Saved,
    problem::{Problem, pack_columns, pack_rows, packed_columns, packed_rows, padded},
};

/// Private memory of a task.
pub(super) struct Memory<R> {
    pub(super) sums: HeadSums<R>,
    pub(super) rows: QueryRows<R>,
    /// Of each part.
    pub(super) keys: Vec<PackedKeys<R>>,
    pub(super) queries: PackedQueries<R>,
    /// Gradient of the queries, in the order of a part.
    pub(super) d_query: Vec<R>,
    pub(super) pair: PairMemory<R>,
}

/// What is summed over blocks, in the order of the sequence.
pub(super) struct HeadSums<R> {
    pub(super) query: Vec<R>,
    /// This and the next are empty where each key's gradient is complete after one block: see [`adds_once`].
    pub(super) key: Vec<R>,
    pub(super) value: Vec<R>,
}

/// Whether the gradient of each key and value is complete after the one block of keys that it stands in.
pub(super) fn adds_once<E: Stored>(problem: &Problem<'_, E>) -> bool {
    let sizes = problem.sizes();
    let all_keys = |part: &Part| part.key_length() == sizes.key_length;
    matches!(problem.schedule.parts(), [part] if all_keys(part))
        && sizes.n_heads == sizes.n_kv_heads
}

impl<R: Real> Memory<R> {
    /// With room for what tasks put there.
    pub(super) fn with_room<E: Stored<Real = R>>(problem: &Problem<'_, E>) -> Self {
        let sizes = problem.sizes();
        let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
        let parts = problem.schedule.parts();
        let (n_queries, n_keys) = (sizes.query_length, sizes.key_length);
        let of_parts = || parts.iter().map(Part::query_length);
        let n_ordered =
            (parts.iter().filter(|part| part.query_order().is_some())).map(Part::query_length);
        let room = Vec::with_capacity;
        let zeros = |n| vec![R::default(); n];
        let n_summed = if adds_once(problem) { 0 } else { n_keys };
        Self {
            sums: HeadSums {
                query: room(n_queries * d_head),
                key: room(n_summed * d_head),
                value: room(n_summed * d_value),
            },
            rows: QueryRows {
                log_sum_exp: room(n_queries),
                delta: room(n_queries),
            },
            keys: (parts.iter().map(Part::key_length))
                .map(|n| PackedKeys {
                    keys: room(packed_rows(n, sizes.d_head)),
                    key_columns: room(packed_columns(n, sizes.d_head)),
                    value_columns: room(packed_columns(n, sizes.d_value)),
                })
                .collect(),
            queries: {
                let n = of_parts().max().unwrap_or(0);
                PackedQueries {
                    queries: room(packed_rows(n, sizes.d_head)),
                    d_outputs: room(packed_rows(n, sizes.d_value)),
                    rows: QueryRows {
                        log_sum_exp: room(n),
                        delta: room(n),
                    },
                }
            },
            d_query: room(n_ordered.max().unwrap_or(0) * d_head),
            pair: PairMemory {
                scores: zeros(BLOCK * BLOCK),
                weights: zeros(BLOCK * BLOCK),
                cap_slopes: zeros(BLOCK),
                key: zeros(BLOCK * d_head),
                value: zeros(BLOCK * d_value),
            },
        }
    }
}

pub(super) fn set_to_zeros<R: Real>(sums: &mut Vec<R>, n: usize) {
    sums.clear();
    sums.resize(n, R::default());
}

/// What the queries of one head bring.
pub(super) struct QueryRows<R> {
    /// `lse`; zero for a query without keys, whose scores are all hidden.
    pub(super) log_sum_exp: Vec<R>,
    /// `delta - dlse`
    pub(super) delta: Vec<R>,
}

impl<R: Real> QueryRows<R> {
    /// Makes them those of one head, in the order of the sequence.
    pub(super) fn fill<E: Stored<Real = R>>(
        &mut self,
        problem: &Problem<'_, E>,
        saved: &Saved<'_, E>,
        [batch, head]: [usize; 2],
    ) {
        let sizes = problem.sizes();
        let first = (batch * sizes.n_heads + head) * sizes.query_length;
        let log_sum_exp = &saved.log_sum_exp[first..][..sizes.query_length];
        self.delta.resize(sizes.query_length, R::default());
        dots(
            saved.output.first_columns(sizes.d_value),
            saved.d_output.first_columns(sizes.d_value),
            [batch, head],
            &mut self.delta,
        );
        self.log_sum_exp.clear();
        for (query, (lse, delta)) in log_sum_exp.iter().zip(&mut self.delta).enumerate() {
            if *lse == R::NEG_INFINITY {
                // A query without keys has no gradient, whatever comes from behind.
                *delta = R::default();
                self.log_sum_exp.push(R::default());
                continue;
            }
            self.log_sum_exp.push(*lse);
            if problem.with_log_sum_exp {
                let at = [batch, head, query, sizes.d_value];
                *delta = *delta - saved.d_output.at(at).to_real();
            }
        }
    }

    /// Those of `all` in the order of a part.
    pub(super) fn pick(&mut self, all: &Self, order: Option<&[u32]>) {
        for (to, from) in [
            (&mut self.log_sum_exp, &all.log_sum_exp),
            (&mut self.delta, &all.delta),
        ] {
            to.clear();
            match order {
                None => to.extend_from_slice(from),
                Some(order) => to.extend(order.iter().map(|i| from[*i as usize])),
            }
        }
    }

    /// The gradient of a sink, which has no value: `sum -p delta`.
    pub(super) fn d_sink(&self, sink: R) -> R {
        let mut sum = R::default();
        for (lse, delta) in self.log_sum_exp.iter().zip(&self.delta) {
            sum += -((sink - *lse).exp() * *delta);
        }
        sum
    }
}

/// Keys by rows and by columns, values by columns, in the order of a part: what the heads of a group share.
pub(super) struct PackedKeys<R> {
    pub(super) keys: Vec<R>,
    pub(super) key_columns: Vec<R>,
    pub(super) value_columns: Vec<R>,
}

impl<R: Real> PackedKeys<R> {
    pub(super) fn pack<E: Stored<Real = R>>(
        &mut self,
        problem: &Problem<'_, E>,
        part: &Part,
        at: [usize; 2],
    ) {
        let (order, one) = (part.key_order(), R::from_f64(1.0));
        pack_rows(problem.key, at, order, one, &mut self.keys);
        pack_columns(problem.key, at, order, &mut self.key_columns);
        pack_columns(problem.value, at, order, &mut self.value_columns);
    }
}

/// Of the queries of one head, in the order of a part.
pub(super) struct PackedQueries<R> {
    /// Times the scale.
    pub(super) queries: Vec<R>,
    /// Gradients of the output.
    pub(super) d_outputs: Vec<R>,
    pub(super) rows: QueryRows<R>,
}

impl<R: Real> PackedQueries<R> {
    pub(super) fn pack<E: Stored<Real = R>>(
        &mut self,
        problem: &Problem<'_, E>,
        saved: &Saved<'_, E>,
        at: [usize; 2],
        order: Option<&[u32]>,
        rows: &QueryRows<R>,
    ) {
        let d_output = saved.d_output.first_columns(problem.sizes().d_value);
        let (scale, one) = (problem.scores.scale, R::from_f64(1.0));
        pack_rows(problem.query, at, order, scale, &mut self.queries);
        pack_rows(d_output, at, order, one, &mut self.d_outputs);
        self.rows.pick(rows, order);
    }
}

kernel! {
    /// The products of the rows of one head.
    fn dots<'a, E: Stored>(
        simd: S,
        a: View<'a, E>,
        b: View<'a, E>,
        at: [usize; 2],
        to: &'a mut [E::Real],
    ) -> () {
        let [.., width] = a.dims();
        let one = E::Real::from_f64(1.0);
        let mut row_a = vec![E::Real::default(); width];
        let mut row_b = row_a.clone();
        for (i, to) in to.iter_mut().enumerate() {
            a.copy_row([at[0], at[1], i], one, &mut row_a);
            b.copy_row([at[0], at[1], i], one, &mut row_b);
            let mut sum = E::Real::splat(simd, E::Real::default());
            each_vector!(E::Real, S, width, |j, n| {
                // Safety: both rows have `n` elements from `j` on.
                unsafe {
                    let a = E::Real::load_some(simd, row_a.as_ptr().add(j), n);
                    let b = E::Real::load_some(simd, row_b.as_ptr().add(j), n);
                    sum = E::Real::vmul_add(simd, a, b, sum);
                }
            });
            *to = E::Real::reduce_sum(simd, sum);
        }
    }
}

/// What is computed of one pair of blocks, and the sums of one key block.
pub(super) struct PairMemory<R> {
    /// Scores, then their gradients: `[BLOCK queries][BLOCK keys]`.
    pub(super) scores: Vec<R>,
    /// Gradients of the weights, then the weights.
    pub(super) weights: Vec<R>,
    /// Derivatives of the cap, for one row.
    pub(super) cap_slopes: Vec<R>,
    pub(super) key: Vec<R>,
    pub(super) value: Vec<R>,
}
