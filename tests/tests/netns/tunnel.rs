//! Pods of different nodes: the kernel's vxlan device on node2, the datapath's decapsulation on
//! node1.

use std::net::IpAddr;
use std::panic;
use std::process::Command;
use std::thread;

use sluice_lab::{Family, LabSpec, Mode, RpFilter, plan};

use crate::bed::{Bed, Config, FAMILIES, NODE, delta, drops, iperf};

const HERE: &str = "pod1-1";
const THERE: &str = "pod2-1";

/// One corner of the configurations.
struct Corner {
    mode: Mode,
    underlay: Family,
    rp_filter: RpFilter,
    delivery: &'static str,
}

impl Corner {
    fn bed(&self) -> Bed {
        let spec = LabSpec {
            underlay: self.underlay,
            rp_filter: self.rp_filter,
            ..LabSpec::kernel_only(2, 1)
        };
        let config = Config { delivery: self.delivery, ..Config::new(self.mode) };
        let bed = Bed::up(&spec, config, &[]);
        let status = bed.status();
        assert_eq!(status["mode"][plan::UPLINK], self.mode.as_str(), "{status:#}");
        let by_stack = status["stack_delivery"].as_object().is_some_and(|s| s.contains_key("pod1"));
        assert_eq!(by_stack, self.delivery == "stack", "{status:#}");
        bed
    }

    /// Pings of every size and iperf3, both ways and in both families; every packet that comes out
    /// of the tunnel at node1 is counted by the datapath.
    fn carries_everything(&self) {
        let mut bed = self.bed();
        for family in FAMILIES {
            let (here, there) = (bed.pod(HERE).address(family), bed.pod(THERE).address(family));
            self.pings(&bed, HERE, there);
            self.pings(&bed, THERE, here);
        }
        for pod in [HERE, THERE] {
            let host = bed.lab.host(pod).expect("a pod");
            let mut server = Command::new("iperf3");
            bed.lab.spawn(&host, "iperf3", server.arg("--server")).expect("iperf3");
        }
        // In each run both ends send, and in each pair each end connects once.
        let [v4, v6] = FAMILIES;
        let at = |pod, family| bed.pod(pod).address(family);
        iperf_pair(&bed, at(THERE, v4), at(HERE, v6), &["--bitrate", "100M"]);
        iperf_pair(&bed, at(THERE, v6), at(HERE, v4), &["--udp", "--bitrate", "5M"]);
    }

    /// From nothing to the MTU, with DF set; then one that must be cut into fragments.
    fn pings(&self, bed: &Bed, from: &str, to: IpAddr) {
        const COUNT: usize = 3;
        // IPv4 20 or IPv6 40 bytes, ICMP 8.
        let headers = if to.is_ipv4() { 28 } else { 48 };
        let full = usize::from(plan::pod_mtu(self.underlay)) - headers;
        let sizes = [0, 1, 56, 512, full - 1, full];
        let before = bed.counters();
        for size in sizes {
            bed.ping(from, to, size, COUNT, &["-M", "do"]);
        }
        // Requests or replies: what comes to node1 comes out of the tunnel.
        let decapsulated = delta(bed, &before).reason("decap_local");
        assert_eq!(decapsulated, (sizes.len() * COUNT) as u64, "ping from {from} to {to}");
        bed.ping(from, to, 2 * full, COUNT, &["-M", "dont"]);
    }
}

/// Two runs at once, one from each end. What came to the pod on node1 was decapsulated by the
/// datapath, all of it.
fn iperf_pair(bed: &Bed, there: IpAddr, here: IpAddr, more: &[&str]) {
    let before = bed.counters();
    let bytes: u64 = thread::scope(|scope| {
        let out = scope.spawn(|| iperf(bed, HERE, there, more).1);
        let back = scope.spawn(|| iperf(bed, THERE, here, more).0);
        [out, back].map(|run| run.join().unwrap_or_else(|e| panic::resume_unwind(e))).iter().sum()
    });
    let counted = delta(bed, &before);
    let decapsulated = counted.reason("decap_local");
    // The pod's kernel merges packets; the wire cannot carry the bytes in fewer.
    assert!(
        decapsulated >= bytes / u64::from(plan::UNDERLAY_MTU),
        "iperf3 {more:?}: {bytes} bytes came to {HERE}, {NODE} decapsulated {decapsulated} \
         packets: some went round the datapath"
    );
    assert!(drops(&counted).is_empty(), "iperf3 {more:?}: {:?}", drops(&counted));
}

// Eight corners cover every pair of settings.

#[test]
fn native_v4_underlay_redirect_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V4, RpFilter::Off);
    Corner { mode: Mode::Native, underlay, rp_filter, delivery: "redirect" }.carries_everything();
}

#[test]
fn native_v4_underlay_stack_strict_rp_filter_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V4, RpFilter::Strict);
    Corner { mode: Mode::Native, underlay, rp_filter, delivery: "stack" }.carries_everything();
}

#[test]
fn native_v6_underlay_redirect_strict_rp_filter_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V6, RpFilter::Strict);
    Corner { mode: Mode::Native, underlay, rp_filter, delivery: "redirect" }.carries_everything();
}

#[test]
fn native_v6_underlay_stack_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V6, RpFilter::Off);
    Corner { mode: Mode::Native, underlay, rp_filter, delivery: "stack" }.carries_everything();
}

#[test]
fn generic_v4_underlay_stack_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V4, RpFilter::Off);
    Corner { mode: Mode::Generic, underlay, rp_filter, delivery: "stack" }.carries_everything();
}

#[test]
fn generic_v4_underlay_redirect_strict_rp_filter_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V4, RpFilter::Strict);
    Corner { mode: Mode::Generic, underlay, rp_filter, delivery: "redirect" }.carries_everything();
}

#[test]
fn generic_v6_underlay_redirect_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V6, RpFilter::Off);
    Corner { mode: Mode::Generic, underlay, rp_filter, delivery: "redirect" }.carries_everything();
}

#[test]
fn generic_v6_underlay_stack_strict_rp_filter_carries_pod_to_pod_traffic_and_counts_it() {
    let (underlay, rp_filter) = (Family::V6, RpFilter::Strict);
    Corner { mode: Mode::Generic, underlay, rp_filter, delivery: "stack" }.carries_everything();
}
