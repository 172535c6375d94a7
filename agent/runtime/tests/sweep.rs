//! Laws of forgetting connections, on the kernel's own maps. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "one harness for several suites")]
mod node;

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{Array, Map, MapData};
use node::{Node, in_namespace};
use sluice::attach::Attacher;
use sluice::maps::{FlowTable, Pins, Plain};
use sluice::sweep::{Sweeper, forget_udp};
use sluice_abi::{
    Backend, FloodWord, FlowRecord, FlowSet, IPPROTO_TCP, IPPROTO_UDP, SnatSlot, flow_tag, maps,
};

const NOW: u32 = 100_000;
const FIRST_PORT: u16 = 16_384;

/// The maps of a loaded object.
struct Tables {
    pins: Pins,
    flows: FlowTable,
    _programs: Attacher,
}

impl Tables {
    fn new(node: &Node) -> Self {
        let programs = Attacher::load(&node.pin_dir, &node.maps()).unwrap();
        let pins = programs.pins().clone();
        let flows = pins.flows().unwrap().with_sets(node.maps().flow_sets);
        Self { flows, pins, _programs: programs }
    }

    fn array<T>(&self, name: &str) -> Array<MapData, Plain<T>>
    where
        Plain<T>: aya::Pod,
    {
        let data = MapData::from_pin(self.pins.map_path(name)).unwrap();
        Array::try_from(Map::from_map_data(data).unwrap()).unwrap()
    }

    fn put(&self, set: u32, records: &[FlowRecord]) {
        let mut value = FlowSet::default();
        for (way, record) in records.iter().enumerate() {
            value.tags[way] = 1 + 2 * way as u32;
            value.records[way] = *record;
        }
        self.array(maps::FLOW).set(set, Plain(value), 0).unwrap();
    }

    fn put_slot(&self, index: u32, slot: SnatSlot) {
        self.array(maps::SNAT).set(index, Plain(slot), 0).unwrap();
    }

    fn left(&self) -> Vec<(u32, u32)> {
        self.flows.iter().map(|f| (f.set, f.way)).collect()
    }

    fn slots(&self) -> Vec<u32> {
        self.flows.slots().map(|(index, _)| index).collect()
    }
}

/// A record that may be silent for 30 ticks and was for `age`.
fn record(proto: u8, age: u32) -> FlowRecord {
    FlowRecord { proto, timeout: 30, seen: NOW - age, ..FlowRecord::default() }
}

#[test]
fn silent_connections_are_forgotten_and_others_stay() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        tables.put(
            1,
            &[
                record(IPPROTO_UDP, 31),
                record(IPPROTO_UDP, 29),
                FlowRecord { timeout: 7200, ..record(IPPROTO_TCP, 7000) },
                record(IPPROTO_TCP, 90_000),
            ],
        );
        tables.put(3, &[FlowRecord { timeout: 0, ..record(IPPROTO_TCP, 1) }]);
        assert_eq!(tables.left().len(), 5);
        let swept = Sweeper::default().pass(&tables.flows, NOW);
        assert_eq!((swept.used, swept.freed), (5, 3));
        assert_eq!(tables.left(), [(1, 1), (1, 2)]);
    });
}

#[test]
fn snat_slot_goes_with_its_connection_and_never_without_cause() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        let first = u32::from(FIRST_PORT) * maps::SNAT_SLOTS_PER_PORT;
        let with = |age, slot: u32| FlowRecord { snat: slot + 1, ..record(IPPROTO_UDP, age) };
        tables.put(2, &[with(31, first), with(1, first + 1)]);
        tables.put_slot(first, SnatSlot::owned(2, 0));
        tables.put_slot(first + 1, SnatSlot::owned(2, 1));
        // A slot whose record was lost, and one that a decision has just taken.
        tables.put_slot(first + 2, SnatSlot::owned(3, 5));
        tables.put_slot(first + 3, SnatSlot::CLAIMED);
        let mut sweeper = Sweeper::default();
        let swept = sweeper.pass(&tables.flows, NOW);
        assert_eq!((swept.freed, swept.orphans), (1, 0));
        assert_eq!(swept.ports, Some((FIRST_PORT, FIRST_PORT)));
        assert_eq!(swept.fullest, 1, "three ports, of three groups of endpoints");
        assert_eq!(tables.slots(), [first + 1, first + 2, first + 3]);
        // What looks the same at the next pass was no decision in progress.
        let swept = sweeper.pass(&tables.flows, NOW);
        assert_eq!((swept.freed, swept.orphans), (0, 2));
        for port in 1..=2 {
            tables.put_slot(first + 1 + port * maps::SNAT_SLOTS_PER_PORT, SnatSlot::CLAIMED);
        }
        assert_eq!(sweeper.pass(&tables.flows, NOW).fullest, 3);
        assert_eq!(sweeper.pass(&tables.flows, NOW).fullest, 1);
        assert_eq!(tables.slots(), [first + 1]);
    });
}

#[test]
fn flood_guard_is_looked_into_until_its_last_record_is_gone() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        let word = |at: u32| tables.array(maps::FLOOD).set(0, Plain(FloodWord::written(at)), 0);
        tables.put(3, &[record(IPPROTO_TCP, 1)]);
        tables.put(4, &[record(IPPROTO_TCP, 31), record(IPPROTO_TCP, 29)]);
        word(NOW - 29).unwrap();
        let pass = |now| Sweeper::default().pass(&tables.flows, now);
        let swept = pass(NOW);
        assert_eq!((swept.used, swept.guarded, swept.freed), (1, 2, 1));
        assert_eq!(tables.left(), [(3, 0), (4, 1)]);
        assert_eq!(tables.flows.flood_word(), FloodWord::written(NOW - 29));
        // The last record goes; that nothing is there is known at the next pass.
        assert_eq!(pass(NOW + 2).freed, 1);
        assert_ne!(tables.flows.flood_word(), FloodWord::default());
        // What is just being put there is not in sight yet.
        word(NOW + 3).unwrap();
        pass(NOW + 4);
        assert_eq!(tables.flows.flood_word(), FloodWord::written(NOW + 3));
        pass(NOW + 5);
        assert_eq!(tables.flows.flood_word(), FloodWord::default());
        // A word that changed meanwhile stays.
        word(NOW).unwrap();
        assert!(!tables.flows.clear_flood_word(FloodWord::written(NOW - 1)));
        assert_eq!(tables.flows.flood_word(), FloodWord::written(NOW));
    });
}

#[test]
fn place_with_another_owner_is_not_freed() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        tables.put(0, &[record(IPPROTO_UDP, 31)]);
        let seen = tables.flows.iter().next().unwrap();
        // Meanwhile a program gave the place away: to another client, or to the same one again.
        for tag in [seen.tag + 64, seen.tag + flow_tag::NEXT] {
            let mut value = FlowSet::default();
            value.tags[0] = tag;
            tables.array(maps::FLOW).set(0, Plain(value), 0).unwrap();
            assert!(!tables.flows.free(&seen), "{tag:#x}");
            assert_eq!(tables.left(), [(0, 0)]);
        }
    });
}

#[test]
fn freed_place_keeps_its_generation() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        let mut value = FlowSet::default();
        value.tags[0] = 64 | (5 * flow_tag::NEXT) | flow_tag::USED;
        tables.array(maps::FLOW).set(0, Plain(value), 0).unwrap();
        assert_eq!(Sweeper::default().pass(&tables.flows, NOW).freed, 1);
        let set = tables.array::<FlowSet>(maps::FLOW).get(&0, 0).unwrap().0;
        assert_eq!(set.tags[0], 5 * flow_tag::NEXT);
    });
}

#[test]
fn udp_of_a_removed_endpoint_ends_and_tcp_lives_on() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        let to =
            |proto, service, backend_id| FlowRecord { service, backend_id, ..record(proto, 1) };
        tables.put(
            0,
            &[
                to(IPPROTO_UDP, 1, 10),
                to(IPPROTO_UDP, 1, 11),
                to(IPPROTO_TCP, 1, 10),
                to(IPPROTO_UDP, 2, 10),
                to(IPPROTO_UDP, 3, 12),
            ],
        );
        // Service 1 lost backend 10; service 3 is gone; service 2 was not touched.
        let valid = BTreeMap::from([(1, BTreeSet::from([11])), (3, BTreeSet::new())]);
        assert_eq!(forget_udp(&tables.flows, &valid), 2);
        assert_eq!(tables.left(), [(0, 1), (0, 2), (0, 3)]);
    });
}

#[test]
fn consistent_hash_entries_are_read_as_they_were_written() {
    in_namespace(|node| {
        let tables = Tables::new(node);
        let mut maglev = tables.pins.maglev().unwrap();
        assert_eq!(maglev.len(), 4096);
        assert!(maglev.write(4090, &[1, 2, 3, 4, 5, 6]));
        assert!(!maglev.write(4095, &[1, 2]), "beyond the end");
        assert_eq!(maglev.read(4090, 6), [1, 2, 3, 4, 5, 1]);
        // The kernel sees the same.
        let array = tables.array::<u32>(maps::MAGLEV);
        assert_eq!(array.get(&4093, 0).unwrap().0, 4);
    });
}

/// Read by the thousand: the first and the last of the map, and both sides of where one reading
/// ends and the next begins.
#[test]
fn used_entries_of_an_array_are_found_wherever_they_stand() {
    in_namespace(|node| {
        let sizes = sluice::config::Maps { backends: 10_000, ..node.maps() };
        let programs = Attacher::load(&node.pin_dir, &sizes).unwrap();
        let mut backends = programs.pins().backends().unwrap();
        assert_eq!(backends.used().unwrap(), []);
        let entry = |id: u32| Backend { index: id, route: 1, ..Backend::default() };
        let ids = [0, 1, 4095, 4096, 4097, 8191, 8192, 9999];
        for id in ids {
            backends.write(id, entry(id)).unwrap();
        }
        assert_eq!(backends.used().unwrap(), ids.map(|id| (id, entry(id))));
    });
}
