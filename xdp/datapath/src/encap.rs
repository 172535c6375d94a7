//! The outer headers (RFC 7348 section 5; addresses, lengths and checksums of our own making).

use crate::access::{At, Frame, View};
use crate::csum::Sum;
use crate::field;
use crate::parse::L3;
use crate::replay::Located;
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, FLAG_VNI, Ipv4, Ipv6, Ports, Udp, Vxlan,
};
use sluice_abi::{Be16, Be32, Family, IPPROTO_UDP, Mac, Vtep};

/// Bytes of the outer headers over IPv4.
pub const OUTER_V4: u32 = 50;
/// Bytes of the outer headers over IPv6.
pub const OUTER_V6: u32 = 70;

/// UDP, VXLAN and inner Ethernet headers: what the outer payload is longer than the inner packet.
const INNER_OVERHEAD: u16 = 8 + 8 + 14;
/// Hop limit of what we send ourselves (IANA default TTL).
const HOP_LIMIT: u8 = Vtep::OUTER_HOP_LIMIT;

/// What the outer headers need to know of the packet inside.
#[derive(Clone, Copy)]
pub struct Inside {
    /// The IP packet's bytes.
    pub ip_len: u32,
    /// Outer UDP source port: entropy for the underlay's load balancing.
    pub port: Be16,
    /// The inner traffic class; its ECN field is copied (RFC 6040 section 4.1, normal mode).
    pub class: u8,
    /// Sum of the inner frame, zero if it is not known (outer headers over IPv4 need none).
    pub sum: u16,
}

/// Bytes of the outer headers, Ethernet included.
#[inline(always)]
pub fn outer_len(vtep: At<'_, Vtep>) -> u32 {
    if is_v4(vtep) { OUTER_V4 } else { OUTER_V6 }
}

#[inline(always)]
fn is_v4(vtep: At<'_, Vtep>) -> bool {
    field!(vtep, Vtep, remote).get().family() == Family::V4
}

/// Whether [`inner_sum`] knows the sum of the inner frame: there are no extension headers, and the
/// transport checksum is there and covers the packet to its end.
#[inline(always)]
pub fn is_summed(packet: &Located<'_>) -> bool {
    if packet.ip.proto != IPPROTO_UDP {
        return true;
    }
    let Some(udp) = packet.l3.skip(packet.ip.l3.header_len()).at::<Udp>() else { return false };
    let payload_len = packet.ip.len.wrapping_sub(packet.ip.header_len);
    let whole = field!(udp, Udp, len).get().host() as u32 == payload_len;
    whole && field!(udp, Udp, checksum).get() != Be16::new(0)
}

/// The one's complement sum of the whole inner frame from its headers alone, for the plain form: a
/// right transport checksum makes pseudo header and segment sum up to zero (kernel
/// Documentation/networking/checksum-offloads.rst, "LCO"). A wrong one makes the outer wrong too.
#[inline(always)]
pub fn inner_sum(packet: &Located<'_>) -> u16 {
    let (eth, ip) = (packet.eth, &packet.ip);
    let e = eth.get();
    let d = e.dst.0;
    let s = e.src.0;
    let word = |a: u8, b: u8| u16::from_ne_bytes([a, b]);
    let sum = Sum::default()
        .add16(word(d[0], d[1]))
        .add16(word(d[2], d[3]))
        .add16(word(d[4], d[5]))
        .add16(word(s[0], s[1]))
        .add16(word(s[2], s[3]))
        .add16(word(s[4], s[5]))
        .add16(e.ethertype.raw());
    let sum = match ip.l3 {
        // A right IPv4 header sums up to zero; of the segment remains the pseudo header, negated.
        L3::V4(at) => {
            let h = at.get();
            let l4_len = Be16::new(ip.len.wrapping_sub(ip.header_len) as u16);
            sum.sub32(u32::from_ne_bytes(h.src))
                .sub32(u32::from_ne_bytes(h.dst))
                .sub16(word(0, h.protocol))
                .sub16(l4_len.raw())
        }
        // Addresses and length stand in the header and, negated, in the pseudo header.
        L3::V6(at) => {
            let h = at.get();
            sum.add32(h.version_class_flow.raw())
                .add16(word(h.next_header, h.hop_limit))
                .sub16(word(0, h.next_header))
        }
    };
    match sum.fold() {
        0 => 0xffff,
        sum => sum,
    }
}

/// Writes the outer headers into the room that `adjust_head` made. False if there is none.
#[inline(always)]
pub fn write<F: Frame>(
    frame: &F,
    vtep: At<'_, Vtep>,
    dst_mac: At<'_, Mac>,
    src_mac: At<'_, Mac>,
    inside: &Inside,
) -> bool {
    let view = frame.view();
    let Some(eth) = view.at::<Ethernet>() else {
        return false;
    };
    field!(eth, Ethernet, dst).copy_from(dst_mac);
    field!(eth, Ethernet, src).copy_from(src_mac);
    write_behind_macs(view, eth, vtep, inside)
}

/// The same but for the Ethernet addresses. `eth` is where `view` begins.
#[inline(always)]
pub fn write_behind_macs(
    view: View<'_>,
    eth: At<'_, Ethernet>,
    vtep: At<'_, Vtep>,
    inside: &Inside,
) -> bool {
    let ip = view.skip(size_of::<Ethernet>());
    if is_v4(vtep) {
        field!(eth, Ethernet, ethertype).set(ETHERTYPE_IPV4);
        let (Some(ip), udp) = (ip.at::<Ipv4>(), ip.skip(size_of::<Ipv4>())) else {
            return false;
        };
        write_v4(ip, vtep, inside);
        write_udp(udp, vtep, inside, None)
    } else {
        field!(eth, Ethernet, ethertype).set(ETHERTYPE_IPV6);
        let (Some(ip), udp) = (ip.at::<Ipv6>(), ip.skip(size_of::<Ipv6>())) else {
            return false;
        };
        let addresses = write_v6(ip, vtep, inside);
        write_udp(udp, vtep, inside, Some(addresses))
    }
}

#[inline(always)]
fn outer_class(vtep: At<'_, Vtep>, inside: &Inside) -> u8 {
    let (class, kept) = (field!(vtep, Vtep, class).get(), field!(vtep, Vtep, class_kept).get());
    Vtep::outer_class(class, kept, inside.class)
}

#[inline(always)]
fn write_v4(ip: At<'_, Ipv4>, vtep: At<'_, Vtep>, inside: &Inside) {
    let total_len = Be16::new(inside.ip_len as u16 + 20 + INNER_OVERHEAD);
    let class = outer_class(vtep, inside);
    let first = Be16::new(0x4500 | class as u16);
    let sum = Sum(field!(vtep, Vtep, ip_sum).get() as u64)
        .add16(first.raw())
        .add16(total_len.raw())
        .fold();
    field!(ip, Ipv4, version_ihl).set(0x45);
    field!(ip, Ipv4, tos).set(class);
    field!(ip, Ipv4, total_len).set(total_len);
    field!(ip, Ipv4, id).set(Be16::new(0));
    field!(ip, Ipv4, fragment).set(Vtep::OUTER_FRAGMENT);
    field!(ip, Ipv4, ttl).set(HOP_LIMIT);
    field!(ip, Ipv4, protocol).set(IPPROTO_UDP);
    field!(ip, Ipv4, checksum).set(Be16::from_raw(!sum));
    field!(ip, Ipv4, src).set(field!(vtep, Vtep, local).get().v4_bytes());
    field!(ip, Ipv4, dst).set(field!(vtep, Vtep, remote).get().v4_bytes());
}

/// Returns the sum of the addresses.
#[inline(always)]
fn write_v6(ip: At<'_, Ipv6>, vtep: At<'_, Vtep>, inside: &Inside) -> u16 {
    let (src, dst) = (field!(vtep, Vtep, local).get(), field!(vtep, Vtep, remote).get());
    let first = Be32::new(0x6000_0000 | (outer_class(vtep, inside) as u32) << 20);
    field!(ip, Ipv6, version_class_flow).set(first);
    field!(ip, Ipv6, payload_len).set(Be16::new(inside.ip_len as u16 + INNER_OVERHEAD));
    field!(ip, Ipv6, next_header).set(IPPROTO_UDP);
    field!(ip, Ipv6, hop_limit).set(HOP_LIMIT);
    field!(ip, Ipv6, src).set(src);
    field!(ip, Ipv6, dst).set(dst);
    Sum::default().add_addr(src, false).add_addr(dst, false).fold()
}

/// UDP and VXLAN. Over IPv4 the checksum is zero (RFC 7348 section 5); over IPv6 it is right,
/// because a receiver need not take zero (RFC 6935 section 5; the kernel's vxlan device does not by
/// default).
#[inline(always)]
fn write_udp(view: View<'_>, vtep: At<'_, Vtep>, inside: &Inside, addresses: Option<u16>) -> bool {
    let (Some(udp), Some(vxlan)) = (view.at::<Udp>(), view.skip(size_of::<Udp>()).at::<Vxlan>())
    else {
        return false;
    };
    let len = Be16::new(inside.ip_len as u16 + INNER_OVERHEAD);
    let dst = field!(vtep, Vtep, port).get();
    let flags = Be32::new(FLAG_VNI);
    let vni = field!(vtep, Vtep, vni).get();
    let checksum = match addresses {
        Some(addresses) if inside.sum != 0 => {
            let sum = Sum(inside.sum as u64)
                .add16(addresses)
                .add16(len.raw())
                .add16(Be16::new(IPPROTO_UDP as u16).raw())
                .add16(inside.port.raw())
                .add16(dst.raw())
                .add16(len.raw())
                .add32(flags.raw())
                .add32(vni.raw())
                .fold();
            Be16::from_raw(if sum == 0xffff { 0xffff } else { !sum })
        }
        _ => Be16::new(0),
    };
    let ports = field!(udp, Udp, ports);
    field!(ports, Ports, src).set(inside.port);
    field!(ports, Ports, dst).set(dst);
    field!(udp, Udp, len).set(len);
    field!(udp, Udp, checksum).set(checksum);
    field!(vxlan, Vxlan, flags).set(flags);
    field!(vxlan, Vxlan, vni).set(vni);
    true
}
