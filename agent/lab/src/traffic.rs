//! Requests from one host of a lab, and how many packets that host's kernel sent and took for
//! them: the figure that the datapath's counters are held against.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::ops::Sub;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::serve::Answer;
use crate::{LabError, Netns};

/// How long an answer may take. A lost SYN is sent again after one second, so this lets one be
/// lost.
const ANSWER_LIMIT: Duration = Duration::from_millis(1800);

/// Transport of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// HTTP over TCP.
    Tcp,
    /// A datagram to the echo.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// What one request met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The pod that answered.
    pub pod: String,
    /// Who the pod says it was asked by; not known for UDP.
    pub client: Option<IpAddr>,
}

/// Packets of a host, by its kernel's own counters (RFC 4022, RFC 4113).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostPackets {
    /// TCP segments and UDP datagrams sent, both families.
    pub sent: u64,
    /// The same, received.
    pub received: u64,
}

impl Sub for HostPackets {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            sent: self.sent.saturating_sub(earlier.sent),
            received: self.received.saturating_sub(earlier.received),
        }
    }
}

/// A connection that stays open, for several requests.
pub struct Connection {
    stream: BufReader<TcpStream>,
    target: SocketAddr,
}

impl Connection {
    /// Connects; to be called inside the namespace (see [`Netns::enter`]).
    ///
    /// # Errors
    /// Refused, unreachable or no answer in time.
    pub fn open(target: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&target, ANSWER_LIMIT)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), target })
    }

    /// One GET, and its body.
    ///
    /// # Errors
    /// The connection broke, or the answer is not HTTP with status 200.
    pub fn get(&mut self, path: &str) -> io::Result<Vec<u8>> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.target);
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        self.stream.read_line(&mut status).map_err(in_words)?;
        if status.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        if !status.starts_with("HTTP/1.1 200 ") {
            return Err(io::Error::other(format!("answer `{}`", status.trim())));
        }
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let line = line.trim();
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).map_err(in_words)?;
        Ok(body)
    }

    /// One GET, and the pod's answer.
    ///
    /// # Errors
    /// As [`Connection::get`], or the body is not an [`Answer`].
    pub fn ask(&mut self, path: &str) -> io::Result<Answer> {
        let body = self.get(path)?;
        serde_json::from_slice(&body).map_err(io::Error::other)
    }
}

/// One request on a connection of its own, then a download of `download` bytes on the same.
/// To be called inside the namespace.
///
/// # Errors
/// No right answer in time.
pub fn ask_tcp(target: SocketAddr, download: usize) -> io::Result<Reply> {
    let mut connection = Connection::open(target)?;
    let answer = connection.ask("/")?;
    if download > 0 {
        let body = connection.get(&format!("/bytes/{download}"))?;
        // The server's pattern: bytes counted up.
        if let Some(at) = body.iter().zip((0..=255u8).cycle()).position(|(got, want)| *got != want)
        {
            return Err(io::Error::other(format!("byte {at} of the download is wrong")));
        }
    }
    Ok(Reply { pod: answer.pod, client: Some(answer.client) })
}

/// One datagram from a port of its own, and its echo. To be called inside the namespace.
///
/// # Errors
/// No echo in time, or one from another address or with other contents.
pub fn ask_udp(target: SocketAddr) -> io::Result<Reply> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    // A connected socket takes an answer from the target alone, as a resolver's does.
    socket.connect(target)?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    socket.send(b"which pod is this?")?;
    let mut buffer = [0; 512];
    let len = socket.recv(&mut buffer).map_err(in_words)?;
    let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default()).into_owned();
    match text.split_once(' ') {
        Some((pod, "which pod is this?")) => Ok(Reply { pod: pod.to_owned(), client: None }),
        _ => Err(io::Error::other(format!("echo `{text}`"))),
    }
}

/// A read that times out says "temporarily unavailable", which a reader cannot make sense of.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
        }
        _ => error,
    }
}

/// A host's counters now.
///
/// # Errors
/// The namespace is gone.
pub fn packets(netns: &Netns) -> Result<HostPackets, LabError> {
    netns.enter(read_packets)?.map_err(LabError::io(format!("read counters of {}", netns.name())))
}

/// The same once they have not changed for a while: the kernel ends connections after the program
/// has closed them.
///
/// # Errors
/// The namespace is gone.
pub fn settled_packets(netns: &Netns) -> Result<HostPackets, LabError> {
    const QUIET: Duration = Duration::from_millis(60);
    let start = Instant::now();
    let mut last = packets(netns)?;
    let mut since = Instant::now();
    while since.elapsed() < QUIET && start.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(10));
        let now = packets(netns)?;
        if now != last {
            last = now;
            since = Instant::now();
        }
    }
    Ok(last)
}

/// Of the namespace that this thread is in.
fn read_packets() -> io::Result<HostPackets> {
    let snmp = read_snmp(&fs::read_to_string("/proc/thread-self/net/snmp")?);
    let snmp6: HashMap<String, u64> = fs::read_to_string("/proc/thread-self/net/snmp6")?
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(char::is_whitespace)?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect();
    let four = |name: &str| snmp.get(name).copied().unwrap_or(0);
    let six = |name: &str| snmp6.get(name).copied().unwrap_or(0);
    // TCP's counters are of both families.
    Ok(HostPackets {
        sent: four("Tcp.OutSegs")
            + four("Tcp.RetransSegs")
            + four("Udp.OutDatagrams")
            + six("Udp6OutDatagrams"),
        received: four("Tcp.InSegs") + four("Udp.InDatagrams") + six("Udp6InDatagrams"),
    })
}

/// Pairs of lines: names, then values, both behind the protocol's name.
fn read_snmp(text: &str) -> HashMap<String, u64> {
    let mut values = HashMap::new();
    let mut lines = text.lines();
    while let (Some(names), Some(numbers)) = (lines.next(), lines.next()) {
        let Some((protocol, names)) = names.split_once(':') else {
            continue;
        };
        let Some((_, numbers)) = numbers.split_once(':') else {
            continue;
        };
        for (name, number) in names.split_whitespace().zip(numbers.split_whitespace()) {
            // Tcp.MaxConn is -1; nothing that is read here is negative.
            if let Ok(number) = number.parse() {
                values.insert(format!("{protocol}.{name}"), number);
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snmp_values_are_found_by_their_names() {
        let text = "Tcp: MaxConn InSegs OutSegs\nTcp: -1 7 9\nUdp: InDatagrams\nUdp: 4\n";
        let values = read_snmp(text);
        assert_eq!(values.get("Tcp.OutSegs"), Some(&9));
        assert_eq!(values.get("Udp.InDatagrams"), Some(&4));
        assert_eq!(values.get("Tcp.MaxConn"), None);
    }
}
