//! Where the program of a lane is missing, the fast program gives its own reason's verdict.

use std::io::ErrorKind;

use aya::maps::{MapError, ProgramArray};
use sluice_abi::{Family, Hook, IPPROTO_UDP, Lane, Reason, VerdictKind, maps};
use sluice_tests::fixtures::{request, tunnel_service};
use sluice_tests::judge::{Outcome, Runner};
use sluice_tests::kernel::{Kernel, code};
use sluice_tests::netns::with_kernel;
use sluice_tests::packet::tag;
use sluice_tests::world::{FAMILIES, Svc, World, dev};

/// Sends a frame to the uplink of a node without the program of a lane.
fn send(lane: Lane, world: World, frame: Vec<u8>) -> (Reason, Outcome) {
    with_kernel(move |kernel| {
        take_away(kernel, lane);
        kernel.fill(&world);
        kernel.send(Hook::Xdp, dev::UPLINK, &frame)
    })
}

fn take_away(kernel: &mut Kernel, lane: Lane) {
    let mut jump: ProgramArray<_> = kernel.map_mut(maps::JUMP).try_into().expect("programs");
    match jump.clear_index(&lane.slot(Hook::Xdp)) {
        Ok(()) => {}
        // Another test has.
        Err(MapError::KeyNotFound) => {}
        Err(MapError::SyscallError(e)) if e.io_error.kind() == ErrorKind::NotFound => {}
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn without_its_lane_a_tagged_frame_passes_untouched() {
    for family in FAMILIES {
        let frame = request(family, IPPROTO_UDP, Svc::LocalStack).tags(&[tag(0x8100, 42)]).bytes();
        let (reason, outcome) = send(Lane::General, World::standard(), frame.clone());
        assert_eq!((reason, outcome.code), (Reason::Vlan, code::XDP_PASS));
        assert_eq!(outcome.bytes, frame);
    }
}

#[test]
fn without_its_lane_a_packet_that_outer_headers_must_sum_up_is_dropped() {
    let (service, _) = tunnel_service(Family::V6);
    let mut packet = request(Family::V4, IPPROTO_UDP, service);
    packet.no_checksum = true;
    let (reason, outcome) = send(Lane::General, World::standard(), packet.bytes());
    assert_eq!((reason, outcome.code), (Reason::NoLane, code::XDP_DROP));
    assert_eq!(reason.kind(), VerdictKind::Drop);
}

#[test]
fn without_its_lane_a_packet_that_is_to_be_answered_is_dropped_in_silence() {
    for family in FAMILIES {
        let frame = request(family, IPPROTO_UDP, Svc::Empty).bytes();
        let (reason, outcome) = send(Lane::Answer, World::replacing(), frame);
        assert_eq!((reason, outcome.code), (Reason::NoEndpoint, code::XDP_DROP));
    }
}
