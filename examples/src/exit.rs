//! How programs end.

use std::{fmt::Display, process::ExitCode};

/// Prints an error as one line on standard error and gives exit code 2.
pub fn exit_with(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
