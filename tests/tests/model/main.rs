//! Packets in sequence, host and kernel against the reference model: what a node does with them is
//! lawful, and both do the same. See docs/model.md.
//!
//! - `SLUICE_MODEL_CASES` and `SLUICE_MODEL_SEED` draw more cases, or others.
//! - `SLUICE_MODEL_REPLAY=<file>` drives the frames of a failure once more (test `replay`).

mod save;
mod twin;

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sluice_abi::{Hook, REASONS, VerdictKind};
use sluice_tests::host::Host;
use sluice_tests::netns::{in_namespace, with_kernel};
use sluice_tests::sequence::{Hunt, hunt, replay};
use sluice_tests::world::World;

use twin::Loaded;

/// Cases of a run.
const CASES: u32 = 20_000;
/// Threads, each with a kernel's worth of tables.
const HUNTERS: u32 = 2;

/// A number from the environment.
fn number<T: FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

/// Threads that stay on one CPU each: per-CPU maps are then one map.
fn stay_on(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).expect("a CPU");
    // A machine may have fewer.
    let _ = sched_setaffinity(Pid::from_raw(0), &cpus);
}

#[test]
fn packets_in_sequence_are_lawful_on_host_and_kernel() {
    let cases = number("SLUICE_MODEL_CASES", CASES).div_ceil(HUNTERS);
    let seed = number("SLUICE_MODEL_SEED", 1u64);
    let hunters: Vec<_> = (0..HUNTERS)
        .map(|n| {
            std::thread::spawn(move || {
                stay_on(n as usize);
                let seed = seed * u64::from(HUNTERS) + u64::from(n);
                in_namespace(move || hunt(cases, seed, &mut Loaded::new()))
            })
        })
        .collect();
    let mut hunted = Hunt::default();
    for hunter in hunters {
        match hunter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            Ok(hunt) => hunted = hunted.and(hunt),
            Err(prey) => panic!("{}", save::save(&prey)),
        }
    }
    for (key, n) in &hunted.reasons {
        println!("{:10} {:20} {n}", key.0.label(), key.1.label());
    }
    everything_came(&hunted);
    let Hunt { cases, packets, .. } = hunted;
    // Past libtest, which keeps what a test prints that passes: `make test` shows this line.
    let line = format!("\nmodel: {cases} cases, {packets} packets, host and kernel\n");
    std::io::stderr().write_all(line.as_bytes()).expect("standard error");
}

/// Reasons that no sequence leads to, and why.
const ELSEWHERE: [(&str, &str); 9] = [
    ("head_room", "the driver's doing"),
    ("no_metadata", "the driver's doing"),
    ("flow_changed", "another CPU's doing"),
    ("echo_limited", "takes more packets than a case has"),
    ("flow_table_full", "takes sixteen clients of one set"),
    ("not_linear", "takes a frame in several buffers"),
    ("super_frame", "takes segments that were merged on arrival"),
    ("jumbogram", "a header that is not drawn"),
    ("no_lane", "takes a program that is not in its place"),
];

/// A property test that never gets where it matters cannot fail.
fn everything_came(hunted: &Hunt) {
    let missing: Vec<&str> = REASONS
        .iter()
        .filter(|row| !hunted.reasons.keys().any(|(_, reason)| *reason == row.reason))
        .map(|row| row.label)
        .filter(|label| !ELSEWHERE.iter().any(|(elsewhere, _)| elsewhere == label))
        .collect();
    assert!(
        missing.is_empty() || hunted.cases < 10_000,
        "never drawn: {missing:?}; draw them (tests/src/sequence/moves.rs) or say why not"
    );
    let share = |hook: Hook| {
        let of = |all: bool| -> u64 {
            let counts = hunted.reasons.iter().filter(|((h, _), _)| *h == hook);
            let counts = counts.filter(|((_, r), _)| all || r.kind() == VerdictKind::Forward);
            counts.map(|(_, n)| n).sum()
        };
        of(false) * 100 / of(true).max(1)
    };
    for hook in [Hook::Xdp, Hook::TcIngress, Hook::TcEgress] {
        assert!(share(hook) >= 15, "{hook:?}: {} % of the packets are forwarded", share(hook));
    }
}

#[test]
fn failures_are_found_made_small_and_saved() {
    // A twin that cannot stand replies.
    let prey = hunt(10_000, 1, &mut twin::Choosy).expect_err("replies come");
    assert!(prey.report.steps.len() <= 3, "{} steps are not small", prey.report.steps.len());
    let said = save::save(&prey);
    let file = said.lines().find_map(|line| line.strip_prefix("saved: ")).expect("a file");
    let report = save::load(&PathBuf::from(file));
    let again = replay(&report, &mut Host::new(&World::standard()), &mut twin::Choosy);
    assert_eq!(again.failure, prey.report.failure);
    std::fs::remove_file(file).expect("the file is there");
    std::fs::remove_file(PathBuf::from(file).with_extension("pcap")).expect("so is the other");
}

#[test]
fn replay_of_a_saved_failure() {
    let Ok(file) = std::env::var("SLUICE_MODEL_REPLAY") else { return };
    // Cargo runs tests in the directory of their package, people stand in the one above it.
    let report = save::load(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(file));
    let again = with_kernel(move |kernel| {
        let mut host = Host::new(&World::standard());
        replay(&report, &mut host, &mut Loaded::borrowing(kernel))
    });
    match &again.failure {
        Some(failure) => panic!("it still fails:\n{}\n{}", save::text(&again), failure.0),
        None => println!("lawful now: {} packets", again.packets()),
    }
}
