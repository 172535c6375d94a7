//! Moves: what arrives next, said in words that stay meaningful when others before it are left out.

use proptest::prelude::*;
use sluice_abi::{Addr, Family, Hook, IPPROTO_UDP, Mac};
use sluice_model::{Connection, Exit, State};

use super::plan::{self, Plan};
use crate::packet::{self, Packet, extension, icmp, l4_offset, tcp};
use crate::world::{
    self, FAMILIES, PROTOCOLS, Svc, VNI_BARE, VNI_V4, VNI_V6, VTEP_BARE, VTEP_V6, VXLAN_PORT_V4,
    VXLAN_PORT_V6, dev, ip, mac,
};

/// A world, and what happens in it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The world.
    pub plan: Plan,
    /// What happens, one after the other.
    pub moves: Vec<Move>,
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Move {
    /// A client sends to a Service, or to something like one.
    Request {
        /// Who.
        client: Client,
        /// Last bits of the client's port.
        port: u8,
        /// To whom.
        to: To,
        /// Family.
        family: Family,
        /// Protocol.
        proto: u8,
        /// The packet.
        shape: Shape,
    },
    /// A client that was heard before sends on.
    Again {
        /// Which of the requests so far.
        of: u8,
        /// The packet.
        shape: Shape,
    },
    /// A backend answers on a connection.
    Answer {
        /// Which of the connections.
        of: u8,
        /// Where.
        way: Way,
        /// The packet.
        shape: Shape,
    },
    /// Somebody on the way of a connection's packets sends an error about one.
    Error {
        /// Which of the connections.
        of: u8,
        /// Whether it is about a reply, so that it goes to the backend.
        about_reply: bool,
        /// Where an error about a request appears.
        way: Way,
        /// The error.
        error: IcmpError,
        /// The packet.
        shape: Shape,
    },
    /// A client asks for an echo, or sends another message that is no error.
    Echo {
        /// Who.
        client: Client,
        /// To whom.
        to: To,
        /// Type and code, if not an echo request's.
        kind: Option<(u8, u8)>,
        /// Family.
        family: Family,
        /// The packet.
        shape: Shape,
    },
    /// The tables change.
    Change {
        /// What.
        change: Change,
        /// Whether the agent announces it.
        announced: bool,
    },
    /// Bytes of no meaning, behind an Ethernet header.
    Noise {
        /// Where.
        hook: Hook,
        /// EtherType.
        ethertype: u16,
        /// What follows it.
        bytes: Vec<u8>,
    },
}

/// Who sends a request, and where it arrives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client {
    /// From outside, at an uplink.
    Outside(u8, u32),
    /// A pod of the peer, through the tunnel over this family, or through the one without device.
    Peer(u8, Family),
    /// The same, through the tunnel without a device.
    Bare(u8),
    /// The pod of this node behind this interface, at its interface.
    Pod(u32),
    /// The pod of this node behind the first interface, at the second.
    Astray(u32, u32),
    /// A frame in the name of a pod of this node, from the wire.
    Forged(u32),
    /// A machine outside, at the TC hooks of the uplink.
    Below(u8, Hook),
}

/// To whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum To {
    /// A Service.
    Service(Svc),
    /// A Service's address, another port.
    Port(Svc, u16),
    /// A pod of this node.
    Pod(u32),
    /// An address of our pod CIDR that no pod has.
    Nobody,
    /// This node.
    Node(u16),
    /// Our address inside the pod CIDR.
    Tunnel(u16),
    /// Somewhere else.
    Elsewhere,
    /// A group.
    Group,
}

/// Where a backend's answer appears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Where the request's way lets expect it.
    Right,
    /// Out of the tunnel over this family.
    Tunnel(Family),
    /// From the wire, at this uplink.
    Wire(u32),
    /// At TC egress of this interface.
    Egress(u32),
    /// At TC ingress of this interface.
    Ingress(u32),
}

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Which of the family's errors.
    pub kind: u8,
    /// Whether a router sends it, not the end.
    pub router: bool,
    /// Bytes of the quoted transport header, if not all.
    pub quoted: Option<u8>,
    /// What is odd about the quoted packet.
    pub odd: Vec<Odd>,
    /// It is about another port.
    pub astray: bool,
    /// It quotes an error itself.
    pub twice: bool,
    /// What became of the quote's bytes.
    pub damage: Vec<Damage>,
}

/// Types and codes: those that are translated, one that is denied, and one that is none of ours.
const ERRORS_V4: [(u8, u8); 7] = [(3, 3), (3, 4), (11, 0), (12, 0), (5, 1), (4, 0), (3, 1)];
const ERRORS_V6: [(u8, u8); 7] = [(1, 4), (2, 0), (3, 0), (4, 1), (137, 0), (100, 0), (1, 0)];

/// A change of the tables.
#[derive(Clone, Debug)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// Backends of a Service: index, bits outside, bits inside.
    Extent(u8, u8, u8),
    /// How the stack pod, or the redirect pod, is delivered to.
    Delivery(bool),
    /// Whether the gateway, or the router, is resolved.
    Resolved(bool),
    /// The MTU.
    Mtu(u32),
    /// The mode.
    Mode,
    /// `sluice bypass`.
    Bypass,
}

impl Change {
    /// What the plan becomes.
    pub fn apply(&self, plan: &mut Plan) {
        match *self {
            Change::Nothing => {}
            Change::Extent(service, outside, inside) => {
                plan.extents.push((service, outside, inside));
            }
            Change::Delivery(true) => plan.redirect_to_stack_pod ^= true,
            Change::Delivery(false) => plan.stack_to_redirect_pod ^= true,
            Change::Resolved(true) => plan.unresolved.0 ^= true,
            Change::Resolved(false) => plan.unresolved.1 ^= true,
            Change::Mtu(mtu) => plan.mtu = mtu,
            Change::Mode => plan.replace ^= true,
            Change::Bypass => plan.bypass ^= true,
        }
    }
}

/// How a packet differs from an ordinary one of its kind.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// TTL or hop limit, if not the ordinary one.
    pub hop_limit: Option<u8>,
    /// TCP control bits, if not the ordinary ones.
    pub flags: Option<u8>,
    /// Bytes of payload, if not the ordinary number.
    pub payload: Option<u16>,
    /// What is odd about it.
    pub odd: Vec<Odd>,
    /// What is odd about the tunnel around it.
    pub tunnel: Vec<TunnelOdd>,
    /// What became of the inner frame's bytes.
    pub damage: Vec<Damage>,
    /// What became of the whole frame's bytes.
    pub outer_damage: Vec<Damage>,
}

/// What may be odd about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Odd {
    /// A fragment of it: which packet, and which part by [`PIECES`].
    Piece(u8, u8),
    /// TCP sequence and acknowledgement numbers, by so much further.
    Numbers(u32, u32),
    /// DSCP and ECN.
    Class(u8),
    /// IPv4 flags and fragment offset.
    Fragment(u16),
    /// Words of IPv4 options.
    IpOptions(u8),
    /// An IPv6 extension header: kind, and length in units of eight bytes.
    Extension(u8, u8),
    /// An IPv6 routing header: type, segments left.
    Routing(u8, u8),
    /// Words of TCP options.
    TcpOptions(u8),
    /// UDP without a checksum.
    NoChecksum,
    /// A transport checksum that is wrong by so much.
    WrongTransport(u16),
    /// An IPv4 header checksum that is wrong by so much.
    WrongHeader(u16),
    /// A payload that makes the transport checksum compute to zero.
    ZeroSum,
    /// Bytes behind the IP packet.
    Padding(u8),
    /// Bytes behind the UDP datagram, inside the IP packet.
    Surplus(u8),
    /// A destination MAC.
    To(Mac),
    /// A source address, by [`SOURCES`].
    From(u8),
    /// Another protocol.
    Proto(u8),
    /// A VLAN tag: of a service, control.
    Tag(bool, u16),
    /// More VLAN tags than are followed.
    Tags,
}

/// Parts of a packet of 101 bytes of payload: bytes behind the IP header.
const PIECES: [std::ops::Range<usize>; 10] =
    [0..40, 0..64, 0..24, 0..16, 0..8, 40..64, 64..usize::MAX, 24..64, 8..40, 0..usize::MAX];

/// What may be odd about a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TunnelOdd {
    /// The VNI.
    Vni(u32),
    /// An outer source: a stranger, the peer that cannot be reached, ourselves, a client.
    From(u8),
    /// An outer destination: elsewhere, a Service's address.
    To(u8),
    /// The UDP destination port.
    Port(u16),
    /// The VXLAN flags byte.
    Flags(u8),
    /// Reserved bytes.
    Reserved(u8),
    /// The UDP length, as a difference.
    Length(i8),
    /// No outer checksum, over IPv6 as well.
    NoChecksum,
    /// Bytes behind the outer packet.
    Padding(u8),
    /// Inner source of other networks.
    Inside(u8),
    /// DSCP and ECN outside.
    Class(u8),
    /// IPv4 flags and fragment offset outside.
    Fragment(u16),
    /// A VLAN tag outside.
    Tag(u16),
    /// Options or an extension header outside.
    Options,
}

/// What may become of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Nothing follows after so many bytes.
    Cut(u16),
    /// Another byte.
    Set(u16, u8),
    /// One bit.
    Flip(u16, u8),
    /// More bytes.
    Extend(u8),
}

impl Damage {
    fn inflict(self, frame: &mut Vec<u8>) {
        if frame.is_empty() {
            return;
        }
        let at = |offset: u16| usize::from(offset) % frame.len();
        match self {
            Damage::Cut(len) => frame.truncate(at(len)),
            Damage::Set(offset, value) => {
                let at = at(offset);
                frame[at] = value;
            }
            Damage::Flip(offset, bit) => {
                let at = at(offset);
                frame[at] ^= 1 << (bit & 7);
            }
            Damage::Extend(by) => frame.extend((0..by).map(|i| i ^ 0x5a)),
        }
    }
}

/// A request that was sent, so that its client can go on.
#[derive(Clone, Debug)]
pub struct Sent {
    client: Client,
    packet: Packet,
}

/// A frame in front of a program.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Which program.
    pub hook: Hook,
    /// Interface.
    pub ifindex: u32,
    /// The frame.
    pub bytes: Vec<u8>,
}

/// Interfaces of this node's pods.
const PODS: [u32; 2] = [dev::POD_REDIRECT, dev::POD_STACK];

fn pod(ifindex: u32, family: Family) -> Addr {
    if ifindex == dev::POD_STACK { ip::pod_stack(family) } else { ip::pod_redirect(family) }
}

/// MACs of a pod and of its host side.
fn pod_macs(ifindex: u32) -> (Mac, Mac) {
    if ifindex == dev::POD_STACK {
        (mac::POD_STACK, mac::HOST_STACK)
    } else {
        (mac::POD_REDIRECT, mac::HOST_REDIRECT)
    }
}

/// A tunnel as the peer sees it.
#[derive(Clone, Copy)]
struct Pipe {
    underlay: Family,
    vni: u32,
    port: u16,
    ours: Mac,
    peers: Mac,
}

const BARE: Pipe = Pipe {
    underlay: Family::V4,
    vni: VNI_BARE,
    port: VXLAN_PORT_V4,
    ours: mac::VXLAN_BARE,
    peers: mac::PEER_BARE,
};

const fn pipe(underlay: Family) -> Pipe {
    match underlay {
        Family::V4 => Pipe {
            underlay,
            vni: VNI_V4,
            port: VXLAN_PORT_V4,
            ours: mac::VXLAN_V4,
            peers: mac::PEER_V4,
        },
        Family::V6 => Pipe {
            underlay,
            vni: VNI_V6,
            port: VXLAN_PORT_V6,
            ours: mac::VXLAN_V6,
            peers: mac::PEER_V6,
        },
    }
}

/// Sources that nobody has, and some that others have.
fn source(family: Family, which: u8) -> Addr {
    let v4 = |bytes| Addr::from_v4(bytes);
    match (which % 8, family) {
        (0, Family::V4) => v4([127, 0, 0, 1]),
        (0, Family::V6) => Addr(1u128.to_be_bytes()),
        (1, Family::V4) => v4([0, 0, 0, 0]),
        (1, Family::V6) => Addr::NONE,
        (2, _) => ip::group(family),
        (3, Family::V4) => v4([255; 4]),
        (3, Family::V6) => Addr((0xfe80u128 << 112 | 1).to_be_bytes()),
        (4, _) => ip::node(family),
        (5, _) => ip::pod_stack(family),
        (6, _) => ip::vip(family, Svc::LocalStack as u8),
        (_, _) => ip::tunnel(family),
    }
}

impl Client {
    fn addr(self, family: Family) -> Addr {
        match self {
            Client::Outside(n, _) | Client::Below(n, _) => ip::client(family, 7 + u16::from(n)),
            Client::Peer(n, _) | Client::Bare(n) => ip::peer_pod(family, 5 + n),
            Client::Pod(ifindex) | Client::Astray(ifindex, _) | Client::Forged(ifindex) => {
                pod(ifindex, family)
            }
        }
    }

    /// Hook, interface and frame of a packet of this client.
    fn frame(self, packet: Packet, shape: &Shape) -> Frame {
        match self {
            Client::Outside(_, ifindex) => on_wire(ifindex, packet, shape),
            Client::Forged(_) => on_wire(dev::UPLINK, packet, shape),
            Client::Below(_, hook) => {
                Frame { hook, ifindex: dev::UPLINK, bytes: shape.whole(packet) }
            }
            Client::Peer(_, underlay) => through(pipe(underlay), packet, shape),
            Client::Bare(_) => through(BARE, packet, shape),
            Client::Pod(ifindex) | Client::Astray(_, ifindex) => {
                let (own, host) = pod_macs(ifindex);
                let bytes = shape.whole(packet.eth(own, host).hop_limit(64));
                Frame { hook: Hook::TcIngress, ifindex, bytes }
            }
        }
    }
}

fn on_wire(ifindex: u32, packet: Packet, shape: &Shape) -> Frame {
    let packet = match ifindex {
        dev::UPLINK_B => packet.eth(mac::ROUTER, mac::UPLINK_B),
        _ => packet.eth(mac::GATEWAY, mac::UPLINK),
    };
    Frame { hook: Hook::Xdp, ifindex, bytes: shape.whole(packet) }
}

/// A packet in a tunnel of the peer.
fn through(pipe: Pipe, packet: Packet, shape: &Shape) -> Frame {
    let mut packet = packet.eth(pipe.peers, pipe.ours);
    for odd in &shape.tunnel {
        if let TunnelOdd::Inside(which) = odd {
            packet.src = source(packet.family(), *which);
        }
    }
    let mut bytes = shape.wrap(pipe, &shape.bytes(packet));
    shape.outer_damage.iter().for_each(|damage| damage.inflict(&mut bytes));
    Frame { hook: Hook::Xdp, ifindex: dev::UPLINK, bytes }
}

impl Shape {
    /// A frame that is in no tunnel.
    fn whole(&self, packet: Packet) -> Vec<u8> {
        let mut bytes = self.bytes(packet);
        self.outer_damage.iter().for_each(|damage| damage.inflict(&mut bytes));
        bytes
    }

    /// The frame, with everything that is odd about it.
    fn bytes(&self, mut packet: Packet) -> Vec<u8> {
        packet.hop_limit = self.hop_limit.unwrap_or(packet.hop_limit);
        packet.flags = self.flags.unwrap_or(packet.flags);
        if let Some(len) = self.payload {
            packet.payload = (0..len).map(|i| i as u8 ^ 0xa5).collect();
        }
        self.odd.iter().for_each(|odd| odd.describe(&mut packet));
        let mut bytes = packet.bytes();
        self.odd.iter().for_each(|odd| odd.carve(&packet, &mut bytes));
        self.damage.iter().for_each(|damage| damage.inflict(&mut bytes));
        bytes
    }

    /// Outer headers around an inner frame.
    fn wrap(&self, pipe: Pipe, inner: &[u8]) -> Vec<u8> {
        let underlay = pipe.underlay;
        let mut outer =
            Packet::new(IPPROTO_UDP, (ip::peer(underlay), 50_123), (ip::node(underlay), pipe.port));
        outer.no_checksum = underlay == Family::V4;
        outer.payload = packet::vxlan(pipe.vni, inner);
        for odd in &self.tunnel {
            odd.describe(&mut outer);
        }
        let mut bytes = outer.bytes();
        for odd in &self.tunnel {
            match *odd {
                TunnelOdd::Length(by) => {
                    let at = checksum_at(&outer) - 2;
                    let len = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
                    let len = len.wrapping_add_signed(by.into());
                    bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
                }
                TunnelOdd::Padding(by) => bytes.extend((0..by).map(|i| i ^ 0xc3)),
                _ => {}
            }
        }
        bytes
    }
}

impl Odd {
    /// What the packet's description can hold.
    fn describe(self, packet: &mut Packet) {
        match self {
            Odd::Piece(id, which) => {
                // What stands in an ICMP message stays.
                let keep = if PROTOCOLS.contains(&packet.proto) { 0 } else { packet.payload.len() };
                packet.payload.truncate(keep);
                packet.payload.extend(keep as u8..101);
                let piece = PIECES[usize::from(which) % PIECES.len()].clone();
                *packet = packet.clone().piece(0x00c0_ff00 + u32::from(id), piece);
            }
            Odd::Numbers(seq, ack) => {
                packet.seq = packet.seq.wrapping_add(seq);
                packet.ack = packet.ack.wrapping_add(ack);
            }
            Odd::Class(class) => packet.class = class,
            Odd::Fragment(fragment) => packet.fragment = fragment,
            Odd::TcpOptions(words) => packet.options = vec![1; usize::from(words % 11) * 4],
            Odd::NoChecksum => packet.no_checksum = true,
            Odd::To(mac) => packet.eth_dst = mac,
            Odd::From(which) => packet.src = source(packet.family(), which),
            Odd::Proto(proto) => packet.proto = proto,
            Odd::IpOptions(words) => packet.ip_options = vec![1; usize::from(words % 10 + 1) * 4],
            Odd::Extension(kind, units) if packet.family() == Family::V6 => {
                packet.extensions.push(extension(kind, usize::from(units) * 8));
            }
            Odd::Routing(kind, left) if packet.family() == Family::V6 => {
                let (number, mut bytes) = extension(43, 24);
                (bytes[2], bytes[3]) = (kind, left);
                packet.extensions.push((number, bytes));
            }
            Odd::Tags => packet.tags = vec![(0x88a8, 1), (0x88a8, 2), (0x8100, 3)],
            Odd::Tag(service, control) => {
                packet.tags.push((if service { 0x88a8 } else { 0x8100 }, control));
            }
            Odd::ZeroSum => with_zero_sum(packet),
            _ => {}
        }
    }

    /// What is done to the bytes.
    fn carve(self, packet: &Packet, frame: &mut Vec<u8>) {
        let family = packet.family();
        let l3 = 14 + packet.tags.len() * 4;
        match self {
            Odd::WrongTransport(by) => add(frame, checksum_at(packet), by),
            Odd::WrongHeader(by) if family == Family::V4 => add(frame, l3 + 10, by),
            Odd::Padding(by) => frame.extend((0..by).map(|i| i ^ 0x3c)),
            Odd::Surplus(by) if packet.proto == IPPROTO_UDP => {
                frame.extend((0..by).map(|i| i ^ 0x69));
                match family {
                    Family::V4 => {
                        add(frame, l3 + 2, by.into());
                        let end = l3 + 20 + packet.ip_options.len();
                        let sum = pnet::packet::util::checksum(&frame[l3..end], 5);
                        frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
                    }
                    Family::V6 => add(frame, l3 + 4, by.into()),
                }
            }
            _ => {}
        }
    }
}

/// Where the transport checksum of a packet stands in its frame.
fn checksum_at(packet: &Packet) -> usize {
    let extensions: usize = packet.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
    let extensions = extensions + if packet.piece.is_some() { 8 } else { 0 };
    let options = match packet.family() {
        Family::V4 => packet.ip_options.len(),
        Family::V6 => extensions,
    };
    let l4 = l4_offset(packet.family()) + packet.tags.len() * 4 + options;
    l4 + if packet.proto == IPPROTO_UDP { 6 } else { 16 }
}

/// The last word of the payload, so that the transport checksum computes to zero.
fn with_zero_sum(packet: &mut Packet) {
    packet.payload.resize(packet.payload.len().next_multiple_of(2) + 2, 0);
    let sum = packet.bytes();
    let at = checksum_at(packet);
    let Some(sum) = sum.get(at..at + 2) else { return };
    let end = packet.payload.len();
    packet.payload[end - 2..].copy_from_slice(sum);
}

/// Adds to a word.
fn add(frame: &mut [u8], at: usize, by: u16) {
    if let Some(word) = frame.get_mut(at..at + 2) {
        let value = u16::from_be_bytes([word[0], word[1]]).wrapping_add(by);
        word.copy_from_slice(&value.to_be_bytes());
    }
}

impl TunnelOdd {
    fn describe(self, outer: &mut Packet) {
        let family = outer.family();
        match self {
            TunnelOdd::Vni(vni) => {
                outer.payload[4..8].copy_from_slice(&(vni << 8).to_be_bytes());
            }
            TunnelOdd::From(which) => {
                outer.src = match which % 4 {
                    0 => ip::stranger(family),
                    1 => ip::lost(family),
                    2 => ip::node(family),
                    _ => ip::client(family, 7),
                };
            }
            TunnelOdd::To(which) => {
                outer.dst = match which % 2 {
                    0 => ip::elsewhere(family),
                    _ => ip::vip(family, Svc::LocalStack as u8),
                };
            }
            TunnelOdd::Port(port) => outer.dst_port = port,
            TunnelOdd::Flags(flags) => outer.payload[0] = flags,
            TunnelOdd::Reserved(bits) => {
                for at in [1, 2, 3, 7] {
                    outer.payload[at] = bits;
                }
            }
            TunnelOdd::NoChecksum => outer.no_checksum = true,
            TunnelOdd::Class(class) => outer.class = class,
            TunnelOdd::Fragment(fragment) => outer.fragment = fragment,
            TunnelOdd::Tag(control) => outer.tags.push((0x8100, control)),
            TunnelOdd::Options => {
                outer.ip_options = vec![1; 4];
                outer.extensions = vec![extension(60, 8)];
            }
            TunnelOdd::Length(_) | TunnelOdd::Padding(_) | TunnelOdd::Inside(_) => {}
        }
    }
}

impl Move {
    /// The frame of this move, after the requests `sent`, in a node that is in `state`; nothing if
    /// the move has no meaning there.
    pub fn frame(&self, sent: &mut Vec<Sent>, state: &State) -> Option<Frame> {
        match self {
            Move::Request { client, port, to, family, proto, shape } => {
                let packet = request(*client, *port, *to, *family, *proto);
                sent.push(Sent { client: *client, packet: packet.clone() });
                Some(client.frame(packet, shape))
            }
            Move::Again { of, shape } => {
                let Sent { client, packet } = sent.get(usize::from(*of) % sent.len().max(1))?;
                let packet = packet.clone().flags(tcp::ACK | tcp::PSH);
                Some(client.frame(packet, shape))
            }
            Move::Answer { of, way, shape } => {
                let connections = &state.connections;
                let connection =
                    connections.values().nth(usize::from(*of) % connections.len().max(1))?;
                answer(connection, *way, shape)
            }
            Move::Error { of, about_reply, way, error, shape } => {
                let connections = &state.connections;
                let connection =
                    connections.values().nth(usize::from(*of) % connections.len().max(1))?;
                if *about_reply {
                    error.about_reply(connection, shape)
                } else {
                    error.about_request(connection, *way, shape)
                }
            }
            Move::Echo { client, to, kind, family, shape } => {
                let Packet { src, dst, .. } = request(*client, 0, *to, *family, IPPROTO_UDP);
                let asks = if *family == Family::V4 { (8, 0) } else { (128, 0) };
                let packet = icmp(src, dst, kind.unwrap_or(asks), 0x1234_0001, b"are you there?");
                sent.push(Sent { client: *client, packet: packet.clone() });
                Some(client.frame(packet, shape))
            }
            Move::Noise { hook, ethertype, bytes } => {
                let mut frame = [mac::UPLINK.0, mac::GATEWAY.0].concat();
                frame.extend(ethertype.to_be_bytes());
                frame.extend(bytes);
                Some(Frame { hook: *hook, ifindex: dev::UPLINK, bytes: frame })
            }
            Move::Change { .. } => None,
        }
    }
}

fn request(client: Client, port: u8, to: To, family: Family, proto: u8) -> Packet {
    // Ports that differ in their first two bits meet in one set of the flow table.
    let port = (40_000 + u16::from(port & 3)) ^ (u16::from(port >> 2 & 3) << 14);
    let (addr, to_port) = match to {
        To::Service(service) => (service.addr(family), service.port()),
        To::Port(service, port) => (service.addr(family), port),
        To::Pod(ifindex) => (pod(ifindex, family), 80),
        To::Nobody => (ip::pod_nobody(family), 80),
        To::Node(port) => (ip::node(family), port),
        To::Tunnel(port) => (ip::tunnel(family), port),
        To::Elsewhere => (ip::elsewhere(family), world::SERVICE_PORT),
        To::Group => (ip::group(family), world::SERVICE_PORT),
    };
    Packet::new(proto, (client.addr(family), port), (addr, to_port))
}

/// The backend's answer to what it was sent.
fn answer(connection: &Connection, way: Way, shape: &Shape) -> Option<Frame> {
    let reply = connection.reply_tuple()?;
    let packet = Packet::new(reply.proto, reply.dst, reply.src)
        .flags(if connection.progress.replied { tcp::ACK } else { tcp::SYN });
    Some(from_backend(connection, way, packet.answer().hop_limit(63), shape))
}

/// A packet from the backend's side.
fn from_backend(connection: &Connection, way: Way, packet: Packet, shape: &Shape) -> Frame {
    let tc = |hook, ifindex: u32, packet: Packet| {
        let (own, host) = pod_macs(ifindex);
        let packet = match (hook, PODS.contains(&ifindex)) {
            (Hook::TcIngress, true) => packet.eth(own, host),
            (_, true) => packet.eth(host, own),
            _ => packet.eth(mac::UPLINK, mac::GATEWAY),
        };
        Frame { hook, ifindex, bytes: shape.whole(packet) }
    };
    let own_pod = connection.reply == Exit::Stack;
    match (way, connection.forward) {
        (Way::Tunnel(underlay), _) => through(pipe(underlay), packet, shape),
        (Way::Wire(ifindex), _) => on_wire(ifindex, packet, shape),
        (Way::Egress(ifindex), _) => tc(Hook::TcEgress, ifindex, packet),
        (Way::Ingress(ifindex), _) => tc(Hook::TcIngress, ifindex, packet),
        (Way::Right, _) if connection.hairpin => {
            tc(Hook::TcIngress, pod_of(connection.backend.0), packet)
        }
        (Way::Right, _) if own_pod => tc(Hook::TcEgress, pod_of(connection.source), packet),
        (Way::Right, Exit::Stack) => tc(Hook::TcEgress, dev::UPLINK, packet),
        (Way::Right, Exit::Frame { ifindex, .. }) => tc(Hook::TcIngress, ifindex, packet),
        (Way::Right, Exit::Tunnel(VTEP_V6)) => through(pipe(Family::V6), packet, shape),
        (Way::Right, Exit::Tunnel(VTEP_BARE)) => through(BARE, packet, shape),
        (Way::Right, Exit::Tunnel(_)) => through(pipe(Family::V4), packet, shape),
        (Way::Right, Exit::NextHop(world::HOP_ROUTER)) => on_wire(dev::UPLINK_B, packet, shape),
        (Way::Right, Exit::NextHop(_)) => on_wire(dev::UPLINK, packet, shape),
    }
}

/// The interface of a pod of this node.
fn pod_of(addr: Addr) -> u32 {
    if addr == ip::pod_stack(addr.family()) { dev::POD_STACK } else { dev::POD_REDIRECT }
}

impl IcmpError {
    /// The error to whom `packet` came from; `end` is whom it went to.
    fn about(&self, packet: Packet, end: Addr) -> Packet {
        let family = packet.family();
        let (kind, router) = match family {
            Family::V4 => (ERRORS_V4[usize::from(self.kind) % 7], ip::elsewhere(family)),
            Family::V6 => (ERRORS_V6[usize::from(self.kind) % 7], ip::elsewhere(family)),
        };
        let sender = packet.src;
        let mut packet = packet.hop_limit(40);
        self.odd.iter().for_each(|odd| odd.describe(&mut packet));
        if self.twice {
            let about = if family == Family::V4 { (3, 3) } else { (1, 4) };
            packet = icmp(packet.src, packet.dst, about, 0, b"something else that was lost ...");
        }
        packet.dst_port ^= u16::from(self.astray);
        let mut frame = packet.bytes();
        self.odd.iter().for_each(|odd| odd.carve(&packet, &mut frame));
        let l3 = 14 + packet.tags.len() * 4;
        let mut quote = frame.split_off(l3);
        if let Some(quoted) = self.quoted {
            let udp = if packet.proto == IPPROTO_UDP { 6 } else { 16 };
            quote.truncate(checksum_at(&packet) - udp - l3 + usize::from(quoted));
        }
        self.damage.iter().for_each(|damage| damage.inflict(&mut quote));
        let from = if self.router { router } else { end };
        icmp(from, sender, kind, 1400, &quote)
    }

    /// About a reply that the client got, or that somebody on the way to it saw.
    fn about_reply(&self, connection: &Connection, shape: &Shape) -> Option<Frame> {
        let request = connection.request;
        let reply = Packet::new(request.proto, request.dst, request.src);
        let error = self.about(reply, request.src.0);
        Some(match (connection.reply, connection.tunnel) {
            (Exit::Stack, _) => {
                let ifindex = pod_of(request.src.0);
                let (own, host) = pod_macs(ifindex);
                let bytes = shape.whole(error.eth(own, host));
                Frame { hook: Hook::TcIngress, ifindex, bytes }
            }
            (Exit::Frame { ifindex, .. }, _) => on_wire(ifindex, error, shape),
            (_, VTEP_V6) => through(pipe(Family::V6), error, shape),
            (_, VTEP_BARE) => through(BARE, error, shape),
            _ => through(pipe(Family::V4), error, shape),
        })
    }

    /// About a request that the backend got, or that somebody on the way to it saw.
    fn about_request(&self, connection: &Connection, way: Way, shape: &Shape) -> Option<Frame> {
        let reply = connection.reply_tuple()?;
        let sent = Packet::new(reply.proto, reply.dst, reply.src);
        let error = self.about(sent, connection.backend.0);
        Some(from_backend(connection, way, error, shape))
    }
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(&FAMILIES[..])
}

fn proto() -> impl Strategy<Value = u8> {
    prop::sample::select(&PROTOCOLS[..])
}

fn service() -> impl Strategy<Value = Svc> {
    // Those that have something to choose or to collide with come more often.
    prop_oneof![
        2 => prop::sample::select(&Svc::ALL[..]),
        1 => prop::sample::select(&[
            Svc::LocalStack,
            Svc::LocalStackToo,
            Svc::LocalRedirect,
            Svc::Many,
            Svc::Pair,
            Svc::TunnelV4,
            Svc::TunnelV6,
            Svc::Plain,
        ][..]),
    ]
}

fn pod_interface() -> impl Strategy<Value = u32> {
    prop::sample::select(&PODS[..])
}

fn client() -> impl Strategy<Value = Client> {
    let uplink = prop::sample::select(&[dev::UPLINK, dev::UPLINK, dev::UPLINK_B][..]);
    let hooks = prop::sample::select(&[Hook::TcIngress, Hook::TcEgress][..]);
    prop_oneof![
        8 => (0u8..2, uplink).prop_map(|(n, i)| Client::Outside(n, i)),
        6 => (0u8..2, family()).prop_map(|(n, f)| Client::Peer(n, f)),
        1 => (0u8..2).prop_map(Client::Bare),
        6 => pod_interface().prop_map(Client::Pod),
        1 => (pod_interface(), pod_interface()).prop_map(|(a, b)| Client::Astray(a, b)),
        1 => pod_interface().prop_map(Client::Forged),
        1 => (0u8..2, hooks).prop_map(|(n, hook)| Client::Below(n, hook)),
    ]
}

fn to() -> impl Strategy<Value = To> {
    let ports = || prop::sample::select(&[22u16, 80, 2_050, 8_081, 30_080, 6_443][..]);
    prop_oneof![
        20 => service().prop_map(To::Service),
        1 => (service(), ports()).prop_map(|(s, p)| To::Port(s, p)),
        4 => pod_interface().prop_map(To::Pod),
        1 => Just(To::Nobody),
        1 => ports().prop_map(To::Node),
        1 => ports().prop_map(To::Tunnel),
        1 => Just(To::Elsewhere),
        1 => Just(To::Group),
    ]
}

fn odd() -> impl Strategy<Value = Odd> {
    const MACS: &[Mac] = &[
        Mac([0xff; 6]),
        Mac([0x01, 0x00, 0x5e, 0, 0, 0xfb]),
        Mac([0x33, 0x33, 0, 0, 0, 0xfb]),
        mac::GATEWAY,
        mac::LOST,
    ];
    let fragments =
        prop::sample::select(&[0u16, 0x4000, 0x2000, 0x20b9, 0x00b9, 0x0001, 0x8000][..]);
    let kinds = prop::sample::select(&[0u8, 0, 43, 44, 51, 60, 60, 135, 59][..]);
    // Where windows end, and far away.
    const AHEAD: &[u32] = &[
        0,
        1,
        1_000,
        (32 << 10) - 1,
        32 << 10,
        (96 << 10) - 1,
        96 << 10,
        (16 << 20) - 1,
        16 << 20,
        (16 << 20) + (32 << 10),
        1 << 31,
        u32::MAX,
    ];
    let ahead = || prop::sample::select(AHEAD);
    prop_oneof![
        8 => (ahead(), ahead()).prop_map(|(seq, ack)| Odd::Numbers(seq, ack)),
        3 => any::<u8>().prop_map(Odd::Class),
        2 => fragments.prop_map(Odd::Fragment),
        2 => any::<u8>().prop_map(Odd::IpOptions),
        4 => (kinds, prop_oneof![8 => 1u8..4, 1 => Just(16), 1 => Just(32), 1 => Just(33)])
            .prop_map(|(kind, units)| Odd::Extension(kind, units)),
        1 => (0u8..5, 0u8..2).prop_map(|(kind, left)| Odd::Routing(kind, left)),
        2 => any::<u8>().prop_map(Odd::TcpOptions),
        3 => Just(Odd::NoChecksum),
        3 => any::<u16>().prop_map(Odd::WrongTransport),
        2 => any::<u16>().prop_map(Odd::WrongHeader),
        2 => Just(Odd::ZeroSum),
        2 => (1u8..40).prop_map(Odd::Padding),
        2 => (1u8..40).prop_map(Odd::Surplus),
        1 => prop::sample::select(MACS).prop_map(Odd::To),
        2 => any::<u8>().prop_map(Odd::From),
        1 => prop::sample::select(&[1u8, 47, 50, 58, 132, 136][..]).prop_map(Odd::Proto),
        6 => (prop::bool::weighted(0.3), prop_oneof![1 => Just(42u16), 1 => any::<u16>()])
            .prop_map(|(service, control)| Odd::Tag(service, control)),
        1 => Just(Odd::Tags),
    ]
}

fn tunnel_odd() -> impl Strategy<Value = TunnelOdd> {
    let ports = prop::sample::select(&[VXLAN_PORT_V4, VXLAN_PORT_V6, 4790][..]);
    let vnis = prop::sample::select(&[VNI_V4, VNI_V6, VNI_BARE, 2][..]);
    prop_oneof![
        2 => vnis.prop_map(TunnelOdd::Vni),
        2 => any::<u8>().prop_map(TunnelOdd::From),
        1 => any::<u8>().prop_map(TunnelOdd::To),
        1 => ports.prop_map(TunnelOdd::Port),
        1 => prop_oneof![Just(0u8), any::<u8>()].prop_map(TunnelOdd::Flags),
        1 => any::<u8>().prop_map(TunnelOdd::Reserved),
        2 => (-60i8..10).prop_map(TunnelOdd::Length),
        1 => Just(TunnelOdd::NoChecksum),
        1 => (1u8..40).prop_map(TunnelOdd::Padding),
        3 => any::<u8>().prop_map(TunnelOdd::Inside),
        2 => any::<u8>().prop_map(TunnelOdd::Class),
        1 => prop::sample::select(&[0u16, 0x2000, 0x00b9][..]).prop_map(TunnelOdd::Fragment),
        2 => any::<u16>().prop_map(TunnelOdd::Tag),
        1 => Just(TunnelOdd::Options),
    ]
}

fn damage() -> impl Strategy<Value = Damage> {
    // Headers are hit more often than what they carry.
    let offset = || prop_oneof![3 => 0u16..60, 2 => 0u16..130, 1 => any::<u16>()];
    let value = prop_oneof![1 => Just(0u8), 1 => Just(0xffu8), 2 => any::<u8>()];
    prop_oneof![
        2 => offset().prop_map(Damage::Cut),
        2 => (offset(), value).prop_map(|(at, v)| Damage::Set(at, v)),
        3 => (offset(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        1 => (1u8..40).prop_map(Damage::Extend),
    ]
}

/// Mostly none of them, sometimes one or two.
fn few<T: std::fmt::Debug + Clone>(
    percent: f64,
    strategy: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Vec<T>> {
    let some = prop::collection::vec(strategy, 1..3);
    prop::option::weighted(percent / 100.0, some).prop_map(Option::unwrap_or_default)
}

fn shape() -> impl Strategy<Value = Shape> {
    let hop_limits = prop::sample::select(&[0u8, 1, 2, 3, 64, 255][..]);
    let flags = prop_oneof![
        2 => Just(tcp::FIN | tcp::ACK),
        2 => Just(tcp::RST),
        1 => Just(tcp::RST | tcp::ACK),
        2 => Just(tcp::SYN),
        2 => Just(tcp::ACK),
        1 => any::<u8>(),
    ];
    let payloads = prop_oneof![4 => 0u16..80, 1 => 1_200u16..1_500, 1 => 500u16..600];
    (
        prop::option::weighted(0.12, hop_limits),
        prop::option::weighted(0.35, flags),
        prop::option::weighted(0.3, payloads),
        few(25.0, odd()),
        few(15.0, tunnel_odd()),
        few(8.0, damage()),
        few(6.0, damage()),
    )
        .prop_map(|(hop_limit, flags, payload, odd, tunnel, damage, outer_damage)| Shape {
            hop_limit,
            flags,
            payload,
            odd,
            tunnel,
            damage,
            outer_damage,
        })
}

/// A fragment, and nothing else that is odd about it.
fn piece() -> impl Strategy<Value = Shape> {
    let which = prop_oneof![6 => 0u8..3, 1 => 3u8..5, 6 => 5u8..8, 1 => 8u8..10];
    (0u8..2, which, prop::option::weighted(0.2, odd())).prop_map(|(id, which, odd)| Shape {
        odd: [Some(Odd::Piece(id, which)), odd].into_iter().flatten().collect(),
        ..Shape::default()
    })
}

fn way() -> impl Strategy<Value = Way> {
    let uplinks = prop::sample::select(&[dev::UPLINK, dev::UPLINK_B][..]);
    let interfaces = || {
        prop::sample::select(&[dev::UPLINK, dev::POD_STACK, dev::POD_REDIRECT, dev::VXLAN_V4][..])
    };
    prop_oneof![
        20 => Just(Way::Right),
        6 => family().prop_map(Way::Tunnel),
        1 => uplinks.prop_map(Way::Wire),
        1 => interfaces().prop_map(Way::Egress),
        1 => interfaces().prop_map(Way::Ingress),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => Just(Change::Nothing),
        4 => (0u8..16, any::<u8>(), any::<u8>()).prop_map(|(s, a, b)| Change::Extent(s, a, b)),
        3 => any::<bool>().prop_map(Change::Delivery),
        2 => any::<bool>().prop_map(Change::Resolved),
        1 => (1_280u32..1_500).prop_map(Change::Mtu),
        1 => Just(Change::Mode),
        1 => Just(Change::Bypass),
    ]
}

fn step() -> impl Strategy<Value = Move> {
    let shapes = || prop_oneof![5 => shape(), 1 => piece()];
    let request = (client(), 0u8..16, to(), family(), proto(), shapes()).prop_map(
        |(client, port, to, family, proto, shape)| Move::Request {
            client,
            port,
            to,
            family,
            proto,
            shape,
        },
    );
    let again = (any::<u8>(), prop_oneof![3 => shape(), 1 => piece()])
        .prop_map(|(of, shape)| Move::Again { of, shape });
    let answer =
        (any::<u8>(), way(), shapes()).prop_map(|(of, way, shape)| Move::Answer { of, way, shape });
    let change = (change(), prop::bool::weighted(0.7))
        .prop_map(|(change, announced)| Move::Change { change, announced });
    let error = (
        0u8..7,
        any::<bool>(),
        prop::option::weighted(0.5, 0u8..24),
        few(15.0, odd()),
        prop::bool::weighted(0.05),
        prop::bool::weighted(0.05),
        few(10.0, damage()),
    )
        .prop_map(|(kind, router, quoted, odd, astray, twice, damage)| IcmpError {
            kind,
            router,
            quoted,
            odd,
            astray,
            twice,
            damage,
        });
    let error = (any::<u8>(), any::<bool>(), way(), error, shape()).prop_map(
        |(of, about_reply, way, error, shape)| Move::Error { of, about_reply, way, error, shape },
    );
    let echoes = prop_oneof![2 => shape(), 1 => piece()];
    let kinds = prop::sample::select(&[(0u8, 0u8), (129, 0), (13, 0), (135, 0), (8, 1)][..]);
    let echo = (client(), to(), prop::option::weighted(0.1, kinds), family(), echoes).prop_map(
        |(client, to, kind, family, shape)| Move::Echo { client, to, kind, family, shape },
    );
    let ethertypes = prop::sample::select(&[0x0800u16, 0x86dd, 0x0806, 0x8100, 0x0026][..]);
    let hooks = prop::sample::select(&[Hook::Xdp, Hook::TcIngress, Hook::TcEgress][..]);
    let noise = (hooks, ethertypes, prop::collection::vec(any::<u8>(), 0..120))
        .prop_map(|(hook, ethertype, bytes)| Move::Noise { hook, ethertype, bytes });
    prop_oneof![10 => request, 8 => again, 10 => answer, 4 => error, 1 => echo, 1 => change, 1 => noise]
}

/// Cases. Fewer packets than a set of the flow table has room for: whose record gives way in a full
/// set is a matter of time, which no model knows.
pub fn case() -> impl Strategy<Value = Case> {
    const _: () = assert!(MOST < sluice_abi::FLOW_WAYS);
    (plan::plan(), prop::collection::vec(step(), 1..MOST))
        .prop_map(|(plan, moves)| Case { plan, moves })
}

/// Moves of a case at most.
const MOST: usize = 12;
