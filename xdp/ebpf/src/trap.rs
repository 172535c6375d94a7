//! In the object that only the tests load (`--features trap`): counts the calls that cost time. In
//! the product the function here is empty.

use sluice_abi::Trap;

#[cfg(feature = "trap")]
#[allow(non_upper_case_globals)]
mod counted {
    use aya_ebpf::btf_maps::Array;
    use aya_ebpf::macros::btf_map;
    use sluice_abi::Trap;

    #[btf_map]
    pub static sl_trap_v1: Array<u64, { Trap::ALL.len() }> = Array::new();
}

/// A call of this kind is about to be made.
#[inline(always)]
pub fn count(_call: Trap) {
    #[cfg(feature = "trap")]
    if let Some(p) = counted::sl_trap_v1.get_ptr_mut(_call as u32) {
        // SAFETY: a map value; single writer in the tests that read it.
        unsafe { *p += 1 };
    }
}
