//! Network namespaces, veth pairs and traffic: `sluice lab` for users, the harness for the suites.
//!
//! ```text
//!                        fabric (bridge br0, 192.0.2.0/24, 2001:db8::/64)
//!           ┌───────────────────┬──────────────────┬─────────────────────┐
//!        to-client           to-node1           to-node2              to-node3
//!           │                   │                  │                     │
//!      client eth0        node1 uplink0       node2 uplink0         node3 uplink0
//!      .100, ::100        .1, ::1  vxlan1     .2, ::2  vxlan1       ...
//!                          │    │
//!                        pod1  pod2           each pod: eth0, 10.244.<node>.<10+k>/32
//! ```
//!
//! Every box is a named network namespace `slab-<lab>-<host>`, as `ip netns` makes them. A node's
//! `vxlan1` is the kernel's own device, set up as Flannel does it: permanent neighbours, FDB
//! entries and onlink routes for each peer, learning off. On one node (or more) `sluice run` may
//! work beside it; a node without an agent is a peer that runs no code of ours.
//!
//! What may not be here: packet logic, map layouts, anything of the runtime crate. The lab starts
//! the `sluice` executable and reads its JSON, as a user does, so that a test of the lab is a test
//! of what ships.
//!
//! Rules that the modules keep:
//! - No process-wide state is changed. A namespace is entered by a thread made for it.
//! - A thing is written to the state file before it is made, so that a crash between any two steps
//!   leaves nothing that [`clean`] does not find.
//! - A process is ended by its id *and* start time, so that a reused id is never hit.

#![forbid(unsafe_code)]

pub mod agent;
pub mod cli;
mod context;
pub mod demo;
mod error;
pub mod interrupt;
mod ip;
mod lab;
pub mod netns;
pub mod pass;
pub mod plan;
pub mod preflight;
pub mod probe;
pub mod process;
mod progress;
pub mod serve;
pub mod shop;
mod spec;
mod state;
mod topology;
pub mod traffic;

pub use context::LabContext;
pub use error::LabError;
pub use lab::{Host, Lab, clean, clean_stale, labs};
pub use netns::Netns;
pub use spec::{Agent, Family, LabName, LabSpec, Mode, NodeSpec, PodSpec, RpFilter};
pub use state::{LabState, LabSummary};
