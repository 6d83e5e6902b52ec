//! The figures on the dashboard, as burn-train metrics.

use std::{f64::consts::LN_2, sync::Arc};

use burn::{
    tensor::TensorReadError,
    train::{
        LearnerModel, SupervisedTraining,
        metric::{
            Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
            NumericAttributes, NumericEntry, SerializedEntry,
            state::{FormatOptions, NumericMetricState},
        },
    },
};

use emberlm_core::AuxiliaryKind;

use crate::StepOutput;

/// Names of the metrics, as the dashboard and the renderers see them.
pub mod metric_name {
    /// Mean cross-entropy in nats per token.
    pub const LOSS: &str = "Loss";
    /// Loss in bits per byte of text.
    pub const BITS_PER_BYTE: &str = "Bits per byte";
    /// Exponential of the loss.
    pub const PERPLEXITY: &str = "Perplexity";
    /// Learning rate of the step.
    pub const LEARNING_RATE: &str = "Learning rate";
    /// Norm of all gradients before clipping.
    pub const GRADIENT_NORM: &str = "Gradient norm";
    /// Training tokens per second.
    pub const TOKENS_PER_SECOND: &str = "Tokens per second";
    /// Peak resident size in MiB.
    pub const PEAK_MEMORY: &str = "Peak memory";
    /// The busiest expert's load over the mean, less one, in the layer where it is largest.
    pub const MAX_VIOLATION: &str = "Max violation";
    /// The idlest expert's load over the mean, in the layer where it is smallest.
    pub const LEAST_SHARE: &str = "Least expert share";
    /// Share of the choices of experts that were dropped.
    pub const DROPPED: &str = "Dropped choices";
    /// Mean entropy of the routers' probabilities.
    pub const ROUTER_ENTROPY: &str = "Router entropy";
    /// Balance loss, unweighted.
    pub const BALANCE_LOSS: &str = "Balance loss";
}

/// One number of a [`StepOutput`] as a metric; its value over an epoch is the mean.
#[derive(Clone)]
struct Figure {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    precision: usize,
    read: fn(&StepOutput, f64) -> Option<f64>,
    bytes_per_token: f64,
    state: NumericMetricState,
}

impl Figure {
    fn new(
        name: &str,
        unit: Option<&'static str>,
        precision: usize,
        read: fn(&StepOutput, f64) -> Option<f64>,
    ) -> Self {
        Self {
            name: Arc::new(name.to_owned()),
            unit,
            higher_is_better: false,
            precision,
            read,
            bytes_per_token: 1.0,
            state: NumericMetricState::new(),
        }
    }

    fn format(&self) -> FormatOptions {
        let options = FormatOptions::new(self.name.clone()).precision(self.precision);
        match self.unit {
            Some(unit) => options.unit(unit),
            None => options,
        }
    }
}

impl Adaptor<StepOutput> for StepOutput {
    fn adapt(&self) -> StepOutput {
        self.clone()
    }
}

impl Metric for Figure {
    type Input = StepOutput;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: self.unit.map(str::to_owned),
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn update(
        &mut self,
        item: &StepOutput,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        // One number that is not finite would spoil the epoch's mean; the step that had it was skipped.
        let value = (self.read)(item, self.bytes_per_token).filter(|value| value.is_finite());
        if let Some(value) = value {
            self.state.update(value, 1);
        }
        Ok(self.state.compute_update(self.format()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for Figure {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

/// Registers loss, bits per byte, perplexity, learning rate, gradient norm, tokens per second and peak memory.
///
/// `bytes_per_token` is the mean length of a token in bytes of text: 1 for a model of bytes. Without it there are no bits
/// per byte. Where the model `routes` its tokens to experts there are maximum violation, least share, dropped choices,
/// router entropy and balance loss besides.
pub fn register_metrics<M>(
    training: SupervisedTraining<M>,
    bytes_per_token: Option<f64>,
    routes: bool,
) -> SupervisedTraining<M>
where
    M: LearnerModel,
    M: burn::train::TrainStep<Output = StepOutput>,
    M: burn::train::InferenceStep<Output = StepOutput>,
{
    use metric_name::*;

    let loss = Figure::new(LOSS, Some("nats"), 4, |output, _| Some(output.loss()));
    let bits_per_byte = bytes_per_token.map(|bytes_per_token| Figure {
        bytes_per_token,
        ..Figure::new(BITS_PER_BYTE, Some("bits"), 4, |output, bytes_per_token| {
            Some(output.loss() / LN_2 / bytes_per_token)
        })
    });
    let perplexity = Figure::new(PERPLEXITY, None, 3, |output, _| Some(output.loss().exp()));
    let training_only = [
        Figure::new(LEARNING_RATE, None, 3, |output, _| {
            output.progress.map(|p| p.learning_rate)
        }),
        Figure::new(GRADIENT_NORM, None, 3, |output, _| {
            output.progress.map(|p| p.gradient_norm)
        }),
        Figure {
            higher_is_better: true,
            ..Figure::new(TOKENS_PER_SECOND, Some("tokens/s"), 0, |output, _| {
                output.progress?.tokens_per_second
            })
        },
        Figure::new(PEAK_MEMORY, Some("MiB"), 0, |output, _| {
            let bytes = output.progress?.peak_memory_bytes?;
            Some(bytes as f64 / f64::from(1 << 20))
        }),
    ];
    let routing = [
        Figure::new(MAX_VIOLATION, None, 3, |output, _| {
            let routing = output
                .routing
                .iter()
                .map(|(_, layer)| layer.max_violation());
            routing.reduce(f64::max)
        }),
        Figure {
            higher_is_better: true,
            ..Figure::new(LEAST_SHARE, None, 3, |output, _| {
                let routing = output.routing.iter().map(|(_, layer)| layer.least_share());
                routing.reduce(f64::min)
            })
        },
        Figure::new(DROPPED, None, 4, |output, _| {
            output.routing_of_all().map(|all| all.dropped_share())
        }),
        Figure {
            higher_is_better: true,
            ..Figure::new(ROUTER_ENTROPY, Some("nats"), 3, |output, _| {
                output.routing_of_all().map(|all| all.entropy())
            })
        },
        Figure::new(BALANCE_LOSS, None, 4, |output, _| {
            output.auxiliary(AuxiliaryKind::Balance)
        }),
    ];
    let both = [Some(loss), bits_per_byte, Some(perplexity)];
    let both = both
        .into_iter()
        .flatten()
        .chain(routing.into_iter().filter(|_| routes));
    let training = both.fold(training, |training, figure| {
        training
            .metric_train_numeric(figure.clone())
            .metric_valid_numeric(figure)
    });
    training_only
        .into_iter()
        .fold(training, SupervisedTraining::metric_train_numeric)
}
