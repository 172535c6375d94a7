//! The law of the established path, on the loaded program: a packet of a known connection decides
//! nothing and writes no map by a helper, reads no clock, asks no routing table.
//!
//! Two proofs that need each other. The instructions of the objects contain no call of such a helper
//! at all, on no path; so nothing can be hit but what decides, and that is counted by the object
//! built with the feature `trap` while a million packets run through it.

use std::collections::BTreeMap;

use aya::maps::Array;
use sluice::bench::{Kind, Rig, Scenario};
use sluice::config::Config;
use sluice_abi::{Family, TRAP, Trap};
use sluice_tests::elf::{self, helper};
use sluice_tests::kernel::{OBJECT, TRAP_OBJECT};
use sluice_tests::netns::in_namespace;
use sluice_tests::world::FAMILIES;

const ESTABLISHED: [Kind; 5] =
    [Kind::Decap, Kind::DnatLocal, Kind::DnatRemote, Kind::DecapDnat, Kind::ReplyRemote];
/// Of each kind and family; together a million.
const PACKETS: u32 = 100_000;

fn rig() -> Rig {
    let sizes = sluice::config::Maps { flow_sets: 1024, ..Config::default().maps };
    Rig::load(TRAP_OBJECT, &sizes).unwrap_or_else(|e| panic!("{e}"))
}

fn counts(rig: &Rig) -> BTreeMap<Trap, u64> {
    let map = rig.map(TRAP).expect("the trap's counts");
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
            total += u64::from(PACKETS);
        }
        assert_eq!(total, 1_000_000);
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
            for (id, helper) in helper::FORBIDDEN {
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
    assert_eq!(node.functions[..2], ["xdp_node", "sl_decide"], "{node:?}");
    assert!(node.helpers.contains_key(&helper::MAP_LOOKUP), "{node:?}");
    assert!(node.helpers.contains_key(&helper::SPIN_LOCK), "{node:?}");
    let clock = object.contents("xdp_clock");
    assert_eq!(clock.helpers, BTreeMap::from([(helper::JIFFIES64, 1)]));
    assert_eq!(object.contents("xdp_pass").helper_calls(), 0);
}
