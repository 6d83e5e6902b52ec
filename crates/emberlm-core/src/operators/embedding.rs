//! Lookup of rows in a table, with positions.

use burn::tensor::{DType, Int, Tensor};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Stored, View, kernel, rows, run_one,
};

use super::Implementation;

/// `y_t = table[token_t] + positions[first_position + t]`.
///
/// The gradient of the table adds the rows of a token in the order of the batch, on any number of threads.
///
/// # Shapes
///
/// - `table`: `[vocab_size, width]`
/// - `tokens`: `[batch_size, seq_length]`
/// - `positions`: `[max_seq_length, width]`, and the position of the first token
/// - output: `[batch_size, seq_length, width]`
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::operators::embed;
///
/// let device = Device::flex();
/// let table = Tensor::<2>::from_floats([[1.0], [2.0], [3.0]], &device);
/// let tokens = Tensor::<2, Int>::from_ints([[2, 0]], &device);
/// let y: Vec<f32> = embed(table, tokens, None).into_data().iter::<f32>().collect();
/// assert_eq!(y, [3.0, 1.0]);
/// ```
///
/// # Panics
///
/// If a token is not in the table, a position is past the last, or the widths differ; the message names them. On GPUs
/// tokens are not looked at.
pub fn embed(
    table: Tensor<2>,
    tokens: Tensor<2, Int>,
    positions: Option<(Tensor<2>, usize)>,
) -> Tensor<3> {
    embed_by(
        Implementation::of(&table.device()),
        table,
        tokens,
        positions,
    )
}

/// [`embed`] by a given implementation.
///
/// # Panics
///
/// As [`embed`].
pub fn embed_by(
    implementation: Implementation,
    table: Tensor<2>,
    tokens: Tensor<2, Int>,
    positions: Option<(Tensor<2>, usize)>,
) -> Tensor<3> {
    let ([batch_size, seq_length], [vocab_size, width]) = (tokens.dims(), table.dims());
    if let Some((positions, first)) = &positions {
        let [n, position_width] = positions.dims();
        let end = first + seq_length;
        assert!(
            end <= n,
            "sequence length: position {end} is past the {n} learned ones"
        );
        assert_eq!(
            position_width, width,
            "width: the positions have {position_width} components, the table {width}"
        );
    }
    if implementation != Implementation::Native {
        let rows = table
            .select(0, tokens.reshape([batch_size * seq_length]))
            .reshape([batch_size, seq_length, width]);
        return match positions {
            Some((positions, first)) => {
                rows + positions.narrow(0, first, seq_length).unsqueeze::<3>()
            }
            None => rows,
        };
    }
    let tokens = tokens.into_data().convert_dtype(DType::I64);
    let tokens = tokens.iter::<i64>().enumerate().map(|(i, token)| {
        assert!(
            usize::try_from(token).is_ok_and(|token| token < vocab_size),
            "token {i} is {token}, the table has {vocab_size} rows"
        );
        token as usize
    });
    let operator = Lookup {
        tokens: tokens.collect(),
        shape: [batch_size, seq_length],
        first_position: positions.as_ref().map_or(0, |(_, first)| *first),
    };
    let positions = positions.map(|(positions, _)| positions.into_dispatch());
    run_one(
        operator,
        [table.into_dispatch()].into_iter().chain(positions),
    )
}

/// Inputs: the table, then the positions if there are any.
struct Lookup {
    tokens: Vec<usize>,
    /// `[batch_size, seq_length]`
    shape: [usize; 2],
    first_position: usize,
}

impl std::fmt::Debug for Lookup {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Lookup of {:?} tokens", self.shape)
    }
}

impl Operator for Lookup {
    /// Sizes of the table, and of the positions.
    type Saved<E: Stored> = [usize; 2];

    fn keeps_input(&self, _: usize) -> bool {
        false
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, [usize; 2]) {
        let table = inputs[0].reals();
        let positions = inputs.get(1).map(|positions| positions.reals());
        let width = inputs[0].width();
        let [batch_size, seq_length] = self.shape;
        let mut output = Buffer::new(self.tokens.len() * width);
        let to = output.shared();
        rows::for_each_range(self.tokens.len(), width, |range| {
            for i in range {
                // Safety: each row belongs to one range.
                let to = unsafe { to.part(i * width, width) };
                to.copy_from_slice(&table[self.tokens[i] * width..][..width]);
                if let Some(positions) = &positions {
                    let position = self.first_position + i % seq_length;
                    let row = &positions[position * width..][..width];
                    to.iter_mut().zip(row).for_each(|(to, x)| *to += *x);
                }
            }
        });
        // Safety: the ranges cover all rows.
        let output =
            Array::from_reals(unsafe { output.finish() }, &[batch_size, seq_length, width]);
        let n_positions = inputs.get(1).map_or(0, View::n_rows);
        (vec![output], [inputs[0].n_rows(), n_positions])
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, [usize; 2]>) -> Vec<Gradient<E>> {
        let d_output = pass.gradient(0).expect("of the one output");
        let width = d_output.width();
        let d_output = d_output.reals();
        let [n_rows, n_positions] = *pass.saved;
        let [batch_size, seq_length] = self.shape;
        let sum = |n_rows, rows: &Groups| {
            Array::from_reals(sum_groups(&d_output, width, n_rows, rows), &[n_rows, width])
        };
        let mut gradients =
            vec![pass.if_wanted(0, || sum(n_rows, &Groups::new(n_rows, &self.tokens)))];
        if pass.wanted.len() > 1 {
            let positions = (0..batch_size)
                .flat_map(|_| (0..seq_length).map(|position| self.first_position + position));
            gradients.push(pass.if_wanted(1, || {
                sum(
                    n_positions,
                    &Groups::new(n_positions, &positions.collect::<Vec<_>>()),
                )
            }));
        }
        gradients
    }
}

/// Which rows go to each of some targets: those of target `i` are `rows[begins[i]..begins[i + 1]]`, in order.
pub(super) struct Groups {
    begins: Vec<usize>,
    rows: Vec<u32>,
}

impl Groups {
    pub(super) fn new(n_targets: usize, targets: &[usize]) -> Self {
        let mut begins = vec![0; n_targets + 1];
        for target in targets {
            begins[target + 1] += 1;
        }
        for i in 0..n_targets {
            begins[i + 1] += begins[i];
        }
        let mut next = begins.clone();
        let mut rows = vec![0; targets.len()];
        for (row, target) in (0..).zip(targets) {
            rows[next[*target]] = row;
            next[*target] += 1;
        }
        Self { begins, rows }
    }

    pub(super) fn n_targets(&self) -> usize {
        self.begins.len() - 1
    }

    pub(super) fn of(&self, target: usize) -> &[u32] {
        &self.rows[self.begins[target]..self.begins[target + 1]]
    }
}

kernel! {
    /// The sum of some rows.
    fn sum_some<'a, R: Real>(
        _simd: S,
        elements: &'a [R],
        rows: &'a [u32],
        to: &'a mut [R],
    ) -> () {
        to.fill(R::default());
        for row in rows {
            let row = &elements[*row as usize * to.len()..][..to.len()];
            to.iter_mut().zip(row).for_each(|(to, x)| *to += *x);
        }
    }
}

fn sum_groups<R: Real>(elements: &[R], width: usize, n_targets: usize, groups: &Groups) -> Vec<R> {
    let mut sums = Buffer::new(n_targets * width);
    let to = sums.shared();
    rows::for_each_range(n_targets, width, |range| {
        for target in range {
            // Safety: each target belongs to one range.
            let to = unsafe { to.part(target * width, width) };
            sum_some(elements, groups.of(target), to);
        }
    });
    // Safety: the ranges cover all targets.
    unsafe { sums.finish() }
}
