//! From ids in the maps back to Kubernetes names. The runtime writes this beside the pins, the
//! command line reads it; the next start keeps its ids by it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Names of everything that has an id.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Names {
    /// Service id to Service port.
    pub services: BTreeMap<u32, String>,
    /// Backend id to endpoint.
    pub backends: BTreeMap<u32, BackendName>,
    /// VTEP index to node.
    pub vteps: BTreeMap<u32, VtepLabel>,
    /// Next hop index to the destination that it leads to.
    pub next_hops: BTreeMap<u32, IpAddr>,
}

/// What a backend id stands for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackendName {
    /// `address:port/protocol`.
    pub endpoint: String,
    /// `namespace/name` of the pod, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Its node, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// What a VTEP index stands for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VtepLabel {
    /// VNI.
    pub vni: u32,
    /// Underlay address.
    pub remote: IpAddr,
    /// Its node, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}
