//! What a pattern comes to for given lengths and one batch row and head: an expression over a few relations.

use super::listed_blocks::ListedBlocks;

/// Beyond every difference of two positions: no bound.
pub(super) const UNBOUNDED: i64 = 1 << 40;

/// An expression over relations of a query position `q` and a key position `k`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Relation {
    Always,
    Never,
    Atom(Atom),
    Not(Box<Relation>),
    All(Vec<Relation>),
    Any(Vec<Relation>),
}

/// A relation that can be decided for a whole block at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Atom {
    /// `low <= q - k <= high`
    Band { low: i64, high: i64 },
    /// `low <= floor(q / block) - floor(k / block) <= high`
    Blocks { block: i64, low: i64, high: i64 },
    /// `(q - k) mod modulus = 0`
    Congruent { modulus: u32 },
    /// The key block of `k` is listed for the query block of `q`.
    Listed { rows: usize },
    /// `k` is in a set. `gather` is the union of this set over the batch rows.
    Keys { set: usize, gather: usize },
    /// `q` is in a set. `gather` is as for keys.
    Queries { set: usize, gather: usize },
    /// Both are in the same document.
    SameDocument { documents: usize },
}

/// What the atoms refer to.
#[derive(Default)]
pub(super) struct Tables {
    /// Rising absolute positions.
    pub(super) sets: Vec<Vec<u32>>,
    pub(super) listed: Vec<ListedBlocks>,
    pub(super) documents: Vec<Documents>,
}

/// The documents of one batch row, numbered in the order in which the keys come to them, so that the numbers of a range
/// are a narrow range.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Documents {
    /// By distance from the first query.
    pub(super) queries: Vec<u32>,
    pub(super) keys: Vec<u32>,
}

impl Relation {
    pub(super) fn band(low: i64, high: i64) -> Self {
        if low > high {
            return Self::Never;
        }
        Self::Atom(Atom::Band { low, high })
    }

    /// All of these hold. Bands become one band.
    pub(super) fn all(relations: impl IntoIterator<Item = Self>) -> Self {
        let mut parts = Vec::new();
        let mut band: Option<(i64, i64)> = None;
        let mut add = |relation| match relation {
            Self::Always => {}
            Self::Atom(Atom::Band { low, high }) => {
                let (l, h) = band.unwrap_or((low, high));
                band = Some((l.max(low), h.min(high)));
            }
            other => {
                if !parts.contains(&other) {
                    parts.push(other);
                }
            }
        };
        for relation in relations {
            match relation {
                Self::All(inner) => inner.into_iter().for_each(&mut add),
                other => add(other),
            }
        }
        if let Some((low, high)) = band {
            // The cheapest decision first.
            parts.insert(0, Self::band(low, high));
        }
        if parts.contains(&Self::Never) {
            return Self::Never;
        }
        match parts.len() {
            0 => Self::Always,
            1 => parts.remove(0),
            _ => Self::All(parts),
        }
    }

    /// At least one of these holds.
    pub(super) fn any(relations: impl IntoIterator<Item = Self>) -> Self {
        let mut parts = Vec::new();
        let mut add = |relation| {
            if relation != Self::Never && !parts.contains(&relation) {
                parts.push(relation);
            }
        };
        for relation in relations {
            match relation {
                Self::Any(inner) => inner.into_iter().for_each(&mut add),
                other => add(other),
            }
        }
        if parts.contains(&Self::Always) {
            return Self::Always;
        }
        match parts.len() {
            0 => Self::Never,
            1 => parts.remove(0),
            _ => Self::Any(parts),
        }
    }

    pub(super) fn negated(self) -> Self {
        match self {
            Self::Always => Self::Never,
            Self::Never => Self::Always,
            Self::Not(inner) => *inner,
            other => Self::Not(Box::new(other)),
        }
    }

    /// Calls a function on every atom.
    pub(super) fn for_each_atom(&self, visit: &mut impl FnMut(Atom)) {
        match self {
            Self::Always | Self::Never => {}
            Self::Atom(atom) => visit(*atom),
            Self::Not(inner) => inner.for_each_atom(visit),
            Self::All(parts) | Self::Any(parts) => {
                parts.iter().for_each(|part| part.for_each_atom(visit));
            }
        }
    }
}
