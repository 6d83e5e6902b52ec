//! Batches of windows as burn-train data loaders.

use std::{ops::Range, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::{Device, Int, Tensor, TensorData},
};
use emberlm_core::RandomKey;

use crate::{EvaluationWindows, TokenBatch, TrainingConfig, TrainingWindows};

/// The micro-batches of a run's steps, in order: each a function of (seed, step, index) alone.
#[derive(Clone)]
pub struct TrainingLoader {
    windows: Arc<TrainingWindows>,
    device: Device,
    micro_batch_size: usize,
    accumulation: usize,
    key: RandomKey,
    micro_batches: Range<usize>,
}

impl TrainingLoader {
    /// The micro-batches of steps `first_step ..= config.steps`, counted from 1.
    pub fn new(
        windows: Arc<TrainingWindows>,
        config: &TrainingConfig,
        first_step: u64,
        device: &Device,
    ) -> Self {
        let accumulation = config.accumulation;
        Self {
            windows,
            device: device.clone(),
            micro_batch_size: config.batch_size / accumulation,
            accumulation,
            key: RandomKey::new(config.seed),
            micro_batches: (first_step as usize - 1) * accumulation
                ..config.steps as usize * accumulation,
        }
    }

    fn batch(&self, micro_batch: usize) -> TokenBatch {
        let step = (micro_batch / self.accumulation) as u64 + 1;
        // The windows of a step are numbered through its micro-batches: however a step is split, it sees the same.
        let first = micro_batch % self.accumulation * self.micro_batch_size;
        let seq_length = self.windows.seq_length();
        let mut inputs = Vec::with_capacity(self.micro_batch_size * seq_length);
        let mut targets = Vec::with_capacity(self.micro_batch_size * seq_length);
        let mut window = vec![0; seq_length + 1];
        for index in first..first + self.micro_batch_size {
            self.windows.sample(step, index as u64, &mut window);
            inputs.extend_from_slice(&window[..seq_length]);
            targets.extend_from_slice(&window[1..]);
        }
        let rows = self.micro_batch_size;
        TokenBatch {
            dropout_key: Some(self.key.fold(step).fold(first as u64)),
            ..TokenBatch::new(
                token_tensor(&inputs, rows, &self.device),
                token_tensor(&targets, rows, &self.device),
            )
        }
    }
}

/// Windows of the held-out text, in order.
#[derive(Clone)]
pub struct EvaluationLoader {
    windows: Arc<EvaluationWindows>,
    device: Device,
    batch_size: usize,
    /// Numbers of windows of equal length, batch by batch.
    batches: Vec<Vec<usize>>,
}

impl EvaluationLoader {
    /// The given windows of the held-out text.
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
            device: device.clone(),
            batch_size,
            batches,
        }
    }

    fn batch(&self, batch: usize) -> TokenBatch {
        let rows = &self.batches[batch];
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for window in rows {
            let (input, target) = self.windows.get(*window);
            inputs.extend(input);
            targets.extend(target);
        }
        TokenBatch::new(
            token_tensor(&inputs, rows.len(), &self.device),
            token_tensor(&targets, rows.len(), &self.device),
        )
    }
}

/// `[rows, tokens.len() / rows]`
fn token_tensor(tokens: &[u32], rows: usize, device: &Device) -> Tensor<2, Int> {
    let shape = [rows, tokens.len() / rows];
    let tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
    Tensor::from_data(TensorData::new(tokens, shape), device)
}

/// Walks through the numbered batches of a loader.
pub(crate) struct Numbered<F> {
    pub(crate) make: F,
    pub(crate) next: Range<usize>,
    pub(crate) total: usize,
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
        Arc::new(Self::new(
            self.windows.clone(),
            chosen,
            self.batch_size,
            &self.device,
        ))
    }
}
