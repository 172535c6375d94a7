//! The packet logic of Sluice: the same source runs in the kernel and on a laptop.
//!
//! ```text
//!  frame ─► parse ─► outer VXLAN? ─► source check, parse once more ─► flow known? ─ yes ─► replay ─► account
//!                                                                       └─ no ─► decide, insert ─┘
//! ```
//!
//! - [`parse`] reads bytes and knows no table.
//! - [`decide`] reads tables and writes nothing but the flow table.
//! - [`replay`] alone writes packet bytes, and only when the verdict is final, so that a packet
//!   that passes is untouched.
//! - [`account`] alone touches counters: once per packet.
//!
//! Tables and frames are known only through [`env::Env`] and [`access::Frame`]. Unsafe code is in
//! [`access`] and forbidden everywhere else. No function panics, allocates, recurses or calls
//! through a pointer; all of it is inlined into the program that uses it.

#![no_std]
// The compare-and-exchange of the access module is an instruction that the compiler has no name for.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "the one access module; its contract is its module doc")]
pub mod access;
pub mod account;
pub mod answer;
pub mod csum;
pub mod decide;
pub mod encap;
pub mod env;
pub mod flood;
pub mod flow;
pub mod fragment;
pub mod hash;
pub mod icmp;
pub mod ingress;
pub mod limit;
pub mod near;
pub mod parse;
pub mod replay;
pub mod tc;
pub mod tcp;
pub mod verdict;
pub mod wire;
