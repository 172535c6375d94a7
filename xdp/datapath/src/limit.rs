//! How many answers may be made: a token bucket for each source, and one for each CPU.
//!
//! An answer goes to whoever a packet says it is from. Without a limit a flood of forged packets
//! would become a flood of answers to somebody who never asked.

use crate::access::At;
use crate::env::Env;
use crate::field;
use crate::hash;
use sluice_abi::{Addr, Answers, Bucket, Seeds, Settings, settings_flags};

/// Whether one more answer may go to `source`; pays for it if so.
///
/// # Cost
/// Two array lookups, one atomic exchange for each.
#[inline(always)]
pub fn allow<E: Env>(env: &E, source: Addr) -> bool {
    let Some(settings) = env.settings() else { return false };
    if field!(settings, Settings, flags).get() & settings_flags::ANSWERS == 0 {
        return false;
    }
    let answers = field!(settings, Settings, answers).get();
    let ticks = field!(settings, Settings, ticks_per_second).get();
    let seeds = field!(settings, Settings, seeds);
    let index = hash::answer_bucket(field!(seeds, Seeds, flow).get(), source);
    let (Some(of_source), Some(of_cpu)) =
        (env.source_bucket(index & (Bucket::SOURCES - 1)), env.cpu_bucket())
    else {
        return false;
    };
    let now = env.now();
    let Answers { source_rate, source_burst, cpu_rate, cpu_burst } = answers;
    // The source first: one that floods must not empty the bucket of all others.
    pay(of_source, now, ticks, source_rate, source_burst)
        && pay(of_cpu, now, ticks, cpu_rate, cpu_burst)
}

/// Takes the price of one answer out of a bucket, after what it has gained ([`Answers`]).
#[inline(always)]
fn pay(bucket: At<'_, Bucket>, now: u32, ticks: u32, rate: u16, burst: u16) -> bool {
    let word = bucket.part(0, |b: &Bucket| &b.0);
    let price = ticks as u64;
    let most = burst as u64 * price;
    let old = word.get_now();
    let gained = now.wrapping_sub(old as u32) as u64 * rate as u64;
    let held = (old >> 32) + gained;
    let held = if held > most { most } else { held };
    if price == 0 || held < price {
        return false;
    }
    // Another CPU that was faster has paid for the answer to the same source; that one must do.
    word.replace_if(old, (held - price) << 32 | now as u64)
}
