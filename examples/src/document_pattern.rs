//! Attention patterns for long inputs, by name.

use std::fmt;

use clap::ValueEnum;
use emberlm::{
    attention::{BigBirdAttentionConfig, RandomPlan, SparseTransformerAttentionConfig},
    core::{Global, Pattern, Window},
    models::LayerAttention,
};
use serde::{Deserialize, Serialize};

/// How a model for long inputs attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DocumentPattern {
    /// All tokens see all
    Full,
    /// A token sees 128 to each side
    Window,
    /// The same window, and global tokens with projections of their own: the first and every 512th
    Longformer,
    /// BigBird: blocks of 64, of which a token sees three around it, global ones and three random ones
    #[value(name = "bigbird")]
    #[serde(rename = "bigbird")]
    BigBird,
    /// The Sparse Transformer's: the 64 nearest tokens, and every 64th
    Strided,
}

const WINDOW: usize = 128;
const GLOBAL_EVERY: usize = 512;
const BLOCK: usize = 64;
const N_RANDOM: usize = 3;
const STRIDE: usize = 64;

/// The sizes that a pattern depends on.
#[derive(Debug, Clone, Copy)]
pub struct PatternSizes {
    /// Number of blocks of the model.
    pub n_layers: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads.
    pub n_heads: usize,
    /// Tokens of a sequence.
    pub seq_length: usize,
}

impl DocumentPattern {
    /// How each block of a model attends: a decoder where it is causal, else an encoder.
    ///
    /// The strided pattern is causal in the paper. An encoder's is mirrored, so that the first token sees others.
    pub fn layers(self, sizes: &PatternSizes, causal: bool) -> Vec<LayerAttention> {
        (0..sizes.n_layers)
            .map(|layer| self.layer(sizes, causal, layer as u64))
            .collect()
    }

    fn layer(self, sizes: &PatternSizes, causal: bool, layer: u64) -> LayerAttention {
        let window = Window::one_sided(WINDOW);
        match self {
            Self::Full => LayerAttention::pattern(Pattern::full()),
            Self::Window => LayerAttention::pattern(Pattern::window(window)),
            Self::Longformer => {
                let global = (0..sizes.seq_length).step_by(GLOBAL_EVERY);
                LayerAttention::Longformer {
                    window,
                    dilations: None,
                    global: Global::Positions(global.collect()),
                    causal,
                }
            }
            Self::BigBird => {
                let random = RandomPlan::Drawn {
                    n_blocks: N_RANDOM,
                    seed: layer,
                };
                let config =
                    BigBirdAttentionConfig::new(sizes.d_model, sizes.n_heads, BLOCK, random)
                        .with_causal(causal);
                LayerAttention::pattern(config.pattern())
            }
            Self::Strided if causal => {
                let config =
                    SparseTransformerAttentionConfig::new(sizes.d_model, sizes.n_heads, STRIDE);
                LayerAttention::pattern(config.pattern())
            }
            Self::Strided => {
                let column = Window::one_sided(sizes.seq_length.div_ceil(STRIDE));
                LayerAttention::pattern(
                    Pattern::window(Window::one_sided(STRIDE)) | Pattern::dilated(column, STRIDE),
                )
            }
        }
    }
}

impl fmt::Display for DocumentPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("none is skipped");
        f.write_str(value.get_name())
    }
}

#[cfg(test)]
mod tests {
    use emberlm::core::{At, BatchData};

    use super::*;

    const LENGTH: usize = 2000;

    /// The keys that a query of the first head sees in the first block.
    fn seen(pattern: DocumentPattern, causal: bool, query: usize) -> Vec<usize> {
        let sizes = PatternSizes {
            n_layers: 2,
            d_model: 16,
            n_heads: 2,
            seq_length: LENGTH,
        };
        let layer = pattern.layers(&sizes, causal).swap_remove(0);
        let all = match layer {
            LayerAttention::Pattern { pattern, .. } => pattern,
            LayerAttention::Longformer { window, global, .. } => {
                Pattern::window(window) | Pattern::Global(global)
            }
        };
        // As the decoder does with every pattern.
        let all = if causal { Pattern::causal() & all } else { all };
        let visible = |key: &usize| {
            let at = At {
                batch: 0,
                head: 0,
                query,
                key: *key,
                key_length: LENGTH,
            };
            all.allows(&at, &BatchData::new())
        };
        (0..LENGTH).filter(visible).collect()
    }

    #[test]
    fn patterns_show_what_they_say() {
        use DocumentPattern::*;
        let all: Vec<usize> = (0..LENGTH).collect();
        assert_eq!(seen(Full, false, 0), all);
        assert_eq!(seen(Full, true, 700), all[..=700]);
        assert_eq!(seen(Window, false, 700), all[700 - 128..=700 + 128]);
        assert_eq!(seen(Window, true, 700), all[700 - 128..=700]);
        // The first token sees the whole text by one global token, itself.
        assert_eq!(seen(Longformer, false, 0), all);
        let local = |query: usize| query - 128..=query;
        let global = [0, 512].into_iter().chain(local(1000)).collect::<Vec<_>>();
        assert_eq!(seen(Longformer, true, 1000), global);
        assert_eq!(seen(BigBird, false, 0), all);
        let random = seen(BigBird, true, 1000);
        assert!(random.len() <= (1 + 2 + 3) * 64 && random.ends_with(&all[896..=1000]));
        // Every 64th both ways, and the neighbours.
        let column = |query: usize| {
            let near = move |key: &usize| key.abs_diff(query) <= 64;
            let every = move |key: &usize| key.abs_diff(query).is_multiple_of(64);
            (0..LENGTH).filter(move |key| near(key) || every(key))
        };
        assert!(column(0).eq(seen(Strided, false, 0)));
        assert!(column(999).eq(seen(Strided, false, 999)));
        assert!(
            column(999)
                .take_while(|key| *key <= 999)
                .eq(seen(Strided, true, 999))
        );
    }

    #[test]
    fn names_are_those_of_options_and_files() {
        for pattern in DocumentPattern::value_variants() {
            let json = serde_json::to_string(pattern).unwrap();
            assert_eq!(json, format!("\"{pattern}\""));
            assert_eq!(
                DocumentPattern::from_str(&pattern.to_string(), false),
                Ok(*pattern)
            );
        }
    }
}
