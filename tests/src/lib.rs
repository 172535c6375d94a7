//! What the suites across crates share: one world of tables, packets built apart from the datapath,
//! and the packet logic run on the host and in the kernel.
//!
//! ```text
//!   World (tables) ──┬─► Host   (the datapath compiled for this machine)  ─┐
//!   Packet (bytes) ──┤                                                     ├─► same verdict, same
//!                    └─► Kernel (the loaded object, BPF_PROG_TEST_RUN)    ─┘   bytes, same tables
//! ```
//!
//! Nothing here is part of the product. Failures panic: the callers are tests.

pub mod captures;
pub mod elf;
pub mod fixtures;
pub mod host;
pub mod judge;
pub mod kernel;
pub mod netns;
pub mod packet;
pub mod random;
pub mod sequence;
pub mod shared_data;
pub mod story;
pub mod wire;
pub mod world;
