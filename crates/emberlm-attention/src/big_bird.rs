//! BigBird's attention.

use burn::{config::Config, tensor::Device};
use emberlm_core::{
    BlockPlan, Blockwise, Global, InvalidConfig, Pattern, PatternError, RandomBlocks,
};

use crate::{GroupedQueryAttention, GroupedQueryAttentionConfig, heads::by_head};

/// Which tokens of a BigBird are global: section 2 of the paper.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum BigBirdGlobals {
    /// Blocks of the sequence itself (ITC): the first and, not where a token sees none of the later ones, the last.
    Internal,
    /// The first positions are extra tokens that belong to no text (ETC): so many blocks of them.
    Extended {
        /// Blocks of extra tokens at the beginning of the sequence.
        n_blocks: usize,
    },
}

/// Where the random blocks of keys come from.
#[derive(Config, Debug, PartialEq)]
pub enum RandomPlan {
    /// Drawn by [`RandomBlocks`], for any length; other draws for each head. A key counts once, however many parts of the
    /// pattern show it.
    Drawn {
        /// Key blocks that each query block sees.
        n_blocks: usize,
        /// Seed of the draw; give each layer its own.
        seed: u64,
    },
    /// Given: `rows[head][i]` are the key blocks of query block `i + 1`, as `rand_attn` of Hugging Face's code has them:
    /// the first and the last query block see all anyway.
    Given {
        /// Heads, inner query blocks, key blocks.
        rows: Vec<Vec<Vec<usize>>>,
        /// What a key block weighs that is named twice, or that the window or the global blocks show too.
        repeats: RepeatedBlocks,
    },
}

/// What a key weighs that a plan of random blocks shows more than once.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum RepeatedBlocks {
    /// It counts once.
    Once,
    /// It counts each time, as in Hugging Face's code, where in evaluation all random blocks are block 0.
    EachTime,
}

/// Configuration of BigBird's attention: a window of three blocks, global blocks and random blocks.
///
/// Zaheer et al. 2020, <https://arxiv.org/abs/2007.14062>, section 2 and appendix D: a query block sees the key blocks
///
/// ```text
/// {i - 1, i, i + 1}  and  the global blocks  and  n_blocks random ones;   global blocks see all
/// ```
///
/// Differences from the published implementations: any length, with a last block that may be short; randomness in
/// evaluation as in training; a causal mode, whose random blocks are drawn from the past and whose last block is not
/// global.
///
/// ```
/// use emberlm_attention::{BigBirdAttentionConfig, RandomPlan};
///
/// let drawn = RandomPlan::Drawn { n_blocks: 3, seed: 0 };
/// let config = BigBirdAttentionConfig::new(64, 1, 64, drawn);
/// assert_eq!(
///     config.pattern().to_string(),
///     "blockwise:64:1:1 | global:..64 | global:-64 | random:64:3"
/// );
/// ```
#[derive(Config, Debug)]
pub struct BigBirdAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// Positions of a block. Google's code has 16, Hugging Face's 64.
    pub block: usize,
    /// The random blocks.
    pub random: RandomPlan,
    /// The global tokens. Default: blocks of the sequence itself.
    #[config(default = "BigBirdGlobals::Internal")]
    pub globals: BigBirdGlobals,
    /// Whether a token sees none of the later ones. Default: false.
    #[config(default = false)]
    pub causal: bool,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

/// BigBird's attention: attention whose pattern is that of a [`BigBirdAttentionConfig`].
pub type BigBirdAttention = GroupedQueryAttention;

impl BigBirdAttentionConfig {
    /// The keys that each head sees, repetitions aside.
    pub fn pattern(&self) -> Pattern {
        let window = Blockwise::new(self.block)
            .with_look_back(1)
            .with_look_ahead(1);
        let mut pattern = Pattern::blockwise(window);
        let n_first = match self.globals {
            BigBirdGlobals::Internal => 1,
            BigBirdGlobals::Extended { n_blocks } => n_blocks,
        };
        pattern = pattern | Pattern::global_first(n_first.saturating_mul(self.block));
        if self.globals == BigBirdGlobals::Internal && !self.causal {
            pattern = pattern | Pattern::Global(Global::Last(self.block));
        }
        pattern = match self.random_blocks() {
            Some(random) => pattern | random,
            None => pattern,
        };
        match self.causal {
            true => Pattern::causal() & pattern,
            false => pattern,
        }
    }

    /// Random blocks that count once.
    fn random_blocks(&self) -> Option<Pattern> {
        match &self.random {
            RandomPlan::Drawn { n_blocks: 0, .. } => None,
            RandomPlan::Drawn { n_blocks, seed } => {
                let drawn = |head| {
                    let random = match self.causal {
                        true => RandomBlocks::past(self.block, *n_blocks),
                        false => RandomBlocks::everywhere(self.block, *n_blocks),
                    };
                    let seed = seed.wrapping_mul(self.n_heads as u64).wrapping_add(head);
                    Pattern::random(random.with_seed(seed))
                };
                Some(by_head((0..self.n_heads as u64).map(drawn).collect()))
            }
            RandomPlan::Given {
                rows,
                repeats: RepeatedBlocks::Once,
            } => Some(self.planned(rows, |row| row.to_vec())),
            RandomPlan::Given {
                repeats: RepeatedBlocks::EachTime,
                ..
            } => None,
        }
    }

    /// Patterns whose keys count once more: one for each place in the lists of a plan.
    pub fn repeats(&self) -> Vec<Pattern> {
        let RandomPlan::Given {
            rows,
            repeats: RepeatedBlocks::EachTime,
        } = &self.random
        else {
            return Vec::new();
        };
        let n_places = rows.iter().flatten().map(Vec::len).max().unwrap_or(0);
        let place = |place| self.planned(rows, |row| row.get(place).into_iter().copied().collect());
        let repeats = (0..n_places).map(place);
        match self.causal {
            true => repeats.map(|repeat| Pattern::causal() & repeat).collect(),
            false => repeats.collect(),
        }
    }

    /// A plan for all heads, of some of the blocks of each row.
    fn planned(
        &self,
        rows: &[Vec<Vec<usize>>],
        choose: impl Fn(&[usize]) -> Vec<usize>,
    ) -> Pattern {
        let of_head = |rows: &Vec<Vec<usize>>| {
            let inner = rows.iter().map(|row| {
                let mut blocks = choose(row);
                blocks.sort_unstable();
                blocks.dedup();
                blocks
            });
            let all = std::iter::once(Vec::new()).chain(inner);
            Pattern::blocks(BlockPlan::new(self.block, all.collect()))
        };
        by_head(rows.iter().map(of_head).collect())
    }

    /// The general attention with this pattern: for rotary positions, grouped heads and more.
    pub fn attention(&self) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig::new(self.d_model, self.n_heads)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(self.pattern())
            .with_repeats(self.repeats())
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, heads that do not divide the width, a plan for another number of heads, or a dropout rate outside
    /// `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("block", self.block), ("n_heads", self.n_heads)])?;
        match &self.random {
            RandomPlan::Given { rows, .. } if rows.len() != self.n_heads => {
                Err(InvalidConfig::Pattern {
                    field: "random.rows",
                    source: PatternError::Heads {
                        got: rows.len(),
                        expected: self.n_heads,
                    },
                })
            }
            _ => self.attention().validate(),
        }
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> BigBirdAttention {
        emberlm_core::assert_valid(self.validate());
        self.attention().init(device)
    }
}
