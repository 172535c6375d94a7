//! Facts read from a node that is set up as Flannel does it. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "one harness for several suites")]
mod node;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::{Child, Command};

use node::{in_namespace, sh};
use sluice::config::Config;
use sluice::facts::kernel::{Kernel, Link};
use sluice::facts::{Collector, Hidden, PodEnd, PodEnds, Tags, netfilter_rules, own_macs};
use sluice::netlink::Netlink;
use sluice_abi::Mac;
use sluice_control::Snapshot;
use sluice_control::model::NextHopFacts;

/// A namespace that lives as long as its process.
struct Pod(Child);

impl Pod {
    fn new() -> Self {
        let child = Command::new("unshare").args(["-n", "sleep", "600"]).spawn().unwrap();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let path = format!("/proc/{}/ns/net", child.id());
        while std::fs::read_link(&path).is_ok_and(|n| n == own) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Self(child)
    }

    fn sh(&self, command: &str) {
        sh(&format!("nsenter -t {} -n sh -ec '{command}'", self.0.id()));
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn config(text: &str) -> Config {
    Config::parse(text, std::path::Path::new("test")).unwrap()
}

#[test]
fn flannel_setup_is_read_as_tunnels_and_peers() {
    in_namespace(|_| {
        sh("ip link add up0 type veth peer name far; ip link set up0 up; ip link set far up
            ip addr add 192.168.9.1/24 dev up0
            ip link add flannel.1 address 0a:00:00:00:00:01 type vxlan id 1 local 192.168.9.1 dev up0 dstport 8472 nolearning
            ip addr add 10.244.1.0/32 dev flannel.1; ip link set flannel.1 up
            ip route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink
            ip neigh add 10.244.2.0 lladdr 0a:00:00:00:00:02 dev flannel.1 nud permanent
            bridge fdb add 0a:00:00:00:00:02 dev flannel.1 dst 192.168.9.2
            ip route add 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink
            ip link add ext0 type vxlan external dstport 4790");
        let mut collector = Collector::new().unwrap();
        let config = config("[datapath]\nuplinks = ['up*']");
        let facts = collector.read(&config, &Snapshot::default()).unwrap();
        let names: Vec<_> = facts.uplinks.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["up0"]);
        let [tunnel] = facts.context.tunnels.as_slice() else {
            panic!("{:?}", facts.context.tunnels);
        };
        assert_eq!((tunnel.vni, tunnel.port), (1, 8472));
        assert_eq!(tunnel.underlay.to_string(), "192.168.9.1");
        assert_eq!(tunnel.inner_v4.unwrap().to_string(), "10.244.1.0");
        let [peer] = facts.context.peers.as_slice() else {
            panic!("{:?}", facts.context.peers);
        };
        assert_eq!(peer.remote.to_string(), "192.168.9.2");
        assert_eq!(peer.mac.to_string(), "0a:00:00:00:00:02");
        assert_eq!(peer.pod_cidrs[0].to_string(), "10.244.2.0/24");
        // A route without neighbour and FDB entry is no usable VTEP, and that is said.
        assert!(facts.notes.iter().any(|n| n.contains("10.244.3.0")), "{:?}", facts.notes);
        let own: IpAddr = "192.168.9.1".parse().unwrap();
        assert!(facts.context.node_port_addresses.contains(&own));
        assert!(!facts.context.node_port_addresses.contains(&"10.244.1.0".parse().unwrap()));
    });
}

#[test]
fn next_hop_is_asked_for_until_its_mac_is_known() {
    in_namespace(|_| {
        let peer = Pod::new();
        sh(&format!(
            "ip link add up0 address 02:00:00:00:00:01 type veth peer name eth0 netns {}
             ip link set up0 up; ip addr add 192.168.9.1/24 dev up0
             ip route add 10.9.0.0/16 via 192.168.9.2",
            peer.0.id()
        ));
        peer.sh("ip link set eth0 address 02:00:00:00:00:02; ip link set eth0 up; ip addr add 192.168.9.2/24 dev eth0");
        let mut collector = Collector::new().unwrap();
        let config = config("[datapath]\nuplinks = ['up*']");
        let wanted: BTreeSet<IpAddr> =
            ["192.168.9.2", "10.9.1.1", "192.168.9.77", "172.16.0.1", "127.0.0.1"]
                .map(|a| a.parse().unwrap())
                .into();
        let mut hops = Default::default();
        for _ in 0..500 {
            let facts = collector.read(&config, &Snapshot::default()).unwrap();
            hops = collector.next_hops(&facts.kernel, &wanted);
            if matches!(hops.get(&"10.9.1.1".parse().unwrap()), Some(NextHopFacts::Resolved { .. }))
            {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for through_the_peer in ["192.168.9.2", "10.9.1.1"] {
            match hops[&through_the_peer.parse::<IpAddr>().unwrap()] {
                NextHopFacts::Resolved { mtu, dst_mac, src_mac, .. } => {
                    assert_eq!(dst_mac.to_string(), "02:00:00:00:00:02");
                    assert_eq!(src_mac.to_string(), "02:00:00:00:00:01");
                    assert_eq!(mtu, 1500);
                }
                NextHopFacts::Unresolved {} => panic!("{through_the_peer} is not resolved"),
            }
        }
        assert_eq!(hops[&"192.168.9.77".parse::<IpAddr>().unwrap()], NextHopFacts::Unresolved {});
        assert!(!hops.contains_key(&"172.16.0.1".parse().unwrap()), "no route, no next hop");
        assert!(!hops.contains_key(&"127.0.0.1".parse().unwrap()), "own addresses have none");
    });
}

#[test]
fn redirect_needs_gro_or_xdp_at_the_pods_end() {
    in_namespace(|_| {
        let pod = Pod::new();
        sh(&format!(
            "ip link add host0 type veth peer name eth0 netns {}; ip link set host0 up
             ip link add here0 type veth peer name here1",
            pod.0.id()
        ));
        pod.sh("ip link set eth0 address 02:00:00:00:00:07; ip link set eth0 up; ethtool -K eth0 gro off");
        let mut netlink = Netlink::open().unwrap();
        let kernel = sluice::facts::kernel::Kernel::read(&mut netlink).unwrap();
        let (host, here) = (kernel.link("host0").unwrap(), kernel.link("here0").unwrap());
        let mut look = || PodEnds::default().inspect(&mut netlink, &[host, here]);
        let ends = look();
        match &ends[&host.ifindex] {
            PodEnd::Deaf { mac, reason, .. } => {
                assert_eq!(mac.to_string(), "02:00:00:00:00:07");
                assert!(reason.contains("gro on"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(ends[&here.ifindex], PodEnd::Unknown(_)), "no pod behind it");
        pod.sh("ethtool -K eth0 gro on");
        assert!(matches!(look()[&host.ifindex], PodEnd::Receives { .. }));
    });
}

/// veth takes no redirected frame that is larger than the MTU of the other end (drivers/net/veth.c).
#[test]
fn pods_mtu_is_the_smaller_one_of_both_ends() {
    in_namespace(|_| {
        let pod = Pod::new();
        sh(&format!(
            "ip link add host0 type veth peer name eth0 netns {}; ip link set host0 up
             ip route add 10.244.1.7 dev host0",
            pod.0.id()
        ));
        pod.sh("ip link set eth0 up");
        let config = config("[datapath]\nuplinks = ['up*']");
        let address: IpAddr = "10.244.1.7".parse().unwrap();
        for (host, end, expected) in [(1500, 1400, 1400), (1300, 1400, 1300), (1500, 1500, 1500)] {
            sh(&format!("ip link set host0 mtu {host}"));
            pod.sh(&format!("ip link set eth0 mtu {end}"));
            let facts = Collector::new().unwrap().read(&config, &Snapshot::default()).unwrap();
            assert_eq!(facts.context.pods[&address].mtu, expected, "{host} and {end}");
        }
    });
}

#[test]
fn netfilter_rules_on_the_way_are_found() {
    in_namespace(|_| {
        // Legacy tables of the machine are not seen in a new namespace.
        assert_eq!(netfilter_rules(), None);
        sh(
            "nft add table inet t; nft 'add chain inet t in { type filter hook input priority 0; }'; nft add rule inet t in accept",
        );
        assert_eq!(netfilter_rules(), None, "input is not on the way to a pod");
        sh("nft 'add chain inet t passing { type filter hook forward priority 0; }'");
        assert_eq!(netfilter_rules(), None, "a chain without rules skips nothing");
        sh("nft add rule inet t passing tcp dport 80 drop");
        let found = netfilter_rules().unwrap();
        assert!(found.contains("passing"), "{found}");
    });
}

/// Commands that would show the tags.
fn hidden(kernel: &Kernel, uplink: &Link) -> Vec<String> {
    let mut netlink = Netlink::open().unwrap();
    let found = Tags::default().hidden(&mut netlink, kernel, uplink);
    found.iter().map(Hidden::command).collect()
}

fn kernel() -> Kernel {
    Kernel::read(&mut Netlink::open().unwrap()).unwrap()
}

/// What a veth's other end sends with the tag beside the frame has none for XDP.
#[test]
fn tags_are_hidden_by_the_sending_end_of_a_veth() {
    in_namespace(|_| {
        let pod = Pod::new();
        sh(&format!(
            "ip link add up0 type veth peer name far; ip link set up0 up
             ip link add up1 type veth peer name eth0 netns {}; ip link set up1 up",
            pod.0.id()
        ));
        let kernel = kernel();
        let (up0, up1) = (kernel.link("up0").unwrap(), kernel.link("up1").unwrap());
        let of = |device: &str, uplink: &str| {
            format!(
                "ethtool -K {device} txvlan off tx-vlan-stag-hw-insert off, at the other end of {uplink}"
            )
        };
        assert_eq!(hidden(&kernel, up0), [of("far", "up0")]);
        assert_eq!(hidden(&kernel, up1), [of("eth0", "up1")]);
        sh("ethtool -K up0 rxvlan off txvlan off");
        assert_eq!(hidden(&kernel, up0), [of("far", "up0")], "only the sending end counts");
        sh("ethtool -K far txvlan off tx-vlan-stag-hw-insert off");
        assert_eq!(hidden(&kernel, up0), Vec::<String>::new());

        // The end in the other namespace is switched there, and on again.
        let mut netlink = Netlink::open().unwrap();
        let mut tags = Tags::default();
        let [found] = tags.hidden(&mut netlink, &kernel, up1).try_into().unwrap();
        assert!(found.changeable && found.other_end, "{found:?}");
        tags.switch(&mut netlink, &kernel, &found, false).unwrap();
        assert_eq!(tags.hidden(&mut netlink, &kernel, up1), []);
        pod.sh("ethtool -k eth0 | grep -q \"tx-vlan-offload: off\"");
        tags.switch(&mut netlink, &kernel, &found, true).unwrap();
        pod.sh("ethtool -k eth0 | grep -q \"tx-vlan-offload: on\"");
        assert_eq!(tags.hidden(&mut netlink, &kernel, up1), [found]);
    });
}

/// A device without a kind is a NIC: it takes tags out itself.
#[test]
fn tags_are_hidden_by_a_nic_that_takes_them_out() {
    in_namespace(|_| {
        sh("ip link add up0 type veth peer name far; ip link set up0 up");
        let kernel = kernel();
        let nic = Link { kind: String::new(), ..kernel.link("up0").unwrap().clone() };
        assert_eq!(hidden(&kernel, &nic), ["ethtool -K up0 rxvlan off rx-vlan-stag-hw-parse off"]);
        sh("ethtool -K up0 rxvlan off");
        let mut netlink = Netlink::open().unwrap();
        let mut tags = Tags::default();
        let [stag] = tags.hidden(&mut netlink, &kernel, &nic).try_into().unwrap();
        assert_eq!(stag.command(), "ethtool -K up0 rx-vlan-stag-hw-parse off");
        tags.switch(&mut netlink, &kernel, &stag, false).unwrap();
        assert_eq!(tags.hidden(&mut netlink, &kernel, &nic), []);
        tags.switch(&mut netlink, &kernel, &stag, true).unwrap();
        assert_eq!(tags.hidden(&mut netlink, &kernel, &nic), [stag]);
        let bond = Link { kind: "bond".to_owned(), ifindex: 99, ..nic.clone() };
        assert_eq!(hidden(&kernel, &bond), Vec::<String>::new(), "a bond without ports");
        let mut with_port = kernel.clone();
        with_port.links.get_mut(&nic.ifindex).unwrap().controller = Some(99);
        assert_eq!(hidden(&with_port, &bond), ["ethtool -K up0 rx-vlan-stag-hw-parse off"]);
    });
}

#[test]
fn devices_that_stand_on_an_uplink_receive_its_frames() {
    let mac = |n: u8| Mac([2, 0, 0, 0, 0, n]);
    let link = |ifindex: u32, below, controller| Link {
        ifindex,
        mac: mac(ifindex as u8),
        below,
        controller,
        ..Link::default()
    };
    let mut kernel = Kernel::default();
    for link in [
        // A port of bridge 2, on which a macvlan stands; a VLAN on the port, and one on that.
        link(1, None, Some(2)),
        link(2, None, None),
        link(3, Some(2), None),
        link(4, Some(1), None),
        link(5, Some(4), None),
        // Another uplink, and what has no link-layer address.
        link(6, None, None),
        Link { mac: Mac::default(), ..link(7, None, None) },
    ] {
        kernel.links.insert(link.ifindex, link);
    }
    let uplinks: Vec<Link> = [1, 6, 7].map(|i: u32| kernel.links[&i].clone()).into();
    let of_port = (1..=5).map(|n| (1, mac(n)));
    let expected: Vec<(u32, Mac)> = of_port.chain([(6, mac(6)), (7, Mac::default())]).collect();
    assert_eq!(own_macs(&kernel, &uplinks), expected);
}
