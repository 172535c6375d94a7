//! What clients are told of packets that go no further: real sockets judge.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use sluice_lab::plan::{UPLINK, VXLAN_DEVICE};
use sluice_lab::{Family, LabSpec, Mode};

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, PATIENCE, Service, delta, iperf, wait};

const LOCAL: Service = Service { name: "local", number: 51 };
const REMOTE: Service = Service { name: "remote", number: 52 };
const EMPTY: Service = Service { name: "empty", number: 53 };
const AWAY: Service = Service { name: "away", number: 54 };
/// A port that no Service here has.
const CLOSED: u16 = 4444;
/// What the narrow way to node2 takes.
const NARROW: u64 = 1400;

fn bed(mode: Mode, spec: &LabSpec, behaviour: &'static str) -> Bed {
    let away = AWAY.manifest("  externalTrafficPolicy: Local\n");
    let objects = [
        ("local.yaml", LOCAL.objects(spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(spec, &["pod2-1"])),
        ("empty.yaml", EMPTY.objects(spec, &[])),
        ("away.yaml", format!("{away}{}", AWAY.slices(spec, &["pod2-1"]))),
    ];
    Bed::up(spec, Config { behaviour, ..Config::new(mode) }, &objects)
}

/// Answers of a kind: sent, not sent.
fn answers(bed: &Bed, kind: &str) -> (u64, u64) {
    let text = bed.lab.sluice(NODE, &["counters", "--output", "json"]).expect("counters");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let rows = json["answers"].as_array().expect("answers");
    let row = rows.iter().find(|row| row["answer"] == kind).expect("a kind of answer");
    let count = |field: &str| row[field].as_u64().expect("a count");
    (count("sent"), count("limited"))
}

/// A connection is refused, and a datagram too; neither waits for a timeout.
fn assert_refused(bed: &Bed, from: &str, tcp: SocketAddr, udp: SocketAddr) {
    let (kind_of_tcp, kind_of_udp) = bed
        .netns(from)
        .enter(|| {
            let connected = TcpStream::connect_timeout(&tcp, PATIENCE).map_err(|e| e.kind());
            let any: IpAddr = if udp.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
            let socket = UdpSocket::bind((any, 0)).expect("a socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            socket.connect(udp).expect("a route");
            socket.send(b"anybody?").expect("sent");
            let received = socket.recv(&mut [0; 64]).map_err(|e| e.kind());
            (connected.err(), received.err())
        })
        .expect("the namespace");
    let refused = Some(ErrorKind::ConnectionRefused);
    assert_eq!(kind_of_tcp, refused, "TCP {tcp} from {from}\n{}", bed.log());
    assert_eq!(kind_of_udp, refused, "UDP {udp} from {from}\n{}", bed.log());
}

fn refuses(mode: Mode) {
    let bed = bed(mode, &LabSpec::kernel_only(2, 2), "replace");
    for family in FAMILIES {
        let node = bed.node(1).address(family);
        let (http, echo) = (EMPTY.http_node_port(), EMPTY.echo_node_port());
        let of_empty = EMPTY.load_balancer_ip(family);
        for (tcp, udp) in [
            (SocketAddr::new(of_empty, HTTP), SocketAddr::new(of_empty, ECHO)),
            (SocketAddr::new(node, http), SocketAddr::new(node, echo)),
        ] {
            assert_refused(&bed, "client", tcp, udp);
        }
        for ip in [of_empty, LOCAL.load_balancer_ip(family), REMOTE.load_balancer_ip(family)] {
            let closed = SocketAddr::new(ip, CLOSED);
            assert_refused(&bed, "client", closed, closed);
        }
        let of_empty = EMPTY.cluster_ip(family);
        let (tcp, udp) = (SocketAddr::new(of_empty, HTTP), SocketAddr::new(of_empty, ECHO));
        assert_refused(&bed, "pod1-2", tcp, udp);
        let closed = SocketAddr::new(LOCAL.cluster_ip(family), CLOSED);
        assert_refused(&bed, "pod1-2", closed, closed);
        let (vip, port) = (LOCAL.load_balancer_ip(family).to_string(), CLOSED.to_string());
        let (open, said) = bed.try_run("client", "nc", &["-zv", "-w", "5", &vip, &port]);
        assert!(!open && said.contains("refused"), "nc: {said}");
        let (open, said) = bed.try_run("client", "nc", &["-zvu", "-w", "5", &vip, &port]);
        assert!(!open, "nc: {said}");
        // Others are served as ever.
        assert_eq!(bed.ask("client", LOCAL.load_balancer(family, HTTP)).pod, "pod1-1");
        assert_eq!(bed.ask("client", REMOTE.load_balancer(family, HTTP)).pod, "pod2-1");
    }
    // From outside two of no endpoint and four closed ports, from a pod one of each; both families.
    assert_eq!(answers(&bed, "reset"), (16, 0));
    let (refused, limited) = answers(&bed, "port_unreachable");
    // `nc` asks more than once.
    assert!((16..=22).contains(&refused) && limited == 0, "{refused} {limited}");
}

#[test]
fn s36_native_refuses_what_nobody_serves_from_outside_and_from_pods() {
    refuses(Mode::Native);
}

#[test]
fn s36_generic_refuses_what_nobody_serves_from_outside_and_from_pods() {
    refuses(Mode::Generic);
}

/// A pod whose kernel leaves checksums to the device, and a device that leaves them to nobody or to
/// the kernel: the answer to such a packet is right.
#[test]
fn s36_refuses_pods_whose_checksums_are_still_to_be_filled_in() {
    let bed = bed(Mode::Native, &LabSpec::kernel_only(2, 2), "replace");
    bed.run("pod1-2", "ethtool", &["-K", "eth0", "tx", "on"]);
    for host_side in ["on", "off"] {
        bed.run(NODE, "ethtool", &["-K", "pod2", "tx", host_side]);
        for family in FAMILIES {
            let of_empty = EMPTY.cluster_ip(family);
            let (tcp, udp) = (SocketAddr::new(of_empty, HTTP), SocketAddr::new(of_empty, ECHO));
            assert_refused(&bed, "pod1-2", tcp, udp);
            let closed = SocketAddr::new(LOCAL.cluster_ip(family), CLOSED);
            assert_refused(&bed, "pod1-2", closed, closed);
        }
    }
}

/// A process of node1 asks Services of node2 through the tunnel, untranslated. What comes back has the
/// Service's address inside the tunnel, and Sluice on node1 leaves it to the kernel (A2); to pods of
/// node1 it would not be let through.
fn answers_a_node_through_the_tunnel(mode: Mode, underlay: Family) {
    let spec = LabSpec { underlay, ..LabSpec::kernel_only(2, 2) };
    let mut bed = bed(mode, &spec, "replace");
    bed.start_on("node2");
    for family in FAMILIES {
        let tunnel = |number: usize| -> IpAddr {
            let node = bed.node(number);
            match family {
                Family::V4 => node.tunnel_v4().into(),
                Family::V6 => node.tunnel_v6().into(),
            }
        };
        let length = if family == Family::V4 { 32 } else { 128 };
        for service in [EMPTY, REMOTE] {
            let (vip, ours, theirs) = (service.load_balancer_ip(family), tunnel(1), tunnel(2));
            let route = format!(
                "route add {vip}/{length} via {theirs} dev {VXLAN_DEVICE} onlink src {ours}"
            );
            bed.run(NODE, "ip", &route.split(' ').collect::<Vec<_>>());
        }
        let before = bed.counters();
        let of_empty = EMPTY.load_balancer_ip(family);
        let (tcp, udp) = (SocketAddr::new(of_empty, HTTP), SocketAddr::new(of_empty, ECHO));
        assert_refused(&bed, NODE, tcp, udp);
        bed.ping(NODE, of_empty, 56, 2, &[]);
        let answer = bed.ask(NODE, REMOTE.load_balancer(family, HTTP));
        assert_eq!((answer.pod.as_str(), answer.client), ("pod2-1", tunnel(1)));
        assert_eq!(bed.ask_udp(NODE, REMOTE.load_balancer(family, ECHO)), "pod2-1");
        let counted = delta(&bed, &before);
        assert!(crate::bed::drops(&counted).is_empty(), "{family}: {counted:#?}");
        assert!(counted.reason("inner_not_local") > 5, "{family}: {counted:#?}");
    }
}

#[test]
fn a2_native_lets_services_answer_a_node_that_asks_through_the_tunnel() {
    answers_a_node_through_the_tunnel(Mode::Native, Family::V4);
}

#[test]
fn a2_generic_lets_services_answer_a_node_that_asks_through_the_tunnel() {
    answers_a_node_through_the_tunnel(Mode::Generic, Family::V6);
}

/// Sends a datagram; the socket has its answer, or the error that came for it.
fn send(bed: &Bed, to: SocketAddr, len: usize) -> UdpSocket {
    let socket = bed.netns("client").enter(|| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.send(&vec![7; len])?;
        Ok::<_, std::io::Error>(socket)
    });
    socket.expect("the namespace").expect("sent")
}

#[test]
fn s36_policy_local_without_a_local_endpoint_says_nothing() {
    let bed = bed(Mode::Native, &LabSpec::kernel_only(2, 2), "replace");
    for family in FAMILIES {
        let before = bed.counters();
        let socket = send(&bed, AWAY.load_balancer(family, ECHO), 8);
        wait("it is dropped", || match delta(&bed, &before).reason("local_policy") {
            1 => Ok(()),
            n => Err(format!("{n} packets")),
        });
        socket.set_nonblocking(true).expect("a socket");
        let received = socket.recv(&mut [0; 64]).map_err(|e| e.kind());
        assert_eq!(received, Err(ErrorKind::WouldBlock), "{family}");
    }
    assert_eq!(answers(&bed, "port_unreachable"), (0, 0));
}

/// The way to node2 takes less than the client's.
fn narrow(bed: &Bed, underlay: Family) {
    let there = bed.node(2).address(underlay);
    let length = if underlay == Family::V4 { 32 } else { 128 };
    let route = format!("route add {there}/{length} dev {UPLINK} mtu {NARROW}");
    bed.run(NODE, "ip", &route.split(' ').collect::<Vec<_>>());
}

/// The client learns how large its packets may be, and sends no larger ones.
fn says_what_fits(mode: Mode, underlay: Family) {
    let spec = LabSpec { underlay, client_mtu: 1500, ..LabSpec::kernel_only(2, 1) };
    let iperf3 = REMOTE.objects(&spec, &["pod2-1"]);
    let iperf3 = iperf3.replace("port: 80,", "port: 5201,").replace("port: 53,", "port: 5202,");
    let iperf3 = iperf3.replace("Port: 8080", "Port: 5201").replace("port: 8080", "port: 5201");
    let objects = [("remote.yaml", iperf3)];
    let mut bed = Bed::without_agent(&spec, Config::new(mode), &objects);
    narrow(&bed, underlay);
    bed.start();
    let host = bed.lab.host("pod2-1").expect("a pod");
    let mut server = Command::new("iperf3");
    bed.lab.spawn(&host, "iperf3", server.arg("--server")).expect("iperf3");
    let overhead = if underlay == Family::V4 { 50 } else { 70 };
    for family in FAMILIES {
        let vip = REMOTE.load_balancer_ip(family);
        let (there, _) = iperf(&bed, "client", vip, &["--bitrate", "20M"]);
        assert!(there > 500_000, "{there} bytes");
        let (sent, _) = answers(&bed, "too_big");
        assert!(sent > 0, "{family}: the segments were small");
        let learnt = bed.run("client", "ip", &["route", "get", &vip.to_string()]);
        let mtu = format!(" mtu {} ", NARROW - overhead);
        assert!(learnt.contains(&mtu), "{family}: {learnt}");
    }
}

#[test]
fn native_tells_clients_what_fits_a_tunnel_over_ipv4() {
    says_what_fits(Mode::Native, Family::V4);
}

#[test]
fn generic_tells_clients_what_fits_a_tunnel_over_ipv6() {
    says_what_fits(Mode::Generic, Family::V6);
}

/// `tracepath` counts its ports up from the given one: its first probe has one hop left and is for the
/// Service, whose endpoint is on another node; the second meets a closed port.
fn is_a_hop(mode: Mode) {
    let bed = bed(mode, &LabSpec::kernel_only(2, 2), "replace");
    for family in FAMILIES {
        let vip = REMOTE.load_balancer_ip(family).to_string();
        let port = ECHO.to_string();
        let path = bed.run("client", "tracepath", &["-n", "-m", "4", "-p", &port, &vip]);
        let node = bed.node(1).address(family).to_string();
        let of = |who: &str| path.lines().find(|line| line.contains(who)).unwrap_or_default();
        assert!(of(&node).trim_start().starts_with("1:"), "{path}");
        assert!(of(&vip).contains("reached"), "{path}");
        // Through the tunnel the kernel is the router to a pod of this node, and still is one.
        let pod = bed.pod("pod1-1").address(family).to_string();
        let path = bed.run("pod2-1", "tracepath", &["-n", "-m", "5", &pod]);
        assert!(path.contains("reached"), "{path}");
    }
    let (sent, limited) = answers(&bed, "time_exceeded");
    assert!(sent >= 2 && limited == 0, "{sent} sent, {limited} not");
}

/// The hops that `traceroute` sees, each an address or `*`; the last one is the end.
fn hops(bed: &Bed, from: &str, to: IpAddr, how: &[&str]) -> Vec<String> {
    let to = to.to_string();
    let mut args = vec!["-n", "-q", "1", "-w", "3", "-m", "6"];
    args.extend(how);
    args.push(&to);
    let text = bed.run(from, "traceroute", &args);
    let hops = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1));
    hops.map(str::to_owned).collect()
}

/// `traceroute` by datagrams and by TCP, to Services and through the tunnel to pods of both nodes.
fn shows_its_hop(mode: Mode, delivery: &'static str) {
    let spec = LabSpec::kernel_only(2, 2);
    let objects = [
        ("local.yaml", LOCAL.objects(&spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(&spec, &["pod2-1"])),
    ];
    let bed = Bed::up(&spec, Config { delivery, ..Config::new(mode) }, &objects);
    let (echo, http) = (ECHO.to_string(), HTTP.to_string());
    for family in FAMILIES {
        let node = bed.node(1).address(family).to_string();
        for how in [["-U", "-p", &echo], ["-T", "-p", &http]] {
            for service in [LOCAL, REMOTE] {
                let vip = service.load_balancer_ip(family);
                let hops = hops(&bed, "client", vip, &how);
                let vip = vip.to_string();
                // What the kernel says of a packet that is translated comes from the Service, as it
                // does with netfilter.
                let by_kernel = delivery == "stack" && service.name == LOCAL.name;
                let first = if by_kernel { &vip } else { &node };
                assert_eq!(hops.first(), Some(first), "{service:?} {how:?}: {hops:?}");
                assert_eq!(hops.last(), Some(&vip), "{service:?} {how:?}: {hops:?}");
                assert!(hops.len() <= 3, "{service:?} {how:?}: {hops:?}");
            }
        }
        // Between pods the kernel is the router, and answers from the tunnel's address.
        let tunnel = match family {
            Family::V4 => [1, 2].map(|n| bed.node(n).tunnel_v4().to_string()),
            Family::V6 => [1, 2].map(|n| bed.node(n).tunnel_v6().to_string()),
        };
        let [here, there] = ["pod1-1", "pod2-1"].map(|pod| bed.pod(pod).address(family));
        let path = hops(&bed, "pod2-1", here, &[]);
        assert_eq!(path[1..], [tunnel[0].clone(), here.to_string()], "{path:?}");
        let path = hops(&bed, "pod1-1", there, &[]);
        assert_eq!(path[1..], [tunnel[1].clone(), there.to_string()], "{path:?}");
    }
}

#[test]
fn a28_native_redirect_shows_its_hop_to_traceroute() {
    shows_its_hop(Mode::Native, "redirect");
}

#[test]
fn a28_generic_stack_shows_its_hop_to_traceroute() {
    shows_its_hop(Mode::Generic, "stack");
}

#[test]
fn a28_native_is_a_hop_on_the_path_to_a_service() {
    is_a_hop(Mode::Native);
}

#[test]
fn a28_generic_is_a_hop_on_the_path_to_a_service() {
    is_a_hop(Mode::Generic);
}

#[test]
fn a50_flood_gets_no_more_answers_than_are_allowed() {
    const FLOOD: u64 = 400;
    let bed = bed(Mode::Native, &LabSpec::kernel_only(2, 2), "replace");
    for family in FAMILIES {
        let closed = SocketAddr::new(LOCAL.load_balancer_ip(family), CLOSED);
        let (before, answered) = (bed.counters(), answers(&bed, "port_unreachable"));
        let start = Instant::now();
        let flood = bed.netns("client").enter(|| {
            let any: IpAddr = if closed.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
            let socket = UdpSocket::bind((any, 0)).expect("a socket");
            for _ in 0..FLOOD {
                socket.send_to(b"anybody?", closed).expect("sent");
            }
        });
        flood.expect("the namespace");
        wait("all have come", || match delta(&bed, &before).reason("closed_port") {
            FLOOD => Ok(()),
            n => Err(format!("{n} packets")),
        });
        let (sent, limited) = answers(&bed, "port_unreachable");
        let (sent, limited) = (sent - answered.0, limited - answered.1);
        assert_eq!(sent + limited, FLOOD);
        // Twenty at once, ten a second.
        let allowed = 20 + 10 * (start.elapsed().as_secs() + 1);
        assert!((1..=allowed).contains(&sent), "{sent} sent, {allowed} allowed");
        assert!(limited > 0);
    }
}
