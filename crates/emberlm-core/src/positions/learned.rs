//! Learned absolute positions.

use burn::{
    config::Config,
    module::{Module, Param},
    nn::Initializer,
    tensor::{Device, Tensor, s},
};

/// Configuration of [`LearnedPositions`].
#[derive(Config, Debug)]
pub struct LearnedPositionsConfig {
    /// Number of positions.
    pub max_seq_length: usize,
    /// Width of the model.
    pub d_model: usize,
}

impl LearnedPositionsConfig {
    /// Makes the table, from N(0, 0.02) as GPT-2 does.
    pub fn init(&self, device: &Device) -> LearnedPositions {
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        LearnedPositions {
            weight: initializer.init([self.max_seq_length, self.d_model], device),
        }
    }
}

/// A learned vector for each absolute position: `x_t + weight[t]`.
///
/// Gehring et al. 2017, <https://arxiv.org/abs/1705.03122>; GPT and BERT.
#[derive(Module, Debug)]
pub struct LearnedPositions {
    /// `[max_seq_length, d_model]`
    pub weight: Param<Tensor<2>>,
}

impl LearnedPositions {
    /// The vectors of positions `first_position ..`, shape `[1, seq_length, d_model]`.
    ///
    /// # Panics
    ///
    /// If the table has no such position.
    pub fn forward(&self, first_position: usize, seq_length: usize) -> Tensor<3> {
        let weight = self.weight.val();
        let [max_seq_length, _] = weight.dims();
        let end = first_position + seq_length;
        assert!(
            end <= max_seq_length,
            "sequence length: position {end} is past the {max_seq_length} learned ones"
        );
        weight.slice(s![first_position..end, ..]).unsqueeze()
    }
}
