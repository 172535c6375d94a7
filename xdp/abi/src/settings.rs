//! What the agent tells the programs, in one value that every packet reads.

use crate::{Addr, Be16, Flood, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Own tunnel devices at most (size of the map `sl_tunnel_v1`).
pub const MAX_TUNNELS: u32 = 8;

/// Bits of [`Settings::flags`].
pub mod settings_flags {
    /// `sluice bypass on`: every program passes every packet untouched.
    pub const BYPASS: u32 = 1 << 0;
    /// Mode `replace`: no kube-proxy beside us. Clear: mode `accelerate`.
    pub const REPLACE: u32 = 1 << 1;
    /// Packets that cannot go on are answered, at the rates of [`Settings::answers`](super::Settings).
    pub const ANSWERS: u32 = 1 << 2;
}

/// How many answers (ICMP errors, RST, echo replies) may be made: two token buckets, both of which
/// must have room.
///
/// Counted in jiffies: a bucket gains `rate` tokens with each tick, holds at most
/// `burst * Settings::ticks_per_second` and pays `Settings::ticks_per_second` for an answer. At 1000
/// ticks a second no product exceeds 32 bits.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Answers {
    /// Answers a second to one source address.
    pub source_rate: u16,
    /// Answers at once to one source address.
    pub source_burst: u16,
    /// Answers a second of one CPU.
    pub cpu_rate: u16,
    /// Answers at once of one CPU.
    pub cpu_burst: u16,
}

/// A token bucket of [`Answers`]: what it holds and low 32 bits of jiffies when it was last asked, in
/// one word, so that two CPUs never pay with one token. 8 bytes; value of `sl_bucket_v1` (ARRAY,
/// index = a hash of the source, up to [`Bucket::SOURCES`]) and of `sl_bucketcpu_v1` (PERCPU_ARRAY of
/// one).
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Bucket(pub u64);

impl Bucket {
    /// Buckets of sources. A power of two.
    pub const SOURCES: u32 = 1024;
}

/// Flow timeouts in jiffies (the kernel's tick; the agent measures its length).
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Timeouts {
    /// TCP, no reply seen yet.
    pub tcp_syn: u32,
    /// TCP, replied.
    pub tcp_established: u32,
    /// TCP, a FIN in both directions or an RST seen.
    pub tcp_closing: u32,
    /// UDP, no reply seen yet.
    pub udp_oneway: u32,
    /// UDP, replied.
    pub udp_replied: u32,
    /// A record's time stamp is renewed when it is older than this: keeps the established path
    /// from writing for every packet.
    pub stamp: u32,
    /// A record decided longer ago than this is decided anew, keeping its backend, so that a dead
    /// agent does not mean stale next hops for ever.
    pub redecide: u32,
    /// Zero.
    pub reserved: u32,
}

/// Secrets of the hashes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Seeds {
    /// Chooses flow sets; random per boot, kept while the maps are pinned.
    pub flow: u64,
    /// Chooses backends; equal on every node of a cluster.
    pub cluster: u64,
}

/// Uplinks' own MACs at most, over all uplinks.
pub const MAX_OWN_MACS: usize = 16;

/// A destination MAC of frames that are for this node. 12 bytes; all zero in an unused place.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct OwnMac {
    /// The uplink.
    pub ifindex: u32,
    /// The MAC; zero: any.
    pub mac: Mac,
    /// Zero.
    pub reserved: u16,
}

/// The one value of `sl_settings_v1` (ARRAY), 392 bytes. Agent writes, programs read.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Settings {
    /// [`settings_flags`].
    pub flags: u32,
    /// Bumped when an answer changed (route, VTEP, policy); older records are decided anew.
    pub epoch: u32,
    /// Hash secrets.
    pub seeds: Seeds,
    /// Flow timeouts.
    pub timeouts: Timeouts,
    /// UDP destination ports of VXLAN; unused places repeat the first.
    pub vxlan_ports: [Be16; 2],
    /// First SNAT port of new connections, host order.
    pub snat_first_port: u16,
    /// Last SNAT port of new connections, inclusive, host order.
    pub snat_last_port: u16,
    /// Mask of the flow set index: number of sets minus one.
    pub flow_set_mask: u32,
    /// Jiffies in a second.
    pub ticks_per_second: u32,
    /// Own IPv4 address on plain routes: SNAT source towards backends outside the tunnels.
    pub node_v4: Addr,
    /// The same for IPv6.
    pub node_v6: Addr,
    /// Source of a pod's requests to itself (a Service chose the pod that asks), nobody's own
    /// address; all zero: such requests are left to the kernel.
    pub hairpin_v4: Addr,
    /// The same for IPv6.
    pub hairpin_v6: Addr,
    /// TCP ports of this node that are never captured; unused places are zero.
    pub fail_safe_tcp: [Be16; 8],
    /// UDP ports of this node that are never captured; unused places are zero.
    pub fail_safe_udp: [Be16; 8],
    /// How many answers may be made.
    pub answers: Answers,
    /// First port at which replies are looked for, host order: those of the range, and of
    /// connections from before the range was changed.
    pub snat_reply_first: u16,
    /// Last port at which replies are looked for, inclusive, host order.
    pub snat_reply_last: u16,
    /// Mask of the index of `sl_frag_v1`: number of its entries minus one.
    pub fragment_mask: u32,
    /// What the uplinks' frames for this node have as their destination. An uplink that is not
    /// named takes every frame for its own.
    pub own_macs: [OwnMac; MAX_OWN_MACS],
    /// The flood guard.
    pub flood: Flood,
}

const _: () = assert!(size_of::<Settings>() == 392);
