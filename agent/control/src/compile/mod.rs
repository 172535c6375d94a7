//! From the model to desired tables, total and deterministic. Desired tables have no ids: they are
//! keyed by stable names, so that equal input gives equal output on every start.

use ipnet::IpNet;
use sluice_abi::{Family, Mac, Tunnel};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::Skipped;
use crate::model::{
    MaglevSettings, NextHopFacts, NodeContext, ObjectName, PodFacts, ServicePortName, Snapshot,
    Tuple,
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
    let _ = (snapshot, node);
    Compiled::default()
}

/// Destinations whose next hops [`compile`] needs in [`NodeContext::next_hops`]: underlay
/// addresses of VTEPs, and backends outside the tunnels. The rest of the context must be filled.
pub fn wanted_next_hops(snapshot: &Snapshot, node: &NodeContext) -> BTreeSet<IpAddr> {
    let _ = (snapshot, node);
    BTreeSet::new()
}
