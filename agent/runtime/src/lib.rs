//! The runtime of Sluice: everything that does I/O, and no decision that a unit test would want.
//!
//! ```text
//!  source ─┐                       ┌─► maps  (aya)      ─► programs
//!          ├─► state ─► control ───┤
//!  facts ──┘   (task)   (pure)     └─► attach (XDP, TC) ─► interfaces
//! ```

pub mod agent;
pub mod attach;
pub mod bench;
pub mod cli;
pub mod config;
pub mod describe;
pub mod facts;
pub mod flood;
pub mod maps;
pub mod netlink;
pub mod run_dir;
pub mod settings;
pub mod snat;
pub mod source;
pub mod state;
pub mod store;
pub mod sweep;
