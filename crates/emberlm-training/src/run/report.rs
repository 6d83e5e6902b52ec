//! The report of a finished run: its final numbers.

use std::{fs, path::Path};

use emberlm_core::replace_file;
use serde::{Deserialize, Serialize};

use super::{RoutingRecord, error::RunError};

/// The final numbers of a run; `None` is what a run that was stopped early did not come to measure.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// use emberlm_training::Report;
///
/// let report = Report { valid_loss: Some(3.21), steps: Some(2000), ..Report::default() };
/// let path = dir.path().join(Report::FILE_NAME);
/// report.write(&path)?;
/// assert_eq!(Report::read(&path)?, report);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The training loss at the end, in nats per token.
    pub train_loss: Option<f64>,
    /// The validation loss at the end, in nats per token.
    pub valid_loss: Option<f64>,
    /// The validation loss in bits per byte of text, which compares runs with different tokenizers.
    pub bits_per_byte: Option<f64>,
    /// The training speed of the whole run, in tokens per second.
    pub tokens_per_second: Option<f64>,
    /// The highest memory use, in bytes.
    pub peak_memory_bytes: Option<u64>,
    /// The number of the model's parameters.
    pub parameters: Option<u64>,
    /// The number of training steps, over all resumes.
    pub steps: Option<u64>,
    /// The training time, over all resumes, in seconds.
    pub seconds: Option<f64>,
    /// Of a masked model: the share of the hidden tokens of the held-out text that it finds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masked_accuracy: Option<f64>,
    /// The share that a table of counts by neighbours finds of the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbour_accuracy: Option<f64>,
    /// Of a model that routes its tokens: where those of the held-out text went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingRecord>,
}

impl Report {
    /// The name of the report in a run's folder.
    pub const FILE_NAME: &str = "report.json";

    /// Writes the report to `path`: the whole file or, after an error or a kill, none of it.
    ///
    /// A number that is not finite is written as `null`.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), RunError> {
        let path = path.as_ref();
        let mut text = serde_json::to_vec_pretty(self).map_err(RunError::json(path))?;
        text.push(b'\n');
        replace_file(path, &text).map_err(RunError::io(path))
    }

    /// Reads the report at `path`.
    ///
    /// # Errors
    ///
    /// [`RunError::Io`], and [`RunError::Json`] for a file that is no report.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, RunError> {
        let path = path.as_ref();
        let text = fs::read(path).map_err(RunError::io(path))?;
        serde_json::from_slice(&text).map_err(RunError::json(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Report::FILE_NAME);
        let report = Report {
            train_loss: Some(3.25),
            valid_loss: Some(3.5),
            bits_per_byte: Some(1.125),
            tokens_per_second: Some(6100.5),
            peak_memory_bytes: Some(123_456),
            parameters: Some(789),
            steps: Some(20),
            seconds: Some(4.5),
            masked_accuracy: Some(0.75),
            neighbour_accuracy: Some(0.5),
            routing: Some(RoutingRecord {
                layers: vec![1],
                load: vec![vec![3, 5]],
                dropped_share: Some(0.25),
                entropy: None,
                balance_loss: Some(1.0625),
            }),
        };
        Report::default().write(&path).unwrap();
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 1, "a temporary file was left behind");
    }

    #[test]
    fn null_missing_and_unknown_keys_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Report::FILE_NAME);
        fs::write(&path, r#"{"train_loss":null,"steps":7,"later":[1]}"#).unwrap();
        let expected = Report {
            steps: Some(7),
            ..Report::default()
        };
        assert_eq!(Report::read(&path).unwrap(), expected);
    }

    #[test]
    fn a_number_that_is_not_finite_is_null() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Report::FILE_NAME);
        let report = Report {
            valid_loss: Some(f64::INFINITY),
            ..Report::default()
        };
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), Report::default());
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Report::FILE_NAME);
        let error = Report::read(&path).unwrap_err();
        assert!(matches!(error, RunError::Io { .. }), "{error}");
        fs::write(&path, "{\"steps\":").unwrap();
        let error = Report::read(&path).unwrap_err();
        assert!(matches!(error, RunError::Json { .. }), "{error}");
        assert!(error.to_string().contains(Report::FILE_NAME), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Report::FILE_NAME);
        fs::create_dir_all(path.join("in the way")).unwrap();
        let error = Report::default().write(&path).unwrap_err();
        assert!(matches!(error, RunError::Io { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
