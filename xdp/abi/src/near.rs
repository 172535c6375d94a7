//! Answers of hash tables that a CPU remembers, so that it need not ask again.

use crate::{Addr, Pod, VtepKey};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Answers of each kind that a CPU remembers. A power of two; an answer's place is a hash of the
/// question, and a newer one takes it.
pub const NEAR_PLACES: usize = 256;

/// What `sl_vtepsrc_v1` said. 32 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NearSource {
    /// Whose packets.
    pub key: VtepKey,
    /// Value of `sl_lookups_v1` when the table was asked; 0: never.
    pub generation: u32,
    /// The VTEP's index.
    pub index: u32,
    /// Zero.
    pub reserved: u32,
}

/// What `sl_pod_v1` said. 48 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NearPod {
    /// The address.
    pub addr: Addr,
    /// Value of `sl_lookups_v1` when the table was asked; 0: never.
    pub generation: u32,
    /// 1 if it is a pod of this node, else 0.
    pub is_pod: u32,
    /// The pod.
    pub pod: Pod,
}

/// The one value of `sl_near_v1` (PERCPU_ARRAY), 20,480 bytes. XDP programs only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Near {
    /// Tunnel ends.
    pub sources: [NearSource; NEAR_PLACES],
    /// Pods, and what is none.
    pub pods: [NearPod; NEAR_PLACES],
}

impl Default for Near {
    fn default() -> Self {
        Self {
            sources: [NearSource::default(); NEAR_PLACES],
            pods: [NearPod::default(); NEAR_PLACES],
        }
    }
}

const _: () = {
    assert!(size_of::<NearSource>() == 32);
    assert!(size_of::<NearPod>() == 48);
    // A per-CPU value is 32 KiB at most (kernel mm/percpu.c, PCPU_MIN_UNIT_SIZE).
    assert!(size_of::<Near>() == 20_480);
};
