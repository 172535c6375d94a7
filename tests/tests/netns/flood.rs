//! A flood of forged SYNs, bounded and slow enough for a test's machine, to a node whose flood guard is
//! set low: those who are connected notice nothing, and those who come meanwhile get through.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use serde_json::Value;
use sluice_abi::{Addr, IPPROTO_TCP};
use sluice_lab::traffic::{Connection, ask_udp};
use sluice_lab::{Family, LabSpec, Mode};
use sluice_tests::packet::Packet;

use crate::bed::{Bed, Config, ECHO, FAMILIES, HTTP, NODE, Service, delta, drops, wait};

const LOCAL: Service = Service { name: "local", number: 61 };
const REMOTE: Service = Service { name: "remote", number: 62 };
/// Forged SYNs for each family.
const FLOOD: u32 = 6_000;
/// So many at once, then a pause.
const BURST: u32 = 20;

fn bed(mode: Mode, delivery: &'static str) -> Bed {
    let spec = LabSpec::kernel_only(2, 2);
    let objects = [
        ("local.yaml", LOCAL.objects(&spec, &["pod1-1"])),
        ("remote.yaml", REMOTE.objects(&spec, &["pod2-1"])),
    ];
    let datapath = "flood_rate = 200\n";
    let tables = "flood_records = 4096\n[timeouts]\nsweep = \"1s\"\n";
    Bed::up(&spec, Config { delivery, datapath, tables, ..Config::new(mode) }, &objects)
}

/// Sends forged SYNs from the namespace that the caller is in. The kernel routes them.
fn flood(family: Family) {
    let domain = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC;
    // With this protocol the caller writes the IP header (raw(7), ipv6(7)).
    let raw = socket(domain, SockType::Raw, flags, SockProtocol::Raw).expect("a raw socket");
    for n in 0..FLOOD {
        let target = [LOCAL, REMOTE][n as usize % 2].load_balancer_ip(family);
        let (a, b) = ((n >> 8) as u8, n as u8);
        // For benchmarks (RFC 2544) and for documentation (RFC 3849): nobody's.
        let source = match family {
            Family::V4 => Addr::from_v4([198, 18, a, b]),
            Family::V6 => Addr([0x20, 1, 0xd, 0xb8, 0xf1, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b]),
        };
        let port = 1024 + (n.wrapping_mul(40_503) % 60_000) as u16;
        let to = match target {
            IpAddr::V4(ip) => Addr::from_v4(ip.octets()),
            IpAddr::V6(ip) => Addr(ip.octets()),
        };
        let syn = Packet::new(IPPROTO_TCP, (source, port), (to, HTTP)).payload(Vec::new());
        let way = SockaddrStorage::from(SocketAddr::new(target, 0));
        sendto(raw.as_raw_fd(), &syn.bytes()[14..], &way, MsgFlags::empty()).expect("sent");
        if n % BURST == BURST - 1 {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What `sluice status` says of the guard.
fn guard(bed: &Bed) -> Value {
    bed.status()["flood_guard"].clone()
}

fn count(guard: &Value, field: &str) -> u64 {
    guard[field].as_u64().unwrap_or_else(|| panic!("{field}: {guard}"))
}

fn survives(mode: Mode, delivery: &'static str) {
    let bed = bed(mode, delivery);
    let client = bed.netns("client");
    assert_eq!(count(&guard(&bed), "put"), 0, "{}", guard(&bed));
    for family in FAMILIES {
        let targets = [LOCAL, REMOTE].map(|service| service.load_balancer(family, HTTP));
        let connect = |target| {
            let connected = client.enter(|| Connection::open(target)).expect("the client");
            connected.unwrap_or_else(|e| panic!("{target}: {e}\n{}", bed.log()))
        };
        let mut established = targets.map(connect);
        for connection in &mut established {
            connection.ask("/").expect("before the flood");
        }
        let (before, was) = (bed.counters(), guard(&bed));
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                client.enter(|| flood(family)).expect("the client");
                over.store(true, Ordering::Release);
            });
            let mut rounds = 0;
            while !over.load(Ordering::Acquire) || rounds == 0 {
                for (connection, target) in established.iter_mut().zip(targets) {
                    let body = connection.get("/bytes/100000");
                    assert_eq!(body.map(|b| b.len()).expect("in the flood"), 100_000, "{target}");
                }
                // Newcomers, over TCP and UDP.
                for service in [LOCAL, REMOTE] {
                    let mut newcomer = connect(service.load_balancer(family, HTTP));
                    for _ in 0..3 {
                        newcomer.ask("/").expect("a newcomer in the flood");
                    }
                    // Nobody repeats a datagram whose place was taken before its answer came.
                    let echo = service.load_balancer(family, ECHO);
                    let ask = || client.enter(|| ask_udp(echo)).expect("the client").is_ok();
                    assert!((0..4).any(|_| ask()), "{echo}\n{}", bed.log());
                }
                rounds += 1;
            }
        });
        for connection in &mut established {
            connection.ask("/").expect("after the flood");
        }
        let (counted, now) = (delta(&bed, &before), guard(&bed));
        let since = |field: &str| count(&now, field) - count(&was, field);
        assert!(since("put") > u64::from(FLOOD) / 2, "{family}: {was} {now}");
        assert!(since("promoted") > 0, "{family}: {was} {now}");
        assert!(since("overwritten") > u64::from(FLOOD) / 4, "{family}: {was} {now}");
        // Two CPUs at one place of the guard, at most: nobody's packet but a newcomer's.
        let mut drops = drops(&counted);
        drops.remove("flow_changed");
        assert!(drops.is_empty(), "{family}: {drops:?}");
    }
    wait("the end of the flood is told", || {
        let log = bed.log();
        let told = log.contains("flood guard: more new") && log.contains("the flood is over");
        if told { Ok(()) } else { Err(log) }
    });
    // The log may tell of the first family's flood.
    wait("the end of both floods is shown", || {
        let text = bed.status_text();
        if text.contains("flood guard  off now; ") { Ok(()) } else { Err(text) }
    });
    let text = bed.lab.sluice(NODE, &["counters"]).expect("counters");
    assert!(text.contains("went on to the connection table"), "{text}");
    let flows = bed.lab.sluice(NODE, &["flows", "--output", "json"]).expect("flows");
    let flows: Value = serde_json::from_str(&flows).expect("JSON");
    let rows = flows["flows"].as_array().expect("flows");
    assert!(rows.iter().any(|row| row["guarded"] == true), "{flows}");
}

#[test]
fn native_serves_old_and_new_clients_in_a_flood() {
    survives(Mode::Native, "redirect");
}

#[test]
fn generic_serves_old_and_new_clients_in_a_flood() {
    survives(Mode::Generic, "stack");
}
