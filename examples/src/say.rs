//! Lines for somebody who may have gone away: a closed terminal or pipe must not end a training run.

use std::{
    fmt::Display,
    io::{Write, stderr, stdout},
};

/// Prints a line on standard output. Unlike `println!` it does not panic where nobody reads any more.
pub fn say(line: impl Display) {
    // Nobody is left to be told about it.
    let _ = writeln!(stdout(), "{line}");
}

/// Prints a line on standard error, as [`say`] does on standard output.
pub fn complain(line: impl Display) {
    let _ = writeln!(stderr(), "{line}");
}
