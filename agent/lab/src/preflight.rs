//! What this machine lacks for the lab, and what would lift it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use crate::LabContext;
use crate::pass::PassProgram;

/// One thing that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is missing, with the system's words.
    pub lacks: String,
    /// What would lift it.
    pub remedy: String,
}

impl Finding {
    fn new(lacks: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { lacks: lacks.into(), remedy: remedy.into() }
    }

    /// Findings as text, two lines each.
    pub fn lines(findings: &[Self]) -> String {
        findings.iter().fold(String::new(), |mut text, finding| {
            // Writing to a String does not fail.
            let _ = write!(text, "\n  - {}\n    {}", finding.lacks, finding.remedy);
            text
        })
    }
}

/// Capability bits of linux/capability.h with what the lab needs them for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "links, addresses and XDP attachments"),
    (13, "CAP_NET_RAW", "raw frames of probes"),
    (21, "CAP_SYS_ADMIN", "network namespaces and their mounts"),
    (39, "CAP_BPF", "BPF programs and maps"),
];

/// Looks for everything that the lab needs and returns what is missing: rights, tools, kernel
/// features (tried, not guessed from a version), bpffs.
pub fn check(context: &LabContext) -> Vec<Finding> {
    let mut findings = rights();
    tools(&mut findings);
    if !findings.is_empty() {
        // The trials below would only repeat it in other words.
        return findings;
    }
    kernel(&mut findings);
    if let Err(error) = PassProgram::load() {
        findings.push(Finding::new(
            error.to_string(),
            "a kernel with CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT; in a container: --privileged, \
             and no seccomp profile that refuses bpf(2)",
        ));
    }
    bpffs(context, &mut findings);
    findings
}

fn rights() -> Vec<Finding> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective >> bit & 1 == 0)
        .map(|(_, name, why)| {
            Finding::new(
                format!("{name} is missing ({why})"),
                "run as root (sudo); in a container: --privileged or --cap-add",
            )
        })
        .collect()
}

fn tools(findings: &mut Vec<Finding>) {
    for (tool, package) in [("ip", "iproute2"), ("bridge", "iproute2"), ("ethtool", "ethtool")] {
        let found = Command::new(tool)
            .arg(if tool == "ethtool" { "--version" } else { "-V" })
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if let Err(error) = found {
            findings.push(Finding::new(
                format!("the program `{tool}` cannot be started: {error}"),
                format!("install the package {package}; see that /usr/sbin is in PATH"),
            ));
        }
    }
}

/// Makes one device of each kind in a namespace that ends with its thread.
fn kernel(findings: &mut Vec<Finding>) {
    let trials = [
        ("veth", "CONFIG_VETH", "link add t0 type veth peer name t1"),
        ("bridge", "CONFIG_BRIDGE", "link add t2 type bridge"),
        ("vxlan", "CONFIG_VXLAN", "link add t3 type vxlan id 1 dstport 8472 local 192.0.2.1"),
    ];
    let outcome = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                    return vec![Finding::new(
                        format!("a new network namespace is refused: {}", errno.desc()),
                        "a kernel with CONFIG_NET_NS; in a container: --privileged",
                    )];
                }
                let mut missing: Vec<Finding> = trials
                    .iter()
                    .filter_map(|(kind, option, line)| {
                        let output = Command::new("ip").args(line.split(' ')).output().ok()?;
                        (!output.status.success()).then(|| {
                            let said = String::from_utf8_lossy(&output.stderr);
                            Finding::new(
                                format!("a {kind} device is refused: {}", said.trim()),
                                format!("`modprobe {kind}` on the host, or a kernel with {option}"),
                            )
                        })
                    })
                    .collect();
                if !Path::new("/proc/sys/net/ipv6").exists() {
                    missing.push(Finding::new(
                        "the kernel has no IPv6",
                        "a kernel with CONFIG_IPV6, without ipv6.disable=1 on its command line",
                    ));
                }
                missing
            })
            .join()
    });
    match outcome {
        Ok(missing) => findings.extend(missing),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn bpffs(context: &LabContext, findings: &mut Vec<Finding>) {
    let mount = context.bpffs_mount();
    let mounted = is_bpffs(mount);
    let supported = || {
        let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        kinds.lines().any(|line| line.split_whitespace().last() == Some("bpf"))
    };
    // Not mounted is no finding by itself: the lab mounts it where there is a place for it.
    let possible = mounted || (supported() && mount.is_dir());
    if !possible {
        findings.push(Finding::new(
            format!("no BPF file system at {} and none can be mounted there", mount.display()),
            "a kernel with CONFIG_BPF_SYSCALL and a mounted sysfs; in a container: \
             -v /sys/fs/bpf:/sys/fs/bpf",
        ));
    }
}

/// True if a BPF file system is mounted at exactly that path.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        // proc_pid_mounts: device, path, type, ...
        let mut words = line.split(' ').skip(1);
        words.next().map(Path::new) == Some(path) && words.next() == Some("bpf")
    })
}
