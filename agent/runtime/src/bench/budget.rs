//! What a link could carry, and what this machine's processors can: the smaller of the two.
//!
//! A frame of `n` bytes (FCS included) takes `n + 20` bytes of the wire: preamble, start of frame and
//! the gap before the next one (IEEE 802.3 clause 4.2.3.2). Where encapsulation makes a packet longer,
//! the side of the longer frames is the one that is full first (RFC 8219 section 5.1.1).

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::json;

use super::BenchError;
use super::compare::Report;
use super::progrun::ProgrunArgs;
use crate::cli::Output;

/// Preamble, start of frame delimiter and inter-frame gap, in bytes.
const BETWEEN_FRAMES: u32 = 20;
/// Smallest frame with its FCS, in bytes.
const SMALLEST_FRAME: u32 = 64;
/// Largest frame that is asked about: a jumbo frame and outer headers.
const LARGEST_FRAME: u32 = 16_000;
/// What a driver needs to receive a frame and drop it in XDP: 25 million frames a second on one core.
const DRIVER_NS: f64 = 40.0;

/// `sluice bench budget`.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    /// Speed of the link, such as 10G or 2500M.
    #[arg(long, value_name = "SPEED", required_unless_present = "interface")]
    link: Option<Speed>,
    /// Take the speed of this interface's link.
    #[arg(long, value_name = "NAME", conflicts_with = "link")]
    interface: Option<String>,
    /// Sizes of the innermost frames in bytes, FCS included.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [64, 512, 1518])]
    frame: Vec<u32>,
    /// Processors that receive frames [default: all of this machine].
    #[arg(long, value_name = "N")]
    cores: Option<u32>,
    /// What the driver adds to each packet, in nanoseconds: receive a frame and drop it in XDP, as
    /// `xdp-bench drop` measures on your NIC.
    #[arg(long, value_name = "NS", default_value_t = DRIVER_NS)]
    driver_ns: f64,
    /// Take this machine's costs from a report of `sluice bench progrun --output json`; without it they
    /// are measured now.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Tables for people or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Bits per second.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Speed(f64);

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no speed; write 10G, 2500M or the like");
        let unit = text.chars().last().ok_or_else(wrong)?;
        let factor = match unit.to_ascii_uppercase() {
            'G' => 1e9,
            'M' => 1e6,
            _ => return Err(wrong()),
        };
        let number = &text[..text.len() - unit.len_utf8()];
        match number.parse::<f64>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(Self(number * factor)),
            _ => Err(wrong()),
        }
    }
}

/// Bytes of outer headers on each side of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Outer {
    received: u32,
    sent: Option<u32>,
}

impl Outer {
    /// Of a path of `progrun`; None for what no packet takes.
    fn of(path: &str, family: &str) -> Option<Self> {
        let tunnel = if family == "v6" { 70 } else { 50 };
        let outer = match path {
            "pass" | "dnat-local" | "dnat-new" => Self { received: 0, sent: None },
            "drop" | "decap" | "decap-dnat" | "decap-dnat-new" => {
                Self { received: tunnel, sent: None }
            }
            "dnat-remote" => Self { received: 0, sent: Some(tunnel) },
            "reply-remote" => Self { received: tunnel, sent: Some(0) },
            _ => return None,
        };
        Some(outer)
    }

    /// Bytes of the wire that a packet takes on its fuller side.
    fn wire(self, frame: u32) -> u32 {
        let outer = self.received.max(self.sent.unwrap_or(0));
        (frame + outer).max(SMALLEST_FRAME) + BETWEEN_FRAMES
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Bottleneck {
    Link,
    Processors,
}

/// One path with frames of one size.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    family: String,
    flows: Option<u32>,
    /// Bytes of the innermost frame.
    frame: u32,
    /// Bytes of the wire for each packet.
    wire: u32,
    /// Packets per second of the full link.
    line_rate: f64,
    /// Nanoseconds that one core has for each packet of the full link.
    allowed_ns: f64,
    /// Nanoseconds that a packet costs here, the driver's part included.
    cost_ns: f64,
    /// Cores that the full link keeps busy.
    cores: f64,
    /// Packets per second of the cores that there are.
    rate: f64,
    /// Bits per second of the link at that rate.
    bits: f64,
    bottleneck: Bottleneck,
}

impl Line {
    fn new(speed: Speed, wire: u32, cost_ns: f64, cores: u32) -> Self {
        let line_rate = speed.0 / (f64::from(wire) * 8.0);
        let of_cores = f64::from(cores) * 1e9 / cost_ns;
        let rate = line_rate.min(of_cores);
        Self {
            name: String::new(),
            family: String::new(),
            flows: None,
            frame: 0,
            wire,
            line_rate,
            allowed_ns: 1e9 / line_rate,
            cost_ns,
            cores: line_rate * cost_ns / 1e9,
            rate,
            bits: rate * f64::from(wire) * 8.0,
            bottleneck: if of_cores < line_rate {
                Bottleneck::Processors
            } else {
                Bottleneck::Link
            },
        }
    }
}

pub(super) fn run(args: &BudgetArgs) -> Result<(String, ExitCode), BenchError> {
    args.check()?;
    let speed = args.speed()?;
    let cores = match args.cores {
        Some(cores) => cores,
        None => aya::util::nr_cpus().map_or(1, |n| n as u32),
    };
    let report = match &args.report {
        Some(path) => Report::read(path)?,
        None => {
            let measured = super::progrun::measure(&ProgrunArgs::short())?;
            Report::parse(&measured.json()).map_err(BenchError::Astray)?
        }
    };
    let lines = lines(args, speed, cores, &report);
    let text = match args.output {
        Output::Table => table(args, speed, cores, &lines, std::io::stdout().is_terminal()),
        Output::Json => {
            let value = json!({
                "bench": "budget",
                "link_bits_per_second": speed.0,
                "cores": cores,
                "driver_ns": args.driver_ns,
                "conditions": report.conditions,
                "rows": lines,
            });
            format!("{value:#}\n")
        }
    };
    Ok((text, ExitCode::SUCCESS))
}

impl BudgetArgs {
    fn check(&self) -> Result<(), BenchError> {
        let wrong =
            |option, value: String, problem| Err(BenchError::Option { option, value, problem });
        let sizes = SMALLEST_FRAME..=LARGEST_FRAME;
        if let Some(frame) = self.frame.iter().find(|frame| !sizes.contains(frame)) {
            return wrong("--frame", frame.to_string(), "give 64 to 16000 bytes, FCS included");
        }
        if self.cores == Some(0) {
            return wrong("--cores", "0".to_owned(), "at least one processor receives frames");
        }
        if !(self.driver_ns.is_finite() && self.driver_ns >= 0.0) {
            return wrong("--driver-ns", self.driver_ns.to_string(), "give nanoseconds, 0 or more");
        }
        Ok(())
    }

    fn speed(&self) -> Result<Speed, BenchError> {
        if let Some(speed) = self.link {
            return Ok(speed);
        }
        let name = self.interface.as_deref().unwrap_or_default();
        // Megabits; -1 or an error where there is no link or the device has none.
        let megabits = std::fs::read_to_string(format!("/sys/class/net/{name}/speed"))
            .ok()
            .and_then(|text| text.trim().parse::<f64>().ok())
            .filter(|speed| *speed > 0.0);
        megabits.map(|speed| Speed(speed * 1e6)).ok_or_else(|| BenchError::Option {
            option: "--interface",
            value: name.to_owned(),
            problem: "no such interface, or its link is down or has no speed; give --link",
        })
    }
}

fn lines(args: &BudgetArgs, speed: Speed, cores: u32, report: &Report) -> Vec<Line> {
    let mut lines = Vec::new();
    for row in &report.rows {
        let (Some(family), Some(figures)) = (&row.family, row.figures) else { continue };
        let Some(outer) = Outer::of(&row.name, family) else { continue };
        for &frame in &args.frame {
            let cost = figures.net + args.driver_ns;
            let line = Line::new(speed, outer.wire(frame), cost, cores);
            let (name, family) = (row.name.clone(), family.clone());
            lines.push(Line { name, family, flows: row.flows, frame, ..line });
        }
    }
    lines
}

fn table(args: &BudgetArgs, speed: Speed, cores: u32, lines: &[Line], colour: bool) -> String {
    let mut text = format!(
        "{:.1} Gbit/s, {cores} cores, {:.0} ns of the driver for each packet\n\n",
        speed.0 / 1e9,
        args.driver_ns
    );
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let names = [
        "PATH",
        "IP",
        "FLOWS",
        "FRAME",
        "WIRE",
        "LINE Mpps",
        "NS ALLOWED",
        "NS HERE",
        "CORES NEEDED",
        "Mpps",
        "Gbit/s",
        "BOTTLENECK",
    ];
    table.set_header(names.map(|name| {
        let cell = Cell::new(name);
        if colour { cell.add_attribute(Attribute::Bold) } else { cell }
    }));
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for line in lines {
        table.add_row(vec![
            Cell::new(&line.name),
            Cell::new(&line.family),
            right(line.flows.map_or("new".to_owned(), |n| n.to_string())),
            right(line.frame.to_string()),
            right(line.wire.to_string()),
            right(format!("{:.2}", line.line_rate / 1e6)),
            right(format!("{:.1}", line.allowed_ns)),
            right(format!("{:.1}", line.cost_ns)),
            right(format!("{:.1}", line.cores)),
            right(format!("{:.2}", line.rate / 1e6)),
            right(format!("{:.1}", line.bits / 1e9)),
            Cell::new(match line.bottleneck {
                Bottleneck::Link => "link",
                Bottleneck::Processors => "processors",
            }),
        ]);
    }
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push_str(
        "\nFRAME: bytes of the innermost frame with its FCS. WIRE: what a packet takes of the link on its fuller side, outer headers, preamble and gap included. NS HERE: the program, net of F, and the driver.\nAn upper bound: what is delivered to a pod or to the kernel costs more behind the program, and cores share caches and memory.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_gigabit_ethernet_carries_fourteen_point_eight_eight_million_smallest_frames() {
        let plain = Outer { received: 0, sent: None };
        let line = Line::new("10G".parse().expect("a speed"), plain.wire(64), 100.0, 1);
        assert_eq!(line.wire, 84);
        assert_eq!((line.line_rate / 1e4).round(), 1488.0);
        assert_eq!((line.allowed_ns * 10.0).round(), 672.0);
        // Ten million packets a second of one core: two thirds of the link.
        assert_eq!((line.rate, line.bottleneck), (1e7, Bottleneck::Processors));
        assert_eq!((line.cores * 100.0).round(), 149.0);
    }

    #[test]
    fn link_is_full_first_where_frames_are_large() {
        let plain = Outer { received: 0, sent: None };
        let line = Line::new(Speed(1e10), plain.wire(1518), 100.0, 1);
        assert_eq!(line.bottleneck, Bottleneck::Link);
        assert_eq!(line.rate, line.line_rate);
        assert!((line.bits - 1e10).abs() < 1.0);
    }

    #[test]
    fn encapsulation_counts_on_the_side_that_has_it() {
        let of = |path| Outer::of(path, "v4").expect("a path");
        assert_eq!(of("dnat-local").wire(64), 84);
        assert_eq!(of("decap").wire(64), 134);
        assert_eq!(of("dnat-remote").wire(64), 134, "sent longer than received");
        assert_eq!(Outer::of("decap", "v6").expect("a path").wire(64), 154);
        assert_eq!(Outer::of("floor", "v4"), None);
    }

    #[test]
    fn speed_has_a_unit() {
        assert_eq!("2500M".parse(), Ok(Speed(2.5e9)));
        assert_eq!("25g".parse(), Ok(Speed(2.5e10)));
        for wrong in ["", "10", "G", "-1G", "fast"] {
            assert!(wrong.parse::<Speed>().is_err(), "{wrong}");
        }
    }
}
