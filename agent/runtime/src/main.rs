//! The `sluice` binary.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match sluice::cli::run(sluice::cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluice: {error}");
            ExitCode::FAILURE
        }
    }
}
