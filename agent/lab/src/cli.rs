//! `sluice lab ...`: arguments, and what each command prints.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

use crate::agent::AgentOptions;
use crate::demo::{self, DemoOptions};
use crate::lab::summaries;
use crate::plan::{CLIENT_V4, CLIENT_V6};
use crate::progress::Progress;
use crate::serve::ServeArgs;
use crate::{
    Agent, Family, Lab, LabContext, LabError, LabName, LabSpec, Mode, RpFilter, clean, clean_stale,
    interrupt, labs, preflight, serve, shop, traffic,
};

/// A cluster of network namespaces on this machine: nodes, pods, a client, VXLAN between the nodes.
///
/// Needs root. Several labs at once do not disturb each other, and nothing outside their namespaces
/// is touched.
#[derive(Debug, Args)]
pub struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make a lab and leave it running.
    Up(UpArgs),
    /// Show the main job end to end: a shop behind `sluice run`, traffic of every kind, PASS or FAIL.
    ///
    /// Makes a lab of two nodes, runs the agent on node1 (the other node is the kernel alone),
    /// sends TCP and UDP over IPv4 and IPv6 from outside to NodePorts and LoadBalancer addresses
    /// and between pods of both nodes, holds every packet against the datapath's counters, and
    /// removes the lab. Exit status 0 only on PASS.
    Demo(DemoArgs),
    /// Remove a lab and everything in it.
    Down(DownArgs),
    /// Open a shell (or run a command) on a host of a lab.
    Shell(ShellArgs),
    /// Ask a pod or a Service from a host of a lab and show which pods answer.
    Probe(ProbeArgs),
    /// Show the labs of this machine.
    List(ListArgs),
    /// Serve HTTP and a UDP echo: what runs in a pod.
    #[command(hide = true)]
    Serve(ServeArgs),
}

#[derive(Debug, Args)]
struct UpArgs {
    /// Name of the lab: lower-case letters and digits. A short random one if not given.
    #[arg(long)]
    name: Option<LabName>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// What works on node1 beside the kernel; the other nodes are always the kernel alone.
    #[arg(long, value_enum, default_value = "auto")]
    agent: AgentArg,
    /// Number of nodes; with the shop's pods it is 2.
    #[arg(long, value_name = "N", requires = "pods")]
    nodes: Option<usize>,
    /// This many plain pods on each node, in place of the shop's.
    #[arg(long, value_name = "N")]
    pods: Option<usize>,
    /// Directory with Kubernetes objects for the agent. Without it: the shop's, or the Nodes alone
    /// with --pods.
    #[arg(long, value_name = "DIR")]
    objects: Option<PathBuf>,
    /// Stay in the foreground; the lab is removed when this command is ended.
    #[arg(long)]
    hold: bool,
    /// How to print the hosts.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

/// What the network of a lab looks like.
#[derive(Debug, Args)]
struct ShapeArgs {
    /// Family of the tunnel's outer header.
    #[arg(long, value_enum, default_value = "v4")]
    underlay: Family,
    /// VXLAN network identifier.
    #[arg(long, default_value_t = 1)]
    vni: u32,
    /// UDP port of the tunnel: 8472 as Flannel, 4789 as RFC 7348.
    #[arg(long, default_value_t = 8472, value_name = "PORT")]
    vxlan_port: u16,
    /// Reverse path filter of the nodes: off, strict, loose.
    #[arg(long, value_enum, default_value = "0")]
    rp_filter: RpFilter,
    /// MTU of the client's interface, bytes.
    #[arg(long, default_value_t = 1450, value_name = "BYTES")]
    client_mtu: u16,
    /// Leave GRO off at the pods' interfaces: frames that XDP redirects into a pod are then lost.
    #[arg(long)]
    no_pod_gro: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum AgentArg {
    /// The kernel alone.
    None,
    /// `sluice run`, XDP in the driver.
    Native,
    /// `sluice run`, XDP on the kernel's packet buffer.
    Generic,
    /// `sluice run` without XDP, at TC.
    Tc,
    /// `sluice run`, mode chosen by it.
    Auto,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// Name of the lab; a short random one if not given.
    #[arg(long)]
    name: Option<LabName>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Attach mode; may be repeated. Without it: native, then generic.
    #[arg(long = "mode", value_enum, value_name = "MODE")]
    modes: Vec<Mode>,
    /// How to print the result.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// Take the programs off before the traffic, to see that the outcome is FAIL.
    #[arg(long, hide = true)]
    detach: bool,
}

#[derive(Debug, Args)]
struct DownArgs {
    /// Which lab; the only one if not given.
    #[arg(long)]
    name: Option<LabName>,
    /// All labs of this machine, whoever made them.
    #[arg(long, conflicts_with = "name")]
    all: bool,
    /// Only labs whose maker died before they were finished.
    #[arg(long, conflicts_with_all = ["name", "all"])]
    stale: bool,
}

#[derive(Debug, Args)]
struct ShellArgs {
    /// The host: client, fabric, node1, a pod's name.
    host: String,
    /// Which lab; the only one if not given.
    #[arg(long)]
    name: Option<LabName>,
    /// A command with its arguments in place of the shell.
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct ProbeArgs {
    /// The host that asks: client, node1, a pod's name.
    host: String,
    /// Whom it asks: ADDRESS:PORT, an IPv6 address in brackets.
    target: SocketAddr,
    /// Ask the UDP echo in place of the HTTP server.
    #[arg(long)]
    udp: bool,
    /// Number of requests, each from a port of its own.
    #[arg(long, default_value_t = 1, value_name = "N")]
    count: usize,
    /// Which lab; the only one if not given.
    #[arg(long)]
    name: Option<LabName>,
    /// How to print the answers.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// How to print the list.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Does what the arguments say.
///
/// # Errors
/// Anything that kept it from being done; the caller prints it.
pub fn run(args: &LabArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    obey(args, context).map_err(|error| match interrupt::interrupted() {
        // A Ctrl-C at the terminal ends the programs that we run as well; their complaints are of
        // no interest then.
        true => LabError::Interrupted,
        false => error,
    })
}

fn obey(args: &LabArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    match &args.command {
        LabCommand::Serve(args) => {
            let what = format!("sluice lab serve for pod {}", args.pod);
            serve::run(args).map_err(LabError::io(what))?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::List(args) => list(args, context),
        LabCommand::Shell(args) => shell(args, context),
        LabCommand::Probe(args) => probe(args, context),
        LabCommand::Down(args) => down(args, context),
        LabCommand::Demo(args) => {
            ready_machine(context)?;
            run_demo(args, context)
        }
        LabCommand::Up(args) => {
            ready_machine(context)?;
            up(args, context)
        }
    }
}

/// Takes signals and looks whether the machine can run a lab.
fn ready_machine(context: &LabContext) -> Result<(), LabError> {
    interrupt::install();
    let stale: Vec<String> = summaries(context)
        .unwrap_or_default()
        .into_iter()
        .filter(|lab| lab.state == "left over")
        .map(|lab| lab.name)
        .collect();
    if !stale.is_empty() {
        eprintln!(
            "left over by commands that died: lab {}; `sluice lab down --stale` removes them",
            stale.join(", ")
        );
    }
    let findings = preflight::check(context);
    if findings.is_empty() { Ok(()) } else { Err(LabError::Preflight(findings)) }
}

impl ShapeArgs {
    fn spec(&self, name: Option<&LabName>) -> LabSpec {
        LabSpec {
            name: name.cloned(),
            underlay: self.underlay,
            vni: self.vni,
            vxlan_port: self.vxlan_port,
            rp_filter: self.rp_filter,
            client_mtu: self.client_mtu,
            pod_gro: !self.no_pod_gro,
            ..shop::spec()
        }
    }
}

fn up(args: &UpArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let mut spec = args.shape.spec(args.name.as_ref());
    if let Some(pods) = args.pods {
        spec.nodes = LabSpec::kernel_only(args.nodes.unwrap_or(2), pods).nodes;
    }
    let mode = match args.agent {
        AgentArg::None => None,
        AgentArg::Native => Some(Mode::Native),
        AgentArg::Generic => Some(Mode::Generic),
        AgentArg::Tc => Some(Mode::Tc),
        AgentArg::Auto => Some(Mode::Auto),
    };
    if let (Some(mode), Some(node)) = (mode, spec.nodes.first_mut()) {
        node.agent = Agent::Sluice { mode };
    }
    let progress = Progress::new("up", context.talk);
    progress.say("making the lab");
    let mut lab = Lab::up(context, &spec)?;
    if let Some(mode) = mode {
        let objects = match &args.objects {
            Some(dir) => dir.clone(),
            None => {
                let dir = lab.dir().join("objects");
                std::fs::create_dir_all(&dir)
                    .map_err(LabError::io(format!("create {}", dir.display())))?;
                if args.pods.is_some() {
                    shop::write_nodes(&dir, lab.plan(), &spec)?;
                } else {
                    shop::write_objects(&dir, lab.plan(), &spec)?;
                }
                dir
            }
        };
        let options = AgentOptions { mode, objects, extra_config: String::new() };
        progress.say("starting sluice run on node1");
        let agent = lab.start_agent("node1", &options)?;
        lab.wait_ready(&agent)?;
    }
    progress.done();
    match args.output {
        Output::Json => print_json(&UpReport { name: lab.name().as_str(), hosts: hosts(&lab) })?,
        Output::Table => {
            println!("lab {} is up", lab.name());
            println!("{}", hosts_table(&hosts(&lab)));
            println!(
                "sluice lab shell --name {0} client     a shell on a host\n\
                 sluice lab down --name {0}             remove it",
                lab.name()
            );
        }
    }
    if !args.hold {
        lab.leave_running()?;
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("lab {}: Ctrl-C removes it", lab.name());
    while !interrupt::interrupted() {
        std::thread::sleep(Duration::from_millis(20));
    }
    lab.down()?;
    Ok(ExitCode::SUCCESS)
}

fn run_demo(args: &DemoArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let modes = match args.modes.as_slice() {
        [] => vec![Mode::Native, Mode::Generic],
        modes => modes.to_vec(),
    };
    let options = DemoOptions {
        spec: args.shape.spec(args.name.as_ref()),
        modes,
        families: vec![Family::V4, Family::V6],
        detach: args.detach,
        talk: context.talk,
    };
    let report = demo::run(context, &options)?;
    match args.output {
        Output::Table => report.print(),
        Output::Json => print_json(&report)?,
    }
    Ok(if report.pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_json<T: Serialize>(value: &T) -> Result<(), LabError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| LabError::Format {
        path: PathBuf::from("(output)"),
        message: e.to_string(),
    })?;
    println!("{text}");
    Ok(())
}

/// What `sluice lab up` made.
#[derive(Debug, Serialize)]
struct UpReport<'a> {
    name: &'a str,
    hosts: Vec<HostReport>,
}

/// One host of it.
#[derive(Debug, Serialize)]
struct HostReport {
    host: String,
    /// Name under /run/netns.
    netns: String,
    what: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

fn hosts(lab: &Lab) -> Vec<HostReport> {
    let plan = lab.plan();
    let mut hosts = vec![HostReport {
        host: "client".to_owned(),
        netns: plan.client.netns.name().to_owned(),
        what: "outside the cluster".to_owned(),
        ipv4: CLIENT_V4,
        ipv6: CLIENT_V6,
    }];
    for node in &plan.nodes {
        hosts.push(HostReport {
            host: node.name.clone(),
            netns: node.netns.name().to_owned(),
            what: match node.agent {
                Agent::None => "node, the kernel alone".to_owned(),
                Agent::Sluice { mode } => format!("node with sluice, {mode}"),
            },
            ipv4: node.address_v4,
            ipv6: node.address_v6,
        });
        hosts.extend(node.pods.iter().map(|pod| HostReport {
            host: pod.name.clone(),
            netns: pod.netns.name().to_owned(),
            what: format!("pod on {}", node.name),
            ipv4: pod.v4,
            ipv6: pod.v6,
        }));
    }
    hosts
}

fn hosts_table(hosts: &[HostReport]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(["host", "what", "IPv4", "IPv6"]);
    for host in hosts {
        table.add_row([&host.host, &host.what, &host.ipv4.to_string(), &host.ipv6.to_string()]);
    }
    table
}

fn down(args: &DownArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let names = if args.stale {
        let removed = clean_stale(context)?;
        println!("removed {} left-over lab(s) {}", removed.len(), removed.join(", "));
        return Ok(ExitCode::SUCCESS);
    } else if args.all {
        labs(context)
    } else if let Some(name) = &args.name {
        // By its name alone: also what a crash left without a state file.
        vec![name.to_string()]
    } else {
        match labs(context).as_slice() {
            [] => return Err(LabError::NoLab("(any)".to_owned())),
            [only] => vec![only.clone()],
            several => return Err(LabError::Ambiguous(several.join(", "))),
        }
    };
    let known = labs(context);
    for name in names {
        if !known.contains(&name) {
            return Err(LabError::NoLab(name));
        }
        clean(context, &name.parse()?)?;
        println!("lab {name} is removed");
    }
    Ok(ExitCode::SUCCESS)
}

fn shell(args: &ShellArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let lab = Lab::find(context, args.name.as_ref())?;
    let host = lab.host(&args.host)?;
    let (program, rest) = match args.command.split_first() {
        Some((program, rest)) => (program.clone(), rest),
        None => (shell_program(), &[][..]),
    };
    let mut command = Command::new(&program);
    command.args(rest).env("SLUICE_LAB", lab.name().as_str()).env("SLUICE_LAB_HOST", &host.name);
    if args.command.is_empty() {
        // Shells that read it show where one is.
        command.env("PS1", format!("[{} {}] \\w # ", lab.name(), host.name));
        eprintln!("shell on {} of lab {}; `exit` leaves it", host.name, lab.name());
    }
    let mut child = host.netns.spawn(&mut command)?;
    let status = child.wait().map_err(LabError::io(format!("wait for {program}")))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// What `sluice lab probe` found.
#[derive(Debug, Default, Serialize)]
struct ProbeReport {
    /// Requests sent.
    sent: usize,
    /// Answers by pod and by the client address that it saw (unknown for UDP).
    answers: BTreeMap<String, BTreeMap<String, usize>>,
    /// Requests without a right answer, by what happened.
    errors: BTreeMap<String, usize>,
}

fn probe(args: &ProbeArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let host = Lab::find(context, args.name.as_ref())?.host(&args.host)?;
    let mut report = ProbeReport { sent: args.count, ..ProbeReport::default() };
    for _ in 0..args.count {
        let reply = host.netns.enter(|| match args.udp {
            true => traffic::ask_udp(args.target),
            false => traffic::ask_tcp(args.target, 0),
        })?;
        match reply {
            Ok(reply) => {
                let client = reply.client.map_or_else(|| "-".to_owned(), |ip| ip.to_string());
                *report.answers.entry(reply.pod).or_default().entry(client).or_default() += 1;
            }
            Err(error) => *report.errors.entry(error.to_string()).or_default() += 1,
        }
    }
    match args.output {
        Output::Json => print_json(&report)?,
        Output::Table => {
            let mut table = Table::new();
            table.load_preset(UTF8_FULL_CONDENSED).set_header([
                "answered by",
                "asked by, as the pod sees it",
                "times",
            ]);
            for (pod, clients) in &report.answers {
                for (client, times) in clients {
                    table.add_row([pod, client, &times.to_string()]);
                }
            }
            for (error, times) in &report.errors {
                table.add_row(["nobody", error, &times.to_string()]);
            }
            println!("{table}");
        }
    }
    Ok(if report.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn shell_program() -> String {
    std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned())
}

fn list(args: &ListArgs, context: &LabContext) -> Result<ExitCode, LabError> {
    let summaries = summaries(context)?;
    match args.output {
        Output::Json => print_json(&summaries)?,
        Output::Table => {
            let mut table = Table::new();
            table.load_preset(UTF8_FULL_CONDENSED).set_header([
                "lab",
                "state",
                "processes",
                "hosts",
            ]);
            for lab in &summaries {
                let processes = lab.processes.to_string();
                table.add_row([&lab.name, lab.state, &processes, &lab.hosts.join(" ")]);
            }
            println!("{table}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
