//! Services from outside and from pods, to endpoints on this node and on another.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use sluice_lab::plan::{CLIENT_V4, CLIENT_V6};
use sluice_lab::{Family, LabSpec, Mode, Netns, RpFilter};

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, Service, delta, drops, iperf, wait};

const LOCAL: Service = Service { name: "local", number: 1 };
const REMOTE: Service = Service { name: "remote", number: 2 };
const BOTH: Service = Service { name: "both", number: 3 };
/// Several thousand full-sized segments.
const LARGE: usize = 6_000_000;

fn bed(mode: Mode, spec: &LabSpec, delivery: &'static str) -> Bed {
    let objects = [
        ("local.yaml", LOCAL.objects(spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(spec, &["pod2-1"])),
        ("both.yaml", BOTH.objects(spec, &["pod1-1", "pod2-1"])),
    ];
    Bed::up(spec, Config { delivery, ..Config::new(mode) }, &objects)
}

/// The address that a pod must see as the client's: the client's own where the pod is on node1,
/// node1's tunnel address where it is on another node.
fn source(bed: &Bed, service: Service, family: Family) -> IpAddr {
    match (service.name, family) {
        ("local", Family::V4) => CLIENT_V4.into(),
        ("local", Family::V6) => CLIENT_V6.into(),
        (_, Family::V4) => bed.node(1).tunnel_v4().into(),
        (_, Family::V6) => bed.node(1).tunnel_v6().into(),
    }
}

/// Small and large answers and echoes by NodePort and LoadBalancer address, and from a pod by
/// ClusterIP. Every packet of the client is counted as translated.
fn serves(bed: &Bed) {
    for family in FAMILIES {
        for (service, pod) in [(LOCAL, "pod1-1"), (REMOTE, "pod2-1")] {
            let node = bed.node(1).address(family);
            for (http, echo) in [
                (service.load_balancer(family, HTTP), service.load_balancer(family, ECHO)),
                (
                    SocketAddr::new(node, service.http_node_port()),
                    SocketAddr::new(node, service.echo_node_port()),
                ),
            ] {
                let (before, packets) = (bed.counters(), bed.packets("client"));
                let answer = bed.ask("client", http);
                assert_eq!(answer.pod, pod, "{http}");
                assert_eq!(answer.client, source(bed, service, family), "{http}");
                assert_eq!(answer.local, bed.pod(pod).address(family), "{http}");
                assert_large_body(bed, "client", http);
                for _ in 0..4 {
                    assert_eq!(bed.ask_udp("client", echo), pod, "{echo}");
                }
                let packets = bed.packets("client") - packets;
                let counted = delta(bed, &before);
                let name = format!("shop/{}", service.name);
                let (http_there, http_back) = counted.service_port(&name, "http", HTTP);
                let (echo_there, echo_back) = counted.service_port(&name, "echo", ECHO);
                assert!(http_there + echo_there >= packets.sent, "{packets:?} {counted:#?}");
                // The client merges what it receives; the wire cannot carry it in fewer packets.
                let fewest = packets.received.max((LARGE / 1500) as u64);
                assert!(http_back + echo_back >= fewest, "{fewest} {counted:#?}");
                assert!(drops(&counted).is_empty(), "{http}: {:?}", drops(&counted));
            }
        }
        for (service, pod) in [(LOCAL, "pod1-1"), (REMOTE, "pod2-1")] {
            let http = SocketAddr::new(service.cluster_ip(family), HTTP);
            let answer = bed.ask("pod1-2", http);
            assert_eq!(answer.pod, pod, "{http} from a pod");
            assert_eq!(answer.client, bed.pod("pod1-2").address(family), "{http} from a pod");
            assert_large_body(bed, "pod1-2", http);
            let echo = SocketAddr::new(service.cluster_ip(family), ECHO);
            assert_eq!(bed.ask_udp("pod1-2", echo), pod, "{echo} from a pod");
        }
        let spread = bed.ask_often("client", BOTH.load_balancer(family, HTTP), 16);
        assert_eq!(spread.len(), 2, "both endpoints are used: {spread:?}");
    }
}

/// Downloads [`LARGE`] bytes and compares each with the server's pattern.
fn assert_large_body(bed: &Bed, from: &str, target: SocketAddr) {
    let body = bed.curl(from, target, &format!("/bytes/{LARGE}"));
    assert_eq!(body.len(), LARGE, "{target}");
    // The server counts bytes up in blocks of 64 KiB.
    let wrong = body.iter().zip((0..=255u8).cycle()).position(|(got, want)| *got != want);
    assert_eq!(wrong, None, "{target}: the first wrong byte");
}

#[test]
fn native_serves_local_and_remote_backends_by_redirect() {
    let spec = LabSpec { rp_filter: RpFilter::Strict, ..LabSpec::kernel_only(2, 2) };
    serves(&bed(Mode::Native, &spec, "redirect"));
}

#[test]
fn native_serves_local_and_remote_backends_by_the_stack() {
    serves(&bed(Mode::Native, &LabSpec::kernel_only(2, 2), "stack"));
}

#[test]
fn generic_serves_local_and_remote_backends_by_redirect() {
    serves(&bed(Mode::Generic, &LabSpec::kernel_only(2, 2), "redirect"));
}

#[test]
fn generic_serves_local_and_remote_backends_by_the_stack() {
    let spec = LabSpec { rp_filter: RpFilter::Strict, ..LabSpec::kernel_only(2, 2) };
    serves(&bed(Mode::Generic, &spec, "stack"));
}

#[test]
fn native_serves_remote_backends_over_an_ipv6_underlay() {
    let spec = LabSpec { underlay: Family::V6, ..LabSpec::kernel_only(2, 2) };
    serves(&bed(Mode::Native, &spec, "auto"));
}

#[test]
fn generic_serves_remote_backends_over_an_ipv6_underlay() {
    let spec = LabSpec { underlay: Family::V6, ..LabSpec::kernel_only(2, 2) };
    serves(&bed(Mode::Generic, &spec, "auto"));
}

/// Full-sized packets in both directions, through translation and encapsulation.
fn streams(mode: Mode) {
    // A client whose packets are as large as the underlay's, and a tunnel with other numbers.
    let spec = LabSpec {
        client_mtu: 1500,
        vni: 0x00ab_cdef,
        vxlan_port: 4789,
        ..LabSpec::kernel_only(2, 1)
    };
    // iperf3's own port, with the numbers of its pods.
    let iperf3 = |service: Service, pod| {
        let text = service.objects(&spec, &[pod]);
        let text = text.replace("port: 80,", "port: 5201,").replace("port: 53,", "port: 5201,");
        text.replace("Port: 8080", "Port: 5201")
            .replace("port: 8080", "port: 5201")
            .replace("Port: 5353", "Port: 5201")
            .replace("port: 5353", "port: 5201")
    };
    let objects =
        [("local.yaml", iperf3(LOCAL, "pod1-1")), ("remote.yaml", iperf3(REMOTE, "pod2-1"))];
    let mut bed = Bed::up(&spec, Config::new(mode), &objects);
    for pod in ["pod1-1", "pod2-1"] {
        let host = bed.lab.host(pod).expect("a pod");
        let mut server = Command::new("iperf3");
        bed.lab.spawn(&host, "iperf3", server.arg("--server")).expect("iperf3");
    }
    for (service, family) in
        [(LOCAL, Family::V4), (REMOTE, Family::V6), (LOCAL, Family::V6), (REMOTE, Family::V4)]
    {
        let udp: &[&str] = &["--udp", "--bitrate", "5M"];
        let tcp: &[&str] = &["--bitrate", "100M"];
        let more = if (service.name, family) == ("local", Family::V6) { udp } else { tcp };
        let before = bed.counters();
        let (there, here) = iperf(&bed, "client", service.load_balancer_ip(family), more);
        let counted = delta(&bed, &before);
        let sum = |names: [&str; 2]| names.iter().map(|name| counted.reason(name)).sum::<u64>();
        let translated = sum(["dnat_local", "dnat_remote"]);
        let replies = sum(["reply_local", "reply_remote"]);
        assert!(translated >= there / 1500, "{service:?}: {there} bytes in {translated} packets");
        assert!(replies >= here / 1500, "{service:?}: {here} bytes in {replies} packets");
        assert!(drops(&counted).is_empty(), "{service:?} {family}: {:?}", drops(&counted));
    }
}

#[test]
fn native_translates_full_sized_streams_in_both_directions() {
    streams(Mode::Native);
}

#[test]
fn generic_translates_full_sized_streams_in_both_directions() {
    streams(Mode::Generic);
}

/// Two agents: what one encapsulates the other takes out.
fn both_nodes_serve(mode: Mode) {
    let spec = LabSpec::kernel_only(2, 2);
    let mut bed = bed(mode, &spec, "auto");
    bed.start_on("node2");
    let counters = |node: &str| bed.lab.agent_counters(node).expect("counters");
    for family in FAMILIES {
        for (service, pod) in [(LOCAL, "pod1-1"), (REMOTE, "pod2-1")] {
            for node in [1, 2] {
                let before = [NODE, "node2"].map(counters);
                let address = bed.node(node).address(family);
                let http = SocketAddr::new(address, service.http_node_port());
                assert_eq!(bed.ask("client", http).pod, pod, "{http}");
                assert_large_body(&bed, "client", http);
                let echo = SocketAddr::new(address, service.echo_node_port());
                assert_eq!(bed.ask_udp("client", echo), pod, "{echo}");
                let counted =
                    [counters(NODE).since(&before[0]), counters("node2").since(&before[1])];
                let far = if pod == "pod1-1" { &counted[0] } else { &counted[1] };
                let near = &counted[node - 1];
                let local = (pod == "pod1-1") == (node == 1);
                let there = if local { "dnat_local" } else { "dnat_remote" };
                assert!(near.reason(there) > 10, "{http}: {near:#?}");
                assert_eq!(far.reason("decap_local") > 10, !local, "{http}: {far:#?}");
                for delta in &counted {
                    assert!(drops(delta).is_empty(), "{http}: {:?}", drops(delta));
                }
            }
            for pod_of in ["pod1-2", "pod2-2"] {
                let http = SocketAddr::new(service.cluster_ip(family), HTTP);
                let answer = bed.ask(pod_of, http);
                assert_eq!(answer.pod, pod, "{http} from {pod_of}");
                assert_eq!(answer.client, bed.pod(pod_of).address(family), "{http} from {pod_of}");
                assert_large_body(&bed, pod_of, http);
                let echo = SocketAddr::new(service.cluster_ip(family), ECHO);
                assert_eq!(bed.ask_udp(pod_of, echo), pod, "{echo} from {pod_of}");
            }
        }
    }
}

#[test]
fn native_agents_on_both_nodes_serve_each_others_pods() {
    both_nodes_serve(Mode::Native);
}

#[test]
fn generic_agents_on_both_nodes_serve_each_others_pods() {
    both_nodes_serve(Mode::Generic);
}

#[test]
fn one_client_port_to_two_services_of_one_pod_is_two_connections() {
    const TWIN: Service = Service { name: "twin", number: 4 };
    let spec = LabSpec::kernel_only(2, 1);
    let bed = bed(Mode::Native, &spec, "auto");
    for (first, pod, port) in [(LOCAL, "pod1-1", 40_001), (REMOTE, "pod2-1", 40_002)] {
        bed.write("twin.yaml", &TWIN.objects(&spec, &[pod]));
        bed.wait_endpoints(TWIN.name, &[pod]);
        for family in FAMILIES {
            let port = port + if family == Family::V6 { 10 } else { 0 };
            let http = [first, TWIN].map(|service| service.load_balancer(family, HTTP));
            let mut streams = http.map(|target| connect_from(&bed.netns("client"), port, target));
            for round in 0..3 {
                for (stream, target) in streams.iter_mut().zip(http) {
                    let answer = ask_on(stream).unwrap_or_else(|e| panic!("{target} {round}: {e}"));
                    assert!(answer.contains(&format!("\"pod\":\"{pod}\"")), "{target}: {answer}");
                }
            }
            let echo = [first, TWIN].map(|service| service.load_balancer(family, ECHO));
            let any: IpAddr = if echo[0].is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = bed.netns("client").enter(|| UdpSocket::bind((any, port)));
            let socket = socket.expect("the client").expect("a socket");
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a time limit");
            for round in 0..3 {
                for target in echo {
                    socket.send_to(b"who", target).expect("sent");
                    let mut buffer = [0; 64];
                    let (len, from) = socket.recv_from(&mut buffer).expect("an echo");
                    assert_eq!(from, target, "round {round}");
                    assert_eq!(buffer[..len], *format!("{pod} who").as_bytes(), "{target}");
                }
            }
        }
    }
}

/// A connection from a port that another connection may have too.
fn connect_from(netns: &Netns, port: u16, target: SocketAddr) -> TcpStream {
    let connected = netns.enter(|| -> io::Result<TcpStream> {
        let (family, local) = match target {
            SocketAddr::V4(_) => (AddressFamily::Inet, SocketAddr::from(([0, 0, 0, 0], port))),
            SocketAddr::V6(_) => (AddressFamily::Inet6, SocketAddr::from(([0u16; 8], port))),
        };
        let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(local))?;
        socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
        Ok(socket.into())
    });
    let stream = connected.expect("the client").unwrap_or_else(|e| panic!("{target}: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a time limit");
    stream
}

/// One GET on a connection that stays open.
fn ask_on(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    let mut text = Vec::new();
    // The lab's answers end with a line of JSON.
    while !text.ends_with(b"}\n") {
        let mut buffer = [0; 1024];
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => text.extend_from_slice(&buffer[..len]),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn session_affinity_keeps_a_client_with_one_pod() {
    let spec = LabSpec::kernel_only(2, 2);
    let pods = ["pod1-1", "pod1-2", "pod2-1", "pod2-2"];
    let manifest = BOTH.manifest("  sessionAffinity: ClientIP\n");
    let objects = [("both.yaml", format!("{manifest}{}", BOTH.slices(&spec, &pods)))];
    let bed = Bed::up(&spec, Config::new(Mode::Native), &objects);
    for family in FAMILIES {
        let seen = bed.ask_often("client", BOTH.load_balancer(family, HTTP), 12);
        assert_eq!(seen.len(), 1, "{seen:?}");
    }
    bed.write("both.yaml", &BOTH.objects(&spec, &pods));
    let spread = || bed.ask_often("client", BOTH.load_balancer(Family::V4, HTTP), 12);
    wait("without affinity", || match spread() {
        seen if seen.len() > 1 => Ok(()),
        seen => Err(format!("{seen:?}")),
    });
}

#[test]
fn external_traffic_policy_local_uses_pods_of_this_node_alone() {
    let spec = LabSpec::kernel_only(2, 1);
    let manifest = BOTH.manifest("  externalTrafficPolicy: Local\n");
    let with = |pods: &[&str]| format!("{manifest}{}", BOTH.slices(&spec, pods));
    let objects = [("both.yaml", with(&["pod1-1", "pod2-1"]))];
    let bed = Bed::up(&spec, Config::new(Mode::Native), &objects);
    for family in FAMILIES {
        let seen = bed.ask_often("client", BOTH.load_balancer(family, HTTP), 12);
        assert_eq!(seen.into_keys().collect::<Vec<_>>(), ["pod1-1"]);
    }
    bed.write("both.yaml", &with(&["pod2-1"]));
    bed.wait_endpoints(BOTH.name, &["pod2-1"]);
    for family in FAMILIES {
        let before = bed.counters();
        let url = format!("http://{}/", BOTH.load_balancer(family, HTTP));
        let (answered, text) = bed.try_run("client", "curl", &["-sSg", "--max-time", "1", &url]);
        assert!(!answered, "{text}");
        assert!(drops(&delta(&bed, &before)).contains_key("local_policy"), "the drop has a name");
        // From inside the cluster every pod is as good as another.
        let inside = SocketAddr::new(BOTH.cluster_ip(family), HTTP);
        assert_eq!(bed.ask("pod1-1", inside).pod, "pod2-1");
    }
}
