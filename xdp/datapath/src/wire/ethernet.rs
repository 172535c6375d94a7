//! Ethernet II (IEEE 802.3 clause 3; EtherTypes by IANA).

use sluice_abi::{Be16, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Ethernet header, 14 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ethernet {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// EtherType, or the length of an IEEE 802.3 frame if below 1536.
    pub ethertype: Be16,
}

/// IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::new(0x0800);
/// IPv6.
pub const ETHERTYPE_IPV6: Be16 = Be16::new(0x86dd);
/// IEEE 802.1Q customer tag.
pub const ETHERTYPE_VLAN: Be16 = Be16::new(0x8100);
/// IEEE 802.1ad service tag.
pub const ETHERTYPE_QINQ: Be16 = Be16::new(0x88a8);
