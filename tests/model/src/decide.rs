//! The first packet of a connection: which backend, which way, which source.

use sluice_abi::{
    Addr, Backend, Delivery, Extent, Family, Frontend, FrontendKey, IPPROTO_TCP, Mac, Reason,
    Route, frontend_flags,
};

use crate::packet::{Tag, Transport, tcp};
use crate::road::{Case, Stop, seen_source_port};
use crate::state::{ChoiceKey, Connection, Exit, State, Tuple};
use crate::tcp::{Progress, is_attempt};

/// Who asks.
#[derive(Clone)]
pub struct Origin {
    /// VTEP index of the tunnel, 0 for none.
    pub tunnel: u32,
    /// Where replies leave.
    pub reply: Exit,
    /// VLAN tags that replies are to carry.
    pub tags: Vec<Tag>,
    /// A pod of this node, at its own interface. Its address is routed here from everywhere, so
    /// its source is kept; anybody else's backends on other nodes must answer to us.
    pub own_pod: bool,
    /// Destination of the outermost frame, at an uplink.
    pub for_mac: Option<Mac>,
}

impl Origin {
    /// Clients inside the cluster have backends of their own (internalTrafficPolicy).
    fn in_cluster(&self) -> bool {
        self.own_pod || self.tunnel != 0
    }
}

/// Every lawful decision: the state with the new connection in it, or why there is none.
pub type Decisions = Vec<(State, Result<(), Stop>)>;

/// Decides the first packet of a connection.
pub fn decide(
    case: &Case<'_>,
    state: &State,
    request: Tuple,
    first: &Transport,
    origin: &Origin,
) -> Decisions {
    let stop = |reason, service| vec![(state.clone(), Err(Stop { reason, service }))];
    let key = FrontendKey {
        addr: request.dst.0,
        port: sluice_abi::Be16::new(request.dst.1),
        proto: request.proto,
        reserved: 0,
    };
    let Some(frontend) = case.tables.frontends.get(&key) else {
        return stop(nobody(case, request, origin), 0);
    };
    if case.tables.is_fail_safe(&key) {
        return stop(Reason::FailSafe, 0);
    }
    if is_for_another(case, origin) {
        return stop(Reason::OtherHost, 0);
    }
    let service = frontend.service;
    match admit(case, frontend, request, first.flags, origin) {
        Err(reason) => stop(reason, service),
        Ok(extent) => choose(case, state, frontend, extent, request)
            .into_iter()
            .flat_map(|(state, backend)| match backend {
                Some((id, backend)) => {
                    let connection = Connection {
                        request,
                        service,
                        backend_id: id,
                        backend: (backend.addr, backend.port.host()),
                        source: request.src.0,
                        source_port: None,
                        rewritten: false,
                        hairpin: false,
                        tunnel: origin.tunnel,
                        forward: Exit::Stack,
                        reply: origin.reply,
                        reply_tags: origin.tags.clone(),
                        epoch: case.tables.settings.epoch,
                        progress: Progress::new(first),
                        outer_ports: [None; 2],
                    };
                    connect(case, state, connection, &backend, origin)
                }
                None => {
                    let stop = Stop { reason: Reason::TableBroken, service };
                    vec![(state, Err(stop))]
                }
            })
            .collect(),
    }
}

/// Whether the frame is another machine's.
fn is_for_another(case: &Case<'_>, origin: &Origin) -> bool {
    origin.for_mac.is_some_and(|mac| !case.tables.is_own_mac(case.ifindex, mac))
}

/// Why a packet to no Service stops. An address that is Services' alone has no other listener: where
/// we are the proxy, its other ports are closed.
fn nobody(case: &Case<'_>, request: Tuple, origin: &Origin) -> Reason {
    let vip = case.tables.frontends.contains_key(&FrontendKey::address(request.dst.0));
    if !case.tables.replace() || !vip {
        Reason::NoService
    } else if is_for_another(case, origin) {
        Reason::OtherHost
    } else if is_forged(case, request, origin) {
        Reason::Martian
    } else {
        Reason::ClosedPort
    }
}

/// Who is known by his interface is not forged; from a wire nobody speaks in our pods' names.
fn is_forged(case: &Case<'_>, request: Tuple, origin: &Origin) -> bool {
    let ours = |addr| case.tables.pods.contains_key(&addr) || case.tables.is_borrowed(addr);
    !origin.own_pod && ours(request.src.0) || is_martian(request.src.0, request.dst.0)
}

/// Whether a packet may begin a connection, and between which backends it chooses.
fn admit(
    case: &Case<'_>,
    frontend: &Frontend,
    request: Tuple,
    flags: u8,
    origin: &Origin,
) -> Result<Extent, Reason> {
    if is_forged(case, request, origin) {
        return Err(Reason::Martian);
    }
    if request.proto == IPPROTO_TCP && !may_begin(flags, case.tables.replace()) {
        return Err(Reason::MidFlow);
    }
    let (extent, local) = if origin.in_cluster() {
        (frontend.internal, frontend_flags::INTERNAL_LOCAL)
    } else {
        (frontend.external, frontend_flags::EXTERNAL_LOCAL)
    };
    match (extent.size, case.tables.replace(), frontend.flags & local != 0) {
        (0, false, _) => Err(Reason::NoEndpointPassed),
        // Endpoints exist, but not here: dropped. None anywhere: refused (kube-proxy's rules).
        (0, true, true) => Err(Reason::LocalPolicy),
        (0, true, false) => Err(Reason::NoEndpoint),
        _ => Ok(extent),
    }
}

/// Sources that no wire may carry (RFC 1122 section 3.2.1.3, RFC 1112 section 7.2, RFC 4291
/// sections 2.5.2, 2.5.3 and 2.7), and a packet from an address to itself.
pub fn is_martian(src: Addr, dst: Addr) -> bool {
    src == dst
        || match src.to_ip() {
            std::net::IpAddr::V4(ip) => {
                ip.octets()[0] == 0 || ip.is_loopback() || ip.octets()[0] >= 224
            }
            std::net::IpAddr::V6(ip) => {
                ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()
            }
        }
}

/// Whether a TCP packet may begin a connection. Beside a kube-proxy only a plain SYN: the kernel
/// knows the connections that were there before us. Alone: whatever may belong to one that the
/// backend knows.
fn may_begin(flags: u8, replace: bool) -> bool {
    match flags & tcp::ALL {
        0 => false,
        f if f & tcp::RST != 0 => false,
        f if f & tcp::SYN != 0 => f & (tcp::FIN | tcp::ACK) == 0,
        _ => replace,
    }
}

/// The backends that may be chosen, each with the state that remembers the choice.
fn choose(
    case: &Case<'_>,
    state: &State,
    frontend: &Frontend,
    extent: Extent,
    request: Tuple,
) -> Vec<(State, Option<(u32, Backend)>)> {
    let backends = case.tables.backends_of(extent);
    let key = ChoiceKey {
        among: backends.iter().map(|b| b.map_or(0, |(id, _)| id)).collect(),
        request: match frontend.affinity_seconds {
            0 => Ok(request),
            _ => Err((frontend.service, request.src.0)),
        },
    };
    let known = state.choices.get(&key);
    let lawful = backends.into_iter().filter(|backend| match (known, backend) {
        (Some(known), backend) => *known == backend.map_or(0, |(id, _)| id),
        (None, _) => true,
    });
    let remember = |backend: Option<(u32, Backend)>| {
        let mut state = state.clone();
        state.choices.insert(key.clone(), backend.map_or(0, |(id, _)| id));
        (state, backend)
    };
    lawful.map(remember).collect()
}

/// The connection to a backend: its way, and the source that the backend sees.
fn connect(
    case: &Case<'_>,
    state: State,
    connection: Connection,
    backend: &Backend,
    origin: &Origin,
) -> Decisions {
    let stop = |reason| Err(Stop { reason, service: connection.service });
    let request = connection.request;
    let Some(forward) = exit_to(case, backend, origin) else {
        return vec![(state, stop(Reason::TableBroken))];
    };
    let rewritten = forward.is_remote() && !origin.own_pod;
    // A pod would meet its own address as the source, which its stack does not take.
    let hairpin = !rewritten && request.src.0 == backend.addr;
    let source = if rewritten {
        our_source(case, forward, request).ok_or(Reason::TableBroken)
    } else if hairpin {
        nobodys_source(case, request).filter(|_| origin.own_pod).ok_or(Reason::Hairpin)
    } else {
        Ok(request.src.0)
    };
    let source = match source {
        Ok(source) => source,
        Err(reason) => return vec![(state, stop(reason))],
    };
    let connection = Connection { source, rewritten, hairpin, forward, ..connection };
    let ports = if rewritten {
        our_ports(case, &state, &connection)
    } else {
        kept_ports(&state, &connection)
    };
    let with = |port: Result<Option<u16>, Reason>| {
        let mut state = state.clone();
        let answer = match port {
            Ok(source_port) => {
                let connection = Connection { source_port, ..connection.clone() };
                state.connections.insert(request, connection);
                Ok(())
            }
            Err(reason) => stop(reason),
        };
        (state, answer)
    };
    ports.into_iter().map(with).collect()
}

/// Our own port, which the datapath chooses: from the range, and not in use towards that backend.
fn our_ports(
    case: &Case<'_>,
    state: &State,
    connection: &Connection,
) -> Vec<Result<Option<u16>, Reason>> {
    let settings = &case.tables.settings;
    let range = settings.snat_first_port..=settings.snat_last_port;
    let free = |port: u16| {
        let connection = Connection { source_port: Some(port), ..connection.clone() };
        connection.reply_tuple().is_some_and(|reply| !state.is_taken(&reply))
    };
    let seen = seen_source_port(case.seen, connection.forward);
    let seen = seen.filter(|port| range.contains(port) && free(*port));
    let used = || state.connections.values().filter(|c| c.rewritten);
    let same = |c: &&Connection| {
        (c.request.proto, c.backend) == (connection.request.proto, connection.backend)
    };
    let mut answers = Vec::new();
    if used().filter(same).count() < range.len() {
        answers.push(Ok(seen));
    }
    // Ports are tried at random, and backends whose hash is the same share them: from half use
    // on a free one may be missed.
    if used().count() * 2 >= range.len() {
        answers.push(Err(Reason::SnatExhausted));
    }
    answers
}

/// The client's own port. Where another connection of it has that port towards the same backend
/// (through another VIP), another one in which only the first two bits differ.
fn kept_ports(state: &State, connection: &Connection) -> Vec<Result<Option<u16>, Reason>> {
    let port = connection.request.src.1;
    let free = |port: u16| {
        let connection = Connection { source_port: Some(port), ..connection.clone() };
        port != 0 && connection.reply_tuple().is_some_and(|reply| !state.is_taken(&reply))
    };
    if free(port) {
        return vec![Ok(Some(port))];
    }
    let others: Vec<_> =
        (1..4u16).map(|top| port ^ top << 14).filter(|p| free(*p)).map(|p| Ok(Some(p))).collect();
    if others.is_empty() { vec![Err(Reason::FlowTableFull)] } else { others }
}

/// Our own address towards a backend on another node: inside our own pod CIDR for a tunnel, the
/// node's on a plain route.
fn our_source(case: &Case<'_>, forward: Exit, request: Tuple) -> Option<Addr> {
    let settings = &case.tables.settings;
    let (v4, v6) = match forward {
        Exit::Tunnel(vtep) => {
            let tunnel = case.tables.tunnel_of(vtep)?;
            (tunnel.addr_v4, tunnel.addr_v6)
        }
        _ => (settings.node_v4, settings.node_v6),
    };
    let source = match request.dst.0.family() {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    (!source.is_none()).then_some(source)
}

/// The address that a pod which asks itself is asked from.
fn nobodys_source(case: &Case<'_>, request: Tuple) -> Option<Addr> {
    let settings = &case.tables.settings;
    let source = match request.dst.0.family() {
        Family::V4 => settings.hairpin_v4,
        Family::V6 => settings.hairpin_v6,
    };
    (!source.is_none()).then_some(source)
}

/// The way to a backend.
fn exit_to(case: &Case<'_>, backend: &Backend, origin: &Origin) -> Option<Exit> {
    const LOCAL: u16 = Route::Local as u16;
    const TUNNEL: u16 = Route::Tunnel as u16;
    const PLAIN: u16 = Route::Plain as u16;
    match backend.route {
        LOCAL => Some(match case.tables.pods.get(&backend.addr) {
            // Tagged requests go through the stack, and so do their replies: it knows the VLAN.
            Some(pod) if pod.delivery == Delivery::Redirect as u16 && origin.tags.is_empty() => {
                Exit::Frame { ifindex: pod.ifindex, dst: pod.pod_mac, src: pod.host_mac }
            }
            _ => Exit::Stack,
        }),
        TUNNEL => Some(Exit::Tunnel(backend.index)),
        PLAIN => Some(Exit::NextHop(backend.index)),
        _ => None,
    }
}

/// A decision that has become old is taken anew: the ways out, with the backend that it has. One
/// that is gone from the tables keeps its way (TCP connections live on, kube-proxy's rule), and
/// what its source is does not change.
pub fn renew(case: &Case<'_>, connection: &mut Connection, origin: &Origin) {
    let forward = backend_of(case, connection).and_then(|backend| exit_to(case, backend, origin));
    let same_source = |exit: &Exit| (exit.is_remote() && !origin.own_pod) == connection.rewritten;
    if let Some(forward) = forward.filter(same_source) {
        connection.forward = forward;
    }
    connection.reply = origin.reply;
    connection.reply_tags = origin.tags.clone();
    connection.epoch = case.tables.settings.epoch;
}

/// The entry of a connection's backend, while the tables have it.
fn backend_of<'c>(case: &Case<'c>, connection: &Connection) -> Option<&'c Backend> {
    let backend = case.tables.backends.get(&connection.backend_id);
    backend.filter(|b| (b.addr, b.port.host()) == connection.backend)
}

/// Whether a packet begins another connection on the tuple of one (RFC 9293 section 3.6.1): a SYN
/// when the old one is over, or when its backend is gone and the two never agreed.
pub fn begins_anew(case: &Case<'_>, connection: &Connection, flags: u8) -> bool {
    let progress = connection.progress;
    let lost = || !progress.is_agreed() && backend_of(case, connection).is_none();
    is_attempt(flags) && (progress.is_over() || lost())
}
