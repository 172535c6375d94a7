//! Sizes and offsets in the object equal those of the Rust types that user space writes with.
//!
//! Both are compiled from `sluice-abi`, for two machines: what is compared is what the compilers
//! made of it. The object's side is read from its BTF (kernel Documentation/bpf/btf.rst).

use std::collections::BTreeMap;
use std::mem::offset_of;

use object::{Object, ObjectSection};
use sluice::attach::without_frags;
use sluice_abi::{
    Addr, AnswerCounter, AnswerKind, Answers, Ask, Backend, BackendCounter, Be16, Be32, Bucket,
    Exit, Extent, Flood, FloodCpu, FloodWord, FlowRecord, FlowSet, Fragment, Frontend, FrontendKey,
    Hook, JUMP_SLOTS, Mac, Near, NearPod, NearSource, NextHop, OwnMac, Pod, PodNet, ReasonCounter,
    Scratch, Seeds, ServiceCounter, Settings, SnatSlot, Stopped, Timeouts, Tunnel, Vtep, VtepKey,
    maps,
};
use sluice_tests::kernel::OBJECT;

/// A field: name, offset and size in bytes.
type Field = (String, usize, usize);

/// What a type is made of.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    size: usize,
    fields: Vec<Field>,
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layouts {
    ($($name:ident { $($field:tt),+ })+) => {
        fn layouts() -> BTreeMap<&'static str, Layout> {
            BTreeMap::from([$((stringify!($name), Layout {
                size: size_of::<$name>(),
                fields: vec![$((
                    stringify!($field).to_owned(),
                    offset_of!($name, $field),
                    size_of_field(|t: &$name| &t.$field),
                )),+],
            })),+])
        }
    };
}

layouts! {
    Answers { source_rate, source_burst, cpu_rate, cpu_burst }
    AnswerCounter { sent, limited }
    Ask { renew, tcp_flags, in_cluster, snat, tagged, uplink, reserved }
    Bucket { 0 }
    Backend { addr, port, route, index, proto, reserved }
    BackendCounter { forward_packets, forward_bytes, reply_packets, reply_bytes, new_flows }
    Exit { index, kind, reserved, dst_mac, src_mac }
    Extent { offset, size }
    FlowRecord {
        client, vip, backend, client_port, vip_port, backend_port, source_port, proto, reserved,
        flags, l4_delta, ip_delta, epoch, tunnel, service, backend_id, seen, state, source,
        ack_forward, forward, reply, created, snat, timeout, decided, ack_reply, reply_tags,
        reserved2
    }
    Flood { limit, window, mask, reserved }
    FloodCpu { window, count, on, since, begun, put, promoted, overwritten }
    FloodWord { 0 }
    FlowSet { tags, records }
    Fragment { src, dst, id, proto, hook, part, fate, slot, tag, noted, seal }
    Frontend {
        service, flags, external, internal, affinity_seconds, reserved, reserved2
    }
    FrontendKey { addr, port, proto, reserved }
    Near { sources, pods }
    NearPod { addr, generation, is_pod, pod }
    NearSource { key, generation, index, reserved }
    NextHop { ifindex, mtu, dst_mac, src_mac, reserved }
    OwnMac { ifindex, mac, reserved }
    Pod { ifindex, delivery, pod_mac, host_mac, reserved, mtu }
    PodNet { net, mask }
    ReasonCounter { packets, bytes }
    Scratch { draft, best, ask, taken, seq, ack, reserved, forgotten, begun, bytes, stopped, fragment }
    Seeds { flow, cluster }
    ServiceCounter {
        forward_packets, forward_bytes, reply_packets, reply_bytes, new_flows, dropped_packets
    }
    Settings {
        flags, epoch, seeds, timeouts, vxlan_ports, snat_first_port, snat_last_port, flow_set_mask,
        ticks_per_second, node_v4, node_v6, hairpin_v4, hairpin_v6, fail_safe_tcp, fail_safe_udp, answers,
        snat_reply_first, snat_reply_last, fragment_mask, own_macs, flood
    }
    SnatSlot { 0 }
    Stopped { reason, service, tunnel, mtu, l3, l4, proto, reserved }
    Timeouts {
        tcp_syn, tcp_established, tcp_closing, udp_oneway, udp_replied, stamp, redecide, reserved
    }
    Tunnel { vni, ifindex, addr_v4, addr_v6, mac, port, local }
    Vtep {
        remote, local, vni, port, ip_sum, remote_mac, local_mac, nexthop, tunnel, class,
        class_kept, reserved, pod_nets
    }
    VtepKey { source, vni }
}

/// Name of the map; key; value; whether user space maps it into its memory; entries by default.
type MapRow = (&'static str, &'static str, &'static str, bool, u32);

const MAPS: [MapRow; 26] = [
    (maps::SETTINGS, "u32", "Settings", false, 1),
    (maps::FRONTEND, "FrontendKey", "Frontend", false, maps::DEFAULT_FRONTENDS),
    (maps::MAGLEV, "u32", "u32", true, maps::DEFAULT_MAGLEV),
    (maps::BACKEND, "u32", "Backend", false, maps::DEFAULT_BACKENDS),
    (maps::POD, "Addr", "Pod", false, maps::DEFAULT_PODS),
    (maps::VTEP, "u32", "Vtep", false, maps::DEFAULT_VTEPS),
    (maps::VTEP_SOURCE, "VtepKey", "u32", false, maps::DEFAULT_VTEP_SOURCES),
    (maps::TUNNEL, "u32", "Tunnel", false, sluice_abi::MAX_TUNNELS),
    (maps::NEXTHOP, "u32", "NextHop", false, maps::DEFAULT_NEXTHOPS),
    (maps::FLOW, "u32", "FlowSet", true, maps::DEFAULT_ALL_FLOW_SETS),
    (maps::FLOW_LOCK, "u32", "FlowLock", false, maps::FLOW_LOCKS),
    (maps::SCRATCH, "u32", "Scratch", false, 1),
    (maps::SNAT, "u32", "SnatSlot", true, maps::SNAT_SLOTS),
    (maps::REASON, "u32", "ReasonCounter", false, maps::REASON_SLOTS * Hook::ALL.len() as u32),
    (maps::SERVICE_STAT, "u32", "ServiceCounter", false, maps::DEFAULT_SERVICES),
    (maps::BACKEND_STAT, "u32", "BackendCounter", false, maps::DEFAULT_BACKENDS),
    (maps::JUMP, "u32", "u32", false, JUMP_SLOTS),
    (maps::JUMP_TC, "u32", "u32", false, JUMP_SLOTS),
    (maps::ANSWER, "u32", "AnswerCounter", false, AnswerKind::ALL.len() as u32),
    (maps::BUCKET, "u32", "Bucket", false, Bucket::SOURCES),
    (maps::BUCKET_CPU, "u32", "Bucket", false, 1),
    (maps::FRAGMENT, "u32", "Fragment", false, maps::DEFAULT_FRAGMENTS),
    (maps::NEAR, "u32", "Near", false, 1),
    (maps::LOOKUPS, "u32", "u32", false, 1),
    (maps::FLOOD, "u32", "FloodWord", true, 1),
    (maps::FLOOD_CPU, "u32", "FloodCpu", false, 1),
];

#[test]
fn every_layout_in_the_object_is_that_of_user_space() {
    let btf = Btf::of_object();
    for (name, expected) in layouts() {
        assert_eq!(btf.layout(name), expected, "{name}");
    }
    for (name, size) in [
        ("Addr", size_of::<Addr>()),
        ("Be16", size_of::<Be16>()),
        ("Be32", size_of::<Be32>()),
        ("Mac", size_of::<Mac>()),
    ] {
        assert_eq!(btf.layout(name).size, size, "{name}");
    }
}

#[test]
fn every_map_in_the_object_is_that_of_the_abi() {
    let btf = Btf::of_object();
    let mut names: Vec<&str> = btf.maps().into_keys().collect();
    let mut expected = maps::ALL.to_vec();
    names.sort_unstable();
    expected.sort_unstable();
    assert_eq!(names, expected, "maps of the object");
    let mut rows: Vec<&str> = MAPS.iter().map(|row| row.0).collect();
    rows.sort_unstable();
    assert_eq!(rows, expected, "maps of this test");
    for (name, key, value, mapped, entries) in MAPS {
        // BPF_OBJ_NAME_LEN (kernel include/uapi/linux/bpf.h), the terminating zero included.
        assert!(name.len() < 16, "{name}");
        let map = &btf.maps()[name];
        assert_eq!(map.key, key, "key of {name}");
        assert_eq!(map.value, value, "value of {name}");
        assert_eq!(map.entries, entries as usize, "entries of {name}");
        const BPF_F_MMAPABLE: usize = 1 << 10;
        assert_eq!(map.flags & BPF_F_MMAPABLE != 0, mapped, "flags of {name}");
    }
}

/// A map as the object declares it.
struct Declared {
    key: String,
    value: String,
    entries: usize,
    flags: usize,
}

/// The kinds of BTF types that matter here.
enum Kind {
    Int { size: usize },
    Pointer { to: usize },
    Array { of: usize, len: usize },
    Struct { size: usize, members: Vec<(String, usize, usize)> },
    Var { of: usize },
    Other,
}

/// The object's type information.
struct Btf(Vec<(String, Kind)>);

impl Btf {
    fn of_object() -> Self {
        let object = object::File::parse(OBJECT).expect("an ELF object");
        let section = object.section_by_name(".BTF").expect("a section .BTF");
        Self::parse(section.data().expect("its data"))
    }

    fn parse(data: &[u8]) -> Self {
        let word = |at: usize| {
            let bytes = data[at..at + 4].try_into().expect("four bytes");
            u32::from_le_bytes(bytes) as usize
        };
        assert_eq!(word(0) & 0xffff, 0xeb9f, "BTF's magic number");
        let header = word(4);
        let (types, types_end) = (header + word(8), header + word(8) + word(12));
        let strings = header + word(16);
        let text = |offset: usize| {
            let bytes = data[strings + offset..].split(|&b| b == 0).next().unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        // Type 0 is void.
        let mut list = vec![(String::new(), Kind::Other)];
        let mut at = types;
        while at < types_end {
            let (name, info, size) = (text(word(at)), word(at + 4), word(at + 8));
            at += 12;
            let (kind, len) = (info >> 24 & 0x1f, info & 0xffff);
            let (kind, more) = match kind {
                1 => (Kind::Int { size }, 4),
                2 => (Kind::Pointer { to: size }, 0),
                3 => (Kind::Array { of: word(at), len: word(at + 8) }, 12),
                4 | 5 => {
                    let members = (0..len).map(|i| at + i * 12);
                    let members =
                        members.map(|m| (text(word(m)), word(m + 4), word(m + 8) / 8)).collect();
                    (Kind::Struct { size, members }, len * 12)
                }
                6 => (Kind::Other, len * 8),
                13 => (Kind::Other, len * 8),
                14 => (Kind::Var { of: size }, 4),
                15 => (Kind::Other, len * 12),
                17 => (Kind::Other, 4),
                19 => (Kind::Other, len * 12),
                _ => (Kind::Other, 0),
            };
            list.push((name, kind));
            at += more;
        }
        Self(list)
    }

    fn size(&self, id: usize) -> usize {
        match &self.0[id].1 {
            Kind::Int { size } | Kind::Struct { size, .. } => *size,
            Kind::Array { of, len } => self.size(*of) * len,
            _ => panic!("type {id} {} has no size here", self.0[id].0),
        }
    }

    fn layout(&self, name: &str) -> Layout {
        let found: Vec<&Kind> = self
            .0
            .iter()
            .filter(|(n, kind)| n == name && matches!(kind, Kind::Struct { .. }))
            .map(|(_, kind)| kind)
            .collect();
        let [Kind::Struct { size, members }] = found[..] else {
            panic!("{} structs {name} in the object", found.len());
        };
        let fields = members
            .iter()
            // Unnamed fields are called __0 and so on.
            .map(|(name, of, at)| (name.trim_start_matches("__").to_owned(), *at, self.size(*of)))
            .collect();
        Layout { size: *size, fields }
    }

    fn maps(&self) -> BTreeMap<&str, Declared> {
        let maps = self.0.iter().filter_map(|(name, kind)| match kind {
            Kind::Var { of } if name.starts_with("sl_") => Some((name.as_str(), self.map(*of))),
            _ => None,
        });
        maps.collect()
    }

    /// A map is a struct of pointers: to the key, to the value, to arrays as long as a number.
    fn map(&self, id: usize) -> Declared {
        let Kind::Struct { members, .. } = &self.0[id].1 else { panic!("a map that is no struct") };
        let pointed = |field: &str| {
            let (_, of, _) = members.iter().find(|(n, ..)| n == field).expect("a field of a map");
            match &self.0[*of].1 {
                Kind::Pointer { to } => *to,
                _ => panic!("{field} is no pointer"),
            }
        };
        let number = |field: &str| match &self.0[pointed(field)].1 {
            Kind::Array { len, .. } => *len,
            _ => panic!("{field} is no number"),
        };
        Declared {
            key: self.0[pointed("key")].0.clone(),
            value: self.0[pointed("value")].0.clone(),
            entries: number("max_entries"),
            flags: number("map_flags"),
        }
    }
}

/// Generic mode gets the object with this section renamed to `xdp`. The loader finds what BTF says of
/// functions by the section's name, so there must be no other of that name before.
#[test]
fn all_xdp_programs_are_in_one_section_for_frames_in_several_buffers() {
    let sections = |object: &[u8]| {
        let file = object::File::parse(object).expect("an ELF object");
        let names = file.sections().filter_map(|s| s.name().ok().map(str::to_owned));
        names.filter(|name| name.starts_with("xdp")).collect::<Vec<_>>()
    };
    assert_eq!(sections(OBJECT), ["xdp.frags"]);
    assert_eq!(sections(&without_frags(OBJECT)), ["xdp"]);
}
