//! How far a piece of work is, as lines.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use emberlm::{text::Progress, training::short_duration};

use crate::say;

/// Says every ten seconds how far a piece of work is.
pub struct Lines {
    what: &'static str,
    unit: &'static str,
    say: fn(&dyn Display),
    begin: Instant,
    last: Instant,
}

impl Lines {
    /// On standard output; `what` is done to so many of `unit`.
    pub fn new(what: &'static str, unit: &'static str) -> Self {
        let begin = Instant::now();
        Self {
            what,
            unit,
            say: |line| say(line),
            begin,
            last: begin,
        }
    }

    /// On standard error, where standard output is the result.
    pub fn on_standard_error(mut self) -> Self {
        self.say = |line| crate::complain(line);
        self
    }

    /// So much is done.
    pub fn tell(&mut self, done: u64, total: u64) {
        if done == 0 || self.last.elapsed() < Duration::from_secs(10) {
            return;
        }
        self.last = Instant::now();
        let left = (total - done) as f64 / done as f64;
        (self.say)(&format_args!(
            "{}: {done}/{total} {}  ETA {}",
            self.what,
            self.unit,
            short_duration(self.begin.elapsed().mul_f64(left))
        ));
    }

    /// So many bytes are done.
    pub fn tell_bytes(&mut self, progress: Progress) {
        self.tell(progress.done, progress.total);
    }
}
