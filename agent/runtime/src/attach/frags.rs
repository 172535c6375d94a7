//! Frames in several buffers (`xdp.frags`, kernel 5.18): all XDP programs of the object take them,
//! which is what native XDP needs where the MTU is larger than a buffer.
//!
//! Generic mode is given programs that do not. It then makes every packet linear in place. For a
//! program that takes several buffers it copies the packet instead (kernel 6.9), and forgets in the
//! copy how long its link-layer header is (net/core/skbuff.c, `skb_pp_cow_data` copies no `mac_len`):
//! TC programs of the interface, everybody's, then find no Ethernet header, and ours not what XDP
//! left for it.

use aya::util::KernelVersion;

/// Name of the section of programs that take frames in several buffers, as the object has it.
const FRAGS: &[u8] = b"xdp.frags\0";

/// Whether this kernel knows programs that take frames in several buffers.
pub fn are_known() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 18, 0))
}

/// The object with programs that do not take frames in several buffers: the loader tells them by the
/// name of their section, and `xdp.frags` that ends before its dot is `xdp`. It finds what BTF says of
/// functions by that name too, so no other section may have it.
pub fn without_frags(object: &[u8]) -> Vec<u8> {
    let mut object = object.to_vec();
    let mut from = 0;
    while let Some(found) = object[from..].windows(FRAGS.len()).position(|bytes| bytes == FRAGS) {
        let dot = from + found + b"xdp".len();
        object[dot] = 0;
        from = dot;
    }
    object
}
