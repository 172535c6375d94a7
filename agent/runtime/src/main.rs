//! The `sluice` binary.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

fn main() -> ExitCode {
    let result = sluice::cli::run(sluice::cli::Cli::parse()).context("sluice");
    match result {
        Ok(code) => code,
        Err(error) => {
            // The outermost word is the program's; the rest says what and what to do.
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
