//! Free ids, free extents, and those that rest.

use std::collections::{BTreeMap, BTreeSet};

/// Ids of one array, 1 up to the size of the map.
pub(super) struct Ids {
    taken: BTreeSet<u32>,
    next: u32,
    limit: u32,
}

impl Ids {
    /// `taken` are in use or rest; `limit` is the size of the map.
    pub(super) fn new(taken: impl IntoIterator<Item = u32>, limit: u32) -> Self {
        Self { taken: taken.into_iter().filter(|id| *id < limit).collect(), next: 1, limit }
    }

    /// How many are free.
    pub(super) fn free(&self) -> usize {
        let ids = self.limit.saturating_sub(1) as usize;
        let taken = self.taken.len() - usize::from(self.taken.contains(&0));
        ids.saturating_sub(taken)
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        while self.next < self.limit {
            let id = self.next;
            self.next += 1;
            if self.taken.insert(id) {
                return Some(id);
            }
        }
        None
    }
}

/// Free runs of the consistent-hash array; entry 0 is not used.
pub(super) struct Space {
    /// (size, offset), so that the smallest run that fits is found first.
    free: BTreeSet<(u32, u32)>,
}

impl Space {
    /// `taken` are (offset, size) in use or resting; they may overlap. `limit` is the size of the map.
    pub(super) fn new(taken: impl IntoIterator<Item = (u32, u32)>, limit: u32) -> Self {
        let mut taken: Vec<(u32, u32)> = taken.into_iter().collect();
        taken.sort_unstable();
        let mut free = BTreeSet::new();
        let mut start = 1u32;
        for (offset, size) in taken {
            let offset = offset.min(limit);
            if offset > start {
                free.insert((offset - start, start));
            }
            start = start.max(offset.saturating_add(size));
        }
        if limit > start {
            free.insert((limit - start, start));
        }
        Self { free }
    }

    pub(super) fn take(&mut self, size: u32) -> Option<u32> {
        let run = *self.free.range((size, 0)..).next()?;
        self.free.remove(&run);
        let (run_size, offset) = run;
        if run_size > size {
            self.free.insert((run_size - size, offset + size));
        }
        Some(offset)
    }

    /// Takes back what was not used after all.
    pub(super) fn give_back(&mut self, offset: u32, size: u32) {
        self.free.insert((size, offset));
    }
}

/// Things that were freed and rest until a generation is over.
#[derive(Clone, Debug)]
pub(super) struct Resting<T> {
    until: BTreeMap<T, u64>,
}

impl<T> Default for Resting<T> {
    fn default() -> Self {
        Self { until: BTreeMap::new() }
    }
}

impl<T: Ord + Copy> Resting<T> {
    pub(super) fn add(&mut self, things: impl IntoIterator<Item = T>, until: u64) {
        self.until.extend(things.into_iter().map(|t| (t, until)));
    }

    /// Ends the rest of those whose time is over.
    pub(super) fn wake(&mut self, generation: u64) {
        self.until.retain(|_, until| *until > generation);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = T> {
        self.until.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_start_at_one_and_skip_what_is_taken() {
        let mut ids = Ids::new([0, 1, 3, 99], 5);
        assert_eq!(ids.free(), 2);
        assert_eq!([ids.take(), ids.take(), ids.take()], [Some(2), Some(4), None]);
        assert_eq!(ids.free(), 0);
    }

    #[test]
    fn space_never_hands_out_what_is_taken() {
        let mut space = Space::new([(5, 5), (7, 1), (20, 100)], 40);
        assert_eq!(space.take(4), Some(1));
        assert_eq!(space.take(10), Some(10));
        assert_eq!(space.take(1), None);
    }

    #[test]
    fn space_ignores_extents_beyond_its_end() {
        let mut space = Space::new([(u32::MAX, u32::MAX), (2, u32::MAX)], 10);
        assert_eq!(space.take(1), Some(1));
        assert_eq!(space.take(1), None);
    }
}
