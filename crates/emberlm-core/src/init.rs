//! Initialisation of whole models, the same on every backend.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, TensorData},
};

use crate::RandomKey;

/// Draws every weight from N(0, 0.02), and those that write into the residual stream from
/// N(0, 0.02 / sqrt(2 n_layers)); sets every bias to zero and leaves the scales of norms at one.
///
/// Radford et al. 2019 (GPT-2), section 2.3: "we scale the weights of residual layers at initialization by a
/// factor of 1/sqrt(N) where N is the number of residual layers", of which each block has two. The projections that
/// write into the residual stream are those named `output` (attention) and `down` (feed-forward).
///
/// Each parameter's values are a function of the seed and of its path alone, so they do not depend on the backend
/// or on the order of construction.
#[derive(Debug, Clone)]
pub struct Gpt2Init {
    /// Standard deviation. GPT-2: 0.02.
    pub std: f64,
    /// Number of blocks.
    pub n_layers: usize,
    /// Where the random numbers come from.
    pub key: RandomKey,
}

impl Gpt2Init {
    /// GPT-2's standard deviation for a stack of `n_layers` blocks.
    pub fn new(n_layers: usize, seed: u64) -> Self {
        Self {
            std: 0.02,
            n_layers,
            key: RandomKey::new(seed),
        }
    }

    /// Initialises all parameters of a module.
    pub fn apply<M: Module>(&self, module: M) -> M {
        let in_residual = self.std / (2.0 * self.n_layers as f64).sqrt();
        initialise(module, &self.key, |path, _| {
            let module = path.iter().rev().nth(1).map(String::as_str);
            let std = match module {
                Some("output" | "down") => in_residual,
                _ => self.std,
            };
            Box::new(move |key, i| key.normal(i) * std)
        })
    }
}

/// Draws every weight of a linear layer from the uniform distribution on `[-a, a]`, `a = sqrt(6 / (d_input + d_output))`,
/// and those of embeddings from N(0, 1/sqrt(width)); sets every bias to zero and leaves the scales of norms at one.
///
/// Glorot and Bengio 2010, <https://proceedings.mlr.press/v9/glorot10a.html>, equation 16, and tensor2tensor's
/// Transformer: there the embeddings, which are multiplied by `sqrt(width)` when they are looked up, have unit variance.
/// The tables of embeddings are the weights below modules named `tokens`, `positions` and `types`.
///
/// Each parameter's values are a function of the seed and of its path alone.
#[derive(Debug, Clone)]
pub struct XavierInit {
    /// Where the random numbers come from.
    pub key: RandomKey,
}

impl XavierInit {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            key: RandomKey::new(seed),
        }
    }

    /// Initialises all parameters of a module.
    pub fn apply<M: Module>(&self, module: M) -> M {
        initialise(module, &self.key, |path, shape| {
            if path
                .iter()
                .rev()
                .nth(1)
                .is_some_and(|module| TABLES.contains(&module.as_str()))
            {
                let std = (shape[1] as f64).powf(-0.5);
                Box::new(move |key, i| key.normal(i) * std)
            } else {
                // The weights of experts are stacked along a first axis.
                let [d_input, d_output] = [2, 1].map(|back| shape[shape.len() - back]);
                let bound = (6.0 / (d_input + d_output) as f64).sqrt();
                Box::new(move |key, i| (key.uniform(i) * 2.0 - 1.0) * bound)
            }
        })
    }
}

/// Draws every weight from a normal distribution of the variance `scale / d_input`, of which what is beyond two standard
/// deviations is drawn again; sets every bias to zero and leaves the scales of norms at one.
///
/// Fedus et al. 2021 (Switch Transformer), <https://arxiv.org/abs/2101.03961>, section 2.4: `scale` 0.1, a tenth of the
/// Transformer's, makes the training of experts stable.
///
/// Each parameter's values are a function of the seed and of its path alone.
#[derive(Debug, Clone)]
pub struct SwitchInit {
    /// Variance times the inner width. Switch Transformer: 0.1.
    pub scale: f64,
    /// Where the random numbers come from.
    pub key: RandomKey,
}

impl SwitchInit {
    /// The scale 0.1, from a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            scale: 0.1,
            key: RandomKey::new(seed),
        }
    }

    /// Initialises all parameters of a module.
    pub fn apply<M: Module>(&self, module: M) -> M {
        initialise(module, &self.key, |_, shape| {
            // The weights of experts are stacked along a first axis.
            let d_input = shape[shape.len().saturating_sub(2)];
            let std = (self.scale / d_input as f64).sqrt();
            Box::new(move |key, i| {
                let again = (0..).map(|attempt| key.fold(attempt).normal(i));
                let mut near = again.filter(|x| x.abs() <= 2.0);
                near.next().expect("it is drawn until it is near") * std
            })
        })
    }
}

const TABLES: [&str; 3] = ["tokens", "positions", "types"];

/// The `i`-th number of a weight.
type Draw = Box<dyn Fn(&RandomKey, u64) -> f64>;

/// Draws the weights as `draw` says of their paths and shapes, sets biases to zero and leaves all else.
fn initialise<M: Module>(
    module: M,
    key: &RandomKey,
    draw: impl Fn(&[String], &[usize]) -> Draw,
) -> M {
    module.map(&mut Mapper {
        key,
        draw,
        path: Vec::new(),
    })
}

struct Mapper<'a, D> {
    key: &'a RandomKey,
    draw: D,
    path: Vec<String>,
}

impl<D: Fn(&[String], &[usize]) -> Draw> ModuleMapper for Mapper<'_, D> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const N: usize>(&mut self, param: Param<Tensor<N>>) -> Param<Tensor<N>> {
        let shape = param.lazy_shape();
        let n_elements = shape.num_elements();
        let data = match self.path.last().map(String::as_str) {
            Some("weight") => {
                let draw = (self.draw)(&self.path, &shape.dims::<N>());
                let key = self.key.fold_str(&self.path.join("."));
                let values: Vec<f32> = (0..n_elements as u64)
                    .map(|i| draw(&key, i) as f32)
                    .collect();
                TensorData::new(values, shape)
            }
            Some("bias") => TensorData::new(vec![0f32; n_elements], shape),
            _ => return param,
        };
        let device = param.lazy_device();
        let id = param.id;
        param.transform_for_load(Tensor::from_data(data, (&device, DType::F32)), id)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::FeedForwardConfig;

    #[test]
    fn weights_have_the_stated_deviation_and_depend_on_path_and_seed_only() {
        let device = Device::flex();
        let layer = || FeedForwardConfig::new(64, 128).init(&device);
        let a = Gpt2Init::new(8, 1).apply(layer());
        let b = Gpt2Init::new(8, 1).apply(layer());
        let c = Gpt2Init::new(8, 2).apply(layer());
        assert_eq!(a.up.weight.to_data(), b.up.weight.to_data());
        assert_ne!(a.up.weight.to_data(), c.up.weight.to_data());
        let deviation = |tensor: Tensor<2>| {
            let values: Vec<f32> = tensor.to_data().iter::<f32>().collect();
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
            let variance = values
                .iter()
                .map(|v| (f64::from(*v) - mean).powi(2))
                .sum::<f64>()
                / values.len() as f64;
            variance.sqrt()
        };
        // 8,192 draws: the deviation's own relative error is 0.8 %; three of those.
        assert!((deviation(a.up.weight.val()) / 0.02 - 1.0).abs() < 0.024);
        assert!((deviation(a.down.weight.val()) / (0.02 / 4.0) - 1.0).abs() < 0.024);
        let bias: Vec<f32> =
            a.up.bias
                .expect("has a bias")
                .to_data()
                .iter::<f32>()
                .collect();
        assert!(bias.iter().all(|b| *b == 0.0));
    }

    #[test]
    fn switch_is_truncated() {
        let layer = FeedForwardConfig::new(64, 128).init(&Device::flex());
        let layer = SwitchInit::new(1).apply(layer);
        let std = (0.1f64 / 64.0).sqrt();
        let values: Vec<f32> = layer.up.weight.to_data().iter::<f32>().collect();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(f64::from(largest) <= 2.0 * std && f64::from(largest) > 1.98 * std);
        // The variance of a standard normal number that is below 2 in size is 0.7737; 8,192 draws.
        let squares = values.iter().map(|x| f64::from(*x).powi(2));
        let variance = squares.sum::<f64>() / values.len() as f64;
        assert!(
            (variance / (0.7737 * std * std) - 1.0).abs() < 0.04,
            "{variance}"
        );
    }

    #[test]
    fn xavier_is_uniform_up_to_its_bound() {
        let layer = FeedForwardConfig::new(64, 128).init(&Device::flex());
        let layer = XavierInit::new(1).apply(layer);
        let bound = (6.0f32 / (64.0 + 128.0)).sqrt();
        let values: Vec<f32> = layer.up.weight.to_data().iter::<f32>().collect();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(largest <= bound && largest > 0.99 * bound);
        // A uniform distribution's variance is a third of its bound's square; 8,192 draws, three standard errors.
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.03);
    }
}
