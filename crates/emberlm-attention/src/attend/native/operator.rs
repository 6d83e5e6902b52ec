//! The passes as an operator of Burn.

use std::sync::Arc;

use emberlm_core::Schedule;
use emberlm_kernels::{Array, Gradient, Operator, Pass, Real, Stored, View};

use super::{
    backward::{Saved, backward},
    forward::forward,
    problem::{Dropout, Problem, Scores},
};

/// Attention by the kernels of this module.
///
/// Inputs are query, key and value, `[batch_size, length, heads, width]`, then the bias and the sinks, where there are
/// any. The output is `[batch_size, query_length, n_heads, d_value]`, with the log-sum-exp as one column more if asked
/// for.
#[derive(Debug)]
pub(super) struct NativeAttention {
    pub(super) schedule: Arc<Schedule>,
    pub(super) scale: f64,
    pub(super) cap: Option<f64>,
    pub(super) slopes: Option<Vec<f64>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) has_bias: bool,
    pub(super) has_sinks: bool,
    pub(super) with_log_sum_exp: bool,
}

/// Where the bias is among the inputs.
const BIAS: usize = 3;

impl NativeAttention {
    fn problem<'a, E: Stored>(&'a self, inputs: &[View<'a, E>]) -> Problem<'a, E> {
        let real = E::Real::from_f64;
        let sinks = || {
            let sinks = inputs[inputs.len() - 1];
            sinks.row([0; 3]).map(Stored::to_real).collect()
        };
        Problem {
            query: by_heads(inputs[0]),
            key: by_heads(inputs[1]),
            value: by_heads(inputs[2]),
            bias: self.has_bias.then(|| inputs[BIAS]),
            sinks: self.has_sinks.then(sinks),
            schedule: &self.schedule,
            with_log_sum_exp: self.with_log_sum_exp,
            scores: Scores {
                scale: real(self.scale),
                cap: self.cap.map(real),
                slopes: self
                    .slopes
                    .as_ref()
                    .map(|slopes| slopes.iter().copied().map(real).collect()),
                dropout: self.dropout,
            },
        }
    }
}

/// `[batch_size, length, heads, width]` to `[batch_size, heads, length, width]`, in place.
fn by_heads<E: Stored>(view: View<'_, E>) -> View<'_, E> {
    view.swapped(1, 2)
}

impl Operator for NativeAttention {
    /// The log-sum-exp, `[batch_size, n_heads, query_length]`.
    type Saved<E: Stored> = Vec<E::Real>;

    fn keeps_output(&self, _: usize) -> bool {
        true
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Vec<E::Real>) {
        let problem = self.problem(inputs);
        let sizes = problem.sizes();
        let forward = forward(&problem);
        let shape = [
            sizes.batch_size,
            sizes.query_length,
            sizes.n_heads,
            problem.d_output(),
        ];
        (
            vec![Array::new(forward.output, &shape)],
            forward.log_sum_exp,
        )
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Vec<E::Real>>) -> Vec<Gradient<E>> {
        let inputs: Vec<View<'_, E>> = (0..pass.wanted.len()).map(|i| pass.input(i)).collect();
        let problem = self.problem(&inputs);
        let sizes = problem.sizes();
        let with_bias = self.has_bias && pass.wanted[BIAS];
        let saved = Saved {
            output: by_heads(pass.output(0)),
            log_sum_exp: pass.saved,
            d_output: by_heads(pass.gradient(0).expect("of the one output")),
        };
        let computed = backward(&problem, &saved, with_bias);
        let like = |i: usize, elements| Gradient::Of(Array::new(elements, inputs[i].shape()));
        let mut gradients = vec![
            like(0, computed.query),
            like(1, computed.key),
            like(2, computed.value),
        ];
        if self.has_bias {
            let bias = || Array::from_reals(computed.bias, inputs[BIAS].shape());
            gradients.push(pass.if_wanted(BIAS, bias));
        }
        if self.has_sinks {
            let sinks = Array::from_reals(computed.sinks, &[sizes.n_heads]);
            gradients.push(Gradient::Of(sinks));
        }
        gradients
    }
}
