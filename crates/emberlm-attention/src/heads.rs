//! What the attention modules share: splitting a width into heads, attending, and joining the heads again.

use burn::{
    nn::Linear,
    tensor::{DType, Device, Tensor, TensorData},
};
use emberlm_core::{
    CachePositions, CacheSlots, Context, InvalidConfig, KvCache, Pattern, RingError,
    operators::project,
};

use crate::{AttendOptions, ScoreCap, attend, attend_all};

/// What a module's config says of its scores.
#[derive(Debug, Clone)]
pub(crate) struct Scores {
    pub(crate) pattern: Pattern,
    /// Each counts the keys that it allows once more.
    pub(crate) repeats: Vec<Pattern>,
    pub(crate) dropout: f64,
    pub(crate) scale: Option<f64>,
    pub(crate) cap: ScoreCap,
    pub(crate) alibi: Option<Vec<f64>>,
}

impl Scores {
    pub(crate) fn validate(&self, n_heads: usize) -> Result<(), InvalidConfig> {
        let of_field = |field| move |source| InvalidConfig::Pattern { field, source };
        self.pattern.validate().map_err(of_field("pattern"))?;
        for pattern in &self.repeats {
            pattern.validate().map_err(of_field("repeats"))?;
        }
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

    /// Scores and context as the slots of a cache have them, once it has forgotten positions.
    pub(crate) fn in_slots(
        &self,
        context: &Context,
        cache: &KvCache,
        query: &Tensor<4>,
    ) -> (Self, Context) {
        let slots = cache.slots();
        if slots.gap() == 0 {
            return (self.clone(), context.clone());
        }
        let moved = |pattern: &Pattern| pattern.in_slots(slots);
        let scores = Self {
            pattern: moved(&self.pattern),
            repeats: self.repeats.iter().map(moved).collect(),
            ..self.clone()
        };
        let context = context.in_slots(slots);
        let bias = match &self.alibi {
            Some(slopes) if !cache.counts_in_cache() => {
                let (dtype, device) = (query.dtype(), query.device());
                alibi_of_gap(slopes, slots, query.dims()[2], dtype, &device)
            }
            _ => None,
        };
        (scores, context.with_bias(bias))
    }

    /// [`attend`](Self::attend), where the keys and values are all that a cache holds.
    ///
    /// # Panics
    ///
    /// As [`attend`](Self::attend), and if the cache is a ring that was made for another pattern.
    pub(crate) fn attend_cached(
        &self,
        heads: [Tensor<4>; 3],
        output: &Linear,
        context: &Context,
        cache: &KvCache,
    ) -> Tensor<3> {
        let [query, ..] = &heads;
        cache.check_pattern(|| self.visible());
        let (scores, context) = self.in_slots(context, cache, query);
        scores.attend(heads, output, &context)
    }

    /// An empty cache of bounded memory.
    pub(crate) fn new_ring_cache(&self, positions: CachePositions) -> Result<KvCache, RingError> {
        KvCache::ring(&self.visible(), positions)
    }

    /// All that a query sees.
    fn visible(&self) -> Pattern {
        let repeats = self.repeats.iter().cloned();
        repeats.fold(self.pattern.clone(), |all, repeat| all | repeat)
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

    /// Attends with every head.
    ///
    /// # Panics
    ///
    /// As [`attend`](Self::attend).
    pub(crate) fn attend_heads(
        &self,
        [query, key, value]: [Tensor<4>; 3],
        context: &Context,
    ) -> Tensor<4> {
        let [_, n_heads, ..] = query.dims();
        let schedule = |pattern| match context.schedule(pattern, n_heads) {
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
        let first = schedule(&self.pattern);
        if self.repeats.is_empty() {
            return attend(query, key, value, &first, &options);
        }
        let repeats = self.repeats.iter().map(schedule);
        let schedules: Vec<_> = std::iter::once(first).chain(repeats).collect();
        attend_all([query, key, value], &schedules, &options)
    }
}

/// What ALiBi takes from the scores of the positions that were kept before a gap, beyond what their slots say:
/// `[1, n_heads, query_length, n_slots]`. Nothing if none were kept.
fn alibi_of_gap(
    slopes: &[f64],
    slots: &CacheSlots,
    query_length: usize,
    dtype: DType,
    device: &Device,
) -> Option<Tensor<4>> {
    let n_slots = slots.n_slots();
    if slots.kept().is_empty() {
        return None;
    }
    let mut bias = Vec::with_capacity(slopes.len() * n_slots);
    for slope in slopes {
        // A kept position is in the slot of its place among them.
        let nearer = |(slot, position): (usize, &usize)| (slots.gap() + slot - position) as f64;
        let of_kept = slots.kept().iter().enumerate().map(nearer);
        bias.extend(of_kept.map(|distance| -slope * distance));
        bias.resize(bias.len().next_multiple_of(n_slots), 0.0);
    }
    let shape = [1, slopes.len(), 1, n_slots];
    let bias = Tensor::<4>::from_data(TensorData::new(bias, shape), (device, dtype));
    Some(bias.expand([1, slopes.len(), query_length, n_slots]))
}

/// `[batch_size, seq_length, n_heads * d_head]` to `[batch_size, n_heads, seq_length, d_head]`.
pub(crate) fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch_size, seq_length, width] = x.dims();
    x.reshape([batch_size, seq_length, n_heads, width / n_heads])
        .swap_dims(1, 2)
}

/// `[batch_size, n_heads, seq_length, d_head]` to `[batch_size, seq_length, n_heads * d_head]`.
pub(crate) fn merge_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch_size, n_heads, seq_length, d_head] = x.dims();
    x.swap_dims(1, 2)
        .reshape([batch_size, seq_length, n_heads * d_head])
}

/// One pattern where all heads have the same.
pub(crate) fn by_head(all: Vec<Pattern>) -> Pattern {
    match all.split_first() {
        Some((first, rest)) if rest.iter().all(|other| other == first) => first.clone(),
        _ => Pattern::per_head(all),
    }
}
