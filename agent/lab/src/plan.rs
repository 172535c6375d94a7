//! Every name and address of a lab, as a pure function of its specification.
//!
//! Addresses are the documentation ranges of RFC 5737 and RFC 3849 outside, and the ranges that
//! kubeadm and Flannel users know inside. All labs use the same ones: namespaces keep them apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{Agent, Family, LabName, LabSpec, Netns, PodSpec};

/// A node's interface to the fabric.
pub const UPLINK: &str = "uplink0";
/// A node's VXLAN device.
pub const VXLAN_DEVICE: &str = "vxlan1";
/// The interface of a pod and of the client.
pub const HOST_INTERFACE: &str = "eth0";
/// The fabric's bridge.
pub const BRIDGE: &str = "br0";
/// MTU of the underlay, bytes.
pub const UNDERLAY_MTU: u16 = 1500;
/// The client's addresses.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
/// The client's IPv6 address.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
/// Address ranges that the client reaches by way of node1: LoadBalancer addresses, external IPs
/// and ClusterIPs.
pub const SERVICE_CIDRS: [&str; 6] = [
    "203.0.113.0/24",
    "2001:db8:203::/64",
    "198.51.100.0/24",
    "2001:db8:198::/64",
    "10.96.0.0/16",
    "fd00:10:96::/112",
];
/// The next hop that pods use; no interface has it, a permanent neighbour stands for it.
pub const POD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// MAC address of the node's end of every pod's veth.
pub const POD_GATEWAY_MAC: Mac = Mac([0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);

/// An Ethernet address, in the order of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A locally administered address: kind, node, index.
fn mac(kind: u8, node: usize, index: usize) -> Mac {
    // The specification allows 9 nodes of 200 pods: both fit one byte.
    Mac([0x02, 0x53, 0x4c, kind, node as u8, index as u8])
}

/// A lab's names and addresses.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The fabric's namespace.
    pub fabric: Netns,
    /// The client outside the cluster.
    pub client: ClientPlan,
    /// The nodes, node1 first.
    pub nodes: Vec<NodePlan>,
}

/// The client.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    /// Its namespace.
    pub netns: Netns,
    /// MAC address of its `eth0`.
    pub mac: Mac,
}

/// A node.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// Its name, also the Kubernetes Node's.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Counted from 1.
    pub number: usize,
    /// Address on the underlay, the Node's InternalIP.
    pub address_v4: Ipv4Addr,
    /// The same for IPv6.
    pub address_v6: Ipv6Addr,
    /// Its pod CIDR.
    pub pod_cidr_v4: Ipv4Net,
    /// The same for IPv6.
    pub pod_cidr_v6: Ipv6Net,
    /// MAC address of its uplink.
    pub uplink_mac: Mac,
    /// MAC address of its VXLAN device.
    pub vxlan_mac: Mac,
    /// What works there beside the kernel.
    pub agent: Agent,
    /// Its pods.
    pub pods: Vec<PodPlan>,
}

impl NodePlan {
    /// Address of its VXLAN device: the first of the pod CIDR.
    pub fn tunnel_v4(&self) -> Ipv4Addr {
        self.pod_cidr_v4.network()
    }

    /// The same for IPv6.
    pub fn tunnel_v6(&self) -> Ipv6Addr {
        self.pod_cidr_v6.network()
    }

    /// Its underlay address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.address_v4.into(),
            Family::V6 => self.address_v6.into(),
        }
    }

    /// The fabric's end of its uplink.
    pub fn fabric_port(&self) -> String {
        format!("to-{}", self.name)
    }
}

/// A pod.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// The node's end of its veth.
    pub host_interface: String,
    /// Its address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// MAC address of its `eth0`.
    pub mac: Mac,
    /// What listens in it.
    pub spec: PodSpec,
}

impl PodPlan {
    /// Its address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// MTU of pods and VXLAN devices: what the outer headers leave of the underlay's.
pub fn pod_mtu(underlay: Family) -> u16 {
    // Outer IP (20 or 40), UDP 8, VXLAN 8, inner Ethernet 14.
    match underlay {
        Family::V4 => UNDERLAY_MTU - 50,
        Family::V6 => UNDERLAY_MTU - 70,
    }
}

/// What every namespace name of a lab begins with.
pub fn netns_prefix(lab: &LabName) -> String {
    format!("slab-{lab}-")
}

impl Plan {
    /// The plan of a lab.
    pub fn new(lab: &LabName, spec: &LabSpec) -> Self {
        let prefix = netns_prefix(lab);
        let netns = |host: &str| Netns::named(format!("{prefix}{host}"));
        let nodes = spec.nodes.iter().zip(1..).map(|(node, number)| {
            let name = format!("node{number}");
            let pods = node.pods.iter().zip(1..).map(|(pod, k)| {
                let name = match pod.name.as_str() {
                    "" => format!("pod{number}-{k}"),
                    name => name.to_owned(),
                };
                PodPlan {
                    netns: netns(&name),
                    name,
                    host_interface: format!("pod{k}"),
                    v4: pod_v4(number, k),
                    v6: pod_v6(number, k),
                    mac: mac(b'p', number, k),
                    spec: pod.clone(),
                }
            });
            NodePlan {
                netns: netns(&name),
                number,
                address_v4: Ipv4Addr::new(192, 0, 2, number as u8),
                address_v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number as u16),
                pod_cidr_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, number as u8, 0), 24),
                pod_cidr_v6: Ipv6Net::new_assert(pod_v6_prefix(number), 64),
                uplink_mac: mac(b'u', number, 0),
                vxlan_mac: mac(b'v', number, 0),
                agent: node.agent,
                pods: pods.collect(),
                name,
            }
        });
        Self {
            fabric: netns("fabric"),
            client: ClientPlan { netns: netns("client"), mac: mac(b'c', 0, 1) },
            nodes: nodes.collect(),
        }
    }

    /// Every namespace, with its host's name.
    pub fn hosts(&self) -> Vec<(&str, &Netns)> {
        let mut hosts = vec![("fabric", &self.fabric), ("client", &self.client.netns)];
        for node in &self.nodes {
            hosts.push((&node.name, &node.netns));
            hosts.extend(node.pods.iter().map(|pod| (pod.name.as_str(), &pod.netns)));
        }
        hosts
    }

    /// A pod by name, with its node.
    pub fn pod(&self, name: &str) -> Option<(&NodePlan, &PodPlan)> {
        self.nodes
            .iter()
            .find_map(|node| Some((node, node.pods.iter().find(|pod| pod.name == name)?)))
    }

    /// [`SERVICE_CIDRS`], parsed.
    pub fn service_cidrs() -> impl Iterator<Item = IpNet> {
        SERVICE_CIDRS.iter().filter_map(|text| text.parse().ok())
    }
}

fn pod_v4(node: usize, k: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node as u8, (10 + k) as u8)
}

fn pod_v6_prefix(node: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node as u16, 0, 0, 0, 0)
}

/// The last group is written with the digits of the IPv4 address's last byte (`::11` beside
/// `.11`), which a reader finds again.
fn pod_v6(node: usize, k: usize) -> Ipv6Addr {
    let last = 10 + k;
    let digits = ((last / 100) << 8) | ((last / 10 % 10) << 4) | (last % 10);
    let [a, b, c, d, ..] = pod_v6_prefix(node).segments();
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, digits as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_of_a_pod_end_in_the_same_digits() {
        let name: LabName = "t".parse().expect("legal");
        let plan = Plan::new(&name, &LabSpec::kernel_only(2, 120));
        let (_, pod) = plan.pod("pod2-117").expect("it has 120 pods");
        assert_eq!(pod.v4.to_string(), "10.244.2.127");
        assert_eq!(pod.v6.to_string(), "fd00:10:244:2::127");
    }

    #[test]
    fn every_service_cidr_parses() {
        assert_eq!(Plan::service_cidrs().count(), SERVICE_CIDRS.len());
    }

    #[test]
    fn addresses_and_macs_are_unique() {
        let name: LabName = "t".parse().expect("legal");
        let plan = Plan::new(&name, &LabSpec::kernel_only(9, 200));
        let mut seen = std::collections::HashSet::new();
        for node in &plan.nodes {
            assert!(seen.insert(node.uplink_mac.to_string()));
            assert!(seen.insert(node.vxlan_mac.to_string()));
            for pod in &node.pods {
                assert!(seen.insert(pod.mac.to_string()));
                assert!(seen.insert(pod.v4.to_string()));
                assert!(seen.insert(pod.v6.to_string()));
            }
        }
    }
}
