//! The tables and the kernel, as the packet logic knows them.

use crate::access::At;
use crate::decide::Answer;
use crate::tcp::Segment;
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet,
    Fragment, Frontend, FrontendKey, Near, NextHop, Pod, ReasonCounter, Scratch, ServiceCounter,
    Settings, SnatSlot, Tunnel, Vtep, VtepKey,
};

/// Tables and helpers: maps in the kernel, vectors on the host. `None` is "no such entry".
pub trait Env {
    /// A spin lock of the flow table.
    type Lock: Copy;

    /// The settings.
    fn settings(&self) -> Option<At<'_, Settings>>;
    /// Where a Service is reached. # Cost: a hash lookup.
    fn frontend(&self, key: &FrontendKey) -> Option<At<'_, Frontend>>;
    /// Entry of a consistent-hash extent: a backend id.
    fn maglev(&self, index: u32) -> Option<At<'_, u32>>;
    /// A backend.
    fn backend(&self, id: u32) -> Option<At<'_, Backend>>;
    /// A pod of this node. # Cost: a hash lookup.
    fn pod(&self, addr: &Addr) -> Option<At<'_, Pod>>;
    /// A tunnel end of another node.
    fn vtep(&self, index: u32) -> Option<At<'_, Vtep>>;
    /// Index of the tunnel end that may send from this address. # Cost: a hash lookup.
    fn vtep_source(&self, key: &VtepKey) -> Option<At<'_, u32>>;
    /// What this CPU remembers of pods and tunnel ends.
    fn near(&self) -> Option<At<'_, Near>>;
    /// Changes whenever what [`Env::pod`] and [`Env::vtep_source`] say may have changed; 0: nothing
    /// is to be remembered.
    fn lookups(&self) -> Option<At<'_, u32>>;
    /// One of our own tunnels.
    fn tunnel(&self, index: u32) -> Option<At<'_, Tunnel>>;
    /// A next hop.
    fn next_hop(&self, index: u32) -> Option<At<'_, NextHop>>;
    /// A set of flow records.
    fn flow_set(&self, index: u32) -> Option<At<'_, FlowSet>>;
    /// Room of this CPU in which a record is put together (the stack has 512 bytes).
    fn scratch(&self) -> Option<At<'_, Scratch>>;
    /// Runs [`answer`](crate::decide::answer) on what stands in the scratch room.
    fn decide(&self) -> Answer;
    /// Runs [`follow`](crate::tcp::follow).
    fn follow(&self, slot: SnatSlot, tag: u32, segment: Segment);
    /// Runs [`find`](crate::flow::find) on the tuple in the scratch room.
    fn find(&self, reply: bool) -> SnatSlot;
    /// The lock of a set.
    fn flow_lock(&self, set: u32) -> Option<Self::Lock>;
    /// Takes a lock; between this and [`Env::unlock`] no other method may be called (the verifier
    /// refuses helper calls under a lock).
    fn lock(&self, lock: Self::Lock);
    /// Gives a lock back.
    fn unlock(&self, lock: Self::Lock);
    /// Owner of a SNAT port.
    fn snat(&self, index: u32) -> Option<At<'_, SnatSlot>>;
    /// What is known of a fragmented packet.
    fn fragment(&self, index: u32) -> Option<At<'_, Fragment>>;
    /// Runs [`write`](crate::fragment::write) on what stands in the scratch room.
    fn note(&self);
    /// Low 32 bits of jiffies; no clock is read.
    fn now(&self) -> u32;
    /// `value`, of which the verifier knows nothing afterwards (it goes through memory): one way
    /// through the program for every length that a header can have, not one for each.
    fn forget(&self, value: u32) -> u32;
    /// Counter `hook * REASON_SLOTS + reason` of this CPU.
    fn reason_counter(&self, index: u32) -> Option<At<'_, ReasonCounter>>;
    /// Counters of a Service of this CPU.
    fn service_counter(&self, service: u32) -> Option<At<'_, ServiceCounter>>;
    /// Counters of a backend of this CPU.
    fn backend_counter(&self, backend: u32) -> Option<At<'_, BackendCounter>>;
    /// Counter of answers of this CPU.
    fn answer_counter(&self, kind: AnswerKind) -> Option<At<'_, AnswerCounter>>;
    /// Bucket of answers to the sources of hash `index`.
    fn source_bucket(&self, index: u32) -> Option<At<'_, Bucket>>;
    /// Whether the flood guard holds records.
    fn flood(&self) -> Option<At<'_, FloodWord>>;
    /// New connections of this CPU.
    fn flood_cpu(&self) -> Option<At<'_, FloodCpu>>;
    /// Bucket of answers of this CPU.
    fn cpu_bucket(&self) -> Option<At<'_, Bucket>>;
}
