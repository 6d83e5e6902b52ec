//! Pretrains a language model on text, shows how it goes, and writes a sample at the end.
//!
//! cargo run --release --example pretrain -- --help

use std::{path::PathBuf, process::ExitCode};

use burn::tensor::Device;
use clap::Parser;
use emberlm::{
    text::{Corpus, TokenizerChoice},
    training::RunFolder,
};
use emberlm_examples::{
    AttentionChoice, BalanceChoice, ModelConfig, ObjectiveKind, Overrides, Preset, Pretraining,
    RunConfig, RunOptions, Start, Stop, TokenizerRecord, Vocabulary, Work, announce_text,
    check_writable, choose_device, exit_code, say, shipped,
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
    /// Which tokens a token sees, as the program `pattern` takes it, or longformer:SIDE:GLOBALS; of an encoder-decoder, in
    /// its encoder [default: the preset's]
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<AttentionChoice>,
    /// How the experts of a model that has some are kept equally busy [default: the preset's]
    #[arg(long)]
    balance: Option<BalanceChoice>,
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
    #[command(flatten)]
    run: RunOptions,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_code(pretrain(&Args::parse()))
}

fn pretrain(args: &Args) -> Result<ExitCode, AnyError> {
    let (device_name, device) = choose_device(args.run.new.show.device.as_deref())?;
    say(format_args!("device: {device_name}"));
    let plan = plan(args)?;
    if let Some(path) = &args.run.new.report {
        check_writable("--report", path)?;
    }
    let (device, stop): (&Device, _) = (&device, Stop::on_signals()?);
    let place = args.run.new.place(args.run.resume.as_deref());
    let (plan, place, stop) = (&plan, &place, &stop);
    match plan.config.model.clone() {
        ModelConfig::Decoder(config) => {
            plan.run(place, device, stop, |d| Start::New(config.init(d)))
        }
        ModelConfig::Encoder(config) => {
            plan.run(place, device, stop, |d| Start::New(config.init(d)))
        }
        ModelConfig::EncoderDecoder(config) => {
            plan.run(place, device, stop, |d| Start::New(config.init(d)))
        }
    }
}

/// Resolves and validates configuration and text.
fn plan(args: &Args) -> Result<Pretraining, AnyError> {
    let overrides = Overrides {
        objective: args.objective,
        documents: args.documents,
        preset: args.preset,
        attention: args.pattern.clone(),
        balance: args.balance,
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
        vec![shipped("austen.txt")]
    } else {
        args.text.clone()
    };
    let earlier = match &args.run.resume {
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
    announce_text(&corpus);
    let documents = corpus.fingerprints();
    let earlier_steps = earlier.as_ref().map(|earlier| earlier.training.steps);
    let (config, tokenizer) = match (earlier, &args.run.resume) {
        (Some(earlier), Some(run)) => {
            let config = overrides.resume(&earlier)?;
            if let Some(changed) = earlier.changed_document(&documents) {
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
            if let Some(path) = &args.run.new.out {
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
    let plan = Pretraining::new(config, &corpus, tokenizer, &args.cache)?;
    Ok(plan.with_earlier_steps(earlier_steps))
}
