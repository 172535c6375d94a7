//! Which source ports this node's own sockets take: SNAT must not take them too, or a connection of
//! the node and one of a client would be the same to an endpoint.

use std::ops::RangeInclusive;

/// Ports that the kernel gives to sockets (net.ipv4.ip_local_port_range, for IPv6 too), and those of
/// them that it leaves free (net.ipv4.ip_local_reserved_ports).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPorts {
    given: Vec<RangeInclusive<u16>>,
    reserved: Vec<RangeInclusive<u16>>,
}

impl LocalPorts {
    /// Those of the calling thread's network namespace; none where the kernel does not say.
    pub fn read() -> Self {
        let text = |name: &str| {
            std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default()
        };
        Self::parse(&text("ip_local_port_range"), &text("ip_local_reserved_ports"))
    }

    /// `range` as "32768 60999", `reserved` as "8080,20000-20100".
    fn parse(range: &str, reserved: &str) -> Self {
        let ends = |first: &str, last: &str| Some(first.parse().ok()?..=last.parse().ok()?);
        let given = match range.split_whitespace().collect::<Vec<_>>()[..] {
            [first, last] => ends(first, last).into_iter().collect(),
            _ => Vec::new(),
        };
        let reserved = reserved.trim().split(',').filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            ends(first, last)
        });
        Self { given, reserved: reserved.collect() }
    }

    /// Why SNAT cannot have the ports, if so, and what would change that.
    pub fn refuse(&self, ports: RangeInclusive<u16>) -> Option<String> {
        let within =
            |ranges: &[RangeInclusive<u16>], port| ranges.iter().any(|r| r.contains(&port));
        let port = ports
            .clone()
            .find(|port| within(&self.given, *port) && !within(&self.reserved, *port))?;
        let (first, last) = (ports.start(), ports.end());
        let given = self.given.first()?;
        Some(format!(
            "snat.first_port = {first}, snat.last_port = {last}: this node's own sockets take port \
             {port} (net.ipv4.ip_local_port_range is {} to {}); choose a range outside it, or \
             reserve the ports: sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}",
            given.start(),
            given.end()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_local_sockets_are_refused_unless_they_are_reserved() {
        let ports = LocalPorts::parse("32768\t60999\n", "\n");
        assert_eq!(ports.refuse(16_384..=32_767), None);
        let text = ports.refuse(30_000..=33_000).expect("32768 is taken");
        assert!(text.contains("port 32768") && text.contains("60999"), "{text}");
        assert!(ports.refuse(60_999..=61_000).is_some());
        assert_eq!(ports.refuse(61_000..=65_535), None);
        let ports = LocalPorts::parse("32768 60999", "8080,40000-40999,41000\n");
        assert_eq!(ports.refuse(40_000..=41_000), None);
        assert!(ports.refuse(40_000..=41_001).is_some());
        // A kernel that says nothing refuses nothing.
        assert_eq!(LocalPorts::parse("", "x-y").refuse(1024..=65_535), None);
    }
}
