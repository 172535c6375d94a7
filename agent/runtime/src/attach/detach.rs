//! Detaching a pinned link at once. Removing its pin alone detaches some time later, after an RCU
//! grace period, and until then the interface has no room for another program.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH` (include/uapi/linux/bpf.h).
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Members of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Members of `union bpf_attr` for `BPF_LINK_DETACH`.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// Detaches the link that is pinned at `path`. The pin stays.
///
/// # Errors
/// What the kernel says; ENOLINK when the interface went away before.
///
/// # Kernel
/// 5.9.
pub fn detach(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let get = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: `get` is what the kernel reads for this command, of the size given, and holds a
    // terminated path that outlives the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of_val(&get)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    let link = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    let attr = LinkDetach { link_fd: link.as_raw_fd() as u32 };
    // SAFETY: `attr` is what the kernel reads for this command, of the size given.
    let done = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size_of_val(&attr))
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
