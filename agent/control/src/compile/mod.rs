//! From the model to desired tables, total and deterministic. Desired tables have no ids: they are
//! keyed by stable names, so that equal input gives equal output on every start.

mod frontends;
mod tunnels;

use ipnet::IpNet;
use sluice_abi::{Family, Mac, Tunnel, frontend_flags};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use frontends::{Claim, FrontendKind};
use tunnels::CidrTable;

use crate::Skipped;
use crate::endpoints::{Selection, select};
use crate::model::{
    Endpoint, EndpointSlice, MaglevSettings, NextHopFacts, NodeContext, ObjectName, OuterDscp,
    PodFacts, ServicePortName, Snapshot, Tuple,
};

/// A set of backends that shares one consistent-hash table.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SetKey {
    /// The Service port.
    pub service: ServicePortName,
    /// Family of its backends.
    pub family: Family,
    /// Only endpoints of this node (traffic policy Local).
    pub local: bool,
}

/// Where a Service is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DesiredFrontend {
    /// The Service port.
    pub service: ServicePortName,
    /// `sluice_abi::frontend_flags`.
    pub flags: u32,
    /// Backends for clients outside the cluster; `None` if there are none.
    pub external: Option<SetKey>,
    /// Backends for pods and nodes of the cluster.
    pub internal: Option<SetKey>,
    /// Session affinity in seconds, 0 for none.
    pub affinity_seconds: u32,
}

/// How packets reach a backend.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DesiredRoute {
    /// On this node.
    Local,
    /// Through the tunnel to a VTEP.
    Tunnel(VtepName),
    /// By the next hop towards its own address.
    Plain,
}

/// A backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DesiredBackend {
    /// Route.
    pub route: DesiredRoute,
    /// Pod, if known.
    pub pod: Option<ObjectName>,
    /// Node, if known.
    pub node: Option<Arc<str>>,
}

/// What a VTEP is known by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VtepName {
    /// VNI.
    pub vni: u32,
    /// Underlay address of the peer.
    pub remote: IpAddr,
}

/// What an own tunnel is known by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TunnelName {
    /// VNI.
    pub vni: u32,
    /// Interface index.
    pub ifindex: u32,
}

/// A tunnel end of another node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DesiredVtep {
    /// Own underlay address.
    pub local: IpAddr,
    /// UDP destination port.
    pub port: u16,
    /// MAC of the peer's vxlan device.
    pub remote_mac: Mac,
    /// MAC of ours.
    pub local_mac: Mac,
    /// Own tunnel.
    pub tunnel: TunnelName,
    /// DSCP of outer headers.
    pub outer_dscp: OuterDscp,
    /// Pod CIDRs of the peer, four at most.
    pub pod_cidrs: Vec<IpNet>,
    /// Node, if known.
    pub node: Option<Arc<str>>,
}

/// Who may send into a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VtepSource {
    /// Outer source address.
    pub source: IpAddr,
    /// VNI.
    pub vni: u32,
}

/// Desired tables, without ids.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Desired {
    /// Frontends.
    pub frontends: BTreeMap<Tuple, DesiredFrontend>,
    /// Addresses of frontends that are Services' alone: no node has them, nothing on them is left to
    /// others.
    pub vips: BTreeSet<IpAddr>,
    /// Backends of each set, sorted; never empty.
    pub sets: BTreeMap<SetKey, Vec<Tuple>>,
    /// Backends.
    pub backends: BTreeMap<Tuple, DesiredBackend>,
    /// Pods of this node.
    pub pods: BTreeMap<IpAddr, PodFacts>,
    /// Tunnel ends of other nodes.
    pub vteps: BTreeMap<VtepName, DesiredVtep>,
    /// Who may send into the tunnels.
    pub vtep_sources: BTreeMap<VtepSource, VtepName>,
    /// Own tunnels.
    pub tunnels: BTreeMap<TunnelName, Tunnel>,
    /// Next hops by destination.
    pub next_hops: BTreeMap<IpAddr, NextHopFacts>,
    /// How to make consistent-hash tables.
    pub maglev: MaglevSettings,
}

/// Desired tables and what was left out.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Compiled {
    /// Desired tables.
    pub desired: Desired,
    /// What was left out, sorted.
    pub skipped: Vec<Skipped>,
}

/// Compiles. Never fails as a whole.
pub fn compile(snapshot: &Snapshot, node: &NodeContext) -> Compiled {
    Compiler::run(snapshot, node).0
}

/// Destinations whose next hops [`compile`] needs in [`NodeContext::next_hops`]: underlay
/// addresses of VTEPs, and backends outside the tunnels. The rest of the context must be filled.
pub fn wanted_next_hops(snapshot: &Snapshot, node: &NodeContext) -> BTreeSet<IpAddr> {
    Compiler::run(snapshot, node).1
}

/// One compilation.
struct Compiler<'a> {
    node: &'a NodeContext,
    cidrs: CidrTable,
    pod_names: BTreeMap<IpAddr, &'a ObjectName>,
    slices: BTreeMap<&'a ObjectName, Vec<&'a EndpointSlice>>,
    desired: Desired,
    wanted: BTreeSet<IpAddr>,
    /// Backends without a way, and why.
    unreachable: BTreeMap<Tuple, Skipped>,
}

/// Which sets a Service port has in one family, and whether endpoints exist at all.
#[derive(Clone, Default)]
struct Sets {
    cluster: Option<SetKey>,
    local: Option<SetKey>,
    any_endpoint: bool,
}

impl<'a> Compiler<'a> {
    fn run(snapshot: &'a Snapshot, node: &'a NodeContext) -> (Compiled, BTreeSet<IpAddr>) {
        let mut skipped = Vec::new();
        let mut desired =
            Desired { pods: node.pods.clone(), maglev: node.maglev, ..Desired::default() };
        let cidrs = tunnels::compile(snapshot, node, &mut desired, &mut skipped);
        let claims = frontends::claims(snapshot, node, &desired, &cidrs, &mut skipped);
        let mut slices: BTreeMap<&ObjectName, Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in snapshot.slices.values() {
            slices.entry(&slice.service).or_default().push(slice);
        }
        let mut compiler = Compiler {
            node,
            cidrs,
            pod_names: pod_names(snapshot),
            slices,
            wanted: desired.vteps.keys().map(|vtep| vtep.remote).collect(),
            desired,
            unreachable: BTreeMap::new(),
        };
        compiler.vtep_next_hops();
        let mut sets: BTreeMap<(ServicePortName, Family), Sets> = BTreeMap::new();
        let mut opted_out = BTreeMap::new();
        for claim in &claims {
            let service = claim.service;
            if service.opt_out || node.opt_out.contains(&service.name) {
                opted_out.insert(&service.name, service);
                continue;
            }
            let name = claim.port.full_name(&service.name);
            let family = frontends::family(claim.tuple.addr);
            let sets = sets
                .entry((name.clone(), family))
                .or_insert_with(|| compiler.sets(claim, &name, family));
            compiler.frontend(claim, name, sets);
        }
        for (name, service) in opted_out {
            skipped.push(
                Skipped::notice(format!("Service {name}"), "opted out: left to the kernel")
                    .within(&service.origin),
            );
        }
        compiler.desired.vips = frontends::vips(snapshot, node, &compiler.desired);
        compiler.drop_unused();
        skipped.extend(compiler.unreachable.into_values());
        skipped.sort();
        skipped.dedup();
        let compiled = Compiled { desired: compiler.desired, skipped };
        (compiled, compiler.wanted)
    }

    /// Takes out sets that no policy of a frontend chooses, and what only they need.
    fn drop_unused(&mut self) {
        let desired = &mut self.desired;
        let used: BTreeSet<&SetKey> = desired
            .frontends
            .values()
            .flat_map(|frontend| frontend.external.iter().chain(&frontend.internal))
            .collect();
        desired.sets.retain(|key, _| used.contains(key));
        let used: BTreeSet<Tuple> = desired.sets.values().flatten().copied().collect();
        desired.backends.retain(|tuple, _| used.contains(tuple));
        let mut used: BTreeSet<IpAddr> = desired.vteps.keys().map(|vtep| vtep.remote).collect();
        used.extend(
            desired
                .backends
                .iter()
                .filter(|(_, backend)| backend.route == DesiredRoute::Plain)
                .map(|(tuple, _)| tuple.addr),
        );
        desired.next_hops.retain(|addr, _| used.contains(addr));
    }

    /// A VTEP without a known way still decapsulates: its next hop is there, but unresolved.
    fn vtep_next_hops(&mut self) {
        for vtep in self.desired.vteps.keys() {
            let facts = self.node.next_hops.get(&vtep.remote).copied();
            self.desired
                .next_hops
                .insert(vtep.remote, facts.unwrap_or(NextHopFacts::Unresolved {}));
        }
    }

    /// Programs the backends of a Service port in one family.
    fn sets(&mut self, claim: &Claim<'a>, name: &ServicePortName, family: Family) -> Sets {
        let slices = self.slices.get(&claim.service.name);
        let selection = select(
            slices.map(Vec::as_slice).unwrap_or_default(),
            claim.port,
            family,
            &self.node.node_name,
        );
        let service = claim.service;
        let Selection { cluster, local } = selection;
        Sets {
            any_endpoint: !cluster.is_empty(),
            cluster: self.set(claim, name, family, false, cluster),
            local: if service.internal_local || service.external_local {
                self.set(claim, name, family, true, local)
            } else {
                None
            },
        }
    }

    fn set(
        &mut self,
        claim: &Claim<'a>,
        name: &ServicePortName,
        family: Family,
        local: bool,
        endpoints: BTreeMap<Tuple, &Endpoint>,
    ) -> Option<SetKey> {
        let mut backends = Vec::with_capacity(endpoints.len());
        for (tuple, endpoint) in endpoints {
            if self.backend(claim, tuple, endpoint) {
                backends.push(tuple);
            }
        }
        if backends.is_empty() {
            return None;
        }
        let key = SetKey { service: name.clone(), family, local };
        self.desired.sets.insert(key.clone(), backends);
        Some(key)
    }

    /// Enters a backend; false if there is no way to it.
    fn backend(&mut self, claim: &Claim<'a>, tuple: Tuple, endpoint: &Endpoint) -> bool {
        let route = self.route(tuple.addr, endpoint);
        if route == DesiredRoute::Plain {
            self.wanted.insert(tuple.addr);
            let Some(facts) = self.node.next_hops.get(&tuple.addr) else {
                self.unreachable.entry(tuple).or_insert_with(|| {
                    Skipped::error(
                        format!("Service {}", claim.service.name),
                        format!("endpoint {tuple} is left out: its next hop is unknown"),
                    )
                    .within(&claim.service.origin)
                    .remedy("add a route to it, or the pod CIDR of its Node")
                });
                return false;
            };
            self.desired.next_hops.insert(tuple.addr, *facts);
        }
        let pod = endpoint.pod.as_ref();
        let backend = DesiredBackend {
            route,
            pod: pod.or_else(|| self.pod_names.get(&tuple.addr).copied()).cloned(),
            node: endpoint.node.clone(),
        };
        // One endpoint behind two Services: the entry that knows more stays, whatever the order.
        let entry = self.desired.backends.entry(tuple).or_insert(backend.clone());
        if (&backend.node, &backend.pod) > (&entry.node, &entry.pod) {
            *entry = backend;
        }
        true
    }

    fn route(&self, addr: IpAddr, endpoint: &Endpoint) -> DesiredRoute {
        let node = self.node;
        if crate::endpoints::is_local(endpoint, &node.node_name) || node.pods.contains_key(&addr) {
            DesiredRoute::Local
        } else if let Some(vtep) = self.cidrs.find(addr) {
            DesiredRoute::Tunnel(vtep)
        } else if node.addresses.contains(&addr)
            || node.pod_cidrs.iter().any(|net| net.contains(&addr))
        {
            DesiredRoute::Local
        } else {
            DesiredRoute::Plain
        }
    }

    /// Enters a frontend. Clients inside the cluster that use an outside address are served by every
    /// endpoint, whatever externalTrafficPolicy says (kube-proxy's short-circuit).
    fn frontend(&mut self, claim: &Claim<'a>, service: ServicePortName, sets: &Sets) {
        let choose = |local: bool| if local { &sets.local } else { &sets.cluster };
        let is_cluster_ip = claim.kind == FrontendKind::ClusterIp;
        let (external_local, internal_local) = if is_cluster_ip {
            (claim.service.internal_local, claim.service.internal_local)
        } else {
            (claim.service.external_local, false)
        };
        let mut flags = claim.flags;
        if sets.any_endpoint && external_local {
            flags |= frontend_flags::EXTERNAL_LOCAL;
        }
        if sets.any_endpoint && internal_local {
            flags |= frontend_flags::INTERNAL_LOCAL;
        }
        self.desired.frontends.insert(
            claim.tuple,
            DesiredFrontend {
                service,
                flags,
                external: choose(external_local).clone(),
                internal: choose(internal_local).clone(),
                affinity_seconds: claim.service.affinity_seconds,
            },
        );
    }
}

/// Pods by address, for names. Pods of the host network share their node's address.
fn pod_names(snapshot: &Snapshot) -> BTreeMap<IpAddr, &ObjectName> {
    let mut names = BTreeMap::new();
    for pod in snapshot.pods.values().filter(|pod| !pod.host_network) {
        for address in &pod.addresses {
            names.entry(*address).or_insert(&pod.name);
        }
    }
    names
}
