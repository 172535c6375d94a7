//! Hostile manifests: no panic, no effect on other Services, a reason for everything left out.

use proptest::prelude::*;
use sluice_control::dump::{Dump, dump};
use sluice_control::model::{NodeContext, Snapshot};
use sluice_control::{Allocator, Level, Limits, Names, Skipped, Tables, compile, delta, ingest};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// A Service that nobody else knows of.
const BYSTANDER: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: bystander, namespace: zz-elsewhere}
spec:
  clusterIP: 172.31.255.77
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: bystander-1, namespace: zz-elsewhere, labels: {kubernetes.io/service-name: bystander}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.77], nodeName: node-a}]
"#;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn node() -> NodeContext {
    let text = std::fs::read_to_string(folder().join("node.toml")).expect("tests/golden/node.toml");
    toml::from_str(&text).expect("tests/golden/node.toml")
}

/// All inputs of the golden cases.
fn corpus() -> Vec<String> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("tests/golden")
        .filter_map(|entry| Some(entry.ok()?.path().join("input.yaml")))
        .filter(|path| path.exists())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read_to_string(path).expect("input.yaml")).collect()
}

/// The whole way from text to operations.
fn program(files: &[(&str, &str)], node: &NodeContext) -> (Dump, Vec<Skipped>) {
    let mut snapshot = Snapshot::default();
    let mut skipped = Vec::new();
    for (name, text) in files {
        let ingested = ingest(&(*name).into(), text);
        skipped.extend(ingested.skipped);
        skipped.extend(snapshot.extend(ingested.objects));
    }
    let compiled = compile(&snapshot, node);
    skipped.extend(compiled.skipped);
    let allocation = Allocator::new(Limits::default()).allocate(
        &compiled.desired,
        &Tables::default(),
        &Names::default(),
        0,
    );
    skipped.extend(allocation.skipped);
    let mut tables = Tables::default();
    for op in delta(&Tables::default(), &allocation.tables).ops {
        tables.apply(&op);
    }
    assert_eq!(tables, allocation.tables);
    assert_eq!(tables.dangling(), Vec::<String>::new());
    (dump(&tables, &allocation.names), skipped)
}

const TOKENS: &[&str] = &[
    "0",
    "-1",
    "65535",
    "65536",
    "99999999999999999999",
    "1e309",
    ".nan",
    "0x1F",
    "0o17",
    "010",
    "0.0.0.0",
    "255.255.255.255",
    "127.0.0.1",
    "224.0.0.1",
    "::",
    "::1",
    "fe80::1%eth0",
    "::ffff:10.0.0.1",
    "10.96.0.100",
    "192.0.2.1",
    "10.244.1.5",
    "2001:db8::1",
    "0.0.0.0/0",
    "10.244.1.0/24",
    "\"\"",
    "null",
    "~",
    "true",
    "[]",
    "{}",
    "[[[[[[[[[[]]]]]]]]]]",
    "{a: {a: {}}}",
    "None",
    "List",
    "Service",
    "ServiceList",
    "Local",
    "SCTP",
    "ClientIP",
    "*a",
    "&a",
    "<<",
    "!!binary aGk=",
    "!!set {a}",
    "|",
    ">-",
    "---",
    "...",
    "- - - -",
    "? ?",
    "\u{0}",
    "\u{202e}",
    "\u{1b}[2J",
    "é",
    "\t",
    "\r\n",
    "2001-01-01T00:00:00Z",
    "-99999-01-01T00:00:00Z",
    "%YAML 9.9",
    "'",
    "\"",
    "#",
    ": ",
    "{",
    "[",
];

#[derive(Clone, Debug)]
enum Mutation {
    Delete(usize),
    Duplicate,
    Insert(&'static str),
    ReplaceValue(&'static str),
    ReplaceLine(&'static str),
    Indent(usize),
    SwapWithNext,
}

fn mutation() -> impl Strategy<Value = (prop::sample::Index, Mutation)> {
    let token = prop::sample::select(TOKENS);
    let kind = prop_oneof![
        (1..40usize).prop_map(Mutation::Delete),
        Just(Mutation::Duplicate),
        token.clone().prop_map(Mutation::Insert),
        token.clone().prop_map(Mutation::ReplaceValue),
        token.prop_map(Mutation::ReplaceLine),
        (0..6usize).prop_map(Mutation::Indent),
        Just(Mutation::SwapWithNext),
    ];
    (any::<prop::sample::Index>(), kind)
}

fn mutate(text: &str, place: prop::sample::Index, mutation: &Mutation) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return String::new();
    }
    let at = place.index(lines.len());
    match mutation {
        Mutation::Delete(count) => {
            let chars: Vec<char> = text.chars().collect();
            let start = place.index(chars.len());
            return chars[..start].iter().chain(chars[start..].iter().skip(*count)).collect();
        }
        Mutation::Duplicate => lines.insert(at, lines[at].clone()),
        Mutation::Insert(token) => {
            let chars: Vec<char> = text.chars().collect();
            let start = place.index(chars.len());
            let before: String = chars[..start].iter().collect();
            let after: String = chars[start..].iter().collect();
            return format!("{before}{token}{after}");
        }
        Mutation::ReplaceValue(token) => {
            // The place within the line that follows one of its colons.
            let colons: Vec<usize> = lines[at].match_indices(": ").map(|(i, _)| i).collect();
            if !colons.is_empty() {
                let start = colons[place.index(colons.len())] + 2;
                let rest = &lines[at][start..];
                let len = rest.find([',', '}', ']']).unwrap_or(rest.len());
                let line = format!("{}{token}{}", &lines[at][..start], &rest[len..]);
                lines[at] = line;
            }
        }
        Mutation::ReplaceLine(token) => lines[at] = (*token).to_owned(),
        Mutation::Indent(count) => {
            lines[at] = format!("{}{}", " ".repeat(*count), lines[at].trim_start());
        }
        Mutation::SwapWithNext => {
            let next = (at + 1) % lines.len();
            lines.swap(at, next);
        }
    }
    lines.join("\n")
}

fn bystander(dump: &Dump) -> (String, String) {
    let service = &dump.services["zz-elsewhere/bystander:http"];
    let backend = &dump.backends["10.244.1.77:8080/tcp"];
    (serde_json::to_string(service).expect("plain data"), backend.route.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mutated_manifests_never_panic_and_never_disturb_others(
        pick: prop::sample::Index,
        mutations in proptest::collection::vec(mutation(), 1..12),
    ) {
        let corpus = corpus();
        let node = node();
        let alone = bystander(&program(&[("b.yaml", BYSTANDER)], &node).0);
        let mut text = pick.get(&corpus).clone();
        for (place, mutation) in &mutations {
            text = mutate(&text, *place, mutation);
        }
        let (dump, skipped) = program(&[("a.yaml", &text), ("b.yaml", BYSTANDER)], &node);
        prop_assert_eq!(bystander(&dump), alone);
        for skip in skipped {
            prop_assert!(!skip.reason.is_empty() && !skip.object.is_empty());
            prop_assert!(!skip.to_string().chars().any(|c| c.is_control() || c == '\u{202e}'), "{:?}", skip);
            prop_assert!(skip.level == Level::Notice || !skip.remedy.is_empty(), "{}", skip);
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        ingest(&"a.yaml".into(), &text);
    }
}

fn error_count(skipped: &[Skipped]) -> usize {
    skipped.iter().filter(|s| s.level == Level::Error).count()
}

#[test]
fn thousand_ports_and_ten_thousand_endpoints_are_programmed() {
    let mut text = String::from(
        "apiVersion: v1\nkind: Service\nmetadata: {name: big}\nspec:\n  clusterIP: 10.96.9.9\n  ports:\n",
    );
    for port in 1..=1000 {
        writeln!(text, "  - {{name: p{port}, port: {port}}}").expect("string");
    }
    text.push_str(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {name: big-1, labels: {kubernetes.io/service-name: big}}\n\
         addressType: IPv4\nports: [{name: p1, port: 1}]\nendpoints:\n",
    );
    for n in 0..10_000u32 {
        let [_, _, c, d] = n.to_be_bytes();
        writeln!(text, "- {{addresses: [10.200.{c}.{d}], nodeName: node-a}}").expect("string");
    }
    let (dump, skipped) = program(&[("a.yaml", &text)], &node());
    assert_eq!(skipped, []);
    assert_eq!(dump.services.len(), 1000);
    let set = &dump.services["default/big:p1"].frontends["10.96.9.9:1/tcp"].external;
    assert_eq!((set.entries, set.backends.len()), (16_381, 10_000));
}

#[test]
fn mixed_families_zones_and_huge_annotations_are_left_out_one_by_one() {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: odd, annotations: {{a: {}}}}}\n\
         spec: {{clusterIP: 10.96.9.8, ports: [{{port: 80}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: odd-1, labels: {{kubernetes.io/service-name: odd}}}}\n\
         addressType: IPv4\nports: [{{port: 80}}]\nendpoints:\n",
        "x".repeat(1 << 20)
    );
    for n in 0..1000 {
        let address = match n % 4 {
            0 => format!("10.244.1.{}", n % 200 + 1),
            1 => format!("fd00::{n:x}"),
            2 => format!("fe80::{n:x}%eth0"),
            _ => format!("host-{n}"),
        };
        writeln!(text, "- {{addresses: [\"{address}\"], nodeName: node-a}}").expect("string");
    }
    let (dump, skipped) = program(&[("a.yaml", &text)], &node());
    assert_eq!(error_count(&skipped), 750);
    assert_eq!(dump.backends.len(), 50);
}

#[test]
fn alias_bomb_is_refused_alone() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        writeln!(bomb, "a{level}: &a{level} [{before}]").expect("string");
    }
    let text = format!("{bomb}---\n{BYSTANDER}");
    let (dump, skipped) = program(&[("a.yaml", &text)], &node());
    assert_eq!(error_count(&skipped), 1);
    assert!(skipped[0].reason.starts_with("is not YAML"), "{}", skipped[0]);
    bystander(&dump);
}

#[test]
fn deep_nesting_is_refused_alone() {
    let text = format!("kind: {}\n---\n{BYSTANDER}", "[".repeat(100_000));
    let (dump, skipped) = program(&[("a.yaml", &text)], &node());
    assert_eq!(error_count(&skipped), 1);
    bystander(&dump);
}

#[test]
fn same_object_in_two_files_is_taken_from_the_first() {
    let other = BYSTANDER.replace("172.31.255.77", "172.31.255.78");
    let (dump, skipped) = program(&[("a.yaml", BYSTANDER), ("b.yaml", &other)], &node());
    assert!(
        dump.services["zz-elsewhere/bystander:http"].frontends.contains_key("172.31.255.77:80/tcp")
    );
    let texts: Vec<String> = skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "b.yaml: Service zz-elsewhere/bystander: metadata.name: already defined in a.yaml \
             (remove one of the two or rename it)",
            "b.yaml: EndpointSlice zz-elsewhere/bystander-1: metadata.name: already defined in \
             a.yaml (remove one of the two or rename it)",
        ]
    );
}

/// Port 0 is the key under which an address is known as such.
#[test]
fn service_with_port_zero_never_makes_an_address_a_services_own() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: zero}\n\
                spec: {clusterIP: 10.96.9.7, externalIPs: [203.0.113.7], ports: [{port: 0}]}\n";
    let (dump, skipped) = program(&[("a.yaml", text)], &node());
    assert!(dump.services.is_empty());
    assert_eq!(dump.vips, Vec::<String>::new());
    assert_eq!(error_count(&skipped), 1);
    assert!(skipped[0].field.starts_with("spec.ports[0]"), "{}", skipped[0]);
}
