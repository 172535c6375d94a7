//! Replays a flow's record on a packet. The only module that writes packet bytes, and only after
//! everything that could end the packet's way has been asked.

use crate::access::{At, Frame, View};
use crate::csum::{Sum, negate, update, update_udp};
use crate::decide::port_delta;
use crate::encap::{self, Inside};
use crate::env::Env;
use crate::field;
use crate::flow::{self, Found};
use crate::parse::{Form, Ip, L3, TAG_LEN, Transport};
use crate::tcp;
use crate::verdict::{Action, Owner, Step, Stop, Verdict};
use crate::wire::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ipv4, Ipv6, Ports, Tcp, Udp};
use core::mem::offset_of;
use sluice_abi::{
    Addr, Be16, Be32, Delivery, Exit, ExitKind, FlowRecord, IPPROTO_TCP, IPPROTO_UDP, Mac, NextHop,
    Pod, Reason, Scratch, Settings, Stopped, Timeouts, Tunnel, Vtep, flow_state,
};

/// A parsed packet inside its frame.
#[derive(Clone, Copy)]
pub struct Located<'a> {
    /// The outermost Ethernet header.
    pub outer: At<'a, Ethernet>,
    /// The fourteen bytes in front of the innermost IP header: its Ethernet header, unless there are
    /// tags.
    pub eth: At<'a, Ethernet>,
    /// The innermost IP packet.
    pub ip: Ip<'a>,
    /// From the innermost IP header on.
    pub l3: View<'a>,
    /// Bytes in front of the innermost Ethernet header: outer headers to be cut off, or 0.
    pub cut: u32,
    /// Bytes of VLAN tags, 0 in what came out of a tunnel. They stay on a packet that the kernel
    /// gets; another way is another wire.
    pub tags: u32,
    /// Bits of the ECN field that change because of what the tunnel's headers said (RFC 6040
    /// section 4.2); 0 in what came out of none.
    pub ecn: u32,
}

impl Located<'_> {
    /// Writes the ECN field that a decapsulated packet has from now on.
    #[inline(always)]
    pub fn mark(&self) {
        if self.ecn != 0 {
            change_ecn(self.ip.l3, self.ecn);
        }
    }

    /// Bytes of the largest IP packet that leaves: the packet, or one of the segments that were merged
    /// into it, which are cut apart again behind us.
    #[inline(always)]
    fn largest(&self) -> u32 {
        let payload = self.l3.segment();
        if payload == 0 {
            return self.ip.len;
        }
        let l4 = self.l3.skip(self.ip.header_len as usize & 0x1ff);
        let header = match l4.at::<Tcp>() {
            Some(tcp) if self.ip.proto == IPPROTO_TCP => {
                (field!(tcp, Tcp, data_offset).get() >> 4) as u32 * 4
            }
            _ => size_of::<Udp>() as u32,
        };
        self.ip.header_len + header + payload
    }

    /// Bytes to be cut off in front for a way out.
    #[inline(always)]
    pub fn cut_for(&self, door: &Door<'_>) -> u32 {
        self.cut + if door.takes_hop() { self.tags } else { 0 }
    }
}

/// The same packet, found again at places of which the verifier knows nothing but that they are inside
/// the frame: whether it came out of a tunnel, over which family and with what in front is then one
/// way through the rest of the program, and not ten.
///
/// # Errors
/// `TableBroken` (pass), never.
#[inline(always)]
pub fn again<'f, E: Env>(
    env: &E,
    frame: View<'f>,
    packet: &Located<'f>,
    transport: &Transport<'f>,
) -> Step<(Located<'f>, Transport<'f>)> {
    let ip = &packet.ip;
    let hide = |value: u32| env.forget(value);
    let to_checksum = checksum_offset(ip.proto) as u32;
    let base = frame.skip(hide(packet.cut + packet.tags) as usize & 0x7f);
    let l3_view = base.skip(size_of::<Ethernet>());
    let l4 = l3_view.skip(hide(ip.header_len) as usize & 0x1ff);
    let checksum = l4.skip(hide(to_checksum) as usize & 0x1f);
    let v4 = hide(ip.l3.is_v4() as u32) != 0;
    let (Some(outer), Some(eth)) = (frame.at::<Ethernet>(), base.at::<Ethernet>()) else {
        return Err(Reason::TableBroken.into());
    };
    let (Some(ports), Some(checksum)) = (l4.at::<Ports>(), checksum.at::<Be16>()) else {
        return Err(Reason::TableBroken.into());
    };
    let l3 = if v4 {
        L3::V4(l3_view.at::<Ipv4>().ok_or(Reason::TableBroken)?)
    } else {
        L3::V6(l3_view.at::<Ipv6>().ok_or(Reason::TableBroken)?)
    };
    let ip = Ip {
        l3,
        proto: hide(ip.proto as u32) as u8,
        hop_limit: hide(ip.hop_limit as u32) as u8,
        len: hide(ip.len) & 0x1_ffff,
        header_len: hide(ip.header_len) & 0x1ff,
        opaque: None,
    };
    let (cut, tags) = (hide(packet.cut) & 0x7f, hide(packet.tags) & 0xf);
    let transport =
        Transport { ports, checksum, flags: hide(transport.flags as u32) as u8, ..*transport };
    let ecn = hide(packet.ecn) & 3;
    Ok((Located { outer, eth, ip, l3: l3_view, cut, tags, ecn }, transport))
}

/// A packet of which nothing is known but its addresses, at a place of which the verifier knows nothing
/// but that it is inside the frame.
///
/// # Errors
/// `TableBroken` (pass), never.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what a packet is, in numbers alone")]
pub fn locate<'f, E: Env>(
    env: &E,
    frame: View<'f>,
    v4: bool,
    cut: u32,
    tags: u32,
    len: u32,
    hop_limit: u8,
    ecn: u32,
) -> Step<Located<'f>> {
    let v4 = env.forget(v4 as u32) != 0;
    let (cut, tags) = (env.forget(cut) & 0x7f, env.forget(tags) & 0xf);
    let base = frame.skip(env.forget(cut + tags) as usize & 0x7f);
    let view = base.skip(size_of::<Ethernet>());
    let (Some(outer), Some(eth)) = (frame.at::<Ethernet>(), base.at::<Ethernet>()) else {
        return Err(Reason::TableBroken.into());
    };
    let l3 = if v4 {
        L3::V4(view.at::<Ipv4>().ok_or(Reason::TableBroken)?)
    } else {
        L3::V6(view.at::<Ipv6>().ok_or(Reason::TableBroken)?)
    };
    let (len, hop_limit) = (env.forget(len) & 0x1_ffff, env.forget(hop_limit as u32) as u8);
    let header_len = l3.header_len() as u32;
    let ip = Ip { l3, proto: 0, hop_limit, len, header_len, opaque: Some(Reason::Fragment) };
    let ecn = env.forget(ecn) & 3;
    Ok(Located { outer, eth, ip, l3: view, cut, tags, ecn })
}

/// New addresses and ports of one direction: places in the flow's record, and the differences.
#[derive(Clone, Copy)]
pub struct Rewrite<'e> {
    /// New source.
    pub src: At<'e, Addr>,
    /// New destination.
    pub dst: At<'e, Addr>,
    /// New ports.
    pub ports: Ports,
    /// What the addresses add to a sum.
    pub addresses: u16,
    /// What addresses and ports add.
    pub transport: u16,
}

impl<'e> Rewrite<'e> {
    /// What a request becomes.
    #[inline(always)]
    pub fn request(r: At<'e, FlowRecord>) -> Self {
        Self {
            src: field!(r, FlowRecord, source),
            dst: field!(r, FlowRecord, backend),
            ports: Ports {
                src: field!(r, FlowRecord, source_port).get(),
                dst: field!(r, FlowRecord, backend_port).get(),
            },
            addresses: field!(r, FlowRecord, ip_delta).get(),
            transport: field!(r, FlowRecord, l4_delta).get(),
        }
    }

    /// What a reply becomes.
    #[inline(always)]
    pub fn reply(r: At<'e, FlowRecord>) -> Self {
        Self {
            src: field!(r, FlowRecord, vip),
            dst: field!(r, FlowRecord, client),
            ports: Ports {
                src: field!(r, FlowRecord, vip_port).get(),
                dst: field!(r, FlowRecord, client_port).get(),
            },
            addresses: negate(field!(r, FlowRecord, ip_delta).get()),
            transport: negate(field!(r, FlowRecord, l4_delta).get()),
        }
    }

    /// Writes addresses and ports; the IPv4 header checksum follows. With `hop` the packet takes
    /// one hop (RFC 1812 section 5.3.1).
    #[inline(always)]
    pub fn write(&self, ip: &Ip<'_>, transport: &Transport<'_>, hop: bool) {
        self.write_addresses(ip, hop);
        transport.ports.set(self.ports);
    }

    /// The same for a packet without ports: a fragment behind the first.
    #[inline(always)]
    pub fn write_addresses(&self, ip: &Ip<'_>, hop: bool) {
        match ip.l3 {
            L3::V4(at) => {
                let mut sum = Sum(self.addresses as u64);
                if hop {
                    field!(at, Ipv4, ttl).set(ip.hop_limit.wrapping_sub(1));
                    sum = sum.sub16(Be16::new(0x0100).raw());
                }
                let checksum = field!(at, Ipv4, checksum);
                checksum.set(Be16::from_raw(update(checksum.get().raw(), sum.fold())));
                field!(at, Ipv4, src).set(self.src.get().v4_bytes());
                field!(at, Ipv4, dst).set(self.dst.get().v4_bytes());
            }
            L3::V6(at) => {
                if hop {
                    field!(at, Ipv6, hop_limit).set(ip.hop_limit.wrapping_sub(1));
                }
                field!(at, Ipv6, src).copy_from(self.src);
                field!(at, Ipv6, dst).copy_from(self.dst);
            }
        }
    }

    /// What the addresses alone add to a sum that covers them.
    #[inline(always)]
    pub fn address_delta(&self) -> u16 {
        self.addresses
    }

    /// Updates the transport checksum in place (XDP: the packet's bytes are all there is).
    #[inline(always)]
    pub fn write_checksum(&self, proto: u8, transport: &Transport<'_>) {
        let old = transport.checksum.get().raw();
        let new = if proto == IPPROTO_UDP {
            update_udp(old, self.transport)
        } else {
            update(old, self.transport)
        };
        transport.checksum.set(Be16::from_raw(new));
    }

    /// Updates the transport checksum through the frame, which knows whether it is still to be
    /// filled in (TC: CHECKSUM_PARTIAL). The transport header begins at byte `l4` of the frame. Places in the packet are void afterwards.
    #[inline(always)]
    pub fn frame_checksum<F: Frame>(&self, frame: &mut F, proto: u8, l4: usize) -> bool {
        let offset = l4 + checksum_offset(proto);
        let ports = port_delta(self.transport, self.addresses);
        frame.transport_checksum(offset, self.addresses, ports, proto == IPPROTO_UDP)
    }
}

#[inline(always)]
fn checksum_offset(proto: u8) -> usize {
    if proto == IPPROTO_TCP { offset_of!(Tcp, checksum) } else { offset_of!(Udp, checksum) }
}

/// One hop without translation.
#[inline(always)]
pub fn take_hop(ip: &Ip<'_>) {
    match ip.l3 {
        L3::V4(at) => {
            field!(at, Ipv4, ttl).set(ip.hop_limit.wrapping_sub(1));
            let checksum = field!(at, Ipv4, checksum);
            let delta = Sum::default().sub16(Be16::new(0x0100).raw()).fold();
            checksum.set(Be16::from_raw(update(checksum.get().raw(), delta)));
        }
        L3::V6(at) => field!(at, Ipv6, hop_limit).set(ip.hop_limit.wrapping_sub(1)),
    }
}

/// Which kind of way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// To the kernel; a decapsulated packet is received by vxlan device `ifindex`, if not 0.
    Stack,
    /// Out of `ifindex` with the Ethernet header of `macs`.
    Frame,
    /// Into tunnel `vtep`, then as `Frame`.
    Tunnel,
}

/// A way out, looked up and found open. Fields beside each other and not an enum with contents:
/// LLVM merges such contents into one register, and the verifier does not follow a pointer through
/// a mask ("math between map_value pointer and -4294967296 is not allowed").
#[derive(Clone, Copy)]
pub struct Door<'e> {
    /// Why the way is closed; the other fields then say nothing. Not an `Err`, for the same reason.
    pub closed: Option<Reason>,
    /// Which kind.
    pub way: Way,
    /// Interface; with [`Exit::PEER`] the other end of that veth, by TC.
    pub ifindex: u32,
    /// Destination MAC; of the outer header for a tunnel.
    pub dst_mac: Option<At<'e, Mac>>,
    /// Source MAC; of the outer header for a tunnel.
    pub src_mac: Option<At<'e, Mac>>,
    /// The tunnel's end.
    pub vtep: Option<At<'e, Vtep>>,
}

impl<'e> Door<'e> {
    #[inline(always)]
    fn stack(device: u32) -> Self {
        let (dst_mac, src_mac) = (None, None);
        Self { closed: None, way: Way::Stack, ifindex: device, dst_mac, src_mac, vtep: None }
    }

    #[inline(always)]
    fn closed(reason: Reason) -> Self {
        Self { closed: Some(reason), ..Self::stack(0) }
    }

    #[inline(always)]
    fn frame(ifindex: u32, dst: At<'e, Mac>, src: At<'e, Mac>) -> Self {
        let (dst_mac, src_mac) = (Some(dst), Some(src));
        Self { way: Way::Frame, dst_mac, src_mac, ..Self::stack(ifindex) }
    }

    /// Whether the outer headers are IPv6's, whose UDP checksum must be right.
    #[inline(always)]
    fn is_tunnel_v6(&self) -> bool {
        self.vtep.is_some_and(|vtep| encap::outer_len(vtep) == encap::OUTER_V6)
    }

    /// Whether we are the router on this way (the kernel is on the other).
    #[inline(always)]
    pub fn takes_hop(&self) -> bool {
        self.way != Way::Stack
    }
}

/// Looks a way out up. Nothing has been written yet.
///
/// # Closed
/// `TableBroken` (pass); `HopLimitExceeded`, `NextHopUnresolved`, `TooBig` (drop). What a packet that
/// is too big may have is left for its answer.
#[inline(always)]
pub fn open<'e, E: Env>(
    env: &'e E,
    exit: At<'e, Exit>,
    packet: &Located<'_>,
    tunnel: u32,
) -> Door<'e> {
    let kind = field!(exit, Exit, kind).get();
    if kind == ExitKind::Stack as u8 {
        return Door::stack(if packet.cut == 0 { 0 } else { tunnel_device(env, tunnel) });
    }
    if packet.ip.hop_limit <= 1 {
        return Door::closed(Reason::HopLimitExceeded);
    }
    let index = field!(exit, Exit, index).get();
    if kind == ExitKind::Frame as u8 {
        return Door::frame(index, field!(exit, Exit, dst_mac), field!(exit, Exit, src_mac));
    }
    let (hop, vtep, outer) = if kind == ExitKind::Tunnel as u8 {
        let Some(vtep) = env.vtep(index) else { return Door::closed(Reason::TableBroken) };
        (field!(vtep, Vtep, nexthop).get(), Some(vtep), encap::outer_len(vtep))
    } else {
        (index, None, 0)
    };
    let Some(hop) = env.next_hop(hop) else { return Door::closed(Reason::NextHopUnresolved) };
    let ifindex = field!(hop, NextHop, ifindex).get();
    if ifindex == 0 {
        return Door::closed(Reason::NextHopUnresolved);
    }
    let mtu = field!(hop, NextHop, mtu).get();
    if packet.largest() + outer > mtu {
        if let Some(scratch) = env.scratch() {
            let stopped = field!(scratch, Scratch, stopped);
            field!(stopped, Stopped, mtu).set(mtu.saturating_sub(outer));
        }
        return Door::closed(Reason::TooBig);
    }
    let door = Door::frame(ifindex, field!(hop, NextHop, dst_mac), field!(hop, NextHop, src_mac));
    Door { way: if vtep.is_some() { Way::Tunnel } else { Way::Frame }, vtep, ..door }
}

/// The way to a pod of this node.
///
/// # Closed
/// `HopLimit` (pass).
#[inline(always)]
pub fn open_pod<'e, E: Env>(
    env: &'e E,
    pod: At<'e, Pod>,
    redirect: bool,
    packet: &Located<'_>,
    tunnel: u32,
) -> Door<'e> {
    if !redirect {
        return Door::stack(tunnel_device(env, tunnel));
    }
    if packet.ip.hop_limit <= 1 {
        return Door::closed(Reason::HopLimit);
    }
    let ifindex = pod_index(pod);
    Door::frame(ifindex, field!(pod, Pod, pod_mac), field!(pod, Pod, host_mac))
}

/// The index of the way into a pod that gets frames.
#[inline(always)]
pub(crate) fn pod_index(pod: At<'_, Pod>) -> u32 {
    let peer = field!(pod, Pod, delivery).get() == Delivery::Peer as u16;
    field!(pod, Pod, ifindex).get() | if peer { Exit::PEER } else { 0 }
}

/// The kernel's vxlan device behind a VTEP, 0 if there is none.
#[inline(always)]
pub fn tunnel_device<E: Env>(env: &E, vtep: u32) -> u32 {
    env.vtep(vtep).map_or(0, |vtep| device_of(env, vtep))
}

#[inline(always)]
fn device_of<E: Env>(env: &E, vtep: At<'_, Vtep>) -> u32 {
    match env.tunnel(field!(vtep, Vtep, tunnel).get()) {
        Some(tunnel) => field!(tunnel, Tunnel, ifindex).get(),
        None => 0,
    }
}

/// A packet that is final but for its outer headers. It no longer borrows the frame.
#[derive(Clone, Copy)]
pub struct Departure<'e> {
    /// The way out.
    pub door: Door<'e>,
    /// Bytes to be cut off in front.
    pub cut: u32,
    /// VLAN tags that the frame leaves with.
    pub tags: Option<At<'e, [Be32; 2]>>,
    /// What outer headers need to know.
    pub inside: Inside,
    /// Why the packet goes.
    pub reason: Reason,
    /// On whose account.
    pub owner: Owner,
    /// Bits of the inner ECN field that are still to be changed.
    pub ecn: u32,
    /// What is left for the frame to do about sums; at TC alone.
    pub sums: Sums,
}

/// What a changed packet owes to its sums that only the frame can pay: TC updates the transport
/// checksum by the kernel's helper (docs/adr/0006), and tells it what no checksum makes up for.
#[derive(Clone, Copy)]
pub struct Sums {
    /// Place of the transport checksum in the frame as it came, 0 if it stays.
    at: u32,
    /// The transport is UDP: no checksum stays none.
    udp: bool,
    /// What the addresses add to the transport checksum.
    addresses: u16,
    /// What the ports add.
    ports: u16,
    /// What the packet's bytes add to a sum of all of them.
    packet: u16,
}

impl Sums {
    /// No more than the IP header changed; its ECN field perhaps not yet.
    #[inline(always)]
    pub fn of_header(packet: &Located<'_>, door: &Door<'_>, marked: bool) -> Self {
        let packet = header_delta(packet, door.takes_hop(), marked).fold();
        Self { at: 0, udp: false, addresses: 0, ports: 0, packet }
    }

    /// Addresses and ports changed.
    #[inline(always)]
    pub fn of_rewrite(packet: &Located<'_>, door: &Door<'_>, rewrite: &Rewrite<'_>) -> Self {
        let udp = packet.ip.proto == IPPROTO_UDP;
        let front = packet.cut + packet.tags + size_of::<Ethernet>() as u32;
        let at = front + packet.ip.header_len + checksum_offset(packet.ip.proto) as u32;
        let addresses = rewrite.addresses;
        let ports = port_delta(rewrite.transport, addresses);
        Self { at, udp, addresses, ports, ..Self::of_header(packet, door, true) }
    }

    /// Addresses changed, and there is no transport header to make up for them.
    #[inline(always)]
    pub fn of_addresses(packet: &Located<'_>, door: &Door<'_>, rewrite: &Rewrite<'_>) -> Self {
        let mut delta = header_delta(packet, door.takes_hop(), true);
        if !packet.ip.l3.is_v4() {
            delta = delta.add16(rewrite.addresses);
        }
        Self { at: 0, udp: false, addresses: 0, ports: 0, packet: delta.fold() }
    }

    /// Pays. False if the frame does not take it; places in it are void afterwards.
    #[inline(always)]
    fn settle<F: Frame>(&self, frame: &mut F) -> bool {
        let at = self.at as usize;
        if at != 0 && !frame.transport_checksum(at, self.addresses, self.ports, self.udp) {
            return false;
        }
        if self.packet != 0 {
            frame.packet_sum(self.packet);
        }
        true
    }
}

/// What hop limit and ECN field add to the sum of the packet's bytes. IPv4's header checksum makes up
/// for them.
#[inline(always)]
fn header_delta(packet: &Located<'_>, hop: bool, marked: bool) -> Sum {
    let word = |high: u8, low: u8| u16::from_ne_bytes([high, low]);
    let mut sum = Sum::default();
    let L3::V6(at) = packet.ip.l3 else { return sum };
    if hop {
        sum = sum.add16(word(0, packet.ip.hop_limit.wrapping_sub(1)));
        sum = sum.sub16(word(0, packet.ip.hop_limit));
    }
    if packet.ecn != 0 {
        let now = (field!(at, Ipv6, version_class_flow).get().host() >> 16) as u8 & 0x30;
        let bits = (packet.ecn as u8) << 4;
        let (old, new) = if marked { (now ^ bits, now) } else { (now, now ^ bits) };
        sum = sum.sub16(word(0, old)).add16(word(0, new));
    }
    sum
}

/// Whether the plain form knows all that outer headers need.
#[inline(always)]
pub fn is_plain(door: &Door<'_>, packet: &Located<'_>) -> bool {
    !door.is_tunnel_v6() || encap::is_summed(packet)
}

/// Writes the Ethernet header for a way out, and gathers what outer headers will need; the inner
/// frame's sum only if its headers tell it (`summed`).
#[inline(always)]
pub fn address(door: &Door<'_>, packet: &Located<'_>, summed: bool, port: Be16) -> Inside {
    let (dst, src) = (field!(packet.eth, Ethernet, dst), field!(packet.eth, Ethernet, src));
    let mut inside = Inside { ip_len: packet.ip.len, port, class: 0, sum: 0 };
    if packet.tags != 0 && door.takes_hop() {
        let v4 = packet.ip.l3.is_v4();
        field!(packet.eth, Ethernet, ethertype).set(if v4 {
            ETHERTYPE_IPV4
        } else {
            ETHERTYPE_IPV6
        });
    }
    if let Some(vtep) = door.vtep {
        dst.copy_from(field!(vtep, Vtep, remote_mac));
        src.copy_from(field!(vtep, Vtep, local_mac));
        inside.class = class(&packet.ip);
        if summed && door.is_tunnel_v6() {
            inside.sum = encap::inner_sum(packet);
        }
    } else if let (Some(new_dst), Some(new_src)) = (door.dst_mac, door.src_mac) {
        dst.copy_from(new_dst);
        src.copy_from(new_src);
    } else if packet.cut != 0 && door.ifindex == 0 {
        // Without a vxlan device the kernel must take the inner frame for one of the uplink's own.
        dst.copy_from(field!(packet.outer, Ethernet, dst));
    }
    inside
}

/// Sends a packet on its way: the head's one move, and the outer headers.
///
/// The mark for TC comes first, because some drivers take none: what was not changed is then left to
/// the kernel as it came.
///
/// # Errors
/// `NoMetadata` (pass); `HeadRoom` (drop).
#[inline(always)]
pub fn leave<P: Form, E: Env, F: Frame>(
    env: &E,
    frame: &mut F,
    departure: &Departure<'_>,
) -> Step<Verdict> {
    if P::TC {
        return leave_tc::<P, E, F>(env, frame, departure);
    }
    let stop = Stop { reason: Reason::HeadRoom, service: departure.owner.service };
    let cut = departure.cut as i32;
    let door = departure.door;
    let mut inside = departure.inside;
    if P::GENERAL && door.is_tunnel_v6() {
        let len = size_of::<Ethernet>() as u32 + inside.ip_len;
        inside.sum = frame.sum(departure.cut, len);
    }
    if !door.takes_hop() && door.ifindex != 0 && !frame.hand_over_mark(door.ifindex) {
        let untouched = departure.reason == Reason::DecapLocal;
        return Err(if untouched { Reason::NoMetadata.into() } else { stop });
    }
    let by_peer = door.ifindex & Exit::PEER != 0;
    if by_peer && !frame.peer_mark(door.ifindex & !Exit::PEER) {
        return Err(stop);
    }
    let outer = match departure.tags {
        Some(tags) => tags_len(tags) as i32,
        None => door.vtep.map_or(0, |vtep| encap::outer_len(vtep) as i32),
    };
    if cut != outer && !frame.adjust_head(cut - outer) {
        return Err(stop);
    }
    if departure.ecn != 0 {
        change_ecn_of_frame(frame.view(), departure.ecn);
    }
    if let (Some(vtep), Some(dst), Some(src)) = (door.vtep, door.dst_mac, door.src_mac)
        && !encap::write(frame, vtep, dst, src, &inside)
    {
        return Err(stop);
    }
    if let (Some(tags), Some(dst), Some(src)) = (departure.tags, door.dst_mac, door.src_mac)
        && !put_tags(frame, tags, dst, src)
    {
        return Err(stop);
    }
    let passes = by_peer || !door.takes_hop();
    let action = if passes { Action::Pass } else { out_of(frame, door.ifindex) };
    Ok(Verdict { action, reason: departure.reason, owner: departure.owner })
}

/// The same at TC: there is no mark, because the packet is handed over here, and what the kernel's
/// helpers cannot encapsulate the kernel's vxlan device does.
///
/// # Errors
/// `HeadRoom`, `FlowChanged` (drop).
#[inline(always)]
fn leave_tc<P: Form, E: Env, F: Frame>(
    env: &E,
    frame: &mut F,
    departure: &Departure<'_>,
) -> Step<Verdict> {
    let stop = |reason| Stop { reason, service: departure.owner.service };
    let (door, cut) = (departure.door, departure.cut);
    let mut inside = departure.inside;
    if !departure.sums.settle(frame) {
        return Err(stop(Reason::FlowChanged));
    }
    let mut whole = frame.segment() == 0;
    if P::GENERAL && door.is_tunnel_v6() && whole {
        // A checksum that is still to be filled in would be summed up as it is now.
        whole = departure.sums.at == 0 || !frame.is_checksum_pending(departure.sums.at);
        let len = size_of::<Ethernet>() as u32 + inside.ip_len;
        inside.sum = frame.sum(cut, len);
    }
    if cut != 0 && !frame.adjust_head(cut as i32) {
        return Err(stop(Reason::HeadRoom));
    }
    if departure.ecn != 0 {
        change_ecn_of_frame(frame.view(), departure.ecn);
    }
    let mut action = match (door.takes_hop(), door.ifindex) {
        (true, ifindex) if ifindex & Exit::PEER != 0 => Action::Peer(ifindex & !Exit::PEER),
        (true, ifindex) => Action::Redirect(ifindex),
        (false, 0) => Action::Pass,
        (false, device) => Action::Receive(device),
    };
    if let (Some(vtep), Some(dst), Some(src)) = (door.vtep, door.dst_mac, door.src_mac) {
        let v4 = encap::outer_len(vtep) == encap::OUTER_V4;
        let wrapped = whole && frame.wrap(encap::outer_len(vtep), v4);
        if !wrapped {
            let device = device_of(env, vtep);
            if device == 0 {
                return Err(stop(Reason::HeadRoom));
            }
            action = Action::Redirect(device);
        } else if !encap::write(frame, vtep, dst, src, &inside) {
            return Err(stop(Reason::HeadRoom));
        }
    }
    Ok(Verdict { action, reason: departure.reason, owner: departure.owner })
}

/// Bytes of a record's VLAN tags.
#[inline(always)]
fn tags_len(tags: At<'_, [Be32; 2]>) -> u32 {
    let none = Be32::new(0);
    if tags.element(0).get() == none {
        0
    } else if tags.element(1).get() == none {
        TAG_LEN
    } else {
        2 * TAG_LEN
    }
}

/// Writes addresses and tags in front of the EtherType. False if there is no room.
#[inline(always)]
fn put_tags<F: Frame>(
    frame: &F,
    tags: At<'_, [Be32; 2]>,
    dst: At<'_, Mac>,
    src: At<'_, Mac>,
) -> bool {
    let view = frame.view();
    let Some(eth) = view.at::<Ethernet>() else { return false };
    field!(eth, Ethernet, dst).copy_from(dst);
    field!(eth, Ethernet, src).copy_from(src);
    for i in 0..2 {
        let tag = tags.element(i).get();
        if tag == Be32::new(0) {
            break;
        }
        let place = offset_of!(Ethernet, ethertype) + (i * TAG_LEN) as usize;
        let Some(at) = view.skip(place).at::<Be32>() else { return false };
        at.set(tag);
    }
    true
}

/// Changes bits of the ECN field; the IPv4 header checksum follows.
#[inline(always)]
fn change_ecn(l3: L3<'_>, bits: u32) {
    match l3 {
        L3::V4(at) => {
            let tos = field!(at, Ipv4, tos);
            let (old, new) = (tos.get(), tos.get() ^ bits as u8);
            tos.set(new);
            let word = |tos: u8| Be16::new(tos as u16).raw();
            let delta = Sum::default().sub16(word(old)).add16(word(new)).fold();
            let checksum = field!(at, Ipv4, checksum);
            checksum.set(Be16::from_raw(update(checksum.get().raw(), delta)));
        }
        L3::V6(at) => {
            let first = field!(at, Ipv6, version_class_flow);
            first.set(Be32::new(first.get().host() ^ bits << 20));
        }
    }
}

/// The same in a frame without tags, which a tunnel's inner frame is.
#[inline(always)]
fn change_ecn_of_frame(view: View<'_>, bits: u32) {
    let l3 = view.skip(size_of::<Ethernet>());
    let Some(eth) = view.at::<Ethernet>() else { return };
    if field!(eth, Ethernet, ethertype).get() == ETHERTYPE_IPV4 {
        if let Some(at) = l3.at::<Ipv4>() {
            change_ecn(L3::V4(at), bits);
        }
    } else if let Some(at) = l3.at::<Ipv6>() {
        change_ecn(L3::V6(at), bits);
    }
}

/// The ECN field (RFC 3168 section 5).
#[inline(always)]
pub fn ecn(ip: &Ip<'_>) -> u8 {
    class(ip) & Vtep::ECN
}

/// Type of service or traffic class: DSCP (RFC 2474) and ECN.
#[inline(always)]
fn class(ip: &Ip<'_>) -> u8 {
    match ip.l3 {
        L3::V4(at) => field!(at, Ipv4, tos).get(),
        L3::V6(at) => (field!(at, Ipv6, version_class_flow).get().host() >> 20) as u8,
    }
}

#[inline(always)]
fn out_of<F: Frame>(frame: &F, ifindex: u32) -> Action {
    if ifindex == frame.ingress_ifindex() { Action::Transmit } else { Action::Redirect(ifindex) }
}

/// Renews a record's time stamp and state, both only when they change: the established path does
/// not write. The packet stands in `scratch`; `new` if it made the record.
#[inline(always)]
pub fn touch<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
    found: &Found<'_>,
    flags: u8,
    reply: bool,
    new: bool,
) {
    let r = found.record;
    let now = env.now();
    let seen = field!(r, FlowRecord, seen);
    let timeouts = field!(settings, Settings, timeouts);
    if now.wrapping_sub(seen.get()) > field!(timeouts, Timeouts, stamp).get() {
        seen.set(now);
    }
    let proto = field!(r, FlowRecord, proto).get();
    let state = field!(r, FlowRecord, state);
    let old = state.get();
    if proto == IPPROTO_TCP {
        // The SYN that made the record says nothing more.
        if !(tcp::is_quiet(r, scratch, old, flags, reply) || new && tcp::is_syn(flags)) {
            env.follow(found.slot, found.tag, tcp::Segment::new(flags, reply));
        }
        return;
    }
    let new = old | flow_state::REPLIED | flow_state::CONFIRMED;
    if reply && new != old {
        state.set(new);
        field!(r, FlowRecord, timeout).set(flow::timeout(timeouts, proto, new));
    }
}
