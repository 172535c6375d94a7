//! The fixtures: every packet of the suites, as data, in one table.
//!
//! A fixture says what the node knows ([`World`]), what arrived before, what arrives, and what the
//! law is: verdict, reason, the frame that leaves, the counters that move. It knows nothing of where
//! it runs: on the host, in the loaded program, over veth.
//!
//! Two numbers are the datapath's to choose, a SNAT port and an outer UDP source port. A fixture
//! reads them from what came out, holds them against their range, and builds the rest itself.

use sluice_abi::{
    Addr, AnswerKind, Family, Hook, IPPROTO_TCP, IPPROTO_UDP, Mac, Reason, VerdictKind,
};
use sluice_datapath::verdict::{Action, Direction};

use crate::packet::{self, Packet, tcp};
use crate::world::{Be, Svc, World, dev, ip, mac, size};

mod answers;
mod broken;
mod echo;
mod fragments;
mod general;
mod hairpin;
mod icmp;
mod large;
mod passed;
mod peer;
mod stopped;
mod tc;
mod tc_node;
mod translated;
mod tunnelled;

pub use tc_node::at_tc;

/// What came out so far, step by step; the last is the frame that is judged.
pub type Trail = [Vec<u8>];
/// Makes a frame, perhaps from what came out before.
pub type Build = Box<dyn Fn(&Trail) -> Vec<u8> + Send + Sync>;

/// A frame on its way into a program.
pub struct Step {
    /// Which program.
    pub hook: Hook,
    /// Interface of its arrival (of its departure at TC egress).
    pub ifindex: u32,
    /// Bytes of payload in each of the segments that were merged into the frame on arrival, 0 if it is
    /// one: what the kernel calls `gso_size`, at TC alone.
    pub segment: u32,
    /// The frame.
    pub frame: Build,
}

/// The frame afterwards.
pub enum Out {
    /// As it came.
    Untouched,
    /// Dropped: nobody sees it.
    Gone,
    /// This.
    Made(Build),
}

/// Whose counters move, besides the reason's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Account {
    /// Nobody's.
    None,
    /// A packet of this Service was dropped.
    Dropped {
        /// Service id.
        service: u32,
    },
    /// A packet was translated.
    Flow {
        /// Service id.
        service: u32,
        /// Backend id.
        backend: u32,
        /// Direction.
        direction: Direction,
        /// The packet began the connection.
        new: bool,
    },
}

/// Room in front of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeadRoom {
    /// As much as XDP gives (XDP_PACKET_HEADROOM, include/uapi/linux/bpf.h).
    Plenty,
    /// Less than outer headers need.
    Little,
    /// As much as XDP gives, but none for metadata.
    NoMetadata,
    /// Plenty, in front of a frame in two buffers, of which the second holds so many bytes.
    Split(usize),
}

/// Where a fixture runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    /// Everywhere.
    Everywhere,
    /// On the host only: another CPU must do something between two instructions of the program.
    HostOnly {
        /// When the clock is read for the so-and-so-manieth time, every connection ends.
        flows_end_at_clock_read: u32,
    },
}

/// One law about one packet.
pub struct Fixture {
    /// The law.
    pub name: String,
    /// Reason of the verdict.
    pub reason: Reason,
    /// Family of the packet whose header gives the reason; nothing where there is no IP header.
    pub family: Option<Family>,
    /// The tables.
    pub world: World,
    /// The tables while arrived what arrived before, if they were others.
    pub world_before: Option<World>,
    /// What arrived before.
    pub before: Vec<Step>,
    /// What arrives.
    pub step: Step,
    /// The last step of the program.
    pub action: Action,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
    /// The frame afterwards.
    pub out: Out,
    /// Counters.
    pub account: Account,
    /// Answer that is counted, and whether it was given.
    pub answer: Option<(AnswerKind, bool)>,
    /// Room in front.
    pub head_room: HeadRoom,
    /// Where it runs.
    pub runs: Where,
}

impl Fixture {
    /// A frame that arrives at the uplink's XDP hook of the standard world.
    pub fn new(
        name: String,
        reason: Reason,
        family: impl Into<Option<Family>>,
        frame: Vec<u8>,
    ) -> Self {
        Self::made(name, reason, family, Hook::Xdp, dev::UPLINK, move |_| frame.clone())
    }

    /// A frame made from what came before, at any hook of the standard world.
    pub fn made(
        name: String,
        reason: Reason,
        family: impl Into<Option<Family>>,
        hook: Hook,
        ifindex: u32,
        frame: impl Fn(&Trail) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let (action, out) = match reason.kind() {
            VerdictKind::Drop => (Action::Drop, Out::Gone),
            VerdictKind::Pass | VerdictKind::Forward => (Action::Pass, Out::Untouched),
        };
        Self {
            name,
            reason,
            family: family.into(),
            world: World::standard(),
            world_before: None,
            before: Vec::new(),
            step: Step { hook, ifindex, segment: 0, frame: Box::new(frame) },
            action,
            mark: None,
            out,
            account: Account::None,
            answer: None,
            head_room: HeadRoom::Plenty,
            runs: Where::Everywhere,
        }
    }

    /// The tables at the beginning.
    pub fn first_world(&self) -> &World {
        self.world_before.as_ref().unwrap_or(&self.world)
    }

    /// In another world.
    pub fn world(mut self, world: World) -> Self {
        self.world = world;
        self
    }

    /// After this frame.
    pub fn after(
        mut self,
        hook: Hook,
        ifindex: u32,
        frame: impl Fn(&Trail) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        self.before.push(Step { hook, ifindex, segment: 0, frame: Box::new(frame) });
        self
    }

    /// After this frame at the uplink.
    pub fn after_uplink(self, frame: Vec<u8>) -> Self {
        self.after(Hook::Xdp, dev::UPLINK, move |_| frame.clone())
    }

    /// Leaves so.
    pub fn out(
        mut self,
        action: Action,
        frame: impl Fn(&Trail) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        self.action = action;
        self.out = Out::Made(Box::new(frame));
        self
    }

    /// Is answered so, back out of the interface of its arrival.
    pub fn answered(
        self,
        kind: AnswerKind,
        frame: impl Fn(&Trail) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let action = match self.step.hook {
            Hook::Xdp => Action::Transmit,
            Hook::TcIngress | Hook::TcEgress | Hook::TcNode => Action::Redirect(self.step.ifindex),
        };
        let mut fixture = self.out(action, frame);
        fixture.answer = Some((kind, true));
        fixture
    }

    /// Would be answered so, but more answers may not be made.
    pub fn limited(mut self, kind: AnswerKind) -> Self {
        self.answer = Some((kind, false));
        self
    }

    /// Is handed to this interface by TC.
    pub fn mark(mut self, ifindex: u32) -> Self {
        self.mark = Some(ifindex);
        self
    }

    /// Moves these counters.
    pub fn account(mut self, account: Account) -> Self {
        self.account = account;
        self
    }

    /// Counts as a request that began a connection.
    pub fn begins(self, service: Svc, backend: Be, family: Family, proto: u8) -> Self {
        self.account(Account::Flow {
            service: service.id(family, proto),
            backend: backend.id(family, proto),
            direction: Direction::Forward,
            new: true,
        })
    }

    /// Counts as a further packet of a connection.
    pub fn goes_on(
        self,
        service: Svc,
        backend: Be,
        family: Family,
        proto: u8,
        direction: Direction,
    ) -> Self {
        self.account(Account::Flow {
            service: service.id(family, proto),
            backend: backend.id(family, proto),
            direction,
            new: false,
        })
    }

    /// Counts as dropped for this Service.
    pub fn dropped_for(self, service: Svc, family: Family, proto: u8) -> Self {
        self.account(Account::Dropped { service: service.id(family, proto) })
    }
}

/// The table.
pub fn all() -> Vec<Fixture> {
    let mut table = Vec::new();
    translated::add(&mut table);
    tunnelled::add(&mut table);
    tc::add(&mut table);
    hairpin::add(&mut table);
    general::add(&mut table);
    icmp::add(&mut table);
    echo::add(&mut table);
    fragments::add(&mut table);
    passed::add(&mut table);
    stopped::add(&mut table);
    broken::add(&mut table);
    answers::add(&mut table);
    peer::add(&mut table);
    large::add(&mut table);
    table
}

/// "dnat_local [V4 TCP]".
fn law(name: &str, family: Family, proto: u8) -> String {
    let proto = if proto == IPPROTO_TCP { "TCP" } else { "UDP" };
    format!("{name} [{family:?} {proto}]")
}

/// The port of the client of nearly every fixture.
pub const CLIENT_PORT: u16 = 40_000;

/// A request of the client from outside.
pub fn request(family: Family, proto: u8, service: Svc) -> Packet {
    let client = (ip::client(family, 7), CLIENT_PORT);
    Packet::new(proto, client, (service.addr(family), service.port()))
}

/// A request of a pod of the peer, as it is inside the tunnel of `underlay`.
pub fn pod_request(family: Family, proto: u8, service: Svc, underlay: Family) -> Packet {
    let (ours, peers) = tunnel_macs(underlay);
    request(family, proto, service).from(ip::peer_pod(family, 5), CLIENT_PORT).eth(peers, ours)
}

/// Our and the peer's MAC in the tunnel over `underlay`.
pub fn tunnel_macs(underlay: Family) -> (Mac, Mac) {
    match underlay {
        Family::V4 => (mac::VXLAN_V4, mac::PEER_V4),
        Family::V6 => (mac::VXLAN_V6, mac::PEER_V6),
    }
}

/// VNI and UDP port of the tunnel over `underlay`.
pub fn tunnel_ids(underlay: Family) -> (u32, u16) {
    use crate::world::{VNI_V4, VNI_V6, VXLAN_PORT_V4, VXLAN_PORT_V6};
    match underlay {
        Family::V4 => (VNI_V4, VXLAN_PORT_V4),
        Family::V6 => (VNI_V6, VXLAN_PORT_V6),
    }
}

/// The kernel's vxlan device over `underlay`.
pub fn tunnel_device(underlay: Family) -> u32 {
    match underlay {
        Family::V4 => dev::VXLAN_V4,
        Family::V6 => dev::VXLAN_V6,
    }
}

/// The Service and the backend behind the tunnel over `underlay`.
pub fn tunnel_service(underlay: Family) -> (Svc, Be) {
    match underlay {
        Family::V4 => (Svc::TunnelV4, Be::TunnelV4),
        Family::V6 => (Svc::TunnelV6, Be::TunnelV6),
    }
}

/// `inner` from the peer to us, as the peer's kernel sends it.
pub fn from_peer(underlay: Family, inner: &[u8]) -> Packet {
    let (vni, port) = tunnel_ids(underlay);
    let mut outer =
        Packet::new(IPPROTO_UDP, (ip::peer(underlay), 50_123), (ip::node(underlay), port));
    outer.no_checksum = underlay == Family::V4;
    outer.payload(packet::vxlan(vni, inner))
}

/// `inner` from us to the peer.
pub fn to_peer(underlay: Family, inner: &Packet, src_port: u16) -> Packet {
    let (vni, port) = tunnel_ids(underlay);
    let mut outer =
        Packet::new(IPPROTO_UDP, (ip::node(underlay), src_port), (ip::peer(underlay), port))
            .eth(mac::UPLINK, mac::GATEWAY)
            .hop_limit(64)
            .payload(packet::vxlan(vni, &inner.bytes()));
    (outer.id, outer.class) = (0, inner.class & 3);
    outer.no_checksum = underlay == Family::V4;
    outer
}

/// The SNAT port that was chosen, held against its range. `frame` is the inner frame.
///
/// # Panics
/// If it is out of range.
pub fn snat_port(frame: &[u8]) -> u16 {
    let port = packet::src_port(frame);
    assert!((size::SNAT_FIRST..=size::SNAT_LAST).contains(&port), "SNAT port {port}");
    port
}

/// The outer source port that was chosen, held against its range (RFC 7348 section 5).
///
/// # Panics
/// If it is out of range.
pub fn outer_port(frame: &[u8]) -> u16 {
    let port = packet::src_port(frame);
    assert!(port >= 49_152, "outer source port {port}");
    port
}

/// The last thing that came out.
fn last(trail: &Trail) -> &[u8] {
    trail.last().map(Vec::as_slice).unwrap_or_default()
}

/// A TCP packet that is no SYN, of the connection of `packet`; UDP stays as it is.
pub fn later(packet: Packet) -> Packet {
    packet.flags(tcp::ACK | tcp::PSH)
}

/// Where a backend of the standard world is reached.
pub fn place(backend: Be, family: Family) -> (Addr, u16) {
    (backend.addr(family), crate::world::BACKEND_PORT)
}
