//! The BPF file system below the pin directory.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::statfs::{FsType, statfs};

/// BPF_FS_MAGIC (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
/// Where it usually is.
const USUAL: &str = "/sys/fs/bpf";

/// Why there is no place for pins.
#[derive(Debug, thiserror::Error)]
pub enum BpffsError {
    /// The directory cannot be made.
    #[error("{}: make the directory: {source}", path.display())]
    Directory {
        /// Which directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file system cannot be mounted.
    #[error(
        "{}: mount the BPF file system: {source}; mount it on the host (mount -t bpf bpf {USUAL}), \
         or give the container CAP_SYS_ADMIN",
        path.display()
    )]
    Mount {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: nix::Error,
    },
}

/// Sees to it that `pin_dir` exists on a BPF file system; mounts one where none is: at /sys/fs/bpf
/// for directories below it, else on `pin_dir` itself.
///
/// # Errors
/// When directory or mount cannot be made.
pub fn mount(pin_dir: &Path) -> Result<(), BpffsError> {
    if on_bpffs(pin_dir) {
        return make(pin_dir);
    }
    let at = if pin_dir.starts_with(USUAL) {
        Path::new(USUAL)
    } else {
        make(pin_dir)?;
        pin_dir
    };
    nix::mount::mount(
        Some("bpf"),
        at,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None::<&str>,
    )
    .map_err(|source| BpffsError::Mount { path: at.to_owned(), source })?;
    let same = |a, b| match (std::fs::read_link(a), std::fs::read_link(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => true,
    };
    if same("/proc/self/ns/mnt", "/proc/1/ns/mnt") {
        tracing::info!("mounted a BPF file system at {}", at.display());
    } else {
        tracing::warn!(
            "mounted a BPF file system at {} in a mount namespace of its own: pins vanish with it. \
             Use nsenter --net=... instead of ip netns exec, or mount the host's {USUAL}",
            at.display()
        );
    }
    make(pin_dir)
}

/// Unmounts what [`mount`] mounted on `pin_dir` itself, once it is empty.
pub fn unmount(pin_dir: &Path) {
    let empty = std::fs::read_dir(pin_dir).is_ok_and(|mut d| d.next().is_none());
    let mounted_here = on_bpffs(pin_dir) && !pin_dir.parent().is_some_and(on_bpffs);
    if empty
        && mounted_here
        && pin_dir != Path::new(USUAL)
        && let Err(e) = umount2(pin_dir, MntFlags::empty())
    {
        tracing::warn!("unmount {}: {e}", pin_dir.display());
    }
}

/// Whether the directory, or the nearest one above it that exists, is on a BPF file system.
fn on_bpffs(dir: &Path) -> bool {
    dir.ancestors()
        .find(|d| d.exists())
        .and_then(|d| statfs(d).ok())
        .is_some_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

fn make(dir: &Path) -> Result<(), BpffsError> {
    std::fs::create_dir_all(dir)
        .map_err(|source| BpffsError::Directory { path: dir.to_owned(), source })
}
