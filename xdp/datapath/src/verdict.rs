//! What becomes of a packet, and on whose account.

use crate::access::opaque;
use sluice_abi::{Reason, VerdictKind};

/// The last step with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Hand to the kernel.
    Pass,
    /// Drop.
    Drop,
    /// Send out of the interface it came from.
    Transmit,
    /// Send out of interface `.0`.
    Redirect(u32),
    /// Let interface `.0` receive it (TC only).
    Receive(u32),
    /// Let the other end of the veth `.0` receive it (TC only).
    Peer(u32),
}

impl Action {
    /// The action in one word whose every bit is defined, and of which the compiler knows nothing.
    /// In an enum the bits of a payload that is not there may be anything, and LLVM takes them from
    /// whatever stands in their place on the stack: a pointer, which the verifier does not let it
    /// read as a number.
    #[inline(always)]
    pub fn word(self) -> u64 {
        let (kind, ifindex) = match self {
            Action::Pass => (0, 0),
            Action::Drop => (1, 0),
            Action::Transmit => (2, 0),
            Action::Redirect(ifindex) => (3, ifindex),
            Action::Receive(ifindex) => (4, ifindex),
            Action::Peer(ifindex) => (5, ifindex),
        };
        opaque((ifindex as u64) << 32 | kind)
    }

    /// The action of a word.
    #[inline(always)]
    pub const fn of_word(word: u64) -> Self {
        let ifindex = (word >> 32) as u32;
        match word & 7 {
            0 => Action::Pass,
            1 => Action::Drop,
            2 => Action::Transmit,
            3 => Action::Redirect(ifindex),
            4 => Action::Receive(ifindex),
            _ => Action::Peer(ifindex),
        }
    }
}

/// Which way a translated packet went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the client.
    Forward,
    /// From the backend.
    Reply,
}

/// Whose counters a packet moves. Service and backend 0 are nobody's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
    /// Direction.
    pub direction: Direction,
    /// The packet began a connection.
    pub new_flow: bool,
}

impl Owner {
    /// Nobody.
    pub const NONE: Self =
        Self { service: 0, backend: 0, direction: Direction::Forward, new_flow: false };
}

/// Verdict of one packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// The last step.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// On whose account.
    pub owner: Owner,
}

impl Verdict {
    /// The packet was handled.
    #[inline(always)]
    pub const fn forward(action: Action, reason: Reason, owner: Owner) -> Self {
        Self { action, reason, owner }
    }
}

/// Why the way through the program ended early: the packet is untouched, or dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop {
    /// Why.
    pub reason: Reason,
    /// Service whose packet it was, 0 if unknown.
    pub service: u32,
}

impl From<Reason> for Stop {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self { reason, service: 0 }
    }
}

impl From<Stop> for Verdict {
    /// The one place where a reason becomes PASS or DROP.
    #[inline(always)]
    fn from(stop: Stop) -> Self {
        let (action, service) = match stop.reason.kind() {
            VerdictKind::Drop => (Action::Drop, stop.service),
            // The kernel's packet now: not one that the Service translated.
            VerdictKind::Pass | VerdictKind::Forward => (Action::Pass, 0),
        };
        Self { action, reason: stop.reason, owner: Owner { service, ..Owner::NONE } }
    }
}

/// A step that may end the way.
pub type Step<T> = Result<T, Stop>;
