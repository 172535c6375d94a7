//! Whether the host has netfilter rules that a packet delivered by redirect would skip.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

/// `(NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETCHAIN` (include/uapi/linux/netfilter).
const GET_CHAIN: u16 = (10 << 8) | 4;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const HOOK_NUM: u16 = 1;

/// The first place with rules that a forwarded packet passes, or `None` where there is none. What
/// cannot be found out counts as a rule.
pub fn rules() -> Option<String> {
    for (family, path) in [
        ("iptables", "/proc/thread-self/net/ip_tables_names"),
        ("ip6tables", "/proc/thread-self/net/ip6_tables_names"),
    ] {
        // Absent where the kernel has no legacy tables; a table that is loaded may hold rules.
        if let Ok(names) = std::fs::read_to_string(path)
            && let Some(name) = names.lines().next()
        {
            return Some(format!("legacy {family} table {name}"));
        }
    }
    match chains() {
        Ok(chains) => chains
            .into_iter()
            .find(|c| c.on_the_way() && (c.references > 0 || c.drops))
            .map(|c| format!("nftables chain {} {}", c.table, c.name)),
        // No nf_tables in this kernel: no rules.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP)
            ) =>
        {
            None
        }
        Err(e) => Some(format!("nftables cannot be read: {e}")),
    }
}

#[derive(Default)]
struct Chain {
    family: u8,
    table: String,
    name: String,
    hook: Option<u32>,
    references: u32,
    drops: bool,
}

impl Chain {
    /// Base chain of inet, ip or ip6 at prerouting, forward or postrouting.
    fn on_the_way(&self) -> bool {
        matches!(self.family, 1 | 2 | 10) && matches!(self.hook, Some(0 | 2 | 4))
    }
}

fn chains() -> io::Result<Vec<Chain>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5))?;
    // struct nlmsghdr, struct nfgenmsg (family AF_UNSPEC).
    let mut question = Vec::new();
    question.extend_from_slice(&20u32.to_ne_bytes());
    question.extend_from_slice(&GET_CHAIN.to_ne_bytes());
    question.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    question.extend_from_slice(&[0; 12]);
    socket.send(&question, 0)?;
    let mut chains = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let (Some(length), Some(kind)) = (u32_ne(rest, 0), u16_ne(rest, 4)) {
            let length = length as usize;
            let Some(message) = rest.get(..length).filter(|_| length >= 16) else {
                break;
            };
            match kind {
                // NLMSG_DONE, NLMSG_ERROR
                3 => return Ok(chains),
                2 => {
                    let code = u32_ne(message, 16).unwrap_or_default() as i32;
                    if code == 0 {
                        return Ok(chains);
                    }
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => chains.push(chain(message)),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn chain(message: &[u8]) -> Chain {
    let mut chain =
        Chain { family: message.get(16).copied().unwrap_or_default(), ..Chain::default() };
    for (kind, value) in attributes(message.get(20..).unwrap_or_default()) {
        match kind {
            CHAIN_TABLE => chain.table = text(value),
            CHAIN_NAME => chain.name = text(value),
            CHAIN_HOOK => {
                chain.hook = attributes(value)
                    .find(|(kind, _)| *kind == HOOK_NUM)
                    .and_then(|(_, v)| u32_be(v));
            }
            CHAIN_USE => chain.references = u32_be(value).unwrap_or(1),
            // NF_DROP is 0.
            CHAIN_POLICY => chain.drops = u32_be(value) == Some(0),
            _ => {}
        }
    }
    chain
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = u16_ne(rest, 0)? as usize;
        // The two highest bits are flags.
        let kind = u16_ne(rest, 2)? & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

fn u16_ne(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_ne(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u32_be(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}
