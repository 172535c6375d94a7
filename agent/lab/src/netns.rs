//! Named network namespaces, made as `ip netns` makes them, and work done inside one.
//!
//! A thread is made for each piece of work, enters the namespace and ends with it. A command that
//! such a thread starts inherits the namespace; unlike with `ip netns exec` nothing is mounted
//! over /sys, so /sys/fs/bpf stays visible.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::LabError;

/// Where `ip netns` keeps its names.
pub const NETNS_DIR: &str = "/run/netns";

/// A named network namespace. The value is only the name: dropping it removes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// The namespace of that name, whether it exists or not.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name under [`NETNS_DIR`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Device and inode number, which `/proc/<pid>/ns/net` of its processes shows as well; nothing
    /// if it does not exist.
    pub fn identity(&self) -> Option<(u64, u64)> {
        let meta = fs::metadata(self.path()).ok()?;
        Some((meta.dev(), meta.ino()))
    }

    /// Makes the namespace.
    ///
    /// # Errors
    /// The name is taken, or the right (CAP_SYS_ADMIN) is missing.
    pub fn create(&self) -> Result<(), LabError> {
        share_netns_dir()?;
        let path = self.path();
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(LabError::io(format!("create {}", path.display())))?;
        let made = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    mount(
                        Some("/proc/thread-self/ns/net"),
                        &path,
                        None::<&str>,
                        MsFlags::MS_BIND,
                        None::<&str>,
                    )
                })
                .join()
        });
        match made {
            Ok(Ok(())) => Ok(()),
            Ok(Err(errno)) => {
                // Best effort: the error that matters is the one being returned.
                let _ = fs::remove_file(&path);
                Err(LabError::errno(format!("network namespace {}", self.name))(errno))
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Removes the name; the kernel frees the namespace when its last process has ended. No error
    /// if it is not there.
    ///
    /// # Errors
    /// The right is missing.
    pub fn remove(&self) -> Result<(), LabError> {
        let path = self.path();
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: a file that is no mount point (a crash between the file and the mount).
            Ok(()) | Err(nix::Error::ENOENT | nix::Error::EINVAL) => {}
            Err(errno) => {
                return Err(LabError::errno(format!("unmount {}", path.display()))(errno));
            }
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(LabError::io(format!("remove {}", path.display()))(e)),
        }
    }

    /// Calls `work` in a thread inside the namespace and returns what it returned. Sockets opened
    /// there stay in the namespace wherever they are used later.
    ///
    /// # Errors
    /// The namespace does not exist or cannot be entered.
    ///
    /// # Panics
    /// If `work` does.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let path = self.path();
        let file = File::open(&path).map_err(LabError::io(format!("open {}", path.display())))?;
        let result = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET)?;
                    Ok::<T, nix::Error>(work())
                })
                .join()
        });
        match result {
            Ok(entered) => entered.map_err(LabError::errno(format!("enter {}", path.display()))),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Starts a command inside.
    ///
    /// # Errors
    /// As [`Netns::enter`], or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, LabError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.enter(|| command.spawn())?
            .map_err(LabError::io(format!("start {program} in {}", self.name)))
    }

    /// Runs a command inside to its end and returns what it printed, whatever its exit status.
    ///
    /// # Errors
    /// As [`Netns::enter`], or the program cannot be started.
    pub fn output(&self, command: &mut Command) -> Result<Output, LabError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.enter(|| command.output())?
            .map_err(LabError::io(format!("start {program} in {}", self.name)))
    }

    /// Runs a command inside that must succeed, and returns what it printed.
    ///
    /// # Errors
    /// As [`Netns::output`], or an exit status other than zero.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String, LabError> {
        let output = self.output(Command::new(program).args(args))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            command: format!("{program} {}", args.join(" ")),
            host: self.name.clone(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Sets a network sysctl inside: `key` as a path below /proc/sys/net, for example
    /// `ipv4/ip_forward`.
    ///
    /// # Errors
    /// The kernel has no such key or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        self.sysctls(&[(key, value)])
    }

    /// [`Netns::sysctl`] for several keys, in their order, by one thread.
    ///
    /// # Errors
    /// The first key that fails.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<(), LabError> {
        // The kernel shows below /proc/sys/net the namespace of the thread that opens the file.
        self.enter(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/net/{key}");
                fs::write(&path, value)
                    .map_err(LabError::io(format!("{}: write {value} to {path}", self.name)))?;
            }
            Ok(())
        })?
    }

    /// Names of all namespaces that begin with `prefix`, sorted.
    pub fn with_prefix(prefix: &str) -> Vec<Netns> {
        let Ok(entries) = fs::read_dir(NETNS_DIR) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort_unstable();
        names.into_iter().map(Netns::named).collect()
    }
}

/// Makes [`NETNS_DIR`] a shared mount, as `ip netns add` does, so that names made here are seen in
/// other mount namespaces. Done first by whoever comes first, under the lock that iproute2 takes
/// too; a bind over names that exist already would leave them mounted twice.
fn share_netns_dir() -> Result<(), LabError> {
    fs::create_dir_all(NETNS_DIR).map_err(LabError::io(format!("create {NETNS_DIR}")))?;
    let dir = File::open(NETNS_DIR).map_err(LabError::io(format!("open {NETNS_DIR}")))?;
    dir.lock().map_err(LabError::io(format!("lock {NETNS_DIR}")))?;
    let share = || {
        mount(
            None::<&str>,
            NETNS_DIR,
            None::<&str>,
            MsFlags::MS_SHARED | MsFlags::MS_REC,
            None::<&str>,
        )
    };
    let mut shared = share();
    if shared == Err(nix::Error::EINVAL) {
        shared = mount(
            Some(NETNS_DIR),
            NETNS_DIR,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )
        .and_then(|()| share());
    }
    shared.map_err(LabError::errno(format!("make {NETNS_DIR} a shared mount")))
}
