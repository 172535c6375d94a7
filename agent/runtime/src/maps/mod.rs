//! The kernel's maps as typed tables: pins, shapes, reading and writing. No decision is made here.
//!
//! A value crosses into the kernel as its bytes; [`Plain`] is the one place that says so to aya.

mod batch;
mod mapped;
mod shape;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use sluice_abi::maps;
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, FloodCpu, Frontend, FrontendKey,
    Hook, NextHop, Pod, REASONS, Reason, ReasonCounter, ServiceCounter, Settings, Tunnel, Vtep,
    VtepKey,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use mapped::{Flow, FlowTable, MaglevTable};
pub use shape::{Shape, check_pins, shapes};

/// Why a map could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// There is no instance.
    #[error(
        "{}: no such map; is `sluice run` started with this pin_dir? (--config or --pin-dir choose the instance)",
        path.display()
    )]
    NotPinned {
        /// Where the pin was looked for.
        path: PathBuf,
    },
    /// A call failed.
    #[error("map {name}: {what}: {source}")]
    Map {
        /// Which map.
        name: &'static str,
        /// What was being done.
        what: &'static str,
        /// What aya says.
        source: MapError,
    },
    /// The pinned map is not the one that this program uses.
    #[error(
        "{}: {field} is {found}, this program and this config need {wanted}; \
         restore the config, or run `sluice cleanup` (connections end) and start again",
        path.display()
    )]
    Shape {
        /// The pin.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// What the pinned map has.
        found: String,
        /// What is needed.
        wanted: String,
    },
    /// A map could not be mapped into memory.
    #[error("map {name}: mmap: {source}")]
    Mmap {
        /// Which map.
        name: &'static str,
        /// The system's answer.
        source: nix::Error,
    },
}

/// A value as its bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

// SAFETY: `Pod` asks that a value may be copied to and from the kernel as bytes. `IntoBytes` has no
// padding (its derive refuses it), `FromBytes` holds for any bytes, and `Plain` is transparent.
unsafe impl<T: IntoBytes + FromBytes + Immutable + Copy + 'static> aya::Pod for Plain<T> {}

/// The directory of an instance's pins.
#[derive(Clone, Debug)]
pub struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// The pins in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where map `name` is pinned.
    pub fn map_path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn data(&self, name: &'static str) -> Result<MapData, MapsError> {
        let path = self.map_path(name);
        if !path.exists() {
            return Err(MapsError::NotPinned { path });
        }
        MapData::from_pin(&path).map_err(|source| MapsError::Map {
            name,
            what: "open the pin",
            source,
        })
    }

    fn map(&self, name: &'static str) -> Result<Map, MapsError> {
        Map::from_map_data(self.data(name)?).map_err(|source| MapsError::Map {
            name,
            what: "open",
            source,
        })
    }

    fn array<T: IntoBytes + FromBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
    ) -> Result<ArrayTable<T>, MapsError> {
        let fail = |source| MapsError::Map { name, what: "open as an array", source };
        let data = self.data(name)?;
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(|e| fail(MapError::IoError(e)))?;
        let map = Map::from_map_data(data).map_err(fail)?;
        Ok(ArrayTable { name, array: Array::try_from(map).map_err(fail)?, fd })
    }

    fn hash<K, V>(&self, name: &'static str) -> Result<HashTable<K, V>, MapsError>
    where
        K: IntoBytes + FromBytes + Immutable + Copy + 'static,
        V: IntoBytes + FromBytes + Immutable + Copy + 'static,
    {
        let hash = HashMap::try_from(self.map(name)?).map_err(|source| MapsError::Map {
            name,
            what: "open as a hash",
            source,
        })?;
        Ok(HashTable { name, hash })
    }

    /// `sl_frontend_v1`.
    pub fn frontends(&self) -> Result<HashTable<FrontendKey, Frontend>, MapsError> {
        self.hash(maps::FRONTEND)
    }

    /// `sl_backend_v1`.
    pub fn backends(&self) -> Result<ArrayTable<Backend>, MapsError> {
        self.array(maps::BACKEND)
    }

    /// `sl_pod_v1`.
    pub fn pods(&self) -> Result<HashTable<Addr, Pod>, MapsError> {
        self.hash(maps::POD)
    }

    /// `sl_vtep_v1`.
    pub fn vteps(&self) -> Result<ArrayTable<Vtep>, MapsError> {
        self.array(maps::VTEP)
    }

    /// `sl_vtepsrc_v1`.
    pub fn vtep_sources(&self) -> Result<HashTable<VtepKey, u32>, MapsError> {
        self.hash(maps::VTEP_SOURCE)
    }

    /// `sl_lookups_v1`.
    pub fn lookups(&self) -> Result<ArrayTable<u32>, MapsError> {
        self.array(maps::LOOKUPS)
    }

    /// `sl_tunnel_v1`.
    pub fn tunnels(&self) -> Result<ArrayTable<Tunnel>, MapsError> {
        self.array(maps::TUNNEL)
    }

    /// `sl_nexthop_v1`.
    pub fn nexthops(&self) -> Result<ArrayTable<NextHop>, MapsError> {
        self.array(maps::NEXTHOP)
    }

    /// `sl_settings_v1`.
    pub fn settings(&self) -> Result<ArrayTable<Settings>, MapsError> {
        self.array(maps::SETTINGS)
    }

    /// `sl_maglev_v1`, mapped into memory.
    pub fn maglev(&self) -> Result<MaglevTable, MapsError> {
        MaglevTable::open(self.data(maps::MAGLEV)?)
    }

    /// `sl_flow_v1`, `sl_snat_v1` and `sl_flood_v1`, mapped into memory.
    pub fn flows(&self) -> Result<FlowTable, MapsError> {
        let data = |name| self.data(name);
        FlowTable::open(data(maps::FLOW)?, data(maps::SNAT)?, data(maps::FLOOD)?)
    }

    /// The counters.
    pub fn counters(&self) -> Result<Counters, MapsError> {
        Ok(Counters {
            reasons: self.per_cpu(maps::REASON)?,
            services: self.per_cpu(maps::SERVICE_STAT)?,
            backends: self.per_cpu(maps::BACKEND_STAT)?,
            answers: self.per_cpu(maps::ANSWER)?,
            flood: self.per_cpu(maps::FLOOD_CPU)?,
        })
    }

    fn per_cpu<T: IntoBytes + FromBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
    ) -> Result<PerCpuTable<T>, MapsError> {
        let array = PerCpuArray::try_from(self.map(name)?).map_err(|source| MapsError::Map {
            name,
            what: "open as a per-CPU array",
            source,
        })?;
        Ok(PerCpuTable { name, array })
    }
}

/// An array map.
pub struct ArrayTable<T: IntoBytes + FromBytes + Immutable + Copy + 'static> {
    name: &'static str,
    array: Array<MapData, Plain<T>>,
    /// The same map.
    fd: OwnedFd,
}

impl<T: IntoBytes + FromBytes + Immutable + Copy + 'static> ArrayTable<T> {
    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.array.len()
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry at `index`.
    pub fn read(&self, index: u32) -> Result<T, MapsError> {
        self.array.get(&index, 0).map(|v| v.0).map_err(|source| MapsError::Map {
            name: self.name,
            what: "read",
            source,
        })
    }

    /// Replaces the entry at `index`.
    pub fn write(&mut self, index: u32, value: T) -> Result<(), MapsError> {
        self.array.set(index, Plain(value), 0).map_err(|source| MapsError::Map {
            name: self.name,
            what: "write",
            source,
        })
    }

    /// All entries that are not all zero, with their index.
    pub fn used(&self) -> Result<Vec<(u32, T)>, MapsError> {
        /// Entries that are read at once.
        const CHUNK: u32 = 4096;
        let fail =
            |e| MapsError::Map { name: self.name, what: "read", source: MapError::IoError(e) };
        let mut found = Vec::new();
        for first in (0..self.len()).step_by(CHUNK as usize) {
            let count = CHUNK.min(self.len() - first);
            let bytes =
                batch::values(self.fd.as_fd(), first, count, size_of::<T>()).map_err(fail)?;
            for (index, value) in (first..).zip(bytes.chunks_exact(size_of::<T>())) {
                if let Ok(value) = T::read_from_bytes(value)
                    && value.as_bytes().iter().any(|b| *b != 0)
                {
                    found.push((index, value));
                }
            }
        }
        Ok(found)
    }
}

/// A hash map.
pub struct HashTable<K, V>
where
    K: IntoBytes + FromBytes + Immutable + Copy + 'static,
    V: IntoBytes + FromBytes + Immutable + Copy + 'static,
{
    name: &'static str,
    hash: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K, V> HashTable<K, V>
where
    K: IntoBytes + FromBytes + Immutable + Copy + 'static,
    V: IntoBytes + FromBytes + Immutable + Copy + 'static,
{
    /// Inserts or replaces.
    pub fn write(&mut self, key: K, value: V) -> Result<(), MapsError> {
        self.hash.insert(Plain(key), Plain(value), 0).map_err(|source| MapsError::Map {
            name: self.name,
            what: "write",
            source,
        })
    }

    /// Removes; an entry that is not there is no error.
    pub fn remove(&mut self, key: K) -> Result<(), MapsError> {
        match self.hash.remove(&Plain(key)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            Err(source) => Err(MapsError::Map { name: self.name, what: "delete", source }),
        }
    }

    /// All entries. Only the agent writes these maps, so none is seen twice or missed.
    pub fn entries(&self) -> Result<Vec<(K, V)>, MapsError> {
        self.hash
            .iter()
            .map(|entry| {
                entry.map(|(k, v)| (k.0, v.0)).map_err(|source| MapsError::Map {
                    name: self.name,
                    what: "read",
                    source,
                })
            })
            .collect()
    }
}

struct PerCpuTable<T: IntoBytes + FromBytes + Immutable + Copy + 'static> {
    name: &'static str,
    array: PerCpuArray<MapData, Plain<T>>,
}

impl<T: IntoBytes + FromBytes + Immutable + Copy + 'static> PerCpuTable<T> {
    fn read(&self, index: u32) -> Result<Vec<T>, MapsError> {
        self.array
            .get(&index, 0)
            .map(|values| values.iter().map(|v| v.0).collect())
            .map_err(|source| MapsError::Map { name: self.name, what: "read", source })
    }
}

/// The counters, summed over the CPUs.
pub struct Counters {
    reasons: PerCpuTable<ReasonCounter>,
    services: PerCpuTable<ServiceCounter>,
    backends: PerCpuTable<BackendCounter>,
    answers: PerCpuTable<AnswerCounter>,
    flood: PerCpuTable<FloodCpu>,
}

impl Counters {
    /// Every reason at every hook, zero ones too.
    pub fn reasons(&self) -> Result<Vec<(Hook, Reason, ReasonCounter)>, MapsError> {
        let mut rows = Vec::new();
        for hook in Hook::ALL {
            for info in REASONS {
                let index = hook as u32 * maps::REASON_SLOTS + info.reason as u32;
                let mut sum = ReasonCounter::default();
                for cpu in self.reasons.read(index)? {
                    sum.packets += cpu.packets;
                    sum.bytes += cpu.bytes;
                }
                rows.push((hook, info.reason, sum));
            }
        }
        Ok(rows)
    }

    /// The counters of Service `id`.
    pub fn service(&self, id: u32) -> Result<ServiceCounter, MapsError> {
        let mut sum = ServiceCounter::default();
        for cpu in self.services.read(id)? {
            sum.forward_packets += cpu.forward_packets;
            sum.forward_bytes += cpu.forward_bytes;
            sum.reply_packets += cpu.reply_packets;
            sum.reply_bytes += cpu.reply_bytes;
            sum.new_flows += cpu.new_flows;
            sum.dropped_packets += cpu.dropped_packets;
        }
        Ok(sum)
    }

    /// The counters of backend `id`.
    pub fn backend(&self, id: u32) -> Result<BackendCounter, MapsError> {
        let mut sum = BackendCounter::default();
        for cpu in self.backends.read(id)? {
            sum.forward_packets += cpu.forward_packets;
            sum.forward_bytes += cpu.forward_bytes;
            sum.reply_packets += cpu.reply_packets;
            sum.reply_bytes += cpu.reply_bytes;
            sum.new_flows += cpu.new_flows;
        }
        Ok(sum)
    }

    /// Every kind of answer, zero ones too.
    pub fn answers(&self) -> Result<Vec<(AnswerKind, AnswerCounter)>, MapsError> {
        let mut rows = Vec::new();
        for kind in AnswerKind::ALL {
            let mut sum = AnswerCounter::default();
            for cpu in self.answers.read(kind as u32)? {
                sum.sent += cpu.sent;
                sum.limited += cpu.limited;
            }
            rows.push((kind, sum));
        }
        Ok(rows)
    }

    /// The flood guard, by CPU.
    pub fn flood(&self) -> Result<Vec<FloodCpu>, MapsError> {
        self.flood.read(0)
    }

    /// Zeroes the counters of Service `id`, before the id is given to another Service.
    pub fn clear_service(&mut self, id: u32) -> Result<(), MapsError> {
        clear(&mut self.services, id)
    }

    /// Zeroes the counters of backend `id`, before the id is given to another endpoint.
    pub fn clear_backend(&mut self, id: u32) -> Result<(), MapsError> {
        clear(&mut self.backends, id)
    }
}

fn clear<T: IntoBytes + FromBytes + Immutable + Copy + Default + 'static>(
    table: &mut PerCpuTable<T>,
    id: u32,
) -> Result<(), MapsError> {
    let name = table.name;
    let fail = |source| MapsError::Map { name, what: "clear", source };
    let cpus = aya::util::nr_cpus().map_err(|(_, e)| fail(MapError::IoError(e)))?;
    let zero = aya::maps::PerCpuValues::try_from(vec![Plain(T::default()); cpus])
        .map_err(|e| fail(MapError::IoError(e)))?;
    table.array.set(id, zero, 0).map_err(fail)
}
