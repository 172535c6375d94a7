//! The command line. Commands that show something read the pinned maps and the files of the run
//! directory, so that they work while the agent is dead.

mod show;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sluice_abi::settings_flags;
use sluice_lab::cli::LabArgs;
use sluice_lab::{LabContext, LabError};

use crate::agent::{self, AgentError};
use crate::attach::{self, AttachError};
use crate::bench::{self, BenchArgs, BenchError};
use crate::config::{Config, ConfigError, DEFAULT_TOML};
use crate::facts::Tags;
use crate::facts::kernel::Kernel;
use crate::maps::{MapsError, Pins};
use crate::netlink::{Netlink, NetlinkError};
use crate::run_dir::{RunDir, RunDirError};
use crate::settings::{self, SettingsError};

/// Undo VXLAN and translate Service addresses where the packet arrives.
///
/// Sluice takes two jobs that a Kubernetes node does for almost every packet out of the kernel's
/// stack: undoing VXLAN, and turning a Service address into a pod's. It runs beside kube-proxy or
/// instead of it, and beside a VXLAN network with one VNI per network (Flannel, Calico-VXLAN).
#[derive(Debug, Parser)]
#[command(name = "sluice", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  sluice config show-default > /etc/sluice/sluice.toml   start from the documented defaults
  sluice config check /etc/sluice/sluice.toml            is the file right?
  sluice run --config /etc/sluice/sluice.toml            run the agent; Ctrl-C leaves the datapath
  sluice status                                          is it ready, in which mode, and why not a faster one
  sluice services                                        what is translated to what
  sluice counters --output json                          every packet, by verdict and reason
  sluice bench progrun                                   what a packet costs on each path
  sluice lab demo                                        see it work: two nodes, a shop, real traffic
  sluice bypass on                                       every packet to the kernel, at once
  sluice cleanup --yes                                   remove everything that this instance put there";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground.
    ///
    /// SIGTERM and Ctrl-C stop the agent and leave the datapath running; the next start takes it
    /// over without losing a packet. SIGHUP, or a change of the file, reloads the config.
    Run {
        /// Config file; every key is documented by `sluice config show-default`.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },
    /// Show whether the agent is ready, the mode of each uplink and what stood in the way of a
    /// faster one, and what was left out. Exit status 0 when ready, 1 when not.
    Status(Show),
    /// Show Service addresses and the endpoints behind them.
    Services(Show),
    /// Show endpoints with their way and their counters.
    Backends(Show),
    /// Show connections.
    Flows {
        #[command(flatten)]
        show: Show,
        /// Only connections of this Service (`namespace/name` or `namespace/name:port`).
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
    },
    /// Show tunnel ends of other nodes.
    Vteps(Show),
    /// Show counters: packets by hook, verdict and reason, by Service, by endpoint.
    Counters(Show),
    /// Check or print config files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// A cluster in network namespaces on this machine, to try things out.
    Lab(LabArgs),
    /// Measure what a packet costs on this machine. Nothing is attached.
    Bench(BenchArgs),
    /// Pass every packet to the kernel, or stop doing so. Takes effect with the next packet.
    Bypass {
        /// What to do.
        action: BypassAction,
        #[command(flatten)]
        instance: Instance,
    },
    /// Let a held mass removal through (`sluice status` shows it).
    Release(Instance),
    /// Remove links, maps and files of this instance. Connections through it end. Programs, qdiscs
    /// and maps of others are never touched.
    Cleanup {
        #[command(flatten)]
        instance: Instance,
        /// Do it; without it, what would be removed is only shown.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read a file as `sluice run` would and say what is wrong with it.
    Check {
        /// Config file.
        file: PathBuf,
    },
    /// Print every key with its default and its meaning.
    ShowDefault,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BypassAction {
    /// Pass every packet.
    On,
    /// Work as usual.
    Off,
    /// Say which.
    Status,
}

/// Where the config is unless said otherwise.
const DEFAULT_CONFIG: &str = "/etc/sluice/sluice.toml";

/// Which instance.
#[derive(Clone, Debug, Args)]
struct Instance {
    /// Config file of the instance [default: /etc/sluice/sluice.toml if it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of its pins, instead of the config's.
    #[arg(long, value_name = "DIR")]
    pin_dir: Option<PathBuf>,
    /// Directory of its files, instead of the config's.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// How to show something.
#[derive(Clone, Debug, Args)]
struct Show {
    #[command(flatten)]
    instance: Instance,
    /// Tables for people or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// How output looks.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A map.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// A file of the run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Pins.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Netlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A measurement.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// Nothing was done.
    #[error("nothing was removed; add --yes to do it")]
    NotConfirmed,
    /// The reader went away, or the disk is full.
    #[error("write: {0}")]
    Write(#[from] std::io::Error),
}

/// An instance's directories.
struct Place {
    pins: Pins,
    run_dir: RunDir,
}

impl Instance {
    fn place(&self) -> Result<Place, CliError> {
        let default = Path::new(DEFAULT_CONFIG);
        let config = match &self.config {
            Some(file) => Config::load(file)?,
            None if default.exists() => Config::load(default)?,
            None => Config::default(),
        };
        Ok(Place {
            pins: Pins::new(self.pin_dir.as_deref().unwrap_or(&config.pin_dir)),
            run_dir: RunDir::new(self.run_dir.as_deref().unwrap_or(&config.run_dir)),
        })
    }
}

/// Does what the command line says.
///
/// # Errors
/// What went wrong, for people.
pub fn run(cli: Cli) -> Result<ExitCode, CliError> {
    match cli.command {
        Command::Run { config: path } => {
            let config = Config::load(&path)?;
            agent::init_log(&config.log);
            agent::run(config, &path)?;
        }
        Command::Status(show) => return show::status(&show),
        Command::Services(show) => show::services(&show)?,
        Command::Backends(show) => show::backends(&show)?,
        Command::Flows { show, service, limit } => show::flows(&show, service.as_deref(), limit)?,
        Command::Vteps(show) => show::vteps(&show)?,
        Command::Counters(show) => show::counters(&show)?,
        Command::Config(ConfigCommand::ShowDefault) => out(DEFAULT_TOML)?,
        Command::Config(ConfigCommand::Check { file }) => {
            let config = Config::load(&file)?;
            out(&format!(
                "{}: right. Node {}, {} in {}, {} flows in {} MB.\n",
                file.display(),
                config.node_name(),
                "objects",
                config.source.path.display(),
                u64::from(config.maps.flow_sets) * 16,
                u64::from(config.maps.flow_sets) * size_of::<sluice_abi::FlowSet>() as u64
                    / 1_000_000,
            ))?;
        }
        Command::Lab(args) => {
            let context = LabContext { talk: true, ..LabContext::new(std::env::current_exe()?) };
            return Ok(sluice_lab::cli::run(&args, &context)?);
        }
        Command::Bench(args) => {
            let (text, code) = bench::run(&args)?;
            out(&text)?;
            return Ok(code);
        }
        Command::Bypass { action, instance } => bypass(action, &instance)?,
        Command::Release(instance) => {
            let place = instance.place()?;
            place.run_dir.release()?;
            out("released; the agent goes on within a second\n")?;
        }
        Command::Cleanup { instance, yes } => cleanup(&instance, yes)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn bypass(action: BypassAction, instance: &Instance) -> Result<(), CliError> {
    let place = instance.place()?;
    let settings = settings::update(&place.pins, &place.run_dir, |s| match action {
        BypassAction::On => s.flags |= settings_flags::BYPASS,
        BypassAction::Off => s.flags &= !settings_flags::BYPASS,
        BypassAction::Status => {}
    })?;
    let on = settings.flags & settings_flags::BYPASS != 0;
    out(if on {
        "bypass is on: every packet passes to the kernel untouched\n"
    } else {
        "bypass is off\n"
    })
}

fn cleanup(instance: &Instance, yes: bool) -> Result<(), CliError> {
    let place = instance.place()?;
    let connections = place.pins.flows().map(|f| f.iter().count()).unwrap_or_default();
    let links = attach::link_pins(place.pins.dir());
    out(&format!(
        "{}: {} links, {connections} connections end\n",
        place.pins.dir().display(),
        links.len()
    ))?;
    if !yes {
        for (path, _) in &links {
            out(&format!("  {}\n", path.display()))?;
        }
        return Err(CliError::NotConfirmed);
    }
    // A running agent would put everything back.
    let lock = place.run_dir.lock()?;
    if let Ok(Some(status)) = place.run_dir.status() {
        for name in status.interfaces.keys() {
            attach::remove_filters(place.pins.dir(), name);
        }
    }
    let mut removed = attach::remove_pins(place.pins.dir())?;
    switch_on_again(&place.run_dir)?;
    if std::fs::remove_dir(place.pins.dir()).is_err() {
        attach::unmount_bpffs(place.pins.dir());
        // Still there when it is somebody's mount point or not empty: then it is not ours.
        let _ = std::fs::remove_dir(place.pins.dir());
    }
    removed.extend(place.run_dir.remove());
    drop(lock);
    for path in &removed {
        out(&format!("removed {}\n", path.display()))?;
    }
    Ok(())
}

/// Switches on what this instance switched off at devices.
fn switch_on_again(run_dir: &RunDir) -> Result<(), CliError> {
    let switched = run_dir.switched()?;
    if switched.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open()?;
    let kernel = Kernel::read(&mut netlink)?;
    for hidden in switched {
        let device = format!("{} of {}", hidden.features.join(", "), hidden.device);
        match Tags::default().switch(&mut netlink, &kernel, &hidden, true) {
            Ok(()) => out(&format!("switched on {device}\n"))?,
            Err(e) => out(&format!("not switched on: {device}: {e}\n"))?,
        }
    }
    Ok(())
}

/// Writes to standard output; a reader that went away is no error.
fn out(text: &str) -> Result<(), CliError> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn colour() -> bool {
    std::io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_option_has_help() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} has no help", command.get_name());
            for arg in command.get_arguments() {
                assert!(
                    arg.get_help().is_some() || arg.is_hide_set(),
                    "{} {} has no help",
                    command.get_name(),
                    arg.get_id()
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
