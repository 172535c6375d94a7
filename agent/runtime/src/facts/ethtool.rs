//! Questions to a device for which netlink has no shorter words (include/uapi/linux/ethtool.h).

use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GGRO: u32 = 0x2b;
const SIOCETHTOOL: u16 = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    cmd: u32,
    data: u32,
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct Driver {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    rest: [u8; 128],
}

/// Whether GRO is on, in this thread's network namespace.
///
/// # Errors
/// When there is no such device.
pub fn gro(name: &str) -> nix::Result<bool> {
    value(name, ETHTOOL_GGRO)
}

/// Whether the device leaves checksums of what it sends open, for hardware to fill in.
///
/// # Errors
/// When there is no such device.
pub fn tx_checksum(name: &str) -> nix::Result<bool> {
    value(name, ETHTOOL_GTXCSUM)
}

fn value(name: &str, cmd: u32) -> nix::Result<bool> {
    let mut value = Value { cmd, data: 0 };
    ask(name, &raw mut value)?;
    Ok(value.data != 0)
}

/// Name of the kernel's driver.
///
/// # Errors
/// When there is no such device, or none that says.
pub fn driver(name: &str) -> nix::Result<String> {
    let mut info =
        Driver { cmd: ETHTOOL_GDRVINFO, driver: [0; 32], version: [0; 32], rest: [0; 128] };
    ask(name, &raw mut info)?;
    let end = info.driver.iter().position(|b| *b == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

/// Hands `question`, one of the structures above that begins with its command, to the kernel.
fn ask<T>(name: &str, question: *mut T) -> nix::Result<()> {
    nix::ioctl_readwrite_bad!(ethtool, SIOCETHTOOL, libc::ifreq);

    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let bytes = name.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ {
        return Err(nix::Error::ENAMETOOLONG);
    }
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: question.cast() },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the request holds a terminated name and points to the structure that the command in it
    // asks for, which lives until the call returns; the kernel writes nothing beyond it.
    unsafe { ethtool(fd.as_raw_fd(), &raw mut request) }?;
    Ok(())
}
