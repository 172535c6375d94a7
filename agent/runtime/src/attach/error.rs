//! Why the datapath could not be brought up.

use std::path::PathBuf;

use aya::EbpfError;
use aya::programs::ProgramError;

use super::{BpffsError, LaneError};
use crate::describe::causes;
use crate::maps::MapsError;

/// Why the datapath could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No BPF file system.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// A pinned map does not fit.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The kernel does not take the maps.
    #[error(
        "load the BPF object: {}; CAP_BPF, CAP_NET_ADMIN and a kernel with BTF (/sys/kernel/btf/vmlinux) are needed",
        causes(source)
    )]
    Load {
        /// What aya says.
        source: Box<EbpfError>,
    },
    /// The kernel does not take a program.
    #[error("load program {name}: {}; what runs already keeps running", verifier(source))]
    Program {
        /// Which program.
        name: &'static str,
        /// What aya says, with the verifier's words.
        source: Box<ProgramError>,
    },
    /// The object is not ours.
    #[error("the BPF object has no program {name}")]
    NoProgram {
        /// Which program.
        name: &'static str,
    },
    /// The programs behind the fast ones cannot be brought up.
    #[error("{0}; what runs already keeps running")]
    Lanes(#[from] LaneError),
    /// Removing a pin failed.
    #[error("remove {}: {source}", path.display())]
    Unpin {
        /// The pin.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// The end of the verifier's words is what matters; all of them are some megabytes.
fn verifier(error: &ProgramError) -> String {
    const LINES: usize = 12;
    let text = causes(error);
    let lines: Vec<&str> = text.lines().collect();
    match lines.len().checked_sub(LINES) {
        Some(skip) if skip > 0 => {
            let first = lines.first().copied().unwrap_or_default();
            format!("{first}\n...\n{}", lines[skip..].join("\n"))
        }
        _ => text,
    }
}
