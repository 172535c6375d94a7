//! Budgets that no change may exceed unseen: `tests/budget.toml`. What a packet costs is measured by
//! `sluice bench`; what can be counted without a clock is held here.

use std::collections::BTreeMap;
use std::path::Path;

use aya::maps::Array;
use aya::programs::{ProgramInfo, loaded_programs};
use serde::Deserialize;
use sluice::bench::{Kind, Rig, Scenario};
use sluice::config::Config;
use sluice_abi::{TRAP, Trap};
use sluice_tests::elf;
use sluice_tests::kernel::{Kernel, OBJECT, TRAP_OBJECT};
use sluice_tests::netns::in_namespace;
use sluice_tests::world::FAMILIES;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    program: BTreeMap<String, ProgramBudget>,
    path: BTreeMap<String, BTreeMap<String, u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramBudget {
    verified_instructions: u32,
    stack: u32,
    helper_calls: u32,
    calls: u32,
}

fn budget() -> Budget {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("budget.toml");
    let text = std::fs::read_to_string(&path).expect("tests/budget.toml");
    toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One line for each figure above its budget.
fn above(name: &str, figures: &[(&str, u64, u64)]) -> Vec<String> {
    let over = figures.iter().filter(|(_, is, may)| is > may);
    over.map(|(what, is, may)| format!("{name}: {what} is {is}, the budget {may}")).collect()
}

fn info(kernel: &Kernel, name: &str) -> ProgramInfo {
    if name.starts_with("tc_") { kernel.tc(name).info() } else { kernel.xdp(name).info() }
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn every_program_stays_within_its_budget() {
    let budget = budget();
    let object = elf::Object::read(OBJECT);
    let names = object.programs();
    let budgeted: Vec<&str> = budget.program.keys().map(String::as_str).collect();
    assert_eq!(names.iter().copied().collect::<Vec<_>>(), budgeted, "programs of the object");
    // Loading is what makes the verifier count.
    let kernel = Kernel::load(OBJECT, 64);
    assert!(loaded_programs().next().is_some());
    let mut over = Vec::new();
    for (name, may) in &budget.program {
        let info = info(&kernel, name);
        let contents = object.contents(name);
        let verified = info.verified_instruction_count().expect("Linux 5.16");
        println!(
            "{name}: {verified} instructions verified (budget {}), stack {} ({}), {} helper calls ({}), {} calls ({}), {} bytes translated, {} bytes of machine code",
            may.verified_instructions,
            contents.stack,
            may.stack,
            contents.helper_calls(),
            may.helper_calls,
            contents.calls,
            may.calls,
            info.size_translated().unwrap_or_default(),
            info.size_jitted(),
        );
        over.extend(above(
            name,
            &[
                ("instructions verified", verified.into(), may.verified_instructions.into()),
                ("bytes of stack", contents.stack.into(), may.stack.into()),
                ("helper calls", contents.helper_calls().into(), may.helper_calls.into()),
                ("calls of functions", contents.calls.into(), may.calls.into()),
            ],
        ));
    }
    assert!(over.is_empty(), "{}", over.join("\n"));
}

#[test]
fn every_path_stays_within_its_calls() {
    in_namespace(|| {
        const PACKETS: u32 = 4096;
        // Each CPU asks for the tunnel end and for the pod once, and this thread may be on any.
        const REMEMBERED: u64 = 2;
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let budget = budget();
        let sizes = sluice::config::Maps { flow_sets: 1024, ..Config::default().maps };
        let mut rig = Rig::load(TRAP_OBJECT, &sizes).unwrap_or_else(|e| panic!("{e}"));
        let mut over = Vec::new();
        let mut seen = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_floor()) {
            let may = budget.path.get(kind.label());
            let may = may.unwrap_or_else(|| panic!("no [path.{}] in the budget", kind.label()));
            seen.push(kind.label());
            for scenario in Scenario::all(&[kind], &FAMILIES, &[64]) {
                rig.open(&scenario).unwrap_or_else(|e| panic!("{scenario:?}: {e}"));
                let before = counts(&rig);
                rig.measure(&scenario, PACKETS).unwrap_or_else(|e| panic!("{scenario:?}: {e}"));
                let calls: Vec<(&str, u64, u64)> = counts(&rig)
                    .into_iter()
                    .map(|(trap, n)| {
                        let label = trap.label();
                        let may = may.get(label).copied().unwrap_or_default();
                        let once = if trap == Trap::HashLookup { REMEMBERED * cpus } else { 0 };
                        (label, n - before[&trap], may * u64::from(PACKETS) + once)
                    })
                    .collect();
                println!("{} {:?}: {calls:?} for {PACKETS} packets", kind.label(), scenario.family);
                over.extend(above(&format!("{} {:?}", kind.label(), scenario.family), &calls));
            }
        }
        let labels = Trap::ALL.map(Trap::label);
        for (path, may) in &budget.path {
            assert!(seen.contains(&path.as_str()), "[path.{path}] is no path");
            for call in may.keys() {
                assert!(labels.contains(&call.as_str()), "[path.{path}]: {call} is not counted");
            }
        }
        assert!(over.is_empty(), "{}", over.join("\n"));
    });
}

fn counts(rig: &Rig) -> BTreeMap<Trap, u64> {
    let array: Array<_, u64> = rig.map(TRAP).expect("counts").try_into().expect("an array");
    Trap::ALL.map(|t| (t, array.get(&(t as u32), 0).expect("a count"))).into()
}

#[test]
fn a_figure_above_its_budget_is_named_and_one_at_it_is_not() {
    let over = above("xdp_node", &[("stack", 512, 512), ("calls", 3, 2)]);
    assert_eq!(over, ["xdp_node: calls is 3, the budget 2"]);
}
