//! The demonstration as a user runs it.

use std::process::Command;

use serde_json::Value;

use crate::bed::sluice;

fn demo(args: &[&str]) -> (bool, Value) {
    let mut command = Command::new(sluice());
    command.args(["lab", "demo", "--output", "json"]).args(args);
    let output = command.output().expect("sluice lab demo");
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.success(), report)
}

#[test]
fn demo_passes_in_native_and_in_generic_mode() {
    let (success, report) = demo(&[]);
    assert_eq!(report["pass"], true, "{report:#}");
    assert!(success, "exit status");
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(52));
}

#[test]
fn demo_passes_at_tc() {
    let (success, report) = demo(&["--mode", "tc"]);
    assert_eq!(report["pass"], true, "{report:#}");
    assert!(success, "exit status");
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(26));
}

#[test]
fn demo_with_the_program_detached_fails() {
    let (success, report) = demo(&["--detach", "--mode", "native"]);
    assert_eq!(report["pass"], false, "{report:#}");
    assert!(!success, "exit status");
    // Pod-to-pod traffic is answered all the same, by the kernel: that alone proves nothing.
    let rows = report["rows"].as_array().expect("rows");
    let answered =
        rows.iter().filter(|row| row["answered"].as_object().is_some_and(|a| !a.is_empty()));
    assert_eq!(answered.count(), 8, "{report:#}");
    assert!(rows.iter().all(|row| row["problems"].as_array().is_some_and(|p| !p.is_empty())));
}
