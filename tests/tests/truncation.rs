//! Every header stack cut at every byte: host and kernel agree, and what passes is as it came.

use sluice_abi::{Family, Hook, Reason, VerdictKind};
use sluice_tests::fixtures::{from_peer, pod_request, request};
use sluice_tests::host::Host;
use sluice_tests::judge::agree;
use sluice_tests::kernel::Kernel;
use sluice_tests::netns::with_kernel;
use sluice_tests::packet::{Packet, l4_offset};
use sluice_tests::world::{FAMILIES, PROTOCOLS, Svc, World, dev};

/// Frames that are handled when they are whole.
const SERVICES: [Svc; 3] = [Svc::LocalStack, Svc::LocalRedirect, Svc::TunnelV4];

fn in_both(law: impl FnOnce(&mut Host, &mut Kernel) + Send + 'static) {
    with_kernel(|kernel| {
        let world = World::standard();
        kernel.fill(&world);
        law(&mut Host::new(&world), kernel);
    });
}

fn plain() -> impl Iterator<Item = Packet> {
    FAMILIES.into_iter().flat_map(|family| {
        PROTOCOLS.into_iter().flat_map(move |proto| {
            SERVICES.into_iter().map(move |service| request(family, proto, service))
        })
    })
}

/// Inner packets and the underlay that they come through.
fn tunnelled() -> impl Iterator<Item = (Family, Packet)> {
    FAMILIES.into_iter().flat_map(|underlay| {
        FAMILIES.into_iter().flat_map(move |family| {
            PROTOCOLS.into_iter().flat_map(move |proto| {
                let packet = move |service| pod_request(family, proto, service, underlay);
                SERVICES.into_iter().map(move |service| (underlay, packet(service)))
            })
        })
    })
}

/// Changes the lengths of IP and UDP headers so that the frame is whole, however short.
fn mend(frame: &mut [u8], family: Family, udp: bool) {
    let l4 = l4_offset(family);
    let ip_len = frame.len().saturating_sub(14);
    let mut put = |at: usize, value: usize| {
        if let Some(field) = frame.get_mut(at..at + 2) {
            field.copy_from_slice(&(value as u16).to_be_bytes());
        }
    };
    match family {
        Family::V4 => put(16, ip_len),
        Family::V6 => put(18, ip_len.saturating_sub(40)),
    }
    if udp {
        put(l4 + 4, (ip_len + 14).saturating_sub(l4));
    }
}

#[test]
fn frame_cut_anywhere_is_never_forwarded_nor_changed() {
    in_both(|host, kernel| {
        let whole = plain().map(|p| p.bytes()).chain(
            tunnelled().map(|(underlay, packet)| from_peer(underlay, &packet.bytes()).bytes()),
        );
        let mut cuts = 0;
        for frame in whole {
            // The same five-tuple through another tunnel would be refused.
            *host = Host::new(&World::standard());
            kernel.clear_state();
            for len in 0..frame.len() {
                for hook in [Hook::Xdp, Hook::TcIngress, Hook::TcEgress] {
                    let reason = agree(host, kernel, hook, dev::UPLINK, &frame[..len]);
                    assert_ne!(reason.kind(), VerdictKind::Forward, "{len} bytes: {reason:?}");
                    cuts += 1;
                }
            }
            let reason = agree(host, kernel, Hook::Xdp, dev::UPLINK, &frame);
            assert_eq!(reason.kind(), VerdictKind::Forward, "whole, and yet {reason:?}");
        }
        println!("{cuts} frames");
    });
}

#[test]
fn inner_frame_cut_anywhere_is_dropped_inside_a_whole_tunnel_packet() {
    in_both(|host, kernel| {
        for (underlay, packet) in tunnelled() {
            let inside = packet.bytes();
            for len in 0..inside.len() {
                let frame = from_peer(underlay, &inside[..len]).bytes();
                let reason = agree(host, kernel, Hook::Xdp, dev::UPLINK, &frame);
                let expected = if len < 14 { Reason::VxlanMalformed } else { Reason::IpMalformed };
                assert_eq!(reason, expected, "{len} bytes");
            }
        }
    });
}

#[test]
fn headers_cut_anywhere_with_mended_lengths_are_dropped() {
    in_both(|host, kernel| {
        for packet in plain() {
            let (family, udp) = (packet.family(), packet.proto == sluice_abi::IPPROTO_UDP);
            let l4 = l4_offset(family) + if udp { 8 } else { 20 };
            for len in 14..l4 {
                let mut frame = packet.bytes();
                frame.truncate(len);
                mend(&mut frame, family, udp);
                let reason = agree(host, kernel, Hook::Xdp, dev::UPLINK, &frame);
                assert_eq!(reason.kind(), VerdictKind::Drop, "{len} bytes: {reason:?}");
            }
            // Cut in the payload and mended, it is a packet again.
            let mut frame = packet.bytes();
            frame.truncate(l4 + 1);
            mend(&mut frame, family, udp);
            let reason = agree(host, kernel, Hook::Xdp, dev::UPLINK, &frame);
            assert_eq!(reason.kind(), VerdictKind::Forward, "{reason:?}");
        }
        for (underlay, packet) in tunnelled() {
            let udp = packet.proto == sluice_abi::IPPROTO_UDP;
            let l4 = l4_offset(packet.family()) + if udp { 8 } else { 20 };
            for len in 14..l4 {
                let mut inside = packet.bytes();
                inside.truncate(len);
                mend(&mut inside, packet.family(), udp);
                let frame = from_peer(underlay, &inside).bytes();
                let reason = agree(host, kernel, Hook::Xdp, dev::UPLINK, &frame);
                assert_eq!(reason.kind(), VerdictKind::Drop, "{len} bytes: {reason:?}");
            }
        }
    });
}
