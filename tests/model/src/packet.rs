//! Frames taken apart into layers, and put together again byte for byte.

use sluice_abi::{
    Addr, Family, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Mac, Reason,
};

use crate::checksum::{checksum, update};

/// EtherTypes (IANA IEEE 802 numbers).
pub mod ethertype {
    /// IPv4 (RFC 894).
    pub const IPV4: u16 = 0x0800;
    /// IPv6 (RFC 2464 section 3).
    pub const IPV6: u16 = 0x86dd;
    /// Customer VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// Service VLAN tag (IEEE 802.1ad).
    pub const QINQ: u16 = 0x88a8;
}

/// TCP control bits (RFC 9293 section 3.1).
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
    /// All six of RFC 793.
    pub const ALL: u8 = 0x3f;
}

/// A VLAN tag as on the wire: EtherType and control (IEEE 802.1Q clause 9).
pub type Tag = [u8; 4];

/// An Ethernet header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ethernet {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// VLAN tags, outermost first.
    pub tags: Vec<Tag>,
    /// What follows.
    pub ethertype: u16,
}

impl Ethernet {
    /// Bytes on the wire, without tags.
    pub const LEN: usize = 14;
    /// Tags that are followed: "QinQ".
    const MOST_TAGS: usize = 2;

    /// The header, and what follows it.
    ///
    /// # Errors
    /// `NotIp`: it is cut short. `TooManyTags`.
    fn parse(frame: &[u8]) -> Result<(Self, &[u8]), Reason> {
        let (addresses, mut rest) = frame.split_at_checked(12).ok_or(Reason::NotIp)?;
        let mut tags = Vec::new();
        while is_tag(word(rest)?) {
            if tags.len() == Self::MOST_TAGS {
                return Err(Reason::TooManyTags);
            }
            let (tag, behind) = rest.split_first_chunk().ok_or(Reason::NotIp)?;
            tags.push(*tag);
            rest = behind;
        }
        let mac = |at: usize| Mac(std::array::from_fn(|i| addresses[at + i]));
        let eth = Self { dst: mac(0), src: mac(6), tags, ethertype: word(rest)? };
        Ok((eth, &rest[2..]))
    }

    fn bytes(&self) -> Vec<u8> {
        let tags = self.tags.concat();
        [&self.dst.0[..], &self.src.0, &tags, &self.ethertype.to_be_bytes()].concat()
    }
}

/// An EtherType at the beginning of `bytes`.
fn word(bytes: &[u8]) -> Result<u16, Reason> {
    if bytes.len() < 2 { Err(Reason::NotIp) } else { Ok(be16(bytes, 0)) }
}

/// Whether a VLAN tag begins with this EtherType.
pub fn is_tag(ethertype: u16) -> bool {
    [ethertype::VLAN, ethertype::QINQ].contains(&ethertype)
}

/// An IP header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Header {
    /// RFC 791 section 3.1.
    V4(V4),
    /// RFC 8200 section 3.
    V6(V6),
}

/// An IPv4 header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct V4 {
    /// Type of service: DSCP (RFC 2474) and ECN (RFC 3168).
    pub class: u8,
    /// Total length.
    pub total_len: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// Options.
    pub options: Vec<u8>,
}

impl V4 {
    /// The header, with options.
    pub fn bytes(&self) -> Vec<u8> {
        let words = 5 + self.options.len() / 4;
        let mut bytes = vec![0x40 | words as u8, self.class];
        bytes.extend(self.total_len.to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol]);
        bytes.extend(self.checksum.to_be_bytes());
        bytes.extend(self.src.v4_bytes());
        bytes.extend(self.dst.v4_bytes());
        bytes.extend(&self.options);
        bytes
    }

    /// The checksum that the header should have.
    fn right_checksum(&self) -> u16 {
        checksum(&Self { checksum: 0, ..self.clone() }.bytes())
    }
}

/// An IPv6 header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct V6 {
    /// Traffic class.
    pub class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Payload length.
    pub payload_len: u16,
    /// Next header: the first extension header's kind, or the protocol.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// Extension headers.
    pub extensions: Vec<u8>,
    /// What follows them.
    pub protocol: u8,
}

impl V6 {
    fn bytes(&self) -> Vec<u8> {
        let first = 6 << 28 | u32::from(self.class) << 20 | self.flow_label;
        let mut bytes = first.to_be_bytes().to_vec();
        bytes.extend(self.payload_len.to_be_bytes());
        bytes.extend([self.next_header, self.hop_limit]);
        bytes.extend(self.src.0);
        bytes.extend(self.dst.0);
        bytes.extend(&self.extensions);
        bytes
    }
}

impl Header {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Header::V4(h) => h.bytes(),
            Header::V6(h) => h.bytes(),
        }
    }
}

/// An Ethernet frame with an IP packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The Ethernet header.
    pub eth: Ethernet,
    /// The IP header.
    pub header: Header,
    /// What follows it, as long as it says.
    pub payload: Vec<u8>,
    /// What follows the IP packet in the frame (IEEE 802.3 clause 3.2.8).
    pub padding: Vec<u8>,
    /// Why what follows the IP header cannot be followed.
    pub obstacle: Option<Reason>,
    /// Which part of a packet this is.
    pub part: Part,
}

/// A part of a packet (RFC 791 section 3.2, RFC 8200 section 4.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// The beginning, with the transport header: the identification.
    First(u32),
    /// What comes behind.
    Later(u32),
}

impl Part {
    /// By its offset in units of eight bytes, and whether more follows.
    ///
    /// # Errors
    /// `L4Malformed`: would overwrite the control bits of a TCP header (RFC 3128 section 2).
    fn of(id: u32, offset: u16, more: bool, protocol: u8) -> Result<Self, Reason> {
        match (offset, more) {
            (0, false) => Ok(Part::Whole),
            (0, true) => Ok(Part::First(id)),
            (1, _) if protocol == IPPROTO_TCP => Err(Reason::L4Malformed),
            _ => Ok(Part::Later(id)),
        }
    }
}

/// What a TCP or UDP header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transport {
    /// TCP or UDP.
    pub proto: u8,
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// TCP control bits; none for UDP.
    pub flags: u8,
    /// TCP sequence number; 0 for UDP.
    pub seq: u32,
    /// TCP acknowledgement number; 0 for UDP.
    pub ack: u32,
}

impl Packet {
    /// Takes a frame apart.
    ///
    /// # Errors
    /// `NotIp`, `TooManyTags`: not ours to understand. `IpMalformed`, `Martian`: not a packet.
    pub fn parse(frame: &[u8]) -> Result<Self, Reason> {
        let (eth, rest) = Ethernet::parse(frame)?;
        let (header, header_len, len, chain) = match eth.ethertype {
            ethertype::IPV4 => v4(rest)?,
            ethertype::IPV6 => v6(rest)?,
            _ => return Err(Reason::NotIp),
        };
        let (packet, padding) = rest.split_at(len);
        let payload = packet[header_len..].to_vec();
        let (obstacle, part) = match chain {
            Ok(part) => (None, part),
            Err(obstacle) => (Some(obstacle), Part::Whole),
        };
        Ok(Self { eth, header, payload, padding: padding.to_vec(), obstacle, part })
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        [&self.eth.bytes()[..], &self.header.bytes(), &self.payload, &self.padding].concat()
    }

    /// The family.
    pub fn family(&self) -> Family {
        match &self.header {
            Header::V4(_) => Family::V4,
            Header::V6(_) => Family::V6,
        }
    }

    /// IP source.
    pub fn src(&self) -> Addr {
        match &self.header {
            Header::V4(h) => h.src,
            Header::V6(h) => h.src,
        }
    }

    /// IP destination.
    pub fn dst(&self) -> Addr {
        match &self.header {
            Header::V4(h) => h.dst,
            Header::V6(h) => h.dst,
        }
    }

    /// Protocol of the payload.
    pub fn proto(&self) -> u8 {
        match &self.header {
            Header::V4(h) => h.protocol,
            Header::V6(h) => h.protocol,
        }
    }

    /// TTL or hop limit.
    pub fn hop_limit(&self) -> u8 {
        match &self.header {
            Header::V4(h) => h.ttl,
            Header::V6(h) => h.hop_limit,
        }
    }

    /// Type of service or traffic class.
    pub fn class(&self) -> u8 {
        match &self.header {
            Header::V4(h) => h.class,
            Header::V6(h) => h.class,
        }
    }

    /// The ECN field (RFC 3168 section 5, RFC 8200 section 7).
    pub fn ecn(&self) -> u8 {
        self.class() & 3
    }

    /// Writes the ECN field; the IPv4 header checksum follows.
    pub fn set_ecn(&mut self, ecn: u8) {
        match &mut self.header {
            Header::V4(h) => {
                let old = h.bytes();
                h.class = h.class & !3 | ecn;
                h.checksum = update(h.checksum, &old[..2], &h.bytes()[..2]);
            }
            Header::V6(h) => h.class = h.class & !3 | ecn,
        }
    }

    /// Bytes of the IP packet.
    pub fn ip_len(&self) -> usize {
        self.header.bytes().len() + self.payload.len()
    }

    /// The transport header.
    ///
    /// # Errors
    /// `Icmp`: there is none. `ExtensionChain`, `Fragment`, `OtherProtocol`: not ours to understand.
    /// `RoutingHeader`, `IpMalformed`, `L4Malformed`: not a packet that any router may send on.
    pub fn transport(&self) -> Result<Transport, Reason> {
        if let Some(reason) = self.obstacle {
            return Err(reason);
        }
        if let Part::Later(_) = self.part {
            return Err(Reason::Fragment);
        }
        let first = self.part != Part::Whole;
        let p = &self.payload;
        let proto = self.proto();
        let sound = match proto {
            // RFC 9293 section 3.1: the data offset counts words, five at least.
            IPPROTO_TCP if p.len() >= 20 => (20..=p.len()).contains(&(usize::from(p[12] >> 4) * 4)),
            // RFC 768: the length counts header and data, of which a first fragment has a part.
            IPPROTO_UDP if p.len() >= 8 && first => be16(p, 4) >= 8,
            IPPROTO_UDP if p.len() >= 8 => (8..=p.len()).contains(&be16(p, 4).into()),
            IPPROTO_TCP | IPPROTO_UDP => false,
            proto if proto == icmp_of(self.family()) => return Err(Reason::Icmp),
            _ => return Err(Reason::OtherProtocol),
        };
        if !sound {
            return Err(Reason::L4Malformed);
        }
        let (flags, seq, ack) = match proto {
            IPPROTO_TCP => (p[13], be32(p, 4), be32(p, 8)),
            _ => (0, 0, 0),
        };
        Ok(Transport { proto, src: be16(p, 0), dst: be16(p, 2), flags, seq, ack })
    }

    /// Whether options or extension headers follow the IP header.
    pub fn has_options(&self) -> bool {
        match &self.header {
            Header::V4(h) => !h.options.is_empty(),
            Header::V6(h) => !h.extensions.is_empty(),
        }
    }

    /// What a UDP datagram carries: as much as its own length says.
    pub fn datagram(&self) -> &[u8] {
        let end = usize::from(be16(&self.payload, 4)).min(self.payload.len());
        self.payload.get(8..end).unwrap_or_default()
    }

    /// One hop further (RFC 1812 section 5.3.1).
    pub fn take_hop(&mut self) {
        self.set_hop_limit(self.hop_limit() - 1);
    }

    /// Writes the hop limit; in IPv4 the checksum follows.
    pub fn set_hop_limit(&mut self, hop_limit: u8) {
        match &mut self.header {
            Header::V4(h) => {
                let old = h.bytes();
                h.ttl = hop_limit;
                h.checksum = update(h.checksum, &old[8..10], &h.bytes()[8..10]);
            }
            Header::V6(h) => h.hop_limit = hop_limit,
        }
    }

    /// Writes new addresses; the IPv4 header checksum follows.
    pub fn readdress(&mut self, src: Addr, dst: Addr) {
        let before = self.addresses();
        match &mut self.header {
            Header::V4(h) => (h.src, h.dst) = (src, dst),
            Header::V6(h) => (h.src, h.dst) = (src, dst),
        }
        let after = self.addresses();
        if let Header::V4(h) = &mut self.header {
            h.checksum = update(h.checksum, &before, &after);
        }
    }

    /// Writes new addresses and ports; every checksum that covers them follows. Of a later fragment
    /// the addresses alone are here.
    pub fn translate(&mut self, src: (Addr, u16), dst: (Addr, u16)) {
        let before = self.addresses();
        self.readdress(src.0, dst.0);
        let after = self.addresses();
        if let Part::Later(_) = self.part {
            return;
        }
        let ports = [src.1.to_be_bytes(), dst.1.to_be_bytes()].concat();
        let old = [&before[..], &self.payload[..4]].concat();
        let new = [&after[..], &ports].concat();
        let at = self.checksum_at();
        let checksum = be16(&self.payload, at);
        self.payload[..4].copy_from_slice(&ports);
        let checksum = match (self.proto(), update(checksum, &old, &new)) {
            // RFC 768: zero says that there is no checksum, and one that computes to zero is sent
            // as all ones.
            (IPPROTO_UDP, _) if checksum == 0 => 0,
            (IPPROTO_UDP, 0) => 0xffff,
            (_, checksum) => checksum,
        };
        self.payload[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    /// The same packet with the checksums that it should have. A UDP datagram without one stays
    /// without.
    pub fn repaired(&self) -> Self {
        let mut packet = self.clone();
        if let Header::V4(h) = &mut packet.header {
            h.checksum = h.right_checksum();
        }
        let at = packet.checksum_at();
        if packet.is_without_checksum() {
            return packet;
        }
        packet.payload[at..at + 2].fill(0);
        let segment = match packet.proto() {
            IPPROTO_UDP => &packet.payload[..be16(&packet.payload, 4).into()],
            _ => &packet.payload[..],
        };
        let checksum = transport_checksum(packet.src(), packet.dst(), packet.proto(), segment);
        packet.payload[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    /// A UDP datagram whose sender computed no checksum.
    pub fn is_without_checksum(&self) -> bool {
        self.proto() == IPPROTO_UDP && be16(&self.payload, 6) == 0
    }

    /// Bytes behind a UDP datagram inside its IP packet (RFC 9868: the surplus area).
    pub fn surplus(&self) -> usize {
        match self.proto() {
            IPPROTO_UDP => self.payload.len().saturating_sub(be16(&self.payload, 4).into()),
            _ => 0,
        }
    }

    fn checksum_at(&self) -> usize {
        if self.proto() == IPPROTO_UDP { 6 } else { 16 }
    }

    /// Source and destination, as they stand in the header.
    fn addresses(&self) -> Vec<u8> {
        addresses(self.src(), self.dst())
    }
}

/// Two addresses as they stand in the headers.
fn addresses(src: Addr, dst: Addr) -> Vec<u8> {
    match src.family() {
        Family::V4 => [src.v4_bytes(), dst.v4_bytes()].concat(),
        Family::V6 => [src.0, dst.0].concat(),
    }
}

/// The checksum of a segment with its pseudo header (RFC 9293 section 3.1, RFC 768, RFC 8200
/// section 8.1), in which its own field is zero. For UDP a zero is sent as all ones.
pub fn transport_checksum(src: Addr, dst: Addr, proto: u8, segment: &[u8]) -> u16 {
    let mut covered = addresses(src, dst);
    // IPv4's pseudo header has a zero, the protocol and a length of two bytes, IPv6's a length of
    // four bytes, three zeros and the protocol: the same sum.
    covered.extend((segment.len() as u32).to_be_bytes());
    covered.extend([0, 0, 0, proto]);
    covered.extend(segment);
    match checksum(&covered) {
        0 if proto == IPPROTO_UDP => 0xffff,
        checksum => checksum,
    }
}

/// Header, its length, the packet's length, and which part of it this is, if that can be told.
type Parsed = (Header, usize, usize, Result<Part, Reason>);

fn v4(bytes: &[u8]) -> Result<Parsed, Reason> {
    let fixed = bytes.get(..20).ok_or(Reason::IpMalformed)?;
    if fixed[0] >> 4 != 4 {
        return Err(Reason::NotIp);
    }
    let header_len = usize::from(fixed[0] & 0xf) * 4;
    let total_len = be16(fixed, 2);
    let len = usize::from(total_len);
    if header_len < 20 || len < header_len || len > bytes.len() {
        return Err(Reason::IpMalformed);
    }
    let addr = |at: usize| Addr::from_v4(std::array::from_fn(|i| fixed[at + i]));
    let header = V4 {
        class: fixed[1],
        total_len,
        id: be16(fixed, 4),
        fragment: be16(fixed, 6),
        ttl: fixed[8],
        protocol: fixed[9],
        checksum: be16(fixed, 10),
        src: addr(12),
        dst: addr(16),
        options: bytes[20..header_len].to_vec(),
    };
    // Of the flags and the offset "more fragments" and the offset count.
    let (more, offset) = (header.fragment & 0x2000 != 0, header.fragment & 0x1fff);
    let part = Part::of(header.id.into(), offset, more, header.protocol);
    Ok((Header::V4(header), header_len, len, part))
}

fn v6(bytes: &[u8]) -> Result<Parsed, Reason> {
    let fixed = bytes.get(..40).ok_or(Reason::IpMalformed)?;
    let first = be32(fixed, 0);
    if first >> 28 != 6 {
        return Err(Reason::NotIp);
    }
    let payload_len = be16(fixed, 4);
    // RFC 2675 section 2: hop-by-hop options come first and say the length, which must be above
    // 65,535. No frame here is.
    if payload_len == 0 && fixed[6] == 0 {
        return Err(Reason::Jumbogram);
    }
    let len = 40 + usize::from(payload_len);
    if len > bytes.len() {
        return Err(Reason::IpMalformed);
    }
    let addr = |at: usize| Addr(std::array::from_fn(|i| fixed[at + i]));
    let (src, dst) = (addr(8), addr(24));
    // IPv4-mapped addresses are not sent on the wire (RFC 4291 section 2.5.5.2, RFC 4038 4.2).
    if [src, dst].iter().any(|addr| addr.family() == Family::V4) {
        return Err(Reason::Martian);
    }
    let (protocol, chain_len, part) = match chain(fixed[6], &bytes[40..], true) {
        Ok((protocol, chain_len, part)) if 40 + chain_len <= len => (protocol, chain_len, Ok(part)),
        Ok(_) => (fixed[6], 0, Err(Reason::IpMalformed)),
        Err(reason) => (fixed[6], 0, Err(reason)),
    };
    let header = V6 {
        class: (first >> 20) as u8,
        flow_label: first & 0xf_ffff,
        payload_len,
        next_header: fixed[6],
        hop_limit: fixed[7],
        src,
        dst,
        extensions: bytes[40..40 + chain_len].to_vec(),
        protocol,
    };
    Ok((Header::V6(header), 40 + chain_len, len, part))
}

/// IANA IPv6 extension header types.
mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
    pub const MOBILITY: u8 = 135;
    pub const HOST_IDENTITY: u8 = 139;
    pub const SHIM6: u8 = 140;

    /// Those behind which a packet goes on, and which say nothing that a translation contradicts.
    pub const FOLLOWED: [u8; 3] = [HOP_BY_HOP, ROUTING, DESTINATION];
    /// Those that are left to the kernel.
    pub const LEFT: [u8; 4] = [AUTHENTICATION, MOBILITY, HOST_IDENTITY, SHIM6];
    /// Headers that are followed at most.
    pub const MOST: usize = 6;
    /// Bytes of them that are followed at most.
    pub const MOST_BYTES: usize = 256;
}

/// Protocol behind a chain of extension headers (RFC 8200 section 4), the chain's length, and which
/// part of the packet it belongs to. The chain of a later fragment ends in front of its fragment
/// header, and so does any if `fragments` are not to be followed.
///
/// # Errors
/// `ExtensionChain` (pass): longer than is followed, of a kind that is not followed, a fragment of a
/// fragment, or a route that goes on elsewhere. `RoutingHeader` (drop): RFC 5095 section 3.
/// `IpMalformed` (drop): cut short. `L4Malformed` (drop): as in [`Part::of`].
pub fn chain(first: u8, bytes: &[u8], fragments: bool) -> Result<(u8, usize, Part), Reason> {
    let (mut next, mut len, mut part) = (first, 0, Part::Whole);
    let mut count = 0;
    let goes_on =
        |next| extension::FOLLOWED.contains(&next) || fragments && next == extension::FRAGMENT;
    while goes_on(next) && count < extension::MOST {
        let Some(header) = bytes.get(len..len + 8) else { return Err(Reason::IpMalformed) };
        let (behind, kind, segments_left) = (header[0], header[2], header[3]);
        count += 1;
        if next == extension::FRAGMENT {
            if part != Part::Whole {
                return Err(Reason::ExtensionChain);
            }
            // Two reserved bits stand between offset and flag; who sets them means something.
            let (offset, flags) = (be16(header, 2) >> 3, be16(header, 2) & 7);
            part = Part::of(be32(header, 4), offset, flags & 1 != 0, behind)?;
            if let Part::Later(_) = part {
                return Ok((next, len, part));
            }
            len += 8;
            next = behind;
            continue;
        }
        if next == extension::ROUTING && segments_left != 0 {
            return Err(if kind == 0 { Reason::RoutingHeader } else { Reason::ExtensionChain });
        }
        len += (usize::from(header[1]) + 1) * 8;
        if len > extension::MOST_BYTES {
            return Err(Reason::ExtensionChain);
        }
        next = behind;
    }
    if goes_on(next) || extension::LEFT.contains(&next) {
        return Err(Reason::ExtensionChain);
    }
    Ok((next, len, part))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

/// The protocol number of a family's ICMP (RFC 792, RFC 4443 section 1).
pub const fn icmp_of(family: Family) -> u8 {
    match family {
        Family::V4 => IPPROTO_ICMP,
        Family::V6 => IPPROTO_ICMPV6,
    }
}
