//! ICMP and ICMPv6: errors about translated connections (RFC 5508 section 4), and echo requests to a
//! Service's address.
//!
//! An error quotes the packet that it is about. Read backwards, the quote is the tuple of the other
//! direction, whose packets go where the error must go: there it must quote what was sent there.

use sluice_abi::{Addr, Family, Hook, IPPROTO_TCP, IPPROTO_UDP, Reason, settings_flags};

use crate::checksum::update;
use crate::decide::is_martian;
use crate::fragment::Fate;
use crate::packet::{Header, Packet, Part, chain, icmp_of};
use crate::road::{
    Account, Action, Arrival, Case, Direction, Lawful, Outcome, Stop, leave, seen_inner,
};
use crate::state::{Connection, Exit, State, Tuple};
use crate::xdp::{check_client, check_way, flow, outcome};

/// Bytes of every message's header.
const HEADER: usize = 8;
/// Bytes of an IPv6 fragment header (RFC 8200 section 4.5).
const FRAGMENT_HEADER: usize = 8;
/// What is quoted of a transport header at least (RFC 792: 64 bits).
const QUOTED: usize = 8;
/// Hop limit of an answer (IANA default TTL).
const HOP_LIMIT: u8 = 64;

/// What a message is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Echo,
    Error,
    Redirect,
    Other,
}

/// The kind of a packet's message.
fn kind(packet: &Packet) -> Kind {
    match (packet.family(), packet.payload[0], packet.payload[1]) {
        // RFC 792: unreachable, time exceeded, parameter problem.
        (Family::V4, 3 | 11 | 12, _) => Kind::Error,
        (Family::V4, 5, _) => Kind::Redirect,
        (Family::V4, 8, 0) => Kind::Echo,
        // RFC 4443 sections 3 and 4.
        (Family::V6, 1..=4, _) => Kind::Error,
        (Family::V6, 128, 0) => Kind::Echo,
        _ => Kind::Other,
    }
}

/// The packet that an error quotes.
struct Quote {
    /// As it stands there.
    tuple: Tuple,
    /// Where its transport header begins in the message.
    l4: usize,
}

/// The TCP or UDP packet that an error quotes, if it was sent to whom that came from.
///
/// # Errors
/// `Icmp` (pass): of no connection. `IcmpMalformed`, `IcmpDenied` (drop).
fn quote(case: &Case<'_>, packet: &Packet) -> Result<Quote, Reason> {
    let len = packet.payload.len();
    // Whatever lies behind the message in its frame may be looked at, but nothing follows from it.
    let bytes = [&packet.payload[..], &packet.padding].concat();
    let body = &bytes[HEADER..];
    let (src, dst, proto, header_len) = match packet.family() {
        Family::V4 => {
            let h = body.get(..20).ok_or(Reason::IcmpMalformed)?;
            if h[0] >> 4 != 4 || h[0] & 0xf < 5 {
                return Err(Reason::IcmpMalformed);
            }
            if (u16::from(h[6]) << 8 | u16::from(h[7])) & 0x1fff != 0 {
                // Of a later fragment nobody knows the ports.
                return Err(Reason::Icmp);
            }
            let addr = |at: usize| Addr::from_v4(std::array::from_fn(|i| h[at + i]));
            (addr(12), addr(16), h[9], usize::from(h[0] & 0xf) * 4)
        }
        Family::V6 => {
            let h = body.get(..40).ok_or(Reason::IcmpMalformed)?;
            if h[0] >> 4 != 6 {
                return Err(Reason::IcmpMalformed);
            }
            let chain = chain(h[6], &body[40..], false).map_err(|_| Reason::Icmp)?;
            let (proto, chain, _) = chain;
            if HEADER + 40 + chain > len {
                // Cut within its extension headers, or of such a kind.
                return Err(if chain == 0 { Reason::IcmpMalformed } else { Reason::Icmp });
            }
            let addr = |at: usize| Addr(std::array::from_fn(|i| h[at + i]));
            // RFC 8200 section 4.5: the offset, in units of eight bytes, and three flags.
            let (proto, chain) = match (proto, body.get(40 + chain..40 + chain + 8)) {
                (44, Some(&[next, _, 0, flags, ..])) if flags < 8 => (next, chain + 8),
                (44, _) => return Err(Reason::Icmp),
                _ => (proto, chain),
            };
            (addr(8), addr(24), proto, 40 + chain)
        }
    };
    let l4 = HEADER + header_len;
    if l4 > len {
        return Err(Reason::IcmpMalformed);
    }
    if proto == icmp_of(packet.family()) {
        // RFC 1122 section 3.2.2: no error is sent about an error.
        let about_error = bytes.get(l4).is_some_and(|kind| is_error(packet.family(), *kind));
        let denied = about_error && case.tables.is_vip(packet.dst());
        return Err(if denied { Reason::IcmpDenied } else { Reason::Icmp });
    }
    if ![IPPROTO_TCP, IPPROTO_UDP].contains(&proto) {
        return Err(Reason::Icmp);
    }
    if l4 + QUOTED > len {
        return Err(Reason::IcmpMalformed);
    }
    if src != packet.dst() {
        return Err(Reason::Icmp);
    }
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let tuple = Tuple { proto, src: (src, port(l4)), dst: (dst, port(l4 + 2)) };
    Ok(Quote { tuple, l4 })
}

/// Whether a type is an error's.
fn is_error(family: Family, kind: u8) -> bool {
    match family {
        Family::V4 => [3, 4, 5, 11, 12].contains(&kind),
        Family::V6 => kind < 128,
    }
}

impl Quote {
    /// The tuple of packets in the other direction.
    fn backwards(&self) -> Tuple {
        Tuple { src: self.tuple.dst, dst: self.tuple.src, ..self.tuple }
    }

    /// Writes a message as its receiver must see it: quoting a packet between these.
    fn translate(&self, packet: &mut Packet, src: (Addr, u16), dst: (Addr, u16)) {
        let before = packet.payload.clone();
        let bytes = &mut packet.payload;
        let old = ends(self.tuple.src.0, self.tuple.dst.0);
        let new = ends(src.0, dst.0);
        match src.0.family() {
            Family::V4 => {
                bytes[HEADER + 12..HEADER + 20].copy_from_slice(&new);
                put(bytes, HEADER + 10, |checksum| update(checksum, &old, &new));
            }
            Family::V6 => bytes[HEADER + 8..HEADER + 40].copy_from_slice(&new),
        }
        let old_ports = before[self.l4..self.l4 + 4].to_vec();
        let new_ports = [src.1.to_be_bytes(), dst.1.to_be_bytes()].concat();
        bytes[self.l4..self.l4 + 4].copy_from_slice(&new_ports);
        let udp = self.tuple.proto == IPPROTO_UDP;
        let at = self.l4 + if udp { 6 } else { 16 };
        if at + 2 <= bytes.len() {
            let (old, new) = ([old, old_ports].concat(), [new, new_ports].concat());
            put(bytes, at, |checksum| match (udp, update(checksum, &old, &new)) {
                (true, _) if checksum == 0 => 0,
                (true, 0) => 0xffff,
                (_, checksum) => checksum,
            });
        }
        resum(packet, &before, &[], &[]);
    }
}

/// Two addresses as they stand in a header.
fn ends(src: Addr, dst: Addr) -> Vec<u8> {
    match src.family() {
        Family::V4 => [src.v4_bytes(), dst.v4_bytes()].concat(),
        Family::V6 => [src.0, dst.0].concat(),
    }
}

/// Changes a word.
fn put(bytes: &mut [u8], at: usize, how: impl Fn(u16) -> u16) {
    let new = how(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
}

/// Updates the checksum of a message that was `before`, and whose pseudo header was and is this.
fn resum(packet: &mut Packet, before: &[u8], old_pseudo: &[u8], new_pseudo: &[u8]) {
    let covered = |bytes: &[u8], pseudo: &[u8]| {
        let mut covered = bytes.to_vec();
        covered[2..4].fill(0);
        covered.resize(bytes.len().next_multiple_of(2), 0);
        covered.extend(pseudo);
        covered
    };
    let old = covered(before, old_pseudo);
    let new = covered(&packet.payload, new_pseudo);
    put(&mut packet.payload, 2, |checksum| update(checksum, &old, &new));
}

/// Writes new addresses; the checksums that cover them follow (RFC 4443 section 2.3: ICMPv6's too).
fn readdress(packet: &mut Packet, src: Addr, dst: Addr) {
    let (old, new) = (ends(packet.src(), packet.dst()), ends(src, dst));
    packet.readdress(src, dst);
    if packet.family() == Family::V6 {
        let before = packet.payload.clone();
        resum(packet, &before, &old, &new);
    }
}

/// An error about a reply, on its way to the backend.
fn to_backend(packet: &mut Packet, quote: &Quote, connection: &Connection, source_port: u16) {
    let source = (connection.source, source_port);
    quote.translate(packet, connection.backend, source);
    let ours = connection.rewritten || connection.hairpin;
    let src = if ours { connection.source } else { packet.src() };
    readdress(packet, src, connection.backend.0);
}

/// An error about a request, on its way to the client.
fn to_client(packet: &mut Packet, quote: &Quote, connection: &Connection) {
    let Tuple { src: client, dst: vip, .. } = connection.request;
    quote.translate(packet, client, vip);
    readdress(packet, vip.0, client.0);
}

/// What is lawful for a message at an uplink.
pub fn at_uplink(case: &Case<'_>, arrival: &Arrival, reply: (Exit, Vec<[u8; 4]>)) -> Vec<Lawful> {
    if arrival.packet.payload.len() < HEADER {
        return case.stop(Reason::IcmpMalformed);
    }
    match kind(&arrival.packet) {
        kind if is_partial(&arrival.packet, kind) => case.stop(Reason::Fragment),
        Kind::Other => case.stop(Reason::Icmp),
        Kind::Echo => match echo_at_uplink(case, arrival, reply) {
            Ok(outcome) => vec![(outcome, noted(case, Hook::Xdp, &arrival.packet))],
            Err(reason) => case.stop(reason),
        },
        kind => match error_at_uplink(case, arrival, kind == Kind::Redirect) {
            Ok(lawful) => vec![lawful],
            Err(stop) => case.stop(stop),
        },
    }
}

/// Whether it is a part of a message that is only understood as a whole.
fn is_partial(packet: &Packet, kind: Kind) -> bool {
    packet.part != Part::Whole && kind != Kind::Echo
}

/// What is known once an echo request went back: what follows of it goes back too.
fn noted(case: &Case<'_>, hook: Hook, packet: &Packet) -> State {
    let mut state = case.state.clone();
    state.note(hook, packet, Fate::Echo);
    state
}

fn error_at_uplink(case: &Case<'_>, arrival: &Arrival, redirect: bool) -> Result<Lawful, Stop> {
    let quote = quote(case, &arrival.packet)?;
    let tuple = quote.backwards();
    let mut state: State = case.state.clone();
    let (key, direction) = match state.rewritten_reply(&tuple) {
        _ if state.connections.contains_key(&tuple) => (tuple, Direction::Forward),
        Some(key) => (key, Direction::Reply),
        None => return Err(Reason::Icmp.into()),
    };
    let connection = state.connections.get_mut(&key).expect("the connection is there");
    let service = connection.service;
    let stop = |reason| Stop { reason, service };
    match direction {
        Direction::Forward => check_client(connection, arrival.tunnel).map_err(stop)?,
        Direction::Reply => check_way(connection, arrival.tunnel).map_err(stop)?,
    }
    if redirect {
        return Err(stop(Reason::IcmpDenied));
    }
    let mut packet = arrival.packet.clone();
    let [forward_port, reply_port] = &mut connection.outer_ports;
    let (exit, outer_port) = match direction {
        Direction::Forward => (connection.forward, forward_port),
        Direction::Reply => (connection.reply, reply_port),
    };
    let mut outer_port = *outer_port;
    match direction {
        Direction::Forward => {
            let port = connection.source_port.or_else(|| seen_quoted_port(case, exit));
            to_backend(&mut packet, &quote, connection, port.unwrap_or_default());
        }
        Direction::Reply => to_client(&mut packet, &quote, connection),
    }
    let tags = match direction {
        Direction::Reply => &connection.reply_tags[..],
        Direction::Forward => &[],
    };
    let departure = leave(case, arrival, packet, exit, &mut outer_port, tags).map_err(stop)?;
    match direction {
        Direction::Forward => connection.outer_ports[0] = outer_port,
        Direction::Reply => connection.outer_ports[1] = outer_port,
    }
    let account = flow(connection, direction, false);
    Ok((outcome(departure, Reason::IcmpError, account), state))
}

/// A source port that was chosen while nobody saw it, in the quote of what came out.
fn seen_quoted_port(case: &Case<'_>, exit: Exit) -> Option<u16> {
    let packet = seen_inner(case.seen, exit)?;
    let quote = quote(case, &packet);
    // The quoted packet goes to whom the error does not go, so its source is not asked for.
    quote.ok().map(|quote| quote.tuple.dst.1)
}

/// Whether an echo request is one that is answered.
fn check_echo(case: &Case<'_>, packet: &Packet) -> Result<(), Reason> {
    let answers = case.tables.settings.flags & settings_flags::ANSWERS != 0;
    if !answers || !case.tables.is_vip(packet.dst()) {
        return Err(Reason::Icmp);
    }
    let plain = match (&packet.header, packet.part) {
        (Header::V6(h), Part::First(_)) => h.extensions.len() == FRAGMENT_HEADER,
        _ => !packet.has_options(),
    };
    if !plain {
        // They would have to be turned round too (RFC 1122 section 3.2.2.6).
        return Err(Reason::IpOptions);
    }
    if is_martian(packet.src(), packet.dst()) {
        return Err(Reason::Martian);
    }
    Ok(())
}

/// RFC 792, RFC 4443 section 4.2: the addresses are exchanged, and everything else comes back.
fn answer(packet: &mut Packet) {
    let before = packet.payload.clone();
    packet.payload[0] = match packet.family() {
        Family::V4 => 0,
        Family::V6 => 129,
    };
    resum(packet, &before, &[], &[]);
    let (src, dst) = (packet.src(), packet.dst());
    readdress(packet, dst, src);
    packet.set_hop_limit(HOP_LIMIT);
}

fn echo_at_uplink(
    case: &Case<'_>,
    arrival: &Arrival,
    way: (Exit, Vec<[u8; 4]>),
) -> Result<Outcome, Reason> {
    let mut packet = arrival.packet.clone();
    check_echo(case, &packet)?;
    if case.tables.pods.contains_key(&packet.src()) {
        return Err(Reason::Martian);
    }
    answer(&mut packet);
    bounce(case, arrival, packet, way)
}

/// What follows of an echo request goes after it.
pub fn later_at_uplink(
    case: &Case<'_>,
    arrival: &Arrival,
    way: (Exit, Vec<[u8; 4]>),
) -> Result<Outcome, Reason> {
    let mut packet = arrival.packet.clone();
    let (src, dst) = (packet.src(), packet.dst());
    packet.readdress(dst, src);
    bounce(case, arrival, packet, way)
}

/// The way that it came.
fn bounce(
    case: &Case<'_>,
    arrival: &Arrival,
    mut packet: Packet,
    (exit, tags): (Exit, Vec<[u8; 4]>),
) -> Result<Outcome, Reason> {
    if !case.tables.is_own_mac(case.ifindex, arrival.outer.dst) {
        return Err(Reason::OtherHost);
    }
    // What is made here takes no hop here.
    packet.set_hop_limit(HOP_LIMIT + 1);
    let departure = leave(case, arrival, packet, exit, &mut None, &tags)?;
    Ok(outcome(departure, Reason::EchoReply, Account::Nobody))
}

/// What is lawful for a message that a pod of this node sends.
pub fn from_pod(case: &Case<'_>, packet: Packet) -> Vec<Lawful> {
    if packet.payload.len() < HEADER {
        return case.stop(Reason::IcmpMalformed);
    }
    let known = case.tables.pods.get(&packet.src()).is_some_and(|p| p.ifindex == case.ifindex);
    let kind = kind(&packet);
    if is_partial(&packet, kind) {
        return case.stop(Reason::Fragment);
    }
    if kind == Kind::Echo && known {
        return match echo_at_pod(case, packet.clone()) {
            Ok(outcome) => vec![(outcome, noted(case, Hook::TcIngress, &packet))],
            Err(reason) => case.stop(reason),
        };
    }
    let answer = match kind {
        _ if !known => Err(Reason::Icmp.into()),
        Kind::Other | Kind::Echo => Err(Reason::Icmp.into()),
        kind => error_at_pod(case, packet, kind == Kind::Redirect),
    };
    match answer {
        Ok(outcome) => vec![(outcome, case.state.clone())],
        Err(stop) => case.stop(stop),
    }
}

fn sent(action: Action, reason: Reason, packet: &Packet, account: Account) -> Outcome {
    Outcome { action, reason, frame: Some(packet.bytes()), mark: None, account }
}

fn echo_at_pod(case: &Case<'_>, mut packet: Packet) -> Result<Outcome, Reason> {
    check_echo(case, &packet)?;
    answer(&mut packet);
    Ok(turn_back(case, packet))
}

/// The same for what follows of it.
pub fn later_at_pod(case: &Case<'_>, mut packet: Packet) -> Outcome {
    let (src, dst) = (packet.src(), packet.dst());
    packet.readdress(dst, src);
    packet.set_hop_limit(HOP_LIMIT);
    turn_back(case, packet)
}

fn turn_back(case: &Case<'_>, mut packet: Packet) -> Outcome {
    (packet.eth.dst, packet.eth.src) = (packet.eth.src, packet.eth.dst);
    sent(Action::Redirect(case.ifindex), Reason::EchoReply, &packet, Account::Nobody)
}

fn error_at_pod(case: &Case<'_>, mut packet: Packet, redirect: bool) -> Result<Outcome, Stop> {
    let quote = quote(case, &packet)?;
    let tuple = quote.backwards();
    if let Some(key) = case.state.kept_reply(&tuple) {
        // As a backend, about a request that skipped the stack: the error does too.
        let connection = &case.state.connections[&key];
        if redirect {
            return Err(Stop { reason: Reason::IcmpDenied, service: connection.service });
        }
        let way = crate::tc::way_past_the_stack(case, connection, &packet);
        // Else it is translated behind the stack.
        let (ifindex, dst, src) = way.ok_or(Reason::Icmp)?;
        packet.take_hop();
        to_client(&mut packet, &quote, connection);
        (packet.eth.dst, packet.eth.src) = (dst, src);
        let account = flow(connection, Direction::Reply, false);
        return Ok(sent(Action::Redirect(ifindex), Reason::IcmpError, &packet, account));
    }
    if let Some(key) = case.state.own_reply(&tuple) {
        let connection = &case.state.connections[&key];
        if redirect {
            return Err(Stop { reason: Reason::IcmpDenied, service: connection.service });
        }
        crate::tc::turn_back(connection, &mut packet)?;
        to_client(&mut packet, &quote, connection);
        let account = flow(connection, Direction::Reply, false);
        return Ok(sent(Action::Redirect(case.ifindex), Reason::IcmpError, &packet, account));
    }
    // As a client, about a reply.
    let connection = case.state.connections.get(&tuple);
    let ours = |c: &&Connection| c.reply == Exit::Stack && !c.rewritten;
    let connection = connection.filter(ours).ok_or(Reason::Icmp)?;
    if redirect {
        return Err(Stop { reason: Reason::IcmpDenied, service: connection.service });
    }
    let port = connection.source_port.expect("a source that is kept is known");
    let mut action = Action::Pass;
    if connection.hairpin {
        crate::tc::turn_back(connection, &mut packet)?;
        action = Action::Redirect(case.ifindex);
    }
    to_backend(&mut packet, &quote, connection, port);
    let account = flow(connection, Direction::Forward, false);
    Ok(sent(action, Reason::IcmpError, &packet, account))
}

/// What is lawful for a message that the stack sends.
pub fn from_stack(case: &Case<'_>, packet: Packet) -> Vec<Lawful> {
    if packet.payload.len() < HEADER {
        return case.stop(Reason::IcmpMalformed);
    }
    match error_from_stack(case, packet) {
        Ok(outcome) => vec![(outcome, case.state.clone())],
        Err(stop) => case.stop(stop),
    }
}

fn error_from_stack(case: &Case<'_>, mut packet: Packet) -> Result<Outcome, Stop> {
    let kind = kind(&packet);
    if is_partial(&packet, kind) {
        return Err(Reason::Fragment.into());
    }
    if ![Kind::Error, Kind::Redirect].contains(&kind) {
        return Err(Reason::Icmp.into());
    }
    let quote = quote(case, &packet)?;
    let key = case.state.kept_reply(&quote.backwards()).ok_or(Reason::Icmp)?;
    let connection = &case.state.connections[&key];
    if kind == Kind::Redirect {
        return Err(Stop { reason: Reason::IcmpDenied, service: connection.service });
    }
    to_client(&mut packet, &quote, connection);
    let account = flow(connection, Direction::Reply, false);
    Ok(sent(Action::Pass, Reason::IcmpError, &packet, account))
}
