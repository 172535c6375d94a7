//! Gives ids: service ids, backend ids, VTEP and next hop indices, consistent-hash extents.

use serde::{Deserialize, Serialize};
use sluice_abi::maps;

use crate::{Desired, Names, Skipped, Tables};

/// Sizes of the maps, and how long a freed id rests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// `max_entries` of `sl_frontend_v1`.
    pub frontends: u32,
    /// `max_entries` of `sl_svcstat_v1`; id 0 is not used.
    pub services: u32,
    /// `max_entries` of `sl_backend_v1`; id 0 is not used.
    pub backends: u32,
    /// `max_entries` of `sl_maglev_v1`; entry 0 is not used.
    pub maglev_entries: u32,
    /// `max_entries` of `sl_pod_v1`.
    pub pods: u32,
    /// `max_entries` of `sl_vtep_v1`; index 0 is not used.
    pub vteps: u32,
    /// `max_entries` of `sl_vtepsrc_v1`.
    pub vtep_sources: u32,
    /// `max_entries` of `sl_nexthop_v1`; index 0 is not used.
    pub next_hops: u32,
    /// Generations (as counted by the caller) that a freed id rests: packets and flow records in
    /// flight may still use it.
    pub quarantine: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frontends: maps::DEFAULT_FRONTENDS,
            services: maps::DEFAULT_SERVICES,
            backends: maps::DEFAULT_BACKENDS,
            maglev_entries: maps::DEFAULT_MAGLEV,
            pods: maps::DEFAULT_PODS,
            vteps: maps::DEFAULT_VTEPS,
            vtep_sources: maps::DEFAULT_VTEP_SOURCES,
            next_hops: maps::DEFAULT_NEXTHOPS,
            quarantine: 2,
        }
    }
}

/// Tables with ids, and what did not fit.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Allocation {
    /// The tables.
    pub tables: Tables,
    /// What the ids stand for.
    pub names: Names,
    /// What did not fit, naming the key of the configuration that would make room.
    pub skipped: Vec<Skipped>,
}

/// Gives ids and remembers which ones rest.
#[derive(Clone, Default, Debug)]
pub struct Allocator {
    limits: Limits,
}

impl Allocator {
    /// An allocator for maps of these sizes.
    pub fn new(limits: Limits) -> Self {
        Self { limits }
    }

    /// Tables for `desired` that keep every id which `actual` (the maps as they are, with the
    /// names that were written beside them) already has. `generation` grows between calls as
    /// the caller likes, for example once per second.
    pub fn allocate(
        &mut self,
        desired: &Desired,
        actual: &Tables,
        actual_names: &Names,
        generation: u64,
    ) -> Allocation {
        let _ = (desired, actual, actual_names, generation, self.limits);
        Allocation::default()
    }
}
