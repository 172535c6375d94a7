//! Internet checksums by difference (RFC 1071, RFC 1624 equation 3).
//!
//! Sums are of 16-bit words as the machine loads them: one's complement addition does not care
//! about byte order (RFC 1071 section 2B), so nothing is swapped.

use sluice_abi::Addr;

/// A one's complement sum that has not been folded yet. Room for 2^48 words.
#[derive(Clone, Copy, Default)]
pub struct Sum(pub u64);

impl Sum {
    /// Adds a word that will be there.
    #[inline(always)]
    pub fn add16(self, raw: u16) -> Self {
        Self(self.0 + raw as u64)
    }

    /// Takes a word away that was there.
    #[inline(always)]
    pub fn sub16(self, raw: u16) -> Self {
        Self(self.0 + !raw as u64)
    }

    /// Adds both words of a double word.
    #[inline(always)]
    pub fn add32(self, raw: u32) -> Self {
        Self(self.0 + raw as u64)
    }

    /// Takes both words of a double word away.
    #[inline(always)]
    pub fn sub32(self, raw: u32) -> Self {
        Self(self.0 + !raw as u64)
    }

    /// Adds an address: four bytes of IPv4, sixteen of IPv6. A v4-mapped prefix must be on both
    /// sides of a difference or on none; it is left out by `v4`.
    #[inline(always)]
    pub fn add_addr(self, addr: Addr, v4: bool) -> Self {
        let w = addr.words32();
        if v4 { self.add32(w[3]) } else { self.add32(w[0]).add32(w[1]).add32(w[2]).add32(w[3]) }
    }

    /// Takes an address away.
    #[inline(always)]
    pub fn sub_addr(self, addr: Addr, v4: bool) -> Self {
        let w = addr.words32();
        if v4 { self.sub32(w[3]) } else { self.sub32(w[0]).sub32(w[1]).sub32(w[2]).sub32(w[3]) }
    }

    /// The sum in 16 bits.
    #[inline(always)]
    pub fn fold(self) -> u16 {
        let s = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let s = (s & 0xffff) + (s >> 16);
        let s = (s & 0xffff) + (s >> 16);
        let s = (s & 0xffff) + (s >> 16);
        s as u16
    }
}

/// The checksum field after `delta` was added to the data it covers. A wrong checksum stays wrong
/// (RFC 1624: the field is updated, never computed anew).
#[inline(always)]
pub fn update(field: u16, delta: u16) -> u16 {
    !Sum(!field as u64).add16(delta).fold()
}

/// The difference of the other direction.
#[inline(always)]
pub const fn negate(delta: u16) -> u16 {
    !delta
}

/// A UDP checksum after `delta`: zero means "none" and stays so; a result of zero is sent as all
/// ones (RFC 768).
#[inline(always)]
pub fn update_udp(field: u16, delta: u16) -> u16 {
    if field == 0 {
        return 0;
    }
    match update(field, delta) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn update_equals_recomputation_and_negate_undoes_it() {
        let words = [0x1234u16, 0xffff, 0, 0xabcd];
        let whole = |w: &[u16]| !w.iter().fold(Sum::default(), |s, &x| s.add16(x)).fold();
        let mut changed = words;
        changed[1] = 0x0102;
        let delta = Sum::default().sub16(words[1]).add16(changed[1]).fold();
        assert_eq!(update(whole(&words), delta), whole(&changed));
        assert_eq!(update(whole(&changed), negate(delta)), whole(&words));
    }

    #[test]
    fn bad_checksum_stays_bad() {
        let good = 0x1111u16;
        let bad = 0x1112u16;
        for delta in [0u16, 1, 0x7fff, 0xfffe] {
            assert_ne!(update(good, delta), update(bad, delta));
        }
    }

    #[test]
    fn udp_zero_stays_zero_and_computed_zero_becomes_all_ones() {
        assert_eq!(update_udp(0, 0x1234), 0);
        // !( !field + delta ) == 0  needs  !field + delta == 0xffff
        assert_eq!(update_udp(0x0005, 0x0005), 0xffff);
    }
}
