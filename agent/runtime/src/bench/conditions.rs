//! Under what a measurement was made: without it a figure means nothing.

use std::collections::BTreeMap;
use std::fs;

use nix::unistd::gethostname;
use serde::Serialize;

use super::BenchError;
use super::rig::Rig;
use crate::config;
use crate::maps::shapes;

/// The conditions of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Conditions {
    /// Version of this program.
    pub sluice: &'static str,
    /// The machine's name.
    pub host: String,
    /// Model of the processor.
    pub cpu: String,
    /// Processors in the machine.
    pub cpus: usize,
    /// The processor that ran everything.
    pub measured_on: usize,
    /// Processor architecture.
    pub arch: &'static str,
    /// Release and build of the kernel.
    pub kernel: String,
    /// Frequency governor of the processor, where there is one.
    pub governor: Option<String>,
    /// `net.core.bpf_jit_enable` and `net.core.bpf_jit_harden`.
    pub jit: String,
    /// `kernel.bpf_stats_enabled`: 1 would make every program slower.
    pub bpf_stats: String,
    /// Load average before the run.
    pub load: String,
    /// What the kernel does about the processor's vulnerabilities.
    pub mitigations: BTreeMap<String, String>,
    /// The program under test.
    pub program: Program,
    /// Number of entries of every map.
    pub maps: BTreeMap<&'static str, u32>,
    /// `accelerate` or `replace`.
    pub mode: &'static str,
    /// First and last source port of rewritten requests.
    pub snat_ports: [u16; 2],
    /// Bytes of the innermost frame.
    pub frame: usize,
    /// Rounds through all rows.
    pub rounds: u32,
    /// Packets of each sample.
    pub repeat: u32,
}

/// The program under test.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// The kernel's hash of its instructions.
    pub tag: String,
    /// Instructions that the verifier walked.
    pub verified_instructions: Option<u32>,
    /// Bytes of instructions after the verifier.
    pub translated_bytes: Option<u32>,
    /// Bytes of machine code.
    pub machine_bytes: u32,
}

impl Conditions {
    /// Looks around.
    ///
    /// # Errors
    /// When the kernel does not describe the program.
    pub fn gather(
        rig: &Rig,
        sizes: &config::Maps,
        cpu: usize,
        rounds: u32,
        repeat: u32,
    ) -> Result<Self, BenchError> {
        let info = rig.info()?;
        Ok(Self {
            sluice: env!("CARGO_PKG_VERSION"),
            host: gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_else(|_| "?".to_owned()),
            cpu: cpu_model(),
            cpus: aya::util::nr_cpus().unwrap_or_default(),
            measured_on: cpu,
            arch: std::env::consts::ARCH,
            kernel: format!(
                "{} {}",
                text("/proc/sys/kernel/osrelease"),
                text("/proc/sys/kernel/version")
            ),
            governor: read(&format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")),
            jit: format!(
                "enabled {}, hardened {}",
                text("/proc/sys/net/core/bpf_jit_enable"),
                text("/proc/sys/net/core/bpf_jit_harden")
            ),
            bpf_stats: text("/proc/sys/kernel/bpf_stats_enabled"),
            load: text("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
            mitigations: mitigations(),
            program: Program {
                tag: format!("{:016x}", info.tag()),
                verified_instructions: info.verified_instruction_count(),
                translated_bytes: info.size_translated(),
                machine_bytes: info.size_jitted(),
            },
            maps: shapes(sizes).iter().map(|s| (s.name, s.max_entries)).collect(),
            mode: if rig.settings().flags & sluice_abi::settings_flags::REPLACE != 0 {
                "replace"
            } else {
                "accelerate"
            },
            snat_ports: [rig.settings().snat_first_port, rig.settings().snat_last_port],
            frame: super::packet::FRAME_LEN,
            rounds,
            repeat,
        })
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn text(path: &str) -> String {
    read(path).unwrap_or_else(|| "?".to_owned())
}

/// The first line of `/proc/cpuinfo` that says what the processor is; the words differ by
/// architecture.
fn cpu_model() -> String {
    let info = text("/proc/cpuinfo");
    for key in ["model name", "Model", "CPU part"] {
        let line = info.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        });
        if let Some(model) = line {
            return model;
        }
    }
    "?".to_owned()
}

/// All but those that do not concern this processor.
fn mitigations() -> BTreeMap<String, String> {
    let Ok(files) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return BTreeMap::new();
    };
    files
        .flatten()
        .filter_map(|file| {
            let state = read(&file.path().to_string_lossy())?;
            (state != "Not affected")
                .then(|| (file.file_name().to_string_lossy().into_owned(), state))
        })
        .collect()
}
