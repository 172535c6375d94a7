//! From bytes to a flat description, once per header stack.
//!
//! What cannot be a packet is malformed (dropped); what Sluice does not handle is named (passed).
//! Rules on receipt: RFC 791 3.1, RFC 8200 3, RFC 768, RFC 9293 3.1, RFC 7348 5.

use crate::access::{At, View};
use crate::field;
use crate::verdict::Step;
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, Ethernet, FRAGMENT_MASK, Ipv4,
    Ipv6, NEXT_HEADER_FRAGMENT, Ports, Tcp, Udp, is_extension_header,
};
use sluice_abi::{Addr, Be16, Be32, Family, IPPROTO_TCP, IPPROTO_UDP, Reason};

/// The network header in the packet.
#[derive(Clone, Copy)]
pub enum L3<'a> {
    /// IPv4.
    V4(At<'a, Ipv4>),
    /// IPv6.
    V6(At<'a, Ipv6>),
}

impl L3<'_> {
    /// Whether the header is IPv4.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        matches!(self, L3::V4(_))
    }

    /// The family.
    #[inline(always)]
    pub fn family(&self) -> Family {
        if self.is_v4() { Family::V4 } else { Family::V6 }
    }

    /// Source address.
    #[inline(always)]
    pub fn src(&self) -> Addr {
        match self {
            L3::V4(at) => Addr::from_v4(field!(at, Ipv4, src).get()),
            L3::V6(at) => field!(at, Ipv6, src).get(),
        }
    }

    /// Destination address.
    #[inline(always)]
    pub fn dst(&self) -> Addr {
        match self {
            L3::V4(at) => Addr::from_v4(field!(at, Ipv4, dst).get()),
            L3::V6(at) => field!(at, Ipv6, dst).get(),
        }
    }

    /// Bytes of the header.
    #[inline(always)]
    pub fn header_len(&self) -> usize {
        if self.is_v4() { size_of::<Ipv4>() } else { size_of::<Ipv6>() }
    }
}

/// An IP packet.
#[derive(Clone, Copy)]
pub struct Ip<'a> {
    /// The header in the packet.
    pub l3: L3<'a>,
    /// Protocol of the payload, if `opaque` is none.
    pub proto: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Header and payload, as the header says, in bytes. At most what the frame holds.
    pub len: u32,
    /// What hides the transport header: options, extension headers, a fragment.
    pub opaque: Option<Reason>,
}

/// A TCP or UDP header.
#[derive(Clone, Copy)]
pub struct Transport<'a> {
    /// Where the ports are.
    pub ports: At<'a, Ports>,
    /// Source port.
    pub src: Be16,
    /// Destination port.
    pub dst: Be16,
    /// Where the checksum is.
    pub checksum: At<'a, Be16>,
    /// TCP control bits; 0 for UDP.
    pub flags: u8,
    /// TCP sequence number; 0 for UDP.
    pub seq: Be32,
    /// TCP acknowledgement number; 0 for UDP.
    pub ack: Be32,
}

/// The Ethernet header at the start of `view`, and the IP packet behind it.
///
/// # Errors
/// `NotIp`, `Vlan` (pass); `IpMalformed`, `Martian` (drop).
#[inline(always)]
pub fn ethernet<'a>(view: View<'a>) -> Step<(At<'a, Ethernet>, Ip<'a>)> {
    let eth = view.at::<Ethernet>().ok_or(Reason::NotIp)?;
    let ethertype = field!(eth, Ethernet, ethertype).get();
    let l3 = view.skip(size_of::<Ethernet>());
    let ip = if ethertype == ETHERTYPE_IPV4 {
        ipv4(l3)?
    } else if ethertype == ETHERTYPE_IPV6 {
        ipv6(l3)?
    } else if ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ {
        return Err(Reason::Vlan.into());
    } else {
        return Err(Reason::NotIp.into());
    };
    Ok((eth, ip))
}

#[inline(always)]
fn ipv4<'a>(view: View<'a>) -> Step<Ip<'a>> {
    let at = view.at::<Ipv4>().ok_or(Reason::IpMalformed)?;
    let header = at.get();
    if header.version_ihl >> 4 != 4 {
        return Err(Reason::NotIp.into());
    }
    let header_len = (header.version_ihl as u32 & 0xf) * 4;
    let len = header.total_len.host() as u32;
    if header_len < 20 || len < header_len || len as usize > view.len() {
        return Err(Reason::IpMalformed.into());
    }
    let opaque = if header_len != 20 {
        Some(Reason::IpOptions)
    } else if header.fragment.host() & FRAGMENT_MASK != 0 {
        Some(Reason::Fragment)
    } else {
        None
    };
    Ok(Ip { l3: L3::V4(at), proto: header.protocol, hop_limit: header.ttl, len, opaque })
}

#[inline(always)]
fn ipv6<'a>(view: View<'a>) -> Step<Ip<'a>> {
    let at = view.at::<Ipv6>().ok_or(Reason::IpMalformed)?;
    let header = at.get();
    if header.version_class_flow.host() >> 28 != 6 {
        return Err(Reason::NotIp.into());
    }
    let len = header.payload_len.host() as u32 + 40;
    if len as usize > view.len() {
        return Err(Reason::IpMalformed.into());
    }
    // A v4-mapped address on the wire would meet the tables' IPv4 entries (RFC 4038 section 4.2).
    if header.src.family() == Family::V4 || header.dst.family() == Family::V4 {
        return Err(Reason::Martian.into());
    }
    let opaque = if header.next_header == NEXT_HEADER_FRAGMENT {
        Some(Reason::Fragment)
    } else if is_extension_header(header.next_header) {
        Some(Reason::IpOptions)
    } else {
        None
    };
    Ok(Ip { l3: L3::V6(at), proto: header.next_header, hop_limit: header.hop_limit, len, opaque })
}

/// The transport header of `ip`, whose Ethernet header begins at `view`.
///
/// # Errors
/// `Fragment`, `IpOptions`, `OtherProtocol` (pass); `L4Malformed` (drop).
#[inline(always)]
pub fn transport<'a>(view: View<'a>, ip: &Ip<'a>) -> Step<Transport<'a>> {
    if let Some(reason) = ip.opaque {
        return Err(reason.into());
    }
    let payload_len = ip.len.wrapping_sub(ip.l3.header_len() as u32);
    let payload = payload(view, ip);
    match ip.proto {
        IPPROTO_TCP => tcp(payload, payload_len),
        IPPROTO_UDP => udp(payload, payload_len),
        _ => Err(Reason::OtherProtocol.into()),
    }
}

/// What follows the IP header of a packet whose Ethernet header begins at `view`.
#[inline(always)]
pub fn payload<'a>(view: View<'a>, ip: &Ip<'_>) -> View<'a> {
    view.skip(size_of::<Ethernet>()).skip(ip.l3.header_len())
}

#[inline(always)]
fn tcp<'a>(view: View<'a>, payload_len: u32) -> Step<Transport<'a>> {
    let at = view.at::<Tcp>().ok_or(Reason::L4Malformed)?;
    let header_len = (field!(at, Tcp, data_offset).get() >> 4) as u32 * 4;
    if header_len < 20 || header_len > payload_len {
        return Err(Reason::L4Malformed.into());
    }
    let ports = field!(at, Tcp, ports);
    let Ports { src, dst } = ports.get();
    let flags = field!(at, Tcp, flags).get();
    let (seq, ack) = (field!(at, Tcp, seq).get(), field!(at, Tcp, ack).get());
    Ok(Transport { ports, src, dst, checksum: field!(at, Tcp, checksum), flags, seq, ack })
}

#[inline(always)]
fn udp<'a>(view: View<'a>, payload_len: u32) -> Step<Transport<'a>> {
    let at = view.at::<Udp>().ok_or(Reason::L4Malformed)?;
    let len = field!(at, Udp, len).get().host() as u32;
    if len < 8 || len > payload_len {
        return Err(Reason::L4Malformed.into());
    }
    let ports = field!(at, Udp, ports);
    let Ports { src, dst } = ports.get();
    let none = Be32::new(0);
    let checksum = field!(at, Udp, checksum);
    Ok(Transport { ports, src, dst, checksum, flags: 0, seq: none, ack: none })
}
