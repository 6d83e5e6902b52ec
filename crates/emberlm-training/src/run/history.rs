//! The history of a run: everything its folder says about how the training went.

use std::path::Path;

use super::{
    error::RunError,
    metrics_log::{MetricsLog, StepRecord},
    report::Report,
};

/// The file with the run's configuration. Its content is not read here.
const CONFIG_FILE: &str = "config.json";

/// What a run, finished or not, has left in its folder.
#[derive(Clone, Debug, PartialEq)]
pub struct RunHistory {
    /// The name of the run: that of its folder.
    pub name: String,
    /// The logged steps, in order.
    pub steps: Vec<StepRecord>,
    /// The final numbers; `None` for a run that has not finished.
    pub report: Option<Report>,
}

impl RunHistory {
    /// Reads the run in the folder `dir`.
    ///
    /// # Errors
    ///
    /// [`RunError::NotAFolder`] and [`RunError::NoRun`] for a path that is no run's folder;
    /// [`RunError::Io`], [`RunError::DamagedLine`] and [`RunError::Json`] for files that cannot be read.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, RunError> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(RunError::NotAFolder { path: dir.into() });
        }
        for missing in [CONFIG_FILE, MetricsLog::FILE_NAME] {
            if !dir.join(missing).is_file() {
                return Err(RunError::NoRun {
                    path: dir.into(),
                    missing,
                });
            }
        }
        let report = dir.join(Report::FILE_NAME);
        Ok(Self {
            name: folder_name(dir)?,
            steps: MetricsLog::read(dir.join(MetricsLog::FILE_NAME))?,
            report: match report.exists() {
                true => Some(Report::read(report)?),
                false => None,
            },
        })
    }

    /// The last logged step; `None` if there is none yet.
    pub fn last(&self) -> Option<&StepRecord> {
        self.steps.last()
    }

    /// The training loss of every step where it was finite: step, nats per token.
    pub fn train_losses(&self) -> Vec<(u64, f64)> {
        self.finite(|record| record.train_loss)
    }

    /// The validation loss of every step that was validated and where it was finite: step, nats per token.
    pub fn valid_losses(&self) -> Vec<(u64, f64)> {
        self.finite(|record| record.valid_loss)
    }

    /// The validation loss after `step`, in nats per token; `None` if that step was not validated.
    pub fn valid_loss_at(&self, step: u64) -> Option<f64> {
        let valid = self.valid_losses();
        let index = valid.binary_search_by_key(&step, |&(step, _)| step).ok()?;
        Some(valid[index].1)
    }

    /// Each value replaced by the mean of all `points` (step, value) at most half a `window` of steps away.
    ///
    /// The window lies around its step, so the curve does not lag behind; at both ends and at gaps it
    /// holds fewer points. A window of 0 or 1 changes nothing. The points must be in order of steps.
    ///
    /// ```
    /// use emberlm_training::RunHistory;
    ///
    /// let points = [(1, 6.0), (2, 3.0), (3, 0.0), (9, 5.0)];
    /// assert_eq!(RunHistory::smoothed(&points, 2), [(1, 4.5), (2, 3.0), (3, 1.5), (9, 5.0)]);
    /// ```
    pub fn smoothed(points: &[(u64, f64)], window: u64) -> Vec<(u64, f64)> {
        let half = window / 2;
        let (mut begin, mut end) = (0, 0);
        points
            .iter()
            .map(|&(step, _)| {
                while points[begin].0.saturating_add(half) < step {
                    begin += 1;
                }
                while end < points.len() && points[end].0 <= step.saturating_add(half) {
                    end += 1;
                }
                // Summed anew for each step: a running sum would keep the rounding errors of one huge
                // loss for ever.
                let inside = &points[begin..end];
                let sum: f64 = inside.iter().map(|&(_, value)| value).sum();
                (step, sum / inside.len() as f64)
            })
            .collect()
    }

    fn finite(&self, value: impl Fn(&StepRecord) -> Option<f64>) -> Vec<(u64, f64)> {
        self.steps
            .iter()
            .filter_map(|record| Some((record.step, value(record)?)))
            .filter(|(_, value)| value.is_finite())
            .collect()
    }
}

/// The last part of the path; for a path such as `.` that of the folder which it stands for.
fn folder_name(dir: &Path) -> Result<String, RunError> {
    let full;
    let name = match dir.file_name() {
        Some(name) => name,
        None => {
            full = dir.canonicalize().map_err(RunError::io(dir))?;
            full.file_name().unwrap_or(full.as_os_str())
        }
    };
    Ok(name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn record(step: u64, train_loss: Option<f64>, valid_loss: Option<f64>) -> StepRecord {
        StepRecord {
            step,
            train_loss,
            learning_rate: 1e-3,
            gradient_norm: Some(1.0),
            tokens_per_second: Some(100.0),
            peak_memory_bytes: Some(1),
            seconds: step as f64,
            skipped: false,
            valid_loss,
            routing: None,
        }
    }

    fn run(steps: Vec<StepRecord>) -> RunHistory {
        RunHistory {
            name: "a".into(),
            steps,
            report: None,
        }
    }

    #[test]
    fn a_folder_is_loaded_with_and_without_a_report() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("baseline");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(CONFIG_FILE), "{}").unwrap();
        let steps = vec![record(1, Some(3.0), None), record(2, Some(2.5), Some(2.75))];
        let mut log = MetricsLog::open(&dir).unwrap();
        steps.iter().for_each(|step| log.append(step).unwrap());

        let mut expected = run(steps);
        expected.name = "baseline".into();
        assert_eq!(RunHistory::load(&dir).unwrap(), expected);

        let report = Report {
            steps: Some(2),
            ..Report::default()
        };
        report.write(dir.join(Report::FILE_NAME)).unwrap();
        expected.report = Some(report);
        assert_eq!(RunHistory::load(&dir).unwrap(), expected);
        // A path without a last part of its own is named after the folder it leads to.
        let detour = dir.join("inner");
        fs::create_dir(&detour).unwrap();
        assert_eq!(RunHistory::load(detour.join("..")).unwrap(), expected);
    }

    #[test]
    fn a_path_that_is_no_run_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join(CONFIG_FILE);
        let missing = |path: &Path| match RunHistory::load(path).unwrap_err() {
            RunError::NoRun { missing, .. } => missing,
            other => panic!("{other}"),
        };
        assert_eq!(missing(dir.path()), CONFIG_FILE);
        fs::write(&config, "{}").unwrap();
        assert_eq!(missing(dir.path()), MetricsLog::FILE_NAME);
        for path in [config, dir.path().join("nowhere")] {
            let error = RunHistory::load(&path).unwrap_err();
            assert!(matches!(error, RunError::NotAFolder { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()));
        }
    }

    #[test]
    fn losses_that_are_missing_or_not_finite_are_left_out() {
        let run = run(vec![
            record(1, Some(3.0), Some(4.0)),
            record(2, None, None),
            record(4, Some(f64::NAN), Some(f64::INFINITY)),
            record(7, Some(2.0), Some(2.5)),
        ]);
        assert_eq!(run.train_losses(), [(1, 3.0), (7, 2.0)]);
        assert_eq!(run.valid_losses(), [(1, 4.0), (7, 2.5)]);
        assert_eq!(run.valid_loss_at(7), Some(2.5));
        assert_eq!([2, 4, 5, 8].map(|step| run.valid_loss_at(step)), [None; 4]);
        assert_eq!(run.last().unwrap().step, 7);
    }

    #[test]
    fn smoothing_keeps_steps_means_and_gaps() {
        let smoothed = RunHistory::smoothed;
        assert!(smoothed(&[], 5).is_empty());
        let line: Vec<_> = (1..=9).map(|step| (step, step as f64)).collect();
        assert_eq!(smoothed(&line, 0), line);
        assert_eq!(smoothed(&line, 1), line);
        let wide = smoothed(&line, 4);
        assert_eq!(wide[2..7], line[2..7]); // A centred mean does not move a straight line.
        assert_eq!(wide[0], (1, 2.0));
        assert_eq!(wide[8], (9, 8.0));
        let mean = smoothed(&line, u64::MAX);
        assert!(mean.iter().all(|&(_, value)| value == 5.0));
        let spike = [(1, 2.0), (2, 1e300), (9, 3.0), (10, 5.0)];
        assert_eq!(smoothed(&spike, 2)[2..], [(9, 4.0), (10, 4.0)]);
    }
}
