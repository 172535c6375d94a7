//! Datagrams and echo requests that no MTU lets through whole, in both directions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use sluice_lab::{Family, LabSpec, Mode, plan};

use crate::bed::{Bed, Config, ECHO, FAMILIES, PATIENCE, Service, delta, drops};

const LOCAL: Service = Service { name: "local", number: 1 };
const REMOTE: Service = Service { name: "remote", number: 2 };
/// Two fragments, and half a dozen.
const SIZES: [usize; 2] = [2000, 8000];

fn bed(mode: Mode, underlay: Family, delivery: &'static str) -> Bed {
    // The client's fragments fit behind outer headers: nobody can cut them once more.
    let client_mtu = plan::pod_mtu(underlay);
    let spec = LabSpec { underlay, client_mtu, ..LabSpec::kernel_only(2, 2) };
    let objects = [
        ("local.yaml", LOCAL.objects(&spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(&spec, &["pod2-1"])),
    ];
    Bed::up(&spec, Config { delivery, ..Config::new(mode) }, &objects)
}

/// A datagram of `size` bytes comes back whole, from this pod.
fn echo(bed: &Bed, from: &str, target: SocketAddr, size: usize, pod: &str) {
    let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    let got = bed.netns(from).enter(|| -> std::io::Result<Vec<u8>> {
        let any: IpAddr = match target {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(target)?;
        socket.send(&sent)?;
        let mut reply = vec![0; 1 << 16];
        let len = socket.recv(&mut reply)?;
        reply.truncate(len);
        Ok(reply)
    });
    let got = got.expect("the namespace").unwrap_or_else(|e| {
        let counted = bed.counters();
        panic!("{size} bytes from {from} to {target}: {e}\n{counted:#?}\n{}", bed.log());
    });
    let expected = [format!("{pod} ").as_bytes(), &sent].concat();
    assert!(got == expected, "{size} bytes from {from} to {target}: {} came back", got.len());
}

fn carries_what_must_be_cut(bed: &Bed) {
    for family in FAMILIES {
        let before = bed.counters();
        for (service, pod) in [(LOCAL, "pod1-1"), (REMOTE, "pod2-1")] {
            let node = bed.node(1).address(family);
            for size in SIZES {
                echo(bed, "client", service.load_balancer(family, ECHO), size, pod);
                let port = SocketAddr::new(node, service.echo_node_port());
                echo(bed, "client", port, size, pod);
                let cluster = SocketAddr::new(service.cluster_ip(family), ECHO);
                echo(bed, "pod1-2", cluster, size, pod);
            }
        }
        let (here, there) = (bed.pod("pod1-1").address(family), bed.pod("pod2-1").address(family));
        for size in [8000, 65_000] {
            bed.ping("pod1-1", there, size, 3, &["-M", "dont"]);
            bed.ping("pod2-1", here, size, 3, &["-M", "dont"]);
        }
        // A Service's address answers for itself, in as many pieces.
        for service in [LOCAL, REMOTE] {
            for size in [4000, 65_000] {
                let (lb, own) = (service.load_balancer_ip(family), service.cluster_ip(family));
                bed.ping("client", lb, size, 2, &["-M", "dont"]);
                bed.ping("pod1-2", own, size, 2, &["-M", "dont"]);
            }
        }
        // The node itself talks to pods from the address that is our SNAT source.
        bed.ping("node1", there, 8000, 3, &["-M", "dont"]);
        let counted = delta(bed, &before);
        assert!(drops(&counted).is_empty(), "{family}: {:?}", drops(&counted));
        for (service, least) in [(LOCAL, 2 * 2), (REMOTE, 2 * 2)] {
            // Of each size two datagrams from outside: eight packets each way at the least.
            let name = format!("shop/{}", service.name);
            let (there, back) = counted.service_port(&name, "echo", ECHO);
            assert!(there >= 2 * least && back >= 2 * least, "{name}: {there} there, {back} back");
        }
    }
}

#[test]
fn s88_a26_native_redirect_carries_fragments_both_ways() {
    carries_what_must_be_cut(&bed(Mode::Native, Family::V4, "redirect"));
}

#[test]
fn s88_a26_native_stack_carries_fragments_both_ways_over_an_ipv6_underlay() {
    carries_what_must_be_cut(&bed(Mode::Native, Family::V6, "stack"));
}

#[test]
fn s88_a26_generic_redirect_carries_fragments_both_ways() {
    carries_what_must_be_cut(&bed(Mode::Generic, Family::V4, "redirect"));
}
