//! What a CPU remembers of pods and tunnel ends ends with the tables' next change.

use sluice_abi::{Delivery, Family, Hook, IPPROTO_UDP, Reason};
use sluice_tests::fixtures::from_peer;
use sluice_tests::host::Host;
use sluice_tests::judge::Runner;
use sluice_tests::kernel::code;
use sluice_tests::netns::with_kernel;
use sluice_tests::packet::Packet;
use sluice_tests::world::{FAMILIES, World, dev, ip, mac};

/// Holds on the host and in the loaded program.
fn on_both(law: fn(&mut dyn Runner, &World)) {
    let world = World::standard();
    println!("on the host");
    law(&mut Host::new(&world), &world);
    println!("in the kernel");
    with_kernel(move |kernel| {
        kernel.fill(&world);
        law(kernel, &world);
    });
}

/// What becomes of a packet from a pod of the peer to a pod of ours: the reason and the program's answer.
fn packet_to_pod(runner: &mut dyn Runner, family: Family) -> (Reason, u32) {
    let packet =
        Packet::new(IPPROTO_UDP, (ip::peer_pod(family, 5), 4000), (ip::pod_stack(family), 80))
            .eth(mac::PEER_V4, mac::VXLAN_V4);
    let frame = from_peer(Family::V4, &packet.bytes()).bytes();
    let (reason, outcome) = runner.send(Hook::Xdp, dev::UPLINK, &frame);
    (reason, outcome.code)
}

#[test]
fn pod_that_has_gone_gets_nothing_more_and_one_that_comes_gets_all() {
    on_both(|runner, world| {
        for family in FAMILIES {
            let mut without = world.clone();
            without.pods.remove(&ip::pod_stack(family)).expect("it was there");
            for _ in 0..2 {
                assert_eq!(packet_to_pod(runner, family).0, Reason::DecapLocal);
                assert_eq!(packet_to_pod(runner, family).0, Reason::DecapLocal);
                runner.rewrite(&without);
                assert_eq!(packet_to_pod(runner, family).0, Reason::InnerNotLocal);
                assert_eq!(packet_to_pod(runner, family).0, Reason::InnerNotLocal);
                runner.rewrite(world);
            }
        }
    });
}

#[test]
fn pod_that_is_delivered_to_in_another_way_is_so_at_once() {
    on_both(|runner, world| {
        for family in FAMILIES {
            let mut other = world.clone();
            let pod = other.pods.get_mut(&ip::pod_stack(family)).expect("it is there");
            pod.delivery = Delivery::Redirect as u16;
            let (_, before) = packet_to_pod(runner, family);
            assert_eq!(before, code::XDP_PASS);
            runner.rewrite(&other);
            let (_, after) = packet_to_pod(runner, family);
            assert_eq!(after, code::XDP_REDIRECT);
            runner.rewrite(world);
        }
    });
}

#[test]
fn tunnel_end_that_has_gone_sends_nothing_more() {
    on_both(|runner, world| {
        for family in FAMILIES {
            let mut without = world.clone();
            without.vtep_sources.clear();
            assert_eq!(packet_to_pod(runner, family).0, Reason::DecapLocal);
            runner.rewrite(&without);
            assert_eq!(packet_to_pod(runner, family).0, Reason::UnknownVtepPassed);
            runner.rewrite(world);
            assert_eq!(packet_to_pod(runner, family).0, Reason::DecapLocal);
        }
    });
}
