//! The runtime of Sluice: everything that does I/O, and no decision that a unit test would want.
//!
//! ```text
//!  source ─┐                       ┌─► maps  (aya)      ─► programs
//!          ├─► state ─► control ───┤
//!  facts ──┘   (task)   (pure)     └─► attach (XDP, TC) ─► interfaces
//! ```

pub mod config;
pub mod describe;
pub mod maps;
