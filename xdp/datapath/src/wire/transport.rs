//! TCP (RFC 9293 section 3.1) and UDP (RFC 768).

use sluice_abi::{Be16, Be32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first four bytes of both.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ports {
    /// Source port.
    pub src: Be16,
    /// Destination port.
    pub dst: Be16,
}

/// TCP header without options, 20 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Tcp {
    /// Ports.
    pub ports: Ports,
    /// Sequence number.
    pub seq: Be32,
    /// Acknowledgement number.
    pub ack: Be32,
    /// Header length in 32-bit words (upper four bits) and reserved bits.
    pub data_offset: u8,
    /// Control bits.
    pub flags: u8,
    /// Window.
    pub window: Be16,
    /// Checksum, pseudo header included.
    pub checksum: Be16,
    /// Urgent pointer.
    pub urgent: Be16,
}

/// UDP header, 8 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Udp {
    /// Ports.
    pub ports: Ports,
    /// Header and payload in bytes.
    pub len: Be16,
    /// Checksum, pseudo header included; zero: none.
    pub checksum: Be16,
}

/// Control bit FIN.
pub const TCP_FIN: u8 = 0x01;
/// Control bit SYN.
pub const TCP_SYN: u8 = 0x02;
/// Control bit RST.
pub const TCP_RST: u8 = 0x04;
/// The acknowledgement number counts.
pub const TCP_ACK: u8 = 0x10;
