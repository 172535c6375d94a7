//! Sequences of packets for the reference model: worlds and packets are drawn, sent one after the
//! other, and held against `sluice-model`.
//!
//! ```text
//!  proptest ─► Case { Plan, [Move] } ─► World, frames made one by one (a reply is made from what
//!                                          came out)                         │
//!                         ┌──────────────────────────────────────────────────┤
//!                         ▼                                                  ▼
//!                    Host, Model: lawful?                       Twin (the loaded program): the same?
//! ```
//!
//! Nothing here knows the kernel: `scripts/seed-bugs` compiles these modules against a datapath with
//! bugs.

mod drive;
mod hunt;
mod moves;
mod plan;

pub use drive::{Failure, Report, Step, Twin, drive, replay, tables};
pub use hunt::{Hunt, Prey, hunt};
pub use moves::{Case, Move, case};
pub use plan::Plan;
