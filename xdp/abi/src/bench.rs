//! What `sluice bench progrun` and its wrapper program share. No part of the product's datapath.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// ARRAY of one [`BenchRun`]. `sluice bench` writes it between samples, the wrapper reads it.
pub const BENCH_RUN: &str = "sl_bench_v1";
/// PROG_ARRAY: the programs that the wrapper can measure.
pub const BENCH_TARGETS: &str = "sl_benchtgt_v1";

/// Places in [`BENCH_TARGETS`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum BenchTarget {
    /// The program under test.
    Node = 0,
    /// Passes at once: with it the wrapper measures itself.
    Empty = 1,
    /// Cuts the outer headers off and passes: with it the wrapper measures itself and what moving
    /// the head there and back costs.
    Cut = 2,
}

/// Words of [`BenchRun::template`] that are written before every run.
pub const BENCH_WORDS: usize = 16;
/// Further words of the template, written if [`BenchRun::extended`] says so.
pub const BENCH_MORE_WORDS: usize = 4;

/// The value of [`BENCH_RUN`], 200 bytes: what the packet must be before each run.
///
/// Flows differ in two bytes of an address and in a port. The same bytes, inverted, stand once more
/// where the same checksums cover them, so that every flow's checksums are the template's: in the
/// IPv4 identification for the header, in four bytes of the segment for the transport checksum.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BenchRun {
    /// First bytes of the frame, as they lie in memory.
    pub template: [u64; BENCH_WORDS + BENCH_MORE_WORDS],
    /// Bytes of the whole frame: where the head is when the wrapper has restored it.
    pub len: u32,
    /// 1 if [`BENCH_MORE_WORDS`] are to be written too.
    pub extended: u32,
    /// Number of the next packet; the wrapper counts it up.
    pub next: u32,
    /// Number of flows minus one, of 2^n flows.
    pub flow_mask: u32,
    /// Offset of the address's two bytes that tell flows apart.
    pub address_at: u32,
    /// Offset of the port that tells flows apart.
    pub port_at: u32,
    /// Offset of the IPv4 identification; equal to `balance_at` where there is none.
    pub id_at: u32,
    /// Offset of four bytes of the segment that balance address and port.
    pub balance_at: u32,
    /// A [`BenchTarget`].
    pub target: u32,
    /// Zero.
    pub reserved: u32,
}

impl BenchRun {
    /// Address bytes and port of flow `flow`, host order: different for 2^30 flows.
    #[inline(always)]
    pub const fn flow(flow: u32) -> (u16, u16) {
        (flow as u16, 0x8000 | ((flow >> 16) ^ flow) as u16 & 0x3fff)
    }

    /// Flow of packet `number`: all flows in an order without neighbours.
    #[inline(always)]
    pub const fn flow_of(number: u32, mask: u32) -> u32 {
        number.wrapping_mul(0x9e37_79b1) & mask
    }
}

const _: () = assert!(size_of::<BenchRun>() == 200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flow_comes_once_before_any_comes_again_and_has_its_own_tuple() {
        let mut flows: [bool; 4096] = [false; 4096];
        for number in 7..7 + 4096 {
            let flow = BenchRun::flow_of(number, 4095);
            assert!(!core::mem::replace(&mut flows[flow as usize], true));
        }
        for flow in [0u32, 1, 0x1_0000, 0x2_0001, 0x3fff_ffff] {
            let (address, port) = BenchRun::flow(flow);
            let high = (port as u32 & 0x3fff) ^ (address as u32 & 0x3fff);
            assert_eq!(high << 16 | address as u32, flow);
        }
    }
}
