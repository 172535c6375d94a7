//! A client behind a VLAN of the wire. The kernel of this machine may have no 802.1Q devices, so the
//! fabric's port tags and untags, with the helpers that such a device would use.

use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType};
use sluice_lab::{Family, LabSpec, Mode, pass, traffic};

use crate::bed::{Bed, Config, ECHO, FAMILIES, NODE, Service, wait};

const REMOTE: Service = Service { name: "remote", number: 42 };

/// Opcode, destination register and source register << 4, offset, immediate (RFC 9669 section 3).
type Instruction = (u8, u8, i16, i32);

/// Goes on with `then` only where a Service address stands at `v4` or `v6`: 203.0.113.0/24 or
/// 2001:db8:203::/64. ARP and neighbour discovery are left alone: nobody here has the VLAN.
fn where_service(v4: i32, v6: i32, then: &[Instruction]) -> Vec<u8> {
    let end = 2;
    let mut code: Vec<Instruction> = vec![
        (0xbf, 0x16, 0, 0),     // r6 = context
        (0x28, 0, 0, 12),       // r0 = EtherType, in host order
        (0x55, 0, 2, 0x0800),   // IPv4?
        (0x30, 0, 0, v4),       // r0 = first byte of the address
        (0x15, 0, 6, 203),      //   go on
        (0x28, 0, 0, 12),       // IPv6?
        (0x55, 0, end, 0x86dd), //   no: out
        (0x28, 0, 0, v6 + 4),   // r0 = third word of the address
        (0x15, 0, 2, 0x0203),   //   go on
        (0xb7, 0, 0, -1),       // out: the next program, TCX_NEXT
        (0x95, 0, 0, 0),
    ];
    code.extend(then);
    let bytes = |(op, registers, offset, immediate): Instruction| {
        let mut word = [op, registers, 0, 0, 0, 0, 0, 0];
        word[2..4].copy_from_slice(&offset.to_ne_bytes());
        word[4..].copy_from_slice(&immediate.to_ne_bytes());
        word
    };
    code.into_iter().flat_map(bytes).collect()
}

/// bpf_skb_vlan_push(skb, 0x8100, 100), which leaves the tag beside the packet.
fn push() -> Vec<u8> {
    let next = [(0xb7, 0, 0, -1), (0x95, 0, 0, 0)];
    let mut then: Vec<Instruction> = vec![
        (0xbf, 0x61, 0, 0),
        (0xb7, 2, 0, i32::from(0x8100u16.to_be())),
        (0xb7, 3, 0, 100),
        (0x85, 0, 0, 18),
    ];
    then.extend(next);
    where_service(30, 38, &then)
}

/// What comes untagged from a Service address is not of this VLAN: dropped. The rest loses its tag.
fn pop() -> Vec<u8> {
    let then: [Instruction; 8] = [
        (0x61, 0x62, 20, 0), // r2 = vlan_present
        (0x55, 2, 2, 0),
        (0xb7, 0, 0, 2), // TC_ACT_SHOT
        (0x95, 0, 0, 0),
        (0xbf, 0x61, 0, 0),
        (0x85, 0, 0, 19), // bpf_skb_vlan_pop
        (0xb7, 0, 0, -1),
        (0x95, 0, 0, 0),
    ];
    where_service(26, 22, &then)
}

/// The programs at the fabric's port to node1, as long as they live.
struct Vlan(#[expect(dead_code, reason = "held")] [Ebpf; 2]);

impl Vlan {
    fn between_client_and_node(bed: &Bed) -> Self {
        let port = bed.node(1).fabric_port();
        let attach = |code: &[u8], side| {
            let mut object = Ebpf::load(&pass::object("classifier", "vlan", code)).expect("object");
            let program: &mut SchedClassifier =
                object.program_mut("vlan").expect("in the object").try_into().expect("TC");
            program.load().expect("loaded");
            bed.netns("fabric").enter(|| program.attach(&port, side)).expect("fabric").expect("on");
            object
        };
        Self([attach(&push(), TcAttachType::Egress), attach(&pop(), TcAttachType::Ingress)])
    }
}

fn answered(bed: &Bed, family: Family) -> bool {
    let target = REMOTE.load_balancer(family, ECHO);
    let reply = bed.netns("client").enter(|| traffic::ask_udp(target)).expect("the client");
    reply.is_ok_and(|reply| reply.pod == "pod2-1")
}

#[test]
fn a40_client_behind_a_vlan_is_served_once_xdp_sees_the_tags() {
    let spec = LabSpec::kernel_only(2, 1);
    let objects = [("remote.yaml", REMOTE.objects(&spec, &["pod2-1"]))];
    let mut bed = Bed::without_agent(&spec, Config::new(Mode::Native), &objects);
    let _vlan = Vlan::between_client_and_node(&bed);
    let port = bed.node(1).fabric_port();
    bed.run("fabric", "ethtool", &["-K", &port, "txvlan", "on"]);
    bed.start();
    // The tag stands beside the frame: XDP answers untagged, and that is not the client's VLAN.
    assert!(FAMILIES.into_iter().all(|family| !answered(&bed, family)));
    let named = format!("ethtool -K {port} txvlan off");
    assert!(bed.status_text().contains(&named), "{}", bed.status_text());

    bed.config.datapath = "change_device_features = true\n";
    bed.configure();
    wait("the tags are seen", || match FAMILIES.into_iter().all(|f| answered(&bed, f)) {
        true => Ok(()),
        false => Err(bed.status_text()),
    });
    assert!(!bed.status_text().contains("txvlan"), "{}", bed.status_text());
    assert!(bed.counters().reason("reply_remote") > 0);
    bed.stop();
    bed.lab.sluice(NODE, &["cleanup", "--yes"]).expect("cleanup");
    let features = bed.run("fabric", "ethtool", &["-k", &port]);
    assert!(features.contains("tx-vlan-offload: on"), "{features}");
}
