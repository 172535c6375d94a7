//! Where links and programs of an instance are pinned, and how they are removed.

use std::path::{Path, PathBuf};

use sluice_abi::maps;

use super::{
    AttachError, JUMP_GENERIC, TC_EGRESS, TC_INGRESS, TC_NODE, TC_TUNNEL, TC_UPLINK, XDP, detach,
};

pub(super) fn clock_path(dir: &Path) -> PathBuf {
    dir.join("prog-xdp_clock")
}

/// Where the link of `program` on `interface` is pinned. bpffs allows no dot in a name.
pub(super) fn link_path(dir: &Path, program: &str, interface: &str) -> PathBuf {
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
            let interface = [XDP, TC_UPLINK, TC_NODE, TC_TUNNEL, TC_INGRESS, TC_EGRESS]
                .iter()
                .find_map(|p| rest.strip_prefix(p)?.strip_prefix('-'))?;
            Some((entry.path(), interface.replace("%2e", ".").replace("%25", "%")))
        })
        .collect()
}

/// Detaches and unpins, so that nothing of ours is attached any more when this returns.
pub(super) fn remove_links(pins: &[PathBuf]) -> Result<(), AttachError> {
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
}
