//! The programs at TC: TCX links, and clsact filters on kernels before 6.6.

use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};

use super::pins::{link_path, remove_links};
use super::programs::{program_id, tc};
use super::{Attacher, Refusal, TC_EGRESS};
use crate::describe::{causes, errno};
use crate::facts::kernel::Link;

impl Attacher {
    pub(super) fn tc_there(&self, link: &Link, name: &'static str, side: TcAttachType) -> bool {
        // Without TCX the filter cannot be found by its program; then it is believed to be there.
        match SchedClassifier::query_tcx(&link.name, side) {
            Ok((_, programs)) => {
                program_id(&self.ebpf, name).is_some_and(|id| programs.iter().any(|p| p.id() == id))
            }
            Err(_) => true,
        }
    }

    pub(super) fn attach_tc(
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
    use aya::EbpfLoader;

    use super::*;
    use crate::attach::{OBJECT, TC_INGRESS};

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
