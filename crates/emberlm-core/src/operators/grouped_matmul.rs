//! Products of groups of rows, each with a matrix of its own: the experts of a mixture.

use burn::tensor::{Int, Tensor, TensorData};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Shared, Stored, View,
    matrix::{Matrix, Store, Target, for_each_product, product_on},
    run,
};

use super::{Implementation, linear::Products, sum_of_rows};

/// `y_i = x_i W[g] + b[g]` for the rows `i` of group `g`.
///
/// The rows lie group by group: the first `group_sizes[0]` are those of group 0, and so on; a group may have none. The
/// matrix of a group without rows is not read, and its gradient is zero. This is the product of "dropless" mixtures of
/// experts: Gale et al. 2022 (MegaBlocks), <https://arxiv.org/abs/2211.15841>.
///
/// # Shapes
///
/// - `x`: `[n_rows, d_input]`
/// - `weight`: `[n_groups, d_input, d_output]`
/// - `bias`: `[n_groups, d_output]`
/// - output: `[n_rows, d_output]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::operators::grouped_matmul;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0], [2.0], [3.0]], &device);
/// let weight = Tensor::<3>::from_floats([[[10.0]], [[100.0]]], &device);
/// let y: Vec<f32> = grouped_matmul(x, weight, None, &[1, 2]).into_data().iter::<f32>().collect();
/// assert_eq!(y, [10.0, 200.0, 300.0]);
/// ```
///
/// # Panics
///
/// If the sizes of the groups do not add up to the rows, there is another number of groups than of matrices, or the widths
/// disagree; the message names the axis.
pub fn grouped_matmul(
    x: Tensor<2>,
    weight: Tensor<3>,
    bias: Option<Tensor<2>>,
    group_sizes: &[usize],
) -> Tensor<2> {
    let [output] = grouped_matmuls(x, [(weight, bias)], group_sizes);
    output
}

/// Several products of the same groups of rows, computed and differentiated together, as a gate and what it gates.
///
/// # Shapes
///
/// As [`grouped_matmul`], with a `d_output` for each product.
///
/// # Panics
///
/// As [`grouped_matmul`], and for more than three products with a bias.
pub fn grouped_matmuls<const N: usize>(
    x: Tensor<2>,
    projections: [(Tensor<3>, Option<Tensor<2>>); N],
    group_sizes: &[usize],
) -> [Tensor<2>; N] {
    grouped_matmuls_by(Implementation::of(&x.device()), x, projections, group_sizes)
}

/// [`grouped_matmuls`] by a given implementation.
///
/// `Reference` is a product for each group. `Portable` pads the groups to one length and makes one batched product of
/// them; what it holds grows with the longest group.
///
/// # Panics
///
/// As [`grouped_matmuls`].
pub fn grouped_matmuls_by<const N: usize>(
    implementation: Implementation,
    x: Tensor<2>,
    projections: [(Tensor<3>, Option<Tensor<2>>); N],
    group_sizes: &[usize],
) -> [Tensor<2>; N] {
    let [n_rows, width] = x.dims();
    let n_in_groups: usize = group_sizes.iter().sum();
    assert_eq!(
        n_in_groups, n_rows,
        "group_sizes: the groups have {n_in_groups} rows, the input {n_rows}"
    );
    for (weight, bias) in &projections {
        let [n_groups, d_input, d_output] = weight.dims();
        assert_eq!(
            n_groups,
            group_sizes.len(),
            "n_groups: the weight has {n_groups}, the sizes {}",
            group_sizes.len()
        );
        assert_eq!(
            d_input, width,
            "d_input: the input has {width} components, the weight {d_input}"
        );
        if let Some(bias) = bias {
            let dims = bias.dims();
            assert_eq!(
                dims,
                [n_groups, d_output],
                "d_output: the bias has shape {dims:?}, the weight {n_groups} groups of {d_output}"
            );
        }
    }
    match implementation {
        Implementation::Reference => {
            projections.map(|projection| one_by_one(x.clone(), projection, group_sizes))
        }
        Implementation::Portable => padded(x, projections, group_sizes),
        Implementation::Native => native(x, projections, group_sizes),
    }
}

fn one_by_one(
    x: Tensor<2>,
    (weight, bias): (Tensor<3>, Option<Tensor<2>>),
    group_sizes: &[usize],
) -> Tensor<2> {
    let [_, _, d_output] = weight.dims();
    // An empty part, so that there is one even where all groups are empty.
    let mut parts = vec![Tensor::zeros([0, d_output], (&x.device(), x.dtype()))];
    let mut first = 0;
    for (group, n) in group_sizes.iter().enumerate() {
        if *n == 0 {
            continue;
        }
        let of_group = weight.clone().narrow(0, group, 1).squeeze_dim::<2>(0);
        let y = x.clone().narrow(0, first, *n).matmul(of_group);
        parts.push(match &bias {
            Some(bias) => y + bias.clone().narrow(0, group, 1),
            None => y,
        });
        first += n;
    }
    Tensor::cat(parts, 0)
}

fn padded<const N: usize>(
    x: Tensor<2>,
    projections: [(Tensor<3>, Option<Tensor<2>>); N],
    group_sizes: &[usize],
) -> [Tensor<2>; N] {
    let [n_rows, width] = x.dims();
    let (n_groups, longest) = (
        group_sizes.len(),
        group_sizes.iter().max().copied().unwrap_or(0),
    );
    let device = x.device();
    if longest == 0 {
        return projections.map(|(weight, _)| {
            let [_, _, d_output] = weight.dims();
            Tensor::zeros([0, d_output], (&device, x.dtype()))
        });
    }
    let place = |group: usize| group * longest;
    let places = group_sizes.iter().enumerate();
    let places: Vec<i64> = places
        .flat_map(|(group, n)| place(group)..place(group) + n)
        .map(|place| place as i64)
        .collect();
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [n_rows]), &device);
    let there = Tensor::zeros([n_groups * longest, width], (&device, x.dtype())).select_assign(
        0,
        places.clone(),
        x,
        burn::tensor::IndexingUpdateOp::Add,
    );
    let there = there.reshape([n_groups, longest, width]);
    projections.map(|(weight, bias)| {
        let [_, _, d_output] = weight.dims();
        let y = there.clone().matmul(weight);
        let y = match bias {
            Some(bias) => y + bias.unsqueeze_dim::<3>(1),
            None => y,
        };
        y.reshape([n_groups * longest, d_output])
            .select(0, places.clone())
    })
}

fn native<const N: usize>(
    x: Tensor<2>,
    projections: [(Tensor<3>, Option<Tensor<2>>); N],
    group_sizes: &[usize],
) -> [Tensor<2>; N] {
    let (products, inputs) = Products::of(x.into_dispatch(), projections);
    let operator = Grouped {
        group_sizes: group_sizes.to_vec(),
        products,
    };
    run::<_, N>(operator, inputs).map(Tensor::from_dispatch)
}

#[derive(Debug)]
struct Grouped {
    group_sizes: Vec<usize>,
    products: Products,
}

/// A group that has rows.
#[derive(Debug, Clone, Copy)]
struct Group {
    index: usize,
    first: usize,
    n: usize,
}

impl Group {
    /// Its rows of a matrix of `width` columns.
    fn rows<'a, R: Real>(&self, elements: &'a [R], width: usize) -> Matrix<'a, R> {
        let rows = &elements[self.first * width..][..self.n * width];
        Matrix::new(rows, [self.n, width])
    }

    /// The same, to write.
    ///
    /// # Safety
    ///
    /// Nobody else has the rows of this group.
    unsafe fn part<'a, R>(&self, to: &Shared<'a, R>, width: usize) -> &'a mut [R] {
        // Safety: the caller's promise.
        unsafe { to.part(self.first * width, self.n * width) }
    }
}

impl Grouped {
    fn groups(&self) -> Vec<Group> {
        let mut first = 0;
        let groups = self.group_sizes.iter().enumerate().map(|(index, n)| {
            let group = Group {
                index,
                first,
                n: *n,
            };
            first += n;
            group
        });
        groups.filter(|group| group.n > 0).collect()
    }

    fn n_rows(&self) -> usize {
        self.group_sizes.iter().sum()
    }
}

impl Operator for Grouped {
    type Saved<E: Stored> = ();

    fn keeps_input(&self, i: usize) -> bool {
        self.products.is_factor(i)
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let (x, d_input) = (inputs[0].reals(), inputs[0].width());
        let groups = self.groups();
        let outputs = (0..self.products.len()).map(|i| {
            let (weight, width) = (Matrix::of_view(&inputs[1 + i]), inputs[1 + i].width());
            let bias = self.products.bias(i).map(|bias| inputs[bias].reals());
            let mut output = Buffer::new(self.n_rows() * width);
            let to = output.shared();
            for_each_product(groups.len(), |nth, threads| {
                let group = &groups[nth];
                // Safety: each group has rows of its own.
                let to = unsafe { group.part(&to, width) };
                let store = match &bias {
                    Some(bias) => {
                        let bias = &bias[group.index * width..][..width];
                        to.chunks_exact_mut(width.max(1))
                            .for_each(|row| row.copy_from_slice(bias));
                        Store::Add
                    }
                    None if d_input == 0 => {
                        to.fill(E::Real::default());
                        Store::Add
                    }
                    None => Store::Replace,
                };
                let weight = weight.rows(group.index * d_input, d_input);
                let to = Target::new(to, [group.n, width]);
                product_on(threads, &group.rows(&x, d_input), &weight, to, store);
            });
            // Safety: the groups cover all rows.
            let output = unsafe { output.finish() };
            Array::from_reals(output, &[self.n_rows(), width])
        });
        (outputs.collect(), ())
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
        let x_view = pass.input(0);
        let (x, d_input) = (x_view.reals(), x_view.width());
        let (groups, n_groups) = (self.groups(), self.group_sizes.len());
        let zeros = |n| vec![E::Real::default(); n];
        let mut d_x: Option<Vec<E::Real>> = None;
        let mut gradients = vec![Gradient::None; pass.wanted.len()];
        for i in 0..self.products.len() {
            let Some(d_output) = pass.gradient(i) else {
                continue;
            };
            let (d_output, width) = (d_output.reals(), d_output.width());
            let weight_view = pass.input(1 + i);
            if pass.wanted[0] {
                let weight = Matrix::of_view(&weight_view);
                // A sum that begins with the first product; one over no columns is zero.
                let store = match d_x {
                    None if width > 0 => Store::Replace,
                    _ => Store::Add,
                };
                let d_x = d_x.get_or_insert_with(|| zeros(self.n_rows() * d_input));
                let to = Shared::new(d_x);
                for_each_product(groups.len(), |nth, threads| {
                    let group = &groups[nth];
                    // Safety: each group has rows of its own.
                    let to = unsafe { group.part(&to, d_input) };
                    let weight = weight.rows(group.index * d_input, d_input);
                    let d_output = group.rows(&d_output, width);
                    let to = Target::new(to, [group.n, d_input]);
                    product_on(threads, &d_output, &weight.transposed(), to, store);
                });
            }
            gradients[1 + i] = pass.if_wanted(1 + i, || {
                let size = d_input * width;
                let mut d_weight = Buffer::new(n_groups * size);
                let to = d_weight.shared();
                for (index, n) in self.group_sizes.iter().enumerate() {
                    if *n == 0 {
                        // Safety: no group with rows has this matrix.
                        unsafe { to.part(index * size, size) }.fill(E::Real::default());
                    }
                }
                for_each_product(groups.len(), |nth, threads| {
                    let group = &groups[nth];
                    // Safety: each group has a matrix of its own.
                    let to = unsafe { to.part(group.index * size, size) };
                    let x = group.rows(&x, d_input);
                    let d_output = group.rows(&d_output, width);
                    let to = Target::new(to, [d_input, width]);
                    product_on(threads, &x.transposed(), &d_output, to, Store::Replace);
                });
                // Safety: every group is in one of the two.
                Array::from_reals(unsafe { d_weight.finish() }, weight_view.shape())
            });
            if let Some(bias) = self.products.bias(i) {
                gradients[bias] = pass.if_wanted(bias, || {
                    let mut d_bias = zeros(n_groups * width);
                    for group in &groups {
                        let rows = &d_output[group.first * width..][..group.n * width];
                        d_bias[group.index * width..][..width]
                            .copy_from_slice(&sum_of_rows(rows, width));
                    }
                    Array::from_reals(d_bias, &[n_groups, width])
                });
            }
        }
        if let Some(d_x) = d_x {
            gradients[0] = Gradient::Of(Array::from_reals(d_x, x_view.shape()));
        }
        gradients
    }
}
