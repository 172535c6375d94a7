//! Many entries of an array map by one call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_MAP_LOOKUP_BATCH` (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Members of `union bpf_attr` for `BPF_MAP_*_BATCH`.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The values of entries `first` to `first + count`, one after the other, `size` bytes each; fewer
/// where the map ends.
///
/// # Errors
/// What the kernel says.
///
/// # Kernel
/// 5.6. An array's token for "go on here" is the index before (kernel/bpf/syscall.c,
/// `generic_map_lookup_batch`).
pub(super) fn values(
    map: BorrowedFd<'_>,
    first: u32,
    count: u32,
    size: usize,
) -> io::Result<Vec<u8>> {
    let before = first.wrapping_sub(1);
    let mut last = 0u32;
    let mut keys = vec![0u32; count as usize];
    let mut values = vec![0u8; count as usize * size];
    let mut batch = Batch {
        in_batch: if first == 0 { 0 } else { &raw const before as u64 },
        out_batch: &raw mut last as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: `batch` is what the kernel reads and writes for this command, of the size given. It
    // writes at most `count` keys of four bytes and values of `size` bytes, for which there is room,
    // and one key at `last`; all of them outlive the call.
    let done = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of_val(&batch))
    };
    if done < 0 {
        let error = io::Error::last_os_error();
        // The end of the map, with what was there before it.
        if error.raw_os_error() != Some(libc::ENOENT) {
            return Err(error);
        }
    }
    values.truncate(batch.count.min(count) as usize * size);
    Ok(values)
}
