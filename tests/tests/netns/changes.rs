//! Connections while endpoints, objects and the agent itself come and go.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sluice_lab::plan::{
    HOST_INTERFACE, POD_GATEWAY_MAC, POD_GATEWAY_V4, POD_GATEWAY_V6, UPLINK, pod_mtu,
};
use sluice_lab::traffic::Connection;
use sluice_lab::{Family, LabSpec, Mode, Netns};

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, Service, delta, wait};

const SHOP: Service = Service { name: "cart", number: 7 };
/// Enough that each of two endpoints gets some: all to one happens once in 32768 runs.
const CONNECTIONS: usize = 16;

fn bed(mode: Mode, tables: &'static str) -> Bed {
    let spec = LabSpec::kernel_only(2, 2);
    let objects = [
        ("service.yaml", SHOP.manifest("")),
        ("slices.yaml", SHOP.slices(&spec, &["pod1-1", "pod2-1"])),
    ];
    Bed::up(&spec, Config { tables, ..Config::new(mode) }, &objects)
}

fn set_endpoints(bed: &Bed, pods: &[&str]) {
    bed.write("slices.yaml", &SHOP.slices(bed.lab.spec(), pods));
    bed.wait_endpoints(SHOP.name, pods);
}

/// A connection that was answered by `pod` and must be from then on.
struct Kept {
    connection: Connection,
    pod: String,
}

impl Kept {
    fn open(bed: &Bed, target: SocketAddr) -> Self {
        let opened = bed.netns("client").enter(|| Connection::open(target)).expect("the client");
        let mut connection = opened.unwrap_or_else(|e| panic!("{target}: {e}\n{}", bed.log()));
        let pod = connection.ask("/").expect("an answer").pod;
        Self { connection, pod }
    }

    fn open_many(bed: &Bed) -> Vec<Self> {
        let targets = FAMILIES.map(|family| SHOP.load_balancer(family, HTTP));
        targets.iter().flat_map(|to| (0..CONNECTIONS / 2).map(|_| Self::open(bed, *to))).collect()
    }

    fn asserts_same_pod(&mut self, when: &str) {
        let answer = self.connection.ask("/").unwrap_or_else(|e| panic!("{when}: {e}"));
        assert_eq!(answer.pod, self.pod, "{when}");
    }
}

fn pods(connections: &[Kept]) -> BTreeSet<&str> {
    connections.iter().map(|c| c.pod.as_str()).collect()
}

fn all_stay(connections: &mut [Kept], when: &str) {
    connections.iter_mut().for_each(|c| c.asserts_same_pod(when));
}

fn connections_stay(mode: Mode) {
    let mut bed = bed(mode, "");
    let mut first = Kept::open_many(&bed);
    assert_eq!(pods(&first), BTreeSet::from(["pod1-1", "pod2-1"]));

    set_endpoints(&bed, &["pod1-1", "pod2-1", "pod1-2", "pod2-2"]);
    all_stay(&mut first, "endpoints were added");

    set_endpoints(&bed, &["pod1-2", "pod2-2"]);
    all_stay(&mut first, "their endpoints were removed");
    let mut second = Kept::open_many(&bed);
    assert_eq!(pods(&second), BTreeSet::from(["pod1-2", "pod2-2"]), "new connections");

    bed.kill();
    all_stay(&mut first, "the agent was killed");
    all_stay(&mut second, "the agent was killed");
    bed.start();
    all_stay(&mut first, "the agent was started again");
    all_stay(&mut second, "the agent was started again");

    bed.stop();
    bed.write("slices.yaml", &SHOP.slices(bed.lab.spec(), &["pod1-1"]));
    bed.start();
    bed.wait_endpoints(SHOP.name, &["pod1-1"]);
    all_stay(&mut first, "endpoints changed while no agent ran");
    all_stay(&mut second, "endpoints changed while no agent ran");
    assert_eq!(pods(&Kept::open_many(&bed)), BTreeSet::from(["pod1-1"]), "new connections");
}

#[test]
fn native_tcp_connection_stays_with_its_pod_while_endpoints_and_agent_change() {
    connections_stay(Mode::Native);
}

#[test]
fn generic_tcp_connection_stays_with_its_pod_while_endpoints_and_agent_change() {
    connections_stay(Mode::Generic);
}

/// A socket whose datagrams are one connection.
struct Datagrams(UdpSocket);

impl Datagrams {
    fn open(netns: &Netns, target: SocketAddr) -> Self {
        let any = match target {
            SocketAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let opened = netns.enter(|| {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            Ok::<_, io::Error>(socket)
        });
        Self(opened.expect("the namespace").expect("a socket"))
    }

    /// The pod that echoes.
    fn ask(&self) -> io::Result<String> {
        self.0.send(b"who")?;
        let mut buffer = [0; 128];
        let len = self.0.recv(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    }
}

#[test]
fn udp_connection_stays_while_its_endpoint_does_and_moves_on_when_it_is_removed() {
    let bed = bed(Mode::Native, "");
    let client = bed.netns("client");
    let sockets: Vec<(Datagrams, String)> = FAMILIES
        .into_iter()
        .flat_map(|family| {
            let target = SHOP.load_balancer(family, ECHO);
            (0..CONNECTIONS / 2).map(move |_| target)
        })
        .map(|target| {
            let socket = Datagrams::open(&client, target);
            let pod = socket.ask().unwrap_or_else(|e| panic!("{target}: {e}\n{}", bed.log()));
            (socket, pod)
        })
        .collect();
    let first: BTreeSet<&str> = sockets.iter().map(|(_, pod)| pod.as_str()).collect();
    assert_eq!(first, BTreeSet::from(["pod1-1", "pod2-1"]));

    set_endpoints(&bed, &["pod1-1", "pod2-1", "pod1-2", "pod2-2"]);
    for (socket, pod) in &sockets {
        assert_eq!(socket.ask().expect("an echo"), *pod, "endpoints were added");
    }
    set_endpoints(&bed, &["pod1-1", "pod2-2"]);
    for (socket, pod) in &sockets {
        // What was in flight while the endpoint went may have made its record anew; it is
        // forgotten after a grace period.
        let now = wait("another endpoint", || match socket.ask() {
            Ok(now) if now == "pod2-1" => Err("still the removed one".to_owned()),
            Ok(now) => Ok(now),
            Err(error) => Err(error.to_string()),
        });
        if pod == "pod1-1" {
            assert_eq!(now, "pod1-1", "its endpoint is still there");
        } else {
            assert!(["pod1-1", "pod2-2"].contains(&now.as_str()), "{now}");
        }
    }
}

/// Datagrams one after the other, a few milliseconds apart, until it is ended.
struct Stream {
    ended: Arc<AtomicBool>,
    sender: thread::JoinHandle<u32>,
    receiver: thread::JoinHandle<()>,
    echoed: Arc<Mutex<BTreeSet<u32>>>,
}

impl Stream {
    fn start(netns: &Netns, target: SocketAddr) -> Self {
        let Datagrams(socket) = Datagrams::open(netns, target);
        let ended = Arc::new(AtomicBool::new(false));
        let echoed = Arc::new(Mutex::new(BTreeSet::new()));
        let (out, stop) = (socket.try_clone().expect("a second handle"), ended.clone());
        let sender = thread::spawn(move || {
            let mut number = 0u32;
            while !stop.load(Ordering::Relaxed) {
                out.send(number.to_string().as_bytes()).expect("send");
                number += 1;
                thread::sleep(Duration::from_millis(3));
            }
            number
        });
        let (stop, set) = (ended.clone(), echoed.clone());
        let receiver = thread::spawn(move || {
            let mut buffer = [0; 128];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(len) => {
                        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                        let number: Option<u32> =
                            text.split(' ').nth(1).and_then(|n| n.parse().ok());
                        set.lock().expect("no panic").extend(number);
                    }
                    // Nothing for as long as the socket waits: what is not there is lost.
                    Err(_) if stop.load(Ordering::Relaxed) => return,
                    Err(_) => {}
                }
            }
        });
        Self { ended, sender, receiver, echoed }
    }

    /// How many were sent, and how many of them came back.
    fn end(self) -> (u32, u32) {
        self.ended.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("the sender");
        self.receiver.join().expect("the receiver");
        let echoed = self.echoed.lock().expect("no panic").len();
        (sent, u32::try_from(echoed).expect("few"))
    }
}

fn no_packet_is_lost(mode: Mode) {
    let mut bed = bed(mode, "");
    set_endpoints(&bed, &["pod2-1"]);
    let streams: Vec<Stream> = FAMILIES
        .into_iter()
        .flat_map(|family| {
            let inner = SocketAddr::new(bed.pod("pod1-1").address(family), 5353);
            [
                // Translated, encapsulated, decapsulated, translated back.
                Stream::start(&bed.netns("client"), SHOP.load_balancer(family, ECHO)),
                // Decapsulated and delivered.
                Stream::start(&bed.netns("pod2-2"), inner),
            ]
        })
        .collect();
    thread::sleep(Duration::from_millis(200));
    bed.kill();
    thread::sleep(Duration::from_millis(200));
    bed.start();
    thread::sleep(Duration::from_millis(200));
    bed.stop();
    bed.start();
    thread::sleep(Duration::from_millis(200));
    for stream in streams {
        let (sent, echoed) = stream.end();
        assert!(sent > 100, "only {sent} datagrams were sent");
        assert_eq!(echoed, sent, "datagrams lost: {}", sent - echoed);
    }
}

#[test]
fn native_loses_no_packet_while_the_agent_is_killed_and_started_again() {
    no_packet_is_lost(Mode::Native);
}

#[test]
fn generic_loses_no_packet_while_the_agent_is_killed_and_started_again() {
    no_packet_is_lost(Mode::Generic);
}

#[test]
fn datapath_serves_new_and_old_connections_while_no_agent_runs() {
    // Connections are decided anew every second, without an agent too.
    let mut bed = bed(Mode::Native, "[timeouts]\nredecide = \"1s\"\n");
    let mut old = Kept::open_many(&bed);
    bed.kill();
    let status = bed.status();
    assert_eq!((&status["ready"], &status["running"]), (&false.into(), &false.into()));
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(700));
        all_stay(&mut old, "no agent runs");
        for family in FAMILIES {
            let node = bed.node(1).address(family);
            let there = SocketAddr::new(node, SHOP.http_node_port());
            let pods = bed.ask_often("client", there, 4);
            assert_eq!(pods.values().sum::<usize>(), 4, "{pods:?}");
            bed.ask_udp("client", SHOP.load_balancer(family, ECHO));
            bed.ping("pod2-1", bed.pod("pod1-1").address(family), 56, 2, &[]);
        }
    }
    assert!(bed.counters().reason("reply_remote") > 0, "`sluice counters` needs no agent");
}

#[test]
fn connections_stay_when_mode_and_delivery_change() {
    let mut bed = bed(Mode::Native, "");
    let mut kept = Kept::open_many(&bed);
    for (mode, delivery, word) in [
        (Mode::Native, "stack", "native"),
        (Mode::Generic, "stack", "generic"),
        (Mode::Generic, "redirect", "generic"),
        (Mode::Native, "auto", "native"),
    ] {
        (bed.config.mode, bed.config.delivery) = (mode, delivery);
        bed.configure();
        wait("the agent has taken its new configuration", || {
            let status = bed.status();
            let by_stack = status["stack_delivery"]["pod1"].is_string();
            if status["ready"] == true
                && status["mode"][UPLINK] == word
                && by_stack == (delivery == "stack")
            {
                return Ok(());
            }
            Err(status.to_string())
        });
        all_stay(&mut kept, delivery);
        let before = bed.counters();
        for family in FAMILIES {
            bed.ask_often("client", SHOP.load_balancer(family, HTTP), 4);
        }
        assert!(delta(&bed, &before).reason("reply_local") > 0, "{mode} {delivery}");
    }
    bed.stop();
    bed.config.mode = Mode::Generic;
    bed.start();
    assert_eq!(bed.status()["mode"][UPLINK], "generic", "the mode changed while no agent ran");
    all_stay(&mut kept, "the mode changed while no agent ran");
}

#[test]
fn connections_stay_when_the_snat_ports_change() {
    let mut bed = bed(Mode::Native, "[snat]\nfirst_port = 20000\nlast_port = 20999\n");
    let mut kept = Kept::open_many(&bed);
    let ports = |bed: &Bed| -> BTreeSet<bool> {
        let text = bed.lab.sluice(NODE, &["flows", "--output", "json"]).expect("flows");
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let rewritten = json["flows"].as_array().into_iter().flatten();
        let port = |flow: &serde_json::Value| -> Option<SocketAddr> {
            flow["source"].as_str().filter(|_| flow["snat"] == true)?.parse().ok()
        };
        rewritten.filter_map(port).map(|source| source.port() < 20000).collect()
    };
    assert_eq!(ports(&bed), BTreeSet::from([false]));
    bed.config.tables = "[snat]\nfirst_port = 17000\nlast_port = 17999\n\
                         [timeouts]\nsweep = \"1s\"\n";
    bed.configure();
    wait("new connections take the new ports", || {
        bed.ask_often("client", SHOP.load_balancer(Family::V4, HTTP), 4);
        match ports(&bed) {
            both if both.len() == 2 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    all_stay(&mut kept, "ports changed");
    bed.stop();
    bed.start();
    all_stay(&mut kept, "the next agent knows the new ports only");
    // A sweep finds the old ports still in use.
    std::thread::sleep(Duration::from_secs(3));
    all_stay(&mut kept, "after a sweep");
}

/// The pod's interface goes and comes back with the same addresses, as when a pod of a StatefulSet
/// is made anew.
fn make_pod_anew(bed: &Bed, name: &str) {
    let pod = bed.pod(name);
    let device = &pod.host_interface;
    let (ip, mtu) = ("ip", pod_mtu(Family::V4));
    let on_node = |line: String| bed.run(NODE, ip, &line.split(' ').collect::<Vec<_>>());
    let in_pod = |line: String| bed.run(name, ip, &line.split(' ').collect::<Vec<_>>());
    on_node(format!("link del {device}"));
    on_node(format!(
        "link add {device} address {POD_GATEWAY_MAC} mtu {mtu} type veth peer name \
         {HOST_INTERFACE} address {} mtu {mtu} netns {}",
        pod.mac,
        pod.netns.name(),
    ));
    in_pod(format!("link set {HOST_INTERFACE} up"));
    on_node(format!("link set {device} up"));
    for (address, gateway) in [
        (IpAddr::from(pod.v4), IpAddr::from(POD_GATEWAY_V4)),
        (IpAddr::from(pod.v6), IpAddr::from(POD_GATEWAY_V6)),
    ] {
        in_pod(format!("addr add {address} dev {HOST_INTERFACE}"));
        in_pod(format!(
            "neigh replace {gateway} lladdr {POD_GATEWAY_MAC} dev {HOST_INTERFACE} nud permanent"
        ));
        in_pod(format!("route add default via {gateway} dev {HOST_INTERFACE} onlink"));
        on_node(format!("route add {address} dev {device}"));
    }
    for (host, device, gro) in [(NODE, device.as_str(), "off"), (name, HOST_INTERFACE, "on")] {
        let offloads = ["-K", device, "tx", "off", "tso", "off", "gso", "off", "gro", gro];
        bed.run(host, "ethtool", &offloads);
    }
}

#[test]
fn pod_made_anew_with_its_addresses_is_served_again() {
    let bed = bed(Mode::Native, "");
    set_endpoints(&bed, &["pod1-1"]);
    let mut kept = Kept::open_many(&bed);
    let interface = |bed: &Bed| bed.status()["interfaces"]["pod1"]["ifindex"].clone();
    let old = interface(&bed);
    make_pod_anew(&bed, "pod1-1");
    wait("the agent has found the new interface", || match interface(&bed) {
        new if new != old && new.is_u64() => Ok(()),
        other => Err(other.to_string()),
    });
    wait("delivery by redirect", || match bed.status()["stack_delivery"]["pod1"].as_str() {
        None => Ok(()),
        Some(reason) => Err(reason.to_owned()),
    });
    assert_eq!(bed.programs("pod1"), ["tc_ingress", "tc_egress"]);
    for family in FAMILIES {
        for _ in 0..4 {
            assert_eq!(bed.ask("client", SHOP.load_balancer(family, HTTP)).pod, "pod1-1");
            assert_eq!(bed.ask_udp("client", SHOP.load_balancer(family, ECHO)), "pod1-1");
        }
        bed.ping("pod2-1", bed.pod("pod1-1").address(family), 1200, 3, &[]);
        let inside = SocketAddr::new(SHOP.cluster_ip(family), HTTP);
        assert_eq!(bed.ask("pod1-2", inside).pod, "pod1-1");
    }
    // The pod's sockets are still there, so its connections are as well.
    all_stay(&mut kept, "the pod's interface was made anew");
}

#[test]
fn other_node_that_changes_its_mac_is_followed() {
    let bed = bed(Mode::Native, "");
    set_endpoints(&bed, &["pod2-1"]);
    let mut kept = Kept::open_many(&bed);
    let node2 = bed.netns("node2");
    // A host whose card was replaced says so (gratuitous ARP, unsolicited neighbour advertisement).
    node2.sysctl("ipv4/conf/uplink0/arp_notify", "1").expect("a sysctl");
    node2.sysctl("ipv6/conf/uplink0/ndisc_notify", "1").expect("a sysctl");
    let mac = "02:53:4c:75:02:ff";
    bed.run("node2", "ip", &["link", "set", UPLINK, "address", mac]);
    wait("the kernel of node1 knows it", || {
        let shown = bed.run(NODE, "ip", &["neigh", "show", "192.0.2.2"]);
        if shown.contains(mac) { Ok(()) } else { Err(shown) }
    });
    for family in FAMILIES {
        wait("a new connection", || {
            let target = SHOP.load_balancer(family, HTTP);
            let url = format!("http://{target}/");
            match bed.try_run("client", "curl", &["-sSgf", "--max-time", "1", &url]) {
                (true, _) => Ok(()),
                (false, text) => Err(text),
            }
        });
    }
    all_stay(&mut kept, "the other node has another MAC address");
}

#[test]
fn deleted_service_is_no_longer_served_and_the_others_are() {
    const OTHER: Service = Service { name: "other", number: 8 };
    let bed = bed(Mode::Native, "");
    bed.write("other.yaml", &OTHER.objects(bed.lab.spec(), &["pod1-2"]));
    bed.wait_endpoints(OTHER.name, &["pod1-2"]);
    let target = OTHER.load_balancer(Family::V4, HTTP);
    assert_eq!(bed.ask("client", target).pod, "pod1-2");
    bed.remove("other.yaml");
    wait("the Service is gone", || match bed.endpoints(OTHER.name) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
    let services = bed.lab.sluice(NODE, &["services"]).expect("services");
    assert!(!services.contains("shop/other"), "{services}");
    let url = format!("http://{target}/");
    let (answered, text) = bed.try_run("client", "curl", &["-sS", "--max-time", "1", &url]);
    assert!(!answered, "{text}");
    bed.ask("client", SHOP.load_balancer(Family::V4, HTTP));
}
