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

/// "Do not fragment".
pub const DONT_FRAGMENT: u16 = 0x4000;
/// "More fragments" and the offset: not zero in every fragment.
pub const FRAGMENT_MASK: u16 = 0x3fff;

/// ECN field (RFC 3168 section 5; the names of RFC 6040): the sender does not know ECN.
pub const ECN_NOT_ECT: u8 = 0b00;
/// ECN-capable transport, the second code point (RFC 8311, RFC 9331).
pub const ECN_ECT_1: u8 = 0b01;
/// ECN-capable transport.
pub const ECN_ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const ECN_CE: u8 = 0b11;

/// The offset, in units of 8 bytes.
pub const OFFSET_MASK: u16 = 0x1fff;
