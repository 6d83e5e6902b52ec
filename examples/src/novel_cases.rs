//! Cases of a task that needs a long reach: which novel is the end of a text from?

use std::sync::Arc;

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::{Device, Int, Tensor, TensorData},
};
use emberlm::{
    core::{IGNORED_TARGET, RandomKey, TokenBatch},
    training::{Numbered, TrainingConfig},
};
use thiserror::Error;

use crate::{Novel, ngrams::ngrams};

/// What cannot be made cases of.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CaseError {
    /// Nothing is left for the other novel.
    #[error(
        "--seq-length {seq_length} leaves no room before a tail of {tail}: make it longer, or --tail shorter"
    )]
    NoHead {
        /// Tokens of a case.
        seq_length: usize,
        /// Tokens of its tail.
        tail: usize,
    },
    /// There is no end.
    #[error("--tail 0: give at least 1")]
    NoTail,
    /// Nothing is measured.
    #[error("--cases 0: give at least 1")]
    NoCases,
    /// A part of a novel is shorter than what is cut from it.
    #[error(
        "the {part} part of {novel} has {length} bytes, a case takes {needed}: choose a shorter --seq-length"
    )]
    TooShort {
        /// Which novel.
        novel: String,
        /// `training` or `held-out`.
        part: &'static str,
        /// Its bytes.
        length: usize,
        /// Bytes that a case takes of it.
        needed: usize,
    },
}

/// A text of stretches, each of another novel than the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// `seq_length` bytes.
    pub text: Vec<u8>,
    /// The stretches, in order. The last is the end, whose novel is the class.
    pub stretches: Vec<Stretch>,
}

/// A part of a case, up to where the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins.
    pub start: usize,
    /// The novel that it is of.
    pub novel: usize,
}

impl Case {
    /// The novel that the end is of: the class.
    pub fn end(&self) -> usize {
        self.stretches.last().expect("a case has an end").novel
    }

    /// The novel at a position.
    fn novel_at(&self, position: usize) -> usize {
        let n_begun = (self.stretches).partition_point(|stretch| stretch.start <= position);
        self.stretches[n_begun - 1].novel
    }
}

/// Cases of novels: each is a function of a few numbers, so that a resumed run sees what it would have seen.
///
/// A held-out case has two stretches: the end, the last `tail` bytes, is of any novel with equal chance, the rest of any of
/// the others, both from any place of the novel's held-out part. Who knows nothing names the end's novel in one of `n` cases,
/// for `n` novels; who knows which novel the rest is of, in one of `n - 1`.
///
/// A case asks for the novel of its end at the first position. A single answer in thousands of bytes teaches little, so
/// training is richer in two ways. Its cases are patchwork: the rest too is cut into stretches of `tail` bytes, each of any
/// novel but that of its neighbour. And they ask besides, in the middle of each stretch, for its novel.
#[derive(Debug)]
pub struct NovelCases {
    novels: Vec<Novel>,
    seq_length: usize,
    tail: usize,
    key: RandomKey,
}

impl NovelCases {
    /// Cases of `seq_length` bytes; those that are trained on are drawn from `seed`, the held-out ones are always the same.
    ///
    /// # Errors
    ///
    /// A tail that is empty or as long as the case, or a part of a novel that is shorter than the rest of a case or than
    /// its tail.
    pub fn new(
        novels: Vec<Novel>,
        seq_length: usize,
        tail: usize,
        seed: u64,
    ) -> Result<Self, CaseError> {
        if tail == 0 {
            return Err(CaseError::NoTail);
        }
        if tail >= seq_length {
            return Err(CaseError::NoHead { seq_length, tail });
        }
        let needed = tail.max(seq_length - tail);
        for novel in &novels {
            let parts = [("training", &novel.training), ("held-out", &novel.held_out)];
            if let Some((part, text)) = parts.into_iter().find(|(_, text)| text.len() < needed) {
                return Err(CaseError::TooShort {
                    novel: novel.name.clone(),
                    part,
                    length: text.len(),
                    needed,
                });
            }
        }
        Ok(Self {
            novels,
            seq_length,
            tail,
            key: RandomKey::new(seed).fold_str("cases"),
        })
    }

    /// Number of novels: the classes.
    pub fn n_novels(&self) -> usize {
        self.novels.len()
    }

    /// Number of answers that a case asks for in training.
    pub fn n_asked(&self) -> usize {
        1 + self.middles().count()
    }

    /// The middles of stretches of `tail` bytes, from that of the end on; the first position is none.
    fn middles(&self) -> impl Iterator<Item = usize> {
        let last = self.seq_length - self.tail.div_ceil(2);
        (1..=last).rev().step_by(self.tail)
    }

    /// The classes that are asked for in training, by position.
    fn training_targets(&self, case: &Case) -> Vec<i64> {
        let mut targets = self.held_out_targets(case);
        for middle in self.middles() {
            targets[middle] = case.novel_at(middle) as i64;
        }
        targets
    }

    /// The class that is measured, by position.
    fn held_out_targets(&self, case: &Case) -> Vec<i64> {
        let mut targets = vec![IGNORED_TARGET; self.seq_length];
        targets[0] = case.end() as i64;
        targets
    }

    /// Case `index` of a step, of what is trained on.
    pub fn training(&self, step: u64, index: u64) -> Case {
        let key = self.key.fold(step).fold(index);
        let n_stretches = self.seq_length.div_ceil(self.tail);
        self.case(key, n_stretches, |novel| &novel.training)
    }

    /// A held-out case, whatever the seed.
    pub fn held_out(&self, number: u64) -> Case {
        let key = RandomKey::new(0).fold_str("held-out cases").fold(number);
        self.case(key, 2, |novel| &novel.held_out)
    }

    /// A case of so many stretches, all of the length of the end but the first. They are drawn from the end on.
    fn case(&self, key: RandomKey, n_stretches: usize, part: impl Fn(&Novel) -> &[u8]) -> Case {
        let n = self.novels.len();
        let mut text = vec![0; self.seq_length];
        let mut stretches: Vec<Stretch> = Vec::with_capacity(n_stretches);
        let mut end = self.seq_length;
        for number in 0..n_stretches {
            let key = key.fold(number as u64);
            let below = |draw, n: usize| key.below(draw, n as u64) as usize;
            let novel = match stretches.last() {
                None => below(0, n),
                Some(next) => (next.novel + 1 + below(0, n - 1)) % n,
            };
            let start = match number + 1 == n_stretches {
                true => 0,
                false => end - self.tail,
            };
            let from = part(&self.novels[novel]);
            let at = below(1, from.len() - (end - start) + 1);
            text[start..end].copy_from_slice(&from[at..at + (end - start)]);
            stretches.push(Stretch { start, novel });
            end = start;
        }
        stretches.reverse();
        Case { text, stretches }
    }
}

fn batch(cases: &[Case], targets: impl Fn(&Case) -> Vec<i64>, device: &Device) -> TokenBatch {
    let tensor = |values: Vec<i64>| {
        let shape = [cases.len(), values.len() / cases.len()];
        Tensor::<2, Int>::from_data(TensorData::new(values, shape), device)
    };
    let tokens = cases.iter().flat_map(|case| ngrams(&case.text));
    TokenBatch::new(
        tensor(tokens.collect()),
        tensor(cases.iter().flat_map(targets).collect()),
    )
}

/// Batches of cases, in order.
#[derive(Clone)]
pub struct CaseLoader {
    cases: Arc<NovelCases>,
    kind: Kind,
    batch_size: usize,
    /// Numbers of the first and of the last case, counted through all batches.
    first: usize,
    last: usize,
    device: Device,
}

#[derive(Clone)]
enum Kind {
    /// The micro-batches of a run's steps.
    Training { per_step: usize, key: RandomKey },
    /// Held-out cases.
    HeldOut,
}

impl CaseLoader {
    /// The micro-batches of steps `first_step ..= config.steps`, counted from 1.
    pub fn training(
        cases: Arc<NovelCases>,
        config: &TrainingConfig,
        first_step: u64,
        device: &Device,
    ) -> Self {
        let per_step = config.batch_size;
        Self {
            cases,
            kind: Kind::Training {
                per_step,
                key: RandomKey::new(config.seed),
            },
            batch_size: per_step / config.accumulation,
            first: (first_step as usize - 1) * per_step,
            last: config.steps as usize * per_step,
            device: device.clone(),
        }
    }

    /// The first `n_cases` held-out ones.
    pub fn held_out(
        cases: Arc<NovelCases>,
        n_cases: usize,
        batch_size: usize,
        device: &Device,
    ) -> Self {
        Self {
            cases,
            kind: Kind::HeldOut,
            batch_size,
            first: 0,
            last: n_cases,
            device: device.clone(),
        }
    }

    fn batch(&self, number: usize) -> TokenBatch {
        let first = self.first + number * self.batch_size;
        let numbers = first..self.last.min(first + self.batch_size);
        match &self.kind {
            Kind::HeldOut => {
                let cases = numbers.map(|number| self.cases.held_out(number as u64));
                let targets = |case: &Case| self.cases.held_out_targets(case);
                batch(&cases.collect::<Vec<_>>(), targets, &self.device)
            }
            Kind::Training { per_step, key } => {
                let step = |number: usize| (number / per_step) as u64 + 1;
                let index = |number: usize| (number % per_step) as u64;
                let case = |number| self.cases.training(step(number), index(number));
                let cases = numbers.map(case);
                let targets = |case: &Case| self.cases.training_targets(case);
                TokenBatch {
                    dropout_key: Some(key.fold(step(first)).fold(index(first))),
                    ..batch(&cases.collect::<Vec<_>>(), targets, &self.device)
                }
            }
        }
    }
}

impl DataLoader<TokenBatch> for CaseLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        let total = self.num_items().div_ceil(self.batch_size);
        Box::new(Numbered {
            make: |number| self.batch(number),
            next: 0..total,
            total,
        })
    }

    fn num_items(&self) -> usize {
        self.last.saturating_sub(self.first)
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            first: self.last.min(self.first + start),
            last: self.last.min(self.first + end),
            ..self.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::choose_device;

    /// Novel `i` has the bytes from `40 i` on in its training part, and from `40 i + 20` on in its held-out part.
    fn novels(n: usize) -> Vec<Novel> {
        let part = |first: usize, length: usize| -> Vec<u8> {
            (0..length).map(|at| (first + at % 20) as u8).collect()
        };
        let novel = |i: usize| Novel {
            name: format!("novel {i}"),
            training: part(40 * i, 100 + i),
            held_out: part(40 * i + 20, 30),
        };
        (0..n).map(novel).collect()
    }

    fn cases(seed: u64) -> NovelCases {
        NovelCases::new(novels(6), 20, 6, seed).unwrap()
    }

    fn novel_and_part(byte: u8) -> (usize, bool) {
        (usize::from(byte) / 40, byte % 40 >= 20)
    }

    #[test]
    fn each_stretch_is_of_another_novel_than_the_next() {
        let cases = cases(3);
        let training = (0..500).map(|i| (false, vec![0, 2, 8, 14], cases.training(i / 4, i % 4)));
        let held_out = (0..500).map(|i| (true, vec![0, 14], cases.held_out(i)));
        for (is_held_out, starts, case) in training.chain(held_out) {
            let begin = case.stretches.iter().map(|stretch| stretch.start);
            assert!(begin.eq(starts.iter().copied()));
            let ends = starts.iter().skip(1).copied().chain([20]);
            for (stretch, end) in case.stretches.iter().zip(ends) {
                let bytes = &case.text[stretch.start..end];
                let of: HashSet<_> = bytes.iter().map(|byte| novel_and_part(*byte)).collect();
                assert_eq!(of, HashSet::from([(stretch.novel, is_held_out)]));
                // It is one piece.
                let follows = |pair: &[u8]| pair[1] == pair[0] + 1 || pair[0] % 20 == 19;
                assert!(bytes.windows(2).all(follows));
                assert_eq!(case.novel_at(end - 1), stretch.novel);
            }
            let neighbours = case.stretches.windows(2);
            assert!(
                neighbours
                    .into_iter()
                    .all(|pair| pair[0].novel != pair[1].novel)
            );
            assert_eq!(case.end(), novel_and_part(case.text[19]).0);
        }
    }

    #[test]
    fn novels_and_places_are_drawn_alike() {
        let cases = cases(3);
        let mut pairs = [[0; 6]; 6];
        let mut starts = HashSet::new();
        for i in 0..6000 {
            let case = cases.held_out(i);
            pairs[case.end()][case.stretches[0].novel] += 1;
            starts.insert(case.text[0]);
        }
        for (end, row) in pairs.iter().enumerate() {
            for (rest, n) in row.iter().enumerate() {
                // Each is binomial with mean 200 and deviation 14.
                let expected = if end == rest { 0 } else { 200 };
                assert!(i32::abs_diff(*n, expected) < 4 * 14, "{pairs:?}");
            }
        }
        assert_eq!(starts.len(), 6 * 17);
    }

    #[test]
    fn a_case_is_a_function_of_seed_step_and_index() {
        let (first, again, other) = (cases(3), cases(3), cases(4));
        assert_eq!(first.training(7, 2), again.training(7, 2));
        for case in [
            other.training(7, 2),
            first.training(8, 2),
            first.training(7, 3),
            first.held_out(2),
        ] {
            assert_ne!(case, first.training(7, 2));
        }
        // What is measured does not depend on the seed.
        assert_eq!(first.held_out(5), other.held_out(5));
        assert_ne!(first.held_out(5), first.held_out(6));
    }

    /// The tokens of a row, and which of its positions are asked for what.
    type Row = (Vec<i64>, Vec<(usize, i64)>);

    /// The inputs of each row, and its targets by position.
    fn rows(batch: &TokenBatch) -> Vec<Row> {
        let [_, seq_length] = batch.inputs.dims();
        assert_eq!(batch.targets.dims(), batch.inputs.dims());
        let rows = |values: &Tensor<2, Int>| -> Vec<Vec<i64>> {
            let values: Vec<i64> = values.to_data().iter::<i64>().collect();
            values.chunks(seq_length).map(<[i64]>::to_vec).collect()
        };
        let targets = rows(&batch.targets).into_iter().map(|row| {
            let asked = row.into_iter().enumerate();
            asked.filter(|(_, t)| *t != IGNORED_TARGET).collect()
        });
        rows(&batch.inputs).into_iter().zip(targets).collect()
    }

    #[test]
    fn a_loader_begins_at_any_step_and_splits_them() {
        let (_, device) = choose_device(None).unwrap();
        let cases = Arc::new(cases(3));
        let config = TrainingConfig::new(5, 4, 20).with_seed(3);
        let all = |config: &TrainingConfig, first_step| -> Vec<TokenBatch> {
            let loader = CaseLoader::training(cases.clone(), config, first_step, &device);
            let batches: Vec<_> = loader.iter().map(Result::unwrap).collect();
            let n_items: usize = batches.iter().map(|batch| batch.inputs.dims()[0]).sum();
            assert_eq!(loader.num_items(), n_items);
            batches
        };
        let whole = all(&config, 1);
        assert_eq!(whole.len(), 5);
        let case = cases.training(2, 3);
        let text = ngrams(&case.text).collect();
        let of = |stretch: usize| case.stretches[stretch].novel as i64;
        // The end is of bytes 14 to 19; the first stretch has two, and no middle.
        let asked = vec![(0, of(3)), (5, of(1)), (11, of(2)), (17, of(3))];
        assert_eq!(cases.n_asked(), asked.len());
        assert_eq!(rows(&whole[1])[3], (text, asked));
        for (later, whole) in all(&config, 4).iter().zip(&whole[3..]) {
            assert_eq!(rows(later), rows(whole));
            assert_eq!(later.dropout_key, whole.dropout_key);
        }
        // Micro-batches see the same cases, with keys of their own.
        let halves = all(&config.clone().with_accumulation(2), 1);
        assert_eq!(halves.len(), 10);
        for (halves, whole) in halves.chunks(2).zip(&whole) {
            let both: Vec<_> = halves.iter().flat_map(rows).collect();
            assert_eq!(both, rows(whole));
            assert_ne!(halves[0].dropout_key, halves[1].dropout_key);
        }
    }

    #[test]
    fn held_out_cases_come_once_without_dropout() {
        let (_, device) = choose_device(None).unwrap();
        let cases = Arc::new(cases(3));
        let loader = CaseLoader::held_out(cases.clone(), 7, 3, &device);
        let batches: Vec<TokenBatch> = loader.iter().map(Result::unwrap).collect();
        assert!(batches.iter().all(|batch| batch.dropout_key.is_none()));
        let all: Vec<_> = batches.iter().flat_map(rows).collect();
        let ends = (0..7).map(|i| vec![(0, cases.held_out(i).end() as i64)]);
        assert!(all.iter().map(|(_, asked)| asked.clone()).eq(ends));
        let part: Vec<_> = loader.slice(2, 6).iter().map(Result::unwrap).collect();
        let part: Vec<_> = part.iter().flat_map(rows).collect();
        assert_eq!(part, all[2..6]);
    }

    #[test]
    fn what_is_impossible_says_why() {
        let new = |seq_length, tail| NovelCases::new(novels(6), seq_length, tail, 0);
        for (error, mention) in [
            (new(20, 0), "--tail 0"),
            (
                new(6, 6),
                "--seq-length 6 leaves no room before a tail of 6",
            ),
            (
                new(37, 6),
                "the held-out part of novel 0 has 30 bytes, a case takes 31",
            ),
            (
                new(37, 31),
                "the held-out part of novel 0 has 30 bytes, a case takes 31",
            ),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(mention), "{error}");
        }
        assert!(new(36, 6).is_ok());
    }
}
