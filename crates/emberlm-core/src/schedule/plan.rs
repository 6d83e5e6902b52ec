//! Splitting a relation into disjoint parts, each with an order of queries and keys that packs its pairs into blocks.

use super::BlockSizes;
use super::relation::{Atom, Relation, Tables};
use crate::pattern::Lengths;

/// An order of queries and keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they come.
    Natural,
    /// Both by position modulo this number, then by position: congruent positions are neighbours.
    Residues(u32),
    /// Only the keys of some disjoint sets, one set after the other.
    Keys(Vec<usize>),
    /// Only the queries of some disjoint sets, one set after the other.
    Queries(Vec<usize>),
}

/// Beyond this many terms a relation is left whole: multiplying it out costs more than its order saves.
const MAX_TERMS: usize = 64;

/// For each order the pairs of each relation that belong to it. A pair is in one order at most.
pub(super) fn plan(
    relations: &[Relation],
    tables: &Tables,
    lengths: &Lengths,
    blocks: &BlockSizes,
) -> Vec<(Order, Vec<Relation>)> {
    let planner = Planner {
        tables,
        lengths,
        blocks,
    };
    // The natural order comes first: it is the cheapest to visit, and takes pairs that several orders allow.
    let mut orders = vec![Order::Natural];
    let split = relations.iter().map(|relation| {
        let terms = planner.split(relation).into_iter();
        let placed = terms.map(|(order, term)| (planner.place(order, &mut orders), term));
        placed.collect()
    });
    let split: Vec<Vec<(usize, Relation)>> = split.collect();
    let mut taken = vec![Vec::new(); relations.len()];
    let in_order = |(number, order)| {
        let of_order = split.iter().zip(&mut taken).map(|(terms, taken)| {
            let own = terms.iter().filter(|(other, _)| *other == number);
            let own: Vec<Relation> = own.map(|(_, term)| term.clone()).collect();
            let rest = Relation::any(taken.iter().cloned()).negated();
            taken.extend(own.iter().cloned());
            Relation::all([Relation::any(own), rest])
        });
        (order, of_order.collect())
    };
    orders.into_iter().enumerate().map(in_order).collect()
}

struct Planner<'a> {
    tables: &'a Tables,
    lengths: &'a Lengths,
    blocks: &'a BlockSizes,
}

impl Planner<'_> {
    /// The number of an order among those in use, to which it is added if need be.
    ///
    /// Sets that share no position share an order, such as the summary columns of several heads: each head then visits
    /// the blocks of its own set.
    fn place(&self, order: Order, orders: &mut Vec<Order>) -> usize {
        for (number, other) in orders.iter_mut().enumerate() {
            if *other == order {
                return number;
            }
            let (own, sets) = match (&order, other) {
                (Order::Keys(own), Order::Keys(sets)) => (own, sets),
                (Order::Queries(own), Order::Queries(sets)) => (own, sets),
                _ => continue,
            };
            let new = own.iter().filter(|set| !sets.contains(set));
            let new: Vec<usize> = new.copied().collect();
            if new.iter().all(|&set| self.is_apart(set, sets)) {
                sets.extend(new);
                return number;
            }
        }
        orders.push(order);
        orders.len() - 1
    }

    /// Whether a set shares no position with others.
    fn is_apart(&self, set: usize, others: &[usize]) -> bool {
        let positions = &self.tables.sets[set];
        others.iter().all(|&other| {
            let other = &self.tables.sets[other];
            let shared = |position: &u32| other.binary_search(position).is_ok();
            !positions.iter().any(shared)
        })
    }

    /// The relation as a union of terms, each with its order.
    fn split(&self, relation: &Relation) -> Vec<(Order, Relation)> {
        let Some(terms) = self.terms(relation, true) else {
            return vec![(Order::Natural, relation.clone())];
        };
        let with_order = |term: Vec<Relation>| {
            let orders = term.iter().filter_map(|factor| self.order_of(factor));
            let order = orders.min_by_key(|order| self.n_pairs(order));
            (order.unwrap_or(Order::Natural), Relation::all(term))
        };
        terms.into_iter().map(with_order).collect()
    }

    /// The relation, or what it excludes, as a union of products. Only as much is multiplied out as is needed for each
    /// relation with an order of its own to be a factor; nothing if that makes too many terms.
    fn terms(&self, relation: &Relation, holds: bool) -> Option<Vec<Vec<Relation>>> {
        if !self.has_order(relation, holds) {
            let whole = relation.clone();
            let factor = if holds { whole } else { whole.negated() };
            return Some(vec![vec![factor]]);
        }
        let terms = match (relation, holds) {
            (Relation::Not(inner), _) => self.terms(inner, !holds)?,
            (Relation::All(parts), true) | (Relation::Any(parts), false) => {
                let mut product = vec![Vec::new()];
                for part in parts {
                    let terms = self.terms(part, holds)?;
                    if product.len() * terms.len() > MAX_TERMS {
                        return None;
                    }
                    let times = |left: &Vec<Relation>| {
                        let left = left.clone();
                        terms.iter().map(move |right| [&left[..], right].concat())
                    };
                    product = product.iter().flat_map(times).collect();
                }
                product
            }
            (Relation::Any(parts), true) | (Relation::All(parts), false) => {
                let each = parts.iter().map(|part| self.terms(part, holds));
                each.collect::<Option<Vec<_>>>()?.concat()
            }
            (Relation::Atom(_) | Relation::Always | Relation::Never, _) => {
                vec![vec![relation.clone()]]
            }
        };
        (terms.len() <= MAX_TERMS).then_some(terms)
    }

    /// Whether a relation, or what it excludes, holds an atom with an order of its own.
    fn has_order(&self, relation: &Relation, holds: bool) -> bool {
        match relation {
            Relation::Always | Relation::Never => false,
            Relation::Atom(_) => holds && self.order_of(relation).is_some(),
            Relation::Not(inner) => self.has_order(inner, !holds),
            Relation::All(parts) | Relation::Any(parts) => {
                parts.iter().any(|part| self.has_order(part, holds))
            }
        }
    }

    /// The order that packs an atom's pairs, if that is not the natural one.
    fn order_of(&self, relation: &Relation) -> Option<Order> {
        let Relation::Atom(atom) = relation else {
            return None;
        };
        match *atom {
            Atom::Congruent { modulus } => Some(Order::Residues(modulus)),
            Atom::Keys { gather, .. } => self
                .is_scattered(gather, 0, self.blocks.key)
                .then(|| Order::Keys(vec![gather])),
            Atom::Queries { gather, .. } => self
                .is_scattered(gather, self.lengths.first_position, self.blocks.query)
                .then(|| Order::Queries(vec![gather])),
            _ => None,
        }
    }

    /// Whether gathering a set saves blocks. A part of its own has a price as well, about that of a block.
    fn is_scattered(&self, set: usize, first: usize, block: usize) -> bool {
        let set = &self.tables.sets[set];
        let block_of = |position: &u32| (*position as usize - first) / block;
        let touched = set.chunk_by(|a, b| block_of(a) == block_of(b)).count();
        let needed = set.len().div_ceil(block);
        touched >= needed + 2 && touched >= 2 * needed
    }

    /// Pairs that an order leaves at most.
    fn n_pairs(&self, order: &Order) -> u64 {
        let [queries, keys] = [self.lengths.query_length, self.lengths.key_length];
        let [queries, keys] = [queries as u64, keys as u64];
        let size = |sets: &[usize]| -> u64 {
            let sets = sets.iter().map(|&set| self.tables.sets[set].len() as u64);
            sets.sum()
        };
        match order {
            Order::Natural => queries * keys,
            Order::Residues(modulus) => queries * keys / u64::from(*modulus),
            Order::Keys(sets) => queries * size(sets),
            Order::Queries(sets) => size(sets) * keys,
        }
    }
}
