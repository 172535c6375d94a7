//! The tables as the maps hold them: typed, ordered, with ids. Desired and actual have one type.

use sluice_abi::{
    Addr, Backend, Extent, Frontend, FrontendKey, NextHop, Pod, Route, Tunnel, Vtep, VtepKey,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::delta::MapOp;

/// Contents of the maps that the agent writes. Arrays hold used entries only.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Tables {
    /// `sl_frontend_v1`.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Extents of `sl_maglev_v1` by offset; those that a frontend refers to.
    pub extents: BTreeMap<u32, Arc<[u32]>>,
    /// `sl_backend_v1` by backend id.
    pub backends: BTreeMap<u32, Backend>,
    /// `sl_pod_v1`.
    pub pods: BTreeMap<Addr, Pod>,
    /// `sl_vtep_v1` by index.
    pub vteps: BTreeMap<u32, Vtep>,
    /// `sl_vtepsrc_v1`.
    pub vtep_sources: BTreeMap<VtepKey, u32>,
    /// `sl_tunnel_v1` by index.
    pub tunnels: BTreeMap<u32, Tunnel>,
    /// `sl_nexthop_v1` by index.
    pub next_hops: BTreeMap<u32, NextHop>,
}

impl Tables {
    /// Extents that the frontends refer to, without empty ones: what a loader has to read from
    /// `sl_maglev_v1` after it has read `sl_frontend_v1`.
    pub fn referenced_extents(&self) -> BTreeSet<(u32, u32)> {
        self.frontends
            .values()
            .flat_map(|f| [f.external, f.internal])
            .filter(|e| e.size != 0)
            .map(|e| (e.offset, e.size))
            .collect()
    }

    /// Does to the tables what `op` does to the maps.
    pub fn apply(&mut self, op: &MapOp) {
        fn put<K: Ord + Copy, V: Copy>(map: &mut BTreeMap<K, V>, key: &K, value: &Option<V>) {
            match value {
                Some(value) => map.insert(*key, *value),
                None => map.remove(key),
            };
        }
        match op {
            MapOp::NextHop { index, value } => put(&mut self.next_hops, index, value),
            MapOp::Tunnel { index, value } => put(&mut self.tunnels, index, value),
            MapOp::Vtep { index, value } => put(&mut self.vteps, index, value),
            MapOp::VtepSource { key, value } => put(&mut self.vtep_sources, key, value),
            MapOp::Pod { key, value } => put(&mut self.pods, key, value),
            MapOp::Backend { id, value } => put(&mut self.backends, id, value),
            MapOp::Frontend { key, value } => put(&mut self.frontends, key, value),
            MapOp::WriteExtent { offset, entries } => {
                self.extents.insert(*offset, entries.clone());
            }
            MapOp::ResetServiceCounter { .. } | MapOp::ResetBackendCounter { .. } => {}
        }
    }

    /// The entries of an extent, if the tables hold them.
    pub fn entries(&self, extent: Extent) -> Option<&Arc<[u32]>> {
        self.extents.get(&extent.offset).filter(|entries| entries.len() == extent.size as usize)
    }

    /// Whether some Service has the address of `key`.
    fn has_service(&self, key: &FrontendKey) -> bool {
        let from = FrontendKey { addr: key.addr, ..FrontendKey::default() };
        let here = self.frontends.range(from..).take_while(|(other, _)| other.addr == key.addr);
        here.into_iter().any(|(other, _)| !other.is_address())
    }

    /// Every reference that leads nowhere, as text. Empty in a correct datapath, at every moment.
    pub fn dangling(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (key, frontend) in &self.frontends {
            for extent in [frontend.external, frontend.internal] {
                if extent.size == 0 {
                    continue;
                }
                let Some(entries) = self.entries(extent) else {
                    found.push(format!("frontend {key:?}: extent {extent:?} is not written"));
                    continue;
                };
                let ids: BTreeSet<u32> = entries.iter().copied().collect();
                for id in ids {
                    if id == 0 || !self.backends.contains_key(&id) {
                        found.push(format!("frontend {key:?}: backend {id} is missing"));
                    }
                }
            }
            if key.is_address() {
                if !self.has_service(key) || *frontend != Frontend::ADDRESS {
                    found.push(format!("frontend {key:?}: no Service has the address"));
                }
            } else if frontend.service == 0 {
                found.push(format!("frontend {key:?}: no service id"));
            }
        }
        for (id, backend) in &self.backends {
            let missing = match backend.route {
                r if r == Route::Local as u16 => false,
                r if r == Route::Tunnel as u16 => !self.vteps.contains_key(&backend.index),
                r if r == Route::Plain as u16 => !self.next_hops.contains_key(&backend.index),
                _ => true,
            };
            if missing {
                found.push(format!("backend {id}: route {backend:?} leads nowhere"));
            }
        }
        for (index, vtep) in &self.vteps {
            if !self.next_hops.contains_key(&vtep.nexthop) {
                found.push(format!("vtep {index}: next hop {} is missing", vtep.nexthop));
            }
            if !self.tunnels.contains_key(&vtep.tunnel) {
                found.push(format!("vtep {index}: tunnel {} is missing", vtep.tunnel));
            }
        }
        for (key, index) in &self.vtep_sources {
            if !self.vteps.contains_key(index) {
                found.push(format!("vtep source {key:?}: vtep {index} is missing"));
            }
        }
        found
    }
}
