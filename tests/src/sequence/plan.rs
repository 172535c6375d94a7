//! Worlds: the standard one, changed here and there.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use sluice_abi::{Addr, Delivery, IPPROTO_TCP, IPPROTO_UDP, Vtep, VtepKey, settings_flags};

use crate::world::{
    Be, FAMILIES, HOP_GATEWAY, HOP_ROUTER, PROTOCOLS, Svc, VNI_BARE, VTEP_BARE, World, ip, size,
    vni,
};

/// How a world differs from the standard one. Small and readable: it is saved with a failure.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Mode `replace`.
    pub replace: bool,
    /// `sluice bypass on`.
    pub bypass: bool,
    /// MTU of every way out, 0 for the standard one.
    pub mtu: u32,
    /// Frames are put into the veth of the pod that the kernel delivers to otherwise.
    pub redirect_to_stack_pod: bool,
    /// The kernel delivers to the pod into whose veth frames are put otherwise.
    pub stack_to_redirect_pod: bool,
    /// Every Service has session affinity.
    pub affinity: bool,
    /// Backends of Services (index into [`Svc::ALL`]) for clients outside and inside the cluster,
    /// as bits by [`Be::ALL`].
    pub extents: Vec<(u8, u8, u8)>,
    /// Services with policy Local, as bits by [`Svc::ALL`]: outside, inside.
    pub local: (u16, u16),
    /// The next hops through the uplinks are not resolved.
    pub unresolved: (bool, bool),
    /// SNAT ports, 0 for the standard number.
    pub snat_ports: u16,
    /// Tables that point nowhere, as bits: no tunnel address, no node address, a VTEP that is
    /// missing, an extent beyond the table.
    pub broken: u8,
    /// The tunnel without a vxlan device is known by its peer's address.
    pub bare_tunnel: bool,
    /// DSCP of outer headers; nothing for the inner one's.
    pub outer_dscp: Option<u8>,
    /// Nobody's address is reserved for pods that ask themselves.
    pub no_hairpin: bool,
    /// What has been bumped so far.
    pub epoch: u32,
}

impl Plan {
    /// The world.
    pub fn world(&self) -> World {
        static STANDARD: LazyLock<World> = LazyLock::new(World::standard);
        let mut world = STANDARD.clone();
        self.settings(&mut world);
        self.services(&mut world);
        self.ways(&mut world);
        self.broken(&mut world);
        world
    }

    fn settings(&self, world: &mut World) {
        let settings = &mut world.settings;
        for (on, flag) in
            [(self.replace, settings_flags::REPLACE), (self.bypass, settings_flags::BYPASS)]
        {
            settings.flags |= if on { flag } else { 0 };
        }
        if self.no_hairpin {
            (settings.hairpin_v4, settings.hairpin_v6) = (Addr::NONE, Addr::NONE);
        }
        if self.snat_ports != 0 {
            let ports = self.snat_ports.min(size::SNAT_LAST - size::SNAT_FIRST + 1);
            settings.snat_last_port = settings.snat_first_port + ports - 1;
        }
        settings.epoch += self.epoch;
    }

    fn services(&self, world: &mut World) {
        use sluice_abi::frontend_flags::{EXTERNAL_LOCAL, INTERNAL_LOCAL};
        if self.affinity {
            world.frontends.values_mut().for_each(|f| f.affinity_seconds = 10_800);
        }
        for &(service, outside, inside) in &self.extents {
            let service = Svc::ALL[usize::from(service) % Svc::ALL.len()];
            for family in FAMILIES {
                for proto in PROTOCOLS {
                    let mut extent = |bits: u8| {
                        let chosen = Be::ALL.iter().enumerate();
                        let chosen = chosen.filter(|(i, _)| bits & 1 << i != 0);
                        let ids: Vec<u32> = chosen.map(|(_, be)| be.id(family, proto)).collect();
                        world.extent(&ids)
                    };
                    let (external, internal) = (extent(outside), extent(inside));
                    let frontend = world.frontends.get_mut(&service.key(family, proto));
                    let frontend = frontend.expect("it is there");
                    (frontend.external, frontend.internal) = (external, internal);
                }
            }
        }
        for (i, service) in Svc::ALL.iter().enumerate() {
            for family in FAMILIES {
                for proto in [IPPROTO_TCP, IPPROTO_UDP] {
                    let frontend = world.frontends.get_mut(&service.key(family, proto));
                    let flags = &mut frontend.expect("it is there").flags;
                    for (bits, flag) in
                        [(self.local.0, EXTERNAL_LOCAL), (self.local.1, INTERNAL_LOCAL)]
                    {
                        *flags |= if bits & 1 << i != 0 { flag } else { 0 };
                    }
                }
            }
        }
    }

    fn ways(&self, world: &mut World) {
        for family in FAMILIES {
            for (change, addr, delivery) in [
                (self.redirect_to_stack_pod, ip::pod_stack(family), Delivery::Redirect),
                (self.stack_to_redirect_pod, ip::pod_redirect(family), Delivery::Stack),
            ] {
                if change {
                    world.pods.get_mut(&addr).expect("it is there").delivery = delivery as u16;
                }
            }
        }
        for hop in &mut world.next_hops {
            if self.mtu != 0 {
                hop.mtu = self.mtu;
            }
        }
        for (lost, hop) in [(self.unresolved.0, HOP_GATEWAY), (self.unresolved.1, HOP_ROUTER)] {
            if lost {
                world.next_hops[hop as usize].ifindex = 0;
            }
        }
        for vtep in &mut world.vteps {
            vtep.class = self.outer_dscp.unwrap_or_default() << 2;
            vtep.class_kept = if self.outer_dscp.is_some() { 0 } else { !Vtep::ECN };
        }
        if self.bare_tunnel {
            let source = ip::peer(sluice_abi::Family::V4);
            world.vtep_sources.insert(VtepKey { source, vni: vni(VNI_BARE) }, VTEP_BARE);
        }
    }

    fn broken(&self, world: &mut World) {
        if self.broken & 1 != 0 {
            for tunnel in &mut world.tunnels {
                (tunnel.addr_v4, tunnel.addr_v6) = (Addr::NONE, Addr::NONE);
            }
        }
        if self.broken & 2 != 0 {
            (world.settings.node_v4, world.settings.node_v6) = (Addr::NONE, Addr::NONE);
        }
        if self.broken & 4 != 0 {
            world.vtep_sources.values_mut().for_each(|index| *index += 1 << 20);
        }
        if self.broken & 8 != 0 {
            world.frontends.values_mut().for_each(|f| f.external.offset += 1 << 20);
        }
    }
}

/// Bits of few things: one, two, or anything.
fn some_of(width: u32) -> impl Strategy<Value = u8> {
    prop_oneof![
        3 => (0..width).prop_map(|i| 1u8 << i),
        2 => (0..width, 0..width).prop_map(|(i, j)| 1 << i | 1 << j),
        1 => any::<u8>(),
        1 => Just(0),
    ]
}

/// Worlds.
pub fn plan() -> impl Strategy<Value = Plan> {
    let rarely = |percent: f64| prop::bool::weighted(percent / 100.0);
    let base = (
        any::<bool>(),
        rarely(1.0),
        prop_oneof![6 => Just(0u32), 1 => 576u32..=1500, 1 => Just(1280), 1 => Just(1400)],
        rarely(20.0),
        rarely(20.0),
        rarely(20.0),
    );
    let services = (
        prop::collection::vec((0u8..16, some_of(8), some_of(8)), 0..3),
        prop_oneof![3 => Just((0u16, 0u16)), 1 => any::<(u16, u16)>()],
    );
    let ways = (
        prop_oneof![8 => Just((false, false)), 1 => any::<(bool, bool)>()],
        prop_oneof![8 => Just(0u16), 1 => 1u16..4],
        prop_oneof![20 => Just(0u8), 1 => 0u8..16],
        rarely(20.0),
        prop_oneof![4 => Just(Some(0)), 1 => prop::option::of(0u8..64)],
        rarely(15.0),
    );
    (base, services, ways).prop_map(|(base, services, ways)| {
        let (replace, bypass, mtu, redirect_to_stack_pod, stack_to_redirect_pod, affinity) = base;
        let (extents, local) = services;
        let (unresolved, snat_ports, broken, bare_tunnel, outer_dscp, no_hairpin) = ways;
        Plan {
            replace,
            bypass,
            mtu,
            redirect_to_stack_pod,
            stack_to_redirect_pod,
            affinity,
            extents,
            local,
            unresolved,
            snat_ports,
            broken,
            bare_tunnel,
            outer_dscp,
            no_hairpin,
            epoch: 0,
        }
    })
}
