//! Compares attention patterns on long inputs: a table of models that differ in nothing else.
//!
//! cargo run --release --example long_document -- --help

use std::{
    env,
    io::{IsTerminal, stdin},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus},
    sync::Arc,
    thread,
    time::Duration,
};

use burn::{data::dataloader::DataLoader, module::Module, tensor::Device};
use clap::{Parser, ValueEnum};
use emberlm::{
    core::TokenBatch,
    text::Corpus,
    training::{
        EvaluationLoader, EvaluationWindows, Fingerprint, Report, RunFolder, RunHistory, Trainable,
        Trainer, TrainingError, TrainingLoader, TrainingWindows,
    },
};
use emberlm_examples::{
    CaseLoader, Chance, Course, DocumentConfig, DocumentOverrides, DocumentPattern, DocumentTable,
    DocumentTask, NovelCases, RowReport, ShowOptions, Stop, TaskKind, Watched, Work,
    announce_resume, check_writable, choose_device, class_accuracy, complain,
    evaluate_unless_stopped, exit_code, final_figures, novels, open_folder, plot, prepare, say,
    shipped, train, write_json,
};

/// Compare attention patterns on long inputs
///
/// Each row of the table is a model of its own, trained by a process of its own in a folder of its own. A table that was
/// stopped goes on with --resume: what is done is not done again.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// What the models learn
    #[arg(long)]
    task: Option<TaskKind>,
    /// One row alone, in this process [default: all, one after the other]
    #[arg(long)]
    pattern: Option<DocumentPattern>,
    /// Text: a UTF-8 file, or a folder of *.txt and *.md; may be given several times, once for each novel [default: the
    /// six novels of Jane Austen that come with the repository]
    #[arg(long, value_name = "FILE|DIR")]
    text: Vec<PathBuf>,
    /// Bytes of a sequence [default: 8192]
    #[arg(long)]
    seq_length: Option<usize>,
    /// Optimizer steps of each row [default: 150, for the novels 300]
    #[arg(long)]
    steps: Option<u64>,
    /// Sequences in a step [default: 2, for the novels 4]
    #[arg(long)]
    batch_size: Option<usize>,
    /// Blocks of the models [default: 2]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Width of the models [default: 64]
    #[arg(long)]
    width: Option<usize>,
    /// Heads of the models [default: 4, for the novels 2]
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Bytes at the end of a case that are of another novel [default: 512]
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
    /// Held-out cases that the accuracy is measured on [default: 600]
    #[arg(long, value_name = "N")]
    cases: Option<usize>,
    /// Learning rate after the warm-up [default: 2e-3, for the novels 4e-3]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Seed of initialisation and batches; the held-out cases do not depend on it
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between checkpoints [default: 25]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// The table's folder, new or empty [default: the next number under runs/]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Continue the table in this folder
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Where the table goes as JSON too, besides its folder
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Whether another process prints the table that this row is of
    #[arg(long, hide = true, requires_all = ["resume", "pattern"])]
    part: bool,
    #[command(flatten)]
    show: ShowOptions,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_code(compare_patterns(&Args::parse()))
}

/// What the sequences are made of.
enum Data {
    Windows {
        training: Arc<TrainingWindows>,
        held_out: Arc<EvaluationWindows>,
    },
    Cases {
        cases: Arc<NovelCases>,
        n_cases: usize,
    },
}

fn compare_patterns(args: &Args) -> Result<ExitCode, AnyError> {
    let (device_name, device) = choose_device(args.show.device.as_deref())?;
    let (config, earlier_steps, data) = plan(args)?;
    if let Some(path) = &args.report {
        check_writable("--report", path)?;
    }
    say(format_args!("device: {device_name}"));
    let stop = Stop::on_signals()?;
    let folder = table_folder(args, &config)?;
    let rows = match args.pattern {
        Some(pattern) => vec![pattern],
        None => DocumentPattern::value_variants().to_vec(),
    };
    for pattern in &rows {
        let left = match args.pattern {
            Some(_) => {
                let row = Row {
                    args,
                    folder: row_folder(&folder.join(pattern.to_string()))?,
                    pattern: *pattern,
                    config: config.of_row(*pattern),
                    earlier_steps,
                    device: &device,
                    stop: &stop,
                };
                row.run(&data)?
            }
            None => run_in_process(args, &folder, *pattern, &config, &stop)?,
        };
        if let Some(code) = left {
            return Ok(code);
        }
    }
    if !args.part {
        show_table(args, &folder, &rows, &config, &data)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Resolves and validates configuration and text; with the steps that a table to be continued was planned with.
fn plan(args: &Args) -> Result<(DocumentConfig, Option<u64>, Data), AnyError> {
    let overrides = DocumentOverrides {
        task: args.task,
        steps: args.steps,
        batch_size: args.batch_size,
        seq_length: args.seq_length,
        layers: args.layers,
        width: args.width,
        heads: args.heads,
        tail: args.tail,
        cases: args.cases,
        learning_rate: args.learning_rate,
        seed: args.seed,
        checkpoint_every: args.checkpoint_every,
    };
    let earlier = match &args.resume {
        None => None,
        Some(folder) => {
            let path = folder.join(RunFolder::CONFIG);
            if !path.is_file() {
                return Err(format!(
                    "{} holds no table: give the folder that long_document wrote",
                    folder.display()
                )
                .into());
            }
            Some(DocumentConfig::read(&path)?)
        }
    };
    let sources = match (&args.text[..], &earlier) {
        ([], Some(earlier)) => earlier.sources.clone(),
        ([], None) => vec![shipped("austen.txt")],
        (given, _) => given.to_vec(),
    };
    let corpus = Corpus::open(&sources)?;
    let documents = corpus.fingerprints();
    let config = match &earlier {
        Some(earlier) => {
            let content = |all: &[Fingerprint]| -> Vec<(u64, u32)> {
                all.iter().map(|d| (d.bytes, d.crc32)).collect()
            };
            if content(&documents) != content(&earlier.documents) {
                return Err(
                    "this is not the text the table began with: it continues on the same only"
                        .into(),
                );
            }
            overrides.resume(earlier)?
        }
        None => {
            let absolute = sources.iter().map(std::path::absolute);
            overrides.resolve(absolute.collect::<Result<_, _>>()?, documents)?
        }
    };
    let (seq_length, seed) = (config.training.seq_length, config.training.seed);
    let data = match config.task {
        DocumentTask::LanguageModel => Data::Windows {
            training: Arc::new(TrainingWindows::new(corpus.training(), seq_length, seed)?),
            held_out: Arc::new(EvaluationWindows::new(corpus.held_out(), seq_length)?),
        },
        DocumentTask::Novel { tail, n_cases } => Data::Cases {
            cases: Arc::new(NovelCases::new(novels(&corpus)?, seq_length, tail, seed)?),
            n_cases,
        },
    };
    Ok((config, earlier.map(|earlier| earlier.training.steps), data))
}

/// The folder of the table, which has its configuration.
fn table_folder(args: &Args, config: &DocumentConfig) -> Result<PathBuf, AnyError> {
    let folder = match &args.resume {
        Some(folder) => folder.clone(),
        // Its lock goes at once: it is the rows that are trained in.
        None => open_folder(None, args.out.as_deref())?.path().to_owned(),
    };
    config.write(&folder.join(RunFolder::CONFIG))?;
    Ok(folder)
}

/// The folder of a row, which is a run.
fn row_folder(path: &Path) -> Result<RunFolder, AnyError> {
    Ok(match path.join(RunFolder::CONFIG).is_file() {
        true => RunFolder::open(path)?,
        false => RunFolder::create(path)?,
    })
}

/// Runs a row in a process of its own, whose memory is that of the row alone. Gives an exit code where the table ends with
/// it.
fn run_in_process(
    args: &Args,
    folder: &Path,
    pattern: DocumentPattern,
    config: &DocumentConfig,
    stop: &Stop,
) -> Result<Option<ExitCode>, AnyError> {
    let row = folder.join(pattern.to_string());
    if RowReport::of(&row, config.training.steps)?.is_some() {
        return Ok(None);
    }
    say(format_args!("\n--- {pattern} ---"));
    let mut command = Command::new(env::current_exe()?);
    command.arg("--resume").arg(folder);
    command.args(["--part", "--pattern", &pattern.to_string()]);
    if let Some(device) = &args.show.device {
        command.args(["--device", device]);
    }
    if args.show.no_tui {
        command.arg("--no-tui");
    }
    let status = wait(command.spawn()?, stop)?;
    let is_done = RowReport::of(&row, config.training.steps)?.is_some();
    Ok(match status.code() {
        Some(0) if is_done && !stop.requested() => None,
        Some(0) => {
            say(format_args!(
                "the table goes on with --resume {}",
                folder.display()
            ));
            Some(ExitCode::SUCCESS)
        }
        // It has said why.
        Some(code) => Some(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        None => {
            complain(format_args!(
                "killed: the table goes on with --resume {}",
                folder.display()
            ));
            Some(ExitCode::from(137))
        }
    })
}

/// Waits for the end of a row. A request to stop goes on to it, unless it comes from a terminal, which asks both.
fn wait(mut row: Child, stop: &Stop) -> Result<ExitStatus, AnyError> {
    let mut must_tell = !stdin().is_terminal();
    loop {
        if let Some(status) = row.try_wait()? {
            return Ok(status);
        }
        if must_tell && stop.requested() {
            must_tell = false;
            ask_to_stop(&mut row)?;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(unix)]
fn ask_to_stop(row: &mut Child) -> Result<(), AnyError> {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    Ok(kill(Pid::from_raw(row.id() as i32), Signal::SIGTERM)?)
}

/// Its last checkpoint is what it goes on from.
#[cfg(not(unix))]
fn ask_to_stop(row: &mut Child) -> Result<(), AnyError> {
    Ok(row.kill()?)
}

/// A row that is about to begin or to go on.
struct Row<'a> {
    args: &'a Args,
    folder: RunFolder,
    pattern: DocumentPattern,
    config: DocumentConfig,
    earlier_steps: Option<u64>,
    device: &'a Device,
    stop: &'a Stop,
}

/// The figures of a row's model on held-out text.
struct Measured {
    loss: f64,
    accuracy: Option<f64>,
}

impl Row<'_> {
    /// Gives an exit code where the program ends with the row.
    fn run(&self, data: &Data) -> Result<Option<ExitCode>, AnyError> {
        let training = &self.config.training;
        if RowReport::of(self.folder.path(), training.steps)?.is_some() {
            return Ok(None);
        }
        self.config.write(&self.folder.file(RunFolder::CONFIG))?;
        let (device, stop, batch_size) = (self.device, self.stop, training.batch_size);
        let autodiff = device.clone().autodiff();
        match data {
            Data::Windows {
                training: windows,
                held_out,
            } => {
                let evaluation = |chosen: &[usize]| {
                    EvaluationLoader::new(held_out.clone(), chosen, batch_size, device)
                };
                let all: Vec<usize> = (0..held_out.len()).collect();
                self.train(
                    self.config.decoder(self.pattern).init(&autodiff),
                    training.tokens_per_step(),
                    |first| TrainingLoader::new(windows.clone(), training, first, device),
                    evaluation(&held_out.fixed(training.validation_windows)),
                    Some(1.0),
                    |trainer| {
                        let work = Work::new("reading the held-out text", "windows");
                        let model = &trainer.session.model;
                        let figures =
                            evaluate_unless_stopped(model, &evaluation(&all), work, stop)?;
                        Ok(figures.map(|figures| Measured {
                            loss: figures.loss(),
                            accuracy: None,
                        }))
                    },
                )
            }
            Data::Cases { cases, n_cases } => {
                let held_out = |n| CaseLoader::held_out(cases.clone(), n, batch_size, device);
                let n_classes = cases.n_novels();
                self.train(
                    (self.config).new_classifier(self.pattern, n_classes, &autodiff),
                    batch_size * cases.n_asked(),
                    |first| CaseLoader::training(cases.clone(), training, first, device),
                    held_out(training.validation_windows.min(*n_cases)),
                    None,
                    |trainer| {
                        let mut work = Work::new("classifying the held-out cases", "cases");
                        let mut done = 0;
                        let model = trainer.session.model.model.valid();
                        let figures = class_accuracy(&model, &held_out(*n_cases), |rows| {
                            done += rows as u64;
                            work.tell(done, *n_cases as u64);
                            match stop.requested() {
                                true => Err(TrainingError::Stopped),
                                false => Ok(()),
                            }
                        });
                        match figures {
                            Err(TrainingError::Stopped) => Ok(None),
                            figures => figures.map(|figures| {
                                Some(Measured {
                                    loss: figures.loss,
                                    accuracy: Some(figures.accuracy),
                                })
                            }),
                        }
                    },
                )
            }
        }
    }

    fn train<N: Trainable, L: DataLoader<TokenBatch> + 'static>(
        &self,
        model: N,
        targets_per_step: usize,
        training: impl FnOnce(u64) -> L,
        validation: impl DataLoader<TokenBatch> + 'static,
        bytes_per_token: Option<f64>,
        measure: impl FnOnce(&Trainer<N>) -> Result<Option<Measured>, TrainingError>,
    ) -> Result<Option<ExitCode>, AnyError> {
        let config = &self.config.training;
        let trainer = prepare(model, config, &self.folder)?;
        say(format_args!(
            "{} of {}: {} parameters; {} steps of {} x {} bytes; run: {}",
            self.config.task,
            self.pattern,
            trainer.session.model.num_params(),
            config.steps,
            config.batch_size,
            config.seq_length,
            self.folder.path().display()
        ));
        announce_resume(&trainer, self.earlier_steps);
        let watched = Watched {
            folder: &self.folder,
            stop: self.stop,
            no_tui: self.args.show.no_tui,
            bytes_per_token,
        };
        let training = training(trainer.session.counters.step + 1);
        let trainer = match train(trainer, training, validation, &watched)? {
            Course::Finished(trainer) => trainer,
            Course::Left(code) => return Ok(Some(code)),
        };
        let Some(measured) = measure(&trainer)? else {
            say(format_args!(
                "stopped before it was measured; all steps are saved: continue with --resume {}",
                self.folder
                    .path()
                    .parent()
                    .unwrap_or(Path::new("."))
                    .display()
            ));
            return Ok(Some(ExitCode::SUCCESS));
        };
        let report = RowReport {
            pattern: self.pattern,
            figures: final_figures(&trainer, &self.folder, measured.loss, bytes_per_token)?,
            accuracy: measured.accuracy,
            // From the speed, which leaves out the first steps.
            seconds_per_step: (trainer.session.counters.tokens_per_second())
                .map(|speed| targets_per_step as f64 / speed),
        };
        write_json(&self.folder.file(Report::FILE_NAME), &report)?;
        Ok(None)
    }
}

/// Prints the table of the rows that were asked for, writes it, and draws their losses against time.
fn show_table(
    args: &Args,
    folder: &Path,
    rows: &[DocumentPattern],
    config: &DocumentConfig,
    data: &Data,
) -> Result<(), AnyError> {
    let (mut reports, mut histories) = (Vec::new(), Vec::new());
    for pattern in rows {
        let row = folder.join(pattern.to_string());
        if let Some(report) = RowReport::of(&row, config.training.steps)? {
            reports.push(report);
            histories.push(RunHistory::load(&row)?);
        }
    }
    let table = DocumentTable {
        task: config.task.to_string(),
        chance: match data {
            Data::Windows { .. } => None,
            Data::Cases { cases, n_cases } => Some(Chance::new(cases.n_novels(), *n_cases)),
        },
        rows: reports,
    };
    say(format_args!("\n{}", table.text()));
    if let Some(path) = &args.report {
        write_json(path, &table)?;
    }
    if args.pattern.is_none() {
        write_json(&folder.join(Report::FILE_NAME), &table)?;
        let [svg, png] = ["curves.svg", "curves.png"].map(|name| folder.join(name));
        plot::draw_curves_by_time(&histories, &svg, &png)?;
        say(format_args!("curves: {}, {}", svg.display(), png.display()));
    }
    say(format_args!("table: {}", folder.display()));
    Ok(())
}
