//! A network namespace of its own for each test, and a pin directory that vanishes with it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, unshare};
use sluice::attach::remove_pins;
use sluice::config;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// What a test gets: it runs in a new network namespace.
pub struct Node {
    /// Directory for pins, on the machine's BPF file system.
    pub pin_dir: PathBuf,
}

impl Node {
    /// Small maps: a test must not take 100 MB.
    pub fn maps(&self) -> config::Maps {
        config::Maps {
            frontends: 64,
            backends: 64,
            services: 64,
            maglev: 4096,
            pods: 64,
            vteps: 16,
            vtep_sources: 16,
            nexthops: 16,
            flow_sets: 4,
            flood_records: 16,
            fragments: 16,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(e) = remove_pins(&self.pin_dir) {
            eprintln!("{e}");
        }
        let _ = std::fs::remove_dir(&self.pin_dir);
    }
}

/// Runs `test` in a network namespace that ends with it. Says so where it may not.
pub fn in_namespace(test: impl FnOnce(&Node) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces and BPF need root");
        return;
    }
    let outcome = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("sluice-test-{}-{number}", std::process::id());
        let node = Node { pin_dir: PathBuf::from("/sys/fs/bpf").join(name) };
        test(&node);
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command in the namespace of the calling thread; it must succeed.
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
