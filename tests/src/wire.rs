//! Frames on the wire of a namespace: sent into one interface, seen at all of them.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
    socket, sockopt,
};
use pnet::datalink::{self, Channel, Config, DataLinkSender};

/// A frame, and the interface at whose ingress it was seen.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Seen {
    /// Interface index.
    pub ifindex: u32,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// Sees what arrives at any interface of the namespace that it was opened in (packet(7)): after
/// XDP of either mode, before TC.
pub struct Tap(OwnedFd);

/// PACKET_OUTGOING (include/uapi/linux/if_packet.h): a frame of our own on its way out.
const OUTGOING: u8 = 4;

impl Tap {
    /// Opens it.
    ///
    /// # Panics
    /// Without the right to.
    pub fn open() -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let all = SockProtocol::EthAll;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, all).expect("a packet socket");
        setsockopt(&fd, sockopt::RcvBuf, &(4 << 20)).expect("its buffer");
        Self(fd)
    }

    /// The next frame that has arrived, if there is one.
    ///
    /// # Panics
    /// If the socket fails.
    pub fn next(&self) -> Option<Seen> {
        let mut buffer = [0u8; 4096];
        loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let fd = self.0.as_raw_fd();
            let received = recvmsg::<LinkAddr>(fd, &mut slices, None, MsgFlags::empty());
            let (len, from) = match received {
                Ok(message) => (message.bytes, message.address.expect("a link address")),
                Err(Errno::EAGAIN) => return None,
                // An interface went down.
                Err(Errno::ENETDOWN) => continue,
                Err(errno) => panic!("packet socket: {errno}"),
            };
            if from.pkttype() != OUTGOING {
                return Some(Seen {
                    ifindex: from.ifindex() as u32,
                    bytes: buffer[..len].to_vec(),
                });
            }
        }
    }

    /// Everything that has arrived by now.
    pub fn drain(&self) -> Vec<Seen> {
        std::iter::from_fn(|| self.next()).collect()
    }

    /// Waits until `count` frames have arrived, and returns everything that has.
    pub fn wait(&self, count: usize) -> Vec<Seen> {
        let mut seen = self.drain();
        let end = Instant::now() + PATIENCE;
        while seen.len() < count && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(50));
            seen.extend(self.drain());
        }
        seen
    }
}

/// How long a frame may take before it is said to be lost.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Sends frames out of an interface of the namespace of the calling thread.
///
/// # Panics
/// If there is no such interface.
pub fn sender(ifindex: u32) -> Box<dyn DataLinkSender> {
    let interface = datalink::interfaces()
        .into_iter()
        .find(|i| i.index == ifindex)
        .unwrap_or_else(|| panic!("no interface {ifindex}"));
    match datalink::channel(&interface, Config { promiscuous: false, ..Config::default() }) {
        Ok(Channel::Ethernet(sender, _)) => sender,
        Ok(_) => panic!("{} is not Ethernet", interface.name),
        Err(e) => panic!("{}: {e}", interface.name),
    }
}
