//! What a segment does to the state of its connection (RFC 9293 section 3.3.2, as far as somebody
//! between the two ends can tell).
//!
//! A forged segment that has the right addresses and ports must change nothing. So each direction's
//! acknowledgements are remembered: an end counts only if it is where the other side waits for the
//! next byte. The established path reads one of the two numbers and writes it rarely; so what is
//! remembered may be [`STEP`] behind the truth, and a reset in that neighbourhood may be forged all
//! the same. Therefore a reset is taken back when either side goes on: the receiver of a reset that
//! is not exact answers it (RFC 5961 section 3.2), and who has sent one says nothing more.

use crate::access::At;
use crate::env::Env;
use crate::field;
use crate::flow;
use crate::wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use sluice_abi::{FlowRecord, IPPROTO_TCP, Scratch, Settings, SnatSlot, flow_state};

/// How far acknowledgements move before they are written down, in bytes. A connection at full speed
/// writes once for 22 full segments.
pub const STEP: u32 = 1 << 15;
/// How far beyond the remembered acknowledgement a segment alone is believed: a window that every
/// receiver opens, without window scaling (RFC 9293 section 3.1), and the step.
pub const NEAR: u32 = (1 << 16) + STEP;
/// How far a segment is believed whose own acknowledgement is believed too: more than any receiver's
/// buffer (RFC 7323 section 2.2 allows a gigabyte, Linux takes six megabytes by default).
pub const FAR: u32 = 1 << 24;

/// What both ends have to have said before nothing is noted but acknowledgements.
const BOTH: u32 = flow_state::REPLIED | flow_state::CONFIRMED;

/// What [`follow`] has to know of a segment beside the numbers in the scratch room: the control bits,
/// and whether it is a reply.
#[derive(Clone, Copy)]
pub struct Segment(pub u32);

impl Segment {
    const REPLY: u32 = 1 << 8;

    /// A segment with these control bits.
    #[inline(always)]
    pub fn new(flags: u8, reply: bool) -> Self {
        Self(flags as u32 | if reply { Self::REPLY } else { 0 })
    }

    #[inline(always)]
    fn is_reply(self) -> bool {
        self.0 & Self::REPLY != 0
    }

    #[inline(always)]
    fn has(self, flag: u8) -> bool {
        self.0 & flag as u32 != 0
    }
}

/// Whether a segment changes nothing: nearly every one of a known connection.
#[inline(always)]
pub fn is_quiet(
    r: At<'_, FlowRecord>,
    scratch: At<'_, Scratch>,
    state: u32,
    flags: u8,
    reply: bool,
) -> bool {
    let own =
        if reply { field!(r, FlowRecord, ack_reply) } else { field!(r, FlowRecord, ack_forward) };
    let ack = field!(scratch, Scratch, ack).get().host();
    ack.wrapping_sub(own.get()) < STEP
        && flags & (TCP_SYN | TCP_FIN | TCP_RST) == 0
        && state & (BOTH | flow_state::RESET) == BOTH
}

/// Takes a segment whose numbers stand in the scratch room into the record at `slot`, if that still
/// has this tag. In the kernel this is a function of its own: the verifier follows its branches once.
#[inline(always)]
pub fn follow<E: Env>(env: &E, slot: SnatSlot, tag: u32, segment: Segment) {
    let (Some(settings), Some(scratch), Some((index, way))) =
        (env.settings(), env.scratch(), slot.owner())
    else {
        return;
    };
    let Some(found) = flow::at(env, index, way) else { return };
    if found.tag != tag {
        return;
    }
    let state = field!(found.record, FlowRecord, state);
    let old = state.get();
    let new = after(found.record, scratch, old, segment);
    if new != old {
        state.set(new);
        let timeouts = field!(settings, Settings, timeouts);
        let limit = flow::timeout(timeouts, IPPROTO_TCP, new);
        field!(found.record, FlowRecord, timeout).set(limit);
    }
}

/// The state after the segment whose numbers stand in `scratch`.
#[inline(always)]
fn after(r: At<'_, FlowRecord>, scratch: At<'_, Scratch>, old: u32, segment: Segment) -> u32 {
    let reply = segment.is_reply();
    let (own, other) = if reply {
        (field!(r, FlowRecord, ack_reply), field!(r, FlowRecord, ack_forward))
    } else {
        (field!(r, FlowRecord, ack_forward), field!(r, FlowRecord, ack_reply))
    };
    let (seq, ack) =
        (field!(scratch, Scratch, seq).get().host(), field!(scratch, Scratch, ack).get().host());
    let (acks, rst) = (segment.has(TCP_ACK), segment.has(TCP_RST));
    let opens = segment.has(TCP_SYN) && !acks && !rst;
    if !reply && opens && old & flow_state::CONFIRMED == 0 {
        // Sent again, or another attempt with other numbers.
        if other.get() == seq {
            return old;
        }
        other.set(seq);
        return old & !flow_state::REPLIED;
    }
    let first = reply && old & flow_state::REPLIED == 0;
    // Of a connection that the backend has not replied to, only the client's numbers are known.
    let known = reply || old & flow_state::REPLIED != 0;
    let moved = ack.wrapping_sub(own.get());
    let ahead = if first { 0 } else { seq.wrapping_sub(other.get()) };
    let answers = acks && known && moved < NEAR;
    let fits = !first && ahead < NEAR || answers && ahead < FAR;
    let mut new = old;
    if first && (fits || !rst) {
        other.set(seq);
        new |= flow_state::REPLIED;
    }
    if rst {
        return if fits { new | flow_state::RESET } else { new };
    }
    // Somebody who has not seen the reply may not come nearer to its number by trying.
    let trusted = reply || old & flow_state::CONFIRMED != 0;
    if acks && trusted && moved.wrapping_sub(STEP) < FAR && ahead < FAR {
        own.set(ack);
    }
    if fits && acks && !segment.has(TCP_SYN) {
        new &= !flow_state::RESET;
    }
    if fits && segment.has(TCP_FIN) {
        new |= if reply { flow_state::FIN_REPLY } else { flow_state::FIN_FORWARD };
    }
    if !reply && answers && !segment.has(TCP_SYN) {
        new |= flow_state::CONFIRMED;
    }
    new
}

/// Whether a request acknowledges the reply, which only somebody who got it can.
#[inline(always)]
pub fn acknowledges_reply(
    r: At<'_, FlowRecord>,
    scratch: At<'_, Scratch>,
    state: u32,
    flags: u8,
) -> bool {
    let ack = field!(scratch, Scratch, ack).get().host();
    flags & (TCP_ACK | TCP_SYN | TCP_RST) == TCP_ACK
        && state & flow_state::REPLIED != 0
        && ack.wrapping_sub(field!(r, FlowRecord, ack_forward).get()) < NEAR
}

/// Whether a request is a plain SYN, which may begin a connection.
#[inline(always)]
pub fn is_syn(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}
