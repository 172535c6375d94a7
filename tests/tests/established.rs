//! The law of the established path, on the loaded program: a packet of a known connection decides
//! nothing and writes no map by a helper, reads no clock, asks no routing table.
//!
//! Two proofs that need each other. The instructions of the objects contain no call of such a helper
//! at all, on no path; so nothing can be hit but what decides, and that is counted by the object
//! built with the feature `trap` while a million packets run through it.

use std::collections::BTreeMap;

use aya::maps::{Array, Map};
use sluice::bench::{Kind, Rig, Scenario};
use sluice::config::Config;
use sluice_abi::{Family, Hook, LANES, TRAP, Trap};
use sluice_tests::elf::{self, helper};
use sluice_tests::fixtures::{self, Account, Fixture};
use sluice_tests::judge::in_kernel;
use sluice_tests::kernel::{Kernel, OBJECT, TRAP_OBJECT};
use sluice_tests::netns::{in_namespace, make_interfaces};
use sluice_tests::world::{FAMILIES, size};

const ESTABLISHED: [Kind; 5] =
    [Kind::Decap, Kind::DnatLocal, Kind::DnatRemote, Kind::DecapDnat, Kind::ReplyRemote];
/// Of each kind and family; together a million.
const PACKETS: u32 = 100_000;

fn rig() -> Rig {
    let sizes = sluice::config::Maps { flow_sets: 1024, ..Config::default().maps };
    Rig::load(TRAP_OBJECT, &sizes).unwrap_or_else(|e| panic!("{e}"))
}

fn counts(rig: &Rig) -> BTreeMap<Trap, u64> {
    read_counts(rig.map(TRAP).expect("the trap's counts"))
}

fn kernel_counts(kernel: &Kernel) -> BTreeMap<Trap, u64> {
    read_counts(kernel.map(TRAP))
}

fn read_counts(map: &Map) -> BTreeMap<Trap, u64> {
    let array: Array<_, u64> = map.try_into().expect("an array");
    Trap::ALL.map(|t| (t, array.get(&(t as u32), 0).expect("a count"))).into()
}

/// Calls per kind while `packets` of a scenario run, every one of them counted under its reason.
fn calls(rig: &mut Rig, scenario: &Scenario, packets: u32) -> BTreeMap<Trap, u64> {
    rig.open(scenario).unwrap_or_else(|e| panic!("{scenario:?}: {e}"));
    let before = counts(rig);
    rig.measure(scenario, packets).unwrap_or_else(|e| panic!("{scenario:?}: {e}"));
    counts(rig).into_iter().map(|(trap, n)| (trap, n - before[&trap])).collect()
}

#[test]
fn a_million_packets_of_known_connections_decide_and_write_nothing() {
    in_namespace(|| {
        let mut rig = rig();
        let mut total = 0u64;
        for scenario in Scenario::all(&ESTABLISHED, &FAMILIES, &[4096]) {
            let calls = calls(&mut rig, &scenario, PACKETS);
            assert_eq!(calls[&Trap::Decide], 0, "{scenario:?}");
            assert_eq!(calls[&Trap::Lock], 0, "{scenario:?}");
            assert_eq!(calls[&Trap::Segment], 0, "{scenario:?}");
            total += u64::from(PACKETS);
        }
        assert_eq!(total, 1_000_000);
    });
}

#[test]
fn known_connections_decide_nothing_at_any_hook() {
    const PACKETS: u64 = 100;
    in_namespace(|| {
        make_interfaces();
        let mut kernel = Kernel::load(TRAP_OBJECT, size::FLOW_SETS);
        let mut seen = BTreeMap::new();
        for fixture in fixtures::all().iter().filter(|f| in_kernel(f)) {
            let Account::Flow { new: false, .. } = fixture.account else { continue };
            kernel.fill(&fixture.world);
            let mut trail = Vec::new();
            for step in &fixture.before {
                let frame = (step.frame)(&trail);
                trail.push(kernel.run(step.hook, step.ifindex, &frame).bytes);
            }
            let Fixture { name, reason, step, .. } = fixture;
            let frame = (step.frame)(&trail);
            let calls = kernel_counts(&kernel);
            let packets = kernel.reason(step.hook, *reason as u32).packets;
            for _ in 0..PACKETS {
                kernel.run(step.hook, step.ifindex, &frame);
            }
            assert_eq!(
                kernel.reason(step.hook, *reason as u32).packets - packets,
                PACKETS,
                "{name}"
            );
            let after = kernel_counts(&kernel);
            for trap in [Trap::Decide, Trap::Lock] {
                assert_eq!(after[&trap], calls[&trap], "{name}: {}", trap.label());
            }
            *seen.entry(step.hook.label()).or_insert(0) += 1;
        }
        println!("fixtures of known connections: {seen:?}");
        assert_eq!(
            seen.len(),
            Hook::ALL.len() - 1,
            "every hook but one that does the same: {seen:?}"
        );
    });
}

#[test]
fn new_connections_spring_the_trap() {
    in_namespace(|| {
        let mut rig = rig();
        for scenario in Scenario::all(&[Kind::DnatNew, Kind::DecapDnatNew], &FAMILIES, &[]) {
            let calls = calls(&mut rig, &scenario, 1000);
            assert_eq!(calls[&Trap::Decide], 1000, "{scenario:?}");
            assert_eq!(calls[&Trap::Lock], 1000, "{scenario:?}");
        }
        // The first packet of a known connection is a new one.
        let opening = Scenario { kind: Kind::DnatLocal, family: Family::V4, flows: 64 };
        let before = counts(&rig);
        rig.open(&opening).expect("packets");
        assert_eq!(counts(&rig)[&Trap::Decide] - before[&Trap::Decide], 64);
    });
}

#[test]
fn no_program_contains_a_call_that_a_packet_may_not_make() {
    for (name, bytes) in [("product", OBJECT), ("trap", TRAP_OBJECT)] {
        let object = elf::Object::read(bytes);
        for program in object.programs() {
            let contents = object.contents(program);
            let slow = LANES.iter().any(|(_, _, name)| *name == program);
            for (id, helper) in helper::FORBIDDEN {
                if slow && helper::SUMS.contains(&id) {
                    continue;
                }
                assert_eq!(
                    contents.helpers.get(&id),
                    None,
                    "{name}: {program} calls bpf_{helper}, reached through {:?}",
                    contents.functions
                );
            }
        }
    }
}

#[test]
fn instructions_are_read_right() {
    let object = elf::Object::read(OBJECT);
    let node = object.contents("xdp_node");
    assert_eq!(node.functions[0], "xdp_node", "{node:?}");
    assert!(node.functions.iter().any(|f| f == "sl_decide"), "{node:?}");
    assert!(node.helpers.contains_key(&helper::MAP_LOOKUP), "{node:?}");
    assert!(node.helpers.contains_key(&helper::SPIN_LOCK), "{node:?}");
    let clock = object.contents("xdp_clock");
    assert_eq!(clock.helpers, BTreeMap::from([(helper::JIFFIES64, 1)]));
    assert_eq!(object.contents("xdp_pass").helper_calls(), 0);
}
