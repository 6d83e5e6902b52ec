//! How programs end.

use std::{fmt::Display, process::ExitCode};

use crate::complain;

/// Prints an error as one line on standard error and gives exit code 2.
pub fn exit_with(result: Result<(), impl Display>) -> ExitCode {
    exit_code(result.map(|()| ExitCode::SUCCESS))
}

/// As [`exit_with`], where a program that goes well may have other codes than 0.
pub fn exit_code(result: Result<ExitCode, impl Display>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(format_args!("error: {error}"));
            ExitCode::from(2)
        }
    }
}
