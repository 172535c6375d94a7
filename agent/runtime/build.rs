//! Builds the BPF object that the agent carries; its path is `env!("SLUICE_BPF_OBJECT")`.

use sluice_bpf_build::Variant;

fn main() {
    sluice_bpf_build::run(&[Variant::Product]);
}
