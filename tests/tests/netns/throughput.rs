//! Bulk TCP through the datapath against the kernel's plain forwarding, in one run.
//!
//! One lab for each way of delivery and one without an agent, all of the same shape, and all hosts
//! with their offloads on: the fabric's ports cut and sum, as NICs would. A round runs every lab
//! once, one after the other, so that what else the machine does meets all of them. What a lab can
//! do is its best round: other work takes away, nothing adds.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use serde_json::Value;
use sluice_lab::plan::UPLINK;
use sluice_lab::{LabSpec, Mode};

use crate::bed::{Bed, Config, FAMILIES, HTTP, Service, wait};

const POD: &str = "pod1-1";
const PEER: &str = "pod2-1";
const SERVICE: Service = Service { name: "bulk", number: 1 };
/// What the Service's port 80 leads to.
const PORT: u16 = 8080;
/// Rounds that decide if all goes well, and rounds after which it does not.
const ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 10;
/// What one transfer carries: some tenths of a second.
const TRANSFER: &str = "100M";
/// The goal: this share of what the kernel forwards.
const GOAL: f64 = 0.95;

/// A way of delivery and its lab; without a mode, the kernel alone.
struct Rival {
    name: String,
    bed: Bed,
    mode: Option<Mode>,
}

impl Rival {
    fn new(mode: Option<Mode>, delivery: &'static str) -> Self {
        let spec = LabSpec {
            offloads: true,
            fabric_xdp: false,
            servers: false,
            ..LabSpec::kernel_only(2, 1)
        };
        let objects = [("bulk.yaml", SERVICE.objects(&spec, &[POD]))];
        let config = Config { delivery, ..Config::new(mode.unwrap_or(Mode::Native)) };
        let mut bed = match mode {
            Some(_) => Bed::up(&spec, config, &objects),
            None => Bed::without_agent(&spec, config, &objects),
        };
        let name = match mode {
            Some(mode) => format!("{} {delivery}", mode.as_str()),
            None => "kernel".to_owned(),
        };
        if let Some(mode) = mode {
            assert_eq!(bed.status()["mode"][UPLINK], mode.as_str());
        } else {
            route_to_pods(&bed);
        }
        let host = bed.lab.host(POD).expect("a pod");
        let mut server = Command::new("iperf3");
        server.args(["--server", "--port", &PORT.to_string()]);
        bed.lab.spawn(&host, "iperf3", &mut server).expect("iperf3");
        Self { name, bed, mode }
    }

    /// Bits per second that arrive of a transfer.
    fn run(&self, path: Path, target: SocketAddr) -> f64 {
        let (from, to, port) = (path.from(), target.ip().to_string(), target.port().to_string());
        let args = ["--client", &to, "--port", &port, "--bytes", TRANSFER, "--json"];
        let result = wait("iperf3", || {
            let (_, text) = self.bed.try_run(from, "iperf3", &args);
            let json: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
            match json["error"].as_str() {
                Some(error) => Err(error.to_owned()),
                None => Ok(json),
            }
        });
        result["end"]["sum_received"]["bits_per_second"].as_f64().expect("a rate")
    }

    /// Where the traffic goes: to the Service where there is somebody who translates.
    fn target(&self, path: Path, family: sluice_lab::Family) -> SocketAddr {
        let pod: IpAddr = self.bed.pod(POD).address(family);
        match path {
            Path::Dnat if self.mode.is_some() => SERVICE.load_balancer(family, HTTP),
            _ => SocketAddr::new(pod, PORT),
        }
    }
}

/// The client reaches pods by way of node1, without a Service.
fn route_to_pods(bed: &Bed) {
    let node = bed.node(1);
    for (cidr, via) in [
        (node.pod_cidr_v4.to_string(), node.address_v4.to_string()),
        (node.pod_cidr_v6.to_string(), node.address_v6.to_string()),
    ] {
        bed.run("client", "ip", &["route", "add", &cidr, "via", &via]);
    }
}

/// What the datapath does on the way.
#[derive(Clone, Copy, Debug)]
enum Path {
    /// From a pod of another node, through the tunnel.
    Decap,
    /// From the client to a Service.
    Dnat,
}

impl Path {
    fn from(self) -> &'static str {
        match self {
            Path::Decap => PEER,
            Path::Dnat => "client",
        }
    }
}

fn best(rates: &[f64]) -> f64 {
    rates.iter().copied().fold(0.0, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs rounds until a way of delivery reaches the goal in every column, and prints the table.
fn compare(rivals: &[Rival], columns: &[(Path, sluice_lab::Family)]) {
    let mut rates: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    let share = |rates: &BTreeMap<(usize, usize), Vec<f64>>, rival, column| {
        best(&rates[&(rival, column)]) / best(&rates[&(0, column)])
    };
    let reached = |rates: &BTreeMap<(usize, usize), Vec<f64>>, column| {
        (1..rivals.len()).any(|rival| share(rates, rival, column) >= GOAL)
    };
    for round in 0..MOST_ROUNDS {
        for (column, (path, family)) in columns.iter().enumerate() {
            for (i, rival) in rivals.iter().enumerate() {
                let rate = rival.run(*path, rival.target(*path, *family));
                rates.entry((i, column)).or_default().push(rate);
            }
        }
        if round + 1 >= ROUNDS && (0..columns.len()).all(|column| reached(&rates, column)) {
            break;
        }
    }
    println!(
        "| way | {} |",
        columns.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(" | ")
    );
    for (i, rival) in rivals.iter().enumerate() {
        let cells: Vec<String> = (0..columns.len())
            .map(|column| {
                let own = &rates[&(i, column)];
                let paired = own.iter().zip(&rates[&(0, column)]).map(|(a, b)| a / b).collect();
                format!(
                    "{:.2} Gbit/s, {:.2} (median of rounds {:.2})",
                    best(own) / 1e9,
                    share(&rates, i, column),
                    median(paired),
                )
            })
            .collect();
        println!("| {} | {} |", rival.name, cells.join(" | "));
    }
    for (column, (path, family)) in columns.iter().enumerate() {
        assert!(reached(&rates, column), "{path:?} {family:?}: no way reaches {GOAL}: {rates:?}");
    }
}

#[test]
fn bulk_tcp_reaches_what_the_kernel_forwards() {
    let mut rivals = vec![Rival::new(None, "stack")];
    for mode in [Mode::Tc, Mode::Native, Mode::Generic] {
        for delivery in ["stack", "peer", "redirect"] {
            rivals.push(Rival::new(Some(mode), delivery));
        }
    }
    let mut columns = Vec::new();
    for family in FAMILIES {
        columns.extend([(Path::Decap, family), (Path::Dnat, family)]);
    }
    compare(&rivals, &columns);
}
