//! Checks of single fields, shared by the kinds.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::Skipped;
use crate::model::{ObjectName, Protocol};

/// Longest name of an object (RFC 1123 subdomain, as the API server checks).
const MAX_NAME: usize = 253;
/// Longest piece of somebody's text in a message.
const MAX_QUOTE: usize = 80;

/// `text` for a message: cut at `max` characters, and with what a terminal would obey or not show
/// written as escapes.
pub(super) fn printable(text: &str, max: usize) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == max {
            out.push('…');
            break;
        }
        match c {
            '"' | '\'' | '\\' => out.push(c),
            c => out.extend(c.escape_debug()),
        }
    }
    out
}

/// Somebody's text in backticks.
pub(super) fn quote(text: &str) -> String {
    format!("`{}`", printable(text, MAX_QUOTE))
}

/// Whether `name` can be the name of an object.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
}

/// What messages about one object have in common.
pub(super) struct Subject<'a> {
    pub(super) origin: &'a Arc<str>,
    pub(super) title: String,
}

impl<'a> Subject<'a> {
    pub(super) fn error(&self, field: impl Into<String>, reason: impl Into<String>) -> Skipped {
        Skipped::error(&self.title, reason).within(self.origin).at(field)
    }

    pub(super) fn notice(&self, field: impl Into<String>, reason: impl Into<String>) -> Skipped {
        Skipped::notice(&self.title, reason).within(self.origin).at(field)
    }

    /// Subject and name of an object, or why it has none.
    pub(super) fn of(
        origin: &'a Arc<str>,
        kind: &str,
        meta: &ObjectMeta,
        skipped: &mut Vec<Skipped>,
    ) -> Option<(Self, ObjectName)> {
        let namespace = meta.namespace.as_deref().unwrap_or("default");
        let name = meta.name.as_deref().unwrap_or("");
        for (field, text) in [("metadata.namespace", namespace), ("metadata.name", name)] {
            if !is_name(text) {
                let reason = if text.is_empty() {
                    "is missing".to_owned()
                } else {
                    format!("{} is not a DNS name", quote(text))
                };
                skipped.push(
                    Skipped::error(kind, reason)
                        .within(origin)
                        .at(field)
                        .remedy("use lower case letters, digits, '-' and '.', at most 253"),
                );
                return None;
            }
        }
        let name = ObjectName::new(namespace, name);
        let title = format!("{kind} {name}");
        Some((Self { origin, title }, name))
    }

    /// A port number, or why it is none.
    pub(super) fn port(
        &self,
        field: &str,
        number: i32,
        skipped: &mut Vec<Skipped>,
    ) -> Option<NonZeroU16> {
        let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
        if port.is_none() {
            skipped.push(
                self.error(field, format!("{number} is not a port")).remedy("use 1 to 65535"),
            );
        }
        port
    }

    /// A protocol that Sluice translates; `None` means TCP.
    pub(super) fn protocol(
        &self,
        field: &str,
        text: Option<&str>,
        skipped: &mut Vec<Skipped>,
    ) -> Option<Protocol> {
        match text.unwrap_or("TCP") {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => {
                skipped.push(self.notice(field, "SCTP is left to the kernel"));
                None
            }
            other => {
                skipped.push(
                    self.error(field, format!("{} is not a protocol", quote(other)))
                        .remedy("use TCP or UDP"),
                );
                None
            }
        }
    }

    /// A unicast address that may be routed, or why it is none.
    pub(super) fn address(
        &self,
        field: &str,
        text: &str,
        skipped: &mut Vec<Skipped>,
    ) -> Option<IpAddr> {
        match parse_ip(text).ok_or("is not an IP address").and_then(|ip| match special(ip) {
            None => Ok(ip),
            Some(what) => Err(what),
        }) {
            Ok(ip) => Some(ip),
            Err(what) => {
                skipped.push(
                    self.error(field, format!("{} {what}", quote(text)))
                        .remedy("use a routable unicast address without zone"),
                );
                None
            }
        }
    }

    /// Addresses of a list, each once; bad ones are left out with a reason.
    pub(super) fn addresses<'t>(
        &self,
        field: &str,
        texts: impl IntoIterator<Item = &'t str>,
        skipped: &mut Vec<Skipped>,
    ) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for (i, text) in texts.into_iter().enumerate() {
            if let Some(ip) = self.address(&format!("{field}[{i}]"), text, skipped)
                && !addresses.contains(&ip)
            {
                addresses.push(ip);
            }
        }
        addresses
    }

    /// A pod CIDR, or why it is none.
    pub(super) fn cidr(
        &self,
        field: &str,
        text: &str,
        skipped: &mut Vec<Skipped>,
    ) -> Option<IpNet> {
        let net = text.parse::<IpNet>().ok().map(|net| net.trunc());
        match net {
            Some(net) if net.prefix_len() > 0 && special(net.addr()).is_none() => Some(net),
            _ => {
                skipped.push(
                    self.error(field, format!("{} is not a pod CIDR", quote(text)))
                        .remedy("use address/prefix length, not the whole address space"),
                );
                None
            }
        }
    }
}

/// An address as Kubernetes reads it: IPv4 with leading zeros is decimal (Go's ParseIPSloppy),
/// zones and IPv4-mapped IPv6 addresses are refused.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        let v6: Ipv6Addr = text.parse().ok()?;
        return v6.to_ipv4_mapped().is_none().then_some(IpAddr::V6(v6));
    }
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || part.len() > 16 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
}

/// Why an address can be neither a frontend's nor a backend's, as the end of a sentence.
fn special(ip: IpAddr) -> Option<&'static str> {
    let (broadcast, link_local) = match ip {
        IpAddr::V4(v4) => (v4.is_broadcast(), v4.is_link_local()),
        IpAddr::V6(v6) => (false, v6.is_unicast_link_local()),
    };
    if ip.is_unspecified() {
        Some("is the unspecified address")
    } else if ip.is_loopback() {
        Some("is a loopback address")
    } else if ip.is_multicast() {
        Some("is a multicast address")
    } else if broadcast {
        Some("is the broadcast address")
    } else if link_local {
        Some("is a link-local address")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_ip_reads_leading_zeros_as_decimal() {
        assert_eq!(parse_ip("010.0.0.008"), parse_ip("10.0.0.8"));
        assert!(parse_ip("10.0.0.8").is_some());
    }

    #[test]
    fn parse_ip_refuses_what_is_no_plain_address() {
        for text in [
            "",
            "10.0.0",
            "10.0.0.1.2",
            "256.0.0.1",
            "10.0.0.-1",
            "0x10.0.0.1",
            "10.0.0.1/32",
            "fe80::1%eth0",
            "::ffff:10.0.0.1",
            " 10.0.0.1",
            "1000000000000000000000000.0.0.1",
        ] {
            assert_eq!(parse_ip(text), None, "{text}");
        }
    }

    #[test]
    fn quote_cuts_and_escapes() {
        assert_eq!(quote("\u{1b}[31mred"), "`\\u{1b}[31mred`");
        assert!(quote(&"é".repeat(10_000)).len() < 300);
    }
}
