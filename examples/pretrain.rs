//! Pretrains a decoder-only language model on text, shows how it goes, and writes a sample at the end.
//!
//! cargo run --release --example pretrain -- --help

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use burn::{module::Module, tensor::Device};
use clap::Parser;
use emberlm::{
    core::{Generator, SamplingConfig, Utf8Stream},
    models::Decoder,
    text::{CacheState, Corpus, TokenFile, TokenStream, Tokenizer, TokenizerChoice},
    training::{
        EvaluationLoader, EvaluationWindows, LanguageModel, Report, RunFolder, Trainer,
        TrainingError, TrainingLoader, TrainingWindows,
    },
};
use emberlm_examples::{
    Course, Lines, Overrides, Preset, RunConfig, Stop, TokenizerRecord, Watched, announce_resume,
    check_writable, choose_device, complain, evaluate_unless_stopped, exit_with, final_figures,
    open_folder, prepare, say, say_figures, train,
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
    /// A model and a plan by name [default: tiny]
    #[arg(long)]
    preset: Option<Preset>,
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
    tokenizer: Tokenizer,
    prompt: String,
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
    let stop = Stop::on_signals()?;
    let folder = open_folder(args.resume.as_deref(), args.out.as_deref())?;
    if args.resume.is_none() {
        if plan.config.tokenizer.is_some() {
            plan.tokenizer.save(folder.file(Tokenizer::FILE_NAME))?;
        }
        // At once: a run that is killed while its model is made can be resumed too.
        plan.config.write(&folder.file(RunFolder::CONFIG))?;
    }
    let model = plan.config.model.init(&device.clone().autodiff());
    let trainer = prepare(model, &plan.config.training, &folder)?;
    announce(&plan, &folder, &trainer);
    plan.config.write(&folder.file(RunFolder::CONFIG))?;
    let watched = Watched {
        folder: &folder,
        stop: &stop,
        no_tui: args.no_tui,
        bytes_per_token: plan.held_out.stream().bytes_per_token(),
    };
    let loader = training_loader(&plan, &trainer, &device);
    let trainer = match train(trainer, loader, validation_loader(&plan, &device), &watched)? {
        Course::Finished(trainer) => trainer,
        Course::Left(code) => return Ok(code),
    };
    let Some(valid_loss) = evaluate_all(&trainer, &plan, &device, &stop)? else {
        say(format_args!(
            "stopped before the whole held-out text was read; all {} steps are saved: continue with --resume {}",
            trainer.session.counters.step,
            folder.path().display()
        ));
        return Ok(ExitCode::SUCCESS);
    };
    report(args, &trainer, &plan, &folder, valid_loss)?;
    sample(&trainer.session.model, &plan, &device)?;
    say(format_args!("\nrun: {}", folder.path().display()));
    Ok(ExitCode::SUCCESS)
}

fn training_loader(plan: &Plan, trainer: &Trainer<Decoder>, device: &Device) -> TrainingLoader {
    let first_step = trainer.session.counters.step + 1;
    TrainingLoader::new(
        plan.training.clone(),
        &plan.config.training,
        first_step,
        device,
    )
}

fn validation_loader(plan: &Plan, device: &Device) -> EvaluationLoader {
    let config = &plan.config.training;
    let chosen = plan.held_out.fixed(config.validation_windows);
    EvaluationLoader::new(plan.held_out.clone(), &chosen, config.batch_size, device)
}

/// Resolves and validates configuration and text.
fn plan(args: &Args) -> Result<Plan, AnyError> {
    let overrides = Overrides {
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
            if let TokenizerChoice::Bpe { vocab_size } = choice {
                // Before the training of the tokenizer, which may take minutes.
                overrides.resolve(vocab_size)?;
            }
            let mut lines = Lines::new("training the tokenizer", "bytes");
            let tokenizer = choice.resolve(&corpus, &[], |progress| lines.tell_bytes(progress))?;
            let (model, training) = overrides.resolve(tokenizer.vocab_size())?;
            let sources = sources
                .iter()
                .map(std::path::absolute)
                .collect::<Result<_, _>>()?;
            let config = RunConfig {
                model,
                training,
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
    Ok(Plan {
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

fn announce(plan: &Plan, folder: &RunFolder, trainer: &Trainer<Decoder>) {
    let training = &plan.config.training;
    say(format_args!(
        "model: {} parameters; {} steps of {} x {} tokens; run: {}",
        trainer.session.model.num_params(),
        training.steps,
        training.batch_size,
        training.seq_length,
        folder.path().display()
    ));
    announce_resume(trainer, plan.earlier_steps);
}

/// The loss over the whole held-out text; nothing if a signal came in between.
fn evaluate_all(
    trainer: &Trainer<Decoder>,
    plan: &Plan,
    device: &Device,
    stop: &Stop,
) -> Result<Option<f64>, TrainingError> {
    let all: Vec<usize> = (0..plan.held_out.len()).collect();
    let batch_size = plan.config.training.batch_size;
    let loader = EvaluationLoader::new(plan.held_out.clone(), &all, batch_size, device);
    let lines = Lines::new("reading the held-out text", "windows");
    evaluate_unless_stopped(&trainer.session.model, &loader, lines, stop)
}

fn report(
    args: &Args,
    trainer: &Trainer<Decoder>,
    plan: &Plan,
    folder: &RunFolder,
    valid_loss: f64,
) -> Result<(), AnyError> {
    let bytes_per_token = plan.held_out.stream().bytes_per_token();
    let report = final_figures(trainer, folder, valid_loss, bytes_per_token)?;
    report.write(folder.file(Report::FILE_NAME))?;
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    say_figures(trainer, &report, "the whole held-out text");
    Ok(())
}

fn sample(model: &LanguageModel<Decoder>, plan: &Plan, device: &Device) -> Result<(), AnyError> {
    let tokens = plan.tokenizer.encode(&plan.prompt);
    let sampling = SamplingConfig::default()
        .with_temperature(0.8)
        .with_top_p(Some(0.95));
    let model = model.model.valid();
    // As with `say`, nobody need be listening.
    let show = |text: &str| {
        let _ = stdout()
            .write_all(text.as_bytes())
            .and_then(|()| stdout().flush());
    };
    say("\n--- the model continues the held-out text ---");
    show(&plan.prompt);
    let mut characters = Utf8Stream::new();
    for token in Generator::new(&model, &tokens, SAMPLE_TOKENS, sampling, device)? {
        show(&characters.push(&plan.tokenizer.decode_bytes(&[token?])));
    }
    say(characters.finish());
    Ok(())
}
