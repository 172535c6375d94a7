//! The flow table: one record per connection, found from both directions.
//!
//! ```text
//!  set (chosen by client address, client port, protocol)
//!  ┌──────────────── 64 bytes ────────────────┬── 192 bytes ──┬─ ... ─┬── 192 bytes ──┐
//!  │ tag 0 │ tag 1 │ ...              │ tag 15 │   record 0    │       │   record 15   │
//!  └──────────────────────────────────────────┴───────────────┴───────┴───────────────┘
//! ```
//!
//! A request carries the client as its source, a reply as its destination, so both choose the same
//! set and read the same record: there is no second half that could be lost. A reply whose
//! destination was rewritten (SNAT) finds its record through `sl_snat_v1`, indexed by the port.
//! See docs/adr/0001-flow-table.md. Behind the sets of the table stand those of the flood guard
//! ([`crate::Flood`]), of the same layout.

use crate::{Addr, Be16, Be32, Fragment, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

/// Records per set.
pub const FLOW_WAYS: usize = 16;

/// Bits of [`FlowRecord::state`].
pub mod flow_state {
    /// A reply was seen.
    pub const REPLIED: u32 = 1 << 0;
    /// The client sent FIN, in its window.
    pub const FIN_FORWARD: u32 = 1 << 1;
    /// The backend sent FIN, in its window.
    pub const FIN_REPLY: u32 = 1 << 2;
    /// Either side sent RST, in its window, and neither has gone on since.
    pub const RESET: u32 = 1 << 3;
    /// Both sides are real: the client acknowledged the reply (TCP; the answer to a forged SYN
    /// goes to somebody who did not ask), or a reply was seen (UDP). The record is not given away
    /// under pressure and lives for the long timeout.
    pub const CONFIRMED: u32 = 1 << 4;
}

/// Bits of [`FlowSet::tags`].
pub mod flow_tag {
    /// The place is in use.
    pub const USED: u32 = 1 << 0;
    /// How often the place was given away, modulo 16. Kept while the place is free, so that whoever
    /// remembers a tag knows the record behind it from one of the same client that came later.
    pub const GENERATION: u32 = 0xf << 1;
    /// The generation's lowest bit.
    pub const NEXT: u32 = 1 << 1;
    /// With [`USED`] clear: a CPU is writing a record into this place of the flood guard.
    pub const BUSY: u32 = 1 << 31;

    /// Whether a place has a record.
    #[inline(always)]
    pub const fn is_used(tag: u32) -> bool {
        tag & USED != 0
    }

    /// The tag of the place when its record has ended.
    #[inline(always)]
    pub const fn freed(tag: u32) -> u32 {
        tag & GENERATION
    }
}

/// Bits of [`FlowRecord::flags`].
pub mod record_flags {
    /// The source address and port are rewritten too (backend on another node).
    pub const SNAT: u16 = 1 << 0;
    /// The connection is IPv6.
    pub const V6: u16 = 1 << 1;
    /// Decided at TC: the client is a pod of this node, and the kernel routes replies to it.
    pub const FROM_POD: u16 = 1 << 2;
    /// The client is the backend: the source address is the reserved one of
    /// [`Settings`](crate::Settings), and both directions go back out of the pod's interface.
    pub const HAIRPIN: u16 = 1 << 3;
}

/// What the last step with a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, TryFromBytes, IntoBytes, Immutable)]
#[repr(u8)]
pub enum ExitKind {
    /// Hand to the kernel (PASS, or TC_ACT_OK), already translated.
    #[default]
    Stack = 0,
    /// Write `dst_mac`, `src_mac` and send out of interface `index`.
    Frame = 1,
    /// Encapsulate towards VTEP `index`.
    Tunnel = 2,
    /// Send by next hop `index`.
    NextHop = 3,
}

/// Where packets of one direction of a flow leave. 20 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Exit {
    /// Interface (perhaps with [`Exit::PEER`]), VTEP or next hop, by `kind`.
    pub index: u32,
    /// An [`ExitKind`].
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Destination MAC, for [`ExitKind::Frame`].
    pub dst_mac: Mac,
    /// Source MAC, for [`ExitKind::Frame`].
    pub src_mac: Mac,
}

impl Exit {
    /// In the index of a [`ExitKind::Frame`]: to the other end of that veth, by TC.
    pub const PEER: u32 = 1 << 31;
}

/// One connection, both directions. 192 bytes: three cache lines, of which a request of a known
/// connection reads the first two.
///
/// ```text
///  request   client:client_port  → vip:vip_port           becomes  source:source_port → backend:backend_port
///  reply     backend:backend_port → source:source_port    becomes  vip:vip_port       → client:client_port
/// ```
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FlowRecord {
    /// Source of the request as the client sent it.
    pub client: Addr,
    /// Destination of the request as the client sent it.
    pub vip: Addr,
    /// The backend's address.
    pub backend: Addr,
    /// Source port as the client sent it.
    pub client_port: Be16,
    /// Destination port as the client sent it.
    pub vip_port: Be16,
    /// The backend's port.
    pub backend_port: Be16,
    /// Source port as the backend sees it.
    pub source_port: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: u8,
    /// [`record_flags`].
    pub flags: u16,
    /// What a request's translation adds to the one's complement sum of its transport checksum
    /// (pseudo header and ports); a reply adds the complement. RFC 1624.
    pub l4_delta: u16,
    /// The same for the IPv4 header checksum (addresses only; the hop limit is replayed apart).
    pub ip_delta: u16,

    /// Epoch in which the record was decided.
    pub epoch: u32,
    /// Tunnel source that requests come from: VTEP index, 0 for none.
    pub tunnel: u32,
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend_id: u32,
    /// Low 32 bits of jiffies when the last packet was seen, within [`crate::Timeouts::stamp`].
    pub seen: u32,
    /// [`flow_state`].
    pub state: u32,
    /// Source address as the backend sees it; equals `client` without SNAT and hairpin.
    pub source: Addr,
    /// TCP: what the client has acknowledged of the backend's bytes, a little behind. Before the
    /// backend's first reply nothing, then its sequence number.
    pub ack_forward: u32,
    /// Where requests leave.
    pub forward: Exit,

    /// Where replies leave.
    pub reply: Exit,
    /// Low 32 bits of jiffies when the connection began.
    pub created: u32,
    /// Index into `sl_snat_v1` plus one, 0 without SNAT.
    pub snat: u32,
    /// How long the record lives without packets in its present state, in jiffies.
    pub timeout: u32,
    /// Low 32 bits of jiffies when the record was decided.
    pub decided: u32,
    /// TCP: what the backend has acknowledged of the client's bytes, a little behind. At first the
    /// client's sequence number.
    pub ack_reply: u32,
    /// VLAN tags of the client's frames, outermost first, each as on the wire (EtherType, control;
    /// IEEE 802.1Q clause 9); zero for none. Replies that leave by [`ExitKind::Frame`] carry them.
    pub reply_tags: [Be32; 2],
    /// Zero; room for growth.
    pub reserved2: [u32; 4],
}

/// Value of `sl_flow_v1`: sixteen connections. 3,136 bytes.
///
/// A tag is 27 bits of the hash, a generation and whether the place is in use ([`flow_tag`]). A
/// writer frees the tag, writes the record, then sets the tag with the next generation; a reader
/// compares the tag again after it has translated a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowSet {
    /// One cache line of tags.
    pub tags: [u32; FLOW_WAYS],
    /// The records.
    pub records: [FlowRecord; FLOW_WAYS],
}

impl Default for FlowSet {
    fn default() -> Self {
        Self { tags: [0; FLOW_WAYS], records: [FlowRecord::default(); FLOW_WAYS] }
    }
}

/// The one value of `sl_scratch_v1` (PERCPU_ARRAY), 616 bytes: what a decision needs beyond the
/// stack's 512 bytes. Nothing in it outlives a packet.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Scratch {
    /// The record that is being put together.
    pub draft: FlowRecord,
    /// Best candidate so far in the search for room. Kept in memory, where the verifier does not
    /// follow values: sixteen candidates of five kinds would else be 5^16 states to it.
    pub best: u64,
    /// The question that `draft` is to answer.
    pub ask: Ask,
    /// Source ports towards the backend that other connections of the client have: bit `n` is the
    /// client's port with its top two bits exclusive-or `n`.
    pub taken: u32,
    /// The packet's TCP sequence number; 0 for UDP.
    pub seq: Be32,
    /// The packet's TCP acknowledgement number; 0 for UDP.
    pub ack: Be32,
    /// Zero; room for growth.
    pub reserved: [u32; 1],
    /// A number on its way through memory, where the verifier forgets what it knew of it: header
    /// lengths that vary would else be followed one by one.
    pub forgotten: u64,
    /// The connection that this packet began before another program went on with it.
    pub begun: SnatSlot,
    /// Bytes of a packet on their way to a helper of the kernel.
    pub bytes: [u64; SCRATCH_BYTES as usize / 8],
    /// The packet that is to be answered.
    pub stopped: Stopped,
    /// What is known of the packet as a fragment. Of a whole packet, the part alone.
    pub fragment: Fragment,
}

/// Size of [`Scratch::bytes`].
pub const SCRATCH_BYTES: u32 = 256;

/// Where a packet stopped, for the program that answers it. 32 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Stopped {
    /// The [`crate::Reason`].
    pub reason: u32,
    /// Service whose packet it is, 0 for none.
    pub service: u32,
    /// VTEP that the packet came from, 0 for a plain one.
    pub tunnel: u32,
    /// `TooBig`: the largest packet that the way out takes, in bytes.
    pub mtu: u32,
    /// Where the innermost IP header begins in the frame, in bytes.
    pub l3: u32,
    /// Where the transport header begins in the frame, in bytes.
    pub l4: u32,
    /// IP protocol number of the transport header.
    pub proto: u32,
    /// Zero.
    pub reserved: u32,
}

/// What a decision needs to know beside the draft's tuple, tunnel and way back. 32 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Ask {
    /// The record to be decided anew, 0 for a new flow.
    pub renew: SnatSlot,
    /// TCP control bits of the packet; 0 for UDP.
    pub tcp_flags: u32,
    /// 1 if the client is a pod or a node of the cluster.
    pub in_cluster: u32,
    /// 1 if backends on other nodes answer to us, so that the source is rewritten.
    pub snat: u32,
    /// 1 if the request's frame carries VLAN tags.
    pub tagged: u32,
    /// Uplink on which the frame arrived, 0 at TC.
    pub uplink: u32,
    /// Zero.
    pub reserved: u32,
}

/// Value of `sl_snat_v1`: which record owns a SNAT port towards a group of backends. 8 bytes.
///
/// The index is `port * SNAT_SLOTS_PER_PORT + (hash of the backend) % SNAT_SLOTS_PER_PORT`.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct SnatSlot(pub u64);

impl SnatSlot {
    /// Nobody's.
    pub const FREE: Self = Self(0);
    /// Taken by a decision that has not written its record yet.
    pub const CLAIMED: Self = Self(u64::MAX);

    /// Owned by the record `way` of set `set`.
    #[inline(always)]
    pub const fn owned(set: u32, way: u32) -> Self {
        Self(((set as u64) << 8) | (way as u64) | (1 << 63))
    }

    /// Set and way of the owner, if there is one.
    #[inline(always)]
    pub const fn owner(self) -> Option<(u32, u32)> {
        if self.0 == Self::FREE.0 || self.0 == Self::CLAIMED.0 {
            None
        } else {
            Some(((self.0 >> 8) as u32, (self.0 & 0xf) as u32))
        }
    }
}

const _: () = {
    assert!(size_of::<FlowRecord>() == 192);
    assert!(size_of::<Scratch>() == 616);
    assert!(size_of::<FlowSet>() == 64 + FLOW_WAYS * 192);
    assert!(core::mem::offset_of!(FlowRecord, epoch) == 64);
    assert!(core::mem::offset_of!(FlowRecord, reply) == 128);
};
