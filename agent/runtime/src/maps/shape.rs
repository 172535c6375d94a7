//! What each map looks like, and whether a pinned one does.
//!
//! aya opens a pin without comparing it, so that a map of another layout would be written with our
//! bytes. The names carry the layout's version; what can still differ are the sizes in the config.

use aya::maps::{MapInfo, MapType};
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Backend, BackendCounter, Bucket, FloodCpu, FloodWord, FlowSet,
    Fragment, Frontend, FrontendKey, Hook, JUMP_SLOTS, MAX_TUNNELS, Near, NextHop, Pod,
    ReasonCounter, Scratch, ServiceCounter, Settings, SnatSlot, Tunnel, Vtep, VtepKey, maps,
};

use super::{MapsError, Pins};
use crate::config;

/// What a map must look like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub map_type: MapType,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Number of entries.
    pub max_entries: u32,
}

/// All maps with the sizes that `sizes` asks for.
pub fn shapes(sizes: &config::Maps) -> Vec<Shape> {
    use MapType::{Array, Hash, PerCpuArray, ProgramArray};
    fn shape<K, V>(name: &'static str, map_type: MapType, max_entries: u32) -> Shape {
        Shape {
            name,
            map_type,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            max_entries,
        }
    }
    let reasons = Hook::ALL.len() as u32 * maps::REASON_SLOTS;
    vec![
        shape::<u32, Settings>(maps::SETTINGS, Array, 1),
        shape::<FrontendKey, Frontend>(maps::FRONTEND, Hash, sizes.frontends),
        shape::<u32, u32>(maps::MAGLEV, Array, sizes.maglev),
        shape::<u32, Backend>(maps::BACKEND, Array, sizes.backends),
        shape::<Addr, Pod>(maps::POD, Hash, sizes.pods),
        shape::<u32, Vtep>(maps::VTEP, Array, sizes.vteps),
        shape::<VtepKey, u32>(maps::VTEP_SOURCE, Hash, sizes.vtep_sources),
        shape::<u32, Tunnel>(maps::TUNNEL, Array, MAX_TUNNELS),
        shape::<u32, NextHop>(maps::NEXTHOP, Array, sizes.nexthops),
        shape::<u32, FlowSet>(maps::FLOW, Array, sizes.all_flow_sets()),
        shape::<u32, u32>(maps::FLOW_LOCK, Array, maps::FLOW_LOCKS),
        shape::<u32, Scratch>(maps::SCRATCH, PerCpuArray, 1),
        shape::<u32, SnatSlot>(maps::SNAT, Array, maps::SNAT_SLOTS),
        shape::<u32, ReasonCounter>(maps::REASON, PerCpuArray, reasons),
        shape::<u32, ServiceCounter>(maps::SERVICE_STAT, PerCpuArray, sizes.services),
        shape::<u32, BackendCounter>(maps::BACKEND_STAT, PerCpuArray, sizes.backends),
        shape::<u32, u32>(maps::JUMP, ProgramArray, JUMP_SLOTS),
        shape::<u32, u32>(maps::JUMP_TC, ProgramArray, JUMP_SLOTS),
        shape::<u32, AnswerCounter>(maps::ANSWER, PerCpuArray, AnswerKind::ALL.len() as u32),
        shape::<u32, Bucket>(maps::BUCKET, Array, Bucket::SOURCES),
        shape::<u32, Bucket>(maps::BUCKET_CPU, PerCpuArray, 1),
        shape::<u32, Fragment>(maps::FRAGMENT, Array, sizes.fragments),
        shape::<u32, Near>(maps::NEAR, PerCpuArray, 1),
        shape::<u32, u32>(maps::LOOKUPS, Array, 1),
        shape::<u32, FloodWord>(maps::FLOOD, Array, 1),
        shape::<u32, FloodCpu>(maps::FLOOD_CPU, PerCpuArray, 1),
    ]
}

/// Compares every map that is already pinned with what is needed.
///
/// # Errors
/// The first difference, with both values.
pub fn check_pins(pins: &Pins, shapes: &[Shape]) -> Result<(), MapsError> {
    for shape in shapes {
        let path = pins.map_path(shape.name);
        if !path.exists() {
            continue;
        }
        let fail =
            |source| MapsError::Map { name: shape.name, what: "look at the pinned map", source };
        let info = MapInfo::from_pin(&path).map_err(fail)?;
        let differs = |field, found: String, wanted: String| MapsError::Shape {
            path: path.clone(),
            field,
            found,
            wanted,
        };
        let found_type = info.map_type().map_err(fail)?;
        if found_type != shape.map_type {
            return Err(differs(
                "its kind",
                format!("{found_type:?}"),
                format!("{:?}", shape.map_type),
            ));
        }
        for (field, found, wanted) in [
            ("the size of its keys", info.key_size(), shape.key_size),
            ("the size of its values", info.value_size(), shape.value_size),
            ("its number of entries", info.max_entries(), shape.max_entries),
        ] {
            if found != wanted {
                return Err(differs(field, found.to_string(), wanted.to_string()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_of_the_contract_has_a_shape() {
        let shapes = shapes(&config::Config::default().maps);
        let names: Vec<_> = shapes.iter().map(|s| s.name).collect();
        assert_eq!(names, maps::ALL);
    }
}
