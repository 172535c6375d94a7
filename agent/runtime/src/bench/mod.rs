//! `sluice bench`: what a packet costs, measured on this machine.
//!
//! ```text
//!   scenario ─► packet (template) ─► rig: wrapper ─► xdp_node     ┐
//!                                    rig: wrapper ─► empty (F)    ┴─► rounds ─► summary ─► report
//! ```
//!
//! `compare` reads two reports. The programs run by BPF_PROG_TEST_RUN on maps of their own; nothing is attached or pinned, and
//! an agent on the same machine is not disturbed beyond the time that it takes.

mod budget;
mod compare;
mod conditions;
mod html;
mod packet;
mod progrun;
mod report;
mod rig;
mod scenario;
mod summary;
mod tables;

use std::process::ExitCode;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use clap::{Args, Subcommand};

use crate::describe::causes;

pub use budget::BudgetArgs;
pub use compare::CompareArgs;
pub use html::HtmlArgs;
pub use progrun::ProgrunArgs;
pub use rig::{Rig, Sample};
pub use scenario::{Kind, Scenario};

/// `sluice bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Nanoseconds per packet of each path through the program, by BPF_PROG_TEST_RUN.
    ///
    /// Every sample is of the complete program with the sizes that `sluice run` uses by default. F
    /// is the floor: the same measurement with an empty program. Ratios to F within one run can be
    /// compared between machines, nanoseconds cannot. A path counts only if the program's own
    /// counters say that every packet took it.
    Progrun(ProgrunArgs),
    /// Two reports of `progrun` beside each other.
    ///
    /// Ratios to F are compared, never nanoseconds. A change counts when the quartiles of the rounds
    /// lie apart and it is more than a tenth. With --gate the exit status tells whether a path became dearer.
    Compare(CompareArgs),
    /// A report of `progrun` as an HTML file with plots and conditions.
    Html(HtmlArgs),
    /// What a link could carry, and how much of it this machine's processors can handle.
    Budget(BudgetArgs),
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The kernel does not take the maps or the programs.
    #[error(
        "load the {object} object: {}; root (CAP_BPF, CAP_NET_ADMIN) and a kernel with BTF (/sys/kernel/btf/vmlinux) are needed",
        causes(source)
    )]
    Load {
        /// Which object.
        object: &'static str,
        /// What aya says.
        source: Box<EbpfError>,
    },
    /// The programs behind the fast ones cannot be brought up.
    #[error(transparent)]
    Lanes(#[from] crate::attach::LaneError),
    /// The kernel does not take or does not run a program.
    #[error("program {name}: {}", causes(source))]
    Program {
        /// Which program.
        name: &'static str,
        /// What aya says.
        source: Box<ProgramError>,
    },
    /// A map cannot be used.
    #[error("map {name}: {}", causes(source))]
    Map {
        /// Which map.
        name: &'static str,
        /// What aya says.
        source: Box<MapError>,
    },
    /// The file of an object cannot be read.
    #[error("--object {}: {source}", path.display())]
    Object {
        /// Which file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A report cannot be compared.
    #[error("{}: {problem}; give the output of `sluice bench progrun --output json`", path.display())]
    Report {
        /// Which file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A plot cannot be drawn.
    #[error("draw the report's plot: {0}")]
    Plot(String),
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// Which file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The object is not ours.
    #[error("the {object} object has no {kind} {name}; build sluice anew")]
    Missing {
        /// Which object.
        object: &'static str,
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A packet went another way than the scenario says.
    #[error("{0}")]
    Astray(String),
    /// An option's value.
    #[error("{option} {value}: {problem}")]
    Option {
        /// Which option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it, and what to give instead.
        problem: &'static str,
    },
    /// The thread cannot be kept on one CPU.
    #[error("stay on CPU {cpu}: {source}; --cpu chooses another")]
    Cpu {
        /// Which CPU.
        cpu: usize,
        /// The system's answer.
        source: nix::Error,
    },
}

/// Measures. The text is for standard output; the exit status is 1 if a row is an error.
///
/// # Errors
/// When nothing could be measured.
pub fn run(args: &BenchArgs) -> Result<(String, ExitCode), BenchError> {
    match &args.command {
        BenchCommand::Progrun(args) => progrun::run(args),
        BenchCommand::Compare(args) => compare::run(args),
        BenchCommand::Html(args) => html::run(args),
        BenchCommand::Budget(args) => budget::run(args),
    }
}
