//! The lab against the real kernel: it comes up, carries traffic without any code of ours in its
//! way, and leaves nothing behind, however it ends. Needs root.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sluice_lab::plan::UPLINK;
use sluice_lab::preflight::{self, Finding};
use sluice_lab::probe::{self, FrameSocket, Packet, Transport};
use sluice_lab::serve::Answer;
use sluice_lab::{Family, Lab, LabContext, LabName, LabSpec, Netns, RpFilter, clean, clean_stale};

/// A context with directories of its own, so that tests see only their own labs.
fn context() -> (LabContext, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = PathBuf::from(env!("CARGO_BIN_EXE_sluice-lab"));
    let context = LabContext { run_root: dir.path().join("lab"), ..LabContext::new(program) };
    let missing = preflight::check(&context);
    assert!(missing.is_empty(), "this machine cannot run the lab: {}", Finding::lines(&missing));
    (context, dir)
}

fn name(text: &str) -> LabName {
    text.parse().expect("legal")
}

fn named(text: &str) -> LabSpec {
    LabSpec { name: Some(name(text)), ..LabSpec::kernel_only(2, 1) }
}

/// What of a lab can be seen from outside of it.
fn traces(context: &LabContext, lab: &str) -> Vec<String> {
    let mut found: Vec<String> = Netns::with_prefix(&format!("slab-{lab}-"))
        .iter()
        .map(|netns| format!("namespace {}", netns.name()))
        .collect();
    for dir in [context.lab_dir(lab), context.pin_root(lab)] {
        if dir.exists() {
            found.push(format!("directory {}", dir.display()));
        }
    }
    found.extend(serving(lab).into_iter().map(|pid| format!("process {pid}")));
    found
}

/// Processes whose command line or network namespace is of the lab.
fn serving(lab: &str) -> BTreeSet<i32> {
    let identities: Vec<_> =
        Netns::with_prefix(&format!("slab-{lab}-")).iter().filter_map(Netns::identity).collect();
    sluice_lab::process::inside(&identities).into_iter().map(|id| id.pid).collect()
}

fn links() -> BTreeSet<String> {
    fs::read_dir("/sys/class/net")
        .expect("sysfs")
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn is_running(pid: i32) -> bool {
    sluice_lab::process::ProcessId::of(pid).is_some_and(|id| id.is_alive())
}

#[test]
fn down_leaves_nothing_behind() {
    let (context, _dir) = context();
    let links_before = links();
    let lab = Lab::up(&context, &named("tdown")).expect("up");
    let pids = serving("tdown");
    assert_eq!(pids.len(), 2, "one server per pod");
    assert!(traces(&context, "tdown").len() >= 8, "{:?}", traces(&context, "tdown"));
    lab.make_pin_dir("node1").expect("a pin directory");
    assert_eq!(links(), links_before, "a lab makes no device outside its namespaces");
    lab.down().expect("down");
    assert_eq!(traces(&context, "tdown"), Vec::<String>::new());
    assert!(pids.iter().all(|pid| !is_running(*pid)), "{pids:?}");
    assert_eq!(links(), links_before);
}

#[test]
fn drop_removes_the_lab() {
    let (context, _dir) = context();
    drop(Lab::up(&context, &named("tdrop")).expect("up"));
    assert_eq!(traces(&context, "tdrop"), Vec::<String>::new());
}

#[test]
fn a_failed_up_removes_what_it_made() {
    let (context, _dir) = context();
    let mut spec = named("tfail");
    // Two servers on one port: the second cannot listen, after everything else stands.
    if let Some(pod) = spec.nodes.first_mut().and_then(|node| node.pods.first_mut()) {
        pod.tcp_ports = vec![8080, 8080];
    }
    let error = Lab::up(&context, &spec).expect_err("port 8080 twice");
    assert!(error.to_string().contains("pod1-1"), "{error}");
    assert_eq!(traces(&context, "tfail"), Vec::<String>::new());
}

#[test]
fn a_name_in_use_is_refused_and_its_lab_stays() {
    let (context, _dir) = context();
    let first = Lab::up(&context, &named("ttwice")).expect("up");
    let error = Lab::up(&context, &named("ttwice")).expect_err("the name is taken");
    assert!(error.to_string().contains("ttwice"), "{error}");
    ping(&first, "pod1-1", &first.plan().nodes[1].pods[0].v4.to_string(), 56);
}

#[test]
fn two_labs_at_once_do_not_meet() {
    let (context, _dir) = context();
    let spec = LabSpec::kernel_only(2, 1);
    let one = Lab::up(&context, &spec).expect("up");
    let two = Lab::up(&context, &spec).expect("up");
    assert_ne!(one.name(), two.name());
    for lab in [&one, &two] {
        let answer = get(lab, "client", "http://10.244.1.11:8080/");
        assert!(answer.is_none(), "the client has no route to pods");
        ping(lab, "pod1-1", "10.244.2.11", 56);
    }
    let gone = one.name().to_string();
    one.down().expect("down");
    assert_eq!(traces(&context, &gone), Vec::<String>::new());
    ping(&two, "pod1-1", "10.244.2.11", 56);
    assert!(get(&two, "pod1-1", "http://10.244.2.11:8080/").is_some());
}

#[test]
fn pods_reach_each_other_over_the_kernels_own_vxlan() {
    let (context, _dir) = context();
    for underlay in [Family::V4, Family::V6] {
        for rp_filter in [RpFilter::Off, RpFilter::Strict] {
            let spec = LabSpec { underlay, rp_filter, ..LabSpec::kernel_only(3, 1) };
            let lab = Lab::up(&context, &spec).expect("up");
            let mtu = usize::from(sluice_lab::plan::pod_mtu(underlay));
            for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 1)] {
                let (from, to) = (&lab.plan().nodes[from].pods[0], &lab.plan().nodes[to].pods[0]);
                // The largest that fits: the MTU less the IP and the ICMP header.
                ping(&lab, &from.name, &to.v4.to_string(), mtu - 28);
                ping(&lab, &from.name, &to.v6.to_string(), mtu - 48);
            }
            let value = lab
                .host("node1")
                .and_then(|node| node.run("sysctl", &["-n", "net.ipv4.conf.uplink0.rp_filter"]));
            assert_eq!(value.expect("sysctl").trim(), rp_filter.as_str());
        }
    }
}

#[test]
fn tunnel_settings_reach_the_wire() {
    let (context, _dir) = context();
    let spec = LabSpec { vni: 0xabcdef, vxlan_port: 4789, ..LabSpec::kernel_only(2, 1) };
    let lab = Lab::up(&context, &spec).expect("up");
    ping(&lab, "pod1-1", "10.244.2.11", 56);
    let shown = lab.host("node1").expect("node1").run("ip", &["-d", "link", "show", "vxlan1"]);
    let shown = shown.expect("ip link");
    assert!(shown.contains("vxlan id 11259375") && shown.contains("dstport 4789"), "{shown}");
}

#[test]
fn fabric_ports_carry_a_native_program() {
    let (context, _dir) = context();
    let shown = |fabric_xdp| {
        let lab = Lab::up(&context, &LabSpec { fabric_xdp, ..LabSpec::kernel_only(2, 1) });
        let fabric = lab.as_ref().expect("up").host("fabric").expect("fabric");
        fabric.run("ip", &["link", "show", "to-node1"]).expect("ip link")
    };
    assert!(shown(true).contains("prog/xdp id"), "{}", shown(true));
    assert!(!shown(false).contains("prog/xdp"));
}

#[test]
fn servers_answer_curl_and_echo_in_both_families() {
    let (context, _dir) = context();
    let lab = Lab::up(&context, &LabSpec::kernel_only(2, 1)).expect("up");
    let (from, to) = (&lab.plan().nodes[0].pods[0], &lab.plan().nodes[1].pods[0]);
    for (client, server, host) in [
        (from.address(Family::V4), to.address(Family::V4), to.v4.to_string()),
        (from.address(Family::V6), to.address(Family::V6), format!("[{}]", to.v6)),
    ] {
        let answer = get(&lab, &from.name, &format!("http://{host}:8080/some/path?x=1"));
        let answer = answer.expect("an answer");
        assert_eq!((answer.pod.as_str(), answer.node.as_str()), ("pod2-1", "node2"));
        assert_eq!((answer.client, answer.local), (client, server));
        assert_eq!(answer.path, "/some/path?x=1");

        let body = lab.host(&from.name).and_then(|pod| {
            pod.run(
                "curl",
                &[
                    "-sf",
                    "-m",
                    "10",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{size_download}",
                    &format!("http://{host}:8080/bytes/3000001"),
                ],
            )
        });
        assert_eq!(body.expect("curl"), "3000001");

        let echoed = lab.host(&from.name).expect("pod").netns.enter(|| {
            let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = std::net::UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            socket.send_to(b"hello", (server, 5353))?;
            let mut buffer = [0; 64];
            let (len, peer) = socket.recv_from(&mut buffer)?;
            assert_eq!(peer.ip(), server);
            Ok::<_, std::io::Error>(buffer[..len].to_vec())
        });
        assert_eq!(echoed.expect("namespace").expect("echo"), b"pod2-1 hello");
    }
}

#[test]
fn a_killed_makers_lab_is_removed_by_name_and_as_stale() {
    let (context, _dir) = context();
    for (lab, by_name) in [("tcrash1", true), ("tcrash2", false)] {
        let mut maker = maker(&context, lab);
        let pids = serving(lab);
        assert_eq!(pids.len(), 2);
        maker.kill().expect("SIGKILL");
        maker.wait().expect("it ends");
        assert!(!traces(&context, lab).is_empty(), "nobody was there to clean up");
        if by_name {
            clean(&context, &name(lab)).expect("clean");
        } else {
            assert_eq!(clean_stale(&context).expect("clean"), [lab]);
        }
        assert_eq!(traces(&context, lab), Vec::<String>::new());
        assert!(pids.iter().all(|pid| !is_running(*pid)), "{pids:?}");
    }
}

#[test]
fn a_lab_without_its_state_file_is_removed_by_its_prefix() {
    let (context, _dir) = context();
    let mut maker = maker(&context, "tlost");
    let pids = serving("tlost");
    maker.kill().expect("SIGKILL");
    maker.wait().expect("it ends");
    fs::remove_dir_all(context.lab_dir("tlost")).expect("remove");
    clean(&context, &name("tlost")).expect("clean");
    assert_eq!(traces(&context, "tlost"), Vec::<String>::new());
    assert!(pids.iter().all(|pid| !is_running(*pid)), "{pids:?}");
}

#[test]
fn up_replaces_what_a_dead_maker_left_under_its_name() {
    let (context, _dir) = context();
    let mut maker = maker(&context, "tagain");
    maker.kill().expect("SIGKILL");
    maker.wait().expect("it ends");
    let lab = Lab::up(&context, &named("tagain")).expect("up");
    ping(&lab, "pod1-1", "10.244.2.11", 56);
}

#[test]
fn a_lab_in_use_is_not_stale() {
    let (context, _dir) = context();
    let lab = Lab::up(&context, &named("tused")).expect("up");
    assert_eq!(clean_stale(&context).expect("clean"), Vec::<String>::new());
    ping(&lab, "pod1-1", "10.244.2.11", 56);
}

#[test]
fn ctrl_c_removes_the_lab_at_any_moment() {
    let (context, _dir) = context();
    for delay_ms in [0, 5, 15, 30, 60, 100, 150] {
        let mut child = hold(&context, "tctrlc").spawn().expect("start");
        // Signals are taken before the directory is made.
        let start = Instant::now();
        while !context.lab_dir("tctrlc").exists() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay_ms));
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("small"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("signal");
        let status = child.wait().expect("it ends");
        assert!(status.code().is_some(), "after {delay_ms} ms: ended by the signal: {status}");
        assert_eq!(traces(&context, "tctrlc"), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

/// A program that makes a lab and holds it until it is ended.
fn hold(context: &LabContext, lab: &str) -> Command {
    let mut command = Command::new(&context.sluice);
    command
        .args(["lab", "up", "--agent", "none", "--pods", "1", "--hold", "--name", lab])
        .env("SLUICE_LAB_DIR", &context.run_root)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Starts such a program and waits until it says that the lab is complete.
fn maker(context: &LabContext, lab: &str) -> Child {
    let mut child = hold(context, lab).stderr(Stdio::piped()).spawn().expect("start");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("Ctrl-C"))), "lab {lab}");
    child
}

/// Three echo requests that must all be answered; `size` is the ICMP payload in bytes, sent with
/// fragmentation forbidden.
fn ping(lab: &Lab, from: &str, to: &str, size: usize) {
    let host = lab.host(from).expect("host");
    let size = size.to_string();
    let args = ["-c", "3", "-i", "0.02", "-W", "2", "-M", "do", "-s", &size, to];
    let printed = host.run("ping", &args);
    assert!(printed.is_ok_and(|text| text.contains(" 0% packet loss")), "{from} to {to}, {size}");
}

fn get(lab: &Lab, from: &str, url: &str) -> Option<Answer> {
    let host = lab.host(from).expect("host");
    let body = host.run("curl", &["-sf", "-g", "-m", "5", url]).ok()?;
    Some(serde_json::from_str(&body).expect("a JSON line"))
}

#[test]
fn frames_made_here_are_taken_by_the_kernel_and_its_answers_check() {
    let (context, _dir) = context();
    let lab = Lab::up(&context, &LabSpec::kernel_only(2, 1)).expect("up");
    let (node1, node2) = (&lab.plan().nodes[0], &lab.plan().nodes[1]);
    let pod = &node2.pods[0];
    let uplink = lab.host("node1").expect("node1").netns;
    // Frames of node1's tunnel, made by hand, for the kernel of node2 to take apart.
    let mut socket = FrameSocket::open(&uplink, UPLINK).expect("open");
    for family in [Family::V4, Family::V6] {
        let outer = Packet {
            source: node1.address_v4.into(),
            destination: node2.address_v4.into(),
            ttl: 64,
            transport: Transport::Udp { source: 50_000, destination: 8472, checksum: false },
            payload: Vec::new(),
        };
        let tunnel = match family {
            Family::V4 => node1.tunnel_v4().into(),
            Family::V6 => node1.tunnel_v6().into(),
        };
        let request = Packet {
            source: tunnel,
            destination: pod.address(family),
            ttl: 64,
            transport: Transport::udp(40_000, 5353),
            payload: b"by hand".to_vec(),
        };
        let inner = probe::frame(node1.vxlan_mac, node2.vxlan_mac, &request).expect("legal");
        let frame = probe::vxlan(node1.uplink_mac, node2.uplink_mac, &outer, 1, &inner);
        socket.send(&frame.expect("legal")).expect("send");
        let answer = |bytes: &[u8]| {
            let inner = probe::inspect(bytes, Some(8472)).ok()?.inner?.1;
            (inner.packet.source == request.destination).then_some(inner.packet)
        };
        let found = socket.receive(Duration::from_secs(5), |bytes| answer(bytes).is_some());
        let found = answer(&found.expect("receive").expect("an answer")).expect("checked");
        assert_eq!(found.transport, Transport::udp(5353, 40_000));
        assert_eq!(found.destination, request.source);
        assert_eq!(found.payload, b"pod2-1 by hand");
    }
}

#[test]
fn a_missing_right_is_named_with_its_remedy() {
    let (context, _dir) = context();
    let output = Command::new("setpriv")
        .args(["--bounding-set=-sys_admin", "--"])
        .arg(&context.sluice)
        .args(["lab", "up", "--agent", "none", "--name", "tright"])
        .env("SLUICE_LAB_DIR", &context.run_root)
        .output()
        .expect("setpriv of util-linux");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("CAP_SYS_ADMIN") && said.contains("--privileged"), "{said}");
    assert_eq!(traces(&context, "tright"), Vec::<String>::new());
}

#[test]
fn commands_find_the_lab_and_give_the_exit_status_back() {
    let (context, _dir) = context();
    let lab = Lab::up(&context, &named("tcli")).expect("up");
    let command = |args: &[&str]| {
        let output = Command::new(&context.sluice)
            .arg("lab")
            .args(args)
            .env("SLUICE_LAB_DIR", &context.run_root)
            .output()
            .expect("start");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, shown) =
        command(&["shell", "--name", "tcli", "pod1-1", "--", "ip", "-br", "addr"]);
    assert!(status == Some(0) && shown.contains("10.244.1.11/32"), "{shown}");
    let failing = ["shell", "--name", "tcli", "node1", "--", "sh", "-c", "exit 7"];
    assert_eq!(command(&failing).0, Some(7));
    assert_eq!(command(&["shell", "--name", "tcli", "nobody"]).0, Some(1));

    let probe = ["probe", "--name", "tcli", "pod1-1", "[fd00:10:244:2::11]:5353", "--udp"];
    let (status, shown) = command(&[&probe[..], &["--count", "3", "--output", "json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!((status, &report["answers"]["pod2-1"]["-"]), (Some(0), &3.into()), "{shown}");
    let nobody = ["probe", "--name", "tcli", "pod1-1", "10.244.2.11:9"];
    assert_eq!(command(&nobody).0, Some(1), "nothing listens there");

    let (_, shown) = command(&["list", "--output", "json"]);
    let labs: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let own = labs.as_array().expect("a list").iter().find(|lab| lab["name"] == "tcli");
    let own = own.expect("it is listed");
    assert_eq!((&own["state"], &own["processes"]), (&"in use".into(), &2.into()), "{shown}");

    assert_eq!(command(&["down", "--name", "tcli"]).0, Some(0));
    assert_eq!(traces(&context, "tcli"), Vec::<String>::new());
    assert_eq!(command(&["down", "--name", "tcli"]).0, Some(1), "there is none any more");
    drop(lab);
}

#[test]
fn a_lab_left_running_outlives_its_maker() {
    let (context, _dir) = context();
    let lab = Lab::up(&context, &named("tstay")).expect("up");
    lab.leave_running().expect("state");
    assert_eq!(clean_stale(&context).expect("clean"), Vec::<String>::new());
    let lab = Lab::find(&context, Some(&name("tstay"))).expect("it is there");
    assert!(get(&lab, "pod1-1", "http://10.244.2.11:8080/").is_some());
    lab.down().expect("down");
    assert_eq!(traces(&context, "tstay"), Vec::<String>::new());
}

#[test]
fn processes_of_a_host_end_with_the_lab() {
    let (context, _dir) = context();
    let mut lab = Lab::up(&context, &named("tproc")).expect("up");
    let node = lab.host("node1").expect("node1");
    let mut start =
        |what: &str| lab.spawn(&node, what, Command::new("sleep").arg("1000")).expect("start");
    let (stopped, killed, left) = (start("one"), start("two"), start("three"));
    lab.stop(stopped).expect("stop");
    lab.kill(killed).expect("kill");
    assert!(!stopped.is_alive() && !killed.is_alive() && left.is_alive());
    // One that the lab does not know of, as after a crash between start and record.
    let mut unknown = node.netns.spawn(Command::new("sleep").arg("1000")).expect("start");
    lab.down().expect("down");
    assert!(!left.is_alive());
    assert!(!is_running(i32::try_from(unknown.id()).expect("small")));
    // `down` has collected it already.
    let _ = unknown.wait();
}
