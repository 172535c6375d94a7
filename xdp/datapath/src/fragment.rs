//! IP fragments (RFC 791 section 3.2, RFC 8200 section 4.5).
//!
//! ```text
//!  first  ─► decided and translated like a whole packet ─► noted: addresses, identification → record
//!  later  ─► no ports in it: follows the note ─► addresses, hop limit, the record's way out
//! ```
//!
//! Nothing is held back or put together: a later fragment that comes before the first is dropped if
//! it is addressed to us, and overlaps are the receiver's to judge (RFC 5722).

use crate::access::At;
use crate::decide;
use crate::env::Env;
use crate::field;
use crate::flow::{self, Found};
use crate::hash;
use sluice_abi::{
    Addr, FlowRecord, Fragment, FrontendKey, Hook, MAX_ECHO_FRAGMENTS, MAX_TUNNELS, Scratch, Seeds,
    Settings, SnatSlot, Tunnel, fragment_fate, fragment_part,
};

/// How long later fragments are waited for, in seconds (net.ipv4.ipfrag_time, net.ipv6.ip6frag_time:
/// the receiver waits no longer).
const LIFETIME: u32 = 30;

macro_rules! draft {
    ($scratch:expr) => {
        field!($scratch, Scratch, fragment)
    };
}

/// Says that the packet is no fragment, until [`set`] says otherwise.
#[inline(always)]
pub fn clear<E: Env>(env: &E) {
    if let Some(scratch) = env.scratch() {
        field!(draft!(scratch), Fragment, part).set_now(fragment_part::WHOLE);
    }
}

/// Says which fragment of which packet this is.
#[inline(always)]
pub fn set(scratch: At<'_, Scratch>, id: u32, part: u8) {
    field!(draft!(scratch), Fragment, id).set(id);
    field!(draft!(scratch), Fragment, part).set_now(part);
}

/// Says between whom the packet goes.
#[inline(always)]
pub fn mark(scratch: At<'_, Scratch>, src: Addr, dst: Addr, proto: u8) {
    let draft = draft!(scratch);
    field!(draft, Fragment, src).set(src);
    field!(draft, Fragment, dst).set(dst);
    field!(draft, Fragment, proto).set(proto);
}

/// Which fragment this is: a [`fragment_part`].
#[inline(always)]
pub fn part(scratch: At<'_, Scratch>) -> u8 {
    field!(draft!(scratch), Fragment, part).get_now()
}

/// Whether the packet is a first fragment.
#[inline(always)]
pub fn is_first(scratch: At<'_, Scratch>) -> bool {
    part(scratch) == fragment_part::FIRST
}

/// Notes that a first fragment was translated by a record.
#[inline(always)]
pub fn note<E: Env>(env: &E, scratch: At<'_, Scratch>, hook: Hook, found: &Found<'_>, reply: bool) {
    let draft = draft!(scratch);
    field!(draft, Fragment, slot).set(found.slot);
    field!(draft, Fragment, tag).set(found.tag);
    let fate = if reply { fragment_fate::REPLY } else { fragment_fate::REQUEST };
    field!(draft, Fragment, fate).set(fate);
    field!(draft, Fragment, hook).set(hook as u8);
    env.note();
}

/// Notes, if the packet is a first fragment, that the kernel gets it as it is. Of ICMP that is said
/// before the program that goes on with it has looked at it: where that drops a message, the kernel
/// gets what follows of it and cannot put it together.
#[inline(always)]
pub fn note_passed<E: Env>(env: &E, hook: Hook) {
    if let Some(scratch) = env.scratch()
        && is_first(scratch)
    {
        let draft = draft!(scratch);
        field!(draft, Fragment, slot).set(SnatSlot::FREE);
        field!(draft, Fragment, tag).set(0);
        field!(draft, Fragment, fate).set(fragment_fate::PASS);
        field!(draft, Fragment, hook).set(hook as u8);
        env.note();
    }
}

/// Notes that a first fragment went back as an echo reply.
#[inline(always)]
pub fn note_echo<E: Env>(env: &E, scratch: At<'_, Scratch>, hook: Hook) {
    let draft = draft!(scratch);
    field!(draft, Fragment, slot).set(SnatSlot::FREE);
    field!(draft, Fragment, tag).set(0);
    field!(draft, Fragment, fate).set(fragment_fate::ECHO);
    field!(draft, Fragment, hook).set(hook as u8);
    env.note();
}

/// Whether one more fragment may go back behind the first of an echo request, which [`find`] has just
/// found.
#[inline(always)]
pub fn pay_echo<E: Env>(env: &E, settings: At<'_, Settings>, scratch: At<'_, Scratch>) -> bool {
    let (index, _) = place(settings, draft!(scratch));
    let Some(entry) = env.fragment(index) else { return false };
    let count = field!(entry, Fragment, part);
    let gone = count.get_now();
    if gone >= MAX_ECHO_FRAGMENTS {
        return false;
    }
    count.set_now(gone + 1);
    true
}

/// Writes the draft in the scratch room into the table. In the kernel this is a function of its own.
#[inline(always)]
pub fn write<E: Env>(env: &E) -> Option<()> {
    let (settings, scratch) = (env.settings()?, env.scratch()?);
    let draft = draft!(scratch);
    let dst = field!(draft, Fragment, dst).get();
    let passes = field!(draft, Fragment, fate).get() == fragment_fate::PASS;
    if passes && !is_ours(env, &dst) && !decide::is_borrowed(settings, &dst) {
        // What is not ours passes anyway.
        return None;
    }
    let (index, key) = place(settings, draft);
    let entry = env.fragment(index)?;
    let word = field!(entry, Fragment, seal);
    word.set_now(0);
    field!(entry, Fragment, src).copy_from(field!(draft, Fragment, src));
    field!(entry, Fragment, dst).copy_from(field!(draft, Fragment, dst));
    field!(entry, Fragment, id).set(field!(draft, Fragment, id).get());
    field!(entry, Fragment, proto).set(field!(draft, Fragment, proto).get());
    field!(entry, Fragment, hook).set(field!(draft, Fragment, hook).get());
    field!(entry, Fragment, part).set(0);
    field!(entry, Fragment, fate).set(field!(draft, Fragment, fate).get());
    field!(entry, Fragment, slot).set(field!(draft, Fragment, slot).get());
    field!(entry, Fragment, tag).set(field!(draft, Fragment, tag).get());
    field!(entry, Fragment, noted).set(env.now());
    word.set_now(seal(key, draft));
    Some(())
}

/// Index of the draft's entry, and the hash of what it is found by.
#[inline(always)]
fn place(settings: At<'_, Settings>, draft: At<'_, Fragment>) -> (u32, u64) {
    let seed = field!(field!(settings, Settings, seeds), Seeds, flow).get();
    let key = hash::fragment(
        seed,
        field!(draft, Fragment, src).get(),
        field!(draft, Fragment, dst).get(),
        field!(draft, Fragment, id).get(),
        field!(draft, Fragment, proto).get(),
        field!(draft, Fragment, hook).get(),
    );
    (key as u32 & field!(settings, Settings, fragment_mask).get(), key)
}

/// What an entry's seal must be.
#[inline(always)]
fn seal(key: u64, of: At<'_, Fragment>) -> u64 {
    let tag = field!(of, Fragment, tag).get() as u64;
    let fate = field!(of, Fragment, fate).get() as u64;
    hash::seal(key, field!(of, Fragment, slot).get().0, tag << 8 | fate)
}

/// What became of the first fragment of this later one: a [`fragment_fate`]. The draft then says
/// which record.
#[inline(always)]
pub fn find<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
    hook: Hook,
) -> u8 {
    let draft = draft!(scratch);
    field!(draft, Fragment, hook).set(hook as u8);
    let (index, key) = place(settings, draft);
    let Some(entry) = env.fragment(index) else { return fragment_fate::NONE };
    // Copied first and looked at then: another CPU may be writing.
    let found = field!(entry, Fragment, seal).get_now();
    field!(draft, Fragment, fate).set(field!(entry, Fragment, fate).get());
    field!(draft, Fragment, slot).set(field!(entry, Fragment, slot).get());
    field!(draft, Fragment, tag).set(field!(entry, Fragment, tag).get());
    let age = env.now().wrapping_sub(field!(entry, Fragment, noted).get());
    let lifetime = field!(settings, Settings, ticks_per_second).get().wrapping_mul(LIFETIME);
    if found != seal(key, draft) || age > lifetime || !is_same(entry, draft) {
        return fragment_fate::NONE;
    }
    field!(draft, Fragment, fate).get()
}

/// Whether an entry is about the draft's packet.
#[inline(always)]
fn is_same(entry: At<'_, Fragment>, draft: At<'_, Fragment>) -> bool {
    field!(entry, Fragment, src).get() == field!(draft, Fragment, src).get()
        && field!(entry, Fragment, dst).get() == field!(draft, Fragment, dst).get()
        && field!(entry, Fragment, id).get() == field!(draft, Fragment, id).get()
        && field!(entry, Fragment, proto).get() == field!(draft, Fragment, proto).get()
        && field!(entry, Fragment, hook).get() == field!(draft, Fragment, hook).get()
}

/// The record that the draft names, if it is still the one that translated the first fragment.
#[inline(always)]
pub fn record<'e, E: Env>(env: &'e E, scratch: At<'_, Scratch>, reply: bool) -> Option<Found<'e>> {
    let draft = draft!(scratch);
    let (index, way) = field!(draft, Fragment, slot).get().owner()?;
    let found = flow::at(env, index, way)?;
    let r = found.record;
    let (src, dst) = if reply {
        (field!(r, FlowRecord, backend), field!(r, FlowRecord, source))
    } else {
        (field!(r, FlowRecord, client), field!(r, FlowRecord, vip))
    };
    let same = found.tag == field!(draft, Fragment, tag).get()
        && src.get() == field!(draft, Fragment, src).get()
        && dst.get() == field!(draft, Fragment, dst).get();
    same.then_some(found)
}

/// Whether nobody but us has a use for packets to this address: one that is Services' alone, or our
/// own SNAT source inside a tunnel.
#[inline(always)]
pub fn is_ours<E: Env>(env: &E, addr: &Addr) -> bool {
    if is_vip(env, addr) {
        return true;
    }
    for index in 1..MAX_TUNNELS {
        if let Some(tunnel) = env.tunnel(index)
            && (field!(tunnel, Tunnel, addr_v4).get() == *addr
                || field!(tunnel, Tunnel, addr_v6).get() == *addr)
        {
            return true;
        }
    }
    false
}

/// Whether an address is Services' alone.
#[inline(always)]
pub fn is_vip<E: Env>(env: &E, addr: &Addr) -> bool {
    env.frontend(&FrontendKey::address(*addr)).is_some()
}
