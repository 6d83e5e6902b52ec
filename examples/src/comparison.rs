//! Comparing training runs: a table of their final numbers, and their curves in one plot.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Parser;
use emberlm::training::{RunError, RunHistory};
use thiserror::Error;

use crate::{
    plot::{PlotError, draw_curves},
    table::{MIB, aligned, cell, duration, grouped},
};

/// Compares training runs: prints a table of their final numbers and draws their loss curves.
///
/// A run that has no report yet, because it is still training or was stopped, is compared by its log.
#[derive(Parser)]
#[command(name = "compare", version)]
pub struct CompareArguments {
    /// Folders of runs, as `pretrain` writes them.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where to draw the curves: `plots/moe` makes plots/moe.svg and plots/moe.png.
    #[arg(long, value_name = "FILE-STEM", default_value = "compare")]
    out: PathBuf,
}

/// Why runs cannot be compared.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A folder holds no run, or a damaged one.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The stem of the plot's files is none.
    #[error("{} names no file: give --out a path such as plots/compare", path.display())]
    NoFileStem {
        /// What was given.
        path: PathBuf,
    },
    /// The plot's folder does not exist.
    #[error("cannot draw into {}: make that folder first or give --out another", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The table cannot be printed.
    #[error("cannot print: {0}")]
    Print(io::Error),
    /// The plot cannot be drawn.
    #[error(transparent)]
    Plot(#[from] PlotError),
}

/// Prints the table of the runs and draws their curves.
///
/// # Errors
///
/// A folder without a run, or a table or plot that cannot be written; nothing is written then but the table.
pub fn compare(arguments: &CompareArguments, output: &mut impl Write) -> Result<(), CompareError> {
    let runs = load(&arguments.runs)?;
    let [svg, png] = files(&arguments.out)?;
    let printed = write!(output, "{}", table(&runs));
    printed.map_err(CompareError::Print)?;
    draw_curves(&runs, &svg, &png)?;
    let printed = writeln!(output, "\ncurves: {}, {}", svg.display(), png.display());
    printed.map_err(CompareError::Print)
}

/// Reads the runs. Those whose folders have the same name are called by the paths that were given.
fn load(paths: &[PathBuf]) -> Result<Vec<RunHistory>, RunError> {
    let mut runs = Vec::new();
    for path in paths {
        runs.push(RunHistory::load(path)?);
    }
    let names: Vec<_> = runs.iter().map(|run| run.name.clone()).collect();
    for (run, path) in runs.iter_mut().zip(paths) {
        if names.iter().filter(|&name| *name == run.name).count() > 1 {
            run.name = path.display().to_string();
        }
    }
    Ok(runs)
}

/// The SVG and the PNG of a file stem. The stem may hold dots: nothing of it is replaced.
fn files(stem: &Path) -> Result<[PathBuf; 2], CompareError> {
    let Some(name) = stem.file_name() else {
        return Err(CompareError::NoFileStem { path: stem.into() });
    };
    let folder = stem.parent().filter(|path| !path.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(CompareError::NoFolder {
            path: folder.into(),
        });
    }
    Ok([".svg", ".png"].map(|ending| {
        let mut name = name.to_owned();
        name.push(ending);
        stem.with_file_name(name)
    }))
}

/// The table of the runs' numbers, a line a run.
fn table(runs: &[RunHistory]) -> String {
    let step = common_step(runs);
    let at_step = match step {
        Some(step) => format!("valid@{}", grouped(step)),
        None => "valid@same".into(),
    };
    let titles = [
        "run",
        "parameters",
        "steps",
        &at_step,
        "final valid",
        "final train",
        "bits/byte",
        "tokens/s",
        "peak MiB",
        "time",
    ];
    let mut rows = vec![titles.map(String::from)];
    rows.extend(runs.iter().map(|run| row(run, step)));
    aligned(&rows)
}

/// The largest step that all runs have validated.
fn common_step(runs: &[RunHistory]) -> Option<u64> {
    let (first, others) = runs.split_first()?;
    let valid = first.valid_losses();
    let mut steps = valid.iter().rev().map(|&(step, _)| step);
    steps.find(|&step| others.iter().all(|run| run.valid_loss_at(step).is_some()))
}

/// A run's line of the table: from its report, or from its log where that says the same.
fn row(run: &RunHistory, step: Option<u64>) -> [String; 10] {
    let report = run.report.clone().unwrap_or_default();
    let last = run.last();
    let last_loss = |losses: Vec<(u64, f64)>| losses.last().map(|&(_, loss)| loss);
    let peaks = run
        .steps
        .iter()
        .filter_map(|record| record.peak_memory_bytes);
    let loss = |value: Option<f64>| cell(value, |loss| format!("{loss:.4}"));
    [
        run.name.clone(),
        cell(report.parameters, grouped),
        cell(report.steps.or(last.map(|record| record.step)), grouped),
        loss(step.and_then(|step| run.valid_loss_at(step))),
        loss(report.valid_loss.or(last_loss(run.valid_losses()))),
        loss(report.train_loss.or(last_loss(run.train_losses()))),
        loss(report.bits_per_byte),
        cell(report.tokens_per_second.or(median_speed(run)), |speed| {
            grouped(speed.round() as u64)
        }),
        cell(report.peak_memory_bytes.or(peaks.max()), |bytes| {
            grouped((bytes as f64 / MIB).round() as u64)
        }),
        cell(
            report.seconds.or(last.map(|record| record.seconds)),
            duration,
        ),
    ]
}

/// The median of the steps' speeds, in tokens per second: slow first steps do not count.
fn median_speed(run: &RunHistory) -> Option<f64> {
    let speeds = run
        .steps
        .iter()
        .filter_map(|record| record.tokens_per_second);
    let mut speeds: Vec<_> = speeds.collect();
    speeds.sort_unstable_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::CommandFactory;
    use emberlm::training::{MetricsLog, Report, StepRecord};

    use super::*;

    /// A run that was validated at the given steps, with a loss of 10 / step.
    fn run(name: &str, last_step: u64, validated: &[u64]) -> RunHistory {
        let record = |step| StepRecord {
            step,
            train_loss: Some(9.0 / step as f64),
            learning_rate: 1e-3,
            gradient_norm: Some(1.0),
            tokens_per_second: Some(if step == 1 { 10.0 } else { 1234.4 }),
            peak_memory_bytes: Some(3 << 20),
            seconds: step as f64,
            skipped: false,
            valid_loss: validated.contains(&step).then_some(10.0 / step as f64),
            routing: None,
        };
        RunHistory {
            name: name.into(),
            steps: (1..=last_step).map(record).collect(),
            report: None,
        }
    }

    fn report() -> Report {
        Report {
            train_loss: Some(1.5),
            valid_loss: Some(1.25),
            bits_per_byte: Some(0.5),
            tokens_per_second: Some(98765.4),
            peak_memory_bytes: Some(2_000 << 20),
            parameters: Some(12_345_678),
            steps: Some(1000),
            seconds: Some(600.0),
            ..Report::default()
        }
    }

    /// Writes the run's folder into `parent`.
    fn write(parent: &Path, run: &RunHistory) -> PathBuf {
        let dir = parent.join(&run.name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        let mut log = MetricsLog::open(&dir).unwrap();
        run.steps.iter().for_each(|step| log.append(step).unwrap());
        if let Some(report) = &run.report {
            report.write(dir.join(Report::FILE_NAME)).unwrap();
        }
        dir
    }

    #[test]
    fn the_command_line_is_sound() {
        CompareArguments::command().debug_assert();
        let arguments = CompareArguments::parse_from(["compare", "a", "b"]);
        assert_eq!(arguments.runs, [Path::new("a"), Path::new("b")]);
        assert_eq!(arguments.out, Path::new("compare"));
        assert!(CompareArguments::try_parse_from(["compare"]).is_err());
    }

    #[test]
    fn runs_are_compared_at_the_last_step_that_all_validated() {
        let runs = [
            run("a", 8, &[2, 4, 6, 8]),
            run("b", 9, &[3, 6, 9]),
            run("c", 7, &[1, 6, 7]),
        ];
        assert_eq!(common_step(&runs), Some(6));
        assert_eq!(common_step(&runs[..1]), Some(8));
        assert_eq!(common_step(&[run("a", 4, &[2]), run("b", 4, &[3])]), None);
        assert_eq!(common_step(&[run("a", 4, &[2]), run("b", 4, &[])]), None);
        assert_eq!(common_step(&[]), None);
    }

    #[test]
    fn the_table_has_aligned_columns_and_a_dash_for_what_is_missing() {
        let finished = RunHistory {
            report: Some(report()),
            ..run("größer", 4, &[2, 4])
        };
        let runs = [finished, run("b", 2, &[2]), run("empty", 0, &[])];
        let expected = "\
run     parameters  steps  valid@2  final valid  final train  bits/byte  tokens/s  peak MiB      time
größer  12,345,678  1,000   5.0000       1.2500       1.5000     0.5000    98,765     2,000  10.0 min
b                -      2   5.0000       5.0000       4.5000          -     1,234         3     2.0 s
";
        assert_eq!(table(&runs[..2]), expected);
        let all = table(&runs);
        assert!(all.contains("valid@same"), "{all}");
        let last = all.lines().last().unwrap();
        let cells: Vec<_> = last.split_whitespace().collect();
        assert_eq!(
            cells,
            ["empty", "-", "-", "-", "-", "-", "-", "-", "-", "-"]
        );
    }

    #[test]
    fn runs_of_the_same_name_are_called_by_their_paths() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] =
            ["x", "y"].map(|name| write(&dir.path().join(name), &run("a", 1, &[])));
        let other = write(dir.path(), &run("b", 1, &[]));
        let runs = load(&[first.clone(), second.clone(), other]).unwrap();
        let names: Vec<_> = runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(
            names,
            [first.to_str().unwrap(), second.to_str().unwrap(), "b"]
        );
    }

    #[test]
    fn dots_in_a_file_stem_stay() {
        let [svg, png] = files(Path::new("lr-0.1")).unwrap();
        assert_eq!((svg, png), ("lr-0.1.svg".into(), "lr-0.1.png".into()));
        let error = files(Path::new("..")).unwrap_err();
        assert!(matches!(error, CompareError::NoFileStem { .. }), "{error}");
        let error = files(Path::new("does-not-exist/a")).unwrap_err();
        assert!(matches!(error, CompareError::NoFolder { .. }), "{error}");
    }

    #[test]
    fn a_comparison_prints_the_table_and_names_the_plots() {
        let dir = tempfile::tempdir().unwrap();
        let runs = [run("a", 4, &[2, 4]), run("b", 4, &[2])];
        let arguments = CompareArguments {
            runs: runs.iter().map(|run| write(dir.path(), run)).collect(),
            out: dir.path().join("plot"),
        };
        let mut output = Vec::new();
        compare(&arguments, &mut output).unwrap();
        let files = ["plot.svg", "plot.png"].map(|name| dir.path().join(name));
        let [svg, png] = files.each_ref().map(|file| file.display());
        let expected = format!("{}\ncurves: {svg}, {png}\n", table(&runs));
        assert_eq!(String::from_utf8(output).unwrap(), expected);
        assert!(files.iter().all(|file| file.is_file()));
    }

    #[test]
    fn a_bad_input_stops_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let good = write(dir.path(), &run("a", 4, &[2, 4]));
        let missing = dir.path().join("missing");
        for (runs, out) in [
            (vec![good.clone(), missing.clone()], dir.path().join("plot")),
            (vec![good], missing.join("plot")),
        ] {
            let mut output = Vec::new();
            let error = compare(&CompareArguments { runs, out }, &mut output).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains("missing") && !message.contains('\n'),
                "{message}"
            );
            assert!(output.is_empty());
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
