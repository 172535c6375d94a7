//! A network namespace for the time of a test, with the interfaces that [`crate::world`] names.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex};

use nix::sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare};
use nix::unistd::Pid;

use crate::kernel::{Kernel, OBJECT};
use crate::world::{dev, size};

/// Runs `test` on a thread of its own, in a new network namespace that ends with it.
///
/// The thread stays on one CPU: per-CPU maps are then one map.
///
/// # Panics
/// If `test` does, or without the right to make a namespace.
pub fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let outcome = std::thread::spawn(move || {
        enter();
        test()
    })
    .join();
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

fn enter() {
    let mut cpus = CpuSet::new();
    cpus.set(sched_getcpu().expect("this CPU")).expect("this CPU");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("stay on this CPU");
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (the tests need root)");
}

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// Runs `test` with the product's object and the world's interfaces. The object is loaded once for
/// all tests of a program, which take turns; each fills the tables that it needs.
///
/// # Panics
/// If `test` does, or the object does not load.
pub fn with_kernel<T: Send + 'static>(test: impl FnOnce(&mut Kernel) -> T + Send + 'static) -> T {
    static JOBS: LazyLock<Mutex<Sender<Job>>> = LazyLock::new(|| {
        let (jobs, queue) = channel::<Job>();
        std::thread::spawn(move || {
            enter();
            make_interfaces();
            let mut kernel = Kernel::load(OBJECT, size::FLOW_SETS);
            queue.into_iter().for_each(|job| job(&mut kernel));
        });
        Mutex::new(jobs)
    });
    let (done, outcome) = channel();
    let job = move |kernel: &mut Kernel| {
        let result = catch_unwind(AssertUnwindSafe(|| test(kernel)));
        // Nobody waits any more only if the test's thread is gone.
        let _ = done.send(result);
    };
    let queued = match JOBS.lock() {
        Ok(jobs) => jobs.send(Box::new(job)),
        Err(poisoned) => poisoned.into_inner().send(Box::new(job)),
    };
    queued.expect("the object loads, see above");
    match outcome.recv() {
        Ok(result) => result.unwrap_or_else(|panic| resume_unwind(panic)),
        Err(_) => panic!("the object does not load, see above"),
    }
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

/// Makes the interfaces that the standard world names, as veth pairs whose far ends have the same
/// name with a `p` behind it.
///
/// # Panics
/// If they cannot be made.
pub fn make_interfaces() {
    let line = |(name, index): &(&str, u32)| {
        format!(
            "link add {name} index {index} type veth peer name {name}p index {}\n",
            index + PEER
        )
    };
    ip(&INTERFACES.iter().map(line).collect::<String>());
}

/// Brings them up. Nobody but the test speaks there: no addresses, no IPv6 discovery.
///
/// # Panics
/// If they cannot be brought up.
pub fn raise_interfaces() {
    sh("for i in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $i; done");
    let line =
        |(name, _): &(&str, u32)| format!("link set dev {name} up\nlink set dev {name}p up\n");
    ip(&INTERFACES.iter().map(line).collect::<String>());
}

fn ip(batch: &str) {
    sh(&format!("printf '{}' | ip -batch -", batch.replace('\n', "\\n")));
}

const INTERFACES: [(&str, u32); 6] = [
    ("upa", dev::UPLINK),
    ("upb", dev::UPLINK_B),
    ("podr", dev::POD_REDIRECT),
    ("pods", dev::POD_STACK),
    ("vx4", dev::VXLAN_V4),
    ("vx6", dev::VXLAN_V6),
];

/// What the index of a far end is more than that of the near end.
pub const PEER: u32 = 100;
