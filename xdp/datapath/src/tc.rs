//! TC: what never passes an uplink's XDP hook. Requests of pods of this node, and replies of
//! backends on this node.
//!
//! ```text
//!  pod ─► TC ingress of its host side:  request ─► translated, the kernel routes it
//!                                       reply to a request that skipped the stack ─► skips it too
//!  stack ─► TC egress (uplink, vxlan device, a pod's host side):  reply ─► translated back
//! ```
//!
//! A request that the stack saw as `client → backend` gets its reply translated behind the stack,
//! so that conntrack sees the same tuple in both directions.

use crate::access::{At, Frame, View};
use crate::account::account;
use crate::answer;
use crate::decide::{self, Decided, Origin};
use crate::env::Env;
use crate::field;
use crate::flood;
use crate::flow::{self, Found};
use crate::fragment;
use crate::icmp;
use crate::parse::{self, Form, Later, Transport};
use crate::replay::{self, Located, Rewrite};
use crate::verdict::{Action, Direction, Owner, Step, Stop, Verdict};
use crate::wire::Ethernet;
use sluice_abi::{
    Addr, Be32, Exit, ExitKind, FlowRecord, Hook, Mac, Pod, Reason, Scratch, Settings, VerdictKind,
    Vtep, fragment_fate, record_flags, settings_flags,
};

/// A translation whose transport checksum is still to be written through the frame.
struct Pending<'e> {
    rewrite: Rewrite<'e>,
    proto: u8,
    /// Where the transport header begins in the frame.
    l4: usize,
    verdict: Verdict,
}

/// TC ingress at the host side of a pod. Packets of anybody else pass.
#[inline(always)]
pub fn ingress<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    run::<P, E, F>(env, frame, Hook::TcIngress, |env, settings, view, ifindex| {
        from_pod::<P, E>(env, settings, view, ifindex)
    })
}

/// TC egress of uplinks, of the kernel's vxlan devices and of the host sides of pods.
#[inline(always)]
pub fn egress<P: Form, E: Env, F: Frame>(env: &E, frame: &mut F) -> Verdict {
    run::<P, E, F>(env, frame, Hook::TcEgress, |env, settings, view, _| {
        to_client::<P, E>(env, settings, view)
    })
}

#[inline(always)]
fn run<'e, P: Form, E: Env, F: Frame>(
    env: &'e E,
    frame: &mut F,
    hook: Hook,
    plan: impl FnOnce(&'e E, At<'e, Settings>, View<'_>, u32) -> Step<Pending<'e>>,
) -> Verdict {
    let bytes = frame.view().len() as u64;
    if P::GENERAL {
        fragment::clear(env);
    }
    let verdict = match bypass(env) {
        Ok(settings) => match plan(env, settings, frame.view(), frame.ingress_ifindex()) {
            Ok(p) => {
                if p.rewrite.frame_checksum(frame, p.proto, p.l4) {
                    p.verdict
                } else {
                    Stop { reason: Reason::FlowChanged, service: p.verdict.owner.service }.into()
                }
            }
            Err(stop) => {
                if P::GENERAL && stop.reason.kind() == VerdictKind::Pass {
                    fragment::note_passed(env, hook);
                }
                if let Some(lane) = P::lane(stop.reason)
                    && frame.change_lane(hook, lane)
                {
                    return stop.into();
                }
                stop.into()
            }
        },
        Err(stop) => stop.into(),
    };
    account(env, hook, &verdict, bytes);
    verdict
}

#[inline(always)]
pub(crate) fn bypass<E: Env>(env: &E) -> Step<At<'_, Settings>> {
    let settings = env.settings().ok_or(Reason::TableBroken)?;
    if field!(settings, Settings, flags).get() & settings_flags::BYPASS != 0 {
        return Err(Reason::Bypass.into());
    }
    Ok(settings)
}

#[inline(always)]
fn open<'f, P: Form, E: Env>(env: &E, view: View<'f>) -> Step<(Located<'f>, Transport<'f>)> {
    let (link, ip) = parse::ethernet::<P, E>(env, view)?;
    if field!(link.first, Ethernet, dst).get().is_group() {
        return Err(Reason::Group.into());
    }
    let transport = parse::transport::<P, E>(env, link.l3, &ip)?;
    let (outer, eth, l3, tags) = (link.first, link.last, link.l3, link.tags);
    Ok((Located { outer, eth, ip, l3, cut: 0, tags, ecn: 0 }, transport))
}

/// Where the transport header begins in the frame.
#[inline(always)]
fn l4(packet: &Located<'_>) -> usize {
    size_of::<Ethernet>() + packet.tags as usize + packet.ip.header_len as usize
}

#[inline(always)]
pub(crate) fn owner(r: At<'_, FlowRecord>, direction: Direction, new_flow: bool) -> Owner {
    Owner {
        service: field!(r, FlowRecord, service).get(),
        backend: field!(r, FlowRecord, backend_id).get(),
        direction,
        new_flow,
    }
}

/// A reply leaves for the client: the VIP becomes its source.
#[inline(always)]
fn to_client<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    view: View<'_>,
) -> Step<Pending<'e>> {
    let (packet, transport) = open::<P, E>(env, view)?;
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    decide::stash(scratch, &packet.ip, &transport);
    let place = flow::place(env, settings, packet.ip.l3.dst(), transport.dst, packet.ip.proto)
        .ok_or(Reason::TableBroken)?;
    let found = flow::find_reply(&place, &decide::stashed(scratch))
        .or_else(|| flood::find_reply(env, settings, &place, &decide::stashed(scratch)))
        .ok_or(Reason::NoService)?;
    let r = found.record;
    if field!(r, FlowRecord, flags).get() & record_flags::SNAT != 0 {
        return Err(Reason::NoService.into());
    }
    let rewrite = Rewrite::reply(r);
    rewrite.write(&packet.ip, &transport, false);
    replay::touch(env, settings, scratch, &found, transport.flags, true, false);
    let owner = owner(r, Direction::Reply, false);
    if !found.is_still_there() {
        return Err(Stop { reason: Reason::FlowChanged, service: owner.service });
    }
    if parse::is_first_fragment::<P, E>(env) {
        fragment::note(env, scratch, Hook::TcEgress, &found, true);
    }
    let (proto, l4) = (packet.ip.proto, l4(&packet));
    let verdict = Verdict { action: Action::Pass, reason: Reason::ReplyLocal, owner };
    Ok(Pending { rewrite, proto, l4, verdict })
}

/// A pod of this node sends: a request, or a reply that must skip the stack as its request did.
#[inline(always)]
fn from_pod<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    view: View<'_>,
    ifindex: u32,
) -> Step<Pending<'e>> {
    let (packet, transport) = open::<P, E>(env, view)?;
    let pod = env.pod(&packet.ip.l3.src()).ok_or(Reason::NoService)?;
    if field!(pod, Pod, ifindex).get() != ifindex {
        return Err(Reason::NoService.into());
    }
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    decide::stash(scratch, &packet.ip, &transport);
    match short_cut::<P, E>(env, settings, scratch, &packet, &transport, ifindex)? {
        Some(pending) => Ok(pending),
        None => pod_request::<P, E>(env, settings, scratch, view, &packet, &transport, ifindex),
    }
}

/// The reply to a request that XDP put into this pod's veth leaves the way that was decided for
/// it, past the stack; one that the pod sends to itself goes back to it.
#[inline(always)]
fn short_cut<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    packet: &Located<'_>,
    transport: &Transport<'_>,
    ifindex: u32,
) -> Step<Option<Pending<'e>>> {
    let client = answered(settings, packet);
    let place = flow::place(env, settings, client, transport.dst, packet.ip.proto)
        .ok_or(Reason::TableBroken)?;
    let found = flow::find_reply(&place, &decide::stashed(scratch))
        .or_else(|| flood::find_reply(env, settings, &place, &decide::stashed(scratch)));
    let Some(found) = found else { return Ok(None) };
    let r = found.record;
    let out = if is_hairpin(r) {
        check_hop(scratch, packet, r)?;
        turn(packet);
        ifindex
    } else {
        let Some((out, dst_mac, src_mac)) = reply_way(env, field!(r, FlowRecord, reply)) else {
            return Ok(None);
        };
        if !skips_the_stack(r, packet) {
            return Ok(None);
        }
        field!(packet.eth, Ethernet, dst).copy_from(dst_mac);
        field!(packet.eth, Ethernet, src).copy_from(src_mac);
        out
    };
    let rewrite = Rewrite::reply(r);
    rewrite.write(&packet.ip, transport, true);
    replay::touch(env, settings, scratch, &found, transport.flags, true, false);
    let owner = owner(r, Direction::Reply, false);
    if !found.is_still_there() {
        return Err(Stop { reason: Reason::FlowChanged, service: owner.service });
    }
    if parse::is_first_fragment::<P, E>(env) {
        fragment::note(env, scratch, Hook::TcIngress, &found, true);
    }
    let action = Action::Redirect(out);
    let verdict = Verdict { action, reason: Reason::ReplyLocal, owner };
    let (proto, l4) = (packet.ip.proto, l4(packet));
    Ok(Some(Pending { rewrite, proto, l4, verdict }))
}

/// The client whose connections' replies a pod's packet may be among: its destination, or the pod
/// itself, if the destination stands for a pod that asks itself.
#[inline(always)]
pub(crate) fn answered(settings: At<'_, Settings>, packet: &Located<'_>) -> Addr {
    let dst = packet.ip.l3.dst();
    if decide::is_borrowed(settings, &dst) { packet.ip.l3.src() } else { dst }
}

/// Whether a record's client is its backend.
#[inline(always)]
pub(crate) fn is_hairpin(r: At<'_, FlowRecord>) -> bool {
    field!(r, FlowRecord, flags).get() & record_flags::HAIRPIN != 0
}

/// Addresses a frame to whom it came from.
#[inline(always)]
pub(crate) fn turn(packet: &Located<'_>) {
    let eth = packet.outer;
    let (dst, src) = (field!(eth, Ethernet, dst).get(), field!(eth, Ethernet, src).get());
    field!(eth, Ethernet, dst).set(src);
    field!(eth, Ethernet, src).set(dst);
}

/// A packet that the pod sends to itself meets no router but us.
///
/// # Errors
/// `HopLimitExceeded` (drop), with a note for the answer.
#[inline(always)]
fn check_hop(scratch: At<'_, Scratch>, packet: &Located<'_>, r: At<'_, FlowRecord>) -> Step<()> {
    if packet.ip.hop_limit > 1 {
        return Ok(());
    }
    let service = field!(r, FlowRecord, service).get();
    let stop = Stop { reason: Reason::HopLimitExceeded, service };
    answer::note(scratch, packet, 0, stop);
    Err(stop)
}

/// Whether a reply skips the stack: its request did. What has tags, or is to get some, is the
/// stack's: it knows the VLANs.
#[inline(always)]
fn skips_the_stack(r: At<'_, FlowRecord>, packet: &Located<'_>) -> bool {
    let tags = field!(r, FlowRecord, reply_tags).element(0).get() != Be32::new(0);
    way_kind(field!(r, FlowRecord, forward)) == ExitKind::Frame as u8
        && packet.ip.hop_limit > 1
        && !tags
        && packet.tags == 0
}

/// Interface and Ethernet header of a reply that skips the stack; a tunnel's is the kernel's
/// vxlan device, which encapsulates by its own tables.
#[inline(always)]
pub(crate) fn reply_way<'e, E: Env>(
    env: &'e E,
    reply: At<'e, Exit>,
) -> Option<(u32, At<'e, Mac>, At<'e, Mac>)> {
    let kind = way_kind(reply);
    let index = field!(reply, Exit, index).get();
    if kind == ExitKind::Frame as u8 {
        return Some((index, field!(reply, Exit, dst_mac), field!(reply, Exit, src_mac)));
    }
    if kind != ExitKind::Tunnel as u8 {
        return None;
    }
    let device = replay::tunnel_device(env, index);
    let vtep = env.vtep(index)?;
    (device != 0).then_some((device, field!(vtep, Vtep, remote_mac), field!(vtep, Vtep, local_mac)))
}

/// An [`ExitKind`].
#[inline(always)]
pub(crate) fn way_kind(exit: At<'_, Exit>) -> u8 {
    field!(exit, Exit, kind).get()
}

/// Whether a record was decided here and goes on. One that was made on the wire in the pod's name,
/// before the pod was known, is not.
#[inline(always)]
pub(crate) fn is_ours<E: Env>(env: &E, found: &Found<'_>, tcp_flags: u8) -> bool {
    let r = found.record;
    const BOTH: u16 = record_flags::FROM_POD | record_flags::SNAT;
    field!(r, FlowRecord, flags).get() & BOTH == record_flags::FROM_POD
        && !flow::begins_anew(env, r, tcp_flags)
}

/// A pod's request to a Service: translated here, routed by the kernel unless the pod is to answer
/// itself.
#[inline(always)]
fn pod_request<'e, P: Form, E: Env>(
    env: &'e E,
    settings: At<'e, Settings>,
    scratch: At<'e, Scratch>,
    frame: View<'_>,
    packet: &Located<'_>,
    transport: &Transport<'_>,
    ifindex: u32,
) -> Step<Pending<'e>> {
    let place = flow::place(env, settings, packet.ip.l3.src(), transport.src, packet.ip.proto)
        .ok_or(Reason::TableBroken)?;
    let origin = Origin {
        tunnel: 0,
        in_cluster: true,
        snat: false,
        ifindex: 0,
        uplink: 0,
        eth: packet.outer,
        frame,
        tags: 0,
    };
    let request = match flow::find_request(&place, &decide::stashed(scratch)) {
        Some(found) if !is_ours(env, &found, transport.flags) => {
            flow::release(env, &found);
            None
        }
        request => request,
    };
    let decided = match request {
        Some(found) if !decide::is_stale(env, settings, &found) => Decided { found, new: false },
        _ => match decide::ask(env, scratch, transport.flags, &origin, request) {
            Ok(decided) => decided,
            Err(stop) => {
                answer::note(scratch, packet, 0, stop);
                return Err(stop);
            }
        },
    };
    let found = &decided.found;
    let mut action = Action::Pass;
    if is_hairpin(found.record) {
        check_hop(scratch, packet, found.record)?;
        turn(packet);
        action = Action::Redirect(ifindex);
    }
    let rewrite = Rewrite::request(found.record);
    rewrite.write(&packet.ip, transport, action != Action::Pass);
    replay::touch(env, settings, scratch, found, transport.flags, false, decided.new);
    let owner = owner(found.record, Direction::Forward, decided.new);
    if !found.is_still_there() {
        return Err(Stop { reason: Reason::FlowChanged, service: owner.service });
    }
    if parse::is_first_fragment::<P, E>(env) {
        fragment::note(env, scratch, Hook::TcIngress, found, false);
    }
    let forward = way_kind(field!(found.record, FlowRecord, forward));
    let reason =
        if forward >= ExitKind::Tunnel as u8 { Reason::DnatRemote } else { Reason::DnatLocal };
    let verdict = Verdict { action, reason, owner };
    let (proto, l4) = (packet.ip.proto, l4(packet));
    Ok(Pending { rewrite, proto, l4, verdict })
}

/// A fragment behind the first, at either hook: it goes where the first one went.
#[inline(always)]
pub fn later<E: Env, F: Frame>(env: &E, frame: &mut F, hook: Hook) -> Verdict {
    let bytes = frame.view().len() as u64;
    fragment::clear(env);
    let verdict = match bypass(env) {
        Ok(settings) => match follow(env, settings, frame.view(), hook, frame.ingress_ifindex()) {
            Ok(f) => {
                // IPv4's header checksum took the difference; IPv6 has none.
                if f.v6 {
                    frame.packet_sum(f.delta);
                }
                f.verdict
            }
            Err(stop) => stop.into(),
        },
        Err(stop) => stop.into(),
    };
    account(env, hook, &verdict, bytes);
    verdict
}

/// A translated fragment.
struct Followed {
    verdict: Verdict,
    v6: bool,
    /// What the addresses add to the sum of all bytes.
    delta: u16,
}

/// # Errors
/// `Group`, `Fragment` (pass); `FragmentOrphan`, `FlowChanged` (drop), and those of
/// [`parse::ethernet`].
#[inline(always)]
fn follow<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    view: View<'_>,
    hook: Hook,
    ifindex: u32,
) -> Step<Followed> {
    let (link, ip) = parse::ethernet::<Later, E>(env, view)?;
    if field!(link.first, Ethernet, dst).get().is_group() {
        return Err(Reason::Group.into());
    }
    let (outer, eth, l3, tags) = (link.first, link.last, link.l3, link.tags);
    let packet = Located { outer, eth, ip, l3, cut: 0, tags, ecn: 0 };
    let from_pod = hook == Hook::TcIngress;
    if ip.opaque.is_none() || from_pod && !is_of_pod(env, &packet, ifindex) {
        return Err(Reason::Fragment.into());
    }
    let scratch = env.scratch().ok_or(Reason::TableBroken)?;
    let fate = fragment::find(env, settings, scratch, hook);
    if fate == fragment_fate::ECHO && from_pod {
        let verdict = icmp::later_at_pod(env, settings, scratch, &packet, ifindex)?;
        return Ok(Followed { verdict, v6: false, delta: 0 });
    }
    if fate != fragment_fate::REQUEST && fate != fragment_fate::REPLY {
        let dst = packet.ip.l3.dst();
        let ours = fragment::is_vip(env, &dst) || decide::is_borrowed(settings, &dst);
        let orphan = from_pod && fate == fragment_fate::NONE && ours;
        return Err(if orphan { Reason::FragmentOrphan } else { Reason::Fragment }.into());
    }
    let is_reply = fate == fragment_fate::REPLY;
    let Some(found) = fragment::record(env, scratch, is_reply) else {
        return Err(Reason::FragmentOrphan.into());
    };
    translate_later(env, &packet, &found, is_reply, from_pod, ifindex)
}

/// Whether the packet came from the pod whose address it carries.
#[inline(always)]
fn is_of_pod<E: Env>(env: &E, packet: &Located<'_>, ifindex: u32) -> bool {
    env.pod(&packet.ip.l3.src()).is_some_and(|pod| field!(pod, Pod, ifindex).get() == ifindex)
}

/// Replays a record on a fragment without a transport header.
#[inline(always)]
fn translate_later<E: Env>(
    env: &E,
    packet: &Located<'_>,
    found: &Found<'_>,
    is_reply: bool,
    from_pod: bool,
    ifindex: u32,
) -> Step<Followed> {
    let r = found.record;
    let direction = if is_reply { Direction::Reply } else { Direction::Forward };
    let owner = owner(r, direction, false);
    let forward = way_kind(field!(r, FlowRecord, forward));
    let (reason, rewrite) = if is_reply {
        (Reason::ReplyLocal, Rewrite::reply(r))
    } else if forward >= ExitKind::Tunnel as u8 {
        (Reason::DnatRemote, Rewrite::request(r))
    } else {
        (Reason::DnatLocal, Rewrite::request(r))
    };
    let mut action = Action::Pass;
    if is_hairpin(r) {
        if packet.ip.hop_limit <= 1 {
            return Err(Stop { reason: Reason::HopLimitExceeded, service: owner.service });
        }
        turn(packet);
        action = Action::Redirect(ifindex);
    } else if is_reply && from_pod {
        let way = reply_way(env, field!(r, FlowRecord, reply));
        let Some((ifindex, dst_mac, src_mac)) = way else { return Err(Reason::Fragment.into()) };
        if !skips_the_stack(r, packet) {
            return Err(Reason::Fragment.into());
        }
        field!(packet.eth, Ethernet, dst).copy_from(dst_mac);
        field!(packet.eth, Ethernet, src).copy_from(src_mac);
        action = Action::Redirect(ifindex);
    }
    rewrite.write_addresses(&packet.ip, action != Action::Pass);
    if !found.is_still_there() {
        return Err(Stop { reason: Reason::FlowChanged, service: owner.service });
    }
    let verdict = Verdict { action, reason, owner };
    Ok(Followed { verdict, v6: !packet.ip.l3.is_v4(), delta: rewrite.address_delta() })
}
