//! Headers as they are on the wire. Fields keep the RFC's words and the network's byte order by
//! type; nothing here knows a table or takes a decision.

mod ethernet;
mod icmp;
mod ipv4;
mod ipv6;
mod transport;
mod vxlan;

pub use ethernet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, Ethernet};
pub use icmp::{
    ICMP_ECHO, ICMP_ECHO_REPLY, ICMP_FRAGMENTATION_NEEDED, ICMP_PARAMETER, ICMP_PORT_UNREACHABLE,
    ICMP_REDIRECT, ICMP_SOURCE_QUENCH, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE, ICMPV6_ECHO,
    ICMPV6_ECHO_REPLY, ICMPV6_PARAMETER, ICMPV6_PORT_UNREACHABLE, ICMPV6_TIME_EXCEEDED,
    ICMPV6_TOO_BIG, ICMPV6_UNREACHABLE, Icmp,
};
pub use ipv4::{
    DONT_FRAGMENT, ECN_CE, ECN_ECT_0, ECN_ECT_1, ECN_NOT_ECT, FRAGMENT_MASK, Ipv4, OFFSET_MASK,
};
pub use ipv6::{
    Extension, FRAGMENT_MASK_V6, Ipv6, NEXT_HEADER_FRAGMENT, NEXT_HEADER_HOP_BY_HOP,
    NEXT_HEADER_ROUTING, is_extension_header, is_followed,
};
pub use transport::{Ports, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp, Udp};
pub use vxlan::{FLAG_VNI, VNI_MASK, Vxlan};
