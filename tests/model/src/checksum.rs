//! The Internet checksum by its definition (RFC 1071), and its update (RFC 1624).

/// One's complement sum of 16-bit words in network order; an odd byte at the end is padded with
/// zero (RFC 1071 section 1).
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        let word = u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
        sum += u32::from(word);
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

/// The checksum of `bytes`, in which the checksum's own field is zero.
pub fn checksum(bytes: &[u8]) -> u16 {
    !sum(bytes)
}

/// The checksum after the covered bytes `old` have become `new`: RFC 1624 section 3, equation 3,
/// HC' = ~(~HC + ~m + m'). What was right stays right, and what was wrong stays wrong.
pub fn update(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    assert_eq!((old.len() % 2, old.len()), (0, new.len()), "the same words before and after");
    let mut words = (!checksum).to_be_bytes().to_vec();
    words.extend(old.iter().map(|byte| !byte));
    words.extend(new);
    !sum(&words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_example() {
        // Section 3: the sum of these bytes is ddf2.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }

    #[test]
    fn rfc_1624_example() {
        // Section 4: a header word changes from 5555 to 3285.
        assert_eq!(update(0xdd2f, &[0x55, 0x55], &[0x32, 0x85]), 0x0000);
    }

    #[test]
    fn update_equals_a_new_sum() {
        let old = [1, 2, 3, 4, 5, 6, 0xff, 0xfe];
        let new = [9, 2, 3, 4, 0, 0, 0xff, 0xff];
        assert_eq!(update(checksum(&old), &old, &new), checksum(&new));
    }
}
