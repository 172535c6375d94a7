//! The loaded program as the host's twin.

use std::collections::BTreeMap;
use std::ops::DerefMut;

use sluice_abi::{
    ExitKind, FLOW_WAYS, FlowRecord, FlowSet, Fragment, Hook, REASONS, ReasonCounter, SnatSlot,
};
use sluice_datapath::verdict::Action;
use sluice_tests::host::{Host, HostRan};
use sluice_tests::judge::{code_of, difference, is_taken};
use sluice_tests::kernel::{Kernel, OBJECT};
use sluice_tests::netns::make_interfaces;
use sluice_tests::sequence::Twin;
use sluice_tests::world::{World, size};

/// The programs and their maps.
pub struct Loaded<K> {
    kernel: K,
    /// What the reason counters must hold. They are cleared as rarely as possible: that takes a
    /// thousand calls.
    counted: BTreeMap<(Hook, u32), ReasonCounter>,
    cases: u32,
    /// A case has begun that did not end: something is wrong in it.
    open: bool,
}

/// After so many cases everything is compared and cleared, not only what the case touched.
const ROUND: u32 = 50;

impl Loaded<Box<Kernel>> {
    /// Loads the object, in the namespace of the calling thread.
    pub fn new() -> Self {
        make_interfaces();
        Self::of(Box::new(Kernel::load(OBJECT, size::FLOW_SETS)))
    }
}

impl<'k> Loaded<&'k mut Kernel> {
    /// An object that was loaded before.
    pub fn borrowing(kernel: &'k mut Kernel) -> Self {
        Self::of(kernel)
    }
}

impl<K: DerefMut<Target = Kernel>> Loaded<K> {
    fn of(mut kernel: K) -> Self {
        kernel.clear_state();
        Self { kernel, counted: BTreeMap::new(), cases: 0, open: false }
    }

    /// Everything, and a clean table for the next case.
    fn compare_all(&mut self, host: &Host) -> Result<(), String> {
        let kernel = &*self.kernel;
        for hook in Hook::ALL {
            for row in REASONS {
                let number = row.reason as u32;
                let expected = self.counted.get(&(hook, number)).copied().unwrap_or_default();
                let got = kernel.reason(hook, number);
                if got != expected {
                    return Err(format!(
                        "in the kernel {hook:?} {} within {ROUND} cases: {got:?} instead of {expected:?}",
                        row.label
                    ));
                }
            }
        }
        let slots = (kernel.snat_slots(), host.snat_slots());
        let flows = self.compare_touched(host);
        self.kernel.clear_state();
        self.counted.clear();
        match slots.0 == slots.1 {
            true => flows,
            false => Err(told_apart(&[format!("SNAT {slots:?}")])),
        }
    }

    /// What the case touched, and a clean table for the next.
    fn compare_touched(&mut self, host: &Host) -> Result<(), String> {
        let mut differences = Vec::new();
        for (index, ours) in (0u32..).zip(host.flow_sets()) {
            let theirs: FlowSet = self.kernel.read(sluice_abi::maps::FLOW, index);
            let (here, there) = (meant(ours), meant(theirs));
            for way in (0..FLOW_WAYS).filter(|&w| of(&here, w) != of(&there, w)) {
                let records = (of(&there, way), of(&here, way));
                differences.push(format!("record {way} of set {index}: {records:#?}"));
            }
            if theirs != FlowSet::default() {
                self.kernel.set_flow_set(index, FlowSet::default());
            }
        }
        for (index, slot) in host.snat_slots() {
            if self.kernel.snat(index) != slot {
                differences.push(format!("SNAT {index}: {:?}", (self.kernel.snat(index), slot)));
            }
            self.kernel.set_snat(index, SnatSlot::FREE);
        }
        for (index, note) in (0u32..).zip(host.fragments()) {
            if note != Fragment::default() {
                self.kernel.write(sluice_abi::maps::FRAGMENT, index, Fragment::default());
            }
        }
        if differences.is_empty() { Ok(()) } else { Err(told_apart(&differences)) }
    }
}

fn told_apart(differences: &[String]) -> String {
    format!("kernel and host ended with other tables: {}", differences.join("\n"))
}

/// A record and its tag.
fn of(set: &FlowSet, way: usize) -> (u32, FlowRecord) {
    (set.tags[way], set.records[way])
}

/// Without what means nothing: time stamps, which are the kernel's jiffies there, and what exits do
/// not use.
fn meant(mut set: FlowSet) -> FlowSet {
    for record in &mut set.records {
        (record.seen, record.decided, record.created) = (0, 0, 0);
        for exit in [&mut record.forward, &mut record.reply] {
            if exit.kind == ExitKind::Stack as u8 {
                exit.index = 0;
            }
            if exit.kind != ExitKind::Frame as u8 {
                (exit.dst_mac, exit.src_mac) = Default::default();
            }
        }
    }
    set
}

impl<K: DerefMut<Target = Kernel>> Twin for Loaded<K> {
    fn begin(&mut self, world: &World) {
        self.kernel.rewrite(world);
        if std::mem::replace(&mut self.open, true) {
            self.kernel.clear_state();
            self.counted.clear();
        }
    }

    fn rewrite(&mut self, world: &World) {
        self.kernel.rewrite(world);
    }

    fn frame(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
        host: &HostRan,
    ) -> Result<(), String> {
        if !is_taken(hook, frame) {
            return Ok(());
        }
        let reason = host.verdict.reason;
        let counter = self.counted.entry((hook, reason as u32)).or_default();
        counter.packets += 1;
        counter.bytes += frame.len() as u64;
        let expected = *counter;
        let ran = self.kernel.run(hook, ifindex, frame);
        let counted = self.kernel.reason(hook, reason as u32);
        let code = code_of(hook, host.verdict.action);
        let dropped = host.verdict.action == Action::Drop;
        if counted != expected {
            Err(format!("{reason:?} on the host, something else in the kernel: code {}", ran.code))
        } else if ran.code != code {
            Err(format!("{reason:?}: the kernel's program returns {} instead of {code}", ran.code))
        } else if !dropped && ran.mark() != host.mark {
            Err(format!("{reason:?}: handed to {:?} instead of {:?}", ran.mark(), host.mark))
        } else if !dropped && ran.bytes != host.bytes {
            let difference = difference(&ran.bytes, &host.bytes);
            Err(format!("{reason:?}: kernel (got) and host (expected): {difference}"))
        } else {
            Ok(())
        }
    }

    fn end(&mut self, host: &Host) -> Result<(), String> {
        self.cases += 1;
        self.open = false;
        match self.cases % ROUND {
            0 => self.compare_all(host),
            _ => self.compare_touched(host),
        }
    }
}

/// Finds fault with every reply: shows that faults are found.
pub struct Choosy;

impl Twin for Choosy {
    fn begin(&mut self, _: &World) {}
    fn rewrite(&mut self, _: &World) {}
    fn frame(&mut self, _: Hook, _: u32, _: &[u8], host: &HostRan) -> Result<(), String> {
        match host.verdict.reason {
            sluice_abi::Reason::ReplyLocal => Err("a reply".into()),
            _ => Ok(()),
        }
    }
    fn end(&mut self, _: &Host) -> Result<(), String> {
        Ok(())
    }
}
