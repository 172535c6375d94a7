//! Packets that others captured: nothing of them breaks the packet logic, host and kernel agree on
//! each, and what passes is as it came.

use std::collections::BTreeMap;

use sluice_abi::{Addr, Family, Hook, PodNet, Reason, VerdictKind};
use sluice_tests::captures::{cut, frames, tagged, wrapped};
use sluice_tests::host::Host;
use sluice_tests::judge::agree;
use sluice_tests::netns::with_kernel;
use sluice_tests::random::Random;
use sluice_tests::shared_data;
use sluice_tests::world::{FAMILIES, World, dev, ip};

/// Every hook.
const HOOKS: &[Hook] = &[Hook::Xdp, Hook::TcIngress, Hook::TcEgress];

/// What becomes of a captured frame before it is sent: any number of frames.
type Change = fn(&[u8], &mut Random) -> Vec<Vec<u8>>;

/// Runs every captured frame, as `change` makes it, at every hook that `hooks` names.
fn replay(
    test: &str,
    world: World,
    hooks: &'static [Hook],
    change: Change,
) -> BTreeMap<Reason, u32> {
    let Some(files) = shared_data::files(test, "pcaps") else { return BTreeMap::new() };
    let reasons = with_kernel(move |kernel| {
        kernel.fill(&world);
        let mut host = Host::new(&world);
        let mut random = Random::new(0x5eed_0000_0000_0003);
        let mut reasons = BTreeMap::new();
        for path in &files {
            for frame in frames(path) {
                for frame in change(&frame, &mut random) {
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

/// Nobody in the captures speaks to our Services.
fn nothing_is_translated(reasons: &BTreeMap<Reason, u32>) {
    assert!(reasons.keys().all(|r| r.kind() != VerdictKind::Forward), "{reasons:?}");
}

/// The standard world, where every tunnel end may send whatever it does.
fn trusting_world() -> World {
    let mut world = World::standard();
    for vtep in &mut world.vteps {
        vtep.pod_nets = [PodNet { net: Addr::NONE, mask: Addr::NONE }; 4];
    }
    world
}

#[test]
fn captured_frames_break_nothing_at_any_hook() {
    let test = "captured_frames_break_nothing_at_any_hook";
    let reasons = replay(test, World::standard(), HOOKS, |frame, _| vec![frame.to_vec()]);
    nothing_is_translated(&reasons);
}

#[test]
fn captured_frames_behind_one_and_two_tags_break_nothing_at_any_hook() {
    let test = "captured_frames_behind_one_and_two_tags_break_nothing_at_any_hook";
    let reasons = replay(test, World::standard(), HOOKS, |frame, _| {
        // IEEE 802.1Q: a tag with VLAN 5; 802.1ad: a service tag and a priority tag behind it.
        let (c, s, priority) = ([0x81, 0, 0, 5], [0x88, 0xa8, 0x10, 9], [0x81, 0, 0xe0, 0]);
        vec![tagged(frame, &[c]), tagged(frame, &[s, priority])]
    });
    nothing_is_translated(&reasons);
}

#[test]
fn captured_frames_cut_anywhere_break_nothing_at_any_hook() {
    let test = "captured_frames_cut_anywhere_break_nothing_at_any_hook";
    let reasons = replay(test, World::standard(), HOOKS, cut);
    nothing_is_translated(&reasons);
}

#[test]
fn captured_frames_break_nothing_inside_a_tunnel() {
    let test = "captured_frames_break_nothing_inside_a_tunnel";
    replay(test, trusting_world(), HOOKS, |frame, _| {
        FAMILIES.into_iter().filter_map(|underlay| wrapped(frame, underlay)).collect()
    });
}

#[test]
fn captured_frames_cut_and_tagged_break_nothing_inside_a_tunnel() {
    let test = "captured_frames_cut_and_tagged_break_nothing_inside_a_tunnel";
    replay(test, trusting_world(), &[Hook::Xdp], |frame, random| {
        let mut inner = cut(frame, random);
        inner.push(tagged(frame, &[[0x81, 0, 0, 5]]));
        let outer = |inner: &Vec<u8>| {
            let whole = wrapped(inner, FAMILIES[random.below(2)])?;
            // The tunnel's own headers are cut too, and behind a tag.
            let mut frames = cut(&whole, random);
            frames.extend([tagged(&whole, &[[0x81, 0, 0, 5]]), whole]);
            Some(frames)
        };
        inner.iter().filter_map(outer).flatten().collect()
    });
}

/// The frame inside VXLAN, addressed to a pod of this node; nothing for what is not IP.
fn for_our_pod(frame: &[u8]) -> Option<Vec<u8>> {
    let mut inside = frame.to_vec();
    let (at, pod) = match inside.get(12..14) {
        Some([0x08, 0x00]) => (30, ip::pod_redirect(Family::V4).v4_bytes().to_vec()),
        Some([0x86, 0xdd]) => (38, ip::pod_redirect(Family::V6).0.to_vec()),
        _ => return None,
    };
    inside.get_mut(at..at + pod.len())?.copy_from_slice(&pod);
    wrapped(&inside, Family::V4)
}

#[test]
fn captured_frames_for_our_pod_are_delivered_or_dropped_alike() {
    let test = "captured_frames_for_our_pod_are_delivered_or_dropped_alike";
    let reasons = replay(test, trusting_world(), &[Hook::Xdp], |frame, _| {
        for_our_pod(frame).into_iter().collect()
    });
    if !reasons.is_empty() {
        assert!(reasons.contains_key(&Reason::DecapLocal), "{reasons:?}");
    }
}
