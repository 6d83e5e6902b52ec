//! Softmax in pieces: what the keys of one piece give, and how pieces become the whole.

use burn::tensor::Tensor;

/// Of each query, over some of its keys: the largest score `m` (without gradient), the total `l = sum e^(s - m)` and
/// the weighted values `o = sum e^(s - m) v`. For a query without keys `m` is negative infinity, `l` and `o` are zero.
///
/// Shapes: `[batch_size, n_heads, query_length, 1]`, values `[batch_size, n_heads, query_length, d_value]`.
pub(super) struct Sums {
    pub(super) maximum: Tensor<4>,
    pub(super) total: Tensor<4>,
    pub(super) values: Tensor<4>,
}

/// What to subtract from scores of this maximum: the maximum, or zero where it is infinite, so that no difference is
/// of two infinities.
pub(super) fn shift<const D: usize>(maximum: Tensor<D>) -> Tensor<D> {
    let infinite = maximum.clone().is_inf();
    maximum.mask_fill(infinite, 0.0)
}

impl Sums {
    /// Brings pieces over disjoint keys, and a sink a head, to the maximum of all, and adds them.
    pub(super) fn merge(pieces: Vec<Self>, sinks: Option<Tensor<1>>) -> Self {
        let mut pieces = pieces.into_iter();
        let mut merged = pieces.next().expect("a schedule has a part");
        for piece in pieces {
            merged = merged.add(piece);
        }
        match sinks {
            None => merged,
            Some(sinks) => {
                let shape = merged.total.shape();
                let n_heads = sinks.dims()[0];
                let logits = sinks.reshape([1, n_heads, 1, 1]).expand(shape);
                let maximum = logits.clone().detach();
                merged.add(Self {
                    total: (logits - shift(maximum.clone())).exp(),
                    values: merged.values.zeros_like(),
                    maximum,
                })
            }
        }
    }

    fn add(&self, other: Self) -> Self {
        let maximum = self.maximum.clone().max_pair(other.maximum.clone());
        let shift = shift(maximum.clone());
        let here = (self.maximum.clone() - shift.clone()).exp();
        let there = (other.maximum - shift).exp();
        Self {
            maximum,
            total: self.total.clone() * here.clone() + other.total * there.clone(),
            values: self.values.clone() * here + other.values * there,
        }
    }

    /// The output and the log-sum-exp, `[batch_size, n_heads, query_length, 1]`: zeros and negative infinity for a query
    /// without keys.
    pub(super) fn finish(self) -> (Tensor<4>, Tensor<4>) {
        let empty = self.total.clone().detach().equal_elem(0.0);
        let total = self.total.mask_fill(empty.clone(), 1.0);
        let log_sum_exp = shift(self.maximum) + total.clone().log();
        let log_sum_exp = log_sum_exp.mask_fill(empty, f64::NEG_INFINITY);
        (self.values / total, log_sum_exp)
    }
}
