//! A network namespace for the time of a test, with the interfaces that [`crate::world`] names.

use std::process::Command;

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;

/// Runs `test` on a thread of its own, in a new network namespace that ends with it.
///
/// The thread stays on one CPU: per-CPU maps are then one map.
///
/// # Panics
/// If `test` does, or without the right to make a namespace.
pub fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let outcome = std::thread::spawn(move || {
        let mut cpus = CpuSet::new();
        cpus.set(0).expect("CPU 0");
        sched_setaffinity(Pid::from_raw(0), &cpus).expect("stay on CPU 0");
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (the tests need root)");
        test()
    })
    .join();
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs a command line in the namespace of the calling thread; it must succeed. What it printed.
///
/// # Panics
/// If the command fails.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("sh");
    assert!(
        output.status.success(),
        "{command}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
