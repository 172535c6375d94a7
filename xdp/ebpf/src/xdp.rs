//! A frame at the XDP hook.

use crate::maps::{sl_jump_v1, sl_scratch_v1};
use crate::trap;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_xdp_get_buff_len, bpf_xdp_load_bytes};
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use sluice_abi::{Hook, Lane, SCRATCH_BYTES, Trap};
use sluice_datapath::access::{Frame, opaque};
use sluice_datapath::csum;

/// What XDP leaves in front of a packet for TC ingress.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct HandOver {
    /// [`HAND_OVER_MAGIC`].
    pub magic: u32,
    /// Interface that shall receive the packet.
    pub ifindex: u32,
}

/// Tells our metadata from another program's. Metadata cannot come from the wire.
pub const HAND_OVER_MAGIC: u32 = 0x736c_7563; // "sluc"
/// The same: the packet is for the other end of the veth.
pub const PEER_MAGIC: u32 = 0x736c_7570; // "slup"

/// A frame at the XDP hook. Most lie in one buffer, and then their length is a difference of two
/// pointers. Whether one does costs a helper call, which only the programs with `WHOLE` make for each
/// frame.
pub struct XdpFrame<const WHOLE: bool>(*mut xdp_md);

/// Chunks that a sum covers at most.
const MOST_CHUNKS: u32 = 16_384 / SCRATCH_BYTES;

impl<const WHOLE: bool> XdpFrame<WHOLE> {
    /// Writes a note for TC in front of the packet.
    #[inline(always)]
    fn mark(&mut self, magic: u32, ifindex: u32) -> bool {
        const LEN: usize = size_of::<HandOver>();
        trap::count(Trap::AdjustMeta);
        // SAFETY: the context is valid while the program runs.
        if unsafe { bpf_xdp_adjust_meta(self.0, -(LEN as i32)) } != 0 {
            return false;
        }
        // SAFETY: as in `start`.
        let meta = unsafe { (&raw const (*self.0).data_meta).read_volatile() } as usize as *mut u8;
        let data = self.start();
        if meta.wrapping_add(LEN) > data {
            return false;
        }
        // SAFETY: `meta..meta + LEN` lies in front of `data`, as was just checked.
        unsafe { meta.cast::<HandOver>().write(HandOver { magic, ifindex }) };
        true
    }

    /// The frame of a program's context.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self(ctx)
    }

    /// Bytes in all buffers.
    #[inline(always)]
    fn whole_len(&self) -> usize {
        trap::count(Trap::BufferLength);
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_xdp_get_buff_len(self.0) as usize }
    }

    /// Bytes in the first buffer.
    #[inline(always)]
    fn linear_len(&self) -> usize {
        (self.end() as usize).wrapping_sub(self.start() as usize)
    }
}

// SAFETY: the kernel gives `data..data_end` to the program until the next helper that moves it;
// those are called only by `&mut self` methods.
unsafe impl<const WHOLE: bool> Frame for XdpFrame<WHOLE> {
    // The reads are volatile so that LLVM does not hoist them into a caller as a 32-bit scalar,
    // which the verifier refuses ("R2 invalid mem access 'scalar'").
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
        if WHOLE { self.whole_len() } else { self.linear_len() }
    }
    #[inline(always)]
    fn is_split(&self) -> bool {
        self.whole_len() > self.linear_len()
    }
    #[inline(always)]
    fn adjust_head(&mut self, delta: i32) -> bool {
        trap::count(Trap::AdjustHead);
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_xdp_adjust_head(self.0, delta) == 0 }
    }
    #[inline(always)]
    fn cut_tail(&mut self, bytes: u32) -> bool {
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_xdp_adjust_tail(self.0, (bytes as i32).wrapping_neg()) == 0 }
    }
    #[inline(always)]
    fn take_options_out(&mut self, _len: u32) -> u32 {
        0
    }
    #[inline(always)]
    fn is_checksum_pending(&mut self, _offset: u32) -> bool {
        false
    }
    #[inline(always)]
    fn hand_over_mark(&mut self, ifindex: u32) -> bool {
        self.mark(HAND_OVER_MAGIC, ifindex)
    }
    #[inline(always)]
    fn peer_mark(&mut self, ifindex: u32) -> bool {
        self.mark(PEER_MAGIC, ifindex)
    }
    #[inline(always)]
    fn transport_checksum(&mut self, offset: usize, addresses: u16, ports: u16, udp: bool) -> bool {
        let Some(at) = self.view().skip(offset).at::<u16>() else { return false };
        let delta = csum::Sum(addresses as u64).add16(ports).fold();
        at.set(if udp { csum::update_udp(at.get(), delta) } else { csum::update(at.get(), delta) });
        true
    }
    #[inline(always)]
    fn packet_sum(&mut self, _delta: u16) {}
    #[inline(always)]
    fn sum(&self, offset: u32, len: u32) -> u16 {
        sl_sum(self.0, offset, len) as u16
    }
    #[inline(always)]
    fn change_lane(&mut self, hook: Hook, lane: Lane) -> bool {
        // SAFETY: nothing of this program lives on where another takes over.
        unsafe { sl_jump_v1.tail_call(&XdpContext::new(self.0), lane.slot(hook)) };
        false
    }
    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw const (*self.0).ingress_ifindex).read_volatile() }
    }
}

/// One's complement sum of `len` bytes of the packet from `offset` on, 0 if they are not there or too
/// many. A function of its own: the verifier follows its loop once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_sum(ctx: *mut xdp_md, offset: u32, len: u32) -> u64 {
    sum_up(offset, len, |offset, bytes, len| {
        // SAFETY: the context is valid while the program runs, `bytes` by the caller.
        unsafe { bpf_xdp_load_bytes(ctx, offset, bytes, len) == 0 }
    })
}

/// Sums a packet up, chunk by chunk through the scratch room. `load` copies bytes of the packet (from
/// where, whereto, how many) and says whether they are there.
#[inline(always)]
pub fn sum_up(offset: u32, len: u32, load: impl Fn(u32, *mut c_void, u32) -> bool) -> u64 {
    const CHUNK: u32 = SCRATCH_BYTES;
    let Some(scratch) = sl_scratch_v1.get_ptr_mut(0) else { return 0 };
    // SAFETY: a map value.
    let bytes = unsafe { &raw mut (*scratch).bytes };
    let (mut sum, mut done) = (0u32, 0u32);
    for _ in 0..MOST_CHUNKS {
        if done + CHUNK > len {
            break;
        }
        if !load(offset + done, bytes.cast(), CHUNK) {
            return 0;
        }
        // SAFETY: `bytes` is CHUNK bytes long.
        sum = match unsafe { add(bytes.cast(), sum) } {
            Some(sum) => sum,
            None => return 0,
        };
        done += CHUNK;
    }
    let rest = len.wrapping_sub(done);
    if rest >= CHUNK {
        return 0;
    }
    if rest != 0 {
        // From one to CHUNK, in a way that the verifier sees.
        let rest = (opaque(rest as u64 - 1) as u32 & (CHUNK - 1)) + 1;
        // SAFETY: a map value, written word by word.
        unsafe {
            let words: *mut u64 = bytes.cast();
            for i in 0..CHUNK as usize / 8 {
                words.wrapping_add(i).write_volatile(0);
            }
        }
        if !load(offset + done, bytes.cast(), rest) {
            return 0;
        }
        // SAFETY: as above; zero from `rest` on.
        sum = match unsafe { add(bytes.cast(), sum) } {
            Some(sum) => sum,
            None => return 0,
        };
    }
    csum::Sum(sum as u64).fold() as u64
}

/// Adds the scratch room at `bytes` to `sum`.
///
/// # Safety
/// `bytes` points to [`SCRATCH_BYTES`] bytes of a map value.
#[inline(always)]
unsafe fn add(bytes: *mut u32, sum: u32) -> Option<u32> {
    // SAFETY: by the caller.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes, SCRATCH_BYTES, sum) };
    u32::try_from(sum).ok()
}
