//! The tables that the agent compiles from Kubernetes objects and netlink facts.

use crate::{Addr, Be16, Be32, Mac};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes, Unaligned};

/// Key of `sl_frontend_v1`: where a Service is reached, or ([`FrontendKey::address`]) an address that
/// is Services' alone. 20 bytes.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct FrontendKey {
    /// ClusterIP, LoadBalancer IP, external IP, or a node address (NodePort).
    pub addr: Addr,
    /// Service port or node port; 0 for the address as such.
    pub port: Be16,
    /// IP protocol number; 0 for the address as such.
    pub proto: u8,
    /// Zero.
    pub reserved: u8,
}

impl FrontendKey {
    /// The key under which `addr` is known as an address that is Services' alone
    /// ([`Frontend::ADDRESS`]). No packet of TCP or UDP has it.
    #[inline(always)]
    pub const fn address(addr: Addr) -> Self {
        Self { addr, port: Be16::new(0), proto: 0, reserved: 0 }
    }

    /// Whether the key stands for an address as such, not for a Service.
    #[inline(always)]
    pub const fn is_address(&self) -> bool {
        self.proto == 0
    }
}

/// A run of `sl_maglev_v1`. `size` is prime (Maglev, NSDI 2016, section 3.4), 1 for one backend,
/// or 0 for none.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Extent {
    /// Index of the first entry.
    pub offset: u32,
    /// Number of entries.
    pub size: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// The frontend is a ClusterIP.
    pub const CLUSTER_IP: u32 = 1 << 0;
    /// The frontend is a node address with a node port.
    pub const NODE_PORT: u32 = 1 << 1;
    /// The frontend is a LoadBalancer ingress IP.
    pub const LOAD_BALANCER: u32 = 1 << 2;
    /// The frontend is an external IP.
    pub const EXTERNAL_IP: u32 = 1 << 3;
    /// Policy Local applies to clients outside the cluster, and endpoints exist elsewhere: an
    /// empty external extent drops instead of rejecting (kube-proxy's rule).
    pub const EXTERNAL_LOCAL: u32 = 1 << 4;
    /// The same for clients inside the cluster (internalTrafficPolicy).
    pub const INTERNAL_LOCAL: u32 = 1 << 5;
    /// No Service, but an address that is Services' alone: no node has it, and nothing on it is
    /// left to the kernel. Ports without a Service may be rejected, an echo request answered.
    pub const ADDRESS: u32 = 1 << 6;
}

/// Value of `sl_frontend_v1`, 40 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Frontend {
    /// Service id: one per Service port, index of the Service's counters. 0 only in
    /// [`Frontend::ADDRESS`].
    pub service: u32,
    /// [`frontend_flags`].
    pub flags: u32,
    /// Backends for clients outside the cluster.
    pub external: Extent,
    /// Backends for pods and nodes of the cluster.
    pub internal: Extent,
    /// Session affinity in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// Zero; room for source ranges.
    pub reserved: u32,
    /// Zero; room for growth.
    pub reserved2: u64,
}

impl Frontend {
    /// The value under a key of [`FrontendKey::address`].
    pub const ADDRESS: Self = Self {
        service: 0,
        flags: frontend_flags::ADDRESS,
        external: Extent { offset: 0, size: 0 },
        internal: Extent { offset: 0, size: 0 },
        affinity_seconds: 0,
        reserved: 0,
        reserved2: 0,
    };
}

/// How packets reach a backend or a pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, TryFromBytes, IntoBytes, Immutable)]
#[repr(u16)]
pub enum Route {
    /// Unused entry.
    #[default]
    None = 0,
    /// On this node: the kernel or the pod's veth. `index` is not used.
    Local = 1,
    /// Through a tunnel: `index` is a VTEP.
    Tunnel = 2,
    /// By a plain route: `index` is a next hop.
    Plain = 3,
}

/// Value of `sl_backend_v1` (ARRAY, index = backend id, 0 unused), 32 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Backend {
    /// Endpoint address.
    pub addr: Addr,
    /// Endpoint port.
    pub port: Be16,
    /// A [`Route`]; 0 for an unused entry.
    pub route: u16,
    /// VTEP or next hop index, by `route`.
    pub index: u32,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// How frames are delivered into a local pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, TryFromBytes, IntoBytes, Immutable)]
#[repr(u16)]
pub enum Delivery {
    /// PASS: the kernel routes. Works with any CNI.
    #[default]
    Stack = 0,
    /// XDP_REDIRECT to the host side of the pod's veth. Only where the pod's end receives
    /// redirected frames (GRO on, or an XDP program).
    Redirect = 1,
    /// TC hands it to the pod's end itself (`bpf_redirect_peer`), behind GRO and ahead of the host's
    /// routing; XDP passes it there with a mark.
    Peer = 2,
}

/// Value of `sl_pod_v1` (HASH, key = [`Addr`]): a pod of this node. 24 bytes.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Pod {
    /// Host side interface.
    pub ifindex: u32,
    /// A [`Delivery`].
    pub delivery: u16,
    /// The pod's own MAC: destination of redirected frames.
    pub pod_mac: Mac,
    /// The host side's MAC: source of redirected frames.
    pub host_mac: Mac,
    /// Zero.
    pub reserved: [u8; 2],
    /// Largest IP packet in bytes that both ends of the pod's veth take; 0 if that is not known.
    pub mtu: u32,
}

/// A pod CIDR as a masked compare: `source & mask == net`. 32 bytes. A mask of zero in an unused
/// place never matches, because `net` is then not zero ([`PodNet::NONE`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PodNet {
    /// Network address.
    pub net: Addr,
    /// Mask; IPv4 masks have the first 96 bits set.
    pub mask: Addr,
}

impl PodNet {
    /// Matches nothing.
    pub const NONE: Self = Self { net: Addr([0xff; 16]), mask: Addr::NONE };

    /// Whether `addr` is inside.
    #[inline(always)]
    pub const fn contains(&self, addr: Addr) -> bool {
        let (a, n, m) = (addr.words64(), self.net.words64(), self.mask.words64());
        (a[0] & m[0] == n[0]) & (a[1] & m[1] == n[1])
    }
}

impl Default for PodNet {
    fn default() -> Self {
        Self::NONE
    }
}

/// Value of `sl_vtep_v1` (ARRAY, index 0 unused): a tunnel end of another node. 192 bytes.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Default,
)]
#[repr(C)]
pub struct Vtep {
    /// The peer's underlay address; [`Addr::NONE`] in an unused entry.
    pub remote: Addr,
    /// Our underlay address, outer source of encapsulated packets and the only outer destination
    /// that is decapsulated.
    pub local: Addr,
    /// VNI as on the wire: 24 bits and a reserved byte (RFC 7348 section 5).
    pub vni: Be32,
    /// UDP destination port towards the peer.
    pub port: Be16,
    /// One's complement sum (as raw machine words, folded, not inverted) of the constant part of
    /// the outer IPv4 header; unused for IPv6.
    pub ip_sum: u16,
    /// MAC of the peer's vxlan device: inner destination.
    pub remote_mac: Mac,
    /// MAC of our vxlan device: inner source.
    pub local_mac: Mac,
    /// Next hop towards `remote`.
    pub nexthop: u32,
    /// Index of the own tunnel that the VTEP belongs to.
    pub tunnel: u32,
    /// Outer traffic class: the DSCP (RFC 2474) in the upper six bits, zero in the others.
    pub class: u8,
    /// Bits of the inner traffic class that the outer one has too; the ECN field always is
    /// (RFC 6040).
    pub class_kept: u8,
    /// Zero.
    pub reserved: u16,
    /// Pod CIDRs of the peer, either family.
    pub pod_nets: [PodNet; 4],
}

// What encapsulation reads is one cache line.
const _: () = assert!(core::mem::offset_of!(Vtep, pod_nets) == 64);

impl Vtep {
    /// The ECN field of a traffic class (RFC 3168 section 5).
    pub const ECN: u8 = 0b11;

    /// The traffic class of outer headers around a packet with this one.
    #[inline(always)]
    pub const fn outer_class(class: u8, kept: u8, inner: u8) -> u8 {
        inner & (kept | Self::ECN) | class
    }

    /// Hop limit of outer headers: what the kernel's vxlan device sends by default.
    pub const OUTER_HOP_LIMIT: u8 = 64;
    /// Flags and fragment offset of outer IPv4 headers: DF. With the identification always zero a
    /// datagram must not be fragmentable (RFC 6864 section 4.1, atomic datagrams).
    pub const OUTER_FRAGMENT: Be16 = Be16::new(0x4000);

    /// [`Vtep::ip_sum`] of an outer IPv4 header (RFC 791 section 3.1): identification 0,
    /// [`Vtep::OUTER_FRAGMENT`], [`Vtep::OUTER_HOP_LIMIT`], UDP, and both addresses. Missing are the
    /// first word, which carries the traffic class, and the total length.
    pub const fn outer_ip_sum(local: Addr, remote: Addr) -> u16 {
        let (l, r) = (local.v4_bytes(), remote.v4_bytes());
        let words = [
            Self::OUTER_FRAGMENT.raw().to_ne_bytes(),
            [Self::OUTER_HOP_LIMIT, crate::IPPROTO_UDP],
            [l[0], l[1]],
            [l[2], l[3]],
            [r[0], r[1]],
            [r[2], r[3]],
        ];
        let mut sum = 0u32;
        let mut i = 0;
        while i < words.len() {
            sum += u16::from_ne_bytes(words[i]) as u32;
            i += 1;
        }
        sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}

/// Key of `sl_vtepsrc_v1`: who may send into the tunnel. 20 bytes; value: u32 VTEP index.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct VtepKey {
    /// Outer source address: any address of the peer node. Or its MAC ([`VtepKey::of_mac`]).
    pub source: Addr,
    /// VNI as on the wire, reserved byte zero; 1 with a MAC.
    pub vni: Be32,
}

impl VtepKey {
    /// What the reserved byte is beside a MAC. No packet is looked up by it: the byte is masked out.
    const BY_MAC: u32 = 1;

    /// The key of a tunnel end's device, by which it is known where the kernel has taken the outer
    /// headers off.
    pub const fn of_mac(mac: Mac, vni: Be32) -> Self {
        Self::of_mac_word(Self::mac_word(mac), vni)
    }

    /// A MAC as the first word of an address.
    #[inline(always)]
    pub const fn mac_word(mac: Mac) -> u64 {
        let [a, b, c, d, e, f] = mac.0;
        u64::from_ne_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The key of a device by the word of its MAC. In words, because a program's stack takes no others
    /// than aligned ones.
    #[inline(always)]
    pub const fn of_mac_word(word: u64, vni: Be32) -> Self {
        let source = zerocopy::transmute!([word, 0]);
        Self { source, vni: Be32::new(vni.host() | Self::BY_MAC) }
    }

    /// Whether the key is a device's.
    pub const fn is_mac(&self) -> bool {
        self.vni.host() & Self::BY_MAC != 0
    }
}

/// Value of `sl_tunnel_v1` (ARRAY, index 0 unused): one of our tunnel devices. 64 bytes; `vni` zero and `ifindex`
/// zero in an unused entry.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Tunnel {
    /// VNI as on the wire, reserved byte zero.
    pub vni: Be32,
    /// The kernel's vxlan device, 0 if there is none.
    pub ifindex: u32,
    /// Our address inside our own pod CIDR, IPv4: SNAT source of tunnelled requests.
    pub addr_v4: Addr,
    /// The same for IPv6.
    pub addr_v6: Addr,
    /// MAC of the kernel's vxlan device.
    pub mac: Mac,
    /// UDP destination port.
    pub port: Be16,
    /// Our underlay address: the outer destination of packets for this tunnel.
    pub local: Addr,
}

/// Value of `sl_nexthop_v1` (ARRAY, index 0 unused): where frames leave. 24 bytes. The agent keeps
/// it current from the kernel's routes and neighbours.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NextHop {
    /// Exit interface, 0 while unresolved.
    pub ifindex: u32,
    /// MTU of the exit: largest IP packet in bytes.
    pub mtu: u32,
    /// The next hop's MAC.
    pub dst_mac: Mac,
    /// The exit interface's MAC.
    pub src_mac: Mac,
    /// Zero.
    pub reserved: u32,
}
