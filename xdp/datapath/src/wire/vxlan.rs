//! VXLAN (RFC 7348 section 5).

use sluice_abi::Be32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// VXLAN header, 8 bytes.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Vxlan {
    /// Flags and 24 reserved bits, which a receiver ignores.
    pub flags: Be32,
    /// VNI (24 bits) and eight reserved bits, which a receiver ignores.
    pub vni: Be32,
}

/// The I flag: the VNI is valid.
pub const FLAG_VNI: u32 = 0x0800_0000;
/// The VNI's bits of [`Vxlan::vni`], host order.
pub const VNI_MASK: u32 = 0xffff_ff00;
