//! The wrapper of `sluice bench progrun`.
//!
//! BPF_PROG_TEST_RUN hands the same buffer to the program again and again, so that whatever moves
//! the head or rewrites bytes runs on its own leavings from the second time on. This wrapper is what
//! test-run runs: it puts head and bytes back to what they were, makes them the next flow's, and
//! tail-calls the program under test, which does not return here. With an empty target it measures
//! itself: the floor F of every figure.
//!
//! Frozen: a change moves every ratio that was ever published.
#![no_std]
#![no_main]
#![allow(non_upper_case_globals)]

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_PASS};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::btf_maps::{Array, ProgramArray};
use aya_ebpf::helpers::bpf_xdp_adjust_head;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use sluice_abi::{BENCH_MORE_WORDS, BENCH_WORDS, BenchRun};
use sluice_datapath::access::opaque;

#[btf_map]
pub static sl_bench_v1: Array<BenchRun, 1> = Array::new();
#[btf_map]
pub static sl_benchtgt_v1: ProgramArray<4> = ProgramArray::new();

/// Bytes that `xdp_bench_cut` cuts off: outer headers over IPv4.
const CUT: i32 = 50;
/// Mask that keeps an offset below the template's end, for the verifier.
const OFFSET: usize = 0xff;

// Volatile: see `xdp.rs`.
#[inline(always)]
fn data(ctx: *mut xdp_md) -> usize {
    // SAFETY: the context is valid while the program runs.
    unsafe { (&raw const (*ctx).data).read_volatile() as usize }
}

#[inline(always)]
fn data_end(ctx: *mut xdp_md) -> usize {
    // SAFETY: as in `data`.
    unsafe { (&raw const (*ctx).data_end).read_volatile() as usize }
}

/// Restores, goes on to the next flow, runs the target.
#[xdp(frags)]
pub fn xdp_bench(ctx: XdpContext) -> u32 {
    if let Some(run) = sl_bench_v1.get_ptr_mut(0) {
        // SAFETY: a map value; `sluice bench` writes it only while this program does not run.
        let run = unsafe { &mut *run };
        if prepare(ctx.ctx, run) {
            // SAFETY: nothing of this program lives on.
            unsafe { sl_benchtgt_v1.tail_call(&ctx, run.target) };
        }
    }
    // Also when there is no target. The bench takes it for an error.
    XDP_ABORTED
}

#[inline(always)]
fn prepare(ctx: *mut xdp_md, run: &mut BenchRun) -> bool {
    // Opaque, or LLVM compares the end with start plus length, in 32 bits ("32-bit pointer arithmetic
    // prohibited").
    let len = opaque((data_end(ctx) as u64).wrapping_sub(data(ctx) as u64));
    let moved = (len as u32).wrapping_sub(run.len) as i32;
    // SAFETY: the context is valid while the program runs.
    if moved != 0 && unsafe { bpf_xdp_adjust_head(ctx, moved) } != 0 {
        return false;
    }
    let (start, end) = (data(ctx), data_end(ctx));
    if start + BENCH_WORDS * 8 > end {
        return false;
    }
    for (i, word) in run.template[..BENCH_WORDS].iter().enumerate() {
        // SAFETY: inside the packet, as was just checked.
        unsafe { (start as *mut u64).wrapping_add(i).write_unaligned(*word) };
    }
    if run.extended != 0 {
        if start + (BENCH_WORDS + BENCH_MORE_WORDS) * 8 > end {
            return false;
        }
        for (i, word) in run.template[BENCH_WORDS..].iter().enumerate() {
            // SAFETY: as above.
            unsafe { (start as *mut u64).wrapping_add(BENCH_WORDS + i).write_unaligned(*word) };
        }
    }
    let number = run.next;
    run.next = number.wrapping_add(1);
    let (address, port) = BenchRun::flow(BenchRun::flow_of(number, run.flow_mask));
    let (address, port) = (address.to_be(), port.to_be());
    put(start, end, run.address_at, address)
        && put(start, end, run.port_at, port)
        && put(start, end, run.id_at, !address)
        && put(start, end, run.balance_at, !address)
        && put(start, end, run.balance_at.wrapping_add(2), !port)
}

/// Writes two bytes of the packet.
#[inline(always)]
fn put(start: usize, end: usize, offset: u32, raw: u16) -> bool {
    let at = start + (offset as usize & OFFSET);
    if at + 2 > end {
        return false;
    }
    // SAFETY: inside the packet, as was just checked.
    unsafe { (at as *mut u16).write_unaligned(raw) };
    true
}

/// The empty target.
#[xdp(frags)]
pub fn xdp_bench_empty(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// Moves the head and nothing else.
#[xdp(frags)]
pub fn xdp_bench_cut(ctx: XdpContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    match unsafe { bpf_xdp_adjust_head(ctx.ctx, CUT) } {
        0 => XDP_PASS,
        _ => XDP_ABORTED,
    }
}

/// Required by the language; code that reaches it does not pass the build's check of the object.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// As in the product's object.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
