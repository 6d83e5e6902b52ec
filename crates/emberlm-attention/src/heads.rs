//! What the attention modules share: splitting a width into heads, attending, and joining the heads again.

use burn::{nn::Linear, tensor::Tensor};
use emberlm_core::{Context, InvalidConfig, Pattern, operators::project};

use crate::{AttendOptions, ScoreCap, attend};

/// What a module's config says of its scores.
#[derive(Debug, Clone)]
pub(crate) struct Scores {
    pub(crate) pattern: Pattern,
    pub(crate) dropout: f64,
    pub(crate) scale: Option<f64>,
    pub(crate) cap: ScoreCap,
    pub(crate) alibi: Option<Vec<f64>>,
}

impl Scores {
    pub(crate) fn validate(&self, n_heads: usize) -> Result<(), InvalidConfig> {
        self.pattern
            .validate()
            .map_err(|source| InvalidConfig::Pattern {
                field: "pattern",
                source,
            })?;
        self.cap.validate()?;
        self.validate_alibi(n_heads)?;
        let scale = self.scale.unwrap_or(1.0);
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(InvalidConfig::Range {
                field: "scale",
                range: "above 0 and finite",
                value: scale,
            });
        }
        InvalidConfig::require_rate("dropout", self.dropout)
    }

    fn validate_alibi(&self, n_heads: usize) -> Result<(), InvalidConfig> {
        let Some(slopes) = &self.alibi else {
            return Ok(());
        };
        let refused = |range, value| {
            Err(InvalidConfig::Range {
                field: "alibi",
                range,
                value,
            })
        };
        if slopes.len() != n_heads {
            return refused("one slope a head", slopes.len() as f64);
        }
        match slopes.iter().find(|slope| !slope.is_finite()) {
            Some(slope) => refused("finite", *slope),
            None => Ok(()),
        }
    }

    /// Attends with every head and projects the joined heads.
    ///
    /// # Panics
    ///
    /// If the pattern, or the context's bias, does not fit the lengths.
    pub(crate) fn attend(
        &self,
        heads: [Tensor<4>; 3],
        output: &Linear,
        context: &Context,
    ) -> Tensor<3> {
        project(output, merge_heads(self.attend_heads(heads, context)))
    }

    /// The weights of the keys, `[batch_size, n_heads, query_length, key_length]`: what attention makes of values that
    /// are the rows of the identity.
    ///
    /// # Panics
    ///
    /// As [`attend`](Self::attend).
    pub(crate) fn weights(&self, query: Tensor<4>, key: Tensor<4>, context: &Context) -> Tensor<4> {
        let [batch_size, n_kv_heads, key_length, _] = key.dims();
        let identity = Tensor::<2>::eye(key_length, &key.device()).cast(key.dtype());
        let value = identity.expand([batch_size, n_kv_heads, key_length, key_length]);
        self.attend_heads([query, key, value], context)
    }

    fn attend_heads(&self, [query, key, value]: [Tensor<4>; 3], context: &Context) -> Tensor<4> {
        let [_, n_heads, ..] = query.dims();
        let schedule = match context.schedule(&self.pattern, n_heads) {
            Ok(schedule) => schedule,
            Err(error) => panic!("pattern: {error}"),
        };
        let options = AttendOptions {
            scale: self.scale,
            cap: self.cap,
            alibi: self.alibi.clone(),
            bias: context.bias.clone(),
            dropout: self.dropout,
            dropout_key: context.dropout_key,
            ..AttendOptions::default()
        };
        attend(query, key, value, &schedule, &options)
    }
}

/// `[batch_size, seq_length, n_heads * d_head]` to `[batch_size, n_heads, seq_length, d_head]`.
pub(crate) fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch_size, seq_length, width] = x.dims();
    x.reshape([batch_size, seq_length, n_heads, width / n_heads])
        .swap_dims(1, 2)
}

/// `[batch_size, n_heads, seq_length, d_head]` to `[batch_size, seq_length, n_heads * d_head]`.
fn merge_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch_size, n_heads, seq_length, d_head] = x.dims();
    x.swap_dims(1, 2)
        .reshape([batch_size, seq_length, n_heads * d_head])
}
