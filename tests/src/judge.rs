//! Holds what a runner did against what a fixture says.

use sluice_abi::{
    AnswerCounter, AnswerKind, BackendCounter, Family, FloodCpu, FlowSet, Hook, REASONS, Reason,
    ReasonCounter, ServiceCounter, SnatSlot, VerdictKind,
};
use sluice_datapath::verdict::{Action, Direction};

use crate::fixtures::{Account, Fixture, HeadRoom, Out, Step, Trail, Where};
use crate::host::Host;
use crate::kernel::{Kernel, code};
use crate::packet;
use crate::world::{World, size};

/// XDP_PACKET_HEADROOM without `struct xdp_frame` (net/bpf/test_run.c, include/net/xdp.h).
const HEAD_ROOM: usize = 256 - 40;
/// Room for a mark, but not for outer headers.
const LITTLE_ROOM: usize = 12;
/// Foreign metadata that leaves no room for more of it.
const MOST_METADATA: usize = HEAD_ROOM - 4;

/// What became of a frame, wherever it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The program's return value: one of [`code`].
    pub code: u32,
    /// The frame afterwards.
    pub bytes: Vec<u8>,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
}

/// Where fixtures run.
pub trait Runner {
    /// Runs a step.
    fn step(&mut self, step: &Step, frame: &[u8], head_room: HeadRoom) -> Outcome;
    /// Prepares what the fixture wants to happen during its last step.
    fn arm(&mut self, _fixture: &Fixture) {}
    /// Sets every counter to zero.
    fn clear(&mut self);
    /// The count of a reason at a hook.
    fn reason(&self, hook: Hook, reason: u32) -> ReasonCounter;
    /// The counters of a Service.
    fn service(&self, id: u32) -> ServiceCounter;
    /// The counters of a backend.
    fn backend(&self, id: u32) -> BackendCounter;
    /// The counters of a kind of answer.
    fn answer(&self, kind: AnswerKind) -> AnswerCounter;
    /// The flow table.
    fn flows(&self) -> Vec<FlowSet>;
    /// Writes a set of the flow table.
    fn put_flow_set(&mut self, index: u32, set: FlowSet);
    /// SNAT slots that are not free.
    fn slots(&self) -> Vec<(u32, SnatSlot)>;
    /// Writes an entry of the SNAT table.
    fn put_slot(&mut self, index: u32, slot: SnatSlot);
    /// Replaces the tables that the agent writes; connections stay.
    fn rewrite(&mut self, world: &World);

    /// Lets every CPU guard itself against too many new connections from now on, or not.
    fn guard(&mut self, on: bool);
    /// What the flood guard counted, of all CPUs.
    fn guarded(&self) -> FloodCpu;

    /// The tables that the programs write, without time stamps.
    fn state(&self) -> State {
        State::new(self.flows(), self.slots())
    }

    /// Runs a program on one frame; its reason and what became of the frame.
    ///
    /// # Panics
    /// If not exactly one reason was counted.
    fn send(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> (Reason, Outcome) {
        let counts = |runner: &Self| -> Vec<u64> {
            REASONS.iter().map(|r| runner.reason(hook, r.reason as u32).packets).collect()
        };
        let before = counts(self);
        let step = Step { hook, ifindex, segment: 0, frame: Box::new(|_| Vec::new()) };
        let outcome = self.step(&step, frame, HeadRoom::Plenty);
        let after = counts(self);
        let moved: Vec<usize> = (0..REASONS.len()).filter(|&i| after[i] != before[i]).collect();
        let [one] = moved[..] else { panic!("reasons counted for one frame: {moved:?}") };
        assert_eq!(after[one], before[one] + 1, "one frame was counted more than once");
        (REASONS[one].reason, outcome)
    }
}

/// The tables that the programs write, without time stamps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// The flow table.
    pub flows: Vec<FlowSet>,
    /// Owned SNAT slots.
    pub snat: Vec<(u32, SnatSlot)>,
}

impl State {
    fn new(mut flows: Vec<FlowSet>, snat: Vec<(u32, SnatSlot)>) -> Self {
        for set in &mut flows {
            for record in &mut set.records {
                (record.seen, record.decided, record.created) = (0, 0, 0);
            }
        }
        flows.resize((size::FLOW_SETS + size::FLOOD_SETS) as usize, FlowSet::default());
        Self { flows, snat }
    }
}

/// The kernel's number for an action at a hook.
pub fn code_of(hook: Hook, action: Action) -> u32 {
    match (hook, action) {
        (Hook::Xdp, Action::Pass | Action::Receive(_) | Action::Peer(_)) => code::XDP_PASS,
        (Hook::Xdp, Action::Drop) => code::XDP_DROP,
        (Hook::Xdp, Action::Transmit) => code::XDP_TX,
        (Hook::Xdp, Action::Redirect(_)) => code::XDP_REDIRECT,
        (_, Action::Pass) => code::TC_NEXT,
        (_, Action::Drop) => code::TC_DROP,
        (_, Action::Redirect(_) | Action::Receive(_) | Action::Peer(_)) => code::TC_REDIRECT,
        (_, Action::Transmit) => 0,
    }
}

impl Runner for Host {
    fn step(&mut self, step: &Step, frame: &[u8], head_room: HeadRoom) -> Outcome {
        let room = if head_room == HeadRoom::Little { LITTLE_ROOM } else { HEAD_ROOM };
        let second = if let HeadRoom::Split(second) = head_room { second } else { 0 };
        self.takes_metadata.set(head_room != HeadRoom::NoMetadata);
        let first = frame.len() - second;
        let ran = match step.segment {
            0 => self.run_split(step.hook, step.ifindex, frame, room, first),
            segment => self.run_merged(step.hook, step.ifindex, frame, room, segment),
        };
        let code = code_of(step.hook, ran.verdict.action);
        Outcome { code, bytes: ran.bytes, mark: ran.mark }
    }
    fn arm(&mut self, fixture: &Fixture) {
        if let Where::HostOnly { flows_end_at_clock_read } = fixture.runs {
            self.end_flows_at_clock_read.set(Some(flows_end_at_clock_read));
        }
    }
    fn clear(&mut self) {
        self.clear_counters();
    }
    fn reason(&self, hook: Hook, reason: u32) -> ReasonCounter {
        Host::reason(self, hook, reason)
    }
    fn service(&self, id: u32) -> ServiceCounter {
        Host::service(self, id)
    }
    fn backend(&self, id: u32) -> BackendCounter {
        Host::backend(self, id)
    }
    fn answer(&self, kind: AnswerKind) -> AnswerCounter {
        Host::answer(self, kind)
    }
    fn flows(&self) -> Vec<FlowSet> {
        self.flow_sets()
    }
    fn put_flow_set(&mut self, index: u32, set: FlowSet) {
        self.set_flow_set(index, set);
    }
    fn slots(&self) -> Vec<(u32, SnatSlot)> {
        self.snat_slots()
    }
    fn put_slot(&mut self, index: u32, slot: SnatSlot) {
        self.set_snat(index, slot);
    }
    fn rewrite(&mut self, world: &World) {
        Host::rewrite(self, world);
    }
    fn guard(&mut self, on: bool) {
        self.set_flood_cpu(FloodCpu { on: on as u32, ..self.flood_cpu() });
    }
    fn guarded(&self) -> FloodCpu {
        self.flood_cpu()
    }
}

impl Runner for Kernel {
    fn step(&mut self, step: &Step, frame: &[u8], head_room: HeadRoom) -> Outcome {
        let ran = match head_room {
            HeadRoom::Plenty => self.run_merged(step.hook, step.ifindex, frame, step.segment),
            HeadRoom::Little => self.run_xdp(step.ifindex, frame, HEAD_ROOM - LITTLE_ROOM, None),
            HeadRoom::NoMetadata => self.run_xdp(step.ifindex, frame, MOST_METADATA, None),
            HeadRoom::Split(second) => {
                self.run_xdp(step.ifindex, frame, 0, Some(frame.len() - second))
            }
        };
        Outcome { code: ran.code, mark: ran.mark(), bytes: ran.bytes }
    }
    fn clear(&mut self) {
        self.clear_counters();
    }
    fn reason(&self, hook: Hook, reason: u32) -> ReasonCounter {
        Kernel::reason(self, hook, reason)
    }
    fn service(&self, id: u32) -> ServiceCounter {
        Kernel::service(self, id)
    }
    fn backend(&self, id: u32) -> BackendCounter {
        Kernel::backend(self, id)
    }
    fn answer(&self, kind: AnswerKind) -> AnswerCounter {
        Kernel::answer(self, kind)
    }
    fn flows(&self) -> Vec<FlowSet> {
        self.flow_sets()
    }
    fn put_flow_set(&mut self, index: u32, set: FlowSet) {
        self.set_flow_set(index, set);
    }
    fn slots(&self) -> Vec<(u32, SnatSlot)> {
        self.snat_slots()
    }
    fn put_slot(&mut self, index: u32, slot: SnatSlot) {
        self.set_snat(index, slot);
    }
    fn rewrite(&mut self, world: &World) {
        Kernel::rewrite(self, world);
    }
    fn guard(&mut self, on: bool) {
        Kernel::guard(self, on);
    }
    fn guarded(&self) -> FloodCpu {
        self.flood_cpus().into_iter().fold(FloodCpu::default(), |sum, cpu| FloodCpu {
            put: sum.put + cpu.put,
            promoted: sum.promoted + cpu.promoted,
            overwritten: sum.overwritten + cpu.overwritten,
            ..cpu
        })
    }
}

/// Runs a fixture with whose first world the runner has been filled.
///
/// # Errors
/// What is not as the fixture says.
pub fn judge(fixture: &Fixture, runner: &mut (impl Runner + ?Sized)) -> Result<Outcome, String> {
    let mut trail: Vec<Vec<u8>> = Vec::new();
    for (i, step) in fixture.before.iter().enumerate() {
        let frame = (step.frame)(&trail);
        let before = forwarded(runner, step.hook);
        let outcome = runner.step(step, &frame, HeadRoom::Plenty);
        if forwarded(runner, step.hook) != before + 1 {
            return Err(format!("step {i} was not forwarded: {}", seen(runner)));
        }
        trail.push(outcome.bytes);
    }
    if fixture.world_before.is_some() {
        runner.rewrite(&fixture.world);
    }
    runner.clear();
    runner.arm(fixture);
    let frame = (fixture.step.frame)(&trail);
    let outcome = runner.step(&fixture.step, &frame, fixture.head_room);
    check_counters(fixture, frame.len() as u64, runner, &Hook::ALL)?;
    trail.push(outcome.bytes.clone());
    check_frame(fixture, &frame, &trail, &outcome)?;
    Ok(outcome)
}

/// Frames that were forwarded at a hook.
fn forwarded(runner: &(impl Runner + ?Sized), hook: Hook) -> u64 {
    let rows = REASONS.iter().filter(|r| r.kind == VerdictKind::Forward);
    rows.map(|r| runner.reason(hook, r.reason as u32).packets).sum()
}

fn seen(runner: &(impl Runner + ?Sized)) -> String {
    let mut words = Vec::new();
    for hook in Hook::ALL {
        for row in REASONS {
            let count = runner.reason(hook, row.reason as u32);
            if count.packets != 0 {
                words.push(format!("{} {} x{}", hook.label(), row.label, count.packets));
            }
        }
    }
    words.join(", ")
}

/// Holds a frame against a fixture.
///
/// # Errors
/// What is not as the fixture says.
pub fn check_frame(
    fixture: &Fixture,
    came: &[u8],
    trail: &Trail,
    outcome: &Outcome,
) -> Result<(), String> {
    let code = code_of(fixture.step.hook, fixture.action);
    if outcome.code != code {
        return Err(format!("return value {} instead of {code}", outcome.code));
    }
    if fixture.action != Action::Drop && outcome.mark != fixture.mark {
        return Err(format!("handed to {:?} instead of {:?}", outcome.mark, fixture.mark));
    }
    let expected = match &fixture.out {
        Out::Gone => return Ok(()),
        Out::Untouched => came.to_vec(),
        Out::Made(build) => build(trail),
    };
    if outcome.bytes == expected {
        return Ok(());
    }
    Err(difference(&outcome.bytes, &expected))
}

/// Two frames beside each other.
pub fn difference(got: &[u8], expected: &[u8]) -> String {
    let at = got.iter().zip(expected).position(|(a, b)| a != b);
    let at = at.unwrap_or(got.len().min(expected.len()));
    format!(
        "frames differ from byte {at} on ({} bytes, expected {}):\n  got      {}\n  expected {}",
        got.len(),
        expected.len(),
        hex(got, at),
        hex(expected, at)
    )
}

fn hex(bytes: &[u8], mark: usize) -> String {
    let word = |(i, b): (usize, &u8)| {
        format!(
            "{}{b:02x}",
            if i == mark {
                "|"
            } else if i % 4 == 0 {
                " "
            } else {
                ""
            }
        )
    };
    bytes.iter().take(200).enumerate().map(word).collect()
}

/// Holds every counter of `hooks` against a fixture: what is to move has moved, and nothing else.
///
/// # Errors
/// What is not as the fixture says.
pub fn check_counters(
    fixture: &Fixture,
    bytes: u64,
    runner: &(impl Runner + ?Sized),
    hooks: &[Hook],
) -> Result<(), String> {
    for &hook in hooks {
        for row in REASONS {
            let counted = hook == fixture.step.hook && row.reason == fixture.reason;
            let expected =
                if counted { ReasonCounter { packets: 1, bytes } } else { Default::default() };
            if runner.reason(hook, row.reason as u32) != expected {
                let reason = fixture.reason.label();
                return Err(format!("reasons: {} instead of {reason}", seen(runner)));
            }
        }
    }
    let (mut service, mut backend) = (ServiceCounter::default(), BackendCounter::default());
    let (service_id, backend_id) = match fixture.account {
        Account::None => (0, 0),
        Account::Dropped { service: id } => {
            service.dropped_packets = 1;
            (id, 0)
        }
        Account::Flow { service: service_id, backend: backend_id, direction, new } => {
            match direction {
                Direction::Forward => {
                    (service.forward_packets, service.forward_bytes) = (1, bytes);
                    (backend.forward_packets, backend.forward_bytes) = (1, bytes);
                }
                Direction::Reply => {
                    (service.reply_packets, service.reply_bytes) = (1, bytes);
                    (backend.reply_packets, backend.reply_bytes) = (1, bytes);
                }
            }
            (service.new_flows, backend.new_flows) = (u64::from(new), u64::from(new));
            (service_id, backend_id)
        }
    };
    for id in 0..size::SERVICES {
        let expected = if id != 0 && id == service_id { service } else { Default::default() };
        let got = runner.service(id);
        if got != expected {
            return Err(format!("service {id}: {got:?} instead of {expected:?}"));
        }
    }
    for kind in AnswerKind::ALL {
        let count = |given| u64::from(fixture.answer == Some((kind, given)));
        let expected = AnswerCounter { sent: count(true), limited: count(false) };
        let got = runner.answer(kind);
        if got != expected {
            return Err(format!("answers {}: {got:?} instead of {expected:?}", kind.label()));
        }
    }
    for id in 0..size::BACKENDS {
        let expected = if id != 0 && id == backend_id { backend } else { Default::default() };
        let got = runner.backend(id);
        if got != expected {
            return Err(format!("backend {id}: {got:?} instead of {expected:?}"));
        }
    }
    Ok(())
}

/// Whether a fixture runs in the kernel.
pub fn in_kernel(fixture: &Fixture) -> bool {
    fixture.runs == Where::Everywhere
}

/// The reasons that no IP header gives, so that they have no family.
pub const WITHOUT_FAMILY: [Reason; 1] = [Reason::NotIp];

/// The reasons that only one family's headers give.
pub const OF_ONE_FAMILY: [(Reason, Family); 3] = [
    (Reason::RoutingHeader, Family::V6),
    (Reason::ExtensionChain, Family::V6),
    (Reason::Jumbogram, Family::V6),
];

/// The reasons that no packet gives while every program is in its place; tests of their own take one
/// away.
pub const WITHOUT_LANES: [Reason; 1] = [Reason::NoLane];

/// Runs one frame on the host and, if it is long enough to be a frame there, in the kernel: same
/// return value, same bytes, same reason; and a frame that passed is as it came.
///
/// # Panics
/// If one of them is not so.
pub fn agree(
    host: &mut Host,
    kernel: &mut Kernel,
    hook: Hook,
    ifindex: u32,
    frame: &[u8],
) -> Reason {
    let first = if hook == Hook::Xdp { frame.len().min(FIRST_BUFFER) } else { frame.len() };
    let ran = host.run_split(hook, ifindex, frame, HEAD_ROOM, first);
    let reason = ran.verdict.reason;
    if reason.kind() == VerdictKind::Pass {
        assert_eq!(ran.bytes, frame, "{reason:?} on the host: {}", difference(&ran.bytes, frame));
    }
    if !is_taken(hook, frame) {
        return reason;
    }
    let before = Runner::reason(kernel, hook, reason as u32);
    let other = kernel.run(hook, ifindex, frame);
    let after = Runner::reason(kernel, hook, reason as u32);
    let context =
        || format!("{reason:?} on the host, {} bytes: {}", frame.len(), hex(frame, frame.len()));
    assert_eq!(after.packets, before.packets + 1, "another reason in the kernel: {}", context());
    // A program that need not know of further buffers counts the bytes of the first.
    let bytes = after.bytes - before.bytes;
    assert!([first, frame.len()].contains(&(bytes as usize)), "{bytes} bytes: {}", context());
    assert_eq!(other.code, code_of(hook, ran.verdict.action), "{}", context());
    if ran.verdict.action != Action::Drop {
        assert_eq!(other.bytes, ran.bytes, "{}", difference(&other.bytes, &ran.bytes));
        assert_eq!(other.mark(), ran.mark, "{}", context());
    }
    reason
}

/// Bytes of a frame's first buffer, if there are more: a page without head room and
/// `struct skb_shared_info` (net/bpf/test_run.c).
const FIRST_BUFFER: usize = 4096 - 256 - 320;

/// Whether BPF_PROG_TEST_RUN takes a frame (net/bpf/test_run.c).
pub fn is_taken(hook: Hook, frame: &[u8]) -> bool {
    // An Ethernet header at least. At most the first buffer at TC, and all that a frame may have at
    // XDP (MAX_SKB_FRAGS pages).
    let most = if hook == Hook::Xdp { 17 * 4096 } else { 3400 };
    // At TC the IP header that the EtherType promises must be there.
    let promised = match packet::family_of(frame) {
        Some(family) if hook != Hook::Xdp => packet::l4_offset(family),
        _ => 0,
    };
    (14..=most).contains(&frame.len()) && frame.len() >= promised
}
