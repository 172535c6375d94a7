//! Forgets connections: those that are silent for too long, and UDP ones whose endpoint went away.
//!
//! The programs create and use records meanwhile. A record is freed by exchanging the tag that was
//! read with it, so that a place that got another owner is left alone; a packet that comes at the
//! same moment is decided anew.

use std::collections::{BTreeMap, BTreeSet};

use sluice_abi::{FlowRecord, IPPROTO_UDP, SnatSlot, maps};

use crate::maps::{Flow, FlowTable};

/// What one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Records in use before, those of the flood guard not counted.
    pub used: u64,
    /// Records of the flood guard in use before.
    pub guarded: u64,
    /// Records freed.
    pub freed: u64,
    /// SNAT slots freed whose record is gone.
    pub orphans: u64,
    /// First and last port of the SNAT slots in use.
    pub ports: Option<(u16, u16)>,
    /// SNAT slots in use of the group of endpoints that has most; each group has one for each port.
    pub fullest: u32,
}

/// The ages of SNAT slots without a record, kept between passes: one that is being taken looks the
/// same as one that was lost.
#[derive(Default)]
pub struct Sweeper {
    suspects: BTreeSet<(u32, u64)>,
}

impl Sweeper {
    /// One pass. `now` are the low 31 bits of jiffies.
    pub fn pass(&mut self, table: &FlowTable, now: u32) -> Swept {
        let mut swept = Swept::default();
        let flood = table.flood_word();
        for flow in table.iter() {
            if table.is_guarded(&flow) {
                swept.guarded += 1;
            } else {
                swept.used += 1;
            }
            if expired(&flow.record, now) && table.free(&flow) {
                swept.freed += 1;
            }
        }
        if flood.0 != 0 && swept.guarded == 0 && is_older(flood.0 as u32, now, 1) {
            // Nothing was put there since before the pass, so nothing is there: from now on no packet
            // looks.
            table.clear_flood_word(flood);
        }
        let mut suspects = BTreeSet::new();
        let mut groups = [0u32; maps::SNAT_SLOTS_PER_PORT as usize];
        for (index, slot) in table.slots() {
            let owned = slot.owner().is_some_and(|(set, way)| {
                table.read(set, way).is_some_and(|flow| flow.record.snat == index + 1)
            });
            let lost = !owned && self.suspects.contains(&(index, slot.0));
            if lost && table.free_slot(index, SnatSlot(slot.0)) {
                swept.orphans += 1;
                continue;
            }
            if !owned {
                suspects.insert((index, slot.0));
            }
            let port = (index / maps::SNAT_SLOTS_PER_PORT) as u16;
            groups[(index % maps::SNAT_SLOTS_PER_PORT) as usize] += 1;
            // In the order of the ports.
            swept.ports = Some((swept.ports.map_or(port, |(first, _)| first), port));
        }
        self.suspects = suspects;
        swept.fullest = groups.into_iter().max().unwrap_or_default();
        swept
    }
}

/// Frees UDP records of the services in `valid` whose backend is not among the ones given. TCP
/// connections live on (kube-proxy's rule).
pub fn forget_udp(table: &FlowTable, valid: &BTreeMap<u32, BTreeSet<u32>>) -> u64 {
    let gone = |flow: &Flow| {
        flow.record.proto == IPPROTO_UDP
            && valid
                .get(&flow.record.service)
                .is_some_and(|backends| !backends.contains(&flow.record.backend_id))
    };
    table.iter().filter(|flow| gone(flow) && table.free(flow)).count() as u64
}

/// Jiffies are compared in 31 bits: that much the clock program returns.
const MASK: u32 = 0x7fff_ffff;

/// Whether a record was silent for longer than its state allows: the programs write the limit into
/// the record whenever the state changes.
pub fn expired(record: &FlowRecord, now: u32) -> bool {
    is_older(record.seen, now, record.timeout)
}

/// Whether more than `ticks` have passed since `then`.
fn is_older(then: u32, now: u32, ticks: u32) -> bool {
    let age = now.wrapping_sub(then) & MASK;
    // A packet that came after `now` was read makes the difference negative.
    age <= MASK / 2 && age > ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seen: u32) -> FlowRecord {
        FlowRecord { timeout: 30, seen, ..FlowRecord::default() }
    }

    #[test]
    fn silence_is_measured_against_the_record_s_own_limit() {
        for timeout in [0, 1, 60, 7200] {
            let record = FlowRecord { timeout, ..record(1000) };
            assert!(!expired(&record, 1000 + timeout), "{record:?}");
            assert!(expired(&record, 1001 + timeout), "{record:?}");
        }
    }

    #[test]
    fn clock_wraps_and_may_be_behind() {
        let seen = 0xffff_fff0;
        let r = record(seen);
        assert!(!expired(&r, seen.wrapping_add(20) & MASK));
        assert!(expired(&r, seen.wrapping_add(40) & MASK));
        assert!(!expired(&r, seen.wrapping_sub(5) & MASK));
    }
}
