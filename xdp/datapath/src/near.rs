//! Two hash tables that every packet out of a tunnel would ask: whose is the outer source, and whose
//! the inner destination. A CPU remembers what they said until the agent changes either of them.
//!
//! The agent changes the number in `sl_lookups_v1` after each change. It is read here before the table
//! is asked, so an answer that came from before a change has a number from before it.

use crate::access::At;
use crate::env::Env;
use crate::field;
use crate::parse::Form;
use sluice_abi::{Addr, Near, NearPod, NearSource, Pod, VtepKey};

/// Which place: the top eight bits of a product.
#[inline(always)]
fn place(addr: Addr) -> u32 {
    let w = addr.words64();
    ((w[0] ^ w[1]).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u32
}

/// A pod of this node. The general form asks the table: its ways are many, and the verifier walks all.
#[inline(always)]
pub fn pod<P: Form, E: Env>(env: &E, addr: Addr) -> Option<At<'_, Pod>> {
    if P::GENERAL {
        return env.pod(&addr);
    }
    let (near, generation) = (env.near()?, env.lookups()?.get_now());
    let entry = field!(near, Near, pods).element(place(addr));
    let pod = field!(entry, NearPod, pod);
    let is_pod = field!(entry, NearPod, is_pod);
    let asked = field!(entry, NearPod, generation);
    if generation == 0 || asked.get() != generation || field!(entry, NearPod, addr).get() != addr {
        let key = field!(entry, NearPod, addr);
        key.set(addr);
        let found = env.pod(key.as_key());
        // What was copied is used, too: one pointer for what follows, whichever way it came.
        if let Some(found) = found {
            pod.copy_from(found);
        }
        is_pod.set(found.is_some() as u32);
        asked.set(generation);
    }
    (is_pod.get() != 0).then_some(pod)
}

/// Index of the tunnel end that may send from an address.
#[inline(always)]
pub fn vtep_source<P: Form, E: Env>(env: &E, key: &VtepKey) -> Option<u32> {
    if P::GENERAL {
        return env.vtep_source(key).map(At::get);
    }
    let (near, generation) = (env.near()?, env.lookups()?.get_now());
    let entry = field!(near, Near, sources).element(place(key.source));
    let index = field!(entry, NearSource, index);
    let asked = field!(entry, NearSource, generation);
    let known = field!(entry, NearSource, key);
    if generation == 0 || asked.get() != generation || known.get() != *key {
        let before = known.get();
        known.set(*key);
        let Some(found) = env.vtep_source(known.as_key()) else {
            // Strangers are not remembered: they would push out those who are none.
            known.set(before);
            return None;
        };
        index.set(found.get());
        asked.set(generation);
    }
    Some(index.get())
}
