//! Laws about the table of fragmented packets: it is bounded, it takes nothing from others, and what
//! stands in it half written translates nothing.

use sluice_abi::{
    Family, Fragment, Hook, IPPROTO_UDP, Reason, flow_tag, fragment_fate, fragment_part,
};
use sluice_tests::fixtures::{CLIENT_PORT, from_peer, request, tunnel_macs};
use sluice_tests::host::Host;
use sluice_tests::packet::{Packet, extension, icmp};
use sluice_tests::world::{FAMILIES, SERVICE_PORT, Svc, World, dev, ip, size};

const FIRST: std::ops::Range<usize> = 0..40;
const LATER: std::ops::Range<usize> = 40..usize::MAX;

fn packet(family: Family, service: Svc) -> Packet {
    request(family, IPPROTO_UDP, service).payload(vec![7; 100])
}

fn send(host: &Host, packet: Packet) -> (Reason, Vec<u8>) {
    let ran = host.run(Hook::Xdp, dev::UPLINK, &packet.bytes(), 200);
    (ran.verdict.reason, ran.bytes)
}

fn noted(host: &Host) -> Vec<(u32, Fragment)> {
    let all = host.fragments().into_iter().enumerate();
    all.filter(|(_, f)| f.seal != 0).map(|(i, f)| (i as u32, f)).collect()
}

#[test]
fn flood_of_fragments_evicts_only_fragments() {
    for family in FAMILIES {
        let host = Host::new(&World::standard());
        for n in 0..40 {
            let other = packet(family, Svc::LocalStack).from(ip::client(family, n), CLIENT_PORT);
            assert_eq!(send(&host, other).0, Reason::DnatLocal);
        }
        let tags = |host: &Host| host.flow_sets().iter().map(|s| s.tags).collect::<Vec<_>>();
        let before = tags(&host);
        let one = packet(family, Svc::LocalStack).from(ip::client(family, 1), CLIENT_PORT);
        for id in 0..10_000 {
            assert_eq!(send(&host, one.clone().piece(id, FIRST)).0, Reason::DnatLocal);
            assert_eq!(send(&host, one.clone().piece(id, LATER)).0, Reason::DnatLocal);
            // Later ones without a first, and passing ones, leave no trace at all.
            let kept = noted(&host);
            let orphan = one.clone().piece(id + 1, LATER);
            assert_eq!(send(&host, orphan).0, Reason::FragmentOrphan);
            let transit = one.clone().to(ip::elsewhere(family), 80).piece(id, FIRST);
            assert_eq!(send(&host, transit).0, Reason::NoService);
            assert_eq!(noted(&host), kept);
        }
        assert_eq!(tags(&host), before);
        assert!(noted(&host).len() <= size::FRAGMENTS as usize);
    }
}

#[test]
fn first_fragment_is_waited_for_no_longer_than_by_the_receiver() {
    for family in FAMILIES {
        let world = World::standard();
        let host = Host::new(&world);
        let one = packet(family, Svc::LocalStack);
        send(&host, one.clone().piece(5, FIRST));
        let lifetime = 30 * world.settings.ticks_per_second;
        host.now.set(host.now.get() + lifetime);
        assert_eq!(send(&host, one.clone().piece(5, LATER)).0, Reason::DnatLocal);
        host.now.set(host.now.get() + 1);
        assert_eq!(send(&host, one.piece(5, LATER)).0, Reason::FragmentOrphan);
    }
}

/// Two CPUs write one entry at once: each field may be of either. Whatever a later fragment then
/// does, it does not go another packet's way.
#[test]
fn torn_entry_translates_nothing() {
    for family in FAMILIES {
        // The same client and the same address: connections that differ in their ports alone.
        let one = packet(family, Svc::NodePort);
        let mut world = World::standard();
        let mut second = world.frontends[&Svc::Pair.key(family, IPPROTO_UDP)];
        let key = sluice_abi::FrontendKey {
            port: sluice_abi::Be16::new(SERVICE_PORT),
            ..Svc::NodePort.key(family, IPPROTO_UDP)
        };
        second.service = 100;
        world.frontends.insert(key, second);
        let host = Host::new(&world);
        let other = one.clone().to(Svc::NodePort.addr(family), SERVICE_PORT);
        send(&host, one.clone().piece(5, FIRST));
        let (index, a) = noted(&host)[0];
        send(&host, other.piece(6, FIRST));
        let b = noted(&host).into_iter().find(|(_, f)| f.id == 6).expect("noted").1;
        host.set_fragment(index, a);
        let (reason, right) = send(&host, one.clone().piece(5, LATER));
        assert_eq!(reason, Reason::DnatLocal);
        for mixed in 0u32..1 << 6 {
            let pick = |bit: u32| if mixed >> bit & 1 == 0 { a } else { b };
            let torn = Fragment {
                id: pick(0).id,
                slot: pick(1).slot,
                tag: pick(2).tag,
                fate: pick(3).fate,
                seal: pick(4).seal,
                noted: pick(5).noted,
                ..a
            };
            host.set_fragment(index, torn);
            let (reason, bytes) = send(&host, one.clone().piece(5, LATER));
            if reason == Reason::DnatLocal {
                assert_eq!(bytes, right, "{torn:?}");
            } else {
                assert_eq!(reason, Reason::Fragment, "{torn:?}");
            }
        }
    }
}

/// The record ends, and another connection of the same client gets its place.
#[test]
fn later_fragment_does_not_follow_into_the_next_connection() {
    for family in FAMILIES {
        let host = Host::new(&World::standard());
        let one = packet(family, Svc::LocalStack);
        send(&host, one.clone().piece(5, FIRST));
        for (index, mut set) in host.flow_sets().into_iter().enumerate() {
            set.tags =
                set.tags.map(|tag| if flow_tag::is_used(tag) { tag ^ flow_tag::NEXT } else { tag });
            host.set_flow_set(index as u32, set);
        }
        assert_eq!(send(&host, one.piece(5, LATER)).0, Reason::FragmentOrphan);
    }
}

/// What the host itself talks about through the tunnel has our SNAT source as its address, too.
#[test]
fn a26_fragments_follow_a_first_one_that_passed() {
    for family in FAMILIES {
        for underlay in FAMILIES {
            let host = Host::new(&World::standard());
            let (ours, peers) = tunnel_macs(underlay);
            let icmp = match family {
                Family::V4 => 1,
                Family::V6 => 58,
            };
            let mut echo = packet(family, Svc::LocalStack)
                .from(ip::peer_pod(family, 9), 0)
                .to(ip::tunnel(family), 0)
                .eth(peers, ours);
            echo.proto = icmp;
            let frame = |bytes| from_peer(underlay, &echo.clone().piece(9, bytes).bytes());
            assert_eq!(send(&host, frame(LATER)).0, Reason::FragmentOrphan);
            assert_eq!(send(&host, frame(FIRST)).0, Reason::Fragment);
            let [(_, entry)] = noted(&host)[..] else { panic!("not noted") };
            assert_eq!((entry.fate, entry.part), (fragment_fate::PASS, fragment_part::WHOLE));
            assert_eq!(send(&host, frame(LATER)).0, Reason::Fragment);
        }
    }
}

#[test]
fn a26_fragments_follow_a_message_that_passed() {
    for family in FAMILIES {
        let (v4, vip) = (family == Family::V4, Svc::LocalStack.addr(family));
        let message = |kind| icmp(ip::client(family, 7), vip, kind, 1, &[7; 101]);
        let with_options = match family {
            Family::V4 => message((8, 0)).options_of_ip(&[1; 8]),
            Family::V6 => message((128, 0)).extensions(&[extension(60, 16)]),
        };
        let cases = [
            (message(if v4 { (3, 3) } else { (1, 4) }), Reason::Fragment),
            (message(if v4 { (13, 0) } else { (129, 0) }), Reason::Fragment),
            (with_options, Reason::IpOptions),
        ];
        for (packet, reason) in cases {
            let host = Host::new(&World::standard());
            assert_eq!(send(&host, packet.clone().piece(3, LATER)).0, Reason::FragmentOrphan);
            assert_eq!(send(&host, packet.clone().piece(3, FIRST)).0, reason);
            assert_eq!(send(&host, packet.piece(3, LATER)).0, Reason::Fragment);
        }
    }
}

/// The limits of answers know the first fragment of an echo request; of those behind it only as many
/// go back as a packet can have.
#[test]
fn a50_fragments_behind_an_echo_are_bounded() {
    for family in FAMILIES {
        let host = Host::new(&World::standard());
        let kind = if family == Family::V4 { (8, 0) } else { (128, 0) };
        let vip = Svc::LocalStack.addr(family);
        let asks = icmp(ip::client(family, 7), vip, kind, 1, &[7; 101]);
        assert_eq!(send(&host, asks.clone().piece(3, FIRST)).0, Reason::EchoReply);
        let later = asks.piece(3, LATER);
        for n in 0..sluice_abi::MAX_ECHO_FRAGMENTS {
            assert_eq!(send(&host, later.clone()).0, Reason::EchoReply, "{n}");
        }
        assert_eq!(send(&host, later).0, Reason::EchoLimited);
    }
}
