//! What the kernel programs and user space share, and nothing else.
//!
//! Every layout, map name, limit and reason stands here once. The crate holds no logic beyond the
//! construction and the reading of its own types, allocates nothing and knows neither aya nor
//! libbpf: a value crosses into the kernel as its bytes ([`zerocopy::IntoBytes`], whose derive
//! refuses padding at compile time).
//!
//! ```text
//!   control (compile) ──► frontends ─► maglev ─► backends ─► {pods, vteps ─► next hops}
//!                                                     ▲ decide, once per flow
//!   packet ──► flow table (one record per connection) ┘ replay, every later packet
//! ```
//!
//! Byte order: addresses, ports and VNIs are in network byte order inside [`Addr`], [`Be16`] and
//! [`Be32`]; every plain integer is in host order.

#![no_std]
#![forbid(unsafe_code)]

mod addr;
mod bench;
mod counters;
mod flood;
mod flow;
mod fragment;
mod lane;
pub mod maps;
mod near;
mod reason;
mod settings;
mod tables;
mod trap;

pub use addr::{Addr, Be16, Be32, Family, Mac};
pub use bench::{BENCH_MORE_WORDS, BENCH_RUN, BENCH_TARGETS, BENCH_WORDS, BenchRun, BenchTarget};
pub use counters::{
    AnswerCounter, AnswerKind, BackendCounter, Hook, ReasonCounter, ServiceCounter,
};
pub use flood::{Flood, FloodCpu, FloodWord};
pub use flow::{
    Ask, Exit, ExitKind, FLOW_WAYS, FlowRecord, FlowSet, SCRATCH_BYTES, Scratch, SnatSlot, Stopped,
    flow_state, flow_tag, record_flags,
};
pub use fragment::{Fragment, MAX_ECHO_FRAGMENTS, fragment_fate, fragment_part};
pub use lane::{JUMP_SLOTS, LANES, Lane};
pub use near::{NEAR_PLACES, Near, NearPod, NearSource};
pub use reason::{REASONS, Reason, ReasonInfo, VerdictKind};
pub use settings::{
    Answers, Bucket, MAX_OWN_MACS, MAX_TUNNELS, OwnMac, Seeds, Settings, Timeouts, settings_flags,
};
pub use tables::{
    Backend, Delivery, Extent, Frontend, FrontendKey, NextHop, Pod, PodNet, Route, Tunnel, Vtep,
    VtepKey, frontend_flags,
};
pub use trap::{TRAP, Trap};

/// IP protocol number of ICMP (IANA).
pub const IPPROTO_ICMP: u8 = 1;
/// IP protocol number of TCP (IANA protocol numbers).
pub const IPPROTO_TCP: u8 = 6;
/// IP protocol number of UDP (IANA protocol numbers).
pub const IPPROTO_UDP: u8 = 17;
/// IP protocol number of ICMPv6 (IANA).
pub const IPPROTO_ICMPV6: u8 = 58;
