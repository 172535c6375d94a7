//! Per-CPU counters. Every packet is counted once, at one place (`account` in the datapath).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where a program runs. Index of the first dimension of the reason counters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
#[repr(u32)]
pub enum Hook {
    /// XDP at an uplink, native or generic.
    Xdp = 0,
    /// TC ingress: pod host sides, uplinks, the kernel's vxlan device.
    TcIngress = 1,
    /// TC egress: uplinks and the kernel's vxlan device.
    TcEgress = 2,
    /// TC ingress of an uplink without XDP, where TC does what XDP does elsewhere; and of the kernel's
    /// vxlan devices.
    TcNode = 3,
}

impl Hook {
    /// All hooks, in index order.
    pub const ALL: [Hook; 4] = [Hook::Xdp, Hook::TcIngress, Hook::TcEgress, Hook::TcNode];

    /// The name in output and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Hook::Xdp => "xdp",
            Hook::TcIngress => "tc_ingress",
            Hook::TcEgress => "tc_egress",
            Hook::TcNode => "tc_node",
        }
    }
}

/// Value of `sl_reason_v1` (PERCPU_ARRAY, index `hook * maps::REASON_SLOTS + reason`), 16 bytes.
/// Written by the programs, read by the agent and the command line.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ReasonCounter {
    /// Frames.
    pub packets: u64,
    /// Bytes from the Ethernet header on, as the frame arrived (without FCS).
    pub bytes: u64,
}

/// Value of `sl_svcstat_v1` (PERCPU_ARRAY, index = service id), 48 bytes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServiceCounter {
    /// Frames from clients that were translated.
    pub forward_packets: u64,
    /// Their bytes, as they arrived.
    pub forward_bytes: u64,
    /// Frames from backends that were translated back.
    pub reply_packets: u64,
    /// Their bytes, as they arrived.
    pub reply_bytes: u64,
    /// Connections decided (new flow records).
    pub new_flows: u64,
    /// Frames to the service that were dropped, whatever the reason.
    pub dropped_packets: u64,
}

/// Value of `sl_bestat_v1` (PERCPU_ARRAY, index = backend id), 40 bytes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BackendCounter {
    /// Frames sent to the backend.
    pub forward_packets: u64,
    /// Their bytes, as they arrived.
    pub forward_bytes: u64,
    /// Frames that came back from it.
    pub reply_packets: u64,
    /// Their bytes, as they arrived.
    pub reply_bytes: u64,
    /// Connections decided towards it.
    pub new_flows: u64,
}

/// What is told to the sender of a packet that goes no further, or that asked us.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
#[repr(u32)]
pub enum AnswerKind {
    /// ICMP: port unreachable (RFC 792 3/3, RFC 4443 1/4).
    PortUnreachable = 0,
    /// TCP: RST (RFC 9293 section 3.10.7.1).
    Reset = 1,
    /// ICMP: fragmentation needed (RFC 1191 3/4), packet too big (RFC 4443 2/0).
    TooBig = 2,
    /// ICMP: time exceeded in transit (RFC 792 11/0, RFC 4443 3/0).
    TimeExceeded = 3,
    /// ICMP: echo reply.
    Echo = 4,
}

impl AnswerKind {
    /// All kinds, in index order.
    pub const ALL: [AnswerKind; 5] = [
        AnswerKind::PortUnreachable,
        AnswerKind::Reset,
        AnswerKind::TooBig,
        AnswerKind::TimeExceeded,
        AnswerKind::Echo,
    ];

    /// The name in output and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            AnswerKind::PortUnreachable => "port_unreachable",
            AnswerKind::Reset => "reset",
            AnswerKind::TooBig => "too_big",
            AnswerKind::TimeExceeded => "time_exceeded",
            AnswerKind::Echo => "echo",
        }
    }
}

/// Value of `sl_answer_v1` (PERCPU_ARRAY, index = [`AnswerKind`]), 16 bytes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AnswerCounter {
    /// Answers that were sent.
    pub sent: u64,
    /// Answers that were not sent: more than [`crate::Answers`] allows, or switched off.
    pub limited: u64,
}
