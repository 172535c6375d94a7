//! The flood guard: where a CPU's new connections go while there are more of them than it can give
//! places in the flow table.
//!
//! ```text
//!  new connection ─► too many on this CPU? ─ no ──► the flow table: search, lock
//!                                          └ yes ─► its one place in the guard, whoever was there
//!  client goes on ─► known to the guard ─► has it seen the answer? ─ yes ─► the flow table
//!                                                                 └ no ──► translated from there
//!  reply ─► not in the flow table ─► known to the guard ─► translated back from there
//! ```
//!
//! A record of the guard is a record like any other: the same layout, tags and index space
//! (`sluice_abi::Flood`), so whoever has found one need not know where it stands. As long as nothing
//! was ever put there, a miss costs the reading of one word. See docs/adr/0013-flood-guard.md.

use crate::access::At;
use crate::env::Env;
use crate::field;
use crate::flow::{self, Found, Inserted, Place, Tuple};
use crate::hash::FlowHash;
use crate::ingress;
use crate::tc;
use crate::tcp;
use sluice_abi::{
    Ask, FLOW_WAYS, Flood, FloodCpu, FloodWord, FlowRecord, FlowSet, IPPROTO_TCP, Reason, Scratch,
    Settings, SnatSlot, flow_state, flow_tag,
};

/// The one place of a client's hash.
#[inline(always)]
fn place<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    hash: FlowHash,
) -> Option<(At<'a, FlowSet>, u32, u32)> {
    let flood = field!(settings, Settings, flood);
    let place = hash.flood() & field!(flood, Flood, mask).get();
    let sets = field!(settings, Settings, flow_set_mask).get().wrapping_add(1);
    let index = sets.wrapping_add(place / FLOW_WAYS as u32);
    Some((env.flow_set(index)?, index, place % FLOW_WAYS as u32))
}

/// Whether the guard may hold a record at all.
#[inline(always)]
fn is_used<E: Env>(env: &E) -> bool {
    env.flood().is_some_and(|word| word.part(0, |w: &FloodWord| &w.0).get_now() != 0)
}

#[inline(always)]
fn find<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    hash: FlowHash,
    matches: impl Fn(At<'a, FlowRecord>) -> bool,
) -> Option<Found<'a>> {
    if !is_used(env) {
        return None;
    }
    let (set, index, way) = place(env, settings, hash)?;
    flow::check(set, index, way, flow::tagged(set, way, hash.tag())?, matches)
}

/// The record whose request this packet is, for who does not begin or promote a connection.
#[inline(always)]
pub fn find_request<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    at: &Place<'a>,
    tuple: &Tuple,
) -> Option<Found<'a>> {
    find(env, settings, at.hash, |r| flow::is_request(r, tuple))
}

/// The record whose reply this packet is, if the client's address was kept. (Where the source was
/// rewritten its port finds the record, wherever it is.)
#[inline(always)]
pub fn find_reply<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    at: &Place<'a>,
    tuple: &Tuple,
) -> Option<Found<'a>> {
    find(env, settings, at.hash, |r| flow::is_reply(r, tuple))
}

/// Counts a new connection at `now`; whether the CPU has too many of them. It has until a whole window
/// has passed with no more than half as many.
#[inline(always)]
pub fn is_too_much(limits: At<'_, Flood>, cpu: At<'_, FloodCpu>, now: u32) -> bool {
    let limit = field!(limits, Flood, limit).get();
    if limit == 0 {
        return false;
    }
    let length = field!(limits, Flood, window).get();
    let (window, count) = (field!(cpu, FloodCpu, window), field!(cpu, FloodCpu, count));
    let (on, past) = (field!(cpu, FloodCpu, on), now.wrapping_sub(window.get()));
    if past >= length {
        // Of the windows that nobody counted in the last one was empty.
        if count.get() <= limit / 2 || past >= length.wrapping_mul(2) {
            on.set(0);
        }
        window.set(now);
        count.set(0);
    }
    let counted = count.get().wrapping_add(1);
    count.set(counted);
    if counted > limit && on.get() == 0 {
        on.set(1);
        field!(cpu, FloodCpu, since).set(now);
        field!(cpu, FloodCpu, begun).add(1);
    }
    on.get() != 0
}

/// Writes the draft into its place of the guard, if this CPU has too many new connections.
///
/// Returns the place; [`SnatSlot::FREE`] if the connection is to go to the flow table;
/// [`SnatSlot::CLAIMED`] if another CPU is just writing there.
///
/// # Cost
/// No lock and no search: the tags of the client's set, which are at hand, and one record.
#[inline(always)]
pub fn put<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    at: &Place<'_>,
    scratch: At<'_, Scratch>,
) -> SnatSlot {
    let draft = field!(scratch, Scratch, draft);
    let limits = field!(settings, Settings, flood);
    let Some(cpu) = env.flood_cpu() else { return SnatSlot::FREE };
    if !is_too_much(limits, cpu, field!(draft, FlowRecord, seen).get()) || flow::has_client(at) {
        return SnatSlot::FREE;
    }
    let Some((set, index, way)) = place(env, settings, at.hash) else { return SnatSlot::FREE };
    let tag_at = field!(set, FlowSet, tags).element(way);
    let record = field!(set, FlowSet, records).element(way);
    let old = tag_at.get_now();
    if (old ^ at.hash.tag()) & !flow_tag::GENERATION == 0 {
        // The same client's, to somebody else; there is room for one of them.
        return SnatSlot::FREE;
    }
    // Not on the stack, which is full.
    let freed = field!(scratch, Scratch, best);
    freed.set_now(0);
    if flow_tag::is_used(old) {
        if is_kept(record) && is_alive(record, draft) {
            return SnatSlot::FREE;
        }
        freed.set_now(field!(record, FlowRecord, snat).get() as u64);
        field!(cpu, FloodCpu, overwritten).add(1);
    }
    let busy = flow_tag::freed(old) | flow_tag::BUSY;
    if old & (flow_tag::USED | flow_tag::BUSY) == flow_tag::BUSY || !tag_at.replace_if(old, busy) {
        return SnatSlot::CLAIMED;
    }
    note_used(env, field!(draft, FlowRecord, seen).get());
    record.copy_from(draft);
    let slot = SnatSlot::owned(index, way);
    flow::give_back(env, field!(draft, FlowRecord, snat).get(), SnatSlot::CLAIMED, slot);
    let generation = old.wrapping_add(flow_tag::NEXT) & flow_tag::GENERATION;
    tag_at.set_now(at.hash.tag() | generation);
    flow::give_back(env, freed.get_now() as u32, slot, SnatSlot::FREE);
    field!(cpu, FloodCpu, put).add(1);
    slot
}

/// Says in the scratch room which source port a record of the guard keeps the draft from having.
#[inline(always)]
pub fn note_taken<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    at: &Place<'_>,
    scratch: At<'_, Scratch>,
) {
    let draft = field!(scratch, Scratch, draft);
    let mut taken = 0;
    if is_used(env)
        && let Some((set, _, way)) = place(env, settings, at.hash)
        && flow::tagged(set, way, at.hash.tag()).is_some()
    {
        taken = flow::port_taken(field!(set, FlowSet, records).element(way), draft);
    }
    field!(scratch, Scratch, taken).set_now(taken);
}

/// Whether nobody may take a record's place: its client has seen the reply, but the flow table had
/// no room. (That a UDP service answered says nothing about the client.)
#[inline(always)]
fn is_kept(r: At<'_, FlowRecord>) -> bool {
    field!(r, FlowRecord, proto).get() == IPPROTO_TCP
        && field!(r, FlowRecord, state).get() & flow_state::CONFIRMED != 0
}

/// Whether a record has not been silent for longer than it may, when `new` is made.
#[inline(always)]
fn is_alive(r: At<'_, FlowRecord>, new: At<'_, FlowRecord>) -> bool {
    let now = field!(new, FlowRecord, seen).get();
    let age = now.wrapping_sub(field!(r, FlowRecord, seen).get());
    // A packet that came after the clock was read makes the difference negative.
    age <= field!(r, FlowRecord, timeout).get() || age > u32::MAX / 2
}

/// Takes SNAT slot `index` from a connection in the guard, which ends, for a new one. So a flood to
/// other nodes takes its source ports from itself.
#[inline(always)]
pub fn yields<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    slot: At<'_, SnatSlot>,
    index: u32,
) -> bool {
    let owner = slot.get();
    let Some((set, way)) = owner.owner() else { return false };
    if set <= field!(settings, Settings, flow_set_mask).get() {
        return false;
    }
    let Some(found) = flow::at(env, set, way) else { return false };
    let own = field!(found.record, FlowRecord, snat).get() == index.wrapping_add(1);
    own && !is_kept(found.record) && found.end() && slot.replace_slot(owner, SnatSlot::CLAIMED)
}

/// Says that the guard holds a record. The word is read by all CPUs, so it is written once a tick.
#[inline(always)]
fn note_used<E: Env>(env: &E, now: u32) {
    if let Some(word) = env.flood() {
        let word = word.part(0, |w: &FloodWord| &w.0);
        let written = FloodWord::written(now).0;
        if word.get_now() != written {
            word.set_now(written);
        }
    }
}

/// Reads from the cache lines of a place that [`put`] will need: that it waits for memory once, and not
/// there again, is a quarter of its time.
#[inline(always)]
fn fetch(set: At<'_, FlowSet>, way: u32) {
    let record = field!(set, FlowSet, records).element(way);
    field!(record, FlowRecord, backend_id).get_now();
    field!(record, FlowRecord, snat).get_now();
}

/// The set of the flow table for a record's client.
#[inline(always)]
fn place_of<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    r: At<'_, FlowRecord>,
) -> Option<Place<'a>> {
    let client = field!(r, FlowRecord, client).get();
    let port = field!(r, FlowRecord, client_port).get();
    flow::place(env, settings, client, port, field!(r, FlowRecord, proto).get())
}

/// The record that the stashed request has in the guard, if it goes on.
///
/// # Errors
/// Those of [`ingress::known`].
#[inline(always)]
pub fn known<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    scratch: At<'a, Scratch>,
) -> Result<Option<Found<'a>>, Reason> {
    if !is_used(env) {
        return Ok(None);
    }
    let (draft, ask) = (field!(scratch, Scratch, draft), field!(scratch, Scratch, ask));
    let Some(at) = place_of(env, settings, draft) else { return Ok(None) };
    let Some((set, index, way)) = place(env, settings, at.hash) else { return Ok(None) };
    fetch(set, way);
    let Some(seen) = flow::tagged(set, way, at.hash.tag()) else { return Ok(None) };
    let found = flow::check(set, index, way, seen, |r| flow::is_same_request(r, draft));
    let Some(found) = found else { return Ok(None) };
    let flags = field!(ask, Ask, tcp_flags).get() as u8;
    if field!(ask, Ask, snat).get() == 0 {
        // At TC.
        if tc::is_ours(env, &found, flags) {
            return Ok(Some(found));
        }
        flow::release(env, &found);
        return Ok(None);
    }
    let tunnel = field!(draft, FlowRecord, tunnel).get();
    ingress::known(env, settings, found, tunnel, flags).map_err(|stop| {
        field!(draft, FlowRecord, service).set(stop.service);
        stop.reason
    })
}

/// Moves a record of the guard to the flow table if the client's packet, which asks, proves that there
/// is a client: it has seen the answer. Returns where the record is then.
///
/// What proves nothing, such as a SYN that comes again, stays, so that who sends all packets of a
/// flood twice fills the flow table no faster.
#[inline(always)]
pub fn promote<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    scratch: At<'_, Scratch>,
    found: &Found<'_>,
) -> Result<SnatSlot, Reason> {
    let (draft, ask) = (field!(scratch, Scratch, draft), field!(scratch, Scratch, ask));
    let flags = field!(ask, Ask, tcp_flags).get() as u8;
    if !proves_client(found.record, scratch, flags) {
        return Ok(found.slot);
    }
    draft.copy_from(found.record);
    if !found.is_still_there() {
        return Err(Reason::FlowChanged);
    }
    let Some(at) = place_of(env, settings, draft) else { return Ok(found.slot) };
    field!(scratch, Scratch, taken).set_now(0);
    match flow::insert(env, &at, scratch, found.slot) {
        Inserted::New { slot, freed } => {
            flow::give_back(env, freed, slot, SnatSlot::FREE);
            found.end();
            if let Some(cpu) = env.flood_cpu() {
                field!(cpu, FloodCpu, promoted).add(1);
            }
            Ok(slot)
        }
        Inserted::Other(slot) => {
            // Another CPU promoted it, or the flow table has one of its own.
            found.end();
            let snat = field!(draft, FlowRecord, snat).get();
            flow::give_back(env, snat, found.slot, SnatSlot::FREE);
            Ok(slot)
        }
        // It goes on from where it is.
        Inserted::Full => Ok(found.slot),
    }
}

#[inline(always)]
fn proves_client(r: At<'_, FlowRecord>, scratch: At<'_, Scratch>, flags: u8) -> bool {
    let state = field!(r, FlowRecord, state).get();
    state & flow_state::CONFIRMED != 0
        || field!(r, FlowRecord, proto).get() == IPPROTO_TCP
            && tcp::acknowledges_reply(r, scratch, state, flags)
}
