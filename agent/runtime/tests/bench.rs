//! `sluice bench progrun`: figures only for packets that went the way that the row names.

use std::process::Command;

use serde_json::Value;
use sluice::attach::OBJECT;
use sluice::bench::{BenchError, Kind, Rig, Scenario};
use sluice::config::{Config, Maps};
use sluice_abi::Family;

fn rig() -> Rig {
    let sizes = Maps { flow_sets: 1024, ..Config::default().maps };
    Rig::load(OBJECT, &sizes).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn packets_that_go_another_way_are_no_sample() {
    let mut rig = rig();
    let known = Scenario { kind: Kind::DnatLocal, family: Family::V4, flows: 64 };
    // Not opened: in mode `accelerate` these packets are another's connections.
    match rig.measure(&known, 1000) {
        Err(BenchError::Astray(text)) => assert!(text.contains("mid_flow"), "{text}"),
        other => panic!("{other:?}"),
    }
    rig.open(&known).expect("opened");
    rig.measure(&known, 1000).expect("known now");
}

#[test]
fn every_path_of_the_bench_runs_and_restores_what_it_changed() {
    let mut rig = rig();
    rig.fill_flow_table().expect("new connections");
    for scenario in Scenario::all(&Kind::ALL, &[Family::V4, Family::V6], &[1, 512]) {
        // Twice: the second begins where the first has left everything.
        for _ in 0..2 {
            rig.sample(&scenario, 2048).unwrap_or_else(|e| panic!("{scenario:?}: {e}"));
        }
    }
}

#[test]
fn report_has_conditions_and_ratios_to_the_floor_of_the_same_run() {
    let output = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["bench", "progrun", "--rounds", "3", "--repeat", "2000", "--output", "json"])
        .args(["--only", "decap,dnat-local", "--flows", "16", "--family", "v6"])
        .output()
        .expect("sluice");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let conditions = &report["conditions"];
    for key in ["kernel", "cpu", "jit", "mitigations", "maps", "mode", "rounds", "repeat"] {
        assert!(!conditions[key].is_null(), "{key}: {conditions}");
    }
    assert_eq!(conditions["maps"]["sl_flow_v1"], sluice_abi::maps::DEFAULT_ALL_FLOW_SETS);
    assert_eq!(conditions["program"]["tag"].as_str().map(str::len), Some(16));
    let rows = report["rows"].as_array().expect("rows");
    let names: Vec<_> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names, ["floor", "decap", "dnat-local"]);
    assert_eq!(rows[0]["ratio"], 1.0);
    for row in rows {
        assert!(row["error"].is_null(), "{row}");
        assert_eq!(row["samples"].as_array().map(Vec::len), Some(3));
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
        assert!(number("min") <= number("median") && number("median") <= number("max"));
        assert!(number("ratio_low") <= number("ratio") && number("ratio") <= number("ratio_high"));
    }
}

#[test]
fn reports_are_read_by_compare_and_budget() {
    let directory = tempfile::tempdir().expect("a directory");
    let report = |name: &str, ratio: f64| {
        let row = serde_json::json!({
            "name": "decap", "family": "v4", "flows": 1,
            "ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1, "net": 9.0,
        });
        let text = serde_json::json!({"bench": "progrun", "conditions": {}, "rows": [row]});
        let path = directory.path().join(name);
        std::fs::write(&path, text.to_string()).expect("written");
        path
    };
    let (a, b) = (report("a.json", 2.0), report("b.json", 3.0));
    let compare = |first: &std::path::Path, second: &std::path::Path| {
        Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["bench", "compare", "--gate", "1.1", "--output", "json"])
            .args([first, second])
            .output()
            .expect("sluice")
    };
    let worse = compare(&a, &b);
    assert_eq!(worse.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&worse.stdout).expect("JSON");
    assert_eq!(report["rows"][0]["factor"], 1.5);
    assert_eq!(report["rows"][0]["over"], true);
    assert!(compare(&b, &a).status.success());
    let budget = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["bench", "budget", "--link", "10G", "--cores", "1", "--frame", "64"])
        .args(["--driver-ns", "31", "--output", "json", "--report"])
        .arg(&a)
        .output()
        .expect("sluice");
    let report: Value = serde_json::from_slice(&budget.stdout).expect("JSON");
    // 40 ns a packet are 25 million a second; 10G carry 9.33 million of 114 bytes and a gap.
    assert_eq!(report["rows"][0]["cost_ns"], 40.0);
    assert_eq!(report["rows"][0]["bottleneck"], "link");
    let missing = compare(&a, &directory.path().join("none.json"));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("none.json"));
}

#[test]
fn unknown_path_is_refused_by_name() {
    let output = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["bench", "progrun", "--only", "warp"])
        .output()
        .expect("sluice");
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--only warp"), "{error}");
}
