//! What a router and a NAT owe to the sender of a packet that goes no further: ICMP errors (RFC 792,
//! RFC 1812 section 4.3, RFC 4443) and TCP resets (RFC 9293 section 3.10.7.1).
//!
//! ```text
//!  came    [tags] [outer]  Ethernet │ IP ...  the packet, untouched
//!                                   └──────── quote ─────────┐
//!  leaves  [tags] [outer]  Ethernet │ IP │ ICMP │ IP ...     │ cut at 576 bytes, 1280 with IPv6
//! ```
//!
//! A program that stops on a packet that is to be answered leaves a [`note`] and changes lanes; what
//! runs here starts from the untouched frame, makes the answer in its place and sends it back the way
//! it came: out of the same interface, through the same tunnel, with the same tags.
//!
//! Never answered are groups, martian sources, TCP resets, ICMP and later fragments: those packets
//! stop earlier, for reasons of their own.

use crate::access::{At, Frame, View};
use crate::account::{self, account};
use crate::csum::{Sum, negate};
use crate::encap::{self, Inside};
use crate::env::Env;
use crate::field;
use crate::hash::FlowHash;
use crate::limit;
use crate::parse::{self, TAG_LEN};
use crate::replay::Located;
use crate::verdict::{Action, Stop, Verdict};
use crate::wire::{
    DONT_FRAGMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, ICMP_FRAGMENTATION_NEEDED,
    ICMP_PORT_UNREACHABLE, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE, ICMPV6_PORT_UNREACHABLE,
    ICMPV6_TIME_EXCEEDED, ICMPV6_TOO_BIG, ICMPV6_UNREACHABLE, Icmp, Ipv4, Ipv6, Ports, TCP_ACK,
    TCP_FIN, TCP_RST, TCP_SYN, Tcp, Udp,
};
use core::mem::offset_of;
use sluice_abi::{
    Addr, AnswerKind, Be16, Be32, Family, Hook, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, Reason,
    Scratch, Seeds, Settings, Stopped, Tunnel, Vtep,
};

/// Hop limit of an answer (IANA default TTL).
const HOP_LIMIT: u8 = 64;
/// Type of service of an ICMP error: internetwork control (RFC 1812 section 4.3.2.5).
const ERROR_TOS: u8 = 0xc0;
/// Bytes that an IPv4 error quotes at most: 576 in all (RFC 1812 section 4.3.2.3).
const QUOTE_V4: u32 = 576 - size_of::<Ipv4>() as u32 - size_of::<Icmp>() as u32;
/// The same for IPv6: no more than the least MTU (RFC 4443 section 2.4 c).
const QUOTE_V6: u32 = 1280 - size_of::<Ipv6>() as u32 - size_of::<Icmp>() as u32;
/// Bytes of an Ethernet header.
const ETHERNET: u32 = size_of::<Ethernet>() as u32;

/// Leaves word of a packet for the program that answers it. `mtu` stands there already.
#[inline(always)]
pub fn note(scratch: At<'_, Scratch>, packet: &Located<'_>, tunnel: u32, stop: Stop) {
    let at = field!(scratch, Scratch, stopped);
    let l3 = packet.cut + packet.tags + ETHERNET;
    field!(at, Stopped, reason).set(stop.reason as u32);
    field!(at, Stopped, service).set(stop.service);
    field!(at, Stopped, tunnel).set(tunnel);
    field!(at, Stopped, l3).set(l3);
    field!(at, Stopped, l4).set(l3 + packet.ip.header_len);
    field!(at, Stopped, proto).set(packet.ip.proto as u32);
}

/// Answers the packet of which a [`note`] was left, and counts it: as dropped, because it is.
#[inline(always)]
pub fn answer<E: Env, F: Frame>(env: &E, frame: &mut F, hook: Hook) -> Verdict {
    let bytes = frame.view().len() as u64;
    let stop = match env.scratch() {
        Some(scratch) => {
            let stopped = field!(scratch, Scratch, stopped);
            let reason = Reason::from_number(field!(stopped, Stopped, reason).get());
            Stop { reason, service: field!(stopped, Stopped, service).get() }
        }
        None => Reason::TableBroken.into(),
    };
    let dropped: Verdict = stop.into();
    account(env, hook, &dropped, bytes);
    let action = match make(env, frame, stop.reason) {
        None => return dropped,
        Some(()) if hook == Hook::Xdp => Action::Transmit,
        Some(()) => Action::Redirect(frame.ingress_ifindex()),
    };
    Verdict { action, ..dropped }
}

/// What came, read before anything is written.
#[derive(Clone, Copy)]
struct Came {
    v4: bool,
    tcp: bool,
    src: Addr,
    dst: Addr,
    /// Bytes of the packet.
    len: u32,
    /// Where the innermost IP header and the transport header begin.
    l3: u32,
    l4: u32,
    /// The outermost Ethernet header and the tags behind it.
    link: Ethernet,
    tags: [Be32; 2],
    tags_len: u32,
}

/// Makes the answer, if one is owed and may be given. The frame is untouched otherwise, or spoilt.
#[inline(always)]
fn make<E: Env, F: Frame>(env: &E, frame: &mut F, reason: Reason) -> Option<()> {
    let scratch = env.scratch()?;
    let stopped = field!(scratch, Scratch, stopped).get();
    let view = frame.view();
    let link = view.at::<Ethernet>()?.get();
    let tags_len = tags_len(view, link.ethertype)?;
    let tags = [parse::tag(view, tags_len, 0), parse::tag(view, tags_len, 1)];
    let ip = view.skip(env.forget(stopped.l3) as usize & 0x7f);
    let v4 = ip.at::<u8>()?.get() >> 4 == 4;
    let (src, dst, len, dont_fragment) = if v4 {
        let ip = ip.at::<Ipv4>()?.get();
        let df = ip.fragment.host() & DONT_FRAGMENT != 0;
        (Addr::from_v4(ip.src), Addr::from_v4(ip.dst), ip.total_len.host() as u32, df)
    } else {
        let ip = ip.at::<Ipv6>()?.get();
        (ip.src, ip.dst, ip.payload_len.host() as u32 + size_of::<Ipv6>() as u32, true)
    };
    let tcp = if stopped.proto == IPPROTO_TCP as u32 {
        Some(view.skip(env.forget(stopped.l4) as usize & 0x1ff).at::<Tcp>()?.get())
    } else {
        None
    };
    let (l3, l4) = (stopped.l3, stopped.l4);
    let came = Came { v4, tcp: tcp.is_some(), src, dst, len, l3, l4, link, tags, tags_len };
    let kind = match reason {
        Reason::NoEndpoint | Reason::ClosedPort if tcp.is_none() => AnswerKind::PortUnreachable,
        Reason::NoEndpoint | Reason::ClosedPort => AnswerKind::Reset,
        Reason::TooBig if dont_fragment => AnswerKind::TooBig,
        Reason::HopLimitExceeded => AnswerKind::TimeExceeded,
        _ => return None,
    };
    if let (AnswerKind::Reset, Some(tcp)) = (kind, tcp)
        && tcp.flags & TCP_RST != 0
    {
        return None;
    }
    let vtep = if stopped.tunnel == 0 { None } else { Some(env.vtep(stopped.tunnel)?) };
    let made = limit::allow(env, src)
        && match (kind, tcp) {
            (AnswerKind::Reset, Some(tcp)) => reset(env, frame, &came, vtep, &tcp).is_some(),
            _ => error(env, frame, &came, vtep, kind, stopped.mtu).is_some(),
        };
    account::answer(env, kind, made);
    made.then_some(())
}

/// Bytes of the tags behind an Ethernet header.
#[inline(always)]
fn tags_len(view: View<'_>, ethertype: Be16) -> Option<u32> {
    if !parse::is_tag(ethertype) {
        return Some(0);
    }
    let behind = view.skip(TAG_LEN as usize).at::<Ethernet>()?;
    let two = parse::is_tag(field!(behind, Ethernet, ethertype).get());
    Some(if two { 2 * TAG_LEN } else { TAG_LEN })
}

/// Bytes in front of the innermost Ethernet header of an answer.
#[inline(always)]
fn lead(came: &Came, vtep: Option<At<'_, Vtep>>) -> u32 {
    came.tags_len + vtep.map_or(0, encap::outer_len)
}

#[inline(always)]
fn ip_header_len(v4: bool) -> u32 {
    if v4 { size_of::<Ipv4>() as u32 } else { size_of::<Ipv6>() as u32 }
}

/// Leaves of the frame `keep` bytes from the innermost IP header on, with `front` bytes before them.
#[inline(always)]
fn shape<F: Frame>(frame: &mut F, came: &Came, front: u32, keep: u32) -> Option<()> {
    let surplus = (frame.packet_len() as u32).wrapping_sub(came.l3 + keep);
    if surplus != 0 && !frame.cut_tail(surplus) {
        return None;
    }
    let move_by = came.l3.wrapping_sub(front) as i32;
    (move_by == 0 || frame.adjust_head(move_by)).then_some(())
}

/// Turns the packet into an ICMP error that quotes it.
#[inline(always)]
fn error<E: Env, F: Frame>(
    env: &E,
    frame: &mut F,
    came: &Came,
    vtep: Option<At<'_, Vtep>>,
    kind: AnswerKind,
    mtu: u32,
) -> Option<()> {
    let most = if came.v4 { QUOTE_V4 } else { QUOTE_V6 };
    let quote = if came.len < most { came.len } else { most };
    if vtep.is_none() {
        settle(frame, came, quote);
    }
    let quoted = frame.sum(came.l3, quote);
    let lead = lead(came, vtep);
    let header_len = ip_header_len(came.v4);
    let icmp_len = size_of::<Icmp>() as u32;
    shape(frame, came, lead + ETHERNET + header_len + icmp_len, quote)?;

    let from = match kind {
        AnswerKind::PortUnreachable => came.dst,
        _ => own_address(env, vtep, came),
    };
    let proto = if came.v4 { IPPROTO_ICMP } else { IPPROTO_ICMPV6 };
    let payload_len = icmp_len + quote;
    let ip = inner_link(env, frame.view(), came, vtep, lead)?;
    let tos = if came.v4 { ERROR_TOS } else { 0 };
    let pseudo = write_ip(ip, came, from, proto, tos, payload_len)?;
    let (icmp_type, code, rest) = match (kind, came.v4) {
        (AnswerKind::TooBig, true) => (ICMP_UNREACHABLE, ICMP_FRAGMENTATION_NEEDED, mtu),
        (AnswerKind::TooBig, false) => (ICMPV6_TOO_BIG, 0, mtu),
        (AnswerKind::TimeExceeded, true) => (ICMP_TIME_EXCEEDED, 0, 0),
        (AnswerKind::TimeExceeded, false) => (ICMPV6_TIME_EXCEEDED, 0, 0),
        (_, true) => (ICMP_UNREACHABLE, ICMP_PORT_UNREACHABLE, 0),
        (_, false) => (ICMPV6_UNREACHABLE, ICMPV6_PORT_UNREACHABLE, 0),
    };
    let rest = Be32::new(rest);
    let head = Be16::new((icmp_type as u16) << 8 | code as u16);
    let sum = Sum(quoted as u64).add16(head.raw()).add32(rest.raw());
    let sum = if came.v4 { sum } else { sum.add16(pseudo) };
    let icmp = ip.skip(header_len as usize).at::<Icmp>()?;
    field!(icmp, Icmp, kind).set(icmp_type);
    field!(icmp, Icmp, code).set(code);
    field!(icmp, Icmp, checksum).set(Be16::from_raw(!sum.fold()));
    field!(icmp, Icmp, rest).set(rest);
    outer_link(env, frame, came, vtep, lead, header_len + payload_len)
}

/// A quoted checksum that is still to be filled in may be so on the answer's way, from where the
/// transport header begins to the answer's end: in the middle of what the ICMP checksum covers. So it
/// gets the value with which that is right before and after. With S for the sum of the other words the
/// kernel writes ~(S + value), which makes -value of S + value: the same if value is -S / 2.
#[inline(always)]
fn settle<F: Frame>(frame: &mut F, came: &Came, quote: u32) {
    let in_header =
        if came.tcp { offset_of!(Tcp, checksum) } else { offset_of!(Udp, checksum) } as u32;
    if !frame.is_checksum_pending(came.l4 + in_header) {
        return;
    }
    let rest = frame.sum(came.l4, (came.l3 + quote).wrapping_sub(came.l4));
    if let Some(field) = frame.view().skip((came.l4 + in_header) as usize & 0x1ff).at::<u16>() {
        let twice = negate(Sum(rest as u64).sub16(field.get()).fold()) as u32;
        let value = if twice & 1 == 0 { twice } else { twice + 0xffff } >> 1;
        field.set(value as u16);
    }
}

/// Turns the segment into the reset that answers it.
#[inline(always)]
fn reset<E: Env, F: Frame>(
    env: &E,
    frame: &mut F,
    came: &Came,
    vtep: Option<At<'_, Vtep>>,
    tcp: &Tcp,
) -> Option<()> {
    let (syn, fin) = (tcp.flags & TCP_SYN != 0, tcp.flags & TCP_FIN != 0);
    let headers = came.l4.wrapping_sub(came.l3) + (tcp.data_offset >> 4) as u32 * 4;
    let segment = came.len.wrapping_sub(headers) + syn as u32 + fin as u32;
    let (seq, ack, flags) = if tcp.flags & TCP_ACK != 0 {
        (tcp.ack, Be32::new(0), TCP_RST)
    } else {
        (Be32::new(0), Be32::new(tcp.seq.host().wrapping_add(segment)), TCP_RST | TCP_ACK)
    };
    let lead = lead(came, vtep);
    let header_len = ip_header_len(came.v4);
    let tcp_len = size_of::<Tcp>() as u32;
    let options = came.l4.wrapping_sub(came.l3).wrapping_sub(header_len);
    let taken = if options == 0 { 0 } else { frame.take_options_out(options) };
    let in_place = options == taken && vtep.is_none();
    let checksum = came.l4.wrapping_sub(taken) + offset_of!(Tcp, checksum) as u32;
    let pending = in_place && frame.is_checksum_pending(checksum);
    shape(frame, came, lead + ETHERNET, header_len + tcp_len)?;

    let ip = inner_link(env, frame.view(), came, vtep, lead)?;
    let pseudo = write_ip(ip, came, came.dst, IPPROTO_TCP, 0, tcp_len)?;
    let at = ip.skip(header_len as usize).at::<Tcp>()?;
    let data_offset = (tcp_len as u8 / 4) << 4;
    let Ports { src, dst } = tcp.ports;
    let sum = Sum(pseudo as u64)
        .add16(src.raw())
        .add16(dst.raw())
        .add32(seq.raw())
        .add32(ack.raw())
        .add16(Be16::new((data_offset as u16) << 8 | flags as u16).raw());
    field!(at, Tcp, ports).set(Ports { src: dst, dst: src });
    field!(at, Tcp, seq).set(seq);
    field!(at, Tcp, ack).set(ack);
    field!(at, Tcp, data_offset).set(data_offset);
    field!(at, Tcp, flags).set(flags);
    field!(at, Tcp, window).set(Be16::new(0));
    field!(at, Tcp, checksum).set(Be16::from_raw(if pending { pseudo } else { !sum.fold() }));
    field!(at, Tcp, urgent).set(Be16::new(0));
    outer_link(env, frame, came, vtep, lead, header_len + tcp_len)
}

/// The address of this node as a router: towards a tunnel that of our own pod CIDR, because the peer
/// takes no other from us; else the node's; and where there is none the one that was asked.
#[inline(always)]
fn own_address<E: Env>(env: &E, vtep: Option<At<'_, Vtep>>, came: &Came) -> Addr {
    let addr = if let Some(vtep) = vtep {
        env.tunnel(field!(vtep, Vtep, tunnel).get()).map(|t| {
            if came.v4 { field!(t, Tunnel, addr_v4) } else { field!(t, Tunnel, addr_v6) }.get()
        })
    } else {
        env.settings().map(|s| {
            if came.v4 { field!(s, Settings, node_v4) } else { field!(s, Settings, node_v6) }.get()
        })
    };
    match addr {
        Some(addr) if !addr.is_none() && (addr.family() == Family::V4) == came.v4 => addr,
        _ => came.dst,
    }
}

/// Writes the Ethernet header in front of the IP header, whose view is returned.
#[inline(always)]
fn inner_link<'f, E: Env>(
    env: &E,
    view: View<'f>,
    came: &Came,
    vtep: Option<At<'_, Vtep>>,
    lead: u32,
) -> Option<View<'f>> {
    let place = view.skip(env.forget(lead) as usize & 0x7f);
    let eth = place.at::<Ethernet>()?;
    if let Some(vtep) = vtep {
        field!(eth, Ethernet, dst).copy_from(field!(vtep, Vtep, remote_mac));
        field!(eth, Ethernet, src).copy_from(field!(vtep, Vtep, local_mac));
    }
    let ethertype = if came.v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    field!(eth, Ethernet, ethertype).set(ethertype);
    Some(place.skip(size_of::<Ethernet>()))
}

/// Writes the IP header; the sum of the pseudo header is returned.
#[inline(always)]
fn write_ip(
    view: View<'_>,
    came: &Came,
    from: Addr,
    proto: u8,
    tos: u8,
    payload_len: u32,
) -> Option<u16> {
    let sum = Sum::default()
        .add_addr(from, came.v4)
        .add_addr(came.src, came.v4)
        .add16(Be16::new(proto as u16).raw())
        .add16(Be16::new(payload_len as u16).raw());
    if came.v4 {
        let at = view.at::<Ipv4>()?;
        let mut header = Ipv4 {
            version_ihl: 0x45,
            tos,
            total_len: Be16::new((payload_len + size_of::<Ipv4>() as u32) as u16),
            id: Be16::new(0),
            fragment: Be16::new(DONT_FRAGMENT),
            ttl: HOP_LIMIT,
            protocol: proto,
            checksum: Be16::new(0),
            src: from.v4_bytes(),
            dst: came.src.v4_bytes(),
        };
        let words = Sum::default()
            .add16(Be16::new(0x4500 | tos as u16).raw())
            .add16(header.total_len.raw())
            .add16(header.fragment.raw())
            .add16(Be16::new((HOP_LIMIT as u16) << 8 | proto as u16).raw())
            .add_addr(from, true)
            .add_addr(came.src, true);
        header.checksum = Be16::from_raw(!words.fold());
        at.set(header);
    } else {
        let at = view.at::<Ipv6>()?;
        at.set(Ipv6 {
            version_class_flow: Be32::new(6 << 28),
            payload_len: Be16::new(payload_len as u16),
            next_header: proto,
            hop_limit: HOP_LIMIT,
            src: from,
            dst: came.src,
        });
    }
    Some(sum.fold())
}

/// Writes what stands in front: outer headers for what came out of a tunnel, the tags, and the
/// Ethernet addresses exchanged. `ip_len` are the answer's bytes from its innermost IP header on.
#[inline(always)]
fn outer_link<E: Env, F: Frame>(
    env: &E,
    frame: &F,
    came: &Came,
    vtep: Option<At<'_, Vtep>>,
    lead: u32,
    ip_len: u32,
) -> Option<()> {
    if let Some(vtep) = vtep {
        let sum = if encap::outer_len(vtep) == encap::OUTER_V6 {
            frame.sum(lead, ETHERNET + ip_len)
        } else {
            0
        };
        let seeds = field!(env.settings()?, Settings, seeds);
        let hash =
            FlowHash::new(field!(seeds, Seeds, flow).get(), came.src, Be16::new(0), IPPROTO_ICMP);
        let inner = frame.view().skip(env.forget(lead) as usize & 0x7f).skip(size_of::<Ethernet>());
        // Our own IPv6 headers have no class.
        let class = match came.v4 {
            true => field!(inner.at::<Ipv4>()?, Ipv4, tos).get(),
            false => 0,
        };
        let inside = Inside { ip_len, port: hash.outer_port(), class, sum };
        let outer = frame.view().skip(env.forget(came.tags_len) as usize & 0xf);
        if !encap::write_behind_macs(outer, outer.at::<Ethernet>()?, vtep, &inside) {
            return None;
        }
    }
    let view = frame.view();
    let eth = view.at::<Ethernet>()?;
    field!(eth, Ethernet, dst).set(came.link.src);
    field!(eth, Ethernet, src).set(came.link.dst);
    for (i, tag) in came.tags.iter().enumerate() {
        if *tag != Be32::new(0) {
            let place = offset_of!(Ethernet, ethertype) + i * TAG_LEN as usize;
            view.skip(place).at::<Be32>()?.set(*tag);
        }
    }
    Some(())
}
