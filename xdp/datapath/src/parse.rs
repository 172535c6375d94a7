//! From bytes to a flat description, once per header stack.
//!
//! What cannot be a packet is malformed (dropped); what Sluice does not handle is named (passed).
//! Rules on receipt: RFC 791 3.1, RFC 8200 3, RFC 768, RFC 9293 3.1, RFC 7348 5.

use crate::access::{At, View};
use crate::env::Env;
use crate::field;
use crate::fragment;
use crate::verdict::Step;
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, Ethernet, Extension,
    FRAGMENT_MASK, FRAGMENT_MASK_V6, Ipv4, Ipv6, NEXT_HEADER_FRAGMENT, NEXT_HEADER_HOP_BY_HOP,
    NEXT_HEADER_ROUTING, OFFSET_MASK, Ports, Tcp, Udp, is_extension_header, is_followed,
};
use core::marker::PhantomData;
use core::mem::offset_of;
use sluice_abi::{
    Addr, Be16, Be32, Family, Hook, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Lane,
    Reason, Scratch, fragment_part,
};

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

/// How much of a packet's form is followed.
pub trait Form {
    /// VLAN tags, IPv4 options and extension headers are followed, not only named.
    const GENERAL: bool;
    /// Fragments behind the first are followed, and nothing else is.
    const LATER: bool = false;
    /// The packet is the kernel's (TC): its checksums may be still to be filled in, several segments
    /// may have been merged into it, and its outermost VLAN tag is not in it.
    const TC: bool = false;
    /// The hook of the uplink's programs of this form.
    const UPLINK: Hook = if Self::TC { Hook::TcNode } else { Hook::Xdp };

    /// The program that goes on with what this one stops on.
    fn lane(reason: Reason) -> Option<Lane>;
}

/// What nearly every packet looks like: untagged, without options or extension headers, whole. Every
/// length is a constant.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

/// Any form that can be followed.
#[derive(Clone, Copy, Debug)]
pub struct General;

impl Form for Plain {
    const GENERAL: bool = false;

    #[inline(always)]
    fn lane(reason: Reason) -> Option<Lane> {
        match reason {
            Reason::Vlan | Reason::IpOptions | Reason::Fragment | Reason::NoLane => {
                Some(Lane::General)
            }
            Reason::Icmp => Some(Lane::Icmp),
            _ => answered(reason),
        }
    }
}

impl Form for General {
    const GENERAL: bool = true;

    #[inline(always)]
    fn lane(reason: Reason) -> Option<Lane> {
        match reason {
            Reason::Fragment => Some(Lane::Fragment),
            Reason::Icmp => Some(Lane::Icmp),
            _ => answered(reason),
        }
    }
}

/// Fragments behind the first, of any form.
#[derive(Clone, Copy, Debug)]
pub struct Later;

impl Form for Later {
    const GENERAL: bool = true;
    const LATER: bool = true;

    #[inline(always)]
    fn lane(_reason: Reason) -> Option<Lane> {
        None
    }
}

/// The form `P` of a packet that the kernel has already taken.
#[derive(Clone, Copy, Debug)]
pub struct AtTc<P>(PhantomData<P>);

impl<P: Form> Form for AtTc<P> {
    const GENERAL: bool = P::GENERAL;
    const LATER: bool = P::LATER;
    const TC: bool = true;

    #[inline(always)]
    fn lane(reason: Reason) -> Option<Lane> {
        match reason {
            // What is inside a tag belongs to the kernel's VLAN device.
            Reason::Vlan => None,
            reason => P::lane(reason),
        }
    }
}

/// What the sender is told of. Whoever stops for such a reason leaves a note
/// ([`answer::note`](crate::answer::note)).
#[inline(always)]
fn answered(reason: Reason) -> Option<Lane> {
    match reason {
        Reason::NoEndpoint | Reason::ClosedPort | Reason::TooBig | Reason::HopLimitExceeded => {
            Some(Lane::Answer)
        }
        _ => None,
    }
}

/// VLAN tags that are followed: one, or two (IEEE 802.1ad, "QinQ").
pub const MAX_TAGS: usize = 2;
/// Bytes of a VLAN tag (IEEE 802.1Q clause 9): EtherType and control.
pub const TAG_LEN: u32 = 4;
/// Extension headers that are followed (RFC 8200 section 4; RFC 9673 lets a router choose).
const MAX_EXTENSIONS: usize = 6;
/// Bytes of extension headers that are followed.
pub const MAX_EXTENSION_BYTES: u32 = 256;

/// A frame's Ethernet header and VLAN tags.
#[derive(Clone, Copy)]
pub struct Link<'a> {
    /// The Ethernet header, where the frame begins.
    pub first: At<'a, Ethernet>,
    /// The fourteen bytes in front of the IP header: the Ethernet header, or what of it and of the
    /// tags is there, where an untagged frame's header would stand.
    pub last: At<'a, Ethernet>,
    /// Bytes of the tags between.
    pub tags: u32,
    /// From the IP header on.
    pub l3: View<'a>,
}

/// Tag `index`, counted from outside, of a frame with `tags` bytes of them, as on the wire; zero if
/// there is none.
#[inline(always)]
pub fn tag(frame: View<'_>, tags: u32, index: u32) -> Be32 {
    let at = index * TAG_LEN;
    if at >= tags {
        return Be32::new(0);
    }
    let place = frame.skip(offset_of!(Ethernet, ethertype) + at as usize);
    place.at::<Be32>().map_or(Be32::new(0), |tag| tag.get())
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
    /// Headers and payload, as the header says, in bytes. At most what the frame holds.
    pub len: u32,
    /// Bytes of the header with its options or extension headers.
    pub header_len: u32,
    /// What hides the transport header: options, extension headers, a fragment behind the first.
    pub opaque: Option<Reason>,
}

impl Ip<'_> {
    /// Whether options or extension headers follow the fixed header.
    #[inline(always)]
    pub fn has_options(&self) -> bool {
        self.header_len != self.l3.header_len() as u32
    }
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
/// `NotIp`, `Vlan`, `TooManyTags`, `ExtensionChain`, `Jumbogram`, `NotLinear` (pass); `IpMalformed`, `RoutingHeader`, `Martian`
/// (drop).
#[inline(always)]
pub fn ethernet<'a, F: Form, E: Env>(env: &E, view: View<'a>) -> Step<(Link<'a>, Ip<'a>)> {
    if F::GENERAL {
        fragment::clear(env);
    }
    let first = view.at::<Ethernet>().ok_or(Reason::NotIp)?;
    let mut ethertype = field!(first, Ethernet, ethertype).get();
    let mut tags = 0;
    if F::GENERAL {
        for _ in 0..MAX_TAGS {
            if is_tag(ethertype) {
                tags += TAG_LEN as usize;
                // The type behind the tag stands where an Ethernet header that begins at the tag's
                // distance would have it. Through a place of its own: what the verifier learns of
                // the frame's length here would make each number of tags a way of its own.
                let behind = view.skip(env.forget(tags as u32) as usize & 0xf);
                let at = behind.need::<Ethernet>(Reason::NotIp)?;
                ethertype = field!(at, Ethernet, ethertype).get();
            }
        }
        if is_tag(ethertype) {
            return Err(Reason::TooManyTags.into());
        }
        tags = env.forget(tags as u32) as usize & 0xf;
    } else if is_tag(ethertype) {
        return Err(Reason::Vlan.into());
    }
    let last = view.skip(tags);
    let l3 = last.skip(size_of::<Ethernet>());
    let ip = if ethertype == ETHERTYPE_IPV4 {
        ipv4::<F, E>(env, l3)?
    } else if ethertype == ETHERTYPE_IPV6 {
        ipv6::<F, E>(env, l3)?
    } else {
        return Err(Reason::NotIp.into());
    };
    let last = last.at::<Ethernet>().ok_or(Reason::NotIp)?;
    Ok((Link { first, last, tags: tags as u32, l3 }, ip))
}

/// Whether a VLAN tag follows, not a payload.
#[inline(always)]
pub fn is_tag(ethertype: Be16) -> bool {
    ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ
}

/// Bytes of an IP packet whose header says zero because it cannot say more than 65,535: a segment of
/// "BIG TCP" that is still to be cut (kernel include/linux/ipv6.h, `skb_ip_totlen`, RFC 2675 section
/// 3). Zero for a packet that is shorter: then its header is wrong.
#[inline(always)]
fn len_beyond_header(view: View<'_>) -> u32 {
    let len = view.len();
    if len > u16::MAX as usize { len as u32 } else { 0 }
}

#[inline(always)]
fn ipv4<'a, F: Form, E: Env>(env: &E, view: View<'a>) -> Step<Ip<'a>> {
    let at = view.need::<Ipv4>(Reason::IpMalformed)?;
    let header = at.get();
    if header.version_ihl >> 4 != 4 {
        return Err(Reason::NotIp.into());
    }
    let header_len = (header.version_ihl as u32 & 0xf) * 4;
    let len = match header.total_len.host() as u32 {
        0 => len_beyond_header(view),
        len => len,
    };
    if header_len < 20 || len < header_len || len as usize > view.len() {
        return Err(Reason::IpMalformed.into());
    }
    let mut opaque = None;
    let cut = header.fragment.host() & FRAGMENT_MASK;
    if F::GENERAL {
        if cut != 0 {
            let scratch = env.scratch().ok_or(Reason::TableBroken)?;
            let part = part_at(cut & OFFSET_MASK, header.protocol)?;
            fragment::set(scratch, header.id.host() as u32, part);
            let (src, dst) = (Addr::from_v4(header.src), Addr::from_v4(header.dst));
            fragment::mark(scratch, src, dst, header.protocol);
            if part == fragment_part::LATER {
                opaque = Some(Reason::Fragment);
            }
        }
    } else if header_len != 20 {
        opaque = Some(Reason::IpOptions);
    } else if cut != 0 {
        opaque = Some(Reason::Fragment);
    }
    let header_len = if F::GENERAL { header_len } else { 20 };
    let (proto, hop_limit) = (header.protocol, header.ttl);
    Ok(Ip { l3: L3::V4(at), proto, hop_limit, len, header_len, opaque })
}

/// Which fragment stands at an offset, in units of 8 bytes.
///
/// # Errors
/// `L4Malformed` (drop): a TCP fragment that covers the first one's control bits (RFC 3128 section 2).
#[inline(always)]
fn part_at(offset: u16, proto: u8) -> Step<u8> {
    if offset == 1 && proto == IPPROTO_TCP {
        return Err(Reason::L4Malformed.into());
    }
    Ok(if offset == 0 { fragment_part::FIRST } else { fragment_part::LATER })
}

#[inline(always)]
fn ipv6<'a, F: Form, E: Env>(env: &E, view: View<'a>) -> Step<Ip<'a>> {
    let at = view.need::<Ipv6>(Reason::IpMalformed)?;
    let header = at.get();
    if header.version_class_flow.host() >> 28 != 6 {
        return Err(Reason::NotIp.into());
    }
    let len = match header.payload_len.host() as u32 {
        0 => match len_beyond_header(view) {
            // RFC 2675 section 2: a jumbogram, but it is none.
            0 if header.next_header == NEXT_HEADER_HOP_BY_HOP => {
                return Err(Reason::Jumbogram.into());
            }
            0 => 40,
            len => len,
        },
        len => len + 40,
    };
    if len as usize > view.len() {
        return Err(Reason::IpMalformed.into());
    }
    // A v4-mapped address on the wire would meet the tables' IPv4 entries (RFC 4038 section 4.2).
    if header.src.family() == Family::V4 || header.dst.family() == Family::V4 {
        return Err(Reason::Martian.into());
    }
    let (mut proto, mut header_len) = (header.next_header, 40);
    if F::GENERAL {
        let scratch = env.scratch().ok_or(Reason::TableBroken)?;
        let chain = extensions(env, Some(scratch), view, header.next_header, len)?;
        if fragment::part(scratch) != fragment_part::WHOLE {
            fragment::mark(scratch, header.src, header.dst, NEXT_HEADER_FRAGMENT);
        }
        // Forgotten in one word: next header and length belong together.
        let chain = env.forget(chain.header_len << 8 | chain.proto as u32);
        (proto, header_len) = (chain as u8, (chain >> 8) & 0x1ff);
    }
    let opaque = if proto == NEXT_HEADER_FRAGMENT {
        Some(Reason::Fragment)
    } else if is_extension_header(proto) {
        Some(Reason::IpOptions)
    } else {
        None
    };
    let hop_limit = header.hop_limit;
    Ok(Ip { l3: L3::V6(at), proto, hop_limit, len, header_len, opaque })
}

/// Where a chain of extension headers ends.
pub struct Chain {
    /// What follows.
    pub proto: u8,
    /// Bytes from the IPv6 header on.
    pub header_len: u32,
}

/// Follows hop-by-hop options, destination options, routing and fragment headers (RFC 8200 section
/// 4); behind a fragment header that is not the first's nothing is to be found. Without `scratch` no
/// fragment header is followed.
///
/// # Errors
/// `ExtensionChain` (pass); `IpMalformed`, `L4Malformed`, `RoutingHeader` (drop).
#[inline(always)]
pub fn extensions<E: Env>(
    env: &E,
    scratch: Option<At<'_, Scratch>>,
    l3: View<'_>,
    first: u8,
    len: u32,
) -> Step<Chain> {
    let (mut proto, mut header_len) = (first, 40u32);
    for _ in 0..MAX_EXTENSIONS {
        if !is_followed(proto) && proto != NEXT_HEADER_FRAGMENT {
            break;
        }
        let header = l3.skip((env.forget(header_len) & 0x1ff) as usize);
        let header = header.need::<Extension>(Reason::IpMalformed);
        let header = header?.get();
        if proto == NEXT_HEADER_FRAGMENT {
            let Some(scratch) = scratch else { break };
            if fragment::part(scratch) != fragment_part::WHOLE {
                return Err(Reason::ExtensionChain.into());
            }
            let cut = ((header.kind as u16) << 8 | header.segments_left as u16) & FRAGMENT_MASK_V6;
            if cut != 0 {
                let part = part_at(cut >> 3, header.next_header)?;
                fragment::set(scratch, header.id.host(), part);
                if part == fragment_part::LATER {
                    break;
                }
            }
            proto = header.next_header;
            header_len += 8;
            continue;
        }
        if proto == NEXT_HEADER_ROUTING && header.segments_left != 0 {
            return Err(if header.kind == 0 {
                Reason::RoutingHeader
            } else {
                Reason::ExtensionChain
            }
            .into());
        }
        proto = header.next_header;
        header_len += (header.len as u32 + 1) * 8;
        if header_len > 40 + MAX_EXTENSION_BYTES {
            return Err(Reason::ExtensionChain.into());
        }
    }
    let hidden = proto == NEXT_HEADER_FRAGMENT
        && scratch.is_some_and(|scratch| fragment::part(scratch) != fragment_part::LATER);
    if is_extension_header(proto) || hidden {
        return Err(Reason::ExtensionChain.into());
    }
    if header_len > len {
        return Err(Reason::IpMalformed.into());
    }
    Ok(Chain { proto, header_len })
}

/// Whether the packet that was parsed last is a first fragment. Asked of memory, so that the verifier
/// does not follow first fragments and whole packets each by themselves.
#[inline(always)]
pub fn is_first_fragment<F: Form, E: Env>(env: &E) -> bool {
    F::GENERAL && env.scratch().is_some_and(fragment::is_first)
}

/// The transport header of `ip`, which begins at `l3`.
///
/// # Errors
/// `Fragment`, `IpOptions`, `Icmp`, `OtherProtocol`, `NotLinear` (pass); `L4Malformed` (drop).
#[inline(always)]
pub fn transport<'a, F: Form, E: Env>(env: &E, l3: View<'a>, ip: &Ip<'a>) -> Step<Transport<'a>> {
    if let Some(reason) = ip.opaque {
        return Err(reason.into());
    }
    let payload_len = ip.len.wrapping_sub(ip.header_len);
    let payload = l3.skip(ip.header_len as usize);
    match ip.proto {
        IPPROTO_TCP => tcp(payload, payload_len),
        IPPROTO_UDP => udp::<F, E>(env, payload, payload_len),
        proto if proto == icmp_of(&ip.l3) => Err(Reason::Icmp.into()),
        _ => Err(Reason::OtherProtocol.into()),
    }
}

/// The protocol number of the family's ICMP.
#[inline(always)]
pub fn icmp_of(l3: &L3<'_>) -> u8 {
    if l3.is_v4() { IPPROTO_ICMP } else { IPPROTO_ICMPV6 }
}

#[inline(always)]
fn tcp<'a>(view: View<'a>, payload_len: u32) -> Step<Transport<'a>> {
    let at = view.need::<Tcp>(Reason::L4Malformed)?;
    let header_len = (field!(at, Tcp, data_offset).get() >> 4) as u32 * 4;
    if header_len < 20 || header_len > payload_len {
        return Err(Reason::L4Malformed.into());
    }
    let ports = field!(at, Tcp, ports);
    let Ports { src, dst } = ports.get();
    let flags = field!(at, Tcp, flags).get();
    let (seq, ack) = (field!(at, Tcp, seq).get(), field!(at, Tcp, ack).get());
    let checksum = field!(at, Tcp, checksum);
    Ok(Transport { ports, src, dst, checksum, flags, seq, ack })
}

#[inline(always)]
fn udp<'a, F: Form, E: Env>(env: &E, view: View<'a>, payload_len: u32) -> Step<Transport<'a>> {
    let at = view.need::<Udp>(Reason::L4Malformed)?;
    let len = field!(at, Udp, len).get().host() as u32;
    // A first fragment's header speaks of more than is here.
    let short = len > payload_len && !is_first_fragment::<F, E>(env);
    if len < 8 || payload_len < 8 || short {
        return Err(Reason::L4Malformed.into());
    }
    let ports = field!(at, Udp, ports);
    let Ports { src, dst } = ports.get();
    let none = Be32::new(0);
    let checksum = field!(at, Udp, checksum);
    Ok(Transport { ports, src, dst, checksum, flags: 0, seq: none, ack: none })
}
