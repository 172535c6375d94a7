//! Consistent hashing: Maglev's permutation table (Eisenbud et al., NSDI 2016, section 3.4).
//!
//! A table depends on the cluster's seed, the Service port and its backends only, so it is equal on
//! every node. Hashes are XXH64, whose output is specified.

use xxhash_rust::xxh64::xxh64;

use crate::model::Tuple;

/// Entries per backend: the share of a backend is then within 1 % of fair (section 5.3). The smaller
/// ones are for maps that are too small for all tables; the same for all Services of a cluster.
pub const ENTRIES_PER_BACKEND: [u32; 5] = [100, 30, 10, 3, 1];
/// Makes the second hash family (`skip`) independent of the first (`offset`).
const SKIP_SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Number of entries for a set of `backends`: 0 for none, 1 for one, else a prime at or above
/// `per_backend` times their number, but at most the largest prime within `max`; never fewer than
/// backends.
pub fn table_size(backends: usize, per_backend: u32, max: u32) -> u32 {
    let backends = backends as u64;
    match backends {
        0 | 1 => backends as u32,
        _ => {
            let wanted = next_prime(backends.saturating_mul(per_backend.into()));
            let size = wanted.min(previous_prime(max.into())).max(next_prime(backends));
            u32::try_from(size).unwrap_or(u32::MAX)
        }
    }
}

/// Whether a table of `size` can hold so many backends.
pub(crate) fn is_table_size(size: u32, backends: usize) -> bool {
    size as usize >= backends && (is_prime(size.into()) || (size, backends) == (1, 1))
}

/// The table: for each entry a position in `backends`, which are sorted and distinct. `size` is
/// one that [`table_size`] returns, or another prime not below the number of backends.
pub fn table(cluster_seed: u64, service_port: &str, backends: &[Tuple], size: u32) -> Vec<u32> {
    if backends.is_empty() || size == 0 {
        return Vec::new();
    }
    if size == 1 {
        return vec![0];
    }
    let m = u64::from(size);
    let offset_seed = xxh64(service_port.as_bytes(), cluster_seed);
    let skip_seed = xxh64(service_port.as_bytes(), cluster_seed ^ SKIP_SEED);
    // (next entry of the backend's permutation, step)
    let mut permutations: Vec<(u64, u64)> = backends
        .iter()
        .map(|backend| {
            let key = hash_key(backend);
            (xxh64(&key, offset_seed) % m, xxh64(&key, skip_seed) % (m - 1) + 1)
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut entries = vec![FREE; size as usize];
    let mut filled = 0;
    loop {
        for (position, (next, skip)) in permutations.iter_mut().enumerate() {
            // `size` is prime, so the steps visit every entry: a free one is found.
            while entries[*next as usize] != FREE {
                *next = (*next + *skip) % m;
            }
            entries[*next as usize] = position as u32;
            *next = (*next + *skip) % m;
            filled += 1;
            if filled == size {
                return entries;
            }
        }
    }
}

/// What of a backend is hashed: 16 address bytes, port in network order, protocol.
fn hash_key(backend: &Tuple) -> [u8; 19] {
    let mut key = [0; 19];
    key[..16].copy_from_slice(&sluice_abi::Addr::from(backend.addr).0);
    key[16..18].copy_from_slice(&backend.port.to_be_bytes());
    key[18] = backend.protocol.number();
    key
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// The smallest prime at or above `n`.
fn next_prime(n: u64) -> u64 {
    (n.max(2)..).find(|n| is_prime(*n)).unwrap_or(2)
}

/// The largest prime at or below `n`; 2 if there is none.
fn previous_prime(n: u64) -> u64 {
    (2..=n).rev().find(|n| is_prime(*n)).unwrap_or(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    fn backends(numbers: &BTreeSet<u32>) -> Vec<Tuple> {
        numbers
            .iter()
            .map(|n| Tuple {
                addr: Ipv4Addr::from(0x0a00_0000 + n).into(),
                port: 8080,
                protocol: Protocol::Tcp,
            })
            .collect()
    }

    #[test]
    fn size_is_prime_and_a_hundred_per_backend_within_the_cap() {
        assert_eq!(table_size(0, 100, 16_381), 0);
        assert_eq!(table_size(1, 100, 16_381), 1);
        assert_eq!(table_size(2, 100, 16_381), 211);
        assert_eq!(table_size(10, 100, 16_381), 1009);
        assert_eq!(table_size(10_000, 100, 16_381), 16_381);
        assert_eq!(table_size(10_000, 100, 16_384), 16_381);
        assert_eq!(table_size(10, 100, 0), 11);
        assert_eq!(table_size(20_000, 100, 16_381), 20_011);
        assert_eq!(table_size(10, 3, 16_381), 31);
    }

    /// The contents of one table, so that a change of the hash cannot pass unseen: nodes of two
    /// versions must agree.
    #[test]
    fn contents_are_the_same_on_every_node_and_in_every_version() {
        let table = table(7, "shop/cart:grpc/tcp", &backends(&(1..=3).collect()), 13);
        assert_eq!(table, EXPECTED);
    }
    const EXPECTED: [u32; 13] = [0, 2, 0, 2, 0, 2, 2, 0, 1, 1, 1, 0, 1];

    proptest! {
        #[test]
        fn every_entry_is_filled_and_shares_differ_by_one(
            numbers in proptest::collection::btree_set(0u32..10_000, 1..60),
            seed: u64,
        ) {
            let backends = backends(&numbers);
            let size = table_size(backends.len(), 100, 16_381);
            let table = table(seed, "a/b:c/tcp", &backends, size);
            prop_assert_eq!(table.len(), size as usize);
            let mut shares = vec![0u32; backends.len()];
            for position in table {
                shares[position as usize] += 1;
            }
            let (min, max) = (shares.iter().min(), shares.iter().max());
            prop_assert!(max.zip(min).is_some_and(|(max, min)| max - min <= 1));
        }
    }

    /// Section 5.3: few entries move that need not. Single unlucky tables move more (a quarter has
    /// been seen with four backends), so the law is about the mean; the remainder of a division
    /// would move three quarters.
    #[test]
    fn few_entries_move_when_a_backend_goes() {
        for count in [3u32, 5, 10, 40] {
            let size = table_size(count as usize, 100, 16_381);
            let mut moved = 0;
            const SEEDS: u32 = 100;
            for seed in 0..SEEDS {
                let numbers: BTreeSet<u32> = (0..count).map(|n| seed * 1000 + 7 * n).collect();
                let gone = seed * 1000 + 7 * (seed % count);
                let rest: BTreeSet<u32> = numbers.iter().copied().filter(|n| *n != gone).collect();
                let (all, rest) = (backends(&numbers), backends(&rest));
                let gone = backends(&BTreeSet::from([gone]))[0];
                let before = table(7, "a/b:c/tcp", &all, size);
                let after = table(7, "a/b:c/tcp", &rest, size);
                moved += before
                    .iter()
                    .zip(&after)
                    .map(|(b, a)| (all[*b as usize], rest[*a as usize]))
                    .filter(|(b, a)| *b != gone && b != a)
                    .count();
            }
            let share = moved as f64 / f64::from(SEEDS * size);
            assert!(share < 0.04, "{share} of the entries moved with {count} backends");
        }
    }
}
