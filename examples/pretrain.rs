//! Pretrains a language model on text, shows how it goes, and writes a sample at the end.
//!
//! cargo run --release --example pretrain -- --help

use std::{
    any::Any,
    fs,
    io::{IsTerminal, Write, stdout},
    panic,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use burn::{
    data::dataloader::DataLoader,
    module::Module,
    tensor::{Device, Int, Tensor},
};
use clap::Parser;
use emberlm::{
    core::{Generator, IGNORED_TARGET, RandomKey, SamplingConfig, Utf8Stream},
    models::{Decoder, Encoder, EncoderDecoder, save_weights},
    text::{CacheState, Corpus, TokenFile, TokenStream, Tokenizer, TokenizerChoice},
    training::{
        Batching, CheckpointStore, Ending, EvaluationLoader, EvaluationWindows, LanguageModel,
        LineRenderer, MAX_SKIPPED_IN_A_ROW, MetricsLog, Objective, Report, RunFolder, RunHistory,
        Session, TokenBatch, Trainable, Trained, Trainer, TrainingError, TrainingLoader,
        TrainingWindows, Watch, evaluate, peak_memory_bytes, short_duration,
    },
};
use emberlm_examples::{
    Lines, MaskedAccuracy, ModelConfig, NeighbourTable, ObjectiveKind, Overrides, Preset,
    RunConfig, Stop, TokenizerRecord, Vocabulary, choose_device, complain, exit_with, fill_spans,
    keep_ctrl_c, masked_accuracy, plot, say, text_with_special_tokens,
};

/// Pretrain a language model on text
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Text to train on: a UTF-8 file, or a folder of *.txt and *.md; may be given several times [default: the six
    /// novels of Jane Austen that come with the repository]
    #[arg(long, value_name = "FILE|DIR")]
    text: Vec<PathBuf>,
    /// What a token is: a byte, one of N that are learned from the text, or one of a tokenizer.json with a byte-level
    /// BPE [default: bytes]
    #[arg(long, value_name = "bytes|bpe:N|FILE")]
    tokenizer: Option<String>,
    /// Folder where the text is kept as tokens, which runs share
    #[arg(long, value_name = "DIR", default_value = "runs/tokens")]
    cache: PathBuf,
    /// What the model learns: to say the next token, hidden tokens, or spans that are cut out [default: what the preset is
    /// for]
    #[arg(long)]
    objective: Option<ObjectiveKind>,
    /// A model and a plan by name [default: tiny, bert-tiny or t5-tiny, by the objective]
    #[arg(long)]
    preset: Option<Preset>,
    /// Keep attention within documents, where a window holds several
    #[arg(long)]
    documents: bool,
    /// A JSON file with any fields of the model and the plan, over the preset
    #[arg(long, value_name = "FILE.json")]
    config: Option<PathBuf>,
    /// Number of optimizer steps
    #[arg(long)]
    steps: Option<u64>,
    /// Sequences in a step
    #[arg(long)]
    batch_size: Option<usize>,
    /// Tokens in a sequence
    #[arg(long)]
    seq_length: Option<usize>,
    /// Seed of initialisation, batches and dropout
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between checkpoints
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// The run's folder, new or empty [default: the next number under runs/]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder from its last checkpoint, exactly
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Where the final figures go too, besides the run's folder
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Device, such as flex, ndarray, vulkan:0 [default: the GPU that is compiled in, else ndarray, else flex]
    #[arg(long)]
    device: Option<String>,
    /// Print lines even if the terminal could show the dashboard
    #[arg(long)]
    no_tui: bool,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    let args = Args::parse();
    let mut code = ExitCode::SUCCESS;
    let result = pretrain(&args).map(|exit| code = exit);
    match result {
        Ok(()) => code,
        Err(error) => exit_with(Err::<(), _>(error)),
    }
}

/// A run that is about to begin or to go on: everything is validated, nothing is created yet.
struct Plan {
    config: RunConfig,
    /// The steps that a run to be continued was planned with.
    earlier_steps: Option<u64>,
    training: Arc<TrainingWindows>,
    held_out: Arc<EvaluationWindows>,
    batching: Batching,
    tokenizer: Tokenizer,
    prompt: String,
}

impl Plan {
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
}

// Bytes of held-out text that the sample continues.
const PROMPT_BYTES: usize = 64;
const SAMPLE_TOKENS: usize = 400;

fn pretrain(args: &Args) -> Result<ExitCode, AnyError> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    say(format_args!("device: {device_name}"));
    let plan = plan(args)?;
    if let Some(path) = &args.report {
        check_writable(path)?;
    }
    let (device, stop) = (&device, Stop::on_signals()?);
    match plan.config.model.clone() {
        ModelConfig::Decoder(config) => run(args, &plan, device, &stop, |d| config.init(d)),
        ModelConfig::Encoder(config) => run(args, &plan, device, &stop, |d| config.init(d)),
        ModelConfig::EncoderDecoder(config) => run(args, &plan, device, &stop, |d| config.init(d)),
    }
}

/// Trains a model of one architecture, that of `init`.
fn run<N: Shown>(
    args: &Args,
    plan: &Plan,
    device: &Device,
    stop: &Stop,
    init: impl FnOnce(&Device) -> N,
) -> Result<ExitCode, AnyError> {
    let folder = match (&args.resume, &args.out) {
        (Some(path), _) => RunFolder::open(path)?,
        (None, Some(path)) => RunFolder::create(path)?,
        (None, None) => RunFolder::create_numbered(Path::new("runs"))?,
    };
    if args.resume.is_none() {
        if plan.config.tokenizer.is_some() {
            plan.tokenizer.save(folder.file(Tokenizer::FILE_NAME))?;
        }
        // At once: a run that is killed while its model is made can be resumed too.
        plan.config.write(&folder.file(RunFolder::CONFIG))?;
    }
    let trainer = prepare(plan, &folder, init(&device.clone().autodiff()))?;
    announce(plan, &folder, &trainer);
    plan.config.write(&folder.file(RunFolder::CONFIG))?;
    let weights = folder.file(RunFolder::WEIGHTS);
    if trainer.session.counters.step < plan.config.training.steps {
        // From here on the checkpoints are newer than the weights and the figures of an earlier end.
        for stale in [&weights, &folder.file(Report::FILE_NAME)] {
            if stale.exists() {
                fs::remove_file(stale)?;
            }
        }
    }

    let (trainer, ending) = match train(trainer, plan, &folder, device, stop, args.no_tui) {
        Ok(trained) => trained,
        Err(Killed) => {
            complain(format_args!(
                "killed: continue from the last checkpoint with --resume {}",
                folder.path().display()
            ));
            return Ok(ExitCode::from(137));
        }
    };
    let ending = ending?;
    let step = trainer.session.counters.step;
    save_weights(&trainer.session.model.model, &weights)?;
    let how_to_resume = format!("continue with --resume {}", folder.path().display());
    match ending {
        Ending::Finished => {}
        Ending::Interrupted => {
            say(format_args!(
                "stopped after step {step} and saved: {how_to_resume}"
            ));
            return Ok(ExitCode::SUCCESS);
        }
        Ending::Diverged => {
            complain(format_args!(
                "error: {MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; saved after step {step}: lower the learning rate in a new run, or {how_to_resume}"
            ));
            return Ok(ExitCode::from(1));
        }
    }
    let Some(measured) = measure(&trainer, plan, device, stop)? else {
        say(format_args!(
            "stopped before the whole held-out text was read; all {step} steps are saved: {how_to_resume}"
        ));
        return Ok(ExitCode::SUCCESS);
    };
    report(args, &trainer, plan, &folder, &measured)?;
    trainer.session.model.model.valid().show(plan, device)?;
    say(format_args!("\nrun: {}", folder.path().display()));
    Ok(ExitCode::SUCCESS)
}

/// Resolves and validates configuration and text.
fn plan(args: &Args) -> Result<Plan, AnyError> {
    let overrides = Overrides {
        objective: args.objective,
        documents: args.documents,
        preset: args.preset,
        file: args.config.clone(),
        steps: args.steps,
        batch_size: args.batch_size,
        seq_length: args.seq_length,
        seed: args.seed,
        checkpoint_every: args.checkpoint_every,
    };
    let choice = args.tokenizer.as_deref();
    let choice: Option<TokenizerChoice> = choice.map(str::parse).transpose()?;
    let mut sources = if args.text.is_empty() {
        vec![default_text()]
    } else {
        args.text.clone()
    };
    let earlier = match &args.resume {
        None => None,
        Some(path) => {
            // Checks that it holds a run and that nobody trains in it.
            drop(RunFolder::open(path)?);
            Some(RunConfig::read(&path.join(RunFolder::CONFIG))?)
        }
    };
    if let (Some(earlier), true) = (&earlier, args.text.is_empty()) {
        sources = earlier.sources.clone();
    }
    let corpus = Corpus::open(&sources)?;
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
    let documents = corpus.fingerprints();
    let earlier_steps = earlier.as_ref().map(|earlier| earlier.training.steps);
    let (config, tokenizer) = match (earlier, &args.resume) {
        (Some(earlier), Some(run)) => {
            let config = overrides.resume(&earlier)?;
            if let Some(changed) = changed_document(&earlier, &documents) {
                return Err(format!(
                    "{changed} is not the text the run began with: a run continues on the same text only"
                )
                .into());
            }
            if let Some(choice) = &choice {
                config.check_tokenizer(choice)?;
            }
            let tokenizer = config.load_tokenizer(run)?;
            (config, tokenizer)
        }
        _ => {
            if let Some(path) = &args.out {
                RunFolder::check_free(path)?;
            }
            let choice = choice.unwrap_or(TokenizerChoice::Bytes);
            let objective = overrides.objective()?;
            if let TokenizerChoice::Bpe { vocab_size } = choice {
                // Before the training of the tokenizer, which may take minutes.
                overrides.resolve(&Vocabulary::planned(vocab_size, objective)?)?;
            }
            let mut lines = Lines::new("training the tokenizer", "bytes");
            let special = objective.special_tokens();
            let special: Vec<&str> = special.iter().map(String::as_str).collect();
            let tokenizer =
                choice.resolve(&corpus, &special, |progress| lines.tell_bytes(progress))?;
            let vocabulary = Vocabulary::of(&tokenizer, objective)?;
            let sections = overrides.resolve(&vocabulary)?;
            let sources = sources
                .iter()
                .map(std::path::absolute)
                .collect::<Result<_, _>>()?;
            let config = RunConfig {
                model: sections.model,
                objective: sections.objective,
                within_documents: overrides.documents,
                training: sections.training,
                sources,
                documents,
                tokenizer: TokenizerRecord::of(&tokenizer, &choice),
            };
            (config, tokenizer)
        }
    };
    let (seq_length, seed) = (config.training.seq_length, config.training.seed);
    let held_out = corpus.held_out();
    let prompt = held_out.bytes(0..PROMPT_BYTES.min(held_out.len()));
    let [training, held_out] = streams(&corpus, &tokenizer, &args.cache)?;
    let batching = Batching::new(config.objective.clone(), seed)
        .with_tokenizer(tokenizer.clone())
        .with_documents(config.within_documents);
    Ok(Plan {
        batching,
        training: Arc::new(TrainingWindows::new(training, seq_length, seed)?),
        held_out: Arc::new(EvaluationWindows::new(held_out, seq_length)?),
        tokenizer,
        prompt: whole_characters(prompt),
        config,
        earlier_steps,
    })
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
    let mut lines = Lines::new("tokenising", "bytes");
    let (file, state) = TokenFile::cached(corpus, tokenizer, cache, |progress| {
        lines.tell_bytes(progress);
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

/// The text that comes with the repository: beside the current folder, or where the program was built.
fn default_text() -> PathBuf {
    let here = PathBuf::from("data/austen.txt");
    if here.exists() {
        here
    } else {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/austen.txt")
    }
}

/// The first document whose content is not what the run began with.
fn changed_document(earlier: &RunConfig, now: &[emberlm::training::Fingerprint]) -> Option<String> {
    let content = |documents: &[emberlm::training::Fingerprint]| -> Vec<(u64, u32)> {
        documents.iter().map(|d| (d.bytes, d.crc32)).collect()
    };
    let (before, after) = (content(&earlier.documents), content(now));
    let first = before.iter().zip(&after).position(|(a, b)| a != b);
    let first = first.or((before.len() != after.len()).then(|| before.len().min(after.len())))?;
    let document = now.get(first).or_else(|| earlier.documents.get(first))?;
    Some(document.path.display().to_string())
}

/// The text of UTF-8 bytes without a character that is cut at the end.
fn whole_characters(bytes: Vec<u8>) -> String {
    let whole = bytes.utf8_chunks().next();
    whole.map_or(String::new(), |chunk| chunk.valid().to_owned())
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Makes sure that a report can be written before the training begins.
fn check_writable(path: &Path) -> Result<(), AnyError> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(format!(
            "--report {}: give a file in a folder that exists",
            path.display()
        )
        .into());
    }
    Ok(())
}

/// A new session, or the one of the last intact checkpoint.
fn prepare<N: Trainable>(
    plan: &Plan,
    folder: &RunFolder,
    model: N,
) -> Result<Trainer<N>, AnyError> {
    let training = &plan.config.training;
    let model = LanguageModel::new(model, training.label_smoothing, training.z_loss);
    let mut session = Session::new(model, training);
    let checkpoints = CheckpointStore::open(&folder.file(RunFolder::CHECKPOINTS))?;
    if let Some(loaded) = checkpoints.reader().load_newest()? {
        for damaged in &loaded.damaged {
            complain(format_args!(
                "warning: {damaged}; going on from step {}",
                loaded.checkpoint.step
            ));
        }
        session = session.restore(&loaded.checkpoint, checkpoints.reader().dir())?;
    }
    let step = session.counters.step;
    if step > training.steps {
        return Err(format!(
            "the run has done {step} steps already: --steps {} is fewer",
            training.steps
        )
        .into());
    }
    let log = folder.file(MetricsLog::FILE_NAME);
    if log.exists() {
        MetricsLog::truncate_after(&log, step)?;
    }
    Ok(Trainer {
        config: training.clone(),
        session,
        checkpoints,
        metrics: MetricsLog::open(folder.path())?,
    })
}

fn announce<N: Trainable>(plan: &Plan, folder: &RunFolder, trainer: &Trainer<N>) {
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
    if trainer.session.counters.step > 0 {
        say(format_args!(
            "resuming after step {}",
            trainer.session.counters.step
        ));
    }
    match plan.earlier_steps {
        Some(earlier) if earlier != training.steps => say(format_args!(
            "the learning-rate schedule changed: it now ends at step {} instead of {earlier}",
            training.steps
        )),
        _ => {}
    }
}

/// The dashboard's user killed the run.
struct Killed;

fn train<N: Trainable>(
    trainer: Trainer<N>,
    plan: &Plan,
    folder: &RunFolder,
    device: &Device,
    stop: &Stop,
    no_tui: bool,
) -> Result<Trained<N>, Killed> {
    let config = &plan.config.training;
    let step = trainer.session.counters.step;
    let training = TrainingLoader::new(plan.training.clone(), config, step + 1, device)
        .with_batching(plan.batching.clone());
    let chosen = plan.held_out.fixed(config.validation_windows);
    let validation = plan.evaluation(&chosen, device);
    let dashboard = stdout().is_terminal() && !no_tui;
    let lines = || {
        let every = Duration::from_secs(10);
        let lines = LineRenderer::new(stdout(), config.steps, step, config.validate_every, every);
        Box::new(lines) as Box<_>
    };
    let watch = Watch {
        renderer: (!dashboard).then(lines),
        interrupter: stop.interrupter(),
        bytes_per_token: plan.held_out.stream().bytes_per_token(),
    };
    let guard = dashboard.then(keep_ctrl_c);
    // The dashboard's kill is a panic of burn-train's; any other panic goes on.
    let trained = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        trainer.train(
            Arc::new(training),
            Arc::new(validation),
            folder.path(),
            watch,
        )
    }));
    drop(guard);
    trained.map_err(|payload| match message(&*payload) {
        Some(text) if text.contains("Killing training from user input") => Killed,
        _ => panic::resume_unwind(payload),
    })
}

fn message(payload: &(dyn Any + Send)) -> Option<&str> {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
}

/// The figures of the whole held-out text.
struct Measured {
    loss: f64,
    accuracy: Option<MaskedAccuracy>,
}

/// Reads the whole held-out text; nothing if a signal came in between.
fn measure<N: Shown>(
    trainer: &Trainer<N>,
    plan: &Plan,
    device: &Device,
    stop: &Stop,
) -> Result<Option<Measured>, TrainingError> {
    let loader = plan.whole_held_out(device);
    let mut watch = watched("reading the held-out text", &loader, stop);
    let model = &trainer.session.model;
    let loss = evaluate(model, &loader, |_, rows| watch(rows));
    let measured = loss.and_then(|loss| {
        let accuracy = model.model.valid().accuracy(plan, device, stop)?;
        Ok(Measured { loss, accuracy })
    });
    match measured {
        Err(TrainingError::Stopped) => Ok(None),
        measured => measured.map(Some),
    }
}

/// Says how far the windows of a loader are read, and stops at a signal.
fn watched(
    what: &'static str,
    loader: &dyn DataLoader<TokenBatch>,
    stop: &Stop,
) -> impl FnMut(usize) -> Result<(), TrainingError> {
    let mut lines = Lines::new(what, "windows");
    let (mut done, total) = (0, loader.num_items() as u64);
    move |rows| {
        done += rows as u64;
        lines.tell(done, total);
        match stop.requested() {
            true => Err(TrainingError::Stopped),
            false => Ok(()),
        }
    }
}

// The training loss of a report is the mean over so many of the last steps.
const TRAIN_LOSS_STEPS: usize = 100;

fn report<N: Trainable>(
    args: &Args,
    trainer: &Trainer<N>,
    plan: &Plan,
    folder: &RunFolder,
    measured: &Measured,
) -> Result<(), AnyError> {
    let valid_loss = measured.loss;
    // Only a causal model says the whole text.
    let bits_per_byte = (plan.config.objective == Objective::Causal)
        .then(|| valid_loss / std::f64::consts::LN_2 / plan.held_out.stream().bytes_per_token());
    let counters = &trainer.session.counters;
    let history = RunHistory::load(folder.path())?;
    let losses: Vec<f64> = history
        .train_losses()
        .iter()
        .map(|(_, loss)| *loss)
        .collect();
    let last = &losses[losses.len().saturating_sub(TRAIN_LOSS_STEPS)..];
    let train_loss = last.iter().sum::<f64>() / last.len() as f64;
    let report = Report {
        train_loss: Some(train_loss),
        valid_loss: Some(valid_loss),
        bits_per_byte,
        tokens_per_second: counters.tokens_per_second(),
        peak_memory_bytes: peak_memory_bytes(),
        parameters: Some(trainer.session.model.num_params() as u64),
        steps: Some(counters.step),
        seconds: Some(counters.seconds),
        masked_accuracy: measured.accuracy.map(|accuracy| accuracy.model),
        neighbour_accuracy: measured.accuracy.map(|accuracy| accuracy.neighbours),
    };
    report.write(folder.file(Report::FILE_NAME))?;
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    plot::draw_curves(
        &[history],
        &folder.file("curves.svg"),
        &folder.file("curves.png"),
    )?;
    say(format_args!(
        "trained {} steps in {}{}: train loss {train_loss:.4}, validation loss {valid_loss:.4} over {} held-out text{}",
        counters.step,
        short_duration(Duration::from_secs_f64(counters.seconds)),
        match counters.tokens_per_second() {
            Some(speed) => format!(" at {speed:.0} tokens/s"),
            None => String::new(),
        },
        match plan.config.objective {
            Objective::Causal => "the whole",
            Objective::Masked(_) => "the hidden tokens of the whole",
            Objective::Spans(_) => "the spans of the whole",
        },
        match bits_per_byte {
            Some(bits) => format!(" ({bits:.4} bits per byte)"),
            None => String::new(),
        }
    ));
    if let Some(accuracy) = measured.accuracy {
        say(format_args!(
            "masked accuracy: {:.1} % of {} hidden tokens; a table of counts by neighbours finds {:.1} %",
            100.0 * accuracy.model,
            accuracy.n_hidden,
            100.0 * accuracy.neighbours
        ));
    }
    if counters.skipped > 0 {
        say(format_args!(
            "{} steps were skipped: their loss or gradient was not finite",
            counters.skipped
        ));
    }
    Ok(())
}

/// A model that can show what it has learned.
trait Shown: Trainable {
    /// How many hidden tokens it finds; nothing where none are hidden.
    fn accuracy(
        &self,
        _plan: &Plan,
        _device: &Device,
        _stop: &Stop,
    ) -> Result<Option<MaskedAccuracy>, TrainingError> {
        Ok(None)
    }

    /// Prints something that it makes of the held-out text.
    fn show(&self, plan: &Plan, device: &Device) -> Result<(), AnyError>;
}

impl Shown for Decoder {
    fn show(&self, plan: &Plan, device: &Device) -> Result<(), AnyError> {
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
        plan: &Plan,
        device: &Device,
        stop: &Stop,
    ) -> Result<Option<MaskedAccuracy>, TrainingError> {
        let Objective::Masked(config) = &plan.config.objective else {
            return Ok(None);
        };
        let table = NeighbourTable::count(plan.training.stream());
        let loader = plan.whole_held_out(device);
        let watch = watched("finding hidden tokens", &loader, stop);
        masked_accuracy(self, &table, &loader, config.mask_token, watch).map(Some)
    }

    fn show(&self, plan: &Plan, device: &Device) -> Result<(), AnyError> {
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
    fn show(&self, plan: &Plan, device: &Device) -> Result<(), AnyError> {
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

fn show_tokens(what: &str, plan: &Plan, tokens: &[u32]) {
    let objective = ObjectiveKind::of(&plan.config.objective);
    let text = text_with_special_tokens(&plan.tokenizer, objective, tokens);
    say(format_args!("\n--- {what} ---\n{text}"));
}
