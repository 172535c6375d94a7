//! IPv6 (RFC 8200 section 3).

use sluice_abi::{Addr, Be16, Be32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// IPv6 header, 40 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv6 {
    /// Version (6), traffic class, flow label.
    pub version_class_flow: Be32,
    /// Bytes after this header.
    pub payload_len: Be16,
    /// Protocol, or the first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
}

/// Fragment header (RFC 8200 section 4.5).
pub const NEXT_HEADER_FRAGMENT: u8 = 44;

/// Hop-by-hop options (RFC 8200 section 4.3).
pub const NEXT_HEADER_HOP_BY_HOP: u8 = 0;

/// Routing header (RFC 8200 section 4.4).
pub const NEXT_HEADER_ROUTING: u8 = 43;

/// The first eight bytes of hop-by-hop options, destination options and routing headers, and all of
/// a fragment header (RFC 8200 sections 4.3 to 4.6).
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extension {
    /// What follows this header.
    pub next_header: u8,
    /// Its length in units of 8 bytes, the first unit not counted. Reserved in a fragment header.
    pub len: u8,
    /// Routing type, in a routing header. In a fragment header the offset's upper bits.
    pub kind: u8,
    /// Segments left, in a routing header. In a fragment header the offset's lower bits and flags.
    pub segments_left: u8,
    /// The identification, in a fragment header.
    pub id: Be32,
}

/// "More fragments" and the offset (13 bits from the top) of a fragment header: not zero in every
/// fragment but one that is the whole packet (RFC 6946).
pub const FRAGMENT_MASK_V6: u16 = 0xfff9;

/// Whether `next_header` is an extension header that carries nothing a translation must not change
/// and has the common form: hop-by-hop options, routing, destination options. The authentication
/// header covers the addresses.
#[inline(always)]
pub const fn is_followed(next_header: u8) -> bool {
    matches!(next_header, NEXT_HEADER_HOP_BY_HOP | NEXT_HEADER_ROUTING | 60)
}

/// Whether `next_header` is an extension header (IANA IPv6 extension header types), the fragment
/// header apart.
#[inline(always)]
pub const fn is_extension_header(next_header: u8) -> bool {
    matches!(next_header, 0 | 43 | 51 | 60 | 135 | 139 | 140)
}
