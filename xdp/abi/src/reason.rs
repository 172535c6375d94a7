//! Why a packet got its verdict: one table, the index of the counters and the word in every output.
//!
//! Append only: a reason's number is stored in pinned maps and in dashboards.
//! The law: *unsupported* passes, *malformed or denied* drops, *our own table broken* passes and
//! counts. Nothing is ever ABORTED.

/// What happens to a packet, without where it goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum VerdictKind {
    /// Handed to the kernel untouched.
    Pass,
    /// Dropped.
    Drop,
    /// Decapsulated or translated, and sent on its way.
    Forward,
}

impl VerdictKind {
    /// The word in output and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            VerdictKind::Pass => "pass",
            VerdictKind::Drop => "drop",
            VerdictKind::Forward => "forward",
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct ReasonInfo {
    /// The reason.
    pub reason: Reason,
    /// The verdict that it stands for.
    pub kind: VerdictKind,
    /// Snake case word for output and metrics.
    pub label: &'static str,
    /// One sentence for people.
    pub text: &'static str,
}

macro_rules! reasons {
    ($($number:literal $kind:ident $name:ident $label:literal $text:literal;)+) => {
        /// Why a packet got its verdict.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason {
            $(#[doc = $text] $name = $number,)+
        }

        /// The table, in the order of the numbers.
        pub const REASONS: &[ReasonInfo] = &[
            $(ReasonInfo { reason: Reason::$name, kind: VerdictKind::$kind, label: $label, text: $text },)+
        ];

        impl Reason {
            #[inline(always)]
            const fn of(number: u32) -> Self {
                match number { $($number => Reason::$name,)+ _ => Reason::TableBroken }
            }

            /// The verdict that the reason stands for.
            #[inline(always)]
            pub const fn kind(self) -> VerdictKind {
                match self { $(Reason::$name => VerdictKind::$kind,)+ }
            }
        }
    };
}

reasons! {
    0  Forward DecapLocal "decap_local" "decapsulated and delivered to a pod of this node";
    1  Forward DnatLocal "dnat_local" "request translated to a backend on this node";
    2  Forward DnatRemote "dnat_remote" "request translated and sent to a backend on another node";
    3  Forward DecapDnatLocal "decap_dnat_local" "decapsulated, then translated to a backend on this node";
    4  Forward DecapDnatRemote "decap_dnat_remote" "decapsulated, translated, sent to a backend on another node";
    5  Forward ReplyLocal "reply_local" "reply of a backend on this node translated back";
    6  Forward ReplyRemote "reply_remote" "reply of a backend on another node translated back";
    7  Pass Bypass "bypass" "`sluice bypass on`: every packet passes";
    8  Pass NotIp "not_ip" "neither IPv4 nor IPv6";
    9  Pass Vlan "vlan" "carries a VLAN tag";
    10 Pass Group "group_address" "broadcast or multicast";
    11 Pass IpOptions "ip_options" "IPv4 options or IPv6 extension headers";
    12 Pass Fragment "fragment" "IP fragment";
    13 Pass OtherProtocol "other_protocol" "neither TCP nor UDP nor ICMP";
    14 Pass NoService "no_service" "addressed to nothing that Sluice serves";
    15 Pass HopLimit "hop_limit" "hop limit would reach zero: the kernel answers";
    16 Pass FailSafe "fail_safe" "a fail-safe port of this node";
    17 Pass ForeignTunnel "foreign_tunnel" "VXLAN, but not to our address or not our VNI";
    18 Pass VxlanFlags "vxlan_flags" "VXLAN without the I flag (RFC 7348 section 5)";
    19 Pass UnknownVtepPassed "unknown_vtep_passed" "our VNI from an unknown VTEP, mode accelerate";
    20 Pass InnerNotLocal "inner_not_local" "tunnelled to neither a pod of this node nor a Service";
    21 Pass MidFlow "mid_flow" "TCP without SYN and without a flow, mode accelerate";
    22 Pass NoEndpointPassed "no_endpoint_passed" "Service without usable endpoints, mode accelerate";
    23 Pass TableBroken "table_broken" "an entry points to one that is missing: a bug, please report";
    24 Drop IpMalformed "ip_malformed" "IP header cut short, or with impossible lengths";
    25 Drop L4Malformed "l4_malformed" "TCP or UDP header cut short, or with impossible lengths";
    26 Drop VxlanMalformed "vxlan_malformed" "VXLAN or inner header cut short";
    27 Drop UnknownVtep "unknown_vtep" "our VNI from an unknown VTEP, mode replace";
    28 Drop InnerSource "inner_source" "inner source address is not of the VTEP's pod CIDRs";
    29 Drop TunnelChanged "tunnel_changed" "packet of a known flow, but from another tunnel than it began with";
    30 Drop NoEndpoint "no_endpoint" "Service without usable endpoints";
    31 Drop LocalPolicy "local_policy" "traffic policy Local and no endpoint on this node";
    32 Drop SnatExhausted "snat_exhausted" "no free SNAT port towards the backend";
    33 Drop FlowTableFull "flow_table_full" "no room for one more connection of this client";
    34 Drop NextHopUnresolved "next_hop_unresolved" "the next hop's link-layer address is not known";
    35 Drop TooBig "too_big" "does not fit the exit's MTU after encapsulation";
    36 Drop HeadRoom "head_room" "the driver left no room for the outer headers";
    37 Drop FlowChanged "flow_changed" "the flow ended while its packet was being translated";
    38 Drop Martian "martian" "source or destination address that no wire may carry";
    39 Pass Hairpin "hairpin" "a request to a Service that chose its sender, where no address is reserved for that: left to the kernel";
    40 Drop RoutingHeader "routing_header" "IPv6 routing header type 0 (RFC 5095)";
    41 Pass TooManyTags "too_many_tags" "more than two VLAN tags";
    42 Pass ExtensionChain "extension_chain" "more extension headers than are followed, or one that cannot be";
    43 Drop NoLane "no_lane" "needs the general program, and there is none behind the fast one: a bug, please report";
    44 Pass NoMetadata "no_metadata" "the driver takes no metadata: left to the kernel, which decapsulates";
    45 Pass OtherHost "other_host" "would begin a connection, but the frame is for another machine";
    46 Pass Icmp "icmp" "ICMP that concerns no connection and no address of a Service";
    47 Forward IcmpError "icmp_error" "ICMP error about a connection, translated with the packet that it quotes";
    48 Forward EchoReply "echo_reply" "echo request to a Service's address, answered";
    49 Drop IcmpMalformed "icmp_malformed" "ICMP header or the packet that it quotes cut short";
    50 Drop IcmpDenied "icmp_denied" "ICMP redirect about a connection, or error about an error";
    51 Drop Ecn "ecn" "congestion was marked on a tunnelled packet whose sender does not know such marks (RFC 6040)";
    52 Drop ClosedPort "closed_port" "a Service's address, but no Service has the port";
    53 Drop HopLimitExceeded "hop_limit_exceeded" "hop limit would reach zero on the way to another node or a pod";
    54 Drop FragmentOrphan "fragment_orphan" "later fragment to a Service or to our SNAT address whose first one was not seen";
    55 Drop EchoLimited "echo_limited" "echo request to a Service's address, beyond the rate of answers";
    56 Pass NotLinear "not_linear" "headers do not lie in the frame's first buffer";
    57 Pass Jumbogram "jumbogram" "says that it is an IPv6 jumbogram (RFC 2675), and is too short for one";
    58 Pass SuperFrame "super_frame" "tunnelled segments that were merged on arrival: left to the kernel, which opens them";
}

impl Reason {
    /// The reason of a number; `TableBroken` if there is none.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        if number < REASONS.len() as u32 { Self::of(number) } else { Reason::TableBroken }
    }

    /// The row of the table.
    pub const fn info(self) -> &'static ReasonInfo {
        &REASONS[self as usize]
    }

    /// The snake case word.
    pub const fn label(self) -> &'static str {
        self.info().label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_dense_and_words_are_unique() {
        for (i, row) in REASONS.iter().enumerate() {
            assert_eq!(row.reason as usize, i);
            assert!(REASONS.iter().filter(|r| r.label == row.label).count() == 1);
            assert_eq!(row.reason.kind(), row.kind);
        }
        assert!(REASONS.len() <= crate::maps::REASON_SLOTS as usize);
    }
}
