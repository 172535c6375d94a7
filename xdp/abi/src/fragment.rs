//! What became of a fragmented packet's first fragment, for those that follow it.

use crate::{Addr, SnatSlot};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Values of [`Fragment::part`].
pub mod fragment_part {
    /// Not a fragment, or the only one.
    pub const WHOLE: u8 = 0;
    /// The one with the transport header.
    pub const FIRST: u8 = 1;
    /// One of those behind it.
    pub const LATER: u8 = 2;
}

/// Values of [`Fragment::fate`].
pub mod fragment_fate {
    /// Nothing is known.
    pub const NONE: u8 = 0;
    /// Translated as a request of the record.
    pub const REQUEST: u8 = 1;
    /// Translated as a reply of the record.
    pub const REPLY: u8 = 2;
    /// Left to the kernel, and so are those that follow.
    pub const PASS: u8 = 3;
    /// An echo request that went back as its reply, and so do those that follow.
    pub const ECHO: u8 = 4;
}

/// Fragments behind the first that one echo request may have: as many as 64 KiB make at an MTU of
/// 576 bytes. Each goes back, and the limits of answers know the first one alone.
pub const MAX_ECHO_FRAGMENTS: u8 = 128;

/// Value of `sl_frag_v1` (ARRAY), and the draft of one in the scratch room. 64 bytes.
///
/// The index is a seeded hash of addresses, identification, protocol and hook (RFC 791 section 3.2,
/// RFC 8200 section 4.5: what fragments of one packet have in common). CPUs write without a lock; an
/// entry counts only if its seal fits all of it, so one that two CPUs wrote at once is none.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Fragment {
    /// Source as it came.
    pub src: Addr,
    /// Destination as it came.
    pub dst: Addr,
    /// Identification, 16 bits in IPv4, 32 in IPv6; as the number that the wire's bytes say.
    pub id: u32,
    /// IPv4: the protocol. IPv6: the fragment header's number.
    pub proto: u8,
    /// A [`crate::Hook`]: each translates for itself.
    pub hook: u8,
    /// In the scratch room a [`fragment_part`]. In the table how many fragments behind the first of an
    /// echo request have gone back; else zero.
    pub part: u8,
    /// [`fragment_fate`].
    pub fate: u8,
    /// The record's place.
    pub slot: SnatSlot,
    /// The record's tag.
    pub tag: u32,
    /// Low 32 bits of jiffies when this was written.
    pub noted: u32,
    /// A seeded hash of all the others but `noted` and `part`.
    pub seal: u64,
}

const _: () = assert!(size_of::<Fragment>() == 64);
