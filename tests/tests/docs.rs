//! Text that must agree with code: tables of the documents against the code's own, and the
//! invariants of ARCHITECTURE.md as far as they can be looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::MapType;
use object::{Object, ObjectSection, SectionKind};
use sluice::config::{Config, DEFAULT_TOML};
use sluice_abi::{Hook, REASONS, VerdictKind};
use sluice_tests::fixtures::{self, Fixture};
use sluice_tests::story::{self, Story};

fn root(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(root(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Rows of the table in `text` whose header begins with `first`, cell by cell.
fn table(text: &str, first: &str) -> Vec<Vec<String>> {
    let header = format!("| {first} |");
    let mut lines = text.lines().skip_while(|l| !l.starts_with(&header));
    assert!(lines.next().is_some(), "no table with the column {first:?}");
    let rows: Vec<Vec<String>> = lines
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .map(|l| l.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect();
    assert!(!rows.is_empty());
    rows
}

/// What stands in backquotes.
fn quoted(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Rust sources below a directory, with their text.
fn sources(dir: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let base = root(dir);
    let mut found = Vec::new();
    walk(&base, &mut found);
    assert!(!found.is_empty(), "{dir}");
    found
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&base).expect("below").display().to_string();
            (name, fs::read_to_string(&path).expect("source"))
        })
        .collect()
}

/// Files below `dir` that hold one of `words` outside comments.
fn holders(dir: &str, words: &[&str]) -> BTreeSet<String> {
    let code = |text: &str| {
        text.lines()
            .map(|line| line.split("//").next().unwrap_or_default())
            .any(|line| words.iter().any(|word| line.contains(word)))
    };
    sources(dir).into_iter().filter(|(_, text)| code(text)).map(|(name, _)| name).collect()
}

fn manifest(dir: &str) -> toml::Table {
    toml::from_str(&read(&format!("{dir}/Cargo.toml"))).expect("TOML")
}

/// Dependencies of a crate, tests' left out.
fn dependencies(dir: &str) -> BTreeSet<String> {
    let manifest = manifest(dir);
    ["dependencies", "build-dependencies"]
        .iter()
        .filter_map(|key| manifest.get(*key)?.as_table())
        .flat_map(|table| table.keys().cloned())
        .collect()
}

#[test]
fn operations_list_every_reason() {
    let mut rows = String::from("| number | reason | verdict | meaning |\n|---|---|---|---|\n");
    for row in REASONS {
        rows += &format!(
            "| {} | `{}` | {} | {} |\n",
            row.reason as u32,
            row.label,
            row.kind.label(),
            row.text.replace('|', "\\|")
        );
    }
    holds("docs/operations.md", "reasons", &rows);
}

/// Holds what stands in `path` between the marks of `name` against `wanted`, or puts it there.
fn holds(path: &str, name: &str, wanted: &str) {
    let text = read(path);
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let from = text.find(&begin).expect("the begin of the table") + begin.len();
    let to = text.find(&end).expect("the end of the table");
    let wanted = format!("{}{}\n{}", &text[..from], wanted.trim_start(), &text[to..]);
    if std::env::var_os("UPDATE").is_some_and(|value| value == "1") {
        fs::write(root(path), wanted).expect("write");
        return;
    }
    assert!(text == wanted, "{path}: {name} are not as the code has them; UPDATE=1 rewrites it");
}

#[test]
fn datapath_lists_every_kind_of_packet() {
    let mut sections = String::new();
    let fixtures = fixtures::all();
    for (kind, title) in [
        (VerdictKind::Forward, "Sent on its way"),
        (VerdictKind::Pass, "Left to the kernel"),
        (VerdictKind::Drop, "Dropped"),
    ] {
        sections += &format!("### {title}\n\n");
        for row in REASONS.iter().filter(|row| row.kind == kind) {
            let of_reason = fixtures.iter().filter(|fixture| fixture.reason == row.reason);
            let table = laws(of_reason, kind);
            if !table.is_empty() {
                sections += &format!("`{}`: {}\n\n{table}\n", row.label, row.text);
            }
        }
    }
    holds("docs/datapath.md", "packets", &sections);
}

/// The laws of some fixtures, each once.
fn laws<'a>(fixtures: impl Iterator<Item = &'a Fixture>, kind: VerdictKind) -> String {
    let mut laws: BTreeMap<(Hook, String), (usize, Story)> = BTreeMap::new();
    for told in fixtures.map(story::tell) {
        let key = (told.hook, told.law.clone());
        let (cases, law) = laws.entry(key).or_insert_with(|| (0, told.clone()));
        *cases += 1;
        law.of.extend(told.of);
        law.goes.extend(told.goes);
        law.leaves.extend(told.leaves);
    }
    if laws.is_empty() {
        return String::new();
    }
    let dropped = kind == VerdictKind::Drop;
    let mut rows = if dropped {
        "| at | packet | of | cases |\n|---|---|---|---|\n".to_owned()
    } else {
        "| at | packet | of | cases | goes | leaves |\n|---|---|---|---|---|---|\n".to_owned()
    };
    let join = |words: &BTreeSet<String>, by: &str| {
        words.iter().map(String::as_str).collect::<Vec<_>>().join(by)
    };
    for ((hook, law), (cases, told)) in laws {
        let id = told.id.map(|id| format!(" ({id})")).unwrap_or_default();
        let of = join(&told.of, " ");
        rows += &format!("| {} | {law}{id} | {of} | {cases} |", hook.label());
        if !dropped {
            rows += &format!(" {} | {} |", join(&told.goes, "; "), join(&told.leaves, "; "));
        }
        rows.push('\n');
    }
    rows
}

#[test]
fn architecture_lists_every_map_with_its_kind() {
    let listed: BTreeMap<String, String> = table(&read("ARCHITECTURE.md"), "map")
        .into_iter()
        .map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone()))
        .collect();
    let shapes = sluice::maps::shapes(&Config::default().maps);
    let real: BTreeMap<String, String> = shapes
        .iter()
        .map(|shape| {
            let kind = match shape.map_type {
                MapType::Array => "array",
                MapType::Hash => "hash",
                MapType::PerCpuArray => "per-CPU array",
                MapType::ProgramArray => "program array",
                other => panic!("{}: {other:?} has no word yet", shape.name),
            };
            (shape.name.to_owned(), kind.to_owned())
        })
        .collect();
    assert_eq!(listed, real);
}

#[test]
fn architecture_lists_every_program() {
    let listed: BTreeSet<String> = table(&read("ARCHITECTURE.md"), "program")
        .into_iter()
        .flat_map(|row| quoted(&row[0]))
        .collect();
    let data = fs::read(env!("SLUICE_BPF_OBJECT")).expect("the object");
    let file = object::File::parse(data.as_slice()).expect("ELF");
    let real: BTreeSet<String> = {
        use object::{ObjectSymbol, SymbolKind};
        file.symbols()
            .filter(|s| s.kind() == SymbolKind::Text && s.is_global())
            .filter(|s| {
                let section = s.section_index().and_then(|i| file.section_by_index(i).ok());
                // Functions that programs call are in .text; programs have sections of their own.
                section.is_some_and(|s| s.name().is_ok_and(|name| !name.starts_with(".text")))
            })
            .map(|s| s.name().expect("a name").to_owned())
            .collect()
    };
    assert_eq!(listed, real);
}

#[test]
fn crates_depend_as_architecture_says() {
    let workspace: toml::Table = toml::from_str(&read("Cargo.toml")).expect("TOML");
    let members = workspace["workspace"]["members"].as_array().expect("members");
    let mut real = BTreeMap::new();
    for dir in members.iter().filter_map(|m| m.as_str()).chain(["xdp/ebpf"]) {
        let name = manifest(dir)["package"]["name"].as_str().expect("a name").to_owned();
        let ours: BTreeSet<String> =
            dependencies(dir).into_iter().filter(|d| d.starts_with("sluice")).collect();
        if name != "sluice-tests" {
            real.insert(dir.to_owned(), (name, ours));
        }
    }
    let listed: BTreeMap<String, (String, BTreeSet<String>)> =
        table(&read("ARCHITECTURE.md"), "directory")
            .into_iter()
            .map(|row| {
                let one = |cell: &str| cell.trim_matches('`').to_owned();
                (one(&row[0]), (one(&row[1]), quoted(&row[3])))
            })
            .collect();
    assert_eq!(listed, real);
}

#[test]
fn unsafe_code_stands_where_architecture_says() {
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"];
    assert_eq!(holders("xdp/datapath/src", &words), BTreeSet::from(["access.rs".to_owned()]));
    for lib in ["xdp/abi", "agent/control", "agent/lab", "offload-tc", "hw-profiles"] {
        let text = read(&format!("{lib}/src/lib.rs"));
        assert!(text.contains("#![forbid(unsafe_code)]"), "{lib}");
    }
}

#[test]
fn control_reads_no_clock_no_file_and_no_environment() {
    let words = [
        "std::time",
        "Instant",
        "SystemTime",
        "std::fs",
        "std::env",
        "std::thread",
        "std::process",
        "TcpStream",
        "UdpSocket",
        "TcpListener",
    ];
    assert_eq!(holders("agent/control/src", &words), BTreeSet::new());
    let dependencies = dependencies("agent/control");
    for name in ["aya", "tokio", "kube", "notify", "nix", "libc", "netlink-sys"] {
        assert!(!dependencies.contains(name), "{name}");
    }
}

#[test]
fn datapath_counts_in_one_module_and_knows_no_kernel() {
    let counters = ["reason_counter(", "service_counter(", "backend_counter(", "answer_counter("];
    // `env.rs` declares them.
    let expected = BTreeSet::from(["account.rs".to_owned(), "env.rs".to_owned()]);
    assert_eq!(holders("xdp/datapath/src", &counters), expected);
    let expected: BTreeSet<String> = ["sluice-abi", "zerocopy"].map(str::to_owned).into();
    assert_eq!(dependencies("xdp/datapath"), expected);
    assert_eq!(dependencies("xdp/abi"), BTreeSet::from(["zerocopy".to_owned()]));
}

#[test]
fn one_crate_links_libbpf() {
    let workspace: toml::Table = toml::from_str(&read("Cargo.toml")).expect("TOML");
    let members = workspace["workspace"]["members"].as_array().expect("members");
    let linking: Vec<&str> = members
        .iter()
        .filter_map(|m| m.as_str())
        .filter(|dir| dependencies(dir).iter().any(|d| d.starts_with("libbpf")))
        .collect();
    assert_eq!(linking, ["offload-tc"]);
}

/// Helper numbers and names (include/uapi/linux/bpf.h, `___BPF_FUNC_MAPPER`).
const HELPERS: [(i32, &str); 21] = [
    (1, "bpf_map_lookup_elem"),
    (11, "bpf_l4_csum_replace"),
    (12, "bpf_tail_call"),
    (23, "bpf_redirect"),
    (26, "bpf_skb_load_bytes"),
    (28, "bpf_csum_diff"),
    (38, "bpf_skb_change_tail"),
    (39, "bpf_skb_pull_data"),
    (40, "bpf_csum_update"),
    (32, "bpf_skb_change_type"),
    (43, "bpf_skb_change_head"),
    (44, "bpf_xdp_adjust_head"),
    (50, "bpf_skb_adjust_room"),
    (155, "bpf_redirect_peer"),
    (54, "bpf_xdp_adjust_meta"),
    (65, "bpf_xdp_adjust_tail"),
    (93, "bpf_spin_lock"),
    (94, "bpf_spin_unlock"),
    (118, "bpf_jiffies64"),
    (188, "bpf_xdp_get_buff_len"),
    (189, "bpf_xdp_load_bytes"),
];

/// Every helper that the object calls, and no other, is in ARCHITECTURE.md: no map update, no fib
/// lookup, no clock.
#[test]
fn programs_call_the_helpers_that_architecture_lists() {
    // BPF_JMP | BPF_CALL with source register 0 (RFC 9669 section 4.3): a helper by its number.
    const CALL: u8 = 0x85;
    /// One instruction; wide ones have a second half whose operation code is zero.
    const INSTRUCTION: usize = 8;
    let data = fs::read(env!("SLUICE_BPF_OBJECT")).expect("the object");
    let file = object::File::parse(data.as_slice()).expect("ELF");
    let mut called = BTreeSet::new();
    for section in file.sections().filter(|s| s.kind() == SectionKind::Text) {
        let relocated: BTreeSet<u64> = section.relocations().map(|(offset, _)| offset).collect();
        let code = section.data().expect("code");
        for (i, instruction) in code.chunks_exact(INSTRUCTION).enumerate() {
            let from_function = relocated.contains(&((i * INSTRUCTION) as u64));
            if instruction[0] == CALL && instruction[1] >> 4 == 0 && !from_function {
                let number = [instruction[4], instruction[5], instruction[6], instruction[7]];
                called.insert(i32::from_le_bytes(number));
            }
        }
    }
    let names: BTreeSet<String> = called
        .iter()
        .map(|number| match HELPERS.iter().find(|(n, _)| n == number) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("helper {number}"),
        })
        .collect();
    let text = read("ARCHITECTURE.md");
    let line = text.lines().find(|l| l.starts_with("- Helpers that programs call:")).expect("line");
    assert_eq!(quoted(line), names);
}

/// Keys of the config that documents name exist.
#[test]
fn config_keys_in_documents_exist() {
    let defaults: toml::Table = toml::from_str(DEFAULT_TOML).expect("TOML");
    let mut seen = 0;
    for path in ["README.md", "ARCHITECTURE.md", "docs/config.md", "docs/operations.md"]
        .map(str::to_owned)
        .into_iter()
        .chain(adrs())
    {
        for word in quoted(&read(&path)) {
            let Some((section, key)) = word.split_once('.') else { continue };
            let Some(section) = defaults.get(section).and_then(|s| s.as_table()) else { continue };
            if key.ends_with("rs") {
                continue;
            }
            seen += 1;
            assert!(section.contains_key(key), "{path}: {word}");
        }
    }
    assert!(seen >= 4, "only {seen} keys found");
}

fn adrs() -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(root("docs/adr"))
        .expect("docs/adr")
        .map(|e| format!("docs/adr/{}", e.expect("entry").file_name().display()))
        .collect();
    found.sort();
    found
}

/// `NNNN-title.md`, numbered without a gap, with the number in the title.
#[test]
fn decisions_are_numbered() {
    for (i, path) in adrs().iter().enumerate() {
        let number = i + 1;
        assert!(path.starts_with(&format!("docs/adr/{number:04}-")), "{path}");
        assert!(read(path).starts_with(&format!("# {number}. ")), "{path}");
    }
}
