//! The maps. Names and layouts are `sluice_abi`'s; a static's name is the map's name, and the
//! loader sets `max_entries` where the configuration says so.
#![allow(non_upper_case_globals)]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_spin_lock};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray, ProgramArray};
use aya_ebpf::macros::btf_map;
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet,
    Fragment, Frontend, FrontendKey, Hook, JUMP_SLOTS, Near, NextHop, Pod, ReasonCounter, Scratch,
    ServiceCounter, Settings, SnatSlot, Tunnel, Vtep, VtepKey, maps,
};

/// A `bpf_spin_lock` as the kernel's BTF wants it: a field of that type in the map's value.
#[repr(C)]
pub struct FlowLock {
    /// The lock.
    pub lock: bpf_spin_lock,
}

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// Read-mostly hashes: memory for what is there, not for what could be.
const GROWING: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static sl_settings_v1: Array<Settings, 1> = Array::new();
#[btf_map]
pub static sl_frontend_v1: HashMap<
    FrontendKey,
    Frontend,
    { maps::DEFAULT_FRONTENDS as usize },
    GROWING,
> = HashMap::new();
#[btf_map]
pub static sl_maglev_v1: Array<u32, { maps::DEFAULT_MAGLEV as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static sl_backend_v1: Array<Backend, { maps::DEFAULT_BACKENDS as usize }> = Array::new();
#[btf_map]
pub static sl_pod_v1: HashMap<Addr, Pod, { maps::DEFAULT_PODS as usize }, GROWING> = HashMap::new();
#[btf_map]
pub static sl_vtep_v1: Array<Vtep, { maps::DEFAULT_VTEPS as usize }> = Array::new();
#[btf_map]
pub static sl_vtepsrc_v1: HashMap<VtepKey, u32, { maps::DEFAULT_VTEP_SOURCES as usize }, GROWING> =
    HashMap::new();
#[btf_map]
pub static sl_tunnel_v1: Array<Tunnel, { sluice_abi::MAX_TUNNELS as usize }> = Array::new();
#[btf_map]
pub static sl_nexthop_v1: Array<NextHop, { maps::DEFAULT_NEXTHOPS as usize }> = Array::new();
#[btf_map]
pub static sl_flow_v1: Array<FlowSet, { maps::DEFAULT_ALL_FLOW_SETS as usize }, MMAPABLE> =
    Array::new();
#[btf_map]
pub static sl_flowlock_v1: Array<FlowLock, { maps::FLOW_LOCKS as usize }> = Array::new();
#[btf_map]
pub static sl_scratch_v1: PerCpuArray<Scratch, 1> = PerCpuArray::new();
#[btf_map]
pub static sl_snat_v1: Array<SnatSlot, { maps::SNAT_SLOTS as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static sl_reason_v1: PerCpuArray<
    ReasonCounter,
    { maps::REASON_SLOTS as usize * Hook::ALL.len() },
> = PerCpuArray::new();
#[btf_map]
pub static sl_svcstat_v1: PerCpuArray<ServiceCounter, { maps::DEFAULT_SERVICES as usize }> =
    PerCpuArray::new();
#[btf_map]
pub static sl_bestat_v1: PerCpuArray<BackendCounter, { maps::DEFAULT_BACKENDS as usize }> =
    PerCpuArray::new();
#[btf_map]
pub static sl_answer_v1: PerCpuArray<AnswerCounter, { AnswerKind::ALL.len() }> = PerCpuArray::new();
#[btf_map]
pub static sl_bucket_v1: Array<Bucket, { Bucket::SOURCES as usize }> = Array::new();
#[btf_map]
pub static sl_bucketcpu_v1: PerCpuArray<Bucket, 1> = PerCpuArray::new();
#[btf_map]
pub static sl_frag_v1: Array<Fragment, { maps::DEFAULT_FRAGMENTS as usize }> = Array::new();
#[btf_map]
pub static sl_near_v1: PerCpuArray<Near, 1> = PerCpuArray::new();
#[btf_map]
pub static sl_lookups_v1: Array<u32, 1> = Array::new();
#[btf_map]
pub static sl_flood_v1: Array<FloodWord, 1, MMAPABLE> = Array::new();
#[btf_map]
pub static sl_floodcpu_v1: PerCpuArray<FloodCpu, 1> = PerCpuArray::new();
#[btf_map]
pub static sl_jump_v1: ProgramArray<{ JUMP_SLOTS as usize }> = ProgramArray::new();
#[btf_map]
pub static sl_jumptc_v1: ProgramArray<{ JUMP_SLOTS as usize }> = ProgramArray::new();
