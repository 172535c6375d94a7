//! The hashes: which flow set, which backend, which SNAT slot.
//!
//! Multiply and fold with secret seeds: a few nanoseconds inline, where a helper or a byte-wise
//! hash would cost more than the lookup. An attacker who does not know the seed cannot choose
//! clients that share a set; one who controls a single client can fill only that client's set.

use crate::flow::Tuple;
use sluice_abi::{Addr, Be16, Family, flow_tag};

const K1: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / golden ratio, odd
const K2: u64 = 0xd6e8_feb8_6659_fd93; // from the rrmxmx mixer, odd
const K3: u64 = 0xa076_1d64_78bd_642f; // from wyhash, odd

#[inline(always)]
fn mix(h: u64, word: u64, k: u64) -> u64 {
    let x = (h ^ word).wrapping_mul(k);
    x ^ (x >> 32)
}

/// Bits of a client port that choose its set. The top two are left out: a port with other top bits
/// meets the same set, which is how the second connection of a client port to one backend (through
/// another VIP) gets a source port of its own and is still found from both directions.
pub const CLIENT_PORT_SET_BITS: u16 = 0x3fff;

/// Set index and tag of a connection's client side.
#[derive(Clone, Copy)]
pub struct FlowHash(u64);

impl FlowHash {
    /// From the client's address and port, whichever direction the packet has.
    #[inline(always)]
    pub fn new(seed: u64, client: Addr, port: Be16, proto: u8) -> Self {
        let w = client.words64();
        let h = mix(seed, w[0], K1);
        let h = mix(h, w[1], K2);
        let port = (port.host() & CLIENT_PORT_SET_BITS) as u64;
        Self(mix(h, port << 8 | proto as u64, K3))
    }

    /// The set, before the table's mask.
    #[inline(always)]
    pub fn set(self) -> u32 {
        self.0 as u32
    }

    /// The tag of a place in use, its generation left out ([`flow_tag`]).
    #[inline(always)]
    pub fn tag(self) -> u32 {
        (self.0 >> 32) as u32 & !flow_tag::GENERATION | flow_tag::USED
    }

    /// The place in the flood guard, before its mask.
    #[inline(always)]
    pub fn flood(self) -> u32 {
        (self.0 >> 16) as u32
    }

    /// The way that is tried first.
    #[inline(always)]
    pub fn home(self) -> u32 {
        (self.0 >> 28) as u32 & 0xf
    }

    /// Outer UDP source port: 49152 to 65535 (RFC 7348 section 5).
    #[inline(always)]
    pub fn outer_port(self) -> Be16 {
        Be16::new(0xc000 | (self.0 >> 40) as u16 & 0x3fff)
    }
}

/// Of what the fragments of one packet have in common.
#[inline(always)]
pub fn fragment(seed: u64, src: Addr, dst: Addr, id: u32, proto: u8, hook: u8) -> u64 {
    let (s, d) = (src.words64(), dst.words64());
    let h = mix(seed, s[0], K1);
    let h = mix(h, s[1], K2);
    let h = mix(h, d[0], K3);
    let h = mix(h, d[1], K1);
    mix(h, (id as u64) << 16 | (proto as u64) << 8 | hook as u64, K2)
}

/// Ties two more words to a hash; not zero.
#[inline(always)]
pub fn seal(hash: u64, a: u64, b: u64) -> u64 {
    mix(mix(hash, a, K3), b, K1) | 1
}

/// Chooses the backend: the same on every node of a cluster for the same five-tuple.
#[inline(always)]
pub fn backend_choice(seed: u64, tuple: &Tuple) -> u32 {
    let (c, v) = (tuple.src.words64(), tuple.dst.words64());
    let h = mix(seed, c[0], K1);
    let h = mix(h, c[1], K2);
    let h = mix(h, v[0], K3);
    let h = mix(h, v[1], K1);
    let ports = (tuple.src_port.host() as u64) << 24 | (tuple.dst_port.host() as u64) << 8;
    (mix(h, ports | tuple.proto as u64, K2) >> 16) as u32
}

/// Maps a 32-bit hash to `0..size` without a division (Lemire, "Fast random integer generation").
#[inline(always)]
pub fn scale(hash: u32, size: u32) -> u32 {
    ((hash as u64 * size as u64) >> 32) as u32
}

/// Which token bucket pays for answers to `source`: one for each IPv4 address, one for each IPv6
/// network of 64 bits, of which a single host may have every address.
#[inline(always)]
pub fn answer_bucket(seed: u64, source: Addr) -> u32 {
    let w = source.words64();
    let low = if source.family() == Family::V4 { w[1] } else { 0 };
    (mix(mix(seed, w[0], K3), low, K2) >> 16) as u32
}

/// Which of the slots of a SNAT port a backend uses.
#[inline(always)]
pub fn snat_group(backend: Addr, port: Be16, proto: u8) -> u32 {
    let w = backend.words64();
    let h = mix(w[0], w[1], K1);
    (mix(h, (port.host() as u64) << 8 | proto as u64, K2) >> 20) as u32
}
