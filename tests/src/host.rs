//! The packet logic on this machine: the tables as memory of the test.
//!
//! Every place is a cell of a boxed slice that is exactly as long as the map or the frame, so that
//! a memory checker sees the first byte beyond.

use std::cell::Cell;
use std::collections::BTreeMap;

use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet,
    Fragment, Frontend, FrontendKey, Hook, LANES, Lane, Near, NextHop, Pod, ReasonCounter, Scratch,
    ServiceCounter, Settings, SnatSlot, Tunnel, Vtep, VtepKey, maps,
};
use sluice_datapath::access::{At, Frame};
use sluice_datapath::csum::{Sum, update, update_udp};
use sluice_datapath::decide::{self, Answer};
use sluice_datapath::env::Env;
use sluice_datapath::flow;
use sluice_datapath::fragment;
use sluice_datapath::parse::{AtTc, General, Later, Plain};
use sluice_datapath::tcp::{self, Segment};
use sluice_datapath::verdict::Verdict;
use sluice_datapath::{answer, icmp, ingress, tc};

use crate::world::{World, size};

/// An array map.
struct Table<T>(Box<[Cell<T>]>);

impl<T: Copy> Table<T> {
    fn new(values: &[T], len: u32, empty: T) -> Self {
        assert!(values.len() <= len as usize, "more values than entries");
        let cells = values.iter().copied().map(Cell::new);
        let rest = (values.len()..len as usize).map(|_| Cell::new(empty));
        Self(cells.chain(rest).collect())
    }

    /// Writes the first entries, and `empty` into the others.
    fn fill(&self, values: &[T], empty: T) {
        assert!(values.len() <= self.0.len(), "more values than entries");
        let values = values.iter().copied().chain(std::iter::repeat(empty));
        self.0.iter().zip(values).for_each(|(cell, value)| cell.set(value));
    }

    fn at(&self, index: u32) -> Option<At<'_, T>> {
        // SAFETY: a cell of the slice, which `self` keeps; one thread, and no reference to the
        // content exists anywhere.
        self.0.get(index as usize).map(|cell| unsafe { At::from_ptr(cell.as_ptr()) })
    }

    fn values(&self) -> Vec<T> {
        self.0.iter().map(Cell::get).collect()
    }
}

/// A hash map.
struct Hash<K, V>(BTreeMap<K, Box<Cell<V>>>);

impl<K: Ord + Copy, V: Copy> Hash<K, V> {
    fn new(entries: &BTreeMap<K, V>) -> Self {
        Self(entries.iter().map(|(k, v)| (*k, Box::new(Cell::new(*v)))).collect())
    }

    fn at(&self, key: &K) -> Option<At<'_, V>> {
        // SAFETY: as in `Table::at`.
        self.0.get(key).map(|cell| unsafe { At::from_ptr(cell.as_ptr()) })
    }
}

/// The tables of one [`World`], and the state that grows in them.
pub struct Host {
    settings: Table<Settings>,
    frontends: Hash<FrontendKey, Frontend>,
    maglev: Table<u32>,
    backends: Table<Backend>,
    pods: Hash<Addr, Pod>,
    vteps: Table<Vtep>,
    vtep_sources: Hash<VtepKey, u32>,
    near: Table<Near>,
    lookups: Table<u32>,
    tunnels: Table<Tunnel>,
    next_hops: Table<NextHop>,
    flows: Table<FlowSet>,
    scratch: Table<Scratch>,
    snat: Table<SnatSlot>,
    fragments: Table<Fragment>,
    reasons: Table<ReasonCounter>,
    services: Table<ServiceCounter>,
    backend_counters: Table<BackendCounter>,
    answers: Table<AnswerCounter>,
    buckets: Table<Bucket>,
    bucket_cpu: Table<Bucket>,
    flood: Table<FloodWord>,
    flood_cpu: Table<FloodCpu>,
    /// Jiffies.
    pub now: Cell<u32>,
    locked: Cell<bool>,
    clock_reads: Cell<u32>,
    /// End every connection when the clock is read for the so-and-so-manieth time within one
    /// frame: another CPU's doing, which cannot be timed in the kernel.
    pub end_flows_at_clock_read: Cell<Option<u32>>,
    /// A set of the flow table that another CPU writes before the next lock is ours.
    pub put_at_lock: Cell<Option<(u32, FlowSet)>>,
    /// Whether the driver has room for a mark in front of frames.
    pub takes_metadata: Cell<bool>,
}

/// In a mark: not the interface receives, but the other end of its veth.
pub const BY_PEER: u32 = 1 << 31;

/// What became of one frame.
#[derive(Clone, Debug)]
pub struct HostRan {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame afterwards.
    pub bytes: Vec<u8>,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
}

impl Host {
    /// The tables of `world`, and no connections.
    pub fn new(world: &World) -> Self {
        let sets = world.settings.flow_set_mask + 1 + size::FLOOD_SETS;
        Self {
            settings: Table::new(&[world.settings], 1, Settings::default()),
            frontends: Hash::new(&world.frontends),
            maglev: Table::new(&world.maglev, size::MAGLEV, 0),
            backends: Table::new(&world.backends, size::BACKENDS, Backend::default()),
            pods: Hash::new(&world.pods),
            vteps: Table::new(&world.vteps, size::VTEPS, Vtep::default()),
            vtep_sources: Hash::new(&world.vtep_sources),
            near: Table::new(&[], 1, Near::default()),
            lookups: Table::new(&[1], 1, 0),
            tunnels: Table::new(&world.tunnels, sluice_abi::MAX_TUNNELS, Tunnel::default()),
            next_hops: Table::new(&world.next_hops, size::NEXT_HOPS, NextHop::default()),
            flows: Table::new(&[], sets, FlowSet::default()),
            scratch: Table::new(&[], 1, Scratch::default()),
            snat: Table::new(&[], size::SNAT_SLOTS, SnatSlot::FREE),
            fragments: Table::new(&[], size::FRAGMENTS, Fragment::default()),
            reasons: Table::new(
                &[],
                maps::REASON_SLOTS * Hook::ALL.len() as u32,
                ReasonCounter::default(),
            ),
            services: Table::new(&[], size::SERVICES, ServiceCounter::default()),
            backend_counters: Table::new(&[], size::BACKENDS, BackendCounter::default()),
            answers: Table::new(&[], AnswerKind::ALL.len() as u32, AnswerCounter::default()),
            buckets: Table::new(&[], Bucket::SOURCES, Bucket::default()),
            bucket_cpu: Table::new(&[], 1, Bucket::default()),
            flood: Table::new(&[], 1, FloodWord::default()),
            flood_cpu: Table::new(&[], 1, FloodCpu::default()),
            now: Cell::new(1_000_000),
            locked: Cell::new(false),
            clock_reads: Cell::new(0),
            end_flows_at_clock_read: Cell::new(None),
            put_at_lock: Cell::new(None),
            takes_metadata: Cell::new(true),
        }
    }

    /// Runs the program of `hook` on one frame with `head_room` bytes in front of it.
    pub fn run(&self, hook: Hook, ifindex: u32, packet: &[u8], head_room: usize) -> HostRan {
        self.run_at(hook, ifindex, packet, (head_room, packet.len()), 0)
    }

    /// The same with a frame in several buffers, of which the first has `first` bytes.
    pub fn run_split(
        &self,
        hook: Hook,
        ifindex: u32,
        packet: &[u8],
        head_room: usize,
        first: usize,
    ) -> HostRan {
        self.run_at(hook, ifindex, packet, (head_room, first), 0)
    }

    /// The same with a frame into which segments of `segment` bytes of payload were merged.
    pub fn run_merged(
        &self,
        hook: Hook,
        ifindex: u32,
        packet: &[u8],
        head_room: usize,
        segment: u32,
    ) -> HostRan {
        self.run_at(hook, ifindex, packet, (head_room, packet.len()), segment)
    }

    fn run_at(
        &self,
        hook: Hook,
        ifindex: u32,
        packet: &[u8],
        (head_room, first): (usize, usize),
        segment: u32,
    ) -> HostRan {
        self.clock_reads.set(0);
        let takes_metadata = self.takes_metadata.get();
        let mut frame = HostFrame::new(packet, head_room, first, ifindex, takes_metadata);
        frame.segment = segment;
        let mut verdict = match hook {
            Hook::Xdp => ingress::xdp::<Plain, _, _>(self, &mut frame),
            Hook::TcIngress => tc::ingress::<Plain, _, _>(self, &mut frame),
            Hook::TcEgress => tc::egress::<Plain, _, _>(self, &mut frame),
            Hook::TcNode => ingress::xdp::<AtTc<Plain>, _, _>(self, &mut frame),
        };
        while let Some(lane) = frame.lane.take() {
            frame.asks_length = true;
            verdict = match (lane, hook) {
                (Lane::General, Hook::Xdp) => ingress::xdp::<General, _, _>(self, &mut frame),
                (Lane::General, Hook::TcIngress) => tc::ingress::<General, _, _>(self, &mut frame),
                (Lane::General, Hook::TcEgress) => tc::egress::<General, _, _>(self, &mut frame),
                (Lane::General, Hook::TcNode) => {
                    ingress::xdp::<AtTc<General>, _, _>(self, &mut frame)
                }
                (Lane::Icmp, Hook::Xdp) => icmp::uplink::<General, _, _>(self, &mut frame),
                (Lane::Icmp, Hook::TcNode) => icmp::uplink::<AtTc<General>, _, _>(self, &mut frame),
                (Lane::Icmp, Hook::TcIngress) => icmp::tc_ingress(self, &mut frame),
                (Lane::Icmp, Hook::TcEgress) => icmp::tc_egress(self, &mut frame),
                (Lane::Answer, hook) => answer::answer(self, &mut frame, hook),
                (Lane::Fragment, Hook::Xdp) => ingress::xdp::<Later, _, _>(self, &mut frame),
                (Lane::Fragment, Hook::TcNode) => {
                    ingress::xdp::<AtTc<Later>, _, _>(self, &mut frame)
                }
                (Lane::Fast, _) => ingress::xdp::<AtTc<Plain>, _, _>(self, &mut frame),
                (Lane::Fragment, hook) => tc::later(self, &mut frame, hook),
            };
        }
        assert!(!self.locked.get(), "a lock was kept");
        HostRan { verdict, bytes: frame.bytes(), mark: frame.mark }
    }

    /// Replaces the tables that the agent writes; connections and counts stay.
    pub fn rewrite(&mut self, world: &World) {
        self.settings.fill(&[world.settings], Settings::default());
        self.frontends = Hash::new(&world.frontends);
        self.maglev.fill(&world.maglev, 0);
        self.backends.fill(&world.backends, Backend::default());
        self.pods = Hash::new(&world.pods);
        self.vteps.fill(&world.vteps, Vtep::default());
        self.vtep_sources = Hash::new(&world.vtep_sources);
        self.lookups.0[0].set(self.lookups.0[0].get() + 1);
        self.tunnels.fill(&world.tunnels, Tunnel::default());
        self.next_hops.fill(&world.next_hops, NextHop::default());
    }

    /// Forgets every connection and every count.
    pub fn clear(&self) {
        self.flows.0.iter().for_each(|set| set.set(FlowSet::default()));
        size::snat_indexes().for_each(|index| self.set_snat(index, SnatSlot::FREE));
        self.fragments.0.iter().for_each(|note| note.set(Fragment::default()));
        self.buckets.0.iter().for_each(|bucket| bucket.set(Bucket::default()));
        self.bucket_cpu.0.iter().for_each(|bucket| bucket.set(Bucket::default()));
        self.flood.0[0].set(FloodWord::default());
        self.flood_cpu.0[0].set(FloodCpu::default());
        self.clear_counters();
    }

    /// Whether the flood guard may hold records.
    pub fn flood(&self) -> FloodWord {
        self.flood.0[0].get()
    }

    /// What the flood guard counted.
    pub fn flood_cpu(&self) -> FloodCpu {
        self.flood_cpu.0[0].get()
    }

    /// Writes what the flood guard counted.
    pub fn set_flood_cpu(&self, cpu: FloodCpu) {
        self.flood_cpu.0[0].set(cpu);
    }

    /// Sets of the flow table, those of the flood guard behind them.
    pub fn flow_sets(&self) -> Vec<FlowSet> {
        self.flows.values()
    }

    /// Writes a set of the flow table.
    pub fn set_flow_set(&self, index: u32, set: FlowSet) {
        self.flows.0[index as usize].set(set);
    }

    /// Writes an entry of the SNAT table.
    pub fn set_snat(&self, index: u32, slot: SnatSlot) {
        self.snat.0[index as usize].set(slot);
    }

    /// The table of fragmented packets.
    pub fn fragments(&self) -> Vec<Fragment> {
        self.fragments.values()
    }

    /// Writes an entry of the table of fragmented packets.
    pub fn set_fragment(&self, index: u32, fragment: Fragment) {
        self.fragments.0[index as usize].set(fragment);
    }

    /// Every SNAT slot of the standard world's range that is not free.
    pub fn snat_slots(&self) -> Vec<(u32, SnatSlot)> {
        let slots = size::snat_indexes().map(|i| (i, self.snat.0[i as usize].get()));
        slots.filter(|(_, slot)| *slot != SnatSlot::FREE).collect()
    }

    /// The count of a reason at a hook.
    pub fn reason(&self, hook: Hook, reason: u32) -> ReasonCounter {
        self.reasons.0[(hook as u32 * maps::REASON_SLOTS + reason) as usize].get()
    }

    /// The counters of a Service.
    pub fn service(&self, id: u32) -> ServiceCounter {
        self.services.0[id as usize].get()
    }

    /// The counters of a backend.
    pub fn backend(&self, id: u32) -> BackendCounter {
        self.backend_counters.0[id as usize].get()
    }

    /// The counters of a kind of answer.
    pub fn answer(&self, kind: AnswerKind) -> AnswerCounter {
        self.answers.0[kind as usize].get()
    }

    /// Sets every counter to zero.
    pub fn clear_counters(&self) {
        self.reasons.0.iter().for_each(|c| c.set(ReasonCounter::default()));
        self.answers.0.iter().for_each(|c| c.set(AnswerCounter::default()));
        self.services.0.iter().for_each(|c| c.set(ServiceCounter::default()));
        self.backend_counters.0.iter().for_each(|c| c.set(BackendCounter::default()));
    }

    fn end_all_flows(&self) {
        for cell in &self.flows.0 {
            let mut set = cell.get();
            set.tags = Default::default();
            cell.set(set);
        }
    }

    /// The verifier refuses every helper call between lock and unlock; so does this.
    fn unlocked(&self) -> &Self {
        assert!(!self.locked.get(), "a table was asked for under a lock");
        self
    }
}

impl Env for Host {
    type Lock = u32;

    fn settings(&self) -> Option<At<'_, Settings>> {
        self.unlocked().settings.at(0)
    }
    fn frontend(&self, key: &FrontendKey) -> Option<At<'_, Frontend>> {
        self.unlocked().frontends.at(key)
    }
    fn maglev(&self, index: u32) -> Option<At<'_, u32>> {
        self.unlocked().maglev.at(index)
    }
    fn backend(&self, id: u32) -> Option<At<'_, Backend>> {
        self.unlocked().backends.at(id)
    }
    fn pod(&self, addr: &Addr) -> Option<At<'_, Pod>> {
        self.unlocked().pods.at(addr)
    }
    fn vtep(&self, index: u32) -> Option<At<'_, Vtep>> {
        self.unlocked().vteps.at(index)
    }
    fn vtep_source(&self, key: &VtepKey) -> Option<At<'_, u32>> {
        self.unlocked().vtep_sources.at(key)
    }
    fn near(&self) -> Option<At<'_, Near>> {
        self.unlocked().near.at(0)
    }
    fn lookups(&self) -> Option<At<'_, u32>> {
        self.unlocked().lookups.at(0)
    }
    fn tunnel(&self, index: u32) -> Option<At<'_, Tunnel>> {
        self.unlocked().tunnels.at(index)
    }
    fn next_hop(&self, index: u32) -> Option<At<'_, NextHop>> {
        self.unlocked().next_hops.at(index)
    }
    fn flow_set(&self, index: u32) -> Option<At<'_, FlowSet>> {
        self.unlocked().flows.at(index)
    }
    fn scratch(&self) -> Option<At<'_, Scratch>> {
        self.unlocked().scratch.at(0)
    }
    fn decide(&self) -> Answer {
        decide::answer(self.unlocked())
    }
    fn follow(&self, slot: SnatSlot, tag: u32, segment: Segment) {
        tcp::follow(self.unlocked(), slot, tag, segment);
    }
    fn find(&self, reply: bool) -> SnatSlot {
        flow::find(self.unlocked(), reply)
    }
    fn flow_lock(&self, set: u32) -> Option<Self::Lock> {
        self.unlocked();
        (set < maps::FLOW_LOCKS).then_some(set)
    }
    fn lock(&self, _lock: Self::Lock) {
        if let Some((index, set)) = self.put_at_lock.take() {
            self.set_flow_set(index, set);
        }
        self.unlocked().locked.set(true);
    }
    fn unlock(&self, _lock: Self::Lock) {
        assert!(self.locked.replace(false), "unlocked what was not locked");
    }
    fn snat(&self, index: u32) -> Option<At<'_, SnatSlot>> {
        self.unlocked().snat.at(index)
    }
    fn fragment(&self, index: u32) -> Option<At<'_, Fragment>> {
        self.unlocked().fragments.at(index)
    }
    fn note(&self) {
        let _written = fragment::write(self.unlocked());
    }
    fn now(&self) -> u32 {
        self.unlocked();
        self.clock_reads.set(self.clock_reads.get() + 1);
        if self.end_flows_at_clock_read.get() == Some(self.clock_reads.get()) {
            self.end_all_flows();
        }
        self.now.get()
    }
    fn forget(&self, value: u32) -> u32 {
        self.unlocked();
        value
    }
    fn reason_counter(&self, index: u32) -> Option<At<'_, ReasonCounter>> {
        self.unlocked().reasons.at(index)
    }
    fn service_counter(&self, service: u32) -> Option<At<'_, ServiceCounter>> {
        self.unlocked().services.at(service)
    }
    fn backend_counter(&self, backend: u32) -> Option<At<'_, BackendCounter>> {
        self.unlocked().backend_counters.at(backend)
    }
    fn answer_counter(&self, kind: AnswerKind) -> Option<At<'_, AnswerCounter>> {
        self.unlocked().answers.at(kind as u32)
    }
    fn source_bucket(&self, index: u32) -> Option<At<'_, Bucket>> {
        self.unlocked().buckets.at(index)
    }
    fn flood(&self) -> Option<At<'_, FloodWord>> {
        self.unlocked().flood.at(0)
    }
    fn flood_cpu(&self) -> Option<At<'_, FloodCpu>> {
        self.unlocked().flood_cpu.at(0)
    }
    fn cpu_bucket(&self) -> Option<At<'_, Bucket>> {
        self.unlocked().bucket_cpu.at(0)
    }
}

/// Bytes that a mark for TC takes in front of a frame.
const MARK: usize = 8;

/// A frame in memory that ends with its last byte.
struct HostFrame {
    buffer: Box<[Cell<u8>]>,
    start: usize,
    ifindex: u32,
    mark: Option<u32>,
    takes_metadata: bool,
    /// As in [`Frame::segment`].
    segment: u32,
    /// The lane that goes on: what a tail call is in the kernel.
    lane: Option<Lane>,
    /// Where the first buffer ends.
    first_end: usize,
    /// The program asks for the length of every frame, as those behind the fast ones do.
    asks_length: bool,
}

impl HostFrame {
    fn new(
        packet: &[u8],
        head_room: usize,
        first: usize,
        ifindex: u32,
        takes_metadata: bool,
    ) -> Self {
        let room = std::iter::repeat_n(0xaa, head_room);
        let buffer = room.chain(packet.iter().copied()).map(Cell::new).collect();
        Self {
            buffer,
            start: head_room,
            ifindex,
            mark: None,
            takes_metadata,
            segment: 0,
            lane: None,
            first_end: head_room + first,
            asks_length: false,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.buffer[self.start..].iter().map(Cell::get).collect()
    }
}

// SAFETY: `start..end` is a part of `buffer`, which is reallocated by `cut_tail` alone; only
// `adjust_head` moves the start, and within the buffer. Both take `&mut self`.
unsafe impl Frame for HostFrame {
    fn start(&self) -> *mut u8 {
        self.buffer[self.start..].as_ptr().cast::<u8>().cast_mut()
    }
    fn end(&self) -> *mut u8 {
        self.buffer[self.first_end..].as_ptr().cast::<u8>().cast_mut()
    }
    fn packet_len(&self) -> usize {
        let end = if self.asks_length { self.buffer.len() } else { self.first_end };
        end - self.start
    }
    fn is_split(&self) -> bool {
        self.first_end < self.buffer.len()
    }
    fn adjust_head(&mut self, delta: i32) -> bool {
        let Some(start) = self.start.checked_add_signed(delta as isize) else { return false };
        // As the kernel: an Ethernet header must remain in the first buffer.
        if start + 14 > self.first_end {
            return false;
        }
        self.start = start;
        true
    }
    fn cut_tail(&mut self, bytes: u32) -> bool {
        let len = self.buffer.len();
        // As the kernel: an Ethernet header must remain.
        if self.start + 14 + bytes as usize > len {
            return false;
        }
        self.buffer = self.buffer[..len - bytes as usize].to_vec().into();
        self.first_end = self.first_end.min(self.buffer.len());
        true
    }
    fn take_options_out(&mut self, _len: u32) -> u32 {
        0
    }
    fn is_checksum_pending(&mut self, _offset: u32) -> bool {
        false
    }
    fn hand_over_mark(&mut self, ifindex: u32) -> bool {
        if !self.takes_metadata || self.start < MARK {
            return false;
        }
        self.mark = Some(ifindex);
        true
    }
    fn peer_mark(&mut self, ifindex: u32) -> bool {
        self.hand_over_mark(ifindex | BY_PEER)
    }
    fn transport_checksum(&mut self, offset: usize, addresses: u16, ports: u16, udp: bool) -> bool {
        let at = self.start + offset;
        let Some([high, low]) = self.buffer.get(at..at + 2) else { return false };
        let old = u16::from_ne_bytes([high.get(), low.get()]);
        let delta = Sum(addresses as u64).add16(ports).fold();
        let new = if udp { update_udp(old, delta) } else { update(old, delta) };
        let [a, b] = new.to_ne_bytes();
        high.set(a);
        low.set(b);
        true
    }
    fn packet_sum(&mut self, _delta: u16) {}
    fn segment(&self) -> u32 {
        self.segment
    }
    fn sum(&self, offset: u32, len: u32) -> u16 {
        let at = self.start + offset as usize;
        let Some(bytes) = self.buffer.get(at..at + len as usize) else { return 0 };
        let bytes: Vec<u8> = bytes.iter().map(Cell::get).collect();
        let words = bytes.chunks(2).map(|c| u16::from_ne_bytes([c[0], *c.get(1).unwrap_or(&0)]));
        words.fold(Sum::default(), Sum::add16).fold()
    }
    fn change_lane(&mut self, hook: Hook, lane: Lane) -> bool {
        let there = LANES.iter().any(|(h, l, _)| (*h, *l) == (hook, lane));
        self.lane = there.then_some(lane);
        there
    }
    fn ingress_ifindex(&self) -> u32 {
        self.ifindex
    }
}
