//! One lab with an agent on node1, its objects, and traffic.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use aya::programs::{SchedClassifier, TcAttachType};
use serde_json::Value;
use sluice_lab::agent::{Counters, RunningAgent};
use sluice_lab::plan::{NodePlan, PodPlan, UPLINK, VXLAN_DEVICE};
use sluice_lab::serve::Answer;
use sluice_lab::traffic::{self, HostPackets};
use sluice_lab::{Family, Lab, LabContext, LabSpec, Mode, Netns, preflight, shop};

/// The node under test.
pub const NODE: &str = "node1";
/// How long something that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Both families, in the order of every loop.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// TCP port of every Service here; its pods listen on 8080.
pub const HTTP: u16 = 80;
/// UDP port of every Service here; its pods listen on 5353.
pub const ECHO: u16 = 53;

/// The `sluice` program of the build that this test belongs to. `cargo test --workspace` builds it
/// for the agent's own suites; where this suite is built alone, it is built here when one of its
/// sources is newer.
pub fn sluice() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if let Some(given) = std::env::var_os("SLUICE_TEST_PROGRAM") {
                return given.into();
            }
            let test = std::env::current_exe().expect("the test's own path");
            let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps");
            let program = profile.join("sluice");
            if !is_fresh(&program) {
                let mut cargo = Command::new(env!("CARGO"));
                cargo.args(["build", "--package", "sluice"]);
                if profile.ends_with("release") {
                    cargo.arg("--release");
                }
                let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo");
                assert!(
                    built.status.success(),
                    "cargo build --package sluice: {}",
                    String::from_utf8_lossy(&built.stderr)
                );
            }
            program
        })
        .clone()
}

/// Whether every source that cargo names for the program is older than the program.
fn is_fresh(program: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let (Some(built), Ok(sources)) =
        (modified(program), fs::read_to_string(program.with_extension("d")))
    else {
        return false;
    };
    let Some((_, sources)) = sources.split_once(": ") else {
        return false;
    };
    // A source that is gone was renamed: then it is not fresh either.
    let of = |source: &str| modified(Path::new(source)).unwrap_or_else(SystemTime::now);
    sources.split_whitespace().all(|source| of(source) <= built)
}

/// What is configured beyond the lab's own places.
#[derive(Clone, Debug)]
pub struct Config {
    pub mode: Mode,
    /// `replace` or `accelerate`.
    pub behaviour: &'static str,
    /// `auto`, `redirect` or `stack`.
    pub delivery: &'static str,
    /// Interfaces of node1 that are left alone.
    pub exclude: &'static [&'static str],
    /// Lines of `[datapath]`.
    pub datapath: &'static str,
    /// Whole TOML tables.
    pub tables: &'static str,
}

impl Config {
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            behaviour: "replace",
            delivery: "auto",
            exclude: &[],
            datapath: "",
            tables: "",
        }
    }
}

/// A lab and the agent on its node1.
pub struct Bed {
    pub lab: Lab,
    pub config: Config,
    pub agent: Option<RunningAgent>,
}

impl Bed {
    /// A lab with an agent that has taken `objects` (file name and text) over.
    pub fn up(spec: &LabSpec, config: Config, objects: &[(&str, String)]) -> Self {
        let mut bed = Self::without_agent(spec, config, objects);
        bed.start();
        bed
    }

    pub fn without_agent(spec: &LabSpec, config: Config, objects: &[(&str, String)]) -> Self {
        let context = LabContext::new(sluice());
        let missing = preflight::check(&context);
        assert!(missing.is_empty(), "{}", preflight::Finding::lines(&missing));
        let lab = Lab::up(&context, spec).expect("a lab");
        let bed = Self { lab, config, agent: None };
        shop::write_nodes(&bed.objects(), bed.lab.plan(), spec).expect("nodes");
        for (file, text) in objects {
            bed.write(file, text);
        }
        bed
    }

    fn objects(&self) -> PathBuf {
        self.lab.dir().join("objects")
    }

    /// Puts a manifest into the agent's directory, as a whole: a rename, as an editor or `kubectl`
    /// mounting a new version does it.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.objects().join(file);
        let beside = self.lab.dir().join(format!("{file}.new"));
        fs::write(&beside, text).and_then(|()| fs::rename(&beside, &path)).expect("a manifest");
    }

    pub fn remove(&self, file: &str) {
        fs::remove_file(self.objects().join(file)).expect("a manifest to remove");
    }

    /// Starts the agent without waiting for it. Its tables are small: each look at the counters
    /// reads all of them.
    pub fn spawn_agent(&mut self) {
        self.agent = Some(self.spawn_agent_on(NODE));
    }

    /// Writes the configuration of node1's agent, which reads it when it has changed.
    pub fn configure(&self) {
        self.configure_on(NODE);
    }

    fn configure_on(&self, node: &str) -> PathBuf {
        let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
        let config = &self.config;
        let text = format!(
            "node_name = \"{node}\"\npin_dir = {pins}\nrun_dir = {run}\n\
             [source]\npath = {objects}\nsettle = \"50ms\"\n\
             [datapath]\nuplinks = [\"{UPLINK}\"]\ntunnel_devices = [\"{VXLAN_DEVICE}\"]\n\
             mode = \"{mode}\"\nbehaviour = \"{behaviour}\"\ndelivery = \"{delivery}\"\n\
             exclude_interfaces = {exclude:?}\n{datapath}\
             [maps]\nbackends = 1024\nvteps = 64\nnexthops = 64\n{tables}",
            pins = quoted(self.lab.make_pin_dir(node).expect("a directory for pins")),
            run = quoted(self.lab.dir().join(node)),
            objects = quoted(self.objects()),
            mode = config.mode,
            behaviour = config.behaviour,
            delivery = config.delivery,
            exclude = config.exclude,
            datapath = config.datapath,
            tables = config.tables,
        );
        let path = self.lab.agent_config(node);
        fs::write(&path, text).expect("a configuration file");
        path
    }

    fn spawn_agent_on(&mut self, node: &str) -> RunningAgent {
        let path = self.configure_on(node);
        let mut command = Command::new(&self.lab.context().sluice);
        command.arg("run").arg("--config").arg(&path);
        let host = self.lab.host(node).expect("a node");
        let process = self.lab.spawn(&host, "sluice run", &mut command).expect("sluice run");
        RunningAgent { process, node: node.to_owned(), config: path }
    }

    /// A second agent with the same configuration and objects, on another node.
    pub fn start_on(&mut self, node: &str) {
        let agent = self.spawn_agent_on(node);
        self.lab.wait_ready(&agent).expect("an agent that is ready");
    }

    /// Starts the agent and waits until it is ready.
    pub fn start(&mut self) {
        self.spawn_agent();
        let agent = self.agent.clone().expect("just started");
        self.lab.wait_ready(&agent).expect("an agent that is ready");
    }

    /// SIGTERM: the datapath stays.
    pub fn stop(&mut self) {
        let agent = self.agent.take().expect("an agent that runs");
        self.lab.stop(agent.process).expect("stopped");
        self.wait_gone();
    }

    /// SIGKILL, as a crash.
    pub fn kill(&mut self) {
        let agent = self.agent.take().expect("an agent that runs");
        self.lab.kill(agent.process).expect("killed");
        self.wait_gone();
    }

    /// The last of a process's threads may end, and give up its lock, after the process is dead.
    fn wait_gone(&self) {
        wait("the agent is gone", || match self.status()["running"] == false {
            true => Ok(()),
            false => Err("`sluice status` says that it runs".to_owned()),
        });
    }

    /// Names of the BPF programs at an interface of node1, by the kernel: XDP, then TCX.
    pub fn programs(&self, interface: &str) -> Vec<String> {
        let shown = self.run(NODE, "ip", &["-details", "link", "show", interface]);
        let words: Vec<&str> = shown.split_whitespace().collect();
        let xdp = words.iter().position(|word| word.starts_with("prog/xdp"));
        let mut names: Vec<String> = xdp
            .and_then(|at| words.get(at..)?.windows(2).find(|pair| pair[0] == "name"))
            .map(|pair| pair[1].to_owned())
            .into_iter()
            .collect();
        let tcx = self.netns(NODE).enter(|| {
            [TcAttachType::Ingress, TcAttachType::Egress].map(|side| {
                let (_, programs) = SchedClassifier::query_tcx(interface, side).expect("a query");
                programs.iter().map(|p| p.name_as_str().unwrap_or("?").to_owned()).collect()
            })
        });
        let tcx: [Vec<String>; 2] = tcx.expect("the namespace");
        names.extend(tcx.concat());
        names
    }

    pub fn netns(&self, host: &str) -> Netns {
        self.lab.host(host).expect("a host of the lab").netns
    }

    /// A program on a host that must succeed, and what it printed.
    pub fn run(&self, host: &str, program: &str, args: &[&str]) -> String {
        self.netns(host).run(program, args).unwrap_or_else(|e| panic!("{e}\n{}", self.log()))
    }

    /// The same, whatever its exit status: success, and what it printed on both streams.
    pub fn try_run(&self, host: &str, program: &str, args: &[&str]) -> (bool, String) {
        let output = self.netns(host).output(Command::new(program).args(args)).expect(program);
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    pub fn node(&self, number: usize) -> &NodePlan {
        &self.lab.plan().nodes[number - 1]
    }

    pub fn pod(&self, name: &str) -> &PodPlan {
        self.lab.plan().pod(name).expect("a pod of the lab").1
    }

    /// What the agent wrote, for a message.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.lab.log_path(NODE, "sluice run")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    pub fn counters(&self) -> Counters {
        self.lab.agent_counters(NODE).expect("counters")
    }

    /// `sluice status --output json`, whatever its exit status.
    pub fn status(&self) -> Value {
        let output = self.lab.sluice_output(NODE, &["status", "--output", "json"]).expect("status");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!("status: {e}: {}", String::from_utf8_lossy(&output.stderr));
        })
    }

    /// What `sluice status` tells people, whatever its exit status.
    pub fn status_text(&self) -> String {
        let output = self.lab.sluice_output(NODE, &["status"]).expect("status");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Endpoints that new connections to a Service of [`manifest`] get, by `sluice services`.
    pub fn endpoints(&self, service: &str) -> Vec<String> {
        let text = self.lab.sluice(NODE, &["services", "--output", "json"]).expect("services");
        let rows: Value = serde_json::from_str(&text).expect("JSON");
        let wanted = format!("shop/{service}:");
        let mut found: Vec<String> = rows["services"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|row| row["service"].as_str().is_some_and(|name| name.starts_with(&wanted)))
            .flat_map(|row| row["external_backends"].as_array().cloned().unwrap_or_default())
            .filter_map(|endpoint| endpoint.as_str().map(str::to_owned))
            .collect();
        found.sort();
        found.dedup();
        found
    }

    /// Waits until the endpoints of a Service are these pods, in both families and on both ports.
    pub fn wait_endpoints(&self, service: &str, pods: &[&str]) {
        let mut wanted: Vec<String> = pods
            .iter()
            .flat_map(|name| {
                let pod = self.pod(name);
                FAMILIES.into_iter().flat_map(|family| {
                    [8080, 5353].map(|port| SocketAddr::new(pod.address(family), port).to_string())
                })
            })
            .collect();
        wanted.sort();
        wait(&format!("endpoints of {service}"), || {
            let found = self.endpoints(service);
            if found == wanted { Ok(()) } else { Err(format!("{found:?}, not {wanted:?}")) }
        });
    }

    /// Datagrams that came to pods and the client and found the receiver's buffer full (RFC 4113,
    /// the kernel's RcvbufErrors).
    fn datagrams_without_room(&self) -> u64 {
        let pods = self.lab.plan().nodes.iter().flat_map(|node| &node.pods);
        let hosts = pods.map(|pod| &pod.netns).chain([&self.lab.plan().client.netns]);
        let of = |netns: &Netns| {
            let files = ["/proc/self/net/snmp", "/proc/self/net/snmp6"];
            let text = netns.run("cat", &files).expect("the kernel's counters");
            // IPv4's are a line of names and one of values, IPv6's one line each.
            let mut v4 = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
            let (names, values) = (v4.next().expect("names"), v4.next().expect("values"));
            let column =
                names.split(' ').position(|name| name == "RcvbufErrors").expect("a column");
            let v6 = text.lines().find_map(|line| line.strip_prefix("Udp6RcvbufErrors"));
            [values.split(' ').nth(column), v6]
                .map(|text| text.expect("a value").trim().parse::<u64>().expect("a number"))
                .iter()
                .sum::<u64>()
        };
        hosts.map(of).sum()
    }

    /// TCP and UDP packets of a host, settled.
    pub fn packets(&self, host: &str) -> HostPackets {
        traffic::settled_packets(&self.netns(host)).expect("packets of a host")
    }

    /// `count` echo requests of `size` bytes of payload, none of which may be lost.
    pub fn ping(&self, from: &str, to: IpAddr, size: usize, count: usize, more: &[&str]) {
        let (size, count, to) = (size.to_string(), count.to_string(), to.to_string());
        let mut args = vec!["-n", "-q", "-i", "0.01", "-W", "5", "-s", &size, "-c", &count];
        args.extend(more);
        args.push(&to);
        let text = self.run(from, "ping", &args);
        let all = format!("{count} received");
        assert!(text.contains(&all), "ping -s {size} from {from} to {to}: {text}");
    }

    /// curl's answer to a GET, which must be 200.
    pub fn curl(&self, from: &str, target: SocketAddr, path: &str) -> Vec<u8> {
        let url = format!("http://{target}{path}");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "20", "--globoff", &url]);
        let output = self.netns(from).output(&mut curl).expect("curl");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "curl {url} from {from}: {said}\n{}", self.log());
        output.stdout
    }

    /// Which pod answers, and whom it sees.
    pub fn ask(&self, from: &str, target: SocketAddr) -> Answer {
        let body = self.curl(from, target, "/");
        serde_json::from_slice(&body).expect("an answer of the lab's server")
    }

    /// Which pod echoes a datagram of a new port.
    pub fn ask_udp(&self, from: &str, target: SocketAddr) -> String {
        let reply = self.netns(from).enter(|| traffic::ask_udp(target)).expect("the namespace");
        reply.unwrap_or_else(|e| panic!("UDP {target} from {from}: {e}\n{}", self.log())).pod
    }

    /// Asks `count` times and counts the answers by pod.
    pub fn ask_often(
        &self,
        from: &str,
        target: SocketAddr,
        count: usize,
    ) -> BTreeMap<String, usize> {
        let mut pods = BTreeMap::new();
        for _ in 0..count {
            *pods.entry(self.ask(from, target).pod).or_default() += 1;
        }
        pods
    }
}

/// Calls `check` until it is content.
pub fn wait<T>(what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match check() {
            Ok(value) => return value,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{what}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// Two seconds of iperf3 with its server at `to`, in both directions at once: bytes that arrived
/// there, and here. Both must be many, and few datagrams lost on the way; those for which a busy
/// receiver had no room are not. Callers limit the rate, so that other tests get on beside them.
pub fn iperf(bed: &Bed, from: &str, to: IpAddr, more: &[&str]) -> (u64, u64) {
    let to = to.to_string();
    let mut args = vec!["--client", &to, "--time", "2", "--bidir", "--json"];
    args.extend(more);
    let no_room = bed.datagrams_without_room();
    // The server may still be starting.
    let result = wait("iperf3", || {
        let (_, text) = bed.try_run(from, "iperf3", &args);
        let json: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
        match json["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(json),
        }
    });
    let no_room = bed.datagrams_without_room() - no_room;
    let [there, here] = ["sum_received", "sum_received_bidir_reverse"].map(|sum| {
        let sum = &result["end"][sum];
        let field = |name: &str| sum[name].as_u64().unwrap_or_default();
        let bytes = field("bytes");
        assert!(bytes > 500_000, "iperf3 {args:?} from {from}: {sum}");
        let lost = field("lost_packets").saturating_sub(no_room);
        assert!(
            lost * 20 <= field("packets"),
            "iperf3 {args:?} from {from}: {sum}; receivers without room: {no_room}"
        );
        bytes
    });
    (there, here)
}

/// Counted since `before`.
pub fn delta(bed: &Bed, before: &Counters) -> Counters {
    bed.counters().since(before)
}

/// Packets dropped by the datapath, by reason.
pub fn drops(delta: &Counters) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    for count in delta.reasons.iter().filter(|c| c.verdict == "drop" && c.packets > 0) {
        *drops.entry(count.reason.clone()).or_default() += count.packets;
    }
    drops
}

/// A Service of namespace `shop` of type LoadBalancer with a number that gives all its addresses.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    pub name: &'static str,
    pub number: u8,
}

impl Service {
    pub fn cluster_ip(self, family: Family) -> IpAddr {
        self.address(family, "10.96.1.", "fd00:10:96::1:")
    }

    pub fn load_balancer_ip(self, family: Family) -> IpAddr {
        self.address(family, "203.0.113.", "2001:db8:203::")
    }

    fn address(self, family: Family, v4: &str, v6: &str) -> IpAddr {
        let prefix = if family == Family::V4 { v4 } else { v6 };
        format!("{prefix}{}", self.number).parse().expect("an address")
    }

    pub fn load_balancer(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.load_balancer_ip(family), port)
    }

    /// Port 80's on a node.
    pub fn http_node_port(self) -> u16 {
        30_000 + u16::from(self.number)
    }

    /// Port 53's on a node.
    pub fn echo_node_port(self) -> u16 {
        31_000 + u16::from(self.number)
    }

    /// The Service as YAML; `more` are further lines of `spec`, indented by two.
    pub fn manifest(self, more: &str) -> String {
        let Self { name, .. } = self;
        let [cluster_v4, cluster_v6] = FAMILIES.map(|family| self.cluster_ip(family));
        let [lb_v4, lb_v6] = FAMILIES.map(|family| self.load_balancer_ip(family));
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\n\
             spec:\n  type: LoadBalancer\n  clusterIP: {cluster_v4}\n\
             \x20 clusterIPs: [{cluster_v4}, \"{cluster_v6}\"]\n  ipFamilies: [IPv4, IPv6]\n\
             \x20 ipFamilyPolicy: RequireDualStack\n{more}\x20 ports:\n\
             \x20   - {{name: http, protocol: TCP, port: {HTTP}, targetPort: 8080, nodePort: {}}}\n\
             \x20   - {{name: echo, protocol: UDP, port: {ECHO}, targetPort: 5353, nodePort: {}}}\n\
             status:\n  loadBalancer:\n    ingress:\n      - ip: {lb_v4}\n      - ip: \"{lb_v6}\"\n",
            self.http_node_port(),
            self.echo_node_port(),
        )
    }

    /// Its EndpointSlices as YAML: the named pods of a lab made from `spec`.
    pub fn slices(self, spec: &LabSpec, pods: &[&str]) -> String {
        let name = "t".parse().expect("a name");
        let plan = sluice_lab::plan::Plan::new(&name, spec);
        let mut text = String::new();
        for family in FAMILIES {
            let _ = write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n\
                 \x20 name: {service}-{low}\n  namespace: shop\n  labels:\n\
                 \x20   kubernetes.io/service-name: {service}\naddressType: {family}\nports:\n\
                 \x20 - {{name: http, protocol: TCP, port: 8080}}\n\
                 \x20 - {{name: echo, protocol: UDP, port: 5353}}\nendpoints:\n",
                service = self.name,
                low = family.to_string().to_lowercase(),
            );
            for pod in pods {
                let (node, pod) = plan.pod(pod).expect("a pod of the lab");
                let _ = writeln!(
                    text,
                    "  - {{addresses: [\"{}\"], nodeName: {}, conditions: {{ready: true}}}}",
                    pod.address(family),
                    node.name,
                );
            }
            if pods.is_empty() {
                text.truncate(text.len() - 1);
                text.push_str(" []\n");
            }
        }
        text
    }

    /// Service and EndpointSlices.
    pub fn objects(self, spec: &LabSpec, pods: &[&str]) -> String {
        format!("{}{}", self.manifest(""), self.slices(spec, pods))
    }
}
