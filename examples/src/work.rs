//! How far a piece of work is: a bar on a terminal, lines elsewhere.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use emberlm::{text::Progress, training::short_duration};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use crate::say;

/// Shows how far a piece of work is: by a bar on standard error where that is a terminal, else by a line every ten
/// seconds. The bar goes when the work is dropped.
pub struct Work {
    what: &'static str,
    unit: &'static str,
    bar: ProgressBar,
    say: fn(&dyn Display),
    begin: Instant,
    last: Instant,
}

impl Work {
    /// With lines on standard output; `what` is done to so many of `unit`.
    pub fn new(what: &'static str, unit: &'static str) -> Self {
        Self::drawn_on(ProgressDrawTarget::stderr(), what, unit)
    }

    fn drawn_on(target: ProgressDrawTarget, what: &'static str, unit: &'static str) -> Self {
        let begin = Instant::now();
        let bar = ProgressBar::with_draw_target(None, target)
            .with_message(format!("{what} ({unit})"))
            .with_finish(ProgressFinish::AndClear);
        Self {
            what,
            unit,
            bar,
            say: |line| say(line),
            begin,
            last: begin,
        }
    }

    /// With lines on standard error, where standard output is the result.
    pub fn on_standard_error(mut self) -> Self {
        self.say = |line| crate::complain(line);
        self
    }

    /// So much is done.
    pub fn tell(&mut self, done: u64, total: u64) {
        if !self.bar.is_hidden() {
            self.draw(done, total);
        } else if done > 0 && self.last.elapsed() >= Duration::from_secs(10) {
            self.last = Instant::now();
            let left = (total - done) as f64 / done as f64;
            (self.say)(&format_args!(
                "{}: {done}/{total} {}  ETA {}",
                self.what,
                self.unit,
                short_duration(self.begin.elapsed().mul_f64(left))
            ));
        }
    }

    /// So many bytes are done.
    pub fn tell_bytes(&mut self, progress: Progress) {
        self.tell(progress.done, progress.total);
    }

    fn draw(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            let template = "{msg} [{wide_bar}] {human_pos}/{human_len}  ETA {eta}";
            let style = ProgressStyle::with_template(template).expect("a template of known keys");
            self.bar.set_style(style.progress_chars("=> "));
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use indicatif::InMemoryTerm;

    use super::*;

    #[test]
    fn a_terminal_shows_a_bar_that_goes_with_the_work() {
        let terminal = InMemoryTerm::new(4, 70);
        let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let mut work = Work::drawn_on(target, "tokenising", "bytes");
        work.tell(512, 2048);
        let line = terminal.contents();
        assert!(line.starts_with("tokenising (bytes) [===="), "{line}");
        assert!(line.contains("] 512/2,048  ETA "), "{line}");
        drop(work);
        assert_eq!(terminal.contents(), "");
    }
}
