//! `sluice-control`'s map store in the kernel.

use std::sync::Arc;

use sluice_control::{MapOp, MapStore, Tables};

use crate::maps::{ArrayTable, Counters, HashTable, MaglevTable, MapsError, Pins};
use sluice_abi::{Addr, Backend, Frontend, FrontendKey, NextHop, Pod, Tunnel, Vtep, VtepKey, maps};

/// The maps that the agent writes.
pub struct KernelStore {
    frontends: HashTable<FrontendKey, Frontend>,
    maglev: MaglevTable,
    backends: ArrayTable<Backend>,
    pods: HashTable<Addr, Pod>,
    vteps: ArrayTable<Vtep>,
    vtep_sources: HashTable<VtepKey, u32>,
    lookups: ArrayTable<u32>,
    tunnels: ArrayTable<Tunnel>,
    nexthops: ArrayTable<NextHop>,
    counters: Counters,
}

/// What can go wrong with a map.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A map cannot be read or written.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// A consistent-hash table does not fit where it should go.
    #[error(
        "map {}: {size} entries do not fit at {offset}; raise maps.maglev in the config",
        maps::MAGLEV
    )]
    ExtentOutside {
        /// First entry.
        offset: u32,
        /// Number of entries.
        size: usize,
    },
}

impl KernelStore {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub fn open(pins: &Pins) -> Result<Self, MapsError> {
        let mut store = Self {
            frontends: pins.frontends()?,
            maglev: pins.maglev()?,
            backends: pins.backends()?,
            pods: pins.pods()?,
            vteps: pins.vteps()?,
            vtep_sources: pins.vtep_sources()?,
            lookups: pins.lookups()?,
            tunnels: pins.tunnels()?,
            nexthops: pins.nexthops()?,
            counters: pins.counters()?,
        };
        // An agent before this one may have died between a change and its announcement.
        store.forget_lookups()?;
        Ok(store)
    }

    /// Tells the programs that what they remember of pods and tunnel ends may be wrong.
    fn forget_lookups(&mut self) -> Result<(), MapsError> {
        let next = self.lookups.read(0)?.wrapping_add(1).max(1);
        self.lookups.write(0, next)
    }
}

impl MapStore for KernelStore {
    type Error = StoreError;

    fn load(&mut self) -> Result<Tables, StoreError> {
        let mut tables = Tables {
            frontends: self.frontends.entries()?.into_iter().collect(),
            backends: self.backends.used()?.into_iter().collect(),
            pods: self.pods.entries()?.into_iter().collect(),
            vteps: self.vteps.used()?.into_iter().filter(|(_, v)| !v.remote.is_none()).collect(),
            vtep_sources: self.vtep_sources.entries()?.into_iter().collect(),
            tunnels: self.tunnels.used()?.into_iter().collect(),
            next_hops: self.nexthops.used()?.into_iter().collect(),
            ..Tables::default()
        };
        for (offset, size) in tables.referenced_extents() {
            let entries: Arc<[u32]> = self.maglev.read(offset, size).into();
            tables.extents.insert(offset, entries);
        }
        Ok(tables)
    }

    fn apply(&mut self, op: &MapOp) -> Result<(), StoreError> {
        match op {
            MapOp::NextHop { index, value } => {
                self.nexthops.write(*index, value.unwrap_or_default())?;
            }
            MapOp::Tunnel { index, value } => {
                self.tunnels.write(*index, value.unwrap_or_default())?;
            }
            MapOp::Vtep { index, value } => {
                self.vteps.write(*index, value.unwrap_or_default())?;
            }
            MapOp::VtepSource { key, value } => {
                match value {
                    Some(index) => self.vtep_sources.write(*key, *index)?,
                    None => self.vtep_sources.remove(*key)?,
                }
                self.forget_lookups()?;
            }
            MapOp::Pod { key, value } => {
                match value {
                    Some(pod) => self.pods.write(*key, *pod)?,
                    None => self.pods.remove(*key)?,
                }
                self.forget_lookups()?;
            }
            MapOp::ResetServiceCounter { id } => self.counters.clear_service(*id)?,
            MapOp::ResetBackendCounter { id } => self.counters.clear_backend(*id)?,
            MapOp::Backend { id, value } => {
                self.backends.write(*id, value.unwrap_or_default())?;
            }
            MapOp::WriteExtent { offset, entries } => {
                if !self.maglev.write(*offset, entries) {
                    return Err(StoreError::ExtentOutside { offset: *offset, size: entries.len() });
                }
            }
            MapOp::Frontend { key, value } => match value {
                Some(frontend) => self.frontends.write(*key, *frontend)?,
                None => self.frontends.remove(*key)?,
            },
        }
        Ok(())
    }
}
