//! Pods that ask a Service and are its endpoint themselves.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use sluice_lab::plan::POD_GATEWAY_MAC;
use sluice_lab::{Family, LabSpec, Mode, RpFilter};

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, PATIENCE, Service, delta, drops};

const OWN: Service = Service { name: "own", number: 81 };
const TWIN: Service = Service { name: "twin", number: 82 };
const SHARED: Service = Service { name: "shared", number: 83 };
const POD: &str = "pod1-1";
/// Bytes of a large answer: of many segments, so that offloads have something to do.
const LARGE: usize = 3 << 20;

fn bed(config: Config) -> Bed {
    let mut bed = without_agent(config);
    bed.start();
    bed
}

fn without_agent(config: Config) -> Bed {
    let spec = LabSpec { rp_filter: RpFilter::Strict, ..LabSpec::kernel_only(2, 2) };
    let objects = [
        ("own.yaml", OWN.objects(&spec, &[POD])),
        ("twin.yaml", TWIN.objects(&spec, &[POD])),
        ("shared.yaml", SHARED.objects(&spec, &[POD, "pod2-1"])),
    ];
    let bed = Bed::without_agent(&spec, config, &objects);
    let strict = [("ipv4/conf/all/rp_filter", "1"), ("ipv4/conf/eth0/rp_filter", "1")];
    bed.netns(POD).sysctls(&strict).expect("a strict pod");
    bed
}

/// From whom the pod sees its own requests come.
fn nobody(family: Family) -> IpAddr {
    let addr = if family == Family::V4 { "169.254.77.1" } else { "fd53:6c75:6963:6500::1" };
    addr.parse().expect("an address")
}

fn any(family: Family) -> IpAddr {
    if family == Family::V4 { [0; 4].into() } else { [0u16; 8].into() }
}

/// Echoes by one socket of the pod, from every target with the address that was asked.
fn echoes(bed: &Bed, family: Family, targets: &[SocketAddr], size: usize) {
    let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    let got = bed.netns(POD).enter(|| -> std::io::Result<Vec<(usize, SocketAddr)>> {
        let socket = UdpSocket::bind((any(family), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut reply = vec![0; 1 << 16];
        let ask = |target: &SocketAddr| {
            socket.send_to(&sent, target)?;
            let (len, from) = socket.recv_from(&mut reply)?;
            assert!(reply[..len].ends_with(&sent), "{target}: {len} bytes came back");
            Ok((len, from))
        };
        targets.iter().map(ask).collect()
    });
    let got = got.expect("the namespace").unwrap_or_else(|e| {
        panic!("{size} bytes to {targets:?}: {e}\n{:#?}\n{}", bed.counters(), bed.log())
    });
    let from: Vec<SocketAddr> = got.into_iter().map(|(_, from)| from).collect();
    assert_eq!(from, targets);
}

fn large(bed: &Bed, target: SocketAddr) {
    let body = bed.curl(POD, target, &format!("/bytes/{LARGE}"));
    let wrong = body.iter().zip((0..=255u8).cycle()).position(|(got, want)| *got != want);
    assert_eq!((body.len(), wrong), (LARGE, None), "{target}");
}

/// What must be so whatever the pod's device leaves to whom.
fn reaches_itself(bed: &Bed) {
    for family in FAMILIES {
        let before = bed.counters();
        let node = bed.node(1).address(family);
        for (http, echo) in [
            (
                SocketAddr::new(OWN.cluster_ip(family), HTTP),
                SocketAddr::new(OWN.cluster_ip(family), ECHO),
            ),
            (OWN.load_balancer(family, HTTP), OWN.load_balancer(family, ECHO)),
            (
                SocketAddr::new(node, OWN.http_node_port()),
                SocketAddr::new(node, OWN.echo_node_port()),
            ),
        ] {
            let answer = bed.ask(POD, http);
            assert_eq!((answer.pod.as_str(), answer.client), (POD, nobody(family)), "{http}");
            large(bed, http);
            // Whole, and in fragments.
            echoes(bed, family, &[echo, echo], 100);
            echoes(bed, family, &[echo], 8000);
        }
        let twins = [OWN, TWIN].map(|s| SocketAddr::new(s.cluster_ip(family), ECHO));
        echoes(bed, family, &[twins[0], twins[1], twins[0], twins[1]], 100);
        let counted = delta(bed, &before);
        assert!(drops(&counted).is_empty(), "{family}: {:?}", drops(&counted));
        assert_eq!(counted.reason("hairpin"), 0);
        // Where it is one of two endpoints, it reaches the other one too.
        let seen = bed.ask_often(POD, SHARED.load_balancer(family, HTTP), 16);
        assert_eq!(seen.len(), 2, "{seen:?}");
    }
}

fn with_and_without_offloads(config: Config) {
    let bed = bed(config);
    reaches_itself(&bed);
    bed.run(POD, "ethtool", &["-K", "eth0", "tx", "on", "tso", "on", "gso", "on"]);
    let host_side = &bed.pod(POD).host_interface;
    bed.run(NODE, "ethtool", &["-K", host_side, "tx", "on", "tso", "on", "gso", "on", "gro", "on"]);
    reaches_itself(&bed);
}

#[test]
fn s6_native_redirect_lets_pods_reach_themselves() {
    let config = Config::new(Mode::Native);
    with_and_without_offloads(Config { delivery: "redirect", ..config });
}

#[test]
fn s6_generic_stack_lets_pods_reach_themselves_beside_kube_proxy() {
    let config = Config::new(Mode::Generic);
    with_and_without_offloads(Config { delivery: "stack", behaviour: "accelerate", ..config });
}

/// The pod's host side is a port of a bridge, which is where its packets come in.
#[test]
fn s6_pods_behind_a_bridge_reach_themselves() {
    let mut bed = without_agent(Config::new(Mode::Native));
    let pod = bed.pod(POD);
    let port = pod.host_interface.clone();
    let ip = |command: String| {
        bed.run(NODE, "ip", &command.split(' ').collect::<Vec<_>>());
    };
    ip("link add cni0 type bridge".to_owned());
    ip(format!("link set cni0 address {POD_GATEWAY_MAC}"));
    ip(format!("link set {port} master cni0"));
    ip("link set cni0 up".to_owned());
    for (family, length) in [(Family::V4, 32), (Family::V6, 128)] {
        let address = pod.address(family);
        ip(format!("route replace {address}/{length} dev cni0"));
        ip(format!("neigh replace {address} lladdr {} dev cni0 nud permanent", pod.mac));
    }
    for family in FAMILIES {
        bed.ping(POD, bed.pod("pod2-1").address(family), 56, 1, &[]);
    }
    bed.start();
    reaches_itself(&bed);
}

/// Where no address is reserved the kernel gets the request, and no endpoint is reached.
#[test]
fn s6_pods_requests_to_themselves_are_left_to_the_kernel_without_an_address() {
    let config = Config::new(Mode::Native);
    let bed = bed(Config { datapath: "hairpin_v4 = \"\"\nhairpin_v6 = \"\"\n", ..config });
    for family in FAMILIES {
        let before = bed.counters();
        let target = SocketAddr::new(OWN.cluster_ip(family), ECHO);
        let sent = bed.netns(POD).enter(|| {
            UdpSocket::bind((any(family), 0)).and_then(|s| s.send_to(b"anybody?", target))
        });
        sent.expect("the namespace").expect("sent");
        crate::bed::wait("it passes", || match delta(&bed, &before).reason("hairpin") {
            1 => Ok(()),
            n => Err(format!("{n} packets")),
        });
    }
}
