//! Tables for people, programs and golden tests: by names, without ids. Equal input gives an equal
//! dump on every node history, because ids are a node's own.

use serde::Serialize;
use sluice_abi::{Addr, Backend, Extent, Frontend, PodNet, Route, VtepKey, frontend_flags};
use std::collections::BTreeMap;
use xxhash_rust::xxh64::xxh64;

use crate::model::Protocol;
use crate::{Names, Tables};

/// Everything, by names.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Dump {
    /// Services by `namespace/name:port`.
    pub services: BTreeMap<String, ServiceDump>,
    /// Addresses that are Services' alone.
    pub vips: Vec<String>,
    /// Backends by `address:port/protocol`.
    pub backends: BTreeMap<String, BackendDump>,
    /// Pods of this node by address.
    pub pods: BTreeMap<String, PodDump>,
    /// Own tunnels by VNI and interface.
    pub tunnels: BTreeMap<String, TunnelDump>,
    /// Tunnel ends of other nodes by `vni@address`.
    pub vteps: BTreeMap<String, VtepDump>,
    /// Next hops by destination.
    pub next_hops: BTreeMap<String, NextHopDump>,
}

/// A Service port.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceDump {
    /// Frontends by `address:port/protocol`.
    pub frontends: BTreeMap<String, FrontendDump>,
}

/// A frontend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendDump {
    /// `cluster_ip`, `node_port`, `load_balancer`, `external_ip`, `external_local`,
    /// `internal_local`.
    pub flags: Vec<&'static str>,
    /// Session affinity in seconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub affinity_seconds: u32,
    /// For clients outside the cluster.
    pub external: SetDump,
    /// For pods and nodes of the cluster.
    pub internal: SetDump,
}

/// A set of backends.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct SetDump {
    /// Entries of the consistent-hash table.
    pub entries: usize,
    /// XXH64 of the table's backends in order: equal on all nodes that have the same set.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// Entries of each backend.
    pub backends: BTreeMap<String, usize>,
}

/// A backend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BackendDump {
    /// `local`, `tunnel 1@192.0.2.1` or `plain`.
    pub route: String,
    /// Pod, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Node, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A pod of this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PodDump {
    /// Host side interface.
    pub ifindex: u32,
    /// `stack`, `redirect` or `peer`.
    pub delivery: &'static str,
    /// The pod's own MAC.
    pub pod_mac: String,
    /// The host side's MAC.
    pub host_mac: String,
    /// Largest IP packet in bytes, 0 if not known.
    pub mtu: u32,
}

/// An own tunnel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TunnelDump {
    /// UDP port.
    pub port: u16,
    /// Underlay address.
    pub local: String,
    /// SNAT sources.
    pub inner: Vec<String>,
    /// MAC of the device.
    pub mac: String,
}

/// A tunnel end of another node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VtepDump {
    /// Node, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Own underlay address.
    pub local: String,
    /// UDP destination port.
    pub port: u16,
    /// MAC of its vxlan device.
    pub remote_mac: String,
    /// Pod CIDRs.
    pub pod_cidrs: Vec<String>,
    /// Outer source addresses.
    pub sources: Vec<String>,
    /// Own tunnel.
    pub tunnel: String,
}

/// A next hop.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NextHopDump {
    /// Exit interface, 0 while unresolved.
    pub ifindex: u32,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// The neighbour's MAC.
    pub dst_mac: String,
    /// The exit interface's MAC.
    pub src_mac: String,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// The tables by names. What `names` does not know is shown by its id.
pub fn dump(tables: &Tables, names: &Names) -> Dump {
    let mut out = Dump::default();
    for (key, frontend) in &tables.frontends {
        if key.is_address() {
            out.vips.push(key.addr.to_string());
            continue;
        }
        let service = names
            .services
            .get(&frontend.service)
            .cloned()
            .unwrap_or_else(|| format!("service {}", frontend.service));
        out.services
            .entry(service)
            .or_default()
            .frontends
            .insert(tuple(key.addr, key.port.host(), key.proto), frontend_dump(tables, frontend));
    }
    for (id, backend) in &tables.backends {
        let name = names.backends.get(id);
        out.backends.insert(
            backend_text(tables, *id),
            BackendDump {
                route: route(tables, backend),
                pod: name.and_then(|name| name.pod.clone()),
                node: name.and_then(|name| name.node.clone()),
            },
        );
    }
    for (addr, pod) in &tables.pods {
        out.pods.insert(
            addr.to_string(),
            PodDump {
                ifindex: pod.ifindex,
                delivery: match pod.delivery {
                    d if d == sluice_abi::Delivery::Redirect as u16 => "redirect",
                    d if d == sluice_abi::Delivery::Peer as u16 => "peer",
                    _ => "stack",
                },
                pod_mac: pod.pod_mac.to_string(),
                host_mac: pod.host_mac.to_string(),
                mtu: pod.mtu,
            },
        );
    }
    for (index, tunnel) in &tables.tunnels {
        out.tunnels.insert(
            tunnel_text(tables, *index),
            TunnelDump {
                port: tunnel.port.host(),
                local: tunnel.local.to_string(),
                inner: [tunnel.addr_v4, tunnel.addr_v6]
                    .iter()
                    .filter(|addr| !addr.is_none())
                    .map(ToString::to_string)
                    .collect(),
                mac: tunnel.mac.to_string(),
            },
        );
    }
    for (index, vtep) in &tables.vteps {
        let sources = |(key, target): (&VtepKey, &u32)| {
            (target == index && !key.is_mac()).then(|| key.source.to_string())
        };
        out.vteps.insert(
            vtep_text(tables, *index),
            VtepDump {
                node: names.vteps.get(index).and_then(|name| name.node.clone()),
                local: vtep.local.to_string(),
                port: vtep.port.host(),
                remote_mac: vtep.remote_mac.to_string(),
                pod_cidrs: vtep
                    .pod_nets
                    .iter()
                    .filter(|net| **net != PodNet::NONE)
                    .map(cidr)
                    .collect(),
                sources: tables.vtep_sources.iter().filter_map(sources).collect(),
                tunnel: tunnel_text(tables, vtep.tunnel),
            },
        );
    }
    for (index, next_hop) in &tables.next_hops {
        let destination = names
            .next_hops
            .get(index)
            .map_or_else(|| format!("next hop {index}"), ToString::to_string);
        out.next_hops.insert(
            destination,
            NextHopDump {
                ifindex: next_hop.ifindex,
                mtu: next_hop.mtu,
                dst_mac: next_hop.dst_mac.to_string(),
                src_mac: next_hop.src_mac.to_string(),
            },
        );
    }
    out
}

fn frontend_dump(tables: &Tables, frontend: &Frontend) -> FrontendDump {
    const FLAGS: [(u32, &str); 6] = [
        (frontend_flags::CLUSTER_IP, "cluster_ip"),
        (frontend_flags::NODE_PORT, "node_port"),
        (frontend_flags::LOAD_BALANCER, "load_balancer"),
        (frontend_flags::EXTERNAL_IP, "external_ip"),
        (frontend_flags::EXTERNAL_LOCAL, "external_local"),
        (frontend_flags::INTERNAL_LOCAL, "internal_local"),
    ];
    FrontendDump {
        flags: FLAGS
            .iter()
            .filter(|(bit, _)| frontend.flags & bit != 0)
            .map(|(_, word)| *word)
            .collect(),
        affinity_seconds: frontend.affinity_seconds,
        external: set(tables, frontend.external),
        internal: set(tables, frontend.internal),
    }
}

fn set(tables: &Tables, extent: Extent) -> SetDump {
    let Some(ids) = tables.entries(extent) else {
        return SetDump::default();
    };
    let mut texts: BTreeMap<u32, (String, usize)> = BTreeMap::new();
    let mut order = Vec::new();
    for id in ids.iter() {
        let (text, count) = texts.entry(*id).or_insert_with(|| (backend_text(tables, *id), 0));
        *count += 1;
        order.extend_from_slice(text.as_bytes());
        order.push(0);
    }
    SetDump {
        entries: ids.len(),
        digest: format!("{:016x}", xxh64(&order, 0)),
        backends: texts.into_values().collect(),
    }
}

fn tuple(addr: Addr, port: u16, proto: u8) -> String {
    let protocol = Protocol::from_number(proto).map_or("unknown", Protocol::label);
    match addr.to_ip() {
        std::net::IpAddr::V4(v4) => format!("{v4}:{port}/{protocol}"),
        std::net::IpAddr::V6(v6) => format!("[{v6}]:{port}/{protocol}"),
    }
}

fn backend_text(tables: &Tables, id: u32) -> String {
    tables.backends.get(&id).map_or_else(
        || format!("backend {id}"),
        |backend| tuple(backend.addr, backend.port.host(), backend.proto),
    )
}

fn route(tables: &Tables, backend: &Backend) -> String {
    match backend.route {
        r if r == Route::Local as u16 => "local".to_owned(),
        r if r == Route::Tunnel as u16 => format!("tunnel {}", vtep_text(tables, backend.index)),
        r if r == Route::Plain as u16 => "plain".to_owned(),
        r => format!("unknown route {r}"),
    }
}

fn vtep_text(tables: &Tables, index: u32) -> String {
    tables.vteps.get(&index).map_or_else(
        || format!("vtep {index}"),
        |vtep| format!("{}@{}", vtep.vni.host() >> 8, vtep.remote),
    )
}

fn tunnel_text(tables: &Tables, index: u32) -> String {
    tables.tunnels.get(&index).map_or_else(
        || format!("tunnel {index}"),
        |tunnel| format!("{}%{}", tunnel.vni.host() >> 8, tunnel.ifindex),
    )
}

/// `address/length` of a masked compare.
fn cidr(net: &PodNet) -> String {
    let ones: u32 = net.mask.0.iter().map(|byte| byte.count_ones()).sum();
    match net.net.to_ip() {
        std::net::IpAddr::V4(v4) => format!("{v4}/{}", ones.saturating_sub(96)),
        std::net::IpAddr::V6(v6) => format!("{v6}/{ones}"),
    }
}
