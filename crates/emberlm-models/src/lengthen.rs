//! A long encoder from a short one that is trained already.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Tensor, s},
};
use emberlm_core::LearnedPositions;

use crate::{Encoder, EncoderConfig, Mixer};

impl Encoder {
    /// A model of `config` with the weights of this one, to be trained on with longer sequences or with sparse attention.
    ///
    /// As Longformer was made of RoBERTa: Beltagy et al. 2020, section 5, <https://arxiv.org/abs/2004.05150>. Learned
    /// positions are repeated one after the other until there are as many as `config` says; the projections of global
    /// tokens begin as copies of those that all tokens have. A pattern has no weights.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use emberlm_core::{Global, Window};
    /// use emberlm_models::{EncoderConfig, LayerAttention, PositionsConfig};
    ///
    /// let device = Device::flex();
    /// let positions = |max_seq_length| PositionsConfig::Learned { max_seq_length };
    /// let config = EncoderConfig::new(256, 2, 32, 4).with_positions(positions(64));
    /// let short = config.init(&device);
    /// let layer = LayerAttention::Longformer {
    ///     window: Window::one_sided(16),
    ///     dilations: None,
    ///     global: Global::First(1),
    ///     causal: false,
    /// };
    /// let config = config.with_positions(positions(256)).with_layers(Some(vec![layer; 2]));
    /// let long = short.lengthened(&config, &device);
    /// assert_eq!(long.embedding.max_seq_length(), Some(256));
    /// ```
    ///
    /// # Panics
    ///
    /// If `config` is invalid, or is of a model that differs in more than its attention and its number of positions.
    pub fn lengthened(&self, config: &EncoderConfig, device: &Device) -> Self {
        let mut long = config.init(device);
        let same = |what, ours: usize, theirs: usize| {
            assert!(
                ours == theirs,
                "{what}: {theirs} in the short model, {ours} in the long one"
            );
        };
        let [vocab_size, d_model] = long.embedding.tokens.weight.dims();
        let [short_vocab_size, short_d_model] = self.embedding.tokens.weight.dims();
        same("vocab_size", vocab_size, short_vocab_size);
        same("d_model", d_model, short_d_model);
        same("n_layers", long.stack.blocks.len(), self.stack.blocks.len());
        if let (Some(long), Some(short)) =
            (&mut long.embedding.positions, &self.embedding.positions)
        {
            long.weight = repeated(short, long);
        }
        let short = self.clone().fork(device);
        long.embedding.tokens = short.embedding.tokens;
        long.embedding.types = short.embedding.types;
        long.embedding.norm = short.embedding.norm;
        long.masked_head = short.masked_head;
        long.pooler = short.pooler;
        long.stack.norm = short.stack.norm;
        long.stack.relative_bias = short.stack.relative_bias;
        for (long, short) in long.stack.blocks.iter_mut().zip(short.stack.blocks) {
            long.mixer_norm = short.mixer_norm;
            long.feed_forward_norm = short.feed_forward_norm;
            long.feed_forward = short.feed_forward;
            give(&mut long.mixer, short.mixer);
        }
        assert_eq!(
            long.num_params() - long.n_new(),
            self.num_params() - self.n_new(),
            "parameters beside positions and global projections"
        );
        long
    }

    /// Parameters that a longer model may have more of.
    fn n_new(&self) -> usize {
        let positions = self.embedding.positions.as_ref();
        let of_positions = positions.map_or(0, LearnedPositions::num_params);
        let of_global = self.stack.blocks.iter().map(|block| match &block.mixer {
            Mixer::Longformer(attention) => {
                let global = [
                    &attention.global_query,
                    &attention.global_key,
                    &attention.global_value,
                ];
                global.into_iter().map(Linear::num_params).sum()
            }
            Mixer::MultiHead(_) | Mixer::GroupedQuery(_) => 0,
        });
        of_positions + of_global.sum::<usize>()
    }
}

/// The rows of a table of positions, as often as they fit.
fn repeated(short: &LearnedPositions, long: &LearnedPositions) -> Param<Tensor<2>> {
    let (table, offset) = (short.weight.val(), short.row(0));
    assert_eq!(offset, long.row(0), "offset: rows before position 0");
    let (n_short, n_long) = (short.max_seq_length(), long.max_seq_length());
    let before = table.clone().slice(s![0..offset, ..]);
    let rows = table
        .slice(s![offset.., ..])
        .repeat_dim(0, n_long.div_ceil(n_short));
    let rows = rows.slice(s![0..n_long, ..]);
    let table = match offset {
        0 => rows,
        _ => Tensor::cat(vec![before, rows], 0),
    };
    Param::from_tensor(table.detach())
}

/// Hands the projections of a mixer to another; those of global tokens begin as copies where they are new.
fn give(long: &mut Mixer, short: Mixer) {
    if let Mixer::Longformer(long) = long {
        let global = match &short {
            Mixer::Longformer(short) => {
                [&short.global_query, &short.global_key, &short.global_value].map(Linear::clone)
            }
            Mixer::MultiHead(_) | Mixer::GroupedQuery(_) => {
                let [query, key, value, _] = short.projections();
                [query, key, value].map(copied)
            }
        };
        [long.global_query, long.global_key, long.global_value] = global;
    }
    let projections = short.projections().map(Linear::clone);
    for (place, projection) in long.projections_mut().into_iter().zip(projections) {
        *place = projection;
    }
}

/// The same values as parameters of their own.
fn copied(linear: &Linear) -> Linear {
    Linear {
        weight: Param::from_tensor(linear.weight.val().detach()),
        bias: (linear.bias.as_ref()).map(|bias| Param::from_tensor(bias.val().detach())),
    }
}
