//! TC: requests of this node's pods, and replies of its backends.

use sluice_abi::{Hook, Mac, Reason};

use crate::answer;
use crate::decide::{Origin, begins_anew, decide, renew};
use crate::fragment::{self, Fate};
use crate::icmp;
use crate::packet::{Packet, Transport};
use crate::road::{
    Action, Case, Direction, Lawful, Outcome, Stop, translate_reply, translate_request,
};
use crate::state::{Connection, Exit, State, Tuple};
use crate::xdp::flow;

/// What every program at TC does with a frame, and what `hook`'s does with one that has a transport
/// header, and with an ICMP message.
fn open(
    case: &Case<'_>,
    hook: Hook,
    with_transport: impl FnOnce(&Packet, &Transport) -> Vec<Lawful>,
    with_icmp: impl FnOnce(Packet) -> Vec<Lawful>,
) -> Vec<Lawful> {
    if case.tables.bypass() {
        return case.stop(Reason::Bypass);
    }
    let packet = match Packet::parse(case.frame) {
        Ok(packet) => packet,
        Err(reason) => return case.stop(reason),
    };
    if let (true, Some(reason)) = (case.hasty, packet.obstacle) {
        return case.stop(reason);
    }
    if packet.eth.dst.is_group() {
        return fragment::passed(case, hook, &packet, true, case.stop(Reason::Group));
    }
    let lawful = match packet.transport() {
        Ok(transport) => with_transport(&packet, &transport),
        Err(Reason::Icmp) => with_icmp(packet.clone()),
        Err(Reason::Fragment) => fragment::at_tc(case, hook, &packet),
        Err(reason) => case.stop(reason),
    };
    fragment::passed(case, hook, &packet, false, lawful)
}

/// What is lawful for a frame that the stack sends: a reply to a client gets the VIP as its source.
pub fn egress(case: &Case<'_>) -> Vec<Lawful> {
    let reply = |packet: &Packet, transport: &Transport| {
        let Some(key) = case.state.kept_reply(&Tuple::of(packet, transport)) else {
            return case.stop(Reason::NoService);
        };
        let mut state = case.state.clone();
        let connection = state.connections.get_mut(&key).expect("the connection is there");
        let mut leaves = packet.clone();
        translate_reply(&mut leaves, connection);
        connection.progress.advance(Direction::Reply, transport);
        let outcome = sent(Action::Pass, Reason::ReplyLocal, &leaves, connection, Direction::Reply);
        state.note(Hook::TcEgress, packet, Fate::Reply(key));
        vec![(outcome, state)]
    };
    open(case, Hook::TcEgress, reply, |packet| icmp::from_stack(case, packet))
}

fn sent(
    action: Action,
    reason: Reason,
    packet: &Packet,
    connection: &Connection,
    direction: Direction,
) -> Outcome {
    let account = flow(connection, direction, false);
    Outcome { action, reason, frame: Some(packet.bytes()), mark: None, account }
}

/// What is lawful for a frame that comes out of a pod's host side.
pub fn ingress(case: &Case<'_>) -> Vec<Lawful> {
    let sends = |packet: &Packet, transport: &Transport| {
        match case.tables.pods.get(&packet.src()) {
            Some(pod) if pod.ifindex == case.ifindex => {}
            _ => return case.stop(Reason::NoService),
        }
        match past_the_stack(case, packet, transport) {
            Some(lawful) => vec![lawful],
            None => to_itself(case, packet, transport)
                .unwrap_or_else(|| request(case, packet, transport)),
        }
    };
    open(case, Hook::TcIngress, sends, |packet| icmp::from_pod(case, packet))
}

/// The reply to a request that was put into this pod's veth skips the stack as its request did, so
/// that conntrack sees both or neither.
fn past_the_stack(case: &Case<'_>, packet: &Packet, transport: &Transport) -> Option<Lawful> {
    let key = case.state.kept_reply(&Tuple::of(packet, transport))?;
    let mut state = case.state.clone();
    let connection = state.connections.get_mut(&key)?;
    let (ifindex, dst, src) = way_past_the_stack(case, connection, packet)?;
    let mut leaves = packet.clone();
    leaves.take_hop();
    translate_reply(&mut leaves, connection);
    (leaves.eth.dst, leaves.eth.src) = (dst, src);
    connection.progress.advance(Direction::Reply, transport);
    let action = Action::Redirect(ifindex);
    let outcome = sent(action, Reason::ReplyLocal, &leaves, connection, Direction::Reply);
    state.note(Hook::TcIngress, packet, Fate::Reply(key));
    Some((outcome, state))
}

/// The reply of a pod that asked itself.
fn to_itself(case: &Case<'_>, packet: &Packet, transport: &Transport) -> Option<Vec<Lawful>> {
    let key = case.state.own_reply(&Tuple::of(packet, transport))?;
    let mut state = case.state.clone();
    let connection = state.connections.get_mut(&key)?;
    let mut leaves = packet.clone();
    translate_reply(&mut leaves, connection);
    if let Err(stop) = turn_back(connection, &mut leaves) {
        return Some(answer::stop_pod(case, packet, stop, state));
    }
    connection.progress.advance(Direction::Reply, transport);
    let action = Action::Redirect(case.ifindex);
    let outcome = sent(action, Reason::ReplyLocal, &leaves, connection, Direction::Reply);
    state.note(Hook::TcIngress, packet, Fate::Reply(key));
    Some(vec![(outcome, state)])
}

/// Sends back what a pod sends to itself; we are the only router that it meets.
///
/// # Errors
/// `HopLimitExceeded` (drop).
pub fn turn_back(connection: &Connection, packet: &mut Packet) -> Result<(), Stop> {
    if packet.hop_limit() <= 1 {
        return Err(Stop { reason: Reason::HopLimitExceeded, service: connection.service });
    }
    packet.take_hop();
    (packet.eth.dst, packet.eth.src) = (packet.eth.src, packet.eth.dst);
    Ok(())
}

/// Interface and Ethernet header of what a backend sends past the stack.
pub fn way_past_the_stack(
    case: &Case<'_>,
    connection: &Connection,
    packet: &Packet,
) -> Option<(u32, Mac, Mac)> {
    let skipped = matches!(connection.forward, Exit::Frame { .. });
    // The stack knows the VLANs.
    let tagged = !packet.eth.tags.is_empty() || !connection.reply_tags.is_empty();
    // Nobody but the kernel says that the hops are used up.
    if !skipped || tagged || packet.hop_limit() <= 1 {
        return None;
    }
    match connection.reply {
        Exit::Frame { ifindex, dst, src } => Some((ifindex, dst, src)),
        // The kernel's vxlan device encapsulates.
        Exit::Tunnel(index) => {
            let vtep = case.tables.vteps.get(&index)?;
            Some((case.tables.device_of(index)?, vtep.remote_mac, vtep.local_mac))
        }
        _ => None,
    }
}

/// A pod's request: translated here, routed by the kernel.
fn request(case: &Case<'_>, packet: &Packet, transport: &Transport) -> Vec<Lawful> {
    let tuple = Tuple::of(packet, transport);
    let tags = Vec::new();
    let origin = Origin { tunnel: 0, reply: Exit::Stack, tags, own_pod: true, for_mac: None };
    let mut state = case.state.clone();
    if let Some(connection) = state.connections.get_mut(&tuple) {
        // One that was begun on the wire in the pod's name, before the pod was known, is not its.
        let ours = connection.reply == Exit::Stack && !connection.rewritten;
        if ours && !begins_anew(case, connection, transport.flags) {
            if connection.epoch != case.tables.settings.epoch {
                renew(case, connection, &origin);
            }
            return forward(case, packet, transport, state, tuple, false);
        }
        state.end(&tuple);
    }
    let decisions = decide(case, &state, tuple, transport, &origin);
    let send = |(state, answer): (State, Result<(), Stop>)| match answer {
        Ok(()) => forward(case, packet, transport, state, tuple, true),
        Err(stop) => answer::stop_pod(case, packet, stop, state),
    };
    decisions.into_iter().flat_map(send).collect()
}

fn forward(
    case: &Case<'_>,
    packet: &Packet,
    transport: &Transport,
    mut state: State,
    key: Tuple,
    new: bool,
) -> Vec<Lawful> {
    let before = state.clone();
    let connection = state.connections.get_mut(&key).expect("the connection is there");
    let port = connection.source_port.expect("a source that is kept is known");
    let mut leaves = packet.clone();
    translate_request(&mut leaves, connection, port);
    let mut action = Action::Pass;
    if connection.hairpin {
        if let Err(stop) = turn_back(connection, &mut leaves) {
            return answer::stop_pod(case, packet, stop, before);
        }
        action = Action::Redirect(case.ifindex);
    }
    connection.progress.advance(Direction::Forward, transport);
    let remote = connection.forward.is_remote();
    let reason = if remote { Reason::DnatRemote } else { Reason::DnatLocal };
    let account = flow(connection, Direction::Forward, new);
    let frame = Some(leaves.bytes());
    state.note(Hook::TcIngress, packet, Fate::Request(key));
    vec![(Outcome { action, reason, frame, mark: None, account }, state)]
}
