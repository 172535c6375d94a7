//! Laws of attaching, on veth pairs in network namespaces. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod node;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode};
use node::{Node, in_namespace, sh};
use sluice::attach::{Attacher, OBJECT, Obstacle, Role, Rung, link_pins, remove_pins};
use sluice::config::Mode;
use sluice::facts::ethtool;
use sluice::facts::kernel::{Kernel, Link};
use sluice::netlink::Netlink;

fn link(name: &str) -> Link {
    let mut netlink = Netlink::open().unwrap();
    Kernel::read(&mut netlink).unwrap().link(name).unwrap().clone()
}

fn veth() {
    sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up");
}

/// Loads and attaches to `up0`.
fn start(node: &Node, mode: Mode) -> Attacher {
    let mut attacher = Attacher::load(&node.pin_dir, &node.maps()).unwrap();
    attacher.reconcile(&[(link("up0"), Role::Uplink)], |_| mode);
    attacher
}

fn link_id(node: &Node) -> (u32, u32) {
    let (path, _) = link_pins(&node.pin_dir)
        .into_iter()
        .find(|(p, _)| p.to_string_lossy().contains("xdp_node"))
        .unwrap();
    let info = FdLink::from(PinnedLink::from_pin(path).unwrap()).info().unwrap();
    (info.id(), info.program_id())
}

#[test]
fn auto_takes_native_on_veth_and_says_why_not_offload() {
    in_namespace(|node| {
        veth();
        let attacher = start(node, Mode::Auto);
        let attached = &attacher.interfaces()["up0"];
        assert_eq!(attached.mode, Rung::Native, "{attached:?}");
        assert!(attached.tc_ingress && attached.tc_egress);
        assert_eq!(attached.refusals.len(), 1);
        assert_eq!(attached.refusals[0].rung, "offload");
        let there = link("up0").xdp;
        assert_eq!((there.len(), there[0].1), (1, "native"));
    });
}

#[test]
fn programs_outlive_the_agent_and_the_next_one_takes_the_link_over() {
    in_namespace(|node| {
        veth();
        drop(start(node, Mode::Auto));
        let (id, program) = link_id(node);
        assert_eq!(link("up0").xdp, [(program, "native")]);
        let attacher = start(node, Mode::Auto);
        let (id_after, program_after) = link_id(node);
        assert_eq!(id, id_after, "a new link was made");
        assert_ne!(program, program_after, "the program was not replaced");
        assert_eq!(link("up0").xdp, [(program_after, "native")]);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx("up0", side).unwrap();
            assert_eq!(programs.len(), 1, "{side:?}");
        }
    });
}

#[test]
fn forced_mode_is_obeyed_and_a_changed_one_moves_the_link() {
    in_namespace(|node| {
        veth();
        let mut attacher = start(node, Mode::Generic);
        assert_eq!(link("up0").xdp[0].1, "generic");
        attacher.reconcile(&[(link("up0"), Role::Uplink)], |_| Mode::Native);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
        assert_eq!(link("up0").xdp[0].1, "native");
        drop(attacher);
        let attacher = start(node, Mode::Generic);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Generic);
        assert_eq!(link("up0").xdp[0].1, "generic");
    });
}

/// The pinned links of `up0` by program.
fn programs_of_up0(node: &Node) -> Vec<String> {
    let mut names: Vec<String> = link_pins(&node.pin_dir)
        .into_iter()
        .filter_map(|(path, _)| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some(name.strip_prefix("link-")?.strip_suffix("-up0")?.to_owned())
        })
        .collect();
    names.sort();
    names
}

#[test]
fn tc_mode_has_one_program_at_ingress_and_no_xdp() {
    in_namespace(|node| {
        veth();
        let mut attacher = start(node, Mode::Native);
        assert_eq!(programs_of_up0(node), ["tc_egress", "tc_uplink", "xdp_node"]);
        let wanted = [(link("up0"), Role::Uplink)];
        attacher.reconcile(&wanted, |_| Mode::Tc);
        let attached = &attacher.interfaces()["up0"];
        assert_eq!(attached.mode, Rung::Tc, "{attached:?}");
        assert!(attached.tc_ingress && attached.tc_egress && attached.refusals.is_empty());
        assert!(link("up0").xdp.is_empty());
        assert_eq!(programs_of_up0(node), ["tc_egress", "tc_node"]);
        attacher.reconcile(&wanted, |_| Mode::Native);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
        assert_eq!(programs_of_up0(node), ["tc_egress", "tc_uplink", "xdp_node"]);
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx("up0", side).unwrap();
            assert_eq!(programs.len(), 1, "{side:?}");
        }
    });
}

#[test]
fn tc_links_outlive_the_agent_are_taken_over_and_go_with_cleanup() {
    in_namespace(|node| {
        veth();
        let ingress = || {
            let (_, programs) = SchedClassifier::query_tcx("up0", TcAttachType::Ingress).unwrap();
            let [program] = programs.as_slice() else { panic!("{} programs", programs.len()) };
            let (path, _) = link_pins(&node.pin_dir)
                .into_iter()
                .find(|(p, _)| p.to_string_lossy().contains("tc_node"))
                .unwrap();
            let link = FdLink::from(PinnedLink::from_pin(path).unwrap()).info().unwrap();
            assert_eq!(link.program_id(), program.id());
            (link.id(), program.id())
        };
        drop(start(node, Mode::Tc));
        let (link_before, program_before) = ingress();
        let attacher = start(node, Mode::Tc);
        let (link_after, program_after) = ingress();
        assert_eq!(link_before, link_after, "a new link was made");
        assert_ne!(program_before, program_after, "the program was not replaced");
        drop(attacher);
        remove_pins(&node.pin_dir).unwrap();
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx("up0", side).unwrap();
            assert!(programs.is_empty(), "{side:?}");
        }
    });
}

#[test]
fn obstacle_takes_xdp_off_and_its_end_puts_it_back() {
    in_namespace(|node| {
        veth();
        let wanted = [(link("up0"), Role::Uplink)];
        for (mode, without_xdp) in [(Mode::Auto, Rung::Tc), (Mode::Native, Rung::None)] {
            let mut attacher = start(node, mode);
            assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
            let obstacle = Obstacle { reason: "in the way".into(), remedy: "go round".into() };
            let obstacles = std::collections::BTreeMap::from([("up0".to_owned(), obstacle)]);
            for _ in 0..2 {
                attacher.set_obstacles(obstacles.clone());
                attacher.reconcile(&wanted, |_| mode);
                let attached = &attacher.interfaces()["up0"];
                assert_eq!(attached.mode, without_xdp, "{attached:?}");
                let [refusal] = attached.refusals.as_slice() else { panic!("{attached:?}") };
                assert_eq!((&*refusal.rung, &*refusal.reason), ("native", "in the way"));
                assert!(link("up0").xdp.is_empty());
            }
            attacher.set_obstacles(Default::default());
            attacher.reconcile(&wanted, |_| mode);
            assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
            assert_eq!(link("up0").xdp.len(), 1);
        }
    });
}

#[test]
fn forced_offload_attaches_nothing_and_says_why() {
    in_namespace(|node| {
        veth();
        let attacher = start(node, Mode::Offload);
        let attached = &attacher.interfaces()["up0"];
        assert_eq!(attached.mode, Rung::None);
        assert!(!attached.refusals[0].reason.is_empty());
        assert!(link("up0").xdp.is_empty());
        assert!(link_pins(&node.pin_dir).is_empty());
    });
}

#[test]
fn jumbo_mtu_is_native_with_programs_for_frames_in_several_buffers() {
    in_namespace(|node| {
        sh("ip link add up0 mtu 9000 type veth peer name up1 mtu 9000; ip link set up0 up");
        let attacher = start(node, Mode::Native);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
    });
}

/// As on kernels before 5.18, whose programs take frames in one buffer.
#[test]
fn mtu_above_one_buffer_falls_to_generic_with_the_reason() {
    in_namespace(|node| {
        sh("ip link add up0 mtu 9000 type veth peer name up1 mtu 9000; ip link set up0 up");
        let mut attacher = Attacher::load_as(&node.pin_dir, &node.maps(), false).unwrap();
        attacher.reconcile(&[(link("up0"), Role::Uplink)], |_| Mode::Auto);
        let attached = &attacher.interfaces()["up0"];
        assert_eq!(attached.mode, Rung::Generic, "{attached:?}");
        let native = attached.refusals.iter().find(|r| r.rung == "native").unwrap();
        assert_eq!(native.errno, 34);
        for word in ["9000", "3506", "veth", "5.18"] {
            assert!(native.reason.contains(word), "{native:?}");
        }
        assert!(native.remedy.contains("mtu 3506"), "{native:?}");
    });
}

#[test]
fn device_says_what_it_can_and_which_driver_it_has() {
    in_namespace(|_| {
        sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up");
        let features = link("up0").xdp_features.unwrap();
        assert!(features.rx_frags() && !features.xmit(), "{features:?}");
        sh("ethtool -K up1 gro on");
        let features = link("up0").xdp_features.unwrap();
        assert!(features.xmit() && features.xmit_frags(), "{features:?}");
        assert_eq!(ethtool::driver("up0").as_deref(), Ok("veth"));
        assert_eq!(ethtool::tx_checksum("up0"), Ok(true));
        sh("ethtool -K up0 tx off");
        assert_eq!(ethtool::tx_checksum("up0"), Ok(false));
        assert!(ethtool::driver("up7").is_err());
    });
}

/// What generic mode and native mode load must not share a map of programs.
#[test]
fn native_and_generic_uplinks_at_once() {
    in_namespace(|node| {
        veth();
        sh("ip link add up2 type veth peer name up3; ip link set up2 up; ip link set up3 up");
        let uplinks = [(link("up0"), Role::Uplink), (link("up2"), Role::Uplink)];
        let mode = |name: &str| if name == "up0" { Mode::Native } else { Mode::Generic };
        let mut attacher = Attacher::load(&node.pin_dir, &node.maps()).unwrap();
        attacher.reconcile(&uplinks, mode);
        assert_eq!(link("up0").xdp[0].1, "native", "{:?}", attacher.interfaces());
        assert_eq!(link("up2").xdp[0].1, "generic", "{:?}", attacher.interfaces());
        assert_ne!(link("up0").xdp[0].0, link("up2").xdp[0].0);
        // What is there is what belongs there.
        let before = (link("up0").xdp, link("up2").xdp);
        let uplinks = [(link("up0"), Role::Uplink), (link("up2"), Role::Uplink)];
        attacher.reconcile(&uplinks, mode);
        assert_eq!((link("up0").xdp, link("up2").xdp), before);
        drop(attacher);
        remove_pins(&node.pin_dir).unwrap();
        assert_eq!(std::fs::read_dir(&node.pin_dir).unwrap().count(), 0);
    });
}

#[test]
fn foreign_program_is_named_and_left_alone() {
    in_namespace(|node| {
        veth();
        let mut ebpf = foreign();
        let program: &mut Xdp = ebpf.program_mut("xdp_pass").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach("up0", XdpMode::Driver).unwrap();
        let there = link("up0").xdp;
        let attacher = start(node, Mode::Auto);
        let attached = attacher.interfaces()["up0"].clone();
        assert_eq!(attached.mode, Rung::Tc, "{attached:?}");
        let native = attached.refusals.iter().find(|r| r.rung == "native").unwrap();
        assert_eq!(native.errno, 16);
        assert!(native.reason.contains("xdp_pass"), "{}", native.reason);
        assert!(native.reason.contains(&there[0].0.to_string()), "{}", native.reason);
        assert!(attached.refusals.iter().any(|r| r.rung == "generic" && r.errno == 17));
        drop(attacher);
        remove_pins(&node.pin_dir).unwrap();
        assert_eq!(link("up0").xdp, there, "the foreign program was touched");
    });
}

/// Maps of the object without pins, for a program that is not ours.
fn foreign() -> aya::Ebpf {
    let mut loader = aya::EbpfLoader::new();
    for name in sluice_abi::maps::ALL {
        if name == sluice_abi::maps::MAGLEV || name == sluice_abi::maps::FLOW {
            loader.map_max_entries(name, 4);
        }
    }
    loader.load(OBJECT).unwrap()
}

#[test]
fn cleanup_removes_ours_and_leaves_foreign_tc_programs() {
    in_namespace(|node| {
        veth();
        let mut ebpf = foreign();
        let program: &mut SchedClassifier =
            ebpf.program_mut("tc_egress").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach("up0", TcAttachType::Ingress).unwrap();
        drop(start(node, Mode::Auto));
        let count = || SchedClassifier::query_tcx("up0", TcAttachType::Ingress).unwrap().1.len();
        assert_eq!(count(), 2);
        let removed = remove_pins(&node.pin_dir).unwrap();
        assert!(removed.len() > 16, "{removed:?}");
        assert_eq!(count(), 1);
        assert!(link("up0").xdp.is_empty());
        assert_eq!(std::fs::read_dir(&node.pin_dir).unwrap().count(), 0);
    });
}

#[test]
fn interface_that_came_back_is_attached_to_anew() {
    in_namespace(|node| {
        veth();
        let mut attacher = start(node, Mode::Auto);
        let first = link("up0").ifindex;
        sh("ip link del up0");
        veth();
        assert_ne!(first, link("up0").ifindex);
        assert!(link("up0").xdp.is_empty());
        attacher.reconcile(&[(link("up0"), Role::Uplink)], |_| Mode::Auto);
        assert_eq!(link("up0").xdp.len(), 1, "{:?}", attacher.interfaces());
        // And while no agent was there.
        drop(attacher);
        sh("ip link del up0");
        veth();
        let attacher = start(node, Mode::Auto);
        assert_eq!(attacher.interfaces()["up0"].mode, Rung::Native);
        assert_eq!(link("up0").xdp.len(), 1);
        let (_, programs) = SchedClassifier::query_tcx("up0", TcAttachType::Egress).unwrap();
        assert_eq!(programs.len(), 1);
    });
}

#[test]
fn lost_link_is_renewed() {
    in_namespace(|node| {
        veth();
        let mut attacher = start(node, Mode::Auto);
        let (path, _) = link_pins(&node.pin_dir)
            .into_iter()
            .find(|(p, _)| p.to_string_lossy().contains("xdp_node"))
            .unwrap();
        sh(&format!("bpftool link detach pinned {}", path.display()));
        assert!(link("up0").xdp.is_empty());
        attacher.reconcile(&[(link("up0"), Role::Uplink)], |_| Mode::Auto);
        assert_eq!(link("up0").xdp.len(), 1);
    });
}

#[test]
fn interface_that_is_no_longer_wanted_is_let_go() {
    in_namespace(|node| {
        veth();
        sh("ip link add up.2 type veth peer name up3; ip link set up.2 up");
        let mut attacher = Attacher::load(&node.pin_dir, &node.maps()).unwrap();
        let both = [(link("up0"), Role::Uplink), (link("up.2"), Role::Pod)];
        attacher.reconcile(&both, |_| Mode::Auto);
        assert_eq!(attacher.interfaces()["up.2"].mode, Rung::Tc);
        assert!(attacher.takes_replies(&link("up.2")));
        attacher.reconcile(&both[..1], |_| Mode::Auto);
        assert!(link_pins(&node.pin_dir).iter().all(|(_, name)| name == "up0"));
        let (_, programs) = SchedClassifier::query_tcx("up.2", TcAttachType::Ingress).unwrap();
        assert!(programs.is_empty());
    });
}

#[test]
fn pinned_map_of_another_size_is_refused_with_a_remedy() {
    in_namespace(|node| {
        drop(Attacher::load(&node.pin_dir, &node.maps()).unwrap());
        let mut other = node.maps();
        other.flow_sets = 8;
        let text = match Attacher::load(&node.pin_dir, &other) {
            Ok(_) => panic!("a map of another size was taken"),
            Err(e) => e.to_string(),
        };
        // Four and eight sets of the flow table, and one of the flood guard.
        assert!(
            text.contains("sl_flow_v1") && text.contains(" 5,") && text.contains(" 9;"),
            "{text}"
        );
        assert!(text.contains("sluice cleanup"), "{text}");
        drop(Attacher::load(&node.pin_dir, &node.maps()).unwrap());
    });
}

#[test]
fn clock_of_the_kernel_runs() {
    in_namespace(|node| {
        let mut attacher = Attacher::load(&node.pin_dir, &node.maps()).unwrap();
        let first = attacher.jiffies().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let second = sluice::attach::pinned_jiffies(&node.pin_dir).unwrap();
        let ticks = second.wrapping_sub(first) & 0x7fff_ffff;
        // 100 to 1000 ticks a second, and a machine may be slow but not that slow.
        assert!((9..60_000).contains(&ticks), "{ticks}");
    });
}
