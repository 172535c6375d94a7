//! The loaded object: its maps filled from a [`World`], its programs run by BPF_PROG_TEST_RUN.

use std::collections::BTreeMap;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, PerCpuArray, PerCpuValues};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader};
use sluice_abi::{
    AnswerCounter, AnswerKind, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet, Fragment,
    Hook, ReasonCounter, Scratch, ServiceCounter, Settings, SnatSlot, maps,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::host::BY_PEER;
use crate::world::{World, size};

/// The object that the agent loads.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SLUICE_BPF_OBJECT"));
/// The same source with counted helpers.
pub static TRAP_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SLUICE_BPF_TRAP_OBJECT"));

/// XDP's and TC's answers, as the kernel numbers them (include/uapi/linux/bpf.h, pkt_cls.h).
pub mod code {
    /// XDP_DROP.
    pub const XDP_DROP: u32 = 1;
    /// XDP_PASS.
    pub const XDP_PASS: u32 = 2;
    /// XDP_TX.
    pub const XDP_TX: u32 = 3;
    /// XDP_REDIRECT.
    pub const XDP_REDIRECT: u32 = 4;
    /// TC_ACT_UNSPEC: the next program, or the stack.
    pub const TC_NEXT: u32 = u32::MAX;
    /// TC_ACT_SHOT.
    pub const TC_DROP: u32 = 2;
    /// TC_ACT_REDIRECT.
    pub const TC_REDIRECT: u32 = 7;
}

/// A value of the ABI, as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

// SAFETY: `T` is plain bytes: every bit pattern is a value (`FromBytes`), and there is no padding
// (`IntoBytes`).
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> aya::Pod for Plain<T> {}

/// Plain bytes that live in maps.
pub trait Value: FromBytes + IntoBytes + Immutable + Copy + 'static {}
impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> Value for T {}

/// What became of one frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ran {
    /// The program's return value: one of [`code`].
    pub code: u32,
    /// The frame afterwards.
    pub bytes: Vec<u8>,
    /// What XDP put in front of the frame for TC.
    pub meta: Vec<u8>,
}

impl Ran {
    /// Interface that XDP asks TC to hand the frame to.
    pub fn mark(&self) -> Option<u32> {
        let meta: [u8; 8] = self.meta.as_slice().try_into().ok()?;
        let [magic, ifindex] = zerocopy::transmute!(meta);
        match magic {
            HAND_OVER_MAGIC => Some(ifindex),
            PEER_MAGIC => Some(ifindex | BY_PEER),
            _ => None,
        }
    }
}

/// First word of what XDP leaves for TC then: "slup".
const PEER_MAGIC: u32 = 0x736c_7570;
/// First word of what XDP leaves for TC: "sluc".
const HAND_OVER_MAGIC: u32 = 0x736c_7563;

/// A loaded object.
pub struct Kernel {
    ebpf: Ebpf,
    flow_sets: u32,
    filled: Option<World>,
    lookups: u32,
}

impl Kernel {
    /// Loads `object` with small maps and `flow_sets` sets of sixteen connections.
    ///
    /// # Panics
    /// If the kernel refuses the object; the message has the verifier's last words.
    pub fn load(object: &[u8], flow_sets: u32) -> Self {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(maps::FRONTEND, size::FRONTENDS)
            .map_max_entries(maps::MAGLEV, size::MAGLEV)
            .map_max_entries(maps::BACKEND, size::BACKENDS)
            .map_max_entries(maps::BACKEND_STAT, size::BACKENDS)
            .map_max_entries(maps::SERVICE_STAT, size::SERVICES)
            .map_max_entries(maps::POD, size::PODS)
            .map_max_entries(maps::VTEP, size::VTEPS)
            .map_max_entries(maps::VTEP_SOURCE, size::VTEP_SOURCES)
            .map_max_entries(maps::NEXTHOP, size::NEXT_HOPS)
            .map_max_entries(maps::SNAT, size::SNAT_SLOTS)
            .map_max_entries(maps::FLOW, flow_sets + size::FLOOD_SETS)
            .map_max_entries(maps::FRAGMENT, size::FRAGMENTS)
            .load(object)
            .expect("the object loads");
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => panic!("{name}: a program of an unknown kind"),
            };
            loaded.unwrap_or_else(|e| panic!("{name} does not load: {e:?}"));
        }
        sluice::attach::fill_lanes(&mut ebpf).expect("the lanes' programs");
        Self { ebpf, flow_sets, filled: None, lookups: 0 }
    }

    /// Fills the tables from `world` and forgets every connection and every count.
    ///
    /// # Panics
    /// If a map cannot be written.
    pub fn fill(&mut self, world: &World) {
        self.rewrite(world);
        self.clear_state();
    }

    /// Fills the tables from `world`; connections and counts stay.
    ///
    /// # Panics
    /// If a map cannot be written.
    pub fn rewrite(&mut self, world: &World) {
        assert!(world.settings.flow_set_mask < self.flow_sets, "more flow sets than the map has");
        let old = self.filled.take();
        // Worlds are much the same, and writing one anew costs a thousand calls.
        let old = old.as_ref();
        self.write_array(maps::SETTINGS, &[world.settings], None);
        self.write_hash(maps::FRONTEND, &world.frontends, old.map(|o| &o.frontends));
        self.write_hash(maps::POD, &world.pods, old.map(|o| &o.pods));
        self.write_hash(maps::VTEP_SOURCE, &world.vtep_sources, old.map(|o| &o.vtep_sources));
        self.lookups += 1;
        self.write_array(maps::LOOKUPS, &[self.lookups], None);
        self.write_array(maps::MAGLEV, &world.maglev, old.map(|o| &o.maglev[..]));
        self.write_array(maps::BACKEND, &world.backends, old.map(|o| &o.backends[..]));
        self.write_array(maps::VTEP, &world.vteps, old.map(|o| &o.vteps[..]));
        self.write_array(maps::TUNNEL, &world.tunnels, old.map(|o| &o.tunnels[..]));
        self.write_array(maps::NEXTHOP, &world.next_hops, old.map(|o| &o.next_hops[..]));
        self.filled = Some(world.clone());
    }

    /// Forgets every connection and every count.
    pub fn clear_state(&mut self) {
        self.clear_connections();
        self.clear_counters();
    }

    fn sets(&self) -> u32 {
        self.flow_sets + size::FLOOD_SETS
    }

    /// Forgets every connection.
    pub fn clear_connections(&mut self) {
        for set in 0..self.sets() {
            self.set_flow_set(set, FlowSet::default());
        }
        for index in size::snat_indexes() {
            if self.snat(index) != SnatSlot::FREE {
                self.set_snat(index, SnatSlot::FREE);
            }
        }
        for index in 0..size::FRAGMENTS {
            self.write(maps::FRAGMENT, index, Fragment::default());
        }
        self.clear_per_cpu::<Scratch>(maps::SCRATCH);
        self.write(maps::FLOOD, 0, FloodWord::default());
        self.clear_per_cpu::<FloodCpu>(maps::FLOOD_CPU);
        if AnswerKind::ALL.iter().any(|kind| self.answer(*kind) != AnswerCounter::default()) {
            self.clear_buckets();
        }
    }

    /// Fills every bucket of answers.
    pub fn clear_buckets(&mut self) {
        for index in 0..Bucket::SOURCES {
            self.write(maps::BUCKET, index, Bucket::default());
        }
        self.clear_per_cpu::<Bucket>(maps::BUCKET_CPU);
    }

    /// Sets every counter to zero.
    pub fn clear_counters(&mut self) {
        self.clear_per_cpu::<AnswerCounter>(maps::ANSWER);
        self.clear_per_cpu::<ReasonCounter>(maps::REASON);
        self.clear_per_cpu::<ServiceCounter>(maps::SERVICE_STAT);
        self.clear_per_cpu::<BackendCounter>(maps::BACKEND_STAT);
    }

    /// Replaces the settings alone.
    pub fn write_settings(&mut self, settings: &Settings) {
        self.write_array(maps::SETTINGS, &[*settings], None);
    }

    /// Runs the program of `hook` on one frame that arrived on (or leaves by) `ifindex`.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run(&self, hook: Hook, ifindex: u32, packet: &[u8]) -> Ran {
        self.run_merged(hook, ifindex, packet, 0)
    }

    /// The same with a frame into which segments of `segment` bytes of payload were merged (at TC).
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run_merged(&self, hook: Hook, ifindex: u32, packet: &[u8], segment: u32) -> Ran {
        match hook {
            Hook::Xdp => self.run_xdp(ifindex, packet, 0, None),
            Hook::TcIngress | Hook::TcEgress | Hook::TcNode => {
                self.run_tc(hook, ifindex, packet, segment)
            }
        }
    }

    /// Runs `xdp_node` on a frame with `meta` bytes of foreign metadata in front of it, which no
    /// head can be moved over: the way to take the head room away. With `first` the frame lies in
    /// several buffers, of which the first has so many bytes.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run_xdp(&self, ifindex: u32, packet: &[u8], meta: usize, first: Option<usize>) -> Ran {
        let mut data = vec![0; meta];
        data.extend(packet);
        // Outer headers and the largest move of the head.
        let mut out = vec![0; data.len() + 256];
        let mut context_out = [0u8; XDP_MD];
        // The context's end is the end of the first buffer (net/bpf/test_run.c).
        let context = xdp_context(meta, first.unwrap_or(data.len()), ifindex);
        let mut options = TestRunOptions::new();
        options.data_in = Some(&data);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.ctx_out = Some(&mut context_out);
        let result = self.xdp("xdp_node").test_run(options);
        let result = result.unwrap_or_else(|e| panic!("XDP of {} bytes: {e:?}", packet.len()));
        out.truncate(result.data_size_out as usize);
        let start =
            u32::from_ne_bytes([context_out[0], context_out[1], context_out[2], context_out[3]]);
        let bytes = out.split_off(start as usize);
        Ran { code: result.return_value, bytes, meta: out }
    }

    fn run_tc(&self, hook: Hook, ifindex: u32, packet: &[u8], segment: u32) -> Ran {
        let mut out = vec![0; packet.len() + 256];
        let context = skb_context(ifindex, segment);
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = self.tc(hook.label()).test_run(options);
        let result = result.unwrap_or_else(|e| panic!("{hook:?} of {} bytes: {e:?}", packet.len()));
        out.truncate(result.data_size_out as usize);
        Ran { code: result.return_value, bytes: out, meta: Vec::new() }
    }

    /// Runs `xdp_node` `repeat` times on the same buffer; nanoseconds per run, by the kernel.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn repeat_xdp(&self, ifindex: u32, packet: &[u8], repeat: u32) -> Duration {
        let context = xdp_context(0, packet.len(), ifindex);
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        self.xdp("xdp_node").test_run(options).expect("test run").duration
    }

    /// An XDP program of the object.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn xdp(&self, name: &str) -> &Xdp {
        match self.ebpf.program(name) {
            Some(Program::Xdp(program)) => program,
            _ => panic!("no XDP program {name}"),
        }
    }

    /// An XDP program of the object, to be attached.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn xdp_mut(&mut self, name: &str) -> &mut Xdp {
        match self.ebpf.program_mut(name) {
            Some(Program::Xdp(program)) => program,
            _ => panic!("no XDP program {name}"),
        }
    }

    /// A TC program of the object.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn tc(&self, name: &str) -> &SchedClassifier {
        match self.ebpf.program(name) {
            Some(Program::SchedClassifier(program)) => program,
            _ => panic!("no TC program {name}"),
        }
    }

    /// A TC program of the object, to be attached.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn tc_mut(&mut self, name: &str) -> &mut SchedClassifier {
        match self.ebpf.program_mut(name) {
            Some(Program::SchedClassifier(program)) => program,
            _ => panic!("no TC program {name}"),
        }
    }

    /// The low 31 bits of jiffies.
    ///
    /// # Panics
    /// If the kernel does not run the clock program.
    pub fn jiffies(&self) -> u32 {
        let mut options = TestRunOptions::new();
        let frame = [0u8; 64];
        options.data_in = Some(&frame);
        self.xdp("xdp_clock").test_run(options).expect("test run").return_value
    }

    /// Lets every CPU guard itself against too many new connections from now on, or not.
    pub fn guard(&mut self, on: bool) {
        let cpus = self.flood_cpus().into_iter();
        let cpus: Vec<_> = cpus.map(|cpu| Plain(FloodCpu { on: on as u32, ..cpu })).collect();
        let cpus = PerCpuValues::try_from(cpus).expect("CPUs");
        let map = self.map_mut(maps::FLOOD_CPU);
        let mut array: PerCpuArray<_, Plain<FloodCpu>> = map.try_into().expect("per CPU");
        array.set(0, cpus, 0).expect("the guard's map");
    }

    /// What the flood guard counted on each CPU.
    pub fn flood_cpus(&self) -> Vec<FloodCpu> {
        let map = self.map(maps::FLOOD_CPU);
        let array: PerCpuArray<_, Plain<FloodCpu>> = map.try_into().expect("per CPU");
        array.get(&0, 0).expect("the guard's map").iter().map(|cpu| cpu.0).collect()
    }

    /// Sets of the flow table, those of the flood guard behind them.
    pub fn flow_sets(&self) -> Vec<FlowSet> {
        (0..self.sets()).map(|i| self.read(maps::FLOW, i)).collect()
    }

    /// Writes a set of the flow table.
    pub fn set_flow_set(&mut self, index: u32, set: FlowSet) {
        self.write(maps::FLOW, index, set);
    }

    /// An entry of the SNAT table.
    pub fn snat(&self, index: u32) -> SnatSlot {
        self.read(maps::SNAT, index)
    }

    /// Writes an entry of the SNAT table.
    pub fn set_snat(&mut self, index: u32, slot: SnatSlot) {
        self.write(maps::SNAT, index, slot);
    }

    /// Every owned SNAT slot of the standard world's range.
    pub fn snat_slots(&self) -> Vec<(u32, SnatSlot)> {
        let slots = size::snat_indexes().map(|i| (i, self.snat(i)));
        slots.filter(|(_, slot)| *slot != SnatSlot::FREE).collect()
    }

    /// The count of a reason at a hook, over all CPUs.
    pub fn reason(&self, hook: Hook, reason: u32) -> ReasonCounter {
        let values: Vec<ReasonCounter> =
            self.read_per_cpu(maps::REASON, hook as u32 * maps::REASON_SLOTS + reason);
        values.iter().fold(ReasonCounter::default(), |sum, c| ReasonCounter {
            packets: sum.packets + c.packets,
            bytes: sum.bytes + c.bytes,
        })
    }

    /// The counters of a Service, over all CPUs.
    pub fn service(&self, id: u32) -> ServiceCounter {
        let values: Vec<ServiceCounter> = self.read_per_cpu(maps::SERVICE_STAT, id);
        values.iter().fold(ServiceCounter::default(), |sum, c| ServiceCounter {
            forward_packets: sum.forward_packets + c.forward_packets,
            forward_bytes: sum.forward_bytes + c.forward_bytes,
            reply_packets: sum.reply_packets + c.reply_packets,
            reply_bytes: sum.reply_bytes + c.reply_bytes,
            new_flows: sum.new_flows + c.new_flows,
            dropped_packets: sum.dropped_packets + c.dropped_packets,
        })
    }

    /// The counters of a backend, over all CPUs.
    pub fn backend(&self, id: u32) -> BackendCounter {
        let values: Vec<BackendCounter> = self.read_per_cpu(maps::BACKEND_STAT, id);
        values.iter().fold(BackendCounter::default(), |sum, c| BackendCounter {
            forward_packets: sum.forward_packets + c.forward_packets,
            forward_bytes: sum.forward_bytes + c.forward_bytes,
            reply_packets: sum.reply_packets + c.reply_packets,
            reply_bytes: sum.reply_bytes + c.reply_bytes,
            new_flows: sum.new_flows + c.new_flows,
        })
    }

    /// The counters of a kind of answer, over all CPUs.
    pub fn answer(&self, kind: AnswerKind) -> AnswerCounter {
        let values: Vec<AnswerCounter> = self.read_per_cpu(maps::ANSWER, kind as u32);
        values.iter().fold(AnswerCounter::default(), |sum, c| AnswerCounter {
            sent: sum.sent + c.sent,
            limited: sum.limited + c.limited,
        })
    }

    /// An entry of an array.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn read<T: Value>(&self, map: &str, index: u32) -> T {
        let array: Array<_, Plain<T>> = self.map(map).try_into().expect("an array");
        array.get(&index, 0).unwrap_or_else(|e| panic!("read {map}[{index}]: {e}")).0
    }

    /// Writes an entry of an array. A table of the world is written anew by the next fill.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn write<T: Value>(&mut self, map: &str, index: u32, value: T) {
        if ![maps::FLOW, maps::SNAT, maps::BUCKET, maps::FRAGMENT, maps::FLOOD].contains(&map) {
            self.filled = None;
        }
        let mut array: Array<_, Plain<T>> = self.map_mut(map).try_into().expect("an array");
        array.set(index, Plain(value), 0).unwrap_or_else(|e| panic!("write {map}[{index}]: {e}"));
    }

    /// Writes the first entries of an array that are not as they were.
    fn write_array<T: Value + PartialEq>(&mut self, map: &str, values: &[T], old: Option<&[T]>) {
        let mut array: Array<_, Plain<T>> = self.map_mut(map).try_into().expect("an array");
        for (i, value) in values.iter().enumerate() {
            if old.and_then(|old| old.get(i)) != Some(value) {
                array
                    .set(i as u32, Plain(*value), 0)
                    .unwrap_or_else(|e| panic!("write {map}[{i}]: {e}"));
            }
        }
    }

    /// Writes a hash map, of which only the differences from `old` are written if that is known.
    fn write_hash<K: Value + Ord, V: Value + PartialEq>(
        &mut self,
        map: &str,
        entries: &BTreeMap<K, V>,
        old: Option<&BTreeMap<K, V>>,
    ) {
        if old == Some(entries) {
            return;
        }
        let mut hash: HashMap<_, Plain<K>, Plain<V>> =
            self.map_mut(map).try_into().expect("a hash map");
        let gone: Vec<K> = match old {
            Some(old) => old.keys().filter(|key| !entries.contains_key(key)).copied().collect(),
            None => hash.keys().map(|key| key.expect("a key").0).collect(),
        };
        for key in gone {
            hash.remove(&Plain(key)).unwrap_or_else(|e| panic!("remove from {map}: {e}"));
        }
        for (key, value) in entries {
            if old.and_then(|old| old.get(key)) != Some(value) {
                hash.insert(Plain(*key), Plain(*value), 0)
                    .unwrap_or_else(|e| panic!("insert into {map}: {e}"));
            }
        }
    }

    fn read_per_cpu<T: Value>(&self, map: &str, index: u32) -> Vec<T> {
        let array: PerCpuArray<_, Plain<T>> = self.map(map).try_into().expect("per CPU");
        let values = array.get(&index, 0).unwrap_or_else(|e| panic!("read {map}[{index}]: {e}"));
        values.iter().map(|plain| plain.0).collect()
    }

    fn clear_per_cpu<T: Value>(&mut self, map: &str) {
        let mut array: PerCpuArray<_, Plain<T>> = self.map_mut(map).try_into().expect("per CPU");
        let cpus = nr_cpus().expect("the number of CPUs");
        for index in 0..array.len() {
            let zero = PerCpuValues::try_from(vec![Plain(T::new_zeroed()); cpus]).expect("CPUs");
            array.set(index, zero, 0).unwrap_or_else(|e| panic!("clear {map}[{index}]: {e}"));
        }
    }

    /// A map of the object.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn map(&self, name: &str) -> &Map {
        self.ebpf.map(name).unwrap_or_else(|| panic!("no map {name}"))
    }

    /// A map of the object, to be written.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn map_mut(&mut self, name: &str) -> &mut Map {
        self.ebpf.map_mut(name).unwrap_or_else(|| panic!("no map {name}"))
    }
}

/// Bytes of `struct xdp_md` (include/uapi/linux/bpf.h).
const XDP_MD: usize = 24;

/// `struct xdp_md` of a frame that begins at `data` and ends at `end`, with metadata in front.
fn xdp_context(data: usize, end: usize, ifindex: u32) -> [u8; XDP_MD] {
    let mut context = [0u8; XDP_MD];
    context[0..4].copy_from_slice(&(data as u32).to_ne_bytes());
    context[4..8].copy_from_slice(&(end as u32).to_ne_bytes());
    context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

/// Fields of `struct __sk_buff` (include/uapi/linux/bpf.h).
fn skb_context(ifindex: u32, segment: u32) -> [u8; 192] {
    const IFINDEX: usize = 40;
    const GSO_SIZE: usize = 176;
    let mut context = [0u8; 192];
    context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&segment.to_ne_bytes());
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context
}
