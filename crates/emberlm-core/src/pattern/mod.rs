//! Which keys each query may see, as a small expression: the algebra of sparse attention patterns.

mod batch_data;
mod block_plan;
mod blockwise;
mod display;
mod error;
mod fixed;
mod global;
mod horizon;
mod lengths;
mod parse;
mod picture;
mod random_blocks;
mod slots;
mod strided;
mod window;

use std::ops::{BitAnd, BitOr, Not};

use serde::{Deserialize, Serialize};

pub use batch_data::BatchData;
pub use block_plan::BlockPlan;
pub use blockwise::Blockwise;
pub use error::PatternError;
pub use fixed::Fixed;
pub use global::Global;
pub use horizon::Horizon;
pub use lengths::Lengths;
pub use parse::ParsePatternError;
pub use picture::Picture;
pub use random_blocks::{RandomBlocks, Reach};
pub use slots::CacheSlots;
pub use strided::Strided;
pub use window::{Dilated, Window};

/// Which keys each query may see.
///
/// A pattern is a value: it can be compared, written to a file and read back, shown, and drawn. It has one meaning,
/// [`allows`](Self::allows), on absolute positions. Simple patterns are combined with `&`, `|` and `!`, and one pattern
/// can be given to each head. What belongs to a batch (document ids, global positions, padding) is no part of it but
/// [`BatchData`]. [`Schedule`](crate::Schedule) compiles it for given lengths.
///
/// | pattern | query `i` sees key `j` if |
/// |---|---|
/// | `Full` | always |
/// | `Causal` | `j <= i` |
/// | `Window`, `Dilated` | see [`Window`], [`Dilated`] |
/// | `Strided`, `Fixed` | see [`Strided`], [`Fixed`] |
/// | `Blockwise`, `Random`, `Blocks` | see [`Blockwise`], [`RandomBlocks`], [`BlockPlan`] |
/// | `Global` | `i` or `j` is a global position, see [`Global`] |
/// | `GlobalQueries`, `GlobalKeys` | `i` is a global position, `j` is one |
/// | `Prefix(n)`, `Sinks(n)` | `j < n` |
/// | `Documents` | `i` and `j` have the same document id |
///
/// ```
/// use emberlm_core::{Pattern, Window};
///
/// let pattern = Pattern::causal() & (Pattern::window(Window::one_sided(2)) | Pattern::sinks(1));
/// assert_eq!(pattern.to_string(), "causal & (window:2 | sinks:1)");
/// assert_eq!("causal & (window:2 | sinks:1)".parse(), Ok(pattern.clone()));
/// let picture = [
///     "#....", //
///     "##...",
///     "###..",
///     "####.",
///     "#.###",
/// ];
/// assert_eq!(pattern.to_text(5, 5), Ok(picture.join("\n") + "\n"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pattern {
    /// Every key.
    Full,
    /// The query's own position and those before it.
    Causal,
    /// Neighbours to both sides.
    Window(Window),
    /// Neighbours with gaps.
    Dilated(Dilated),
    /// The Sparse Transformer's strided attention.
    Strided(Strided),
    /// The Sparse Transformer's fixed attention.
    Fixed(Fixed),
    /// Whole blocks around the query.
    Blockwise(Blockwise),
    /// Tokens that see all and are seen by all.
    Global(Global),
    /// Tokens that see all.
    GlobalQueries(Global),
    /// Tokens that are seen by all.
    GlobalKeys(Global),
    /// Random blocks of keys.
    Random(RandomBlocks),
    /// Blocks of keys that are named one by one.
    Blocks(BlockPlan),
    /// The first keys, as the prefix of a prefix language model (`causal | prefix`,
    /// <https://arxiv.org/abs/1910.10683>).
    Prefix(usize),
    /// Positions of the query's own document, where several are packed into one sequence.
    Documents,
    /// The first keys, as attention sinks (`causal & (window | sinks)`, <https://arxiv.org/abs/2309.17453>). The
    /// meaning is that of `Prefix`; the name says what it is for.
    Sinks(usize),
    /// What all of these allow.
    And(Vec<Pattern>),
    /// What any of these allows.
    Or(Vec<Pattern>),
    /// What this does not allow.
    Not(Box<Pattern>),
    /// One pattern for each head.
    PerHead(Vec<Pattern>),
}

/// A pair of a query and a key, of a head and a batch row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct At {
    /// The batch row.
    pub batch: usize,
    /// The query head.
    pub head: usize,
    /// Absolute position of the query.
    pub query: usize,
    /// Position of the key.
    pub key: usize,
    /// Number of keys. Only [`Reach::Everywhere`] and [`Global::Last`] depend on it: all other patterns allow a pair at
    /// any length or at none.
    pub key_length: usize,
}

impl Pattern {
    /// How deep combinators may nest. A serialised pattern of this depth can still be read: `serde_json` follows 128
    /// levels, of which a combinator takes two.
    const MAX_DEPTH: usize = 48;

    /// Every query sees every key.
    pub fn full() -> Self {
        Self::Full
    }

    /// A query sees its own position and those before it.
    pub fn causal() -> Self {
        Self::Causal
    }

    /// A query sees its neighbours. See [`Window`] for the readings of its size.
    pub fn window(window: Window) -> Self {
        Self::Window(window)
    }

    /// A query sees every `dilation`-th neighbour.
    pub fn dilated(window: Window, dilation: usize) -> Self {
        Self::Dilated(Dilated { window, dilation })
    }

    /// Strided attention of the Sparse Transformer.
    pub fn strided(strided: Strided) -> Self {
        Self::Strided(strided)
    }

    /// Fixed attention of the Sparse Transformer.
    pub fn fixed(fixed: Fixed) -> Self {
        Self::Fixed(fixed)
    }

    /// A query sees its own block, and perhaps some before it.
    pub fn blockwise(blockwise: Blockwise) -> Self {
        Self::Blockwise(blockwise)
    }

    /// These absolute positions, rising, see all and are seen by all.
    pub fn global(positions: impl Into<Vec<usize>>) -> Self {
        Self::Global(Global::Positions(positions.into()))
    }

    /// The first `n` positions see all and are seen by all.
    pub fn global_first(n: usize) -> Self {
        Self::Global(Global::First(n))
    }

    /// Global tokens at the positions that the batch data give for each batch row.
    pub fn batch_global() -> Self {
        Self::Global(Global::Batch)
    }

    /// Each block of queries sees some random blocks of keys.
    pub fn random(random: RandomBlocks) -> Self {
        Self::Random(random)
    }

    /// Each block of queries sees the blocks of keys that a plan names.
    pub fn blocks(plan: BlockPlan) -> Self {
        Self::Blocks(plan)
    }

    /// BigBird (<https://arxiv.org/abs/2007.14062>) in its internal construction: a window of three blocks, the first
    /// block global, and random blocks.
    ///
    /// The published code makes the last block global as well. Its place depends on the length, so here that is an
    /// extra `| Pattern::global(..)`.
    pub fn bigbird(random: RandomBlocks) -> Self {
        let neighbours = Blockwise::new(random.block)
            .with_look_back(1)
            .with_look_ahead(1);
        let first = Self::Global(Global::First(random.block));
        Self::blockwise(neighbours) | first | Self::random(random)
    }

    /// The first `length` keys are visible to all.
    pub fn prefix(length: usize) -> Self {
        Self::Prefix(length)
    }

    /// A query sees its own document. The ids are batch data.
    pub fn documents() -> Self {
        Self::Documents
    }

    /// The first `n` keys are visible to all.
    pub fn sinks(n: usize) -> Self {
        Self::Sinks(n)
    }

    /// One pattern for each head, in order.
    pub fn per_head(patterns: impl Into<Vec<Pattern>>) -> Self {
        Self::PerHead(patterns.into())
    }
}

impl Pattern {
    /// Whether a query may see a key: the meaning of the pattern. Keys that the batch data hide are never visible.
    ///
    /// # Panics
    ///
    /// On a pattern that [`check`](Self::check) rejects for the sizes at hand: a stride of zero, missing batch data, a
    /// head without a pattern.
    pub fn allows(&self, at: &At, data: &BatchData) -> bool {
        let hidden = data.hidden_keys(at.batch).is_some_and(|row| row[at.key]);
        !hidden && self.relates(at, data)
    }

    /// [`allows`](Self::allows) without the hidden keys, which `!` must not turn into visible ones.
    fn relates(&self, at: &At, data: &BatchData) -> bool {
        let At {
            batch, query, key, ..
        } = *at;
        match self {
            Self::Full => true,
            Self::Causal => key <= query,
            Self::Window(window) => window.allows(query, key),
            Self::Dilated(dilated) => dilated.allows(query, key),
            Self::Strided(strided) => strided.allows(query, key),
            Self::Fixed(fixed) => fixed.allows(query, key),
            Self::Blockwise(blockwise) => blockwise.allows(query, key),
            Self::Global(global) => global.holds(query, at, data) || global.holds(key, at, data),
            Self::GlobalQueries(global) => global.holds(query, at, data),
            Self::GlobalKeys(global) => global.holds(key, at, data),
            Self::Random(random) => random.allows(query, key, at.key_length),
            Self::Blocks(plan) => plan.allows(query, key),
            Self::Prefix(n) | Self::Sinks(n) => key < *n,
            Self::Documents => data.query_documents(batch)[query] == data.key_documents(batch)[key],
            Self::And(patterns) => patterns.iter().all(|pattern| pattern.relates(at, data)),
            Self::Or(patterns) => patterns.iter().any(|pattern| pattern.relates(at, data)),
            Self::Not(pattern) => !pattern.relates(at, data),
            Self::PerHead(patterns) => patterns[at.head].relates(at, data),
        }
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// [`PatternError`] with the name of the field: a zero stride, block or dilation, summary columns that do not fit
    /// the stride, global positions that do not rise, a combination of no patterns, too many combinators inside each
    /// other.
    pub fn validate(&self) -> Result<(), PatternError> {
        self.validate_below(Self::MAX_DEPTH)
    }

    fn validate_below(&self, depth: usize) -> Result<(), PatternError> {
        match self {
            Self::Dilated(dilated) => dilated.validate(),
            Self::Strided(strided) => strided.validate(),
            Self::Fixed(fixed) => fixed.validate(),
            Self::Blockwise(blockwise) => blockwise.validate(),
            Self::Global(global) | Self::GlobalQueries(global) | Self::GlobalKeys(global) => {
                global.validate()
            }
            Self::Random(random) => random.validate(),
            Self::Blocks(plan) => plan.validate(),
            Self::And(_) | Self::Or(_) | Self::Not(_) | Self::PerHead(_) => {
                let (field, parts) = self.combined();
                let limit = Self::MAX_DEPTH;
                let below = depth.checked_sub(1);
                let below = below.ok_or(PatternError::TooDeep { limit })?;
                if parts.is_empty() {
                    return Err(PatternError::Empty { field });
                }
                parts.iter().try_for_each(|part| part.validate_below(below))
            }
            Self::Full
            | Self::Causal
            | Self::Window(_)
            | Self::Prefix(_)
            | Self::Documents
            | Self::Sinks(_) => Ok(()),
        }
    }

    /// Checks the pattern, the sizes and the batch data against each other.
    ///
    /// # Errors
    ///
    /// What [`validate`](Self::validate) and [`Lengths::validate`] find, and: batch data of another shape or missing
    /// ones, a global position beyond all queries and keys, another number of heads.
    pub fn check(&self, lengths: &Lengths, data: &BatchData) -> Result<(), PatternError> {
        self.validate()?;
        lengths.validate()?;
        data.check(lengths)?;
        self.check_parts(lengths, data)
    }

    fn check_parts(&self, lengths: &Lengths, data: &BatchData) -> Result<(), PatternError> {
        match self {
            Self::Global(global) | Self::GlobalQueries(global) | Self::GlobalKeys(global) => {
                match global {
                    Global::Positions(positions) => {
                        batch_data::check_positions("global.positions", positions, lengths)
                    }
                    Global::First(_) | Global::Last(_) => Ok(()),
                    Global::Batch => data.require_globals(),
                }
            }
            Self::Documents => data.require_documents(lengths),
            Self::PerHead(patterns) if patterns.len() != lengths.n_heads => {
                Err(PatternError::Heads {
                    got: patterns.len(),
                    expected: lengths.n_heads,
                })
            }
            _ => {
                let (_, parts) = self.combined();
                parts
                    .iter()
                    .try_for_each(|part| part.check_parts(lengths, data))
            }
        }
    }

    /// Checks the pattern against the longest sequence that there will be.
    ///
    /// # Errors
    ///
    /// A global position, or a dilation, that no sequence reaches.
    ///
    /// ```
    /// use emberlm_core::Pattern;
    ///
    /// let error = |words: &str| words.parse::<Pattern>().unwrap().check_longest(40).unwrap_err().to_string();
    /// assert_eq!(error("global:0,40"), "global.positions holds position 40, but the sequence has 40 positions");
    /// assert!(error("causal & dilated:2:40").starts_with("dilated.dilation 40 leaves a query no key but its own"));
    /// ```
    pub fn check_longest(&self, length: usize) -> Result<(), PatternError> {
        match self {
            Self::Global(global) | Self::GlobalQueries(global) | Self::GlobalKeys(global) => {
                match global {
                    Global::Positions(positions) => batch_data::check_positions(
                        "global.positions",
                        positions,
                        &Lengths::square(length),
                    ),
                    Global::First(_) | Global::Last(_) | Global::Batch => Ok(()),
                }
            }
            Self::Dilated(dilated) if dilated.dilation >= length.max(2) => {
                Err(PatternError::DilationBeyond {
                    field: "dilated.dilation",
                    dilation: dilated.dilation,
                    length,
                })
            }
            _ => {
                let (_, parts) = self.combined();
                parts.iter().try_for_each(|part| part.check_longest(length))
            }
        }
    }

    /// The pattern without global positions at `length` or beyond: what it means for a sequence that has not grown so
    /// far, where [`check`](Self::check) would find an error.
    ///
    /// ```
    /// use emberlm_core::Pattern;
    ///
    /// let pattern = Pattern::causal() | Pattern::global(vec![0, 40]);
    /// assert_eq!(pattern.within(40), Pattern::causal() | Pattern::global(vec![0]));
    /// ```
    pub fn within(&self, length: usize) -> Self {
        let all = |patterns: &[Self]| patterns.iter().map(|part| part.within(length)).collect();
        match self {
            Self::Global(global) => Self::Global(global.within(length)),
            Self::GlobalQueries(global) => Self::GlobalQueries(global.within(length)),
            Self::GlobalKeys(global) => Self::GlobalKeys(global.within(length)),
            Self::And(patterns) => Self::And(all(patterns)),
            Self::Or(patterns) => Self::Or(all(patterns)),
            Self::Not(pattern) => Self::Not(Box::new(pattern.within(length))),
            Self::PerHead(patterns) => Self::PerHead(all(patterns)),
            other => other.clone(),
        }
    }

    /// The name of a combinator and what it combines; nothing for a simple pattern.
    fn combined(&self) -> (&'static str, &[Pattern]) {
        match self {
            Self::And(patterns) => ("and", patterns),
            Self::Or(patterns) => ("or", patterns),
            Self::Not(pattern) => ("not", std::slice::from_ref(pattern)),
            Self::PerHead(patterns) => ("per_head", patterns),
            _ => ("", &[]),
        }
    }

    /// Whether what a query sees may change while the sequence grows behind it: then decoding step by step differs from
    /// one pass over the whole.
    pub fn changes_with_length(&self) -> bool {
        let (_, parts) = self.combined();
        let depends = match self {
            Self::Random(random) => random.reach == Reach::Everywhere,
            Self::Global(global) | Self::GlobalQueries(global) | Self::GlobalKeys(global) => {
                matches!(global, Global::Last(_))
            }
            _ => false,
        };
        depends || parts.iter().any(Self::changes_with_length)
    }

    /// Whether a query sees a key wherever both are moved by the same number of positions. Then rows of a batch may
    /// begin at different positions.
    ///
    /// ```
    /// use emberlm_core::{Pattern, Window};
    ///
    /// let local = Pattern::causal() & Pattern::window(Window::one_sided(4));
    /// assert!(local.is_shift_invariant());
    /// assert!(!(local | Pattern::sinks(1)).is_shift_invariant());
    /// ```
    pub fn is_shift_invariant(&self) -> bool {
        match self {
            Self::Full | Self::Causal | Self::Window(_) | Self::Dilated(_) | Self::Strided(_) => {
                true
            }
            Self::Fixed(_)
            | Self::Blockwise(_)
            | Self::Global(_)
            | Self::GlobalQueries(_)
            | Self::GlobalKeys(_)
            | Self::Random(_)
            | Self::Blocks(_)
            | Self::Prefix(_)
            | Self::Documents
            | Self::Sinks(_) => false,
            Self::And(_) | Self::Or(_) | Self::Not(_) | Self::PerHead(_) => {
                let (_, parts) = self.combined();
                parts.iter().all(Self::is_shift_invariant)
            }
        }
    }

    /// Whether heads may see different keys.
    pub(crate) fn depends_on_head(&self) -> bool {
        let (_, parts) = self.combined();
        matches!(self, Self::PerHead(_)) || parts.iter().any(Self::depends_on_head)
    }

    /// Whether batch rows may see different keys, hidden keys aside.
    pub(crate) fn depends_on_batch(&self) -> bool {
        let (_, parts) = self.combined();
        let of_batch = match self {
            Self::Documents => true,
            Self::Global(global) | Self::GlobalQueries(global) | Self::GlobalKeys(global) => {
                *global == Global::Batch
            }
            _ => false,
        };
        of_batch || parts.iter().any(Self::depends_on_batch)
    }
}

impl BitAnd for Pattern {
    type Output = Self;

    /// What both allow. A chain of `&` becomes one flat combination.
    fn bitand(self, other: Self) -> Self {
        let parts = |pattern| match pattern {
            Self::And(patterns) => patterns,
            other => vec![other],
        };
        let mut patterns = parts(self);
        patterns.extend(parts(other));
        Self::And(patterns)
    }
}

impl BitOr for Pattern {
    type Output = Self;

    /// What either allows. A chain of `|` becomes one flat combination.
    fn bitor(self, other: Self) -> Self {
        let parts = |pattern| match pattern {
            Self::Or(patterns) => patterns,
            other => vec![other],
        };
        let mut patterns = parts(self);
        patterns.extend(parts(other));
        Self::Or(patterns)
    }
}

impl Not for Pattern {
    type Output = Self;

    /// What this does not allow. Keys that the batch data hide stay hidden.
    fn not(self) -> Self {
        Self::Not(Box::new(self))
    }
}
