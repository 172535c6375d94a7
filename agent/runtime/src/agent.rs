//! `sluice run`: wires sources, kernel news, signals and timers to the state task.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::attach::{AttachError, Attacher};
use crate::config::{Config, ConfigError, SourceKind};
use crate::describe::causes;
use crate::netlink::{self, NetlinkError};
use crate::run_dir::{RunDir, RunDirError, Status};
use crate::snat::LocalPorts;
use crate::source::{Listing, SourceError, file};
use crate::state::{State, StepError};

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The SNAT ports are others'.
    #[error("{0}")]
    SnatPorts(String),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Programs or maps.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// What is there cannot be taken over.
    #[error(transparent)]
    State(#[from] StepError),
    /// Netlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The runtime or a thread.
    #[error("start: {0}")]
    Start(#[from] std::io::Error),
}

enum News {
    Listing(Result<Listing, SourceError>),
    Kernel,
    Config(Box<Config>),
}

/// Quiet time after kernel news: a changed route comes with neighbours and addresses.
const KERNEL_SETTLE: Duration = Duration::from_millis(50);
/// How often the config file is looked at.
const CONFIG_POLL: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT. The datapath stays when it returns.
///
/// # Errors
/// When the agent cannot start; what goes wrong later is tried again.
pub fn run(config: Config, config_path: &Path) -> Result<(), AgentError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(serve(config, config_path.to_owned()))
}

async fn serve(config: Config, config_path: PathBuf) -> Result<(), AgentError> {
    // First of all, so that a signal during the start is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;

    if let Some(reason) = LocalPorts::read().refuse(config.snat.ports()) {
        return Err(AgentError::SnatPorts(reason));
    }
    let run_dir = RunDir::new(&config.run_dir);
    let _lock = run_dir.lock()?;
    announce(&run_dir, &config)?;
    let mut attacher = Attacher::load(&config.pin_dir, &config.maps)?;
    let hz = measure_hz(&mut attacher).await?;
    tracing::info!(
        node = config.node_name(),
        pin_dir = %config.pin_dir.display(),
        hz,
        "programs loaded"
    );

    let (send, mut news) = mpsc::unbounded_channel();
    let to = send.clone();
    netlink::watch(move || to.send(News::Kernel).is_ok())?;
    match config.source.kind {
        SourceKind::File => {
            let to = send.clone();
            file::watch(
                config.source.path.clone(),
                config.source.settle,
                config.source.poll,
                move |listing| to.send(News::Listing(listing)).is_ok(),
            )?;
        }
    }
    let to = send.clone();
    let mut changes = tokio::time::interval(CONFIG_POLL);
    let path = config_path.clone();
    let mut seen = modified(&path);
    tokio::spawn(async move {
        loop {
            changes.tick().await;
            let now = modified(&path);
            if now != seen {
                seen = now;
                reload(&path, &to);
            }
        }
    });

    let mut state = State::new(config, run_dir, attacher, hz)?;
    let mut sweep = tokio::time::interval(state.config().timeouts.sweep);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::task::block_in_place(|| state.step());
    loop {
        let due = tokio::time::sleep(state.due());
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                reload(&config_path, &send);
                continue;
            }
            _ = sweep.tick() => {
                tokio::task::block_in_place(|| state.sweep());
                continue;
            }
            () = due => {}
            Some(first) = news.recv() => {
                take(&mut state, first, &mut news).await;
            }
        }
        tokio::task::block_in_place(|| state.step());
        if state.programmed_now() {
            // The first change of a burst went at once; what comes now is gathered.
            tokio::time::sleep(state.config().changes.batch).await;
        }
    }
    tracing::info!(
        "stopped; programs, connections and tables stay (`sluice cleanup` removes them)"
    );
    Ok(())
}

/// Says that this agent is starting, in place of what an earlier one said. What that one had attached
/// is still there.
fn announce(run_dir: &RunDir, config: &Config) -> Result<(), RunDirError> {
    let earlier = run_dir.status()?.unwrap_or_default();
    run_dir.write_status(&Status {
        ready: false,
        not_ready: vec![Status::STARTING.to_owned()],
        node: config.node_name(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        generation: 0,
        held: None,
        errors: Vec::new(),
        ..earlier
    })
}

/// Takes `first` and whatever else is there by now; kernel news come in flocks.
async fn take(state: &mut State, first: News, news: &mut mpsc::UnboundedReceiver<News>) {
    let mut next = Some(first);
    let mut waited = false;
    while let Some(one) = next {
        match one {
            News::Listing(listing) => state.listing(listing),
            News::Config(config) => state.reconfigure(*config),
            News::Kernel if !waited => {
                waited = true;
                tokio::time::sleep(KERNEL_SETTLE).await;
            }
            News::Kernel => {}
        }
        next = news.try_recv().ok();
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn reload(path: &Path, to: &mpsc::UnboundedSender<News>) {
    let refused = |reason: &dyn std::fmt::Display| {
        tracing::error!("config not reloaded, the old one stays: {reason}");
    };
    match Config::load(path) {
        Ok(config) => match LocalPorts::read().refuse(config.snat.ports()) {
            None => {
                // The other end is gone only when the agent stops.
                let _ = to.send(News::Config(Box::new(config)));
            }
            Some(reason) => refused(&reason),
        },
        Err(e) => refused(&e),
    }
}

/// Ticks a second, from the kernel's own counter. Kernels are built with 100, 250, 300 or 1000.
async fn measure_hz(attacher: &mut Attacher) -> Result<u32, AttachError> {
    let began = std::time::Instant::now();
    let first = attacher.jiffies()?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let ticks = attacher.jiffies()?.wrapping_sub(first) & 0x7fff_ffff;
    let measured = f64::from(ticks) / began.elapsed().as_secs_f64();
    let hz = [100u32, 250, 300, 1000]
        .into_iter()
        .min_by(|a, b| {
            let off = |hz: u32| (measured / f64::from(hz)).ln().abs();
            off(*a).total_cmp(&off(*b))
        })
        .unwrap_or(250);
    tracing::debug!(measured, hz, "kernel tick");
    Ok(hz)
}

/// Starts the log.
pub fn init_log(config: &crate::config::Log) {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_new(&config.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match config.format {
        crate::config::LogFormat::Text => builder.with_target(false).try_init(),
        crate::config::LogFormat::Json => builder.json().try_init(),
    };
    if let Err(e) = started {
        tracing::debug!("log: {}", causes(&*e));
    }
}
