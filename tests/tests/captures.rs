//! Packets that others captured: nothing of them breaks the packet logic, host and kernel agree on
//! each, and what passes is as it came.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use sluice_abi::{Addr, Family, Hook, PodNet, Reason, VerdictKind};
use sluice_tests::fixtures::{from_peer, tunnel_macs};
use sluice_tests::host::Host;
use sluice_tests::judge::agree;
use sluice_tests::netns::with_kernel;
use sluice_tests::shared_data;
use sluice_tests::world::{FAMILIES, World, dev, ip, mac};

/// Frames of a capture, up to where it is broken.
fn frames(path: &Path) -> Vec<Vec<u8>> {
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

/// Runs every captured frame, as `change` makes it, at every hook that `hooks` names.
fn replay(
    test: &str,
    world: World,
    hooks: &'static [Hook],
    change: fn(&[u8]) -> Vec<Vec<u8>>,
) -> BTreeMap<Reason, u32> {
    let Some(files) = shared_data::files(test, "pcaps") else { return BTreeMap::new() };
    let reasons = with_kernel(move |kernel| {
        kernel.fill(&world);
        let mut host = Host::new(&world);
        let mut reasons = BTreeMap::new();
        for path in &files {
            for frame in frames(path) {
                for frame in change(&frame) {
                    for &hook in hooks {
                        let reason = agree(&mut host, kernel, hook, dev::UPLINK, &frame);
                        *reasons.entry(reason).or_insert(0) += 1;
                    }
                }
            }
        }
        reasons
    });
    println!("{reasons:?}");
    assert!(reasons.values().sum::<u32>() > 1000, "too few packets: {reasons:?}");
    reasons
}

#[test]
fn captured_frames_break_nothing_at_any_hook() {
    let test = "captured_frames_break_nothing_at_any_hook";
    let hooks = &[Hook::Xdp, Hook::TcIngress, Hook::TcEgress];
    let reasons = replay(test, World::standard(), hooks, |frame| vec![frame.to_vec()]);
    // Nobody in the captures speaks to our Services.
    assert!(reasons.keys().all(|r| r.kind() != VerdictKind::Forward), "{reasons:?}");
}

#[test]
fn captured_frames_break_nothing_inside_a_tunnel() {
    let test = "captured_frames_break_nothing_inside_a_tunnel";
    let mut world = World::standard();
    for vtep in &mut world.vteps {
        // Whoever sent it may send it.
        vtep.pod_nets = [PodNet { net: Addr::NONE, mask: Addr::NONE }; 4];
    }
    replay(test, world, &[Hook::Xdp], |frame| {
        let wrap = |underlay: Family| {
            let mut inside = frame.to_vec();
            if let Some(dst) = inside.get_mut(..6) {
                dst.copy_from_slice(&tunnel_macs(underlay).0.0);
            }
            from_peer(underlay, &inside).bytes()
        };
        FAMILIES.into_iter().filter(|_| frame.len() < 9000).map(wrap).collect()
    });
}

#[test]
fn captured_frames_for_our_pod_are_delivered_or_dropped_alike() {
    let test = "captured_frames_for_our_pod_are_delivered_or_dropped_alike";
    let mut world = World::standard();
    for vtep in &mut world.vteps {
        vtep.pod_nets = [PodNet { net: Addr::NONE, mask: Addr::NONE }; 4];
    }
    let reasons = replay(test, world, &[Hook::Xdp], |frame| {
        let mut inside = frame.to_vec();
        let (at, pod) = match inside.get(12..14) {
            Some([0x08, 0x00]) => (30, ip::pod_redirect(Family::V4).v4_bytes().to_vec()),
            Some([0x86, 0xdd]) => (38, ip::pod_redirect(Family::V6).0.to_vec()),
            _ => return Vec::new(),
        };
        let Some(dst) = inside.get_mut(at..at + pod.len()) else { return Vec::new() };
        dst.copy_from_slice(&pod);
        if let Some(dst) = inside.get_mut(..6) {
            dst.copy_from_slice(&tunnel_macs(Family::V4).0.0);
        }
        vec![from_peer(Family::V4, &inside).bytes()]
    });
    if !reasons.is_empty() {
        assert!(reasons.contains_key(&Reason::DecapLocal), "{reasons:?}");
    }
}
