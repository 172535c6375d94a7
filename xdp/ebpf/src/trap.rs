//! In the object that only the tests load (`--features trap`): counts what the established path
//! may not do. In the product every function here is empty.

#[cfg(feature = "trap")]
mod counted {
    use aya_ebpf::btf_maps::Array;
    use aya_ebpf::macros::btf_map;

    /// Count 0: flow table locks taken, that is: decisions written.
    #[btf_map]
    pub static sl_trap_v1: Array<u64, 8> = Array::new();

    #[inline(always)]
    pub fn count(index: u32) {
        if let Some(p) = sl_trap_v1.get_ptr_mut(index) {
            // SAFETY: a map value; single writer in the tests that read it.
            unsafe { *p += 1 };
        }
    }
}

/// A decision is being written.
#[inline(always)]
pub fn decided() {
    #[cfg(feature = "trap")]
    counted::count(0);
}
