//! The tables as maps and the helpers of the kernel.

use crate::maps::*;
use crate::trap;
use aya_ebpf::bindings::bpf_spin_lock;
use aya_ebpf::helpers::{bpf_jiffies64, generated};
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet,
    Fragment, Frontend, FrontendKey, Near, NextHop, Pod, ReasonCounter, Scratch, ServiceCounter,
    Settings, SnatSlot, Trap, Tunnel, Vtep, VtepKey,
};
use sluice_datapath::access::At;
use sluice_datapath::decide::{self, Answer};
use sluice_datapath::env::Env;
use sluice_datapath::flow;
use sluice_datapath::fragment;
use sluice_datapath::tcp::{self, Segment};

/// The kernel that runs the program.
pub struct Kernel;

/// Low 32 bits of jiffies (bpf_jiffies64, inlined by the verifier: no call, no clock).
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: no memory is passed.
    unsafe { bpf_jiffies64() as u32 }
}

/// [`decide::answer`] as a global function, which the verifier checks once and by itself. It has
/// no argument: the compiler would leave the register of one that is not used undefined, and the
/// verifier refuse the call.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_decide() -> u64 {
    decide::answer(&Kernel).0
}

/// [`tcp::follow`] as a global function.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_segment(slot: u64, tag: u32, segment: u32) -> u64 {
    tcp::follow(&Kernel, SnatSlot(slot), tag, Segment(segment));
    0
}

/// [`flow::find`] as a global function.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_find(reply: u32) -> u64 {
    flow::find(&Kernel, reply != 0).0
}

/// [`fragment::write`] as a global function; 1 if it wrote.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sl_note() -> u64 {
    fragment::write(&Kernel).is_some() as u64
}

/// A map value as a place.
macro_rules! at {
    ($pointer:expr) => {
        // SAFETY: a non-null pointer from a map lookup is valid until the program returns.
        $pointer.map(|p| unsafe { At::from_ptr(p) })
    };
}

impl Env for Kernel {
    type Lock = *mut bpf_spin_lock;

    #[inline(always)]
    fn settings(&self) -> Option<At<'_, Settings>> {
        at!(sl_settings_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<At<'_, Frontend>> {
        trap::count(Trap::HashLookup);
        at!(sl_frontend_v1.get_ptr_mut(key))
    }
    #[inline(always)]
    fn maglev(&self, index: u32) -> Option<At<'_, u32>> {
        at!(sl_maglev_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn backend(&self, id: u32) -> Option<At<'_, Backend>> {
        at!(sl_backend_v1.get_ptr_mut(id))
    }
    #[inline(always)]
    fn pod(&self, addr: &Addr) -> Option<At<'_, Pod>> {
        trap::count(Trap::HashLookup);
        at!(sl_pod_v1.get_ptr_mut(addr))
    }
    #[inline(always)]
    fn vtep(&self, index: u32) -> Option<At<'_, Vtep>> {
        at!(sl_vtep_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn vtep_source(&self, key: &VtepKey) -> Option<At<'_, u32>> {
        trap::count(Trap::HashLookup);
        at!(sl_vtepsrc_v1.get_ptr_mut(key))
    }
    #[inline(always)]
    fn near(&self) -> Option<At<'_, Near>> {
        at!(sl_near_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn lookups(&self) -> Option<At<'_, u32>> {
        at!(sl_lookups_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn tunnel(&self, index: u32) -> Option<At<'_, Tunnel>> {
        at!(sl_tunnel_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn next_hop(&self, index: u32) -> Option<At<'_, NextHop>> {
        at!(sl_nexthop_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn flow_set(&self, index: u32) -> Option<At<'_, FlowSet>> {
        at!(sl_flow_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn scratch(&self) -> Option<At<'_, Scratch>> {
        at!(sl_scratch_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn decide(&self) -> Answer {
        trap::count(Trap::Decide);
        // Never inlined: the verifier takes a global function's result for unknown and goes on.
        Answer(sl_decide())
    }
    #[inline(always)]
    fn follow(&self, slot: SnatSlot, tag: u32, segment: Segment) {
        trap::count(Trap::Segment);
        sl_segment(slot.0, tag, segment.0);
    }
    #[inline(always)]
    fn find(&self, reply: bool) -> SnatSlot {
        SnatSlot(sl_find(reply as u32))
    }
    #[inline(always)]
    fn flow_lock(&self, set: u32) -> Option<Self::Lock> {
        sl_flowlock_v1.get_ptr_mut(set).map(|p: *mut FlowLock| p.cast())
    }
    #[inline(always)]
    fn lock(&self, lock: Self::Lock) {
        trap::count(Trap::Lock);
        // SAFETY: `lock` is a map value's `bpf_spin_lock`.
        unsafe { generated::bpf_spin_lock(lock) };
    }
    #[inline(always)]
    fn unlock(&self, lock: Self::Lock) {
        // SAFETY: as in `lock`, which this program holds.
        unsafe { generated::bpf_spin_unlock(lock) };
    }
    #[inline(always)]
    fn snat(&self, index: u32) -> Option<At<'_, SnatSlot>> {
        at!(sl_snat_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn fragment(&self, index: u32) -> Option<At<'_, Fragment>> {
        at!(sl_frag_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn note(&self) {
        sl_note();
    }
    #[inline(always)]
    fn now(&self) -> u32 {
        jiffies()
    }
    #[inline(always)]
    fn forget(&self, value: u32) -> u32 {
        let Some(scratch) = self.scratch() else { return value };
        let forgotten = sluice_datapath::field!(scratch, Scratch, forgotten);
        forgotten.set_now(value as u64);
        forgotten.get_now() as u32
    }
    #[inline(always)]
    fn reason_counter(&self, index: u32) -> Option<At<'_, ReasonCounter>> {
        at!(sl_reason_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn service_counter(&self, service: u32) -> Option<At<'_, ServiceCounter>> {
        at!(sl_svcstat_v1.get_ptr_mut(service))
    }
    #[inline(always)]
    fn backend_counter(&self, backend: u32) -> Option<At<'_, BackendCounter>> {
        at!(sl_bestat_v1.get_ptr_mut(backend))
    }
    #[inline(always)]
    fn answer_counter(&self, kind: AnswerKind) -> Option<At<'_, AnswerCounter>> {
        at!(sl_answer_v1.get_ptr_mut(kind as u32))
    }
    #[inline(always)]
    fn source_bucket(&self, index: u32) -> Option<At<'_, Bucket>> {
        at!(sl_bucket_v1.get_ptr_mut(index))
    }
    #[inline(always)]
    fn flood(&self) -> Option<At<'_, FloodWord>> {
        at!(sl_flood_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn flood_cpu(&self) -> Option<At<'_, FloodCpu>> {
        at!(sl_floodcpu_v1.get_ptr_mut(0))
    }
    #[inline(always)]
    fn cpu_bucket(&self) -> Option<At<'_, Bucket>> {
        at!(sl_bucketcpu_v1.get_ptr_mut(0))
    }
}
