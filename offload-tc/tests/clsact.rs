//! The laws of [`sluice_offload_tc::clsact`] on the loopback device of a new network namespace.
//! Needs root.

use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use libbpf_sys::{BPF_PROG_TYPE_SCHED_CLS, bpf_insn, bpf_prog_load};
use nix::sched::{CloneFlags, unshare};
use sluice_offload_tc::clsact::{ClsactError, Direction, Slot, attach, detach, query};

/// Loopback has index 1 in every network namespace.
const LOOPBACK: NonZeroU32 = NonZeroU32::MIN;

/// Runs `test` in a network namespace of its own, which ends with the thread.
fn in_new_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("new network namespace (the test needs root)");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A classifier that passes everything (`r0 = TC_ACT_OK; exit`), and its id.
fn pass_program() -> (OwnedFd, u32) {
    let exit = bpf_insn { code: 0x95, ..Default::default() };
    let zero_r0 = bpf_insn { code: 0xb7, ..Default::default() };
    let program = [zero_r0, exit];
    // SAFETY: the instruction pointer and count describe `program`; both names are C strings;
    // options may be null.
    let fd = unsafe {
        bpf_prog_load(
            BPF_PROG_TYPE_SCHED_CLS,
            c"pass".as_ptr(),
            c"GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            std::ptr::null_mut(),
        )
    };
    assert!(fd >= 0, "a program of two instructions is refused: {fd}");
    // SAFETY: the call returned a descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
        .expect("fdinfo of a program");
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("prog_id:"))
        .expect("fdinfo names the program's id");
    let id = id.trim().parse().expect("a program id");
    (fd, id)
}

fn slot(direction: Direction) -> Slot {
    let handle = NonZeroU32::new(0x51).expect("not zero");
    Slot { ifindex: LOOPBACK, direction, priority: 50, handle }
}

fn tc(arguments: &str) -> String {
    let output = Command::new("tc").args(arguments.split(' ')).output().expect("tc runs");
    assert!(output.status.success(), "tc {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("tc prints UTF-8")
}

#[test]
fn attached_program_is_found_and_detached_on_both_sides() {
    in_new_netns(|| {
        let (program, id) = pass_program();
        for direction in [Direction::Ingress, Direction::Egress] {
            let slot = slot(direction);
            assert_eq!(query(slot).expect("no qdisc is no error"), None);
            attach(slot, program.as_fd(), None).expect("attach");
            assert_eq!(query(slot).expect("query"), Some(id));
            // The kernel's own tool sees the same, in direct-action mode.
            let shown = tc(&format!("filter show dev lo {direction}"));
            assert!(shown.contains("direct-action"), "{shown}");
            assert!(shown.contains(&format!(" id {id} ")), "{shown}");
            assert!(detach(slot, id).expect("detach"));
            assert_eq!(query(slot).expect("query"), None);
            assert!(!detach(slot, id).expect("nothing there is no error"));
        }
    });
}

#[test]
fn foreign_program_is_neither_replaced_nor_removed() {
    in_new_netns(|| {
        let slot = slot(Direction::Ingress);
        let (theirs, their_id) = pass_program();
        let (ours, our_id) = pass_program();
        attach(slot, theirs.as_fd(), None).expect("attach");
        for replaces in [None, Some(our_id)] {
            match attach(slot, ours.as_fd(), replaces) {
                Err(ClsactError::Foreign { prog_id, .. }) => assert_eq!(prog_id, their_id),
                other => panic!("replaces {replaces:?}: {other:?}"),
            }
        }
        assert!(matches!(detach(slot, our_id), Err(ClsactError::Foreign { .. })));
        assert_eq!(query(slot).expect("query"), Some(their_id));
    });
}

#[test]
fn own_program_is_replaced_in_place() {
    in_new_netns(|| {
        let slot = slot(Direction::Egress);
        let (old, old_id) = pass_program();
        let (new, new_id) = pass_program();
        attach(slot, old.as_fd(), None).expect("attach");
        attach(slot, new.as_fd(), Some(old_id)).expect("replace");
        assert_eq!(query(slot).expect("query"), Some(new_id));
    });
}

#[test]
fn other_filters_and_the_qdisc_survive_detach() {
    in_new_netns(|| {
        let slot = slot(Direction::Ingress);
        let (program, id) = pass_program();
        let neighbour = Slot { priority: 60, ..slot };
        attach(slot, program.as_fd(), None).expect("attach");
        attach(neighbour, program.as_fd(), None).expect("attach beside it");
        assert!(detach(slot, id).expect("detach"));
        assert_eq!(query(neighbour).expect("query"), Some(id));
        assert!(detach(neighbour, id).expect("detach"));
        assert!(tc("qdisc show dev lo").contains("clsact"));
    });
}

#[test]
fn filter_of_another_kind_is_left_alone_and_the_kernels_words_are_kept() {
    in_new_netns(|| {
        tc("qdisc add dev lo clsact");
        tc("filter add dev lo ingress protocol all prio 50 u32 match u32 0 0 flowid 1:1");
        let before = tc("filter show dev lo ingress");
        let (program, id) = pass_program();
        let slot = slot(Direction::Ingress);
        assert_eq!(query(slot).expect("query"), None);
        let text = attach(slot, program.as_fd(), None).expect_err("taken").to_string();
        assert!(text.contains("kind"), "not the kernel's reason: {text:?}");
        assert!(!detach(slot, id).expect("no filter of ours"));
        assert_eq!(tc("filter show dev lo ingress"), before);
    });
}

#[test]
fn error_names_the_slot_and_the_remedy() {
    in_new_netns(|| {
        let (program, _) = pass_program();
        let ifindex = NonZeroU32::new(4711).expect("not zero");
        let slot = Slot { ifindex, ..slot(Direction::Ingress) };
        let text = attach(slot, program.as_fd(), None).expect_err("no interface").to_string();
        for word in ["4711", "ingress", "priority 50", "CAP_NET_ADMIN", "existing interface"] {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    });
}
