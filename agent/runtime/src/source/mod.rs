//! Where Kubernetes objects come from. A source delivers complete lists only: a list that could not
//! be finished is an error, never a shorter list.

pub mod file;

use std::path::PathBuf;
use std::sync::Arc;

use sluice_control::{Skipped, Snapshot};

/// One complete list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    /// All valid objects.
    pub snapshot: Arc<Snapshot>,
    /// What was left out.
    pub skipped: Vec<Skipped>,
    /// How many files or objects were read.
    pub files: usize,
}

/// Why there is no complete list. What is programmed stays.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("source {}: {reason}; what is programmed stays until it can be read", path.display())]
pub struct SourceError {
    /// File or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}
