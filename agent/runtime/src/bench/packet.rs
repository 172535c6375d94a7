//! The frames of the scenarios: bytes, and the places in which flows differ.

use sluice_abi::{Addr, BENCH_WORDS, BenchRun, BenchTarget, Family, IPPROTO_TCP, IPPROTO_UDP, Mac};

/// Bytes of the innermost frame: the size that peers' figures are of.
pub const FRAME_LEN: usize = 128;

/// TCP control bit SYN.
pub const SYN: u8 = 0x02;
/// TCP control bit ACK.
pub const ACK: u8 = 0x10;

const ETH_LEN: usize = 14;
const TCP_LEN: usize = 20;
/// TCP acknowledgement number of every segment.
pub const ACK_NUMBER: u32 = 1;
/// Payload of [`FRAME_LEN`] bytes that nothing reads.
const SPARE_AT: usize = 120;

/// A TCP segment in its Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Destination MAC.
    pub dst_mac: Mac,
    /// Source MAC.
    pub src_mac: Mac,
    /// Source address. With flows, its last two bytes are the flow's.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port. With flows, it is the flow's.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// TCP control bits.
    pub flags: u8,
}

/// The headers in front of a frame in a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Destination MAC.
    pub dst_mac: Mac,
    /// Source MAC.
    pub src_mac: Mac,
    /// The sending node.
    pub src: Addr,
    /// The receiving node.
    pub dst: Addr,
    /// UDP destination port.
    pub port: u16,
    /// VNI, 24 bits.
    pub vni: u32,
}

/// A frame and where its flows differ.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The frame, of flow 0.
    pub frame: Vec<u8>,
    address_at: usize,
    port_at: usize,
    id_at: usize,
    balance_at: usize,
}

impl Packet {
    /// A frame without a tunnel. Without `flows`, all packets are of the one flow that it says.
    pub fn plain(segment: &Segment, flows: bool) -> Self {
        let v4 = segment.src.family() == Family::V4;
        let l3_len = if v4 { 20 } else { 40 };
        let l4 = ETH_LEN + l3_len;
        let mut packet = if flows {
            Self {
                frame: vec![0; FRAME_LEN],
                address_at: ETH_LEN + if v4 { 14 } else { 22 },
                port_at: l4,
                id_at: if v4 { ETH_LEN + 4 } else { l4 + 4 },
                balance_at: l4 + 4,
            }
        } else {
            Self {
                frame: vec![0; FRAME_LEN],
                address_at: SPARE_AT,
                port_at: SPARE_AT + 2,
                id_at: SPARE_AT + 4,
                balance_at: SPARE_AT + 4,
            }
        };
        let f = &mut packet.frame;
        put(f, 0, &segment.dst_mac.0);
        put(f, 6, &segment.src_mac.0);
        put(f, 12, &(if v4 { [0x08, 0x00] } else { [0x86, 0xdd] }));
        write_ip(&mut f[ETH_LEN..], segment.src, segment.dst, IPPROTO_TCP);
        put(f, l4, &segment.src_port.to_be_bytes());
        put(f, l4 + 2, &segment.dst_port.to_be_bytes());
        put(f, l4 + 8, &ACK_NUMBER.to_be_bytes());
        put(f, l4 + 12, &[0x50, segment.flags, 0xff, 0xff]);
        packet.be_flow_0();
        let f = &mut packet.frame;
        if v4 {
            let sum = !fold(sum(&f[ETH_LEN..l4]));
            put(f, ETH_LEN + 10, &sum.to_be_bytes());
        }
        let pseudo = sum(&f[l4 - if v4 { 8 } else { 32 }..l4])
            + u32::from(IPPROTO_TCP)
            + (FRAME_LEN - l4) as u32;
        let checksum = !fold(pseudo + sum(&f[l4..]));
        put(f, l4 + 16, &checksum.to_be_bytes());
        packet
    }

    /// The same frame in a tunnel (RFC 7348 section 5). The outer UDP checksum is zero, as a sender
    /// may have it (over IPv6 by RFC 6935).
    pub fn encapsulated(self, outer: &Outer) -> Self {
        let v4 = outer.src.family() == Family::V4;
        let l4 = ETH_LEN + if v4 { 20 } else { 40 };
        let len = l4 + 8 + 8;
        let mut frame = vec![0; len];
        frame.extend_from_slice(&self.frame);
        let f = &mut frame;
        put(f, 0, &outer.dst_mac.0);
        put(f, 6, &outer.src_mac.0);
        put(f, 12, &(if v4 { [0x08, 0x00] } else { [0x86, 0xdd] }));
        write_ip(&mut f[ETH_LEN..], outer.src, outer.dst, IPPROTO_UDP);
        if v4 {
            let sum = !fold(sum(&f[ETH_LEN..l4]));
            put(f, ETH_LEN + 10, &sum.to_be_bytes());
        }
        put(f, l4, &0xc123u16.to_be_bytes());
        put(f, l4 + 2, &outer.port.to_be_bytes());
        let udp_len = (f.len() - l4) as u16;
        put(f, l4 + 4, &udp_len.to_be_bytes());
        put(f, l4 + 8, &[0x08, 0, 0, 0]);
        put(f, l4 + 12, &(outer.vni << 8).to_be_bytes());
        Self {
            frame,
            address_at: self.address_at + len,
            port_at: self.port_at + len,
            id_at: self.id_at + len,
            balance_at: self.balance_at + len,
        }
    }

    /// What the wrapper is to do with it.
    pub fn run(&self, target: BenchTarget, flows: u32, next: u32) -> BenchRun {
        let mut template = BenchRun::default().template;
        for (word, bytes) in template.iter_mut().zip(self.frame.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            *word = u64::from_ne_bytes(eight);
        }
        BenchRun {
            template,
            len: self.frame.len() as u32,
            // Nothing behind the transport header is ever rewritten.
            extended: u32::from(
                self.frame.len() - FRAME_LEN + ETH_LEN + 40 + TCP_LEN > BENCH_WORDS * 8,
            ),
            next,
            flow_mask: flows.wrapping_sub(1),
            address_at: self.address_at as u32,
            port_at: self.port_at as u32,
            id_at: self.id_at as u32,
            balance_at: self.balance_at as u32,
            target: target as u32,
            reserved: 0,
        }
    }

    /// Writes what the wrapper writes for flow 0, so that the checksums are right with it.
    fn be_flow_0(&mut self) {
        let (address, port) = BenchRun::flow(0);
        put(&mut self.frame, self.address_at, &address.to_be_bytes());
        put(&mut self.frame, self.port_at, &port.to_be_bytes());
        put(&mut self.frame, self.id_at, &(!address).to_be_bytes());
        put(&mut self.frame, self.balance_at, &(!address).to_be_bytes());
        put(&mut self.frame, self.balance_at + 2, &(!port).to_be_bytes());
    }
}

/// An IP header for all of `l3`, without the IPv4 checksum.
fn write_ip(l3: &mut [u8], src: Addr, dst: Addr, proto: u8) {
    let len = l3.len() as u16;
    if src.family() == Family::V4 {
        put(l3, 0, &[0x45, 0]);
        put(l3, 2, &len.to_be_bytes());
        put(l3, 6, &[0x40, 0, 64, proto]);
        put(l3, 12, &src.v4_bytes());
        put(l3, 16, &dst.v4_bytes());
    } else {
        put(l3, 0, &[0x60]);
        put(l3, 4, &(len - 40).to_be_bytes());
        put(l3, 6, &[proto, 64]);
        put(l3, 8, &src.0);
        put(l3, 24, &dst.0);
    }
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
}

/// RFC 1071; at most 64 kB.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| {
            u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
        })
        .sum()
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn segment(src: &str, dst: &str) -> Segment {
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().expect("literal"));
        Segment {
            dst_mac: Mac([2, 0, 0, 0, 0, 1]),
            src_mac: Mac([2, 0, 0, 0, 0, 2]),
            src: addr(src),
            dst: addr(dst),
            src_port: 1234,
            dst_port: 80,
            flags: ACK,
        }
    }

    /// What the wrapper makes of a template for packet `number`.
    fn as_wrapper(packet: &Packet, run: &BenchRun, number: u32) -> Vec<u8> {
        let mut frame = packet.frame.clone();
        let (address, port) = BenchRun::flow(BenchRun::flow_of(number, run.flow_mask));
        put(&mut frame, run.address_at as usize, &address.to_be_bytes());
        put(&mut frame, run.port_at as usize, &port.to_be_bytes());
        put(&mut frame, run.id_at as usize, &(!address).to_be_bytes());
        put(&mut frame, run.balance_at as usize, &(!address).to_be_bytes());
        put(&mut frame, run.balance_at as usize + 2, &(!port).to_be_bytes());
        frame
    }

    #[test]
    fn checksums_are_right_for_every_flow() {
        for (src, dst, header) in
            [("198.18.0.0", "203.0.113.1", 20), ("2001:db8:18::", "2001:db8:51::1", 40)]
        {
            for flows in [true, false] {
                let packet = Packet::plain(&segment(src, dst), flows);
                let run = packet.run(BenchTarget::Node, 65_536, 0);
                for number in [0, 1, 2, 77, 65_535, 123_456_789] {
                    let frame = as_wrapper(&packet, &run, number);
                    let l4 = ETH_LEN + header;
                    if header == 20 {
                        assert_eq!(fold(sum(&frame[ETH_LEN..l4])), 0xffff, "{number}");
                    }
                    let addresses = sum(&frame[l4 - if header == 20 { 8 } else { 32 }..l4]);
                    let all = addresses + 6 + (FRAME_LEN - l4) as u32 + sum(&frame[l4..]);
                    assert_eq!(fold(all), 0xffff, "{src} {number}");
                }
            }
        }
    }

    #[test]
    fn whatever_is_rewritten_is_written_back() {
        let inner = Packet::plain(&segment("2001:db8:18::", "2001:db8:51::1"), true);
        let outer = Outer {
            dst_mac: Mac([2, 0, 0, 0, 0, 1]),
            src_mac: Mac([2, 0, 0, 0, 0, 2]),
            src: Addr([1; 16]),
            dst: Addr([2; 16]),
            port: 8472,
            vni: 1,
        };
        let packet = inner.encapsulated(&outer);
        assert_eq!(packet.frame.len(), FRAME_LEN + 70);
        let run = packet.run(BenchTarget::Node, 1, 0);
        assert_eq!(run.extended, 1);
        let checksum_at = 70 + ETH_LEN + 40 + 16;
        assert!(checksum_at + 2 <= size_of_val(&run.template));
    }
}
