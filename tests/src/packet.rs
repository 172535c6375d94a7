//! Packets, built and summed up here and by pnet, never by the datapath under test.
//!
//! A [`Packet`] is a description; [`Packet::bytes`] computes every length and every checksum from
//! nothing. What the datapath makes by differences must equal what is made here from the whole.

use pnet::packet::ip::IpNextHeaderProtocol;
use pnet::packet::util;
use sluice_abi::{Addr, Family, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Mac};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::world::mac;

/// TCP control bits (RFC 9293 section 3.1).
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// PSH.
    pub const PSH: u8 = 0x08;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

/// An Ethernet frame with an IP packet of TCP or UDP.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Ethernet source.
    pub eth_src: Mac,
    /// Ethernet destination.
    pub eth_dst: Mac,
    /// IP source.
    pub src: Addr,
    /// IP destination.
    pub dst: Addr,
    /// TCP or UDP; anything else has a payload only, of which ICMP's checksum is made here.
    pub proto: u8,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Type of service or traffic class.
    pub class: u8,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4 flags and fragment offset.
    pub fragment: u16,
    /// TCP control bits.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
    /// TCP options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// VLAN tags, outermost first: EtherType and control.
    pub tags: Vec<(u16, u16)>,
    /// Options of the IPv4 header, a multiple of four bytes.
    pub ip_options: Vec<u8>,
    /// Extension headers of IPv6: each its number and its bytes, of which the first is made here.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// UDP without a checksum.
    pub no_checksum: bool,
    /// What follows the transport header.
    pub payload: Vec<u8>,
    /// Which fragment of the packet this is: the identification, and which bytes behind the IP header
    /// and extension headers; the first byte's number a multiple of eight.
    pub piece: Option<(u32, std::ops::Range<usize>)>,
}

impl Packet {
    /// A frame from the gateway to the uplink.
    pub fn new(proto: u8, src: (Addr, u16), dst: (Addr, u16)) -> Self {
        Self {
            eth_src: mac::GATEWAY,
            eth_dst: mac::UPLINK,
            src: src.0,
            dst: dst.0,
            proto,
            src_port: src.1,
            dst_port: dst.1,
            hop_limit: 61,
            class: 0,
            id: 0x1234,
            fragment: 0x4000,
            flags: tcp::SYN,
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            options: Vec::new(),
            tags: Vec::new(),
            ip_options: Vec::new(),
            extensions: Vec::new(),
            no_checksum: false,
            payload: b"an odd number of bytes".to_vec(),
            piece: None,
        }
    }

    /// The packet with other link-layer addresses.
    pub fn eth(mut self, src: Mac, dst: Mac) -> Self {
        (self.eth_src, self.eth_dst) = (src, dst);
        self
    }

    /// The packet from another source.
    pub fn from(mut self, src: Addr, port: u16) -> Self {
        (self.src, self.src_port) = (src, port);
        self
    }

    /// The packet to another destination.
    pub fn to(mut self, dst: Addr, port: u16) -> Self {
        (self.dst, self.dst_port) = (dst, port);
        self
    }

    /// The packet with other TCP control bits.
    pub fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// The packet with another hop limit.
    pub fn hop_limit(mut self, hop_limit: u8) -> Self {
        self.hop_limit = hop_limit;
        self
    }

    /// One hop further.
    pub fn hop(self) -> Self {
        let hop_limit = self.hop_limit - 1;
        self.hop_limit(hop_limit)
    }

    /// The packet with another payload.
    pub fn payload(mut self, payload: Vec<u8>) -> Self {
        self.payload = payload;
        self
    }

    /// The packet at another place of its TCP connection.
    pub fn at(mut self, seq: u32, ack: u32) -> Self {
        (self.seq, self.ack) = (seq, ack);
        self
    }

    /// The packet with these VLAN tags.
    pub fn tags(mut self, tags: &[(u16, u16)]) -> Self {
        self.tags = tags.to_vec();
        self
    }

    /// The packet with options in its IPv4 header.
    pub fn options_of_ip(mut self, options: &[u8]) -> Self {
        self.ip_options = options.to_vec();
        self
    }

    /// The packet with extension headers.
    pub fn extensions(mut self, extensions: &[(u8, Vec<u8>)]) -> Self {
        self.extensions = extensions.to_vec();
        self
    }

    /// A fragment of the packet.
    pub fn piece(mut self, id: u32, bytes: std::ops::Range<usize>) -> Self {
        self.piece = Some((id, bytes));
        self
    }

    /// The answer: addresses, ports and TCP numbers exchanged on every layer.
    pub fn answer(mut self) -> Self {
        std::mem::swap(&mut self.eth_src, &mut self.eth_dst);
        std::mem::swap(&mut self.src, &mut self.dst);
        std::mem::swap(&mut self.src_port, &mut self.dst_port);
        std::mem::swap(&mut self.seq, &mut self.ack);
        if self.proto == IPPROTO_TCP {
            self.flags = if self.flags & tcp::SYN != 0 { tcp::SYN | tcp::ACK } else { tcp::ACK };
        }
        self
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.dst.family()
    }

    /// Transport header and payload.
    fn segment(&self) -> Vec<u8> {
        let mut segment = Vec::new();
        match self.proto {
            IPPROTO_TCP => {
                segment.extend(self.src_port.to_be_bytes());
                segment.extend(self.dst_port.to_be_bytes());
                segment.extend(self.seq.to_be_bytes());
                segment.extend(self.ack.to_be_bytes());
                segment.push(((20 + self.options.len()) as u8 / 4) << 4);
                segment.push(self.flags);
                segment.extend(0xfaf0u16.to_be_bytes());
                segment.extend([0; 4]);
                segment.extend(&self.options);
                segment.extend(&self.payload);
                let sum = self.checksum(&segment, 8);
                segment[16..18].copy_from_slice(&sum.to_be_bytes());
            }
            IPPROTO_UDP => {
                segment.extend(self.src_port.to_be_bytes());
                segment.extend(self.dst_port.to_be_bytes());
                segment.extend((8 + self.payload.len() as u16).to_be_bytes());
                segment.extend([0; 2]);
                segment.extend(&self.payload);
                if !self.no_checksum {
                    let sum = match self.checksum(&segment, 3) {
                        0 => 0xffff,
                        sum => sum,
                    };
                    segment[6..8].copy_from_slice(&sum.to_be_bytes());
                }
            }
            IPPROTO_ICMP | IPPROTO_ICMPV6 => {
                segment.extend(&self.payload);
                if segment.len() >= 4 {
                    let sum = match self.proto {
                        IPPROTO_ICMP => util::checksum(&segment, 1),
                        _ => self.checksum(&segment, 1),
                    };
                    segment[2..4].copy_from_slice(&sum.to_be_bytes());
                }
            }
            _ => segment.extend(&self.payload),
        }
        segment
    }

    fn checksum(&self, segment: &[u8], skip_word: usize) -> u16 {
        let proto = IpNextHeaderProtocol(self.proto);
        match (self.src.to_ip(), self.dst.to_ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                util::ipv4_checksum(segment, skip_word, &[], &src, &dst, proto)
            }
            _ => {
                let (src, dst) = (Ipv6Addr::from(self.src.0), Ipv6Addr::from(self.dst.0));
                util::ipv6_checksum(segment, skip_word, &[], &src, &dst, proto)
            }
        }
    }

    /// The extension headers, each with the number of the next.
    fn chain(&self) -> Vec<u8> {
        let mut chain = Vec::new();
        let last = if self.piece.is_some() { FRAGMENT_HEADER } else { self.proto };
        for (i, (_, bytes)) in self.extensions.iter().enumerate() {
            let next = self.extensions.get(i + 1).map_or(last, |(number, _)| *number);
            chain.push(next);
            chain.extend(&bytes[1..]);
        }
        chain
    }

    /// The frame.
    ///
    /// # Panics
    /// If the addresses are of two families.
    pub fn bytes(&self) -> Vec<u8> {
        assert_eq!(self.src.family(), self.dst.family());
        let whole = self.segment();
        let (mut id, mut offset, mut segment) =
            (u32::from(self.id), self.fragment, whole.as_slice());
        if let Some((number, piece)) = &self.piece {
            let end = piece.end.min(whole.len());
            let more = u16::from(end < whole.len());
            segment = &whole[piece.start..end];
            (id, offset) = (*number, (piece.start / 8) as u16 | more << 13);
        }
        let mut frame = Vec::new();
        frame.extend(self.eth_dst.0);
        frame.extend(self.eth_src.0);
        for (ethertype, control) in &self.tags {
            frame.extend(ethertype.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        match self.family() {
            Family::V4 => {
                frame.extend([0x08, 0x00]);
                let header_len = 20 + self.ip_options.len();
                let mut header = vec![0x40 | (header_len / 4) as u8, self.class];
                header.extend(((header_len + segment.len()) as u16).to_be_bytes());
                header.extend((id as u16).to_be_bytes());
                header.extend(offset.to_be_bytes());
                header.extend([self.hop_limit, self.proto, 0, 0]);
                header.extend(Ipv4Addr::from(self.src.v4_bytes()).octets());
                header.extend(Ipv4Addr::from(self.dst.v4_bytes()).octets());
                header.extend(&self.ip_options);
                let sum = util::checksum(&header, 5);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(header);
            }
            Family::V6 => {
                frame.extend([0x86, 0xdd]);
                frame.extend((6 << 28 | u32::from(self.class) << 20).to_be_bytes());
                let mut chain = self.chain();
                let first = if self.piece.is_some() {
                    chain.extend([self.proto, 0]);
                    chain.extend(((offset & 0x1fff) << 3 | offset >> 13).to_be_bytes());
                    chain.extend(id.to_be_bytes());
                    FRAGMENT_HEADER
                } else {
                    self.proto
                };
                frame.extend(((chain.len() + segment.len()) as u16).to_be_bytes());
                let next = self.extensions.first().map_or(first, |(number, _)| *number);
                frame.extend([next, self.hop_limit]);
                frame.extend(self.src.0);
                frame.extend(self.dst.0);
                frame.extend(chain);
            }
        }
        frame.extend(segment);
        frame
    }
}

/// The number of IPv6's fragment header (RFC 8200 section 4.5).
const FRAGMENT_HEADER: u8 = 44;

/// A VLAN tag (IEEE 802.1Q clause 9).
pub const fn tag(ethertype: u16, control: u16) -> (u16, u16) {
    (ethertype, control)
}

/// An extension header of `len` bytes, a multiple of eight: its length, and one padding option
/// (RFC 8200 section 4.2; to a routing header they are a type and no segments left).
pub fn extension(number: u8, len: usize) -> (u8, Vec<u8>) {
    let mut bytes = vec![0; len];
    bytes[1] = (len / 8 - 1) as u8;
    if number != 43 {
        bytes[2] = 1; // PadN
        bytes[3] = (len - 4) as u8;
    }
    (number, bytes)
}

/// The VXLAN header (RFC 7348 section 5) with the I flag, and an inner frame: an outer payload.
pub fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut payload = 0x0800_0000u32.to_be_bytes().to_vec();
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner);
    payload
}

/// An ICMP or ICMPv6 packet from the gateway to the uplink: type and code, the four bytes behind the
/// checksum, and the rest.
pub fn icmp(src: Addr, dst: Addr, kind: (u8, u8), rest: u32, body: &[u8]) -> Packet {
    let proto = match dst.family() {
        Family::V4 => IPPROTO_ICMP,
        Family::V6 => IPPROTO_ICMPV6,
    };
    let message = [&[kind.0, kind.1, 0, 0][..], &rest.to_be_bytes(), body].concat();
    Packet::new(proto, (src, 0), (dst, 0)).payload(message)
}

/// Bytes of the headers of `family` up to the transport header.
pub fn l4_offset(family: Family) -> usize {
    match family {
        Family::V4 => 14 + 20,
        Family::V6 => 14 + 40,
    }
}

/// The family of a frame by its EtherType; nothing if it is neither.
pub fn family_of(frame: &[u8]) -> Option<Family> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(Family::V4),
        [0x86, 0xdd] => Some(Family::V6),
        _ => None,
    }
}

/// Where the transport header of a frame begins, behind tags, options and extension headers.
///
/// # Panics
/// If it is not an IP packet, or not long enough.
pub fn l4_of(frame: &[u8]) -> usize {
    let mut l3 = 14;
    while matches!(frame[l3 - 2..l3], [0x81, 0x00] | [0x88, 0xa8]) {
        l3 += 4;
    }
    match frame[l3] >> 4 {
        4 => l3 + (frame[l3] & 0xf) as usize * 4,
        6 => {
            let (mut next, mut at) = (frame[l3 + 6], l3 + 40);
            while [0, 43, FRAGMENT_HEADER, 60].contains(&next) {
                let len = if next == FRAGMENT_HEADER { 0 } else { frame[at + 1] as usize };
                next = frame[at];
                at += (len + 1) * 8;
            }
            at
        }
        version => panic!("IP version {version}"),
    }
}

/// Source port of a frame.
///
/// # Panics
/// If it is not long enough.
pub fn src_port(frame: &[u8]) -> u16 {
    let at = l4_of(frame);
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// The frame inside a VXLAN packet.
///
/// # Panics
/// If it is not long enough.
pub fn inner(frame: &[u8]) -> &[u8] {
    &frame[l4_of(frame) + 16..]
}
