//! Loading the programs and putting them onto interfaces: pinned links, taken over at the next start.
//!
//! ```text
//!  auto on a physical NIC:   offload ─► native ─► TC only
//!  auto on a virtual one:    offload ─► native ─► generic ─► TC only
//! ```
//!
//! Every rung that was refused keeps the errno, the reason and what would lift it. A program that is
//! not ours is never touched. Leaving is not detaching: links and maps are pinned.

mod bpffs;
mod detach;
mod frags;
mod lanes;
mod mtu;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::xdp::XdpLink;
use aya::programs::{
    LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType, TestRun, TestRunOptions,
    Xdp, XdpMode, loaded_programs,
};
use aya::{Ebpf, EbpfError, EbpfLoader};
use aya_obj::programs::XdpAttachType;
use serde::{Deserialize, Serialize};
use sluice_abi::maps;

use crate::config::{self, Mode};
use crate::describe::{causes, errno};
use crate::facts::kernel::Link;
use crate::maps::{MapsError, Pins, Shape, check_pins, shapes};

pub use bpffs::{BpffsError, mount as mount_bpffs, unmount as unmount_bpffs};
pub use frags::without_frags;
pub use lanes::{LaneError, fill_lanes, fill_xdp_lanes};

/// The object with all programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SLUICE_BPF_OBJECT"));

/// Why the datapath could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No BPF file system.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// A pinned map does not fit.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The kernel does not take the maps.
    #[error(
        "load the BPF object: {}; CAP_BPF, CAP_NET_ADMIN and a kernel with BTF (/sys/kernel/btf/vmlinux) are needed",
        causes(source)
    )]
    Load {
        /// What aya says.
        source: Box<EbpfError>,
    },
    /// The kernel does not take a program.
    #[error("load program {name}: {}; what runs already keeps running", verifier(source))]
    Program {
        /// Which program.
        name: &'static str,
        /// What aya says, with the verifier's words.
        source: Box<ProgramError>,
    },
    /// The object is not ours.
    #[error("the BPF object has no program {name}")]
    NoProgram {
        /// Which program.
        name: &'static str,
    },
    /// The programs behind the fast ones cannot be brought up.
    #[error("{0}; what runs already keeps running")]
    Lanes(#[from] LaneError),
    /// Removing a pin failed.
    #[error("remove {}: {source}", path.display())]
    Unpin {
        /// The pin.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// The end of the verifier's words is what matters; all of them are some megabytes.
fn verifier(error: &ProgramError) -> String {
    const LINES: usize = 12;
    let text = causes(error);
    let lines: Vec<&str> = text.lines().collect();
    match lines.len().checked_sub(LINES) {
        Some(skip) if skip > 0 => {
            let first = lines.first().copied().unwrap_or_default();
            format!("{first}\n...\n{}", lines[skip..].join("\n"))
        }
        _ => text,
    }
}

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
    /// XDP is refused; the TC programs do the work.
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
    /// Whether replies are taken at TC ingress.
    pub tc_ingress: bool,
    /// Whether replies are taken at TC egress.
    pub tc_egress: bool,
    /// What was refused.
    pub refusals: Vec<Refusal>,
}

const XDP: &str = "xdp_node";
/// TC ingress of uplinks.
const TC_UPLINK: &str = "tc_uplink";
/// TC ingress of the host sides of pods.
const TC_INGRESS: &str = "tc_ingress";
const TC_EGRESS: &str = "tc_egress";
const CLOCK: &str = "xdp_clock";
/// Pin of the map [`maps::JUMP`] for generic mode: programs that share such a map must agree on
/// frames in several buffers.
const JUMP_GENERIC: &str = "sl_jumpgen_v1";

/// The program at TC ingress of an interface. None for the vxlan device: what XDP hands to it carries
/// its mark on, and must not be handed over once more.
fn tc_ingress(role: Role) -> Option<&'static str> {
    match role {
        Role::Uplink => Some(TC_UPLINK),
        Role::Pod => Some(TC_INGRESS),
        Role::Tunnel => None,
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
        for name in [TC_UPLINK, TC_INGRESS, TC_EGRESS] {
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
            attached.mode != Rung::None
                && attached.tc_egress
                && (attached.tc_ingress || attached.role == Role::Tunnel)
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
                || tc_ingress(known.role)
                    .is_none_or(|name| self.tc_there(link, name, TcAttachType::Ingress)))
            && (!known.tc_egress || self.tc_there(link, TC_EGRESS, TcAttachType::Egress))
    }

    fn tc_there(&self, link: &Link, name: &'static str, side: TcAttachType) -> bool {
        // Without TCX the filter cannot be found by its program; then it is believed to be there.
        match SchedClassifier::query_tcx(&link.name, side) {
            Ok((_, programs)) => {
                program_id(&self.ebpf, name).is_some_and(|id| programs.iter().any(|p| p.id() == id))
            }
            Err(_) => true,
        }
    }

    /// Removes our links from interfaces that are not in `keep`; those of this run and those of an
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
        if role == Role::Uplink && attached.mode == Rung::None && mode != Mode::Auto {
            return attached;
        }
        for (name, side, done) in [
            (tc_ingress(role), TcAttachType::Ingress, &mut attached.tc_ingress),
            (Some(TC_EGRESS), TcAttachType::Egress, &mut attached.tc_egress),
        ] {
            let Some(name) = name else { continue };
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

    fn attach_xdp(&mut self, link: &Link, mode: Mode, refusals: &mut Vec<Refusal>) -> Rung {
        let path = link_path(self.pins.dir(), XDP, &link.name);
        if let Some(obstacle) = self.obstacles.get(&link.name) {
            refusals.push(Refusal {
                rung: forced(mode).unwrap_or(Rung::Native).label().to_owned(),
                errno: 0,
                reason: obstacle.reason.clone(),
                remedy: obstacle.remedy.clone(),
            });
            self.held.remove(&path);
            if let Err(e) = remove_links(&[path]) {
                tracing::warn!("{e}");
            }
            return Rung::None;
        }
        if let Some(rung) = self.take_over_xdp(link, mode, &path) {
            let earlier = self.earlier.get(&link.name);
            refusals.extend(
                earlier
                    .into_iter()
                    .filter(|a| a.ifindex == link.ifindex && a.mode == rung)
                    .flat_map(|a| a.refusals.iter().cloned()),
            );
            return rung;
        }
        let physical = link.kind.is_empty();
        let rungs: &[Rung] = match mode {
            Mode::Offload => &[Rung::Offload],
            Mode::Native => &[Rung::Native],
            Mode::Generic => &[Rung::Generic],
            Mode::Auto if physical => &[Rung::Offload, Rung::Native],
            Mode::Auto => &[Rung::Offload, Rung::Native, Rung::Generic],
        };
        for rung in rungs {
            let xdp_mode = match rung {
                Rung::Native => XdpMode::Driver,
                Rung::Generic => XdpMode::Skb,
                _ => {
                    refusals.push(Refusal {
                        rung: Rung::Offload.label().to_owned(),
                        errno: 0,
                        reason: "running on the NIC is not part of this version".to_owned(),
                        remedy: "none yet; native is the fastest mode that exists".to_owned(),
                    });
                    continue;
                }
            };
            let native = *rung == Rung::Native;
            if native && let Some(refusal) = mtu::refusal(link, self.frags) {
                refusals.push(refusal);
                continue;
            }
            match self.new_xdp_link(link, *rung, xdp_mode, &path) {
                Ok(()) => return *rung,
                Err(error) => refusals.push(explain(link, *rung, self.frags, &*error)),
            }
        }
        Rung::None
    }

    /// Puts the new program into the link of an earlier run, if there is one that fits.
    fn take_over_xdp(&mut self, link: &Link, mode: Mode, path: &Path) -> Option<Rung> {
        if !path.exists() {
            return None;
        }
        let there = |id: u32| {
            link.xdp
                .iter()
                .find(|(prog, _)| *prog == id)
                .map(|(_, m)| if *m == "generic" { Rung::Generic } else { Rung::Native })
        };
        let taken = (|| {
            let old = FdLink::from(PinnedLink::from_pin(path).map_err(|e| causes(&e))?);
            let info = old.info().map_err(|e| causes(&e))?;
            let rung = there(info.program_id())
                .ok_or("it belongs to an interface that is gone or was renamed")?;
            let wanted = forced(mode).unwrap_or(rung);
            if wanted != rung {
                return Err(format!("it is {}, the config says {}", rung.label(), mode.label()));
            }
            let program = self.node(rung).map_err(|e| e.to_string())?;
            let old = XdpLink::try_from(old).map_err(|e| causes(&e))?;
            let id = program.attach_to_link(old).map_err(|e| causes(&e))?;
            let new = program.take_link(id).map_err(|e| causes(&e))?;
            let new = FdLink::try_from(new).map_err(|e| causes(&e))?;
            Ok((rung, new))
        })();
        match taken {
            Ok((rung, held)) => {
                tracing::info!(interface = link.name, mode = rung.label(), "link taken over");
                self.held.insert(path.to_owned(), held);
                Some(rung)
            }
            Err(reason) => {
                tracing::info!(interface = link.name, "link not taken over: {reason}");
                self.held.remove(path);
                if let Err(e) = remove_links(&[path.to_owned()]) {
                    tracing::warn!("{e}");
                }
                None
            }
        }
    }

    fn new_xdp_link(
        &mut self,
        link: &Link,
        rung: Rung,
        mode: XdpMode,
        path: &Path,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let program = self.node(rung)?;
        let id = program.attach_to_if_index(link.ifindex, mode)?;
        // On a kernel without XDP links this fails, and dropping the link detaches.
        let fd = FdLink::try_from(program.take_link(id)?)?;
        let pinned = fd.pin(path)?;
        self.held.insert(path.to_owned(), pinned.into());
        Ok(())
    }

    fn attach_tc(
        &mut self,
        link: &Link,
        name: &'static str,
        side: TcAttachType,
    ) -> Result<(), Refusal> {
        let path = link_path(self.pins.dir(), name, &link.name);
        if path.exists() {
            match self.take_over_tc(link, name, side, &path) {
                Ok(()) => return Ok(()),
                Err(reason) => {
                    tracing::info!(
                        interface = link.name,
                        program = name,
                        "link not taken over: {reason}"
                    );
                    self.held.remove(&path);
                    if let Err(e) = remove_links(std::slice::from_ref(&path)) {
                        tracing::warn!("{e}");
                    }
                }
            }
        }
        let refusal = |error: &(dyn std::error::Error + 'static)| Refusal {
            rung: name.to_owned(),
            errno: errno(error).unwrap_or_default(),
            reason: causes(error),
            remedy: "see the errno; TC programs need CAP_NET_ADMIN and CONFIG_NET_CLS_ACT"
                .to_owned(),
        };
        let program = tc(&mut self.ebpf, name).map_err(|e| refusal(&e))?;
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        match program.attach_with_options(&link.name, side, order) {
            Ok(id) => {
                let held = program
                    .take_link(id)
                    .map_err(|e| refusal(&e))
                    .and_then(|l| FdLink::try_from(l).map_err(|e| refusal(&e)))
                    .and_then(|fd| fd.pin(&path).map_err(|e| refusal(&e)))?;
                self.held.insert(path, held.into());
                Ok(())
            }
            // EINVAL: no TCX before 6.6.
            Err(e) if errno(&e) == Some(libc::EINVAL) => {
                attach_tc_filter(program, &link.name, side).map_err(|e| refusal(&e))
            }
            Err(e) => Err(refusal(&e)),
        }
    }

    fn take_over_tc(
        &mut self,
        link: &Link,
        name: &'static str,
        side: TcAttachType,
        path: &Path,
    ) -> Result<(), String> {
        let old = FdLink::from(PinnedLink::from_pin(path).map_err(|e| causes(&e))?);
        let id = old.info().map_err(|e| causes(&e))?.program_id();
        let (_, programs) = SchedClassifier::query_tcx(&link.name, side).map_err(|e| causes(&e))?;
        if !programs.iter().any(|p| p.id() == id) {
            return Err("it belongs to an interface that is gone or was renamed".to_owned());
        }
        let old = SchedClassifierLink::try_from(old).map_err(|e| causes(&e))?;
        let program = tc(&mut self.ebpf, name).map_err(|e| e.to_string())?;
        let id = program.attach_to_link(old).map_err(|e| causes(&e))?;
        let new = program.take_link(id).map_err(|e| causes(&e))?;
        let new = FdLink::try_from(new).map_err(|e| causes(&e))?;
        self.held.insert(path.to_owned(), new);
        Ok(())
    }
}

/// Whether what is attached is what the config asks for now. What was refused is no reason to try
/// each time anew.
fn fits(wanted: Mode, there: Rung, role: Role) -> bool {
    role != Role::Uplink || there == Rung::None || forced(wanted).is_none_or(|rung| there == rung)
}

/// The only way of running XDP that the config allows, if it allows only one.
const fn forced(mode: Mode) -> Option<Rung> {
    match mode {
        Mode::Auto => None,
        Mode::Native => Some(Rung::Native),
        Mode::Generic => Some(Rung::Generic),
        Mode::Offload => Some(Rung::Offload),
    }
}

/// Priority and handle of our filters on kernels without TCX, so that the next start finds them.
const FILTER_PRIORITY: u16 = 51;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x51);

/// A clsact filter that stays when the process ends; an earlier one of ours is replaced.
fn attach_tc_filter(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
) -> Result<(), ProgramError> {
    match aya::programs::tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(e) if errno(&e) == Some(libc::EEXIST) => {}
        Err(e) => return Err(e.into()),
    }
    let old = SchedClassifierLink::attached(interface, side, FILTER_PRIORITY, FILTER_HANDLE, None)
        .map_err(ProgramError::IOError)?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(
            interface,
            side,
            TcAttachOptions::Netlink(NlOptions {
                priority: FILTER_PRIORITY,
                handle: FILTER_HANDLE,
                classid: None,
            }),
        )?,
    };
    // Dropping it would detach.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn run_clock(program: &Xdp) -> Result<u32, AttachError> {
    let frame = [0u8; 64];
    let mut options = TestRunOptions::new();
    options.data_in = Some(&frame);
    let result = program
        .test_run(options)
        .map_err(|source| AttachError::Program { name: CLOCK, source: Box::new(source) })?;
    Ok(result.return_value & 0x7fff_ffff)
}

fn clock_path(dir: &Path) -> PathBuf {
    dir.join("prog-xdp_clock")
}

/// The low 31 bits of the kernel's tick counter, by the program that an agent pinned.
///
/// # Errors
/// When there is no such program or the kernel does not run it.
pub fn pinned_jiffies(pin_dir: &Path) -> Result<u32, AttachError> {
    let program = Xdp::from_pin(clock_path(pin_dir), XdpAttachType::Interface)
        .map_err(|source| AttachError::Program { name: CLOCK, source: Box::new(source) })?;
    run_clock(&program)
}

/// Creates or reuses the maps, each pinned under the name that `pin` gives it. No program is loaded.
fn load(
    pins: &Pins,
    shapes: &[Shape],
    frags: bool,
    pin: impl Fn(&'static str) -> &'static str,
) -> Result<Ebpf, AttachError> {
    let mut loader = EbpfLoader::new();
    for Shape { name, max_entries, .. } in shapes {
        loader.map_max_entries(name, *max_entries);
        loader.map_pin_path(name, pins.map_path(pin(name)));
    }
    let loaded = if frags { loader.load(OBJECT) } else { loader.load(&without_frags(OBJECT)) };
    loaded.map_err(|source| AttachError::Load { source: Box::new(source) })
}

fn load_xdp(ebpf: &mut Ebpf, name: &'static str) -> Result<(), AttachError> {
    let fail = |source| AttachError::Program { name, source: Box::new(source) };
    xdp(ebpf, name)?.load().map_err(fail)
}

fn program_id(ebpf: &Ebpf, name: &str) -> Option<u32> {
    let info = match ebpf.program(name)? {
        aya::programs::Program::Xdp(p) => p.info().ok()?,
        aya::programs::Program::SchedClassifier(p) => p.info().ok()?,
        _ => return None,
    };
    Some(info.id())
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, AttachError> {
    ebpf.program_mut(name)
        .ok_or(AttachError::NoProgram { name })?
        .try_into()
        .map_err(|_| AttachError::NoProgram { name })
}

fn tc<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, AttachError> {
    ebpf.program_mut(name)
        .ok_or(AttachError::NoProgram { name })?
        .try_into()
        .map_err(|_| AttachError::NoProgram { name })
}

/// A refusal in words.
fn explain(
    link: &Link,
    rung: Rung,
    frags: bool,
    error: &(dyn std::error::Error + 'static),
) -> Refusal {
    let errno = errno(error).unwrap_or_default();
    let holder =
        link.xdp.iter().map(|(id, mode)| foreign(*id, mode)).collect::<Vec<_>>().join(", ");
    let name = &link.name;
    let (reason, remedy) = match errno {
        libc::EBUSY => (
            format!("another XDP program is attached and left alone: {holder}"),
            format!(
                "detach it by the tool that attached it (or: ip link set dev {name} xdp off), or \
                 exclude the interface in datapath.exclude_interfaces"
            ),
        ),
        libc::EEXIST => (
            format!("native and generic XDP cannot be active at once, and there is {holder}"),
            format!("detach the other program, or set datapath.interface.{name}.mode to its mode"),
        ),
        libc::ERANGE => mtu::above_limit(link, frags),
        libc::EOPNOTSUPP => (
            format!(
                "the driver ({}) has no native XDP",
                if link.kind.is_empty() { "physical" } else { &link.kind }
            ),
            "use mode generic, or leave it to TC with mode auto".to_owned(),
        ),
        libc::EPERM => {
            ("not permitted".to_owned(), "run with CAP_BPF and CAP_NET_ADMIN".to_owned())
        }
        libc::ENODEV => (
            "the interface is gone".to_owned(),
            "it is attached to again when it comes back".to_owned(),
        ),
        _ => (causes(error), "see the kernel's log; mode generic or auto may work".to_owned()),
    };
    Refusal { rung: rung.label().to_owned(), errno, reason, remedy }
}

fn foreign(id: u32, mode: &str) -> String {
    let info: Option<ProgramInfo> = loaded_programs().filter_map(Result::ok).find(|p| p.id() == id);
    match info {
        Some(info) => format!(
            "program id {id}, name {:?}, tag {:016x}, {mode}",
            info.name_as_str().unwrap_or_default(),
            info.tag().swap_bytes()
        ),
        None => format!("program id {id}, {mode}"),
    }
}

/// Where the link of `program` on `interface` is pinned. bpffs allows no dot in a name.
fn link_path(dir: &Path, program: &str, interface: &str) -> PathBuf {
    let name = interface.replace('%', "%25").replace('.', "%2e");
    dir.join(format!("link-{program}-{name}"))
}

/// All link pins of an instance with the interface that they name.
pub fn link_pins(dir: &Path) -> Vec<(PathBuf, String)> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let rest = name.strip_prefix("link-")?;
            let interface = [XDP, TC_UPLINK, TC_INGRESS, TC_EGRESS]
                .iter()
                .find_map(|p| rest.strip_prefix(p)?.strip_prefix('-'))?;
            Some((entry.path(), interface.replace("%2e", ".").replace("%25", "%")))
        })
        .collect()
}

/// Detaches and unpins, so that nothing of ours is attached any more when this returns.
fn remove_links(pins: &[PathBuf]) -> Result<(), AttachError> {
    for path in pins {
        match detach::detach(path) {
            Ok(()) => {}
            Err(e) => tracing::debug!("{}: detach: {e}", path.display()),
        }
        match std::fs::remove_file(path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(AttachError::Unpin { path: path.clone(), source }),
        }
    }
    Ok(())
}

/// Removes everything of an instance from the kernel: links first, so that no program meets missing
/// maps, then maps. Returns what was removed. What is not ours is not touched.
///
/// # Errors
/// When a pin cannot be removed.
pub fn remove_pins(dir: &Path) -> Result<Vec<PathBuf>, AttachError> {
    let mut removed = Vec::new();
    let links: Vec<PathBuf> = link_pins(dir).into_iter().map(|(path, _)| path).collect();
    remove_links(&links)?;
    removed.extend(links);
    let maps = maps::ALL.iter().map(|name| dir.join(name));
    for path in [clock_path(dir), dir.join(JUMP_GENERIC)].into_iter().chain(maps) {
        match std::fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(AttachError::Unpin { path, source }),
        }
    }
    Ok(removed)
}

/// Takes our filters off an interface on kernels without TCX; true if there was one. Where links
/// are pinned there are no filters, and what looks like one is not ours.
pub fn remove_filters(pin_dir: &Path, interface: &str) -> bool {
    if link_path(pin_dir, TC_EGRESS, interface).exists() {
        return false;
    }
    let mut found = false;
    for side in [TcAttachType::Ingress, TcAttachType::Egress] {
        if let Ok(link) =
            SchedClassifierLink::attached(interface, side, FILTER_PRIORITY, FILTER_HANDLE, None)
        {
            use aya::programs::links::Link as _;
            found |= link.detach().is_ok();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_pins_carry_no_dot_and_name_their_interface() {
        let path = link_path(Path::new("/x"), TC_EGRESS, "flannel.1%");
        assert_eq!(path, Path::new("/x/link-tc_egress-flannel%2e1%25"));
        let dir = tempfile::tempdir().expect("temporary directory");
        for interface in ["eth0", "flannel.1", "a%2eb"] {
            let path = link_path(dir.path(), TC_EGRESS, interface);
            std::fs::write(path, "").expect("write");
        }
        std::fs::write(dir.path().join("link-foreign-eth0"), "").expect("write");
        let mut names: Vec<_> = link_pins(dir.path()).into_iter().map(|(_, i)| i).collect();
        names.sort();
        assert_eq!(names, ["a%2eb", "eth0", "flannel.1"]);
    }

    /// Kernels before 6.6 have no TCX. Needs root.
    #[test]
    fn filter_without_tcx_stays_is_replaced_and_goes_with_cleanup() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: network namespaces and BPF need root");
            return;
        }
        let run = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace");
            let sh = |command: &str| {
                let output = std::process::Command::new("sh").args(["-ec", command]).output();
                String::from_utf8_lossy(&output.expect("sh").stdout).into_owned()
            };
            sh("ip link add up0 type veth peer name up1");
            let filters = || {
                let shown = sh("tc filter show dev up0 ingress");
                (shown.matches("handle 0x51").count(), shown)
            };
            for _ in 0..2 {
                let mut ebpf = EbpfLoader::new()
                    .map_max_entries(sluice_abi::maps::MAGLEV, 4)
                    .map_max_entries(sluice_abi::maps::FLOW, 4)
                    .load(OBJECT)
                    .expect("object");
                let program = tc(&mut ebpf, TC_INGRESS).expect("program");
                program.load().expect("loaded");
                attach_tc_filter(program, "up0", TcAttachType::Ingress).expect("attached");
                drop(ebpf);
                let (count, shown) = filters();
                assert_eq!(count, 1, "{shown}");
            }
            assert!(remove_filters(Path::new("/nonexistent"), "up0"));
            let (count, shown) = filters();
            assert_eq!(count, 0, "{shown}");
        };
        if let Err(panic) = std::thread::spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    }
}
