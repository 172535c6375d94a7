//! Classifiers on the clsact qdisc, for kernels without TCX.
//!
//! A filter here is no `bpf_link`: it stays until somebody deletes it, cannot be pinned, and any
//! root process may replace it. So a [`Slot`] names exactly one filter, nothing is replaced or
//! removed unless it holds the program that the caller expects, and the qdisc itself is never
//! removed: others may have filters on it.
//!
//! Everything acts in the network namespace of the calling thread.
//!
//! # Kernel
//! `CONFIG_NET_SCH_INGRESS` and `CONFIG_NET_CLS_BPF`, Linux 4.5 or newer; `CAP_NET_ADMIN`, and
//! `CAP_SYS_ADMIN` or `CAP_BPF` to learn a program's id.

use std::cell::RefCell;
use std::fmt;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Once;

use libbpf_rs::{ErrorKind, PrintLevel, TC_EGRESS, TC_INGRESS, TcHook, TcHookBuilder};

/// Which way the packets of a [`Slot`] go, seen from the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Packets that the interface received.
    Ingress,
    /// Packets that are about to leave through the interface.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// The place of one filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Interface index in the calling thread's network namespace.
    pub ifindex: NonZeroU32,
    /// Side of the interface.
    pub direction: Direction,
    /// Position among the filters of that side: lower runs first. 16 bits in the kernel.
    pub priority: u16,
    /// Filter handle within the priority. Not zero: the kernel would choose one, and the filter
    /// could not be found again.
    pub handle: NonZeroU32,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ifindex, direction, priority, handle } = self;
        write!(f, "interface {ifindex}, {direction}, priority {priority}, handle {handle:#x}")
    }
}

/// Why a slot could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClsactError {
    /// The interface has no clsact qdisc and none could be added.
    #[error(
        "{slot}: no clsact qdisc can be added: {source}{said}. It takes CAP_NET_ADMIN, an existing \
         interface, and a kernel with CONFIG_NET_SCH_INGRESS"
    )]
    Qdisc {
        /// The slot that was asked for.
        slot: Slot,
        /// libbpf's answer.
        source: libbpf_rs::Error,
        /// The kernel's own words, if it had any.
        said: Said,
    },
    /// The slot holds a program that the caller did not expect; it was left alone.
    #[error(
        "{slot}: held by BPF program {prog_id}, which is not ours; it was left alone. Choose another \
         priority, or remove that filter (`tc filter show`, `tc filter del`)"
    )]
    Foreign {
        /// The slot that was asked for.
        slot: Slot,
        /// Kernel id of the program found there.
        prog_id: u32,
    },
    /// A filter could not be added, read or deleted.
    #[error("{slot}: the filter cannot be {verb}: {source}{said}")]
    Filter {
        /// The slot that was asked for.
        slot: Slot,
        /// `added`, `read` or `deleted`.
        verb: &'static str,
        /// libbpf's answer.
        source: libbpf_rs::Error,
        /// The kernel's own words, if it had any.
        said: Said,
    },
}

/// What the kernel added to an error number (netlink extended acknowledgement); may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said(String);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " ({})", self.0) }
    }
}

/// Puts `program` (a loaded classifier) into `slot`, in direct-action mode; adds the qdisc if the
/// interface has none. `replaces` is the id of the program that may be replaced, atomically for
/// packets.
///
/// # Errors
/// [`ClsactError::Foreign`] when the slot holds another program than `replaces`;
/// [`ClsactError::Qdisc`], [`ClsactError::Filter`] when the kernel refuses.
pub fn attach(
    slot: Slot,
    program: BorrowedFd<'_>,
    replaces: Option<u32>,
) -> Result<(), ClsactError> {
    listen();
    let mut hook = hook(slot, program);
    hook.create().map_err(|source| ClsactError::Qdisc { slot, source, said: heard() })?;
    // With nothing to replace the kernel itself refuses a slot that is taken. For the other case tc
    // has no compare-and-swap: look first.
    match (query(slot)?, replaces) {
        (Some(found), Some(expected)) if found == expected => hook.replace(true),
        (Some(prog_id), _) => return Err(ClsactError::Foreign { slot, prog_id }),
        (None, _) => hook.replace(false),
    };
    hook.attach().map(|_| ()).map_err(|source| ClsactError::Filter {
        slot,
        verb: "added",
        source,
        said: heard(),
    })
}

/// Id of the BPF program in `slot`; `None` if there is no BPF filter, also when there is no clsact
/// qdisc.
///
/// # Errors
/// [`ClsactError::Filter`] when the kernel refuses to tell, or the interface does not exist.
pub fn query(slot: Slot) -> Result<Option<u32>, ClsactError> {
    listen();
    // A query sends no program; the builder wants a descriptor all the same.
    let stdin = std::io::stdin();
    match hook(slot, stdin.as_fd()).query() {
        Ok(prog_id) => Ok(Some(prog_id)),
        // ENOENT: no such filter. EINVAL: no clsact qdisc, or a filter of another kind.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => Ok(None),
        Err(source) => Err(ClsactError::Filter { slot, verb: "read", source, said: heard() }),
    }
}

/// Deletes the filter in `slot` if it holds the program with id `prog_id`; false when there was no
/// filter. The qdisc stays.
///
/// # Errors
/// [`ClsactError::Foreign`] when the slot holds another program; [`ClsactError::Filter`] when the
/// kernel refuses.
pub fn detach(slot: Slot, prog_id: u32) -> Result<bool, ClsactError> {
    match query(slot)? {
        None => Ok(false),
        Some(found) if found != prog_id => Err(ClsactError::Foreign { slot, prog_id: found }),
        Some(_) => {
            let stdin = std::io::stdin();
            hook(slot, stdin.as_fd()).detach().map(|()| true).map_err(|source| {
                ClsactError::Filter { slot, verb: "deleted", source, said: heard() }
            })
        }
    }
}

fn hook(slot: Slot, program: BorrowedFd<'_>) -> TcHook {
    TcHookBuilder::new(program)
        .ifindex(slot.ifindex.get().cast_signed())
        .priority(slot.priority.into())
        .handle(slot.handle.get())
        .hook(match slot.direction {
            Direction::Ingress => TC_INGRESS,
            Direction::Egress => TC_EGRESS,
        })
}

thread_local! {
    static HEARD: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Takes libbpf's messages off stderr, where it would write even about expected answers, and keeps
/// this thread's last one for the error text.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        libbpf_rs::set_print(Some((PrintLevel::Warn, |_, text| {
            HEARD.with_borrow_mut(|heard| {
                let text = text.trim().trim_start_matches("libbpf: ");
                heard.clear();
                heard.push_str(text.trim_start_matches("Kernel error message: "));
            });
        })));
    });
    HEARD.with_borrow_mut(String::clear);
}

fn heard() -> Said {
    Said(HEARD.with_borrow_mut(std::mem::take))
}
