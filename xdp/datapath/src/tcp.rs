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
use crate::field;
use crate::wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use sluice_abi::{FlowRecord, Scratch, flow_state};

/// How far acknowledgements move before they are written down, in bytes. A connection at full speed
/// writes once for eleven full segments.
pub const STEP: u32 = 1 << 14;
/// How far beyond the remembered acknowledgement a segment alone is believed: a window that every
/// receiver opens, without window scaling (RFC 9293 section 3.1), and the step.
pub const NEAR: u32 = (1 << 16) + STEP;
/// How far a segment is believed whose own acknowledgement is believed too: more than any receiver's
/// buffer (RFC 7323 section 2.2 allows a gigabyte, Linux takes six megabytes by default).
pub const FAR: u32 = 1 << 24;

/// Bits of the state between which nothing is noted but acknowledgements.
const BOTH: u32 = flow_state::REPLIED | flow_state::CONFIRMED;

/// The state after the segment whose numbers stand in `scratch`.
#[inline(always)]
pub fn after(
    r: At<'_, FlowRecord>,
    scratch: At<'_, Scratch>,
    old: u32,
    flags: u8,
    reply: bool,
) -> u32 {
    let (own, other) = if reply {
        (field!(r, FlowRecord, ack_reply), field!(r, FlowRecord, ack_forward))
    } else {
        (field!(r, FlowRecord, ack_forward), field!(r, FlowRecord, ack_reply))
    };
    let ack = field!(scratch, Scratch, ack).get().host();
    let moved = ack.wrapping_sub(own.get());
    if moved < STEP
        && flags & (TCP_SYN | TCP_FIN | TCP_RST) == 0
        && old & (BOTH | flow_state::RESET) == BOTH
    {
        return old;
    }
    let seq = field!(scratch, Scratch, seq).get().host();
    let acks = flags & TCP_ACK != 0;
    let opens = flags & TCP_SYN != 0 && flags & (TCP_ACK | TCP_RST) == 0;
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
    let ahead = if first { 0 } else { seq.wrapping_sub(other.get()) };
    let answers = acks && known && moved < NEAR;
    let fits = !first && ahead < NEAR || answers && ahead < FAR;
    let mut new = old;
    if first && (fits || flags & TCP_RST == 0) {
        other.set(seq);
        new |= flow_state::REPLIED;
    }
    if flags & TCP_RST != 0 {
        return if fits { new | flow_state::RESET } else { new };
    }
    // Somebody who has not seen the reply may not come nearer to its number by trying.
    let trusted = reply || old & flow_state::CONFIRMED != 0;
    if acks && trusted && moved.wrapping_sub(STEP) < FAR && ahead < FAR {
        own.set(ack);
    }
    if fits && acks && flags & TCP_SYN == 0 {
        new &= !flow_state::RESET;
    }
    if fits && flags & TCP_FIN != 0 {
        new |= if reply { flow_state::FIN_REPLY } else { flow_state::FIN_FORWARD };
    }
    if !reply && answers && flags & TCP_SYN == 0 {
        new |= flow_state::CONFIRMED;
    }
    new
}

/// Whether a request is a plain SYN, which may begin a connection.
#[inline(always)]
pub fn is_syn(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}
