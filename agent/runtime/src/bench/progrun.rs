//! Rounds: every row once a round, each round beginning with another row, so that whatever changes
//! on the machine meanwhile changes all rows alike.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use sluice_abi::Family;

use super::BenchError;
use super::conditions::Conditions;
use super::report::{Report, Row};
use super::rig::Rig;
use super::scenario::{Kind, Scenario};
use super::tables::FAMILIES;
use crate::attach::OBJECT;
use crate::cli::Output;
use crate::config::Config;

/// Most flows that take turns: more would need another table than the default's twice over.
const MAX_FLOWS: u32 = 65_536;
/// Fewer packets than this measure the call, not the program.
const MIN_REPEAT: u32 = 1_000;
/// Places of the connection table per flow, so that no set overflows.
const PLACES_PER_FLOW: u32 = 4;

/// `sluice bench progrun`.
#[derive(Debug, Args)]
pub struct ProgrunArgs {
    /// Rounds; each measures every row once.
    #[arg(long, value_name = "N", default_value_t = 12)]
    rounds: u32,
    /// Packets of each sample.
    #[arg(long, value_name = "N", default_value_t = 150_000)]
    repeat: u32,
    /// Known connections that take turns: powers of two, at most 65536. Compare 4096; 65536 measures
    /// the processor's caches more than the program.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 4096])]
    flows: Vec<u32>,
    /// Only this IP version.
    #[arg(long, value_enum)]
    family: Option<FamilyName>,
    /// Only these paths (by their names in the table); F is always measured.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    only: Vec<String>,
    /// The processor to measure on [default: the last one that this process may use].
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Measure this BPF object instead of the one that the agent carries: to compare two builds.
    #[arg(long, value_name = "FILE")]
    object: Option<PathBuf>,
    /// Tables for people or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FamilyName {
    /// IPv4 in IPv4 tunnels.
    V4,
    /// IPv6 in IPv6 tunnels.
    V6,
}

impl ProgrunArgs {
    /// Few rounds of every path, with as many connections as are compared.
    pub(super) fn short() -> Self {
        Self {
            rounds: 5,
            repeat: 50_000,
            flows: vec![4096],
            family: None,
            only: Vec::new(),
            cpu: None,
            object: None,
            output: Output::Table,
        }
    }

    fn check(&self) -> Result<(), BenchError> {
        let wrong =
            |option, value: String, problem| Err(BenchError::Option { option, value, problem });
        if self.rounds == 0 {
            return wrong("--rounds", "0".to_owned(), "at least one round is needed");
        }
        if self.repeat < MIN_REPEAT {
            return wrong("--repeat", self.repeat.to_string(), "at least 1000 packets are needed");
        }
        match self.flows.iter().find(|n| !n.is_power_of_two() || **n > MAX_FLOWS) {
            Some(n) => wrong("--flows", n.to_string(), "give powers of two, at most 65536"),
            None => Ok(()),
        }
    }

    fn kinds(&self) -> Result<Vec<Kind>, BenchError> {
        if let Some(name) = self.only.iter().find(|n| Kind::ALL.iter().all(|k| k.label() != **n)) {
            return Err(BenchError::Option {
                option: "--only",
                value: name.clone(),
                problem: "no such path; the names are those of the table's first column",
            });
        }
        Ok(Kind::ALL
            .into_iter()
            .filter(|kind| {
                *kind == Kind::Floor
                    || self.only.is_empty()
                    || self.only.iter().any(|name| name == kind.label())
            })
            .collect())
    }

    fn families(&self) -> &[Family] {
        match self.family {
            None => &FAMILIES,
            Some(FamilyName::V4) => &FAMILIES[..1],
            Some(FamilyName::V6) => &FAMILIES[1..],
        }
    }
}

pub(super) fn run(args: &ProgrunArgs) -> Result<(String, ExitCode), BenchError> {
    let report = measure(args)?;
    let code = if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let text = match args.output {
        Output::Table => report.table(std::io::stdout().is_terminal()),
        Output::Json => report.json(),
    };
    Ok((text, code))
}

/// Measures, with a bar on a terminal.
///
/// # Errors
/// When nothing could be measured.
pub(super) fn measure(args: &ProgrunArgs) -> Result<Report, BenchError> {
    args.check()?;
    let scenarios = Scenario::all(&args.kinds()?, args.families(), &args.flows);
    let mut sizes = Config::default().maps;
    let flows = args.flows.iter().copied().max().unwrap_or(1);
    sizes.flow_sets = sizes.flow_sets.max(flows * PLACES_PER_FLOW / sluice_abi::FLOW_WAYS as u32);
    let cpu = stay_on_one_cpu(args.cpu)?;
    let bar = progress(u64::from(args.rounds) * scenarios.len() as u64);
    bar.set_message("loading");
    let mut rig = match &args.object {
        Some(path) => {
            let object = std::fs::read(path)
                .map_err(|source| BenchError::Object { path: path.clone(), source })?;
            Rig::load(&object, &sizes)?
        }
        None => Rig::load(OBJECT, &sizes)?,
    };
    let conditions = Conditions::gather(&rig, &sizes, cpu, args.rounds, args.repeat)?;
    let mut rows: Vec<Row> = scenarios.iter().copied().map(Row::new).collect();
    if scenarios.iter().any(|s| s.kind.is_new()) {
        bar.set_message("filling the connection table");
        rig.fill_flow_table()?;
    }
    // The first round warms caches and branch predictors up and is not counted.
    for round in 0..=args.rounds {
        for i in 0..rows.len() {
            let at = (i + round as usize) % rows.len();
            let row = &mut rows[at];
            bar.set_message(row.scenario.kind.label());
            let repeat = if round == 0 { args.repeat.div_ceil(4) } else { args.repeat };
            match rig.sample(&row.scenario, repeat) {
                Ok(sample) if round > 0 => row.add(sample.per_packet),
                Ok(_) => {}
                Err(error @ BenchError::Astray(_)) => row.fail(&error),
                Err(error) => return Err(error),
            }
            if round > 0 {
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(Report::new(conditions, rows))
}

/// Keeps the calling thread on one processor, which it returns.
fn stay_on_one_cpu(wanted: Option<usize>) -> Result<usize, BenchError> {
    let me = Pid::from_raw(0);
    let allowed = sched_getaffinity(me).map_err(|source| BenchError::Cpu { cpu: 0, source })?;
    let last = (0..CpuSet::count()).rev().find(|i| allowed.is_set(*i).unwrap_or(false));
    let cpu = wanted.or(last).unwrap_or(0);
    let fail = |source| BenchError::Cpu { cpu, source };
    let mut one = CpuSet::new();
    one.set(cpu).map_err(fail)?;
    sched_setaffinity(me, &one).map_err(fail)?;
    Ok(cpu)
}

/// A bar on a terminal, nothing elsewhere.
fn progress(steps: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("[{bar:40}] {percent:>3}% {eta:>4} left  {msg}")
    {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ProgrunArgs {
        ProgrunArgs {
            rounds: 1,
            repeat: 1000,
            flows: vec![1, 4096],
            family: None,
            only: Vec::new(),
            cpu: None,
            object: None,
            output: Output::Table,
        }
    }

    #[test]
    fn options_that_measure_nothing_are_refused_with_what_would_do() {
        for (args, words) in [
            (ProgrunArgs { rounds: 0, ..args() }, "--rounds"),
            (ProgrunArgs { repeat: 1, ..args() }, "1000"),
            (ProgrunArgs { flows: vec![3], ..args() }, "powers of two"),
            (ProgrunArgs { flows: vec![1 << 20], ..args() }, "65536"),
        ] {
            let text = args.check().expect_err("refused").to_string();
            assert!(text.contains(words), "{text}");
        }
        let only = ProgrunArgs { only: vec!["fast".to_owned()], ..args() };
        assert!(only.kinds().expect_err("refused").to_string().contains("fast"));
    }

    #[test]
    fn the_floor_is_always_measured() {
        let only = ProgrunArgs { only: vec!["decap".to_owned()], ..args() };
        assert_eq!(only.kinds().expect("legal"), [Kind::Floor, Kind::Decap]);
    }
}
