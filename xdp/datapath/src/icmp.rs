//! ICMP and ICMPv6: errors about translated connections, and echo requests to a Service's address.
//!
//! ```text
//!  from the client's side   quotes vip → client       becomes  backend → source, to the backend
//!  from the backend's side  quotes source → backend   becomes  client → vip, from the VIP to the client
//! ```
//!
//! An error finds its connection by the tuple that it quotes, read backwards: that of the packet which
//! the quoted one answered, or which answers it. It leaves the way that packets of the connection
//! leave, and neither confirms nor renews it: anybody can send one (RFC 5927).
//!
//! The quoted packet is as somebody on the way saw it. Its checksums are updated by difference, like
//! all others: a wrong one stays wrong. RFC 5508 section 4 asks the same of every translator.

use crate::access::{At, Frame, View};
use crate::account::{self, account};
use crate::csum::{Sum, update, update_udp};
use crate::decide::{self, Origin, port_delta};
use crate::env::Env;
use crate::field;
use crate::flood;
use crate::flow::{self, Found, Tuple};
use crate::fragment;
use crate::hash::FlowHash;
use crate::ingress;
use crate::limit;
use crate::parse::{self, Form, General, L3};
use crate::replay::{self, Departure, Located, Rewrite, Sums, Way};
use crate::tc;
use crate::verdict::{Action, Direction, Owner, Step, Stop, Verdict};
use crate::wire::{
    Ethernet, Extension, FRAGMENT_MASK, ICMP_ECHO, ICMP_ECHO_REPLY, ICMP_PARAMETER, ICMP_REDIRECT,
    ICMP_SOURCE_QUENCH, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE, ICMPV6_ECHO, ICMPV6_ECHO_REPLY,
    ICMPV6_PARAMETER, ICMPV6_UNREACHABLE, Icmp, Ipv4, Ipv6, NEXT_HEADER_FRAGMENT, Ports, Tcp, Udp,
};
use core::mem::offset_of;
use sluice_abi::{
    Addr, AnswerKind, Be16, Be32, ExitKind, FlowRecord, Frontend, FrontendKey, Hook, IPPROTO_TCP,
    IPPROTO_UDP, Pod, Reason, Scratch, Seeds, Settings, Vtep, frontend_flags, record_flags,
    settings_flags,
};

/// Hop limit of an answer (IANA default TTL).
const HOP_LIMIT: u8 = Vtep::OUTER_HOP_LIMIT;
/// The offset of an IPv4 fragment, "more fragments" apart.
const OFFSET_MASK: u16 = FRAGMENT_MASK & 0x1fff;
/// Bytes of an IPv6 fragment header (RFC 8200 section 4.5).
const FRAGMENT_HEADER: u32 = 8;
/// What an error quotes of the transport header at least (RFC 792: 64 bits).
const QUOTED_BYTES: u32 = 8;
/// Longest headers in front of a quoted transport header.
pub const MAX_QUOTED_HEADERS: u32 = size_of::<Ipv6>() as u32 + parse::MAX_EXTENSION_BYTES + 8;
/// Bytes that are looked at from the ICMP header on.
pub const MAX_BYTES: u32 = size_of::<Icmp>() as u32 + MAX_QUOTED_HEADERS + size_of::<Tcp>() as u32;

/// What a message is to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// An echo request.
    Echo,
    /// An error, which quotes a packet.
    Error,
    /// Another way for a quoted packet: nobody but our next hop may say so, and the kernel decides
    /// whether it believes it.
    Redirect,
    /// Anything else.
    Other,
}

/// A message in its packet.
#[derive(Clone, Copy)]
struct Message<'a> {
    at: At<'a, Icmp>,
    kind: Kind,
    /// What follows the header.
    body: View<'a>,
    /// Its bytes, as the IP header says.
    body_len: u32,
}

/// The packet that an error quotes.
#[derive(Clone, Copy)]
struct Quote<'a> {
    l3: L3<'a>,
    proto: u8,
    ports: At<'a, Ports>,
    /// From the transport header on.
    l4: View<'a>,
    /// Quoted bytes of it.
    l4_len: u32,
}

impl Quote<'_> {
    /// The tuple of the packets in the other direction.
    #[inline(always)]
    fn backwards(&self) -> Tuple {
        let Ports { src, dst } = self.ports.get();
        let (proto, l3) = (self.proto, self.l3);
        Tuple { src: l3.dst(), dst: l3.src(), src_port: dst, dst_port: src, proto }
    }
}

/// Ingress of an uplink, by a general form.
#[inline(always)]
pub fn uplink<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    let bytes = frame.view().len() as u64;
    let verdict = match at_uplink::<P, E, F>(env, frame) {
        Ok(verdict) => verdict,
        Err(stop) => stop.into(),
    };
    account(env, P::UPLINK, &verdict, bytes);
    verdict
}

#[inline(always)]
fn at_uplink<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Step<Verdict> {
    let settings = tc::bypass(env)?;
    let departure = plan::<P, E>(env, settings, frame.view(), frame.ingress_ifindex())?;
    replay::leave::<P, E, F>(env, frame, &departure)
}

/// TC ingress at the host side of a pod.
#[inline(always)]
pub fn tc_ingress<E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    let (view, ifindex) = (frame.view(), frame.ingress_ifindex());
    let verdict = match tc::bypass(env) {
        Ok(settings) => from_pod(env, settings, view, ifindex),
        Err(stop) => Err(stop),
    };
    at_tc(env, Hook::TcIngress, verdict, view.len() as u64)
}

/// TC egress of uplinks, of the kernel's vxlan devices and of the host sides of pods.
#[inline(always)]
pub fn tc_egress<E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    let view = frame.view();
    let verdict = match tc::bypass(env) {
        Ok(settings) => to_client(env, settings, view),
        Err(stop) => Err(stop),
    };
    at_tc(env, Hook::TcEgress, verdict, view.len() as u64)
}

#[inline(always)]
fn at_tc<E: Env>(env: &E, hook: Hook, verdict: Step<Verdict>, bytes: u64) -> Verdict {
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(stop) => stop.into(),
    };
    account(env, hook, &verdict, bytes);
    verdict
}

/// Everything but the head's move.
#[inline(always)]
fn plan<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    view: View<'_>,
    ifindex: u32,
) -> Step<Departure<'e>> {
    let mut packet = arrived(env, view)?;
    let (outer, mut tunnel) = (packet, 0);
    let own = if P::TC { ingress::own_tunnel(env, ifindex) } else { 0 };
    if own != 0 {
        tunnel = ingress::peer(env, settings, &packet, own)?;
    } else if packet.ip.proto == IPPROTO_UDP {
        // It is inside a tunnel, or it would not have come here.
        let udp = parse::transport::<General, E>(env, outer.l3, &outer.ip)?;
        if !ingress::is_vxlan(settings, udp.dst) {
            return Err(Reason::Icmp.into());
        }
        let link =
            parse::Link { first: outer.outer, last: outer.eth, tags: outer.tags, l3: outer.l3 };
        (tunnel, packet) = ingress::open::<P, E>(env, settings, &link, &outer.ip)?;
    }
    let uplink = ifindex;
    let (ifindex, tags) = if tunnel == 0 { (ifindex, packet.tags) } else { (0, 0) };
    let origin = Origin {
        tunnel,
        in_cluster: tunnel != 0,
        snat: true,
        ifindex,
        uplink,
        eth: packet.outer,
        frame: view,
        tags,
    };
    let message = message(env, &packet)?;
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    match message.kind {
        Kind::Echo => echo_at_uplink::<P, E>(env, settings, scratch, &packet, &message, &origin),
        Kind::Error | Kind::Redirect => {
            error_at_uplink(env, settings, scratch, &packet, &message, tunnel)
        }
        Kind::Other => Err(Reason::Icmp.into()),
    }
}

/// The frame's packet, whatever it carries.
#[inline(always)]
fn arrived<'f, E: Env>(env: &E, view: View<'f>) -> Step<Located<'f>> {
    let (link, ip) = parse::ethernet::<General, E>(env, view)?;
    if field!(link.first, Ethernet, dst).get().is_group() {
        return Err(Reason::Group.into());
    }
    let (outer, eth, l3, tags) = (link.first, link.last, link.l3, link.tags);
    Ok(Located { outer, eth, ip, l3, cut: 0, tags, ecn: 0 })
}

/// The ICMP message of a packet.
///
/// # Errors
/// `Fragment`, `OtherProtocol` (pass); `IcmpMalformed` (drop).
#[inline(always)]
fn message<'a, E: Env>(env: &E, packet: &Located<'a>) -> Step<Message<'a>> {
    let ip = &packet.ip;
    if let Some(reason) = ip.opaque {
        return Err(reason.into());
    }
    if ip.proto != parse::icmp_of(&ip.l3) {
        return Err(Reason::OtherProtocol.into());
    }
    let len = ip.len.wrapping_sub(ip.header_len);
    let view = packet.l3.skip(ip.header_len as usize);
    let at = view.need::<Icmp>(Reason::IcmpMalformed)?;
    if len < size_of::<Icmp>() as u32 {
        return Err(Reason::IcmpMalformed.into());
    }
    let (kind, code) = (field!(at, Icmp, kind).get(), field!(at, Icmp, code).get());
    let kind = if ip.l3.is_v4() { kind_v4(kind, code) } else { kind_v6(kind, code) };
    if kind != Kind::Echo && parse::is_first_fragment::<General, E>(env) {
        // What it says is not all in a fragment.
        return Err(Reason::Fragment.into());
    }
    let body = view.skip(size_of::<Icmp>());
    Ok(Message { at, kind, body, body_len: len.wrapping_sub(size_of::<Icmp>() as u32) })
}

#[inline(always)]
fn kind_v4(kind: u8, code: u8) -> Kind {
    match kind {
        ICMP_UNREACHABLE | ICMP_TIME_EXCEEDED | ICMP_PARAMETER => Kind::Error,
        ICMP_REDIRECT => Kind::Redirect,
        ICMP_ECHO if code == 0 => Kind::Echo,
        _ => Kind::Other,
    }
}

/// Neighbour discovery, its redirect included, is the link's own business (RFC 4861).
#[inline(always)]
fn kind_v6(kind: u8, code: u8) -> Kind {
    match kind {
        ICMPV6_ECHO if code == 0 => Kind::Echo,
        // Those that there are, and those to come (RFC 4443 section 2.1: below 128 is an error). Of
        // the latter we do not know whether they quote a packet.
        ICMPV6_UNREACHABLE..=ICMPV6_PARAMETER => Kind::Error,
        _ => Kind::Other,
    }
}

/// Whether the ICMP message in a quote is an error itself.
#[inline(always)]
fn is_error(v4: bool, kind: u8) -> bool {
    if v4 {
        matches!(
            kind,
            ICMP_UNREACHABLE
                | ICMP_SOURCE_QUENCH
                | ICMP_REDIRECT
                | ICMP_TIME_EXCEEDED
                | ICMP_PARAMETER
        )
    } else {
        kind < ICMPV6_ECHO
    }
}

/// The TCP or UDP packet that an error quotes, with at least eight bytes of its transport header.
///
/// # Errors
/// `Icmp` (pass); `IcmpMalformed`, `IcmpDenied` (drop).
#[inline(always)]
fn quote<'a, E: Env>(env: &E, packet: &Located<'_>, message: &Message<'a>) -> Step<Quote<'a>> {
    let (l3, proto, header_len) = if packet.ip.l3.is_v4() {
        let at = message.body.at::<Ipv4>().ok_or(Reason::IcmpMalformed)?;
        let header = at.get();
        let header_len = (header.version_ihl as u32 & 0xf) * 4;
        if header.version_ihl >> 4 != 4 || header_len < 20 {
            return Err(Reason::IcmpMalformed.into());
        }
        if header.fragment.host() & OFFSET_MASK != 0 {
            return Err(Reason::Icmp.into());
        }
        (L3::V4(at), header.protocol, header_len)
    } else {
        let at = message.body.at::<Ipv6>().ok_or(Reason::IcmpMalformed)?;
        // What follows the message in its frame is not of the quote.
        if message.body_len < size_of::<Ipv6>() as u32 {
            return Err(Reason::IcmpMalformed.into());
        }
        if field!(at, Ipv6, version_class_flow).get().host() >> 28 != 6 {
            return Err(Reason::IcmpMalformed.into());
        }
        let next = field!(at, Ipv6, next_header).get();
        let Ok(chain) = parse::extensions(env, None, message.body, next, message.body_len) else {
            return Err(Reason::Icmp.into());
        };
        let (proto, header_len) = behind_fragment_header(env, message, chain)?;
        (L3::V6(at), proto, header_len)
    };
    if message.body_len < header_len {
        return Err(Reason::IcmpMalformed.into());
    }
    // Forgotten in one word, as in `parse`.
    let both = env.forget(header_len << 8 | proto as u32);
    let (proto, header_len) = (both as u8, both >> 8 & 0x1ff);
    let l4 = message.body.skip(header_len as usize);
    let l4_len = message.body_len.wrapping_sub(header_len);
    if proto == parse::icmp_of(&l3) {
        return Err(about_icmp(env, packet, l4).into());
    }
    if proto != IPPROTO_TCP && proto != IPPROTO_UDP {
        return Err(Reason::Icmp.into());
    }
    let ports = l4.at::<Udp>().ok_or(Reason::IcmpMalformed)?;
    if l4_len < QUOTED_BYTES {
        return Err(Reason::IcmpMalformed.into());
    }
    Ok(Quote { l3, proto, ports: field!(ports, Udp, ports), l4, l4_len })
}

/// What a quoted chain of headers ends with, behind the fragment header of a first fragment, if there
/// is one. "Packet too big" about a large datagram quotes that.
///
/// # Errors
/// `Icmp` (pass).
#[inline(always)]
fn behind_fragment_header<E: Env>(
    env: &E,
    message: &Message<'_>,
    chain: parse::Chain,
) -> Step<(u8, u32)> {
    if chain.proto != NEXT_HEADER_FRAGMENT {
        return Ok((chain.proto, chain.header_len));
    }
    let place = message.body.skip((env.forget(chain.header_len) & 0x1ff) as usize);
    let header = place.at::<Extension>().ok_or(Reason::Icmp)?.get();
    // Where an extension header has type and segments left, this one has its offset in units of
    // eight bytes and three flags (RFC 8200 section 4.5).
    if header.kind != 0 || header.segments_left >> 3 != 0 {
        return Err(Reason::Icmp.into());
    }
    Ok((header.next_header, chain.header_len + 8))
}

/// An error that quotes an ICMP message: nobody may send one about an error (RFC 1122 section 3.2.2).
#[inline(always)]
fn about_icmp<E: Env>(env: &E, packet: &Located<'_>, l4: View<'_>) -> Reason {
    let Some(kind) = l4.at::<u8>() else { return Reason::Icmp };
    if is_error(packet.ip.l3.is_v4(), kind.get()) && is_vip(env, packet.ip.l3.dst()) {
        return Reason::IcmpDenied;
    }
    Reason::Icmp
}

/// Whether an address is Services' alone.
#[inline(always)]
fn is_vip<E: Env>(env: &E, addr: Addr) -> bool {
    let Some(frontend) = env.frontend(&FrontendKey::address(addr)) else { return false };
    field!(frontend, Frontend, flags).get() & frontend_flags::ADDRESS != 0
}

/// What an error quotes, if it was sent to whom the quoted packet came from; its tuple, read
/// backwards, is stashed.
#[inline(always)]
fn stash_quote<'a, E: Env>(
    env: &E,
    scratch: At<'_, Scratch>,
    packet: &Located<'_>,
    message: &Message<'a>,
) -> Step<Quote<'a>> {
    let quote = quote(env, packet, message)?;
    if quote.l3.src() != packet.ip.l3.dst() {
        return Err(Reason::Icmp.into());
    }
    decide::stash_tuple(scratch, &quote.backwards());
    Ok(quote)
}

/// An error about a connection of ours, from the wire.
#[inline(always)]
fn error_at_uplink<'e, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    packet: &Located<'_>,
    message: &Message<'_>,
    tunnel: u32,
) -> Step<Departure<'e>> {
    // What of the quoted packet lies elsewhere could be neither read nor written.
    if message.body.is_split() {
        return Err(Reason::NotLinear.into());
    }
    let quote = stash_quote(env, scratch, packet, message)?;
    let tuple = decide::stashed(scratch);
    let place = flow::place(env, settings, tuple.src, tuple.src_port, tuple.proto)
        .ok_or(Reason::TableBroken)?;
    let port = place.hash.outer_port();
    let request = flow::find_request(&place, &tuple)
        .or_else(|| flood::find_request(env, settings, &place, &tuple));
    let (found, direction) = if let Some(found) = request {
        check_client(&found, tunnel)?;
        (found, Direction::Forward)
    } else {
        let found = flow::find_snat_reply(env, settings, &decide::stashed(scratch));
        (found.ok_or(Reason::Icmp)?, Direction::Reply)
    };
    let r = found.record;
    let owner = tc::owner(r, direction, false);
    let stop = |reason| Stop { reason, service: owner.service };
    let is_reply = direction == Direction::Reply;
    if is_reply {
        ingress::check_tunnel(&found, tunnel)?;
    }
    if message.kind == Kind::Redirect {
        return Err(stop(Reason::IcmpDenied));
    }
    let exit = if is_reply { field!(r, FlowRecord, reply) } else { field!(r, FlowRecord, forward) };
    let door = replay::open(env, exit, packet, tunnel);
    if let Some(reason) = door.closed {
        return Err(stop(reason));
    }
    let tagged = ingress::is_tagged(r, is_reply, &door);
    let tags = tagged.then_some(field!(r, FlowRecord, reply_tags));
    let keeps_source = !is_reply && field!(r, FlowRecord, flags).get() & record_flags::SNAT == 0;
    let rewrite = if is_reply { Rewrite::reply(r) } else { Rewrite::request(r) };
    packet.mark();
    translate(packet, message, &quote, &rewrite, keeps_source, door.takes_hop());
    let inside = replay::address(&door, packet, false, port);
    if !found.is_still_there() {
        return Err(stop(Reason::FlowChanged));
    }
    let (cut, reason, ecn) = (packet.cut_for(&door), Reason::IcmpError, 0);
    let sums = Sums::of_header(packet, &door, true);
    Ok(Departure { door, cut, tags, inside, reason, owner, ecn, sums })
}

/// An error from the client's side comes the way that the connection's requests come.
///
/// # Errors
/// `TunnelChanged`, `Martian` (drop).
#[inline(always)]
fn check_client(found: &Found<'_>, tunnel: u32) -> Step<()> {
    let r = found.record;
    let stop = |reason| Stop { reason, service: field!(r, FlowRecord, service).get() };
    if field!(r, FlowRecord, tunnel).get() != tunnel {
        return Err(stop(Reason::TunnelChanged));
    }
    if tunnel == 0 && field!(r, FlowRecord, flags).get() & record_flags::FROM_POD != 0 {
        // The client is a pod of this node, which does not speak over the wire.
        return Err(stop(Reason::Martian));
    }
    Ok(())
}

/// An error that a pod of this node sends: about a reply that it got as a client, or, as a backend,
/// about a request that skipped the stack.
#[inline(always)]
fn from_pod<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    view: View<'_>,
    ifindex: u32,
) -> Step<Verdict> {
    let packet = arrived(env, view)?;
    let message = message(env, &packet)?;
    let pod = env.pod(&packet.ip.l3.src()).ok_or(Reason::Icmp)?;
    if field!(pod, Pod, ifindex).get() != ifindex || message.kind == Kind::Other {
        return Err(Reason::Icmp.into());
    }
    if message.kind == Kind::Echo {
        return echo_at_pod(env, settings, &packet, &message, ifindex);
    }
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    let quote = stash_quote(env, scratch, &packet, &message)?;
    let tuple = decide::stashed(scratch);
    let client = tc::answered(settings, &packet);
    let place = flow::place(env, settings, client, tuple.dst_port, tuple.proto)
        .ok_or(Reason::TableBroken)?;
    let reply = flow::find_reply(&place, &tuple)
        .or_else(|| flood::find_reply(env, settings, &place, &tuple));
    if let Some(found) = reply {
        return short_cut(env, &packet, &message, &quote, &found, ifindex);
    }
    let tuple = decide::stashed(scratch);
    let place = flow::place(env, settings, tuple.src, tuple.src_port, tuple.proto)
        .ok_or(Reason::TableBroken)?;
    let found = flow::find_request(&place, &tuple)
        .or_else(|| flood::find_request(env, settings, &place, &tuple))
        .ok_or(Reason::Icmp)?;
    if !tc::is_ours(env, &found, 0) {
        return Err(Reason::Icmp.into());
    }
    let r = found.record;
    let owner = tc::owner(r, Direction::Forward, false);
    if message.kind == Kind::Redirect {
        return Err(Stop { reason: Reason::IcmpDenied, service: owner.service });
    }
    if tc::is_hairpin(r) {
        return go_back(&packet, &message, &quote, &Rewrite::request(r), &found, owner, ifindex);
    }
    translate(&packet, &message, &quote, &Rewrite::request(r), true, false);
    finish(&found, owner, Action::Pass)
}

/// An error about a connection of a pod with itself.
#[inline(always)]
fn go_back(
    packet: &Located<'_>,
    message: &Message<'_>,
    quote: &Quote<'_>,
    rewrite: &Rewrite<'_>,
    found: &Found<'_>,
    owner: Owner,
    ifindex: u32,
) -> Step<Verdict> {
    if packet.ip.hop_limit <= 1 {
        // Nobody is told of the end of an error (RFC 1122 section 3.2.2).
        return Err(Stop { reason: Reason::HopLimitExceeded, service: owner.service });
    }
    tc::turn(packet);
    translate(packet, message, quote, rewrite, false, true);
    finish(found, owner, Action::Redirect(ifindex))
}

/// What a backend says about a request that XDP put into its veth leaves as its replies do.
#[inline(always)]
fn short_cut<E: Env>(
    env: &E,
    packet: &Located<'_>,
    message: &Message<'_>,
    quote: &Quote<'_>,
    found: &Found<'_>,
    ifindex: u32,
) -> Step<Verdict> {
    let r = found.record;
    let owner = tc::owner(r, Direction::Reply, false);
    if message.kind == Kind::Redirect {
        return Err(Stop { reason: Reason::IcmpDenied, service: owner.service });
    }
    if tc::is_hairpin(r) {
        return go_back(packet, message, quote, &Rewrite::reply(r), found, owner, ifindex);
    }
    let way = tc::reply_way(env, field!(r, FlowRecord, reply));
    let tags = field!(r, FlowRecord, reply_tags).element(0).get() != Be32::new(0);
    let stack = tc::way_kind(field!(r, FlowRecord, forward)) != ExitKind::Frame as u8;
    // What does not skip the stack is translated behind it.
    let Some((ifindex, dst_mac, src_mac)) = way else { return Err(Reason::Icmp.into()) };
    if stack || packet.ip.hop_limit <= 1 || tags || packet.tags != 0 {
        return Err(Reason::Icmp.into());
    }
    field!(packet.eth, Ethernet, dst).copy_from(dst_mac);
    field!(packet.eth, Ethernet, src).copy_from(src_mac);
    translate(packet, message, quote, &Rewrite::reply(r), false, true);
    finish(found, owner, Action::Redirect(ifindex))
}

/// An error about a request, on its way to the client: raised by a backend of this node, by the
/// kernel, or on the way to a backend to which a pod of this node speaks.
#[inline(always)]
fn to_client<E: Env>(env: &E, settings: At<'_, Settings>, view: View<'_>) -> Step<Verdict> {
    let packet = arrived(env, view)?;
    let message = message(env, &packet)?;
    if !matches!(message.kind, Kind::Error | Kind::Redirect) {
        return Err(Reason::Icmp.into());
    }
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    let quote = stash_quote(env, scratch, &packet, &message)?;
    let tuple = decide::stashed(scratch);
    let place = flow::place(env, settings, tuple.dst, tuple.dst_port, tuple.proto)
        .ok_or(Reason::TableBroken)?;
    let found = flow::find_reply(&place, &tuple)
        .or_else(|| flood::find_reply(env, settings, &place, &tuple))
        .ok_or(Reason::Icmp)?;
    let r = found.record;
    if field!(r, FlowRecord, flags).get() & record_flags::SNAT != 0 {
        return Err(Reason::Icmp.into());
    }
    let owner = tc::owner(r, Direction::Reply, false);
    if message.kind == Kind::Redirect {
        return Err(Stop { reason: Reason::IcmpDenied, service: owner.service });
    }
    translate(&packet, &message, &quote, &Rewrite::reply(r), false, false);
    finish(&found, owner, Action::Pass)
}

/// The verdict on a translated error, if its record is still the one that was read.
#[inline(always)]
fn finish(found: &Found<'_>, owner: Owner, action: Action) -> Step<Verdict> {
    if !found.is_still_there() {
        return Err(Stop { reason: Reason::FlowChanged, service: owner.service });
    }
    Ok(Verdict { action, reason: Reason::IcmpError, owner })
}

/// Writes an error as its receiver must see it: to where packets of the other direction go, quoting
/// what the receiver sent. With `hop` it takes one hop.
#[inline(always)]
fn translate(
    packet: &Located<'_>,
    message: &Message<'_>,
    quote: &Quote<'_>,
    rewrite: &Rewrite<'_>,
    keeps_source: bool,
    hop: bool,
) {
    let outer = write_addresses(packet, rewrite, keeps_source, hop);
    match quote.l3 {
        L3::V4(at) => {
            let checksum = field!(at, Ipv4, checksum);
            checksum.set(Be16::from_raw(update(checksum.get().raw(), rewrite.addresses)));
            field!(at, Ipv4, src).set(rewrite.dst.get().v4_bytes());
            field!(at, Ipv4, dst).set(rewrite.src.get().v4_bytes());
        }
        L3::V6(at) => {
            field!(at, Ipv6, src).copy_from(rewrite.dst);
            field!(at, Ipv6, dst).copy_from(rewrite.src);
        }
    }
    let Ports { src, dst } = rewrite.ports;
    quote.ports.set(Ports { src: dst, dst: src });
    let mut sum = Sum(port_delta(rewrite.transport, rewrite.addresses) as u64);
    // A quoted IPv4 header sums up to what it did, because its checksum follows. Of ICMPv6 the pseudo
    // header changes too (RFC 4443 section 2.3).
    if !quote.l3.is_v4() {
        sum = sum.add16(rewrite.addresses).add16(outer);
    }
    if let Some(checksum) = quoted_checksum(quote) {
        let old = checksum.get().raw();
        let new = if quote.proto == IPPROTO_UDP {
            update_udp(old, rewrite.transport)
        } else {
            update(old, rewrite.transport)
        };
        checksum.set(Be16::from_raw(new));
        sum = sum.sub16(old).add16(new);
    }
    let checksum = field!(message.at, Icmp, checksum);
    checksum.set(Be16::from_raw(update(checksum.get().raw(), sum.fold())));
}

/// Where the quoted transport checksum is, if it is within the quote.
#[inline(always)]
fn quoted_checksum<'a>(quote: &Quote<'a>) -> Option<At<'a, Be16>> {
    let offset = if quote.proto == IPPROTO_UDP {
        offset_of!(Udp, checksum)
    } else {
        offset_of!(Tcp, checksum)
    };
    if quote.l4_len < offset as u32 + 2 {
        return None;
    }
    quote.l4.skip(offset).at::<Be16>()
}

/// Writes the addresses of the error itself; what they add to a sum.
#[inline(always)]
fn write_addresses(
    packet: &Located<'_>,
    rewrite: &Rewrite<'_>,
    keeps_source: bool,
    hop: bool,
) -> u16 {
    let ip = &packet.ip;
    let v4 = ip.l3.is_v4();
    let mut sum = Sum::default().sub_addr(ip.l3.dst(), v4).add_addr(rewrite.dst.get(), v4);
    if !keeps_source {
        sum = sum.sub_addr(ip.l3.src(), v4).add_addr(rewrite.src.get(), v4);
    }
    let addresses = sum.fold();
    match ip.l3 {
        L3::V4(at) => {
            let mut sum = Sum(addresses as u64);
            if hop {
                field!(at, Ipv4, ttl).set(ip.hop_limit.wrapping_sub(1));
                sum = sum.sub16(Be16::new(0x0100).raw());
            }
            let checksum = field!(at, Ipv4, checksum);
            checksum.set(Be16::from_raw(update(checksum.get().raw(), sum.fold())));
            field!(at, Ipv4, dst).set(rewrite.dst.get().v4_bytes());
            if !keeps_source {
                field!(at, Ipv4, src).set(rewrite.src.get().v4_bytes());
            }
        }
        L3::V6(at) => {
            if hop {
                field!(at, Ipv6, hop_limit).set(ip.hop_limit.wrapping_sub(1));
            }
            field!(at, Ipv6, dst).copy_from(rewrite.dst);
            if !keeps_source {
                field!(at, Ipv6, src).copy_from(rewrite.src);
            }
        }
    }
    addresses
}

/// Whether an echo request is answered here: answers are made, it is for an address that is Services'
/// alone, and comes from somewhere. Options would have to be turned round too (RFC 1122 section
/// 3.2.2.6).
///
/// # Errors
/// `Icmp`, `IpOptions` (pass); `Martian` (drop).
#[inline(always)]
fn check_echo<E: Env>(env: &E, settings: At<'_, Settings>, packet: &Located<'_>) -> Step<()> {
    let answers = field!(settings, Settings, flags).get() & settings_flags::ANSWERS != 0;
    if !answers || !is_vip(env, packet.ip.l3.dst()) {
        return Err(Reason::Icmp.into());
    }
    let ip = &packet.ip;
    // Of a first fragment IPv6 has a header of its own.
    let first = !ip.l3.is_v4() && parse::is_first_fragment::<General, E>(env);
    let extra = if first { FRAGMENT_HEADER } else { 0 };
    if ip.header_len != ip.l3.header_len() as u32 + extra {
        return Err(Reason::IpOptions.into());
    }
    let (src, dst) = (packet.ip.l3.src(), packet.ip.l3.dst());
    let none = Be16::new(0);
    let tuple = Tuple { src, dst, src_port: none, dst_port: none, proto: packet.ip.proto };
    if decide::is_martian(&tuple) {
        return Err(Reason::Martian.into());
    }
    Ok(())
}

/// Counts an answer, and whether it may be given.
///
/// # Errors
/// `EchoLimited` (drop).
#[inline(always)]
fn pay<E: Env>(env: &E, client: Addr) -> Step<()> {
    let sent = limit::allow(env, client);
    account::answer(env, AnswerKind::Echo, sent);
    if sent { Ok(()) } else { Err(Reason::EchoLimited.into()) }
}

/// Answers an echo request to a Service's address the way that it came.
#[inline(always)]
fn echo_at_uplink<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    packet: &Located<'_>,
    message: &Message<'_>,
    origin: &Origin<'_>,
) -> Step<Departure<'e>> {
    check_echo(env, settings, packet)?;
    if env.pod(&packet.ip.l3.src()).is_some() {
        return Err(Reason::Martian.into());
    }
    bounce::<P, E>(env, settings, scratch, packet, Some(message), origin)
}

/// Sends a fragment behind the first of an echo request after that one.
///
/// # Errors
/// `OtherHost` (pass); `EchoLimited` (drop), and those of [`replay::open`].
#[inline(always)]
pub(crate) fn later_at_uplink<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    packet: &Located<'_>,
    origin: &Origin<'_>,
) -> Step<Departure<'e>> {
    bounce::<P, E>(env, settings, scratch, packet, None, origin)
}

/// Sends an echo request, or what follows of it, back as the reply.
#[inline(always)]
fn bounce<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    packet: &Located<'_>,
    message: Option<&Message<'_>>,
    origin: &Origin<'_>,
) -> Step<Departure<'e>> {
    if !decide::is_for_us(settings, origin.uplink, field!(origin.eth, Ethernet, dst).get()) {
        return Err(Reason::OtherHost.into());
    }
    let draft = field!(scratch, Scratch, draft);
    origin.reply(draft);
    let exit = field!(draft, FlowRecord, reply);
    let mut answer = *packet;
    answer.ip.hop_limit = HOP_LIMIT;
    let door = replay::open(env, exit, &answer, origin.tunnel);
    if let Some(reason) = door.closed {
        return Err(reason.into());
    }
    let client = packet.ip.l3.src();
    let seed = field!(field!(settings, Settings, seeds), Seeds, flow).get();
    let port =
        FlowHash::new(seed, client, Be16::new(0), parse::icmp_of(&packet.ip.l3)).outer_port();
    let reply_tags = field!(draft, FlowRecord, reply_tags);
    let tagged = door.way == Way::Frame && reply_tags.element(0).get() != Be32::new(0);
    match message {
        Some(message) => {
            pay(env, client)?;
            write_echo(message, &packet.ip.l3);
            if parse::is_first_fragment::<General, E>(env) {
                fragment::note_echo(env, scratch, P::UPLINK);
            }
        }
        None if fragment::pay_echo(env, settings, scratch) => {}
        None => return Err(Reason::EchoLimited.into()),
    }
    packet.mark();
    turn_round(packet);
    let inside = replay::address(&door, packet, false, port);
    let (cut, tags) = (packet.cut_for(&door), tagged.then_some(reply_tags));
    let (reason, owner, ecn) = (Reason::EchoReply, Owner::NONE, 0);
    let sums = Sums::of_header(packet, &door, true);
    Ok(Departure { door, cut, tags, inside, reason, owner, ecn, sums })
}

/// Answers a pod's echo request out of the interface that it came from.
#[inline(always)]
fn echo_at_pod<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    packet: &Located<'_>,
    message: &Message<'_>,
    ifindex: u32,
) -> Step<Verdict> {
    check_echo(env, settings, packet)?;
    pay(env, packet.ip.l3.src())?;
    write_echo(message, &packet.ip.l3);
    if parse::is_first_fragment::<General, E>(env) {
        let scratch = env.scratch().ok_or(Reason::TableBroken)?;
        fragment::note_echo(env, scratch, Hook::TcIngress);
    }
    Ok(turned(packet, ifindex))
}

/// The same for a fragment behind the first.
///
/// # Errors
/// `EchoLimited` (drop).
#[inline(always)]
pub(crate) fn later_at_pod<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
    packet: &Located<'_>,
    ifindex: u32,
) -> Step<Verdict> {
    if !fragment::pay_echo(env, settings, scratch) {
        return Err(Reason::EchoLimited.into());
    }
    Ok(turned(packet, ifindex))
}

#[inline(always)]
fn turned(packet: &Located<'_>, ifindex: u32) -> Verdict {
    turn_round(packet);
    tc::turn(packet);
    let (reason, owner) = (Reason::EchoReply, Owner::NONE);
    Verdict { action: Action::Redirect(ifindex), reason, owner }
}

/// Exchanges a packet's addresses, and counts hops anew.
#[inline(always)]
fn turn_round(packet: &Located<'_>) {
    let word = |high: u8| u16::from_ne_bytes([high, 0]);
    let ip = &packet.ip;
    match ip.l3 {
        L3::V4(at) => {
            let (src, dst) = (field!(at, Ipv4, src).get(), field!(at, Ipv4, dst).get());
            field!(at, Ipv4, src).set(dst);
            field!(at, Ipv4, dst).set(src);
            field!(at, Ipv4, ttl).set(HOP_LIMIT);
            let sum = Sum::default().sub16(word(ip.hop_limit)).add16(word(HOP_LIMIT));
            let checksum = field!(at, Ipv4, checksum);
            checksum.set(Be16::from_raw(update(checksum.get().raw(), sum.fold())));
        }
        L3::V6(at) => {
            let (src, dst) = (field!(at, Ipv6, src).get(), field!(at, Ipv6, dst).get());
            field!(at, Ipv6, src).set(dst);
            field!(at, Ipv6, dst).set(src);
            field!(at, Ipv6, hop_limit).set(HOP_LIMIT);
        }
    }
}

/// Turns an echo request into an echo reply. The checksum covers the whole message, of which a first
/// fragment has a part; the difference is the same.
#[inline(always)]
fn write_echo(message: &Message<'_>, l3: &L3<'_>) {
    let (old_kind, kind) =
        if l3.is_v4() { (ICMP_ECHO, ICMP_ECHO_REPLY) } else { (ICMPV6_ECHO, ICMPV6_ECHO_REPLY) };
    let word = |high: u8| u16::from_ne_bytes([high, 0]);
    field!(message.at, Icmp, kind).set(kind);
    let sum = Sum::default().sub16(word(old_kind)).add16(word(kind));
    let checksum = field!(message.at, Icmp, checksum);
    checksum.set(Be16::from_raw(update(checksum.get().raw(), sum.fold())));
}
