//! A failing case as files: YAML for `SLUICE_MODEL_REPLAY` and for reading, pcap for other tools.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use serde::Deserialize;
use sluice_abi::{Hook, Reason};
use sluice_model::{Action, Outcome, Seen};
use sluice_tests::sequence::{Plan, Prey, Report, Step};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(rename = "failure")]
    _failure: String,
    world: Plan,
    steps: Vec<SavedStep>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, untagged)]
enum SavedStep {
    Tables {
        tables: Plan,
    },
    Frame {
        hook: String,
        ifindex: u32,
        packet: String,
        #[serde(rename = "got")]
        _got: String,
        #[serde(default, rename = "expected")]
        _expected: Vec<String>,
    },
}

/// Where failures are saved: `model-failures` in the target directory.
fn directory() -> PathBuf {
    let program = std::env::current_exe().expect("this program");
    // target/debug/deps/model-…
    let target = program.ancestors().nth(3).expect("a target directory");
    target.join("model-failures")
}

/// Saves a failure; what to say of it.
pub fn save(prey: &Prey) -> String {
    let directory = directory();
    fs::create_dir_all(&directory).expect("a directory for failures");
    let text = text(&prey.report);
    let name = directory.join(format!("{:016x}.yaml", fingerprint(text.as_bytes())));
    fs::write(&name, &text).expect("the failure is written");
    write_pcap(&prey.report, &name.with_extension("pcap"));
    let path = name.display();
    format!(
        "{text}\nthe moves were {:#?}\nsaved: {path}\nreplay it with: SLUICE_MODEL_REPLAY={path} \
         cargo test -p sluice-tests --test model replay",
        prey.case.moves
    )
}

/// FNV-1a: the same failure has the same name.
fn fingerprint(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Reads a saved failure.
pub fn load(file: &Path) -> Report {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let saved: Saved =
        serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let step = |step| match step {
        SavedStep::Tables { tables } => Step::Tables(tables),
        SavedStep::Frame { hook, ifindex, packet, .. } => Step::Frame {
            hook: *Hook::ALL.iter().find(|h| h.label() == hook).expect("a hook"),
            ifindex,
            bytes: bytes(&packet),
            expected: Vec::new(),
            // Of no meaning: the replay sees for itself.
            seen: Seen { action: Action::Pass, reason: Reason::NotIp, frame: vec![], mark: None },
        },
    };
    let steps = saved.steps.into_iter().map(step).collect();
    Report { plan: saved.world, steps, failure: None }
}

/// A report as YAML.
pub fn text(report: &Report) -> String {
    let quoted = |text: &str| serde_json::to_string(text).expect("a string");
    let plan = |plan: &Plan| serde_json::to_string(plan).expect("a plan");
    let mut text = String::new();
    let failure = report.failure.as_ref().map_or("none", |failure| &failure.0);
    let mut line = |words: String| writeln!(text, "{words}").expect("a string takes everything");
    line(format!("failure: {}", quoted(failure)));
    line(format!("world: {}", plan(&report.plan)));
    line("steps:".into());
    for step in &report.steps {
        match step {
            Step::Tables(tables) => line(format!("  - tables: {}", plan(tables))),
            Step::Frame { hook, ifindex, bytes, expected, seen } => {
                line(format!("  - hook: {}", hook.label()));
                line(format!("    ifindex: {ifindex}"));
                line(format!("    packet: {}", quoted(&hex(bytes))));
                let got = verdict(seen.action, seen.reason, seen.mark, Some(&seen.frame));
                line(format!("    got: {}", quoted(&got)));
                if !expected.is_empty() {
                    line("    expected:".into());
                }
                for Outcome { action, reason, frame, mark, .. } in expected {
                    let verdict = verdict(*action, *reason, *mark, frame.as_ref());
                    line(format!("      - {}", quoted(&verdict)));
                }
            }
        }
    }
    text
}

fn verdict(action: Action, reason: Reason, mark: Option<u32>, frame: Option<&Vec<u8>>) -> String {
    let mark = mark.map_or(String::new(), |ifindex| format!(" for {ifindex}"));
    let frame = match frame {
        Some(frame) if action != Action::Drop => format!(" {}", hex(frame)),
        _ => String::new(),
    };
    format!("{action:?} {}{mark}{frame}", reason.label())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.chars().map(|c| c.to_digit(16).expect("a hexadecimal digit") as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The frames of step n, n seconds after the beginning: what came in at .0, what came out at .3, what
/// would have been lawful from .6 on.
fn write_pcap(report: &Report, file: &Path) {
    let header = PcapHeader { datalink: DataLink::ETHERNET, ..PcapHeader::default() };
    let file = File::create(file).expect("the capture is made");
    let mut pcap = PcapWriter::with_header(file, header).expect("the capture is written");
    let mut put = |step: usize, millis: u64, frame: &[u8]| {
        let time = Duration::from_secs(step as u64) + Duration::from_millis(millis);
        let packet = PcapPacket::new(time, frame.len() as u32, frame);
        pcap.write_packet(&packet).expect("the capture is written");
    };
    for (n, step) in report.steps.iter().enumerate() {
        let Step::Frame { bytes, expected, seen, .. } = step else { continue };
        put(n, 0, bytes);
        if seen.action != Action::Drop {
            put(n, 300, &seen.frame);
        }
        let lawful = expected.iter().filter_map(|outcome| outcome.frame.as_ref());
        lawful.zip(600..1000).for_each(|(frame, millis)| put(n, millis, frame));
    }
}
