//! Gives ids: service ids, backend ids, VTEP and next hop indices, consistent-hash extents.
//!
//! What the maps hold already keeps its id, so a restart changes nothing. A freed id rests: neither
//! the same delta nor the next generations hand it out, because packets and flow records in flight
//! may still carry it. Where a table is full, what was there stays and what is new is left out.

mod sets;
mod space;

use serde::{Deserialize, Serialize};
use sluice_abi::{
    Backend, Be16, Be32, FrontendKey, MAX_TUNNELS, NextHop, Pod, PodNet, Route, Vtep, VtepKey, maps,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::compile::{DesiredRoute, DesiredVtep, TunnelName, VtepName};
use crate::model::{NextHopFacts, OuterDscp, PodFacts, Protocol, Tuple};
use crate::names::VtepLabel;
use crate::{Desired, Names, Skipped, Tables};
use space::{Ids, Resting};

/// Sizes of the maps, and how long a freed id rests. Names of the fields are those of the
/// configuration's table `limits`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// `max_entries` of `sl_frontend_v1`.
    pub frontends: u32,
    /// `max_entries` of `sl_svcstat_v1`; id 0 is not used.
    pub services: u32,
    /// `max_entries` of `sl_backend_v1`; id 0 is not used.
    pub backends: u32,
    /// `max_entries` of `sl_maglev_v1`; entry 0 is not used.
    pub maglev_entries: u32,
    /// `max_entries` of `sl_pod_v1`.
    pub pods: u32,
    /// `max_entries` of `sl_vtep_v1`; index 0 is not used.
    pub vteps: u32,
    /// `max_entries` of `sl_vtepsrc_v1`.
    pub vtep_sources: u32,
    /// `max_entries` of `sl_nexthop_v1`; index 0 is not used.
    pub next_hops: u32,
    /// Generations (as counted by the caller) that a freed id rests: packets and flow records in
    /// flight may still use it.
    pub quarantine: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frontends: maps::DEFAULT_FRONTENDS,
            services: maps::DEFAULT_SERVICES,
            backends: maps::DEFAULT_BACKENDS,
            maglev_entries: maps::DEFAULT_MAGLEV,
            pods: maps::DEFAULT_PODS,
            vteps: maps::DEFAULT_VTEPS,
            vtep_sources: maps::DEFAULT_VTEP_SOURCES,
            next_hops: maps::DEFAULT_NEXTHOPS,
            quarantine: 2,
        }
    }
}

/// Tables with ids, and what did not fit.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Allocation {
    /// The tables.
    pub tables: Tables,
    /// What the ids stand for.
    pub names: Names,
    /// What did not fit, naming the key of the configuration that would make room.
    pub skipped: Vec<Skipped>,
}

/// Gives ids and remembers which ones rest.
#[derive(Clone, Default, Debug)]
pub struct Allocator {
    limits: Limits,
    services: Resting<u32>,
    backends: Resting<u32>,
    extents: Resting<(u32, u32)>,
    tunnels: Resting<u32>,
    vteps: Resting<u32>,
    next_hops: Resting<u32>,
    tables: sets::TableCache,
}

impl Allocator {
    /// An allocator for maps of these sizes.
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Tables for `desired` that keep every id which `actual` (the maps as they are, with the
    /// names that were written beside them, or empty ones) already has. `generation` grows between
    /// calls as the caller likes, for example once per second; what this call frees rests for
    /// [`Limits::quarantine`] of them.
    pub fn allocate(
        &mut self,
        desired: &Desired,
        actual: &Tables,
        actual_names: &Names,
        generation: u64,
    ) -> Allocation {
        self.services.wake(generation);
        self.backends.wake(generation);
        self.extents.wake(generation);
        self.tunnels.wake(generation);
        self.vteps.wake(generation);
        self.next_hops.wake(generation);

        let mut out = Allocation::default();
        let next_hops = self.allocate_next_hops(desired, actual, actual_names, &mut out);
        let tunnels = self.allocate_tunnels(desired, actual, &mut out);
        let vteps = self.allocate_vteps(desired, actual, &next_hops, &tunnels, &mut out);
        self.fill_vtep_sources(desired, actual, &vteps, &mut out);
        self.fill_pods(desired, actual, &mut out);
        let routes = Routes { vteps: &vteps, next_hops: &next_hops };
        sets::allocate(self, desired, actual, actual_names, &routes, &mut out);
        self.rest(actual, &out.tables, generation);
        out.skipped.sort();
        out
    }

    /// What `actual` has and `tables` has not rests from now on.
    fn rest(&mut self, actual: &Tables, tables: &Tables, generation: u64) {
        fn freed<V, W>(
            before: &BTreeMap<u32, V>,
            after: &BTreeMap<u32, W>,
        ) -> impl Iterator<Item = u32> {
            before.keys().filter(|id| !after.contains_key(id)).copied()
        }
        let until = generation.saturating_add(self.limits.quarantine);
        let kept = service_ids(tables);
        self.services.add(service_ids(actual).into_iter().filter(|id| !kept.contains(id)), until);
        let kept = tables.referenced_extents();
        self.extents.add(
            actual.referenced_extents().into_iter().filter(|extent| !kept.contains(extent)),
            until,
        );
        self.backends.add(freed(&actual.backends, &tables.backends), until);
        self.tunnels.add(freed(&actual.tunnels, &tables.tunnels), until);
        self.vteps.add(freed(&actual.vteps, &tables.vteps), until);
        self.next_hops.add(freed(&actual.next_hops, &tables.next_hops), until);
    }

    fn allocate_next_hops(
        &self,
        desired: &Desired,
        actual: &Tables,
        actual_names: &Names,
        out: &mut Allocation,
    ) -> BTreeMap<IpAddr, u32> {
        // The maps do not hold the destination, but those who use a next hop do.
        let mut destinations: BTreeMap<u32, IpAddr> = actual_names.next_hops.clone();
        for vtep in actual.vteps.values() {
            destinations.insert(vtep.nexthop, vtep.remote.to_ip());
        }
        for backend in actual.backends.values() {
            if backend.route == Route::Plain as u16 {
                destinations.insert(backend.index, backend.addr.to_ip());
            }
        }
        let mut known = BTreeMap::new();
        for (index, destination) in destinations {
            if index != 0 && actual.next_hops.contains_key(&index) {
                known.entry(destination).or_insert(index);
            }
        }
        let taken = actual.next_hops.keys().copied().chain(self.next_hops.iter());
        let mut ids = Ids::new(taken, self.limits.next_hops);
        let given = give(desired.next_hops.keys(), &known, &mut ids);
        for (destination, facts) in &desired.next_hops {
            match given.get(destination) {
                Some(index) => {
                    out.tables.next_hops.insert(*index, next_hop(facts));
                    out.names.next_hops.insert(*index, *destination);
                }
                None => out.skipped.push(full(
                    format!("next hop {destination}"),
                    "next_hops",
                    self.limits.next_hops,
                )),
            }
        }
        given
    }

    fn allocate_tunnels(
        &self,
        desired: &Desired,
        actual: &Tables,
        out: &mut Allocation,
    ) -> BTreeMap<TunnelName, u32> {
        let mut known = BTreeMap::new();
        for (index, tunnel) in actual.tunnels.iter().filter(|(index, _)| **index != 0) {
            let name = TunnelName { vni: tunnel.vni.host() >> 8, ifindex: tunnel.ifindex };
            known.entry(name).or_insert(*index);
        }
        let in_use = actual.tunnels.keys().copied();
        let mut ids = Ids::new(in_use.clone().chain(self.tunnels.iter()), MAX_TUNNELS);
        let mut given = give(desired.tunnels.keys(), &known, &mut ids);
        if given.len() < desired.tunnels.len() {
            // There are so few places that rest must not keep a new device waiting: all flows that
            // used the old one are decided anew, because its end bumps the epoch.
            let mut ids = Ids::new(in_use.chain(given.values().copied()), MAX_TUNNELS);
            given = give(desired.tunnels.keys(), &given, &mut ids);
        }
        for (name, tunnel) in &desired.tunnels {
            match given.get(name) {
                Some(index) => {
                    out.tables.tunnels.insert(*index, *tunnel);
                }
                None => out.skipped.push(
                    Skipped::error(
                        format!("tunnel with VNI {}", name.vni),
                        format!("there is no room for more than {} tunnels", MAX_TUNNELS - 1),
                    )
                    .remedy("wait until the tunnels that went are out of use"),
                ),
            }
        }
        given
    }

    fn allocate_vteps(
        &self,
        desired: &Desired,
        actual: &Tables,
        next_hops: &BTreeMap<IpAddr, u32>,
        tunnels: &BTreeMap<TunnelName, u32>,
        out: &mut Allocation,
    ) -> BTreeMap<VtepName, u32> {
        let mut known = BTreeMap::new();
        for (index, vtep) in actual.vteps.iter().filter(|(index, _)| **index != 0) {
            let name = VtepName { vni: vtep.vni.host() >> 8, remote: vtep.remote.to_ip() };
            known.entry(name).or_insert(*index);
        }
        let usable: BTreeMap<VtepName, (&DesiredVtep, u32, u32)> = desired
            .vteps
            .iter()
            .filter_map(|(name, vtep)| {
                let next_hop = *next_hops.get(&name.remote)?;
                Some((*name, (vtep, next_hop, *tunnels.get(&vtep.tunnel)?)))
            })
            .collect();
        let taken = actual.vteps.keys().copied().chain(self.vteps.iter());
        let mut ids = Ids::new(taken, self.limits.vteps);
        let given = give(usable.keys(), &known, &mut ids);
        for (name, (vtep, next_hop, tunnel)) in usable {
            let Some(index) = given.get(&name) else {
                out.skipped.push(full(format!("VTEP {}", name.remote), "vteps", self.limits.vteps));
                continue;
            };
            out.tables.vteps.insert(*index, vtep_value(&name, vtep, next_hop, tunnel));
            out.names.vteps.insert(
                *index,
                VtepLabel {
                    vni: name.vni,
                    remote: name.remote,
                    node: vtep.node.as_deref().map(str::to_owned),
                },
            );
        }
        given
    }

    fn fill_vtep_sources(
        &self,
        desired: &Desired,
        actual: &Tables,
        vteps: &BTreeMap<VtepName, u32>,
        out: &mut Allocation,
    ) {
        let mut wanted: Vec<(VtepKey, u32)> = desired
            .vtep_sources
            .iter()
            .filter_map(|(source, vtep)| {
                let key = VtepKey { source: source.source.into(), vni: Be32::new(source.vni << 8) };
                Some((key, *vteps.get(vtep)?))
            })
            .collect();
        wanted.extend(by_mac(&out.tables.vteps));
        // A hash needs room for old and new at once: what is there stays.
        wanted.sort_by_key(|(key, _)| (!actual.vtep_sources.contains_key(key), *key));
        let room = self.limits.vtep_sources as usize;
        for (key, _) in wanted.iter().skip(room) {
            out.skipped.push(full(
                format!("VTEP source {}", key.source),
                "vtep_sources",
                self.limits.vtep_sources,
            ));
        }
        out.tables.vtep_sources = wanted.into_iter().take(room).collect();
    }

    fn fill_pods(&self, desired: &Desired, actual: &Tables, out: &mut Allocation) {
        let mut wanted: Vec<(sluice_abi::Addr, &PodFacts)> =
            desired.pods.iter().map(|(addr, facts)| ((*addr).into(), facts)).collect();
        wanted.sort_by_key(|(addr, _)| (!actual.pods.contains_key(addr), *addr));
        let room = self.limits.pods as usize;
        for (addr, _) in wanted.iter().skip(room) {
            out.skipped.push(full(format!("pod {addr}"), "pods", self.limits.pods));
        }
        out.tables.pods =
            wanted.into_iter().take(room).map(|(addr, facts)| (addr, pod(facts))).collect();
    }
}

/// Indices that routes need.
struct Routes<'a> {
    vteps: &'a BTreeMap<VtepName, u32>,
    next_hops: &'a BTreeMap<IpAddr, u32>,
}

impl Routes<'_> {
    /// The table entry of a backend, unless its VTEP or next hop found no room.
    fn backend(&self, tuple: &Tuple, route: DesiredRoute) -> Option<Backend> {
        let (route, index) = match route {
            DesiredRoute::Local => (Route::Local, 0),
            DesiredRoute::Tunnel(vtep) => (Route::Tunnel, *self.vteps.get(&vtep)?),
            DesiredRoute::Plain => (Route::Plain, *self.next_hops.get(&tuple.addr)?),
        };
        Some(Backend {
            addr: tuple.addr.into(),
            port: Be16::new(tuple.port),
            route: route as u16,
            index,
            proto: tuple.protocol.number(),
            ..Backend::default()
        })
    }
}

/// Ids for `wanted`: known ones stay, the others get free ones in their order while there are any.
fn give<'k, K: Ord + Copy + 'k>(
    wanted: impl Iterator<Item = &'k K>,
    known: &BTreeMap<K, u32>,
    ids: &mut Ids,
) -> BTreeMap<K, u32> {
    wanted
        .filter_map(|key| {
            let id = known.get(key).copied().or_else(|| ids.take())?;
            Some((*key, id))
        })
        .collect()
}

fn full(what: String, key: &str, limit: u32) -> Skipped {
    Skipped::error(what, format!("the table is full ({limit} entries)"))
        .remedy(format!("raise limits.{key} in the configuration"))
}

fn service_ids(tables: &Tables) -> BTreeSet<u32> {
    tables.frontends.values().map(|f| f.service).filter(|id| *id != 0).collect()
}

fn next_hop(facts: &NextHopFacts) -> NextHop {
    match *facts {
        NextHopFacts::Resolved { ifindex, mtu, dst_mac, src_mac } => {
            NextHop { ifindex, mtu, dst_mac, src_mac, reserved: 0 }
        }
        NextHopFacts::Unresolved {} => NextHop::default(),
    }
}

fn pod(facts: &PodFacts) -> Pod {
    Pod {
        ifindex: facts.ifindex,
        delivery: facts.delivery() as u16,
        pod_mac: facts.pod_mac,
        host_mac: facts.host_mac,
        mtu: facts.mtu,
        ..Pod::default()
    }
}

/// Keys by the MACs of the peers' devices. A MAC that two have says nothing.
fn by_mac(vteps: &BTreeMap<u32, Vtep>) -> Vec<(VtepKey, u32)> {
    let mut owners: BTreeMap<VtepKey, Vec<u32>> = BTreeMap::new();
    for (index, vtep) in vteps {
        owners.entry(VtepKey::of_mac(vtep.remote_mac, vtep.vni)).or_default().push(*index);
    }
    let one = |(key, owners): (VtepKey, Vec<u32>)| match owners.as_slice() {
        [index] => Some((key, *index)),
        _ => None,
    };
    owners.into_iter().filter_map(one).collect()
}

fn vtep_value(name: &VtepName, vtep: &DesiredVtep, nexthop: u32, tunnel: u32) -> Vtep {
    let (local, remote) = (vtep.local.into(), name.remote.into());
    let mut pod_nets = [PodNet::NONE; 4];
    for (place, net) in pod_nets.iter_mut().zip(&vtep.pod_cidrs) {
        let mut mask = match net {
            ipnet::IpNet::V4(v4) => sluice_abi::Addr::from_v4(v4.netmask().octets()),
            ipnet::IpNet::V6(v6) => sluice_abi::Addr(v6.netmask().octets()),
        };
        if net.addr().is_ipv4() {
            mask.0[..12].fill(0xff);
        }
        *place = PodNet { net: net.network().into(), mask };
    }
    let (dscp, class_kept) = match vtep.outer_dscp {
        OuterDscp::Value(dscp) => (dscp, 0),
        OuterDscp::Inherit => (0, !Vtep::ECN),
    };
    Vtep {
        remote,
        local,
        vni: Be32::new(name.vni << 8),
        port: Be16::new(vtep.port),
        ip_sum: if name.remote.is_ipv4() { Vtep::outer_ip_sum(local, remote) } else { 0 },
        remote_mac: vtep.remote_mac,
        local_mac: vtep.local_mac,
        nexthop,
        tunnel,
        class: dscp << 2,
        class_kept,
        pod_nets,
        ..Vtep::default()
    }
}

/// The table key of an address.
pub(crate) fn frontend_key(tuple: &Tuple) -> FrontendKey {
    FrontendKey {
        addr: tuple.addr.into(),
        port: Be16::new(tuple.port),
        proto: tuple.protocol.number(),
        reserved: 0,
    }
}

/// The tuple of a backend in a table.
pub(crate) fn backend_tuple(backend: &Backend) -> Option<Tuple> {
    Some(Tuple {
        addr: backend.addr.to_ip(),
        port: backend.port.host(),
        protocol: Protocol::from_number(backend.proto)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_abi::{Addr, IPPROTO_UDP, Mac};

    fn vtep(outer_dscp: OuterDscp, pod_cidrs: &[&str]) -> Vtep {
        let name = VtepName { vni: 7, remote: [192, 0, 2, 2].into() };
        let desired = DesiredVtep {
            local: [192, 0, 2, 1].into(),
            port: 8472,
            remote_mac: Mac([2, 0, 0, 0, 0, 2]),
            local_mac: Mac([2, 0, 0, 0, 0, 1]),
            tunnel: TunnelName { vni: 7, ifindex: 4 },
            outer_dscp,
            pod_cidrs: pod_cidrs.iter().filter_map(|net| net.parse().ok()).collect(),
            node: None,
        };
        vtep_value(&name, &desired, 3, 1)
    }

    /// The header as the datapath writes it: the table's sum, the first word, the total length.
    #[test]
    fn vtep_sum_completes_to_a_right_outer_header_checksum() {
        let vtep = vtep(OuterDscp::default(), &[]);
        let (ecn, total_len) = (2u8, 1450u16);
        let fold = |mut sum: u32| {
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            sum as u16
        };
        let first = u16::from_ne_bytes([0x45, ecn]);
        let length = u16::from_ne_bytes(total_len.to_be_bytes());
        let checksum = !fold(u32::from(vtep.ip_sum) + u32::from(first) + u32::from(length));
        let mut header = [0u8; 20];
        header[0] = 0x45;
        header[1] = ecn;
        header[2..4].copy_from_slice(&total_len.to_be_bytes());
        header[6] = 0x40;
        header[8] = 64;
        header[9] = IPPROTO_UDP;
        header[10..12].copy_from_slice(&checksum.to_ne_bytes());
        header[12..16].copy_from_slice(&[192, 0, 2, 1]);
        header[16..20].copy_from_slice(&[192, 0, 2, 2]);
        let words = header.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
        assert_eq!(fold(words.sum()), 0xffff);
    }

    #[test]
    fn outer_class_has_the_dscp_that_is_wanted_and_always_the_inner_ecn() {
        let of = |outer_dscp, inner| {
            let vtep = vtep(outer_dscp, &[]);
            Vtep::outer_class(vtep.class, vtep.class_kept, inner)
        };
        assert_eq!(of(OuterDscp::default(), 46 << 2 | 2), 2);
        assert_eq!(of(OuterDscp::Value(63), 46 << 2 | 1), 63 << 2 | 1);
        assert_eq!(of(OuterDscp::Inherit, 46 << 2 | 3), 46 << 2 | 3);
    }

    #[test]
    fn vtep_holds_vni_as_on_the_wire_and_masks_of_both_families() {
        let vtep = vtep(OuterDscp::default(), &["10.244.2.0/23", "fd00:244:2::/64"]);
        assert_eq!(vtep.vni.raw().to_ne_bytes(), [0, 0, 7, 0]);
        let inside = |text: &str| {
            let addr: IpAddr = text.parse().expect("literal");
            vtep.pod_nets.iter().any(|net| net.contains(addr.into()))
        };
        assert!(inside("10.244.3.255") && inside("fd00:244:2::9"));
        assert!(!inside("10.244.4.0") && !inside("fd00:244:3::9"));
        assert!(!vtep.pod_nets.iter().any(|net| net.contains(Addr([0xff; 16]))));
    }
}
