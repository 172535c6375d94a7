//! What a lab shall be: read from the command line or written by a test, checked once.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::LabError;

/// Name of a lab: 1 to 16 lower-case letters and digits. No hyphen, so that no lab's name is the
/// beginning of another's namespace names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabName {
    type Err = LabError;

    fn from_str(text: &str) -> Result<Self, LabError> {
        let legal = (1..=16).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if legal {
            return Ok(Self(text.to_owned()));
        }
        Err(LabError::Spec {
            field: "name",
            value: text.to_owned(),
            remedy: "1 to 16 lower-case letters and digits".to_owned(),
        })
    }
}

impl TryFrom<String> for LabName {
    type Error = LabError;

    fn try_from(text: String) -> Result<Self, LabError> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How `sluice run` attaches to the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In the driver (DRV).
    Native,
    /// On the kernel's packet buffer (SKB).
    Generic,
    /// Without XDP, at TC.
    Tc,
    /// What the agent chooses.
    Auto,
}

impl Mode {
    /// The word of the configuration file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tc => "tc",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What works on a node beside the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Agent {
    /// Nothing: a peer node that runs no code of ours.
    None,
    /// `sluice run`.
    Sluice {
        /// Its attach mode.
        mode: Mode,
    },
}

/// The reverse path filter of the nodes (net.ipv4.conf.*.rp_filter).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum RpFilter {
    /// Off.
    #[value(name = "0")]
    Off,
    /// RFC 3704 strict: a packet whose source is not routed back out of the device it came in by
    /// is dropped.
    #[value(name = "1")]
    Strict,
    /// RFC 3704 loose: the source must be routed somewhere.
    #[value(name = "2")]
    Loose,
}

impl RpFilter {
    /// The sysctl's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "0",
            Self::Strict => "1",
            Self::Loose => "2",
        }
    }
}

/// A pod and what listens in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Its name, also the host's name in the lab; `pod<node>-<k>` if empty.
    pub name: String,
    /// Ports of the HTTP server.
    pub tcp_ports: Vec<u16>,
    /// Ports of the UDP echo.
    pub udp_ports: Vec<u16>,
}

/// A node and its pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// What works there beside the kernel.
    pub agent: Agent,
    /// Its pods; the k-th (from 1) has the address `10.244.<node>.<10+k>`.
    pub pods: Vec<PodSpec>,
}

/// A whole lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabSpec {
    /// Its name; a short random one if none is given.
    pub name: Option<LabName>,
    /// The nodes, 1 to 9; the first is `node1`.
    pub nodes: Vec<NodeSpec>,
    /// Family of the tunnel's outer header.
    pub underlay: Family,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP destination port of the tunnel: 8472 as Flannel, 4789 as RFC 7348.
    pub vxlan_port: u16,
    /// Reverse path filter of the nodes.
    pub rp_filter: RpFilter,
    /// MTU of the client's interface, bytes.
    pub client_mtu: u16,
    /// GRO at the pods' end of their veth: without it (and without an XDP program there) frames
    /// that XDP redirects into the pod are lost in silence.
    pub pod_gro: bool,
    /// An XDP program at the fabric's end of the uplinks: without it what a node sends by XDP_TX
    /// is lost in silence.
    pub fabric_xdp: bool,
    /// Whether nodes with an IPv6 underlay take a zero UDP checksum in the outer header
    /// (RFC 6935); Flannel's device does not.
    pub udp6_zero_checksum: bool,
    /// Whether hosts keep their offloads: they then send segments larger than the MTU and leave
    /// checksums open, and the fabric's ports cut and sum, as a NIC would do it before the wire.
    pub offloads: bool,
    /// Start the pods' servers.
    pub servers: bool,
}

/// What pods listen on if nothing is said: the ports of an HTTP and of a name server that need no
/// privilege elsewhere.
const DEFAULT_TCP_PORT: u16 = 8080;
const DEFAULT_UDP_PORT: u16 = 5353;

impl LabSpec {
    /// `nodes` nodes without agent, each with `pods` pods that serve TCP 8080 and UDP 5353.
    pub fn kernel_only(nodes: usize, pods: usize) -> Self {
        let pod = PodSpec {
            name: String::new(),
            tcp_ports: vec![DEFAULT_TCP_PORT],
            udp_ports: vec![DEFAULT_UDP_PORT],
        };
        let node = NodeSpec { agent: Agent::None, pods: vec![pod; pods] };
        Self {
            name: None,
            nodes: vec![node; nodes],
            underlay: Family::V4,
            vni: 1,
            vxlan_port: 8472,
            rp_filter: RpFilter::Off,
            client_mtu: 1450,
            pod_gro: true,
            fabric_xdp: true,
            udp6_zero_checksum: false,
            offloads: false,
            servers: true,
        }
    }

    /// The same with `sluice run` on node1.
    pub fn with_agent(nodes: usize, pods: usize, mode: Mode) -> Self {
        let mut spec = Self::kernel_only(nodes, pods);
        if let Some(first) = spec.nodes.first_mut() {
            first.agent = Agent::Sluice { mode };
        }
        spec
    }

    /// Checks every number against its legal range.
    ///
    /// # Errors
    /// [`LabError::Spec`] with the first field that is out of range.
    pub fn check(&self) -> Result<(), LabError> {
        let refuse = |field, value: String, remedy: &str| {
            Err(LabError::Spec { field, value, remedy: remedy.to_owned() })
        };
        if !(1..=9).contains(&self.nodes.len()) {
            return refuse("nodes", self.nodes.len().to_string(), "1 to 9 nodes");
        }
        for node in &self.nodes {
            // The last byte of a pod's address is 10 + k.
            if node.pods.len() > 200 {
                return refuse("pods", node.pods.len().to_string(), "at most 200 pods per node");
            }
        }
        if self.vni >= 1 << 24 {
            return refuse("vni", self.vni.to_string(), "0 to 16777215 (RFC 7348 section 5)");
        }
        if self.vxlan_port == 0 {
            return refuse("vxlan-port", "0".to_owned(), "1 to 65535");
        }
        // RFC 8200 section 5: an IPv6 link carries at least 1280 bytes.
        if !(1280..=1500).contains(&self.client_mtu) {
            return refuse("client-mtu", self.client_mtu.to_string(), "1280 to 1500 bytes");
        }
        let mut names: Vec<&str> =
            self.nodes.iter().flat_map(|n| &n.pods).map(|p| p.name.as_str()).collect();
        names.retain(|name| !name.is_empty());
        names.sort_unstable();
        for (name, next) in names.iter().zip(names.iter().skip(1)) {
            if name == next {
                return refuse("pod name", (*name).to_owned(), "names must differ");
            }
        }
        for name in names {
            let legal = name.len() <= 40
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if !legal || name == "client" || name == "fabric" || name.starts_with("node") {
                let remedy = "at most 40 lower-case letters, digits and hyphens; \
                              not client, fabric or node...";
                return refuse("pod name", name.to_owned(), remedy);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lab_names_with_a_hyphen_are_refused() {
        for bad in ["", "a-b", "A", "a b", "aaaaaaaaaaaaaaaaa", "a/b"] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
        assert!("demo1".parse::<LabName>().is_ok());
    }

    #[test]
    fn pods_of_one_name_are_refused() {
        let mut spec = LabSpec::kernel_only(2, 1);
        assert!(spec.check().is_ok());
        for node in &mut spec.nodes {
            for pod in &mut node.pods {
                pod.name = "cart".to_owned();
            }
        }
        assert!(spec.check().is_err());
    }
}
