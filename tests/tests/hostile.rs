//! Frames with bytes changed at random: whatever they become, host and kernel agree on them, what
//! passes is as it came, and both end with the same tables.

use sluice_abi::{FLOW_WAYS, Hook, VerdictKind};
use sluice_tests::fixtures;
use sluice_tests::host::Host;
use sluice_tests::judge::{Runner, agree, in_kernel};
use sluice_tests::netns::with_kernel;
use sluice_tests::random::Random;
use sluice_tests::world::{World, dev};

/// Changed frames of each fixture. Each costs a BPF_PROG_TEST_RUN, which waits for RCU.
const CHANGES: usize = 4;
const _: () = assert!(CHANGES < FLOW_WAYS);

/// A frame with one to four bytes changed, more often in the headers, and sometimes cut or longer.
fn change(frame: &[u8], random: &mut Random) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for _ in 0..1 + random.below(4) {
        let reach = if random.below(4) == 0 { frame.len() } else { frame.len().min(120) };
        let at = random.below(reach);
        frame[at] = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => frame[at] ^ 1 << random.below(8),
            _ => random.next() as u8,
        };
    }
    match random.below(8) {
        0 => frame.truncate(14 + random.below(frame.len() - 13)),
        1 => frame.extend((0..random.below(40)).map(|_| 0x77)),
        _ => {}
    }
    frame
}

#[test]
fn changed_bytes_never_tell_host_and_kernel_apart() {
    with_kernel(|kernel| {
        let mut random = Random::new(0x5eed_0000_0000_0001);
        let (mut frames, mut forwarded) = (0, 0);
        for world in [World::standard(), World::replacing()] {
            kernel.fill(&world);
            for fixture in fixtures::all().iter().filter(|f| in_kernel(f)) {
                // Frames that need others before them are changed as they are without those.
                if !fixture.before.is_empty() {
                    continue;
                }
                let frame = (fixture.step.frame)(&[]);
                // Fewer connections than a set has room for: whose record gives way is a matter of
                // time, and time is not the same here and there.
                let mut host = Host::new(&world);
                kernel.clear_connections();
                for _ in 0..CHANGES {
                    let changed = change(&frame, &mut random);
                    let step = &fixture.step;
                    let reason = agree(&mut host, kernel, step.hook, step.ifindex, &changed);
                    forwarded += u32::from(reason.kind() == VerdictKind::Forward);
                    frames += 1;
                }
                let same = host.state() == kernel.state();
                assert!(same, "{}: host and kernel ended with other tables", fixture.name);
            }
        }
        println!("{frames} frames, {forwarded} forwarded");
        assert!(forwarded * 20 > frames, "too few of the changed frames were forwarded");
    });
}

#[test]
fn noise_never_tells_host_and_kernel_apart() {
    with_kernel(|kernel| {
        let mut random = Random::new(0x5eed_0000_0000_0002);
        let world = World::standard();
        let mut host = Host::new(&world);
        kernel.fill(&world);
        for n in 0..1000 {
            let len = 14 + random.below(200);
            let mut frame: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            // Enough of a header that the noise is looked at.
            frame[0] &= 0xfe;
            let ethertype = [[0x08, 0x00], [0x86, 0xdd]][n % 2];
            frame[12..14].copy_from_slice(&ethertype);
            if let Some(version) = frame.get_mut(14) {
                *version = [0x45, 0x60][n % 2];
            }
            for hook in Hook::ALL {
                agree(&mut host, kernel, hook, dev::UPLINK, &frame);
            }
        }
    });
}
