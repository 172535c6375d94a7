//! The loaded object: its maps, its programs by name, and the one that tells the time.

use std::path::Path;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_obj::programs::XdpAttachType;

use super::pins::clock_path;
use super::{AttachError, CLOCK, OBJECT, without_frags};
use crate::maps::{Pins, Shape};

pub(super) fn run_clock(program: &Xdp) -> Result<u32, AttachError> {
    let frame = [0u8; 64];
    let mut options = TestRunOptions::new();
    options.data_in = Some(&frame);
    let result = program
        .test_run(options)
        .map_err(|source| AttachError::Program { name: CLOCK, source: Box::new(source) })?;
    Ok(result.return_value & 0x7fff_ffff)
}

/// The low 31 bits of the kernel's tick counter, by the program that an agent pinned.
///
/// # Errors
/// When there is no such program or the kernel does not run it.
pub fn pinned_jiffies(pin_dir: &Path) -> Result<u32, AttachError> {
    let program = Xdp::from_pin(clock_path(pin_dir), XdpAttachType::Interface)
        .map_err(|source| AttachError::Program { name: CLOCK, source: Box::new(source) })?;
    run_clock(&program)
}

/// Creates or reuses the maps, each pinned under the name that `pin` gives it. No program is loaded.
pub(super) fn load(
    pins: &Pins,
    shapes: &[Shape],
    frags: bool,
    pin: impl Fn(&'static str) -> &'static str,
) -> Result<Ebpf, AttachError> {
    let mut loader = EbpfLoader::new();
    for Shape { name, max_entries, .. } in shapes {
        loader.map_max_entries(name, *max_entries);
        loader.map_pin_path(name, pins.map_path(pin(name)));
    }
    let loaded = if frags { loader.load(OBJECT) } else { loader.load(&without_frags(OBJECT)) };
    loaded.map_err(|source| AttachError::Load { source: Box::new(source) })
}

pub(super) fn load_xdp(ebpf: &mut Ebpf, name: &'static str) -> Result<(), AttachError> {
    let fail = |source| AttachError::Program { name, source: Box::new(source) };
    xdp(ebpf, name)?.load().map_err(fail)
}

pub(super) fn program_id(ebpf: &Ebpf, name: &str) -> Option<u32> {
    let info = match ebpf.program(name)? {
        aya::programs::Program::Xdp(p) => p.info().ok()?,
        aya::programs::Program::SchedClassifier(p) => p.info().ok()?,
        _ => return None,
    };
    Some(info.id())
}

pub(super) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, AttachError> {
    ebpf.program_mut(name)
        .ok_or(AttachError::NoProgram { name })?
        .try_into()
        .map_err(|_| AttachError::NoProgram { name })
}

pub(super) fn tc<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, AttachError> {
    ebpf.program_mut(name)
        .ok_or(AttachError::NoProgram { name })?
        .try_into()
        .map_err(|_| AttachError::NoProgram { name })
}
