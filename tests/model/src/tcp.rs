//! What a TCP segment tells somebody between the two ends.
//!
//! Anybody can send a segment with the right addresses and ports (A45); who also knows where the
//! other end waits for the next byte has seen the connection. So an end of a connection is believed
//! only in the window that the other side has opened (RFC 9293 section 3.10.7.4, RFC 5961 section
//! 3.2), as far as that is known from its acknowledgements.

use crate::packet::{Transport, tcp};
use crate::road::Direction;

/// How much of what is acknowledged may go unnoticed.
const UNNOTICED: u32 = 32 << 10;
/// A window that every receiver opens, and what may have gone unnoticed.
const WINDOW: u32 = (64 << 10) + UNNOTICED;
/// More than any receiver's window: for a segment whose acknowledgement is right too.
const WIDE_WINDOW: u32 = 16 << 20;

/// How far a connection has got.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Progress {
    /// The backend has answered.
    pub replied: bool,
    /// Both sides have shown that they are real: the client has acknowledged the reply (the answer
    /// to a forged SYN goes to somebody who did not ask); over UDP the service has replied.
    pub confirmed: bool,
    /// The client has sent FIN.
    pub fin_forward: bool,
    /// The backend has sent FIN.
    pub fin_reply: bool,
    /// Either side has sent RST, and neither has gone on.
    pub reset: bool,
    /// What the client has acknowledged of the backend's bytes; at first the backend's number.
    pub client_acked: u32,
    /// What the backend has acknowledged of the client's bytes; at first the client's number.
    pub backend_acked: u32,
}

impl Progress {
    /// Of a connection that begins with this packet.
    pub fn new(first: &Transport) -> Self {
        Self { backend_acked: first.seq, ..Self::default() }
    }

    /// A packet has gone its way.
    pub fn advance(&mut self, direction: Direction, packet: &Transport) {
        if packet.proto == sluice_abi::IPPROTO_UDP {
            let reply = direction == Direction::Reply;
            self.replied |= reply;
            // Who goes on after a reply, or replies, is real.
            self.confirmed |= self.replied;
            return;
        }
        match direction {
            Direction::Forward => self.client_sends(packet),
            Direction::Reply => self.backend_sends(packet),
        }
    }

    fn client_sends(&mut self, segment: &Transport) {
        let asks = segment.flags & tcp::SYN != 0 && segment.flags & (tcp::ACK | tcp::RST) == 0;
        if asks && !self.confirmed {
            // Sent again, or another attempt with another number, which nobody has answered yet.
            self.replied &= segment.seq == self.backend_acked;
            self.backend_acked = segment.seq;
            return;
        }
        // Before the backend has replied nobody can know what there is to acknowledge.
        let acknowledges = self.replied && acknowledges(segment, self.client_acked);
        let fits = fits(segment, self.backend_acked, acknowledges);
        if segment.flags & tcp::RST != 0 {
            self.reset |= fits;
            return;
        }
        // Who has not seen the reply may not come nearer to its number by trying.
        if self.confirmed {
            note(segment, &mut self.client_acked, self.backend_acked);
        }
        self.goes_on(segment, fits);
        self.fin_forward |= fits && segment.flags & tcp::FIN != 0;
        self.confirmed |= acknowledges && segment.flags & tcp::SYN == 0;
    }

    fn backend_sends(&mut self, segment: &Transport) {
        let acknowledges = acknowledges(segment, self.backend_acked);
        if !self.replied {
            // Its first number is as good as any, but who refuses must have seen the request.
            if segment.flags & tcp::RST != 0 && !acknowledges {
                return;
            }
            self.replied = true;
            self.client_acked = segment.seq;
            if acknowledges {
                self.backend_says(segment, true);
            } else {
                note(segment, &mut self.backend_acked, segment.seq);
            }
            return;
        }
        let fits = fits(segment, self.client_acked, acknowledges);
        self.backend_says(segment, fits);
    }

    fn backend_says(&mut self, segment: &Transport, fits: bool) {
        if segment.flags & tcp::RST != 0 {
            self.reset |= fits;
            return;
        }
        note(segment, &mut self.backend_acked, self.client_acked);
        self.goes_on(segment, fits);
        self.fin_reply |= fits && segment.flags & tcp::FIN != 0;
    }

    /// Who goes on has not believed a reset.
    fn goes_on(&mut self, segment: &Transport, fits: bool) {
        if fits && segment.flags & tcp::ACK != 0 && segment.flags & tcp::SYN == 0 {
            self.reset = false;
        }
    }

    /// Whether both sides, or one for both, have ended the connection.
    pub fn is_over(&self) -> bool {
        self.reset || self.fin_forward && self.fin_reply
    }

    /// Whether the two sides talk, and neither has said that it will not go on.
    pub fn is_agreed(&self) -> bool {
        self.confirmed && !self.fin_forward && !self.fin_reply
    }
}

/// Whether a segment begins a connection: SYN alone.
pub fn is_attempt(flags: u8) -> bool {
    flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
}

/// How far a number is beyond another (RFC 9293 section 3.4: modulo 2^32).
fn beyond(number: u32, start: u32) -> u32 {
    number.wrapping_sub(start)
}

/// Whether a segment acknowledges what the other side may have sent since it last did.
fn acknowledges(segment: &Transport, acked: u32) -> bool {
    segment.flags & tcp::ACK != 0 && beyond(segment.ack, acked) < WINDOW
}

/// Whether a segment is where the other side waits for one.
fn fits(segment: &Transport, expected: u32, acknowledges: bool) -> bool {
    let ahead = beyond(segment.seq, expected);
    ahead < WINDOW || acknowledges && ahead < WIDE_WINDOW
}

/// Notes what a segment acknowledges, if it is in sight of both numbers.
fn note(segment: &Transport, acked: &mut u32, expected: u32) {
    let moved = beyond(segment.ack, *acked);
    let credible = (UNNOTICED..UNNOTICED + WIDE_WINDOW).contains(&moved);
    let in_sight = beyond(segment.seq, expected) < WIDE_WINDOW;
    if segment.flags & tcp::ACK != 0 && credible && in_sight {
        *acked = segment.ack;
    }
}
