//! Whether XDP at an uplink sees the VLAN tags of frames.
//!
//! A NIC may take a tag out of the frame and keep it beside it; a veth's other end may send it so.
//! XDP then takes a packet of another VLAN for an untagged one, and what it sends on has lost the
//! tag (measured on veth, 6.18: native; generic XDP keeps the tag where it does not see it).
//!
//! ```text
//!  physical NIC, bond's ports   the receiver's rx-vlan-*   obstacle: XDP is not attached, the uplink is the kernel's
//!  veth                         the sender's tx-vlan-*     note: tags come only from this machine
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::ethtool::{self, Feature};
use super::kernel::{Kernel, Link};
use super::pod_end::{interface, namespaces, within};
use crate::netlink::Netlink;

/// Features by which a receiver takes tags out of frames (net/ethtool/common.c).
const TAKEN_OUT: [&str; 2] = ["rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"];
/// Features by which a sender may leave the tag beside the frame.
const KEPT_BESIDE: [&str; 2] = ["tx-vlan-hw-insert", "tx-vlan-stag-hw-insert"];
/// A veth's other end is looked at again after this time.
const FRESH: Duration = Duration::from_secs(30);

/// A device whose features hide tags from XDP at an uplink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    /// The uplink.
    pub uplink: String,
    /// The device: the uplink, a port of it, or its other end.
    pub device: String,
    /// The device is the other end of the uplink, perhaps in another network namespace.
    pub other_end: bool,
    /// The kernel's names of the features.
    pub features: Vec<String>,
    /// All of them can be switched off.
    #[serde(skip, default)]
    pub changeable: bool,
}

impl Hidden {
    /// The command that would switch them off.
    pub fn command(&self) -> String {
        let place = if self.other_end {
            format!(", at the other end of {}", self.uplink)
        } else {
            String::new()
        };
        let word = |feature: &String| match feature.as_str() {
            "rx-vlan-hw-parse" => " rxvlan off".to_owned(),
            "tx-vlan-hw-insert" => " txvlan off".to_owned(),
            other => format!(" {other} off"),
        };
        let words: String = self.features.iter().map(word).collect();
        format!("ethtool -K {}{words}{place}", self.device)
    }
}

/// Looks where tags are hidden, and remembers other ends for a while.
#[derive(Default)]
pub struct Tags {
    known: HashMap<(u32, u32), (Instant, Vec<Hidden>)>,
}

impl Tags {
    /// What hides tags from XDP at `uplink`. What cannot be looked at is taken for harmless.
    pub fn hidden(&mut self, netlink: &mut Netlink, kernel: &Kernel, uplink: &Link) -> Vec<Hidden> {
        let ports = |port: &&Link| port.controller == Some(uplink.ifindex);
        match (uplink.kind.as_str(), uplink.peer) {
            ("", _) => on(uplink, &uplink.name, false, &TAKEN_OUT),
            ("bond" | "team", _) => {
                let ports = kernel.links.values().filter(ports);
                ports.flat_map(|port| on(uplink, &port.name, false, &TAKEN_OUT)).collect()
            }
            ("veth", Some(peer)) => {
                let now = Instant::now();
                self.known.retain(|_, (at, _)| now.duration_since(*at) < FRESH);
                let key = (uplink.ifindex, peer);
                if let Some((_, hidden)) = self.known.get(&key) {
                    return hidden.clone();
                }
                let look = |device: &str| on(uplink, device, true, &KEPT_BESIDE);
                let hidden = at_other_end(netlink, kernel, uplink, peer, look).unwrap_or_default();
                self.known.insert(key, (now, hidden.clone()));
                hidden
            }
            _ => Vec::new(),
        }
    }

    /// Switches the features off, or on again.
    ///
    /// # Errors
    /// Why one could not be switched.
    pub fn switch(
        &mut self,
        netlink: &mut Netlink,
        kernel: &Kernel,
        hidden: &Hidden,
        on: bool,
    ) -> Result<(), String> {
        self.known.clear();
        let switch = |device: &str| {
            hidden.features.iter().try_for_each(|name| match ethtool::switch(device, name, on) {
                Ok(is) if is == on => Ok(()),
                Ok(_) => Err(format!("{name}: the driver refuses")),
                Err(e) => Err(format!("{name}: {e}")),
            })
        };
        if !hidden.other_end {
            return switch(&hidden.device);
        }
        let uplink = kernel.link(&hidden.uplink).ok_or("the interface is gone")?;
        let peer = uplink.peer.ok_or("the interface is no veth any more")?;
        at_other_end(netlink, kernel, uplink, peer, switch)?
    }
}

/// The device, if some of `features` are on there.
fn on(uplink: &Link, device: &str, other_end: bool, features: &[&str]) -> Vec<Hidden> {
    let there: BTreeMap<String, Feature> = match ethtool::features(device) {
        Ok(there) => there,
        Err(e) => {
            tracing::debug!("{device}: features: {e}");
            return Vec::new();
        }
    };
    let found: Vec<(&str, &Feature)> = features
        .iter()
        .filter_map(|name| Some((*name, there.get(*name).filter(|feature| feature.on)?)))
        .collect();
    if found.is_empty() {
        return Vec::new();
    }
    vec![Hidden {
        uplink: uplink.name.clone(),
        device: device.to_owned(),
        other_end,
        features: found.iter().map(|(name, _)| (*name).to_owned()).collect(),
        changeable: found.iter().all(|(_, feature)| feature.changeable),
    }]
}

/// Does `work` where the other end of a veth is, with its name there.
fn at_other_end<T: Send>(
    netlink: &mut Netlink,
    kernel: &Kernel,
    veth: &Link,
    peer: u32,
    work: impl FnOnce(&str) -> T + Send,
) -> Result<T, String> {
    let Some(id) = veth.peer_netns else {
        return match kernel.links.get(&peer) {
            Some(link) => Ok(work(&link.name)),
            None => Err("the other end is gone".to_owned()),
        };
    };
    let found: BTreeMap<i32, File> = namespaces(netlink, &[id].into());
    let namespace = found.get(&id).ok_or("the other end's network namespace was not found")?;
    within(namespace, |there| {
        let link = interface(there, peer).ok_or("the other end is gone")?;
        Ok(work(&link.name))
    })?
}
