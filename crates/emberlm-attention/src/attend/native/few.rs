//! The forward pass for a few queries, as in decoding: keys and values are read where they lie, each once a query.
//! Packing them, which many queries share, would take longer than all the rest.

use emberlm_core::Part;
use emberlm_kernels::{Real, Stored, lanes};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    blocks::blocks,
    problem::{Problem, padded, positions},
    scores::{Head, Row},
    sums::{Results, Sums},
};

/// Rows, of all query heads of a key/value head, up to which packing does not pay.
const FEW_ROWS: usize = 8;

/// Whether this is the faster way.
pub(super) fn takes<E: Stored>(problem: &Problem<'_, E>) -> bool {
    let sizes = problem.sizes();
    sizes.query_length * (sizes.n_heads / sizes.n_kv_heads) <= FEW_ROWS
}

/// Runs the forward pass; every head is one task.
pub(super) fn run<E: Stored>(problem: &Problem<'_, E>, results: &Results<'_, E>) {
    let sizes = problem.sizes();
    let parts: Vec<(&Part, Vec<E::Real>)> = problem
        .schedule
        .parts()
        .iter()
        .map(|part| (part, positions(part.key_length(), part.key_order())))
        .collect();
    let arch = Arch::new();
    (0..sizes.batch_size * sizes.n_heads)
        .into_par_iter()
        .for_each(|head_row| {
            let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
            let mut sums = Sums::new(sizes.query_length, padded(sizes.d_value));
            for query in 0..sizes.query_length {
                sums.row_mut(query).begin(problem.sink(head));
            }
            arch.dispatch(HeadRows {
                problem,
                parts: &parts,
                batch,
                head,
                sums: &mut sums,
            });
            for query in 0..sizes.query_length {
                results.finish(
                    &sizes,
                    head_row * sizes.query_length + query,
                    sums.row(query),
                );
            }
        });
}

/// All queries of one head of one batch row.
struct HeadRows<'a, 'b, E: Stored> {
    problem: &'a Problem<'b, E>,
    parts: &'a [(&'a Part, Vec<E::Real>)],
    batch: usize,
    head: usize,
    sums: &'a mut Sums<E::Real>,
}

impl<E: Stored> WithSimd for HeadRows<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            problem,
            parts,
            batch,
            head,
            sums,
        } = self;
        let sizes = problem.sizes();
        let lanes = lanes::<E::Real, S>();
        let one = E::Real::from_f64(1.0);
        let scores_of = Head::new(problem, batch, head);
        let kv_head = sizes.kv_head(head);
        let zeros = |n| vec![E::Real::default(); n];
        let mut query_row = zeros(padded(sizes.d_head));
        let mut key_row = zeros(padded(sizes.d_head));
        let mut value_row = zeros(padded(sizes.d_value));
        let mut scores = [E::Real::default(); BLOCK];
        for (part, key_positions) in parts {
            let rows = part.layout(batch, head).rows();
            for row in 0..part.query_length() {
                let query = part.query_order().map_or(row, |order| order[row] as usize);
                let at = [batch, head, query];
                problem
                    .query
                    .copy_row(at, problem.scores.scale, &mut query_row);
                let spans = rows.spans(row / BLOCK);
                for block in blocks(problem.schedule.masks(), spans) {
                    let visible = block.mask.map(|mask| mask[row % BLOCK]);
                    let place = Row::new(problem, part, key_positions, row, block.index, visible);
                    if place.visible == Some(0) {
                        continue;
                    }
                    let n_keys = scores_of.n_keys(&place);
                    for (j, score) in scores.iter_mut().enumerate().take(n_keys) {
                        let key = [batch, kv_head, scores_of.key(&place, j)];
                        problem.key.copy_row(key, one, &mut key_row);
                        let mut sum = E::Real::splat(simd, E::Real::default());
                        for c in (0..key_row.len()).step_by(lanes) {
                            // Safety: both rows are padded to whole vectors.
                            unsafe {
                                let query = E::Real::load(simd, query_row.as_ptr().add(c));
                                let key = E::Real::load(simd, key_row.as_ptr().add(c));
                                sum = E::Real::vmul_add(simd, query, key, sum);
                            }
                        }
                        *score = E::Real::reduce_sum(simd, sum);
                    }
                    // Safety: the scores are a block, and the sums' rows are padded to whole vectors.
                    unsafe {
                        scores_of.apply(simd, &place, scores.as_mut_ptr(), None);
                        sums.row_mut(query).take(simd, scores.as_mut_ptr(), BLOCK);
                    }
                    let kept = scores_of.kept(&place);
                    let values = sums.row_mut(query).values;
                    for (j, weight) in scores.iter().enumerate().take(n_keys) {
                        let weight = *weight * kept.map_or(one, |kept| kept[j]);
                        let key = [batch, kv_head, scores_of.key(&place, j)];
                        problem.value.copy_row(key, one, &mut value_row);
                        let weight = E::Real::splat(simd, weight);
                        for c in (0..value_row.len()).step_by(lanes) {
                            // Safety: both rows are padded to whole vectors.
                            unsafe {
                                let to = values.as_mut_ptr().add(c);
                                let value = E::Real::load(simd, value_row.as_ptr().add(c));
                                let sum = E::Real::load(simd, to);
                                let sum = E::Real::vmul_add(simd, weight, value, sum);
                                E::Real::store(simd, to, sum);
                            }
                        }
                    }
                }
            }
        }
    }
}
