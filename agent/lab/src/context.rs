//! Where the lab finds the `sluice` executable and keeps its files.

use std::path::{Path, PathBuf};

/// What the lab needs to know of the machine. One value per program.
#[derive(Clone, Debug)]
pub struct LabContext {
    /// The `sluice` executable: started on nodes as `sluice run`, in pods as `sluice lab serve`.
    pub sluice: PathBuf,
    /// One directory per lab: state file, logs, configuration of its agents.
    pub run_root: PathBuf,
    /// A directory in a mounted bpffs; each node gets `<bpffs_root>/<lab>/<node>` for its pins.
    pub bpffs_root: PathBuf,
    /// Where progress and notes go; `false` for tests.
    pub talk: bool,
}

impl LabContext {
    /// The usual places, with the given executable.
    pub fn new(sluice: impl Into<PathBuf>) -> Self {
        Self {
            sluice: sluice.into(),
            run_root: PathBuf::from("/run/sluice/lab"),
            bpffs_root: PathBuf::from("/sys/fs/bpf/sluice-lab"),
            talk: false,
        }
    }

    /// The directory of one lab.
    pub fn lab_dir(&self, lab: &str) -> PathBuf {
        self.run_root.join(lab)
    }

    /// The pins of one lab.
    pub fn pin_root(&self, lab: &str) -> PathBuf {
        self.bpffs_root.join(lab)
    }

    /// The bpffs mount that `bpffs_root` lies in.
    pub fn bpffs_mount(&self) -> &Path {
        self.bpffs_root.parent().unwrap_or(&self.bpffs_root)
    }
}
