//! Whether the pod's end of a veth pair receives frames that XDP redirects to its host side.
//!
//! veth hands redirected frames to the peer's NAPI, which runs only while the peer has GRO on or a
//! native XDP program; else every frame is lost in silence (drivers/net/veth.c, `veth_xdp_xmit`).
//! The answer stands in the pod's own network namespace, so a thread of ours goes there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use nix::sched::{CloneFlags, setns};
use sluice_abi::Mac;

use super::ethtool;
use super::kernel::{Link, link};
use crate::netlink::Netlink;

/// GRO can be switched off behind our back, so an answer is asked for again after this time.
const FRESH: Duration = Duration::from_secs(10);

/// What the pod's end of a veth pair does with redirected frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEnd {
    /// It receives them.
    Receives {
        /// Its MAC.
        mac: Mac,
        /// Its MTU.
        mtu: u32,
    },
    /// It loses them.
    Deaf {
        /// Its MAC.
        mac: Mac,
        /// Its MTU.
        mtu: u32,
        /// Why, and what would change it.
        reason: String,
    },
    /// It could not be looked at.
    Unknown(String),
}

impl PodEnd {
    /// The pod's MAC and MTU, where it was seen.
    pub fn seen(&self) -> Option<(Mac, u32)> {
        match self {
            PodEnd::Receives { mac, mtu } | PodEnd::Deaf { mac, mtu, .. } => Some((*mac, *mtu)),
            PodEnd::Unknown(_) => None,
        }
    }
}

/// Looks at pods' ends and remembers the answers for a while.
#[derive(Default)]
pub struct PodEnds {
    known: HashMap<(u32, u32), (Instant, PodEnd)>,
}

impl PodEnds {
    /// The other ends of `veths`, by the index of the host side; `None` for what is no veth.
    pub fn inspect(&mut self, netlink: &mut Netlink, veths: &[&Link]) -> BTreeMap<u32, PodEnd> {
        let now = Instant::now();
        self.known.retain(|_, (at, _)| now.duration_since(*at) < FRESH);
        let mut found = BTreeMap::new();
        // Interfaces by the namespace of their other end.
        let mut open: BTreeMap<i32, Vec<(u32, u32)>> = BTreeMap::new();
        for veth in veths {
            let Some(peer) = veth.peer else {
                continue;
            };
            if let Some((_, end)) = self.known.get(&(veth.ifindex, peer)) {
                found.insert(veth.ifindex, end.clone());
                continue;
            }
            match veth.peer_netns {
                Some(id) => open.entry(id).or_default().push((veth.ifindex, peer)),
                None => {
                    found.insert(
                        veth.ifindex,
                        PodEnd::Unknown("the other end is in this namespace: no pod".to_owned()),
                    );
                }
            }
        }
        if open.is_empty() {
            return found;
        }
        let namespaces = namespaces(netlink, &open.keys().copied().collect());
        for (id, pairs) in open {
            let ends = match namespaces.get(&id) {
                Some(file) => look(file, pairs.iter().map(|(_, peer)| *peer).collect()),
                None => Err(
                    "the pod's network namespace was not found below /run/netns and /proc; run in \
                     the host's PID namespace (hostPID) to have it verified"
                        .to_owned(),
                ),
            };
            for (host, peer) in pairs {
                let end = match &ends {
                    Ok(ends) => ends.get(&peer).cloned().unwrap_or_else(|| {
                        PodEnd::Unknown("the pod's end went away while it was looked at".to_owned())
                    }),
                    Err(reason) => PodEnd::Unknown(reason.clone()),
                };
                self.known.insert((host, peer), (now, end.clone()));
                found.insert(host, end);
            }
        }
        found
    }
}

/// Files of the namespaces that this one numbers `wanted`.
pub(super) fn namespaces(netlink: &mut Netlink, wanted: &BTreeSet<i32>) -> BTreeMap<i32, File> {
    let mut found = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for path in candidates() {
        if found.len() == wanted.len() {
            break;
        }
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let Ok(meta) = file.metadata() else {
            continue;
        };
        if !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(file.as_raw_fd() as u32));
        let answer = netlink.get("namespace id", RouteNetlinkMessage::GetNsId(message));
        let Ok(Some(RouteNetlinkMessage::NewNsId(answer))) = answer else {
            continue;
        };
        for attribute in answer.attributes {
            if let NsidAttribute::Id(id) = attribute
                && wanted.contains(&id)
            {
                found.insert(id, file);
                break;
            }
        }
    }
    found
}

/// Where network namespaces can be found: named ones, then those of every process.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let named = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|e| e.path());
    let processes = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_str().is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())))
        .map(|e| e.path().join("ns/net"));
    named.chain(processes)
}

/// Runs `work` in the namespace, on a thread of its own.
pub(super) fn within<T: Send>(
    namespace: &File,
    work: impl FnOnce(&mut Netlink) -> T + Send,
) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("other-end".to_owned())
            .spawn_scoped(scope, || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(|e| format!("enter the network namespace: {e}"))?;
                Ok(work(&mut Netlink::open().map_err(|e| e.to_string())?))
            })
            .map_err(|e| format!("start a thread: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the thread in the namespace failed".to_owned()))
    })
}

/// Looks at interfaces `wanted` in the namespace.
fn look(namespace: &File, wanted: BTreeSet<u32>) -> Result<BTreeMap<u32, PodEnd>, String> {
    within(namespace, |netlink| {
        let seen = |ifindex| Some((ifindex, judge(&interface(netlink, ifindex)?)));
        wanted.into_iter().filter_map(seen).collect()
    })
}

/// The interface with an index.
pub(super) fn interface(netlink: &mut Netlink, ifindex: u32) -> Option<Link> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes.push(LinkAttribute::ExtMask(Vec::new()));
    match netlink.get("link", RouteNetlinkMessage::GetLink(message)) {
        Ok(Some(RouteNetlinkMessage::NewLink(message))) => Some(link(message)),
        _ => None,
    }
}

fn judge(end: &Link) -> PodEnd {
    let (mac, mtu) = (end.mac, end.mtu);
    if end.xdp.iter().any(|(_, mode)| *mode == "native") {
        return PodEnd::Receives { mac, mtu };
    }
    match ethtool::gro(&end.name) {
        Ok(true) => PodEnd::Receives { mac, mtu },
        Ok(false) => PodEnd::Deaf {
            mac,
            mtu,
            reason: format!(
                "the pod's end {} has neither GRO nor a native XDP program, so it would lose \
                 redirected frames (ethtool -K {} gro on, in the pod's namespace)",
                end.name, end.name
            ),
        },
        Err(e) => PodEnd::Unknown(format!("GRO of the pod's end {}: {e}", end.name)),
    }
}
