//! The first packet of a flow is decided here: frontend, policy, backend, way out. The answer is
//! compiled into one [`FlowRecord`]; every later packet replays it.

use crate::access::{At, View};
use crate::csum::{Sum, negate};
use crate::env::Env;
use crate::field;
use crate::flood;
use crate::flow::{self, Found, Inserted, Tuple};
use crate::hash;
use crate::parse::{self, Ip, Transport};
use crate::replay;
use crate::verdict::{Step, Stop};
use crate::wire::{Ethernet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use sluice_abi::{
    Addr, Ask, Backend, Be16, Delivery, Exit, ExitKind, Extent, Family, FlowRecord, Frontend,
    FrontendKey, IPPROTO_TCP, MAX_OWN_MACS, Mac, OwnMac, Pod, Reason, Route, Scratch, Seeds,
    Settings, SnatSlot, Timeouts, Tunnel, Vtep, frontend_flags, maps, record_flags, settings_flags,
};

macro_rules! put {
    ($record:expr, $field:ident, $value:expr) => {
        field!($record, FlowRecord, $field).set($value)
    };
}

/// Where a request came from.
#[derive(Clone, Copy)]
pub struct Origin<'f> {
    /// VTEP index of the tunnel, 0 for a plain packet.
    pub tunnel: u32,
    /// The client is a pod or a node of the cluster.
    pub in_cluster: bool,
    /// The backend on another node answers to us, so the source is rewritten. Not for pods of this
    /// node, whose address is routed here anyway.
    pub snat: bool,
    /// Interface on which a plain packet came in, 0 if replies are the kernel's to route.
    pub ifindex: u32,
    /// Uplink on which the frame came in, 0 at TC.
    pub uplink: u32,
    /// The packet's outermost Ethernet header.
    pub eth: At<'f, Ethernet>,
    /// The frame.
    pub frame: View<'f>,
    /// Bytes of the frame's VLAN tags that replies are to carry.
    pub tags: u32,
}

impl Origin<'_> {
    /// Where replies leave: the way the request came.
    #[inline(always)]
    pub(crate) fn reply(&self, draft: At<'_, FlowRecord>) {
        let exit = field!(draft, FlowRecord, reply);
        let kind = if self.tunnel != 0 {
            ExitKind::Tunnel
        } else if self.ifindex != 0 {
            ExitKind::Frame
        } else {
            ExitKind::Stack
        };
        field!(exit, Exit, kind).set(kind as u8);
        let index = if self.tunnel != 0 { self.tunnel } else { self.ifindex };
        field!(exit, Exit, index).set(index);
        field!(exit, Exit, dst_mac).copy_from(field!(self.eth, Ethernet, src));
        field!(exit, Exit, src_mac).copy_from(field!(self.eth, Ethernet, dst));
        let tags = field!(draft, FlowRecord, reply_tags);
        for i in 0..2 {
            tags.element(i).set(parse::tag(self.frame, self.tags, i));
        }
    }
}

/// A decided flow.
#[derive(Clone, Copy)]
pub struct Decided<'a> {
    /// Its record.
    pub found: Found<'a>,
    /// Whether this packet began it.
    pub new: bool,
}

/// The answer to a question in the scratch room, in one word: what a function of the kernel's
/// programs may return.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer(pub u64);

impl Answer {
    const DECIDED: u64 = 1 << 62;
    const NEW: u64 = 1 << 61;

    /// A record in the table; its place as in [`SnatSlot::owned`].
    #[inline(always)]
    pub const fn decided(slot: SnatSlot, new: bool) -> Self {
        Self(slot.0 & 0xff_ffff_ffff | Self::DECIDED | if new { Self::NEW } else { 0 })
    }

    /// No record, and why.
    #[inline(always)]
    pub const fn stopped(reason: Reason) -> Self {
        Self(reason as u64)
    }
}

/// Puts a packet's five-tuple into the draft, where everything that asks for it reads it.
#[inline(always)]
pub fn stash(scratch: At<'_, Scratch>, ip: &Ip<'_>, transport: &Transport<'_>) {
    let draft = field!(scratch, Scratch, draft);
    put!(draft, client, ip.l3.src());
    put!(draft, vip, ip.l3.dst());
    put!(draft, client_port, transport.src);
    put!(draft, vip_port, transport.dst);
    put!(draft, proto, ip.proto);
    field!(scratch, Scratch, seq).set(transport.seq);
    field!(scratch, Scratch, ack).set(transport.ack);
}

/// Puts a five-tuple that is not the packet's own there.
#[inline(always)]
pub fn stash_tuple(scratch: At<'_, Scratch>, tuple: &Tuple) {
    let draft = field!(scratch, Scratch, draft);
    put!(draft, client, tuple.src);
    put!(draft, vip, tuple.dst);
    put!(draft, client_port, tuple.src_port);
    put!(draft, vip_port, tuple.dst_port);
    put!(draft, proto, tuple.proto);
}

/// The stashed five-tuple.
#[inline(always)]
pub fn stashed(scratch: At<'_, Scratch>) -> Tuple {
    Tuple::of_request(field!(scratch, Scratch, draft))
}

/// Decides the stashed request, which has no record, and writes one (`renew` none); or decides its
/// record anew.
///
/// # Errors
/// `NoService`, `FailSafe`, `OtherHost`, `MidFlow`, `NoEndpointPassed`, `Hairpin`, `TableBroken` (pass); `Martian`,
/// `NoEndpoint`, `ClosedPort`, `LocalPolicy`, `SnatExhausted`, `FlowTableFull` (drop).
#[inline(always)]
pub fn ask<'a, E: Env>(
    env: &'a E,
    scratch: At<'a, Scratch>,
    tcp_flags: u8,
    origin: &Origin<'_>,
    renew: Option<Found<'a>>,
) -> Step<Decided<'a>> {
    let draft = field!(scratch, Scratch, draft);
    put!(draft, tunnel, origin.tunnel);
    put!(draft, service, 0);
    origin.reply(draft);
    field!(scratch, Scratch, ask).set(Ask {
        renew: renew.map_or(SnatSlot::FREE, |found| found.slot),
        tcp_flags: tcp_flags as u32,
        in_cluster: origin.in_cluster as u32,
        snat: origin.snat as u32,
        tagged: (origin.tags != 0) as u32,
        uplink: origin.uplink,
        reserved: 0,
    });
    let answer = env.decide();
    let service = field!(draft, FlowRecord, service).get();
    if answer.0 & Answer::DECIDED == 0 {
        return Err(Stop { reason: Reason::from_number(answer.0 as u32), service });
    }
    let slot = SnatSlot(answer.0 & 0xff_ffff_ffff | 1 << 63);
    let changed = Stop { reason: Reason::FlowChanged, service };
    let (index, way) = slot.owner().ok_or(changed)?;
    let found = flow::at(env, index, way).ok_or(changed)?;
    if !flow::is_request(found.record, &stashed(scratch)) {
        return Err(changed);
    }
    Ok(Decided { found, new: answer.0 & Answer::NEW != 0 })
}

/// Answers the question in the scratch room. In the kernel this is a function of its own: the
/// verifier follows it once, not once for each way on which a packet gets there.
///
/// # Cost
/// One or two hash lookups (frontend, local pod), array lookups, one locked write; while the flood guard
/// is on, no lock.
#[inline(always)]
pub fn answer<E: Env>(env: &E) -> Answer {
    let (Some(settings), Some(scratch)) = (env.settings(), env.scratch()) else {
        return Answer::stopped(Reason::TableBroken);
    };
    let ask = field!(scratch, Scratch, ask);
    let renews = field!(ask, Ask, renew).get().owner();
    let record = if let Some((index, way)) = renews {
        let Some(found) = flow::at(env, index, way) else {
            return Answer::stopped(Reason::FlowChanged);
        };
        Some(found)
    } else {
        match flood::known(env, settings, scratch) {
            Ok(found) => found,
            Err(reason) => return Answer::stopped(reason),
        }
    };
    if let Some(found) = record {
        if renews.is_some() || is_stale(env, settings, &found) {
            // Without a lock to be had the record stays as it is, which is not wrong yet.
            let _renewed = renew(env, settings, scratch, &found);
            return Answer::decided(found.slot, false);
        }
        return match flood::promote(env, settings, scratch, &found) {
            Ok(slot) => Answer::decided(slot, false),
            Err(reason) => Answer::stopped(reason),
        };
    }
    match decide(env, settings, scratch) {
        Ok(answer) => answer,
        Err(reason) => Answer::stopped(reason),
    }
}

#[inline(always)]
fn decide<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
) -> Result<Answer, Reason> {
    let draft = field!(scratch, Scratch, draft);
    let ask = field!(scratch, Scratch, ask);
    let key = FrontendKey {
        addr: field!(draft, FlowRecord, vip).get(),
        port: field!(draft, FlowRecord, vip_port).get(),
        proto: field!(draft, FlowRecord, proto).get(),
        reserved: 0,
    };
    let Some(frontend) = env.frontend(&key) else {
        return Err(nobody(env, settings, draft, ask, key.addr));
    };
    if is_fail_safe(settings, &key) {
        return Err(Reason::FailSafe);
    }
    if !is_asked_here(settings, draft, ask) {
        return Err(Reason::OtherHost);
    }
    put!(draft, service, field!(frontend, Frontend, service).get());
    let extent = admit(env, settings, frontend, draft, ask)?;
    begin(settings, scratch, env.now());
    choose_backend(env, settings, frontend, scratch, extent).ok_or(Reason::TableBroken)?;
    let client = field!(draft, FlowRecord, client).get();
    let port = field!(draft, FlowRecord, client_port).get();
    let place = flow::place(env, settings, client, port, key.proto).ok_or(Reason::TableBroken)?;
    if field!(ask, Ask, snat).get() != 0 && way_out(draft) >= ExitKind::Tunnel as u8 {
        rewrite_source(env, settings, draft)?;
    } else if client == field!(draft, FlowRecord, backend).get() {
        borrow_source(settings, draft, ask)?;
    }
    compile_checksums(draft);
    let claimed = field!(draft, FlowRecord, snat).get();
    let guarded = flood::put(env, settings, &place, scratch);
    if guarded == SnatSlot::CLAIMED {
        flow::give_back(env, claimed, SnatSlot::CLAIMED, SnatSlot::FREE);
        return Err(Reason::FlowChanged);
    }
    if guarded != SnatSlot::FREE {
        return Ok(Answer::decided(guarded, true));
    }
    flood::note_taken(env, settings, &place, scratch);
    let inserted = flow::insert(env, &place, scratch, SnatSlot::CLAIMED);
    match inserted {
        Inserted::New { slot, freed } => {
            flow::give_back(env, freed, slot, SnatSlot::FREE);
            Ok(Answer::decided(slot, true))
        }
        Inserted::Other(slot) => {
            flow::give_back(env, claimed, SnatSlot::CLAIMED, SnatSlot::FREE);
            Ok(Answer::decided(slot, false))
        }
        Inserted::Full => {
            flow::give_back(env, claimed, SnatSlot::CLAIMED, SnatSlot::FREE);
            Err(Reason::FlowTableFull)
        }
    }
}

/// Why a packet to no Service stops. An address that is Services' alone has no other listener, so in
/// mode `replace` its other ports are closed, and the sender is told so.
///
/// # Cost
/// In mode `replace` a hash lookup.
#[inline(always)]
fn nobody<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
    ask: At<'_, Ask>,
    addr: Addr,
) -> Reason {
    let replace = field!(settings, Settings, flags).get() & settings_flags::REPLACE != 0;
    if !replace || env.frontend(&FrontendKey::address(addr)).is_none() {
        Reason::NoService
    } else if !is_asked_here(settings, draft, ask) {
        Reason::OtherHost
    } else if is_forged(env, settings, draft, ask) {
        Reason::Martian
    } else {
        Reason::ClosedPort
    }
}

/// Whether the source cannot be what it says. A pod of this node does not speak to us over the wire:
/// its requests are decided at TC; nor does anybody with the address that pods' requests to
/// themselves come from.
#[inline(always)]
fn is_forged<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
    ask: At<'_, Ask>,
) -> bool {
    let wire = field!(ask, Ask, snat).get() != 0;
    let client = field!(draft, FlowRecord, client).get();
    is_martian(&Tuple::of_request(draft))
        || wire && (is_borrowed(settings, &client) || env.pod(&client).is_some())
}

/// Whether the packet may begin a flow to this frontend, and between which backends it chooses.
#[inline(always)]
fn admit<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    frontend: At<'_, Frontend>,
    draft: At<'_, FlowRecord>,
    ask: At<'_, Ask>,
) -> Result<Extent, Reason> {
    if is_forged(env, settings, draft, ask) {
        return Err(Reason::Martian);
    }
    let replace = field!(settings, Settings, flags).get() & settings_flags::REPLACE != 0;
    let tcp_flags = field!(ask, Ask, tcp_flags).get() as u8;
    let is_tcp = field!(draft, FlowRecord, proto).get() == IPPROTO_TCP;
    if is_tcp && !may_begin(tcp_flags, replace) {
        return Err(Reason::MidFlow);
    }
    usable_extent(frontend, field!(ask, Ask, in_cluster).get() != 0, replace)
}

/// No state yet, and the source as it is.
#[inline(always)]
fn begin(settings: At<'_, Settings>, scratch: At<'_, Scratch>, now: u32) {
    let draft = field!(scratch, Scratch, draft);
    let v6 = field!(draft, FlowRecord, vip).get().family() == Family::V6;
    let timeouts = field!(settings, Settings, timeouts);
    let proto = field!(draft, FlowRecord, proto).get();
    let reply = field!(draft, FlowRecord, reply);
    let from_pod = field!(reply, Exit, kind).get() == ExitKind::Stack as u8;
    let family = if v6 { record_flags::V6 } else { 0 };
    put!(draft, flags, family | if from_pod { record_flags::FROM_POD } else { 0 });
    put!(draft, epoch, field!(settings, Settings, epoch).get());
    put!(draft, source, field!(draft, FlowRecord, client).get());
    put!(draft, source_port, field!(draft, FlowRecord, client_port).get());
    put!(draft, snat, 0);
    put!(draft, state, 0);
    put!(draft, ack_forward, 0);
    put!(draft, ack_reply, field!(scratch, Scratch, seq).get().host());
    put!(draft, timeout, flow::timeout(timeouts, proto, 0));
    put!(draft, seen, now);
    put!(draft, decided, now);
    put!(draft, created, now);
}

/// Chooses the backend and the way to it.
#[inline(always)]
fn choose_backend<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    frontend: At<'_, Frontend>,
    scratch: At<'_, Scratch>,
    extent: Extent,
) -> Option<()> {
    let draft = field!(scratch, Scratch, draft);
    let seeds = field!(settings, Settings, seeds);
    let mut tuple = Tuple::of_request(draft);
    if field!(frontend, Frontend, affinity_seconds).get() != 0 {
        // Session affinity: the client's address alone chooses, whatever it connects to.
        (tuple.dst, tuple.dst_port, tuple.src_port) = (Addr::NONE, Be16::new(0), Be16::new(0));
    }
    let choice = hash::backend_choice(field!(seeds, Seeds, cluster).get(), &tuple);
    let index = extent.offset.wrapping_add(hash::scale(choice, extent.size));
    let backend_id = env.maglev(index)?.get();
    let backend = env.backend(backend_id)?;
    put!(draft, backend, field!(backend, Backend, addr).get());
    put!(draft, backend_port, field!(backend, Backend, port).get());
    put!(draft, backend_id, backend_id);
    forward_exit(env, backend, scratch).then_some(())
}

#[inline(always)]
fn way_out(draft: At<'_, FlowRecord>) -> u8 {
    field!(field!(draft, FlowRecord, forward), Exit, kind).get()
}

/// The backend is elsewhere: our own address and a port of ours become the source.
#[inline(always)]
fn rewrite_source<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
) -> Result<(), Reason> {
    let source = snat_source(env, settings, draft).ok_or(Reason::TableBroken)?;
    put!(draft, source, source);
    let seeds = field!(settings, Settings, seeds);
    let hash = hash::backend_choice(field!(seeds, Seeds, cluster).get(), &Tuple::of_request(draft));
    // The same hash chose the backend: the ports must not be walked in the order of the backends.
    let start = hash ^ 0x5bd1_e995;
    let claim = flow::claim_snat(env, settings, draft, start).ok_or(Reason::SnatExhausted)?;
    put!(draft, source_port, claim.port);
    put!(draft, snat, claim.index + 1);
    put!(draft, flags, field!(draft, FlowRecord, flags).get() | record_flags::SNAT);
    Ok(())
}

/// The backend is the client, a pod of this node. It would meet its own address as the source, which
/// no stack takes from outside; so it gets one that nobody has, and answers that.
///
/// # Errors
/// `Hairpin` (pass): there is no such address, or the packet came over a wire.
#[inline(always)]
fn borrow_source(
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
    ask: At<'_, Ask>,
) -> Result<(), Reason> {
    let flags = field!(draft, FlowRecord, flags).get();
    let source = if flags & record_flags::V6 != 0 {
        field!(settings, Settings, hairpin_v6)
    } else {
        field!(settings, Settings, hairpin_v4)
    };
    if source.get().is_none() || field!(ask, Ask, snat).get() != 0 {
        return Err(Reason::Hairpin);
    }
    field!(draft, FlowRecord, source).copy_from(source);
    put!(draft, flags, flags | record_flags::HAIRPIN);
    Ok(())
}

/// Whether an address is the one that stands for a pod which asks itself.
#[inline(always)]
pub fn is_borrowed(settings: At<'_, Settings>, addr: &Addr) -> bool {
    !addr.is_none()
        && (field!(settings, Settings, hairpin_v4).get() == *addr
            || field!(settings, Settings, hairpin_v6).get() == *addr)
}

/// Whether a record's epoch or age asks for a new decision.
#[inline(always)]
pub fn is_stale<E: Env>(env: &E, settings: At<'_, Settings>, found: &Found<'_>) -> bool {
    let r = found.record;
    let timeouts = field!(settings, Settings, timeouts);
    // The age is asked for when the stamp is old, because it stands in another cache line.
    field!(r, FlowRecord, epoch).get() != field!(settings, Settings, epoch).get()
        || is_stamp_old(env, settings, found)
            && env.now().wrapping_sub(field!(r, FlowRecord, decided).get())
                > field!(timeouts, Timeouts, redecide).get()
}

/// Whether a record's time stamp is to be renewed: then what stands in other cache lines is looked at,
/// too.
#[inline(always)]
pub fn is_stamp_old<E: Env>(env: &E, settings: At<'_, Settings>, found: &Found<'_>) -> bool {
    let timeouts = field!(settings, Settings, timeouts);
    let age = env.now().wrapping_sub(field!(found.record, FlowRecord, seen).get());
    age > field!(timeouts, Timeouts, stamp).get()
}

/// Decides a record anew: the ways out, with the backend that it has. A backend that is gone from
/// the tables keeps its old way: TCP connections live on, and the agent deletes the UDP ones.
#[inline(always)]
fn renew<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
    found: &Found<'_>,
) -> Option<()> {
    let r = found.record;
    let draft = field!(scratch, Scratch, draft);
    let ask = field!(scratch, Scratch, ask);
    let exit = field!(draft, FlowRecord, forward);
    exit.copy_from(field!(r, FlowRecord, forward));
    if let Some(backend) = env.backend(field!(r, FlowRecord, backend_id).get()) {
        let same = field!(backend, Backend, addr).get() == field!(r, FlowRecord, backend).get()
            && field!(backend, Backend, port).get() == field!(r, FlowRecord, backend_port).get();
        // A connection whose source is rewritten stays one, and the other way round.
        let snat = field!(r, FlowRecord, flags).get() & record_flags::SNAT != 0;
        let wire = field!(ask, Ask, snat).get() != 0;
        if same
            && (!forward_exit(env, backend, scratch)
                || (way_out(draft) >= ExitKind::Tunnel as u8 && wire) != snat)
        {
            exit.copy_from(field!(r, FlowRecord, forward));
        }
    }
    let now = env.now();
    let epoch = field!(settings, Settings, epoch).get();
    let tuple = stashed(scratch);
    let (set, _) = found.slot.owner()?;
    let lock = env.flow_lock(set % maps::FLOW_LOCKS)?;
    env.lock(lock);
    // The record may have ended, and another taken its place, since it was found.
    if found.is_still_there() && flow::is_request(r, &tuple) {
        field!(r, FlowRecord, forward).copy_from(exit);
        field!(r, FlowRecord, reply).copy_from(field!(draft, FlowRecord, reply));
        field!(r, FlowRecord, reply_tags).copy_from(field!(draft, FlowRecord, reply_tags));
        field!(r, FlowRecord, decided).set(now);
        field!(r, FlowRecord, epoch).set(epoch);
    }
    env.unlock(lock);
    Some(())
}

/// Whether a TCP packet without a record may begin one. `accelerate`: only a plain SYN, because
/// the kernel knows the connections that were there before us. `replace`: any packet but RST and
/// senseless flag combinations, and consistent hashing finds the backend that it had.
#[inline(always)]
fn may_begin(flags: u8, replace: bool) -> bool {
    let syn = flags & TCP_SYN != 0;
    if flags & TCP_RST != 0 || syn && flags & (TCP_FIN | TCP_ACK) != 0 || flags & 0x3f == 0 {
        return false;
    }
    syn || replace
}

#[inline(always)]
fn usable_extent(
    frontend: At<'_, Frontend>,
    in_cluster: bool,
    replace: bool,
) -> Result<Extent, Reason> {
    let (extent, local) = if in_cluster {
        (field!(frontend, Frontend, internal).get(), frontend_flags::INTERNAL_LOCAL)
    } else {
        (field!(frontend, Frontend, external).get(), frontend_flags::EXTERNAL_LOCAL)
    };
    if extent.size != 0 {
        return Ok(extent);
    }
    Err(if !replace {
        Reason::NoEndpointPassed
    } else if field!(frontend, Frontend, flags).get() & local != 0 {
        Reason::LocalPolicy
    } else {
        Reason::NoEndpoint
    })
}

/// Fail-safe ports of this node's own addresses are never captured, whatever the tables say.
#[inline(always)]
fn is_fail_safe(settings: At<'_, Settings>, key: &FrontendKey) -> bool {
    if key.addr != field!(settings, Settings, node_v4).get()
        && key.addr != field!(settings, Settings, node_v6).get()
    {
        return false;
    }
    let ports = if key.proto == IPPROTO_TCP {
        field!(settings, Settings, fail_safe_tcp)
    } else {
        field!(settings, Settings, fail_safe_udp)
    };
    for i in 0..8 {
        let port = ports.element(i).get();
        if port == key.port && port != Be16::new(0) {
            return true;
        }
    }
    false
}

/// Whether the asking frame is for this node.
#[inline(always)]
fn is_asked_here(settings: At<'_, Settings>, draft: At<'_, FlowRecord>, ask: At<'_, Ask>) -> bool {
    let reply = field!(draft, FlowRecord, reply);
    is_for_us(settings, field!(ask, Ask, uplink).get(), field!(reply, Exit, src_mac).get())
}

/// Whether a frame with this destination is for this node. A switch that has forgotten where a MAC
/// is sends its frames to everybody; the kernel drops them, and they must begin no connection here.
#[inline(always)]
pub(crate) fn is_for_us(settings: At<'_, Settings>, uplink: u32, dst: Mac) -> bool {
    let macs = field!(settings, Settings, own_macs);
    let mut named = false;
    for i in 0..MAX_OWN_MACS as u32 {
        let own = macs.element(i);
        if field!(own, OwnMac, ifindex).get() == uplink {
            let mac = field!(own, OwnMac, mac).get();
            if mac == dst || mac.is_zero() {
                return true;
            }
            named = true;
        }
    }
    !named
}

/// Sources that no wire may carry (RFC 1122 3.2.1.3, RFC 4291 2.5 and 2.7), and packets from a
/// VIP to itself ("land").
#[inline(always)]
pub(crate) fn is_martian(tuple: &Tuple) -> bool {
    if tuple.src == tuple.dst {
        return true;
    }
    match tuple.src.family() {
        Family::V4 => matches!(tuple.src.v4_bytes()[0], 0 | 127 | 224..),
        Family::V6 => {
            let w = tuple.src.words64();
            tuple.src.0[0] == 0xff || w[0] == 0 && (w[1] == 0 || w[1] == u64::from_be(1))
        }
    }
}

/// Writes the draft's way to a backend; false if the tables do not say one.
#[inline(always)]
fn forward_exit<E: Env>(env: &E, backend: At<'_, Backend>, scratch: At<'_, Scratch>) -> bool {
    let exit = field!(field!(scratch, Scratch, draft), FlowRecord, forward);
    let route = field!(backend, Backend, route).get();
    let kind = if route == Route::Local as u16 {
        // Tagged requests go through the stack, and so do their replies: it knows the VLAN.
        let tagged = field!(field!(scratch, Scratch, ask), Ask, tagged).get() != 0;
        let pod = env.pod(&field!(backend, Backend, addr).get());
        return local_exit(if tagged { None } else { pod }, exit);
    } else if route == Route::Tunnel as u16 {
        ExitKind::Tunnel
    } else if route == Route::Plain as u16 {
        ExitKind::NextHop
    } else {
        return false;
    };
    field!(exit, Exit, kind).set(kind as u8);
    field!(exit, Exit, index).set(field!(backend, Backend, index).get());
    true
}

/// The way to a backend of this node: its pod's veth, if frames can be put there, else the kernel.
#[inline(always)]
fn local_exit(pod: Option<At<'_, Pod>>, exit: At<'_, Exit>) -> bool {
    field!(exit, Exit, kind).set(ExitKind::Stack as u8);
    if let Some(pod) = pod
        && field!(pod, Pod, delivery).get() != Delivery::Stack as u16
    {
        field!(exit, Exit, kind).set(ExitKind::Frame as u8);
        field!(exit, Exit, index).set(replay::pod_index(pod));
        field!(exit, Exit, dst_mac).copy_from(field!(pod, Pod, pod_mac));
        field!(exit, Exit, src_mac).copy_from(field!(pod, Pod, host_mac));
    }
    true
}

/// Our source address towards a backend on another node (the law of the SNAT source): the tunnel
/// address inside our own pod CIDR, the node's address on plain routes.
#[inline(always)]
fn snat_source<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
) -> Option<Addr> {
    let v6 = field!(draft, FlowRecord, flags).get() & record_flags::V6 != 0;
    let addr = if way_out(draft) == ExitKind::Tunnel as u8 {
        let exit = field!(draft, FlowRecord, forward);
        let vtep = env.vtep(field!(exit, Exit, index).get())?;
        let tunnel = env.tunnel(field!(vtep, Vtep, tunnel).get())?;
        if v6 { field!(tunnel, Tunnel, addr_v6) } else { field!(tunnel, Tunnel, addr_v4) }
    } else if v6 {
        field!(settings, Settings, node_v6)
    } else {
        field!(settings, Settings, node_v4)
    }
    .get();
    (!addr.is_none()).then_some(addr)
}

/// RFC 1624: what the rewritten words add to the sums: the addresses, and everything.
#[inline(always)]
fn compile_checksums(draft: At<'_, FlowRecord>) {
    let v4 = field!(draft, FlowRecord, flags).get() & record_flags::V6 == 0;
    let addresses = Sum::default()
        .sub_addr(field!(draft, FlowRecord, client).get(), v4)
        .add_addr(field!(draft, FlowRecord, source).get(), v4)
        .sub_addr(field!(draft, FlowRecord, vip).get(), v4)
        .add_addr(field!(draft, FlowRecord, backend).get(), v4)
        .fold();
    let transport = Sum(addresses as u64)
        .sub16(field!(draft, FlowRecord, client_port).get().raw())
        .add16(field!(draft, FlowRecord, source_port).get().raw())
        .sub16(field!(draft, FlowRecord, vip_port).get().raw())
        .add16(field!(draft, FlowRecord, backend_port).get().raw())
        .fold();
    put!(draft, ip_delta, addresses);
    put!(draft, l4_delta, transport);
}

/// What the ports alone add: the transport delta without the addresses.
#[inline(always)]
pub fn port_delta(l4_delta: u16, ip_delta: u16) -> u16 {
    Sum(l4_delta as u64).add16(negate(ip_delta)).fold()
}
