//! Maps that are read and written through memory: the flow table, the SNAT slots, the consistent-hash
//! tables. The programs write them at the same time, so every access here is atomic.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya::maps::MapData;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use sluice_abi::{FLOW_WAYS, FloodWord, FlowRecord, FlowSet, SnatSlot, flow_tag, maps};
use zerocopy::{FromBytes, IntoBytes};

use super::MapsError;

/// An array map in memory.
struct Mapped {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the region is shared memory that is only accessed through atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn open(map: &MapData, name: &'static str) -> Result<(Self, u32), MapsError> {
        let info = map.info().map_err(|source| MapsError::Map { name, what: "look at", source })?;
        // kernel/bpf/arraymap.c: elements are rounded up to 8 bytes, the whole to pages.
        let stride = info.value_size().next_multiple_of(8) as usize;
        let len = stride * info.max_entries() as usize;
        let Some(length) = NonZeroUsize::new(len) else {
            return Err(MapsError::Mmap { name, source: nix::Error::EINVAL });
        };
        // SAFETY: a new shared mapping at an address of the kernel's choice; it aliases nothing of
        // ours and lives until `drop`.
        let start = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map.fd().as_fd(),
                0,
            )
        }
        .map_err(|source| MapsError::Mmap { name, source })?;
        Ok((Self { start, len }, info.max_entries()))
    }

    fn word(&self, at: usize) -> Option<&AtomicU32> {
        if !at.is_multiple_of(4) || at.checked_add(4)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping and aligned (checked above; the mapping starts at a page).
        Some(unsafe { self.start.cast::<u8>().add(at).cast::<AtomicU32>().as_ref() })
    }

    fn word64(&self, at: usize) -> Option<&AtomicU64> {
        if !at.is_multiple_of(8) || at.checked_add(8)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping and aligned (checked above; the mapping starts at a page).
        Some(unsafe { self.start.cast::<u8>().add(at).cast::<AtomicU64>().as_ref() })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly the region that `open` mapped; no reference outlives `self`.
        if let Err(e) = unsafe { munmap(self.start, self.len) } {
            tracing::warn!("munmap: {e}");
        }
    }
}

/// `sl_maglev_v1`.
pub struct MaglevTable {
    memory: Mapped,
    entries: u32,
}

impl MaglevTable {
    pub(super) fn open(map: MapData) -> Result<Self, MapsError> {
        let (memory, entries) = Mapped::open(&map, maps::MAGLEV)?;
        Ok(Self { memory, entries })
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.entries
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// `size` backend ids from `offset` on, fewer where the map ends.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u32> {
        (offset..offset.saturating_add(size))
            .map_while(|i| self.slot(i).map(|w| w.load(Ordering::Relaxed)))
            .collect()
    }

    /// Writes backend ids from `offset` on; returns whether they all fitted.
    pub fn write(&mut self, offset: u32, ids: &[u32]) -> bool {
        for (i, id) in ids.iter().enumerate() {
            let Some(slot) = offset
                .checked_add(i as u32)
                .filter(|i| *i < self.entries)
                .and_then(|i| self.slot(i))
            else {
                return false;
            };
            slot.store(*id, Ordering::Release);
        }
        true
    }

    // Values of four bytes stand eight bytes apart (see `Mapped::open`).
    fn slot(&self, index: u32) -> Option<&AtomicU32> {
        self.memory.word(index as usize * 8)
    }
}

/// A connection and where its record stands.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Index of the set.
    pub set: u32,
    /// Place in the set.
    pub way: u32,
    /// The tag with which it was read.
    pub tag: u32,
    /// The record.
    pub record: FlowRecord,
}

/// `sl_flow_v1` with `sl_snat_v1` and `sl_flood_v1`.
pub struct FlowTable {
    flows: Mapped,
    sets: u32,
    /// First set of the flood guard.
    guard: u32,
    word: Mapped,
    snat: Mapped,
    slots: u32,
}

impl FlowTable {
    pub(super) fn open(flow: MapData, snat: MapData, flood: MapData) -> Result<Self, MapsError> {
        let (flows, sets) = Mapped::open(&flow, maps::FLOW)?;
        let (snat, slots) = Mapped::open(&snat, maps::SNAT)?;
        let (word, _) = Mapped::open(&flood, maps::FLOOD)?;
        Ok(Self { flows, sets, guard: sets, word, snat, slots })
    }

    /// The same table, of which `sets` are the flow table's and the others the flood guard's.
    pub fn with_sets(self, sets: u32) -> Self {
        Self { guard: sets.min(self.sets), ..self }
    }

    /// Number of records that fit, those of the flood guard not counted.
    pub fn capacity(&self) -> u64 {
        u64::from(self.guard) * FLOW_WAYS as u64
    }

    /// Whether the flood guard has a record, and not the flow table.
    pub fn is_guarded(&self, flow: &Flow) -> bool {
        flow.set >= self.guard
    }

    /// Whether the flood guard may hold records.
    pub fn flood_word(&self) -> FloodWord {
        FloodWord(self.word.word64(0).map_or(0, |word| word.load(Ordering::Acquire)))
    }

    /// Says that the flood guard holds no records, unless one came since it said `word`.
    pub fn clear_flood_word(&self, word: FloodWord) -> bool {
        self.word.word64(0).is_some_and(|at| {
            at.compare_exchange(word.0, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    fn set_at(set: u32) -> usize {
        set as usize * size_of::<FlowSet>()
    }

    fn tag(&self, set: u32, way: u32) -> Option<&AtomicU32> {
        self.flows.word(Self::set_at(set) + way as usize * 4)
    }

    /// The record at a place, if there is one and nobody wrote it meanwhile.
    pub fn read(&self, set: u32, way: u32) -> Option<Flow> {
        if set >= self.sets || way as usize >= FLOW_WAYS {
            return None;
        }
        let tag = self.tag(set, way)?.load(Ordering::Acquire);
        if !flow_tag::is_used(tag) {
            return None;
        }
        let at = Self::set_at(set) + FLOW_WAYS * 4 + way as usize * size_of::<FlowRecord>();
        let mut words = [0u64; size_of::<FlowRecord>() / 8];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.flows.word64(at + i * 8)?.load(Ordering::Relaxed);
        }
        std::sync::atomic::fence(Ordering::Acquire);
        if self.tag(set, way)?.load(Ordering::Relaxed) != tag {
            return None;
        }
        let record = FlowRecord::read_from_bytes(words.as_bytes()).ok()?;
        Some(Flow { set, way, tag, record })
    }

    /// All connections. The table changes meanwhile: one that comes or goes may be missed.
    pub fn iter(&self) -> impl Iterator<Item = Flow> + '_ {
        (0..self.sets)
            .flat_map(|set| (0..FLOW_WAYS as u32).map(move |way| (set, way)))
            .filter_map(|(set, way)| self.read(set, way))
    }

    /// Frees a record that was read, unless its place has another owner by now. Its SNAT slot
    /// follows: the order that the programs rely on (a slot never points to a free record for
    /// long, and a record in use never loses its slot).
    pub fn free(&self, flow: &Flow) -> bool {
        let Some(tag) = self.tag(flow.set, flow.way) else {
            return false;
        };
        let freed = flow_tag::freed(flow.tag);
        if tag.compare_exchange(flow.tag, freed, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return false;
        }
        if let Some(index) = flow.record.snat.checked_sub(1) {
            self.free_slot(index, SnatSlot::owned(flow.set, flow.way));
        }
        true
    }

    /// SNAT slots that are taken, with their index. Those of every port: the range may have been
    /// another one when a connection began.
    pub fn slots(&self) -> impl Iterator<Item = (u32, SnatSlot)> + '_ {
        (0..self.slots).filter_map(|index| {
            let slot = SnatSlot(self.snat.word64(index as usize * 8)?.load(Ordering::Relaxed));
            (slot != SnatSlot::FREE).then_some((index, slot))
        })
    }

    /// Frees SNAT slot `index` if it still holds `owner`.
    pub fn free_slot(&self, index: u32, owner: SnatSlot) -> bool {
        self.snat.word64(index as usize * 8).is_some_and(|slot| {
            slot.compare_exchange(owner.0, SnatSlot::FREE.0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }
}
