//! Names and sizes of the maps. A name is at most 15 characters (BPF_OBJ_NAME_LEN, kernel
//! include/uapi/linux/bpf.h) and carries the layout's version: the layout changes, the number
//! changes, and an older agent's pin is never mistaken for ours.

/// HASH [`crate::FrontendKey`] → [`crate::Frontend`]. Agent writes, programs read.
pub const FRONTEND: &str = "sl_frontend_v1";
/// ARRAY (mmapable) u32 → u32 backend id: consistent-hash extents. Agent writes, programs read.
pub const MAGLEV: &str = "sl_maglev_v1";
/// ARRAY u32 backend id → [`crate::Backend`]. Agent writes, programs read.
pub const BACKEND: &str = "sl_backend_v1";
/// HASH [`crate::Addr`] → [`crate::Pod`]: pods of this node. Agent writes, programs read.
pub const POD: &str = "sl_pod_v1";
/// ARRAY u32 → [`crate::Vtep`]. Agent writes, programs read.
pub const VTEP: &str = "sl_vtep_v1";
/// HASH [`crate::VtepKey`] → u32 index into [`VTEP`]. Agent writes, programs read.
pub const VTEP_SOURCE: &str = "sl_vtepsrc_v1";
/// ARRAY u32 → [`crate::Tunnel`]: own tunnel devices. Agent writes, programs read.
pub const TUNNEL: &str = "sl_tunnel_v1";
/// ARRAY u32 → [`crate::NextHop`]. Agent writes, programs read.
pub const NEXTHOP: &str = "sl_nexthop_v1";
/// ARRAY of one [`crate::Settings`]. Agent writes, programs read.
pub const SETTINGS: &str = "sl_settings_v1";
/// ARRAY (mmapable) u32 → [`crate::FlowSet`]: the flow table, then the places of the flood guard,
/// sixteen in a set ([`crate::Flood::mask`]). Programs write, the agent's sweep expires.
pub const FLOW: &str = "sl_flow_v1";
/// ARRAY of `bpf_spin_lock`, one per [`FLOW_LOCKS`] residue of the set index. Programs only.
pub const FLOW_LOCK: &str = "sl_flowlock_v1";
/// PERCPU_ARRAY of one [`crate::Scratch`]: room for a decision. Programs only.
pub const SCRATCH: &str = "sl_scratch_v1";
/// ARRAY (mmapable) u32 → [`crate::SnatSlot`]. Programs write, the agent's sweep frees.
pub const SNAT: &str = "sl_snat_v1";
/// PERCPU_ARRAY → [`crate::ReasonCounter`].
pub const REASON: &str = "sl_reason_v1";
/// PERCPU_ARRAY service id → [`crate::ServiceCounter`].
pub const SERVICE_STAT: &str = "sl_svcstat_v1";
/// PERCPU_ARRAY backend id → [`crate::BackendCounter`].
pub const BACKEND_STAT: &str = "sl_bestat_v1";

/// PROG_ARRAY: the programs that go on where `xdp_node` stops, by [`crate::Lane::slot`].
pub const JUMP: &str = "sl_jump_v1";
/// PROG_ARRAY: the same for the TC programs.
pub const JUMP_TC: &str = "sl_jumptc_v1";
/// ARRAY u32 → [`crate::Fragment`]: what later fragments follow. Programs only.
pub const FRAGMENT: &str = "sl_frag_v1";

/// PERCPU_ARRAY of one [`crate::Near`]: what a CPU remembers of [`POD`] and [`VTEP_SOURCE`]. Programs
/// only.
pub const NEAR: &str = "sl_near_v1";
/// ARRAY of one u32, which changes after each change of [`POD`] and [`VTEP_SOURCE`]; 0: nothing is
/// remembered. Agent writes, programs read.
pub const LOOKUPS: &str = "sl_lookups_v1";

/// PERCPU_ARRAY [`crate::AnswerKind`] → [`crate::AnswerCounter`].
pub const ANSWER: &str = "sl_answer_v1";
/// ARRAY u32 → [`crate::Bucket`]: answers to one source, by a hash of its address. Programs only.
pub const BUCKET: &str = "sl_bucket_v1";
/// PERCPU_ARRAY of one [`crate::Bucket`]: answers of a CPU. Programs only.
pub const BUCKET_CPU: &str = "sl_bucketcpu_v1";

/// ARRAY (mmapable) of one [`crate::FloodWord`]. Programs write, the agent's sweep clears.
pub const FLOOD: &str = "sl_flood_v1";
/// PERCPU_ARRAY of one [`crate::FloodCpu`]: new connections of a CPU. Programs write.
pub const FLOOD_CPU: &str = "sl_floodcpu_v1";

/// All maps, in the order in which user space creates and checks them.
pub const ALL: [&str; 26] = [
    SETTINGS,
    FRONTEND,
    MAGLEV,
    BACKEND,
    POD,
    VTEP,
    VTEP_SOURCE,
    TUNNEL,
    NEXTHOP,
    FLOW,
    FLOW_LOCK,
    SCRATCH,
    SNAT,
    REASON,
    SERVICE_STAT,
    BACKEND_STAT,
    JUMP,
    JUMP_TC,
    ANSWER,
    BUCKET,
    BUCKET_CPU,
    FRAGMENT,
    NEAR,
    LOOKUPS,
    FLOOD,
    FLOOD_CPU,
];

/// Reason counters of one hook; room for growth, so that a new reason moves nothing.
pub const REASON_SLOTS: u32 = 64;
/// Spin locks for the flow sets. A power of two; set `s` is guarded by lock `s % FLOW_LOCKS`.
pub const FLOW_LOCKS: u32 = 1024;

/// Default `max_entries` of [`FRONTEND`].
pub const DEFAULT_FRONTENDS: u32 = 65_536;
/// Default `max_entries` of [`MAGLEV`], 4 bytes each.
pub const DEFAULT_MAGLEV: u32 = 4_194_304;
/// Default `max_entries` of [`BACKEND`] and [`BACKEND_STAT`]. Id 0 is never used.
pub const DEFAULT_BACKENDS: u32 = 65_536;
/// Default `max_entries` of [`SERVICE_STAT`]. Id 0 is never used.
pub const DEFAULT_SERVICES: u32 = 16_384;
/// Default `max_entries` of [`POD`].
pub const DEFAULT_PODS: u32 = 1_024;
/// Default `max_entries` of [`VTEP`]. Index 0 is never used.
pub const DEFAULT_VTEPS: u32 = 8_192;
/// Default `max_entries` of [`VTEP_SOURCE`]: a node may have several addresses.
pub const DEFAULT_VTEP_SOURCES: u32 = 32_768;
/// Default `max_entries` of [`NEXTHOP`]. Index 0 is never used.
pub const DEFAULT_NEXTHOPS: u32 = 8_192;
/// Default number of [`crate::FlowSet`]s: 131,072 connections in 25 MB. A power of two.
pub const DEFAULT_FLOW_SETS: u32 = 8_192;
/// Default number of the flood guard's places behind the flow table: new connections of 33 ms at a
/// million a second, in 6 MB. A power of two, at least [`crate::FLOW_WAYS`].
pub const DEFAULT_FLOOD_RECORDS: u32 = 32_768;
/// Default `max_entries` of [`FLOW`].
pub const DEFAULT_ALL_FLOW_SETS: u32 =
    DEFAULT_FLOW_SETS + DEFAULT_FLOOD_RECORDS / crate::FLOW_WAYS as u32;
/// Default `max_entries` of [`FRAGMENT`]: fragmented packets that are under way at once, 64 bytes
/// each. A power of two.
pub const DEFAULT_FRAGMENTS: u32 = 8_192;

/// Slots per SNAT port: one port serves so many connections whose backends hash differently.
/// A power of two.
pub const SNAT_SLOTS_PER_PORT: u32 = 16;
/// First SNAT port by default: below the NodePorts (30000) and `ip_local_port_range` (32768).
pub const DEFAULT_SNAT_FIRST_PORT: u16 = 16_384;
/// Last SNAT port by default, inclusive.
pub const DEFAULT_SNAT_LAST_PORT: u16 = 29_999;
/// `max_entries` of [`SNAT`]: every port, so that the range can change without a new map.
pub const SNAT_SLOTS: u32 = 65_536 * SNAT_SLOTS_PER_PORT;
