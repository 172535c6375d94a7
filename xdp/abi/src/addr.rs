//! Addresses, ports and other numbers that are in network byte order by type.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A 16-bit number in network byte order: a port, a length, an EtherType.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Be16([u8; 2]);

impl Be16 {
    /// Stores `value` in network byte order.
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be_bytes())
    }

    /// The number in host order.
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be_bytes(self.0)
    }

    /// The two bytes as the machine loads them: what one's complement sums are made of.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        u16::from_ne_bytes(self.0)
    }

    /// The inverse of [`Be16::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw.to_ne_bytes())
    }
}

impl core::fmt::Debug for Be16 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(&self.host(), f)
    }
}

impl core::fmt::Display for Be16 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.host(), f)
    }
}

/// A 32-bit number in network byte order.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Be32([u8; 4]);

impl Be32 {
    /// Stores `value` in network byte order.
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self(value.to_be_bytes())
    }

    /// The number in host order.
    #[inline(always)]
    pub const fn host(self) -> u32 {
        u32::from_be_bytes(self.0)
    }

    /// The four bytes as the machine loads them.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        u32::from_ne_bytes(self.0)
    }
}

impl core::fmt::Debug for Be32 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(&self.host(), f)
    }
}

/// An Ethernet address (IEEE 802), as on the wire.
#[derive(
    Clone,
    Copy,
    Eq,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Whether the address is a group address: broadcast or multicast (IEEE 802, I/G bit).
    #[inline(always)]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether all bytes are zero: "not known" in the tables.
    pub const fn is_zero(self) -> bool {
        let b = self.0;
        b[0] | b[1] | b[2] | b[3] | b[4] | b[5] == 0
    }
}

// Words, not bytes: a comparison of byte arrays goes through memory, and the programs have 512
// bytes of it.
impl PartialEq for Mac {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let [a, b, c, d, e, f] = self.0;
        let [p, q, r, s, t, u] = other.0;
        u32::from_ne_bytes([a, b, c, d]) == u32::from_ne_bytes([p, q, r, s])
            && u16::from_ne_bytes([e, f]) == u16::from_ne_bytes([t, u])
    }
}

impl core::hash::Hash for Mac {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl core::fmt::Debug for Mac {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

impl core::fmt::Display for Mac {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The address family of a packet or an address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 (RFC 791).
    V4,
    /// IPv6 (RFC 8200).
    V6,
}

/// An IP address of either family, 16 bytes in network byte order.
///
/// IPv4 is stored v4-mapped, `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2); such addresses are
/// refused on the wire, so that the two families cannot be confused. All zero is "no address".
#[derive(
    Clone,
    Copy,
    Eq,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// "No address": `::`.
    pub const NONE: Self = Self([0; 16]);

    /// The v4-mapped form of four bytes in network order.
    #[inline(always)]
    pub const fn from_v4(b: [u8; 4]) -> Self {
        // Two words, not sixteen bytes, which LLVM stores one by one: a reader of whole words would
        // then wait for all of them (no store forwarding).
        let low = u64::from_ne_bytes([0, 0, 0xff, 0xff, b[0], b[1], b[2], b[3]]);
        Self(zerocopy::transmute!([0u64, low]))
    }

    /// The last four bytes: the IPv4 address of a v4-mapped one.
    #[inline(always)]
    pub const fn v4_bytes(self) -> [u8; 4] {
        [self.0[12], self.0[13], self.0[14], self.0[15]]
    }

    /// The family, by the v4-mapped prefix.
    #[inline(always)]
    pub const fn family(self) -> Family {
        if self.words64()[0] == 0 && self.words32()[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff]) {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// Two machine words in memory order; for comparison and hashing only.
    #[inline(always)]
    pub const fn words64(self) -> [u64; 2] {
        zerocopy::transmute!(self.0)
    }

    /// Four machine words in memory order; for comparison, hashing and checksums.
    #[inline(always)]
    pub const fn words32(self) -> [u32; 4] {
        zerocopy::transmute!(self.0)
    }

    /// Whether this is [`Addr::NONE`].
    #[inline(always)]
    pub const fn is_none(self) -> bool {
        let w = self.words64();
        w[0] | w[1] == 0
    }

    /// The address as the standard library has it; v4-mapped becomes IPv4.
    pub const fn to_ip(self) -> IpAddr {
        match self.family() {
            Family::V4 => {
                let b = self.v4_bytes();
                IpAddr::V4(Ipv4Addr::new(b[0], b[1], b[2], b[3]))
            }
            Family::V6 => IpAddr::V6(Ipv6Addr::from_octets(self.0)),
        }
    }
}

impl PartialEq for Addr {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.words64(), other.words64());
        (a[0] ^ b[0]) | (a[1] ^ b[1]) == 0
    }
}

impl core::hash::Hash for Addr {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.to_ip(), f)
    }
}

impl core::fmt::Display for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.to_ip(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addr_keeps_family_and_value_both_ways() {
        for text in ["10.0.0.1", "255.255.255.255", "0.0.0.0", "2001:db8::1", "fe80::1"] {
            let ip: IpAddr = text.parse().expect("literal");
            assert_eq!(Addr::from(ip).to_ip(), ip);
        }
        assert_eq!(Addr::from_v4([10, 0, 0, 1]).family(), Family::V4);
        assert_eq!(Addr::NONE.family(), Family::V6);
    }

    #[test]
    fn be16_is_network_order_in_memory() {
        assert_eq!(Be16::new(0x1234).as_bytes(), [0x12, 0x34]);
        assert_eq!(Be16::from_raw(Be16::new(80).raw()).host(), 80);
    }
}
