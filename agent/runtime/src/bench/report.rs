//! The figures for people and for programs.

use std::time::Duration;

use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::json;
use sluice_abi::Family;

use super::BenchError;
use super::conditions::Conditions;
use super::scenario::{Kind, Scenario};
use super::summary::{Summary, summary};

/// One scenario's samples.
pub struct Row {
    /// What was measured.
    pub scenario: Scenario,
    samples: Vec<f64>,
    error: Option<String>,
}

impl Row {
    /// Without samples yet.
    pub const fn new(scenario: Scenario) -> Self {
        Self { scenario, samples: Vec::new(), error: None }
    }

    /// One more sample.
    pub fn add(&mut self, per_packet: Duration) {
        // The kernel cuts off what is behind the point: half a nanosecond on average.
        self.samples.push(per_packet.as_nanos() as f64 + 0.5);
    }

    /// The first error counts: the row has no figures.
    pub fn fail(&mut self, error: &BenchError) {
        self.error.get_or_insert_with(|| error.to_string());
    }
}

#[derive(Serialize)]
struct Line {
    name: &'static str,
    text: &'static str,
    family: Option<&'static str>,
    /// Connections that take turns; none when every packet is of a new one.
    flows: Option<u32>,
    #[serde(flatten)]
    figures: Option<Summary>,
    error: Option<String>,
    samples: Vec<f64>,
}

/// All figures with their conditions.
pub struct Report {
    conditions: Conditions,
    lines: Vec<Line>,
}

impl Report {
    /// Sums the rows up; the first [`Kind::Floor`] row is F.
    pub fn new(conditions: Conditions, rows: Vec<Row>) -> Self {
        let floors = rows
            .iter()
            .find(|row| row.scenario.kind == Kind::Floor && row.error.is_none())
            .map(|row| row.samples.clone())
            .unwrap_or_default();
        let lines = rows.into_iter().map(|row| Line::new(row, &floors)).collect();
        Self { conditions, lines }
    }

    /// Whether every row has figures.
    pub fn is_good(&self) -> bool {
        self.lines.iter().all(|line| line.figures.is_some())
    }

    /// One JSON object.
    pub fn json(&self) -> String {
        let value = json!({
            "bench": "progrun",
            "unit": "ns per packet",
            "conditions": self.conditions,
            "rows": self.lines,
        });
        format!("{value:#}\n")
    }

    /// For people.
    pub fn table(&self, colour: bool) -> String {
        let c = &self.conditions;
        let mut text = format!(
            "{}: {} ({} CPUs, {}), measured on CPU {}, load {}\nkernel {}; JIT {}; bpf_stats {}{}\n",
            c.host,
            c.cpu,
            c.cpus,
            c.arch,
            c.measured_on,
            c.load,
            c.kernel,
            c.jit,
            c.bpf_stats,
            c.governor.as_ref().map(|g| format!("; governor {g}")).unwrap_or_default(),
        );
        for (name, state) in &c.mitigations {
            text.push_str(&format!("  {name}: {state}\n"));
        }
        text.push_str(&format!(
            "program tag {}, {} instructions verified, {} bytes of machine code; mode {}; SNAT ports {} to {}; maps: {}\n{} rounds of {} packets of {} bytes (inner frame)\n\n",
            c.program.tag,
            c.program.verified_instructions.unwrap_or_default(),
            c.program.machine_bytes,
            c.mode,
            c.snat_ports[0],
            c.snat_ports[1],
            c.maps.iter().map(|(n, e)| format!("{n} {e}")).collect::<Vec<_>>().join(", "),
            c.rounds,
            c.repeat,
            c.frame,
        ));
        for line in self.figures(colour).lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        for line in &self.lines {
            if let Some(error) = &line.error {
                text.push_str(&format!("ERROR {}: {error}\n", line.title()));
            }
        }
        text.push_str("\nF: the wrapper with an empty program. NET: median minus F's. x F: median of the rounds' ratios, and its quartiles.\nCompare ratios, never nanoseconds; rows with 65536 flows measure caches.\n");
        text
    }

    fn figures(&self, colour: bool) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        let names =
            ["PATH", "IP", "FLOWS", "NS", "MAD", "MIN", "MAX", "NET", "x F", "QUARTILES", ""];
        table.set_header(names.map(|name| {
            let cell = Cell::new(name);
            if colour { cell.add_attribute(Attribute::Bold) } else { cell }
        }));
        for line in &self.lines {
            let number = |value: f64, digits: usize| {
                Cell::new(format!("{value:.digits$}")).set_alignment(CellAlignment::Right)
            };
            let flows = line.flows.map_or("new".to_owned(), |n| n.to_string());
            let mut cells = vec![
                Cell::new(line.name),
                Cell::new(line.family.unwrap_or_default()),
                Cell::new(flows).set_alignment(CellAlignment::Right),
            ];
            match &line.figures {
                Some(f) => cells.extend([
                    number(f.median, 1),
                    number(f.mad, 1),
                    number(f.min, 1),
                    number(f.max, 1),
                    number(f.net, 1),
                    number(f.ratio, 2),
                    Cell::new(format!("{:.2}..{:.2}", f.ratio_low, f.ratio_high)),
                ]),
                None => {
                    cells.push(Cell::new("ERROR"));
                    cells.extend((0..6).map(|_| Cell::new("")));
                }
            }
            cells.push(Cell::new(line.text));
            table.add_row(cells);
        }
        table
    }
}

impl Line {
    fn new(row: Row, floors: &[f64]) -> Self {
        let scenario = row.scenario;
        let figures = if row.error.is_none() { summary(&row.samples, floors) } else { None };
        let error = match (&figures, row.error) {
            (None, None) => Some("F could not be measured".to_owned()),
            (_, error) => error,
        };
        Self {
            name: scenario.kind.label(),
            text: scenario.kind.text(),
            family: (!scenario.kind.is_floor()).then_some(match scenario.family {
                Family::V4 => "v4",
                Family::V6 => "v6",
            }),
            flows: (!scenario.kind.is_new()).then_some(scenario.flows),
            figures,
            error,
            samples: row.samples,
        }
    }

    fn title(&self) -> String {
        let flows = self.flows.map_or("new flows".to_owned(), |n| format!("{n} flows"));
        format!("{} {} {flows}", self.name, self.family.unwrap_or_default())
    }
}
