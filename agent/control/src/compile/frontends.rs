//! Where Services are reached: claims to addresses, and who wins when two claim one.

use sluice_abi::{Family, frontend_flags};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Desired;
use super::tunnels::CidrTable;
use crate::Skipped;
use crate::model::{NodeContext, ObjectName, Protocol, Service, ServicePort, Snapshot, Tuple};

/// What kind of address a frontend has. In the order of precedence: the API server gives out
/// ClusterIPs and node ports, load balancers are set by a controller, external IPs by anybody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum FrontendKind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

impl FrontendKind {
    pub(super) fn flag(self) -> u32 {
        match self {
            FrontendKind::ClusterIp => frontend_flags::CLUSTER_IP,
            FrontendKind::NodePort => frontend_flags::NODE_PORT,
            FrontendKind::LoadBalancer => frontend_flags::LOAD_BALANCER,
            FrontendKind::ExternalIp => frontend_flags::EXTERNAL_IP,
        }
    }

    fn field(self) -> &'static str {
        match self {
            FrontendKind::ClusterIp => "spec.clusterIPs",
            FrontendKind::NodePort => "spec.ports.nodePort",
            FrontendKind::LoadBalancer => "status.loadBalancer.ingress",
            FrontendKind::ExternalIp => "spec.externalIPs",
        }
    }
}

/// A Service port's wish to be reached at an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim<'a> {
    pub(super) tuple: Tuple,
    pub(super) kind: FrontendKind,
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    /// Flags of all kinds by which the Service port claims the address.
    pub(super) flags: u32,
}

pub(super) fn family(addr: IpAddr) -> Family {
    match addr {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// The claims that hold, each address once.
pub(super) fn claims<'a>(
    snapshot: &'a Snapshot,
    node: &NodeContext,
    desired: &Desired,
    cidrs: &CidrTable,
    skipped: &mut Vec<Skipped>,
) -> Vec<Claim<'a>> {
    let slice_families = slice_families(snapshot);
    let mut wanted: Vec<Claim<'a>> = Vec::new();
    for service in snapshot.services.values() {
        let of_slices = slice_families.get(&service.name);
        wish(service, of_slices, node, &mut wanted);
    }
    wanted.sort_by(|a, b| {
        let created = |claim: &Claim<'_>| claim.service.created.unwrap_or(i64::MAX);
        (a.tuple, a.kind, created(a))
            .cmp(&(b.tuple, b.kind, created(b)))
            .then_with(|| a.service.name.cmp(&b.service.name))
            .then_with(|| a.port.name.cmp(&b.port.name))
    });
    let guard = Guard::new(snapshot, node, desired, cidrs);
    let mut held: Vec<Claim<'a>> = Vec::with_capacity(wanted.len());
    for claim in wanted {
        let title = format!("Service {}", claim.service.name);
        if let Some(holder) = held.last_mut()
            && holder.tuple == claim.tuple
        {
            if holder.service.name == claim.service.name && holder.port == claim.port {
                if holder.kind != FrontendKind::ClusterIp {
                    holder.flags |= claim.flags;
                }
            } else {
                skipped.push(
                    Skipped::error(
                        title,
                        format!("{} is taken by Service {}", claim.tuple, holder.service.name),
                    )
                    .within(&claim.service.origin)
                    .at(claim.kind.field())
                    .remedy("use another address or port; the older claim holds"),
                );
            }
            continue;
        }
        match guard.forbids(&claim) {
            None => held.push(claim),
            Some(reason) => skipped.push(
                Skipped::error(title, reason)
                    .within(&claim.service.origin)
                    .at(claim.kind.field())
                    .remedy("use another address or port"),
            ),
        }
    }
    held
}

/// Families in which a Service has slices, by the Service's name.
fn slice_families(snapshot: &Snapshot) -> BTreeMap<&ObjectName, BTreeSet<Family>> {
    let mut families: BTreeMap<_, BTreeSet<Family>> = BTreeMap::new();
    for slice in snapshot.slices.values() {
        families.entry(&slice.service).or_default().insert(slice.family);
    }
    families
}

/// All addresses that a Service asks for. Its families are those of its ClusterIPs; a hand-made
/// Service without any has those of its slices.
fn wish<'a>(
    service: &'a Arc<Service>,
    of_slices: Option<&BTreeSet<Family>>,
    node: &NodeContext,
    wanted: &mut Vec<Claim<'a>>,
) {
    let has_family = |addr: &IpAddr| {
        if service.cluster_ips.is_empty() {
            of_slices.is_some_and(|families| families.contains(&family(*addr)))
        } else {
            service.cluster_ips.iter().any(|ip| ip.is_ipv4() == addr.is_ipv4())
        }
    };
    for port in &service.ports {
        let mut claim = |kind: FrontendKind, addr: &IpAddr, number: u16| {
            if has_family(addr) {
                wanted.push(Claim {
                    tuple: Tuple { addr: *addr, port: number, protocol: port.protocol },
                    kind,
                    service,
                    port,
                    flags: kind.flag(),
                });
            }
        };
        for addr in &service.cluster_ips {
            claim(FrontendKind::ClusterIp, addr, port.port.get());
        }
        for addr in &service.load_balancer_ips {
            claim(FrontendKind::LoadBalancer, addr, port.port.get());
        }
        for addr in &service.external_ips {
            claim(FrontendKind::ExternalIp, addr, port.port.get());
        }
        if let Some(node_port) = port.node_port {
            for addr in &node.node_port_addresses {
                claim(FrontendKind::NodePort, addr, node_port.get());
            }
        }
    }
}

/// Addresses of all nodes, ours too.
fn node_addresses(snapshot: &Snapshot, node: &NodeContext, desired: &Desired) -> BTreeSet<IpAddr> {
    let own = node.addresses.iter().chain(&node.node_port_addresses);
    let nodes = snapshot.nodes.values().flat_map(|node| &node.addresses);
    let sources = desired.vtep_sources.keys().map(|source| source.source);
    own.chain(nodes).copied().chain(sources).collect()
}

/// Addresses of the frontends that are Services' alone. What is left to somebody else on an address,
/// if only one port of it, must reach him: then the address is nobody's alone.
pub(super) fn vips(snapshot: &Snapshot, node: &NodeContext, desired: &Desired) -> BTreeSet<IpAddr> {
    let mut shared = node_addresses(snapshot, node, desired);
    shared.extend(node.api_servers.iter().map(SocketAddr::ip));
    for service in snapshot.services.values() {
        shared.extend(&service.uncaptured_ips);
        if service.opt_out || node.opt_out.contains(&service.name) {
            shared.extend(&service.cluster_ips);
            shared.extend(&service.external_ips);
            shared.extend(&service.load_balancer_ips);
        }
    }
    let addresses = desired.frontends.keys().map(|tuple| tuple.addr);
    addresses.filter(|addr| !shared.contains(addr)).collect()
}

/// What no Service may capture.
struct Guard<'a> {
    node: &'a NodeContext,
    cidrs: &'a CidrTable,
    /// Addresses of all nodes, ours too.
    node_addresses: BTreeSet<IpAddr>,
    /// ClusterIPs and whose they are.
    cluster_ips: BTreeMap<IpAddr, &'a ObjectName>,
}

impl<'a> Guard<'a> {
    fn new(
        snapshot: &'a Snapshot,
        node: &'a NodeContext,
        desired: &Desired,
        cidrs: &'a CidrTable,
    ) -> Self {
        let node_addresses = node_addresses(snapshot, node, desired);
        let mut cluster_ips = BTreeMap::new();
        for service in snapshot.services.values() {
            for ip in &service.cluster_ips {
                cluster_ips.entry(*ip).or_insert(&service.name);
            }
        }
        Self { cluster_ips, node, cidrs, node_addresses }
    }

    /// Why the claim must not hold, if so.
    fn forbids(&self, claim: &Claim<'_>) -> Option<String> {
        let tuple = claim.tuple;
        let Tuple { addr, port, .. } = tuple;
        let is_node = self.node_addresses.contains(&addr);
        let fail_safe = match tuple.protocol {
            Protocol::Tcp => self.node.fail_safe.tcp.contains(&port),
            Protocol::Udp => {
                self.node.fail_safe.udp.contains(&port)
                    || self.node.tunnels.iter().any(|tunnel| tunnel.port == port)
            }
        };
        let is_pod = self.node.pods.contains_key(&addr)
            || self.node.pod_cidrs.iter().any(|net| net.contains(&addr))
            || self.cidrs.find(addr).is_some();
        let is_own =
            self.node.addresses.contains(&addr) || self.node.node_port_addresses.contains(&addr);
        let snat = self.node.snat_ports.filter(|(first, last)| (*first..=*last).contains(&port));
        let cluster_ip_of = self.cluster_ips.get(&addr).filter(|owner| {
            claim.kind != FrontendKind::ClusterIp && **owner != &claim.service.name
        });
        if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() {
            Some(format!("{tuple} is no address that a Service can have"))
        } else if is_node && fail_safe {
            Some(format!("{tuple} is a fail-safe port of a node"))
        } else if let Some((first, last)) = snat.filter(|_| is_own) {
            Some(format!("{tuple} is one of this node's SNAT ports ({first} to {last})"))
        } else if self.node.api_servers.contains(&SocketAddr::new(addr, port)) {
            Some(format!("{tuple} is the API server"))
        } else if is_node && claim.kind == FrontendKind::ClusterIp {
            Some(format!("{tuple} is the address of a node"))
        } else if let Some(owner) = cluster_ip_of {
            Some(format!("{addr} is the ClusterIP of Service {owner}"))
        } else if is_pod && claim.kind != FrontendKind::NodePort {
            Some(format!("{tuple} is in a pod CIDR"))
        } else {
            None
        }
    }
}
