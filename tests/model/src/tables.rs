//! A node's tables as plain maps: what the agent writes.

use std::collections::BTreeMap;

use sluice_abi::{
    Addr, Backend, Be32, Extent, Frontend, FrontendKey, Mac, NextHop, Pod, Route, Settings, Tunnel,
    Vtep, VtepKey, frontend_flags, settings_flags,
};

/// What the agent tells the programs.
#[derive(Clone, PartialEq, Debug)]
pub struct Tables {
    /// The settings.
    pub settings: Settings,
    /// Where Services are reached.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Consistent-hash extents: backend ids.
    pub maglev: Vec<u32>,
    /// By backend id.
    pub backends: BTreeMap<u32, Backend>,
    /// Pods of this node.
    pub pods: BTreeMap<Addr, Pod>,
    /// By VTEP index.
    pub vteps: BTreeMap<u32, Vtep>,
    /// Who may send into the tunnels: VTEP index.
    pub vtep_sources: BTreeMap<VtepKey, u32>,
    /// By tunnel index.
    pub tunnels: BTreeMap<u32, Tunnel>,
    /// By next hop index; one that is not resolved has no interface.
    pub next_hops: BTreeMap<u32, NextHop>,
}

impl Tables {
    /// `sluice bypass on`.
    pub fn bypass(&self) -> bool {
        self.settings.flags & settings_flags::BYPASS != 0
    }

    /// Mode `replace`: nobody but us knows the Services.
    pub fn replace(&self) -> bool {
        self.settings.flags & settings_flags::REPLACE != 0
    }

    /// The different backends of an extent; nothing where the extent or a backend is missing.
    pub fn backends_of(&self, extent: Extent) -> Vec<Option<(u32, Backend)>> {
        let mut ids: Vec<Option<u32>> = (0..extent.size)
            .map(|i| self.maglev.get((extent.offset + i) as usize).copied())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        let entry = |id: Option<u32>| {
            let backend = self.backends.get(&id?)?;
            (backend.route != Route::None as u16).then_some((id?, *backend))
        };
        ids.into_iter().map(entry).collect()
    }

    /// The tunnel that a VTEP belongs to.
    pub fn tunnel_of(&self, vtep: u32) -> Option<&Tunnel> {
        self.tunnels.get(&self.vteps.get(&vtep)?.tunnel)
    }

    /// The kernel's vxlan device behind a VTEP, if there is one.
    pub fn device_of(&self, vtep: u32) -> Option<u32> {
        self.tunnel_of(vtep).map(|t| t.ifindex).filter(|&i| i != 0)
    }

    /// Whether one of our tunnels has this VNI and this address of ours.
    pub fn is_our_tunnel(&self, vni: Be32, local: Addr) -> bool {
        self.tunnels.values().any(|t| t.vni == vni && t.local == local)
    }

    /// Whether an uplink's frame with this destination is this node's. Of an uplink of which nothing
    /// is said every frame is.
    pub fn is_own_mac(&self, uplink: u32, mac: Mac) -> bool {
        let mut own = self.settings.own_macs.iter().filter(|own| own.ifindex == uplink).peekable();
        own.peek().is_none() || own.any(|own| own.mac == mac || own.mac == Mac::default())
    }

    /// Whether an address is Services' alone.
    pub fn is_vip(&self, addr: Addr) -> bool {
        let frontend = self.frontends.get(&FrontendKey::address(addr));
        frontend.is_some_and(|f| f.flags & frontend_flags::ADDRESS != 0)
    }

    /// Whether an address is nobody's, and stands for a pod that asks itself.
    pub fn is_borrowed(&self, addr: Addr) -> bool {
        let Settings { hairpin_v4, hairpin_v6, .. } = self.settings;
        !addr.is_none() && [hairpin_v4, hairpin_v6].contains(&addr)
    }

    /// Whether a port is one on which this node itself must stay reachable.
    pub fn is_fail_safe(&self, key: &FrontendKey) -> bool {
        let ours = [self.settings.node_v4, self.settings.node_v6].contains(&key.addr);
        let ports = match key.proto {
            sluice_abi::IPPROTO_TCP => &self.settings.fail_safe_tcp,
            _ => &self.settings.fail_safe_udp,
        };
        ours && key.port.host() != 0 && ports.contains(&key.port)
    }
}
