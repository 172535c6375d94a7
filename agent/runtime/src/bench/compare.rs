//! Two reports beside each other, and a gate on what became dearer.
//!
//! Only ratios to F are compared: nanoseconds of two machines, or of one machine on two days, say
//! nothing. Rows with many flows measure caches and are shown, never judged.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table, presets};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::BenchError;
use crate::cli::Output;

/// Two runs of one program on a shared machine differ by as much.
const NOISE: f64 = 1.1;
/// More flows than this measure the processor's caches.
const JUDGED_FLOWS: u32 = 4096;

/// `sluice bench compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The earlier report: the output of `sluice bench progrun --output json`.
    #[arg(value_name = "A.json")]
    earlier: PathBuf,
    /// The later one.
    #[arg(value_name = "B.json")]
    later: PathBuf,
    /// End with status 1 if a row's ratio to F has grown by more than this factor, such as 1.1, and by
    /// more than the rounds of either report differ. Rows with more than 4096 flows are not judged.
    #[arg(long, value_name = "FACTOR")]
    gate: Option<f64>,
    /// Tables for people or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// A report, as far as it is compared.
#[derive(Debug, Deserialize)]
pub(super) struct Report {
    bench: String,
    /// Under what it was made.
    pub conditions: Value,
    /// A path each.
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Row {
    /// The path.
    pub name: String,
    /// `v4` or `v6`; none of the floors.
    pub family: Option<String>,
    /// Connections that take turns; none when every packet is of a new one.
    pub flows: Option<u32>,
    /// None if the path could not be measured.
    #[serde(flatten)]
    pub figures: Option<Figures>,
    /// Nanoseconds, median of the rounds.
    #[serde(default)]
    pub median: Option<f64>,
    /// Nanoseconds of each round.
    #[serde(default)]
    pub samples: Vec<f64>,
    /// What the path is, for people.
    #[serde(default)]
    pub text: Option<String>,
    /// Why it could not be measured.
    #[serde(default)]
    pub error: Option<String>,
}

impl Row {
    /// Path, family and connections.
    pub fn title(&self) -> String {
        title(&self.name, self.family.as_deref(), self.flows)
    }
}

fn title(name: &str, family: Option<&str>, flows: Option<u32>) -> String {
    let flows = flows.map_or("new flows".to_owned(), |n| format!("{n} flows"));
    format!("{name} {} {flows}", family.unwrap_or_default())
}

/// Ratios to F, and nanoseconds beyond F.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(super) struct Figures {
    /// Median of the rounds.
    pub ratio: f64,
    /// First quartile.
    pub ratio_low: f64,
    /// Third quartile.
    pub ratio_high: f64,
    /// Nanoseconds beyond F.
    pub net: f64,
}

/// What the two reports say of one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    /// The rounds' quartiles overlap, or the ratios differ by less than a tenth.
    Same,
    /// Cheaper, and the quartiles lie apart.
    Better,
    /// Dearer, and the quartiles lie apart.
    Worse,
    /// In one report only, or without figures.
    Alone,
}

#[derive(Debug, Serialize)]
struct Line {
    name: String,
    family: Option<String>,
    flows: Option<u32>,
    earlier: Option<Figures>,
    later: Option<Figures>,
    factor: Option<f64>,
    change: Change,
    /// Whether the gate is closed by this row.
    over: bool,
}

pub(super) fn run(args: &CompareArgs) -> Result<(String, ExitCode), BenchError> {
    if let Some(gate) = args.gate
        && !(gate.is_finite() && gate >= 1.0)
    {
        return Err(BenchError::Option {
            option: "--gate",
            value: gate.to_string(),
            problem: "give a factor of 1 or more, such as 1.1",
        });
    }
    let (earlier, later) = (Report::read(&args.earlier)?, Report::read(&args.later)?);
    let lines = lines(&earlier.rows, &later.rows, args.gate);
    let over = lines.iter().any(|line| line.over);
    let differing = differing(&earlier.conditions, &later.conditions);
    let text = match args.output {
        Output::Table => table(&lines, &differing, args.gate, std::io::stdout().is_terminal()),
        Output::Json => {
            let value = json!({
                "bench": "compare",
                "unit": "ratio to F",
                "gate": args.gate,
                "passed": !over,
                "conditions_that_differ": differing,
                "rows": lines,
            });
            format!("{value:#}\n")
        }
    };
    Ok((text, if over { ExitCode::FAILURE } else { ExitCode::SUCCESS }))
}

impl Report {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is no report of `progrun`.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let fail = |problem: String| BenchError::Report { path: path.to_owned(), problem };
        let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        Self::parse(&text).map_err(fail)
    }

    /// Reads the JSON of a report.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let report: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if report.bench != "progrun" {
            return Err(format!("a report of `{}`, which has no ratios to F", report.bench));
        }
        Ok(report)
    }
}

type Key = (String, Option<String>, Option<u32>);

fn lines(earlier: &[Row], later: &[Row], gate: Option<f64>) -> Vec<Line> {
    let key = |row: &Row| -> Key { (row.name.clone(), row.family.clone(), row.flows) };
    let before: BTreeMap<Key, &Row> = earlier.iter().map(|row| (key(row), row)).collect();
    let after: BTreeMap<Key, &Row> = later.iter().map(|row| (key(row), row)).collect();
    let gone = earlier.iter().filter(|row| !after.contains_key(&key(row)));
    later
        .iter()
        .map(|row| Line::new(before.get(&key(row)).copied(), Some(row), gate))
        .chain(gone.map(|row| Line::new(Some(row), None, gate)))
        .collect()
}

impl Line {
    fn new(earlier: Option<&Row>, later: Option<&Row>, gate: Option<f64>) -> Self {
        let row = later.or(earlier);
        let figures = |row: Option<&Row>| row.and_then(|row| row.figures);
        let (before, after) = (figures(earlier), figures(later));
        let both = before.zip(after);
        let factor = both.map(|(a, b)| b.ratio / a.ratio);
        let change = both.map_or(Change::Alone, |(a, b)| change(a, b));
        let flows = row.and_then(|row| row.flows);
        let judged = flows.is_none_or(|flows| flows <= JUDGED_FLOWS);
        let over = judged
            && change == Change::Worse
            && gate.zip(factor).is_some_and(|(gate, factor)| factor > gate);
        Self {
            name: row.map(|row| row.name.clone()).unwrap_or_default(),
            family: row.and_then(|row| row.family.clone()),
            flows,
            earlier: before,
            later: after,
            factor,
            change,
            over,
        }
    }
}

fn change(earlier: Figures, later: Figures) -> Change {
    if later.ratio_low > earlier.ratio_high && later.ratio > earlier.ratio * NOISE {
        Change::Worse
    } else if later.ratio_high < earlier.ratio_low && later.ratio * NOISE < earlier.ratio {
        Change::Better
    } else {
        Change::Same
    }
}

/// Conditions that have another value in the two reports: name, earlier, later.
fn differing(earlier: &Value, later: &Value) -> Vec<(String, Value, Value)> {
    let (Some(a), Some(b)) = (earlier.as_object(), later.as_object()) else { return Vec::new() };
    let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
    names.sort();
    names.dedup();
    let value = |of: &serde_json::Map<String, Value>, name: &str| {
        of.get(name).cloned().unwrap_or(Value::Null)
    };
    names
        .into_iter()
        .map(|name| (name.clone(), value(a, name), value(b, name)))
        .filter(|(_, a, b)| a != b)
        .collect()
}

fn table(
    lines: &[Line],
    differing: &[(String, Value, Value)],
    gate: Option<f64>,
    colour: bool,
) -> String {
    let mut text = String::new();
    for (name, a, b) in differing {
        text.push_str(&format!("{name} differs: {a} | {b}\n"));
    }
    if !differing.is_empty() {
        text.push('\n');
    }
    for line in figures(lines, colour).lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push_str(
        "\nA, B: ratios to F, and the quartiles of the rounds. Same: the quartiles overlap, or less than a tenth.\n",
    );
    if let Some(gate) = gate {
        let over: Vec<String> = lines.iter().filter(|line| line.over).map(Line::title).collect();
        text.push_str(&if over.is_empty() {
            format!("PASS: no path is more than {gate} times as dear as before\n")
        } else {
            format!("FAIL: more than {gate} times as dear as before: {}\n", over.join(", "))
        });
    }
    text
}

fn figures(lines: &[Line], colour: bool) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["PATH", "IP", "FLOWS", "A", "B", "B/A", ""].map(|name| {
        let cell = Cell::new(name);
        if colour { cell.add_attribute(Attribute::Bold) } else { cell }
    }));
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let ratio = |f: Option<Figures>| {
        right(f.map_or("-".to_owned(), |f| {
            format!("{:.2} ({:.2}..{:.2})", f.ratio, f.ratio_low, f.ratio_high)
        }))
    };
    for line in lines {
        let (word, hue) = match line.change {
            Change::Same => ("same", None),
            Change::Better => ("better", Some(Color::Green)),
            Change::Worse => ("worse", Some(Color::Red)),
            Change::Alone => ("in one report only", Some(Color::Yellow)),
        };
        let word = Cell::new(word);
        table.add_row(vec![
            Cell::new(&line.name),
            Cell::new(line.family.as_deref().unwrap_or_default()),
            right(line.flows.map_or("new".to_owned(), |n| n.to_string())),
            ratio(line.earlier),
            ratio(line.later),
            right(line.factor.map_or("-".to_owned(), |f| format!("{f:.2}"))),
            match hue {
                Some(hue) if colour => word.fg(hue),
                _ => word,
            },
        ]);
    }
    table
}

impl Line {
    fn title(&self) -> String {
        title(&self.name, self.family.as_deref(), self.flows)
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn row(name: &str, flows: u32, [low, ratio, high]: [f64; 3]) -> Row {
        Row {
            name: name.to_owned(),
            family: Some("v4".to_owned()),
            flows: Some(flows),
            figures: Some(Figures { ratio, ratio_low: low, ratio_high: high, net: 0.0 }),
            median: None,
            samples: Vec::new(),
            text: None,
            error: None,
        }
    }

    #[test]
    fn noise_closes_no_gate() {
        let (a, b) = (row("decap", 1, [1.9, 2.0, 2.4]), row("decap", 1, [2.3, 2.5, 2.9]));
        let lines = lines(&[a], &[b], Some(1.1));
        assert_eq!((lines[0].change, lines[0].over), (Change::Same, false));
    }

    #[test]
    fn dearer_beyond_the_rounds_and_the_factor_closes_the_gate() {
        let (a, b) = (row("decap", 1, [1.9, 2.0, 2.1]), row("decap", 1, [2.3, 2.4, 2.5]));
        let at = |gate| lines(from_ref(&a), from_ref(&b), gate)[0].over;
        assert!(at(Some(1.1)));
        assert!(!at(Some(1.3)), "within the factor");
        assert!(!at(None));
    }

    #[test]
    fn rows_that_measure_caches_are_not_judged() {
        let (a, b) = (row("decap", 65_536, [1.9, 2.0, 2.1]), row("decap", 65_536, [9.0, 9.1, 9.2]));
        let lines = lines(&[a], &[b], Some(1.1));
        assert_eq!((lines[0].change, lines[0].over), (Change::Worse, false));
    }

    #[test]
    fn rows_of_one_report_are_named_and_not_judged() {
        let only = row("decap", 1, [1.9, 2.0, 2.1]);
        for lines in
            [lines(from_ref(&only), &[], Some(1.0)), lines(&[], from_ref(&only), Some(1.0))]
        {
            assert_eq!((lines[0].change, lines[0].over), (Change::Alone, false));
            assert_eq!(lines[0].name, "decap");
        }
    }

    #[test]
    fn conditions_that_differ_are_told() {
        let (a, b) = (json!({"kernel": "6.1", "cpus": 2}), json!({"kernel": "6.12", "cpus": 2}));
        let differing = differing(&a, &b);
        assert_eq!(differing, [("kernel".to_owned(), json!("6.1"), json!("6.12"))]);
    }
}
