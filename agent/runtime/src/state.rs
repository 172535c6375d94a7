//! The state task: everything that changes the kernel's tables goes through here, one step at a time.
//!
//! ```text
//!  list, kernel news, tick ─► facts ─► compile ─► allocate ─► delta ─► apply ─► names, settings
//!                                                                       └ error: load again, later
//! ```
//!
//! Nothing is programmed before the first complete list. What to program is decided in
//! `sluice-control`; here stands only when, and what happens when a call fails.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_abi::{Addr, Backend, Settings};
use sluice_control::model::NextHopFacts;
use sluice_control::{
    Allocator, Desired, Held, Limits, MapOp, MapStore, MassRemoval, Names, NodeContext, Skipped,
    Snapshot, Tables, compile, delta, mass_removal, wanted_next_hops,
};

use crate::attach::{Attacher, Obstacle, Role, Rung};
use crate::config::Config;
use crate::describe::causes;
use crate::facts::kernel::Link;
use crate::facts::{Collector, Facts, own_macs};
use crate::flood::{self, Guard, News};
use crate::maps::{FlowTable, MapsError};
use crate::netlink::NetlinkError;
use crate::run_dir::{RunDir, RunDirError, SkippedObject, Status, TableSizes};
use crate::settings::{self, SettingsError};
use crate::snat::LocalPorts;
use crate::source::{Listing, SourceError};
use crate::store::{KernelStore, StoreError};
use crate::sweep::{Sweeper, forget_udp};

/// UDP records of a removed endpoint are deleted once more after this time: a packet that was in
/// flight may have made one anew.
const UDP_GRACE: Duration = Duration::from_secs(3);
/// First and longest pause before a failed step is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long readiness waits for the neighbours that the first tables need.
const NEIGHBOURS: Duration = Duration::from_secs(3);
/// What the kernel does not announce is noticed by looking this often: what it learns about the MTU of
/// a path, and forgets again, and what happens in pods' namespaces.
const LOOK: Duration = Duration::from_secs(5);
/// What was refused on an interface is tried again after this time.
const RETRY_REFUSED: Duration = Duration::from_secs(60);

/// Why a step failed. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Facts could not be read.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Tables could not be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file could not be written.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Settings could not be written.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A map could not be used.
    #[error(transparent)]
    Maps(#[from] MapsError),
}

/// The agent's state.
pub struct State {
    config: Config,
    run_dir: RunDir,
    attacher: Attacher,
    collector: Collector,
    store: KernelStore,
    flows: FlowTable,
    sweeper: Sweeper,
    flood: flood::Watch,
    hz: u32,
    settings: Settings,

    snapshot: Option<Arc<Snapshot>>,
    listed: Vec<Skipped>,
    source_error: Option<SourceError>,
    allocator: Allocator,
    actual: Option<Tables>,
    names: Names,
    /// What the tables were compiled from, and what came out: equal input needs no work.
    input: Option<(Arc<Snapshot>, NodeContext)>,
    desired: Option<Desired>,
    guard: bool,
    held: Option<Held>,

    generation: u64,
    programmed: bool,
    started: Instant,
    error: Option<String>,
    retry: Option<(Instant, Duration)>,
    refused_again: Instant,
    forget: Vec<(Instant, BTreeMap<u32, BTreeSet<u32>>)>,
    unresolved: usize,
    /// When the first step that asked for neighbours had ended.
    asked: Option<Instant>,
    stack_delivery: BTreeMap<String, String>,
    notes: Vec<String>,
    snat_alarm: Option<String>,
    skipped: Vec<Skipped>,
    /// What found no room, and since when: room comes when what went has rested.
    unfit: Vec<Skipped>,
    allocated: Instant,
    reported: BTreeSet<String>,
    written: Option<Status>,
}

impl State {
    /// Takes over what the maps hold.
    ///
    /// # Errors
    /// When maps, names or netlink cannot be used.
    pub fn new(
        config: Config,
        run_dir: RunDir,
        mut attacher: Attacher,
        hz: u32,
    ) -> Result<Self, StepError> {
        let pins = attacher.pins().clone();
        let names = run_dir.names()?;
        if let Some(earlier) = run_dir.status()? {
            attacher.remember(earlier.interfaces);
        }
        let mut seeded = Ok(());
        let settings = settings::update(&pins, &run_dir, |s| seeded = settings::seed(s))?;
        seeded?;
        let sizes = &config.maps;
        let allocator = Allocator::new(Limits {
            frontends: sizes.frontends,
            services: sizes.services,
            backends: sizes.backends,
            maglev_entries: sizes.maglev,
            pods: sizes.pods,
            vteps: sizes.vteps,
            vtep_sources: sizes.vtep_sources,
            next_hops: sizes.nexthops,
            quarantine: QUARANTINE_SECONDS,
        });
        Ok(Self {
            collector: Collector::new()?,
            store: KernelStore::open(&pins)?,
            flows: pins.flows()?.with_sets(config.maps.flow_sets),
            sweeper: Sweeper::default(),
            flood: flood::Watch::default(),
            hz,
            settings,
            snapshot: None,
            listed: Vec::new(),
            source_error: None,
            allocator,
            actual: None,
            names,
            input: None,
            desired: None,
            guard: true,
            held: None,
            generation: 0,
            programmed: false,
            started: Instant::now(),
            error: None,
            retry: None,
            refused_again: Instant::now() + RETRY_REFUSED,
            forget: Vec::new(),
            unresolved: 0,
            asked: None,
            stack_delivery: BTreeMap::new(),
            notes: Vec::new(),
            snat_alarm: None,
            skipped: Vec::new(),
            unfit: Vec::new(),
            allocated: Instant::now(),
            reported: BTreeSet::new(),
            written: None,
            config,
            run_dir,
            attacher,
        })
    }

    /// A list came, or could not be read.
    pub fn listing(&mut self, listing: Result<Listing, SourceError>) {
        match listing {
            Ok(listing) => {
                tracing::info!(
                    files = listing.files,
                    services = listing.snapshot.services.len(),
                    slices = listing.snapshot.slices.len(),
                    nodes = listing.snapshot.nodes.len(),
                    pods = listing.snapshot.pods.len(),
                    "objects read"
                );
                self.snapshot = Some(listing.snapshot);
                self.listed = listing.skipped;
                self.source_error = None;
            }
            Err(error) => {
                tracing::error!("{error}");
                self.source_error = Some(error);
            }
        }
    }

    /// Uses another config from now on. Keys that need a restart keep their old value.
    pub fn reconfigure(&mut self, mut config: Config) {
        let old = &self.config;
        for (key, differs) in [
            ("pin_dir", config.pin_dir != old.pin_dir),
            ("run_dir", config.run_dir != old.run_dir),
            ("maps", format!("{:?}", config.maps) != format!("{:?}", old.maps)),
            ("source", format!("{:?}", config.source) != format!("{:?}", old.source)),
            ("log", format!("{:?}", config.log) != format!("{:?}", old.log)),
        ] {
            if differs {
                tracing::warn!("config: {key} changed; that takes effect at the next start");
            }
        }
        config.pin_dir = old.pin_dir.clone();
        config.run_dir = old.run_dir.clone();
        config.maps = old.maps;
        config.source = old.source.clone();
        config.log = old.log.clone();
        self.config = config;
        self.desired = None;
        tracing::info!("config reloaded");
    }

    /// The config in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// When the next step is due although nothing happened.
    pub fn due(&self) -> Duration {
        let now = Instant::now();
        let mut due = LOOK;
        if let Some((at, _)) = self.retry {
            due = due.min(at.saturating_duration_since(now));
        }
        if self.unresolved > 0 || self.held.is_some() {
            due = due.min(Duration::from_secs(1));
        }
        for (at, _) in &self.forget {
            due = due.min(at.saturating_duration_since(now));
        }
        due.max(Duration::from_millis(10))
    }

    /// Whether the last step changed tables.
    pub fn programmed_now(&mut self) -> bool {
        std::mem::take(&mut self.programmed)
    }

    /// One step: brings tables and attachments in line with what is known, and writes the status.
    pub fn step(&mut self) {
        if self.retry.is_some_and(|(at, _)| Instant::now() < at) {
            return;
        }
        match self.try_step() {
            Ok(()) => {
                self.error = None;
                self.retry = None;
            }
            Err(error) => {
                let text = causes(&error);
                let pause = self.retry.map_or(RETRY.0, |(_, pause)| (pause * 2).min(RETRY.1));
                tracing::error!("{text}; tried again in {pause:?}");
                self.error = Some(text);
                self.retry = Some((Instant::now() + pause, pause));
                // What the maps hold now is not known any more.
                self.actual = None;
                self.desired = None;
            }
        }
        self.forget_again();
        self.report();
        // Loading programs can take longer than a neighbour's answer, which only the next step sees.
        if self.unresolved > 0 {
            self.asked.get_or_insert_with(Instant::now);
        }
    }

    fn try_step(&mut self) -> Result<(), StepError> {
        let Some(snapshot) = self.snapshot.clone() else {
            return Ok(());
        };
        let mut facts = self.collector.read(&self.config, &snapshot)?;
        self.update_settings(&facts, &snapshot)?;
        // A pod is delivered to by redirect only when its replies are taken at TC; so the programs
        // there come first. They pass everything until the tables know the pod.
        self.attach_pods(&facts);
        self.program(&snapshot, &mut facts)?;
        self.unhide_tags(&facts)?;
        if self.held.is_none() {
            self.attach(&facts);
        }
        Ok(())
    }

    /// Tables.
    fn program(&mut self, snapshot: &Arc<Snapshot>, facts: &mut Facts) -> Result<(), StepError> {
        self.hold_back_redirect(facts);
        let wanted = wanted_next_hops(snapshot, &facts.context);
        facts.context.next_hops = self.collector.next_hops(&facts.kernel, &wanted);
        self.unresolved = facts
            .context
            .next_hops
            .values()
            .filter(|h| matches!(h, NextHopFacts::Unresolved {}))
            .count();
        self.notes = facts.notes.clone();
        // Refused at start and at a reload; the node's own range may have moved since.
        self.notes.extend(LocalPorts::read().refuse(self.config.snat.ports()));
        self.stack_delivery = facts.stack_reasons.clone();
        if !self.unfit.is_empty() && self.allocated.elapsed() > UNFIT_AGAIN {
            self.desired = None;
        }
        let input = (snapshot.clone(), facts.context.clone());
        if self.input.as_ref().is_some_and(|(s, c)| Arc::ptr_eq(s, &input.0) && *c == input.1)
            && self.desired.is_some()
            && self.actual.is_some()
        {
            return Ok(());
        }
        let compiled = compile(snapshot, &facts.context);
        if self.desired.as_ref() == Some(&compiled.desired) && self.actual.is_some() {
            self.left_out(compiled.skipped);
            self.input = Some(input);
            return Ok(());
        }
        if self.actual.is_none() {
            self.actual = Some(self.store.load()?);
        }
        let Some(actual) = &mut self.actual else {
            return Ok(());
        };
        if self.guard {
            let threshold = MassRemoval {
                percent: self.config.changes.mass_removal_percent,
                at_least: self.config.changes.mass_removal_minimum,
            };
            match mass_removal(actual, &compiled.desired, threshold) {
                Some(held) if !self.run_dir.take_release() => {
                    if self.held.as_ref() != Some(&held) {
                        tracing::error!("{held}; run `sluice release` if that is meant");
                    }
                    self.held = Some(held);
                    return Ok(());
                }
                _ => {
                    self.held = None;
                    self.guard = false;
                }
            }
        }
        let seconds = self.started.elapsed().as_secs();
        self.allocated = Instant::now();
        let allocation = self.allocator.allocate(&compiled.desired, actual, &self.names, seconds);
        let delta = delta(actual, &allocation.tables);
        if !delta.ops.is_empty() {
            let began = Instant::now();
            let before = service_backends(actual, &delta.ops);
            // Old and new names while both may be in the maps.
            let mut both = self.names.clone();
            both.services.extend(allocation.names.services.clone());
            both.backends.extend(allocation.names.backends.clone());
            both.vteps.extend(allocation.names.vteps.clone());
            both.next_hops.extend(allocation.names.next_hops.clone());
            self.run_dir.write_names(&both)?;
            for op in &delta.ops {
                self.store.apply(op)?;
                actual.apply(op);
            }
            if delta.new_epoch {
                self.settings = settings::update(self.attacher.pins(), &self.run_dir, |s| {
                    s.epoch = s.epoch.wrapping_add(1).max(1);
                })?;
            }
            let services: BTreeSet<u32> = before
                .keys()
                .copied()
                .chain(service_backends(actual, &delta.ops).into_keys())
                .collect();
            let valid = backends_of(actual, &services);
            let forgotten = forget_udp(&self.flows, &valid);
            self.forget.push((Instant::now() + UDP_GRACE, valid));
            self.generation += 1;
            self.programmed = true;
            tracing::info!(
                generation = self.generation,
                operations = delta.ops.len(),
                new_epoch = delta.new_epoch,
                udp_connections_ended = forgotten,
                took_us = began.elapsed().as_micros() as u64,
                "tables programmed"
            );
        } else if self.generation == 0 {
            self.generation = 1;
            tracing::info!("tables are as they should be");
        }
        actual.extents.clone_from(&allocation.tables.extents);
        if self.names != allocation.names {
            self.run_dir.write_names(&allocation.names)?;
            self.names = allocation.names;
        }
        self.unfit = allocation.skipped;
        self.left_out(compiled.skipped);
        self.desired = Some(compiled.desired);
        self.input = Some(input);
        Ok(())
    }

    /// Puts together what reading, compiling and allocating left out.
    fn left_out(&mut self, compiled: Vec<Skipped>) {
        self.skipped =
            self.listed.iter().cloned().chain(compiled).chain(self.unfit.iter().cloned()).collect();
    }

    /// Takes back redirect delivery to pods whose replies are not taken at TC.
    fn hold_back_redirect(&mut self, facts: &mut Facts) {
        for link in &facts.pod_devices {
            let wanted =
                facts.context.pods.values().any(|p| p.ifindex == link.ifindex && p.redirect);
            if !wanted || self.attacher.takes_replies(link) {
                continue;
            }
            for pod in facts.context.pods.values_mut() {
                if pod.ifindex == link.ifindex && pod.redirect {
                    pod.redirect = false;
                    facts.stack_reasons.insert(
                        link.name.clone(),
                        "replies are not taken at TC ingress of the interface".to_owned(),
                    );
                }
            }
        }
    }

    fn update_settings(&mut self, facts: &Facts, snapshot: &Snapshot) -> Result<(), StepError> {
        let node = snapshot.nodes.get(&facts.context.node_name);
        let own = |v4: bool| -> Option<Addr> {
            let of_node = node
                .into_iter()
                .flat_map(|n| n.addresses.iter().copied())
                .find(|a| a.is_ipv4() == v4 && facts.context.addresses.contains(a));
            let of_uplink = || {
                facts
                    .kernel
                    .addresses
                    .iter()
                    .filter(|(index, _, _, global)| {
                        *global && facts.uplinks.iter().any(|l| l.ifindex == *index)
                    })
                    .map(|(_, a, _, _)| *a)
                    .find(|a: &IpAddr| a.is_ipv4() == v4)
            };
            of_node.or_else(of_uplink).map(Addr::from)
        };
        let mut wanted = self.settings;
        settings::fill(&mut wanted, &self.config, &facts.context, self.hz);
        settings::fill_addresses(&mut wanted, own(true), own(false));
        let macs = own_macs(&facts.kernel, &facts.uplinks);
        settings::fill_own_macs(&mut wanted, &macs);
        if wanted != self.settings {
            let (config, hz) = (&self.config, self.hz);
            self.settings = settings::update(self.attacher.pins(), &self.run_dir, |s| {
                settings::fill(s, config, &facts.context, hz);
                settings::fill_addresses(s, own(true), own(false));
                settings::fill_own_macs(s, &macs);
            })?;
        }
        Ok(())
    }

    /// Where VLAN tags are hidden from XDP: switched off with consent; else named, and XDP is not
    /// attached to a device that takes them out of the frames.
    fn unhide_tags(&mut self, facts: &Facts) -> Result<(), StepError> {
        let mut obstacles = BTreeMap::new();
        for hidden in self.collector.hidden_tags(facts) {
            let mut remedy = format!("{}, or datapath.change_device_features", hidden.command());
            if self.config.datapath.change_device_features {
                self.run_dir.note_switched(&hidden)?;
                match self.collector.unhide(facts, &hidden) {
                    Ok(()) => {
                        tracing::warn!(
                            interface = hidden.uplink,
                            "device feature switched off, `sluice cleanup` switches it on: {}",
                            hidden.command()
                        );
                        continue;
                    }
                    Err(e) => remedy = format!("{} failed: {e}", hidden.command()),
                }
            }
            if !hidden.changeable {
                remedy = "the driver does not let it be switched; packets from outside are left to the kernel"
                    .to_owned();
            }
            let reason = format!(
                "{} ({}) hides VLAN tags from XDP, which would take a packet of another VLAN for \
                 an untagged one",
                hidden.device,
                hidden.features.join(", ")
            );
            if hidden.other_end {
                self.notes.push(format!("{}: {reason} ({remedy})", hidden.uplink));
            } else {
                obstacles.insert(hidden.uplink, Obstacle { reason, remedy });
            }
        }
        self.attacher.set_obstacles(obstacles);
        Ok(())
    }

    /// TC programs at pods' interfaces that are new.
    fn attach_pods(&mut self, facts: &Facts) {
        let pods: Vec<(Link, Role)> =
            facts.pod_devices.iter().map(|l| (l.clone(), Role::Pod)).collect();
        let config = &self.config;
        self.attacher.bring(&pods, |interface| config.mode_of(interface));
    }

    /// All attachments; interfaces that are no longer wanted are let go.
    fn attach(&mut self, facts: &Facts) {
        let mut wanted: BTreeMap<u32, (Link, Role)> = BTreeMap::new();
        for (links, role) in [
            (&facts.pod_devices, Role::Pod),
            (&facts.tunnel_devices, Role::Tunnel),
            (&facts.uplinks, Role::Uplink),
        ] {
            for link in links {
                wanted.insert(link.ifindex, (link.clone(), role));
            }
        }
        let wanted: Vec<(Link, Role)> = wanted.into_values().collect();
        if Instant::now() > self.refused_again {
            self.refused_again = Instant::now() + RETRY_REFUSED;
            self.attacher.try_refused_again();
        }
        let config = &self.config;
        self.attacher.reconcile(&wanted, |interface| config.mode_of(interface));
    }

    /// One pass over the connections.
    pub fn sweep(&mut self) {
        let now = match self.attacher.jiffies() {
            Ok(now) => now,
            Err(e) => {
                tracing::warn!("sweep: {}", causes(&e));
                return;
            }
        };
        let swept = self.sweeper.pass(&self.flows, now);
        self.narrow_replies(swept.ports);
        self.watch_snat(swept.fullest);
        self.watch_flood(now);
        if swept.orphans > 0 {
            tracing::warn!(slots = swept.orphans, "SNAT slots without a connection freed");
        }
        if swept.freed > 0 {
            tracing::debug!(freed = swept.freed, used = swept.used, "connections expired");
        }
        let capacity = self.flows.capacity();
        if swept.used * 10 > capacity * 9 {
            tracing::warn!(
                used = swept.used,
                capacity,
                "the connection table is nearly full; raise maps.flow_sets"
            );
        }
    }

    /// Tells when the flood guard begins and ends.
    fn watch_flood(&mut self, now: u32) {
        let cpus = match self.attacher.pins().counters().and_then(|c| c.flood()) {
            Ok(cpus) => cpus,
            Err(e) => {
                tracing::warn!("flood guard: {}", causes(&e));
                return;
            }
        };
        let guard = Guard::new(&cpus, &self.settings, Some(now));
        let Guard { cpus_on, put, promoted, overwritten, .. } = guard;
        match self.flood.look(guard) {
            Some(News::Began) => tracing::warn!(
                cpus_on,
                put,
                promoted,
                overwritten,
                "flood guard: more new connections than datapath.flood_rate"
            ),
            Some(News::Ended) => {
                tracing::info!(put, promoted, overwritten, "flood guard: the flood is over");
            }
            None => {}
        }
    }

    /// Alarm at half use: ports are tried at random, and long before the last one is taken some
    /// connections are refused (`snat_exhausted`).
    fn watch_snat(&mut self, used: u32) {
        let ports = self.config.snat.ports().len() as u32;
        let alarm = used * 2 > ports;
        if alarm && self.snat_alarm.is_none() {
            tracing::warn!(used, ports, "more than half of the SNAT ports are in use");
        }
        self.snat_alarm = alarm.then(|| {
            format!(
                "{used} of {ports} SNAT ports towards some endpoints are in use; widen \
                 snat.first_port to snat.last_port"
            )
        });
    }

    /// Replies need no longer be looked for at ports of an earlier SNAT range that are free by now.
    fn narrow_replies(&mut self, used: Option<(u16, u16)>) {
        let mut wanted = self.settings;
        settings::narrow_replies(&mut wanted, used);
        // Nothing is known of the range before the first step.
        if wanted == self.settings || self.generation == 0 {
            return;
        }
        let edit = |s: &mut Settings| settings::narrow_replies(s, used);
        match settings::update(self.attacher.pins(), &self.run_dir, edit) {
            Ok(settings) => self.settings = settings,
            Err(e) => tracing::warn!("SNAT ports: {}", causes(&e)),
        }
    }

    fn forget_again(&mut self) {
        let now = Instant::now();
        let flows = &self.flows;
        self.forget.retain(|(at, valid)| {
            if now < *at {
                return true;
            }
            let forgotten = forget_udp(flows, valid);
            if forgotten > 0 {
                tracing::info!(udp_connections_ended = forgotten, "after the grace period");
            }
            false
        });
    }

    /// Logs what is new and writes the status if it changed.
    fn report(&mut self) {
        let now: BTreeSet<String> = self.skipped.iter().map(ToString::to_string).collect();
        for skipped in &self.skipped {
            if !self.reported.contains(&skipped.to_string()) {
                match skipped.level {
                    sluice_control::Level::Notice => tracing::info!("left out: {skipped}"),
                    sluice_control::Level::Error => tracing::warn!("left out: {skipped}"),
                }
            }
        }
        for note in &self.notes {
            if !self.reported.contains(note) {
                tracing::warn!("{note}");
            }
        }
        for text in self.reported.difference(&now) {
            if !self.notes.contains(text) {
                tracing::info!("no longer left out: {text}");
            }
        }
        self.reported = now.into_iter().chain(self.notes.iter().cloned()).collect();
        let status = self.status();
        if self.written.as_ref() != Some(&status) {
            match self.run_dir.write_status(&status) {
                Ok(()) => {
                    if status.ready && !self.written.as_ref().is_some_and(|s| s.ready) {
                        tracing::info!(mode = ?status.mode, "ready");
                    }
                    self.written = Some(status);
                }
                Err(e) => tracing::warn!("{e}"),
            }
        }
    }

    fn status(&self) -> Status {
        // Until the first list nothing is done to what an earlier agent attached: it works on.
        let interfaces = match self.snapshot {
            Some(_) => self.attacher.interfaces().clone(),
            None => self.attacher.earlier().clone(),
        };
        let mut not_ready = Vec::new();
        if self.snapshot.is_none() {
            not_ready.push("waiting for the first complete list of objects".to_owned());
        } else if self.generation == 0 && self.held.is_none() {
            not_ready.push("tables are not programmed yet".to_owned());
        }
        // A neighbour that lives answers within a blink; one that does not must not hold us up.
        if self.unresolved > 0 && self.asked.is_none_or(|asked| asked.elapsed() < NEIGHBOURS) {
            not_ready.push(format!("{} neighbours are being asked for", self.unresolved));
        }
        not_ready.extend(self.source_error.as_ref().map(ToString::to_string));
        not_ready.extend(self.held.as_ref().map(|h| format!("{h}; see `sluice release`")));
        not_ready.extend(self.error.clone());
        if self.snapshot.is_some() && !interfaces.values().any(|a| a.role == Role::Uplink) {
            not_ready.push("no uplink; name one in datapath.uplinks".to_owned());
        }
        for (name, attached) in &interfaces {
            if attached.role == Role::Uplink && attached.mode == Rung::None {
                let why: Vec<&str> = attached.refusals.iter().map(|r| r.reason.as_str()).collect();
                not_ready.push(format!("{name}: not attached: {}", why.join("; ")));
            }
        }
        let tables = self.actual.as_ref();
        let size = |f: fn(&Tables) -> usize| tables.map(f).unwrap_or_default();
        Status {
            ready: not_ready.is_empty(),
            not_ready,
            node: self.config.node_name(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hz: self.hz,
            generation: self.generation,
            mode: interfaces
                .iter()
                .filter(|(_, a)| a.role == Role::Uplink)
                .map(|(name, a)| (name.clone(), a.mode.label().to_owned()))
                .collect(),
            interfaces,
            stack_delivery: self.stack_delivery.clone(),
            tables: TableSizes {
                services: self.names.services.len(),
                frontends: size(|t| t.frontends.keys().filter(|key| !key.is_address()).count()),
                backends: size(|t| t.backends.len()),
                pods: size(|t| t.pods.len()),
                vteps: size(|t| t.vteps.len()),
                next_hops: size(|t| t.next_hops.len()),
                next_hops_unresolved: self.unresolved,
            },
            skipped: self.skipped.iter().map(SkippedObject::from).collect(),
            held: self.held.as_ref().map(Into::into),
            notes: self.notes.iter().chain(&self.snat_alarm).cloned().collect(),
            errors: self.error.iter().cloned().collect(),
        }
    }
}

/// A freed id rests this long: flow records and packets in flight may still carry it.
const QUARANTINE_SECONDS: u64 = 30;
/// What found no room is tried again after this time.
const UNFIT_AGAIN: Duration = Duration::from_secs(QUARANTINE_SECONDS + 1);

/// Services whose backends the operations may change, as the tables have them.
fn service_backends(tables: &Tables, ops: &[MapOp]) -> BTreeMap<u32, ()> {
    let mut services = BTreeMap::new();
    for op in ops {
        if let MapOp::Frontend { key, value } = op
            && !key.is_address()
        {
            services.extend(tables.frontends.get(key).map(|f| (f.service, ())));
            services.extend(value.as_ref().map(|f| (f.service, ())));
        }
    }
    services
}

/// Backends that new connections of each service can get.
fn backends_of(tables: &Tables, services: &BTreeSet<u32>) -> BTreeMap<u32, BTreeSet<u32>> {
    let mut valid: BTreeMap<u32, BTreeSet<u32>> =
        services.iter().map(|id| (*id, BTreeSet::new())).collect();
    for frontend in tables.frontends.values() {
        let Some(backends) = valid.get_mut(&frontend.service) else {
            continue;
        };
        for extent in [frontend.external, frontend.internal] {
            if let Some(entries) = tables.entries(extent) {
                backends.extend(
                    entries.iter().copied().filter(|id| {
                        tables.backends.get(id).is_some_and(|b: &Backend| b.route != 0)
                    }),
                );
            }
        }
    }
    valid
}
