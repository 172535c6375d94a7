//! Single frames: made with right checksums, sent and received on a device of a lab, taken apart
//! with every length and checksum verified.
//!
//! Built on pnet's views of the headers; what is added here are the rules between headers. Nothing
//! here knows what the datapath does: it is the outside view that tests compare with.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use pnet::datalink::{self, Channel, DataLinkReceiver, DataLinkSender};
use pnet::packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet::packet::icmp::IcmpPacket;
use pnet::packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet::packet::ipv4::{self, Ipv4Packet, MutableIpv4Packet};
use pnet::packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet::packet::tcp::{MutableTcpPacket, TcpPacket};
use pnet::packet::udp::{MutableUdpPacket, UdpPacket};
use pnet::packet::util;
use pnet::packet::vxlan::{MutableVxlanPacket, VxlanPacket};
use pnet::packet::{Packet as _, icmp};
use pnet::util::MacAddr;

pub use pnet::packet::tcp::TcpFlags;

use crate::plan::Mac;
use crate::{LabError, Netns};

const ETHERNET_LEN: usize = 14;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;
const VXLAN_LEN: usize = 8;
/// The I flag of RFC 7348 section 5: the VNI is valid.
const VXLAN_FLAG_VNI: u8 = 0x08;
/// Don't Fragment, the second bit of IPv4's flags (RFC 791 section 3.1).
const IPV4_DONT_FRAGMENT: u8 = 0b010;
/// Larger than any frame of a veth.
const BUFFER_LEN: usize = 65_536;

/// What is wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It ends within a header, or before the length that a header says.
    #[error("{0}: the frame is too short")]
    Short(&'static str),
    /// A field holds what it must not.
    #[error("{field} is {value:#x}")]
    Field {
        /// Header and field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A checksum is wrong.
    #[error("{header} checksum is {found:#06x}, should be {right:#06x}")]
    Checksum {
        /// Which header's.
        header: &'static str,
        /// What stands there.
        found: u16,
        /// What should.
        right: u16,
    },
    /// Source and destination are of different families.
    #[error("{0} and {1} are of different families")]
    Families(IpAddr, IpAddr),
}

/// A transport header to build or one that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP (RFC 9293) without options.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Bits of [`TcpFlags`].
        flags: u8,
        /// Sequence number.
        sequence: u32,
        /// Acknowledgement number.
        acknowledgement: u32,
    },
    /// UDP (RFC 768).
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// False: the checksum field is zero, "none". On IPv6 RFC 6935 allows it for tunnels only.
        checksum: bool,
    },
    /// Anything else, by protocol number.
    Other(u8),
}

impl Transport {
    /// A UDP header with a checksum.
    pub fn udp(source: u16, destination: u16) -> Self {
        Self::Udp { source, destination, checksum: true }
    }

    /// A TCP header with a sequence number that a reader recognises.
    pub fn tcp(source: u16, destination: u16, flags: u8) -> Self {
        let acknowledgement = if flags & TcpFlags::ACK == 0 { 0 } else { 0x2000_0001 };
        Self::Tcp { source, destination, flags, sequence: 0x1000_0001, acknowledgement }
    }

    fn header_len(self) -> usize {
        match self {
            Self::Tcp { .. } => TCP_LEN,
            Self::Udp { .. } => UDP_LEN,
            Self::Other(_) => 0,
        }
    }

    fn protocol(self) -> IpNextHeaderProtocol {
        match self {
            Self::Tcp { .. } => IpNextHeaderProtocols::Tcp,
            Self::Udp { .. } => IpNextHeaderProtocols::Udp,
            Self::Other(number) => IpNextHeaderProtocol(number),
        }
    }
}

/// An IP packet, to build or as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// The transport header.
    pub transport: Transport,
    /// What follows it.
    pub payload: Vec<u8>,
}

/// A frame that was taken apart. Every length and checksum in it was right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Source MAC address.
    pub source_mac: Mac,
    /// Destination MAC address.
    pub destination_mac: Mac,
    /// The IP packet.
    pub packet: Packet,
    /// VNI and inner frame, if the destination port was the tunnel's.
    pub inner: Option<(u32, Box<Frame>)>,
}

/// An Ethernet frame with an IP packet.
///
/// # Errors
/// The addresses are of different families, or the payload is too long for IP.
pub fn frame(source: Mac, destination: Mac, packet: &Packet) -> Result<Vec<u8>, FrameError> {
    let (ip_len, ethertype) = match packet.destination {
        IpAddr::V4(_) => (IPV4_LEN, EtherTypes::Ipv4),
        IpAddr::V6(_) => (IPV6_LEN, EtherTypes::Ipv6),
    };
    let transport_len = packet.transport.header_len() + packet.payload.len();
    let mut bytes = vec![0; ETHERNET_LEN + ip_len + transport_len];
    let mut view = MutableEthernetPacket::new(&mut bytes).ok_or(FrameError::Short("Ethernet"))?;
    view.set_source(mac_addr(source));
    view.set_destination(mac_addr(destination));
    view.set_ethertype(ethertype);
    let (_, rest) = bytes.split_at_mut(ETHERNET_LEN);
    let (ip, transport) = rest.split_at_mut(ip_len);
    write_ip(ip, transport_len, packet)?;
    write_transport(transport, packet)?;
    Ok(bytes)
}

/// A frame in VXLAN (RFC 7348 section 5) in UDP. `outer` must have a UDP header; its payload is
/// not used.
///
/// # Errors
/// As [`frame`].
pub fn vxlan(
    source: Mac,
    destination: Mac,
    outer: &Packet,
    vni: u32,
    inner: &[u8],
) -> Result<Vec<u8>, FrameError> {
    let mut payload = vec![0; VXLAN_LEN];
    let mut view = MutableVxlanPacket::new(&mut payload).ok_or(FrameError::Short("VXLAN"))?;
    view.set_flags(VXLAN_FLAG_VNI);
    view.set_vni(vni);
    payload.extend_from_slice(inner);
    frame(source, destination, &Packet { payload, ..outer.clone() })
}

fn write_ip(bytes: &mut [u8], transport_len: usize, packet: &Packet) -> Result<(), FrameError> {
    let protocol = packet.transport.protocol();
    let too_long = |_| FrameError::Field { field: "IP length", value: transport_len as u64 };
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = u16::try_from(IPV4_LEN + transport_len).map_err(too_long)?;
            let mut view = MutableIpv4Packet::new(bytes).ok_or(FrameError::Short("IPv4"))?;
            view.set_version(4);
            view.set_header_length(5);
            view.set_total_length(total);
            view.set_flags(IPV4_DONT_FRAGMENT);
            view.set_ttl(packet.ttl);
            view.set_next_level_protocol(protocol);
            view.set_source(source);
            view.set_destination(destination);
            let checksum = ipv4::checksum(&view.to_immutable());
            view.set_checksum(checksum);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let length = u16::try_from(transport_len).map_err(too_long)?;
            let mut view = MutableIpv6Packet::new(bytes).ok_or(FrameError::Short("IPv6"))?;
            view.set_version(6);
            view.set_payload_length(length);
            view.set_hop_limit(packet.ttl);
            view.set_next_header(protocol);
            view.set_source(source);
            view.set_destination(destination);
        }
        (source, destination) => return Err(FrameError::Families(source, destination)),
    }
    Ok(())
}

fn write_transport(bytes: &mut [u8], packet: &Packet) -> Result<(), FrameError> {
    let header_len = packet.transport.header_len();
    let length = bytes.len();
    bytes
        .get_mut(header_len..)
        .ok_or(FrameError::Short("transport"))?
        .copy_from_slice(&packet.payload);
    match packet.transport {
        Transport::Tcp { source, destination, flags, sequence, acknowledgement } => {
            let mut view = MutableTcpPacket::new(bytes).ok_or(FrameError::Short("TCP"))?;
            view.set_source(source);
            view.set_destination(destination);
            view.set_sequence(sequence);
            view.set_acknowledgement(acknowledgement);
            view.set_data_offset(5);
            view.set_flags(flags);
            view.set_window(0xffff);
            let right = transport_checksum(view.packet(), TCP_CHECKSUM_WORD, packet)?;
            view.set_checksum(right);
        }
        Transport::Udp { source, destination, checksum } => {
            let length = u16::try_from(length)
                .map_err(|_| FrameError::Field { field: "UDP length", value: length as u64 })?;
            let mut view = MutableUdpPacket::new(bytes).ok_or(FrameError::Short("UDP"))?;
            view.set_source(source);
            view.set_destination(destination);
            view.set_length(length);
            if checksum {
                let right = transport_checksum(view.packet(), UDP_CHECKSUM_WORD, packet)?;
                view.set_checksum(udp_on_the_wire(right));
            }
        }
        Transport::Other(_) => {}
    }
    Ok(())
}

/// Where the checksum stands in the header, in 16-bit words.
const TCP_CHECKSUM_WORD: usize = 8;
const UDP_CHECKSUM_WORD: usize = 3;
const ICMP_CHECKSUM_WORD: usize = 1;

/// RFC 768: a computed checksum of zero is sent as all ones, because zero means "none".
fn udp_on_the_wire(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// The checksum over pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1), header and data.
fn transport_checksum(bytes: &[u8], word: usize, packet: &Packet) -> Result<u16, FrameError> {
    let protocol = packet.transport.protocol();
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Ok(util::ipv4_checksum(bytes, word, &[], &source, &destination, protocol))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Ok(util::ipv6_checksum(bytes, word, &[], &source, &destination, protocol))
        }
        (source, destination) => Err(FrameError::Families(source, destination)),
    }
}

/// Takes a frame apart and verifies every length and checksum in it; with `vxlan_port`, also what
/// a VXLAN packet to that port carries.
///
/// # Errors
/// The first thing that is wrong.
pub fn inspect(bytes: &[u8], vxlan_port: Option<u16>) -> Result<Frame, FrameError> {
    let ethernet = EthernetPacket::new(bytes).ok_or(FrameError::Short("Ethernet"))?;
    let (packet, transport) = match ethernet.get_ethertype() {
        EtherTypes::Ipv4 => read_ipv4(ethernet.payload())?,
        EtherTypes::Ipv6 => read_ipv6(ethernet.payload())?,
        EtherType(other) => {
            return Err(FrameError::Field { field: "Ethernet type", value: other.into() });
        }
    };
    let packet = read_transport(packet, &transport)?;
    let tunnelled = matches!(
        packet.transport,
        Transport::Udp { destination, .. } if Some(destination) == vxlan_port
    );
    let inner = if tunnelled { Some(read_vxlan(&packet.payload)?) } else { None };
    Ok(Frame {
        source_mac: mac(ethernet.get_source()),
        destination_mac: mac(ethernet.get_destination()),
        packet,
        inner,
    })
}

fn read_vxlan(bytes: &[u8]) -> Result<(u32, Box<Frame>), FrameError> {
    let view = VxlanPacket::new(bytes).ok_or(FrameError::Short("VXLAN"))?;
    if view.get_flags() & VXLAN_FLAG_VNI == 0 {
        return Err(FrameError::Field { field: "VXLAN flags", value: view.get_flags().into() });
    }
    Ok((view.get_vni(), Box::new(inspect(view.payload(), None)?)))
}

/// The packet without transport header, and the bytes from the transport header on.
fn read_ipv4(bytes: &[u8]) -> Result<(Packet, Vec<u8>), FrameError> {
    let view = Ipv4Packet::new(bytes).ok_or(FrameError::Short("IPv4"))?;
    let header_len = usize::from(view.get_header_length()) * 4;
    if view.get_version() != 4 || header_len < IPV4_LEN {
        let value = bytes.first().copied().unwrap_or_default().into();
        return Err(FrameError::Field { field: "IPv4 version and header length", value });
    }
    let right = ipv4::checksum(&view);
    same("IPv4", view.get_checksum(), right)?;
    // Behind the total length a short frame is padded.
    let transport = bytes
        .get(header_len..usize::from(view.get_total_length()))
        .ok_or(FrameError::Short("IPv4 payload"))?;
    Ok((
        Packet {
            source: view.get_source().into(),
            destination: view.get_destination().into(),
            ttl: view.get_ttl(),
            transport: Transport::Other(view.get_next_level_protocol().0),
            payload: Vec::new(),
        },
        transport.to_vec(),
    ))
}

fn read_ipv6(bytes: &[u8]) -> Result<(Packet, Vec<u8>), FrameError> {
    let view = Ipv6Packet::new(bytes).ok_or(FrameError::Short("IPv6"))?;
    if view.get_version() != 6 {
        let value = view.get_version().into();
        return Err(FrameError::Field { field: "IPv6 version", value });
    }
    let end = IPV6_LEN + usize::from(view.get_payload_length());
    let transport = bytes.get(IPV6_LEN..end).ok_or(FrameError::Short("IPv6 payload"))?;
    Ok((
        Packet {
            source: view.get_source().into(),
            destination: view.get_destination().into(),
            ttl: view.get_hop_limit(),
            transport: Transport::Other(view.get_next_header().0),
            payload: Vec::new(),
        },
        transport.to_vec(),
    ))
}

fn read_transport(packet: Packet, bytes: &[u8]) -> Result<Packet, FrameError> {
    let Transport::Other(number) = packet.transport else {
        return Ok(packet);
    };
    match IpNextHeaderProtocol(number) {
        IpNextHeaderProtocols::Tcp => read_tcp(packet, bytes),
        IpNextHeaderProtocols::Udp => read_udp(packet, bytes),
        IpNextHeaderProtocols::Icmp => {
            let view = IcmpPacket::new(bytes).ok_or(FrameError::Short("ICMP"))?;
            same("ICMP", view.get_checksum(), icmp::checksum(&view))?;
            Ok(Packet { payload: bytes.to_vec(), ..packet })
        }
        IpNextHeaderProtocols::Icmpv6 => {
            let found = bytes.get(2..4).ok_or(FrameError::Short("ICMPv6"))?;
            let found = u16::from_be_bytes([found[0], found[1]]);
            same("ICMPv6", found, transport_checksum(bytes, ICMP_CHECKSUM_WORD, &packet)?)?;
            Ok(Packet { payload: bytes.to_vec(), ..packet })
        }
        _ => Ok(Packet { payload: bytes.to_vec(), ..packet }),
    }
}

fn read_tcp(packet: Packet, bytes: &[u8]) -> Result<Packet, FrameError> {
    let view = TcpPacket::new(bytes).ok_or(FrameError::Short("TCP"))?;
    let header_len = usize::from(view.get_data_offset()) * 4;
    if header_len < TCP_LEN {
        let value = view.get_data_offset().into();
        return Err(FrameError::Field { field: "TCP data offset", value });
    }
    let payload = bytes.get(header_len..).ok_or(FrameError::Short("TCP options"))?.to_vec();
    let right = transport_checksum(bytes, TCP_CHECKSUM_WORD, &packet)?;
    same("TCP", view.get_checksum(), right)?;
    let transport = Transport::Tcp {
        source: view.get_source(),
        destination: view.get_destination(),
        flags: view.get_flags(),
        sequence: view.get_sequence(),
        acknowledgement: view.get_acknowledgement(),
    };
    Ok(Packet { transport, payload, ..packet })
}

fn read_udp(packet: Packet, bytes: &[u8]) -> Result<Packet, FrameError> {
    let view = UdpPacket::new(bytes).ok_or(FrameError::Short("UDP"))?;
    if usize::from(view.get_length()) != bytes.len() {
        let value = view.get_length().into();
        return Err(FrameError::Field { field: "UDP length", value });
    }
    let checksum = view.get_checksum() != 0;
    if checksum {
        let right = transport_checksum(bytes, UDP_CHECKSUM_WORD, &packet)?;
        same("UDP", view.get_checksum(), udp_on_the_wire(right))?;
    }
    let transport =
        Transport::Udp { source: view.get_source(), destination: view.get_destination(), checksum };
    Ok(Packet { transport, payload: view.payload().to_vec(), ..packet })
}

fn same(header: &'static str, found: u16, right: u16) -> Result<(), FrameError> {
    if found == right { Ok(()) } else { Err(FrameError::Checksum { header, found, right }) }
}

fn mac_addr(mac: Mac) -> MacAddr {
    mac.0.into()
}

fn mac(addr: MacAddr) -> Mac {
    Mac(addr.octets())
}

/// Sends and receives whole frames on one device of a namespace (a packet socket: it sees what
/// the device receives *and* what the host itself sends by it).
pub struct FrameSocket {
    device: String,
    mac: Mac,
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
}

/// How long one wait of the receiver takes; [`FrameSocket::receive`] waits again up to its limit.
const POLL: Duration = Duration::from_millis(20);

impl FrameSocket {
    /// Opens a device of a namespace; the value may then be used in any thread.
    ///
    /// # Errors
    /// There is no such device, or CAP_NET_RAW is missing.
    pub fn open(netns: &Netns, device: &str) -> Result<Self, LabError> {
        let what = format!("open {device} of {} for frames", netns.name());
        let opened = netns.enter(|| {
            let interface = datalink::interfaces()
                .into_iter()
                .find(|interface| interface.name == device)
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            let config = datalink::Config {
                read_timeout: Some(POLL),
                read_buffer_size: BUFFER_LEN,
                write_buffer_size: BUFFER_LEN,
                ..datalink::Config::default()
            };
            let mac = interface.mac.map(mac).unwrap_or(Mac([0; 6]));
            match datalink::channel(&interface, config)? {
                Channel::Ethernet(sender, receiver) => Ok((mac, sender, receiver)),
                _ => Err(io::Error::from(io::ErrorKind::Unsupported)),
            }
        })?;
        let (mac, sender, receiver) = opened.map_err(LabError::io(what))?;
        Ok(Self { device: device.to_owned(), mac, sender, receiver })
    }

    /// MAC address of the device.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends one frame as it is.
    ///
    /// # Errors
    /// It is longer than the device takes.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), LabError> {
        let what = format!("send a frame of {} bytes by {}", frame.len(), self.device);
        match self.sender.send_to(frame, None) {
            Some(sent) => sent.map_err(LabError::io(what)),
            None => Err(LabError::io(what)(io::Error::from(io::ErrorKind::WriteZero))),
        }
    }

    /// The next frame for which `wanted` is true; nothing if none came within `limit`.
    ///
    /// # Errors
    /// The device went away.
    pub fn receive(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>, LabError> {
        let start = Instant::now();
        loop {
            match self.receiver.next() {
                Ok(frame) if wanted(frame) => return Ok(Some(frame.to_vec())),
                Ok(_) => {}
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {
                }
                Err(e) => {
                    return Err(LabError::io(format!("receive frames of {}", self.device))(e));
                }
            }
            if start.elapsed() > limit {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn packets() -> Vec<Packet> {
        let families: [(IpAddr, IpAddr); 2] = [
            (Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::new(198, 51, 100, 7).into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9).into()),
        ];
        let transports = [
            Transport::udp(1000, 53),
            Transport::Udp { source: 1000, destination: 53, checksum: false },
            Transport::tcp(1000, 80, TcpFlags::SYN),
            Transport::tcp(1000, 80, TcpFlags::ACK | TcpFlags::PSH),
        ];
        let mut packets = Vec::new();
        for (source, destination) in families {
            for transport in transports {
                for payload in [&b""[..], b"x", b"even"] {
                    let payload = payload.to_vec();
                    packets.push(Packet { source, destination, ttl: 64, transport, payload });
                }
            }
        }
        packets
    }

    #[test]
    fn inspect_finds_what_frame_wrote() {
        for packet in packets() {
            let bytes = frame(A, B, &packet).expect("legal");
            let seen = inspect(&bytes, None).expect("right");
            assert_eq!((seen.source_mac, seen.destination_mac), (A, B));
            assert_eq!(seen.packet, packet);
        }
    }

    #[test]
    fn inspect_finds_the_inner_frame_of_vxlan() {
        let outer = Packet { transport: Transport::udp(50_000, 4789), ..packets().remove(0) };
        for packet in packets() {
            let inner = frame(B, A, &packet).expect("legal");
            let bytes = vxlan(A, B, &outer, 0xabcdef, &inner).expect("legal");
            let (vni, seen) = inspect(&bytes, Some(4789)).expect("right").inner.expect("tunnelled");
            assert_eq!((vni, seen.packet), (0xabcdef, packet));
        }
    }

    #[test]
    fn inspect_refuses_a_flipped_bit_wherever_a_checksum_covers_it() {
        for packet in packets() {
            let bytes = frame(A, B, &packet).expect("legal");
            // IPv6 has no header checksum; its addresses count in the transport's.
            let (from, covered) = match (packet.source, packet.transport) {
                (IpAddr::V4(_), Transport::Udp { checksum: false, .. }) => (14, 14 + 20),
                (IpAddr::V4(_), _) => (14, bytes.len()),
                (IpAddr::V6(_), Transport::Udp { checksum: false, .. }) => continue,
                (IpAddr::V6(_), _) => (14 + 8, bytes.len()),
            };
            for at in from..covered {
                let mut broken = bytes.clone();
                broken[at] ^= 0x10;
                let seen = inspect(&broken, None);
                assert!(seen.is_err(), "byte {at} of {packet:?}: {seen:?}");
            }
        }
    }

    #[test]
    fn inspect_refuses_every_truncation() {
        for packet in packets() {
            let bytes = frame(A, B, &packet).expect("legal");
            for len in 0..bytes.len() {
                assert!(inspect(&bytes[..len], None).is_err(), "{len} bytes of {packet:?}");
            }
        }
    }

    #[test]
    fn frame_refuses_mixed_families() {
        let mut packet = packets().remove(0);
        packet.destination = Ipv6Addr::LOCALHOST.into();
        assert!(frame(A, B, &packet).is_err());
    }
}
