//! Forgets connections: those that are silent for too long, and UDP ones whose endpoint went away.
//!
//! The programs create and use records meanwhile. A record is freed by exchanging the tag that was
//! read with it, so that a place that got another owner is left alone; a packet that comes at the
//! same moment is decided anew.

use std::collections::{BTreeMap, BTreeSet};

use sluice_abi::{FlowRecord, IPPROTO_TCP, IPPROTO_UDP, SnatSlot, Timeouts, flow_state};

use crate::maps::{Flow, FlowTable};

/// What one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Records in use before.
    pub used: u64,
    /// Records freed.
    pub freed: u64,
    /// SNAT slots freed whose record is gone.
    pub orphans: u64,
}

/// The ages of SNAT slots without a record, kept between passes: one that is being taken looks the
/// same as one that was lost.
#[derive(Default)]
pub struct Sweeper {
    suspects: BTreeSet<(u32, u64)>,
}

impl Sweeper {
    /// One pass. `now` are the low 31 bits of jiffies; `ports` is the SNAT range.
    pub fn pass(
        &mut self,
        table: &FlowTable,
        timeouts: &Timeouts,
        now: u32,
        ports: (u16, u16),
    ) -> Swept {
        let mut swept = Swept::default();
        for flow in table.iter() {
            swept.used += 1;
            if expired(&flow.record, timeouts, now) && table.free(&flow) {
                swept.freed += 1;
            }
        }
        let mut suspects = BTreeSet::new();
        for (index, slot) in table.slots(ports.0, ports.1) {
            let owned = slot.owner().is_some_and(|(set, way)| {
                table.read(set, way).is_some_and(|flow| flow.record.snat == index + 1)
            });
            if owned {
                continue;
            }
            if self.suspects.contains(&(index, slot.0)) {
                if table.free_slot(index, SnatSlot(slot.0)) {
                    swept.orphans += 1;
                }
            } else {
                suspects.insert((index, slot.0));
            }
        }
        self.suspects = suspects;
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

/// Whether a record was silent for longer than its state allows.
pub fn expired(record: &FlowRecord, timeouts: &Timeouts, now: u32) -> bool {
    let age = now.wrapping_sub(record.seen) & MASK;
    // A packet that came after `now` was read makes the difference negative.
    if age > MASK / 2 {
        return false;
    }
    age > timeout(record, timeouts)
}

/// How long the record may be silent, in jiffies.
pub fn timeout(record: &FlowRecord, timeouts: &Timeouts) -> u32 {
    let state = record.state;
    let confirmed = state & flow_state::CONFIRMED != 0;
    if record.proto == IPPROTO_TCP {
        let both = flow_state::FIN_FORWARD | flow_state::FIN_REPLY;
        if state & flow_state::RESET != 0 || state & both == both {
            timeouts.tcp_closing
        } else if confirmed {
            timeouts.tcp_established
        } else {
            timeouts.tcp_syn
        }
    } else if confirmed {
        timeouts.udp_replied
    } else {
        timeouts.udp_oneway
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: Timeouts = Timeouts {
        tcp_syn: 60,
        tcp_established: 7200,
        tcp_closing: 10,
        udp_oneway: 30,
        udp_replied: 120,
        stamp: 1,
        redecide: 60,
        reserved: 0,
    };

    fn record(proto: u8, state: u32, seen: u32) -> FlowRecord {
        FlowRecord { proto, state, seen, ..FlowRecord::default() }
    }

    #[test]
    fn silence_is_measured_against_the_state() {
        let r = flow_state::REPLIED | flow_state::CONFIRMED;
        let fins = r | flow_state::FIN_FORWARD | flow_state::FIN_REPLY;
        for (proto, state, limit) in [
            (IPPROTO_TCP, 0, 60),
            (IPPROTO_TCP, r, 7200),
            (IPPROTO_TCP, r | flow_state::FIN_FORWARD, 7200),
            (IPPROTO_TCP, fins, 10),
            (IPPROTO_TCP, r | flow_state::RESET, 10),
            (IPPROTO_UDP, 0, 30),
            (IPPROTO_UDP, r, 120),
        ] {
            let record = record(proto, state, 1000);
            assert!(!expired(&record, &TIMEOUTS, 1000 + limit), "{record:?}");
            assert!(expired(&record, &TIMEOUTS, 1001 + limit), "{record:?}");
        }
    }

    #[test]
    fn clock_wraps_and_may_be_behind() {
        let seen = 0xffff_fff0;
        let r = record(IPPROTO_UDP, 0, seen);
        assert!(!expired(&r, &TIMEOUTS, seen.wrapping_add(20) & MASK));
        assert!(expired(&r, &TIMEOUTS, seen.wrapping_add(40) & MASK));
        assert!(!expired(&r, &TIMEOUTS, seen.wrapping_sub(5) & MASK));
    }
}
