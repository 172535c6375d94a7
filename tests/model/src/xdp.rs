//! XDP at an uplink: tunnels, requests from outside, replies from other nodes.

use sluice_abi::{Be32, Delivery, Family, Hook, IPPROTO_UDP, Reason, VtepKey};

use crate::answer;
use crate::decide::{Origin, begins_anew, decide, renew};
use crate::fragment::{self, Fate};
use crate::icmp;
use crate::packet::{Ethernet, Packet, Part, Transport, is_tag};
use crate::road::{
    Account, Arrival, Case, Departure, Direction, Lawful, Outcome, Stop, leave, seen_source_port,
    to_stack, translate_reply, translate_request,
};
use crate::state::{Connection, Exit, State, Tuple};

/// What is lawful for a frame at an uplink.
pub fn receive(case: &Case<'_>) -> Vec<Lawful> {
    if case.tables.bypass() {
        return case.stop(Reason::Bypass);
    }
    let mut opened = None;
    let arrival = match arrive(case, &mut opened) {
        Ok(arrival) => arrival,
        Err(reason) => {
            let lawful = case.stop(reason);
            return match opened {
                Some(packet) => fragment::passed(case, Hook::Xdp, &packet, true, lawful),
                None => lawful,
            };
        }
    };
    if arrival.tunnel != 0 && is_for_pod(case, &arrival) {
        return deliver(case, &arrival);
    }
    let lawful = match arrival.packet.transport() {
        Ok(transport) => serve(case, &arrival, &transport),
        Err(Reason::Icmp) => {
            let Origin { reply, tags, .. } = origin(case, &arrival);
            icmp::at_uplink(case, &arrival, (reply, tags))
        }
        Err(Reason::Fragment) => fragment::at_uplink(case, &arrival),
        Err(reason) => case.stop(reason),
    };
    fragment::passed(case, Hook::Xdp, &arrival.packet, false, lawful)
}

/// Takes the frame apart, and the tunnel's headers off.
/// `opened` is the innermost packet that was seen.
fn arrive(case: &Case<'_>, opened: &mut Option<Packet>) -> Result<Arrival, Reason> {
    let packet = Packet::parse(case.frame)?;
    *opened = Some(packet.clone());
    if let (true, Some(reason)) = (case.hasty, packet.obstacle) {
        return Err(reason);
    }
    if packet.eth.dst.is_group() {
        return Err(Reason::Group);
    }
    let outer = packet.eth.clone();
    let ports = case.tables.settings.vxlan_ports;
    let is_vxlan = match packet.transport() {
        Err(Reason::Icmp | Reason::Fragment) => false,
        transport => {
            let transport = transport?;
            let known = ports.iter().any(|port| port.host() == transport.dst);
            transport.proto == IPPROTO_UDP && known
        }
    };
    if !is_vxlan {
        return Ok(Arrival { packet, outer, tunnel: 0 });
    }
    if packet.part != Part::Whole {
        // The kernel puts it together and opens it; what comes out is seen at its vxlan device.
        return Err(Reason::Fragment);
    }
    if packet.has_options() {
        // The kernel's vxlan device may look at them.
        return Err(Reason::IpOptions);
    }
    let (tunnel, inner) = decapsulate(case, &packet, opened)?;
    Ok(Arrival { packet: inner, outer, tunnel })
}

/// VTEP index and inner packet (RFC 7348 section 5), if the sender may send it to us.
fn decapsulate(
    case: &Case<'_>,
    outer: &Packet,
    opened: &mut Option<Packet>,
) -> Result<(u32, Packet), Reason> {
    let (header, frame) = outer.datagram().split_at_checked(8).ok_or(Reason::VxlanMalformed)?;
    if header[0] & 0x08 == 0 {
        return Err(Reason::VxlanFlags);
    }
    // Reserved bits are ignored on receipt.
    let vni = Be32::new(u32::from_be_bytes([header[4], header[5], header[6], 0]));
    let Some(&index) = case.tables.vtep_sources.get(&VtepKey { source: outer.src(), vni }) else {
        return Err(match case.tables.is_our_tunnel(vni, outer.dst()) {
            false => Reason::ForeignTunnel,
            true if case.tables.replace() => Reason::UnknownVtep,
            true => Reason::UnknownVtepPassed,
        });
    };
    let vtep = case.tables.vteps.get(&index).ok_or(Reason::TableBroken)?;
    if vtep.local != outer.dst() {
        return Err(Reason::ForeignTunnel);
    }
    if frame.len() < Ethernet::LEN {
        return Err(Reason::VxlanMalformed);
    }
    if is_tag(u16::from_be_bytes([frame[12], frame[13]])) {
        // A vxlan device sends none: frames of another network.
        return Err(Reason::Vlan);
    }
    // What followed the datagram in the frame follows the inner packet, but is not of it.
    let behind = [&outer.payload[8 + outer.datagram().len()..], &outer.padding].concat();
    let inner = Packet::parse(&[frame, &behind].concat())?;
    *opened = Some(inner.clone());
    if let (true, Some(reason)) = (case.hasty, inner.obstacle) {
        return Err(reason);
    }
    if Ethernet::LEN + inner.ip_len() > frame.len() {
        return Err(Reason::IpMalformed);
    }
    if inner.eth.dst.is_group() {
        return Err(Reason::Group);
    }
    if inner.eth.dst != vtep.local_mac {
        return Err(Reason::InnerNotLocal);
    }
    // A Service answers this node itself, which asks through the tunnel with that address. Our pods'
    // requests are translated here: from a Service's address nobody answers them.
    let own = case.tables.tunnels.get(&vtep.tunnel).map(|t| match inner.family() {
        Family::V4 => t.addr_v4,
        Family::V6 => t.addr_v6,
    });
    let answer = own == Some(inner.dst()) && case.tables.is_vip(inner.src());
    if !vtep.pod_nets.iter().any(|net| net.contains(inner.src())) {
        return Err(if answer { Reason::InnerNotLocal } else { Reason::InnerSource });
    }
    let mut inner = inner;
    // What changes nothing writes nothing: a sum of zero has two forms.
    match ecn_inside(outer.ecn(), inner.ecn()) {
        None => return Err(Reason::Ecn),
        Some(ecn) if ecn != inner.ecn() => inner.set_ecn(ecn),
        Some(_) => {}
    }
    Ok((index, inner))
}

/// The ECN field of a packet that was inside; nothing if it may not go on: RFC 6040 section 4.2,
/// figure 4, row by row. Columns: not ECT, ECT(0), ECT(1), CE outside.
fn ecn_inside(outside: u8, inside: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0;
    const ECT_1: u8 = 1;
    const ECT_0: u8 = 2;
    const CE: u8 = 3;
    let row = match inside {
        NOT_ECT => [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None],
        ECT_0 => [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
        ECT_1 => [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
        _ => [Some(CE); 4],
    };
    row[match outside {
        NOT_ECT => 0,
        ECT_0 => 1,
        ECT_1 => 2,
        _ => 3,
    }]
}

fn is_for_pod(case: &Case<'_>, arrival: &Arrival) -> bool {
    case.tables.pods.contains_key(&arrival.packet.dst())
}

/// Out of a tunnel, to a pod of this node.
fn deliver(case: &Case<'_>, arrival: &Arrival) -> Vec<Lawful> {
    let mut packet = arrival.packet.clone();
    let pod = case.tables.pods[&packet.dst()];
    // The reply to a pod's own request is translated where it leaves for the pod (TC egress),
    // which a frame that is put into the pod's veth never passes.
    let tuple = packet.transport().ok().map(|t| Tuple::of(&packet, &t));
    // Nor do both directions of what is neither TCP nor UDP, of which the stack then knows one only.
    // A fragment may be a part of such a reply, too.
    let stays = packet.part != Part::Whole
        || tuple.is_none_or(|tuple| case.state.kept_reply(&tuple).is_some());
    let departure = if pod.delivery != Delivery::Redirect as u16 || stays {
        to_stack(case, arrival, packet)
    } else if packet.hop_limit() <= 1 {
        return case.stop(Reason::HopLimit);
    } else {
        packet.take_hop();
        (packet.eth.dst, packet.eth.src) = (pod.pod_mac, pod.host_mac);
        Departure { action: case.out_of(pod.ifindex), frame: packet.bytes(), mark: None }
    };
    vec![(outcome(departure, Reason::DecapLocal, Account::Nobody), case.state.clone())]
}

pub fn outcome(departure: Departure, reason: Reason, account: Account) -> Outcome {
    let Departure { action, frame, mark } = departure;
    Outcome { action, reason, frame: Some(frame), mark, account }
}

/// Whether a packet from the client's side comes the way that the connection's requests come.
///
/// # Errors
/// `TunnelChanged`, `Martian` (drop).
pub fn check_client(connection: &Connection, tunnel: u32) -> Result<(), Reason> {
    if connection.tunnel != tunnel {
        return Err(Reason::TunnelChanged);
    }
    if tunnel == 0 && connection.reply == Exit::Stack {
        // The client is a pod of this node, which does not speak over the wire.
        return Err(Reason::Martian);
    }
    Ok(())
}

/// Whether a packet from the backend's side comes the way that its requests went: out of a tunnel,
/// whose source was checked, or plain.
///
/// # Errors
/// `TunnelChanged` (drop).
pub fn check_way(connection: &Connection, tunnel: u32) -> Result<(), Reason> {
    let tunnelled = matches!(connection.forward, Exit::Tunnel(_));
    if tunnelled == (tunnel != 0) { Ok(()) } else { Err(Reason::TunnelChanged) }
}

/// What a connection has to say to a request that has its tuple.
enum Standing {
    Good,
    Old,
    Ended,
    Denied(Reason),
}

fn standing(
    case: &Case<'_>,
    connection: &Connection,
    arrival: &Arrival,
    transport: &Transport,
) -> Standing {
    let old = connection.epoch != case.tables.settings.epoch;
    if let Err(reason) = check_client(connection, arrival.tunnel) {
        // What came out of a tunnel has proved its source. It wins against a connection that a
        // plain packet began, and against one of another tunnel once the tables have changed.
        let wins = arrival.tunnel != 0 && (connection.tunnel == 0 || old);
        return if wins { Standing::Ended } else { Standing::Denied(reason) };
    }
    match (begins_anew(case, connection, transport.flags), old) {
        (true, _) => Standing::Ended,
        (false, true) => Standing::Old,
        (false, false) => Standing::Good,
    }
}

/// A packet that may belong to a Service.
fn serve(case: &Case<'_>, arrival: &Arrival, transport: &Transport) -> Vec<Lawful> {
    let tuple = Tuple::of(&arrival.packet, transport);
    let origin = origin(case, arrival);
    let mut state = case.state.clone();
    if let Some(connection) = state.connections.get_mut(&tuple) {
        let service = connection.service;
        match standing(case, connection, arrival, transport) {
            Standing::Good => return forward(case, arrival, transport, state, tuple, false),
            Standing::Old => {
                renew(case, connection, &origin);
                return forward(case, arrival, transport, state, tuple, false);
            }
            Standing::Denied(reason) => return case.stop(Stop { reason, service }),
            Standing::Ended => state.end(&tuple),
        }
    }
    if let Some(request) = state.rewritten_reply(&tuple) {
        return reply(case, arrival, transport, state, request);
    }
    let decisions = decide(case, &state, tuple, transport, &origin);
    let send = |(state, answer): (State, Result<(), Stop>)| match answer {
        Ok(()) => forward(case, arrival, transport, state, tuple, true),
        // "No Service" has another name for what came out of a tunnel.
        Err(stop) if stop.reason == Reason::NoService && arrival.tunnel != 0 => {
            case.stop_in(Reason::InnerNotLocal.into(), state)
        }
        Err(stop) => answer::stop(case, arrival, None, stop, state),
    };
    decisions.into_iter().flat_map(send).collect()
}

/// Replies leave the way the request came.
pub fn origin(case: &Case<'_>, arrival: &Arrival) -> Origin {
    let reply = match arrival.tunnel {
        0 => Exit::Frame { ifindex: case.ifindex, dst: arrival.outer.src, src: arrival.outer.dst },
        vtep => Exit::Tunnel(vtep),
    };
    // A tunnel's tags belong to the way to its other end.
    let tags = if arrival.tunnel == 0 { arrival.outer.tags.clone() } else { Vec::new() };
    let for_mac = Some(arrival.outer.dst);
    Origin { tunnel: arrival.tunnel, reply, tags, own_pod: false, for_mac }
}

/// A request of a connection.
fn forward(
    case: &Case<'_>,
    arrival: &Arrival,
    transport: &Transport,
    mut state: State,
    key: Tuple,
    new: bool,
) -> Vec<Lawful> {
    let before = state.clone();
    let connection = state.connections.get_mut(&key).expect("the connection is there");
    let seen = seen_source_port(case.seen, connection.forward);
    let settings = &case.tables.settings;
    // A port that was chosen while nobody saw it shows now.
    let port = *connection.source_port.get_or_insert_with(|| {
        let range = settings.snat_first_port..=settings.snat_last_port;
        seen.filter(|port| range.contains(port)).unwrap_or(settings.snat_first_port)
    });
    let mut packet = arrival.packet.clone();
    translate_request(&mut packet, connection, port);
    let [outer_port, _] = &mut connection.outer_ports;
    let service = connection.service;
    match leave(case, arrival, packet, connection.forward, outer_port, &[]) {
        // The decision is kept; nothing was sent, so nothing was chosen for anybody to see.
        Err(reason) => {
            let exit = Some(connection.forward);
            answer::stop(case, arrival, exit, Stop { reason, service }, before)
        }
        Ok(departure) => {
            connection.progress.advance(Direction::Forward, transport);
            let reason = reason(arrival, connection, Direction::Forward);
            let account = flow(connection, Direction::Forward, new);
            state.note(Hook::Xdp, &arrival.packet, Fate::Request(key));
            vec![(outcome(departure, reason, account), state)]
        }
    }
}

/// A reply of a backend on another node.
fn reply(
    case: &Case<'_>,
    arrival: &Arrival,
    transport: &Transport,
    mut state: State,
    key: Tuple,
) -> Vec<Lawful> {
    let before = state.clone();
    let connection = state.connections.get_mut(&key).expect("the connection is there");
    let service = connection.service;
    if let Err(reason) = check_way(connection, arrival.tunnel) {
        return case.stop_in(Stop { reason, service }, before);
    }
    let mut packet = arrival.packet.clone();
    translate_reply(&mut packet, connection);
    let [_, outer_port] = &mut connection.outer_ports;
    let tags = &connection.reply_tags;
    match leave(case, arrival, packet, connection.reply, outer_port, tags) {
        Err(reason) => {
            let exit = Some(connection.reply);
            answer::stop(case, arrival, exit, Stop { reason, service }, before)
        }
        Ok(departure) => {
            connection.progress.advance(Direction::Reply, transport);
            let account = flow(connection, Direction::Reply, false);
            state.note(Hook::Xdp, &arrival.packet, Fate::Reply(key));
            vec![(outcome(departure, Reason::ReplyRemote, account), state)]
        }
    }
}

/// What a translated packet is counted as.
pub fn reason(arrival: &Arrival, connection: &Connection, direction: Direction) -> Reason {
    match (direction, arrival.tunnel != 0, connection.forward.is_remote()) {
        (Direction::Reply, ..) => Reason::ReplyRemote,
        (Direction::Forward, false, false) => Reason::DnatLocal,
        (Direction::Forward, false, true) => Reason::DnatRemote,
        (Direction::Forward, true, false) => Reason::DecapDnatLocal,
        (Direction::Forward, true, true) => Reason::DecapDnatRemote,
    }
}

/// A translated packet of a connection.
pub fn flow(connection: &Connection, direction: Direction, new: bool) -> Account {
    let (service, backend) = (connection.service, connection.backend_id);
    Account::Flow { service, backend, direction, new }
}
