//! ICMP about Services: echo requests, path MTU news, closed ports and hop limits, judged by the
//! kernels of clients and pods.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::cmsg_space;
use nix::libc::{sock_extended_err, sockaddr_in6};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use sluice_lab::plan::{BRIDGE, CLIENT_V4, CLIENT_V6, HOST_INTERFACE, Plan, UPLINK};
use sluice_lab::{Family, LabSpec, Mode, traffic};

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, Service, delta, drops, wait};

const LOCAL: Service = Service { name: "local", number: 51 };
const REMOTE: Service = Service { name: "remote", number: 52 };
const CLOSED: Service = Service { name: "closed", number: 53 };
const CLOSED_THERE: Service = Service { name: "closedthere", number: 54 };
/// What the narrow place lets through.
const NARROW: u32 = 1300;
/// Some hundred segments.
const LARGE: usize = 600_000;

/// A Service of pods whose UDP port is closed.
fn closed(service: Service, spec: &LabSpec, pod: &str) -> String {
    service.objects(spec, &[pod]).replace("port: 5353}", "port: 5399}")
}

fn bed(mode: Mode, delivery: &'static str) -> Bed {
    let spec = LabSpec::kernel_only(2, 2);
    let objects = [
        ("local.yaml", LOCAL.objects(&spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(&spec, &["pod2-1"])),
        ("closed.yaml", closed(CLOSED, &spec, "pod1-1")),
        ("closed-there.yaml", closed(CLOSED_THERE, &spec, "pod2-1")),
    ];
    Bed::up(&spec, Config { delivery, ..Config::new(mode) }, &objects)
}

fn ip(bed: &Bed, host: &str, command: &str) {
    bed.run(host, "ip", &command.split(' ').collect::<Vec<_>>());
}

fn client(family: Family) -> IpAddr {
    match family {
        Family::V4 => CLIENT_V4.into(),
        Family::V6 => CLIENT_V6.into(),
    }
}

/// An address as a route to nothing else.
fn alone(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// The fabric routes between the client and node1, and its way to the client is narrow.
fn put_router_before_client(bed: &Bed) {
    let routers: [(IpAddr, u8); 2] = [
        (Ipv4Addr::new(192, 0, 2, 254).into(), 24),
        (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe).into(), 64),
    ];
    let of_bridge = format!("ipv4/conf/{BRIDGE}/send_redirects");
    let settings = [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/send_redirects", "0"),
        (&of_bridge, "0"),
    ];
    for (router, length) in routers {
        ip(bed, "fabric", &format!("address add {router}/{length} dev {BRIDGE}"));
    }
    bed.netns("fabric").sysctls(&settings).expect("a router");
    for (family, (router, _)) in FAMILIES.into_iter().zip(routers) {
        let client = alone(client(family));
        ip(bed, "fabric", &format!("route add {client} dev {BRIDGE} mtu {NARROW}"));
        ip(bed, NODE, &format!("route add {client} via {router} dev {UPLINK}"));
        let node = bed.node(1).address(family);
        for cidr in Plan::service_cidrs().filter(|cidr| cidr.addr().is_ipv4() == node.is_ipv4()) {
            ip(bed, "fabric", &format!("route add {cidr} via {node}"));
            ip(bed, "client", &format!("route replace {cidr} via {router} dev {HOST_INTERFACE}"));
        }
    }
}

fn errors(bed: &Bed, before: &sluice_lab::agent::Counters) -> u64 {
    let counted = delta(bed, before);
    assert!(drops(&counted).is_empty(), "{:?}", drops(&counted));
    counted.reason("icmp_error")
}

/// A router beyond node1 says to the Service's address that the replies are too big for the client.
fn downloads_finish_over_a_narrow_path(mode: Mode, delivery: &'static str) {
    let bed = bed(mode, delivery);
    put_router_before_client(&bed);
    for family in FAMILIES {
        for service in [LOCAL, REMOTE] {
            let before = bed.counters();
            let target = service.load_balancer(family, HTTP);
            let body = bed.curl("client", target, &format!("/bytes/{LARGE}"));
            assert_eq!(body.len(), LARGE);
            assert!(errors(&bed, &before) > 0, "{target}: nobody said that the path is narrow");
        }
    }
}

#[test]
fn a49_native_redirect_downloads_finish_over_a_narrow_path() {
    downloads_finish_over_a_narrow_path(Mode::Native, "redirect");
}

#[test]
fn a49_generic_stack_downloads_finish_over_a_narrow_path() {
    downloads_finish_over_a_narrow_path(Mode::Generic, "stack");
}

/// The way to the pods is narrow: the node before it says so to the client, in the Service's name.
#[test]
fn a49_uploads_finish_over_a_narrow_path() {
    let bed = bed(Mode::Native, "stack");
    for family in FAMILIES {
        for (service, pod, node) in [(LOCAL, "pod1-1", NODE), (REMOTE, "pod2-1", "node2")] {
            let (at, device) = (bed.pod(pod).address(family), &bed.pod(pod).host_interface);
            let scope = if at.is_ipv4() { " scope link" } else { "" };
            let route = format!("route replace {} dev {device}{scope} mtu {NARROW}", alone(at));
            ip(&bed, node, &route);
            let before = bed.counters();
            let target = service.load_balancer(family, HTTP);
            let path = format!("/{}", "x".repeat(7_000));
            let sent = bed.netns("client").enter(|| {
                let mut connection = traffic::Connection::open(target)?;
                (0..40).try_for_each(|_| connection.ask(&path).map(|_| ()))
            });
            sent.expect("the namespace").unwrap_or_else(|e| panic!("{target}: {e}"));
            assert!(errors(&bed, &before) > 0, "{target}: nobody said that the path is narrow");
        }
    }
}

fn pings_are_answered(mode: Mode) {
    let bed = bed(mode, "auto");
    for family in FAMILIES {
        let before = bed.counters();
        for service in [LOCAL, REMOTE] {
            for size in [0, 1, 56, 1400] {
                bed.ping("client", service.load_balancer_ip(family), size, 2, &[]);
                bed.ping("pod1-1", service.cluster_ip(family), size, 2, &[]);
            }
        }
        let answered = delta(&bed, &before).reason("echo_reply");
        assert_eq!(answered, 2 * 4 * 2 * 2, "nobody else answers");
    }
}

#[test]
fn a49_native_services_answer_ping() {
    pings_are_answered(Mode::Native);
}

#[test]
fn a49_generic_services_answer_ping() {
    pings_are_answered(Mode::Generic);
}

/// A connected socket.
fn socket(target: SocketAddr) -> UdpSocket {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).expect("a socket");
    socket.connect(target).expect("a route");
    socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a time limit");
    socket
}

/// What a datagram brings back that is no answer. The pod's kernel limits how often it says so
/// (icmp_ratelimit), so another one may be needed.
fn refused(bed: &Bed, from: &str, target: SocketAddr) {
    wait(&format!("{target} is refused to {from}"), || {
        let outcome = bed.netns(from).enter(|| {
            let socket = socket(target);
            socket.send(b"?").and_then(|_| socket.recv(&mut [0; 16]))
        });
        match outcome.expect("the namespace") {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

fn closed_ports_are_refused(mode: Mode, delivery: &'static str) {
    let bed = bed(mode, delivery);
    for family in FAMILIES {
        for service in [CLOSED, CLOSED_THERE] {
            let before = bed.counters();
            refused(&bed, "client", service.load_balancer(family, ECHO));
            let node = bed.node(1).address(family);
            refused(&bed, "client", SocketAddr::new(node, service.echo_node_port()));
            refused(&bed, "pod1-2", SocketAddr::new(service.cluster_ip(family), ECHO));
            assert!(errors(&bed, &before) >= 3);
        }
    }
}

#[test]
fn a49_native_redirect_closed_ports_are_refused() {
    closed_ports_are_refused(Mode::Native, "redirect");
}

#[test]
fn a49_native_stack_closed_ports_are_refused() {
    closed_ports_are_refused(Mode::Native, "stack");
}

#[test]
fn a49_generic_redirect_closed_ports_are_refused() {
    closed_ports_are_refused(Mode::Generic, "redirect");
}

/// Who says that a datagram with so many hops did not arrive (RFC 1812 section 5.3.1), as
/// traceroute asks it.
fn who_stops(target: SocketAddr, hops: i32) -> Result<IpAddr, String> {
    let socket = socket(target);
    if target.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4Ttl, &hops).expect("TTL");
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true).expect("errors");
    } else {
        setsockopt(&socket, sockopt::Ipv6Ttl, &hops).expect("hop limit");
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true).expect("errors");
    }
    socket.send(b"?").map_err(|e| e.to_string())?;
    match socket.recv(&mut [0; 64]) {
        Err(e) if e.kind() == ErrorKind::HostUnreachable => {}
        other => return Err(format!("{other:?}")),
    }
    let mut space = cmsg_space!(sock_extended_err, sockaddr_in6);
    let mut data = [0; 64];
    let mut iov = [IoSliceMut::new(&mut data)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
    );
    let message = message.map_err(|e| e.to_string())?;
    for part in message.cmsgs().map_err(|e| e.to_string())? {
        match part {
            ControlMessageOwned::Ipv4RecvErr(_, Some(by)) => {
                return Ok(Ipv4Addr::from(u32::from_be(by.sin_addr.s_addr)).into());
            }
            ControlMessageOwned::Ipv6RecvErr(_, Some(by)) => {
                return Ok(Ipv6Addr::from(by.sin6_addr.s6_addr).into());
            }
            _ => {}
        }
    }
    Err("an error without its sender".to_owned())
}

/// Every node on the way to a backend speaks to the client in the Service's name.
fn traced_to_backends(mode: Mode, delivery: &'static str) {
    let bed = bed(mode, delivery);
    for family in FAMILIES {
        let mut ways = vec![(REMOTE, 2)];
        if delivery == "stack" {
            ways.push((LOCAL, 1));
        }
        for (service, hops) in ways {
            let before = bed.counters();
            let target = service.load_balancer(family, ECHO);
            let by = wait(&format!("{target} in {hops} hops"), || {
                bed.netns("client").enter(|| who_stops(target, hops)).expect("the namespace")
            });
            assert_eq!(by, target.ip());
            assert!(errors(&bed, &before) > 0);
            let one_more = bed.netns("client").enter(|| who_stops(target, hops + 1));
            let said = one_more.expect("the namespace");
            assert!(said.is_err(), "{target} in {} hops: {said:?}", hops + 1);
        }
    }
}

#[test]
fn a49_native_traceroute_sees_the_service() {
    traced_to_backends(Mode::Native, "redirect");
}

#[test]
fn a49_generic_traceroute_sees_the_service() {
    traced_to_backends(Mode::Generic, "stack");
}
