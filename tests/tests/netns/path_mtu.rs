//! The way to another node narrows: a router between them says so about the outer header, which
//! nobody hears but the kernel.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde_json::Value;
use sluice_lab::plan::{BRIDGE, UPLINK};
use sluice_lab::{Family, LabSpec, Mode};

use crate::bed::{Bed, Config, ECHO, NODE, Service, delta, wait};

const REMOTE: Service = Service { name: "remote", number: 41 };
/// What the router lets through.
const NARROW: u64 = 1400;
/// Header of UDP in the datagram, and of IP.
const fn headers(family: Family) -> usize {
    match family {
        Family::V4 => 28,
        Family::V6 => 48,
    }
}

/// The fabric routes between the nodes, and its way to node2 is narrow.
fn put_router_between(bed: &Bed, underlay: Family) {
    let (here, there) = (bed.node(1).address(underlay), bed.node(2).address(underlay));
    let (router, length): (IpAddr, u8) = match (here, there) {
        (IpAddr::V4(v4), _) => {
            let [a, b, c, _] = v4.octets();
            ([a, b, c, 254].into(), 32)
        }
        (IpAddr::V6(v6), _) => {
            let mut segments = v6.segments();
            segments[7] = 0xfe;
            (segments.into(), 128)
        }
    };
    let net = if underlay == Family::V4 { 24 } else { 64 };
    let ip = |host: &str, command: String| {
        bed.run(host, "ip", &command.split(' ').collect::<Vec<_>>());
    };
    ip("fabric", format!("address add {router}/{net} dev {BRIDGE}"));
    let of_bridge = format!("ipv4/conf/{BRIDGE}/send_redirects");
    let router_settings = [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/send_redirects", "0"),
        (&of_bridge, "0"),
    ];
    bed.netns("fabric").sysctls(&router_settings).expect("a router");
    ip("fabric", format!("route add {there}/{length} dev {BRIDGE} mtu {NARROW}"));
    ip(NODE, format!("route add {there}/{length} via {router} dev {UPLINK}"));
    // What the kernel has learnt it forgets after so many seconds.
    let forget = [("ipv4/route/mtu_expires", "12"), ("ipv6/route/mtu_expires", "12")];
    bed.netns(NODE).sysctls(&forget).expect("a sysctl");
}

/// MTU of the next hop towards node2, as the datapath has it.
fn next_hop_mtu(bed: &Bed) -> u64 {
    let text = bed.lab.sluice(NODE, &["vteps", "--output", "json"]).expect("vteps");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    json["vteps"][0]["next_hop"]["mtu"].as_u64().unwrap_or_default()
}

/// A datagram to the Service whose inner packet has `size` bytes, not to be fragmented.
fn send(bed: &Bed, family: Family, size: usize) {
    let target: SocketAddr = REMOTE.load_balancer(family, ECHO);
    let sent = bed.netns("client").enter(|| {
        let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        UdpSocket::bind((any, 0))?.send_to(&vec![7; size - headers(family)], target)
    });
    sent.expect("the namespace").expect("sent");
}

fn next_hop_follows_the_path(underlay: Family, mode: Mode) {
    let spec = LabSpec { underlay, ..LabSpec::kernel_only(2, 1) };
    let objects = [("remote.yaml", REMOTE.objects(&spec, &["pod2-1"]))];
    let mut bed = Bed::without_agent(&spec, Config::new(mode), &objects);
    put_router_between(&bed, underlay);
    bed.start();
    let wide = u64::from(sluice_lab::plan::UNDERLAY_MTU);
    assert_eq!(next_hop_mtu(&bed), wide);
    let overhead = wide - u64::from(sluice_lab::plan::pod_mtu(underlay));
    let too_big = (NARROW - overhead + 1) as usize;

    for family in [Family::V4, Family::V6] {
        assert_eq!(bed.ask_udp("client", REMOTE.load_balancer(family, ECHO)), "pod2-1");
    }
    let before = bed.counters();
    send(&bed, underlay, too_big);
    wait("the next hop narrows", || match next_hop_mtu(&bed) {
        NARROW => Ok(()),
        mtu => Err(format!(
            "{mtu}\n{}",
            bed.run(NODE, "ip", &["route", "get", &bed.node(2).address(underlay).to_string()])
        )),
    });
    assert_eq!(delta(&bed, &before).reason("too_big"), 0, "the first one was sent");
    send(&bed, underlay, too_big);
    send(&bed, underlay, too_big - 1);
    wait("what does not fit is known here", || {
        let counted = delta(&bed, &before);
        match (counted.reason("too_big"), counted.reason("dnat_remote")) {
            (1, 2) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    // Nobody asks the kernel any more, and it forgets.
    wait("the next hop widens", || match next_hop_mtu(&bed) {
        mtu if mtu == wide => Ok(()),
        mtu => Err(mtu.to_string()),
    });
}

#[test]
fn a69_next_hop_over_ipv4_follows_path_mtu_news_and_their_end() {
    next_hop_follows_the_path(Family::V4, Mode::Native);
}

#[test]
fn a69_next_hop_over_ipv6_follows_path_mtu_news_and_their_end() {
    next_hop_follows_the_path(Family::V6, Mode::Generic);
}
