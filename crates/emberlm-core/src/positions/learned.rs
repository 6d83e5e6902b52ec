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
    /// Rows before that of position 0. OPT and BART have 2. Default: 0.
    #[config(default = 0)]
    pub offset: usize,
}

impl LearnedPositionsConfig {
    /// Makes the table, from N(0, 0.02) as GPT-2 does.
    pub fn init(&self, device: &Device) -> LearnedPositions {
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        LearnedPositions {
            weight: initializer.init([self.offset + self.max_seq_length, self.d_model], device),
            offset: self.offset,
        }
    }
}

/// A learned vector for each absolute position: `x_t + weight[t + offset]`.
///
/// Gehring et al. 2017, <https://arxiv.org/abs/1705.03122>; GPT and BERT without an offset, OPT and BART with 2.
///
/// ```
/// use burn::tensor::Device;
/// use emberlm_core::LearnedPositionsConfig;
///
/// let positions = LearnedPositionsConfig::new(16, 4).with_offset(2).init(&Device::flex());
/// assert_eq!(positions.weight.dims(), [18, 4]);
/// assert_eq!(positions.forward(3, 5).dims(), [1, 5, 4]);
/// ```
#[derive(Module, Debug)]
pub struct LearnedPositions {
    /// `[offset + max_seq_length, d_model]`
    pub weight: Param<Tensor<2>>,
    offset: usize,
}

impl LearnedPositions {
    /// Number of positions.
    pub fn max_seq_length(&self) -> usize {
        self.weight.lazy_shape()[0] - self.offset
    }

    /// The row of [`weight`](Self::weight) that a position reads.
    pub fn row(&self, position: usize) -> usize {
        position + self.offset
    }

    /// The vectors of positions `first_position ..`, shape `[1, seq_length, d_model]`.
    ///
    /// # Panics
    ///
    /// If the table has no such position.
    pub fn forward(&self, first_position: usize, seq_length: usize) -> Tensor<3> {
        let weight = self.weight.val();
        let max_seq_length = self.max_seq_length();
        let end = first_position + seq_length;
        assert!(
            end <= max_seq_length,
            "sequence length: position {end} is past the {max_seq_length} learned ones"
        );
        let rows = self.row(first_position)..self.row(end);
        weight.slice(s![rows, ..]).unsqueeze()
    }
}
