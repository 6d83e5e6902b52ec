//! The training loop: burn-train drives it, and it owns model, optimizer, schedule and checkpoints.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    CheckpointStore, LanguageModel, MetricsLog, RoutingRecord, Session, StepOutput, StepProgress,
    StepRecord, TokenBatch, Trainable, TrainingConfig, TrainingError, global_norm,
    peak_memory_bytes, register_metrics, scale_gradients,
};
use burn::{
    data::{
        dataloader::{DataLoader, Progress},
        dataset::DatasetError,
    },
    module::Module,
    optim::GradientsAccumulator,
    train::{
        EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent,
        SupervisedLearningStrategy, SupervisedTraining, SupervisedTrainingEventProcessor,
        TrainLoader, TrainStep, TrainingComponents, TrainingItem, TrainingStrategy, ValidLoader,
        logger::InMemoryMetricLogger, renderer::MetricsRenderer,
    },
};
use emberlm_core::{RoutingStatistics, StepSoFar};

/// So many steps in a row without a finite loss and gradient end a run.
pub const MAX_SKIPPED_IN_A_ROW: u64 = 10;

// The first steps of a process allocate and warm up; its speed is measured after them.
const UNTIMED_STEPS: u64 = 2;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// It was asked to stop, finished its step and saved.
    Interrupted,
    /// The last [`MAX_SKIPPED_IN_A_ROW`] steps had no finite loss and gradient; it saved and stopped.
    Diverged,
}

/// Trains a [`LanguageModel`] step by step.
///
/// Each step: forward and backward of its micro-batches, finiteness, global clip, schedule, optimizer. A step whose
/// loss or gradient is not finite changes nothing but the counters. Every `validate_every` steps it looks at the
/// validation windows; every `checkpoint_every` steps, at a new best validation loss, when it stops and at the end
/// it publishes a checkpoint.
pub struct Trainer<N: Trainable> {
    /// The configuration.
    pub config: TrainingConfig,
    /// Model, optimizer and counters.
    pub session: Session<LanguageModel<N>>,
    /// Where checkpoints go.
    pub checkpoints: CheckpointStore,
    /// Where the figures of each step go.
    pub metrics: MetricsLog,
}

/// A trainer after its run, and how the run ended.
pub type Trained<N> = (Trainer<N>, Result<Ending, TrainingError>);

/// How a run is watched.
pub struct Watch {
    /// Draws the figures; nothing means burn-train's choice, which is the dashboard on a terminal.
    pub renderer: Option<Box<dyn MetricsRenderer>>,
    /// Stops the run after the current step.
    pub interrupter: Interrupter,
    /// Mean length of a token in bytes of text, of which the bits per byte are made: 1 for a model of bytes, else
    /// [`TokenStream::bytes_per_token`](emberlm_text::TokenStream::bytes_per_token), best of the held-out text. Nothing
    /// where the targets are no text.
    pub bytes_per_token: Option<f64>,
}

impl<N: Trainable> Trainer<N> {
    /// Trains to the last step, or until it is asked to stop, and gives everything back.
    ///
    /// `training` must begin at the session's next step. `folder` is the run's.
    ///
    /// # Panics
    ///
    /// If the dashboard's user kills the run, with burn-train's message.
    pub fn train(
        self,
        training: Arc<dyn DataLoader<TokenBatch>>,
        validation: Arc<dyn DataLoader<TokenBatch>>,
        folder: &Path,
        watch: Watch,
    ) -> Trained<N> {
        // burn-train's learner has no way to hand out its optimizer's state, so the strategy owns all of it, and the
        // learner gets what its constructor asks for.
        let learner = Learner::new(
            self.session.model.clone(),
            self.session.optimizer.clone(),
            self.config.learning_rate,
        );
        let n_epochs = self.config.steps.div_ceil(self.config.validate_every) as usize;
        let routes = self.session.model.model.n_routed_layers() > 0;
        let epochs_done = (self.session.counters.step / self.config.validate_every) as usize;
        let strategy = Arc::new(OwningStrategy {
            trainer: Mutex::new(Some(self)),
            result: Mutex::new(None),
        });
        let mut run = SupervisedTraining::new(folder, training, validation)
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .with_interrupter(watch.interrupter)
            .with_application_logger(None)
            .with_metric_logger(InMemoryMetricLogger::default())
            .num_epochs(n_epochs);
        if epochs_done > 0 {
            // Only numbers the epochs on the dashboard: there is no checkpointer of burn-train's to load from.
            run = run.checkpoint(epochs_done);
        }
        if let Some(renderer) = watch.renderer {
            run = run.renderer(renderer);
        }
        // The renderer is dropped here, which gives the terminal back.
        drop(register_metrics(run, watch.bytes_per_token, routes).launch(learner));
        let take = |slot: &Mutex<Option<_>>| {
            let mut slot = slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            slot.take().expect("the strategy's fit has run")
        };
        take(&strategy.result)
    }

    fn run(
        &mut self,
        events: &mut Events<'_, N>,
        interrupter: &Interrupter,
        training: &dyn DataLoader<TokenBatch>,
        validation: &dyn DataLoader<TokenBatch>,
    ) -> Result<Ending, TrainingError> {
        let mut batches = training.iter();
        let (steps, every) = (self.config.steps, self.config.validate_every);
        let mut n_steps_here = 0;
        let mut idle = IdleExperts::default();
        while self.session.counters.step < steps {
            let epoch = self.session.counters.step / every;
            let (first, last) = (epoch * every, steps.min((epoch + 1) * every));
            events.start_training(epoch, last - first)?;
            while self.session.counters.step < last {
                let begin = Instant::now();
                let (output, skipped) = self.session.step(&self.config, batches.as_mut())?;
                n_steps_here += 1;
                idle.look(&output);
                let step = self.session.counters.step;
                events.trained(output.clone(), step - first, last - first, step)?;
                let timed = n_steps_here > UNTIMED_STEPS;
                self.count_time(begin.elapsed(), timed.then_some(output.n_targets));

                let valid_loss = if step == last {
                    events.end_training(epoch)?;
                    Some(self.validate(events, epoch, validation)?)
                } else {
                    None
                };
                self.record(&output, skipped, begin.elapsed(), valid_loss)?;

                let diverged = self.session.counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW;
                let stop = diverged || interrupter.should_stop();
                let is_best = self.note_best(valid_loss);
                let due = step.is_multiple_of(self.config.checkpoint_every) || step == steps;
                if due || is_best || stop {
                    self.metrics.sync()?;
                    self.session.save(&mut self.checkpoints, valid_loss)?;
                }
                if diverged {
                    return Ok(Ending::Diverged);
                }
                if stop && step < steps {
                    return Ok(Ending::Interrupted);
                }
            }
        }
        Ok(Ending::Finished)
    }

    fn count_time(&mut self, elapsed: Duration, timed_targets: Option<f64>) {
        let counters = &mut self.session.counters;
        counters.seconds += elapsed.as_secs_f64();
        if let Some(n_targets) = timed_targets {
            counters.timed_tokens += n_targets as u64;
            counters.timed_seconds += elapsed.as_secs_f64();
        }
    }

    fn validate(
        &self,
        events: &mut Events<'_, N>,
        epoch: u64,
        validation: &dyn DataLoader<TokenBatch>,
    ) -> Result<f64, TrainingError> {
        let total = validation.num_items() as u64;
        events.start_validation(epoch, total)?;
        let mut done = 0;
        let all = evaluate(&self.session.model, validation, |output, rows| {
            done += rows as u64;
            events.validated(output, done, total)
        })?;
        events.end_validation(epoch)?;
        Ok(all.loss())
    }

    fn note_best(&mut self, valid_loss: Option<f64>) -> bool {
        let best = &mut self.session.counters.best_valid_loss;
        match valid_loss {
            Some(loss) if loss.is_finite() && best.is_none_or(|best| loss < best) => {
                *best = Some(loss);
                true
            }
            _ => false,
        }
    }

    fn record(
        &mut self,
        output: &StepOutput,
        skipped: bool,
        elapsed: Duration,
        valid_loss: Option<f64>,
    ) -> Result<(), TrainingError> {
        let progress = output.progress.expect("a training step has progress");
        self.metrics.append(&StepRecord {
            step: self.session.counters.step,
            train_loss: Some(output.loss()),
            learning_rate: progress.learning_rate,
            gradient_norm: Some(progress.gradient_norm),
            tokens_per_second: Some(output.n_targets / elapsed.as_secs_f64()),
            peak_memory_bytes: progress.peak_memory_bytes,
            seconds: self.session.counters.seconds,
            skipped,
            valid_loss,
            routing: RoutingRecord::of(output),
        })?;
        Ok(())
    }
}

impl<N: Trainable> Session<LanguageModel<N>> {
    /// One optimizer step, or none where the loss or the gradient is not finite: then `true`.
    ///
    /// Takes the step's micro-batches from `batches`. Neither saves nor logs anything: that is the trainer's.
    ///
    /// # Errors
    ///
    /// If a batch cannot be loaded.
    ///
    /// # Panics
    ///
    /// If there are fewer batches than `config.accumulation`.
    pub fn step(
        &mut self,
        config: &TrainingConfig,
        batches: &mut dyn Iterator<Item = Result<TokenBatch, DatasetError>>,
    ) -> Result<(StepOutput, bool), TrainingError> {
        let mut output = StepOutput::empty();
        let mut accumulator = GradientsAccumulator::new();
        for _ in 0..config.accumulation {
            let batch = batches
                .next()
                .expect("the loader has the micro-batches of every step")
                .map_err(|error| TrainingError::Data(error.to_string()))?;
            let batch = TokenBatch {
                so_far: so_far(self.counters.step, &output),
                ..batch
            };
            let micro = TrainStep::step(&self.model, batch);
            output.add(&micro.item);
            accumulator.accumulate(&self.model, micro.grads);
        }
        let gradients = accumulator.grads();
        // The gradients are of the sum over the targets; the mean's are a factor away.
        let n_targets = output.n_targets;
        let gradient_norm = global_norm(&self.model, &gradients) / n_targets;
        let counters = &mut self.counters;
        counters.step += 1;
        let learning_rate = config.schedule().at(counters.step);
        let skipped = !(output.nll_sum.is_finite() && gradient_norm.is_finite());
        if skipped {
            counters.skipped += 1;
            counters.skipped_in_a_row += 1;
        } else {
            counters.skipped_in_a_row = 0;
            let clip = (config.max_gradient_norm / gradient_norm).min(1.0);
            let gradients = scale_gradients(&self.model, gradients, clip / n_targets);
            self.model = self
                .optimizer
                .step(learning_rate, self.model.clone(), gradients);
            if !output.routing.is_empty() {
                self.model = self.model.clone().after_step(&output.routing);
            }
        }
        output.progress = Some(StepProgress {
            learning_rate,
            gradient_norm,
            tokens_per_second: counters.tokens_per_second(),
            peak_memory_bytes: peak_memory_bytes(),
        });
        Ok((output, skipped))
    }
}

/// After so many steps in a row without a token an expert is called idle.
const IDLE_STEPS: u64 = 100;

/// For how many steps in a row experts have had no token, by layer and expert.
#[derive(Default)]
struct IdleExperts(HashMap<(usize, usize), u64>);

impl IdleExperts {
    /// Writes a line to the log for each expert that has had none for long, once each time.
    fn look(&mut self, output: &StepOutput) {
        for (layer, routing) in &output.routing {
            for (expert, load) in routing.load.iter().enumerate() {
                let steps = self.0.entry((*layer, expert)).or_default();
                *steps = if *load == 0 { *steps + 1 } else { 0 };
                if *steps == IDLE_STEPS {
                    log::warn!(
                        "layer {layer}: expert {expert} has had no token for {IDLE_STEPS} steps"
                    );
                }
            }
        }
    }
}

/// What a micro-batch is told of its step.
fn so_far(step: u64, output: &StepOutput) -> StepSoFar {
    let load =
        |(layer, routing): &(usize, RoutingStatistics)| (*layer, routing.load.clone().into());
    StepSoFar {
        step,
        loads: output.routing.iter().map(load).collect(),
    }
}

/// The figures of a model over all batches of a loader, without dropout: [`StepOutput::loss`] is the mean loss.
///
/// `watch` is told each batch's figures and number of sequences.
///
/// # Errors
///
/// Those of the loader, and of `watch`.
pub fn evaluate<N: Trainable>(
    model: &LanguageModel<N>,
    loader: &dyn DataLoader<TokenBatch>,
    mut watch: impl FnMut(StepOutput, usize) -> Result<(), TrainingError>,
) -> Result<StepOutput, TrainingError> {
    let model = model.valid();
    let mut all = StepOutput::empty();
    for batch in loader.iter() {
        let batch = batch.map_err(|error| TrainingError::Data(error.to_string()))?;
        let [rows, _] = batch.inputs.dims();
        let output = InferenceStep::step(&model, batch);
        all.add(&output);
        watch(output, rows)?;
    }
    Ok(all)
}

/// Hands a [`Trainer`] to burn-train and back.
struct OwningStrategy<N: Trainable> {
    trainer: Mutex<Option<Trainer<N>>>,
    result: Mutex<Option<Trained<N>>>,
}

impl<N: Trainable> SupervisedLearningStrategy<LanguageModel<N>> for OwningStrategy<N> {
    fn fit(
        &self,
        components: TrainingComponents<LanguageModel<N>>,
        _learner: Learner<LanguageModel<N>>,
        training: TrainLoader<LanguageModel<N>>,
        validation: ValidLoader<LanguageModel<N>>,
        _starting_epoch: usize,
    ) -> (
        LanguageModel<N>,
        SupervisedTrainingEventProcessor<LanguageModel<N>>,
    ) {
        let lock = "nothing else holds the lock, so nothing can have poisoned it";
        let mut trainer = self
            .trainer
            .lock()
            .expect(lock)
            .take()
            .expect("burn-train fits once");
        let mut processor = components.event_processor;
        let result = trainer.run(
            &mut Events(&mut processor),
            &components.interrupter,
            &*training,
            &*validation,
        );
        let model = trainer.session.model.clone();
        *self.result.lock().expect(lock) = Some((trainer, result));
        (model, processor)
    }
}

/// What happens in a run, told to burn-train's metric processor. An epoch is the time between two validations.
struct Events<'a, N: Trainable>(&'a mut SupervisedTrainingEventProcessor<LanguageModel<N>>);

type Told = Result<(), TrainingError>;

impl<N: Trainable> Events<'_, N> {
    fn start_training(&mut self, epoch: u64, steps: u64) -> Told {
        self.train(start(epoch, steps))
    }

    fn trained(&mut self, output: StepOutput, done: u64, total: u64, step: u64) -> Told {
        self.train(item(output, done, total, Some(step as usize)))
    }

    fn end_training(&mut self, epoch: u64) -> Told {
        self.train(LearnerEvent::EndSplit(epoch as usize + 1))
    }

    fn start_validation(&mut self, epoch: u64, windows: u64) -> Told {
        self.valid(start(epoch, windows))
    }

    fn validated(&mut self, output: StepOutput, done: u64, total: u64) -> Told {
        self.valid(item(output, done, total, None))
    }

    fn end_validation(&mut self, epoch: u64) -> Told {
        self.valid(LearnerEvent::EndSplit(epoch as usize + 1))?;
        self.train(LearnerEvent::EndEpoch(epoch as usize + 1))
    }

    fn train(&mut self, event: LearnerEvent<StepOutput>) -> Told {
        self.0
            .process_train(event)
            .map_err(|error| TrainingError::Metrics(error.to_string()))
    }

    fn valid(&mut self, event: LearnerEvent<StepOutput>) -> Told {
        self.0
            .process_valid(event)
            .map_err(|error| TrainingError::Metrics(error.to_string()))
    }
}

fn start(epoch: u64, items: u64) -> LearnerEvent<StepOutput> {
    LearnerEvent::StartSplit {
        epoch_number: epoch as usize + 1,
        total_items: items as usize,
    }
}

fn item(
    output: StepOutput,
    done: u64,
    total: u64,
    iteration: Option<usize>,
) -> LearnerEvent<StepOutput> {
    let progress = Progress::new(done as usize, total as usize, None);
    LearnerEvent::ProcessedItem(TrainingItem::new(output, progress, iteration, None))
}
