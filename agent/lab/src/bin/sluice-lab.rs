//! The lab's commands without the agent: what this crate's own tests start. Users have
//! `sluice lab`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use sluice_lab::cli::{LabArgs, run};
use sluice_lab::{LabContext, LabError};

#[derive(Parser)]
#[command(name = "sluice-lab")]
struct Arguments {
    #[command(subcommand)]
    command: Top,
}

#[derive(Subcommand)]
enum Top {
    /// As `sluice lab`.
    Lab(LabArgs),
}

fn main() -> ExitCode {
    let Top::Lab(args) = Arguments::parse().command;
    let result = std::env::current_exe()
        .map_err(LabError::io("find the path of this program"))
        .and_then(|exe| run(&args, &context(exe)));
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

/// The usual places, or a directory that a test set, so that it meets only its own labs.
fn context(exe: PathBuf) -> LabContext {
    let mut context = LabContext { talk: true, ..LabContext::new(exe) };
    if let Some(dir) = std::env::var_os("SLUICE_LAB_DIR") {
        context.run_root = dir.into();
    }
    context
}
