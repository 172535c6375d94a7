//! Builds the object that the agent loads and its twin with trapped helpers; the suites find them at
//! `env!("SLUICE_BPF_OBJECT")` and `env!("SLUICE_BPF_TRAP_OBJECT")`.

use sluice_bpf_build::Variant;

fn main() {
    sluice_bpf_build::run(&[Variant::Product, Variant::Trap]);
}
