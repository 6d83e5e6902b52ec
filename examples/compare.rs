//! Compares training runs: prints a table of their final numbers and draws their loss curves.
//!
//! cargo run --release --example compare -- runs/0001 runs/0002 --out plots/both

use std::{io::stdout, process::ExitCode};

use clap::Parser;
use emberlm_examples::{CompareArguments, compare, exit_with};

fn main() -> ExitCode {
    exit_with(compare(&CompareArguments::parse(), &mut stdout()))
}
