//! Facts of this node, from netlink and from the configuration. The runtime fills them in; tests
//! read them from a file.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sluice_abi::{Delivery, Mac};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{ObjectName, mac_text};

/// Whether another Service proxy works beside us.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// kube-proxy is there; what we do not know passes.
    #[default]
    Accelerate,
    /// We are the proxy.
    Replace,
}

/// A vxlan device of this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunnelFacts {
    /// Name of the device, for messages.
    pub name: String,
    /// VNI, 24 bits.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Interface index, 0 where there is no kernel device.
    #[serde(default)]
    pub ifindex: u32,
    /// MAC of the device: inner source of what we send.
    #[serde(with = "mac_text")]
    pub mac: Mac,
    /// Own underlay address: the only outer destination that is decapsulated.
    pub underlay: IpAddr,
    /// Own IPv4 address inside our own pod CIDR: SNAT source of tunnelled requests.
    #[serde(default)]
    pub inner_v4: Option<IpAddr>,
    /// The same for IPv6.
    #[serde(default)]
    pub inner_v6: Option<IpAddr>,
}

/// A tunnel end of another node as the kernel knows it: routes (pod CIDR via gateway), neighbours
/// (gateway to MAC) and FDB (MAC to underlay address) of one vxlan device, joined.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerFacts {
    /// VNI of the device.
    pub vni: u32,
    /// Underlay address of the peer.
    pub remote: IpAddr,
    /// MAC of the peer's vxlan device.
    #[serde(with = "mac_text")]
    pub mac: Mac,
    /// Pod CIDRs routed to it.
    #[serde(default)]
    pub pod_cidrs: Vec<IpNet>,
}

/// How frames leave towards one destination address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum NextHopFacts {
    /// Route and neighbour are known.
    Resolved {
        /// Exit interface.
        ifindex: u32,
        /// Largest IP packet in bytes.
        mtu: u32,
        /// MAC of the neighbour.
        #[serde(with = "mac_text")]
        dst_mac: Mac,
        /// MAC of the exit interface.
        #[serde(with = "mac_text")]
        src_mac: Mac,
    },
    /// There is a route, but the neighbour has not answered yet: packets are dropped with a
    /// counted reason until it does, so that a short silence does not reshuffle backends.
    Unresolved {},
}

/// A pod of this node as netlink knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodFacts {
    /// Host side interface.
    pub ifindex: u32,
    /// Frames may be redirected to the host side (the pod's end was checked).
    #[serde(default)]
    pub redirect: bool,
    /// Frames that may be redirected are handed to the pod's end by TC.
    #[serde(default)]
    pub peer: bool,
    /// The pod's own MAC.
    #[serde(with = "mac_text")]
    pub pod_mac: Mac,
    /// The host side's MAC.
    #[serde(with = "mac_text")]
    pub host_mac: Mac,
    /// Largest IP packet in bytes that both ends take; 0 if that is not known.
    #[serde(default)]
    pub mtu: u32,
}

impl PodFacts {
    /// The method of delivery.
    pub fn delivery(&self) -> Delivery {
        match (self.redirect, self.peer) {
            (false, _) => Delivery::Stack,
            (true, false) => Delivery::Redirect,
            (true, true) => Delivery::Peer,
        }
    }
}

/// How consistent-hash tables are made. Equal on every node of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaglevSettings {
    /// Entries of one table at most.
    pub max_size: u32,
    /// Secret of the cluster.
    pub cluster_seed: u64,
}

impl Default for MaglevSettings {
    fn default() -> Self {
        Self {
            // Prime; 100 entries for each of 163 backends, 64 KiB.
            max_size: 16_381,
            cluster_seed: 0,
        }
    }
}

/// Ports of this cluster's nodes that are never captured.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FailSafe {
    /// TCP ports.
    pub tcp: BTreeSet<u16>,
    /// UDP ports.
    pub udp: BTreeSet<u16>,
}

impl Default for FailSafe {
    /// SSH, API server, etcd, kubelet.
    fn default() -> Self {
        Self { tcp: BTreeSet::from([22, 2379, 2380, 6443, 10250]), udp: BTreeSet::new() }
    }
}

/// DSCP (RFC 2474) of the outer headers of tunnelled packets. Written as a number or `inherit`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "DscpText", into = "DscpText")]
pub enum OuterDscp {
    /// That of the packet inside.
    Inherit,
    /// This one, 0 to 63.
    Value(u8),
}

impl Default for OuterDscp {
    /// As the kernel's vxlan device sends by default.
    fn default() -> Self {
        Self::Value(0)
    }
}

/// How a DSCP is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum DscpText {
    Number(i64),
    Word(String),
}

impl TryFrom<DscpText> for OuterDscp {
    type Error = String;

    fn try_from(text: DscpText) -> Result<Self, String> {
        match text {
            DscpText::Number(n) => u8::try_from(n)
                .ok()
                .filter(|n| *n < 64)
                .map(Self::Value)
                .ok_or(format!("{n} is no DSCP; write a number from 0 to 63 or \"inherit\"")),
            DscpText::Word(word) if word == "inherit" => Ok(Self::Inherit),
            DscpText::Word(word) => {
                Err(format!("{word:?} is no DSCP; write a number from 0 to 63 or \"inherit\""))
            }
        }
    }
}

impl From<OuterDscp> for DscpText {
    fn from(dscp: OuterDscp) -> Self {
        match dscp {
            OuterDscp::Inherit => Self::Word("inherit".to_owned()),
            OuterDscp::Value(n) => Self::Number(n.into()),
        }
    }
}

/// Everything about this node that compiling needs.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeContext {
    /// Our own Node's name.
    pub node_name: Arc<str>,
    /// Mode.
    pub mode: Mode,
    /// Own addresses of every kind except loopback.
    pub addresses: BTreeSet<IpAddr>,
    /// Own addresses that answer node ports.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// Own pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Own vxlan devices.
    pub tunnels: Vec<TunnelFacts>,
    /// DSCP of what we tunnel.
    pub outer_dscp: OuterDscp,
    /// Tunnel ends of other nodes from the kernel; those from Node objects are added by compile.
    pub peers: Vec<PeerFacts>,
    /// How to reach the addresses of [`crate::wanted_next_hops`].
    pub next_hops: BTreeMap<IpAddr, NextHopFacts>,
    /// Pods of this node.
    pub pods: BTreeMap<IpAddr, PodFacts>,
    /// Where the API servers listen: never captured.
    pub api_servers: BTreeSet<SocketAddr>,
    /// Consistent-hash tables.
    pub maglev: MaglevSettings,
    /// Ports that are never captured.
    pub fail_safe: FailSafe,
    /// First and last port that this node's SNAT takes.
    pub snat_ports: Option<(u16, u16)>,
    /// Services that the configuration opts out.
    pub opt_out: BTreeSet<ObjectName>,
}
