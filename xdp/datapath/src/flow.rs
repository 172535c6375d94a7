//! The flow table: finding a connection's record from either direction, and making one.

use crate::access::{At, opaque};
use crate::csum::Sum;
use crate::decide;
use crate::env::Env;
use crate::field;
use crate::flood;
use crate::hash::{self, FlowHash};
use crate::parse::Form;
use crate::tcp;
use sluice_abi::{
    Addr, Backend, Be16, FLOW_WAYS, FlowRecord, FlowSet, IPPROTO_TCP, Scratch, Seeds, Settings,
    SnatSlot, Timeouts, flow_state, flow_tag, maps,
};

/// A connection's record, found.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    /// The record.
    pub record: At<'a, FlowRecord>,
    /// Its tag, to be compared again when the packet has been translated.
    pub tag_at: At<'a, u32>,
    /// The tag's value when the record was found.
    pub tag: u32,
    /// What the SNAT table must hold for the record.
    pub slot: SnatSlot,
}

impl Found<'_> {
    /// Whether the record is still the one that was found.
    #[inline(always)]
    pub fn is_still_there(&self) -> bool {
        self.tag_at.get_now() == self.tag
    }

    /// Ends the connection: both directions at once, because both use this record. False if another
    /// CPU or the agent was first, and the place may be somebody else's by now.
    #[inline(always)]
    pub fn end(&self) -> bool {
        self.tag_at.replace_if(self.tag, flow_tag::freed(self.tag))
    }
}

/// Ends a connection and gives its SNAT port back.
#[inline(always)]
pub fn release<E: Env>(env: &E, found: &Found<'_>) {
    let claimed = field!(found.record, FlowRecord, snat).get();
    if found.end()
        && claimed != 0
        && let Some(slot) = env.snat(claimed - 1)
    {
        slot.replace_slot(found.slot, SnatSlot::FREE);
    }
}

/// Whether a request begins a new connection on the tuple of one that is over: a SYN after an RST or
/// a FIN of each side, or one to a backend that is gone and with which nothing was agreed yet. It is
/// decided anew.
#[inline(always)]
pub fn begins_anew<E: Env>(env: &E, r: At<'_, FlowRecord>, tcp_flags: u8) -> bool {
    const FINS: u32 = flow_state::FIN_FORWARD | flow_state::FIN_REPLY;
    if !tcp::is_syn(tcp_flags) {
        return false;
    }
    let state = field!(r, FlowRecord, state).get();
    if state & flow_state::RESET != 0 || state & FINS == FINS {
        return true;
    }
    let agreed = state & flow_state::CONFIRMED != 0 && state & FINS == 0;
    !agreed && !has_backend(env, r)
}

/// Whether the tables still have the record's backend.
#[inline(always)]
pub fn has_backend<E: Env>(env: &E, r: At<'_, FlowRecord>) -> bool {
    env.backend(field!(r, FlowRecord, backend_id).get()).is_some_and(|backend| {
        field!(backend, Backend, addr).get() == field!(r, FlowRecord, backend).get()
            && field!(backend, Backend, port).get() == field!(r, FlowRecord, backend_port).get()
    })
}

/// A packet's five-tuple.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub src_port: Be16,
    /// Destination port.
    pub dst_port: Be16,
    /// IP protocol number.
    pub proto: u8,
}

impl Tuple {
    /// The tuple of a record's requests.
    #[inline(always)]
    pub fn of_request(r: At<'_, FlowRecord>) -> Self {
        Self {
            src: field!(r, FlowRecord, client).get(),
            dst: field!(r, FlowRecord, vip).get(),
            src_port: field!(r, FlowRecord, client_port).get(),
            dst_port: field!(r, FlowRecord, vip_port).get(),
            proto: field!(r, FlowRecord, proto).get(),
        }
    }

    /// The tuple of a record's replies, as the backend sends them.
    #[inline(always)]
    pub fn of_reply(r: At<'_, FlowRecord>) -> Self {
        Self {
            src: field!(r, FlowRecord, backend).get(),
            dst: field!(r, FlowRecord, source).get(),
            src_port: field!(r, FlowRecord, backend_port).get(),
            dst_port: field!(r, FlowRecord, source_port).get(),
            proto: field!(r, FlowRecord, proto).get(),
        }
    }
}

/// Whether a packet is a request of the record's connection.
#[inline(always)]
pub fn is_request(r: At<'_, FlowRecord>, t: &Tuple) -> bool {
    field!(r, FlowRecord, client_port).get() == t.src_port
        && field!(r, FlowRecord, vip_port).get() == t.dst_port
        && field!(r, FlowRecord, client).get() == t.src
        && field!(r, FlowRecord, vip).get() == t.dst
        && field!(r, FlowRecord, proto).get() == t.proto
}

/// Whether a packet is a reply of the record's connection.
#[inline(always)]
pub fn is_reply(r: At<'_, FlowRecord>, t: &Tuple) -> bool {
    field!(r, FlowRecord, source_port).get() == t.dst_port
        && field!(r, FlowRecord, backend_port).get() == t.src_port
        && field!(r, FlowRecord, source).get() == t.dst
        && field!(r, FlowRecord, backend).get() == t.src
        && field!(r, FlowRecord, proto).get() == t.proto
}

/// The tag of a place, if it is `tag` in any generation.
#[inline(always)]
pub(crate) fn tagged(set: At<'_, FlowSet>, way: u32, tag: u32) -> Option<u32> {
    let seen = field!(set, FlowSet, tags).element(way).get_now();
    ((seen ^ tag) & !flow_tag::GENERATION == 0).then_some(seen)
}

/// The record of a place whose tag was `seen`.
#[inline(always)]
pub(crate) fn check<'a>(
    set: At<'a, FlowSet>,
    index: u32,
    way: u32,
    seen: u32,
    matches: impl Fn(At<'a, FlowRecord>) -> bool,
) -> Option<Found<'a>> {
    let record = field!(set, FlowSet, records).element(way);
    if !matches(record) {
        return None;
    }
    let tag_at = field!(set, FlowSet, tags).element(way);
    Some(Found { record, tag_at, tag: seen, slot: SnatSlot::owned(index, way & 0xf) })
}

#[inline(always)]
fn search<'a>(
    set: At<'a, FlowSet>,
    index: u32,
    hash: FlowHash,
    matches: impl Fn(At<'a, FlowRecord>) -> bool,
) -> Option<Found<'a>> {
    let (home, tag) = (hash.home(), hash.tag());
    // A record sits in its home way unless another had it: one comparison, most of the time. Its place
    // does not depend on the tag that is read, so the processor fetches tag and record at once.
    if let Some(seen) = tagged(set, home, tag)
        && let Some(found) = check(set, index, home, seen, &matches)
    {
        return Some(found);
    }
    for way in 0..FLOW_WAYS as u32 {
        let Some(seen) = tagged(set, way, tag) else { continue };
        // Adds zero, in a way that the verifier cannot know: sixteen hits at sixteen constant places
        // would each be followed to the program's end; one at an unknown place is followed once.
        let way = way + ((opaque(seen as u64) as u32 ^ tag) & !flow_tag::GENERATION);
        if let Some(found) = check(set, index, way, seen, &matches) {
            return Some(found);
        }
    }
    None
}

/// The set that a client's connections are in.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The set.
    pub set: At<'a, FlowSet>,
    /// Its index.
    pub index: u32,
    /// The client's hash.
    pub hash: FlowHash,
}

/// Where the connections of `client:port` are.
#[inline(always)]
pub fn place<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    client: Addr,
    port: Be16,
    proto: u8,
) -> Option<Place<'a>> {
    let seeds = field!(settings, Settings, seeds);
    let hash = FlowHash::new(field!(seeds, Seeds, flow).get(), client, port, proto);
    let index = hash.set() & field!(settings, Settings, flow_set_mask).get();
    Some(Place { set: env.flow_set(index)?, index, hash })
}

/// The record whose request this packet is.
#[inline(always)]
pub fn find_request<'a>(place: &Place<'a>, tuple: &Tuple) -> Option<Found<'a>> {
    search(place.set, place.index, place.hash, |r| is_request(r, tuple))
}

/// The record whose reply this packet is, if the client's address was kept.
#[inline(always)]
pub fn find_reply<'a>(place: &Place<'a>, tuple: &Tuple) -> Option<Found<'a>> {
    search(place.set, place.index, place.hash, |r| is_reply(r, tuple))
}

/// Where the record is whose request, or reply with the client's address kept, stands in the scratch
/// room; [`SnatSlot::FREE`] if there is none. In the kernel this is a function of its own.
#[inline(always)]
pub fn find<E: Env>(env: &E, reply: bool) -> SnatSlot {
    let (Some(settings), Some(scratch)) = (env.settings(), env.scratch()) else {
        return SnatSlot::FREE;
    };
    let tuple = decide::stashed(scratch);
    let (client, port) =
        if reply { (tuple.dst, tuple.dst_port) } else { (tuple.src, tuple.src_port) };
    let Some(place) = place(env, settings, client, port, tuple.proto) else {
        return SnatSlot::FREE;
    };
    let found = search(place.set, place.index, place.hash, |r| {
        if reply { is_reply(r, &tuple) } else { is_request(r, &tuple) }
    });
    found.map_or(SnatSlot::FREE, |found| found.slot)
}

/// The record whose request, or reply with the client's address kept, stands in the scratch room. The
/// general form has it found by [`find`]: its ways are many, and the verifier walks the search on each.
#[inline(always)]
pub fn known<'a, P: Form, E: Env>(
    env: &'a E,
    scratch: At<'_, Scratch>,
    place: &Place<'a>,
    reply: bool,
) -> Option<Found<'a>> {
    let tuple = decide::stashed(scratch);
    let matches = |r| if reply { is_reply(r, &tuple) } else { is_request(r, &tuple) };
    if !P::GENERAL {
        return search(place.set, place.index, place.hash, matches);
    }
    let (index, way) = env.find(reply).owner()?;
    let found = at(env, index, way)?;
    matches(found.record).then_some(found)
}

/// The record whose reply this packet is, if the source was rewritten: found by the SNAT port.
#[inline(always)]
pub fn find_snat_reply<'a, E: Env>(
    env: &'a E,
    settings: At<'a, Settings>,
    tuple: &Tuple,
) -> Option<Found<'a>> {
    let port = tuple.dst_port.host();
    if port < field!(settings, Settings, snat_reply_first).get()
        || port > field!(settings, Settings, snat_reply_last).get()
    {
        return None;
    }
    let slot =
        env.snat(snat_index(port, hash::snat_group(tuple.src, tuple.src_port, tuple.proto)))?.get();
    let (index, way) = slot.owner()?;
    let found = at(env, index, way)?;
    is_reply(found.record, tuple).then_some(found)
}

#[inline(always)]
fn snat_index(port: u16, group: u32) -> u32 {
    port as u32 * maps::SNAT_SLOTS_PER_PORT + group % maps::SNAT_SLOTS_PER_PORT
}

/// A SNAT port that this decision owns until it writes its record or gives it back.
#[derive(Clone, Copy)]
pub struct Claim {
    /// The port.
    pub port: Be16,
    /// Index into `sl_snat_v1`.
    pub index: u32,
}

/// Ports tried before the source is called exhausted. With 70 % of the ports taken, one connection
/// in 90,000 is refused.
const SNAT_TRIES: u32 = 32;
/// Of these, the first ones, which take no port of the flood guard's: if they all fail most ports are
/// taken, and a flood may have them.
const SNAT_TRIES_FREE: u32 = 4;

/// Takes a free SNAT port towards a backend, beginning at a place that depends on the connection:
/// after a loss of all state the same connection gets the same port again, if it is free.
#[inline(always)]
pub fn claim_snat<E: Env>(
    env: &E,
    settings: At<'_, Settings>,
    draft: At<'_, FlowRecord>,
    start: u32,
) -> Option<Claim> {
    let reply = Tuple::of_reply(draft);
    let group = hash::snat_group(reply.src, reply.src_port, reply.proto);
    let first = field!(settings, Settings, snat_first_port).get() as u32;
    let last = field!(settings, Settings, snat_last_port).get() as u32;
    let ports = last.wrapping_sub(first).wrapping_add(1) & 0x1_ffff;
    for attempt in 0..SNAT_TRIES {
        // A multiplicative step: neighbours in time do not queue up behind each other.
        let offset = hash::scale(start.wrapping_add(attempt.wrapping_mul(0x9e37_79b9)), ports);
        let port = (first + offset) as u16;
        let index = snat_index(port, group);
        let slot = env.snat(index)?;
        if slot.replace_slot(SnatSlot::FREE, SnatSlot::CLAIMED)
            || attempt >= SNAT_TRIES_FREE && flood::yields(env, settings, slot, index)
        {
            return Some(Claim { port: Be16::new(port), index });
        }
    }
    None
}

/// Changes the owner of SNAT slot `index_plus_one`, if it still is `old`'s.
#[inline(always)]
pub(crate) fn give_back<E: Env>(env: &E, index_plus_one: u32, old: SnatSlot, new: SnatSlot) {
    if index_plus_one != 0
        && let Some(slot) = env.snat(index_plus_one - 1)
    {
        slot.replace_slot(old, new);
    }
}

impl At<'_, SnatSlot> {
    /// Replaces `old` by `new` if the slot still is `old`.
    #[inline(always)]
    pub fn replace_slot(self, old: SnatSlot, new: SnatSlot) -> bool {
        self.part(0, |s: &SnatSlot| &s.0).replace_if(old.0, new.0)
    }
}

/// The record at a place of the table, unless it is free.
#[inline(always)]
pub fn at<E: Env>(env: &E, index: u32, way: u32) -> Option<Found<'_>> {
    let set = env.flow_set(index)?;
    let tag_at = field!(set, FlowSet, tags).element(way);
    let tag = tag_at.get_now();
    let record = field!(set, FlowSet, records).element(way);
    flow_tag::is_used(tag).then_some(Found {
        record,
        tag_at,
        tag,
        slot: SnatSlot::owned(index, way),
    })
}

/// What came of an insertion.
#[derive(Clone, Copy)]
pub enum Inserted {
    /// The record is in the table.
    New {
        /// Where it is.
        slot: SnatSlot,
        /// SNAT index plus one of the record that had to give way, 0 for none.
        freed: u32,
    },
    /// Another CPU was first: its record counts.
    Other(SnatSlot),
    /// Sixteen live connections of other clients, all replied to.
    Full,
}

/// How long a record in this state lives without packets, in jiffies.
#[inline(always)]
pub fn timeout(timeouts: At<'_, Timeouts>, proto: u8, state: u32) -> u32 {
    let confirmed = state & flow_state::CONFIRMED != 0;
    if proto == IPPROTO_TCP {
        let fins = flow_state::FIN_FORWARD | flow_state::FIN_REPLY;
        if state & flow_state::RESET != 0 || state & fins == fins {
            field!(timeouts, Timeouts, tcp_closing).get()
        } else if confirmed {
            field!(timeouts, Timeouts, tcp_established).get()
        } else {
            field!(timeouts, Timeouts, tcp_syn).get()
        }
    } else if confirmed {
        field!(timeouts, Timeouts, udp_replied).get()
    } else {
        field!(timeouts, Timeouts, udp_oneway).get()
    }
}

/// Bits of a candidate's rank, in falling order of how gladly its place is taken. Below them stand
/// its age and its way.
mod rank {
    /// Nobody's.
    pub const FREE: u32 = 43;
    /// Silent for longer than its timeout.
    pub const EXPIRED: u32 = 42;
    /// Not confirmed: half open, or never replied to.
    pub const UNCONFIRMED: u32 = 41;
    /// Of the same client: who fills a set can only harm itself.
    pub const SAME_CLIENT: u32 = 40;
}

/// 1 if `x` is zero, without a branch.
#[inline(always)]
fn is_zero(x: u64) -> u64 {
    opaque((opaque(x | x.wrapping_neg()) >> 63) ^ 1)
}

/// 1 if `a` is below `b`, without a branch.
#[inline(always)]
fn is_below(a: u32, b: u32) -> u64 {
    opaque(opaque((a as u64).wrapping_sub(b as u64)) >> 63)
}

/// How gladly the place of record `way` is taken: larger is gladder; no bit of [`rank`]: never.
#[inline(always)]
fn rank_of(set: At<'_, FlowSet>, way: u32, new: At<'_, FlowRecord>) -> u64 {
    let tag = field!(set, FlowSet, tags).element(way).get_now();
    let r = field!(set, FlowSet, records).element(way);
    let now = field!(new, FlowRecord, seen).get();
    let age = now.wrapping_sub(field!(r, FlowRecord, seen).get());
    // Another CPU may have stamped the record after `now` was read: that is no age at all.
    let age = age & (opaque(age as u64 >> 31) as u32).wrapping_sub(1);
    let timeout = field!(r, FlowRecord, timeout).get();
    const { assert!(flow_state::CONFIRMED == 1 << 4 && flow_tag::USED == 1) };
    let confirmed = (field!(r, FlowRecord, state).get() as u64 >> 4) & 1;
    let client = field!(new, FlowRecord, client).get();
    let (a, b) = (field!(r, FlowRecord, client).get().words64(), client.words64());
    (tag as u64 & 1 ^ 1) << rank::FREE
        | is_below(timeout, age) << rank::EXPIRED
        | (confirmed ^ 1) << rank::UNCONFIRMED
        | is_zero((a[0] ^ b[0]) | (a[1] ^ b[1])) << rank::SAME_CLIENT
        | (age as u64) << 4
        | way as u64
}

/// Whether the set has a record of the same client and port.
#[inline(always)]
pub(crate) fn has_client(place: &Place<'_>) -> bool {
    let mut others = 1;
    for way in 0..FLOW_WAYS as u32 {
        let tag = field!(place.set, FlowSet, tags).element(way).get_now();
        others &= is_zero(((tag ^ place.hash.tag()) & !flow_tag::GENERATION) as u64) ^ 1;
    }
    others == 0
}

/// Writes a record, unless another CPU has written one for the same connection. A record that keeps
/// the client's address gets a source port here, where no other CPU can take the same.
///
/// `owner` holds the record's SNAT port: [`SnatSlot::CLAIMED`] for a new connection, or the place that
/// the record has had until now; its source port is then settled. `taken` in the scratch room says which
/// source ports are taken by a record that is not in the set.
#[inline(always)]
pub fn insert<E: Env>(
    env: &E,
    place: &Place<'_>,
    scratch: At<'_, Scratch>,
    owner: SnatSlot,
) -> Inserted {
    let Some(lock) = env.flow_lock(place.index % maps::FLOW_LOCKS) else {
        return Inserted::Full;
    };
    let new = field!(scratch, Scratch, draft);
    let claimed = field!(new, FlowRecord, snat).get();
    let snat = if claimed != 0 { env.snat(claimed - 1) } else { None };
    env.lock(lock);
    if let Some(other) = survey(place, scratch) {
        env.unlock(lock);
        return Inserted::Other(other);
    }
    rank(place, scratch);
    let best = field!(scratch, Scratch, best).get_now();
    let moves = owner != SnatSlot::CLAIMED;
    if best >> rank::SAME_CLIENT == 0 || claimed == 0 && !keep_source(scratch, moves) {
        env.unlock(lock);
        return Inserted::Full;
    }
    let way = best as u32 & 0xf;
    let tag_at = field!(place.set, FlowSet, tags).element(way);
    let record = field!(place.set, FlowSet, records).element(way);
    let old = tag_at.get_now();
    let freed = if flow_tag::is_used(old) { field!(record, FlowRecord, snat).get() } else { 0 };
    tag_at.set_now(flow_tag::freed(old));
    record.copy_from(new);
    let slot = SnatSlot::owned(place.index, way);
    if let Some(snat) = snat {
        snat.replace_slot(owner, slot);
    }
    let generation = old.wrapping_add(flow_tag::NEXT) & flow_tag::GENERATION;
    tag_at.set_now(place.hash.tag() | generation);
    env.unlock(lock);
    Inserted::New { slot, freed }
}

/// Looks at every place of the set once: the record of the same connection, if there is one; else
/// `best` is a free place, if there is one, and `taken` says which source ports are, beside those that
/// it said before.
#[inline(always)]
fn survey(place: &Place<'_>, scratch: At<'_, Scratch>) -> Option<SnatSlot> {
    let new = field!(scratch, Scratch, draft);
    let (best, taken) = (field!(scratch, Scratch, best), field!(scratch, Scratch, taken));
    best.set_now(0);
    for way in 0..FLOW_WAYS as u32 {
        let tag = field!(place.set, FlowSet, tags).element(way).get_now();
        if !flow_tag::is_used(tag) {
            best.set_now(1 << rank::FREE | way as u64);
        } else if (tag ^ place.hash.tag()) & !flow_tag::GENERATION == 0 {
            let r = field!(place.set, FlowSet, records).element(way);
            if is_same_request(r, new) {
                return Some(SnatSlot::owned(place.index, way));
            }
            taken.set_now(taken.get_now() | port_taken(r, new));
        }
    }
    None
}

/// Whether two records have the same requests.
#[inline(always)]
pub(crate) fn is_same_request(r: At<'_, FlowRecord>, new: At<'_, FlowRecord>) -> bool {
    field!(r, FlowRecord, client_port).get() == field!(new, FlowRecord, client_port).get()
        && field!(r, FlowRecord, vip_port).get() == field!(new, FlowRecord, vip_port).get()
        && field!(r, FlowRecord, client).get() == field!(new, FlowRecord, client).get()
        && field!(r, FlowRecord, vip).get() == field!(new, FlowRecord, vip).get()
        && field!(r, FlowRecord, proto).get() == field!(new, FlowRecord, proto).get()
}

/// Which source port towards the new record's backend another record of the same client has, as a
/// bit whose number is the difference in the port's top two bits.
#[inline(always)]
pub(crate) fn port_taken(r: At<'_, FlowRecord>, new: At<'_, FlowRecord>) -> u32 {
    let port = field!(r, FlowRecord, source_port).get().host();
    let differs = port ^ field!(new, FlowRecord, client_port).get().host();
    let same = field!(r, FlowRecord, source).get() == field!(new, FlowRecord, source).get()
        && field!(r, FlowRecord, backend).get() == field!(new, FlowRecord, backend).get()
        && field!(r, FlowRecord, backend_port).get() == field!(new, FlowRecord, backend_port).get()
        && field!(r, FlowRecord, proto).get() == field!(new, FlowRecord, proto).get()
        && differs & hash::CLIENT_PORT_SET_BITS == 0;
    if same { 1 << (differs >> 14) } else { 0 }
}

/// The client's own port, unless a connection of the same client port to the same backend through
/// another VIP has it: then one with other top bits, which chooses the same set. False if all four
/// are taken. A port that is settled (`moves`) is not chosen anew.
#[inline(always)]
fn keep_source(scratch: At<'_, Scratch>, moves: bool) -> bool {
    let new = field!(scratch, Scratch, draft);
    let client_port = field!(new, FlowRecord, client_port).get();
    let taken = field!(scratch, Scratch, taken).get_now();
    if moves {
        let top = (client_port.host() ^ field!(new, FlowRecord, source_port).get().host()) >> 14;
        return taken >> top & 1 == 0;
    }
    for top in 0..4u16 {
        let port = Be16::new(client_port.host() ^ (top << 14));
        if port.host() != 0 && taken >> top & 1 == 0 {
            if top != 0 {
                field!(new, FlowRecord, source_port).set(port);
                let delta = field!(new, FlowRecord, l4_delta);
                let sum = Sum(delta.get() as u64).sub16(client_port.raw()).add16(port.raw());
                delta.set(sum.fold());
            }
            return true;
        }
    }
    false
}

/// Leaves in `best` the place that is given away most gladly, the home way if it is free.
#[inline(always)]
fn rank(place: &Place<'_>, scratch: At<'_, Scratch>) {
    let best = field!(scratch, Scratch, best);
    let home = place.hash.home();
    if !flow_tag::is_used(field!(place.set, FlowSet, tags).element(home).get_now()) {
        best.set_now(1 << rank::FREE | home as u64);
    }
    if best.get_now() != 0 {
        return;
    }
    let new = field!(scratch, Scratch, draft);
    for way in 0..FLOW_WAYS as u32 {
        let candidate = rank_of(place.set, way, new);
        if candidate > best.get_now() {
            best.set_now(candidate);
        }
    }
}
