//! Deciding a relation on whole rectangles of queries and keys by the arithmetic of intervals.

use super::axis::{Axis, Holds};
use super::relation::{Atom, Relation, Tables};

/// Queries and keys of a part with what its relations refer to.
pub(super) struct Plane<'a> {
    pub(super) tables: &'a Tables,
    pub(super) queries: Axis,
    pub(super) keys: Axis,
}

/// How many rows of random blocks a rectangle may span to be looked at one by one. A natural block spans few; a block
/// of another order may span all, and is then decided pair by pair.
const MAX_RANDOM_ROWS: i64 = 256;

impl Plane<'_> {
    /// Prepares the axes for what a relation refers to.
    pub(super) fn prepare(&mut self, relation: &Relation) {
        relation.for_each_atom(&mut |atom| match atom {
            Atom::Keys { set, .. } => self.keys.add_set(set, self.tables),
            Atom::Queries { set, .. } => self.queries.add_set(set, self.tables),
            Atom::SameDocument { documents } => {
                let numbers = &self.tables.documents[documents];
                self.queries.add_documents(documents, &numbers.queries);
                self.keys.add_documents(documents, &numbers.keys);
            }
            _ => {}
        });
    }

    /// Whether a relation holds for the queries of a block and the keys of `2^level` blocks.
    ///
    /// Kleene's logic: what is undecided for a part may be decided for the whole, so `Somewhere` is no promise.
    pub(super) fn holds(
        &self,
        relation: &Relation,
        query_block: usize,
        level: usize,
        index: usize,
    ) -> Holds {
        match relation {
            Relation::Always => Holds::Everywhere,
            Relation::Never => Holds::Nowhere,
            Relation::Atom(atom) => self.atom_holds(*atom, query_block, level, index),
            Relation::Not(inner) => match self.holds(inner, query_block, level, index) {
                Holds::Nowhere => Holds::Everywhere,
                Holds::Somewhere => Holds::Somewhere,
                Holds::Everywhere => Holds::Nowhere,
            },
            Relation::All(parts) => {
                let mut all = Holds::Everywhere;
                for part in parts {
                    match self.holds(part, query_block, level, index) {
                        Holds::Nowhere => return Holds::Nowhere,
                        Holds::Somewhere => all = Holds::Somewhere,
                        Holds::Everywhere => {}
                    }
                }
                all
            }
            Relation::Any(parts) => {
                let mut any = Holds::Nowhere;
                for part in parts {
                    match self.holds(part, query_block, level, index) {
                        Holds::Everywhere => return Holds::Everywhere,
                        Holds::Somewhere => any = Holds::Somewhere,
                        Holds::Nowhere => {}
                    }
                }
                any
            }
        }
    }

    fn atom_holds(&self, atom: Atom, query_block: usize, level: usize, index: usize) -> Holds {
        let query = self.queries.extent(0, query_block);
        let key = self.keys.extent(level, index);
        let [first_query, last_query] = query.positions.map(i64::from);
        let [first_key, last_key] = key.positions.map(i64::from);
        match atom {
            Atom::Band { low, high } => {
                interval([first_query - last_key, last_query - first_key], low, high)
            }
            Atom::Blocks { block, low, high } => {
                let [first_query, last_query] = [first_query / block, last_query / block];
                let [first_key, last_key] = [first_key / block, last_key / block];
                interval([first_query - last_key, last_query - first_key], low, high)
            }
            Atom::Congruent { modulus } => {
                let by_residue = self.keys.modulus == modulus;
                let [[q0, q1], [k0, k1]] = [query.residues, key.residues];
                if by_residue && (q1 < k0 || k1 < q0) {
                    return Holds::Nowhere;
                }
                if by_residue && q0 == q1 && k0 == k1 {
                    return Holds::Everywhere;
                }
                congruent(
                    [first_query - last_key, last_query - first_key],
                    i64::from(modulus),
                )
            }
            Atom::Listed { rows } => {
                let rows = &self.tables.listed[rows];
                let block = rows.block();
                let [first_row, last_row] = [first_query / block, last_query / block];
                if last_row - first_row >= MAX_RANDOM_ROWS {
                    return Holds::Somewhere;
                }
                let [first, last] = [first_key / block, last_key / block];
                let mut all = None;
                for row in first_row..=last_row {
                    let drawn = rows.of_row(row);
                    let from = drawn.partition_point(|&block| i64::from(block) < first);
                    let to = drawn.partition_point(|&block| i64::from(block) <= last);
                    let here = match to - from {
                        0 => Holds::Nowhere,
                        n if n as i64 == last - first + 1 => Holds::Everywhere,
                        _ => return Holds::Somewhere,
                    };
                    match all {
                        None => all = Some(here),
                        Some(before) if before == here => {}
                        Some(_) => return Holds::Somewhere,
                    }
                }
                all.unwrap_or(Holds::Nowhere)
            }
            Atom::Keys { set, .. } => self.keys.set(set).holds(level, index),
            Atom::Queries { set, .. } => self.queries.set(set).holds(0, query_block),
            Atom::SameDocument { documents } => {
                let [q0, q1] = self.queries.documents(documents).levels.at(0, query_block);
                let [k0, k1] = self.keys.documents(documents).levels.at(level, index);
                if q1 < k0 || k1 < q0 {
                    Holds::Nowhere
                } else if q0 == q1 && k0 == k1 {
                    Holds::Everywhere
                } else {
                    Holds::Somewhere
                }
            }
        }
    }
}

/// Whether numbers between two ends lie between two bounds.
fn interval([first, last]: [i64; 2], low: i64, high: i64) -> Holds {
    if last < low || high < first {
        Holds::Nowhere
    } else if low <= first && last <= high {
        Holds::Everywhere
    } else {
        Holds::Somewhere
    }
}

/// Whether numbers between two ends are multiples of a modulus above 1.
fn congruent([first, last]: [i64; 2], modulus: i64) -> Holds {
    let below_first = (first - 1).div_euclid(modulus);
    if last.div_euclid(modulus) == below_first {
        Holds::Nowhere
    } else if first == last {
        Holds::Everywhere
    } else {
        Holds::Somewhere
    }
}
