//! The residual block: a mixer and a feed-forward layer, each behind a norm and a shortcut.

use burn::{
    config::Config,
    module::Module,
    tensor::{Device, Tensor},
};

use crate::{
    Context, CrossMixer, FeedForward, InvalidConfig, LayerRouting, NoCross, Norm, NormConfig,
    RandomKey, SequenceMixer, operators::add_dropped,
};

/// Where the norm stands.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// `x + f(norm(x))`: GPT-2 and most models since.
    Pre,
    /// `norm(x + f(x))`: the original Transformer and BERT.
    Post,
}

/// Configuration of a [`ResidualBlock`].
#[derive(Config, Debug)]
pub struct ResidualBlockConfig {
    /// Width of the model.
    pub d_model: usize,
    /// The norm of both halves. Default: layer norm with bias, epsilon 1e-5.
    #[config(default = "NormConfig::Layer { epsilon: 1e-5, bias: true }")]
    pub norm: NormConfig,
    /// Where the norms stand. Default: before.
    #[config(default = "NormPlacement::Pre")]
    pub placement: NormPlacement,
    /// Dropout on the output of each half, before the addition. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl ResidualBlockConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// A width of zero, an epsilon that is not positive, or a dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("d_model", self.d_model)])?;
        self.norm.validate()?;
        InvalidConfig::require_rate("dropout", self.dropout)
    }

    /// Puts a mixer and a feed-forward layer into a block.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init<M, F>(&self, mixer: M, feed_forward: F, device: &Device) -> ResidualBlock<M, F>
    where
        M: Module + SequenceMixer,
        F: Module + FeedForward,
    {
        self.init_with_cross(mixer, None, feed_forward, device)
    }

    /// As [`init`](Self::init), with a cross mixer between the two, behind a norm and a shortcut of its own, if there is one.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init_with_cross<M, F, C>(
        &self,
        mixer: M,
        cross: Option<C>,
        feed_forward: F,
        device: &Device,
    ) -> ResidualBlock<M, F, C>
    where
        M: Module + SequenceMixer,
        F: Module + FeedForward,
        C: Module + CrossMixer,
    {
        crate::assert_valid(self.validate());
        let norm = || self.norm.init(self.d_model, device);
        ResidualBlock {
            mixer_norm: norm(),
            mixer,
            cross_norm: cross.as_ref().map(|_| norm()),
            cross,
            feed_forward_norm: norm(),
            feed_forward,
            placement: self.placement,
            dropout: self.dropout,
        }
    }
}

/// A residual block over any mixer and any feed-forward layer, and over a cross mixer between them if it is a decoder's
/// that reads an encoder.
///
/// Pre-norm: `h = x + mixer(norm(x))`, `y = h + feed_forward(norm(h))`. Post-norm: `h = norm(x + mixer(x))`,
/// `y = norm(h + feed_forward(h))`. The cross mixer's part has the same form. See Xiong et al. 2020,
/// <https://arxiv.org/abs/2002.04745>.
#[derive(Module, Debug)]
pub struct ResidualBlock<M: Module, F: Module, C: Module = NoCross> {
    /// Norm of the mixer's half.
    pub mixer_norm: Norm,
    /// Mixes along the sequence.
    pub mixer: M,
    /// Norm of the cross mixer's part.
    pub cross_norm: Option<Norm>,
    /// Mixes another sequence in.
    pub cross: Option<C>,
    /// Norm of the feed-forward half.
    pub feed_forward_norm: Norm,
    /// Transforms each position.
    pub feed_forward: F,
    #[module(skip)]
    placement: NormPlacement,
    dropout: f64,
}

// Parts of a block's random key.
const MIXER: u64 = 0;
const MIXER_OUTPUT: u64 = 1;
const FEED_FORWARD: u64 = 2;
const FEED_FORWARD_OUTPUT: u64 = 3;
const CROSS: u64 = 4;
const CROSS_OUTPUT: u64 = 5;

/// What a block's cross mixer reads, and the lengths and batch data of its pass. The random key is the block's.
#[derive(Debug)]
pub struct CrossInput<'a, S> {
    /// The projected source.
    pub source: &'a S,
    /// Lengths of the target and of the source, padding of the source.
    pub context: &'a Context,
}

impl<M, F, C> ResidualBlock<M, F, C>
where
    M: Module + SequenceMixer,
    F: Module + FeedForward,
    C: Module + CrossMixer,
{
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    pub fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        self.forward_stream(ResidualStream::new(x), context, None)
            .into_sum()
    }

    /// The next positions of a sequence whose earlier part is in the cache.
    pub fn forward_cached(
        &self,
        x: Tensor<3>,
        context: &Context,
        cache: &mut M::Cache,
    ) -> Tensor<3> {
        self.forward_stream_cached(ResidualStream::new(x), context, None, cache)
            .into_sum()
    }

    /// As [`forward`](Self::forward), for a stack: the last addition is left to the norm that follows.
    ///
    /// # Panics
    ///
    /// If there is a cross mixer and nothing for it, or the other way round.
    pub fn forward_stream(
        &self,
        stream: ResidualStream,
        context: &Context,
        cross: Option<CrossInput<'_, C::Source>>,
    ) -> ResidualStream {
        let mix = |x, context: &Context| self.mixer.forward(x, context);
        self.all_parts(stream, context, cross, mix)
    }

    /// As [`forward_cached`](Self::forward_cached), for a stack.
    ///
    /// # Panics
    ///
    /// As [`forward_stream`](Self::forward_stream).
    pub fn forward_stream_cached(
        &self,
        stream: ResidualStream,
        context: &Context,
        cross: Option<CrossInput<'_, C::Source>>,
        cache: &mut M::Cache,
    ) -> ResidualStream {
        let mix = |x, context: &Context| self.mixer.forward_cached(x, context, cache);
        self.all_parts(stream, context, cross, mix)
    }

    /// What the cross mixer reads of a block's input: what the mixer made of it, behind the norm if that stands before.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If the block has no cross mixer.
    pub fn cross_input(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let norm = self.cross_norm.as_ref();
        let norm = norm.expect("cross: the block has no cross mixer");
        let stream = self.mixer_part(ResidualStream::new(x), context, |x, context| {
            self.mixer.forward(x, context)
        });
        match self.placement {
            NormPlacement::Pre => stream.norm(norm).1,
            NormPlacement::Post => stream.into_sum(),
        }
    }

    fn mixer_part(
        &self,
        stream: ResidualStream,
        context: &Context,
        mix: impl FnOnce(Tensor<3>, &Context) -> Tensor<3>,
    ) -> ResidualStream {
        let context_out = context.fold(MIXER_OUTPUT);
        self.part(stream, &self.mixer_norm, &context_out, |x| {
            mix(x, &context.fold(MIXER))
        })
    }

    fn all_parts(
        &self,
        stream: ResidualStream,
        context: &Context,
        cross: Option<CrossInput<'_, C::Source>>,
        mix: impl FnOnce(Tensor<3>, &Context) -> Tensor<3>,
    ) -> ResidualStream {
        let stream = self.mixer_part(stream, context, mix);
        let stream = self.cross_part(stream, context, cross);
        let context_out = context.fold(FEED_FORWARD_OUTPUT);
        let mut routing = None;
        let stream = self.part(stream, &self.feed_forward_norm, &context_out, |x| {
            let context = context.fold(FEED_FORWARD);
            let output = self.feed_forward.forward(x, &context);
            routing = output.routed.map(|routed| LayerRouting {
                layer: 0,
                losses: output.losses,
                choices: routed.choices,
                statistics: routed.statistics,
            });
            output.hidden
        });
        stream.with_routing(routing)
    }

    fn cross_part(
        &self,
        stream: ResidualStream,
        context: &Context,
        input: Option<CrossInput<'_, C::Source>>,
    ) -> ResidualStream {
        match (&self.cross, &self.cross_norm, input) {
            (
                Some(cross),
                Some(norm),
                Some(CrossInput {
                    source,
                    context: own,
                }),
            ) => {
                let key = context.fold(CROSS).dropout_key;
                let own = own.clone().with_dropout_key(key);
                self.part(stream, norm, &context.fold(CROSS_OUTPUT), |x| {
                    cross.forward_cross(x, source, &own)
                })
            }
            (None, None, None) => stream,
            (Some(_), ..) => {
                panic!("source: the block has a cross mixer, and nothing is given for it to read")
            }
            _ => panic!("source: the block has no cross mixer that could read it"),
        }
    }

    fn part(
        &self,
        stream: ResidualStream,
        norm: &Norm,
        context: &Context,
        f: impl FnOnce(Tensor<3>) -> Tensor<3>,
    ) -> ResidualStream {
        let mut stream = stream;
        let routing = stream.take_routing();
        let stream = match self.placement {
            NormPlacement::Pre => {
                let (x, normed) = stream.norm(norm);
                ResidualStream::new(x).add(f(normed), self.dropout, context.dropout_key)
            }
            NormPlacement::Post => {
                let x = stream.into_sum();
                let sum = ResidualStream::new(x.clone());
                let sum = sum.add(f(x), self.dropout, context.dropout_key);
                ResidualStream::new(sum.norm(norm).1)
            }
        };
        stream.with_routing(routing)
    }
}

/// What runs through a stack of blocks: a sum whose last addition waits, so that it is computed in one pass with the
/// norm that follows it.
#[derive(Debug, Clone)]
pub struct ResidualStream {
    x: Tensor<3>,
    waiting: Option<Tensor<3>>,
    routing: Vec<LayerRouting>,
}

impl ResidualStream {
    /// A stream that begins with the embeddings, `[batch_size, seq_length, d_model]`.
    pub fn new(x: Tensor<3>) -> Self {
        Self {
            x,
            waiting: None,
            routing: Vec::new(),
        }
    }

    /// What the blocks so far have routed, of which nothing is left here.
    pub fn take_routing(&mut self) -> Vec<LayerRouting> {
        std::mem::take(&mut self.routing)
    }

    fn with_routing(mut self, routing: impl IntoIterator<Item = LayerRouting>) -> Self {
        self.routing.extend(routing);
        self
    }

    /// Adds `dropout(y)`.
    fn add(self, y: Tensor<3>, rate: f64, key: Option<RandomKey>) -> Self {
        let x = self.into_sum();
        if key.is_some() && rate > 0.0 {
            return Self::new(add_dropped(x, y, rate, key));
        }
        Self {
            x,
            waiting: Some(y),
            routing: Vec::new(),
        }
    }

    /// The sum and its norm.
    pub fn norm(self, norm: &Norm) -> (Tensor<3>, Tensor<3>) {
        match self.waiting {
            Some(y) => norm.add_and_forward(self.x, y),
            None => (self.x.clone(), norm.forward(self.x)),
        }
    }

    /// The sum.
    pub fn into_sum(self) -> Tensor<3> {
        match self.waiting {
            Some(y) => self.x + y,
            None => self.x,
        }
    }
}
