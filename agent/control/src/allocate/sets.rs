//! Services: their ids, their backends' ids, their consistent-hash extents, their frontends.

use sluice_abi::{Extent, Frontend, FrontendKey};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::space::{Ids, Space};
use super::{Allocation, Allocator, Routes, backend_tuple, frontend_key, full, service_ids};
use crate::compile::{DesiredFrontend, SetKey};
use crate::maglev;
use crate::model::{ServicePortName, Tuple};
use crate::names::BackendName;
use crate::{Desired, Names, Skipped, Tables};

/// Consistent-hash tables by what they depend on, so that an unchanged set costs a comparison.
#[derive(Clone, Default, Debug)]
pub(super) struct TableCache {
    by_set: BTreeMap<SetKey, CachedTable>,
}

#[derive(Clone, Debug)]
struct CachedTable {
    cluster_seed: u64,
    backends: Vec<Tuple>,
    size: u32,
    /// Positions in `backends`.
    positions: Arc<[u32]>,
}

impl TableCache {
    fn table(&mut self, key: &SetKey, backends: &[Tuple], seed: u64, size: u32) -> Arc<[u32]> {
        if let Some(cached) = self.by_set.get(key)
            && (cached.cluster_seed, cached.size) == (seed, size)
            && cached.backends == backends
        {
            return cached.positions.clone();
        }
        let protocol = backends.first().map_or("", |b| b.protocol.label());
        let name = format!("{}/{protocol}", key.service);
        let positions: Arc<[u32]> = maglev::table(seed, &name, backends, size).into();
        self.by_set.insert(
            key.clone(),
            CachedTable {
                cluster_seed: seed,
                backends: backends.to_vec(),
                size,
                positions: positions.clone(),
            },
        );
        positions
    }
}

/// A Service port while it is allocated.
struct Candidate<'a> {
    name: &'a ServicePortName,
    frontends: Vec<(FrontendKey, &'a DesiredFrontend)>,
    sets: BTreeSet<&'a SetKey>,
}

/// Everything that is shared while Services are allocated one after the other.
struct Work<'a> {
    desired: &'a Desired,
    actual: &'a Tables,
    routes: &'a Routes<'a>,
    cache: &'a mut TableCache,
    backend_ids: Ids,
    known_backends: BTreeMap<Tuple, u32>,
    given_backends: BTreeMap<Tuple, u32>,
    space: Space,
    /// Extents of the new tables by offset, and whose they are.
    owners: BTreeMap<u32, SetKey>,
    /// Frontends that can be added.
    frontend_room: usize,
    /// A Service is left out because there is no room for its frontends.
    frontends_full: bool,
    /// Entries of consistent-hash tables per backend.
    per_backend: u32,
}

/// Fills backends, extents and frontends of `out`. Services that the maps hold come first.
pub(super) fn allocate(
    allocator: &mut Allocator,
    desired: &Desired,
    actual: &Tables,
    actual_names: &Names,
    routes: &Routes<'_>,
    out: &mut Allocation,
) {
    let limits = allocator.limits;
    let candidates = candidates(desired);
    let known = known_services(&candidates, actual, actual_names);
    let taken = service_ids(actual).into_iter().chain(allocator.services.iter());
    let mut service_ids = Ids::new(taken, limits.services);
    let mut known_backends = BTreeMap::new();
    for (id, backend) in actual.backends.iter().filter(|(id, _)| **id != 0) {
        if let Some(tuple) = backend_tuple(backend) {
            known_backends.entry(tuple).or_insert(*id);
        }
    }
    let mut cache = std::mem::take(&mut allocator.tables);
    cache.by_set.retain(|key, _| desired.sets.contains_key(key));
    let in_use: BTreeSet<(u32, u32)> = actual.referenced_extents();
    let per_backend = per_backend(desired, limits.maglev_entries);
    if per_backend < maglev::ENTRIES_PER_BACKEND[0] {
        out.skipped.push(
            Skipped::notice(
                "consistent-hash tables",
                format!("have {per_backend} entries per backend, so that all have room"),
            )
            .remedy("raise limits.maglev_entries in the configuration"),
        );
    }
    let mut work = Work {
        per_backend,
        desired,
        actual,
        routes,
        cache: &mut cache,
        backend_ids: Ids::new(
            actual.backends.keys().copied().chain(allocator.backends.iter()),
            limits.backends,
        ),
        known_backends,
        given_backends: BTreeMap::new(),
        space: Space::new(
            in_use.iter().copied().chain(allocator.extents.iter()),
            limits.maglev_entries,
        ),
        owners: BTreeMap::new(),
        // Deletions come after additions, so what goes still takes its room.
        frontend_room: (limits.frontends as usize).saturating_sub(actual.frontends.len()),
        frontends_full: false,
    };
    let (old, new): (Vec<_>, Vec<_>) =
        candidates.values().partition(|c| known.contains_key(c.name));
    for (candidate, is_new) in old.iter().map(|c| (c, false)).chain(new.iter().map(|c| (c, true))) {
        let id = known.get(candidate.name).copied().or_else(|| service_ids.take());
        let Some(id) = id else {
            out.skipped.push(full(
                format!("Service {}", candidate.name),
                "services",
                limits.services,
            ));
            continue;
        };
        match work.service(candidate, id, is_new, &limits, out) {
            Ok(()) => {
                out.names.services.insert(id, candidate.name.to_string());
            }
            Err(problem) => out.skipped.push(*problem),
        }
    }
    work.vips(&limits, out);
    allocator.tables = cache;
}

/// How many entries per backend all tables together have room for. A quarter stays free for changes
/// and for extents that rest. Depends on the objects and the limit only, so that nodes agree.
fn per_backend(desired: &Desired, limit: u32) -> u32 {
    let room = u64::from(limit) / 4 * 3;
    let needed = |per_backend: u32| -> u64 {
        desired
            .sets
            .values()
            .map(|set| maglev::table_size(set.len(), per_backend, desired.maglev.max_size))
            .map(u64::from)
            .sum()
    };
    let [.., least] = maglev::ENTRIES_PER_BACKEND;
    maglev::ENTRIES_PER_BACKEND
        .into_iter()
        .find(|per_backend| needed(*per_backend) <= room)
        .unwrap_or(least)
}

fn candidates(desired: &Desired) -> BTreeMap<&ServicePortName, Candidate<'_>> {
    let mut candidates: BTreeMap<&ServicePortName, Candidate<'_>> = BTreeMap::new();
    for (tuple, frontend) in &desired.frontends {
        let candidate = candidates.entry(&frontend.service).or_insert_with(|| Candidate {
            name: &frontend.service,
            frontends: Vec::new(),
            sets: BTreeSet::new(),
        });
        candidate.frontends.push((frontend_key(tuple), frontend));
        candidate.sets.extend(frontend.external.iter().chain(&frontend.internal));
    }
    candidates
}

/// Ids that Services have already: by the names written beside the maps, or, where those say nothing
/// of an id, by the address that both have.
fn known_services<'a>(
    candidates: &BTreeMap<&'a ServicePortName, Candidate<'a>>,
    actual: &Tables,
    names: &Names,
) -> BTreeMap<&'a ServicePortName, u32> {
    let in_use = service_ids(actual);
    let mut by_name: BTreeMap<&str, u32> = BTreeMap::new();
    for (id, name) in names.services.iter().filter(|(id, _)| in_use.contains(id)) {
        by_name.entry(name).or_insert(*id);
    }
    let mut known = BTreeMap::new();
    let mut claimed = BTreeSet::from([0]);
    for name in candidates.keys() {
        if let Some(id) = by_name.get(name.to_string().as_str())
            && claimed.insert(*id)
        {
            known.insert(*name, *id);
        }
    }
    for (name, candidate) in candidates {
        if known.contains_key(name) {
            continue;
        }
        let id = candidate
            .frontends
            .iter()
            .filter_map(|(key, _)| actual.frontends.get(key))
            .map(|frontend| frontend.service)
            .find(|id| !names.services.contains_key(id) && !claimed.contains(id));
        if let Some(id) = id {
            claimed.insert(id);
            known.insert(*name, id);
        }
    }
    known
}

impl Work<'_> {
    /// Programs one Service port, or nothing of it.
    fn service(
        &mut self,
        candidate: &Candidate<'_>,
        id: u32,
        is_new: bool,
        limits: &super::Limits,
        out: &mut Allocation,
    ) -> Result<(), Box<Skipped>> {
        let title = || format!("Service {}", candidate.name);
        let added = |key: &FrontendKey| !self.actual.frontends.contains_key(key);
        let new_frontends = candidate.frontends.iter().filter(|(key, _)| added(key)).count();
        let fits = new_frontends <= self.frontend_room;
        if !fits {
            self.frontends_full = true;
            let problem = full(title(), "frontends", limits.frontends);
            if is_new {
                return Err(Box::new(problem));
            }
            out.skipped.push(problem);
        }
        if is_new {
            let needed = self.missing_backends(candidate);
            if needed > self.backend_ids.free() {
                return Err(Box::new(full(title(), "backends", limits.backends)));
            }
        }

        let mut extents: BTreeMap<&SetKey, (u32, Arc<[u32]>)> = BTreeMap::new();
        let mut fresh = Vec::new();
        for set in &candidate.sets {
            let (backends, left_out) = self.backends(set);
            if left_out > 0 {
                out.skipped.push(
                    Skipped::error(title(), format!("{left_out} endpoints are left out: no room"))
                        .remedy("raise limits.backends, limits.vteps or limits.next_hops"),
                );
            }
            if backends.is_empty() {
                continue;
            }
            match self.extent(candidate, set, &backends, &extents) {
                Some((offset, entries, is_fresh)) => {
                    if is_fresh {
                        fresh.push((offset, entries.len() as u32));
                    }
                    extents.insert(set, (offset, entries));
                }
                None => {
                    for (offset, size) in fresh {
                        self.space.give_back(offset, size);
                    }
                    for (offset, _) in extents.values() {
                        self.owners.remove(offset);
                    }
                    return Err(Box::new(full(title(), "maglev_entries", limits.maglev_entries)));
                }
            }
        }

        for set in extents.keys() {
            self.write_backends(set, out);
        }
        let extent = |set: &Option<SetKey>| -> Extent {
            set.as_ref().and_then(|set| extents.get(set)).map_or(
                Extent::default(),
                |(offset, entries)| Extent { offset: *offset, size: entries.len() as u32 },
            )
        };
        for (key, frontend) in &candidate.frontends {
            if !self.actual.frontends.contains_key(key) {
                if self.frontend_room == 0 {
                    continue;
                }
                self.frontend_room -= 1;
            }
            out.tables.frontends.insert(
                *key,
                Frontend {
                    service: id,
                    flags: frontend.flags,
                    external: extent(&frontend.external),
                    internal: extent(&frontend.internal),
                    affinity_seconds: frontend.affinity_seconds,
                    ..Frontend::default()
                },
            );
        }
        for (offset, entries) in extents.into_values() {
            out.tables.extents.insert(offset, entries);
        }
        Ok(())
    }

    /// Enters the addresses that are Services' alone: those all of whose Services are entered. They
    /// make room for Services, at the latest for the next attempt.
    fn vips(&mut self, limits: &super::Limits, out: &mut Allocation) {
        let entered = &mut out.tables.frontends;
        let mut vips = self.desired.vips.clone();
        for tuple in self.desired.frontends.keys() {
            if !entered.contains_key(&frontend_key(tuple)) {
                vips.remove(&tuple.addr);
            }
        }
        let mut keys: Vec<_> =
            vips.into_iter().map(|addr| FrontendKey::address(addr.into())).collect();
        keys.sort_by_key(|key| !self.actual.frontends.contains_key(key));
        let mut left_out = 0;
        for key in keys {
            let there = self.actual.frontends.contains_key(&key);
            if self.frontends_full || !there && self.frontend_room == 0 {
                left_out += 1;
                continue;
            }
            self.frontend_room -= usize::from(!there);
            entered.insert(key, Frontend::ADDRESS);
        }
        if left_out > 0 {
            let what = format!("{left_out} Service addresses");
            out.skipped.push(full(what, "frontends", limits.frontends));
        }
    }

    /// How many backends of a Service have no id yet.
    fn missing_backends(&self, candidate: &Candidate<'_>) -> usize {
        let tuples: BTreeSet<&Tuple> = candidate
            .sets
            .iter()
            .filter_map(|set| self.desired.sets.get(set))
            .flatten()
            .filter(|tuple| {
                !self.known_backends.contains_key(tuple) && !self.given_backends.contains_key(tuple)
            })
            .collect();
        tuples.len()
    }

    /// The backends of a set with their ids, in order, and how many found no room.
    fn backends(&mut self, set: &SetKey) -> (Vec<(Tuple, u32)>, usize) {
        let tuples = self.desired.sets.get(set).map(Vec::as_slice).unwrap_or_default();
        let mut backends = Vec::with_capacity(tuples.len());
        for tuple in tuples {
            let Some(desired) = self.desired.backends.get(tuple) else {
                continue;
            };
            if self.routes.backend(tuple, desired.route).is_none() {
                continue;
            }
            let id = match self.given_backends.get(tuple) {
                Some(id) => Some(*id),
                None => {
                    let known = self.known_backends.get(tuple).copied();
                    known.or_else(|| self.backend_ids.take())
                }
            };
            if let Some(id) = id {
                self.given_backends.insert(*tuple, id);
                backends.push((*tuple, id));
            }
        }
        let left_out = tuples.len() - backends.len();
        (backends, left_out)
    }

    /// Enters the backends of a set into the tables.
    fn write_backends(&self, set: &SetKey, out: &mut Allocation) {
        for tuple in self.desired.sets.get(set).into_iter().flatten() {
            let (Some(id), Some(desired)) =
                (self.given_backends.get(tuple), self.desired.backends.get(tuple))
            else {
                continue;
            };
            if let Some(value) = self.routes.backend(tuple, desired.route) {
                out.tables.backends.insert(*id, value);
                out.names.backends.insert(
                    *id,
                    BackendName {
                        endpoint: tuple.to_string(),
                        pod: desired.pod.as_ref().map(ToString::to_string),
                        node: desired.node.as_deref().map(str::to_owned),
                    },
                );
            }
        }
    }

    /// Where the table of a set stands and what it holds: at its old place if nothing changed, else
    /// in free space. In full tables it may take a smaller place, or its old one, rewritten under
    /// running packets: every entry is one word and names a valid backend at any moment.
    fn extent(
        &mut self,
        candidate: &Candidate<'_>,
        set: &SetKey,
        backends: &[(Tuple, u32)],
        done: &BTreeMap<&SetKey, (u32, Arc<[u32]>)>,
    ) -> Option<(u32, Arc<[u32]>, bool)> {
        let count = backends.len();
        let settings = self.desired.maglev;
        let old = self.old_extents(candidate, set);
        let tuples: Vec<Tuple> = backends.iter().map(|(tuple, _)| *tuple).collect();
        let mut entries = |size: u32| -> Arc<[u32]> {
            self.cache
                .table(set, &tuples, settings.cluster_seed, size)
                .iter()
                .map(|position| backends[*position as usize].1)
                .collect()
        };
        let full_size = maglev::table_size(count, self.per_backend, settings.max_size);
        let wanted = entries(full_size);

        for extent in &old {
            if let Some(present) = self.actual.entries(*extent)
                && *present == wanted
                && self.owners.get(&extent.offset).is_none_or(|owner| owner == set)
            {
                self.owners.insert(extent.offset, set.clone());
                return Some((extent.offset, present.clone(), false));
            }
        }
        if let Some(offset) = self.space.take(full_size) {
            self.owners.insert(offset, set.clone());
            return Some((offset, wanted, true));
        }
        for extent in old {
            let taken = self.owners.contains_key(&extent.offset)
                || done.values().any(|(offset, _)| *offset == extent.offset)
                || is_shared(self.actual, extent, candidate);
            if !taken && maglev::is_table_size(extent.size, count) {
                self.owners.insert(extent.offset, set.clone());
                return Some((extent.offset, entries(extent.size), false));
            }
        }
        for per_backend in maglev::ENTRIES_PER_BACKEND {
            let size = maglev::table_size(count, per_backend, settings.max_size);
            if size < full_size
                && let Some(offset) = self.space.take(size)
            {
                self.owners.insert(offset, set.clone());
                return Some((offset, entries(size), true));
            }
        }
        None
    }

    /// Extents that the maps hold for a set, as the frontends in both say.
    fn old_extents(&self, candidate: &Candidate<'_>, set: &SetKey) -> Vec<Extent> {
        let mut found: Vec<Extent> = Vec::new();
        for (key, frontend) in &candidate.frontends {
            let Some(actual) = self.actual.frontends.get(key) else {
                continue;
            };
            for (wanted, extent) in
                [(&frontend.external, actual.external), (&frontend.internal, actual.internal)]
            {
                if wanted.as_ref() == Some(set) && extent.size != 0 && !found.contains(&extent) {
                    found.push(extent);
                }
            }
        }
        found
    }
}

/// Whether the maps hold a frontend of another Service port that uses some of the extent.
fn is_shared(actual: &Tables, extent: Extent, candidate: &Candidate<'_>) -> bool {
    let own: BTreeSet<&FrontendKey> = candidate.frontends.iter().map(|(key, _)| key).collect();
    let end = |e: Extent| u64::from(e.offset) + u64::from(e.size);
    actual
        .frontends
        .iter()
        .filter(|(key, _)| !own.contains(key))
        .flat_map(|(_, frontend)| [frontend.external, frontend.internal])
        .any(|other| u64::from(other.offset) < end(extent) && u64::from(extent.offset) < end(other))
}
