//! What the sender of a packet is told that goes no further (RFC 792, RFC 1812 section 4.3, RFC 4443,
//! RFC 9293 section 3.10.7.1). Limits on how often are not known here.

use sluice_abi::{Addr, Family, IPPROTO_TCP, Reason, settings_flags};

use crate::checksum::checksum;
use crate::packet::{Ethernet, Header, Packet, Part, V4, V6, ethertype, tcp, transport_checksum};
use crate::road::{Action, Arrival, Case, Lawful, Stop, encapsulate, overhead, seen_outer_port};
use crate::state::{Exit, State};

/// IANA protocol numbers.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Hop limit of what we send ourselves.
const HOP_LIMIT: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;

/// The only lawful outcome in this state is a stop, at XDP: with its answer, if one is owed. `exit` is
/// the way that could not be gone.
pub fn stop(
    case: &Case<'_>,
    arrival: &Arrival,
    exit: Option<Exit>,
    stop: Stop,
    state: State,
) -> Vec<Lawful> {
    let mut outcome = stop.outcome(case.frame);
    if let Some(answer) = answer(case, arrival, exit, stop.reason) {
        outcome.action = Action::Transmit;
        outcome.frame = Some(back(case, arrival, answer));
    }
    vec![(outcome, state)]
}

/// The same at the host side of a pod.
pub fn stop_pod(case: &Case<'_>, packet: &Packet, stop: Stop, state: State) -> Vec<Lawful> {
    let mut outcome = stop.outcome(case.frame);
    let arrival = Arrival { packet: packet.clone(), outer: packet.eth.clone(), tunnel: 0 };
    if let Some(answer) = answer(case, &arrival, None, stop.reason) {
        outcome.action = Action::Redirect(case.ifindex);
        outcome.frame = Some(back(case, &arrival, answer));
    }
    vec![(outcome, state)]
}

/// Back the way the packet came.
fn back(case: &Case<'_>, arrival: &Arrival, mut answer: Packet) -> Vec<u8> {
    let Ethernet { dst, src, tags, .. } = arrival.outer.clone();
    let eth = Ethernet { dst: src, src: dst, tags, ethertype: answer.eth.ethertype };
    let Some(vtep) = case.tables.vteps.get(&arrival.tunnel) else {
        answer.eth = eth;
        return answer.bytes();
    };
    (answer.eth.dst, answer.eth.src) = (vtep.remote_mac, vtep.local_mac);
    encapsulate(vtep, eth, seen_outer_port(case.seen), &answer, case.seen)
}

fn answer(
    case: &Case<'_>,
    arrival: &Arrival,
    exit: Option<Exit>,
    reason: Reason,
) -> Option<Packet> {
    if case.tables.settings.flags & settings_flags::ANSWERS == 0 {
        return None;
    }
    let packet = &arrival.packet;
    let v4 = packet.family() == Family::V4;
    let router = router(case, arrival);
    match reason {
        Reason::NoEndpoint | Reason::ClosedPort if packet.proto() == IPPROTO_TCP => reset(packet),
        Reason::NoEndpoint | Reason::ClosedPort => {
            let head = if v4 { [3, 3, 0, 0, 0, 0, 0, 0] } else { [1, 4, 0, 0, 0, 0, 0, 0] };
            Some(error(packet, packet.dst(), head))
        }
        Reason::HopLimitExceeded => {
            let head = if v4 { [11, 0, 0, 0, 0, 0, 0, 0] } else { [3, 0, 0, 0, 0, 0, 0, 0] };
            Some(error(packet, router, head))
        }
        Reason::TooBig => {
            let may_not = |h: &V4| h.fragment & DONT_FRAGMENT != 0;
            if matches!(&packet.header, Header::V4(h) if !may_not(h)) {
                return None;
            }
            let mtu = mtu(case, exit?)?.to_be_bytes();
            let (kind, code) = if v4 { (3, 4) } else { (2, 0) };
            let head = [kind, code, 0, 0, mtu[0], mtu[1], mtu[2], mtu[3]];
            Some(error(packet, router, head))
        }
        _ => None,
    }
}

/// What a way out takes.
fn mtu(case: &Case<'_>, exit: Exit) -> Option<u32> {
    let (hop, outer) = match exit {
        Exit::Tunnel(vtep) => {
            let vtep = case.tables.vteps.get(&vtep)?;
            (vtep.nexthop, overhead(vtep) as u32)
        }
        Exit::NextHop(hop) => (hop, 0),
        _ => return None,
    };
    Some(case.tables.next_hops.get(&hop)?.mtu - outer)
}

/// Our address as a router: inside the tunnel the one of our own pods' network, which is what the
/// peer takes from us.
fn router(case: &Case<'_>, arrival: &Arrival) -> Addr {
    let settings = &case.tables.settings;
    let v4 = arrival.packet.family() == Family::V4;
    let addr = match (arrival.tunnel, v4) {
        (0, true) => settings.node_v4,
        (0, false) => settings.node_v6,
        (vtep, _) => case
            .tables
            .tunnel_of(vtep)
            .map_or(Addr::NONE, |t| if v4 { t.addr_v4 } else { t.addr_v6 }),
    };
    let fits = !addr.is_none() && (addr.family() == Family::V4) == v4;
    if fits { addr } else { arrival.packet.dst() }
}

/// An ICMP error that quotes as much as it may: 576 bytes in all (RFC 1812 section 4.3.2.3), the least
/// MTU with IPv6 (RFC 4443 section 2.4).
fn error(packet: &Packet, from: Addr, head: [u8; 8]) -> Packet {
    let plain = Ethernet { tags: Vec::new(), ..packet.eth.clone() };
    let whole = Packet { eth: plain, padding: Vec::new(), ..packet.clone() };
    let mut quote = whole.bytes().split_off(Ethernet::LEN);
    let (most, proto, class) = match packet.family() {
        Family::V4 => (576 - 20 - 8, ICMP, 0xc0),
        Family::V6 => (1280 - 40 - 8, ICMPV6, 0),
    };
    quote.truncate(most);
    let mut icmp = [&head[..], &quote].concat();
    let sum = match packet.family() {
        Family::V4 => checksum(&icmp),
        Family::V6 => transport_checksum(from, packet.src(), proto, &icmp),
    };
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ours(packet, from, proto, class, icmp)
}

/// The reset that a closed port answers with. None is answered with none.
fn reset(packet: &Packet) -> Option<Packet> {
    let transport = packet.transport().ok()?;
    let flags = transport.flags;
    if flags & tcp::RST != 0 {
        return None;
    }
    let (seq, ack, flags) = if flags & tcp::ACK != 0 {
        (transport.ack, 0, tcp::RST)
    } else {
        let data = packet.payload.len() - usize::from(packet.payload[12] >> 4) * 4;
        let controls = [tcp::SYN, tcp::FIN].iter().filter(|bit| flags & **bit != 0).count();
        (0, transport.seq.wrapping_add((data + controls) as u32), tcp::RST | tcp::ACK)
    };
    let mut segment = Vec::new();
    segment.extend(transport.dst.to_be_bytes());
    segment.extend(transport.src.to_be_bytes());
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    let sum = transport_checksum(packet.dst(), packet.src(), IPPROTO_TCP, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    Some(ours(packet, packet.dst(), IPPROTO_TCP, 0, segment))
}

/// A packet of ours to the sender of `packet`.
fn ours(packet: &Packet, src: Addr, protocol: u8, class: u8, payload: Vec<u8>) -> Packet {
    let dst = packet.src();
    let (header, ethertype) = match packet.family() {
        Family::V4 => {
            let mut header = V4 {
                class,
                total_len: (20 + payload.len()) as u16,
                id: 0,
                fragment: DONT_FRAGMENT,
                ttl: HOP_LIMIT,
                protocol,
                checksum: 0,
                src,
                dst,
                options: Vec::new(),
            };
            header.checksum = checksum(&header.bytes());
            (Header::V4(header), ethertype::IPV4)
        }
        Family::V6 => {
            let header = V6 {
                class,
                flow_label: 0,
                payload_len: payload.len() as u16,
                next_header: protocol,
                hop_limit: HOP_LIMIT,
                src,
                dst,
                extensions: Vec::new(),
                protocol,
            };
            (Header::V6(header), ethertype::IPV6)
        }
    };
    let eth = Ethernet { tags: Vec::new(), ethertype, ..packet.eth.clone() };
    Packet { eth, header, payload, padding: Vec::new(), obstacle: None, part: Part::Whole }
}
