//! Own tunnels, tunnel ends of other nodes, who may send into them, and which backend lies behind
//! which.
//!
//! The kernel's facts come first, those of Node objects fill in what the kernel does not say.

use ipnet::IpNet;
use sluice_abi::{Addr, Be16, Be32, Mac, Tunnel};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Desired, DesiredVtep, TunnelName, VtepName, VtepSource};
use crate::Skipped;
use crate::model::{Node, NodeContext, Snapshot, TunnelFacts};

/// Places for pod CIDRs in a `sluice_abi::Vtep`.
const MAX_POD_CIDRS: usize = 4;

/// Pod CIDRs by prefix length, longest first: finds the VTEP of an address in one look-up per length.
#[derive(Default)]
pub(super) struct CidrTable {
    by_length: BTreeMap<std::cmp::Reverse<u8>, BTreeMap<IpAddr, VtepName>>,
}

impl CidrTable {
    pub(super) fn find(&self, addr: IpAddr) -> Option<VtepName> {
        self.by_length.iter().find_map(|(length, nets)| {
            let net = IpNet::new(addr, length.0).ok()?.network();
            nets.get(&net).copied()
        })
    }

    /// Enters `net` unless another VTEP has it; returns that one.
    fn insert(&mut self, net: IpNet, vtep: VtepName) -> Option<VtepName> {
        let nets = self.by_length.entry(std::cmp::Reverse(net.prefix_len())).or_default();
        let owner = *nets.entry(net.network()).or_insert(vtep);
        (owner != vtep).then_some(owner)
    }
}

/// A tunnel end of another node before it is checked.
struct Peer<'a> {
    remote: IpAddr,
    mac: Mac,
    pod_cidrs: Vec<IpNet>,
    node: Option<&'a Arc<Node>>,
}

impl Peer<'_> {
    /// Where its Node comes from; empty for facts of the kernel.
    fn origin(&self) -> &str {
        self.node.map_or("", |node| &node.origin)
    }
}

/// Fills tunnels, VTEPs and VTEP sources of `desired`.
pub(super) fn compile(
    snapshot: &Snapshot,
    node: &NodeContext,
    desired: &mut Desired,
    skipped: &mut Vec<Skipped>,
) -> CidrTable {
    let mut cidrs = CidrTable::default();
    let mut extra_sources = Vec::new();
    let mut tunnels: Vec<&TunnelFacts> = node.tunnels.iter().collect();
    tunnels.sort_by_key(|t| (t.vni, t.ifindex, t.underlay));
    for facts in tunnels {
        let name = TunnelName { vni: facts.vni, ifindex: facts.ifindex };
        if let Some(problem) = tunnel_problem(facts, &name, desired) {
            skipped.push(problem);
            continue;
        }
        desired.tunnels.insert(name, tunnel(facts));
        for peer in peers(snapshot, node, facts) {
            let vtep = VtepName { vni: facts.vni, remote: peer.remote };
            if desired.vteps.contains_key(&vtep) || node.addresses.contains(&peer.remote) {
                continue;
            }
            let title = match peer.node {
                Some(node) => format!("VTEP {} (Node {})", peer.remote, node.name),
                None => format!("VTEP {}", peer.remote),
            };
            if peer.mac.is_zero() || peer.mac.is_group() {
                skipped.push(
                    Skipped::error(&title, format!("{} is not a device's MAC", peer.mac))
                        .within(peer.origin())
                        .remedy("its packets are left to the kernel; check the FDB"),
                );
                continue;
            }
            let pod_cidrs = pod_cidrs(&peer, &vtep, &title, node, &mut cidrs, skipped);
            if pod_cidrs.is_empty() {
                skipped.push(
                    Skipped::error(&title, "no pod CIDR of it is known")
                        .within(peer.origin())
                        .remedy("its packets are left to the kernel; set the Node's podCIDRs"),
                );
                continue;
            }
            desired.vtep_sources.insert(VtepSource { source: peer.remote, vni: facts.vni }, vtep);
            for source in peer.node.iter().flat_map(|node| &node.addresses) {
                if source.is_ipv4() == peer.remote.is_ipv4() && !node.addresses.contains(source) {
                    extra_sources.push((*source, vtep, title.clone()));
                }
            }
            desired.vteps.insert(
                vtep,
                DesiredVtep {
                    local: facts.underlay,
                    port: facts.port,
                    remote_mac: peer.mac,
                    local_mac: facts.mac,
                    tunnel: name,
                    outer_dscp: node.outer_dscp,
                    pod_cidrs,
                    node: peer.node.map(|node| node.name.clone()),
                },
            );
        }
    }
    // Every VTEP's own address first: no other node's list of addresses can take it away.
    for (source, vtep, title) in extra_sources {
        let key = VtepSource { source, vni: vtep.vni };
        let owner = *desired.vtep_sources.entry(key).or_insert(vtep);
        if owner != vtep {
            skipped.push(
                Skipped::error(title, format!("{source} belongs to VTEP {}", owner.remote))
                    .at("status.addresses")
                    .remedy("give each Node its own addresses"),
            );
        }
    }
    cidrs
}

/// Why a tunnel cannot be used, if so.
fn tunnel_problem(facts: &TunnelFacts, name: &TunnelName, desired: &Desired) -> Option<Skipped> {
    // Index 0 is not used.
    let room = sluice_abi::MAX_TUNNELS as usize - 1;
    let reason = if facts.vni >= 1 << 24 {
        format!("{} is not a VNI", facts.vni)
    } else if desired.tunnels.contains_key(name) {
        format!("another tunnel has VNI {} and interface {}", name.vni, name.ifindex)
    } else if desired.tunnels.len() >= room {
        format!("there are more than {room} tunnels")
    } else {
        return None;
    };
    Some(
        Skipped::error(format!("tunnel {}", facts.name), reason)
            .remedy("its packets are left to the kernel; name other devices in the configuration"),
    )
}

fn tunnel(facts: &TunnelFacts) -> Tunnel {
    Tunnel {
        // 24 bits of VNI, then a reserved byte (RFC 7348 section 5).
        vni: Be32::new(facts.vni << 8),
        ifindex: facts.ifindex,
        addr_v4: facts.inner_v4.filter(IpAddr::is_ipv4).map_or(Addr::NONE, Addr::from),
        addr_v6: facts.inner_v6.filter(IpAddr::is_ipv6).map_or(Addr::NONE, Addr::from),
        mac: facts.mac,
        port: Be16::new(facts.port),
        local: facts.underlay.into(),
    }
}

/// Tunnel ends that belong to the tunnel `facts`: the kernel's, then those of Node annotations.
fn peers<'a>(snapshot: &'a Snapshot, node: &NodeContext, facts: &TunnelFacts) -> Vec<Peer<'a>> {
    let v4 = facts.underlay.is_ipv4();
    let has_inner = |net: &IpNet| match (facts.inner_v4, facts.inner_v6) {
        (None, None) => net.addr().is_ipv4() == v4,
        (inner_v4, inner_v6) => match net {
            IpNet::V4(_) => inner_v4.is_some(),
            IpNet::V6(_) => inner_v6.is_some(),
        },
    };
    let of_node =
        |node: &Node| -> Vec<IpNet> { node.pod_cidrs.iter().copied().filter(has_inner).collect() };
    let mut by_address: BTreeMap<IpAddr, &'a Arc<Node>> = BTreeMap::new();
    let others: Vec<&'a Arc<Node>> =
        snapshot.nodes.values().filter(|other| other.name != node.node_name).collect();
    for other in &others {
        let underlays = other.tunnels.iter().map(|tunnel| &tunnel.underlay);
        for address in underlays.chain(&other.addresses) {
            by_address.entry(*address).or_insert(other);
        }
    }
    let mut seen = BTreeSet::new();
    let mut peers = Vec::new();
    let mut of_kernel: Vec<_> = node
        .peers
        .iter()
        .filter(|peer| peer.vni == facts.vni && peer.remote.is_ipv4() == v4)
        .collect();
    of_kernel.sort_by_key(|peer| (peer.remote, peer.mac));
    for peer in of_kernel {
        if !seen.insert(peer.remote) {
            continue;
        }
        let node = by_address.get(&peer.remote).copied();
        let pod_cidrs = if peer.pod_cidrs.is_empty() {
            node.map(|node| of_node(node)).unwrap_or_default()
        } else {
            peer.pod_cidrs.iter().map(IpNet::trunc).collect()
        };
        peers.push(Peer { remote: peer.remote, mac: peer.mac, pod_cidrs, node });
    }
    for other in others {
        for tunnel in &other.tunnels {
            if tunnel.vni == facts.vni
                && tunnel.underlay.is_ipv4() == v4
                && seen.insert(tunnel.underlay)
            {
                peers.push(Peer {
                    remote: tunnel.underlay,
                    mac: tunnel.mac,
                    pod_cidrs: of_node(other),
                    node: Some(other),
                });
            }
        }
    }
    peers
}

/// The pod CIDRs of a peer that can be believed: not ours, not the nodes' own network, not another
/// peer's.
fn pod_cidrs(
    peer: &Peer<'_>,
    vtep: &VtepName,
    title: &str,
    node: &NodeContext,
    cidrs: &mut CidrTable,
    skipped: &mut Vec<Skipped>,
) -> Vec<IpNet> {
    let mut wanted = peer.pod_cidrs.clone();
    wanted.sort();
    wanted.dedup();
    let mut believed = Vec::new();
    for net in wanted {
        let overlaps = |own: &&IpNet| own.contains(&net) || net.contains(*own);
        let reason = if net.prefix_len() == 0 {
            format!("{net} is the whole address space")
        } else if let Some(own) = node.pod_cidrs.iter().find(overlaps) {
            format!("{net} overlaps our own pod CIDR {own}")
        } else if let Some(addr) = node.addresses.iter().find(|addr| net.contains(*addr)) {
            format!("{net} contains our own address {addr}")
        } else if net.contains(&peer.remote) {
            format!("{net} contains the peer's underlay address")
        } else if believed.len() == MAX_POD_CIDRS {
            format!("{net} is one of more than {MAX_POD_CIDRS} pod CIDRs")
        } else if let Some(owner) = cidrs.insert(net, *vtep) {
            format!("{net} belongs to VTEP {}", owner.remote)
        } else {
            believed.push(net);
            continue;
        };
        skipped.push(
            Skipped::error(title, reason)
                .within(peer.origin())
                .at("pod CIDR")
                .remedy("packets of this network are left to the kernel"),
        );
    }
    believed
}
