//! Hostile packets, each with the tests that hold what becomes of it: docs/datapath.md has the table,
//! and no row of it may be empty without a reason.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use sluice_tests::fixtures;
use sluice_tests::story;

/// What holds a row: laws of fixtures and names of tests, or why nothing does.
enum Held {
    /// Those whose names begin with the row's number are found without being named here.
    ByName,
    /// These too.
    By(&'static [&'static str]),
    /// Not.
    Not(&'static str),
}

use Held::{By, ByName, Not};

/// A1 to A17: VXLAN. A20 to A32: IP. A40 to A50: link layer and transport.
const ATTACKS: &[(u32, &str, Held)] = &[
    (1, "tunnel packet from a stranger", By(&["replacing drops an unknown vtep"])),
    (2, "inner source of another", By(&["inner source of a pod of another node is dropped"])),
    (3, "inner destination that is no pod's", By(&["inner packet for no pod passes"])),
    (4, "another VNI", By(&["vni of others passes"])),
    (5, "VXLAN without the I flag", By(&["vxlan without i flag passes"])),
    (6, "reserved bits", By(&["reserved bits of vxlan are ignored"])),
    (7, "a tunnel between others", By(&["tunnel between others passes"])),
    (8, "outer fragments", By(&["first outer fragment passes"])),
    (9, "lengths that do not fit, nothing inside", ByName),
    (10, "outer options", ByName),
    (
        11,
        "outer UDP checksum",
        Not(
            "the inner packet has sums of its own; an outer one is not looked at (RFC 7348 section 5)",
        ),
    ),
    (12, "VXLAN inside VXLAN", ByName),
    (
        13,
        "inner broadcast, unknown inner MAC",
        By(&["inner broadcast passes", "inner frame for another mac passes"]),
    ),
    (
        14,
        "our MAC as the inner source",
        Not("nobody reads a source MAC out of a tunnel: replies go to the MAC of the tables"),
    ),
    (
        15,
        "congestion marks outside",
        By(&["congestion is news to no pod", "congestion is told to a pod"]),
    ),
    (16, "a VLAN tag inside", ByName),
    (
        17,
        "a pod that sends VXLAN to the node",
        Not("TC leaves it to the node's firewall, as without Sluice; XDP never sees it"),
    ),
    (20, "headers cut at every byte", ByName),
    (21, "an IP version that the EtherType denies", ByName),
    (22, "an impossible IP header length", By(&["ihl below five is dropped"])),
    (23, "IPv4 options", ByName),
    (24, "IP lengths beyond the frame, or of less than the headers", ByName),
    (25, "wrong checksums", ByName),
    (26, "fragments", ByName),
    (27, "extension headers", ByName),
    (28, "no hops left", ByName),
    (
        29,
        "sources that cannot be",
        By(&["source loopback is dropped", "source the vip itself is dropped"]),
    ),
    (30, "broadcast and multicast", By(&["broadcast frame passes", "ipv4 multicast frame passes"])),
    (
        31,
        "IPv4 in IPv6 addresses",
        By(&["v4 mapped source is dropped", "v4 mapped destination is dropped"]),
    ),
    (
        32,
        "router advertisements and neighbour discovery of pods",
        Not("link-local business of pod and host, which the host's own settings judge"),
    ),
    (40, "VLAN tags", ByName),
    (
        41,
        "frames of 802.3, too short, too long",
        By(&["captured frames break nothing at any hook"]),
    ),
    (42, "an impossible TCP header length", By(&["tcp data offset below five is dropped"])),
    (
        43,
        "senseless TCP flags",
        By(&["replacing begins nothing with syn fin", "replacing begins nothing with null"]),
    ),
    (44, "TCP in the middle of nothing", By(&["accelerating leaves unknown ack to the kernel"])),
    (45, "forged RST and FIN", ByName),
    (
        46,
        "UDP lengths, UDP without a checksum",
        By(&["udp length below eight is dropped", "udp without checksum stays without"]),
    ),
    (
        47,
        "port 0",
        Not("a number like others: no Service has it, and as a source it says nothing (RFC 768)"),
    ),
    (48, "SCTP, UDP-Lite, ESP, GRE", By(&["protocol 132 passes", "protocol 47 passes"])),
    (49, "ICMP", ByName),
    (50, "floods that ask for answers", ByName),
];

fn root(path: &str) -> std::path::PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

/// Names of the test functions below a directory, in words.
fn functions(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).expect("a source");
            let mut lines = text.lines().map(str::trim);
            while lines.by_ref().any(|line| line == "#[test]") {
                let name = lines.by_ref().find_map(|line| line.strip_prefix("fn "));
                let name = name.and_then(|line| line.split('(').next()).expect("a function");
                found.insert(name.to_owned());
            }
        }
    }
}

/// Whether a name carries a number: `a26_...`, or behind another one, `s88_a26_...`.
fn carries(name: &str, number: u32) -> bool {
    let id = format!("a{number}");
    name.split('_')
        .take_while(|word| word.len() > 1 && word[1..].parse::<u32>().is_ok())
        .any(|w| w == id)
}

#[test]
fn every_attack_is_held_by_a_test_or_has_a_reason() {
    let mut tests = BTreeSet::new();
    for dir in ["tests/tests", "agent/control/tests", "agent/runtime/tests"] {
        functions(&root(dir), &mut tests);
    }
    let fixtures = fixtures::all();
    let laws: BTreeSet<String> = fixtures.iter().map(|f| story::tell(f).law).collect();
    let words: BTreeSet<String> = tests.iter().map(|name| name.replace('_', " ")).collect();
    let mut table = "| attack | what | held by |\n|---|---|---|\n".to_owned();
    for (number, what, held) in ATTACKS {
        let of_fixtures = fixtures.iter().filter(|f| carries(&f.name, *number)).count();
        let of_tests = tests.iter().filter(|name| carries(name, *number)).count();
        let named: &[&str] = if let By(names) = held { names } else { &[] };
        for name in named {
            assert!(laws.contains(*name) || words.contains(*name), "A{number}: no test {name:?}");
        }
        let found = of_fixtures + of_tests;
        assert!(found > 0 || !matches!(held, ByName), "A{number} ({what}): nothing has its number");
        let last = match held {
            ByName => "tests of its number".to_owned(),
            By(names) => names.join("; "),
            Not(why) => {
                assert_eq!(found, 0, "A{number} is tested, and has a reason why it is not");
                format!("none: {why}")
            }
        };
        table += &format!("| A{number} | {what} | {last} |\n");
    }
    let numbers: Vec<u32> = ATTACKS.iter().map(|(number, ..)| *number).collect();
    let all: Vec<u32> = (1..=17).chain(20..=32).chain(40..=50).collect();
    assert_eq!(numbers, all);
    holds(&table);
}

/// Holds the table in docs/datapath.md against `wanted`, or writes it there.
fn holds(wanted: &str) {
    let path = root("docs/datapath.md");
    let text = fs::read_to_string(&path).expect("docs/datapath.md");
    let (begin, end) = ("<!-- attacks -->\n", "<!-- /attacks -->");
    let from = text.find(begin).expect("the begin of the table") + begin.len();
    let to = text.find(end).expect("the end of the table");
    let wanted = format!("{}{wanted}{}", &text[..from], &text[to..]);
    if std::env::var_os("UPDATE").is_some_and(|value| value == "1") {
        fs::write(path, wanted).expect("written");
        return;
    }
    assert!(
        text == wanted,
        "docs/datapath.md: attacks are not as the tests have them; UPDATE=1 rewrites it"
    );
}
