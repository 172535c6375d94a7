//! The one place where counters are bumped, once per packet.

use crate::env::Env;
use crate::field;
use crate::verdict::{Action, Direction, Verdict};
use sluice_abi::{
    AnswerCounter, AnswerKind, BackendCounter, Hook, ReasonCounter, ServiceCounter, maps,
};

/// Counts a packet of `bytes` (as it arrived) under its reason, Service and backend.
#[inline(always)]
pub fn account<E: Env>(env: &E, hook: Hook, verdict: &Verdict, bytes: u64) {
    let index = hook as u32 * maps::REASON_SLOTS + verdict.reason as u32;
    if let Some(c) = env.reason_counter(index) {
        field!(c, ReasonCounter, packets).add(1);
        field!(c, ReasonCounter, bytes).add(bytes);
    }
    let owner = &verdict.owner;
    if owner.service == 0 {
        return;
    }
    if let Some(c) = env.service_counter(owner.service) {
        if verdict.action == Action::Drop {
            field!(c, ServiceCounter, dropped_packets).add(1);
            return;
        }
        match owner.direction {
            Direction::Forward => {
                field!(c, ServiceCounter, forward_packets).add(1);
                field!(c, ServiceCounter, forward_bytes).add(bytes);
            }
            Direction::Reply => {
                field!(c, ServiceCounter, reply_packets).add(1);
                field!(c, ServiceCounter, reply_bytes).add(bytes);
            }
        }
        if owner.new_flow {
            field!(c, ServiceCounter, new_flows).add(1);
        }
    }
    if owner.backend == 0 {
        return;
    }
    if let Some(c) = env.backend_counter(owner.backend) {
        match owner.direction {
            Direction::Forward => {
                field!(c, BackendCounter, forward_packets).add(1);
                field!(c, BackendCounter, forward_bytes).add(bytes);
            }
            Direction::Reply => {
                field!(c, BackendCounter, reply_packets).add(1);
                field!(c, BackendCounter, reply_bytes).add(bytes);
            }
        }
        if owner.new_flow {
            field!(c, BackendCounter, new_flows).add(1);
        }
    }
}

/// Counts an answer: sent, or not (the limit).
#[inline(always)]
pub fn answer<E: Env>(env: &E, kind: AnswerKind, sent: bool) {
    if let Some(c) = env.answer_counter(kind) {
        let word =
            if sent { field!(c, AnswerCounter, sent) } else { field!(c, AnswerCounter, limited) };
        word.add(1);
    }
}
