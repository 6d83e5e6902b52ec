//! What a sequence that grows may forget.

use super::{Blockwise, CacheSlots, Fixed, Global, Pattern, Strided};

/// A bound on what queries at [`from`](Self::from) and later see of the keys before them: those up to
/// [`back`](Self::back) positions back, the [`first`](Self::first) ones, and some [`positions`](Self::positions). A cache
/// may forget all others.
///
/// ```
/// use emberlm_core::Pattern;
///
/// let horizon = |words: &str| words.parse::<Pattern>().unwrap().horizon();
/// let streaming = horizon("causal & (window:9:0 | sinks:4)").unwrap();
/// assert_eq!((streaming.back, streaming.first), (9, 4));
/// assert_eq!(horizon("causal"), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Horizon {
    /// How far back a query sees.
    pub back: usize,
    /// How many of the first positions stay visible.
    pub first: usize,
    /// Other positions that stay visible, rising.
    pub positions: Vec<usize>,
    /// The first query that the bound holds for.
    pub from: usize,
    /// Where positions are moved, the pattern stays what it is if they are moved by a multiple of this.
    pub alignment: usize,
}

/// As [`Horizon`], of a part of a pattern.
struct Bound {
    /// Nothing: all the way.
    back: Option<usize>,
    /// Whether positions cannot be moved: the batch or a draw decides, or positions are named inside a condition.
    is_fixed: bool,
    /// Its own `back` is the longest of all parts, so that no position that is kept comes that near.
    rest: Horizon,
}

impl Bound {
    fn new(back: Option<usize>) -> Self {
        Self {
            back,
            is_fixed: false,
            rest: Horizon {
                back: back.unwrap_or(0),
                first: 0,
                positions: Vec::new(),
                from: 0,
                alignment: 1,
            },
        }
    }

    fn varying() -> Self {
        Self {
            is_fixed: true,
            ..Self::new(None)
        }
    }

    fn first(n: usize) -> Self {
        let mut bound = Self::new(Some(0));
        bound.rest.first = n;
        bound
    }

    fn aligned(back: Option<usize>, block: usize) -> Self {
        let mut bound = Self::new(back);
        bound.rest.alignment = block;
        bound
    }

    fn global_keys(global: &Global) -> Self {
        match global {
            Global::Positions(positions) => {
                let mut bound = Self::new(Some(0));
                bound.rest.positions = positions.clone();
                bound
            }
            Global::First(n) => Self::first(*n),
            Global::Last(_) | Global::Batch => Self::varying(),
        }
    }

    /// Global queries see everything; those after the last of them see nothing by this.
    fn global_queries(global: &Global) -> Self {
        let from = match global {
            Global::Positions(positions) => positions.last().map_or(0, |last| last + 1),
            Global::First(n) => *n,
            Global::Last(_) | Global::Batch => return Self::varying(),
        };
        let mut bound = Self::new(Some(0));
        bound.rest.from = from;
        bound
    }

    /// Whether certain positions are named.
    fn names_positions(&self) -> bool {
        let Horizon {
            first,
            positions,
            from,
            ..
        } = &self.rest;
        *first > 0 || *from > 0 || !positions.is_empty()
    }

    /// Both parts stand in the pattern; how far they reach together is another matter.
    fn with(mut self, other: Self, back: Option<usize>) -> Self {
        self.back = back;
        self.is_fixed |= other.is_fixed;
        let (rest, other) = (&mut self.rest, other.rest);
        rest.back = rest.back.max(other.back);
        rest.first = rest.first.max(other.first);
        rest.positions.extend(other.positions);
        rest.positions.sort_unstable();
        rest.positions.dedup();
        rest.from = rest.from.max(other.from);
        rest.alignment = least_common_multiple(rest.alignment, other.alignment);
        self
    }

    fn any(self, other: Self) -> Self {
        let back = self.back.zip(other.back).map(|(a, b)| a.max(b));
        self.with(other, back)
    }

    fn all(self, other: Self) -> Self {
        let back = match (self.back, other.back) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.with(other, back)
    }

    fn of(pattern: &Pattern) -> Self {
        match pattern {
            Pattern::Full | Pattern::Causal => Self::new(None),
            Pattern::Window(window) => Self::new(Some(window.back)),
            Pattern::Dilated(dilated) => {
                let back = dilated.window.back.saturating_mul(dilated.dilation);
                Self::new(Some(back))
            }
            Pattern::Strided(Strided::Local { stride }) => Self::new(Some(*stride)),
            Pattern::Strided(_) => Self::new(None),
            Pattern::Fixed(fixed) => {
                let local = matches!(fixed, Fixed::Local { .. });
                Self::aligned(local.then(|| fixed.stride() - 1), fixed.stride())
            }
            Pattern::Blockwise(Blockwise {
                block, look_back, ..
            }) => {
                let reach = block.saturating_mul(look_back.saturating_add(1));
                Self::aligned(Some(reach - 1), *block)
            }
            Pattern::Blocks(plan) => {
                let mut bound = Self::new(Some(0));
                bound.rest.from = plan.rows.len().saturating_mul(plan.block);
                bound
            }
            Pattern::Prefix(n) | Pattern::Sinks(n) => Self::first(*n),
            Pattern::Global(global) => Self::global_queries(global).any(Self::global_keys(global)),
            Pattern::GlobalKeys(global) => Self::global_keys(global),
            Pattern::GlobalQueries(global) => Self::global_queries(global),
            Pattern::Random(_) | Pattern::Documents => Self::varying(),
            Pattern::And(parts) => {
                let conditions = parts.iter();
                let conditions =
                    conditions.filter(|part| !matches!(part, Pattern::Full | Pattern::Causal));
                let bounds: Vec<Self> = conditions.map(Self::of).collect();
                let named = bounds.len() > 1 && bounds.iter().any(Self::names_positions);
                let mut all = bounds.into_iter().fold(Self::new(None), Self::all);
                all.is_fixed |= named;
                all
            }
            Pattern::Or(parts) | Pattern::PerHead(parts) => {
                (parts.iter().map(Self::of)).fold(Self::new(Some(0)), Self::any)
            }
            Pattern::Not(part) => {
                let bound = Self::of(part);
                Self {
                    back: None,
                    is_fixed: bound.is_fixed || bound.names_positions(),
                    ..bound
                }
            }
        }
    }
}

impl Pattern {
    /// What the past comes to for later queries, where that is bounded; nothing where a query may see any key, where the
    /// batch or a draw decides, or where named positions stand under a condition other than `causal`.
    ///
    /// # Panics
    ///
    /// On a pattern that [`validate`](Self::validate) rejects.
    pub fn horizon(&self) -> Option<Horizon> {
        let bound = Bound::of(self);
        (bound.back.is_some() && !bound.is_fixed).then_some(bound.rest)
    }

    /// The pattern over the slots of a cache that has forgotten what [`horizon`](Self::horizon) allows, for the queries
    /// that are still to come: it allows a slot where this allows the position in it.
    pub fn in_slots(&self, slots: &CacheSlots) -> Self {
        if slots.gap() == 0 {
            return self.clone();
        }
        let all = |parts: &[Self]| parts.iter().map(|part| part.in_slots(slots)).collect();
        match self {
            Self::Global(global) => Self::GlobalKeys(global.in_slots(slots)),
            Self::GlobalKeys(global) => Self::GlobalKeys(global.in_slots(slots)),
            // All of them are behind.
            Self::GlobalQueries(_) | Self::Blocks(_) => !Self::Full,
            Self::And(parts) => Self::And(all(parts)),
            Self::Or(parts) => Self::Or(all(parts)),
            Self::PerHead(parts) => Self::PerHead(all(parts)),
            Self::Not(part) => Self::Not(Box::new(part.in_slots(slots))),
            other => other.clone(),
        }
    }
}

impl Global {
    fn in_slots(&self, slots: &CacheSlots) -> Self {
        match self {
            Self::Positions(positions) => {
                Self::Positions(positions.iter().filter_map(|p| slots.of(*p)).collect())
            }
            // The first positions are the first slots.
            Self::First(_) | Self::Last(_) | Self::Batch => self.clone(),
        }
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (a / divisor).saturating_mul(b)
}
