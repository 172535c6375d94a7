//! Links, addresses, routes, neighbours and FDB entries as the kernel has them, read at once.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use sluice_abi::Mac;

use super::xdp_features::{self, XdpFeatures};
use crate::netlink::{Netlink, NetlinkError};

/// A vxlan device's own settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VxlanSettings {
    /// VNI; 0 for a device without one of its own.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Underlay address.
    pub local: Option<IpAddr>,
    /// Device below.
    pub lower: Option<u32>,
    /// The VNI comes with each packet (`external`).
    pub external: bool,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// MAC; zero where there is none.
    pub mac: Mac,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback device.
    pub loopback: bool,
    /// Kernel's word for the kind; empty for physical devices.
    pub kind: String,
    /// Settings of a vxlan device.
    pub vxlan: Option<VxlanSettings>,
    /// The other end of a veth.
    pub peer: Option<u32>,
    /// Namespace of the other end, as this namespace numbers it.
    pub peer_netns: Option<i32>,
    /// Device of this namespace on which it stands: a VLAN's or a macvlan's.
    pub below: Option<u32>,
    /// Bridge or bond that it belongs to.
    pub controller: Option<u32>,
    /// XDP programs: id and mode word.
    pub xdp: Vec<(u32, &'static str)>,
    /// What the device says about XDP; nothing on kernels before 6.3.
    pub xdp_features: Option<XdpFeatures>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub destination: IpNet,
    /// Gateway, if there is one.
    pub gateway: Option<IpAddr>,
    /// Exit interface.
    pub ifindex: u32,
}

/// A neighbour or an FDB entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Interface.
    pub ifindex: u32,
    /// Its address; for an FDB entry the underlay address of the tunnel end.
    pub address: IpAddr,
    /// Its MAC.
    pub mac: Mac,
    /// The kernel would ask before it uses the MAC again.
    pub stale: bool,
}

/// Everything at one moment (nearly: each table is read at once, one after the other; a change in
/// between is news and leads to another reading).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses: interface, address, prefix length, whether it is of global scope.
    pub addresses: Vec<(u32, IpAddr, u8, bool)>,
    /// Unicast routes of the main table.
    pub routes: Vec<Route>,
    /// Neighbours with a known MAC.
    pub neighbours: Vec<Neighbour>,
    /// FDB entries of vxlan devices.
    pub fdb: Vec<Neighbour>,
}

impl Kernel {
    /// Reads everything in the network namespace of `netlink`.
    ///
    /// # Errors
    /// When one table cannot be read: then nothing is known, not "nothing is there".
    pub fn read(netlink: &mut Netlink) -> Result<Self, NetlinkError> {
        let mut kernel = Kernel::default();
        for answer in netlink.dump("links", RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(message) = answer {
                let link = link(message);
                kernel.links.insert(link.ifindex, link);
            }
        }
        match xdp_features::read() {
            Ok(features) => {
                for (ifindex, features) in features {
                    if let Some(link) = kernel.links.get_mut(&ifindex) {
                        link.xdp_features = Some(features);
                    }
                }
            }
            Err(e) => tracing::debug!("XDP features of devices: {e}"),
        }
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        for answer in netlink.dump("addresses", question)? {
            if let RouteNetlinkMessage::NewAddress(message) = answer {
                kernel.addresses.extend(address(&message));
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            for answer in netlink.dump("routes", RouteNetlinkMessage::GetRoute(message))? {
                if let RouteNetlinkMessage::NewRoute(message) = answer {
                    kernel.routes.extend(routes(&message));
                }
            }
            let mut message = NeighbourMessage::default();
            message.header.family = family;
            for answer in netlink.dump("neighbours", RouteNetlinkMessage::GetNeighbour(message))? {
                if let RouteNetlinkMessage::NewNeighbour(message) = answer {
                    kernel.neighbours.extend(neighbour(&message));
                }
            }
        }
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        for answer in netlink.dump("FDB", RouteNetlinkMessage::GetNeighbour(message))? {
            if let RouteNetlinkMessage::NewNeighbour(message) = answer {
                kernel.fdb.extend(fdb(&message));
            }
        }
        Ok(kernel)
    }

    /// The interface called `name`.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|l| l.name == name)
    }

    /// MAC of a neighbour, and whether the kernel would ask again.
    pub fn neighbour(&self, ifindex: u32, address: IpAddr) -> Option<(Mac, bool)> {
        self.neighbours
            .iter()
            .find(|n| n.ifindex == ifindex && n.address == address)
            .map(|n| (n.mac, n.stale))
    }
}

/// Exit of a destination as the kernel's routes have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Interface.
    pub ifindex: u32,
    /// Address whose MAC the frame carries.
    pub neighbour: IpAddr,
    /// Largest IP packet that the route allows, where it says so: a limit of its own, or what the
    /// kernel has learnt about the path (RFC 1191, RFC 8201) and not forgotten yet.
    pub mtu: Option<u32>,
    /// Source address that the kernel would take.
    pub source: Option<IpAddr>,
}

/// Asks the kernel for the route to `destination`; `None` where there is no unicast one.
pub fn route_to(netlink: &mut Netlink, destination: IpAddr) -> Option<Exit> {
    let mut message = RouteMessage::default();
    let (family, length, address) = match destination {
        IpAddr::V4(v4) => (AddressFamily::Inet, 32, RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(v6)),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = length;
    message.attributes.push(RouteAttribute::Destination(address));
    let answer = netlink.get("route", RouteNetlinkMessage::GetRoute(message)).ok()??;
    let RouteNetlinkMessage::NewRoute(message) = answer else {
        return None;
    };
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut exit = Exit { ifindex: 0, neighbour: destination, mtu: None, source: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => exit.ifindex = *index,
            RouteAttribute::Gateway(gateway) => exit.neighbour = ip(gateway)?,
            RouteAttribute::Via(via) => exit.neighbour = ip_via(via)?,
            RouteAttribute::PrefSource(source) => exit.source = ip(source),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        exit.mtu = Some(*mtu).filter(|m| *m > 0);
                    }
                }
            }
            _ => {}
        }
    }
    (exit.ifindex != 0).then_some(exit)
}

/// Makes the kernel find out a neighbour's MAC, or check one that it has (as `ip neigh ... use`).
pub fn resolve(netlink: &mut Netlink, ifindex: u32, address: IpAddr) {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = ifindex;
    message.header.flags = NeighbourFlags::Use;
    message.header.state = NeighbourState::None;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }));
    if let Err(e) = netlink.create(RouteNetlinkMessage::NewNeighbour(message)) {
        tracing::debug!("{address} on interface {ifindex}: {e}");
    }
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

/// One interface from its message.
pub(crate) fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    let mut lower = None;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = mac(&bytes).unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => lower = Some(index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Xdp(xdp) => {
                for entry in xdp {
                    match entry {
                        LinkXdp::DrvProgId(id) => link.xdp.push((id, "native")),
                        LinkXdp::SkbProgId(id) => link.xdp.push((id, "generic")),
                        LinkXdp::HwProgId(id) => link.xdp.push((id, "offload")),
                        _ => {}
                    }
                }
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind_word(&kind),
                        LinkInfo::Data(InfoData::Vxlan(data)) => link.vxlan = Some(vxlan(&data)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if link.kind == "veth" || link.kind == "netkit" {
        link.peer = lower;
    }
    if matches!(link.kind.as_str(), "vlan" | "macvlan" | "macvtap" | "ipvlan")
        && link.peer_netns.is_none()
    {
        link.below = lower;
    }
    link
}

fn kind_word(kind: &InfoKind) -> String {
    kind.to_string()
}

fn vxlan(data: &[InfoVxlan]) -> VxlanSettings {
    let mut settings = VxlanSettings::default();
    for item in data {
        match item {
            InfoVxlan::Id(vni) => settings.vni = *vni,
            InfoVxlan::Port(port) => settings.port = *port,
            InfoVxlan::Local(v4) if !v4.is_unspecified() => settings.local = Some((*v4).into()),
            InfoVxlan::Local6(v6) if !v6.is_unspecified() => settings.local = Some((*v6).into()),
            InfoVxlan::Link(index) => settings.lower = Some(*index),
            InfoVxlan::CollectMetadata(external) => settings.external = *external,
            _ => {}
        }
    }
    settings
}

fn address(message: &AddressMessage) -> Option<(u32, IpAddr, u8, bool)> {
    // IFA_LOCAL is the own address where IFA_ADDRESS is the peer's (point-to-point).
    let mut own = None;
    let mut fallback = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => own = Some(*ip),
            AddressAttribute::Address(ip) => fallback = Some(*ip),
            _ => {}
        }
    }
    let global = matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
    Some((message.header.index, own.or(fallback)?, message.header.prefix_len, global))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn ip_via(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(v4) => Some((*v4).into()),
        RouteVia::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// RT_TABLE_MAIN (include/uapi/linux/rtnetlink.h).
const MAIN_TABLE: u32 = 254;

fn routes(message: &RouteMessage) -> Vec<Route> {
    if message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let mut table = u32::from(message.header.table);
    let mut destination = None;
    let mut gateway = None;
    let mut exits: Vec<(u32, Option<IpAddr>)> = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(via) => gateway = ip_via(via),
            RouteAttribute::Oif(index) => exits.push((*index, None)),
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    let via = hop.attributes.iter().find_map(|a| match a {
                        RouteAttribute::Gateway(address) => ip(address),
                        RouteAttribute::Via(via) => ip_via(via),
                        _ => None,
                    });
                    exits.push((hop.interface_index, via));
                }
            }
            _ => {}
        }
    }
    if table != MAIN_TABLE {
        return Vec::new();
    }
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0u8; 16]),
        _ => return Vec::new(),
    };
    let Ok(destination) =
        IpNet::new(destination.unwrap_or(any), message.header.destination_prefix_length)
    else {
        return Vec::new();
    };
    exits
        .into_iter()
        .map(|(ifindex, via)| Route { destination, gateway: via.or(gateway), ifindex })
        .collect()
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let stale = match message.header.state {
        NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => false,
        NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe => true,
        _ => return None,
    };
    entry(message, stale)
}

fn fdb(message: &NeighbourMessage) -> Option<Neighbour> {
    // The entry of a vxlan device itself, not of a bridge that it is a port of.
    message.header.flags.contains(NeighbourFlags::Own).then(|| entry(message, false))?
}

fn entry(message: &NeighbourMessage, stale: bool) -> Option<Neighbour> {
    let mut address = None;
    let mut lladdr = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::from(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::from(*v6));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                // AF_BRIDGE does not say which family the underlay has; the length does.
                address = match bytes.len() {
                    4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
                    16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
                    _ => None,
                };
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(bytes),
            _ => {}
        }
    }
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address: address?,
        mac: lladdr.filter(|m| !m.is_zero() && !m.is_group())?,
        stale,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_and_macvlans_of_this_namespace_stand_on_their_device() {
        let of = |kind: InfoKind, elsewhere: bool| {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::Link(7));
            message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
            if elsewhere {
                message.attributes.push(LinkAttribute::LinkNetNsId(1));
            }
            let link = link(message);
            (link.below, link.peer)
        };
        for kind in [InfoKind::Vlan, InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan] {
            assert_eq!(of(kind.clone(), false), (Some(7), None), "{kind}");
            assert_eq!(of(kind, true), (None, None));
        }
        assert_eq!(of(InfoKind::Vxlan, false), (None, None));
        assert_eq!(of(InfoKind::Veth, false), (None, Some(7)));
    }
}
