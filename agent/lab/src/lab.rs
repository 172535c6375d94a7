//! A lab in being: made, used, left running, found again, removed.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::plan::{Plan, netns_prefix};
use crate::process::{self, ProcessId};
use crate::state::{LabState, LabSummary, ProcessState};
use crate::{LabContext, LabError, LabName, LabSpec, Netns, interrupt, topology};

/// How long a process of the lab may take to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// A lab that this program made or found. One that it made is removed when the value is dropped,
/// unless [`Lab::leave_running`] was called.
#[derive(Debug)]
pub struct Lab {
    context: LabContext,
    state: LabState,
    plan: Plan,
    children: Vec<Child>,
    remove_on_drop: bool,
}

/// One host of a lab: a name and a namespace to work in.
#[derive(Clone, Debug)]
pub struct Host {
    /// `fabric`, `client`, `node1`, or a pod's name.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
}

impl Lab {
    /// Makes a lab and starts the servers in its pods; no agent is started (see
    /// [`Lab::start_agent`]). On any error, and on a signal that [`interrupt`] took, what was made
    /// is removed again.
    ///
    /// # Errors
    /// The specification is out of range, the name is taken, or the machine refuses something.
    pub fn up(context: &LabContext, spec: &LabSpec) -> Result<Self, LabError> {
        spec.check()?;
        let (state, plan) = claim(context, spec)?;
        let lab = Self {
            context: context.clone(),
            state,
            plan,
            children: Vec::new(),
            remove_on_drop: true,
        };
        lab.build()
    }

    /// From here on a return with an error drops the value, which removes the lab.
    fn build(mut self) -> Result<Self, LabError> {
        for (_, netns) in self.plan.hosts() {
            interrupt::check()?;
            netns.create()?;
        }
        topology::build(&self.plan, &self.state.spec)?;
        if self.state.spec.servers {
            self.start_servers()?;
        }
        Ok(self)
    }

    /// Finds a lab that is up: by name, or the only one there is. It is not removed on drop.
    ///
    /// # Errors
    /// There is none, or several and no name.
    pub fn find(context: &LabContext, name: Option<&LabName>) -> Result<Self, LabError> {
        let name = match name {
            Some(name) => name.clone(),
            None => match labs(context).as_slice() {
                [] => return Err(LabError::NoLab("(any)".to_owned())),
                [only] => only.parse()?,
                several => return Err(LabError::Ambiguous(several.join(", "))),
            },
        };
        let state = LabState::load(context, name.as_str())?
            .ok_or_else(|| LabError::NoLab(name.to_string()))?;
        let plan = Plan::new(&name, &state.spec);
        Ok(Self {
            context: context.clone(),
            state,
            plan,
            children: Vec::new(),
            remove_on_drop: false,
        })
    }

    /// Its name.
    pub fn name(&self) -> &LabName {
        &self.state.name
    }

    /// What it was made from.
    pub fn spec(&self) -> &LabSpec {
        &self.state.spec
    }

    /// Its names and addresses.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The context it was made with.
    pub fn context(&self) -> &LabContext {
        &self.context
    }

    /// Its directory, for logs and configuration; removed with it.
    pub fn dir(&self) -> PathBuf {
        self.context.lab_dir(self.state.name.as_str())
    }

    /// Where a node's agent pins its maps and links; removed with the lab.
    pub fn pin_dir(&self, node: &str) -> PathBuf {
        self.context.pin_root(self.state.name.as_str()).join(node)
    }

    /// A host by name.
    ///
    /// # Errors
    /// [`LabError::NoHost`].
    pub fn host(&self, name: &str) -> Result<Host, LabError> {
        let hosts = self.plan.hosts();
        let found = hosts.iter().find(|(host, _)| *host == name);
        found
            .map(|(host, netns)| Host { name: (*host).to_owned(), netns: (*netns).clone() })
            .ok_or_else(|| LabError::NoHost {
                lab: self.state.name.to_string(),
                host: name.to_owned(),
                known: hosts.iter().map(|(host, _)| *host).collect::<Vec<_>>().join(", "),
            })
    }

    /// The client.
    pub fn client(&self) -> Host {
        Host { name: "client".to_owned(), netns: self.plan.client.netns.clone() }
    }

    /// Starts a process on a host in the background. It is recorded and ends with the lab; its
    /// output goes to `log_path`. Its own process group keeps a Ctrl-C at the terminal from it.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(
        &mut self,
        host: &Host,
        what: &str,
        command: &mut Command,
    ) -> Result<ProcessId, LabError> {
        let log = self.log(host, what)?;
        command.stdin(Stdio::null()).stderr(log.1);
        command.stdout(log.0);
        self.spawn_as_is(host, what, command).map(|(id, _)| id)
    }

    /// As [`Lab::spawn`], with standard streams as the command has them.
    fn spawn_as_is(
        &mut self,
        host: &Host,
        what: &str,
        command: &mut Command,
    ) -> Result<(ProcessId, Option<std::process::ChildStdout>), LabError> {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
        let mut child = host.netns.spawn(command)?;
        let stdout = child.stdout.take();
        let pid = i32::try_from(child.id()).unwrap_or(-1);
        // A child of ours that has ended still has its entry until we collect it.
        let id = ProcessId::of(pid).unwrap_or(ProcessId { pid, start_time: 0 });
        self.children.push(child);
        self.state.processes.push(ProcessState {
            id,
            what: what.to_owned(),
            host: host.name.clone(),
        });
        self.state.save(&self.context)?;
        Ok((id, stdout))
    }

    /// Ends a process that [`Lab::spawn`] started, gently first.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn stop(&mut self, id: ProcessId) -> Result<(), LabError> {
        process::end(&[id], GRACE);
        self.forget(id)
    }

    /// Kills such a process with SIGKILL, as a crash would.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn kill(&mut self, id: ProcessId) -> Result<(), LabError> {
        id.signal(nix::sys::signal::Signal::SIGKILL);
        process::end(&[id], GRACE);
        self.forget(id)
    }

    fn forget(&mut self, id: ProcessId) -> Result<(), LabError> {
        self.state.processes.retain(|p| p.id != id);
        for child in &mut self.children {
            // Collects it if it is the one; no error says anything that matters here.
            let _ = child.try_wait();
        }
        self.state.save(&self.context)
    }

    /// Where the output of a process goes.
    pub fn log_path(&self, host: &str, what: &str) -> PathBuf {
        self.dir().join(format!("{host}.{}.log", what.replace(' ', "-")))
    }

    fn log(&self, host: &Host, what: &str) -> Result<(File, File), LabError> {
        let path = self.log_path(&host.name, what);
        let open = OpenOptions::new().create(true).append(true).open(&path);
        open.and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(LabError::io(format!("open {}", path.display())))
    }

    /// One server process per pod; returns when all of them listen.
    fn start_servers(&mut self) -> Result<(), LabError> {
        let mut waiting = Vec::new();
        let pods: Vec<_> = self
            .plan
            .nodes
            .iter()
            .flat_map(|node| node.pods.iter().map(|pod| (node.name.clone(), pod.clone())))
            .collect();
        for (node, pod) in pods {
            if pod.spec.tcp_ports.is_empty() && pod.spec.udp_ports.is_empty() {
                continue;
            }
            interrupt::check()?;
            let host = Host { name: pod.name.clone(), netns: pod.netns.clone() };
            let (_, log) = self.log(&host, "serve")?;
            let mut command = Command::new(&self.context.sluice);
            command.args(["lab", "serve", "--pod", &pod.name, "--node", &node]);
            for port in &pod.spec.tcp_ports {
                command.args(["--tcp", &port.to_string()]);
            }
            for port in &pod.spec.udp_ports {
                command.args(["--udp", &port.to_string()]);
            }
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
            let (_, stdout) = self.spawn_as_is(&host, "serve", &mut command)?;
            waiting.push((host, stdout));
        }
        for (host, stdout) in waiting {
            let mut line = String::new();
            if let Some(stdout) = stdout {
                BufReader::new(stdout)
                    .read_line(&mut line)
                    .map_err(LabError::io(format!("wait for the server of {}", host.name)))?;
            }
            if line.trim() != crate::serve::READY {
                let log = self.log_path(&host.name, "serve");
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Err(LabError::Process {
                    process: "sluice lab serve".to_owned(),
                    host: host.name,
                    message: format!("did not come up: {}", said.trim()),
                    log,
                });
            }
        }
        Ok(())
    }

    /// The lab stays when this value goes; `sluice lab down` removes it.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn leave_running(mut self) -> Result<(), LabError> {
        self.state.left_running = true;
        self.state.save(&self.context)?;
        self.remove_on_drop = false;
        Ok(())
    }

    /// Removes the lab and everything in it.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn down(mut self) -> Result<(), LabError> {
        self.remove_on_drop = false;
        clean(&self.context, &self.state.name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.remove_on_drop {
            return;
        }
        if let Err(error) = clean(&self.context, &self.state.name) {
            eprintln!("lab {}: {error}", self.state.name);
        }
    }
}

impl Host {
    /// Runs a command that must succeed and returns what it printed; see [`Netns::run`].
    ///
    /// # Errors
    /// As [`Netns::run`].
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String, LabError> {
        self.netns.run(program, args)
    }
}

/// Names of all labs on this machine: those with a directory and those with namespaces only.
pub fn labs(context: &LabContext) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(&context.run_root)
        .map(|entries| {
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
        })
        .unwrap_or_default();
    for netns in Netns::with_prefix("slab-") {
        if let Some(lab) =
            netns.name().strip_prefix("slab-").and_then(|rest| rest.split('-').next())
        {
            names.push(lab.to_owned());
        }
    }
    names.retain(|name| name.parse::<LabName>().is_ok());
    names.sort_unstable();
    names.dedup();
    names
}

/// What [`labs`] are, for people and programs.
///
/// # Errors
/// A state file cannot be read.
pub fn summaries(context: &LabContext) -> Result<Vec<LabSummary>, LabError> {
    labs(context)
        .into_iter()
        .map(|name| {
            Ok(match LabState::load(context, &name)? {
                Some(state) => state.summary(),
                None => LabSummary {
                    hosts: Netns::with_prefix(&format!("slab-{name}-"))
                        .iter()
                        .filter_map(|n| n.name().splitn(3, '-').nth(2).map(str::to_owned))
                        .collect(),
                    name,
                    state: "no record",
                    processes: 0,
                },
            })
        })
        .collect()
}

/// Removes a lab by its state file and by its name: processes, pins, namespaces (and with them
/// devices), directories. Works on what a crash left at any point, and on a lab that is not there.
///
/// # Errors
/// The first thing that could not be removed, after everything else was.
pub fn clean(context: &LabContext, name: &LabName) -> Result<(), LabError> {
    // A state file that cannot be read must not keep the rest from being removed.
    let state = LabState::load(context, name.as_str()).ok().flatten();
    let mut namespaces = Netns::with_prefix(&netns_prefix(name));
    for recorded in state.iter().flat_map(|state| &state.namespaces) {
        let netns = Netns::named(recorded);
        if !namespaces.contains(&netns) {
            namespaces.push(netns);
        }
    }
    let identities: Vec<_> = namespaces.iter().filter_map(Netns::identity).collect();
    let mut processes: Vec<ProcessId> =
        state.iter().flat_map(|state| &state.processes).map(|p| p.id).collect();
    for id in process::inside(&identities) {
        if !processes.contains(&id) {
            processes.push(id);
        }
    }
    let mut failed = Vec::new();
    for survivor in process::end(&processes, GRACE) {
        failed.push(LabError::Io {
            what: format!("end process {} of lab {name}", survivor.pid),
            source: io::Error::from(io::ErrorKind::TimedOut),
        });
    }
    let mut keep = |result: Result<(), LabError>| failed.extend(result.err());
    keep(remove_tree(&context.pin_root(name.as_str())));
    for netns in &namespaces {
        keep(netns.remove());
    }
    keep(remove_tree(&context.lab_dir(name.as_str())));
    // The shared parents go with the last lab; `sluice run` may keep files beside ours.
    let parents = [Some(context.bpffs_root.as_path()), Some(&context.run_root)];
    for parent in parents.into_iter().chain([context.run_root.parent()]).flatten() {
        // Only an empty one can be removed.
        let _ = fs::remove_dir(parent);
    }
    failed.into_iter().next().map_or(Ok(()), Err)
}

/// Removes every lab whose maker died before it was finished, and returns their names.
///
/// # Errors
/// As [`clean`].
pub fn clean_stale(context: &LabContext) -> Result<Vec<String>, LabError> {
    let mut removed = Vec::new();
    for summary in summaries(context)? {
        if summary.state == "left over" {
            clean(context, &summary.name.parse()?)?;
            removed.push(summary.name);
        }
    }
    Ok(removed)
}

fn remove_tree(path: &Path) -> Result<(), LabError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(LabError::io(format!("remove {}", path.display()))(e)),
    }
}

/// Takes a name by putting its directory, with the state file inside, in place: a rename onto a
/// directory that holds something fails, so only one can do it, and a lab is never without its
/// record. What a dead maker left under a wanted name is removed first.
fn claim(context: &LabContext, spec: &LabSpec) -> Result<(LabState, Plan), LabError> {
    if let Some(name) = &spec.name {
        let left_over = match LabState::load(context, name.as_str()) {
            Ok(Some(state)) => state.is_left_over(),
            Ok(None) => !Netns::with_prefix(&netns_prefix(name)).is_empty(),
            Err(_) => true,
        };
        if left_over {
            if context.talk {
                eprintln!("lab {name}: removing what an earlier run left over");
            }
            clean(context, name)?;
        }
        return try_claim(context, spec, name.clone())?
            .ok_or_else(|| LabError::Exists(name.to_string()));
    }
    loop {
        let name: LabName = random_name().parse()?;
        if !Netns::with_prefix(&netns_prefix(&name)).is_empty() {
            continue;
        }
        if let Some(claimed) = try_claim(context, spec, name)? {
            return Ok(claimed);
        }
    }
}

/// Nothing if somebody else has the name.
fn try_claim(
    context: &LabContext,
    spec: &LabSpec,
    name: LabName,
) -> Result<Option<(LabState, Plan)>, LabError> {
    let spec = LabSpec { name: Some(name.clone()), ..spec.clone() };
    let plan = Plan::new(&name, &spec);
    let state = LabState {
        owner: ProcessId::own(),
        left_running: false,
        namespaces: plan.hosts().iter().map(|(_, n)| n.name().to_owned()).collect(),
        spec,
        processes: Vec::new(),
        name,
    };
    let dir = context.lab_dir(state.name.as_str());
    let refused = |e| LabError::io(format!("create {}", dir.display()))(e);
    // Another lab's end may remove the empty parent at any moment, hence several tries.
    let mut tries = 0;
    loop {
        let draft = context.run_root.join(format!(".{}.{}", state.name, random_name()));
        let placed = fs::create_dir_all(&draft)
            .and_then(|()| state.save_in(&draft))
            .and_then(|()| fs::rename(&draft, &dir));
        match placed {
            Ok(()) => return Ok(Some((state, plan))),
            Err(e) => {
                // Gone already if the parent was removed.
                let _ = fs::remove_dir_all(&draft);
                tries += 1;
                match e.kind() {
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                        return Ok(None);
                    }
                    io::ErrorKind::NotFound if tries < 5 => {}
                    _ => return Err(refused(e)),
                }
            }
        }
    }
}

/// Four characters that are told apart in every font.
fn random_name() -> String {
    const LETTERS: &[u8] = b"abcdefghkmnpqrstuvwxyz23456789";
    // The standard library seeds each of these from the system's random numbers.
    let mut bits = RandomState::new().build_hasher().finish() as usize;
    (0..4)
        .map(|_| {
            let letter = LETTERS[bits % LETTERS.len()];
            bits /= LETTERS.len();
            char::from(letter)
        })
        .collect()
}
