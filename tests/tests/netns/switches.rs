//! What switches the datapath off or changes what it takes: bypass, opt-out, excluded interfaces,
//! the two behaviours.

use std::net::SocketAddr;

use serde_json::Value;
use sluice_lab::traffic::Connection;
use sluice_lab::{Family, LabSpec, Mode, RpFilter};

use crate::bed::{Bed, Config, FAMILIES, HTTP, NODE, Service, delta};

const SHOP: Service = Service { name: "cart", number: 9 };

fn bypass_passes_to_the_kernel(mode: Mode) {
    let spec = LabSpec { rp_filter: RpFilter::Strict, ..LabSpec::kernel_only(2, 1) };
    let bed = Bed::up(&spec, Config::new(mode), &[]);
    let mut kept: Vec<Connection> = FAMILIES
        .into_iter()
        .map(|family| {
            let target = SocketAddr::new(bed.pod("pod1-1").address(family), 8080);
            let opened = bed.netns("pod2-1").enter(|| Connection::open(target));
            opened.expect("the pod").expect("a connection")
        })
        .collect();
    let mut round = |bypass: &str| {
        bed.lab.sluice(NODE, &["bypass", bypass]).expect("bypass");
        let before = bed.counters();
        for connection in &mut kept {
            assert_eq!(connection.ask("/").expect("an answer").pod, "pod1-1", "{bypass}");
        }
        for family in FAMILIES {
            bed.ping("pod2-1", bed.pod("pod1-1").address(family), 1200, 3, &[]);
            bed.ping("pod1-1", bed.pod("pod2-1").address(family), 1200, 3, &[]);
        }
        let counted = delta(&bed, &before);
        (counted.reason("decap_local"), counted.reason("bypass"))
    };
    let (decapsulated, bypassed) = round("off");
    assert!(decapsulated >= 12 && bypassed == 0, "off: {decapsulated}, {bypassed}");
    let (decapsulated, bypassed) = round("on");
    assert!(decapsulated == 0 && bypassed >= 12, "on: {decapsulated}, {bypassed}");
    assert!(bed.status_text().contains("BYPASS is on"));
    let (decapsulated, bypassed) = round("off");
    assert!(decapsulated >= 12 && bypassed == 0, "off again: {decapsulated}, {bypassed}");
}

#[test]
fn native_bypass_passes_every_packet_to_the_kernel_and_back() {
    bypass_passes_to_the_kernel(Mode::Native);
}

#[test]
fn generic_bypass_passes_every_packet_to_the_kernel_and_back() {
    bypass_passes_to_the_kernel(Mode::Generic);
}

#[test]
fn service_with_the_opt_out_annotation_is_left_to_the_kernel() {
    let spec = LabSpec::kernel_only(2, 1);
    let served = SHOP.objects(&spec, &["pod1-1"]);
    let left = served.replacen(
        "  namespace: shop\n",
        "  namespace: shop\n  annotations: {sluice.dev/opt-out: \"true\"}\n",
        1,
    );
    let bed = Bed::up(&spec, Config::new(Mode::Native), &[("cart.yaml", left)]);
    assert_eq!(bed.endpoints(SHOP.name), Vec::<String>::new());
    assert!(bed.status_text().contains("Service shop/cart: opted out"), "{}", bed.status_text());
    let target = SHOP.load_balancer(Family::V4, HTTP);
    let before = bed.counters();
    let url = format!("http://{target}/");
    let (answered, text) = bed.try_run("client", "curl", &["-sS", "--max-time", "1", &url]);
    assert!(!answered, "{text}");
    assert!(delta(&bed, &before).reason("no_service") > 0, "the kernel gets its packets");
    bed.write("cart.yaml", &served);
    bed.wait_endpoints(SHOP.name, &["pod1-1"]);
    assert_eq!(bed.ask("client", target).pod, "pod1-1");
}

#[test]
fn excluded_interface_is_never_touched() {
    let spec = LabSpec::kernel_only(2, 2);
    let config = Config { exclude: &["pod2"], ..Config::new(Mode::Native) };
    let bed = Bed::up(&spec, config, &[("cart.yaml", SHOP.objects(&spec, &["pod1-1", "pod1-2"]))]);
    assert_eq!(bed.programs("pod1"), ["tc_ingress", "tc_egress"]);
    assert_eq!(bed.programs("pod2"), Vec::<String>::new());
    assert_eq!(bed.status()["interfaces"]["pod2"], Value::Null);
    for family in FAMILIES {
        // Not one of ours to deliver to, but the kernel's.
        bed.ping("pod2-1", bed.pod("pod1-2").address(family), 1200, 3, &[]);
        bed.ping("pod1-2", bed.pod("pod2-1").address(family), 1200, 3, &[]);
    }
}

/// What kube-proxy would have programmed for the HTTP node port of the Service.
fn kernel_dnat(bed: &Bed, pod: &str) {
    let rules = format!(
        "add table ip proxy; \
         add chain ip proxy pre {{ type nat hook prerouting priority -100; }}; \
         add rule ip proxy pre ip daddr {} tcp dport {} dnat to {}:8080",
        bed.node(1).address_v4,
        SHOP.http_node_port(),
        bed.pod(pod).v4,
    );
    bed.run(NODE, "nft", &[&rules]);
}

#[test]
fn accelerate_leaves_connections_of_before_to_the_kernel_and_takes_new_ones() {
    let spec = LabSpec::kernel_only(2, 2);
    let config = Config { behaviour: "accelerate", ..Config::new(Mode::Native) };
    let objects = [("cart.yaml", SHOP.objects(&spec, &["pod1-1"]))];
    let mut bed = Bed::without_agent(&spec, config, &objects);
    // Another pod than the one that we would choose.
    kernel_dnat(&bed, "pod1-2");
    let target = SocketAddr::new(bed.node(1).address_v4.into(), SHOP.http_node_port());
    let opened = bed.netns("client").enter(|| Connection::open(target)).expect("the client");
    let mut old = opened.expect("a connection through the kernel");
    assert_eq!(old.ask("/").expect("an answer").pod, "pod1-2");

    bed.start();
    let before = bed.counters();
    for _ in 0..5 {
        assert_eq!(old.ask("/").expect("an answer").pod, "pod1-2", "the connection of before");
    }
    let counted = delta(&bed, &before);
    assert!(counted.reason("mid_flow") >= 5, "{counted:#?}");
    assert_eq!(bed.ask("client", target).pod, "pod1-1", "a new connection");
    assert!(delta(&bed, &before).reason("dnat_local") >= 5);
}

#[test]
fn replace_decides_connections_of_before_anew_and_finds_their_pods() {
    let spec = LabSpec::kernel_only(2, 2);
    let objects = [("cart.yaml", SHOP.objects(&spec, &["pod1-1", "pod1-2"]))];
    let mut bed = Bed::up(&spec, Config::new(Mode::Native), &objects);
    let mut kept: Vec<(Connection, String)> = (0..12)
        .map(|n| {
            let target = SHOP.load_balancer(FAMILIES[n % 2], HTTP);
            let opened = bed.netns("client").enter(|| Connection::open(target));
            let mut connection = opened.expect("the client").expect("a connection");
            let pod = connection.ask("/").expect("an answer").pod;
            (connection, pod)
        })
        .collect();
    // Every record of a connection goes with the maps.
    bed.stop();
    bed.lab.sluice(NODE, &["cleanup", "--yes"]).expect("cleanup");
    bed.start();
    for (connection, pod) in &mut kept {
        let answer = connection.ask("/").expect("an answer on the connection of before");
        assert_eq!(answer.pod, *pod, "consistent hashing finds the endpoint that it had");
    }
}
