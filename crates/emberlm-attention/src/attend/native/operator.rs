//! The operator as Burn sees it: routed to the CPU backends, with its own step of autodiff.

#![cfg_attr(
    feature = "ndarray",
    allow(deprecated, reason = "ndarray is served as long as Burn has it")
)]

use std::{any::Any, sync::Arc};

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{DType, Tensor, TensorData},
};
use emberlm_core::Schedule;
use emberlm_kernels::{HostBackend, Real, Stored};
use half::{bf16, f16};

use super::{
    backward::{Saved, backward},
    forward::forward,
    problem::{Dropout, Problem, Scores},
};

/// Everything besides the tensors.
#[derive(Debug)]
pub(in crate::attend) struct Spec {
    pub(in crate::attend) schedule: Arc<Schedule>,
    pub(in crate::attend) scale: f64,
    pub(in crate::attend) cap: Option<f64>,
    pub(in crate::attend) slopes: Option<Vec<f64>>,
    pub(in crate::attend) dropout: Option<Dropout>,
    /// Whether there is a bias; else that argument is a placeholder. The same for the sinks.
    pub(in crate::attend) has_bias: bool,
    pub(in crate::attend) has_sinks: bool,
    pub(in crate::attend) with_log_sum_exp: bool,
}

/// Attention by the kernels of this module.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Autodiff,
)]
pub(in crate::attend) trait NativeAttention: Backend {
    /// The output, `[batch_size, n_heads, query_length, d_value]`, with the log-sum-exp as one column more if asked for.
    fn native_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        spec: Arc<Spec>,
    ) -> FloatTensor<Self>;
}

/// The tensors of a call, on a device that [`NativeAttention`] is listed for.
#[derive(Debug, Clone)]
pub(in crate::attend) struct Inputs<T4, T1> {
    pub(in crate::attend) query: T4,
    pub(in crate::attend) key: T4,
    pub(in crate::attend) value: T4,
    pub(in crate::attend) bias: T4,
    pub(in crate::attend) sinks: T1,
}

/// Calls the operator.
pub(in crate::attend) fn attend(inputs: Inputs<Tensor<4>, Tensor<1>>, spec: Spec) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as NativeAttention>::native_attention(
        inputs.query.into_dispatch(),
        inputs.key.into_dispatch(),
        inputs.value.into_dispatch(),
        inputs.bias.into_dispatch(),
        inputs.sinks.into_dispatch(),
        Arc::new(spec),
    ))
}

type Primitives<B> = Inputs<FloatTensor<B>, FloatTensor<B>>;

macro_rules! by_dtype {
    ($dtype:expr, $function:ident::<$backend:ident>($($argument:expr),*)) => {
        match $dtype {
            DType::F32 => $function::<$backend, f32>($($argument),*),
            DType::F64 => $function::<$backend, f64>($($argument),*),
            DType::F16 => $function::<$backend, f16>($($argument),*),
            DType::BF16 => $function::<$backend, bf16>($($argument),*),
            other => panic!("element type: attention takes floats, got {other:?}"),
        }
    };
}

/// The output, and the log-sum-exp as `Vec<E::Real>`.
fn host_forward<B: HostBackend, E: Stored>(
    inputs: &Primitives<B>,
    spec: &Spec,
) -> (FloatTensor<B>, Arc<dyn Any + Send + Sync>) {
    with_problem::<B, E, _>(inputs, spec, |problem| {
        let sizes = problem.sizes();
        let forward = forward(problem);
        let dims = [
            sizes.batch_size,
            sizes.query_length,
            sizes.n_heads,
            problem.d_output(),
        ];
        let log_sum_exp: Arc<dyn Any + Send + Sync> = Arc::new(forward.log_sum_exp);
        (B::from_swapped(forward.output, dims), log_sum_exp)
    })
}

/// Reads the tensors in place and hands them on as a problem.
fn with_problem<B: HostBackend, E: Stored, R>(
    inputs: &Primitives<B>,
    spec: &Spec,
    run: impl FnOnce(&Problem<'_, E>) -> R,
) -> R {
    let real = E::Real::from_f64;
    let sinks = spec.has_sinks.then(|| {
        let n_heads = inputs.sinks.shape().num_elements();
        let sinks = B::float_reshape(inputs.sinks.clone(), [1, 1, 1, n_heads].into());
        B::with_view::<E, _>(&sinks, |sinks| {
            sinks.row([0; 3]).map(Stored::to_real).collect()
        })
    });
    B::with_view::<E, _>(&inputs.query, |query| {
        B::with_view::<E, _>(&inputs.key, |key| {
            B::with_view::<E, _>(&inputs.value, |value| {
                B::with_view::<E, _>(&inputs.bias, |bias| {
                    run(&Problem {
                        query,
                        key,
                        value,
                        bias: spec.has_bias.then_some(bias),
                        sinks,
                        schedule: &spec.schedule,
                        with_log_sum_exp: spec.with_log_sum_exp,
                        scores: Scores {
                            scale: real(spec.scale),
                            cap: spec.cap.map(real),
                            slopes: spec
                                .slopes
                                .as_ref()
                                .map(|slopes| slopes.iter().copied().map(real).collect()),
                            dropout: spec.dropout,
                        },
                    })
                })
            })
        })
    })
}

macro_rules! on_host {
    ($backend:ty) => {
        impl NativeAttention for $backend {
            fn native_attention(
                query: FloatTensor<Self>,
                key: FloatTensor<Self>,
                value: FloatTensor<Self>,
                bias: FloatTensor<Self>,
                sinks: FloatTensor<Self>,
                spec: Arc<Spec>,
            ) -> FloatTensor<Self> {
                let inputs = Inputs {
                    query,
                    key,
                    value,
                    bias,
                    sinks,
                };
                untracked::<Self>(&inputs, &spec).0
            }
        }
    };
}

#[cfg(feature = "flex")]
on_host!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
on_host!(burn::backend::NdArray);

fn untracked<B: HostBackend>(
    inputs: &Primitives<B>,
    spec: &Spec,
) -> (FloatTensor<B>, Arc<dyn Any + Send + Sync>) {
    by_dtype!(inputs.query.dtype(), host_forward::<B>(inputs, spec))
}

/// What the backward pass keeps: the inputs, the output and the log-sum-exp, but no scores.
#[derive(Debug, Clone)]
struct State<B: Backend> {
    inputs: Primitives<B>,
    output: FloatTensor<B>,
    log_sum_exp: Arc<dyn Any + Send + Sync>,
    spec: Arc<Spec>,
}

#[derive(Debug)]
struct NativeAttentionBackward;

impl<B: HostBackend> Backward<B, 5> for NativeAttentionBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 5>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let d_output = gradients.consume::<B>(&ops.node);
        let with_bias = ops.parents[3].is_some();
        let dtype = ops.state.inputs.query.dtype();
        let computed = by_dtype!(dtype, host_backward::<B>(ops.state, d_output, with_bias));
        for (parent, gradient) in ops.parents.into_iter().zip(computed) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Gradients of query, key, value, bias and sinks.
fn host_backward<B: HostBackend, E: Stored>(
    state: State<B>,
    d_output: FloatTensor<B>,
    with_bias: bool,
) -> [Option<FloatTensor<B>>; 5] {
    let State {
        inputs,
        output,
        log_sum_exp,
        spec,
    } = state;
    let log_sum_exp = log_sum_exp
        .downcast_ref::<Vec<E::Real>>()
        .expect("the forward pass computed in the same type");
    with_problem::<B, E, _>(&inputs, &spec, |problem| {
        let sizes = problem.sizes();
        let computed = B::with_view::<E, _>(&output, |output| {
            B::with_view::<E, _>(&d_output, |d_output| {
                let saved = Saved {
                    output,
                    log_sum_exp,
                    d_output,
                };
                backward(problem, &saved, with_bias)
            })
        });
        let heads = |elements, length, n_heads, width| {
            B::from_swapped(elements, [sizes.batch_size, length, n_heads, width])
        };
        let to_tensor = |elements: Vec<E::Real>, shape: &[usize]| {
            let elements: Vec<E> = elements.into_iter().map(E::from_real).collect();
            B::float_from_data(TensorData::new(elements, shape), &Default::default())
        };
        let bias_dims = inputs.bias.shape();
        [
            Some(heads(
                computed.query,
                sizes.query_length,
                sizes.n_heads,
                sizes.d_head,
            )),
            Some(heads(
                computed.key,
                sizes.key_length,
                sizes.n_kv_heads,
                sizes.d_head,
            )),
            Some(heads(
                computed.value,
                sizes.key_length,
                sizes.n_kv_heads,
                sizes.d_value,
            )),
            with_bias.then(|| to_tensor(computed.bias, &bias_dims)),
            spec.has_sinks
                .then(|| to_tensor(computed.sinks, &[sizes.n_heads])),
        ]
    })
}

impl<B: HostBackend + NativeAttention, C: CheckpointStrategy> NativeAttention for Autodiff<B, C> {
    fn native_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        spec: Arc<Spec>,
    ) -> FloatTensor<Self> {
        let nodes = [
            query.node(),
            key.node(),
            value.node(),
            bias.node(),
            sinks.node(),
        ];
        let inputs = Inputs {
            query: query.into_primitive(),
            key: key.into_primitive(),
            value: value.into_primitive(),
            bias: bias.into_primitive(),
            sinks: sinks.into_primitive(),
        };
        let (output, log_sum_exp) = untracked::<B>(&inputs, &spec);
        match NativeAttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = State {
                    inputs,
                    output: output.clone(),
                    log_sum_exp,
                    spec,
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}
