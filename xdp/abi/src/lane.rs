//! Which program goes on where a fast one stops.

use crate::Hook;

/// A kind of packet that the fast programs leave to another program, by a tail call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
pub enum Lane {
    /// VLAN tags, IPv4 options, IPv6 extension headers: the same way as in the fast programs, with
    /// headers whose lengths vary.
    General = 0,
    /// ICMP: errors about connections, echo requests to a Service's address.
    Icmp = 1,
    /// Packets that can go no further and whose sender is told so: ICMP errors, TCP resets.
    Answer = 2,
    /// Fragments behind the first: they follow what it noted.
    Fragment = 3,
    /// The fast program itself, for a shell in front of it that may not write to packets.
    Fast = 7,
}

/// Slots per hook of the TC hooks' array; room for growth.
const SLOTS_PER_HOOK: u32 = 8;

/// `max_entries` of `sl_jump_v1` and of `sl_jumptc_v1`.
pub const JUMP_SLOTS: u32 = SLOTS_PER_HOOK * 3;

/// Every program that is reached by a tail call: hook, lane, name.
pub const LANES: &[(Hook, Lane, &str)] = &[
    (Hook::Xdp, Lane::General, "xdp_general"),
    (Hook::TcIngress, Lane::General, "tc_in_general"),
    (Hook::TcEgress, Lane::General, "tc_out_general"),
    (Hook::Xdp, Lane::Icmp, "xdp_icmp"),
    (Hook::TcIngress, Lane::Icmp, "tc_in_icmp"),
    (Hook::TcEgress, Lane::Icmp, "tc_out_icmp"),
    (Hook::Xdp, Lane::Answer, "xdp_answer"),
    (Hook::TcIngress, Lane::Answer, "tc_in_answer"),
    (Hook::Xdp, Lane::Fragment, "xdp_fragment"),
    (Hook::TcIngress, Lane::Fragment, "tc_in_fragment"),
    (Hook::TcEgress, Lane::Fragment, "tc_out_fragment"),
    (Hook::TcNode, Lane::Fast, "tc_node"),
    (Hook::TcNode, Lane::General, "tc_node_general"),
    (Hook::TcNode, Lane::Icmp, "tc_node_icmp"),
    (Hook::TcNode, Lane::Answer, "tc_node_answer"),
    (Hook::TcNode, Lane::Fragment, "tc_node_fragment"),
];

impl Lane {
    /// Slot of the program at `hook`: in `sl_jump_v1` for XDP, in `sl_jumptc_v1` for TC, because the
    /// programs of an array must be of one kind.
    #[inline(always)]
    pub const fn slot(self, hook: Hook) -> u32 {
        match hook {
            Hook::Xdp | Hook::TcIngress => self as u32,
            Hook::TcEgress => SLOTS_PER_HOOK + self as u32,
            Hook::TcNode => 2 * SLOTS_PER_HOOK + self as u32,
        }
    }
}
