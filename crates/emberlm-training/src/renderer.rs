//! Progress as lines of text, for runs without a terminal.

use std::{
    collections::HashMap,
    io::Write,
    time::{Duration, Instant},
};

use burn::train::{
    LearnerSummary,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::{MetricDefinition, MetricId, NumericEntry},
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
        MetricsRendererTraining,
    },
};

use crate::metric_name::{BITS_PER_BYTE, GRADIENT_NORM, LEARNING_RATE, LOSS, TOKENS_PER_SECOND};

/// Prints a line now and then, and one a validation, with the time that is left.
///
/// ```text
/// step    200/1500  loss 2.5132  lr 1.98e-3  grad 0.84  6130 tokens/s  ETA 7m05s
/// step    200/1500  validation: loss 2.5034, 3.6117 bits per byte
/// ```
pub struct LineRenderer<W> {
    out: W,
    steps: usize,
    first_step: usize,
    step: usize,
    epoch_length: usize,
    epoch: usize,
    in_training: bool,
    names: HashMap<MetricId, String>,
    training: HashMap<String, f64>,
    validation: HashMap<String, f64>,
    begin: Instant,
    last_line: Option<Instant>,
    every: Duration,
}

impl<W: Write> LineRenderer<W> {
    /// Prints to `out` about a run of `steps` steps that begins after `first_step` and validates every
    /// `validate_every` steps; at most one training line in `every`.
    pub fn new(out: W, steps: u64, first_step: u64, validate_every: u64, every: Duration) -> Self {
        Self {
            out,
            steps: steps as usize,
            first_step: first_step as usize,
            step: first_step as usize,
            epoch_length: validate_every as usize,
            epoch: first_step as usize / validate_every as usize,
            in_training: true,
            names: HashMap::new(),
            training: HashMap::new(),
            validation: HashMap::new(),
            begin: Instant::now(),
            last_line: None,
            every,
        }
    }

    fn note(&mut self, state: MetricState, of_training: bool) {
        if let MetricState::Numeric(entry, Some(value)) = state
            && let Some(name) = self.names.get(&entry.metric_id)
        {
            let current = match value {
                NumericEntry::Value(value) | NumericEntry::Final(value) => value,
                NumericEntry::Aggregated {
                    aggregated_value, ..
                } => aggregated_value,
            };
            let values = if of_training {
                &mut self.training
            } else {
                &mut self.validation
            };
            values.insert(name.clone(), current);
        }
    }

    fn training_line(&mut self) {
        let figure = |name: &str| self.training.get(name).copied();
        let mut line = format!(
            "step {:>6}/{}  loss {:.4}",
            self.step,
            self.steps,
            figure(LOSS).unwrap_or(f64::NAN)
        );
        if let Some(rate) = figure(LEARNING_RATE) {
            line += &format!("  lr {rate:.2e}");
        }
        if let Some(norm) = figure(GRADIENT_NORM) {
            line += &format!("  grad {norm:.2}");
        }
        if let Some(speed) = figure(TOKENS_PER_SECOND).filter(|speed| speed.is_finite()) {
            line += &format!("  {speed:.0} tokens/s");
        }
        let done = self.step.saturating_sub(self.first_step);
        if done > 0 {
            let left = self.begin.elapsed() / done as u32 * (self.steps - self.step) as u32;
            line += &format!("  ETA {}", short_duration(left));
        }
        self.print(&line);
    }

    fn print(&mut self, line: &str) {
        // A reader that went away must not end a training run.
        let _ = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }
}

/// A duration as people say it: `42s`, `7m05s`, `3h20m`.
pub fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

impl<W: Write + Send + Sync> MetricsRendererTraining for LineRenderer<W> {
    fn update_train(&mut self, state: MetricState) {
        self.note(state, true);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.note(state, false);
    }

    fn on_train_end(
        &mut self,
        _summary: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl<W: Write + Send> TrainingProgressLogger for LineRenderer<W> {
    fn start(
        &mut self,
        _total_epochs: usize,
        _starting_epoch: usize,
        _total_items: Option<usize>,
        _label: Option<&str>,
    ) {
        self.begin = Instant::now();
    }

    fn update_epoch(&mut self, epoch: usize) {
        self.epoch = epoch;
        let figure = |name| self.validation.get(name).copied();
        let mut line = format!(
            "step {:>6}/{}  validation: loss {:.4}",
            self.step,
            self.steps,
            figure(LOSS).unwrap_or(f64::NAN)
        );
        if let Some(bits) = figure(BITS_PER_BYTE) {
            line += &format!(", {bits:.4} bits per byte");
        }
        self.print(&line);
    }

    fn start_split(&mut self, split: &str, _total_items: usize) {
        self.in_training = split == "train";
    }

    fn update_split(&mut self, items_processed: usize) {
        if !self.in_training {
            return;
        }
        self.step = self.epoch * self.epoch_length + items_processed;
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= self.every);
        if due || self.step == self.steps {
            self.training_line();
            self.last_line = Some(Instant::now());
        }
    }

    fn end_split(&mut self) {
        self.in_training = true;
    }

    fn end(&mut self) {}

    fn log_event_training(&mut self, _event: String) {}
}

impl<W: Write + Send + Sync> MetricsRenderer for LineRenderer<W> {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names
            .insert(definition.metric_id, definition.name.to_string());
    }
}

// Training is all it is used for: burn-train's trait asks for evaluation too.
impl<W: Write + Send + Sync> MetricsRendererEvaluation for LineRenderer<W> {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl<W: Write + Send> EvaluationProgressLogger for LineRenderer<W> {
    fn start_global_progress(&mut self, _total_tests: usize) {}

    fn start_test(&mut self, _name: &str, _total_items: usize) {}

    fn update_test_progress(&mut self, _items_processed: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, _event: String) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let seconds = |s| short_duration(Duration::from_secs(s));
        assert_eq!(seconds(0), "0s");
        assert_eq!(seconds(59), "59s");
        assert_eq!(seconds(425), "7m05s");
        assert_eq!(seconds(12_060), "3h21m");
    }
}
