//! Device features, as `ethtool -k` shows and `ethtool -K` sets them, in the network namespace of the
//! calling thread (include/uapi/linux/ethtool.h).

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The set of the features' names, and the length of each.
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
/// More features than any kernel has; it names some seventy.
const MAX_FEATURES: usize = 1024;

const SIOCETHTOOL: u16 = 0x8946;

/// A feature of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// It is on.
    pub on: bool,
    /// The driver lets it be switched.
    pub changeable: bool,
}

/// One call about interface `name`; `words` hold the command and what follows it, and room for the
/// answer.
fn call(name: &str, words: &mut [u32]) -> nix::Result<()> {
    nix::ioctl_readwrite_bad!(siocethtool, SIOCETHTOOL, libc::ifreq);

    let bytes = name.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ {
        return Err(nix::Error::ENAMETOOLONG);
    }
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: words.as_mut_ptr().cast() },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the request holds a terminated name and points to `words`, which live until the call
    // returns; every caller's words tell the kernel how many there are, and it writes no more.
    unsafe { siocethtool(fd.as_raw_fd(), &raw mut request) }?;
    Ok(())
}

/// Whether GRO is on.
pub fn gro(name: &str) -> nix::Result<bool> {
    // `struct ethtool_value`: command, value.
    let mut value = [ETHTOOL_GGRO, 0];
    call(name, &mut value)?;
    Ok(value[1] != 0)
}

/// Whether the device leaves checksums of what it sends open, for hardware to fill in.
pub fn tx_checksum(name: &str) -> nix::Result<bool> {
    let mut value = [ETHTOOL_GTXCSUM, 0];
    call(name, &mut value)?;
    Ok(value[1] != 0)
}

/// Name of the kernel's driver.
pub fn driver(name: &str) -> nix::Result<String> {
    // `struct ethtool_drvinfo`: command, 32 bytes of name, 160 bytes of other things.
    let mut words = [0; 49];
    words[0] = ETHTOOL_GDRVINFO;
    call(name, &mut words)?;
    let text: Vec<u8> = words[1..9].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// All features by the kernel's names.
pub fn features(name: &str) -> nix::Result<BTreeMap<String, Feature>> {
    let names = feature_names(name)?;
    let blocks = names.len().div_ceil(32);
    // `struct ethtool_gfeatures`: command, number of blocks; each block is four words: what can be
    // changed, what is asked for, what is on, what never changes.
    let mut words = vec![0; 2 + 4 * blocks];
    (words[0], words[1]) = (ETHTOOL_GFEATURES, blocks as u32);
    call(name, &mut words)?;
    let bit = |feature: usize, word: usize| {
        words.get(2 + 4 * (feature / 32) + word).is_some_and(|w| w >> (feature % 32) & 1 != 0)
    };
    let of = |feature| Feature { on: bit(feature, 2), changeable: bit(feature, 0) };
    Ok(names.into_iter().enumerate().map(|(i, name)| (name, of(i))).collect())
}

/// Switches a feature and returns whether it is on afterwards: the driver may refuse.
pub fn switch(name: &str, feature: &str, on: bool) -> nix::Result<bool> {
    let names = feature_names(name)?;
    let index = names.iter().position(|n| n == feature).ok_or(nix::Error::EOPNOTSUPP)?;
    let blocks = names.len().div_ceil(32);
    // `struct ethtool_sfeatures`: command, number of blocks; each block is two words: what is meant,
    // what it shall be.
    let mut words = vec![0; 2 + 2 * blocks];
    (words[0], words[1]) = (ETHTOOL_SFEATURES, blocks as u32);
    let bit = 1 << (index % 32);
    words[2 + 2 * (index / 32)] = bit;
    words[3 + 2 * (index / 32)] = if on { bit } else { 0 };
    call(name, &mut words)?;
    Ok(features(name)?.get(feature).is_some_and(|feature| feature.on))
}

/// The kernel's names of the features, in the order of their bits.
fn feature_names(name: &str) -> nix::Result<Vec<String>> {
    // `struct ethtool_sset_info`: command, zero, 64 bits of which sets, then their sizes.
    let mut info = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
    let mask = (1u64 << ETH_SS_FEATURES).to_ne_bytes();
    info[2] = u32::from_ne_bytes([mask[0], mask[1], mask[2], mask[3]]);
    info[3] = u32::from_ne_bytes([mask[4], mask[5], mask[6], mask[7]]);
    call(name, &mut info)?;
    let count = info[4] as usize;
    if count == 0 || count > MAX_FEATURES {
        return Err(nix::Error::EOPNOTSUPP);
    }
    // `struct ethtool_gstrings`: command, set, number, then the strings.
    let mut words = vec![0u32; 3 + count * ETH_GSTRING_LEN / 4];
    (words[0], words[1], words[2]) = (ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count as u32);
    call(name, &mut words)?;
    let text: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(text
        .chunks_exact(ETH_GSTRING_LEN)
        .map(|bytes| {
            let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        })
        .collect())
}
