//! One node's tables as plain data, and the standard world that nearly every fixture lives in.
//!
//! ```text
//!   client 203.0.113.7 ─── gateway ─── uplink 10 ┌──────┐ pod 20  .10  (frames are redirected)
//!   peer 192.168.50.2  ─── VXLAN  ────────────── │ node │ pod 21  .11  (the kernel delivers)
//!   plain backend 10.66.0.5 ── router ─ uplink 11└──────┘ vxlan 30 (over IPv4), 31 (over IPv6)
//! ```
//!
//! Everything exists for both families; the IPv6 addresses follow the IPv4 ones.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use sluice_abi::{
    Addr, Answers, Backend, Be16, Be32, Delivery, Extent, Family, Flood, Frontend, FrontendKey,
    IPPROTO_TCP, IPPROTO_UDP, MAX_OWN_MACS, Mac, NextHop, OwnMac, Pod, PodNet, Route, Seeds,
    Settings, Timeouts, Tunnel, Vtep, VtepKey, frontend_flags, settings_flags,
};

/// Both families.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Both protocols.
pub const PROTOCOLS: [u8; 2] = [IPPROTO_TCP, IPPROTO_UDP];

/// Interface indexes.
pub mod dev {
    /// Where clients and peers are: the ingress of nearly every frame.
    pub const UPLINK: u32 = 10;
    /// A second uplink, towards backends on plain routes.
    pub const UPLINK_B: u32 = 11;
    /// Host side of the pod whose frames are redirected.
    pub const POD_REDIRECT: u32 = 20;
    /// Host side of the pod that the kernel delivers to.
    pub const POD_STACK: u32 = 21;
    /// The kernel's vxlan device over IPv4.
    pub const VXLAN_V4: u32 = 30;
    /// The kernel's vxlan device over IPv6.
    pub const VXLAN_V6: u32 = 31;
}

/// Link-layer addresses. Locally administered (IEEE 802, U/L bit).
pub mod mac {
    use sluice_abi::Mac;

    const fn of(n: u8) -> Mac {
        Mac([0x02, 0x51, 0x1c, 0xe0, 0x00, n])
    }
    /// The uplink.
    pub const UPLINK: Mac = of(0x10);
    /// The second uplink.
    pub const UPLINK_B: Mac = of(0x11);
    /// The gateway on the uplink's link.
    pub const GATEWAY: Mac = of(0x01);
    /// The router on the second uplink's link.
    pub const ROUTER: Mac = of(0x02);
    /// Host side of the redirect pod.
    pub const HOST_REDIRECT: Mac = of(0x20);
    /// The redirect pod.
    pub const POD_REDIRECT: Mac = of(0x21);
    /// Host side of the stack pod.
    pub const HOST_STACK: Mac = of(0x22);
    /// The stack pod.
    pub const POD_STACK: Mac = of(0x23);
    /// Our vxlan device over IPv4.
    pub const VXLAN_V4: Mac = of(0x30);
    /// Our vxlan device over IPv6.
    pub const VXLAN_V6: Mac = of(0x31);
    /// Our third tunnel, which has no device.
    pub const VXLAN_BARE: Mac = of(0x32);
    /// The peer's vxlan device over IPv4.
    pub const PEER_V4: Mac = of(0x40);
    /// The peer's vxlan device over IPv6.
    pub const PEER_V6: Mac = of(0x41);
    /// The peer's end of the third tunnel.
    pub const PEER_BARE: Mac = of(0x42);
    /// The vxlan device of the peer that cannot be reached.
    pub const LOST: Mac = of(0x43);
}

/// Addresses, by family.
pub mod ip {
    use super::{addr, v4, v6};
    use sluice_abi::{Addr, Family};

    /// The node, on the underlay.
    pub const fn node(f: Family) -> Addr {
        addr(f, [192, 168, 50, 1], [0xfd00, 0x50, 0, 0, 0, 0, 0, 1])
    }
    /// The peer node, on the underlay.
    pub const fn peer(f: Family) -> Addr {
        addr(f, [192, 168, 50, 2], [0xfd00, 0x50, 0, 0, 0, 0, 0, 2])
    }
    /// A peer node whose link-layer address is not known.
    pub const fn lost(f: Family) -> Addr {
        addr(f, [192, 168, 50, 3], [0xfd00, 0x50, 0, 0, 0, 0, 0, 3])
    }
    /// A machine on the underlay that is no peer.
    pub const fn stranger(f: Family) -> Addr {
        addr(f, [192, 168, 50, 99], [0xfd00, 0x50, 0, 0, 0, 0, 0, 0x99])
    }
    /// A client outside the cluster; `n` makes others.
    pub const fn client(f: Family, n: u16) -> Addr {
        let [hi, lo] = n.to_be_bytes();
        addr(f, [203, 0, 113 + hi, lo], [0x2001, 0xdb8, 7, 0, 0, 0, 0, n])
    }
    /// The local pod whose frames are redirected.
    pub const fn pod_redirect(f: Family) -> Addr {
        addr(f, [10, 244, 1, 10], [0xfd00, 0x244, 1, 0, 0, 0, 0, 0x10])
    }
    /// The local pod that the kernel delivers to.
    pub const fn pod_stack(f: Family) -> Addr {
        addr(f, [10, 244, 1, 11], [0xfd00, 0x244, 1, 0, 0, 0, 0, 0x11])
    }
    /// An address of our pod CIDR that no pod has.
    pub const fn pod_nobody(f: Family) -> Addr {
        addr(f, [10, 244, 1, 99], [0xfd00, 0x244, 1, 0, 0, 0, 0, 0x99])
    }
    /// Our address inside our pod CIDR: SNAT source of tunnelled requests.
    pub const fn tunnel(f: Family) -> Addr {
        addr(f, [10, 244, 1, 1], [0xfd00, 0x244, 1, 0, 0, 0, 0, 1])
    }
    /// Pod `n` of the peer.
    pub const fn peer_pod(f: Family, n: u8) -> Addr {
        addr(f, [10, 244, 2, n], [0xfd00, 0x244, 2, 0, 0, 0, 0, n as u16])
    }
    /// A pod of the peer that cannot be reached.
    pub const fn lost_pod(f: Family) -> Addr {
        addr(f, [10, 244, 3, 5], [0xfd00, 0x244, 3, 0, 0, 0, 0, 5])
    }
    /// A backend outside the tunnels, behind the second uplink.
    pub const fn plain(f: Family) -> Addr {
        addr(f, [10, 66, 0, 5], [0xfd00, 0x66, 0, 0, 0, 0, 0, 5])
    }
    /// A backend outside the tunnels, behind the uplink itself.
    pub const fn plain_same(f: Family) -> Addr {
        addr(f, [10, 66, 0, 6], [0xfd00, 0x66, 0, 0, 0, 0, 0, 6])
    }
    /// Where Service `n` is reached.
    pub const fn vip(f: Family, n: u8) -> Addr {
        addr(f, [198, 51, 100, n], [0x2001, 0xdb8, 0x51, 0, 0, 0, 0, n as u16])
    }
    /// Nobody: the source of a pod's requests to itself.
    pub const fn hairpin(f: Family) -> Addr {
        addr(f, [169, 254, 77, 1], [0xfd53, 0x6c75, 0x6963, 0x6500, 0, 0, 0, 1])
    }
    /// Nothing that Sluice serves.
    pub const fn elsewhere(f: Family) -> Addr {
        addr(f, [192, 0, 2, 77], [0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 0x77])
    }
    /// A group address.
    pub const fn group(f: Family) -> Addr {
        match f {
            Family::V4 => v4([224, 0, 0, 251]),
            Family::V6 => v6([0xff02, 0, 0, 0, 0, 0, 0, 0xfb]),
        }
    }
}

const fn v4(b: [u8; 4]) -> Addr {
    Addr::from_v4(b)
}

const fn v6(s: [u16; 8]) -> Addr {
    Addr(Ipv6Addr::new(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]).octets())
}

const fn addr(family: Family, four: [u8; 4], six: [u16; 8]) -> Addr {
    match family {
        Family::V4 => v4(four),
        Family::V6 => v6(six),
    }
}

/// The network of a prefix.
///
/// # Panics
/// If the prefix is longer than the address.
pub fn pod_net(net: Addr, prefix: u32) -> PodNet {
    let bits = match net.family() {
        Family::V4 => 96 + prefix,
        Family::V6 => prefix,
    };
    assert!(bits <= 128);
    let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
    let network = u128::from_be_bytes(net.0) & mask;
    PodNet { net: Addr(network.to_be_bytes()), mask: Addr(mask.to_be_bytes()) }
}

/// The port of every Service.
pub const SERVICE_PORT: u16 = 8080;
/// The port of every backend.
pub const BACKEND_PORT: u16 = 9376;
/// The node port of [`Svc::NodePort`].
pub const NODE_PORT: u16 = 30_080;
/// A fail-safe port: a Service may claim it, in vain.
pub const FAIL_SAFE_PORT: u16 = 22;
/// UDP destination port of the tunnels over IPv4.
pub const VXLAN_PORT_V4: u16 = 8472;
/// UDP destination port of the tunnel over IPv6.
pub const VXLAN_PORT_V6: u16 = 4789;
/// VNI of the tunnel over IPv4.
pub const VNI_V4: u32 = 1;
/// VNI of the tunnel over IPv6.
pub const VNI_V6: u32 = 0x00a1_b2c3;
/// VNI of the tunnel over IPv4 that has no vxlan device.
pub const VNI_BARE: u32 = 77;
/// MTU of every way out, and of the pods' veths.
pub const MTU: u32 = 1500;

/// VTEP of the peer over IPv4.
pub const VTEP_V4: u32 = 1;
/// VTEP of the peer over IPv6.
pub const VTEP_V6: u32 = 2;
/// VTEP of the peer that cannot be reached.
pub const VTEP_LOST: u32 = 3;
/// VTEP of the peer in the tunnel without a device.
pub const VTEP_BARE: u32 = 4;

/// Next hop: the gateway on the uplink.
pub const HOP_GATEWAY: u32 = 1;
/// Next hop: the router on the second uplink.
pub const HOP_ROUTER: u32 = 2;
/// Next hop that is not resolved.
pub const HOP_LOST: u32 = 3;

/// The Services of the standard world. Each exists for both families and both protocols.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Svc {
    /// One backend: the local pod that the kernel delivers to.
    LocalStack = 1,
    /// One backend: the local pod whose frames are redirected.
    LocalRedirect,
    /// One backend: a pod of the peer, through the tunnel over IPv4.
    TunnelV4,
    /// One backend: a pod of the peer, through the tunnel over IPv6.
    TunnelV6,
    /// One backend on a plain route, out of the second uplink.
    Plain,
    /// One backend on a plain route, out of the uplink where requests come in.
    PlainSame,
    /// One backend behind the next hop that is not resolved, on a plain route.
    PlainLost,
    /// One backend behind the peer that cannot be reached.
    TunnelLost,
    /// Backends of every kind, by a consistent-hash extent.
    Many,
    /// No endpoints at all.
    Empty,
    /// Endpoints elsewhere, and policy Local.
    LocalPolicy,
    /// Its extent points to a backend that does not exist.
    Broken,
    /// Another VIP for the backend of [`Svc::LocalStack`].
    LocalStackToo,
    /// The node's address and a node port, for the backend of [`Svc::LocalStack`].
    NodePort,
    /// The node's address and a fail-safe port.
    FailSafe,
    /// Two local backends: the stack pod and the redirect pod.
    Pair,
}

impl Svc {
    /// All of them.
    pub const ALL: [Svc; 16] = [
        Svc::LocalStack,
        Svc::LocalRedirect,
        Svc::TunnelV4,
        Svc::TunnelV6,
        Svc::Plain,
        Svc::PlainSame,
        Svc::PlainLost,
        Svc::TunnelLost,
        Svc::Many,
        Svc::Empty,
        Svc::LocalPolicy,
        Svc::Broken,
        Svc::LocalStackToo,
        Svc::NodePort,
        Svc::FailSafe,
        Svc::Pair,
    ];

    /// Where it is reached.
    pub fn addr(self, family: Family) -> Addr {
        match self {
            Svc::NodePort | Svc::FailSafe => ip::node(family),
            _ => ip::vip(family, self as u8),
        }
    }

    /// Its port.
    pub fn port(self) -> u16 {
        match self {
            Svc::NodePort => NODE_PORT,
            Svc::FailSafe => FAIL_SAFE_PORT,
            _ => SERVICE_PORT,
        }
    }

    /// Its id in the standard world.
    pub fn id(self, family: Family, proto: u8) -> u32 {
        1 + index(self as u32 - 1, family, proto)
    }

    /// The key of its frontend.
    pub fn key(self, family: Family, proto: u8) -> FrontendKey {
        let (addr, port) = (self.addr(family), Be16::new(self.port()));
        FrontendKey { addr, port, proto, reserved: 0 }
    }

    /// The key of its address as such; none has the node's address.
    pub fn vip(self, family: Family) -> FrontendKey {
        FrontendKey::address(self.addr(family))
    }

    /// Its backends in the standard world.
    pub fn backends(self) -> &'static [Be] {
        match self {
            Svc::LocalStack | Svc::LocalStackToo | Svc::NodePort | Svc::FailSafe => &[Be::Stack],
            Svc::LocalRedirect => &[Be::Redirect],
            Svc::TunnelV4 => &[Be::TunnelV4],
            Svc::TunnelV6 => &[Be::TunnelV6],
            Svc::Plain => &[Be::Plain],
            Svc::PlainSame => &[Be::PlainSame],
            Svc::PlainLost => &[Be::PlainLost],
            Svc::TunnelLost => &[Be::TunnelLost],
            Svc::Many => &[Be::Stack, Be::Redirect, Be::TunnelV4, Be::TunnelV6, Be::Plain],
            Svc::Pair => &[Be::Stack, Be::Redirect],
            Svc::Empty | Svc::LocalPolicy => &[],
            Svc::Broken => &[Be::Missing],
        }
    }
}

/// The backends of the standard world. Each exists for both families and both protocols.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Be {
    /// The local pod that the kernel delivers to.
    Stack,
    /// The local pod whose frames are redirected.
    Redirect,
    /// A pod of the peer, through the tunnel over IPv4.
    TunnelV4,
    /// A pod of the peer, through the tunnel over IPv6.
    TunnelV6,
    /// On a plain route, out of the second uplink.
    Plain,
    /// On a plain route, out of the uplink.
    PlainSame,
    /// On a plain route whose next hop is not resolved.
    PlainLost,
    /// Behind a peer whose link-layer address is not known.
    TunnelLost,
    /// An entry that is not there.
    Missing,
}

impl Be {
    /// All but the missing one.
    pub const ALL: [Be; 8] = [
        Be::Stack,
        Be::Redirect,
        Be::TunnelV4,
        Be::TunnelV6,
        Be::Plain,
        Be::PlainSame,
        Be::PlainLost,
        Be::TunnelLost,
    ];

    /// Its id in the standard world.
    pub fn id(self, family: Family, proto: u8) -> u32 {
        1 + index(self as u32, family, proto)
    }

    /// Its address.
    pub fn addr(self, family: Family) -> Addr {
        match self {
            Be::Stack => ip::pod_stack(family),
            Be::Redirect => ip::pod_redirect(family),
            Be::TunnelV4 => ip::peer_pod(family, 20),
            Be::TunnelV6 => ip::peer_pod(family, 21),
            Be::Plain => ip::plain(family),
            Be::PlainSame | Be::Missing => ip::plain_same(family),
            Be::PlainLost => ip::elsewhere(family),
            Be::TunnelLost => ip::lost_pod(family),
        }
    }

    fn route(self) -> (Route, u32) {
        match self {
            Be::Stack | Be::Redirect => (Route::Local, 0),
            Be::TunnelV4 => (Route::Tunnel, VTEP_V4),
            Be::TunnelV6 => (Route::Tunnel, VTEP_V6),
            Be::TunnelLost => (Route::Tunnel, VTEP_LOST),
            Be::Plain => (Route::Plain, HOP_ROUTER),
            Be::PlainSame => (Route::Plain, HOP_GATEWAY),
            Be::PlainLost => (Route::Plain, HOP_LOST),
            Be::Missing => (Route::None, 0),
        }
    }
}

/// Each thing has four entries: two families, two protocols.
fn index(thing: u32, family: Family, proto: u8) -> u32 {
    thing * 4 + family as u32 * 2 + u32::from(proto == IPPROTO_UDP)
}

/// Sizes of the maps, as the tests load them.
pub mod size {
    use sluice_abi::maps::SNAT_SLOTS_PER_PORT;

    /// Entries of the map of frontends.
    pub const FRONTENDS: u32 = 256;
    /// Entries of the consistent-hash array.
    pub const MAGLEV: u32 = 4096;
    /// Entries of the backends and their counters.
    pub const BACKENDS: u32 = 128;
    /// Entries of the Services' counters.
    pub const SERVICES: u32 = 128;
    /// Entries of the map of pods.
    pub const PODS: u32 = 64;
    /// Entries of the VTEPs.
    pub const VTEPS: u32 = 16;
    /// Entries of the VTEPs' sources.
    pub const VTEP_SOURCES: u32 = 32;
    /// Entries of the next hops.
    pub const NEXT_HOPS: u32 = 16;
    /// Entries of the table of fragmented packets.
    pub const FRAGMENTS: u32 = 16;
    /// Flow sets of most tests: 64 connections.
    pub const FLOW_SETS: u32 = 4;
    /// Sets of the flood guard, for tests that turn it on by [`super::World::with_flood`].
    pub const FLOOD_SETS: u32 = 4;
    /// Its places.
    pub const FLOOD_PLACES: u32 = FLOOD_SETS * 16;
    /// First SNAT port.
    pub const SNAT_FIRST: u16 = 2_048;
    /// Last SNAT port.
    pub const SNAT_LAST: u16 = 2_079;
    /// Entries of the SNAT table: up to the last port.
    pub const SNAT_SLOTS: u32 = (SNAT_LAST as u32 + 1) * SNAT_SLOTS_PER_PORT;
    /// The indexes of the SNAT table that the standard world's port range uses.
    pub fn snat_indexes() -> std::ops::Range<u32> {
        SNAT_FIRST as u32 * SNAT_SLOTS_PER_PORT..SNAT_SLOTS
    }
}

/// Ticks of each timeout in the standard world. Long: a test that is slow must not see a record
/// expire.
pub const TIMEOUTS: Timeouts = Timeouts {
    tcp_syn: 1_000_000,
    tcp_established: 8_000_000,
    tcp_closing: 500_000,
    udp_oneway: 600_000,
    udp_replied: 4_000_000,
    stamp: 250_000,
    redecide: 16_000_000,
    reserved: 0,
};

/// A node's tables: what the agent writes.
#[derive(Clone, PartialEq, Debug)]
pub struct World {
    /// The settings.
    pub settings: Settings,
    /// Where Services are reached, and which addresses are theirs alone.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Consistent-hash extents.
    pub maglev: Vec<u32>,
    /// By backend id; 0 is unused.
    pub backends: Vec<Backend>,
    /// Pods of this node.
    pub pods: BTreeMap<Addr, Pod>,
    /// By VTEP index; 0 is unused.
    pub vteps: Vec<Vtep>,
    /// Who may send into the tunnels.
    pub vtep_sources: BTreeMap<VtepKey, u32>,
    /// By tunnel index; 0 is unused.
    pub tunnels: Vec<Tunnel>,
    /// By next hop index; 0 is unused.
    pub next_hops: Vec<NextHop>,
}

impl World {
    /// The standard world, in mode `accelerate`.
    pub fn standard() -> Self {
        let mut world = World {
            settings: settings(),
            frontends: BTreeMap::new(),
            maglev: Vec::new(),
            backends: vec![Backend::default(); size::BACKENDS as usize],
            pods: pods(),
            vteps: vteps(),
            vtep_sources: BTreeMap::new(),
            tunnels: tunnels(),
            next_hops: next_hops(),
        };
        for (i, vtep) in world.vteps.iter().enumerate().skip(1) {
            let key = VtepKey { source: vtep.remote, vni: vtep.vni };
            world.vtep_sources.insert(key, i as u32);
            world.vtep_sources.insert(VtepKey::of_mac(vtep.remote_mac, vtep.vni), i as u32);
        }
        for family in FAMILIES {
            for proto in PROTOCOLS {
                for backend in Be::ALL {
                    world.backends[backend.id(family, proto) as usize] =
                        entry(backend, family, proto);
                }
                for service in Svc::ALL {
                    world.serve(service, family, proto);
                }
            }
        }
        world
    }

    /// The standard world in mode `replace`.
    pub fn replacing() -> Self {
        let mut world = Self::standard();
        world.settings.flags |= settings_flags::REPLACE;
        world
    }

    /// Sets the settings' flow set mask for a table of `sets` sets.
    ///
    /// # Panics
    /// If `sets` is no power of two.
    pub fn with_flow_sets(mut self, sets: u32) -> Self {
        assert!(sets.is_power_of_two());
        self.settings.flow_set_mask = sets - 1;
        self
    }

    /// A flood guard of `places`, for which a window never ends: it stays as a test has set it.
    ///
    /// # Panics
    /// If `places` is no power of two or more than there are.
    pub fn with_flood(mut self, places: u32) -> Self {
        assert!(places.is_power_of_two() && places <= size::FLOOD_PLACES);
        self.settings.flood =
            Flood { limit: u32::MAX, window: u32::MAX, mask: places - 1, reserved: 0 };
        self
    }

    /// A fresh extent with these backends, as compiled for a consistent-hash table: here simply
    /// by turns.
    pub fn extent(&mut self, backends: &[u32]) -> Extent {
        let offset = self.maglev.len() as u32;
        let size = match backends.len() {
            0 => return Extent::default(),
            1 => 1,
            _ => 31,
        };
        self.maglev.extend((0..size).map(|i| backends[i % backends.len()]));
        Extent { offset, size: size as u32 }
    }

    fn serve(&mut self, service: Svc, family: Family, proto: u8) {
        let ids: Vec<u32> = service.backends().iter().map(|b| b.id(family, proto)).collect();
        let extent = self.extent(&ids);
        let flags = match service {
            Svc::NodePort | Svc::FailSafe => frontend_flags::NODE_PORT,
            Svc::LocalPolicy => {
                frontend_flags::LOAD_BALANCER
                    | frontend_flags::EXTERNAL_LOCAL
                    | frontend_flags::INTERNAL_LOCAL
            }
            _ => frontend_flags::LOAD_BALANCER,
        };
        let frontend = Frontend {
            service: service.id(family, proto),
            flags,
            external: extent,
            internal: extent,
            ..Frontend::default()
        };
        self.frontends.insert(service.key(family, proto), frontend);
        if !matches!(service, Svc::NodePort | Svc::FailSafe) {
            self.frontends.insert(service.vip(family), Frontend::ADDRESS);
        }
    }
}

fn settings() -> Settings {
    let mut fail_safe = [Be16::new(0); 8];
    fail_safe[0] = Be16::new(FAIL_SAFE_PORT);
    fail_safe[1] = Be16::new(6443);
    Settings {
        flags: settings_flags::ANSWERS,
        epoch: 1,
        seeds: Seeds { flow: 0x5eed_f10e_0123_4567, cluster: 0x5eed_c105_89ab_cdef },
        timeouts: TIMEOUTS,
        vxlan_ports: [Be16::new(VXLAN_PORT_V4), Be16::new(VXLAN_PORT_V6)],
        snat_first_port: size::SNAT_FIRST,
        snat_last_port: size::SNAT_LAST,
        flow_set_mask: size::FLOW_SETS - 1,
        ticks_per_second: 250,
        node_v4: ip::node(Family::V4),
        node_v6: ip::node(Family::V6),
        hairpin_v4: ip::hairpin(Family::V4),
        hairpin_v6: ip::hairpin(Family::V6),
        fail_safe_tcp: fail_safe,
        fail_safe_udp: fail_safe,
        // No test meets a limit that it has not set.
        answers: Answers {
            source_rate: u16::MAX,
            source_burst: u16::MAX,
            cpu_rate: u16::MAX,
            cpu_burst: u16::MAX,
        },
        snat_reply_first: size::SNAT_FIRST,
        snat_reply_last: size::SNAT_LAST,
        fragment_mask: size::FRAGMENTS - 1,
        own_macs: own_macs(&[(dev::UPLINK, mac::UPLINK), (dev::UPLINK_B, mac::UPLINK_B)]),
        flood: Flood::default(),
    }
}

/// The uplinks' own MACs.
pub fn own_macs(macs: &[(u32, Mac)]) -> [OwnMac; MAX_OWN_MACS] {
    let mut own = [OwnMac::default(); MAX_OWN_MACS];
    for (to, (ifindex, mac)) in own.iter_mut().zip(macs) {
        *to = OwnMac { ifindex: *ifindex, mac: *mac, reserved: 0 };
    }
    own
}

fn pods() -> BTreeMap<Addr, Pod> {
    let redirect = Pod {
        ifindex: dev::POD_REDIRECT,
        delivery: Delivery::Redirect as u16,
        pod_mac: mac::POD_REDIRECT,
        host_mac: mac::HOST_REDIRECT,
        reserved: [0; 2],
        mtu: MTU,
    };
    let stack = Pod {
        ifindex: dev::POD_STACK,
        delivery: Delivery::Stack as u16,
        pod_mac: mac::POD_STACK,
        host_mac: mac::HOST_STACK,
        reserved: [0; 2],
        mtu: MTU,
    };
    FAMILIES
        .into_iter()
        .flat_map(|f| [(ip::pod_redirect(f), redirect), (ip::pod_stack(f), stack)])
        .collect()
}

/// A VNI as it stands on the wire.
pub const fn vni(number: u32) -> Be32 {
    Be32::new(number << 8)
}

/// The tunnel address and port of a family's tunnel.
fn tunnels() -> Vec<Tunnel> {
    let tunnel = |number, family, mac, port, ifindex| Tunnel {
        vni: vni(number),
        ifindex,
        addr_v4: ip::tunnel(Family::V4),
        addr_v6: ip::tunnel(Family::V6),
        mac,
        port: Be16::new(port),
        local: ip::node(family),
    };
    vec![
        Tunnel::default(),
        tunnel(VNI_V4, Family::V4, mac::VXLAN_V4, VXLAN_PORT_V4, dev::VXLAN_V4),
        tunnel(VNI_V6, Family::V6, mac::VXLAN_V6, VXLAN_PORT_V6, dev::VXLAN_V6),
        tunnel(VNI_BARE, Family::V4, mac::VXLAN_BARE, VXLAN_PORT_V4, 0),
    ]
}

fn vteps() -> Vec<Vtep> {
    let nets = |third| {
        let v4 = pod_net(Addr::from_v4(Ipv4Addr::new(10, 244, third, 0).octets()), 24);
        let v6 = pod_net(v6([0xfd00, 0x244, third as u16, 0, 0, 0, 0, 0]), 64);
        [v4, v6, PodNet::NONE, PodNet::NONE]
    };
    let tunnels = tunnels();
    let vtep = |tunnel: u32, remote: Addr, remote_mac: Mac, nexthop: u32, third: u8| {
        let t = tunnels[tunnel as usize];
        let ip_sum = match remote.family() {
            Family::V4 => Vtep::outer_ip_sum(t.local, remote),
            Family::V6 => 0,
        };
        Vtep {
            remote,
            local: t.local,
            vni: t.vni,
            port: t.port,
            ip_sum,
            remote_mac,
            local_mac: t.mac,
            nexthop,
            tunnel,
            class: 0,
            class_kept: 0,
            reserved: 0,
            pod_nets: nets(third),
        }
    };
    vec![
        Vtep::default(),
        vtep(1, ip::peer(Family::V4), mac::PEER_V4, HOP_GATEWAY, 2),
        vtep(2, ip::peer(Family::V6), mac::PEER_V6, HOP_GATEWAY, 2),
        vtep(1, ip::lost(Family::V4), mac::LOST, HOP_LOST, 3),
        vtep(3, ip::peer(Family::V4), mac::PEER_BARE, HOP_GATEWAY, 2),
    ]
}

fn next_hops() -> Vec<NextHop> {
    vec![
        NextHop::default(),
        NextHop {
            ifindex: dev::UPLINK,
            mtu: MTU,
            dst_mac: mac::GATEWAY,
            src_mac: mac::UPLINK,
            reserved: 0,
        },
        NextHop {
            ifindex: dev::UPLINK_B,
            mtu: MTU,
            dst_mac: mac::ROUTER,
            src_mac: mac::UPLINK_B,
            reserved: 0,
        },
        NextHop { mtu: MTU, ..NextHop::default() },
    ]
}

fn entry(backend: Be, family: Family, proto: u8) -> Backend {
    let (route, index) = backend.route();
    Backend {
        addr: backend.addr(family),
        port: Be16::new(BACKEND_PORT),
        route: route as u16,
        index,
        proto,
        reserved: [0; 7],
    }
}
