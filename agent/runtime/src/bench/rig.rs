//! The loaded programs on maps of their own, and one sample of a scenario.

use std::collections::HashMap as StdHashMap;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapError, PerCpuArray, PerCpuValues, ProgramArray};
use aya::programs::{ProgramError, ProgramFd, ProgramInfo, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use sluice_abi::{
    Addr, BENCH_RUN, BENCH_TARGETS, BenchRun, BenchTarget, Flood, FloodCpu, FloodWord, FlowSet,
    Hook, REASONS, ReasonCounter, ServiceCounter, Settings, flow_state, flow_tag, maps,
};
use sluice_control::NodeContext;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::BenchError;
use super::packet::{ACK_NUMBER, Packet, SYN};
use super::scenario::{Kind, Scenario};
use super::tables::{self, Tables};
use crate::attach::fill_lanes;
use crate::config::{self, Config};
use crate::maps::{Plain, Shape, shapes};
use crate::settings;

/// The wrapper and its own targets.
static WRAPPER: &[u8] = aya::include_bytes_aligned!(env!("SLUICE_BPF_BENCH_OBJECT"));

const NODE: &str = "xdp_node";
const WRAP: &str = "xdp_bench";
const EMPTY: &str = "xdp_bench_empty";
const CUT: &str = "xdp_bench_cut";

/// Room for the head and the outer headers in what test-run gives back.
const OUT: usize = 512;

/// How often a scenario's connections are opened until all are there.
const OPENINGS: u32 = 16;

/// The loaded programs.
pub struct Rig {
    node: Ebpf,
    wrapper: Ebpf,
    // Holds the programs in their places while the rig lives.
    _targets: ProgramArray<aya::maps::MapData>,
    sizes: config::Maps,
    settings: Settings,
    /// Next packet number of the scenarios whose connections are never seen again.
    next: StdHashMap<Scenario, u32>,
    replies: StdHashMap<Scenario, Packet>,
}

/// One sample.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Time per packet, whole nanoseconds (the kernel cuts the rest off).
    pub per_packet: Duration,
}

impl Rig {
    /// Loads `object` (the agent's, or a build of it for tests) with maps of `sizes`, and the
    /// wrapper around its XDP program.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn load(object: &[u8], sizes: &config::Maps) -> Result<Self, BenchError> {
        let mut loader = EbpfLoader::new();
        let shapes = shapes(sizes);
        for Shape { name, max_entries, .. } in &shapes {
            loader.map_max_entries(name, *max_entries);
        }
        let mut node = loader
            .load(object)
            .map_err(|source| BenchError::Load { object: "BPF", source: Box::new(source) })?;
        let mut wrapper = Ebpf::load(WRAPPER)
            .map_err(|source| BenchError::Load { object: "bench", source: Box::new(source) })?;
        let map = wrapper.take_map(BENCH_TARGETS).ok_or(BenchError::Missing {
            object: "bench",
            kind: "map",
            name: BENCH_TARGETS,
        })?;
        let mut targets: ProgramArray<_> = map.try_into().map_err(map_error(BENCH_TARGETS))?;
        for (target, name) in
            [(BenchTarget::Node, NODE), (BenchTarget::Empty, EMPTY), (BenchTarget::Cut, CUT)]
        {
            let ebpf = if target == BenchTarget::Node { &mut node } else { &mut wrapper };
            let fd = load(ebpf, name)?;
            targets.set(target as u32, &fd, 0).map_err(map_error(BENCH_TARGETS))?;
        }
        fill_lanes(&mut node)?;
        load(&mut wrapper, WRAP)?;
        let mut rig = Self {
            node,
            wrapper,
            _targets: targets,
            sizes: *sizes,
            settings: Settings::default(),
            next: StdHashMap::new(),
            replies: StdHashMap::new(),
        };
        rig.fill(&Tables::new())?;
        Ok(rig)
    }

    fn fill(&mut self, tables: &Tables) -> Result<(), BenchError> {
        // The default config's; a tick of 4 ms, because the timeouts are longer than any run.
        let config = Config { maps: self.sizes, ..Config::default() };
        let s = &mut self.settings;
        settings::fill(s, &config, &NodeContext::default(), 250);
        s.flood.limit = 0;
        s.seeds.flow = 0x7c15_9e37_79b9_7f4b;
        s.vxlan_ports = [sluice_abi::Be16::new(tables::VXLAN_PORT); 2];
        if self.sizes.flow_sets > config::Config::default().maps.flow_sets {
            // More connections than the default's table holds also need more source ports.
            (s.snat_first_port, s.snat_last_port) = (1024, u16::MAX);
            (s.snat_reply_first, s.snat_reply_last) = (1024, u16::MAX);
        }
        let (v4, v6) = Tables::node_addresses();
        settings::fill_addresses(s, Some(v4), Some(v6));
        let settings = self.settings;
        self.array(maps::SETTINGS, [(0, settings)])?;
        self.array(maps::NEXTHOP, tables.next_hops.iter().map(|(i, v)| (*i, *v)))?;
        self.array(maps::TUNNEL, tables.tunnels.iter().map(|(i, v)| (*i, *v)))?;
        self.array(maps::VTEP, tables.vteps.iter().map(|(i, v)| (*i, *v)))?;
        self.hash(maps::VTEP_SOURCE, tables.vtep_sources.iter().copied())?;
        self.hash(maps::POD, tables.pods.iter().copied())?;
        self.array(maps::LOOKUPS, [(0, 1u32)])?;
        self.array(maps::BACKEND, tables.backends.iter().map(|(i, v)| (*i, *v)))?;
        self.array(maps::MAGLEV, (0u32..).zip(tables.maglev.iter().copied()))?;
        self.hash(maps::FRONTEND, tables.frontends.iter().copied())
    }

    /// The program under test, as the kernel describes it.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn info(&self) -> Result<ProgramInfo, BenchError> {
        xdp(&self.node, NODE)?.info().map_err(program_error(NODE))
    }

    /// A map of the object under test.
    pub fn map(&self, name: &str) -> Option<&Map> {
        self.node.map(name)
    }

    /// The settings with which the program runs.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Makes the connection table full of connections that were never replied to.
    ///
    /// # Errors
    /// When the packets went another way.
    pub fn fill_flow_table(&mut self) -> Result<(), BenchError> {
        let scenario =
            Scenario { kind: Kind::DnatNew, family: sluice_abi::Family::V4, flows: 1 << 30 };
        // With four times as many as fit no set of sixteen has a free place (probability e^-35).
        let flows = self.sizes.flow_sets.saturating_mul(16 * 4);
        self.sample(&scenario, flows).map(drop)
    }

    /// One sample: [`Rig::open`], then [`Rig::measure`].
    ///
    /// # Errors
    /// When the kernel does not run it, or packets went another way.
    pub fn sample(&mut self, scenario: &Scenario, repeat: u32) -> Result<Sample, BenchError> {
        self.open(scenario)?;
        self.measure(scenario, repeat)
    }

    /// Makes the connections of a scenario known, where they must be.
    ///
    /// # Errors
    /// When the kernel does not run it, or the table does not keep so many.
    pub fn open(&mut self, scenario: &Scenario) -> Result<(), BenchError> {
        if !scenario.needs_opening() {
            return Ok(());
        }
        self.guard(false)?;
        let packet = scenario.request(SYN);
        let run = packet.run(scenario.target(), scenario.flows, 0);
        let service = scenario.expected().service;
        // In a full table a new connection may take the place of one that has not been seen for a
        // while, though it is one of these: again, until none is missing.
        for _ in 0..OPENINGS {
            let before = self.counts(service)?.new_flows;
            self.run(&run, scenario.flows, &packet.frame)?;
            if self.counts(service)?.new_flows == before {
                return Ok(());
            }
            self.establish(scenario.client())?;
        }
        Err(BenchError::Astray(format!(
            "the connection table does not keep {} connections",
            scenario.flows
        )))
    }

    /// Lets the connections of `client`'s network be ones to which the backend has replied, and whose
    /// client has acknowledged that: the packets that are measured go one way only. Those of the next
    /// scenario may take their places.
    fn establish(&mut self, client: Addr) -> Result<(), BenchError> {
        let (object, kind, name) = ("BPF", "map", maps::FLOW);
        let map = self.node.map_mut(name).ok_or(BenchError::Missing { object, kind, name })?;
        let mut flows: Array<_, Plain<FlowSet>> = map.try_into().map_err(map_error(maps::FLOW))?;
        for index in 0..flows.len() {
            let mut set = flows.get(&index, 0).map_err(map_error(maps::FLOW))?.0;
            let mut changed = false;
            for (tag, record) in set.tags.iter().zip(&mut set.records) {
                if flow_tag::is_used(*tag) && record.client.0[..14] == client.0[..14] {
                    record.state |= flow_state::REPLIED | flow_state::CONFIRMED;
                    (record.ack_forward, record.ack_reply) = (ACK_NUMBER, ACK_NUMBER);
                    record.timeout = 0;
                    changed = true;
                }
            }
            if changed {
                flows.set(index, Plain(set), 0).map_err(map_error(maps::FLOW))?;
            }
        }
        Ok(())
    }

    /// Runs `repeat` packets of a scenario and checks that each of them went the scenario's way.
    ///
    /// # Errors
    /// When the kernel does not run it, or packets went another way.
    pub fn measure(&mut self, scenario: &Scenario, repeat: u32) -> Result<Sample, BenchError> {
        let packet = if scenario.kind == Kind::ReplyRemote {
            self.reply(scenario)?
        } else {
            scenario.request(scenario.flags())
        };
        self.guard(scenario.kind == Kind::DnatFlood)?;
        let next = self.next.get(scenario).copied().unwrap_or_else(|| scenario.first());
        let run = packet.run(scenario.target(), scenario.flows, next);
        let expected = scenario.expected();
        let before = self.counts(expected.service)?;
        let (action, len, per_packet) = self.run(&run, repeat, &packet.frame)?;
        let after = self.counts(expected.service)?;
        if scenario.kind.is_new() {
            self.next.insert(*scenario, next.wrapping_add(repeat));
        }
        before.check(&after, &expected, repeat)?;
        if action != expected.action || len != expected.len {
            return Err(BenchError::Astray(format!(
                "the last packet came to action {action} with {len} bytes, expected {} with {}",
                expected.action, expected.len
            )));
        }
        Ok(Sample { per_packet })
    }

    /// Lets the flood guard take all new connections from now on, or none.
    fn guard(&mut self, on: bool) -> Result<(), BenchError> {
        // Nothing is too much, and no window ends: it stays as it is set.
        let limit = if on { u32::MAX } else { 0 };
        if self.settings.flood.limit == limit {
            return Ok(());
        }
        self.settings.flood = Flood { limit, window: u32::MAX, ..self.settings.flood };
        let settings = self.settings;
        self.array(maps::SETTINGS, [(0, settings)])?;
        self.array(maps::FLOOD, [(0, FloodWord::default())])?;
        let name = maps::FLOOD_CPU;
        let (object, kind) = ("BPF", "map");
        let map = self.node.map_mut(name).ok_or(BenchError::Missing { object, kind, name })?;
        let mut array: PerCpuArray<_, Plain<FloodCpu>> = map.try_into().map_err(map_error(name))?;
        let cpus = array.get(&0, 0).map_err(map_error(name))?;
        let cpus: Vec<_> = cpus.iter().map(|c| Plain(FloodCpu { on: on as u32, ..c.0 })).collect();
        let cpus =
            PerCpuValues::try_from(cpus).map_err(|e| map_error(name)(MapError::IoError(e)))?;
        array.set(0, cpus, 0).map_err(map_error(name))
    }

    /// Runs the wrapper: action and length of the last packet, time per packet.
    fn run(
        &mut self,
        run: &BenchRun,
        repeat: u32,
        frame: &[u8],
    ) -> Result<(u32, usize, Duration), BenchError> {
        write_array(&mut self.wrapper, "bench", BENCH_RUN, [(0, *run)])?;
        let mut out = [0; OUT];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.repeat = repeat;
        let result = xdp(&self.wrapper, WRAP)?.test_run(options).map_err(program_error(WRAP))?;
        Ok((result.return_value, result.data_size_out as usize, result.duration))
    }

    /// The reply to the one connection of a scenario, which has been opened.
    fn reply(&mut self, scenario: &Scenario) -> Result<Packet, BenchError> {
        if let Some(packet) = self.replies.get(scenario) {
            return Ok(packet.clone());
        }
        let (address, port) = BenchRun::flow(0);
        let client = scenario.client();
        debug_assert_eq!(address, 0);
        let (backend, source_port) = self.source_of(client, port)?;
        let packet = scenario.reply(backend, source_port);
        self.replies.insert(*scenario, packet.clone());
        Ok(packet)
    }

    /// Backend and rewritten source port of the connection of `client`:`port` to the remote Service.
    fn source_of(&self, client: Addr, port: u16) -> Result<(Addr, u16), BenchError> {
        let vip = tables::remote_vip(client.family());
        let map = map(&self.node, maps::FLOW)?;
        let flows: Array<_, Plain<FlowSet>> = map.try_into().map_err(map_error(maps::FLOW))?;
        for index in 0..flows.len() {
            let set = flows.get(&index, 0).map_err(map_error(maps::FLOW))?.0;
            for (tag, record) in set.tags.iter().zip(&set.records) {
                if flow_tag::is_used(*tag)
                    && record.client == client
                    && record.client_port.host() == port
                    && record.vip == vip
                {
                    return Ok((record.backend, record.source_port.host()));
                }
            }
        }
        Err(BenchError::Astray(format!("the connection of {client} port {port} is not known")))
    }

    fn counts(&self, service: u32) -> Result<Counts, BenchError> {
        let array: PerCpuArray<_, Plain<ReasonCounter>> =
            map(&self.node, maps::REASON)?.try_into().map_err(map_error(maps::REASON))?;
        let mut reasons = Vec::with_capacity(REASONS.len());
        for info in REASONS {
            let index = Hook::Xdp as u32 * maps::REASON_SLOTS + info.reason as u32;
            let values = array.get(&index, 0).map_err(map_error(maps::REASON))?;
            reasons.push(values.iter().map(|c| c.0.packets).sum());
        }
        let array: PerCpuArray<_, Plain<ServiceCounter>> = map(&self.node, maps::SERVICE_STAT)?
            .try_into()
            .map_err(map_error(maps::SERVICE_STAT))?;
        let values = array.get(&service, 0).map_err(map_error(maps::SERVICE_STAT))?;
        Ok(Counts { reasons, new_flows: values.iter().map(|c| c.0.new_flows).sum() })
    }

    fn array<T: IntoBytes + FromBytes + Immutable + Copy + 'static>(
        &mut self,
        name: &'static str,
        entries: impl IntoIterator<Item = (u32, T)>,
    ) -> Result<(), BenchError> {
        write_array(&mut self.node, "BPF", name, entries)
    }

    fn hash<K, V>(
        &mut self,
        name: &'static str,
        entries: impl IntoIterator<Item = (K, V)>,
    ) -> Result<(), BenchError>
    where
        K: IntoBytes + FromBytes + Immutable + Copy + 'static,
        V: IntoBytes + FromBytes + Immutable + Copy + 'static,
    {
        let map = self.node.map_mut(name).ok_or(BenchError::Missing {
            object: "BPF",
            kind: "map",
            name,
        })?;
        let mut hash: HashMap<_, Plain<K>, Plain<V>> = map.try_into().map_err(map_error(name))?;
        for (key, value) in entries {
            hash.insert(Plain(key), Plain(value), 0).map_err(map_error(name))?;
        }
        Ok(())
    }
}

/// What the program counted.
struct Counts {
    reasons: Vec<u64>,
    new_flows: u64,
}

impl Counts {
    /// Whether exactly `repeat` packets were counted since, all under the expected reason.
    fn check(
        &self,
        after: &Counts,
        expected: &super::scenario::Expected,
        repeat: u32,
    ) -> Result<(), BenchError> {
        let counted: Vec<_> = REASONS
            .iter()
            .zip(self.reasons.iter().zip(&after.reasons))
            .map(|(info, (before, after))| (info, after.wrapping_sub(*before)))
            .filter(|(_, packets)| *packets != 0)
            .collect();
        let right = match (expected.reason, counted.as_slice()) {
            (None, []) => true,
            (Some(reason), [(info, packets)]) => {
                info.reason == reason && *packets == u64::from(repeat)
            }
            _ => false,
        };
        if !right {
            let wanted = expected.reason.map_or("nothing".to_owned(), |r| r.label().to_owned());
            let list: Vec<_> = counted.iter().map(|(i, n)| format!("{} {n}", i.label)).collect();
            return Err(BenchError::Astray(format!(
                "{repeat} packets of which all should count as {wanted} counted as: {}",
                if list.is_empty() { "nothing".to_owned() } else { list.join(", ") }
            )));
        }
        let new_flows = after.new_flows.wrapping_sub(self.new_flows);
        let wanted = if expected.new { u64::from(repeat) } else { 0 };
        if new_flows != wanted {
            return Err(BenchError::Astray(format!(
                "{new_flows} of {repeat} packets began a connection, expected {wanted}"
            )));
        }
        Ok(())
    }
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> BenchError {
    move |source| BenchError::Map { name, source: Box::new(source) }
}

fn program_error(name: &'static str) -> impl Fn(ProgramError) -> BenchError {
    move |source| BenchError::Program { name, source: Box::new(source) }
}

fn map<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a Map, BenchError> {
    ebpf.map(name).ok_or(BenchError::Missing { object: "BPF", kind: "map", name })
}

fn write_array<T: IntoBytes + FromBytes + Immutable + Copy + 'static>(
    ebpf: &mut Ebpf,
    object: &'static str,
    name: &'static str,
    entries: impl IntoIterator<Item = (u32, T)>,
) -> Result<(), BenchError> {
    let map = ebpf.map_mut(name).ok_or(BenchError::Missing { object, kind: "map", name })?;
    let mut array: Array<_, Plain<T>> = map.try_into().map_err(map_error(name))?;
    for (index, value) in entries {
        array.set(index, Plain(value), 0).map_err(map_error(name))?;
    }
    Ok(())
}

fn xdp<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a Xdp, BenchError> {
    match ebpf.program(name) {
        Some(aya::programs::Program::Xdp(program)) => Ok(program),
        _ => Err(BenchError::Missing { object: "BPF", kind: "XDP program", name }),
    }
}

fn load(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, BenchError> {
    let program: &mut Xdp = match ebpf.program_mut(name) {
        Some(aya::programs::Program::Xdp(program)) => program,
        _ => return Err(BenchError::Missing { object: "BPF", kind: "XDP program", name }),
    };
    program.load().map_err(program_error(name))?;
    program
        .fd()
        .map_err(program_error(name))?
        .try_clone()
        .map_err(|e| BenchError::Program { name, source: Box::new(ProgramError::IOError(e)) })
}
