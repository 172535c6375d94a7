//! `sluice lab demo`: the main job end to end, with a verdict that cannot be had without the
//! datapath.
//!
//! ```text
//! for each mode:  sluice run on node1 ─► for each case: counters, requests, counters ─► row
//! rows of all modes ─► table ─► PASS or FAIL
//! ```
//!
//! A case passes only if every request was answered by a pod that the Service has, *and* the
//! datapath's counters moved by at least as many packets as the asking host's kernel says it sent
//! and took. Traffic that went round the datapath is answered perhaps, but not counted.

use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, Color, ContentArrangement, Table};
use serde::Serialize;

use crate::agent::{AgentOptions, Counters, RunningAgent};
use crate::plan::{CLIENT_V4, CLIENT_V6, NodePlan, UPLINK};
use crate::progress::Progress;
use crate::traffic::{self, HostPackets, Protocol, Reply};
use crate::{Agent, Family, Host, Lab, LabContext, LabError, LabSpec, Mode, interrupt, shop};

/// The node under test.
const NODE: &str = "node1";
/// Requests of one case.
const REQUESTS: usize = 16;
/// Requests at most while an endpoint has not answered: the kernel chooses each request's port, and
/// with it the endpoint, so that sixteen of a kind come about by chance once in 32768 rows.
const MOST_REQUESTS: usize = 64;
/// Bytes that each TCP request downloads behind its answer: enough for full-sized segments.
const DOWNLOAD_BYTES: usize = 20_000;
/// How long counters may lag behind the traffic: the time of a command, or of a swept queue.
const COUNTER_LAG: Duration = Duration::from_secs(1);

/// What the demonstration shall do.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// Names and network; nodes and pods are the shop's.
    pub spec: LabSpec,
    /// Modes, one after the other.
    pub modes: Vec<Mode>,
    /// IP families of the cases.
    pub families: Vec<Family>,
    /// Take the programs off the interfaces before the traffic: the outcome must be FAIL.
    pub detach: bool,
    /// Print progress for people.
    pub talk: bool,
}

/// Everything that the demonstration found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// True if every row passed.
    pub pass: bool,
    /// One row per case and mode.
    pub rows: Vec<Row>,
    /// What node1's datapath counted during all rows of a mode: (mode, reason, verdict, packets).
    pub reasons: Vec<ReasonRow>,
}

/// One case in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Attach mode of node1's uplink.
    pub mode: Mode,
    /// Who asks.
    pub from: String,
    /// What is asked, in words.
    pub to: String,
    /// Where to.
    pub target: SocketAddr,
    /// Transport.
    pub protocol: Protocol,
    /// Requests sent.
    pub requests: usize,
    /// Packets that the asking host's kernel sent and took for them.
    pub packets_sent: u64,
    /// See `packets_sent`.
    pub packets_received: u64,
    /// Answers by pod.
    pub answered: BTreeMap<String, usize>,
    /// Packets decapsulated on node1.
    pub decapsulated: u64,
    /// Requests translated to an endpoint (DNAT).
    pub translated: u64,
    /// Replies translated back.
    pub replies: u64,
    /// Dropped packets by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Why the row fails; empty if it passes.
    pub problems: Vec<String>,
}

/// A reason's packets in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct ReasonRow {
    /// Attach mode of node1's uplink.
    pub mode: Mode,
    /// Where the packets were counted: XDP or one of TC's directions.
    pub hook: String,
    /// The reason's name.
    pub reason: String,
    /// `pass`, `drop` or `forward`.
    pub verdict: String,
    /// Packets.
    pub packets: u64,
}

/// What is sent and what must come of it.
struct Case {
    from: Host,
    to: String,
    target: SocketAddr,
    protocol: Protocol,
    /// Pods that must answer, every one of them.
    pods: Vec<String>,
    proof: Proof,
}

/// Which counters must account for the packets.
enum Proof {
    /// Those of a Service port, in both directions; `sources` tells the client address that each
    /// pod must see, where the design fixes it.
    Service {
        name: &'static str,
        port_name: &'static str,
        port: u16,
        sources: BTreeMap<String, IpAddr>,
    },
    /// Decapsulation of what this pod of the other node sends.
    Decap { peer: Host },
}

/// Runs the whole demonstration; the lab is removed at the end, whatever the outcome.
///
/// # Errors
/// Anything that kept it from being judged; a case that fails is no error but a row.
pub fn run(context: &LabContext, options: &DemoOptions) -> Result<Report, LabError> {
    let mut spec = LabSpec { nodes: shop::spec().nodes, ..options.spec.clone() };
    if let (Some(node), Some(mode)) = (spec.nodes.first_mut(), options.modes.first()) {
        node.agent = Agent::Sluice { mode: *mode };
    }
    let progress = Progress::new("demo", options.talk);
    progress.say("making the lab: 2 nodes, 16 pods, a client");
    let mut lab = Lab::up(context, &spec)?;
    let objects = lab.dir().join("objects");
    shop::write_objects(&objects, lab.plan(), &spec)?;
    let cases = cases(&lab, &options.families)?;
    progress.steps(options.modes.len() * cases.len());

    let mut report = Report { pass: false, rows: Vec::new(), reasons: Vec::new() };
    for (index, mode) in options.modes.iter().enumerate() {
        progress.say(&format!("starting sluice run on {NODE}, {mode} mode"));
        let agent = lab.start_agent(
            NODE,
            &AgentOptions { mode: *mode, objects: objects.clone(), extra_config: String::new() },
        )?;
        lab.wait_ready(&agent)?;
        if options.detach {
            detach(&mut lab, &agent)?;
        } else {
            check_attached(&lab, *mode)?;
        }
        let before = lab.agent_counters(NODE).unwrap_or_default();
        for case in &cases {
            progress.say(&format!("{mode}: {} {} -> {}", case.protocol, case.from.name, case.to));
            report.rows.push(run_case(&lab, case, *mode)?);
            progress.step();
        }
        let after = lab.agent_counters(NODE).unwrap_or_default();
        report.reasons.extend(reason_rows(*mode, after.since(&before)));
        let last = index + 1 == options.modes.len();
        if !last {
            progress.say(&format!("ending sluice run, {mode} mode"));
            lab.stop(agent.process)?;
            lab.sluice(NODE, &["cleanup", "--yes"])?;
        }
    }
    progress.say("removing the lab");
    lab.down()?;
    progress.done();
    report.pass = !report.rows.is_empty() && report.rows.iter().all(|row| row.problems.is_empty());
    Ok(report)
}

/// What the kernel, not the agent, says of the uplink.
fn check_attached(lab: &Lab, mode: Mode) -> Result<(), LabError> {
    let shown = lab.host(NODE)?.run("ip", &["link", "show", UPLINK])?;
    let attached = if shown.contains(" xdpgeneric ") {
        Mode::Generic
    } else if shown.contains(" xdp ") {
        Mode::Native
    } else if mode == Mode::Tc {
        // iproute2 does not know TCX; the rows tell whether anybody is there.
        Mode::Tc
    } else {
        return Err(wrong_mode(lab, &format!("left {UPLINK} without an XDP program")));
    };
    if mode == Mode::Auto || attached == mode {
        return Ok(());
    }
    Err(wrong_mode(lab, &format!("attached to {UPLINK} in {attached} mode, not {mode}")))
}

fn wrong_mode(lab: &Lab, message: &str) -> LabError {
    LabError::Process {
        process: "sluice run".to_owned(),
        host: NODE.to_owned(),
        message: message.to_owned(),
        log: lab.log_path(NODE, "sluice run"),
    }
}

/// Takes the programs away under a datapath that was ready: the agent ends (which leaves them
/// running), then the pins of their links go, and with them the last references.
fn detach(lab: &mut Lab, agent: &RunningAgent) -> Result<(), LabError> {
    lab.stop(agent.process)?;
    let pins = lab.pin_dir(NODE);
    let entries = fs::read_dir(&pins).map_err(LabError::io(format!("read {}", pins.display())))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("link-") {
            let path = entry.path();
            fs::remove_file(&path).map_err(LabError::io(format!("remove {}", path.display())))?;
        }
    }
    // The kernel takes a link apart some time after its last reference has gone.
    let start = Instant::now();
    while lab.host(NODE)?.run("ip", &["link", "show", UPLINK])?.contains("prog/xdp") {
        interrupt::check()?;
        if start.elapsed() > Duration::from_secs(10) {
            return Err(wrong_mode(lab, &format!("is gone, but its program stays on {UPLINK}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn cases(lab: &Lab, families: &[Family]) -> Result<Vec<Case>, LabError> {
    let plan = lab.plan();
    let (Some(node1), Some(node2)) = (plan.nodes.first(), plan.nodes.get(1)) else {
        return Ok(Vec::new());
    };
    let mut cases = Vec::new();
    for &family in families {
        let node_port = |port| SocketAddr::new(node1.address(family), port);
        let service = |to: &str, target, protocol, service: &Service, from: &Host| Case {
            from: from.clone(),
            to: to.to_owned(),
            target,
            protocol,
            pods: service.pods.iter().map(|pod| (*pod).to_owned()).collect(),
            proof: Proof::Service {
                name: service.name,
                port_name: service.port_name,
                port: service.port,
                sources: if from.name == "client" {
                    sources(service, node1, family)
                } else {
                    BTreeMap::new()
                },
            },
        };
        let client = lab.client();
        let at = |v4: &str, v6: &str, port| {
            let text = if family == Family::V4 { v4 } else { v6 };
            text.parse::<IpAddr>().map(|address| SocketAddr::new(address, port)).map_err(|e| {
                LabError::Spec {
                    field: "address of a Service",
                    value: text.to_owned(),
                    remedy: e.to_string(),
                }
            })
        };
        let pages = at("203.0.113.10", "2001:db8:203::10", 80)?;
        let names = at("203.0.113.53", "2001:db8:203::53", 53)?;
        let external = at("198.51.100.10", "2001:db8:198::10", 80)?;
        let cart = at("10.96.0.21", "fd00:10:96::21", 7070)?;
        let resolver = at("10.96.0.53", "fd00:10:96::53", 53)?;
        let pod = lab.host("frontend-1")?;
        use Protocol::{Tcp, Udp};
        cases.push(service(
            "NodePort of frontend-external",
            node_port(30080),
            Tcp,
            &PAGES,
            &client,
        ));
        cases.push(service(
            "NodePort of checkoutservice",
            node_port(30050),
            Tcp,
            &CHECKOUT,
            &client,
        ));
        cases.push(service(
            "NodePort of productcatalogservice",
            node_port(30355),
            Tcp,
            &CATALOG,
            &client,
        ));
        cases.push(service("NodePort of nameservice", node_port(30053), Udp, &NAMES, &client));
        cases.push(service("LoadBalancer frontend-external", pages, Tcp, &PAGES, &client));
        cases.push(service("LoadBalancer nameservice", names, Udp, &NAMES, &client));
        cases.push(service("external IP of frontend", external, Tcp, &FRONTEND, &client));
        cases.push(service("ClusterIP cartservice", cart, Tcp, &CART, &pod));
        cases.push(service("ClusterIP nameservice", resolver, Udp, &NAMES, &pod));
        for (from, to, protocol) in [
            ("frontend-1", "frontend-2", Tcp),
            ("frontend-2", "frontend-1", Tcp),
            ("frontend-1", "nameservice-2", Udp),
            ("frontend-2", "nameservice-1", Udp),
        ] {
            cases.push(pod_to_pod(lab, node2, from, to, protocol, family)?);
        }
    }
    Ok(cases)
}

/// What of `services.yaml` and `endpoints.yaml` the cases need.
struct Service {
    name: &'static str,
    port_name: &'static str,
    port: u16,
    pods: &'static [&'static str],
}

const PAGES: Service = Service {
    name: "shop/frontend-external",
    port_name: "http",
    port: 80,
    pods: &["frontend-1", "frontend-2"],
};
const FRONTEND: Service = Service { name: "shop/frontend", ..PAGES };
const CHECKOUT: Service = Service {
    name: "shop/checkoutservice",
    port_name: "grpc",
    port: 5050,
    pods: &["checkoutservice-1"],
};
const CATALOG: Service = Service {
    name: "shop/productcatalogservice",
    port_name: "grpc",
    port: 3550,
    pods: &["productcatalogservice-1"],
};
const CART: Service = Service {
    name: "shop/cartservice",
    port_name: "grpc",
    port: 7070,
    pods: &["cartservice-1", "cartservice-2"],
};
const NAMES: Service = Service {
    name: "shop/nameservice",
    port_name: "dns",
    port: 53,
    pods: &["nameservice-1", "nameservice-2"],
};

/// The client address that a pod must see: the client's own where the pod is on node1, node1's
/// tunnel address where it is on another node (a node address would not come back by the tunnel).
fn sources(service: &Service, node1: &NodePlan, family: Family) -> BTreeMap<String, IpAddr> {
    let (client, tunnel): (IpAddr, IpAddr) = match family {
        Family::V4 => (CLIENT_V4.into(), node1.tunnel_v4().into()),
        Family::V6 => (CLIENT_V6.into(), node1.tunnel_v6().into()),
    };
    let is_local = |pod: &str| node1.pods.iter().any(|plan| plan.name == pod);
    service
        .pods
        .iter()
        .map(|pod| ((*pod).to_owned(), if is_local(pod) { client } else { tunnel }))
        .collect()
}

fn pod_to_pod(
    lab: &Lab,
    node2: &NodePlan,
    from: &str,
    to: &str,
    protocol: Protocol,
    family: Family,
) -> Result<Case, LabError> {
    let no_pod = || lab.host(to).err().unwrap_or_else(|| LabError::NoLab(to.to_owned()));
    let (node, pod) = lab.plan().pod(to).ok_or_else(no_pod)?;
    let port = match protocol {
        Protocol::Tcp => pod.spec.tcp_ports.first(),
        Protocol::Udp => pod.spec.udp_ports.first(),
    };
    let peer = if node.name == node2.name { to } else { from };
    Ok(Case {
        from: lab.host(from)?,
        to: format!("pod {to} on {}", node.name),
        target: SocketAddr::new(pod.address(family), port.copied().unwrap_or_default()),
        protocol,
        pods: vec![to.to_owned()],
        proof: Proof::Decap { peer: lab.host(peer)? },
    })
}

fn run_case(lab: &Lab, case: &Case, mode: Mode) -> Result<Row, LabError> {
    let mut problems = Vec::new();
    let counted_host = match &case.proof {
        Proof::Service { .. } => &case.from.netns,
        Proof::Decap { peer } => &peer.netns,
    };
    let counters_before = lab.agent_counters(NODE);
    let packets_before = traffic::settled_packets(counted_host)?;
    let (requests, replies) = ask(case, &mut problems)?;
    let packets = traffic::settled_packets(counted_host)? - packets_before;

    let mut row = Row {
        mode,
        from: case.from.name.clone(),
        to: case.to.clone(),
        target: case.target,
        protocol: case.protocol,
        requests,
        packets_sent: packets.sent,
        packets_received: packets.received,
        answered: BTreeMap::new(),
        decapsulated: 0,
        translated: 0,
        replies: 0,
        dropped: BTreeMap::new(),
        problems,
    };
    judge_answers(case, &replies, &mut row);
    match counters_before {
        Ok(before) => judge_counters(lab, case, &before, packets, &mut row)?,
        Err(error) => row.problems.push(format!("no counters: {error}")),
    }
    Ok(row)
}

/// Sends the requests one after the other, each from a port of its own. Their number, and the
/// answers.
fn ask(case: &Case, problems: &mut Vec<String>) -> Result<(usize, Vec<Reply>), LabError> {
    let mut replies = Vec::new();
    let all_answered = |replies: &[Reply]| {
        case.pods.iter().all(|pod| replies.iter().any(|reply| reply.pod == *pod))
    };
    let mut sent = 0;
    while sent < REQUESTS || sent < MOST_REQUESTS && !all_answered(&replies) {
        sent += 1;
        interrupt::check()?;
        let reply = case.from.netns.enter(|| match case.protocol {
            Protocol::Tcp => traffic::ask_tcp(case.target, DOWNLOAD_BYTES),
            Protocol::Udp => traffic::ask_udp(case.target),
        })?;
        match reply {
            Ok(reply) => replies.push(reply),
            Err(error) => {
                // The row has failed; further waiting would say nothing new.
                problems.push(format!("request {sent}: {error}"));
                break;
            }
        }
    }
    Ok((sent, replies))
}

fn judge_answers(case: &Case, replies: &[Reply], row: &mut Row) {
    for reply in replies {
        *row.answered.entry(reply.pod.clone()).or_default() += 1;
        if !case.pods.contains(&reply.pod) {
            row.problems.push(format!("{} answered, which is no endpoint", reply.pod));
        }
        if let Proof::Service { sources, .. } = &case.proof
            && let (Some(right), Some(seen)) = (sources.get(&reply.pod), reply.client)
            && *right != seen
        {
            row.problems.push(format!("{} was asked by {seen}, should be {right}", reply.pod));
        }
    }
    for pod in case.pods.iter().filter(|_| !replies.is_empty()) {
        if !row.answered.contains_key(pod) {
            row.problems.push(format!("{pod} never answered"));
        }
    }
    // Sixteen times the same is said once.
    let mut seen = std::collections::BTreeSet::new();
    row.problems.retain(|problem| seen.insert(problem.clone()));
}

/// Waits until the counters account for the packets, or cannot any more.
fn judge_counters(
    lab: &Lab,
    case: &Case,
    before: &Counters,
    packets: HostPackets,
    row: &mut Row,
) -> Result<(), LabError> {
    let start = Instant::now();
    loop {
        interrupt::check()?;
        let after = match lab.agent_counters(NODE) {
            Ok(after) => after,
            Err(error) => {
                row.problems.push(format!("no counters: {error}"));
                return Ok(());
            }
        };
        let delta = after.since(before);
        row.decapsulated = sum(&delta, &DECAPSULATED);
        row.translated = sum(&delta, &TRANSLATED);
        row.replies = sum(&delta, &REPLIES);
        row.dropped.clear();
        for count in delta.reasons.iter().filter(|c| c.verdict == "drop" && c.packets > 0) {
            *row.dropped.entry(count.reason.clone()).or_default() += count.packets;
        }
        let missing = unaccounted(case, &delta, packets, row);
        if missing.is_empty() {
            return Ok(());
        }
        if !row.problems.is_empty() || start.elapsed() > COUNTER_LAG {
            row.problems.extend(missing);
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Reasons of the datapath (sluice-abi) by what they say of a packet.
const DECAPSULATED: [&str; 4] =
    ["decap_local", "decap_dnat_local", "decap_dnat_remote", "reply_remote"];
const TRANSLATED: [&str; 4] =
    ["dnat_local", "dnat_remote", "decap_dnat_local", "decap_dnat_remote"];
const REPLIES: [&str; 2] = ["reply_local", "reply_remote"];

/// What the counters do not account for.
fn unaccounted(case: &Case, delta: &Counters, packets: HostPackets, row: &Row) -> Vec<String> {
    let mut missing = Vec::new();
    // A host whose own counters stood still proves nothing: every answer took a packet each way.
    let answers = row.answered.values().sum::<usize>() as u64;
    let mut expect = |what: &str, counted: u64, happened: u64| {
        if counted < happened.max(answers) {
            missing.push(format!("{what}: {counted} counted, {happened} happened"));
        }
    };
    match &case.proof {
        Proof::Service { name, port_name, port, .. } => {
            let (forward, reply) = delta.service_port(name, port_name, *port);
            let service = format!("{name}:{port_name}");
            expect(&format!("requests of {service}"), forward, packets.sent);
            expect(&format!("replies of {service}"), reply, packets.received);
            expect("translated packets", row.translated, packets.sent);
            expect("packets translated back", row.replies, packets.received);
        }
        Proof::Decap { .. } => {
            expect("decapsulated packets", row.decapsulated, packets.sent);
        }
    }
    missing
}

fn sum(counters: &Counters, reasons: &[&str]) -> u64 {
    reasons.iter().map(|reason| counters.reason(reason)).sum()
}

fn reason_rows(mode: Mode, delta: Counters) -> Vec<ReasonRow> {
    delta
        .reasons
        .into_iter()
        .filter(|count| count.packets > 0)
        .map(|count| ReasonRow {
            mode,
            hook: count.hook,
            reason: count.reason,
            verdict: count.verdict,
            packets: count.packets,
        })
        .collect()
}

impl Report {
    /// The table for people, and the verdict below it.
    pub fn print(&self) {
        println!("{}", self.table());
        println!("{}", self.reason_table());
        for row in self.rows.iter().filter(|row| !row.problems.is_empty()) {
            println!("FAIL  {} {} {} -> {}:", row.mode, row.protocol, row.from, row.to);
            for problem in &row.problems {
                println!("      {problem}");
            }
        }
        let passed = self.rows.iter().filter(|row| row.problems.is_empty()).count();
        let sent: u64 = self.rows.iter().map(|row| row.packets_sent + row.packets_received).sum();
        let word = if self.pass { "PASS" } else { "FAIL" };
        let word = match (std::io::stdout().is_terminal(), self.pass) {
            (true, true) => format!("\x1b[1;32m{word}\x1b[0m"),
            (true, false) => format!("\x1b[1;31m{word}\x1b[0m"),
            (false, _) => word.to_owned(),
        };
        println!(
            "{word}  {passed} of {} rows; {sent} packets held against the counters",
            self.rows.len()
        );
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header([
            "mode",
            "from",
            "to",
            "sent",
            "answered by",
            "decap",
            "DNAT",
            "replies",
            "dropped",
            "",
        ]);
        for row in &self.rows {
            let answered: Vec<String> =
                row.answered.iter().map(|(pod, times)| format!("{pod} x{times}")).collect();
            let dropped: Vec<String> =
                row.dropped.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
            let pass = row.problems.is_empty();
            let (word, colour) = if pass { ("PASS", Color::Green) } else { ("FAIL", Color::Red) };
            table.add_row([
                Cell::new(row.mode),
                Cell::new(&row.from),
                Cell::new(format!("{}\n{}", row.to, row.target)),
                Cell::new(format!(
                    "{} {} x{}\n{} packets",
                    if row.target.is_ipv4() { "IPv4" } else { "IPv6" },
                    row.protocol,
                    row.requests,
                    row.packets_sent,
                )),
                Cell::new(answered.join("\n")),
                Cell::new(row.decapsulated),
                Cell::new(row.translated),
                Cell::new(row.replies),
                Cell::new(if dropped.is_empty() { "0".to_owned() } else { dropped.join("\n") }),
                Cell::new(word).fg(colour),
            ]);
        }
        table
    }

    fn reason_table(&self) -> Table {
        let mut modes: Vec<Mode> = Vec::new();
        let mut reasons: BTreeMap<(&str, &str, &str), BTreeMap<String, u64>> = BTreeMap::new();
        for row in &self.reasons {
            if !modes.contains(&row.mode) {
                modes.push(row.mode);
            }
            let by_mode = reasons.entry((&row.hook, &row.verdict, &row.reason)).or_default();
            *by_mode.entry(row.mode.to_string()).or_default() += row.packets;
        }
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED);
        let mut header = vec![format!("{NODE}, hook"), "verdict".to_owned(), "reason".to_owned()];
        header.extend(modes.iter().map(|mode| format!("{mode}, packets")));
        table.set_header(header);
        for ((hook, verdict, reason), by_mode) in reasons {
            let mut cells = vec![hook.to_owned(), verdict.to_owned(), reason.to_owned()];
            cells.extend(modes.iter().map(|mode| {
                by_mode.get(&mode.to_string()).copied().unwrap_or_default().to_string()
            }));
            table.add_row(cells);
        }
        table
    }
}
