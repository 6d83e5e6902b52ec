//! A training run of a program: its folder, its course, its figures.

use std::{
    any::Any,
    error::Error,
    fs,
    io::{IsTerminal, stdout},
    panic,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use burn::{data::dataloader::DataLoader, module::Module};
use emberlm::{
    core::TokenBatch,
    models::save_weights,
    training::{
        CheckpointReader, CheckpointStore, Ending, LanguageModel, LineRenderer,
        MAX_SKIPPED_IN_A_ROW, MetricsLog, Report, RunError, RunFolder, RunHistory, ScheduleKind,
        Session, StepOutput, Trainable, Trained, Trainer, TrainingConfig, TrainingError, Watch,
        evaluate, peak_memory_bytes, short_duration,
    },
};

use crate::{
    Stop, Work, complain, draw_load, keep_ctrl_c, plot,
    run_log::{LOG_FILE, log_to},
    say,
};

type AnyError = Box<dyn Error>;

/// The folder of the run to resume, or a new one: the given one, or the next number under `runs/`.
///
/// # Errors
///
/// A folder that holds no run, is not empty, or is in use.
pub fn open_folder(resume: Option<&Path>, out: Option<&Path>) -> Result<RunFolder, RunError> {
    match (resume, out) {
        (Some(path), _) => RunFolder::open(path),
        (None, Some(path)) => RunFolder::create(path),
        (None, None) => RunFolder::create_numbered(Path::new("runs")),
    }
}

/// Makes sure that a file can be written before the work for it begins; `option` is where it was named.
///
/// # Errors
///
/// A path that is a folder, or is in a folder that does not exist.
pub fn check_writable(option: &str, path: &Path) -> Result<(), AnyError> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(format!(
            "{option} {}: give a file in a folder that exists",
            path.display()
        )
        .into());
    }
    Ok(())
}

/// A trainer of a new model, or of the last intact checkpoint in the folder.
///
/// # Errors
///
/// Checkpoints or a log that cannot be read, or a run that has done more steps than are planned.
pub fn prepare<N: Trainable>(
    model: N,
    training: &TrainingConfig,
    folder: &RunFolder,
) -> Result<Trainer<N>, AnyError> {
    let model = LanguageModel::with_config(model, training);
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

/// Says where a run goes on, and whether its schedule is another than it was planned with.
pub fn announce_resume<N: Trainable>(trainer: &Trainer<N>, earlier_steps: Option<u64>) {
    let (step, steps) = (trainer.session.counters.step, trainer.config.steps);
    if step > 0 {
        say(format_args!("resuming after step {step}"));
    }
    let of_steps = trainer.config.schedule.unwrap_or_default() == ScheduleKind::WarmupCosine;
    match earlier_steps {
        Some(earlier) if earlier != steps && of_steps => say(format_args!(
            "the learning-rate schedule changed: it now ends at step {steps} instead of {earlier}"
        )),
        _ => {}
    }
}

/// How a training is watched.
pub struct Watched<'a> {
    /// The run's.
    pub folder: &'a RunFolder,
    /// What stops it.
    pub stop: &'a Stop,
    /// Lines even on a terminal.
    pub no_tui: bool,
    /// For the bits per byte, where the targets are text.
    pub bytes_per_token: Option<f64>,
}

/// How a training went.
pub enum Course<N: Trainable> {
    /// All steps are done.
    Finished(Box<Trainer<N>>),
    /// It ended before, which was said; the program ends with this code.
    Left(ExitCode),
}

/// Trains to the last step, and leaves the weights in the run's folder.
///
/// # Errors
///
/// What ends a training besides its last step, and weights that cannot be written.
pub fn train<N: Trainable>(
    trainer: Trainer<N>,
    training: impl DataLoader<TokenBatch> + 'static,
    validation: impl DataLoader<TokenBatch> + 'static,
    watched: &Watched,
) -> Result<Course<N>, AnyError> {
    let weights = watched.folder.file(RunFolder::WEIGHTS);
    if trainer.session.counters.step < trainer.config.steps {
        // From here on the checkpoints are newer than the weights and the figures of an earlier end.
        for stale in [&weights, &watched.folder.file(Report::FILE_NAME)] {
            if stale.exists() {
                fs::remove_file(stale)?;
            }
        }
    }
    let how_to_resume = format!("--resume {}", watched.folder.path().display());
    let Ok((trainer, ending)) =
        train_unless_killed(trainer, Arc::new(training), Arc::new(validation), watched)
    else {
        complain(format_args!(
            "killed: continue from the last checkpoint with {how_to_resume}"
        ));
        return Ok(Course::Left(ExitCode::from(137)));
    };
    let ending = ending?;
    let step = trainer.session.counters.step;
    save_weights(&trainer.session.model.model, &weights)?;
    Ok(match ending {
        Ending::Finished => Course::Finished(Box::new(trainer)),
        Ending::Interrupted => {
            say(format_args!(
                "stopped after step {step} and saved: continue with {how_to_resume}"
            ));
            Course::Left(ExitCode::SUCCESS)
        }
        Ending::Diverged => {
            complain(format_args!(
                "error: {MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; saved after step {step}: lower the learning rate in a new run, or continue with {how_to_resume}"
            ));
            Course::Left(ExitCode::from(1))
        }
    })
}

/// The dashboard's user killed the run.
struct Killed;

fn train_unless_killed<N: Trainable>(
    trainer: Trainer<N>,
    training: Arc<dyn DataLoader<TokenBatch>>,
    validation: Arc<dyn DataLoader<TokenBatch>>,
    watched: &Watched,
) -> Result<Trained<N>, Killed> {
    let (steps, validate_every) = (trainer.config.steps, trainer.config.validate_every);
    let step = trainer.session.counters.step;
    let dashboard = stdout().is_terminal() && !watched.no_tui;
    let log = watched.folder.file(LOG_FILE);
    // The dashboard has the whole screen.
    log_to(&log, !dashboard);
    let lines = || {
        let every = Duration::from_secs(10);
        let lines = LineRenderer::new(stdout(), steps, step, validate_every, every);
        Box::new(lines) as Box<_>
    };
    let watch = Watch {
        renderer: (!dashboard).then(lines),
        interrupter: watched.stop.interrupter(),
        bytes_per_token: watched.bytes_per_token,
    };
    let guard = dashboard.then(keep_ctrl_c);
    // The dashboard's kill is a panic of burn-train's; any other panic goes on.
    let trained = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        trainer.train(training, validation, watched.folder.path(), watch)
    }));
    drop(guard);
    if dashboard && log.exists() {
        complain(format_args!("warnings: {}", log.display()));
    }
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

/// The figures over all of a loader, whose progress `work` shows; nothing if a signal came in between.
///
/// # Errors
///
/// A batch that cannot be loaded.
pub fn evaluate_unless_stopped<N: Trainable>(
    model: &LanguageModel<N>,
    loader: &dyn DataLoader<TokenBatch>,
    mut work: Work,
    stop: &Stop,
) -> Result<Option<StepOutput>, TrainingError> {
    let total = loader.num_items() as u64;
    let mut done = 0;
    let result = evaluate(model, loader, |_, rows| {
        done += rows as u64;
        work.tell(done, total);
        if stop.requested() {
            return Err(TrainingError::Stopped);
        }
        Ok(())
    });
    match result {
        Err(TrainingError::Stopped) => Ok(None),
        result => result.map(Some),
    }
}

// The training loss of a report is the mean over so many of the last steps.
const TRAIN_LOSS_STEPS: usize = 100;

/// The final figures of a run, whose curves are drawn into its folder; with bits per byte where the length of a token is
/// given.
///
/// # Errors
///
/// A log that cannot be read, or curves that cannot be drawn.
pub fn final_figures<N: Trainable>(
    trainer: &Trainer<N>,
    folder: &RunFolder,
    valid_loss: f64,
    bytes_per_token: Option<f64>,
) -> Result<Report, AnyError> {
    let counters = &trainer.session.counters;
    let history = RunHistory::load(folder.path())?;
    let losses = history.train_losses();
    let last = &losses[losses.len().saturating_sub(TRAIN_LOSS_STEPS)..];
    let train_loss = last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len() as f64;
    draw_load(&history.steps, &folder.file("experts.png"))?;
    plot::draw_curves(
        &[history],
        &folder.file("curves.svg"),
        &folder.file("curves.png"),
    )?;
    Ok(Report {
        train_loss: Some(train_loss),
        valid_loss: Some(valid_loss),
        bits_per_byte: bytes_per_token.map(|bytes| valid_loss / std::f64::consts::LN_2 / bytes),
        tokens_per_second: counters.tokens_per_second(),
        peak_memory_bytes: peak_memory_bytes(),
        parameters: Some(trainer.session.model.num_params() as u64),
        steps: Some(counters.step),
        seconds: Some(counters.seconds),
        ..Report::default()
    })
}

/// Says the final figures; the validation loss is that over `held_out`.
pub fn say_figures<N: Trainable>(trainer: &Trainer<N>, report: &Report, held_out: &str) {
    let counters = &trainer.session.counters;
    let figure = |value: Option<f64>| value.unwrap_or(f64::NAN);
    say(format_args!(
        "trained {} steps in {}{}: train loss {:.4}, validation loss {:.4} over {held_out}{}",
        counters.step,
        short_duration(Duration::from_secs_f64(counters.seconds)),
        match counters.tokens_per_second() {
            Some(speed) => format!(" at {speed:.0} tokens/s"),
            None => String::new(),
        },
        figure(report.train_loss),
        figure(report.valid_loss),
        match report.bits_per_byte {
            Some(bits) => format!(" ({bits:.4} bits per byte)"),
            None => String::new(),
        },
    ));
    if counters.skipped > 0 {
        say(format_args!(
            "{} steps were skipped: their loss or gradient was not finite",
            counters.skipped
        ));
    }
}

/// The model of the last checkpoint of a run that has no weights yet; `model` is a new one.
///
/// # Errors
///
/// A run without an intact checkpoint.
pub fn from_checkpoint<N: Trainable>(
    run: &Path,
    training: &TrainingConfig,
    model: N,
) -> Result<N, AnyError> {
    let reader = CheckpointReader::open(&run.join(RunFolder::CHECKPOINTS))?;
    let Some(loaded) = reader.load_newest()? else {
        return Err(format!(
            "{} has no weights yet: let it train to its first checkpoint",
            run.display()
        )
        .into());
    };
    for damaged in &loaded.damaged {
        complain(format_args!("warning: {damaged}"));
    }
    complain(format_args!(
        "the run was not finished: taking its checkpoint of step {}",
        loaded.checkpoint.step
    ));
    let session = Session::new(LanguageModel::new(model, 0.0, 0.0), training);
    let session = session.restore(&loaded.checkpoint, reader.dir())?;
    Ok(session.model.model.valid())
}
