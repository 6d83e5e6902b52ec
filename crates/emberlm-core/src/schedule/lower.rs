//! From a pattern to a relation over tables.

use std::collections::HashMap;
use std::ops::Range;

use super::listed_blocks::ListedBlocks;
use super::relation::{Atom, Documents, Relation, Tables, UNBOUNDED};
use crate::pattern::{
    BatchData, BlockPlan, Fixed, Global, Lengths, Pattern, RandomBlocks, Reach, Strided,
};

/// Turns patterns into relations and collects what these refer to. Equal tables are made once.
pub(super) struct Lowering<'a> {
    lengths: &'a Lengths,
    data: &'a BatchData,
    pub(super) tables: Tables,
    sets: HashMap<Vec<u32>, usize>,
    random: HashMap<RandomBlocks, usize>,
    plans: HashMap<BlockPlan, usize>,
    documents: HashMap<Documents, usize>,
}

impl<'a> Lowering<'a> {
    pub(super) fn new(lengths: &'a Lengths, data: &'a BatchData) -> Self {
        Self {
            lengths,
            data,
            tables: Tables::default(),
            sets: HashMap::new(),
            random: HashMap::new(),
            plans: HashMap::new(),
            documents: HashMap::new(),
        }
    }

    /// The relation of one batch row and head, without hidden keys.
    pub(super) fn visible(&mut self, pattern: &Pattern, batch: usize, head: usize) -> Relation {
        let relation = self.lower(pattern, batch, head);
        let Some(hidden) = self.data.hidden_keys(batch) else {
            return relation;
        };
        let hidden: Vec<u32> = (0_u32..)
            .zip(hidden)
            .filter(|(_, hidden)| **hidden)
            .map(|(key, _)| key)
            .collect();
        let shown = self.keys(hidden, None).negated();
        Relation::all([relation, shown])
    }

    fn lower(&mut self, pattern: &Pattern, batch: usize, head: usize) -> Relation {
        match pattern {
            Pattern::Full => Relation::Always,
            Pattern::Causal => causal(),
            Pattern::Window(window) => Relation::band(-bound(window.ahead), bound(window.back)),
            Pattern::Dilated(dilated) => {
                let reach = |n: usize| bound(n.saturating_mul(dilated.dilation));
                let [back, ahead] = [dilated.window.back, dilated.window.ahead].map(reach);
                let congruent = self.congruent(dilated.dilation);
                Relation::all([Relation::band(-ahead, back), congruent])
            }
            Pattern::Strided(strided) => {
                let stride = strided.stride();
                let local = Relation::band(0, bound(stride));
                let column = Relation::all([causal(), self.congruent(stride)]);
                match strided {
                    Strided::Merged { .. } => Relation::any([local, column]),
                    Strided::Local { .. } => local,
                    Strided::Column { .. } => column,
                }
            }
            Pattern::Fixed(fixed) => {
                let local = blocks(fixed.stride(), 0, 0);
                let visible = match (fixed, fixed.columns()) {
                    (Fixed::Merged { .. }, Some(columns)) => {
                        Relation::any([local, self.columns(fixed.stride(), columns)])
                    }
                    (_, Some(columns)) => self.columns(fixed.stride(), columns),
                    (_, None) => local,
                };
                Relation::all([causal(), visible])
            }
            Pattern::Blockwise(blockwise) => blocks(
                blockwise.block,
                -bound(blockwise.look_ahead),
                bound(blockwise.look_back),
            ),
            Pattern::Global(global) => {
                let queries = self.global_queries(global, batch);
                Relation::any([queries, self.global_keys(global, batch)])
            }
            Pattern::GlobalQueries(global) => self.global_queries(global, batch),
            Pattern::GlobalKeys(global) => self.global_keys(global, batch),
            Pattern::Random(random) => self.random(random),
            Pattern::Blocks(plan) => self.planned(plan),
            Pattern::Prefix(n) | Pattern::Sinks(n) => {
                let keys = positions(0..(*n).min(self.lengths.key_length));
                self.keys(keys, None)
            }
            Pattern::Documents => self.same_document(batch),
            Pattern::And(patterns) => {
                let parts: Vec<_> = self.lower_each(patterns, batch, head);
                Relation::all(parts)
            }
            Pattern::Or(patterns) => {
                let parts: Vec<_> = self.lower_each(patterns, batch, head);
                Relation::any(parts)
            }
            Pattern::Not(pattern) => self.lower(pattern, batch, head).negated(),
            Pattern::PerHead(patterns) => self.lower(&patterns[head], batch, head),
        }
    }

    fn lower_each(&mut self, patterns: &[Pattern], batch: usize, head: usize) -> Vec<Relation> {
        let lower = |pattern| self.lower(pattern, batch, head);
        patterns.iter().map(lower).collect()
    }

    fn congruent(&self, modulus: usize) -> Relation {
        if modulus == 1 {
            return Relation::Always;
        }
        let Lengths { key_length, .. } = *self.lengths;
        if modulus >= key_length.max(self.lengths.query_end()) {
            // No two different positions are congruent.
            return Relation::band(0, 0);
        }
        let modulus = modulus as u32;
        Relation::Atom(Atom::Congruent { modulus })
    }

    /// The keys of some columns of each stride block.
    fn columns(&mut self, stride: usize, [from, to]: [usize; 2]) -> Relation {
        let key_length = self.lengths.key_length;
        let starts = (0..key_length).step_by(stride);
        let keys: Vec<u32> = starts
            .flat_map(|start| {
                let from = start.saturating_add(from).min(key_length);
                let to = start.saturating_add(to).min(key_length);
                positions(from..to)
            })
            .collect();
        self.keys(keys, None)
    }

    fn global_queries(&mut self, global: &Global, batch: usize) -> Relation {
        let queries = self.lengths.first_position..self.lengths.query_end();
        let (own, union) = self.global_within(global, batch, queries);
        self.queries(own, union)
    }

    fn global_keys(&mut self, global: &Global, batch: usize) -> Relation {
        let (own, union) = self.global_within(global, batch, 0..self.lengths.key_length);
        self.keys(own, union)
    }

    /// The global positions of a batch row within a range, and those of all batch rows where each has its own.
    fn global_within(
        &self,
        global: &Global,
        batch: usize,
        range: Range<usize>,
    ) -> (Vec<u32>, Option<Vec<u32>>) {
        let within = |set: &[usize]| -> Vec<u32> {
            let there = set.iter().filter(|position| range.contains(position));
            there.map(|&position| position as u32).collect()
        };
        match global {
            Global::Positions(given) => (within(given), None),
            Global::First(n) => (positions(range.start.min(*n)..range.end.min(*n)), None),
            Global::Last(n) => {
                let first = self.lengths.key_length.saturating_sub(*n);
                (positions(range.start.max(first)..range.end), None)
            }
            Global::Batch => {
                let rows = 0..self.lengths.batch_size;
                let mut union: Vec<u32> = rows
                    .flat_map(|row| within(self.data.globals(row)))
                    .collect();
                union.sort_unstable();
                union.dedup();
                (within(self.data.globals(batch)), Some(union))
            }
        }
    }

    /// Keys of a set. To gather them for several batch rows at once takes the union of their sets; nothing if it is
    /// the same in all.
    fn keys(&mut self, set: Vec<u32>, union: Option<Vec<u32>>) -> Relation {
        if set.is_empty() {
            return Relation::Never;
        }
        if set.len() == self.lengths.key_length {
            return Relation::Always;
        }
        let set = self.set(set);
        let gather = union.map_or(set, |union| self.set(union));
        Relation::Atom(Atom::Keys { set, gather })
    }

    /// Queries of a set, as [`keys`](Self::keys).
    fn queries(&mut self, set: Vec<u32>, union: Option<Vec<u32>>) -> Relation {
        if set.is_empty() {
            return Relation::Never;
        }
        if set.len() == self.lengths.query_length {
            return Relation::Always;
        }
        let set = self.set(set);
        let gather = union.map_or(set, |union| self.set(union));
        Relation::Atom(Atom::Queries { set, gather })
    }

    fn set(&mut self, positions: Vec<u32>) -> usize {
        if let Some(&set) = self.sets.get(&positions) {
            return set;
        }
        let set = self.tables.sets.len();
        self.tables.sets.push(positions.clone());
        self.sets.insert(positions, set);
        set
    }

    fn random(&mut self, random: &RandomBlocks) -> Relation {
        let n_blocks = random.n_blocks;
        // Where every candidate is drawn the draw is a plain relation, and no table is needed.
        match random.reach {
            Reach::Everywhere if n_blocks >= self.lengths.key_length.div_ceil(random.block) => {
                return Relation::Always;
            }
            Reach::Past if n_blocks >= self.lengths.query_end().div_ceil(random.block) => {
                return blocks(random.block, 0, UNBOUNDED);
            }
            _ => {}
        }
        let (tables, lengths) = (&mut self.tables.listed, self.lengths);
        let rows = *self.random.entry(*random).or_insert_with(|| {
            tables.push(ListedBlocks::random(random, lengths));
            tables.len() - 1
        });
        Relation::Atom(Atom::Listed { rows })
    }

    fn planned(&mut self, plan: &BlockPlan) -> Relation {
        let (tables, lengths) = (&mut self.tables.listed, self.lengths);
        let rows = *self.plans.entry(plan.clone()).or_insert_with(|| {
            tables.push(ListedBlocks::planned(plan, lengths));
            tables.len() - 1
        });
        Relation::Atom(Atom::Listed { rows })
    }

    fn same_document(&mut self, batch: usize) -> Relation {
        let Lengths {
            key_length,
            first_position,
            ..
        } = *self.lengths;
        let queries = first_position..self.lengths.query_end();
        let mut numbers = Numbers::default();
        let keys = self.data.key_documents(batch)[..key_length].iter();
        let keys = keys.map(|&id| numbers.of(id)).collect();
        let queries = self.data.query_documents(batch)[queries].iter();
        let queries = queries.map(|&id| numbers.of(id)).collect();
        let documents = Documents { queries, keys };
        let next = self.tables.documents.len();
        let index = *self.documents.entry(documents.clone()).or_insert(next);
        if index == next {
            self.tables.documents.push(documents);
        }
        Relation::Atom(Atom::SameDocument { documents: index })
    }
}

/// Numbers ids in the order in which they come.
#[derive(Default)]
struct Numbers {
    numbers: HashMap<u32, u32>,
    last: Option<(u32, u32)>,
}

impl Numbers {
    fn of(&mut self, id: u32) -> u32 {
        match self.last {
            Some((last, number)) if last == id => number,
            _ => {
                let next = self.numbers.len() as u32;
                let number = *self.numbers.entry(id).or_insert(next);
                self.last = Some((id, number));
                number
            }
        }
    }
}

fn causal() -> Relation {
    Relation::band(0, UNBOUNDED)
}

fn blocks(block: usize, low: i64, high: i64) -> Relation {
    // A block beyond all positions acts like any other that is.
    let block = block.min(Lengths::LIMIT) as i64;
    Relation::Atom(Atom::Blocks { block, low, high })
}

/// A distance; one beyond all positions becomes no bound.
fn bound(n: usize) -> i64 {
    (n as u64).min(UNBOUNDED as u64) as i64
}

fn positions(range: Range<usize>) -> Vec<u32> {
    range.map(|position| position as u32).collect()
}
