//! How the blocks of a stack attend, where they differ.

use burn::config::Config;
use emberlm_core::{Global, Pattern, Window};

/// How a block attends to its own sequence.
#[derive(Config, Debug, PartialEq)]
pub enum LayerAttention {
    /// By a pattern.
    Pattern {
        /// Which tokens a token sees.
        pattern: Pattern,
        /// Patterns whose keys count once more, as the random blocks of some BigBirds do.
        repeats: Vec<Pattern>,
    },
    /// As a Longformer: a window, and global tokens with projections of their own.
    Longformer {
        /// The keys around a query that it sees.
        window: Window,
        /// Distance of neighbouring keys in the window, one a head; nothing means 1.
        dilations: Option<Vec<usize>>,
        /// Tokens that see all and that all see.
        global: Global,
        /// Whether a token sees none of the later ones; in a decoder it never does.
        causal: bool,
    },
}

impl LayerAttention {
    /// By a pattern whose keys count once.
    pub fn pattern(pattern: Pattern) -> Self {
        Self::Pattern {
            pattern,
            repeats: Vec::new(),
        }
    }

    /// The same within what a causal model sees.
    pub(crate) fn within_past(self) -> Self {
        let past = |pattern| Pattern::causal() & pattern;
        match self {
            Self::Pattern { pattern, repeats } => Self::Pattern {
                pattern: past(pattern),
                repeats: repeats.into_iter().map(past).collect(),
            },
            Self::Longformer {
                window,
                dilations,
                global,
                ..
            } => Self::Longformer {
                window,
                dilations,
                global,
                causal: true,
            },
        }
    }

    /// All that a token sees, in any head.
    pub fn visible(&self) -> Pattern {
        match self {
            Self::Pattern { pattern, repeats } => {
                (repeats.iter().cloned()).fold(pattern.clone(), |all, repeat| all | repeat)
            }
            Self::Longformer {
                window,
                dilations,
                global,
                ..
            } => {
                let mut all = Pattern::Global(global.clone());
                match dilations {
                    None => all = all | Pattern::window(*window),
                    Some(dilations) => {
                        for dilation in dilations {
                            all = all | Pattern::dilated(*window, *dilation);
                        }
                    }
                }
                all
            }
        }
    }
}
