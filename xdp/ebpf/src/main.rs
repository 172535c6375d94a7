//! The BPF programs of Sluice: thin shells around `sluice-datapath`.
//!
//! | program      | hook | attached to                                                     |
//! |--------------|------|-----------------------------------------------------------------|
//! | `xdp_node`   | XDP  | uplinks                                                         |
//! | `tc_uplink`  | TC   | ingress of uplinks: receives what XDP handed over               |
//! | `tc_node`    | TC   | ingress of uplinks without XDP: does what `xdp_node` does       |
//! | `tc_tunnel`  | TC   | ingress of the kernel's vxlan devices: what nobody has seen     |
//! | `tc_ingress` | TC   | ingress of the host sides of pods                               |
//! | `tc_egress`  | TC   | uplinks, the kernel's vxlan devices, host sides of pods         |
//! | `*_general`  | both | reached by a tail call from the above: headers of any length    |
//! | `*_icmp`     | both | reached by a tail call from all the above: ICMP                 |
//! | `*_answer`   | both | reached by a tail call: ICMP errors and resets                  |
//! | `*_fragment` | both | reached from those: fragments behind the first                  |
//! | `xdp_pass`   | XDP  | the far end of a veth that must receive redirected frames       |
//! | `xdp_clock`  | –    | run by the agent only: how long is a jiffy?                     |
//!
//! What may stand here: map statics, packet pointers, helper calls. No packet logic.
#![no_std]
#![no_main]

mod kernel;
mod maps;
mod skb;
mod trap;
mod xdp;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use kernel::Kernel;
use skb::{
    GENERAL_HEADERS, HEADERS, ICMP_HEADERS, NODE_GENERAL_HEADERS, NODE_HEADERS, NODE_ICMP_HEADERS,
};
use sluice_abi::{Hook, Lane, Trap};
use sluice_datapath::access::Frame;
use sluice_datapath::parse::{AtTc, Form, General, Later, Plain};
use sluice_datapath::verdict::Action;
use sluice_datapath::{answer, icmp, ingress, tc};

/// `BPF_F_INGRESS` (kernel include/uapi/linux/bpf.h).
const BPF_F_INGRESS: u64 = 1;
/// "Go on": the next program of the chain decides (TCX_NEXT, TC_ACT_UNSPEC).
const TC_NEXT: i32 = -1;

/// Ingress of an uplink.
#[xdp(frags)]
pub fn xdp_node(ctx: XdpContext) -> u32 {
    node::<Plain, false>(ctx)
}

/// Goes on where `xdp_node` stops at tags, options or extension headers.
#[xdp(frags)]
pub fn xdp_general(ctx: XdpContext) -> u32 {
    node::<General, true>(ctx)
}

/// Goes on where the above stop at ICMP.
#[xdp(frags)]
pub fn xdp_icmp(ctx: XdpContext) -> u32 {
    let mut frame = xdp::XdpFrame::<true>::new(ctx.ctx);
    leave(icmp::uplink::<General, _, _>(&Kernel, &mut frame).action)
}

/// Goes on where `xdp_general` stops at fragments behind the first.
#[xdp(frags)]
pub fn xdp_fragment(ctx: XdpContext) -> u32 {
    node::<Later, true>(ctx)
}

#[inline(always)]
fn node<P: Form, const WHOLE: bool>(ctx: XdpContext) -> u32 {
    let mut frame = xdp::XdpFrame::<WHOLE>::new(ctx.ctx);
    leave(ingress::xdp::<P, _, _>(&Kernel, &mut frame).action)
}

#[inline(always)]
fn leave(action: Action) -> u32 {
    match action {
        Action::Pass | Action::Receive(_) | Action::Peer(_) => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit => XDP_TX,
        Action::Redirect(ifindex) => match redirect(ifindex, 0) as u32 {
            XDP_REDIRECT => XDP_REDIRECT,
            _ => XDP_DROP,
        },
    }
}

/// Answers what `xdp_node` and `xdp_general` cannot let go on.
#[xdp(frags)]
pub fn xdp_answer(ctx: XdpContext) -> u32 {
    let mut frame = xdp::XdpFrame::<true>::new(ctx.ctx);
    match answer::answer(&Kernel, &mut frame, Hook::Xdp).action {
        Action::Transmit => XDP_TX,
        Action::Drop => XDP_DROP,
        _ => XDP_PASS,
    }
}

/// Ingress of uplinks: hands what XDP marked to the interface that is to receive it.
///
/// It writes no packet byte, and that is its point: the kernel copies a frame that somebody else
/// sees too (a packet socket: tcpdump) before a program that writes may have it, and the copy has no
/// metadata (net/core/filter.c, `bpf_unclone_prologue`; net/core/skbuff.c, `pskb_expand_head`).
#[classifier]
pub fn tc_uplink(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if let Some(ifindex) = frame.hand_over_to_peer() {
        // SAFETY: no memory is passed.
        return (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32;
    }
    match frame.hand_over() {
        // SAFETY: no memory is passed.
        Some(ifindex) => (unsafe { bpf_redirect(ifindex, BPF_F_INGRESS) }) as i32,
        None => TC_NEXT,
    }
}

/// Ingress of an uplink without XDP.
#[classifier]
pub fn tc_node(ctx: TcContext) -> i32 {
    tc_up::<Plain>(ctx, NODE_HEADERS)
}

/// Ingress of the kernel's vxlan devices. What was handed to them passes, all else is `tc_node`'s. It
/// writes no packet byte, for the reason that `tc_uplink` writes none.
#[classifier]
pub fn tc_tunnel(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if frame.hand_over().is_some() || frame.take_mark() {
        return TC_NEXT;
    }
    frame.change_lane(Hook::TcNode, Lane::Fast);
    TC_NEXT
}

/// Goes on where `tc_node` stops at options or extension headers.
#[classifier]
pub fn tc_node_general(ctx: TcContext) -> i32 {
    tc_up::<General>(ctx, NODE_GENERAL_HEADERS)
}

/// Goes on where `tc_node_general` stops at fragments behind the first.
#[classifier]
pub fn tc_node_fragment(ctx: TcContext) -> i32 {
    tc_up::<Later>(ctx, NODE_GENERAL_HEADERS)
}

/// Goes on where the above stop at ICMP.
#[classifier]
pub fn tc_node_icmp(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(NODE_ICMP_HEADERS) {
        return TC_NEXT;
    }
    let action = icmp::uplink::<AtTc<General>, _, _>(&Kernel, &mut frame).action;
    if let Action::Receive(_) = action {
        frame.set_mark();
    }
    exit(action)
}

/// Answers what `tc_node` and `tc_node_general` cannot let go on.
#[classifier]
pub fn tc_node_answer(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(NODE_GENERAL_HEADERS) {
        return TC_NEXT;
    }
    exit(answer::answer(&Kernel, &mut frame, Hook::TcNode).action)
}

#[inline(always)]
fn tc_up<P: Form>(ctx: TcContext, headers: u32) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !P::GENERAL && frame.is_tagged() {
        return exit(ingress::tagged(&Kernel, &frame).action);
    }
    if !frame.pull(headers) {
        return TC_NEXT;
    }
    let action = ingress::xdp::<AtTc<P>, _, _>(&Kernel, &mut frame).action;
    if let Action::Receive(_) = action {
        frame.set_mark();
    }
    exit(action)
}

/// Ingress of the host sides of pods.
#[classifier]
pub fn tc_ingress(ctx: TcContext) -> i32 {
    tc_in::<Plain>(ctx, HEADERS)
}

/// Egress of uplinks, vxlan devices and of the host sides of pods.
#[classifier]
pub fn tc_egress(ctx: TcContext) -> i32 {
    tc_out::<Plain>(ctx, HEADERS)
}

/// Goes on where `tc_ingress` stops at tags, options or extension headers.
#[classifier]
pub fn tc_in_general(ctx: TcContext) -> i32 {
    tc_in::<General>(ctx, GENERAL_HEADERS)
}

/// Goes on where `tc_egress` stops at tags, options or extension headers.
#[classifier]
pub fn tc_out_general(ctx: TcContext) -> i32 {
    tc_out::<General>(ctx, GENERAL_HEADERS)
}

/// Goes on where the programs at TC ingress stop at ICMP.
#[classifier]
pub fn tc_in_icmp(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(ICMP_HEADERS) {
        return TC_NEXT;
    }
    exit(icmp::tc_ingress(&Kernel, &mut frame).action)
}

/// Goes on where the programs at TC egress stop at ICMP.
#[classifier]
pub fn tc_out_icmp(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(ICMP_HEADERS) {
        return TC_NEXT;
    }
    exit(icmp::tc_egress(&Kernel, &mut frame).action)
}

/// Answers what `tc_ingress` and `tc_in_general` cannot let go on.
#[classifier]
pub fn tc_in_answer(ctx: TcContext) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(GENERAL_HEADERS) {
        return TC_NEXT;
    }
    exit(answer::answer(&Kernel, &mut frame, Hook::TcIngress).action)
}

/// Goes on where `tc_in_general` stops at fragments behind the first.
#[classifier]
pub fn tc_in_fragment(ctx: TcContext) -> i32 {
    tc_later(ctx, Hook::TcIngress)
}

/// Goes on where `tc_out_general` stops at fragments behind the first.
#[classifier]
pub fn tc_out_fragment(ctx: TcContext) -> i32 {
    tc_later(ctx, Hook::TcEgress)
}

#[inline(always)]
fn tc_later(ctx: TcContext, hook: Hook) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(GENERAL_HEADERS) {
        return TC_NEXT;
    }
    exit(tc::later(&Kernel, &mut frame, hook).action)
}

#[inline(always)]
fn tc_in<P: Form>(ctx: TcContext, headers: u32) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(headers) {
        return TC_NEXT;
    }
    exit(tc::ingress::<P, _, _>(&Kernel, &mut frame).action)
}

#[inline(always)]
fn tc_out<P: Form>(ctx: TcContext, headers: u32) -> i32 {
    let mut frame = skb::SkbFrame::new(ctx.skb.skb);
    if !frame.pull(headers) {
        return TC_NEXT;
    }
    exit(tc::egress::<P, _, _>(&Kernel, &mut frame).action)
}

#[inline(always)]
fn exit(action: Action) -> i32 {
    match action {
        Action::Pass => TC_NEXT,
        Action::Drop => TC_ACT_SHOT,
        Action::Redirect(ifindex) => redirect(ifindex, 0),
        Action::Receive(ifindex) => redirect(ifindex, BPF_F_INGRESS),
        // SAFETY: no memory is passed.
        Action::Peer(ifindex) => (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32,
        Action::Transmit => TC_ACT_OK,
    }
}

#[inline(always)]
fn redirect(ifindex: u32, flags: u64) -> i32 {
    trap::count(Trap::Redirect);
    // SAFETY: no memory is passed.
    unsafe { bpf_redirect(ifindex, flags) as i32 }
}

/// Passes every packet. Attached to the pod's end of a veth pair it makes that end able to receive
/// redirected frames.
#[xdp(frags)]
pub fn xdp_pass(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// The low 31 bits of jiffies, for the agent, which runs it twice to learn how long a jiffy is.
#[xdp(frags)]
pub fn xdp_clock(_ctx: XdpContext) -> u32 {
    kernel::jiffies() & 0x7fff_ffff
}

/// Required by the language; code that reaches it does not pass the build's check of the object.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Some helpers may only be called by programs under a licence that the GPL accepts.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
