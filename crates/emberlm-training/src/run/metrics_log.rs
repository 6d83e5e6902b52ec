//! The metrics log: one line of JSON for every training step of a run.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use emberlm_core::{AuxiliaryKind, replace_file, sync_folder_of};
use serde::{Deserialize, Serialize, Serializer, ser::Error};

use super::error::RunError;
use crate::StepOutput;

/// What one training step measured.
///
/// An optional number that is not finite (the loss of a step that overflowed) is written as `null` and
/// read as `None`. Keys that are unknown here are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The number of the step, counted from 1 over all resumes.
    pub step: u64,
    /// The mean training loss of the step's batch, in nats per token.
    pub train_loss: Option<f64>,
    /// The learning rate that the step used.
    #[serde(serialize_with = "finite")]
    pub learning_rate: f64,
    /// The norm of the whole gradient before clipping.
    pub gradient_norm: Option<f64>,
    /// The training speed of the step, in tokens per second.
    pub tokens_per_second: Option<f64>,
    /// The highest memory use since the program started, in bytes; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// The training time since the beginning of the run, over all resumes, in seconds.
    #[serde(serialize_with = "finite")]
    pub seconds: f64,
    /// Whether the step left the weights as they were, because its loss or gradient was not finite.
    pub skipped: bool,
    /// The mean validation loss after the step, in nats per token; only on steps that were validated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
    /// Where the tokens went; only of models that route them to experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingRecord>,
}

/// Where the tokens of a step went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingRecord {
    /// The numbers of the layers that route.
    pub layers: Vec<usize>,
    /// How often each expert of each of those layers was chosen.
    pub load: Vec<Vec<u64>>,
    /// Share of the choices that were dropped; `None` where there was none.
    pub dropped_share: Option<f64>,
    /// Mean entropy of the routers' probabilities, in nats.
    pub entropy: Option<f64>,
    /// The balance loss, unweighted; `None` where the model has none.
    pub balance_loss: Option<f64>,
}

impl RoutingRecord {
    /// That of a step, or of a text; nothing where no layer routes.
    pub fn of(output: &StepOutput) -> Option<Self> {
        let all = output.routing_of_all()?;
        let finite = |value: f64| value.is_finite().then_some(value);
        Some(Self {
            layers: output.routing.iter().map(|(layer, _)| *layer).collect(),
            load: output
                .routing
                .iter()
                .map(|(_, of)| of.load.clone())
                .collect(),
            dropped_share: finite(all.dropped_share()),
            entropy: finite(all.entropy()),
            balance_loss: output.auxiliary(AuxiliaryKind::Balance).and_then(finite),
        })
    }
}

/// The metrics log of a running training, open at its end.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// use emberlm_training::{MetricsLog, StepRecord};
///
/// let record = StepRecord {
///     step: 1,
///     train_loss: Some(5.61),
///     learning_rate: 2e-5,
///     gradient_norm: Some(1.2),
///     tokens_per_second: Some(6100.0),
///     peak_memory_bytes: Some(123_456),
///     seconds: 0.41,
///     skipped: false,
///     valid_loss: None,
///     routing: None,
/// };
/// MetricsLog::open(dir.path())?.append(&record)?;
/// assert_eq!(MetricsLog::read(dir.path().join(MetricsLog::FILE_NAME))?, [record]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: BufWriter<File>,
    last_step: Option<u64>,
}

impl MetricsLog {
    /// The name of the log in a run's folder.
    pub const FILE_NAME: &str = "metrics.jsonl";

    /// Opens the log of the run in `dir`, which must exist, to add steps to it.
    ///
    /// A log that is already there is continued, without the torn line that a kill may have left at its
    /// end. To resume from a checkpoint, call [`truncate_after`](Self::truncate_after) first.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`], and [`RunError::DamagedLine`] for an existing log that cannot be read.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, RunError> {
        let path = dir.as_ref().join(Self::FILE_NAME);
        let last_step = match path.exists() {
            true => keep_up_to(&path, u64::MAX)?,
            false => None,
        };
        let file = File::options().append(true).create(true).open(&path);
        Ok(Self {
            file: BufWriter::new(file.map_err(RunError::io(&path))?),
            path,
            last_step,
        })
    }

    /// Adds a step and hands its line to the operating system, so that a kill loses at most a line that
    /// is just being written.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`], and [`RunError::Json`] for a number that must be finite and is not.
    ///
    /// # Panics
    ///
    /// If the step does not come after the last one in the log.
    pub fn append(&mut self, record: &StepRecord) -> Result<(), RunError> {
        if let Some(last) = self.last_step {
            let step = record.step;
            assert!(
                step > last,
                "step {step} cannot follow step {last}: truncate the log to the checkpoint's step first"
            );
        }
        let mut line = serde_json::to_vec(record).map_err(RunError::json(&self.path))?;
        line.push(b'\n');
        // The buffer keeps what a full disk did not take, for the next flush to continue the same line.
        self.file
            .write_all(&line)
            .map_err(RunError::io(&self.path))?;
        self.last_step = Some(record.step);
        self.file.flush().map_err(RunError::io(&self.path))
    }

    /// Hands all lines to the disk, so that a loss of power cannot leave the log behind a checkpoint that is
    /// made afterwards.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`].
    pub fn sync(&mut self) -> Result<(), RunError> {
        let mut sync = || {
            self.file.flush()?;
            self.file.get_ref().sync_all()?;
            sync_folder_of(&self.path)
        };
        sync().map_err(RunError::io(&self.path))
    }

    /// Reads the log at `path`. A torn line at its end, left by a kill, is ignored.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`], and [`RunError::DamagedLine`] for a line that is complete and yet no step
    /// record, or whose step does not come after the one before.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<StepRecord>, RunError> {
        let path = path.as_ref();
        let text = fs::read(path).map_err(RunError::io(path))?;
        let lines = complete_lines(&text, path)?;
        Ok(lines.into_iter().map(|(record, _)| record).collect())
    }

    /// Drops the steps after `step`, and a torn line, from the log at `path`, to resume the run from its
    /// checkpoint of that step. After an error or a kill the log is the old or the new one, never a part.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn truncate_after(path: impl AsRef<Path>, step: u64) -> Result<(), RunError> {
        keep_up_to(path.as_ref(), step).map(|_| ())
    }
}

/// Drops the lines of later steps and a torn line, and returns the last step that is left.
fn keep_up_to(path: &Path, step: u64) -> Result<Option<u64>, RunError> {
    let text = fs::read(path).map_err(RunError::io(path))?;
    let mut lines = complete_lines(&text, path)?;
    lines.retain(|(record, _)| record.step <= step);
    let kept: Vec<u8> = lines
        .iter()
        .flat_map(|&(_, line)| line.iter().chain(b"\n"))
        .copied()
        .collect();
    if kept != text {
        replace_file(path, &kept).map_err(RunError::io(path))?;
    }
    Ok(lines.last().map(|(record, _)| record.step))
}

/// Every line of the log with its record, without line ends and without a torn last line.
fn complete_lines<'a>(
    text: &'a [u8],
    path: &Path,
) -> Result<Vec<(StepRecord, &'a [u8])>, RunError> {
    let mut lines: Vec<(StepRecord, &[u8])> = Vec::new();
    for (index, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let damaged = |message| RunError::DamagedLine {
            path: path.to_owned(),
            line: index + 1,
            message,
        };
        let (line, ended) = match line.strip_suffix(b"\n") {
            Some(line) => (line, true),
            None => (line, false),
        };
        let record: StepRecord = match serde_json::from_slice(line) {
            Ok(record) => record,
            Err(_) if !ended => break,
            Err(error) => return Err(damaged(in_one_line(&error))),
        };
        if let Some((last, _)) = lines.last().filter(|(last, _)| last.step >= record.step) {
            let message = format!("step {} follows step {}", record.step, last.step);
            return Err(damaged(message));
        }
        lines.push((record, line));
    }
    Ok(lines)
}

/// The parser's message without its own line number, which would be 1 whatever the line of the log.
fn in_one_line(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rsplit_once(" at line ") {
        Some((message, _)) => format!("{message} at column {}", error.column()),
        None => message,
    }
}

/// Refuses the numbers that JSON would turn into a `null` which cannot be read back.
fn finite<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value.is_finite() {
        true => serializer.serialize_f64(*value),
        false => Err(S::Error::custom(format_args!(
            "{value} where a finite number must be"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            train_loss: Some(5.5),
            learning_rate: 2e-5,
            gradient_norm: Some(1.25),
            tokens_per_second: Some(6100.0),
            peak_memory_bytes: Some(123_456),
            seconds: 0.5 * step as f64,
            skipped: false,
            valid_loss: None,
            routing: None,
        }
    }

    /// A folder with the log of the given steps.
    fn log_of(steps: &[u64]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path()).unwrap();
        for &step in steps {
            log.append(&record(step)).unwrap();
        }
        let path = dir.path().join(MetricsLog::FILE_NAME);
        (dir, path)
    }

    fn add(path: &Path, text: &str) {
        let mut file = File::options().append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn steps(path: &Path) -> Vec<u64> {
        let records = MetricsLog::read(path).unwrap();
        records.iter().map(|record| record.step).collect()
    }

    /// The number of the damaged line and the message.
    fn damage(path: &Path) -> (usize, String) {
        match MetricsLog::read(path).unwrap_err() {
            RunError::DamagedLine { line, message, .. } => (line, message),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_step_is_one_line_that_is_there_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MetricsLog::FILE_NAME);
        let mut log = MetricsLog::open(dir.path()).unwrap();
        let validated = StepRecord {
            valid_loss: Some(5.25),
            ..record(2)
        };
        log.append(&record(1)).unwrap();
        let line = concat!(
            r#"{"step":1,"train_loss":5.5,"learning_rate":0.00002,"gradient_norm":1.25,"#,
            r#""tokens_per_second":6100.0,"peak_memory_bytes":123456,"seconds":0.5,"skipped":false}"#,
            "\n"
        );
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let written = fs::read_to_string(&path).unwrap();
        assert_eq!(value(&written), value(line));
        assert_eq!(written.matches('\n').count(), 1);
        assert!(written.ends_with('\n'));
        log.append(&validated).unwrap();
        log.sync().unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), [record(1), validated]);
    }

    #[test]
    fn losses_that_are_not_finite_are_null_and_read_as_none() {
        let (_dir, path) = log_of(&[]);
        let mut log = MetricsLog::open(path.parent().unwrap()).unwrap();
        let overflowed = StepRecord {
            train_loss: Some(f64::NAN),
            gradient_norm: Some(f64::INFINITY),
            tokens_per_second: Some(f64::INFINITY),
            valid_loss: Some(f64::NEG_INFINITY),
            skipped: true,
            ..record(1)
        };
        log.append(&overflowed).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for key in [
            "train_loss",
            "gradient_norm",
            "tokens_per_second",
            "valid_loss",
        ] {
            assert!(text.contains(&format!("\"{key}\":null")), "{text}");
        }
        let expected = StepRecord {
            train_loss: None,
            gradient_norm: None,
            tokens_per_second: None,
            valid_loss: None,
            ..overflowed
        };
        assert_eq!(MetricsLog::read(&path).unwrap(), [expected]);
    }

    #[test]
    fn a_number_that_could_not_be_read_back_is_not_written() {
        let (dir, path) = log_of(&[1]);
        let mut log = MetricsLog::open(dir.path()).unwrap();
        let broken = StepRecord {
            learning_rate: f64::INFINITY,
            ..record(2)
        };
        let error = log.append(&broken).unwrap_err();
        assert!(matches!(error, RunError::Json { .. }), "{error}");
        log.append(&record(2)).unwrap();
        assert_eq!(steps(&path), [1, 2]);
    }

    #[test]
    fn a_torn_last_line_is_ignored_wherever_it_is_torn() {
        let (_dir, path) = log_of(&[1, 2]);
        let line = serde_json::to_string(&record(3)).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..line.len() {
            fs::write(&path, [&whole, &line.as_bytes()[..length]].concat()).unwrap();
            assert_eq!(steps(&path), [1, 2], "{length}");
        }
        // Only the line end is missing: nothing of the step is.
        fs::write(&path, [&whole, line.as_bytes()].concat()).unwrap();
        assert_eq!(steps(&path), [1, 2, 3]);
        fs::write(&path, "").unwrap();
        assert!(steps(&path).is_empty());
    }

    #[test]
    fn damage_names_its_line() {
        let (_dir, path) = log_of(&[1, 2]);
        let next = serde_json::to_string(&record(3)).unwrap();
        let whole = fs::read_to_string(&path).unwrap();

        fs::write(&path, format!("{whole}{{\"step\":3,\"tr\n{next}\n")).unwrap();
        let (line, message) = damage(&path);
        assert_eq!(line, 3);
        assert!(message.ends_with("at column 13"), "{message}");

        fs::write(&path, format!("{whole}\n{next}\n")).unwrap();
        assert_eq!(damage(&path).0, 3);

        fs::write(&path, format!("{whole}{next}\n{whole}")).unwrap();
        assert_eq!(damage(&path), (4, "step 1 follows step 3".into()));

        // A line with its end was written to the end: it is damaged, not torn.
        fs::write(&path, format!("{whole}{{\"step\":3}}\n")).unwrap();
        assert_eq!(damage(&path).0, 3);
        let error = MetricsLog::open(path.parent().unwrap()).unwrap_err();
        assert!(error.to_string().contains("in line 3: missing field"));
    }

    #[test]
    fn an_old_log_is_continued_without_its_torn_line() {
        for torn in ["", "{\"step\":3,\"train_lo", "\0\0\0"] {
            let (dir, path) = log_of(&[1, 2]);
            add(&path, torn);
            let mut log = MetricsLog::open(dir.path()).unwrap();
            log.append(&record(3)).unwrap();
            assert_eq!(steps(&path), [1, 2, 3]);
        }
    }

    #[test]
    fn a_last_line_that_lacks_only_its_end_is_continued_in_a_new_line() {
        let (dir, path) = log_of(&[1]);
        add(&path, &serde_json::to_string(&record(2)).unwrap());
        let mut log = MetricsLog::open(dir.path()).unwrap();
        log.append(&record(3)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "step 2 cannot follow step 2")]
    fn a_step_is_logged_once() {
        let (dir, _path) = log_of(&[1, 2]);
        let mut log = MetricsLog::open(dir.path()).unwrap();
        log.append(&record(2)).unwrap();
    }

    #[test]
    fn truncation_drops_later_steps_and_the_torn_line() {
        for (step, left) in [
            (0, vec![]),
            (4, vec![2, 4]),
            (5, vec![2, 4]),
            (9, vec![2, 4, 7]),
        ] {
            let (dir, path) = log_of(&[2, 4, 7]);
            add(&path, "{\"step\":8,\"train_lo");
            MetricsLog::truncate_after(&path, step).unwrap();
            assert_eq!(steps(&path), left);
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(text.lines().count(), left.len());
            assert!(text.is_empty() || text.ends_with("}\n"));
            let files = fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(files, 1, "a temporary file was left behind");
            MetricsLog::open(dir.path())
                .unwrap()
                .append(&record(step + 1))
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn truncation_keeps_keys_that_are_unknown_here() {
        let (_dir, path) = log_of(&[]);
        let line = |step| {
            let known = serde_json::to_string(&record(step)).unwrap();
            known.replacen('{', "{\"expert_load\": [0.5], ", 1)
        };
        add(&path, &format!("{}\n{}\n", line(1), line(2)));
        MetricsLog::truncate_after(&path, 1).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", line(1)));
    }

    #[test]
    fn truncation_of_a_damaged_or_missing_log_changes_nothing() {
        let (dir, path) = log_of(&[1]);
        let text = format!("broken\n{}", fs::read_to_string(&path).unwrap());
        fs::write(&path, &text).unwrap();
        let error = MetricsLog::truncate_after(&path, 0).unwrap_err();
        assert!(matches!(error, RunError::DamagedLine { line: 1, .. }));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        let missing = dir.path().join("missing.jsonl");
        let error = MetricsLog::truncate_after(&missing, 0).unwrap_err();
        assert!(matches!(error, RunError::Io { .. }), "{error}");
        assert!(!missing.exists());
    }
}
