//! The agent works with the capabilities that the systemd unit names, and with what the documents
//! say of fewer. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "one harness for several suites")]
mod node;

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use node::{Node, in_namespace, sh};
use serde_json::Value;

/// Capabilities of the unit, as setpriv spells them.
fn of_the_unit() -> Vec<String> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd/sluice.service");
    let found: Vec<String> = std::fs::read_to_string(unit)
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet=CAP_"))
        .map(str::to_lowercase)
        .collect();
    assert!(found.contains(&"net_admin".to_owned()), "{found:?}");
    found
}

/// A node with one uplink and nothing to serve.
struct Instance {
    dir: tempfile::TempDir,
}

impl Instance {
    fn new(node: &Node) -> Self {
        sh("ip link set lo up
            ip link add up0 type veth peer name far; ip link set up0 up; ip link set far up
            ip addr add 192.168.9.1/24 dev up0");
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("objects")).unwrap();
        let config = format!(
            "node_name = 'node-a'\npin_dir = '{}'\nrun_dir = '{dir}/run'\n\
             [source]\npath = '{dir}/objects'\n[datapath]\nuplinks = ['up0']\n\
             [maps]\nflow_sets = 4\nmaglev = 100000\n",
            node.pin_dir.display(),
            dir = dir.path().display(),
        );
        std::fs::write(dir.path().join("sluice.toml"), config).unwrap();
        Self { dir }
    }

    /// `sluice` with these capabilities and no way to others, as in the unit.
    fn sluice(&self, capabilities: &[String], args: &[&str]) -> Command {
        let set: String = capabilities.iter().map(|c| format!(",+{c}")).collect();
        let mut command = Command::new("setpriv");
        command
            .args(["--no-new-privs", "--inh-caps=-all", &format!("--bounding-set=-all{set}")])
            .arg(env!("CARGO_BIN_EXE_sluice"))
            .args(args)
            .arg("--config")
            .arg(self.dir.path().join("sluice.toml"));
        command
    }

    /// Runs the agent until it is ready and stops it; returns the status and its log.
    fn ready(&self, capabilities: &[String]) -> (Value, String) {
        let mut agent: Child =
            self.sluice(capabilities, &["run"]).stderr(Stdio::piped()).spawn().unwrap();
        let patience = Instant::now() + Duration::from_secs(30);
        let status = loop {
            let output = self.sluice(capabilities, &["status", "--output", "json"]).output();
            let status: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap_or_default();
            let ended = agent.try_wait().unwrap();
            // Until the new agent writes its own, the status is its predecessor's.
            let ready = status["ready"] == true && status["pid"] == agent.id();
            if ready || ended.is_some() || Instant::now() > patience {
                break status;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(agent.id().cast_signed()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        let output: Output = agent.wait_with_output().unwrap();
        (status, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn capabilities_of_the_unit_suffice_and_links_are_taken_over() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let capabilities = of_the_unit();
        for start in 0..2 {
            let (status, log) = instance.ready(&capabilities);
            assert_eq!(status["ready"], true, "{status:#}\n{log}");
            assert_eq!(status["mode"]["up0"], "native", "{status:#}");
            assert!(!log.contains("link not taken over"), "start {start}: {log}");
        }
    });
}

/// What the unit's comment says of CAP_SYS_ADMIN.
#[test]
fn without_sys_admin_tc_links_are_replaced_and_the_rest_works() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let mut capabilities = of_the_unit();
        capabilities.retain(|c| c != "sys_admin");
        for replaced in [false, true] {
            let (status, log) = instance.ready(&capabilities);
            assert_eq!(status["ready"], true, "{status:#}\n{log}");
            assert_eq!(log.contains("link not taken over"), replaced, "{log}");
        }
    });
}

/// Each of the others is needed: without it the agent does not start.
#[test]
fn without_one_of_the_other_capabilities_the_agent_says_so_and_ends() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        for missing in ["bpf", "net_admin", "perfmon"] {
            let mut capabilities = of_the_unit();
            capabilities.retain(|c| c != "sys_admin" && c != missing);
            let output = instance.sluice(&capabilities, &["run"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{missing}: {text}");
            assert!(text.contains("sluice: load "), "{missing}: {text}");
        }
    });
}
