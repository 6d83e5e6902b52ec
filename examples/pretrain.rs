//! Pretrains a language model on text, shows how it goes, and writes a sample at the end.
//!
//! cargo run --release --example pretrain -- --help

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use burn::{
    data::dataloader::DataLoader,
    module::Module,
    tensor::{Device, Int, Tensor},
};
use clap::Parser;
use emberlm::{
    core::{Generator, IGNORED_TARGET, RandomKey, SamplingConfig, Utf8Stream},
    models::{Decoder, Encoder, EncoderDecoder},
    text::{CacheState, Corpus, TokenFile, TokenStream, Tokenizer, TokenizerChoice},
    training::{
        Batching, EvaluationLoader, EvaluationWindows, Objective, Report, RunFolder, Trainable,
        Trainer, TrainingError, TrainingLoader, TrainingWindows,
    },
};
use emberlm_examples::{
    Course, MaskedAccuracy, ModelConfig, NeighbourTable, ObjectiveKind, Overrides, Preset,
    RunConfig, Stop, TokenizerRecord, Vocabulary, Watched, Work, announce_resume, check_writable,
    choose_device, complain, evaluate_unless_stopped, exit_with, fill_spans, final_figures,
    masked_accuracy, open_folder, prepare, say, say_figures, text_with_special_tokens, train,
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
}

// Bytes of held-out text that the sample continues.
const PROMPT_BYTES: usize = 64;
const SAMPLE_TOKENS: usize = 400;

fn pretrain(args: &Args) -> Result<ExitCode, AnyError> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    say(format_args!("device: {device_name}"));
    let plan = plan(args)?;
    if let Some(path) = &args.report {
        check_writable("--report", path)?;
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
    let folder = open_folder(args.resume.as_deref(), args.out.as_deref())?;
    if args.resume.is_none() {
        if plan.config.tokenizer.is_some() {
            plan.tokenizer.save(folder.file(Tokenizer::FILE_NAME))?;
        }
        // At once: a run that is killed while its model is made can be resumed too.
        plan.config.write(&folder.file(RunFolder::CONFIG))?;
    }
    let model = init(&device.clone().autodiff());
    let trainer = prepare(model, &plan.config.training, &folder)?;
    announce(plan, &folder, &trainer);
    plan.config.write(&folder.file(RunFolder::CONFIG))?;
    let watched = Watched {
        folder: &folder,
        stop,
        no_tui: args.no_tui,
        bytes_per_token: Some(plan.held_out.stream().bytes_per_token()),
    };
    let first_step = trainer.session.counters.step + 1;
    let training = plan.training_loader(first_step, device);
    let trainer = match train(trainer, training, plan.validation(device), &watched)? {
        Course::Finished(trainer) => trainer,
        Course::Left(code) => return Ok(code),
    };
    let Some(measured) = measure(&trainer, plan, device, stop)? else {
        say(format_args!(
            "stopped before the whole held-out text was read; all {} steps are saved: continue with --resume {}",
            trainer.session.counters.step,
            folder.path().display()
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
            let mut work = Work::new("training the tokenizer", "bytes");
            let special = objective.special_tokens();
            let special: Vec<&str> = special.iter().map(String::as_str).collect();
            let tokenizer =
                choice.resolve(&corpus, &special, |progress| work.tell_bytes(progress))?;
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
    announce_resume(trainer, plan.earlier_steps);
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
    let work = Work::new("reading the held-out text", "windows");
    let model = &trainer.session.model;
    let Some(loss) = evaluate_unless_stopped(model, &loader, work, stop)? else {
        return Ok(None);
    };
    match model.model.valid().accuracy(plan, device, stop) {
        Err(TrainingError::Stopped) => Ok(None),
        accuracy => Ok(Some(Measured {
            loss,
            accuracy: accuracy?,
        })),
    }
}

fn report<N: Trainable>(
    args: &Args,
    trainer: &Trainer<N>,
    plan: &Plan,
    folder: &RunFolder,
    measured: &Measured,
) -> Result<(), AnyError> {
    // Only a causal model says the whole text.
    let is_causal = plan.config.objective == Objective::Causal;
    let bytes_per_token = is_causal.then(|| plan.held_out.stream().bytes_per_token());
    let report = Report {
        masked_accuracy: measured.accuracy.map(|accuracy| accuracy.model),
        neighbour_accuracy: measured.accuracy.map(|accuracy| accuracy.neighbours),
        ..final_figures(trainer, folder, measured.loss, bytes_per_token)?
    };
    report.write(folder.file(Report::FILE_NAME))?;
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    let held_out = match plan.config.objective {
        Objective::Causal => "the whole held-out text",
        Objective::Masked(_) => "the hidden tokens of the whole held-out text",
        Objective::Spans(_) => "the spans of the whole held-out text",
    };
    say_figures(trainer, &report, held_out);
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
