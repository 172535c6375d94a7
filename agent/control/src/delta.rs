//! Desired against actual: the operations, in an order in which no packet meets a dangling index.
//!
//! ```text
//!  next hops ► tunnels ► vteps ► vtep sources ► pods ► backends ► extents ► frontends    put
//!  next hops ◄ tunnels ◄ vteps ◄ vtep sources ◄ pods ◄ backends ◄─────────── frontends    delete
//! ```
//!
//! An address that is Services' alone is said to be so last and first not to be: a Service that comes
//! is never rejected. First everything is put, then everything is deleted. An extent that frontends use is never
//! rewritten unless the tables are full; a swap is the one hash update of the frontend.

use sluice_abi::{Addr, Backend, Frontend, FrontendKey, NextHop, Pod, Tunnel, Vtep, VtepKey};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::Tables;

/// One operation on one map. `value: None` deletes: removes a hash entry, or writes zeroes into an
/// array entry.
#[derive(Clone, PartialEq, Debug)]
pub enum MapOp {
    /// `sl_nexthop_v1`.
    NextHop {
        /// Array index.
        index: u32,
        /// New value, or `None`.
        value: Option<NextHop>,
    },
    /// `sl_tunnel_v1`.
    Tunnel {
        /// Array index.
        index: u32,
        /// New value, or `None`.
        value: Option<Tunnel>,
    },
    /// `sl_vtep_v1`.
    Vtep {
        /// Array index.
        index: u32,
        /// New value, or `None`.
        value: Option<Vtep>,
    },
    /// `sl_vtepsrc_v1`.
    VtepSource {
        /// Hash key.
        key: VtepKey,
        /// Index into `sl_vtep_v1`, or `None`.
        value: Option<u32>,
    },
    /// `sl_pod_v1`.
    Pod {
        /// Hash key.
        key: Addr,
        /// New value, or `None`.
        value: Option<Pod>,
    },
    /// `sl_svcstat_v1`, all CPUs: a service id was given to another Service.
    ResetServiceCounter {
        /// Service id.
        id: u32,
    },
    /// `sl_bestat_v1`, all CPUs: a backend id was given to another endpoint.
    ResetBackendCounter {
        /// Backend id.
        id: u32,
    },
    /// `sl_backend_v1`.
    Backend {
        /// Backend id, the array index.
        id: u32,
        /// New value, or `None`.
        value: Option<Backend>,
    },
    /// `sl_maglev_v1`: entries from `offset` on.
    WriteExtent {
        /// First array index.
        offset: u32,
        /// Backend ids.
        entries: Arc<[u32]>,
    },
    /// `sl_frontend_v1`.
    Frontend {
        /// Hash key.
        key: FrontendKey,
        /// New value, or `None`.
        value: Option<Frontend>,
    },
}

impl MapOp {
    /// Whether the operation takes something away.
    pub fn is_delete(&self) -> bool {
        matches!(
            self,
            MapOp::NextHop { value: None, .. }
                | MapOp::Tunnel { value: None, .. }
                | MapOp::Vtep { value: None, .. }
                | MapOp::VtepSource { value: None, .. }
                | MapOp::Pod { value: None, .. }
                | MapOp::Backend { value: None, .. }
                | MapOp::Frontend { value: None, .. }
        )
    }
}

/// Where tables live: kernel maps by aya, maps on a device by libbpf, or [`crate::fake`].
pub trait MapStore {
    /// What can go wrong; names the map and the call.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What the maps hold now. Never changes anything.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn load(&mut self) -> Result<Tables, Self::Error>;

    /// Does one operation. Doing it twice is the same as doing it once.
    ///
    /// # Errors
    /// When a map cannot be written; the caller loads again and computes a new delta.
    fn apply(&mut self, op: &MapOp) -> Result<(), Self::Error>;
}

/// How to get from actual to desired.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Delta {
    /// Operations, to be applied in this order.
    pub ops: Vec<MapOp>,
    /// An answer that flow records have copied changed (route, VTEP, next hop index, pod):
    /// `Settings::epoch` must be bumped after the operations.
    pub new_epoch: bool,
}

/// The operations that turn `actual` into `desired`. Their number is that of the changed entries.
pub fn delta(actual: &Tables, desired: &Tables) -> Delta {
    let next_hops = Changes::of(&actual.next_hops, &desired.next_hops);
    let tunnels = Changes::of(&actual.tunnels, &desired.tunnels);
    let vteps = Changes::of(&actual.vteps, &desired.vteps);
    let vtep_sources = Changes::of(&actual.vtep_sources, &desired.vtep_sources);
    let pods = Changes::of(&actual.pods, &desired.pods);
    let backends = Changes::of(&actual.backends, &desired.backends);
    let frontends = Changes::of(&actual.frontends, &desired.frontends);

    // A next hop's contents are looked up for each packet, so only its end matters to records.
    let new_epoch = !next_hops.deleted.is_empty()
        || tunnels.ends_something()
        || vteps.ends_something()
        || pods.ends_something()
        || !backends.changed.is_empty();

    let mut ops = Vec::new();
    ops.extend(next_hops.puts(|index, value| MapOp::NextHop { index, value }));
    ops.extend(tunnels.puts(|index, value| MapOp::Tunnel { index, value }));
    ops.extend(vteps.puts(|index, value| MapOp::Vtep { index, value }));
    ops.extend(vtep_sources.puts(|key, value| MapOp::VtepSource { key, value }));
    ops.extend(pods.puts(|key, value| MapOp::Pod { key, value }));
    ops.extend(backends.added.iter().map(|(id, _)| MapOp::ResetBackendCounter { id: *id }));
    ops.extend(backends.puts(|id, value| MapOp::Backend { id, value }));
    ops.extend(new_services(actual, desired).map(|id| MapOp::ResetServiceCounter { id }));
    ops.extend(
        desired
            .extents
            .iter()
            .filter(|(offset, entries)| actual.extents.get(offset) != Some(entries))
            .map(|(offset, entries)| MapOp::WriteExtent {
                offset: *offset,
                entries: entries.clone(),
            }),
    );
    let frontend = |key, value| MapOp::Frontend { key, value };
    let (addresses, services): (Vec<_>, Vec<_>) = frontends.puts(frontend).partition(is_address);
    ops.extend(services.into_iter().chain(addresses));

    let (addresses, services): (Vec<_>, Vec<_>) = frontends.deletes(frontend).partition(is_address);
    ops.extend(addresses.into_iter().chain(services));
    ops.extend(backends.deletes(|id, value| MapOp::Backend { id, value }));
    ops.extend(pods.deletes(|key, value| MapOp::Pod { key, value }));
    ops.extend(vtep_sources.deletes(|key, value| MapOp::VtepSource { key, value }));
    ops.extend(vteps.deletes(|index, value| MapOp::Vtep { index, value }));
    ops.extend(tunnels.deletes(|index, value| MapOp::Tunnel { index, value }));
    ops.extend(next_hops.deletes(|index, value| MapOp::NextHop { index, value }));
    Delta { ops, new_epoch }
}

/// Whether the operation is about an address as such.
fn is_address(op: &MapOp) -> bool {
    matches!(op, MapOp::Frontend { key, .. } if key.is_address())
}

/// Service ids that no frontend had before.
fn new_services(actual: &Tables, desired: &Tables) -> impl Iterator<Item = u32> {
    let ids = |tables: &Tables| -> BTreeSet<u32> {
        tables.frontends.values().map(|f| f.service).filter(|id| *id != 0).collect()
    };
    let before = ids(actual);
    ids(desired).into_iter().filter(move |id| !before.contains(id))
}

/// How one table changes.
struct Changes<K, V> {
    added: Vec<(K, V)>,
    changed: Vec<(K, V)>,
    deleted: Vec<K>,
}

impl<K: Ord + Copy, V: PartialEq + Copy> Changes<K, V> {
    fn of(actual: &BTreeMap<K, V>, desired: &BTreeMap<K, V>) -> Self {
        let mut changes = Self { added: Vec::new(), changed: Vec::new(), deleted: Vec::new() };
        for (key, value) in desired {
            match actual.get(key) {
                None => changes.added.push((*key, *value)),
                Some(present) if present != value => changes.changed.push((*key, *value)),
                Some(_) => {}
            }
        }
        changes.deleted.extend(actual.keys().filter(|key| !desired.contains_key(key)).copied());
        changes
    }

    /// Whether something that a flow record may have copied is no longer so.
    fn ends_something(&self) -> bool {
        !self.changed.is_empty() || !self.deleted.is_empty()
    }

    fn puts(&self, op: impl Fn(K, Option<V>) -> MapOp) -> impl Iterator<Item = MapOp> {
        self.added.iter().chain(&self.changed).map(move |(key, value)| op(*key, Some(*value)))
    }

    fn deletes(&self, op: impl Fn(K, Option<V>) -> MapOp) -> impl Iterator<Item = MapOp> {
        self.deleted.iter().map(move |key| op(*key, None))
    }
}
