//! Objects of the cluster, validated: addresses parse and fit their family, ports are not zero,
//! defaults of the API server are applied.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sluice_abi::{Family, IPPROTO_TCP, IPPROTO_UDP, Mac};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::Skipped;

/// Namespace and name of an object; `namespace/name` as text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectName {
    /// Namespace; `default` where a manifest names none.
    pub namespace: Arc<str>,
    /// Name within the namespace.
    pub name: Arc<str>,
}

impl ObjectName {
    /// `namespace/name`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self::new(namespace, name))
            }
            _ => Err(format!("`{text}` is not `namespace/name`")),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Transport protocols that Sluice translates.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP (RFC 9293).
    Tcp,
    /// UDP (RFC 768).
    Udp,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => IPPROTO_TCP,
            Protocol::Udp => IPPROTO_UDP,
        }
    }

    /// The protocol of a number in a table.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            IPPROTO_TCP => Some(Protocol::Tcp),
            IPPROTO_UDP => Some(Protocol::Udp),
            _ => None,
        }
    }

    /// Lower case word.
    pub const fn label(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Address, port and protocol: what a frontend or a backend is known by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Tuple {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { addr, port, protocol } = self;
        match addr {
            IpAddr::V4(v4) => write!(f, "{v4}:{port}/{protocol}"),
            IpAddr::V6(v6) => write!(f, "[{v6}]:{port}/{protocol}"),
        }
    }
}

/// A port of a Service: what has a service id and counters. `namespace/name:port` as text, where
/// port is its name, or its number where it has no name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePortName {
    /// The Service.
    pub service: ObjectName,
    /// Port name or number.
    pub port: Arc<str>,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// One port of a Service. The target port stands in the endpoint slices.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ServicePort {
    /// Name that joins it with the ports of slices; empty for the only, unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on ClusterIP, LoadBalancer and external IPs.
    pub port: NonZeroU16,
    /// Port on the nodes.
    pub node_port: Option<NonZeroU16>,
}

impl ServicePort {
    /// Its name together with the Service's.
    pub fn full_name(&self, service: &ObjectName) -> ServicePortName {
        ServicePortName {
            service: service.clone(),
            port: if self.name.is_empty() {
                self.port.to_string().into()
            } else {
                self.name.clone()
            },
        }
    }
}

/// A Service that can be programmed: neither headless nor ExternalName nor for another proxy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// File or API source, for messages.
    pub origin: Arc<str>,
    /// Creation time in seconds since the epoch; `None` in manifests. Decides between Services
    /// that claim one address.
    pub created: Option<i64>,
    /// Annotation `sluice.dev/opt-out: "true"`.
    pub opt_out: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Session affinity by client address in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// ClusterIPs; empty until the API server gave one.
    pub cluster_ips: Vec<IpAddr>,
    /// External IPs.
    pub external_ips: Vec<IpAddr>,
    /// LoadBalancer ingress IPs with ipMode VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// LoadBalancer ingress IPs that are left to the kernel or to the load balancer itself.
    pub uncaptured_ips: Vec<IpAddr>,
    /// Ports, in the order of the manifest.
    pub ports: Vec<ServicePort>,
}

/// One port of an endpoint slice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct EndpointPort {
    /// Name, equal to the Service port's.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Target port.
    pub port: NonZeroU16,
}

/// One endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Its first address.
    pub address: IpAddr,
    /// Node that runs it.
    pub node: Option<Arc<str>>,
    /// Pod behind it (`targetRef`).
    pub pod: Option<ObjectName>,
    /// Condition; absent means true.
    pub ready: bool,
    /// Condition; absent means true.
    pub serving: bool,
    /// Condition; absent means false.
    pub terminating: bool,
}

/// An EndpointSlice that belongs to a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: ObjectName,
    /// File or API source, for messages.
    pub origin: Arc<str>,
    /// The Service (label `kubernetes.io/service-name`).
    pub service: ObjectName,
    /// Family of all its endpoints.
    pub family: Family,
    /// Ports of every endpoint.
    pub ports: Vec<EndpointPort>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A tunnel end as a Node's annotations state it (Flannel).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeTunnel {
    /// VNI.
    pub vni: u32,
    /// MAC of the node's vxlan device.
    pub mac: Mac,
    /// Underlay address.
    pub underlay: IpAddr,
}

/// A Node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// File or API source, for messages.
    pub origin: Arc<str>,
    /// InternalIP and ExternalIP addresses.
    pub addresses: Vec<IpAddr>,
    /// Pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Tunnel ends from annotations, one per underlay family.
    pub tunnels: Vec<NodeTunnel>,
}

/// A Pod, for names only: endpoints come from slices, interfaces from netlink.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// File or API source, for messages.
    pub origin: Arc<str>,
    /// Node that it runs on.
    pub node: Option<Arc<str>>,
    /// Its addresses are its node's.
    pub host_network: bool,
    /// Pod addresses.
    pub addresses: Vec<IpAddr>,
}

/// One validated object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// A Node.
    Node(Node),
    /// A Pod.
    Pod(Pod),
}

impl Object {
    /// `Kind namespace/name`.
    pub fn title(&self) -> String {
        match self {
            Object::Service(o) => format!("Service {}", o.name),
            Object::EndpointSlice(o) => format!("EndpointSlice {}", o.name),
            Object::Node(o) => format!("Node {}", o.name),
            Object::Pod(o) => format!("Pod {}", o.name),
        }
    }

    fn origin(&self) -> &Arc<str> {
        match self {
            Object::Service(o) => &o.origin,
            Object::EndpointSlice(o) => &o.origin,
            Object::Node(o) => &o.origin,
            Object::Pod(o) => &o.origin,
        }
    }
}

/// All objects at one moment. Immutable once it is shared as `Arc<Snapshot>`; a clone copies
/// pointers, not objects.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Services by name.
    pub services: BTreeMap<ObjectName, Arc<Service>>,
    /// Endpoint slices by their own name.
    pub slices: BTreeMap<ObjectName, Arc<EndpointSlice>>,
    /// Nodes by name.
    pub nodes: BTreeMap<Arc<str>, Arc<Node>>,
    /// Pods by name.
    pub pods: BTreeMap<ObjectName, Arc<Pod>>,
}

impl Snapshot {
    /// Adds `objects`. Of two objects with one name the first stays; for a stable choice give
    /// the files in the order of their names. Returns the others.
    pub fn extend(&mut self, objects: impl IntoIterator<Item = Object>) -> Vec<Skipped> {
        let mut skipped = Vec::new();
        for object in objects {
            let (title, origin) = (object.title(), object.origin().clone());
            let first = match object {
                Object::Service(o) => insert(&mut self.services, o.name.clone(), o, |o| &o.origin),
                Object::EndpointSlice(o) => {
                    insert(&mut self.slices, o.name.clone(), o, |o| &o.origin)
                }
                Object::Node(o) => insert(&mut self.nodes, o.name.clone(), o, |o| &o.origin),
                Object::Pod(o) => insert(&mut self.pods, o.name.clone(), o, |o| &o.origin),
            };
            if let Some(first) = first {
                skipped.push(
                    Skipped::error(title, format!("already defined in {first}"))
                        .within(origin)
                        .at("metadata.name")
                        .remedy("remove one of the two or rename it"),
                );
            }
        }
        skipped
    }
}

/// Inserts unless the name is taken; then returns the origin of the one that has it.
fn insert<K: Ord, V>(
    map: &mut BTreeMap<K, Arc<V>>,
    key: K,
    value: V,
    origin: impl Fn(&V) -> &Arc<str>,
) -> Option<Arc<str>> {
    use std::collections::btree_map::Entry;
    match map.entry(key) {
        Entry::Occupied(entry) => Some(origin(entry.get()).clone()),
        Entry::Vacant(entry) => {
            entry.insert(Arc::new(value));
            None
        }
    }
}
