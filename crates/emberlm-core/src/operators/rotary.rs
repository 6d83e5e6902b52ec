//! Rotary positions.

use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Stored, View, each_vector, kernel, rows, run,
};

use super::Implementation;
use crate::RotaryLayout;

/// How rotary positions turn a head: pair `i` of the components of position `t` by the angle `t frequencies[i]`, and
/// times a factor.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// In radians a position, one for each pair; components behind the pairs stay as they are.
    pub frequencies: Vec<f64>,
    /// Which components form a pair.
    pub layout: RotaryLayout,
    /// Position of the first row.
    pub first_position: usize,
    /// Factor of the turned components, 1 for a rotation alone. YaRN and LongRoPE have another.
    pub attention_factor: f64,
}

/// Turns queries, keys or both: `(a, b)` becomes `m (a cos - b sin, b cos + a sin)`, with the attention factor `m`. The
/// backward pass turns the gradients back, times the same factor.
///
/// Su et al. 2021, equation 34, <https://arxiv.org/abs/2104.09864>. Any scaling of positions or frequencies is a choice
/// of [`Rotation::frequencies`]; with fewer pairs than half the width only the first components are turned.
///
/// # Shapes
///
/// - each input and output: `[batch_size, n_heads, seq_length, d_head]`, with `n_heads` of its own
///
/// # Panics
///
/// If there are more pairs than components for them.
pub fn rotate<const N: usize>(xs: [Tensor<4>; N], rotation: &Rotation) -> [Tensor<4>; N] {
    rotate_by(Implementation::of(&xs[0].device()), xs, rotation)
}

/// [`rotate`] by a given implementation.
///
/// # Panics
///
/// As [`rotate`].
pub fn rotate_by<const N: usize>(
    implementation: Implementation,
    xs: [Tensor<4>; N],
    rotation: &Rotation,
) -> [Tensor<4>; N] {
    let n_turned = 2 * rotation.frequencies.len();
    for x in &xs {
        let [.., d_head] = x.dims();
        assert!(
            n_turned <= d_head,
            "d_head: {n_turned} components are to be turned, the input has {d_head}"
        );
    }
    if implementation != Implementation::Native {
        return xs.map(|x| rotation.definition(x));
    }
    // Rows of a position lie together.
    let by_position = xs.map(|x| x.swap_dims(1, 2).into_dispatch());
    run::<_, N>(Turn(rotation.clone()), by_position)
        .map(|x| Tensor::<4>::from_dispatch(x).swap_dims(1, 2))
}

impl Rotation {
    /// Cosines and sines times the factor, each `[seq_length, n_pairs]`, in f64. Those of position `64 a + b` are made of
    /// those of `64 a` and of `b`.
    fn tables(&self, seq_length: usize) -> [Vec<f64>; 2] {
        const STEP: usize = 64;
        let of_positions = |positions: &mut dyn Iterator<Item = usize>| -> Vec<(f64, f64)> {
            let angles = positions.flat_map(|position| {
                let frequencies = self.frequencies.iter();
                frequencies.map(move |frequency| (position as f64 * frequency).sin_cos())
            });
            angles.collect()
        };
        let (first, n_pairs) = (self.first_position, self.frequencies.len());
        let mut coarse =
            of_positions(&mut (0..seq_length.div_ceil(STEP)).map(|a| first + STEP * a));
        for (sin, cos) in &mut coarse {
            *sin *= self.attention_factor;
            *cos *= self.attention_factor;
        }
        let fine = of_positions(&mut (0..STEP.min(seq_length)));
        let n = seq_length * n_pairs;
        let mut tables = [Vec::with_capacity(n), Vec::with_capacity(n)];
        let [cos, sin] = &mut tables;
        for position in 0..seq_length {
            let coarse = &coarse[position / STEP * n_pairs..][..n_pairs];
            let fine = &fine[position % STEP * n_pairs..][..n_pairs];
            for ((sin_a, cos_a), (sin_b, cos_b)) in coarse.iter().zip(fine) {
                cos.push(cos_a * cos_b - sin_a * sin_b);
                sin.push(sin_a * cos_b + cos_a * sin_b);
            }
        }
        tables
    }

    fn table_tensors(&self, seq_length: usize, dtype: DType, device: &Device) -> [Tensor<2>; 2] {
        let shape = [seq_length, self.frequencies.len()];
        self.tables(seq_length)
            .map(|table| Tensor::from_data(TensorData::new(table, shape), (device, dtype)))
    }

    fn definition(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch_size, n_heads, seq_length, d_head] = x.dims();
        let half = self.frequencies.len();
        if half == 0 {
            return x;
        }
        // The axis that tells the two components of a pair apart: last when they are neighbours.
        let (pairs, axis, table): ([usize; 5], usize, [usize; 5]) = match self.layout {
            RotaryLayout::Interleaved => (
                [batch_size, n_heads, seq_length, half, 2],
                4,
                [1, 1, seq_length, half, 1],
            ),
            RotaryLayout::HalfSplit => (
                [batch_size, n_heads, seq_length, 2, half],
                3,
                [1, 1, seq_length, 1, half],
            ),
        };
        let [cos, sin] = self.table_tensors(seq_length, x.dtype(), &x.device());
        let (cos, sin) = (cos.reshape(table), sin.reshape(table));
        let rest = (d_head > 2 * half).then(|| x.clone().narrow(3, 2 * half, d_head - 2 * half));
        let x = x.narrow(3, 0, 2 * half).reshape(pairs);
        let a = x.clone().narrow(axis, 0, 1);
        let b = x.narrow(axis, 1, 1);
        let turned_a = a.clone() * cos.clone() - b.clone() * sin.clone();
        let turned_b = b * cos + a * sin;
        let turned = Tensor::cat(vec![turned_a, turned_b], axis).reshape([
            batch_size,
            n_heads,
            seq_length,
            2 * half,
        ]);
        match rest {
            Some(rest) => Tensor::cat(vec![turned, rest], 3),
            None => turned,
        }
    }

    /// Turns `[batch_size, seq_length, n_heads, d_head]` by the angles of the tables.
    fn turn<E: Stored>(&self, x: &View<'_, E>, tables: &Tables<E::Real>) -> Array<E> {
        let [batch_size, seq_length, n_heads, d_head] = x.dims();
        let half = self.frequencies.len();
        let width = n_heads * d_head;
        let n_positions = batch_size * seq_length;
        let mut output = Buffer::new(n_positions * width);
        let to = output.shared();
        rows::for_each_range(n_positions, width, |range| {
            let mut row = vec![E::Real::default(); d_head];
            for i in range {
                let (batch, position) = (i / seq_length, i % seq_length);
                let table = position * half;
                let cos = &tables.cos[table..table + half];
                let sin = &tables.sin[table..table + half];
                for head in 0..n_heads {
                    x.copy_row([batch, position, head], E::Real::from_f64(1.0), &mut row);
                    // Safety: each position belongs to one range.
                    let to = unsafe { to.part(i * width + head * d_head, d_head) };
                    match self.layout {
                        RotaryLayout::HalfSplit => turn_halves(&row, cos, sin, to),
                        RotaryLayout::Interleaved => turn_neighbours(&row, cos, sin, to),
                    }
                    to[2 * half..].copy_from_slice(&row[2 * half..]);
                }
            }
        });
        // Safety: the ranges cover all positions, and the heads all their elements.
        Array::from_reals(unsafe { output.finish() }, x.shape())
    }
}

/// Cosines and sines times the factor, of the longest input, each `[seq_length, n_pairs]`.
#[derive(Debug)]
struct Tables<R> {
    cos: Vec<R>,
    sin: Vec<R>,
}

#[derive(Debug)]
struct Turn(Rotation);

impl Operator for Turn {
    type Saved<E: Stored> = Tables<E::Real>;

    fn keeps_input(&self, _: usize) -> bool {
        false
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Tables<E::Real>) {
        let longest = inputs.iter().map(|x| x.dims()[1]).max().unwrap_or(0);
        let [cos, sin] = self
            .0
            .tables(longest)
            .map(|table| table.into_iter().map(E::Real::from_f64).collect());
        let tables = Tables { cos, sin };
        let outputs = inputs.iter().map(|x| self.0.turn(x, &tables)).collect();
        (outputs, tables)
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Tables<E::Real>>) -> Vec<Gradient<E>> {
        // Back by the same angles. The transpose of a rotation times a factor has the same factor.
        let back = Tables {
            cos: pass.saved.cos.clone(),
            sin: pass.saved.sin.iter().map(|sin| -*sin).collect(),
        };
        let turn_back = |i| match pass.gradient(i) {
            Some(d_output) => pass.if_wanted(i, || self.0.turn(&d_output, &back)),
            None => Gradient::None,
        };
        (0..pass.wanted.len()).map(turn_back).collect()
    }
}

kernel! {
    fn turn_halves<'a, R: Real>(
        simd: S,
        from: &'a [R],
        cos: &'a [R],
        sin: &'a [R],
        to: &'a mut [R],
    ) -> () {
        let half = cos.len();
        each_vector!(R, S, half, |j, n| {
            // Safety: both halves have `n` elements from `j` on.
            unsafe {
                let a = R::load_some(simd, from.as_ptr().add(j), n);
                let b = R::load_some(simd, from.as_ptr().add(half + j), n);
                let cos = R::load_some(simd, cos.as_ptr().add(j), n);
                let sin = R::load_some(simd, sin.as_ptr().add(j), n);
                let turned_a = R::vsub(simd, R::vmul(simd, a, cos), R::vmul(simd, b, sin));
                let turned_b = R::vmul_add(simd, a, sin, R::vmul(simd, b, cos));
                R::store_some(simd, to.as_mut_ptr().add(j), turned_a, n);
                R::store_some(simd, to.as_mut_ptr().add(half + j), turned_b, n);
            }
        });
    }
}

fn turn_neighbours<R: Real>(from: &[R], cos: &[R], sin: &[R], to: &mut [R]) {
    let pairs = from.chunks_exact(2).zip(to.chunks_exact_mut(2));
    for ((from, to), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
        to[0] = from[0] * *cos - from[1] * *sin;
        to[1] = from[1] * *cos + from[0] * *sin;
    }
}
