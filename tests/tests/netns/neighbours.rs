//! Programs, filters and rules of others on the same node.

use std::net::SocketAddr;

use aya::programs::XdpMode;
use serde_json::Value;
use sluice_lab::plan::{UPLINK, VXLAN_DEVICE};
use sluice_lab::{LabSpec, Mode, Netns, RpFilter};
use sluice_tests::kernel::Kernel;

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, Service, delta, drops, wait};

const LOCAL: Service = Service { name: "local", number: 12 };
const REMOTE: Service = Service { name: "remote", number: 13 };

/// Somebody else's XDP program, which passes everything; on the interface as long as it lives.
struct Foreign {
    _program: Kernel,
    id: u32,
}

impl Foreign {
    fn attach(netns: &Netns, interface: &str) -> Self {
        let attached = netns.enter(|| {
            let mut program = Kernel::load(sluice_tests::kernel::OBJECT, 4);
            let pass = program.xdp_mut("xdp_pass");
            pass.attach(interface, XdpMode::Driver).expect("a free interface");
            let id = pass.info().expect("information on a program").id();
            Self { _program: program, id }
        });
        attached.expect("the namespace")
    }

    fn is_on(&self, bed: &Bed, interface: &str) -> bool {
        let shown = bed.run(NODE, "ip", &["-details", "link", "show", interface]);
        shown.contains(&format!("prog/xdp id {} ", self.id))
    }
}

fn objects(spec: &LabSpec) -> [(&'static str, String); 2] {
    [
        ("local.yaml", LOCAL.objects(spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(spec, &["pod2-1"])),
    ]
}

#[test]
fn cleanup_removes_what_is_ours_and_nothing_else() {
    let spec = LabSpec::kernel_only(2, 2);
    let mut bed = Bed::without_agent(&spec, Config::new(Mode::Native), &objects(&spec));
    let foreign = Foreign::attach(&bed.netns(NODE), "pod2");
    bed.run(NODE, "tc", &["qdisc", "add", "dev", UPLINK, "clsact"]);
    for side in ["ingress", "egress"] {
        let rule = format!("filter add dev {UPLINK} {side} prio 7 u32 match u32 0 0 classid 1:7");
        bed.run(NODE, "tc", &rule.split(' ').collect::<Vec<_>>());
    }
    bed.start();
    assert_eq!(bed.ask("client", LOCAL.load_balancer(FAMILIES[0], HTTP)).pod, "pod1-1");
    let pins = bed.lab.pin_dir(NODE);
    assert_eq!(bed.programs(UPLINK), ["xdp_node", "tc_uplink", "tc_egress"]);
    assert_eq!(bed.programs("pod2"), ["xdp_pass", "tc_ingress", "tc_egress"]);

    let output = bed.lab.sluice_output(NODE, &["cleanup", "--yes"]).expect("cleanup");
    assert!(!output.status.success(), "it must not work while the agent runs");
    bed.stop();
    let output = bed.lab.sluice_output(NODE, &["cleanup"]).expect("cleanup");
    assert!(!output.status.success(), "it must not work without --yes");
    assert!(pins.exists(), "{} is gone", pins.display());
    assert_eq!(bed.ask("client", LOCAL.load_balancer(FAMILIES[0], HTTP)).pod, "pod1-1");

    bed.lab.sluice(NODE, &["cleanup", "--yes"]).expect("cleanup");
    assert!(!pins.exists(), "{} is still there", pins.display());
    assert!(!bed.lab.dir().join(NODE).exists(), "files of the instance are still there");
    wait("our programs are gone", || {
        let left = [UPLINK, VXLAN_DEVICE, "pod1", "pod2"].map(|name| bed.programs(name));
        if left.concat() == ["xdp_pass"] { Ok(()) } else { Err(format!("{left:?}")) }
    });
    assert!(foreign.is_on(&bed, "pod2"));
    for side in ["ingress", "egress"] {
        let filters = bed.run(NODE, "tc", &["filter", "show", "dev", UPLINK, side]);
        assert!(filters.contains("flowid 1:7"), "{side}: {filters}");
    }
    for family in FAMILIES {
        bed.ping("pod2-1", bed.pod("pod1-1").address(family), 1200, 3, &[]);
        bed.ping("pod2-1", bed.pod("pod1-2").address(family), 1200, 3, &[]);
    }
}

#[test]
fn foreign_xdp_program_on_the_uplink_is_named_and_stays() {
    let spec = LabSpec::kernel_only(2, 1);
    let mut bed = Bed::without_agent(&spec, Config::new(Mode::Native), &objects(&spec));
    let foreign = Foreign::attach(&bed.netns(NODE), UPLINK);
    bed.spawn_agent();
    let refusals = wait("native is refused", || {
        let status = bed.status();
        let refusals = status["interfaces"][UPLINK]["refusals"].as_array().cloned();
        refusals.filter(|r| !r.is_empty()).ok_or(status.to_string())
    });
    let text = Value::from(refusals).to_string();
    assert!(text.contains(&foreign.id.to_string()) && text.contains("xdp_pass"), "{text}");
    assert_eq!(bed.status()["ready"], false);
    assert!(bed.status_text().contains("xdp_pass"), "{}", bed.status_text());
    assert!(foreign.is_on(&bed, UPLINK));
    bed.stop();

    // `auto` finds another way, and that is said too.
    bed.config.mode = Mode::Auto;
    bed.start();
    let status = bed.status();
    assert_eq!(status["mode"][UPLINK], "tc", "{status:#}");
    assert!(foreign.is_on(&bed, UPLINK));
    for family in FAMILIES {
        bed.ping("pod2-1", bed.pod("pod1-1").address(family), 1200, 3, &[]);
    }
    bed.stop();
    bed.lab.sluice(NODE, &["cleanup", "--yes"]).expect("cleanup");
    assert!(foreign.is_on(&bed, UPLINK));
}

/// What kube-proxy and a CNI have in the way of every packet that the kernel forwards.
const RULES: &str = "
    table inet filter {
        counter invalid { }
        chain forward {
            type filter hook forward priority 0; policy drop;
            ct state invalid counter name invalid drop
            ct state established,related accept
            ct state new accept
        }
    }
    table inet nat {
        chain postrouting {
            type nat hook postrouting priority 100;
            ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
            ip6 saddr fd00:10:244::/48 ip6 daddr != fd00:10:244::/48 masquerade
        }
    }
";

fn invalid(bed: &Bed) -> u64 {
    let text = bed.run(NODE, "nft", &["--json", "list", "counter", "inet", "filter", "invalid"]);
    let json: Value = serde_json::from_str(&text).expect("JSON of nft");
    let counters = json["nftables"].as_array().into_iter().flatten();
    counters.filter_map(|c| c["counter"]["packets"].as_u64()).next().expect("the counter")
}

fn conntrack_sees_both_directions_or_neither(mode: Mode) {
    let spec = LabSpec { rp_filter: RpFilter::Strict, ..LabSpec::kernel_only(2, 2) };
    let mut bed = Bed::without_agent(&spec, Config::new(mode), &objects(&spec));
    let file = bed.lab.dir().join("rules.nft");
    std::fs::write(&file, RULES).expect("rules");
    bed.run(NODE, "nft", &["--file", &file.display().to_string()]);
    // Loose tracking would take any packet for one of a connection.
    bed.netns(NODE).sysctl("netfilter/nf_conntrack_tcp_loose", "0").expect("a sysctl");
    bed.start();
    let status = bed.status();
    for pod in ["pod1", "pod2"] {
        let why = status["stack_delivery"][pod].as_str().unwrap_or_default();
        assert!(why.contains("netfilter"), "delivery to {pod} must be by the stack: {status:#}");
    }
    let before = bed.counters();
    for family in FAMILIES {
        for (service, pod) in [(LOCAL, "pod1-1"), (REMOTE, "pod2-1")] {
            let node = SocketAddr::new(bed.node(1).address(family), service.http_node_port());
            for target in [service.load_balancer(family, HTTP), node] {
                for _ in 0..4 {
                    assert_eq!(bed.ask("client", target).pod, pod, "{target}");
                }
                let body = bed.curl("client", target, "/bytes/1000000");
                assert_eq!(body.len(), 1_000_000);
            }
            assert_eq!(bed.ask_udp("client", service.load_balancer(family, ECHO)), pod);
            let inside = SocketAddr::new(service.cluster_ip(family), HTTP);
            assert_eq!(bed.ask("pod1-2", inside).pod, pod, "{inside} from a pod");
            assert_eq!(bed.curl("pod1-2", inside, "/bytes/1000000").len(), 1_000_000);
        }
        for (from, to) in [("pod1-1", "pod2-1"), ("pod2-1", "pod1-1")] {
            let target = SocketAddr::new(bed.pod(to).address(family), 8080);
            assert_eq!(bed.ask(from, target).client, bed.pod(from).address(family));
            assert_eq!(bed.curl(from, target, "/bytes/1000000").len(), 1_000_000);
        }
    }
    let counted = delta(&bed, &before);
    assert!(counted.reason("dnat_local") > 0 && counted.reason("decap_local") > 0, "{counted:#?}");
    assert!(drops(&counted).is_empty(), "{:?}", drops(&counted));
    assert_eq!(invalid(&bed), 0, "packets that conntrack found invalid");
}

#[test]
fn native_beside_netfilter_rules_conntrack_finds_nothing_invalid() {
    conntrack_sees_both_directions_or_neither(Mode::Native);
}

#[test]
fn generic_beside_netfilter_rules_conntrack_finds_nothing_invalid() {
    conntrack_sees_both_directions_or_neither(Mode::Generic);
}
