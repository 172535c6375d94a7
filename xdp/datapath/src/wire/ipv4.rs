//! IPv4 (RFC 791 section 3.1).

use sluice_abi::Be16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// IPv4 header without options, 20 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv4 {
    /// Version (4) and header length in 32-bit words.
    pub version_ihl: u8,
    /// DSCP (RFC 2474) and ECN (RFC 3168).
    pub tos: u8,
    /// Header and payload in bytes.
    pub total_len: Be16,
    /// Identification.
    pub id: Be16,
    /// Flags (3 bits) and fragment offset in 8-byte units (13 bits).
    pub fragment: Be16,
    /// Time to live.
    pub ttl: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: Be16,
    /// Source.
    pub src: [u8; 4],
    /// Destination.
    pub dst: [u8; 4],
}

/// "More fragments" and the offset: not zero in every fragment.
pub const FRAGMENT_MASK: u16 = 0x3fff;
