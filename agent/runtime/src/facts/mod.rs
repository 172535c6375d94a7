//! Facts of this node: what netlink, the pods' namespaces and netfilter say, in the words of
//! `sluice-control`. Read-only but for one thing: a neighbour whose MAC is needed and not known is
//! asked for, as the kernel itself would.
//!
//! ```text
//!  links, addresses, routes, neighbours, FDB ─► Kernel ─► uplinks, tunnels, peers, pods ─► NodeContext
//!  pods' namespaces (GRO, XDP, MAC) ─► PodEnds ──────────────────────────────┘
//!  netfilter rules ──────────────────────────────────────────────────────────┘
//! ```

pub mod ethtool;
pub mod kernel;
mod netfilter;
mod pod_end;
mod tags;
pub mod xdp_features;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use sluice_abi::Mac;
use sluice_control::model::{
    FailSafe, MaglevSettings, Mode, NextHopFacts, ObjectName, PeerFacts, PodFacts, TunnelFacts,
};
use sluice_control::{NodeContext, Snapshot};

use crate::config::{Behaviour, Config, DeliveryChoice, Pattern};
use crate::netlink::{Netlink, NetlinkError};
use kernel::{Kernel, Link};

pub use netfilter::rules as netfilter_rules;
pub use pod_end::{PodEnd, PodEnds};
pub use tags::{Hidden, Tags};

/// A stale neighbour is checked this often: frames that we send do not refresh the kernel's entry.
const CHECK_STALE: Duration = Duration::from_secs(20);
/// An unanswered question is repeated this often.
const CHECK_MISSING: Duration = Duration::from_secs(1);

/// Facts without next hops.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What compiling needs.
    pub context: NodeContext,
    /// Interfaces towards the network.
    pub uplinks: Vec<Link>,
    /// Kernel vxlan devices that take part.
    pub tunnel_devices: Vec<Link>,
    /// Host sides of pods, or the bridge that they are behind.
    pub pod_devices: Vec<Link>,
    /// Why pods behind an interface are not delivered to by redirect, by interface.
    pub stack_reasons: BTreeMap<String, String>,
    /// What a person should know, one sentence each.
    pub notes: Vec<String>,
    /// The kernel's tables that all this came from.
    pub kernel: Kernel,
}

/// Reads facts.
pub struct Collector {
    netlink: Netlink,
    ends: PodEnds,
    tags: Tags,
    asked: HashMap<(u32, IpAddr), Instant>,
}

impl Collector {
    /// A reader in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn new() -> Result<Self, NetlinkError> {
        Ok(Self {
            netlink: Netlink::open()?,
            ends: PodEnds::default(),
            tags: Tags::default(),
            asked: HashMap::new(),
        })
    }

    /// Reads everything except next hops.
    ///
    /// # Errors
    /// When one of the kernel's tables cannot be read.
    pub fn read(&mut self, config: &Config, snapshot: &Snapshot) -> Result<Facts, NetlinkError> {
        let kernel = Kernel::read(&mut self.netlink)?;
        let node_name = config.node_name();
        let pod_cidrs =
            snapshot.nodes.get(node_name.as_str()).map(|n| n.pod_cidrs.clone()).unwrap_or_default();
        let mut facts = join(&kernel, config, &pod_cidrs);
        facts.context.node_name = node_name.into();
        let wants_ends =
            facts.pod_devices.iter().any(|l| config.delivery_of(&l.name) != DeliveryChoice::Stack);
        if wants_ends {
            self.choose_delivery(&mut facts, config);
        } else {
            let configured = |link: &Link| (link.name.clone(), "configured".to_owned());
            facts.stack_reasons = facts.pod_devices.iter().map(configured).collect();
        }
        facts.kernel = kernel;
        Ok(facts)
    }

    fn choose_delivery(&mut self, facts: &mut Facts, config: &Config) {
        let rules = netfilter_rules();
        let veths: Vec<&Link> = facts.pod_devices.iter().collect();
        let ends = self.ends.inspect(&mut self.netlink, &veths);
        for link in &facts.pod_devices {
            let choice = config.delivery_of(&link.name);
            let refusal = match (choice, ends.get(&link.ifindex)) {
                (DeliveryChoice::Stack, _) => Some("configured".to_owned()),
                (_, None) => Some("not a veth".to_owned()),
                (_, Some(PodEnd::Unknown(reason))) => Some(reason.clone()),
                (DeliveryChoice::Peer, Some(_)) => None,
                (_, Some(PodEnd::Deaf { reason, .. })) => Some(reason.clone()),
                (DeliveryChoice::Auto, Some(PodEnd::Receives { .. })) => {
                    rules.clone().map(|r| format!("redirect would skip the host's netfilter: {r}"))
                }
                (DeliveryChoice::Redirect, Some(PodEnd::Receives { .. })) => None,
            };
            let seen = ends.get(&link.ifindex).and_then(PodEnd::seen);
            for pod in facts.context.pods.values_mut().filter(|p| p.ifindex == link.ifindex) {
                if let Some((mac, mtu)) = seen {
                    pod.pod_mac = mac;
                    pod.mtu = pod.mtu.min(mtu);
                }
                pod.redirect = refusal.is_none() && !pod.pod_mac.is_zero();
                pod.peer = choice == DeliveryChoice::Peer;
            }
            if let Some(reason) = refusal {
                facts.stack_reasons.insert(link.name.clone(), reason);
            }
        }
    }

    /// How to reach each of `wanted`; asks for neighbours that are not known. Destinations without
    /// a route are left out.
    pub fn next_hops(
        &mut self,
        kernel: &Kernel,
        wanted: &BTreeSet<IpAddr>,
    ) -> BTreeMap<IpAddr, NextHopFacts> {
        let known: HashMap<(u32, IpAddr), (Mac, bool)> =
            kernel.neighbours.iter().map(|n| ((n.ifindex, n.address), (n.mac, n.stale))).collect();
        let mut found = BTreeMap::new();
        for destination in wanted {
            let Some(exit) = kernel::route_to(&mut self.netlink, *destination) else {
                continue;
            };
            let Some(link) = kernel.links.get(&exit.ifindex) else {
                continue;
            };
            // Frames cannot be handed to a tunnel device, and a device without MACs takes none.
            if link.vxlan.is_some() || link.loopback || link.mac.is_zero() {
                continue;
            }
            let key = (exit.ifindex, exit.neighbour);
            let fact = match known.get(&key) {
                Some((mac, stale)) => {
                    if *stale {
                        self.ask(key, CHECK_STALE);
                    }
                    NextHopFacts::Resolved {
                        ifindex: exit.ifindex,
                        mtu: exit.mtu.unwrap_or(link.mtu).min(link.mtu),
                        dst_mac: *mac,
                        src_mac: link.mac,
                    }
                }
                None => {
                    self.ask(key, CHECK_MISSING);
                    NextHopFacts::Unresolved {}
                }
            };
            found.insert(*destination, fact);
        }
        found
    }

    /// What hides VLAN tags from XDP at the uplinks.
    pub fn hidden_tags(&mut self, facts: &Facts) -> Vec<Hidden> {
        let look = |uplink| self.tags.hidden(&mut self.netlink, &facts.kernel, uplink);
        facts.uplinks.iter().flat_map(look).collect()
    }

    /// Switches a feature that hides tags off.
    ///
    /// # Errors
    /// Why it could not be switched.
    pub fn unhide(&mut self, facts: &Facts, hidden: &Hidden) -> Result<(), String> {
        self.tags.switch(&mut self.netlink, &facts.kernel, hidden, false)
    }

    fn ask(&mut self, key: (u32, IpAddr), every: Duration) {
        let now = Instant::now();
        if self.asked.get(&key).is_some_and(|last| now.duration_since(*last) < every) {
            return;
        }
        self.asked.insert(key, now);
        kernel::resolve(&mut self.netlink, key.0, key.1);
    }
}

/// What follows from the kernel's tables alone.
pub fn join(kernel: &Kernel, config: &Config, pod_cidrs: &[IpNet]) -> Facts {
    let mut facts = Facts::default();
    let excluded = |link: &Link| any(&config.datapath.exclude_interfaces, &link.name);
    facts.uplinks = uplinks(kernel, config, &mut facts.notes);
    facts.tunnel_devices = kernel
        .links
        .values()
        .filter(|l| {
            l.vxlan.as_ref().is_some_and(|v| !v.external && v.vni != 0 && v.port != 0)
                && !excluded(l)
                && (config.datapath.tunnel_devices.is_empty()
                    || any(&config.datapath.tunnel_devices, &l.name))
        })
        .cloned()
        .collect();
    let own: Vec<(u32, IpAddr)> = kernel
        .addresses
        .iter()
        .filter(|(_, a, _, _)| !a.is_loopback())
        .map(|(index, a, _, _)| (*index, *a))
        .collect();
    let context = &mut facts.context;
    context.mode = match config.datapath.behaviour {
        Behaviour::Accelerate => Mode::Accelerate,
        Behaviour::Replace => Mode::Replace,
    };
    context.addresses = own.iter().map(|(_, a)| *a).collect();
    context.node_port_addresses = kernel
        .addresses
        .iter()
        .filter(|(index, address, _, global)| {
            let pod_side = kernel.links.get(index).is_some_and(|l| l.vxlan.is_some());
            if config.node_port_addresses.is_empty() {
                *global && !address.is_loopback() && !pod_side
            } else {
                config.node_port_addresses.iter().any(|net| net.contains(address))
            }
        })
        .map(|(_, address, _, _)| *address)
        .collect();
    context.outer_dscp = config.datapath.outer_dscp;
    context.pod_cidrs = pod_cidrs.to_vec();
    context.maglev =
        MaglevSettings { max_size: config.maglev.max_table, cluster_seed: config.cluster_seed };
    context.fail_safe = FailSafe {
        tcp: config.fail_safe.tcp.iter().copied().collect(),
        udp: config.fail_safe.udp.iter().copied().collect(),
    };
    context.snat_ports = Some((config.snat.first_port, config.snat.last_port));
    context.opt_out =
        config.opt_out_services.iter().map(|s| ObjectName::new(s.namespace(), s.name())).collect();
    for device in &facts.tunnel_devices {
        match tunnel(kernel, device, pod_cidrs) {
            Ok(tunnel) => {
                peers(kernel, &tunnel, &mut context.peers, &mut facts.notes);
                context.tunnels.push(tunnel);
            }
            Err(reason) => facts.notes.push(reason),
        }
    }
    let not_pods: BTreeSet<u32> =
        facts.uplinks.iter().chain(&facts.tunnel_devices).map(|l| l.ifindex).collect();
    pods(kernel, pod_cidrs, &not_pods, &excluded, context);
    let devices: BTreeSet<u32> = context.pods.values().map(|p| p.ifindex).collect();
    facts.pod_devices =
        devices.into_iter().filter_map(|index| kernel.links.get(&index).cloned()).collect();
    facts
}

/// Destination MACs of frames for this node, by uplink: the uplink's own, and those of the devices of
/// this namespace that stand on it (bridge, bond, VLAN, macvlan). A pod's macvlan is in another one
/// and not this node's.
pub fn own_macs(kernel: &Kernel, uplinks: &[Link]) -> Vec<(u32, Mac)> {
    let mut macs = Vec::new();
    for uplink in uplinks {
        let mut devices = BTreeSet::from([uplink.ifindex]);
        loop {
            let above = |l: &Link| l.below.is_some_and(|b| devices.contains(&b));
            let mut more: BTreeSet<u32> =
                kernel.links.values().filter(|l| above(l)).map(|l| l.ifindex).collect();
            more.extend(
                devices.iter().filter_map(|d| kernel.links.get(d)).filter_map(|l| l.controller),
            );
            let known = devices.len();
            devices.extend(more);
            if devices.len() == known {
                break;
            }
        }
        let of_uplink: BTreeSet<Mac> =
            devices.iter().filter_map(|d| kernel.links.get(d)).map(|l| l.mac).collect();
        // A device without a link-layer address has none in its frames either.
        let any = of_uplink.contains(&Mac::default());
        let of_uplink = if any { BTreeSet::from([Mac::default()]) } else { of_uplink };
        macs.extend(of_uplink.into_iter().map(|mac| (uplink.ifindex, mac)));
    }
    macs
}

fn any(patterns: &[Pattern], name: &str) -> bool {
    patterns.iter().any(|p| p.matches(name))
}

fn uplinks(kernel: &Kernel, config: &Config, notes: &mut Vec<String>) -> Vec<Link> {
    let default_routes: BTreeSet<u32> = kernel
        .routes
        .iter()
        .filter(|r| r.destination.prefix_len() == 0)
        .map(|r| r.ifindex)
        .collect();
    let wanted = &config.datapath.uplinks;
    let found: Vec<Link> = kernel
        .links
        .values()
        .filter(|l| {
            !l.loopback
                && l.vxlan.is_none()
                && !any(&config.datapath.exclude_interfaces, &l.name)
                && if wanted.is_empty() {
                    default_routes.contains(&l.ifindex)
                } else {
                    any(wanted, &l.name)
                }
        })
        .cloned()
        .collect();
    if wanted.is_empty() && found.is_empty() {
        notes.push(
            "no interface carries a default route; name the uplinks in datapath.uplinks".to_owned(),
        );
    }
    for pattern in wanted {
        if !found.iter().any(|l| pattern.matches(&l.name)) {
            notes.push(format!("datapath.uplinks: no interface fits {:?}", pattern.as_str()));
        }
    }
    found
}

/// A kernel vxlan device as a tunnel, or why it cannot be one.
fn tunnel(kernel: &Kernel, device: &Link, pod_cidrs: &[IpNet]) -> Result<TunnelFacts, String> {
    let settings = device.vxlan.clone().unwrap_or_default();
    let underlay = settings
        .local
        .or_else(|| {
            let lower = settings.lower?;
            kernel
                .addresses
                .iter()
                .find(|(index, _, _, global)| *index == lower && *global)
                .map(|(_, address, _, _)| *address)
        })
        .ok_or_else(|| {
            format!(
                "{}: the vxlan device has no local address; packets from other nodes are left to \
                 the kernel (set one: ip link set {} type vxlan local ADDRESS)",
                device.name, device.name
            )
        })?;
    // SNAT source: Flannel gives the device an address of the pod CIDR; else any own address in it.
    let inner = |v4: bool| {
        let on_device = kernel
            .addresses
            .iter()
            .find(|(index, a, _, global)| *index == device.ifindex && *global && a.is_ipv4() == v4)
            .map(|(_, a, _, _)| *a);
        on_device.or_else(|| {
            kernel
                .addresses
                .iter()
                .map(|(_, a, _, _)| *a)
                .find(|a| a.is_ipv4() == v4 && pod_cidrs.iter().any(|net| net.contains(a)))
        })
    };
    Ok(TunnelFacts {
        name: device.name.clone(),
        vni: settings.vni,
        port: settings.port,
        ifindex: device.ifindex,
        mac: device.mac,
        underlay,
        inner_v4: inner(true),
        inner_v6: inner(false),
    })
}

/// Tunnel ends of other nodes behind one device: pod CIDR via gateway (routes), gateway to MAC
/// (neighbours), MAC to underlay address (FDB), as Flannel sets them up.
fn peers(kernel: &Kernel, tunnel: &TunnelFacts, out: &mut Vec<PeerFacts>, notes: &mut Vec<String>) {
    let mut peers: BTreeMap<(IpAddr, [u8; 6]), PeerFacts> = BTreeMap::new();
    let remote_of = |mac: Mac| {
        kernel
            .fdb
            .iter()
            .find(|f| {
                f.ifindex == tunnel.ifindex
                    && f.mac == mac
                    && f.address.is_ipv4() == tunnel.underlay.is_ipv4()
            })
            .map(|f| f.address)
    };
    for route in kernel.routes.iter().filter(|r| r.ifindex == tunnel.ifindex) {
        let Some(gateway) = route.gateway else {
            continue;
        };
        let known = kernel
            .neighbour(tunnel.ifindex, gateway)
            .and_then(|(mac, _)| Some((mac, remote_of(mac)?)));
        let Some((mac, remote)) = known else {
            notes.push(format!(
                "{}: {} via {gateway} has no permanent neighbour and FDB entry; packets to it are \
                 left to the kernel",
                tunnel.name, route.destination
            ));
            continue;
        };
        peers
            .entry((remote, mac.0))
            .or_insert_with(|| PeerFacts { vni: tunnel.vni, remote, mac, pod_cidrs: Vec::new() })
            .pod_cidrs
            .push(route.destination);
    }
    out.extend(peers.into_values().map(|mut peer| {
        peer.pod_cidrs.sort();
        peer.pod_cidrs.dedup();
        peer
    }));
}

/// Pods of this node: host routes to point-to-point devices, and neighbours of a bridge inside our
/// pod CIDRs.
fn pods(
    kernel: &Kernel,
    pod_cidrs: &[IpNet],
    not_pods: &BTreeSet<u32>,
    excluded: &impl Fn(&Link) -> bool,
    context: &mut NodeContext,
) {
    let usable = |ifindex: u32| {
        kernel.links.get(&ifindex).filter(|l| !not_pods.contains(&ifindex) && !excluded(l) && l.up)
    };
    for route in &kernel.routes {
        let host = route.destination.prefix_len() == route.destination.max_prefix_len();
        let Some(link) = usable(route.ifindex).filter(|l| l.kind == "veth") else {
            continue;
        };
        let address = route.destination.addr();
        if !host || route.gateway.is_some_and(|g| g != address) {
            continue;
        }
        let known = kernel.neighbour(link.ifindex, address);
        context.pods.insert(
            address,
            PodFacts {
                ifindex: link.ifindex,
                redirect: false,
                peer: false,
                pod_mac: known.map(|(mac, _)| mac).unwrap_or_default(),
                host_mac: link.mac,
                mtu: link.mtu,
            },
        );
    }
    for neighbour in &kernel.neighbours {
        let Some(link) = usable(neighbour.ifindex).filter(|l| l.kind == "bridge") else {
            continue;
        };
        if !pod_cidrs.iter().any(|net| net.contains(&neighbour.address)) {
            continue;
        }
        context.pods.entry(neighbour.address).or_insert(PodFacts {
            ifindex: link.ifindex,
            redirect: false,
            peer: false,
            pod_mac: neighbour.mac,
            host_mac: link.mac,
            mtu: link.mtu,
        });
    }
}
