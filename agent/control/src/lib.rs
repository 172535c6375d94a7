//! From Kubernetes objects to tables: pure, no I/O.
//!
//! ```text
//!  YAML text │ API objects ─► ingest ─► model::Snapshot ─┐
//!  netlink facts, config ─────► model::NodeContext ──────┴► compile ─► Desired (no ids)
//!                                                              │           │
//!                                                   Skipped ◄──┘   allocate (ids, extents)
//!                                                                          │
//!               MapStore ◄─ apply ─ [MapOp] ◄─ delta(actual, tables) ◄─ Tables ─► dump, names
//! ```
//!
//! The crate opens no file and no socket, reads no clock and no environment, spawns nothing and
//! knows neither aya nor a Kubernetes client. Every function of it is total: a bad object becomes a
//! [`Skipped`] and disturbs nothing else. Same input, same output.

#![forbid(unsafe_code)]

pub mod allocate;
pub mod compile;
pub mod delta;
pub mod dump;
pub mod endpoints;
pub mod fake;
pub mod guard;
pub mod ingest;
pub mod maglev;
pub mod model;
pub mod names;
pub mod skipped;
pub mod tables;

pub use allocate::{Allocation, Allocator, Limits};
pub use compile::{Compiled, Desired, compile, wanted_next_hops};
pub use delta::{Delta, MapOp, MapStore, delta};
pub use guard::{Held, MassRemoval, mass_removal};
pub use ingest::{Ingested, Origin, ingest};
pub use model::{NodeContext, Snapshot};
pub use names::Names;
pub use skipped::{Level, Skipped};
pub use tables::Tables;
