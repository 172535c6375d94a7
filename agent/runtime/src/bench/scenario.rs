//! The paths that are measured, and what the program must say about every packet of theirs.

use sluice_abi::{Addr, BenchTarget, Family, Reason};

use super::packet::{ACK, Packet, SYN, Segment};
use super::tables::{self, Clients, LINK_MAC, PEER_MAC, TUNNEL_MAC, UPLINK_MAC};

/// A path through the program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// The wrapper with an empty target: F.
    Floor,
    /// The wrapper with a target that only moves the head.
    FloorHead,
    /// To nothing that is served.
    Pass,
    /// Out of a tunnel, with a forged inner source.
    Drop,
    /// Out of a tunnel to a pod of this node.
    Decap,
    /// To a Service, known connection, pod of this node.
    DnatLocal,
    /// To a Service, known connection, pod of another node.
    DnatRemote,
    /// To a Service, a connection never seen before, pod of this node.
    DnatNew,
    /// The same while the flood guard is on.
    DnatFlood,
    /// Out of a tunnel to a Service, known connection, pod of this node.
    DecapDnat,
    /// Out of a tunnel to a Service, a connection never seen before, pod of this node.
    DecapDnatNew,
    /// Reply of a pod of another node, out of a tunnel, to a client outside.
    ReplyRemote,
}

/// XDP's answers (kernel include/uapi/linux/bpf.h).
mod action {
    pub const DROP: u32 = 1;
    pub const PASS: u32 = 2;
    pub const TX: u32 = 3;
    pub const REDIRECT: u32 = 4;
}

/// What every packet of a scenario must come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// The program's return value.
    pub action: u32,
    /// The reason that is counted; none when the program under test does not run.
    pub reason: Option<Reason>,
    /// The Service whose connections are counted, 0 for none.
    pub service: u32,
    /// Whether each packet begins a connection.
    pub new: bool,
    /// Bytes of the frame afterwards.
    pub len: usize,
}

impl Kind {
    /// Every kind, in the order of the report.
    pub const ALL: [Kind; 12] = [
        Kind::Floor,
        Kind::FloorHead,
        Kind::Pass,
        Kind::Drop,
        Kind::Decap,
        Kind::DnatLocal,
        Kind::DnatRemote,
        Kind::ReplyRemote,
        Kind::DecapDnat,
        Kind::DnatNew,
        Kind::DnatFlood,
        Kind::DecapDnatNew,
    ];

    /// The name in output and on the command line.
    pub const fn label(self) -> &'static str {
        match self {
            Kind::Floor => "floor",
            Kind::FloorHead => "floor-head",
            Kind::Pass => "pass",
            Kind::Drop => "drop",
            Kind::Decap => "decap",
            Kind::DnatLocal => "dnat-local",
            Kind::DnatRemote => "dnat-remote",
            Kind::DnatNew => "dnat-new",
            Kind::DnatFlood => "dnat-flood",
            Kind::DecapDnat => "decap-dnat",
            Kind::DecapDnatNew => "decap-dnat-new",
            Kind::ReplyRemote => "reply-remote",
        }
    }

    /// One line for people.
    pub const fn text(self) -> &'static str {
        match self {
            Kind::Floor => "F: the wrapper with an empty program",
            Kind::FloorHead => "the wrapper with a program that only cuts 50 bytes off",
            Kind::Pass => "no Service: passed untouched",
            Kind::Drop => "forged source inside a tunnel: dropped",
            Kind::Decap => "VXLAN undone, to a local pod",
            Kind::DnatLocal => "known connection, to a local pod",
            Kind::DnatRemote => "known connection, source rewritten, encapsulated to another node",
            Kind::DnatNew => "every packet a new connection, full table, to a local pod",
            Kind::DnatFlood => "the same above the cap: the flood guard is on",
            Kind::DecapDnat => "VXLAN undone, known connection, to a local pod",
            Kind::DecapDnatNew => "VXLAN undone, every packet a new connection, full table",
            Kind::ReplyRemote => "VXLAN undone, reply translated back, to a client",
        }
    }

    /// Whether the kind runs without a packet of a family.
    pub const fn is_floor(self) -> bool {
        matches!(self, Kind::Floor | Kind::FloorHead)
    }

    /// Whether every packet begins a connection.
    pub const fn is_new(self) -> bool {
        matches!(self, Kind::DnatNew | Kind::DnatFlood | Kind::DecapDnatNew)
    }

    /// Whose packets they are, unless they come from a pod.
    const fn clients(self) -> Clients {
        match self {
            Kind::DnatNew | Kind::DnatFlood | Kind::DecapDnatNew => Clients::New,
            Kind::DnatRemote | Kind::ReplyRemote => Clients::Remote,
            _ => Clients::Local,
        }
    }

    /// Whether the number of flows can be chosen.
    const fn has_flows(self) -> bool {
        matches!(
            self,
            Kind::Pass | Kind::Decap | Kind::DnatLocal | Kind::DnatRemote | Kind::DecapDnat
        )
    }
}

/// Flows of the kinds whose packets are all of different connections: as many as there are.
const NEVER_AGAIN: u32 = 1 << 30;

/// A path, measured with packets of one family and a number of flows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Scenario {
    /// The path.
    pub kind: Kind,
    /// The family of inner and outer headers.
    pub family: Family,
    /// Flows that take turns, a power of two.
    pub flows: u32,
}

impl Scenario {
    /// All scenarios for these families and numbers of flows, in the order of the report.
    pub fn all(kinds: &[Kind], families: &[Family], flows: &[u32]) -> Vec<Self> {
        let mut all = Vec::new();
        for &kind in kinds {
            if kind.is_floor() {
                all.push(Self { kind, family: Family::V4, flows: 1 });
                continue;
            }
            for &family in families {
                if kind.is_new() {
                    all.push(Self { kind, family, flows: NEVER_AGAIN });
                } else if kind.has_flows() {
                    all.extend(flows.iter().map(|&flows| Self { kind, family, flows }));
                } else {
                    all.push(Self { kind, family, flows: 1 });
                }
            }
        }
        all
    }

    /// Which program the wrapper runs.
    pub fn target(&self) -> BenchTarget {
        match self.kind {
            Kind::Floor => BenchTarget::Empty,
            Kind::FloorHead => BenchTarget::Cut,
            _ => BenchTarget::Node,
        }
    }

    /// What must come of every packet.
    pub fn expected(&self) -> Expected {
        let plain = super::packet::FRAME_LEN;
        let outer = if self.family == Family::V4 { 50 } else { 70 };
        let (action, reason, len) = match self.kind {
            Kind::Floor => (action::PASS, None, plain),
            Kind::FloorHead => (action::PASS, None, plain),
            Kind::Pass => (action::PASS, Some(Reason::NoService), plain),
            Kind::Drop => (action::DROP, Some(Reason::InnerSource), plain + outer),
            Kind::Decap => (action::REDIRECT, Some(Reason::DecapLocal), plain),
            Kind::DnatLocal | Kind::DnatNew | Kind::DnatFlood => {
                (action::REDIRECT, Some(Reason::DnatLocal), plain)
            }
            Kind::DnatRemote => (action::TX, Some(Reason::DnatRemote), plain + outer),
            Kind::DecapDnat | Kind::DecapDnatNew => {
                (action::REDIRECT, Some(Reason::DecapDnatLocal), plain)
            }
            Kind::ReplyRemote => (action::TX, Some(Reason::ReplyRemote), plain),
        };
        let service = match self.kind {
            Kind::DnatLocal
            | Kind::DnatNew
            | Kind::DnatFlood
            | Kind::DecapDnat
            | Kind::DecapDnatNew => tables::service(self.family, false),
            Kind::DnatRemote | Kind::ReplyRemote => tables::service(self.family, true),
            _ => 0,
        };
        Expected { action, reason, service, new: self.kind.is_new(), len }
    }

    /// Packets from the client's side, or what stands for one.
    pub fn request(&self, flags: u8) -> Packet {
        let family = self.family;
        let outside = |dst: Addr| Segment {
            dst_mac: UPLINK_MAC,
            src_mac: LINK_MAC,
            src: tables::client(family, self.kind.clients()),
            dst,
            src_port: 0,
            dst_port: tables::SERVICE_PORT,
            flags,
        };
        let tunnelled = |src: Addr, dst: Addr| {
            let inner = Segment { dst_mac: TUNNEL_MAC, src_mac: PEER_MAC, src, ..outside(dst) };
            Packet::plain(&inner, true).encapsulated(&tables::from_peer(family))
        };
        let peer = tables::peer_client(family, self.kind.is_new());
        match self.kind {
            Kind::Floor | Kind::Pass => Packet::plain(&outside(tables::elsewhere(family)), true),
            Kind::DnatLocal | Kind::DnatNew | Kind::DnatFlood => {
                Packet::plain(&outside(tables::local_vip(family)), true)
            }
            Kind::DnatRemote | Kind::ReplyRemote => {
                Packet::plain(&outside(tables::remote_vip(family)), true)
            }
            Kind::FloorHead | Kind::Decap => tunnelled(peer, tables::pod(family, 0)),
            Kind::Drop => tunnelled(tables::forged(family), tables::pod(family, 0)),
            Kind::DecapDnat | Kind::DecapDnatNew => tunnelled(peer, tables::local_vip(family)),
        }
    }

    /// A client of the connections that must be known; the others differ in the last two bytes.
    pub fn client(&self) -> Addr {
        match self.kind {
            Kind::DecapDnat => tables::peer_client(self.family, false),
            _ => tables::client(self.family, self.kind.clients()),
        }
    }

    /// The reply of `backend` to the connection whose source port became `port`.
    pub fn reply(&self, backend: Addr, port: u16) -> Packet {
        let inner = Segment {
            dst_mac: TUNNEL_MAC,
            src_mac: PEER_MAC,
            src: backend,
            dst: tables::tunnel_addr(self.family),
            src_port: tables::BACKEND_PORT,
            dst_port: port,
            flags: ACK,
        };
        Packet::plain(&inner, false).encapsulated(&tables::from_peer(self.family))
    }

    /// Control bits of the packets that are measured.
    pub const fn flags(&self) -> u8 {
        if self.kind.is_new() { SYN } else { ACK }
    }

    /// Number of the first packet: those of connections never seen before are others than those of
    /// the same clients in another scenario.
    pub const fn first(&self) -> u32 {
        if matches!(self.kind, Kind::DnatFlood) { NEVER_AGAIN / 2 } else { 0 }
    }

    /// Whether the connections must be known beforehand.
    pub const fn needs_opening(&self) -> bool {
        matches!(
            self.kind,
            Kind::DnatLocal | Kind::DnatRemote | Kind::DecapDnat | Kind::ReplyRemote
        )
    }
}
