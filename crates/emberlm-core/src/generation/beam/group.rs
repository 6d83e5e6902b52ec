//! A group of beams: the hypotheses that run side by side, and the finished ones.

use super::{BeamConfig, EarlyStopping};
use crate::generation::largest::largest;

/// A continuation that beam search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The tokens after the prompt, the end token included.
    pub tokens: Vec<u32>,
    /// The sum of the log-probabilities of the tokens, as the processors left them.
    pub log_probability: f64,
    /// The log-probability over the [`LengthPenalty`](crate::LengthPenalty) of the length: what hypotheses are ranked
    /// by.
    pub score: f64,
}

/// A hypothesis that goes on.
pub(super) struct Beam {
    /// The prompt and what follows it.
    pub(super) text: Vec<u32>,
    log_probability: f64,
    /// The row of the batch.
    pub(super) row: usize,
}

impl Beam {
    pub(super) fn new(prompt: &[u32], row: usize) -> Self {
        Self {
            text: prompt.to_vec(),
            log_probability: 0.0,
            row,
        }
    }

    pub(super) fn last_token(&self) -> u32 {
        *self.text.last().expect("a text has a prompt")
    }

    fn with(&self, token: u32, log_probability: f64) -> Self {
        let mut text = self.text.clone();
        text.push(token);
        Self {
            text,
            log_probability,
            row: self.row,
        }
    }
}

/// What a step brings.
pub(super) struct Step<'s> {
    pub(super) config: &'s BeamConfig,
    pub(super) n_prompt: usize,
    /// Tokens after the prompt, the one of this step included.
    pub(super) n_new: usize,
    /// Of each token, in each row of the batch.
    pub(super) log_probabilities: &'s [Vec<f64>],
}

/// Beams that compete with each other alone.
pub(super) struct Group {
    n_beams: usize,
    /// None once the search of this group is over.
    pub(super) running: Vec<Beam>,
    /// Best first.
    pub(super) finished: Vec<Hypothesis>,
}

impl Group {
    pub(super) fn new(n_beams: usize, prompt: &[u32], row: usize) -> Self {
        Self {
            n_beams,
            running: vec![Beam::new(prompt, row)],
            finished: Vec::new(),
        }
    }

    /// Lengthens the running hypotheses by one token. `penalties` are subtracted from the scores by which tokens are
    /// chosen, not from those that the hypotheses keep. Returns the tokens that were chosen, also by hypotheses that
    /// ended.
    pub(super) fn advance(&mut self, step: &Step<'_>, penalties: &[f64]) -> Vec<u32> {
        let config = step.config;
        // Each running hypothesis can end with each end token: so many candidates leave enough that go on.
        let n_candidates = self.n_beams * (1 + config.end_tokens.len()).max(2);
        let vocab_size = penalties.len();
        let scores = self.running.iter().flat_map(|beam| {
            let tokens = step.log_probabilities[beam.row].iter().zip(penalties);
            tokens.map(|(x, penalty)| beam.log_probability + x - penalty)
        });
        let (mut running, mut chosen) = (Vec::new(), Vec::new());
        for (rank, index) in largest(scores, n_candidates).into_iter().enumerate() {
            let (beam, token) = (&self.running[index / vocab_size], index % vocab_size);
            let log_probability = beam.log_probability + step.log_probabilities[beam.row][token];
            let beam = beam.with(token as u32, log_probability);
            let ends = config.end_tokens.contains(&(token as u32));
            if ends || step.n_new == config.max_new_tokens {
                // What ends further behind would not have been among the beams.
                if rank < self.n_beams {
                    chosen.push(token as u32);
                    self.finished.push(finish(beam, step));
                }
            } else if running.len() < self.n_beams {
                chosen.push(token as u32);
                running.push(beam);
            }
        }
        self.running = running;
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(self.n_beams);
        if self.is_over(step) {
            self.running.clear();
        }
        chosen
    }

    fn is_over(&self, step: &Step<'_>) -> bool {
        let (Some(worst), true) = (self.finished.last(), self.finished.len() == self.n_beams)
        else {
            return false;
        };
        let penalty = step.config.length_penalty;
        let length = match step.config.early_stopping {
            EarlyStopping::True => return true,
            EarlyStopping::Never if penalty.exponent() > 0.0 => step.config.max_new_tokens,
            EarlyStopping::Never | EarlyStopping::False => step.n_new,
        };
        let best = self.running.iter().map(|beam| beam.log_probability);
        let best = best.fold(f64::NEG_INFINITY, f64::max) / penalty.divisor(length);
        best <= worst.score
    }
}

fn finish(beam: Beam, step: &Step<'_>) -> Hypothesis {
    let mut text = beam.text;
    Hypothesis {
        tokens: text.split_off(step.n_prompt),
        log_probability: beam.log_probability,
        score: beam.log_probability / step.config.length_penalty.divisor(step.n_new),
    }
}
