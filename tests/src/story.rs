//! A fixture in words: what arrives, and what became of it. Made from the frames themselves, which the
//! datapath of this machine handles; the words cannot say what it does not do.

use std::collections::BTreeSet;

use sluice_abi::{Family, Hook};
use sluice_datapath::verdict::Action;

use crate::fixtures::Fixture;
use crate::host::BY_PEER;
use crate::host::Host;
use crate::judge::Runner;
use crate::world::{VXLAN_PORT_V4, VXLAN_PORT_V6, dev};

/// A fixture as a row of a table tells it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Story {
    /// The law without what differs between its variants.
    pub law: String,
    /// Its number in the list of hostile input, such as `A40`.
    pub id: Option<String>,
    /// Where the packet arrives.
    pub hook: Hook,
    /// What the packet is: family and protocol.
    pub of: BTreeSet<String>,
    /// Where it goes.
    pub goes: BTreeSet<String>,
    /// How it differs from what arrived.
    pub leaves: BTreeSet<String>,
}

/// Tells a fixture.
///
/// # Panics
/// If a frame of the fixture cannot be made.
pub fn tell(fixture: &Fixture) -> Story {
    let mut host = Host::new(fixture.first_world());
    let mut trail: Vec<Vec<u8>> = Vec::new();
    for step in &fixture.before {
        let frame = (step.frame)(&trail);
        trail.push(host.step(step, &frame, crate::fixtures::HeadRoom::Plenty).bytes);
    }
    if fixture.world_before.is_some() {
        Host::rewrite(&mut host, &fixture.world);
    }
    host.arm(fixture);
    let came = (fixture.step.frame)(&trail);
    let outcome = host.step(&fixture.step, &came, fixture.head_room);
    let (law, id, of) = name(&fixture.name);
    let leaves = match fixture.action {
        Action::Drop => BTreeSet::new(),
        _ => difference(&came, &outcome.bytes),
    };
    let goes = BTreeSet::from([way(fixture)]);
    Story { law, id, hook: fixture.step.hook, of, goes, leaves }
}

/// "a40_request_to_LocalStack_over_V4 [V6 TCP]": the law, its number, family and protocol.
fn name(name: &str) -> (String, Option<String>, BTreeSet<String>) {
    let (law, of) = name.split_once(" [").unwrap_or((name, ""));
    let of = of.trim_end_matches(']').split(' ').filter(|word| !word.is_empty());
    let of = of.map(|word| word.replace("V4", "IPv4").replace("V6", "IPv6")).collect();
    let mut words: Vec<&str> = law.split('_').collect();
    let is_id = |word: &str| {
        let digits = word.strip_prefix(['a', 's', 'f']).unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
    };
    let id = words.first().filter(|word| is_id(word)).map(|word| word.to_uppercase());
    words.drain(..usize::from(id.is_some()));
    let mut law: Vec<&str> = Vec::new();
    for word in words {
        match word {
            // The variants of a law differ in these.
            "V4" | "V6" => {
                while matches!(law.last(), Some(&("over" | "from" | "to"))) {
                    law.pop();
                }
            }
            word if word.starts_with(|c: char| c.is_ascii_uppercase()) => law.push("a Service"),
            word => law.push(word),
        }
    }
    (law.join(" "), id, of)
}

/// Where a frame goes.
fn way(fixture: &Fixture) -> String {
    let device = |ifindex| match ifindex {
        dev::UPLINK => "the uplink",
        dev::UPLINK_B => "another uplink",
        dev::POD_REDIRECT | dev::POD_STACK => "the pod's veth",
        dev::VXLAN_V4 | dev::VXLAN_V6 => "the vxlan device",
        _ => "another interface",
    };
    match (fixture.action, fixture.mark) {
        (Action::Pass, Some(veth)) if veth & BY_PEER != 0 => "to the pod's end, by TC".to_owned(),
        (Action::Pass, Some(ifindex)) => format!("to the kernel, received by {}", device(ifindex)),
        (Action::Pass, None) => "to the kernel".to_owned(),
        (Action::Drop, _) => "dropped".to_owned(),
        (Action::Transmit, _) => "back out of the interface".to_owned(),
        (Action::Redirect(ifindex), _) => match ifindex {
            dev::POD_REDIRECT | dev::POD_STACK => "into the pod's veth".to_owned(),
            _ => format!("out of {}", device(ifindex)),
        },
        (Action::Receive(ifindex), _) => format!("received by {}", device(ifindex)),
        (Action::Peer(_), _) => "to the pod's end".to_owned(),
    }
}

/// What of a frame can be told. Fields as they stand on the wire.
#[derive(Default, PartialEq, Eq)]
struct Seen {
    tags: usize,
    tunnel: Option<Family>,
    family: Option<Family>,
    proto: u8,
    icmp: Option<[u8; 2]>,
    reset: bool,
    hop_limit: u8,
    class: u8,
    src: Vec<u8>,
    dst: Vec<u8>,
    src_port: Option<[u8; 2]>,
    dst_port: Option<[u8; 2]>,
}

/// Reads a frame as far as it goes; one that is cut short anywhere is not followed further.
fn see(frame: &[u8]) -> Seen {
    let mut seen = Seen::default();
    look(frame, &mut seen);
    seen
}

fn look(frame: &[u8], seen: &mut Seen) -> Option<()> {
    let mut at = 12;
    while matches!(frame.get(at..at + 2)?, [0x81, 0x00] | [0x88, 0xa8]) {
        (seen.tags, at) = (seen.tags + 1, at + 4);
    }
    let ip = frame.get(at + 2..)?;
    let l4 = match frame.get(at..at + 2)? {
        [0x08, 0x00] => {
            seen.family = Some(Family::V4);
            (seen.class, seen.hop_limit, seen.proto) = (*ip.get(1)?, *ip.get(8)?, *ip.get(9)?);
            (seen.src, seen.dst) = (ip.get(12..16)?.to_vec(), ip.get(16..20)?.to_vec());
            ip.get(usize::from(ip.first()? & 15) * 4..)?
        }
        [0x86, 0xdd] => {
            seen.family = Some(Family::V6);
            seen.class = ip.first()? << 4 | ip.get(1)? >> 4;
            (seen.proto, seen.hop_limit) = (*ip.get(6)?, *ip.get(7)?);
            (seen.src, seen.dst) = (ip.get(8..24)?.to_vec(), ip.get(24..40)?.to_vec());
            let mut rest = ip.get(40..)?;
            while matches!(seen.proto, 0 | 43 | 44 | 60) {
                let len = if seen.proto == 44 { 8 } else { 8 + usize::from(*rest.get(1)?) * 8 };
                (seen.proto, rest) = (*rest.first()?, rest.get(len..)?);
            }
            rest
        }
        _ => return None,
    };
    match seen.proto {
        6 | 17 => {
            seen.src_port = l4.get(..2)?.try_into().ok();
            seen.dst_port = l4.get(2..4)?.try_into().ok();
            seen.reset = seen.proto == 6 && l4.get(13)? & 4 != 0;
        }
        1 | 58 => seen.icmp = l4.get(..2)?.try_into().ok(),
        _ => {}
    }
    let vxlan = [VXLAN_PORT_V4, VXLAN_PORT_V6].map(|port| Some(port.to_be_bytes()));
    if seen.proto == 17 && vxlan.contains(&seen.dst_port) && seen.tunnel.is_none() {
        let (tags, tunnel) = (seen.tags, seen.family);
        *seen = Seen { tags, tunnel, ..Seen::default() };
        look(l4.get(16..)?, seen);
    }
    Some(())
}

/// How one frame differs from another, in words.
fn difference(came: &[u8], left: &[u8]) -> BTreeSet<String> {
    if came == left {
        return BTreeSet::from(["as it came".to_owned()]);
    }
    let (a, b) = (see(came), see(left));
    let mut words: Vec<&str> = Vec::new();
    match (a.tunnel, b.tunnel) {
        (Some(_), None) => words.push("taken out of VXLAN"),
        (None, Some(_)) => words.push("put into VXLAN"),
        (Some(_), Some(_)) => words.push("taken out of VXLAN and put into VXLAN"),
        (None, None) => {}
    }
    if a.tags > b.tags {
        words.push("tags taken off");
    } else if a.tags < b.tags {
        words.push("tags put on");
    }
    if b.icmp.is_some() && a.icmp != b.icmp {
        words.push("an ICMP answer");
    } else if b.reset && !a.reset {
        words.push("a TCP reset");
    } else {
        match (a.src != b.src, a.src_port != b.src_port) {
            (true, true) => words.push("new source and port"),
            (true, false) => words.push("new source"),
            (false, true) => words.push("new source port"),
            (false, false) => {}
        }
        match (a.dst != b.dst, a.dst_port != b.dst_port) {
            (true, true) => words.push("new destination and port"),
            (true, false) => words.push("new destination"),
            (false, true) => words.push("new destination port"),
            (false, false) => {}
        }
        if a.class != b.class {
            words.push("new ECN");
        }
        if a.hop_limit != b.hop_limit {
            words.push("a hop less");
        }
    }
    if words.is_empty() {
        words.push("new Ethernet header");
    }
    BTreeSet::from([words.join(", ")])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn variants_of_a_law_have_one_name() {
        let [one, two] = [
            "a40_vlan_tag_stays_on_a_request_to_LocalStack_over_V4 [V6 TCP]",
            "a40_vlan_tag_stays_on_a_request_to_Plain_over_V6 [V6 UDP]",
        ]
        .map(name);
        assert_eq!((&one.0, &one.1), (&two.0, &two.1));
        assert_eq!(one.0, "vlan tag stays on a request to a Service");
        assert_eq!(one.1.as_deref(), Some("A40"));
        assert_eq!(one.2, ["IPv6", "TCP"].map(str::to_owned).into());
    }

    #[test]
    fn difference_is_told() {
        let find = |start: &str| {
            fixtures::all().into_iter().find(|f| f.name.starts_with(start)).expect(start)
        };
        let told = |start: &str| tell(&find(start)).leaves.into_iter().collect::<Vec<_>>();
        assert_eq!(told("bypass_passes_everything"), ["as it came"]);
        assert_eq!(
            told("request_is_encapsulated_with_our_own_source_over_V6"),
            ["put into VXLAN, new source and port, new destination and port, a hop less"]
        );
        assert_eq!(
            told("packet_to_a_pod_is_decapsulated_into_its_veth_over_V4"),
            ["taken out of VXLAN, a hop less"]
        );
    }
}
