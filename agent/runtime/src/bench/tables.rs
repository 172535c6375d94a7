//! The node that the scenarios run on: two tunnel peers (one over IPv4, one over IPv6), and per
//! family one Service with pods of this node and one with pods of the peer.

use std::collections::BTreeMap;

use sluice_abi::{
    Addr, Backend, Be16, Be32, Delivery, Extent, Family, Frontend, FrontendKey, IPPROTO_TCP, Mac,
    NextHop, Pod, PodNet, Route, Tunnel, Vtep, VtepKey, frontend_flags,
};

use super::packet::Outer;

/// Loopback: test-run's ingress interface, so also the node's uplink.
const UPLINK: u32 = 1;
/// Host sides of pods: never used, because test-run stops at the verdict.
const FIRST_POD_IFINDEX: u32 = 1000;
/// Pods of this node behind a Service.
const LOCAL_BACKENDS: u16 = 16;
/// Pods of the peer behind a Service.
const REMOTE_BACKENDS: u16 = 64;
/// Consistent-hash entries per backend (`sluice_control::maglev`).
const ENTRIES: [u32; 2] = [1601, 6421];
/// UDP port of the tunnels.
pub const VXLAN_PORT: u16 = 8472;
/// Port of the Services.
pub const SERVICE_PORT: u16 = 80;
/// Port of the backends.
pub const BACKEND_PORT: u16 = 8080;
const MTU: u32 = 1500;

/// Both families.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

const fn mac(n: u8) -> Mac {
    Mac([0x02, 0x51, 0x1c, 0xbe, 0x00, n])
}
/// The uplink.
pub const UPLINK_MAC: Mac = mac(1);
/// What is at the other end of the uplink's link.
pub const LINK_MAC: Mac = mac(2);
/// Our vxlan devices.
pub const TUNNEL_MAC: Mac = mac(3);
/// The peer's vxlan devices.
pub const PEER_MAC: Mac = mac(4);

const fn v4(b: [u8; 4]) -> Addr {
    Addr::from_v4(b)
}

/// `2001:db8:a:b::c`.
const fn v6(a: u16, b: u16, c: u16) -> Addr {
    let ([a, aa], [b, bb], [c, cc]) = (a.to_be_bytes(), b.to_be_bytes(), c.to_be_bytes());
    Addr([0x20, 0x01, 0x0d, 0xb8, a, aa, b, bb, 0, 0, 0, 0, 0, 0, c, cc])
}

const fn of(family: Family, four: Addr, six: Addr) -> Addr {
    match family {
        Family::V4 => four,
        Family::V6 => six,
    }
}

/// Clients outside the cluster. Each kind of connection has its own: connections of one client port
/// share a tag of the flow table, and the second one would pay for the first.
pub const fn client(family: Family, whose: Clients) -> Addr {
    let n = whose as u16;
    of(family, v4([100, 64 + n as u8, 0, 0]), v6(0x18, n, 0))
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clients {
    /// Those of backends on this node.
    Local,
    /// Those of backends on another node.
    Remote,
    /// Those that are never seen again.
    New,
}

/// Pods of the peer that are clients.
pub const fn peer_client(family: Family, new: bool) -> Addr {
    let n = new as u16;
    of(family, v4([10, 245 + n as u8, 0, 0]), v6(0x245, n, 0))
}

/// An address that is not the peer's to send from.
pub const fn forged(family: Family) -> Addr {
    of(family, v4([10, 250, 0, 0]), v6(0x250, 0, 0))
}

/// The Service with backends on this node.
pub const fn local_vip(family: Family) -> Addr {
    of(family, v4([203, 0, 113, 10]), v6(0x51, 0, 10))
}

/// The Service with backends on the peer.
pub const fn remote_vip(family: Family) -> Addr {
    of(family, v4([203, 0, 113, 11]), v6(0x51, 0, 11))
}

/// Nobody's address.
pub const fn elsewhere(family: Family) -> Addr {
    of(family, v4([203, 0, 113, 99]), v6(0x51, 0, 99))
}

/// Pod `n` of this node.
pub const fn pod(family: Family, n: u16) -> Addr {
    of(family, v4([10, 244, 1, 10 + n as u8]), v6(0x244, 1, 10 + n))
}

const fn peer_pod(family: Family, n: u16) -> Addr {
    of(family, v4([10, 244, 2, 10 + n as u8]), v6(0x244, 2, 10 + n))
}

const fn node(family: Family) -> Addr {
    of(family, v4([192, 0, 2, 1]), v6(0x50, 0, 1))
}

const fn peer(family: Family) -> Addr {
    of(family, v4([192, 0, 2, 2]), v6(0x50, 0, 2))
}

/// Our address in the tunnel of an underlay's family.
pub const fn tunnel_addr(family: Family) -> Addr {
    of(family, v4([10, 244, 1, 0]), v6(0x244, 1, 0))
}

/// Index of the VTEP and of the tunnel over an underlay of this family; also the VNI.
const fn tunnel(family: Family) -> u32 {
    match family {
        Family::V4 => 1,
        Family::V6 => 2,
    }
}

/// Id of a Service.
pub const fn service(family: Family, remote: bool) -> u32 {
    tunnel(family) + if remote { 2 } else { 0 }
}

/// Outer headers of what the peer sends: IPv4 in IPv4, IPv6 in IPv6.
pub const fn from_peer(family: Family) -> Outer {
    Outer {
        dst_mac: UPLINK_MAC,
        src_mac: LINK_MAC,
        src: peer(family),
        dst: node(family),
        port: VXLAN_PORT,
        vni: tunnel(family),
    }
}

fn pod_net(net: Addr) -> PodNet {
    // All but the last two bytes: flows differ there.
    let mut mask = [0xff; 16];
    mask[14] = 0;
    mask[15] = 0;
    let [mut net, mask] = [net, Addr(mask)];
    net.0[14] = 0;
    net.0[15] = 0;
    PodNet { net, mask }
}

/// What stands in the maps.
#[derive(Default)]
pub struct Tables {
    pub frontends: Vec<(FrontendKey, Frontend)>,
    pub maglev: Vec<u32>,
    pub backends: BTreeMap<u32, Backend>,
    pub pods: Vec<(Addr, Pod)>,
    pub vteps: BTreeMap<u32, Vtep>,
    pub vtep_sources: Vec<(VtepKey, u32)>,
    pub tunnels: BTreeMap<u32, Tunnel>,
    pub next_hops: BTreeMap<u32, NextHop>,
}

impl Tables {
    /// The node.
    pub fn new() -> Self {
        let mut t = Self::default();
        for family in FAMILIES {
            t.add_peer(family);
            t.add_service(family, false, LOCAL_BACKENDS);
            t.add_service(family, true, REMOTE_BACKENDS);
        }
        t
    }

    /// Addresses of the node on plain routes.
    pub const fn node_addresses() -> (Addr, Addr) {
        (node(Family::V4), node(Family::V6))
    }

    fn add_peer(&mut self, family: Family) {
        let index = tunnel(family);
        let vni = Be32::new(index << 8);
        self.next_hops.insert(
            index,
            NextHop {
                ifindex: UPLINK,
                mtu: MTU,
                dst_mac: LINK_MAC,
                src_mac: UPLINK_MAC,
                reserved: 0,
            },
        );
        self.tunnels.insert(
            index,
            Tunnel {
                vni,
                ifindex: 0,
                addr_v4: tunnel_addr(Family::V4),
                addr_v6: tunnel_addr(Family::V6),
                mac: TUNNEL_MAC,
                port: Be16::new(VXLAN_PORT),
                local: node(family),
            },
        );
        let mut vtep = Vtep {
            remote: peer(family),
            local: node(family),
            vni,
            port: Be16::new(VXLAN_PORT),
            ip_sum: Vtep::outer_ip_sum(node(family), peer(family)),
            remote_mac: PEER_MAC,
            local_mac: TUNNEL_MAC,
            nexthop: index,
            tunnel: index,
            ..Vtep::default()
        };
        vtep.pod_nets = [
            pod_net(peer_pod(family, 0)),
            pod_net(peer_client(family, false)),
            pod_net(peer_client(family, true)),
            PodNet::NONE,
        ];
        self.vteps.insert(index, vtep);
        self.vtep_sources.push((VtepKey { source: peer(family), vni }, index));
    }

    fn add_service(&mut self, family: Family, remote: bool, backends: u16) {
        let mut ids = Vec::new();
        for n in 0..backends {
            let id = self.backends.len() as u32 + 1;
            ids.push(id);
            let addr = if remote { peer_pod(family, n) } else { pod(family, n) };
            let (route, index) =
                if remote { (Route::Tunnel, tunnel(family)) } else { (Route::Local, 0) };
            self.backends.insert(
                id,
                Backend {
                    addr,
                    port: Be16::new(BACKEND_PORT),
                    route: route as u16,
                    index,
                    proto: IPPROTO_TCP,
                    reserved: [0; 7],
                },
            );
            if !remote {
                self.pods.push((
                    addr,
                    Pod {
                        ifindex: FIRST_POD_IFINDEX + id,
                        delivery: Delivery::Redirect as u16,
                        pod_mac: mac(100),
                        host_mac: mac(101),
                        reserved: [0; 2],
                        mtu: MTU,
                    },
                ));
            }
        }
        let size = ENTRIES[usize::from(remote)];
        let extent = Extent { offset: self.maglev.len() as u32, size };
        // Which entry holds which backend does not change what a lookup costs.
        self.maglev.extend(ids.iter().cycle().take(size as usize));
        let addr = if remote { remote_vip(family) } else { local_vip(family) };
        self.frontends.push((
            FrontendKey { addr, port: Be16::new(SERVICE_PORT), proto: IPPROTO_TCP, reserved: 0 },
            Frontend {
                service: service(family, remote),
                flags: frontend_flags::LOAD_BALANCER,
                external: extent,
                internal: extent,
                ..Frontend::default()
            },
        ));
    }
}
