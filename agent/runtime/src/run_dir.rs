//! The files of a running instance: its lock, the names of its ids, its status.
//!
//! Every file is replaced as a whole (written beside, synced, renamed), so that a reader or a crash
//! never meets half of one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_control::{Held, Names, Skipped};

use crate::attach::Attached;
use crate::facts::Hidden;

/// Why a file of the run directory could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A call failed.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another agent runs.
    #[error(
        "{}: another agent{} holds this instance; stop it first, or give this one its own run_dir \
         and pin_dir",
        path.display(),
        pid.as_deref().map(|p| format!(" (pid {p})")).unwrap_or_default()
    )]
    Busy {
        /// The lock.
        path: PathBuf,
        /// Who holds it.
        pid: Option<String>,
    },
}

/// The directory.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

/// Held by the one writer of an instance, for as long as it lives.
pub struct Lock(#[expect(dead_code, reason = "dropping it unlocks")] Flock<File>);

impl RunDir {
    /// The directory at `path`; it need not exist.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes the directory and becomes its only writer.
    ///
    /// # Errors
    /// [`RunDirError::Busy`] while another one lives.
    pub fn lock(&self) -> Result<Lock, RunDirError> {
        self.lock_file("lock", FlockArg::LockExclusiveNonblock)
    }

    /// Keeps others from changing the settings meanwhile. Waits.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn lock_settings(&self) -> Result<Lock, RunDirError> {
        self.lock_file("settings.lock", FlockArg::LockExclusive)
    }

    fn lock_file(&self, name: &str, how: FlockArg) -> Result<Lock, RunDirError> {
        let path = self.file(name);
        let fail = |what, source| RunDirError::Io { path: path.clone(), what, source };
        std::fs::create_dir_all(&self.path).map_err(|e| fail("make its directory", e))?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| fail("open", e))?;
        let mut holder = String::new();
        file.read_to_string(&mut holder).map_err(|e| fail("read", e))?;
        let mut lock = Flock::lock(file, how).map_err(|(_, e)| match e {
            nix::Error::EWOULDBLOCK => RunDirError::Busy {
                path: path.clone(),
                pid: Some(holder.trim().to_owned()).filter(|p| !p.is_empty()),
            },
            e => fail("lock", e.into()),
        })?;
        let pid = std::process::id().to_string();
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| lock.write_all(pid.as_bytes()))
            .map_err(|e| fail("write", e))?;
        Ok(Lock(lock))
    }

    /// Whether an agent runs.
    pub fn agent_runs(&self) -> bool {
        File::open(self.file("lock"))
            .is_ok_and(|file| Flock::lock(file, FlockArg::LockSharedNonblock).is_err())
    }

    /// Whether the agent that runs is the one that wrote `status`.
    pub fn is_of_holder(&self, status: &Status) -> bool {
        let holder = std::fs::read_to_string(self.file("lock")).unwrap_or_default();
        holder.trim().parse() == Ok(status.pid)
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), RunDirError> {
        let path = self.file(name);
        let beside = self.file(&format!("{name}.new"));
        let write = || {
            let mut file = File::create(&beside)?;
            serde_json::to_writer_pretty(&mut file, value)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)
        };
        write().map_err(|source| RunDirError::Io { path: path.clone(), what: "write", source })
    }

    /// The file's contents; `None` where there is none. One that cannot be understood is set aside
    /// and treated as missing.
    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RunDirError> {
        let path = self.file(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RunDirError::Io { path, what: "read", source });
            }
        };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(e) => {
                let aside = self.file(&format!("{name}.broken"));
                tracing::warn!("{}: {e}; moved to {}", path.display(), aside.display());
                if let Err(e) = std::fs::rename(&path, &aside) {
                    tracing::warn!("{}: {e}", aside.display());
                }
                Ok(None)
            }
        }
    }

    /// Names of the ids in the maps.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn names(&self) -> Result<Names, RunDirError> {
        Ok(self.read("names.json")?.unwrap_or_default())
    }

    /// Replaces the names.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_names(&self, names: &Names) -> Result<(), RunDirError> {
        self.write("names.json", names)
    }

    /// The last status.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn status(&self) -> Result<Option<Status>, RunDirError> {
        self.read("status.json")
    }

    /// Replaces the status.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_status(&self, status: &Status) -> Result<(), RunDirError> {
        self.write("status.json", status)
    }

    /// Device features that this instance switched off.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn switched(&self) -> Result<Vec<Hidden>, RunDirError> {
        Ok(self.read("switched.json")?.unwrap_or_default())
    }

    /// Notes a device feature before it is switched off, so that cleanup switches it on again.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn note_switched(&self, hidden: &Hidden) -> Result<(), RunDirError> {
        let mut all = self.switched()?;
        let hidden = Hidden { changeable: false, ..hidden.clone() };
        if !all.contains(&hidden) {
            all.push(hidden);
            self.write("switched.json", &all)?;
        }
        Ok(())
    }

    /// Lets a held mass removal through.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn release(&self) -> Result<(), RunDirError> {
        let path = self.file("release");
        std::fs::write(&path, "").map_err(|source| RunDirError::Io { path, what: "write", source })
    }

    /// Whether a release was asked for; the wish is taken away with the answer.
    pub fn take_release(&self) -> bool {
        std::fs::remove_file(self.file("release")).is_ok()
    }

    /// Removes the files of the instance, and the directory if nothing else is in it.
    pub fn remove(&self) -> Vec<PathBuf> {
        let mut removed = Vec::new();
        for name in [
            "names.json",
            "names.json.new",
            "names.json.broken",
            "status.json",
            "status.json.new",
            "status.json.broken",
            "switched.json",
            "switched.json.new",
            "switched.json.broken",
            "release",
            "settings.lock",
            "lock",
        ] {
            let path = self.file(name);
            if std::fs::remove_file(&path).is_ok() {
                removed.push(path);
            }
        }
        if std::fs::remove_dir(&self.path).is_ok() {
            removed.push(self.path.clone());
        }
        removed
    }
}

/// How the agent does, as `sluice status` shows it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Status {
    /// Programs are attached, the first complete list is programmed, and nothing is held or failing.
    pub ready: bool,
    /// Why not; empty when ready.
    pub not_ready: Vec<String>,
    /// Node name.
    pub node: String,
    /// Process id of the agent.
    pub pid: u32,
    /// Version of the agent.
    pub version: String,
    /// Kernel ticks a second.
    pub hz: u32,
    /// How often the tables were changed since the agent started.
    pub generation: u64,
    /// Mode of each uplink.
    pub mode: BTreeMap<String, String>,
    /// All interfaces with what was refused.
    pub interfaces: BTreeMap<String, Attached>,
    /// Why pods behind an interface are not delivered to by redirect.
    pub stack_delivery: BTreeMap<String, String>,
    /// Sizes of the tables.
    pub tables: TableSizes,
    /// Objects and parts of objects that were left out.
    pub skipped: Vec<SkippedObject>,
    /// A mass removal that waits for `sluice release`.
    pub held: Option<HeldRemoval>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// What fails at the moment and is tried again.
    pub errors: Vec<String>,
}

impl Status {
    /// What an agent that is not ready says before it knows more.
    pub const STARTING: &str = "the agent is starting";
}

/// Entries in the tables.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct TableSizes {
    /// Service ports.
    pub services: usize,
    /// Frontends.
    pub frontends: usize,
    /// Backends.
    pub backends: usize,
    /// Pods of this node.
    pub pods: usize,
    /// Tunnel ends of other nodes.
    pub vteps: usize,
    /// Next hops.
    pub next_hops: usize,
    /// Of these, without a known MAC.
    pub next_hops_unresolved: usize,
}

/// Something that was left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct SkippedObject {
    /// `error` or `notice`.
    pub level: String,
    /// File.
    pub origin: String,
    /// Kind and name.
    pub object: String,
    /// Field.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What would lift it.
    pub remedy: String,
}

impl From<&Skipped> for SkippedObject {
    fn from(skipped: &Skipped) -> Self {
        Self {
            level: match skipped.level {
                sluice_control::Level::Notice => "notice",
                sluice_control::Level::Error => "error",
            }
            .to_owned(),
            origin: skipped.origin.clone(),
            object: skipped.object.clone(),
            field: skipped.field.clone(),
            reason: skipped.reason.clone(),
            remedy: skipped.remedy.clone(),
        }
    }
}

/// A removal that waits.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct HeldRemoval {
    /// Which table.
    pub table: String,
    /// Entries now.
    pub before: u64,
    /// Entries that would go.
    pub removed: u64,
}

impl From<&Held> for HeldRemoval {
    fn from(held: &Held) -> Self {
        Self {
            table: held.table.to_owned(),
            before: held.before as u64,
            removed: held.removed as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_has_one_writer() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let run_dir = RunDir::new(&dir.path().join("run"));
        assert!(!run_dir.agent_runs());
        let lock = run_dir.lock().expect("free");
        assert!(run_dir.agent_runs());
        let text = match run_dir.lock() {
            Ok(_) => panic!("locked twice"),
            Err(e) => e.to_string(),
        };
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        drop(lock);
        run_dir.lock().expect("free again");
    }

    #[test]
    fn broken_file_is_set_aside() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let run_dir = RunDir::new(dir.path());
        std::fs::write(dir.path().join("names.json"), "{").expect("write");
        assert_eq!(run_dir.names().expect("no error"), Names::default());
        assert!(dir.path().join("names.json.broken").exists());
        run_dir.write_status(&Status::default()).expect("written");
        assert_eq!(run_dir.status().expect("readable"), Some(Status::default()));
        run_dir.remove();
        assert!(!dir.path().exists());
    }
}
