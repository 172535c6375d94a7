//! The fixtures over veth, in native and in generic mode and at TC: same packet, same verdict, same bytes as
//! on the host and in BPF_PROG_TEST_RUN.
//!
//! ```text
//!   send ─► upap ═ upa [xdp_node, tc] ─► PASS: seen at upa; marked for the vxlan device: seen there too
//!             ▲ TX                   └─► REDIRECT: seen at the far end of another pair
//! ```

use std::collections::HashMap;
use std::time::Instant;

use aya::programs::XdpMode;
use aya::programs::tc::TcAttachType;
use nix::libc::ENOBUFS;
use pnet::datalink::DataLinkSender;
use sluice::attach::without_frags;
use sluice_abi::{Hook, REASONS};
use sluice_datapath::verdict::Action;
use sluice_tests::fixtures::{self, Fixture, HeadRoom, Out, Step};
use sluice_tests::host::BY_PEER;
use sluice_tests::host::Host;
use sluice_tests::judge::{Outcome, Runner, check_counters, difference, in_kernel};
use sluice_tests::kernel::{Kernel, OBJECT, code};
use sluice_tests::netns::{PEER, in_namespace, make_interfaces, raise_interfaces};
use sluice_tests::wire::{PATIENCE, Seen, Tap, sender};
use sluice_tests::world::{dev, size};

/// A node of veth pairs with the programs attached.
struct Lab {
    kernel: Kernel,
    tap: Tap,
    senders: HashMap<u32, Box<dyn DataLinkSender>>,
}

impl Lab {
    /// Without a mode of XDP: TC.
    fn new(mode: Option<XdpMode>) -> Self {
        make_interfaces();
        raise_interfaces();
        // As the agent does it.
        let mut kernel = match mode {
            Some(XdpMode::Skb) => Kernel::load(&without_frags(OBJECT), size::FLOW_SETS),
            _ => Kernel::load(OBJECT, size::FLOW_SETS),
        };
        for uplink in ["upa", "upb"] {
            if let Some(mode) = mode {
                kernel.xdp_mut("xdp_node").attach(uplink, mode).expect("attach xdp_node");
            } else {
                let node = kernel.tc_mut("tc_node");
                node.attach(uplink, TcAttachType::Ingress).expect("attach tc_node");
            }
        }
        for tunnel in ["vx4", "vx6"] {
            let program = kernel.tc_mut("tc_tunnel");
            program.attach(tunnel, TcAttachType::Ingress).expect("attach tc_tunnel");
        }
        if let Some(mode @ XdpMode::Driver) = mode {
            // A veth receives redirected frames only where its far end has a program too
            // (drivers/net/veth.c, veth_xdp_xmit).
            for far in ["upap", "upbp", "podrp", "podsp"] {
                kernel.xdp_mut("xdp_pass").attach(far, mode).expect("attach xdp_pass");
            }
        }
        if mode.is_some() {
            let uplink = kernel.tc_mut("tc_uplink");
            uplink.attach("upa", TcAttachType::Ingress).expect("attach tc_uplink");
        }
        for at in ["podr", "pods"] {
            let tc = kernel.tc_mut("tc_ingress");
            tc.attach(at, TcAttachType::Ingress).expect("attach tc_ingress");
        }
        for at in ["upa", "podr", "pods"] {
            let tc = kernel.tc_mut("tc_egress");
            tc.attach(at, TcAttachType::Egress).expect("attach tc_egress");
        }
        Self { kernel, tap: Tap::open(), senders: HashMap::new() }
    }

    /// Sends a frame so that it meets the program of a step.
    fn send(&mut self, step: &Step, frame: &[u8]) {
        let from = match step.hook {
            Hook::Xdp | Hook::TcIngress | Hook::TcNode => step.ifindex + PEER,
            Hook::TcEgress => step.ifindex,
        };
        let sender = self.senders.entry(from).or_insert_with(|| sender(from));
        let sent = sender.send_to(frame, None).expect("room in the queue");
        match sent {
            // What TC drops on its way out is told to its sender (net/core/dev.c, NET_XMIT_DROP).
            Err(e) if step.hook == Hook::TcEgress && e.raw_os_error() == Some(ENOBUFS) => {}
            sent => {
                sent.unwrap_or_else(|e| panic!("send {} bytes out of {from}: {e}", frame.len()))
            }
        }
    }

    fn counted(&self, hook: Hook) -> u64 {
        REASONS.iter().map(|r| self.kernel.reason(hook, r.reason as u32).packets).sum()
    }

    /// Sends a frame and waits until the program has counted it.
    fn step(&mut self, step: &Step, frame: &[u8]) -> Result<(), String> {
        let before = self.counted(step.hook);
        self.send(step, frame);
        let end = Instant::now() + PATIENCE;
        while self.counted(step.hook) == before {
            if Instant::now() > end {
                return Err("the program has not seen the frame".into());
            }
        }
        Ok(())
    }

    fn judge(&mut self, fixture: &Fixture) -> Result<(), String> {
        self.tap.drain();
        self.kernel.fill(fixture.first_world());
        let mut trail = Vec::new();
        let after = on_host(fixture);
        for (i, step) in fixture.before.iter().enumerate() {
            let frame = (step.frame)(&trail);
            self.step(step, &frame)?;
            // What TC passes goes to the stack, which drops it unseen.
            let seen = match step.hook {
                Hook::Xdp => self.tap.wait(1).into_iter().next(),
                // The tap sees it come, and again where it goes.
                Hook::TcNode => match after[i].code {
                    code::TC_REDIRECT => self.tap.wait(2).into_iter().nth(1),
                    _ => None,
                },
                Hook::TcIngress | Hook::TcEgress => None,
            };
            trail.push(seen.map(|s| s.bytes).unwrap_or_default());
        }
        self.tap.drain();
        if fixture.world_before.is_some() {
            self.kernel.rewrite(&fixture.world);
        }
        self.kernel.clear_counters();
        let frame = (fixture.step.frame)(&trail);
        self.step(&fixture.step, &frame)?;
        let mut hooks = vec![fixture.step.hook];
        // What is handed to a vxlan device is not counted there again.
        hooks.extend((fixture.step.hook == Hook::Xdp).then_some(Hook::TcNode));
        let bytes = match fixture.step.hook {
            // The tag is beside the packet.
            Hook::TcIngress => untagged(&frame).len(),
            _ => frame.len(),
        };
        check_counters(fixture, bytes as u64, &self.kernel, &hooks)?;

        let places = places(fixture);
        let mut seen = self.tap.wait(places.len() + usize::from(is_tapped(&fixture.step)));
        if is_tapped(&fixture.step) {
            let came = Seen { ifindex: fixture.step.ifindex, bytes: untagged(&frame) };
            let at = seen.iter().position(|s| *s == came).ok_or("the frame did not arrive")?;
            seen.remove(at);
        }
        let mut expected = Vec::new();
        if !places.is_empty() {
            let Some(first) = seen.first() else { return Err("the frame is lost".into()) };
            trail.push(first.bytes.clone());
            let bytes = match &fixture.out {
                Out::Gone => Vec::new(),
                Out::Untouched => frame.clone(),
                Out::Made(build) => build(&trail),
            };
            let bytes = untagged(&bytes);
            expected.extend(places.iter().map(|&ifindex| Seen { ifindex, bytes: bytes.clone() }));
        }
        if seen == expected {
            return Ok(());
        }
        let at = |seen: &[Seen]| -> Vec<u32> { seen.iter().map(|s| s.ifindex).collect() };
        if at(&seen) != at(&expected) {
            return Err(format!("seen at {:?} instead of {:?}", at(&seen), at(&expected)));
        }
        Err(difference(&seen[0].bytes, &expected[0].bytes))
    }
}

/// What becomes of the frames before the last.
fn on_host(fixture: &Fixture) -> Vec<Outcome> {
    let mut host = Host::new(fixture.first_world());
    let (mut trail, mut after) = (Vec::new(), Vec::new());
    for step in &fixture.before {
        let outcome = host.step(step, &(step.frame)(&trail), HeadRoom::Plenty);
        trail.push(outcome.bytes.clone());
        after.push(outcome);
    }
    after
}

/// The tap sees what arrives for TC as well, as it came.
fn is_tapped(step: &Step) -> bool {
    matches!(step.hook, Hook::TcIngress | Hook::TcNode)
}

/// Where the frame shows itself, in this order.
fn places(fixture: &Fixture) -> Vec<u32> {
    let step = &fixture.step;
    match (step.hook, fixture.action) {
        (_, Action::Drop) => Vec::new(),
        (_, Action::Redirect(ifindex)) => vec![ifindex + PEER],
        (_, Action::Receive(ifindex)) => vec![ifindex],
        (_, Action::Peer(ifindex)) => vec![ifindex + PEER],
        (_, Action::Transmit) => vec![step.ifindex + PEER],
        (Hook::Xdp, Action::Pass) => {
            [Some(step.ifindex), fixture.mark].into_iter().flatten().collect()
        }
        // The stack has no route.
        (Hook::TcIngress | Hook::TcNode, Action::Pass) => Vec::new(),
        (Hook::TcEgress, Action::Pass) => vec![step.ifindex + PEER],
    }
}

/// The kernel takes the outermost VLAN tag out of a frame before anybody sees it (skb_vlan_untag).
fn untagged(frame: &[u8]) -> Vec<u8> {
    match frame.get(12..14) {
        Some([0x81, 0x00] | [0x88, 0xa8]) => [&frame[..12], &frame[16..]].concat(),
        _ => frame.to_vec(),
    }
}

/// What the medium can carry: head room is the driver's to give, and at an uplink's ingress XDP comes
/// before TC.
fn fits(fixture: &Fixture) -> bool {
    let step = &fixture.step;
    in_kernel(fixture)
        && fixture.head_room == HeadRoom::Plenty
        && step.segment == 0
        // The kernel hands nothing to the other end of a veth in the same namespace.
        && fixture.mark.is_none_or(|mark| mark & BY_PEER == 0)
        && !matches!(fixture.action, Action::Peer(_))
        && (step.hook != Hook::TcIngress || step.ifindex != dev::UPLINK)
}

fn run(mode: Option<XdpMode>, table: Vec<Fixture>) {
    let (failures, count, left_out) = in_namespace(move || {
        let mut lab = Lab::new(mode);
        let (mut failures, mut count, mut left_out) = (Vec::new(), 0, 0);
        for fixture in table {
            if !fits(&fixture) {
                left_out += 1;
                continue;
            }
            count += 1;
            if let Err(text) = lab.judge(&fixture) {
                failures.push(format!("{}: {text}", fixture.name));
            }
        }
        (failures, count, left_out)
    });
    println!("{count} fixtures, {left_out} left out");
    assert!(failures.is_empty(), "{} of {count}:\n{}", failures.len(), failures.join("\n"));
    assert!(left_out * 20 < count, "too many fixtures left out: {left_out}");
}

#[test]
fn native_mode_does_what_the_fixtures_say() {
    run(Some(XdpMode::Driver), fixtures::all());
}

#[test]
fn generic_mode_does_what_the_fixtures_say() {
    run(Some(XdpMode::Skb), fixtures::all());
}

#[test]
fn tc_mode_does_what_the_fixtures_say() {
    run(None, fixtures::at_tc().0);
}
