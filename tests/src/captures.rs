//! Packets that others captured, and what may be done to a frame before it is sent.

use std::fs::File;
use std::path::Path;

use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use sluice_abi::Family;

use crate::fixtures::{from_peer, tunnel_macs};
use crate::random::Random;
use crate::world::mac;

/// Frames of a capture, up to where it is broken.
pub fn frames(path: &Path) -> Vec<Vec<u8>> {
    let Ok(file) = File::open(path) else { return Vec::new() };
    if let Ok(mut reader) = PcapReader::new(file) {
        let link = reader.header().datalink;
        let mut frames = Vec::new();
        while let Some(Ok(packet)) = reader.next_packet() {
            frames.push(frame(link, &packet.data));
        }
        return frames;
    }
    let Ok(file) = File::open(path) else { return Vec::new() };
    let Ok(mut reader) = PcapNgReader::new(file) else { return Vec::new() };
    let mut links = Vec::new();
    let mut frames = Vec::new();
    while let Some(Ok(block)) = reader.next_block() {
        match block {
            Block::InterfaceDescription(interface) => links.push(interface.linktype),
            Block::EnhancedPacket(packet) => {
                let link = links.get(packet.interface_id as usize).copied();
                frames.push(frame(link.unwrap_or(DataLink::ETHERNET), &packet.data));
            }
            Block::SimplePacket(packet) => {
                let link = links.first().copied();
                frames.push(frame(link.unwrap_or(DataLink::ETHERNET), &packet.data));
            }
            _ => {}
        }
    }
    frames
}

/// A packet as an Ethernet frame: raw IP gets a header. The bytes of any other link are taken for
/// Ethernet as they are: whatever they are, they may not break anything.
fn frame(link: DataLink, data: &[u8]) -> Vec<u8> {
    let ethertype = match (link, data.first().map(|b| b >> 4)) {
        (DataLink::RAW | DataLink::IPV4, Some(4)) => [0x08, 0x00],
        (DataLink::RAW | DataLink::IPV6, Some(6)) => [0x86, 0xdd],
        _ => return data.to_vec(),
    };
    [&mac::UPLINK.0[..], &mac::GATEWAY.0, &ethertype, data].concat()
}

/// The frame behind `tags`.
pub fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    let at = frame.len().min(12);
    [&frame[..at], tags.concat().as_slice(), &frame[at..]].concat()
}

/// The frame inside VXLAN from a known tunnel end, for our device; nothing if it does not fit.
pub fn wrapped(frame: &[u8], underlay: Family) -> Option<Vec<u8>> {
    let mut inside = frame.to_vec();
    if let Some(dst) = inside.get_mut(..6) {
        dst.copy_from_slice(&tunnel_macs(underlay).0.0);
    }
    (frame.len() < 65_000).then(|| from_peer(underlay, &inside).bytes())
}

/// Cut at two random places.
pub fn cut(frame: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    // Most headers end early, so one of the places is there.
    [frame.len(), frame.len().min(100)]
        .into_iter()
        .map(|reach| frame[..random.below(reach + 1)].to_vec())
        .collect()
}
