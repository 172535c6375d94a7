//! What Sluice does through libbpf, because aya cannot: the only crate that links it.
//!
//! * [`clsact`]: classifiers on the clsact qdisc, for kernels without TCX (before 6.6). TCX itself is
//!   aya's and lives in the runtime.
//! * [`rung`]: the offload rung of the attach ladder. This version carries no program for a NIC's
//!   processor, so the rung's only answer is why it is not available.
//!
//! No program is compiled or opened here: callers hand in the descriptor of a loaded program.

#![forbid(unsafe_code)]

pub mod clsact;
pub mod rung;
