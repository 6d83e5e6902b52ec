//! AdamW with decay groups, whose saved state can be loaded on any device.

use burn::{
    module::{Module, ModuleVisitor, Param, ParamGroup},
    optim::{
        AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, LearningRate, ModuleOptimizer,
        Optimizer, RecordState, StateSink, StateSource,
    },
    tensor::{Device, Tensor, TensorData},
};
use emberlm_core::operators::{self, AdamWStep, Implementation};

use crate::TrainingConfig;

/// AdamW for a whole module: decoupled weight decay on the weights of linear layers, none on norms, biases,
/// embeddings and positions.
///
/// Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>; one fused operator on the CPU backends, elsewhere Burn's own
/// update, which is the same.
pub fn adamw<M: Module>(config: &TrainingConfig, module: &M) -> ModuleOptimizer {
    let build = |weight_decay: f64| ResumableAdamW {
        adamw: AdamWConfig::new()
            .with_beta_1(config.beta_1 as f32)
            .with_beta_2(config.beta_2 as f32)
            .with_epsilon(config.epsilon as f32)
            .with_weight_decay(weight_decay as f32)
            .build(),
        step: AdamWStep {
            learning_rate: 0.0,
            beta_1: config.beta_1,
            beta_2: config.beta_2,
            epsilon: config.epsilon,
            weight_decay,
            time: 0,
        },
    };
    let mut decayed = DecayedPaths::default();
    module.visit(&mut decayed);
    ModuleOptimizer::from(build(0.0)).with_group(
        ParamGroup::from_paths(decayed.paths),
        build(config.weight_decay),
        None,
    )
}

/// Paths of the matrices outside embeddings and position tables.
#[derive(Default)]
struct DecayedPaths {
    path: Vec<String>,
    containers: Vec<String>,
    paths: Vec<String>,
}

impl ModuleVisitor for DecayedPaths {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push(name.to_owned());
        self.containers.push(container_type.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        let is_table = self
            .containers
            .iter()
            .any(|container| container.contains("Embedding") || container.contains("Positions"));
        if D >= 2 && !is_table {
            self.paths.push(self.path.join("."));
        }
    }
}

/// AdamW with a state that stays off the devices until its parameter is updated.
///
/// Burn loads optimizer state on `Device::default()`, which is a GPU wherever one is compiled in, whether the
/// machine has it or not. Here loaded moments are plain data until the first step puts them where the parameter is.
#[derive(Clone)]
struct ResumableAdamW {
    adamw: AdamW,
    /// The same numbers; the learning rate and the time are those of each step.
    step: AdamWStep,
}

#[derive(Clone)]
enum ResumableState<const D: usize> {
    Live(Box<AdamWState<D>>),
    Stored(Box<Moments>),
}

#[derive(Clone)]
struct Moments {
    time: usize,
    moment_1: TensorData,
    moment_2: TensorData,
}

impl ResumableAdamW {
    /// Burn's step as one operator, on the CPU backends.
    fn fused_step<const D: usize>(
        &self,
        learning_rate: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> (Tensor<D>, AdamWState<D>) {
        let (time, moments) = match state {
            Some(AdamWState { momentum }) => {
                (momentum.time, Some([momentum.moment_1, momentum.moment_2]))
            }
            None => (0, None),
        };
        let step = AdamWStep {
            learning_rate,
            time: time + 1,
            ..self.step
        };
        let (tensor, [moment_1, moment_2]) = operators::adamw(&step, tensor, grad, moments);
        let momentum = AdaptiveMomentumState::new(step.time, moment_1, moment_2);
        (tensor, AdamWState::new(momentum))
    }
}

impl Optimizer for ResumableAdamW {
    type State<const D: usize> = ResumableState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let state = state.map(|state| match state {
            ResumableState::Live(state) => *state,
            ResumableState::Stored(stored) => {
                let load = |data: TensorData| {
                    let dtype = data.dtype();
                    Tensor::from_data(data, (&tensor.device(), dtype))
                };
                AdamWState::new(AdaptiveMomentumState::new(
                    stored.time,
                    load(stored.moment_1),
                    load(stored.moment_2),
                ))
            }
        });
        let (tensor, state) = match Implementation::of(&tensor.device()) {
            Implementation::Native => self.fused_step(lr, tensor, grad, state),
            _ => {
                let (tensor, state) = self.adamw.step(lr, tensor, grad, state);
                (tensor, state.expect("Burn's AdamW has a state"))
            }
        };
        (tensor, Some(ResumableState::Live(Box::new(state))))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        match state {
            ResumableState::Live(state) => {
                let state = <AdamW as Optimizer>::to_device(*state, device);
                ResumableState::Live(Box::new(state))
            }
            stored @ ResumableState::Stored(_) => stored,
        }
    }
}

const TIME: &str = "time";
const MOMENT_1: &str = "moment_1";
const MOMENT_2: &str = "moment_2";

impl<const D: usize> RecordState for ResumableState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        let moments = match self {
            Self::Stored(moments) => (**moments).clone(),
            Self::Live(state) => Moments {
                time: state.momentum.time,
                moment_1: state.momentum.moment_1.to_data(),
                moment_2: state.momentum.moment_2.to_data(),
            },
        };
        out.push_scalar(prefix, TIME, moments.time.into());
        out.push_tensor(prefix, MOMENT_1, moments.moment_1);
        out.push_tensor(prefix, MOMENT_2, moments.moment_2);
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _device: &Device) -> Option<Self> {
        Some(Self::Stored(Box::new(Moments {
            time: src.take_scalar(prefix, TIME)?.try_into().ok()?,
            moment_1: src.take_tensor(prefix, MOMENT_1)?,
            moment_2: src.take_tensor(prefix, MOMENT_2)?,
        })))
    }
}
