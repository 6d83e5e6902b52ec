//! How programs end.

use std::{fmt::Display, process::ExitCode};

use crate::complain;

/// Prints an error as one line on standard error and gives exit code 2.
pub fn exit_with(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("error: {error}"));
            ExitCode::from(2)
        }
    }
}
