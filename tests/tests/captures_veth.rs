//! Captured packets over veth, in native and in generic mode: the verdict is the host's, what passes
//! is as it came, and `tcpdump` prints what was seen.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::programs::XdpMode;
use aya::programs::tc::TcAttachType;
use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use sluice::attach::without_frags;
use sluice_abi::{Addr, Hook, PodNet, Reason, VerdictKind};
use sluice_tests::captures::{cut, frames, tagged, wrapped};
use sluice_tests::host::Host;
use sluice_tests::kernel::{Kernel, OBJECT};
use sluice_tests::netns::{PEER, in_namespace, make_interfaces, raise_interfaces};
use sluice_tests::random::Random;
use sluice_tests::shared_data;
use sluice_tests::wire::{PATIENCE, Tap, sender};
use sluice_tests::world::{FAMILIES, World, dev, size};

/// Frames of each capture, as they are and changed.
const OF_EACH: usize = 3;
/// What the medium carries, Ethernet header included.
const LONGEST: usize = 1514;
/// A header and a tag: of less the kernel drops what is cut inside the tag, before anybody sees it.
const SHORTEST: usize = 18;
/// Room in front of a frame (XDP_PACKET_HEADROOM, include/uapi/linux/bpf.h).
const HEAD_ROOM: usize = 256;

/// The standard world, where every tunnel end may send whatever it does.
fn trusting_world() -> World {
    let mut world = World::standard();
    for vtep in &mut world.vteps {
        vtep.pod_nets = [PodNet { net: Addr::NONE, mask: Addr::NONE }; 4];
    }
    world
}

/// A frame plain, behind tags, inside tunnels, and cut.
fn changed(frame: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    let mut all = vec![
        frame.to_vec(),
        tagged(frame, &[[0x81, 0, 0, 5]]),
        tagged(frame, &[[0x88, 0xa8, 0x10, 9], [0x81, 0, 0xe0, 0]]),
    ];
    all.extend(FAMILIES.into_iter().filter_map(|underlay| wrapped(frame, underlay)));
    all.extend(cut(frame, random));
    all.extend(all.last().cloned().and_then(|short| wrapped(&short, FAMILIES[random.below(2)])));
    all.retain(|frame| (SHORTEST..=LONGEST).contains(&frame.len()));
    all
}

/// The kernel takes the outermost VLAN tag out of a frame before anybody sees it (skb_vlan_untag).
fn untagged(frame: &[u8]) -> Vec<u8> {
    match frame.get(12..14) {
        Some([0x81, 0x00] | [0x88, 0xa8]) if frame.len() >= 18 => {
            [&frame[..12], &frame[16..]].concat()
        }
        _ => frame.to_vec(),
    }
}

/// What was seen, and how often for which reason.
#[derive(Default)]
struct Run {
    reasons: BTreeMap<Reason, u32>,
    seen: Vec<Vec<u8>>,
    failures: Vec<String>,
}

fn drive(mode: XdpMode, files: Vec<PathBuf>) -> Run {
    make_interfaces();
    raise_interfaces();
    // As the agent does it.
    let mut kernel = match mode {
        XdpMode::Skb => Kernel::load(&without_frags(OBJECT), size::FLOW_SETS),
        _ => Kernel::load(OBJECT, size::FLOW_SETS),
    };
    kernel.xdp_mut("xdp_node").attach("upa", mode).expect("attach xdp_node");
    let uplink = kernel.tc_mut("tc_uplink");
    uplink.attach("upa", TcAttachType::Ingress).expect("attach tc_uplink");
    let world = trusting_world();
    kernel.fill(&world);
    let (host, tap) = (Host::new(&world), Tap::open());
    let mut out = sender(dev::UPLINK + PEER);
    let mut random = Random::new(0x5eed_0000_0000_0007);
    let mut run = Run::default();
    for path in &files {
        for frame in frames(path).iter().take(OF_EACH) {
            for frame in changed(frame, &mut random) {
                let verdict = host.run(Hook::Xdp, dev::UPLINK, &frame, HEAD_ROOM);
                let reason = verdict.verdict.reason;
                let count = || kernel.reason(Hook::Xdp, reason as u32).packets;
                let before = count();
                tap.drain();
                out.send_to(&frame, None).expect("room").expect("sent");
                let end = Instant::now() + PATIENCE;
                while count() == before && Instant::now() < end {
                    std::thread::sleep(Duration::from_micros(20));
                }
                let name = || format!("{} ({} bytes)", path.display(), frame.len());
                if count() != before + 1 {
                    run.failures.push(format!("{}: not counted as {}", name(), reason.label()));
                }
                *run.reasons.entry(reason).or_default() += 1;
                if reason.kind() != VerdictKind::Pass {
                    continue;
                }
                let came = tap.wait(1);
                match came.iter().find(|seen| seen.ifindex == dev::UPLINK) {
                    Some(seen) if seen.bytes == untagged(&frame) => {}
                    Some(_) => run.failures.push(format!("{}: changed", name())),
                    None => run.failures.push(format!("{}: not seen", name())),
                }
                run.seen.extend(came.into_iter().map(|seen| seen.bytes));
            }
        }
    }
    run
}

/// `tcpdump` reads all of them and ends as it should, whatever they are.
fn prints(name: &str, seen: &[Vec<u8>]) {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.pcap"));
    let header = PcapHeader { datalink: DataLink::ETHERNET, ..PcapHeader::default() };
    let file = File::create(&path).expect("a file");
    let mut pcap = PcapWriter::with_header(file, header).expect("a capture");
    for bytes in seen {
        let (timestamp, orig_len, data) = (Duration::ZERO, bytes.len() as u32, Cow::from(bytes));
        pcap.write_packet(&PcapPacket { timestamp, orig_len, data }).expect("written");
    }
    drop(pcap);
    let printed = Command::new("tcpdump").args(["-nn", "-e", "-vvv", "-r"]).arg(&path).output();
    let printed = printed.expect("tcpdump");
    let said = String::from_utf8_lossy(&printed.stderr);
    assert!(printed.status.success(), "tcpdump: {}: {said}", printed.status);
    let lines = printed.stdout.split(|byte| *byte == b'\n').count();
    assert!(lines >= seen.len(), "{lines} lines of {} packets: {said}", seen.len());
    fs::remove_file(path).expect("removed");
}

fn pass_as_they_came(test: &str, mode: XdpMode) {
    let Some(files) = shared_data::files(test, "pcaps") else { return };
    let run = in_namespace(move || drive(mode, files));
    println!("{:?}", run.reasons);
    let count = run.failures.len();
    assert!(run.failures.is_empty(), "{count}:\n{}", run.failures[..count.min(20)].join("\n"));
    assert!(run.seen.len() > 1000, "too few packets: {}", run.seen.len());
    prints(test, &run.seen);
}

#[test]
fn captured_frames_pass_native_mode_as_they_came() {
    pass_as_they_came("captured_frames_pass_native_mode_as_they_came", XdpMode::Driver);
}

#[test]
fn captured_frames_pass_generic_mode_as_they_came() {
    pass_as_they_came("captured_frames_pass_generic_mode_as_they_came", XdpMode::Skb);
}
