//! The glue between a forward and a backward pass on slices, and an operator of Burn with a step of autodiff.

#![cfg_attr(
    feature = "ndarray",
    allow(deprecated, reason = "ndarray is served as long as Burn has it")
)]

use std::{
    any::Any,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use burn::{
    backend::{
        Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor,
        DispatchTensorKind, ExtensionType, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, NodeGuard, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{DType, Shape, Tensor},
};
use half::{bf16, f16};

use crate::{HostBackend, Stored, View};

/// An operator on tensors of the CPU backends: a forward pass, and the backward pass that belongs to it.
///
/// It computes on [`View`]s and [`Array`]s of any element type and knows nothing of Burn's graph. [`run`] makes it an
/// operator of Burn: on Flex and NdArray, with and without autodiff. An example is a whole small operator:
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_kernels::{Array, Gradient, Operator, Pass, Stored, View, run_one};
///
/// /// `a b`, element by element.
/// #[derive(Debug)]
/// struct Product;
///
/// fn products<E: Stored>(a: &View<'_, E>, b: &View<'_, E>) -> Array<E> {
///     let products = a.reals().iter().zip(&*b.reals()).map(|(a, b)| *a * *b).collect();
///     Array::from_reals(products, a.shape())
/// }
///
/// impl Operator for Product {
///     type Saved<E: Stored> = ();
///
///     fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
///         (vec![products(&inputs[0], &inputs[1])], ())
///     }
///
///     fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
///         let d_output = pass.gradient(0).expect("of the one output");
///         let of = |i| pass.if_wanted(i, || products(&pass.input(1 - i), &d_output));
///         vec![of(0), of(1)]
///     }
/// }
///
/// let device = Device::flex().autodiff();
/// let a = Tensor::<1>::from_floats([1.0, 2.0], &device).require_grad();
/// let b = Tensor::<1>::from_floats([3.0, 5.0], &device);
/// let product: Tensor<1> = run_one(Product, [a.clone().into_dispatch(), b.into_dispatch()]);
/// let gradients = product.sum().backward();
/// let d_a: Vec<f32> = a.grad(&gradients).unwrap().into_data().iter::<f32>().collect();
/// assert_eq!(d_a, [3.0, 5.0]);
/// ```
pub trait Operator: Debug + Send + Sync + 'static {
    /// What the backward pass needs besides inputs and outputs.
    type Saved<E: Stored>: Send + Sync + 'static;

    /// Whether the backward pass needs input `i`.
    fn keeps_input(&self, i: usize) -> bool {
        let _ = i;
        true
    }

    /// Whether the backward pass needs output `i`.
    fn keeps_output(&self, i: usize) -> bool {
        let _ = i;
        false
    }

    /// Computes the outputs.
    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Self::Saved<E>);

    /// The same outputs where no backward pass can follow: on a device without autodiff. By default [`forward`](Self::forward),
    /// for operators that save nothing of size.
    fn infer<E: Stored>(&self, inputs: &[View<'_, E>]) -> Vec<Array<E>> {
        self.forward(inputs).0
    }

    /// Computes the gradients of the inputs, as many as there are inputs.
    ///
    /// # Panics
    ///
    /// If the operator has no backward pass, which is the default.
    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Self::Saved<E>>) -> Vec<Gradient<E>> {
        let _ = pass;
        panic!("{self:?} has no backward pass")
    }
}

/// The gradient of an input.
#[derive(Debug, Clone)]
pub enum Gradient<E> {
    /// Zero, or not wanted.
    None,
    /// These elements.
    Of(Array<E>),
    /// That of an output, unchanged.
    OfOutput(usize),
    /// That of an earlier input.
    OfInput(usize),
}

/// Elements of a tensor to be, in order.
#[derive(Debug, Clone)]
pub struct Array<E> {
    elements: Vec<E>,
    shape: Vec<usize>,
}

impl<E: Stored> Array<E> {
    /// # Panics
    ///
    /// If the numbers of elements differ.
    pub fn new(elements: Vec<E>, shape: &[usize]) -> Self {
        assert_eq!(
            elements.len(),
            shape.iter().product::<usize>(),
            "elements of shape {shape:?}"
        );
        Self {
            elements,
            shape: shape.to_vec(),
        }
    }

    /// Rounds to the element type.
    ///
    /// # Panics
    ///
    /// If the numbers of elements differ.
    pub fn from_reals(reals: Vec<E::Real>, shape: &[usize]) -> Self {
        Self::new(E::from_reals(reals), shape)
    }
}

/// What a backward pass gets.
#[derive(Debug)]
pub struct Pass<'a, E, S> {
    inputs: Vec<Option<View<'a, E>>>,
    outputs: Vec<Option<View<'a, E>>>,
    gradients: Vec<Option<View<'a, E>>>,
    /// What the forward pass saved.
    pub saved: &'a S,
    /// Of which inputs a gradient is wanted.
    pub wanted: &'a [bool],
}

impl<'a, E: Stored, S> Pass<'a, E, S> {
    /// Input `i`.
    ///
    /// # Panics
    ///
    /// If [`Operator::keeps_input`] said that it is not needed.
    pub fn input(&self, i: usize) -> View<'a, E> {
        self.inputs[i].expect("the operator keeps this input")
    }

    /// Output `i`.
    ///
    /// # Panics
    ///
    /// Unless [`Operator::keeps_output`] said that it is needed.
    pub fn output(&self, i: usize) -> View<'a, E> {
        self.outputs[i].expect("the operator keeps this output")
    }

    /// The gradient of output `i`; nothing where nothing came back, which is zero.
    pub fn gradient(&self, i: usize) -> Option<View<'a, E>> {
        self.gradients[i]
    }

    /// Computes the gradient of input `i` if it is wanted.
    pub fn if_wanted(&self, i: usize, compute: impl FnOnce() -> Array<E>) -> Gradient<E> {
        match self.wanted[i] {
            true => Gradient::Of(compute()),
            false => Gradient::None,
        }
    }
}

/// Runs an operator on tensors of one element type and one CPU device.
///
/// # Panics
///
/// If [`is_host`](crate::is_host) is not true of the device, the element types differ, a tensor has more than four
/// axes, or the operator has another number of outputs than `N`.
pub fn run<O: Operator, const N: usize>(
    operator: O,
    inputs: impl IntoIterator<Item = DispatchTensor>,
) -> [DispatchTensor; N] {
    let inputs = Tensors(inputs.into_iter().collect());
    let outputs = <Dispatch as HostOperators>::run(inputs, Arc::new(operator));
    let n_outputs = outputs.0.len();
    outputs
        .0
        .try_into()
        .unwrap_or_else(|_| panic!("outputs: {N} are taken of {n_outputs}"))
}

/// [`run`] for an operator of one output.
///
/// # Panics
///
/// As [`run`].
pub fn run_one<O: Operator, const D: usize>(
    operator: O,
    inputs: impl IntoIterator<Item = DispatchTensor>,
) -> Tensor<D> {
    let [output] = run(operator, inputs);
    Tensor::from_dispatch(output)
}

/// Any number of tensors.
#[derive(Debug, Clone)]
pub(crate) struct Tensors<B: Backend>(Vec<FloatTensor<B>>);

impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let to_dispatch = |tensor| DispatchTensor {
            kind: map_kind(BackendTensor::Float(tensor)),
            autodiff,
        };
        Tensors(self.0.into_iter().map(to_dispatch).collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let tensors = target.0.into_iter();
        Self(tensors.map(|tensor| unwrap_kind(tensor).float()).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let contexts = target.0.iter().map(|tensor| tensor.autodiff);
        contexts.fold(DispatchAutodiffContext::Disabled, |all, context| {
            all.merge(context)
        })
    }
}

#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Autodiff,
)]
trait HostOperators: Backend {
    fn run<O: Operator>(#[extension_type] inputs: Tensors<Self>, operator: Arc<O>)
    -> Tensors<Self>;
}

macro_rules! on_host {
    ($backend:ty) => {
        impl HostOperators for $backend {
            fn run<O: Operator>(inputs: Tensors<Self>, operator: Arc<O>) -> Tensors<Self> {
                Tensors(infer::<Self, O>(&inputs.0, &operator))
            }
        }
    };
}

#[cfg(feature = "flex")]
on_host!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
on_host!(burn::backend::NdArray);

/// What the operator saved, of whichever element type.
type Saved = Arc<dyn Any + Send + Sync>;

macro_rules! by_dtype {
    ($dtype:expr, $function:ident::<$backend:ident, $operator:ident>($($argument:expr),*)) => {
        match $dtype {
            DType::F32 => $function::<$backend, $operator, f32>($($argument),*),
            DType::F64 => $function::<$backend, $operator, f64>($($argument),*),
            DType::F16 => $function::<$backend, $operator, f16>($($argument),*),
            DType::BF16 => $function::<$backend, $operator, bf16>($($argument),*),
            other => panic!("element type: operators take floats, got {other:?}"),
        }
    };
}

fn infer<B: HostBackend, O: Operator>(
    inputs: &[FloatTensor<B>],
    operator: &O,
) -> Vec<FloatTensor<B>> {
    by_dtype!(inputs[0].dtype(), infer_of::<B, O>(inputs, operator))
}

fn infer_of<B: HostBackend, O: Operator, E: Stored>(
    inputs: &[FloatTensor<B>],
    operator: &O,
) -> Vec<FloatTensor<B>> {
    let views: Vec<View<'_, E>> = inputs.iter().map(B::view).collect();
    let outputs = operator.infer(&views).into_iter();
    outputs.map(to_tensor::<B, E>).collect()
}

fn forward<B: HostBackend, O: Operator>(
    inputs: &[FloatTensor<B>],
    operator: &O,
) -> (Vec<FloatTensor<B>>, Saved) {
    by_dtype!(inputs[0].dtype(), forward_of::<B, O>(inputs, operator))
}

fn forward_of<B: HostBackend, O: Operator, E: Stored>(
    inputs: &[FloatTensor<B>],
    operator: &O,
) -> (Vec<FloatTensor<B>>, Saved) {
    let views: Vec<View<'_, E>> = inputs.iter().map(B::view).collect();
    let (outputs, saved) = operator.forward(&views);
    (
        outputs.into_iter().map(to_tensor::<B, E>).collect(),
        Arc::new(saved),
    )
}

fn to_tensor<B: HostBackend, E: Stored>(array: Array<E>) -> FloatTensor<B> {
    B::from_elements(array.elements, &array.shape)
}

/// The gradients of several outputs, from when each arrives until the operator's own step.
type Arrived<B> = Arc<Mutex<Vec<Option<FloatTensor<B>>>>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct State<B: Backend, O> {
    operator: Arc<O>,
    dtype: DType,
    inputs: Vec<Option<FloatTensor<B>>>,
    /// Of the inputs.
    shapes: Vec<Shape>,
    outputs: Vec<Option<FloatTensor<B>>>,
    saved: Saved,
    /// Nothing for one output, whose gradient is that of the node.
    arrived: Option<Arrived<B>>,
}

impl<B: Backend, O> Clone for State<B, O> {
    fn clone(&self) -> Self {
        Self {
            operator: self.operator.clone(),
            dtype: self.dtype,
            inputs: self.inputs.clone(),
            shapes: self.shapes.clone(),
            outputs: self.outputs.clone(),
            saved: self.saved.clone(),
            arrived: self.arrived.clone(),
        }
    }
}

impl<B: HostBackend + HostOperators, C: CheckpointStrategy> HostOperators for Autodiff<B, C> {
    fn run<O: Operator>(inputs: Tensors<Self>, operator: Arc<O>) -> Tensors<Self> {
        // Burn wants the number of parents as a constant.
        let outputs = match inputs.0.len() {
            1 => tracked::<B, C, O, 1>(inputs.0, operator),
            2 => tracked::<B, C, O, 2>(inputs.0, operator),
            3 => tracked::<B, C, O, 3>(inputs.0, operator),
            4 => tracked::<B, C, O, 4>(inputs.0, operator),
            5 => tracked::<B, C, O, 5>(inputs.0, operator),
            6 => tracked::<B, C, O, 6>(inputs.0, operator),
            7 => tracked::<B, C, O, 7>(inputs.0, operator),
            n => panic!("inputs: an operator takes 1 to 7 tensors, got {n}"),
        };
        Tensors(outputs)
    }
}

fn tracked<B: HostBackend, C: CheckpointStrategy, O: Operator, const N: usize>(
    inputs: Vec<FloatTensor<Autodiff<B, C>>>,
    operator: Arc<O>,
) -> Vec<FloatTensor<Autodiff<B, C>>> {
    let nodes: [NodeGuard; N] = std::array::from_fn(|i| inputs[i].node());
    let inputs: Vec<FloatTensor<B>> = inputs
        .into_iter()
        .map(|input| input.into_primitive())
        .collect();
    let dtype = inputs[0].dtype();
    let (outputs, saved) = forward::<B, O>(&inputs, &operator);
    let one_output = outputs.len() == 1;
    let arrived = (!one_output).then(|| Arc::new(Mutex::new(vec![None; outputs.len()])));
    // The node of several outputs holds none of them; they are its children.
    let own = match one_output {
        true => outputs[0].clone(),
        false => placeholder::<B>(dtype),
    };
    let step = OperatorBackward(std::marker::PhantomData::<O>)
        .prepare::<C>(nodes)
        .compute_bound();
    let own = match step.stateful() {
        OpsKind::UnTracked(step) => step.finish(own),
        OpsKind::Tracked(step) => {
            let shapes = inputs.iter().map(TensorMetadata::shape).collect();
            let inputs = (0..).zip(inputs);
            let outputs = (0..).zip(&outputs);
            let state = State {
                shapes,
                inputs: inputs
                    .map(|(i, input)| operator.keeps_input(i).then_some(input))
                    .collect(),
                outputs: outputs
                    .map(|(i, output)| operator.keeps_output(i).then(|| output.clone()))
                    .collect(),
                operator,
                dtype,
                saved,
                arrived: arrived.clone(),
            };
            step.finish(state, own)
        }
    };
    let Some(arrived) = arrived else {
        return vec![own];
    };
    let part = |(index, output)| {
        let step = PartBackward.prepare::<C>([own.node()]).compute_bound();
        match step.stateful() {
            OpsKind::UnTracked(step) => step.finish(output),
            OpsKind::Tracked(step) => {
                let state = Part {
                    index,
                    dtype,
                    arrived: arrived.clone(),
                };
                step.finish(state, output)
            }
        }
    };
    outputs.into_iter().enumerate().map(part).collect()
}

fn placeholder<B: HostBackend>(dtype: DType) -> FloatTensor<B> {
    B::float_zeros([1].into(), &Default::default(), dtype.into())
}

#[derive(Debug)]
struct OperatorBackward<O>(std::marker::PhantomData<O>);

impl<B: HostBackend, O: Operator, const N: usize> Backward<B, N> for OperatorBackward<O> {
    type State = State<B, O>;

    fn backward(
        self,
        ops: Ops<State<B, O>, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let own = gradients.consume::<B>(&ops.node);
        let arrived = match &ops.state.arrived {
            None => vec![Some(own)],
            Some(arrived) => std::mem::take(&mut *lock(arrived)),
        };
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let dtype = ops.state.dtype;
        let computed = by_dtype!(dtype, backward_of::<B, O>(&ops.state, &arrived, &wanted));
        for ((parent, gradient), shape) in
            ops.parents.into_iter().zip(computed).zip(ops.state.shapes)
        {
            let Some(parent) = parent else {
                continue;
            };
            match gradient {
                Some(gradient) => gradients.register::<B>(parent.id, gradient),
                // The step of a parent takes its gradient; a leaf has none.
                None if !parent.parents.is_empty() => {
                    let zeros = B::float_zeros(shape, &Default::default(), dtype.into());
                    gradients.register::<B>(parent.id, zeros);
                }
                None => {}
            }
        }
    }
}

fn backward_of<B: HostBackend, O: Operator, E: Stored>(
    state: &State<B, O>,
    arrived: &[Option<FloatTensor<B>>],
    wanted: &[bool],
) -> Vec<Option<FloatTensor<B>>> {
    let pass = Pass {
        inputs: views::<B, E>(&state.inputs),
        outputs: views::<B, E>(&state.outputs),
        gradients: views::<B, E>(arrived),
        saved: state
            .saved
            .downcast_ref()
            .expect("the forward pass computed in the same type"),
        wanted,
    };
    let computed = state.operator.backward::<E>(&pass);
    let mut gradients: Vec<Option<FloatTensor<B>>> = Vec::with_capacity(computed.len());
    for gradient in computed {
        gradients.push(match gradient {
            Gradient::None => None,
            Gradient::Of(array) => Some(to_tensor::<B, E>(array)),
            Gradient::OfOutput(i) => arrived[i].clone(),
            Gradient::OfInput(i) => gradients[i].clone(),
        });
    }
    gradients
}

fn views<B: HostBackend, E: Stored>(
    tensors: &[Option<FloatTensor<B>>],
) -> Vec<Option<View<'_, E>>> {
    let views = tensors.iter().map(|tensor| tensor.as_ref().map(B::view));
    views.collect()
}

#[derive(Debug, Clone)]
struct Part<B: Backend> {
    index: usize,
    dtype: DType,
    arrived: Arrived<B>,
}

/// One of several outputs: lays its gradient where the operator's step finds it.
#[derive(Debug)]
struct PartBackward;

impl<B: HostBackend> Backward<B, 1> for PartBackward {
    type State = Part<B>;

    fn backward(
        self,
        ops: Ops<Part<B>, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = gradients.consume::<B>(&ops.node);
        let Part {
            index,
            dtype,
            arrived,
        } = ops.state;
        lock(&arrived)[index] = Some(gradient);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            gradients.register::<B>(parent.id, placeholder::<B>(dtype));
        }
    }
}
