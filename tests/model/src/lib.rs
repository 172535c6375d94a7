//! The reference model: what a node may do with a packet, in plain code.
//!
//! It is written from the RFCs and from the rules of Kubernetes, not from the datapath, which it
//! may not depend on: of Sluice's crates it knows the tables' layouts and the names of the reasons.
//! Packets are owned and taken apart into layers, tables are maps, connections are a list. Nothing
//! here is fast.
//!
//! ```text
//!  Tables ─┐
//!  State  ─┼─► lawful ─► [ Outcome { action, reason, frame, account } + State afterwards ]
//!  packet ─┘     ▲
//!                └── what came out: only the numbers that the datapath is free to choose are read
//!                    from it (SNAT port, outer UDP source port), and held against what is lawful
//! ```
//!
//! Where the datapath may choose among several backends there are several lawful outcomes. [`Model`]
//! goes on with all states that agree with what was seen so far; when none is left, what was seen
//! was not lawful.

#![forbid(unsafe_code)]

mod answer;
mod checksum;
mod decide;
mod fragment;
mod icmp;
mod model;
mod packet;
mod road;
mod state;
mod tables;
mod tc;
mod tcp;
mod xdp;

pub use model::{Disagreement, Model, Seen};
pub use packet::{Ethernet, Header, Packet, Transport};
pub use road::{Account, Action, Direction, Outcome, Stop};
pub use state::{Connection, Exit, State, Tuple};
pub use tables::Tables;
pub use tcp::Progress;
