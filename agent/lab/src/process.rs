//! Processes by identity: a process id alone may be somebody else's by the time it is used.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process, told apart from a later one with the same id by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process id.
    pub pid: i32,
    /// Clock ticks since boot, field 22 of proc_pid_stat(5).
    pub start_time: u64,
}

impl ProcessId {
    /// The identity of a running process; nothing if there is none with that id.
    pub fn of(pid: i32) -> Option<Self> {
        let (_, start_time) = stat(pid)?;
        Some(Self { pid, start_time })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(Pid::this().as_raw())
    }

    /// True while that very process runs. One that has ended and only waits for its parent to
    /// collect it does not run.
    pub fn is_alive(self) -> bool {
        stat(self.pid)
            .is_some_and(|(state, start)| start == self.start_time && !matches!(state, 'Z' | 'X'))
    }

    /// Sends a signal if that very process still runs.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            // It may have ended since the line above: that is what the caller wants.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Ends processes: SIGTERM, SIGKILL for those that are still there after `grace`. Returns those
/// that survived both.
pub fn end(processes: &[ProcessId], grace: Duration) -> Vec<ProcessId> {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let mut left = wait_ended(processes, grace);
    if !left.is_empty() {
        for process in &left {
            process.signal(Signal::SIGKILL);
        }
        left = wait_ended(&left, Duration::from_secs(5));
    }
    // Collect those that were children of ours, so that no zombie stays.
    for process in processes {
        match waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(_) | Err(Errno::ECHILD) => {}
            Err(_) => {}
        }
    }
    left
}

fn wait_ended(processes: &[ProcessId], limit: Duration) -> Vec<ProcessId> {
    let start = Instant::now();
    loop {
        let left: Vec<ProcessId> = processes.iter().copied().filter(|p| p.is_alive()).collect();
        if left.is_empty() || start.elapsed() > limit {
            return left;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose network namespace is one of `identities` (device, inode), this process and its
/// ancestors left out: they may be a shell inside the lab from which it is being removed.
pub fn inside(identities: &[(u64, u64)]) -> Vec<ProcessId> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let own = ancestors();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| !own.contains(pid))
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|meta| identities.contains(&(meta.dev(), meta.ino())))
        })
        .filter_map(ProcessId::of)
        .collect()
}

fn ancestors() -> Vec<i32> {
    let mut pid = Pid::this().as_raw();
    let mut chain = vec![pid];
    while let Some(parent) = parent(pid).filter(|parent| *parent > 0) {
        chain.push(parent);
        pid = parent;
    }
    chain
}

fn parent(pid: i32) -> Option<i32> {
    fields(pid)?.get(1)?.parse().ok()
}

/// State letter and start time.
fn stat(pid: i32) -> Option<(char, u64)> {
    let fields = fields(pid)?;
    // The list begins with field 3 of proc_pid_stat(5).
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

/// The fields of /proc/PID/stat behind the program's name, which may itself hold blanks and
/// parentheses.
fn fields(pid: i32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = line.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_another_start_time_is_another_process() {
        let own = ProcessId::own().expect("this process runs");
        assert!(own.is_alive());
        let later = ProcessId { start_time: own.start_time + 1, ..own };
        assert!(!later.is_alive());
    }

    #[test]
    fn end_leaves_no_process_and_no_zombie() {
        let mut sleep = std::process::Command::new("sleep");
        #[expect(clippy::zombie_processes, reason = "that `end` collects it is what is tested")]
        let child = sleep.arg("1000").spawn().expect("start sleep");
        let pid = i32::try_from(child.id()).expect("small");
        let id = ProcessId::of(pid).expect("it runs");
        assert!(end(&[id], Duration::from_secs(2)).is_empty());
        assert_eq!(ProcessId::of(pid), None);
    }
}
