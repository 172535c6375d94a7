//! A packet at a TC hook.

use crate::maps::sl_jumptc_v1;
use crate::xdp::{HAND_OVER_MAGIC, HandOver, PEER_MAGIC, sum_up};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_csum_update, bpf_skb_load_bytes};
use aya_ebpf::helpers::{
    bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_change_tail,
    bpf_skb_change_type, bpf_skb_pull_data,
};
use aya_ebpf::programs::TcContext;
use sluice_abi::{Hook, Lane};
use sluice_datapath::access::Frame;
use sluice_datapath::parse::{MAX_EXTENSION_BYTES, TAG_LEN};
use sluice_datapath::wire::{ETHERTYPE_IPV4, Ethernet, Vxlan};

/// `BPF_F_PSEUDO_HDR`: the difference is in the pseudo header (kernel include/uapi/linux/bpf.h).
const BPF_F_PSEUDO_HDR: u64 = 1 << 4;
/// `BPF_F_MARK_MANGLED_0`: a UDP checksum of zero means none (RFC 768).
const BPF_F_MARK_MANGLED_0: u64 = 1 << 5;
/// For this host (kernel include/uapi/linux/if_packet.h).
const PACKET_HOST: u32 = 0;
/// Behind the IP header (kernel include/uapi/linux/bpf.h, `enum bpf_adj_room_mode`).
const BPF_ADJ_ROOM_NET: u32 = 0;
/// Behind the Ethernet header.
const BPF_ADJ_ROOM_MAC: u32 = 1;
/// Segments keep their size (kernel include/uapi/linux/bpf.h, as all flags here).
const BPF_F_ADJ_ROOM_FIXED_GSO: u64 = 1;
/// What comes in front is IPv4, IPv6.
const BPF_F_ADJ_ROOM_ENCAP_L3_IPV4: u64 = 1 << 1;
const BPF_F_ADJ_ROOM_ENCAP_L3_IPV6: u64 = 1 << 2;
/// And UDP, with an Ethernet header behind it.
const BPF_F_ADJ_ROOM_ENCAP_L4_UDP: u64 = 1 << 4;
const BPF_F_ADJ_ROOM_ENCAP_L2_ETH: u64 = 1 << 6;
/// Bytes of headers between UDP's and the inner IP header: VXLAN's and Ethernet's.
const BPF_ADJ_ROOM_ENCAP_L2_SHIFT: u64 = 56;
/// What remains is IPv4, IPv6, and was the other one (kernel 6.3).
const BPF_F_ADJ_ROOM_DECAP_L3_IPV4: u64 = 1 << 7;
const BPF_F_ADJ_ROOM_DECAP_L3_IPV6: u64 = 1 << 8;
/// Ethernet, IPv6 and TCP without options: what must lie in the linear part.
pub const HEADERS: u32 = 14 + 40 + 20;
/// The same with everything that the general form follows.
pub const GENERAL_HEADERS: u32 = HEADERS + 2 * TAG_LEN + MAX_EXTENSION_BYTES;
/// Headers of an uplink's packet, which may be in a tunnel: outer Ethernet, IPv6, UDP and VXLAN.
const OUTER: u32 = 14 + 40 + 8 + 8;
/// Plain headers of an uplink's packet.
pub const NODE_HEADERS: u32 = OUTER + HEADERS;
/// The same with everything that the general form follows; outside the tunnel that is less.
pub const NODE_GENERAL_HEADERS: u32 = OUTER + GENERAL_HEADERS;
/// The same with an ICMP error.
pub const NODE_ICMP_HEADERS: u32 = OUTER + ICMP_HEADERS;
/// The same up to the end of the headers that an ICMP error quotes.
pub const ICMP_HEADERS: u32 =
    14 + 40 + 2 * TAG_LEN + MAX_EXTENSION_BYTES + sluice_datapath::icmp::MAX_BYTES;

/// A packet at a TC hook.
pub struct SkbFrame(*mut __sk_buff);

impl SkbFrame {
    /// The packet of a program's context.
    #[inline(always)]
    pub fn new(ctx: *mut __sk_buff) -> Self {
        Self(ctx)
    }

    /// The interface to which XDP handed this packet, if it did.
    #[inline(always)]
    pub fn hand_over(&self) -> Option<u32> {
        self.note().filter(|note| note.magic == HAND_OVER_MAGIC).map(|note| note.ifindex)
    }

    /// The veth to whose other end XDP handed this packet, if it did; from now on the packet is for
    /// whoever receives it, whatever its destination MAC.
    #[inline(always)]
    pub fn hand_over_to_peer(&mut self) -> Option<u32> {
        let note = self.note().filter(|note| note.magic == PEER_MAGIC)?;
        // SAFETY: the context is valid while the program runs.
        let _changed = unsafe { bpf_skb_change_type(self.0, PACKET_HOST) };
        Some(note.ifindex)
    }

    #[inline(always)]
    fn note(&self) -> Option<HandOver> {
        // SAFETY: the context is valid while the program runs.
        let meta =
            unsafe { (&raw const (*self.0).data_meta).read_volatile() } as usize as *const u8;
        if meta.wrapping_add(size_of::<HandOver>()) > self.start().cast_const() {
            return None;
        }
        // SAFETY: `HandOver` lies between `data_meta` and `data`, as was just checked.
        Some(unsafe { meta.cast::<HandOver>().read() })
    }

    /// Says to `tc_tunnel` that this packet was handed to its device: by the kernel's mark, which cannot
    /// come from the wire. Another's mark stays; the packet is then counted there, too.
    #[inline(always)]
    pub fn set_mark(&mut self) {
        // SAFETY: the context is valid while the program runs.
        let mark = unsafe { &raw mut (*self.0).mark };
        // SAFETY: as above.
        unsafe {
            if mark.read_volatile() == 0 {
                mark.write_volatile(HAND_OVER_MAGIC);
            }
        }
    }

    /// Takes that mark off. Whether it was there.
    #[inline(always)]
    pub fn take_mark(&mut self) -> bool {
        // SAFETY: the context is valid while the program runs.
        let mark = unsafe { &raw mut (*self.0).mark };
        // SAFETY: as above.
        unsafe {
            if mark.read_volatile() != HAND_OVER_MAGIC {
                return false;
            }
            mark.write_volatile(0);
        }
        true
    }

    /// Whether a VLAN tag stands beside the packet (kernel net/core/dev.c, `skb_vlan_untag`).
    #[inline(always)]
    pub fn is_tagged(&self) -> bool {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw const (*self.0).vlan_present).read_volatile() != 0 }
    }

    /// The Ethernet header at `at`, in words: they lie aligned on the stack.
    #[inline(always)]
    fn link(&self, at: usize) -> Option<(u64, u32, u16)> {
        let view = self.view().skip(at & 0x7f);
        let (a, b, c) = (view.at::<u64>()?, view.skip(8).at::<u32>()?, view.skip(12).at::<u16>()?);
        Some((a.get(), b.get(), c.get()))
    }

    #[inline(always)]
    fn set_link(&self, at: usize, (a, b, c): (u64, u32, u16)) -> bool {
        let view = self.view().skip(at & 0x7f);
        let places = (view.at::<u64>(), view.skip(8).at::<u32>(), view.skip(12).at::<u16>());
        let (Some(at_a), Some(at_b), Some(at_c)) = places else { return false };
        at_a.set(a);
        at_b.set(b);
        at_c.set(c);
        true
    }

    /// Cuts bytes off in front: those behind the outermost Ethernet header, over which the one that is
    /// then the outermost is written.
    #[inline(always)]
    fn cut_head(&mut self, bytes: u32) -> bool {
        let (Some(old), Some(link)) = (self.link(0), self.link(bytes as usize)) else {
            return false;
        };
        let other = match link.2 {
            same if same == old.2 => 0,
            ethertype if ethertype == ETHERTYPE_IPV4.raw() => BPF_F_ADJ_ROOM_DECAP_L3_IPV4,
            _ => BPF_F_ADJ_ROOM_DECAP_L3_IPV6,
        };
        let by = (bytes as i32).wrapping_neg();
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO | other;
        // SAFETY: the context is valid while the program runs.
        let cut = unsafe { bpf_skb_adjust_room(self.0, by, BPF_ADJ_ROOM_MAC, flags) == 0 };
        cut && self.set_link(0, link)
    }

    /// Makes the first `headers` bytes linear and writable. False if the packet is too odd for that.
    #[inline(always)]
    pub fn pull(&mut self, headers: u32) -> bool {
        // SAFETY: the context is valid while the program runs.
        let len = unsafe { (&raw const (*self.0).len).read_volatile() };
        let want = if len < headers { len } else { headers };
        // SAFETY: as above.
        unsafe { bpf_skb_pull_data(self.0, want) == 0 }
    }
}

// SAFETY: the kernel gives `data..data_end` to the program until the next helper that moves it;
// those are called only by `&mut self` methods.
unsafe impl Frame for SkbFrame {
    #[inline(always)]
    fn start(&self) -> *mut u8 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw const (*self.0).data).read_volatile() as usize as *mut u8 }
    }
    #[inline(always)]
    fn end(&self) -> *mut u8 {
        // SAFETY: as in `start`.
        unsafe { (&raw const (*self.0).data_end).read_volatile() as usize as *mut u8 }
    }
    #[inline(always)]
    fn packet_len(&self) -> usize {
        // SAFETY: as in `start`.
        unsafe { (&raw const (*self.0).len).read_volatile() as usize }
    }
    /// Headers are in the first buffer, see [`SkbFrame::pull`].
    #[inline(always)]
    fn is_split(&self) -> bool {
        false
    }
    #[inline(always)]
    fn adjust_head(&mut self, delta: i32) -> bool {
        if delta > 0 {
            return self.cut_head(delta as u32);
        }
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_skb_change_head(self.0, delta.wrapping_neg() as u32, 0) == 0 }
    }
    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: as in `start`.
        unsafe { (&raw const (*self.0).gso_size).read_volatile() }
    }
    #[inline(always)]
    fn wrap(&mut self, len: u32, v4: bool) -> bool {
        const L2: u64 = (size_of::<Vxlan>() + size_of::<Ethernet>()) as u64;
        let Some(link) = self.link(0) else { return false };
        let l3 = if v4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO
            | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
            | BPF_F_ADJ_ROOM_ENCAP_L2_ETH
            | L2 << BPF_ADJ_ROOM_ENCAP_L2_SHIFT
            | l3;
        // SAFETY: the context is valid while the program runs.
        let made = unsafe { bpf_skb_adjust_room(self.0, len as i32, BPF_ADJ_ROOM_MAC, flags) == 0 };
        made && self.set_link(len as usize, link)
    }
    #[inline(always)]
    fn cut_tail(&mut self, bytes: u32) -> bool {
        let len = self.packet_len() as u32;
        // SAFETY: as above.
        bytes < len && unsafe { bpf_skb_change_tail(self.0, len - bytes, 0) == 0 }
    }
    #[inline(always)]
    fn take_options_out(&mut self, len: u32) -> u32 {
        let by = (len as i32).wrapping_neg();
        // SAFETY: as above.
        let taken = unsafe { bpf_skb_adjust_room(self.0, by, BPF_ADJ_ROOM_NET, 0) == 0 };
        if taken { len } else { 0 }
    }
    #[inline(always)]
    fn is_checksum_pending(&mut self, offset: u32) -> bool {
        let Some(field) = self.view().skip(offset as usize & 0x1ff).at::<u16>() else {
            return false;
        };
        let old = field.get();
        // What a pseudo header does not change is left out of a checksum that is still to be filled
        // in (net/core/utils.c, inet_proto_csum_replace_by_diff).
        // SAFETY: as above.
        if unsafe { bpf_l4_csum_replace(self.0, offset, 0, 1, 0) } != 0 {
            return false;
        }
        let Some(field) = self.view().skip(offset as usize & 0x1ff).at::<u16>() else {
            return false;
        };
        let pending = field.get() == old;
        field.set(old);
        pending
    }
    #[inline(always)]
    fn hand_over_mark(&mut self, _ifindex: u32) -> bool {
        false
    }
    #[inline(always)]
    fn peer_mark(&mut self, _ifindex: u32) -> bool {
        false
    }
    #[inline(always)]
    fn transport_checksum(&mut self, offset: usize, addresses: u16, ports: u16, udp: bool) -> bool {
        let zero = if udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        let offset = offset as u32;
        // SAFETY: the context is valid while the program runs. Size 0 in the flags: the third
        // argument is zero and the fourth is the difference.
        unsafe {
            bpf_l4_csum_replace(self.0, offset, 0, addresses as u64, BPF_F_PSEUDO_HDR | zero) == 0
                && (ports == 0 || bpf_l4_csum_replace(self.0, offset, 0, ports as u64, zero) == 0)
        }
    }
    #[inline(always)]
    fn packet_sum(&mut self, delta: u16) {
        // SAFETY: the context is valid while the program runs. The result says only whether there
        // was a sum to be changed.
        unsafe { bpf_csum_update(self.0, delta as u32) };
    }
    #[inline(always)]
    fn sum(&self, offset: u32, len: u32) -> u16 {
        sl_sumtc(self.0, offset, len) as u16
    }
    #[inline(always)]
    fn change_lane(&mut self, hook: Hook, lane: Lane) -> bool {
        // SAFETY: nothing of this program lives on where another takes over.
        unsafe { sl_jumptc_v1.tail_call(&TcContext::new(self.0), lane.slot(hook)) };
        false
    }
    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        // SAFETY: as in `start`.
        unsafe { (&raw const (*self.0).ifindex).read_volatile() }
    }
}

/// One's complement sum of `len` bytes of the packet from `offset` on, as `sl_sum`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_sumtc(ctx: *mut __sk_buff, offset: u32, len: u32) -> u64 {
    sum_up(offset, len, |offset, bytes, len| {
        // SAFETY: the context is valid while the program runs, `bytes` by the caller.
        unsafe { bpf_skb_load_bytes(ctx.cast(), offset, bytes, len) == 0 }
    })
}
