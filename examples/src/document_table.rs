//! The table of a comparison of attention patterns: the figures of its rows.

use std::{fs, path::Path};

use emberlm::training::Report;
use serde::{Deserialize, Serialize};

use crate::{
    ConfigError, DocumentPattern,
    run_config::{parse, read},
    table::{MIB, aligned, cell, duration, grouped},
};

/// The figures of a row; `report.json` in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowReport {
    /// How the model attends.
    pub pattern: DocumentPattern,
    /// The figures of its training.
    #[serde(flatten)]
    pub figures: Report,
    /// Of a classifier: the share of the held-out cases whose class it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Seconds of a step, as the mean over all but the first two of each process.
    pub seconds_per_step: Option<f64>,
}

/// The rows of a table that are done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DocumentTable {
    /// The task.
    pub task: String,
    /// Of a classification: what the accuracy is without a look at the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chance: Option<Chance>,
    /// The rows.
    pub rows: Vec<RowReport>,
}

/// What the accuracy of naming one of some novels is without a look at the end of the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chance {
    /// Number of novels.
    pub n_novels: usize,
    /// Number of held-out cases.
    pub n_cases: usize,
    /// Of who knows nothing: one of all novels.
    pub blind: f64,
    /// Of who knows which novel the rest is of: one of the others.
    pub knowing_the_rest: f64,
}

impl Chance {
    /// For so many novels and cases.
    pub fn new(n_novels: usize, n_cases: usize) -> Self {
        Self {
            n_novels,
            n_cases,
            blind: 1.0 / n_novels as f64,
            knowing_the_rest: 1.0 / (n_novels - 1) as f64,
        }
    }
}

impl RowReport {
    /// The report of the row in a folder, if it has done so many steps.
    ///
    /// # Errors
    ///
    /// A file that is there but no report of a row.
    pub fn of(folder: &Path, steps: u64) -> Result<Option<Self>, ConfigError> {
        let path = folder.join(Report::FILE_NAME);
        if !fs::exists(&path).unwrap_or(false) {
            return Ok(None);
        }
        let report: Self = parse(&path, &read(&path)?)?;
        Ok((report.figures.steps == Some(steps)).then_some(report))
    }
}

impl DocumentTable {
    /// The table as text, a line a row, and what chance is.
    pub fn text(&self) -> String {
        let is_classified = self.chance.is_some();
        let accuracy = if is_classified {
            "accuracy"
        } else {
            "bits/byte"
        };
        let titles = [
            "pattern",
            accuracy,
            "loss",
            "time a step",
            "training time",
            "peak MiB",
            "parameters",
        ];
        let mut rows = vec![titles.map(String::from)];
        rows.extend(self.rows.iter().map(|row| {
            let figures = &row.figures;
            [
                row.pattern.to_string(),
                match is_classified {
                    true => cell(row.accuracy, |share| format!("{:.1} %", 100.0 * share)),
                    false => cell(figures.bits_per_byte, |bits| format!("{bits:.4}")),
                },
                cell(figures.valid_loss, |loss| format!("{loss:.4}")),
                cell(row.seconds_per_step, |seconds| format!("{seconds:.3} s")),
                cell(figures.seconds, duration),
                cell(figures.peak_memory_bytes, |bytes| {
                    grouped((bytes as f64 / MIB).round() as u64)
                }),
                cell(figures.parameters, grouped),
            ]
        }));
        let mut text = aligned(&rows);
        if let Some(chance) = self.chance {
            let n = chance.n_novels;
            text += &format!(
                "{} held-out cases; by chance {:.1} %, one novel of {n}; {:.1} %, one of {}, for who knows which novel the rest is of\n",
                chance.n_cases,
                100.0 * chance.blind,
                100.0 * chance.knowing_the_rest,
                n - 1,
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pattern: DocumentPattern, accuracy: Option<f64>) -> RowReport {
        RowReport {
            pattern,
            figures: Report {
                valid_loss: Some(1.25),
                bits_per_byte: accuracy.is_none().then_some(1.8),
                seconds: Some(600.0),
                peak_memory_bytes: Some(300 << 20),
                parameters: Some(123_456),
                steps: Some(7),
                ..Report::default()
            },
            accuracy,
            seconds_per_step: None,
        }
    }

    #[test]
    fn the_table_says_what_chance_is() {
        let table = DocumentTable {
            task: "novel".to_owned(),
            chance: Some(Chance::new(6, 600)),
            rows: vec![
                row(DocumentPattern::Window, Some(0.2)),
                row(DocumentPattern::BigBird, Some(0.875)),
            ],
        };
        let expected = "\
pattern  accuracy    loss  time a step  training time  peak MiB  parameters
window     20.0 %  1.2500            -       10.0 min       300     123,456
bigbird    87.5 %  1.2500            -       10.0 min       300     123,456
600 held-out cases; by chance 16.7 %, one novel of 6; 20.0 %, one of 5, for who knows which novel the rest is of
";
        assert_eq!(table.text(), expected);
    }

    #[test]
    fn a_language_model_has_bits_per_byte() {
        let table = DocumentTable {
            task: "language-model".to_owned(),
            chance: None,
            rows: vec![row(DocumentPattern::Full, None)],
        };
        let text = table.text();
        assert!(text.starts_with("pattern  bits/byte    loss"), "{text}");
        assert!(text.contains("full        1.8000  1.2500"), "{text}");
    }

    #[test]
    fn a_row_is_done_when_all_its_steps_are() {
        let folder = tempfile::tempdir().unwrap();
        let of = |steps| RowReport::of(folder.path(), steps);
        assert_eq!(of(7).unwrap(), None);
        let report = row(DocumentPattern::Strided, Some(0.5));
        crate::write_json(&folder.path().join(Report::FILE_NAME), &report).unwrap();
        assert_eq!(of(7).unwrap(), Some(report));
        assert_eq!(of(8).unwrap(), None);
        std::fs::write(folder.path().join(Report::FILE_NAME), "{}").unwrap();
        let error = of(7).unwrap_err().to_string();
        assert!(error.contains(Report::FILE_NAME), "{error}");
    }
}
