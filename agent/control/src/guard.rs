//! Holds a mass removal: a sick API server's empty list must not delete every Service.

use serde::{Deserialize, Serialize};

use sluice_abi::Addr;
use std::collections::BTreeSet;

use crate::allocate::{backend_tuple, frontend_key};
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
        Self { percent: 50, at_least: 5 }
    }
}

/// A removal that waits for a person.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Held {
    /// The table: `frontends`, `backends` or `vteps`.
    pub table: &'static str,
    /// Entries now.
    pub before: usize,
    /// Entries that would be removed.
    pub removed: usize,
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
    let frontends: BTreeSet<_> = desired.frontends.keys().map(frontend_key).collect();
    let backends: BTreeSet<_> = desired.backends.keys().copied().collect();
    let vteps: BTreeSet<(u32, Addr)> =
        desired.vteps.keys().map(|vtep| (vtep.vni, vtep.remote.into())).collect();
    let services = || actual.frontends.keys().filter(|key| !key.is_address());
    let removed_frontends = services().filter(|key| !frontends.contains(key)).count();
    let removed_backends = actual
        .backends
        .values()
        .filter(|backend| backend_tuple(backend).is_none_or(|tuple| !backends.contains(&tuple)))
        .count();
    let removed_vteps = actual
        .vteps
        .values()
        .filter(|vtep| !vteps.contains(&(vtep.vni.host() >> 8, vtep.remote)))
        .count();
    [
        ("frontends", services().count(), removed_frontends),
        ("backends", actual.backends.len(), removed_backends),
        ("vteps", actual.vteps.len(), removed_vteps),
    ]
    .into_iter()
    .find(|(_, before, removed)| {
        *removed >= threshold.at_least as usize
            && removed * 100 > before * usize::from(threshold.percent)
    })
    .map(|(table, before, removed)| Held { table, before, removed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::DesiredFrontend;
    use crate::model::{ObjectName, Protocol, ServicePortName, Tuple};
    use sluice_abi::Frontend;

    fn tuple(n: u8) -> Tuple {
        Tuple { addr: [10, 96, 0, n].into(), port: 80, protocol: Protocol::Tcp }
    }

    fn actual(frontends: u8) -> Tables {
        Tables {
            frontends: (0..frontends)
                .map(|n| (frontend_key(&tuple(n)), Frontend::default()))
                .collect(),
            ..Tables::default()
        }
    }

    fn desired(frontends: u8) -> Desired {
        let frontend = DesiredFrontend {
            service: ServicePortName { service: ObjectName::new("ns", "svc"), port: "80".into() },
            flags: 0,
            external: None,
            internal: None,
            affinity_seconds: 0,
        };
        Desired {
            frontends: (0..frontends).map(|n| (tuple(n), frontend.clone())).collect(),
            ..Desired::default()
        }
    }

    #[test]
    fn empty_list_is_held_and_ordinary_deletion_is_not() {
        let threshold = MassRemoval::default();
        assert_eq!(
            mass_removal(&actual(20), &Desired::default(), threshold),
            Some(Held { table: "frontends", before: 20, removed: 20 })
        );
        assert_eq!(mass_removal(&actual(20), &desired(10), threshold), None);
        assert!(mass_removal(&actual(20), &desired(9), threshold).is_some());
    }

    #[test]
    fn few_removals_are_never_held() {
        let threshold = MassRemoval::default();
        assert_eq!(mass_removal(&actual(4), &Desired::default(), threshold), None);
    }
}
