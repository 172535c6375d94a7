//! Questions to the kernel over rtnetlink, and its news. Blocking, with a time limit on every answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

/// Longest wait for one answer of the kernel.
const ANSWER_TIMEOUT_S: i64 = 5;

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("netlink: {what}: {source}")]
pub struct NetlinkError {
    /// What was being asked.
    pub what: &'static str,
    /// The system's or the kernel's answer.
    pub source: io::Error,
}

/// A socket for questions, in the network namespace of the thread that opened it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            let fd = borrow(&socket);
            setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_S))?;
            Ok(socket)
        };
        let socket = open().map_err(|source| NetlinkError { what: "open a socket", source })?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All objects of a kind.
    ///
    /// # Errors
    /// When the kernel does not answer in time or answers with an error.
    pub fn dump(
        &mut self,
        what: &'static str,
        question: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        // A table that changed while it was read may have entries missing: read it again, because a
        // missing peer would take its endpoints out of every Service.
        let mut tries = 0;
        loop {
            match self.ask(question.clone(), NLM_F_REQUEST | NLM_F_DUMP) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted && tries < DUMP_TRIES => {
                    tries += 1
                }
                answer => return answer.map_err(|source| NetlinkError { what, source }),
            }
        }
    }

    /// One object.
    ///
    /// # Errors
    /// When the kernel does not answer in time or answers with an error.
    pub fn get(
        &mut self,
        what: &'static str,
        question: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        self.ask(question, NLM_F_REQUEST | NLM_F_ACK)
            .map(|answers| answers.into_iter().next())
            .map_err(|source| NetlinkError { what, source })
    }

    /// Creates an object, or does what the message asks for.
    ///
    /// # Errors
    /// When the kernel does not answer in time or answers with an error.
    pub fn create(&mut self, what: RouteNetlinkMessage) -> Result<(), NetlinkError> {
        self.ask(what, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE)
            .map(|_| ())
            .map_err(|source| NetlinkError { what: "create", source })
    }

    fn ask(
        &mut self,
        question: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for raw in messages(&datagram) {
                // An object with an attribute that the decoder refuses is left out, not the rest.
                let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(raw) {
                    Ok(message) => message,
                    Err(e) => {
                        tracing::debug!("netlink message not understood: {e}");
                        continue;
                    }
                };
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Done(_) if interrupted => {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(e) => {
                        return match e.code {
                            None => Ok(answers),
                            Some(_) => Err(e.to_io()),
                        };
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The dump was interrupted by a change (include/uapi/linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Interrupted dumps that are begun anew before the kernel's answer is an error.
const DUMP_TRIES: u32 = 8;

/// The messages of one datagram (RFC 3549 section 2.2: aligned to four bytes).
fn messages(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let message = rest.get(..length)?;
        if length < 16 {
            return None;
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn borrow(socket: &Socket) -> BorrowedFd<'_> {
    socket.as_fd()
}

/// Multicast groups (include/uapi/linux/rtnetlink.h): LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE,
/// IPV6_IFADDR, IPV6_ROUTE.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// Calls `changed` whenever links, addresses, routes or neighbours of this network namespace change,
/// until it returns false. News are not read one by one: whoever is told asks for everything, so
/// that a lost message does no harm.
///
/// # Errors
/// When the groups cannot be joined.
pub fn watch(changed: impl Fn() -> bool + Send + 'static) -> Result<(), NetlinkError> {
    let join = || {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        Ok(socket)
    };
    let socket = join().map_err(|source| NetlinkError { what: "listen for changes", source })?;
    std::thread::Builder::new()
        .name("netlink-news".to_owned())
        .spawn(move || {
            loop {
                match socket.recv_from_full() {
                    Ok(_) => {}
                    // Messages were lost: that too is news.
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                    Err(e) => {
                        tracing::warn!("netlink news: {e}");
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
                if !changed() {
                    return;
                }
            }
        })
        .map_err(|source| NetlinkError { what: "start the listening thread", source })?;
    Ok(())
}
