//! Random histories of a small world: at every moment, even after a crash between two operations,
//! each frontend answers as before or as after, and nothing dangles.

use proptest::prelude::*;
use sluice_abi::{FrontendKey, Route};
use sluice_control::compile::DesiredFrontend;
use sluice_control::fake::FakeMaps;
use sluice_control::model::{
    Endpoint, EndpointPort, EndpointSlice, NextHopFacts, NodeContext, ObjectName, PeerFacts,
    PodFacts, Protocol, Service, ServicePort, ServicePortName, Snapshot, TunnelFacts, Tuple,
};
use sluice_control::{Allocator, Desired, Limits, MapOp, MapStore, Names, Tables, compile, delta};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

/// A Service of the small world. Addresses are few, so that Services quarrel over them.
#[derive(Clone, Debug)]
struct SmallService {
    name: u8,
    vip: u8,
    external_ip: Option<u8>,
    node_port: Option<u8>,
    internal_local: bool,
    external_local: bool,
    /// Endpoint number, ready, terminating.
    endpoints: Vec<(u8, bool, bool)>,
}

#[derive(Clone, Debug)]
struct World {
    services: Vec<SmallService>,
    /// Which of the four peers there are.
    peers: [bool; 4],
    /// Which plain destinations have a next hop, and whether it is resolved.
    next_hops: [Option<bool>; 3],
    pods: [bool; 3],
    mac: u8,
}

fn service() -> impl Strategy<Value = SmallService> {
    (
        0..6u8,
        0..6u8,
        proptest::option::of(0..4u8),
        proptest::option::of(0..3u8),
        any::<bool>(),
        any::<bool>(),
        proptest::collection::vec((0..24u8, proptest::bool::weighted(0.8), any::<bool>()), 0..6),
    )
        .prop_map(
            |(name, vip, external_ip, node_port, internal_local, external_local, endpoints)| {
                SmallService {
                    name,
                    vip,
                    external_ip,
                    node_port,
                    internal_local,
                    external_local,
                    endpoints,
                }
            },
        )
}

fn world() -> impl Strategy<Value = World> {
    (
        proptest::collection::vec(service(), 0..6),
        any::<[bool; 4]>(),
        any::<[Option<bool>; 3]>(),
        any::<[bool; 3]>(),
        0..2u8,
    )
        .prop_map(|(services, peers, next_hops, pods, mac)| World {
            services,
            peers,
            next_hops,
            pods,
            mac,
        })
}

/// Number to address: eight here, twelve behind four peers, three hosts, one nowhere.
fn endpoint_address(number: u8) -> (IpAddr, Option<&'static str>) {
    match number {
        0..8 => ([10, 244, 1, number].into(), Some("us")),
        8..20 => ([10, 244, 2 + number % 4, number].into(), Some("them")),
        20..23 => ([192, 0, 2, 100 + number - 20].into(), None),
        _ => ([198, 51, 100, number].into(), None),
    }
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap_or(NonZeroU16::MIN)
}

impl World {
    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let origin: Arc<str> = "test".into();
        for small in &self.services {
            let name = ObjectName::new("ns", format!("svc{}", small.name));
            let service = Service {
                name: name.clone(),
                origin: origin.clone(),
                created: None,
                opt_out: false,
                internal_local: small.internal_local,
                external_local: small.external_local,
                affinity_seconds: 0,
                cluster_ips: vec![[10, 96, 0, small.vip].into()],
                external_ips: small
                    .external_ip
                    .map(|n| [203, 0, 113, n].into())
                    .into_iter()
                    .collect(),
                load_balancer_ips: vec![],
                uncaptured_ips: vec![],
                ports: vec![ServicePort {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: port(80),
                    node_port: small.node_port.map(|n| port(30_000 + u16::from(n))),
                }],
            };
            let slice = EndpointSlice {
                name: name.clone(),
                origin: origin.clone(),
                service: name.clone(),
                family: sluice_abi::Family::V4,
                ports: vec![EndpointPort {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: port(8080),
                }],
                endpoints: small
                    .endpoints
                    .iter()
                    .map(|(number, ready, terminating)| {
                        let (address, node) = endpoint_address(*number);
                        Endpoint {
                            address,
                            node: node.map(Into::into),
                            pod: None,
                            ready: *ready,
                            serving: true,
                            terminating: *terminating,
                        }
                    })
                    .collect(),
            };
            snapshot.services.insert(name.clone(), Arc::new(service));
            snapshot.slices.insert(name, Arc::new(slice));
        }
        snapshot
    }

    fn node(&self) -> NodeContext {
        let mac = |last: u8| sluice_abi::Mac([2, 0, 0, 0, self.mac, last]);
        let own: IpAddr = [192, 0, 2, 1].into();
        let mut node = NodeContext {
            node_name: "us".into(),
            addresses: BTreeSet::from([own]),
            node_port_addresses: BTreeSet::from([own]),
            pod_cidrs: "10.244.1.0/24".parse().into_iter().collect(),
            tunnels: vec![TunnelFacts {
                name: "flannel.1".into(),
                vni: 1,
                port: 8472,
                ifindex: 4,
                mac: mac(1),
                underlay: own,
                inner_v4: Some([10, 244, 1, 0].into()),
                inner_v6: None,
            }],
            ..NodeContext::default()
        };
        for (i, present) in (0u8..).zip(self.peers) {
            if present {
                node.peers.push(PeerFacts {
                    vni: 1,
                    remote: [192, 0, 2, 10 + i].into(),
                    mac: mac(10 + i),
                    pod_cidrs: format!("10.244.{}.0/24", 2 + i).parse().into_iter().collect(),
                });
            }
        }
        for (i, next_hop) in (0u8..).zip(self.next_hops) {
            let facts = match next_hop {
                None => continue,
                Some(false) => NextHopFacts::Unresolved {},
                Some(true) => NextHopFacts::Resolved {
                    ifindex: 2,
                    mtu: 1500,
                    dst_mac: mac(100 + i),
                    src_mac: mac(99),
                },
            };
            node.next_hops.insert([192, 0, 2, 100 + i].into(), facts);
        }
        for (i, present) in (0u8..).zip(self.pods) {
            if present {
                node.pods.insert(
                    [10, 244, 1, i].into(),
                    PodFacts {
                        ifindex: 20 + u32::from(i),
                        redirect: i == 0,
                        peer: i == 1,
                        pod_mac: mac(200 + i),
                        host_mac: mac(210 + i),
                        mtu: 1450,
                    },
                );
            }
        }
        node
    }
}

/// What a frontend answers, without ids: the backends with their routes, for either client.
type Answer = [BTreeSet<(String, String)>; 2];

fn answers(tables: &Tables) -> BTreeMap<FrontendKey, Answer> {
    let route = |index: u32, route: u16| match route {
        r if r == Route::Tunnel as u16 => format!("{:?}", tables.vteps[&index].remote),
        r if r == Route::Plain as u16 => "plain".to_owned(),
        _ => "local".to_owned(),
    };
    let set = |extent: sluice_abi::Extent| {
        tables
            .entries(extent)
            .into_iter()
            .flat_map(|entries| entries.iter())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|id| {
                let backend = tables.backends[id];
                (format!("{}:{}", backend.addr, backend.port), route(backend.index, backend.route))
            })
            .collect()
    };
    tables
        .frontends
        .iter()
        .map(|(key, frontend)| (*key, [set(frontend.external), set(frontend.internal)]))
        .collect()
}

/// Addresses only: a backend's route may change before the set that it is in does.
fn addresses(answer: &Answer) -> [BTreeSet<&String>; 2] {
    let of = |i: usize| answer[i].iter().map(|(address, _)| address).collect();
    [of(0), of(1)]
}

/// Applies `ops` one by one and checks the law after each; stops early where `crash_after` says.
fn apply(
    maps: &mut FakeMaps,
    before: &Tables,
    after: &Tables,
    ops: &[MapOp],
    crash_after: usize,
) -> Result<(), TestCaseError> {
    let (old, new) = (answers(before), answers(after));
    for op in ops.iter().take(crash_after) {
        let Ok(()) = maps.apply(op);
        let dangling = maps.tables.dangling();
        prop_assert!(dangling.is_empty(), "{dangling:?} after {op:?}");
        for (key, answer) in answers(&maps.tables) {
            let (old, new) = (old.get(&key), new.get(&key));
            let is = |other: Option<&Answer>| {
                other.is_some_and(|other| addresses(other) == addresses(&answer))
            };
            prop_assert!(is(old) || is(new), "{key:?} answers {answer:?} after {op:?}");
            let routes = |other: Option<&Answer>| -> BTreeSet<(String, String)> {
                other.into_iter().flatten().flatten().cloned().collect()
            };
            // Another frontend may have moved a shared backend to its new route already.
            let known: BTreeSet<_> = routes(old).union(&routes(new)).cloned().collect();
            for (address, route) in answer.iter().flatten() {
                let elsewhere = |all: &BTreeMap<FrontendKey, Answer>| {
                    all.values()
                        .flatten()
                        .flatten()
                        .any(|pair| (&pair.0, &pair.1) == (address, route))
                };
                prop_assert!(
                    known.contains(&(address.clone(), route.clone())) || elsewhere(&answers(after)),
                    "{address} by {route} after {op:?}"
                );
            }
        }
    }
    Ok(())
}

/// Ids of every kind that tables use, with what they stand for.
fn ids(tables: &Tables) -> BTreeMap<(&'static str, u32), String> {
    let mut ids = BTreeMap::new();
    for (id, backend) in &tables.backends {
        ids.insert(("backend", *id), format!("{}:{}", backend.addr, backend.port));
    }
    for (index, vtep) in &tables.vteps {
        ids.insert(("vtep", *index), vtep.remote.to_string());
    }
    ids
}

/// Frontends that both want, of Services whose frontends, backends and routes are all the same.
fn unchanged<'a>(before: &Desired, after: &'a Desired) -> Vec<(Tuple, &'a DesiredFrontend)> {
    let of = |desired: &Desired, name: &ServicePortName| {
        let frontends: Vec<_> = desired
            .frontends
            .iter()
            .filter(|(_, frontend)| frontend.service == *name)
            .map(|(tuple, frontend)| (*tuple, frontend.clone()))
            .collect();
        let sets: Vec<_> = desired
            .sets
            .iter()
            .filter(|(key, _)| key.service == *name)
            .map(|(key, backends)| (key.clone(), backends.clone()))
            .collect();
        let routes: Vec<_> = sets
            .iter()
            .flat_map(|(_, backends)| backends)
            .map(|tuple| desired.backends[tuple].route)
            .collect();
        (frontends, sets, routes)
    };
    after
        .frontends
        .iter()
        .filter(|(_, frontend)| of(before, &frontend.service) == of(after, &frontend.service))
        .map(|(tuple, frontend)| (*tuple, frontend))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_moment_of_every_history_is_correct(
        worlds in proptest::collection::vec((world(), proptest::option::of(0..40usize)), 1..6),
    ) {
        let mut maps = FakeMaps::default();
        let mut names = Names::default();
        let mut allocator = Allocator::new(Limits::default());
        for (generation, (world, crash_after)) in (0u64..).zip(worlds) {
            let compiled = compile(&world.snapshot(), &world.node());
            let Ok(actual) = maps.load();
            let allocation =
                allocator.allocate(&compiled.desired, &actual, &names, generation);
            prop_assert!(allocation.skipped.is_empty(), "{:?}", allocation.skipped);
            let ops = delta(&actual, &allocation.tables).ops;
            apply(&mut maps, &actual, &allocation.tables, &ops, crash_after.unwrap_or(usize::MAX))?;
            if crash_after.is_some_and(|n| n < ops.len()) {
                // A new process finds the maps half way, and old names.
                allocator = Allocator::new(Limits::default());
                let Ok(actual) = maps.load();
                let again = allocator.allocate(&compiled.desired, &actual, &names, generation);
                let ops = delta(&actual, &again.tables).ops;
                apply(&mut maps, &actual, &again.tables, &ops, usize::MAX)?;
                prop_assert_eq!(answers(&again.tables), answers(&allocation.tables));
                names = again.names;
            } else {
                names = allocation.names;
            }
            // The maps hold what was wanted, and nothing else; once more changes nothing.
            let Ok(loaded) = maps.load();
            let once_more = allocator.allocate(&compiled.desired, &loaded, &names, generation);
            prop_assert_eq!(&once_more.tables, &loaded);
            prop_assert_eq!(delta(&loaded, &once_more.tables).ops, vec![]);
        }
    }

    #[test]
    fn freed_ids_rest_before_they_are_given_away(
        worlds in proptest::collection::vec(world(), 2..8),
    ) {
        let limits = Limits { quarantine: 3, ..Limits::default() };
        let mut allocator = Allocator::new(limits);
        let (mut tables, mut names) = (Tables::default(), Names::default());
        // What each id stood for when it was last in use, and when that was.
        let mut last: BTreeMap<(&str, u32), (String, u64)> = BTreeMap::new();
        for (generation, world) in (0u64..).zip(worlds) {
            let compiled = compile(&world.snapshot(), &world.node());
            let allocation = allocator.allocate(&compiled.desired, &tables, &names, generation);
            for (id, meaning) in ids(&allocation.tables) {
                if let Some((old_meaning, seen)) = last.get(&id)
                    && *old_meaning != meaning
                {
                    // In use until `seen`, freed one generation later.
                    prop_assert!(generation >= seen + 1 + limits.quarantine, "{id:?}");
                }
                last.insert(id, (meaning, generation));
            }
            (tables, names) = (allocation.tables, allocation.names);
        }
    }

    #[test]
    fn full_tables_keep_what_was_there_and_never_dangle(
        worlds in proptest::collection::vec(world(), 1..6),
        frontends in 1..12u32,
        services in 2..6u32,
        backends in 2..12u32,
        maglev_entries in 1..1500u32,
        vteps in 1..4u32,
        next_hops in 2..6u32,
    ) {
        let limits = Limits {
            frontends, services, backends, maglev_entries, vteps, next_hops,
            quarantine: 0,
            ..Limits::default()
        };
        let mut maps = FakeMaps::default();
        let mut allocator = Allocator::new(limits);
        let mut names = Names::default();
        let mut before = Desired::default();
        for (generation, world) in (0u64..).zip(worlds) {
            let compiled = compile(&world.snapshot(), &world.node());
            let Ok(actual) = maps.load();
            let allocation = allocator.allocate(&compiled.desired, &actual, &names, generation);
            let tables = &allocation.tables;
            for op in delta(&actual, tables).ops {
                let Ok(()) = maps.apply(&op);
                prop_assert_eq!(maps.tables.dangling(), Vec::<String>::new(), "after {:?}", op);
                // Every map holds what fits at every moment, not only in the end.
                prop_assert!(maps.tables.frontends.len() <= frontends as usize);
            }
            prop_assert!(tables.backends.keys().all(|id| (1..backends).contains(id)));
            prop_assert!(tables.vteps.keys().all(|id| (1..vteps).contains(id)));
            prop_assert!(tables.next_hops.keys().all(|id| (1..next_hops).contains(id)));
            let (vips, served): (Vec<_>, Vec<_>) =
                tables.frontends.iter().partition(|(key, _)| key.is_address());
            prop_assert!(served.iter().all(|(_, f)| (1..services).contains(&f.service)));
            let fits = |(offset, entries): (&u32, &Arc<[u32]>)| {
                *offset >= 1 && offset + entries.len() as u32 <= maglev_entries
            };
            prop_assert!(tables.extents.iter().all(fits));
            let complete = served.len() == compiled.desired.frontends.len()
                && vips.len() == compiled.desired.vips.len();
            prop_assert!(complete || !allocation.skipped.is_empty());
            prop_assert!(allocation.skipped.iter().all(|s| s.remedy.contains("limits.")));
            // What is wanted unchanged answers at least as before.
            let (old, new) = (answers(&actual), answers(tables));
            for (tuple, frontend) in unchanged(&before, &compiled.desired) {
                let key = FrontendKey {
                    addr: tuple.addr.into(),
                    port: sluice_abi::Be16::new(tuple.port),
                    proto: tuple.protocol.number(),
                    reserved: 0,
                };
                if let Some(old) = old.get(&key) {
                    let new = new.get(&key);
                    let kept = new.is_some_and(|new| {
                        (0..2).all(|i| addresses(old)[i].is_subset(&addresses(new)[i]))
                    });
                    prop_assert!(kept, "{frontend:?} was {old:?} and is {new:?}");
                }
            }
            names = allocation.names;
            before = compiled.desired;
        }
    }
}

#[test]
fn one_changed_endpoint_costs_few_operations() {
    let small = |name: u8, endpoints: Vec<(u8, bool, bool)>| SmallService {
        name,
        vip: name,
        external_ip: None,
        node_port: None,
        internal_local: false,
        external_local: false,
        endpoints,
    };
    let mut world = World {
        services: (0..200).map(|name| small(name, vec![(name % 8, true, false)])).collect(),
        peers: [true; 4],
        next_hops: [None; 3],
        pods: [true; 3],
        mac: 0,
    };
    let mut allocator = Allocator::new(Limits::default());
    let compiled = compile(&world.snapshot(), &world.node());
    let before = allocator.allocate(&compiled.desired, &Tables::default(), &Names::default(), 0);
    world.services[17].endpoints = vec![(8, true, false), (9, true, false)];
    let compiled = compile(&world.snapshot(), &world.node());
    let after = allocator.allocate(&compiled.desired, &before.tables, &before.names, 1);
    let delta = delta(&before.tables, &after.tables);
    // Two backends with their counters, one extent, one frontend.
    assert_eq!(delta.ops.len(), 6, "{:?}", delta.ops);
    assert!(!delta.new_epoch);
}

#[test]
fn epoch_is_bumped_when_a_route_ends_and_not_when_a_neighbour_moves() {
    let world =
        World { services: vec![], peers: [true; 4], next_hops: [None; 3], pods: [true; 3], mac: 0 };
    let allocate = |node: &NodeContext, before: &(Tables, Names)| {
        let compiled = compile(&world.snapshot(), node);
        let out = Allocator::default().allocate(&compiled.desired, &before.0, &before.1, 0);
        (out.tables, out.names)
    };
    let mut node = world.node();
    let first = allocate(&node, &(Tables::default(), Names::default()));
    assert!(!delta(&Tables::default(), &first.0).new_epoch);

    node.next_hops.insert(
        [192, 0, 2, 10].into(),
        NextHopFacts::Resolved {
            ifindex: 2,
            mtu: 1500,
            dst_mac: sluice_abi::Mac([2, 0, 0, 0, 0, 9]),
            src_mac: sluice_abi::Mac([2, 0, 0, 0, 0, 8]),
        },
    );
    let moved = allocate(&node, &first);
    let change = delta(&first.0, &moved.0);
    assert_eq!(change.ops.len(), 1);
    assert!(!change.new_epoch);

    node.peers.remove(0);
    let gone = allocate(&node, &moved);
    assert!(delta(&moved.0, &gone.0).new_epoch);
}

#[test]
fn tables_shrink_together_when_the_map_is_small() {
    let services = (0..50).map(|name| SmallService {
        name,
        vip: name,
        external_ip: None,
        node_port: None,
        internal_local: false,
        external_local: false,
        endpoints: (0..8).map(|n| (n, true, false)).collect(),
    });
    let world = World {
        services: services.collect(),
        peers: [false; 4],
        next_hops: [None; 3],
        pods: [false; 3],
        mac: 0,
    };
    let compiled = compile(&world.snapshot(), &world.node());
    let sizes = |maglev_entries: u32| -> BTreeSet<usize> {
        let limits = Limits { maglev_entries, ..Limits::default() };
        let (tables, names) = (Tables::default(), Names::default());
        let out = Allocator::new(limits).allocate(&compiled.desired, &tables, &names, 0);
        assert_eq!(service_frontends(&out.tables), 50);
        out.tables.extents.values().map(|e| e.len()).collect()
    };
    assert_eq!(sizes(60_000), BTreeSet::from([809]));
    assert_eq!(sizes(20_000), BTreeSet::from([241]));
    assert_eq!(sizes(2_000), BTreeSet::from([29]));
}

/// Frontends that are no bare address.
fn service_frontends(tables: &Tables) -> usize {
    tables.frontends.keys().filter(|key| !key.is_address()).count()
}

/// Services that share one external IP, none of them with endpoints.
fn sharing(names: std::ops::Range<u8>) -> Desired {
    let services = names.map(|name| SmallService {
        name,
        vip: name,
        external_ip: Some(1),
        node_port: Some(name),
        internal_local: false,
        external_local: false,
        endpoints: Vec::new(),
    });
    let world = World {
        services: services.collect(),
        peers: [false; 4],
        next_hops: [None; 3],
        pods: [false; 3],
        mac: 0,
    };
    let mut snapshot = world.snapshot();
    for (number, service) in (80..).zip(snapshot.services.values_mut()) {
        Arc::make_mut(service).ports[0].port = port(number);
    }
    compile(&snapshot, &world.node()).desired
}

fn vips(tables: &Tables) -> Vec<String> {
    let vips = tables.frontends.keys().filter(|key| key.is_address());
    vips.map(|key| key.addr.to_string()).collect()
}

/// The address as such is there once, comes last, and goes first and with its last Service.
#[test]
fn shared_address_is_entered_once_and_goes_with_its_last_service() {
    let mut allocator = Allocator::new(Limits::default());
    let (mut tables, mut names) = (Tables::default(), Names::default());
    let mut counts = Vec::new();
    for (generation, present) in (0u64..).zip([0..2u8, 0..1, 0..2, 0..0]) {
        let desired = sharing(present.clone());
        let next = allocator.allocate(&desired, &tables, &names, generation);
        let ops = delta(&tables, &next.tables).ops;
        for kind in [false, true] {
            let of_address =
                |op: &&MapOp| matches!(op, MapOp::Frontend { key, .. } if key.is_address());
            let (of, deletes): (Vec<bool>, Vec<bool>) = ops
                .iter()
                .filter(|op| matches!(op, MapOp::Frontend { .. }))
                .map(|op| (of_address(&op), op.is_delete()))
                .filter(|(_, delete)| *delete == kind)
                .unzip();
            let turns = of.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(turns <= 1, "{ops:?}");
            if turns == 1 {
                assert_eq!(of[0], deletes[0], "{ops:?}");
            }
        }
        (tables, names) = (next.tables, next.names);
        let shared = vips(&tables).iter().filter(|addr| addr.starts_with("203.0.")).count();
        counts.push((shared, vips(&tables).len()));
        assert_eq!(tables.dangling(), Vec::<String>::new());
    }
    assert_eq!(counts, [(1, 3), (1, 2), (1, 3), (0, 0)]);
}

/// Where the table is full, the addresses make room for Services; where a Service of an address is
/// left out, the address is not said to be known.
#[test]
fn bare_addresses_never_keep_a_service_out() {
    let all = sharing(0..3);
    let services = all.frontends.len() as u32;
    let mut allocator = Allocator::new(Limits { frontends: services, ..Limits::default() });
    let few = sharing(0..2);
    let first = allocator.allocate(&few, &Tables::default(), &Names::default(), 0);
    assert!(!vips(&first.tables).is_empty());
    // Old and new have no room at once: the addresses go first.
    let second = allocator.allocate(&all, &first.tables, &first.names, 1);
    assert_eq!(vips(&second.tables), Vec::<String>::new());
    assert!(!second.skipped.is_empty());
    let third = allocator.allocate(&all, &second.tables, &second.names, 2);
    assert_eq!(service_frontends(&third.tables), services as usize);
    let texts: Vec<String> = third.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [format!(
            "4 Service addresses: the table is full ({services} entries) (raise limits.frontends in \
         the configuration)"
        )]
    );
    // A Service without a place: its address is not said to be known.
    let limits = Limits { services: 3, ..Limits::default() };
    let out = Allocator::new(limits).allocate(&all, &Tables::default(), &Names::default(), 0);
    assert_eq!(vips(&out.tables).len(), 2);
    assert!(!vips(&out.tables).iter().any(|addr| addr.starts_with("203.0.")));
}
