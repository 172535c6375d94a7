//! What devices say of themselves about XDP: the generic netlink family `netdev` (kernel 6.3,
//! Documentation/netlink/specs/netdev.yaml).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

/// A device's XDP features (`xdp-act`, include/uapi/linux/netdev.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpFeatures(pub u64);

impl XdpFeatures {
    /// Frames can be redirected out of the device.
    pub const fn xmit(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// Frames in several buffers can be received (`xdp.frags`).
    pub const fn rx_frags(self) -> bool {
        self.0 & 1 << 5 != 0
    }

    /// Frames in several buffers can be redirected out of the device.
    pub const fn xmit_frags(self) -> bool {
        self.xmit() && self.0 & 1 << 6 != 0
    }
}

/// Longest wait for one answer of the kernel.
const ANSWER_TIMEOUT_S: i64 = 5;

/// Message types and commands (include/uapi/linux/genetlink.h, netdev.h).
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADERS: usize = 16 + 4;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The features of every device of the calling thread's network namespace, by interface index.
///
/// # Errors
/// When the kernel does not know the family (before 6.3) or does not answer.
pub fn read() -> io::Result<BTreeMap<u32, XdpFeatures>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    setsockopt(&socket.as_fd(), ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_S))?;
    let family = family(&socket)?;
    let mut found = BTreeMap::new();
    let question = question(family, NLM_F_REQUEST | NLM_F_DUMP, NETDEV_CMD_DEV_GET, &[]);
    socket.send(&question, 0)?;
    answers(&socket, true, |attributes| {
        let value = |wanted| attributes_of(attributes).find(|(kind, _)| *kind == wanted);
        let index = value(NETDEV_A_DEV_IFINDEX).and_then(|(_, v)| v.try_into().ok());
        let bits = value(NETDEV_A_DEV_XDP_FEATURES).and_then(|(_, v)| v.try_into().ok());
        if let (Some(index), Some(bits)) = (index, bits) {
            found.insert(u32::from_ne_bytes(index), XdpFeatures(u64::from_ne_bytes(bits)));
        }
    })?;
    Ok(found)
}

/// The number of the family `netdev`.
fn family(socket: &Socket) -> io::Result<u16> {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    socket.send(&question(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, &name), 0)?;
    let mut id = None;
    answers(socket, false, |attributes| {
        let found = attributes_of(attributes).find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID);
        id = found.and_then(|(_, v)| v.try_into().ok()).map(u16::from_ne_bytes);
    })?;
    id.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn question(kind: u16, flags: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let length = (HEADERS + attributes.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number, port, and the generic header: command, version, reserved.
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut attribute = (length as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(length.next_multiple_of(4), 0);
    attribute
}

/// Gives the attributes of each message of an answer to `each`; of a dump until it is done.
fn answers(socket: &Socket, dump: bool, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some(length) = word(rest, 0).map(|length| length as usize)
            && length >= 16
            && let Some(message) = rest.get(..length)
        {
            match u16::from_ne_bytes([message[4], message[5]]) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let errno = word(message, 16).unwrap_or_default().cast_signed();
                    return match errno {
                        0 => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(errno.wrapping_neg())),
                    };
                }
                _ => each(message.get(HEADERS..).unwrap_or_default()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        if !dump {
            return Ok(());
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Kind and value of each attribute (`struct nlattr`).
fn attributes_of(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}
