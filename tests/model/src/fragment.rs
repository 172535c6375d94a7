//! Fragments behind the first of their packet. They have no ports, so they go where the first one
//! went, if that was seen (RFC 791 section 3.2, RFC 8200 section 4.5). How many packets are remembered
//! is the datapath's business: a note may be lost when another is made.

use sluice_abi::{Addr, Family, Hook, Reason, VerdictKind};

use crate::decide::Origin;
use crate::icmp;
use crate::packet::{Header, Packet, Part};
use crate::road::{Action, Arrival, Case, Direction, Lawful, Outcome, Stop, leave};
use crate::state::{Connection, State, Tuple};
use crate::tables::Tables;
use crate::tc::{turn_back, way_past_the_stack};
use crate::xdp::{check_client, check_way, flow, origin, outcome, reason};

/// What fragments of one packet have in common; each hook translates for itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Common {
    hook: Hook,
    src: Addr,
    dst: Addr,
    id: u32,
    /// IPv6 tells packets apart without it.
    protocol: Option<u8>,
}

impl Common {
    fn of(hook: Hook, packet: &Packet, id: u32) -> Self {
        let protocol = match &packet.header {
            Header::V4(h) => Some(h.protocol),
            Header::V6(_) => None,
        };
        Self { hook, src: packet.src(), dst: packet.dst(), id, protocol }
    }
}

/// What became of a first fragment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fate {
    /// Translated as a request of this connection.
    Request(Tuple),
    /// Translated as a reply of this connection.
    Reply(Tuple),
    /// The connection that translated it has ended.
    Ended,
    /// Left to the kernel.
    Passed,
    /// Sent back as an echo reply.
    Echo,
}

/// What is remembered of a first fragment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Note {
    fate: Fate,
    /// No other note was made since.
    last: bool,
}

impl State {
    /// Remembers a first fragment; of nothing else is there anything to remember.
    pub fn note(&mut self, hook: Hook, packet: &Packet, fate: Fate) {
        let Part::First(id) = packet.part else { return };
        self.notes.values_mut().for_each(|note| note.last = false);
        self.notes.insert(Common::of(hook, packet, id), Note { fate, last: true });
    }

    /// Ends a connection.
    pub fn end(&mut self, request: &Tuple) {
        self.connections.remove(request);
        for note in self.notes.values_mut() {
            if [Fate::Request(*request), Fate::Reply(*request)].contains(&note.fate) {
                note.fate = Fate::Ended;
            }
        }
    }

    /// What may be known of the first fragment of this one.
    fn fates(&self, hook: Hook, packet: &Packet) -> Vec<Option<Fate>> {
        let Part::Later(id) = packet.part else { return vec![Some(Fate::Passed)] };
        match self.notes.get(&Common::of(hook, packet, id)) {
            Some(Note { fate, last: true }) => vec![Some(*fate)],
            Some(Note { fate, last: false }) => vec![Some(*fate), None],
            None => vec![None],
        }
    }
}

/// Whether nobody but us has a use for packets to an address: Services' alone, or our source inside a
/// tunnel.
fn is_ours(tables: &Tables, addr: Addr) -> bool {
    let tunnel = |t: &sluice_abi::Tunnel| match addr.family() {
        Family::V4 => t.addr_v4 == addr,
        Family::V6 => t.addr_v6 == addr,
    };
    tables.is_vip(addr) || tables.tunnels.values().any(tunnel)
}

/// Remembers that the kernel gets a first fragment to an address of ours, so that it gets all of them.
/// Whether it is remembered where nothing was asked of its transport header is left open (`maybe`).
pub fn passed(
    case: &Case<'_>,
    hook: Hook,
    packet: &Packet,
    maybe: bool,
    lawful: Vec<Lawful>,
) -> Vec<Lawful> {
    let first = matches!(packet.part, Part::First(_));
    let ours = is_ours(case.tables, packet.dst()) || case.tables.is_borrowed(packet.dst());
    if !first || !ours {
        return lawful;
    }
    let remember = |(outcome, state): Lawful| {
        // Of ICMP it is remembered before the message is looked at.
        let icmp = packet.transport() == Err(Reason::Icmp);
        let kind = outcome.reason.kind();
        if kind != VerdictKind::Pass && !(icmp && kind == VerdictKind::Drop) {
            return vec![(outcome, state)];
        }
        let mut noted = state.clone();
        noted.note(hook, packet, Fate::Passed);
        let noted = (outcome.clone(), noted);
        if maybe { vec![noted, (outcome, state)] } else { vec![noted] }
    };
    lawful.into_iter().flat_map(remember).collect()
}

/// What is lawful for a later fragment at an uplink.
pub fn at_uplink(case: &Case<'_>, arrival: &Arrival) -> Vec<Lawful> {
    let fates = case.state.fates(Hook::Xdp, &arrival.packet);
    let follow = |fate| {
        let (key, direction) = match fate {
            None if is_ours(case.tables, arrival.packet.dst()) => {
                return Err(Reason::FragmentOrphan.into());
            }
            None | Some(Fate::Passed) => return Err(Reason::Fragment.into()),
            Some(Fate::Ended) => return Err(Reason::FragmentOrphan.into()),
            Some(Fate::Echo) => {
                let Origin { reply, tags, .. } = origin(case, arrival);
                let outcome = icmp::later_at_uplink(case, arrival, (reply, tags))?;
                return Ok(vec![(outcome, case.state.clone())]);
            }
            Some(Fate::Request(key)) => (key, Direction::Forward),
            Some(Fate::Reply(key)) => (key, Direction::Reply),
        };
        at_uplink_of(case, arrival, key, direction)
    };
    fates.into_iter().flat_map(|fate| follow(fate).unwrap_or_else(|stop| case.stop(stop))).collect()
}

fn at_uplink_of(
    case: &Case<'_>,
    arrival: &Arrival,
    key: Tuple,
    direction: Direction,
) -> Result<Vec<Lawful>, Stop> {
    let mut state = case.state.clone();
    let connection = state.connections.get_mut(&key).expect("the connection is there");
    let service = connection.service;
    let stop = |reason| Stop { reason, service };
    match direction {
        Direction::Forward => check_client(connection, arrival.tunnel).map_err(stop)?,
        Direction::Reply => check_way(connection, arrival.tunnel).map_err(stop)?,
    }
    let mut packet = arrival.packet.clone();
    let [forward_port, reply_port] = &mut connection.outer_ports;
    let (exit, outer_port, tags) = match direction {
        Direction::Forward => {
            packet.readdress(connection.source, connection.backend.0);
            (connection.forward, forward_port, &[][..])
        }
        Direction::Reply => {
            let Tuple { src: client, dst: vip, .. } = connection.request;
            packet.readdress(vip.0, client.0);
            (connection.reply, reply_port, &connection.reply_tags[..])
        }
    };
    let departure = leave(case, arrival, packet, exit, outer_port, tags).map_err(stop)?;
    let reason = reason(arrival, connection, direction);
    let account = flow(connection, direction, false);
    Ok(vec![(outcome(departure, reason, account), state)])
}

/// What is lawful for a later fragment at TC.
pub fn at_tc(case: &Case<'_>, hook: Hook, packet: &Packet) -> Vec<Lawful> {
    let from_pod = hook == Hook::TcIngress;
    let pod = case.tables.pods.get(&packet.src());
    if from_pod && pod.is_none_or(|pod| pod.ifindex != case.ifindex) {
        return case.stop(Reason::Fragment);
    }
    let dst = packet.dst();
    let orphan = from_pod && (case.tables.is_vip(dst) || case.tables.is_borrowed(dst));
    let follow = |fate| -> Result<Outcome, Stop> {
        match fate {
            None if orphan => Err(Reason::FragmentOrphan.into()),
            None | Some(Fate::Passed) => Err(Reason::Fragment.into()),
            Some(Fate::Ended) => Err(Reason::FragmentOrphan.into()),
            Some(Fate::Echo) => Ok(icmp::later_at_pod(case, packet.clone())),
            Some(Fate::Request(key)) => {
                let connection = &case.state.connections[&key];
                request(case, connection, packet.clone())
            }
            Some(Fate::Reply(key)) => {
                let connection = &case.state.connections[&key];
                reply(case, from_pod, connection, packet.clone())
            }
        }
    };
    let fates = case.state.fates(hook, packet);
    let lawful = |fate| match follow(fate) {
        Ok(outcome) => vec![(outcome, case.state.clone())],
        Err(stop) => case.stop(stop),
    };
    fates.into_iter().flat_map(lawful).collect()
}

fn request(case: &Case<'_>, connection: &Connection, mut packet: Packet) -> Result<Outcome, Stop> {
    let mut action = Action::Pass;
    if connection.hairpin {
        turn_back(connection, &mut packet)?;
        action = Action::Redirect(case.ifindex);
    }
    packet.readdress(connection.source, connection.backend.0);
    let remote = connection.forward.is_remote();
    let reason = if remote { Reason::DnatRemote } else { Reason::DnatLocal };
    Ok(sent(action, reason, &packet, connection, Direction::Forward))
}

fn reply(
    case: &Case<'_>,
    from_pod: bool,
    connection: &Connection,
    mut packet: Packet,
) -> Result<Outcome, Stop> {
    let mut action = Action::Pass;
    if connection.hairpin {
        turn_back(connection, &mut packet)?;
        action = Action::Redirect(case.ifindex);
    } else if from_pod {
        let way = way_past_the_stack(case, connection, &packet);
        let (ifindex, dst, src) = way.ok_or(Reason::Fragment)?;
        packet.take_hop();
        (packet.eth.dst, packet.eth.src) = (dst, src);
        action = Action::Redirect(ifindex);
    }
    let Tuple { src: client, dst: vip, .. } = connection.request;
    packet.readdress(vip.0, client.0);
    Ok(sent(action, Reason::ReplyLocal, &packet, connection, Direction::Reply))
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
