//! XDP on an uplink: down the ladder, a rung at a time, and each refusal in words.

use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramInfo, XdpMode, loaded_programs};

use super::pins::{link_path, remove_links};
use super::{Attacher, Refusal, Role, Rung, XDP, mtu};
use crate::config::Mode;
use crate::describe::{causes, errno};
use crate::facts::kernel::Link;

impl Attacher {
    pub(super) fn attach_xdp(
        &mut self,
        link: &Link,
        mode: Mode,
        refusals: &mut Vec<Refusal>,
    ) -> Rung {
        let path = link_path(self.pins.dir(), XDP, &link.name);
        if mode == Mode::Tc {
            self.held.remove(&path);
            if let Err(e) = remove_links(&[path]) {
                tracing::warn!("{e}");
            }
            return Rung::None;
        }
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
            Mode::Tc => &[],
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
}

/// Whether what is attached is what the config asks for now. What was refused is no reason to try
/// each time anew.
pub(super) fn fits(wanted: Mode, there: Rung, role: Role) -> bool {
    role != Role::Uplink || there == Rung::None || forced(wanted).is_none_or(|rung| there == rung)
}

/// The only way of running XDP that the config allows, if it allows only one.
const fn forced(mode: Mode) -> Option<Rung> {
    match mode {
        Mode::Auto => None,
        Mode::Native => Some(Rung::Native),
        Mode::Generic => Some(Rung::Generic),
        Mode::Tc => Some(Rung::Tc),
        Mode::Offload => Some(Rung::Offload),
    }
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
