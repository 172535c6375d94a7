//! The programs that the fast ones leave packets to: loaded, and put where a tail call finds them.

use aya::Ebpf;
use aya::maps::{MapError, ProgramArray};
use aya::programs::{Program, ProgramError, ProgramFd};
use sluice_abi::{Hook, LANES, Lane, maps};

use crate::describe::causes;

/// Why the lanes are not complete.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The object is not ours.
    #[error("the BPF object has no {kind} {name}")]
    Missing {
        /// A map or a program.
        kind: &'static str,
        /// Which.
        name: &'static str,
    },
    /// The kernel does not take a program.
    #[error("load program {name}: {}", causes(source))]
    Program {
        /// Which program.
        name: &'static str,
        /// What aya says, with the verifier's words.
        source: Box<ProgramError>,
    },
    /// The kernel does not take an entry.
    #[error("map {name}: {}", causes(source))]
    Map {
        /// Which map.
        name: &'static str,
        /// What aya says.
        source: MapError,
    },
}

/// Loads every lane's program and fills `sl_jump_v1` and `sl_jumptc_v1`. Programs that run already
/// find the new ones from then on.
///
/// # Errors
/// When the object lacks one, or the kernel refuses it.
pub fn fill_lanes(ebpf: &mut Ebpf) -> Result<(), LaneError> {
    fill(ebpf, |_| true)
}

/// The same for `sl_jump_v1` alone.
///
/// # Errors
/// As [`fill_lanes`].
pub fn fill_xdp_lanes(ebpf: &mut Ebpf) -> Result<(), LaneError> {
    fill(ebpf, |hook| hook == Hook::Xdp)
}

fn fill(ebpf: &mut Ebpf, wanted: impl Fn(Hook) -> bool) -> Result<(), LaneError> {
    for (hook, lane, name) in LANES.iter().filter(|(hook, ..)| wanted(*hook)) {
        let fd = load(ebpf, name)?;
        put(ebpf, *hook, *lane, &fd)?;
    }
    Ok(())
}

fn load(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, LaneError> {
    let missing = LaneError::Missing { kind: "program", name };
    let fail = |source| LaneError::Program { name, source: Box::new(source) };
    let fd = match ebpf.program_mut(name).ok_or(missing)? {
        Program::Xdp(program) => {
            if program.fd().is_err() {
                program.load().map_err(fail)?;
            }
            program.fd().map_err(fail)?.try_clone()
        }
        Program::SchedClassifier(program) => {
            if program.fd().is_err() {
                program.load().map_err(fail)?;
            }
            program.fd().map_err(fail)?.try_clone()
        }
        _ => return Err(LaneError::Missing { kind: "XDP or TC program", name }),
    };
    fd.map_err(|e| fail(ProgramError::IOError(e)))
}

fn put(ebpf: &mut Ebpf, hook: Hook, lane: Lane, program: &ProgramFd) -> Result<(), LaneError> {
    let name = if hook == Hook::Xdp { maps::JUMP } else { maps::JUMP_TC };
    let map = ebpf.map_mut(name).ok_or(LaneError::Missing { kind: "map", name })?;
    let fail = |source| LaneError::Map { name, source };
    let mut array: ProgramArray<_> = map.try_into().map_err(fail)?;
    array.set(lane.slot(hook), program, 0).map_err(fail)
}
