//! The state file of a lab: written before a thing is made, read by whoever removes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;
use crate::{LabContext, LabError, LabName, LabSpec};

/// The file in a lab's directory.
const FILE: &str = "state.json";

/// Contents of `<run_root>/<lab>/state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabState {
    /// The lab's name.
    pub name: LabName,
    /// Who made it.
    pub owner: Option<ProcessId>,
    /// True when it shall outlive its owner (`sluice lab up` has finished).
    pub left_running: bool,
    /// What it was made from, with the name filled in.
    pub spec: LabSpec,
    /// Names of its network namespaces.
    pub namespaces: Vec<String>,
    /// What runs in it.
    pub processes: Vec<ProcessState>,
}

/// A process of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessState {
    /// Which process.
    #[serde(flatten)]
    pub id: ProcessId,
    /// What it is, for people: `sluice run`, `serve`.
    pub what: String,
    /// The host it runs on.
    pub host: String,
}

/// One line of `sluice lab list`.
#[derive(Clone, Debug, Serialize)]
pub struct LabSummary {
    /// The lab's name.
    pub name: String,
    /// `up`, `in use` (its maker still runs), `left over` (its maker died), or `no record`
    /// (namespaces of its name without a state file: only `down --name` removes them).
    pub state: &'static str,
    /// Its hosts.
    pub hosts: Vec<String>,
    /// Processes of it that run.
    pub processes: usize,
}

impl LabState {
    /// Where it is kept.
    pub fn path(context: &LabContext, lab: &str) -> PathBuf {
        context.lab_dir(lab).join(FILE)
    }

    /// Reads the file; nothing if there is none.
    ///
    /// # Errors
    /// It cannot be read or is not what this version writes.
    pub fn load(context: &LabContext, lab: &str) -> Result<Option<Self>, LabError> {
        let path = Self::path(context, lab);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(LabError::io(format!("read {}", path.display()))(e)),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| LabError::Format { path, message: e.to_string() })
    }

    /// Writes the file anew, whole or not at all.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn save(&self, context: &LabContext) -> Result<(), LabError> {
        let dir = context.lab_dir(self.name.as_str());
        self.save_in(&dir).map_err(LabError::io(format!("write {}", dir.join(FILE).display())))
    }

    /// The same in a directory that is not in place yet.
    pub(crate) fn save_in(&self, dir: &Path) -> io::Result<()> {
        let draft = dir.join("state.new");
        fs::write(&draft, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&draft, dir.join(FILE))
    }

    /// True if nobody will remove it: its maker died before it was finished.
    pub fn is_left_over(&self) -> bool {
        !self.left_running && !self.owner.is_some_and(ProcessId::is_alive)
    }

    /// What `sluice lab list` says of it.
    pub fn summary(&self) -> LabSummary {
        let prefix = crate::plan::netns_prefix(&self.name);
        LabSummary {
            name: self.name.to_string(),
            state: match (self.left_running, self.is_left_over()) {
                (true, _) => "up",
                (false, false) => "in use",
                (false, true) => "left over",
            },
            hosts: self
                .namespaces
                .iter()
                .map(|name| name.strip_prefix(&prefix).unwrap_or(name).to_owned())
                .collect(),
            processes: self.processes.iter().filter(|p| p.id.is_alive()).count(),
        }
    }
}
