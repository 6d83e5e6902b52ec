//! Pretraining on a text: what `pretrain` and `lengthen` have in common once the configuration stands.

use std::{
    io::{Write, stdout},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use burn::{
    data::dataloader::DataLoader,
    module::Module,
    tensor::{Device, Int, Tensor},
};
use emberlm::{
    core::{Generator, IGNORED_TARGET, RandomKey, SamplingConfig, Utf8Stream},
    models::{Decoder, Encoder, EncoderDecoder},
    text::{CacheState, Corpus, TokenFile, TokenStream, Tokenizer},
    training::{
        Batching, EvaluationLoader, EvaluationWindows, LanguageModel, Objective, Report,
        RoutingRecord, RunFolder, StepOutput, Trainable, Trainer, TrainingError, TrainingLoader,
        TrainingWindows,
    },
};

use crate::{
    Course, MaskedAccuracy, NeighbourTable, ObjectiveKind, RunConfig, Stop, Watched, Work,
    announce_resume, complain, evaluate_unless_stopped, fill_spans, final_figures, masked_accuracy,
    open_folder, prepare, say, say_figures, text_with_special_tokens, train,
};

type AnyError = Box<dyn std::error::Error>;

/// A run that is about to begin or to go on: everything is validated, nothing is created yet.
pub struct Pretraining {
    /// Everything that the run needs to be repeated.
    pub config: RunConfig,
    /// The steps that a run to be continued was planned with.
    earlier_steps: Option<u64>,
    training: Arc<TrainingWindows>,
    held_out: Arc<EvaluationWindows>,
    batching: Batching,
    tokenizer: Tokenizer,
    prompt: String,
}

/// Where a run lives, and how it is watched.
pub struct Place<'a> {
    /// A run to be continued.
    pub resume: Option<&'a Path>,
    /// The folder of a new run; nothing for the next number under `runs/`.
    pub out: Option<&'a Path>,
    /// Where the final figures go too.
    pub report: Option<&'a Path>,
    /// Lines even on a terminal.
    pub no_tui: bool,
}

/// What a run begins with.
pub enum Start<N> {
    /// A model that its configuration makes again.
    New(N),
    /// A model that nothing makes again: it becomes the first checkpoint.
    Given(N),
}

impl Pretraining {
    /// Cuts the text of a configuration into windows; tokens that are not bytes are kept in `cache`.
    ///
    /// # Errors
    ///
    /// A text that is too short, or tokens that cannot be kept.
    pub fn new(
        config: RunConfig,
        corpus: &Corpus,
        tokenizer: Tokenizer,
        cache: &Path,
    ) -> Result<Self, AnyError> {
        let (seq_length, seed) = (config.training.seq_length, config.training.seed);
        let held_out = corpus.held_out();
        let prompt = held_out.bytes(0..PROMPT_BYTES.min(held_out.len()));
        let [training, held_out] = streams(corpus, &tokenizer, cache)?;
        let batching = Batching::new(config.objective.clone(), seed)
            .with_tokenizer(tokenizer.clone())
            .with_documents(config.within_documents);
        Ok(Self {
            batching,
            training: Arc::new(TrainingWindows::new(training, seq_length, seed)?),
            held_out: Arc::new(EvaluationWindows::new(held_out, seq_length)?),
            tokenizer,
            prompt: whole_characters(prompt),
            config,
            earlier_steps: None,
        })
    }

    /// Says how many steps a run to be continued was planned with.
    pub fn with_earlier_steps(mut self, steps: Option<u64>) -> Self {
        self.earlier_steps = steps;
        self
    }

    fn training_loader(&self, first_step: u64, device: &Device) -> TrainingLoader {
        let config = &self.config.training;
        TrainingLoader::new(self.training.clone(), config, first_step, device)
            .with_batching(self.batching.clone())
    }

    /// What a validation during the run looks at.
    fn validation(&self, device: &Device) -> EvaluationLoader {
        let n_windows = self.config.training.validation_windows;
        self.evaluation(&self.held_out.fixed(n_windows), device)
    }

    /// Windows of the held-out text.
    fn evaluation(&self, chosen: &[usize], device: &Device) -> EvaluationLoader {
        let batch_size = self.config.training.batch_size;
        EvaluationLoader::new(self.held_out.clone(), chosen, batch_size, device)
            .with_batching(self.batching.clone())
    }

    /// All windows of the held-out text.
    fn whole_held_out(&self, device: &Device) -> EvaluationLoader {
        let all: Vec<usize> = (0..self.held_out.len()).collect();
        self.evaluation(&all, device)
    }

    /// Trains the model that `start` makes on a device, measures it on the whole held-out text and shows what it has
    /// learned.
    ///
    /// # Errors
    ///
    /// Folders, files and checkpoints that cannot be read or written.
    pub fn run<N: Shown>(
        &self,
        place: &Place<'_>,
        device: &Device,
        stop: &Stop,
        start: impl FnOnce(&Device) -> Start<N>,
    ) -> Result<ExitCode, AnyError> {
        let folder = open_folder(place.resume, place.out)?;
        if place.resume.is_none() {
            if self.config.tokenizer.is_some() {
                self.tokenizer.save(folder.file(Tokenizer::FILE_NAME))?;
            }
            // At once: a run that is killed while its model is made can be resumed too.
            self.config.write(&folder.file(RunFolder::CONFIG))?;
        }
        let (model, is_given) = match start(&device.clone().autodiff()) {
            Start::New(model) => (model, false),
            Start::Given(model) => (model, true),
        };
        let mut trainer = prepare(model, &self.config.training, &folder)?;
        if is_given {
            trainer.session.save(&mut trainer.checkpoints, None)?;
        }
        announce(self, &folder, &trainer);
        self.config.write(&folder.file(RunFolder::CONFIG))?;
        let watched = Watched {
            folder: &folder,
            stop,
            no_tui: place.no_tui,
            bytes_per_token: Some(self.held_out.stream().bytes_per_token()),
        };
        let first_step = trainer.session.counters.step + 1;
        let training = self.training_loader(first_step, device);
        let trainer = match train(trainer, training, self.validation(device), &watched)? {
            Course::Finished(trainer) => trainer,
            Course::Left(code) => return Ok(code),
        };
        let Some(measured) = measure(&trainer, self, device, stop)? else {
            say(format_args!(
                "stopped before the whole held-out text was read; all {} steps are saved: continue with --resume {}",
                trainer.session.counters.step,
                folder.path().display()
            ));
            return Ok(ExitCode::SUCCESS);
        };
        report(place, &trainer, self, &folder, &measured)?;
        trainer.session.model.model.valid().show(self, device)?;
        say(format_args!("\nrun: {}", folder.path().display()));
        Ok(ExitCode::SUCCESS)
    }

    /// The loss over the whole held-out text of a model that nobody trains; nothing if a signal came in between.
    ///
    /// # Errors
    ///
    /// A batch that cannot be made.
    pub fn loss_of<N: Trainable>(
        &self,
        model: N,
        device: &Device,
        stop: &Stop,
    ) -> Result<Option<f64>, TrainingError> {
        let work = Work::new("reading the held-out text", "windows");
        let model = LanguageModel::new(model, 0.0, 0.0);
        let figures = evaluate_unless_stopped(&model, &self.whole_held_out(device), work, stop)?;
        Ok(figures.map(|figures| figures.loss()))
    }
}

// Bytes of held-out text that the sample continues.
const PROMPT_BYTES: usize = 64;
const SAMPLE_TOKENS: usize = 400;

/// Says what a text is.
pub fn announce_text(corpus: &Corpus) {
    let (n_documents, n_skipped) = (corpus.documents().len(), corpus.skipped());
    say(format_args!(
        "text: {n_documents} document{}, {} training and {} held-out bytes{}",
        plural(n_documents),
        corpus.training().len(),
        corpus.held_out().len(),
        match n_skipped {
            0 => String::new(),
            n => format!(", {n} other file{} skipped", plural(n)),
        }
    ));
}

/// The training and the held-out part of a corpus as tokens: bytes as they are, others from a file in `cache`.
fn streams(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    cache: &Path,
) -> Result<[TokenStream; 2], AnyError> {
    if tokenizer.is_bytes() {
        return Ok([corpus.training().into(), corpus.held_out().into()]);
    }
    let mut work = Work::new("tokenising", "bytes");
    let (file, state) = TokenFile::cached(corpus, tokenizer, cache, |progress| {
        work.tell_bytes(progress);
    })?;
    let path = file.path().display();
    if let CacheState::Rebuilt(damage) = state {
        complain(format_args!(
            "warning: {path}: {damage}; the text was tokenised again"
        ));
    }
    let streams = [file.training(), file.held_out()];
    let [training, held_out] = &streams;
    say(format_args!(
        "tokens: {} training and {} held-out, {:.3} bytes each, of {} in the vocabulary; {} {path}",
        training.len(),
        held_out.len(),
        held_out.bytes_per_token(),
        tokenizer.vocab_size(),
        match state {
            CacheState::Found => "found in",
            CacheState::Built | CacheState::Rebuilt(_) => "written to",
        }
    ));
    Ok(streams)
}

/// The text of UTF-8 bytes without a character that is cut at the end.
fn whole_characters(bytes: Vec<u8>) -> String {
    let whole = bytes.utf8_chunks().next();
    whole.map_or(String::new(), |chunk| chunk.valid().to_owned())
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn announce<N: Trainable>(plan: &Pretraining, folder: &RunFolder, trainer: &Trainer<N>) {
    let training = &plan.config.training;
    say(format_args!(
        "model: {} parameters{}; {} steps of {} x {} tokens; run: {}",
        trainer.session.model.num_params(),
        match &plan.config.objective {
            Objective::Causal => String::new(),
            objective => format!(", objective {}", objective.name()),
        },
        training.steps,
        training.batch_size,
        training.seq_length,
        folder.path().display()
    ));
    announce_resume(trainer, plan.earlier_steps);
}

/// The figures of the whole held-out text.
struct Measured {
    figures: StepOutput,
    accuracy: Option<MaskedAccuracy>,
}

/// Reads the whole held-out text; nothing if a signal came in between.
fn measure<N: Shown>(
    trainer: &Trainer<N>,
    plan: &Pretraining,
    device: &Device,
    stop: &Stop,
) -> Result<Option<Measured>, TrainingError> {
    let loader = plan.whole_held_out(device);
    let work = Work::new("reading the held-out text", "windows");
    let model = &trainer.session.model;
    let Some(figures) = evaluate_unless_stopped(model, &loader, work, stop)? else {
        return Ok(None);
    };
    match model.model.valid().accuracy(plan, device, stop) {
        Err(TrainingError::Stopped) => Ok(None),
        accuracy => Ok(Some(Measured {
            figures,
            accuracy: accuracy?,
        })),
    }
}

fn report<N: Trainable>(
    place: &Place<'_>,
    trainer: &Trainer<N>,
    plan: &Pretraining,
    folder: &RunFolder,
    measured: &Measured,
) -> Result<(), AnyError> {
    // Only a causal model says the whole text.
    let is_causal = plan.config.objective == Objective::Causal;
    let bytes_per_token = is_causal.then(|| plan.held_out.stream().bytes_per_token());
    let report = Report {
        masked_accuracy: measured.accuracy.map(|accuracy| accuracy.model),
        neighbour_accuracy: measured.accuracy.map(|accuracy| accuracy.neighbours),
        routing: RoutingRecord::of(&measured.figures),
        ..final_figures(trainer, folder, measured.figures.loss(), bytes_per_token)?
    };
    report.write(folder.file(Report::FILE_NAME))?;
    if let Some(path) = place.report {
        report.write(path)?;
    }
    let held_out = match plan.config.objective {
        Objective::Causal => "the whole held-out text",
        Objective::Masked(_) => "the hidden tokens of the whole held-out text",
        Objective::Spans(_) => "the spans of the whole held-out text",
    };
    say_figures(trainer, &report, held_out);
    say_routing(&measured.figures);
    if let Some(accuracy) = measured.accuracy {
        say(format_args!(
            "masked accuracy: {:.1} % of {} hidden tokens; a table of counts by neighbours finds {:.1} %",
            100.0 * accuracy.model,
            accuracy.n_hidden,
            100.0 * accuracy.neighbours
        ));
    }
    Ok(())
}

/// Says how a model that routes its tokens spreads them over its experts.
fn say_routing(figures: &StepOutput) {
    for (layer, routing) in &figures.routing {
        say(format_args!(
            "experts of layer {layer}: the busiest has {:.2} times its share, the idlest {:.2}; entropy {:.3} nats{}",
            1.0 + routing.max_violation(),
            routing.least_share(),
            routing.entropy(),
            match routing.n_dropped {
                0 => String::new(),
                _ => format!(
                    "; {:.2} % of the choices dropped",
                    100.0 * routing.dropped_share()
                ),
            }
        ));
    }
}

/// A model that can show what it has learned.
pub trait Shown: Trainable {
    /// How many hidden tokens it finds; nothing where none are hidden.
    ///
    /// # Errors
    ///
    /// A batch that cannot be made, or a signal in between.
    fn accuracy(
        &self,
        _plan: &Pretraining,
        _device: &Device,
        _stop: &Stop,
    ) -> Result<Option<MaskedAccuracy>, TrainingError> {
        Ok(None)
    }

    /// Prints something that it makes of the held-out text.
    ///
    /// # Errors
    ///
    /// A batch that cannot be made, or scores that are not numbers.
    fn show(&self, plan: &Pretraining, device: &Device) -> Result<(), AnyError>;
}

impl Shown for Decoder {
    fn show(&self, plan: &Pretraining, device: &Device) -> Result<(), AnyError> {
        let tokens = plan.tokenizer.encode(&plan.prompt);
        let sampling = SamplingConfig::default()
            .with_temperature(0.8)
            .with_top_p(Some(0.95));
        // As with `say`, nobody need be listening.
        let show = |text: &str| {
            let _ = stdout()
                .write_all(text.as_bytes())
                .and_then(|()| stdout().flush());
        };
        say("\n--- the model continues the held-out text ---");
        show(&plan.prompt);
        let mut characters = Utf8Stream::new();
        for token in Generator::new(self, &tokens, SAMPLE_TOKENS, sampling, device)? {
            show(&characters.push(&plan.tokenizer.decode_bytes(&[token?])));
        }
        say(characters.finish());
        Ok(())
    }
}

impl Shown for Encoder {
    fn accuracy(
        &self,
        plan: &Pretraining,
        device: &Device,
        stop: &Stop,
    ) -> Result<Option<MaskedAccuracy>, TrainingError> {
        let Objective::Masked(config) = &plan.config.objective else {
            return Ok(None);
        };
        let table = NeighbourTable::count(plan.training.stream());
        let loader = plan.whole_held_out(device);
        let mut work = Work::new("finding hidden tokens", "windows");
        let (mut done, total) = (0, loader.num_items() as u64);
        let watch = |rows| {
            done += rows as u64;
            work.tell(done, total);
            match stop.requested() {
                true => Err(TrainingError::Stopped),
                false => Ok(()),
            }
        };
        masked_accuracy(self, &table, &loader, config.mask_token, watch).map(Some)
    }

    fn show(&self, plan: &Pretraining, device: &Device) -> Result<(), AnyError> {
        let batch = plan.evaluation(&[0], device).iter().next();
        let batch = batch.expect("there is a window")?;
        let numbers = |tokens: Tensor<2, Int>| -> Vec<u32> {
            let tokens = tokens.into_data();
            tokens.iter::<i64>().map(|token| token as u32).collect()
        };
        let hidden = self.hidden_states(batch.inputs.clone(), None, batch.data, None);
        let scores = self.masked_scores(hidden);
        let guesses = numbers(scores.argmax(2).squeeze_dim::<2>(2));
        let (asked, mut read) = (batch.targets.into_data(), numbers(batch.inputs));
        show_tokens("the model reads", plan, &read);
        for ((target, guess), token) in asked.iter::<i64>().zip(guesses).zip(&mut read) {
            if target != IGNORED_TARGET {
                *token = guess;
            }
        }
        show_tokens("the model says", plan, &read);
        Ok(())
    }
}

impl Shown for EncoderDecoder {
    fn show(&self, plan: &Pretraining, device: &Device) -> Result<(), AnyError> {
        let Objective::Spans(config) = &plan.config.objective else {
            return Ok(());
        };
        let range = plan.held_out.inputs(0);
        let window = plan.held_out.stream().tokens(range);
        let spans = config.apply(&window, &RandomKey::new(plan.config.training.seed));
        show_tokens("the model reads", plan, &spans.source);
        let is_sentinel = |token: &u32| {
            *token <= config.first_sentinel && config.first_sentinel - token < config.n_sentinels
        };
        let text = &spans.source[..spans.source.len() - 1];
        let parts: Vec<Vec<u32>> = text.split(is_sentinel).map(<[u32]>::to_vec).collect();
        let most_tokens = spans.target.len();
        let found = fill_spans(self, config, &parts, most_tokens, 1, device)?;
        let text = found.first().map(|best| best.text(&parts, &plan.tokenizer));
        say(format_args!(
            "\n--- the model says ---\n{}",
            text.unwrap_or_default()
        ));
        Ok(())
    }
}

fn show_tokens(what: &str, plan: &Pretraining, tokens: &[u32]) {
    let objective = ObjectiveKind::of(&plan.config.objective);
    let text = text_with_special_tokens(&plan.tokenizer, objective, tokens);
    say(format_args!("\n--- {what} ---\n{text}"));
}
