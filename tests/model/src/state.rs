//! Connections, as a list.

use std::collections::BTreeMap;

use sluice_abi::{Addr, Mac, Timeouts};

use crate::fragment::{Common, Note};
use crate::packet::{Packet, Tag, Transport};
use crate::tcp::Progress;

/// What tells connections apart. Ordered, so that lists of them compare.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tuple {
    /// IP protocol number.
    pub proto: u8,
    /// Source address and port.
    pub src: (Addr, u16),
    /// Destination address and port.
    pub dst: (Addr, u16),
}

impl Tuple {
    /// Of a packet.
    pub fn of(packet: &Packet, transport: &Transport) -> Self {
        let (src, dst) = ((packet.src(), transport.src), (packet.dst(), transport.dst));
        Self { proto: transport.proto, src, dst }
    }
}

/// Where packets of one direction leave.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Exit {
    /// The kernel routes.
    Stack,
    /// Out of an interface with this Ethernet header.
    Frame {
        /// Interface.
        ifindex: u32,
        /// Destination.
        dst: Mac,
        /// Source.
        src: Mac,
    },
    /// Into a tunnel: VTEP index.
    Tunnel(u32),
    /// By a next hop: its index.
    NextHop(u32),
}

impl Exit {
    /// Whether the other end is on another node.
    pub fn is_remote(self) -> bool {
        matches!(self, Exit::Tunnel(_) | Exit::NextHop(_))
    }
}

/// One connection, both directions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Connection {
    /// The request as the client sends it: client to VIP.
    pub request: Tuple,
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend_id: u32,
    /// The backend's address and port.
    pub backend: (Addr, u16),
    /// The source that the backend sees.
    pub source: Addr,
    /// Its port; nothing while it was chosen but has not been seen.
    pub source_port: Option<u16>,
    /// Whether the source is ours (SNAT), not the client's.
    pub rewritten: bool,
    /// Whether the client is the backend, so that the source is nobody's.
    pub hairpin: bool,
    /// VTEP index of the tunnel that requests come from, 0 for none.
    pub tunnel: u32,
    /// Where requests leave.
    pub forward: Exit,
    /// Where replies leave.
    pub reply: Exit,
    /// VLAN tags of the requests, which replies get that leave as frames.
    pub reply_tags: Vec<Tag>,
    /// Epoch of the decision.
    pub epoch: u32,
    /// How far it has got.
    pub progress: Progress,
    /// Outer UDP source ports of either direction, once seen: a flow keeps its way through the
    /// underlay (RFC 7348 section 5).
    pub outer_ports: [Option<u16>; 2],
}

impl Connection {
    /// The reply as the backend sends it, if all of it is known.
    pub fn reply_tuple(&self) -> Option<Tuple> {
        let dst = (self.source, self.source_port?);
        Some(Tuple { proto: self.request.proto, src: self.backend, dst })
    }

    /// How long it lives without packets.
    pub fn timeout(&self, timeouts: &Timeouts) -> u32 {
        let p = self.progress;
        match (self.request.proto, p.confirmed) {
            (sluice_abi::IPPROTO_UDP, true) => timeouts.udp_replied,
            (sluice_abi::IPPROTO_UDP, false) => timeouts.udp_oneway,
            _ if p.is_over() => timeouts.tcp_closing,
            (_, true) => timeouts.tcp_established,
            (_, false) => timeouts.tcp_syn,
        }
    }
}

/// For which packets the same backend must be chosen.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ChoiceKey {
    /// The backends to choose from.
    pub among: Vec<u32>,
    /// The request; with session affinity the client's address alone.
    pub request: Result<Tuple, (u32, Addr)>,
}

/// All that a node remembers.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct State {
    /// Connections by their request.
    pub connections: BTreeMap<Tuple, Connection>,
    /// First fragments.
    pub notes: BTreeMap<Common, Note>,
    /// Backends that were chosen, by what they were chosen for. Consistent hashing knows them
    /// without remembering.
    pub choices: BTreeMap<ChoiceKey, u32>,
}

impl State {
    /// The connection whose reply this is, if the client's address was kept.
    pub fn kept_reply(&self, tuple: &Tuple) -> Option<Tuple> {
        self.reply(tuple, false, false)
    }

    /// The connection of a pod with itself whose reply this is.
    pub fn own_reply(&self, tuple: &Tuple) -> Option<Tuple> {
        self.reply(tuple, false, true)
    }

    /// The connection whose reply this is, if the source was rewritten.
    pub fn rewritten_reply(&self, tuple: &Tuple) -> Option<Tuple> {
        self.reply(tuple, true, false)
    }

    fn reply(&self, tuple: &Tuple, rewritten: bool, hairpin: bool) -> Option<Tuple> {
        let is = |c: &&Connection| {
            (c.rewritten, c.hairpin) == (rewritten, hairpin) && c.reply_tuple() == Some(*tuple)
        };
        self.connections.values().find(is).map(|c| c.request)
    }

    /// Whether a source is already in use towards a backend.
    pub fn is_taken(&self, reply: &Tuple) -> bool {
        self.connections.values().any(|c| c.reply_tuple() == Some(*reply))
    }
}
