//! Packets as data.
use sluice_abi::Hook;
use sluice_tests::kernel::{Kernel, OBJECT};
use sluice_tests::netns::{in_namespace, sh};
use sluice_tests::world::{World, size};

#[test]
fn it_loads() {
    in_namespace(|| {
        sh("ip link add up0 index 10 type veth peer name up0p index 110");
        let mut kernel = Kernel::load(OBJECT, size::FLOW_SETS);
        kernel.fill(&World::standard());
        println!("{:?}", kernel.run(Hook::Xdp, 10, &[0u8; 64]));
        println!("{:?}", kernel.run(Hook::TcEgress, 10, &[0u8; 64]));
    });
}
