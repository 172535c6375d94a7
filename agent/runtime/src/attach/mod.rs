//! Loading the programs and putting them onto interfaces: pinned links, taken over at the next start.
//!
//! ```text
//!  auto on a physical NIC:   offload ─► native ─► TC
//!  auto on a virtual one:    offload ─► native ─► generic ─► TC
//! ```
//!
//! At TC an uplink has `tc_node`, which does what `xdp_node` does elsewhere.
//!
//! Every rung that was refused keeps the errno, the reason and what would lift it. A program that is
//! not ours is never touched. Leaving is not detaching: links and maps are pinned.

mod bpffs;
mod classifier;
mod detach;
mod error;
mod frags;
mod ladder;
mod lanes;
mod mtu;
mod pins;
mod programs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType, Xdp};
use serde::{Deserialize, Serialize};
use sluice_abi::maps;

use crate::config::{self, Mode};
use crate::describe::causes;
use crate::facts::kernel::Link;
use crate::maps::{Pins, Shape, check_pins, shapes};
use ladder::fits;
use pins::{clock_path, link_path, remove_links};
use programs::{load, load_xdp, program_id, run_clock, tc, xdp};

pub use bpffs::{BpffsError, mount as mount_bpffs, unmount as unmount_bpffs};
pub use classifier::remove_filters;
pub use error::AttachError;
pub use frags::without_frags;
pub use lanes::{LaneError, fill_lanes, fill_xdp_lanes};
pub use pins::{link_pins, remove_pins};
pub use programs::pinned_jiffies;

/// The object with all programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SLUICE_BPF_OBJECT"));

/// A way of running XDP, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// On the NIC.
    Offload,
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
    /// XDP is refused or not wanted: TC does its work.
    Tc,
    /// Nothing is attached.
    None,
}

impl Rung {
    /// The word in output.
    pub const fn label(self) -> &'static str {
        match self {
            Rung::Offload => "offload",
            Rung::Native => "native",
            Rung::Generic => "generic",
            Rung::Tc => "tc",
            Rung::None => "none",
        }
    }
}

/// Why a rung is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which rung, or which TC program.
    pub rung: String,
    /// The system's error number, 0 where it was not asked.
    pub errno: i32,
    /// What is in the way.
    pub reason: String,
    /// What would lift it.
    pub remedy: String,
}

/// Why XDP must not run on an interface, whatever the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What is in the way.
    pub reason: String,
    /// What would lift it.
    pub remedy: String,
}

/// What an interface is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Towards the network: XDP and TC.
    Uplink,
    /// The kernel's vxlan device: TC.
    Tunnel,
    /// Host side of a pod, or the bridge before pods: TC.
    Pod,
}

/// An interface that we are attached to, or tried to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Index.
    pub ifindex: u32,
    /// What it is to us.
    pub role: Role,
    /// How XDP runs there; [`Rung::Tc`] for roles without XDP.
    pub mode: Rung,
    /// Whether packets are taken at TC ingress.
    pub tc_ingress: bool,
    /// Whether replies are taken at TC egress.
    pub tc_egress: bool,
    /// What was refused.
    pub refusals: Vec<Refusal>,
}

const XDP: &str = "xdp_node";
/// TC ingress of uplinks with XDP.
const TC_UPLINK: &str = "tc_uplink";
/// TC ingress of uplinks without XDP.
const TC_NODE: &str = "tc_node";
/// TC ingress of the kernel's vxlan devices.
const TC_TUNNEL: &str = "tc_tunnel";
/// TC ingress of the host sides of pods.
const TC_INGRESS: &str = "tc_ingress";
const TC_EGRESS: &str = "tc_egress";
const CLOCK: &str = "xdp_clock";
/// Pin of the map [`maps::JUMP`] for generic mode: programs that share such a map must agree on
/// frames in several buffers.
const JUMP_GENERIC: &str = "sl_jumpgen_v1";

/// The program at TC ingress of an interface with XDP in this mode. The vxlan device has one of its own:
/// what XDP hands to it carries its mark on, and must not be handed over once more.
const fn tc_ingress(role: Role, mode: Rung) -> &'static str {
    match role {
        Role::Uplink if matches!(mode, Rung::Tc | Rung::None) => TC_NODE,
        Role::Uplink => TC_UPLINK,
        Role::Pod => TC_INGRESS,
        Role::Tunnel => TC_TUNNEL,
    }
}

/// The loaded programs and their links.
pub struct Attacher {
    ebpf: Ebpf,
    /// XDP for generic mode, from when an interface first needs it; see [`frags`].
    generic: Option<Ebpf>,
    /// Sizes of the maps.
    sizes: config::Maps,
    /// Whether native XDP takes frames in several buffers.
    frags: bool,
    pins: Pins,
    interfaces: BTreeMap<String, Attached>,
    /// What an earlier agent found out, so that a refusal keeps its reason when a link is taken over.
    earlier: BTreeMap<String, Attached>,
    /// Interfaces on which XDP must not run.
    obstacles: BTreeMap<String, Obstacle>,
    /// Held so that the links survive somebody's `umount` of the BPF file system.
    held: BTreeMap<PathBuf, FdLink>,
}

impl Attacher {
    /// Loads programs and maps; maps that are pinned are reused when their shape fits. Nothing is
    /// attached or replaced yet.
    ///
    /// # Errors
    /// When there is no BPF file system, a pinned map does not fit, or the kernel refuses.
    pub fn load(pin_dir: &Path, sizes: &config::Maps) -> Result<Self, AttachError> {
        Self::load_as(pin_dir, sizes, frags::are_known())
    }

    /// The same; native XDP takes frames in several buffers only if `frags` says so, which needs a
    /// kernel that knows them.
    ///
    /// # Errors
    /// As [`Attacher::load`].
    pub fn load_as(pin_dir: &Path, sizes: &config::Maps, frags: bool) -> Result<Self, AttachError> {
        bpffs::mount(pin_dir)?;
        let pins = Pins::new(pin_dir);
        let shapes = shapes(sizes);
        check_pins(&pins, &shapes)?;
        let mut ebpf = load(&pins, &shapes, frags, |name| name)?;
        // What was created must be what the contract says: our own object could be wrong too.
        check_pins(&pins, &shapes)?;
        for name in [XDP, CLOCK] {
            load_xdp(&mut ebpf, name)?;
        }
        for name in [TC_UPLINK, TC_NODE, TC_TUNNEL, TC_INGRESS, TC_EGRESS] {
            tc(&mut ebpf, name)?
                .load()
                .map_err(|source| AttachError::Program { name, source: Box::new(source) })?;
        }
        fill_lanes(&mut ebpf)?;
        // For the command line, which has no programs of its own.
        let clock = clock_path(pins.dir());
        match std::fs::remove_file(&clock) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(AttachError::Unpin { path: clock, source });
            }
        }
        if let Err(e) = xdp(&mut ebpf, CLOCK)?.pin(&clock) {
            tracing::warn!("{}: {}", clock.display(), causes(&e));
        }
        Ok(Self {
            ebpf,
            generic: None,
            sizes: *sizes,
            frags,
            pins,
            interfaces: BTreeMap::new(),
            earlier: BTreeMap::new(),
            obstacles: BTreeMap::new(),
            held: BTreeMap::new(),
        })
    }

    /// `xdp_node` for a rung.
    fn node(&mut self, rung: Rung) -> Result<&mut Xdp, AttachError> {
        if rung != Rung::Generic {
            return xdp(&mut self.ebpf, XDP);
        }
        if self.generic.is_none() {
            let pin = |name| if name == maps::JUMP { JUMP_GENERIC } else { name };
            let shapes = shapes(&self.sizes);
            let jump = shapes.iter().find(|shape| shape.name == maps::JUMP);
            let pinned = jump.map(|shape| Shape { name: JUMP_GENERIC, ..*shape });
            check_pins(&self.pins, &Vec::from_iter(pinned))?;
            let mut ebpf = load(&self.pins, &shapes, false, pin)?;
            load_xdp(&mut ebpf, XDP)?;
            fill_xdp_lanes(&mut ebpf)?;
            self.generic = Some(ebpf);
        }
        let missing = AttachError::NoProgram { name: XDP };
        xdp(self.generic.as_mut().ok_or(missing)?, XDP)
    }

    /// Tells what an earlier agent had attached, from its status file.
    pub fn remember(&mut self, earlier: BTreeMap<String, Attached>) {
        self.earlier = earlier;
    }

    /// What an earlier agent had attached, by its own account.
    pub fn earlier(&self) -> &BTreeMap<String, Attached> {
        &self.earlier
    }

    /// Tells on which interfaces XDP must not run. The next [`Attacher::reconcile`] takes it off
    /// there, and tries again where an obstacle is gone.
    pub fn set_obstacles(&mut self, obstacles: BTreeMap<String, Obstacle>) {
        let changed = |name: &String| self.obstacles.get(name) != obstacles.get(name);
        self.interfaces.retain(|name, _| !changed(name));
        self.obstacles = obstacles;
    }

    /// Whether replies of pods behind `link` are taken at TC: by this agent, or by the links of an
    /// earlier one that are about to be taken over.
    pub fn takes_replies(&self, link: &Link) -> bool {
        if let Some(known) = self.interfaces.get(&link.name) {
            return known.ifindex == link.ifindex && known.tc_ingress;
        }
        let path = link_path(self.pins.dir(), TC_INGRESS, &link.name);
        let Ok(pinned) = PinnedLink::from_pin(&path) else {
            return false;
        };
        let Ok(info) = FdLink::from(pinned).info() else {
            return false;
        };
        SchedClassifier::query_tcx(&link.name, TcAttachType::Ingress)
            .is_ok_and(|(_, programs)| programs.iter().any(|p| p.id() == info.program_id()))
    }

    /// The pins.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The interfaces by name.
    pub fn interfaces(&self) -> &BTreeMap<String, Attached> {
        &self.interfaces
    }

    /// The low 31 bits of the kernel's tick counter.
    ///
    /// # Errors
    /// When the kernel does not run the program.
    pub fn jiffies(&mut self) -> Result<u32, AttachError> {
        run_clock(xdp(&mut self.ebpf, CLOCK)?)
    }

    /// Brings the attachments in line with `wanted`: new interfaces are attached, lost links are
    /// renewed, interfaces that are no longer wanted are let go.
    pub fn reconcile(&mut self, wanted: &[(Link, Role)], mode_of: impl Fn(&str) -> Mode) {
        let names: BTreeSet<&str> = wanted.iter().map(|(l, _)| l.name.as_str()).collect();
        self.let_go(&names);
        self.bring(wanted, mode_of);
    }

    /// Attaches to interfaces of `wanted` that are new, and renews lost links; lets nothing go.
    pub fn bring(&mut self, wanted: &[(Link, Role)], mode_of: impl Fn(&str) -> Mode) {
        for (link, role) in wanted {
            let mode = mode_of(&link.name);
            if let Some(known) = self.interfaces.get(&link.name)
                && known.ifindex == link.ifindex
                && known.role == *role
                && fits(mode, known.mode, *role)
                && self.intact(link, known)
            {
                continue;
            }
            let attached = self.attach(link, *role, mode);
            match &attached.mode {
                Rung::None => tracing::error!(
                    interface = link.name,
                    refusals = ?attached.refusals,
                    "nothing could be attached"
                ),
                rung => tracing::info!(
                    interface = link.name,
                    role = ?role,
                    mode = rung.label(),
                    tc_ingress = attached.tc_ingress,
                    tc_egress = attached.tc_egress,
                    "attached"
                ),
            }
            for refusal in &attached.refusals {
                tracing::info!(
                    interface = link.name,
                    rung = refusal.rung,
                    errno = refusal.errno,
                    remedy = refusal.remedy,
                    "refused: {}",
                    refusal.reason
                );
            }
            self.interfaces.insert(link.name.clone(), attached);
        }
    }

    /// Forgets what was refused, so that the next [`Attacher::reconcile`] tries it again. What is
    /// attached stays: its links are taken over.
    pub fn try_refused_again(&mut self) {
        self.interfaces.retain(|_, attached| {
            attached.mode != Rung::None && attached.tc_egress && attached.tc_ingress
        });
    }

    /// Whether the programs that we put there are still there. Interfaces on which something was
    /// refused are tried again by the caller when it sees fit, not each time.
    fn intact(&self, link: &Link, known: &Attached) -> bool {
        let xdp_here = match known.mode {
            Rung::Native | Rung::Generic | Rung::Offload => {
                let generic = self.generic.as_ref().filter(|_| known.mode == Rung::Generic);
                let ours = program_id(generic.unwrap_or(&self.ebpf), XDP);
                ours.is_some_and(|id| link.xdp.iter().any(|(there, _)| *there == id))
            }
            Rung::Tc | Rung::None => true,
        };
        xdp_here
            && (!known.tc_ingress
                || self.tc_there(link, tc_ingress(known.role, known.mode), TcAttachType::Ingress))
            && (!known.tc_egress || self.tc_there(link, TC_EGRESS, TcAttachType::Egress))
    }

    /// earlier one.
    fn let_go(&mut self, keep: &BTreeSet<&str>) {
        let dir = self.pins.dir();
        self.interfaces.retain(|name, _| {
            let kept = keep.contains(name.as_str());
            if !kept {
                remove_filters(dir, name);
            }
            kept
        });
        let mut gone = Vec::new();
        for (path, interface) in link_pins(self.pins.dir()) {
            if !keep.contains(interface.as_str()) {
                tracing::info!(interface, "no longer used: {} is removed", path.display());
                self.held.remove(&path);
                gone.push(path);
            }
        }
        if let Err(e) = remove_links(&gone) {
            tracing::warn!("{e}");
        }
    }

    /// Takes the program of the other modes off an uplink's TC ingress: a packet is one program's.
    fn leave_other_ingress(&mut self, link: &Link, mode: Rung) {
        for name in [TC_UPLINK, TC_NODE] {
            let path = link_path(self.pins.dir(), name, &link.name);
            if tc_ingress(Role::Uplink, mode) == name || !path.exists() {
                continue;
            }
            self.held.remove(&path);
            if let Err(e) = remove_links(&[path]) {
                tracing::warn!("{e}");
            }
        }
    }

    fn attach(&mut self, link: &Link, role: Role, mode: Mode) -> Attached {
        let mut attached = Attached {
            ifindex: link.ifindex,
            role,
            mode: Rung::None,
            tc_ingress: false,
            tc_egress: false,
            refusals: Vec::new(),
        };
        if role == Role::Uplink {
            attached.mode = self.attach_xdp(link, mode, &mut attached.refusals);
        }
        // A forced mode that is refused is an error to be seen, not a reason for something else.
        let forced = !matches!(mode, Mode::Auto | Mode::Tc);
        if role == Role::Uplink && attached.mode == Rung::None && forced {
            return attached;
        }
        if role == Role::Uplink {
            self.leave_other_ingress(link, attached.mode);
        }
        for (name, side, done) in [
            (tc_ingress(role, attached.mode), TcAttachType::Ingress, &mut attached.tc_ingress),
            (TC_EGRESS, TcAttachType::Egress, &mut attached.tc_egress),
        ] {
            match self.attach_tc(link, name, side) {
                Ok(()) => *done = true,
                Err(refusal) => attached.refusals.push(refusal),
            }
        }
        if attached.mode == Rung::None && (attached.tc_ingress || attached.tc_egress) {
            attached.mode = Rung::Tc;
        }
        attached
    }
}
