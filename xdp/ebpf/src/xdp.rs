//! A frame at the XDP hook.

use crate::trap;
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta};
use sluice_abi::Trap;
use sluice_datapath::access::Frame;
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

/// A frame at the XDP hook.
pub struct XdpFrame(*mut xdp_md);

impl XdpFrame {
    /// The frame of a program's context.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self(ctx)
    }
}

// SAFETY: the kernel gives `data..data_end` to the program until the next helper that moves it;
// those are called only by `&mut self` methods.
unsafe impl Frame for XdpFrame {
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
    fn adjust_head(&mut self, delta: i32) -> bool {
        trap::count(Trap::AdjustHead);
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_xdp_adjust_head(self.0, delta) == 0 }
    }
    #[inline(always)]
    fn hand_over_mark(&mut self, ifindex: u32) -> bool {
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
        unsafe { meta.cast::<HandOver>().write(HandOver { magic: HAND_OVER_MAGIC, ifindex }) };
        true
    }
    #[inline(always)]
    fn transport_checksum(&mut self, offset: usize, addresses: u16, ports: u16, udp: bool) -> bool {
        let Some(at) = self.view().skip(offset).at::<u16>() else { return false };
        let delta = csum::Sum(addresses as u64).add16(ports).fold();
        at.set(if udp { csum::update_udp(at.get(), delta) } else { csum::update(at.get(), delta) });
        true
    }
    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (&raw const (*self.0).ingress_ifindex).read_volatile() }
    }
}
