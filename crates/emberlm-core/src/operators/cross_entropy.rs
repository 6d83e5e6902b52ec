//! Cross-entropy from scores, or from hidden states whose scores are never held whole.

use std::{borrow::Cow, ops::Range};

use burn::tensor::{
    Bool, DType, IndexingUpdateOp, Int, Tensor, TensorData, activation::log_softmax,
};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Stored, View, each_vector, kernel, lanes,
    matrix::{Matrix, Store, product},
    rows, run,
};

use super::{Implementation, linear::multiply};
use crate::{CrossEntropy, CrossEntropyConfig};

/// The table that turns hidden states into scores.
#[derive(Debug, Clone)]
pub enum Projection {
    /// `[vocab_size, d_model]`: scores are products with its rows. A tied embedding.
    Rows(Tensor<2>),
    /// `[d_model, vocab_size]`: the weight of a linear layer.
    Columns(Tensor<2>),
}

impl Projection {
    /// Number of classes.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Rows(table) => table.dims()[0],
            Self::Columns(weight) => weight.dims()[1],
        }
    }

    /// The scores of hidden states: `[.., d_model]` to `[.., vocab_size]`.
    ///
    /// # Panics
    ///
    /// If the widths disagree.
    pub fn forward<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        super::linear(hidden, self.columns(), None)
    }

    fn columns(&self) -> Tensor<2> {
        match self {
            Self::Rows(table) => table.clone().transpose(),
            Self::Columns(weight) => weight.clone(),
        }
    }
}

/// The loss of scores; see [`CrossEntropyConfig::forward`] for the formula.
///
/// # Shapes
///
/// - `logits`: `[n_tokens, vocab_size]`
/// - `targets`: `[n_tokens]`
/// - `weights`: `[n_tokens]`, factors of the rows of both sums, which get no gradient; `n_targets` is their sum
///
/// # Panics
///
/// If the numbers of rows differ. On CPU backends also if a target is no class; the message names it. With all targets
/// ignored, sums and gradients are zero.
pub fn cross_entropy(
    config: &CrossEntropyConfig,
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let implementation = Implementation::of(&logits.device());
    cross_entropy_by(implementation, config, logits, targets, weights)
}

/// [`cross_entropy`] by a given implementation.
///
/// # Panics
///
/// As [`cross_entropy`].
pub fn cross_entropy_by(
    implementation: Implementation,
    config: &CrossEntropyConfig,
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let [n_tokens, vocab_size] = logits.dims();
    check_rows(n_tokens, &targets, weights.as_ref());
    if implementation != Implementation::Native {
        return definition(config, logits, targets, weights);
    }
    Loss::new(config, targets, weights, vocab_size, Scores::Given).run([logits])
}

/// The loss of hidden states, whose scores are computed in chunks: a chunk holds at most 4 million of them, or 16 rows,
/// and where there are several the backward pass computes them again.
///
/// # Shapes
///
/// - `hidden`: `[n_tokens, d_model]`
/// - `targets`: `[n_tokens]`
/// - `weights`: `[n_tokens]`, as in [`cross_entropy`]
///
/// # Panics
///
/// As [`cross_entropy`], or if the widths disagree.
pub fn projected_cross_entropy(
    config: &CrossEntropyConfig,
    hidden: Tensor<2>,
    projection: &Projection,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let implementation = Implementation::of(&hidden.device());
    projected_cross_entropy_by(implementation, config, hidden, projection, targets, weights)
}

/// [`projected_cross_entropy`] by a given implementation.
///
/// # Panics
///
/// As [`projected_cross_entropy`].
pub fn projected_cross_entropy_by(
    implementation: Implementation,
    config: &CrossEntropyConfig,
    hidden: Tensor<2>,
    projection: &Projection,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let [n_tokens, d_model] = hidden.dims();
    check_rows(n_tokens, &targets, weights.as_ref());
    let vocab_size = projection.vocab_size();
    let (table, scores) = match projection {
        Projection::Rows(table) => (table.clone(), Scores::Rows),
        Projection::Columns(weight) => (weight.clone(), Scores::Columns),
    };
    let width = table.dims()[if scores == Scores::Rows { 1 } else { 0 }];
    assert_eq!(
        width, d_model,
        "d_model: the projection takes {width} components, the hidden states have {d_model}"
    );
    match implementation {
        Implementation::Reference => {
            let logits = hidden.matmul(projection.columns());
            definition(config, logits, targets, weights)
        }
        Implementation::Portable => portable(config, hidden, projection, targets, weights),
        Implementation::Native => {
            Loss::new(config, targets, weights, vocab_size, scores).run([hidden, table])
        }
    }
}

fn check_rows(n_tokens: usize, targets: &Tensor<1, Int>, weights: Option<&Tensor<1>>) {
    let [n_targets] = targets.dims();
    assert_eq!(
        n_tokens, n_targets,
        "n_tokens: {n_tokens} rows of scores, {n_targets} targets"
    );
    if let Some(weights) = weights {
        let [n_weights] = weights.dims();
        assert_eq!(
            n_tokens, n_weights,
            "n_tokens: {n_tokens} rows of scores, {n_weights} weights"
        );
    }
}

fn definition(
    config: &CrossEntropyConfig,
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let [_, vocab_size] = logits.dims();
    let rows = RowTargets::new(config, targets, weights);
    let log_probs = log_softmax(logits.clone(), 1);
    let log_likelihood = log_probs.clone().gather(1, rows.classes.clone());
    // log Z = logit - log p, for whichever class.
    let log_partition = logits.gather(1, rows.classes.clone()) - log_likelihood.clone();
    let nll = if config.label_smoothing > 0.0 {
        // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
        let uniform = log_probs.sum_dim(1) * (vocab_size as f64).recip();
        -(log_likelihood * (1.0 - config.label_smoothing) + uniform * config.label_smoothing)
    } else {
        -log_likelihood
    };
    let z = log_partition.square();
    let n_targets = rows.weigh(nll.clone().detach().ones_like()).sum();
    CrossEntropy {
        nll_sum: rows.weigh(nll).sum(),
        z_sum: rows.weigh(z).sum(),
        n_targets,
    }
}

/// The gradients of the definition's two sums with respect to the scores, of which nothing is tracked.
fn gradients(
    config: &CrossEntropyConfig,
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> [Tensor<2>; 2] {
    let [_, vocab_size] = logits.dims();
    let rows = RowTargets::new(config, targets, weights);
    let log_probs = log_softmax(logits.clone(), 1);
    let of_class = |x: Tensor<2>| x.gather(1, rows.classes.clone());
    let log_partition = of_class(logits) - of_class(log_probs.clone());
    let probs = log_probs.exp();
    let d_z = probs.clone() * (log_partition.clone() * 2.0);
    let share = log_partition.full_like(config.label_smoothing - 1.0);
    let d_nll = (probs - config.label_smoothing / vocab_size as f64).scatter(
        1,
        rows.classes.clone(),
        share,
        IndexingUpdateOp::Add,
    );
    [rows.weigh(d_nll), rows.weigh(d_z)]
}

/// The class of each row and what it counts.
struct RowTargets {
    /// `[n_tokens, 1]`; an ignored target may lie outside the vocabulary, and is class 0 here.
    classes: Tensor<2, Int>,
    /// `[n_tokens, 1]`
    ignored: Option<Tensor<2, Bool>>,
    /// `[n_tokens, 1]`
    weights: Option<Tensor<2>>,
}

impl RowTargets {
    fn new(
        config: &CrossEntropyConfig,
        targets: Tensor<1, Int>,
        weights: Option<Tensor<1>>,
    ) -> Self {
        let targets = targets.unsqueeze_dim::<2>(1);
        let ignored = config
            .ignored_target
            .map(|value| targets.clone().equal_scalar(value));
        Self {
            classes: match &ignored {
                Some(ignored) => targets.mask_fill(ignored.clone(), 0),
                None => targets,
            },
            ignored,
            weights: weights.map(|weights| weights.detach().unsqueeze_dim(1)),
        }
    }

    /// Rows times their weights, and zeros for those that are ignored.
    fn weigh(&self, rows: Tensor<2>) -> Tensor<2> {
        let rows = match &self.weights {
            Some(weights) => rows * weights.clone(),
            None => rows,
        };
        match &self.ignored {
            Some(ignored) => {
                let ignored = ignored.clone().expand(rows.dims());
                rows.mask_fill(ignored, 0.0)
            }
            None => rows,
        }
    }
}

/// Scores in a chunk.
const CHUNK: usize = 1 << 22;

fn rows_a_chunk(vocab_size: usize) -> usize {
    (CHUNK / vocab_size.max(1)).max(16)
}

/// The definition on chunks of rows. Under autodiff each chunk's gradients are computed at once, so that its scores can
/// go, and what is returned is a function of the inputs that is linear in them and has these gradients.
fn portable(
    config: &CrossEntropyConfig,
    hidden: Tensor<2>,
    projection: &Projection,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
) -> CrossEntropy {
    let [n_tokens, _] = hidden.dims();
    let columns = projection.columns();
    let differentiate = hidden.is_autodiff() || columns.is_autodiff();
    let mut nll = ChunkSums::new(&hidden, &columns);
    let mut z = ChunkSums::new(&hidden, &columns);
    let mut n_targets = Tensor::zeros([1], (&hidden.device(), hidden.dtype()));
    let step = rows_a_chunk(projection.vocab_size());
    for first in (0..n_tokens).step_by(step) {
        let n = step.min(n_tokens - first);
        let targets = targets.clone().narrow(0, first, n);
        let weights = weights.clone().map(|weights| weights.narrow(0, first, n));
        let rows = hidden.clone().detach().narrow(0, first, n);
        let scores = rows.clone().matmul(columns.clone().detach());
        if differentiate {
            let scores = scores.clone();
            let [d_nll, d_z] = gradients(config, scores, targets.clone(), weights.clone());
            nll.add_gradients(&rows, d_nll);
            z.add_gradients(&rows, d_z);
        }
        let loss = definition(config, scores, targets, weights);
        nll.value = nll.value + loss.nll_sum;
        z.value = z.value + loss.z_sum;
        n_targets = n_targets + loss.n_targets;
    }
    CrossEntropy {
        nll_sum: nll.finish(),
        z_sum: z.finish(),
        n_targets,
    }
}

/// A sum over chunks with its gradients, which are tensors of the inputs' sizes whatever the number of chunks.
struct ChunkSums {
    hidden: Tensor<2>,
    columns: Tensor<2>,
    value: Tensor<1>,
    d_hidden: Vec<Tensor<2>>,
    d_columns: Option<Tensor<2>>,
}

impl ChunkSums {
    fn new(hidden: &Tensor<2>, columns: &Tensor<2>) -> Self {
        Self {
            hidden: hidden.clone(),
            columns: columns.clone(),
            value: Tensor::zeros([1], (&hidden.device(), hidden.dtype())),
            d_hidden: Vec::new(),
            d_columns: None,
        }
    }

    /// Adds what the gradient of the next rows' scores makes of the inputs' gradients.
    fn add_gradients(&mut self, rows: &Tensor<2>, d_scores: Tensor<2>) {
        let table = self.columns.clone().detach().transpose();
        self.d_hidden.push(d_scores.clone().matmul(table));
        let d_columns = rows.clone().transpose().matmul(d_scores);
        self.d_columns = Some(match self.d_columns.take() {
            Some(sum) => sum + d_columns,
            None => d_columns,
        });
    }

    /// The sum, as a function of the inputs.
    fn finish(self) -> Tensor<1> {
        let Some(d_columns) = self.d_columns else {
            return self.value;
        };
        let linear = (self.hidden * Tensor::cat(self.d_hidden, 0)).sum();
        let linear = linear + (self.columns * d_columns).sum();
        // Its value is the sum's, its gradients are the linear function's. The difference is zero, and comes first: the
        // linear function's value may be so large that the sum would lose its digits in it.
        self.value + (linear.clone() - linear.detach())
    }
}

/// Where the scores come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scores {
    /// The one input.
    Given,
    /// Hidden states times the rows of a table.
    Rows,
    /// Hidden states times the columns of a table.
    Columns,
}

/// Inputs: the scores; or hidden states and a table. Outputs: the sums of the losses and of the squared log-partition
/// functions.
struct Loss {
    targets: Vec<Target>,
    label_smoothing: f64,
    vocab_size: usize,
    scores: Scores,
}

/// The class of a row, and its weight: zero where it is ignored.
#[derive(Clone, Copy)]
struct Target {
    class: u32,
    weight: f64,
}

impl std::fmt::Debug for Loss {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Loss of {} targets", self.targets.len())
    }
}

impl Loss {
    fn new(
        config: &CrossEntropyConfig,
        targets: Tensor<1, Int>,
        weights: Option<Tensor<1>>,
        vocab_size: usize,
        scores: Scores,
    ) -> Self {
        let targets = targets.into_data().convert_dtype(DType::I64);
        let weights: Option<Vec<f64>> =
            weights.map(|weights| weights.into_data().iter::<f64>().collect());
        let targets = targets.iter::<i64>().enumerate().map(|(i, class)| {
            if config.ignored_target == Some(class) {
                return Target {
                    class: 0,
                    weight: 0.0,
                };
            }
            assert!(
                (0..vocab_size as i64).contains(&class),
                "target {i} is {class}, the vocabulary has {vocab_size} classes"
            );
            Target {
                class: class as u32,
                weight: weights.as_ref().map_or(1.0, |weights| weights[i]),
            }
        });
        Self {
            targets: targets.collect(),
            label_smoothing: config.label_smoothing,
            vocab_size,
            scores,
        }
    }

    fn n_targets(&self) -> TensorData {
        let sum: f64 = self.targets.iter().map(|target| target.weight).sum();
        TensorData::new(vec![sum], [1])
    }

    fn run<const N: usize>(self, inputs: [Tensor<2>; N]) -> CrossEntropy {
        let options = (&inputs[0].device(), inputs[0].dtype());
        let n_targets = Tensor::from_data(self.n_targets(), options);
        let inputs = inputs.map(Tensor::into_dispatch);
        let [nll_sum, z_sum] = run(self, inputs).map(Tensor::from_dispatch);
        CrossEntropy {
            nll_sum,
            z_sum,
            n_targets,
        }
    }

    /// The table with a column for each class.
    fn columns<'a, R: Real>(&self, table: &'a Matrix<'_, R>) -> Matrix<'a, R> {
        let [n, _] = table.dims();
        match self.scores {
            Scores::Rows => table.transposed(),
            Scores::Given | Scores::Columns => table.rows(0, n),
        }
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (n_rows, step) = (self.targets.len(), rows_a_chunk(self.vocab_size));
        (0..n_rows)
            .step_by(step)
            .map(move |first| first..n_rows.min(first + step))
    }

    /// Calls `each` with every chunk of rows and its scores.
    fn with_scores<E: Stored>(
        &self,
        inputs: &[View<'_, E>],
        mut each: impl FnMut(Range<usize>, Cow<'_, [E::Real]>),
    ) {
        let classes = self.vocab_size;
        if self.scores == Scores::Given {
            let scores = inputs[0].reals();
            for chunk in self.chunks() {
                let scores = &scores[chunk.start * classes..chunk.end * classes];
                each(chunk, Cow::Borrowed(scores));
            }
            return;
        }
        let hidden = Matrix::of_view(&inputs[0]);
        let table = Matrix::of_view(&inputs[1]);
        let columns = self.columns(&table);
        for chunk in self.chunks() {
            let scores = multiply(&hidden.rows(chunk.start, chunk.len()), &columns);
            each(chunk, Cow::Owned(scores));
        }
    }
}

/// The partition function `Z = e^largest sum` of a row, in two parts: the logarithm in one would be rounded to the digits
/// of the largest score, which may be far larger than the loss.
#[derive(Debug, Clone, Copy)]
struct Partition<R> {
    largest: R,
    /// Of `e^(x - largest)`.
    sum: R,
}

impl<R: Real> Partition<R> {
    fn log(&self) -> f64 {
        self.largest.to_f64() + self.sum.to_f64().ln()
    }
}

/// What the forward pass keeps.
#[derive(Debug)]
struct Kept<R> {
    /// Of each row.
    partitions: Vec<Partition<R>>,
    /// The scores, if they were computed here and are no more than a chunk.
    scores: Option<Vec<R>>,
}

impl Operator for Loss {
    type Saved<E: Stored> = Kept<E::Real>;

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Self::Saved<E>) {
        let n_rows = self.targets.len();
        let keep = self.scores != Scores::Given && n_rows <= rows_a_chunk(self.vocab_size);
        let mut kept = None;
        let (mut losses, mut partitions) = (Buffer::new(n_rows), Buffer::new(n_rows));
        let (to_losses, to_partitions) = (losses.shared(), partitions.shared());
        self.with_scores(inputs, |chunk, scores| {
            rows::for_each_range(chunk.len(), self.vocab_size, |range| {
                for i in range {
                    let row = &scores[i * self.vocab_size..(i + 1) * self.vocab_size];
                    let i = chunk.start + i;
                    let partition = partition_of(row);
                    // Safety: each row belongs to one range.
                    unsafe {
                        to_losses.part(i, 1)[0] = self.loss(i, row, partition);
                        to_partitions.part(i, 1)[0] = partition;
                    }
                }
            });
            if keep {
                kept = Some(scores.into_owned());
            }
        });
        // Safety: the ranges cover all rows.
        let (losses, partitions) = unsafe { (losses.finish(), partitions.finish()) };
        let (mut nll_sum, mut z_sum) = (0.0, 0.0);
        for ((target, loss), partition) in self.targets.iter().zip(losses).zip(&partitions) {
            // Not a product with zero: what is ignored may be infinite.
            if target.weight != 0.0 {
                nll_sum += target.weight * loss;
                z_sum += target.weight * partition.log().powi(2);
            }
        }
        let sum = |x| Array::from_reals(vec![E::Real::from_f64(x)], &[1]);
        (
            vec![sum(nll_sum), sum(z_sum)],
            Kept {
                partitions,
                scores: kept,
            },
        )
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Self::Saved<E>>) -> Vec<Gradient<E>> {
        let upstream = |i| {
            let gradient = pass.gradient(i);
            gradient.map_or(0.0, |gradient| gradient.at([0; 4]).to_real().to_f64())
        };
        let d_sums = [upstream(0), upstream(1)];
        let inputs: Vec<View<'_, E>> = (0..pass.wanted.len()).map(|i| pass.input(i)).collect();
        if self.scores == Scores::Given {
            let scores = inputs[0].reals();
            let d_scores = self.d_scores(0..self.targets.len(), &scores, pass.saved, d_sums);
            return vec![pass.if_wanted(0, || Array::from_reals(d_scores, inputs[0].shape()))];
        }
        let hidden = Matrix::of_view(&inputs[0]);
        let table = Matrix::of_view(&inputs[1]);
        let columns = self.columns(&table);
        let [n_rows, width] = hidden.dims();
        let mut d_hidden = Buffer::new(if pass.wanted[0] { n_rows * width } else { 0 });
        let to_hidden = d_hidden.shared();
        let mut d_table: Option<Vec<E::Real>> = None;
        let mut of_chunk = |chunk: Range<usize>, scores: &[E::Real]| {
            let rows = [chunk.len(), self.vocab_size];
            let d_scores = self.d_scores(chunk.clone(), scores, pass.saved, d_sums);
            let d_scores = Matrix::new(&d_scores, rows);
            if pass.wanted[0] {
                // Safety: each chunk has rows of its own.
                let to = unsafe { to_hidden.part(chunk.start * width, chunk.len() * width) };
                product(&d_scores, &columns.transposed(), to, Store::Replace);
            }
            if pass.wanted[1] {
                let hidden = hidden.rows(chunk.start, chunk.len());
                let (a, b) = match self.scores {
                    Scores::Rows => (d_scores.transposed(), hidden),
                    Scores::Given | Scores::Columns => (hidden.transposed(), d_scores),
                };
                match &mut d_table {
                    None => d_table = Some(multiply(&a, &b)),
                    Some(d_table) => product(&a, &b, d_table, Store::Add),
                }
            }
        };
        match &pass.saved.scores {
            Some(scores) => of_chunk(0..n_rows, scores),
            None => self.with_scores(&inputs, |chunk, scores| of_chunk(chunk, &scores)),
        }
        let n_elements = self.vocab_size * width;
        let d_table = d_table.unwrap_or_else(|| vec![E::Real::default(); n_elements]);
        // Safety: the chunks cover all rows.
        let d_hidden = unsafe { d_hidden.finish() };
        vec![
            pass.if_wanted(0, || Array::from_reals(d_hidden, inputs[0].shape())),
            pass.if_wanted(1, || Array::from_reals(d_table, inputs[1].shape())),
        ]
    }
}

impl Loss {
    /// The loss of row `i`, without its weight.
    fn loss<R: Real>(&self, i: usize, row: &[R], partition: Partition<R>) -> f64 {
        let Partition { largest, sum } = partition;
        // Differences first: they are smaller than the scores.
        let below = |x: R| (largest - x).to_f64();
        let log_sum = sum.to_f64().ln();
        let loss = below(row[self.targets[i].class as usize]) + log_sum;
        let smoothing = self.label_smoothing;
        if smoothing == 0.0 {
            return loss;
        }
        let total: f64 = row.iter().map(|x| below(*x)).sum();
        let uniform = total / self.vocab_size as f64 + log_sum;
        (1.0 - smoothing) * loss + smoothing * uniform
    }

    /// Gradients of the scores of some rows: with `p` the probabilities, `y` the smoothed target and `a`, `b` the
    /// gradients of the two sums, `weight (a (p - y) + 2 b log(Z) p)`.
    fn d_scores<R: Real>(
        &self,
        chunk: Range<usize>,
        scores: &[R],
        kept: &Kept<R>,
        [d_nll, d_z]: [f64; 2],
    ) -> Vec<R> {
        let classes = self.vocab_size;
        let mut d_scores = Buffer::new(chunk.len() * classes);
        let to = d_scores.shared();
        rows::for_each_range(chunk.len(), classes, |range| {
            for i in range {
                let target = self.targets[chunk.start + i];
                let partition = kept.partitions[chunk.start + i];
                // Safety: each row belongs to one range.
                let to = unsafe { to.part(i * classes, classes) };
                if target.weight == 0.0 {
                    to.fill(R::default());
                    continue;
                }
                let row = &scores[i * classes..(i + 1) * classes];
                let slope = target.weight * (d_nll + 2.0 * d_z * partition.log());
                let slope = R::from_f64(slope / partition.sum.to_f64());
                let each = target.weight * d_nll * self.label_smoothing / classes as f64;
                scaled_exp(row, partition.largest, slope, R::from_f64(each), to);
                let hit = target.weight * d_nll * (1.0 - self.label_smoothing);
                let at = &mut to[target.class as usize];
                *at = *at - R::from_f64(hit);
            }
        });
        // Safety: the ranges cover all rows.
        unsafe { d_scores.finish() }
    }
}

kernel! {
    /// The partition function of a row.
    fn partition_of<'a, R: Real>(simd: S, row: &'a [R],) -> Partition<R> {
        let whole = row.len() / lanes::<R, S>() * lanes::<R, S>();
        // Safety: vectors of the row alone.
        unsafe {
            let mut largest = R::splat(simd, R::NEG_INFINITY);
            each_vector!(R, S, whole, |j, _| {
                largest = R::vmax(simd, largest, R::load(simd, row.as_ptr().add(j)));
            });
            let mut largest = R::reduce_max(simd, largest);
            for x in &row[whole..] {
                if *x > largest {
                    largest = *x;
                }
            }
            let shift = R::splat(simd, largest);
            let mut sum = R::splat(simd, R::default());
            each_vector!(R, S, whole, |j, _| {
                let x = R::vsub(simd, R::load(simd, row.as_ptr().add(j)), shift);
                sum = R::vadd(simd, sum, R::vexp(simd, x));
            });
            let mut sum = R::reduce_sum(simd, sum);
            for x in &row[whole..] {
                sum += (*x - largest).exp();
            }
            Partition { largest, sum }
        }
    }
}

kernel! {
    /// `slope e^(x - largest) - each` of a row.
    fn scaled_exp<'a, R: Real>(
        simd: S,
        row: &'a [R],
        largest: R,
        slope: R,
        each: R,
        to: &'a mut [R],
    ) -> () {
        let [shift, slope, each] = [largest, slope, each].map(|x| R::splat(simd, x));
        each_vector!(R, S, row.len(), |j, n| {
            // Safety: both rows have `n` elements from `j` on.
            unsafe {
                let x = R::vsub(simd, R::load_some(simd, row.as_ptr().add(j), n), shift);
                let y = R::vsub(simd, R::vmul(simd, slope, R::vexp(simd, x)), each);
                R::store_some(simd, to.as_mut_ptr().add(j), y, n);
            }
        });
    }
}
