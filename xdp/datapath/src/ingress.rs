//! Ingress of an uplink, at XDP or at TC: the whole way of a packet on one page.
//!
//! At TC the packet is the kernel's: its checksums are updated by the kernel's helper, segments that
//! were merged on arrival stay merged, and what XDP marks is handed over at once. The same runs at the
//! kernel's vxlan devices, on what the kernel has decapsulated and nobody here has seen.

use crate::access::{At, Frame, View, opaque};
use crate::account::account;
use crate::answer;
use crate::decide::{self, Decided, Origin};
use crate::env::Env;
use crate::field;
use crate::flood;
use crate::flow::{self, Found};
use crate::fragment;
use crate::hash::FlowHash;
use crate::icmp;
use crate::near;
use crate::parse::{self, Form, Ip, Link, Transport};
use crate::replay::{self, Departure, Door, Located, Rewrite, Sums, Way};
use crate::verdict::{Action, Direction, Owner, Step, Stop, Verdict};
use crate::wire::{
    ECN_CE, ECN_ECT_0, ECN_ECT_1, ECN_NOT_ECT, Ethernet, FLAG_VNI, Udp, VNI_MASK, Vxlan,
};
use sluice_abi::{
    Be16, Be32, Delivery, Exit, ExitKind, FlowRecord, Hook, IPPROTO_UDP, Lane, MAX_TUNNELS, Pod,
    Reason, Scratch, Seeds, Settings, SnatSlot, Tunnel, VerdictKind, Vtep, VtepKey, fragment_fate,
    record_flags, settings_flags,
};

/// Ethernet, UDP and VXLAN headers: the outer headers without the IP header.
const OUTER_OVERHEAD: usize = size_of::<Ethernet>() + size_of::<Udp>() + size_of::<Vxlan>();

/// Decides and handles one frame, and counts it, unless another lane's program does.
#[inline(always)]
pub fn xdp<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    let bytes = frame.view().len() as u64;
    if P::GENERAL {
        fragment::clear(env);
    }
    let (verdict, word) = match way::<P, E, F>(env, frame) {
        Ok(verdict) => (verdict, verdict.action.word()),
        Err(stop) => {
            if P::GENERAL && !P::LATER && stop.reason.kind() == VerdictKind::Pass {
                fragment::note_passed(env, P::UPLINK);
            }
            if let Some(lane) = lane::<P, F>(frame, stop.reason)
                && frame.change_lane(P::UPLINK, lane)
            {
                return stop.into();
            }
            let verdict = Verdict::from(stop);
            (verdict, verdict.action.word())
        }
    };
    account(env, P::UPLINK, &verdict, bytes);
    if P::GENERAL { Verdict { action: Action::of_word(word), ..verdict } } else { verdict }
}

/// The program that goes on. What looks cut short may be a frame in several buffers, of which the
/// plain form knows the first.
#[inline(always)]
fn lane<P: Form, F: Frame>(frame: &F, reason: Reason) -> Option<Lane> {
    use Reason::{IpMalformed, L4Malformed, VxlanMalformed};
    if !P::GENERAL && matches!(reason, IpMalformed | L4Malformed | VxlanMalformed) {
        return frame.is_split().then_some(Lane::General);
    }
    P::lane(reason)
}

/// Counts a packet at TC whose VLAN tag stands beside it: the kernel's, which has a device for what is
/// inside.
#[inline(always)]
pub fn tagged<E: Env, F: Frame>(env: &E, frame: &F) -> Verdict {
    let verdict = Verdict::from(Stop::from(Reason::Vlan));
    // The tag is of the frame that arrived.
    account(env, Hook::TcNode, &verdict, frame.view().len() as u64 + parse::TAG_LEN as u64);
    verdict
}

#[inline(always)]
fn way<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Step<Verdict> {
    let settings = env.settings().ok_or(Reason::TableBroken)?;
    if field!(settings, Settings, flags).get() & settings_flags::BYPASS != 0 {
        return Err(Reason::Bypass.into());
    }
    let departure = if P::LATER {
        follow::<P, E>(env, settings, frame.view(), frame.ingress_ifindex())?
    } else {
        plan::<P, E>(env, settings, frame.view(), frame.ingress_ifindex())?
    };
    replay::leave::<P, E, F>(env, frame, &departure)
}

/// Everything but the head's move.
#[inline(always)]
fn plan<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    view: View<'_>,
    ifindex: u32,
) -> Step<Departure<'e>> {
    let (link, ip) = parse::ethernet::<P, E>(env, view)?;
    if field!(link.first, Ethernet, dst).get().is_group() {
        return Err(Reason::Group.into());
    }
    let outer = parse::transport::<P, E>(env, link.l3, &ip)?;
    let mut packet = Located {
        outer: link.first,
        eth: link.last,
        ip,
        l3: link.l3,
        cut: 0,
        tags: link.tags,
        ecn: 0,
    };
    let mut transport = outer;
    let mut tunnel = 0;
    let own = if P::TC { own_tunnel(env, ifindex) } else { 0 };
    let is_tunnelled = ip.proto == IPPROTO_UDP && is_vxlan(settings, outer.dst);
    if own != 0 {
        tunnel = peer(env, settings, &packet, own)?;
    } else if is_tunnelled {
        (tunnel, packet) = open::<P, E>(env, settings, &link, &ip)?;
    }
    if own != 0 || is_tunnelled {
        if let Some(pod) = near::pod::<P, E>(env, packet.ip.l3.dst()) {
            return deliver::<P, E>(env, settings, &packet, pod, tunnel);
        }
        transport = parse::transport::<P, E>(env, packet.l3, &packet.ip)?;
    }
    if P::GENERAL || P::TC {
        (packet, transport) = replay::again(env, view, &packet, &transport)?;
        tunnel = env.forget(tunnel);
    }
    // A tunnel's tags belong to the way to its other end.
    let uplink = ifindex;
    let (ifindex, tags) = if tunnel == 0 { (ifindex, link.tags) } else { (0, 0) };
    let origin = Origin {
        tunnel,
        in_cluster: tunnel != 0,
        snat: true,
        ifindex,
        uplink,
        eth: link.first,
        frame: view,
        tags,
    };
    serve::<P, E>(env, settings, &packet, &transport, &origin)
}

/// The tunnel end, and the packet inside.
///
/// # Errors
/// `Fragment`, `IpOptions`, `SuperFrame` (pass), and those of [`source`] and [`inside`].
#[inline(always)]
pub(crate) fn open<'f, P: Form, E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    link: &Link<'f>,
    ip: &Ip<'f>,
) -> Step<(u32, Located<'f>)> {
    if parse::is_first_fragment::<P, E>(env) {
        // The kernel puts it together and opens it; what comes out is seen at its vxlan device.
        return Err(Reason::Fragment.into());
    }
    if ip.has_options() {
        return Err(Reason::IpOptions.into());
    }
    let payload = link.l3.skip(ip.l3.header_len());
    let (index, vtep, room) = source::<P, E>(env, settings, ip, payload)?;
    let inner = payload.skip(size_of::<Udp>() + size_of::<Vxlan>());
    let packet = inside::<P, E>(env, link, ip, inner, vtep, room)?;
    if P::TC && link.l3.segment() != 0 {
        // The kernel's helpers leave the marks of a tunnel on merged segments.
        return Err(Reason::SuperFrame.into());
    }
    Ok((index, packet))
}

/// Index of the tunnel of one of the kernel's vxlan devices, else 0: what TC sees there has no outer
/// headers any more.
#[inline(always)]
pub(crate) fn own_tunnel<E: Env>(env: &E, ifindex: u32) -> u32 {
    let mut own = 0;
    for index in 1..MAX_TUNNELS {
        if let Some(tunnel) = env.tunnel(index)
            && field!(tunnel, Tunnel, ifindex).get() == ifindex
        {
            own = index;
        }
    }
    env.forget(own)
}

/// The tunnel end that sent a packet which the kernel has decapsulated. Its outer source is gone: the
/// MAC of its device says which one it is, and the inner source must be one of its pods.
///
/// # Errors
/// `UnknownVtepPassed`, `InnerNotLocal` (pass); `UnknownVtep`, `InnerSource` (drop).
#[inline(always)]
pub(crate) fn peer<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    packet: &Located<'_>,
    own: u32,
) -> Step<u32> {
    let own = env.tunnel(own).ok_or(Reason::TableBroken)?;
    let (src, dst) = (field!(packet.eth, Ethernet, src), field!(packet.eth, Ethernet, dst));
    if dst.get() != field!(own, Tunnel, mac).get() {
        return Err(Reason::InnerNotLocal.into());
    }
    let word = opaque(VtepKey::mac_word(src.get()));
    let key = VtepKey::of_mac_word(word, field!(own, Tunnel, vni).get());
    let Some(index) = env.vtep_source(&key) else {
        return Err(unknown(settings).into());
    };
    let index = env.forget(index.get());
    let vtep = env.vtep(index).ok_or(Reason::TableBroken)?;
    if !is_from(vtep, &packet.ip) {
        return Err(foreign(env, vtep, &packet.ip).into());
    }
    Ok(index)
}

/// Why a packet from a stranger in one of our tunnels stops.
#[inline(always)]
fn unknown(settings: At<'_, Settings>) -> Reason {
    let replace = field!(settings, Settings, flags).get() & settings_flags::REPLACE != 0;
    if replace { Reason::UnknownVtep } else { Reason::UnknownVtepPassed }
}

#[inline(always)]
pub(crate) fn is_vxlan(settings: At<'_, Settings>, port: Be16) -> bool {
    let ports = field!(settings, Settings, vxlan_ports);
    port == ports.element(0).get() || port == ports.element(1).get()
}

/// The tunnel end that sent a VXLAN packet to us, and the bytes that its datagram has for the inner
/// frame: what follows a datagram is not of the packet (RFC 768), though it be in the frame.
///
/// # Errors
/// `VxlanFlags`, `ForeignTunnel`, `UnknownVtepPassed` (pass); `VxlanMalformed`, `UnknownVtep`
/// (drop).
#[inline(always)]
fn source<'a, P: Form, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    ip: &Ip<'_>,
    payload: View<'_>,
) -> Step<(u32, At<'a, Vtep>, u32)> {
    let udp = payload.need::<Udp>(Reason::VxlanMalformed)?;
    let len = field!(udp, Udp, len).get().host() as u32;
    let header = payload.skip(size_of::<Udp>()).need::<Vxlan>(Reason::VxlanMalformed)?;
    const HEADERS: u32 = (size_of::<Udp>() + size_of::<Vxlan>()) as u32;
    if len < HEADERS {
        return Err(Reason::VxlanMalformed.into());
    }
    let header = header.get();
    if header.flags.host() & FLAG_VNI == 0 {
        return Err(Reason::VxlanFlags.into());
    }
    let vni = Be32::new(header.vni.host() & VNI_MASK);
    let Some(index) = near::vtep_source::<P, E>(env, &VtepKey { source: ip.l3.src(), vni }) else {
        return Err(stranger(env, settings, ip, vni).into());
    };
    let vtep = env.vtep(index).ok_or(Reason::TableBroken)?;
    if field!(vtep, Vtep, local).get() != ip.l3.dst() {
        return Err(Reason::ForeignTunnel.into());
    }
    Ok((index, vtep, len.wrapping_sub(HEADERS)))
}

/// A VXLAN packet from nobody we know: is it for one of our tunnels at all?
#[inline(always)]
fn stranger<E: Env>(env: &E, settings: At<'_, Settings>, ip: &Ip<'_>, vni: Be32) -> Reason {
    for index in 1..MAX_TUNNELS {
        if let Some(tunnel) = env.tunnel(index)
            && field!(tunnel, Tunnel, vni).get() == vni
            && field!(tunnel, Tunnel, local).get() == ip.l3.dst()
        {
            return unknown(settings);
        }
    }
    Reason::ForeignTunnel
}

/// The packet inside, if it is the tunnel end's to send. Its frame has `room` bytes.
///
/// # Errors
/// Those of [`parse::ethernet`]; `Group`, `InnerNotLocal` (pass); `VxlanMalformed`, `IpMalformed`,
/// `InnerSource`, `Ecn` (drop).
#[inline(always)]
fn inside<'f, P: Form, E: Env>(
    env: &E,
    outer_link: &Link<'f>,
    outer: &Ip<'f>,
    view: View<'f>,
    vtep: At<'_, Vtep>,
    room: u32,
) -> Step<Located<'f>> {
    const HEADER: u32 = size_of::<Ethernet>() as u32;
    let inner = view.need::<Ethernet>(Reason::VxlanMalformed)?;
    if room < HEADER {
        return Err(Reason::VxlanMalformed.into());
    }
    if parse::is_tag(field!(inner, Ethernet, ethertype).get()) {
        // The peer's vxlan device sends none: another network's frames.
        return Err(Reason::Vlan.into());
    }
    let (link, ip) = parse::ethernet::<P, E>(env, view)?;
    if ip.len.wrapping_add(HEADER) > room {
        return Err(Reason::IpMalformed.into());
    }
    let dst = field!(link.first, Ethernet, dst).get();
    if dst.is_group() {
        return Err(Reason::Group.into());
    }
    if dst != field!(vtep, Vtep, local_mac).get() {
        return Err(Reason::InnerNotLocal.into());
    }
    if !is_from(vtep, &ip) {
        return Err(foreign(env, vtep, &ip).into());
    }
    let cut = (outer.l3.header_len() + OUTER_OVERHEAD) as u32 + outer_link.tags;
    let (outside, within) = (replay::ecn(outer), replay::ecn(&ip));
    if outside == ECN_CE && within == ECN_NOT_ECT {
        return Err(Reason::Ecn.into());
    }
    let ecn = (decapsulated(outside, within) ^ within) as u32;
    Ok(Located { outer: outer_link.first, eth: link.first, ip, l3: link.l3, cut, tags: 0, ecn })
}

/// The ECN field of a packet that was inside (RFC 6040 section 4.2, figure 4).
#[inline(always)]
fn decapsulated(outside: u8, within: u8) -> u8 {
    match (outside, within) {
        (ECN_CE, _) => ECN_CE,
        (ECN_ECT_1, ECN_ECT_0) => ECN_ECT_1,
        _ => within,
    }
}

/// Whether the inner source is in the VTEP's pod CIDRs.
#[inline(always)]
fn is_from(vtep: At<'_, Vtep>, ip: &Ip<'_>) -> bool {
    let nets = field!(vtep, Vtep, pod_nets);
    let src = ip.l3.src();
    for i in 0..4 {
        if nets.element(i).get().contains(src) {
            return true;
        }
    }
    false
}

/// What becomes of a packet whose source is not the tunnel end's. It may be a Service's answer to this
/// node itself, which asked through the tunnel: it comes from the Service's address, which is in
/// nobody's pod CIDRs, and the kernel gets it. Our pods' requests are translated on this node, so what
/// comes to them from such an address is forged.
#[inline(always)]
fn foreign<E: Env>(env: &E, vtep: At<'_, Vtep>, ip: &Ip<'_>) -> Reason {
    let Some(tunnel) = env.tunnel(field!(vtep, Vtep, tunnel).get()) else {
        return Reason::InnerSource;
    };
    let own = if ip.l3.is_v4() {
        field!(tunnel, Tunnel, addr_v4)
    } else {
        field!(tunnel, Tunnel, addr_v6)
    };
    if own.get() == ip.l3.dst() && fragment::is_vip(env, &ip.l3.src()) {
        return Reason::InnerNotLocal;
    }
    Reason::InnerSource
}

/// Decapsulates for a pod of this node.
#[inline(always)]
fn deliver<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    packet: &Located<'_>,
    pod: At<'e, Pod>,
    vtep: u32,
) -> Step<Departure<'e>> {
    // What TC translates back at the pod's interface must pass there; redirected frames do not.
    let frames = field!(pod, Pod, delivery).get() != Delivery::Stack as u16;
    if let Some(reason) = packet.ip.opaque
        && frames
        && !P::GENERAL
    {
        // Whether it is such a reply is told by ports that this form does not reach.
        return Err(reason.into());
    }
    // A fragment may be a part of such a reply, too.
    let redirect = frames
        && !parse::is_first_fragment::<P, E>(env)
        && !is_for_tc::<P, E>(env, settings, packet);
    if P::TC && packet.cut == 0 && !redirect {
        // At the kernel's vxlan device: it is where it would be handed to.
        return Err(Reason::NoService.into());
    }
    let door = replay::open_pod(env, pod, redirect, packet, vtep);
    if let Some(reason) = door.closed {
        return Err(reason.into());
    }
    // What the kernel gets is changed last: the driver may take no mark, and then it gets the packet
    // as it came.
    let ecn = if door.takes_hop() { 0 } else { packet.ecn };
    if door.takes_hop() {
        packet.mark();
        replay::take_hop(&packet.ip);
    }
    let inside = replay::address(&door, packet, false, Be16::new(0));
    let (reason, owner) = (Reason::DecapLocal, Owner::NONE);
    let sums = Sums::of_header(packet, &door, ecn == 0);
    Ok(Departure { door, cut: packet.cut_for(&door), tags: None, inside, reason, owner, ecn, sums })
}

/// Whether the packet is the reply to a request that TC translated, or may concern one: an ICMP error.
/// Both directions of what is neither TCP nor UDP go through the stack, whose conntrack sees both.
#[inline(always)]
fn is_for_tc<P: Form, E: Env>(env: &E, settings: At<'_, Settings>, packet: &Located<'_>) -> bool {
    let Ok(transport) = parse::transport::<P, E>(env, packet.l3, &packet.ip) else { return true };
    let Some(scratch) = env.scratch() else { return false };
    decide::stash(scratch, &packet.ip, &transport);
    let tuple = decide::stashed(scratch);
    let place = flow::place(env, settings, tuple.dst, tuple.dst_port, tuple.proto);
    let Some(place) = place else { return false };
    flow::known::<P, E>(env, scratch, &place, true).is_some()
        || flood::find_reply(env, settings, &place, &decide::stashed(scratch)).is_some()
}

/// A packet that may be a request to a Service or the reply to one.
#[inline(always)]
fn serve<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    packet: &Located<'_>,
    transport: &Transport<'_>,
    origin: &Origin<'_>,
) -> Step<Departure<'e>> {
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    decide::stash(scratch, &packet.ip, transport);
    let place = flow::place(env, settings, packet.ip.l3.src(), transport.src, packet.ip.proto)
        .ok_or(Reason::TableBroken)?;
    let port = place.hash.outer_port();
    let request = match flow::known::<P, E>(env, scratch, &place, false) {
        Some(found) => known(env, settings, found, origin.tunnel, transport.flags)?,
        None => None,
    };
    let (decided, direction) = if let Some(found) = request
        && !decide::is_stale(env, settings, &found)
    {
        (Decided { found, new: false }, Direction::Forward)
    } else if request.is_none()
        && let Some(found) = flow::find_snat_reply(env, settings, &decide::stashed(scratch))
    {
        check_tunnel(&found, origin.tunnel)?;
        (Decided { found, new: false }, Direction::Reply)
    } else {
        match decide::ask(env, scratch, transport.flags, origin, request) {
            Ok(decided) => (decided, Direction::Forward),
            Err(stop) => {
                answer::note(scratch, packet, wrapped::<P>(packet, origin.tunnel), stop);
                return Err(nobodys(stop, origin));
            }
        }
    };
    replay_flow::<P, E>(
        env, settings, scratch, packet, transport, &decided, direction, origin, port,
    )
}

/// The tunnel that an answer must be wrapped for. At the kernel's vxlan device the kernel does it.
#[inline(always)]
fn wrapped<P: Form>(packet: &Located<'_>, tunnel: u32) -> u32 {
    if P::TC && packet.cut == 0 { 0 } else { tunnel }
}

/// "No Service" has another name for what came out of a tunnel.
#[inline(always)]
fn nobodys(stop: Stop, origin: &Origin<'_>) -> Stop {
    if stop.reason == Reason::NoService && origin.tunnel != 0 {
        return Reason::InnerNotLocal.into();
    }
    stop
}

/// A record that a request from tunnel `origin` found: still good, or none if the connection has ended.
///
/// # Errors
/// `TunnelChanged`, `Martian` (drop).
#[inline(always)]
pub(crate) fn known<'e, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    found: Found<'e>,
    origin: u32,
    tcp_flags: u8,
) -> Step<Option<Found<'e>>> {
    let r = found.record;
    let stop = |reason| Stop { reason, service: field!(r, FlowRecord, service).get() };
    let tunnel = field!(r, FlowRecord, tunnel).get();
    if tunnel != origin {
        // What came out of a tunnel has proved its source. It wins against a record that a plain
        // packet made, and, once the tables have changed, against one of another tunnel.
        if origin == 0 || tunnel != 0 && !decide::is_stale(env, settings, &found) {
            return Err(stop(Reason::TunnelChanged));
        }
        flow::release(env, &found);
        return Ok(None);
    }
    let flags = field!(r, FlowRecord, flags).get();
    if origin == 0 && flags & record_flags::FROM_POD != 0 {
        // A pod of this node does not speak over the wire.
        return Err(stop(Reason::Martian));
    }
    if flow::begins_anew(env, r, tcp_flags) {
        flow::release(env, &found);
        return Ok(None);
    }
    if flags & record_flags::SNAT != 0 && decide::is_stamp_old(env, settings, &found) {
        let index = field!(r, FlowRecord, snat).get().wrapping_sub(1);
        if env.snat(index).is_none_or(|slot| slot.get() != found.slot) {
            // The way back is gone, so the way there ends too: both or none.
            found.end();
            return Ok(None);
        }
    }
    Ok(Some(found))
}

/// A reply comes back the way its request went: out of a tunnel (whose source was checked), or
/// plain.
///
/// # Errors
/// `TunnelChanged` (drop).
#[inline(always)]
pub(crate) fn check_tunnel(found: &Found<'_>, tunnel: u32) -> Step<()> {
    let forward = field!(found.record, FlowRecord, forward);
    let tunnelled = field!(forward, Exit, kind).get() == ExitKind::Tunnel as u8;
    if tunnelled != (tunnel != 0) {
        let service = field!(found.record, FlowRecord, service).get();
        return Err(Stop { reason: Reason::TunnelChanged, service });
    }
    Ok(())
}

/// Replays a record on a packet of either direction.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one step of one packet; a struct would only rename")]
fn replay_flow<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'_, Scratch>,
    packet: &Located<'_>,
    transport: &Transport<'_>,
    decided: &Decided<'e>,
    direction: Direction,
    origin: &Origin<'_>,
    port: Be16,
) -> Step<Departure<'e>> {
    let found = &decided.found;
    let r = found.record;
    let owner = Owner {
        service: field!(r, FlowRecord, service).get(),
        backend: field!(r, FlowRecord, backend_id).get(),
        direction,
        new_flow: decided.new || P::GENERAL && has_begun(scratch, found),
    };
    let stop = |reason| Stop { reason, service: owner.service };
    let is_reply = direction == Direction::Reply;
    let (exit, rewrite) = if is_reply {
        (field!(r, FlowRecord, reply), Rewrite::reply(r))
    } else {
        (field!(r, FlowRecord, forward), Rewrite::request(r))
    };
    let door = replay::open(env, exit, packet, origin.tunnel);
    if let Some(reason) = door.closed {
        answer::note(scratch, packet, wrapped::<P>(packet, origin.tunnel), stop(reason));
        return Err(stop(reason));
    }
    let tagged = is_tagged(r, is_reply, &door);
    if !P::GENERAL && (tagged || !replay::is_plain(&door, packet)) {
        if decided.new {
            field!(scratch, Scratch, begun).set(found.slot);
        }
        return Err(stop(Reason::NoLane));
    }
    let tags = (P::GENERAL && tagged).then_some(field!(r, FlowRecord, reply_tags));
    packet.mark();
    rewrite.write(&packet.ip, transport, door.takes_hop());
    if !P::TC {
        rewrite.write_checksum(packet.ip.proto, transport);
    }
    let inside = replay::address(&door, packet, !P::GENERAL, port);
    replay::touch(env, settings, scratch, found, transport.flags, is_reply, decided.new);
    if !found.is_still_there() {
        return Err(stop(Reason::FlowChanged));
    }
    if parse::is_first_fragment::<P, E>(env) {
        fragment::note(env, scratch, P::UPLINK, found, is_reply);
    }
    let reason = reason(is_reply, packet, exit);
    let (cut, ecn) = (packet.cut_for(&door), 0);
    let sums = Sums::of_rewrite(packet, &door, &rewrite);
    Ok(Departure { door, cut, tags, inside, reason, owner, ecn, sums })
}

/// What a translated packet is counted as.
#[inline(always)]
fn reason(is_reply: bool, packet: &Located<'_>, exit: At<'_, Exit>) -> Reason {
    let remote = field!(exit, Exit, kind).get() >= ExitKind::Tunnel as u8;
    match (is_reply, packet.cut != 0, remote) {
        (true, _, _) => Reason::ReplyRemote,
        (false, false, false) => Reason::DnatLocal,
        (false, false, true) => Reason::DnatRemote,
        (false, true, false) => Reason::DecapDnatLocal,
        (false, true, true) => Reason::DecapDnatRemote,
    }
}

/// A fragment behind the first: it goes where the first one went.
///
/// # Errors
/// `Fragment` (pass); `FragmentOrphan`, `TunnelChanged`, `Martian`, `FlowChanged` (drop), and those
/// of [`replay::open`].
#[inline(always)]
fn follow<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    view: View<'_>,
    uplink: u32,
) -> Step<Departure<'e>> {
    let (link, ip) = parse::ethernet::<P, E>(env, view)?;
    if field!(link.first, Ethernet, dst).get().is_group() {
        return Err(Reason::Group.into());
    }
    let (mut tunnel, mut cut, mut tags, mut ecn) = (0, 0, link.tags, 0);
    let (mut v4, mut len, mut hop_limit) = (ip.l3.is_v4(), ip.len, ip.hop_limit);
    let own = if P::TC { own_tunnel(env, uplink) } else { 0 };
    if own != 0 {
        if ip.opaque.is_none() {
            return Err(Reason::Fragment.into());
        }
        let (outer, eth, l3) = (link.first, link.last, link.l3);
        let packet = Located { outer, eth, ip, l3, cut: 0, tags: 0, ecn: 0 };
        tunnel = peer(env, settings, &packet, own)?;
    } else if ip.opaque.is_none() {
        let outer = parse::transport::<P, E>(env, link.l3, &ip)?;
        if ip.proto != IPPROTO_UDP || !is_vxlan(settings, outer.dst) {
            return Err(Reason::Fragment.into());
        }
        let (vtep, inner) = open::<P, E>(env, settings, &link, &ip)?;
        (tunnel, cut, tags, ecn) = (vtep, inner.cut, inner.tags, inner.ecn);
        (v4, len, hop_limit) = (inner.ip.l3.is_v4(), inner.ip.len, inner.ip.hop_limit);
    }
    let packet = replay::locate(env, view, v4, cut, tags, len, hop_limit, ecn)?;
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    let fate = fragment::find(env, settings, scratch, P::UPLINK);
    if fate == fragment_fate::ECHO {
        let (ifindex, tags) = if tunnel == 0 { (uplink, packet.tags) } else { (0, 0) };
        let (in_cluster, snat, eth, frame) = (false, false, packet.outer, view);
        let origin = Origin { tunnel, in_cluster, snat, ifindex, uplink, eth, frame, tags };
        return icmp::later_at_uplink::<P, E>(env, settings, scratch, &packet, &origin);
    }
    if fate != fragment_fate::REQUEST && fate != fragment_fate::REPLY {
        let orphan = fate == fragment_fate::NONE && fragment::is_ours(env, &packet.ip.l3.dst());
        return Err(if orphan { Reason::FragmentOrphan } else { Reason::Fragment }.into());
    }
    let is_reply = fate == fragment_fate::REPLY;
    let Some(found) = fragment::record(env, scratch, is_reply) else {
        return Err(Reason::FragmentOrphan.into());
    };
    if is_reply {
        check_tunnel(&found, tunnel)?;
    } else {
        check_request_tunnel(&found, tunnel)?;
    }
    replay_later(env, settings, &packet, &found, is_reply, tunnel)
}

/// A later fragment of a request comes the way that the first one came.
///
/// # Errors
/// `TunnelChanged`, `Martian` (drop).
#[inline(always)]
fn check_request_tunnel(found: &Found<'_>, tunnel: u32) -> Step<()> {
    let r = found.record;
    let stop = |reason| Err(Stop { reason, service: field!(r, FlowRecord, service).get() });
    if field!(r, FlowRecord, tunnel).get() != tunnel {
        return stop(Reason::TunnelChanged);
    }
    if tunnel == 0 && field!(r, FlowRecord, flags).get() & record_flags::FROM_POD != 0 {
        return stop(Reason::Martian);
    }
    Ok(())
}

/// Replays a record on a fragment without a transport header.
#[inline(always)]
fn replay_later<'e, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    packet: &Located<'_>,
    found: &Found<'e>,
    is_reply: bool,
    tunnel: u32,
) -> Step<Departure<'e>> {
    let r = found.record;
    let owner = Owner {
        service: field!(r, FlowRecord, service).get(),
        backend: field!(r, FlowRecord, backend_id).get(),
        direction: if is_reply { Direction::Reply } else { Direction::Forward },
        new_flow: false,
    };
    let stop = |reason| Stop { reason, service: owner.service };
    let (exit, rewrite, port) = if is_reply {
        let port = field!(r, FlowRecord, backend_port).get();
        (field!(r, FlowRecord, reply), Rewrite::reply(r), port)
    } else {
        let port = field!(r, FlowRecord, client_port).get();
        (field!(r, FlowRecord, forward), Rewrite::request(r), port)
    };
    let door = replay::open(env, exit, packet, tunnel);
    if let Some(reason) = door.closed {
        return Err(stop(reason));
    }
    let tagged = is_tagged(r, is_reply, &door);
    let tags = tagged.then_some(field!(r, FlowRecord, reply_tags));
    // The outer source port of the first one, so that all take the same way.
    let seed = field!(field!(settings, Settings, seeds), Seeds, flow).get();
    let proto = field!(r, FlowRecord, proto).get();
    let port = FlowHash::new(seed, packet.ip.l3.src(), port, proto).outer_port();
    packet.mark();
    rewrite.write_addresses(&packet.ip, door.takes_hop());
    let inside = replay::address(&door, packet, false, port);
    if !found.is_still_there() {
        return Err(stop(Reason::FlowChanged));
    }
    let reason = reason(is_reply, packet, exit);
    let (cut, ecn) = (packet.cut_for(&door), 0);
    let sums = Sums::of_addresses(packet, &door, &rewrite);
    Ok(Departure { door, cut, tags, inside, reason, owner, ecn, sums })
}

/// Whether a reply leaves with VLAN tags: those of its connection's requests.
#[inline(always)]
pub(crate) fn is_tagged(r: At<'_, FlowRecord>, is_reply: bool, door: &Door<'_>) -> bool {
    let first = field!(r, FlowRecord, reply_tags).element(0).get();
    is_reply && door.way == Way::Frame && first != Be32::new(0)
}

/// Whether the plain program began the connection with this packet, before it changed lanes.
#[inline(always)]
fn has_begun(scratch: At<'_, Scratch>, found: &Found<'_>) -> bool {
    let begun = field!(scratch, Scratch, begun);
    let same = begun.get() == found.slot;
    begun.set(SnatSlot::FREE);
    same
}
