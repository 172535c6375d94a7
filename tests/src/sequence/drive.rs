//! Drives a case: frame by frame through the host, the model and a twin of the host.

use std::collections::BTreeMap;

use sluice_abi::{
    BackendCounter, Be32, Exit as ExitEntry, ExitKind, FlowRecord, Hook, REASONS, Reason,
    ReasonCounter, ServiceCounter, SnatSlot, flow_state, flow_tag, record_flags,
};
use sluice_datapath::verdict::Action as DatapathAction;
use sluice_model::{
    Account, Action, Connection, Direction, Exit, Model, Outcome, Progress, Seen, State, Tables,
    Tuple,
};

use super::moves::{Case, Move};
use super::plan::Plan;
use crate::host::{Host, HostRan};
use crate::world::{World, size};

/// Room in front of a frame, as BPF_PROG_TEST_RUN gives: XDP_PACKET_HEADROOM without `struct
/// xdp_frame` (net/bpf/test_run.c, include/net/xdp.h).
const HEAD_ROOM: usize = 256 - 40;

/// Another place where the same frames run.
pub trait Twin {
    /// A new world, and no connections.
    fn begin(&mut self, world: &World);
    /// The tables change; connections stay.
    fn rewrite(&mut self, world: &World);
    /// A frame that the host has handled.
    ///
    /// # Errors
    /// What is not as on the host.
    fn frame(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
        host: &HostRan,
    ) -> Result<(), String>;
    /// The end of the case.
    ///
    /// # Errors
    /// What is not as on the host.
    fn end(&mut self, host: &Host) -> Result<(), String>;
}

/// No twin: the host alone.
impl Twin for () {
    fn begin(&mut self, _: &World) {}
    fn rewrite(&mut self, _: &World) {}
    fn frame(&mut self, _: Hook, _: u32, _: &[u8], _: &HostRan) -> Result<(), String> {
        Ok(())
    }
    fn end(&mut self, _: &Host) -> Result<(), String> {
        Ok(())
    }
}

/// What happened in a case.
#[derive(Clone, Debug)]
pub enum Step {
    /// The tables changed.
    Tables(Plan),
    /// A frame met a program.
    Frame {
        /// Which program.
        hook: Hook,
        /// Interface.
        ifindex: u32,
        /// The frame.
        bytes: Vec<u8>,
        /// What would have been lawful instead; empty if what was seen is.
        expected: Vec<Outcome>,
        /// What was seen.
        seen: Seen,
    },
}

/// What is wrong, after the last step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure(pub String);

/// A case that was driven.
#[derive(Clone, Debug)]
pub struct Report {
    /// The world at the beginning.
    pub plan: Plan,
    /// What happened, up to the failure.
    pub steps: Vec<Step>,
    /// What is wrong, if anything is.
    pub failure: Option<Failure>,
}

impl Report {
    /// Frames that met a program.
    pub fn packets(&self) -> u64 {
        self.steps.iter().filter(|step| matches!(step, Step::Frame { .. })).count() as u64
    }

    /// Reasons of the verdicts.
    pub fn reasons(&self) -> impl Iterator<Item = (Hook, Reason)> + '_ {
        self.steps.iter().filter_map(|step| match step {
            Step::Frame { hook, seen, .. } => Some((*hook, seen.reason)),
            Step::Tables(_) => None,
        })
    }
}

/// Drives a case on a host that had others before, until something is wrong.
pub fn drive(case: &Case, host: &mut Host, twin: &mut impl Twin) -> Report {
    let mut run = Run::new(&case.plan, host, twin);
    let mut sent = Vec::new();
    let result = case.moves.iter().try_for_each(|step| {
        if let Move::Change { change, announced } = step {
            let mut plan = run.plan.clone();
            change.apply(&mut plan);
            plan.epoch += u32::from(*announced);
            run.change(plan);
            return Ok(());
        }
        match step.frame(&mut sent, &run.model.possible()[0]) {
            Some(frame) => run.frame(frame.hook, frame.ifindex, &frame.bytes),
            None => Ok(()),
        }
    });
    run.close(&case.plan, result)
}

/// Drives the frames of a report once more, as they were.
pub fn replay(report: &Report, host: &mut Host, twin: &mut impl Twin) -> Report {
    let mut run = Run::new(&report.plan, host, twin);
    let result = report.steps.iter().try_for_each(|step| match step {
        Step::Tables(plan) => {
            run.change(plan.clone());
            Ok(())
        }
        Step::Frame { hook, ifindex, bytes, .. } => run.frame(*hook, *ifindex, bytes),
    });
    run.close(&report.plan, result)
}

/// A world's tables, as the model knows them.
pub fn tables(world: &World) -> Tables {
    fn used<T: Copy>(entries: &[T]) -> BTreeMap<u32, T> {
        // Index 0 is nobody's in all of them.
        (0u32..).zip(entries).skip(1).map(|(i, entry)| (i, *entry)).collect()
    }
    Tables {
        settings: world.settings,
        frontends: world.frontends.clone(),
        maglev: world.maglev.clone(),
        backends: used(&world.backends),
        pods: world.pods.clone(),
        vteps: used(&world.vteps),
        vtep_sources: world.vtep_sources.clone(),
        tunnels: used(&world.tunnels),
        next_hops: used(&world.next_hops),
    }
}

struct Run<'t, T> {
    plan: Plan,
    host: &'t mut Host,
    model: Model,
    twin: &'t mut T,
    steps: Vec<Step>,
    reasons: BTreeMap<(Hook, Reason), ReasonCounter>,
    services: BTreeMap<u32, ServiceCounter>,
    backends: BTreeMap<u32, BackendCounter>,
}

impl<'t, T: Twin> Run<'t, T> {
    fn new(plan: &Plan, host: &'t mut Host, twin: &'t mut T) -> Self {
        let world = plan.world();
        host.rewrite(&world);
        host.clear();
        twin.begin(&world);
        Self {
            plan: plan.clone(),
            host,
            model: Model::new(tables(&world)),
            twin,
            steps: Vec::new(),
            reasons: BTreeMap::new(),
            services: BTreeMap::new(),
            backends: BTreeMap::new(),
        }
    }

    fn change(&mut self, plan: Plan) {
        let world = plan.world();
        self.host.rewrite(&world);
        self.model.rewrite(tables(&world));
        self.twin.rewrite(&world);
        self.plan = plan.clone();
        self.steps.push(Step::Tables(plan));
    }

    fn frame(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> Result<(), Failure> {
        let ran = self.host.run(hook, ifindex, frame, HEAD_ROOM);
        let seen = Seen {
            action: action(ran.verdict.action),
            reason: ran.verdict.reason,
            frame: ran.bytes.clone(),
            mark: ran.mark,
        };
        let answer = self.model.follow(hook, ifindex, frame, seen.clone());
        let (expected, failure) = match answer {
            Ok(account) => {
                self.count(hook, seen.reason, frame.len() as u64, account);
                (Vec::new(), None)
            }
            Err(disagreement) => {
                (disagreement.lawful.clone(), Some(Failure(disagreement.to_string())))
            }
        };
        self.steps.push(Step::Frame { hook, ifindex, bytes: frame.to_vec(), expected, seen });
        match failure {
            Some(failure) => Err(failure),
            None => self.twin.frame(hook, ifindex, frame, &ran).map_err(Failure),
        }
    }

    fn count(&mut self, hook: Hook, reason: Reason, bytes: u64, account: Account) {
        let counter = self.reasons.entry((hook, reason)).or_default();
        counter.packets += 1;
        counter.bytes += bytes;
        match account {
            Account::Nobody => {}
            Account::Dropped(service) => {
                self.services.entry(service).or_default().dropped_packets += 1;
            }
            Account::Flow { service, backend, direction, new } => {
                let s = self.services.entry(service).or_default();
                let b = self.backends.entry(backend).or_default();
                s.new_flows += u64::from(new);
                b.new_flows += u64::from(new);
                let counters = match direction {
                    Direction::Forward => [
                        (&mut s.forward_packets, &mut s.forward_bytes),
                        (&mut b.forward_packets, &mut b.forward_bytes),
                    ],
                    Direction::Reply => [
                        (&mut s.reply_packets, &mut s.reply_bytes),
                        (&mut b.reply_packets, &mut b.reply_bytes),
                    ],
                };
                for (packets, octets) in counters {
                    *packets += 1;
                    *octets += bytes;
                }
            }
        }
    }

    fn close(mut self, plan: &Plan, result: Result<(), Failure>) -> Report {
        let result = result.and_then(|()| self.check_state());
        let result = result.and_then(|()| self.check_counters());
        let result = result.and_then(|()| self.twin.end(self.host).map_err(Failure));
        Report { plan: plan.clone(), steps: self.steps, failure: result.err() }
    }

    /// The flow table and the SNAT table hold what the model remembers, and nothing else.
    fn check_state(&mut self) -> Result<(), Failure> {
        let settings = &self.model.tables().settings;
        let mut slots = self.host.snat_slots();
        let mut actual = BTreeMap::new();
        for (index, set) in (0u32..).zip(self.host.flow_sets()) {
            for (way, (tag, record)) in (0u32..).zip(set.tags.iter().zip(&set.records)) {
                if !flow_tag::is_used(*tag) {
                    continue;
                }
                let connection = connection(record);
                if record.timeout != connection.timeout(&settings.timeouts) {
                    return Err(Failure(format!("a wrong timeout: {record:?}")));
                }
                let owned = (record.snat.wrapping_sub(1), SnatSlot::owned(index, way));
                let before = slots.len();
                slots.retain(|slot| *slot != owned);
                if connection.rewritten != (slots.len() < before) {
                    return Err(Failure(format!("record and SNAT table disagree: {record:?}")));
                }
                if let Some(other) = actual.insert(connection.request, connection) {
                    return Err(Failure(format!("two records of one connection: {other:?}")));
                }
            }
        }
        if !slots.is_empty() {
            return Err(Failure(format!("SNAT slots without a record: {slots:?}")));
        }
        if self.model.possible().iter().any(|state| is_same(state, &actual)) {
            return Ok(());
        }
        let remembered = self.model.possible();
        Err(Failure(format!(
            "the flow table holds\n  {:#?}\nbut the model remembers\n  {remembered:#?}",
            actual.values()
        )))
    }

    fn check_counters(&mut self) -> Result<(), Failure> {
        for hook in Hook::ALL {
            for row in REASONS {
                let expected = self.reasons.get(&(hook, row.reason)).copied().unwrap_or_default();
                let got = self.host.reason(hook, row.reason as u32);
                if got != expected {
                    let text = format!("{hook:?} {}: {got:?} instead of {expected:?}", row.label);
                    return Err(Failure(text));
                }
            }
        }
        for id in 0..size::SERVICES {
            let expected = self.services.get(&id).copied().unwrap_or_default();
            let got = self.host.service(id);
            if got != expected {
                return Err(Failure(format!("service {id}: {got:?} instead of {expected:?}")));
            }
        }
        for id in 0..size::BACKENDS {
            let expected = self.backends.get(&id).copied().unwrap_or_default();
            let got = self.host.backend(id);
            if got != expected {
                return Err(Failure(format!("backend {id}: {got:?} instead of {expected:?}")));
            }
        }
        Ok(())
    }
}

fn action(action: DatapathAction) -> Action {
    match action {
        DatapathAction::Pass => Action::Pass,
        DatapathAction::Drop => Action::Drop,
        DatapathAction::Transmit => Action::Transmit,
        DatapathAction::Redirect(ifindex)
        | DatapathAction::Receive(ifindex)
        | DatapathAction::Peer(ifindex) => Action::Redirect(ifindex),
    }
}

/// A record, as the model knows connections.
fn connection(r: &FlowRecord) -> Connection {
    let has = |bit: u32| r.state & bit != 0;
    Connection {
        request: Tuple {
            proto: r.proto,
            src: (r.client, r.client_port.host()),
            dst: (r.vip, r.vip_port.host()),
        },
        service: r.service,
        backend_id: r.backend_id,
        backend: (r.backend, r.backend_port.host()),
        source: r.source,
        source_port: Some(r.source_port.host()),
        rewritten: r.flags & record_flags::SNAT != 0,
        hairpin: r.flags & record_flags::HAIRPIN != 0,
        tunnel: r.tunnel,
        forward: exit(&r.forward),
        reply: exit(&r.reply),
        reply_tags: tags(&r.reply_tags),
        epoch: r.epoch,
        progress: Progress {
            replied: has(flow_state::REPLIED),
            confirmed: has(flow_state::CONFIRMED),
            fin_forward: has(flow_state::FIN_FORWARD),
            fin_reply: has(flow_state::FIN_REPLY),
            reset: has(flow_state::RESET),
            client_acked: r.ack_forward,
            backend_acked: r.ack_reply,
        },
        outer_ports: [None; 2],
    }
}

/// The VLAN tags of a record.
fn tags(tags: &[Be32; 2]) -> Vec<[u8; 4]> {
    tags.iter().map(|tag| tag.host().to_be_bytes()).filter(|tag| *tag != [0; 4]).collect()
}

fn exit(exit: &ExitEntry) -> Exit {
    const FRAME: u8 = ExitKind::Frame as u8;
    const TUNNEL: u8 = ExitKind::Tunnel as u8;
    const NEXT_HOP: u8 = ExitKind::NextHop as u8;
    match exit.kind {
        FRAME => Exit::Frame { ifindex: exit.index, dst: exit.dst_mac, src: exit.src_mac },
        TUNNEL => Exit::Tunnel(exit.index),
        NEXT_HOP => Exit::NextHop(exit.index),
        _ => Exit::Stack,
    }
}

/// Whether a state is what the tables hold. A port that nobody has seen may be any.
fn is_same(state: &State, actual: &BTreeMap<Tuple, Connection>) -> bool {
    state.connections.len() == actual.len()
        && state.connections.values().zip(actual.values()).all(|(model, table)| {
            let source_port = model.source_port.or(table.source_port);
            Connection { source_port, outer_ports: [None; 2], ..model.clone() } == *table
        })
}
