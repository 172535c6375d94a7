//! `sluice run` on a node: its configuration, start, readiness and JSON.
//!
//! The agent is a child process of whoever made the lab and is met only through its command line,
//! as on a real node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use serde::Deserialize;
use serde_json::Value;

use crate::plan::{NodePlan, UPLINK, VXLAN_DEVICE};
use crate::preflight::is_bpffs;
use crate::process::ProcessId;
use crate::{Lab, LabContext, LabError, Mode, interrupt};

/// How long an agent may take to load its programs and to program a lab's objects.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// What an agent shall do.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// How it attaches to the uplink.
    pub mode: Mode,
    /// Directory with its Kubernetes objects.
    pub objects: PathBuf,
    /// Further lines for its configuration file, as whole TOML tables.
    pub extra_config: String,
}

/// A running agent.
#[derive(Clone, Debug)]
pub struct RunningAgent {
    /// Its process.
    pub process: ProcessId,
    /// The node it works on.
    pub node: String,
    /// Its configuration file.
    pub config: PathBuf,
}

/// What `sluice status --output json` says; fields that are not needed here are left out.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Every source has been read and programmed, and the programs are attached.
    #[serde(default)]
    pub ready: bool,
    /// Why not.
    #[serde(default)]
    pub not_ready: Vec<String>,
    /// Process id of the agent that says so; zero if it does not tell.
    #[serde(default)]
    pub pid: i32,
    /// The rest, for whoever wants it.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

impl Status {
    /// The attach mode of an uplink, as the agent names it.
    pub fn mode(&self, uplink: &str) -> Option<&str> {
        match self.rest.get("mode")? {
            Value::String(mode) => Some(mode),
            modes => modes.get(uplink)?.as_str(),
        }
    }
}

/// What `sluice counters --output json` says.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Counters {
    /// One entry per reason.
    #[serde(default)]
    pub reasons: Vec<ReasonCount>,
    /// One entry per Service port.
    #[serde(default)]
    pub services: Vec<ServiceCount>,
}

/// Packets that ended with one reason at one hook, over all CPUs.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ReasonCount {
    /// Where: XDP or one of TC's directions.
    #[serde(default)]
    pub hook: String,
    /// The reason's snake-case name.
    pub reason: String,
    /// `pass`, `drop` or `forward`.
    #[serde(default)]
    pub verdict: String,
    /// Packets.
    #[serde(default)]
    pub packets: u64,
    /// Bytes.
    #[serde(default)]
    pub bytes: u64,
}

/// Packets of one Service port, over all CPUs.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceCount {
    /// `namespace/name:port`.
    pub service: String,
    /// Packets from clients.
    #[serde(default)]
    pub forward_packets: u64,
    /// Packets from endpoints.
    #[serde(default)]
    pub reply_packets: u64,
}

impl Lab {
    /// Writes a node's configuration and starts `sluice run` there; does not wait for it.
    ///
    /// # Errors
    /// There is no such node, or the executable cannot be started.
    pub fn start_agent(
        &mut self,
        node: &str,
        options: &AgentOptions,
    ) -> Result<RunningAgent, LabError> {
        let host = self.host(node)?;
        let plan = self.plan().nodes.iter().find(|plan| plan.name == node);
        let plan = plan.ok_or_else(|| LabError::NoHost {
            lab: self.name().to_string(),
            host: node.to_owned(),
            known: "no such node".to_owned(),
        })?;
        let text = node_config(self, plan, options);
        let run_dir = self.run_dir(node);
        fs::create_dir_all(&run_dir)
            .map_err(LabError::io(format!("create {}", run_dir.display())))?;
        self.make_pin_dir(node)?;
        let config = self.agent_config(node);
        fs::write(&config, text).map_err(LabError::io(format!("write {}", config.display())))?;
        let mut command = Command::new(&self.context().sluice);
        command.arg("run").arg("--config").arg(&config);
        let process = self.spawn(&host, "sluice run", &mut command)?;
        Ok(RunningAgent { process, node: node.to_owned(), config })
    }

    /// The configuration file of a node's agent.
    pub fn agent_config(&self, node: &str) -> PathBuf {
        self.dir().join(format!("{node}.toml"))
    }

    /// Makes [`Lab::pin_dir`] of a node, and mounts the BPF file system where none is.
    ///
    /// # Errors
    /// No BPF file system can be mounted.
    pub fn make_pin_dir(&self, node: &str) -> Result<PathBuf, LabError> {
        mount_bpffs(self.context())?;
        let pins = self.pin_dir(node);
        let mut made = fs::create_dir_all(&pins);
        // Another lab's end may remove the empty parent at any moment.
        for _ in 0..5 {
            if made.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
                made = fs::create_dir_all(&pins);
            }
        }
        made.map_err(LabError::io(format!("create {}", pins.display())))?;
        Ok(pins)
    }

    fn run_dir(&self, node: &str) -> PathBuf {
        self.dir().join(node)
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// It ended, or was not ready in time; the message holds the end of its log.
    pub fn wait_ready(&self, agent: &RunningAgent) -> Result<Status, LabError> {
        let start = Instant::now();
        let mut waits_for = String::new();
        loop {
            interrupt::check()?;
            if !agent.process.is_alive() {
                return Err(self.agent_error(agent, "ended"));
            }
            match self.agent_status(&agent.node) {
                // What an earlier agent wrote says nothing of this one.
                Ok(status) if ![0, agent.process.pid].contains(&status.pid) => {}
                Ok(status) if status.ready => return Ok(status),
                Ok(status) => waits_for = format!(" ({})", status.not_ready.join("; ")),
                // It answers with an error as long as it has written no status.
                Err(error @ (LabError::Command { .. } | LabError::Format { .. })) => {
                    waits_for = format!(" ({error})");
                }
                Err(error) => return Err(error),
            }
            if start.elapsed() > READY_LIMIT {
                let seconds = READY_LIMIT.as_secs();
                let message = format!("was not ready after {seconds} s{waits_for}");
                return Err(self.agent_error(agent, &message));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn agent_error(&self, agent: &RunningAgent, message: &str) -> LabError {
        let log = self.log_path(&agent.node, "sluice run");
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n  ");
        LabError::Process {
            process: "sluice run".to_owned(),
            host: agent.node.clone(),
            message: format!("{message}; the end of its output:\n  {tail}"),
            log,
        }
    }

    /// Runs a `sluice` command on a node with that node's configuration and returns what it
    /// printed.
    ///
    /// # Errors
    /// It failed.
    pub fn sluice(&self, node: &str, args: &[&str]) -> Result<String, LabError> {
        let output = self.sluice_output(node, args)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            command: format!("sluice {}", args.join(" ")),
            host: node.to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// The same, whatever the exit status.
    ///
    /// # Errors
    /// The executable cannot be started.
    pub fn sluice_output(&self, node: &str, args: &[&str]) -> Result<Output, LabError> {
        let mut command = Command::new(&self.context().sluice);
        command.args(args).arg("--config").arg(self.agent_config(node));
        self.host(node)?.netns.output(&mut command)
    }

    /// `sluice status` of a node.
    ///
    /// # Errors
    /// As [`Lab::sluice`], or the answer is not what this version reads.
    pub fn agent_status(&self, node: &str) -> Result<Status, LabError> {
        let output = self.sluice_output(node, &["status", "--output", "json"])?;
        // The exit status says "not ready" as well, with an answer that says why.
        let status = parse("sluice status", &String::from_utf8_lossy(&output.stdout));
        status.map_err(|error| match output.status.success() {
            true => error,
            false => LabError::Command {
                command: "sluice status".to_owned(),
                host: node.to_owned(),
                message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            },
        })
    }

    /// `sluice counters` of a node.
    ///
    /// # Errors
    /// As [`Lab::agent_status`].
    pub fn agent_counters(&self, node: &str) -> Result<Counters, LabError> {
        parse("sluice counters", &self.sluice(node, &["counters", "--output", "json"])?)
    }
}

impl Counters {
    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut delta = self.clone();
        for count in &mut delta.reasons {
            let same =
                |old: &&ReasonCount| (&old.hook, &old.reason) == (&count.hook, &count.reason);
            let old = earlier.reasons.iter().find(same).cloned().unwrap_or_default();
            count.packets = count.packets.saturating_sub(old.packets);
            count.bytes = count.bytes.saturating_sub(old.bytes);
        }
        for count in &mut delta.services {
            let same = |old: &&ServiceCount| old.service == count.service;
            let old = earlier.services.iter().find(same).cloned().unwrap_or_default();
            count.forward_packets = count.forward_packets.saturating_sub(old.forward_packets);
            count.reply_packets = count.reply_packets.saturating_sub(old.reply_packets);
        }
        delta
    }

    /// Packets that ended with a reason of that name, at all hooks.
    pub fn reason(&self, name: &str) -> u64 {
        self.reasons.iter().filter(|r| r.reason == name).map(|r| r.packets).sum()
    }

    /// Packets of a Service port, from clients and from endpoints. The port is named or numbered
    /// in the counters, as the Service has it.
    pub fn service_port(&self, service: &str, port_name: &str, port: u16) -> (u64, u64) {
        let port = port.to_string();
        let is_it = |name: &str| {
            name.rsplit_once(':')
                .is_some_and(|(of, at)| of == service && (at == port_name || at == port))
        };
        self.services.iter().filter(|s| is_it(&s.service)).fold((0, 0), |(forward, reply), s| {
            (forward + s.forward_packets, reply + s.reply_packets)
        })
    }
}

fn parse<T: for<'de> Deserialize<'de>>(command: &str, text: &str) -> Result<T, LabError> {
    serde_json::from_str(text).map_err(|e| LabError::Format {
        path: PathBuf::from(format!("{command} --output json")),
        message: e.to_string(),
    })
}

/// The configuration of a node's agent. The lab has no kube-proxy, so the agent replaces it.
fn node_config(lab: &Lab, node: &NodePlan, options: &AgentOptions) -> String {
    format!(
        "node_name = {name}\npin_dir = {pins}\nrun_dir = {run}\n\n\
         [source]\nkind = \"file\"\npath = {objects}\n\n\
         [datapath]\nuplinks = [\"{UPLINK}\"]\ntunnel_devices = [\"{VXLAN_DEVICE}\"]\n\
         mode = \"{mode}\"\nbehaviour = \"replace\"\n\n{extra}",
        name = quoted(Path::new(&node.name)),
        pins = quoted(&lab.pin_dir(&node.name)),
        run = quoted(&lab.run_dir(&node.name)),
        objects = quoted(&options.objects),
        mode = options.mode,
        extra = options.extra_config,
    )
}

/// A TOML string; Rust's notation of a printable text is a legal one.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.to_string_lossy())
}

/// Mounts the BPF file system where none is. Under a lock: a second mount would hide the pins in
/// the first.
fn mount_bpffs(context: &LabContext) -> Result<(), LabError> {
    let target = context.bpffs_mount();
    if is_bpffs(target) {
        return Ok(());
    }
    let what = || format!("mount a BPF file system at {}", target.display());
    let lock = fs::File::open(target).map_err(LabError::io(what()))?;
    lock.lock().map_err(LabError::io(what()))?;
    if is_bpffs(target) {
        return Ok(());
    }
    mount(Some("bpf"), target, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(LabError::errno(what()))
}
