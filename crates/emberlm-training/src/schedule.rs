//! Learning-rate schedules, functions of the step alone.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Linear warm-up, then half a cosine from the peak to the last value.
///
/// `peak * s / warmup_steps` for steps `s = 1 ..= warmup_steps`, then
/// `last + (peak - last) (1 + cos(pi (s - warmup_steps) / (steps - warmup_steps))) / 2`, which reaches `last` at the
/// last step. Loshchilov and Hutter 2017, <https://arxiv.org/abs/1608.03983>, without restarts.
///
/// ```
/// use emberlm_training::WarmupCosine;
///
/// let schedule = WarmupCosine { peak: 1.0, last: 0.1, warmup_steps: 10, steps: 110 };
/// assert_eq!(schedule.at(5), 0.5);
/// assert_eq!(schedule.at(10), 1.0);
/// assert!((schedule.at(60) - 0.55).abs() < 1e-12);
/// assert!((schedule.at(110) - 0.1).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupCosine {
    /// Learning rate after the warm-up.
    pub peak: f64,
    /// Learning rate at the last step and after it.
    pub last: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Number of steps.
    pub steps: u64,
}

impl WarmupCosine {
    /// Learning rate of a step, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let length = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / length as f64).min(1.0);
        self.last + (self.peak - self.last) * (1.0 + (PI * progress).cos()) / 2.0
    }
}

/// Linear warm-up, then a fall with the root of the step: `peak min(s / warmup_steps, sqrt(warmup_steps / s))` for steps
/// `s = 1, 2, ..`. It does not depend on how many steps there are, so that a run can be extended.
///
/// Vaswani et al. 2017, section 5.3, <https://arxiv.org/abs/1706.03762>, whose peak is
/// `1 / sqrt(d_model warmup_steps)`.
///
/// ```
/// use emberlm_training::InverseSquareRoot;
///
/// let schedule = InverseSquareRoot { peak: 1.0, warmup_steps: 400 };
/// assert_eq!(schedule.at(100), 0.25);
/// assert_eq!(schedule.at(400), 1.0);
/// assert_eq!(schedule.at(1600), 0.5);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InverseSquareRoot {
    /// Learning rate after the warm-up.
    pub peak: f64,
    /// Steps of warm-up; without any the fall begins at the first step.
    pub warmup_steps: u64,
}

impl InverseSquareRoot {
    /// Learning rate of a step, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        let (step, warmup) = (step as f64, self.warmup_steps.max(1) as f64);
        self.peak * (step / warmup).min((warmup / step).sqrt())
    }
}

/// Which schedule, as a configuration says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// [`WarmupCosine`], down to a share of the peak at the last step.
    #[default]
    WarmupCosine,
    /// [`InverseSquareRoot`], which knows no last step.
    InverseSquareRoot,
}

/// A schedule of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LearningRateSchedule {
    /// Half a cosine.
    WarmupCosine(WarmupCosine),
    /// The root of the step.
    InverseSquareRoot(InverseSquareRoot),
}

impl LearningRateSchedule {
    /// Learning rate of a step, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        match self {
            Self::WarmupCosine(schedule) => schedule.at(step),
            Self::InverseSquareRoot(schedule) => schedule.at(step),
        }
    }
}
