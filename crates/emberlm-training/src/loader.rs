//! Batches of windows as burn-train data loaders.

use std::{ops::Range, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::Device,
};
use emberlm_core::RandomKey;

use crate::{
    Batching, EvaluationWindows, Objective, TokenBatch, TrainingConfig, TrainingWindows,
    objective::Window,
};

/// The micro-batches of a run's steps, in order: each a function of (seed, step, index) alone.
#[derive(Clone)]
pub struct TrainingLoader {
    windows: Arc<TrainingWindows>,
    batching: Batching,
    device: Device,
    micro_batch_size: usize,
    accumulation: usize,
    key: RandomKey,
    micro_batches: Range<usize>,
}

impl TrainingLoader {
    /// The micro-batches of steps `first_step ..= config.steps`, counted from 1, for a causal model.
    pub fn new(
        windows: Arc<TrainingWindows>,
        config: &TrainingConfig,
        first_step: u64,
        device: &Device,
    ) -> Self {
        let accumulation = config.accumulation;
        Self {
            windows,
            batching: Batching::new(Objective::Causal, config.seed),
            device: device.clone(),
            micro_batch_size: config.batch_size / accumulation,
            accumulation,
            key: RandomKey::new(config.seed),
            micro_batches: (first_step as usize - 1) * accumulation
                ..config.steps as usize * accumulation,
        }
    }

    /// The same windows as batches of another kind.
    pub fn with_batching(mut self, batching: Batching) -> Self {
        self.batching = batching;
        self
    }

    fn batch(&self, micro_batch: usize) -> TokenBatch {
        let step = (micro_batch / self.accumulation) as u64 + 1;
        // The windows of a step are numbered through its micro-batches: however a step is split, it sees the same.
        let first = micro_batch % self.accumulation * self.micro_batch_size;
        let windows = first..first + self.micro_batch_size;
        let windows: Vec<Window> = windows
            .map(|index| self.window(step, index as u64))
            .collect();
        TokenBatch {
            dropout_key: Some(self.key.fold(step).fold(first as u64)),
            ..self.batching.batch(&windows, &self.device)
        }
    }

    fn window(&self, step: u64, index: u64) -> Window {
        let start = self.windows.offset(step, index);
        let range = start..start + self.windows.seq_length() + 1;
        let key = self.batching.training_key(step, index);
        self.batching.window(self.windows.stream(), range, key)
    }
}

/// Windows of the held-out text, in order.
#[derive(Clone)]
pub struct EvaluationLoader {
    windows: Arc<EvaluationWindows>,
    batching: Batching,
    device: Device,
    batch_size: usize,
    /// Numbers of windows of equal length, batch by batch.
    batches: Vec<Vec<usize>>,
}

impl EvaluationLoader {
    /// The given windows of the held-out text, for a causal model.
    pub fn new(
        windows: Arc<EvaluationWindows>,
        chosen: &[usize],
        batch_size: usize,
        device: &Device,
    ) -> Self {
        // A batch needs windows of one length: the shorter last one is a batch by itself.
        let last = windows.len().saturating_sub(1);
        let (whole, rest): (Vec<usize>, Vec<usize>) =
            chosen.iter().partition(|window| **window != last);
        let batches = whole
            .chunks(batch_size)
            .chain(rest.chunks(1))
            .map(<[usize]>::to_vec)
            .collect();
        Self {
            windows,
            // A causal model draws nothing.
            batching: Batching::new(Objective::Causal, 0),
            device: device.clone(),
            batch_size,
            batches,
        }
    }

    /// The same windows as batches of another kind, without those that are too short for it.
    pub fn with_batching(mut self, batching: Batching) -> Self {
        let least = batching.objective().least_length();
        let windows = &self.windows;
        (self.batches).retain(|batch| windows.inputs(batch[0]).len() >= least);
        self.batching = batching;
        self
    }

    fn batch(&self, batch: usize) -> TokenBatch {
        let windows = self.batches[batch].iter().map(|window| {
            let inputs = self.windows.inputs(*window);
            let key = self.batching.evaluation_key(*window);
            let range = inputs.start..inputs.end + 1;
            self.batching.window(self.windows.stream(), range, key)
        });
        let windows: Vec<Window> = windows.collect();
        self.batching.batch(&windows, &self.device)
    }
}

/// Walks through the numbered batches of a loader, each of which `make` makes of its number.
pub struct Numbered<F> {
    /// Makes a batch.
    pub make: F,
    /// The numbers of the batches that are left.
    pub next: Range<usize>,
    /// How many batches there are.
    pub total: usize,
}

impl<F: FnMut(usize) -> TokenBatch> Iterator for Numbered<F> {
    type Item = Result<TokenBatch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next.next().map(|batch| Ok((self.make)(batch)))
    }
}

impl<F: FnMut(usize) -> TokenBatch> DataLoaderIterator<TokenBatch> for Numbered<F> {
    fn progress(&self) -> Progress {
        Progress::new(
            self.total - self.next.len(),
            self.total,
            Some("batches".to_owned()),
        )
    }
}

impl DataLoader<TokenBatch> for TrainingLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        Box::new(Numbered {
            make: |batch| self.batch(batch),
            next: self.micro_batches.clone(),
            total: self.micro_batches.len(),
        })
    }

    fn num_items(&self) -> usize {
        self.micro_batches.len() * self.micro_batch_size
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<TokenBatch>> {
        let first = self.micro_batches.start;
        let batch = |item: usize| first + item / self.micro_batch_size;
        Arc::new(Self {
            micro_batches: batch(start)..batch(end).min(self.micro_batches.end),
            ..self.clone()
        })
    }
}

impl DataLoader<TokenBatch> for EvaluationLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        Box::new(Numbered {
            make: |batch| self.batch(batch),
            next: 0..self.batches.len(),
            total: self.batches.len(),
        })
    }

    fn num_items(&self) -> usize {
        self.batches.iter().map(Vec::len).sum()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<TokenBatch>> {
        let chosen: Vec<usize> = self.batches.concat();
        let chosen = &chosen[start.min(chosen.len())..end.min(chosen.len())];
        let windows = self.windows.clone();
        let sliced = Self::new(windows, chosen, self.batch_size, &self.device);
        Arc::new(sliced.with_batching(self.batching.clone()))
    }
}
