//! Trains an encoder-decoder on sentence pairs and scores it, or translates with a trained one.
//!
//! cargo run --release --example translate -- --help

use std::{
    io::{BufRead, Write, stdin, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use burn::{module::Module, tensor::Device};
use clap::Parser;
use emberlm::{
    core::RandomKey,
    models::{EncoderDecoder, load_encoder_decoder},
    text::{
        ChrfOptions, Pair, PairCorpus, PairSplit, Tokenizer, TokenizerChoice, corpus_bleu,
        corpus_chrf,
    },
    training::{
        Fingerprint, PairEvaluationLoader, PairLoader, Report, RunFolder, TokenPair, Trainer,
        evenly_spaced,
    },
};
use emberlm_examples::{
    Course, HoldOut, HoldOutKind, Nearest, RunOptions, Search, Sentences, Stop, TokenizerRecord,
    TranslationConfig, TranslationOverrides, Translator, Watched, Work, announce_resume,
    check_writable, choose_device, complain, draw_attention, evaluate_unless_stopped, exit_code,
    export, final_figures, from_checkpoint, open_folder, prepare, say, say_figures, serve, shipped,
    train, write_json,
};
use serde::Serialize;

/// Learn to translate from sentence pairs, or translate with a trained model
#[derive(Parser)]
#[command(version)]
struct Args {
    /// With --run: the text to translate; without it, each line of standard input is translated as it comes
    #[arg(requires = "run")]
    text: Option<String>,
    /// Translate with the model of this run
    #[arg(long, value_name = "DIR", conflicts_with_all = ["pairs", "tokenizer", "hold_out", "held_out", "config", "steps",
        "seed", "dropout", "checkpoint_every", "out", "resume", "report", "export", "serve"])]
    run: Option<PathBuf>,
    /// Hypotheses that a translation is searched with; one is greedy [default: 1, and for the scores 4]
    #[arg(long, value_name = "N")]
    beam: Option<usize>,
    /// The log-probability of a hypothesis is divided by its length to this power
    #[arg(
        long,
        value_name = "POWER",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    length_penalty: f64,
    /// With --run and a text: draw what the decoder looks at as it writes the translation
    #[arg(long, value_name = "FILE.png", requires = "text")]
    attention: Option<PathBuf>,
    /// With --attention: what it writes, instead of its own translation
    #[arg(long, value_name = "TEXT", requires = "attention")]
    target: Option<String>,
    /// Pairs to train on: source TAB target a line, and perhaps TAB reference [default: the verses in English and
    /// Spanish that come with the repository]
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// The tokens of both sides: N that are learned from the training pairs, or those of a tokenizer.json that has
    /// <begin> and <end> [default: bpe:4096]
    #[arg(long, value_name = "bpe:N|FILE")]
    tokenizer: Option<String>,
    /// What is held out for the scores [default: random]
    #[arg(long)]
    hold_out: Option<HoldOutKind>,
    /// How many pairs; of books at least so many [default: 500, of books 1000]
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
    /// A JSON file with any fields of the model and the plan, over the defaults
    #[arg(long, value_name = "FILE.json")]
    config: Option<PathBuf>,
    /// Number of optimizer steps [default: 2560]
    #[arg(long)]
    steps: Option<u64>,
    /// Seed of initialisation, batches and dropout; what is held out does not depend on it
    #[arg(long)]
    seed: Option<u64>,
    /// Dropout rate [default: 0.1]
    #[arg(long, value_name = "RATE")]
    dropout: Option<f64>,
    /// Steps between checkpoints
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Do not train: write initial weights, the batches of all steps and the tokenizer into a new folder, for
    /// benches/peers/translate.py
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "resume", "serve", "report"])]
    export: Option<PathBuf>,
    /// Train nothing by itself: answer commands on standard input, for benches/peers/translate.py --beside
    #[arg(long, conflicts_with_all = ["out", "resume", "report"])]
    serve: bool,
    #[command(flatten)]
    options: RunOptions,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_code(translate(&Args::parse()))
}

fn translate(args: &Args) -> Result<ExitCode, AnyError> {
    let search = Search {
        n_beams: args.beam.unwrap_or(if args.run.is_some() { 1 } else { 4 }),
        length_penalty: args.length_penalty,
    };
    search.validate()?;
    let (device_name, device) = choose_device(args.options.new.show.device.as_deref())?;
    let own_model = || args.serve || args.export.is_some();
    match &args.run {
        Some(run) => use_run(args, run, &search, &device).map(|()| ExitCode::SUCCESS),
        None if own_model() => help_twin(args, &device).map(|()| ExitCode::SUCCESS),
        None => {
            say(format_args!("device: {device_name}"));
            train_and_score(args, &search, &device)
        }
    }
}

/// Translates with the model of a run.
fn use_run(args: &Args, run: &Path, search: &Search, device: &Device) -> Result<(), AnyError> {
    let (model, sentences) = load(run, device)?;
    let translator = Translator {
        model: &model,
        sentences: &sentences,
        device,
    };
    let Some(text) = &args.text else {
        return translate_lines(&translator, search);
    };
    if let Some(png) = &args.attention {
        check_writable("--attention", png)?;
    }
    if text.trim().is_empty() {
        return Err("the text is empty: give one to translate".into());
    }
    let translation = translator.translate(text, search)?;
    show(&translation)?;
    match &args.attention {
        Some(png) => {
            let target = args.target.as_ref().unwrap_or(&translation);
            draw(&translator, text, target, png)
        }
        None => Ok(()),
    }
}

/// Translates standard input line by line, as the lines come.
fn translate_lines(translator: &Translator, search: &Search) -> Result<(), AnyError> {
    for (number, line) in (1..).zip(stdin().lock().lines()) {
        let at = |error: &dyn std::fmt::Display| format!("line {number}: {error}");
        let line = line.map_err(|error| at(&error))?;
        match line.trim() {
            "" => show("")?,
            text => show(
                &translator
                    .translate(text, search)
                    .map_err(|error| at(&error))?,
            )?,
        }
    }
    Ok(())
}

fn show(line: &str) -> std::io::Result<()> {
    let mut output = stdout();
    writeln!(output, "{line}")?;
    output.flush()
}

/// Draws the attention to the tokens of a source as a target is written.
fn draw(translator: &Translator, source: &str, target: &str, png: &Path) -> Result<(), AnyError> {
    let sentences = translator.sentences;
    let (source, target) = (sentences.source(source), sentences.target(target));
    // At each token that is read the next one is written.
    let weights = translator.attention(&source, &target[..target.len() - 1])?;
    let label = |token: &u32| sentences.tokenizer.decode(&[*token]).trim().to_owned();
    let read: Vec<String> = source.iter().map(label).collect();
    let written: Vec<String> = target[1..].iter().map(label).collect();
    Ok(draw_attention(&weights, &read, &written, png)?)
}

/// The model of a run and its tokens: its weights, or its last checkpoint if it was killed before it wrote them.
fn load(run: &Path, device: &Device) -> Result<(EncoderDecoder, Sentences), AnyError> {
    let path = run.join(RunFolder::CONFIG);
    if !path.is_file() {
        return Err(format!(
            "{} holds no run: give the folder that translate wrote",
            run.display()
        )
        .into());
    }
    let config = TranslationConfig::read(&path)?;
    let sentences = Sentences::new(config.tokenizer.load(run)?)?;
    let model = match run.join(RunFolder::WEIGHTS).is_file() {
        true => load_encoder_decoder(run, device)?.1,
        false => from_checkpoint(run, &config.training, config.model.init(device))?,
    };
    Ok((model, sentences))
}

/// A run that is about to begin or to go on: everything is validated, nothing is created yet.
struct Plan {
    config: TranslationConfig,
    /// The steps that a run to be continued was planned with.
    earlier_steps: Option<u64>,
    sentences: Sentences,
    /// The training pairs as text, and the held-out ones.
    training_text: Vec<Pair>,
    held_out_text: Vec<Pair>,
    /// The same as tokens.
    training: Arc<[TokenPair]>,
    held_out: Arc<[TokenPair]>,
}

/// Resolves and validates configuration and pairs.
fn plan(args: &Args) -> Result<Plan, AnyError> {
    let overrides = TranslationOverrides {
        file: args.config.clone(),
        steps: args.steps,
        checkpoint_every: args.checkpoint_every,
        seed: args.seed,
        dropout: args.dropout,
    };
    let choice = args.tokenizer.as_deref();
    let choice: Option<TokenizerChoice> = choice.map(str::parse).transpose()?;
    let earlier = match &args.options.resume {
        None => None,
        Some(path) => {
            // Checks that it holds a run and that nobody trains in it.
            drop(RunFolder::open(path)?);
            Some(TranslationConfig::read(&path.join(RunFolder::CONFIG))?)
        }
    };
    let path = match (&args.pairs, &earlier) {
        (Some(path), _) => path.clone(),
        (None, Some(earlier)) => earlier.pairs.path.clone(),
        (None, None) => shipped("verses-en-es.tsv"),
    };
    let corpus = PairCorpus::open(&path)?;
    let pairs = fingerprint(&path)?;
    let hold_out = hold_out(args, earlier.as_ref())?;
    let split = hold_out.split(&corpus)?;
    let earlier_steps = earlier.as_ref().map(|earlier| earlier.training.steps);
    let (config, sentences) = match (earlier, &args.options.resume) {
        (Some(earlier), Some(run)) => {
            let config = overrides.resume(&earlier)?;
            if (pairs.bytes, pairs.crc32) != (earlier.pairs.bytes, earlier.pairs.crc32) {
                return Err(format!(
                    "{} is not the file the run began with: a run continues on the same pairs only",
                    path.display()
                )
                .into());
            }
            if let Some(choice) = &choice {
                TokenizerRecord::check(Some(&config.tokenizer), choice)?;
            }
            let sentences = Sentences::new(config.tokenizer.load(run)?)?;
            (config, sentences)
        }
        _ => new_run(args, &overrides, choice, pairs, hold_out, &split)?,
    };
    let tokens = |pairs: &[&Pair]| -> Arc<[TokenPair]> {
        pairs.iter().map(|pair| sentences.pair(pair)).collect()
    };
    let plan = Plan {
        training: tokens(&split.training),
        held_out: tokens(&split.held_out),
        training_text: split.training.into_iter().cloned().collect(),
        held_out_text: split.held_out.into_iter().cloned().collect(),
        config,
        earlier_steps,
        sentences,
    };
    check_positions(&plan)?;
    Ok(plan)
}

fn new_run(
    args: &Args,
    overrides: &TranslationOverrides,
    choice: Option<TokenizerChoice>,
    pairs: Fingerprint,
    hold_out: HoldOut,
    split: &PairSplit,
) -> Result<(TranslationConfig, Sentences), AnyError> {
    if let Some(path) = args.options.new.out.as_ref().or(args.export.as_ref()) {
        RunFolder::check_free(path)?;
    }
    let choice = choice.unwrap_or(TokenizerChoice::Bpe { vocab_size: 4096 });
    if let TokenizerChoice::Bpe { vocab_size } = choice {
        // Before the training of the tokenizer, which takes seconds.
        overrides.resolve(vocab_size)?;
    }
    let sentences = Sentences::choose(&choice, &split.training)?;
    let (model, training) = overrides.resolve(sentences.tokenizer.vocab_size())?;
    let record = TokenizerRecord::of(&sentences.tokenizer, &choice);
    let config = TranslationConfig {
        model,
        training,
        pairs,
        hold_out,
        tokenizer: record.expect("bytes have no special tokens"),
    };
    Ok((config, sentences))
}

/// What was asked for, which must be what the run to be continued has.
fn hold_out(args: &Args, earlier: Option<&TranslationConfig>) -> Result<HoldOut, AnyError> {
    let of_run = earlier.map(|earlier| earlier.hold_out);
    let default = of_run.unwrap_or(HoldOut::new(HoldOutKind::Random));
    let kind = args.hold_out.unwrap_or(default.kind);
    let default = if kind == default.kind {
        default
    } else {
        HoldOut::new(kind)
    };
    let n_pairs = args.held_out.unwrap_or(default.n_pairs);
    let asked = HoldOut { kind, n_pairs };
    match of_run {
        Some(of_run) if of_run != asked => Err(format!(
            "the run to be resumed holds out other pairs ({:?}, {}): leave --hold-out and --held-out away, or begin a new run",
            of_run.kind, of_run.n_pairs
        )
        .into()),
        _ => Ok(asked),
    }
}

/// The path, length and checksum of a file that was read.
fn fingerprint(path: &Path) -> Result<Fingerprint, AnyError> {
    let corpus = emberlm::text::Corpus::open(&[std::path::absolute(path)?])?;
    let mut fingerprints = corpus.fingerprints();
    Ok(fingerprints.swap_remove(0))
}

/// All pairs must have positions, where these are learned.
fn check_positions(plan: &Plan) -> Result<(), AnyError> {
    let Some(longest) = plan.config.model.positions.max_seq_length() else {
        return Ok(());
    };
    let all = plan.training.iter().chain(plan.held_out.iter());
    let needed = all
        .map(|pair| pair.source.len().max(pair.n_predicted()))
        .max();
    match needed {
        Some(needed) if needed > longest => Err(format!(
            "the longest sentence has {needed} tokens, but model.positions has {longest}: raise max_seq_length"
        )
        .into()),
        _ => Ok(()),
    }
}

/// Writes or does what the twin in PyTorch compares itself with.
fn help_twin(args: &Args, device: &Device) -> Result<(), AnyError> {
    let plan = plan(args)?;
    if let Some(folder) = &args.export {
        let model = plan.config.model.init(device);
        return export(
            folder,
            &model,
            &plan.sentences,
            &plan.training,
            &plan.config.training,
        );
    }
    let model = plan.config.model.init(&device.clone().autodiff());
    let mut training = plan.config.training.clone();
    // As many as are asked for.
    training.steps = u64::from(u32::MAX);
    let loader = PairLoader::new(plan.training.clone(), &training, 1, device);
    serve(model, &loader, &training, stdin().lock(), stdout())
}

fn train_and_score(args: &Args, search: &Search, device: &Device) -> Result<ExitCode, AnyError> {
    let plan = plan(args)?;
    if let Some(path) = &args.options.new.report {
        check_writable("--report", path)?;
    }
    let stop = Stop::on_signals()?;
    let folder = open_folder(
        args.options.resume.as_deref(),
        args.options.new.out.as_deref(),
    )?;
    if args.options.resume.is_none() {
        plan.sentences
            .tokenizer
            .save(folder.file(Tokenizer::FILE_NAME))?;
    }
    // At once: a run that is killed while its model is made can be resumed too.
    plan.config.write(&folder.file(RunFolder::CONFIG))?;
    let model = plan.config.model.init(&device.clone().autodiff());
    let trainer = prepare(model, &plan.config.training, &folder)?;
    announce(&plan, &folder, &trainer);
    let watched = Watched {
        folder: &folder,
        stop: &stop,
        no_tui: args.options.new.show.no_tui,
        bytes_per_token: Some(bytes_per_token(&plan)),
    };
    let (config, step) = (&plan.config.training, trainer.session.counters.step);
    let training = PairLoader::new(plan.training.clone(), config, step + 1, device);
    let chosen = evenly_spaced(plan.held_out.len(), config.validation_windows);
    let validation = held_out_loader(&plan, plan.held_out.clone(), &chosen, device);
    let trainer = match train(trainer, training, validation, &watched)? {
        Course::Finished(trainer) => trainer,
        Course::Left(code) => return Ok(code),
    };
    let Some(report) = score(&trainer, &plan, &folder, search, device, &stop)? else {
        say(format_args!(
            "stopped before the held-out pairs were scored; all steps are saved: continue with --resume {}",
            folder.path().display()
        ));
        return Ok(ExitCode::SUCCESS);
    };
    write_json(&folder.file(Report::FILE_NAME), &report)?;
    if let Some(path) = &args.options.new.report {
        write_json(path, &report)?;
    }
    say_figures(&trainer, &report.figures, "the held-out pairs");
    report.say();
    say(format_args!("\nrun: {}", folder.path().display()));
    Ok(ExitCode::SUCCESS)
}

fn announce(plan: &Plan, folder: &RunFolder, trainer: &Trainer<EncoderDecoder>) {
    let training = &plan.config.training;
    say(format_args!(
        "pairs: {} training and {} held-out, of {} tokens in the vocabulary",
        plan.training.len(),
        plan.held_out.len(),
        plan.sentences.tokenizer.vocab_size()
    ));
    say(format_args!(
        "model: {} parameters; {} steps of at most {} target tokens; run: {}",
        trainer.session.model.num_params(),
        training.steps,
        training.tokens_per_step(),
        folder.path().display()
    ));
    announce_resume(trainer, plan.earlier_steps);
}

/// Of the targets of the held-out pairs, their end tokens counted.
fn bytes_per_token(plan: &Plan) -> f64 {
    let bytes: usize = plan
        .held_out_text
        .iter()
        .map(|pair| pair.target.len())
        .sum();
    let tokens: usize = plan.held_out.iter().map(TokenPair::n_predicted).sum();
    bytes as f64 / tokens as f64
}

fn held_out_loader(
    plan: &Plan,
    pairs: Arc<[TokenPair]>,
    chosen: &[usize],
    device: &Device,
) -> PairEvaluationLoader {
    let training = &plan.config.training;
    let max_tokens = training.tokens_per_step() / training.accumulation;
    PairEvaluationLoader::new(pairs, chosen, max_tokens, device)
}

/// The final figures, as `report.json` has them.
#[derive(Serialize)]
struct TranslationReport {
    #[serde(flatten)]
    figures: Report,
    training_pairs: usize,
    held_out_pairs: usize,
    /// The loss where each target has the source of another: how much the model looks at sources.
    shuffled_sources_loss: f64,
    length_penalty: f64,
    systems: Vec<SystemScore>,
}

/// How well held-out sources are translated in one way.
#[derive(Serialize)]
struct SystemScore {
    system: String,
    bleu: f64,
    chrf: f64,
    /// Of the search, where there is one, and what it wrote.
    seconds: Option<f64>,
    tokens: Option<usize>,
}

// A model that has learned to look at its source loses more than this, in nats per token, with another one.
const LEAST_DIFFERENCE: f64 = 0.5;

/// Measures the losses and scores translations of the held-out pairs; nothing if a signal came in between.
fn score(
    trainer: &Trainer<EncoderDecoder>,
    plan: &Plan,
    folder: &RunFolder,
    search: &Search,
    device: &Device,
    stop: &Stop,
) -> Result<Option<TranslationReport>, AnyError> {
    let all: Vec<usize> = (0..plan.held_out.len()).collect();
    let loss = |pairs: Arc<[TokenPair]>| {
        let loader = held_out_loader(plan, pairs, &all, device);
        let work = Work::new("reading the held-out pairs", "pairs");
        let figures = evaluate_unless_stopped(&trainer.session.model, &loader, work, stop)?;
        Ok::<_, AnyError>(figures.map(|figures| figures.loss()))
    };
    let (Some(valid_loss), Some(shuffled_sources_loss)) = (
        loss(plan.held_out.clone())?,
        loss(with_other_sources(&plan.held_out))?,
    ) else {
        return Ok(None);
    };
    let training: Vec<&Pair> = plan.training_text.iter().collect();
    let nearest = Nearest::new(&training);
    let without_model = |system: &str, translate: &dyn Fn(&Pair) -> String| {
        let translations = plan.held_out_text.iter().map(translate).collect();
        SystemScore::new(system.to_owned(), plan, translations)
    };
    let mut systems = vec![
        without_model("copy of the source", &|pair| pair.source.clone()),
        without_model("nearest training pair", &|pair| {
            nearest.find(&pair.source).target.clone()
        }),
    ];
    let model = trainer.session.model.model.valid();
    for search in [Search::GREEDY, *search] {
        match search_score(&model, plan, &search, device, stop)? {
            Some(score) => systems.push(score),
            None => return Ok(None),
        }
    }
    Ok(Some(TranslationReport {
        figures: final_figures(trainer, folder, valid_loss, Some(bytes_per_token(plan)))?,
        training_pairs: plan.training.len(),
        held_out_pairs: plan.held_out.len(),
        shuffled_sources_loss,
        length_penalty: search.length_penalty,
        systems,
    }))
}

/// The pairs in their order, each with the source of the next one in an order drawn at random.
fn with_other_sources(pairs: &[TokenPair]) -> Arc<[TokenPair]> {
    let key = RandomKey::new(0);
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_key(|&i| key.bits(i as u64));
    let mut shuffled = pairs.to_vec();
    for (i, next) in order.iter().zip(order.iter().cycle().skip(1)) {
        shuffled[*i].source = pairs[*next].source.clone();
    }
    shuffled.into()
}

fn search_score(
    model: &EncoderDecoder,
    plan: &Plan,
    search: &Search,
    device: &Device,
    stop: &Stop,
) -> Result<Option<SystemScore>, AnyError> {
    let translator = Translator {
        model,
        sentences: &plan.sentences,
        device,
    };
    let sources: Vec<Vec<u32>> = plan
        .held_out
        .iter()
        .map(|pair| pair.source.clone())
        .collect();
    let mut work = Work::new("translating the held-out pairs", "pairs");
    let begin = Instant::now();
    let found = translator.translate_all(&sources, search, |done| {
        work.tell(done as u64, sources.len() as u64);
        !stop.requested()
    })?;
    let Some(found) = found else {
        return Ok(None);
    };
    let seconds = begin.elapsed().as_secs_f64();
    let texts = found.iter().map(|tokens| plan.sentences.text(tokens));
    let system = match search.n_beams {
        1 => "greedy".to_owned(),
        n => format!("beam {n}"),
    };
    Ok(Some(SystemScore {
        seconds: Some(seconds),
        tokens: Some(found.iter().map(Vec::len).sum()),
        ..SystemScore::new(system, plan, texts.collect())
    }))
}

impl SystemScore {
    fn new(system: String, plan: &Plan, translations: Vec<String>) -> Self {
        let references = plan.held_out_text.iter().map(|pair| &pair.target[..]);
        let references: Vec<&str> = references.collect();
        Self {
            system,
            bleu: corpus_bleu(&translations, &references).score,
            chrf: corpus_chrf(&translations, &references, &ChrfOptions::default()),
            seconds: None,
            tokens: None,
        }
    }
}

impl TranslationReport {
    fn say(&self) {
        let valid_loss = self.figures.valid_loss.unwrap_or(f64::NAN);
        let difference = self.shuffled_sources_loss - valid_loss;
        say(format_args!(
            "with the sources of other pairs: loss {:.4} ({difference:+.4})",
            self.shuffled_sources_loss
        ));
        if difference < LEAST_DIFFERENCE {
            complain(format_args!(
                "warning: that is less than {LEAST_DIFFERENCE} nats more: the model hardly looks at its source yet; train it for more steps"
            ));
        }
        say(format_args!(
            "\n{:<24}{:>8}{:>8}",
            "held-out pairs", "BLEU", "chrF2"
        ));
        for SystemScore {
            system,
            bleu,
            chrf,
            seconds,
            tokens,
        } in &self.systems
        {
            let speed = match (seconds, tokens) {
                (Some(seconds), Some(tokens)) => {
                    format!(
                        "   {seconds:.1} s, {:.0} tokens/s",
                        *tokens as f64 / seconds
                    )
                }
                _ => String::new(),
            };
            say(format_args!("{system:<24}{bleu:>8.2}{chrf:>8.2}{speed}"));
        }
    }
}
