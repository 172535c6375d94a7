//! ICMP (RFC 792) and ICMPv6 (RFC 4443 section 2.1).

use sluice_abi::{Be16, Be32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first eight bytes of every message.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum of the message; of ICMPv6 with the pseudo header.
    pub checksum: Be16,
    /// By type: identifier and sequence, an MTU, a pointer.
    pub rest: Be32,
}

/// Echo reply (RFC 792).
pub const ICMP_ECHO_REPLY: u8 = 0;
/// Destination unreachable (RFC 792), "fragmentation needed" among them.
pub const ICMP_UNREACHABLE: u8 = 3;
/// Source quench (RFC 792, deprecated by RFC 6633).
pub const ICMP_SOURCE_QUENCH: u8 = 4;
/// Redirect (RFC 792).
pub const ICMP_REDIRECT: u8 = 5;
/// Echo request (RFC 792).
pub const ICMP_ECHO: u8 = 8;
/// Time exceeded (RFC 792).
pub const ICMP_TIME_EXCEEDED: u8 = 11;
/// Parameter problem (RFC 792).
pub const ICMP_PARAMETER: u8 = 12;

/// Destination unreachable (RFC 4443 section 3.1).
pub const ICMPV6_UNREACHABLE: u8 = 1;
/// Packet too big (RFC 4443 section 3.2).
pub const ICMPV6_TOO_BIG: u8 = 2;
/// Time exceeded (RFC 4443 section 3.3).
pub const ICMPV6_TIME_EXCEEDED: u8 = 3;
/// Parameter problem (RFC 4443 section 3.4).
pub const ICMPV6_PARAMETER: u8 = 4;
/// Echo request (RFC 4443 section 4.1).
pub const ICMPV6_ECHO: u8 = 128;
/// Echo reply (RFC 4443 section 4.2).
pub const ICMPV6_ECHO_REPLY: u8 = 129;

/// Code of [`ICMP_UNREACHABLE`]: port unreachable (RFC 792).
pub const ICMP_PORT_UNREACHABLE: u8 = 3;
/// Code of [`ICMP_UNREACHABLE`]: fragmentation needed and DF set (RFC 1191 section 4).
pub const ICMP_FRAGMENTATION_NEEDED: u8 = 4;
/// Code of [`ICMPV6_UNREACHABLE`]: port unreachable (RFC 4443 section 3.1).
pub const ICMPV6_PORT_UNREACHABLE: u8 = 4;
