//! What becomes of a packet: verdicts, ways out, outer headers.

use sluice_abi::{Addr, Family, IPPROTO_UDP, Reason, VerdictKind, Vtep};

use crate::checksum::checksum;
use crate::packet::{Ethernet, Header, Packet, Part, Tag, V4, V6, ethertype, transport_checksum};
use crate::state::{Connection, Exit, State};
use crate::tables::Tables;

/// The last step with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// To the kernel.
    Pass,
    /// Dropped.
    Drop,
    /// Out of the interface where it came in.
    Transmit,
    /// Out of interface `.0`.
    Redirect(u32),
}

/// Which way a packet of a connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the client.
    Forward,
    /// From the backend.
    Reply,
}

/// Whose counters move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Account {
    /// Nobody's.
    Nobody,
    /// A packet of this Service was dropped.
    Dropped(u32),
    /// A packet was translated.
    Flow {
        /// Service id.
        service: u32,
        /// Backend id.
        backend: u32,
        /// Direction.
        direction: Direction,
        /// It began the connection.
        new: bool,
    },
}

/// What is lawful to become of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The last step.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The frame afterwards; nothing if nobody sees it.
    pub frame: Option<Vec<u8>>,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
    /// Whose counters move.
    pub account: Account,
}

/// Why a packet is not sent on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop {
    /// Why.
    pub reason: Reason,
    /// Service id, 0 if none is concerned.
    pub service: u32,
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self { reason, service: 0 }
    }
}

impl Stop {
    /// What is unsupported or left to the kernel passes untouched, what is malformed or denied is
    /// dropped.
    pub fn outcome(self, frame: &[u8]) -> Outcome {
        let (action, frame) = match self.reason.kind() {
            VerdictKind::Drop => (Action::Drop, None),
            _ => (Action::Pass, Some(frame.to_vec())),
        };
        let account = match (action, self.service) {
            (Action::Drop, service) if service != 0 => Account::Dropped(service),
            _ => Account::Nobody,
        };
        Outcome { action, reason: self.reason, frame, mark: None, account }
    }
}

/// A frame in front of a program.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// What the agent says.
    pub tables: &'a Tables,
    /// What happened before.
    pub state: &'a State,
    /// Interface of arrival.
    pub ifindex: u32,
    /// The frame.
    pub frame: &'a [u8],
    /// What came out, for the numbers that the datapath chooses.
    pub seen: &'a [u8],
    /// Of a packet whose extension headers cannot be followed this may be said at once, or after
    /// everything that is known without following them.
    pub hasty: bool,
}

/// A lawful outcome, and the state after it.
pub type Lawful = (Outcome, State);

impl Case<'_> {
    /// The only lawful outcome is a stop, and nothing is remembered of it.
    pub fn stop(&self, stop: impl Into<Stop>) -> Vec<Lawful> {
        self.stop_in(stop.into(), self.state.clone())
    }

    /// The only lawful outcome in this state is a stop.
    pub fn stop_in(&self, stop: Stop, state: State) -> Vec<Lawful> {
        vec![(stop.outcome(self.frame), state)]
    }

    /// Sends a packet out of an interface.
    pub fn out_of(&self, ifindex: u32) -> Action {
        if ifindex == self.ifindex { Action::Transmit } else { Action::Redirect(ifindex) }
    }
}

/// A packet as it came in at XDP.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The innermost packet.
    pub packet: Packet,
    /// The Ethernet header of the frame.
    pub outer: Ethernet,
    /// VTEP index of the tunnel that it came out of, 0 for none.
    pub tunnel: u32,
}

/// A packet on its way out.
pub struct Departure {
    /// The last step.
    pub action: Action,
    /// The frame.
    pub frame: Vec<u8>,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
}

/// Leaves for the kernel. What came out of a tunnel is received by the kernel's vxlan device; if
/// there is none, it is addressed to the interface where it came in.
pub fn to_stack(case: &Case<'_>, arrival: &Arrival, mut packet: Packet) -> Departure {
    let mark = case.tables.device_of(arrival.tunnel);
    if arrival.tunnel != 0 && mark.is_none() {
        packet.eth.dst = arrival.outer.dst;
    }
    Departure { action: Action::Pass, frame: packet.bytes(), mark }
}

/// Leaves by an exit of a connection, as a frame with these tags. We are the router there, unless it
/// is the kernel's.
///
/// # Errors
/// `TableBroken` (pass); `HopLimitExceeded`, `NextHopUnresolved`, `TooBig` (drop).
pub fn leave(
    case: &Case<'_>,
    arrival: &Arrival,
    mut packet: Packet,
    exit: Exit,
    outer_port: &mut Option<u16>,
    tags: &[Tag],
) -> Result<Departure, Reason> {
    if exit == Exit::Stack {
        return Ok(to_stack(case, arrival, packet));
    }
    // Tags are of the wire that the packet leaves behind.
    packet.eth.tags.clear();
    if packet.hop_limit() <= 1 {
        return Err(Reason::HopLimitExceeded);
    }
    let hop = |index: u32, ip_len: usize| {
        let hop = case.tables.next_hops.get(&index).filter(|hop| hop.ifindex != 0);
        let hop = hop.ok_or(Reason::NextHopUnresolved)?;
        if ip_len > hop.mtu as usize { Err(Reason::TooBig) } else { Ok(*hop) }
    };
    let (ifindex, frame) = match exit {
        Exit::Stack => unreachable!("above"),
        Exit::Frame { ifindex, dst, src } => {
            packet.take_hop();
            (packet.eth.dst, packet.eth.src) = (dst, src);
            packet.eth.tags = tags.to_vec();
            (ifindex, packet.bytes())
        }
        Exit::NextHop(index) => {
            let hop = hop(index, packet.ip_len())?;
            packet.take_hop();
            (packet.eth.dst, packet.eth.src) = (hop.dst_mac, hop.src_mac);
            (hop.ifindex, packet.bytes())
        }
        Exit::Tunnel(index) => {
            let vtep = case.tables.vteps.get(&index).ok_or(Reason::TableBroken)?;
            let hop = hop(vtep.nexthop, packet.ip_len() + overhead(vtep))?;
            packet.take_hop();
            (packet.eth.dst, packet.eth.src) = (vtep.remote_mac, vtep.local_mac);
            let port = *outer_port.get_or_insert_with(|| seen_outer_port(case.seen));
            let (dst, src, tags) = (hop.dst_mac, hop.src_mac, Vec::new());
            let eth = Ethernet { dst, src, tags, ethertype: 0 };
            (hop.ifindex, encapsulate(vtep, eth, port, &packet, case.seen))
        }
    };
    Ok(Departure { action: case.out_of(ifindex), frame, mark: None })
}

/// What the outer packet is longer than the inner one: IP, UDP, VXLAN and inner Ethernet headers
/// (RFC 7348 section 5).
pub fn overhead(vtep: &Vtep) -> usize {
    8 + 8
        + Ethernet::LEN
        + match vtep.remote.family() {
            Family::V4 => 20,
            Family::V6 => 40,
        }
}

/// The outer UDP source port that was chosen, from the range for it (RFC 7348 section 5).
pub fn seen_outer_port(seen: &[u8]) -> u16 {
    const RANGE: std::ops::RangeInclusive<u16> = 49_152..=65_535;
    let port = Packet::parse(seen).ok().and_then(|p| p.transport().ok()).map(|t| t.src);
    port.filter(|port| RANGE.contains(port)).unwrap_or(*RANGE.start())
}

/// The source port of the innermost packet of a frame that leaves by `exit`.
pub fn seen_source_port(seen: &[u8], exit: Exit) -> Option<u16> {
    Some(seen_inner(seen, exit)?.transport().ok()?.src)
}

/// The innermost packet of a frame that leaves by `exit`.
pub fn seen_inner(seen: &[u8], exit: Exit) -> Option<Packet> {
    let packet = Packet::parse(seen).ok()?;
    if !matches!(exit, Exit::Tunnel(_)) {
        return Some(packet);
    }
    packet.transport().ok().filter(|t| t.proto == IPPROTO_UDP)?;
    Packet::parse(packet.datagram().get(8..)?).ok()
}

/// Outer headers (RFC 7348 section 5). Whatever followed the inner IP packet in its frame follows
/// the outer one.
pub fn encapsulate(
    vtep: &Vtep,
    eth: Ethernet,
    src_port: u16,
    inner: &Packet,
    seen: &[u8],
) -> Vec<u8> {
    let inside = Packet { padding: Vec::new(), ..inner.clone() };
    let with = |checksum: u16| {
        let payload = datagram(vtep, src_port, checksum, &inside);
        let header = outer_header(vtep.local, vtep.remote, outer_class(vtep, inner), payload.len());
        let ethertype = match header {
            Header::V4(_) => ethertype::IPV4,
            Header::V6(_) => ethertype::IPV6,
        };
        let eth = Ethernet { ethertype, ..eth.clone() };
        Packet {
            eth,
            header,
            payload,
            padding: inner.padding.clone(),
            obstacle: None,
            part: Part::Whole,
        }
        .bytes()
    };
    if vtep.remote.family() == Family::V4 {
        // Over IPv4 there should be no checksum (RFC 7348 section 5).
        return with(0);
    }
    // Over IPv6 a receiver need not take zero (RFC 6935 section 5), so there is one, and it is
    // right. Of a packet whose own checksum is wrong it may be wrong as well: who does not look at
    // every byte must take the inner one for right.
    let sum = |inside: &Packet| {
        let bytes = datagram(vtep, src_port, 0, inside);
        transport_checksum(vtep.local, vtep.remote, IPPROTO_UDP, &bytes)
    };
    let trusting = inside.is_covered().then(|| with(sum(&inside.repaired())));
    trusting.filter(|frame| frame == seen).unwrap_or_else(|| with(sum(&inside)))
}

/// UDP header, VXLAN header and inner frame.
fn datagram(vtep: &Vtep, src_port: u16, checksum: u16, inside: &Packet) -> Vec<u8> {
    let frame = inside.bytes();
    let len = (8 + 8 + frame.len()) as u16;
    let mut bytes = Vec::new();
    for word in [src_port, vtep.port.host(), len, checksum] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend(0x0800_0000u32.to_be_bytes());
    bytes.extend(vtep.vni.host().to_be_bytes());
    bytes.extend(frame);
    bytes
}

impl Packet {
    /// Whether a transport checksum covers everything behind the IP header.
    fn is_covered(&self) -> bool {
        self.part == Part::Whole
            && self.transport().is_ok()
            && !self.is_without_checksum()
            && self.surplus() == 0
    }
}

/// The DSCP is the administrator's to choose (RFC 2983 section 3), a number or the inner one; the
/// inner ECN field is copied (RFC 6040 section 4.1).
fn outer_class(vtep: &Vtep, inner: &Packet) -> u8 {
    let dscp = if vtep.class_kept == 0 { vtep.class } else { inner.class() };
    dscp & !3 | inner.ecn()
}

/// The outer IP header: the datagram may not
/// be fragmented, so that it needs no identification (RFC 6864 section 4.1).
fn outer_header(src: Addr, dst: Addr, class: u8, payload_len: usize) -> Header {
    const HOP_LIMIT: u8 = 64;
    const DONT_FRAGMENT: u16 = 0x4000;
    match dst.family() {
        Family::V4 => {
            let mut header = V4 {
                class,
                total_len: (20 + payload_len) as u16,
                id: 0,
                fragment: DONT_FRAGMENT,
                ttl: HOP_LIMIT,
                protocol: IPPROTO_UDP,
                checksum: 0,
                src,
                dst,
                options: Vec::new(),
            };
            header.checksum = checksum(&header.bytes());
            Header::V4(header)
        }
        Family::V6 => Header::V6(V6 {
            class,
            flow_label: 0,
            payload_len: payload_len as u16,
            next_header: IPPROTO_UDP,
            hop_limit: HOP_LIMIT,
            src,
            dst,
            extensions: Vec::new(),
            protocol: IPPROTO_UDP,
        }),
    }
}

/// What a request becomes: to the backend, from the source that it shall see.
pub fn translate_request(packet: &mut Packet, connection: &Connection, source_port: u16) {
    packet.translate((connection.source, source_port), connection.backend);
}

/// What a reply becomes: from the VIP, to the client.
pub fn translate_reply(packet: &mut Packet, connection: &Connection) {
    packet.translate(connection.request.dst, connection.request.src);
}
