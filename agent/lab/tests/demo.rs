//! The demonstration must not believe in traffic that no datapath counted. Its PASS is tested with
//! the real agent, in the suites across crates; here the agent is a stand-in that says that all is
//! well and does nothing. Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use sluice_lab::demo::{self, DemoOptions};
use sluice_lab::{Family, LabContext, LabSpec, Mode};

/// Counters that stand still, and a status that is always good.
const STAND_IN: &str = r#"#!/bin/sh
case "$1" in
  lab) exec SLUICE_LAB "$@" ;;
  run) exec sleep 600 ;;
  status) echo '{"ready": true, "mode": {"uplink0": "native"}}' ;;
  counters) echo '{"reasons": [], "services": []}' ;;
esac
"#;

fn context(dir: &std::path::Path) -> LabContext {
    let program = dir.join("sluice");
    let text = STAND_IN.replace("SLUICE_LAB", env!("CARGO_BIN_EXE_sluice-lab"));
    fs::write(&program, text).expect("write");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
    LabContext { run_root: dir.join("lab"), ..LabContext::new(program) }
}

fn options(detach: bool) -> DemoOptions {
    DemoOptions {
        spec: LabSpec::kernel_only(0, 0),
        modes: vec![Mode::Native],
        families: vec![Family::V4],
        detach,
        talk: false,
    }
}

#[test]
fn answered_traffic_that_no_counter_shows_fails() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let report = demo::run(&context(dir.path()), &options(true)).expect("a report");
    assert!(!report.pass);
    assert!(report.rows.iter().all(|row| !row.problems.is_empty()));
    // The kernel's tunnel carries pod-to-pod traffic without us: all answered, none counted.
    let answered: Vec<_> = report
        .rows
        .iter()
        .filter(|row| row.answered.values().sum::<usize>() == row.requests)
        .collect();
    assert_eq!(answered.len(), 4, "{:#?}", report.rows);
    for row in answered {
        assert_eq!(row.problems.len(), 1, "{row:#?}");
        assert!(row.problems[0].starts_with("decapsulated packets: 0 counted"), "{row:#?}");
        assert!(row.packets_sent >= row.requests as u64);
    }
}

#[test]
fn an_agent_that_only_says_native_is_found_out() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let error = demo::run(&context(dir.path()), &options(false)).expect_err("nothing is attached");
    assert!(error.to_string().contains("without an XDP program"), "{error}");
}
