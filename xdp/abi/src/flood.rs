//! The flood guard: where new connections go while there are too many of them.
//!
//! Behind the sets of the flow table `sl_flow_v1` has more, whose places are direct-mapped: a client's
//! hash has exactly one. A record there looks like any other and is found by the same index, but it
//! is written without a search and without a lock, and overwritten by the next one of the same place.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// When the guard steps in, and how many places it has. 16 bytes, in [`crate::Settings`].
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Flood {
    /// New connections of a CPU within `window` above which it guards itself; 0: never.
    pub limit: u32,
    /// Jiffies over which new connections are counted.
    pub window: u32,
    /// Number of places minus one. Place `p` is in set `flow_set_mask + 1 + p / 16`, way `p % 16`.
    pub mask: u32,
    /// Zero.
    pub reserved: u32,
}

/// The one value of `sl_flood_v1` (ARRAY, mmapable), 8 bytes: 0 if no place of the guard has a record,
/// else [`FloodWord::USED`] and the low 32 bits of jiffies when one was last written. One word, so that
/// the agent clears it only if nobody has written since it looked.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct FloodWord(pub u64);

impl FloodWord {
    /// There may be records.
    pub const USED: u64 = 1 << 32;

    /// Records may be there, and one was written at `now`.
    #[inline(always)]
    pub const fn written(now: u32) -> Self {
        Self(Self::USED | now as u64)
    }
}

/// The one value of `sl_floodcpu_v1` (PERCPU_ARRAY), 48 bytes: new connections of a CPU.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FloodCpu {
    /// Low 32 bits of jiffies when the window began.
    pub window: u32,
    /// New connections in it.
    pub count: u32,
    /// 1 while the CPU guards itself; looked at when a connection begins, so it may be 1 long after.
    pub on: u32,
    /// Low 32 bits of jiffies when it began to.
    pub since: u32,
    /// How often it began to.
    pub begun: u64,
    /// Connections written into a place of the guard.
    pub put: u64,
    /// Connections that went on from there to the flow table.
    pub promoted: u64,
    /// Connections in a place of the guard that another one took.
    pub overwritten: u64,
}

const _: () = {
    assert!(size_of::<Flood>() == 16);
    assert!(size_of::<FloodCpu>() == 48);
};
