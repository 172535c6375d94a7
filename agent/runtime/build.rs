//! Builds the BPF objects that the agent carries: its own and the wrapper of `sluice bench`. Their
//! paths are `env!("SLUICE_BPF_OBJECT")` and `env!("SLUICE_BPF_BENCH_OBJECT")`.

use sluice_bpf_build::Variant;

fn main() {
    sluice_bpf_build::run(&[Variant::Product, Variant::Bench]);
}
